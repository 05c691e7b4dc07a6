"""The module with caches: in pieces as in one pass, beams, left padding, cached memory."""

from __future__ import annotations

import pytest
import torch
from module_oracle import (
    CAUSAL,
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

import manyheads as mh
from manyheads import MultiHeadAttention

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
