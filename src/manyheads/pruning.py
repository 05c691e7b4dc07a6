"""`prune_heads()`: the module without some of its heads, smaller, and equal in output."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.arguments import whole_number
from manyheads.errors import ArgumentError, ArgumentTypeError
from manyheads.masks import Dense, Mask, Predicate
from manyheads.masks.algebra import AllOf, AnyOf, Not
from manyheads.module import MultiHeadAttention
from manyheads.positions import Alibi, BiasSum, DenseBias, RelativeBias, ScoreBias


def prune_heads(module: MultiHeadAttention, heads: Iterable[int]) -> MultiHeadAttention:
    """A copy of the module without these query heads: what it computes if they gave zeros.

    The four projections lose the heads' rows and columns; the module's own bias (slopes, tables,
    dense ones) and mask keep the entries of the heads that stay, which are numbered anew from 0. A
    key/value head goes once no query head reads it. Nothing is shared with the module; its hooks,
    mode and frozen parameters are kept. ALiBi's slopes of the paper, which follow from the number
    of heads, become explicit ones.

    Args:
        module: it stays as it is.
        heads: numbers of query heads, 0 to Hq - 1. With grouped heads, either whole groups, or as
            many of every group that stays.

    Raises:
        ArgumentError: a head that is not there, all heads, or groups of different sizes left.
        ArgumentTypeError: another kind of module, a projection that is no plain nn.Linear, or a
            bias of a kind that is not known here.

    >>> pruned = prune_heads(MultiHeadAttention(16, 4), [0, 2])
    >>> pruned.num_heads, pruned.q_proj.weight.shape, pruned.out_proj.weight.shape
    (2, torch.Size([8, 16]), torch.Size([16, 8]))
    """
    _check_module(module)
    kept = kept_heads(heads, module.num_heads, "the module")
    kept_kv = kept_kv_heads(kept, module.num_heads // module.num_kv_heads)
    pruned = copy.deepcopy(module)
    pruned.num_heads, pruned.num_kv_heads = len(kept), len(kept_kv)
    rows, kv_rows = (channels(which, module.head_dim) for which in (kept, kept_kv))
    for linear, chosen in (
        (pruned.q_proj, rows),
        (pruned.k_proj, kv_rows),
        (pruned.v_proj, kv_rows),
    ):
        linear.weight = part_of(linear.weight, chosen, 0)
        if linear.bias is not None:
            linear.bias = part_of(linear.bias, chosen, 0)
        linear.out_features = len(chosen)
    pruned.out_proj.weight = part_of(pruned.out_proj.weight, rows, 1)
    pruned.out_proj.in_features = len(rows)
    index = torch.tensor(kept, device=module.out_proj.weight.device)
    if pruned.attn_bias is not None:
        _keep(pruned.attn_bias, index, module.num_heads)
    if pruned.mask is not None:
        pruned.mask = _mask_of(pruned.mask, index, module.num_heads)
    return pruned


def kept_heads(heads: Iterable[int], count: int, owner: str) -> list[int]:
    """The heads of `count` that stay, in order, where `heads` go; `owner`: whose they are."""
    if not isinstance(heads, Iterable):
        raise ArgumentTypeError(
            f"heads is {heads!r}; expected the numbers of heads, as in prune_heads(module, [0, 3])."
        )
    gone = {whole_number(head, "a head to prune") for head in heads}
    strange = sorted(head for head in gone if not 0 <= head < count)
    if strange:
        raise ArgumentError(
            f"{owner} has no heads {strange}; expected numbers from 0 to {count - 1}: heads of "
            "what was pruned are numbered anew."
        )
    if len(gone) == count:
        raise ArgumentError(
            f"all {count} heads of {owner} would go; expected at least one to stay: without heads "
            "a layer gives its output's bias for every token, which needs no attention."
        )
    return [head for head in range(count) if head not in gone]


def kept_kv_heads(kept: list[int], group: int) -> list[int]:
    """The key/value heads that stay; each has to serve as many query heads."""
    left: dict[int, list[int]] = {}
    for head in kept:
        left.setdefault(head // group, []).append(head)
    if len({len(heads) for heads in left.values()}) > 1:
        described = ", ".join(f"{heads} of key/value head {kv}" for kv, heads in left.items())
        raise ArgumentError(
            f"these query heads would be left: {described}; expected as many for each key/value "
            "head, since query head h reads key/value head h // G: prune whole groups, or as many "
            "heads of every group that stays."
        )
    return list(left)


def channels(heads: list[int], head_dim: int) -> list[int]:
    """Where these heads stand among the rows of a projection."""
    return [head * head_dim + channel for head in heads for channel in range(head_dim)]


def part_of(tensor: Tensor, index: list[int] | Tensor, axis: int) -> Any:
    """The entries at `index` of an axis; a parameter stays one, frozen or not."""
    where = torch.as_tensor(index, device=tensor.device)
    part = tensor.detach().index_select(axis, where)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(part, requires_grad=tensor.requires_grad)
    return part.requires_grad_(tensor.requires_grad)


@singledispatch
def _keep(bias: ScoreBias, heads: Tensor, count: int) -> None:
    """Leave only these heads' entries in the bias."""
    raise ArgumentTypeError(
        f"the module's attn_bias is a {type(bias).__name__}; expected Alibi, RelativeBias, "
        "DenseBias or a sum of them: which of its entries belong to which head is not known."
    )


