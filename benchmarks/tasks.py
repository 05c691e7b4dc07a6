"""The two sides of each row: our call and PyTorch's for the same thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rows import NAMES, Goal, Row
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import manyheads as mh
from manyheads.benchmark import (
    Comparison,
    check_close,
    compare,
    pair_unit,
    peak_now,
    read_rate,
)

#: As many pairs of what takes seconds, and of other peers than PyTorch.
FEW_PAIRS = 5


@dataclass(frozen=True)
class Task:
    """ours, peer: what to time; check raises if their results differ.

    limit: measures what the machine can do at best, `work` of it being asked for here.
    """

    name: str
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    check: Callable[[Any, Any], None]
    limit: Callable[[], float]
    limit_name: str
    work: float
    goal: Goal
    slow: bool = False

    def time(self, pairs: int, patience: float) -> Comparison:
        return compare(
            self.ours,
            self.peer,
            pairs=min(pairs, FEW_PAIRS) if self.slow else pairs,
            warmup=0,  # checked and measured once before: that is two calls
            check=self.check,
            limit=self.limit,
            patience=patience,
        )


def tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype is torch.float32 else 0.05


def multiply_limit(dtype: torch.dtype) -> tuple[Callable[[], float], str]:
    """The peak of the products that kernels of this dtype can use, and what to call it."""
    if pair_unit(dtype):
        return lambda: peak_now(dtype), f"{NAMES[dtype]} peak"
    return peak_now, "FMA peak"


def limit_of(row: Row, inputs: list[Tensor]) -> tuple[Callable[[], float], str]:
    """The limit of a call of this row, and what to call it."""
    if not row.reads:
        return multiply_limit(row.dtype)
    return lambda: read_rate(*inputs[1:]), "read rate"


def alibi_slopes(heads: int) -> Tensor:
    return torch.tensor(mh.Alibi.paper_slopes(heads))


def peer_mask(row: Row) -> Tensor | None:
    """What PyTorch needs where `is_causal` does not say it: a dense tensor."""
    mask = row.mask
    if mask is None or (row.causal and not (row.alibi or row.learned_bias)):
        return None
    allowed = mask.materialize(row.length, row.length)
    if not (row.alibi or row.learned_bias):
        return allowed
    if row.learned_bias:
        return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
    position = torch.arange(row.length)
    distance = (position[:, None] - position).abs()
    bias = -alibi_slopes(row.heads[0])[:, None, None] * distance
    return bias.masked_fill(~allowed, float("-inf"))


def our_call(row: Row, inputs: list[Tensor], bias: Tensor | None = None) -> Callable[[], Tensor]:
    """`mh.attention` on query, key and value."""
    attn_bias = mh.Alibi() if row.alibi else None if bias is None else mh.DenseBias(bias)
    mask = row.mask
    return lambda: mh.attention(
        *inputs, mask=mask, attn_bias=attn_bias, backend="native", dropout_p=row.dropout
    )


def torch_call(row: Row, inputs: list[Tensor], bias: Tensor | None = None) -> Callable[[], Tensor]:
    """PyTorch's attention on the same."""
    mask = peer_mask(row)
    causal = row.causal and mask is None
    grouped = row.heads[0] != row.heads[1]

    def attend() -> Tensor:
        # A learned bias changes with every step, so that the causal part is added in each.
        dense = mask if bias is None or mask is None else bias + mask
        return sdpa(
            *inputs, attn_mask=dense, is_causal=causal, enable_gqa=grouped, dropout_p=row.dropout
        )

    return attend


def attention_task(row: Row) -> Task:
    inputs = row.inputs()
    bias = None
    if row.learned_bias:
        random = torch.Generator().manual_seed(1)
        bias = torch.randn(row.heads[0], row.length, row.length, generator=random)
    leaves = inputs if bias is None else [*inputs, bias]
    if row.gradients:
        for leaf in leaves:
            leaf.requires_grad_()
    gradient = torch.randn_like(inputs[0])

    def whole(attend: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """The call itself, or with the gradients of all that has some."""
        if not row.gradients:
            return lambda: (attend(),)
        return lambda: torch.autograd.grad(attend(), leaves, gradient)

    def check(ours: tuple[Tensor, ...], peer: tuple[Tensor, ...]) -> None:
        if not row.dropout:  # each drops other weights
            for one, other in zip(ours, peer, strict=True):
                check_close(one, other, tolerance(row.dtype))

    limit, limit_name = limit_of(row, inputs)
    return Task(
        row.name,
        whole(our_call(row, inputs, bias)),
        whole(torch_call(row, inputs, bias)),
        check,
        limit,
        limit_name,
        row.work(),
        row.goal,
        row.slow,
    )
