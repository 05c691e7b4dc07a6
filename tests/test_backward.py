"""The native backward pass: every gradient against the oracle's, and what DESIGN.md promises."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from native_calls import arguments_of, call_of, int32, problem_of, random, random_ranges
from oracle import Problem, attend
from tolerance import assert_close_to_oracle, assert_derived_close, logit_gradient_floor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import manyheads as mh
from manyheads.backends import native
from manyheads.spec import (
    AttentionCall,
    BandPlan,
    BiasPlan,
    DensePlan,
    FullPlan,
    IntervalsPlan,
    MaskPlan,
    QueryPositions,
)

OPERATOR = torch.ops.manyheads.attention_backward.default

# Every axis another prime, Hq twice Hkv.
B, HQ, HKV, LQ, LK, D, DV = 2, 6, 3, 29, 37, 17, 5


def make_call(
    plan: MaskPlan | None = None,
    bias: BiasPlan | None = None,
    sizes: tuple[int, ...] = (B, HQ, HKV, LQ, LK, D, DV),
    **more: Any,
) -> AttentionCall:
    batch, q_heads, kv_heads, q_len, k_len, width, value_width = sizes
    return call_of(
        random(batch, q_heads, q_len, width, seed=1),
        random(batch, kv_heads, k_len, width, seed=2),
        random(batch, kv_heads, k_len, value_width, seed=3),
        plan,
        bias=bias,
        **more,
    )


PLANS: dict[str, MaskPlan] = {
    "full": FullPlan(),
    "causal": BandPlan(right=0),
    "window": BandPlan(left=5, right=2),
    "per-batch band": BandPlan(int32(4, 6), 2, int32(1, 3), True, int32(0, 2), int32(37, 19)),
    "prefix": BandPlan(right=0, first_n=13, first_within_right=False),
    "nothing": BandPlan(key_end=0),
    "intervals": IntervalsPlan(random_ranges(B, HQ, LQ, LK)),
    "dense": DensePlan(random(B, 1, LQ, LK, seed=5) > 0.5, "random"),
}

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "alibi": {"bias": BiasPlan(slopes=random(HQ).abs())},
    "relative": {"bias": BiasPlan(distance_values=random(HQ, 9), distance_offset=4)},
    "dense bias": {"bias": BiasPlan(dense=random(B, HQ, LQ, LK))},
    "bias of all batches": {"bias": BiasPlan(dense=random(1, HQ, LQ, LK))},
    "bias of all heads": {"bias": BiasPlan(dense=random(B, 1, LQ, LK))},
    "one bias": {"bias": BiasPlan(dense=random(1, 1, LQ, LK))},
    "bias of one row": {"bias": BiasPlan(dense=random(1, HQ, 1, LK))},
    "bias of one row for all": {"bias": BiasPlan(dense=random(B, 1, 1, LK))},
    "bias of one key": {"bias": BiasPlan(dense=random(B, 1, LQ, 1)), "sinks": random(HQ)},
    "bias of one number": {"bias": BiasPlan(dense=random(1, HQ, 1, 1)), "sinks": random(HQ)},
    "every bias": {
        "bias": BiasPlan(random(HQ).abs(), random(HQ, 9), 4, random(1, HQ, LQ, LK)),
        "sinks": random(HQ),
    },
    "softcap": {"softcap": 1.5},
    "softcap, sinks and alibi": {
        "softcap": 2.5,
        "sinks": random(HQ),
        "bias": BiasPlan(slopes=random(HQ).abs()),
    },
    "scale below 0": {"scale": -0.7, "sinks": random(HQ)},
    "scale of 0": {"scale": 0.0},
    "without lse": {"needs_lse": False},
}

LEAVES = ("query", "key", "value", "sinks", "slopes", "distance_values", "dense")


def leaves_of(call: AttentionCall) -> dict[str, Tensor]:
    """The tensors of a call that have a gradient."""
    bias = call.bias
    every = (call.query, call.key, call.value, call.sinks, *vars_of(bias))
    return {name: leaf for name, leaf in zip(LEAVES, every, strict=True) if leaf is not None}


def vars_of(bias: BiasPlan) -> tuple[Tensor | None, ...]:
    return bias.slopes, bias.distance_values, bias.dense


def with_leaves(call: AttentionCall, leaves: dict[str, Tensor]) -> AttentionCall:
    bias = {name: leaves[name] for name in LEAVES[4:] if name in leaves}
    own = {name: leaves[name] for name in LEAVES[:4] if name in leaves}
    return replace(call, bias=replace(call.bias, **bias), **own)


def by_oracle(call: AttentionCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return attend(problem_of(call), dtype)


def gradients(
    call: AttentionCall,
    run: Callable[[AttentionCall], tuple[Tensor, Tensor | None]],
    back: tuple[Tensor, Tensor],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The gradient of every leaf, if `back` flows into (out, lse); rows of -inf get none in lse."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in leaves_of(call).items()}
    out, lse = run(with_leaves(call, leaves))
    loss = (out * back[0].to(dtype)).sum()
    if call.needs_lse:
        assert lse is not None
        loss = loss + (lse.masked_fill(lse == -math.inf, 0.0) * back[1].to(dtype)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def check(call: AttentionCall) -> None:
    """Every gradient of a call under the numerics rule."""
    back = backs(call)
    exact = gradients(call, lambda c: by_oracle(c, torch.float64), back, torch.float64)
    plain = gradients(call, lambda c: by_oracle(c, torch.float32), back)
    actual = gradients(call, native.run, back)
    problem = Problem(call.query, call.key, call.value)
    logit = logit_gradient_floor(problem, back[0])
    width = abs(call.scale) * call.query.shape[-1] ** 0.5
    floors = {
        "query": logit * width * float(call.key.abs().max()),
        "key": logit * width * float(call.query.abs().max()),
        "value": 0.0,
    }
    assert set(actual) == set(leaves_of(call))
    for name, ours in actual.items():
        assert ours.isfinite().all() and ours.shape == exact[name].shape
        by_head = [x[name][None] if name in LEAVES[3:6] else x[name] for x in (exact, plain)]
        ours = ours[None] if name in LEAVES[3:6] else ours
        if name == "sinks" or name == "slopes":
            ours, by_head = ours[..., None], [x[..., None] for x in by_head]
        assert_close_to_oracle(ours, *by_head, torch.float32, floors.get(name, logit))


def backs(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """What flows into out and lse."""
    shape = call.query.shape[:3]
    return random(*shape, call.value.shape[3], seed=6), random(*shape, seed=7)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("plan", PLANS)
def test_every_gradient(plan: str, feature: str) -> None:
    check(make_call(PLANS[plan], **FEATURES[feature]))


def test_the_grid_is_not_empty() -> None:
    assert len(PLANS) * len(FEATURES) > 130
    assert {type(plan) for plan in PLANS.values()} == {FullPlan, BandPlan, IntervalsPlan, DensePlan}


#: The tests whose outcome is the kernels', by words in their names.
NUMBERS = " or ".join(
    (
        "every",
        "sizes",
        "long",
        "level",
        "strides",
        "bit",
        "share",
        "weight",
        "broken",
        "nothing",
        "large",
    )
)


@pytest.mark.parametrize("isa", [i for i in mh.info().available_isas if i != mh.info().isa])
def test_under_another_isa(isa: str) -> None:
    """This file once more, in a process that is forced to use `isa`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(
        [*command, "-k", f"({NUMBERS}) and not another"],
        env={**os.environ, "MANYHEADS_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]


# Sizes: around the edges of tiles, blocks, superblocks and spans of queries.


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (4, 2), (3, 3)], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [(1, 1), (1, 41), (2, 131), (16, 16), (49, 127), (97, 129), (7, 513), (600, 5)],
    ids=str,
)
@pytest.mark.parametrize("plan", [FullPlan(), BandPlan(right=0)], ids=["full", "causal"])
def test_sizes(heads: tuple[int, int], lengths: tuple[int, int], plan: MaskPlan) -> None:
    check(make_call(plan, sizes=(2, *heads, *lengths, 16, 16)))


