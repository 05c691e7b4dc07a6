"""`observe` on our modules: what is recorded, against the formula in float64; when it raises."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_oracle, assert_equal_up_to_rounding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import manyheads as mh
from manyheads import watching
from manyheads.backends import native

B, L, MEMORY, HEADS, KV_HEADS, HEAD_DIM = 2, 11, 13, 6, 3, 5
E = HEADS * HEAD_DIM
EVERY_ROW = mh.WeightRows(tuple(range(L)))


class Layer(nn.Module):
    """Self-attention, then cross-attention where there is a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.own = mh.MultiHeadAttention(E, HEADS, num_kv_heads=KV_HEADS, mask=mh.Causal())
        self.cross = mh.MultiHeadAttention(E, HEADS, key_dim=7, value_dim=7)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.own(x)
        return x if memory is None else x + self.cross(x, memory)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.end = nn.Linear(E, E)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory)
        return self.end(x)


class Own(nn.Module):
    """A module of somebody's own, that calls the function."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x[:, None]
        return mh.attention(heads, heads, heads, mask=mh.Causal(), attn_bias=mh.Alibi())[:, 0]


ALL_LAYERS = tuple(f"layers.{n}.{kind}" for n in range(2) for kind in ("own", "cross"))


def weights(module: mh.MultiHeadAttention, x: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, Hq, Lq, Lk] from the formula, every step in `dtype`."""

    def heads(projection: nn.Linear, rows: Tensor) -> Tensor:
        out = rows.to(dtype) @ projection.weight.to(dtype).T + projection.bias.to(dtype)
        split = out.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        return split.repeat_interleave(module.num_heads // split.shape[1], dim=1)

    query, keys = heads(module.q_proj, x), heads(module.k_proj, key)
    scores = query @ keys.mT / math.sqrt(module.head_dim)
    if module.mask is not None:
        scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), -math.inf)
    return scores.softmax(-1)


