"""What can be asked of attention weights: each measure with its formula.

P is the matrix of weights [Lq, Lk] of one batch element and head, S its logits (after scale,
softcap, bias and mask), p_i where query row i stands on the key axis. Where there are sinks, they
take part in the softmax, so that a row of P sums to less than 1. A row that may attend to nothing
is zeros, and measures 0 unless said otherwise.

A measure is a description and nothing more. Its `of` turns one block of query rows into tensors,
`fold` joins them to those of the blocks before, `finish` makes the answer of the last ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.arguments import check_sizes
from manyheads.errors import ArgumentError, ArgumentTypeError
from manyheads.inspect.blocks import Block
from manyheads.masks.checks import whole_number
from manyheads.spec import AttentionCall


class Measure(ABC):
    """One question about the weights of an attention call; `measure` answers it."""

    def check(self, call: AttentionCall) -> None:  # noqa: B027  (most have nothing to check)
        """Raise if the question makes no sense for this call."""

    @abstractmethod
    def of(self, block: Block) -> tuple[Tensor, ...]:
        """What this block of rows contributes."""

    @abstractmethod
    def fold(self, so_far: Any, part: tuple[Tensor, ...]) -> Any:
        """What all blocks so far contribute; `so_far` is None at first."""

    @abstractmethod
    def finish(self, total: Any, call: AttentionCall) -> Any:
        """The answer, from all blocks' contributions."""


class _PerRow(Measure):
    """A measure whose answer belongs to query rows: [B, Hq, Lq, ...]."""

    def fold(self, so_far: list[tuple[Tensor, ...]] | None, part: tuple[Tensor, ...]) -> Any:
        return [*(so_far or []), part]

    def finish(self, total: list[tuple[Tensor, ...]], call: AttentionCall) -> Any:
        return torch.cat([part[0] for part in total], dim=2)


class _Sum(Measure):
    """A measure that adds up over query rows."""

    def fold(self, so_far: tuple[Tensor, ...] | None, part: tuple[Tensor, ...]) -> Any:
        if so_far is None:
            return part
        return tuple(a + b for a, b in zip(so_far, part, strict=True))

    def finish(self, total: tuple[Tensor, ...], call: AttentionCall) -> Any:
        return total[0]


@dataclass(frozen=True)
class LogSumExp(_PerRow):
    """log sum_j exp(S_ij), sink included: [B, Hq, Lq]; -inf for a row that may attend to nothing.

    Differentiable.
    """

    def of(self, block: Block) -> tuple[Tensor, ...]:
        return (block.softmax.lse,)


@dataclass(frozen=True)
class MaxLogit(_PerRow):
    """max_j S_ij over the keys: [B, Hq, Lq]; -inf for a row that may attend to nothing."""

    def of(self, block: Block) -> tuple[Tensor, ...]:
        return (_largest(block.logits),)


@dataclass(frozen=True)
class Entropy(_PerRow):
    """- sum_j P_ij log P_ij in nats, sink included as one more key: [B, Hq, Lq]. Differentiable.

    Computed as log l - sum_j P_ij (S_ij - m_i), with m_i the row's largest logit and l_i its sum of
    exp(S_ij - m_i): lse - sum_j P_ij S_ij would cancel where logits are large.
    """

    def of(self, block: Block) -> tuple[Tensor, ...]:
        total, top = block.softmax.total.squeeze(-1), block.softmax.top.squeeze(-1)
        entropy = total.log() - (block.weights * block.below_top()).sum(-1)
        if block.sinks is not None:
            below = block.sinks.to(top.dtype)[:, None] - top
            entropy = entropy - below.exp() / total * below
        return (entropy.masked_fill(block.softmax.nothing.squeeze(-1), 0.0),)


@dataclass(frozen=True)
class MeanDistance(_PerRow):
    """sum_j P_ij |p_i - j|, in tokens: [B, Hq, Lq]."""

    def of(self, block: Block) -> tuple[Tensor, ...]:
        distance = (block.positions[:, None, :, None] - _keys(block)).abs()
        return ((block.weights * distance).sum(-1),)


@dataclass(frozen=True)
class FirstKeysMass(_PerRow):
    """sum_{j < n} P_ij, the mass on the first n keys: [B, Hq, Lq].

    "Attention sinks" (Xiao et al., 2023): heads that have nothing to do attend to the first tokens.

    n: how many keys. Keys are counted from 0, padding included.
    """

    n: int = 4

    def __post_init__(self) -> None:
        check_sizes({"n": self.n})

    def of(self, block: Block) -> tuple[Tensor, ...]:
        return (block.weights[..., : self.n].sum(-1),)


