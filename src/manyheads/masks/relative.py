"""Masks that look from a query's position: Causal, Window, Chunks; and FirstKeys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.errors import ArgumentError, ShapeError
from manyheads.masks.algebra import Mask
from manyheads.masks.band import Band, First, band_ranges
from manyheads.masks.checks import (
    Numbers,
    broadcasts,
    check_per_batch,
    size_of,
    whole_number,
    whole_numbers,
)
from manyheads.masks.frame import Frame, bounded, int32_tensor
from manyheads.masks.ranges import Ranges, one_range
from manyheads.spec import PerBatch

_CAUSAL = Band((None, 0))


@dataclass(frozen=True, eq=False, repr=False)
class Causal(Mask):
    """A query sees its own position and all before it: j <= p.

    p is the query's position on the key axis. By default the last query stands at the last key,
    so with fewer queries than keys (a cache, a chunk) the mask is aligned bottom-right;
    query_start=0 aligns it top-left.

    >>> print(Causal().materialize(3, 4)[0, 0].int())
    tensor([[1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    >>> print(Causal().materialize(3, 4, query_start=0)[0, 0].int())
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0]], dtype=torch.int32)
    """

    _sizeless = True
    _one_plan = _CAUSAL.plan(0)

    def _allowed(self, frame: Frame) -> Tensor:
        return frame.keys() <= frame.row_positions()

    def _band(self, frame: Frame) -> Band:
        return _CAUSAL

    def _ranges(self, frame: Frame) -> Ranges:
        return band_ranges(_CAUSAL, frame)


@dataclass(frozen=True, eq=False, repr=False)
class Window(Mask):
    """A query sees the keys around its position: p - left <= j <= p + right.

    `Causal() & Window(255, 0)`, or just `Window(255, 0)`, is a sliding window of 256 keys.

    >>> print(Window(1, 0).materialize(3, 4)[0, 0].int())
    tensor([[1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)

    Args:
        left: how many keys before the query's position, None for all.
        right: how many keys after it, None for all.

    Raises:
        ArgumentError: a side is negative. Use None for "no bound"; -1 means nothing here.
        ArgumentTypeError: a side is not a whole number.
    """

    left: int | None
    right: int | None

    _sizeless = True

    def __post_init__(self) -> None:
        if self.left is not None:
            self._remember(left=whole_number(self.left, "Window's left (None: no bound)"))
        if self.right is not None:
            self._remember(right=whole_number(self.right, "Window's right (None: no bound)"))

    def _allowed(self, frame: Frame) -> Tensor:
        distance = frame.keys() - frame.row_positions()
        allowed = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            allowed = allowed & (distance >= -bounded(self.left))
        if self.right is not None:
            allowed = allowed & (distance <= bounded(self.right))
        return allowed

    def _band(self, frame: Frame) -> Band:
        left = None if self.left is None else bounded(self.left)
        right = None if self.right is None else bounded(self.right)
        return Band((left, right))

    def _ranges(self, frame: Frame) -> Ranges:
        return band_ranges(self._band(frame), frame)


@dataclass(frozen=True, eq=False, repr=False)
class FirstKeys(Mask):
    """Every query sees the first n keys: j < origin + n.

    The origin is 0; or, where FirstKeys is `&`-ed with a KeyRange (left padding), that range's
    start; or, where it is `&`-ed with Documents, the start of the row's own document.

    Prefix-LM is `Causal() | FirstKeys(n)`. Attention sinks are
    `Causal() & (Window(w, 0) | FirstKeys(n))`. Mind the parentheses: `Causal() & Window(w, 0) |
    FirstKeys(n)` lets the rows before n see the future.

    >>> print((Causal() | FirstKeys(2)).materialize(4, 4)[0, 0].int())
    tensor([[1, 1, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)

    Args:
        n: an int; or one per batch element (list, or integer tensor [B]); or, together with
            Documents, one per document (list, or tensor [documents]), or one per batch element and
            document (nested list, or tensor [B|1, documents|1]).

    Raises:
        ArgumentError: n is negative.
        ArgumentTypeError: n does not hold whole numbers.
        ShapeError: as many numbers as neither batch elements nor documents (when lowering).
    """

    n: Numbers

    def __post_init__(self) -> None:
        n = whole_numbers(self.n, "FirstKeys' n", max_dims=2)
        self._remember(n=n, _fixed=not isinstance(n, Tensor), _sizeless=isinstance(n, int))

    def _allowed(self, frame: Frame) -> Tensor:
        allowed: Tensor = frame.keys() < self._end(frame)
        return allowed

    def _band(self, frame: Frame) -> Band | None:
        if frame.in_documents:
            return None
        return Band(None, First(self._per_batch(frame), frame.key_start))

    def _ranges(self, frame: Frame) -> Ranges:
        return one_range(0, self._end(frame), frame.geometry)

    def _end(self, frame: Frame) -> PerBatch:
        """Origin + n: an int, or int32 [B|1, 1, Lq|1, 1]."""
        table = frame.documents
        if table is None or not frame.in_documents or isinstance(self.n, int):
            return frame.origin() + frame.column(self._per_batch(frame))
        size, batch = size_of(self.n), frame.geometry.batch
        fits = broadcasts(size[-1], table.count)
        if not fits or (len(size) == 2 and not broadcasts(size[0], batch)):
            raise ShapeError(
                f"FirstKeys' n, next to Documents, must be one number, one per document "
                f"[{table.count}], or [{batch}, {table.count}]; got shape {list(size)}."
            )
        n = int32_tensor(self.n, frame.device).reshape(-1, size[-1])
        rows, number = max(n.shape[0], table.number.shape[0]), table.number
        n = n.expand(rows, table.count).gather(1, number.expand(rows, -1))
        return frame.origin() + n[:, None, :, None]

    def _per_batch(self, frame: Frame) -> PerBatch:
        if len(size_of(self.n)) == 2:
            raise ArgumentError(
                "FirstKeys' n is given per document, but it is not &-ed with Documents; got "
                f"{self!r}. Write Documents(...) & (... | FirstKeys(n))."
            )
        check_per_batch(self.n, "FirstKeys' n", frame.geometry.batch)
        return frame.number(self.n)


@dataclass(frozen=True, eq=False, repr=False)
class Chunks(Mask):
    """A query sees its own chunk: floor((p - origin) / size) == floor((j - origin) / size).

    The keys are cut into chunks of `size`, counted from the same origin as FirstKeys: 0, or the
    start of the KeyRange or of the row's document that Chunks is `&`-ed with. So a padded or
    packed sequence gets the chunks it would get alone. Llama 4's chunked attention is
    `Causal() & Chunks(8192)`.

    >>> print((Causal() & Chunks(2)).materialize(4, 4)[0, 0].int())
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)

    Args:
        size: keys per chunk, 1 or more.

    Raises:
        ArgumentError: size is not positive.
        ArgumentTypeError: size is not a whole number.
    """

    size: int

    def __post_init__(self) -> None:
        size = whole_number(self.size, "Chunks' size")
        if size == 0:
            raise ArgumentError("Chunks' size must be 1 or more; got 0. Leave the mask out?")
        self._remember(size=size)

    def _allowed(self, frame: Frame) -> Tensor:
        origin = frame.origin()
        size = bounded(self.size)
        row_chunk = (frame.row_positions() - origin).div(size, rounding_mode="floor")
        key_chunk = (frame.keys() - origin).div(size, rounding_mode="floor")
        return row_chunk == key_chunk

    def _ranges(self, frame: Frame) -> Ranges:
        origin, size = frame.origin(), bounded(self.size)
        chunk = (frame.row_positions() - origin).div(size, rounding_mode="floor")
        start = chunk * size + origin
        return one_range(start, start + size, frame.geometry)
