"""What goes wrong in an example that typer runs is said in one line."""

import subprocess
import sys
from pathlib import Path

import command
import pytest
from checkpoints import CheckpointError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("kind", [CheckpointError, FileNotFoundError, ValueError])
def test_a_problem_is_one_line(monkeypatch, kind):
    def program():
        raise kind("got that, expected this")

    monkeypatch.setattr(sys, "argv", ["folder/mine.py"])
    with pytest.raises(SystemExit, match=r"^mine\.py: got that, expected this$"):
        command.run(program)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        command.run(lambda: {}["missing"])


@pytest.mark.parametrize(
    ("example", "arguments"),
    [
        ("translate.py", ["--model", "nowhere", "text"]),
        ("train_translation.py", ["--folder", "nowhere", "text"]),
        ("summarise.py", ["nowhere"]),
    ],
)
def test_examples_say_it_so(tmp_path, example, arguments):
    ran = subprocess.run(
        [sys.executable, EXAMPLES / example, *arguments],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 1 and ran.stderr.startswith(f"{example}: ")
    assert "nowhere" in ran.stderr and "Traceback" not in ran.stderr
