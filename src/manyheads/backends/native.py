"""Our own kernels: attention and its gradients on the CPU: AMX, AVX-512, AVX2, NEON or plain C++.

float32, bfloat16 and float16; every sum is float32, and so is every product but those of bfloat16
where the processor has instructions for them (AMX, AVX512-BF16), which take weights in bfloat16.
K and V are taken with any strides, as long as each row is contiguous: float32 rows that follow each
other are read in place, others are copied, and half types widened or paired, a block at a time.
Grouped heads share them, masked blocks are skipped, dropout is drawn again in the backward pass,
and memory beyond inputs and outputs does not grow with Lq * Lk, in training neither; but a dense
mask or bias that is not as the kernels read it is copied (`memory_note`).

Second derivatives, which the kernels do not have, are those of definition.py (_autograd.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manyheads import _autograd, _ops, dropout
from manyheads.spec import (
    AttentionCall,
    AttentionSpec,
    BandPlan,
    DensePlan,
    IntervalsPlan,
    collapse,
    may_collapse,
)

NAME = "native"

_MAX_HEAD_DIM = 256
#: csrc/kernel/decode.h: kFewQueries.
_FEW_QUERIES = 8
#: Fewer query rows do not pay for what PyTorch packs for the matrix unit.
_MATRIX_UNIT_ROWS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(spec: AttentionSpec) -> list[str]:
    """Every reason against running this call here; empty if it can.

    Raises:
        ArgumentError: the environment variable MANYHEADS_ISA names kernels that are not there. It
            was set to be obeyed, so no other backend quietly takes over.
    """
    _ops.check_isa_override()
    reasons = []
    if _ops.LIBRARY_ERROR is not None:
        reasons.append(_ops.LIBRARY_ERROR)
    if spec.device != "cpu":
        reasons.append(f"tensors are on {spec.device}, these kernels run on the cpu")
    if spec.dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        reasons.append(f"dtype is {spec.dtype}, these kernels take {names}")
    if not 1 <= spec.head_dim <= _MAX_HEAD_DIM:
        reasons.append(f"head_dim is {spec.head_dim}, these kernels take 1 to {_MAX_HEAD_DIM}")
    if not 1 <= spec.value_dim <= _MAX_HEAD_DIM:
        reasons.append(f"value_dim is {spec.value_dim}, these kernels take 1 to {_MAX_HEAD_DIM}")
    if spec.forward_mode:
        reasons.append("forward-mode differentiation, these kernels have only backward")
    elif spec.transformed and torch.compiler.is_compiling():
        reasons.append("torch.compile traces a torch.func transform")
    return reasons


def slower_here(spec: AttentionSpec) -> str | None:
    """Why another backend that can run this call is expected to be faster; None if none is."""
    plain = spec.plan == "full" or spec.causal
    plain &= not (spec.bias or spec.softcap or spec.sinks or spec.needs_lse or spec.dropout)
    unit = spec.dtype in _ops.cpu_kernels().matrix_dtypes
    if unit and plain and spec.head_dim == spec.value_dim and spec.q_len >= _MATRIX_UNIT_ROWS:
        return (
            f"{spec.dtype} with a full or causal mask: PyTorch's kernel uses this processor's "
            "matrix unit (AMX), these kernels do not"
        )
    return None


def about() -> str:
    """Which kernels a call would run on, for an explanation."""
    return f"{_ops.cpu_kernels().name} kernels"


def memory_note(spec: AttentionSpec) -> str | None:
    """Why memory beyond inputs and outputs grows with Lq * Lk; None if it does not.

    A dense mask or bias that the caller made is an input; a copy of it is not.
    """
    return spec.dense_memory


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Compute the call; only for specs that `why_not` has nothing against.

    Returns out [B, Hq, Lq, Dv] in the query's dtype and memory layout, and lse float32
    [B, Hq, Lq] if the call needs it.
    """
    arguments = _arguments(call)
    if _autograd.wants_gradient(arguments):
        out, lse = _autograd.attention(arguments, call.needs_lse)
    else:
        out, lse, _ = torch.ops.manyheads.attention_forward.default(
            *arguments, call.needs_lse, False
        )
    return out, lse if call.needs_lse else None


def can_measure(call: AttentionCall) -> bool:
    """Whether the statistics operators can take the call, whose value is not read.

    They have no gradient, nor forward mode: where one may be wanted they cannot.

    Raises:
        ArgumentError: as `why_not` does.
    """
    _ops.check_isa_override()
    fits = 1 <= call.query.shape[-1] <= _MAX_HEAD_DIM and call.query.dtype in _DTYPES
    if _ops.LIBRARY_ERROR is not None or call.query.device.type != "cpu" or not fits:
        return False
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level >= 0 and forward_ad._is_fwd_grad_enabled():
        return False
    bias = call.bias
    inputs = (call.query, call.key, call.sinks, *bias.tensors)
    return not _autograd.wants_gradient_of(inputs)


