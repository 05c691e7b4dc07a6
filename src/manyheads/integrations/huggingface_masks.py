"""The mask of transformers, kept as what it means (causal, a window, a padding), not per pair.

transformers describes a mask by a function of (batch, head, query, key) indices and asks the mask
function registered for the attention in use to build something from it. Ours looks at which
function it is. Those that transformers itself makes are closures with a known name and known cells,
and become masks of `manyheads.masks`; any other is evaluated, a block of rows at a time, into a
bool tensor, and a warning names it once.

Positions: `q_offset` and `kv_offset` are where the queries and the keys start in the sequence (a
sliding cache has dropped the keys before `kv_offset`). Everything here counts from the first key
that is there, so query row r stands at q_offset - kv_offset + r.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from manyheads.errors import ArgumentError
from manyheads.masks import Causal, Chunks, Dense, Documents, KeyRange, Mask, Window

MaskFunction = Callable[..., Any]

#: Query rows evaluated at a time when a mask function is not one we know.
_ROWS_PER_BLOCK = 256

_FACTORIES = "transformers.masking_utils"


class CompactMask(BlockMask):
    """A transformers attention mask in O(B + Lk) memory.

    It is a `BlockMask` because transformers passes that type through every path of a model and of
    `generate()` untouched, and torch.compile passes it through a graph; none of BlockMask's block
    lists are there.

    mask: which keys a query may attend to, None for all.
    query_start: the position of query row 0 among the keys, an int or an integer tensor []; None
        where the mask places the queries itself.
    key_bias: None, or [B, 1, 1, Lk], 0 where a key may be attended to and -inf where a padding
        mask with holes hides it.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        mask: Mask | None,
        query_start: int | Tensor | None,
        key_bias: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        # BlockMask.__init__ wants its block lists; nothing that uses them is reached.
        self._shape = shape
        self.mask = mask
        self.query_start = query_start
        self.key_bias = key_bias
        self._device = torch.device(device)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, 1, Lq, Lk)."""
        return self._shape

    # What models read off a 4-D mask before they hand it on.
    ndim = 4
    dtype = torch.bool

    def dim(self) -> int:
        """4, as of the tensor that this stands for."""
        return self.ndim

    @property
    def device(self) -> torch.device:
        """Where `materialize()` makes the tensor."""
        return self._device

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any, **__: Any) -> NoReturn:
        """What `scores + mask` and `torch.where(mask, ...)` end in."""
        raise ArgumentError(
            f"the model itself computes with its mask (it calls {function.__name__}), instead of "
            'handing it to the attention function: got the mask of attn_implementation="manyheads",'
            " which is no tensor; expected a model that goes through transformers' attention "
            'table. Load it with attn_implementation="sdpa" or "eager".'
        )

    def contiguous(self) -> CompactMask:
        """Itself: what transformers calls before it hands a mask to a compiled forward."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> CompactMask:
        """Itself: its few tensors follow the query's device when they are used."""
        return self

    def __getitem__(self, index: Any) -> Tensor:  # type: ignore[override]
        """A part of `materialize()`, for the few models that cut their masks themselves."""
        return self.materialize()[index]

    def materialize(self) -> Tensor:
        """The bool tensor [B, 1, Lq, Lk] that this stands for, True = may attend."""
        batch, _, q_len, k_len = self._shape
        if self.mask is None:
            allowed = torch.ones(self._shape, dtype=torch.bool, device=self._device)
        else:
            start = per_batch(self.query_start, batch)
            allowed = self.mask.materialize(
                q_len, k_len, batch=batch, query_start=start, device=self._device
            )
        if self.key_bias is not None:
            allowed = allowed & (self.key_bias == 0)
        return allowed.expand(self._shape)

    def __repr__(self) -> str:
        return f"CompactMask(shape={self._shape}, mask={self.mask}, query_start={self.query_start})"

    __str__ = __repr__


