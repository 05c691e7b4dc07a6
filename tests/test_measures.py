"""Each measure against its formula on the dense matrix of weights, in float64."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from cases import Built, Case, build
from tolerance import assert_close_to_oracle
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import manyheads as mh
from manyheads.inspect import blocks

CASES = [
    *(Case(mask, "none", (6, 2), lengths=(29, 37)) for mask in ("none", "window", "dense")),
    *(Case(mask, "alibi", (6, 2), lengths=(29, 37)) for mask in ("sink_window", "left_padding")),
    Case("causal", "none", (3, 3), lengths=(23, 23), sinks=True),
    Case("causal", "none", (3, 1), lengths=(5, 41), softcap=3.0, query_start=11),
    Case("lengths", "relative", (2, 2), lengths=(13, 31), layout="rows_first"),
    Case("outside", "dense", (2, 1), lengths=(31, 31), scale=-0.7),
    Case("nothing", "none", (2, 2), lengths=(7, 11), sinks=True),
    Case("causal", "none", (3, 3), lengths=(23, 29), dtype=torch.float64, sinks=True),
    Case("causal", "none", (3, 3), lengths=(23, 29), dtype=torch.bfloat16),
    Case("window", "none", (3, 3), lengths=(23, 29), dtype=torch.float16),
    Case("none", "none", (3, 3), lengths=(0, 5)),
    Case("none", "none", (3, 3), lengths=(5, 0)),
]


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


@pytest.mark.parametrize("block_bytes", [5000, 1 << 23], ids=["rows", "whole"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_formulas(case: Case, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", block_bytes)
    built = build(case)
    accumulate = torch.float64 if case.dtype == torch.float64 else torch.float32
    exact, plain = Dense(built, case, torch.float64), Dense(built, case, accumulate)
    answers = mh.measure(built.problem.query, built.problem.key, FORMULAS, **built.arguments)
    for formula, answer in zip(FORMULAS.values(), answers, strict=True):
        assert answer.dtype == accumulate
        # A masked key's 0 log 0 and sums of distances are exact, whichever way they are taken.
        assert_close_to_oracle(answer, formula(exact), formula(plain), accumulate)


def test_top_keys() -> None:
    built = build(Case("sink_window", "alibi", (6, 2), lengths=(29, 37)))
    problem = built.problem
    exact = Dense(built, Case(lengths=(29, 37)), torch.float64).weights
    (top,) = mh.measure(problem.query, problem.key, [mh.TopKeys(9)], **built.arguments)
    weights, keys = exact.topk(9)
    keys = keys.masked_fill(weights == 0, -1)
    assert (keys == -1).any() and (keys[..., 0] >= 0).all()
    assert torch.equal(top.keys, keys)
    torch.testing.assert_close(top.weights.double(), weights)


def test_equal_keys_are_listed_in_order() -> None:
    query, key = torch.randn(1, 2, 5, 8), torch.ones(1, 2, 7, 8)
    (top,) = mh.measure(query, key, [mh.TopKeys(9)], mask=mh.Causal(), query_start=2)
    for row in range(5):
        seen = row + 3
        assert top.keys[0, 1, row].tolist() == [*range(seen), *[-1] * (9 - seen)]
        torch.testing.assert_close(top.weights[0, 1, row, :seen], torch.full((seen,), 1 / seen))
        assert not top.weights[0, 1, row, seen:].any()


def test_views_are_the_weights_themselves() -> None:
    built = build(Case("causal", "none", (3, 3), lengths=(23, 29), sinks=True))
    problem = built.problem
    exact = Dense(built, Case(lengths=(23, 29)), torch.float64).weights.float()
    zoom = mh.HeatMap(64, 64, queries=(5, 12), keys=(3, 22))
    coarse = mh.HeatMap(2, 3, queries=(5, 12), keys=(3, 22))
    rows = mh.WeightRows((20, 4))
    seen = mh.measure(problem.query, problem.key, [zoom, coarse, rows], **built.arguments)
    torch.testing.assert_close(seen[0], exact[:, :, 5:12, 3:22])
    torch.testing.assert_close(
        seen[1],
        heat_map(2, 3, slice(5, 12), slice(3, 22))(
            Dense(built, Case(lengths=(23, 29)), torch.float64)
        ).float(),
    )
    torch.testing.assert_close(seen[2], exact[:, :, [4, 20]])


def test_documents_are_placed_by_themselves() -> None:
    lengths, size = [5, 1, 11], 8
    query, key = torch.randn(1, 2, 17, size), torch.randn(1, 2, 17, size)
    mask = mh.Causal() & mh.Documents(lengths)
    questions = [mh.Entropy(), mh.OffsetMass(-1), mh.MeanDistance()]
    together = mh.measure(query, key, questions, mask=mask)
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        alone = mh.measure(query[:, :, rows], key[:, :, rows], questions, mask=mh.Causal())
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[:, :, rows], other)
        begin += length


def test_large_logits_do_not_cancel() -> None:
    """Logits of 1e4 that differ by log 2: entropy of (2/3, 1/3), which lse - E[S] would lose."""
    query = torch.ones(1, 1, 1, 1)
    key = torch.tensor([0.0, -math.log(2)]).view(1, 1, 2, 1)
    bias = torch.full((1, 1, 1, 2), 1e4)
    (found,) = mh.measure(query, key, [mh.Entropy()], attn_bias=bias, scale=1.0)
    # 1e4 itself leaves log 2 an error of 5e-4 in float32.
    expected = math.log(3) - 2 / 3 * math.log(2)
    assert abs(found.item() - expected) < 3e-4
    (exact,) = mh.measure(query, key, [mh.Entropy()], scale=1.0)
    assert abs(exact.item() - expected) < 1e-6


@pytest.mark.parametrize("mask", ["none", "causal", "dense"])
def test_gradients_of_lse_and_entropy(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1)
    built = build(
        Case(mask, "none", (2, 1), (3, 3), (3, 5), batch=1, sinks=True, dtype=torch.float64)
    )
    arguments = {**built.arguments, "sinks": None}
    leaves = [built.problem.query, built.problem.key, built.arguments["sinks"].double()]
    leaves.append(torch.tensor([0.3, 0.7], dtype=torch.float64))
    leaves = [x.detach().clone().requires_grad_() for x in leaves]

    def measured(query: Tensor, key: Tensor, sinks: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        given = {**arguments, "sinks": sinks, "attn_bias": bias[:, None, None] * query.mean()}
        lse, entropy = mh.measure(query, key, [mh.LogSumExp(), mh.Entropy()], **given)
        return lse.masked_fill(lse == -math.inf, 0.0), entropy

    assert torch.autograd.gradcheck(measured, leaves)


class Sizes(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().size() // 4)
        return out


def test_no_more_than_a_block_is_ever_there(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, length, rows = 2, 331, 7
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 4 * heads * length * rows)
    x = torch.randn(1, heads, length, 4, requires_grad=True)
    questions = [mh.Entropy(), mh.Received(), mh.HeatMap(16, 16), mh.MeanDistance()]
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with Sizes() as sizes, saved_tensors_hooks(keep, lambda tensor: tensor):
        answers = mh.measure(x, x, questions, mask=mh.Causal())
        sum(answer.square().sum() for answer in answers).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert 0 < sizes.largest <= 2 * heads * length * rows  # int64 distances count twice
    assert 0 < sum(kept) < heads * length * length / 4


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a word": (lambda: mh.measure(X, X, ["entropy"]), mh.ArgumentTypeError, "such as Entropy()"),
    "k": (lambda: mh.TopKeys(0), mh.ArgumentError, "k is 0; expected at least 1"),
    "last": (lambda: mh.Received(last=-1), mh.ArgumentError, "last is -1"),
    "n": (lambda: mh.FirstKeysMass("4"), mh.ArgumentTypeError, "n is '4'"),
    "offset": (lambda: mh.OffsetMass(0.5), mh.ArgumentTypeError, "offset is 0.5; expected an int"),
    "columns": (lambda: mh.HeatMap(4, 0), mh.ArgumentError, "columns is 0"),
    "view": (
        lambda: mh.measure(X, X, [mh.HeatMap(queries=(3, 6))]), mh.ArgumentError,
        "queries that are not there: got (3, 6)",
    ),
    "row": (
        lambda: mh.measure(X, X, [mh.WeightRows((5,))]), mh.ArgumentError,
        "a query row that is not there: got 5; expected 0 <= row < 5",
    ),
    "key": (lambda: mh.measure(X, X[:, :, :, :3], []), mh.ShapeError, "head"),
}  # fmt: skip
X = torch.zeros(1, 2, 5, 8)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    run, error, words = BAD[name]
    with pytest.raises(error, match=re.escape(words)):
        run()
