"""A Marian translation model run with our attention: the network and its search.

Marian (Junczys-Dowmunt et al., 2018) is what Firefox translates with. Its small models have a
Transformer encoder; in the decoder a simple recurrence, the SSRU ("From Research to Production and
Back", Kim et al., 2019), stands where self-attention would, and cross-attention reads the source.
Here `mh.MultiHeadAttention` is both the encoder's self-attention and the decoder's cross-attention.

    S sentences, L source tokens, K beams, E sizes of an embedding, V tokens in the vocabulary

The K beams of a sentence stand on the query axis of one cross-attention call, which therefore
reads the sentence's keys and values once for all of them.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from marian_file import marian_name, read
from stock_attention import StockAttention
from torch import Tensor, nn
from torch.nn import functional as F

import manyheads as mh

EOS = 0  # Marian's end of sentence


ATTENTION = {"manyheads": mh.MultiHeadAttention, "sdpa": StockAttention}


class FeedForward(nn.Module):
    """LN(x + W2 relu(W1 x)), the norm after the sum as in the first Transformer."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, inner), nn.Linear(inner, size)
        self.norm = nn.LayerNorm(size, eps=1e-9)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.relu(self.up(x))))


class EncoderLayer(nn.Module):
    """Self-attention, then the feed-forward layer."""

    def __init__(self, attention: type, size: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attend, self.norm = attention(size, heads), nn.LayerNorm(size, eps=1e-9)
        self.ffn = FeedForward(size, inner)

    def forward(self, x: Tensor, mask: mh.Mask) -> Tensor:
        return self.ffn(self.norm(x + self.attend(x, mask=mask)))


class DecoderLayer(nn.Module):
    """One step of the SSRU, cross-attention, then the feed-forward layer."""

    def __init__(self, attention: type, size: int, heads: int, inner: int) -> None:
        super().__init__()
        self.update, self.forget = nn.Linear(size, size, bias=False), nn.Linear(size, size)
        self.cell_norm = nn.LayerNorm(size, eps=1e-9)
        self.attend, self.norm = attention(size, heads), nn.LayerNorm(size, eps=1e-9)
        self.ffn = FeedForward(size, inner)

    def forward(
        self, x: Tensor, cell: Tensor, memory: Tensor, mask: mh.Mask, cache: mh.KVCache
    ) -> tuple[Tensor, Tensor]:
        forget = torch.sigmoid(self.forget(x))
        cell = forget * cell + (1 - forget) * self.update(x)
        x = self.cell_norm(x + F.relu(cell))
        fresh = memory if cache.length == 0 else memory[:, :0]  # projected once, at the first step
        x = self.norm(x + self.attend(x, fresh, mask=mask, cache=cache))
        return self.ffn(x), cell


class Marian(nn.Module):
    """The network: settings as in the file, `attention` what its heads are computed by."""

    def __init__(self, settings: Mapping[str, Any], attention: str = "manyheads") -> None:
        super().__init__()
        size, heads = settings["dim-emb"], settings["transformer-heads"]
        layer = (ATTENTION[attention], size, heads, settings["transformer-dim-ffn"])
        self.embedding = nn.Embedding(settings["dim-vocabs"][0], size)
        self.output_bias = nn.Parameter(torch.zeros(settings["dim-vocabs"][1]))
        self.encoder = nn.ModuleList(EncoderLayer(*layer) for _ in range(settings["enc-depth"]))
        self.decoder = nn.ModuleList(DecoderLayer(*layer) for _ in range(settings["dec-depth"]))

    def positions(self, start: int, length: int) -> Tensor:
        """[length, E]: sines in the first half, cosines in the second."""
        half = self.embedding.embedding_dim // 2
        rates = torch.exp(torch.arange(half) * (-math.log(1e4) / (half - 1)))
        angles = torch.arange(start, start + length)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) * self.embedding.embedding_dim**0.5

    def encode(self, tokens: Tensor, mask: mh.Mask) -> Tensor:
        """[S, L] tokens, padded at the end as `mask` says, to [S, L, E]."""
        x = self.embed(tokens) + self.positions(0, tokens.shape[1])
        for layer in self.encoder:
            x = layer(x, mask)
        return x

    def step(self, x: Tensor, step: int, cells: Tensor, memory: Tensor, mask, caches) -> Any:
        """(log-probabilities [S, K, V], cells) after the embeddings [S, K, E] of the last tokens.

        cells: [layers, S, K, E], the recurrences' states.
        """
        x = x + self.positions(step, 1)
        after = []
        for layer, cell, cache in zip(self.decoder, cells, caches, strict=True):
            x, cell = layer(x, cell, memory, mask, cache)
            after.append(cell)
        logits = F.linear(x, self.embedding.weight, self.output_bias)
        return logits.log_softmax(-1), torch.stack(after)


