"""The base class of all masks, their combination with & | ~, and how an expression is lowered.

A leaf says what it means three times, each in its own way: `_allowed` (the definition, a bool
tensor), `_band` (a window and first keys, if it is one) and `_ranges` (key ranges per row).
Lowering tries the band, then ranges, then falls back to the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from manyheads.arguments import FARTHEST
from manyheads.errors import ArgumentTypeError
from manyheads.masks.band import Band, band_ranges, join, meet
from manyheads.masks.frame import DocumentTable, Frame
from manyheads.masks.placement import aligned_frame, default_positions
from manyheads.masks.ranges import NotCompactError, Ranges
from manyheads.masks.values import Value
from manyheads.spec import (
    DensePlan,
    Geometry,
    MaskPlan,
    PerBatch,
    QueryPositions,
)


class Mask(Value):
    """Which keys a query may attend to; combine masks with `&`, `|` and `~`.

    True means "may attend". Masks are immutable, hold no sizes of their own, and are read against
    a call's geometry: `lower` gives the plan a kernel runs on, `materialize` the bool tensor it
    stands for. Masks are equal when they are the same expression with equal numbers.

    >>> from manyheads.masks import Causal, FirstKeys, Window
    >>> mask = Causal() & (Window(1, 0) | FirstKeys(1))
    >>> mask
    Causal() & (Window(1, 0) | FirstKeys(1))
    >>> print(mask.materialize(4, 4)[0, 0].int())
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 0, 1, 1]], dtype=torch.int32)
    """

    #: Only ints, so the same geometry always gives the same plan, which may be kept.
    _fixed = True
    #: Made of plain numbers alone, so that there may be one plan for every geometry (decoding
    #: builds one per call, for a geometry that grows by a key each time).
    _sizeless = False
    #: That plan, once made.
    _one_plan: MaskPlan | None = None
    #: The last plan: (geometry, inference mode or not, lowered).
    _kept: tuple[Geometry, bool, tuple[MaskPlan, QueryPositions]] | None = None

    def __and__(self, other: Mask) -> Mask:
        return AllOf(_parts(AllOf, self) + _parts(AllOf, _mask(other, "&")))

    def __or__(self, other: Mask) -> Mask:
        return AnyOf(_parts(AnyOf, self) + _parts(AnyOf, _mask(other, "|")))

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise ArgumentTypeError(
            f"A mask has no truth value; got {self!r} in a condition or next to and/or/not. "
            "Combine masks with & | ~, and test for absence with `mask is None`."
        )

    def lower(self, geometry: Geometry) -> tuple[MaskPlan, QueryPositions]:
        """The smallest plan that means this mask for a call's sizes, and where its rows stand.

        The kind of plan follows from the expression, never from numbers inside tensors, except
        for Dense and Predicate, which are scanned. Raises errors.ArgumentError and its kin when
        the mask does not fit the geometry.
        """
        if self._one_plan is not None:
            return self._one_plan, default_positions(geometry)
        if torch.compiler.is_compiling() or isinstance(geometry.query_start, Tensor):
            return self._lower(geometry)
        inference = torch.is_inference_mode_enabled()
        kept = self._kept
        if kept is not None and kept[0] == geometry and kept[1] == inference:
            return kept[2]
        lowered = self._lower(geometry)
        if self._sizeless and self._band_fits_every_size(geometry):
            self._remember(_one_plan=lowered[0])
        elif self._fixed and _may_keep(*lowered):
            self._remember(_kept=(geometry, inference, lowered))
        return lowered

    def materialize(
        self,
        q_len: int,
        k_len: int,
        *,
        batch: int = 1,
        q_heads: int = 1,
        query_start: PerBatch | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The mask as a bool tensor [B|1, Hq|1, Lq, Lk]: its definition, O(Lq * Lk) memory.

        Row r stands at key position query_start + r; None aligns the last query with the last
        key (Lk - Lq), unless the mask aligns the rows itself (KeyLengths, Documents).
        """
        where = torch.empty(0, device=device).device  # "cuda" with its number, as tensors have it
        geometry = Geometry(batch, q_heads, q_len, k_len, where, query_start)
        return self._dense(self._frame(geometry))

    def _band_fits_every_size(self, geometry: Geometry) -> bool:
        """Whether one plan serves all lengths; first keys, say, are all keys of a short call."""
        band = self._band(self._frame(geometry))
        return band is not None and band.plan(0) == band.plan(FARTHEST) is not None

    def _lower(self, geometry: Geometry) -> tuple[MaskPlan, QueryPositions]:
        frame = self._frame(geometry)
        band = self._band(frame)
        plan: MaskPlan | None = None if band is None else band.plan(geometry.k_len)
        if plan is None:
            try:
                plan = self._ranges(frame).plan(geometry)
            except NotCompactError as error:
                # torch.compile cannot trace repr().
                name = "mask" if torch.compiler.is_compiling() else _shortened(repr(self))
                plan = self._dense_plan(frame, f"{name}: {error}")
        return plan, frame.positions

    def _dense_plan(self, frame: Frame, reason: str) -> DensePlan:
        return DensePlan(self._dense(frame), reason)

    def _dense(self, frame: Frame) -> Tensor:
        allowed = self._allowed(frame)
        b, h = (1, 1, 1, 1, *allowed.shape)[-4:-2]
        return allowed.expand(b, h, frame.geometry.q_len, frame.geometry.k_len)

    def _frame(self, geometry: Geometry) -> Frame:
        """Checks every leaf against the geometry, and places the query rows."""
        aligning: list[Mask] = []
        for leaf in self._leaves():
            leaf._check(geometry)
            if leaf._aligns is not None and all(leaf is not known for known in aligning):
                aligning.append(leaf)
        if aligning:
            return aligned_frame(aligning, geometry)
        return Frame(geometry, default_positions(geometry))

    # What a leaf says about itself. The combinations below build theirs from their parts'.

    #: "documents" or "lengths" for masks that place the query rows themselves.
    _aligns: str | None = None

    def _leaves(self) -> Sequence[Mask]:
        return (self,)

    def _check(self, geometry: Geometry) -> None:
        """Raises when the leaf does not fit the call's sizes."""

    def _document_table(self, geometry: Geometry) -> DocumentTable:
        raise NotImplementedError

    def _query_start(self, geometry: Geometry) -> PerBatch:
        raise NotImplementedError

    def _narrow(self, frame: Frame) -> Frame:
        """The frame for the masks that this one is `&`-ed with."""
        return frame

    def _allowed(self, frame: Frame) -> Tensor:
        """bool, broadcastable to [B, Hq, Lq, Lk]: the definition."""
        raise NotImplementedError

    def _band(self, frame: Frame) -> Band | None:
        """The mask as a Band, or None."""
        return None

    def _ranges(self, frame: Frame) -> Ranges:
        """The mask as key ranges; raises NotCompactError where that cannot be."""
        raise NotImplementedError


