"""Makes the pictures of README.md: what heads look at, in text and in speech.

make pictures    (needs Chromium, and apt for the speech; the models are fetched the first time)
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from manyheads.head_commands import see

PICTURES = Path(__file__).parent / "pictures"
TEXT = (
    "When Mary and John went to the store, John gave a drink to Mary. When Alice and Bob went to "
    "the park, Bob gave a flower to Alice. When Mary and John went to the beach, Mary gave a shell "
    "to John."
)
#: Layer 18, head 6 of SmolLM2-135M, which `manyheads heads` calls an induction head; query 29.
TOKEN = "#token/18/6/29"


def main() -> None:
    """Make all of them."""
    PICTURES.mkdir(exist_ok=True)
    speech()
    heads()


def speech() -> None:
    """Draw the words of one clip over its sound."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import speech_clips
    import transcribe
    import whisper_model

    (clip,) = (path for path, _ in speech_clips.clips() if path.stem.endswith("0920"))
    samples = transcribe.read_audio(clip)
    transcribe.picture(whisper_model.load(), samples, PICTURES / "alignment.png")


def heads() -> None:
    """Write the page, open it in Chromium, take pictures."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder) / "attention.html"
        see(TEXT, output=page_file)
        chromium = playwright.chromium.launch(
            executable_path=os.environ["MANYHEADS_CHROMIUM"],
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        for name, at, scheme in (("all-heads", "", "light"), ("one-token", TOKEN, "dark")):
            page = chromium.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
            page.goto(page_file.as_uri() + at)
            page.wait_for_selector("body[data-ready]", state="attached")
            page.wait_for_timeout(1000)  # maps are drawn a few at a time
            page.screenshot(path=PICTURES / f"{name}.png")
        chromium.close()


if __name__ == "__main__":
    main()