@dataclass(frozen=True)
class OffsetMass(_PerRow):
    """P_ij at j = p_i + offset: [B, Hq, Lq]; 0 where there is no such key.

    offset: -1 asks for the previous token, 0 for the token itself, 1 for the next.
    """

    offset: int

    def __post_init__(self) -> None:
        if type(self.offset) is not int:
            raise ArgumentTypeError(
                f"OffsetMass's offset is {self.offset!r}; expected an int, such as -1 for the "
                "previous token."
            )

    def of(self, block: Block) -> tuple[Tensor, ...]:
        key = block.positions + self.offset
        k_len = block.logits.shape[-1]
        here = (key >= 0) & (key < k_len)
        if not k_len:
            return (block.logits.new_zeros(block.logits.shape[:-1]),)
        index = key.clamp(0, k_len - 1)[:, None, :, None].expand(*block.logits.shape[:-1], 1)
        mass = block.weights.gather(-1, index).squeeze(-1)
        return (mass.masked_fill(~here[:, None], 0.0),)


class Top(NamedTuple):
    """Each row's heaviest keys, heaviest first; of equal ones the first.

    weights: [B, Hq, Lq, k]. keys: int64 [B, Hq, Lq, k], -1 (weight 0) where a row has fewer keys.
    """

    weights: Tensor
    keys: Tensor


@dataclass(frozen=True)
class TopKeys(_PerRow):
    """The k keys with the largest P_ij, as `Top`."""

    k: int = 8

    def __post_init__(self) -> None:
        check_sizes({"k": self.k})

    def of(self, block: Block) -> tuple[Tensor, ...]:
        # Logits, since weights may underflow to a tie.
        logits, keys = block.logits.sort(dim=-1, descending=True, stable=True)
        logits, keys = logits[..., : self.k], keys[..., : self.k]
        keys = keys.masked_fill(logits == -torch.inf, -1)
        weights = (logits - block.softmax.top).exp() / block.softmax.total
        missing = self.k - keys.shape[-1]
        pad = torch.nn.functional.pad
        return pad(weights, (0, missing)), pad(keys, (0, missing), value=-1)

    def finish(self, total: list[tuple[Tensor, ...]], call: AttentionCall) -> Top:
        weights, keys = (torch.cat(parts, dim=2) for parts in zip(*total, strict=True))
        return Top(weights, keys)


@dataclass(frozen=True)
class Received(_Sum):
    """sum_i P_ij, what each key gets: [B, Hq, Lk].

    The score by which H2O (Zhang et al., 2023) keeps keys in a cache; with `last`, over the last
    rows only, that of SnapKV (Li et al., 2024).

    last: how many of the last query rows count; None: all.
    """

    last: int | None = None

    def __post_init__(self) -> None:
        check_sizes({"last": self.last})

    def of(self, block: Block) -> tuple[Tensor, ...]:
        first = 0 if self.last is None else max(0, block.q_len - self.last - block.begin)
        return (block.weights[:, :, first:].sum(2),)


@dataclass(frozen=True)
class HeatMap(_Sum):
    """P pooled to a picture: [B, Hq, rows, columns].

    Cell (r, c) is the mass that the query rows of its row of cells put on the keys of its column of
    cells, as a mean over these queries: each row of the picture sums to 1, as a row of P does.
    Query q of the n in view falls into row q * rows // n, keys likewise.

    rows, columns: the picture's size, at most the number of queries and of keys in view.
    queries, keys: what is in view, [begin, end); None: all. A small view is an exact zoom: with as
        many cells as there are queries and keys in it, the weights themselves.
    """

    rows: int = 64
    columns: int = 64
    queries: tuple[int, int] | None = None
    keys: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_sizes({"rows": self.rows, "columns": self.columns})
        for name in ("queries", "keys"):
            object.__setattr__(self, name, _view(name, getattr(self, name)))

    def check(self, call: AttentionCall) -> None:
        geometry = call.geometry
        for name, view, length in (
            ("queries", self.queries, geometry.q_len),
            ("keys", self.keys, geometry.k_len),
        ):
            begin, end = view or (0, length)
            if not 0 <= begin <= end <= length:
                raise ArgumentError(
                    f"HeatMap looks at {name} that are not there: got {view}; expected "
                    f"(begin, end) with 0 <= begin <= end <= {length}."
                )

    def of(self, block: Block) -> tuple[Tensor, ...]:
        *_, k_len = block.logits.shape
        query_begin, query_end = self.queries or (0, block.q_len)
        key_begin, key_end = self.keys or (0, k_len)
        first = max(query_begin, block.begin)
        last = max(first, min(query_end, block.end))
        weights = block.weights[:, :, first - block.begin : last - block.begin, key_begin:key_end]
        by_key = _pool(weights, -1, 0, key_end - key_begin, self.columns)
        return (_pool(by_key, -2, first - query_begin, query_end - query_begin, self.rows),)

    def finish(self, total: tuple[Tensor, ...], call: AttentionCall) -> Tensor:
        begin, end = self.queries or (0, call.geometry.q_len)
        rows = _cells(torch.arange(end - begin), end - begin, self.rows)
        count = torch.bincount(rows, minlength=min(self.rows, end - begin))
        return total[0] / count.to(total[0])[:, None]


