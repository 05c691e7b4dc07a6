"""What a mask's arguments may be: whole numbers, one per call, per batch element or per document.

Everything here raises at the door, with what was got, what was expected and how to mend it. Values
inside tensors are read only where that is cheap and safe: CPU tensors, outside torch.compile.
"""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from manyheads import arguments
from manyheads.arguments import values_readable
from manyheads.errors import ArgumentError, ArgumentTypeError, ShapeError

#: A number per call; per batch element or document (tuple); per both (nested); or the same as a
#: tensor.
Numbers: TypeAlias = int | tuple[int, ...] | tuple[tuple[int, ...], ...] | Tensor

_WHOLE_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def whole_number(value: Any, what: str) -> int:
    """`value` as an int that is not negative; numpy integers are welcome, bools are not."""
    if type(value) is int and value >= 0:
        return value
    number = arguments.whole_number(value, what)
    if number < 0:
        raise ArgumentError(f"{what} must not be negative; got {number}. Use 0 or more.")
    return number


def whole_numbers(value: Any, what: str, *, max_dims: int = 1) -> Numbers:
    """`value` as an int, a tuple of ints (nested when `max_dims` is 2), or a tensor of integers.

    Ragged nested lists are filled up with zeros, so that every row has the same length.
    """
    if type(value) is int:
        return whole_number(value, what)
    if isinstance(value, Tensor):
        return _whole_tensor(value, what, max_dims)
    if hasattr(value, "tolist"):  # numpy arrays and numbers
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return whole_number(value, what)
    if max_dims > 1 and any(isinstance(row, (list, tuple)) for row in value):
        rows = [whole_numbers(row, what) for row in value]
        if not all(isinstance(row, tuple) for row in rows):
            raise ShapeError(
                f"{what} mixes numbers and lists; got {value!r}. "
                "Give one flat list, or one list per batch element."
            )
        longest = max(len(row) for row in rows)  # type: ignore[arg-type]
        return tuple((*row, *[0] * (longest - len(row))) for row in rows)  # type: ignore
    return tuple(whole_number(item, what) for item in value)


def _whole_tensor(value: Tensor, what: str, max_dims: int) -> Tensor:
    if value.dtype not in _WHOLE_DTYPES:
        raise ArgumentTypeError(
            f"{what} must hold integers; got a tensor of {value.dtype}. Convert it with .int()."
        )
    if not 1 <= value.dim() <= max_dims:
        allowed = "1" if max_dims == 1 else f"1 to {max_dims}"
        raise ShapeError(
            f"{what} must have {allowed} dimension(s); got shape {list(value.shape)}. "
            "Use int(x) for a single number, or x.reshape(-1) for one per batch element."
        )
    if value.numel() and values_readable(value) and int(value.min()) < 0:
        raise ArgumentError(
            f"{what} must not be negative; got {int(value.min())} in the tensor. Use 0 or more."
        )
    return value


def size_of(value: Numbers) -> tuple[int, ...]:
    """The shape of a number, a tuple, a nested tuple or a tensor."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if not isinstance(value, tuple):
        return ()
    if value and isinstance(value[0], tuple):
        return (len(value), len(value[0]))
    return (len(value),)


def broadcasts(size: int, to: int) -> bool:
    """A tensor's axis serves a call's axis: it has its size, or is 1."""
    # Not `size in (1, to)`: torch.compile compares symbolic sizes only one by one.
    return size == 1 or size == to


def check_per_batch(value: Numbers, what: str, batch: int) -> None:
    """One number for all, or exactly one per batch element."""
    size = size_of(value)
    if len(size) > 1 or (size and size[0] != batch):
        raise ShapeError(
            f"{what} must be one number or one per batch element; got shape {list(size)} "
            f"for batch size {batch}. Expected shape [{batch}]."
        )


def largest_value(value: Numbers) -> int | None:
    """The largest number in `value`; None if it holds none, or may not be looked at."""
    if isinstance(value, Tensor):
        return int(value.max()) if value.numel() and values_readable(value) else None
    if isinstance(value, tuple):
        return max(cast("tuple[int, ...]", value)) if value else None
    return value
