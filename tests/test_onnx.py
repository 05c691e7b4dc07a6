"""All ONNX `Attention` node tests of the pinned onnx wheel, through onnx_attention.py."""

from collections import Counter

import pytest
from onnx_attention import opset, run_case, shipped_cases
from tolerance import assert_close_to_onnx

CASES = {case.name: case for case in shipped_cases()}


def test_every_shipped_case_is_here() -> None:
    assert Counter(map(opset, CASES.values())) == {23: 69, 24: 13, 25: 11}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", CASES)
def test_shipped_case(name: str, backend: str) -> None:
    """All 93 on each: nothing is refused."""
    for ours, expected in run_case(CASES[name], backend):
        assert_close_to_onnx(ours, expected)
