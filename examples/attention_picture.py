"""Draws which source tokens each written token attends to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor


def draw(source: Sequence[str], target: Sequence[str], weights: Tensor, path: Path) -> None:
    """Save weights [target, source], 0 to 1, as a picture: a row of squares per written token."""
    figure = Figure(figsize=(0.34 * len(source) + 1.6, 0.3 * len(target) + 1.3), dpi=80)
    axes = figure.add_subplot()
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), source, rotation=60, ha="right")
    axes.set_yticks(range(len(target)), target)
    axes.set_xlabel("source")
    axes.set_ylabel("written")
    figure.tight_layout()
    figure.savefig(path)
