"""Factors on heads' outputs, where someone above takes a derivative by them.

A transformers model's attention shows what its heads gave to the gate of the context (the thread or
asyncio task) it runs in. Without one that is the reading of one context variable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from torch import Tensor, nn

#: From the attention module and its heads' outputs [B, Lq, Hq, Dv] to what takes their place.
Gate: TypeAlias = Callable[[nn.Module, Tensor], Tensor]

_GATE: ContextVar[Gate | None] = ContextVar("manyheads_gate", default=None)

#: The gate of this context.
gate = _GATE.get


@contextmanager
def gating(own: Gate) -> Iterator[None]:
    """For the time of the block, heads of this context pass through `own`."""
    token = _GATE.set(own)
    try:
        yield
    finally:
        _GATE.reset(token)
