"""Attention from its formula, in float64, for comparison: nothing of manyheads is used here.

    s = scale Q K^T,  s = c tanh(s / c),  s = s + bias,  w = exp(s) / sum over allowed keys,  w V

Masks and biases come in as full tensors, so that what a test believes of a mask stands in the test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One call, spelled out.

    query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv]; allowed: bool and bias:
    floating, both broadcastable to [B, Hq, Lq, Lk]; sinks [Hq].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    allowed: Tensor | None = None
    bias: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def attend(problem: Problem, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Lq, Dv], lse [B, Hq, Lq]), every step computed and stored in `dtype`.

    A row that may attend to nothing gives 0 and -inf. Keys are split off one by one only where
    values are not finite; see `_weighted`.
    """
    group = problem.query.shape[1] // problem.key.shape[1]
    query = problem.query.to(dtype)
    key = problem.key.to(dtype).repeat_interleave(group, dim=1)
    value = problem.value.to(dtype).repeat_interleave(group, dim=1)
    scale = problem.scale if problem.scale is not None else 1.0 / math.sqrt(query.shape[-1])
    scores = scale * (query @ key.transpose(-1, -2))
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.bias is not None:
        scores = scores + problem.bias.to(dtype)
    allowed = torch.ones(scores.shape, dtype=torch.bool)
    if problem.allowed is not None:
        allowed = problem.allowed.expand(scores.shape)
    scores = torch.where(allowed, scores, -math.inf)
    logits = scores
    if problem.sinks is not None:
        sinks = problem.sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        logits = torch.cat([scores, sinks], dim=-1)
    nothing = ~allowed.any(-1)
    if logits.shape[-1] == 0:
        return value.new_zeros(*scores.shape[:3], value.shape[-1]), scores.sum(-1) - math.inf
    weights = torch.softmax(logits, dim=-1)[..., : scores.shape[-1]]
    weights = torch.where(allowed, weights, 0.0)
    out = torch.where(nothing[..., None], 0.0, _weighted(weights, value, allowed))
    return out, torch.where(nothing, -math.inf, torch.logsumexp(logits, dim=-1))


def _weighted(weights: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """weights @ value, in which a value that is not finite meets only the queries that see it."""
    if value.isfinite().all():
        return weights @ value
    pairs = weights[..., None] * value[:, :, None]  # [B, Hq, Lq, Lk, Dv]
    return torch.where(allowed[..., None], pairs, 0.0).sum(-2)
