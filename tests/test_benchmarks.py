"""benchmarks/: what is counted, what is compared with what, what is left out, what is written."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import attention as command
import flex
import modules
import own
import peers
import pytest
import report
import tasks
import torch
from report import Line, Report
from rows import BF16, FP16, FP32, ROWS, Goal, Row
from torch import nn

import manyheads as mh
from manyheads import benchmark
from manyheads.benchmark import Comparison, DisagreementError, compare

WORKERS = Path(peers.__file__).parent


def small(row: Row) -> Row:
    """The same call on few numbers: two documents of 17, a window of 5, groups as they are."""
    group = row.heads[0] // row.heads[1]
    return replace(
        row,
        heads=(3 * group, 3),
        length=34,
        size=7,
        batch=2,
        window=None if row.window is None else 5,
        documents=None if row.documents is None else 17,
    )


# --- rows ----------------------------------------------------------------------------------------


def test_every_row_has_a_name_of_its_own():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) > 30


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_both_sides_of_a_row_compute_the_same(row):
    task = tasks.attention_task(small(row))
    ours, peer = task.ours(), task.peer()
    task.check(ours, peer)
    assert len(ours) == len(peer) == (1 if not row.gradients else 4 if row.learned_bias else 3)
    if not row.dropout:
        with pytest.raises(DisagreementError):
            task.check([x + 1 for x in ours], peer)


def test_work_counts_useful_operations():
    full = Row("", (6, 3), 11, 5, Goal(), batch=2)
    one_pair = 2 * 2 * 2 * 6 * 5  # multiply and add, two products, batch, heads, size
    assert full.work() == one_pair * 121
    assert replace(full, causal=True).work() == one_pair * (121 // 2)
    assert replace(full, window=3).work() == one_pair * (1 + 2 + 9 * 3)
    assert replace(full, length=12, documents=4).work() == one_pair * 3 * 16
    assert replace(full, gradients=True).work() == one_pair * 121 * 7 // 2


@pytest.mark.parametrize(("dtype", "size"), [(FP32, 4), (BF16, 2), (FP16, 2)])
def test_work_of_decoding_is_the_bytes_of_keys_and_values(dtype, size):
    row = Row("", (6, 3), 11, 5, Goal(), batch=2, queries=1, dtype=dtype)
    _, key, value = row.inputs()
    assert row.work() == size * (key.numel() + value.numel())


def test_goals():
    assert Goal().met(9.0, 0.9) is None and Goal().text("peak") == ""
    assert Goal(ratio=2.0).met(1.95, 0.0) and not Goal(ratio=2.0).met(1.93, 1.0)
    assert Goal(share=0.5).met(0.0, 0.486) and not Goal(share=0.5).met(9.0, 0.48)
    either = Goal(ratio=2.0, share=0.5)
    assert either.met(2.0, 0.1) and either.met(1.0, 0.5) and not either.met(1.9, 0.4)
    assert either.text("peak") == "2x or 50% of peak"


# --- other sides ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", [row for row in ROWS if not row.gradients and not row.reads], ids=lambda row: row.name
)
def test_flex_attention_is_given_the_same_mask(row):
    row = small(row)
    function = flex.mask_function(row)
    position = torch.arange(row.length)
    if function is None:
        assert row.mask is None
    else:
        allowed = function(0, 0, position[:, None], position)
        assert torch.equal(allowed, row.mask.materialize(row.length, row.length)[0, 0])


def test_flex_attention_says_why_it_is_not_timed():
    said = {row.name: flex.why_not(row) for row in ROWS}
    assert said["train 16x2048x64 causal"] == "no backward"
    assert said["8x32768x64 causal"] == "takes minutes"
    assert said["16x4096x64 full"] is None


def test_torch_module_is_timed_on_its_fast_path_only():
    module = nn.MultiheadAttention(22, 2, batch_first=True).eval()
    x = torch.randn(3, 5, 22)

    def call():
        return module(x, x, x, need_weights=False)

    modules.check_fast_path(torch.no_grad()(call))
    with pytest.raises(modules.SlowPathError, match=r"_native_multi_head_attention, but aten::"):
        modules.check_fast_path(call)


def test_both_sides_of_every_module_compute_the_same(monkeypatch):
    for name, number in (("EMBED", 22), ("HEADS", 2), ("BATCH", 3), ("LENGTH", 5), ("CACHED", 7)):
        monkeypatch.setattr(modules, name, number)
    made = list(modules.module_tasks("module"))
    assert len(made) == 5
    for task in made:
        for _ in range(2):  # a decoding step leaves the cache as it was
            task.check(task.ours(), task.peer())
        assert task.work > 0 and task.limit() > 0
    training = made[2]
    wrong = list(training.peer())
    wrong[1] = wrong[1].roll(1, 0)
    with pytest.raises(DisagreementError):
        training.check(training.ours(), wrong)


def test_overhead_is_taken_against_the_operator_with_the_same_arguments():
    in_all, over = own.overhead()
    result = in_all.time(1, 0.0)  # compares the two results first
    assert in_all.reached(result) == pytest.approx(1e6 * result.ours_seconds)
    two = Comparison((5e-6, 9e-6, 9e-6), (3e-6, 4e-6, 2e-6), 0.0)
    assert over.reached(two) == pytest.approx(5.0)
    assert over.met(15.4) and not over.met(15.5)


# --- the machine's limit -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_limit_of_a_half_type_is_that_of_the_unit_in_use(dtype):
    def best(of):
        return max(benchmark.fma_peak(0.0005, of) for _ in range(9))

    isa = mh.info().isa
    units = {"amx_fp16": (BF16, FP16), "amx": (BF16,), "avx512_bf16": (BF16,)}
    uses_pairs = dtype in units.get(isa, ())
    assert (benchmark.pair_unit(dtype) is not None) == uses_pairs
    word = {BF16: "bf16", FP16: "fp16"}[dtype]
    assert tasks.multiply_limit(dtype)[1] == (f"{word} peak" if uses_pairs else "FMA peak")
    assert best(dtype) > 0
    if uses_pairs and isa.startswith("amx"):
        assert best(dtype) > 3 * best(FP32)  # by counts of instructions, 16 times


# --- which pairs count ---------------------------------------------------------------------------


class Elsewhere:
    """A side that times itself, so many seconds for each sample in turn."""

    def __init__(self, *seconds):
        self.seconds, self.counts = iter(seconds), []

    def __call__(self):
        return torch.ones(3)

    def seconds_per_call(self, count):
        self.counts.append(count)
        return next(self.seconds)


def test_a_side_that_times_itself_is_believed():
    ours = Elsewhere(0.005, *[2.0] * 3)
    peer = Elsewhere(0.01, *[6.0] * 3)
    result = compare(ours, peer, pairs=3, warmup=0)
    assert result.ratios == (3.0,) * 3
    assert ours.counts == [1, 4, 4, 4] and peer.counts == [1, 2, 2, 2]  # 0.02 s to a sample


def test_pairs_with_a_slow_peer_are_left_out_and_those_with_us_slow_are_not():
    peer = Elsewhere(1.0, *[3.0] * 4, 3.5, *[3.0] * 3)
    ours = Elsewhere(1.0, 1.0, 9.0, *[1.0] * 6)
    result = compare(
        ours, peer, pairs=7, warmup=0, check=lambda a, b: None, limit=lambda: 1.0, patience=1e6
    )
    assert result.disturbed == 1 and len(result.ratios) == 7
    assert 9.0 in result.ours and 3.5 not in result.peer


# --- peers in their own environments -------------------------------------------------------------

FAKE = """
import os, sys
sys.path.insert(0, {workers!r})
import numpy as np
import worker

