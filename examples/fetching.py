"""Files from pip, npm and apt: fetched once, checked, and cached.

A fetch fills a folder of another name and renames it when everything is there and has the right
sha256, so one that was interrupted leaves nothing that looks complete, and the next one starts
anew. The folders are in `manyheads.demo_models.cache_folder()` ($MANYHEADS_CACHE); deleting one is
safe.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from manyheads.demo_models import cache_folder, filled, pip_download
from manyheads.errors import FetchError

NEEDS_APT = "run this on Debian or Ubuntu"


def package_file(requirement: str, sha256: str) -> Path:
    """The wheel of a Python package, "name==version", as it was published."""

    def fill(folder: Path) -> None:
        pip_download(requirement, folder)
        check(_only(folder.iterdir(), requirement), [sha256])

    folder = filled(cache_folder() / f"{requirement.replace('==', '-')}-{sha256[:12]}", fill)
    path = _only(folder.iterdir(), str(folder))
    check(path, [sha256])  # it may have been damaged since
    return path


def npm_package(requirement: str, sha256: str) -> Path:
    """The folder of an npm package, "name@version", unpacked; its dependencies are not fetched."""

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            run(["npm", "pack", "--silent", requirement], Path(scratch), "install Node.js")
            archive = _only(Path(scratch).glob("*.tgz"), requirement)
            check(archive, [sha256])
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")

    return (
        filled(cache_folder() / f"{requirement.replace('@', '-')}-{sha256[:12]}", fill) / "package"
    )


def debian_package(name: str) -> Path:
    """The folder of a Debian package, unpacked; its sha256 is the one in apt's signed lists."""

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            run(["apt-get", "--quiet", "download", name], Path(scratch), NEEDS_APT)
            package = _only(Path(scratch).glob("*.deb"), name)
            record = run(["apt-cache", "show", name], Path(scratch), NEEDS_APT)
            check(package, re.findall(r"^SHA256: (\w+)$", record.decode(), re.MULTILINE))
            run(["dpkg-deb", "-x", str(package), str(folder)], Path(scratch), NEEDS_APT)

    return filled(cache_folder() / name, fill)


def run(command: list, folder: Path, needs: str) -> bytes:
    """What a tool printed."""
    if shutil.which(command[0]) is None:
        raise FetchError(f"{command[0]} is needed and is not on the PATH: {needs}.")
    result = subprocess.run(command, cwd=folder, capture_output=True)
    if result.returncode != 0:
        words = [line for line in result.stderr.decode().splitlines() if line.strip()]
        said = (words or ["nothing"])[-1].strip()
        raise FetchError(
            f"{' '.join(map(str, command))} failed; it said {said!r}. Expected: a working "
            f"{command[0]}, and a network. Nothing is kept of it; try again."
        )
    return result.stdout


def _only(paths: Iterable[Path], what: str) -> Path:
    found = sorted(paths)
    if len(found) != 1:
        raise FetchError(
            f"fetching {what} left {[p.name for p in found]}; expected one file. If it is a folder "
            f"in {cache_folder()}, delete it; then fetch again."
        )
    return found[0]


def check(path: Path, expected: list[str]) -> None:
    """Refuse a file whose sha256 is none of these."""
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got not in expected:
        raise FetchError(
            f"{path} is not the file it should be: got sha256 {got}, expected "
            f"{' or '.join(expected) or 'one in its lists'}. It was not used. If it lies in "
            f"{cache_folder()}, delete its folder; then fetch again."
        )
