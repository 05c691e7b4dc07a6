"""A small Transformer to read: an encoder, a decoder, or both (Vaswani et al., 2017).

From the bottom up: `Layer` (attention, perhaps cross-attention, and a feed-forward part, each with
a residual and a norm), `Stack` (layers on vectors: all that an image model needs), `Transformer`
(a stack or two on tokens), and how tokens are generated.

B texts, L tokens each, vectors of E channels; Ls and Lt tokens of source and target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from copying import Copying
from stock_attention import StockAttention
from torch import Tensor, nn
from torch.nn import functional as F

import manyheads as mh

#: One layer's keys and values while decoding: of the tokens so far, and of the source.
LayerCache = tuple[mh.KVCache, mh.KVCache]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all layers of a model share."""

    dim: int = 256  # E
    heads: int = 4
    kv_heads: int | None = None  # fewer: grouped-query attention; None: as many as heads
    hidden: int | None = None  # of the feed-forward part; None: 4 E
    dropout: float = 0.1
    norm: Literal["pre", "post"] = "pre"  # post is the paper's; pre trains without much care
    positions: Literal["rotary", "sinusoidal"] | None = "rotary"  # None: the caller adds its own
    attention: Literal["manyheads", "sdpa"] = "manyheads"  # sdpa: torch's, to compare with
    copies: bool = False  # with a source: what is written may be copied from it, see `Copying`


def attention(config: Config, mask: mh.Mask | None = None, turn: bool = False) -> nn.Module:
    """One attention layer; `turn` says whether it may use rotary positions."""
    kind = {"manyheads": mh.MultiHeadAttention, "sdpa": StockAttention}[config.attention]
    rotary = turn and config.positions == "rotary"
    positions = mh.Rotary(config.dim // config.heads) if rotary else None
    kv_heads = config.kv_heads
    return kind(config.dim, config.heads, num_kv_heads=kv_heads, positions=positions, mask=mask)


class Layer(nn.Module):
    """Self-attention, perhaps cross-attention, feed-forward: x + f(norm(x)) or norm(x + f(x))."""

    def __init__(self, config: Config, causal: bool, cross: bool) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.attend = attention(config, mh.Causal() if causal else None, turn=True)
        self.look = attention(config) if cross else None
        hidden = config.hidden or 4 * config.dim
        self.think = nn.Sequential(
            nn.Linear(config.dim, hidden), nn.GELU(), nn.Linear(hidden, config.dim)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.dim) for _ in range(3 if cross else 2))
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: mh.Mask | None = None,
        memory: Tensor | None = None,
        memory_mask: mh.Mask | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, L, E] to [B, L, E]; memory [B, Ls, E] is what the cross-attention looks at."""
        own, cross = cache or (None, None)
        x = self._add(x, 0, lambda y: self.attend(y, mask=mask, cache=own))
        if self.look is not None:
            if cross is not None and cross.length:
                memory = memory[:, :0]  # its keys and values are in the cache already
            x = self._add(x, 1, lambda y: self.look(y, memory, mask=memory_mask, cache=cross))
        return self._add(x, -1, self.think)

    def _add(self, x: Tensor, which: int, part: Callable[[Tensor], Tensor]) -> Tensor:
        norm = self.norms[which]
        return x + self.drop(part(norm(x))) if self.pre else norm(x + self.drop(part(x)))


class Stack(nn.Module):
    """Layers, one on the other, on vectors [B, L, E]."""

    def __init__(
        self, config: Config, layers: int, *, causal: bool = False, cross: bool = False
    ) -> None:
        super().__init__()
        self.sinusoidal = config.positions == "sinusoidal"
        self.layers = nn.ModuleList(Layer(config, causal, cross) for _ in range(layers))
        self.norm = nn.LayerNorm(config.dim) if config.norm == "pre" else nn.Identity()
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: mh.Mask | None = None,
        memory: Tensor | None = None,
        memory_mask: mh.Mask | None = None,
        caches: list[LayerCache] | None = None,
    ) -> Tensor:
        """[B, L, E] to [B, L, E]. The masks come on top of the layers' own Causal."""
        if self.sinusoidal:
            past = caches[0][0].length if caches else 0
            x = x + sinusoids(past, x.shape[1], x.shape[2]).to(x)
        x = self.drop(x)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = layer(x, mask, memory, memory_mask, cache)
        return self.norm(x)


class Transformer(nn.Module):
    """Tokens in, logits out; encoder only, decoder only or both, as the numbers of layers say.

    Input and output share one table of embeddings. Packed documents: mask=mh.Documents(lengths).
    """

    def __init__(
        self, vocabulary: int, config: Config, encoder_layers: int = 0, decoder_layers: int = 0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config.dim)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        self.encoder = Stack(config, encoder_layers) if encoder_layers else None
        self.decoder = None
        if decoder_layers:
            cross = self.encoder is not None
            self.decoder = Stack(config, decoder_layers, causal=True, cross=cross)
        both = encoder_layers > 0 and decoder_layers > 0
        self.copying = Copying(config.dim) if config.copies and both else None

    def embed(self, tokens: Tensor) -> Tensor:
        """Int [B, L] to vectors [B, L, E] of about unit size."""
        return self.embedding(tokens) * self.embedding.embedding_dim**0.5

    def encode(
        self, tokens: Tensor, lengths: Tensor | None = None, mask: mh.Mask | None = None
    ) -> Tensor:
        """[B, L, E] of int [B, L]; lengths, int [B]: what is behind them is padding."""
        return self.encoder(self.embed(tokens), _with_lengths(mask, lengths))

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        mask: mh.Mask | None = None,
        caches: list[LayerCache] | None = None,
    ) -> Tensor:
        """[B, L, E] of int [B, L]. With caches, the tokens are those after the cached ones."""
        memory_mask = _with_lengths(None, memory_lengths)
        return self.decoder(self.embed(tokens), mask, memory, memory_mask, caches)

    def logits(self, hidden: Tensor, *source: Tensor | None) -> Tensor:
        """[..., vocabulary] of [..., E], through the table of embeddings.

        source: what `Copying` needs: memory, lengths and tokens.
        """
        logits = F.linear(hidden, self.embedding.weight)
        return logits if self.copying is None else self.copying(logits, hidden, *source)

    def forward(
        self,
        tokens: Tensor,
        target: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: mh.Mask | None = None,
    ) -> Tensor:
        """Logits [B, L, vocabulary] of what follows each target token (with both), or each token.

        tokens: int [B, L], the source where there is an encoder; lengths: int [B], its own.
        """
        if self.encoder is None:
            return self.logits(self.decode(tokens, mask=mask))
        memory = self.encode(tokens, lengths, mask)
        if self.decoder is None:
            return self.logits(memory)
        hidden = self.decode(target, memory, lengths)
        if lengths is None:
            lengths = torch.full((len(tokens),), tokens.shape[1])
        return self.logits(hidden, memory, lengths, tokens)

    def caches(self) -> list[LayerCache]:
        """Empty caches, for one batch of texts."""
        return [(mh.KVCache(), mh.KVCache()) for _ in self.decoder.layers]


def _with_lengths(mask: mh.Mask | None, lengths: Tensor | None) -> mh.Mask | None:
    if lengths is None:
        return mask
    return mh.KeyLengths(lengths) if mask is None else mask & mh.KeyLengths(lengths)


def sinusoids(start: int, length: int, dim: int) -> Tensor:
    """float32 [length, dim]: the paper's sin and cos of positions from `start` on."""
    half = (dim + 1) // 2
    steps = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(start, start + length, dtype=torch.float64)[:, None] * steps
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :dim].float()
