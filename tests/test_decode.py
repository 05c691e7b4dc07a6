"""Few queries on many keys: the kernel that cuts the keys into chunks (csrc/kernel/decode.h)."""

import math
from dataclasses import replace

import pytest
import torch
from cases import Built, Case, build
from oracle import Problem, attend
from tolerance import assert_close_to_oracle, assert_lse_close, eager

import manyheads as mh

# A run is 64 keys, a step 128, a chunk 512: before, at and past each edge.
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 193, 511, 513, 1025, 4099]


def check(built: Built, dtype: torch.dtype = torch.float32) -> None:
    exact, exact_lse = attend(built.problem)
    plain, plain_lse = eager(built.problem, dtype)
    out, lse = built.run("native", return_lse=True)
    assert_close_to_oracle(out, exact, plain, dtype)
    assert_lse_close(lse, exact_lse, plain_lse, built.problem)
    assert (out[exact_lse == -math.inf] == 0).all()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("mask", ["none", "causal", "left_padding"])
def test_lengths_around_every_edge(length: int, mask: str) -> None:
    check(build(Case(mask, heads=(6, 3), sizes=(64, 80), lengths=(2, length))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "rows_first", "columns_first"])
@pytest.mark.parametrize("sizes", [(1, 1), (17, 13), (128, 200), (256, 256)], ids=str)
def test_sizes_layouts_and_types(dtype: torch.dtype, layout: str, sizes: tuple[int, int]) -> None:
    case = Case("causal", heads=(6, 2), sizes=sizes, lengths=(2, 577), layout=layout, dtype=dtype)
    check(build(case), dtype)


@pytest.mark.parametrize("mask", ["window", "sink_window", "outside", "dense", "dense_shared"])
@pytest.mark.parametrize("bias", ["none", "alibi", "relative", "dense", "row"])
@pytest.mark.parametrize("more", [{}, {"softcap": 3.0}, {"sinks": True}, {"scale": -0.3}], ids=str)
def test_masks_and_biases_over_several_chunks(mask: str, bias: str, more: dict) -> None:
    check(build(Case(mask, bias, heads=(4, 2), sizes=(24, 40), lengths=(3, 1531), **more)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 131), (37, 67), (72, 40), (131, 23)], ids=str)
@pytest.mark.parametrize("group", range(1, 9))
def test_a_head_gets_the_same_bits_alone_and_in_a_group(
    dtype: torch.dtype, sizes: tuple[int, int], group: int
) -> None:
    case = Case("none", heads=(group, 1), sizes=sizes, lengths=(1, 577), batch=1, dtype=dtype)
    built = build(case)
    check(built, dtype)
    query, key, value = built.problem.query, built.problem.key, built.problem.value
    together = built.run("native")
    for head in range(group):
        alone = mh.attention(query[:, head : head + 1], key, value, backend="native")
        assert torch.equal(together[:, head : head + 1], alone)


