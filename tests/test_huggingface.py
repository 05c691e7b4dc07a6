"""transformers models on manyheads against the same models on transformers' own eager attention."""

import copy
import functools
import importlib
import sys

import pytest
import torch
from oracle import Problem, attend
from tolerance import assert_close_to_oracle
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
    masking_utils,
)

import manyheads as mh
from manyheads.errors import ArgumentError, ArgumentTypeError, MissingDependencyError
from manyheads.integrations import huggingface
from manyheads.integrations.huggingface_masks import compact_mask

WINDOW = 5
VOCABULARY = 37
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=29,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    initializer_range=0.3,  # scores that differ, so that a wrong mask shows
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
DECODERS = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**COMMON)),
    "mistral": (MistralForCausalLM, lambda: MistralConfig(**COMMON, sliding_window=WINDOW)),
    "gemma2": (
        Gemma2ForCausalLM,
        lambda: Gemma2Config(
            **COMMON,
            sliding_window=WINDOW,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=7,
        ),
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        lambda: GptOssConfig(
            **{**COMMON, "intermediate_size": 28},  # its experts want multiples of 16 bytes
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            num_local_experts=3,
            num_experts_per_tok=2,
        ),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        lambda: GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=24,
            n_inner=29,
            n_layer=2,
            n_head=3,
            n_positions=31,
            initializer_range=0.3,
            attn_pdrop=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    huggingface.register()
    AttentionInterface.register("formula", formula)
    AttentionMaskInterface.register("formula", masking_utils.sdpa_mask)


@functools.cache
def decoder(name: str):
    """A tiny random model in eval mode; set its attention before use."""
    kind, config = DECODERS[name]
    torch.manual_seed(71)
    model = kind(config()).eval()
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the only one that takes float64
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


def on(model, attention: str):
    model.set_attn_implementation(attention)
    return model


def padded(side: str, lengths=(13, 9, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) [3, 13]; side "none" gives three full rows.

    "holes" hides seven keys in the middle, more than a window, and a few elsewhere.
    """
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)))
    mask = torch.ones_like(ids)
    if side == "holes":
        mask[1, 3:10], mask[2, 0], mask[2, 5] = 0, 0, 0
    elif side != "none":
        for row, length in enumerate(lengths):
            hidden = slice(0, max(lengths) - length) if side == "left" else slice(length, None)
            mask[row, hidden] = 0
    return ids.masked_fill(mask == 0, 0), mask


def padding(kind: str, batch: int, length: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.bool)
    if kind == "left":
        mask[0, :3], mask[1, :1] = False, False
    elif kind == "right":
        mask[0, -3:], mask[1, -1:] = False, False
    elif kind == "short":
        mask = mask[:, :-2]
    elif kind == "holes":
        mask[0, 4:6], mask[1, 1], mask[1, -1] = False, False, False
    elif kind == "empty row":
        mask[0] = False
    return mask


def formula(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None,
            is_causal=None, **kwargs):  # fmt: skip
    """The oracle as a transformers attention function; its mask is transformers' own bool tensor.

    transformers' eager attention is no oracle in float64: its softmax is float32, where float64's
    smallest number, which it uses as -inf, turns into a real one, and padding rows into NaN.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    problem = Problem(
        query, key, value, allowed=attention_mask, scale=scaling, softcap=softcap, sinks=s_aux
    )
    return attend(problem)[0].transpose(1, 2).contiguous(), None


def assert_same_outputs(model, run, rows=None) -> None:
    """`run(model)` on manyheads is as close to the float64 model as transformers' eager is."""
    exact = run(on(copy.deepcopy(model).double(), "formula"))
    eager = run(on(model, "eager"))
    ours = run(on(model, "manyheads"))
    if rows is not None:
        ours, eager, exact = ours[rows], eager[rows], exact[rows]
    shape = (1, 1, -1, ours.shape[-1])
    assert ours.numel() and exact.dtype == torch.float64 and ours.dtype == torch.float32
    assert_close_to_oracle(
        ours.reshape(shape), exact.reshape(shape), eager.reshape(shape), torch.float32
    )


# --- registration --------------------------------------------------------------------------------


def test_registers_attention_and_mask_under_one_name_and_may_be_repeated():
    huggingface.register("manyheads-again")
    huggingface.register("manyheads-again")
    assert AttentionInterface()["manyheads-again"] is huggingface.attention_forward
    assert AttentionMaskInterface()["manyheads-again"] is compact_mask


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "manyheads.integrations.huggingface")
    with pytest.raises(MissingDependencyError, match=r"pip install 'manyheads\[huggingface\]'"):
        importlib.import_module("manyheads.integrations.huggingface")


def test_an_older_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position: None)
    monkeypatch.delitem(sys.modules, "manyheads.integrations.huggingface")
    with pytest.raises(MissingDependencyError, match=r"or later \(an older one is installed\)"):
        importlib.import_module("manyheads.integrations.huggingface")


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_forward_equals_eager(name, side):
    ids, mask = padded(side)
    with torch.no_grad():
        assert_same_outputs(
            decoder(name), lambda m: m(ids, attention_mask=mask).logits, mask.bool()
        )


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_positions_equal_eager(name):
    ids, _ = padded("none")
    positions = torch.cat([torch.arange(6), torch.arange(7)]).expand(3, -1)
    with torch.no_grad():
        assert_same_outputs(decoder(name), lambda m: m(ids, position_ids=positions).logits)


