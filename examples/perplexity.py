"""Perplexity of a text under a language model, on manyheads attention and on PyTorch's own.

    python examples/perplexity.py                        SmolLM2-135M, a text of Python's own docs
    python examples/perplexity.py FILE --model FOLDER_OR_ID --context 2048 --tokens 30000

Perplexity is exp(mean of -log p(token | tokens before it)). A text longer than the context is read
in windows that overlap by half, so that every token but the first few has half a context before it.
A window is read in pieces whose keys and values are cached: the logits of 8,192 tokens of SmolLM2
would take 1.6 GB.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from growing_cache import growing_cache
from torch import Tensor
from torch.nn.functional import cross_entropy

import manyheads as mh
from manyheads.commands import load_model
from manyheads.errors import ManyHeadsError

#: Tokens whose logits are in memory at a time.
PIECE = 512
ATTENTIONS = ("manyheads", "sdpa")
PROMPTS = (
    "What is the capital of Portugal? Answer in one sentence.",
    "Explain in two sentences how a sail moves a boat against the wind.",
    "List three uses of linear algebra.",
    "Write a short poem about rain.",
)


def python_reference() -> str:
    """The text that every Python carries: its language reference, as `help()` shows it.

    A web-trained model may well have seen it; what is compared here are two attentions.
    """
    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, end): read tokens start to end, count those from `first` on.

    >>> list(windows(10, 4))
    [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    """
    start, first = 0, 1
    while first < length:
        end = min(start + context, length)
        yield start, first, end
        start, first = start + context // 2, end


@torch.inference_mode()
def losses(model: Any, tokens: Tensor, context: int) -> Tensor:
    """-log p of every token but the first, in nats: float32 [L - 1].

    tokens: int64 [L].
    """
    found = []
    for start, first, end in windows(len(tokens), context):
        cache = growing_cache(model)
        window = tokens[start:end]
        nats = []
        for piece, following in zip(window[:-1].split(PIECE), window[1:].split(PIECE), strict=True):
            logits = model(piece[None], past_key_values=cache, use_cache=True).logits[0]
            nats.append(cross_entropy(logits.float(), following, reduction="none"))
        found.append(torch.cat(nats)[first - start - 1 :])
    return torch.cat(found)


def greedy(loaded: Any, prompts: tuple[str, ...], new_tokens: int) -> list[tuple[int, ...]]:
    """The likeliest continuation of each prompt, as tokens."""
    return [loaded.answer(prompt, new_tokens).tokens for prompt in prompts]


def measures(
    file: str | None = None,
    model: str | None = None,
    tokens: int = 8192,
    context: int = 8192,
    new_tokens: int = 64,
) -> dict[str, Any]:
    """Perplexity under both attentions, how far apart, and whether greedy answers agree.

    Only the first `tokens` tokens of the text are read. Seconds are of CPU time.
    """
    loaded = load_model(model, "manyheads")
    text = python_reference() if file is None else Path(file).read_text(encoding="utf-8")
    ids = torch.tensor(loaded.tokenizer(text, verbose=False)["input_ids"][:tokens])
    longest = getattr(loaded.model.config, "max_position_embeddings", None) or context
    if len(ids) < 2 or not 2 <= context <= longest:
        raise mh.ArgumentError(
            f"got a text of {len(ids)} tokens and a context of {context}; expected at least 2 "
            f"tokens, and a context of 2 to {longest:,}, the longest that the model was made for."
        )
    nats, answers, seconds = {}, {}, {}
    for attention in ATTENTIONS:
        loaded.model.set_attn_implementation(attention)
        losses(loaded.model, ids[:2], context)  # warm
        start = time.process_time()
        nats[attention] = losses(loaded.model, ids, context).double()
        seconds[attention] = time.process_time() - start
        answers[attention] = greedy(loaded, PROMPTS, new_tokens)
    ours, stock = (nats[attention] for attention in ATTENTIONS)
    bytes_read = len(loaded.tokenizer.decode(ids, skip_special_tokens=True).encode())
    return {
        "text": "Python's language reference (pydoc_data.topics)" if file is None else file,
        "model": loaded.name,
        "tokens": len(ids),
        "context": context,
        "perplexity": math.exp(ours.mean()),
        "perplexity_sdpa": math.exp(stock.mean()),
        "bits_per_byte": float(ours.sum()) / math.log(2) / bytes_read,
        "nats": float(ours.mean()),
        "nats_difference": abs(float(ours.mean() - stock.mean())),
        "largest_difference_of_a_token": float((ours - stock).abs().max()),
        "same_greedy_tokens": answers["manyheads"] == answers["sdpa"],
        "greedy_tokens": sum(map(len, answers["manyheads"])),
        "cpu_seconds": seconds["manyheads"],
        "cpu_seconds_sdpa": seconds["sdpa"],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="a UTF-8 text; default: Python's own reference")
    parser.add_argument("--model", help="folder, .gguf file or owner/name; default SmolLM2-135M")
    parser.add_argument("--tokens", type=int, default=8192, help="read the first so many")
    parser.add_argument("--context", type=int, default=8192, help="tokens of a window")
    options = parser.parse_args()
    try:
        found = measures(**vars(options))
    except (ManyHeadsError, OSError, UnicodeDecodeError) as problem:
        sys.exit(f"perplexity: {problem}")
    print(f"{found['model']} on {found['text']}, {found['tokens']:,} tokens")
    print(f"windows of {found['context']:,} tokens: {found['nats']:.4f} nats a token,", end=" ")
    print(f"perplexity {found['perplexity']:.3f}, {found['bits_per_byte']:.3f} bits a byte")
    print(f"PyTorch's attention: perplexity {found['perplexity_sdpa']:.3f},", end=" ")
    print(f"{found['nats_difference']:.1e} nats away;", end=" ")
    print(f"at most {found['largest_difference_of_a_token']:.1e} for a token")
    same = "the same" if found["same_greedy_tokens"] else "NOT the same"
    print(f"{found['greedy_tokens']} greedy tokens: {same}")
    ratio = found["cpu_seconds_sdpa"] / found["cpu_seconds"]
    print(
        f"CPU time {found['cpu_seconds']:.1f} s, PyTorch's {found['cpu_seconds_sdpa']:.1f} s",
        end="",
    )
    print(f" ({ratio:.2f} times)")


if __name__ == "__main__":
    main()
