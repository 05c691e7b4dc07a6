"""`rollout()`: which tokens of the input a token's vector is made of, layers down."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from manyheads.errors import ArgumentError, ArgumentTypeError, ShapeError
from manyheads.inspect.measures import HeatMap
from manyheads.inspect.records import Seen


def rollout(maps: Seen | Iterable[Tensor]) -> Tensor:
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
        maps: what `observe(model, HeatMap(n, n))` saw of one forward pass through layers of
            self-attention; or such maps themselves, [B, Hq, n, n], the first layer's first.

    Returns:
        [layers, B, n, n], after each layer; the paper's is the last. A query that may attend to
        nothing keeps its own vector.

    Raises:
        ArgumentError: no maps, layers that ran more than once, or cross-attention.
        ShapeError: maps that are not square, or of different sizes.
        ArgumentTypeError: something else than tensors.

    >>> uniform = torch.full((1, 2, 2, 2), 0.5)
    >>> rollout([uniform, uniform])[-1, 0]
    tensor([[0.6250, 0.3750],
            [0.3750, 0.6250]])
    """
    layers = _maps_of(maps) if isinstance(maps, Seen) else list(maps)
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


def _maps_of(seen: Seen) -> list[Tensor]:
    """The square heat map of each layer, in the order in which they ran."""
    found = []
    for layer in seen.layers:
        record, *others = seen[layer]
        if others:
            raise ArgumentError(
                f"layer {layer!r} ran {1 + len(others)} times; expected once, one forward pass "
                "over a whole text: observe model(tokens), not generate()."
            )
        if record.query_length != record.key_length:
            raise ArgumentError(
                f"layer {layer!r} has {record.query_length} queries and {record.key_length} keys; "
                "expected self-attention of a whole text: choose others with observe(layers=...)."
            )
        whole = [one for one in record.measures if isinstance(one, HeatMap) and _is_square(one)]
        if not whole:
            raise ArgumentError(
                f"layer {layer!r} was asked for {record.measures}; expected HeatMap(n, n), of all "
                "queries and keys: give it to observe()."
            )
        found.append(record[whole[0]])
    return found


def _is_square(one: HeatMap) -> bool:
    return one.rows == one.columns and one.queries is None and one.keys is None


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
