"""`head_importance` against derivatives taken otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from test_module import randomised
from tolerance import assert_derived_close
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import manyheads as mh
from manyheads import MultiHeadAttention, gates, watching

E, L = 12, 5


class Model(nn.Module):
    """Two layers of attention; the first has grouped heads."""

    def __init__(self) -> None:
        super().__init__()
        options = {"mask": mh.Causal(), "positions": mh.Rotary(2)}
        self.first = MultiHeadAttention(E, 6, num_kv_heads=3, **options)
        self.second = nn.Sequential(MultiHeadAttention(E, 3, **options))
        self.unused = MultiHeadAttention(E, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x).tanh()
        return x + self.second(x)


@pytest.fixture
def model() -> nn.Module:
    return randomised(Model()).double()


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().sum()


def by_differences(model: nn.Module, layer: MultiHeadAttention, batches: list[Tensor]) -> Tensor:
    """Each head's part of W_O a little larger and smaller; one text at a time."""
    step, found = 1e-5, []
    texts = [text[None] for batch in batches for text in batch]
    for head in range(layer.num_heads):
        columns = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        kept = layer.out_proj.weight.data[:, columns].clone()
        values = []
        for sign in (1, -1):
            layer.out_proj.weight.data[:, columns] = kept * (1 + sign * step)
            with torch.no_grad():
                values.append(torch.stack([model(x).square().sum() for x in texts]))
        layer.out_proj.weight.data[:, columns] = kept
        found.append(((values[0] - values[1]) / (2 * step)).abs().mean())
    return torch.stack(found)


def test_equals_differences(model):
    sizes = ((3, L), (2, L + 2))
    batches = [torch.randn(n, length, E, dtype=torch.float64) for n, length in sizes]
    found = mh.head_importance(model, loss_of(model), iter(batches))
    assert list(found) == ["first", "second.0", "unused"]
    for name in ("first", "second.0"):
        expected = by_differences(model, model.get_submodule(name), batches)
        assert_derived_close(found[name], expected)
    assert found["unused"].tolist() == [0.0, 0.0]


def test_equals_the_contributions(model):
    """Where the loss is linear in the output: |sum of the head's contribution times the factor|."""
    layer, factor = model.first.float(), torch.randn(3, L, E)
    x = torch.randn(3, L, E)
    found = mh.head_importance(layer, lambda x: (layer(x) * factor).sum(), [x])[
        "MultiHeadAttention"
    ]
    contributions = mh.trace(layer, x)["contributions"]
    expected = (contributions * factor[:, None]).sum((2, 3)).abs().mean(0)
    torch.testing.assert_close(found, expected.detach())


def bert() -> tuple[nn.Module, str]:
    config = BertConfig(
        vocab_size=31, hidden_size=12, intermediate_size=13, num_hidden_layers=2,
        num_attention_heads=3, attn_implementation="eager",
    )  # fmt: skip
    return BertModel(config), "encoder.layer.1.attention"


