import io
import os
import signal
import sys
from unittest import mock

import pytest
import tiny_model
import torch
from chat import main, measures
from conversation import Chat, Sampling
from growing_cache import GrowingLayer
from transformers import TextStreamer

import manyheads as mh
from manyheads.commands import load_model

GREEDY = Sampling(temperature=0, max_new_tokens=11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def chat(folder):
    return Chat(load_model(folder, "manyheads"), GREEDY)


def from_scratch(folder, chat, new_tokens):
    """What eager attention answers, without a cache of earlier turns, to the last message."""
    loaded = load_model(folder, "eager")
    encoded = loaded.tokenizer.apply_chat_template(
        chat.messages[:-1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = loaded.model.generate(**encoded, do_sample=False, max_new_tokens=new_tokens)
    return tuple(output[0, encoded["input_ids"].shape[1] :].tolist())


def test_a_turn_runs_only_what_is_new_and_answers_as_from_scratch(folder, chat):
    first = chat.answer("why is the sky blue")
    assert (first.prompt, first.run) == (7, 7)
    assert first.tokens == from_scratch(folder, chat, 11)
    second = chat.answer("who is the air")
    assert second.prompt == 7 + 11 + 1 + 4 + 1
    assert second.run == 1 + 1 + 4 + 1  # the last token written was never run
    assert second.tokens == from_scratch(folder, chat, 11)
    assert chat.cache.get_seq_length() == second.prompt + 11 - 1
    assert all(isinstance(layer, GrowingLayer) for layer in chat.cache.layers)


class AfterThree(TextStreamer):
    """Presses Ctrl-C while the third token is written."""

    count = 0

    def put(self, value):
        self.count += 1
        if self.count == 4:  # the prompt comes first
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(folder, chat):
    before = signal.getsignal(signal.SIGINT)
    stopped = chat.answer("why", AfterThree(chat.tokenizer))
    assert 3 <= len(stopped.tokens) <= 4
    assert signal.getsignal(signal.SIGINT) is before
    turn = chat.answer("is the sky blue")
    assert turn.run < turn.prompt
    assert turn.tokens == from_scratch(folder, chat, 11)


def test_a_turn_that_broke_leaves_no_broken_cache(folder, chat):
    chat.answer("why")
    layer = chat.model.model.layers[1]

    def press(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), mock.patch.object(layer, "forward", press):
        chat.answer("who")
    assert len(chat.messages) == 2  # the question without an answer is forgotten
    turn = chat.answer("is the sky blue")
    assert turn.run == turn.prompt
    assert turn.tokens == from_scratch(folder, chat, 11)


def test_first_turns_are_forgotten_where_the_context_ends(folder, chat):
    for _ in range(6):
        turn = chat.answer("why is the sky blue")
        assert turn.prompt + 11 <= tiny_model.CONTEXT
    assert 3 < len(chat.messages) < 12
    assert turn.tokens == from_scratch(folder, chat, 11)
    with pytest.raises(mh.ArgumentError, match="got a message of 99 tokens; expected at most 86"):
        Chat(load_model(folder, "manyheads"), GREEDY).answer("sky " * 97)


def test_a_seed_repeats_what_was_drawn(folder):
    drawn = []
    for seed in (5, 5, 7):
        torch.manual_seed(seed)
        sampling = Sampling(temperature=3.0, top_p=1.0, top_k=9, max_new_tokens=13)
        drawn.append(Chat(load_model(folder, "manyheads"), sampling).answer("why").tokens)
    assert drawn[0] == drawn[1] != drawn[2]


def test_lines_that_are_not_typed_are_answered(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("why\n\n" + "sky " * 97 + "\nwho is who\n"))
    arguments = ["--model", folder, "--temperature", "0", "--max-new-tokens", "5", "--statistics"]
    monkeypatch.setattr(sys, "argv", ["chat.py", *arguments])
    main()
    printed = capsys.readouterr()
    assert [len(line.split()) for line in printed.out.strip().splitlines()] == [5, 5]
    assert "[3 of 3 prompt tokens run, 5 written" in printed.err
    assert "got a message of" in printed.err  # too long; the chat goes on
    assert "[6 of 13 prompt tokens run" in printed.err


def test_a_missing_model_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", "./nowhere"])
    with pytest.raises(SystemExit, match=r"chat: no model at './nowhere'\. Expected"):
        main()


@pytest.mark.parametrize("option", [["--temperature=-1"], ["--top-p", "2"], ["--top-k=-3"]])
def test_sampling_that_means_nothing(option, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["chat.py", *option])
    with pytest.raises(SystemExit, match=r"chat: got a t.*expected"):
        main()


def test_measures(folder):
    found = measures(folder, ("why", "who is who"))
    assert found["same_tokens_as_sdpa"]
    assert found["prompt_tokens_run"][1] < found["prompt_tokens"][1]
