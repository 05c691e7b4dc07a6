"""bfloat16 and float16 in the kernels: every value widened, every rounding, and what runs where."""

import math

import pytest
import torch
from cases import Built, Case, build
from oracle import Problem, attend
from tolerance import assert_close_to_oracle, assert_gradients_close, assert_lse_close, eager

import manyheads as mh
from manyheads import _ops
from manyheads.backends import native

#: The types that the kernels in use multiply as they are: weights are rounded to them.
PAIRS = {
    "amx_fp16": (torch.bfloat16, torch.float16),
    "amx": (torch.bfloat16,),
    "avx512_bf16": (torch.bfloat16,),
}.get(mh.info().isa, ())
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 bit patterns."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)


def as_multiplied(value: torch.Tensor, rows: int) -> torch.Tensor:
    """`value` as the kernels take it from a block of `rows` queries; decoding always widens.

    In products of bfloat16 pairs subnormal numbers count as 0.
    """
    decoding = rows <= 8
    if decoding or value.dtype != torch.bfloat16 or value.dtype not in PAIRS:
        return value
    return torch.where(value.abs() < torch.finfo(value.dtype).tiny, 0, value)


@HALF
@pytest.mark.parametrize("rows", [1, 11])
def test_every_value_is_widened_and_narrowed_exactly(dtype: torch.dtype, rows: int) -> None:
    """One key: its value is the output. The sum that starts at +0 turns -0 into +0."""
    value = every_value(dtype).view(1, 256, 1, 256)
    query = torch.zeros(1, 256, rows, 8, dtype=dtype)
    out = mh.attention(query, query[:, :, :1], value, backend="native")
    expected = as_multiplied(value, rows).expand_as(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@HALF
@pytest.mark.parametrize("rows", [1, 11])
def test_every_tie_is_rounded_to_even(dtype: torch.dtype, rows: int) -> None:
    """Two keys of equal weight with neighbouring values: the mean is half way, or overflows."""
    low = every_value(dtype)
    high = (low.view(torch.int16) + 1).view(dtype)
    value = torch.stack([low, high], dim=0).view(2, 256, 256).transpose(0, 1)[None]
    query = torch.zeros(1, 256, rows, 8, dtype=dtype)
    key = query[:, :, :1].expand(1, 256, 2, 8)
    out = mh.attention(query, key, value, backend="native")
    expected = as_multiplied(value, rows).float().mean(dim=2, keepdim=True).to(dtype).expand_as(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@HALF
@pytest.mark.parametrize("sizes", [(1, 3), (23, 17), (61, 19)], ids=str)
@pytest.mark.parametrize("lengths", [(1, 131), (67, 259)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "rows_first"])
def test_sizes_that_no_vector_divides(
    dtype: torch.dtype, sizes: tuple[int, int], lengths: tuple[int, int], layout: str
) -> None:
    built = build(Case("causal", "none", (6, 2), sizes, lengths, dtype=dtype, layout=layout))
    exact, _ = attend(built.problem)
    plain, _ = eager(built.problem, dtype)
    out = built.run("native")
    assert out.dtype == dtype
    assert_close_to_oracle(out, exact, plain, dtype)


@HALF
@pytest.mark.parametrize("rows", [2, 41])
def test_results_are_float32_results_rounded_once(dtype: torch.dtype, rows: int) -> None:
    """Except for products of pairs, which the numerics rule holds for and no more."""
    problem = build(Case("none", "none", (3, 3), (37, 37), (rows, 157), dtype=dtype)).problem
    query, key, value = (x.to(dtype) for x in (problem.query, problem.key, problem.value))
    out, lse = mh.attention(query, key, value, return_lse=True, backend="native")
    wide, wide_lse = mh.attention(
        query.float(), key.float(), value.float(), return_lse=True, backend="native"
    )
    assert lse.dtype == torch.float32
    if dtype in PAIRS and rows > 2:
        exact, exact_lse = attend(problem)
        assert_close_to_oracle(out, exact, eager(problem, dtype)[0], dtype)
        assert_lse_close(lse, exact_lse, eager(problem, torch.float32)[1], problem)
        assert not torch.equal(out, wide.to(dtype)), (
            "weights are rounded where pairs are multiplied"
        )
    else:
        assert torch.equal(out, wide.to(dtype))
        assert torch.equal(lse, wide_lse)


@HALF
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", [0, 57, 130])
def test_a_value_not_finite_reaches_only_rows_that_attend_to_it(
    dtype: torch.dtype, bad: float, key: int
) -> None:
    """And changes no bit of the others, which share tiles and blocks with them."""
    query, keys, value = (torch.randn(1, 3, 131, 37).to(dtype) for _ in range(3))
    before = mh.attention(query, keys, value, mask=mh.Causal(), backend="native")
    value[:, :, key, 5] = bad
    after = mh.attention(query, keys, value, mask=mh.Causal(), backend="native")
    hit = torch.zeros(131, 37, dtype=torch.bool)
    hit[key:, 5] = True
    assert not after[:, :, hit].isfinite().any()
    assert torch.equal(after[:, :, ~hit], before[:, :, ~hit])


@HALF
def test_many_small_weights_count(dtype: torch.dtype) -> None:
    """65,536 keys of weight 9e-8 beside one of weight 1: float16 alone would round them to 6e-8."""
    keys, small = 65537, math.log(2.0**-23.5)
    query = torch.ones(1, 1, 11, 1, dtype=dtype)
    key = torch.full((1, 1, keys, 1), small).to(dtype)
    value = torch.ones(1, 1, keys, 1, dtype=dtype)
    key[:, :, 77], value[:, :, 77] = 0, 0
    problem = Problem(query.double(), key.double(), value.double(), scale=1.0)
    exact, _ = attend(problem)
    out = mh.attention(query, key, value, scale=1.0, backend="native")
    assert_close_to_oracle(out, exact, eager(problem, torch.float32)[0].to(dtype), dtype)


@HALF
@pytest.mark.parametrize("layout", ["contiguous", "rows_first"])
@pytest.mark.parametrize("mask", ["none", "causal", "sink_window", "dense", "nothing"])
def test_gradients(dtype: torch.dtype, mask: str, layout: str) -> None:
    built = build(Case(mask, "alibi", (6, 2), (23, 17), (67, 131), dtype=dtype, layout=layout))
    grad_out = torch.randn(2, 6, 67, 17).to(dtype)

    def run(problem: Problem) -> torch.Tensor:
        out = Built(problem, built.arguments).run("native")
        assert out.dtype == dtype
        return out

    assert_gradients_close(built.problem, grad_out, dtype, run)


@HALF
def test_gradients_are_float32_gradients_rounded_once(dtype: torch.dtype) -> None:
    """But for the output, which the backward pass sees rounded: of this one every bit is zero.

    Where pairs are multiplied the forward pass may sum scores in another order.
    """
    leaves = [torch.randn(2, 3, n, 37).to(dtype).requires_grad_() for n in (41, 157, 157)]
    with torch.no_grad():
        leaves[2].zero_()
    out = mh.attention(*leaves, mask=mh.Window(9, 9), backend="native")
    grad_out = torch.randn_like(out)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    wide_out = mh.attention(*wide, mask=mh.Window(9, 9), backend="native")
    found = torch.autograd.grad(out, leaves, grad_out)
    exact = torch.autograd.grad(wide_out, wide, grad_out.float())
    assert {gradient.dtype for gradient in found} == {dtype}
    same = [torch.equal(ours, other.to(dtype)) for ours, other in zip(found, exact, strict=True)]
    assert all(same) or dtype in PAIRS


@HALF
def test_pytorch_is_preferred_where_it_has_a_matrix_unit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = torch.randn(1, 3, 67, 8).to(dtype), torch.randn(1, 3, 71, 8).to(dtype)
    kernels = _ops.cpu_kernels()
    tiles = (kernels.name or "").startswith("amx")
    assert not (tiles and set(PAIRS) & set(kernels.matrix_dtypes))

    def chosen(q: torch.Tensor = query, **arguments: object) -> str | None:
        return mh.explain(q, key, key, **arguments).backend

    monkeypatch.setattr(native._ops, "cpu_kernels", lambda: kernels._replace(matrix_dtypes=()))
    assert chosen() == chosen(mask=mh.Causal()) == "native"
    unit = kernels._replace(matrix_dtypes=(dtype,))
    monkeypatch.setattr(native._ops, "cpu_kernels", lambda: unit)
    assert "matrix unit" in str(mh.explain(query, key, key))
    assert chosen() == chosen(strict=True) == chosen(mask=mh.Causal(), query_start=0) == "sdpa"
    for arguments in ({"mask": mh.Window(5, 0)}, {"softcap": 3.0}, {"return_lse": True}):
        assert chosen(**arguments) == "native", arguments
    assert chosen(query[:, :, :1]) == "native"
    assert chosen(backend="native") == "native"
    assert mh.attention(query, key, key, backend="native").dtype == dtype
