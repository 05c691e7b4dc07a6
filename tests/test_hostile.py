"""Hostile numbers in every dtype: huge, all equal, below the normal ones, very many.

tests/test_attention.py runs this file on every instruction set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import Built, Case, build
from oracle import Problem, attend
from tolerance import assert_close_to_oracle, assert_gradients_close, assert_lse_close, eager
from torch import Tensor

import manyheads as mh

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
LENGTHS = pytest.mark.parametrize("lengths", [(1, 67), (61, 67)], ids=str)


def large(problem: Problem) -> Problem:
    """Logits of 1e4 and -1e4."""
    return replace(problem, scale=1e4 / problem.query.shape[-1] ** 0.5)


def equal(problem: Problem) -> Problem:
    return replace(problem, key=torch.ones_like(problem.key))


def one_huge(problem: Problem) -> Problem:
    key = problem.key.clone()
    key[:, :, 11] *= 100
    return replace(problem, key=key, scale=100 / problem.query.shape[-1] ** 0.5)


def subnormal(tensor: Tensor) -> Tensor:
    """Half of the numbers below the dtype's smallest normal one."""
    return tensor * torch.finfo(tensor.dtype).smallest_normal


KINDS: dict[str, Callable[[Problem], Problem]] = {
    "large": large,
    "all equal": equal,
    "one huge": one_huge,
    "subnormal queries": lambda p: replace(p, query=subnormal(p.query)),
    "subnormal keys": lambda p: replace(p, key=subnormal(p.key)),
    "subnormal values": lambda p: replace(p, value=subnormal(p.value)),
}


def hostile(kind: str, lengths: tuple[int, int], dtype: torch.dtype) -> Built:
    built = build(Case("causal", "none", (4, 2), (32, 32), lengths, batch=7, dtype=dtype))
    problem = KINDS[kind](built.problem)
    return Built(problem, {**built.arguments, "scale": problem.scale})


def check(built: Built, dtype: torch.dtype) -> None:
    out, lse = built.run("native", return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    (exact, exact_lse), (plain, _) = attend(built.problem), eager(built.problem, dtype)
    assert_close_to_oracle(out, exact, plain, dtype)
    assert_lse_close(lse, exact_lse, eager(built.problem, torch.float32)[1], built.problem)


def check_gradients(built: Built, dtype: torch.dtype, factor: float = 1.0) -> None:
    grad_out = torch.randn(built.problem.query.shape).to(dtype) * factor
    assert_gradients_close(
        built.problem, grad_out, dtype, lambda p: Built(p, built.arguments).run("native")
    )


@DTYPES
@LENGTHS
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_numbers(kind: str, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    check(hostile(kind, lengths, dtype), dtype)


@DTYPES
@LENGTHS
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_hostile_numbers(
    kind: str, lengths: tuple[int, int], dtype: torch.dtype
) -> None:
    check_gradients(hostile(kind, lengths, dtype), dtype)


@DTYPES
def test_subnormal_gradients(dtype: torch.dtype) -> None:
    built = build(Case("causal", "none", (4, 2), (32, 32), (61, 67), dtype=dtype))
    check_gradients(built, dtype, torch.finfo(dtype).smallest_normal)


@DTYPES
@pytest.mark.parametrize("kind", ["random", "all equal"])
def test_65536_keys(kind: str, dtype: torch.dtype) -> None:
    built = build(Case("causal", "none", (2, 1), (16, 16), (11, 65536), batch=1, dtype=dtype))
    if kind == "all equal":
        built = Built(equal(built.problem), built.arguments)
    check(built, dtype)
    check_gradients(built, dtype)


@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 11], ids=str)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("masked", [False, True])
def test_a_broken_value_counts_however_small_its_weight(
    masked: bool, bad: float, rows: int, dtype: torch.dtype
) -> None:
    """0 times infinity is not a number: what is attended to is not what is masked."""
    query, key, value = (torch.randn(1, 1, n, 32).to(dtype) for n in (rows, 67, 67))
    query[..., 0], key[..., 0], key[0, 0, 11, 0] = 1, 0, -1e4
    value[0, 0, 11, 5] = bad
    allowed = torch.ones(rows, 67, dtype=torch.bool)
    allowed[-1, 11 if rows > 1 else 12] = not masked
    allowed[:, 13] = not masked
    out = mh.attention(query, key, value, mask=allowed, scale=1.0, backend="native")
    exact, _ = attend(Problem(query, key, value, allowed, scale=1.0))
    assert not exact[0, 0, 0, 5].isfinite()
    assert torch.equal(out.isfinite(), exact.isfinite())
