"""`report`: heads with hand-made weights get the labels of what they do, with their scores."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import manyheads as mh
from manyheads.inspect import BEHAVIOURS
from manyheads.inspect.report import repeat_scores, text_scores

WORDS, PLACES, PERIOD = 24, 25, 12
E = WORDS + PLACES + WORDS  # which word, where, which word stood before
WORD, PLACE, BEFORE = 0, WORDS, WORDS + PLACES
SURE = 5.0  # a match scores SURE * SURE


def blank(heads: int, **options) -> mh.MultiHeadAttention:
    attention = mh.MultiHeadAttention(E, heads, head_dim=E, scale=1.0, **options)
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    return attention


def look(attention, head: int, query: dict[int, float], key: dict[int, float], shift: int = 0):
    """Head `head` matches what stands at channel c of the query with channel c - shift of the key.

    query, key: where a block of WORDS or PLACES channels begins, and how much it counts.
    """
    for (q_begin, q_factor), (k_begin, k_factor) in zip(query.items(), key.items(), strict=True):
        size = PLACES if q_begin == PLACE else WORDS
        for channel in range(size):
            row = head * E + q_begin + channel
            attention.q_proj.weight.data[row, q_begin + channel] = q_factor * SURE
            if 0 <= channel + shift < size:
                column = k_begin + channel + shift
                attention.k_proj.weight.data[row, column] = k_factor * SURE


def copy_words(attention, head: int) -> None:
    """What the head reads, it writes down as the word before."""
    for word in range(WORDS):
        attention.v_proj.weight.data[head * E + word, WORD + word] = 1
        attention.out_proj.weight.data[BEFORE + word, head * E + word] = 1


class Known(nn.Module):
    """Attention layers alone; what each head does is written into its weights."""

    def __init__(self) -> None:
        super().__init__()
        slopes = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0])
        first = blank(5, mask=mh.Causal(), attn_bias=mh.Alibi(slopes))
        look(first, 0, {PLACE: 1}, {PLACE: 1}, shift=-1)
        copy_words(first, 0)
        look(first, 1, {WORD: 1, PLACE: 1}, {WORD: 1, PLACE: -1})  # the same word elsewhere
        first.q_proj.bias.data[3 * E] = first.k_proj.weight.data[3 * E, PLACE] = SURE
        second = blank(2, mask=mh.Causal())
        look(second, 0, {WORD: 1}, {BEFORE: 1})
        ahead = blank(1)
        look(ahead, 0, {PLACE: 1}, {PLACE: 1}, shift=1)
        self.layers = nn.ModuleList([first, second, ahead])

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = torch.zeros(batch, length, E)
        x[..., WORD:PLACE] = nn.functional.one_hot(tokens, WORDS)
        x[..., PLACE : PLACE + length] = torch.eye(length)
        for layer in self.layers:
            x = x + layer(x)
        return x


EXPECTED = {
    ("layers.0", 0): ("previous token", "local"),
    ("layers.0", 1): ("duplicate token",),
    ("layers.0", 2): ("broad",),
    ("layers.0", 3): ("first token",),
    ("layers.0", 4): ("local",),
    ("layers.1", 0): ("induction",),
    ("layers.1", 1): ("broad",),
    ("layers.2", 0): ("next token", "local"),
}


@pytest.mark.parametrize("prefix", [[], [3]])
def test_known_heads_get_their_labels(prefix):
    found = mh.report(Known(), vocabulary=WORDS, prefix=prefix, period=PERIOD)
    assert {(head.layer, head.head): head.labels for head in found.heads} == EXPECTED
    (induction,) = found["induction"]
    assert (induction.layer, induction.head) == ("layers.1", 0)
    # Without a prefix, the first token sees nothing but itself before it, which it then is.
    assert induction.scores["induction"] > (0.95 if not prefix else 0.999)
    assert all(0 <= score <= 1.001 for head in found.heads for score in head.scores.values())
    assert found.heads[2].scores["broad"] > 0.999
    assert found.heads[7].scores["next token"] > 0.999


def test_a_text_of_ones_own():
    """What random tokens show comes from them, and the rest from the text."""
    same = torch.full((1, 20), 7)
    seen: list[tuple[int, ...]] = []
    model = Known()

    def run(tokens: Tensor) -> None:
        seen.append(tuple(tokens.shape))
        model(tokens)

    found = mh.report(model, same, vocabulary=WORDS, period=PERIOD, texts=3, run=run)
    assert seen == [(3, 2 * PERIOD), (1, 20)]
    labels = {(head.layer, head.head): head.labels for head in found.heads}
    # All words are the same one, so these two have nothing to choose by.
    assert labels.pop(("layers.0", 1)) == ("duplicate token", "broad")
    assert labels.pop(("layers.1", 0)) == ("induction", "broad")
    assert labels.items() <= EXPECTED.items()


def test_layers_and_cross_attention():
    found = mh.report(Known(), vocabulary=WORDS, period=PERIOD, layers="layers.1")
    assert [head.layer for head in found.heads] == ["layers.1"] * 2

    class Cross(Known):
        def forward(self, tokens: Tensor) -> Tensor:
            x = super().forward(tokens)
            return self.layers[2](x[:, 1:], x)

    found = mh.report(Cross(), vocabulary=WORDS, period=PERIOD)
    assert [head.layer for head in found.heads][-1] == "layers.2"  # of its self-attention
    with pytest.raises(mh.ArgumentError, match="saw no self-attention"):
        model, x = Known(), torch.randn(1, 5, E)
        mh.report(
            model, vocabulary=WORDS, period=PERIOD, run=lambda _: model.layers[2](x, x[:, :3])
        )


@pytest.mark.parametrize("causal", [True, False])
def test_scores_are_means_of_the_weights(causal):
    heads, length, start, period = 3, 19, 3, 8
    query, key = torch.randn(2, 2, heads, length, 8).unbind(0)
    mask = mh.Causal() if causal else None
    behaviours = (*(mh.OffsetMass(n) for n in range(-8, 5)), mh.FirstKeysMass(1), mh.Entropy())
    rows = mh.WeightRows(tuple(range(length)))
    *answers, weights = mh.measure(query, key, [*behaviours, rows], mask=mask)
    positions = torch.arange(length)[None]
    record = mh.Record("x", 0, (0, 1, 2), length, length, positions, behaviours, tuple(answers))
    found = text_scores(record) | repeat_scores(record, start, period)
    assert set(found) == {one.name for one in BEHAVIOURS}
    for head in range(heads):
        sums = dict.fromkeys(found, 0.0)
        counts = dict.fromkeys(found, 0)

        def add(name: str, value: float, sums=sums, counts=counts) -> None:
            sums[name] += value
            counts[name] += 1

        for text in range(2):
            p = weights[text, head].double()
            for i in range(8, length):
                visible = p[i, : i + 1] if causal else p[i]
                add("previous token", p[i, i - 1])
                add("first token", p[i, 0])
                add("local", p[i, i - 4 : i + 5].sum())
                add("broad", math.exp(-(visible * visible.log()).sum()) / len(visible))
                if i + 1 < length:
                    add("next token", p[i, i + 1])
            for i in range(start + period, length):
                add("duplicate token", p[i, i - period])
                add("induction", p[i, i - period + 1])
        for name in found:
            mean = torch.as_tensor(sums[name] / counts[name])
            torch.testing.assert_close(found[name][head], mean.float())


def test_printing_it():
    found = mh.report(Known(), vocabulary=WORDS, period=PERIOD)
    lines = str(found).splitlines()
    assert lines[0].split() == ["behaviour", "(heads)", "layer", "head", "score"]
    row = next(line for line in lines if line.startswith("induction"))
    assert re.fullmatch(r"induction \(1\) +layers\.1 +0 +0\.9\d", row)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(found)
    printed = console.export_text()
    for line in lines[1:]:
        assert all(word in printed for word in line.split())
    assert "<td>layers.1</td><td>0</td>" in found._repr_html_()
    assert len(found.rows(most=1)) == len(BEHAVIOURS)


def test_hostile_names_are_text():
    model = nn.Module()
    known = Known()
    model.add_module("<script>", known)
    found = mh.report(model, vocabulary=WORDS, period=PERIOD, run=known)
    assert "&lt;script&gt;" in found._repr_html_() and "<script" not in found._repr_html_()


def test_tokens_are_the_same_every_time():
    tokens = []
    model = Known()
    model.config = SimpleNamespace(vocab_size=WORDS, bos_token_id=5)

    def run(given: Tensor) -> None:
        tokens.append(given)
        model(given)

    for seed in (0, 0, 1):
        mh.report(model, seed=seed, period=11, run=run)
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])
    assert tokens[0].shape == (4, 23) and (tokens[0][:, 0] == 5).all()
    assert torch.equal(tokens[0][:, 1:12], tokens[0][:, 12:])
    assert all(len(set(row.tolist())) == 12 for row in tokens[0])


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "vocabulary": (
        lambda: mh.report(Known()), mh.ArgumentError,
        "no vocabulary, and the Known has no config.vocab_size",
    ),
    "too few": (
        lambda: mh.report(Known(), vocabulary=9, prefix=[2], period=12), mh.ArgumentError,
        "period is 12; expected at most 8, the tokens of the vocabulary (9) that are not",
    ),
    "period": (
        lambda: mh.report(Known(), vocabulary=24, period=7), mh.ArgumentError,
        "period is 7; expected at least 8 where no tokens are given",
    ),
    "texts": (lambda: mh.report(Known(), vocabulary=24, texts=0), mh.ArgumentError, "texts is 0"),
    "short": (
        lambda: mh.report(Known(), torch.zeros(1, 8, dtype=torch.long), vocabulary=24, period=12),
        mh.ArgumentError, "tokens are texts of 8; expected more than 8",
    ),
    "words": (
        lambda: mh.report(Known(), torch.zeros(1, 9), vocabulary=24), mh.ArgumentTypeError,
        "tokens is torch.float32 [1, 9]; expected an int tensor [B, L]",
    ),
    "prefix": (
        lambda: mh.report(Known(), vocabulary=24, prefix=["a"]), mh.ArgumentTypeError,
        "a token of prefix must be a whole number",
    ),
    "behaviour": (
        lambda: mh.report(Known(), vocabulary=24, period=12)["inductive"], mh.ArgumentError,
        "there is no behaviour 'inductive'; expected one of previous token, ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    run, error, words = BAD[name]
    with pytest.raises(error, match=re.escape(words)):
        run()
