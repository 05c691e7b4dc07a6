"""Checkpoints: a safetensors file that is either whole or not there, and is checked when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, uint8


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be continued from: damaged, or of another run."""


def write(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the name must not get to the disk before the content
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors, and whatever else JSON can hold, to `path`, replacing what is there."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state, sort_keys=True)
    write(path, save(tensors, {"state": text, "sha256": digest(tensors, text)}))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state, as they were saved.

    Raises: CheckpointError for a file that is cut short, changed, or no checkpoint.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as problem:
        raise _damaged(path, f"it cannot be read ({problem})") from problem
    text = metadata.get("state", "")
    got, expected = digest(tensors, text), metadata.get("sha256", "none")
    if got != expected:
        raise _damaged(path, f"its content has sha256 {got}, and it says {expected}")
    return tensors, json.loads(text)


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """The sha256 of named tensors and a text, in hexadecimal."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        found.update(tensors[name].reshape(-1).view(uint8).numpy())
    return found.hexdigest()


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged, or no checkpoint of ours: {why}. Expected: a file written by "
        "save_checkpoint. Nothing was overwritten. Put back a copy, or delete it to start anew."
    )