class _Combination(Mask):
    """Masks of several parts, flattened: a & b & c is one AllOf."""

    parts: tuple[Mask, ...]
    _all_leaves: list[Mask]
    _sign: str

    def __init__(self, parts: tuple[Mask, ...]) -> None:
        leaves: list[Mask] = []
        fixed, sizeless = True, True
        for part in parts:
            leaves += part._leaves()
            fixed, sizeless = fixed and part._fixed, sizeless and part._sizeless
        self._remember(parts=parts, _all_leaves=leaves, _fixed=fixed, _sizeless=sizeless)

    def _leaves(self) -> Sequence[Mask]:
        return self._all_leaves

    def _values(self) -> tuple[Any, ...]:
        return (self.parts,)

    def __repr__(self) -> str:
        return f" {self._sign} ".join(
            f"({part!r})" if isinstance(part, _Combination) else repr(part) for part in self.parts
        )


class AllOf(_Combination):
    """a & b: the keys that every part allows.

    KeyRange and Documents among the parts set where FirstKeys and Chunks in the other parts count
    from.
    """

    _sign = "&"

    def _inside(self, frame: Frame) -> Frame:
        for part in self.parts:
            frame = part._narrow(frame)
        return frame

    def _allowed(self, frame: Frame) -> Tensor:
        inner = self._inside(frame)
        allowed = self.parts[0]._allowed(inner)
        for part in self.parts[1:]:
            allowed = allowed & part._allowed(inner)
        return allowed

    def _band(self, frame: Frame) -> Band | None:
        inner = self._inside(frame)
        band: Band | None = self.parts[0]._band(inner)
        for part in self.parts[1:]:
            other = None if band is None else part._band(inner)
            if band is None or other is None:
                return None
            band = meet(band, other)
        return band

    def _ranges(self, frame: Frame) -> Ranges:
        if (window := _window_ranges(self, frame)) is not None:
            return window
        inner = self._inside(frame)
        ranges = self.parts[0]._ranges(inner)
        for part in self.parts[1:]:
            ranges = ranges.meet(part._ranges(inner))
        return ranges


