"""The compiled operator as torch sees it: layouts, edges, transforms, and what it must refuse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from native_calls import arguments_of, call_of, int32, problem_of, random, random_ranges
from oracle import attend
from tolerance import assert_close_to_oracle, eager
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from manyheads import _ops
from manyheads.backends import native
from manyheads.spec import (
    AttentionCall,
    AttentionSpec,
    BandPlan,
    BiasPlan,
    DensePlan,
    IntervalsPlan,
    MaskPlan,
    QueryPositions,
)

OPERATOR = torch.ops.manyheads.attention_forward.default

# Every axis another prime, Hq twice Hkv.
B, HQ, HKV, LQ, LK, D, DV = 2, 14, 7, 11, 23, 5, 3


def make_call(
    plan: MaskPlan | None = None,
    positions: QueryPositions | None = None,
    bias: BiasPlan | None = None,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    **more: Any,
) -> AttentionCall:
    query = random(B, HQ, LQ, D, seed=1) if query is None else query
    key = random(B, HKV, LK, D, seed=2) if key is None else key
    value = random(B, HKV, LK, DV, seed=3) if value is None else value
    return call_of(query, key, value, plan, positions, bias, **more)


CALLS: dict[str, Callable[[], AttentionCall]] = {
    "full": make_call,
    "causal": lambda: make_call(BandPlan(right=0)),
    "per-batch band": lambda: make_call(
        BandPlan(int32(4, 6), 2, int32(1, 3), True, int32(0, 2), int32(23, 19)),
        QueryPositions(int32(9, 3)),
    ),
    "prefix": lambda: make_call(BandPlan(right=0, first_n=13, first_within_right=False)),
    "intervals": lambda: make_call(IntervalsPlan(random_ranges(B, HQ, LQ, LK))),
    "dense": lambda: make_call(DensePlan(random(B, 1, LQ, LK, seed=5) > 0, "random")),
    "dense, keys strided": lambda: make_call(
        DensePlan((random(1, HQ, LK, LQ, seed=5) > 0).mT, "random")
    ),
    "biases and rows": lambda: make_call(
        positions=QueryPositions(rows=torch.arange(2 * LQ, dtype=torch.int32).view(B, LQ)),
        bias=BiasPlan(random(HQ).abs(), random(HQ, 9), 4, random(B, HQ, LQ, LK)),
    ),
    "bias of one row": lambda: make_call(bias=BiasPlan(dense=random(1, HQ, 1, LK))),
    "bias of one key": lambda: make_call(bias=BiasPlan(dense=random(B, 1, LQ, 1))),
    "bias expanded over keys": lambda: make_call(
        bias=BiasPlan(dense=random(B, 1, LQ, 1).expand(B, HQ, LQ, LK))
    ),
    "bias strided": lambda: make_call(bias=BiasPlan(dense=random(B, HQ, LK, LQ).mT)),
    "softcap and sinks": lambda: make_call(softcap=1.5, sinks=random(HQ)),
    # Without lse: the rule compares it to the luck of a single rounding of eager's.
    "one row, one key": lambda: make_call(
        query=random(B, HQ, 1, D),
        key=random(B, HKV, 1, D),
        value=random(B, HKV, 1, DV),
        needs_lse=False,
    ),
}


def operator_arguments(call: AttentionCall) -> tuple[Any, ...]:
    """The arguments with which the native backend calls the operator."""
    return arguments_of(OPERATOR, lambda: native.run(call))


def check_against_oracle(call: AttentionCall) -> None:
    problem = problem_of(call)
    out, lse = native.run(call)
    for actual, exact, plain in zip(
        (out, lse), attend(problem), eager(problem, torch.float32), strict=True
    ):
        if actual is not None:
            assert_close_to_oracle(actual, exact, plain, torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_plans_and_biases_arrive_whole(name: str) -> None:
    check_against_oracle(CALLS[name]())


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    arguments = operator_arguments(CALLS[name]())[:-2]
    for needs in ((True, False), (False, True)):
        torch.library.opcheck(OPERATOR, (*arguments, *needs))


def heads_last(tensor: Tensor) -> Tensor:
    """The same values, stored as [B, L, H, D]."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def test_output_has_the_layout_of_the_query() -> None:
    call = make_call()
    out, _ = native.run(call)
    assert out.is_contiguous()
    query, key, value = (heads_last(x) for x in (call.query, call.key, call.value))
    interleaved, _ = native.run(make_call(query=query, key=key, value=value))
    assert interleaved.transpose(1, 2).is_contiguous()
    assert torch.equal(interleaved, out)


def test_strided_expanded_and_columnwise_inputs() -> None:
    expanded = random(1, 1, LK, DV).expand(B, HKV, LK, DV)
    every_other = random(B, HKV, 2 * LK, D)[:, :, ::2]
    columnwise = random(B, HQ, D, LQ).mT
    check_against_oracle(make_call(query=columnwise, key=every_other, value=expanded))