@_keep.register
def _(bias: Alibi, heads: Tensor, count: int) -> None:
    if bias.slopes is None:
        # float64: as exact as the paper's are for a module of any dtype.
        paper = torch.tensor(Alibi.paper_slopes(count), dtype=torch.float64)
        bias.slopes = paper.to(heads.device)
    bias.slopes = part_of(bias.slopes, heads, 0)


@_keep.register
def _(bias: RelativeBias, heads: Tensor, count: int) -> None:
    bias.table = part_of(bias.table, heads, 1)
    bias.num_heads = len(heads)


@_keep.register
def _(bias: DenseBias, heads: Tensor, count: int) -> None:
    if bias.tensor.dim() > 2 and bias.tensor.shape[-3] > 1:
        bias.tensor = part_of(bias.tensor, heads, bias.tensor.dim() - 3)


@_keep.register
def _(bias: BiasSum, heads: Tensor, count: int) -> None:
    for part in bias.parts:
        assert isinstance(part, ScoreBias)
        _keep(part, heads, count)


def _mask_of(mask: Mask, heads: Tensor, count: int) -> Mask:
    """The mask for a call of these heads alone."""
    if isinstance(mask, AllOf | AnyOf):
        return type(mask)(tuple(_mask_of(part, heads, count) for part in mask.parts))
    if isinstance(mask, Not):
        return Not(_mask_of(mask.part, heads, count))
    if isinstance(mask, Dense) and mask.allowed.dim() == 4 and mask.allowed.shape[1] > 1:
        return Dense(mask.allowed[:, heads.to(mask.allowed.device)])
    if isinstance(mask, Predicate):
        return Predicate(_OfHeads(mask.fn, tuple(heads.tolist())))
    return mask  # no other knows of heads


@dataclass(frozen=True)
class _OfHeads:
    """A predicate's function, asked about the heads by the numbers they had."""

    fn: Any
    heads: tuple[int, ...]

    def __call__(self, b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Any:
        return self.fn(b, torch.tensor(self.heads, device=h.device)[h], p, j)


def _check_module(module: Any) -> None:
    if not isinstance(module, MultiHeadAttention):
        raise ArgumentTypeError(
            f"prune_heads got a {type(module).__name__}; expected a manyheads.MultiHeadAttention: "
            "MultiHeadAttention.from_torch copies one of torch's, and for a model of transformers "
            "there is manyheads.integrations.huggingface_pruning.prune_model."
        )
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        check_linear(name, getattr(module, name))


def check_linear(name: str, linear: Any) -> None:
    """Raise unless the projection of this name is one whose weight can be cut."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
        raise ArgumentTypeError(
            f"prune_heads got a module whose {name} is a {type(linear).__name__}; expected a "
            "plain nn.Linear: prune before quantising, or merge the adapter first."
        )
