"""What `attention` and the module accept: checks of tensors and numbers, with what to do instead.

Each message says what was wrong, what was got, what was expected, and how to mend it. Masks and
biases check themselves against the call's sizes when they are lowered.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from manyheads.errors import ArgumentError, ArgumentTypeError, DeviceError, ShapeError
from manyheads.spec import PerBatch

#: Positions stay below this, so that sums of a few of them fit the kernels' 32-bit lanes.
_POSITION_LIMIT = 1 << 29
#: float8 and the like only store numbers: PyTorch has no arithmetic for them.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Integers that cannot leave the limit, nor hold it.
_NARROW = (torch.int8, torch.uint8, torch.int16)
_INTEGERS = (*_NARROW, torch.int32, torch.int64)


#: Positions further out than this mean no more than this: kernels count in int32.
FARTHEST = 1 << 29


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """As PyTorch's attention under torch.autocast: floating tensors, but for float64, are cast."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def eligible(tensor: Any) -> bool:
        floating = isinstance(tensor, Tensor) and tensor.dtype.is_floating_point
        return floating and tensor.dtype is not torch.float64

    return tuple(tensor.to(dtype) if eligible(tensor) else tensor for tensor in tensors)


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless the three are floating tensors of one dtype and device whose sizes fit."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        _raise_not_tensors(query=query, key=key, value=value)
    q, k, v = query.shape, key.shape, value.shape
    rank = len(q)
    if rank not in (3, 4) or len(k) != rank or len(v) != rank:
        raise ShapeError(
            f"wrong number of axes: got {_shapes(query, key, value)}; expected all [B, H, L, D] or "
            "all [H, L, D]; for [B, L, H, D] memory give x.transpose(1, 2), which copies nothing"
        )
    dtype = query.dtype
    if dtype not in _FLOATS:
        raise ArgumentTypeError(
            f"query's dtype cannot be computed with: got {dtype}; expected float32, bfloat16, "
            "float16 or float64; convert it, as in query.float()"
        )
    if key.dtype is not dtype or value.dtype is not dtype:
        raise ArgumentTypeError(
            f"dtypes differ: got query {dtype}, key {key.dtype}, value {value.dtype}; expected one "
            "dtype; convert with .to(query.dtype)"
        )
    strided = torch.strided
    if not (query.layout is key.layout is value.layout is strided):
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            check_strided(name, tensor)
    device = query.device
    if key.device != device or value.device != device:
        raise DeviceError(
            f"devices differ: got query on {device}, key on {key.device}, value on {value.device}; "
            "expected one device; move them with .to(query.device)"
        )
    if k[-2] != v[-2] or k[-3] != v[-3] or k[0] != v[0]:
        raise ShapeError(
            f"key and value do not fit: got {_shapes(query, key, value)}; expected the same batch, "
            "heads and length in key and value; only their last axis may differ"
        )
    if q[-1] != k[-1]:
        raise ShapeError(
            f"query and key have different head sizes: got {_shapes(query, key, value)}; expected "
            f"key's last axis to be {q[-1]}; project both to one size"
        )
    if rank == 4 and q[0] != k[0]:
        raise ShapeError(
            f"batch sizes differ: got {_shapes(query, key, value)}; expected one batch size; "
            "key.expand(B, -1, -1, -1) shares keys without copying"
        )
    if not k[-3] or q[-3] % k[-3] or not q[-3]:
        raise ShapeError(
            f"query heads are no multiple of key heads: got {_shapes(query, key, value)}; expected "
            "Hq = G * Hkv with G >= 1; query head h reads key head h // G"
        )
    if not q[-1] or not v[-1]:
        raise ShapeError(
            f"a head size is 0: got {_shapes(query, key, value)}; expected at least 1; "
            "check how the heads were split"
        )


def check_query_start(query_start: Any, batch: int, device: torch.device) -> PerBatch:
    """An int, or int32 [B] on the call's device."""
    fix = "give a key position, such as the number of keys already cached; None means Lk - Lq"
    if isinstance(query_start, Tensor):
        if query_start.dtype not in _INTEGERS:
            raise ArgumentTypeError(
                f"query_start is no integer tensor: got {query_start.dtype}; expected int32 or "
                f"int64; {fix}"
            )
        if query_start.shape != (batch,):
            raise ShapeError(
                f"query_start has the wrong shape: got {list(query_start.shape)}; expected "
                f"[{batch}], one number per batch element; {fix}"
            )
        if query_start.device != device:
            raise DeviceError(
                f"query_start is elsewhere: got {query_start.device}; expected the query's device "
                f"{device}; move it with .to(query.device)"
            )
        if query_start.dtype in _NARROW:
            return query_start.to(torch.int32)
        # Far outside all keys is far outside, however far; a bare cast would wrap around.
        return query_start.clamp(-FARTHEST, FARTHEST).to(torch.int32)
    if isinstance(query_start, bool) or not isinstance(query_start, (int, torch.SymInt)):
        raise ArgumentTypeError(
            f"query_start is of the wrong type: got {type(query_start).__name__}; expected an int "
            f"or an integer tensor [B]; {fix}"
        )
    if not -_POSITION_LIMIT < query_start < _POSITION_LIMIT:
        raise ArgumentError(
            f"query_start is out of range: got {query_start}; expected less than 2**29 either "
            f"side of 0; {fix}"
        )
    return query_start  # type: ignore[return-value]  # a SymInt behaves as an int


