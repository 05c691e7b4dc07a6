"""`output_attentions=True`: weights that are computed where one looks, against eager's."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from test_huggingface import DECODERS, bert, decoder, on, padded, whisper
from tolerance import assert_equal_up_to_rounding
from torch import Tensor

import manyheads as mh
from manyheads.integrations import huggingface, lazy
from manyheads.integrations.lazy import LazyWeights, weights_of
from manyheads.watching import keeping

B, HEADS, KV_HEADS, LQ, LK, D = 2, 6, 3, 11, 13, 5


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    huggingface.register()


def options(kind: str) -> dict[str, Any]:
    """Every form of mask, bias and position that a part is cut out of."""
    match kind:
        case "causal":
            return dict(mask=mh.Causal())
        case "padded":
            return dict(mask=mh.Causal() & mh.KeyRange([0, 4], [13, 11]), attn_bias=mh.Alibi())
        case "window":
            return dict(mask=mh.Causal() & mh.Window(3, 0), query_start=torch.tensor([2, 1]))
        case "documents":
            documents = mh.Documents([[4, 7], [5, 6]], [[6, 7], [3, 10]])
            return dict(mask=documents, attn_bias=mh.Alibi())  # looks at both sides
        case "dense":
            mask = torch.rand(B, HEADS, LQ, LK) < 0.6
            bias = mh.DenseBias(torch.randn(1, HEADS, LQ, LK)) + mh.Alibi()
            return dict(mask=mask, attn_bias=bias, sinks=torch.randn(HEADS), softcap=2.0)
    raise AssertionError(kind)


KINDS = ["causal", "padded", "window", "documents", "dense"]


def made(kind: str = "causal", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(lazy weights, the same all computed by `measure`)."""
    query = torch.randn(B, HEADS, LQ, D, dtype=dtype)
    key = torch.randn(B, KV_HEADS, LK, D, dtype=dtype)
    given = options(kind)
    with keeping() as calls, torch.no_grad():
        mh.attention(query, key, key, **given)
        (dense,) = mh.measure(query, key, [mh.WeightRows(tuple(range(LQ)))], **given)
    weights = weights_of(calls[0])
    assert isinstance(weights, LazyWeights)
    return weights.detach(), dense.to(dtype)


ALL = slice(None)
INDICES = [
    (0, HEADS * LQ), (-1, HEADS * LQ), ((ALL, 2), B * LQ), ((1, 4, 3), 1), ((1, ...), HEADS * LQ),
    ((..., 3), B * HEADS * LQ), ((..., slice(2, 5), slice(1, 9)), B * HEADS * 3), ((0, -2, -1), 1),
    ((ALL, slice(1, None, 2), slice(0, 9, 4)), B * 3 * 3), ((slice(0, 1), 5), LQ),
    ((ALL, [1, 4]), B * 2 * LQ), ((ALL, torch.tensor([5, 0, -1]), slice(1, 3)), B * 2 * 2),
    ((0, [1, 4], -1), 2), (([0, 1], [2, 3], [4, 5], [6, 7]), B * 2 * 2), (([1], ALL, [2]), HEADS),
    ((0, ALL, [2, 3]), HEADS * 2), (torch.tensor([1, 1]), HEADS * LQ), ((slice(1, 1),), 0),
    ((ALL, slice(2, 2)), 0), ((0, torch.tensor([], dtype=torch.long), 1), 0),
    ((None, 0), None), ((0, None, 3), None), ((0, torch.arange(HEADS) % 2 == 0), None),
    (True, None),
]  # fmt: skip


@pytest.mark.parametrize("at_once", [0, 1 << 20])
@pytest.mark.parametrize(("index", "rows"), INDICES, ids=str)
def test_a_part_is_that_of_the_whole_and_nothing_else_is_computed(
    index: Any, rows: int | None, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy, "_AT_ONCE", at_once)
    computed, softmax_of = [0], lazy.softmax_of

    def counted(call: Any, logits: Tensor) -> Any:
        computed[0] += logits.numel() // LK
        return softmax_of(call, logits)

    monkeypatch.setattr(lazy, "softmax_of", counted)
    weights, dense = made("padded")
    part = weights[index]
    assert part.shape == dense[index].shape
    plain = part + 0
    assert type(plain) is Tensor
    assert_equal_up_to_rounding(plain, dense[index])
    assert computed[0] == (B * HEADS * LQ if rows is None else rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [0, 1 << 20])
def test_parts_of_parts(kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "_AT_ONCE", at_once)
    monkeypatch.setattr(lazy, "_BLOCK", 3 * LK)  # several blocks of rows
    weights, dense = made(kind)
    assert_equal_up_to_rounding(weights.clone(), dense)
    for one, other in (
        (weights[1], dense[1]),
        (weights[1][2:5][1], dense[1, 3]),
        (weights[:, [4, 1]][0][0][7], dense[0, 4, 7]),
        (weights[..., 3:10][1, :, ::2][..., 2], dense[1, :, ::2, 5]),
        (list(weights)[1], dense[1]),
    ):
        assert one.shape == other.shape
        assert_equal_up_to_rounding(one + 0, other)


