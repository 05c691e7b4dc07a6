"""Every backend against the float64 oracle, and what DESIGN.md, section 3, promises beyond that."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import MASKS, Built, Case, build, grid
from oracle import Problem, attend
from tolerance import assert_close_to_oracle, assert_gradients_close, assert_lse_close, eager
from torch import Tensor

import manyheads as mh

GRID = grid()
BACKENDS = ("reference", "sdpa", "native")
EVERYWHERE = [(b, c) for b in BACKENDS for c in GRID if b != "sdpa" or c.sdpa_can]
NATIVE_ONLY = [c for b, c in EVERYWHERE if b == "native"]


def check(built: Built, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Output and, where the backend has it, lse against the oracle."""
    exact, exact_lse = attend(built.problem)
    plain, plain_lse = eager(built.problem, dtype)
    if backend == "sdpa":
        out = built.run(backend)
    else:
        out, lse = built.run(backend, return_lse=True)
        assert lse.dtype == torch.float32
        assert_lse_close(lse, exact_lse, plain_lse, built.problem)
    assert out.dtype == dtype
    assert_close_to_oracle(out, exact, plain, dtype)
    nothing = exact_lse == -math.inf
    assert (out[nothing] == 0).all(), "exact zeros where a row may attend to nothing"


def test_the_grid_is_not_empty() -> None:
    counts = {b: sum(backend == b for backend, _ in EVERYWHERE) for b in BACKENDS}
    assert counts["reference"] == counts["native"] == len(GRID) > 280
    assert counts["sdpa"] > 220


@pytest.mark.parametrize(("backend", "case"), EVERYWHERE, ids=str)
def test_grid(backend: str, case: Case) -> None:
    check(build(case), backend)


#: How torch sees the operators, once more on the simplest instruction sets.
SIMPLE_ISAS = ("avx2", "scalar")
OF_TORCH = (
    "test_native_operator.py::test_opcheck[biases and rows]",
    "test_native_operator.py::test_compiles_without_a_graph_break[causal]",
    "test_backward.py::test_opcheck[causal-every bias]",
    "test_backward.py::test_a_training_step_compiles_whole[every bias-aot_eager]",
)


