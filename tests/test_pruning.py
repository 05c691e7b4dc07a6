"""`prune_heads`: the smaller module against the whole one with those heads' outputs zeroed."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from test_module import B, E, L, M, by_formula, close, randomised
from tolerance import assert_derived_close
from torch import Tensor, nn

import manyheads as mh
from manyheads import MultiHeadAttention
from manyheads.positions import BiasSum, ScoreBias

DENSE = torch.rand(1, 6, L, L, generator=torch.Generator().manual_seed(5)) < 0.7
SLOPES = torch.tensor([0.5, 0.3, 0.2, 0.1, 0.05, 0.01])


def by_head(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:
    """Head h sees the tokens up to h before its own."""
    return (p - j <= h) & (p >= j)


def table() -> mh.RelativeBias:
    bias = mh.RelativeBias(6, num_buckets=8, max_distance=16)
    with torch.no_grad():
        bias.table.normal_(generator=torch.Generator().manual_seed(7))
    return bias


OPTIONS: dict[str, Callable[[], dict[str, object]]] = {
    "plain": dict,
    "no bias, sizes": lambda: {"bias": False, "key_dim": 24, "out_dim": 13, "head_dim": 5},
    "rotary, norm": lambda: {"positions": mh.Rotary(4), "qk_norm": "rms", "scale": 0.7},
    "paper's alibi": lambda: {"attn_bias": mh.Alibi(), "mask": mh.Causal()},
    "alibi": lambda: {"attn_bias": mh.Alibi(SLOPES)},
    "learned alibi": lambda: {"attn_bias": mh.Alibi(nn.Parameter(SLOPES.clone()))},
    "relative": lambda: {"attn_bias": table()},
    "dense bias": lambda: {"attn_bias": torch.randn(6, L, L)},
    "shared dense bias": lambda: {"attn_bias": torch.randn(L, L)},
    "sum": lambda: {"attn_bias": mh.Alibi() + mh.DenseBias(torch.randn(2, 6, 1, 1)[:1])},
    "dense mask": lambda: {"mask": DENSE},
    "masks": lambda: {"mask": ~mh.Dense(~DENSE) & (mh.Causal() | mh.FirstKeys(1))},
    "predicate": lambda: {"mask": mh.Predicate(by_head)},
}
#: Heads (Hq, Hkv) and which go.
GONE = {
    "one": (6, 6, [2]),
    "all but one": (6, 6, [0, 1, 2, 3, 5]),
    "none": (6, 3, []),
    "a group": (6, 3, [2, 3]),
    "one of each group": (6, 3, [1, 2, 5]),
    "two groups, one of the third": (6, 3, [0, 1, 4, 5, 3]),
    "multi-query": (6, 1, [0, 4]),
}


def make(name: str, heads: int = 6, kv_heads: int = 6, **more) -> MultiHeadAttention:
    return randomised(MultiHeadAttention(E, heads, num_kv_heads=kv_heads, **OPTIONS[name]() | more))


def zeroed(module: MultiHeadAttention, heads: list[int]) -> MultiHeadAttention:
    """The whole module, deaf to these heads."""
    deaf = copy.deepcopy(module)
    with torch.no_grad():
        for head in heads:
            columns = slice(head * module.head_dim, (head + 1) * module.head_dim)
            deaf.out_proj.weight[:, columns] = 0
    return deaf


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_module_with_zeroed_heads(name, gone):
    heads, kv_heads, which = GONE[gone]
    module = make(name, heads, kv_heads)
    before = copy.deepcopy(module.state_dict())
    pruned, deaf = mh.prune_heads(module, which), zeroed(module, which)
    assert pruned.num_heads == heads - len(which)
    assert pruned.q_proj.weight.shape == (pruned.num_heads * module.head_dim, E)
    assert repr(pruned.out_proj).count(f"in_features={pruned.q_proj.out_features}")
    x = torch.randn(B, L, E)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            # An oracle in float64, since `by_formula` knows no masks and biases of the module.
            close(pruned(x), copy.deepcopy(deaf).double()(x.double()), deaf(x))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_obeys_the_rule_against_the_formula(dtype):
    module = make("rotary, norm", 6, 3).to(dtype)
    pruned, deaf = mh.prune_heads(module, [2, 3]), zeroed(module, [2, 3])
    x, memory = torch.randn(B, L, E).to(dtype), torch.randn(B, M, E).to(dtype)
    how = {"start": M - L, "scale": 0.7}
    oracle = by_formula(deaf, x, memory, **how)
    close(pruned(x, memory), oracle, by_formula(deaf, x, memory, dtype=dtype, **how))


def test_a_cache_goes_on():
    pruned = mh.prune_heads(make("paper's alibi", 6, 3).eval(), [1, 3, 5])
    x, cache = torch.randn(B, L, E), mh.KVCache()
    with torch.no_grad():
        pieces = torch.cat([pruned(piece, cache=cache) for piece in x.split([4, 1, 2], 1)], 1)
        torch.testing.assert_close(pieces, pruned(x))
    assert cache.view()[0].shape[1] == 3


def test_twice_is_as_good_as_once():
    for name in ("predicate", "masks", "relative", "paper's alibi"):
        module, x = make(name), torch.randn(B, L, E)
        once, twice = mh.prune_heads(module, [1, 4]), mh.prune_heads(module, [4])
        torch.testing.assert_close(mh.prune_heads(twice, [1])(x), once(x))
        torch.testing.assert_close(pickle.loads(pickle.dumps(once))(x), once(x))


def test_state_mode_and_frozen_parameters_are_kept():
    module = make("learned alibi", dropout=0.25).eval()
    module.k_proj.weight.requires_grad_(False)
    ran = []
    module.out_proj.register_forward_hook(lambda *_: ran.append(1))
    pruned = mh.prune_heads(module, [3])
    assert not pruned.training and pruned.dropout == 0.25
    frozen = [name for name, p in pruned.named_parameters() if not p.requires_grad]
    assert frozen == ["k_proj.weight"]
    assert list(pruned.state_dict()) == list(module.state_dict())
    pruned(torch.randn(1, L, E))
    assert ran == [1]
    fresh = MultiHeadAttention(E, 5, head_dim=4, attn_bias=mh.Alibi(nn.Parameter(torch.ones(5))))
    fresh.load_state_dict(pruned.state_dict())
    x = torch.randn(B, L, E)
    assert torch.equal(fresh.eval()(x), pruned(x))


def test_training_goes_on():
    """Gradients are those of the whole module, less the heads that are gone."""
    module, which = make("relative", 6, 3), [0, 1]
    pruned, deaf = mh.prune_heads(module, which), zeroed(module, which)
    x, weight = torch.randn(B, L, E), torch.randn(B, L, E)
    for each in (pruned, deaf):
        (each(x) * weight).sum().backward()
    assert_derived_close(pruned.q_proj.weight.grad, deaf.q_proj.weight.grad[8:])
    assert_derived_close(pruned.v_proj.weight.grad, deaf.v_proj.weight.grad[4:])
    assert_derived_close(pruned.out_proj.weight.grad, deaf.out_proj.weight.grad[:, 8:])
    assert_derived_close(pruned.attn_bias.table.grad, deaf.attn_bias.table.grad[:, 2:])
    assert module.q_proj.weight.grad is None
    torch.optim.SGD(pruned.parameters(), 0.1).step()


class Strange(ScoreBias):
    pass


def replaced(**layers: nn.Module) -> MultiHeadAttention:
    module = MultiHeadAttention(8, 4)
    for name, layer in layers.items():
        setattr(module, name, layer)
    return module


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "module": (lambda: mh.prune_heads(nn.Linear(8, 8), [0]), mh.ArgumentTypeError, "got a Linear"),
    "range": (
        lambda: mh.prune_heads(MultiHeadAttention(8, 4), [0, 4, -1]), mh.ArgumentError,
        "no heads [-1, 4]; expected numbers from 0 to 3",
    ),
    "all": (
        lambda: mh.prune_heads(MultiHeadAttention(8, 4), range(4)), mh.ArgumentError,
        "all 4 heads of the module would go; expected at least one to stay",
    ),
    "number": (
        lambda: mh.prune_heads(MultiHeadAttention(8, 4), 2), mh.ArgumentTypeError,
        "heads is 2; expected the numbers of heads",
    ),
    "words": (
        lambda: mh.prune_heads(MultiHeadAttention(8, 4), "12"), mh.ArgumentTypeError,
        "a head to prune must be a whole number; got '1'",
    ),
    "groups": (
        lambda: mh.prune_heads(MultiHeadAttention(8, 4, num_kv_heads=2), [1]), mh.ArgumentError,
        "[0] of key/value head 0, [2, 3] of key/value head 1; expected as many",
    ),
    "bias": (
        lambda: mh.prune_heads(MultiHeadAttention(8, 4, attn_bias=Strange()), [1]),
        mh.ArgumentTypeError, "attn_bias is a Strange; expected Alibi",
    ),
    "part of a sum": (
        lambda: mh.prune_heads(
            MultiHeadAttention(8, 4, attn_bias=BiasSum(mh.Alibi(), Strange())), [1]
        ), mh.ArgumentTypeError, "attn_bias is a Strange",
    ),
    "layer": (
        lambda: mh.prune_heads(replaced(v_proj=nn.Sequential(nn.Linear(8, 8))), [1]),
        mh.ArgumentTypeError, "v_proj is a Sequential; expected a plain nn.Linear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    run, error, words = BAD[name]
    with pytest.raises(error, match=re.escape(words)):
        run()
