"""Timing two ways of computing the same thing, fairly: the one place where this project times.

The two are checked against each other first, then run in turn, pair by pair, in one process, so
that whatever else the machine does falls on both. What is reported is the ratio inside each pair
and its spread; medians of separate runs are not compared.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from manyheads import _ops
from manyheads.errors import ManyHeadsError
from manyheads.functional import attention
from manyheads.masks import Causal, Mask, Window

#: More than this share of one core taken by others, and a timing is not called quiet.
QUIET_LIMIT = 0.05

#: A pair counts as undisturbed while the machine's limit stands above this share of its best.
QUIET_SHARE = 0.95

#: One sample lasts at least this long; shorter calls are repeated inside it.
SHORTEST_SAMPLE_SECONDS = 0.02


class DisagreementError(ManyHeadsError, AssertionError):
    """The two things to be timed do not compute the same."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` measured: seconds per call of both sides, pair by pair.

    others: the share of one core that other processes (and the hypervisor) took from our cores
        meanwhile; None where the system does not tell.
    limits: the machine's limit, measured beside each pair; empty if it was not asked for.
    disturbed: how many pairs were left out because the limit had dropped or the peer had slowed
        down meanwhile: a neighbour on the same physical cores, whom nothing else here shows. None
        if there were too few others, and all pairs are kept.
    """

    ours: tuple[float, ...]
    peer: tuple[float, ...]
    others: float | None
    limits: tuple[float, ...] = ()
    disturbed: int | None = 0

    @property
    def ratios(self) -> tuple[float, ...]:
        """Peer time over our time, per pair: above 1 means ours is faster."""
        return tuple(peer / ours for ours, peer in zip(self.ours, self.peer, strict=True))

    @property
    def speedup(self) -> float:
        """The median of the per-pair ratios."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest per-pair ratio."""
        return min(self.ratios), max(self.ratios)

    @property
    def ours_seconds(self) -> float:
        """Our median time per call."""
        return statistics.median(self.ours)

    @property
    def peer_seconds(self) -> float:
        """The peer's median time per call."""
        return statistics.median(self.peer)

    def share_of_limit(self, work: float) -> float:
        """The median over the pairs of our rate, `work` a call, over the limit beside it."""
        rates = (work / seconds for seconds in self.ours)
        return statistics.median(
            rate / limit for rate, limit in zip(rates, self.limits, strict=True)
        )

    @property
    def quiet(self) -> bool | None:
        """Whether the machine was left to us; None where the system does not tell."""
        if self.disturbed is None:
            return False
        return None if self.others is None else self.others <= QUIET_LIMIT


@runtime_checkable
class TimesItself(Protocol):
    """A side of `compare` that runs elsewhere, in another process, and is timed there."""

    def __call__(self) -> Any:
        """The result, to be checked."""

    def seconds_per_call(self, count: int) -> float:
        """Run it so many times and return the mean duration."""


