"""transformers' cache with `manyheads.KVCache`s in it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import manyheads as mh


class GrowingLayer(DynamicLayer):
    """A layer of transformers' cache that keeps its rows in a `KVCache`.

    transformers' own copies the whole layer for every token; this one writes the new row into
    memory that is there already.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = mh.KVCache()

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append key and value [B, Hkv, L, D]; all rows so far."""
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        self.keys, self.values = self.rows.append(key, value)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove rows (transformers gives a negative number)."""
        if self.is_initialized:
            self.rows.truncate(self.rows.length - abs(tokens_to_remove))
            self.keys, self.values = self.rows.view()


def growing_cache(model: Any) -> DynamicCache:
    """An empty cache for `model`; layers with a sliding window stay transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(own) is DynamicLayer else own for own in cache.layers]
    return cache
