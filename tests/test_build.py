"""What is compiled and how: the library's symbols, the ISA files, the packaging rules."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

import manyheads

ROOT = Path(__file__).parent.parent
LIBRARY = next(
    path for folder in manyheads.__path__ if (path := Path(folder, "libmanyheads.so")).exists()
)


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(nm's one-letter type, demangled name) of every symbol."""
    listing = subprocess.run(
        ["nm", "-C", *options, str(path)], capture_output=True, text=True, check=True
    )
    pattern = re.compile(r"^[0-9a-f]* +(\S) (.*)$", re.MULTILINE)
    return pattern.findall(listing.stdout)


def isa_flags() -> dict[str, list[str]]:
    """The flags CMakeLists.txt gives each file of kernels that this machine's compiler takes."""
    text = (ROOT / "CMakeLists.txt").read_text()
    pattern = (
        r"set_source_files_properties\(((?:csrc/isa_\w+\.cpp ?)+) "
        r'PROPERTIES COMPILE_OPTIONS\s+"(.*?)"'
    )
    flags = {
        name: options.split(";")
        for names, options in re.findall(pattern, text)
        for name in names.split()
    }
    without_flags = {"csrc/isa_scalar.cpp", "csrc/isa_neon.cpp"}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("isa_*.cpp")}
    assert set(flags) | without_flags == files
    if platform.machine() != "x86_64":
        return {name: [] for name in without_flags}
    return {"csrc/isa_scalar.cpp": [], **flags}  # `make test-neon` looks at the other one


@pytest.mark.parametrize("name", isa_flags())
def test_isa_files_share_nothing_with_the_rest(name: str, tmp_path: Path) -> None:
    """No weak symbol: the linker would keep one copy for all, perhaps one an older CPU dies of.

    Compiled without optimisation, so that nothing hides by being inlined.
    """
    compiled = tmp_path / "isa.o"
    subprocess.run(
        ["c++", "-std=c++20", "-O0", "-fPIC", *isa_flags()[name], "-c", name, "-o", str(compiled)],
        cwd=ROOT,
        check=True,
    )
    table = symbols(compiled)
    weak = [symbol for kind, symbol in table if kind in "WwVvu"]
    assert not weak, weak
    defined = [symbol for kind, symbol in table if kind.isupper() and kind != "U"]
    assert len(defined) == 1, defined
    isas = "Scalar|Avx2|Avx512|Avx512Bf16|Amx|AmxFp16|Neon"
    assert re.fullmatch(rf"manyheads::kKernels({isas})", defined[0])
    used = [symbol for kind, symbol in table if kind == "U"]
    assert not [symbol for symbol in used if "std::" in symbol], used


def test_only_the_stable_abi_is_used() -> None:
    needed = [symbol for _, symbol in symbols(LIBRARY, "-D", "--undefined-only")]
    torch_symbols = [symbol for symbol in needed if symbol.startswith(("aoti_torch", "torch_"))]
    assert len(torch_symbols) > 5
    unstable = [s for s in needed if re.search(r"\b(c10|at|torch|caffe2)::|^_?Py", s)]
    assert not unstable, unstable


def test_only_the_bindings_include_torch_and_each_other_one_way() -> None:
    includes = {
        str(path.relative_to(ROOT / "csrc")): re.findall(
            r'#include ["<](.*?)[">]', path.read_text()
        )
        for path in (ROOT / "csrc").rglob("*.*")
    }
    with_torch = {name for name, used in includes.items() if any("torch/" in u for u in used)}
    headers = {"bindings_arguments.h", "bindings_results.h", "bindings_statistics.h"}
    assert with_torch == {"bindings.cpp", *headers}
    bindings = {
        name: {u for u in used if u.startswith("bindings")}
        for name, used in includes.items()
        if any(u.startswith("bindings") for u in used)
    }
    assert bindings == {
        "bindings_results.h": {"bindings_arguments.h"},
        "bindings_statistics.h": {"bindings_arguments.h", "bindings_results.h"},
        "bindings.cpp": headers,
    }


def test_the_library_needs_no_more_than_torch_and_the_system() -> None:
    listing = subprocess.run(
        ["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", listing))
    assert "libtorch_cpu.so" in needed
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    assert {n for n in needed if not n.startswith("ld-linux")} <= {"libtorch_cpu.so", *system}
    assert "RPATH" not in listing
    assert "RUNPATH" not in listing


def test_no_build_path_is_in_the_library() -> None:
    content = LIBRARY.read_bytes()
    assert b"csrc/bindings.cpp" in content
    for path in (b"/site-packages", b"/include/", str(ROOT).encode()):
        assert path not in content


def test_the_machine_that_builds_does_not_leak_into_the_code() -> None:
    for path in [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*")]:
        assert "-march=native" not in path.read_text()
    assert "-ffp-contract=off" in (ROOT / "CMakeLists.txt").read_text()


def test_building_does_not_fetch_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert requires is not None
    assert "torch" not in requires[1]


def test_requirements_are_pinned_and_name_no_host() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    for pin in pins:
        assert re.fullmatch(r'[\w-]+==[\w.]+(; python_version (<|>=) "3\.\d+")?', pin), pin


def test_ci_runs_the_test_command_and_nothing_more() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    commands = [line for line in script.read_text().splitlines() if line and line[0] != "#"]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]
