"""The mask function against transformers' own, pair by pair."""

import pytest
import torch
from test_huggingface import VOCABULARY, WINDOW, padded, padding
from transformers import BloomConfig, BloomForCausalLM, masking_utils

import manyheads as mh
from manyheads.errors import ArgumentError
from manyheads.integrations import huggingface
from manyheads.integrations.huggingface_masks import CompactMask, compact_mask
from manyheads.spec import Geometry


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    huggingface.register()


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
