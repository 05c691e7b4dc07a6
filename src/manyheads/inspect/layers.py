"""Which modules of a model are attention layers, and which of them are wanted."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, Union

from torch import nn

from manyheads.arguments import whole_number
from manyheads.errors import ArgumentError, ArgumentTypeError
from manyheads.module import MultiHeadAttention

#: Paths or globs, or a function that says of each path whether it is wanted.
Layers: TypeAlias = Union[str, Iterable[str], Callable[[str], Any]]  # noqa: UP007 (3.10 needs it)

Paths: TypeAlias = Mapping[nn.Module, str]


def paths_of(model: nn.Module) -> dict[nn.Module, str]:
    """Every module's path; the model's own is its class's name. What torch.compile adds is gone."""
    model = getattr(model, "_orig_mod", model)
    return {
        module: path.replace("_orig_mod.", "") or type(module).__name__
        for path, module in model.named_modules()
    }


def may_call_attention(module: nn.Module) -> bool:
    """False for torch's own modules, which never call `attention`."""
    return not type(module).__module__.startswith("torch.nn.modules.")


def transformers_models(paths: Paths) -> list[Any]:
    """The transformers models among the modules that lie in no other of them."""
    loaded = sys.modules.get("transformers.modeling_utils")
    if loaded is None or not any(isinstance(one, loaded.PreTrainedModel) for one in paths):
        return []
    from manyheads.integrations.huggingface_switch import outermost_models

    return outermost_models(paths)


def check_observable(paths: Paths, models: list[Any]) -> None:
    """Raise ArgumentError if it can be told already that no attention of these can be seen.

    models: the transformers models among them. A part that cannot be seen is named in a warning.
    """
    ours = any(isinstance(one, MultiHeadAttention) for one in paths)
    if models:
        from manyheads.integrations.huggingface_switch import stays_out, takes_manyheads

        out = sorted({name for model in models for name in stays_out(model)})
        if out and not ours and not any(takes_manyheads(model) for model in models):
            raise ArgumentError(
                f"{', '.join(out)} cannot be observed: got attention that does not go through "
                f"transformers' attention functions; {what_can_be_observed(paths)}"
            )
        if out:
            warnings.warn(
                f"attention in {', '.join(out)} does not go through transformers' attention "
                "functions and is not observed; the rest of the model is.",
                stacklevel=4,
            )
    elif not ours and not any(may_call_attention(one) for one in paths):
        raise ArgumentError(f"no attention to observe in the model; {what_can_be_observed(paths)}")


def what_can_be_observed(paths: Paths) -> str:
    """The end of a message: what is expected, and how to get there."""
    if any(isinstance(one, nn.MultiheadAttention) for one in paths):
        return (
            "got torch's nn.MultiheadAttention, expected manyheads': make one with "
            "manyheads.MultiHeadAttention.from_torch(module)."
        )
    name = next(iter(paths.values()), "")
    return (
        f"got a {name}; expected a model with MultiHeadAttention modules, modules that call "
        'manyheads.attention, or a transformers model that takes attn_implementation="manyheads".'
    )


def chooser(layers: Layers | None, paths: Paths) -> Callable[[str], bool]:
    """Whether a path is wanted.

    Raises:
        ArgumentError: a name or glob that fits no module.
        ArgumentTypeError: neither names nor a function.
    """
    if layers is None:
        return lambda path: True
    if callable(layers):
        function = layers
        return lambda path: bool(function(path))
    if not isinstance(layers, str | Iterable):
        raise ArgumentTypeError(
            f"layers is a {type(layers).__name__}; expected paths or globs such as "
            '"model.layers.0.*", or a function of a path.'
        )
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    if not patterns:
        raise ArgumentError(
            f"layers is empty; expected some of {listed(_likely(paths))}: leave it out for all."
        )
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentTypeError(
                f"layers holds {pattern!r}; expected paths or globs such as "
                f'"model.layers.{pattern}.*".'
            )
        if not any(_fits(path, pattern) for path in paths.values()):
            raise ArgumentError(
                f"layers names what is not in the model: got {pattern!r}; expected some of "
                f"{listed(_likely(paths))}, or a glob that fits them."
            )
    return lambda path: any(_fits(path, pattern) for pattern in patterns)


def head_numbers(heads: int | Iterable[int] | None) -> tuple[int, ...] | None:
    """The heads asked for, checked as far as that goes without a layer; None: all."""
    if heads is None:
        return None
    given = tuple(heads) if isinstance(heads, Iterable) else (heads,)
    numbers = tuple(whole_number(head, "a head of observe()") for head in given)
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ArgumentError(
            f"observe() got heads={numbers}; expected different numbers from 0 on: leave heads "
            "out for all."
        )
    return numbers


def listed(names: Iterable[str]) -> str:
    """The first few different ones, for a message."""
    different = list(dict.fromkeys(names))
    shown = ", ".join(repr(name) for name in different[:6]) or "none"
    return f"{shown} and {len(different) - 6} more" if len(different) > 6 else shown


def _fits(path: str, pattern: str) -> bool:
    """Whether a pattern is for this path, or for a module around it."""
    parts = path.split(".")
    around = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return any(name == pattern or fnmatchcase(name, pattern) for name in around)


def _likely(paths: Paths) -> list[str]:
    """The paths of what are attention layers, going by their classes' names."""
    found = [path for one, path in paths.items() if "Attention" in type(one).__name__]
    return [path for path in found if not any(other.startswith(f"{path}.") for other in found)]
