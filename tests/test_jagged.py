"""Jagged nested tensors: each sequence gets what it would get alone, and no padding is computed."""

import pytest
import torch
from tolerance import assert_equal_up_to_rounding
from torch import Tensor

import manyheads as mh

LENGTHS, KEY_LENGTHS = (5, 1, 131, 0, 17), (7, 3, 67, 2, 19)


def jagged(lengths: tuple[int, ...], *tail: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, L*, *tail]"""
    sequences = [torch.randn(n, *tail).to(dtype) for n in lengths]
    return torch.nested.nested_tensor(sequences, layout=torch.jagged)


def heads(lengths: tuple[int, ...], count: int, width: int, **more: torch.dtype) -> Tensor:
    """[B, count, L*, width]"""
    return jagged(lengths, count, width, **more).transpose(1, 2)


def alone(tensor: Tensor) -> list[Tensor]:
    """[1, H, L, D] of each sequence."""
    return [x.transpose(0, 1)[None] for x in tensor.transpose(1, 2).unbind()]


MASKS = {
    "none": None,
    "causal": mh.Causal(),
    "window": mh.Causal() & mh.Window(9, 0),
    "sinks": mh.Causal() & (mh.Window(4, 0) | mh.FirstKeys(2)),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_each_sequence_as_if_alone(mask: str, dtype: torch.dtype, backend: str) -> None:
    query = heads(LENGTHS, 6, 13, dtype=dtype)
    key, value = heads(LENGTHS, 2, 13, dtype=dtype), heads(LENGTHS, 2, 11, dtype=dtype)
    arguments = {"mask": MASKS[mask], "attn_bias": mh.Alibi(), "return_lse": True}
    out, lse = mh.attention(query, key, value, backend=backend, **arguments)
    assert out.is_nested and out.shape[2] == query.shape[2] and out.dtype == dtype
    sequences = zip(alone(query), alone(key), alone(value), strict=True)
    for i, (q, k, v) in enumerate(sequences):
        expected, expected_lse = mh.attention(q, k, v, backend=backend, **arguments)
        assert_equal_up_to_rounding(alone(out)[i], expected)
        torch.testing.assert_close(lse.transpose(1, 2).unbind()[i].T[None], expected_lse)


def test_cross_attention_has_lengths_of_its_own() -> None:
    query, key = heads(LENGTHS, 3, 8), heads(KEY_LENGTHS, 3, 8)
    out = mh.attention(query, key, key, mask=mh.Causal())
    for got, q, k in zip(alone(out), alone(query), alone(key), strict=True):
        torch.testing.assert_close(got, mh.attention(q, k, k, mask=mh.Causal()))


def test_gradients_come_back_jagged() -> None:
    inputs = [jagged(LENGTHS, 3, 8).requires_grad_() for _ in range(3)]
    out = mh.attention(*(x.transpose(1, 2) for x in inputs), mask=mh.Causal())
    out.values().square().sum().backward()
    for i, length in enumerate(LENGTHS):
        leaves = [x.detach().unbind()[i].clone().requires_grad_() for x in inputs]
        one = mh.attention(*(x.transpose(0, 1)[None] for x in leaves), mask=mh.Causal())
        one.square().sum().backward()
        for ours, leaf in zip(inputs, leaves, strict=True):
            assert ours.grad is not None and ours.grad.is_nested
            got = ours.grad.unbind()[i]
            assert got.shape[0] == length
            torch.testing.assert_close(got, leaf.grad)


def test_memory_and_plan_are_those_of_packed_documents() -> None:
    query = heads(LENGTHS, 3, 8)
    explained = mh.explain(query, query, query, mask=mh.Causal(), strict=True)
    assert explained.plan == "intervals" and explained.memory is None
    assert explained.spec.batch == 1 and explained.spec.q_len == sum(LENGTHS)


@pytest.mark.parametrize("cross", [False, True])
def test_module(cross: bool) -> None:
    module = mh.MultiHeadAttention(
        24, 4, num_kv_heads=2, mask=mh.Causal(), positions=mh.Rotary(6), attn_bias=mh.Alibi()
    )
    query = jagged(LENGTHS, 24)
    memory = jagged(KEY_LENGTHS, 24) if cross else None
    out = module(query, memory, mask=mh.Window(9, None))
    assert out.is_nested and out.shape == query.shape
    for i, length in enumerate(LENGTHS):
        one = query.unbind()[i][None]
        with_memory = () if memory is None else (memory.unbind()[i][None],)
        if length:
            expected = module(one, *with_memory, mask=mh.Window(9, None))
            torch.testing.assert_close(out.unbind()[i][None], expected)


QUERY = heads(LENGTHS, 3, 8)
WRONG = {
    "plain key": ((QUERY, torch.randn(1, 3, 5, 8), QUERY), {}, "must all be nested"),
    "ragged in axis 1": ((QUERY.transpose(1, 2),) * 3, {}, "ragged in axis 2"),
    "batch sizes": ((QUERY, *[heads((3, 4), 3, 8)] * 2), {}, "equally many sequences"),
    "key and value": ((QUERY, QUERY, heads(KEY_LENGTHS, 3, 8)), {}, "same lengths"),
    "tensor mask": ((QUERY,) * 3, {"mask": torch.ones(5, 5, dtype=torch.bool)}, "mask object"),
    "query_start": ((QUERY,) * 3, {"query_start": 3}, "query_start has no meaning"),
    "tensor bias": ((QUERY,) * 3, {"attn_bias": torch.zeros(5, 5)}, "attn_bias has no meaning"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    tensors, arguments, words = WRONG[name]
    with pytest.raises((mh.ShapeError, mh.ArgumentError), match=words):
        mh.attention(*tensors, **arguments)


def test_only_the_jagged_layout() -> None:
    with pytest.warns(UserWarning, match="prototype"):
        strided = torch.nested.nested_tensor([torch.randn(3, n, 8) for n in (2, 3)])
    with pytest.raises(mh.ShapeError, match="must be a jagged tensor"):
        mh.attention(strided, strided, strided)


def test_the_module_refuses_a_cache() -> None:
    module = mh.MultiHeadAttention(24, 4)
    with torch.no_grad(), pytest.raises(mh.ArgumentError, match="cache has no meaning"):
        module(jagged(LENGTHS, 24), cache=mh.KVCache())
