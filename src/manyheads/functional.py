"""`attention()`: arguments are checked, mask and bias become plans, and a backend runs the call.

Read on in spec.py (what a call is), dispatch.py (which backend runs it) and definition.py
(what it means).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from manyheads import dispatch, jagged, masks, positions
from manyheads.arguments import (
    autocast,
    check_query_start,
    check_sinks,
    check_tensors,
    number,
    raise_not_bool,
)
from manyheads.dispatch import Explanation
from manyheads.errors import StrictError
from manyheads.spec import (
    NO_BIAS,
    AttentionCall,
    AttentionSpec,
    BandPlan,
    DensePlan,
    Geometry,
    IntervalsPlan,
    MaskPlan,
    PerBatch,
    dense_memory,
)
from manyheads.watching import watchers


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: masks.Mask | Tensor | None = ...,
    attn_bias: positions.ScoreBias | Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    query_start: PerBatch | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
    strict: bool = ...,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: masks.Mask | Tensor | None = ...,
    attn_bias: positions.ScoreBias | Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    query_start: PerBatch | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
    strict: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: masks.Mask | Tensor | None = None,
    attn_bias: positions.ScoreBias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    query_start: PerBatch | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    strict: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention: out = dropout(softmax(mask(softcap(scale Q Kᵀ) + bias))) V.

    "Attention Is All You Need" (Vaswani et al., 2017), eq. 1: Q, K, V are query, key, value, and
    d_k is D. Hq is a multiple of Hkv: query head h reads key/value head h // (Hq / Hkv), so
    grouped-query and multi-query attention need no repeating. All tensors share one floating dtype
    and one device; any strides will do. Half types accumulate in float32. Under torch.autocast they
    become its dtype, as with PyTorch's own attention. The batch axis may be
    left out of all three. Jagged nested tensors [B, H, L*, D] (torch.jagged, ragged in the length)
    are sequences of their own: nothing is padded, and the result is jagged as the query is.

    Args:
        query: [B, Hq, Lq, D] or [Hq, Lq, D].
        key: [B, Hkv, Lk, D] or [Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv] or [Hkv, Lk, Dv].
        mask: which keys a query may attend to: a mask object such as `Causal()`, or a bool tensor
            [Lq|1, Lk|1] or [B|1, Hq|1, Lq|1, Lk|1], True = may attend; [B, 1, 1, Lk] is a padding
            mask and costs that much memory. None: all.
        attn_bias: what is added to the scores: a bias object such as `Alibi()`, or a floating
            tensor that broadcasts to [B, Hq, Lq, Lk].
        scale: multiplies the scores; 1 / sqrt(D) by default.
        softcap: c > 0 turns a score s into c * tanh(s / c), before bias and mask.
        sinks: [Hq], one extra logit per head that takes part in the softmax and carries no value.
        dropout_p: the share of weights that are zeroed, in [0, 1); the rest grow by 1 / (1 - p).
        query_start: the key position of query row 0, an int or an integer tensor [B]; Lk - Lq by
            default, so that the last query stands at the last key.
        return_lse: also return the natural logarithm of the sum of the exponentials of the scores.
        backend: "native", "sdpa" or "reference" runs that one or raises. None chooses.
        strict: raise rather than use memory that grows with Lq * Lk.

    Returns:
        out: the query's shape, but Dv wide, and its dtype; zeros for a query that may attend to
        nothing. With `return_lse` (out, lse): lse is [B, Hq, Lq] or [Hq, Lq], float32 (float64 for
        float64 inputs); sinks take part in it; -inf for a query that may attend to nothing.

    Raises:
        ShapeError, DeviceError, ArgumentError, ArgumentTypeError: an argument has no meaning.
        BackendError: no backend, or not the one asked for, can run the call.
        StrictError: none can without memory that grows with Lq * Lk, and `strict` was given.

    Derivatives: "native" has first ones in O(n) memory; higher ones, and forward mode, go through
    the definition, whose memory grows with Lq * Lk. "sdpa" has only first ones. What torch.export
    makes of "native" has none: it is for inference.

    >>> import torch, manyheads as mh
    >>> query = torch.randn(2, 8, 5, 16)                          # B=2, Hq=8, Lq=5, D=16
    >>> key, value = torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 24)   # Hkv=2, Lk=7, Dv=24
    >>> mh.attention(query, key, value, mask=mh.Causal()).shape
    torch.Size([2, 8, 5, 24])
    """
    if jagged.any_nested(query, key, value):
        return _attend_jagged(
            query, key, value, mask, attn_bias, query_start,
            scale=scale, softcap=softcap, sinks=sinks, dropout_p=dropout_p,
            return_lse=return_lse, backend=backend, strict=strict,
        )  # fmt: skip
    call, fields, unbatched = prepare(
        query,
        key,
        value,
        mask,
        attn_bias,
        scale,
        softcap,
        sinks,
        dropout_p,
        query_start,
        return_lse,
    )
    if strict and (note := _plan_memory(call.plan)) is not None:
        raise StrictError(
            f"strict=True: got {note}; expected memory that does not grow with Lq * Lk; give "
            "strict=False, or make the mask yourself as a bool tensor"
        )
    compiling = torch.compiler.is_compiling()
    if compiling or (backend is not None and not isinstance(backend, str)):
        chosen = dispatch.select(AttentionSpec(*fields), backend, strict)
    else:
        chosen = dispatch.select_cached(fields, backend, strict)
    run = chosen.run
    if not compiling:
        for watch in watchers():
            run = partial(watch, run)
    out, lse = run(call)
    if unbatched:
        out, lse = out.squeeze(0), None if lse is None else lse.squeeze(0)
    return (out, lse) if return_lse else out


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: masks.Mask | Tensor | None = None,
    attn_bias: positions.ScoreBias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    query_start: PerBatch | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    strict: bool = False,
) -> Explanation:
    """What `attention` would do with the same arguments, and why; nothing is computed.

    It raises as `attention` does for arguments that cannot mean anything, but not when no backend
    can run the call: that is what the answer then says.

    >>> import torch, manyheads as mh
    >>> x = torch.randn(1, 2, 5, 8)
    >>> mh.explain(x, x, x, mask=mh.Causal(), backend="reference").backend
    'reference'
    """
    if jagged.any_nested(query, key, value):
        packed = _pack(query, key, value, mask, attn_bias, query_start)
        query, key, value, mask = packed.query, packed.key, packed.value, packed.mask
    call, fields, _ = prepare(
        query,
        key,
        value,
        mask,
        attn_bias,
        scale,
        softcap,
        sinks,
        dropout_p,
        query_start,
        return_lse,
    )
    spec, notes = AttentionSpec(*fields), (_plan_reason(call.plan), _plan_memory(call.plan))
    return dispatch.explain(spec, *notes, backend, strict)


