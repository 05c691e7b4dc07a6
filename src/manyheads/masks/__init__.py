"""Masks: which keys a query may attend to, as an algebra with & | ~.

Read in this order: `algebra` (what a mask is and how it is lowered), the leaves (`relative`,
`extents`, `given`), then `band` and `ranges`, the two compact forms. Imports go one way:
leaves -> algebra -> band, ranges -> frame -> checks.
"""

from __future__ import annotations

from torch import Tensor

from manyheads.errors import ArgumentTypeError
from manyheads.masks.algebra import Mask
from manyheads.masks.extents import Documents, KeyLengths, KeyRange, QueryRows
from manyheads.masks.given import Dense, Predicate
from manyheads.masks.placement import default_positions
from manyheads.masks.relative import Causal, Chunks, FirstKeys, Window
from manyheads.spec import FullPlan, Geometry, MaskPlan, QueryPositions

__all__ = [
    "Causal",
    "Chunks",
    "Dense",
    "Documents",
    "FirstKeys",
    "KeyLengths",
    "KeyRange",
    "Mask",
    "Predicate",
    "QueryRows",
    "Window",
    "as_mask",
    "lower",
]

_FULL = FullPlan()


def lower(mask: Mask | Tensor | None, geometry: Geometry) -> tuple[MaskPlan, QueryPositions]:
    """The plan for a call's mask and where its query rows stand.

    None allows everything; a bool tensor is Dense(tensor). Raises errors.ArgumentError,
    ArgumentTypeError or ShapeError where the mask does not fit the geometry.

    >>> import torch
    >>> geometry = Geometry(1, 1, 3, 5, torch.device("cpu"))
    >>> plan, positions = lower(Causal() & Window(3, 0), geometry)
    >>> plan.kind, plan.left, plan.right, positions.start
    ('band', 3, 0, 2)
    """
    if isinstance(mask, Mask):
        return mask.lower(geometry)
    if mask is None:
        return _FULL, default_positions(geometry)
    return as_mask(mask).lower(geometry)


def as_mask(mask: Mask | Tensor) -> Mask:
    """The mask itself, or Dense of a bool tensor; raises errors.ArgumentTypeError for all else."""
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor):
        return Dense(mask)
    raise ArgumentTypeError(
        f"mask must be None, a mask of manyheads, or a bool tensor; got {type(mask).__name__}. "
        "For example mh.Causal(), or torch.ones(Lq, Lk, dtype=torch.bool).tril()."
    )