WIDTHS = [(1, 3), (3, 1), (15, 33), (48, 80), (64, 64), (96, 112), (197, 3), (128, 128), (256, 256)]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_head_sizes(widths: tuple[int, int]) -> None:
    check(make_call(BandPlan(right=0), sizes=(1, 2, 1, 131, 139, *widths)))


@pytest.mark.parametrize("plan", [BandPlan(right=0), BandPlan(left=300, right=0)], ids=str)
def test_long(plan: MaskPlan) -> None:
    """Several superblocks and spans of queries, of which 3,072 are the longest."""
    bias = BiasPlan(random(2).abs(), random(2, 33), 16, random(1, 2, 1, 1601))
    check(make_call(plan, bias, sizes=(1, 2, 1, 1601, 1601, 5, 3)))
    check(make_call(plan, sizes=(1, 1, 1, 97, 4099, 5, 3)))


def test_more_keys_than_one_level_of_sums() -> None:
    check(make_call(BandPlan(right=0), sizes=(1, 1, 1, 3, 20011, 8, 8)))


def test_positions_by_row() -> None:
    rows = torch.arange(2 * LQ, dtype=torch.int32).view(B, LQ)
    bias = BiasPlan(random(HQ).abs(), random(HQ, 9), 4)
    check(make_call(BandPlan(right=0), bias, positions=QueryPositions(rows=rows)))


