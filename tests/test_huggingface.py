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
    BloomConfig,
    BloomForCausalLM,
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
from manyheads.integrations.huggingface_masks import CompactMask, compact_mask
from manyheads.spec import Geometry

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


# --- the mask function against transformers' own, pair by pair ------------------------------------


def every_third_key(batch_idx, head_idx, q_idx, kv_idx):
    return kv_idx % 3 == 0


def packed(mask_function, batch: int, length: int):
    positions = torch.stack([torch.arange(length) - (4 + b) * (torch.arange(length) > 3 + b)
                             for b in range(batch)])  # fmt: skip
    ids = masking_utils.find_packed_sequence_indices(positions)
    return masking_utils.packed_sequence_compatibility_function(mask_function, positions, ids)


def blocks(batch: int, length: int):
    ids = torch.full((batch, length), -1)
    ids[:, 2:5], ids[:, 7:9] = 0, 1
    return masking_utils.blockwise_overlay(ids)


CAUSAL = masking_utils.causal_mask_function
MASK_FUNCTIONS = {
    "causal": lambda b, n, left: CAUSAL,
    "bidirectional": lambda b, n, left: masking_utils.bidirectional_mask_function,
    "window": lambda b, n, left: masking_utils.sliding_window_causal_mask_function(WINDOW),
    "window both ways": lambda b, n, left: masking_utils.sliding_window_bidirectional_mask_function(
        WINDOW
    ),
    "chunks": lambda b, n, left: masking_utils.chunked_causal_mask_function(WINDOW, left),
    "causal or blocks": lambda b, n, left: masking_utils.or_masks(CAUSAL, blocks(b, n)),
    "a padding inside": lambda b, n, left: masking_utils.and_masks(
        CAUSAL, masking_utils.padding_mask_function(torch.arange(n).expand(b, n) > 2)
    ),
}
PACKED_FUNCTIONS = {
    "packed causal": lambda b, n: packed(CAUSAL, b, n),
    "packed window": lambda b, n: packed(
        masking_utils.sliding_window_causal_mask_function(WINDOW), b, n
    ),
    "packed chunks": lambda b, n: packed(
        masking_utils.chunked_causal_mask_function(WINDOW, torch.zeros(b, dtype=torch.int64)), b, n
    ),
}
#: q_length, kv_length, q_offset, kv_offset: whole, decoding, static cache (also as a tensor),
#: sliding cache, chunked prefill.
SIZES = [
    (11, 11, 0, 0),
    (1, 11, 10, 0),
    (3, 17, 5, 0),
    (3, 17, torch.tensor(5), 0),
    (7, 11, 9, 5),
    (1, 5, torch.tensor(12), 8),
]
PADDINGS = ["none", "ones", "left", "right", "short", "holes", "empty row"]


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


def both_masks(function, sizes, attention_mask, batch=3):
    arguments = dict(
        batch_size=batch,
        q_length=sizes[0],
        kv_length=sizes[1],
        q_offset=sizes[2],
        kv_offset=sizes[3],
        mask_function=function,
        attention_mask=attention_mask,
    )
    theirs = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    return compact_mask(**arguments), theirs


def lowered(compact: CompactMask) -> torch.Tensor:
    """What the plan means, beside `materialize`, which is what the mask means."""
    if compact.mask is None:
        return torch.ones(compact.shape, dtype=torch.bool)
    batch, _, q_len, k_len = compact.shape
    start = huggingface.per_batch(compact.query_start, batch)
    geometry = Geometry(batch, 1, q_len, k_len, torch.device("cpu"), start)
    plan, positions = compact.mask.lower(geometry)
    allowed = plan.materialize(geometry, positions)
    return allowed if compact.key_bias is None else allowed & (compact.key_bias == 0)


