"""Tokens that are parts of letters: put together for the text, each part with a name of its own."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from observed import HOSTILE, measured
from test_page import Read
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import manyheads as mh
from manyheads.inspect import token_texts
from manyheads.inspect.letters import joined

TEXT = "so 😀 e\u0301 日本 \x00</script>\u202e 👩‍👧\ufffd end"
TEXT += "".join(map(chr, range(0x1F600, 0x1F640)))  # with every byte that goes on with a letter


def byte_level() -> PreTrainedTokenizerFast:
    """Trained on two emoji, so that some tokens are two or three bytes of a letter."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=259, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([" 😀😁" * 5], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def with_byte_fallback() -> PreTrainedTokenizerFast:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"so end▁"]
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(words))}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made)


TOKENIZERS = {"byte-level": byte_level, "byte fallback": with_byte_fallback}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_byte_is_lost(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer(TEXT).input_ids
    texts = token_texts(tokenizer, torch.tensor(ids))
    assert texts == token_texts(tokenizer, ids) and len(texts) == len(ids)
    assert "".join(texts).encode("utf-8", "surrogateescape") == TEXT.encode()
    assert sum("\ufffd" in tokenizer.decode([one]) for one in ids) > 20  # what it would have been
    pieces, names = joined(texts)
    assert "".join(pieces) == TEXT
    for place, name in names.items():
        whole, _, number = name.rpartition(" ")
        first, count = place + 1 - int(number.split("/")[0]), int(number.split("/")[1])
        assert "".join(pieces[first : first + count]) == whole
        assert pieces[first] and (place == first or name != names[first])


def test_words_are_what_the_tokenizer_says() -> None:
    tokenizer = byte_level()
    ids = tokenizer("so end").input_ids
    assert token_texts(tokenizer, ids) == [tokenizer.decode([one]) for one in ids]


def test_another_spelling_stays_as_it_is() -> None:
    class Odd:
        def decode(self, ids: list[int]) -> str:
            return "\ufffd"

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["語"]

    assert token_texts(Odd(), [7]) == ["\ufffd"]


def cut(text: str, *places: int) -> list[str]:
    content, ends = text.encode(), (*places, None)
    begins = (0, *places)
    return [
        content[a:b].decode("utf-8", "surrogateescape") for a, b in zip(begins, ends, strict=True)
    ]


# Tokens -> what each adds to the text, and the names of some.
JOINED = {
    "three parts": (cut("a 😀b", 4, 5), ["a 😀", "", "b"], {0: "a 😀b 1/3", 1: "a 😀b 2/3"}),
    "two letters": (
        cut("😀😁", 2, 4, 7),
        ["😀", "", "😁", ""],
        {0: "😀 1/2", 1: "😀 2/2", 2: "😁 1/2", 3: "😁 2/2"},
    ),
    "across": (cut("😀😁", 2, 6), ["😀", "😁", ""], {0: "😀😁 1/3", 1: "😀😁 2/3", 2: "😀😁 3/3"}),
    "the rest is missing": (cut("x😀", 3)[:1], ["x\udcf0\udc9f"], {}),
    "never a letter": (["\udcf0", "\udcf0", "A"], None, {}),
    "half a pair": (["\ud83d\udc9f", "\udc98"], None, {}),
    "hostile": (HOSTILE, None, {}),
    "nothing": ([], None, {}),
}


@pytest.mark.parametrize("name", JOINED)
def test_joined(name: str) -> None:
    tokens, pieces, names = JOINED[name]
    found, found_names = joined(tokens)
    assert found == (tokens if pieces is None else pieces)
    assert found_names.items() >= names.items() and bool(found_names) == bool(names)


@given(some.text(max_size=20), some.data())
def test_any_cut_of_any_text_is_that_text(text: str, data: some.DataObject) -> None:
    content = text.encode()
    places = data.draw(some.sets(some.integers(1, max(1, len(content)))))
    tokens = [one for one in cut(text, *sorted(places)) if one]
    pieces, names = joined(tokens)
    assert "".join(pieces) == text and len(pieces) == len(tokens)
    for place, token in enumerate(tokens):
        whole = not any("\udc80" <= sign <= "\udcff" for sign in token)
        assert (place in names) != whole and (pieces[place] == token) >= whole


def test_the_page_holds_text_and_names() -> None:
    tokens = [*cut("a 😀b", 4, 5), "</script>", "\u202e"]
    read = Read(mh.view(measured(mh.Entropy(), lengths=(5, 5)), tokens))
    assert read.texts() == [["a 😀", "", "b", "</script>", "\u202e"]]
    (names,) = (json.loads(read.blobs[blob]) for blob in read.meta["inputs"][0]["names"])
    assert names == {"0": "a 😀b 1/3", "1": "a 😀b 2/3", "2": "a 😀b 3/3"}
