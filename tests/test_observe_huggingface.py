"""`observe` on transformers models, against their own eager attention's weights."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import pytest
import torch
from oracle import Problem, attend
from test_huggingface import COMMON, DECODERS, VOCABULARY, bert, decoder, on, padded, whisper
from tolerance import assert_close_to_oracle
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BloomConfig,
    BloomForCausalLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    masking_utils,
)

import manyheads as mh
from manyheads.integrations import huggingface, huggingface_switch

L = 13  # what `padded` makes
ROWS = mh.WeightRows(tuple(range(L)))
SOUND = (3, 7, 34)  # 17 frames after the encoder's convolutions


def formula_weights(module, query, key, value, attention_mask, scaling=None, softcap=None,
                    s_aux=None, is_causal=None, **kwargs):  # fmt: skip
    """(the oracle's output, its weights): what is attended to where the values are unit vectors."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    given = dict(allowed=attention_mask, scale=scaling, softcap=softcap, sinks=s_aux)
    unit = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
    out = attend(Problem(query, key, value, **given))[0]
    return out.transpose(1, 2).contiguous(), attend(Problem(query, key, unit, **given))[0]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    huggingface.register()
    AttentionInterface.register("formula weights", formula_weights)
    AttentionMaskInterface.register("formula weights", masking_utils.sdpa_mask)


def implementations(model: nn.Module) -> list[str]:
    return [module.config._attn_implementation for module in model.modules()
            if hasattr(module, "config")]  # fmt: skip


def assert_weights(seen: mh.Seen, names: list[str], exact: Any, eager: Any, rows: Tensor) -> None:
    """Every layer's weights, on the rows that are no padding, are as close as eager's."""
    assert len(names) == len(exact) == len(eager) > 0
    for name, *theirs in zip(names, exact, eager, strict=True):
        (record,) = seen[name]
        ours, oracle, plain = (
            x.transpose(1, 2)[rows].transpose(0, 1)[None] for x in (record[ROWS], *theirs)
        )
        assert oracle.dtype == torch.float64
        assert_close_to_oracle(ours, oracle, plain, torch.float32)


MODELS = {name: functools.partial(decoder, name) for name in DECODERS} | {"bert": bert}


@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_weights_are_those_of_eager(name: str, side: str) -> None:
    """Windows, softcap, sinks, grouped heads and paddings among them."""
    if name == "bert" and side == "holes":
        side = "right"
    model, (ids, mask) = copy.deepcopy(MODELS[name]()), padded(side)
    given = dict(attention_mask=mask, output_attentions=True)
    exact = on(copy.deepcopy(model).double(), "formula weights")(ids, **given).attentions
    eager = on(model, "eager")(ids, **given).attentions
    expected = on(model, "eager" if name in ("gemma2", "gpt_oss") else "sdpa")(
        ids, attention_mask=mask
    )[0]
    before = implementations(model)
    with mh.observe(model, ROWS, mh.Entropy()) as seen:
        actual = model(ids, attention_mask=mask)[0]
        assert set(implementations(model)) == {"manyheads"}
    assert implementations(model) == before
    assert_weights(seen, list(seen.layers), exact, eager, mask.bool())
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])
    for layer in seen.layers:  # module paths, of the modules that attend
        assert "ttention" in type(model.get_submodule(layer)).__name__


@pytest.mark.parametrize("side", ["none", "right"])
@torch.no_grad()
def test_whispers_three_kinds_of_attention(side: str) -> None:
    model, sound, (ids, mask) = whisper(), torch.randn(SOUND), padded(side)
    given = dict(decoder_input_ids=ids, decoder_attention_mask=mask)
    asked = dict(**given, output_attentions=True)
    exact = on(copy.deepcopy(model).double(), "formula weights")(sound.double(), **asked)
    eager = on(model, "eager")(sound, **asked)
    with mh.observe(model, ROWS, layers="model.decoder") as seen:
        model(sound, **given)
    assert set(implementations(model)) == {"eager"}
    for kind, key in (("self_attn", "decoder_attentions"), ("encoder_attn", "cross_attentions")):
        names = [f"model.decoder.layers.{n}.{kind}" for n in range(2)]
        assert_weights(seen, names, exact[key], eager[key], mask.bool())
    assert len(seen) == 4
    cross = seen["model.decoder.layers.0.encoder_attn"][0]
    assert (cross.query_length, cross.key_length) == (L, 17)
    with mh.observe(model, mh.LogSumExp(), layers="*encoder.layers*") as seen:
        model(sound, **given)
    assert seen.layers == tuple(f"model.encoder.layers.{n}.self_attn" for n in range(2))


