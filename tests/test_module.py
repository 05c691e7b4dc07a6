"""MultiHeadAttention against its formula, torch's own module, and itself fed in pieces."""

from __future__ import annotations

import copy

import pytest
import torch
from module_oracle import (
    CAUSAL,
    KINDS,
    ROTARY,
    B,
    E,
    L,
    M,
    agrees,
    by_formula,
    close,
    randomised,
)
from torch import Tensor, nn

import manyheads as mh
from manyheads import MultiHeadAttention

# --- the formula -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(kind, dtype):
    module = randomised(MultiHeadAttention(E, **KINDS[kind])).to(dtype)
    how = {"scale": module.scale}
    x = torch.randn(B, L, E).to(dtype)
    agrees(module, x, how=how)
    with torch.no_grad():
        agrees(module, x, how=how)
        agrees(module, x, how=how | {"allowed": CAUSAL}, mask=mh.Causal())
        memory = torch.randn(B, M, E).to(dtype)
        agrees(module, x, memory, how=how, start=M - L)
        agrees(module, x, memory, torch.randn(B, M, E).to(dtype), how=how, start=M - L)
        agrees(module, x, x[:, :3], how=how, start=3 - L)


@pytest.mark.parametrize("grad", [False, True])
def test_key_and_value_sizes(grad):
    module = randomised(
        MultiHeadAttention(E, 4, num_kv_heads=2, key_dim=5, value_dim=13, out_dim=17)
    )
    with torch.set_grad_enabled(grad):
        agrees(module, torch.randn(B, L, E), torch.randn(B, M, 5), torch.randn(B, M, 13))


# --- torch's module ----------------------------------------------------------------------------