def per_batch(number: int | Tensor | None, batch: int) -> int | Tensor | None:
    """An int as it is; a tensor [] as int32 [B]."""
    return number.to(torch.int32).expand(batch) if isinstance(number, Tensor) else number


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> CompactMask:
    """The mask function that transformers calls for "manyheads".

    attention_mask: bool [B, n], the padding mask over the whole sequence; keys past n are hidden.
    mask_function: f(batch, head, query, key) -> may attend; causal by default.
    dtype: of the model, for the bias that a padding with holes needs.
    use_vmap: the function takes only scalars, one index at a time.
    """
    shape = (batch_size, 1, q_length, kv_length)
    # A new tensor, not the cache's own: a static cache adds to its counter in place, before the
    # first layer's attention runs.
    query_start: int | Tensor | None = q_offset - kv_offset
    keys = None
    if attention_mask is not None:
        keys = _visible_keys(attention_mask, kv_length, kv_offset)
    frame = _Frame(shape, q_offset, kv_offset, keys, torch.device(device))
    if torch.compiler.is_compiling():
        mask, holes = _read_in_graph(mask_function, frame, use_vmap)
    else:
        key_range, holes = (None, False) if keys is None else _read_padding(keys)
        mask = _both(_read(mask_function, frame, use_vmap), key_range)
    key_bias = None
    if keys is not None and holes:
        key_bias = torch.zeros(keys.shape, dtype=dtype, device=keys.device)
        key_bias = key_bias.masked_fill(~keys, -math.inf)[:, None, None, :]
    if mask is not None and _holds(mask, Documents):
        query_start = None  # documents place their own queries
    return CompactMask(shape, mask, query_start, key_bias, device)


@dataclass(frozen=True)
class _Frame:
    """The indices a mask function is asked about; keys: bool [B, Lk], those that are no padding."""

    shape: tuple[int, int, int, int]
    q_offset: int | Tensor
    kv_offset: int
    keys: Tensor | None
    device: torch.device


def _both(a: Mask | None, b: Mask | None) -> Mask | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b


# --- mask functions ------------------------------------------------------------------------------


class _UnknownError(Exception):
    """A mask function that we have no name for; `args[0]` is the function."""


def _read(function: MaskFunction, frame: _Frame, use_vmap: bool) -> Mask | None:
    """The mask that a function stands for, None for "all keys"."""
    try:
        return _recognise(function, frame)
    except _UnknownError as unknown:
        culprit = unknown.args[0]
        name = f"{culprit.__module__}.{culprit.__qualname__}"
        if not name.startswith(_FACTORIES):
            warnings.warn(
                f"manyheads does not know the mask function {name}: it is evaluated for every "
                f"query and key, {frame.shape[2]} x {frame.shape[3]} here, and the mask is kept "
                "as a bool tensor. The result is the same; long inputs need more memory.",
                stacklevel=2,
            )
        return Dense(_evaluate(function, frame, use_vmap))


def _read_in_graph(
    function: MaskFunction, frame: _Frame, use_vmap: bool
) -> tuple[Mask | None, bool]:
    """(mask, whether holes in the padding are left to the bias), for torch.compile.

    A traced graph cannot look into a closure, nor branch on the values of a padding. The two plain
    functions are known by identity, and their padding becomes a range and a bias. Anything else is
    a bool tensor in the graph, as it is with transformers' own sdpa attention.
    """
    if function in (causal_mask_function, bidirectional_mask_function):
        key_range = None if frame.keys is None else KeyRange(*_bounds(frame.keys))
        return _both(Causal() if function is causal_mask_function else None, key_range), True
    allowed = _evaluate_block(function, frame, 0, frame.shape[2], use_vmap)
    if frame.keys is not None:
        allowed = allowed & frame.keys[:, None, None, :]
    return Dense(allowed), False


def _recognise(function: MaskFunction, frame: _Frame) -> Mask | None:
    """The mask that one of transformers' own functions stands for; None for "all keys"."""
    code = getattr(function, "__code__", None)
    if code is None or getattr(function, "__module__", None) != _FACTORIES:
        raise _UnknownError(function)
    cells = {
        name: cell.cell_contents
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
    }
    kind = function.__qualname__.split(".")[0]
    match kind:
        case "causal_mask_function":
            return Causal()
        case "bidirectional_mask_function":
            return None
        case "sliding_window_overlay":
            return Window(cells["sliding_window"] - 1, None)
        case "sliding_window_bidirectional_overlay":
            return Window(cells["sliding_window"], cells["sliding_window"])
        case "and_masks":
            return _all_of([_recognise(f, frame) for f in cells["mask_functions"]])
        case "or_masks":
            return _any_of([_recognise(f, frame) for f in cells["mask_functions"]])
        case "chunked_overlay":
            return _chunks(function, cells["chunk_size"], cells["left_padding"], frame)
        case "packed_sequence_mask_function":
            return _documents(function, cells["packed_sequence_mask"], frame)
        case "remap_positions_for_packed_sequence":
            return _inside_documents(cells["mask_function"], frame)
    raise _UnknownError(function)


def _holds(mask: Mask, kind: type[Mask]) -> bool:
    """Whether a mask of this kind is part of the expression."""
    if isinstance(mask, kind):
        return True
    return any(_holds(part, kind) for part in getattr(mask, "parts", ()))