@pytest.mark.parametrize("axis", range(4), ids=["B", "H", "Lq", "Lk"])
def test_empty_axes(axis: int) -> None:
    sizes = [B, HQ, HKV, LQ, LK, D, DV]
    for i in {0: [0], 1: [1, 2], 2: [3], 3: [4]}[axis]:
        sizes[i] = 0
    bias = BiasPlan(random(sizes[1]).abs(), random(sizes[1], 9), 4, random(1, 1, 1, 1))
    call = make_call(sizes=tuple(sizes), bias=bias, sinks=random(sizes[1]))
    for name, gradient in gradients(call, native.run, backs(call)).items():
        assert gradient.shape == leaves_of(call)[name].shape
        assert gradient.eq(0).all()


# Layouts.


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns first": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("back", ["expanded", *LAYOUTS])
def test_strides_change_nothing(name: str, back: str) -> None:
    call, strided = make_call(BandPlan(right=0)), LAYOUTS[name]
    moved = replace(
        call, query=strided(call.query), key=strided(call.key), value=strided(call.value)
    )
    grad = torch.ones(()).expand(B, HQ, LQ, DV) if back == "expanded" else backs(call)[0]
    other = grad if back == "expanded" else LAYOUTS[back](grad)
    found = []
    for inputs, flowing in ((call, grad), (moved, other)):
        leaves = {k: x.detach().requires_grad_() for k, x in leaves_of(inputs).items()}
        out, _ = native.run(with_leaves(inputs, leaves))
        found.append(torch.autograd.grad(out, list(leaves.values()), flowing))
    for expected, ours in zip(*found, strict=True):
        assert torch.equal(ours, expected)


def test_gradients_have_the_layout_of_their_inputs() -> None:
    call, rows_first = make_call(), LAYOUTS["rows first"]
    leaves = {name: rows_first(x).requires_grad_() for name, x in leaves_of(call).items()}
    out, _ = native.run(with_leaves(call, leaves))
    for gradient in torch.autograd.grad(out.sum(), list(leaves.values())):
        assert gradient.transpose(1, 2).is_contiguous()


# The same bits.


BIASED = {
    "bias": BiasPlan(random(HQ).abs(), random(HQ, 9), 4, random(1, 1, 1, 1300)),
    "sinks": random(HQ),
    "sizes": (2, HQ, HKV, 1300, 1300, 24, 8),
}


@pytest.mark.parametrize(
    "plan", [BandPlan(right=0), BandPlan(left=99, right=0), FullPlan()], ids=["causal", "w", "full"]
)
def test_thread_counts_do_not_change_a_bit(plan: MaskPlan, threads) -> None:
    """Six heads: on 2 threads whole heads run side by side, on 4 and 5 parts of heads do."""
    call, found = make_call(plan, **BIASED), []
    for count in (1, 2, 4, 5):
        threads(count)
        found.append(gradients(call, native.run, backs(call)))
    for other in found[1:]:
        for name, gradient in other.items():
            assert torch.equal(gradient, found[0][name]), name


