"""The mask algebra against a definition written here, in plain Python, from the English meanings.

`meaning` decides one (batch element, head, row, key) at a time with loops and ints, and shares no
code with the masks. Random expressions compare it with `materialize` and with the lowered plan.
"""

from __future__ import annotations

import copy
import doctest
import functools
import itertools
import operator
import pickle
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import manyheads as mh
from manyheads import masks
from manyheads.errors import ArgumentError, ArgumentTypeError, DeviceError, ShapeError
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
from manyheads.spec import BandPlan, FullPlan, Geometry, IntervalsPlan

CPU = torch.device("cpu")


def geometry(q_len, k_len, *, batch=1, q_heads=1, query_start=None):
    return Geometry(batch, q_heads, q_len, k_len, CPU, query_start)


def rows_of(mask, q_len, k_len, **sizes):
    """The mask of batch element 0, head 0 as strings of 0 and 1."""
    allowed = mask.materialize(q_len, k_len, **sizes)[0, 0]
    return ["".join("01"[int(bit)] for bit in row) for row in allowed]


def check_lowering(mask, where):
    """The lowered plan means what the mask means; returns the plan."""
    plan, positions = masks.lower(mask, where)
    defined = mask.materialize(
        where.q_len,
        where.k_len,
        batch=where.batch,
        q_heads=where.q_heads,
        query_start=where.query_start,
    )
    size = (where.batch, where.q_heads, where.q_len, where.k_len)
    lowered = plan.materialize(where, positions)
    assert defined.dtype == lowered.dtype == torch.bool
    assert defined.dim() == 4 and defined.shape[2:] == size[2:]
    assert torch.equal(lowered.expand(size), defined.expand(size))
    return plan


# --- The meaning, one pair at a time ---------------------------------------------------------


@dataclass
class World:
    """Sizes and alignment of one random call; q_docs and k_docs are a list per batch element."""

    batch: int
    heads: int
    q_len: int
    k_len: int
    query_start: list[int] | None = None
    lengths: list[int] | None = None
    q_docs: list[list[int]] | None = None
    k_docs: list[list[int]] | None = None
    uses: set[str] = field(default_factory=set)

    def document(self, lengths, place):
        for number, length in enumerate(lengths):
            if place < length:
                return number
            place -= length
        raise AssertionError("past the last document")

    def position(self, b, r):
        if "documents" in self.uses:
            queries, keys = self.q_docs[b], self.k_docs[b]
            d = self.document(queries, r)
            local = r - sum(queries[:d])
            return sum(keys[:d]) + keys[d] - queries[d] + local
        if self.query_start is not None:
            return self.query_start[b] + r
        if "lengths" in self.uses:
            return self.lengths[b] - self.q_len + r
        return self.k_len - self.q_len + r


def meaning(node, world, b, h, r, j, start=0, in_documents=False):
    """Whether row r may attend to key j, from the words of the documentation."""
    kind, *values = node
    p = world.position(b, r)
    origin = start
    if in_documents:
        d = world.document(world.q_docs[b], r)
        origin = max(start, sum(world.k_docs[b][:d]))
    if kind == "and":
        (parts,) = values
        start = max([start, *(part[1][b] for part in parts if part[0] == "range")])
        in_documents = in_documents or any(part[0] == "documents" for part in parts)
        return all(meaning(part, world, b, h, r, j, start, in_documents) for part in parts)
    if kind == "or":
        (parts,) = values
        return any(meaning(part, world, b, h, r, j, start, in_documents) for part in parts)
    if kind == "not":
        return not meaning(values[0], world, b, h, r, j, start, in_documents)
    if kind == "causal":
        return j <= p
    if kind == "window":
        left, right = values
        return (left is None or j >= p - left) and (right is None or j <= p + right)
    if kind == "first":
        return j < origin + values[0][b]
    if kind == "first per document":
        return j < origin + values[0][b][d]
    if kind == "chunks":
        size = values[0]
        return (p - origin) // size == (j - origin) // size
    if kind == "range":
        starts, ends = values
        return starts[b] <= j and (ends is None or j < ends[b])
    if kind == "lengths":
        return j < world.lengths[b]
    if kind == "documents":
        return world.document(world.q_docs[b], r) == world.document(world.k_docs[b], j)
    if kind == "rows":
        return r in values[0]
    if kind == "dense":
        table = values[0].reshape(
            -1, values[0].shape[-3] if values[0].ndim == 4 else 1, *values[0].shape[-2:]
        )
        return bool(table[b % table.shape[0], h % table.shape[1], r, j])
    if kind == "predicate":
        return predicate_of(*values)(b, h, p, j)
    raise AssertionError(kind)