def theirs(**options) -> nn.MultiheadAttention:
    return randomised(nn.MultiheadAttention(E, 4, batch_first=True, **options))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By role; the three input projections as one, because a key bias has none of its own."""
    found = {name: p.grad for name, p in module.named_parameters()}
    packed = {}
    for kind in ("weight", "bias"):
        names = [f"{name}_proj.{kind}" for name in "qkv"]
        if isinstance(module, nn.MultiheadAttention):
            names = [f"in_proj_{kind}"]
            if kind == "weight" and module.in_proj_weight is None:
                names = [f"{name}_proj_weight" for name in "qkv"]
        packed[f"inputs' {kind}"] = torch.cat([found[name].flatten() for name in names])
        packed[f"output's {kind}"] = found[f"out_proj.{kind}"].flatten()
    return packed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 13}], ids=["self", "cross"])
@pytest.mark.parametrize("training", [False, True])
def test_equals_torchs_module(sizes, causal, training):
    torch_module = theirs(**sizes).train(training)
    double = copy.deepcopy(torch_module).double()
    module = MultiHeadAttention.from_torch(torch_module)
    x = torch.randn(B, L, E)
    inputs = (x, torch.randn(B, L, 5), torch.randn(B, L, 13)) if sizes else (x,)
    weight = torch.randn(B, L, E)
    both = inputs * 3 if not sizes else inputs
    mask = ~CAUSAL if causal else None  # torch's is True where one may not attend
    eager, _ = torch_module(*both, attn_mask=mask, need_weights=False)
    oracle, _ = double(*[t.double() for t in both], attn_mask=mask, need_weights=False)
    got = module(*inputs, mask=mh.Causal() if causal else None)
    close(got, oracle, eager)
    with torch.no_grad():
        close(module(*inputs, mask=mh.Causal() if causal else None), oracle, eager)
    for out in (got, eager):
        (out * weight).sum().backward()
    (oracle * weight.double()).sum().backward()
    for (name, ours), eagers, exact in zip(
        gradients(module).items(),
        gradients(torch_module).values(),
        gradients(double).values(),
        strict=True,
    ):
        assert ours.abs().sum() > 0, name
        close(ours[None], exact[None], eagers[None])


@pytest.mark.parametrize("kind", ["grouped-query", "rotary and rms", "wide heads"])
def test_gradients_are_derivatives(kind):
    module = randomised(MultiHeadAttention(E, **KINDS[kind])).double()
    query = torch.randn(1, 3, E, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(1, 2, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (query, memory), fast_mode=True)
    parameters = dict(module.named_parameters())
    query = query.detach()

    def run(*values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(module, named, (query,), {"mask": mh.Causal()})

    assert torch.autograd.gradcheck(run, tuple(parameters.values()), fast_mode=True)


# --- masks and biases --------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_masks_of_module_and_call_both_hold(grad):
    dense = torch.rand(B, 1, L, L) < 0.6
    x = torch.randn(B, L, E)
    causal, plain = MultiHeadAttention(E, 4, mask=mh.Causal()), MultiHeadAttention(E, 4)
    fixed = MultiHeadAttention(E, 4, mask=dense)
    with torch.set_grad_enabled(grad):
        agrees(causal, x, how={"allowed": CAUSAL})
        agrees(causal, x, mask=dense, how={"allowed": CAUSAL & dense})
        agrees(plain, x, mask=dense, how={"allowed": dense})
        agrees(fixed, x, mask=mh.Causal(), how={"allowed": CAUSAL & dense})
        agrees(fixed, x, mask=dense[:1], how={"allowed": dense & dense[:1]})


@pytest.mark.parametrize("grad", [False, True])
def test_biases_of_module_and_call_add(grad):
    table, dense = torch.randn(8, 4), torch.randn(4, L, L)
    relative = mh.RelativeBias(4, num_buckets=8, max_distance=16)
    with torch.no_grad():
        relative.table.copy_(table)
    distance = (torch.arange(L) - torch.arange(L)[:, None]).abs()
    alibi = -torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])[:, None, None] * distance
    ahead = torch.arange(L) - torch.arange(L)[:, None]
    near = torch.where(ahead.abs() < 2, ahead.abs(), 2 + (ahead.abs() >= 6).int())
    learned = table[near + 4 * (ahead > 0)].movedim(-1, 0)
    x = torch.randn(B, L, E)
    with torch.set_grad_enabled(grad):
        agrees(MultiHeadAttention(E, 4, attn_bias=mh.Alibi()), x, how={"bias": alibi})
        module = MultiHeadAttention(E, 4, attn_bias=relative)
        agrees(module, x, how={"bias": learned})
        agrees(module, x, attn_bias=mh.Alibi(), how={"bias": learned.double() + alibi})
        module = MultiHeadAttention(E, 4, attn_bias=dense)
        agrees(module, x, attn_bias=dense * 2, how={"bias": dense.double() * 3})
    assert list(MultiHeadAttention(E, 4, attn_bias=relative).state_dict())[:1] == [
        "attn_bias.table"
    ]


def test_a_row_that_sees_nothing_is_the_output_bias():
    module = randomised(MultiHeadAttention(E, 4))
    mask = CAUSAL.clone()
    mask[2] = False
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = module(torch.randn(B, L, E), mask=mask)
        assert torch.equal(out[:, 2], module.out_proj.bias.expand(B, -1))


# --- sequences in one batch --------------------------------------------------------------------


def test_padding_changes_nothing_for_the_other_rows():
    module = randomised(MultiHeadAttention(E, **ROTARY)).eval()
    x, lengths = torch.randn(B, L, E), [7, 4, 1]
    right = module(x, mask=mh.Causal() & mh.KeyLengths(lengths))
    flipped = torch.stack([row.roll(L - n, 0) for row, n in zip(x, lengths, strict=True)])
    left = module(flipped, mask=mh.Causal() & mh.KeyRange([L - n for n in lengths]))
    for b, n in enumerate(lengths):
        alone = x[b, :n][None]
        how = {"allowed": CAUSAL[:n, :n]}
        oracle = by_formula(module, alone, **how)
        eager = by_formula(module, alone, dtype=torch.float32, **how)
        close(right[b, :n][None], oracle, eager)
        shifted = by_formula(
            module,
            flipped[b][None],
            dtype=torch.float32,
            allowed=CAUSAL & (torch.arange(L) >= L - n),
        )[:, L - n :]
        close(left[b, L - n :][None], oracle, shifted)


@pytest.mark.parametrize("grad", [False, True])
def test_packed_documents_equal_separate_ones(grad):
    module = randomised(MultiHeadAttention(E, **ROTARY))
    lengths = [2, 5, 1, 3]
    pieces = [torch.randn(1, n, E) for n in lengths]
    with torch.set_grad_enabled(grad):
        packed = module(torch.cat(pieces, 1), mask=mh.Causal() & mh.Documents(lengths))
    document = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    allowed = torch.ones(11, 11, dtype=torch.bool).tril() & (document == document[:, None])
    eager = by_formula(module, torch.cat(pieces, 1), dtype=torch.float32, allowed=allowed)
    for piece, got, near in zip(
        pieces, packed.split(lengths, 1), eager.split(lengths, 1), strict=True
    ):
        n = piece.shape[1]
        close(got, by_formula(module, piece, allowed=CAUSAL[:n, :n]), near)


# --- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_unbatched(grad):
    module = MultiHeadAttention(E, 4, key_dim=5, value_dim=13, out_dim=17)
    x, key, value = torch.randn(L, E), torch.randn(M, 5), torch.randn(M, 13)
    with torch.set_grad_enabled(grad):
        got = module(x, key, value)
    assert got.shape == (L, 17)
    oracle = by_formula(module, x[None], key[None], value[None])[0]
    eager = by_formula(module, x[None], key[None], value[None], dtype=torch.float32)[0]
    close(got, oracle, eager)
    module, cache = MultiHeadAttention(E, mask=mh.Causal(), **ROTARY), mh.KVCache()
    with torch.no_grad():
        got = torch.cat([module(piece, cache=cache) for piece in x.split([3, 4])])
    how = {"allowed": CAUSAL}
    eager = by_formula(module, x[None], dtype=torch.float32, **how)[0]
    close(got, by_formula(module, x[None], **how)[0], eager)


def test_any_strides():
    module = MultiHeadAttention(E, **ROTARY)
    x = torch.randn(B, L, E)
    for strided in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.mT.contiguous().mT,
        torch.randn(B, L, 2, E)[:, :, 1],
        torch.randn(1, L, E).expand(B, -1, -1),
    ):
        agrees(module, strided)
        with torch.no_grad():
            agrees(module, strided)


@pytest.mark.parametrize("grad", [False, True])
def test_empty(grad):
    module = randomised(MultiHeadAttention(E, **ROTARY))
    with torch.set_grad_enabled(grad):
        assert module(torch.randn(B, 0, E)).shape == (B, 0, E)
        assert module(torch.randn(0, L, E)).shape == (0, L, E)
        assert module(torch.randn(B, 0, E), torch.randn(B, M, E)).shape == (B, 0, E)
        nothing = module(torch.randn(B, L, E), torch.randn(B, 0, E))
    assert torch.equal(nothing, module.out_proj.bias.expand(B, L, -1))


def test_dropout_in_training_only():
    module, x = MultiHeadAttention(E, 4, dropout=0.5), torch.randn(B, L, E)
    plain = copy.deepcopy(module)
    plain.dropout = 0.0
    assert not torch.equal(module(x), plain(x))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = module(x)
        torch.manual_seed(5)
        assert torch.equal(module(x), first)
    module.eval()
    assert torch.equal(module(x), plain(x))
