"""Attention weights a few query rows at a time: the whole of them is never there.

Rows of a softmax do not depend on each other, so a call cut along its queries is as many calls, and
what is measured on one block of rows at a time takes memory that grows with Lk only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manyheads.definition import Softmax, logits_of, softmax_of
from manyheads.spec import (
    AttentionCall,
    BandPlan,
    DensePlan,
    FullPlan,
    IntervalsPlan,
    MaskPlan,
    QueryPositions,
)

#: A block's logits take about this many bytes; its weights and what is made of them as many again.
_BLOCK_BYTES = 1 << 23


@dataclass(frozen=True, slots=True)
class Block:
    """Query rows [begin, end) of a call of `q_len` rows.

    positions: int64 [B|1, R], where each row stands on the key axis.
    logits, softmax.weights: [B, Hq, R, Lk], float32, or float64 for a float64 call.
    """

    begin: int
    end: int
    q_len: int
    positions: Tensor
    logits: Tensor
    softmax: Softmax
    sinks: Tensor | None

    @property
    def weights(self) -> Tensor:
        """P: [B, Hq, R, Lk]; zeros for a row that may attend to nothing."""
        return self.softmax.weights

    def below_top(self) -> Tensor:
        """Logits less the row's largest, [B, Hq, R, Lk]; 0 where the pair is masked."""
        return (self.logits - self.softmax.top).masked_fill(self.logits == -torch.inf, 0.0)


def block_bounds(call: AttentionCall) -> Iterator[tuple[int, int]]:
    """[begin, end) of each block of query rows, in order; nothing for a call without any."""
    geometry = call.geometry
    row = 4 * max(1, geometry.batch * geometry.q_heads * geometry.k_len)
    rows = max(1, _BLOCK_BYTES // row)
    for begin in range(0, geometry.q_len, rows):
        yield begin, min(begin + rows, geometry.q_len)


def block_of(call: AttentionCall, begin: int, end: int) -> Block:
    """Query rows [begin, end) of the call, with their weights."""
    part = rows_of(call, begin, end)
    logits = logits_of(part)
    positions = part.positions.materialize(part.geometry)
    softmax = softmax_of(part, logits)
    return Block(begin, end, call.geometry.q_len, positions, logits, softmax, part.sinks)


def rows_of(call: AttentionCall, begin: int, end: int) -> AttentionCall:
    """The call for query rows [begin, end) alone, where they stood."""
    geometry = replace(call.geometry, q_len=end - begin)
    positions = call.positions
    if positions.rows is not None:
        positions = QueryPositions(rows=positions.rows[:, begin:end])
    else:
        positions = QueryPositions(positions.start + begin)
    bias = call.bias
    if bias.dense is not None and bias.dense.shape[2] > 1:
        bias = replace(bias, dense=bias.dense[:, :, begin:end])
    return replace(
        call,
        query=call.query[:, :, begin:end],
        geometry=geometry,
        plan=_plan_rows(call.plan, begin, end),
        positions=positions,
        bias=bias,
    )


def _plan_rows(plan: MaskPlan, begin: int, end: int) -> MaskPlan:
    if isinstance(plan, IntervalsPlan):
        return replace(plan, ranges=plan.ranges[:, :, begin:end])
    if isinstance(plan, DensePlan):
        return replace(plan, allowed=plan.allowed[:, :, begin:end])
    assert isinstance(plan, FullPlan | BandPlan)
    return plan
