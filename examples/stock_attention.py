"""The attention that the examples compare with: torch's own, in the same module."""

from __future__ import annotations

from torch.nn import functional as F

import manyheads as mh


class StockAttention(mh.MultiHeadAttention):
    """The same layer with the same weights, as one writes it with torch alone.

    In self-attention give it no mask that moves the queries: with right padding, KeyLengths alone.
    """

    def forward(self, query, key=None, value=None, *, mask=None, cache=None):
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        past = 0 if cache is None else cache.length
        if self.positions is not None:
            q, k = self.positions(q, past), self.positions(k, past)
        if cache is not None:
            k, v = cache.append(k, v)
        masks = [m for m in (self.mask, mask) if m is not None]
        causal = masks == [mh.Causal()] and q.shape[2] == k.shape[2]
        allowed = None
        for one in [] if causal else masks:
            rows = one.materialize(q.shape[2], k.shape[2], batch=q.shape[0])
            allowed = rows if allowed is None else allowed & rows
        out = F.scaled_dot_product_attention(
            q, k, v, allowed, is_causal=causal, enable_gqa=self.num_kv_heads != self.num_heads
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))
