"""What a mask is read against: the call's sizes, where its rows stand, where its keys begin.

Causal, Window and Chunks look at a row's position; FirstKeys and Chunks count from the *key
origin*: 0, or the start of the KeyRange, or of the row's own document, that they are `&`-ed with.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from manyheads.masks.checks import Numbers
from manyheads.spec import Geometry, PerBatch, QueryPositions

#: Further than any key, and small enough for sums of a few of it to stay inside int32.
_FAR = 1 << 29


def bounded(number: int) -> int:
    """The number, or one that means as much and fits int32 sums."""
    return min(number, _FAR)


def int32_tensor(value: Numbers, device: torch.device) -> Tensor:
    """Numbers of any shape as an int32 tensor on the device."""
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.int64)
    if value.dtype == torch.int64:
        value = value.clamp(max=_FAR)
    return value.to(device, torch.int32)


def largest(a: PerBatch, b: PerBatch) -> PerBatch:
    """The larger of two numbers, each an int or int32 [B]; keeps identity where it can."""
    if a is b:
        return a
    if isinstance(a, Tensor):
        if isinstance(b, Tensor):
            return torch.maximum(a, b)
        return a if b == 0 else a.clamp(min=b)  # numbers here are never negative
    return largest(b, a) if isinstance(b, Tensor) else max(a, b)


def least(a: PerBatch, b: PerBatch) -> PerBatch:
    """The smaller of two numbers, each an int or int32 [B]."""
    if a is b:
        return a
    if isinstance(a, Tensor):
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)
    return least(b, a) if isinstance(b, Tensor) else min(a, b)


def same(a: PerBatch | None, b: PerBatch | None) -> bool:
    """Known to be equal without looking into tensors."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return a == b


@dataclass(frozen=True, slots=True)
class DocumentTable:
    """Each query row's document: number, first key, end of keys, the row's position; [B|1, Lq].

    number is int64 (it indexes), the others are int32; count is the number of documents.
    """

    number: Tensor
    key_start: Tensor
    key_end: Tensor
    position: Tensor
    count: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A geometry with the query rows placed, and the part of the key axis a submask counts from."""

    geometry: Geometry
    positions: QueryPositions
    documents: DocumentTable | None = None  # the expression's, if it has any
    key_start: PerBatch = 0  # of the KeyRanges this submask is `&`-ed with
    in_documents: bool = False  # this submask is `&`-ed with the Documents
    numbers: list[tuple[Numbers, Tensor]] = field(default_factory=list)  # made once per lowering

    @property
    def device(self) -> torch.device:
        """Where the call's tensors are, and the plan's."""
        return self.geometry.device

    def within_range(self, start: PerBatch) -> Frame:
        """The frame for what is `&`-ed with a key range that starts at `start`."""
        return replace(self, key_start=largest(self.key_start, start))

    def within_documents(self) -> Frame:
        """The frame for what is `&`-ed with the documents."""
        return replace(self, in_documents=True)

    def number(self, value: Numbers) -> PerBatch:
        """`value`, one per call or per batch element, as int or int32 [B] on the device.

        The same value gives the same tensor, so that equal numbers stay recognisable.
        """
        if not isinstance(value, (Tensor, tuple)):
            return bounded(value)
        for known, tensor in self.numbers:
            if known is value:
                return tensor
        tensor = int32_tensor(value, self.device)
        self.numbers.append((value, tensor))
        return tensor

    def column(self, value: PerBatch) -> PerBatch:
        """An int as it is, int32 [B] as [B, 1, 1, 1]."""
        return value.reshape(-1, 1, 1, 1) if isinstance(value, Tensor) else value

    def row_positions(self) -> Tensor:
        """int32 [B|1, 1, Lq, 1]: each query row's position."""
        if self.positions.rows is not None:
            return self.positions.rows[:, None, :, None]
        row = torch.arange(self.geometry.q_len, dtype=torch.int32, device=self.device)
        return row[None, None, :, None] + self.column(self.positions.start)

    def keys(self) -> Tensor:
        """int32 [Lk]: the keys' positions."""
        return torch.arange(self.geometry.k_len, dtype=torch.int32, device=self.device)

    def origin(self) -> PerBatch:
        """Where FirstKeys and Chunks count from: an int, or int32 [B|1, 1, Lq|1, 1]."""
        start = self.column(self.key_start)
        if self.documents is None or not self.in_documents:
            return start
        return largest(self.documents.key_start[:, None, :, None], start)