def predicate_of(kb, kh, modulus, below):
    return lambda b, h, p, j: (kb * b + kh * h + 2 * p + j) % (modulus + 1) < below


# --- Random worlds and expressions, each as (node for `meaning`, mask) ------------------------


@st.composite
def splits(draw, total, count):
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=count - 1, max_size=count - 1)))
    return [b - a for a, b in itertools.pairwise([0, *cuts, total])]


@st.composite
def worlds(draw):
    world = World(
        batch=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 2)),
        q_len=draw(st.sampled_from([5, 1, 7, 3, 2, 0, 7])),
        k_len=draw(st.sampled_from([7, 1, 11, 2, 3, 0, 5, 11])),
    )
    per_batch = st.lists(st.integers(0, world.k_len), min_size=world.batch, max_size=world.batch)
    world.lengths = draw(per_batch)
    alignment = draw(st.sampled_from(["default", "given", "documents", "shared documents"]))
    if alignment == "given":
        starts = st.integers(-3, 9)
        world.query_start = draw(st.lists(starts, min_size=world.batch, max_size=world.batch))
    elif alignment != "default":
        count = draw(st.integers(1, 4))
        lists = 1 if alignment == "shared documents" else world.batch
        repeat = world.batch // lists
        world.q_docs = [draw(splits(world.q_len, count)) for _ in range(lists)] * repeat
        world.k_docs = [draw(splits(world.k_len, count)) for _ in range(lists)] * repeat
    return world


def numbers(draw, values, batch):
    """A number per batch element as one int, a list or a tensor: (the list, the argument)."""
    form = draw(st.sampled_from(["int", "list", "tensor", "int64 tensor"]))
    if form == "int":
        value = draw(values)
        return [value] * batch, value
    listed = draw(st.lists(values, min_size=batch, max_size=batch))
    if form == "list":
        return listed, listed
    dtype = torch.int32 if form == "tensor" else torch.int64
    return listed, torch.tensor(listed, dtype=dtype)


def draw_documents(draw, world):
    world.uses.add("documents")
    shared = all(docs == world.q_docs[0] for docs in world.q_docs) and all(
        docs == world.k_docs[0] for docs in world.k_docs
    )
    queries, keys = (world.q_docs[0], world.k_docs[0]) if shared else (world.q_docs, world.k_docs)
    if draw(st.booleans()):
        queries, keys = torch.tensor(queries), torch.tensor(keys, dtype=torch.int32)
    # One Documents object per expression, or equal ones of the same kind.
    if not hasattr(world, "documents"):
        world.documents = Documents(queries, keys)
    return ("documents",), world.documents


