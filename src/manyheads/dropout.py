"""Which attention weights dropout keeps, as a function of a seed and of where a weight stands.

The kernels never store it (csrc/kernel/dropout.h); this is the same function in PyTorch, for
derivatives of derivatives, and as what the kernels are tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Philox4x32 (Salmon et al., 2011): multipliers, and what the key grows by after every round.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_WORD = 0xFFFFFFFF
_STEPS = 1 << 16


def draw_seed() -> Tensor:
    """int64 [1] from torch's default generator, so that torch.manual_seed governs dropout."""
    return torch.randint(-(1 << 62), 1 << 62, (1,))


def factors(seed: Tensor, p: float, shape: tuple[int, int, int, int]) -> Tensor:
    """float32 [B, Hq, Lq, Lk]: 0 with probability p, rounded to 1 / 65,536, else 1 / (1 - p).

    seed: int64 [1]. Eight neighbouring keys share one counter, (key // 8, row, b * Hq + head, 0),
    and get 16 bits each of its 128. O(Lq * Lk) memory.
    """
    threshold = min(int(p * _STEPS + 0.5), _STEPS - 1)
    batch, heads, rows, keys = shape
    device = seed.device
    index = torch.zeros(1, dtype=torch.int64, device=device)
    counter = [
        torch.arange((keys + 7) // 8, device=device),
        torch.arange(rows, device=device)[:, None],
        torch.arange(batch * heads, device=device)[:, None, None],
        index,
    ]
    words = _philox(counter, [seed & _WORD, (seed >> 32) & _WORD])
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    whole = torch.zeros(batch * heads, rows, 1, dtype=torch.int64, device=device)
    bits = torch.stack([half + whole for half in halves], dim=-1).flatten(-2)[..., :keys]
    return (bits >= threshold).float().reshape(shape) * (_STEPS / (_STEPS - threshold))


def _philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Four 32-bit words, held in int64."""
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(counter[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(counter[2], _MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(k + step) & _WORD for k, step in zip(key, _KEY_STEPS, strict=True)]
    return counter


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and lower 32 bits of a product; by halves, since int64 has a sign."""
    low = (word & 0xFFFF) * factor
    carried = (word >> 16) * factor + (low >> 16)
    return carried >> 16, ((carried & 0xFFFF) << 16) | (low & 0xFFFF)
