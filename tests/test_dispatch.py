"""Which backend runs what, and what `explain` and `info` say of it."""

from __future__ import annotations

import dataclasses

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
