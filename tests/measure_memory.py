"""How much memory a call takes at its peak: a program, since a process's peak never sinks.

Prints one JSON object: {case: [bytes at the first length, bytes at the second]}, each more than the
process had before. Every case runs in a fork of its own, made before torch starts any thread.
"""

from __future__ import annotations

import json
import os
import resource
from dataclasses import dataclass, replace

import torch

import manyheads as mh

LENGTHS = (16384, 32768)
WINDOW = mh.Causal() & mh.Window(511, 0)


@dataclass(frozen=True)
class Case:
    """One head of self-attention.

    dense: a learned bias of one number per key; record: it is measured too.
    """

    mask: mh.Mask = WINDOW
    alibi: bool = False
    relative: bool = False
    dense: bool = False
    dropout_p: float = 0.0
    record: bool = False
    width: int = 64
    dtype: torch.dtype = torch.float32
    threads: int = 1
    backward: bool = False
    backend: str = "native"
    lengths: tuple[int, int] = LENGTHS


FEATURES = {
    "window": Case(),
    "alibi": Case(alibi=True),
    "relative": Case(relative=True),
    "learned bias": Case(dense=True),
    "dropout": Case(dropout_p=0.1),
    "record": Case(alibi=True, record=True),
    "bfloat16": Case(dtype=torch.bfloat16),
    "everything": Case(alibi=True, relative=True, dense=True, dropout_p=0.1, threads=2),
    "causal": Case(mask=mh.Causal(), dense=True, dropout_p=0.1, width=16),
    "causal, two threads": Case(mask=mh.Causal(), dense=True, width=16, threads=2),
    "quadratic": Case(backend="reference", lengths=(1024, 2048)),
}


def step(case: Case, length: int) -> None:
    shape = (1, 1, length, case.width)
    inputs = [torch.randn(shape, dtype=case.dtype, requires_grad=case.backward) for _ in range(3)]
    biases: list[mh.ScoreBias] = []
    if case.alibi:
        biases.append(mh.Alibi(torch.rand(1, requires_grad=case.backward)))
    if case.relative:
        biases.append(mh.RelativeBias(num_heads=1))
    if case.dense:
        biases.append(mh.DenseBias(torch.zeros(1, 1, 1, length, requires_grad=case.backward)))
    out = mh.attention(
        *inputs,
        mask=case.mask,
        attn_bias=sum(biases[1:], biases[0]) if biases else None,
        dropout_p=case.dropout_p,
        backend=case.backend,
        strict=case.backend == "native",
    )
    if case.record:
        asked = [mh.Entropy(), mh.TopKeys(8), mh.Received(), mh.HeatMap(256, 256)]
        with torch.no_grad():
            kept = mh.measure(*inputs[:2], asked, mask=case.mask, attn_bias=biases[0])
        assert len(kept) == len(asked)
    if case.backward:
        out.sum().backward()


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def growth(case: Case) -> list[int]:
    torch.set_num_threads(case.threads)
    step(case, 256)
    before, found = peak(), []
    for length in case.lengths:
        step(case, length)
        found.append(peak() - before)
    return found


def in_a_fork(case: Case) -> list[int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, json.dumps(growth(case)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text)


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"{name}, {direction}": in_a_fork(replace(case, backward=direction == "backward"))
                for name, case in FEATURES.items()
                for direction in ("forward", "backward")
            }
        )
    )
