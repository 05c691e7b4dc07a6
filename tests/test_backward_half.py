"""The native backward pass in bfloat16: every feature against the oracle, and the promised bits.

Where the machine has instructions for them, its products are of pairs of bfloat16.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from oracle import Problem
from test_backward import (
    FEATURES,
    HQ,
    LEAVES,
    LK,
    PLANS,
    WIDTHS,
    B,
    backs,
    by_oracle,
    gradients,
    leaves_of,
    make_call,
    random,
    with_leaves,
)
from test_dropout import drawn
from tolerance import assert_close_to_oracle, logit_gradient_floor
from torch import Tensor

import manyheads as mh
from manyheads import definition
from manyheads.backends import native
from manyheads.spec import AttentionCall, BandPlan, BiasPlan, DensePlan, FullPlan, MaskPlan

DTYPE = torch.bfloat16
Back = tuple[Tensor, Tensor]


def narrow(call: AttentionCall) -> AttentionCall:
    return replace(call, **{name: getattr(call, name).to(DTYPE) for name in LEAVES[:3]})


def backs_of(call: AttentionCall) -> Back:
    """What flows into out, in bfloat16, and into lse, in float32."""
    grad_out, grad_lse = backs(call)
    return grad_out.to(DTYPE), grad_lse


def found_by_native(call: AttentionCall, back: Back) -> dict[str, Tensor]:
    """The gradient of every leaf, each in its own dtype."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves_of(call).items()}
    out, lse = native.run(with_leaves(call, leaves))
    flowing: list[tuple[Tensor, Tensor]] = [(out, back[0])]
    if call.needs_lse:
        assert lse is not None
        flowing.append((lse, back[1].masked_fill(lse == -math.inf, 0.0)))
    ends, grads = zip(*flowing, strict=True)
    return dict(zip(leaves, torch.autograd.grad(ends, [*leaves.values()], grads), strict=True))


def check(
    wide: AttentionCall,
    run: Callable[[AttentionCall, torch.dtype], tuple[Tensor, Tensor]] = by_oracle,
    largest_weight: float = 1.0,
) -> None:
    """Every gradient of the call in bfloat16 under the numerics rule for it."""
    call = narrow(wide)
    back = backs_of(call)
    actual = found_by_native(call, back)
    exact = gradients(call, lambda c: run(c, torch.float64), back, torch.float64)
    plain = gradients(call, lambda c: run(c, DTYPE), back, DTYPE)
    problem = Problem(call.query, call.key, call.value * largest_weight)
    logit = logit_gradient_floor(problem, back[0], DTYPE)
    width = abs(call.scale) * call.query.shape[-1] ** 0.5
    floors = {
        "query": logit * width * float(call.key.abs().max()),
        "key": logit * width * float(call.query.abs().max()),
        "value": 0.0,
    }
    for name, ours in actual.items():
        assert ours.isfinite().all() and ours.dtype == leaves_of(call)[name].dtype
        per_head = name in LEAVES[3:6]
        three = [x[None] if per_head else x for x in (ours, exact[name], plain[name])]
        if name in ("sinks", "slopes"):
            three = [x[..., None] for x in three]
        assert_close_to_oracle(*three, DTYPE, floors.get(name, logit))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("plan", PLANS)
def test_every_gradient(plan: str, feature: str) -> None:
    check(make_call(PLANS[plan], **FEATURES[feature]))


@pytest.mark.parametrize("heads", [(5, 1), (4, 2)], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [(1, 1), (1, 41), (2, 131), (16, 16), (49, 127), (97, 129), (7, 513), (600, 5)],
    ids=str,
)
@pytest.mark.parametrize("plan", [FullPlan(), BandPlan(right=0)], ids=["full", "causal"])
def test_sizes(heads: tuple[int, int], lengths: tuple[int, int], plan: MaskPlan) -> None:
    check(make_call(plan, sizes=(2, *heads, *lengths, 16, 16)))


@pytest.mark.parametrize("widths", [(1, 1), *WIDTHS], ids=str)
def test_head_sizes(widths: tuple[int, int]) -> None:
    check(make_call(BandPlan(right=0), sizes=(1, 2, 1, 131, 139, *widths)))


@pytest.mark.parametrize("plan", [BandPlan(right=0), BandPlan(left=300, right=0)], ids=str)
def test_several_superblocks_and_spans_of_queries(plan: MaskPlan) -> None:
    check(make_call(plan, sizes=(1, 2, 1, 1601, 1601, 5, 3)))


@pytest.mark.parametrize("keys", [1, 131])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_large_logits(size: float, keys: int) -> None:
    """One key has a weight of 1 only if its score is the forward pass's to the bit."""
    call = make_call(sizes=(2, 2, 1, 131, keys, 64, 16))
    check(replace(call, query=call.query * size))


