"""Each measure against its formula on the dense matrix of weights, in float64."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import Case, build
from formulas import FORMULAS, Dense, heat_map
from tolerance import assert_close_to_oracle
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import manyheads as mh
from manyheads.inspect import blocks, functional

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


def use_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have PyTorch measure what our kernels would."""
    monkeypatch.setattr(functional.kernels, "answered_here", lambda call, asked: ())


@pytest.fixture(params=["kernels", "blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who measures."""
    if request.param == "blocks":
        use_blocks(monkeypatch)
    return request.param


@pytest.mark.parametrize("block_bytes", [5000, 1 << 23, None], ids=["rows", "whole", "kernels"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_formulas(case: Case, block_bytes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_of_blocks: set[mh.Measure] = set()
    measure_blocks = functional._measure_blocks

    def record(call: object, asked: tuple[mh.Measure, ...]) -> object:
        asked_of_blocks.update(asked)
        return measure_blocks(call, asked)

    monkeypatch.setattr(functional, "_measure_blocks", record)
    if block_bytes is not None:
        monkeypatch.setattr(blocks, "_BLOCK_BYTES", block_bytes)
        use_blocks(monkeypatch)
    built = build(case)
    accumulate = torch.float64 if case.dtype == torch.float64 else torch.float32
    exact, plain = Dense(built, case, torch.float64), Dense(built, case, accumulate)
    answers = mh.measure(built.problem.query, built.problem.key, FORMULAS, **built.arguments)
    kernels_can = block_bytes is None and case.dtype != torch.float64
    assert asked_of_blocks == ({mh.HeadSimilarity()} if kernels_can else set(FORMULAS))
    for formula, answer in zip(FORMULAS.values(), answers, strict=True):
        assert answer.dtype == accumulate
        # A masked key's 0 log 0 and sums of distances are exact, whichever way they are taken.
        assert_close_to_oracle(answer, formula(exact), formula(plain), accumulate)


@pytest.mark.usefixtures("way")
def test_top_keys() -> None:
    built = build(Case("sink_window", "alibi", (6, 2), lengths=(29, 37)))
    problem = built.problem
    exact = Dense(built, Case(lengths=(29, 37)), torch.float64).weights
    asked = [mh.TopKeys(9), mh.TopKeys(99), mh.TopKeys(2)]
    top, more, fewer = mh.measure(problem.query, problem.key, asked, **built.arguments)
    for one, other in zip(fewer, top, strict=True):
        assert torch.equal(one, other[..., :2])
    for one, other in zip(top, more, strict=True):
        assert torch.equal(one, other[..., :9])
    assert more.keys.shape[-1] == 99 and (more.keys[..., 37:] == -1).all()
    weights, keys = exact.topk(9)
    keys = keys.masked_fill(weights == 0, -1)
    assert (keys == -1).any() and (keys[..., 0] >= 0).all()
    assert torch.equal(top.keys, keys)
    torch.testing.assert_close(top.weights.double(), weights)


@pytest.mark.usefixtures("way")
def test_equal_keys_are_listed_in_order() -> None:
    query, key = torch.randn(1, 2, 5, 8), torch.ones(1, 2, 7, 8)
    (top,) = mh.measure(query, key, [mh.TopKeys(9)], mask=mh.Causal(), query_start=2)
    for row in range(5):
        seen = row + 3
        assert top.keys[0, 1, row].tolist() == [*range(seen), *[-1] * (9 - seen)]
        torch.testing.assert_close(top.weights[0, 1, row, :seen], torch.full((seen,), 1 / seen))
        assert not top.weights[0, 1, row, seen:].any()


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
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


# PyTorch's forward mode loads its rules with torch.jit.script, which is deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("block_bytes", [0, 1 << 23], ids=["rows", "whole"])
def test_transforms(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.func's, forward mode without them, and a graph that is left."""
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", block_bytes)
    query, key, tangent = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 7, 8), torch.randn(1, 2, 5, 8)

    def lse(query: Tensor) -> Tensor:
        return mh.measure(query, key, [mh.LogSumExp()], mask=mh.Causal())[0]

    def formula(query: Tensor) -> Tensor:
        hidden = torch.ones(5, 7).triu(3).bool()
        return (query @ key.mT / math.sqrt(8)).masked_fill(hidden, -math.inf).logsumexp(-1)

    gradient = torch.func.grad(lambda query: formula(query).sum())(query)
    torch.testing.assert_close(torch.func.grad(lambda query: lse(query).sum())(query), gradient)
    _, expected = torch.func.jvp(formula, (query,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(lse, (query,), (tangent,))[1], expected)
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        dual = forward.unpack_dual(lse(forward.make_dual(query, tangent)))
        torch.testing.assert_close(dual.tangent, expected)
    batched = torch.vmap(lse)(torch.stack([query, tangent]))
    torch.testing.assert_close(batched, torch.stack([formula(query), formula(tangent)]))


@torch.no_grad()
def test_a_graph_is_left() -> None:
    torch._dynamo.reset()
    x, asked = torch.randn(1, 2, 5, 8), (mh.Entropy(), mh.Received(), mh.HeatMap(2, 2))

    def doubled(x: Tensor) -> list[Tensor]:
        return [answer * 2 for answer in mh.measure(x * 3, x, asked)]

    compiled = torch.compile(doubled, backend="eager")(x)
    for one, other in zip(compiled, doubled(x), strict=True):
        assert torch.equal(one, other)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="leave fullgraph=True out"):
        torch.compile(doubled, backend="eager", fullgraph=True)(x)


def test_lists_and_arrays_are_tuples() -> None:
    rows = mh.WeightRows(np.array([4, 0]))
    assert rows == mh.WeightRows([4, 0]) == mh.WeightRows((4, 0)) and hash(rows)
    view = mh.HeatMap(queries=[0, np.int64(3)], keys=torch.tensor([1, 2]))
    assert view == mh.HeatMap(queries=(0, 3), keys=(1, 2)) and type(view.queries[1]) is int
    assert [one.shape for one in mh.measure(X, X, [rows, view])] == [(1, 2, 2, 5), (1, 2, 3, 1)]


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
    "one measure": (
        lambda: mh.measure(X, X, mh.Entropy()), mh.ArgumentTypeError,
        "measures is Entropy(); expected a list, such as [Entropy()",
    ),
    "a view of one": (
        lambda: mh.HeatMap(keys=3), mh.ArgumentTypeError,
        "HeatMap's keys is 3; expected (begin, end)",
    ),
    "a view of three": (lambda: mh.HeatMap(queries=(0, 1, 2)), mh.ArgumentTypeError, "(0, 1, 2)"),
    "a view in words": (lambda: mh.HeatMap(queries="03"), mh.ArgumentTypeError, "'03'; expected"),
    "half a view": (
        lambda: mh.HeatMap(queries=(0, 2.5)), mh.ArgumentTypeError,
        "begin or end of HeatMap's queries must be a whole number; got 2.5",
    ),
    "one row": (
        lambda: mh.WeightRows(3), mh.ArgumentTypeError, "rows is 3; expected numbers of query rows",
    ),
    "a negative row": (lambda: mh.WeightRows((-1,)), mh.ArgumentError, "not be negative; got -1"),
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
