"""Train English to German from nothing on Debian's translated package descriptions.

    python examples/train_translation.py --train                       # some 10 minutes on 2 cores
    python examples/train_translation.py "development files for the library"
    python examples/train_translation.py --train --pairs my.tsv --folder mine

A small encoder-decoder (transformer.py) with manyheads' attention sees 30,000 short descriptions
and sentences; what it makes of sentences it has not seen is measured by BLEU and chrF, beside what
copying the source would get: names of programs are the same in both languages.
Ctrl-C saves; the same command goes on. Your own pairs: a line each, source, tab, target.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import sacrebleu
import typer
from attention_picture import draw
from command import run
from data import Split, description_pairs
from text_to_text import Pair, TextToText, learn_tokens, without_near_copies
from training import Settings
from transformer import Config

from manyheads.demo_models import cache_folder

FOLDER = cache_folder() / "runs" / "translation"
MOST_WORDS = 16  # a small model learns short sentences in minutes; long ones would take hours
SIZES = {"layers": (2, 2), "source_tokens": 48, "target_tokens": 48}
SETTINGS = Settings(steps=3000, learning_rate=2e-3, warmup=400, weight_decay=0.05, bf16=True)
BATCH = 64
LENGTH_PENALTY = 2.0  # the best BLEU of 0 to 2.5 on validation pairs; at 0.6 texts are short


def config(attention: str = "manyheads") -> Config:
    """A small model."""
    return Config(dim=192, heads=4, hidden=768, dropout=0.1, attention=attention)


def short(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs of at most MOST_WORDS words of source."""
    return [pair for pair in pairs if len(pair[0].split()) <= MOST_WORDS]


def load_pairs(path: Path | None = None) -> Split:
    """Debian's pairs, or those of a file; held-out sources have no near copy among the others."""
    split = description_pairs("de") if path is None else read_pairs(path)
    known, validation, test = map(short, split)
    test = without_near_copies(test, known + validation)
    if not test:
        raise ValueError(
            f"nothing to measure on: {len(known)} pairs to train on, and none held out that is no "
            "near copy; expected some hundred pairs of different sources."
        )
    return Split(known, without_near_copies(validation, known), test)


def read_pairs(path: Path) -> Split:
    """A file's pairs, a twentieth of them held out, chosen by their source.

    Raises: ValueError for a line that is no pair.
    """
    split = Split([], [], [])
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        parts = line.split("\t")
        if len(parts) != 2 or not all(part.strip() for part in parts):
            raise ValueError(
                f"{path}, line {number}: got {len(parts)} columns in {line[:60]!r}; expected a "
                "source and a target, with one tab between them."
            )
        place = int(hashlib.sha256(parts[0].encode()).hexdigest(), 16) % 20
        split[{0: 2, 1: 1}.get(place, 0)].append((parts[0], parts[1]))
    return split


def score(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF as sacrebleu has them, rounded."""
    return {
        "BLEU": round(sacrebleu.corpus_bleu(written, [references]).score, 2),
        "chrF": round(sacrebleu.corpus_chrf(written, [references]).score, 2),
    }


def fit(
    split: Split,
    folder: Path | None,
    settings: Settings = SETTINGS,
    attention: str = "manyheads",
    tokens: int = 4000,
) -> TextToText:
    """A model trained on the split's first part, or what has already been trained of it."""
    tokenizer = learn_tokens((text for pair in split.train for text in pair), tokens)
    task = TextToText(tokenizer, config(attention), **SIZES)
    task.fit(split.train, settings, BATCH, folder)
    return task


def measures(
    folder: Path | None = FOLDER,
    pairs: Path | None = None,
    settings: Settings = SETTINGS,
    attention: str = "manyheads",
    beams: int = 4,
) -> dict[str, Any]:
    """Train, then measure on held-out pairs, beside copying the source.

    The seconds are CPU seconds of all threads; a run that was stopped counts its last part only.
    """
    split = load_pairs(pairs)
    start = time.process_time()
    task = fit(split, folder, settings, attention)
    seconds = time.process_time() - start
    sources, references = zip(*split.test, strict=True)
    written = task.write(sources, beams, LENGTH_PENALTY)
    return {
        "pairs": len(split.train),
        "held out": len(split.test),
        "trained": score(written, references),
        "greedy": score(task.write(sources), references),
        "copying the source": score(sources, references),
        "training, CPU seconds": round(seconds, 1),
        "examples": [list(row) for row in zip(sources, written, references, strict=True)][:5],
    }


def main(
    text: Annotated[str | None, typer.Argument(help="What to translate.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Train first, and measure.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the trained model is.")] = FOLDER,
    pairs: Annotated[Path | None, typer.Option(help="Your own: source, tab, target.")] = None,
    attention: Annotated[str, typer.Option(help="manyheads or sdpa")] = "manyheads",
    beams: Annotated[int, typer.Option(min=1, help="1 is greedy.")] = 4,
    picture: Annotated[Path | None, typer.Option(help="Draw the cross-attention there.")] = None,
) -> None:
    """Train a translator, or use it."""
    if train:
        found = measures(folder, pairs, attention=attention, beams=beams)
        print(json.dumps(found, indent=2, ensure_ascii=False))
    if text is not None:
        task = TextToText.load(folder, config(attention), **SIZES)
        print(task.write([text], beams, LENGTH_PENALTY)[0])
        if picture is not None:
            draw(*task.alignment(text), picture)
    elif not train:
        raise typer.BadParameter("nothing to do: give a text, or --train.")


if __name__ == "__main__":
    run(lambda: typer.run(main))
