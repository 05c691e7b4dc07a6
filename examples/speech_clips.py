"""Ten clips of read English and what is said in them, from Debian's pocketsphinx-testdata (BSD-2).

Five sentences of a LibriVox reading of "Sense and Sensibility", and five commands of a card game.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from manyheads.demo_models import cache_folder
from manyheads.errors import FetchError

PACKAGE = "pocketsphinx-testdata"
DATA = Path("usr/share/pocketsphinx/test/data")
#: (folder, its transcripts, pairs of <s> text </s> (name))
SETS = (("librivox", "transcription"), ("cards", "cards.transcription"))


def clips(cache: Path | None = None) -> list[tuple[Path, str]]:
    """(file, what is said in it), fetched first if they are not in the cache folder.

    Raises: FetchError where apt is missing, fails, or fetches what its own record does not say.
    """
    folder = (cache_folder() if cache is None else cache) / PACKAGE
    if not folder.is_dir():
        fetch(folder)
    found = []
    for name, transcripts in SETS:
        lines = (folder / DATA / name / transcripts).read_text()
        for text, clip in re.findall(r"<s>(.*?)</s>\s*\((\S+)\)", lines):
            found.append((folder / DATA / name / f"{clip}.wav", plain(text)))
    return found


def plain(text: str) -> str:
    """Lower case, without punctuation: how the transcripts are written."""
    return " ".join(re.sub(r"[^\w\s']", " ", text.lower()).split())


def fetch(folder: Path) -> None:
    """Download the package with apt, check it, and unpack it into `folder`, all or nothing."""
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(
                f"the speech clips are a Debian package, {PACKAGE}, and {tool} is not on the PATH. "
                "Run this on Debian or Ubuntu, or give a recording of your own: "
                "transcribe.py clip.wav"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=folder.parent) as scratch:
        run("apt-get", "--quiet", "download", PACKAGE, folder=scratch)
        (package,) = Path(scratch).glob("*.deb")
        record = run("apt-cache", "show", PACKAGE, folder=scratch)
        expected = re.findall(r"^SHA256: (\w+)$", record, re.MULTILINE)
        got = hashlib.sha256(package.read_bytes()).hexdigest()
        if got not in expected:
            raise FetchError(
                f"{package.name} is not what apt's record says: got sha256 {got}, expected "
                f"{' or '.join(expected) or 'one'}. It was not used. Try apt-get update."
            )
        unpacked = Path(scratch) / "unpacked"
        run("dpkg-deb", "-x", str(package), str(unpacked), folder=scratch)
        try:
            os.rename(unpacked, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has just finished the same work
                raise


def run(*command: str, folder: str) -> str:
    """What a command printed."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        words = [line for line in result.stderr.splitlines() if line.strip()]
        raise FetchError(
            f"could not fetch {PACKAGE}: {command[0]} said {(words or ['nothing'])[-1]!r}. "
            "Expected: a working apt with Debian's package lists. Try apt-get update."
        )
    return result.stdout