@pytest.mark.parametrize("heads", [(1, 1), (2, 1)], ids=str)
def test_threads_that_share_a_dense_bias(heads: tuple[int, int], threads) -> None:
    bias = BiasPlan(dense=random(1, 1, 130, 1300))
    call, found = make_call(bias=bias, sizes=(3, *heads, 130, 1300, 8, 8)), []
    check(call)
    for count in (1, 3):
        threads(count)
        found.append(gradients(call, native.run, backs(call)))
    for name, gradient in found[1].items():
        assert torch.equal(gradient, found[0][name]), name


@pytest.mark.parametrize("plan", ["full", "causal", "window", "dense"])
def test_a_batch_changes_no_bit(plan: str) -> None:
    whole = make_call(PLANS[plan])
    together = gradients(whole, native.run, backs(whole))
    for b in range(B):
        one = slice(b, b + 1)
        parts = {name: x[one] for name, x in leaves_of(whole).items()}
        alone = replace(with_leaves(whole, parts), geometry=replace(whole.geometry, batch=1))
        if isinstance(alone.plan, DensePlan):
            alone = replace(alone, plan=replace(alone.plan, allowed=alone.plan.allowed[one]))
        back = tuple(x[one] for x in backs(whole))
        for name, gradient in gradients(alone, native.run, back).items():
            assert torch.equal(gradient, together[name][one])


# Numbers that are huge, or not finite.


@pytest.mark.parametrize("unit", [2.0**5, 2.0**12, 2.0**30])
def test_one_key_with_all_the_weight_leaves_exact_zeros(unit: float) -> None:
    """P is 1 and dP - delta exactly 0: as for a single key, whose weight is 1 whatever it is."""
    call = make_call(sizes=(1, 2, 1, 67, 1, 64, 160))
    found = gradients(replace(call, needs_lse=False), native.run, backs(call))
    assert found["query"].eq(0).all() and found["key"].eq(0).all()
    query, key = torch.full((1, 1, 67, 4), 16.0), torch.zeros(1, 1, 200, 4)
    key[:, :, 170] = unit
    call = replace(
        make_call(sizes=(1, 1, 1, 67, 200, 4, 64)), query=query, key=key, needs_lse=False
    )
    found = gradients(call, native.run, backs(call))
    assert found["query"].eq(0).all() and found["key"].eq(0).all()


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits(size: float) -> None:
    call = make_call(BandPlan(right=0), sizes=(2, 2, 1, 131, 131, 16, 16))
    check(replace(call, query=call.query * size))


@pytest.mark.parametrize("feature", ["every bias", "softcap, sinks and alibi", "bias of one row"])
@pytest.mark.parametrize("kind", ["large", "all equal", "one huge", "subnormal"])
def test_every_gradient_of_hostile_logits(kind: str, feature: str) -> None:
    call = make_call(BandPlan(right=0), **FEATURES[feature])
    if kind == "large":
        call = replace(call, query=call.query * 1e4)
    if kind == "all equal":
        call = replace(call, key=torch.ones_like(call.key))
    if kind == "one huge":
        key = call.key.clone()
        key[:, :, 11] *= 1e4
        call = replace(call, key=key)
    if kind == "subnormal":
        call = replace(call, query=call.query * torch.finfo(torch.float32).smallest_normal)
    check(call)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_broken_key_spoils_only_rows_that_see_it(
    what: str, number: float, softcap: float | None
) -> None:
    """Causal: dQ of the rows before it, and all of other heads, are those without it."""
    clean = make_call(BandPlan(right=0), sizes=(1, 4, 2, 211, 211, 16, 16), softcap=softcap)
    dirty_tensor = getattr(clean, what).clone()
    dirty_tensor[0, 1, 60, 3] = number
    expected = gradients(clean, native.run, backs(clean))
    found = gradients(replace(clean, **{what: dirty_tensor}), native.run, backs(clean))
    assert torch.equal(found["query"][:, :, :60], expected["query"][:, :, :60])
    for name in ("query", "key", "value"):
        untouched = slice(0, 2) if name == "query" else slice(0, 1)
        assert torch.equal(found[name][:, untouched], expected[name][:, untouched])
    assert found["query"][:, 2:, 60:].isnan().any()


