"""What a language model is trained on: texts, held out by text, cut into tokens by a BPE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from data import Split, summaries
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import manyheads as mh

#: The token before and behind every text; how many kinds of tokens; the most tokens of a text.
END, VOCABULARY, LONGEST = 0, 4096, 512
FEWEST_TEXTS = 40


@dataclass(frozen=True)
class Corpus:
    """Tokenized texts, int64 [L] each, that begin and end with END; what the test ones say."""

    tokenizer: Tokenizer
    train: list[Tensor]
    validation: list[Tensor]
    test: list[Tensor]
    test_text: str


def debian() -> Split:
    """Package descriptions, the short line and the paragraphs behind it.

    Packages with the same short line are on one side of the split. Those of one source may still
    share paragraphs, so held-out texts are easier than a stranger's would be.
    """
    return Split(*([f"{short}\n{long}" for long, short in part] for part in summaries()))


def texts_of(file: Path) -> Split:
    """A file's texts, a blank line between them: 18 of 20 to train on, one each held out.

    Texts that occur again are taken once, so that none is on both sides.
    """
    parts = file.read_text(encoding="utf-8-sig").split("\n\n")
    texts = list(dict.fromkeys(text.strip() for text in parts if text.strip()))
    if len(texts) < FEWEST_TEXTS:
        raise mh.ArgumentError(
            f"{file} holds {len(texts)} different texts; expected {FEWEST_TEXTS} or more, with a "
            "blank line between them."
        )
    rest = [text for place, text in enumerate(texts) if place % 20 > 1]
    return Split(rest, texts[1::20], texts[::20])


def prepare(split: Split) -> Corpus:
    """Learn a byte-level BPE (Sennrich et al., 2016) of the training texts; tokenize all."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(split.train, trainer)

    def tokens(texts: list[str]) -> list[Tensor]:
        encoded = tokenizer.encode_batch_fast(texts)
        return [torch.tensor([END, *e.ids[: LONGEST - 1], END]) for e in encoded]

    test = tokens(split.test)
    decoded = [tokenizer.decode(text[1:-1].tolist()) for text in test]
    return Corpus(
        tokenizer, tokens(split.train), tokens(split.validation), test, "\n".join(decoded)
    )
