"""The page as a file: what it holds, read back as packing.py says; its size, safety and errors.

tests/browser looks at it through a browser.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import sys
import zlib
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
from observed import HOSTILE, measured, plausible, words

import manyheads as mh
from manyheads.inspect import page as pages
from manyheads.inspect.sheets import Pooled

ALL = (
    mh.HeatMap(),
    mh.TopKeys(3),
    mh.Entropy(),
    mh.MeanDistance(),
    mh.Received(),
    mh.FirstKeysMass(1),
    mh.OffsetMass(-1),
    mh.LogSumExp(),
    mh.MaxLogit(),
)


# --- reading a page back --------------------------------------------------------------------------


class Read:
    """A page's data, from its text alone."""

    def __init__(self, page: mh.Page) -> None:
        (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.html)
        blobs = re.findall(r'<script type="text/plain" id="blob-(\d+)">(.*?)</script>', page.html)
        assert [int(number) for number, _ in blobs] == list(range(len(blobs)))
        self.meta: dict[str, Any] = json.loads(data)
        self.blobs = [zlib.decompress(base64.b64decode(blob)) for _, blob in blobs]

    def layer(self, index: int, which: int = 0) -> dict[str, Any]:
        return self.meta["inputs"][which]["layers"][index]

    def texts(self, which: int = 0) -> list[list[str]]:
        return [json.loads(self.blobs[blob]) for blob in self.meta["inputs"][which]["texts"]]

    def numbers(self, reference: dict[str, Any]) -> np.ndarray:
        planes = np.frombuffer(self.blobs[reference["blob"]], np.uint8).astype(np.int64)
        planes = planes.reshape(reference["bits"] // 8, *reference["shape"])
        return sum(plane << 8 * place for place, plane in enumerate(planes))

    def map(self, layer: int, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Values [H, R, C], and how far rounding may have moved each."""
        one = self.layer(layer)["maps"][number]
        codes, levels = self.numbers(one["cells"]), 2 ** one["cells"]["bits"] - 1
        tops = np.array(one["tops"])[:, None, None]
        return tops * (codes / levels) ** 2, tops * (codes + 0.25) / levels**2 + 1e-6

    def strip(self, layer: int, label: str, which: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Values [H, bins], and the bins' edges."""
        (one,) = [s for s in self.layer(layer, which)["strips"] if s["label"] == label]
        codes, levels = self.numbers(one["values"]), 2 ** one["values"]["bits"] - 2
        low, high = np.array(one["low"])[:, None], np.array(one["high"])[:, None]
        values = np.where(codes > 0, low + (codes - 1) / levels * (high - low), np.nan)
        return values, np.array(self.meta["edges"][one["edges"]])

    def top(self, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """Weights and keys [Lq, k] of one head."""
        detail = self.layer(layer)["detail"][str(head)]
        keys, bits = self.numbers(detail["keys"]), detail["keys"]["bits"]
        weights, levels = self.numbers(detail["weights"]), 2 ** detail["weights"]["bits"] - 1
        return (weights / levels).T ** 2, np.where(keys == 2**bits - 1, -1, keys).T


LABELS = {
    "entropy": mh.Entropy(),
    "mean distance": mh.MeanDistance(),
    "received": mh.Received(),
    "mass on the first key": mh.FirstKeysMass(1),
    "mass on the previous token": mh.OffsetMass(-1),
    "log-sum-exp": mh.LogSumExp(),
    "largest logit": mh.MaxLogit(),
}


def test_a_short_text_keeps_everything() -> None:
    seen = measured(*ALL, lengths=(13, 13), layers=2, heads=3, batch=2)
    read = Read(mh.view(seen, words(13), batch=1))
    assert read.texts() == [words(13)]
    for layer, name in enumerate(seen.layers):
        (record,) = seen[name]
        assert read.layer(layer)["name"] == name
        assert read.layer(layer)["heads"] == [0, 1, 2]
        values, error = read.map(layer)
        assert values.shape == (3, 13, 13)
        assert (abs(values - record[mh.HeatMap()][1].numpy()) <= error).all()
        assert error.max() < 2e-5
        for label, measure in LABELS.items():
            values, edges = read.strip(layer, label)
            expected = record[measure][1].numpy()
            assert edges.tolist() == list(range(14))
            np.testing.assert_allclose(values, expected, atol=np.ptp(expected) / 1e5 + 1e-6)
            mean = read.layer(layer)["means"][label]
            np.testing.assert_allclose(mean, expected.mean(1), rtol=1e-5)
        for head in range(3):
            weights, keys = read.top(layer, head)
            top = record[mh.TopKeys(3)]
            assert (keys == top.keys[1, head].numpy()).all() and (keys == -1).any()
            np.testing.assert_allclose(weights, top.weights[1, head].numpy(), atol=2e-5)


def test_rows_without_a_value_have_none() -> None:
    seen = measured(mh.LogSumExp(), lengths=(5, 5), layers=1)
    (record,) = seen["layers.0.attn"]
    record[mh.LogSumExp()][0, 1, 2] = -torch.inf
    values, _ = Read(mh.view(seen, words(5))).strip(0, "log-sum-exp")
    assert np.isnan(values[1, 2]) and np.isfinite(np.delete(values[1], 2)).all()


def test_a_coarser_map_is_the_mean_of_its_cells() -> None:
    """Exact where cells are joined whole: HeatMap's own answer at the coarser resolution."""
    fine, coarse, uneven = mh.HeatMap(32, 32), mh.HeatMap(8, 8), mh.HeatMap(7, 5)
    seen = measured(fine, coarse, lengths=(45, 64), layers=1, causal=False)
    (record,) = seen["layers.0.attn"]

    def edges(n: int, cells: int) -> np.ndarray:
        return np.array([min(i for i in range(n + 1) if i * cells // n >= c or i == n)
                         for c in range(cells + 1)])  # fmt: skip

    pooled = Pooled("", record[fine][0].numpy(), edges(45, 32), edges(64, 32))
    joined = pooled.coarser(8)
    np.testing.assert_allclose(joined.cells, record[coarse][0].numpy(), atol=1e-6)
    assert joined.rows.tolist() == edges(45, 8).tolist()
    again = pooled.resampled(edges(45, uneven.rows), edges(64, uneven.columns))
    np.testing.assert_allclose(again.cells.sum(-1), 1, atol=1e-5)  # no mass is lost on the way


def test_generated_tokens_join_the_prompt() -> None:
    """A prompt of 7 and 6 calls of one token each show what one call of all 13 would."""
    stepwise = measured(*ALL, lengths=(7, 7), steps=6, seed=3)
    at_once = measured(*ALL, lengths=(13, 13), seed=3)
    assert len(stepwise["layers.0.attn"]) == 7
    some, all_ = (Read(mh.view(seen, words(13))) for seen in (stepwise, at_once))
    for layer in range(2):
        np.testing.assert_allclose(some.map(layer)[0], all_.map(layer)[0], atol=4e-5)
        for label in LABELS:
            there, here = some.strip(layer, label)[0], all_.strip(layer, label)[0]
            np.testing.assert_allclose(there, here, atol=np.ptp(here) / 1e4 + 1e-6)
        assert (some.top(layer, 1)[1] == all_.top(layer, 1)[1]).all()
    assert some.meta["inputs"][0]["positions"] == {"start": 0}


def test_a_second_call_from_the_start_is_a_pass_of_its_own() -> None:
    one, two = (measured(mh.Entropy(), lengths=(7, 7), layers=1, seed=s) for s in (1, 2))
    read = Read(mh.view(mh.Seen([*one, *two]), words(7)))
    names = [layer["name"] for layer in read.meta["inputs"][0]["layers"]]
    assert names == ["layers.0.attn, call 1", "layers.0.attn, call 2"]
    (record,) = two["layers.0.attn"]
    np.testing.assert_allclose(
        read.strip(1, "entropy")[0], record[mh.Entropy()][0].numpy(), atol=1e-4
    )


def test_a_chunk_after_a_cache_shows_its_own_rows() -> None:
    seen = measured(*ALL, lengths=(5, 13))
    read = Read(mh.view(seen, words(13)))
    assert read.meta["inputs"][0]["positions"] == {"start": 8}
    assert (read.meta["inputs"][0]["queries"], read.meta["inputs"][0]["keys"]) == (5, 13)


def test_cross_attention_has_two_texts() -> None:
    seen = measured(*ALL, lengths=(5, 17), causal=False)
    read = Read(mh.view(seen, words(5), key_tokens=words(17)))
    assert read.texts() == [words(17), words(5)]


def test_without_a_map_the_heaviest_keys_make_one() -> None:
    seen = measured(mh.TopKeys(3), lengths=(11, 11), layers=1)
    read = Read(mh.view(seen, words(11)))
    (record,) = seen["layers.0.attn"]
    top, dense = record[mh.TopKeys(3)], np.zeros((3, 11, 11))
    for head, row, rank in np.ndindex(3, 11, 3):
        if top.keys[0, head, row, rank] >= 0:
            dense[head, row, top.keys[0, head, row, rank]] = top.weights[0, head, row, rank]
    values, error = read.map(0)
    assert (abs(values - dense) <= error).all()
    assert read.layer(0)["maps"][0]["label"] == "attention to the 3 heaviest keys"


def test_two_inputs() -> None:
    one = measured(*ALL, lengths=(7, 7), seed=1)
    two = measured(*ALL, lengths=(11, 11), seed=2)
    read = Read(mh.view(one, words(7), compare=(two, words(11)), detail=[(1, 2)]))
    assert (read.texts(0), read.texts(1)) == ([words(7)], [words(11)])
    (record,) = two["layers.1.attn"]
    np.testing.assert_allclose(
        read.strip(1, "entropy", 1)[0], record[mh.Entropy()][0].numpy(), atol=1e-4
    )
    assert list(read.layer(1, 1)["detail"]) == ["2"]


# --- its size -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long() -> mh.Seen:
    return plausible(2048, layers=2, heads=4)


@pytest.mark.parametrize("megabytes", [0.22, 0.4, 3.0])
def test_it_fits(long: mh.Seen, megabytes: float) -> None:
    page = mh.view(long, words(2048), max_megabytes=megabytes)
    assert len(page.html.encode()) <= megabytes * 1e6
    read = Read(page)
    kept = sum(len(read.layer(layer)["detail"]) for layer in range(2))
    assert kept == 8 if megabytes == 3.0 else kept < 8
    for layer, name in enumerate(long.layers):
        (record,) = long[name]
        cells = record[mh.HeatMap(128, 128)][0].numpy()
        values, error = read.map(layer)
        rows = np.array(read.meta["edges"][read.layer(layer)["maps"][0]["rows"]]) // 16
        by_key = np.add.reduceat(cells, rows[:-1], axis=2)  # the columns' cells are the same
        pooled = np.add.reduceat(by_key, rows[:-1], axis=1) / np.diff(rows)[:, None]
        assert (abs(values - pooled) <= error).all()
        values, edges = read.strip(layer, "entropy")
        sums = np.add.reduceat(record[mh.Entropy()][0].numpy(), edges[:-1], axis=1)
        np.testing.assert_allclose(values, sums / np.diff(edges), atol=8 / 250)


def test_the_sharpest_heads_come_first(long: mh.Seen) -> None:
    sharp = np.concatenate(
        [long[name][0][mh.TopKeys(8)][0][0, :, :, 0].mean(1) for name in long.layers]
    )
    read = Read(mh.view(long, words(2048), max_megabytes=0.4))
    kept = [4 * layer + int(h) for layer in range(2) for h in read.layer(layer)["detail"]]
    assert 0 < len(kept) < 8
    assert sorted(kept) == sorted(np.argsort(-sharp, kind="stable")[: len(kept)])


def test_heads_asked_for_are_kept_before_anything_else(long: mh.Seen) -> None:
    asked = [("model.layers.1.self_attn", 3), (0, 2), (0, 2)]
    page = mh.view(long, words(2048), detail=asked, max_megabytes=0.3)
    assert len(page.html.encode()) <= 0.3e6
    read = Read(page)
    assert [list(read.layer(layer)["detail"]) for layer in range(2)] == [["2"], ["3"]]
    weights, keys = read.top(1, 3)
    top_weights, top_keys = long["model.layers.1.self_attn"][0][mh.TopKeys(8)]
    assert (keys == top_keys[0, 3].numpy()).all()
    np.testing.assert_allclose(weights, top_weights[0, 3].numpy(), atol=1 / 250)
    assert not any(Read(mh.view(long, words(2048), detail=[])).layer(0)["detail"])


# --- its safety -----------------------------------------------------------------------------------


def hostile_page() -> mh.Page:
    count = len(HOSTILE)
    seen = measured(*ALL, lengths=(count, count))
    renamed = [
        mh.Record("</script><b>", r.step, r.heads, r.query_length, r.key_length, r.positions,
                  r.measures, r.answers)
        for r in seen["layers.0.attn"]
    ]  # fmt: skip
    return mh.view(mh.Seen(renamed), HOSTILE, title="</title><script>$data ${x}")


def test_no_text_ends_its_element(tmp_path) -> None:
    page, plain = hostile_page(), mh.view(measured(*ALL, layers=1), words(11))
    without_blobs = [re.sub(r'<script type="text/plain".*', "", p.html) for p in (page, plain)]
    ours, theirs = (re.findall(r"<(?=[/!a-zA-Z])[^\s>]*", text) for text in without_blobs)
    assert ours == theirs
    assert "</title><script>" not in page.html
    assert Read(page).texts() == [HOSTILE]
    path = page.save(tmp_path / "page.html")
    assert path.read_text(encoding="utf-8") == page.html


def test_nothing_may_be_fetched_and_no_other_script_run() -> None:
    page = hostile_page()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', page.html)
    rules = dict(rule.strip().split(" ", 1) for rule in html.unescape(policy).split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    (script,) = re.findall(r"<script>(.*?)</script>", page.html, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", page.html, re.DOTALL)
    for text, rule in ((script, "script-src"), (style, "style-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert not set(rules) - {"default-src", "script-src", "style-src", "img-src", "base-uri",
                             "form-action"}  # fmt: skip
    assert rules["img-src"] == "data: blob:"


def test_the_viewer_makes_no_markup_of_text_and_asks_no_network() -> None:
    folder = files("manyheads.inspect") / "viewer"
    found = {entry.name for entry in folder.iterdir() if entry.name.endswith(".js")}
    assert found == {*pages.SCRIPTS, pages.SERVED}
    for name in [*pages.SCRIPTS, pages.SERVED, "viewer.css", "template.html"]:
        text = (folder / name).read_text(encoding="utf-8")
        bad = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp|WebSocket"
        if name == pages.SERVED:  # which only served pages have
            bad = bad.replace(r"|fetch\(", "")
        assert not re.search(bad, text), name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\((?!#)", text), name
        if name.endswith(".js"):
            assert "</script" not in text and "<!--" not in text


def test_a_notebook_gets_a_frame() -> None:
    page = hostile_page()
    shown = page._repr_html_()
    (source,) = re.findall(r'srcdoc="([^"]*)"', shown)
    assert html.unescape(source) == page.html
    assert 'sandbox="allow-scripts allow-downloads"' in shown  # not allow-same-origin


def test_colours_are_matplotlibs() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    text = (files("manyheads.inspect") / "viewer" / "colour.js").read_text(encoding="utf-8")
    stops = dict(re.findall(r'^  (\w+): "([0-9a-f]{198})",$', text, re.MULTILINE))
    assert set(stops) == {"magma", "viridis", "cividis", "gray_r", "PuOr_r", "berlin"}
    for name, written in stops.items():
        colours = matplotlib.colormaps[name](np.linspace(0, 1, 33))[:, :3]
        assert written == (255 * colours).round().astype(np.uint8).tobytes().hex()


# --- still pictures -------------------------------------------------------------------------------


def test_still_pictures(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    seen = measured(mh.HeatMap(), lengths=(5, 7), layers=2, heads=3)
    every, layer = seen.plot(), seen.plot(1)
    one = seen.plot("layers.1.attn", 2, tokens=words(7))
    assert [len(figure.axes) for figure in (every, layer, one)] == [6, 3, 2]  # a scale
    (mesh,) = one.axes[0].collections
    (record,) = seen["layers.1.attn"]
    expected = record[mh.HeatMap()][0, 2].numpy()
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(5, 7), expected, atol=1e-6)
    assert [label.get_text() for label in one.axes[0].get_yticklabels()] == words(7)[2:]
    every.savefig(tmp_path / "all.png")
    one.savefig(tmp_path / "one.svg")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(mh.MissingDependencyError, match="pip install matplotlib"):
        measured(mh.HeatMap()).plot()


# --- errors ---------------------------------------------------------------------------------------

SEEN = measured(mh.HeatMap(), mh.TopKeys(2), mh.Entropy(), lengths=(5, 5))
TWO_HEADS = measured(mh.Entropy(), lengths=(5, 5), heads=2)
NO_TOP = measured(mh.Entropy(), lengths=(5, 5))
CROSS = measured(mh.Entropy(), lengths=(5, 7), causal=False)
TEXT = words(5)

# What is called -> the error, and what its message must hold: got, expected, the fix.
BAD = {
    "too few tokens": (
        lambda: mh.view(SEEN, TEXT[1:]), mh.ArgumentError, "got 4", "expected 5", "one string",
    ),
    "too many tokens": (
        lambda: mh.view(SEEN, words(6)), mh.ArgumentError, "got 6", "expected 5", "generate()",
    ),
    "too few key tokens": (
        lambda: mh.view(CROSS, TEXT, key_tokens=TEXT),
        mh.ArgumentError, "key_tokens: got 5", "expected 7, the keys", "give one",
    ),
    "too few query tokens": (
        lambda: mh.view(CROSS, TEXT[1:], key_tokens=words(7)),
        mh.ArgumentError, "tokens: got 4", "expected 5, the queries", "give one",
    ),
    "a text": (lambda: mh.view(SEEN, "hello"), TypeError, "got str", "strings", "batch_decode"),
    "numbers": (lambda: mh.view(SEEN, [1] * 5), TypeError, "1 (int)", "strings", "batch_decode"),
    "empty": (
        lambda: mh.view(mh.Seen(), TEXT),
        mh.ArgumentError, "without attention calls", "at least one query", "with mh.observe",
    ),
    "no queries": (
        lambda: mh.view(measured(mh.Entropy(), lengths=(0, 5)), TEXT),
        mh.ArgumentError, "without attention calls", "at least one query", "with mh.observe",
    ),
    "nothing to show": (
        lambda: mh.view(measured(mh.HeadSimilarity(), lengths=(5, 5)), TEXT),
        mh.ArgumentError, "got HeadSimilarity()", "expected HeatMap, TopKeys", "mh.observe(model",
    ),
    "no record": (lambda: mh.view([1], TEXT), TypeError, "got list", "the Seen", "with mh.observe"),
    "batch": (
        lambda: mh.view(SEEN, TEXT, batch=1), mh.ArgumentError, "batch=1", "batch < 1", "choose",
    ),
    "layer number": (
        lambda: mh.view(SEEN, TEXT, detail=[(2, 0)]),
        mh.ArgumentError, "got 2", "expected 0 to 1", "choose",
    ),
    "layer name": (
        lambda: mh.view(SEEN, TEXT, detail=[("layer", 0)]),
        mh.ArgumentError, "got 'layer'", "layers.0.attn, layers.1.attn", "choose",
    ),
    "head": (
        lambda: mh.view(SEEN, TEXT, detail=[(0, 3)]),
        mh.ArgumentError, "got 3", "[0, 1, 2]", "choose",
    ),
    "no pair": (
        lambda: mh.view(SEEN, TEXT, detail=[3]), TypeError, "holds 3", "(layer, head)", "write",
    ),
    "no heaviest keys": (
        lambda: mh.view(NO_TOP, TEXT, detail=[(0, 0)]),
        mh.ArgumentError, "without TopKeys", "one with it", "mh.TopKeys(8)",
    ),
    "compare with a record": (
        lambda: mh.view(SEEN, TEXT, compare=SEEN), TypeError, "got Seen", "(seen, tokens)", "give",
    ),
    "compare with a model": (
        lambda: mh.view(SEEN, TEXT, compare=(torch.nn.Linear(1, 1), TEXT)),
        TypeError, "got Linear", "expected the Seen", "give",
    ),
    "another model": (
        lambda: mh.view(SEEN, TEXT, compare=(TWO_HEADS, TEXT)),
        mh.ArgumentError, "heads [0, 1]", "the first record's 2 layers", "the same model",
    ),
    "a picture of no map": (
        lambda: NO_TOP.plot(), mh.ArgumentError, "without HeatMap", "one of them", "ask",
    ),
    "a picture of no layer": (
        lambda: SEEN.plot("x"), mh.ArgumentError, "got 'x'", "0 to 1", "choose",
    ),
    "a picture of no head": (
        lambda: SEEN.plot(0, 3), mh.ArgumentError, "head=3", "[0, 1, 2]", "name both",
    ),
    "too large": (
        lambda: mh.view(SEEN, TEXT, max_megabytes=0.05),
        mh.ArgumentError, "MB of data", "at most 0.0 MB", "raise max_megabytes",
    ),
    "too much detail": (
        lambda: mh.view(plausible(1024, 1, 8), words(1024), detail=[(0, h) for h in range(8)],
                        max_megabytes=0.2),
        mh.ArgumentError, "MB of data", "at most", "fewer heads than 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, kind, *parts = BAD[name]
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, mh.ManyHeadsError)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"


def test_layers_of_two_kinds_are_refused() -> None:
    one = measured(mh.Entropy(), lengths=(7, 7), layers=1)
    (record,) = measured(mh.Entropy(), lengths=(5, 7), layers=1)["layers.0.attn"]
    other = mh.Record("cross", 0, *(getattr(record, name) for name in (
        "heads", "query_length", "key_length", "positions", "measures", "answers")))  # fmt: skip
    with pytest.raises(mh.ArgumentError, match=r"different queries.*layers=\.\.\."):
        mh.view(mh.Seen([*one, other]), words(7))


def test_queries_outside_the_keys_need_their_own_text() -> None:
    (record,) = measured(mh.Entropy(), lengths=(5, 7), layers=1)["layers.0.attn"]
    record.positions.add_(3)
    with pytest.raises(mh.ArgumentError, match=r"positions 5 to 9; expected 0 to 6; .* key_tokens"):
        mh.view(mh.Seen([record]), words(7))
