"""Masks as values: immutable, equal and printed as they are written, picklable."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor


class Value:
    """Base of frozen dataclasses whose fields are numbers, tensors, functions and masks."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"masks are immutable; cannot set {name!r}")

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(cast(Any, self)))

    def _remember(self, **attributes: Any) -> None:
        """Sets attributes on a frozen instance: normalised arguments and kept results."""
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(map(_equal, self._values(), other._values()))

    def __hash__(self) -> int:
        # Tensors count by shape: equal ones hash alike, and filling them in place changes nothing.
        return hash((type(self), *map(_hashable, self._values())))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._values()  # without kept plans

    def __repr__(self) -> str:
        values = list(zip(fields(cast(Any, self)), self._values(), strict=True))
        while values and values[-1][1] is values[-1][0].default:
            values.pop()  # defaults at the end are not written
        written = ", ".join(_written(value) for _, value in values)
        return f"{type(self).__name__}({written})"


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        return a is b or (a.device == b.device and a.dtype == b.dtype and torch.equal(a, b))
    return a == b


def _hashable(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _written(value: object) -> str:
    """A number, tuple, tensor, mask or function as it stands in a repr: short."""
    if isinstance(value, Tensor):
        if value.numel() <= 8 and value.dim() == 1 and type(value) is Tensor and value.is_cpu:
            return f"tensor({value.tolist()})"
        return f"tensor({str(value.dtype).removeprefix('torch.')}{list(value.shape)})"
    if isinstance(value, tuple):
        if len(value) > 3 and all(item == value[0] for item in value):
            return f"[{_written(value[0])}] * {len(value)}"
        if len(value) > 8:
            return f"[{', '.join(map(_written, value[:3]))}, ... {len(value)} in all]"
        return f"[{', '.join(map(_written, value))}]"
    if callable(value) and not isinstance(value, Value):
        return str(getattr(value, "__qualname__", None) or type(value).__name__)
    return repr(value)