def test_rows_that_attend_to_nothing_have_no_part_whatever_they_hold() -> None:
    call = make_call(PLANS["dense"], sinks=random(HQ))
    assert isinstance(call.plan, DensePlan)
    allowed = call.plan.allowed.clone()
    allowed[:, :, 7] = False
    call = replace(call, plan=replace(call.plan, allowed=allowed))
    expected = gradients(call, native.run, backs(call))
    query, (grad_out, grad_lse) = call.query.clone(), backs(call)
    query[:, :, 7] = math.nan
    grad_out[:, :, 7] = math.inf
    leaves = [x.detach().requires_grad_() for x in (query, call.key, call.value, call.sinks)]
    names = ("query", "key", "value", "sinks")
    out, lse = native.run(with_leaves(call, dict(zip(names, leaves, strict=True))))
    grad_lse = grad_lse.clone()
    grad_lse[:, :, 7] = math.nan
    for name, found in zip(
        names, torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse)), strict=True
    ):
        assert torch.equal(found, expected[name])
    assert expected["query"][:, :, 7].eq(0).all()


# Which gradients are wanted.


@pytest.mark.parametrize("wanted", LEAVES)
def test_one_gradient_alone_has_the_same_bits(wanted: str) -> None:
    call = make_call(BandPlan(right=0), **FEATURES["every bias"])
    expected = gradients(call, native.run, backs(call))[wanted]
    leaf = leaves_of(call)[wanted].detach().requires_grad_()
    results = native.run(with_leaves(call, {wanted: leaf}))
    assert torch.equal(torch.autograd.grad(results, leaf, backs(call))[0], expected)


def test_only_lse_flows_back() -> None:
    call = make_call(BandPlan(right=0))
    leaves = {name: x.detach().requires_grad_() for name, x in leaves_of(call).items()}
    _, lse = native.run(with_leaves(call, leaves))
    found = torch.autograd.grad(lse.sum(), list(leaves.values()))
    exact = gradients(
        call,
        lambda c: by_oracle(c, torch.float64),
        (torch.zeros(B, HQ, LQ, DV), torch.ones(B, HQ, LQ)),
        torch.float64,
    )
    for ours, name in zip(found, leaves, strict=True):
        if name != "value":
            assert_derived_close(ours.double(), exact[name])
    assert found[2].eq(0).all()


def test_an_expanded_bias_gets_a_gradient_for_every_element() -> None:
    dense = random(1, HQ, LQ, 1).expand(1, HQ, LQ, LK).detach().requires_grad_()
    out, _ = native.run(make_call(bias=BiasPlan(dense=dense)))
    (found,) = torch.autograd.grad(out.square().sum(), dense)
    whole = dense.detach().clone().requires_grad_()
    out, _ = native.run(make_call(bias=BiasPlan(dense=whole)))
    assert torch.equal(found, torch.autograd.grad(out.square().sum(), whole)[0])


# Torch: second derivatives, transforms, tracing, counting.


def loss_of(backend: str | None) -> Callable[..., Tensor]:
    def loss(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
        out, lse = mh.attention(
            query,
            key,
            value,
            mask=mh.Causal(),
            attn_bias=mh.Alibi(slopes),
            sinks=sinks,
            softcap=2.0,
            return_lse=True,
            backend=backend,
        )
        return out.sin().sum() + lse.cos().sum()

    return loss


SHAPES = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3), (4,), (4,))
INPUTS = tuple(random(*shape, seed=i).abs() for i, shape in enumerate(SHAPES))


def test_derivatives_of_derivatives() -> None:
    found = []
    for backend in ("native", "reference"):
        leaves = [x.detach().requires_grad_() for x in INPUTS]
        derived: list[Tensor] = [loss_of(backend)(*leaves)]
        for _ in range(3):
            total = sum(x.square().sum() for x in derived[-5:])
            derived += torch.autograd.grad(total, leaves, create_graph=True)
        found.append(derived)
    assert len(found[0]) == 16
    for ours, expected in zip(*found, strict=True):
        assert_derived_close(ours, expected)


