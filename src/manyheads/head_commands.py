"""What the `manyheads` command can do about heads: heads, see."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from manyheads import demo_models
from manyheads.commands import ModelOption, app, load_model
from manyheads.errors import ArgumentError
from manyheads.inspect import (
    Entropy,
    FirstKeysMass,
    HeatMap,
    MeanDistance,
    OffsetMass,
    Page,
    Seen,
    Server,
    TopKeys,
    observe,
    report,
    serve,
    token_texts,
    view,
)

__all__ = ["app"]  # with the commands of commands.py and these

#: What `see` asks of every head.
_SEE = (
    *(HeatMap(256, 256), TopKeys(8), Entropy(), MeanDistance()),
    *(FirstKeysMass(1), OffsetMass(-1), OffsetMass(0)),
)


@app.command()
def heads(
    model: ModelOption = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Measure what can be on this text, up to 2,048 tokens of it. "
            "Default: all on random tokens said twice.",
        ),
    ] = None,
) -> None:
    """What a language model's heads do: which look back one token, which copy, which rest."""
    console = Console()
    with console.status("loading the model (fetched and converted the first time)"):
        loaded = load_model(model, "manyheads")
    tokens = None
    if text is not None:
        words = text.read_text(encoding="utf-8", errors="replace")
        tokens = loaded.tokenizer(words, return_tensors="pt").input_ids[:, :2048]
    with console.status("watching its heads"):
        found = report(loaded.model, tokens)
    console.print(
        f"[bold]{loaded.name}[/bold]: what its {len(found.heads)} heads do; scores from 0 to 1"
    )
    console.print(found)


@app.command()
def see(
    text: Annotated[str, typer.Argument(metavar="TEXT_OR_FILE", help="What the model reads.")],
    model: ModelOption = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="TEXT_OR_FILE", help="Another text, side by side."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="PAGE", help="Where to write it. Default: attention.html."
        ),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
    served: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Show the page at 127.0.0.1 instead, every zoom and token exact.",
        ),
    ] = False,
    port: Annotated[
        int, typer.Option("--port", help="Where --serve listens. Default: at a free port.")
    ] = 0,
    keep_megabytes: Annotated[
        int,
        typer.Option("--keep-megabytes", min=1, help="How much --serve may keep in memory."),
    ] = 2000,
) -> None:
    """What a model's heads attend to in a text, as one HTML page."""
    if served and output is not None:
        raise ArgumentError(
            "--serve writes no page: got --output too; expected one of them; leave out the other"
        )
    texts = [_text(one) for one in (text, compare) if one is not None]
    loaded = load_model(model, "manyheads")
    keep = keep_megabytes / len(texts) if served else None
    first, *other = [_read(loaded, one, keep) for one in texts]
    given: dict[str, Any] = {"compare": other[0] if other else None, "title": loaded.name}
    if served:
        _serve(serve(*first, **given, port=port), len(first[1]), open_page)
        return
    path = _saved(view(*first, **given), output or Path("attention.html"), len(first[1]))
    if open_page:
        webbrowser.open(path.as_uri())


def _serve(server: Server, tokens: int, open_page: bool) -> None:
    """Say where it is, and answer until Ctrl-C."""
    kept = f"{server.kept_bytes / 1e6:,.1f} MB of queries and keys"
    typer.echo(f"{server.url} ({tokens:,} tokens, {kept}; Ctrl-C ends it)")
    sys.stdout.flush()  # also into a pipe
    if open_page:
        webbrowser.open(server.url)
    server.serve_forever()


def _saved(page: Page, output: Path, tokens: int) -> Path:
    """Write the page, and say where it is."""
    try:
        path = page.save(output).resolve()
    except OSError as problem:
        raise ArgumentError(
            f"the page cannot be written: got {str(output)!r} ({problem.strerror}); expected a "
            "file in a folder that is there; give another with --output"
        ) from problem
    typer.echo(f"{path} ({len(page.html) / 1e6:.1f} MB, {tokens:,} tokens)")
    return path


def _text(text_or_file: str) -> str:
    """A file's text, if there is such a file; else the words themselves."""
    try:
        path = Path(text_or_file)
        text = path.read_text(encoding="utf-8") if path.is_file() else text_or_file
    except UnicodeDecodeError as problem:
        raise ArgumentError(
            f"{text_or_file!r} is no text: got bytes that are not UTF-8 ({problem.reason}); "
            "expected a text file; convert it to UTF-8"
        ) from problem
    except OSError:  # too long for a file's name, or not ours to read
        text = text_or_file
    if not text.strip():
        raise ArgumentError(
            f"there is nothing to read: got {text_or_file!r}; expected a text or a file with one; "
            "give at least a word"
        )
    return text


def _read(
    loaded: demo_models.LoadedModel, text: str, keep_megabytes: float | None
) -> tuple[Seen, list[str]]:
    """What the model's heads do while it reads the text, and its tokens."""
    inputs = loaded.tokenizer(text, return_tensors="pt")
    tokens = token_texts(loaded.tokenizer, inputs["input_ids"][0])
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if limit is not None and len(tokens) > limit:
        raise ArgumentError(
            f"the text is too long for {loaded.name}: got {len(tokens):,} tokens; expected at most "
            f"{limit:,}; shorten it, or give a model that reads more with --model"
        )
    # Without the head that predicts words, which would take more memory than all the rest.
    with torch.no_grad(), observe(loaded.model, *_SEE, keep_megabytes=keep_megabytes) as seen:
        loaded.model.base_model(**inputs)
    return seen, tokens
