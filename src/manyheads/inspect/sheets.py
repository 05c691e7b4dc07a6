"""From what was observed to what a page shows: plain numpy arrays, one sheet for each input.

A layer that was called several times while a text was generated is joined into one: its rows follow
each other. Where a call begins again at an earlier position, it is a pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from manyheads.arguments import whole_number
from manyheads.errors import ArgumentError, ArgumentTypeError
from manyheads.inspect.measures import (
    Entropy,
    FirstKeysMass,
    HeatMap,
    LogSumExp,
    MaxLogit,
    MeanDistance,
    Measure,
    OffsetMass,
    Received,
    TopKeys,
)
from manyheads.inspect.records import Record, Seen

Floats = np.ndarray[Any, np.dtype[np.float32]]
Integers = np.ndarray[Any, np.dtype[np.int64]]

#: What a page can show of a record, said in errors.
SHOWN = "HeatMap, TopKeys, Entropy, MeanDistance, FirstKeysMass, OffsetMass, MaxLogit, LogSumExp"
SHOWN += " or Received"
#: Cells a side of a map that is made from heaviest keys, where no map was asked for.
_CELLS_FROM_KEYS = 256


@dataclass(frozen=True, slots=True)
class Pooled:
    """A map of each head. Cell (r, c) is what a query of its row puts on the keys of its column.

    cells: [H, R, C], means over the row's queries. rows: [R + 1], columns: [C + 1]: where each cell
    begins, on the query rows and on the keys.
    """

    label: str
    cells: Floats
    rows: Integers
    columns: Integers

    def resampled(self, rows: Integers, columns: Integers) -> Pooled:
        """The same on other cells: exact where they begin where these do.

        Elsewhere a cell's mass is taken to lie evenly on its keys.
        """
        shared_rows = _shared(rows, self.rows) / np.maximum(np.diff(rows), 1)[:, None]
        shared_columns = _shared(self.columns, columns) / np.diff(self.columns)[:, None]
        cells = (shared_rows @ self.cells @ shared_columns).astype(np.float32)
        return replace(self, cells=cells, rows=rows, columns=columns)

    def cut(self, keys: int) -> Pooled:
        """Without the columns from `keys` on, which must have no mass."""
        if self.columns[-1] <= keys:
            return self
        count = int(np.searchsorted(self.columns, keys))
        columns = np.append(self.columns[:count], keys)
        return replace(self, cells=self.cells[:, :, :count], columns=columns)

    def coarser(self, cells: int) -> Pooled:
        """With at most so many cells a side, exactly."""
        rows, columns = coarse_edges(self.rows, cells), coarse_edges(self.columns, cells)
        if len(rows) == len(self.rows) and len(columns) == len(self.columns):
            return self
        return self.resampled(rows, columns)


@dataclass(frozen=True, slots=True)
class Strip:
    """One number per token and head: values [H, n], NaN where there is none."""

    label: str
    unit: str
    axis: Literal["query", "key"]
    values: Floats


@dataclass(frozen=True, slots=True)
class Heaviest:
    """Each row's heaviest keys: weights and keys [H, Lq, k], key -1 where a row has fewer."""

    weights: Floats
    keys: Integers


@dataclass(frozen=True, slots=True)
class Layer:
    """What is known of one layer; every array begins with its heads.

    calls: (layer, step) of each record that it was made of.
    """

    name: str
    heads: tuple[int, ...]
    maps: tuple[Pooled, ...]
    strips: tuple[Strip, ...]
    top: Heaviest | None
    calls: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """One input: its text and its layers.

    key_tokens: the keys' text. query_tokens: the queries' own, None where they are keys too: then
    query row r is key positions[r].
    """

    key_tokens: tuple[str, ...]
    query_tokens: tuple[str, ...] | None
    positions: Integers
    layers: tuple[Layer, ...]