@pytest.mark.parametrize("how", ["dynamic", "static", "beams", "beams static", "chunked"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_generating_makes_a_record_a_step(name: str, how: str) -> None:
    model, (ids, mask), steps = copy.deepcopy(decoder(name)), padded("left"), 7
    options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=steps, do_sample=False)
    options["num_beams"] = 3 if "beams" in how else 1
    if "static" in how:
        options["cache_implementation"] = "static"
    if how == "chunked":
        options["prefill_chunk_size"] = 4
    dense = dict(output_attentions=True, return_dict_in_generate=True)
    eager = on(model, "eager").generate(ids, **options, **dense)
    last = mh.WeightRows((0,))
    with mh.observe(model, mh.Received(last=1), layers="model.layers.1", heads=(4, 1)) as seen:
        tokens = model.generate(ids, **options)
    assert torch.equal(tokens, eager.sequences)
    (layer,) = seen.layers
    records = seen[layer]
    first = len(records) - steps  # chunks of the prompt before the last one
    assert [record.step for record in records] == list(range(first + steps))
    assert (first > 0) == (how == "chunked")
    where = torch.cat([record.positions[:1] for record in records], dim=1)
    assert torch.equal(where, torch.arange(L + steps - 1)[None])
    for record, theirs in zip(records[first:], eager.attentions, strict=True):
        weights = theirs[1][:, [4, 1], -1]
        assert record.key_length == weights.shape[-1] and record.heads == (4, 1)
        torch.testing.assert_close(record[mh.Received(last=1)], weights)
    assert last not in records[0]


@torch.no_grad()
def test_generating_with_whisper() -> None:
    model, sound = whisper(), torch.randn(SOUND)
    options = dict(max_new_tokens=5, do_sample=False)
    dense = dict(output_attentions=True, return_dict_in_generate=True)
    eager = on(model, "eager").generate(sound, **options, **dense)
    with mh.observe(model, mh.WeightRows((0,)), layers="*encoder_attn") as seen:
        model.generate(sound, **options)
    for n, layer in enumerate(seen.layers):
        assert len(seen[layer]) == len(eager.cross_attentions) > 2
        for record, theirs in zip(seen[layer], eager.cross_attentions, strict=True):
            torch.testing.assert_close(record[mh.WeightRows((0,))], theirs[n][:, :, :1])


@torch.no_grad()
def test_a_compiled_forward_is_observed() -> None:
    torch._dynamo.reset()
    ids, mask = padded("left")
    options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=4, do_sample=False)
    options["cache_implementation"] = "static"
    model = on(copy.deepcopy(decoder("llama")), "manyheads")
    expected = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    with mh.observe(model, mh.Entropy()) as seen:
        assert torch.equal(model.generate(ids, **options), expected)
    assert [len(seen[layer]) for layer in seen.layers] == [4, 4]


def test_gradient_checkpointing_records_once() -> None:
    config = LlamaConfig(**COMMON)
    model = LlamaForCausalLM(config).train()
    model.activation_checkpointing_enable()
    ids, _ = padded("none")
    with mh.observe(model, mh.Entropy()) as seen:
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(seen) == 2 and not seen.records[0][mh.Entropy()].requires_grad


# --- what was there before is there afterwards ----------------------------------------------------