@pytest.mark.parametrize("unit", [2.0**5, 2.0**12])
def test_one_key_with_all_the_weight_leaves_exact_zeros(unit: float) -> None:
    """P is 1, and delta the same sum of the same products as dP."""
    call = narrow(make_call(sizes=(1, 2, 1, 67, 1, 64, 160), needs_lse=False))
    found = found_by_native(call, backs_of(call))
    assert found["query"].eq(0).all() and found["key"].eq(0).all()
    query, key = torch.full((1, 1, 67, 4), 16.0), torch.zeros(1, 1, 200, 4)
    key[:, :, 170] = unit
    call = make_call(sizes=(1, 1, 1, 67, 200, 4, 64), needs_lse=False)
    call = narrow(replace(call, query=query, key=key))
    found = found_by_native(call, backs_of(call))
    assert found["query"].eq(0).all() and found["key"].eq(0).all()


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["key", "value"])
def test_a_broken_key_spoils_only_rows_that_see_it(what: str, number: float) -> None:
    """Causal: dQ of the rows before it, and all of other heads, are those without it."""
    clean = narrow(make_call(BandPlan(right=0), sizes=(1, 4, 2, 211, 211, 16, 16)))
    broken = getattr(clean, what).clone()
    broken[0, 1, 60, 3] = number
    expected = found_by_native(clean, backs_of(clean))
    found = found_by_native(replace(clean, **{what: broken}), backs_of(clean))
    assert torch.equal(found["query"][:, :, :60], expected["query"][:, :, :60])
    for name in ("query", "key", "value"):
        untouched = slice(0, 2) if name == "query" else slice(0, 1)
        assert torch.equal(found[name][:, untouched], expected[name][:, untouched])
    assert found["query"][:, 2:, 60:].isnan().any()


def test_rows_that_attend_to_nothing_have_no_part_whatever_they_hold() -> None:
    assert isinstance(PLANS["dense"], DensePlan)
    allowed = PLANS["dense"].allowed.clone()
    allowed[:, :, 7] = False
    call = narrow(make_call(DensePlan(allowed, "random"), sinks=random(HQ)))
    back = backs_of(call)
    expected = found_by_native(call, back)
    query, grad_out = call.query.clone(), back[0].clone()
    query[:, :, 7] = math.nan
    grad_out[:, :, 7] = math.inf
    found = found_by_native(replace(call, query=query), (grad_out, back[1]))
    for name in ("query", "key", "value", "sinks"):
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("wanted", LEAVES)
def test_one_gradient_alone_has_the_same_bits(wanted: str) -> None:
    call = narrow(make_call(BandPlan(right=0), **FEATURES["every bias"]))
    expected = found_by_native(call, backs_of(call))[wanted]
    leaf = leaves_of(call)[wanted].detach().requires_grad_()
    ends = native.run(with_leaves(call, {wanted: leaf}))
    assert torch.equal(torch.autograd.grad(ends, leaf, backs_of(call))[0], expected)


@pytest.mark.parametrize("feature", ["plain", "every bias"])
@pytest.mark.parametrize(
    "plan", [BandPlan(right=0), BandPlan(left=99, right=0), FullPlan()], ids=["causal", "w", "full"]
)
def test_thread_counts_do_not_change_a_bit(plan: MaskPlan, feature: str, threads) -> None:
    """Six heads: on 2 threads whole heads run side by side, on 4 and 5 parts of heads do."""
    every = BiasPlan(random(HQ).abs(), random(HQ, 9), 4, random(1, 1, 1, 1300))
    bias = {"bias": every, "sinks": random(HQ)} if feature == "every bias" else {}
    call = narrow(make_call(plan, sizes=(2, HQ, 3, 1300, 1300, 24, 8), **bias))
    found = []
    for count in (1, 2, 4, 5):
        threads(count)
        found.append(found_by_native(call, backs_of(call)))
    for other in found[1:]:
        for name, gradient in other.items():
            assert torch.equal(gradient, found[0][name]), name


@pytest.mark.parametrize("plan", ["full", "causal", "window"])
def test_a_batch_changes_no_bit(plan: str) -> None:
    whole = narrow(make_call(PLANS[plan], sizes=(B, HQ, 3, 131, LK, 17, 5)))
    together = found_by_native(whole, backs_of(whole))
    for b in range(B):
        parts = {name: x[b : b + 1] for name, x in leaves_of(whole).items()}
        alone = replace(with_leaves(whole, parts), geometry=replace(whole.geometry, batch=1))
        grad_out, grad_lse = (x[b : b + 1] for x in backs_of(whole))
        for name, gradient in found_by_native(alone, (grad_out, grad_lse)).items():
            assert torch.equal(gradient, together[name][b : b + 1])


@pytest.mark.parametrize("feature", ["plain", "softcap, sinks and alibi", "dense bias"])
@pytest.mark.parametrize("plan", ["causal", "window", "dense"])
def test_dropout(plan: str, feature: str) -> None:
    call = replace(make_call(PLANS[plan], **FEATURES[feature]), dropout_p=0.3)
    factors = drawn(call, 11)

    def by_definition(call: AttentionCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return definition.attend(replace(call, dropout_factors=factors.to(dtype)))

    torch.manual_seed(11)
    check(call, by_definition, float(factors.max()))


@pytest.mark.parametrize("isa", [i for i in mh.info().available_isas if i != mh.info().isa])
def test_under_another_isa(isa: str) -> None:
    """This file once more, in a process that is forced to use `isa`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(
        [*command, "-k", "not another"],
        env={**os.environ, "MANYHEADS_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
