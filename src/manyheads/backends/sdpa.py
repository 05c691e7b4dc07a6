"""PyTorch's `scaled_dot_product_attention`, where it means what `reference` means.

What the fused CPU kernel does otherwise, and what is done about it here (seen with torch 2.13):

- `is_causal` with a scale <= 0 gives NaN, since the mask's -inf is scaled: the sign, or the zero,
  goes into the query instead.
- A float32 mask beside float64 inputs is read as if it were float64: masks get the inputs' dtype,
  and half types a float32 mask, which that kernel does take.
- A value of inf reaches rows that may not attend to it, through 0 * inf. Where values can be read,
  not in tracing, key and value are scanned (O(n)) and `_run_non_finite` handles those that are not
  finite.
- A last axis that is not contiguous silently takes the O(n^2) path: it is copied.

Only plain top-left causal masks have a fused form; every other mask is materialised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from manyheads.spec import AttentionCall, AttentionSpec, BandPlan, has_values

NAME = "sdpa"


def why_not(spec: AttentionSpec) -> list[str]:
    """Every reason against running this call here; empty if it can."""
    reasons = []
    if spec.softcap:
        reasons.append("PyTorch's kernels have no softcap")
    if spec.sinks:
        reasons.append("PyTorch's kernels have no sinks")
    if spec.needs_lse:
        reasons.append("PyTorch's public function does not return lse")
    if spec.transformed:
        reasons.append("PyTorch's fused kernels have no forward mode and no double backward")
    if 0 in (spec.batch, spec.q_len, spec.k_len):
        reasons.append("the call is empty")
    return reasons


def memory_note(spec: AttentionSpec) -> str | None:
    """Why memory beyond inputs and outputs grows with Lq * Lk; None if it does not."""
    if spec.dropout:
        return "PyTorch computes dropout on stored weights: memory grows with Lq * Lk"
    if spec.value_dim != spec.head_dim:
        return "PyTorch's fused kernel wants Dv == D; otherwise it stores the scores, Lq * Lk"
    if spec.bias:
        return "the bias is materialised as an Lq * Lk mask"
    if spec.plan != "full" and not spec.causal:
        return f"the {spec.plan} mask plan is materialised as an Lq * Lk mask"
    return None


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Returns out [B, Hq, Lq, Dv] and None."""
    if call.plan.kind != "full" and has_values(call.key):
        key_finite, value_finite = call.key.isfinite(), call.value.isfinite()
        if not (key_finite.all() and value_finite.all()):
            return _run_non_finite(call, key_finite, value_finite), None
    return _run(call, call.key, call.value), None


def _run(call: AttentionCall, key: Tensor, value: Tensor) -> Tensor:
    query, scale = call.query, call.scale
    if scale <= 0.0:
        query, scale = (-query, -scale) if scale else (query * 0.0, 1.0)
    mask, nothing = None, None
    causal = _is_causal(call)
    if not causal:
        mask, nothing = _mask(call)
    if nothing is not None:
        query = query.masked_fill(nothing, 0.0)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=call.dropout_p,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out if nothing is None else out.masked_fill(nothing, 0.0)


def _is_causal(call: AttentionCall) -> bool:
    return (
        isinstance(call.plan, BandPlan)
        and call.plan.is_top_left_causal(call.positions)
        and not call.bias.kinds
    )


def _mask(call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
    """(attn_mask, the rows [B|1, Hq|1, Lq, 1] that may attend to nothing).

    Such rows are let see every key, with a query of zeros, and their output is zeroed: neither they
    nor their gradients depend on how a kernel and a version of PyTorch treat them.
    """
    bias = call.bias.materialize(call.geometry, call.positions)
    if call.plan.kind == "full" and bias is None:
        return None, None
    if bias is None:
        allowed = call.plan.materialize(call.geometry, call.positions)
        nothing = ~allowed.any(-1, keepdim=True)
        return allowed | nothing, nothing
    dtype = call.query.dtype
    bias = bias.to(dtype if dtype == torch.float64 else torch.float32)
    shape = (call.geometry.q_len, call.geometry.k_len)
    bias = bias.expand(*bias.shape[:2], *shape)
    if call.plan.kind != "full":
        allowed = call.plan.materialize(call.geometry, call.positions)
        bias = bias.masked_fill(~allowed, -math.inf)
    nothing = (bias == -math.inf).all(-1, keepdim=True)
    return bias.masked_fill(nothing, 0.0), nothing


def _run_non_finite(call: AttentionCall, key_finite: Tensor, value_finite: Tensor) -> Tensor:
    """As `_run` on the finite entries, then NaN where a query attends to a non-finite one.

    A query that may attend to a non-finite value gets NaN in that value's column, and one that may
    attend to a key with any non-finite entry gets NaN in its whole row. (`reference` is finer: it
    keeps the sign of an infinite value, and a score of -inf has no weight.)
    """
    key_finite = key_finite.all(-1, keepdim=True)
    out = _run(call, call.key.where(key_finite, 0.0), call.value.where(value_finite, 0.0))
    group = call.query.shape[1] // call.key.shape[1]
    broken = ~(key_finite & value_finite).repeat_interleave(group, dim=1)
    allowed = call.plan.materialize(call.geometry, call.positions)
    seen = allowed.expand(*out.shape[:3], -1).float() @ broken.float()
    return out + torch.zeros_like(out).masked_fill(seen > 0, math.nan)
