"""The summarising example on toy texts: split, baseline, measure, training, prompting."""

import itertools
from types import SimpleNamespace

import pytest
import summarise
from training import Settings
from transformer import Config

QUICK = Settings(steps=60, learning_rate=2e-2, warmup=10, log_every=10)
ADJECTIVES = ("small", "fast", "old", "new", "free", "tiny", "plain", "large", "common", "modern")
NOUNS = ("parser", "compiler", "game", "editor", "viewer", "daemon", "server", "client", "shell")


def toy_summaries():
    """Long texts whose short one is the adjective and the noun of their middle."""
    pairs = [
        (f"What it holds is called a {a} {n} by all who know {n}s of that {a} kind.", f"{a} {n}")
        for a, n in itertools.product(ADJECTIVES, NOUNS)
    ]  # fmt: skip
    return summarise.Split(pairs[:50], pairs[50:70], pairs[70:])


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(summarise, "summaries", toy_summaries)
    monkeypatch.setattr(summarise, "BATCH", 10)
    sizes = {"layers": (1, 1), "source_tokens": 31, "source_end": 7, "target_tokens": 13}
    monkeypatch.setattr(summarise, "SIZES", sizes)
    tiny = lambda attention="manyheads": Config(  # noqa: E731
        dim=32, heads=2, hidden=64, dropout=0.0, attention=attention, copies=True
    )
    monkeypatch.setattr(summarise, "config", tiny)


def test_siblings_are_one_family():
    siblings = [
        "GNU Foo library", "GNU foo library 2 (data)", "gnu Foo library - documentation",
        "GNU Foo library, headers", "GNU Foo 3 library: tools",
    ]  # fmt: skip
    assert {summarise.family(summary) for summary in siblings} == {"gnu foo library"}
    assert summarise.family("GNU Bar library") != "gnu foo library"


def test_split_holds_families_and_near_copies_apart(monkeypatch):
    pairs = [(f"{a} {b} {a}{b} text", f"{a} {b} (data {i})")
             for i, (a, b) in enumerate(itertools.permutations("abcdefghijk", 2))]  # fmt: skip
    pairs += [(f"{long} more", short.replace("data", "docs")) for long, short in pairs]
    monkeypatch.setattr(summarise, "summaries", lambda: summarise.Split(pairs, [], []))
    split = summarise.load_pairs()
    families = [{summarise.family(short) for _, short in part} for part in split]
    assert all(families)
    assert not families[0] & families[2] and not families[1] & families[2]


def test_score_is_rouge_l():
    # longest common subsequence "a tool texts" of 3 words: 2 * 3/4 * 3/5 / (3/4 + 3/5) = 2/3
    assert summarise.score(["a tool for texts"], ["a small tool shortens texts"]) == 66.67
    assert summarise.score(["x", "y z"], ["y", "y z"]) == 50.0


def test_the_lead_is_as_long_as_scores_best():
    pairs = [("one two three four five six seven eight", "one two three four five")] * 3
    assert summarise.best_lead(pairs) == 5
    assert summarise.lead(pairs[0][0], 5) == pairs[0][1]


def test_a_prompted_models_first_line_counts():
    asked = []

    def answer(prompt, max_new_tokens):
        asked.append(prompt)
        return SimpleNamespace(text=' "A small tool."\nIt is small.')

    found = summarise.prompted(SimpleNamespace(answer=answer), "the text")
    assert found == "A small tool." and asked == [summarise.PROMPT + "the text"]


def test_measures_beside_the_baseline_and_a_prompted_model(tiny, monkeypatch, tmp_path):
    model = SimpleNamespace(name="toy", answer=lambda *_, **__: SimpleNamespace(text="small game"))
    monkeypatch.setattr(summarise, "load_language_model", lambda which: model)
    monkeypatch.setattr(summarise, "without_near_copies", lambda held_out, known: list(held_out))
    found = summarise.measures(tmp_path, QUICK, beams=2, prompts=2)
    assert found["pairs"] + found["held out"] <= 90 and found["held out"] > 0
    scores = found["ROUGE-L"]
    assert set(scores) == {"trained", *[name for name in scores if name.startswith("first ")]}
    assert scores["trained"] > 20
    (some,) = [value for key, value in found.items() if key.startswith("ROUGE-L, 2 of")]
    assert set(some) == {*scores, "toy"}
    assert (tmp_path / "checkpoint.safetensors").exists()
