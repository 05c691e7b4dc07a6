"""`Seen.save` and `Seen.load`: everything comes back exactly; what is no such file is told so."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

import manyheads as mh
from manyheads.inspect import Top

EVERYTHING = (
    mh.LogSumExp(),
    mh.MaxLogit(),
    mh.Entropy(),
    mh.MeanDistance(),
    mh.FirstKeysMass(3),
    mh.OffsetMass(-1),
    mh.TopKeys(4),
    mh.Received(),
    mh.Received(last=2),
    mh.HeatMap(3, 2, queries=(1, 4), keys=(0, 3)),
    mh.WeightRows((0, 3)),
    mh.HeadSimilarity(),
)


def seen(*measures: mh.Measure, dtype: torch.dtype = torch.float32) -> mh.Seen:
    """Two layers, the second chosen heads of; row 0 of the second may attend to nothing."""
    model = torch.nn.Sequential(
        mh.MultiHeadAttention(15, 3, mask=mh.Causal()),
        mh.MultiHeadAttention(15, 3, mask=mh.Causal() & ~mh.Window(0, 0)),
    ).to(dtype)
    with mh.observe(model, *measures, heads=(2, 0)) as records:
        model(torch.randn(2, 5, 15, dtype=dtype))
        model(torch.randn(2, 7, 15, dtype=dtype))
    return records


FIELDS = ("layer", "step", "heads", "query_length", "key_length", "filled")


def assert_same(one: mh.Seen, other: mh.Seen) -> None:
    assert one.layers == other.layers and len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        for field in (*FIELDS, "measures"):
            assert getattr(mine, field) == getattr(theirs, field)
        assert torch.equal(mine.positions, theirs.positions)
        for measure in mine.measures:
            left, right = mine[measure], theirs[measure]
            assert type(left) is type(right)
            pairs = zip(left, right, strict=True) if isinstance(left, Top) else [(left, right)]
            for a, b in pairs:
                assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_everything_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    records = seen(*EVERYTHING, dtype=dtype)
    assert (records["1"][0][mh.LogSumExp()] == -math.inf).any()
    records.save(tmp_path / "seen.safetensors")
    loaded = mh.Seen.load(str(tmp_path / "seen.safetensors"))
    assert_same(records, loaded)
    assert loaded.measures == EVERYTHING and [r.step for r in loaded["1"]] == [0, 1]
    assert os.listdir(tmp_path) == ["seen.safetensors"]


def test_records_of_several_runs_can_be_put_together(tmp_path: Path) -> None:
    together = mh.Seen(seen(mh.Entropy()))
    for record in seen(mh.TopKeys(2), mh.Entropy()):
        together.append(record)
    together.save(tmp_path / "seen")
    assert_same(together, mh.Seen.load(tmp_path / "seen"))


def test_nothing_comes_back_as_nothing(tmp_path: Path) -> None:
    mh.Seen().save(tmp_path / "seen")
    assert len(mh.Seen.load(tmp_path / "seen")) == 0


def test_a_file_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, path = seen(mh.Entropy()), tmp_path / "seen"
    first.save(path)

    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "other").unlink()

    def breaks(tensors: object, name: Path, metadata: object) -> None:
        Path(name).write_bytes(b"half of it")
        raise safetensors.SafetensorError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", breaks)
    with pytest.raises(OSError, match="seen could not be written: no space left"):
        seen(mh.Entropy()).save(path)
    with pytest.raises(FileNotFoundError):
        first.save(tmp_path / "no" / "folder")
    assert os.listdir(tmp_path) == ["seen"]
    assert_same(first, mh.Seen.load(path))


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(number: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        happened.append(("synced", "folder" if path == tmp_path else path.name))
        fsync(number)

    def named(source: Path, target: Path) -> None:
        happened.append((Path(source).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    seen(mh.Entropy()).save(tmp_path / "seen")
    (partial, _) = happened[1]
    assert happened == [("synced", partial), (partial, "seen"), ("synced", "folder")]
    assert re.fullmatch(r"\.seen\.\w+\.partial", partial)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    first, path = seen(mh.Entropy()), tmp_path / "seen"
    first.save(path)

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fails)
        with pytest.raises(OSError, match="No space left"):
            seen(mh.TopKeys(2)).save(path)
    assert os.listdir(tmp_path) == ["seen"]
    assert_same(first, mh.Seen.load(path))


@dataclass(frozen=True)
class Doubled(mh.Entropy):
    """A measure of somebody's own."""


