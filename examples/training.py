"""The training loop of all examples: AdamW, warm-up and cosine, checkpoints, one log.

    order = Order(len(texts), batch_size=32, seed=0)
    train(model, order, lambda rows: loss_of(model, texts[rows]), Settings(steps=1000), folder)

Stopped at any moment (Ctrl-C, a crash, a power cut) and started again, a run ends with the same
weights, bit for bit, as one that was never stopped, on the same machine with the same number of
threads: a checkpoint holds the weights, AdamW's moments, the step and the state of torch's random
numbers, and which rows a step trains on is a function of the step.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from batches import Order
from checkpoints import CheckpointError, load_checkpoint, save_checkpoint, write
from interrupts import stop_asked
from torch import Tensor, nn
from tqdm import tqdm

Row = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train."""

    steps: int
    learning_rate: float = 1e-3  # the highest, at the end of the warm-up
    warmup: int = 100  # steps
    weight_decay: float = 0.1  # of matrices; vectors are left alone
    clip: float = 1.0  # largest norm of the gradient
    bf16: bool = False  # autocast; the weights stay float32
    seed: int = 0
    log_every: int = 50  # steps
    evaluate_every: int = 0  # steps; 0: at the end only
    save_every: int = 500  # steps

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ...: up in a line, down as a cosine, to a hundredth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class _Run:
    """All that a checkpoint holds, and all that changes from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    identity: Mapping[str, object]
    path: Path | None
    step: int = 0
    losses: list[float] = field(default_factory=list)  # since the last row of the log
    log: list[Row] = field(default_factory=list)

    def save(self) -> None:
        if self.path is None:
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for place, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{k}": v for k, v in moments.items()}
        tensors["random"] = torch.get_rng_state()
        state = {"step": self.step, "losses": self.losses, "log": self.log, "run": self.identity}
        save_checkpoint(self.path, tensors, state)
        table = io.StringIO()
        columns = list(dict.fromkeys(name for row in self.log for name in row))
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.log)
        write(self.path.with_name("log.csv"), table.getvalue().encode())

    def load(self) -> None:
        tensors, state = load_checkpoint(self.path)
        if state.get("run") != self.identity:
            was, now = state.get("run", {}), self.identity
            other = [k for k in {**was, **now} if was.get(k) != now.get(k)]
            raise CheckpointError(
                f"{self.path} is of another run: it had { {k: was.get(k) for k in other} }; "
                f"expected { {k: now.get(k) for k in other} }. Nothing was overwritten. Give "
                "another folder, delete it, or start anew with resume=False."
            )
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, place, key = name.split(".")
                moments.setdefault(int(place), {})[key] = tensor
        _load_weights(self.model, tensors, self.path)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        torch.set_rng_state(tensors["random"])
        self.step, self.losses, self.log = state["step"], state["losses"], state["log"]


def load_weights(path: Path, model: nn.Module) -> None:
    """Give a model the weights of a checkpoint, to use it.

    Raises: CheckpointError for a damaged file, or one of another model.
    """
    _load_weights(model, load_checkpoint(path)[0], path)


def train(
    model: nn.Module,
    order: Order,
    loss: Callable[[Tensor], Tensor],
    settings: Settings,
    folder: Path | None = None,
    resume: bool = True,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    data: str = "",
    beside: Mapping[str, bytes] | None = None,
) -> list[Row]:
    """Train `model` in place; the rows of the log are returned.

    loss: the loss of the rows int64 [batch_size], a scalar with a gradient; if it draws random
        numbers, then torch's.
    folder: gets checkpoint.safetensors and log.csv; None: nothing is written.
    resume: go on from the folder's checkpoint, if it has one; False: start anew, over it.
    evaluate: what else to log; called in eval mode, without gradients.
    data: a digest (checkpoints.digest) of what is trained on: with another one it is another run.
    beside: files of the folder that belong to the model, such as its tokens, name to content.

    Raises:
        CheckpointError: a checkpoint that is damaged or of another run; it stays as it is.
        SystemExit: after Ctrl-C, with everything saved.
    """
    torch.manual_seed(settings.seed)
    path = None if folder is None else Path(folder) / "checkpoint.safetensors"
    run = _Run(model, _adamw(model, settings), _identity(settings, order, data), path)
    if path is not None and resume and path.exists():
        run.load()
    for name, content in (beside or {}).items() if path is not None else ():
        write(path.with_name(name), content)  # after the check: nothing of another run is lost
    start = time.perf_counter() - (run.log[-1]["seconds"] if run.log else 0.0)
    batches = order.batches(run.step)
    model.train()
    bar = tqdm(total=settings.steps, initial=run.step, unit="step", disable=None)
    with bar, stop_asked() as stop:
        while run.step < settings.steps:
            _advance(run, loss, next(batches), settings)
            bar.update()
            last = run.step == settings.steps
            evaluates = last or _is_due(settings.evaluate_every, run.step)
            if evaluates or _is_due(settings.log_every, run.step):
                row = {"step": run.step, "loss": sum(run.losses) / len(run.losses)}
                if evaluate is not None and evaluates:
                    row |= _evaluated(model, evaluate)
                bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k != "step"})
                run.log.append(row | {"seconds": round(time.perf_counter() - start, 2)})
                run.losses = []
            if last or stop.is_set() or _is_due(settings.save_every, run.step):
                run.save()
            if stop.is_set() and not last:
                kept = "nothing is kept, as no folder was given" if path is None else f"see {path}"
                print(f"\nStopped after step {run.step} of {settings.steps}; {kept}.")
                sys.exit(130)
    model.eval()
    return run.log


def _advance(run: _Run, loss: Callable[[Tensor], Tensor], rows: Tensor, settings: Settings) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = settings.rate(run.step)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
        value = loss(rows)
    run.optimizer.zero_grad()
    value.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip)
    run.optimizer.step()
    run.losses.append(float(value.detach()))
    run.step += 1


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _adamw(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


def _identity(settings: Settings, order: Order, data: str) -> dict[str, object]:
    """What must be the same for a run to go on; how often it is looked at may change."""
    settled = {k: v for k, v in asdict(settings).items() if not k.endswith("_every")}
    first = hashlib.sha256(order.epoch(0).numpy().tobytes()).hexdigest()[:16]
    rows = {"rows": order.count, "batch_size": order.batch_size, "first_epoch": first}
    return settled | rows | {"data": data[:16]}


def _load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path | None) -> None:
    prefix = "model."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as problem:
        raise CheckpointError(
            f"{path} is of another model: {problem} Nothing was overwritten. Make the model with "
            "the sizes it was trained with, or give another folder."
        ) from problem


def _evaluated(model: nn.Module, evaluate: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # evaluating must not change training
        measures = {name: float(value) for name, value in evaluate().items()}
    model.train()
    return measures
