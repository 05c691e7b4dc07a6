"""Bad input to `attention`: which error, and that it names got, expected and the remedy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import manyheads as mh

Q = torch.zeros(2, 6, 5, 8)  # B=2, Hq=6, Lq=5, D=8
K = torch.zeros(2, 3, 7, 8)  # Hkv=3, Lk=7
V = torch.zeros(2, 3, 7, 4)  # Dv=4

# What is changed of attention(Q, K, V), or a function where making that may raise already
# -> the error, and what its message must hold: what was got, what was expected, the fix.
TABLE = {
    "an array": (dict(query=np.zeros((2, 6, 5, 8))), TypeError, "ndarray", "Tensor", "as_tensor"),
    "a list": (dict(value=[[1.0]]), TypeError, "list", "Tensor", "as_tensor"),
    "rank 2": (dict(query=Q[0, 0]), mh.ShapeError, "[5, 8]", "[B, H, L, D]", "transpose(1, 2)"),
    "rank 5": (dict(key=K[None]), mh.ShapeError, "[1, 2, 3, 7, 8]", "[H, L, D]", "transpose"),
    "mixed ranks": (dict(key=K[0]), mh.ShapeError, "key [3, 7, 8]", "all [H, L, D]", "transpose"),
    "integers": (
        dict(query=Q.int(), key=K.int(), value=V.int()),
        TypeError, "torch.int32", "float32", "query.float()",
    ),
    "complex": (dict(query=Q.cfloat()), TypeError, "torch.complex64", "float32", "convert"),
    "float8": (
        dict(query=Q.to(torch.float8_e4m3fn), key=K.to(torch.float8_e4m3fn)),
        TypeError, "float8_e4m3fn", "expected float32, bfloat16", "query.float()",
    ),
    "sparse": (dict(key=K.to_sparse()), TypeError, "key is no plain", "sparse_coo", ".to_dense()"),
    "sparse mask": (
        dict(mask=torch.ones(5, 7, dtype=torch.bool).to_sparse()),
        TypeError, "sparse_coo", "expected torch.strided", ".to_dense()",
    ),
    "dtypes": (dict(key=K.half()), TypeError, "key torch.float16", "one dtype", ".to(query.dtype)"),
    "value's dtype": (dict(value=V.double()), TypeError, "float64", "one dtype", ".to(query"),
    "devices": (dict(key=K.to("meta")), mh.DeviceError, "key on meta", "one device", ".to("),
    "key and value length": (
        dict(value=V[:, :, 1:]), mh.ShapeError, "value [2, 3, 6, 4]", "the same", "last axis",
    ),
    "key and value heads": (dict(value=V[:, 1:]), mh.ShapeError, "[2, 2, 7, 4]", "same", "differ"),
    "head sizes": (dict(key=K[..., 1:]), mh.ShapeError, "[2, 3, 7, 7]", "to be 8", "project"),
    "batches": (dict(query=Q[:1]), mh.ShapeError, "query [1, 6, 5, 8]", "one batch size", "expand"),
    "value's batch": (dict(value=V[:1]), mh.ShapeError, "[1, 3, 7, 4]", "same batch", "differ"),
    "value's device": (
        dict(value=V.to("meta")), mh.DeviceError, "value on meta", "one device", ".to(",
    ),
    "heads": (dict(query=Q[:, :5]), mh.ShapeError, "[2, 5, 5, 8]", "Hq = G * Hkv", "h // G"),
    "fewer query heads": (dict(query=Q[:, :1]), mh.ShapeError, "[2, 1, 5, 8]", "G >= 1", "h // G"),
    "no heads": (dict(query=Q[:, :0]), mh.ShapeError, "[2, 0, 5, 8]", "Hq = G * Hkv", "h // G"),
    "no size": (dict(value=V[..., :0]), mh.ShapeError, "[2, 3, 7, 0]", "at least 1", "split"),
    "float mask": (dict(mask=torch.zeros(5, 7)), TypeError, "torch.float32", "bool", "attn_bias="),
    "0/1 mask": (dict(mask=torch.ones(5, 7).int()), TypeError, "torch.int32", "bool", "mask != 0"),
    "mask's type": (dict(mask="causal"), TypeError, "str", "bool tensor", "mh.Causal()"),
    "mask's class": (dict(mask=mh.Causal), TypeError, "type", "bool tensor", "mh.Causal()"),
    "mask's shape": (
        dict(mask=torch.ones(5, 6, dtype=torch.bool)),
        mh.ShapeError, "[5, 6]", "[2, 6, 5, 7]", "slice",
    ),
    "mask's heads": (
        dict(mask=torch.ones(3, 5, 7, dtype=torch.bool)),
        mh.ShapeError, "[3, 5, 7]", "Hq|1, Lq|1, Lk|1]", "mask[None]",
    ),
    "mask's batch": (
        dict(mask=torch.ones(3, 1, 5, 7, dtype=torch.bool)),
        mh.ShapeError, "[3, 1, 5, 7]", "[2, 6, 5, 7]", "slice",
    ),
    "mask's rank": (
        dict(mask=torch.ones(7, dtype=torch.bool)),
        mh.ShapeError, "[7]", "[Lq|1, Lk|1]", "KeyLengths",
    ),
    "documents' queries": (
        lambda: dict(mask=mh.Documents([2, 2], [3, 4])),
        mh.ArgumentError, "sum of 4", "query length 5", "padding as a document",
    ),
    "documents' keys": (
        lambda: dict(mask=mh.Documents([2, 3], [3, 3])),
        mh.ArgumentError, "sum of 6", "key length 7", "padding as a document",
    ),
    "documents' keys left out": (
        lambda: dict(mask=mh.Documents([2, 3])),
        mh.ArgumentError, "sum of 5", "key length 7", "give k_lengths",
    ),
    "document count": (
        lambda: dict(mask=mh.Documents([2, 3], [7])),
        mh.ShapeError, "[2] and [1]", "as many k_lengths", "has length 0",
    ),
    "negative window": (
        lambda: dict(mask=mh.Window(-1, 0)),
        mh.ArgumentError, "got -1", "must not be negative", "Use 0 or more",
    ),
    "negative window ahead": (
        lambda: dict(mask=mh.Window(4, -3)),
        mh.ArgumentError, "got -3", "must not be negative", "Use 0 or more",
    ),
    "embed_dim": (
        lambda: mh.MultiHeadAttention(10, 4),
        mh.ArgumentError, "embed_dim=10", "expected a multiple", "change one of them",
    ),
    "module's key heads": (
        lambda: mh.MultiHeadAttention(12, 6, num_kv_heads=4),
        mh.ArgumentError, "num_kv_heads=4", "expected a multiple", "change one of them",
    ),
    "bool bias": (dict(attn_bias=torch.ones(5, 7) > 0), TypeError, "bool", "float", "mask="),
    "bias's type": (dict(attn_bias=1.0), TypeError, "is a float", "Alibi", "a float tensor"),
    "bias's shape": (
        dict(attn_bias=torch.zeros(7, 5)), mh.ShapeError, "[7, 5]", "[2, 6, 5, 7]", "to the right",
    ),
    "bias's dtype": (
        dict(attn_bias=torch.zeros(5, 7).half()), TypeError, "float16", "float32", ".to(",
    ),
    "bias's slopes": (dict(attn_bias=mh.Alibi(torch.ones(3))), mh.ShapeError, "3", "6", "one per"),
    "scale nan": (dict(scale=math.nan), mh.ArgumentError, "nan", "finite", "leave scale out"),
    "scale inf": (dict(scale=math.inf), mh.ArgumentError, "inf", "finite", "leave scale out"),
    "scale's type": (dict(scale="1"), TypeError, "str", "finite number", "float("),
    "scale as tensor": (dict(scale=torch.tensor(1.0)), TypeError, "Tensor", "number", "float("),
    "softcap 0": (dict(softcap=0), mh.ArgumentError, "0", "> 0", "leave softcap out"),
    "softcap < 0": (dict(softcap=-1.0), mh.ArgumentError, "-1.0", "> 0", "leave softcap out"),
    "softcap inf": (dict(softcap=math.inf), mh.ArgumentError, "inf", "finite", "leave softcap out"),
    "softcap's type": (dict(softcap=True), TypeError, "bool", "number", "float("),
    "dropout 1": (dict(dropout_p=1.0), mh.ArgumentError, "1.0", "[0, 1)", "leave dropout_p out"),
    "dropout < 0": (dict(dropout_p=-0.1), mh.ArgumentError, "-0.1", "[0, 1)", "leave dropout_p"),
    "dropout nan": (dict(dropout_p=math.nan), mh.ArgumentError, "nan", "[0, 1)", "leave dropout_p"),
    "dropout None": (dict(dropout_p=None), TypeError, "NoneType", "[0, 1)", "float("),
    "sinks' type": (dict(sinks=[0.0] * 6), TypeError, "list", "[6]", "per query head"),
    "sinks' dtype": (dict(sinks=torch.zeros(6).int()), TypeError, "int32", "[6]", "per query head"),
    "sinks' shape": (dict(sinks=torch.zeros(3)), mh.ShapeError, "[3]", "[6]", "per query head"),
    "sinks' device": (
        dict(sinks=torch.zeros(6, device="meta")),
        mh.DeviceError, "meta", "cpu", ".to(query.device)",
    ),
    "start's type": (dict(query_start=1.0), TypeError, "float", "an int", "key position"),
    "start's bool": (dict(query_start=True), TypeError, "bool", "an int", "key position"),
    "start's dtype": (dict(query_start=torch.zeros(2)), TypeError, "float32", "int32", "position"),
    "start's shape": (
        dict(query_start=torch.zeros(3, dtype=torch.int32)),
        mh.ShapeError, "[3]", "[2]", "position",
    ),
    "start's device": (
        dict(query_start=torch.zeros(2, dtype=torch.int32, device="meta")),
        mh.DeviceError, "meta", "cpu", ".to(query.device)",
    ),
    "start's size": (dict(query_start=2**40), mh.ArgumentError, str(2**40), "2**29", "position"),
    "a list of backends": (
        dict(backend=["native"]), mh.ArgumentError, "['native']", "'native', 'sdpa'", "None",
    ),
    "unknown backend": (
        dict(backend="cuda"), mh.ArgumentError, "'cuda'", "'native', 'sdpa', 'reference'", "None",
    ),
    "refusing backend": (
        dict(backend="sdpa", softcap=1.0), mh.BackendError, "Hq=6", "no softcap", "leave `backend`",
    ),
    "strict": (
        dict(backend="reference", strict=True), mh.StrictError, "Lq=5", "Lq * Lk", "strict=False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_message_says_what_was_got_expected_and_how_to_mend_it(name: str) -> None:
    changed, kind, got, expected, fix = TABLE[name]
    with pytest.raises(kind) as caught:
        made = changed() if callable(changed) else changed
        arguments = {"query": Q, "key": K, "value": V, **made}
        mh.attention(
            arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments
        )
    message = str(caught.value)
    assert isinstance(caught.value, mh.ManyHeadsError)
    for part in (got, expected, fix):
        assert part in message, f"{part!r} is not in: {message}"


def test_explain_raises_the_same_errors_but_not_for_refusals() -> None:
    with pytest.raises(mh.ShapeError):
        mh.explain(Q, K[:, :2], V)
    assert mh.explain(Q, K, V, softcap=1.0, backend="sdpa").backend is None


def test_each_error_is_also_a_standard_one() -> None:
    assert issubclass(mh.ShapeError, ValueError) and issubclass(mh.DeviceError, ValueError)
    assert issubclass(mh.ArgumentTypeError, TypeError)
    assert issubclass(mh.StrictError, mh.BackendError) and issubclass(mh.BackendError, RuntimeError)
