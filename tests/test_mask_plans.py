"""Which plan each mask becomes, and what that costs."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_checks import DOCS, LENGTHS, SINKS, check_lowering, geometry, rows_of
from torch._subclasses.fake_tensor import FakeTensorMode

from manyheads import masks
from manyheads.masks import (
    Causal,
    Chunks,
    Dense,
    Documents,
    FirstKeys,
    KeyLengths,
    KeyRange,
    Predicate,
    QueryRows,
    Window,
)
from manyheads.spec import BandPlan, FullPlan, IntervalsPlan

# --- What lowers to what ----------------------------------------------------------------------

STARTS = torch.tensor([0, 2, 6], dtype=torch.int32)

BANDS = [
    (Causal(), BandPlan(right=0)),
    (Window(3, 0), BandPlan(left=3, right=0)),
    (Window(3, None), BandPlan(left=3)),
    (Causal() & Window(3, 2), BandPlan(left=3, right=0)),
    (Window(3, 1) | Window(0, 2), BandPlan(left=3, right=2)),
    (Causal() | FirstKeys(3), BandPlan(right=0, first_n=3, first_within_right=False)),
    (Causal() | FirstKeys(LENGTHS), BandPlan(None, 0, LENGTHS, False)),
    (Causal() & (Window(2, 0) | FirstKeys(1)), BandPlan(2, 0, 1)),
    ((Window(2, 0) | FirstKeys(1)) & Causal(), BandPlan(2, 0, 1)),
    ((Causal() & Window(2, 0)) | (Causal() & FirstKeys(1)), BandPlan(2, 0, 1)),
    (Window(2, 0) | FirstKeys(1), BandPlan(2, 0, 1, False)),
    (Causal() & Window(2, 0) | FirstKeys(1), BandPlan(2, 0, 1, False)),
    ((Causal() | FirstKeys(2)) & (Window(4, 0) | FirstKeys(2)), BandPlan(4, 0, 2, False)),
    (FirstKeys(2), BandPlan(key_end=2)),
    (Causal() & FirstKeys(2), BandPlan(right=0, key_end=2)),
    (Window(2, 0) & FirstKeys(2), BandPlan(2, 0, key_end=2)),
    (KeyRange(2), BandPlan(key_start=2)),
    (KeyRange(2, 5), BandPlan(key_start=2, key_end=5)),
    (KeyRange(2, 50), BandPlan(key_start=2)),
    (Causal() & KeyRange(STARTS), BandPlan(right=0, key_start=STARTS)),
    (KeyRange(STARTS) & (Causal() | FirstKeys(2)), BandPlan(None, 0, 2, False, STARTS)),
    (
        Causal() & (Window(2, 0) | FirstKeys(1)) & KeyRange(STARTS, 6),
        BandPlan(2, 0, 1, True, STARTS, 6),
    ),
    (KeyLengths(LENGTHS), BandPlan(key_end=LENGTHS)),
    (Causal() & KeyLengths([7, 5, 3]), BandPlan(right=0, key_end=LENGTHS)),
    (Causal() & KeyLengths(6), BandPlan(right=0, key_end=6)),
    (Causal() & KeyLengths(LENGTHS) & KeyRange(1, 5), BandPlan(None, 0, 0, True, 1, LENGTHS)),
    (~~Causal(), BandPlan(right=0)),
]


def same_number(got, expected):
    if isinstance(expected, torch.Tensor):
        return isinstance(got, torch.Tensor) and got.dtype == torch.int32
    return type(got) is type(expected) and got == expected


@pytest.mark.parametrize(("mask", "expected"), BANDS, ids=lambda value: repr(value)[:60])
def test_common_forms_are_bands(mask, expected):
    where = geometry(5, 7, batch=3)
    plan = check_lowering(mask, where)
    assert isinstance(plan, BandPlan)
    for name in ("left", "right", "first_n", "key_start", "key_end"):
        assert same_number(getattr(plan, name), getattr(expected, name)), (name, plan)
    if not same_number(expected.first_n, 0):
        assert plan.first_within_right == expected.first_within_right


@pytest.mark.parametrize(
    "mask", [None, Window(None, None), KeyRange(0), Causal() | Window(0, None), KeyLengths(7)]
)
def test_masks_that_allow_everything_are_full(mask):
    plan, positions = masks.lower(mask, geometry(5, 7))
    assert isinstance(plan, FullPlan) and positions.start == 2


INTERVALS = [
    (DOCS, 1),
    (Causal() & DOCS, 1),
    (DOCS & Window(2, 0), 1),
    (DOCS & (Window(2, 0) | Window(0, 1)), 1),
    (DOCS & (Causal() | FirstKeys(2)), 1),
    (DOCS & SINKS, 2),
    (DOCS | QueryRows([1]), 1),
    (Chunks(3), 1),
    (Causal() & Chunks(3), 1),
    (DOCS & Chunks(2) & Causal(), 1),
    (~Causal(), 1),
    (~Window(1, 1), 2),
    (~KeyRange(2, 4), 2),
    (~KeyRange(2), 1),
    (~DOCS, 2),
    (~~(Causal() | DOCS), 2),
    (Causal() | DOCS, 2),
    (Causal() | KeyRange(0, 3) | FirstKeys(4), 1),
    (~Causal() | KeyRange(3), 1),
    (Window(1, 1) & ~Chunks(3), 2),
    (QueryRows([0, 3]), 1),
    (Window(1, 1) | QueryRows([0, 3]), 1),
    (Window(1, 1) | FirstKeys(1) | QueryRows([0]), 2),
    (~QueryRows([0, 3]) & Window(0, 0), 1),
    (KeyRange(0, 1) | KeyRange(3, 5) | KeyRange(6), 3),
    ((KeyRange(0, 1) | KeyRange(3, 5)) & (Chunks(2) | Window(0, 0)), 3),
    (Window(0, 0) | DOCS | Chunks(2) | KeyRange(3, 4), 4),
    (Window(2, 0) & FirstKeys(1) | KeyRange(3, 4), 2),
    (Window(2, 3) | (Causal() & FirstKeys(4)), 2),
    (Window(2, 3) & (Causal() | FirstKeys(4)), 1),
]


@pytest.mark.parametrize(("mask", "count"), INTERVALS, ids=lambda value: repr(value)[:60])
def test_the_number_of_ranges_follows_from_the_expression(mask, count):
    plan = check_lowering(mask, geometry(5, 7))
    assert isinstance(plan, IntervalsPlan)
    assert plan.ranges.shape == (1, 1, 5, count, 2)


def test_the_number_of_ranges_is_not_read_off_numbers():
    for cut in ([0, 5], [2, 3], [5, 0]):
        where = geometry(5, 5)
        plan, _ = masks.lower(Documents(torch.tensor(cut)) | Window(0, 0), where)
        assert plan.ranges.shape[3] == 2


def test_too_many_ranges_are_dense_and_say_so():
    mask = KeyRange(0, 1) | KeyRange(2, 3) | KeyRange(4, 5) | KeyRange(6, 7) | Window(0, 0)
    plan = check_lowering(mask, geometry(5, 7))
    assert plan.kind == "dense" and not plan.from_user
    assert "up to 5 key ranges per query row, and a compact plan holds 4" in plan.reason
    assert "KeyRange(0, 1) | KeyRange(2, 3)" in plan.reason
    many = functools.reduce(operator.or_, [KeyRange(2 * i, 2 * i + 1) for i in range(40)])
    plan = check_lowering(many, geometry(3, 83))
    assert plan.kind == "dense" and "more than 16 key ranges" in plan.reason
    # A complement can bring an intermediate result back.
    assert check_lowering(~(~mask & KeyRange(0, 1)), geometry(5, 7)).kind == "dense"
    four = Window(0, 0) | DOCS | Chunks(2) | KeyRange(3, 4)
    assert check_lowering(~~four, geometry(5, 7)).kind == "intervals"


def test_a_dense_mask_becomes_intervals_if_its_rows_are_runs():
    runs = (torch.arange(29)[:, None] // 4 == torch.arange(31) // 4) | (torch.arange(31) < 2)
    plan = check_lowering(Dense(runs), geometry(29, 31))
    assert isinstance(plan, IntervalsPlan) and plan.ranges.shape == (1, 1, 29, 2, 2)
    per_head = torch.stack([runs, runs.roll(1, 0), ~runs])[None]
    plan = check_lowering(Dense(per_head), geometry(29, 31, batch=2, q_heads=3))
    assert plan.ranges.shape[:3] == (1, 3, 29)
    assert (
        check_lowering(Dense(per_head) & Causal(), geometry(29, 31, q_heads=3)).kind == "intervals"
    )
    plan, _ = masks.lower(torch.ones(3, 5, dtype=torch.bool).tril(), geometry(3, 5))
    assert plan.ranges.tolist() == [[[[[0, 1]], [[0, 2]], [[0, 3]]]]]


def test_a_dense_mask_without_runs_is_used_as_it_is():
    checkered = (torch.arange(11)[:, None] + torch.arange(13)) % 2 == 0
    plan = check_lowering(Dense(checkered), geometry(11, 13))
    assert plan.kind == "dense" and plan.from_user
    assert plan.allowed.data_ptr() == checkered.data_ptr()
    assert plan.reason == "Dense(tensor(bool[11, 13])): some rows have more than 4 runs of keys"
    combined = check_lowering(Dense(checkered) & Causal(), geometry(11, 13))
    assert combined.kind == "dense" and not combined.from_user


BROADCAST = [(2, 1, 1, 13), (1, 3, 1, 13), (2, 3, 1, 13), (1, 13), (11, 1), (2, 1, 11, 1), (1, 1)]


@pytest.mark.parametrize("shape", BROADCAST, ids=str)
@pytest.mark.parametrize("density", [0.5, 0.9])
def test_a_dense_mask_broadcasts(shape, density):
    where = geometry(11, 13, batch=2, q_heads=3)
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < density
    mask = Dense(allowed)
    for whole in (mask, Causal() & mask, mask | Window(1, 0), ~mask, mask & Dense(~allowed)):
        check_lowering(whole, where)
    full = Dense(allowed[(None,) * (4 - len(shape))].expand(2, 3, 11, 13))
    size = dict(batch=2, q_heads=3)
    assert torch.equal(
        mask.materialize(11, 13, **size).expand(2, 3, 11, 13), full.materialize(11, 13, **size)
    )


def test_a_broadcast_dense_mask_takes_no_memory_per_pair():
    count = 200_000  # 40 GB as bools
    where = geometry(count, count)
    holes = (torch.arange(count) % 3 > 0)[None, None, None]
    plan = masks.lower(holes, where)[0]
    assert plan.kind == "dense" and plan.allowed.data_ptr() == holes.data_ptr()
    assert plan.allowed.shape == (1, 1, count, count) and plan.allowed.stride(2) == 0
    two_ranges = masks.lower(~KeyRange(5, 7).materialize(1, count), where)[0]
    assert two_ranges.ranges.shape == (1, 1, count, 2, 2)
    some_rows = masks.lower(holes.mT, where)[0]
    assert some_rows.ranges[0, 0, :3, 0].tolist() == [[0, 0], [0, count], [0, count]]


def test_a_dense_mask_is_scanned_once_and_again_after_a_change():
    tensor = torch.ones(5, 7, dtype=torch.bool)
    mask = Dense(tensor)
    first = mask._scan(mask._frame(geometry(5, 7)))
    assert mask._scan(mask._frame(geometry(5, 7))) is first
    tensor[2, 3] = False
    assert rows_of(mask, 5, 7)[2] == "1110111"
    check_lowering(mask, geometry(5, 7))


def test_a_predicate_is_scanned_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr("manyheads.masks.given._PAIRS_AT_ONCE", 31 * 2 * 3 * 4)
    calls = []

    def near_or_first(b, h, p, j):
        calls.append(tuple(torch.broadcast_shapes(b.shape, h.shape, p.shape, j.shape)))
        return ((p - j).abs() <= 2) | (j < b + h)

    where = geometry(29, 31, batch=2, q_heads=3)
    plan = check_lowering(Predicate(near_or_first), where)
    assert isinstance(plan, IntervalsPlan) and plan.ranges.shape == (2, 3, 29, 2, 2)
    assert set(calls) == {(2, 3, 4, 31), (2, 3, 1, 31)}
    checkered = check_lowering(Predicate(lambda b, h, p, j: (p + j) % 2 == 0), where)
    assert checkered.kind == "dense" and checkered.allowed.shape == (1, 1, 29, 31)
    assert "<lambda>" in checkered.reason and "more than 4 runs" in checkered.reason
    position = check_lowering(Predicate(lambda b, h, p, j: j <= p), geometry(2, 5, query_start=1))
    assert position.ranges[..., 1].flatten().tolist() == [2, 3]


def test_lowering_needs_no_memory_per_pair():
    count = 400
    where = geometry(count * 512, count * 512)  # 42 GB as bools
    plan, positions = masks.lower(Causal() & Documents([512] * count) & SINKS, where)
    assert plan.ranges.shape == (1, 1, count * 512, 2, 2)
    assert plan.ranges[0, 0, 1000].tolist() == [[512, 513], [999, 1001]]
    assert positions.rows[0, 1000] == 1000
    assert masks.lower(SINKS, where)[0] == BandPlan(1, 0, 1)


PLAIN = st.recursive(
    st.one_of(
        st.builds(Causal),
        st.builds(Window, st.none() | st.integers(0, 4), st.none() | st.integers(0, 4)),
        st.builds(FirstKeys, st.integers(0, 5)),
        st.builds(KeyRange, st.integers(0, 3), st.integers(3, 8)),
        st.builds(Chunks, st.integers(1, 5)),
    ),
    lambda masks_: st.one_of(
        st.builds(operator.and_, masks_, masks_),
        st.builds(operator.or_, masks_, masks_),
        st.builds(operator.invert, masks_),
    ),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(PLAIN, st.lists(st.tuples(st.integers(1, 4), st.integers(1, 11)), min_size=3, max_size=5))
def test_one_mask_serves_calls_of_every_size(mask, sizes):
    """Short calls first: first keys are then all keys, and a plan kept from there would say so."""
    for q_len, k_len in sorted(sizes, key=lambda size: size[1]):
        check_lowering(mask, geometry(q_len, k_len))


def test_plans_of_plain_numbers_are_kept_and_others_follow_their_tensors():
    where = geometry(5, 7)
    docs = Causal() & DOCS
    assert masks.lower(docs, where)[0] is masks.lower(docs, geometry(5, 7))[0]
    assert masks.lower(SINKS, where)[0] is masks.lower(SINKS, geometry(1, 99))[0]
    assert masks.lower(SINKS, geometry(1, 99))[1].start == 98
    lengths = torch.tensor([5, 7])
    mask = Causal() & KeyLengths(lengths)
    where = geometry(5, 7, batch=2)
    check_lowering(mask, where)
    lengths[0] = 3
    plan = check_lowering(mask, where)
    assert plan.key_end.tolist() == [3, 7]
    with torch.inference_mode():
        made_there = masks.lower(docs, geometry(5, 7))[0]
    assert made_there.ranges.is_inference()
    assert not masks.lower(docs, geometry(5, 7))[0].ranges.is_inference()


def test_what_is_kept_is_neither_large_nor_fake():
    docs = Causal() & Documents([2, 3])
    with FakeTensorMode():
        masks.lower(docs, geometry(5, 5))
    assert masks.lower(docs, geometry(5, 5))[0].ranges.tolist()[0][0][4] == [[2, 5]]
    dense = functools.reduce(operator.or_, [KeyRange(2 * i, 2 * i + 1) for i in range(5)])
    first, second = (masks.lower(dense, geometry(9, 11))[0] for _ in range(2))
    assert first.kind == "dense" and first is not second
