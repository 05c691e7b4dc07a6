"""Corners of the kernel, one test each: tails, hulls, strides, far positions, huge logits."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import Problem, attend
from tolerance import assert_close_to_oracle, assert_lse_close, eager
from torch import Tensor

import manyheads as mh


def random(q_len: int, k_len: int, batch: int = 1, heads: int = 2, width: int = 8) -> list[Tensor]:
    """Query, key, value with as many key/value heads as query heads."""
    return [torch.randn(batch, heads, length, width) for length in (q_len, k_len, k_len)]


def check(problem: Problem, **arguments: object) -> None:
    """The native output and lse against the oracle, under the numerics rule."""
    inputs = (problem.query, problem.key, problem.value)
    out, lse = mh.attention(*inputs, **arguments, return_lse=True, backend="native")
    (exact, exact_lse), (plain, plain_lse) = attend(problem), eager(problem, torch.float32)
    assert_close_to_oracle(out, exact, plain, torch.float32)
    assert_lse_close(lse, exact_lse, plain_lse, problem)


def check_like_reference(*inputs: Tensor, **arguments: object) -> None:
    """Output and lse finite and equal to the reference's, as near as two float32 results can be."""
    arguments["return_lse"] = True
    out, lse = mh.attention(*inputs, **arguments, backend="native")
    assert out.isfinite().all() and lse.isfinite().all()
    expected = mh.attention(*inputs, **arguments, backend="reference")
    torch.testing.assert_close((out, lse), expected)


# Values and keys that are not finite.


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("value_dim", [17, 61])
def test_guard_reads_the_last_columns_of_a_value(value_dim: int, number: float) -> None:
    """Value sizes that are no multiple of a vector; key 20 is masked for the rows before it."""
    query, key, _ = random(41, 41)
    value = torch.randn(1, 2, 41, value_dim)
    clean = mh.attention(query, key, value, mask=mh.Causal(), backend="native")
    value[:, :, 20, -1] = number
    out = mh.attention(query, key, value, mask=mh.Causal(), backend="native")
    torch.testing.assert_close(out[:, :, :20], clean[:, :, :20])
    torch.testing.assert_close(out[..., :-1], clean[..., :-1])
    assert not out[:, :, 20:, -1].isfinite().any()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key_index", [3, 150])
def test_minus_infinity_in_a_dense_bias_masks_broken_values(number: float, key_index: int) -> None:
    query, key, value = random(199, 199, batch=2)
    value[1, 0, key_index, 2] = number  # all else of the batch is finite
    allowed = torch.ones(199, 199, dtype=torch.bool).tril()
    bias = torch.zeros(199, 199).masked_fill(~allowed, -math.inf)
    out = mh.attention(query, key, value, attn_bias=bias, backend="native")
    expected = mh.attention(query, key, value, mask=allowed, backend="native")
    assert (~expected.isfinite()).sum() == 199 - key_index
    torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize("q_len", [1, 67])
def test_unmasked_keys_that_score_minus_infinity(q_len: int) -> None:
    """The whole first block of keys, then some: the running maximum stays -inf for a while."""
    query, key, value = random(q_len, 200)
    key[:, :, :135] = -math.inf
    check(Problem(query.abs() + 0.1, key, value))


# Softmax of numbers far apart.


@pytest.mark.parametrize("height", [20.0, 100.0, 1000.0])
@pytest.mark.parametrize("q_len", [1, 67])
def test_sinks_far_above_every_score(height: float, q_len: int) -> None:
    check_like_reference(*random(q_len, 67), sinks=torch.tensor([height, height / 2]))


