"""Rotary positions against Hugging Face's, against complex multiplication, and far out."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from tolerance import assert_close_to_oracle
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from manyheads.errors import ArgumentError, ArgumentTypeError, ShapeError
from manyheads.rotary import (
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    Rotary,
    YarnScaling,
)

TRAINED = 61  # positions; short, so that every scaling has pairs of every kind
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
#: name -> our scaling, Hugging Face's parameters of the same one
SCALINGS = {
    "plain": (None, {"rope_type": "default"}),
    "linear": (LinearScaling(3.0), {"rope_type": "linear", "factor": 3.0}),
    # Hugging Face's dynamic kind at 5 times the trained length, its factor being 1.
    "ntk": (NTKScaling(5.0), {"rope_type": "dynamic", "factor": 1.0}),
    "yarn": (
        YarnScaling(4.0, TRAINED),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    ),
    "yarn, all options": (
        YarnScaling(7.0, 4096, beta_fast=19.0, beta_slow=2.0, truncate=False, mscale=0.7,
                    mscale_all_dim=1.3),
        {"rope_type": "yarn", "factor": 7.0, "original_max_position_embeddings": 4096,
         "beta_fast": 19.0, "beta_slow": 2.0, "truncate": False, "mscale": 0.7,
         "mscale_all_dim": 1.3},
    ),
    "yarn, attention factor": (
        YarnScaling(7.0, 4096, attention_factor=1.7),
        {"rope_type": "yarn", "factor": 7.0, "original_max_position_embeddings": 4096,
         "attention_factor": 1.7},
    ),
    "llama3": (Llama3Scaling(), {"rope_type": "llama3", **LLAMA3}),
    "llama3, short": (
        Llama3Scaling(6.0, TRAINED, 1.5, 2.5),
        {"rope_type": "llama3", "factor": 6.0, "low_freq_factor": 1.5, "high_freq_factor": 2.5,
         "original_max_position_embeddings": TRAINED},
    ),
}  # fmt: skip


def llama_config(dim: int, base: float, parameters: dict) -> LlamaConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LlamaConfig(
            hidden_size=3 * dim,
            num_attention_heads=3,
            head_dim=dim,
            max_position_embeddings=TRAINED,
            rope_parameters={"rope_theta": base, **parameters},
        )


def hugging_face(x: Tensor, positions: Tensor, base: float, parameters: dict) -> Tensor:
    """`x` turned as a Llama of Hugging Face turns its queries."""
    config = llama_config(x.shape[-1], base, parameters)
    embedding = LlamaRotaryEmbedding(config)
    if parameters["rope_type"] == "dynamic":
        frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=5 * TRAINED)
        embedding.inv_freq = frequencies
        embedding.rope_type = "default"  # so that forward leaves them alone
    cos, sin = embedding(x, positions.expand(x.shape[0], -1))
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


def in_double(monkeypatch: pytest.MonkeyPatch, *arguments) -> Tensor:
    """The same with every float32 in Hugging Face's code replaced by float64."""
    x, *rest = arguments
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        return hugging_face(x.double(), *rest)


def turned(x: Tensor, positions: Tensor, base: float, dim: int, interleaved: bool) -> Tensor:
    """Float64: pairs of channels as complex numbers, multiplied by exp(i m theta)."""
    theta = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    angles = positions.double()[..., None] * theta
    turn = torch.polar(torch.ones_like(angles), angles)
    turn = turn[:, None] if positions.dim() == 2 else turn
    x = x.double()
    head, rest = x[..., :dim], x[..., dim:]
    if interleaved:
        pairs = torch.view_as_complex(head.reshape(*head.shape[:-1], -1, 2)) * turn
        return torch.cat([torch.view_as_real(pairs).flatten(-2), rest], -1)
    pairs = torch.complex(head[..., : dim // 2], head[..., dim // 2 :]) * turn
    return torch.cat([pairs.real, pairs.imag, rest], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCALINGS)
def test_equals_hugging_face_llama(name, dtype, monkeypatch):
    scaling, parameters = SCALINGS[name]
    torch.manual_seed(0)
    x = torch.randn(2, 3, 89, 26).to(dtype)
    arguments = (x, torch.arange(7, 7 + 89)[None], 5000.0, parameters)
    oracle = in_double(monkeypatch, *arguments)
    actual = Rotary(26, 5000.0, scaling=scaling)(x, 7)
    assert actual.dtype == dtype
    assert_close_to_oracle(actual, oracle, hugging_face(*arguments), dtype)


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "plain"])
def test_every_frequency_equals_hugging_face(name, monkeypatch):
    scaling, parameters = SCALINGS[name]
    config = llama_config(26, 5000.0, parameters)
    rope = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    eager, amplitude = rope(config, seq_len=5 * TRAINED)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        oracle, _ = rope(config, seq_len=5 * TRAINED)
    assert oracle.dtype == torch.float64
    actual = scaling.frequencies(26, 5000.0)
    each = (1, 13, 1)  # a head for each frequency: the rule holds for every one by itself
    assert_close_to_oracle(
        actual.float().view(each), oracle.view(each), eager.view(each), torch.float32
    )
    assert scaling.amplitude == amplitude


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 6, 22], ids="dim{}".format)
@pytest.mark.parametrize("start", [0, 5, 131_071, 10_000_019, -3], ids="from{}".format)
def test_right_at_any_position(interleaved, dim, start):
    torch.manual_seed(1)
    x = torch.randn(2, 3, 17, 22)
    oracle = turned(x, torch.arange(start, start + 17), 10000.0, dim, interleaved)
    actual = Rotary(dim, interleaved=interleaved)(x, start)
    assert_close_to_oracle(actual, oracle, oracle.float(), torch.float32)
    assert torch.equal(actual[..., dim:], x[..., dim:]), "partial rotary leaves the rest alone"


