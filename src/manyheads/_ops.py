"""The compiled library: loading it, and what torch must know about its operator.

`attention_forward` (csrc/bindings.cpp holds the schema) takes one validated call as plain tensors
and numbers, and returns `(out, lse)`; lse is an empty tensor when it was not asked for. Its
results have no gradient here.

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

    name: "amx", "avx512_bf16", "avx512", "avx2", "neon" or "scalar"; None if there is no library
        or MANYHEADS_ISA is wrong.
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
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Sizes and strides of the results, as make_out and make_lse of csrc/bindings.cpp choose."""
    batch, heads, rows, _ = query.shape
    value_dim = value.shape[3]
    if query.stride(1) < query.stride(2):  # heads lie inside rows: so they do in the output
        out = query.new_empty(batch, rows, heads, value_dim).transpose(1, 2)
    else:
        out = query.new_empty(batch, heads, rows, value_dim)
    return out, query.new_empty((batch, heads, rows) if need_lse else (0,))


# The positions of these arguments in the schema, for the vmap rule.
_BAND_ROWS = 7
_PER_HEAD = (5, 11, 12)  # sinks, slopes, distance_values
_PER_BATCH = (0, 1, 2, 8, 9, 10, 14)  # query, key, value, positions, intervals, allowed, bias


def _vmap_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Fold the mapped axis into the batch; per-head values have none, so those are looped over."""
    count = info.batch_size
    moved = [
        arg.movedim(dim, 0) if isinstance(dim, int) else arg
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    mapped = [isinstance(dim, int) for dim in in_dims]
    operator = torch.ops.manyheads.attention_forward.default
    need_lse = args[-1]
    lse_dim = 0 if need_lse else None
    if any(mapped[i] for i in _PER_HEAD):
        pairs = list(zip(moved, mapped, strict=True))
        outs, lses = zip(
            *(
                operator(*(arg[n] if is_mapped else arg for arg, is_mapped in pairs))
                for n in range(count)
            ),
            strict=True,
        )
        lse = torch.stack(lses) if need_lse else lses[0]
        return (torch.stack(outs), lse), (0, lse_dim)

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
    out, lse = operator(*moved)
    out = out.unflatten(0, (count, batch))
    if need_lse:
        lse = lse.unflatten(0, (count, batch))
    return (out, lse), (0, lse_dim)


def _forward_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    """Both products over all pairs, masked or not, as torch counts its own attention."""
    batch, heads, q_len, head_dim = query
    return 2 * batch * heads * q_len * key[2] * (head_dim + value[3])


def _register() -> None:
    name = "manyheads::attention_forward"
    torch.library.register_fake(name, _fake_forward)
    torch.library.register_vmap(name, _vmap_forward)
    register_flop_formula(torch.ops.manyheads.attention_forward)(_forward_flops)


#: Why there is no native library in this process, or None if there is.
LIBRARY_ERROR: str | None = _load_library()
if LIBRARY_ERROR is None:
    _register()
_CPU_KERNELS = _read_cpu_kernels()