@pytest.mark.parametrize("pad", PADDINGS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", MASK_FUNCTIONS)
def test_masks_mean_what_transformers_means(name, sizes, pad):
    batch, length = 3, sizes[1] + sizes[3]
    attention_mask = padding(pad, batch, length)
    left = torch.zeros(batch, dtype=torch.int64)
    if attention_mask is not None:
        left = (attention_mask.cumsum(-1) == 0).sum(-1)
    function = MASK_FUNCTIONS[name](batch, length, left)
    ours, theirs = both_masks(function, sizes, attention_mask)
    assert ours.shape == theirs.shape == (batch, 1, sizes[0], sizes[1])
    assert torch.equal(ours.materialize(), theirs)
    assert torch.equal(lowered(ours).expand(ours.shape), theirs)


@pytest.mark.parametrize("name", PACKED_FUNCTIONS)
def test_packed_sequences_mean_what_transformers_means(name):
    function = PACKED_FUNCTIONS[name](3, 11)
    ours, theirs = both_masks(function, SIZES[0], None)
    assert torch.equal(ours.materialize(), theirs)
    assert torch.equal(lowered(ours).expand(ours.shape), theirs)


@pytest.mark.parametrize("pad", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", ["causal", "bidirectional", "window", "window both ways"])
def test_common_masks_need_no_memory_per_pair(name, pad):
    function = MASK_FUNCTIONS[name](3, 11, None)
    ours, _ = both_masks(function, SIZES[0], padding(pad, 3, 11))
    if ours.mask is not None:
        geometry = Geometry(3, 1, 11, 11, torch.device("cpu"), ours.query_start)
        assert ours.mask.lower(geometry)[0].kind == "band"
    assert ours.key_bias is None or ours.key_bias.shape == (3, 1, 1, 11)
    assert (ours.key_bias is not None) == (pad == "holes")


def test_a_mask_can_be_cut_like_a_tensor():
    ours, theirs = both_masks(CAUSAL, SIZES[2], padding("left", 3, 17))
    assert torch.equal(ours[:, :, :, :7], theirs[:, :, :, :7])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_mask_reads_as_the_tensor_it_stands_for(device):
    ours = compact_mask(batch_size=3, q_length=5, kv_length=11, device=device)
    tensor = ours.materialize()
    assert ours.ndim == ours.dim() == tensor.dim() and ours.shape == tensor.shape
    assert ours.dtype == tensor.dtype and ours.device == tensor.device
    nothing = compact_mask(3, 5, 11, mask_function=masking_utils.bidirectional_mask_function,
                           device=device)  # fmt: skip
    assert nothing.materialize().device == nothing.device == ours.device


def test_a_model_that_computes_with_its_mask_is_told_so():
    small = dict(vocab_size=VOCABULARY, hidden_size=24, n_layer=1, n_head=3)
    model = BloomForCausalLM(BloomConfig(**small, attn_implementation="manyheads")).eval()
    ids, mask = padded("left")
    with pytest.raises(ArgumentError, match=r'itself computes with its mask.*="sdpa"'):
        model(ids, attention_mask=mask)


def test_no_tensor_operation_takes_the_mask():
    ours, scores = compact_mask(batch_size=3, q_length=5, kv_length=11), torch.zeros(3, 2, 5, 11)
    operations = [
        lambda: scores + ours,
        lambda: ours + scores,
        lambda: scores.masked_fill(ours, 0.0),
        lambda: torch.where(ours, scores, 0.0),
    ]
    for operation in operations:
        with pytest.raises(ArgumentError, match="which is no tensor"):
            operation()


def test_all_ones_padding_is_nothing():
    ours, _ = both_masks(CAUSAL, SIZES[0], torch.ones(3, 11, dtype=torch.bool))
    assert ours.mask == mh.Causal() and ours.key_bias is None


@pytest.mark.parametrize("use_vmap", [False, True])
def test_an_unknown_mask_function_is_evaluated_and_named(use_vmap):
    function = masking_utils.and_masks(CAUSAL, every_third_key)
    arguments = dict(batch_size=2, q_length=300, kv_length=307, q_offset=7, mask_function=function)
    with pytest.warns(UserWarning, match="every_third_key"):
        ours = compact_mask(**arguments, use_vmap=use_vmap)
    theirs = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert torch.equal(ours.materialize(), theirs)


def test_a_static_cache_counting_on_does_not_move_the_mask():
    counter = torch.tensor(5)
    ours = compact_mask(batch_size=2, q_length=3, kv_length=17, q_offset=counter)
    before = ours.materialize().clone()
    counter.add_(3)
    assert torch.equal(ours.materialize(), before)


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
    block_mask = create_block_mask(CAUSAL, 1, None, 128, 128, device="cpu")
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
