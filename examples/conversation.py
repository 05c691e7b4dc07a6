"""A conversation with a language model whose cache grows from turn to turn."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from growing_cache import growing_cache
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

import manyheads as mh
from manyheads.demo_models import LoadedModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the likeliest."""

    temperature: float = 0.2
    top_p: float = 0.9
    top_k: int = 50
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise mh.ArgumentError(
                f"got a temperature of {self.temperature} and a top-p of {self.top_p}; expected a "
                "temperature of 0 or more, and a top-p above 0, up to 1."
            )
        if self.top_k < 0 or self.max_new_tokens < 1:
            raise mh.ArgumentError(
                f"got a top-k of {self.top_k} and max-new-tokens of {self.max_new_tokens}; "
                "expected 0 (all) or more, and 1 or more."
            )

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
        try:
            with interrupt.on_ctrl_c():
                output = self.model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    past_key_values=self.cache,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([interrupt]),
                    **self.sampling.options(),
                )
        except BaseException:  # layers may have stopped at different lengths
            self.cache, self.tokens = growing_cache(self.model), []
            raise
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
