"""Exact answers about parts of what was observed, from the queries and keys that were kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manyheads.errors import ArgumentError
from manyheads.inspect.functional import measure_call
from manyheads.inspect.keeping import Kept
from manyheads.inspect.measures import HeatMap, WeightRows
from manyheads.inspect.records import Seen
from manyheads.inspect.sheets import Floats, Sheet
from manyheads.spec import AttentionCall

#: The most cells a side of one answer.
MOST_CELLS = 1024


class Exact:
    """Weights of any part of a page's inputs, computed when they are asked for.

    inputs: (record with its queries and keys, its sheet) of each input. Layers and inputs are
    numbered as on the page, heads as in the model.

    Raises:
        ArgumentError: queries and keys were not kept, or a layer was called step by step.
    """

    def __init__(self, inputs: Sequence[tuple[Seen, Sheet]], batch: int) -> None:
        self._batch = batch
        self._sheets = [sheet for _, sheet in inputs]
        self._kept = [_kept(seen, sheet) for seen, sheet in inputs]

    @property
    def size(self) -> int:
        """Bytes of all queries and keys."""
        return sum(kept.size for kept in self._kept)

    def zoom(
        self,
        which: int,
        layer: int,
        head: int,
        queries: tuple[int, int],
        keys: tuple[int, int],
        cells: tuple[int, int],
    ) -> Floats:
        """`HeatMap` of a window [begin, end) of queries and keys, at most `cells`: [rows, columns].

        With as many cells as there are queries and keys, the weights themselves.
        """
        sheet = self._sheet(which, layer, head)
        for name, (begin, end), length in (
            ("queries", queries, len(sheet.positions)),
            ("keys", keys, len(sheet.key_tokens)),
        ):
            if not 0 <= begin < end <= length:
                raise ArgumentError(
                    f"{name} are not there: got {begin},{end}; expected begin,end with "
                    f"0 <= begin < end <= {length}"
                )
        for name, count in zip(("rows", "columns"), cells, strict=True):
            _check(count, name, 1, MOST_CELLS)
        return self._map(which, layer, head, queries, HeatMap(*cells, keys=keys))

    def row(self, which: int, layer: int, head: int, row: int) -> Floats:
        """What one query gives to each key: [Lk]."""
        sheet = self._sheet(which, layer, head)
        _check(row, "row", 0, len(sheet.positions) - 1)
        call = self._part(which, layer, head, (row, row + 1))
        with torch.no_grad():
            (weights,) = measure_call(call, (WeightRows((0,)),))
        kept: Floats = weights[0, 0, 0, : len(sheet.key_tokens)].float().numpy()
        return kept

    def column(self, which: int, layer: int, head: int, key: int) -> Floats:
        """What each query gives to one key: [Lq]. All rows have to be summed for it."""
        sheet = self._sheet(which, layer, head)
        _check(key, "key", 0, len(sheet.key_tokens) - 1)
        queries = 0, len(sheet.positions)
        one = HeatMap(queries[1], 1, keys=(key, key + 1))
        return self._map(which, layer, head, queries, one)[:, 0]

    def _map(
        self, which: int, layer: int, head: int, queries: tuple[int, int], asked: HeatMap
    ) -> Floats:
        call = self._part(which, layer, head, queries)
        with torch.no_grad():
            (cells,) = measure_call(call, (asked,))
        found: Floats = cells[0, 0].float().numpy()
        return found

    def _part(self, which: int, layer: int, head: int, rows: tuple[int, int]) -> AttentionCall:
        ((name, step),) = self._sheets[which].layers[layer].calls
        return self._kept[which].part(name, step, self._batch, head, rows)

    def _sheet(self, which: int, layer: int, head: int) -> Sheet:
        """The input's sheet, if it has this head."""
        _check(which, "input", 0, len(self._sheets) - 1)
        sheet = self._sheets[which]
        _check(layer, "layer", 0, len(sheet.layers) - 1)
        heads = sheet.layers[layer].heads
        if head not in heads:
            raise ArgumentError(
                f"head is not there: got {head}; expected one of {list(heads)}, those of "
                f"{sheet.layers[layer].name!r}"
            )
        return sheet


def _check(number: int, name: str, low: int, high: int) -> None:
    if not low <= number <= high:
        raise ArgumentError(f"{name} is not there: got {number}; expected {low} to {high}")


def _kept(seen: Seen, sheet: Sheet) -> Kept:
    """The record's queries and keys, if they are there for all of the sheet."""
    if seen.kept is None:
        raise ArgumentError(
            "there is nothing to compute from: got a record without queries and keys; expected "
            "one that keeps them; ask for it, as in mh.observe(model, ..., keep_megabytes=2000)"
        )
    for layer in sheet.layers:
        if len(layer.calls) != 1:
            raise ArgumentError(
                f"{layer.name!r} cannot be computed again: got {len(layer.calls)} calls, as "
                "generating makes them; expected one of all tokens; call model(ids) on what "
                "generate() returned, without the last token"
            )
        if layer.calls[0] not in seen.kept:
            raise ArgumentError(
                f"the queries and keys of {layer.name!r} are not there: got a record put together "
                "of others; expected the Seen of one mh.observe(..., keep_megabytes=...)"
            )
    return seen.kept
