"""Masks as values: equality, printing, errors at the door, and torch.compile."""

from __future__ import annotations

import copy
import doctest
import operator
import pickle
from pathlib import Path

import pytest
import torch
from mask_checks import DOCS, SINKS, check_lowering, geometry

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
from manyheads.spec import Geometry

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
