"""The module's weights and conversions; torch.compile and torch.export."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from module_oracle import (
    CAUSAL,
    KINDS,
    ROTARY,
    B,
    E,
    L,
    agrees,
    by_formula,
    close,
    randomised,
)
from torch import nn

import manyheads as mh
from manyheads import MultiHeadAttention

# --- weights -----------------------------------------------------------------------------------


def test_state_dict_names():
    names = [
        f"{name}_proj.{kind}" for name in ("q", "k", "v", "out") for kind in ("weight", "bias")
    ]
    assert list(MultiHeadAttention(E, 4, positions=mh.Rotary(6)).state_dict()) == names
    assert list(MultiHeadAttention(E, 4, bias=False).state_dict()) == names[::2]
    norms = ["q_norm.weight", "k_norm.weight"]
    assert list(MultiHeadAttention(E, 4, qk_norm="rms").state_dict()) == names + norms


def test_initialisation():
    module = MultiHeadAttention(400, 4, num_kv_heads=1, key_dim=50)
    for name in ("q", "k", "v", "out"):
        projection = getattr(module, f"{name}_proj")
        bound = (6 / sum(projection.weight.shape)) ** 0.5
        assert projection.weight.abs().max() <= bound < projection.weight.abs().max() * 1.01
        assert not projection.bias.any()
    before = module.q_proj.weight.clone()
    module.reset_parameters()
    assert not torch.equal(module.q_proj.weight, before)


def test_device_and_dtype_of_a_new_module():
    module = MultiHeadAttention(E, 4, qk_norm="layer", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    made = MultiHeadAttention(E, 4, qk_norm=nn.RMSNorm, dtype=torch.float64)
    assert made.q_norm.weight.dtype == torch.float64


@pytest.mark.parametrize("kind", ["rotary and rms", "multi-head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_conversions(kind, dtype):
    module = randomised(MultiHeadAttention(E, **KINDS[kind]))
    for converted in (
        copy.deepcopy(module).to(dtype),
        {torch.float64: nn.Module.double, torch.float16: nn.Module.half}.get(
            dtype, nn.Module.bfloat16
        )(copy.deepcopy(module)),
    ):
        assert {p.dtype for p in converted.parameters()} == {dtype}
        agrees(converted, torch.randn(B, L, E).to(dtype))


def torch_save_load(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), torch_save_load],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(copied):
    mask = mh.Causal() & mh.Window(3, 0)
    module = randomised(
        MultiHeadAttention(E, mask=mask, attn_bias=mh.Alibi(), qk_norm="rms", **ROTARY)
    )
    x = torch.randn(B, L, E)
    other = copied(module)
    assert torch.equal(other(x), module(x))
    with torch.no_grad():
        other.q_proj.weight.zero_()
    assert module.q_proj.weight.any()


def test_autocast():
    module = randomised(MultiHeadAttention(E, qk_norm="rms", **ROTARY))
    x = torch.randn(B, L, E)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = module(x)
    half = copy.deepcopy(module).bfloat16()
    close(got, by_formula(module, x), by_formula(half, x.bfloat16(), dtype=torch.bfloat16))


def test_repr():
    module = MultiHeadAttention(
        E, 6, num_kv_heads=2, mask=mh.Causal(), positions=mh.Rotary(4), dropout=0.1
    )
    assert repr(module).splitlines()[1].strip() == (
        "embed_dim=24, num_heads=6, num_kv_heads=2, head_dim=4, "
        "positions=Rotary(4, base=10000.0), mask=Causal(), dropout=0.1"
    )


# --- compile and export ------------------------------------------------------------------------


# Of its own making: torch.compile makes an autograd.Function object, and lets no filter know.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_compiles_whole(grad):
    module = randomised(MultiHeadAttention(E, mask=mh.Causal(), qk_norm="rms", **ROTARY))
    x = torch.randn(B, L, E)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    how = {"allowed": CAUSAL}
    with torch.set_grad_enabled(grad):
        close(compiled(x), by_formula(module, x, **how),
              by_formula(module, x, dtype=torch.float32, **how))  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_any_length_while_training(strict):
    module = randomised(MultiHeadAttention(E, 4, mask=mh.Causal()))
    sizes = {1: torch.export.Dim("length", min=2, max=128)}
    x, y = torch.randn(B, L, E), torch.randn(B, 13, E)
    exported = torch.export.export(module, (x,), dynamic_shapes=(sizes,), strict=strict).module()
    torch.testing.assert_close(exported(y), module(y))


def test_exports():
    module = randomised(MultiHeadAttention(E, mask=mh.Causal(), **ROTARY)).eval()
    x = torch.randn(B, L, E)
    with torch.no_grad():
        exported = torch.export.export(module, (x,)).module()
        y = torch.randn(B, L, E)
        eager = by_formula(module, y, dtype=torch.float32, allowed=CAUSAL)
        close(exported(y), by_formula(module, y, allowed=CAUSAL), eager)


@pytest.mark.parametrize("kind", ["rotary", "multi-head"])
def test_exports_with_any_batch_and_length(kind):
    module = randomised(MultiHeadAttention(E, mask=mh.Causal(), **KINDS[kind])).eval()
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=512)}
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(B, L, E),), dynamic_shapes=(sizes,))
        y = torch.randn(5, 13, E)
        how = {"allowed": torch.ones(13, 13, dtype=torch.bool).tril()}
        eager = by_formula(module, y, dtype=torch.float32, **how)
        close(program.module()(y), by_formula(module, y, **how), eager)


def test_compiled_decoding_does_not_recompile_per_token():
    module = MultiHeadAttention(E, mask=mh.Causal(), **ROTARY).eval()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x, cache = torch.randn(B, 17, E), mh.KVCache()
    with torch.no_grad():
        got = torch.cat([compiled(y, cache=cache) for y in x.split([7] + [1] * 10, 1)], 1)
    assert len(graphs) <= 3
    how = {"allowed": torch.ones(17, 17, dtype=torch.bool).tril()}
    close(got, by_formula(module, x, **how), by_formula(module, x, dtype=torch.float32, **how))
