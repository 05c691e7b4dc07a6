"""Dropout in the kernels: what is dropped, that it is random, and that gradients know of it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import Problem
from tolerance import assert_close_to_oracle, assert_derived_close, logit_gradient_floor
from torch import Tensor

import manyheads as mh
from manyheads import definition, dropout
from manyheads.backends import native
from manyheads.spec import AttentionCall, BandPlan, BiasPlan, FullPlan, Geometry, QueryPositions

OPERATOR = torch.ops.manyheads.attention_forward.default
SIZES = (2, 6, 3, 67, 301)  # B, Hq, Hkv, Lq, Lk


def make_call(p: float = 0.3, **more: Any) -> AttentionCall:
    batch, q_heads, kv_heads, q_len, k_len = SIZES
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query = random(batch, q_heads, q_len, 17)
    fields = {
        "plan": FullPlan(),
        "bias": BiasPlan(dense=random(1, q_heads, 1, k_len)),
        "sinks": random(q_heads),
        "softcap": None,
        **more,
    }
    return AttentionCall(
        query=query,
        key=random(batch, kv_heads, k_len, 17),
        value=random(batch, kv_heads, k_len, 5),
        geometry=Geometry(batch, q_heads, q_len, k_len, query.device),
        positions=QueryPositions(k_len - q_len),
        scale=0.3,
        dropout_p=p,
        needs_lse=True,
        **fields,
    )


def drawn(call: AttentionCall, seed: int) -> Tensor:
    """The factors that a native call after torch.manual_seed(seed) uses."""
    torch.manual_seed(seed)
    batch, heads, q_len, _ = call.query.shape
    shape = (batch, heads, q_len, call.key.shape[2])
    return dropout.factors(dropout.draw_seed(), call.dropout_p, shape)


LEAVES = ("query", "key", "value", "sinks")


def derive(call: AttentionCall, dtype: torch.dtype, run: Any, seed: int) -> list[Tensor]:
    """out, lse, and the gradients of query, key, value, sinks and the bias."""
    leaves = {name: getattr(call, name).detach().to(dtype).requires_grad_() for name in LEAVES}
    dense = call.bias.dense.detach().to(dtype).requires_grad_()
    torch.manual_seed(seed)
    out, lse = run(replace(call, **leaves, bias=replace(call.bias, dense=dense)))
    loss = (out * torch.arange(out.numel(), dtype=dtype).reshape(out.shape).sin()).sum()
    return [out, lse, *torch.autograd.grad(loss + lse.sin().sum(), [*leaves.values(), dense])]


CALLS = {
    "full": {},
    "causal": {"plan": BandPlan(right=0)},
    "window and softcap": {"plan": BandPlan(left=50, right=3), "softcap": 2.0},
}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("name", CALLS)
def test_output_and_gradients_are_those_of_the_definition(name: str, p: float) -> None:
    call = make_call(p, **CALLS[name])
    factors = drawn(call, 11)
    ours = derive(call, torch.float32, native.run, 11)
    given = replace(call, dropout_factors=factors)
    exact = derive(replace(given, dropout_factors=factors.double()), torch.float64,
                   definition.attend, 11)  # fmt: skip
    plain = derive(given, torch.float32, definition.attend, 11)
    scaled = Problem(call.query, call.key, call.value * factors.max())
    logit = logit_gradient_floor(scaled, torch.ones(1))
    width = call.scale * call.query.shape[-1] ** 0.5
    by_query = logit * width * float(call.key.abs().max())
    by_key = logit * width * float(call.query.abs().max())
    floors = (0.0, 0.0, by_query, by_key, 0.0, logit, logit)
    for one, other, eager, floor in zip(ours, exact, plain, floors, strict=True):
        one, other, eager = (x.detach() for x in (one, other, eager))
        if one.dim() == 1:
            one, other, eager = (x[None, :, None] for x in (one, other, eager))
        assert_close_to_oracle(one, other, eager, torch.float32, floor)


@pytest.mark.parametrize("isa", [i for i in mh.info().available_isas if i != mh.info().isa])
def test_under_another_isa(isa: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(
        [*command, "-k", "definition or threads"],
        env={**os.environ, "MANYHEADS_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]


def test_philox_against_the_authors_known_answers() -> None:
    """kat_vectors of Random123, philox4x32 with 7 rounds."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    for word, expected in (
        (zero, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (ones, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ):
        words = dropout._philox([word] * 4, [word] * 2)
        assert tuple(int(w) for w in words) == expected


# Statistics, of one drawing of 2,880,000 weights. Five standard deviations.


def kept(p: float, seed: int = 3) -> Tensor:
    return (dropout.factors(torch.tensor([seed]), p, (3, 4, 400, 600)) > 0).double()


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_mean_and_variance(p: float) -> None:
    """The share kept, and how it scatters over rows, columns and heads: as independent draws do."""
    draws = kept(p)
    spread = math.sqrt(p * (1 - p))
    assert abs(draws.mean() - (1 - p)) < 5 * spread / math.sqrt(draws.numel())
    for axes in ((3,), (2,), (0, 1), (2, 3)):
        means = draws.mean(axes)
        n = draws.numel() / means.numel()
        chi = ((means - (1 - p)) ** 2).sum() * n / spread**2
        assert abs(chi - means.numel()) < 6 * math.sqrt(2 * means.numel()) + 6 / (n * p * (1 - p))


@pytest.mark.parametrize("axis", range(4), ids=["batch", "head", "row", "key"])
@pytest.mark.parametrize("lag", [1, 2, 7, 8, 16])
def test_neighbours_are_independent(axis: int, lag: int) -> None:
    draws = kept(0.3) - 0.7
    lag = min(lag, draws.shape[axis] - 1)
    length = draws.shape[axis] - lag
    product = draws.narrow(axis, 0, length) * draws.narrow(axis, lag, length)
    assert abs(product.mean()) < 5 * 0.21 / math.sqrt(product.numel())


def test_seeds_are_independent() -> None:
    product = (kept(0.3, 3) - 0.7) * (kept(0.3, 4) - 0.7)
    assert abs(product.mean()) < 5 * 0.21 / math.sqrt(product.numel())


@pytest.mark.parametrize("p", [1 / 65536, 3 / 65536])
def test_p_is_exact_to_one_in_65536(p: float) -> None:
    shape = (1, 4, 2000, 2000)
    factors = dropout.factors(torch.tensor([5]), p, shape)
    dropped = float((factors == 0).sum())
    expected = factors.numel() * p
    assert abs(dropped - expected) < 5 * math.sqrt(expected)
    assert factors.max() == torch.tensor(1 / (1 - p), dtype=torch.float32)


# What governs it.


def test_manual_seed_governs_it() -> None:
    call = make_call()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append((native.run(call)[0], native.run(call)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[0][1])
    assert not torch.equal(results[0][0], results[2][0])


def test_threads_and_chunks_change_nothing(threads) -> None:
    call = make_call(plan=BandPlan(right=0))
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(derive(call, torch.float32, native.run, 1))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    torch.manual_seed(1)
    few = native.run(replace(call, query=call.query[:, :, :40]))[0]  # starts at the same position
    assert torch.equal(few, found[0][0][:, :, :40])


def test_lse_and_masked_rows_are_left_alone() -> None:
    call = make_call(0.5, plan=BandPlan(key_end=torch.tensor([0, 301], dtype=torch.int32)))
    out, lse = native.run(call)
    _, whole = native.run(replace(call, dropout_p=0.0))
    assert lse is not None and whole is not None
    assert torch.equal(lse, whole)
    assert out[0].eq(0).all() and out[1].abs().max() > 0


def test_a_dropped_row_of_nothing_is_finite() -> None:
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    for _ in range(20):
        out = mh.attention(x, x, x, dropout_p=0.9, backend="native")
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert out.isfinite().all() and gradient.isfinite().all()


def test_second_derivatives_see_the_same_weights() -> None:
    call = make_call(0.4)
    factors = drawn(call, 5)
    seconds = []
    for run, this in ((native.run, call),
                      (definition.attend, replace(call, dropout_factors=factors))):  # fmt: skip
        query = call.query.clone().requires_grad_()
        torch.manual_seed(5)
        out, _ = run(replace(this, query=query))
        (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), query)[0])
    assert_derived_close(*seconds)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(randomness: str) -> None:
    query = torch.randn(3, 1, 2, 19, 8)
    key = torch.randn(1, 2, 23, 8)

    def run(x: Tensor) -> Tensor:
        return mh.attention(x, key, key, dropout_p=0.5)

    mapped = torch.func.vmap(run, randomness=randomness)(query[:1].expand_as(query))
    assert torch.equal(mapped[0], mapped[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(run)(query)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole() -> None:
    torch.compiler.reset()
    query = torch.randn(1, 2, 19, 8, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        return mh.attention(x, x, x, dropout_p=0.5, backend="native")

    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out = run(query)
        results.append((out, torch.autograd.grad(out.square().sum(), query)[0]))
    for first, same, other in zip(*results, strict=True):
        assert torch.equal(first, same) and not torch.equal(first, other)


def test_opcheck() -> None:
    query = torch.randn(2, 2, 19, 8)
    band = [0, 1 << 29, 1 << 29, 0, 0, 19, 1, 0]
    arguments = (query, query, query, 0.3, 0.0, None, band, *[None] * 6, 0, None)
    torch.library.opcheck(OPERATOR, (*arguments, torch.tensor([7]), 0.5, True, True))
    for bad, words in ((torch.tensor([7.0]), "dropout_seed"), (torch.tensor([1, 2]), "int64")):
        with pytest.raises(RuntimeError, match=words):
            OPERATOR(*arguments, bad, 0.5, False, False)
    with pytest.raises(RuntimeError, match="dropout_p"):
        OPERATOR(*arguments, torch.tensor([7]), 1.0, False, False)
