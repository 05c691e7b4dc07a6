"""`measure()`: what the weights of one attention call are like, without forming all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from manyheads import masks, positions
from manyheads.errors import ArgumentError, ArgumentTypeError
from manyheads.functional import prepare
from manyheads.inspect import kernels
from manyheads.inspect.blocks import block_bounds, block_of
from manyheads.inspect.measures import Measure
from manyheads.spec import AttentionCall, PerBatch
from manyheads.watching import Run


def measure(
    query: Tensor,
    key: Tensor,
    measures: Iterable[Measure],
    *,
    mask: masks.Mask | Tensor | None = None,
    attn_bias: positions.ScoreBias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_start: PerBatch | None = None,
) -> tuple[Any, ...]:
    """Measures of softmax(bias + softcap(scale Q Kᵀ)), exact, in memory that grows with Lk + Lq.

    On any device, differentiable where the measure is. On the CPU, where no gradient is wanted, our
    kernels measure; elsewhere the weights are formed for a block of query rows at a time, measured
    and dropped (each block is then computed again in the backward pass; torch.func's transforms
    keep them instead). torch.compile leaves its graph here; with fullgraph=True it says so.

    Args:
        query: [B, Hq, Lq, D] or [Hq, Lq, D].
        key: [B, Hkv, Lk, D] or [Hkv, Lk, D].
        measures: what to measure, such as `[Entropy(), TopKeys(8)]`.
        mask: as for `attention`, as all that follow.
        attn_bias: what is added to the scores.
        scale: multiplies the scores; 1 / sqrt(D) by default.
        softcap: c > 0 turns a score s into c * tanh(s / c).
        sinks: [Hq], one extra logit per head that takes part in the softmax.
        query_start: the key position of query row 0.

    Returns:
        One answer for each measure, in order; its documentation gives the shape, whose batch axis
        is there whether or not query and key have one. float32, or float64 for float64 inputs.

    Raises:
        ShapeError, DeviceError, ArgumentError, ArgumentTypeError: an argument has no meaning.

    >>> import torch, manyheads as mh
    >>> query, key = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 5, 16)
    >>> questions = [mh.Entropy(), mh.TopKeys(3)]
    >>> entropy, top = mh.measure(query, key, questions, mask=mh.Causal())
    >>> entropy.shape, top.keys.shape
    (torch.Size([2, 8, 5]), torch.Size([2, 8, 5, 3]))
    """
    if torch.compiler.is_compiling():  # which then goes on without a graph, unless fullgraph=True
        raise ArgumentError(
            "measure() got a call inside a graph of torch.compile, whose questions it cannot hold; "
            "expected one outside of it: leave fullgraph=True out."
        )
    if not isinstance(measures, Iterable):
        raise ArgumentTypeError(
            f"measures is {measures!r}; expected a list, such as [Entropy(), TopKeys(8)]."
        )
    asked = tuple(measures)
    for one in asked:
        if not isinstance(one, Measure):
            raise ArgumentTypeError(
                f"measures holds {one!r}; expected objects such as Entropy() or TopKeys(8)."
            )
    call, _, _ = prepare(
        query, key, key, mask, attn_bias, scale, softcap, sinks, 0.0, query_start, False
    )
    return measure_call(call, asked)


def measure_call(call: AttentionCall, asked: tuple[Measure, ...]) -> tuple[Any, ...]:
    """The answers of `measure` for a call that is prepared already; its value is not read."""
    for one in asked:
        one.check(call)
    ours = kernels.answered_here(call, asked)
    if not ours:
        return _measure_blocks(call, asked)
    return _join(call, asked, ours, kernels.measure(call, ours))


def attend_and_measure(
    run: Run, call: AttentionCall, asked: tuple[Measure, ...]
) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
    """(out, lse, answers): what `run` makes of the call, and `measure_call`, without gradients.

    The native backend is run so that it leaves each row's maximum and sum: measuring then computes
    the scores once more, not twice.
    """
    for one in asked:
        one.check(call)
    ours = kernels.answered_here(call, asked)
    if not ours or not kernels.leaves_stats(run, call):
        return (*run(call), measure_call(call, asked))
    out, lse, answers = kernels.attend_and_measure(call, ours)
    return out, lse, _join(call, asked, ours, answers)


def _join(
    call: AttentionCall,
    asked: tuple[Measure, ...],
    ours: tuple[Measure, ...],
    answers: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Answers to all, in order, given those that the kernels have."""
    others = tuple(one for one in asked if one not in ours)
    pairs = [
        *zip(ours, answers, strict=True),
        *zip(others, _measure_blocks(call, others), strict=True),
    ]
    return tuple(next(answer for other, answer in pairs if other == one) for one in asked)


def _measure_blocks(call: AttentionCall, asked: tuple[Measure, ...]) -> tuple[Any, ...]:
    """What the measures say of themselves, a block of rows at a time."""
    if not asked:
        return ()
    totals: list[Any] = [None] * len(asked)
    # A call without queries still has answers, of no rows.
    for begin, end in tuple(block_bounds(call)) or ((0, 0),):
        parts = _parts(call, asked, begin, end)
        totals = [one.fold(*pair) for one, *pair in zip(asked, totals, parts, strict=True)]
    return tuple(one.finish(total, call) for one, total in zip(asked, totals, strict=True))


def _parts(
    call: AttentionCall, measures: tuple[Measure, ...], begin: int, end: int
) -> list[tuple[Tensor, ...]]:
    """What each measure makes of query rows [begin, end)."""

    def compute() -> list[tuple[Tensor, ...]]:
        block = block_of(call, begin, end)
        return [one.of(block) for one in measures]

    # torch.func's transforms refuse the hooks that checkpointing needs.
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return compute()
    # The graph keeps no block: the backward pass computes each again.
    parts: list[tuple[Tensor, ...]] = checkpoint(
        compute, use_reentrant=False, preserve_rng_state=False
    )
    return parts
