"""`view()`: what was observed as one HTML file that needs no network, no server and no library."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from manyheads.arguments import whole_number
from manyheads.errors import ArgumentError, ArgumentTypeError
from manyheads.inspect.letters import joined
from manyheads.inspect.packing import (
    FIDELITIES,
    Fidelity,
    Packed,
    Reference,
    pack_detail,
    pack_layer,
    sharpness,
    summaries,
)
from manyheads.inspect.records import Seen
from manyheads.inspect.sheets import Sheet, sheet_of

#: The viewer's scripts, in the order in which they are joined into one.
SCRIPTS = (
    "colour.js",
    "data.js",
    "draw.js",
    "text.js",
    "map.js",
    "strips.js",
    "overview.js",
    "head.js",
    "token.js",
    "export.js",
    "main.js",
)
#: What a served page has besides, before the last one: the one part that asks the network.
SERVED = "served.js"
#: Where nobody chose heads, their single tokens may take what is left beside this share for maps.
_MAPS_SHARE = 0.7
#: What is larger than this many budgets before it is deflated is not tried.
_DEFLATE = 5

HeadName = tuple[str | int, int]


@dataclass(frozen=True, slots=True)
class Page:
    """One self-contained HTML page; a notebook shows it where it is the last value of a cell.

    html: all of it.
    """

    html: str

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, and say where it is."""
        target = Path(path)
        target.write_text(self.html, encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        """A frame of its own: the page's scripts and styles do not meet the notebook's."""
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts allow-downloads" '
            'title="manyheads" style="width:100%;height:720px;border:1px solid #8884"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Page({len(self.html) / 1e6:.2f} MB; .save('page.html') writes it)"


def view(
    seen: Seen,
    tokens: Sequence[str],
    *,
    key_tokens: Sequence[str] | None = None,
    batch: int = 0,
    detail: Iterable[HeadName] | None = None,
    compare: tuple[Any, ...] | None = None,
    title: str = "Attention",
    max_megabytes: float = 3.0,
) -> Page:
    """A page to look into what `observe` saw: all heads, one head, one token, over the text.

    Numbers are rounded and maps made coarser until the page fits `max_megabytes`; the page says
    what one of its pixels means and how far its numbers may be off. A short input keeps everything.

    Args:
        seen: what `observe` recorded, with HeatMap, TopKeys and measures of single rows.
        tokens: the text of the keys, one string per token; of the queries, where key_tokens is
            given (cross-attention). Any text is safe: it is shown, never run. What is part of a
            letter is given as `inspect.token_texts` does.
        key_tokens: the keys' own text, where queries and keys are two texts.
        batch: which batch element.
        detail: the heads whose single tokens (TopKeys) are kept, as (layer, head), the layer by
            name or number; None: all where they fit, else as many of the sharpest as do.
        compare: (seen, tokens) or (seen, tokens, key_tokens) of another input to the same model,
            to be seen side by side.
        title: what stands above it all.
        max_megabytes: how large the file may be.

    Raises:
        ArgumentError: tokens do not fit, there is nothing to show, a layer or head is not there,
            or the page cannot be made small enough. ArgumentTypeError: tokens are no strings.

    >>> import torch, manyheads as mh
    >>> model = mh.MultiHeadAttention(8, 2, mask=mh.Causal())
    >>> with mh.observe(model, mh.HeatMap(), mh.TopKeys(3), mh.Entropy()) as seen:
    ...     _ = model(torch.randn(1, 5, 8))
    >>> mh.view(seen, ["a", " page", " of", " five", " tokens"])
    Page(0.1... MB; .save('page.html') writes it)
    """
    sheets = sheets_of(seen, tokens, key_tokens, batch, compare)
    return page_of(sheets, detail=detail, title=title, max_megabytes=max_megabytes)


def sheets_of(
    seen: Seen,
    tokens: Sequence[str],
    key_tokens: Sequence[str] | None,
    batch: int,
    compare: tuple[Any, ...] | None,
) -> list[Sheet]:
    """What a page shows of one input, or of two; arguments and errors as `view` has them."""
    if not isinstance(seen, Seen):
        raise ArgumentTypeError(
            f"seen is no record: got {type(seen).__name__}; expected the Seen of mh.observe(...); "
            "call the model inside `with mh.observe(...) as seen:` and give that"
        )
    sheets = [sheet_of(seen, tokens, key_tokens, batch)]
    if compare is not None:
        sheets.append(_other(sheets[0], compare, batch))
    return sheets


def page_of(
    sheets: list[Sheet],
    *,
    detail: Iterable[HeadName] | None,
    title: str,
    max_megabytes: float,
    served: bool = False,
) -> Page:
    """The page of these; served: one that asks its server for exact numbers."""
    shell = _Shell.read(served)
    budget = int(max_megabytes * 1e6) - shell.size
    if detail is None:
        meta, packed = _automatic(sheets, budget)
    else:
        meta, packed = _asked(sheets, _heads(sheets[0], detail), budget)
    return Page(shell.filled(title, {**meta, "title": title, "edges": packed.edges}, packed.blobs))


def _other(first: Sheet, compare: Any, batch: int) -> Sheet:
    """The second input's sheet; its model must be the first one's."""
    if not isinstance(compare, tuple) or len(compare) not in (2, 3):
        raise ArgumentTypeError(
            f"compare is no pair: got {type(compare).__name__}; expected a tuple (seen, tokens), "
            "or (seen, tokens, key_tokens); give the other input's record and its tokens"
        )
    seen, tokens, *more = compare
    if not isinstance(seen, Seen):
        raise ArgumentTypeError(
            f"compare's record is of the wrong type: got {type(seen).__name__}; expected the Seen "
            "of mh.observe(...); give the other input's"
        )
    other = sheet_of(seen, tokens, more[0] if more else None, batch)
    shapes = [[(layer.name, layer.heads) for layer in sheet.layers] for sheet in (first, other)]
    if shapes[0] != shapes[1]:
        differ = [layer for layer in shapes[1] if layer not in shapes[0]] or shapes[1]
        raise ArgumentError(
            f"compare holds another model's record: got layer {differ[0][0]!r} with heads "
            f"{list(differ[0][1])} among {len(shapes[1])} layers; expected the first record's "
            f"{len(shapes[0])} layers and heads; observe both inputs with the same model, layers= "
            "and heads="
        )
    return other


def _heads(sheet: Sheet, detail: Iterable[HeadName]) -> list[tuple[int, int]]:
    """(layer, place of the head) of each head asked for."""
    names = [layer.name for layer in sheet.layers]
    chosen = []
    for asked in detail:
        if not isinstance(asked, tuple) or len(asked) != 2:
            raise ArgumentTypeError(
                f"detail holds {asked!r}; expected pairs (layer, head), such as (0, 3) or "
                f"({names[0]!r}, 3): write each head so"
            )
        layer, head = asked
        if isinstance(layer, str):
            index = names.index(layer) if layer in names else -1
        else:
            index = whole_number(layer, "a layer of detail")
        if not 0 <= index < len(names):
            raise ArgumentError(
                f"detail names a layer that is not there: got {layer!r}; expected 0 to "
                f"{len(names) - 1}, or one of {', '.join(names[:8])}"
                f"{', ...' if len(names) > 8 else ''}; choose one of these"
            )
        if sheet.layers[index].top is None:
            raise ArgumentError(
                f"{names[index]!r} has no single-token detail: got a record without TopKeys; "
                "expected one with it; ask for it, as in mh.observe(model, mh.TopKeys(8))"
            )
        heads = sheet.layers[index].heads
        if head not in heads:
            raise ArgumentError(
                f"detail names a head that is not there: got {head!r}; expected one of "
                f"{list(heads)}, those of {names[index]!r}; choose one of these"
            )
        chosen.append((index, heads.index(head)))
    return list(dict.fromkeys(chosen))


def _asked(
    sheets: list[Sheet], heads: list[tuple[int, int]], budget: int
) -> tuple[Reference, Packed]:
    """The finest page with these heads' single tokens."""
    packed = Packed()
    for fidelity in _worth_trying(sheets, budget):
        meta, packed = _packed(sheets, fidelity)
        if packed.size <= budget and _with_detail(meta, packed, sheets, heads, fidelity, budget):
            return meta, packed
    raise _too_large(packed, budget, len(heads))


def _automatic(sheets: list[Sheet], budget: int) -> tuple[Reference, Packed]:
    """Everything if it fits; else maps first, then the sharpest heads' single tokens."""
    order = sharpness(sheets[0])
    packed = Packed()
    for fidelity in _worth_trying(sheets, budget):
        meta, packed = _packed(sheets, fidelity)
        last = fidelity is FIDELITIES[-1]
        everything = fidelity is FIDELITIES[0]
        share = 1.0 if everything or last or not order else _MAPS_SHARE
        if packed.size > budget * share:
            continue
        if _with_detail(meta, packed, sheets, order, fidelity, budget) or not everything:
            return meta, packed
    raise _too_large(packed, budget, 0)


def _too_large(packed: Packed, budget: int, heads: int) -> ArgumentError:
    fix = "raise max_megabytes"
    if heads:
        fix += f", or ask for the detail of fewer heads than {heads}"
    return ArgumentError(
        f"the page does not fit: got {packed.size / 1e6:.1f} MB of data at the coarsest; expected "
        f"at most {max(budget, 0) / 1e6:.1f} MB beside the viewer; {fix}, or observe fewer layers"
    )


def _worth_trying(sheets: list[Sheet], budget: int) -> list[Fidelity]:
    def numbers(fidelity: Fidelity) -> int:
        cells, bins = fidelity.cells, fidelity.bins
        return sum(
            len(layer.heads)
            * (
                sum(min(len(m.rows), cells) * min(len(m.columns), cells) for m in layer.maps)
                + sum(min(strip.values.shape[1], bins) for strip in layer.strips)
            )
            for sheet in sheets
            for layer in sheet.layers
        )

    tried = [f for f in FIDELITIES if numbers(f) * f.bits // 8 <= _DEFLATE * max(budget, 1)]
    return tried or [FIDELITIES[-1]]


def _packed(sheets: list[Sheet], fidelity: Fidelity) -> tuple[Reference, Packed]:
    """All but the single tokens."""
    packed = Packed()
    inputs = []
    for sheet in sheets:
        text = [sheet.key_tokens, *([sheet.query_tokens] if sheet.query_tokens else [])]
        letters = [joined(tokens) for tokens in text]
        steps = np.diff(sheet.positions)
        inputs.append(
            {
                # Not ASCII only: what UTF-8 cannot say (half a surrogate pair) stays an escape.
                "texts": [packed.bytes(json.dumps(texts).encode()) for texts, _ in letters],
                "names": [packed.bytes(json.dumps(names).encode()) for _, names in letters],
                "queries": len(sheet.positions),
                "keys": len(sheet.key_tokens),
                "positions": {"start": int(sheet.positions[0])}
                if (steps == 1).all()
                else packed.numbers(sheet.positions - sheet.positions.min(), 32)
                | {"start": int(sheet.positions.min())},
                "layers": [
                    pack_layer(packed, layer, fidelity) | {"means": summaries(layer)}
                    for layer in sheet.layers
                ],
            }
        )
    packed.described = len(json.dumps(inputs))
    return {"inputs": inputs}, packed


def _with_detail(
    meta: Reference,
    packed: Packed,
    sheets: list[Sheet],
    heads: list[tuple[int, int]],
    fidelity: Fidelity,
    budget: int,
) -> bool:
    """Add heads' single tokens while they fit; whether all did."""
    for layer, place in heads:
        kept = len(packed.blobs)
        added = []
        for sheet, entry in zip(sheets, meta["inputs"], strict=True):
            top = sheet.layers[layer].top
            if top is not None:
                detail = pack_detail(packed, top, place, len(sheet.key_tokens), fidelity.bits)
                added.append((entry["layers"][layer]["detail"], detail))
        if packed.size > budget:
            del packed.blobs[kept:]
            return False
        for place_of, detail in added:
            place_of[str(place)] = detail
    return True


@dataclass(frozen=True, slots=True)
class _Shell:
    """The viewer without data: template, style and script.

    served: it may ask its server.
    """

    template: str
    style: str
    script: str
    served: bool

    @classmethod
    def read(cls, served: bool) -> _Shell:
        folder = files("manyheads.inspect") / "viewer"
        names = (*SCRIPTS[:-1], SERVED, SCRIPTS[-1]) if served else SCRIPTS
        parts = [(folder / name).read_text(encoding="utf-8") for name in names]
        script = '(() => {\n"use strict";\n' + "\n".join(parts) + "})();\n"
        return cls(
            (folder / "template.html").read_text(encoding="utf-8"),
            (folder / "viewer.css").read_text(encoding="utf-8"),
            script,
            served,
        )

    @property
    def size(self) -> int:
        """Bytes of a page without data, with room for its title and policy."""
        return sum(len(x.encode()) for x in (self.template, self.style, self.script)) + 2_000

    def filled(self, title: str, meta: Reference, blobs: list[str]) -> str:
        """The page. Nothing of the data can end an element: JSON has no `<`, base64 neither."""
        described = json.dumps(meta, allow_nan=False, separators=(",", ":"))
        lines = (
            f'<script type="text/plain" id="blob-{number}">{blob}</script>'
            for number, blob in enumerate(blobs)
        )
        return Template(self.template).substitute(
            policy=html.escape(self._policy()),
            title=html.escape(title),
            style=self.style,
            data=described.replace("<", "\\u003c"),
            blobs="\n".join(lines),
            script=self.script,
        )

    def _policy(self) -> str:
        """No network but the page's own server, no script or style but the viewer's own."""

        def digest(text: str) -> str:
            return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

        return (
            f"default-src 'none'; script-src {digest(self.script)}'; "
            f"style-src {digest(self.style)}'; img-src data: blob:; base-uri 'none'; "
            "form-action 'none'" + ("; connect-src 'self'" if self.served else "")
        )