@pytest.mark.parametrize("layout", [heads_last, Tensor.contiguous])
@pytest.mark.parametrize(("axis", "name"), [(0, "B"), (1, "H"), (2, "Lq"), (2, "Lk")])
def test_empty_axes(axis: int, name: str, layout: Callable[[Tensor], Tensor]) -> None:
    call = make_call()
    tensors = {"query": call.query, "key": call.key, "value": call.value}
    for key in tensors:
        if (name == "Lq" and key != "query") or (name == "Lk" and key == "query"):
            continue
        tensors[key] = layout(tensors[key].narrow(axis, 0, 0))
    heads = tensors["query"].shape[1]
    call = make_call(**tensors, sinks=random(heads))
    out, lse = native.run(call)
    assert out.shape == (*tensors["query"].shape[:3], DV)
    assert lse is not None and lse.shape == out.shape[:3]
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    torch.library.opcheck(OPERATOR, operator_arguments(call))


def test_thread_count_does_not_change_a_bit() -> None:
    long = 131  # shorter calls run on one thread, however many there are
    query, key = random(B, HQ, long, D), random(B, HKV, long, D, seed=1)
    call = make_call(BandPlan(left=7, right=0), query=query, key=key, value=key)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native.run(call))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


# Arguments by their place in the schema, as sets that are mapped together.
MAPPED = {
    "full": [(0,), (1, 2), (0, 1, 2)],
    "per-batch band": [(7,), (0, 7)],
    "intervals": [(9,), (1, 9)],
    "dense": [(10,), (0, 1, 2, 10)],
    "biases and rows": [(8,), (14,), (11,), (0, 12)],
    "bias of one row": [(0,), (14,)],
    "softcap and sinks": [(5,), (0, 5)],
}


@pytest.mark.parametrize("need_lse", [True, False])
@pytest.mark.parametrize(
    ("name", "mapped"), [(name, mapped) for name in MAPPED for mapped in MAPPED[name]]
)
def test_vmap_is_a_loop(name: str, mapped: tuple[int, ...], need_lse: bool) -> None:
    arguments = (*operator_arguments(CALLS[name]())[:-2], need_lse, not need_lse)
    stacks = tuple(
        torch.stack([arguments[i], arguments[i].flip(0), arguments[i].roll(1, -1)]) for i in mapped
    )

    def operator(*changed: Tensor) -> Any:
        merged = list(arguments)
        for i, tensor in zip(mapped, changed, strict=True):
            merged[i] = tensor
        return OPERATOR(*merged)

    out_dims = (0, 0, None) if need_lse else (0, None, 0)
    outs, lses, stats = torch.vmap(operator, out_dims=out_dims)(*stacks)
    for n in range(3):
        out, lse, stat = operator(*(stack[n] for stack in stacks))
        assert torch.equal(outs[n], out)
        if need_lse:
            assert torch.equal(lses[n], lse)
        else:
            assert torch.equal(stats[n], stat)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_graph_break(name: str) -> None:
    call = CALLS[name]()
    torch.compiler.reset()
    compiled = torch.compile(native.run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(call), native.run(call), strict=True):
        if expected is None:
            assert actual is None
            continue
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()