def test_every_config_gets_back_what_it_said() -> None:
    small = dict(vocab_size=VOCABULARY, hidden_size=21, num_hidden_layers=1, num_attention_heads=3,
                 intermediate_size=29)  # fmt: skip
    both = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**small), BertConfig(**small)
    )
    both.decoder_start_token_id = both.pad_token_id = 0
    model = EncoderDecoderModel(config=both).eval()
    model.set_attn_implementation({"": "sdpa", "encoder": "eager", "decoder": "sdpa"})
    before = implementations(model)
    assert {"eager", "sdpa"} <= set(before)
    ids, _ = padded("none")
    with torch.no_grad(), mh.observe(model, mh.Entropy()) as seen:
        model(input_ids=ids, decoder_input_ids=ids[:, :5])
        assert "eager" not in implementations(model)
    assert [seen[name][0].key_length for name in seen.layers] == [13, 5, 13]
    assert implementations(model) == before
    with pytest.raises(IndexError), mh.observe(model, mh.Entropy()):
        model(input_ids=ids + VOCABULARY, decoder_input_ids=ids)
    assert implementations(model) == before
    assert not huggingface_switch._held
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_config_without_a_model_gets_back_what_it_said() -> None:
    """Transformers switches such ones too."""

    class Composite(LlamaConfig):
        sub_configs = {"audio_config": BertConfig}  # noqa: RUF012

    config = Composite(**COMMON, attn_implementation="sdpa")
    config.audio_config = BertConfig(attn_implementation="eager")
    model, (ids, _) = LlamaForCausalLM(config).eval(), padded("none")
    before = config._attn_implementation, config.audio_config._attn_implementation
    with torch.no_grad(), mh.observe(model, mh.Entropy()):
        model(ids)
        assert config.audio_config._attn_implementation == "manyheads"
    assert (config._attn_implementation, config.audio_config._attn_implementation) == before


def test_models_that_share_a_config_and_threads() -> None:
    """The first block to open is the first to close."""
    config = LlamaConfig(**COMMON, attn_implementation="sdpa")
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    other.config = one.config  # as both had it
    ids, _ = padded("none")
    opened, closed, lengths = threading.Event(), threading.Event(), []

    def elsewhere() -> None:
        with torch.no_grad(), mh.observe(other, mh.Entropy()) as seen:
            opened.set()
            assert closed.wait(60)
            other(ids)
        lengths.append(len(seen))

    thread = threading.Thread(target=elsewhere)
    with torch.no_grad(), mh.observe(one, mh.Entropy()) as seen:
        thread.start()
        assert opened.wait(60)
        one(ids)
    closed.set()
    thread.join()
    assert len(seen) == 2 and lengths == [2]
    assert config._attn_implementation == one.config._attn_implementation == "sdpa"


def test_a_model_inside_a_module_is_found() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.attend = bert(), mh.MultiHeadAttention(21, 7)

        def forward(self, ids: Tensor) -> Tensor:
            return self.attend(self.bert(ids).last_hidden_state)

    model, (ids, _) = Classifier(), padded("none")
    with torch.no_grad(), mh.observe(model, mh.Entropy()) as seen:
        model(ids)
    layers = tuple(f"bert.encoder.layer.{n}.attention.self" for n in range(2))
    assert seen.layers == (*layers, "attend")
    assert seen["bert.encoder.layer.0"] == seen[layers[0]]


def test_a_model_that_leaves_during_the_block_is_told_of_and_goes_back() -> None:
    model, (ids, _) = on(bert(), "sdpa"), padded("none")
    with torch.no_grad():
        with (
            pytest.warns(UserWarning, match="switched to eager attention.*not seen"),
            mh.observe(model, mh.Entropy()) as seen,
        ):
            model(ids)
            model.config._attn_implementation = "eager"
            model(ids)
        assert len(seen) == 2 and set(implementations(model)) == {"sdpa"}


# --- what cannot be observed ----------------------------------------------------------------------


def bloom() -> BloomForCausalLM:
    small = dict(vocab_size=VOCABULARY, hidden_size=24, n_layer=1, n_head=3)
    return BloomForCausalLM(BloomConfig(**small))


def test_a_model_with_attention_of_its_own_is_refused() -> None:
    with pytest.raises(mh.ArgumentError, match=r"BloomForCausalLM.*does not go through.*expected"):
        mh.observe(bloom(), mh.Entropy())


def test_a_part_with_attention_of_its_own_is_named() -> None:
    model, (ids, _) = nn.ModuleList([bert(), bloom()]), padded("none")
    with pytest.warns(UserWarning, match="BloomForCausalLM.*is not observed; the rest"):
        observer = mh.observe(model, mh.Entropy())
    with torch.no_grad(), observer as seen:
        model[0](ids)
        model[1](ids)
    assert len(seen) == 2


def test_an_unknown_layer_is_told_those_there_are() -> None:
    with pytest.raises(mh.ArgumentError, match=r"got 'layer.0'.*'encoder.layer.0.attention.self'"):
        mh.observe(bert(), mh.Entropy(), layers="layer.0")
