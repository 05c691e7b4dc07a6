import dataclasses
import functools
import json
import os

import pytest
import results
import results_parts
from results import main, run, run_apart
from results_parts import PARTS
from typer import Typer
from typer.testing import CliRunner

measure = functools.partial(results.measure, run=run)
SCORES = {"BLEU": 48.84, "chrF": 70.49, "CPU seconds": 1.7}
COMPARED = {"manyheads": [0.983, 0.981, 0.977], "sdpa": [0.982, 0.984, 0.976]}
#: What each part finds, of the form that the real ones have.
FOUND = {
    "translation-packaged": {
        "measures": {
            "sentences": 83, "greedy, manyheads": SCORES, "beam 4, sdpa": SCORES,
            "greedy tokens equal": True,
        },
        "samples": [["a | b", "c\nd", "e"]],
    },
    "translation-trained": {
        "pairs": 250, "held out": 53, "training, CPU seconds": 601.0, "examples": [["a", "b", "c"]],
        "trained": SCORES, "greedy": SCORES, "copying the source": {"BLEU": 8.5, "chrF": 29.0},
    },
    "summarisation": {
        "pairs": 4001, "held out": 59, "training, CPU seconds": 61.0,
        "ROUGE-L": {"trained": 31.0, "first 12 words": 27.1},
        "ROUGE-L, 7 of them": {"trained": 30.0, "first 12 words": 28.0, "SmolLM2": 21.0},
        "examples": [{"given": "g", "trained": "t", "first 12 words": "f", "SmolLM2": "s"}],
    },
    "generation-chat": {
        "questions": ["Why?"], "answers": ["So."], "prompt_tokens": [7], "prompt_tokens_run": [5],
        "new_tokens": 3, "same_tokens_as_sdpa": True, "cpu_seconds": 2.0, "cpu_seconds_sdpa": 4.0,
    },
    "generation-perplexity": {
        "text": "a text", "tokens": 8192, "context": 8192, "perplexity": 10.268,
        "perplexity_sdpa": 10.268, "nats_difference": 6e-8, "largest_difference_of_a_token": 3e-5,
        "same_greedy_tokens": True, "greedy_tokens": 177, "cpu_seconds": 3.0,
        "cpu_seconds_sdpa": 6.0,
    },
    "generation-trained": {
        "parameters": 2_500_000, "steps": 1200, "training_texts": 4001, "test_texts": 59,
        "perplexity": 21.0, "perplexity_unigram": 800.0, "bits_per_byte": 1.3,
        "bits_per_byte_unigram": 2.6, "bits_per_byte_xz": 2.2, "seconds": 300.0,
        "samples": ["a tool\nthat", "another"],
    },
    "generation-compared": {
        "steps": 100, "test_texts": 400, "nats": [4.1, 4.2, 4.3], "nats_sdpa": [4.1, 4.2, 4.31],
        "cpu_seconds": 5.0, "cpu_seconds_sdpa": 10.0, "padding": 0.37,
    },
    "speech": {
        "clips": 10, "audio_seconds": 34.4, "words": 92, "errors": 11, "wer": 11 / 92,
        "wer_normalised": 0.077, "texts_as_sdpa": 10, "cpu_seconds": 7.5, "cpu_seconds_sdpa": 7.7,
        "text": "go", "word_times": [{"text": "go", "start": 0.1, "end": 0.53}],
    },
    "images-mnist": COMPARED | {
        "name": "mnist", "cpu_seconds": {"manyheads": 110.0, "sdpa": 160.0}, "time_ratio": 0.69,
    },
    "images-digits": COMPARED | {
        "name": "digits", "cpu_seconds": {"manyheads": 16.0, "sdpa": 15.0}, "time_ratio": 1.07,
    },
    "images-lines": {
        "drawn": ["a b"], "texts": ["ab"], "same_text": True, "difference": 3.5e-6,
        "column_difference": 9.2e-7, "largest_column": 2.2, "character_error_rate": 0.017,
    },
}  # fmt: skip


def faked(part, find):
    return dataclasses.replace(part, measure=find)


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # build/examples is below
    return tmp_path / "RESULTS.md"


def section(page, title):
    return page.read_text().split(f"### {title}\n")[1].split("\n##")[0]


def test_every_part_is_described(page):
    assert [part.name for part in PARTS] == list(FOUND)
    failed = measure([faked(part, lambda _, name=part.name: FOUND[name]) for part in PARTS], page)
    text = page.read_text()
    assert failed == [] and text.count("- Met: ") == 16 and "Missed" not in text
    assert [line for line in text.split("\n") if line.startswith("## ")] == [
        "## Translation", "## Summarisation", "## Text generation", "## Speech", "## Images",
    ]  # fmt: skip
    assert "| a \\| b | c d | e |" in " ".join(text.split())
    assert "11.96%" in section(page, "Whisper tiny.en on ten clips")
    digits = section(page, "scikit-learn's digits")
    assert "98.03% of the held-out pictures read (goal: at least 97.5%)" in digits
    assert "0.03% apart" in digits and "up to 0.80% apart" in digits and "1.07 times" in digits
    for link in (use[1] for use in results_parts.USES.values()):
        assert (results.PAGE.parents[1] / "docs" / "examples" / link).is_file()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("translation-packaged", {"measures": {**FOUND["translation-packaged"]["measures"],
                                               "greedy tokens equal": False}}),
        ("translation-trained", {"trained": {"BLEU": 49.0, "chrF": 28.0}}),
        ("summarisation", {"ROUGE-L": {"trained": 27.0, "first 12 words": 27.1}}),
        ("generation-chat", {"same_tokens_as_sdpa": False}),
        ("generation-perplexity", {"nats_difference": 0.01}),
        ("generation-trained", {"bits_per_byte": 2.3}),
        ("generation-compared", {"nats": [5.1, 5.2, 5.3]}),
        ("speech", {"wer": 0.121}),
        ("images-mnist", {"manyheads": [0.97, 0.971, 0.968], "sdpa": [0.969, 0.97, 0.97]}),
        ("images-digits", {"sdpa": [0.99, 0.991, 0.992]}),
        ("images-lines", {"same_text": False}),
    ],
)  # fmt: skip
def test_a_goal_that_is_missed_says_so(name, changes):
    (part,) = (part for part in PARTS if part.name == name)
    assert part.describe(FOUND[name] | changes).count("**Missed**") == 1


