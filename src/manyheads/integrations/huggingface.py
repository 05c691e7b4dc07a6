"""Run a transformers model on manyheads: `register()`, then `attn_implementation="manyheads"`.

transformers keeps two tables under one name: attention functions and mask functions. A name that is
only in the first silently loses every mask, so both are registered together. The mask function is
in huggingface_masks.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.errors import ArgumentError, ArgumentTypeError, MissingDependencyError
from manyheads.functional import attention
from manyheads.integrations.lazy import weights_of
from manyheads.masks import Causal, Mask, Window
from manyheads.spec import AttentionCall
from manyheads.watching import watching

try:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

    from manyheads.integrations.huggingface_masks import CompactMask, compact_mask, per_batch

    # Earlier versions call mask functions with other arguments.
    if "q_length" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError("an older one is installed")
except ImportError as missing:
    raise MissingDependencyError(
        f"manyheads.integrations.huggingface needs transformers 5.4 or later ({missing}). "
        "Install it with: pip install 'manyheads[huggingface]'"
    ) from missing

try:  # Whether transformers collects attentions, which GPT-2 does not tell its layers.
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:
    _collector = None


def register(name: str = "manyheads") -> None:
    """Make `attn_implementation=name` mean manyheads in transformers; may be called again.

    (Importing this module raises MissingDependencyError where transformers is not installed.)

    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> register()
    >>> config = LlamaConfig(
    ...     vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...     num_attention_heads=2, attn_implementation="manyheads")
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> model(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 11])
    """
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, compact_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CompactMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls.

    query [B, Hq, Lq, D]; key [B, Hkv, Lk, D] and value [B, Hkv, Lk, Dv], not repeated; s_aux [Hq],
    the sinks; position_bias broadcasts to [B, Hq, Lq, Lk] and is added to the scores.
    attention_mask: what `compact_mask` made; or a user's own tensor that broadcasts to
        [B, Hq, Lq, Lk], bool (True = may attend) or floating (added to the scores); or None, which
        is causal from the first key on if `is_causal`, or else `module.is_causal`, says so.
    sliding_window: used only where there is no mask; masks have it inside.

    Returns: (out [B, Lq, Hq, Dv], weights), the weights [B, Hq, Lq, Lk] as `LazyWeights` (few of
    them: as a plain tensor) if transformers wants any, else None.
    """
    if kwargs.get("cache") is not None:
        raise ArgumentError(
            "the attention function got a paged cache (continuous batching), which manyheads does "
            "not read. Expected: a dynamic or static cache. Use generate() instead of "
            "generate_batch()."
        )
    if query.shape[0] == 1 and key.shape[0] > 1:  # learned queries shared by the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    mask, bias, query_start = _read_mask(
        attention_mask,
        query,
        key,
        getattr(module, "is_causal", True) if is_causal is None else is_causal,
        sliding_window,
    )
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    attend = _attend_and_keep if _wants_weights(module, kwargs) else _attend
    out, weights = attend(
        query,
        key,
        value,
        mask=mask,
        attn_bias=bias,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout,
        query_start=query_start,
    )
    return out.transpose(1, 2).contiguous(), weights


def _attend(*inputs: Tensor, **options: Any) -> tuple[Tensor, None]:
    return attention(*inputs, **options), None


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="manyheads makes attention weights for output_attentions=True outside of the graph; "
    "leave fullgraph=True or output_attentions=True out"
)
def _attend_and_keep(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    calls: list[AttentionCall] = []
    with watching(calls.append):
        out = attention(*inputs, **options)
    return out, weights_of(calls[0])


def _wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether someone will take the attention function's second result."""
    if kwargs.get("output_attentions"):
        return True
    if _collector is None or (torch.compiler.is_compiling() and not module._forward_hooks):
        return False  # a graph cannot hold `get`; the hook that collects asks the same
    collected = _collector.get()
    return collected is not None and any("attentions" in key for key in collected)


def _read_mask(
    attention_mask: CompactMask | Tensor | None,
    query: Tensor,
    key: Tensor,
    is_causal: bool,
    sliding_window: int | None,
) -> tuple[Mask | Tensor | None, Tensor | None, int | Tensor | None]:
    """(mask, bias, query_start) for `attention`."""
    if isinstance(attention_mask, CompactMask):
        start = per_batch(attention_mask.query_start, query.shape[0])
        return attention_mask.mask, attention_mask.key_bias, start
    if isinstance(attention_mask, Tensor):
        own = attention_mask[..., : key.shape[-2]]
        return (own, None, None) if own.dtype == torch.bool else (None, own, None)
    if attention_mask is not None:
        raise ArgumentTypeError(
            f"the attention mask is a {type(attention_mask).__name__}. Expected: a bool or "
            "floating tensor [B, 1 or Hq, Lq, Lk], or none. Give the 2-D padding mask and let the "
            "model build the rest."
        )
    if not is_causal or query.shape[2] == 1:
        if sliding_window is None:
            return None, None, None
        return Window(sliding_window - 1, sliding_window - 1), None, None
    # Query row 0 stands at the first key even where Lk > Lq: so it is with a static cache that is
    # still empty, the one case in which transformers leaves this to the attention function.
    causal = Causal()
    mask = causal if sliding_window is None else causal & Window(sliding_window - 1, None)
    return mask, None, 0
