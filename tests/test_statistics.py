"""The statistics kernel: on the grid of masks, against the definition, under every instruction set.

test_attention.py runs this file again with each instruction set that the machine has.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import BIASES, MASKS, Built, Case, build
from formulas import FORMULAS, Dense, heat_map
from native_calls import arguments_of
from tolerance import assert_close_to_oracle
from torch import Tensor
from torch.utils._pytree import tree_leaves

import manyheads as mh
from manyheads.backends import native, reference
from manyheads.functional import prepare
from manyheads.inspect import functional, kernels
from manyheads.spec import AttentionCall

OPERATOR = torch.ops.manyheads.attention_statistics.default

FORMULAS_HERE = {
    one: formula for one, formula in FORMULAS.items() if not isinstance(one, mh.HeadSimilarity)
}
#: All that one pass can take.
EVERYTHING = (
    *(mh.LogSumExp(), mh.MaxLogit(), mh.Entropy(), mh.MeanDistance(), mh.FirstKeysMass(3)),
    *(mh.OffsetMass(-1), mh.OffsetMass(0), mh.TopKeys(5), mh.Received(), mh.HeatMap(5, 7)),
)


def grid() -> list[Case]:
    """Every mask with a bias, the other axes in rotation; then sizes past each cut of the kernel.

    Heads of which as many as divide a vector are stacked; 1 to 8 stacked queries; several spans of
    rows; more keys than one level of sums has.
    """
    heads = [(3, 3), (6, 2), (5, 1), (4, 2), (16, 2), (12, 2)]
    lengths = [(29, 37), (1, 41), (53, 53), (67, 131), (7, 5), (2, 13), (97, 11)]
    layouts = ["contiguous", "rows_first", "expanded", "sliced", "columns_first"]
    biases = list(BIASES)
    cases = [
        Case(mask, biases[i % 6], heads[i % 6], (17, 3), lengths[i % 7], layouts[i % 5])
        for i, mask in enumerate(MASKS)
    ]
    cases += [
        Case(mask, bias, (6, 2), (19, 5), (23, 31), "rows_first", sinks=i % 2 == 0, dtype=dtype)
        for i, (mask, bias) in enumerate(
            [("causal", "none"), ("window", "alibi"), ("dense", "row")]
        )
        for dtype in (torch.bfloat16, torch.float16)
    ]
    # Several of a batch: one number alone is compared with the luck of eager's rounding.
    steps = ("causal", "sink_window", "lengths")
    cases += [Case(m, heads=(8, 2), lengths=(2, 301), batch=3) for m in steps]
    cases += [
        Case(
            "causal", "none", (2, 1), (130, 3), (11, 263), scale=scale, softcap=softcap, sinks=sinks
        )
        for scale, softcap, sinks in ((0.31, 2.5, False), (0.0, None, True), (-0.7, None, False))
    ]
    cases += [Case("causal", heads=(1, 1), sizes=(7, 7), lengths=(811, 811), batch=1)]
    cases += [Case("none", heads=(2, 1), sizes=(5, 5), lengths=(3, 4999), batch=1)]
    cases += [Case("causal", batch=0), Case(lengths=(0, 7)), Case(lengths=(7, 0), sinks=True)]
    return cases


def check(built: Built, case: Case, answers: tuple[Tensor, ...]) -> None:
    exact, plain = Dense(built, case, torch.float64), Dense(built, case, torch.float32)
    for formula, answer in zip(FORMULAS_HERE.values(), answers, strict=True):
        assert_close_to_oracle(answer, formula(exact), formula(plain), torch.float32)


def in_two_passes(call: AttentionCall, needs_lse: bool, questions: tuple[object, ...]):
    """`native.run_and_measure` as it is where scores are too many to be kept."""
    out, lse, stats, scores = native.run_with_stats(call, needs_lse)
    return out, lse, stats, scores, OPERATOR(stats, *scores, *questions)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("case", grid(), ids=str)
def test_grid(case: Case, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With scores kept by the forward pass, and computed again."""
    monkeypatch.setattr(functional, "_measure_blocks", lambda call, asked: _none(asked))
    if not kept:
        monkeypatch.setattr(native, "run_and_measure", in_two_passes)
    built = build(case)
    check(built, case, mh.measure(built.problem.query, built.problem.key, FORMULAS_HERE,
                                  **built.arguments))  # fmt: skip


