"""Speech to text with Whisper on our attention, and when each word was spoken.

python examples/transcribe.py clip.wav [--words] [--picture out.png] [--model FOLDER_OR_ID]
python examples/transcribe.py           # ten clips that come with Debian, and the error rates

Recordings may have any rate and length. The model and the clips are fetched once.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import speech_clips
import torch
import transformers
import whisper_model
import word_times
from audio import RATE, Array, cut, read_audio
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
from word_times import CROSS_ATTENTION, LAST_ROW, Word, alignment_map, rows_of, warp

import manyheads as mh


@dataclass(frozen=True, slots=True)
class Heard:
    """The text of at most 30 s, as tokens; with times, the attention that decided on them.

    frames: how many of the encoder's frames hold sound.
    rows: [layers, heads, tokens, all frames], with a row for the token that ends the text, if the
        model came to an end. None: not asked for, or there is no text.
    """

    tokens: list[int]
    frames: int
    rows: Tensor | None = None


@torch.no_grad()
def hear(loaded: whisper_model.Whisper, samples: Array, times: bool = False) -> Heard:
    """Generate the text of at most 30 s greedily; with `times`, watched by `mh.observe`."""
    sound = loaded.processor(
        samples, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True
    )
    # Observing runs the model on manyheads, whatever attention it was loaded with.
    watch = mh.observe(loaded.model, LAST_ROW, layers=CROSS_ATTENTION) if times else nullcontext()
    with watch as seen:
        made = loaded.model.generate(
            **sound, do_sample=False, num_beams=1, return_timestamps=False,
            return_dict_in_generate=True,
        )  # fmt: skip
    # The token that ends a text has the lowest number of all that are not text.
    whole, end = made.sequences[0].tolist(), loaded.processor.tokenizer.eos_token_id
    text = [n for n, token in enumerate(whole) if token < end]
    rows = None
    if times and text:
        chosen = text if whole[-1] < end else [*text, len(whole) - 1]
        rows = rows_of(seen, len(whole) - text[0])[:, :, [n - text[0] for n in chosen]]
    return Heard([whole[n] for n in text], max(1, int(sound.attention_mask.sum()) // 2), rows)


def aligning_heads(model: Any) -> list[tuple[int, int]]:
    """(layer, head) of the decoder's heads that look where a token was spoken.

    Checkpoints list them; tiny.en's list is that of OpenAI's whisper/__init__.py. Without a list,
    as whisper/model.py does: every head in the second half of the layers.
    """
    listed = getattr(model.generation_config, "alignment_heads", None)
    if listed:
        return [(layer, head) for layer, head in listed]
    layers, heads = model.config.decoder_layers, model.config.decoder_attention_heads
    return [(layer, head) for layer in range(layers // 2, layers) for head in range(heads)]


def words_of(loaded: whisper_model.Whisper, pieces: list[Array], parts: list[Heard]) -> list[Word]:
    """The words of a recording's pieces, with their times from its beginning."""
    words: list[Word] = []
    heads, offset = aligning_heads(loaded.model), 0.0
    for piece, part in zip(pieces, parts, strict=True):
        if part.rows is not None:
            begins = warp(alignment_map(part.rows, heads, part.frames))
            begins = np.append(begins, part.frames)[: len(part.tokens) + 1]
            words += word_times.words_of(texts_of(loaded, part.tokens), begins, offset)
        offset += len(piece) / RATE
    return words


def texts_of(loaded: whisper_model.Whisper, tokens: list[int]) -> list[str]:
    """Each token's own text."""
    return [loaded.processor.tokenizer.decode([token]) for token in tokens]


def transcribe(
    loaded: whisper_model.Whisper, samples: Array, times: bool = False
) -> tuple[str, list[Word]]:
    """(the text of a recording of any length, its words with their times if asked for)."""
    pieces = cut(samples)
    parts = [hear(loaded, piece, times) for piece in pieces]
    texts = (loaded.processor.tokenizer.decode(part.tokens).strip() for part in parts)
    return " ".join(texts).strip(), words_of(loaded, pieces, parts)


