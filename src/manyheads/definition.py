"""The definition of attention, in eager PyTorch: every backend must agree with it.

    out = dropout(softmax(mask(softcap(scale * Q K^T) + bias))) V

Any device and floating dtype, autograd, double backward, forward mode, vmap, torch.compile. Half
types are computed in float32 and rounded once, at the end. The scores are stored, so memory grows
with Lq * Lk.

A key that a query may not attend to has no part in that query's row, whatever it holds. Weights
alone cannot promise that, since 0 * inf is NaN: so non-finite entries of key and value are taken
out of the products and put back, entry by entry, for the queries that do attend to them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manyheads.spec import AttentionCall


def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Returns out [B, Hq, Lq, Dv] in the call's dtype, and lse [B, Hq, Lq] or None.

    lse is float32, or float64 for a float64 call.
    """
    dtype = call.query.dtype
    accumulate = dtype if dtype == torch.float64 else torch.float32
    query, key, value = (x.to(accumulate) for x in (call.query, call.key, call.value))
    allowed = None
    if call.plan.kind != "full":
        allowed = call.plan.materialize(call.geometry, call.positions)
        query = query.where(allowed.any(-1, keepdim=True), 0.0)

    scores = _scores(call, query, key, allowed)
    if call.geometry.k_len:
        top = scores.detach().amax(-1, keepdim=True)
    else:
        top = scores.new_full((*scores.shape[:-1], 1), -math.inf)
    nothing = top == -math.inf
    # A row with no key keeps its -inf scores and gets exp(-inf - 0) = 0, in backward too.
    top = top.masked_fill(nothing, 0.0)
    if call.sinks is not None:
        sinks = call.sinks.to(accumulate)[:, None, None]
        top = torch.maximum(top, sinks.detach())
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if call.sinks is not None:
        total = total + torch.exp(sinks - top)
    total = total.masked_fill(nothing, 1.0)
    weights = weights / total
    if call.dropout_factors is not None:
        weights = weights * call.dropout_factors
    elif call.dropout_p > 0.0:
        weights = torch.nn.functional.dropout(weights, call.dropout_p)
    out = _weighted_values(weights, value, allowed).to(dtype)
    if not call.needs_lse:
        return out, None
    return out, (top + total.log()).masked_fill(nothing, -math.inf).squeeze(-1)


def _scores(call: AttentionCall, query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
    """[B, Hq, Lq, Lk] logits; -inf where `allowed` (bool, broadcastable) is False."""
    finite_key = key
    if allowed is not None and not _all_finite(key):
        finite_key = key.where(key.isfinite().all(-1, keepdim=True), 0.0)
    scores = _per_group(query, finite_key.mT)
    if finite_key is not key:
        broken = ~key.isfinite().all(-1)[:, :, None, :]
        broken = broken.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = scores.where(~broken, _per_group(query.detach(), key.detach().mT))
    scores = scores * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    bias = call.bias.materialize(call.geometry, call.positions)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores if allowed is None else scores.masked_fill(~allowed, -math.inf)


def _weighted_values(weights: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    """The product weights @ value; a value only counts for queries that may attend to its key."""
    if allowed is None or _all_finite(value):
        return _per_group(weights, value)
    finite = value.isfinite()
    out = _per_group(weights, value.where(finite, 0.0))
    # How many +inf, -inf and NaN entries each query attends to, column by column.
    counts = torch.stack([value == math.inf, value == -math.inf, value.isnan()]).to(value.dtype)
    seen = allowed.expand(weights.shape).to(value.dtype)
    above, below, nan = (_per_group(seen, kind) > 0 for kind in counts)
    out = out + torch.zeros_like(out).masked_fill(above, math.inf)
    out = out + torch.zeros_like(out).masked_fill(below, -math.inf)
    return out + torch.zeros_like(out).masked_fill(nan, math.nan)


def _per_group(rows: Tensor, columns: Tensor) -> Tensor:
    """[B, Hq, Lq, N] @ [B, Hkv, N, M] -> [B, Hq, Lq, M]: a group's heads are stacked as rows.

    So the G = Hq / Hkv query heads that share a key/value head read it once, unrepeated.
    """
    batch, q_heads, q_len, n = rows.shape
    kv_heads = columns.shape[1]
    stacked = rows.reshape(batch, kv_heads, q_heads // kv_heads * q_len, n)
    return (stacked @ columns).reshape(batch, q_heads, q_len, columns.shape[3])


def _all_finite(tensor: Tensor) -> bool:
    """False also where no value may be looked at: while compiling and inside torch.func."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return bool(tensor.detach().isfinite().all())