def _none(asked: tuple[mh.Measure, ...]) -> tuple[()]:
    assert not asked
    return ()


def call_of(case: Case, seed: int = 0) -> AttentionCall:
    built = build(case, seed)
    given = {"dropout_p": 0.0, "needs_lse": False, **built.arguments}
    tensors = (built.problem.query, built.problem.key, built.problem.value)
    return prepare(*tensors, **given)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(1, 263), (67, 263)], ids=str)
def test_with_the_forward_pass(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    """One forward pass gives the output and what measuring needs."""
    case = Case("sink_window", "alibi", (6, 2), (19, 23), lengths, sinks=True, dtype=dtype)
    call = call_of(case)
    out, lse, answers = functional.attend_and_measure(native.run, call, EVERYTHING)
    assert lse is None
    assert torch.equal(out, native.run(call)[0])
    for one, other in zip(answers, functional.measure_call(call, EVERYTHING), strict=True):
        assert all(map(torch.equal, tree_leaves(one), tree_leaves(other)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("keys", [263, 8192, 8193], ids=str)
def test_the_forward_pass_is_the_same_with_and_without(keys: int, dropout_p: float) -> None:
    """Up to 8,192 keys a tile's scores are kept; both ways are one call."""
    given = [torch.randn(2, heads, n, 8) for heads, n in ((6, 67), (3, keys), (3, keys))]
    masking = (mh.Causal() & mh.Window(5000, 0), mh.Alibi())
    call, *_ = prepare(*given, *masking, None, 3.0, torch.randn(6), dropout_p, None, True)
    asked = (mh.Entropy(), mh.MaxLogit(), mh.TopKeys(5), mh.Received(), mh.HeatMap(5, 7))
    results = []
    for run in (native.run_and_measure, in_two_passes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "run_and_measure", run)
            torch.manual_seed(3)
            results.append(tree_leaves(functional.attend_and_measure(native.run, call, asked)))
    torch.manual_seed(3)
    out, lse = native.run(call)
    for (first, second, *answers), again in (results, results[::-1]):
        assert torch.equal(first, out) and torch.equal(second, lse)
        for one, other in zip(answers, again[2:], strict=True):
            torch.testing.assert_close(one, other)


def test_gradients_and_other_backends_are_left_to_pytorch() -> None:
    call = call_of(Case("causal", heads=(6, 2), lengths=(11, 13)))
    asked = (mh.Entropy(), mh.HeadSimilarity(), mh.Entropy())
    out, lse, answers = functional.attend_and_measure(
        reference.run, replace(call, needs_lse=True), asked
    )
    assert torch.equal(out, reference.run(call)[0]) and lse is not None
    assert torch.equal(answers[0], answers[2]) and answers[1].shape == (2, 6, 6)
    leaf = call.query.clone().requires_grad_()
    *_, (entropy, _, _) = functional.attend_and_measure(
        native.run, replace(call, query=leaf), asked
    )
    entropy.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    torch.testing.assert_close(entropy.detach(), answers[0])


def leaves_of(call: AttentionCall) -> list[Tensor]:
    return tree_leaves(functional.measure_call(call, EVERYTHING))


def test_the_same_bits_for_any_threads_batch_and_heads(threads) -> None:
    call = call_of(Case("causal", heads=(6, 3), lengths=(1031, 1031), batch=2))
    threads(1)
    alone = leaves_of(call)
    for count in (2, 3):
        threads(count)
        assert all(map(torch.equal, alone, leaves_of(call)))
    heads = slice(2, 4)
    part = replace(
        call,
        query=call.query[1:, heads],
        key=call.key[1:, 1:2],
        geometry=replace(call.geometry, batch=1, q_heads=2),
    )
    assert all(torch.equal(a[1:, heads], b) for a, b in zip(alone, leaves_of(part), strict=True))


def test_equal_scores_give_the_first_keys() -> None:
    """Over blocks, lanes and a list that is full."""
    query, key = torch.randn(1, 2, 67, 8), torch.ones(1, 2, 331, 8)
    key[:, :, 200:203] = 2.0
    (top,) = mh.measure(query.abs(), key, [mh.TopKeys(7)], mask=mh.Causal())
    for row in (0, 30, 66):
        seen = row + 331 - 67 + 1
        first = [k for k in (200, 201, 202) if k < seen]
        assert top.keys[0, 1, row].tolist() == [*first, *range(7 - len(first))]


SCORES = {
    "few values": lambda n: torch.randint(5, (n,)),
    "ascending": lambda n: torch.arange(n),
    "descending": lambda n: -torch.arange(n),
    "equal": lambda n: torch.ones(n),
    "largest together": lambda n: torch.arange(n).sub(n // 2).abs().clamp(max=23).neg(),
    "negative and zero": lambda n: -torch.randint(2, (n,)),
    "largest floats": lambda n: torch.where(torch.arange(n) % 97 == 5, 3.4028234e38, -3e38),
    "infinite": lambda n: torch.where(torch.arange(n) % 97 == 5, torch.inf, 1.0),
    "large far apart": lambda n: torch.arange(n) + n * (torch.arange(n) % 37 == 5),
}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("k", [1, 8, 41])
@pytest.mark.parametrize("scores", SCORES)
def test_top_keys_in_every_order(
    scores: str, k: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the heaviest lie, and of equal ones the first."""
    if not kept:
        monkeypatch.setattr(native, "run_and_measure", in_two_passes)
    queries, keys = 131, 1511
    score = SCORES[scores](keys).float()
    query, key = torch.ones(1, 1, queries, 1), score.view(1, 1, -1, 1)
    mask = mh.Causal() & mh.Window(1301, 0)
    for start in (0, keys - queries):
        (top,) = mh.measure(query, key, [mh.TopKeys(k)], mask=mask, scale=1.0, query_start=start)
        for row in (0, 7, 40, 41, 100, queries - 1):
            first, end = max(0, start + row - 1301), start + row + 1
            expected = score[first:end].argsort(descending=True, stable=True)[:k] + first
            missing = [-1] * (k - len(expected))
            assert top.keys[0, 0, row].tolist() == expected.tolist() + missing


def test_top_keys_of_two_ranges() -> None:
    """Keys between them have no part, nor what an earlier call left in memory for them."""
    queries, keys = 131, 1511
    query, score = torch.ones(1, 1, queries, 1), torch.arange(keys).float().view(1, 1, -1, 1)
    two_ranges = mh.Causal() & (mh.Window(5, 0) | mh.FirstKeys(40))
    for offset, mask in ((0, None), (-5000, two_ranges)):
        (top,) = mh.measure(query, score + offset, [mh.TopKeys(8)], mask=mask, scale=1.0)
    for row in (0, 40, queries - 1):
        last = keys - queries + row
        assert top.keys[0, 0, row].tolist() == [*range(last, last - 6, -1), 39, 38]


def test_large_scores_differ_as_they_did() -> None:
    """Recomputed in another order, scores of 1e4 would be off by more than weights bear."""
    generator = torch.Generator().manual_seed(5)
    query, key = (torch.randn(1, 2, n, 64, generator=generator) * 80 for n in (67, 301))
    top, first = mh.measure(query, key, [mh.TopKeys(1), mh.MaxLogit()], scale=1.0)
    assert first.max() > 1e4
    alone = top.weights[top.weights > 0.6]
    assert len(alone) > 100 and (alone <= 1).all() and (alone == 1).any()


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1)], ids=str)
def test_zoom(heads: tuple[int, int]) -> None:
    case = Case("causal", heads=heads, lengths=(431, 571))
    built = build(case)
    windows = [
        ((100, 347), (211, 509)),
        ((420, 431), (0, 571)),
        ((5, 5), (3, 9)),
        ((0, 97), (7, 8)),
    ]
    questions = [mh.HeatMap(64, 61, *window) for window in windows]
    exact, plain = (Dense(built, case, t) for t in (torch.float64, torch.float32))
    answers = mh.measure(built.problem.query, built.problem.key, questions, **built.arguments)
    for (rows, keys), answer in zip(windows, answers, strict=True):
        formula = heat_map(64, 61, slice(*rows), slice(*keys))
        assert_close_to_oracle(answer, formula(exact), formula(plain), torch.float32)


@pytest.mark.parametrize("cells", [1, 3, 5, 40])
def test_maps_whose_cells_reach_over_spans_of_rows(cells: int) -> None:
    """A span has a part in the cells that its first and last row fall into as well."""
    case = Case("causal", heads=(2, 1), sizes=(7, 7), lengths=(811, 67), batch=1, query_start=0)
    built = build(case)
    windows = [((0, 811), (0, 67)), ((97, 809), (1, 67))]
    questions = [mh.HeatMap(cells, 3, *window) for window in windows]
    exact, plain = (Dense(built, case, t) for t in (torch.float64, torch.float32))
    answers = mh.measure(built.problem.query, built.problem.key, questions, **built.arguments)
    for (rows, keys), answer in zip(windows, answers, strict=True):
        formula = heat_map(cells, 3, slice(*rows), slice(*keys))
        assert_close_to_oracle(answer, formula(exact), formula(plain), torch.float32)


def test_more_masses_than_one_pass_takes() -> None:
    built = build(Case("causal", heads=(3, 3), lengths=(13, 29)))
    questions = [mh.FirstKeysMass(n) for n in range(1, 12)]
    questions += [mh.OffsetMass(n) for n in (*range(-9, 3), 10**15, -(10**15))]
    given = (built.problem.query, built.problem.key, questions)
    answers = mh.measure(*given, **built.arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "answered_here", lambda call, asked: ())
        expected = mh.measure(*given, **built.arguments)
    for one, other in zip(answers, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_row_that_does_not_count_is_no_part_of_sums() -> None:
    query, key = torch.randn(1, 2, 19, 8), torch.randn(1, 2, 31, 8)
    questions = [mh.Received(last=3), mh.HeatMap(2, 3, queries=(16, 19))]
    clean = mh.measure(query, key, questions)
    query[:, :, 5] = torch.nan
    for one, other in zip(clean, mh.measure(query, key, questions), strict=True):
        assert torch.equal(one, other)


def operator_arguments(case: Case, *asked: mh.Measure):
    call = call_of(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "run_and_measure", in_two_passes)
        return arguments_of(OPERATOR, lambda: functional.measure_call(call, asked))


@pytest.mark.parametrize("asked", [EVERYTHING, (mh.Entropy(),), (mh.TopKeys(3),)], ids=len)
def test_opcheck(asked: tuple[mh.Measure, ...]) -> None:
    case = Case("lengths", "relative", (6, 2), lengths=(5, 41), sinks=True)
    torch.library.opcheck(OPERATOR, operator_arguments(case, *asked))


def test_opcheck_with_the_forward_pass() -> None:
    call = call_of(Case("lengths", "relative", (6, 2), lengths=(5, 41), sinks=True))
    operator = torch.ops.manyheads.attention_measured.default
    for asked in (EVERYTHING, (mh.Entropy(),)):
        run = lambda asked=asked: functional.attend_and_measure(native.run, call, asked)  # noqa: E731
        torch.library.opcheck(operator, arguments_of(operator, run))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, torch.zeros(2, 2, 6, 4), "stats float32"),
        (18, [1] * 9, "no more than 8"),
        (19, [1] * 9, "no more than 8"),
        (20, 42, "top from 0 to Lk"),
        (21, [1, 2], "1 number in received"),
        (22, [0, 6, 1, 0, 41, 1], "inside the rows and keys"),
        (22, [0, 5, 1, 7, 9, 3], "cells no more"),
    ],
)
def test_bare_operator_refuses(place: int, value: object, words: str) -> None:
    arguments = list(operator_arguments(Case("causal", heads=(6, 2), lengths=(5, 41)), *EVERYTHING))
    assert type(arguments[place]) is type(value)
    arguments[place] = value
    with pytest.raises(RuntimeError, match=words):
        OPERATOR(*arguments)