def inputs_of(model: nn.Module, run: Callable[[], Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """(query, key) that every MultiHeadAttention got."""
    found = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, mh.MultiHeadAttention):

            def keep(module: nn.Module, given: Any, name: str = name) -> None:
                found[name] = (given[0], given[-1])

            hooks.append(module.register_forward_pre_hook(keep))
    run()
    for hook in hooks:
        hook.remove()
    return found


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- what is recorded -----------------------------------------------------------------------------


def test_every_layer_is_recorded_and_equals_the_formula() -> None:
    model, x, memory = Model(), torch.randn(B, L, E), torch.randn(B, MEMORY, 7)
    top, entropy = mh.TopKeys(3), mh.Entropy()
    with mh.observe(model, EVERY_ROW, entropy, top) as seen:
        model(x, memory)
    given = inputs_of(model, lambda: model(x, memory))
    assert seen.layers == ALL_LAYERS == tuple(given)
    assert len(seen) == 4 and seen.measures == (EVERY_ROW, entropy, top)
    for name in seen.layers:
        (record,) = seen[name]
        k_len = MEMORY if name.endswith("cross") else L
        assert (record.layer, record.step, record.heads) == (name, 0, tuple(range(HEADS)))
        assert (record.query_length, record.key_length) == (L, k_len)
        assert record.positions.dtype == torch.int64
        assert torch.equal(record.positions, torch.arange(k_len - L, k_len)[None])
        module = model.get_submodule(name)
        exact, eager = (weights(module, *given[name], d) for d in (torch.float64, torch.float32))
        rows = record[EVERY_ROW]
        assert rows.shape == (B, HEADS, L, k_len) and not rows.requires_grad
        assert_close_to_oracle(rows, exact, eager, torch.float32)
        exact, eager = (-torch.special.xlogy(p, p).sum(-1) for p in (exact, eager))
        assert_close_to_oracle(record[entropy], exact, eager, torch.float32)
        assert torch.equal(record[top].weights, record[top].weights.sort(-1, descending=True)[0])
        chosen = rows.gather(-1, record[top].keys.clamp(min=0))
        found = record[top].keys >= 0
        assert_equal_up_to_rounding(record[top].weights[found], chosen[found])


def test_the_model_may_be_the_module_itself_without_a_batch() -> None:
    attend, x = mh.MultiHeadAttention(E, HEADS), torch.randn(L, E)
    with mh.observe(attend, EVERY_ROW) as seen:
        attend(x)
    (record,) = seen["MultiHeadAttention"]
    exact, eager = (weights(attend, x[None], x[None], d) for d in (torch.float64, torch.float32))
    assert_close_to_oracle(record[EVERY_ROW], exact, eager, torch.float32)


def test_a_module_that_calls_the_function_is_a_layer() -> None:
    model, x = nn.Sequential(Own(), nn.Linear(7, 7), Own()), torch.randn(B, L, 7)
    with mh.observe(model, mh.Entropy()) as seen:
        model(x)
        mh.attention(x[:, None], x[:, None], x[:, None])  # of no module
    assert seen.layers == ("0", "2") and len(seen) == 2
    heads = x[:, None]
    given = dict(mask=mh.Causal(), attn_bias=mh.Alibi())
    (expected,) = mh.measure(heads, heads, [mh.Entropy()], **given)
    assert torch.equal(seen["0"][0][mh.Entropy()], expected)


def test_a_cache_makes_one_record_a_step() -> None:
    attend, cache, steps = (
        mh.MultiHeadAttention(E, HEADS, mask=mh.Causal()),
        mh.KVCache(),
        (5, 1, 3),
    )
    x = torch.randn(B, sum(steps), E)
    with torch.no_grad(), mh.observe(attend, mh.LogSumExp()) as seen:
        for part in x.split(steps, dim=1):
            attend(part, cache=cache)
    records = seen["MultiHeadAttention"]
    assert [record.step for record in records] == [0, 1, 2]
    assert [(record.query_length, record.key_length) for record in records] == [
        (5, 5), (1, 6), (3, 9),
    ]  # fmt: skip
    assert torch.equal(torch.cat([r.positions for r in records], dim=1), torch.arange(9)[None])
    with torch.no_grad(), mh.observe(attend, mh.LogSumExp()) as whole:
        attend(x)
    stepwise = torch.cat([record[mh.LogSumExp()] for record in records], dim=2)
    at_once = whole["MultiHeadAttention"][0][mh.LogSumExp()]
    torch.testing.assert_close(stepwise, at_once)


@pytest.mark.parametrize("heads", [(4,), (5, 0, 3), range(6)], ids=str)
def test_heads_can_be_chosen(heads: Any) -> None:
    """A bias and a mask for each head, so that a wrong head shows."""

    class Everything(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            mask = torch.rand(1, HEADS, L, MEMORY, generator=torch.Generator().manual_seed(3)) < 0.7
            columns = torch.linspace(-1, 1, HEADS * MEMORY).reshape(HEADS, 1, MEMORY)
            bias = mh.Alibi() + mh.DenseBias(columns)
            sinks = torch.linspace(-2, 2, HEADS)
            documents = mh.Documents([4, 7], [6, 7])
            return mh.attention(
                query, key, key, mask=mh.Dense(mask) | documents, attn_bias=bias, sinks=sinks
            )

    model, query, key = (
        Everything(),
        torch.randn(B, HEADS, L, 5),
        torch.randn(B, KV_HEADS, MEMORY, 5),
    )
    asked = (EVERY_ROW, mh.Received(), mh.LogSumExp())
    with mh.observe(model, *asked) as whole:
        model(query, key)
    with mh.observe(model, *asked, heads=heads) as some:
        model(query, key)
    assert some["Everything"][0].heads == tuple(heads)
    for one in asked:
        expected = whole["Everything"][0][one][:, list(heads)]
        assert_equal_up_to_rounding(some["Everything"][0][one], expected)


def test_one_head_may_be_a_number() -> None:
    attend, x = mh.MultiHeadAttention(E, HEADS), torch.randn(B, L, E)
    with mh.observe(attend, mh.HeadSimilarity(), heads=2) as seen:
        attend(x)
    (record,) = seen.records
    assert record.heads == (2,) and record[mh.HeadSimilarity()].shape == (B, 1, 1)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ALL_LAYERS),
        ("layers.1.own", ALL_LAYERS[2:3]),
        ("layers.1", ALL_LAYERS[2:]),
        ("layers.*.cross", ALL_LAYERS[1::2]),
        (["layers.[0].cross", "*.1.own"], ALL_LAYERS[1:3]),
        (lambda name: name.endswith("own"), ALL_LAYERS[::2]),
    ],
)
def test_layers_can_be_chosen(layers: Any, expected: tuple[str, ...]) -> None:
    model = Model()
    with mh.observe(model, mh.Entropy(), layers=layers) as seen:
        model(torch.randn(B, L, E), torch.randn(B, MEMORY, 7))
    assert seen.layers == expected


