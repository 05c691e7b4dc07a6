"""Sets of keys as a few half-open ranges per query row, combined with a bound known in advance.

The number of ranges follows from the expression alone: a | b has at most a + b, a & b at most
a + b - 1, ~a at most a + 1, and fewer where it is known that a set begins with the first key or
runs to the last one. Memory is O(Lq * R); nothing here is O(Lq * Lk) except `scan`, which reads a
bool mask that exists already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.spec import Geometry, IntervalsPlan, PerBatch

#: What an IntervalsPlan holds at most.
MOST_RANGES = 4
#: Intermediate results may need more (a complement can drop one again), up to here.
_MOST_WORKING = 16


class NotCompactError(Exception):
    """A mask does not fit a few ranges per row; the message says why. Never leaves this package."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """Per query row, R half-open ranges: starts and ends int32 [B|1, Hq|1, Lq|1, R], in [0, Lk].

    Along R: start_i <= end_i <= start_{i+1}, so ranges are sorted and disjoint; some are empty.
    from_zero: the first range begins with key 0, by construction. to_end: the last runs to Lk.
    whole_rows: one range, and each row is either all keys or none.
    """

    starts: Tensor
    ends: Tensor
    k_len: int
    from_zero: bool = False
    to_end: bool = False
    whole_rows: bool = False

    @property
    def count(self) -> int:
        """R, the number of ranges per row."""
        return self.starts.shape[-1]

    def meet(self, other: Ranges) -> Ranges:
        """A & b."""
        starts = torch.maximum(self.starts[..., :, None], other.starts[..., None, :])
        ends = torch.minimum(self.ends[..., :, None], other.ends[..., None, :])
        starts, ends = starts.flatten(-2), torch.maximum(starts, ends).flatten(-2)
        if self.count > 1 and other.count > 1:
            # All pairs; two sorted families meet in no more than this many.
            count = self.count + other.count - 1
            _check_count(count)
            empty = ends <= starts
            starts = starts.masked_fill(empty, self.k_len)
            ends = ends.masked_fill(empty, self.k_len)
            # One order sorts both, as what is not empty is disjoint.
            starts, ends = starts.sort(-1).values[..., :count], ends.sort(-1).values[..., :count]
            return Ranges(starts, ends, self.k_len)
        from_zero, to_end = self.from_zero and other.from_zero, self.to_end and other.to_end
        whole_rows = self.whole_rows and other.whole_rows
        return Ranges(starts, ends, self.k_len, from_zero, to_end, whole_rows)

    def join(self, other: Ranges) -> Ranges:
        """A | b."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        if self.is_everything or other.is_everything:
            return self if self.is_everything else other
        if self.whole_rows or other.whole_rows:
            return self._or_rows(other) if other.whole_rows else other._or_rows(self)
        a_starts, a_ends, b_starts, b_ends = _widen(
            self.starts, self.ends, other.starts, other.ends
        )
        if self.from_zero and other.from_zero:  # two first ranges are one
            first = torch.maximum(a_ends[..., :1], b_ends[..., :1])
            a_ends = torch.cat([first, a_ends[..., 1:]], -1)
            b_starts, b_ends = b_starts[..., 1:], b_ends[..., 1:]
        if self.to_end and other.to_end:  # two last ranges are one
            last = torch.minimum(a_starts[..., -1:], b_starts[..., -1:])
            a_starts = torch.cat([a_starts[..., :-1], last], -1)
            b_starts, b_ends = b_starts[..., :-1], b_ends[..., :-1]
        starts, ends = _sorted(torch.cat([a_starts, b_starts], -1), torch.cat([a_ends, b_ends], -1))
        flags = self.from_zero or other.from_zero, self.to_end or other.to_end
        return Ranges(starts, ends, self.k_len, *flags)

    def complement(self) -> Ranges:
        """~a, within [0, Lk)."""
        edge = self.starts.new_zeros(()).expand(*self.starts.shape[:-1], 1)
        starts = torch.cat([edge, self.ends], -1)
        ends = torch.cat([self.starts, edge + self.k_len], -1)
        if self.from_zero:
            starts, ends = starts[..., 1:], ends[..., 1:]
        if self.to_end:
            starts, ends = starts[..., :-1], ends[..., :-1]
        _check_count(starts.shape[-1])
        flags = not self.from_zero, not self.to_end
        return Ranges(starts, ends, self.k_len, *flags, self.whole_rows)

    @property
    def is_everything(self) -> bool:
        """Every row may attend to every key, by construction."""
        return self.count == 1 and self.from_zero and self.to_end

    def plan(self, geometry: Geometry) -> IntervalsPlan:
        """The plan; raises NotCompactError past MOST_RANGES."""
        if self.count > MOST_RANGES:
            raise NotCompactError(
                f"up to {self.count} key ranges per query row, and a compact plan holds "
                f"{MOST_RANGES}"
            )
        ranges = torch.stack([self.starts, self.ends], -1)
        if self.count == 0:
            ranges = ranges.new_zeros((*ranges.shape[:3], 1, 2))
        b, h, _, count, _ = ranges.shape
        return IntervalsPlan(ranges.expand(b, h, geometry.q_len, count, 2).contiguous())

    def _or_rows(self, rows: Ranges) -> Ranges:
        """Or with whole rows: where the row is whole, its first range takes everything."""
        whole = rows.ends > rows.starts
        starts = self.starts.masked_fill(whole, self.k_len)
        first = self.starts[..., :1].masked_fill(whole, 0)
        starts = torch.cat([first, starts[..., 1:]], -1)
        ends = self.ends.masked_fill(whole, self.k_len)
        return Ranges(starts, ends, self.k_len, self.from_zero, self.to_end, self.whole_rows)