def test_sizes_cost_nothing_and_parts_that_are_large_stay_lazy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LazyWeights, "materialize", None)
    monkeypatch.setattr(lazy, "_AT_ONCE", HEADS * LQ * LK - 1)
    weights, _ = made()
    assert weights.shape == (B, HEADS, LQ, LK) == weights.size() and weights.size(-1) == LK
    assert len(weights) == B and weights.dim() == weights.ndim == 4
    assert weights.numel() == B * HEADS * LQ * LK and weights.stride()[-1] == 1
    assert weights.dtype == torch.float32 and weights.device.type == "cpu"
    assert weights.is_floating_point() and weights.is_contiguous() and not weights.requires_grad
    assert isinstance(weights, Tensor) and "shape=(2, 6, 11, 13)" in repr(weights)
    for same in (
        weights[0], weights.float(), weights.cpu(), weights.contiguous(), weights.double()[1],
        weights.to("cpu"), weights.to(torch.float16), weights.detach().half().bfloat16(),
    ):  # fmt: skip
        assert isinstance(same, LazyWeights)
    assert weights.to(torch.float16).dtype == torch.float16 and weights.double().dtype.itemsize == 8


def test_everything_else_goes_on_as_a_tensor() -> None:
    weights, dense = made()
    for run in (
        lambda x: x.mean(1),
        lambda x: torch.stack([x, x]).sum(0),
        lambda x: 1 - x * 2,
        lambda x: x.transpose(1, 2).flatten(2),
        lambda x: torch.cat([x[:, 0], x[:, 1]], dim=1),
        lambda x: x.float().cpu().detach().numpy(),
        lambda x: np.asarray(x),
        lambda x: torch.tensor(x.tolist()),
        lambda x: x.to(torch.float64, copy=True),
        lambda x: torch.einsum("bhqk,bhqk->bq", x, x),
        lambda x: copy.deepcopy(x) + 0,
    ):
        ours, theirs = torch.as_tensor(run(weights)), torch.as_tensor(run(dense))
        assert type(ours) is Tensor and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs)
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    assert_equal_up_to_rounding(torch.load(file), dense)


