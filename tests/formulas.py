"""What the measures' formulas mean on the dense matrix of weights, with everything stored."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from cases import Built, Case
from torch import Tensor

import manyheads as mh


class Dense:
    """What the formulas speak of, in `dtype`: S, P and p, with everything stored."""

    def __init__(self, built: Built, case: Case, dtype: torch.dtype) -> None:
        problem = built.problem
        group = problem.query.shape[1] // problem.key.shape[1]
        query, key = problem.query.to(dtype), problem.key.to(dtype).repeat_interleave(group, dim=1)
        scale = problem.scale if problem.scale is not None else 1.0 / math.sqrt(query.shape[-1])
        scores = scale * (query @ key.mT)
        if problem.softcap is not None:
            scores = problem.softcap * torch.tanh(scores / problem.softcap)
        if problem.bias is not None:
            scores = scores + problem.bias.to(dtype)
        allowed = torch.ones(scores.shape, dtype=torch.bool)
        if problem.allowed is not None:
            allowed = problem.allowed.expand(scores.shape)
        self.logits = torch.where(allowed, scores, -math.inf)
        column = self.logits.new_full((*scores.shape[:3], 1), -math.inf)
        if problem.sinks is not None:
            column = problem.sinks.to(dtype)[:, None, None].expand(column.shape)
        self.with_sink = torch.cat([self.logits, column], dim=-1)
        self.nothing = ~allowed.any(-1)
        rows = torch.softmax(self.with_sink, dim=-1).masked_fill(self.nothing[..., None], 0.0)
        self.all_weights, self.weights = rows, rows[..., :-1]
        q_len, k_len = scores.shape[2:]
        start = k_len - q_len if case.query_start is None else case.query_start
        self.position = (torch.arange(q_len) + start).expand(len(query), q_len)
        if case.mask == "lengths":
            ends = torch.tensor([k_len, k_len // 2, 1][: case.batch])
            self.position = torch.arange(q_len) + (ends - q_len)[:, None]
        self.distance = (self.position[:, None, :, None] - torch.arange(k_len)).abs()


def lse(dense: Dense) -> Tensor:
    return dense.with_sink.logsumexp(-1).masked_fill(dense.nothing, -math.inf)


def max_logit(dense: Dense) -> Tensor:
    if not dense.logits.shape[-1]:
        return dense.logits.sum(-1) - math.inf
    return dense.logits.amax(-1)


def entropy(dense: Dense) -> Tensor:
    return -torch.special.xlogy(dense.all_weights, dense.all_weights).sum(-1)


def offset_mass(offset: int) -> Callable[[Dense], Tensor]:
    def mass(dense: Dense) -> Tensor:
        at = dense.position[:, None, :, None] + offset == torch.arange(dense.weights.shape[-1])
        return (dense.weights * at).sum(-1)

    return mass


def pooling(length: int, cells: int) -> Tensor:
    """[cells, length]: 1 where an index falls into a cell."""
    cells = min(cells, length)
    cell = torch.tensor([i * cells // length for i in range(length)], dtype=torch.int64)
    return cell == torch.arange(cells)[:, None]


def heat_map(rows: int, columns: int, queries: slice, keys: slice) -> Callable[[Dense], Tensor]:
    def cells(dense: Dense) -> Tensor:
        view = dense.weights[:, :, queries, keys]
        by_row, by_column = (
            pooling(n, c).to(view) for n, c in zip(view.shape[2:], (rows, columns), strict=True)
        )
        return by_row @ view @ by_column.T / by_row.sum(1)[:, None]

    return cells


def similarity(dense: Dense) -> Tensor:
    """1 - JSD / log 2 by Kullback-Leibler divergences from the mean, head by head."""
    heads = dense.weights.shape[1]
    result = dense.weights.new_zeros(len(dense.weights), heads, heads)
    mass = dense.weights.sum(-1, keepdim=True)
    share, alive = dense.weights / mass, mass.squeeze(-1) > 0
    for g in range(heads):
        for h in range(heads):
            both = alive[:, g] & alive[:, h]
            p, q = share[:, g], share[:, h]
            middle = (p + q) / 2
            parts = [
                torch.special.xlogy(x, x / middle.where(middle > 0, 1)).sum(-1) for x in (p, q)
            ]
            values = (1 - sum(parts) / 2 / math.log(2)).masked_fill(~both, 0.0)
            result[:, g, h] = values.sum(-1) / both.sum(-1).clamp(min=1)
    return result


FORMULAS: dict[mh.Measure, Callable[[Dense], Tensor]] = {
    mh.LogSumExp(): lse,
    mh.MaxLogit(): max_logit,
    mh.Entropy(): entropy,
    mh.MeanDistance(): lambda dense: (dense.weights * dense.distance).sum(-1),
    mh.FirstKeysMass(3): lambda dense: dense.weights[..., :3].sum(-1),
    mh.OffsetMass(-1): offset_mass(-1),
    mh.OffsetMass(0): offset_mass(0),
    mh.OffsetMass(7): offset_mass(7),
    mh.Received(): lambda dense: dense.weights.sum(2),
    mh.Received(last=4): lambda dense: dense.weights[:, :, -4:].sum(2),
    mh.HeatMap(5, 7): heat_map(5, 7, slice(None), slice(None)),
    mh.HeatMap(64, 3): heat_map(64, 3, slice(None), slice(None)),
    mh.HeadSimilarity(): similarity,
}
