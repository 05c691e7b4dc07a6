"""What heads attend to, recorded, against eager attention that returns its weights.

The peer is what transformers runs under `output_attentions=True`; the whole record holds what a
page is made from. The weights that eager returns are summed up nowhere, which spares it that time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from modules import without_gradients
from rows import FP32, Goal, Row
from tasks import Task, multiply_limit, tolerance
from torch import Tensor
from transformers import GPT2Config, GPT2Model
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

import manyheads as mh
from manyheads.backends import native
from manyheads.benchmark import check_close
from manyheads.functional import prepare
from manyheads.inspect.functional import attend_and_measure

LAYERS, HEADS, LENGTH, SIZE = 12, 12, 2048, 64
RECORD = (mh.Entropy(), mh.MeanDistance(), mh.TopKeys(8), mh.Received(), mh.HeatMap(128, 128))


def observing_tasks(only: str) -> Iterator[Task]:
    """Those whose name contains `only`."""
    name = f"whole record, causal {HEADS}x{LENGTH}x{SIZE}, against eager"
    if only in name:
        yield attention_task(name, Goal(ratio=8.0))
    name = f"whole record, model of {LAYERS}x{HEADS} heads, {LENGTH} tokens, against eager"
    if only in name:
        yield model_task(name, Goal(ratio=3.0))


def gpt2(layers: int, attention: str) -> GPT2Model:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=997,
        n_layer=layers,
        n_head=HEADS,
        n_embd=HEADS * SIZE,
        n_positions=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = attention
    return GPT2Model(config).eval()


def attention_task(name: str, goal: Goal) -> Task:
    """One layer's attention."""
    row = Row("", (HEADS, HEADS), LENGTH, SIZE, Goal(), causal=True)
    query, key, value = row.inputs()
    call, *_ = prepare(query, key, value, mh.Causal(), None, None, None, None, 0.0, None, False)
    layer = gpt2(1, "eager").h[0].attn
    allowed = mh.Causal().materialize(LENGTH, LENGTH)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(FP32).min)

    def ours() -> Tensor:
        return attend_and_measure(native.run, call, RECORD)[0]

    def peer() -> Tensor:
        return eager_attention_forward(layer, query, key, value, mask)[0].transpose(1, 2)

    return task(name, ours, peer, row.work(), goal)


def model_task(name: str, goal: Goal) -> Task:
    """The whole forward pass."""
    eager, ours_model = gpt2(LAYERS, "eager"), gpt2(LAYERS, "sdpa")
    tokens = torch.randint(997, (1, LENGTH))

    def ours() -> Tensor:
        with mh.observe(ours_model, *RECORD):
            return ours_model(tokens).last_hidden_state

    def peer() -> Tensor:
        return eager(tokens, output_attentions=True).last_hidden_state

    attention = Row("", (HEADS, HEADS), LENGTH, SIZE, Goal(), causal=True).work()
    linear = 2 * LENGTH * sum(w.numel() for w in eager.h.parameters() if w.dim() == 2)
    return task(name, ours, peer, LAYERS * attention + linear, goal)


def task(name: str, ours: Any, peer: Any, work: float, goal: Goal) -> Task:
    limit, limit_name = multiply_limit(FP32)
    check = lambda one, other: check_close(one, other, tolerance(FP32))  # noqa: E731
    sides = without_gradients(ours), without_gradients(peer)
    return Task(name, *sides, check, limit, limit_name, work, goal, slow=True)
