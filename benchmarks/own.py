"""What is measured against ourselves: one call's share of another's time, overhead, memory."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median

import torch
from calls import calls_of
from rows import ROWS, TOLERANCE, Goal, Row
from tasks import attention_task
from torch import Tensor

import manyheads as mh
from manyheads.backends import native
from manyheads.benchmark import Comparison, compare, peak_now
from manyheads.functional import prepare
from manyheads.inspect.functional import attend_and_measure


@dataclass(frozen=True)
class Own:
    """reached: what `Comparison` says, in `unit`; it should be at most `goal`."""

    name: str
    time: Callable[[int, float], Comparison]
    reached: Callable[[Comparison], float]
    unit: str
    goal: float

    def met(self, reached: float) -> bool:
        return reached <= (1 + TOLERANCE) * self.goal


def own_rows(only: str) -> Iterator[Own]:
    """Those whose name contains `only`."""
    for row in (*causal_over_full(), dropout_over_none(), measured_over_plain(), *overhead()):
        if only in row.name:
            yield row


def ratio_to(name: str, row: Row, base: Row, goal: float) -> Own:
    """The time of one call over that of another."""

    def time(pairs: int, patience: float) -> Comparison:
        return compare(
            attention_task(row).ours,
            attention_task(base).ours,
            pairs=pairs,
            check=lambda ours, peer: None,  # they differ by meaning
            limit=peak_now,
            patience=patience,
        )

    return Own(name, time, lambda result: 1 / result.speedup, "of the time", goal)


def causal_over_full() -> Iterator[Own]:
    for length, goal in ((4096, 0.56), (512, 0.65), (256, 0.70)):
        full = Row("", (16, 16), length, 64, Goal())
        name = f"causal over full, 16x{length}x64"
        yield ratio_to(name, replace(full, causal=True), full, goal)


def dropout_over_none() -> Own:
    row = next(row for row in ROWS if row.dropout)
    name = row.name.replace("dropout", "dropout over none,")
    return ratio_to(name, row, replace(row, dropout=0.0), 1.3)


def measured_over_plain() -> Own:
    """A forward pass and what heads attend to, over the pass alone."""
    query, key, value = Row("", (8, 8), 32768, 64, Goal(), causal=True).inputs()
    asked = (mh.Entropy(), mh.TopKeys(8), mh.Received(), mh.HeatMap(256, 256))
    arguments = (query, key, value, mh.Causal(), None, None, None, None, 0.0, None, False)

    def plain() -> Tensor:
        return mh.attention(query, key, value, mask=mh.Causal(), backend="native")

    def measured() -> Tensor:
        return attend_and_measure(native.run, prepare(*arguments)[0], asked)[0]

    def time(pairs: int, patience: float) -> Comparison:
        return compare(
            measured,
            plain,
            pairs=min(pairs, 5),  # seconds each
            check=torch.testing.assert_close,
            limit=peak_now,
            patience=patience,
        )

    name = "entropy, top 8, received and a 256x256 map, causal 8x32768x64"
    return Own(name, time, lambda result: 1 / result.speedup, "of the plain time", 2.0)


def overhead() -> Iterator[Own]:
    """What a call costs that has next to nothing to compute, and how much of that is Python."""
    query, key, value = Row("", (4, 4), 16, 64, Goal(), queries=1).inputs()
    mask = mh.Causal()

    def call() -> Tensor:
        return mh.attention(query, key, value, mask=mask)

    def time(pairs: int, patience: float) -> Comparison:
        operator = torch.ops.manyheads.attention_forward.default
        arguments = calls_of(call)[operator.name()]
        return compare(
            call, lambda: operator(*arguments)[0], pairs=pairs, limit=peak_now, patience=patience
        )

    def over_the_operator(result: Comparison) -> float:
        differences = [ours - bare for ours, bare in zip(result.ours, result.peer, strict=True)]
        return median(differences) * 1e6

    name = "mh.attention at decode size"
    yield Own(f"{name}, in all", time, lambda result: result.ours_seconds * 1e6, "µs", 25)
    yield Own(f"{name}, over the bare operator", time, over_the_operator, "µs", 15)


def extra_memory(length: int) -> float:
    """MB that one causal call of 8 heads of 64 adds to the process beyond inputs and output."""
    # Filled in place: what is freed before would hide what the call takes.
    query, key, value = (torch.empty(1, 8, length, 64).normal_() for _ in range(3))
    small = [x[:, :, :64].contiguous() for x in (query, key, value)]
    mh.attention(*small, mask=mh.Causal())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = mh.attention(query, key, value, mask=mh.Causal())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) / 1024 - out.numel() * out.element_size() / 2**20
