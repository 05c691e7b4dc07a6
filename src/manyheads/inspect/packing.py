"""A page's numbers as text: quantised, deflated, in base64; the viewer's data.js reads them back.

- A map's or a weight's value v becomes round(sqrt(v / top) * levels), with its head's largest value
  as top (1 for heaviest keys): small weights keep their digits beside large ones.
- A strip's value becomes 1 + round((v - low) / (high - low) * (levels - 1)) with its head's least
  and largest; 0 says that there is none.
- `levels` is 2^bits - 1. Numbers of more than 8 bits are stored as planes of bytes, lowest first,
  which deflate makes smaller.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manyheads.inspect.sheets import (
    Floats,
    Heaviest,
    Integers,
    Layer,
    Pooled,
    Sheet,
    Strip,
    coarse_edges,
)

Reference = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How much of what is known a page keeps: bits a number, cells a map's side, bins a strip."""

    bits: int
    cells: int
    bins: int


#: From everything to next to nothing: the first that fits is taken.
FIDELITIES = (
    Fidelity(16, 1 << 30, 1 << 30),
    Fidelity(8, 512, 8192),
    Fidelity(8, 256, 4096),
    Fidelity(8, 192, 2048),
    Fidelity(8, 128, 2048),
    Fidelity(8, 96, 1024),
    Fidelity(8, 64, 1024),
    Fidelity(8, 48, 512),
    Fidelity(8, 32, 256),
    Fidelity(8, 16, 128),
    Fidelity(8, 8, 64),
)


@dataclass
class Packed:
    """Blobs by number, and the lists of edges that maps and strips share."""

    blobs: list[str] = field(default_factory=list)
    edges: list[list[int]] = field(default_factory=list)
    described: int = 0  # bytes of what says where each is
    _known: dict[bytes, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many bytes of a page this takes, near enough."""
        edges = sum(7 * len(edges) for edges in self.edges)
        return self.described + edges + sum(len(blob) + 130 for blob in self.blobs)

    def bytes(self, content: bytes) -> int:
        """The number of a new blob."""
        self.blobs.append(base64.b64encode(zlib.compress(content, 6)).decode())
        return len(self.blobs) - 1

    def numbers(self, values: np.ndarray[Any, Any], bits: int) -> Reference:
        """Unsigned integers below 2^bits."""
        planes = [(values >> shift & 255).astype(np.uint8).tobytes() for shift in range(0, bits, 8)]
        return {"blob": self.bytes(b"".join(planes)), "bits": bits, "shape": list(values.shape)}

    def edge(self, edges: Integers) -> int:
        """The number of a list of edges."""
        content = edges.tobytes()
        if content not in self._known:
            self._known[content] = len(self.edges)
            self.edges.append(edges.tolist())
        return self._known[content]


def pack_layer(packed: Packed, layer: Layer, fidelity: Fidelity) -> Reference:
    """A layer without its heaviest keys."""
    return {
        "name": layer.name,
        "heads": list(layer.heads),
        "maps": [_map(packed, one.coarser(fidelity.cells), fidelity.bits) for one in layer.maps],
        "strips": [_strip(packed, strip, fidelity) for strip in layer.strips],
        "k": 0 if layer.top is None else layer.top.keys.shape[-1],
        "detail": {},
    }


def pack_detail(packed: Packed, top: Heaviest, head: int, keys: int, bits: int) -> Reference:
    """The heaviest keys of every row of one head (its place in the layer)."""
    width = 8 if keys < 255 else 16 if keys < 65535 else 24
    stored = np.where(top.keys[head] < 0, (1 << width) - 1, top.keys[head]).T
    weights = _root(top.weights[head].T, np.float32(1), bits)
    return {"keys": packed.numbers(stored, width), "weights": packed.numbers(weights, bits)}


def sharpness(sheet: Sheet) -> list[tuple[int, int]]:
    """(layer, place of the head) of each head with heaviest keys, sharpest first.

    Sharp: the heaviest key of a row has much weight, as a mean over rows.
    """
    scored = [
        (float(np.nanmean(layer.top.weights[place, :, 0])), -index, -place)
        for index, layer in enumerate(sheet.layers)
        if layer.top is not None
        for place in range(len(layer.heads))
    ]
    return [(-index, -place) for _, index, place in sorted(scored, reverse=True)]


def summaries(layer: Layer) -> Mapping[str, list[float | None]]:
    """The mean over tokens of each strip, by label and head, unrounded."""
    result = {}
    for strip in layer.strips:
        counts = np.isfinite(strip.values).sum(1)
        sums = np.nansum(strip.values.astype(np.float64), axis=1)
        result[strip.label] = [
            float(f"{total / count:.6g}") if count else None
            for total, count in zip(sums, counts, strict=True)
        ]
    return result


def _map(packed: Packed, pooled: Pooled, bits: int) -> Reference:
    tops = pooled.cells.max((1, 2), initial=0)
    cells = _root(pooled.cells, tops[:, None, None], bits)
    return {
        "label": pooled.label,
        "rows": packed.edge(pooled.rows),
        "columns": packed.edge(pooled.columns),
        "tops": [float(f"{top:.7g}") for top in tops],
        "cells": packed.numbers(cells, bits),
    }


def _strip(packed: Packed, strip: Strip, fidelity: Fidelity) -> Reference:
    edges = coarse_edges(np.arange(strip.values.shape[1] + 1), fidelity.bins)
    here = np.isfinite(strip.values)
    sums = np.add.reduceat(np.where(here, strip.values, 0), edges[:-1], axis=1, dtype=np.float64)
    counts = np.add.reduceat(here.astype(np.int64), edges[:-1], axis=1)
    # A mean over the tokens that have a value; of mass received, over all of them.
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    known = np.where(counts > 0, means, np.inf).min(1, initial=np.inf)
    low = np.where(np.isfinite(known), known, 0.0)
    high = np.maximum(np.where(counts > 0, means, -np.inf).max(1, initial=-np.inf), low)
    span = np.where(high > low, high - low, 1.0)
    levels = (1 << fidelity.bits) - 2
    codes = 1 + np.rint((np.nan_to_num(means) - low[:, None]) / span[:, None] * levels)
    codes = np.where(counts > 0, codes, 0).astype(np.int64)
    return {
        "label": strip.label,
        "unit": strip.unit,
        "axis": strip.axis,
        "edges": packed.edge(edges),
        "low": [float(f"{x:.7g}") for x in low],
        "high": [float(f"{x:.7g}") for x in high],
        "values": packed.numbers(codes, fidelity.bits),
    }


def _root(values: Floats, top: Any, bits: int) -> Integers:
    levels = (1 << bits) - 1
    share = np.clip(np.nan_to_num(values), 0, None) / np.where(top > 0, top, 1)
    codes: Integers = np.rint(np.sqrt(share) * levels).clip(0, levels).astype(np.int64)
    return codes