def leaves_stats(call: AttentionCall) -> bool:
    """Whether `run_with_stats` gives what `run` does, bit for bit.

    Not where a gradient may be wanted, which it has none of, nor of calls that are computed in
    another order where they leave stats: those of few queries, and of float16 on matrix units.
    """
    _, q_heads, q_len, _ = call.query.shape
    few = q_len * (q_heads // max(1, call.key.shape[1])) <= _FEW_QUERIES
    inputs = (call.query, call.key, call.value, call.sinks, *call.bias.tensors)
    plain = not few and call.query.dtype != torch.float16
    return plain and not _autograd.wants_gradient_of(inputs)


def run_with_stats(
    call: AttentionCall, needs_lse: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    """`run` where no gradient is wanted: (out, lse, stats, what the statistics operator wants).

    stats: float32 [2, B, Hq, Lq], each row's maximum in the kernels' unit, and its sum. lse is an
    empty tensor unless it is needed. The last ones are its arguments from the query on.
    """
    arguments = _arguments(call)
    results = torch.ops.manyheads.attention_forward.default(*arguments, needs_lse, True)
    return (*results, _of_scores(arguments))


def run_and_measure(
    call: AttentionCall, needs_lse: bool, questions: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...], tuple[Tensor, ...]]:
    """`run_with_stats`, and what the statistics operator answers to its last arguments.

    In one walk over the tiles, where a tile's scores fit in a cache and are kept there.
    """
    arguments = _arguments(call)
    operator = torch.ops.manyheads.attention_measured.default
    out, lse, stats, *answers = operator(*arguments, needs_lse, *questions)
    return out, lse, stats, _of_scores(arguments), tuple(answers)


def _of_scores(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments without the value and the dropout: those of the statistics operator."""
    query, key, _, *others = arguments
    return query, key, *others[:-2]


def without_value(call: AttentionCall) -> AttentionCall:
    """The call of which only the weights are asked: its value is not read.

    A value of one column: the product with it is next to nothing beside the scores.
    """
    return replace(call, value=call.key[..., :1], dropout_p=0.0)


def _arguments(call: AttentionCall) -> tuple[Any, ...]:
    """The operators' arguments that say what the call is; `_autograd.call_of` is the inverse."""
    plan, bias = call.plan, call.bias
    band, band_rows = _band(call)
    rows = call.positions.rows
    return (
        _contiguous_rows(call.query),
        _contiguous_rows(call.key),
        _contiguous_rows(call.value),
        call.scale,
        0.0 if call.softcap is None else call.softcap,
        None if call.sinks is None else _float(call.sinks),
        band,
        band_rows,
        None if rows is None else rows.to(torch.int32).contiguous(),
        plan.ranges if isinstance(plan, IntervalsPlan) else None,
        _dense_mask(plan.allowed) if isinstance(plan, DensePlan) else None,
        None if bias.slopes is None else _float(bias.slopes),
        None if bias.distance_values is None else _float(bias.distance_values),
        bias.distance_offset,
        None if bias.dense is None else _dense_bias(bias.dense),
        dropout.draw_seed() if call.dropout_p else None,
        call.dropout_p,
    )


def _band(call: AttentionCall) -> tuple[list[int], Tensor | None]:
    """The operator's `band` and `band_rows`.

    Six numbers (query_start, left, right, first_n, key_start, key_end), first_within_right, and a
    bit set: bit i says that number i differs by batch element and is the next row of `band_rows`
    int32 [n, B]. Plain numbers, the common case, cost no tensor.
    """
    plan, start, k_len = call.plan, call.positions.start, call.geometry.k_len
    if not isinstance(plan, BandPlan):
        if isinstance(start, int):
            return [start, _ops.UNBOUNDED, _ops.UNBOUNDED, 0, 0, k_len, 1, 0], None
        plan = BandPlan()
    band: list[Any] = [
        start,
        _ops.UNBOUNDED if plan.left is None else plan.left,
        _ops.UNBOUNDED if plan.right is None else plan.right,
        plan.first_n,
        plan.key_start,
        k_len if plan.key_end is None else plan.key_end,
        int(plan.first_within_right),
        0,
    ]
    # Asking for the class first: isinstance costs five times as much where the answer is no.
    differing = [i for i, n in enumerate(band) if n.__class__ is not int and isinstance(n, Tensor)]
    if not differing:
        return band, None
    rows = torch.stack([band[i].to(torch.int32) for i in differing])
    for i in differing:
        band[i] = 0
        band[-1] |= 1 << i
    return band, rows


def _contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor itself unless its last axis is strided; the kernels take every other stride."""
    return tensor if tensor.stride()[-1] == 1 else tensor.contiguous()


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _dense_mask(allowed: Tensor) -> Tensor:
    """[.., .., Lq, Lk], contiguous along the keys; only what is not repeated is copied."""
    if allowed.stride(3) == 1:
        return allowed
    collapsed = collapse(allowed).expand(-1, -1, -1, allowed.shape[3])
    return collapsed.contiguous().expand(-1, -1, allowed.shape[2], -1)


def _dense_bias(bias: Tensor) -> Tensor:
    """float32, with one value for all keys or contiguous along them; `spec.dense_memory`."""
    if bias.dtype is torch.float32 and (bias.shape[3] == 1 or bias.stride(3) == 1):
        return bias
    # Only what is not repeated is copied: the kernels broadcast every axis of size 1.
    bias = collapse(bias) if may_collapse(bias) else bias
    return bias.contiguous().to(torch.float32)
