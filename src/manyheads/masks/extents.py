"""Masks that say which keys exist for whom: KeyRange, KeyLengths, Documents, QueryRows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.arguments import values_readable
from manyheads.errors import ArgumentError, ArgumentTypeError, ShapeError
from manyheads.masks.algebra import Mask
from manyheads.masks.band import Band, band_ranges
from manyheads.masks.checks import (
    Numbers,
    broadcasts,
    check_per_batch,
    largest_value,
    size_of,
    whole_numbers,
)
from manyheads.masks.frame import DocumentTable, Frame, int32_tensor
from manyheads.masks.ranges import Ranges, one_range
from manyheads.spec import Geometry, PerBatch


@dataclass(frozen=True, eq=False, repr=False)
class KeyRange(Mask):
    """Every query sees the keys start <= j < end: left padding, or a slice of a cache.

    As in a Python slice, an end past Lk means Lk. FirstKeys and Chunks that are `&`-ed with a
    KeyRange count from its start, so left-padded sequences keep their first keys.

    >>> from manyheads.masks import Causal
    >>> print((Causal() & KeyRange([0, 2], None)).materialize(3, 3, batch=2)[1, 0].int())
    tensor([[0, 0, 0],
            [0, 0, 0],
            [0, 0, 1]], dtype=torch.int32)

    Args:
        start: the first key; an int, or one per batch element (list, or integer tensor [B]).
        end: one past the last key, likewise; None for all the rest.

    Raises:
        ArgumentError: a number is negative, or start is past end.
        ArgumentTypeError: not whole numbers.
        ShapeError: as many numbers as not batch elements (when lowering).
    """

    start: Numbers
    end: Numbers | None = None

    def __post_init__(self) -> None:
        start = whole_numbers(self.start, "KeyRange's start")
        end = None if self.end is None else whole_numbers(self.end, "KeyRange's end")
        fixed = not isinstance(start, Tensor) and not isinstance(end, Tensor)
        if fixed and end is not None and _past(start, end):
            raise ArgumentError(
                f"KeyRange's start must not be past its end; got start={start}, end={end}. "
                "An empty range has start == end."
            )
        self._remember(start=start, end=end, _fixed=fixed)

    def _check(self, geometry: Geometry) -> None:
        check_per_batch(self.start, "KeyRange's start", geometry.batch)
        if self.end is not None:
            check_per_batch(self.end, "KeyRange's end", geometry.batch)

    def _narrow(self, frame: Frame) -> Frame:
        return frame.within_range(frame.number(self.start))

    def _allowed(self, frame: Frame) -> Tensor:
        keys = frame.keys()
        allowed = keys >= frame.column(frame.number(self.start))
        if self.end is not None:
            allowed = allowed & (keys < frame.column(frame.number(self.end)))
        return allowed

    def _band(self, frame: Frame) -> Band:
        start = frame.number(self.start)
        end = None if self.end is None else frame.number(self.end)
        return Band(key_start=start, key_end=end)

    def _ranges(self, frame: Frame) -> Ranges:
        return band_ranges(self._band(frame), frame)


@dataclass(frozen=True, eq=False, repr=False)
class KeyLengths(Mask):
    """Batch element b has length_b keys, j < length_b: right padding, or a static cache's fill.

    It also places the queries: unless the caller gives query_start, the last query of element b
    stands at its last key, query_start = length_b - Lq, wherever KeyLengths is in the expression.

    >>> from manyheads.masks import Causal
    >>> print((Causal() & KeyLengths([4, 3])).materialize(2, 4, batch=2)[:, 0].int())
    tensor([[[1, 1, 1, 0],
             [1, 1, 1, 1]],
    <BLANKLINE>
            [[1, 1, 0, 0],
             [1, 1, 1, 0]]], dtype=torch.int32)

    Args:
        lengths: one per batch element (list, or integer tensor [B]), or an int for all.

    Raises:
        ArgumentError: a length is negative, or (when lowering) larger than Lk.
        ArgumentTypeError: not whole numbers.
        ShapeError: as many lengths as not batch elements (when lowering).
    """

    lengths: Numbers

    _aligns = "lengths"

    def __post_init__(self) -> None:
        lengths = whole_numbers(self.lengths, "KeyLengths' lengths")
        self._remember(lengths=lengths, _fixed=not isinstance(lengths, Tensor))

    def _check(self, geometry: Geometry) -> None:
        check_per_batch(self.lengths, "KeyLengths' lengths", geometry.batch)
        longest = largest_value(self.lengths)
        if longest is not None and longest > geometry.k_len:
            raise ArgumentError(
                f"KeyLengths' lengths must not be larger than the key length {geometry.k_len}; "
                f"got {longest}. Count the keys that are there, without padding."
            )

    def _query_start(self, geometry: Geometry) -> PerBatch:
        if isinstance(self.lengths, int):
            return self.lengths - geometry.q_len
        return int32_tensor(self.lengths, geometry.device) - geometry.q_len

    def _allowed(self, frame: Frame) -> Tensor:
        allowed: Tensor = frame.keys() < frame.column(frame.number(self.lengths))
        return allowed

    def _band(self, frame: Frame) -> Band:
        return Band(key_end=frame.number(self.lengths))

    def _ranges(self, frame: Frame) -> Ranges:
        return band_ranges(self._band(frame), frame)


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    """Several sequences packed along one axis: a query sees the keys of its own document.

    Every document aligns by itself: its last query stands at its last key, so a query's position
    is its document's key start + (document's keys - document's queries) + its row there. Causal,
    Window and positions follow from that, and FirstKeys and Chunks that are `&`-ed with Documents
    count from the document's start: a packed document gets what it would get alone.

    >>> from manyheads.masks import Causal
    >>> print((Causal() & Documents([2, 3])).materialize(5, 5)[0, 0].int())
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 0, 1, 0, 0],
            [0, 0, 1, 1, 0],
            [0, 0, 1, 1, 1]], dtype=torch.int32)

    Args:
        q_lengths: the documents' lengths along the query axis, adding up to Lq: a list or integer
            tensor [documents] for all batch elements alike, or one list per batch element (ragged
            is fine) or a tensor [B, documents], filled up with zeros. A length may be 0.
        k_lengths: likewise along the key axis, adding up to Lk, for cross-attention or a cache;
            None: the same as q_lengths.

    Raises:
        ArgumentError: a length is negative; the lengths do not add up (when lowering); query_start
            was given as well.
        ArgumentTypeError: not whole numbers.
        ShapeError: different numbers of documents for queries and keys, or lists for another batch
            size (when lowering).
    """

    q_lengths: Numbers
    k_lengths: Numbers | None = None

    _aligns = "documents"

    def __post_init__(self) -> None:
        queries = whole_numbers(self.q_lengths, "Documents' q_lengths", max_dims=2)
        keys = self.k_lengths
        if keys is not None:
            keys = whole_numbers(keys, "Documents' k_lengths", max_dims=2)
            if size_of(queries)[-1:] != size_of(keys)[-1:]:
                raise ShapeError(
                    "Documents needs as many k_lengths as q_lengths; got shapes "
                    f"{list(size_of(queries))} and {list(size_of(keys))}. "
                    "A document without queries or without keys has length 0."
                )
        for name, lengths in (("q_lengths", queries), ("k_lengths", keys)):
            if isinstance(lengths, int):
                raise ArgumentTypeError(
                    f"Documents' {name} must be a list of lengths; got {lengths}. "
                    f"For one document write Documents([{lengths}])."
                )
        fixed = not isinstance(queries, Tensor) and not isinstance(keys, Tensor)
        self._remember(q_lengths=queries, k_lengths=keys, _fixed=fixed)

    def _check(self, geometry: Geometry) -> None:
        for name, lengths, total in (
            ("q_lengths", self.q_lengths, geometry.q_len),
            ("k_lengths", self._key_lengths, geometry.k_len),
        ):
            size = size_of(lengths)
            if len(size) == 2 and not broadcasts(size[0], geometry.batch):
                raise ShapeError(
                    f"Documents' {name} must be one list, or one per batch element; got shape "
                    f"{list(size)} for batch size {geometry.batch}."
                )
            for found in _totals(lengths):
                if found != total:
                    raise ArgumentError(self._sum_message(name, found, total))

    def _sum_message(self, name: str, found: int, total: int) -> str:
        axis = "query" if name == "q_lengths" else "key"
        fix = "Add the padding as a document of its own."
        if name == "k_lengths" and self.k_lengths is None:
            fix = "Queries and keys differ in length: give k_lengths too."
        return (
            f"Documents' {name} must add up to the {axis} length {total}; got a sum of {found}. "
            f"{fix}"
        )

    @property
    def _key_lengths(self) -> Numbers:
        return self.q_lengths if self.k_lengths is None else self.k_lengths

    def _document_table(self, geometry: Geometry) -> DocumentTable:
        q_end, k_end = self._ends(self.q_lengths, geometry), self._ends(self._key_lengths, geometry)
        batch, count = max(q_end.shape[0], k_end.shape[0]), q_end.shape[1]
        q_end, k_end = q_end.expand(batch, count), k_end.expand(batch, count)
        row = torch.arange(geometry.q_len, dtype=torch.int32, device=geometry.device)
        number = _document_of(row, q_end)
        start = torch.nn.functional.pad(k_end, (1, 0)).gather(1, number)
        # The document's last query stands at its last key.
        position = (k_end - q_end).gather(1, number) + row
        return DocumentTable(number, start, k_end.gather(1, number), position, count)

    def _ends(self, lengths: Numbers, geometry: Geometry) -> Tensor:
        """int32 [B|1, documents]: one past each document's last row or key."""
        lengths = int32_tensor(lengths, geometry.device)
        if lengths.shape[-1] == 0:  # no document at all: one that is empty
            lengths = lengths.new_zeros((*lengths.shape[:-1], 1))
        return lengths.reshape(-1, lengths.shape[-1]).cumsum(1, dtype=torch.int32)

    def _narrow(self, frame: Frame) -> Frame:
        return frame.within_documents()

    def _allowed(self, frame: Frame) -> Tensor:
        assert frame.documents is not None
        key_document = _document_of(frame.keys(), self._ends(self._key_lengths, frame.geometry))
        return frame.documents.number[:, None, :, None] == key_document[:, None, None, :]

    def _ranges(self, frame: Frame) -> Ranges:
        assert frame.documents is not None
        start, end = frame.documents.key_start, frame.documents.key_end
        return one_range(start[:, None, :, None], end[:, None, :, None], frame.geometry)


