"""Train a language model from scratch on packed documents, and let it write.

    python examples/train_language_model.py                    on Debian's package descriptions
    python examples/train_language_model.py --text FILE        on yours, a blank line between texts
    python examples/train_language_model.py --prompt "a tool"  more of it (the trained one is kept)
    python examples/train_language_model.py --compare          against padding, PyTorch's attention

Texts are of all lengths. Put into a batch [B, L] they are padded to the longest, and all layers
compute the padding too. Here a batch is one row [1, T] of whole texts, one after the other, and
`mh.Documents(lengths)` keeps them apart: no token looks beyond its own text, and no padding exists.
"""

from __future__ import annotations

import argparse
import lzma
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from batches import EVEN, Order, even_rows
from checkpoints import CheckpointError, digest
from corpus import END, Corpus, debian, prepare, texts_of
from generation import generate
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from training import Settings, train
from transformer import Config, Transformer

import manyheads as mh
from manyheads.demo_models import cache_folder
from manyheads.errors import ManyHeadsError

LAYERS, CONFIG = 4, Config(dim=192, heads=4, dropout=0.0)
SETTINGS = Settings(steps=1200, learning_rate=3e-3, bf16=True, evaluate_every=300)
SHORT = Settings(steps=100, learning_rate=3e-3, bf16=True, warmup=30)  # to compare
TEXTS_PER_STEP = 16
PROMPTS = ("library for ", "This package contains the ", "A simple game in which ")


def packed(model: Transformer, texts: list[Tensor]) -> Tensor:
    """-log p of every token, float32 [T]: the texts in one row."""
    lengths = [len(text) - 1 for text in texts]
    rest = -sum(lengths) % EVEN
    tokens = F.pad(torch.cat([text[:-1] for text in texts]), (0, rest))
    documents = mh.Documents([*lengths, rest] if rest else lengths)
    return losses(model, model.decode(tokens[None], mask=documents)[0], texts)


