"""The definition itself (definition.py) as a backend: slow, and able to do everything."""

from __future__ import annotations

from torch import Tensor

from manyheads import definition
from manyheads.spec import AttentionCall, AttentionSpec

NAME = "reference"


def why_not(spec: AttentionSpec) -> list[str]:
    """Nothing is refused: this is the backend of last resort."""
    return []


def memory_note(spec: AttentionSpec) -> str | None:
    """Why memory beyond inputs and outputs grows with Lq * Lk."""
    return "it stores the scores: memory grows with Lq * Lk"


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Returns out [B, Hq, Lq, Dv] in the call's dtype, and lse [B, Hq, Lq] or None.

    lse is float32, or float64 for a float64 call.
    """
    return definition.attend(call)
