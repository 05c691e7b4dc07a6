"""What is measured of the examples, part by part, for results.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import results_words as words

Found = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One thing that is measured.

    name: the use it belongs to, a dash, and what it is; of a use with one part, the use alone.
    measure: given a folder of its own, for checkpoints: what was found, as JSON can hold it.
    describe: says that in Markdown.
    """

    name: str
    title: str
    measure: Callable[[Path], Found]
    describe: Callable[[Found], str]

    @property
    def use(self) -> str:
        return self.name.split("-")[0]


# An example is imported when it is measured: one that lacks a package fails alone.


def packaged_translation(folder: Path) -> Found:
    """All measures of translate.py, and a few strings."""
    from translate import Translator, django_sample, measures

    found, rows = measures(), django_sample()[:4]
    sources, references = zip(*rows, strict=True)
    written = Translator().sentences(sources)
    samples = [list(row) for row in zip(sources, written, references, strict=True)]
    return {"measures": found, "samples": samples}


def trained_translation(folder: Path) -> Found:
    """A whole training of train_translation.py."""
    from train_translation import measures

    return measures(folder)


def summarisation(folder: Path) -> Found:
    """A whole training of summarise.py, and SmolLM2 prompted."""
    from summarise import measures

    return measures(folder)


def chat(folder: Path) -> Found:
    """A scripted conversation, on both attentions."""
    from chat import measures

    return measures()


def perplexity(folder: Path) -> Found:
    """A text's perplexity, on both attentions."""
    from perplexity import measures

    return measures()


def trained_language_model(folder: Path) -> Found:
    """A whole training of train_language_model.py, and what the model writes."""
    from train_language_model import PROMPTS, SETTINGS, debian, measures, prepare, write

    corpus = prepare(debian())
    found, model = measures(corpus, SETTINGS, folder)
    return found | {"samples": [write(corpus, model, prompt) for prompt in PROMPTS]}


def compared_language_models(folder: Path) -> Found:
    """Short trainings from three seeds, on both attentions."""
    from train_language_model import compare, debian, prepare

    return compare(prepare(debian()))


def speech(folder: Path) -> Found:
    """Error rates on the ten clips, and the first one's words with their times."""
    from audio import read_audio
    from speech_clips import clips
    from transcribe import measure, transcribe
    from whisper_model import load

    path, _ = clips()[0]
    text, timed = transcribe(load(), read_audio(path), times=True)
    return measure() | {"text": text, "word_times": [asdict(word) for word in timed]}


def images(name: str) -> Callable[[Path], Found]:
    """Trainings from three seeds, on both attentions."""

    def measure(folder: Path) -> Found:
        from images import compare

        return {"name": name} | compare(name)

    return measure


def lines_of_text(folder: Path) -> Found:
    """Lines drawn and read, beside ONNX Runtime."""
    from read_text import LINES, measures

    return measures() | {"drawn": list(LINES)}


#: Each use: its heading, and its page under docs/examples.
USES = {
    "translation": ("Translation", "translation.md"),
    "summarisation": ("Summarisation", "summarisation.md"),
    "generation": ("Text generation", "generation.md"),
    "speech": ("Speech", "speech.md"),
    "images": ("Images", "images.md"),
}

PARTS = (
    Part("translation-packaged", "Firefox's English to Portuguese",
         packaged_translation, words.packaged_translation),
    Part("translation-trained", "English to German, trained from nothing",
         trained_translation, words.trained_translation),
    Part("summarisation", "Debian's package descriptions", summarisation, words.summarisation),
    Part("generation-chat", "Chat with SmolLM2-135M", chat, words.chat),
    Part("generation-perplexity", "Perplexity of SmolLM2-135M", perplexity, words.perplexity),
    Part("generation-trained", "A language model, trained from nothing",
         trained_language_model, words.trained_language_model),
    Part("generation-compared", "Language models, packed and padded",
         compared_language_models, words.compared_language_models),
    Part("speech", "Whisper tiny.en on ten clips", speech, words.speech),
    Part("images-mnist", "MNIST", images("mnist"), words.images),
    Part("images-digits", "scikit-learn's digits", images("digits"), words.images),
    Part("images-lines", "PP-OCRv4 on lines of text", lines_of_text, words.lines_of_text),
)  # fmt: skip
