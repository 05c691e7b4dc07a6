"""What `observe` hands to the page, without a model: measured calls, plausible large ones, text."""

from __future__ import annotations

import torch

import manyheads as mh


def measured(
    *measures: mh.Measure,
    lengths: tuple[int, int] = (11, 11),
    layers: int = 2,
    heads: int = 3,
    batch: int = 1,
    steps: int = 0,
    causal: bool = True,
    seed: int = 0,
) -> mh.Seen:
    """Random queries and keys, measured; `steps` more calls of one token each, as in generating."""
    torch.manual_seed(seed)
    records = []
    q_len, k_len = lengths
    for layer in range(layers):
        key = torch.randn(batch, heads, k_len + steps, 5) * 2
        query = torch.randn(batch, heads, q_len + steps, 5)
        calls = [(0, q_len, k_len)]
        calls += [(q_len + step, 1, k_len + step + 1) for step in range(steps)]
        for step, (begin, rows, keys) in enumerate(calls):
            mask = mh.Causal() if causal else None
            call = query[:, :, begin : begin + rows], key[:, :, :keys]
            answers = mh.measure(*call, measures, mask=mask)
            positions = torch.arange(rows)[None] + keys - rows
            numbers = tuple(range(heads))
            name = f"layers.{layer}.attn"
            records.append(mh.Record(name, step, numbers, rows, keys, positions, measures, answers))
    return mh.Seen(records)


def plausible(length: int, layers: int, heads: int, cells: int = 128, k: int = 8) -> mh.Seen:
    """Answers as they might be for a text too long for a test's patience: some heads look at the
    token before, some at the first keys, some near by, some far."""
    generator = torch.Generator().manual_seed(7)
    cells = min(cells, length)
    place = torch.arange(length)
    edge = (torch.arange(cells) + 0.5) / cells
    ahead = edge[:, None] - edge[None, :]
    causal = ahead >= -0.5 / cells
    records = []
    for layer in range(layers):
        kind = (torch.arange(heads) * 7 + layer * 5) % 11
        width = (kind.float() / 11).square() * 0.6 + 0.004
        sink = ((kind * 3 + layer) % 7 / 8.0)[:, None, None]
        near = torch.exp(-ahead.clamp(min=0) / width[:, None, None])
        noise = torch.rand(heads, cells, cells, generator=generator).pow(3)
        waves = 0.15 * (torch.sin(40 * edge[None, None, :] * (kind[:, None, None] + 1)) > 0.9)
        near = (near * (0.5 + noise) + waves + 0.02 * noise) * causal
        near = near / near.sum(-1, keepdim=True)
        near[:, :, 0] += 1e-6
        maps = near * (1 - sink)
        maps[:, :, 0] += sink[:, :, 0]
        walk = torch.randn(heads, length, generator=generator).cumsum(1) / length**0.5
        jitter = torch.rand(heads, length, generator=generator)
        entropy = (2 + kind[:, None] / 3 + 0.6 * walk + 0.4 * jitter).clamp(min=0)
        entropy = torch.minimum(entropy, torch.log(place + 1.0))
        distance = (width[:, None] * place * (0.4 + jitter)).clamp(max=length)
        reach = (
            jitter[..., None] * (torch.arange(k) * width[:, None, None] * length / 4 + 1)
        ).long()
        keys = place[:, None] - torch.arange(k) - reach
        keys[..., 0] = torch.where((sink[:, 0] > 0.4), 0, keys[..., 0])
        keys = torch.where(keys < 0, -1, keys)
        weights = torch.exp(-torch.arange(k) * (0.3 + jitter[..., None])) * 0.5
        weights = torch.where(keys < 0, 0, weights)
        answers = {
            mh.HeatMap(cells, cells): maps[None],
            mh.Entropy(): entropy[None],
            mh.MeanDistance(): distance[None],
            mh.TopKeys(k): (weights[None], keys[None]),
        }
        name = f"model.layers.{layer}.self_attn"
        numbers = tuple(range(heads))
        questions, found = tuple(answers), tuple(answers.values())
        records.append(mh.Record(name, 0, numbers, length, length, place[None], questions, found))
    return mh.Seen(records)


def words(count: int) -> list[str]:
    """A text of so many tokens, with lines."""
    vocabulary = "the attention of a head is what it reads from every token before it ; so we look"
    parts = vocabulary.split()
    text, value = [], 17
    for index in range(count):
        value = value * 1103515245 + 12345 & 0x7FFFFFFF
        word = parts[(value >> 8) % len(parts)]
        text.append("\n" if index % 97 == 96 else f" {word}")
    return text


#: Tokens that would do harm as markup, turn text around, or cannot be seen.
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "<!--",
    "]]>",
    "&lt;&amp;",
    "\u202eright to left override",
    "שלום",
    "مرحبا",
    "👩‍👩‍👧‍👦",
    "🇵🇹",
    "e\u0301\u0327\u0308" * 3,
    "\x00\x01\x07\x1b[31m",
    "\x7f\x85\u2028\u2029",
    "\ufeff\u200b",
    "\ud83d",  # half of an emoji
    "",
    "\n",
    "\t",
    '"quoted", and, commas',
    "=1+1",
    "${value} $title",
    "a" * 500,
]
