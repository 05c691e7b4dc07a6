"""The mask algebra against a definition written here, in plain Python, from the English meanings.

`meaning` decides one (batch element, head, row, key) at a time with loops and ints, and shares no
code with the masks. Random expressions compare it with `materialize` and with the lowered plan.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mask_checks import check_lowering, geometry

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
from manyheads.spec import BandPlan, IntervalsPlan

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
