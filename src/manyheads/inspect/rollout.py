"""`rollout()`: which tokens of the input a token's vector is made of, layers down."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from manyheads.errors import ArgumentError, ArgumentTypeError, ShapeError


def rollout(maps: Iterable[Tensor]) -> Tensor:
    """Attention rollout (Abnar and Zuidema, 2020): A_l ... A_2 A_1.

    A is W + I, each row divided by its sum; W is the mean of a layer's weights over its heads, and
    I the residual connection around it. Row r of the result says how layer l's vector of token r is
    made up of the tokens of the input, if every layer added what it attends to in equal parts to
    what was there.

    Maps at full resolution, `HeatMap(n, n)` with n at least the number of tokens, give that
    exactly. Coarser ones multiply the pooled maps: a cell's tokens are taken to be attended to
    alike, by the layers above. Where they are, it is exact (where rows of W sum to 1, which those
    with sinks do not); rows always sum to 1, and a token's own part stays in its cell.

    Args:
        maps: square heat maps of self-attention, [B, Hq, n, n], the first layer's first, such as
            those of `HeatMap(n, n)`.

    Returns:
        [layers, B, n, n], after each layer; the paper's is the last. A query that may attend to
        nothing keeps its own vector.

    Raises:
        ArgumentError: no maps.
        ShapeError: maps that are not square, or of different sizes.
        ArgumentTypeError: something else than tensors.

    >>> uniform = torch.full((1, 2, 2, 2), 0.5)
    >>> rollout([uniform, uniform])[-1, 0]
    tensor([[0.6250, 0.3750],
            [0.3750, 0.6250]])
    """
    layers = list(maps)
    if not layers:
        raise ArgumentError(
            "rollout got no maps; expected one for each layer, the first layer's first: measure "
            "HeatMap(n, n) in every layer."
        )
    for number, one in enumerate(layers):
        _check(one, layers[0], number)
    identity = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype, device=layers[0].device)
    so_far, found = identity, []
    for one in layers:
        mixed = one.mean(1) + identity
        so_far = (mixed / mixed.sum(-1, keepdim=True)) @ so_far
        found.append(so_far)
    return torch.stack(found)


def _check(one: Tensor, first: Tensor, number: int) -> None:
    if not isinstance(one, Tensor):
        raise ArgumentTypeError(
            f"rollout got a {type(one).__name__} as map {number}; expected tensors [B, Hq, n, n]: "
            "the answers to HeatMap(n, n)."
        )
    square = one.dim() == 4 and one.shape[2] == one.shape[3]
    if not square or (one.shape[0], one.shape[2]) != (first.shape[0], first.shape[2]):
        raise ShapeError(
            f"map {number} has shape {list(one.shape)}; expected [B, Hq, n, n] with one B and n in "
            f"all layers (the first has {list(first.shape)}): measure the self-attention layers "
            "with one HeatMap(n, n)."
        )
