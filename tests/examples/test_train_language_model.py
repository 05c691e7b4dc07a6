import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch
import train_language_model as example
from checkpoints import CheckpointError
from corpus import END, prepare, texts_of
from data import Split
from tolerance import assert_derived_close
from training import Settings
from transformer import Transformer

import manyheads as mh

WORDS = ("a", "small", "tool", "library", "that", "reads", "writes", "files")
#: Each word calls for the next; 3 to 13 of them.
TEXTS = [
    " ".join(itertools.islice(itertools.cycle(WORDS), i % 8, i % 8 + 3 + i % 11))
    for i in range(337)
]
SETTINGS = Settings(steps=3, warmup=1)


@pytest.fixture(scope="module")
def corpus():
    return prepare(Split(TEXTS[40:], TEXTS[:20], TEXTS[20:40]))


@pytest.fixture
def model(corpus):
    return Transformer(corpus.tokenizer.get_vocab_size(), example.CONFIG, decoder_layers=2)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(example, "LAYERS", 1)
    monkeypatch.setattr(example, "CONFIG", replace(example.CONFIG, dim=24, heads=2))


def test_packed_texts_are_those_padded_on_stock_attention(corpus, model):
    stock = Transformer(
        corpus.tokenizer.get_vocab_size(), replace(example.CONFIG, attention="sdpa"), 0, 2
    )
    stock.load_state_dict(model.state_dict())
    texts = corpus.train[:7]
    assert len({len(text) for text in texts}) > 1
    got, expected = example.packed(model, texts), example.padded(stock, texts)
    assert got.shape == (sum(len(text) - 1 for text in texts),)
    assert_derived_close(got, expected)
    alone = torch.cat([example.packed(model, [text]) for text in texts])
    assert_derived_close(got, alone)


def test_a_text_is_cut_into_tokens_and_back(corpus):
    text = corpus.test[3]
    assert text[0] == text[-1] == END and (text[1:-1] != END).all()
    written = corpus.tokenizer.decode(text.tolist())
    assert written == corpus.test_text.split("\n")[3] == TEXTS[23]


def test_the_unigram_baseline(corpus):
    following = torch.cat([text[1:] for text in corpus.train]).tolist()
    size = corpus.tokenizer.get_vocab_size()
    logs = [
        -math.log((following.count(token) + 1) / (len(following) + size))
        for text in corpus.test
        for token in text[1:].tolist()
    ]
    assert example.unigram_nats(corpus) == pytest.approx(sum(logs) / len(logs))
    size = len(corpus.test_text.encode())
    assert example.bits_per_byte(corpus, 2.0) == pytest.approx(len(logs) * 2 / math.log(2) / size)


def test_training_learns_and_writes(corpus, small, tmp_path):
    settings = Settings(steps=40, learning_rate=1e-2, warmup=5, bf16=True)
    found, model = example.measures(corpus, settings, tmp_path)
    assert found["bits_per_byte"] < 0.8 * found["bits_per_byte_unigram"]
    assert found["perplexity"] < 0.8 * found["perplexity_unigram"]
    assert example.write(corpus, model, "a small ", seed=5).startswith("a small")
    again, _ = example.measures(corpus, settings, tmp_path)  # from the checkpoint
    assert again["perplexity"] == found["perplexity"]
    other = replace(corpus, train=[text.flip(0) for text in corpus.train])  # as many, as long
    with pytest.raises(CheckpointError, match=r"of another run: it had {'data'.*Nothing was"):
        example.learn(other, settings, folder=tmp_path)


def test_the_comparison_starts_and_learns_alike(corpus, small):
    found = example.compare(corpus, SETTINGS, seeds=2)
    assert found["nats"] == pytest.approx(found["nats_sdpa"], rel=1e-3)
    assert found["nats"][0] != found["nats"][1]
    assert 0.2 < found["padding"] < 0.6


def test_texts_of_yours(small, tmp_path, monkeypatch, capsys):
    file = tmp_path / "texts.txt"
    texts = [f"{number} {text}" for number, text in enumerate(TEXTS)]
    file.write_text("\ufeff" + "\n\n".join([*texts, *texts]), encoding="utf-8")
    split = texts_of(file)
    assert (len(split.train), len(split.validation), len(split.test)) == (303, 17, 17)
    assert (split.test[1], split.validation[1], split.train[18]) == tuple(texts[20:23])
    assert split.test[0] == texts[0]
    arguments = ["--text", str(file), "--steps", "2", "--folder", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train_language_model.py", *arguments, "--prompt", "files"])
    example.main()
    printed = capsys.readouterr().out
    assert "bits per byte xz" in printed and "\nfiles" in printed
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    (tmp_path / "few.txt").write_text("one\n\ntwo")
    with pytest.raises(
        mh.ArgumentError, match=r"few\.txt holds 2 different texts; expected 40 or more"
    ):
        texts_of(tmp_path / "few.txt")