def _attend_jagged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    attn_bias: Any,
    query_start: Any,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    packed = _pack(query, key, value, mask, attn_bias, query_start)
    results = attention(
        packed.query, packed.key, packed.value, mask=packed.mask, attn_bias=attn_bias, **options
    )
    if isinstance(results, Tensor):
        return packed.unpack(results)
    return packed.unpack(results[0]), packed.unpack(results[1])


def _pack(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, attn_bias: Any, query_start: Any
) -> jagged.Packed:
    tensor_bias = attn_bias if isinstance(attn_bias, Tensor | positions.DenseBias) else None
    return jagged.pack(
        query, key, value, mask, "[B, H, L*, D]", query_start=query_start, attn_bias=tensor_bias
    )


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    attn_bias: Any,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    query_start: PerBatch | None,
    needs_lse: bool,
) -> tuple[AttentionCall, tuple[Any, ...], bool]:
    """(the checked call, the fields of its AttentionSpec, whether the batch axis was added here).

    This runs before every call, a few microseconds of decoding each: conditions are cheap, and what
    exactly is wrong is only found out by the functions that raise.
    """
    query, key, value = autocast(query, key, value)
    check_tensors(query, key, value)
    unbatched = query.dim() == 3
    if unbatched:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    batch, q_heads, q_len, head_dim = query.shape
    _, kv_heads, k_len, value_dim = value.shape
    dtype, device = query.dtype, query.device
    device_type = "cpu" if query.is_cpu else device.type  # the name costs five times as much

    if scale is None:
        scale = head_dim**-0.5
    elif scale.__class__ is not float or not math.isfinite(scale):
        scale = number("scale", scale, "a finite number", math.isfinite)
    if softcap is not None:
        expected = "a finite number > 0 (1e-37 to 1e37)"
        softcap = number("softcap", softcap, expected, lambda c: 1e-37 <= c <= 1e37)
    if dropout_p.__class__ is not float or dropout_p:
        dropout_p = number("dropout_p", dropout_p, "a number in [0, 1)", lambda p: 0.0 <= p < 1.0)
    if query_start is not None:
        query_start = check_query_start(query_start, batch, device)
    if sinks is not None:
        check_sinks(sinks, q_heads, device)

    geometry = Geometry(batch, q_heads, q_len, k_len, device, query_start)
    if mask.__class__ is Tensor and mask.dtype is not torch.bool:
        raise_not_bool(mask)
    plan, query_positions = masks.lower(mask, geometry)
    bias = positions.lower_bias(attn_bias, geometry, dtype)
    call = AttentionCall(
        query, key, value, geometry, plan, query_positions, bias,
        scale, softcap, sinks, dropout_p, needs_lse,
    )  # fmt: skip
    needs_grad = torch.is_grad_enabled() and _requires_grad(call)
    transformed = _transformed()
    causal = isinstance(plan, BandPlan) and plan.is_top_left_causal(query_positions)
    kinds = () if bias is NO_BIAS else bias.kinds
    pairs = dense_memory(plan, bias) if "dense" in kinds or plan.kind == "dense" else None
    fields = (
        batch, q_heads, kv_heads, q_len, k_len, head_dim, value_dim, dtype, device_type, plan.kind,
        kinds, softcap is not None, sinks is not None, dropout_p > 0.0, needs_grad, needs_lse,
        causal, transformed, transformed and _forward_mode(), pairs,
    )  # fmt: skip
    return call, fields, unbatched


