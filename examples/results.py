"""Measure all examples, and write what was found to examples/RESULTS.md.

    python examples/results.py                   # everything: some 40 minutes on 2 cores
    python examples/results.py images speech     # some; what the page says of the others stays
    python examples/results.py generation-chat   # one part of one

Each part is written down as soon as it is done (RESULTS.json), and the page is made of all that is
written down: a part that fails or is stopped costs only itself. Trainings start anew each time, in
folders of their own under build/examples, so that a time is the time of a whole training.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from textwrap import indent
from typing import Annotated

import torch
import typer
from checkpoints import write
from results_parts import PARTS, USES, Found, Part
from results_words import duration, table

PAGE = Path(__file__).with_name("RESULTS.md")
RUNS = Path("build/examples/measured")
HEAD = """\
# The examples, measured

Written by `make examples`, or by `make example-images` and the like for one section. Times are of
everything: reading the data, training, measuring, comparing. CPU time is that of all threads."""


def machine() -> str:
    """What everything was run on, in words."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{name}, {cores} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def run(part: Part) -> Found:
    """The record of one part: what was found or what went wrong, and the time it took."""
    folder = RUNS / part.name
    shutil.rmtree(folder, ignore_errors=True)
    record: Found = {"machine": machine(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        record["found"] = part.measure(folder)
        part.describe(record["found"])  # what cannot be described must not spoil the page
    except Exception as problem:
        traceback.print_exc()
        record.pop("found", None)
        record["error"] = f"{type(problem).__name__}: {problem}"
    record["seconds"] = time.perf_counter() - wall
    record["cpu_seconds"] = time.process_time() - cpu
    return record


def run_apart(part: Part) -> Found:
    """`run` in a process of its own: what one part leaves in memory slows the next one down."""
    start = time.perf_counter()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(run_named, part.name).result()
        except BrokenProcessPool as problem:  # killed, as for want of memory
            seconds = time.perf_counter() - start
            error = f"{type(problem).__name__}: {problem}"
            return {
                "machine": machine(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
                "error": error, "seconds": seconds, "cpu_seconds": 0.0,
            }  # fmt: skip


def run_named(name: str) -> Found:
    """`run`, for another process, which a part cannot be sent to."""
    return run({part.name: part for part in PARTS}[name])


def page_of(records: Mapping[str, Found]) -> str:
    """The page: times first, then a section for each use."""
    done = [(part, records[part.name]) for part in PARTS if part.name in records]
    machines = list(dict.fromkeys(record["machine"] for _, record in done))
    rows = [
        (part.name, duration(record["seconds"]), duration(record["cpu_seconds"]), record["date"])
        for part, record in done
    ]
    total = [
        duration(sum(record[what] for _, record in done)) for what in ("seconds", "cpu_seconds")
    ]
    blocks = [
        HEAD,
        "Machine: " + "; ".join(machines) + ".",
        table(["part", "time", "CPU time", "measured"], [*rows, ("in all", *total, "")]),
    ]
    for use, (heading, link) in USES.items():
        blocks.append(f"## {heading}\n\n[What it is, and how to use it](../docs/examples/{link})")
        for part in PARTS:
            if part.use == use:
                blocks += [f"### {part.title}", told(part, records.get(part.name), len(machines))]
    return "\n\n".join(blocks) + "\n"


def told(part: Part, record: Found | None, machines: int) -> str:
    """A part's findings, or why there are none."""
    if record is None:
        return f"Not measured yet: `make example-{part.use}`."
    if "error" in record:
        return f"**Failed** after {duration(record['seconds'])}:\n\n" + indent(
            record["error"], " " * 4
        )
    where = f"\n\n(On {record['machine']}.)" if machines > 1 else ""
    return part.describe(record["found"]) + where


def measure(
    parts: Sequence[Part], page: Path = PAGE, run: Callable[[Part], Found] = run_apart
) -> list[str]:
    """Run the parts and keep `page` up to date; the names of those that failed."""
    kept, failed = page.with_suffix(".json"), []
    for place, part in enumerate(parts, 1):
        print(f"{place} of {len(parts)}: {part.name}", flush=True)
        record = run(part)
        if "error" in record:
            failed.append(part.name)
        records = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
        records[part.name] = record
        records = {one.name: records[one.name] for one in PARTS if one.name in records}
        write(kept, (json.dumps(records, indent=1, ensure_ascii=False) + "\n").encode())
        write(page, page_of(records).encode())
        print(f"  {record.get('error', 'done')}, {record['seconds']:.0f} s", flush=True)
    return failed


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Uses or parts; none: all.")] = None,
) -> None:
    """Measure the examples."""
    known = dict.fromkeys(name for part in PARTS for name in (part.use, part.name))
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise typer.BadParameter(f"got {', '.join(unknown)}; expected some of {', '.join(known)}.")
    failed = measure([part for part in PARTS if not names or {part.use, part.name} & set(names)])
    print(f"See {PAGE}.")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    typer.run(main)
