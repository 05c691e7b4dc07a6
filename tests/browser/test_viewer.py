"""The real page in a real Chromium: `make test-browser` runs this, `make test` does not.

No page may write to the console or ask for anything but itself; each test ends by looking.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from observed import HOSTILE, measured, plausible, words
from playwright.sync_api import Browser, Page, expect, sync_playwright

import manyheads as mh

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ALL = (
    mh.HeatMap(),
    mh.TopKeys(4),
    mh.Entropy(),
    mh.MeanDistance(),
    mh.Received(),
)
LENGTH = 32_768


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = os.environ.get("MANYHEADS_CHROMIUM") or "/usr/bin/chromium"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="session")
def long_page(folder: Path) -> Path:
    """32k tokens, 12 layers, 12 heads; one head's single tokens besides those that fit anyway."""
    seen = plausible(LENGTH, layers=12, heads=12)
    page = mh.view(seen, words(LENGTH), detail=[(0, 0), (3, 5)])
    assert len(page.html.encode()) < 3e6
    return page.save(folder / "long.html")


@pytest.fixture(scope="session")
def short_page(folder: Path) -> Path:
    seen = measured(*ALL, lengths=(23, 23), layers=3, heads=5)
    return mh.view(seen, words(23)).save(folder / "short.html")


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens a file; at the end nothing may have been written to a console or fetched."""
    complaints: list[str] = []
    contexts = []

    def open_one(path: Path, at: str = "", **options: object) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        own = path.as_uri()

        def requested(request) -> None:
            if not request.url.startswith((own, "blob:", "data:")):
                complaints.append(f"request: {request.url}")

        page.on("request", requested)
        page.goto(own + at)
        expect(page.locator("body[data-ready]")).to_be_attached(timeout=30_000)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not complaints


def ink(page: Page, selector: str) -> int:
    """How many different colours a canvas shows."""
    expect(page.locator(selector).first).to_be_attached()
    return page.eval_on_selector(
        selector,
        """(canvas) => new Set(new Uint32Array(canvas.getContext("2d")
            .getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size""",
    )


def tip(page: Page) -> str:
    return page.locator("#tip").inner_text()


def heading(page: Page) -> str:
    return page.locator("#stage h2").inner_text()


# --- a text of 32,768 tokens ----------------------------------------------------------------------


def test_a_long_text_paints_soon(open_page: Open, long_page: Path) -> None:
    """The best of three: others may be busy on this machine."""
    painted = []
    for _ in range(3):
        page = open_page(long_page)
        painted.append(
            page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        )
    assert min(painted) < 2000
    assert page.locator(".thumb").count() == 144
    assert ink(page, ".thumb canvas") > 20
    assert page.locator(".band").count() == 12
    # A screenful of the text is there, and no more.
    assert 0 < page.locator(".t").count() < 3000
    expect(page.locator(".lead")).to_contain_text("144 heads in 12 layers over 32,768 queries")


def test_overview_to_head_to_single_tokens(open_page: Open, long_page: Path) -> None:
    page = open_page(long_page)
    page.locator('.thumb[data-layer="3"][data-head="5"]').hover()
    assert "layer 3, head 5" in tip(page) and "entropy" in tip(page)
    page.locator('.thumb[data-layer="3"][data-head="5"]').click()
    assert heading(page) == "Layer 3, head 5"
    note = page.locator(".pixel")
    expect(note).to_contain_text("Zoom in for single tokens")
    box = page.locator("canvas.map").bounding_box()
    assert box is not None
    # On the diagonal, where the weight is.
    x, y = box["x"] + 46 + (box["width"] - 50) / 2, box["y"] + 22 + (box["height"] - 26) / 2
    page.mouse.move(x, y)
    assert "cell of" in tip(page) and "±" in tip(page)
    for _ in range(24):
        page.mouse.wheel(0, -120)
    expect(note).to_contain_text("weights of each query's 8 heaviest keys")
    assert ink(page, "canvas.map") > 5
    page.mouse.move(x + 3, y + 3)
    assert "heaviest" in tip(page)
    page.keyboard.press("0")
    expect(note).to_contain_text("Zoom in for single tokens")


def test_a_head_without_single_tokens_says_how_to_get_them(
    open_page: Open, long_page: Path
) -> None:
    page = open_page(long_page, "#token/7/2/20000")
    message = page.locator(".message")
    expect(message).to_contain_text("Pooled")
    expect(message).to_contain_text('detail=[("model.layers.7.self_attn", 2)]')
    expect(page.locator(".cells tbody tr")).to_have_count(12)


def test_one_token_over_the_text(open_page: Open, long_page: Path) -> None:
    page = open_page(long_page, "#token/0/0/20000")
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(8)
    # The text has come to the token, and what it attends to is tinted.
    query = page.locator(".t.is-query")
    expect(query).to_be_in_viewport()
    assert query.get_attribute("data-i") == "20000"
    keys = [
        int(n.replace(",", "")) for n in page.locator("tbody td:nth-child(3)").all_inner_texts()
    ]
    near = [key for key in keys if page.locator(f'.t[data-i="{key}"]').count()]
    assert near
    for key in near:
        expect(page.locator(f'.t[data-i="{key}"]')).to_have_class(re.compile(r"\bon\b"))
    rows.first.click()
    expect(page.locator(f'.t[data-i="{keys[0]}"]')).to_be_in_viewport()
    page.get_by_role("button", name="Which tokens attend to it").click()
    expect(page.locator(".tokenbody .note")).to_contain_text("queries have it among their 8")


def test_search_in_a_long_text(open_page: Open, long_page: Path) -> None:
    page = open_page(long_page, "#head/0/0")
    text = words(LENGTH)
    found = [i for i in range(LENGTH - 1) if text[i : i + 2] == [" attention", " head"]]
    page.keyboard.press("/")
    page.keyboard.type("ATTENTION head")
    count = page.locator("#count")
    expect(count).to_have_text(f"1 of {len(found):,}")
    for at in found[1:4]:
        page.keyboard.press("Enter")
        expect(page.locator(f'.t.found[data-i="{at}"]')).to_be_in_viewport()
    page.keyboard.press("Shift+Enter")
    expect(count).to_have_text(f"3 of {len(found):,}")
    page.keyboard.press("Escape")
    expect(page.locator(".t.found")).to_have_count(0)


# --- keyboard, hover, width, theme ----------------------------------------------------------------


def test_the_keyboard_alone(open_page: Open, short_page: Path) -> None:
    page = open_page(short_page)
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.thumb')"):
            break
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused.startswith("layer 1, head 1, mean entropy")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert heading(page) == "Layer 1, head 1"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert heading(page) == "Layer 0, head 2"
    page.keyboard.press("ArrowUp")
    assert heading(page) == "Layer 0, head 2"
    page.locator(".text").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert "token 4" in heading(page)
    page.locator("#stage").focus()
    page.keyboard.press(".")
    assert "token 5" in heading(page)
    page.keyboard.press("Escape")
    assert heading(page) == "Layer 0, head 2"
    page.keyboard.press("Escape")
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused.startswith("layer 0, head 2")
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#keys")).to_be_hidden()
    page.go_back()
    assert heading(page) == "Layer 0, head 2"


def test_hovering_a_token_shows_what_it_attends_to(open_page: Open, short_page: Path) -> None:
    page = open_page(short_page, "#head/1/2")
    note = page.locator(".reader .note")
    expect(note).to_contain_text("entropy")
    page.locator('.t[data-i="20"]').hover()
    expect(note).to_contain_text("attends to")
    assert "token 20" in tip(page) and "nats" in tip(page)
    expect(page.locator(".t.on")).to_have_count(4)
    page.mouse.move(5, 5)
    expect(note).to_contain_text("entropy")


def test_numbers_are_those_measured(open_page: Open, short_page: Path) -> None:
    seen = measured(*ALL, lengths=(23, 23), layers=3, heads=5)
    (record,) = seen["layers.2.attn"]
    page = open_page(short_page, "#token/2/3/17")
    weight = page.locator("tbody .weight").first.inner_text()
    top = record[mh.TopKeys(4)]
    assert float(weight) == pytest.approx(top.weights[0, 3, 17, 0].item(), abs=2e-4)
    assert page.locator("tbody td:nth-child(3)").first.inner_text() == str(
        top.keys[0, 3, 17, 0].item()
    )
    entropy, distance = re.findall(r"[0-9.]+(?= nats| tokens)", page.locator(".facts").inner_text())
    assert float(entropy) == pytest.approx(record[mh.Entropy()][0, 3, 17].item(), abs=1e-3)
    assert float(distance) == pytest.approx(record[mh.MeanDistance()][0, 3, 17].item(), abs=1e-2)


@pytest.mark.parametrize("at", ["", "#head/1/1", "#token/1/1/9"])
def test_a_phone(open_page: Open, short_page: Path, at: str) -> None:
    page = open_page(short_page, at, viewport={"width": 360, "height": 740}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for control in page.locator("button:visible, select:visible, input:visible").all():
        box = control.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_the_theme_follows_the_system_and_the_button(open_page: Open, short_page: Path) -> None:
    page = open_page(short_page, color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(20, 20, 23)"
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="light")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    for palette in ("viridis", "cividis", "grey"):
        page.select_option("#palette", palette)
        assert ink(page, ".thumb canvas") > 20
    page.select_option("#scale", "all")
    expect(page.locator(".legends")).to_contain_text("same scale for all heads")


# --- two inputs -----------------------------------------------------------------------------------


def test_two_inputs_side_by_side(open_page: Open, folder: Path) -> None:
    one, two = (measured(*ALL, lengths=(19, 19), seed=s) for s in (1, 2))
    page_file = mh.view(one, words(19), compare=(two, [*words(17), " other", " here"]))
    page = open_page(page_file.save(folder / "two.html"))
    expect(page.locator(".reader")).to_have_count(2)
    # Both texts end where the window does, however many lines the bar takes.
    page.set_viewport_size({"width": 900, "height": 700})
    page.wait_for_function("Math.abs(texts.getBoundingClientRect().bottom - innerHeight) < 1")
    page.set_viewport_size({"width": 1280, "height": 900})
    assert page.locator(".thumb").first.locator("canvas").count() == 2
    page.locator(".thumb").nth(1).click()
    expect(page.locator("canvas.map")).to_have_count(2)
    expect(page.locator(".strip figcaption").first).to_contain_text("B mean")
    # Zooming one zooms the other.
    whole = page.locator("canvas.map").nth(1).screenshot()
    page.locator("canvas.map").first.hover()
    for _ in range(5):
        page.mouse.wheel(0, -120)
    page.mouse.move(5, 5)
    page.wait_for_timeout(200)
    assert page.locator("canvas.map").nth(1).screenshot() != whole
    page.select_option("#mode", "difference")
    expect(page.locator("canvas.map")).to_have_count(1)
    expect(page.locator(".legend")).to_contain_text("A less B")
    page.select_option("#mode", "B")
    expect(page.locator(".reader")).to_have_count(1)
    expect(page.locator(".text")).to_contain_text("other here")


def test_cross_attention_shows_two_texts(open_page: Open, folder: Path) -> None:
    seen = measured(*ALL, lengths=(7, 29), causal=False)
    page_file = mh.view(seen, words(7), key_tokens=words(29))
    page = open_page(page_file.save(folder / "cross.html"), "#token/0/1/3")
    readers = page.locator(".reader")
    expect(readers).to_have_count(2)
    expect(readers.nth(0).locator(".is-query")).to_have_attribute("data-i", "3")
    expect(readers.nth(1).locator(".on")).to_have_count(4)


def test_without_maps_there_are_bands(open_page: Open, folder: Path) -> None:
    seen = measured(mh.Entropy(), lengths=(19, 19))
    page = open_page(mh.view(seen, words(19)).save(folder / "bands.html"))
    assert ink(page, ".thumb canvas") > 5
    page.locator(".thumb").nth(1).click()
    expect(page.locator(".message")).to_contain_text("observe with mh.HeatMap")
    page.locator('.t[data-i="4"]').click()
    expect(page.locator(".message")).to_contain_text("mh.TopKeys(8)")


# --- hostile text, notebooks, files ---------------------------------------------------------------


def test_hostile_tokens_are_text(open_page: Open, folder: Path) -> None:
    count = len(HOSTILE)
    seen = measured(*ALL, lengths=(count, count), layers=2, heads=2)
    page_file = mh.view(seen, HOSTILE, title="</title><img src=x>").save(folder / "hostile.html")
    for at in ("", "#head/1/1", f"#token/1/1/{count - 1}"):
        page = open_page(page_file, at)
        assert page.evaluate("window.hacked") is None
        assert page.locator("img, iframe, object").count() == 0
        shown = page.locator(".t").all_inner_texts()
        assert len(shown) == count
        assert shown[0] == HOSTILE[0] and shown[1] == HOSTILE[1]
        assert shown[5] == "‹U+202E›right to left override"
        assert shown[11] == "␀␁␇␛[31m"
        assert shown[15:18] == ["∅", "↵", "⇥"]
    for index in range(count):
        page.locator(f'.t[data-i="{index}"]').hover(force=True)
    page.locator(".t").first.click()
    page.keyboard.press("/")
    page.keyboard.type("</script>")
    expect(page.locator("#count")).to_have_text("1 of 2")
    assert page.evaluate("window.hacked") is None


def test_parts_of_letters(open_page: Open, folder: Path) -> None:
    """Four tokens of one emoji, a byte that is no letter, and what is nearly one of ours."""
    parts = [bytes([byte]).decode("utf-8", "surrogateescape") for byte in "💀".encode()]
    tokens = ["so", " ", *parts, "\udcff", "💀", "", "</script>"]
    seen = measured(*ALL, lengths=(len(tokens), len(tokens)))
    file = mh.view(seen, tokens).save(folder / "parts.html")
    page = open_page(file, "#token/1/1/9")
    shown = page.locator(".t").all_inner_texts()
    assert shown == ["so", " ", "💀", "·", "·", "·", "‹FF›", "💀", "∅", "</script>"]
    assert page.locator(".t.part").count() == 4
    page.locator('.t[data-i="4"]').hover()
    assert tip(page).startswith("💀 3/4")
    page = open_page(file, "#token/1/1/5")
    assert heading(page).startswith("💀 4/4")
    page.keyboard.press("/")
    page.keyboard.type("so 💀")
    expect(page.locator("#count")).to_have_text("1 of 1")


def test_a_notebooks_frame(open_page: Open, folder: Path) -> None:
    seen = measured(*ALL, lengths=(11, 11))
    frame = folder / "notebook.html"
    notebook = "<!doctype html><body data-ready>" + mh.view(seen, words(11))._repr_html_()
    frame.write_text(notebook, encoding="utf-8")
    inside = open_page(frame).frame_locator("iframe")
    expect(inside.locator(".thumb").first.locator("canvas")).to_be_attached()
    inside.locator(".thumb").nth(4).click()
    expect(inside.locator("#stage h2")).to_have_text("Layer 1, head 1")


@pytest.mark.parametrize("at", ["", "#head/1/1", "#token/1/1/9"])
def test_files(open_page: Open, folder: Path, at: str) -> None:
    tokens = ['a "quoted", token', "</text><script>", "\x00", *words(20)]
    seen = measured(*ALL, lengths=(23, 23))
    page = open_page(mh.view(seen, tokens).save(folder / "files.html"), at)
    contents = {}
    for kind in ("png", "svg", "csv"):
        page.locator("#export summary").click()
        with page.expect_download() as download:
            page.locator(f"#{kind}").click()
        assert download.value.suggested_filename.endswith(kind)
        contents[kind] = Path(download.value.path()).read_bytes()
    assert contents["png"].startswith(b"\x89PNG") and len(contents["png"]) > 2000
    parsed = page.evaluate(
        """(text) => { const found = new DOMParser().parseFromString(text, "image/svg+xml");
            return [found.querySelector("parsererror, script") === null,
                    found.querySelectorAll("text, rect, image").length]; }""",
        contents["svg"].decode(),
    )
    assert parsed[0] and parsed[1] > 5
    rows = list(csv.reader(io.StringIO(contents["csv"].decode())))
    assert len({len(row) for row in rows}) == 1 and len(rows) > 4
    if at.startswith("#head"):
        (record,) = seen["layers.1.attn"]
        assert len(rows) == 1 + 23 * 23
        assert float(rows[-1][-1]) == pytest.approx(record[ALL[0]][0, 1, -1, -1].item(), abs=1e-4)
