"""Our attention against PyTorch's and others', on the shapes that the goals are stated for.

    python benchmarks/attention.py [--only NAME] [--pairs N] [--patience SECONDS] [--write]

Every row is checked for agreement, then timed pair by pair in one process; the machine's limit is
measured beside each of our samples: its multiply-add peak, or for decoding its rate of reading.
FlexAttention, and what `make bench-peers` installs, follow each in pairs of their own with ours.
`--write` puts the table and a plot of it into benchmarks/RESULTS.md and RESULTS.svg.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import flex
from modules import module_tasks
from observing import observing_tasks
from own import Own, extra_memory, own_rows
from peers import Peers
from report import Line, Report, quiet_cell, ratio_cell, show, write
from rows import ROWS
from tasks import Task, attention_task

from manyheads.benchmark import Comparison

#: What FlexAttention's compiler makes is kept here for the next run.
COMPILED = Path(__file__).parent.parent / "build" / "flex"

MEMORY_ROW, MEMORY_GOAL_MB = "memory beyond inputs and output, 8x32768x64", 64


def task_line(task: Task, pairs: int, patience: float) -> tuple[Line, Comparison]:
    result = task.time(pairs, patience)
    share = result.share_of_limit(task.work)
    return Line(
        task.name,
        ms=f"{result.ours_seconds * 1e3:.2f}",
        ratio=ratio_cell(result),
        limit=f"{share:.1%} of {task.limit_name}",
        goal=task.goal.text(task.limit_name),
        met=task.goal.met(result.speedup, share),
        quiet=quiet_cell(result),
        bar=(result.speedup, *result.spread),
        goal_ratio=task.goal.ratio,
    ), result


def own_line(row: Own, pairs: int, patience: float) -> Line:
    result = row.time(pairs, patience)
    reached = row.reached(result)
    return Line(
        row.name,
        ms=f"{result.ours_seconds * 1e3:.3f}",
        ratio=f"{reached:.3g} {row.unit}",
        goal=f"<= {row.goal:g} {row.unit}",
        met=row.met(reached),
        quiet=quiet_cell(result),
    )


def memory_line() -> Line:
    extra = extra_memory(32768)
    return Line(MEMORY_ROW, ratio=f"{extra:.1f} MB", goal=f"< {MEMORY_GOAL_MB} MB",
                met=extra < MEMORY_GOAL_MB)  # fmt: skip


def measure(pairs: int, only: str, patience: float) -> Report:
    # First, while the process is small: its peak memory only ever grows.
    memory = [memory_line()] if not only else []
    report = Report()

    def add(task: Task) -> Line:
        line, result = task_line(task, pairs, patience)
        report.lines.append(line)
        if task.limit_name != "read rate":
            report.peaks.setdefault(task.limit_name, []).extend(result.limits)
        return line

    with Peers() as peers:
        for row in (row for row in ROWS if only in row.name):
            line = add(attention_task(row))
            line.others[flex.NAME] = ratio_cell(flex.time_row(row, patience / 2))
            for peer, result in peers.time_row(row, patience / 2).items():
                line.others[peer] = ratio_cell(result)
        report.notes = peers.notes()
    for task in (*module_tasks(only), *observing_tasks(only)):
        add(task)
    report.lines += [own_line(row, pairs, patience) for row in own_rows(only)]
    report.lines += memory
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--patience",
        type=float,
        default=4.0,
        help="seconds to go on, per row, for pairs that no neighbour disturbs; half for peers",
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.*")
    arguments = parser.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILED))
    report = measure(arguments.pairs, arguments.only, arguments.patience)
    show(report)
    if arguments.write:
        write(report)


if __name__ == "__main__":
    main()