@pytest.mark.parametrize("isa", [i for i in mh.info().available_isas if i != mh.info().isa])
def test_grid_under_another_isa(isa: str) -> None:
    """The native cases here and in the files named below, in a process forced to use `isa`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    others = ("test_half.py", "test_decode.py", "test_hostile.py", "test_projection.py")
    of_torch = OF_TORCH if isa in SIMPLE_ISAS else ()
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in others + of_torch)]
    which = "(test_attention and native) or test_half or test_lengths or test_sizes or "
    which += "test_hostile or test_opcheck or compiles or operator_for_one_row"
    environment = {**os.environ, "MANYHEADS_ISA": isa}
    ran = subprocess.run(
        [*command, "-k", which, *files],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parent.parent,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    passed = int(ran.stdout.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1])
    assert passed > len(NATIVE_ONLY)


def test_native_uses_the_forced_isa() -> None:
    forced = os.environ.get("MANYHEADS_ISA")
    assert mh.info().isa == (forced or mh.info().available_isas[0])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (backend, dtype)
        for backend in BACKENDS
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
        if (backend, dtype) != ("native", torch.float64)
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", MASKS)
def test_other_dtypes(backend: str, dtype: torch.dtype, mask: str) -> None:
    case = Case(mask, "alibi", (6, 2), (17, 5), (23, 31), dtype=dtype)
    built = build(case)
    exact, _ = attend(built.problem)
    plain, _ = eager(built.problem, dtype)
    out = built.run(backend)
    assert out.dtype == dtype
    assert_close_to_oracle(out, exact, plain, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("equal", [False, True], ids=["random", "equal"])
def test_65536_keys(backend: str, equal: bool) -> None:
    built = build(Case("causal", heads=(2, 1), sizes=(64, 64), lengths=(3, 65536), batch=1))
    if equal:
        built = Built(
            replace(built.problem, key=torch.ones_like(built.problem.key)), built.arguments
        )
    check(built, backend)


def test_native_524288_equal_keys() -> None:
    """One chain of additions over all blocks of keys would be outside the rule, with this seed."""
    case = Case("causal", heads=(1, 1), sizes=(32, 32), lengths=(3, 524288), batch=1)
    built = build(case, seed=3)
    problem = replace(built.problem, key=torch.ones_like(built.problem.key))
    check(Built(problem, built.arguments), "native")


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("seed", range(6))
def test_softcap_of_small_logits(backend: str, seed: int) -> None:
    """Logits of a thousandth of the cap: a tanh written with exp alone would cancel."""
    case = Case("none", heads=(1, 1), sizes=(32, 32), lengths=(61, 5), softcap=50.0, batch=1)
    check(build(case, seed, magnitude=0.1), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(1, 67), (61, 67)], ids=str)
@pytest.mark.parametrize("kind", ["large", "equal", "one_huge"])
def test_adversarial_logits(backend: str, kind: str, lengths: tuple[int, int]) -> None:
    case = Case("causal", "none", (4, 2), (32, 32), lengths, batch=7)
    built = build(case, magnitude=1e4)
    if kind == "equal":
        key = torch.ones_like(built.problem.key)
        built = Built(replace(built.problem, key=key), built.arguments)
    if kind == "one_huge":
        key = built.problem.key * 1e-4
        key[:, :, 11] *= 1e6
        built = Built(replace(built.problem, key=key), built.arguments)
    check(built, backend)


# Rows that may attend to nothing.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["nothing", "dense", "lengths", "left_padding", "causal"])
@pytest.mark.parametrize("lengths", [(1, 5), (41, 31)], ids=str)
def test_empty_rows(backend: str, mask: str, lengths: tuple[int, int]) -> None:
    """Zeros and -inf, to the bit; for "causal" the first ten queries stand before the keys."""
    built = build(Case(mask, lengths=lengths, batch=3))
    _, exact_lse = attend(built.problem)
    nothing = exact_lse == -math.inf
    assert nothing.any() or lengths == (1, 5)
    out = built.run(backend)
    assert out[nothing].eq(0).all() and out.isfinite().all()
    if backend != "sdpa":
        out, lse = built.run(backend, return_lse=True)
        assert torch.equal(lse == -math.inf, nothing) and not lse.isnan().any()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_empty_rows_with_sinks(backend: str) -> None:
    built = build(Case("dense", sinks=True))
    nothing = attend(built.problem)[1] == -math.inf
    assert nothing.any()
    out, lse = built.run(backend, return_lse=True)
    assert out[nothing].eq(0).all() and lse[nothing].eq(-math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["nothing", "dense", "lengths", "causal"])
def test_empty_rows_have_zero_gradients(backend: str, mask: str) -> None:
    built = build(Case(mask, lengths=(41, 31)))
    nothing = attend(built.problem)[1] == -math.inf
    leaves = with_grad(built)
    built.run(backend).sum().backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
    assert nothing.any()
    assert leaves[0].grad[nothing].eq(0).all()


# Values that are not finite.


def poison(built: Built, keys: Tensor, number: float, what: str) -> Built:
    """The same problem with `number` in one column of `what` at `keys` ([B|1, Lk] bool)."""
    tensor = getattr(built.problem, what).clone()
    tensor[..., 2].masked_fill_(keys[:, None], number)
    return Built(replace(built.problem, **{what: tensor}), built.arguments)


# With many queries, all masks but the first two show every key to some query.
WITH_UNSEEN_KEYS = [
    *((m, n) for m in ("lengths", "left_padding") for n in [(1, 61), (2, 61), (53, 61), (61, 61)]),
    *(("sink_window", n) for n in [(1, 61), (2, 61), (53, 61)]),
    *((m, n) for m in ("outside", "dense") for n in [(1, 61), (2, 61)]),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize(("mask", "lengths"), WITH_UNSEEN_KEYS, ids=str)
def test_masked_keys_never_leak(
    backend: str, number: float, what: str, mask: str, lengths: tuple[int, int]
) -> None:
    """What no query may attend to cannot change a bit of the output, whatever it holds."""
    clean = build(Case(mask, lengths=lengths))
    shape = (2, 3, *lengths)
    unseen = ~clean.problem.allowed.expand(shape).any(1).any(1)
    assert unseen.any()
    dirty = poison(clean, unseen, number, what)
    assert torch.equal(dirty.run(backend), clean.run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("mask", ["causal", "window", "prefix", "outside", "dense"])
@pytest.mark.parametrize("key", [0, 7, 60, 210])
def test_a_row_never_sees_a_value_it_may_not_attend_to(
    backend: str, number: float, mask: str, key: int
) -> None:
    """As "a causal row never sees a later inf": only rows that attend to it, only in its column."""
    clean = build(Case(mask, lengths=(211, 211), batch=1, heads=(4, 2)))
    at = torch.zeros(1, 211, dtype=torch.bool)
    at[0, key] = True
    dirty = poison(clean, at, number, "value")
    exact, _ = attend(dirty.problem)
    plain, _ = eager(clean.problem, torch.float32)
    hit = ~exact.isfinite()
    assert hit.any() and not hit.all()
    assert_close_to_oracle(dirty.run(backend), exact, plain, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", [3, 60, 210])
def test_a_row_never_sees_a_key_it_may_not_attend_to(backend: str, key: int) -> None:
    clean = build(Case("causal", lengths=(211, 211), batch=1, heads=(4, 2)))
    at = torch.zeros(1, 211, dtype=torch.bool)
    at[0, key] = True
    out = poison(clean, at, math.nan, "key").run(backend)
    assert torch.equal(out[:, :, :key].isfinite(), torch.ones_like(out[:, :, :key], dtype=bool))
    assert out[:, :, key:].isnan().all()
    exact, _ = attend(clean.problem)
    plain, _ = eager(clean.problem, torch.float32)
    before = (x[:, :, :key] for x in (out, exact, plain))
    assert_close_to_oracle(*before, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_masked_keys_never_leak_into_gradients(backend: str, number: float) -> None:
    gradients = []
    for filler in (0.0, number):
        built = build(Case("lengths", lengths=(23, 31)))
        unseen = ~built.problem.allowed.expand(2, 3, 23, 31).any(1).any(1)
        built = poison(poison(built, unseen, filler, "value"), unseen, filler, "key")
        leaves = with_grad(built)
        built.run(backend).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for clean, dirty in zip(*gradients, strict=True):
        assert torch.equal(clean, dirty) and clean.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_query_stays_in_its_row(backend: str) -> None:
    clean = build(Case("dense", lengths=(41, 31)))
    query = clean.problem.query.clone()
    query[:, :, [3, 20]] = math.nan  # row 3 may attend to nothing, row 20 to something
    out = Built(replace(clean.problem, query=query), clean.arguments).run(backend)
    rows = torch.arange(41) != 20
    assert torch.equal(out[:, :, rows], clean.run(backend)[:, :, rows])
    assert out[:, :, 20].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_query_that_sees_nothing_leaves_gradients_alone(backend: str) -> None:
    built = build(Case("dense", lengths=(41, 31)))
    built.problem.query[:, :, 3] = math.nan
    leaves = with_grad(built)
    built.run(backend).square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert leaves[0].grad[:, :, 3].eq(0).all()


# The same bits, wherever a query is computed.


@pytest.mark.parametrize("lengths", [(1, 263), (2, 67), (5, 67), (61, 67), (199, 211)], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "window", "sink_window", "outside"])
def test_native_batch_of_one_or_seven_same_bits(mask: str, lengths: tuple[int, int]) -> None:
    built = build(Case(mask, heads=(6, 2), sizes=(64, 64), lengths=lengths, batch=7))
    q, k, v = built.problem.query, built.problem.key, built.problem.value
    together = built.run("native")
    for b in (0, 3, 6):
        one = slice(b, b + 1)
        alone = Built(Problem(q[one], k[one], v[one]), built.arguments).run("native")
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("lengths", [(1, 5003), (7, 263), (199, 211)], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "sink_window", "dense"])
def test_native_one_or_two_threads_same_bits(mask: str, lengths: tuple[int, int], threads) -> None:
    built = build(Case(mask, heads=(6, 2), sizes=(64, 64), lengths=lengths))
    threads(1)
    one = built.run("native")
    threads(2)
    assert torch.equal(built.run("native"), one)


@pytest.mark.parametrize("mask", ["none", "causal", "window", "sink_window", "outside"])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2)], ids=str)
@pytest.mark.parametrize("first", [1, 16, 31, 48, 100])
def test_native_any_place_in_a_chunk_same_bits(
    mask: str, heads: tuple[int, int], first: int
) -> None:
    """A query's row does not depend on which other rows were computed with it."""
    built = build(Case(mask, heads=heads, sizes=(64, 64), lengths=(257, 257), query_start=0))
    whole = built.run("native")
    problem = replace(built.problem, query=built.problem.query[:, :, first : first + 97])
    chunk = Built(problem, built.arguments).run("native", query_start=first)
    assert torch.equal(chunk, whole[:, :, first : first + 97])


