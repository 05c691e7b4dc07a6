"""`contributions` and `rollout` against their definitions."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from test_measures import Sizes
from test_module import KINDS, B, E, L, M, randomised
from tolerance import assert_close_to_oracle
from torch import Tensor, nn

import manyheads as mh
from manyheads import MultiHeadAttention


def by_trace(module: MultiHeadAttention, *inputs: Tensor, dtype, **call) -> Tensor:
    """The lengths of the contributions themselves, in `dtype`."""
    wide = [x.to(dtype) for x in inputs]
    with torch.no_grad():
        return mh.trace(module.to(dtype), *wide, **call)["contributions"].norm(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "narrow output"])
def test_equals_the_lengths(kind, dtype):
    options = KINDS.get(kind, {"num_heads": 4, "out_dim": 3})
    module = randomised(MultiHeadAttention(E, **options)).to(dtype)
    x, memory = torch.randn(B, L, E).to(dtype), torch.randn(B, M, E).to(dtype)
    for inputs, call in (((x,), {"mask": mh.Causal()}), ((x, memory), {})):
        found = mh.contributions(module, *inputs, **call)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert found.dtype == wide and not found.requires_grad
        eager = by_trace(module, *inputs, dtype=dtype, **call)
        oracle = by_trace(module, *inputs, dtype=torch.float64, **call)
        module.to(dtype)
        assert_close_to_oracle(found, oracle, eager.to(wide), dtype)


def test_a_cache_is_left_as_it_was():
    module = randomised(MultiHeadAttention(E, 6, mask=mh.Causal(), attn_bias=mh.Alibi())).eval()
    x, cache = torch.randn(B, L, E), mh.KVCache()
    with torch.no_grad():
        module(x[:, :5], cache=cache)
    found = mh.contributions(module, x[:, 5:], cache=cache)
    assert cache.length == 5
    torch.testing.assert_close(found, mh.contributions(module, x)[:, :, 5:])
    torch.testing.assert_close(mh.contributions(module, x[0]), mh.contributions(module, x)[:1])


def test_memory_does_not_grow_with_pairs():
    length, module = 1009, MultiHeadAttention(64, 16, out_dim=512, mask=mh.Causal())
    with Sizes() as sizes:
        mh.contributions(module, torch.randn(1, length, 64))
    assert 0 < sizes.largest <= length * 64


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "module": (
        lambda: mh.contributions(nn.Linear(2, 2), X), mh.ArgumentTypeError,
        "contributions got a Linear",
    ),
    "nested": (
        lambda: mh.contributions(MultiHeadAttention(8, 2), NESTED), mh.ArgumentTypeError,
        "expected plain ones",
    ),
    "no maps": (lambda: mh.rollout([]), mh.ArgumentError, "rollout got no maps"),
    "a word": (lambda: mh.rollout(["map"]), mh.ArgumentTypeError, "got a str as map 0"),
    "steps": (
        lambda: mh.rollout(observed(mh.HeatMap(), runs=2)), mh.ArgumentError,
        "layer '0' ran 2 times; expected once",
    ),
    "cross": (
        lambda: mh.rollout(observed(mh.HeatMap(), key=5)), mh.ArgumentError,
        "layer '0' has 24 queries and 5 keys; expected self-attention",
    ),
    "no heat map": (
        lambda: mh.rollout(observed(mh.HeatMap(4, 5), mh.Entropy())), mh.ArgumentError,
        "expected HeatMap(n, n), of all queries and keys",
    ),
    "nothing": (lambda: mh.rollout(mh.Seen()), mh.ArgumentError, "rollout got no maps"),
    "not square": (
        lambda: mh.rollout([torch.zeros(1, 2, 3, 4)]), mh.ShapeError, "shape [1, 2, 3, 4]",
    ),
    "sizes": (
        lambda: mh.rollout([torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 4, 4)]), mh.ShapeError,
        "map 1 has shape [1, 2, 4, 4]; expected [B, Hq, n, n] with one B and n",
    ),
}  # fmt: skip
X = torch.zeros(1, 5, 8)
NESTED = torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)], layout=torch.jagged)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    run, error, words = BAD[name]
    with pytest.raises(error, match=re.escape(words)):
        run()


# --- rollout -----------------------------------------------------------------------------------


def weights_of(layers: int, length: int, **how) -> list[Tensor]:
    """Float64 weights [2, 3, length, length] of some layers."""
    found = []
    for _ in range(layers):
        query, key = torch.randn(2, 2, 3, length, 8, dtype=torch.float64).unbind(0)
        rows = mh.WeightRows(tuple(range(length)))
        found += mh.measure(query, key, [rows], **how)
    return found


def by_definition(weights: list[Tensor]) -> Tensor:
    """The paper's, token by token: 0.5 W + 0.5 I, rows divided by their sums, then multiplied."""
    length = weights[0].shape[-1]
    joint = []
    for layer in weights:
        mean = sum(layer.unbind(1)) / layer.shape[1]
        residual = 0.5 * mean + 0.5 * torch.eye(length)
        own = residual / residual.sum(-1, keepdim=True)
        joint.append(own if not joint else torch.einsum("bij,bjk->bik", own, joint[-1]))
    return torch.stack(joint)


