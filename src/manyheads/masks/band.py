"""Masks that are a window plus the first keys inside a key range, combined without any tensor work.

A `Band` is the set

    (window  or  first)  and  key_start <= j < key_end

where `window` is p - left <= j <= p + right, and `first` is j < origin + n with, possibly, its own
bound j <= p + right. Every window contains offset 0, so two of them meet and join in a window.
`meet` and `join` answer None where the result has no such form; intervals then take over.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor

from manyheads.masks.frame import Frame, largest, least, same
from manyheads.masks.ranges import Ranges, one_range
from manyheads.spec import BandPlan, FullPlan, PerBatch

Bound: TypeAlias = int | None  # None: unbounded
Offsets: TypeAlias = tuple[Bound, Bound]  # left, right

_FULL = FullPlan()


class First(NamedTuple):
    """The keys j < origin + n, and j <= p + right."""

    n: PerBatch
    origin: PerBatch
    right: Bound = None


class Band(NamedTuple):
    """See the module's docstring; a part that is None is empty."""

    window: Offsets | None = (None, None)
    first: First | None = None
    key_start: PerBatch = 0
    key_end: PerBatch | None = None  # None: Lk

    def plan(self, k_len: int) -> BandPlan | FullPlan | None:
        """The plan that means this set; None if a BandPlan cannot say it."""
        band = self._without_first() if self.window is None else self
        assert band.window is not None
        left, right = band.window
        start, end, first = band.key_start, band.key_end, band.first
        if first is not None and (
            same(first.n, 0) or (left is None and _within(first.right, right))
        ):
            first = None  # empty, or inside the window already
        if first is not None and not (same(first.origin, start) and first.right in (None, right)):
            return None
        start = start if same(start, 0) else least(start, k_len)
        if end is not None:
            end = None if not isinstance(end, Tensor) and end >= k_len else least(end, k_len)
        if first is not None:
            return BandPlan(left, right, first.n, first.right == right, start, end)
        if left is None and right is None and end is None and same(start, 0):
            return _FULL
        return BandPlan(left, right, key_start=start, key_end=end)

    def _without_first(self) -> Band:
        """A set without window part, said as a window and a key range."""
        assert self.first is not None
        n, origin, right = self.first
        end = origin + n
        if self.key_end is not None:
            end = least(end, self.key_end)
        return Band((None, right), None, self.key_start, end)


def meet(a: Band, b: Band) -> Band | None:
    """A & b."""
    if a.window is None and b.window is not None and b.window[0] is not None:
        a = a._without_first()
    elif b.window is None and a.window is not None and a.window[0] is not None:
        b = b._without_first()
    window = None
    if a.window is not None and b.window is not None:
        window = _narrower(a.window[0], b.window[0]), _narrower(a.window[1], b.window[1])
    first = None
    for one, other in ((a, b), (b, a)):
        if one.window is None or other.first is None or _contains(other.window, one.window):
            continue  # nothing, or nothing that the windows' own meeting lacks
        if one.window[0] is not None:
            return None  # first keys cut off on the left by a window
        cut = other.first._replace(right=_narrower(other.first.right, one.window[1]))
        if (first := _join_first(first, cut)) is None:
            return None
    if a.first is not None and b.first is not None:
        if not same(a.first.origin, b.first.origin):
            return None
        n, right = least(a.first.n, b.first.n), _narrower(a.first.right, b.first.right)
        if same(a.first.n, b.first.n):
            n = a.first.n
        if (first := _join_first(first, First(n, a.first.origin, right))) is None:
            return None
    end = b.key_end if a.key_end is None else a.key_end
    if a.key_end is not None and b.key_end is not None:
        end = least(a.key_end, b.key_end)
    return Band(window, first, largest(a.key_start, b.key_start), end)


def join(a: Band, b: Band) -> Band | None:
    """A | b."""
    if not (same(a.key_start, b.key_start) and same(a.key_end, b.key_end)):
        return None
    window = b.window if a.window is None else a.window
    if a.window is not None and b.window is not None:
        window = _wider(a.window[0], b.window[0]), _wider(a.window[1], b.window[1])
    first = _join_first(a.first, b.first)
    if first is None and (a.first is not None or b.first is not None):
        return None
    return Band(window, first, a.key_start, a.key_end)


def band_ranges(band: Band, frame: Frame) -> Ranges:
    """A Band without first keys as one range per row."""
    assert band.window is not None and band.first is None
    left, right = band.window
    geometry, p = frame.geometry, None
    start: PerBatch = 0
    end: PerBatch = geometry.k_len
    if left is not None or right is not None:
        p = frame.row_positions()
        start = 0 if left is None else p - left
        end = end if right is None else p + (right + 1)
    ranges = one_range(start, end, geometry)
    end = geometry.k_len if band.key_end is None else frame.column(band.key_end)
    return ranges.meet(one_range(frame.column(band.key_start), end, geometry))


def _join_first(a: First | None, b: First | None) -> First | None:
    """The union of two sets of first keys; None if it is not one (or if both are absent)."""
    if a is None or b is None:
        return b if a is None else a
    if not same(a.origin, b.origin):
        return None
    if same(a.n, b.n):
        return a._replace(right=_wider(a.right, b.right))
    if a.right == b.right:
        return a._replace(n=largest(a.n, b.n))
    return None


def _contains(outer: Offsets | None, inner: Offsets) -> bool:
    return outer is not None and _within(inner[0], outer[0]) and _within(inner[1], outer[1])


def _within(inner: Bound, outer: Bound) -> bool:
    return outer is None or (inner is not None and inner <= outer)


def _narrower(a: Bound, b: Bound) -> Bound:
    return b if a is None else a if b is None else min(a, b)


def _wider(a: Bound, b: Bound) -> Bound:
    return None if a is None or b is None else max(a, b)