@pytest.mark.parametrize("mask", ["none", "causal", "window", "sink_window", "outside"])
@pytest.mark.parametrize(("heads", "count"), [((3, 3), 8), ((6, 2), 2)], ids=str)
def test_native_any_place_among_few_queries_same_bits(
    mask: str, heads: tuple[int, int], count: int
) -> None:
    """Up to 8 queries per key/value head: one alone gives the same bits as among the others."""
    case = Case(mask, heads=heads, sizes=(64, 64), lengths=(count, 257), query_start=200)
    built = build(case)
    whole = built.run("native")
    for row in (0, 1, count - 1):
        problem = replace(built.problem, query=built.problem.query[:, :, row : row + 1])
        alone = Built(problem, built.arguments).run("native", query_start=200 + row)
        assert torch.equal(alone, whole[:, :, row : row + 1])


# Gradients and transforms.


def with_grad(built: Built) -> list[Tensor]:
    """Query, key and value of a built case, in place, as leaves."""
    tensors = [built.problem.query, built.problem.key, built.problem.value]
    return [x.requires_grad_() for x in tensors]


GRADIENTS = [
    *(Case(m, "alibi", (6, 2), (17, 5), (23, 31)) for m in MASKS),
    *(
        Case("causal", "none", (6, 2), (16, 16), n, batch=7)
        for n in [(1, 1), (1, 31), (31, 31), (41, 31)]
    ),
    *(Case("causal", "none", (6, 2), (16, 16), (31, 31), scale=s) for s in (0.0, -0.5)),
    Case("causal", "dense", (6, 2), (16, 16), (23, 31)),
    Case("none", "none", (3, 3), (16, 16), (23, 31)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients(backend: str, case: Case) -> None:
    built = build(case)
    generator = torch.Generator().manual_seed(2)
    shape = (*built.problem.query.shape[:3], built.problem.value.shape[3])
    grad_out = torch.randn(shape, generator=generator)

    def run(problem: Problem) -> Tensor:
        return Built(problem, built.arguments).run(backend)

    assert_gradients_close(built.problem, grad_out, torch.float32, run)


def test_bias_and_sinks_get_gradients() -> None:
    built = build(Case("causal", "alibi", sinks=True, softcap=3.0))
    sinks, slopes = built.problem.sinks.requires_grad_(), built.arguments["attn_bias"].slopes
    slopes.requires_grad_()
    built.run().sum().backward()
    assert sinks.grad.abs().min() > 0 and slopes.grad.abs().min() > 0


def double(case: Case) -> tuple[Built, tuple[Tensor, Tensor, Tensor]]:
    built = build(replace(case, dtype=torch.float64, batch=1, lengths=(3, 5), sizes=(2, 3)))
    problem = built.problem
    return built, (problem.query, problem.key, problem.value)


DOUBLES = [
    Case("causal", "alibi", (4, 2), sinks=True, softcap=2.0),
    Case("dense", "dense", (2, 1)),
    Case("lengths", heads=(2, 2), query_start=-1),
]


# PyTorch's own forward mode is written with torch.jit.script.
SCRIPTED = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@SCRIPTED
@pytest.mark.parametrize("case", DOUBLES, ids=str)
def test_reference_gradcheck_and_gradgradcheck(case: Case) -> None:
    built, inputs = double(case)

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        call = Built(replace(built.problem, query=query, key=key, value=value), built.arguments)
        out, lse = call.run("reference", return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_second_derivatives_in_a_row_that_sees_nothing_are_zero() -> None:
    query, key, value = (torch.randn(1, 1, 2, 3, requires_grad=True) for _ in range(3))
    out = mh.attention(query, key, value, mask=mh.KeyRange(0, 0), backend="reference")
    (first,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), query)
    assert first.eq(0).all() and second.eq(0).all()


@SCRIPTED
@pytest.mark.parametrize("mask", [None, mh.Causal(), mh.Window(1, 1)], ids=repr)
def test_vmap_and_jvp_agree_with_plain_calls(mask: mh.Mask | None) -> None:
    query, key, value = torch.randn(7, 2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)

    def run(query: Tensor, backend: str | None = None) -> Tensor:
        return mh.attention(query, key, value, mask=mask, backend=backend)

    together = torch.func.vmap(run)(query)
    torch.testing.assert_close(together, torch.stack([run(q) for q in query]))

    def slope(backend: str | None) -> Tensor:
        direction = torch.ones_like(query[0])
        return torch.func.jvp(lambda q: run(q, backend), (query[0],), (direction,))[1]

    # That the reference's forward mode is right is gradcheck's finding, above.
    assert torch.equal(slope(None), slope("reference")) and slope(None).abs().max() > 0
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query[0], torch.ones_like(query[0]))
        tangent = torch.autograd.forward_ad.unpack_dual(run(dual)).tangent
    assert torch.equal(tangent, slope(None))


@SCRIPTED
def test_second_derivatives_in_torch_func_need_no_asking() -> None:
    key, value = torch.randn(1, 5, 4), torch.randn(1, 5, 4)  # fused, were it left to PyTorch

    def run(query: Tensor) -> Tensor:
        return mh.attention(query, key, value, mask=mh.Causal()).square().sum()

    curvature = torch.func.hessian(run)(torch.randn(1, 2, 4))
    assert curvature.isfinite().all() and curvature.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [None, mh.Causal(), mh.Window(3, 2)], ids=repr)
