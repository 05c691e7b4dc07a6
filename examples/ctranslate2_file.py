"""A Whisper model as CTranslate2 stores it: the file, and what transformers calls its weights.

Source of the format: CTranslate2's python/ctranslate2/specs/model_spec.py, binary version 6. All is
little-endian; strings are a u16 length with the final zero, and the bytes:

    u32 version, string kind of model, u32 its revision,
    u32 n, n variables: string name, u8 rank, u32 sizes..., u8 type, u32 bytes, the numbers,
    u32 n, n aliases: string name, string the variable it stands for
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from manyheads.errors import ArgumentError

#: The type numbers of the format; 5 is bfloat16, which numpy does not have.
DTYPES = {n: np.dtype(name) for n, name in enumerate(("<f4", "<i1", "<i2", "<i4", "<f2"))}
Arrays = dict[str, np.ndarray[Any, Any]]

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


def read_ctranslate2(path: Path) -> Arrays:
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


def renamed(variables: Arrays) -> Arrays:
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
