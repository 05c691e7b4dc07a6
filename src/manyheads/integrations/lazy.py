"""`LazyWeights`: the weights of an attention call, as a tensor that is computed where one looks.

What transformers gets for `output_attentions=True`. Callers stack, slice, compare and plot it like
the tensor that eager attention returns, so it is one (a subclass that has sizes and no memory), and
keeps the call's queries and keys instead of the product of their numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from manyheads.definition import logits_of, softmax_of
from manyheads.errors import ArgumentError
from manyheads.parts import batch_at, heads_at, rows_at
from manyheads.spec import AttentionCall

#: A part with at most this many weights is computed when it is cut out.
_AT_ONCE = 1 << 20

#: Weights are computed in blocks of rows of about this many at a time.
_BLOCK = 1 << 21

#: What is left of each of the axes batch, heads, rows, keys; an int where the axis is gone.
_Index: TypeAlias = tuple[Sequence[int] | int, ...]


def weights_of(call: AttentionCall) -> Tensor:
    """P of a call, [B, Hq, Lq, Lk] in the query's dtype; zeros for a row that attends to nothing.

    A `LazyWeights`; or a plain tensor, if that takes no more memory than the keys (decoding). Keys
    are copied, as a cache may write over them.
    """
    geometry = call.geometry
    whole = tuple(map(range, (geometry.batch, geometry.q_heads, geometry.q_len, geometry.k_len)))
    size = geometry.batch * geometry.q_heads * geometry.q_len * geometry.k_len
    at_once = size <= call.key.numel()
    key = call.key if at_once else call.key.clone()
    call = replace(call, key=key, value=key)
    lazy = LazyWeights(call, whole, (call.query.dtype,))
    return lazy.materialize() if at_once else lazy


class LazyWeights(Tensor):
    """Attention weights [B, Hq, Lq, Lk], or a part of them, that are computed when they are used.

    Slicing gives another one, or a plain tensor if few weights are left; `float()`, `cpu()`,
    `detach()` and the like stay lazy. Everything else computes all that is in view and goes on as a
    plain tensor, O(Lq * Lk) memory if that is all of it. Differentiable where the call was.
    """

    _call: AttentionCall
    _index: _Index
    _dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def __new__(cls, call: AttentionCall, index: _Index, dtypes: tuple[torch.dtype, ...]) -> Any:
        sizes = [len(kept) for kept in index if not isinstance(kept, int)]
        made: Any = Tensor._make_wrapper_subclass(
            cls, sizes, dtype=dtypes[-1], device=call.query.device
        )
        made._call, made._index, made._dtypes = call, index, dtypes
        return made

    def __init__(self, call: AttentionCall, index: _Index, dtypes: tuple[torch.dtype, ...]) -> None:
        super().__init__()

    def materialize(self) -> Tensor:
        """All weights in view, as a plain tensor."""
        batch, heads, rows, keys = (
            range(kept, kept + 1) if isinstance(kept, int) else kept for kept in self._index
        )
        call, device = self._call, self._call.query.device
        sizes = [len(kept) for kept in self._index if not isinstance(kept, int)]
        if 0 in sizes:
            return torch.zeros(sizes, dtype=self._dtypes[-1], device=device)
        if len(batch) < call.geometry.batch:
            call = batch_at(call, _tensor(batch, device))
        if heads != range(call.geometry.q_heads):
            call = heads_at(call, _tensor(heads, device))
        step = max(1, _BLOCK // max(1, len(batch) * len(heads) * call.geometry.k_len))
        blocks = []
        with torch.autocast(device.type, enabled=False):
            for begin in range(0, max(1, len(rows)), step):
                part = rows_at(call, _tensor(rows[begin : begin + step], device))
                weights = softmax_of(part, logits_of(part)).weights
                if keys != range(call.geometry.k_len):
                    weights = weights.index_select(-1, _tensor(keys, device))
                for dtype in self._dtypes:
                    weights = weights.to(dtype)
                blocks.append(weights)
        whole = torch.cat(blocks, dim=2)
        return whole[tuple(0 if isinstance(kept, int) else slice(None) for kept in self._index)]

    def __iter__(self) -> Any:
        return (self[n] for n in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.materialize().__array__(dtype)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyWeights(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OF_SIZES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if args and isinstance(args[0], cls):
            if func is Tensor.__getitem__:
                return args[0]._cut(args[1])
            ours = _OURS.get(func)
            if ours is not None:
                return ours(args[0], *args[1:], **kwargs)
            if _changes(func):
                raise ArgumentError(
                    f"attention weights that are computed where one looks got {func.__name__}(); "
                    "expected functions that only read them: nothing is stored that could be "
                    "written to, nor does the output depend on them. Take .clone() to write into "
                    'it; load the model with attn_implementation="eager" for their gradients.'
                )
        return func(*_plain(args), **_plain(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*_plain(args), **_plain(kwargs or {}))

    def _cut(self, index: Any) -> Tensor:
        """What `tensor[index]` means, computing no weight of another batch element, head or row."""
        entries = _entries(index, [axis for axis in self._index if not isinstance(axis, int)])
        if entries is None:
            return self.materialize()[index]
        kept: list[Sequence[int] | int] = []
        remaining: list[Any] = []  # the index into what is kept, where that is not all of it
        waiting = iter(entries)
        for axis in self._index:
            entry = slice(None) if isinstance(axis, int) else next(waiting)
            if isinstance(axis, int):
                kept.append(axis)
            elif isinstance(entry, Tensor):
                for number in (entry.min(), entry.max()) if entry.numel() else ():
                    _at(axis, int(number))
                chosen = torch.where(entry < 0, entry + len(axis), entry)
                used, places = torch.unique(chosen, return_inverse=True)
                kept.append([axis[i] for i in used])
                remaining.append(places)
            else:
                kept.append(_at(axis, entry) if isinstance(entry, int) else axis[entry])
                remaining += [] if isinstance(entry, int) else [slice(None)]
        part = LazyWeights(self._call, tuple(kept), self._dtypes)
        if any(isinstance(entry, Tensor) for entry in entries):
            # An int counts as an index tensor where it stands beside one.
            return part.materialize()[tuple(remaining)]
        return part.materialize() if part.numel() <= _AT_ONCE else part

    def _cast(self, dtype: torch.dtype) -> LazyWeights:
        if dtype == self.dtype:
            return self
        return LazyWeights(self._call, self._index, (*self._dtypes, dtype))

    def _may_want_gradients(self) -> bool:
        call = self._call
        inputs = (call.query, call.key, call.sinks, *call.bias.tensors)
        return any(tensor is not None and tensor.requires_grad for tensor in inputs)

    def _detached(self) -> LazyWeights:
        call = self._call
        bias = call.bias
        bias = replace(
            bias,
            slopes=_detach(bias.slopes),
            distance_values=_detach(bias.distance_values),
            dense=_detach(bias.dense),
        )
        key, sinks = call.key.detach(), _detach(call.sinks)
        call = replace(call, query=call.query.detach(), key=key, value=key, sinks=sinks, bias=bias)
        return LazyWeights(call, self._index, self._dtypes)

    def _to(self, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("copy") or kwargs.get("memory_format") is not None:
            return self.materialize().to(*args, **kwargs)
        parse = torch._C._nn._parse_to
        device, dtype, *_ = parse(*_plain(args), **_plain(kwargs))
        if device is not None and device != self.device:
            return self.materialize().to(*args, **kwargs)
        return self if dtype is None else self._cast(dtype)


def _entries(index: Any, axes: list[Sequence[int]]) -> list[int | slice | Tensor] | None:
    """One entry for each axis; None where only torch knows what the index means."""
    given = list(index) if isinstance(index, tuple) else [index]
    dots = [n for n, entry in enumerate(given) if entry is Ellipsis]
    if len(dots) > 1 or len(given) - len(dots) > len(axes):
        return None
    missing = [slice(None)] * (len(axes) - len(given) + len(dots))
    at = dots[0] if dots else len(given)
    given[at : at + len(dots)] = missing
    entries: list[int | slice | Tensor] = []
    for entry in given:
        if isinstance(entry, slice):
            if entry.step is not None and operator.index(entry.step) <= 0:
                return None
            entries.append(slice(*(None if x is None else operator.index(x)
                                   for x in (entry.start, entry.stop, entry.step))))  # fmt: skip
        elif isinstance(entry, int) and not isinstance(entry, bool):
            entries.append(entry)
        elif isinstance(entry, list | Tensor):
            tensor = torch.as_tensor(entry)
            if tensor.dtype not in (torch.int64, torch.int32):
                return None
            entries.append(tensor.long())
        else:
            return None
    # Ints beside index tensors are index tensors, and where the axes go depends on their order.
    if any(isinstance(entry, Tensor) for entry in entries):
        entries = [torch.tensor(e) if isinstance(e, int) else e for e in entries]
    return entries


def _at(axis: Sequence[int], place: int) -> int:
    if not -len(axis) <= place < len(axis):
        raise IndexError(f"index {place} is out of bounds for an axis of size {len(axis)}")
    return axis[place]


def _changes(func: Callable[..., Any]) -> bool:
    """Whether a function would change the tensor it is given, or wait for its gradient."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or func in _CHANGING


