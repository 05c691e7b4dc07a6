"""`report()`: what the heads of a model do, told from numbers.

The numbers are means of measures over the queries of a text, and of random tokens said twice: only
there is it known where a token stood before and what followed it, with no other reason to look.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.arguments import check_sizes, whole_number
from manyheads.errors import ArgumentError, ArgumentTypeError
from manyheads.inspect.layers import Layers
from manyheads.inspect.measures import Entropy, FirstKeysMass, Measure, OffsetMass
from manyheads.inspect.observe import observe
from manyheads.inspect.records import Record

#: Queries with fewer keys before them do not count: few keys make any head look sure of itself.
_KEYS_BEFORE = 8
#: "Local" is up to so many tokens away.
_NEAR = 4


@dataclass(frozen=True)
class Behaviour:
    """Something that a head may be seen to do: its score is at least `threshold`."""

    name: str
    threshold: float
    meaning: str


#: Scores are shares from 0 to 1, means over queries. The thresholds are customary or round numbers:
#: behaviours are a matter of degree, and the scores say of which.
BEHAVIOURS = (
    Behaviour("previous token", 0.4, "weight on the token before"),
    Behaviour("next token", 0.4, "weight on the token after"),
    Behaviour("duplicate token", 0.4, "weight on the same token where it stood before"),
    Behaviour("induction", 0.4, "weight on what followed the same token before"),
    Behaviour("first token", 0.5, "weight on the very first token: an attention sink"),
    Behaviour("local", 0.5, f"weight up to {_NEAR} tokens away, on itself too"),
    Behaviour("broad", 0.5, "how evenly all keys are weighted: exp(entropy) / number of keys"),
)

_ON_TEXT: tuple[Measure, ...] = (
    *(OffsetMass(offset) for offset in range(-_NEAR, _NEAR + 1)),
    FirstKeysMass(1),
    Entropy(),
)


@dataclass(frozen=True)
class HeadScores:
    """A head's score for each behaviour, by name."""

    layer: str
    head: int
    scores: Mapping[str, float]

    @property
    def labels(self) -> tuple[str, ...]:
        """The behaviours whose threshold the head reaches."""
        return tuple(one.name for one in BEHAVIOURS if self.scores[one.name] >= one.threshold)


@dataclass(frozen=True)
class Report:
    """What each head of a model does; printing it lists the foremost for each behaviour.

    `report["induction"]` are the heads with that label, the highest score first.
    """

    heads: tuple[HeadScores, ...]

    def __getitem__(self, behaviour: str) -> tuple[HeadScores, ...]:
        names = [one.name for one in BEHAVIOURS]
        if behaviour not in names:
            raise ArgumentError(
                f"there is no behaviour {behaviour!r}; expected one of {', '.join(names)}."
            )
        found = [head for head in self.heads if behaviour in head.labels]
        return tuple(sorted(found, key=lambda head: -head.scores[behaviour]))

    def rows(self, most: int = 5) -> list[tuple[str, str, str, str]]:
        """(behaviour, layer, head, score) of up to `most` heads each, or "none"."""
        rows = []
        for behaviour in BEHAVIOURS:
            found = self[behaviour.name]
            title = f"{behaviour.name} ({len(found)})"
            for head in found[:most]:
                score = f"{head.scores[behaviour.name]:.2f}"
                rows.append((title, head.layer, str(head.head), score))
                title = ""
            if not found:
                rows.append((title, "none", "", ""))
        return rows

    def __str__(self) -> str:
        rows = [("behaviour (heads)", "layer", "head", "score"), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("behaviour (heads)", "layer"):
            table.add_column(heading, overflow="fold")
        for heading in ("head", "score"):
            table.add_column(heading, justify="right")
        for row in self.rows():
            table.add_row(*row)
        return table

    def _repr_html_(self) -> str:
        def cells(row: tuple[str, ...], kind: str) -> str:
            return "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)

        body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in self.rows())
        head = cells(("behaviour (heads)", "layer", "head", "score"), "th")
        return f"<table><tr>{head}</tr>{body}</table>"


@torch.no_grad()
def report(
    model: nn.Module,
    tokens: Tensor | None = None,
    *,
    vocabulary: int | None = None,
    prefix: Iterable[int] | None = None,
    period: int | None = None,
    texts: int = 4,
    seed: int = 0,
    layers: Layers | None = None,
    run: Callable[[Tensor], object] | None = None,
) -> Report:
    """Label the heads of a model by what they do, with the numbers behind it.

    The model is run on `texts` rows of `period` random tokens, all different, said twice. The heads
    that look at where a token stood before (duplicate token) or at what followed it there
    (induction: Olsson et al., 2022) show themselves in the second half. The other behaviours
    (`BEHAVIOURS` lists all, with their thresholds) are measured on `tokens`, or else on the
    same random ones. Queries with fewer than 8 keys before them do not count. "Broad" is relative
    to all keys up to the query's, or to all there are if the layer looks ahead.

    Self-attention only: layers whose queries are not as many as their keys are left out. Put the
    model in eval mode first.

    Args:
        model: what `observe` takes: with `MultiHeadAttention` in it, or of transformers.
        tokens: int [B, L] of a real text, without padding.
        vocabulary: random tokens are less than this. None: the model's config.vocab_size.
        prefix: tokens that every text of random ones begins with. None: the config's
            bos_token_id, if it has one.
        period: how many random tokens before they repeat. None: 64, or the whole vocabulary.
        texts: how many such texts.
        seed: of the random tokens.
        layers: as for `observe`.
        run: called with tokens [B, L]; None: the model itself.

    Raises:
        ArgumentError: no vocabulary known, or one smaller than period; texts too short; no layer of
            self-attention.
        ArgumentTypeError: tokens that are no int tensor [B, L].
    """
    check_sizes({"vocabulary": vocabulary, "period": period, "texts": texts})
    first, period, repeated = _repeated_tokens(model, vocabulary, prefix, period, texts, seed)
    if tokens is not None:
        _check_tokens(tokens)
    elif period < _KEYS_BEFORE:
        raise ArgumentError(
            f"period is {period}; expected at least {_KEYS_BEFORE} where no tokens are given: "
            f"queries with fewer than {_KEYS_BEFORE} keys before them do not count."
        )
    run = model if run is None else run
    on_repeats: tuple[Measure, ...] = (OffsetMass(-period), OffsetMass(1 - period))
    if tokens is None:
        on_repeats += _ON_TEXT
    with observe(model, *on_repeats, layers=layers) as seen:
        run(repeated)
    scores = _by_head(seen, lambda record: repeat_scores(record, first, period))
    if tokens is not None:
        with observe(model, *_ON_TEXT, layers=layers) as seen:
            run(tokens)
    on_text = _by_head(seen, text_scores)
    heads = [
        HeadScores(*key, {one.name: (found | on_text[key])[one.name] for one in BEHAVIOURS})
        for key, found in scores.items()
        if key in on_text
    ]
    if not heads:
        raise ArgumentError(
            "report() saw no self-attention: in no layer that ran were there as many queries as "
            "keys; expected a run on whole texts, without a cache of earlier tokens."
        )
    return Report(tuple(heads))