def test_shared_modules_are_one_layer_with_a_call_each() -> None:
    shared = mh.MultiHeadAttention(E, HEADS)
    model = nn.Sequential(shared, nn.Linear(E, E), shared)
    with mh.observe(model, mh.Entropy()) as seen:
        model(torch.randn(B, L, E))
    assert seen.layers == ("0",) and [record.step for record in seen["0"]] == [0, 1]


def test_only_what_was_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for kind in (mh.Entropy, mh.Received):
        of = kind.of
        monkeypatch.setattr(
            kind,
            "of",
            lambda self, block, of=of: asked.append(type(self).__name__) or of(self, block),
        )
    monkeypatch.setattr(native, "can_measure", lambda call: False)
    model, x = Model(), torch.randn(B, L, E)
    with mh.observe(model, mh.Entropy(), layers="layers.1"):
        model(x)
    assert asked == ["Entropy"]
    model(x)
    assert asked == ["Entropy"] and not watching.watchers()


def test_outputs_are_those_of_an_unobserved_model() -> None:
    model, x = Model(), torch.randn(B, L, E)
    expected = model(x)
    with mh.observe(model, mh.Entropy(), mh.TopKeys(2)):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("mode", ["inference", "autocast", "half", "float64"])
def test_modes_and_dtypes(mode: str) -> None:
    attend, x = mh.MultiHeadAttention(E, HEADS), torch.randn(B, L, E)
    if mode in ("half", "float64"):
        dtype = torch.bfloat16 if mode == "half" else torch.float64
        attend, x = attend.to(dtype), x.to(dtype)
    with (
        mh.observe(attend, EVERY_ROW) as seen,
        torch.inference_mode(mode == "inference"),
        torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
    ):
        attend(x)
    rows = seen.records[0][EVERY_ROW]
    assert rows.dtype == (torch.float64 if mode == "float64" else torch.float32)
    assert not rows.is_inference()
    # Weights of bfloat16 queries and keys are not rounded to it again.
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))


def test_a_backward_pass_that_runs_layers_again_records_nothing_twice() -> None:
    model, x = Layer(), torch.randn(B, L, E, requires_grad=True)
    outer = nn.Sequential(model)
    for reentrant in (False, True):
        with mh.observe(outer, mh.Entropy()) as seen:
            checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        assert len(seen) == 1


# --- looking things up ----------------------------------------------------------------------------


def test_a_layer_is_found_by_a_module_around_it() -> None:
    model = Model()
    with mh.observe(model, mh.Entropy(), layers=["layers.0", "layers.1.own"]) as seen:
        model(torch.randn(B, L, E), torch.randn(B, MEMORY, 7))
    assert seen["layers.1"] == seen["layers.1.own"] and "layers.1.own" in seen
    with pytest.raises(mh.NotRecordedError, match=r"2 observed layers lie in 'layers.0'.*0.cross"):
        seen["layers.0"]
    with pytest.raises(KeyError, match=r"got 'layers.2'; expected one of 'layers.0.own'"):
        seen["layers.2"]
    record = seen["layers.1"][0]
    assert mh.Entropy() in record and mh.TopKeys(8) not in record
    with pytest.raises(mh.NotRecordedError, match=r"TopKeys\(k=8\) was not asked of layer") as info:
        record[mh.TopKeys(8)]
    assert isinstance(info.value, KeyError) and not str(info.value).startswith('"')
    with pytest.raises(mh.ArgumentTypeError, match="expected a Record"):
        seen.append("layers.0.own")


