"""Gradients of the native kernels, tied together for autograd.

    attention --backward--> attention_backward --backward--> the definition, differentiated

The first derivative is the kernels' own: O(n) memory, from each row's maximum and sum, which the
forward pass leaves. A derivative of that differentiates definition.py instead: right to any order,
but it stores the scores, O(Lq * Lk). There is no forward mode here: torch raises if it is tried.

Everything is passed flat, tensors first and then numbers, so that whatever traces or transforms a
call sees all of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from manyheads import _ops, definition, dropout
from manyheads.spec import (
    AttentionCall,
    BandPlan,
    BiasPlan,
    DensePlan,
    Geometry,
    IntervalsPlan,
    MaskPlan,
    PerBatch,
    QueryPositions,
)

# Where the tensors, and the numbers, stand among the operators' arguments; the band is a list of
# numbers. "Flat" below means: these tensors, these numbers, the band's numbers.
_TENSORS = (0, 1, 2, 5, 7, 8, 9, 10, 11, 12, 14, 15)
_NUMBERS = (3, 4, 13, 16)
_BAND, _BAND_LENGTH = 6, 8
_FLAT_LENGTH = len(_TENSORS) + len(_NUMBERS) + _BAND_LENGTH
# Where the tensors that may want a gradient stand in the flat order.
_DIFFERENTIABLE = tuple(_TENSORS.index(place) for place in _ops.DIFFERENTIABLE)
_Arguments = tuple[Any, ...]


def wants_gradient(arguments: _Arguments) -> bool:
    """Whether someone may differentiate a call with these arguments, as far as can be told.

    Under a torch.func transform a tensor does not tell that it requires grad. An exported program
    is the forward pass: torch.export cannot trace the functions below with sizes left open, and
    with fixed ones it drops their backward.
    """
    return wants_gradient_of([arguments[place] for place in _ops.DIFFERENTIABLE])


def wants_gradient_of(tensors: Iterable[Tensor | None]) -> bool:
    """The same for the tensors that a gradient may be wanted of."""
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return False
    elif torch._C._are_functorch_transforms_active():
        return True
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 - half the time of any(...), before every call
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def attention(arguments: _Arguments, need_lse: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) of the forward operator's arguments; lse is empty if it is not needed."""
    flat = _flatten(arguments)
    function: type[torch.autograd.Function] = _Attention
    if torch.compiler.is_compiling():
        function = _OnceDifferentiable
        # The same tensor twice, as in attention(x, x, x), it cannot trace.
        views = tuple(
            flat[p] if flat[p] is None else flat[p].view_as(flat[p]) for p in _DIFFERENTIABLE
        )
        flat = _replace(flat, list(_DIFFERENTIABLE), views)
    elif not torch._C._are_functorch_transforms_active():
        function = _Plain
    out, lse, _ = function.apply(need_lse, *flat)  # type: ignore[no-untyped-call]
    return out, lse


class _OnceDifferentiable(torch.autograd.Function):
    """(need_lse, *flat) -> (out, lse, stats): as much of it as torch.compile can trace."""

    @staticmethod
    def forward(need_lse: bool, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor]
        result = torch.ops.manyheads.attention_forward.default(*_unflatten(flat), need_lse, True)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        need_lse, *flat = inputs
        out, lse, stats = output
        ctx.mark_non_differentiable(*((stats,) if need_lse else (lse, stats)))
        ctx.set_materialize_grads(False)
        tensors, ctx.numbers = flat[: len(_TENSORS)], flat[len(_TENSORS) :]
        ctx.save_for_backward(*tensors, out, stats)
        ctx.need_lse = need_lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grads, _first_derivative)


class _Attention(_OnceDifferentiable):
    """The same, differentiable to any order, and under torch.func's grad, vjp and vmap."""

    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Unless someone differentiates further, the second function would only cost its time.
        further = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        return _backward(ctx, grads, _Gradients.apply if further else _first_derivative)