def test_compiles_without_a_graph_break(backend: str, mask: mh.Mask | None) -> None:
    query, key, value = (torch.randn(2, 3, 11, 8) for _ in range(3))

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return mh.attention(query, key, value, mask=mask, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value), run(query, key, value))


# Dropout, ranks, lse.


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_dropout_zeroes_its_share_and_keeps_the_mean(backend: str) -> None:
    query, key = torch.zeros(1, 1, 2003, 8), torch.zeros(1, 1, 64, 8)
    value = torch.eye(64)[None, None]  # the output is the weights themselves
    out = mh.attention(query, key, value, dropout_p=0.25, backend=backend)
    kept = out > 0
    assert abs(kept.float().mean() - 0.75) < 0.01
    assert torch.equal(out[kept], torch.full_like(out[kept], 1 / 64 / 0.75))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_batch_axis(backend: str) -> None:
    query, key, value = torch.randn(6, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 3)
    out = mh.attention(query, key, value, mask=mh.Causal(), backend=backend)
    batched = (x[None] for x in (query, key, value))
    assert torch.equal(out, mh.attention(*batched, mask=mh.Causal(), backend=backend)[0])
    if backend != "sdpa":
        _, lse = mh.attention(query, key, value, return_lse=True, backend=backend)
        assert lse.shape == (6, 5)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_partial_results_merge_by_their_lse(backend: str) -> None:
    query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 23, 8), torch.randn(1, 2, 23, 8)
    parts = [
        mh.attention(query, key[:, :, s], value[:, :, s], return_lse=True, backend=backend)
        for s in (slice(0, 11), slice(11, 23))
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (part - lse).exp()[..., None] for out, part in parts)
    torch.testing.assert_close(merged, mh.attention(query, key, value, backend=backend))
