"""`prune_model()`: a transformers model without some of its heads, smaller, and equal in output.

transformers 5 has no `prune_heads` any more, and a config says one number of heads for all layers.
But attention modules that go through its table of functions mostly read the number of heads off
their projections (`view(..., -1, head_dim)`), and then it is enough to cut these. Which modules do,
and what else they keep for each head, has been looked up for those in `_LAYOUTS`, and is tested;
others are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from manyheads.errors import ArgumentError, ArgumentTypeError
from manyheads.pruning import channels, check_linear, kept_heads, kept_kv_heads, part_of

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Layout:
    """Where an attention module keeps its heads.

    query, key, value, out: paths of its projections, from itself on; out may be one of the module
        around it, "../output.dense".
    head_dim: the attribute that says D.
    counts: attributes that say how many query heads there are; width: that say Hq * D.
    groups: attributes that say how many query heads read a key/value head.
    per_head: parameters [Hq].
    """

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    out: str = "o_proj"
    head_dim: str = "head_dim"
    counts: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    per_head: tuple[str, ...] = ()


_LLAMA = _Layout(groups=("num_key_value_groups",))
_BERT = _Layout(
    "query", "key", "value", "../output.dense", "attention_head_size",
    counts=("num_attention_heads",), width=("all_head_size",),
)  # fmt: skip
_LAYOUTS = {
    "LlamaAttention": _LLAMA,
    "MistralAttention": _LLAMA,
    "Qwen2Attention": _LLAMA,
    "Qwen3Attention": _LLAMA,
    "Gemma2Attention": _LLAMA,
    "GptOssAttention": _Layout(groups=("num_key_value_groups",), per_head=("sinks",)),
    "BertSelfAttention": _BERT,
    "RobertaSelfAttention": _BERT,
    "WhisperAttention": _Layout(out="out_proj", counts=("num_heads",)),
}


def prune_model(model: Model, heads: Mapping[str, Iterable[int]]) -> Model:
    """A copy of a transformers model without these query heads: as if they gave zeros.

    Projections lose the heads' rows and columns, and GPT-OSS its heads' sinks. Heads that stay are
    numbered anew from 0; a key/value head goes once no query head reads it, and a cache is that
    much smaller. The model runs on any attention implementation. Its config still says how many
    heads there were, so `from_pretrained` cannot make it again: load the whole model, prune the
    same heads, then `load_state_dict`.

    Args:
        model: it stays as it is. Its attention modules are of one of these families: Llama (and
            what is of its class, as SmolLM2 is), Mistral, Qwen 2 and 3, Gemma 2, GPT-OSS, BERT,
            RoBERTa, Whisper.
        heads: for each layer by its path, as `observe` and `head_importance` name it, the numbers
            of query heads that go. With grouped heads, either whole groups, or as many of every
            group that stays.

    Raises:
        ArgumentError: a layer that is not there, or of another family; heads that are not there,
            all of a layer's heads, or groups of different sizes left.
        ArgumentTypeError: no mapping, or a projection that is no plain nn.Linear.

    >>> from transformers import LlamaConfig, LlamaModel
    >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2)
    >>> pruned = prune_model(LlamaModel(config), {"layers.1.self_attn": [2, 3]})
    >>> pruned.layers[1].self_attn.q_proj
    Linear(in_features=8, out_features=4, bias=False)
    """
    if not isinstance(heads, Mapping):
        raise ArgumentTypeError(
            f"heads is a {type(heads).__name__}; expected the heads of each layer by its path, as "
            'in prune_model(model, {"model.layers.0.self_attn": [0, 3]}).'
        )
    kept = {path: _kept(model, path, gone) for path, gone in heads.items()}
    pruned = copy.deepcopy(model)
    for path, (query_heads, kv_heads) in kept.items():
        _cut(pruned, path, query_heads, kv_heads)
    return pruned


def _kept(model: nn.Module, path: str, gone: Iterable[int]) -> tuple[list[int], list[int]]:
    """The query heads and the key/value heads of a layer that stay."""
    layer, layout = _layer(model, path)
    head_dim = getattr(layer, layout.head_dim)
    for name in (layout.query, layout.key, layout.value, layout.out):
        check_linear(f"{path}'s {name}", _projection(model, path, name))
    count, kv_count = (
        _projection(model, path, name).out_features // head_dim
        for name in (layout.query, layout.key)
    )
    kept = kept_heads(gone, count, path)
    return kept, kept_kv_heads(kept, count // kv_count)


def _cut(model: nn.Module, path: str, kept: list[int], kept_kv: list[int]) -> None:
    """Leave only these heads in a layer."""
    layer, layout = _layer(model, path)
    head_dim = getattr(layer, layout.head_dim)
    rows, kv_rows = channels(kept, head_dim), channels(kept_kv, head_dim)
    for name, chosen in ((layout.query, rows), (layout.key, kv_rows), (layout.value, kv_rows)):
        linear = _projection(model, path, name)
        linear.weight = part_of(linear.weight, chosen, 0)
        if linear.bias is not None:
            linear.bias = part_of(linear.bias, chosen, 0)
        linear.out_features = len(chosen)
    out = _projection(model, path, layout.out)
    out.weight = part_of(out.weight, rows, 1)
    out.in_features = len(rows)
    for name in layout.per_head:
        setattr(layer, name, part_of(getattr(layer, name), torch.tensor(kept), 0))
    for names, number in (
        (layout.counts, len(kept)),
        (layout.width, len(rows)),
        (layout.groups, len(kept) // len(kept_kv)),
    ):
        for name in names:
            setattr(layer, name, number)


def _layer(model: nn.Module, path: str) -> tuple[nn.Module, _Layout]:
    modules = dict(model.named_modules())
    layer = modules.get(path)
    if layer is not None and _covered(layer):
        return layer, _LAYOUTS[type(layer).__name__]
    names = [repr(name) for name, one in modules.items() if _covered(one)]
    there = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    raise ArgumentError(
        f"cannot prune heads of {path!r}: got "
        f"{'no such module' if layer is None else type(layer).__name__}; expected "
        f"{there or 'a layer of another model'}: attention modules whose heads are known to be "
        f"read off their projections, which are {', '.join(_LAYOUTS)}."
    )


def _covered(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ in _LAYOUTS and kind.__module__.startswith("transformers.models.")


def _projection(model: nn.Module, path: str, name: str) -> Any:
    """A layer's projection, or one of the module around it."""
    if name.startswith("../"):
        path, name = path.rpartition(".")[0], name.removeprefix("../")
    return model.get_submodule(f"{path}.{name}".removeprefix("."))
