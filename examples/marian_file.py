"""Reading Marian's binary model files: settings, weights, and what Marian calls them."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

import manyheads as mh

FLOAT32, INT8, BYTES = 0x404, 0x4101, 0x101
#: What marian.py computes; a model that says otherwise is refused, not mistranslated.
EXPECTED = {
    "type": "transformer",
    "dec-cell": "ssru",
    "transformer-decoder-autoreg": "rnn",
    "transformer-preprocess": "",
    "transformer-postprocess": "dan",
    "transformer-postprocess-emb": "d",
    "transformer-ffn-activation": "relu",
    "transformer-ffn-depth": 2,
    "tied-embeddings-all": True,
}
#: The sizes that `Marian` takes from the settings.
NEEDED = {
    "dim-emb",
    "dim-vocabs",
    "transformer-heads",
    "transformer-dim-ffn",
    "enc-depth",
    "dec-depth",
}


def read(path: Path | zipfile.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, weights) of a Marian binary, int8 weights as float32.

    u64 version, u64 n, n x (name length, type, axes, bytes), names, i32 shapes, padding, data. A
    quantised matrix is followed by its multiplier; all but the embeddings lie transposed, which is
    how `nn.Linear` wants them, so every matrix comes back as [outputs, inputs].

    Raises: mh.ArgumentError for a file that is not one, is cut short or holds another model.
    """
    data = path.read_bytes()
    settings: dict[str, Any] = {}
    weights = {}
    try:
        for name, kind, shape, raw in _items(data):
            if kind == BYTES and name == "special:model.yml":
                settings = yaml.safe_load(raw.rstrip(b"\0"))
            elif kind == FLOAT32 or (kind == INT8 and "QuantMult" not in name):
                weights[name] = _weight(name, kind, shape, raw)
    except (struct.error, ValueError, IndexError, RuntimeError, yaml.YAMLError) as problem:
        raise mh.ArgumentError(
            f"{path} is no whole Marian binary: got {problem} in its {len(data)} bytes; expected "
            "version 1 and every weight it lists. Fetch it again, or name a folder with another."
        ) from None
    missing = sorted(NEEDED - settings.keys())
    if missing:
        raise mh.ArgumentError(
            f"{path} does not describe its model: no {', '.join(missing)} in special:model.yml; "
            "expected a Firefox Translations model."
        )
    for key, expected in EXPECTED.items():
        if settings.get(key) != expected:
            raise mh.ArgumentError(
                f"{path} is a model of another kind: got {key}={settings.get(key)!r}; expected "
                f"{expected!r}. Give a Firefox Translations model."
            )
    return settings, weights


def _items(data: bytes) -> Iterator[tuple[str, int, tuple[int, ...], bytes]]:
    version, count = struct.unpack_from("<QQ", data)
    if version != 1 or count > len(data) // 32:
        raise ValueError(f"version {version} and {count} weights")
    headers = list(struct.iter_unpack("<4Q", data[16 : 16 + 32 * count]))
    at = 16 + 32 * count
    names, shapes = [], []
    for length, *_ in headers:
        names.append(data[at : at + length].rstrip(b"\0").decode())
        at += length
    for _, _, axes, _ in headers:
        shapes.append(struct.unpack_from(f"<{axes}i", data, at))
        at += 4 * axes
    at += 8 + struct.unpack_from("<Q", data, at)[0]
    for name, shape, (_, kind, _, size) in zip(names, shapes, headers, strict=True):
        if at + size > len(data):
            raise ValueError(f"an end inside {name}")
        yield name, kind, shape, data[at : at + size]
        at += size


def _weight(name: str, kind: int, shape: tuple[int, ...], raw: bytes) -> Tensor:
    size, transposed = math.prod(shape), shape[0] > 1 and name != "Wemb"
    if kind == FLOAT32:
        value = torch.from_numpy(np.frombuffer(raw, "<f4", size).copy()).view(shape)
        return value.T if transposed else value
    (multiplier,) = struct.unpack_from("<f", raw, size)
    value = torch.from_numpy(np.frombuffer(raw, np.int8, size) / np.float32(multiplier))
    return value.view(shape[::-1] if transposed else shape)


#: Our names of a layer's parts, and Marian's; "{context}" is "self" in the encoder.
PARTS = {
    "attend.q_proj": ("{context}_Wq", "{context}_bq"),
    "attend.k_proj": ("{context}_Wk", "{context}_bk"),
    "attend.v_proj": ("{context}_Wv", "{context}_bv"),
    "attend.out_proj": ("{context}_Wo", "{context}_bo"),
    "norm": ("{context}_Wo_ln_scale", "{context}_Wo_ln_bias"),
    "ffn.up": ("ffn_W1", "ffn_b1"),
    "ffn.down": ("ffn_W2", "ffn_b2"),
    "ffn.norm": ("ffn_ffn_ln_scale", "ffn_ffn_ln_bias"),
    "update": ("rnn_W",),
    "forget": ("rnn_Wf", "rnn_bf"),
    "cell_norm": ("rnn_ffn_ln_scale", "rnn_ffn_ln_bias"),
}


def marian_name(ours: str) -> str:
    """Marian's name of one of our parameters.

    >>> marian_name("decoder.0.attend.q_proj.bias")
    'decoder_l1_context_bq'
    """
    if not ours.startswith(("encoder.", "decoder.")):
        return {"embedding.weight": "Wemb", "output_bias": "decoder_ff_logit_out_b"}[ours]
    stack, layer, rest = ours.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    theirs = PARTS[part][kind == "bias"].format(context="self" if stack == "encoder" else "context")
    return f"{stack}_l{int(layer) + 1}_{theirs}"