@pytest.mark.parametrize("mask", [mh.Causal(), None, mh.KeyRange(3, 9)], ids=repr)
def test_rollout_at_full_resolution_is_the_papers(mask):
    length = 11
    weights = weights_of(5, length, mask=mask)
    found = mh.rollout(weights)
    torch.testing.assert_close(found, by_definition(weights))
    torch.testing.assert_close(found.sum(-1), torch.ones(5, 2, length, dtype=torch.float64))


def observed(*measures: mh.Measure, runs: int = 1, key=None) -> mh.Seen:
    model = nn.Sequential(*(randomised(MultiHeadAttention(E, 3)) for _ in range(4)))
    x = torch.randn(2, 24, E)
    with mh.observe(model, *measures) as seen:
        for _ in range(runs):
            model(x) if key is None else model[0](x, x[:, :key])
    return seen


def test_rollout_of_what_was_seen():
    whole, coarse, view = mh.HeatMap(64, 64), mh.HeatMap(6, 6), mh.HeatMap(4, 4, queries=(0, 9))
    seen = observed(mh.HeatMap(6, 3), view, coarse, whole)
    maps = [seen[layer][0][coarse] for layer in seen.layers]
    assert torch.equal(mh.rollout(seen), mh.rollout(maps))
    fine = [seen[layer][0][whole].double() for layer in seen.layers]
    assert fine[0].shape == (2, 3, 24, 24)
    torch.testing.assert_close(mh.rollout(fine), by_definition(fine))
    torch.testing.assert_close(maps[0].double(), pooled(fine[0], 6))


def test_a_row_of_nothing_keeps_its_own_vector():
    weights = weights_of(2, 5, mask=mh.KeyRange(0, 0))
    assert torch.equal(mh.rollout(weights)[-1, 0], torch.eye(5, dtype=torch.float64))


def pooled(weights: Tensor, cells: int) -> Tensor:
    size = weights.shape[-1] // cells
    columns = weights.unflatten(-1, (cells, size)).sum(-1)
    return columns.unflatten(-2, (cells, size)).mean(-2)


def test_coarse_maps_are_exact_where_tokens_of_a_cell_are_alike():
    """What the approximation says of itself, the residual connection included."""
    coarse = weights_of(4, 3)
    fine = [w.repeat_interleave(5, -1).repeat_interleave(5, -2) / 5 for w in coarse]
    torch.testing.assert_close(mh.rollout(coarse), pooled(by_definition(fine), 3))


def test_coarse_maps_are_near():
    """Random weights: they differ from the exact ones, and much less than those from no mixing."""
    weights = weights_of(4, 24, mask=mh.Causal())
    found, exact = mh.rollout([pooled(w, 6) for w in weights]), pooled(by_definition(weights), 6)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 2, 6, dtype=torch.float64))
    assert torch.equal(found.triu(1), torch.zeros_like(found))
    error = (found - exact)[-1].norm()
    assert 0 < error < (torch.eye(6) - exact[-1]).norm() / 20
