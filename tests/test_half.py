"""bfloat16 and float16 in the kernels: every value widened, every rounding, and what runs where."""

import pytest
import torch
from cases import Built, Case, build
from oracle import Problem, attend
from tolerance import assert_close_to_oracle, assert_gradients_close, eager

import manyheads as mh
from manyheads import _ops
from manyheads.backends import native

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 bit patterns."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)


@HALF
def test_every_value_is_widened_and_narrowed_exactly(dtype: torch.dtype) -> None:
    """One key: its value is the output. The sum that starts at +0 turns -0 into +0."""
    value = every_value(dtype).view(1, 256, 1, 256)
    query = torch.zeros(1, 256, 1, 8, dtype=dtype)
    out = mh.attention(query, query, value, backend="native")
    torch.testing.assert_close(out, value, rtol=0, atol=0, equal_nan=True)


@HALF
def test_every_tie_is_rounded_to_even(dtype: torch.dtype) -> None:
    """Two keys of equal weight with neighbouring values: the mean is half way, or overflows."""
    low = every_value(dtype)
    high = (low.view(torch.int16) + 1).view(dtype)
    value = torch.stack([low, high], dim=0).view(2, 256, 256).transpose(0, 1)[None]
    query = torch.zeros(1, 256, 1, 8, dtype=dtype)
    out = mh.attention(query, query.expand(1, 256, 2, 8), value, backend="native")
    expected = value.float().mean(dim=2, keepdim=True).to(dtype)
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
def test_results_are_float32_results_rounded_once(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 3, length, 37).to(dtype) for length in (41, 157, 157))
    out, lse = mh.attention(query, key, value, return_lse=True, backend="native")
    wide, wide_lse = mh.attention(
        query.float(), key.float(), value.float(), return_lse=True, backend="native"
    )
    assert torch.equal(out, wide.to(dtype))
    assert lse.dtype == torch.float32 and torch.equal(lse, wide_lse)


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
    """But for the output, which the backward pass sees rounded: of this one every bit is zero."""
    leaves = [torch.randn(2, 3, n, 37).to(dtype).requires_grad_() for n in (41, 157, 157)]
    with torch.no_grad():
        leaves[2].zero_()
    out = mh.attention(*leaves, mask=mh.Window(9, 9), backend="native")
    grad_out = torch.randn_like(out)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    wide_out = mh.attention(*wide, mask=mh.Window(9, 9), backend="native")
    found = torch.autograd.grad(out, leaves, grad_out)
    for ours, exact in zip(
        found, torch.autograd.grad(wide_out, wide, grad_out.float()), strict=True
    ):
        assert ours.dtype == dtype and torch.equal(ours, exact.to(dtype))


@HALF
def test_pytorch_is_preferred_where_it_has_a_matrix_unit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = torch.randn(1, 3, 67, 8).to(dtype), torch.randn(1, 3, 71, 8).to(dtype)
    kernels = _ops.cpu_kernels()

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
