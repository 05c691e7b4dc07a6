"""A part of an attention call as a call: some batch elements, some heads, some query rows.

Rows of a softmax do not depend on each other, nor do heads or batch elements, so the weights of a
part are the same numbers as in the whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from manyheads.spec import (
    AttentionCall,
    BandPlan,
    DensePlan,
    IntervalsPlan,
    MaskPlan,
    QueryPositions,
)


def heads_at(call: AttentionCall, heads: Tensor) -> AttentionCall:
    """The call of n query heads, int64 [n], each with a key/value head of its own."""
    group = call.query.shape[1] // call.key.shape[1]
    bias = call.bias
    bias = replace(
        bias,
        slopes=None if bias.slopes is None else bias.slopes[heads],
        distance_values=None if bias.distance_values is None else bias.distance_values[heads],
        dense=None if bias.dense is None else _pick(bias.dense, 1, heads),
    )
    return replace(
        call,
        query=call.query[:, heads],
        key=call.key[:, heads // group],
        value=call.value[:, heads // group],
        geometry=replace(call.geometry, q_heads=len(heads)),
        plan=_pick_plan(call.plan, 1, heads),
        bias=bias,
        sinks=None if call.sinks is None else call.sinks[heads],
    )


def rows_at(call: AttentionCall, rows: Tensor) -> AttentionCall:
    """The call of n query rows, int64 [n], where they stood."""
    positions = call.positions.materialize(call.geometry)[:, rows]
    bias = call.bias
    if bias.dense is not None:
        bias = replace(bias, dense=_pick(bias.dense, 2, rows))
    return replace(
        call,
        query=call.query[:, :, rows],
        geometry=replace(call.geometry, q_len=len(rows)),
        plan=_pick_plan(call.plan, 2, rows),
        positions=QueryPositions(rows=positions),
        bias=bias,
    )


def batch_at(call: AttentionCall, batch: Tensor) -> AttentionCall:
    """The call of n batch elements, int64 [n]."""
    positions = call.positions
    if positions.rows is not None:
        positions = QueryPositions(rows=_pick(positions.rows, 0, batch))
    else:
        positions = QueryPositions(start=_numbers(positions.start, batch))
    bias = call.bias
    if bias.dense is not None:
        bias = replace(bias, dense=_pick(bias.dense, 0, batch))
    return replace(
        call,
        query=call.query[batch],
        key=call.key[batch],
        value=call.value[batch],
        geometry=replace(call.geometry, batch=len(batch)),
        plan=_pick_plan(call.plan, 0, batch),
        positions=positions,
        bias=bias,
    )


def _pick_plan(plan: MaskPlan, axis: int, index: Tensor) -> MaskPlan:
    """The plan of a part, along axis 0 (batch), 1 (heads) or 2 (rows)."""
    if isinstance(plan, IntervalsPlan):
        return replace(plan, ranges=_pick(plan.ranges, axis, index))
    if isinstance(plan, DensePlan):
        return replace(plan, allowed=_pick(plan.allowed, axis, index))
    if isinstance(plan, BandPlan) and axis == 0:
        return replace(
            plan,
            left=_numbers(plan.left, index),
            right=_numbers(plan.right, index),
            first_n=_numbers(plan.first_n, index),
            key_start=_numbers(plan.key_start, index),
            key_end=_numbers(plan.key_end, index),
        )
    return plan


def _numbers(value: Any, batch: Tensor) -> Any:
    """Of a `PerBatch` or None."""
    return value[batch] if isinstance(value, Tensor) else value


def _pick(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """Entries along an axis; one that stands for all (size 1) stays."""
    return tensor if tensor.shape[axis] == 1 else tensor.index_select(axis, index)