@pytest.mark.parametrize("how", ["dynamic", "static", "beams", "beams static", "chunked"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_gives_eagers_tokens(name, side, how):
    ids, mask = padded(side)
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    if "beams" in how:
        options["num_beams"] = 3
    if "static" in how:
        options["cache_implementation"] = "static"
    if how == "chunked":
        options["prefill_chunk_size"] = 4
    model = decoder(name)
    ours = on(model, "manyheads").generate(ids, **options)
    assert ours.shape == (3, 21)
    assert torch.equal(ours, on(model, "eager").generate(ids, **options))


def gradients_of(loss_of):
    """model -> its loss and the gradients of all its parameters, in one row [1, n]."""

    def run(model):
        model.zero_grad()
        loss = loss_of(model)
        loss.backward()
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return torch.cat([loss.detach().reshape(1), *parts])[None]

    return run


@pytest.mark.parametrize("name", DECODERS)
def test_training_step_equals_eager(name):
    ids, mask = padded("right")
    labels = ids.masked_fill(mask == 0, -100)

    def loss_of(model):
        return model(ids, attention_mask=mask, labels=labels).loss

    assert_same_outputs(decoder(name), gradients_of(loss_of))


def test_dropout_is_passed_on():
    config = LlamaConfig(**COMMON, attention_dropout=0.5)
    model = on(LlamaForCausalLM(config).train(), "manyheads")
    ids, _ = padded("none")
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        model.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)


def bert() -> BertModel:
    torch.manual_seed(73)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=21,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=29,
        max_position_embeddings=31,
        initializer_range=0.3,
    )
    return BertModel(config).eval()


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_bert_equals_eager(side):
    ids, mask = padded(side)
    with torch.no_grad():
        assert_same_outputs(
            bert(), lambda m: m(ids, attention_mask=mask).last_hidden_state, mask.bool()
        )


def test_bert_training_step_equals_eager():
    ids, mask = padded("right")

    def loss_of(model):
        out = model(ids, attention_mask=mask).last_hidden_state
        return out[mask.bool()].sin().mean()

    assert_same_outputs(bert(), gradients_of(loss_of))


def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(79)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=18,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=29,
        decoder_ffn_dim=29,
        num_mel_bins=7,
        max_source_positions=17,
        max_target_positions=31,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config).eval()


@pytest.mark.parametrize("side", ["none", "right"])
def test_whisper_forward_equals_eager(side):
    sound = torch.randn(3, 7, 34)
    ids, mask = padded(side)

    def logits(model):
        dtype = next(model.parameters()).dtype
        return model(sound.to(dtype), decoder_input_ids=ids, decoder_attention_mask=mask).logits

    with torch.no_grad():
        assert_same_outputs(whisper(), logits, mask.bool())


def test_whisper_training_step_equals_eager():
    sound = torch.randn(3, 7, 34)
    ids, mask = padded("right")
    labels = ids.masked_fill(mask == 0, -100)

    def loss_of(model):
        dtype = next(model.parameters()).dtype
        return model(sound.to(dtype), decoder_attention_mask=mask, labels=labels).loss

    assert_same_outputs(whisper(), gradients_of(loss_of))


@pytest.mark.parametrize("how", ["dynamic", "static", "beams"])
def test_whisper_generate_gives_eagers_tokens(how):
    options = dict(max_new_tokens=8, do_sample=False)
    if how == "beams":
        options["num_beams"] = 3
    if how == "static":
        options["cache_implementation"] = "static"
    sound, model = torch.randn(3, 7, 34), whisper()
    ours = on(model, "manyheads").generate(sound, **options)
    assert ours.shape[1] > 3
    assert torch.equal(ours, on(model, "eager").generate(sound, **options))