def test_only_manyheads_own_measures_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(mh.ArgumentTypeError, match=r"records of Doubled\(\).*expected manyheads'"):
        seen(Doubled()).save(tmp_path / "seen")
    records = seen(mh.Entropy())
    odd = mh.Record("0", 0, (0,), 1, 1, torch.zeros(1, 1), (mh.Entropy(),), ((1.0,),))
    records.append(odd)
    with pytest.raises(mh.ArgumentTypeError, match=r"what Entropy\(\) answers: got tuple"):
        records.save(tmp_path / "seen")
    asked = mh.WeightRows((0, 1))
    object.__setattr__(asked, "rows", range(2))  # which making it refuses, or takes as a tuple
    with pytest.raises(mh.ArgumentTypeError, match="a measure that holds a range"):
        seen(asked).save(tmp_path / "seen")
    assert not os.listdir(tmp_path)


def changed(**changes: object) -> Callable[[Path], None]:
    """A saved file whose description says something else."""

    def write(path: Path) -> None:
        seen(mh.TopKeys(2)).save(path)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        for key, value in changes.items():
            metadata[key] = value if isinstance(value, str) else json.dumps(value)
        safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata=metadata)

    return write


def cut(path: Path) -> None:
    seen(mh.TopKeys(2)).save(path)
    path.write_bytes(path.read_bytes()[:-8])


def other_tensors(path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(3)}, path)


RECORD = {"layer": "0", "step": 0, "heads": [0], "query_length": 1, "key_length": 1,
          "measures": [0], "answers": [["os", "name"]]}  # fmt: skip
BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text": (lambda path: path.write_text("hello"), "cannot be read"),
    "nothing": (lambda path: path.write_bytes(b""), "cannot be read"),
    "cut short": (cut, "cannot be read"),
    "another's": (other_tensors, "safetensors file of something else (format: None)"),
    "a later version": (changed(version="2"), "has version '2' of the format; expected 1"),
    "no json": (changed(records="{"), "cannot be read"),
    "unknown measure": (changed(measures=[["Mood", {}]]), "the file holds 'Mood'"),
    "no measure": (changed(measures=[["torch", {}]]), "the file holds 'torch'"),
    "wrong fields": (changed(measures=[["TopKeys", {"q": 1}]]), "cannot be read"),
    "bad fields": (changed(measures=[["TopKeys", {"k": 0}]]), "k is 0; expected at least 1"),
    "no such tensor": (changed(records=[{**RECORD, "answers": [["Tensor"]]}]), "cannot be read"),
    "unknown answer": (changed(records=[RECORD]), "the file holds 'os'"),
    "no records": (changed(records=7), "cannot be read"),
    "missing part": (changed(records=[{"layer": "0"}]), "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_no_such_file_is_told_so(tmp_path: Path, name: str) -> None:
    write, words = BAD_FILES[name]
    write(tmp_path / "file")
    with pytest.raises(mh.ArgumentError, match=re.escape(words)):
        mh.Seen.load(tmp_path / "file")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        mh.Seen.load(tmp_path / "none")


def test_without_safetensors_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for run in (lambda: mh.Seen().save(tmp_path / "x"), lambda: mh.Seen.load(tmp_path / "x")):
        with pytest.raises(mh.MissingDependencyError, match="pip install safetensors"):
            run()