@dataclass(frozen=True)
class WeightRows(_PerRow):
    """Rows of P as they are: [B, Hq, n, Lk] for n chosen query rows, in ascending order."""

    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.rows, Iterable):
            raise ArgumentTypeError(
                f"WeightRows's rows is {self.rows!r}; expected numbers of query rows, as in "
                "WeightRows((0, 5))."
            )
        rows = tuple(whole_number(row, "a row of WeightRows") for row in self.rows)
        object.__setattr__(self, "rows", rows)

    def check(self, call: AttentionCall) -> None:
        length = call.geometry.q_len
        for row in self.rows:
            if row >= length:
                raise ArgumentError(
                    f"WeightRows asks for a query row that is not there: got {row}; expected "
                    f"0 <= row < {length}."
                )

    def of(self, block: Block) -> tuple[Tensor, ...]:
        chosen = [row - block.begin for row in sorted(self.rows) if block.begin <= row < block.end]
        return (block.weights[:, :, chosen],)


@dataclass(frozen=True)
class HeadSimilarity(_Sum):
    """1 - JSD(P_i of head g, P_i of head h) / log 2, a mean over query rows: [B, Hq, Hq].

    1 where two heads attend alike, 0 where they share no key. JSD is the Jensen-Shannon divergence
    of the weights over the keys (sinks left out, each row divided by its sum). Rows that may attend
    to nothing, or where all mass of either head is on its sink, do not count; 0 if none counts.
    """

    def of(self, block: Block) -> tuple[Tensor, ...]:
        mass = block.weights.sum(-1, keepdim=True)
        share = block.weights / mass.where(mass > 0, 1.0)
        alive = (mass > 0).squeeze(-1)
        own = -torch.special.xlogy(share, share).sum(-1)
        similar, counted = [], []
        for head in range(share.shape[1]):
            middle = (share + share[:, head : head + 1]) / 2
            joint = -torch.special.xlogy(middle, middle).sum(-1)
            divergence = joint - (own + own[:, head : head + 1]) / 2
            counts = alive & alive[:, head : head + 1]
            similar.append(((1 - divergence / math.log(2)) * counts).sum(-1))
            counted.append(counts.sum(-1).to(share.dtype))
        return torch.stack(similar, dim=1), torch.stack(counted, dim=1)

    def finish(self, total: tuple[Tensor, ...], call: AttentionCall) -> Tensor:
        similar, counted = total
        return similar / counted.clamp(min=1)


def _view(name: str, view: Any) -> tuple[int, int] | None:
    """A HeatMap's [begin, end), as two ints."""
    if view is None:
        return None
    ends = tuple(view) if isinstance(view, Iterable) else ()
    if isinstance(view, str) or len(ends) != 2:
        raise ArgumentTypeError(
            f"HeatMap's {name} is {view!r}; expected (begin, end), two whole numbers, or None for "
            "all."
        )
    begin, end = (whole_number(number, f"begin or end of HeatMap's {name}") for number in ends)
    return begin, end


def _keys(block: Block) -> Tensor:
    return torch.arange(block.logits.shape[-1], device=block.logits.device)


def _largest(logits: Tensor) -> Tensor:
    if logits.shape[-1]:
        return logits.amax(-1)
    return logits.new_full(logits.shape[:-1], -torch.inf)


def _cells(index: Tensor, length: int, cells: int) -> Tensor:
    """The cell that each index of an axis of `length` falls into."""
    return index * min(cells, length) // max(length, 1)


def _pool(values: Tensor, dim: int, first: int, length: int, cells: int) -> Tensor:
    """Sums over an axis that holds the indices first, first + 1, ... of `length`, by cell."""
    index = torch.arange(first, first + values.shape[dim], device=values.device)
    shape = list(values.shape)
    shape[dim] = min(cells, length)
    return values.new_zeros(shape).index_add(dim, _cells(index, length, cells), values)
