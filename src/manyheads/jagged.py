"""Jagged nested tensors (layout torch.jagged): packed into one sequence, and its results unpacked.

A batch of sequences of different lengths already lies packed in a jagged tensor's values, so
packing costs nothing, and `Documents` keeps the sequences apart: no padding is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.errors import ArgumentError, ShapeError
from manyheads.masks import Documents, Mask

#: What jagged tensors may be, each with its ragged axis.
SHAPES = {"[B, H, L*, D]": 2, "[B, L*, E]": 1}


def any_nested(*tensors: Any) -> bool:
    """Whether one of them is a nested tensor, of whatever layout."""
    for tensor in tensors:  # noqa: SIM110 - half the time of any(...), before every call
        if isinstance(tensor, Tensor) and tensor.is_nested:
            return True
    return False


@dataclass(frozen=True, slots=True)
class Packed:
    """query, key, value of all sequences one after the other, a batch of one, and their mask."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    offsets: Tensor
    shape: str

    def unpack(self, packed: Tensor) -> Tensor:
        """Results like `query`, jagged again with the query's lengths."""
        axis = SHAPES[self.shape]
        return torch.nested.nested_tensor_from_jagged(packed[0], self.offsets, jagged_dim=axis)


def pack(query: Tensor, key: Tensor, value: Tensor, mask: Any, shape: str, **others: Any) -> Packed:
    """Jagged tensors as one packed sequence; the mask holds for each sequence by itself.

    shape: one of SHAPES. others: arguments that have no meaning here unless they are None.

    Raises:
        ShapeError: not all three are jagged of this shape, or their batch sizes or lengths differ.
        ArgumentError: a tensor as mask, or one of `others`.
    """
    _check(query, key, value, shape)
    if mask is not None and not isinstance(mask, Mask):
        raise ArgumentError(
            f"with nested tensors a mask has to be a mask object; got {type(mask).__name__}; "
            "give one such as Causal(), which holds for each sequence by itself"
        )
    for name, given in others.items():
        if given is not None:
            raise ArgumentError(
                f"with nested tensors {name} has no meaning; got {type(given).__name__}, expected "
                "None: every sequence's last query stands at its last key. Leave it out, or pad "
                "the tensors and give KeyLengths"
            )
    q_offsets, k_offsets = _offsets(query), _offsets(key)
    same = q_offsets is k_offsets or torch.equal(q_offsets, k_offsets)
    lengths = tuple(q_offsets.diff().tolist())
    documents = Documents(lengths, None if same else tuple(k_offsets.diff().tolist()))
    return Packed(
        query.values().unsqueeze(0),
        key.values().unsqueeze(0),
        value.values().unsqueeze(0),
        documents if mask is None else mask & documents,
        q_offsets,
        shape,
    )


def _check(query: Tensor, key: Tensor, value: Tensor, shape: str) -> None:
    axis = SHAPES[shape]
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not (isinstance(tensor, Tensor) and tensor.is_nested):
            raise ShapeError(
                f"query, key and value must all be nested tensors, or none; got a {name} that is "
                "not; make it one with torch.nested.nested_tensor(..., layout=torch.jagged)"
            )
        sizes = list(tensor.shape) if tensor.layout is torch.jagged else []
        ragged = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
        if len(sizes) != len(shape.split(",")) or ragged != [axis] or _lengths(tensor) is not None:
            got = f"layout {tensor.layout}, {tensor.dim()} axes, ragged {ragged or 'unknown'}"
            raise ShapeError(
                f"{name} must be a jagged tensor {shape}, ragged in axis {axis}, without holes; "
                f"got {got}; torch.nested.nested_tensor(sequences, layout=torch.jagged) is ragged "
                "in axis 1, and its transpose(1, 2) in axis 2"
            )
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ShapeError(
            "query, key and value must hold equally many sequences; got "
            f"{query.shape[0]}, {key.shape[0]} and {value.shape[0]}; check the batches"
        )
    of_key, of_value = _offsets(key), _offsets(value)
    if not torch.equal(of_key, of_value):
        raise ShapeError(
            "key and value must have the same lengths; got "
            f"{of_key.diff().tolist()} and {of_value.diff().tolist()}; "
            "make both from the same sequences"
        )


def _offsets(tensor: Any) -> Tensor:
    offsets: Tensor = tensor.offsets()
    return offsets


def _lengths(tensor: Any) -> Tensor | None:
    """Not None where the sequences do not fill what lies between the offsets."""
    lengths: Tensor | None = tensor.lengths()
    return lengths
