"""The steps of one attention, as tensors with named axes and a sentence each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.definition import attend, logits_of, softmax_of
from manyheads.errors import ArgumentTypeError
from manyheads.module import MultiHeadAttention
from manyheads.spec import NO_BIAS, AttentionCall, FullPlan

_QUERIES, _KEYS = ("batch", "head", "query", "channel"), ("batch", "kv_head", "key", "channel")
_PAIRS = ("batch", "head", "query", "key")


@dataclass(frozen=True)
class Step:
    """One intermediate: its name, which of the four stages it belongs to, and what it is.

    stage: "project", "score", "softmax" or "combine".
    axes: the name of each axis of `tensor`: batch, head, kv_head, query, key, channel, output.
    explanation: one sentence.
    """

    name: str
    stage: str
    axes: tuple[str, ...]
    tensor: Tensor
    explanation: str

    @property
    def sizes(self) -> str:
        """The axes with their sizes, as in "head 2, query 5"."""
        return ", ".join(map("{} {}".format, self.axes, self.tensor.shape))

    def __repr__(self) -> str:
        return f"{self.name} [{self.sizes}]: {self.explanation}"


def attention_steps(call: AttentionCall) -> list[Step]:
    """From queries, keys and values to heads; the last step is `heads`."""
    steps = []

    def score(name: str, explanation: str, **left_out: Any) -> None:
        tensor = logits_of(replace(call, **left_out) if left_out else call)
        steps.append(Step(name, "score", _PAIRS, tensor, explanation))

    no_mask: dict[str, Any] = {"plan": FullPlan()}
    no_bias = no_mask | {"bias": NO_BIAS}
    score(
        "scores",
        f"How well each query matches each key: their product, times {call.scale:.4g}.",
        **no_bias, softcap=None,
    )  # fmt: skip
    if call.softcap is not None:
        cap = f"{call.softcap:.4g}"
        score(
            "capped_scores", f"Scores bent to stay within ±{cap}: {cap} tanh(s / {cap}).", **no_bias
        )
    if call.bias.kinds:
        score("biased_scores", "Scores plus what the bias adds for this pair.", **no_mask)
    if call.plan.kind != "full":
        score("masked_scores", "Scores with -inf where the query may not attend to the key.")
    softmax = softmax_of(call, steps[-1].tensor)
    explanation = "Each query's scores as shares: exp(score), divided by their sum over the keys"
    explanation += "." if call.sinks is None else " and the sink."
    steps.append(Step("weights", "softmax", _PAIRS, softmax.weights, explanation))
    if call.sinks is not None:
        sinks = call.sinks.to(softmax.top.dtype)[:, None, None]
        share = (sinks - softmax.top).exp() / softmax.total
        share = share.masked_fill(softmax.nothing, 0.0).squeeze(-1)
        explanation = "What the head's sink takes of each query's attention; it carries no value."
        steps.append(Step("sink_weights", "softmax", _PAIRS[:3], share, explanation))
    out, _ = attend(call)
    explanation = "What each head reads: the values, averaged with the weights."
    steps.append(Step("heads", "combine", _QUERIES, out, explanation))
    return steps


def projections(
    module: MultiHeadAttention,
    inputs: tuple[Tensor, Tensor, Tensor],
    attended: tuple[Tensor, Tensor, Tensor],
    past: int,
) -> list[Step]:
    """From the module's inputs to what is attended: q, k, v [B, H, L, D]."""
    steps = []

    def add(name: str, tensor: Tensor, explanation: str) -> None:
        axes = _QUERIES if name.endswith("queries") else _KEYS
        steps.append(Step(name, "project", axes, tensor, explanation))

    heads, kv_heads = module.num_heads, module.num_kv_heads
    query, key, value = inputs
    plain_q, plain_k, plain_v = module.q_proj(query), module.k_proj(key), module.v_proj(value)
    add("projected_queries", module._heads(plain_q, heads), "What each token looks for, by head.")
    add("projected_keys", module._heads(plain_k, kv_heads), "What each token is found by, by head.")
    add("projected_values", module._heads(plain_v, kv_heads), "What each token hands on, by head.")
    if module.q_norm is not None:
        explanation = "Each head's {} brought to one size (qk_norm)."
        norms = (
            ("queries", plain_q, heads, module.q_norm),
            ("keys", plain_k, kv_heads, module.k_norm),
        )
        for kind, plain, count, norm in norms:
            add(f"normed_{kind}", module._heads(plain, count, norm), explanation.format(kind))
    if module.positions is not None:
        explanation = "Pairs of channels turned by the token's position (rotary)."
        add("rotated_queries", attended[0], explanation)
        add("rotated_keys", attended[1][:, :, past:], explanation)
    if past:
        explanation = f"The {past} cached ones and the new."
        add("keys", attended[1], explanation)
        add("values", attended[2], explanation)
    return steps


def combination(module: MultiHeadAttention, call: AttentionCall, heads: Tensor) -> list[Step]:
    """From heads [B, Hq, Lq, D] to the output."""
    wide = torch.float64 if heads.dtype == torch.float64 else torch.float32
    weight, bias = module.out_proj.weight.to(wide), module.out_proj.bias
    by_head = weight.reshape(-1, module.num_heads, module.head_dim)
    contributions = torch.einsum("bhqd,ohd->bhqo", heads.to(wide), by_head)
    output = contributions.sum(1)
    steps = [
        Step(
            "contributions",
            "combine",
            ("batch", "head", "query", "output"),
            contributions,
            "What each head adds to the output: head_i W_O[i].",
        )
    ]
    if bias is not None:
        output = output + bias.to(wide)
        explanation = "What is added to every token's output, whatever the heads say."
        steps.append(Step("output_bias", "combine", ("output",), bias, explanation))
    explanation = "The sum of all heads' contributions" + (", plus the bias." if steps[1:] else ".")
    axes = ("batch", "query", "output")
    return [*steps, Step("output", "combine", axes, output.to(heads.dtype), explanation)]


def check_out_proj(module: Any, what: str) -> None:
    """Raise unless `module` is a MultiHeadAttention whose W_O can be taken apart by head."""
    if not isinstance(module, MultiHeadAttention):
        raise ArgumentTypeError(
            f"{what} got a {type(module).__name__}; expected a manyheads.MultiHeadAttention: "
            "MultiHeadAttention.from_torch copies one of torch's."
        )
    out_proj: nn.Module = module.out_proj
    weight = getattr(out_proj, "weight", None)
    floating = isinstance(weight, Tensor) and weight.is_floating_point()
    if not isinstance(out_proj, nn.Linear) or not floating:
        kind = f" of {weight.dtype}" if isinstance(weight, Tensor) else ""
        raise ArgumentTypeError(
            f"{what} got a module whose out_proj is a {type(out_proj).__name__}{kind}; expected an "
            "nn.Linear of floating numbers: its weight is W_O, of which each head's part is taken."
        )
