"""Weights of other layouts: loaded, they compute what they did there; or are refused by name."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch
from oracle import Problem, attend
from tolerance import assert_close_to_oracle
from torch import nn
from transformers import BertConfig, BertModel

from manyheads import ArgumentError, ArgumentTypeError, MultiHeadAttention, ShapeError

E, B, L, M = 24, 3, 7, 11
DOCS = Path(__file__).parents[1] / "docs"


class Listing(nn.Module):
    """The layers of the tutorial listing; what it does with them is in docs/tutorial-listing.md."""

    def __init__(self, *, bias=True):
        super().__init__()
        self.linear_q, self.linear_k, self.linear_v, self.linear_o = (
            nn.Linear(E, E, bias=bias) for _ in range(4)
        )

    def formula(self, query, key, value, dtype):
        def heads(linear, x):
            bias = None if linear.bias is None else linear.bias.to(dtype)
            y = nn.functional.linear(x.to(dtype), linear.weight.to(dtype), bias)
            return y.unflatten(-1, (4, E // 4)).transpose(1, 2)

        inputs = zip(
            (self.linear_q, self.linear_k, self.linear_v), (query, key, value), strict=True
        )
        out, _ = attend(Problem(*[heads(linear, x) for linear, x in inputs]), dtype)
        out = out.transpose(1, 2).flatten(2)
        bias = None if self.linear_o.bias is None else self.linear_o.bias.to(dtype)
        return nn.functional.linear(out, self.linear_o.weight.to(dtype), bias)


def close(actual, oracle, eager):
    views = [x.detach()[:, None] for x in (actual, oracle, eager)]
    assert_close_to_oracle(*views, actual.dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("give", [lambda listing: listing, nn.Module.state_dict])
def test_tutorial_listing(give, bias):
    listing = Listing(bias=bias)
    module = MultiHeadAttention.from_tutorial(give(listing), num_heads=4)
    query, key, value = torch.randn(B, L, E), torch.randn(B, M, E), torch.randn(B, M, E)
    oracle = listing.formula(query, key, value, torch.float64)
    eager = listing.formula(query, key, value, torch.float32)
    close(module(query, key, value), oracle, eager)
    with torch.no_grad():
        close(module(query, key, value), oracle, eager)
        listing.linear_q.weight.zero_()
    assert module.q_proj.weight.any(), "a copy"
    assert module.q_proj.weight.requires_grad


def test_tutorial_page():
    """The numbers in the page are what its code computes."""
    page = doctest.testfile(str(DOCS / "tutorial-listing.md"), module_relative=False)
    assert page.failed == 0
    assert page.attempted == 33


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 5}, {"vdim": 13, "batch_first": True}], ids=str
)
def test_torchs_module_keeps_its_settings(options, dtype):
    theirs = nn.MultiheadAttention(E, 4, dropout=0.25, dtype=dtype, **options).eval()
    module = MultiHeadAttention.from_torch(theirs)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert (module.dropout, module.training, module.num_heads) == (0.25, False, 4)
    assert MultiHeadAttention.from_torch(theirs.train()).training
    assert (module.key_dim, module.value_dim) == (options.get("kdim", E), options.get("vdim", E))
    theirs_before = [p.clone() for p in theirs.parameters()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    for before, after in zip(theirs_before, theirs.parameters(), strict=True):
        assert torch.equal(before, after), "a copy"


@pytest.fixture(scope="module")
def bert():
    config = BertConfig(
        hidden_size=E, num_attention_heads=4, num_hidden_layers=2, intermediate_size=5,
        vocab_size=29, attn_implementation="eager", hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(3)
    return BertModel(config).eval()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("dot", ["", "."])
def test_bert(bert, layer, dot):
    module = MultiHeadAttention.from_bert(bert.state_dict(), f"encoder.layer.{layer}{dot}", 4)
    x = torch.randn(B, L, E)

    def theirs(dtype):
        attention = bert.encoder.layer[layer].attention.to(dtype)
        attended, *_ = attention.self(x.to(dtype))
        out = attention.output.dense(attended)
        attention.to(torch.float32)
        return out

    close(module(x), theirs(torch.float64), theirs(torch.float32))
    bare = {name.removeprefix("encoder.layer.0."): t for name, t in bert.state_dict().items()}
    assert MultiHeadAttention.from_bert(bare, "", 4)(x).shape == (B, L, E)


def without(name, **more):
    state = Listing().state_dict() | more
    state.pop(name)
    return state


def bert_names(**more):
    names = ("self.query", "self.key", "self.value", "output.dense")
    state = {f"a.attention.{name}.weight": torch.zeros(E, E) for name in names}
    return state | {f"a.attention.{name}": tensor for name, tensor in more.items()}


ZERO = torch.zeros(E)
ERRORS = {
    "not torch's module": (
        lambda: MultiHeadAttention.from_torch(nn.Linear(2, 2)), ArgumentTypeError,
        r"got a Linear; expected a torch\.nn\.MultiheadAttention",
    ),
    "bias_k": (
        lambda: MultiHeadAttention.from_torch(nn.MultiheadAttention(E, 4, add_bias_kv=True)),
        ArgumentError, "add_bias_kv=True; expected one without",
    ),
    "zero attention": (
        lambda: MultiHeadAttention.from_torch(nn.MultiheadAttention(E, 4, add_zero_attn=True)),
        ArgumentError, "add_zero_attn=True; expected one without",
    ),
    "missing": (
        lambda: MultiHeadAttention.from_tutorial(without("linear_v.weight"), 4), ArgumentError,
        r"missing names \['linear_v.weight'\] and names it has no use for \[\]; expected exactly",
    ),
    "missing bias": (
        lambda: MultiHeadAttention.from_tutorial(without("linear_k.bias"), 4), ArgumentError,
        r"missing names \['linear_k.bias'\]",
    ),
    "unexpected": (
        lambda: MultiHeadAttention.from_tutorial(Listing().state_dict() | {"norm.weight": ZERO}, 4),
        ArgumentError, r"no use for \['norm.weight'\]",
    ),
    "another layout": (
        lambda: MultiHeadAttention.from_tutorial(nn.MultiheadAttention(E, 4), 4), ArgumentError,
        r"missing names \['linear_k.weight'.* no use for \['in_proj_bias'",
    ),
    "no state_dict": (
        lambda: MultiHeadAttention.from_tutorial([ZERO], 4), ArgumentTypeError,
        "got a list; expected a state_dict",
    ),
    "bert prefix": (
        lambda: MultiHeadAttention.from_bert(bert_names(), "b.", 4), ArgumentError,
        r"missing names \['b.attention.output.dense.weight'.*check the prefix",
    ),
    "bert with relative positions": (
        lambda: MultiHeadAttention.from_bert(
            bert_names(**{"self.distance_embedding.weight": ZERO}), "a", 4
        ),
        ArgumentError, r"no use for \['a.attention.self.distance_embedding.weight'\]",
    ),
    "heads": (
        lambda: MultiHeadAttention.from_tutorial(Listing(), 7), ShapeError,
        "num_heads=7 does not divide the 24 rows of q_proj; expected",
    ),
    "no heads": (
        lambda: MultiHeadAttention.from_tutorial(Listing(), 0), ShapeError, "num_heads=0",
    ),
    "a word as number of heads": (
        lambda: MultiHeadAttention.from_tutorial(Listing(), "2"), ArgumentTypeError,
        "num_heads must be a whole number; got '2'",
    ),
    "sizes": (
        lambda: MultiHeadAttention.from_bert(
            bert_names(**{"self.key.weight": torch.zeros(5, E)}), "a", 4
        ),
        ShapeError, "expected k_proj and v_proj with the same multiple of 6 rows",
    ),
    "axes": (
        lambda: MultiHeadAttention.from_bert(bert_names(**{"self.key.weight": ZERO}), "a", 4),
        ShapeError, "expected two axes each",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()
