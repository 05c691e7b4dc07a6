"""`trace()`: every intermediate of one attention, by name, for inputs small enough to look at.

Concat(head_1, ..., head_h) W_O is the sum over heads of head_i W_O[i], with W_O[i] the rows of W_O
that head i meets: so every head's part of the output can be shown by itself. The numbers come from
the definition (definition.py), which every backend has to agree with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads import jagged, masks, positions
from manyheads.caches import KVCache
from manyheads.errors import ArgumentError, ArgumentTypeError
from manyheads.functional import prepare
from manyheads.inspect import trace_page
from manyheads.inspect.steps import (
    Step,
    attention_steps,
    check_out_proj,
    combination,
    projections,
)
from manyheads.module import MultiHeadAttention
from manyheads.spec import PerBatch

#: A trace that would take more is refused unless the caller allows it: 256 MiB.
MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class Trace:
    """The steps of one attention in the order they are taken; `trace["weights"]` is a tensor.

    steps: by name. scale: what the scores were multiplied by.
    """

    steps: Mapping[str, Step]
    scale: float

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.steps:
            raise ArgumentError(
                f"this trace has no step {name!r}; expected one of {', '.join(self.steps)}: what "
                "the attention does not use (a bias, a mask, a cache) is no step."
            )
        return self.steps[name].tensor

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.steps.values()))

    def page(
        self,
        tokens: Sequence[str] | None = None,
        *,
        key_tokens: Sequence[str] | None = None,
        head: int = 0,
        query: int = -1,
        batch: int = 0,
    ) -> trace_page.Page:
        """A page that walks through the four stages on these tokens, one pair worked out.

        Args:
            tokens: a name for each query row; None: their numbers.
            key_tokens: a name for each key; None: the tokens, where there are as many keys, or
                else their numbers.
            head: whose score, weights and values are worked out with numbers.
            query: the query row that is worked out; -1 is the last one.
            batch: the batch element that is shown.

        Raises:
            ArgumentError: too many cells for a page, tokens of another number, or a head, query
                or batch element that is not there.
            MissingDependencyError: jinja2 is not installed.
        """
        return trace_page.page(self, tokens, key_tokens, head, query, batch)

    def _repr_html_(self) -> str:
        return trace_page.notebook(self)


def trace(
    module: MultiHeadAttention,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    mask: masks.Mask | Tensor | None = None,
    attn_bias: positions.ScoreBias | Tensor | None = None,
    cache: KVCache | None = None,
    query_start: PerBatch | None = None,
    max_bytes: int = MAX_BYTES,
) -> Trace:
    """What `module(query, key, value, ...)` computes, step by step; dropout is left out.

    The steps, those in brackets where the module or the call has them: projected_queries,
    projected_keys, projected_values, [normed_queries, normed_keys], [rotated_queries,
    rotated_keys], [keys, values: the cached ones and the new]; scores, [biased_scores],
    [masked_scores]; weights; heads, contributions (head_i W_O[i]), [output_bias], output.
    The output is the sum of the contributions over the heads, plus the bias.

    Args:
        module: a `MultiHeadAttention` whose out_proj is an `nn.Linear`.
        query: [B, Lq, E] or [Lq, E], as for the module, as all that follow. Where the inputs have
            no batch axis, the steps have one, of size 1.
        key: None for self-attention.
        value: None takes `key`.
        mask: which keys a query may attend to.
        attn_bias: what is added to the scores.
        cache: used as the module would, but left as it was.
        query_start: position of the first query row among the keys.
        max_bytes: what the steps may take together; memory grows with Lq * Lk here.

    Raises:
        ArgumentError: the steps would take more than max_bytes.
        ArgumentTypeError: another kind of module, or nested tensors.
        ShapeError, DeviceError: inputs that do not fit, as the module says.

    >>> attention = MultiHeadAttention(8, num_heads=2)
    >>> steps = trace(attention, torch.randn(5, 8), mask=masks.Causal())
    >>> steps["weights"].shape
    torch.Size([1, 2, 5, 5])
    >>> steps.steps["contributions"].axes
    ('batch', 'head', 'query', 'output')
    """
    check_out_proj(module, "trace")
    if jagged.any_nested(query, key, value):
        raise ArgumentTypeError(
            "trace got nested tensors; expected plain ones: trace one sequence at a time, as in "
            "trace(module, nested.unbind()[0])."
        )
    self_attention = key is None
    key, value = module._complete(query, key, value)
    if query.dim() == 2:
        query, key, value = query[None], key[None], value[None]
    past = cache.length if isinstance(cache, KVCache) else 0
    q_len, k_len = query.shape[1], past + key.shape[1]
    has_bias = attn_bias is not None or module.attn_bias is not None
    has_mask = mask is not None or module.mask is not None
    rows = query.shape[0] * module.num_heads
    pairs = rows * q_len * k_len * (2 + has_bias + has_mask)
    vectors = rows * (q_len * (4 * module.head_dim + module.out_dim) + 4 * k_len * module.head_dim)
    itemsize = 8 if query.dtype == torch.float64 else 4
    _check_size((pairs + vectors) * itemsize, max_bytes, module.num_heads, q_len, k_len)

    q, k, v, options = module._inputs(
        query, key, value, self_attention, mask, attn_bias, copy.deepcopy(cache), query_start
    )
    steps = projections(module, (query, key, value), (q, k, v), past)
    call, _, _ = prepare(q, k, v, **options, **_PLAIN)
    with torch.autocast(query.device.type, enabled=False):  # what follows chooses its own types
        steps += attention_steps(call)
        steps += combination(module, call, steps[-1].tensor)
    return Trace({step.name: step for step in steps}, call.scale)


def trace_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: masks.Mask | Tensor | None = None,
    attn_bias: positions.ScoreBias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_start: PerBatch | None = None,
    max_bytes: int = MAX_BYTES,
) -> Trace:
    """What `attention(query, key, value, ...)` computes, step by step.

    The steps, those in brackets where the call has them: scores, [capped_scores],
    [biased_scores], [masked_scores]; weights, [sink_weights]; heads.

    Args:
        query: [B, Hq, Lq, D] or [Hq, Lq, D], as for `attention`, as all that follow.
        key: [B, Hkv, Lk, D] or [Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv] or [Hkv, Lk, Dv].
        mask: which keys a query may attend to.
        attn_bias: what is added to the scores.
        scale: multiplies the scores.
        softcap: bends them.
        sinks: [Hq], one extra logit per head.
        query_start: the key position of query row 0.
        max_bytes: as for `trace`.

    Raises:
        ArgumentError: the steps would take more than max_bytes.
        ShapeError, DeviceError, ArgumentError, ArgumentTypeError: as `attention` says.

    >>> query, key = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    >>> list(trace_attention(query, key, key, softcap=10.0).steps)
    ['scores', 'capped_scores', 'weights', 'heads']
    """
    if jagged.any_nested(query, key, value):
        raise ArgumentTypeError(
            "trace_attention got nested tensors; expected plain ones: trace one sequence at a time."
        )
    if isinstance(query, Tensor) and isinstance(key, Tensor) and query.dim() > 2 < key.dim():
        heads, q_len, k_len = query.shape[-3], query.shape[-2], key.shape[-2]
        tensors = 2 + sum(part is not None for part in (mask, attn_bias, softcap))
        pairs = query[..., 0].numel() * k_len * tensors
        itemsize = 8 if query.dtype == torch.float64 else 4
        _check_size(pairs * itemsize, max_bytes, heads, q_len, k_len)
    options = _PLAIN | {"softcap": softcap, "sinks": sinks}
    call, _, _ = prepare(
        query, key, value, mask=mask, attn_bias=attn_bias, scale=scale, query_start=query_start,
        **options,
    )  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        steps = attention_steps(call)
    return Trace({step.name: step for step in steps}, call.scale)


_PLAIN: dict[str, Any] = {"softcap": None, "sinks": None, "dropout_p": 0.0, "needs_lse": False}


def _check_size(needed: int, max_bytes: int, heads: int, q_len: int, k_len: int) -> None:
    if needed > max_bytes:
        raise ArgumentError(
            f"a trace of {heads} heads, {q_len} queries and {k_len} keys would take "
            f"{needed / 2**20:,.0f} MiB; expected at most max_bytes = {max_bytes / 2**20:,.0f} "
            "MiB: give fewer tokens, or a larger max_bytes; `measure` tells what weights are like "
            "without forming all of them."
        )
