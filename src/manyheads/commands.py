"""What the `manyheads` command can do: generate, heads, see, info, bench, demo."""

from __future__ import annotations

import webbrowser
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from manyheads import benchmark, demo_models
from manyheads.benchmark import AttentionCase, Comparison
from manyheads.environment import info as environment_info
from manyheads.errors import ArgumentError, MissingDependencyError
from manyheads.functional import explain
from manyheads.inspect import (
    Entropy,
    FirstKeysMass,
    HeatMap,
    MeanDistance,
    OffsetMass,
    Seen,
    TopKeys,
    observe,
    report,
    view,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Multi-head attention for PyTorch on the CPU you have.",
)

_DEMO_PROMPT = "What is the capital of Portugal? Answer in one sentence."

#: The attention of SmolLM2-135M: 9 query heads share 3 key/value heads of size 64.
_DEMO_CASES = tuple(
    AttentionCase(f"{length:,} tokens", q_heads=9, kv_heads=3, length=length, head_dim=64)
    for length in (512, 2048, 8192)
)

_BENCH_CASES = (
    *(AttentionCase(f"SmolLM2, {c.name}", 9, 3, c.length, 64) for c in _DEMO_CASES),
    AttentionCase("Llama 3 8B, 2,048 tokens", 32, 8, 2048, 128),
    AttentionCase("16 heads, 4,096 tokens", 16, 16, 4096, 64),
    AttentionCase("16 heads, 4,096 tokens, window 256", 16, 16, 4096, 64, window=256),
    AttentionCase("BERT base, batch of 8, 512 tokens", 12, 12, 512, 64, batch=8, causal=False),
)

#: What `see` asks of every head.
_SEE = (
    *(HeatMap(256, 256), TopKeys(8), Entropy(), MeanDistance()),
    *(FirstKeysMass(1), OffsetMass(-1), OffsetMass(0)),
)

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR_OR_ID",
        help="A folder in Hugging Face format, a .gguf file, or a checkpoint id. "
        f"Default: {demo_models.SMOLLM2.name}, fetched once "
        f"({demo_models.SMOLLM2.megabytes} MB, {demo_models.SMOLLM2.licence}).",
    ),
]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Stop after so many.")]
PairsOption = Annotated[int, typer.Option("--pairs", min=1, help="Timings of each side.")]


class AttentionName(str, Enum):
    """What `--attn` takes."""

    manyheads = "manyheads"
    sdpa = "sdpa"
    eager = "eager"


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    model: ModelOption = None,
    max_new_tokens: TokensOption = 64,
    attn: Annotated[
        AttentionName, typer.Option("--attn", help="Whose attention.")
    ] = AttentionName.manyheads,
) -> None:
    """Answer PROMPT with a language model, greedily, on manyheads attention."""
    loaded = _load(model, attn.value)
    typer.echo(loaded.answer(prompt, max_new_tokens).text)


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
        loaded = _load(model, "manyheads")
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
        Path, typer.Option("--output", "-o", metavar="PAGE", help="Where to write the page.")
    ] = Path("attention.html"),
    open_page: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
) -> None:
    """What a model's heads attend to in a text, as one HTML page."""
    texts = [_text(one) for one in (text, compare) if one is not None]
    loaded = _load(model, "manyheads")
    first, *other = [_read(loaded, one) for one in texts]
    page = view(*first, compare=other[0] if other else None, title=loaded.name)
    try:
        path = page.save(output).resolve()
    except OSError as problem:
        raise ArgumentError(
            f"the page cannot be written: got {str(output)!r} ({problem.strerror}); expected a "
            "file in a folder that is there; give another with --output"
        ) from problem
    typer.echo(f"{path} ({len(page.html) / 1e6:.1f} MB, {len(first[1]):,} tokens)")
    if open_page:
        webbrowser.open(path.as_uri())


@app.command()
def info() -> None:
    """What is installed, which kernels this machine gets, and why."""
    typer.echo(str(environment_info()))


@app.command()
def bench(pairs: PairsOption = 7) -> None:
    """Time float32 attention at the shapes of known models against PyTorch's own."""
    console = Console()
    rows = _time(console, _BENCH_CASES, pairs)
    console.print(_timings("attention, forward, float32", rows))
    console.print(_machine([result for _, result in rows]))


