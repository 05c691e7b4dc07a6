"""Queries and keys of observed calls, kept so that any part of their weights can be computed again.

A call's weights are Lq * Lk numbers a head; its queries and keys are D * (Lq + Lk). Rows of a
softmax need all keys and no other row, so from these any row, and any window of the map, follows
exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from manyheads.errors import ArgumentError
from manyheads.inspect.blocks import rows_of
from manyheads.parts import batch_at, heads_at
from manyheads.spec import AttentionCall

_MEGABYTE = 1_000_000


@dataclass(eq=False)
class Kept:
    """What `observe(..., keep_megabytes=...)` kept: each call without its values, on the CPU.

    max_bytes: how many all of it may take. size: how many it takes: query and key, in the dtype
        that the model ran in, key/value heads not repeated; masks and biases, where they are
        tensors, each once.
    """

    max_bytes: int
    size: int = 0
    _calls: dict[tuple[str, int], AttentionCall] = field(default_factory=dict)
    _counted: set[int] = field(default_factory=set)

    def add(self, layer: str, step: int, call: AttentionCall) -> None:
        """Keep call number `step` of a layer.

        Raises:
            ArgumentError: that is more than may be kept.
        """
        key = call.key.detach()
        needed = _bytes_of(call.query) + _bytes_of(key) + self._others(call)
        if self.size + needed > self.max_bytes:
            raise ArgumentError(
                f"queries and keys do not fit what may be kept: got {_megabytes(self.size)} MB "
                f"after {len(self._calls)} calls and {_megabytes(needed)} MB for the next, of "
                f"layer {layer!r}; expected at most {_megabytes(self.max_bytes)} MB; raise "
                "keep_megabytes (--keep-megabytes), observe fewer layers, or shorten the text"
            )
        # Copied: a view keeps all of what it is a view of, and a cache writes over its keys.
        key = _copied(key)
        kept = replace(call, query=_copied(call.query), key=key, value=key, dropout_factors=None)
        self._calls[layer, step] = _on_cpu(replace(kept, dropout_p=0.0, needs_lse=False))
        self.size += needed

    def __contains__(self, call: tuple[str, int]) -> bool:
        return call in self._calls

    def part(
        self, layer: str, step: int, batch: int, head: int, rows: tuple[int, int]
    ) -> AttentionCall:
        """One head's query rows [begin, end) of one batch element of a kept call, as a call."""
        # In this order little is copied: rows are a view.
        call = heads_at(rows_of(self._calls[layer, step], *rows), torch.tensor([head]))
        return call if call.geometry.batch == 1 else batch_at(call, torch.tensor([batch]))

    def _others(self, call: AttentionCall) -> int:
        """Bytes of the call's other tensors, those that layers share only once."""
        parts = (call.plan, call.positions, call.bias, call.sinks)
        found = [one for part in parts for one in _tensors(part)]
        # The calls hold these tensors, so that no other takes their place in memory.
        new = {one.data_ptr(): one for one in found if one.data_ptr() not in self._counted}
        self._counted.update(new)
        return sum(_bytes_of(one) for one in new.values())


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _megabytes(size: int) -> str:
    return f"{size / _MEGABYTE:,.1f}"


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _on_cpu(call: AttentionCall) -> AttentionCall:
    # What is one number per head or batch element may be trained on, or a cache's counter.
    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (value.detach().clone() if value.dim() <= 1 else value.detach()).cpu()
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: moved(getattr(value, f.name)) for f in fields(value)})
        return value

    here: AttentionCall = moved(call)
    return replace(here, geometry=replace(here.geometry, device=torch.device("cpu")))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in plain data."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for one in fields(value):
            yield from _tensors(getattr(value, one.name))
