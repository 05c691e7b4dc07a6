"""Recordings as Whisper wants them: one channel, 16 kHz, at most 30 s at a time."""

from __future__ import annotations

import struct
import sys
import warnings
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import wavfile
from scipy.signal import resample_poly

from manyheads.errors import ArgumentError

RATE = 16_000
CHUNK_SECONDS = 30  # what Whisper hears at once
SEARCH_SECONDS = 5  # a long recording is cut where it is quietest in the last so many of a chunk
Array = np.ndarray[Any, Any]


def read_audio(path: Path) -> Array:
    """A .wav file of any rate: [samples], float in [-1, 1], its channels averaged.

    Of a file that is cut short there is what is left, and a line on stderr says so.

    Raises: ArgumentError for a file that cannot be read, or holds no sound.
    """
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            rate, samples = wavfile.read(path)
    except (OSError, ValueError, ZeroDivisionError, struct.error) as problem:
        raise ArgumentError(
            f"could not read {path}: {problem}. Expected: a .wav file. Convert other formats "
            "first, such as with: ffmpeg -i recording.mp3 recording.wav"
        ) from problem
    if any("EOF" in str(warning.message) for warning in said):
        print(f"{path} is cut short: only its first part is heard.", file=sys.stderr)
    if samples.dtype == np.uint8:
        samples = (samples - 128.0) / 128
    elif samples.dtype.kind == "i":
        samples = samples / -float(np.iinfo(samples.dtype).min)
    if not samples.size or rate <= 0 or not np.isfinite(samples).all():
        raise ArgumentError(
            f"{path} holds no sound: got {len(samples)} samples at {rate} Hz, expected at least "
            "one, all finite. Record or convert it again."
        )
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    both = gcd(rate, RATE)
    return samples if rate == RATE else resample_poly(samples, RATE // both, rate // both)


def cut(samples: Array) -> list[Array]:
    """Pieces of at most 30 s, cut at the quietest tenth of a second near the end of each."""
    pieces, step = [], RATE // 10
    first, longest = (CHUNK_SECONDS - SEARCH_SECONDS) * RATE, CHUNK_SECONDS * RATE
    while len(samples) > longest:
        loudness = (samples[first:longest].reshape(-1, step) ** 2).mean(axis=1)
        at = first + int(loudness.argmin()) * step + step // 2
        pieces.append(samples[:at])
        samples = samples[at:]
    return [*pieces, samples]
