"""Makes the pictures of docs/examples/generation.md and reading-text.md.

PYTHONPATH=examples python docs/text_pictures.py    (data and model are fetched the first time)
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from batches import Order
from corpus import debian
from matplotlib import pyplot as plt
from read_text import draw, pixels
from recogniser import RECOGNISER, Recogniser

import manyheads as mh
from manyheads.demo_models import fetch

PICTURES = Path(__file__).parent / "pictures"
LINE = "Many heads read one line of text."
COLUMN = 20  # whose attention is drawn; a column is 8 pixels wide


def draw_packing() -> None:
    """One real batch of texts, padded and packed, and who sees whom in the packed row."""
    texts = debian().train
    batch = Order(len(texts), 16).epoch(0)[0]
    lengths = [len(texts[row].split()) for row in batch.tolist()]
    padded = np.arange(max(lengths)) < np.array(lengths)[:, None]
    shares = 1 - padded.mean()
    owner = np.repeat(np.arange(16), lengths)[None]
    allowed = (mh.Causal() & mh.Documents(lengths)).materialize(sum(lengths), sum(lengths))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1.5, 1))
    colours = np.where(padded, np.arange(16)[:, None], np.nan)
    left.imshow(colours, aspect="auto", cmap="viridis", interpolation="none")
    left.set_facecolor("0.9")
    left.set(title=f"padded: {shares:.0%} of the batch (grey) is padding", xlabel="words")
    left.set_ylabel("texts")
    seen = np.where(torch.squeeze(allowed).numpy(), owner, np.nan)
    right.imshow(seen, cmap="viridis", interpolation="none")
    right.set(title="packed: what each word may see", xlabel="key", ylabel="query")
    figure.tight_layout()
    figure.savefig(PICTURES / "packing.png", dpi=80)


def draw_reading() -> None:
    """A line, and where one of its columns looks in each head of both blocks."""
    recogniser = Recogniser(fetch(RECOGNISER))
    picture = pixels(draw(LINE))
    asked = mh.WeightRows((COLUMN,))
    with mh.observe(recogniser.blocks, asked) as seen:
        probabilities, _ = recogniser.parts(picture)
    blocks = [seen[name][0][asked][0, :, 0] for name in seen.layers]  # [8, W] each
    figure, rows = plt.subplots(3, 1, figsize=(10, 3.6), height_ratios=(1, 2, 2), sharex=True)
    width = picture.shape[3] / 8
    image = picture[0].transpose(1, 2, 0) / 2 + 0.5
    rows[0].imshow(image, extent=(0, width, 48 / 8, 0), aspect="auto")
    rows[0].axvspan(COLUMN, COLUMN + 1, color="tab:red", alpha=0.5)
    rows[0].set(title=f"read as: {recogniser.decode(probabilities)}", yticks=[])
    for number, (row, weights) in enumerate(zip(rows[1:], blocks, strict=True), 1):
        row.imshow(weights, extent=(0, width, 8, 0), aspect="auto", interpolation="none")
        row.set(ylabel=f"block {number}\nheads", yticks=[])
    rows[2].set_xlabel("column of the picture; the red one's attention is drawn")
    figure.tight_layout()
    figure.savefig(PICTURES / "reading-text.png", dpi=80)


if __name__ == "__main__":
    matplotlib.use("agg")
    draw_packing()
    draw_reading()
