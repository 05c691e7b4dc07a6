"""A picture of which sound each word came from: sound above, cross-attention below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import whisper_model
from audio import RATE, Array
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from word_times import SECONDS_PER_FRAME, Word

INK, FAINT = "#1f2430", "#8a93a6"


def draw(
    loaded: whisper_model.Whisper, samples: Array, weights: Array, words: list[Word], path: Path
) -> None:
    """Write a .png: waveform, spectrogram, and the words' attention with their times outlined.

    samples: [samples] at 16 kHz. weights: [words, frames], what each word attends to. words: the
        same words, with their times.
    """
    seconds = len(samples) / RATE
    figure = Figure(figsize=(10, 1.9 + 0.21 * len(words)), dpi=112, layout="constrained")
    wave, sound, map_ = figure.subplots(
        3, 1, sharex=True, height_ratios=[0.5, 0.9, 0.21 * len(words)]
    )
    wave.plot(np.arange(len(samples)) / RATE, samples, color=INK, linewidth=0.3)
    features = loaded.processor(samples, sampling_rate=RATE, return_tensors="np").input_features[0]
    sound.imshow(
        features[:, : int(seconds * 100)], aspect="auto", origin="lower", cmap="Greys",
        extent=(0, seconds, 0, len(features)),
    )  # fmt: skip
    for axes, name in ((wave, "waveform"), (sound, "mel bands")):
        axes.set_yticks([])
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=FAINT)
    map_.imshow(
        weights, aspect="auto", cmap="viridis", norm=PowerNorm(0.5), interpolation="nearest",
        extent=(0, weights.shape[1] * SECONDS_PER_FRAME, len(words) - 0.5, -0.5),
    )  # fmt: skip
    for row, word in enumerate(words):
        corner, width = (word.start, row - 0.5), word.end - word.start
        map_.add_patch(Rectangle(corner, width, 1, edgecolor="white", facecolor="none"))
        for axes in (wave, sound):
            axes.axvline(word.start, color=FAINT, linewidth=0.5)
    map_.set_yticks(range(len(words)), [word.text for word in words], fontsize=9, color=INK)
    map_.set_xlim(0, seconds)
    map_.set_xlabel("seconds", fontsize=9, color=INK)
    for axes in (wave, sound, map_):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=9)
    figure.savefig(path)
