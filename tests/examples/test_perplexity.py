import math
import sys

import perplexity
import pytest
import tiny_model
import torch
from perplexity import losses, main, measures, python_reference, windows
from torch.nn.functional import cross_entropy

import manyheads as mh
from manyheads.commands import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("tiny"))


def test_windows_count_every_token_once():
    for length, context in ((2, 7), (7, 7), (8, 7), (101, 7), (101, 10), (53, 2)):
        counted = []
        for start, first, end in windows(length, context):
            assert end - start <= context and start < first
            counted += range(first, end)
        assert counted == list(range(1, length))


@pytest.mark.parametrize("piece", [3, 512])
def test_losses_are_those_of_each_window_alone(folder, piece, monkeypatch):
    monkeypatch.setattr(perplexity, "PIECE", piece)
    model = load_model(folder, "eager").model
    tokens = torch.randint(0, len(tiny_model.WORDS), (29,))
    expected = torch.zeros(29)
    for start, first, end in windows(29, 8):
        with torch.no_grad():
            logits = model(tokens[None, start : end - 1]).logits[0]
        nats = cross_entropy(logits, tokens[start + 1 : end], reduction="none")
        expected[first:end] = nats[first - start - 1 :]
    torch.testing.assert_close(losses(model, tokens, 8), expected[1:])


def test_measures_of_a_file(folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "text.txt"
    file.write_text("why is the sky blue " * 7)
    found = measures(str(file), folder, tokens=31, context=13, new_tokens=5)
    assert found["tokens"] == 31 and found["same_greedy_tokens"]
    assert found["perplexity"] == pytest.approx(math.exp(found["nats"]))
    assert found["nats_difference"] < 1e-6 < found["nats"]
    # bits a byte: 30 tokens of nats, over the text that the 31 tokens stand for
    size = len(" ".join(("why is the sky blue " * 7).split()[:31]))
    assert found["bits_per_byte"] == pytest.approx(30 * found["nats"] / math.log(2) / size)
    arguments = ["--model", folder, "--tokens", "31", "--context", "13"]
    monkeypatch.setattr(sys, "argv", ["perplexity.py", str(file), *arguments])
    main()
    assert f"perplexity {found['perplexity']:.3f}" in capsys.readouterr().out


def test_what_cannot_be_measured_is_said(folder, tmp_path, monkeypatch):
    with pytest.raises(mh.ArgumentError, match=r"a context of 98; expected .* 2 to 97"):
        measures(None, folder, context=98)
    monkeypatch.setattr(sys, "argv", ["perplexity.py", str(tmp_path / "no"), "--model", folder])
    with pytest.raises(SystemExit, match=r"perplexity: .*No such file"):
        main()


def test_the_text_of_python_itself():
    assert len(python_reference()) > 100_000
