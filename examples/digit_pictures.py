"""Attention drawn over pictures, and a picture of yours made like the ones trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import manyheads as mh


def attention_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Where the class token looks, on the grid of patches of `images` [B, size, size].

    Returns: the last layer's weights, exactly, [B, heads, rows, columns]; and what the class token
    is made of through all layers, by rollout (Abnar and Zuidema, 2020), [B, rows, columns].
    """
    tokens = len(model.places)
    row, heat = mh.WeightRows((0,)), mh.HeatMap(tokens, tokens)
    with torch.no_grad(), mh.observe(model, row, heat) as seen:
        model(images)
    (record,) = seen[seen.layers[-1]]
    side = round((tokens - 1) ** 0.5)
    weights = record[row][:, :, 0, 1:].unflatten(-1, (side, side))
    return weights, mh.rollout(seen)[-1, :, 0, 1:].unflatten(-1, (side, side))


def draw_attention(model: nn.Module, images: Tensor, file: Path) -> None:
    """One row per picture: itself, the last layer's heads over it, and rollout over it."""
    from matplotlib.figure import Figure

    weights, whole = attention_maps(model, images)
    found = model(images).detach().softmax(-1).max(-1)
    heads, size = weights.shape[1], images.shape[-1]
    figure = Figure(figsize=(1.3 * (heads + 2), 1.4 * len(images)), dpi=80)
    titles = ["picture", *(f"head {head}" for head in range(heads)), "all layers"]
    axes = figure.subplots(len(images), len(titles), squeeze=False)
    for row, image in enumerate(images):
        for column, map_ in enumerate([None, *weights[row], whole[row]]):
            spot = axes[row, column]
            spot.imshow(image.numpy(), cmap="gray_r", extent=(0, size, size, 0))
            if map_ is not None:
                spot.imshow(map_.numpy(), cmap="inferno", alpha=0.6, extent=(0, size, size, 0))
            spot.set(xticks=[], yticks=[], title=titles[column] if row == 0 else "")
        axes[row, 0].set_ylabel(f"{int(found.indices[row])}  ({float(found.values[row]):.0%})")
    figure.tight_layout()
    figure.savefig(file)


def prepared(file: Path) -> Tensor:
    """A picture of one digit as MNIST has them, float32 [28, 28]: light on dark, 20 pixels high.

    The digit is what differs from most of the picture: dark on light or light on dark.
    """
    from pictures import read_picture
    from PIL import Image

    pixels = np.asarray(read_picture(file).convert("L"), dtype=np.float32)
    pixels = np.abs(pixels - np.median(pixels))
    if pixels.max() < 16:
        raise ValueError(f"{file} is of one colour; expected a digit that stands out from it.")
    rows, columns = np.nonzero(pixels > pixels.max() / 4)
    ink = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] / pixels.max()
    height, width = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    ink = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BOX))
    places = np.indices(ink.shape).reshape(2, -1) @ ink.ravel() / ink.sum()
    top, left = (
        int(np.clip(round(13.5 - place), 0, 28 - side))
        for place, side in zip(places, ink.shape, strict=True)
    )
    digit = torch.zeros(28, 28)
    digit[top : top + height, left : left + width] = torch.from_numpy(ink.copy())
    return digit
