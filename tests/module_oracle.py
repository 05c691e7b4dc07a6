"""Multi-head attention by its formula in float64, and how the module is compared with it."""

from __future__ import annotations

import torch
from oracle import Problem, attend
from tolerance import assert_close_to_oracle
from torch import Tensor, nn

import manyheads as mh
from manyheads import MultiHeadAttention

E, B, L, M = 24, 3, 7, 11  # embedding, batch, query length, memory length
CAUSAL = torch.ones(L, L, dtype=torch.bool).tril()
ROTARY = {"num_heads": 6, "num_kv_heads": 2, "positions": mh.Rotary(4)}
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
