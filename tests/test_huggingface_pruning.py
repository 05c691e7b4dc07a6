"""`prune_model`: the smaller model against the whole one with those heads' outputs zeroed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from test_huggingface import COMMON, VOCABULARY, bert, decoder, padded, whisper
from torch import Tensor, nn
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

import manyheads as mh
from manyheads.integrations import huggingface
from manyheads.integrations.huggingface_pruning import prune_model

SOUND = torch.randn(3, 7, 34, generator=torch.Generator().manual_seed(3))


def roberta() -> RobertaModel:
    small = dict(vocab_size=VOCABULARY, hidden_size=21, num_hidden_layers=2, num_attention_heads=3)
    return RobertaModel(RobertaConfig(**small, intermediate_size=29, pad_token_id=0)).eval()


#: Six query heads, two key/value heads; of the others three and no groups.
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda name=name: decoder(name)) for name in ("llama", "mistral", "gemma2")},
    "gpt_oss": lambda: decoder("gpt_oss"),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)).eval(),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON)).eval(),
    "bert": bert,
    "roberta": roberta,
    "whisper": whisper,
}
GROUPED = [name for name in MODELS if name not in ("bert", "roberta", "whisper")]


def layers_of(model: nn.Module) -> list[str]:
    names = [name for name, one in model.named_modules() if hasattr(one, "scaling")]
    assert len(names) in (2, 6)
    return names


def outputs_of(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    around = model.get_submodule(name.rpartition(".")[0])
    found = getattr(layer, "o_proj", None) or getattr(layer, "out_proj", None)
    return found or around.output.dense


def deaf(model: nn.Module, heads: Mapping[str, list[int]], head_dim: int) -> nn.Module:
    """The whole model, with W_O deaf to these heads."""
    whole = copy.deepcopy(model)
    with torch.no_grad():
        for name, gone in heads.items():
            for head in gone:
                columns = slice(head * head_dim, (head + 1) * head_dim)
                outputs_of(whole, name).weight[:, columns] = 0
    return whole


def head_dim_of(layer: nn.Module) -> int:
    return getattr(layer, "head_dim", None) or layer.attention_head_size


def run(model: nn.Module) -> Tensor:
    torch.manual_seed(7)
    ids, _ = padded("none")
    if type(model).__name__.startswith("Whisper"):
        return model(SOUND.to(model.dtype), decoder_input_ids=ids).logits
    return model(ids)[0]


def gone_from(name: str, model: nn.Module) -> dict[str, list[int]]:
    """Other heads in each layer: a group, or one of each; of the last layer all but one group."""
    layers = layers_of(model)
    if name not in GROUPED:
        return {layer: [[1], [0, 2], []][n % 3] for n, layer in enumerate(layers)}
    assert len(layers) == 2
    return {layers[0]: [2, 5], layers[1]: [0, 1, 2]}


@pytest.mark.parametrize("attention", ["eager", "sdpa", "manyheads"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_equals_the_model_with_zeroed_heads(name: str, attention: str) -> None:
    huggingface.register()
    model = copy.deepcopy(MODELS[name]()).double()
    if attention == "sdpa" and not model._supports_sdpa:
        attention = "eager"
    model.set_attn_implementation(attention)
    for module in model.modules():  # biases and sinks are 0 at first
        for parameter in (getattr(module, "bias", None), getattr(module, "sinks", None)):
            if isinstance(parameter, nn.Parameter):
                parameter.normal_()
    gone, before = gone_from(name, model), copy.deepcopy(model.state_dict())
    head_dim = head_dim_of(model.get_submodule(next(iter(gone))))
    pruned = prune_model(model, gone)
    torch.testing.assert_close(run(pruned), run(deaf(model, gone, head_dim)))
    assert pruned.num_parameters() < model.num_parameters()
    for layer, heads in gone.items():
        ours, whole = outputs_of(pruned, layer), outputs_of(model, layer)
        assert ours.weight.shape[1] == ours.in_features
        assert whole.in_features - ours.in_features == len(heads) * head_dim
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())


@pytest.mark.parametrize("how", ["dynamic", "static", "beams"])
@torch.no_grad()
def test_generates_with_a_smaller_cache(how: str) -> None:
    model, (ids, mask) = copy.deepcopy(decoder("llama")), padded("left")
    huggingface.register()
    model.set_attn_implementation("manyheads")
    first, second = layers_of(model)
    gone = {first: [3, 4, 5], second: [1, 3]}
    options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    options["num_beams"] = 3 if how == "beams" else 1
    if how == "static":
        options["cache_implementation"] = "static"
    pruned = prune_model(model, gone)
    head_dim = head_dim_of(model.get_submodule(first))
    expected = deaf(model, gone, head_dim).generate(ids, **options)
    assert torch.equal(pruned.generate(ids, **options), expected)
    cache = pruned(ids).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [1, 2]


def test_the_least_important_heads_go_and_the_rest_are_looked_into() -> None:
    model, (ids, _) = copy.deepcopy(decoder("llama")), padded("none")

    def loss(ids: Tensor) -> Tensor:
        return model(ids, labels=ids).loss

    scores = mh.head_importance(model, loss, [ids])
    least = {name: [int(one.unflatten(0, (2, 3)).sum(1).argmin())] for name, one in scores.items()}
    gone = {name: [3 * group + n for n in range(3)] for name, (group,) in least.items()}
    pruned = prune_model(model, gone)
    with torch.no_grad(), mh.observe(model, mh.Entropy()) as whole:
        model(ids)
    with torch.no_grad(), mh.observe(pruned, mh.Entropy()) as seen:
        pruned(ids)
    layer = seen.layers[0]
    kept = [head for head in range(6) if head not in gone[layer]]
    torch.testing.assert_close(seen[layer][0][mh.Entropy()], whole[layer][0][mh.Entropy()][:, kept])


def test_twice_and_loading_and_training() -> None:
    model = copy.deepcopy(decoder("llama"))
    first, _ = layers_of(model)
    model.get_submodule(first).k_proj.weight.requires_grad_(False)
    once = prune_model(model, {first: [0, 1, 2, 4]})
    twice = prune_model(prune_model(model, {first: [0, 1, 2]}), {first: [1]})
    assert torch.equal(run(once), run(twice))
    fresh = prune_model(copy.deepcopy(decoder("llama")), {first: [0, 1, 2, 4]})
    fresh.load_state_dict(once.state_dict())
    assert torch.equal(run(fresh), run(once))
    run(once).sum().backward()
    attention = once.get_submodule(first)
    assert attention.q_proj.weight.grad.abs().sum() > 0 and attention.k_proj.weight.grad is None


def replaced() -> nn.Module:
    model = copy.deepcopy(decoder("llama"))
    model.model.layers[1].self_attn.v_proj = nn.Sequential(model.model.layers[1].self_attn.v_proj)
    return model


class LlamaAttention(mh.MultiHeadAttention):
    """Of somebody's own, that only has the name."""