@dataclass(frozen=True, eq=False, repr=False)
class QueryRows(Mask):
    """The given query rows see every key, the others none: global rows (Longformer, BigBird).

    Rows are counted along the query axis, from 0, whatever their positions. Global tokens that
    see all and are seen by all: `Window(w, w) | FirstKeys(n) | QueryRows(range(n))`.

    >>> from manyheads.masks import Window
    >>> print((Window(0, 0) | QueryRows([1])).materialize(3, 3)[0, 0].int())
    tensor([[1, 0, 0],
            [1, 1, 1],
            [0, 0, 1]], dtype=torch.int32)

    Args:
        rows: row numbers (list, range, integer tensor), or a bool tensor or list of length Lq.

    Raises:
        ArgumentError: a row is negative, or (when lowering) past Lq.
        ArgumentTypeError: neither whole numbers nor bools.
        ShapeError: a tensor that is not 1-D, or bools of another length than Lq (when lowering).
    """

    rows: Any

    def __post_init__(self) -> None:
        rows = self.rows
        if isinstance(rows, range):
            rows = tuple(rows)
        if isinstance(rows, (list, tuple)) and rows and all(isinstance(row, bool) for row in rows):
            rows = torch.tensor(rows)
        if isinstance(rows, Tensor) and rows.dtype == torch.bool:
            if rows.dim() != 1:
                raise ShapeError(
                    f"QueryRows' bools must have shape [Lq]; got {list(rows.shape)}. "
                    "Use Dense for a mask that differs between batch elements."
                )
        else:
            rows = whole_numbers(rows, "QueryRows' rows")
            rows = (rows,) if isinstance(rows, int) else rows
        self._remember(rows=rows, _fixed=not isinstance(rows, Tensor))

    def _check(self, geometry: Geometry) -> None:
        if isinstance(self.rows, Tensor) and self.rows.dtype == torch.bool:
            if self.rows.shape[0] != geometry.q_len:
                raise ShapeError(
                    f"QueryRows' bools must have shape [{geometry.q_len}], one per query row; "
                    f"got {list(self.rows.shape)}."
                )
            return
        largest = largest_value(self.rows)
        if largest is not None and largest >= geometry.q_len:
            raise ArgumentError(
                f"QueryRows' rows must be below the query length {geometry.q_len}; got {largest}. "
                "Rows count along the query axis, not along the keys."
            )

    def _is_whole(self, frame: Frame) -> Tensor:
        """Bool [1, 1, Lq, 1]: the row sees everything."""
        if isinstance(self.rows, Tensor) and self.rows.dtype == torch.bool:
            whole = self.rows.to(frame.device)
        else:
            whole = torch.zeros(frame.geometry.q_len, dtype=torch.bool, device=frame.device)
            whole = whole.index_fill(0, int32_tensor(self.rows, frame.device).long(), True)
        return whole[None, None, :, None]

    def _allowed(self, frame: Frame) -> Tensor:
        return self._is_whole(frame)

    def _ranges(self, frame: Frame) -> Ranges:
        end = self._is_whole(frame).to(torch.int32) * frame.geometry.k_len
        return one_range(0, end, frame.geometry, whole_rows=True)


