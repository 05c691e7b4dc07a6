"""Compiled models, run as they were written for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_blocks = 0
_stance: Any = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """What torch.compile compiled runs as it was written, until the last such block ends.

    A compiled graph shows no calls; without this it would be looked into in silence.
    """
    global _blocks, _stance
    with _lock:
        if not _blocks:
            _stance = torch.compiler.set_stance("force_eager")
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                _stance.__exit__(None, None, None)
