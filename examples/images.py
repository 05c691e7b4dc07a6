"""Handwritten digits with a vision transformer (Dosovitskiy et al., 2021), and where it looks.

    python examples/images.py train                        # MNIST: 8,000 pictures to train on
    python examples/images.py train --name digits          # scikit-learn's 8 x 8 digits
    python examples/images.py classify my_digit.png        # your own picture, after training
    python examples/images.py draw attention.png           # attention over held-out pictures
    python examples/images.py compare --name digits        # with torch's own attention

The model is in vision_transformer.py, the training loop in training.py.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import data
import torch
import typer
from batches import Order
from checkpoints import digest
from command import run
from digit_pictures import draw_attention, prepared
from torch import Tensor
from torch.nn import functional as F
from training import Settings, load_weights, train
from vision_transformer import TASKS, Task, VisionTransformer

RUNS = Path("build/examples")
Name = Literal["mnist", "digits"]  # the keys of TASKS
app = typer.Typer(help="Handwritten digits with a vision transformer.", add_completion=False)


def load(name: str) -> tuple[Tensor, Tensor]:
    """Images float32 [N, size, size] from 0 to 1 and digits int64 [N]; held-out ones at the end."""
    if name == "mnist":
        return data.mnist()
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images / 16, dtype=torch.float32)
    return images[order], torch.tensor(found.target, dtype=torch.int64)[order]


def varied(images: Tensor, task: Task) -> Tensor:
    """The pictures, each a little turned, moved and scaled by chance."""
    turn, zoom, right, down = (torch.rand(4, len(images), 1) * 2 - 1).unbind()
    turn, zoom, move = turn * task.turn, 1 + zoom * task.zoom, 2 * task.shift / task.size
    first = torch.cat([zoom * turn.cos(), -zoom * turn.sin(), right * move], 1)
    second = torch.cat([zoom * turn.sin(), zoom * turn.cos(), down * move], 1)
    shape = [len(images), 1, task.size, task.size]
    grid = F.affine_grid(torch.stack([first, second], 1), shape, align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def fit(
    task: Task,
    images: Tensor,
    digits: Tensor,
    *,
    seed: int = 0,
    attention: str = "manyheads",
    folder: Path | None = None,
    resume: bool = True,
) -> tuple[VisionTransformer, dict[str, float]]:
    """A trained model; its accuracy on the held-out pictures, and what the training took.

    folder: where checkpoints go, and where a stopped training goes on from.
    """
    torch.manual_seed(seed)
    model, split = VisionTransformer(task, attention), len(images) - task.held_out
    order = Order(split, task.batch, seed)
    settings = Settings(
        steps=task.epochs * order.steps_per_epoch, learning_rate=2e-3, weight_decay=0.05,
        bf16=task.bf16, seed=seed, evaluate_every=5 * order.steps_per_epoch,
    )  # fmt: skip

    def loss(rows: Tensor) -> Tensor:
        logits = model(varied(images[rows], task))
        return F.cross_entropy(logits, digits[rows], label_smoothing=0.1)

    def accuracy() -> dict[str, float]:
        found = torch.cat([model(part).argmax(-1) for part in images[split:].split(500)])
        return {"accuracy": float((found == digits[split:]).double().mean())}

    cpu = time.process_time()
    known = digest({"images": images[:split], "digits": digits[:split]})
    log = train(model, order, loss, settings, folder, resume, accuracy, data=known)
    cpu = time.process_time() - cpu
    last = log[-1]
    return model, {"accuracy": last["accuracy"], "seconds": last["seconds"], "cpu_seconds": cpu}


def compare(name: str, seeds: int = 3) -> dict[str, Any]:
    """The same trainings with manyheads' and torch's attention, in turn: accuracies, CPU time.

    torch's trains in float32 throughout: on the CPU its bfloat16 is the slower one.
    """
    task, (images, digits) = TASKS[name], load(name)
    found: dict[str, list[dict[str, float]]] = {"manyheads": [], "sdpa": []}
    for seed in range(seeds):
        for attention, measured in found.items():
            suited = task if attention == "manyheads" else replace(task, bf16=False)
            measured.append(fit(suited, images, digits, seed=seed, attention=attention)[1])
    cpu = {kind: mean(one["cpu_seconds"] for one in rows) for kind, rows in found.items()}
    accuracies = {kind: [one["accuracy"] for one in rows] for kind, rows in found.items()}
    return {**accuracies, "cpu_seconds": cpu, "time_ratio": cpu["manyheads"] / cpu["sdpa"]}


def trained(name: str) -> VisionTransformer:
    """The model that `train` left."""
    path = RUNS / f"images-{name}" / "checkpoint.safetensors"
    if not path.exists():
        raise typer.BadParameter(f"no trained model at {path}: run `images.py train` first.")
    model = VisionTransformer(TASKS[name])
    load_weights(path, model)
    return model.eval()


@app.command("train")
def train_command(name: Name = "mnist", seed: int = 0, anew: bool = False) -> None:
    """Train, or go on with a training that was stopped."""
    folder = RUNS / f"images-{name}"
    _, found = fit(TASKS[name], *load(name), seed=seed, folder=folder, resume=not anew)
    print(f"{name}: {found['accuracy']:.2%} of held-out pictures right, {found['seconds']:.0f} s")


@app.command()
def classify(file: Path, output: Path | None = None) -> None:
    """Say which digit a picture of yours shows; `output` gets the attention over it."""
    model, image = trained("mnist"), prepared(file)[None]
    shares = model(image).detach()[0].softmax(-1)
    for share, digit in zip(*(x.tolist() for x in shares.topk(3)), strict=True):
        print(f"{digit}  {share:.1%}")
    if output is not None:
        draw_attention(model, image, output)


@app.command()
def draw(output: Path, name: Name = "mnist", count: int = 5) -> None:
    """Draw where the class token looks on held-out pictures of the digits 0, 1, ..."""
    images, digits = (part[-TASKS[name].held_out :] for part in load(name))
    rows = [int((digits == digit).nonzero()[0]) for digit in range(count)]
    draw_attention(trained(name), images[rows], output)


@app.command("compare")
def compare_command(name: Name = "digits", seeds: int = 3) -> None:
    """The same trainings with torch's own attention."""
    found = compare(name, seeds)
    for kind in ("manyheads", "sdpa"):
        print(f"{kind:10}", *(f"{accuracy:.2%}" for accuracy in found[kind]))
    print(f"time, manyheads / sdpa: {found['time_ratio']:.2f}")


if __name__ == "__main__":
    run(app)
