"""`Seen.plot()`: what was observed as a still picture, through matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from manyheads.arguments import whole_number
from manyheads.errors import ArgumentError, MissingDependencyError
from manyheads.inspect.records import Seen
from manyheads.inspect.sheets import Layer, Pooled, layers_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Up to so many tokens a side, the text of each is written beside the map.
_WORDS = 40


def plot(
    seen: Seen,
    layer: str | int | None = None,
    head: int | None = None,
    *,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    batch: int = 0,
) -> Figure:
    """What `Seen.plot` does."""
    try:
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingDependencyError(
            f"a still picture needs matplotlib ({missing}). "
            "Install it with: pip install matplotlib; or make a page with mh.view"
        ) from missing
    layers = [one for one in layers_of(seen, batch) if one.maps]
    if not layers:
        raise ArgumentError(
            "there is no map to draw: got a record without HeatMap and TopKeys; expected one of "
            "them; ask for it, as in mh.observe(model, mh.HeatMap(64, 64))"
        )
    chosen = layers if layer is None else [layers[_index(layers, layer)]]
    places = range(max(len(one.heads) for one in chosen))
    if head is not None:
        if layer is None or head not in chosen[0].heads:
            raise ArgumentError(
                f"there is no such head: got head={head!r} of layer={layer!r}; expected one of "
                f"{list(chosen[0].heads)} and its layer; name both"
            )
        places = range(chosen[0].heads.index(head), chosen[0].heads.index(head) + 1)
    side = 5.0 if head is not None else 1.4
    figure = Figure(figsize=(side * len(places) + 0.6, side * len(chosen) + 0.4))
    grid = figure.subplots(len(chosen), len(places), squeeze=False)
    for row, one in zip(grid, chosen, strict=True):
        for axes, place in zip(row, places, strict=True):
            drawn = _draw(axes, one, place, PowerNorm(0.5, vmin=0))
    if head is not None:
        figure.colorbar(drawn, ax=grid[0, 0], label="mass on a cell's keys", shrink=0.7)
        _write(grid[0, 0], chosen[0].maps[0], tokens, key_tokens)
    figure.tight_layout()
    return figure


def _index(layers: list[Layer], layer: str | int) -> int:
    names = [one.name for one in layers]
    if isinstance(layer, str):
        index = names.index(layer) if layer in names else -1
    else:
        index = whole_number(layer, "a layer of plot")
    if not 0 <= index < len(names):
        raise ArgumentError(
            f"there is no such layer with a map: got {layer!r}; expected 0 to {len(names) - 1}, "
            f"or one of {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}; choose one"
        )
    return index


def _draw(axes: Any, layer: Layer, place: int, norm: Any) -> Any:
    axes.set_xticks([])
    axes.set_yticks([])
    if place >= len(layer.heads):
        axes.axis("off")
        return None
    pooled = layer.maps[0]
    # Where a cell begins is told, since cells need not hold equally many tokens.
    cells = pooled.cells[place]
    drawn = axes.pcolormesh(pooled.columns, pooled.rows, cells, norm=norm, cmap="magma_r")
    axes.set_ylim(pooled.rows[-1], pooled.rows[0])
    axes.set_title(f"head {layer.heads[place]}", fontsize=7, pad=2)
    if place == 0:
        axes.set_ylabel(layer.name, fontsize=6)
    return drawn


def _write(
    axes: Any, pooled: Pooled, tokens: Sequence[str] | None, key_tokens: Sequence[str] | None
) -> None:
    """Axes of one head's map: tokens where they fit, else numbers."""
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    ends = pooled.rows[-1], pooled.columns[-1]
    texts = (tokens, key_tokens if key_tokens is not None else tokens)
    for axis, text, end in zip((axes.yaxis, axes.xaxis), texts, ends, strict=True):
        if text is None or end > _WORDS or len(text) < end:
            axis.set_major_locator(_ticker().MaxNLocator(integer=True))
            continue
        # The last queries stand at the last keys.
        words = [repr(word)[1:-1].replace("$", r"\$") for word in text[len(text) - end :]]
        axis.set_ticks(np.arange(end) + 0.5, words, fontsize=7)
        if axis is axes.xaxis:
            axis.set_tick_params(rotation=90)


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker
