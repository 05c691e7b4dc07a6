"""PyTorch's FlexAttention, compiled, for the rows where it can mean the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rows import Row
from tasks import FEW_PAIRS, alibi_slopes, limit_of, our_call, tolerance
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from manyheads.benchmark import Comparison, check_close, compare

NAME = "FlexAttention"

#: Beyond this, making its block mask and running it takes minutes.
LONGEST = 16384


def why_not(row: Row) -> str | None:
    """In a few words, why it is not timed."""
    if row.gradients:
        return "no backward"
    return "takes minutes" if row.length > LONGEST else None


def time_row(row: Row, patience: float) -> Comparison | str:
    """It and ours in turn, compiled before; what went wrong in a few words if something did."""
    reason = why_not(row)
    if reason is not None:
        return reason
    inputs = row.inputs()
    try:
        with torch.no_grad():
            return compare(
                our_call(row, inputs),
                flex_call(row, inputs),
                pairs=FEW_PAIRS,
                warmup=0,
                check=lambda ours, peer: check_close(ours, peer, tolerance(row.dtype)),
                limit=limit_of(row, inputs)[0],
                patience=patience,
            )
    except Exception as error:  # a compiler may fail in any way; the other rows are wanted still
        return type(error).__name__


def flex_call(row: Row, inputs: list[Tensor]) -> Callable[[], Tensor]:
    """The call, which compiles itself when it is first made."""
    torch._dynamo.reset()  # otherwise it gives up after a few shapes
    compiled = torch.compile(flex_attention, dynamic=False)
    options: dict[str, Any] = {"enable_gqa": row.heads[0] != row.heads[1]}
    mask_mod = mask_function(row)
    if mask_mod is not None:
        options["block_mask"] = create_block_mask(
            mask_mod, None, None, row.length, row.length, device="cpu"
        )
    if row.alibi:
        slopes = alibi_slopes(row.heads[0])
        options["score_mod"] = lambda score, b, h, q, k: score - slopes[h] * (q - k).abs()
    return lambda: compiled(*inputs, **options)


def mask_function(row: Row) -> Callable[..., Tensor] | None:
    """(batch, head, query, key) -> whether the query may attend to the key; None: to all."""
    if row.documents is not None:
        size = row.documents
        return lambda b, h, q, k: q // size == k // size
    if row.window is not None:
        window = row.window
        return lambda b, h, q, k: (q >= k) & (q - k < window)
    return (lambda b, h, q, k: q >= k) if row.causal else None
