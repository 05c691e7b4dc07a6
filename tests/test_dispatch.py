"""Which backend runs what, and what `explain` and `info` say of it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

import manyheads as mh
from manyheads import dispatch
from manyheads.spec import AttentionSpec

Q, K = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 7, 8)

# What is asked of attention(Q, K, K) -> the backend that runs it.
CHOICES = [
    ({}, "native"),
    ({"mask": mh.Causal()}, "native"),
    ({"softcap": 2.0, "return_lse": True}, "native"),
    ({"mask": torch.ones(5, 7, dtype=torch.bool)}, "native"),
    ({"dropout_p": 0.5}, "native"),
    ({"dropout_p": 0.5, "backend": "sdpa"}, "sdpa"),
    ({"backend": "sdpa"}, "sdpa"),
    ({"backend": "reference"}, "reference"),
]


@pytest.mark.parametrize(("asked", "backend"), CHOICES, ids=str)
def test_first_that_does_not_refuse(asked: dict, backend: str) -> None:
    assert mh.explain(Q, K, K, **asked).backend == backend


def test_gradients_stay_here_and_doubles_go_to_pytorch() -> None:
    leaf = Q.clone().requires_grad_()
    assert mh.explain(leaf, K, K).backend == "native"
    assert mh.explain(leaf, K, K, softcap=1.0).backend == "native"
    slopes = torch.ones(6, requires_grad=True)
    assert mh.explain(Q, K, K, attn_bias=mh.Alibi(slopes)).backend == "native"
    assert mh.explain(Q.double(), K.double(), K.double()).backend == "sdpa"


def test_an_explicit_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(mh.BackendError, match=r"native: dtype is torch.float64"):
        mh.attention(Q.double(), K.double(), K.double(), backend="native")


def test_every_reason_is_listed_when_nothing_can_run() -> None:
    refusing = [_Refusing("one", ["too wide", "too old"]), _Refusing("two", ["asleep"])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "BACKENDS", refusing)
        with pytest.raises(mh.BackendError) as caught:
            dispatch.select(_spec())
    for part in ("one: too wide; too old", "two: asleep", "Hq=6 Hkv=3 Lq=5 Lk=7 D=8"):
        assert part in str(caught.value)


def test_strict_refuses_memory_that_grows_with_the_square() -> None:
    leaf = Q.clone().requires_grad_()
    mh.attention(Q, K, K, mask=mh.Causal(), strict=True)
    mh.attention(leaf, K, K, mask=mh.Window(2, 2), strict=True).sum().backward()
    mh.attention(leaf, K, K, mask=mh.Causal(), query_start=0, backend="sdpa", strict=True)
    with pytest.raises(mh.StrictError, match="band mask plan is materialised"):
        mh.attention(leaf, K, K, mask=mh.Window(2, 2), backend="sdpa", strict=True)


def test_strict_refuses_a_mask_that_becomes_dense_but_not_a_dense_one_that_is_given() -> None:
    checkers = mh.Predicate(lambda b, h, p, j: (p + j) % 2 == 0)
    keys = torch.randn(2, 3, 19, 8)  # ten separate keys in a row: too many for intervals
    with pytest.raises(mh.StrictError, match="became Lq \\* Lk bools"):
        mh.attention(Q, keys, keys, mask=checkers, strict=True)
    assert mh.explain(Q, keys, keys, mask=checkers, strict=True).backend is None
    assert "Lq * Lk" in str(mh.explain(Q, keys, keys, mask=checkers))
    mine = checkers.materialize(5, 19)
    mh.attention(Q, keys, keys, mask=mine, strict=True)
    assert mh.explain(Q, keys, keys, mask=mine).memory is None


def test_explanation_reads_well() -> None:
    text = str(mh.explain(Q.double(), K.double(), K.double(), mask=mh.Window(2, 2)))
    for part in ("backend: sdpa", "mask plan: band", "memory: the band", "not native: dtype"):
        assert part in text


def test_explanation_says_why_this_backend() -> None:
    first = f"first of native, sdpa, reference that can run this call; {mh.info().isa} kernels"
    assert str(mh.explain(Q, K, K)).startswith(f"backend: native ({first})\nmask plan")
    double = (Q.double(), K.double(), K.double())
    assert mh.explain(*double).reason == "first of native, sdpa, reference that can run this call"
    assert "backend: reference (asked for)" in str(mh.explain(Q, K, K, backend="reference"))
    nothing = mh.explain(*double, backend="native")
    assert nothing.reason is None and "backend: none can run this call\n" in str(nothing)


def test_memory_note_matches_what_is_allocated() -> None:
    """SDPA's note against the truth: the largest tensor PyTorch makes on the way.

    The last axis is strided, for which PyTorch by itself would store the scores.
    """
    long = [torch.randn(1, 1, 16, 2048, requires_grad=True).mT for _ in range(3)]
    for mask, grows in ((None, False), (mh.Causal(), False), (mh.Window(9, 0), True)):
        note = mh.explain(*long, mask=mask, backend="sdpa").memory
        with torch.profiler.profile(profile_memory=True) as profile:
            mh.attention(*long, mask=mask, backend="sdpa").sum().backward()
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert (note is not None) == grows == (largest >= 2048 * 2048), (mask, note, largest)


HEADS, LONG = 5, 499
PAIRS = torch.randn(1, 1, LONG, LONG)
HALF = torch.bfloat16


def _over_heads(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.expand(1, HEADS, LONG, LONG)


def _ready(given: Any) -> torch.Tensor:
    """The mask or bias as kernels read it."""
    if isinstance(given, mh.Dense):
        return given.allowed.contiguous()
    if isinstance(given, torch.nn.Module):
        return sum(part.tensor for part in given.parts)
    return given.float().contiguous()


# What a call is given -> its part of the note, and the most that is copied, in bytes per pair.
DENSE = {
    "expanded": (lambda: {"attn_bias": _over_heads(PAIRS)}, None, 0),
    "keys in half": (lambda: {"attn_bias": _over_heads(PAIRS[:, :, :1].to(HALF))}, None, 0),
    "rows in half": (lambda: {"attn_bias": _over_heads(PAIRS[..., :1].to(HALF))}, None, 0),
    "half": (lambda: {"attn_bias": _over_heads(PAIRS.to(HALF))}, "bias is copied", 4),
    "transposed": (lambda: {"attn_bias": _over_heads(PAIRS.mT)}, "bias is copied", 4),
    "both": (
        lambda: {"attn_bias": PAIRS.to(HALF).mT, "mask": PAIRS[0, 0].T > 0},
        "the mask is copied.* and attn_bias is copied",
        4,
    ),
    "mask": (lambda: {"mask": _over_heads(PAIRS > 0)}, None, 0),
    "mask of one row": (
        lambda: {"mask": (PAIRS.mT > 0)[:, :, :1].expand(1, HEADS, LONG, LONG)}, None, 0
    ),
    "transposed mask": (lambda: {"mask": _over_heads(PAIRS.mT > 0)}, "the mask is copied", 1),
    "sum": (
        lambda: {"attn_bias": mh.DenseBias(PAIRS[..., :1]) + mh.DenseBias(PAIRS[:, :, :1])},
        "sum of several", 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("given", DENSE)
def test_a_dense_mask_or_bias_is_copied_no_larger_than_it_is_and_not_silently(given: str) -> None:
    make, note, bytes_per_pair = DENSE[given]
    arguments = make()
    dtype = getattr(arguments.get("attn_bias"), "dtype", torch.float32)
    inputs = [torch.randn(1, HEADS, LONG, 8).to(dtype) for _ in range(3)]
    if "mask" in arguments:  # scanned once: that is another memory, a block at a time
        arguments["mask"] = mh.Dense(arguments["mask"])
    found = mh.explain(*inputs, **arguments)
    assert found.backend == "native"
    if note is None:
        assert found.memory is None
        mh.attention(*inputs, **arguments, strict=True)
    else:
        assert re.search(note, found.memory)
        with pytest.raises(mh.StrictError, match=note):
            mh.attention(*inputs, **arguments, strict=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        out = mh.attention(*inputs, **arguments)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < (bytes_per_pair + 0.5) * LONG * LONG
    assert torch.equal(out, mh.attention(*inputs, **{k: _ready(v) for k, v in arguments.items()}))


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_every_element_of_an_expanded_bias_has_a_gradient_of_its_own(
    axis: int, dtype: torch.dtype
) -> None:
    query, key = torch.randn(1, 3, 5, 8).to(dtype), torch.randn(1, 3, 7, 8).to(dtype)
    bias = torch.randn(1, 3, 5, 7).to(dtype).narrow(axis, 0, 1).expand(1, 3, 5, 7)
    note = mh.explain(query, key, key, attn_bias=bias.requires_grad_()).memory
    assert ("is copied" if dtype == HALF or axis == 3 else "gets a gradient") in note
    with torch.no_grad():
        alone = mh.explain(query, key, key, attn_bias=bias).memory
    assert (alone is None) == (dtype == torch.float32 or axis != 1)

    def loss(bias: torch.Tensor) -> torch.Tensor:
        out = mh.attention(query, key, key, attn_bias=bias, backend="native")
        return out.float().square().sum()

    plain = bias.detach().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(loss(plain), plain)
    assert expected.unique().numel() > 50
    assert torch.equal(torch.autograd.grad(loss(bias), bias)[0], expected)
    assert torch.equal(torch.func.grad(loss)(bias.detach()), expected)


def test_info_names_versions_and_kernels() -> None:
    info = mh.info()
    assert info.torch == torch.__version__ and info.native_error is None
    assert info.isa in info.available_isas
    assert info.available_isas[-1] == "scalar"
    assert info.isa in str(info) and str(info.threads) in str(info)


def test_the_cached_choice_is_made_from_the_same_fields_in_the_same_order() -> None:
    """`select_cached` gets the fields of AttentionSpec as a plain tuple, by position."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dispatch,
            "select_cached",
            lambda fields, *_: seen.append(fields) or dispatch.BACKENDS[-1],
        )
        mh.attention(Q, K, K[..., :3], mask=mh.Causal(), softcap=2.0, dropout_p=0.5)
    assert AttentionSpec(*seen[0]) == AttentionSpec(
        batch=2, q_heads=6, kv_heads=3, q_len=5, k_len=7, head_dim=8, value_dim=3,
        dtype=torch.float32, device="cpu", plan="band", softcap=True, dropout=True,
    )  # fmt: skip


