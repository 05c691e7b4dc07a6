"""MultiHeadAttention against its formula, torch's own module, and itself fed in pieces."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from oracle import Problem, attend
from tolerance import assert_close_to_oracle
from torch import Tensor, nn

import manyheads as mh
from manyheads import MultiHeadAttention

E, B, L, M = 24, 3, 7, 11  # embedding, batch, query length, memory length
CAUSAL = torch.ones(L, L, dtype=torch.bool).tril()


def close(actual: Tensor, oracle: Tensor, eager: Tensor) -> None:
    """The numerics rule over [..., L, E], one batch element at a time.

    The oracle's own rounding is that of float64, so a float64 result is held against float32's.
    """
    assert actual.dtype == eager.dtype
    if actual.dtype == torch.float64:
        actual, eager = actual.float(), oracle.float()
    views = [x.detach().reshape(-1, 1, *x.shape[-2:]) for x in (actual, oracle, eager)]
    assert_close_to_oracle(*views, actual.dtype)


def by_formula(
    module: MultiHeadAttention, query, key=None, value=None, *, dtype=torch.float64, start=0, **how
) -> Tensor:
    """Concat(head_i) W_O from the module's weights alone, every step in `dtype`.

    start: the query's first position, for rotary and for nothing else; how: the oracle's mask,
    bias and scale.
    """
    key = query if key is None else key
    value = key if value is None else value

    def heads(projection, x, count):
        bias = None if projection.bias is None else projection.bias.to(dtype)
        y = nn.functional.linear(x.to(dtype), projection.weight.to(dtype), bias)
        return torch.stack(y.split(module.head_dim, -1), 1) if count else y

    q = heads(module.q_proj, query, module.num_heads)
    k = heads(module.k_proj, key, module.num_kv_heads)
    v = heads(module.v_proj, value, module.num_kv_heads)
    q, k = normed(module.q_norm, q), normed(module.k_norm, k)
    q, k = rotated(module.positions, q, start), rotated(module.positions, k, 0)
    out, _ = attend(Problem(q, k, v, **how), dtype)
    return heads(module.out_proj, torch.cat(out.unbind(1), -1), 0)


def normed(norm, x):
    if norm is None:
        return x
    if isinstance(norm, nn.LayerNorm):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * norm.weight.to(x.dtype) + norm.bias.to(x.dtype)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.to(x.dtype)


def rotated(positions, x, start):
    if positions is None:
        return x
    half = positions.dim // 2
    theta = torch.tensor([positions.base ** (-i / half) for i in range(half)]).to(x.dtype)
    angle = torch.arange(start, start + x.shape[2]).to(x.dtype)[:, None] * theta
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat(
        [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1
    )


def agrees(module, *inputs, start=0, how=None, **call) -> None:
    """The module's output obeys the numerics rule against the formula."""
    how = how or {}
    got = module(*inputs, **call)
    oracle = by_formula(module, *inputs, start=start, **how)
    close(got, oracle, by_formula(module, *inputs, start=start, dtype=got.dtype, **how))