def one_range(
    start: PerBatch, end: PerBatch, geometry: Geometry, *, whole_rows: bool = False
) -> Ranges:
    """[start, end) clamped to [0, Lk]; each an int or int32 [B|1, Hq|1, Lq|1, 1].

    A start that is the int 0 or an end that is the int Lk is known to be so by construction.
    """
    k_len, device = geometry.k_len, geometry.device
    from_zero = not isinstance(start, Tensor) and start <= 0
    to_end = not isinstance(end, Tensor) and end >= k_len
    starts, ends = (
        (value if isinstance(value, Tensor) else torch.full((1, 1, 1, 1), value, device=device))
        .clamp(0, k_len)
        .to(torch.int32)
        for value in (start, end)
    )
    ends = torch.maximum(starts, ends)
    starts = starts.expand_as(ends)
    return Ranges(starts, ends, k_len, from_zero, to_end, whole_rows)


def scan(allowed: Tensor) -> Ranges | None:
    """The ranges of a bool mask [b, h, rows, Lk]; None if a row has more than MOST_RANGES."""
    lead, k_len = allowed.shape[:-1], allowed.shape[-1]
    rows, width = lead.numel(), (k_len // 8 + 1) * 8
    # Where a row changes, with nothing allowed before its first key and after its last: a start,
    # an end, a start, ...
    edges = allowed.new_zeros((*lead, width))
    if k_len:
        edges[..., 0], edges[..., k_len] = allowed[..., 0], allowed[..., -1]
        torch.logical_xor(allowed[..., 1:], allowed[..., :-1], out=edges[..., 1:k_len])
    # Changes are few: eight bools at a time are looked for as one int64.
    words = edges.view(torch.int64).flatten().nonzero()[:, 0]
    if words.numel() > 2 * MOST_RANGES * rows:
        return None
    word, byte = edges.view(-1, 8)[words].nonzero().unbind(1)
    place = words[word] * 8 + byte
    row = place[::2] // width
    counts = row.bincount(minlength=rows)
    count = int(counts.max()) if rows else 0
    if count > MOST_RANGES:
        return None
    nth = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row]
    starts = torch.full((rows, count), k_len, dtype=torch.int32, device=allowed.device)
    ends = starts.clone()
    starts[row, nth] = (place[::2] - row * width).int()
    ends[row, nth] = (place[1::2] - row * width).int()
    return Ranges(starts.view(*lead, count), ends.view(*lead, count), k_len)


def stack_rows(blocks: list[Ranges]) -> Ranges:
    """Blocks of consecutive query rows, one after another; R is the largest of theirs."""
    count = max(block.count for block in blocks)
    k_len = blocks[0].k_len
    padded = [
        [
            torch.nn.functional.pad(tensor, (0, count - block.count), value=k_len)
            for tensor in (block.starts, block.ends)
        ]
        for block in blocks
    ]
    starts, ends = (torch.cat(parts, -2) for parts in zip(*padded, strict=True))
    return Ranges(starts, ends, k_len)


def _widen(*tensors: Tensor) -> list[Tensor]:
    """Expands all but the last axis to a common shape."""
    shapes = [tensor.shape[:-1] for tensor in tensors]
    lead: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return [tensor.expand(*lead, tensor.shape[-1]) for tensor in tensors]


def _sorted(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The same union of keys as sorted, disjoint ranges; the count stays."""
    _check_count(starts.shape[-1])
    starts, order = starts.sort(-1)
    ends = ends.gather(-1, order).cummax(-1).values
    previous = torch.cat([starts[..., :1], ends[..., :-1]], -1)
    starts = torch.maximum(starts, previous)
    return starts, torch.maximum(starts, ends)


def _check_count(count: int) -> None:
    if count > _MOST_WORKING:
        raise NotCompactError(
            f"more than {_MOST_WORKING} key ranges per query row on the way, and a compact plan "
            f"holds {MOST_RANGES}"
        )
