"""Chat with a language model in the terminal, on manyheads attention.

    python examples/chat.py                         SmolLM2-135M, fetched once (93 MB)
    python examples/chat.py --model FOLDER_OR_ID    your own: a folder, a .gguf file, or owner/name
    echo "What is a lighthouse?" | python examples/chat.py --temperature 0

Answers appear word by word. Keys and values of the whole conversation stay in `manyheads.KVCache`s,
so a turn runs only the tokens that are new. Ctrl-C stops an answer, Ctrl-D leaves.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.cache_utils import DynamicLayer

import manyheads as mh
from manyheads.commands import load_model
from manyheads.demo_models import LoadedModel
from manyheads.errors import ManyHeadsError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the likeliest."""

    temperature: float = 0.2
    top_p: float = 0.9
    top_k: int = 50
    max_new_tokens: int = 256

    def options(self) -> dict[str, Any]:
        """The arguments of transformers' generate()."""
        drawn = self.temperature > 0
        return {
            "do_sample": drawn,
            "temperature": self.temperature if drawn else None,
            "top_p": self.top_p if drawn else None,
            "top_k": self.top_k if drawn else None,
            "max_new_tokens": self.max_new_tokens,
        }


@dataclass(frozen=True)
class Turn:
    """One answer: `run` of the prompt's `prompt` tokens were new, the rest was in the cache."""

    text: str
    tokens: tuple[int, ...]
    prompt: int
    run: int
    seconds: float


class GrowingLayer(DynamicLayer):
    """A layer of transformers' cache that keeps its rows in a `KVCache`.

    transformers' own copies the whole layer for every token; this one writes the new row into
    memory that is there already.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = mh.KVCache()

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append key and value [B, Hkv, L, D]; all rows so far."""
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        self.keys, self.values = self.rows.append(key, value)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove rows (transformers gives a negative number)."""
        if self.is_initialized:
            self.rows.truncate(self.rows.length - abs(tokens_to_remove))
            self.keys, self.values = self.rows.view()


def growing_cache(model: Any) -> DynamicCache:
    """An empty cache for `model`; layers with a sliding window stay transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(own) is DynamicLayer else own for own in cache.layers]
    return cache


class Interrupt(StoppingCriteria):
    """Stops `generate()` after the current token, so that the cache stays whole."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.asked)

    @contextmanager
    def on_ctrl_c(self) -> Iterator[None]:
        """Ctrl-C asks to stop; a second one, or none at all in this block, is as ever."""

        def ask(*_: Any) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Chat:
    """A conversation with a causal language model, and the cache of what it has read of it."""

    def __init__(self, loaded: LoadedModel, sampling: Sampling) -> None:
        self.model, self.tokenizer, self.sampling = loaded.model, loaded.tokenizer, sampling
        self.context = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        self.messages: list[dict[str, str]] = []
        self.tokens: list[int] = []  # the conversation as it was run; the cache holds its head
        self.cache = growing_cache(self.model)

    def answer(self, message: str, streamer: TextStreamer | None = None) -> Turn:
        """Reply to `message`; Ctrl-C ends the reply early, what was said so far counts."""
        messages, prompt = self._fit([*self.messages, {"role": "user", "content": message}])
        kept = self._keep_common(prompt)
        interrupt = Interrupt()
        start = time.perf_counter()
        with interrupt.on_ctrl_c():
            output = self.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                past_key_values=self.cache,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([interrupt]),
                **self.sampling.options(),
            )
        seconds = time.perf_counter() - start
        self.tokens = output[0].tolist()
        new = self.tokens[len(prompt) :]
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return Turn(text, tuple(new), len(prompt), len(prompt) - kept, seconds)

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The messages and their tokens, first turns forgotten where the context is too short."""
        longest = self.context - self.sampling.max_new_tokens
        while len(tokens := self._encode(messages)) > longest:
            if len(messages) < 3:
                raise mh.ArgumentError(
                    f"got a message of {len(tokens):,} tokens; expected at most {longest:,}, the "
                    "model's context less max-new-tokens. Shorten one of them."
                )
            messages = messages[2:]
        return messages, tokens

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        else:  # a base model: it continues the text
            encoded = self.tokenizer("\n".join(message["content"] for message in messages))
        return list(encoded["input_ids"])

    def _keep_common(self, prompt: list[int]) -> int:
        """Cut the cache to what it shares with the prompt, less one token to run; its length."""
        held = self.cache.get_seq_length()
        pairs = zip(self.tokens[:held], prompt[:-1], strict=False)
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if kept < held:
            try:
                self.cache.crop(kept - held)
            except RuntimeError:  # a sliding window has dropped rows that are wanted again
                self.cache, kept = growing_cache(self.model), 0
        return kept


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
        try:
            message = input("> " if terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\nCtrl-D leaves.")
            continue
        if not message:
            continue
        try:
            turn = chat.answer(
                message, TextStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
            )
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
    sampling = Sampling(**{name: getattr(options, name) for name in vars(Sampling())})
    try:
        loaded = load_model(options.model, options.attention)
    except ManyHeadsError as problem:
        sys.exit(f"chat: {problem}")
    converse(Chat(loaded, sampling), options.statistics)


if __name__ == "__main__":
    main()