def test_a_part_that_fails_costs_only_itself(page, capsys):
    speech, *_ = (part for part in PARTS if part.name == "speech")
    lines = PARTS[-1]

    def fail(folder):
        raise OSError("no network\nat all")

    good = faked(lines, lambda folder: FOUND["images-lines"])
    assert measure([faked(speech, fail), good], page) == ["speech"]
    assert "no network" in capsys.readouterr().err
    failed = section(page, speech.title)
    assert "**Failed** after" in failed and "    OSError: no network\n    at all" in failed
    assert "- Met: the same text" in section(page, lines.title)
    assert "Not measured yet: `make example-summarisation`." in page.read_text()
    # The other way round: what was found stays, and what failed is mended.
    measured = section(page, lines.title)
    assert measure([faked(speech, lambda folder: FOUND["speech"])], page) == []
    assert "- Met: word error rate" in section(page, speech.title)
    assert section(page, lines.title) == measured
    assert list(json.loads(page.with_suffix(".json").read_text())) == ["speech", "images-lines"]


def test_a_part_has_a_process_of_its_own():
    with pytest.raises(KeyError, match="no such part"):  # looked up over there
        run_apart(dataclasses.replace(PARTS[0], name="no such part"))


def test_a_process_that_is_killed_is_a_part_that_failed(monkeypatch):
    monkeypatch.setattr(results, "run_named", os._exit)
    record = run_apart(dataclasses.replace(PARTS[0], name=9))
    assert record["error"].startswith("BrokenProcessPool: ")
    assert record["seconds"] > 0 and record["machine"] == results.machine()


def test_what_cannot_be_described_fails(page):
    assert measure([faked(PARTS[0], lambda folder: {"other": 1})], page) == [PARTS[0].name]
    assert "KeyError: 'measures'" in section(page, PARTS[0].title)


def test_a_part_that_is_stopped_leaves_the_page(page):
    def stop(folder):
        raise KeyboardInterrupt

    measure([faked(PARTS[-1], lambda folder: FOUND["images-lines"])], page)
    before = page.read_text()
    with pytest.raises(KeyboardInterrupt):
        measure([faked(PARTS[-1], stop)], page)
    assert page.read_text() == before


def test_a_training_starts_anew(page):
    folders = []

    def train(folder):
        folders.append(folder)
        assert not folder.exists()
        folder.mkdir(parents=True)
        (folder / "checkpoint.safetensors").touch()
        return FOUND["images-lines"]

    assert measure([faked(PARTS[-1], train)] * 2, page) == []
    assert len(folders) == 2 and folders[0].is_relative_to("build/examples")


def test_times_and_machines(page, monkeypatch):
    measure([faked(PARTS[-1], lambda folder: FOUND["images-lines"])], page)
    assert "(On " not in page.read_text() and "threads, torch " in page.read_text()
    monkeypatch.setattr(results, "machine", lambda: "a machine of 1997")
    clock = iter([10.0, 135.0])
    monkeypatch.setattr(results.time, "perf_counter", lambda: next(clock))
    measure([faked(PARTS[7], lambda folder: FOUND["speech"])], page)
    assert "(On a machine of 1997.)" in section(page, PARTS[7].title)
    assert "| speech       | 2.1 min |" in page.read_text()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], [part.name for part in PARTS]),
        (["images", "speech"], ["speech", "images-mnist", "images-digits", "images-lines"]),
        (["generation-chat"], ["generation-chat"]),
    ],
)
def test_the_command_line(names, expected, monkeypatch):
    asked, app = [], Typer()
    app.command()(main)
    monkeypatch.setattr(results, "measure", lambda parts: asked.extend(parts) or [])
    assert CliRunner().invoke(app, names).exit_code == 0
    assert [part.name for part in asked] == expected
    monkeypatch.setattr(results, "measure", lambda parts: ["speech"])
    assert CliRunner().invoke(app, names).exit_code == 1
    wrong = CliRunner().invoke(app, ["pictures"])
    assert wrong.exit_code == 2 and "pictures" in wrong.output


def test_one_make_target_for_each_use():
    makefile = (results.PAGE.parents[1] / "Makefile").read_text()
    assert f"EXAMPLES := {' '.join(results_parts.USES)}\n" in makefile
