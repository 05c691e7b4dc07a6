"""What the `manyheads` command can do: generate, info, bench, demo; more in head_commands.py."""

from __future__ import annotations

from enum import Enum
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
from manyheads.errors import MissingDependencyError
from manyheads.functional import explain

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
    loaded = load_model(model, attn.value)
    typer.echo(loaded.answer(prompt, max_new_tokens).text)


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
        loaded = load_model(model, "manyheads")
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


def load_model(model: str | None, attn: str) -> demo_models.LoadedModel:
    """The model that `--model` names, on this attention."""
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