def sheet_of(
    seen: Seen, tokens: Sequence[str], key_tokens: Sequence[str] | None, batch: int
) -> Sheet:
    """Everything about one batch element that a page can show."""
    tokens = text_of(tokens, "tokens")
    keys = None if key_tokens is None else text_of(key_tokens, "key_tokens")
    layers: list[Layer] = []
    positions: Integers | None = None
    for name in seen.layers:
        passes = _passes(seen[name], batch, joined=keys is not None)
        for number, records in enumerate(passes):
            if not any(record.query_length for record in records):
                continue
            here = np.concatenate([_positions(record, batch) for record in records])
            _check_tokens(name, tokens, keys, records, here)
            if positions is None:
                positions = here
            elif not np.array_equal(positions, here):
                raise ArgumentError(
                    f"layers look at different queries: got {len(positions)} in "
                    f"{layers[0].name!r} and {len(here)} in {name!r}; expected the same in all; "
                    "choose layers of one kind with observe(..., layers=...)"
                )
            label = name if len(passes) == 1 else f"{name}, call {number + 1}"
            layers.append(_layer(label, records, batch, len(tokens if keys is None else keys)))
    if positions is None:
        raise ArgumentError(
            "nothing was observed: got a record without attention calls; expected at least one "
            "query in one layer; call the model inside `with mh.observe(...) as seen:`"
        )
    layers = [layer for layer in layers if layer.maps or layer.strips]
    if not layers:
        measured = sorted({repr(m) for name in seen.layers for r in seen[name] for m in r.measures})
        raise ArgumentError(
            f"nothing in this record can be shown: got {', '.join(measured) or 'no measures'}; "
            f"expected {SHOWN} among them; ask observe for one, such as "
            "mh.observe(model, mh.HeatMap(64, 64), mh.TopKeys(8), mh.Entropy())"
        )
    if keys is None:
        return Sheet(tokens, None, positions, tuple(layers))
    return Sheet(keys, tokens, positions, tuple(layers))


def layers_of(seen: Seen, batch: int) -> list[Layer]:
    """The layers alone, for what shows no text."""
    passes = [(name, _passes(seen[name], batch, joined=False)) for name in seen.layers]
    return [
        _layer(
            name if len(runs) == 1 else f"{name}, call {number + 1}",
            records,
            batch,
            max(map(_keys, records)),
        )
        for name, runs in passes
        for number, records in enumerate(runs)
    ]


def text_of(tokens: Any, name: str) -> tuple[str, ...]:
    """`tokens` as strings, one for each token."""
    fix = "give one string per token, such as tokenizer.batch_decode([[t] for t in ids])"
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise ArgumentTypeError(
            f"{name} is no list of tokens: got {type(tokens).__name__}; expected strings; {fix}"
        )
    text = tuple(tokens)
    for token in text:
        if not isinstance(token, str):
            raise ArgumentTypeError(
                f"{name} holds {token!r} ({type(token).__name__}); expected strings; {fix}"
            )
    return text


