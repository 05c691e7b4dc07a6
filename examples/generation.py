"""How a `Transformer` with a decoder writes: greedily, by chance, or by searching with beams.

All three keep the keys and values of what is written already (`mh.KVCache`), so that a step costs
one token. B texts, prompts of Lp tokens; Ls tokens of source.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: Tensor,
    new_tokens: int,
    end: int | None = None,
    memory: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    source: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Int [B, n], n <= new_tokens: what follows prompt [B, Lp]; after a text's end, `end` only.

    temperature 0 takes the likeliest token; above, tokens are drawn, from the top_k likeliest and
    from the fewest that have a share of top_p together (Holtzman et al., 2020).
    """
    caches, written = model.caches(), []
    done = torch.zeros(len(prompt), dtype=torch.bool)
    tokens = prompt
    while len(written) < new_tokens and not done.all():
        hidden = model.decode(tokens, memory, memory_lengths, caches=caches)
        logits = model.logits(hidden[:, -1:], memory, memory_lengths, source)[:, 0].float()
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            chosen = _draw(logits / temperature, top_k, top_p, generator)
        if end is not None:
            chosen = chosen.masked_fill(done, end)
            done |= chosen == end
        written.append(chosen)
        tokens = chosen[:, None]
    return torch.stack(written, 1)


def _draw(
    logits: Tensor, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> Tensor:
    shares, tokens = logits.softmax(-1).sort(descending=True)
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill(before >= top_p, 0)
    if top_k is not None:
        shares[:, top_k:] = 0
    return tokens.gather(1, torch.multinomial(shares, 1, generator=generator))[:, 0]


@torch.inference_mode()
def beam_search(
    model: Transformer,
    prompt: Tensor,
    new_tokens: int,
    end: int,
    memory: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    source: Tensor | None = None,
    beams: int = 4,
    length_penalty: float = 0.6,
) -> Tensor:
    """Int [B, n], n <= new_tokens: the best of `beams` continuations of each prompt [B, Lp].

    Beams are ranked by log-probability / ((5 + n) / 6) ** length_penalty (Wu et al., 2016). One
    that has ended stays among its text's beams as long as its rank is good enough.
    """
    batch, caches = len(prompt), model.caches()
    rows = torch.arange(batch).repeat_interleave(beams)  # the text of every beam
    tokens = prompt[rows]
    memory = None if memory is None else memory[rows]
    memory_lengths = None if memory_lengths is None else memory_lengths[rows]
    source = None if source is None else source[rows]
    scores = torch.full((batch, beams), -torch.inf)
    scores[:, 0] = 0  # they start alike: only the first counts
    counts = torch.zeros(batch * beams)  # written tokens
    done = torch.zeros(batch * beams, dtype=torch.bool)
    written = torch.empty(batch * beams, 0, dtype=torch.long)
    while written.shape[1] < new_tokens and not done.all():
        hidden = model.decode(tokens, memory, memory_lengths, caches=caches)
        steps = (
            model.logits(hidden[:, -1:], memory, memory_lengths, source)[:, 0]
            .float()
            .log_softmax(-1)
        )
        steps[done] = -torch.inf
        steps[done, end] = 0.0
        totals = scores.view(-1, 1) + steps  # [B * beams, vocabulary]
        counts += ~done
        ranks = totals / ((5 + counts[:, None]) / 6) ** length_penalty
        best = ranks.view(batch, -1).topk(beams).indices
        scores = totals.view(batch, -1).gather(1, best)
        vocabulary = totals.shape[1]
        origin = (torch.arange(batch)[:, None] * beams + best // vocabulary).flatten()
        tokens = (best % vocabulary).view(-1, 1)
        for own, _ in caches:  # a text's beams share its source, so only the own ones move
            own.reorder(origin)
        written = torch.cat([written[origin], tokens], 1)
        counts, done = counts[origin], done[origin] | (tokens[:, 0] == end)
    return written.view(batch, beams, -1)[:, 0]