def picture(loaded: whisper_model.Whisper, samples: Array, path: Path) -> None:
    """Draw the words over the sound of a recording (of its first 30 s) into a .png file."""
    from alignment_picture import draw  # matplotlib takes a second to import

    piece = cut(samples)[0]
    part = hear(loaded, piece, times=True)
    if part.rows is None:
        raise mh.ArgumentError("no picture: got a recording without words, expected some speech.")
    texts, heads = texts_of(loaded, part.tokens), aligning_heads(loaded.model)
    weights = word_times.word_weights(part.rows, heads, texts)[:, : part.frames]
    draw(loaded, piece, weights, words_of(loaded, [piece], [part]), path)


def measure(model: str | None = None, attention: str = "manyheads") -> dict[str, float | int]:
    """Error rates on the ten clips with our attention (or another), beside PyTorch's.

    wer: in lower case without punctuation, as the clips' transcripts are written.
    wer_normalised: after OpenAI's normaliser of English, for which "10" is "ten", "Mr." "mister".
    """
    clips = [(read_audio(path), said) for path, said in speech_clips.clips()]
    pair = [whisper_model.load(model, name) for name in (attention, "sdpa")]
    heard, seconds = ([], []), [0.0, 0.0]  # type: tuple[list[str], list[str]], list[float]
    for loaded in pair:
        hear(loaded, np.zeros(RATE))  # the first call sets things up
    for samples, _ in clips:
        for n, loaded in enumerate(pair):
            begin = time.process_time()
            heard[n].append(transcribe(loaded, samples)[0])
            seconds[n] += time.process_time() - begin
    said, normal = [text for _, text in clips], EnglishTextNormalizer({})
    plain = jiwer.process_words(said, [speech_clips.plain(text) for text in heard[0]])
    same = jiwer.process_words([normal(text) for text in said], [normal(text) for text in heard[0]])
    return {
        "clips": len(clips),
        "audio_seconds": sum(len(samples) for samples, _ in clips) / RATE,
        "words": plain.hits + plain.substitutions + plain.deletions,
        "errors": plain.substitutions + plain.deletions + plain.insertions,
        "wer": plain.wer,
        "wer_normalised": same.wer,
        "texts_as_sdpa": sum(ours == theirs for ours, theirs in zip(*heard, strict=True)),
        "cpu_seconds": seconds[0],
        "cpu_seconds_sdpa": seconds[1],
    }


def show(console: Console, words: list[Word], as_table: bool) -> None:
    """Words and times, as lines for programs or a table for people."""
    table = Table("word", "from", "to", title="seconds")
    for word in words:
        table.add_row(word.text, f"{word.start:.2f}", f"{word.end:.2f}")
        if not as_table:
            print(f"{word.start:.2f}\t{word.end:.2f}\t{word.text}")
    if as_table:
        console.print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help=".wav files; none: ten clips, measured")
    parser.add_argument("--model", help="a folder or Hugging Face id; left out: tiny.en, packaged")
    parser.add_argument("--attention", default="manyheads", help="manyheads, sdpa or eager")
    parser.add_argument("--timestamps", action="store_true", help="each word with its seconds")
    parser.add_argument("--words", action="store_true", help="the same as a table")
    parser.add_argument("--picture", type=Path, help="a .png file to draw words over sound into")
    chosen, console = parser.parse_args(), Console()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if not chosen.files:
            for name, value in measure(chosen.model, chosen.attention).items():
                print(f"{name:18} {value:.4g}")
            return
        loaded = whisper_model.load(chosen.model, chosen.attention)
        times = chosen.timestamps or chosen.words
        for path in chosen.files:
            samples = read_audio(path)
            text, words = transcribe(loaded, samples, times)
            console.print(text, markup=False, highlight=False)
            if times:
                show(console, words, chosen.words)
            if chosen.picture:
                picture(loaded, samples, chosen.picture)
    except mh.ManyHeadsError as problem:
        sys.exit(f"transcribe.py: {problem}")


if __name__ == "__main__":
    main()