def _plain(value: Any) -> Any:
    """The same, with every LazyWeights in it computed."""
    return tree_map_only(LazyWeights, LazyWeights.materialize, value)


def _tensor(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _cpu(weights: LazyWeights, *args: Any, **kwargs: Any) -> Tensor:
    return weights if weights.device.type == "cpu" else weights.materialize().cpu(*args, **kwargs)


#: Operations that look at sizes alone.
_OF_SIZES = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
    Tensor.is_nested.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__,  # type: ignore[attr-defined]
    Tensor.__len__,
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.nelement,
    Tensor.element_size,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.is_complex,
}

#: Functions besides `mul_` and the like that would be lost on weights which are not stored.
_CHANGING = {
    Tensor.__setitem__,
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    Tensor.data.__set__,  # type: ignore[attr-defined]
    Tensor.retain_grad,
    Tensor.register_hook,
}

#: Operations that compute no weight, or that do it later.
_OURS: dict[Any, Callable[..., Any]] = {
    Tensor.requires_grad.__get__: LazyWeights._may_want_gradients,  # type: ignore[attr-defined]
    Tensor.detach: LazyWeights._detached,
    Tensor.contiguous: lambda weights, *_, **__: weights,
    Tensor.cpu: _cpu,
    Tensor.to: LazyWeights._to,
    Tensor.float: lambda weights, **_: weights._cast(torch.float32),
    Tensor.double: lambda weights, **_: weights._cast(torch.float64),
    Tensor.half: lambda weights, **_: weights._cast(torch.float16),
    Tensor.bfloat16: lambda weights, **_: weights._cast(torch.bfloat16),
}
