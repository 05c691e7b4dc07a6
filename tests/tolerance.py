"""The one numerics rule of the project (DESIGN.md, section 7).

    error <= 2 * (error of eager attention in the same dtype + eps(dtype) * max|oracle|)

per head, over all rows of the batch; every value finite where the oracle is. The oracle is float64;
for float64 inputs its own error counts, as eps * max|oracle| once more. If eager attention in the
same dtype is not finite (float16 overflows), float32 eager rounded to the dtype takes its place.
docs/decisions/0001-numerics-rule-details.md says what else the rule leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from oracle import Problem, attend
from torch import Tensor


def eager(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) of plain attention with every step in `dtype`."""
    out, lse = attend(problem, dtype)
    if not out.isfinite().all():
        out, lse = (x.to(dtype) for x in attend(problem, torch.float32))
    return out, lse


def assert_close_to_oracle(
    actual: Tensor,
    oracle: Tensor,
    eager: Tensor,
    dtype: torch.dtype,
    floor: float = 0.0,
) -> None:
    """Assert the rule for outputs [B, H, L, Dv] or [B, H, L].

    oracle: float64. eager: of the same dtype as the inputs. floor: absolute, 0 for outputs; for
    gradients what exact cancellation leaves (Lk = 1, one huge logit). Entries where the oracle is
    not finite must be non-finite in `actual`.
    """
    assert actual.shape == oracle.shape == eager.shape, (actual.shape, oracle.shape, eager.shape)
    finite = oracle.isfinite()
    assert torch.equal(actual.isfinite(), finite), "finite exactly where the oracle is"
    if not actual.numel():
        return
    zero = torch.zeros((), dtype=torch.float64)
    exact = torch.where(finite, oracle, zero)
    error = torch.where(finite, (actual.double() - exact).abs(), zero)
    eager_error = torch.where(finite, (eager.double() - exact).abs(), zero).nan_to_num()

    def per_head(x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1).amax(-1)

    eps = torch.finfo(dtype).eps * (2 if dtype == torch.float64 else 1)
    largest = per_head(exact.abs())
    allowed = 2 * (per_head(eager_error) + eps * largest) + floor
    excess = per_head(error) - allowed
    worst = int(excess.argmax())
    assert (excess <= 0).all(), (
        f"head {worst}: error {per_head(error)[worst]:.3e} is more than the allowed "
        f"{allowed[worst]:.3e}; eager's own error: {per_head(eager_error)[worst]:.3e}"
    )


def assert_lse_close(actual: Tensor, oracle: Tensor, eager: Tensor, problem: Problem) -> None:
    """The rule for lse = max + log(sum), [B, Hq, Lq], float32 whatever the inputs are.

    Its floor is eps times the sizes of what cancels in it: a score is a sum of products as large
    as scale |q| |k|, the bias is added to it, and log(sum) is at most log(Lk + 1).
    """
    assert actual.dtype == torch.float32
    assert torch.equal(actual == -torch.inf, oracle == -torch.inf), "-inf where the oracle is"
    scale = problem.scale if problem.scale is not None else problem.query.shape[-1] ** -0.5
    lengths = (_largest(x.double().norm(dim=-1)) for x in (problem.query, problem.key))
    size = abs(scale) * math.prod(lengths) + math.log(problem.key.shape[2] + 1)
    size += _largest(problem.bias) if problem.bias is not None else 0.0
    floor = torch.finfo(torch.float32).eps * size
    assert_close_to_oracle(actual, oracle, eager.float(), torch.float32, floor)


def assert_gradients_close(
    problem: Problem,
    grad_out: Tensor,
    dtype: torch.dtype,
    run: Callable[[Problem], Tensor],
) -> None:
    """The rule for dQ, dK, dV of `run`, which gets the problem with leaves for inputs.

    grad_out [B, Hq, Lq, Dv] is what flows back into the output.
    """

    def gradients(run: Callable[[Problem], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = run(replace(problem, query=leaves[0], key=leaves[1], value=leaves[2]))
        return list(torch.autograd.grad(out, leaves, grad_out.to(out.dtype)))

    inputs = (problem.query, problem.key, problem.value)
    exact = gradients(lambda p: attend(p)[0], torch.float64)
    plain = gradients(lambda p: attend(p, dtype)[0], dtype)
    actual = gradients(run, dtype)
    head_dim, value_dim = problem.query.shape[-1], problem.value.shape[-1]
    scale = problem.scale if problem.scale is not None else head_dim**-0.5
    common = torch.finfo(dtype).eps * abs(scale) * (head_dim * value_dim) ** 0.5
    common *= _largest(grad_out) * _largest(problem.value)
    floors = (common * _largest(problem.key), common * _largest(problem.query), 0.0)
    for ours, oracle, eager, floor in zip(actual, exact, plain, floors, strict=True):
        assert_close_to_oracle(ours, oracle, eager, dtype, floor)


def logit_gradient_floor(
    problem: Problem, grad_out: Tensor, dtype: torch.dtype = torch.float32
) -> float:
    """What exact cancellation leaves in the gradient of a logit, P * (dP - sum of P * dP)."""
    eps = torch.finfo(dtype).eps
    return eps * _largest(grad_out) * _largest(problem.value) * problem.value.shape[-1] ** 0.5


def assert_derived_close(actual: Tensor, expected: Tensor) -> None:
    """Two float32 results of long chains of derivatives: within 1e-5 of the largest entry."""
    largest = _largest(expected.detach())
    assert largest > 0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-5 * largest)


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor) -> None:
    """One result, computed twice in different orders: within 2 eps(dtype) of the largest entry."""
    assert actual.dtype == expected.dtype
    atol = 2 * torch.finfo(expected.dtype).eps * _largest(expected)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=atol)


def assert_close_to_onnx(actual: Tensor, expected: Tensor) -> None:
    """The tolerance ONNX's own backend tests use; half types get room for another order of sums."""
    assert actual.dtype == expected.dtype
    half = expected.dtype in (torch.float16, torch.bfloat16)
    rtol = max(1e-3, torch.finfo(expected.dtype).eps)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=2e-3 if half else 1e-7)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