def _past(start: Numbers, end: Numbers) -> bool:
    """Some start is larger than its end; ints and tuples of one length, or one of each."""
    starts = start if isinstance(start, tuple) else None
    ends = end if isinstance(end, tuple) else None
    if starts is not None and ends is not None:
        return any(a > b for a, b in zip(starts, ends, strict=False))  # type: ignore[operator]
    if starts is not None:
        return any(a > end for a in starts)  # type: ignore[operator]
    if ends is not None:
        return any(start > b for b in ends)  # type: ignore[operator]
    return bool(start > end)  # type: ignore[operator]


def _totals(lengths: Numbers) -> list[int]:
    """The sum of each list of lengths; nothing where the values may not be looked at."""
    if isinstance(lengths, Tensor):
        if not values_readable(lengths):
            return []
        return (
            list(lengths.reshape(-1, lengths.shape[-1]).sum(1).tolist()) if lengths.numel() else [0]
        )
    assert isinstance(lengths, tuple)
    if lengths and isinstance(lengths[0], tuple):
        return [sum(row) for row in lengths]
    return [sum(lengths)]  # type: ignore[arg-type]


def _document_of(places: Tensor, ends: Tensor) -> Tensor:
    """int64 [B|1, L]: the document that each place along an axis belongs to."""
    places = places.expand(ends.shape[0], -1).contiguous()
    return torch.searchsorted(ends.contiguous(), places, right=True).clamp(max=ends.shape[1] - 1)
