"""Ten clips of read English and what is said in them, from Debian's pocketsphinx-testdata (BSD-2).

Five sentences of a LibriVox reading of "Sense and Sensibility", and five commands of a card game.
"""

from __future__ import annotations

import re
from pathlib import Path

from fetching import debian_package

DATA = Path("usr/share/pocketsphinx/test/data")
#: (folder, its transcripts: lines of <s> text </s> (name))
SETS = (("librivox", "transcription"), ("cards", "cards.transcription"))


def clips() -> list[tuple[Path, str]]:
    """(file, what is said in it), fetched with apt first if they are not in the cache folder.

    Raises: FetchError where apt is missing, fails, or fetches what its own record does not say.
    """
    data, found = debian_package("pocketsphinx-testdata") / DATA, []
    for name, transcripts in SETS:
        for text, clip in re.findall(
            r"<s>(.*?)</s>\s*\((\S+)\)", (data / name / transcripts).read_text()
        ):
            found.append((data / name / f"{clip}.wav", plain(text)))
    return found


def plain(text: str) -> str:
    """Lower case, without punctuation: how the transcripts are written."""
    return " ".join(re.sub(r"[^\w\s']", " ", text.lower()).split())