def padded(model: Transformer, texts: list[Tensor]) -> Tensor:
    """The same, the texts one to a row. Padding is behind them, so Causal keeps it out."""
    tokens = pad_sequence([text[:-1] for text in texts], batch_first=True)
    tokens = F.pad(tokens, (0, -tokens.shape[1] % (EVEN // TEXTS_PER_STEP)))
    lengths = torch.tensor([len(text) - 1 for text in texts])
    hidden = model.decode(tokens)[torch.arange(tokens.shape[1]) < lengths[:, None]]
    return losses(model, even_rows(hidden), texts)


def losses(model: Transformer, hidden: Tensor, texts: list[Tensor]) -> Tensor:
    """-log p of what follows in the texts, whose vectors are the first of `hidden` [T, E]."""
    following = torch.cat([text[1:] for text in texts])
    logits = model.logits(hidden)[: len(following)].float()
    return F.cross_entropy(logits, following, reduction="none")


@torch.no_grad()
def nats_per_token(model: Transformer, texts: list[Tensor]) -> float:
    """The mean of -log p over all tokens of the texts."""
    parts = [packed(model, texts[i : i + 32]).double() for i in range(0, len(texts), 32)]
    return float(torch.cat(parts).mean())


def bits_per_byte(corpus: Corpus, nats: float) -> float:
    """Of the test texts: what an arithmetic coder with this model would need."""
    tokens = sum(len(text) - 1 for text in corpus.test)
    return nats * tokens / math.log(2) / len(corpus.test_text.encode())


def unigram_nats(corpus: Corpus) -> float:
    """Nats per test token if each is drawn by its share of the training texts (add-one)."""
    size = corpus.tokenizer.get_vocab_size()
    counts = torch.cat([text[1:] for text in corpus.train]).bincount(minlength=size) + 1
    shares = counts.double() / counts.sum()
    return float(-shares[torch.cat([text[1:] for text in corpus.test])].log().mean())


def learn(
    corpus: Corpus,
    settings: Settings,
    attention: str = "manyheads",
    folder: Path | None = None,
) -> tuple[Transformer, float]:
    """(the trained model, CPU seconds); "sdpa" is PyTorch's attention on padded batches."""
    torch.manual_seed(settings.seed)
    config = replace(CONFIG, attention=attention)
    model = Transformer(corpus.tokenizer.get_vocab_size(), config, decoder_layers=LAYERS)
    nats: Callable[..., Tensor] = packed if attention == "manyheads" else padded
    held_out = corpus.validation[:320]
    start = time.process_time()
    train(
        model,
        Order(len(corpus.train), TEXTS_PER_STEP, settings.seed),
        lambda rows: nats(model, [corpus.train[i] for i in rows.tolist()]).mean(),
        settings,
        folder,
        evaluate=lambda: {"validation": nats_per_token(model, held_out)} if folder else {},
        # each text begins and ends with END, which tells where they are cut
        data=digest({"tokens": torch.cat(corpus.train)}, corpus.tokenizer.to_str()),
    )
    return model, time.process_time() - start


def write(corpus: Corpus, model: Transformer, prompt: str, seed: int = 0) -> str:
    """How the model goes on."""
    tokens = torch.tensor([[END, *corpus.tokenizer.encode(prompt.rstrip()).ids]])
    random = torch.Generator().manual_seed(seed)
    new = generate(model, tokens, 60, END, temperature=0.7, top_p=0.9, generator=random)
    return corpus.tokenizer.decode([*tokens[0].tolist(), *new[0].tolist()])


def measures(
    corpus: Corpus, settings: Settings = SETTINGS, folder: Path | None = None
) -> tuple[dict[str, Any], Transformer]:
    """Perplexity and bits per byte of held-out texts, beside a unigram model and xz."""
    start = time.perf_counter()
    model, _ = learn(corpus, settings, folder=folder)
    seconds = time.perf_counter() - start
    nats, unigram = nats_per_token(model, corpus.test), unigram_nats(corpus)
    text = corpus.test_text.encode()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": settings.steps,
        "training_texts": len(corpus.train),
        "test_texts": len(corpus.test),
        "perplexity": math.exp(nats),
        "perplexity_unigram": math.exp(unigram),
        "bits_per_byte": bits_per_byte(corpus, nats),
        "bits_per_byte_unigram": bits_per_byte(corpus, unigram),
        "bits_per_byte_xz": 8 * len(lzma.compress(text, preset=9)) / len(text),
        "seconds": seconds,
    }, model


def compare(corpus: Corpus, settings: Settings = SHORT, seeds: int = 3) -> dict[str, Any]:
    """The same short training, packed on ours and padded on PyTorch's, from `seeds` seeds."""
    some = corpus.test[:400]  # PyTorch's attention takes 70 s for all
    found: dict[str, list[tuple[float, float]]] = {"manyheads": [], "sdpa": []}
    for seed in range(seeds):
        for attention, results in found.items():
            model, seconds = learn(corpus, replace(settings, seed=seed), attention)
            results.append((nats_per_token(model, some), seconds))
    lengths = torch.tensor([len(text) for text in corpus.train])
    batches = lengths[Order(len(lengths), TEXTS_PER_STEP).epoch(0)]
    return {
        "steps": settings.steps,
        "test_texts": len(some),
        "nats": [nats for nats, _ in found["manyheads"]],
        "nats_sdpa": [nats for nats, _ in found["sdpa"]],
        "cpu_seconds": mean(seconds for _, seconds in found["manyheads"]),
        "cpu_seconds_sdpa": mean(seconds for _, seconds in found["sdpa"]),
        "padding": 1 - float(batches.sum() / (batches.amax(1) * TEXTS_PER_STEP).sum()),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="train on this file's texts")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--prompt", action="append", help="what the model shall continue")
    parser.add_argument("--folder", type=Path, help="for checkpoints; default: in the cache")
    parser.add_argument("--compare", action="store_true", help="only the comparison, three seeds")
    options = parser.parse_args()
    name = "language-model" if options.text is None else f"language-model-{options.text.stem}"
    folder = options.folder or cache_folder() / "runs" / name
    settings = replace(SETTINGS, steps=options.steps)
    try:
        corpus = prepare(debian() if options.text is None else texts_of(options.text))
        if options.compare:
            found = compare(corpus)
        else:
            found, model = measures(corpus, settings, folder)
    except (ManyHeadsError, CheckpointError, OSError, UnicodeDecodeError) as problem:
        sys.exit(f"train_language_model: {problem}")
    for what, value in found.items():
        print(
            f"{what.replace('_', ' '):24}",
            value if not isinstance(value, float) else f"{value:.4g}",
        )
    for prompt in options.prompt or ([] if options.compare else PROMPTS):
        print(f"\n{write(corpus, model, prompt)}")


if __name__ == "__main__":
    main()
