"""The table of what was measured, on the screen, in RESULTS.md, and as a plot."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from rows import BF16, FP16, NAMES

import manyheads as mh
from manyheads.benchmark import Comparison, fma_peak, pair_unit

RESULTS = Path(__file__).parent / "RESULTS.md"
PLOT = RESULTS.with_suffix(".svg")


@dataclass
class Line:
    """One row of the table, in words.

    others: the cell of each further peer, by its name.
    bar: PyTorch's time over ours, for the plot: its median, its least and its most.
    goal_ratio: where the plot draws the goal.
    """

    name: str
    ms: str = ""
    ratio: str = ""
    limit: str = ""
    goal: str = ""
    met: bool | None = None
    quiet: str = ""
    others: dict[str, str] = field(default_factory=dict)
    bar: tuple[float, float, float] | None = None
    goal_ratio: float | None = None


@dataclass
class Report:
    """peaks: of multiply-adds, measured beside the timings: by what they are called.

    notes: on the peers, one each.
    """

    lines: list[Line] = field(default_factory=list)
    peaks: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def peers(self) -> list[str]:
        """The further peers that were timed; each has a column."""
        return list(dict.fromkeys(peer for line in self.lines for peer in line.others))

    def header(self) -> list[str]:
        others = [f"{peer} / ours" for peer in self.peers]
        return ["shape", "ms", "PyTorch / ours", *others, "of the limit", "goal", "met", "quiet"]

    def cells(self, line: Line) -> list[str]:
        met = {True: "yes", False: "no", None: ""}[line.met]
        others = [line.others.get(peer, "") for peer in self.peers]
        return [line.name, line.ms, line.ratio, *others, line.limit, line.goal, met, line.quiet]


def ratio_cell(result: Comparison | str) -> str:
    """The median ratio and its range; a star where neighbours disturbed too many of the pairs."""
    if isinstance(result, str):
        return result
    low, high = result.spread
    star = "*" if result.disturbed is None else ""
    return f"{result.speedup:.2f}x ({low:.2f}-{high:.2f}){star}"


def quiet_cell(result: Comparison) -> str:
    if result.disturbed is None:
        return "no"
    left_out = f", {result.disturbed} left out" if result.disturbed else ""
    others = "unknown" if result.others is None else f"{result.others:.2f} cores"
    return ("yes" if result.quiet else f"others {others}") + left_out


def show(report: Report) -> None:
    table = Table(*report.header(), title="attention on the CPU, times over ours")
    for line in report.lines:
        table.add_row(*report.cells(line))
    console = Console(width=140 + 24 * len(report.peers))
    console.print(table)
    for note in report.notes:
        console.print(note)


def write(report: Report, results: Path = RESULTS, plot: Path = PLOT) -> None:
    """RESULTS.md with the table, and the plot beside it."""
    drawn = draw(report.lines, plot)
    picture = f"![PyTorch's time over ours, row by row]({plot.name})" if drawn else NO_PLOT
    body = [
        markdown_row(report.header()),
        markdown_row(["---"] * len(report.header())),
        *(markdown_row(report.cells(line)) for line in report.lines),
    ]
    parts = ["# Measured speed", *about(report), picture, "\n".join(body)]
    results.write_text("\n\n".join(parts) + "\n")


def markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def about(report: Report) -> list[str]:
    """The paragraphs before the table."""
    peaks = ", ".join(
        f"{name} {median(values) / 1e9:.0f} GFLOP/s" for name, values in report.peaks.items()
    )
    pairs = " ".join(
        f"The {NAMES[dtype]} peak is that of {pair_unit(dtype)}, measured likewise."
        if pair_unit(dtype)
        else f"These kernels multiply {NAMES[dtype]} as float32: its limit is the FMA peak."
        for dtype in (BF16, FP16)
    )
    paragraphs = [
        f"Measured by `make bench`: {cpu_name()}, {torch.get_num_threads()} threads, "
        f"{mh.info().isa} kernels, torch {torch.__version__}; {peaks or 'no peak measured'} "
        "(medians of those measured beside each timing). Medians of interleaved pairs, range over "
        "pairs in brackets, a star where neighbours disturbed too many of them; within 3 % of a "
        "goal counts as met.",
        "The limit of decoding is the rate at which all threads read K and V (for a module, its "
        "weights too), of the same size and in the same state of the caches, for which nothing but "
        "reading is done. The peak is taken over one millisecond before and after each of our "
        "samples, at the clock the machine has under such load. On registers alone for 0.3 s, "
        "which draws less power, the float32 loop reached "
        f"{fma_peak(0.3) or float('nan'):.0f} GFLOP/s after this run. {pairs}",
    ]
    if report.notes:
        paragraphs.append("\n".join(f"- {note}" for note in report.notes))
    return paragraphs


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


NO_PLOT = "(No plot: matplotlib is not installed.)"


def draw(lines: list[Line], path: Path) -> bool:
    """The ratios to PyTorch as bars, their range as error bars; False without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return False
    bars = [line for line in lines if line.bar is not None]
    figure = Figure(figsize=(9, 1.2 + 0.24 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for place, line in enumerate(bars):
        assert line.bar is not None
        middle, low, high = line.bar
        axes.barh(
            place,
            middle - 1,
            left=1,
            color="tab:blue" if middle >= 1 else "tab:orange",
            xerr=[[middle - low], [high - middle]],
            error_kw={"capsize": 2, "elinewidth": 0.8},
        )
        if line.goal_ratio is not None:
            mark = [place - 0.4, place + 0.4]
            axes.plot([line.goal_ratio] * 2, mark, color="black", gid=f"goal of {line.name}")
    axes.set_yticks(range(len(bars)), [line.name for line in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("PyTorch's time over ours, right is faster; black: the goal")
    # The same ratios make the same file, and text stays text.
    with rc_context({"svg.hashsalt": "manyheads", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    return True