class AnyOf(_Combination):
    """a | b: the keys that some part allows."""

    _sign = "|"

    def _allowed(self, frame: Frame) -> Tensor:
        allowed = self.parts[0]._allowed(frame)
        for part in self.parts[1:]:
            allowed = allowed | part._allowed(frame)
        return allowed

    def _band(self, frame: Frame) -> Band | None:
        band: Band | None = self.parts[0]._band(frame)
        for part in self.parts[1:]:
            other = None if band is None else part._band(frame)
            if band is None or other is None:
                return None
            band = join(band, other)
        return band

    def _ranges(self, frame: Frame) -> Ranges:
        if (window := _window_ranges(self, frame)) is not None:
            return window
        ranges = self.parts[0]._ranges(frame)
        for part in self.parts[1:]:
            ranges = ranges.join(part._ranges(frame))
        return ranges


class Not(Mask):
    """~a: the keys in [0, Lk) that a does not allow; ~~a is a."""

    part: Mask

    def __init__(self, part: Mask) -> None:
        self._remember(part=part, _fixed=part._fixed)

    def __invert__(self) -> Mask:
        return self.part

    def _leaves(self) -> Sequence[Mask]:
        return self.part._leaves()

    def _allowed(self, frame: Frame) -> Tensor:
        return ~self.part._allowed(frame)

    def _ranges(self, frame: Frame) -> Ranges:
        return self.part._ranges(frame).complement()

    def _values(self) -> tuple[Any, ...]:
        return (self.part,)

    def __repr__(self) -> str:
        part = repr(self.part)
        return f"~({part})" if isinstance(self.part, _Combination) else f"~{part}"


def _may_keep(plan: MaskPlan, positions: QueryPositions) -> bool:
    """Small, and made of real tensors, not of the stand-ins that tracing makes."""
    if isinstance(plan, DensePlan):
        return False
    values = [getattr(part, field.name) for part in (plan, positions) for field in fields(part)]
    return all(type(value) is Tensor for value in values if isinstance(value, Tensor))


def _window_ranges(mask: Mask, frame: Frame) -> Ranges | None:
    """One range per row where the whole of `mask` is a plain window in a key range."""
    band = mask._band(frame)
    if band is None or band.window is None or band.first is not None:
        return None
    return band_ranges(band, frame)


def _parts(kind: type[_Combination], mask: Mask) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, kind) else (mask,)


def _mask(other: object, sign: str) -> Mask:
    if isinstance(other, Mask):
        return other
    fix = "Wrap the tensor: mh.Dense(tensor)." if isinstance(other, Tensor) else "Use a mask."
    raise ArgumentTypeError(
        f"Masks combine with masks; got {type(other).__name__} on the right of {sign}. {fix}"
    )


def _shortened(text: str, longest: int = 120) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."
