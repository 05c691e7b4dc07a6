"""Read a line of text in a picture: PP-OCRv4's recogniser, its attention on manyheads.

    python examples/read_text.py                     lines drawn here, error rate, difference
    python examples/read_text.py line.png ...        your own pictures, each of one line of text

The model (15 MB, fetched once) is an ONNX file: a convolutional network turns the picture into a
row of columns, two attention blocks (120 channels, 8 heads x 15) let columns look at each other,
and a head gives each column's probabilities of 6,624 characters and of none. Here ONNX Runtime runs
what is before and after the blocks, and the blocks run in PyTorch, with their weights, on
`manyheads.MultiHeadAttention`. ONNX Runtime on the whole model says what should come out.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import jiwer
import numpy as np
from numpy.typing import NDArray
from pictures import read_picture
from PIL import Image, ImageDraw, ImageFont
from recogniser import RECOGNISER, Recogniser

from manyheads.demo_models import fetch
from manyheads.errors import ArgumentError, ManyHeadsError

HEIGHT = 48
WIDEST = 100 * HEIGHT  # attention's time grows with its square
LINES = (
    "The quick brown fox jumps over the lazy dog.",
    "Attention is all you need (2017), pages 5998-6008",
    "Invoice 20417: 3 x 12.50 + 19% = 44.63 EUR",
    "Many heads look at many places at once, and each of them may read another part of the line.",
    "ISBN 978-0-262-03561-3",
    "wait... what? Yes! See https://example.org/a/b?c=d&e=f",
)


def draw(text: str) -> Image.Image:
    """The text in Pillow's own font, black on white, one line."""
    font = ImageFont.load_default(30)
    picture = Image.new("RGB", (int(font.getlength(text)) + 20, HEIGHT), "white")
    ImageDraw.Draw(picture).text((10, HEIGHT // 2), text, "black", font, anchor="lm")
    return picture


def pixels(picture: Image.Image) -> NDArray[np.float32]:
    """[1, 3, 48, width], values from -1 to 1, blue first; narrow pictures are filled up."""
    width = max(1, round(picture.width * HEIGHT / picture.height))
    if width > WIDEST:
        raise ArgumentError(
            f"got a picture of {picture.width} x {picture.height} pixels; expected one line of "
            f"text, at most {WIDEST // HEIGHT} times as wide as high. Cut it into lines, or parts."
        )
    scaled = picture.convert("RGB").resize((width, HEIGHT), Image.Resampling.BILINEAR)
    values = np.zeros((1, 3, HEIGHT, max(width, 320)), np.float32)
    values[0, :, :, :width] = np.asarray(scaled)[:, :, ::-1].transpose(2, 0, 1) / 127.5 - 1
    return values


def compare(recogniser: Recogniser, picture: Image.Image) -> dict[str, Any]:
    """One picture read by both, and how far apart they are."""
    values = pixels(picture)
    ours, columns = recogniser.parts(values)
    whole, whole_columns = recogniser.whole(values)
    return {
        "text": recogniser.decode(ours),
        "same_text": recogniser.decode(ours) == recogniser.decode(whole),
        "difference": float(np.abs(ours - whole).max()),
        "column_difference": float(np.abs(columns - whole_columns).max()),
        "largest_column": float(np.abs(whole_columns).max()),
    }


def measures(recogniser: Recogniser | None = None) -> dict[str, Any]:
    """LINES drawn and read: character error rate, and the largest differences to ONNX Runtime.

    `difference` is of probabilities, `column_difference` of what the attention blocks put out.
    """
    recogniser = Recogniser(fetch(RECOGNISER)) if recogniser is None else recogniser
    start = time.perf_counter()
    found = [compare(recogniser, draw(line)) for line in LINES]
    return {
        "lines": len(LINES),
        "texts": [line["text"] for line in found],
        "character_error_rate": jiwer.cer(list(LINES), [line["text"] for line in found]),
        "same_text": all(line["same_text"] for line in found),
        **{
            name: max(line[name] for line in found)
            for name in ("difference", "column_difference", "largest_column")
        },
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="a line of text each")
    options = parser.parse_args()
    try:
        recogniser = Recogniser(fetch(RECOGNISER))
        for name in options.pictures:
            line = compare(recogniser, read_picture(name))
            print(f"{line['text']}\n  [{line['difference']:.1e} from ONNX Runtime]")
    except (ManyHeadsError, OSError) as problem:
        sys.exit(f"read_text: {problem}")
    if options.pictures:
        return
    found = measures(recogniser)
    print(*found["texts"], sep="\n")
    print(f"character error rate {found['character_error_rate']:.2%}; ", end="")
    print("ONNX Runtime reads the same" if found["same_text"] else "ONNX Runtime reads OTHERWISE")
    print(f"largest difference of a probability {found['difference']:.1e};", end=" ")
    print(f"of the columns after the blocks {found['column_difference']:.1e},", end=" ")
    print(f"which reach {found['largest_column']:.1f}")


if __name__ == "__main__":
    main()