def randomised(module: nn.Module) -> nn.Module:
    """Biases and norms too, which start at 0 and 1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.5 + ("norm" in name))
    return module


# --- the formula -------------------------------------------------------------------------------

KINDS = {
    "multi-head": {"num_heads": 4},
    "one head": {"num_heads": 1},
    "grouped-query": {"num_heads": 6, "num_kv_heads": 2},
    "multi-query": {"num_heads": 4, "num_kv_heads": 1},
    "wide heads": {"num_heads": 5, "head_dim": 8},
    "no bias": {"num_heads": 4, "bias": False},
    "output size": {"num_heads": 4, "out_dim": 13},
    "scale": {"num_heads": 4, "scale": 0.3},
    "rms": {"num_heads": 4, "qk_norm": "rms"},
    "layer": {"num_heads": 6, "num_kv_heads": 3, "qk_norm": "layer"},
    "factory": {"num_heads": 4, "qk_norm": nn.LayerNorm},
    "rotary": {"num_heads": 6, "num_kv_heads": 2, "positions": mh.Rotary(4)},
    "partial rotary": {"num_heads": 4, "positions": mh.Rotary(4, 500.0)},
    "rotary and rms": {"num_heads": 4, "positions": mh.Rotary(6), "qk_norm": "rms"},
}


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

ROTARY = {"num_heads": 6, "num_kv_heads": 2, "positions": mh.Rotary(4)}


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


# --- caches ------------------------------------------------------------------------------------

CACHED = {
    "plain": ({"num_heads": 4}, None),
    "rotary, grouped": (ROTARY, None),
    "rotary, window": (ROTARY, mh.Window(3, 0)),
    "rotary, norm": ({"num_heads": 4, "positions": mh.Rotary(6), "qk_norm": "rms"}, None),
    "window and first keys": (ROTARY, mh.Window(2, 0) | mh.FirstKeys(2)),
}


@pytest.mark.parametrize("pieces", [[17], [13, 1, 1, 1, 1], [5, 5, 5, 2], [1] * 17], ids=str)
@pytest.mark.parametrize("kind", CACHED)
def test_in_pieces_equals_one_pass(kind, pieces):
    options, extra = CACHED[kind]
    mask = mh.Causal() if extra is None else mh.Causal() & extra
    module = randomised(MultiHeadAttention(E, mask=mask, **options)).eval()
    x, cache = torch.randn(B, 17, E), mh.KVCache()
    with torch.no_grad():
        got = torch.cat([module(piece, cache=cache) for piece in x.split(pieces, 1)], 1)
    assert cache.length == 17
    row, key = torch.arange(17)[:, None], torch.arange(17)
    allowed = key <= row
    if isinstance(extra, mh.Window):
        allowed = allowed & (key >= row - 3)
    elif extra is not None:
        allowed = allowed & ((key >= row - 2) | (key < 2))
    oracle = by_formula(module, x, allowed=allowed)
    close(got, oracle, by_formula(module, x, dtype=torch.float32, allowed=allowed))


def test_alibi_goes_on_where_the_cache_ends():
    module = MultiHeadAttention(E, 4, mask=mh.Causal(), attn_bias=mh.Alibi()).eval()
    x, cache = torch.randn(B, L, E), mh.KVCache()
    with torch.no_grad():
        got = torch.cat([module(piece, cache=cache) for piece in x.split([4, 1, 2], 1)], 1)
    distance = (torch.arange(L) - torch.arange(L)[:, None]).abs()
    bias = -torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])[:, None, None] * distance
    how = {"allowed": CAUSAL, "bias": bias}
    close(got, by_formula(module, x, **how), by_formula(module, x, dtype=torch.float32, **how))


def test_left_padded_batch_decodes():
    module = randomised(MultiHeadAttention(E, **ROTARY)).eval()
    x, cache, starts = torch.randn(B, L, E), mh.KVCache(), [0, 2, 4]
    mask = mh.Causal() & mh.KeyRange(starts)
    with torch.no_grad():
        got = torch.cat([module(y, cache=cache, mask=mask) for y in x.split([5, 1, 1], 1)], 1)
    for b, start in enumerate(starts):
        allowed = CAUSAL & (torch.arange(L) >= start)
        eager = by_formula(module, x[b : b + 1], dtype=torch.float32, allowed=allowed)
        alone = x[b : b + 1, start:]
        oracle = by_formula(module, alone, allowed=CAUSAL[: L - start, : L - start])
        close(got[b : b + 1, start:], oracle, eager[:, start:])


def test_beams_and_rejected_tokens():
    module = MultiHeadAttention(E, mask=mh.Causal(), **ROTARY).eval()
    x, cache = torch.randn(2, 5, E), mh.KVCache()
    beams, next_ = torch.tensor([1, 1, 0]), torch.randn(3, 1, E)
    with torch.no_grad():
        module(x, cache=cache)
        cache.reorder(beams)
        module(torch.randn(3, 2, E), cache=cache)
        cache.truncate(5)
        got = module(next_, cache=cache)
    whole, allowed = torch.cat([x[beams], next_], 1), CAUSAL[:6, :6]
    close(
        got,
        by_formula(module, whole, allowed=allowed)[:, -1:],
        by_formula(module, whole, dtype=torch.float32, allowed=allowed)[:, -1:],
    )


def test_memory_is_projected_once():
    module = randomised(MultiHeadAttention(E, 4, key_dim=5, value_dim=5)).eval()
    x, memory, cache = torch.randn(B, L, E), torch.randn(B, M, 5), mh.KVCache()
    with torch.no_grad():
        first = module(x[:, :4], memory, cache=cache)
        rest = [module(x[:, i : i + 1], memory[:, :0], cache=cache) for i in (4, 5, 6)]
    assert cache.length == M
    eager = by_formula(module, x, memory, dtype=torch.float32)
    close(torch.cat([first, *rest], 1), by_formula(module, x, memory), eager)


def test_query_start_places_the_queries():
    module = MultiHeadAttention(E, mask=mh.Causal(), **ROTARY).eval()
    x, memory = torch.randn(B, L, E), torch.randn(B, M, E)
    for start in (0, 2, 9):
        allowed = torch.arange(M) <= start + torch.arange(L)[:, None]
        agrees(module, x, memory, start=start, query_start=start, how={"allowed": allowed})
    starts = torch.tensor([0, 9, 2])
    got = module(x, memory, query_start=starts)
    for b, start in enumerate(starts.tolist()):
        allowed = torch.arange(M) <= start + torch.arange(L)[:, None]
        one = (x[b : b + 1], memory[b : b + 1])
        oracle = by_formula(module, *one, start=start, allowed=allowed)
        eager = by_formula(module, *one, start=start, dtype=torch.float32, allowed=allowed)
        close(got[b : b + 1], oracle, eager)


def test_caching_needs_no_grad():
    module = MultiHeadAttention(E, 4)
    with pytest.raises(mh.ArgumentError, match=r"requires grad; expected none.*no_grad"):
        module(torch.randn(B, L, E), cache=mh.KVCache())


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


# --- errors ------------------------------------------------------------------------------------

X, MEMORY = torch.zeros(B, L, E), torch.zeros(B, M, E)
ERRORS = {
    "heads": (
        lambda: MultiHeadAttention(E, 7), mh.ArgumentError,
        "embed_dim=24 is not divisible by num_heads=7; expected a multiple",
    ),
    "groups": (
        lambda: MultiHeadAttention(E, 6, num_kv_heads=4), mh.ArgumentError,
        "num_heads=6 is not divisible by num_kv_heads=4; expected",
    ),
    "no heads": (
        lambda: MultiHeadAttention(E, 0), mh.ArgumentError,
        "num_heads is 0; expected at least 1: give",
    ),
    "no key/value heads": (
        lambda: MultiHeadAttention(E, 4, num_kv_heads=0), mh.ArgumentError, "num_kv_heads is 0",
    ),
    "size of a wrong type": (
        lambda: MultiHeadAttention(24.0, 4), mh.ArgumentTypeError, r"embed_dim is 24\.0; expected",
    ),
    "positions": (
        lambda: MultiHeadAttention(E, 4, positions=mh.Alibi()), mh.ArgumentTypeError,
        "positions is a Alibi; expected a Rotary or None: .*attn_bias",
    ),
    "wide positions": (
        lambda: MultiHeadAttention(E, 4, positions=mh.Rotary(8)), mh.ArgumentError,
        "turns 8 channels; expected at most head_dim=6",
    ),
    "norm": (
        lambda: MultiHeadAttention(E, 4, qk_norm="batch"), mh.ArgumentError,
        "qk_norm is 'batch'; expected 'rms', 'layer'",
    ),
    "dropout": (
        lambda: MultiHeadAttention(E, 4, dropout=1.5), mh.ArgumentError,
        r"dropout is out of range: got 1\.5; expected a number in \[0, 1\); leave dropout out",
    ),
    "dropout of a wrong type": (
        lambda: MultiHeadAttention(E, 4, dropout="a"), mh.ArgumentTypeError,
        r"dropout .*got str; expected a number in \[0, 1\); convert",
    ),
    "scale": (
        lambda: MultiHeadAttention(E, 4, scale="x"), mh.ArgumentTypeError,
        "scale .*got str; expected a finite number; convert",
    ),
    "module mask of a wrong type": (
        lambda: MultiHeadAttention(E, 4, mask="causal"), mh.ArgumentTypeError,
        r"mask must be None, .*got str.*mh\.Causal\(\)",
    ),
    "module mask that is a list": (
        lambda: MultiHeadAttention(E, 4, mask=[1]), mh.ArgumentTypeError, "mask must .*got list",
    ),
    "module bias that is a list": (
        lambda: MultiHeadAttention(E, 4, attn_bias=[1]), mh.ArgumentTypeError,
        "attn_bias is a list; expected Alibi, .*: torch.as_tensor",
    ),
    "mask of a wrong type beside the module's": (
        lambda: MultiHeadAttention(E, 4, mask=mh.Causal())(X, mask=[1]), mh.ArgumentTypeError,
        "mask must .*got list",
    ),
    "bias of a wrong type beside the module's": (
        lambda: MultiHeadAttention(E, 4, attn_bias=mh.Alibi())(X, attn_bias=[1]),
        mh.ArgumentTypeError, "attn_bias is a list",
    ),
    "cache": (
        lambda: MultiHeadAttention(E, 4)(X, cache=3), mh.ArgumentTypeError,
        r"cache is a int; expected a KVCache or None: make one .*KVCache\(\)",
    ),
    "a list as query": (
        lambda: MultiHeadAttention(E, 4)([1.0]), mh.ArgumentTypeError,
        "query is not a tensor: got list; expected torch.Tensor; torch.as_tensor",
    ),
    "a list as value": (
        lambda: MultiHeadAttention(E, 4)(X, MEMORY, [1.0]), mh.ArgumentTypeError,
        "value is not a tensor: got list",
    ),
    "query elsewhere": (
        lambda: MultiHeadAttention(E, 4)(X.to("meta")), mh.DeviceError,
        r"query is elsewhere: got meta; expected this module's cpu; move .*\.to\('cpu'\)",
    ),
    "module elsewhere": (
        lambda: MultiHeadAttention(E, 4, device="meta")(X), mh.DeviceError,
        "got cpu; expected this module's meta",
    ),
    "key elsewhere": (
        lambda: MultiHeadAttention(E, 4)(X, MEMORY.to("meta")), mh.DeviceError,
        "key is elsewhere: got meta",
    ),
    "mask of a wrong type": (
        lambda: MultiHeadAttention(E, 4)(X, mask="causal"), mh.ArgumentTypeError, "got str",
    ),
    "float mask": (
        lambda: MultiHeadAttention(E, 4)(X, mask=CAUSAL.float()), mh.ArgumentTypeError, "float32",
    ),
    "mask of other lengths": (
        lambda: MultiHeadAttention(E, 4)(X, mask=CAUSAL[:3]), mh.ShapeError, r"\[7, 7\]",
    ),
    "bias of other heads": (
        lambda: MultiHeadAttention(E, 4, attn_bias=mh.RelativeBias(3))(X), mh.ShapeError,
        "3 heads; the query has 4",
    ),
    "value alone": (
        lambda: MultiHeadAttention(E, 4)(X, value=X), mh.ArgumentError,
        r"value without a key; expected \(query\)",
    ),
    "query size": (
        lambda: MultiHeadAttention(E, 4)(X[..., :5]), mh.ShapeError,
        r"query has shape \[3, 7, 5\]; expected \[B, L, 24\]",
    ),
    "self-attention with another key size": (
        lambda: MultiHeadAttention(E, 4, key_dim=5)(X), mh.ShapeError,
        r"key has shape \[3, 7, 24\]; expected \[B, L, 5\]",
    ),
    "rank": (lambda: MultiHeadAttention(E, 4)(X[None]), mh.ShapeError, r"\[1, 3, 7, 24\]; exp"),
    "ranks": (
        lambda: MultiHeadAttention(E, 4)(X, MEMORY[0]), mh.ShapeError, r"key has shape \[11, 24\]",
    ),
    "batches": (
        lambda: MultiHeadAttention(E, 4)(X, MEMORY[:2]), mh.ShapeError, "batch sizes differ",
    ),
    "key and value lengths": (
        lambda: MultiHeadAttention(E, 4)(X, MEMORY, X), mh.ShapeError, "the same batch",
    ),
    "dtype": (
        lambda: MultiHeadAttention(E, 4)(X.double()), mh.ArgumentTypeError,
        "query has another dtype: got torch.float64; expected this module's torch.float32; convert",
    ),
    "dtype of the value": (
        lambda: MultiHeadAttention(E, 4)(X, MEMORY, MEMORY.bfloat16()), mh.ArgumentTypeError,
        "value has another dtype: got torch.bfloat16; expected this module's torch.float32",
    ),
    "query_start of a wrong type": (
        lambda: MultiHeadAttention(E, 4)(X, query_start="x"), mh.ArgumentTypeError,
        "query_start is of the wrong type: got str",
    ),
    "query_start of another batch": (
        lambda: MultiHeadAttention(E, 4, positions=mh.Rotary(6))(X, query_start=torch.arange(2)),
        mh.ShapeError, r"query_start .*got \[2\]; expected \[3\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_a_cache_of_another_batch_is_refused_and_left_alone():
    module, cache = MultiHeadAttention(E, 4), mh.KVCache()
    with torch.no_grad():
        module(X, cache=cache)
        with pytest.raises(mh.ShapeError, match=r"\(2, 4, 6\); expected \(3, 4, 6\)"):
            module(X[:2], cache=cache)
    assert cache.length == L
