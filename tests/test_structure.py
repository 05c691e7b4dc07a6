"""How the package hangs together: who imports whom, what is public, what an import costs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import manyheads

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "manyheads"

# The import arrow of DESIGN.md: a room (a module, or a package with all that is in it) may import
# the rooms listed for it, and `errors` besides.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "spec": set(),
    "_ops": set(),
    "arguments": {"spec"},
    "masks": {"spec", "arguments"},
    "positions": {"spec", "arguments"},
    "rotary": {"arguments"},
    "caches": {"arguments"},
    "definition": {"spec"},
    "dropout": set(),
    "_autograd": {"_ops", "definition", "dropout", "spec"},
    "backends": {"_autograd", "_ops", "definition", "dropout", "spec"},
    "dispatch": {"backends", "spec"},
    "jagged": {"masks"},
    "watching": {"spec"},
    "gates": set(),
    "parts": {"spec"},
    "functional": {
        *("dispatch", "jagged", "masks", "positions", "caches", "spec", "arguments"),
        "watching",
    },
    "weights": {"arguments"},
    "projection": {"_ops"},
    "module": {
        *("functional", "masks", "positions", "rotary", "caches", "projection"),
        *("jagged", "spec", "weights", "arguments"),
    },
    "pruning": {"module", "masks", "positions", "arguments"},
    "inspect": {
        *("module", "functional", "backends", "definition", "jagged", "masks", "positions"),
        *("caches", "spec", "arguments", "integrations", "parts", "watching", "gates"),
    },
    "environment": {"_ops"},
    "integrations": {
        *("functional", "masks", "positions", "spec", "arguments"),
        *("definition", "parts", "watching", "gates", "pruning"),
    },
}  # fmt: skip
#: What stands on top of the public interface; nothing may import these but each other.
ON_TOP = {"benchmark", "cli", "commands", "demo_models", "head_commands"}


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCES).parts[0]
    return first.removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, ...]]:
    """Every manyheads module that a file imports, anywhere in it, as parts below `manyheads`."""
    package = ("manyheads", *path.relative_to(SOURCES).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import name`: the name may itself be a module.
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == "manyheads":
                yield parts[1:]


def source_files() -> list[Path]:
    files = sorted(SOURCES.rglob("*.py"))
    assert len(files) > 10
    return files


def test_imports_follow_the_arrow() -> None:
    wrong = []
    for path in source_files():
        room = room_of(path)
        if room in ON_TOP | {"__init__"}:
            continue
        assert room in MAY_IMPORT, (
            f"{room} is not in the import arrow: add it there and in DESIGN.md"
        )
        allowed = MAY_IMPORT[room] | {"errors", room}
        for parts in imports_of(path):
            if not parts or parts[0] not in allowed:
                wrong.append(f"{path.relative_to(SOURCES)} imports manyheads.{'.'.join(parts)}")
    assert not wrong, "\n".join(wrong)


def test_backends_never_import_each_other() -> None:
    backends = [path for path in source_files() if room_of(path) == "backends"]
    assert len(backends) > 3
    for path in backends:
        for parts in imports_of(path):
            assert parts[0] != "backends", f"{path.name} imports {'.'.join(parts)}"


def test_public_names() -> None:
    assert manyheads.__all__ == sorted(manyheads.__all__)
    assert manyheads.__all__ == PUBLIC_NAMES
    for name in manyheads.__all__:
        assert getattr(manyheads, name).__doc__, name


def test_init_holds_nothing_but_names() -> None:
    body = ast.parse((SOURCES / "__init__.py").read_text()).body
    docstring, *rest, names = body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, ast.ImportFrom) for node in rest)
    assert isinstance(names, ast.Assign)
    imported = [alias.name for node in rest for alias in node.names]
    assert sorted(imported) == PUBLIC_NAMES


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh process that finds manyheads where this one found it."""
    package_parent = str(Path(manyheads.__path__[0]).parent)
    paths = os.pathsep.join([package_parent, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_import_is_light() -> None:
    process = run_python(
        "import sys, json, numpy, torch; before = set(sys.modules)\n"
        "import manyheads\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    assert process.returncode == 0, process.stderr
    added = set(json.loads(process.stdout))
    assert "manyheads" in added
    assert added - {"manyheads", "torch"} <= sys.stdlib_module_names


# One call through the native backend, then what ran it.
RUN_NATIVE = """
import torch, manyheads
torch.manual_seed(0)
query, key, value = (torch.randn(1, 3, 37, 29) for _ in range(3))
out = manyheads.attention(query, key, value, mask=manyheads.Causal(), backend="native")
expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
torch.testing.assert_close(out, expected)
print(manyheads.info().isa, *manyheads.info().available_isas)
"""


def detected_isas() -> tuple[str, ...]:
    return manyheads.info().available_isas


def test_the_best_isa_is_the_default() -> None:
    process = run_python(RUN_NATIVE, MANYHEADS_ISA="")
    assert process.returncode == 0, process.stderr
    used, *available = process.stdout.split()
    assert used == available[0]
    assert available[-1] == "scalar"
    assert tuple(available) == detected_isas()


def test_every_isa_can_be_forced() -> None:
    assert detected_isas()
    for isa in detected_isas():
        process = run_python(RUN_NATIVE, MANYHEADS_ISA=isa)
        assert process.returncode == 0, process.stderr
        assert process.stdout.split()[0] == isa


@pytest.mark.parametrize("name", ["avx513", "AVX512", "scalar "])
def test_a_misspelt_isa_raises_and_lists_the_choices(name: str) -> None:
    code = (
        "import torch, manyheads\n"
        "x = torch.randn(1, 3, 5, 7)\n"
        "info = manyheads.info()\n"
        "assert info.isa is None and 'scalar' in info.native_error, info\n"
        "for backend in (None, 'native'):\n"
        "    try:\n"
        "        manyheads.attention(x, x, x, backend=backend)\n"
        "    except manyheads.ArgumentError as error:\n"
        "        print(error)\n"
    )
    process = run_python(code, MANYHEADS_ISA=name)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(f"'{name}'") == 2
    assert process.stdout.count(" ".join(detected_isas())) == 2


def test_without_the_library_everything_else_works(tmp_path: Path) -> None:
    package = tmp_path / "manyheads"
    for path in source_files():
        copy = package / path.relative_to(SOURCES)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    code = (
        "import torch, manyheads\n"
        f"assert manyheads.__path__[0] == {str(package)!r}\n"
        "x = torch.randn(1, 3, 5, 7)\n"
        "assert manyheads.attention(x, x, x).shape == x.shape\n"
        "print(manyheads.info().native_error)\n"
        "try:\n"
        "    manyheads.attention(x, x, x, backend='native')\n"
        "except manyheads.BackendError as error:\n"
        "    print(error)\n"
    )
    process = run_python(code, PYTHONPATH=str(tmp_path))
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("was not built") == 2, process.stdout


def test_a_broken_library_is_reported(tmp_path: Path) -> None:
    package = tmp_path / "manyheads"
    for path in source_files():
        copy = package / path.relative_to(SOURCES)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (package / "libmanyheads.so").write_bytes(b"not a library")
    process = run_python(
        "import manyheads; print(manyheads.info().native_error)", PYTHONPATH=str(tmp_path)
    )
    assert process.returncode == 0, process.stderr
    assert "did not load with torch" in process.stdout


PUBLIC_NAMES = [
    "Alibi",
    "ArgumentError",
    "ArgumentTypeError",
    "BackendError",
    "Causal",
    "Chunks",
    "Dense",
    "DenseBias",
    "DeviceError",
    "Documents",
    "Entropy",
    "Explanation",
    "FirstKeys",
    "FirstKeysMass",
    "HeadSimilarity",
    "HeatMap",
    "Info",
    "KVCache",
    "KeyLengths",
    "KeyRange",
    "LinearScaling",
    "Llama3Scaling",
    "LogSumExp",
    "ManyHeadsError",
    "Mask",
    "MaxLogit",
    "MeanDistance",
    "Measure",
    "MissingDependencyError",
    "MultiHeadAttention",
    "NTKScaling",
    "NotRecordedError",
    "OffsetMass",
    "Page",
    "Predicate",
    "QueryRows",
    "Received",
    "Record",
    "RelativeBias",
    "Report",
    "Rotary",
    "Seen",
    "ShapeError",
    "StrictError",
    "TopKeys",
    "Trace",
    "WeightRows",
    "Window",
    "YarnScaling",
    "attention",
    "contributions",
    "explain",
    "head_importance",
    "info",
    "measure",
    "observe",
    "prune_heads",
    "report",
    "rollout",
    "trace",
    "trace_attention",
    "view",
]