def operators(query, key, value, causal, threads):
    def run():
        if {kind!r} == "crash":
            os.kill(os.getpid(), 11)
        if {kind!r} == "raise":
            raise ValueError("cannot")
        scores = query @ key.swapaxes(-1, -2) / query.shape[-1] ** 0.5
        if causal:
            scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ value + ({kind!r} == "wrong")

    print("a library that prints")
    yield worker.Operator("attend", run, run)

worker.OPERATORS["zentorch"] = operators
worker.main()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts something into the place of zentorch's environment and worker."""

    def install(kind: str) -> Path:
        folder = tmp_path / "zentorch" / "bin"
        folder.mkdir(parents=True)
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (folder.parent / ".installed").touch()
        worker = tmp_path / "worker.py"
        worker.write_text(FAKE.format(workers=str(WORKERS), kind=kind))
        monkeypatch.setattr(peers, "WORKER", worker)
        return tmp_path

    return install


SMALL = Row("small", (3, 3), 11, 5, Goal(), batch=2, causal=True, peers=True)


def test_absent_peers_are_named_and_nothing_of_them_runs(tmp_path):
    with peers.Peers(tmp_path) as none:
        assert none.time_row(SMALL, 0.0) == {}
        assert [note.split(":")[0] for note in none.notes()] == list(peers.NAMES.values())
        assert all("not installed (`make bench-peers`)" in note for note in none.notes())


