"""Transformers models on manyheads for a while, and then on exactly what they were on.

Which attention a model runs on stands in its config, which submodels (Whisper's encoder and
decoder) may share, or hold copies of, and which other models may share as well. So what is kept is
one entry per config: whoever comes first notes what was there, whoever leaves last puts it back.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from manyheads.errors import ArgumentError
from manyheads.integrations import huggingface

NAME = "manyheads"


@dataclass(slots=True)
class _Held:
    """A config that `count` blocks hold on manyheads; `before` is what it said."""

    config: Any
    before: Any
    count: int = 0


_held: dict[int, _Held] = {}
_lock = threading.RLock()


def outermost_models(modules: Iterable[nn.Module]) -> list[PreTrainedModel]:
    """The transformers models among modules (outer ones first) that lie in no other of them."""
    found: list[PreTrainedModel] = []
    inside: set[nn.Module] = set()
    for module in modules:
        if isinstance(module, PreTrainedModel) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def takes_manyheads(model: PreTrainedModel) -> bool:
    """Whether any part of it looks its attention up in transformers' table of functions."""
    return any(kind._can_set_attn_implementation() for kind in _kinds(model))


def stays_out(model: PreTrainedModel) -> list[str]:
    """The names of the model classes in it that do not."""
    return [kind.__name__ for kind in _kinds(model) if not kind._can_set_attn_implementation()]


def _kinds(model: PreTrainedModel) -> set[type[PreTrainedModel]]:
    return {type(part) for part in model.modules() if isinstance(part, PreTrainedModel)}


@contextmanager
def on_manyheads(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """Those of the models that can run on manyheads for the time of the block.

    Raises:
        ArgumentError: one of these did not take it.
    """
    huggingface.register(NAME)
    models = tuple(model for model in models if takes_manyheads(model))
    configs = {id(config): config for model in models for config in _configs(model)}
    with _lock:
        for key, config in configs.items():
            held = _held.setdefault(key, _Held(config, config._attn_implementation))
            held.count += 1
    switched: list[Any] = []
    try:
        with _lock:
            for model in models:
                model.set_attn_implementation(NAME)
                if not any(config._attn_implementation == NAME for config in _configs(model)):
                    raise ArgumentError(
                        f"{type(model).__name__} cannot be observed: got attention that does not "
                        f"go through transformers' attention functions; expected a model that "
                        f'takes attn_implementation="{NAME}".'
                    )
            switched = [c for c in configs.values() if c._attn_implementation == NAME]
        yield
    finally:
        away = {str(c._attn_implementation) for c in switched} - {NAME}
        with _lock:
            for key in configs:
                held = _held[key]
                held.count -= 1
                if not held.count:
                    # The attribute behind the property, whose setter would overwrite sub-configs.
                    held.config._attn_implementation_internal = held.before
                    del _held[key]
        if away:
            warnings.warn(
                f"the model was switched to {' and '.join(sorted(away))} attention while it was "
                "observed (Whisper's return_token_timestamps does that): its calls from there on "
                "were not seen.",
                stacklevel=2,
            )


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config that a part of the model may read."""
    found: dict[int, Any] = {}
    waiting = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())
