"""What masks mean, in small pictures and in the cases that are easily got wrong."""

from __future__ import annotations

import pytest
import torch
from mask_checks import DOCS, LENGTHS, SINKS, check_lowering, geometry, rows_of

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