@pytest.mark.parametrize("causal", [True, False])
def test_a_peer_is_checked_and_timed_in_its_own_process(install, causal):
    with peers.Peers(install("right")) as found:
        result = found.time_row(replace(SMALL, causal=causal), 0.0)["zentorch"]
        assert isinstance(result, Comparison) and min(result.peer) > 0
        assert found.time_row(replace(SMALL, peers=False), 0.0) == {}
        assert found.notes()[-1] == "zentorch: attend"


@pytest.mark.parametrize(
    ("kind", "cell", "note"),
    [
        ("wrong", "other results", "the two sides differ"),
        ("raise", "failed", "failed at small (ValueError: cannot)"),
        ("crash", "failed", "failed at small (died of signal 11)"),
    ],
)
def test_a_peer_that_fails_is_said_to(install, kind, cell, note):
    with peers.Peers(install(kind)) as found:
        assert found.time_row(SMALL, 0.0) == {"zentorch": cell}
        assert note in found.notes()[-1]


# --- the table -----------------------------------------------------------------------------------


def comparison(ours=(1.0, 1.0, 1.0), peer=(2.0, 3.0, 4.0), **more) -> Comparison:
    return Comparison(ours, peer, 0.0, limits=(8.0,) * 3, **more)


def test_a_line_says_what_was_measured():
    task = tasks.Task("name", None, None, None, None, "peak", 4.0, Goal(ratio=3.0))  # type: ignore
    line, _ = command.task_line(replace_time(task, comparison()), 7, 0.0)
    assert (line.ms, line.ratio, line.limit) == ("1000.00", "3.00x (2.00-4.00)", "50.0% of peak")
    assert (line.goal, line.met, line.quiet, line.bar) == ("3x", True, "yes", (3.0, 2.0, 4.0))
    line, _ = command.task_line(replace_time(task, comparison(disturbed=None)), 7, 0.0)
    assert line.quiet == "no" and line.ratio.endswith("*")


def replace_time(task, result):
    object.__setattr__(task, "time", lambda pairs, patience: result)
    return task


def test_results_are_written_as_a_table_and_a_plot(tmp_path):
    written, plot = tmp_path / "RESULTS.md", tmp_path / "RESULTS.svg"
    lines = [
        Line("first", "1.00", "2.00x", met=True, bar=(2.0, 1.5, 2.5), goal_ratio=1.7),
        Line("second", "1.00", "0.50x", met=False, bar=(0.5, 0.4, 0.6), others={"Other": "3x"}),
        Line("third", ratio="5 MB"),
    ]
    peaks = {"FMA peak": [1e9, 2e9, 7e9]}
    report.write(Report(lines, peaks, ["Another: not installed"]), written, plot)
    text = written.read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    assert "| second | 1.00 | 0.50x | 3x |" in text and "| third |  | 5 MB |  |" in text
    assert "FMA peak 2 GFLOP/s" in text and "- Another: not installed" in text
    assert "](RESULTS.svg)" in text
    drawn = plot.read_text()
    assert ">first<" in drawn and ">second<" in drawn and "third" not in drawn
    assert "goal of first" in drawn and "goal of second" not in drawn


def test_without_matplotlib_the_table_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = tmp_path / "RESULTS.md"
    report.write(Report([Line("first")]), written, tmp_path / "RESULTS.svg")
    assert report.NO_PLOT in written.read_text() and "| first |" in written.read_text()
    assert not (tmp_path / "RESULTS.svg").exists()


def test_only_the_rows_asked_for_are_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(tasks.Task, "time", lambda *_: comparison())
    monkeypatch.setattr(command.flex, "time_row", lambda row, patience: "no")
    monkeypatch.setattr(command, "Peers", lambda: peers.Peers(tmp_path))
    found = command.measure(7, "fp32 GQA 32/8x2048", 0.0)
    assert [line.name for line in found.lines] == ["decode fp32 GQA 32/8x2048x128"]
    assert found.peers == ["FlexAttention"] and found.peaks == {}
    assert len(found.notes) == 3