def coarse_edges(edges: Integers, cells: int) -> Integers:
    """At most `cells` cells made of whole ones."""
    count = len(edges) - 1
    if count <= cells:
        return edges
    return edges[-(-np.arange(cells + 1) * count // cells)]


def _passes(records: Sequence[Record], batch: int, joined: bool) -> list[list[Record]]:
    """Runs of calls whose positions go on; queries with a text of their own are one run."""
    passes: list[list[Record]] = []
    last = -1
    for record in records:
        here = _positions(record, batch)
        if not passes or (not joined and len(here) and here[0] <= last):
            passes.append([])
        passes[-1].append(record)
        last = int(here[-1]) if len(here) else last
    return passes


def _positions(record: Record, batch: int) -> Integers:
    positions = record.positions
    if positions.shape[0] == 1:
        return _array(positions[0]).astype(np.int64)
    if not 0 <= whole_number(batch, "batch") < positions.shape[0]:
        raise ArgumentError(_no_batch(batch, positions.shape[0]))
    return _array(positions[batch]).astype(np.int64)


def _keys(record: Record) -> int:
    """How many keys are there, a static cache's empty slots aside."""
    return record.key_length if record.filled is None else record.filled


def _no_batch(batch: int, size: int) -> str:
    return (
        f"there is no such batch element: got batch={batch}; expected 0 <= batch < {size}; "
        "choose one that was observed"
    )


def _check_tokens(
    layer: str,
    tokens: tuple[str, ...],
    key_tokens: tuple[str, ...] | None,
    records: list[Record],
    positions: Integers,
) -> None:
    """Raise unless every query and every key has its token."""
    keys = max(map(_keys, records))
    # Whoever has a text for a cache's empty slots too may give it.
    all_keys = {keys, max(record.key_length for record in records)}
    if key_tokens is not None:
        for name, text, counts, what in (
            ("tokens", tokens, {len(positions)}, "queries"),
            ("key_tokens", key_tokens, all_keys, "keys"),
        ):
            if len(text) not in counts:
                count = min(counts)
                raise ArgumentError(
                    f"wrong number of {name}: got {len(text)}; expected {count}, the {what} of "
                    f"{layer!r}; give one string for each of them"
                )
        return
    if len(tokens) not in all_keys:
        raise ArgumentError(
            f"wrong number of tokens: got {len(tokens)}; expected {keys}, the keys of {layer!r}; "
            "give one string for each token that the model was given (the last one that generate() "
            "returns was never given to it), key_tokens too if queries and keys are two texts, or "
            "choose layers of one kind with observe(..., layers=...)"
        )
    if positions.min() < 0 or positions.max() >= keys:
        raise ArgumentError(
            f"queries of {layer!r} stand outside its keys: got positions {positions.min()} to "
            f"{positions.max()}; expected 0 to {keys - 1}; give the queries' text as tokens and "
            "the keys' as key_tokens"
        )


def _layer(name: str, records: list[Record], batch: int, keys: int) -> Layer:
    """All that the records of one pass say of the first keys, joined along the queries."""
    heads = tuple(records[0].heads)
    maps, strips, top = [], [], None
    for measure in records[0].measures:
        answers = [_of_batch(record[measure], batch) for record in records]
        if isinstance(measure, HeatMap):
            if len(records) == 1 or (measure.queries is None and measure.keys is None):
                maps.append(_joined_maps(measure, records, answers, keys))
        elif isinstance(measure, TopKeys):
            if top is None or measure.k > top.keys.shape[-1]:
                weights = np.concatenate([weights for weights, _ in answers], axis=1)
                top = Heaviest(weights, np.concatenate([keys for _, keys in answers], axis=1))
        elif isinstance(measure, Received):
            strips.append(Strip(*_name_of(measure), "key", _summed(answers, keys)))
        elif _name_of(measure)[0]:
            values = np.concatenate(answers, axis=1)
            values = np.where(np.isfinite(values), values, np.float32(np.nan))
            strips.append(Strip(*_name_of(measure), "query", values))
    maps = [one for one in (one.cut(keys) for one in maps) if one.cells.size]
    strips = [one for one in strips if one.values.size]
    # The whole first, then the closer looks.
    maps.sort(key=lambda one: -int(one.rows[-1] - one.rows[0]) * int(one.columns[-1]))
    if top is not None and top.keys.size and not maps:
        maps.append(_map_of(top, keys))
    calls = tuple((record.layer, record.step) for record in records)
    return Layer(name, heads, tuple(maps), tuple(strips), top, calls)


def _name_of(measure: Measure) -> tuple[str, str]:
    """(label, unit) of a number per token; no label for what is none."""
    match measure:
        case Entropy():
            return "entropy", "nats"
        case MeanDistance():
            return "mean distance", "tokens"
        case MaxLogit():
            return "largest logit", ""
        case LogSumExp():
            return "log-sum-exp", ""
        case FirstKeysMass(n=n):
            return f"mass on the first {n} keys" if n > 1 else "mass on the first key", "of 1"
        case OffsetMass(offset=offset):
            names = {-1: "the previous token", 0: "the token itself", 1: "the next token"}
            return f"mass on {names.get(offset, f'the token at {offset:+d}')}", "of 1"
        case Received(last=last):
            part = "" if last is None else f" from the last {last} queries"
            return f"received{part}", "sum of weights"
    return "", ""


def _joined_maps(
    measure: HeatMap, records: list[Record], answers: list[Floats], keys: int
) -> Pooled:
    """One map of all rows; a later call sees more keys, so earlier columns are laid on its own."""
    begin, parts = 0, []
    for record, cells in zip(records, answers, strict=True):
        rows = _edges(measure.queries or (0, record.query_length), measure.rows)
        columns = _edges(measure.keys or (0, record.key_length), measure.columns)
        parts.append(Pooled("", cells, rows + begin, columns))
        begin += record.query_length
    label = "pooled attention" if measure.queries is measure.keys is None else "a closer look"
    if len(parts) == 1:
        return replace(parts[0], label=label)
    longest = max(records, key=lambda record: record.key_length)
    columns = _edges((0, longest.key_length), measure.columns)
    laid = [part.resampled(part.rows, columns).cells for part in parts if part.cells.size]
    rows = np.unique(np.concatenate([part.rows for part in parts]))
    return Pooled(label, np.concatenate(laid, axis=1), rows, columns)


def _map_of(top: Heaviest, keys: int) -> Pooled:
    """The weight that is known of, pooled: that of the heaviest keys alone."""
    heads, queries, k = top.keys.shape
    rows = _edges((0, queries), _CELLS_FROM_KEYS)
    columns = _edges((0, keys), _CELLS_FROM_KEYS)
    cells = np.zeros((heads, len(rows) - 1, len(columns) - 1), np.float32)
    row = np.searchsorted(rows, np.arange(queries), side="right") - 1
    column = np.searchsorted(columns, top.keys.clip(0), side="right") - 1
    weights = np.where(top.keys >= 0, top.weights, 0) / np.diff(rows)[row][None, :, None]
    np.add.at(cells, (np.arange(heads)[:, None, None], row[None, :, None], column), weights)
    return Pooled(f"attention to the {k} heaviest keys", cells, rows, columns)


def _edges(view: tuple[int, int], cells: int) -> Integers:
    """Where HeatMap's cells begin, and the end: index i of n falls into cell i * cells // n."""
    begin, end = view
    count = min(cells, end - begin)
    return begin - (-np.arange(count + 1, dtype=np.int64) * (end - begin) // max(count, 1))


def _shared(these: Integers, those: Integers) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[these, those]: how many indices two cells have in common."""
    low = np.maximum(these[:-1, None], those[None, :-1])
    high = np.minimum(these[1:, None], those[None, 1:])
    shared: np.ndarray[Any, np.dtype[np.float64]] = np.clip(high - low, 0, None).astype(float)
    return shared


def _summed(answers: list[Floats], keys: int) -> Floats:
    total = np.zeros((answers[0].shape[0], keys), np.float32)
    for answer in answers:
        total[:, : answer.shape[1]] += answer[:, :keys]
    return total


def _of_batch(answer: Any, batch: int) -> Any:
    """The batch element's part of a tensor, or of a tuple of tensors, as numpy arrays."""
    if not isinstance(answer, Tensor):
        return tuple(_of_batch(part, batch) for part in answer)
    if not 0 <= whole_number(batch, "batch") < answer.shape[0]:
        raise ArgumentError(_no_batch(batch, answer.shape[0]))
    return _array(answer[batch])


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    values = tensor.detach().cpu()
    return (values.float() if values.dtype.is_floating_point else values).numpy()