def test_double_vectors_are_turned_in_double():
    torch.manual_seed(2)
    x = torch.randn(2, 3, 17, 22, dtype=torch.float64)
    oracle = turned(x, torch.arange(99, 99 + 17), 10000.0, 22, False)
    assert_close_to_oracle(Rotary(22)(x, 99), oracle, oracle, torch.float64)


def test_positions_per_batch_element():
    torch.manual_seed(3)
    x = torch.randn(2, 3, 5, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [3, 0, 1, 100, 7]], dtype=torch.int32)
    oracle = turned(x, positions, 10000.0, 8, False)
    assert_close_to_oracle(Rotary(8)(x, positions), oracle, oracle.float(), torch.float32)


def test_ways_to_say_the_same_positions():
    torch.manual_seed(4)
    rotary, x = Rotary(8), torch.randn(2, 3, 5, 8)
    expected = rotary(x, 11)
    row = torch.arange(11, 16)
    for positions in (row, row.int(), row[None], row.expand(2, -1)):
        assert torch.equal(rotary(x, positions), expected)
    assert torch.equal(rotary(x[0], 11), expected[0]), "unbatched"
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(rotary(strided, 11), expected), "[B, L, H, D] memory"


def test_input_is_not_changed():
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(5))
    before = x.clone()
    Rotary(8)(x, 3).zero_()
    assert torch.equal(x, before)


def test_no_rows():
    assert Rotary(8)(torch.zeros(2, 3, 0, 8), 3).shape == (2, 3, 0, 8)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient(interleaved):
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    rotary = Rotary(6, interleaved=interleaved)
    assert torch.autograd.gradcheck(lambda x: rotary(x, 2), (x,))


@pytest.mark.parametrize("interleaved", [False, True])
def test_compiles_whole(interleaved):
    torch.manual_seed(6)
    rotary = Rotary(6, interleaved=interleaved, scaling=YarnScaling(4.0, TRAINED))
    x, positions = torch.randn(2, 3, 5, 8), torch.tensor([4, 0, 2, 9, 1])
    oracle = rotary(x.double(), positions)
    compiled = torch.compile(rotary.__call__, fullgraph=True, backend="aot_eager")
    assert_close_to_oracle(compiled(x, positions), oracle, rotary(x, positions), torch.float32)
    oracle = rotary(x.double(), 5)
    assert_close_to_oracle(compiled(x, 5), oracle, rotary(x, 5), torch.float32)


def test_copies():
    rotary, x = Rotary(6, scaling=Llama3Scaling()), torch.ones(1, 1, 3, 6)
    for copied in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert torch.equal(copied(x, 5), rotary(x, 5))
    assert repr(Rotary(6, interleaved=True, scaling=LinearScaling(2.0))) == (
        "Rotary(6, base=10000.0, interleaved=True, scaling=LinearScaling(factor=2.0))"
    )


X = torch.zeros(2, 3, 5, 8)
ERRORS = {
    "odd dim": (lambda: Rotary(7), ArgumentError, "dim=7; expected a positive even"),
    "dim 0": (lambda: Rotary(0), ArgumentError, "dim=0; expected a positive even"),
    "dim's type": (lambda: Rotary("4"), ArgumentTypeError, "dim must be a whole number; got '4'"),
    "a float as dim": (lambda: Rotary(4.0), ArgumentTypeError, "whole number; got 4.0"),
    "base's type": (lambda: Rotary(4, base="a"), ArgumentTypeError, "base .*got str; expected a n"),
    "base": (lambda: Rotary(8, base=0.5), ArgumentError, "base=0.5; expected a number above 1"),
    "scaling": (lambda: Rotary(8, scaling=2.0), ArgumentTypeError, "scaling=2.0; expected Linear"),
    "factor": (lambda: LinearScaling(0.0), ArgumentError, "factor=0.0; expected a positive"),
    "length": (lambda: YarnScaling(2.0, 0), ArgumentError, "original_length=0; expected"),
    "llama3": (
        lambda: Llama3Scaling(low_freq_factor=4.0), ArgumentError, "expected low < high",
    ),
    "ntk of one pair": (lambda: Rotary(2, scaling=NTKScaling(2.0)), ArgumentError, "at least 4"),
    "too wide": (lambda: Rotary(10)(X, 0), ShapeError, r"\[2, 3, 5, 8\]; expected .*dim = 10"),
    "rank": (lambda: Rotary(8)(X[0, 0], 0), ShapeError, r"shape \[5, 8\]; expected \[B, H, L, D\]"),
    "int x": (lambda: Rotary(8)(X.long(), 0), ArgumentTypeError, "torch.int64; expected a float"),
    "float positions": (
        lambda: Rotary(8)(X, torch.zeros(5)), ArgumentTypeError, "float32; expected an int",
    ),
    "positions": (
        lambda: Rotary(8)(X, torch.arange(4)), ShapeError, r"shape \[4\] .*expected .*L = 5",
    ),
    "positions of another batch": (
        lambda: Rotary(8)(X, torch.zeros(3, 5, dtype=torch.int64)), ShapeError, r"shape \[3, 5\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()