def llama() -> tuple[nn.Module, str]:
    config = LlamaConfig(
        vocab_size=31, hidden_size=24, intermediate_size=13, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaModel(config), "layers.1.self_attn"


@pytest.mark.parametrize("make", [bert, llama])
def test_a_model_of_transformers(make):
    """A factor on a head is one on its columns of W_O, whose derivative is sum(W_O * dL/dW_O)."""
    model, name = make()
    model = model.double().eval()
    layer = model.get_submodule(name)
    out_proj = layer.o_proj if make is llama else layer.output.dense
    heads = 4 if make is llama else 3
    tokens = torch.randint(31, (3, 7))
    factor = torch.randn(7, out_proj.out_features, dtype=torch.float64)

    def loss(tokens: Tensor) -> Tensor:
        return (model(tokens).last_hidden_state * factor).sum()

    before = model.config._attn_implementation
    found = mh.head_importance(model, loss, [tokens[:1], tokens[1:]])
    assert model.config._attn_implementation == before
    assert len(found) == 2
    (key,) = (key for key in found if key.startswith(name))
    expected = torch.zeros(heads, dtype=torch.float64)
    for text in tokens:
        # Not by differences: Llama's norms are computed in float32, which would be their noise.
        (gradient,) = torch.autograd.grad(loss(text[None]), out_proj.weight)
        expected += (gradient * out_proj.weight).sum(0).view(heads, -1).sum(-1).abs() / 3
    torch.testing.assert_close(found[key], expected.detach())


@pytest.mark.parametrize("how", ["outside", "in place"])
def test_compiled_models_are_measured(model, how):
    torch._dynamo.reset()
    batches = [torch.randn(3, L, E, dtype=torch.float64)]
    expected = mh.head_importance(model, loss_of(model), batches)
    run = model
    if how == "outside":
        run = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    run(batches[0])
    found = mh.head_importance(run, loss_of(run), batches)
    assert list(found) == list(expected)
    for name, scores in found.items():
        torch.testing.assert_close(scores, expected[name])
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_an_error_leaves_nothing_behind_in_a_model_of_transformers():
    model, _ = llama()
    tokens = torch.randint(31, (3, 7))

    def loss(tokens: Tensor) -> Tensor:
        assert gates.gate() is not None and model.config._attn_implementation == "manyheads"
        raise KeyError(str(model(tokens).last_hidden_state.shape))

    with pytest.raises(KeyError, match="3, 7, 24"):
        mh.head_importance(model, loss, [tokens])
    assert gates.gate() is None and model.config._attn_implementation == "sdpa"
    assert not watching.watchers()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_checkpointing_changes_nothing():
    model, name = llama()
    tokens = [torch.randint(31, (3, 7))]

    def loss(tokens: Tensor) -> Tensor:
        return model(tokens, use_cache=False).last_hidden_state.square().sum()

    model.train()
    expected = mh.head_importance(model, loss, tokens)
    model.activation_checkpointing_enable()
    found = mh.head_importance(model, loss, tokens)
    assert name in found
    for layer, scores in found.items():
        torch.testing.assert_close(scores, expected[layer])


def test_a_head_that_does_nothing_has_none(model):
    columns = slice(2 * 2, 3 * 2)
    model.first.out_proj.weight.data[:, columns] = 0
    x = torch.randn(2, L, E, dtype=torch.float64)
    found = mh.head_importance(model, loss_of(model), [x])["first"]
    assert found[2] == 0 and (found[[0, 1, 3, 4, 5]] > 0).all()


def test_a_layer_that_runs_twice_has_one_factor():
    layer = randomised(MultiHeadAttention(E, 3)).double()
    x = torch.randn(2, L, E, dtype=torch.float64)
    model = nn.Sequential(layer, layer)
    found = mh.head_importance(model, loss_of(model), [x])["0"]
    assert_derived_close(found, by_differences(model, layer, [x]))


def test_nothing_is_left_behind(model):
    x = torch.randn(2, L, E, dtype=torch.float64)
    expected = mh.head_importance(model, loss_of(model), [x])
    model.requires_grad_(False)
    with torch.no_grad():
        found = mh.head_importance(model, loss_of(model), [x])
    assert torch.equal(found["first"], expected["first"])
    model.requires_grad_(True)

    def broken(x: Tensor) -> Tensor:
        model(x)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        mh.head_importance(model, broken, [x])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_half_types_add_up_in_float32(model):
    model, x = model.bfloat16(), torch.randn(2, L, E).bfloat16()
    found = mh.head_importance(model, lambda x: model(x).float().square().sum(), [x])
    assert found["first"].dtype == torch.float32 and found["first"].isfinite().all()


X = torch.zeros(1, L, E, dtype=torch.float64)
BAD: dict[str, tuple[Callable[[nn.Module], object], type[Exception], str]] = {
    "no heads": (
        lambda m: mh.head_importance(nn.Linear(2, 2), loss_of(m), [X]), mh.ArgumentError,
        "the Linear holds no manyheads.MultiHeadAttention and no model of transformers",
    ),
    "no batches": (
        lambda m: mh.head_importance(m, loss_of(m), []), mh.ArgumentError, "got no batches",
    ),
    "not a scalar": (
        lambda m: mh.head_importance(m, m, [X]), mh.ArgumentTypeError,
        "the loss is [1, 5, 12]; expected a floating tensor of one number",
    ),
    "a number": (
        lambda m: mh.head_importance(m, lambda x: 1.0, [X]), mh.ArgumentTypeError, "loss is float",
    ),
    "another model": (
        lambda m: mh.head_importance(m, lambda x: x.sum(), [X]), mh.ArgumentError,
        "does not depend on any attention",
    ),
    "beside it": (
        lambda m: mh.head_importance(
            m, lambda x: (m(x), m.first.q_proj.weight.sum())[1], [X]
        ), mh.ArgumentError, "does not depend on any attention",
    ),
    "detached": (
        lambda m: mh.head_importance(m, lambda x: m(x).detach().sum(), [X]), mh.ArgumentError,
        "without detaching",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, model):
    run, error, words = BAD[name]
    with pytest.raises(error, match=re.escape(words)):
        run(model)
