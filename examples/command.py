"""How the examples that typer runs say what went wrong: in one line, not with a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import CheckpointError

from manyheads.errors import ManyHeadsError


def run(program: Callable[[], Any]) -> None:
    """Run a command line; wrong input, files, data or checkpoints end it with their message."""
    try:
        program()
    except (ManyHeadsError, CheckpointError, OSError, ValueError) as problem:
        sys.exit(f"{Path(sys.argv[0]).name}: {problem}")
