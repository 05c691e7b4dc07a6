"""What the module refuses, and with which words."""

from __future__ import annotations

import pytest
import torch
from module_oracle import CAUSAL, B, E, L, M

import manyheads as mh
from manyheads import MultiHeadAttention

X, MEMORY = torch.zeros(B, L, E), torch.zeros(B, M, E)
ERRORS = {
    "heads": (
        lambda: MultiHeadAttention(E, 7), mh.ArgumentError,
        "embed_dim=24 is not divisible by num_heads=7; expected a multiple",
    ),
    "groups": (
        lambda: MultiHeadAttention(E, 6, num_kv_heads=4), mh.ArgumentError,
        "num_heads=6 is not divisible by num_kv_heads=4; expected",
    ),
    "no heads": (
        lambda: MultiHeadAttention(E, 0), mh.ArgumentError,
        "num_heads is 0; expected at least 1: give",
    ),
    "no key/value heads": (
        lambda: MultiHeadAttention(E, 4, num_kv_heads=0), mh.ArgumentError, "num_kv_heads is 0",
    ),
    "size of a wrong type": (
        lambda: MultiHeadAttention(24.0, 4), mh.ArgumentTypeError, r"embed_dim is 24\.0; expected",
    ),
    "positions": (
        lambda: MultiHeadAttention(E, 4, positions=mh.Alibi()), mh.ArgumentTypeError,
        "positions is a Alibi; expected a Rotary or None: .*attn_bias",
    ),
    "wide positions": (
        lambda: MultiHeadAttention(E, 4, positions=mh.Rotary(8)), mh.ArgumentError,
        "turns 8 channels; expected at most head_dim=6",
    ),
    "norm": (
        lambda: MultiHeadAttention(E, 4, qk_norm="batch"), mh.ArgumentError,
        "qk_norm is 'batch'; expected 'rms', 'layer'",
    ),
    "dropout": (
        lambda: MultiHeadAttention(E, 4, dropout=1.5), mh.ArgumentError,
        r"dropout is out of range: got 1\.5; expected a number in \[0, 1\); leave dropout out",
    ),
    "dropout of a wrong type": (
        lambda: MultiHeadAttention(E, 4, dropout="a"), mh.ArgumentTypeError,
        r"dropout .*got str; expected a number in \[0, 1\); convert",
    ),
    "scale": (
        lambda: MultiHeadAttention(E, 4, scale="x"), mh.ArgumentTypeError,
        "scale .*got str; expected a finite number; convert",
    ),
    "module mask of a wrong type": (
        lambda: MultiHeadAttention(E, 4, mask="causal"), mh.ArgumentTypeError,
        r"mask must be None, .*got str.*mh\.Causal\(\)",
    ),
    "module mask that is a list": (
        lambda: MultiHeadAttention(E, 4, mask=[1]), mh.ArgumentTypeError, "mask must .*got list",
    ),
    "module bias that is a list": (
        lambda: MultiHeadAttention(E, 4, attn_bias=[1]), mh.ArgumentTypeError,
        "attn_bias is a list; expected Alibi, .*: torch.as_tensor",
    ),
    "mask of a wrong type beside the module's": (
        lambda: MultiHeadAttention(E, 4, mask=mh.Causal())(X, mask=[1]), mh.ArgumentTypeError,
        "mask must .*got list",
    ),
    "bias of a wrong type beside the module's": (
        lambda: MultiHeadAttention(E, 4, attn_bias=mh.Alibi())(X, attn_bias=[1]),
        mh.ArgumentTypeError, "attn_bias is a list",
    ),
    "cache": (
        lambda: MultiHeadAttention(E, 4)(X, cache=3), mh.ArgumentTypeError,
        r"cache is a int; expected a KVCache or None: make one .*KVCache\(\)",
    ),
    "a list as query": (
        lambda: MultiHeadAttention(E, 4)([1.0]), mh.ArgumentTypeError,
        "query is not a tensor: got list; expected torch.Tensor; torch.as_tensor",
    ),
    "a list as value": (
        lambda: MultiHeadAttention(E, 4)(X, MEMORY, [1.0]), mh.ArgumentTypeError,
        "value is not a tensor: got list",
    ),
    "query elsewhere": (
        lambda: MultiHeadAttention(E, 4)(X.to("meta")), mh.DeviceError,
        r"query is elsewhere: got meta; expected this module's cpu; move .*\.to\('cpu'\)",
    ),
    "module elsewhere": (
        lambda: MultiHeadAttention(E, 4, device="meta")(X), mh.DeviceError,
        "got cpu; expected this module's meta",
    ),
    "key elsewhere": (
        lambda: MultiHeadAttention(E, 4)(X, MEMORY.to("meta")), mh.DeviceError,
        "key is elsewhere: got meta",
    ),
    "mask of a wrong type": (
        lambda: MultiHeadAttention(E, 4)(X, mask="causal"), mh.ArgumentTypeError, "got str",
    ),
    "float mask": (
        lambda: MultiHeadAttention(E, 4)(X, mask=CAUSAL.float()), mh.ArgumentTypeError, "float32",
    ),
    "mask of other lengths": (
        lambda: MultiHeadAttention(E, 4)(X, mask=CAUSAL[:3]), mh.ShapeError, r"\[7, 7\]",
    ),
    "bias of other heads": (
        lambda: MultiHeadAttention(E, 4, attn_bias=mh.RelativeBias(3))(X), mh.ShapeError,
        "3 heads; the query has 4",
    ),
    "value alone": (
        lambda: MultiHeadAttention(E, 4)(X, value=X), mh.ArgumentError,
        r"value without a key; expected \(query\)",
    ),
    "query size": (
        lambda: MultiHeadAttention(E, 4)(X[..., :5]), mh.ShapeError,
        r"query has shape \[3, 7, 5\]; expected \[B, L, 24\]",
    ),
    "self-attention with another key size": (
        lambda: MultiHeadAttention(E, 4, key_dim=5)(X), mh.ShapeError,
        r"key has shape \[3, 7, 24\]; expected \[B, L, 5\]",
    ),
    "rank": (lambda: MultiHeadAttention(E, 4)(X[None]), mh.ShapeError, r"\[1, 3, 7, 24\]; exp"),
    "ranks": (
        lambda: MultiHeadAttention(E, 4)(X, MEMORY[0]), mh.ShapeError, r"key has shape \[11, 24\]",
    ),
    "batches": (
        lambda: MultiHeadAttention(E, 4)(X, MEMORY[:2]), mh.ShapeError, "batch sizes differ",
    ),
    "key and value lengths": (
        lambda: MultiHeadAttention(E, 4)(X, MEMORY, X), mh.ShapeError, "the same batch",
    ),
    "dtype": (
        lambda: MultiHeadAttention(E, 4)(X.double()), mh.ArgumentTypeError,
        "query has another dtype: got torch.float64; expected this module's torch.float32; convert",
    ),
    "dtype of the value": (
        lambda: MultiHeadAttention(E, 4)(X, MEMORY, MEMORY.bfloat16()), mh.ArgumentTypeError,
        "value has another dtype: got torch.bfloat16; expected this module's torch.float32",
    ),
    "query_start of a wrong type": (
        lambda: MultiHeadAttention(E, 4)(X, query_start="x"), mh.ArgumentTypeError,
        "query_start is of the wrong type: got str",
    ),
    "query_start of another batch": (
        lambda: MultiHeadAttention(E, 4, positions=mh.Rotary(6))(X, query_start=torch.arange(2)),
        mh.ShapeError, r"query_start .*got \[2\]; expected \[3\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_a_cache_of_another_batch_is_refused_and_left_alone():
    module, cache = MultiHeadAttention(E, 4), mh.KVCache()
    with torch.no_grad():
        module(X, cache=cache)
        with pytest.raises(mh.ShapeError, match=r"\(2, 4, 6\); expected \(3, 4, 6\)"):
            module(X[:2], cache=cache)
    assert cache.length == L
