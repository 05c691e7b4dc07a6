"""The page of a trace: its numbers, tokens of any kind as text, and what it refuses."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
import torch
from test_module import randomised
from torch import Tensor

import manyheads as mh
from manyheads import MultiHeadAttention
from manyheads.inspect import trace_page

E, L = 12, 5


class Read(HTMLParser):
    """All tags, all text, and the cells of every table by row."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.in_cell = False
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def after(self, words: str) -> list[float]:
        """The numbers of the sentence that begins with these words."""
        sentence = self.text[self.text.index(words) :].replace("−", "-").split("\n\n")[0]
        return [float(n) for n in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-\d+)?", sentence)]


def shows(numbers: Tensor, exact: Tensor, digits: int) -> None:
    """The numbers are the exact ones, rounded to so many decimals (an ulp aside)."""
    assert numbers.shape == exact.shape
    assert ((numbers.double() - exact.double()).abs() <= 0.5001 * 10**-digits).all()


def make_trace(**options) -> mh.Trace:
    module = randomised(MultiHeadAttention(E, 3, mask=mh.Causal(), **options))
    with torch.no_grad():
        return mh.trace(module, torch.randn(2, L, E))


def test_numbers_are_the_traces():
    trace = make_trace(positions=mh.Rotary(4), num_kv_heads=1)
    page = Read(trace.page(["a", "b", "c", "d", "e"], head=1, query=3, batch=1).html)
    weights = trace["weights"][1]
    *_, sizes, total = page.tables
    shown = page.tables[7:10]  # after three projections, two rotations and two kinds of scores
    for head, table in enumerate(shown):
        assert table[0] == ["", "a", "b", "c", "d", "e"]
        numbers = torch.tensor([[float(n) for n in row[1:]] for row in table[1:]])
        shows(numbers, weights[head], digits=2)
    norms = trace["contributions"][1].norm(dim=-1).T
    numbers = torch.tensor([[float(n) for n in row[1:]] for row in sizes[1:]])
    shows(numbers, norms, digits=2)
    assert [row[0] for row in total] == ["head 0", "head 1", "head 2", "bias", "output"]
    terms = torch.tensor([[float(n.replace("−", "-")) for n in row[1:]] for row in total])
    shows(terms[:3], trace["contributions"][1, :, 3, :6], digits=3)
    shows(terms[3], trace["output_bias"][:6], digits=3)
    shows(terms[4], trace["output"][1, 3, :6], digits=3)


def test_one_pair_is_worked_out():
    trace = make_trace()
    page = Read(trace.page(list("abcde"), head=2, query=4).html)
    scores, key = trace["masked_scores"][0, 2, 4], int(trace["weights"][0, 2, 4].argmax())
    name = "abcde"[key]
    raw = page.after(f"For e and {name}:\nscores")
    shows(torch.tensor(raw[0]), scores[key], digits=3)
    exponential = (scores - scores.max()).exp()
    numbers = page.after(f"For e and {name} in head 2")
    assert numbers[0] == 2
    expected = [scores[key], scores.max(), scores[key], scores.max(), exponential[key]]
    expected += [exponential.sum(), exponential[key] / exponential.sum()]
    shows(torch.tensor(numbers[1:]), torch.tensor(expected), digits=3)


def test_the_document_stands_alone(tmp_path):
    page = make_trace().page()
    saved = page.save(tmp_path / "page.html")
    document = saved.read_text(encoding="utf-8")
    assert document == page.html and document.startswith("<!doctype html>")
    assert page._repr_html_() in document
    assert not re.search(r"<script|<link|<img|https?:|src=|@import|url\(", document)


def test_hostile_tokens_are_text():
    tokens = ["</script><b>", "\u202eabc\x00", "\n", "&lt;", "👩‍🚀 שלום"]
    document = make_trace().page(tokens).html
    page = Read(document)
    assert "script" not in page.tags
    names = [row[0] for row in page.tables[0]]
    assert names == ["</script><b>", "⟨202E⟩abc␀", "␊", "&lt;", "👩⟨200D⟩🚀 שלום"]
    assert "<bdi>&lt;/script&gt;&lt;b&gt;</bdi>" in document


def test_cross_attention_cache_and_functional_traces():
    module = randomised(MultiHeadAttention(E, 3, mask=mh.Causal())).eval()
    cache = mh.KVCache()
    with torch.no_grad():
        module(torch.randn(1, L, E), cache=cache)
        page = mh.trace(module, torch.randn(1, 2, E), cache=cache).page(["x", "y"])
    read = Read(page.html)
    assert [row[0] for row in read.tables[1]] == ["5", "6"]  # the new keys
    assert [len(table) for table in read.tables[3:5]] == [7, 7]  # all keys, all values
    query, key = torch.randn(2, 1, 4), torch.randn(2, 3, 4)
    steps = mh.trace_attention(query, key, key, sinks=torch.zeros(2), softcap=2.0)
    read = Read(steps.page(key_tokens=["k", "l", "m"]).html)
    assert "head's sink takes" in read.text and "W_O" not in read.text
    assert read.tables[0][0] == ["", "k", "l", "m"]
    nothing = mh.trace_attention(query, key, key, mask=mh.KeyRange(0, 0))
    assert "reads\nnothing" in Read(nothing.page().html).text


def test_a_notebook_shows_the_page_or_the_steps():
    trace = make_trace()
    assert trace._repr_html_() == trace.page().body
    x = torch.zeros(2, 101, 4)
    steps = mh.trace_attention(x, x, x)
    assert steps._repr_html_().startswith("<pre>scores [batch 1, head 2, query 101, key 101]")


BAD: dict[str, tuple[Callable[[mh.Trace], object], type[Exception], str]] = {
    "count": (lambda t: t.page(["a"]), mh.ArgumentError, "tokens has 1 entries; expected 5"),
    "text": (lambda t: t.page("abcde"), mh.ArgumentTypeError, "tokens is a str"),
    "numbers": (lambda t: t.page([1, 2, 3, 4, 5]), mh.ArgumentTypeError, "list of strings"),
    "keys": (lambda t: t.page(key_tokens=["a"]), mh.ArgumentError, "key_tokens has 1 entries"),
    "head": (lambda t: t.page(head=3), mh.ArgumentError, "head 3 is not in this trace; expected 0"),
    "query": (lambda t: t.page(query=-6), mh.ArgumentError, "query -6 is not in this trace"),
    "batch": (lambda t: t.page(batch="0"), mh.ArgumentTypeError, "batch must be a whole number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    run, error, words = BAD[name]
    with pytest.raises(error, match=re.escape(words)):
        run(make_trace())


def test_what_nobody_could_read_is_refused():
    x = torch.zeros(2, 101, 4)
    with pytest.raises(mh.ArgumentError, match="2 heads, 101 queries and 101 keys is not readable"):
        mh.trace_attention(x, x, x).page()


def test_without_jinja2(monkeypatch):
    trace_page._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    trace = make_trace()
    with pytest.raises(mh.MissingDependencyError, match=r"manyheads\[view\]"):
        trace.page()
    assert trace._repr_html_().startswith("<pre>projected_queries")