STACK = random(3, 2, 4, 5, 8, seed=9)
TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda f: torch.func.grad(f, argnums=(0, 1, 2, 3, 4))(*INPUTS),
    "vjp": lambda f: torch.func.vjp(f, *INPUTS)[1](torch.tensor(2.0)),
    "vmap of grad": lambda f: torch.func.vmap(
        torch.func.grad(f, argnums=(0, 1, 3, 4)), (0, None, None, None, None)
    )(STACK, *INPUTS[1:]),
    "vmap of grad over sinks": lambda f: torch.func.vmap(
        torch.func.grad(f, argnums=4), (None, None, None, None, 0)
    )(*INPUTS[:4], random(3, 4)),
    "grad of vmap": lambda f: torch.func.grad(
        lambda q: torch.func.vmap(lambda x: f(x, *INPUTS[1:]))(q).sum()
    )(STACK),
    "grad of grad": lambda f: torch.func.grad(
        lambda *x: torch.func.grad(f)(*x).square().sum(), argnums=(0, 1, 3)
    )(*INPUTS),
    "vmap of grad of grad": lambda f: torch.func.vmap(
        torch.func.grad(lambda q: torch.func.grad(f)(q, *INPUTS[1:]).square().sum())
    )(STACK),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    ours, expected = (TRANSFORMS[name](loss_of(backend)) for backend in ("native", "reference"))
    ours, expected = ((x,) if isinstance(x, Tensor) else x for x in (ours, expected))
    for one, other in zip(ours, expected, strict=True):
        assert_derived_close(one, other)


def backward_arguments(call: AttentionCall) -> tuple[Any, ...]:
    """The arguments with which autograd calls the operator."""
    return arguments_of(OPERATOR, lambda: gradients(call, native.run, backs(call)))


@pytest.mark.parametrize(("plan", "feature"), [
    *((plan, "plain") for plan in PLANS), *(("causal", feature) for feature in FEATURES),
])  # fmt: skip
def test_opcheck(plan: str, feature: str) -> None:
    *arguments, needs = backward_arguments(make_call(PLANS[plan], **FEATURES[feature]))
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    for some in (needs, needs & 0b1010101):
        torch.library.opcheck(OPERATOR, (*detached, some))


#: (place in the schema, its bad value, words of the message)
BAD: dict[str, tuple[int, Any, str]] = {
    "grad_out of another size": (0, random(B, HQ, LQ, DV + 1), "out and grad_out"),
    "grad_out strided": (0, random(B, HQ, DV, LQ).mT, "rows contiguous"),
    "grad_out in float64": (0, random(B, HQ, LQ, DV).double(), "float32, bfloat16 or"),
    "grad_lse of another size": (1, random(B, HQ, LQ + 1), "grad_lse float32"),
    "grad_lse strided": (1, random(B, LQ, HQ).mT, "grad_lse float32"),
    "grad_out in bfloat16": (0, random(B, HQ, LQ, DV).bfloat16(), "of the query's dtype"),
    "out of another size": (2, random(B, HQ, LQ + 1, DV), "out and grad_out"),
    "stats of another size": (3, random(2, B, HQ, LQ + 1), "stats float32"),
    "stats missing": (3, random(0), "stats float32"),
    "needs sinks": (-1, 8, "sinks where"),
    "needs slopes": (-1, 16, "slopes where"),
    "needs distance values": (-1, 32, "distance_values where"),
    "needs dense bias": (-1, 64, "dense_bias where"),
}


@pytest.mark.parametrize("name", BAD)
def test_unchecked_arguments_never_reach_the_kernels(name: str) -> None:
    place, value, words = BAD[name]
    arguments = list(backward_arguments(make_call()))
    arguments[place] = value
    with pytest.raises(RuntimeError, match=words):
        OPERATOR(*arguments)


def test_flops_are_counted() -> None:
    call = make_call(sizes=(B, HQ, HKV, LQ, LK, D, D))
    with FlopCounterMode(display=False) as counter:
        gradients(call, native.run, backs(call))
    forward = 2 * B * HQ * LQ * LK * (D + D)
    assert counter.get_total_flops() == forward + forward * 5 // 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("feature", ["plain", "every bias", "softcap, sinks and alibi"])
def test_a_training_step_compiles_whole(feature: str, backend: str) -> None:
    torch.compiler.reset()
    call = make_call(PLANS["causal"], **FEATURES[feature])
    compiled = torch.compile(native.run, fullgraph=True, backend=backend)
    ours, expected = (gradients(call, run, backs(call)) for run in (compiled, native.run))
    for name, gradient in expected.items():
        assert torch.equal(ours[name], gradient), name
