"""`contributions()`: how much each head adds to each token's output, on inputs of any length."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from manyheads import jagged, masks, positions
from manyheads.caches import KVCache
from manyheads.errors import ArgumentTypeError
from manyheads.functional import attention
from manyheads.inspect.steps import check_out_proj
from manyheads.module import MultiHeadAttention
from manyheads.spec import PerBatch


@torch.no_grad()
def contributions(
    module: MultiHeadAttention,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    mask: masks.Mask | Tensor | None = None,
    attn_bias: positions.ScoreBias | Tensor | None = None,
    cache: KVCache | None = None,
    query_start: PerBatch | None = None,
) -> Tensor:
    """The length ‖head_i W_O[i]‖ of what head i adds to each query's output: [B, Hq, Lq].

    Kobayashi et al., 2020 ("Attention is Not Only a Weight"): a head that attends sharply to a key
    whose value is small does little. The output is the sum of these vectors, and out_proj's bias.

    Heads are computed by the fastest backend, in memory that grows with Lq + Lk: nothing of size
    Lq * Lk or Hq * Lq * out_dim is made, since ‖W h‖ = ‖R h‖ for the D x D factor R of W = Q R.
    No gradients: `head_importance` has them. Dropout is left out.

    Args:
        module: a `MultiHeadAttention` whose out_proj is an `nn.Linear`.
        query: [B, Lq, E] or [Lq, E], as for the module, as all that follow.
        key: None for self-attention.
        value: None takes `key`.
        mask: which keys a query may attend to.
        attn_bias: what is added to the scores.
        cache: used as the module would, but left as it was.
        query_start: position of the first query row among the keys.

    Returns:
        float32, or float64 for float64 inputs; B is there whether or not the query has one.

    Raises:
        ArgumentTypeError: another kind of module, or nested tensors.
        ShapeError, DeviceError, ArgumentError: inputs that do not fit, as the module says.

    >>> attention = MultiHeadAttention(16, num_heads=4)
    >>> contributions(attention, torch.randn(1000, 16), mask=masks.Causal()).shape
    torch.Size([1, 4, 1000])
    """
    check_out_proj(module, "contributions")
    if jagged.any_nested(query, key, value):
        raise ArgumentTypeError(
            "contributions got nested tensors; expected plain ones: give one sequence at a time, "
            "or documents packed in a row with mask=Documents(lengths)."
        )
    self_attention = key is None
    key, value = module._complete(query, key, value)
    if query.dim() == 2:
        query, key, value = query[None], key[None], value[None]
    q, k, v, options = module._inputs(
        query, key, value, self_attention, mask, attn_bias, copy.deepcopy(cache), query_start
    )
    heads = attention(q, k, v, **options)
    wide = torch.float64 if heads.dtype == torch.float64 else torch.float32
    weight, size = module.out_proj.weight.to(wide), module.head_dim
    with torch.autocast(heads.device.type, enabled=False):
        found = [
            (head.to(wide) @ _factor(columns).T).norm(dim=-1)
            for head, columns in zip(heads.unbind(1), torch.split(weight, size, 1), strict=True)
        ]
    return torch.stack(found, dim=1)


def _factor(columns: Tensor) -> Tensor:
    """[min(out_dim, D), D]: vectors are as long after it as after the [out_dim, D] columns."""
    if columns.shape[0] <= columns.shape[1]:
        return columns
    factor: Tensor = torch.linalg.qr(columns, mode="r").R
    return factor
