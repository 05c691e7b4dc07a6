"""The grid of test_attention.py: masks, biases and layouts, each with what it means spelled out.

Every mask comes as a manyheads object together with a bool tensor made here from row and key
numbers, so that the tests check meanings, not one piece of code against itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from oracle import Problem
from torch import Tensor

import manyheads as mh


@dataclass(frozen=True)
class Case:
    """One attention call by names and numbers; `build` makes its tensors."""

    mask: str = "none"
    bias: str = "none"
    heads: tuple[int, int] = (3, 3)  # Hq, Hkv
    sizes: tuple[int, int] = (17, 17)  # D, Dv
    lengths: tuple[int, int] = (29, 37)  # Lq, Lk
    layout: str = "contiguous"
    batch: int = 2
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    query_start: int | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [self.mask, self.bias, "{}x{}".format(*self.heads), "D{}-{}".format(*self.sizes)]
        words += ["L{}-{}".format(*self.lengths), self.layout]
        words += [f"scale{self.scale}"] if self.scale is not None else []
        words += [f"softcap{self.softcap}"] if self.softcap is not None else []
        words += ["sinks"] if self.sinks else []
        words += [f"start{self.query_start}"] if self.query_start is not None else []
        words += [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []
        return ".".join(words)

    @property
    def sdpa_can(self) -> bool:
        return self.softcap is None and not self.sinks and 0 not in (self.batch, *self.lengths)


@dataclass(frozen=True)
class Built:
    """A case's tensors: what the oracle reads, and what `manyheads.attention` is given."""

    problem: Problem
    arguments: dict[str, object]

    def run(self, backend: str | None = None, **more: object):
        problem = self.problem
        given = {**self.arguments, **more, "backend": backend}
        return mh.attention(problem.query, problem.key, problem.value, **given)


def build(case: Case, seed: int = 0, magnitude: float = 1.0) -> Built:
    generator = torch.Generator().manual_seed(seed)
    (q_heads, kv_heads), (q_len, k_len), (size, value_size) = case.heads, case.lengths, case.sizes

    def random(heads: int, length: int, width: int) -> Tensor:
        shape = (case.batch, heads, length, width)
        return LAYOUTS[case.layout](shape, generator).to(case.dtype)

    query = random(q_heads, q_len, size)
    key, value = random(kv_heads, k_len, size), random(kv_heads, k_len, value_size)
    if case.layout != "contiguous" and min(query.shape) > 1:
        assert not query.is_contiguous()
    if magnitude != 1.0:
        query = query * magnitude
    start = k_len - q_len if case.query_start is None else case.query_start
    row = torch.arange(q_len)[:, None]
    mask, allowed, starts = MASKS[case.mask](case, start, row, torch.arange(k_len), generator)
    position = (row + start)[None] if starts is None else row + starts[:, None, None]
    bias, bias_values = BIASES[case.bias](case, torch.arange(k_len) - position, generator)
    sinks = torch.randn(q_heads, generator=generator) if case.sinks else None
    problem = Problem(query, key, value, allowed, bias_values, case.scale, case.softcap, sinks)
    arguments = dict(
        mask=mask,
        attn_bias=bias,
        scale=case.scale,
        softcap=case.softcap,
        sinks=sinks,
        query_start=case.query_start,
    )
    return Built(problem, arguments)


# Layouts: shape [B, H, L, D] -> random numbers of that shape with some strides.


def _contiguous(shape, generator):
    return torch.randn(shape, generator=generator)


def _rows_first(shape, generator):
    """[B, L, H, D] memory, as projections leave it."""
    batch, heads, length, width = shape
    return torch.randn((batch, length, heads, width), generator=generator).transpose(1, 2)


def _expanded(shape, generator):
    return torch.randn((1, 1, *shape[2:]), generator=generator).expand(shape)


def _sliced(shape, generator):
    """A window into a larger tensor on every axis, rows not aligned to anything."""
    larger = torch.randn([n + 3 for n in shape], generator=generator)
    return larger[1:-2, 2:-1, 1:-2, 1:-2]


