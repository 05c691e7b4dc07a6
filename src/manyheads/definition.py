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
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.spec import AttentionCall, has_values


class Softmax(NamedTuple):
    """The softmax over each row's keys and its sink.

    weights: [B, Hq, Lq, Lk]; a row that may attend to nothing is zeros.
    top, total: [B, Hq, Lq, 1], the row's largest logit, sink included, and the sum of the
        exponentials of all logits less that one; meaningless for a row of nothing, but finite.
    nothing: bool [B, Hq, Lq, 1], those rows.
    """

    weights: Tensor
    top: Tensor
    total: Tensor
    nothing: Tensor

    @property
    def lse(self) -> Tensor:
        """log(sum(exp(logits))), [B, Hq, Lq]; -inf where a row may attend to nothing."""
        return (self.top + self.total.log()).masked_fill(self.nothing, -math.inf).squeeze(-1)


def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Returns out [B, Hq, Lq, Dv] in the call's dtype, and lse [B, Hq, Lq] or None.

    lse is float32, or float64 for a float64 call.
    """
    allowed = _allowed(call)
    softmax = softmax_of(call, logits_of(call, allowed))
    weights = softmax.weights
    if call.dropout_factors is not None:
        weights = weights * call.dropout_factors
    elif call.dropout_p > 0.0:
        weights = torch.nn.functional.dropout(weights, call.dropout_p)
    value = call.value.to(_accumulate(call))
    out = _weighted_values(weights, value, allowed).to(call.query.dtype)
    return out, softmax.lse if call.needs_lse else None


def logits_of(call: AttentionCall, allowed: Tensor | None = None) -> Tensor:
    """[B, Hq, Lq, Lk]: scores after scale, softcap, bias and mask, -inf for a masked pair.

    float32, or float64 for a float64 call. allowed: of the call's plan, if it is there already.
    """
    query, key = (x.to(_accumulate(call)) for x in (call.query, call.key))
    if allowed is None:
        allowed = _allowed(call)
    if allowed is not None:
        query = query.where(allowed.any(-1, keepdim=True), 0.0)
    return _scores(call, query, key, allowed)


def softmax_of(call: AttentionCall, logits: Tensor) -> Softmax:
    """The softmax of logits [B, Hq, Lq, Lk], in which the call's sinks take part."""
    if call.geometry.k_len:
        top = logits.detach().amax(-1, keepdim=True)
    else:
        top = logits.new_full((*logits.shape[:-1], 1), -math.inf)
    nothing = top == -math.inf
    # A row with no key keeps its -inf logits and gets exp(-inf - 0) = 0, in backward too.
    top = top.masked_fill(nothing, 0.0)
    if call.sinks is not None:
        sinks = call.sinks.to(logits.dtype)[:, None, None]
        top = torch.maximum(top, sinks.detach())
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    if call.sinks is not None:
        total = total + torch.exp(sinks - top)
    total = total.masked_fill(nothing, 1.0)
    return Softmax(weights / total, top, total, nothing)


def _accumulate(call: AttentionCall) -> torch.dtype:
    dtype = call.query.dtype
    return dtype if dtype == torch.float64 else torch.float32


def _allowed(call: AttentionCall) -> Tensor | None:
    """bool, broadcastable to [B, Hq, Lq, Lk]; None where all is allowed."""
    if call.plan.kind == "full":
        return None
    return call.plan.materialize(call.geometry, call.positions)


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
    """False also where no value may be looked at: where there is none and inside torch.func."""
    if torch._C._are_functorch_transforms_active() or not has_values(tensor):
        return False
    return bool(tensor.detach().isfinite().all())
