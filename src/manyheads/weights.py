"""Other layouts' attention weights under our names.

Each function takes one layout apart and returns a state_dict for `MultiHeadAttention`; `sizes`
reads the module's sizes off it. Nothing is guessed: a name that is missing, or one that would be
left unused, is an error that lists it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.arguments import whole_number
from manyheads.errors import ArgumentError, ArgumentTypeError, ShapeError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def from_torch(module: nn.Module) -> dict[str, Tensor]:
    """The weights of an `nn.MultiheadAttention`, its packed `in_proj` taken apart."""
    if not isinstance(module, nn.MultiheadAttention):
        raise ArgumentTypeError(
            f"from_torch got a {type(module).__name__}; expected a torch.nn.MultiheadAttention."
        )
    if module.bias_k is not None or module.add_zero_attn:
        option = "add_bias_kv" if module.bias_k is not None else "add_zero_attn"
        raise ArgumentError(
            f"from_torch got a module made with {option}=True; expected one without: it attends "
            f"to a key that is not in its input, and MultiHeadAttention has no such key."
        )
    if module._qkv_same_embed_dim:
        inputs = module.in_proj_weight.chunk(3)
    else:
        inputs = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    weights = {
        f"{name}.weight": weight
        for name, weight in zip(PROJECTIONS, (*inputs, module.out_proj.weight), strict=True)
    }
    if module.in_proj_bias is not None:
        biases = (*module.in_proj_bias.chunk(3), module.out_proj.bias)
        weights |= {f"{name}.bias": bias for name, bias in zip(PROJECTIONS, biases, strict=True)}
    return weights


def from_tutorial(source: Mapping[str, Tensor] | nn.Module) -> dict[str, Tensor]:
    """The weights of the tutorial listing: linear_q, linear_k, linear_v, linear_o."""
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    _check_mapping(tensors, "from_tutorial")
    theirs = ("linear_q", "linear_k", "linear_v", "linear_o")
    return _rename(tensors, dict(zip(theirs, PROJECTIONS, strict=True)), "from_tutorial")


def from_bert(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of one layer of a Hugging Face BERT, the layer norm after it left out."""
    _check_mapping(state_dict, "from_bert")
    prefix = prefix if not prefix or prefix.endswith(".") else prefix + "."
    theirs = {
        f"{prefix}attention.self.query": "q_proj",
        f"{prefix}attention.self.key": "k_proj",
        f"{prefix}attention.self.value": "v_proj",
        f"{prefix}attention.output.dense": "out_proj",
    }
    inside = (f"{prefix}attention.self.", f"{prefix}attention.output.dense.")
    tensors = {name: tensor for name, tensor in state_dict.items() if name.startswith(inside)}
    return _rename(tensors, theirs, "from_bert")


def sizes(weights: Mapping[str, Tensor], num_heads: int) -> dict[str, Any]:
    """The sizes of the `MultiHeadAttention` that these weights fit, as its arguments.

    Raises:
        ShapeError: the projections do not fit each other or `num_heads`.
        ArgumentTypeError: `num_heads` is no int.
    """
    shapes = {name: list(weights[f"{name}.weight"].shape) for name in PROJECTIONS}
    if any(len(shape) != 2 for shape in shapes.values()):
        raise ShapeError(f"projection weights have shapes {shapes}; expected two axes each.")
    num_heads = whole_number(num_heads, "num_heads")
    (q_rows, embed_dim), (k_rows, key_dim), (v_rows, value_dim), (out_dim, out_columns) = (
        shapes.values()
    )
    if num_heads < 1 or q_rows % num_heads:
        raise ShapeError(
            f"num_heads={num_heads} does not divide the {q_rows} rows of q_proj; expected the "
            f"number of heads the weights were trained with: a state_dict does not hold it."
        )
    head_dim = q_rows // num_heads
    if k_rows != v_rows or out_columns != q_rows or k_rows % head_dim:
        raise ShapeError(
            f"projection weights have shapes {shapes} for {num_heads} heads; expected k_proj and "
            f"v_proj with the same multiple of {head_dim} rows, and out_proj with {q_rows} columns."
        )
    return {
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": k_rows // head_dim,
        "head_dim": head_dim,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "out_dim": out_dim,
        "bias": "q_proj.bias" in weights,
    }


def _rename(
    tensors: Mapping[str, Tensor], ours: Mapping[str, str], caller: str
) -> dict[str, Tensor]:
    """`tensors` under our names; biases come all or none."""
    weights = {f"{theirs}.weight": f"{name}.weight" for theirs, name in ours.items()}
    biases = {f"{theirs}.bias": f"{name}.bias" for theirs, name in ours.items()}
    names = weights | biases if any(name in tensors for name in biases) else weights
    missing = sorted(set(names) - set(tensors))
    unexpected = sorted(set(tensors) - set(names))
    if missing or unexpected:
        raise ArgumentError(
            f"{caller} got a state_dict with missing names {missing} and names it has no use for "
            f"{unexpected}; expected exactly {sorted(names)}: rename or remove them, and check "
            f"the prefix."
        )
    return {ours_: tensors[theirs].detach() for theirs, ours_ in names.items()}


def _check_mapping(tensors: object, caller: str) -> None:
    if not isinstance(tensors, Mapping) or not all(
        isinstance(tensor, torch.Tensor) for tensor in tensors.values()
    ):
        raise ArgumentTypeError(
            f"{caller} got a {type(tensors).__name__}; expected a state_dict, names to tensors."
        )
