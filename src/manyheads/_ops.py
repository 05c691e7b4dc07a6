"""The compiled library: loading it, and what torch must know about its operators.

`attention_forward` (csrc/bindings.cpp holds the schemas) takes one validated call as plain tensors
and numbers, and returns `(out, lse, stats)`; lse and stats are empty tensors when they were not
asked for. `attention_backward` takes the same and what flows back, and returns the gradients whose
bits are set in `needs`, empty tensors for the others. `attention_statistics` takes a call's stats
and what makes its scores, and measures its weights (csrc/attention.h: Statistics);
`attention_measured` is the forward pass and that in one. Their results have no gradient here:
_autograd.py ties the first two together. `project_row` is weight x + bias for one row x, and has
none.

When the library is absent or does not load, importing manyheads still works: `LIBRARY_ERROR` says
why, and the native backend declines every call for that reason.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from manyheads.errors import ArgumentError

#: "No bound" in the operator's `band`; csrc/attention.h has the same number.
UNBOUNDED = 1 << 29

_LIBRARY_NAME = "libmanyheads.so"


class CpuKernels(NamedTuple):
    """Which kernels this process uses.

    name: "amx_fp16", "amx", "avx512_bf16", "avx512", "avx2", "neon" or "scalar"; None if there is
        no library or MANYHEADS_ISA is wrong.
    detected: every one this machine can run, best first.
    error: what is wrong with MANYHEADS_ISA, or None.
    matrix_dtypes: those that the processor has a matrix unit for (AMX). PyTorch's attention uses
        it, the kernels in use do not.
    """

    name: str | None
    detected: tuple[str, ...]
    error: str | None
    matrix_dtypes: tuple[torch.dtype, ...] = ()


def cpu_kernels() -> CpuKernels:
    """What the processor offers and what MANYHEADS_ISA made of it; never raises."""
    return _CPU_KERNELS


def check_isa_override() -> None:
    """Raise ArgumentError if MANYHEADS_ISA names kernels that this machine does not have."""
    if _CPU_KERNELS.error is not None:
        raise ArgumentError(_CPU_KERNELS.error)


def _load_library() -> str | None:
    """Load the library from this package's directory; the reason if that failed."""
    # An editable install has a second directory, where the build tool put the library.
    folders = sys.modules["manyheads"].__path__
    candidates = [Path(folder) / _LIBRARY_NAME for folder in folders]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        return (
            f"{_LIBRARY_NAME} was not built: looked for {' and '.join(map(str, candidates))}; "
            "install manyheads with pip, or run `make build` in its source tree"
        )
    try:
        torch.ops.load_library(str(found))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        return f"{found} did not load with torch {torch.__version__}: {error}"
    return None


def _read_cpu_kernels() -> CpuKernels:
    if LIBRARY_ERROR is not None:
        return CpuKernels(None, (), None)
    name, detected, error, types = torch.ops.manyheads.cpu_kernels()
    dtypes = tuple(getattr(torch, name) for name in types.split())
    return CpuKernels(name or None, tuple(detected.split()), error or None, dtypes)


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    band: list[int],
    band_rows: Tensor | None,
    query_positions: Tensor | None,
    intervals: Tensor | None,
    allowed: Tensor | None,
    slopes: Tensor | None,
    distance_values: Tensor | None,
    distance_offset: int,
    dense_bias: Tensor | None,
    dropout_seed: Tensor | None,
    dropout_p: float,
    need_lse: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes and strides of the results, as csrc/bindings_results.h chooses them."""
    batch, heads, rows, _ = query.shape
    lse = _new_floats(query, (batch, heads, rows) if need_lse else (0,))
    stats = _new_floats(query, (2, batch, heads, rows) if need_stats else (0,))
    return _new_heads(query, value.shape[3], query.dtype), lse, stats


def _new_floats(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _new_heads(like: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, H, L, width] in another such tensor's layout: make_heads of csrc/bindings_results.h."""
    batch, heads, rows, _ = like.shape
    if like.stride(1) < like.stride(2):  # heads lie inside rows
        return like.new_empty(batch, rows, heads, width, dtype=dtype).transpose(1, 2)
    return like.new_empty(batch, heads, rows, width, dtype=dtype)


