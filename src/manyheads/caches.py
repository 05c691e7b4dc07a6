"""Keys and values of earlier calls, kept for the next: `append()` and `view()`."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.arguments import values_readable, whole_number
from manyheads.errors import ArgumentError, ArgumentTypeError, DeviceError, ShapeError

#: Rows allocated at first, so that the first tokens of a decode do not each reallocate.
MIN_CAPACITY = 64


class KVCache:
    """A growing, contiguous cache of one attention layer's keys and values.

    Memory is [B, Hkv, capacity, D] and [B, Hkv, capacity, Dv]: a head's keys follow each other,
    which is the order decoding reads them in. Capacity doubles when it runs out, so appending n
    rows one at a time copies O(n) rows in all.

    Args:
        capacity: rows to allocate at the first append; give the final length if it is known.

    For inference: appending tensors that require grad is refused, because the rows are copied
    into place. Copying and pickling work as usual.

    >>> cache = KVCache()
    >>> key, value = cache.append(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 3))
    >>> key, value = cache.append(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 3))
    >>> key.shape, value.shape, cache.length
    (torch.Size([1, 2, 6, 4]), torch.Size([1, 2, 6, 3]), 6)
    """

    def __init__(self, capacity: int = 0) -> None:
        capacity = whole_number(capacity, "KVCache's capacity")
        if capacity < 0:
            raise ArgumentError(f"KVCache got capacity={capacity}; expected 0 or more rows.")
        self._wanted = capacity
        self._length = 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    @property
    def length(self) -> int:
        """How many rows have been appended and kept."""
        return self._length

    @property
    def capacity(self) -> int:
        """How many rows fit before memory is allocated again."""
        return 0 if self._key is None else self._key.shape[2]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows at the end and return everything so far.

        Args:
            key: [B, Hkv, L, D]; L may be 0.
            value: [B, Hkv, L, Dv], dtype and device of `key`.

        Returns:
            Views [B, Hkv, length, D] and [B, Hkv, length, Dv] of the cache's memory. Later
            appends do not change their rows, but `reset` or `truncate` followed by one does.

        Raises:
            ShapeError, ArgumentTypeError, DeviceError: the tensors do not fit each other or what
                is in the cache.
            ArgumentError: a gradient would be needed through the cache.
        """
        self._check(key, value)
        end = self._length + key.shape[2]
        self._reserve(end, key, value)
        assert self._key is not None and self._value is not None
        self._key[:, :, self._length : end] = key
        self._value[:, :, self._length : end] = value
        self._length = end
        return self.view()

    def view(self) -> tuple[Tensor, Tensor]:
        """Views of all rows so far, as `append` returns them.

        Raises:
            ArgumentError: nothing was ever appended, so there are no sizes to give it.
        """
        if self._key is None or self._value is None:
            raise ArgumentError(
                "view() of a KVCache that never held anything; expected an append() before it."
            )
        return self._key[:, :, : self._length], self._value[:, :, : self._length]

    def reset(self) -> None:
        """Forget all rows; memory, sizes and dtype stay, for the next text of the same batch."""
        self._length = 0

    def truncate(self, length: int) -> None:
        """Keep the first `length` rows (to undo rejected draft tokens, or reuse a prefix).

        Raises:
            ArgumentError: `length` is outside 0..self.length.
            ArgumentTypeError: it is no int.
        """
        length = whole_number(length, "truncate's length")
        if not 0 <= length <= self._length:
            raise ArgumentError(
                f"truncate({length}) of a KVCache of length {self._length}; expected a length "
                f"from 0 to {self._length}."
            )
        self._length = length

    def reorder(self, indices: Tensor) -> None:
        """Make batch element i what element indices[i] was (beam search).

        Args:
            indices: int [B'], each in 0..B-1; B' may differ from B, so that beams can be opened
                from one prompt.

        Raises:
            ShapeError, ArgumentTypeError: `indices` is not a 1-D int tensor.
            ArgumentError: nothing was appended yet, or an index is out of range.
        """
        if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
            got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise ArgumentTypeError(
                f"reorder() got indices of {got}; expected an int64 or int32 tensor [B']."
            )
        if indices.dim() != 1:
            raise ShapeError(
                f"reorder() got indices of shape {list(indices.shape)}; expected one axis, [B']."
            )
        key, value = self.view()
        batch, indices = key.shape[0], indices.to(key.device)
        if values_readable(indices) and bool(((indices < 0) | (indices >= batch)).any()):
            raise ArgumentError(
                f"reorder() got indices from {int(indices.min())} to {int(indices.max())}; "
                f"expected each in 0..{batch - 1}, the batch elements that the cache holds."
            )
        capacity = self.capacity
        self._key = _grown(key.index_select(0, indices), capacity)
        self._value = _grown(value.index_select(0, indices), capacity)

    def __repr__(self) -> str:
        if self._key is None or self._value is None:
            return "KVCache(length=0)"
        batch, heads, capacity, size = self._key.shape
        return (
            f"KVCache(length={self._length}, capacity={capacity}, batch={batch}, "
            f"kv_heads={heads}, head_dim={size}, value_dim={self._value.shape[3]}, "
            f"dtype={self._key.dtype})"
        )

    def _reserve(self, rows: int, key: Tensor, value: Tensor) -> None:
        """Have memory for `rows` rows of tensors like these."""
        if self._key is None or self._value is None:
            capacity = max(rows, self._wanted, MIN_CAPACITY)
            self._key = _grown(key[:, :, :0], capacity)
            self._value = _grown(value[:, :, :0], capacity)
        elif rows > self.capacity:
            capacity = max(rows, 2 * self.capacity)
            old_key, old_value = self.view()
            self._key = _grown(old_key, capacity)
            self._value = _grown(old_value, capacity)

    def _check(self, key: Tensor, value: Tensor) -> None:
        for name, tensor in (("key", key), ("value", value)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ArgumentTypeError(
                    f"KVCache.append got a {name} of {got}; expected a float tensor."
                )
            if tensor.dim() != 4:
                raise ShapeError(
                    f"KVCache.append got a {name} of shape {list(tensor.shape)}; expected "
                    f"[B, Hkv, L, D]: an unbatched one needs unsqueeze(0)."
                )
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ArgumentError(
                    f"KVCache.append got a {name} that requires grad; expected none, a cache is "
                    f"for inference: call the model under torch.no_grad(), or detach it."
                )
        if key.shape[:3] != value.shape[:3]:
            raise ShapeError(
                f"KVCache.append got a key of shape {list(key.shape)} and a value of "
                f"{list(value.shape)}; expected the same batch, heads and length."
            )
        _check_alike("value", value, "key", key)
        if self._key is None or self._value is None:
            return
        for name, tensor, held in (("key", key, self._key), ("value", value, self._value)):
            _check_alike(name, tensor, f"cached {name}", held)
            sizes = (*tensor.shape[:2], tensor.shape[3])
            expected = (*held.shape[:2], held.shape[3])
            if sizes != expected:
                raise ShapeError(
                    f"KVCache.append got a {name} with (batch, heads, size) = {sizes}; expected "
                    f"{expected}, what the cache holds: use one cache per layer and per batch."
                )


def _check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise ArgumentTypeError(
            f"KVCache.append got a {name} of {tensor.dtype}; expected the {other_name}'s "
            f"{other.dtype}."
        )
    if tensor.device != other.device:
        raise DeviceError(
            f"KVCache.append got a {name} on {tensor.device}; expected the {other_name}'s "
            f"{other.device}."
        )


def _grown(rows: Tensor, capacity: int) -> Tensor:
    """[B, Hkv, capacity, D] memory that begins with `rows` [B, Hkv, n, D]."""
    batch, heads, length, size = rows.shape
    # A tensor made inside inference_mode could not be written to outside of it.
    with torch.inference_mode(False):
        grown = torch.empty((batch, heads, capacity, size), dtype=rows.dtype, device=rows.device)
    grown[:, :, :length] = rows
    return grown