@pytest.mark.parametrize("low", [-1e10, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("pad", [5, 130, 200])
@pytest.mark.parametrize("mask", [None, mh.Causal()], ids=repr)
def test_a_bias_that_masks_softly(low: float, pad: int, mask: mh.Mask | None) -> None:
    """Rows that see only low keys weigh them alike, whatever the exponent of `low`."""
    bias = torch.zeros(200, 200)
    bias[:, :pad] = low
    check_like_reference(*random(200, 200), attn_bias=bias, mask=mask)


@pytest.mark.parametrize("unit", [2.0**30, 2.0**35, 2.0**40])
@pytest.mark.parametrize("sinks", [None, torch.zeros(2)], ids=["plain", "sinks"])
def test_logits_of_a_billion_and_more(unit: float, sinks: Tensor | None) -> None:
    """Multiples of `unit`, exact in float32, so that no order of summation changes the winner."""
    query, key = (torch.randint(-4, 5, (1, 2, 200, 4)).float() for _ in range(2))
    value = torch.randn(1, 2, 200, 8)
    check_like_reference(query * unit, key, value, sinks=sinks, mask=mh.Causal())
    check_like_reference(query * unit, key, value, sinks=sinks, scale=-1.0)


# Masks.


@pytest.mark.parametrize("pad", [7, torch.tensor([0, 11, 40])], ids=["int", "per_batch"])
def test_first_keys_count_from_the_start_of_the_keys(pad: int | Tensor) -> None:
    query, key, value = random(61, 61, batch=3)
    mask = mh.KeyRange(pad, None) & mh.Causal() & (mh.Window(3, 0) | mh.FirstKeys(2))
    start = torch.as_tensor(pad).reshape(-1, 1, 1, 1)
    p, j = torch.arange(61)[:, None], torch.arange(61)
    allowed = (j >= start) & (j <= p) & ((j >= p - 3) | (j < start + 2))
    check(Problem(query, key, value, allowed), mask=mask)


@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
def test_documents_of_each_batch_element(alibi: bool) -> None:
    """Queries and keys of a document differ in length, so positions differ by batch element."""
    q_lengths, k_lengths = [[13, 30, 10], [40, 13]], [[20, 41, 10], [41, 30]]
    query, key, value = random(53, 71, batch=2)
    allowed = torch.zeros(2, 1, 53, 71, dtype=torch.bool)
    position = torch.zeros(2, 1, 53, 1, dtype=torch.int64)
    for b in range(2):
        row = start = 0
        for rows, keys in zip(q_lengths[b], k_lengths[b], strict=True):
            p = start + keys - rows + torch.arange(rows)[:, None]
            j = torch.arange(start, start + keys)
            allowed[b, 0, row : row + rows, start : start + keys] = j <= p
            position[b, 0, row : row + rows] = p
            row, start = row + rows, start + keys
    slopes = torch.tensor([0.5, 0.1])
    bias = -slopes.double()[:, None, None] * (torch.arange(71) - position).abs()
    check(
        Problem(query, key, value, allowed, bias if alibi else None),
        mask=mh.Documents(q_lengths, k_lengths) & mh.Causal(),
        attn_bias=mh.Alibi(slopes) if alibi else None,
    )


@pytest.mark.parametrize("plan", ["intervals", "dense"])
@pytest.mark.parametrize("order", ["descending", "ascending"])
def test_runs_of_keys_in_any_order_of_rows(plan: str, order: str) -> None:
    """Work items of several tiles; the first tile's keys are not the other tiles' keys."""
    query, key, value = random(499, 499, batch=2, heads=8)
    start, j = torch.arange(499)[:, None], torch.arange(499)
    if order == "descending":
        start = start.flip(0)
    allowed = (j >= start) & (j < start + 5)
    if plan == "dense":
        allowed[250] = j % 2 == 0  # more runs than intervals take
    assert mh.explain(query, key, value, mask=allowed).plan == plan
    check(Problem(query, key, value, allowed), mask=allowed)


@pytest.mark.parametrize("plan", ["intervals", "dense"])
def test_every_byte_but_zero_in_a_bool_mask_means_true(plan: str) -> None:
    """Bools that were made by a view of bytes; torch's own comparisons write only 0 and 1."""
    numbers = torch.tensor([0, 1, 2, 255], dtype=torch.uint8)
    true = torch.rand(67, 200) < 0.5
    if plan == "intervals":
        true = torch.arange(200) <= torch.arange(67)[:, None] + 100
    mask = (numbers[torch.randint(1, 4, (67, 200))] * true).view(torch.bool)
    query, key, value = random(67, 200)
    check(Problem(query, key, value, true), mask=mask)


def far_apart(x: Tensor, axis: int) -> Tensor:
    """A copy whose neighbours along `axis` lie 2^31 numbers apart: most of its memory is unused."""
    strides = [*x.contiguous().stride()]
    strides[axis] = 2**31 + 7
    size = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
    return torch.empty(size, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("rows", [2, 17])
def test_offsets_past_32_bits(axis: int, which: str, rows: int) -> None:
    sizes = {name: [2, 2, 67, 19] for name in ("query", "key", "value")}
    sizes["query"][2] = rows
    if axis == 2:  # every row so far from the next
        sizes = {name: [1, 1, 2, 19] for name in sizes}
        sizes["query"][2] = rows if which != "query" else 2
    near = {name: torch.randn(size).bfloat16() for name, size in sizes.items()}
    results = []
    for inputs in (near, {**near, which: far_apart(near[which], axis)}):
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        with torch.no_grad():
            decoded = mh.attention(*leaves, mask=mh.Causal(), query_start=1, backend="native")
        out = mh.attention(*leaves, mask=mh.Causal(), query_start=1, backend="native")
        results.append((decoded, out, *torch.autograd.grad(out.sum(), leaves)))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


# Positions.


FAR = [
    *(torch.tensor([x]) for x in (2**31 - 1, -(2**31), 2**30, 2**32 + 5)),
    *(2**29 - 2, -(2**29 - 2)),
]


@pytest.mark.parametrize("start", FAR, ids=str)
@pytest.mark.parametrize(
    "mask", [None, mh.Causal(), mh.Window(3, None), mh.KeyRange(2, None)], ids=repr
)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_queries_far_from_all_keys(start: int | Tensor, mask: mh.Mask | None, backend: str) -> None:
    """Positions that leave int32 when a window or a row number is added to them."""
    query, key, value = random(41, 61)
    after, j = int(start) > 0, torch.arange(61)
    allowed = {
        None: j >= 0,
        repr(mh.Causal()): j < (61 if after else 0),
        repr(mh.Window(3, None)): j < (0 if after else 61),
        repr(mh.KeyRange(2, None)): j >= 2,
    }[None if mask is None else repr(mask)]
    problem = Problem(query, key, value, allowed)
    out = mh.attention(query, key, value, mask=mask, query_start=start, backend=backend)
    plain, _ = eager(problem, torch.float32)
    assert_close_to_oracle(out, attend(problem)[0], plain, torch.float32)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str
)
def test_numbers_of_every_integer_dtype(dtype: torch.dtype) -> None:
    """A start, and a mask's numbers, whose sums and limits a narrow dtype cannot hold."""
    query, key, value = torch.randn(2, 1, 5, 8), *torch.randn(2, 2, 1, 127, 8)
    numbers = torch.tensor([97, 113])
    narrow = numbers.to(dtype)
    for mask in (mh.Causal(), mh.Window(7, 3) | mh.FirstKeys(2)):
        out = mh.attention(query, key, value, mask=mask, query_start=narrow)
        assert torch.equal(out, mh.attention(query, key, value, mask=mask, query_start=numbers))
    lengths, rest = torch.tensor([3, 2]), torch.tensor([120, 7])
    for of in (
        lambda wide, few, many: mh.Causal() & mh.KeyLengths(wide),
        lambda wide, few, many: mh.KeyRange(wide, None) & mh.Chunks(3) & mh.FirstKeys(few),
        lambda wide, few, many: mh.Causal() & mh.Documents(few, many),
        lambda wide, few, many: ~mh.QueryRows(few),
    ):
        expected = mh.attention(query, key, value, mask=of(numbers, lengths, rest))
        mask = of(narrow, lengths.to(dtype), rest.to(dtype))
        assert torch.equal(mh.attention(query, key, value, mask=mask), expected)


def test_alibi_where_float32_cannot_count() -> None:
    """Keys and queries beyond 2**24: every other position is no float32. Only 64 keys are read."""
    near, k_len, start = 64, 2**24 + 128, 2**24 + 77
    key, value = torch.empty(1, 1, k_len, 1), torch.empty(1, 1, k_len, 1)
    for x in (key, value):
        x[:, :, -256:] = torch.randn(1, 1, 256, 1)
    query, slopes = torch.randn(1, 1, 31, 1), torch.tensor([0.5])
    mask = mh.Window(near - 1, 0)
    arguments = dict(mask=mask, attn_bias=mh.Alibi(slopes), query_start=start, backend="native")
    out = mh.attention(query, key, value, **arguments)
    distance = start + torch.arange(31)[:, None] - torch.arange(k_len - 256, k_len)
    allowed, bias = (distance >= 0) & (distance < near), -0.5 * distance.abs().double()
    problem = Problem(query, key[:, :, -256:], value[:, :, -256:], allowed, bias)
    plain, _ = eager(problem, torch.float32)
    assert_close_to_oracle(out, attend(problem)[0], plain, torch.float32)


# Shapes.


@pytest.mark.parametrize("lengths", [(1, 67), (67, 67)], ids=str)
def test_71_query_heads_on_one_key_head(lengths: tuple[int, int]) -> None:
    q_len, k_len = lengths
    query = torch.randn(2, 71, q_len, 16)
    key, value = torch.randn(2, 1, k_len, 16), torch.randn(2, 1, k_len, 17)
    check_like_reference(query, key, value, mask=mh.Causal())


def test_no_keys_with_a_strided_last_axis() -> None:
    empty = torch.randn(1, 2, 4, 8).mT[:, :, :0]
    query = torch.randn(1, 2, 5, 4)
    out = mh.attention(query, empty, empty, backend="native")
    assert torch.equal(out, torch.zeros(1, 2, 5, 4))
    bias = torch.randn(1, 2, 7, 5).mT[..., :0]
    out = mh.attention(query, empty, empty, attn_bias=bias, backend="native")
    assert torch.equal(out, torch.zeros(1, 2, 5, 4))


def test_no_queries_with_a_strided_last_axis() -> None:
    empty = torch.randn(1, 2, 4, 8).mT[:, :, :0]
    key, bias = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 7).mT[:, :, :0]
    assert mh.attention(empty, key, key, backend="native").shape == (1, 2, 0, 4)
    out = mh.attention(empty, key, key, attn_bias=bias, backend="native")
    assert out.shape == (1, 2, 0, 4)


# Keys and values whose rows lie apart, of which packed copies are kept.


@pytest.mark.parametrize("apart", ["key", "value", "both"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("mask", [None, mh.Causal() & mh.Window(300, 0)])
def test_packed_copies_are_of_this_call_and_block(
    apart: str, heads: int, mask: mh.Mask | None
) -> None:
    """More blocks of keys than copies that are kept, and two calls of one shape."""
    inputs = random(1500, 1500, heads=heads, width=256)
    for _ in range(2):
        expected = mh.attention(*inputs, mask=mask, backend="native")
        query, key, value = inputs
        if apart != "value":
            key = key.transpose(1, 2).contiguous().transpose(1, 2)
        if apart != "key":
            value = value.transpose(1, 2).contiguous().transpose(1, 2)
        out = mh.attention(query, key, value, mask=mask, backend="native")
        assert torch.equal(out, expected)
        for tensor in inputs:
            tensor.mul_(-0.5)
