"""Shorten texts: a small model trained on Debian's package descriptions, and SmolLM2 prompted.

    python examples/summarise.py --train                   # some 10 minutes on 2 cores
    python examples/summarise.py FILE                      # by the trained model
    python examples/summarise.py FILE --smollm2            # by SmolLM2-135M, prompted
    python examples/summarise.py FILE --model folder-or-owner/name

Every Debian package has a long description and a one-line summary: 45,000 pairs. What the model
writes for packages it has not seen is measured by ROUGE-L (Lin, 2004), beside the first words of
the long description, the baseline that summaries are hard to better by. Ctrl-C saves; the same
command goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from attention_picture import draw
from command import run
from data import Split, summaries
from rouge_score import rouge_scorer
from text_to_text import Pair, TextToText, learn_tokens, without_near_copies
from training import Settings
from transformer import Config

from manyheads.demo_models import LoadedModel, cache_folder, load

FOLDER = cache_folder() / "runs" / "summaries"
#: The beginning says what a package is; the end, whether it is "documentation" or "development".
SIZES = {"layers": (2, 2), "source_tokens": 80, "source_end": 24, "target_tokens": 24}
SETTINGS = Settings(steps=1500, learning_rate=2e-3, warmup=200, weight_decay=0.05, bf16=True)
BATCH = 64
LENGTH_PENALTY = 1.5  # the best of 0.6, 1, 1.5 and 2 on validation pairs; at 0.6 texts are short
PROMPT = "Summarise this text in one short line of at most eight words.\n\n"


def config(attention: str = "manyheads") -> Config:
    """A small model; what a package is called and is for stands in its description, to copy."""
    return Config(dim=192, heads=4, hidden=768, dropout=0.1, attention=attention, copies=True)


def family(summary: str) -> str:
    """What a summary shares with those of its package's siblings: "libfoo (development files)".

    >>> family("Foo library - development files"), family("FOO library 2 (headers)")
    ('foo library', 'foo library')
    """
    words = re.split(r" [-–(]|[,:;] ", summary.lower())[0]
    return " ".join(re.findall(r"[^\W\d_]+", words))


def load_pairs() -> Split:
    """(long, short) pairs; what is held out shares neither summary nor most words with others.

    Which part of the split a pair is in depends on its summary's `family`.
    """
    split = Split([], [], [])
    for pair in (pair for part in summaries() for pair in part):
        place = int(hashlib.sha256(family(pair[1]).encode()).hexdigest(), 16) % 20
        split[{0: 2, 1: 1}.get(place, 0)].append(pair)
    test = without_near_copies(split.test, split.train + split.validation)
    return Split(split.train, without_near_copies(split.validation, split.train), test)


def score(written: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L, the F-measure of the longest common subsequence of words, in percent."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        scorer.score(reference, text)["rougeL"].fmeasure
        for text, reference in zip(written, references, strict=True)
    ]
    return round(100 * sum(scores) / len(scores), 2)


def lead(text: str, words: int) -> str:
    """The baseline: the first words."""
    return " ".join(text.split()[:words])


def best_lead(pairs: Sequence[Pair]) -> int:
    """How many first words score best on these pairs."""
    texts, references = zip(*pairs, strict=True)
    return max(range(3, 20), key=lambda n: score([lead(text, n) for text in texts], references))


def load_language_model(which: str | None) -> LoadedModel:
    """SmolLM2-135M, or the model named, on manyheads' attention."""
    from manyheads.integrations import huggingface  # brings transformers, which takes seconds

    huggingface.register()
    return load(which)


def prompted(language_model: LoadedModel, text: str) -> str:
    """A language model's summary: its answer's first line, without quotes."""
    answer = language_model.answer(PROMPT + text, max_new_tokens=24).text
    return answer.strip().split("\n")[0].strip("\"'“” ")


def fit(
    split: Split,
    folder: Path | None,
    settings: Settings = SETTINGS,
    attention: str = "manyheads",
    tokens: int = 4000,
) -> TextToText:
    """A model trained on the split's first part, or what has already been trained of it."""
    sample = split.train[:: max(1, len(split.train) // 10_000)]
    tokenizer = learn_tokens((text for pair in sample for text in pair), tokens)
    task = TextToText(tokenizer, config(attention), **SIZES)
    task.fit(split.train, settings, BATCH, folder)
    return task


def measures(
    folder: Path | None = FOLDER,
    settings: Settings = SETTINGS,
    attention: str = "manyheads",
    beams: int = 4,
    prompts: int = 60,
    model: str | None = None,
) -> dict[str, Any]:
    """Train, then ROUGE-L on held-out pairs: the model, the first words, a prompted model.

    prompts: how many held-out texts the language model `model` is asked about (SmolLM2-135M if
        none is named), and the others measured on once more to compare.
    """
    split = load_pairs()
    words = best_lead(split.validation)
    start = time.process_time()
    task = fit(split, folder, settings, attention)
    seconds = time.process_time() - start
    texts, references = zip(*split.test, strict=True)
    ways = {
        "trained": task.write(texts, beams, LENGTH_PENALTY),
        f"first {words} words": [lead(text, words) for text in texts],
    }
    sample = range(0, len(texts), max(1, len(texts) // prompts))[:prompts]
    some = {name: [written[i] for i in sample] for name, written in ways.items()}
    if prompts:
        language_model = load_language_model(model)
        some[language_model.name] = [prompted(language_model, texts[i]) for i in sample]
    return {
        "pairs": len(split.train),
        "held out": len(texts),
        "ROUGE-L": {name: score(written, references) for name, written in ways.items()},
        f"ROUGE-L, {len(sample)} of them": {
            name: score(written, [references[i] for i in sample]) for name, written in some.items()
        },
        "training, CPU seconds": round(seconds, 1),
        "examples": [
            {"given": references[i]} | {name: written[at] for name, written in some.items()}
            for at, i in enumerate(sample[:5])
        ],
    }


def main(
    file: Annotated[Path | None, typer.Argument(help="What to summarise; - for stdin.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Train first, and measure.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the trained model is.")] = FOLDER,
    smollm2: Annotated[bool, typer.Option("--smollm2", help="Prompt SmolLM2-135M.")] = False,
    model: Annotated[str | None, typer.Option(help="Prompt this one: folder or id.")] = None,
    attention: Annotated[str, typer.Option(help="manyheads or sdpa")] = "manyheads",
    beams: Annotated[int, typer.Option(min=1, help="1 is greedy.")] = 4,
    picture: Annotated[Path | None, typer.Option(help="Draw the cross-attention there.")] = None,
) -> None:
    """Train a model that summarises, or summarise a file."""
    if train:
        found = measures(folder, attention=attention, beams=beams, model=model)
        print(json.dumps(found, indent=2, ensure_ascii=False))
    if file is not None:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        if smollm2 or model is not None:
            print(prompted(load_language_model(model), text))
        else:
            task = TextToText.load(folder, config(attention), **SIZES)
            print(task.write([text], beams, LENGTH_PENALTY)[0])
            if picture is not None:
                draw(*task.alignment(text), picture)
    elif not train:
        raise typer.BadParameter("nothing to do: give a file, or --train.")


if __name__ == "__main__":
    run(lambda: typer.run(main))
