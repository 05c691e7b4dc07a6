"""Which rows of the data each step of a training sees, and in tensors of which sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EVEN = 256  # oneDNN compiles its bfloat16 products for every new number of rows, and keeps them


@dataclass(frozen=True)
class Order:
    """Which rows of the data each step trains on: all of them once per epoch, shuffled.

    With `lengths`, rows of like length share a batch, so that little of it is padding. Rows that
    fill no batch are left out, others in each epoch.
    """

    count: int
    batch_size: int
    seed: int = 0
    lengths: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.batch_size <= self.count:
            raise ValueError(
                f"batches of {self.batch_size} from {self.count} rows; expected at least one full "
                "batch: take a smaller batch, or more data."
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch_size

    def batches(self, step: int = 0) -> Iterator[Tensor]:
        """Int64 [batch_size] for each step from `step` on, without end."""
        epoch, place = divmod(step, self.steps_per_epoch)
        while True:
            yield from self.epoch(epoch)[place:]
            epoch, place = epoch + 1, 0

    def epoch(self, number: int) -> Tensor:
        """Int64 [steps_per_epoch, batch_size]: the rows of all steps of one epoch."""
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        rows = torch.randperm(self.count, generator=random)
        rows = rows[: self.steps_per_epoch * self.batch_size]
        if self.lengths is not None:
            lengths = torch.as_tensor(self.lengths)
            pools = rows.split(50 * self.batch_size)  # sorted within a pool: still much by chance
            rows = torch.cat([pool[lengths[pool].argsort(stable=True)] for pool in pools])
        batches = rows.view(-1, self.batch_size)
        return batches[torch.randperm(len(batches), generator=random)]


def even_rows(rows: Tensor) -> Tensor:
    """[N, E], and rows of zeros behind it up to a multiple of EVEN."""
    return F.pad(rows, (0, 0, 0, -len(rows) % EVEN))