MAPPED = torch.randn(7, 6, 5, 8)


def _sum(query: torch.Tensor) -> torch.Tensor:
    return mh.attention(query, K[0], K[0], mask=mh.Causal()).square().sum()


def _reference_sum(query: torch.Tensor) -> torch.Tensor:
    out = mh.attention(query, K[0], K[0], mask=mh.Causal(), backend="reference")
    return out.square().sum()


def test_vmap_alone_runs_native_and_is_a_loop() -> None:
    def native(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return mh.attention(query, key, key, mask=mh.Causal(), backend="native", strict=True)

    keys = torch.randn(7, 3, 11, 8)
    loop = torch.stack([native(q, k) for q, k in zip(MAPPED, keys, strict=True)])
    assert torch.equal(torch.func.vmap(native)(MAPPED, keys), loop)
    nested = torch.func.vmap(torch.func.vmap(native, (0, None)), (None, 0))(MAPPED, keys)
    assert nested.shape == (7, 7, 6, 5, 8)
    assert torch.equal(nested[torch.arange(7), torch.arange(7)], loop)
    chosen = []
    torch.func.vmap(lambda q: chosen.append(mh.explain(q, K[0], K[0]).backend) or q)(MAPPED)
    assert chosen == ["native"]


# PyTorch's forward mode loads its rules with torch.jit.script, which is deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(lambda q: torch.func.vmap(f)(q).sum())(MAPPED),
        lambda f: torch.func.vmap(torch.func.grad(f))(MAPPED),
        lambda f: torch.func.jvp(torch.func.vmap(f), (MAPPED,), (torch.ones_like(MAPPED),))[1],
        lambda f: torch.func.vmap(lambda q: torch.func.jvp(f, (q,), (q,))[1])(MAPPED),
        lambda f: _backward(torch.func.vmap(f)),
    ],
    ids=["grad of vmap", "vmap of grad", "jvp of vmap", "vmap of jvp", "backward through vmap"],
)
def test_vmap_with_derivatives(transform) -> None:
    got, expected = transform(_sum), transform(_reference_sum)
    torch.testing.assert_close(got, expected)
    assert got.abs().max() > 0


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_forward_mode_goes_elsewhere_or_raises() -> None:
    chosen = []

    def run(query: torch.Tensor) -> torch.Tensor:
        chosen.append(mh.explain(query, K, K).backend)
        return mh.attention(query, K, K)

    def native(query: torch.Tensor) -> torch.Tensor:
        return mh.attention(query, K, K, backend="native")

    torch.func.jvp(run, (Q,), (Q,))
    with torch.autograd.forward_ad.dual_level():
        run(torch.autograd.forward_ad.make_dual(Q, Q))
    assert chosen == ["reference", "reference"]
    with pytest.raises(mh.BackendError, match="forward-mode"):
        torch.func.jvp(native, (Q,), (Q,))


def _backward(mapped) -> torch.Tensor:
    leaf = MAPPED.clone().requires_grad_()
    return torch.autograd.grad(mapped(leaf).sum(), leaf)[0]


@dataclasses.dataclass
class _Refusing:
    NAME: str
    reasons: list[str]

    def why_not(self, spec: AttentionSpec) -> list[str]:
        return self.reasons


def _spec() -> AttentionSpec:
    return AttentionSpec(2, 6, 3, 5, 7, 8, 8, torch.float32, "cpu", "full")