LAYER = "model.layers.1.self_attn"
BAD: dict[str, tuple[Callable[[], nn.Module], Any, type[Exception], tuple[str, ...]]] = {
    "no mapping": (
        lambda: decoder("llama"), [0], mh.ArgumentTypeError, ("heads is a list", "by its path"),
    ),
    "no such layer": (
        lambda: decoder("llama"), {"layers.1.self_attn": [0]}, mh.ArgumentError,
        ("'layers.1.self_attn': got no such module", "'model.layers.0.self_attn', " + repr(LAYER)),
    ),
    "no attention": (
        lambda: decoder("llama"), {"model.layers.1.mlp": [0]}, mh.ArgumentError,
        ("got LlamaMLP; expected", repr(LAYER)),
    ),
    "another family": (
        lambda: decoder("gpt2"), {"transformer.h.0.attn": [0]}, mh.ArgumentError,
        ("got GPT2Attention; expected a layer of another model", "LlamaAttention, Mistral"),
    ),
    "our module": (
        lambda: nn.Sequential(mh.MultiHeadAttention(8, 4)), {"0": [0]}, mh.ArgumentError,
        ("got MultiHeadAttention; expected",),
    ),
    "a namesake": (
        lambda: nn.Sequential(LlamaAttention(8, 4)), {"0": [0]}, mh.ArgumentError,
        ("cannot prune heads of '0': got LlamaAttention; expected a layer of another model",),
    ),
    "head": (
        lambda: decoder("llama"), {LAYER: [6]}, mh.ArgumentError,
        (f"{LAYER} has no heads [6]; expected numbers from 0 to 5",),
    ),
    "all": (
        lambda: decoder("llama"), {LAYER: range(6)}, mh.ArgumentError,
        (f"all 6 heads of {LAYER} would go",),
    ),
    "groups": (
        lambda: decoder("llama"), {LAYER: [0]}, mh.ArgumentError,
        ("[1, 2] of key/value head 0, [3, 4, 5] of key/value head 1", "prune whole groups"),
    ),
    "projection": (
        replaced, {LAYER: [0, 1, 2]}, mh.ArgumentTypeError,
        (f"{LAYER}'s v_proj is a Sequential", "a plain nn.Linear"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    make, heads, error, words = BAD[name]
    with pytest.raises(error, match=".*".join(map(re.escape, words))):
        prune_model(make(), heads)
