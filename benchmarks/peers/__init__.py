"""Peers with environments of their own, each in its own process, timed in turn with ours.

`make bench-peers` installs them into build/peers. The process stays alive between requests and
times itself; nothing it does falls into our time, but for memory and caches that both use.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Row
from tasks import FEW_PAIRS, limit_of, our_call, tolerance
from torch import Tensor

from manyheads.benchmark import Comparison, DisagreementError, check_close, compare

ROOT = Path(__file__).parent.parent.parent / "build" / "peers"
WORKER = Path(__file__).parent / "worker.py"

#: Name of the environment -> what people call it.
NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "zentorch": "zentorch"}

#: Threads that have run out of work look for more during this time, on the cores that the other
#: side needs.
SETTLE_SECONDS = 0.005

#: Longer than any request takes; importing and compiling are part of the first.
TIMEOUT_SECONDS = 120.0


class PeerError(RuntimeError):
    """A peer could not do what it was asked; the message is a few words for the table."""


class Peer:
    """One installed peer: a process to which a row is handed and which then times itself.

    folder: where the inputs and the result of a row go, as .npy files.
    operator: what the peer runs for the row loaded last.
    """

    def __init__(self, python: Path, name: str) -> None:
        self.operator = ""
        self._temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self._temporary.name)
        self._log = (self.folder / "stderr.txt").open("w")
        threads = str(torch.get_num_threads())
        self._process = subprocess.Popen(
            [str(python), str(WORKER), name, threads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": ""},
        )

    def load(self, inputs: list[Tensor], causal: bool) -> None:
        for name, tensor in zip(("query", "key", "value"), inputs, strict=True):
            np.save(self.folder / f"{name}.npy", tensor.numpy())
        self.operator = self._ask({"load": str(self.folder), "causal": causal})["operator"]

    def __call__(self) -> Tensor:
        """The result for the row loaded last."""
        return torch.from_numpy(np.load(self.folder / "out.npy"))

    def seconds_per_call(self, count: int) -> float:
        time.sleep(SETTLE_SECONDS)
        seconds = float(self._ask({"time": count})["seconds"])
        time.sleep(SETTLE_SECONDS)
        return seconds

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
        self._temporary.cleanup()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None
        ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT_SECONDS)
        if not ready:
            raise PeerError(f"no answer in {TIMEOUT_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        return f"died of signal {-code}" if code < 0 else f"ended with status {code}"


class Peers:
    """All peers: those that are installed start when they are first wanted, and stay."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._started: dict[str, Peer] = {}
        self._said: dict[str, list[str]] = {name: [] for name in NAMES}

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *exception: object) -> None:
        for peer in self._started.values():
            peer.close()

    def installed(self, name: str) -> bool:
        return (self._root / name / ".installed").exists()

    def notes(self) -> list[str]:
        """What there is to say about each: that it is absent, or what it ran and what failed."""
        notes = []
        for name, title in NAMES.items():
            if not self.installed(name):
                notes.append(f"{title}: not installed (`make bench-peers`)")
            elif self._said[name]:
                notes.append(f"{title}: {', '.join(dict.fromkeys(self._said[name]))}")
        return notes

    def time_row(self, row: Row, patience: float) -> dict[str, Comparison | str]:
        """By peer: it and ours in turn, or in a few words why not."""
        if not row.peers:
            return {}
        return {
            title: self._time(name, row, patience)
            for name, title in NAMES.items()
            if self.installed(name)
        }

    def _time(self, name: str, row: Row, patience: float) -> Comparison | str:
        inputs = row.inputs()
        try:
            if name not in self._started:
                self._started[name] = Peer(self._root / name / "bin" / "python", name)
            peer = self._started[name]
            peer.load(inputs, row.causal)
            result = compare(
                our_call(row, inputs),
                peer,
                pairs=FEW_PAIRS,
                warmup=0,
                check=lambda ours, theirs: check_close(ours, theirs, tolerance(row.dtype)),
                limit=limit_of(row, inputs)[0],
                patience=patience,
            )
        except PeerError as error:
            self._started.pop(name).close()  # the next row gets a fresh process
            self._said[name].append(f"failed at {row.name} ({error})")
            return "failed"
        except DisagreementError as error:
            self._said[name].append(f"{row.name}: {error}")
            return "other results"
        self._said[name].append(peer.operator)
        return result
