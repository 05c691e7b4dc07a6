"""Memory is O(n): what a call adds to the process's peak, per token, at 16,384 and 32,768."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from measure_memory import FEATURES, LENGTHS

# Bytes per token, inputs and results among them: 4 tensors of 64 float32 numbers are 1,024 forward,
# and backward 3 gradients and copies of inputs are 1,024 more. One head's scores alone would be
# 131,072 at the longer length.
MOST = {
    "window": (1300, 2500),
    "alibi": (1300, 2500),
    "relative": (1300, 2500),
    "learned bias": (1300, 2500),
    "dropout": (1300, 2500),
    "record": (1500, 2700),  # the heaviest keys and their weights are 96
    "bfloat16": (850, 2400),
    "everything": (1400, 3300),  # on 2 threads: parts of dQ, memory of each thread
    "causal": (350, 700),  # of 16 numbers
    "causal, two threads": (400, 1400),
}
SCORES = 4 * LENGTHS[1]


@pytest.fixture(scope="module")
def grown() -> dict[str, list[int]]:
    """Bytes at both lengths, by case: tests/measure_memory.py in a process of its own."""
    program = os.path.join(os.path.dirname(__file__), "measure_memory.py")
    ran = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("feature", MOST)
def test_memory_grows_with_the_length(
    feature: str, direction: str, grown: dict[str, list[int]]
) -> None:
    short, long = grown[f"{feature}, {direction}"]
    assert long < 2.25 * short, "twice the length, twice the memory"
    most = MOST[feature][direction == "backward"]
    assert long / LENGTHS[1] < most < SCORES / 35


def test_every_feature_has_a_bound() -> None:
    assert {*MOST, "quadratic"} == set(FEATURES)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_quadratic_memory_would_be_seen(direction: str, grown: dict[str, list[int]]) -> None:
    """The definition, which makes every score, at lengths a sixteenth of the others."""
    short, long = grown[f"quadratic, {direction}"]
    assert long > 2.25 * short
    assert long / FEATURES["quadratic"].lengths[1] > 5 * MOST["window"][direction == "backward"]