def _forward_mode() -> bool:
    """Whether torch.func.jvp, at any depth, or a dual_level is around."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling():
        return False  # the stack cannot be traced
    functorch = torch._C._functorch
    levels = functorch.get_interpreter_stack() or ()
    return any(level.key() == functorch.TransformType.Jvp for level in levels)


def _requires_grad(call: AttentionCall) -> bool:
    if call.query.requires_grad or call.key.requires_grad or call.value.requires_grad:
        return True
    if call.sinks is not None and call.sinks.requires_grad:
        return True
    return call.bias is not NO_BIAS and any(part.requires_grad for part in call.bias.tensors)


def _transformed() -> bool:
    """Inside vmap, grad, jvp and the like, or inside torch.autograd.forward_ad.dual_level."""
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def _plan_memory(plan: MaskPlan) -> str | None:
    """Why the plan itself holds Lq * Lk bools; None if it does not, or if the caller made them."""
    if isinstance(plan, DensePlan) and not plan.from_user:
        return f"a mask that became Lq * Lk bools ({plan.reason})"
    return None


def _plan_reason(plan: MaskPlan) -> str:
    if isinstance(plan, DensePlan):
        return plan.reason
    if isinstance(plan, IntervalsPlan):
        return f"up to {plan.ranges.shape[-2]} key ranges per query row, O(Lq) memory"
    if isinstance(plan, BandPlan):
        return "a window around each query's position, O(1) memory"
    return "every query may attend to every key"