def _columns_first(shape, generator):
    """The last axis is strided."""
    return torch.randn((*shape[:2], shape[3], shape[2]), generator=generator).mT


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": _contiguous,
    "rows_first": _rows_first,
    "expanded": _expanded,
    "sliced": _sliced,
    "columns_first": _columns_first,
}


# Masks: -> (object, what it allows, the query start of each batch element where it is not `start`).


def _causal(case, start, row, key, generator):
    return mh.Causal(), (key <= row + start)[None, None], None


def _window(case, start, row, key, generator):
    p = row + start
    return mh.Window(5, 2), ((p - 5 <= key) & (key <= p + 2))[None, None], None


def _sink_window(case, start, row, key, generator):
    p = row + start
    allowed = (key <= p) & ((p - 4 <= key) | (key < 2))
    return mh.Causal() & (mh.Window(4, 0) | mh.FirstKeys(2)), allowed[None, None], None


def _prefix(case, start, row, key, generator):
    return mh.Causal() | mh.FirstKeys(3), ((key <= row + start) | (key < 3))[None, None], None


def _lengths(case, start, row, key, generator):
    """Per-batch key lengths; the last query of each batch element stands at its last key."""
    lengths = torch.tensor([len(key), len(key) // 2, 1][: case.batch])
    starts = lengths - len(row) if case.query_start is None else torch.full_like(lengths, start)
    p = row + starts[:, None, None, None]
    allowed = (key < lengths[:, None, None, None]) & (key <= p)
    return mh.Causal() & mh.KeyLengths(lengths), allowed, starts


def _left_padding(case, start, row, key, generator):
    pad = torch.tensor([0, len(key) // 3, len(key)][: case.batch])
    mask = mh.Causal() & mh.KeyRange(pad, len(key))
    return mask, (key >= pad[:, None, None, None]) & (key <= row + start), None


def _outside(case, start, row, key, generator):
    """Everything but a window: two ranges per row."""
    p = row + start
    return ~mh.Window(3, 2), ((key < p - 3) | (key > p + 2))[None, None], None


def _dense(case, start, row, key, generator):
    shape = (case.batch, case.heads[0], len(row), len(key))
    allowed = torch.rand(shape, generator=generator) < 0.6
    allowed[..., : len(row) // 3, :] = False  # rows that may attend to nothing
    return allowed, allowed, None


def _dense_shared(case, start, row, key, generator):
    allowed = torch.rand((len(row), len(key)), generator=generator) < 0.5
    return mh.Dense(allowed), allowed[None, None], None


def _dense_keys(case, start, row, key, generator):
    """A padding mask full of holes: one row of keys for all heads and queries."""
    allowed = torch.rand((case.batch, 1, 1, len(key)), generator=generator) < 0.5
    return allowed, allowed, None


def _dense_rows(case, start, row, key, generator):
    """Whole query rows, by head."""
    allowed = torch.rand((1, case.heads[0], len(row), 1), generator=generator) < 0.7
    return mh.Dense(allowed), allowed, None


def _nothing(case, start, row, key, generator):
    nothing = torch.zeros(1, 1, len(row), len(key), dtype=torch.bool)
    return mh.KeyRange(0, 0), nothing, None


MASKS: dict[str, Callable[..., tuple[object, Tensor | None, Tensor | None]]] = {
    "none": lambda *_: (None, None, None),
    "causal": _causal,
    "window": _window,
    "sink_window": _sink_window,
    "prefix": _prefix,
    "lengths": _lengths,
    "left_padding": _left_padding,
    "outside": _outside,
    "dense": _dense,
    "dense_shared": _dense_shared,
    "nothing": _nothing,
    "dense_rows": _dense_rows,
    "dense_keys": _dense_keys,
}


# Biases: -> (object, its values for ahead = j - p [B|1, Lq, Lk]).


def _alibi(case, ahead, generator):
    slopes = torch.rand(case.heads[0], generator=generator)
    return mh.Alibi(slopes), -slopes.double()[:, None, None] * ahead[:, None].abs()


def _relative(case, ahead, generator):
    """T5's buckets, one-sided: exact up to 4, then logarithmic up to 16."""
    bias = mh.RelativeBias(case.heads[0], num_buckets=8, max_distance=16, bidirectional=False)
    with torch.no_grad():
        bias.table.normal_(generator=generator)
    distance = (-ahead).clamp(min=0)
    growth = torch.log(distance.clamp(min=1) / 4) / math.log(16 / 4) * 4
    bucket = torch.where(distance < 4, distance, (4 + growth.long()).clamp(max=7))
    return bias.requires_grad_(False), bias.table[bucket].permute(0, 3, 1, 2)


def _dense_bias(case, ahead, generator):
    shape = (case.batch, case.heads[0], *case.lengths)
    bias = torch.randn(shape, generator=generator)
    return bias, bias


def _row_bias(case, ahead, generator):
    bias = torch.randn((1, case.heads[0], 1, case.lengths[1]), generator=generator)
    return mh.DenseBias(bias), bias


def _sum(case, ahead, generator):
    (alibi, first), (row, second) = (
        _alibi(case, ahead, generator),
        _row_bias(case, ahead, generator),
    )
    return alibi + row, first + second


BIASES: dict[str, Callable[..., tuple[object, Tensor | None]]] = {
    "none": lambda *_: (None, None),
    "alibi": _alibi,
    "relative": _relative,
    "dense": _dense_bias,
    "row": _row_bias,
    "alibi_and_row": _sum,
}


def grid() -> list[Case]:
    """Every mask with every bias, the other axes in rotation; then each other axis by itself."""
    heads = [(3, 3), (6, 2), (5, 1), (1, 1), (4, 2)]
    sizes = [(17, 17), (64, 64), (1, 3), (80, 80), (3, 197), (128, 128), (192, 64), (256, 256)]
    lengths = [(29, 37), (1, 41), (53, 53), (67, 131), (7, 5), (2, 13), (97, 11)]
    layouts = list(LAYOUTS)
    cases = [
        Case(mask, bias, heads[i % 5], sizes[i % 8], lengths[i % 7], layouts[(i // 2) % 5])
        for i, (mask, bias) in enumerate((m, b) for m in MASKS for b in BIASES)
    ]
    sizes += [(d, d) for d in (1, 2, 3, 15, 16, 33, 96, 112, 160, 197, 255)] + [(64, 1), (1, 256)]
    cases += [Case("causal", heads=h, sizes=s) for h in heads for s in sizes]
    lengths += [(1, 1), (0, 7), (7, 0), (0, 0), (1, 2), (1, 257), (3, 1031), (131, 127), (199, 211)]
    lengths += [(n, n) for n in (2, 3, 8, 15, 16, 17, 31, 47, 48, 49, 63, 64, 65, 128)]
    cases += [
        Case(m, heads=(6, 3), lengths=n) for m in ("none", "causal", "window") for n in lengths
    ]
    cases += [
        Case(m, lengths=n, layout=layout)
        for m in ("causal", "dense")
        for n in [(1, 29), (43, 43)]
        for layout in layouts
    ]
    cases += [
        Case("causal", "alibi", (4, 2), scale=scale, softcap=softcap, sinks=sinks)
        for scale in (None, 0.31, 0.0, -0.7)
        for softcap in (None, 2.5)
        for sinks in (False, True)
    ]
    cases += [Case(m, sinks=True) for m in MASKS] + [Case(m, softcap=1.5) for m in MASKS]
    cases += [
        Case(m, query_start=start)
        for m in ("causal", "window", "prefix")
        for start in (0, -5, 3, 50)
    ]
    cases += [Case("lengths", batch=3), Case("left_padding", batch=3), Case("causal", batch=0)]
    return list(dict.fromkeys(cases))