def _all_of(masks: list[Mask | None]) -> Mask | None:
    result = None
    for mask in masks:
        result = _both(result, mask)
    return result


def _any_of(masks: list[Mask | None]) -> Mask | None:
    result, *others = masks
    for mask in others:
        result = None if result is None or mask is None else result | mask
    return result


def _chunks(function: MaskFunction, size: int, left_padding: Tensor, frame: _Frame) -> Mask:
    """Chunks counted from the first token that is no padding.

    Ours are counted from the start of the KeyRange beside them, which is that token, unless a
    sliding cache has dropped keys in front.
    """
    start = torch.zeros_like(left_padding) if frame.keys is None else _bounds(frame.keys)[0]
    if frame.kv_offset or not bool((left_padding == start).all()):
        raise _UnknownError(function)
    return Chunks(size)


def _documents(function: MaskFunction, ids: Tensor, frame: _Frame) -> Mask:
    """Packed sequences: neighbours with equal ids are one document."""
    _, _, q_len, k_len = frame.shape
    if not ids.shape[1] == q_len == k_len:
        raise _UnknownError(function)
    lengths = (torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in ids)
    return Documents(tuple(map(tuple, lengths)))


def _inside_documents(function: MaskFunction, frame: _Frame) -> Mask | None:
    """A mask of positions that start again at every document.

    Inside one document those are the packed positions less a constant, so a mask that looks only
    at the distance between query and key is the same mask. (Across documents it may differ; the
    packed mask that always stands beside it hides those pairs.)
    """
    mask = _recognise(function, frame)
    if mask is not None and _holds(mask, Chunks):
        raise _UnknownError(function)
    return mask


def _evaluate(function: MaskFunction, frame: _Frame, use_vmap: bool) -> Tensor:
    """The bool tensor [B|1, 1, Lq, Lk] of any mask function, a block of rows at a time."""
    q_len = frame.shape[2]
    starts = range(0, q_len, _ROWS_PER_BLOCK)
    blocks = [
        _evaluate_block(function, frame, row, min(row + _ROWS_PER_BLOCK, q_len), use_vmap)
        for row in starts
    ]
    return torch.cat(blocks, dim=2)


def _evaluate_block(
    function: MaskFunction, frame: _Frame, first_row: int, end_row: int, use_vmap: bool
) -> Tensor:
    batch, _, _, k_len = frame.shape
    b = torch.arange(batch, device=frame.device)
    h = torch.zeros(1, dtype=torch.int64, device=frame.device)
    q = torch.arange(first_row, end_row, device=frame.device) + frame.q_offset
    k = torch.arange(k_len, device=frame.device) + frame.kv_offset
    if not use_vmap:
        allowed = function(
            b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], k
        )
        expanded: Tensor = allowed.expand(batch, 1, end_row - first_row, k_len)
        return expanded
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    for axis in (3, 2, 1, 0):
        function = torch.vmap(function, in_dims=tuple(0 if i == axis else None for i in range(4)))
    with TransformGetItemToIndex():  # vmap cannot index a tensor by a scalar tensor otherwise
        evaluated: Tensor = function(b, h, q, k)
    return evaluated


# --- padding -------------------------------------------------------------------------------------


def _visible_keys(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """Bool [B, Lk]: the part of a padding mask that concerns the keys that are there."""
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    keys = attention_mask.to(torch.bool)
    if missing > 0:
        keys = torch.nn.functional.pad(keys, (0, missing))
    return keys[:, kv_offset : kv_offset + kv_length]


def _bounds(keys: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [B] twice: the first visible key, and one past the last; no value is read."""
    start = keys.to(torch.int32).argmax(-1)
    end = keys.shape[-1] - keys.flip(-1).to(torch.int32).argmax(-1)
    end = torch.where(keys.any(-1), end, start)
    return start.to(torch.int32), end.to(torch.int32)


def _read_padding(keys: Tensor) -> tuple[KeyRange | None, bool]:
    """(the range of visible keys, whether it has holes); None if all keys are visible.

    Where the batch agrees on a bound it becomes a plain int.
    """
    if keys.all():
        return None, False
    start, end = _bounds(keys)
    holes = not torch.equal(end - start, keys.sum(-1, dtype=torch.int32))
    return KeyRange(_int_if_same(start), _int_if_same(end)), holes


def _int_if_same(numbers: Tensor) -> int | Tensor:
    first = int(numbers[0])
    return first if bool((numbers == first).all()) else numbers
