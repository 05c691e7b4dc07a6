"""Pages of calls whose last key slots are still empty, as a static cache has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from observed import words
from test_huggingface import VOCABULARY, decoder
from test_page import LABELS, Read
from transformers import StaticCache

import manyheads as mh
from manyheads.functional import prepare
from manyheads.inspect.filled import filled_length

MEASURES = (mh.HeatMap(), mh.TopKeys(3), *LABELS.values())
PROMPT, STEPS, SLOTS = 7, 5, 29
TOKENS = words(PROMPT + STEPS - 1)  # the last one is never given to the model


def generated(*measures: mh.Measure, slots: int | None) -> mh.Seen:
    """A tiny random Llama; slots: those of its static cache, None: a dynamic one."""
    model = decoder("llama")
    ids = torch.randint(1, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    cache = None if slots is None else StaticCache(model.config, max_cache_len=slots)
    options = dict(max_new_tokens=STEPS, do_sample=False, past_key_values=cache)
    with torch.no_grad(), mh.observe(model, *measures) as seen:
        model.generate(ids, **options)
    return seen


def test_a_page_is_that_of_a_dynamic_cache() -> None:
    static, dynamic = (generated(*MEASURES, slots=slots) for slots in (SLOTS, None))
    records = static["model.layers.1"]
    assert [record.key_length for record in records] == [SLOTS] * STEPS
    assert [record.filled for record in records] == list(range(PROMPT, PROMPT + STEPS))
    assert {record.filled for record in dynamic} == {None}
    ours, theirs = (Read(mh.view(seen, TOKENS)) for seen in (static, dynamic))
    assert ours.meta["inputs"][0]["keys"] == len(TOKENS)
    for layer in range(2):
        (values, error), (expected, _) = ours.map(layer), theirs.map(layer)
        assert values.shape == (6, len(TOKENS), len(TOKENS))
        assert (abs(values - expected) <= 3 * error).all()
        for label in LABELS:
            values, edges = ours.strip(layer, label)
            expected, theirs_edges = theirs.strip(layer, label)
            assert edges.tolist() == theirs_edges.tolist()
            np.testing.assert_allclose(values, expected, atol=np.ptp(expected) / 1e4 + 1e-5)
        assert (ours.top(layer, 4)[1] == theirs.top(layer, 4)[1]).all()


def test_coarse_cells_end_where_the_text_does() -> None:
    """31 slots in 8 cells of 3 or 4: the third would end at key 12, and nothing is lost."""
    seen = generated(mh.HeatMap(8, 8), mh.Received(), slots=31)
    read = Read(mh.view(seen, TOKENS))
    (one,) = read.layer(0)["maps"]
    assert read.meta["edges"][one["columns"]] == [0, 4, 8, 11]
    np.testing.assert_allclose(read.map(0)[0].sum(-1), 1, atol=1e-3)


def test_a_closer_look_at_empty_slots_is_left_out() -> None:
    attend, x = mh.MultiHeadAttention(6, 2, mask=mh.Causal()), torch.randn(1, 5, 6)
    looks = [mh.HeatMap(4, 3, keys=keys) for keys in ((3, 9), (6, 9))]
    keys = torch.cat([x, torch.zeros(1, 4, 6)], dim=1)
    with torch.no_grad(), mh.observe(attend, *looks) as seen:
        attend(x, keys, mask=mh.Causal() & mh.KeyLengths([5]))
    assert seen.records[0].filled == 5
    read = Read(mh.view(seen, words(5)))
    (one,) = read.layer(0)["maps"]
    assert read.meta["edges"][one["columns"]] == [3, 5]
    assert read.numbers(one["cells"]).shape == (2, 4, 1)


def test_a_wrong_number_of_tokens_is_told() -> None:
    seen = generated(mh.Entropy(), slots=SLOTS)
    for count in (len(TOKENS) + 1, SLOTS - 1):
        with pytest.raises(mh.ArgumentError, match=rf"got {count}; expected {len(TOKENS)}"):
            mh.view(seen, words(count))


@pytest.mark.parametrize("texts", [{}, {"key_tokens": words(SLOTS)}])
def test_the_empty_slots_may_have_a_text(texts: dict[str, list[str]]) -> None:
    seen = generated(mh.HeatMap(), slots=SLOTS)
    for keys in (SLOTS, len(TOKENS)):
        given = {name: words(keys) for name in texts}
        read = Read(mh.view(seen, TOKENS if texts else words(keys), **given))
        assert read.map(0)[0].shape == (6, len(TOKENS), keys)


def test_it_is_saved(tmp_path: Path) -> None:
    generated(mh.Entropy(), slots=SLOTS).save(tmp_path / "seen")
    assert mh.Seen.load(tmp_path / "seen").records[0].filled == PROMPT
    mh.view(mh.Seen.load(tmp_path / "seen"), TOKENS)


def dense(reach: int, by_row: bool = False) -> torch.Tensor:
    allowed = torch.zeros(2, 3, 5, 31, dtype=torch.bool)
    allowed[1, 2, 4 if by_row else slice(None), :reach] = True
    return allowed


# mask, query_start -> how many of 31 keys there are for 5 queries; None: all.
FILLED = {
    "causal": (mh.Causal(), 6, 11),
    "causal at the end": (mh.Causal(), None, None),
    "per batch": (mh.Causal(), torch.tensor([6, 9]), 14),
    "ahead": (mh.Window(2, 4), 6, 15),
    "ahead of all": (mh.Window(None, 40), 6, None),
    "no mask": (None, 6, None),
    "back alone": (mh.Window(3, None), 6, None),
    "prefix": (mh.Causal() | mh.FirstKeys(17), 6, 17),
    "prefix behind": (mh.Causal() | mh.FirstKeys(3), 6, 11),
    "first keys not ahead": (mh.Causal() & (mh.Window(2, 0) | mh.FirstKeys(20)), 6, 11),
    "key range": (mh.KeyRange(2, 13), 6, 13),
    "key range below the queries": (mh.KeyRange(2, 7), 6, 11),
    "key range, per batch": (mh.KeyRange(0, [13, 17]), 6, 17),
    "two ranges": (mh.Causal() & ~mh.Window(2, 1), 6, 11),
    "two ranges ahead": (mh.KeyRange(0, 19) & ~mh.Window(2, 1), 6, 19),
    "dense": (mh.Dense(dense(19)), 6, 19),
    "dense, one row": (mh.Dense(dense(23, by_row=True)), 6, 23),
    "dense, nothing": (mh.Dense(dense(0)), 6, 11),
    "dense, whole rows": (mh.Dense(torch.ones(2, 1, 5, 1, dtype=torch.bool)), 6, None),
}


@pytest.mark.parametrize("name", FILLED)
def test_filled_length(name: str) -> None:
    mask, start, expected = FILLED[name]
    query, key = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 31, 7)
    call, _, _ = prepare(query, key, key, mask, None, None, None, None, 0.0, start, False)
    positions = call.positions.materialize(call.geometry)
    assert filled_length(call, positions) == expected
    allowed = call.plan.materialize(call.geometry, call.positions).expand(-1, -1, 5, 31)
    end = 31 if expected is None else expected
    assert not allowed[..., end:].any()
