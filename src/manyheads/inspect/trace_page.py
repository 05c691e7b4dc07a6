"""The page of a trace: the four stages of attention on one's own tokens, as one HTML file.

Tables whose cells are coloured by CSS: no script, nothing fetched, numbers that can be selected.
The text and the layout are in templates/trace.html.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from manyheads.arguments import whole_number
from manyheads.errors import ArgumentError, ArgumentTypeError, MissingDependencyError

if TYPE_CHECKING:
    from manyheads.inspect.tracing import Trace

#: Cells of all heads' weights, and names along an axis, that still make a readable page.
_MOST_CELLS, _MOST_TOKENS = 20_000, 100
#: Channels of the output that are added up before the reader's eyes.
_CHANNELS_SHOWN = 6


@dataclass(frozen=True)
class Page:
    """A page: `save` it, or let a notebook show it.

    body: the page without what makes it a whole document. title: of that document.
    """

    body: str
    title: str

    @property
    def html(self) -> str:
        """The whole document."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{html.escape(self.title)}</title></head><body>\n{self.body}\n</body></html>\n"
        )

    def save(self, path: str | Path) -> Path:
        """Write the document, as UTF-8; returns where it is."""
        target = Path(path)
        target.write_text(self.html, encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        return self.body


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map: percent of the strongest colour, and the number as text."""

    percent: int
    negative: bool
    text: str


def page(
    trace: Trace,
    tokens: Sequence[str] | None,
    key_tokens: Sequence[str] | None,
    head: int,
    query: int,
    batch: int,
) -> Page:
    """See `Trace.page`."""
    batches, heads, q_len, k_len = trace["weights"].shape
    _check_index("batch", batch, batches)
    _check_index("head", head, heads)
    _check_index("query", query, q_len)
    most = max(q_len, k_len)
    if heads * q_len * k_len > _MOST_CELLS or most > _MOST_TOKENS or not k_len:
        raise ArgumentError(
            f"a page of {heads} heads, {q_len} queries and {k_len} keys is not readable; expected "
            f"at most {_MOST_CELLS:,} cells in all and 1 to {_MOST_TOKENS} tokens either way: "
            "trace a shorter text, or look at `trace.steps`."
        )
    if key_tokens is None and tokens is not None and q_len == k_len:
        key_tokens = tokens
    queries = _names(tokens, q_len, "tokens")
    keys = _names(key_tokens, k_len, "key_tokens")
    shown = _Shown(trace, head % heads, query % q_len, batch % batches, queries, keys)
    body = _template().render(**shown.contents())
    return Page(body, "Attention, step by step")


def notebook(trace: Trace) -> str:
    """The page, or the list of steps where there can be none."""
    try:
        return page(trace, None, None, 0, -1, 0).body
    except (ArgumentError, MissingDependencyError):
        return f"<pre>{html.escape(repr(trace))}</pre>"


@dataclass(frozen=True)
class _Shown:
    """What the template is given, of one batch element, head and query."""

    trace: Trace
    head: int
    query: int
    batch: int
    queries: list[str]
    keys: list[str]

    def contents(self) -> dict[str, Any]:
        """The template's variables."""
        weights = self._of("weights")
        key = int(weights[self.head, self.query].argmax())
        return {
            "queries": self.queries,
            "keys": self.keys,
            "head": self.head,
            "query": self.query,
            "key": key,
            "head_names": [f"head {index}" for index in range(len(weights))],
            "steps": self.trace.steps,
            "scale": _number(self.trace.scale),
            "projections": self._projections(),
            "scores": self._scores(key),
            "weights": [_heat(rows, 1.0) for rows in weights],
            "softmax": self._softmax(key),
            "read": self._read(),
            "values": _heat(self._of("heads")[self.head]),
            "combined": self._combined() if "contributions" in self.trace.steps else None,
        }

    def _of(self, name: str) -> Tensor:
        return self.trace[name].detach()[self.batch].double()

    def _projections(self) -> list[dict[str, Any]]:
        """Each projected tensor of the shown head, tokens by channels."""
        found = []
        for step in self.trace.steps.values():
            if step.stage == "project":
                vectors = self._of(step.name)
                group = len(self._of("weights")) // len(vectors) if "kv_head" in step.axes else 1
                names = self.queries if "query" in step.axes else self.keys
                rows = vectors[self.head // group]
                # Only the new keys are projected where others come out of a cache.
                found.append({"step": step, "rows": _heat(rows), "names": names[-len(rows) :]})
        return found

    def _scores(self, key: int) -> list[dict[str, Any]]:
        """Each kind of score of the shown head, and its number for the pair worked out."""
        found = []
        for step in self.trace.steps.values():
            if step.stage == "score":
                rows = self._of(step.name)[self.head]
                number = _number(rows[self.query, key])
                found.append({"step": step, "rows": _heat(rows), "number": number})
        return found

    def _softmax(self, key: int) -> dict[str, str]:
        """The numbers of one share: exp(score - largest) / their sum."""
        last = [step.name for step in self.trace.steps.values() if step.stage == "score"][-1]
        scores = self._of(last)[self.head, self.query]
        if scores[key] == -float("inf"):  # the row may look at nothing
            return {}
        largest = scores.max()
        share = self._of("weights")[self.head, self.query, key]
        exponential = (scores[key] - largest).exp()
        numbers = {"score": scores[key], "largest": largest, "exponential": exponential}
        numbers |= {"total": exponential / share, "share": share}
        return {name: _number(number) for name, number in numbers.items()}

    def _read(self) -> list[dict[str, str]]:
        """The keys that the shown query reads most, heaviest first."""
        weights, keys = self._of("weights")[self.head, self.query].topk(min(3, len(self.keys)))
        return [
            {"name": self.keys[key], "share": _number(weight)}
            for weight, key in zip(weights, keys.tolist(), strict=True)
            if weight > 0
        ]

    def _combined(self) -> dict[str, Any]:
        """How large each head's contribution is, and one token's first channels added up."""
        contributions = self._of("contributions")
        rows = [
            (f"head {head}", part[self.query, :_CHANNELS_SHOWN])
            for head, part in enumerate(contributions)
        ]
        if "output_bias" in self.trace.steps:
            bias = self.trace["output_bias"].detach().double()
            rows.append(("bias", bias[:_CHANNELS_SHOWN]))
        total = self._of("output")[self.query, :_CHANNELS_SHOWN]
        return {
            "sizes": _heat(contributions.norm(dim=-1).T),
            "terms": [(name, [_number(number) for number in numbers]) for name, numbers in rows],
            "total": [_number(number) for number in total],
            "channels": contributions.shape[-1],
        }


def _heat(values: Tensor, largest: float | None = None) -> list[list[Cell]]:
    """Rows of cells, coloured relative to `largest` or to the largest finite entry."""
    finite = values[values.isfinite()].abs()
    top = largest or (float(finite.max()) if len(finite) else 0.0) or 1.0

    def cell(number: float) -> Cell:
        share = abs(number) / top
        percent = round(100 * min(share, 1.0)) if share < float("inf") else 0
        return Cell(percent, number < 0, _number(number, digits=2))

    return [[cell(number) for number in row] for row in values.tolist()]


def _number(value: float | Tensor, digits: int = 3) -> str:
    """A number for people: "0.375", "−1.2", "−∞"."""
    number = float(value)
    if number in (float("inf"), -float("inf")):
        return "∞" if number > 0 else "−∞"
    size = abs(number)
    written = f"{number:.{digits}f}" if size < 1000 else f"{number:.3g}"
    if digits > 2 and 0 < size < 10.0**-digits:
        written = f"{number:.0e}"
    return written.replace("-", "" if float(written) == 0 else "−")


def _names(tokens: Iterable[str] | None, count: int, what: str) -> list[str]:
    if tokens is None:
        return [str(index) for index in range(count)]
    names = list(tokens)
    if isinstance(tokens, str) or not all(isinstance(name, str) for name in names):
        raise ArgumentTypeError(
            f"{what} is a {type(tokens).__name__} of other things than words; expected a list of "
            "strings, one per token: text.split(), or tokenizer.convert_ids_to_tokens(ids)."
        )
    if len(names) != count:
        raise ArgumentError(
            f"{what} has {len(names)} entries; expected {count}, one for each row of the trace: "
            "give the tokens that the traced input was made of."
        )
    return [visible(name) for name in names]


def visible(token: str) -> str:
    r"""The token with what cannot be seen, or would change how its neighbours look, spelled out.

    >>> visible("a\n\u202eb")
    'a␊⟨202E⟩b'
    """

    def shown(char: str) -> str:
        if char < " ":
            return chr(0x2400 + ord(char))
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            return f"⟨{ord(char):04X}⟩"
        return char

    return "".join(map(shown, token))


def _check_index(name: str, index: int, count: int) -> None:
    if not -count <= whole_number(index, name) < count:
        raise ArgumentError(
            f"{name} {index} is not in this trace; expected 0 to {count - 1}"
            f"{' (or from the end, -1)' if count else ': it has none'}."
        )


@cache
def _template() -> Any:
    try:
        import jinja2
    except ImportError as missing:
        raise MissingDependencyError(
            f"the page of a trace needs jinja2 ({missing}). "
            "Install it with: pip install 'manyheads[view]'"
        ) from missing
    source = files("manyheads.inspect") / "templates" / "trace.html"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source.read_text(encoding="utf-8"))