class _Plain(torch.autograd.Function):
    """_Attention where no transform is around: without setup_context, a call costs 20 us less."""

    @staticmethod
    def forward(ctx: Any, need_lse: bool, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _Attention.forward(need_lse, *flat)
        _Attention.setup_context(ctx, (need_lse, *flat), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _Attention.backward(ctx, *grads)


def _backward(
    ctx: Any, grads: tuple[Tensor | None, ...], derivative: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor | None, ...]:
    """The gradient of every argument of _Attention, from what flows into (out, lse, stats)."""
    *tensors, out, stats = ctx.saved_tensors
    grad_out, grad_lse = grads[0], grads[1] if ctx.need_lse else None
    result: list[Tensor | None] = [None] * (1 + _FLAT_LENGTH)
    if grad_out is None and grad_lse is None:
        return tuple(result)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    wanted = [ctx.needs_input_grad[1 + place] for place in _DIFFERENTIABLE]
    needs = sum(1 << i for i, wants in enumerate(wanted) if wants)
    found = derivative(needs, grad_out, grad_lse, out, stats, *tensors, *ctx.numbers)
    for place, wants, gradient in zip(_DIFFERENTIABLE, wanted, found, strict=True):
        if wants:
            result[1 + place] = gradient
    return tuple(result)


class _Gradients(torch.autograd.Function):
    """(needs, grad_out, grad_lse, out, stats, *flat) -> the gradients that `needs` names.

    `out` and `stats` only spare work: as a function this depends on the other tensors alone, and is
    differentiated as such.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(needs: int, *tensors_and_numbers: Any) -> tuple[Tensor, ...]:
        return _first_derivative(needs, *tensors_and_numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        needs, grad_out, grad_lse, _, _, *flat = inputs
        ctx.mark_non_differentiable(*(g for i, g in enumerate(output) if not needs >> i & 1))
        ctx.needs = needs
        tensors, ctx.numbers = flat[: len(_TENSORS)], flat[len(_TENSORS) :]
        ctx.save_for_backward(grad_out, grad_lse, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        function, primals, places = _first_derivative_by_definition(ctx)
        pull = torch.func.vjp(function, *primals)[1]
        found = pull(tuple(g for i, g in enumerate(grads) if ctx.needs >> i & 1))
        result: list[Tensor | None] = [None] * (5 + _FLAT_LENGTH)
        for place, gradient in zip(places, found, strict=True):
            result[place] = gradient
        return tuple(result)


def _first_derivative(
    needs: int,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    stats: Tensor,
    *flat: Any,
) -> tuple[Tensor, ...]:
    """The backward operator, which wants contiguous rows of what flows back and gives float32."""
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    found: tuple[Tensor, ...] = torch.ops.manyheads.attention_backward.default(
        grad_out, grad_lse, out, stats.contiguous(), *_unflatten(flat), needs
    )
    dtype = out.dtype
    if dtype is torch.float32:
        return found
    return (*(gradient.to(dtype) for gradient in found[:3]), *found[3:])


def _first_derivative_by_definition(ctx: Any) -> tuple[Any, tuple[Tensor, ...], list[int]]:
    """What `_Gradients` computes, as a function that torch can differentiate.

    Returns (function, its arguments, their places among those of `_Gradients`).
    """
    grad_out, grad_lse, *tensors = ctx.saved_tensors
    flat = (*tensors, *ctx.numbers)
    present = [p for p in _DIFFERENTIABLE if flat[p] is not None]
    wanted = [p for i, p in enumerate(_DIFFERENTIABLE) if ctx.needs >> i & 1]
    flowing = (grad_out,) if grad_lse is None else (grad_out, grad_lse)

    def gradients(*primals: Tensor) -> tuple[Tensor, ...]:
        back, here = primals[: len(flowing)], _replace(flat, present, primals[len(flowing) :])

        def attend(*changed: Tensor) -> tuple[Tensor, ...]:
            return _define(_replace(here, wanted, changed), len(flowing) == 2)

        pull = torch.func.vjp(attend, *(here[p] for p in wanted))[1]
        found: tuple[Tensor, ...] = pull(back)
        return found

    primals = (*flowing, *(flat[p] for p in present))
    return gradients, primals, [*range(1, 1 + len(flowing)), *(5 + p for p in present)]


def _define(flat: _Arguments, need_lse: bool) -> tuple[Tensor, ...]:
    """(out, lse) or (out,) by the definition."""
    out, lse = definition.attend(call_of(_unflatten(flat), need_lse))
    return (out,) if lse is None else (out, lse)


def _flatten(arguments: _Arguments) -> _Arguments:
    numbers = (arguments[place] for place in _NUMBERS)
    return (*(arguments[place] for place in _TENSORS), *numbers, *arguments[_BAND])


def _unflatten(flat: _Arguments) -> _Arguments:
    """The operators' arguments."""
    arguments: list[Any] = [None] * (len(_TENSORS) + len(_NUMBERS) + 1)
    for place, value in zip((*_TENSORS, *_NUMBERS), flat[:-_BAND_LENGTH], strict=True):
        arguments[place] = value
    arguments[_BAND] = list(flat[-_BAND_LENGTH:])
    return tuple(arguments)


def _replace(flat: _Arguments, places: list[int], values: tuple[Any, ...]) -> _Arguments:
    changed = list(flat)
    for place, value in zip(places, values, strict=True):
        changed[place] = value
    return tuple(changed)


def call_of(arguments: _Arguments, needs_lse: bool) -> AttentionCall:
    """The call that the operators' arguments stand for; the inverse of native.py's `_arguments`."""
    query, key, value, scale, softcap, sinks, band, band_rows = arguments[:8]
    rows, intervals, allowed, slopes, distance_values, distance_offset, dense = arguments[8:15]
    dropout_seed, dropout_p = arguments[15:]
    batch, q_heads, q_len, _ = query.shape
    start, band_plan = _band_of(band, band_rows)
    factors = None
    if dropout_seed is not None:
        factors = dropout.factors(dropout_seed, dropout_p, (batch, q_heads, q_len, key.shape[2]))
    plan: MaskPlan = band_plan
    if intervals is not None:
        plan = IntervalsPlan(intervals)
    elif allowed is not None:
        plan = DensePlan(allowed, "given")
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        geometry=Geometry(batch, q_heads, q_len, key.shape[2], query.device),
        plan=plan,
        positions=QueryPositions(start, rows),
        bias=BiasPlan(slopes, distance_values, distance_offset, dense),
        scale=scale,
        softcap=softcap or None,
        sinks=sinks,
        dropout_p=dropout_p,
        needs_lse=needs_lse,
        dropout_factors=factors,
    )


def _band_of(band: list[int], band_rows: Tensor | None) -> tuple[PerBatch, MaskPlan]:
    """(query_start, the band) from the six numbers, of which those per batch stand in band_rows."""
    *numbers, first_within_right, per_batch = band
    rows = iter(()) if band_rows is None else iter(band_rows.unbind())
    values: list[PerBatch] = [
        next(rows) if per_batch >> i & 1 else number for i, number in enumerate(numbers)
    ]
    start, left, right, first_n, key_start, key_end = values

    def bound(side: PerBatch) -> PerBatch | None:
        return None if isinstance(side, int) and side == _ops.UNBOUNDED else side

    plan = BandPlan(
        bound(left), bound(right), first_n, bool(first_within_right), key_start, key_end
    )
    return start, plan
