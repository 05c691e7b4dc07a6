"""`trace`: each step against its formula, and the last one against the module's."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from cases import Case, build
from oracle import attend
from test_measures import CASES, Dense
from test_module import CAUSAL, KINDS, ROTARY, B, E, L, M, by_formula, close, randomised
from tolerance import assert_close_to_oracle, assert_equal_up_to_rounding
from torch import Tensor, nn

import manyheads as mh
from manyheads import MultiHeadAttention


def traced(module: MultiHeadAttention, *inputs: Tensor, start=0, how=None, **call) -> mh.Trace:
    """The trace of a call; its output obeys the numerics rule and is the sum it says it is."""
    how = {"scale": module.scale} | (how or {})
    steps = mh.trace(module, *inputs, **call)
    output = steps["output"]
    oracle = by_formula(module, *inputs, start=start, **how)
    close(output, oracle, by_formula(module, *inputs, start=start, dtype=output.dtype, **how))
    total = steps["contributions"].sum(1)
    if module.out_proj.bias is not None:
        total = total + steps["output_bias"]
    assert_equal_up_to_rounding(output.detach(), total.detach().to(output.dtype))
    for name, step in steps.steps.items():
        assert len(step.axes) == step.tensor.dim()
        assert step.name == name in repr(steps) and step.explanation.endswith(".")
    return steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_the_modules(kind, dtype):
    module = randomised(MultiHeadAttention(E, **KINDS[kind])).to(dtype)
    x, memory = torch.randn(B, L, E).to(dtype), torch.randn(B, M, E).to(dtype)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            traced(module, x)
            traced(module, x, memory, start=M - L)
            traced(module, x, memory, torch.randn(B, M, E).to(dtype), start=M - L)
            steps = traced(module, x, mask=mh.Causal(), how={"allowed": CAUSAL})
    expected = module(x, mask=mh.Causal())
    assert steps["output"].dtype == expected.dtype and steps["output"].shape == expected.shape


def test_steps_of_a_module():
    """Every step by hand, for a module that has them all."""
    alibi = mh.Alibi(torch.rand(6))
    options = ROTARY | {"qk_norm": "rms", "mask": mh.Causal(), "attn_bias": alibi}
    module = randomised(MultiHeadAttention(E, **options)).double()
    x = torch.randn(B, L, E, dtype=torch.float64)
    steps = mh.trace(module, x)

    def split(projection: nn.Linear, heads: int) -> Tensor:
        return torch.stack((x @ projection.weight.T + projection.bias).split(4, -1), 1)

    q, k, v = split(module.q_proj, 6), split(module.k_proj, 2), split(module.v_proj, 2)
    expected = {"projected_queries": q, "projected_keys": k, "projected_values": v}
    q, k = module.q_norm(q), module.k_norm(k)
    expected |= {"normed_queries": q, "normed_keys": k}
    q, k = module.positions(q, 0), module.positions(k, 0)
    expected |= {"rotated_queries": q, "rotated_keys": k}
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    expected["scores"] = scores = q @ k.mT / 2
    distance = (torch.arange(L)[:, None] - torch.arange(L)).abs()
    expected["biased_scores"] = scores = scores - alibi.slopes[:, None, None] * distance
    expected["masked_scores"] = scores = scores.masked_fill(~CAUSAL, -torch.inf)
    expected["weights"] = weights = scores.softmax(-1)
    expected["heads"] = heads = weights @ v
    columns = module.out_proj.weight.split(4, 1)
    expected["contributions"] = torch.stack(
        [head @ w.T for head, w in zip(heads.unbind(1), columns, strict=True)], 1
    )
    expected["output_bias"] = module.out_proj.bias
    expected["output"] = module.out_proj(heads.transpose(1, 2).flatten(2))
    assert list(steps.steps) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(steps[name], tensor, msg=lambda m, n=name: f"{n}: {m}")
    assert steps.scale == 0.5
    assert steps.steps["contributions"].sizes == "batch 3, head 6, query 7, output 24"


@pytest.mark.parametrize("case", [*CASES, Case("causal", "sum", softcap=2.0, sinks=True)], ids=str)
def test_steps_of_attention(case: Case):
    built = build(case if case.bias != "sum" else Case(**vars(case) | {"bias": "alibi_and_row"}))
    problem, accumulate = built.problem, torch.float32
    if case.dtype == torch.float64:
        accumulate = torch.float64
    exact, plain = Dense(built, case, torch.float64), Dense(built, case, accumulate)
    steps = mh.trace_attention(problem.query, problem.key, problem.value, **built.arguments)
    logits = [step for step in steps.steps.values() if step.stage == "score"][-1].tensor
    assert torch.equal(logits == -torch.inf, exact.logits == -torch.inf)
    assert_close_to_oracle(
        steps["weights"], exact.weights, plain.weights.to(accumulate), accumulate
    )
    if problem.sinks is not None:
        sinks = exact.all_weights[..., -1], plain.all_weights[..., -1].to(accumulate)
        assert_close_to_oracle(steps["sink_weights"], *sinks, accumulate)
    eager = attend(problem, case.dtype)[0]
    assert_close_to_oracle(steps["heads"], attend(problem)[0], eager, case.dtype)
    used = {"capped_scores": problem.softcap, "biased_scores": problem.bias}
    used |= {"sink_weights": problem.sinks, "masked_scores": problem.allowed}
    for name, argument in used.items():
        assert (name in steps.steps) == (argument is not None)


def test_a_cache_is_used_and_left_as_it_was():
    module = randomised(MultiHeadAttention(E, mask=mh.Causal(), **ROTARY)).eval()
    x, cache = torch.randn(B, L, E), mh.KVCache()
    with torch.no_grad():
        module(x[:, :5], cache=cache)
        steps = mh.trace(module, x[:, 5:], cache=cache)
        assert cache.length == 5
        expected = module(x[:, 5:], cache=cache)
    oracle = by_formula(module, x, allowed=CAUSAL)[:, 5:]
    eager = by_formula(module, x, dtype=torch.float32, allowed=CAUSAL)[:, 5:]
    close(steps["output"], oracle, eager)
    close(expected, oracle, eager)
    key, value = cache.view()
    assert torch.equal(steps["keys"], key) and torch.equal(steps["values"], value)
    assert torch.equal(steps["rotated_keys"], key[:, :, 5:])
    assert steps["weights"].shape == (B, 6, L - 5, L)


def test_autocast_rounds_what_the_module_rounds():
    module, x = randomised(MultiHeadAttention(E, 4)), torch.randn(B, L, E)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        steps, expected = mh.trace(module, x), module(x)
        lengths = mh.contributions(module, x)
    assert steps["output"].dtype == expected.dtype == steps["heads"].dtype == torch.bfloat16
    assert steps["weights"].dtype == lengths.dtype == torch.float32
    torch.testing.assert_close(steps["weights"].sum(-1), torch.ones(B, 4, L))
    close(expected, steps["contributions"].sum(1).double() + module.out_proj.bias, steps["output"])


def test_dropout_is_left_out_and_gradients_flow():
    module = MultiHeadAttention(E, 4, dropout=0.5)
    x = torch.randn(L, E, requires_grad=True)
    steps = mh.trace(module, x)
    torch.testing.assert_close(steps["output"][0], module.eval()(x))
    steps["contributions"][0, 2].sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_what_would_take_too_much_is_refused():
    module = MultiHeadAttention(16, 8)
    x = torch.zeros(1, 4096, 16)
    with pytest.raises(mh.ArgumentError, match="8 heads, 4096 queries and 4096 keys") as raised:
        mh.trace(module, x)
    assert "would take 1,0" in str(raised.value) and "max_bytes = 256 MiB" in str(raised.value)
    with pytest.raises(mh.ArgumentError, match="would take 1,0"):
        heads = torch.zeros(8, 4096, 2)
        mh.trace_attention(heads, heads, heads)
    cache = mh.KVCache()
    with torch.no_grad():
        module(x, cache=cache)
    with pytest.raises(mh.ArgumentError, match="1 queries and 4097 keys"):
        mh.trace(module, x[:, :1], cache=cache, max_bytes=1000)


def test_the_limit_counts_what_is_made():
    """The estimate is no less than the steps, and at most twice as much."""
    for options in ({}, {"mask": mh.Causal(), "attn_bias": mh.Alibi()} | ROTARY):
        module = MultiHeadAttention(E, **{"num_heads": 6} | options)
        x = torch.randn(B, 97, E)
        steps = mh.trace(module, x)
        taken = sum(step.tensor.numel() * step.tensor.itemsize for step in steps.steps.values())
        mh.trace(module, x, max_bytes=2 * taken)
        with pytest.raises(mh.ArgumentError, match="would take"):
            mh.trace(module, x, max_bytes=taken - 1)


X = torch.zeros(1, 5, 8)
NESTED = torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)], layout=torch.jagged)
QUANTISED = MultiHeadAttention(8, 2)
QUANTISED.out_proj = nn.Sequential(nn.Linear(8, 8))
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "module": (
        lambda: mh.trace(nn.MultiheadAttention(8, 2), X), mh.ArgumentTypeError,
        "got a MultiheadAttention; expected a manyheads.MultiHeadAttention",
    ),
    "out_proj": (lambda: mh.trace(QUANTISED, X), mh.ArgumentTypeError, "out_proj is a Sequential"),
    "nested": (
        lambda: mh.trace(MultiHeadAttention(8, 2), NESTED), mh.ArgumentTypeError, "one sequence",
    ),
    "nested heads": (
        lambda: mh.trace_attention(NESTED, NESTED, NESTED), mh.ArgumentTypeError, "one sequence",
    ),
    "size": (lambda: mh.trace(MultiHeadAttention(7, 1), X), mh.ShapeError, "[B, L, 7]"),
    "step": (
        lambda: mh.trace(MultiHeadAttention(8, 2), X)["bias"], mh.ArgumentError,
        "no step 'bias'; expected one of projected_queries, ",
    ),
    "tensor": (lambda: mh.trace_attention(3, X, X), mh.ArgumentTypeError, "query is not a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    run, error, words = BAD[name]
    with pytest.raises(error, match=re.escape(words)):
        run()