def _fake_statistics(
    stats: Tensor, query: Tensor, key: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    return _fake_answers(query, key, *arguments[-8:])


def _fake_measured(query: Tensor, key: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    forward = (query, key, *arguments[:-8], True)  # with stats
    return (*_fake_forward(*forward), *_fake_answers(query, key, *arguments[-8:]))


def _fake_answers(query: Tensor, key: Tensor, *questions: Any) -> tuple[Tensor, ...]:
    batch, heads, rows, _ = query.shape
    *flags, first_keys, offsets, top, received, heat_map = questions
    per_row = sum(flags) + len(first_keys) + len(offsets)
    tops = (batch, heads, rows, top) if top else (0,)
    by_key = (batch, heads, key.shape[2]) if received else (0,)
    cells = (batch, heads, heat_map[2], heat_map[5]) if heat_map else (0,)
    return (
        _new_floats(query, (per_row, batch, heads, rows)),
        _new_floats(query, tops),
        query.new_empty(tops if top else (0,), dtype=torch.int64 if top else torch.float32),
        _new_floats(query, by_key),
        _new_floats(query, cells),
    )


#: Where the tensors that may want a gradient stand among the forward's arguments; the i-th result
#: of the backward, and bit i of its `needs`, are of the i-th of them.
DIFFERENTIABLE = (0, 1, 2, 5, 11, 12, 14)


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    stats: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *inputs, needs = arguments
    gradients = []
    for i, place in enumerate(DIFFERENTIABLE):
        tensor = inputs[place]
        if not needs >> i & 1:
            gradients.append(_new_floats(out, (0,)))
        elif place < 3:
            gradients.append(_new_heads(tensor, tensor.shape[3]))
        else:
            gradients.append(_new_floats(tensor, tensor.shape))
    return tuple(gradients)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """One element after another: most of these gradients are sums over the batch."""
    operator = torch.ops.manyheads.attention_backward.default
    pairs = list(zip(args, in_dims, strict=True))
    each = [
        operator(*(arg.select(dim, n) if isinstance(dim, int) else arg for arg, dim in pairs))
        for n in range(info.batch_size)
    ]
    gradients = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    return gradients, (0,) * len(gradients)


def _fake_project_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(weight.shape[0])


# The positions of these arguments in the schema, for the vmap rule.
_BAND_ROWS = 7
_PER_HEAD = (5, 11, 12)  # sinks, slopes, distance_values
_DROPOUT_SEED = 15
_PER_BATCH = (0, 1, 2, 8, 9, 10, 14)  # query, key, value, positions, intervals, allowed, bias


def _vmap_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Fold the mapped axis into the batch.

    Per-head values have none, and dropout depends on a sequence's place in it: these are looped
    over.
    """
    count = info.batch_size
    moved = [
        arg.movedim(dim, 0) if isinstance(dim, int) else arg
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    mapped = [isinstance(dim, int) for dim in in_dims]
    operator = torch.ops.manyheads.attention_forward.default
    need_lse, need_stats = args[-2:]
    out_dims = (0, 0 if need_lse else None, 0 if need_stats else None)
    if any(mapped[i] for i in _PER_HEAD) or args[_DROPOUT_SEED] is not None:
        pairs = list(zip(moved, mapped, strict=True))
        each = [
            operator(*(arg[n] if is_mapped else arg for arg, is_mapped in pairs))
            for n in range(count)
        ]
        results = zip(*each, out_dims, strict=True)
        return tuple(r[0] if r[-1] is None else torch.stack(r[:-1]) for r in results), out_dims

    batch = moved[0].shape[1] if mapped[0] else moved[0].shape[0]
    for i in _PER_BATCH:
        tensor = moved[i]
        if tensor is None or (not mapped[i] and tensor.shape[0] == 1 and i > 2):
            continue
        tail = tensor.shape[2:] if mapped[i] else tensor.shape[1:]
        moved[i] = tensor.expand(count, batch, *tail).reshape(count * batch, *tail)
    rows = moved[_BAND_ROWS]
    if rows is not None:
        rows = rows.movedim(0, 1) if mapped[_BAND_ROWS] else rows[:, None]
        moved[_BAND_ROWS] = rows.expand(-1, count, batch).reshape(-1, count * batch)
    out, lse, stats = operator(*moved)
    out = out.unflatten(0, (count, batch))
    if need_lse:
        lse = lse.unflatten(0, (count, batch))
    if need_stats:
        stats = stats.unflatten(1, (count, batch)).movedim(1, 0)
    return (out, lse, stats), out_dims


def _forward_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    """Both products over all pairs, masked or not, as torch counts its own attention."""
    batch, heads, q_len, head_dim = query
    return 2 * batch * heads * q_len * key[2] * (head_dim + value[3])


def _backward_flops(
    grad_out: Any,
    grad_lse: Any,
    out: Any,
    stats: Any,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    *args: Any,
    **kwargs: Any,
) -> int:
    """Five products where the forward has two: scores again, dP, dV, dK, dQ."""
    batch, heads, q_len, head_dim = query
    return 2 * batch * heads * q_len * key[2] * (3 * head_dim + 2 * value[3])


def _statistics_flops(
    stats: Any, query: tuple[int, ...], key: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    """The scores again."""
    batch, heads, q_len, head_dim = query
    return 2 * batch * heads * q_len * key[2] * head_dim


def _register() -> None:
    forward, backward = "manyheads::attention_forward", "manyheads::attention_backward"
    torch.library.register_fake(forward, _fake_forward)
    torch.library.register_fake(backward, _fake_backward)
    torch.library.register_fake("manyheads::attention_statistics", _fake_statistics)
    torch.library.register_fake("manyheads::attention_measured", _fake_measured)
    torch.library.register_vmap(forward, _vmap_forward)
    torch.library.register_vmap(backward, _vmap_backward)
    torch.library.register_fake("manyheads::project_row", _fake_project_row)
    register_flop_formula(torch.ops.manyheads.attention_forward)(_forward_flops)
    register_flop_formula(torch.ops.manyheads.attention_backward)(_backward_flops)
    register_flop_formula(torch.ops.manyheads.attention_statistics)(_statistics_flops)
    register_flop_formula(torch.ops.manyheads.attention_measured)(_forward_flops)


#: Why there is no native library in this process, or None if there is.
LIBRARY_ERROR: str | None = _load_library()
if LIBRARY_ERROR is None:
    _register()
_CPU_KERNELS = _read_cpu_kernels()