@pytest.mark.parametrize("number", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", range(2, 9))
def test_a_row_gets_the_same_bits_whatever_the_others_attend_to(
    dtype: torch.dtype, rows: int, number: float
) -> None:
    """The rows end around key 128: of the step that starts there they see nothing, or a few keys,
    which are broken."""
    query, key, value = (torch.randn(1, 1, n, 37).to(dtype) for n in (rows, 211, 211))
    key[:, :, 128:] += number
    value[:, :, 128:] += number
    start = 128 - rows // 2

    def run(first: int, last: int) -> torch.Tensor:
        return mh.attention(
            query[:, :, first:last], key, value, mask=mh.Causal(), query_start=start + first,
            backend="native",
        )  # fmt: skip

    together = run(0, rows)
    assert together[:, :, : rows // 2].isfinite().all()
    for row in range(rows):
        alone = run(row, row + 1)
        torch.testing.assert_close(
            together[:, :, row : row + 1], alone, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("edge", [64, 128, 192, 512])
def test_a_row_gets_the_same_bits_wherever_the_others_begin(dtype: torch.dtype, edge: int) -> None:
    """The first windows begin before an edge of runs, steps or chunks, the last ones after it."""
    query, key, value = (torch.randn(1, 1, n, 64).to(dtype) for n in (7, 1031, 1031))
    mask, start = mh.Window(30, 307), edge - 4 + 30

    def run(first: int, last: int) -> torch.Tensor:
        return mh.attention(
            query[:, :, first:last], key, value, mask=mask, query_start=start + first,
            backend="native",
        )  # fmt: skip

    together = run(0, 7)
    for row in range(7):
        assert torch.equal(together[:, :, row : row + 1], run(row, row + 1))


@pytest.mark.parametrize("mask", ["none", "causal", "sink_window", "dense_shared"])
def test_the_same_bits_for_any_batch_and_threads(mask: str, threads) -> None:
    built = build(Case(mask, heads=(6, 2), sizes=(64, 64), lengths=(2, 5003), batch=3))
    q, k, v = built.problem.query, built.problem.key, built.problem.value
    threads(1)
    whole = built.run("native")
    threads(2)
    assert torch.equal(built.run("native"), whole)
    last = Built(Problem(q[2:], k[2:], v[2:]), built.arguments)
    assert torch.equal(last.run("native"), whole[2:])


def test_many_calls_at_once_finish_each_head_once(threads) -> None:
    """The last of a head's chunks merges them: none missing, none twice, call after call."""
    threads(2)
    built = build(Case("none", heads=(4, 2), sizes=(16, 16), lengths=(1, 4099)))
    first = built.run("native")
    for _ in range(200):
        assert torch.equal(built.run("native"), first)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("mask", ["window", "outside", "dense"])
def test_what_no_query_attends_to_does_not_leak(mask: str, number: float) -> None:
    built = build(Case(mask, heads=(2, 1), sizes=(16, 24), lengths=(1, 1100)))
    clean = built.run("native")
    seen = torch.zeros(built.problem.key.shape[:3], dtype=torch.bool)
    allowed = mh.attention(  # which keys have any weight at all
        built.problem.query * 0, built.problem.key * 0,
        torch.eye(1100).expand(2, 1, 1100, 1100), backend="reference", **built.arguments,
    )  # fmt: skip
    seen |= (allowed != 0).any(dim=1, keepdim=True).any(dim=2)
    assert not seen.all()
    key, value = built.problem.key.clone(), built.problem.value.clone()
    key[~seen] = number
    value[~seen] = number
    dirty = Built(replace(built.problem, key=key, value=value), built.arguments)
    assert torch.equal(dirty.run("native"), clean)


def test_logits_of_ten_thousand_in_different_chunks() -> None:
    query = torch.ones(1, 1, 1, 4)
    key = torch.zeros(1, 1, 2000, 4)
    key[0, 0, [3, 700, 1900]] = torch.tensor([[1e4], [1e4 + 1], [-1e4]])
    value = torch.randn(1, 1, 2000, 5)
    out = mh.attention(query, key, value, scale=1.0, backend="native")
    exact = torch.softmax(torch.tensor([40000.0, 40004.0]), 0) @ value[0, 0, [3, 700]]
    torch.testing.assert_close(out[0, 0, 0], exact)


@pytest.mark.parametrize("start", [62, 63, 64, 127, 128, 511, 512])
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_a_range_that_ends_just_past_an_edge(start: int, mask: str) -> None:
    check(build(Case(mask, heads=(2, 1), sizes=(8, 8), lengths=(3, 700), query_start=start)))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_minus_infinity_in_a_dense_bias_masks_broken_values(number: float) -> None:
    query, key, value = (
        torch.randn(1, 2, 1, 8),
        torch.randn(1, 2, 600, 8),
        torch.randn(1, 2, 600, 9),
    )
    bias = torch.zeros(1, 1, 1, 600)
    bias[..., [5, 520]] = -math.inf
    clean = mh.attention(query, key, value, attn_bias=bias, backend="native")
    value[:, :, [5, 520]] = number
    assert torch.equal(mh.attention(query, key, value, attn_bias=bias, backend="native"), clean)
