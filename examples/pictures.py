"""Pictures of yours, read whole or refused in one line."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image

from manyheads.errors import ArgumentError


def read_picture(file: Path) -> Image.Image:
    """A file's picture, RGB; what is transparent is paper.

    Raises: ArgumentError for a file that is no picture, a damaged one, or one so large that Pillow
    takes it for an attack on the memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                if picture.mode.startswith("I;16"):  # convert would cut what is above 255
                    picture = picture.point(lambda value: value / 256).convert("L")
                picture = picture.convert("RGBA")
    except (
        OSError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as problem:
        said = str(problem).rstrip(".")
        raise ArgumentError(
            f"could not read {file}: {said}. Expected: a picture such as a .png or .jpg, of at "
            f"most {Image.MAX_IMAGE_PIXELS} pixels. Convert it, or scale it down."
        ) from problem
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