class Transformed(nn.Module):
    """Runs attention under vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = mh.MultiHeadAttention(E, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.attend)(x[:, None])


def run_observed(model: nn.Module, *measures: Any, **options: Any) -> None:
    with mh.observe(model, *measures, **options):
        model(torch.zeros(B, L, E))


def run_elsewhere() -> None:
    model = Model()
    with mh.observe(model, mh.Entropy()):
        thread = threading.Thread(target=model, args=(torch.zeros(B, L, E),))
        thread.start()
        thread.join()


def run_forward() -> None:
    attend = mh.MultiHeadAttention(E, HEADS)
    with mh.observe(attend, mh.Entropy()):
        attend.forward(torch.zeros(B, L, E))


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


BAD: dict[str, tuple[Callable[[], object], type[Exception], tuple[str, ...]]] = {
    "no measures": (
        lambda: mh.observe(Model()), mh.ArgumentError, ("got no measures", "Entropy()"),
    ),
    "a word": (
        lambda: mh.observe(Model(), "entropy"), mh.ArgumentTypeError, ("'entropy'", "Entropy()"),
    ),
    "no model": (
        lambda: mh.observe(mh.Entropy(), Model()), mh.ArgumentTypeError,
        ("got a Entropy as model", "model first"),
    ),
    "unknown layer": (
        lambda: mh.observe(Model(), mh.Entropy(), layers=["layers.0", "layers.7.own"]),
        mh.ArgumentError, ("got 'layers.7.own'", "'layers.0.own', 'layers.0.cross'"),
    ),
    "no layers": (
        lambda: mh.observe(Model(), mh.Entropy(), layers=[]), mh.ArgumentError,
        ("layers is empty", "'layers.0.own'"),
    ),
    "a layer's number": (
        lambda: mh.observe(Model(), mh.Entropy(), layers=[3]), mh.ArgumentTypeError,
        ("layers holds 3", "model.layers.3.*"),
    ),
    "layers' type": (
        lambda: mh.observe(Model(), mh.Entropy(), layers=3), mh.ArgumentTypeError,
        ("layers is a int", "a function of a path"),
    ),
    "layers that do not run": (
        lambda: run_observed(Model(), mh.Entropy(), layers="end"), mh.ArgumentError,
        ("layers='end' chose none", "'layers.0.own', 'layers.1.own'"),
    ),
    "a head too many": (
        lambda: run_observed(Model(), mh.Entropy(), heads=(0, 6)), mh.ArgumentError,
        ("heads=(0, 6)", "'layers.0.own' has 6 heads", "from 0 to 5"),
    ),
    "a head twice": (
        lambda: mh.observe(Model(), mh.Entropy(), heads=(1, 1)), mh.ArgumentError, ("(1, 1)",),
    ),
    "a negative head": (
        lambda: mh.observe(Model(), mh.Entropy(), heads=-1), mh.ArgumentError, ("heads=(-1,)",),
    ),
    "a head's type": (
        lambda: mh.observe(Model(), mh.Entropy(), heads=(0.5,)), mh.ArgumentTypeError, ("0.5",),
    ),
    "no attention": (
        lambda: mh.observe(nn.Sequential(nn.Linear(E, E)), mh.Entropy()), mh.ArgumentError,
        ("no attention to observe", "got a Sequential", "MultiHeadAttention modules"),
    ),
    "torch's attention": (
        lambda: mh.observe(nn.TransformerEncoderLayer(E, HEADS), mh.Entropy()), mh.ArgumentError,
        ("nn.MultiheadAttention", "from_torch"),
    ),
    "no attention that shows": (
        lambda: run_observed(Plain(), mh.Entropy()), mh.ArgumentError,
        ("none of its attention went through manyheads", "got a Plain"),
    ),
    "another thread": (run_elsewhere, mh.ArgumentError, ("in another thread", "open the block in")),
    "forward": (run_forward, mh.ArgumentError, ("not their forward()",)),
    "vmap": (
        lambda: run_observed(Transformed(), mh.Entropy()), mh.ArgumentError,
        ("'attend'", "torch.func", "without vmap"),
    ),
    "a question without meaning": (
        lambda: run_observed(Model(), mh.WeightRows((L,))), mh.ArgumentError, ("got 11",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    run, error, words = BAD[name]
    with pytest.raises(error, match=".*".join(map(re.escape, words))):
        run()
    assert not watching.watchers()