def draw_leaf(draw, world, in_documents):
    kinds = ["causal", "window", "first", "chunks", "range", "rows", "dense", "predicate"]
    kinds += ["causal", "window", "first", "lengths"]
    if world.q_docs is not None:
        kinds.append("documents")
    kind = draw(st.sampled_from(kinds))
    small = st.integers(0, 5)
    if kind == "causal":
        return ("causal",), Causal()
    if kind == "window":
        left, right = draw(st.none() | small), draw(st.none() | small)
        return ("window", left, right), Window(left, right)
    if kind == "first" and in_documents:
        count = len(world.q_docs[0])
        n = draw(small)
        if draw(st.booleans()):
            return ("first", [n] * world.batch), FirstKeys(n)
        rows = world.batch if draw(st.booleans()) else 1
        per = st.lists(small, min_size=count, max_size=count)
        listed = [draw(per) for _ in range(rows)]
        given_n = listed[0] if rows == 1 and draw(st.booleans()) else torch.tensor(listed)
        return ("first per document", listed * (world.batch // rows)), FirstKeys(given_n)
    if kind == "first":
        listed, given_n = numbers(draw, small, world.batch)
        return ("first", listed), FirstKeys(given_n)
    if kind == "chunks":
        size = draw(st.integers(1, 5))
        return ("chunks", size), Chunks(size)
    if kind == "range":
        starts, start = numbers(draw, st.integers(0, 4), world.batch)
        if draw(st.booleans()):
            return ("range", starts, None), KeyRange(start)
        ends, end = numbers(draw, st.integers(4, 9), world.batch)
        return ("range", starts, ends), KeyRange(start, end)
    if kind == "rows":
        rows = draw(st.sets(st.integers(0, world.q_len - 1))) if world.q_len else set()
        form = draw(st.sampled_from([sorted, torch.tensor, "bool"]))
        if form == "bool":
            chosen = torch.tensor([r in rows for r in range(world.q_len)], dtype=torch.bool)
        else:
            chosen = sorted(rows) if form is sorted else torch.tensor(sorted(rows)).long()
        return ("rows", rows), QueryRows(chosen)
    if kind == "lengths":
        world.uses.add("lengths")
        if not hasattr(world, "key_lengths"):
            as_list = draw(st.booleans())
            world.key_lengths = KeyLengths(
                world.lengths if as_list else torch.tensor(world.lengths)
            )
        return ("lengths",), world.key_lengths
    if kind == "dense":
        shape = draw(
            st.sampled_from(
                [(), (1, 1), (world.batch, 1), (1, world.heads), (world.batch, world.heads)]
            )
        )
        density = draw(st.sampled_from([0.1, 0.5, 0.9]))
        table = np.random.default_rng(draw(st.integers(0, 99))).random(
            (*shape, world.q_len, world.k_len)
        )
        return ("dense", table < density), Dense(torch.from_numpy(table < density))
    if kind == "predicate":
        values = (
            draw(st.integers(0, 1)),
            draw(st.integers(0, 1)),
            draw(st.integers(1, 9)),
            draw(small),
        )
        return ("predicate", *values), Predicate(predicate_of(*values))
    return draw_documents(draw, world)


def draw_expression(draw, world, depth, in_documents=False, parent=""):
    """`parent` keeps & out of & and ~ out of ~, which would merge into one node."""
    kinds = [kind for kind in ("and", "or", "not") if kind != parent]
    kind = draw(st.sampled_from(["leaf", *kinds, *kinds])) if depth else "leaf"
    if kind == "leaf":
        return draw_leaf(draw, world, in_documents)
    if kind == "not":
        node, mask = draw_expression(draw, world, depth - 1, in_documents, "not")
        return ("not", node), ~mask
    parts = []
    if kind == "and" and world.q_docs is not None and draw(st.booleans()):
        parts.append(draw_documents(draw, world))
    inside = in_documents or bool(parts)
    for _ in range(draw(st.integers(1 if parts else 2, 3))):
        part = draw_expression(draw, world, depth - 1, inside, kind)
        if kind == "and" and part[0] == ("documents",) and not inside:
            part = ("causal",), Causal()  # the siblings were drawn without documents
        parts.append(part)
    parts = draw(st.permutations(parts))
    nodes, objects = [part[0] for part in parts], [part[1] for part in parts]
    sign = operator.and_ if kind == "and" else operator.or_
    if draw(st.booleans()):
        return (kind, nodes), functools.reduce(sign, objects)
    return (kind, nodes), functools.reduce(lambda a, b: sign(b, a), reversed(objects))


@st.composite
def cases(draw):
    world = draw(worlds())
    node, mask = draw_expression(draw, world, depth=3)
    if "documents" in world.uses:
        world.query_start = None
    query_start = world.query_start
    if query_start is not None:
        if draw(st.booleans()):
            query_start = query_start[0]
            world.query_start = [query_start] * world.batch
        else:
            query_start = torch.tensor(query_start)
    return world, node, mask, query_start


def test_random_expressions_lower_to_what_they_mean():
    seen = Counter()

    @settings(
        max_examples=500,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def check(case):
        world, node, mask, query_start = case
        size = (world.batch, world.heads, world.q_len, world.k_len)
        expected = np.zeros(size, dtype=bool)
        for place in np.ndindex(size):
            expected[place] = meaning(node, world, *place)
        where = geometry(
            world.q_len,
            world.k_len,
            batch=world.batch,
            q_heads=world.heads,
            query_start=query_start,
        )
        plan = check_lowering(mask, where)
        defined = mask.materialize(
            world.q_len,
            world.k_len,
            batch=world.batch,
            q_heads=world.heads,
            query_start=query_start,
        )
        assert np.array_equal(defined.expand(size).numpy(), expected), mask
        _, positions = mask.lower(where)
        placed = positions.materialize(where).expand(world.batch, world.q_len)
        for b, r in np.ndindex(world.batch, world.q_len):
            assert int(placed[b, r]) == world.position(b, r)
        check_plan_form(plan, where)
        seen[plan.kind] += 1
        seen["some allowed, some not"] += bool(expected.any() and not expected.all())
        seen["documents"] += "documents" in world.uses
        seen["a row without keys"] += bool(world.k_len and (~expected.any(-1)).any())

    check()
    assert seen["band"] > 40 and seen["intervals"] > 100 and seen["dense"] > 15, seen
    assert seen["full"] > 4 and seen["documents"] > 40 and seen["a row without keys"] > 100, seen
    assert seen["some allowed, some not"] > 150, seen


def check_plan_form(plan, where):
    """What spec.py promises about a plan's tensors."""
    if isinstance(plan, IntervalsPlan):
        ranges = plan.ranges
        assert ranges.dtype == torch.int32 and ranges.is_contiguous() and ranges.dim() == 5
        b, h, rows, count, two = ranges.shape
        assert b in (1, where.batch) and h in (1, where.q_heads) and rows == where.q_len
        assert 1 <= count <= 4 and two == 2
        assert ((ranges >= 0) & (ranges <= where.k_len)).all()
    if isinstance(plan, BandPlan):
        for number in (plan.left, plan.right, plan.first_n, plan.key_start, plan.key_end):
            if isinstance(number, torch.Tensor):
                assert number.dtype == torch.int32 and number.shape == (where.batch,)
        for edge in (plan.key_start, plan.key_end):
            if edge is not None:
                assert (torch.as_tensor(edge) <= where.k_len).all()


# --- What lowers to what ----------------------------------------------------------------------

LENGTHS = torch.tensor([7, 5, 3])
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


DOCS = Documents([2, 3], [3, 4])
SINKS = Causal() & (Window(1, 0) | FirstKeys(1))

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


# --- Meanings worth a picture ------------------------------------------------------------------


def test_counts():
    allowed = {
        Causal(): 11 * 12 // 2,
        Window(3, 0): 11 * 4 - 6,
        Window(2, 2): 11 * 5 - 6,
        Causal() | FirstKeys(4): 66 + 6,
        SINKS: 1 + 2 + 3 * 9,
        Causal() & Documents([5, 6]): 15 + 21,
        Causal() & Chunks(4): 10 + 10 + 6,
        Window(0, 0) | QueryRows([2, 7]) | FirstKeys(1): 1 + 2 * 11 + 2 * 8,
    }
    for mask, count in allowed.items():
        assert int(mask.materialize(11, 11).sum()) == count, mask


def test_without_the_parentheses_the_first_rows_see_the_future():
    sinks = Causal() & (Window(1, 0) | FirstKeys(3))
    leaky = Causal() & Window(1, 0) | FirstKeys(3)
    assert repr(leaky) == "(Causal() & Window(1, 0)) | FirstKeys(3)"
    assert rows_of(sinks, 5, 5) == ["10000", "11000", "11100", "11110", "11111"]
    assert rows_of(leaky, 5, 5) == ["11100", "11100", "11100", "11110", "11111"]
    future = leaky.materialize(5, 5) & ~Causal().materialize(5, 5)
    assert int(future.sum()) == 3


def test_left_padding_changes_nothing_but_the_place():
    """A left-padded sequence gets the mask it would get alone: sinks, prefixes, chunks."""
    for mask in (
        SINKS,
        Causal() | FirstKeys(3),
        Causal() & Chunks(3),
        ~FirstKeys(2) & Causal(),
        FirstKeys(2) | Chunks(2),
    ):
        padded = (KeyRange(torch.tensor([0, 4])) & mask).materialize(11, 11, batch=2)
        assert torch.equal(padded[0], mask.materialize(11, 11)[0])
        assert torch.equal(padded[1, :, 4:, 4:], mask.materialize(7, 7)[0])
        assert not padded[1, ..., :4].any()


def test_a_packed_document_gets_what_it_would_get_alone():
    queries, keys = [2, 0, 3, 4], [5, 2, 3, 0]
    for mask in (SINKS, Causal(), Causal() | FirstKeys(2), Causal() & Chunks(2), Window(1, 1)):
        packed = (Documents(queries, keys) & mask).materialize(9, 10)[0, 0]
        row = key = 0
        for q_len, k_len in zip(queries, keys, strict=True):
            block = packed[row : row + q_len, key : key + k_len]
            assert torch.equal(block, mask.materialize(q_len, k_len)[0, 0])
            packed[row : row + q_len, key : key + k_len] = False
            row, key = row + q_len, key + k_len
        assert not packed.any()


def test_first_keys_per_document_and_per_batch_element():
    docs = Documents([3, 4])
    assert rows_of(docs & FirstKeys([1, 2]), 7, 7) == ["1000000"] * 3 + ["0001100"] * 4
    n = torch.tensor([[1, 2], [3, 0]])
    both = (docs & FirstKeys(n)).materialize(7, 7, batch=2)
    assert both.sum(-1)[:, 0].tolist() == [[1] * 3 + [2] * 4, [3] * 3 + [0] * 4]
    ragged = Documents([[3, 4], [7]])
    check_lowering(ragged & Causal(), geometry(7, 7, batch=2))
    assert ragged.materialize(7, 7, batch=2).sum(-1)[:, 0].tolist() == [[3] * 3 + [4] * 4, [7] * 7]


def test_first_keys_outside_the_documents_count_from_key_zero():
    mask = (Documents([2, 2]) & Causal()) | FirstKeys(1)
    assert rows_of(mask, 4, 4) == ["1000", "1100", "1010", "1011"]


def test_nested_key_ranges_and_documents_count_from_the_last_start():
    nested = KeyRange(2) & ((KeyRange(1) & FirstKeys(2)) | Window(0, 0))
    assert rows_of(nested, 5, 5) == ["00110", "00110", "00110", "00110", "00111"]
    in_documents = Documents([3, 2]) & KeyRange(1) & FirstKeys(1)
    assert rows_of(in_documents, 5, 5) == ["01000"] * 3 + ["00010"] * 2
    for mask in (nested, in_documents):
        check_lowering(mask, geometry(5, 5))


def test_ranges_that_overlap_stay_within_their_bound():
    mask = (Window(1, 1) | Chunks(3)) & (Window(1, 1) | Chunks(4))
    plan = check_lowering(mask, geometry(11, 11))
    assert plan.ranges.shape == (1, 1, 11, 3, 2)


def test_global_rows_and_keys():
    mask = Window(1, 1) | FirstKeys(1) | QueryRows(range(1))
    assert rows_of(mask, 5, 5) == ["11111", "11100", "11110", "10111", "10011"]
    for rows in ([True, False, False], torch.tensor([0]), torch.tensor([True, False, False])):
        assert rows_of(QueryRows(rows), 3, 2) == ["11", "00", "00"]


def test_alignment():
    def start(mask, **given_start):
        return masks.lower(mask, geometry(2, 7, batch=3, **given_start))[1].start

    assert start(Causal()) == start(None) == 5
    assert start(Causal(), query_start=0) == start(None, query_start=0) == 0
    assert start(Causal(), query_start=LENGTHS).dtype == torch.int32
    assert start(KeyLengths(LENGTHS) & Causal()).tolist() == [5, 3, 1]
    assert start(Causal() | ~KeyLengths([7, 5, 3])).tolist() == [5, 3, 1]
    assert start(KeyLengths(4)) == 2
    assert start(KeyLengths(LENGTHS) & Causal(), query_start=1) == 1
    assert start(KeyLengths(1) | KeyLengths(2), query_start=1) == 1
    assert start(KeyLengths([1, 2, 3]) | KeyLengths([1, 2, 3])).tolist() == [-1, 0, 1]
    rows = masks.lower(DOCS, geometry(5, 7))[1].rows
    assert rows.dtype == torch.int32 and rows.tolist() == [[1, 2, 4, 5, 6]]
    with_lengths = Causal() & Documents([2, 0], [4, 3]) & KeyLengths(3)
    assert rows_of(with_lengths, 2, 7) == ["1110000", "1110000"]


@pytest.mark.parametrize(("q_len", "k_len"), [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_empty_sizes(q_len, k_len):
    docs = Documents([0, q_len], [k_len, 0])
    for mask in (Causal(), SINKS, Chunks(3), docs, ~docs, QueryRows([]), KeyLengths(0)):
        check_lowering(mask, geometry(q_len, k_len))
        check_lowering(~mask | SINKS, geometry(q_len, k_len))
    check_lowering(Dense(torch.ones(q_len, k_len, dtype=torch.bool)), geometry(q_len, k_len))
    check_lowering(Dense(torch.ones(1, k_len, dtype=torch.bool)), geometry(q_len, k_len))
    check_lowering(Dense(torch.ones(q_len, 1, dtype=torch.bool)), geometry(q_len, k_len))
    check_lowering(Predicate(lambda b, h, p, j: j <= p), geometry(q_len, k_len))


def test_nothing_at_all():
    check_lowering(Documents([]), geometry(0, 0))
    nothing = ~KeyRange(0)
    plan = check_lowering(nothing, geometry(3, 5))
    assert plan.ranges.shape == (1, 1, 3, 1, 2) and not plan.ranges.any()
    assert check_lowering(~nothing, geometry(3, 5)).kind == "full"
    check_lowering(nothing | Chunks(2), geometry(3, 5))
    check_lowering(nothing & Chunks(2), geometry(3, 5))
    assert not FirstKeys(0).materialize(3, 5).any()


def test_numbers_too_large_for_int32_mean_all():
    far = 2**40
    everything = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    for mask in (Window(far, far), FirstKeys(far), Chunks(far), KeyRange(0, far)):
        assert torch.equal(mask.materialize(3, 5, query_start=0), everything)
        check_lowering(mask, geometry(3, 5, query_start=0))
    for n in (torch.tensor([far]), [far]):
        check_lowering(FirstKeys(n) | Causal(), geometry(3, 5))
        check_lowering(KeyRange(0, n), geometry(3, 5))
        assert not (KeyRange(n) & Causal()).materialize(3, 5).any()
        check_lowering(KeyRange(n) & Causal(), geometry(3, 5))


# --- Masks as values ----------------------------------------------------------------------------

ALL_KINDS = [
    Causal(),
    Window(3, None),
    FirstKeys(2),
    FirstKeys(torch.tensor([2])),
    Chunks(3),
    KeyRange(1, 4),
    KeyLengths([3]),
    Documents([2, 3], [3, 4]),
    QueryRows([1]),
    Dense(torch.ones(5, 7, dtype=torch.bool)),
    Predicate(operator.itemgetter(0)),
    Causal() & (Window(1, 0) | ~FirstKeys(2)),
]


@pytest.mark.parametrize("mask", ALL_KINDS, ids=repr)
def test_masks_are_values(mask):
    if not isinstance(mask, Predicate):
        masks.lower(mask, geometry(5, 7))  # what is kept does not travel
    for copied in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), copy.copy(mask)):
        assert type(copied) is type(mask) and repr(copied) == repr(mask)
        assert "_kept" not in vars(copied) and "_scanned" not in vars(copied)
        if not isinstance(mask, Predicate):  # itemgetters compare by identity
            assert copied == mask and hash(copied) == hash(mask)
    assert all((mask == other) == (mask is other) for other in ALL_KINDS)
    for name in ("left", "part", "parts", "new"):
        with pytest.raises(AttributeError):
            setattr(mask, name, 1)


def test_repr_shows_the_expression():
    assert repr(Causal() & (Window(255, 0) | FirstKeys(4))) == (
        "Causal() & (Window(255, 0) | FirstKeys(4))"
    )
    assert repr(~(Causal() | Chunks(4)) & ~DOCS) == (
        "~(Causal() | Chunks(4)) & ~Documents([2, 3], [3, 4])"
    )
    assert repr(Documents([256] * 16)) == "Documents([256] * 16)"
    assert repr(Documents(list(range(9)))) == "Documents([0, 1, 2, ... 9 in all])"
    assert repr(KeyRange(torch.tensor([1, 2]))) == "KeyRange(tensor([1, 2]))"
    assert repr(KeyLengths(torch.arange(9))) == "KeyLengths(tensor(int64[9]))"
    assert repr(Predicate(check_lowering)) == "Predicate(check_lowering)"
    assert Causal() & Chunks(2) & DOCS == Causal() & (Chunks(2) & DOCS)
    assert Causal() & Chunks(2) != Chunks(2) & Causal()
    assert Causal() != "Causal()"


def test_the_page_about_masks():
    page = Path(__file__).parent.parent / "docs" / "masks.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert failed == 0 and tried > 8


# --- Errors -------------------------------------------------------------------------------------

HALF = torch.tensor([1.5, 2.5])
ON_CONSTRUCTION = [
    (lambda: Window(-1, 0), ArgumentError, "Window's left .*negative; got -1"),
    (lambda: Window(0, -2), ArgumentError, "Window's right .*negative; got -2"),
    (lambda: Window(1.5, 0), ArgumentTypeError, "whole number; got 1.5"),
    (lambda: Window(True, 0), ArgumentTypeError, "whole number; got True"),
    (lambda: FirstKeys(-1), ArgumentError, "negative; got -1"),
    (lambda: FirstKeys("4"), ArgumentTypeError, "whole number; got '4'"),
    (lambda: FirstKeys(HALF), ArgumentTypeError, r"integers; got a tensor of torch.float32"),
    (lambda: FirstKeys(torch.ones(1, 1, 1).int()), ShapeError, r"1 to 2 .* \[1, 1, 1\]"),
    (lambda: FirstKeys([[1, 2], 3]), ShapeError, "mixes numbers and lists"),
    (lambda: Chunks(0), ArgumentError, "1 or more; got 0"),
    (lambda: KeyRange(-1), ArgumentError, "start must not be negative; got -1"),
    (lambda: KeyRange(torch.tensor([1, -1])), ArgumentError, "got -1 in the tensor"),
    (lambda: KeyRange(5, 3), ArgumentError, "start=5, end=3"),
    (lambda: KeyRange([1, 5], [2, 4]), ArgumentError, "past its end"),
    (lambda: KeyRange(5, [7, 4]), ArgumentError, "past its end"),
    (lambda: KeyRange([1, 8], 7), ArgumentError, "past its end"),
    (lambda: KeyLengths(torch.tensor(3)), ShapeError, r"got shape \[\]"),
    (lambda: KeyLengths(torch.tensor([True])), ArgumentTypeError, "torch.bool"),
    (lambda: Documents(5), ArgumentTypeError, r"Documents\(\[5\]\)"),
    (lambda: Documents([2, 3], [5]), ShapeError, "as many k_lengths as q_lengths"),
    (lambda: Documents([2, -3]), ArgumentError, "negative; got -3"),
    (lambda: QueryRows([1.0]), ArgumentTypeError, "whole number; got 1.0"),
    (lambda: QueryRows(torch.ones(2, 2).bool()), ShapeError, r"\[Lq\]; got \[2, 2\]"),
    (lambda: Dense([[True]]), ArgumentTypeError, "bool tensor.*got list"),
    (lambda: Dense(torch.zeros(2, 2)), ArgumentTypeError, "got torch.float32.*attn_bias"),
    (lambda: Dense(torch.ones(2, 3, 3).bool()), ShapeError, r"batch or heads.*mask\[:, None\]"),
    (lambda: Dense(torch.ones(3).bool()), ShapeError, r"got \[3\]"),
    (lambda: Predicate(3), ArgumentTypeError, "function fn.*got int"),
    (lambda: Causal() & torch.ones(2, 2).bool(), ArgumentTypeError, r"Wrap the tensor: mh.Dense"),
    (lambda: Causal() | None, ArgumentTypeError, "got NoneType"),
    (lambda: Causal() and Window(1, 0), ArgumentTypeError, "no truth value"),
    (lambda: not Causal(), ArgumentTypeError, "Combine masks with & | ~"),
]  # fmt: skip

WHEN_LOWERING = [  # for batch 2, 3 heads, 5 queries, 7 keys
    (KeyLengths([7, 8]), {}, ArgumentError, "larger than the key length 7; got 8"),
    (KeyLengths(torch.tensor([9, 1])), {}, ArgumentError, "got 9"),
    (KeyLengths([7, 7, 7]), {}, ShapeError, r"got shape \[3\] for batch size 2"),
    (KeyRange([1]), {}, ShapeError, r"Expected shape \[2\]"),
    (KeyRange(0, torch.tensor([1, 2, 3])), {}, ShapeError, r"\[3\] for batch size 2"),
    (FirstKeys([1, 2, 3]), {}, ShapeError, r"\[3\] for batch size 2"),
    (FirstKeys([[1, 2], [3, 4]]), {}, ArgumentError, "not &-ed with Documents"),
    (DOCS & FirstKeys([1, 2, 3]), {}, ShapeError, r"one per document \[2\]"),
    (Documents([2, 2], [3, 4]), {}, ArgumentError, "query length 5; got a sum of 4"),
    (Documents([2, 3], [3, 3]), {}, ArgumentError, "key length 7; got a sum of 6"),
    (Documents(torch.tensor([2, 2])), {}, ArgumentError, "query length 5; got a sum of 4"),
    (Documents([2, 3]), {}, ArgumentError, "sum of 5. .* give k_lengths too"),
    (Documents([[5]] * 3, [[7]] * 3), {}, ShapeError, r"\[3, 1\] for batch size 2"),
    (Documents([[5], [4]], [7]), {}, ArgumentError, "got a sum of 4"),
    (DOCS, {"query_start": 0}, ArgumentError, "query_start cannot be given.*Leave query_start"),
    (DOCS & Documents([5], [7]), {}, ArgumentError, "One Documents per expression"),
    (KeyLengths(3) | KeyLengths(4), {}, ArgumentError, "One KeyLengths .* Give query_start"),
    (QueryRows([5]), {}, ArgumentError, "below the query length 5; got 5"),
    (QueryRows([True] * 4), {}, ShapeError, r"\[5\], one per query row; got \[4\]"),
    (Dense(torch.ones(7, 5).bool()), {}, ShapeError, r"\[5, 7\].*got \[7, 5\]"),
    (
        Causal() & Dense(torch.ones(5, 7, dtype=torch.bool, device="meta")), {}, DeviceError,
        r"on the query's device, cpu; got meta\. Move it with \.to\('cpu'\)",
    ),
    (Dense(torch.ones(3, 1, 5, 7).bool()), {}, ShapeError, r"got \[3, 1, 5, 7\]"),
    (Dense(torch.ones(2, 2, 5, 7).bool()), {}, ShapeError, r"got \[2, 2, 5, 7\]"),
    (Predicate(lambda b, h, p, j: True), {}, ArgumentTypeError, "bool tensor; got bool"),
    (Predicate(lambda b, h, p, j: p - j), {}, ArgumentTypeError, "got torch.int64"),
    (Predicate(lambda b, h, p, j: (j > 0)[..., 1:]), {}, ShapeError, r"got \[1, 1, 1, 6\]"),
    (Predicate(lambda b, h, p, j: (j > 0)[None]), {}, ShapeError, r"got \[1, 1, 1, 1, 7\]"),
    (Causal(), {"query_start": torch.tensor([1])}, ShapeError, r"\[1\] for batch size 2"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), ON_CONSTRUCTION)
def test_errors_on_construction(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(("mask", "given_start", "error", "message"), WHEN_LOWERING)
def test_errors_when_lowering(mask, given_start, error, message):
    where = geometry(5, 7, batch=2, q_heads=3, **given_start)
    with pytest.raises(error, match=message):
        masks.lower(mask, where)
    with pytest.raises(error, match=message):
        mask.materialize(5, 7, batch=2, q_heads=3, **given_start)


def test_lower_takes_masks_and_bool_tensors_only():
    for wrong in ("causal", 3, True):
        with pytest.raises(ArgumentTypeError, match="None, a mask of manyheads, or a bool tensor"):
            masks.lower(wrong, geometry(5, 7))


def test_small_tensors_follow_the_call_and_dense_masks_do_not():
    lengths = KeyLengths(torch.tensor([5, 7]))
    where = Geometry(2, 3, 5, 7, torch.device("meta"))
    assert masks.lower(Causal() & lengths, where)[0].key_end.device.type == "meta"
    x = torch.zeros(2, 3, 5, 8, device="meta")
    with pytest.raises(DeviceError, match="device, meta; got cpu"):
        mh.attention(x, x, x, mask=torch.ones(5, 5, dtype=torch.bool))


# --- torch.compile ------------------------------------------------------------------------------

COMPILED = [
    SINKS,
    Causal() & KeyLengths(torch.tensor([5, 7])),
    Causal() & KeyRange([0, 2]),
    Causal() & Documents(torch.tensor([2, 3]), torch.tensor([3, 4])),
    ~Window(1, 0) | QueryRows([0, 2]),
    Dense(torch.ones(5, 7, dtype=torch.bool)) & Chunks(2),
    Dense(torch.tensor([[True, False] * 3 + [True]])),
    Dense(torch.tensor([[True], [False], [True], [True], [False]])),
    Predicate(lambda b, h, p, j: (p - j) % 2 == 0),
]


@pytest.mark.parametrize("mask", COMPILED, ids=repr)
def test_lowering_compiles_in_one_graph(mask):
    def scores(x):
        where = geometry(x.shape[1], x.shape[2], batch=x.shape[0])
        plan, positions = masks.lower(mask, where)
        return torch.where(plan.materialize(where, positions), x[:, None], -torch.inf)

    torch.compiler.reset()
    x = torch.randn(2, 5, 7)
    compiled = torch.compile(scores, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), scores(x))
