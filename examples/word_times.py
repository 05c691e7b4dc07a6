"""When a word was spoken, read off Whisper's cross-attention.

While the decoder decides on a token, some of its heads look at the stretch of sound that the token
comes from. One row of their weights per token makes a picture, tokens by audio frames; the heaviest
path through it that never goes back in time says when each token was spoken. Sources: OpenAI's
Whisper, whisper/timing.py (standardise, median filter, mean over heads, dynamic time warping);
Sakoe and Chiba 1978 for the warping.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch import Tensor

import manyheads as mh

SECONDS_PER_FRAME = 0.02  # of the encoder: sound in hops of 10 ms, then a convolution of stride 2
FILTER_WIDTH = 7
Array = np.ndarray[Any, Any]

#: The last query's row of weights, exactly: what is received from the last query alone. In a call
#: with the words before the text, and in each step that follows, that query decides on a token.
LAST_ROW = mh.Received(last=1)
CROSS_ATTENTION = "model.decoder.layers.*.encoder_attn"


@dataclass(frozen=True, slots=True)
class Word:
    """A word, and when it was spoken, in seconds from the beginning of the audio."""

    text: str
    start: float
    end: float


def rows_of(seen: mh.Seen, tokens: int) -> Tensor:
    """The cross-attention that decided on each token: [layers, heads, tokens, frames].

    seen: `observe(model, LAST_ROW, layers=CROSS_ATTENTION)` around one greedy `generate()`.
    tokens: how many it made, with the one that ends the text.
    """
    layers = []
    for layer in seen.layers:
        rows = [record[LAST_ROW][0] for record in seen[layer]][-tokens:]
        if len(rows) < tokens:
            raise mh.ArgumentError(
                f"got {len(rows)} calls of {layer!r}, expected one for each of {tokens} tokens: "
                "observe the generate() call that made them."
            )
        layers.append(torch.stack(rows, dim=1))
    return torch.stack(layers)


def alignment_map(rows: Tensor, heads: list[tuple[int, int]], frames: int) -> Array:
    """How strongly each token belongs to each frame: [tokens, frames].

    rows: [layers, heads, tokens, all frames]. heads: (layer, head) of those that align. frames: how
    many hold sound; the others are the silence that fills 30 s.
    """
    weights = torch.stack([rows[layer, head] for layer, head in heads])[..., :frames].double()
    spread, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
    standard = (weights - mean) / spread.clamp(min=1e-30)
    smooth = median_filter(standard.numpy(), size=(1, 1, FILTER_WIDTH), mode="mirror")
    return np.asarray(smooth.mean(axis=0))


def warp(gain: Array) -> Array:
    """The frame at which each token begins, on the path of greatest total gain: [tokens].

    gain: [tokens, frames]. The path goes from the first cell to the last; each step goes one token
    on, one frame on, or both. A row at a time: with S the running sum of its gains, the best total
    up to cell j is S[j] + max over i <= j of (best before entering at i - S[i - 1]).
    """
    tokens, frames = gain.shape
    before = np.full(frames, -np.inf)  # the best total before entering the row at each frame
    before[0] = 0.0
    entered = np.empty((tokens, frames), int)  # where the best path to each cell entered its row
    diagonal = np.empty((tokens, frames), bool)  # whether the path entered there from one frame ago
    for token in range(tokens):
        running = np.cumsum(gain[token])
        offer = before - (running - gain[token])
        best = np.maximum.accumulate(offer)
        entered[token] = np.maximum.accumulate(np.where(offer == best, np.arange(frames), 0))
        total = running + best
        from_before = np.r_[-np.inf, total[:-1]]
        diagonal[token] = from_before > total
        before = np.maximum(from_before, total)
    begins, frame = np.empty(tokens, int), frames - 1
    for token in reversed(range(tokens)):
        begins[token] = frame = entered[token, frame]
        frame -= token > 0 and diagonal[token - 1, frame]
    return begins


def words_of(pieces: list[str], begins: Array, offset: float = 0.0) -> list[Word]:
    """Tokens joined to words; a word lasts until the next one begins.

    pieces: each token's text. begins: each token's first frame, and that of what follows the last.
    """
    words, seconds = [], offset + begins * SECONDS_PER_FRAME
    for first, last in spans_of(pieces):
        text = "".join(pieces[first:last]).strip()
        words.append(Word(text, float(seconds[first]), float(seconds[last])))
    return words


def word_weights(rows: Tensor, heads: list[tuple[int, int]], pieces: list[str]) -> Array:
    """What each word attends to, the mean of its tokens and of these heads: [words, frames]."""
    weights = torch.stack([rows[layer, head] for layer, head in heads]).mean(0)
    return np.stack([weights[first:last].mean(0).numpy() for first, last in spans_of(pieces)])


def spans_of(pieces: list[str]) -> list[tuple[int, int]]:
    """(first token, one past the last) of each word; a piece that begins with a space begins one.

    >>> spans_of([" Miss", " Dash", "wood", "."])
    [(0, 1), (1, 4)]
    """
    first = [n for n, piece in enumerate(pieces) if n == 0 or piece.startswith(" ")]
    return list(itertools.pairwise([*first, len(pieces)]))