def compare(
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    pairs: int = 7,
    warmup: int = 2,
    check: Callable[[Any, Any], None] | None = None,
    limit: Callable[[], float] | None = None,
    patience: float = 0.0,
) -> Comparison:
    """Time two zero-argument callables in turn, after checking that they agree.

    peer: may be a `TimesItself`; what that takes counts as taken by others.
    check: called with both results, raises if they differ; default `check_close`.
    limit: measures what the machine can do at best (work a second), just before and after our side
        of each pair; the two are averaged. With it, pairs during which it stood below 95 % of the
        best seen, or the peer took over 1.05 times its shortest, are left out: whether a pair
        counts never depends on our own time.
    patience: seconds to go on for, at most, until there are `pairs` such pairs.

    >>> x = torch.ones(64)
    >>> result = compare(lambda: x * 2, lambda: x + x, pairs=3)
    >>> len(result.ratios), result.spread[0] <= result.speedup <= result.spread[1]
    (3, True)
    """
    (check or check_close)(ours(), peer())
    for _ in range(warmup):
        ours()
        peer()
    calls = _calls_per_sample(ours), _calls_per_sample(peer)
    samples: list[_Pair] = []
    quiet: list[_Pair] = []
    watch = BusyWatch()
    deadline = time.perf_counter() + patience
    while len(samples) < pairs or (len(quiet) < pairs and time.perf_counter() < deadline):
        # Whoever goes second finds the caches as the other left them, so the order alternates.
        peer_time = _seconds_per_call(peer, calls[1]) if len(samples) % 2 else None
        before = limit() if limit else 1.0
        our_time = _seconds_per_call(ours, calls[0])
        after = limit() if limit else 1.0
        if peer_time is None:
            peer_time = _seconds_per_call(peer, calls[1])
        samples.append(_Pair(our_time, peer_time, min(before, after), (before + after) / 2))
        best = max(pair.lowest_limit for pair in samples)
        fastest = min(pair.peer for pair in samples)
        quiet = [
            pair
            for pair in samples
            if pair.lowest_limit >= QUIET_SHARE * best
            and (not limit or fastest >= QUIET_SHARE * pair.peer)
        ]
    enough = len(quiet) >= min(pairs, 5)
    kept = quiet if enough else samples
    return Comparison(
        tuple(pair.ours for pair in kept),
        tuple(pair.peer for pair in kept),
        watch.others(),
        tuple(pair.limit for pair in kept) if limit else (),
        len(samples) - len(quiet) if enough else None,
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    """Seconds of both sides, and the limit around our side: the lower value and the mean."""

    ours: float
    peer: float
    lowest_limit: float
    limit: float


def check_close(ours: Any, peer: Any, tolerance: float = 1e-4) -> None:
    """Raise DisagreementError unless two tensors agree to `tolerance` of the largest value."""
    if not (isinstance(ours, Tensor) and isinstance(peer, Tensor)):
        return
    if ours.shape != peer.shape:
        raise DisagreementError(
            f"the two sides differ in shape: {tuple(ours.shape)} and {tuple(peer.shape)}."
        )
    difference = (ours.double() - peer.double()).abs().max().item() if ours.numel() else 0.0
    limit = tolerance * (peer.double().abs().max().item() if peer.numel() else 1.0)
    if not difference <= limit:  # also catches NaN
        raise DisagreementError(
            f"the two sides differ by up to {difference:.3g}, expected at most {limit:.3g}; "
            "a timing of different results means nothing."
        )


def attention_flops(batch: int, heads: int, pairs: int, head_dim: int, value_dim: int) -> int:
    """Useful operations of one attention: a multiply and an add per pair, in Q K^T and in P V.

    pairs: how many (query, key) pairs one head may attend to; L * (L + 1) / 2 when causal.

    >>> attention_flops(batch=1, heads=2, pairs=10, head_dim=3, value_dim=5)
    320
    """
    return 2 * batch * heads * pairs * (head_dim + value_dim)


def fma_peak(seconds: float = 0.3, dtype: torch.dtype = torch.float32) -> float | None:
    """The machine's multiply-add rate in GFLOP/s, measured now on the threads in use.

    dtype: one that our kernels have instructions for (`pair_unit`) for the products of its pairs,
        summed in float32; all others mean float32.

    None when the native library is not there to measure it.
    """
    try:
        return float(torch.ops.manyheads.fma_peak(seconds, pair_unit(dtype) is not None))
    except (AttributeError, RuntimeError):
        return None


#: ISA -> its instructions for products of pairs, by dtype.
_PAIR_UNITS = {
    "amx_fp16": {torch.bfloat16: "AMX's tdpbf16ps", torch.float16: "AMX's tdpfp16ps"},
    "amx": {torch.bfloat16: "AMX's tdpbf16ps"},
    "avx512_bf16": {torch.bfloat16: "AVX512-BF16's vdpbf16ps"},
}


def pair_unit(dtype: torch.dtype) -> str | None:
    """What multiplies pairs of this dtype in the kernels in use; None if they widen to float32."""
    return _PAIR_UNITS.get(_ops.cpu_kernels().name or "", {}).get(dtype)


def peak_now(dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of multiply-adds on all threads, at the clock of this moment; or NaN.

    This is the limit to give `compare`. It lasts one millisecond: a loop of multiply-adds on
    registers alone draws less power than anything that reads memory, and where power limits the
    clock it climbs, in a longer one, well above what any kernel gets.
    """
    return (fma_peak(0.001, dtype) or math.nan) * 1e9


def read_rate(*tensors: Tensor) -> float:
    """Bytes a second at which all threads read these contiguous tensors, one after another.

    The limit to give `compare` for what does little but read them.
    """
    words = [tensor.detach().flatten().view(torch.float32) for tensor in tensors]
    rates = [torch.ops.manyheads.read_rate(w) for w in words]
    sizes = [w.numel() * 4 for w in words]
    return float(sum(sizes) / sum(n / rate for n, rate in zip(sizes, rates, strict=True)))


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """One shape to time: queries as long as keys, random float32, causal unless `window` says more.

    window: how many keys a query sees, itself included; None for all the keys before it.
    """

    name: str
    q_heads: int
    kv_heads: int
    length: int
    head_dim: int
    batch: int = 1
    causal: bool = True
    window: int | None = None

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """query, key, value; the same on every call."""
        random = torch.Generator().manual_seed(0)
        heads = (self.q_heads, self.kv_heads, self.kv_heads)
        query, key, value = (
            torch.randn(self.batch, h, self.length, self.head_dim, generator=random) for h in heads
        )
        return query, key, value

    def mask(self) -> Mask | None:
        """The case's mask; None for all keys."""
        if not self.causal:
            return None
        return Causal() if self.window is None else Causal() & Window(self.window - 1, 0)

    @property
    def flops(self) -> int:
        """The useful operations: only pairs that the mask allows count."""
        length, window = self.length, self.window or self.length
        pairs = length * window - window * (window - 1) // 2 if self.causal else length * length
        return attention_flops(self.batch, self.q_heads, pairs, self.head_dim, self.head_dim)


def against_sdpa(case: AttentionCase, pairs: int = 7) -> Comparison:
    """Our attention and PyTorch's on the same inputs; PyTorch gets its best form of the mask.

    The limit measured beside each pair is the FMA peak, in operations a second.
    """
    query, key, value = case.inputs()
    mask = case.mask()
    dense = None
    if case.window is not None and mask is not None:
        dense = mask.materialize(case.length, case.length)
    grouped = case.q_heads != case.kv_heads
    is_causal = case.causal and dense is None
    return compare(
        lambda: attention(query, key, value, mask=mask),
        lambda: scaled_dot_product_attention(
            query, key, value, attn_mask=dense, is_causal=is_causal, enable_gqa=grouped
        ),
        pairs=pairs,
        limit=None if math.isnan(peak_now()) else peak_now,
    )


class BusyWatch:
    """How much of our cores others use between its creation and `others()`.

    Linux counts each core's busy time in hundredths of a second; what this process used itself is
    taken off. Time stolen by a hypervisor counts as others'.
    """

    def __init__(self) -> None:
        self._start = self._read()

    def others(self) -> float | None:
        """Cores' worth of time taken by others since the start; None where it cannot be told."""
        end = self._read()
        if self._start is None or end is None:
            return None
        elapsed, busy, own = (b - a for a, b in zip(self._start, end, strict=True))
        if elapsed <= 0:
            return None
        return max(0.0, busy - own) / elapsed

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """(wall, busy on our cores, used by us), in seconds."""
        try:
            lines = Path("/proc/stat").read_text().splitlines()
            cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
            tick = os.sysconf("SC_CLK_TCK")
        except (OSError, AttributeError, ValueError):
            return None
        busy = 0
        for name, *fields in (line.split() for line in lines):
            if name in cores:
                user, nice, system, _idle, _iowait, irq, soft_irq, steal = map(int, fields[:8])
                busy += user + nice + system + irq + soft_irq + steal
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return time.perf_counter(), busy / tick, own


def _calls_per_sample(run: Callable[[], Any]) -> int:
    return max(1, round(SHORTEST_SAMPLE_SECONDS / max(_seconds_per_call(run, 1), 1e-7)))


def _seconds_per_call(run: Callable[[], Any], count: int) -> float:
    if isinstance(run, TimesItself):
        return run.seconds_per_call(count)
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count