def text_scores(record: Record) -> dict[str, Tensor]:
    """[Hq] scores of the behaviours that any text shows."""
    position, length = record.positions, record.key_length
    counts = position >= _KEYS_BEFORE
    ahead = record[OffsetMass(1)]
    # Masked weights are exactly 0, and others are not.
    keys = torch.full_like(position, length) if bool(ahead.any()) else position + 1
    near = sum(record[OffsetMass(offset)] for offset in range(-_NEAR, _NEAR + 1))
    return {
        "previous token": _mean(record[OffsetMass(-1)], counts),
        "next token": _mean(ahead, counts & (position + 1 < length)),
        "first token": _mean(record[FirstKeysMass(1)], counts),
        "local": _mean(near, counts),
        "broad": _mean(record[Entropy()].exp() / keys[:, None], counts),
    }


def repeat_scores(record: Record, start: int, period: int) -> dict[str, Tensor]:
    """[Hq] scores of the behaviours that repeated tokens show.

    The tokens from `start` on repeat after `period`: one at p stood at p - period before, and what
    followed it stands at p - period + 1.
    """
    second = record.positions >= start + period
    return {
        "duplicate token": _mean(record[OffsetMass(-period)], second),
        "induction": _mean(record[OffsetMass(1 - period)], second),
    }


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """[Hq]: the mean of [B, Hq, Lq] over the rows [B|1, Lq] that count."""
    rows = counts[:, None].expand_as(values)
    return (values * rows).sum((0, 2)) / rows.sum((0, 2)).clamp(min=1)


def _by_head(
    seen: Iterable[Record], scores_of: Callable[[Record], dict[str, Tensor]]
) -> dict[tuple[str, int], dict[str, float]]:
    """Scores of every head of the self-attention layers; of a layer that ran twice, the last."""
    found = {}
    for record in seen:
        if record.query_length == record.key_length:
            scores = scores_of(record)
            for index, head in enumerate(record.heads):
                own = {name: float(values[index]) for name, values in scores.items()}
                found[record.layer, head] = own
    return found


def _repeated_tokens(
    model: nn.Module,
    vocabulary: int | None,
    prefix: Iterable[int] | None,
    period: int | None,
    texts: int,
    seed: int,
) -> tuple[int, int, Tensor]:
    """(where the repeating begins, after how many tokens it does, int64 [texts, L])."""
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None) if vocabulary is None else vocabulary
    if not isinstance(vocabulary, int):
        raise ArgumentError(
            f"report() got no vocabulary, and the {type(model).__name__} has no config.vocab_size; "
            "expected one of them: random tokens are drawn from it."
        )
    if prefix is None:
        begin = getattr(config, "bos_token_id", None)
        prefix = [begin] if isinstance(begin, int) else []
    first = torch.tensor([whole_number(token, "a token of prefix") for token in prefix]).long()
    generator = torch.Generator().manual_seed(seed)
    others = torch.arange(vocabulary)
    others = others[~torch.isin(others, first)]
    period = min(64, len(others)) if period is None else period
    if period > len(others):
        raise ArgumentError(
            f"period is {period}; expected at most {len(others)}, the tokens of the vocabulary "
            f"({vocabulary}) that are not in prefix: those that repeat are all different."
        )
    rows = []
    for _ in range(texts):
        chosen = others[torch.randperm(len(others), generator=generator)[:period]]
        rows.append(torch.cat([first, chosen, chosen]))
    weight = next(model.parameters(), None)
    return len(first), period, torch.stack(rows).to(None if weight is None else weight.device)


def _check_tokens(tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dim() != 2:
        shown = (
            f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else "no tensor"
        )
        raise ArgumentTypeError(
            f"tokens is {shown}; expected an int tensor [B, L]: what the model's tokenizer makes "
            'of a text, as in tokenizer(text, return_tensors="pt").input_ids.'
        )
    if tokens.shape[1] <= _KEYS_BEFORE:
        raise ArgumentError(
            f"tokens are texts of {tokens.shape[1]}; expected more than {_KEYS_BEFORE} tokens: "
            f"queries with fewer than {_KEYS_BEFORE} keys before them do not count."
        )
