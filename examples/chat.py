"""Chat with a language model in the terminal, on manyheads attention.

    python examples/chat.py                         SmolLM2-135M, fetched once (93 MB)
    python examples/chat.py --model FOLDER_OR_ID    your own: a folder, a .gguf file, or owner/name
    echo "What is a lighthouse?" | python examples/chat.py --temperature 0

Answers appear word by word. Keys and values of the whole conversation stay in `manyheads.KVCache`s,
so a turn runs only the tokens that are new. Ctrl-C stops an answer, Ctrl-D leaves.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from conversation import Chat, Sampling, Turn
from transformers import DynamicCache, TextStreamer

import manyheads as mh
from manyheads.commands import load_model
from manyheads.errors import ManyHeadsError

QUESTIONS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper and a cat.",
    "Give it a title.",
)


def measures(model: str | None = None, questions: tuple[str, ...] = QUESTIONS) -> dict[str, Any]:
    """A scripted greedy conversation: what was run, and the same on stock attention and cache.

    Seconds are of CPU time, both sides taking turns.
    """
    greedy = Sampling(temperature=0, max_new_tokens=64)
    chats = {name: Chat(load_model(model, name), greedy) for name in ("manyheads", "sdpa")}
    chats["sdpa"].cache = DynamicCache(config=chats["sdpa"].model.config)
    turns: dict[str, list[Turn]] = {name: [] for name in chats}
    seconds = dict.fromkeys(chats, 0.0)
    for question in questions:
        for name, chat in chats.items():
            start = time.process_time()
            turns[name].append(chat.answer(question))
            seconds[name] += time.process_time() - start
    ours, stock = turns["manyheads"], turns["sdpa"]
    return {
        "questions": list(questions),
        "answers": [turn.text for turn in ours],
        "prompt_tokens": [turn.prompt for turn in ours],
        "prompt_tokens_run": [turn.run for turn in ours],
        "new_tokens": sum(len(turn.tokens) for turn in ours),
        "same_tokens_as_sdpa": [turn.tokens for turn in ours] == [turn.tokens for turn in stock],
        "cpu_seconds": seconds["manyheads"],
        "cpu_seconds_sdpa": seconds["sdpa"],
    }


def converse(chat: Chat, statistics: bool = False) -> None:
    """Read a line, stream the answer, until the input ends."""
    terminal = sys.stdin.isatty()
    while True:
        streamer = TextStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            message = input("> " if terminal else "").strip()
            if not message:
                continue
            turn = chat.answer(message, streamer)
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\nCtrl-D leaves.")
            continue
        except mh.ArgumentError as problem:
            print(problem, file=sys.stderr)
            continue
        if statistics:
            print(
                f"[{turn.run} of {turn.prompt} prompt tokens run, {len(turn.tokens)} written, "
                f"{len(turn.tokens) / turn.seconds:.1f} a second]",
                file=sys.stderr,
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, .gguf file or owner/name; default SmolLM2-135M")
    parser.add_argument("--attention", default="manyheads", choices=("manyheads", "sdpa", "eager"))
    for name, default in vars(Sampling()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--seed", type=int, help="the same answers every time")
    parser.add_argument("--statistics", action="store_true", help="tokens run, tokens a second")
    options = parser.parse_args()
    if options.seed is not None:
        torch.manual_seed(options.seed)
    try:
        sampling = Sampling(**{name: getattr(options, name) for name in vars(Sampling())})
        loaded = load_model(options.model, options.attention)
    except ManyHeadsError as problem:
        sys.exit(f"chat: {problem}")
    converse(Chat(loaded, sampling), options.statistics)


if __name__ == "__main__":
    main()