CHANGES: dict[str, Any] = {
    "__setitem__": lambda x: x.__setitem__((0, 0), 0.0),
    "masked_fill_": lambda x: x.masked_fill_(x > 0, 0.0),
    "add_": lambda x: x.__iadd__(1),
    "retain_grad": lambda x: x.retain_grad(),
    "register_hook": lambda x: x.register_hook(print),
    "requires_grad_": lambda x: x.requires_grad_(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_be_lost_is_refused(name: str) -> None:
    weights, _ = made()
    with pytest.raises(mh.ArgumentError, match=rf"got {name}\(\); expected.*Take .clone\(\)"):
        CHANGES[name](weights)
    assert weights.clone().zero_().sum() == 0 < weights.sum()


def test_half_types_round_as_the_query_does() -> None:
    weights, dense = made(dtype=torch.bfloat16)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights.float() + 0, dense.float())
    assert torch.equal(weights[0, 1].double(), dense[0, 1].double())


@pytest.mark.parametrize(
    ("index", "error"),
    [(2, IndexError), ((0, -7), IndexError), ((0, [6]), IndexError), ([-3], IndexError),
     ((0,) * 5, IndexError), (slice(None, None, -1), ValueError), ("x", (IndexError, TypeError))],
)  # fmt: skip
def test_indices_that_are_not_there(index: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        made()[0][index]


def test_gradients_flow_through() -> None:
    query, key = (torch.randn(B, HEADS, n, D).requires_grad_() for n in (LQ, LK))
    with keeping() as calls:
        mh.attention(query, key, key, mask=mh.Causal())
    weights = weights_of(calls[0])
    assert weights.requires_grad and not weights.detach().requires_grad
    actual = torch.autograd.grad(weights[:, 2].square().sum(), (query, key))
    (dense,) = mh.measure(query, key, [mh.WeightRows(tuple(range(LQ)))], mask=mh.Causal())
    expected = torch.autograd.grad(dense[:, 2].square().sum(), (query, key))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not weights.detach()[:, 2].requires_grad


def test_few_weights_are_plain_and_later_writes_to_the_cache_do_not_matter() -> None:
    query, key = torch.randn(B, HEADS, LQ, D), torch.randn(B, KV_HEADS, LK, D)
    for rows, kind in ((1, Tensor), (LQ, LazyWeights)):
        with keeping() as calls:
            mh.attention(query[:, :, :rows], key, key)
        weights = weights_of(calls[0])
        (before,) = mh.measure(query[:, :, :rows], key, [mh.WeightRows((0,))])
        assert type(weights) is kind
        key.zero_()
        torch.testing.assert_close(weights[:, :, :1] + 0, before)
        key.normal_()


# --- in transformers ------------------------------------------------------------------------------


MODELS = {name: (lambda name=name: decoder(name)) for name in DECODERS} | {"bert": bert}


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_forward_pass_returns_eagers_weights(name: str, side: str) -> None:
    model, (ids, mask) = copy.deepcopy(MODELS[name]()), padded(side)
    given = dict(attention_mask=mask, output_attentions=True)
    eager = on(model, "eager")(ids, **given)
    ours = on(model, "manyheads")(ids, **given)
    assert len(ours.attentions) == len(eager.attentions) == 2
    torch.testing.assert_close(ours[0][mask.bool()], eager[0][mask.bool()])
    for mine, theirs in zip(ours.attentions, eager.attentions, strict=True):
        assert isinstance(mine, LazyWeights) and mine.shape == theirs.shape
        mine, theirs = (x[:, 1:].transpose(1, 2)[mask.bool()] for x in (mine, theirs))
        torch.testing.assert_close(mine, theirs)
    assert on(model, "manyheads")(ids, attention_mask=mask).get("attentions") is None


@torch.no_grad()
def test_whisper_returns_all_three_kinds() -> None:
    model, sound, (ids, _) = whisper(), torch.randn(3, 7, 34), padded("none")
    given = dict(decoder_input_ids=ids, output_attentions=True)
    eager = on(model, "eager")(sound, **given)
    ours = on(model, "manyheads")(sound, **given)
    for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(ours[kind]) == 2
        for mine, theirs in zip(ours[kind], eager[kind], strict=True):
            assert isinstance(mine, LazyWeights) and mine.shape == theirs.shape
            torch.testing.assert_close(mine[:, 1], theirs[:, 1])


@pytest.mark.parametrize("how", ["dynamic", "static", "beams"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gpt2"])
@torch.no_grad()
def test_generate_returns_eagers_weights(name: str, how: str) -> None:
    model, (ids, mask) = copy.deepcopy(decoder(name)), padded("left")
    given: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=4, do_sample=False)
    given |= dict(output_attentions=True, return_dict_in_generate=True)
    given["num_beams"] = 3 if how == "beams" else 1
    if how == "static":
        given["cache_implementation"] = "static"
    eager = on(model, "eager").generate(ids, **given)
    ours = on(model, "manyheads").generate(ids, **given)
    assert torch.equal(ours.sequences, eager.sequences) and len(ours.attentions) == 4
    for mine, theirs in zip(ours.attentions, eager.attentions, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one[:, 1:, -1], other[:, 1:, -1])
    assert isinstance(ours.attentions[0][0], LazyWeights)


@torch.no_grad()
def test_with_an_observer_and_a_config_that_asks_for_attentions() -> None:
    model, (ids, _) = on(copy.deepcopy(decoder("llama")), "eager"), padded("none")
    model.config.output_attentions = True
    expected = model(ids).attentions
    with mh.observe(model, mh.Entropy()) as seen:
        inside = model(ids).attentions
    assert len(seen) == 2 and isinstance(inside[0], LazyWeights)
    torch.testing.assert_close(inside[1] + 0, expected[1])
    assert type(model(ids).attentions[0]) is Tensor


class Attends(torch.nn.Module):
    """Hands its second result to whoever has a hook on it, as transformers' modules do."""

    is_causal = False

    def forward(self, query: Tensor, key: Tensor, **kwargs: Any) -> Any:
        return huggingface.attention_forward(self, query, key, key, None, **kwargs)


@pytest.mark.parametrize("told", [True, False])
@torch.no_grad()
def test_compiled_modules_return_them_or_say_why_not(told: bool) -> None:
    """GPT-2 does not tell its layers of output_attentions; only the collector knows."""
    torch._dynamo.reset()
    module, collected = Attends(), []
    module.register_forward_hook(lambda module, inputs, output: collected.append(output[1]))
    query, key = torch.randn(B, HEADS, LQ, D), torch.randn(B, KV_HEADS, LK, D)
    given = dict(output_attentions=True) if told else {}
    (dense,) = mh.measure(query, key, [mh.WeightRows(tuple(range(LQ)))])
    token = huggingface._collector.set(None if told else {"attentions": []})
    try:
        torch.compile(module, backend="eager")(query, key, **given)
        assert_equal_up_to_rounding(collected[0] + 0, dense)
        torch._dynamo.reset()
        refused = "outside of the graph; leave fullgraph=True or" if told else "ContextVar"
        with pytest.raises(Exception, match=refused):
            torch.compile(module, backend="eager", fullgraph=True)(query, key, **given)
    finally:
        huggingface._collector.reset(token)
    module(query, key)
    assert collected[-1] is None