# --- masks and arguments that reach the attention function directly ------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_users_own_mask_works(dtype):
    ids, _ = padded("none")
    allowed = torch.rand(3, 1, 13, 13) < 0.5
    allowed |= torch.eye(13, dtype=torch.bool)
    additive = torch.zeros(3, 1, 13, 13).masked_fill(~allowed, torch.finfo(torch.float32).min)
    model = decoder("llama")

    def logits(model):
        attention = model.config._attn_implementation
        takes_bool = attention == "formula" or (attention == "manyheads" and dtype == torch.bool)
        return model(ids, attention_mask=allowed if takes_bool else additive).logits

    with torch.no_grad():
        assert_same_outputs(model, logits)


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_a_users_own_mask_may_broadcast(model):
    model = bert() if model == "bert" else decoder(model)
    ids, mask = padded("right")
    row = mask.bool()[:, None, None, :]

    def output(model):
        keys = row if model.config._attn_implementation != "eager" else additive
        return model(ids, attention_mask=keys)[0]

    additive = torch.zeros(row.shape).masked_fill(~row, torch.finfo(torch.float32).min)
    with torch.no_grad():
        assert_same_outputs(model, output, mask.bool())


class Causally(torch.nn.Module):
    is_causal = True


class Freely(torch.nn.Module):
    is_causal = False


def test_no_mask_is_causal_from_the_first_key_on():
    query, key, value = (torch.randn(2, 4, n, 6) for n in (3, 7, 7))
    out, weights = huggingface.attention_forward(Causally(), query, key, value, None)
    expected = mh.attention(query, key, value, mask=mh.Causal(), query_start=0)
    assert weights is None and torch.equal(out, expected.transpose(1, 2))
    assert out.shape == (2, 3, 4, 6) and out.is_contiguous()


@pytest.mark.parametrize(
    ("module", "is_causal", "q_len"),
    [(Freely(), None, 3), (Causally(), False, 3), (Causally(), None, 1)],
)
def test_no_mask_is_no_mask_elsewhere(module, is_causal, q_len):
    query, key, value = (torch.randn(2, 4, n, 6) for n in (q_len, 7, 7))
    out, _ = huggingface.attention_forward(module, query, key, value, None, is_causal=is_causal)
    assert torch.equal(out, mh.attention(query, key, value).transpose(1, 2))


def test_window_without_a_mask_and_every_argument():
    query, key, value = (torch.randn(2, h, 11, 6) for h in (4, 2, 2))
    sinks, bias = torch.randn(4), torch.randn(1, 4, 11, 11)
    out, _ = huggingface.attention_forward(
        Causally(),
        query,
        key,
        value,
        None,
        scaling=0.3,
        softcap=2.0,
        s_aux=sinks,
        position_bias=bias,
        sliding_window=WINDOW,
    )
    expected = mh.attention(
        query,
        key,
        value,
        mask=mh.Causal() & mh.Window(WINDOW - 1, None),
        scale=0.3,
        softcap=2.0,
        sinks=sinks,
        attn_bias=bias,
    )
    assert torch.equal(out, expected.transpose(1, 2))


def test_one_query_shared_by_the_batch():
    query, key = torch.randn(1, 4, 3, 6), torch.randn(5, 4, 7, 6)
    out, _ = huggingface.attention_forward(Freely(), query, key, key, None)
    assert out.shape == (5, 3, 4, 6)


def test_what_is_not_supported_says_so():
    x = torch.randn(1, 2, 3, 4)
    block_mask = create_block_mask(
        masking_utils.causal_mask_function, 1, None, 128, 128, device="cpu"
    )
    with pytest.raises(ArgumentTypeError, match=r"BlockMask.*Expected: a bool or floating"):
        huggingface.attention_forward(Causally(), x, x, x, block_mask)
    with pytest.raises(ArgumentError, match="paged cache"):
        huggingface.attention_forward(Causally(), x, x, x, None, cache=object())


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pad"),
    [
        ("llama", "none"),
        ("llama", "left"),
        ("llama", "holes"),
        ("mistral", "none"),
        ("gemma2", "left"),
    ],
)
def test_forward_compiles_to_one_graph(name, pad):
    torch._dynamo.reset()
    model = on(decoder(name), "manyheads")
    ids, _ = padded("none")
    mask = padding(pad, 3, 13)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        actual = compiled(ids, attention_mask=mask, use_cache=False).logits
    rows = slice(None) if mask is None else mask
    torch.testing.assert_close(actual[rows], expected[rows])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_decoding_with_a_compiled_forward_equals_eager(name):
    torch._dynamo.reset()
    ids, mask = padded("left")
    options = dict(attention_mask=mask, max_new_tokens=5, do_sample=False)
    options["cache_implementation"] = "static"
    model = copy.deepcopy(decoder(name))
    expected = on(model, "eager").generate(ids, **options)
    on(model, "manyheads")
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(model.generate(ids, **options), expected)
