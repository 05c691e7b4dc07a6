"""A small vision transformer (Dosovitskiy et al., 2021), and what it is trained on.

A picture is cut into patches; each becomes a vector, its place is added, and one more vector, the
class token, looks at them all: the digit is read from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformer import Config, Stack

DIM, HEADS = 64, 4


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set, and the model and training that suit it."""

    size: int  # pixels a side
    patch: int  # likewise
    held_out: int
    layers: int
    epochs: int
    batch: int
    bf16: bool
    turn: float  # how far training turns pictures, in radians,
    shift: float  # moves them, in pixels,
    zoom: float  # and scales them, a share of the size


TASKS = {
    "mnist": Task(
        size=28, patch=4, held_out=2000, layers=3, epochs=12, batch=100, bf16=True,
        turn=0.2, shift=2.0, zoom=0.1,
    ),
    "digits": Task(
        size=8, patch=2, held_out=360, layers=2, epochs=20, batch=32, bf16=False,
        turn=0.1, shift=0.5, zoom=0.05,
    ),
}  # fmt: skip


def stem(patch: int) -> nn.Module:
    """Pictures [B, 1, S, S] to patches [B, DIM, S / patch, S / patch]; `patch` is a power of two.

    A few small convolutions in place of one as large as a patch: it learns in far fewer epochs
    (Xiao et al., 2021).
    """
    layers: list[nn.Module] = []
    halvings, channels = patch.bit_length() - 1, 1
    for halving in reversed(range(halvings)):
        layers += [nn.Conv2d(channels, DIM >> halving, 3, stride=2, padding=1), nn.GELU()]
        channels = DIM >> halving
    return nn.Sequential(*layers, nn.Conv2d(DIM, DIM, 1))


class VisionTransformer(nn.Module):
    """Pictures [B, size, size] to logits [B, 10]."""

    def __init__(self, task: Task, attention: str = "manyheads") -> None:
        super().__init__()
        config = Config(dim=DIM, heads=HEADS, dropout=0.0, positions=None, attention=attention)
        self.patches = stem(task.patch)
        self.token = nn.Parameter(torch.randn(DIM) * 0.02)
        self.places = nn.Parameter(torch.randn((task.size // task.patch) ** 2 + 1, DIM) * 0.02)
        self.stack = Stack(config, task.layers)
        self.head = nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images[:, None]).flatten(2).transpose(1, 2)
        token = self.token.expand(len(images), 1, -1)
        x = torch.cat([token, patches], 1) + self.places
        return self.head(self.stack(x)[:, 0])
