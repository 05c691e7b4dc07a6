"""The numbers in docs/tutorial.md are what its code computes."""

import doctest
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"


def test_tutorial(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = doctest.testfile(str(PAGE), module_relative=False)
    assert page.failed == 0
    assert page.attempted == 28
    assert "worked out below is how <b><bdi>the</bdi></b> (row 3)" in Path(
        "attention.html"
    ).read_text(encoding="utf-8")