def load(path: Path | zipfile.Path, attention: str = "manyheads") -> Marian:
    """The model of a Marian binary, ready to translate.

    Raises: mh.ArgumentError as `read` does, or if a weight is missing or has another shape.
    """
    settings, weights = read(path)
    model = Marian(settings, attention)
    for ours, parameter in model.named_parameters():
        found = weights.get(marian_name(ours))
        if found is None or found.numel() != parameter.numel():
            got = "none" if found is None else f"shape {tuple(found.shape)}"
            raise mh.ArgumentError(
                f"{path} does not fit its own settings: got {got} for {marian_name(ours)}; "
                f"expected {tuple(parameter.shape)}. Fetch it again."
            )
        parameter.data = found.reshape(parameter.shape)
    return model.requires_grad_(False).eval()


@torch.inference_mode()
def search(
    model: Marian, sources: Sequence[Sequence[int]], beams: int, length_factor: float = 2.5
) -> list[list[int]]:
    """The best translation of each source by beam search; one beam is greedy.

    A translation's worth is its log-probability divided by its length, as Marian has it. All beams
    of all sentences step together. A sentence is done when as many of its translations have ended
    as there are beams, or when they are `length_factor` times as long as it is.
    """
    count, layers, size = len(sources), len(model.decoder), model.embedding.embedding_dim
    lengths = [len(source) for source in sources]
    mask = mh.KeyLengths(torch.tensor(lengths))
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sources], batch_first=True)
    memory, caches = model.encode(padded, mask), [mh.KVCache() for _ in range(layers)]
    x, cells = torch.zeros(count, beams, size), torch.zeros(layers, count, beams, size)
    scores = torch.full((count, beams), -torch.inf)
    scores[:, 0] = 0.0  # all beams are alike at first
    open_texts: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in sources]
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in sources]
    done = [False] * count
    for step in range(int(length_factor * max(lengths)) + 1):
        chances, cells = model.step(x, step, cells, memory, mask, caches)
        best = (scores[..., None] + chances).flatten(1).topk(2 * beams)
        origins, tokens = best.indices // chances.shape[-1], best.indices % chances.shape[-1]
        # Each beam can end in one way only: of these 2K continuations at least K go on.
        goes_on = (tokens != EOS).int().argsort(dim=1, descending=True, stable=True)
        goes_on = goes_on[:, :beams]
        for s in (s for s in range(count) if not done[s]):
            rows = zip(*(t[s].tolist() for t in (best.values, origins, tokens)), strict=True)
            longer = [(score / (step + 1), open_texts[s][i], token) for score, i, token in rows]
            ended[s] += [
                found[:2] for found in longer[:beams] if found[2] == EOS and found[0] > -math.inf
            ]
            open_texts[s] = [[*longer[i][1], longer[i][2]] for i in goes_on[s].tolist()]
            done[s] = len(ended[s]) >= beams or step >= int(length_factor * lengths[s])
            if not ended[s] and done[s]:
                ended[s].append((longer[0][0], open_texts[s][0]))
        if all(done):
            break
        scores, origins, tokens = (t.gather(1, goes_on) for t in (best.values, origins, tokens))
        cells = cells.gather(2, origins[None, ..., None].expand_as(cells))
        x = model.embed(tokens)
    return [max(texts)[1] for texts in ended]
