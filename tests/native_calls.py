"""Calls of the native backend, made directly: what tests of its operators share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle import Problem
from torch import Tensor

from manyheads.spec import (
    AttentionCall,
    BiasPlan,
    FullPlan,
    Geometry,
    MaskPlan,
    QueryPositions,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_ranges(batch: int, heads: int, q_len: int, k_len: int) -> Tensor:
    """Three ranges of keys for every row."""
    generator = torch.Generator().manual_seed(4)
    shape = (batch, heads, q_len, 3, 2)
    return torch.randint(0, k_len + 1, shape, generator=generator, dtype=torch.int32)


def call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: MaskPlan | None = None,
    positions: QueryPositions | None = None,
    bias: BiasPlan | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    needs_lse: bool = True,
) -> AttentionCall:
    """The call that `attention` would make of these."""
    (batch, q_heads, q_len, width), k_len = query.shape, key.shape[2]
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        geometry=Geometry(batch, q_heads, q_len, k_len, query.device),
        plan=plan or FullPlan(),
        positions=positions or QueryPositions(k_len - q_len),
        bias=bias or BiasPlan(),
        scale=width**-0.5 if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
        needs_lse=needs_lse,
    )


def problem_of(call: AttentionCall) -> Problem:
    """The same for the oracle."""
    allowed = call.plan.materialize(call.geometry, call.positions)
    bias = call.bias.materialize(call.geometry, call.positions)
    tensors = (call.query, call.key, call.value)
    return Problem(*tensors, allowed, bias, call.scale, call.softcap, call.sinks)


def arguments_of(operator: Any, run: Callable[[], object]) -> tuple[Any, ...]:
    """The arguments with which `run` calls the operator, once."""
    seen = []

    class Capture(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is operator:
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with Capture():
        run()
    assert len(seen) == 1
    return seen[0]
