"""The served page in a real Chromium: the pooled map first, then the server's exact numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from observed import words
from playwright.sync_api import Page, expect, sync_playwright

import manyheads as mh
from manyheads.inspect import Server, serve

LENGTH, LAYER, HEAD, ROW = 307, 1, 2, 211
EXACT = mh.WeightRows((ROW,))


@pytest.fixture(scope="module")
def seen() -> mh.Seen:
    """Maps of 16 cells a side, and no single tokens: the page alone cannot tell a weight."""
    torch.manual_seed(11)
    attend = (mh.MultiHeadAttention(24, 3, mask=mh.Causal()) for _ in range(2))
    model = torch.nn.Sequential(*attend)
    measures = (mh.HeatMap(16, 16), mh.Entropy(), EXACT)
    with torch.no_grad(), mh.observe(model, *measures, keep_megabytes=1) as seen:
        model(3 * torch.randn(1, LENGTH, 24))
    return seen


@pytest.fixture
def server(seen: mh.Seen) -> Iterator[Server]:
    with serve(seen, words(LENGTH)) as running:
        yield running


@pytest.fixture
def page(server: Server) -> Iterator[Page]:
    """An open page; at the end nothing but the server may have been asked, and no console written.

    Those who close the server expect complaints, and clear them.
    """
    chromium = os.environ.get("MANYHEADS_CHROMIUM") or "/usr/bin/chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        complaints: list[str] = []
        opened.complaints = complaints  # type: ignore[attr-defined]
        opened.on("console", lambda message: complaints.append(f"console: {message.text}"))
        opened.on("pageerror", lambda error: complaints.append(f"error: {error}"))

        def requested(request: Any) -> None:
            if not request.url.startswith((server.url, "blob:", "data:")):
                complaints.append(f"request: {request.url}")

        opened.on("request", requested)
        yield opened
        browser.close()
    # A browser asks for an icon by itself; the policy forbids images of the network.
    assert not [one for one in complaints if "favicon" not in one]


def weight_at(page: Page, server: Server) -> None:
    """Hovering a pixel of the zoomed map tells the weight of that pair, not the pooled cell's."""
    box = page.locator("canvas.map").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6)
    tip = page.locator("#tip").inner_text()
    found = re.search(r"query (\d+).*\nkey (\d+).*\nweight ([0-9.e-]+)$", tip)
    assert found, tip
    query, key = int(found[1]), int(found[2])
    row = server._listener.exact.row(0, LAYER, HEAD, query)
    assert float(found[3]) == pytest.approx(row[key], rel=5e-3)


def test_a_map_becomes_exact(page: Page, server: Server) -> None:
    held: list[Any] = []
    page.route("**/zoom?*", lambda route: held.append(route))
    page.goto(f"{server.url}#head/{LAYER}/{HEAD}")
    note = page.locator(".pixel")
    expect(note).to_contain_text("A cell is 19–20 queries and 19–20 keys")
    expect(note).to_contain_text("Zoom in for single tokens")
    pooled = page.locator("canvas.map").screenshot()
    page.wait_for_timeout(400)
    assert page.locator("canvas.map").screenshot() == pooled  # shown until the answer is there
    (route,) = held
    route.continue_()
    page.unroute("**/zoom?*")
    expect(note).to_contain_text("A cell is one query and one key: the weight itself.")
    assert page.locator("canvas.map").screenshot() != pooled
    weight_at(page, server)
    for _ in range(12):
        page.mouse.wheel(0, -120)
    page.wait_for_timeout(600)
    weight_at(page, server)


def test_a_token_becomes_exact(page: Page, server: Server, seen: mh.Seen) -> None:
    page.goto(f"{server.url}#token/{LAYER}/{HEAD}/{ROW}")
    expect(page.locator(".tokenbody .note")).to_contain_text(f"Exact: {ROW + 1} keys with 1 ")
    weights, keys = seen[seen.layers[LAYER]][0][EXACT][0, HEAD, 0].sort(descending=True)
    places = page.locator("tbody td:nth-child(3)").all_inner_texts()
    assert places == [str(key) for key in keys[:50].tolist()]
    shown = [float(one) for one in page.locator("tbody .weight").all_inner_texts()]
    assert shown == pytest.approx(weights[:50].tolist(), rel=5e-3)
    page.get_by_role("button", name="Which tokens attend to it").click()
    expect(page.locator(".tokenbody .note")).to_contain_text(f"Exact: {LENGTH - ROW} queries")


def test_a_server_that_is_gone_is_said(page: Page, server: Server) -> None:
    page.goto(f"{server.url}#head/{LAYER}/{HEAD}")
    expect(page.locator(".pixel")).to_contain_text("the weight itself")
    server.close()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".pixel")).to_contain_text("The server does not answer")
    page.goto(f"{page.url.split('#')[0]}#token/{LAYER}/{HEAD}/{ROW}")
    expect(page.locator(".tokenbody .message")).to_contain_text("The server does not answer")
    complaints = page.complaints  # type: ignore[attr-defined]
    assert all("ERR_CONNECTION_REFUSED" in one for one in complaints if "favicon" not in one)
    complaints.clear()