def check_sinks(sinks: Any, q_heads: int, device: torch.device) -> None:
    """Raise unless `sinks` is a floating tensor [Hq] on the call's device."""
    fix = "give one logit per query head"
    if not isinstance(sinks, Tensor) or not sinks.dtype.is_floating_point:
        got = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        raise ArgumentTypeError(
            f"sinks is no floating tensor: got {got}; expected a floating tensor [{q_heads}]; {fix}"
        )
    if sinks.shape != (q_heads,):
        raise ShapeError(
            f"sinks has the wrong shape: got {list(sinks.shape)}; expected [{q_heads}]; {fix}"
        )
    if sinks.device != device:
        raise DeviceError(
            f"sinks is elsewhere: got {sinks.device}; expected the query's device {device}; "
            "move it with .to(query.device)"
        )


def number(name: str, value: Any, expected: str, holds: Callable[[float], bool]) -> float:
    """`value` as a float, if it is a real number for which `holds` is true."""
    # Asked in this order, since torch.compile cannot look for attributes on its own numbers.
    real = isinstance(value, (int, float, torch.SymFloat)) or hasattr(value, "__float__")
    if isinstance(value, (bool, Tensor)) or not real:
        raise ArgumentTypeError(
            f"{name} is of the wrong type: got {type(value).__name__}; expected {expected}; "
            "convert it with float(...)"
        )
    result = float(value)
    if not holds(result):
        raise ArgumentError(
            f"{name} is out of range: got {value}; expected {expected}; leave {name} out for its "
            "default"
        )
    return result


def values_readable(tensor: Tensor) -> bool:
    """True where looking at the tensor's values costs no synchronisation and breaks no trace."""
    return not torch.compiler.is_compiling() and type(tensor) is Tensor and tensor.is_cpu


def whole_number(value: Any, what: str) -> int:
    """`value` as an int; numpy integers are welcome, bools are not."""
    if type(value) is int:
        return value
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    shown = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise ArgumentTypeError(
        f"{what} must be a whole number; got {shown} ({type(value).__name__}). "
        "Round it to an int first."
    )


def check_strided(name: str, tensor: Tensor) -> None:
    """Raise for sparse tensors and the like."""
    if tensor.layout is not torch.strided:
        raise ArgumentTypeError(
            f"{name} is no plain tensor: got layout {tensor.layout}; expected torch.strided; "
            "convert it with .to_dense()"
        )


def check_sizes(sizes: Mapping[str, int | None]) -> None:
    """Raise unless every size that is given is an int of at least 1."""
    for name, size in sizes.items():
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int):
            raise ArgumentTypeError(
                f"{name} is {size!r}; expected an int of at least 1: convert it with int(...)."
            )
        if size < 1:
            raise ArgumentError(
                f"{name} is {size}; expected at least 1: give a positive size"
                f"{'' if name in ('embed_dim', 'num_heads') else ', or None for its default'}."
            )


def check_input(name: str, tensor: Tensor, size: int, query: Tensor) -> None:
    """Raise unless `tensor` is [B, L, size] or [L, size], with as many axes as the query."""
    if not isinstance(tensor, Tensor):
        raise_no_tensor(name, tensor)
    if tensor.dim() not in (2, 3) or tensor.dim() != query.dim() or tensor.shape[-1] != size:
        raise ShapeError(
            f"{name} has shape {list(tensor.shape)}; expected [B, L, {size}], or [L, {size}] for "
            f"query, key and value alike ({name} size {size} as this module was made; a key or "
            f"value left out is the query or the key): reshape it, or make the module for its size"
        )


def check_against_weight(name: str, tensor: Tensor, weight: Tensor) -> None:
    """Raise unless a projection with this weight can take `tensor`."""
    if tensor.device != weight.device:
        raise DeviceError(
            f"{name} is elsewhere: got {tensor.device}; expected this module's {weight.device}; "
            f"move the input with .to({str(weight.device)!r}) or the module with "
            f".to({str(tensor.device)!r})"
        )
    if tensor.dtype is not weight.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise ArgumentTypeError(
            f"{name} has another dtype: got {tensor.dtype}; expected this module's "
            f"{weight.dtype}; convert the input with .to({weight.dtype}) or the module with "
            f".to({tensor.dtype})"
        )


def raise_no_tensor(name: str, value: Any) -> NoReturn:
    """Something else was given as query, key or value."""
    raise ArgumentTypeError(
        f"{name} is not a tensor: got {type(value).__name__}; expected torch.Tensor; "
        "torch.as_tensor converts arrays and lists"
    )


def _raise_not_tensors(**inputs: Any) -> NoReturn:
    name = next(name for name, value in inputs.items() if not isinstance(value, Tensor))
    raise_no_tensor(name, inputs[name])


def raise_not_bool(mask: Tensor) -> NoReturn:
    """A tensor of another dtype was given as mask."""
    raise ArgumentTypeError(
        f"mask is not a bool tensor: got {mask.dtype}; expected bool, True = may attend; give what "
        "is added to the scores as attn_bias=, and compare a 0/1 mask, as in mask != 0"
    )


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    shapes = zip(("query", "key", "value"), (query, key, value), strict=True)
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in shapes)