def test_compiles_for_lengths_that_vary() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def causal(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return native.run(make_call(BandPlan(right=0), query=query, key=key, value=value))

    for length in (13, 17, 19):
        query, key = random(B, HQ, length, D), random(B, HKV, length + 3, D)
        value = random(B, HKV, length + 3, DV)
        expected = native.run(make_call(BandPlan(right=0), query=query, key=key, value=value))
        for actual, wanted in zip(causal(query, key, value), expected, strict=True):
            assert torch.equal(actual, wanted)
    assert counter.frame_count == 1


def test_flops_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        native.run(make_call())
    assert counter.get_total_flops() == 2 * B * HQ * LQ * LK * (D + DV)


#: (place in the schema, its bad value, words of the message)
BAD: dict[str, tuple[int, Any, str]] = {
    "query of rank 3": (0, random(HQ, LQ, D), "query [B, Hq, Lq, D]"),
    "query in float64": (0, random(B, HQ, LQ, D).double(), "query float32"),
    "query in bfloat16": (0, random(B, HQ, LQ, D).bfloat16(), "of the query's dtype"),
    "query heads": (0, random(B, HQ + 1, LQ, D), "a multiple of"),
    "query columns": (0, random(B, HQ, LQ, D + 1), "one head size"),
    "query strided": (0, random(B, HQ, D, LQ).mT, "rows contiguous"),
    "key batch": (1, random(B + 1, HKV, LK, D), "one batch size"),
    "key heads": (1, random(B, HKV + 1, LK, D), "one head count"),
    "key of rank 5": (1, random(B, HKV, LK, D, 1), "key [B, Hkv, Lk, D]"),
    "no key heads": (1, random(B, 0, LK, D), "one head count"),
    "value length": (2, random(B, HKV, LK + 1, DV), "one head count and length"),
    "value too wide": (2, random(B, HKV, LK, 257), "from 1 to 256"),
    "value of no columns": (2, random(B, HKV, LK, 0), "from 1 to 256"),
    "sinks too few": (5, random(HQ - 1), "sinks"),
    "sinks in float64": (5, random(HQ).double(), "sinks"),
    "sinks strided": (5, random(2 * HQ)[::2], "sinks"),
    "band too short": (6, [0] * 7, "8 numbers"),
    "band rows missing": (6, [0, 0, 0, 0, 0, LK, 1, 1], "a row of band_rows"),
    "band rows unused": (7, torch.zeros(1, B, dtype=torch.int32), "as many rows"),
    "band rows per batch": (7, torch.zeros(1, B + 1, dtype=torch.int32), "band_rows int32"),
    "band rows in int64": (7, torch.zeros(1, B, dtype=torch.int64), "band_rows int32"),
    "positions too few": (8, torch.zeros(1, LQ - 1, dtype=torch.int32), "query_positions"),
    "positions per batch": (8, torch.zeros(B + 1, LQ, dtype=torch.int32), "query_positions"),
    "five ranges": (9, torch.zeros(1, 1, LQ, 5, 2, dtype=torch.int32), "intervals int32"),
    "no ranges": (9, torch.zeros(1, 1, LQ, 0, 2, dtype=torch.int32), "intervals int32"),
    "ranges of too few rows": (9, torch.zeros(1, 1, 1, 1, 2, dtype=torch.int32), "intervals"),
    "ranges strided": (
        9, torch.zeros(1, 1, LQ, 2, 3, dtype=torch.int32).mT, "contiguous in its last two",
    ),
    "allowed in int32": (10, torch.ones(1, 1, LQ, LK, dtype=torch.int32), "allowed bool"),
    "allowed too short": (10, torch.ones(1, 1, LQ, LK - 1, dtype=torch.bool), "allowed bool"),
    "allowed of one row": (10, torch.ones(1, 1, 1, LK, dtype=torch.bool), "allowed bool"),
    "allowed strided": (10, torch.ones(1, 1, LK, LQ, dtype=torch.bool).mT, "rows contiguous"),
    "slopes of rank 2": (11, random(1, HQ), "slopes"),
    "distance values of none": (12, random(HQ, 0), "distance_values"),
    "distance values strided": (12, random(5, HQ).mT, "distance_values"),
    "dense bias of rank 3": (14, random(HQ, LQ, LK), "dense_bias float32"),
    "dense bias too short": (14, random(1, 1, LQ, LK - 1), "dense_bias float32"),
    "dense bias strided": (14, random(1, 1, LK, LQ).mT, "key stride"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_unchecked_arguments_never_reach_the_kernels(name: str) -> None:
    place, value, words = BAD[name]
    arguments = list(operator_arguments(make_call()))
    arguments[place] = value
    with pytest.raises(RuntimeError, match=re.escape(words)):
        OPERATOR(*arguments)


def test_two_masks_are_refused() -> None:
    arguments = list(operator_arguments(CALLS["intervals"]()))
    arguments[10] = torch.ones(1, 1, LQ, LK, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="not both"):
        OPERATOR(*arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda"}, "cuda"),
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 257}, "head_dim is 257"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"value_dim": 257}, "value_dim is 257"),
        ({"transformed": True, "forward_mode": True}, "forward-mode"),
    ],
)
def test_why_not(changes: dict[str, Any], words: str) -> None:
    sizes = {"batch": B, "q_heads": HQ, "kv_heads": HKV, "q_len": LQ, "k_len": LK}
    plain = {"head_dim": D, "value_dim": DV, "dtype": torch.float32, "device": "cpu"}
    fields = {**sizes, **plain, "plan": "band"}
    assert native.why_not(AttentionSpec(**fields)) == []
    reasons = native.why_not(AttentionSpec(**{**fields, **changes}))
    assert len(reasons) == 1
    assert words in reasons[0]


def test_the_library_is_loaded() -> None:
    assert _ops.LIBRARY_ERROR is None
    assert _ops.cpu_kernels().error is None


def test_a_tiny_weight_counts_beside_a_huge_value() -> None:
    """docs/decisions/0004-smallest-weight.md: a key 72 below, worth 10^30 times as much."""
    logits = torch.tensor([0.0] * 6 + [-72.0])
    value = torch.tensor([1.0] * 6 + [1e30])
    query = torch.ones(1, 1, 1, 1)
    key = logits[None, None, :, None]
    call = make_call(query=query, key=key, value=value[None, None, :, None])
    out, _ = native.run(replace(call, scale=1.0))
    weights = logits.double().softmax(0)
    exact = float(weights @ value.double())
    assert exact > 1.008  # the far key is a hundredth of the result
    assert out.item() == pytest.approx(exact, rel=2e-6)
