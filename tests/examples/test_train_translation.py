"""The translation example on a toy language: tokens, data, training, writing."""

import itertools

import pytest
import torch
import train_translation
from checkpoints import CheckpointError
from text_to_text import END, TextToText, learn_tokens, without_near_copies
from training import Settings
from transformer import Config

QUICK = Settings(steps=150, learning_rate=2e-2, warmup=10, log_every=10)


def toy_pairs():
    """Three letters of eight, and their capitals backwards."""
    return [
        (" ".join(letters), " ".join(reversed(letters)).upper())
        for letters in itertools.combinations("abcdefgh", 3)
    ]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(train_translation, "BATCH", 10)
    monkeypatch.setattr(train_translation, "SETTINGS", QUICK)
    sizes = {"layers": (1, 1), "source_tokens": 11, "target_tokens": 13}
    monkeypatch.setattr(train_translation, "SIZES", sizes)
    tiny = lambda attention="manyheads": Config(  # noqa: E731
        dim=32, heads=2, hidden=64, dropout=0.0, attention=attention
    )
    monkeypatch.setattr(train_translation, "config", tiny)


def test_any_text_survives_its_tokens():
    tokenizer = learn_tokens(["red bird", "rot Vogel"], 300)
    for text in ("red bird", "Füße", "日本 €", "a\tb"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids).removeprefix(" ") == text
        assert min(ids) > 2  # none of START, END, PADDING


def test_it_learns_a_toy_language(tmp_path, attention="manyheads"):
    pairs = toy_pairs()
    split = train_translation.Split(pairs, pairs, pairs)
    task = train_translation.fit(split, tmp_path, QUICK, attention, tokens=275)
    sources, targets = zip(*pairs, strict=True)
    written = task.write(sources)
    right = sum(a == b for a, b in zip(written, targets, strict=True))
    assert right >= 0.9 * len(pairs)
    assert task.write(sources, beams=3, batch=7) == task.write(sources, beams=3)

    config, sizes = train_translation.config(attention), train_translation.SIZES
    again = TextToText.load(tmp_path, config, **sizes)
    assert again.write(sources) == written
    source, target, weights = again.alignment(sources[0])
    assert weights.shape == (len(target), len(source)) and source[-1] == target[-1] == "</s>"
    assert torch.equal(weights.sum(1).round(decimals=5), torch.ones(len(target)))


def test_measures_of_ones_own_pairs(tmp_path):
    pairs = toy_pairs()
    path = tmp_path / "mine.tsv"
    path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    split = train_translation.read_pairs(path)
    assert sorted([*split.train, *split.validation, *split.test]) == sorted(pairs) and split.test
    found = train_translation.measures(None, path, QUICK, beams=2)
    assert found["held out"] == len(split.test) and found["pairs"] == len(split.train)
    assert found["copying the source"]["chrF"] < found["trained"]["chrF"] <= 100


def test_a_trained_model_keeps_its_tokens(tmp_path):
    config, settings = train_translation.config(), Settings(steps=1)
    pairs = toy_pairs()
    others = [("other " + source, target) for source, target in pairs]
    targets = [target for _, target in reversed(pairs)]
    swapped = [(source, target) for (source, _), target in zip(pairs, targets, strict=True)]
    for given, learned, refused in (
        (pairs, pairs, False),
        (pairs, pairs, False),
        (others, others, True),
        (swapped, pairs, True),
        (pairs, others, True),
    ):
        tokens = learn_tokens((text for pair in learned for text in pair), 300)
        task = TextToText(tokens, config, (1, 1), 11, 13)
        if refused:
            kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
            with pytest.raises(
                CheckpointError, match=r"another run.*'data'.*Nothing was overwritten"
            ):
                task.fit(given, settings, 10, tmp_path)
            assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept
        else:
            task.fit(given, settings, 10, tmp_path)


def test_a_file_may_have_a_mark_windows_ends_of_lines_and_blank_lines(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_bytes("\ufeffa\tb\r\n\r\nc\td\r\n \t\n".encode())
    split = train_translation.read_pairs(path)
    assert sorted([*split.train, *split.validation, *split.test]) == [("a", "b"), ("c", "d")]


def test_a_line_that_is_no_pair_is_named(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text("a\tb\nred bird rot Vogel\n")
    with pytest.raises(ValueError, match=r"line 2: got 1 columns in 'red bird rot Vogel'"):
        train_translation.read_pairs(path)


def test_long_sources_keep_their_beginning_and_end():
    task = TextToText(
        learn_tokens(["a b c d e f g"], 300), Config(dim=8, heads=2), (1, 1), 5, 3, source_end=2
    )
    whole = torch.tensor([*task.tokenizer.encode("a b c d e f g").ids, END])
    (cut,) = task.source(["a b c d e f g"])
    assert cut.tolist() == [*whole[:3].tolist(), *whole[-2:].tolist()]
    assert len(task.source(["a b"])[0]) == 3


def test_near_copies_are_left_out():
    known = [("the quick brown fox jumps over the lazy dog", "x"), ("version 2 of it", "y")]
    held = [
        ("the quick brown fox jumps over a lazy dog", "copy: 8 words of 9"),
        ("Version 31 of it!", "copy: another number"),
        ("the quick brown cat sleeps under the table", "no copy"),
    ]
    assert without_near_copies(held, known) == held[2:]
    assert without_near_copies(held, known, most=0.8) == held[2:]
    assert without_near_copies(held, known, most=0.9) == held[::2]


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got no tokenizer\.json; expected a folder"):
        TextToText.load(tmp_path, train_translation.config())
