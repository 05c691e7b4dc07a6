"""All ONNX `Attention` node tests of the pinned onnx wheel, through onnx_attention.py."""

from collections import Counter

import pytest
from onnx_attention import opset, run_case, shipped_cases
from tolerance import assert_close_to_onnx

import manyheads as mh

CASES = {case.name: case for case in shipped_cases()}
HALF = {
    name
    for name, case in CASES.items()
    if case.model.graph.input[0].type.tensor_type.elem_type not in (1,)  # 1 is FLOAT
}


def test_every_shipped_case_is_here() -> None:
    assert Counter(map(opset, CASES.values())) == {23: 69, 24: 13, 25: 11}
    assert len(HALF) == 11


@pytest.mark.parametrize("name", CASES)
def test_reference(name: str) -> None:
    for ours, expected in run_case(CASES[name], "reference"):
        assert_close_to_onnx(ours, expected)


@pytest.mark.parametrize("name", sorted(CASES.keys() - HALF))
def test_native(name: str) -> None:
    for ours, expected in run_case(CASES[name], "native"):
        assert_close_to_onnx(ours, expected)


def test_native_accepts_all_but_the_half_types() -> None:
    accepted = 0
    for case in CASES.values():
        try:
            run_case(case, "native")
            accepted += 1
        except mh.BackendError:
            pass
    assert accepted == 82
