"""Masks known only pair by pair: Dense, a bool tensor; Predicate, a function. Both are scanned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyheads.arguments import check_strided
from manyheads.errors import ArgumentTypeError, DeviceError, ShapeError
from manyheads.masks.algebra import Mask
from manyheads.masks.checks import broadcasts
from manyheads.masks.frame import Frame
from manyheads.masks.ranges import (
    MOST_RANGES,
    NotCompactError,
    Ranges,
    one_range,
    scan,
    stack_rows,
)
from manyheads.spec import DensePlan, Geometry, has_values

#: Pairs looked at together: keeps index temporaries near 8 MB.
_PAIRS_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """A bool tensor, True = may attend, that broadcasts to [B, Hq, Lq, Lk].

    Lowering looks at it once: if every row is at most 4 runs of keys it becomes intervals and runs
    as fast as a mask that was written down; else it is used as it is. Keep the Dense object for
    several calls, so that it is scanned once, and do not change the tensor meanwhile (changes
    made through torch are noticed). Inside torch.compile it is not scanned. An axis of size 1
    stands for all of its entries and is never filled up: a padding mask [B, 1, 1, Lk] costs B * Lk.

    >>> Dense(torch.tensor([[True, False], [True, True]]))
    Dense(tensor(bool[2, 2]))

    Args:
        allowed: bool, [Lq|1, Lk|1], or [B|1, Hq|1, Lq|1, Lk|1].

    Raises:
        ArgumentTypeError: not a bool tensor. Numbers to add to the scores are attn_bias.
        ShapeError: 3-D (is the first axis batch or heads?), or sizes that do not fit the call.
        DeviceError: not on the call's device (when lowering); it is too large to move unasked.
    """

    allowed: Tensor

    _fixed = False
    _scanned: ClassVar[tuple[int, Ranges | None] | None] = None

    def __post_init__(self) -> None:
        allowed = self.allowed
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            got = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
            raise ArgumentTypeError(
                f"A dense mask must be a bool tensor, True = may attend; got {got}. "
                "Convert 0/1 masks with .bool(), and give numbers to add as attn_bias."
            )
        check_strided("a dense mask", allowed)
        if allowed.dim() == 3:
            raise ShapeError(
                f"A dense mask must have shape [Lq|1, Lk|1] or [B|1, Hq|1, Lq|1, Lk|1]; got "
                f"{list(allowed.shape)}, where the first axis could be batch or heads. Write "
                "mask[:, None] for one per batch element, mask[None] for one per head."
            )
        if allowed.dim() not in (2, 4):
            raise ShapeError(
                f"A dense mask must have shape [Lq|1, Lk|1] or [B|1, Hq|1, Lq|1, Lk|1]; got "
                f"{list(allowed.shape)}. Which keys exist is KeyLengths or KeyRange."
            )

    def _check(self, geometry: Geometry) -> None:
        if self.allowed.device != geometry.device:
            raise DeviceError(
                f"A dense mask must be on the query's device, {geometry.device}; got "
                f"{self.allowed.device}. Move it with .to({str(geometry.device)!r}), or give a "
                "mask object, whose few numbers move by themselves."
            )
        sizes = (geometry.batch, geometry.q_heads, geometry.q_len, geometry.k_len)
        if not all(map(broadcasts, (1, 1, *self.allowed.shape)[-4:], sizes)):
            raise ShapeError(
                f"A dense mask must fit the call, each size being 1 or the call's: "
                f"[Lq, Lk] = {list(sizes[2:])}, or [B, Hq, Lq, Lk] = {list(sizes)}; "
                f"got {list(self.allowed.shape)}. Expand or slice it to these sizes."
            )

    def _allowed(self, frame: Frame) -> Tensor:
        allowed = self.allowed
        return allowed if allowed.dim() == 4 else allowed[None, None]

    def _ranges(self, frame: Frame) -> Ranges:
        if self.allowed.shape[-1] == 1:  # every row is all keys or none, whatever the values
            end = self._allowed(frame) * frame.geometry.k_len
            return one_range(0, end, frame.geometry, whole_rows=True)
        if not has_values(self.allowed):
            raise NotCompactError("a bool tensor is not scanned in torch.compile or without values")
        ranges = self._scan(frame)
        if ranges is None:
            raise NotCompactError(f"some rows have more than {MOST_RANGES} runs of keys")
        return ranges

    def _scan(self, frame: Frame) -> Ranges | None:
        changes = None if self.allowed.is_inference() else self.allowed._version
        kept = self._scanned
        if kept is not None and changes == kept[0]:
            return kept[1]
        allowed = self._allowed(frame)
        rows = _rows_at_once(frame.geometry, allowed.shape[0], allowed.shape[1])
        ranges = _scan_blocks(torch.split(allowed, rows, dim=2))
        if changes is not None and not torch.is_inference_mode_enabled():
            self._remember(_scanned=(changes, ranges))
        return ranges

    def _dense_plan(self, frame: Frame, reason: str) -> DensePlan:
        return DensePlan(self._dense(frame), reason, from_user=True)


@dataclass(frozen=True, eq=False, repr=False)
class Predicate(Mask):
    """A function of indices: fn(b, h, p, j) -> bool tensor, True = may attend.

    As FlexAttention's mask_mod, with one difference: p is the query's *position* on the key axis,
    not its row (the same where Lq == Lk, and what Hugging Face's mask functions get). The four
    arguments are int64 tensors shaped to broadcast to [B, Hq, rows, Lk]; what fn does not use need
    not be in its result. It is called for a block of rows at a time, on every lowering, and the
    result is scanned: intervals if every row is at most 4 runs of keys, else a dense mask.
    Inside torch.compile it is not scanned. Give masks that can be said otherwise otherwise: they
    cost nothing per pair.

    >>> mask = Predicate(lambda b, h, p, j: (p - j) % 2 == 0)
    >>> print(mask.materialize(2, 3)[0, 0].int())
    tensor([[0, 1, 0],
            [1, 0, 1]], dtype=torch.int32)

    Args:
        fn: the function; must be pickleable for the mask to be.

    Raises:
        ArgumentTypeError: fn is not callable, or (when lowering) does not return a bool tensor.
        ShapeError: its result does not broadcast to [B, Hq, rows, Lk] (when lowering).
    """

    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Any]

    _fixed = False

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise ArgumentTypeError(
                f"Predicate needs a function fn(b, h, p, j); got {type(self.fn).__name__}. "
                "A bool tensor is Dense."
            )

    def _allowed(self, frame: Frame) -> Tensor:
        return torch.cat(list(self._blocks(frame)), dim=2)

    def _ranges(self, frame: Frame) -> Ranges:
        if not has_values(frame.keys()):
            raise NotCompactError("a function is not scanned in torch.compile or without values")
        ranges = _scan_blocks(self._blocks(frame))
        if ranges is None:
            raise NotCompactError(f"some rows have more than {MOST_RANGES} runs of keys")
        return ranges

    def _blocks(self, frame: Frame) -> Iterator[Tensor]:
        """Bool [B|1, Hq|1, rows, Lk], for consecutive blocks of rows; at least one block."""
        geometry = frame.geometry
        b = torch.arange(geometry.batch, device=frame.device)[:, None, None, None]
        h = torch.arange(geometry.q_heads, device=frame.device)[None, :, None, None]
        j = torch.arange(geometry.k_len, device=frame.device)
        p = frame.positions.materialize(geometry)[:, None, :, None]
        rows = _rows_at_once(geometry, geometry.batch, geometry.q_heads)
        if torch.compiler.is_compiling():
            rows = max(geometry.q_len, 1)  # the compiler fuses the temporaries away
        for block in torch.split(p, rows, dim=2):
            yield self._block(b, h, block, j[None, None, None, :], geometry)

    def _block(self, b: Tensor, h: Tensor, p: Tensor, j: Tensor, geometry: Geometry) -> Tensor:
        allowed = self.fn(b, h, p, j)
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            got = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
            raise ArgumentTypeError(
                f"{self!r} must return a bool tensor; got {got}. "
                "Compare indices with torch operations: `and`, `if` and bool() do not work here."
            )
        sizes = (geometry.batch, geometry.q_heads, p.shape[2], geometry.k_len)
        shape = (1, 1, 1, 1, *allowed.shape)[-max(4, allowed.dim()) :]
        if len(shape) > 4 or not all(map(broadcasts, shape, sizes)):
            raise ShapeError(
                f"{self!r} must return a tensor that broadcasts to [B, Hq, rows, Lk] = "
                f"{list(sizes)}; got {list(allowed.shape)}. Keep the arguments' four axes."
            )
        return allowed.expand(shape[0], shape[1], *sizes[2:])


def _rows_at_once(geometry: Geometry, batch: int, heads: int) -> int:
    return max(1, _PAIRS_AT_ONCE // max(1, batch * heads * geometry.k_len))


def _scan_blocks(blocks: Iterable[Tensor]) -> Ranges | None:
    """The ranges of a mask that comes in blocks of rows; stops at the first that has too many."""
    found = []
    for block in blocks:
        ranges = scan(block)
        if ranges is None:
            return None
        found.append(ranges)
    return stack_rows(found)
