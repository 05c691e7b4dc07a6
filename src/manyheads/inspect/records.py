"""`Seen` and `Record`: what `observe` saw of a model's attention layers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from manyheads.errors import ArgumentTypeError, NotRecordedError
from manyheads.inspect import storage
from manyheads.inspect.keeping import Kept
from manyheads.inspect.measures import Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Record:
    """What was measured in one attention call of one layer.

    layer: the module's path in the model.
    step: which of the layer's calls this is, from 0.
    heads: the query heads that the answers' head axis stands for.
    query_length, key_length: Lq and Lk. Keys count with what a cache holds; a static cache's with
        the slots that are still empty, which nobody may attend to.
    filled: how many keys there are before those slots; None: there are none of them.
    positions: int64 [B|1, Lq], where each query row stands on the key axis.
    measures: what was asked.
    answers: the answer to each, as `measure` documents it; `record[Entropy()]` looks one up.
    """

    layer: str
    step: int
    heads: tuple[int, ...]
    query_length: int
    key_length: int
    positions: Tensor
    measures: tuple[Measure, ...]
    answers: tuple[Any, ...]
    filled: int | None = None

    def __getitem__(self, measure: Measure) -> Any:
        for asked, answer in zip(self.measures, self.answers, strict=True):
            if asked == measure:
                return answer
        raise NotRecordedError(
            f"{measure!r} was not asked of layer {self.layer!r}; expected one of "
            f"{_listed(self.measures)}: give it to observe()."
        )

    def __contains__(self, measure: object) -> bool:
        return any(asked == measure for asked in self.measures)

    def __repr__(self) -> str:
        return (
            f"Record(layer={self.layer!r}, step={self.step}, heads={self.heads}, "
            f"query_length={self.query_length}, key_length={self.key_length}, "
            f"measures={self.measures})"
        )


class Seen:
    """The records of a model's attention calls, in the order in which they were made.

    It grows while the model runs. `seen[layer]` is a layer's records, one per call: a single
    forward pass makes one, generating makes one per step. Iterating gives all records.

    >>> import torch, manyheads as mh
    >>> model = torch.nn.Sequential(mh.MultiHeadAttention(8, 2), mh.MultiHeadAttention(8, 2))
    >>> with mh.observe(model, mh.Entropy()) as seen:
    ...     _ = model(torch.randn(3, 5, 8))
    >>> seen.layers
    ('0', '1')
    >>> seen["1"][0][mh.Entropy()].shape
    torch.Size([3, 2, 5])
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._layers: dict[str, list[Record]] = {}
        self._records: list[Record] = []
        #: The calls' queries and keys, if `observe` was asked to keep them; files have none.
        self.kept: Kept | None = None
        for record in records:
            self.append(record)

    def append(self, record: Record) -> None:
        """Add a record at the end."""
        if not isinstance(record, Record):
            raise ArgumentTypeError(
                f"Seen holds records; got {type(record).__name__}, expected a Record: they come "
                "from observe() or another Seen."
            )
        self._records.append(record)
        self._layers.setdefault(record.layer, []).append(record)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers' module paths, in the order in which they first ran."""
        return tuple(self._layers)

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, in the order of the calls."""
        return tuple(self._records)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """All measures that any record answers."""
        found: list[Measure] = []
        for record in self._records:
            found += [one for one in record.measures if one not in found]
        return tuple(found)

    def __getitem__(self, layer: str) -> tuple[Record, ...]:
        """A layer's records, by its path, or by that of a module around it that holds no other."""
        if layer in self._layers:
            return tuple(self._layers[layer])
        inside = [name for name in self._layers if name.startswith(f"{layer}.")]
        if len(inside) == 1:
            return tuple(self._layers[inside[0]])
        got = f"{len(inside)} observed layers lie in {layer!r}" if inside else f"got {layer!r}"
        raise NotRecordedError(
            f"no single layer of this name was observed: {got}; expected one of "
            f"{_listed(inside or self.layers)}: look at seen.layers."
        )

    def __contains__(self, layer: object) -> bool:
        return layer in self._layers

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"Seen({len(self)} records of {len(self._layers)} layers, {self.measures})"

    def plot(
        self,
        layer: str | int | None = None,
        head: int | None = None,
        *,
        tokens: Sequence[str] | None = None,
        key_tokens: Sequence[str] | None = None,
        batch: int = 0,
    ) -> Figure:
        """Maps of all heads, of one layer's heads, or of one head, as a matplotlib figure.

        Drawn from HeatMap, or without it from TopKeys. Colours follow the square root of a cell's
        mass, so that small weights stay visible.

        Args:
            layer: a layer's name or number; None: all layers.
            head: one head's number, of that layer; None: all heads.
            tokens: the keys' text, or with key_tokens the queries', written beside a head's map if
                short.
            key_tokens: the keys' own text.
            batch: which batch element.

        Raises:
            ArgumentError: there is no such layer, head or batch element, or no map in the record.
            MissingDependencyError: matplotlib is not installed.

        >>> import torch, manyheads as mh
        >>> model = mh.MultiHeadAttention(8, 2, mask=mh.Causal())
        >>> with mh.observe(model, mh.HeatMap()) as seen:
        ...     _ = model(torch.randn(1, 5, 8))
        >>> figure = seen.plot()
        >>> len(figure.axes)
        2
        """
        from manyheads.inspect import picture  # it stands on this module

        return picture.plot(self, layer, head, tokens=tokens, key_tokens=key_tokens, batch=batch)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all to a safetensors file; it appears under its name whole, or not at all.

        When this returns, it is on the disk; when it raises, the old file is still there.

        Raises:
            ArgumentTypeError: a measure is not one of manyheads' own.
            MissingDependencyError: safetensors is not installed.
            OSError: the file cannot be written.
        """
        storage.save(path, self._records)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Seen:
        """What `save` wrote, exactly.

        Raises:
            ArgumentError: the file is not one that `save` wrote, or a later version's.
            MissingDependencyError: safetensors is not installed.
            OSError: the file cannot be read.
        """
        return cls(Record(**fields) for fields in storage.load(path))


def _listed(names: Iterable[object]) -> str:
    """The first few, for a message."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:8]) or "none: nothing was recorded"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