@app.command()
def demo(model: ModelOption = None, pairs: PairsOption = 7) -> None:
    """A real language model on our attention: same tokens as PyTorch's, and how fast."""
    console = Console()
    with console.status("loading the model (fetched and converted the first time)"):
        loaded = _load(model, "manyheads")
    answers = {}
    for turn in ("warming up", "answering"):
        for attn in ("manyheads", "sdpa"):
            with console.status(f"{turn} with {attn}"):
                loaded.model.set_attn_implementation(attn)
                answers[attn] = loaded.answer(_DEMO_PROMPT)
    ours, peer = answers["manyheads"], answers["sdpa"]
    same = ours.tokens == peer.tokens
    rows = _time(console, _DEMO_CASES, pairs)
    verdict = (
        f"[green]equal[/green], all {len(ours.tokens)}"
        if same
        else "[red]different[/red] from those of sdpa"
    )
    story = Table.grid(padding=(0, 2))
    story.add_row("[bold]model[/bold]", f"{loaded.name}, attn_implementation='manyheads'")
    story.add_row("[bold]prompt[/bold]", _DEMO_PROMPT)
    story.add_row("[bold]answer[/bold]", ours.text)
    story.add_row("[bold]tokens[/bold]", f"{verdict} (against PyTorch's sdpa)")
    story.add_row(
        "[bold]generation[/bold]",
        f"{ours.seconds:.2f} s with manyheads, {peer.seconds:.2f} s with sdpa (most of it is the "
        "model's linear layers)",
    )
    console.print(Panel(story, title="manyheads", box=box.ROUNDED))
    console.print(_timings("its attention alone: 9 query / 3 key heads x 64, causal", rows))
    case = _DEMO_CASES[1]
    why = explain(*case.inputs(), mask=case.mask())
    console.print(Panel(str(why), title=f"why: explain() at {case.name}", box=box.ROUNDED))
    console.print(_machine([result for _, result in rows]))
    if not same:
        raise typer.Exit(1)


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


def _read(loaded: demo_models.LoadedModel, text: str) -> tuple[Seen, list[str]]:
    """What the model's heads do while it reads the text, and its tokens."""
    inputs = loaded.tokenizer(text, return_tensors="pt")
    tokens = [loaded.tokenizer.decode([one]) for one in inputs["input_ids"][0].tolist()]
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if limit is not None and len(tokens) > limit:
        raise ArgumentError(
            f"the text is too long for {loaded.name}: got {len(tokens):,} tokens; expected at most "
            f"{limit:,}; shorten it, or give a model that reads more with --model"
        )
    # Without the head that predicts words, which would take more memory than all the rest.
    with torch.no_grad(), observe(loaded.model, *_SEE) as seen:
        loaded.model.base_model(**inputs)
    return seen, tokens


def _load(model: str | None, attn: str) -> demo_models.LoadedModel:
    try:
        from transformers.utils import logging
    except ImportError as missing:
        raise MissingDependencyError(
            f"running a language model needs transformers ({missing}). "
            "Install it with: pip install 'manyheads[huggingface]'"
        ) from missing
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if attn == "manyheads":
        from manyheads.integrations.huggingface import register

        register()
    return demo_models.load(model, attn_implementation=attn)


def _timings(title: str, rows: list[tuple[AttentionCase, Comparison]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("shape")
    for heading in ("manyheads", "sdpa", "speed-up", "spread", "of FMA peak"):
        table.add_column(heading, justify="right")
    for case, result in rows:
        low, high = result.spread
        share = f"{result.share_of_limit(case.flops):.0%}" if result.limits else "not measured"
        table.add_row(
            case.name,
            f"{result.ours_seconds * 1e3:.2f} ms",
            f"{result.peer_seconds * 1e3:.2f} ms",
            f"[bold]{result.speedup:.2f}x[/bold]",
            f"{low:.2f}-{high:.2f}",
            share,
        )
    return table


def _machine(results: list[Comparison]) -> str:
    """One line: threads, the measured peak, and whether others were busy meanwhile."""
    peaks = [peak for result in results for peak in result.limits]
    rate = "FMA peak not measured"
    if peaks:
        rate = f"FMA peak, measured beside each timing: {median(peaks) / 1e9:.0f} GFLOP/s"
    shares = [result.others for result in results if result.others is not None]
    if not shares:
        quiet = "this system does not tell whether others were busy"
    elif max(shares) <= benchmark.QUIET_LIMIT:
        quiet = "the machine was quiet"
    else:
        quiet = (
            f"[yellow]not quiet[/yellow]: others took up to {max(shares):.0%} of a core, "
            "so trust the ratios more than the times"
        )
    return f"{torch.get_num_threads()} threads; {rate}; {quiet}."


def _time(
    console: Console, cases: tuple[AttentionCase, ...], pairs: int
) -> list[tuple[AttentionCase, Comparison]]:
    rows = []
    with console.status("timing") as status:
        for case in cases:
            status.update(f"timing {case.name}, {pairs} pairs in turn")
            rows.append((case, benchmark.against_sdpa(case, pairs)))
    return rows
