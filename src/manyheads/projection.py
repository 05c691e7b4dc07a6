"""A projection as its `nn.Linear` computes it, by shorter ways where only numbers are wanted.

A layer that is more than its weight and bias (hooks, another class, a quantised weight), and a call
that someone differentiates, traces, transforms or watches, get the layer itself. No copy of a
weight is kept: docs/decisions/0003-separate-projections.md says what that costs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

from manyheads import _ops

_HALF = (torch.bfloat16, torch.float16)
#: Results from this many bytes on are asked to lie in large pages; as in csrc/bindings.cpp.
_LARGE = 4 << 20


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(x)`: x [B, L, inputs] -> [B, L, outputs].

    One row of a half type is multiplied by our own kernel, which reads the weight at the speed of
    memory, twice as fast as PyTorch's. A large result is written to memory that was asked for in
    large pages: fresh memory in small ones costs up to a quarter of the time.
    """
    weight, bias = _weights(linear, x)
    if weight is None:
        result: Tensor = linear(x)
        return result
    batch, length, width = x.shape
    outputs, inputs = weight.shape
    rows = batch * length
    one = rows == 1 and width == inputs and weight.dtype in _HALF
    if one and _reads_rows(weight, bias, outputs):
        row = x.reshape(-1).contiguous()
        product: Tensor = torch.ops.manyheads.project_row.default(row, weight, bias)
        return product.view(1, 1, outputs)
    if rows * outputs * weight.itemsize < _LARGE or _ops.LIBRARY_ERROR is not None:
        return nn.functional.linear(x, weight, bias)
    out = x.new_empty(rows, outputs)
    torch.ops.manyheads.advise_large_pages.default(out)
    matrix = x.reshape(rows, -1)
    if bias is None:
        torch.mm(matrix, weight.t(), out=out)
    else:
        torch.addmm(bias, matrix, weight.t(), out=out)
    return out.view(batch, length, outputs)


def _reads_rows(weight: Tensor, bias: Tensor | None, outputs: int) -> bool:
    """Whether our kernel is there and can read these in place."""
    fits = bias is None or (bias.is_contiguous() and bias.numel() == outputs)
    readable = fits and weight.is_contiguous() and weight.numel() > 0
    return readable and _ops.cpu_kernels().name is not None


def _weights(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | tuple[None, None]:
    """Weight and bias if linear(x) is their product with x, and nobody looks at how it comes about.

    (None, None) where the layer has to be called.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(linear) is not nn.Linear:
        return None, None
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if type(weight) is not nn.Parameter or type(x) is not Tensor:
        return None, None
    if bias is not None and type(bias) is not nn.Parameter:
        return None, None
    if not weight.is_cpu or not x.is_cpu or weight.layout is not torch.strided:
        return None, None
    if x.dtype is not weight.dtype or torch._C._is_any_autocast_enabled():
        return None, None
    hooked = linear._forward_hooks or linear._forward_pre_hooks or modules._has_any_global_hook()  # type: ignore[no-untyped-call]
    replaced = "forward" in linear.__dict__ or linear._compiled_call_impl is not None
    watched = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    traced = torch._C._get_tracing_state() is not None
    if hooked or replaced or watched or transformed or traced:
        return None, None
    # nn.Linear takes a vector as well, and any bias that broadcasts.
    if weight.ndim != 2 or (bias is not None and bias.ndim != 1):
        return None, None
    return weight, bias
