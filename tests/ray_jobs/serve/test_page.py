"""The page, driven in Chromium as a person would: samples, drawing, DICOM, comparing, asking on, a wrong key."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom.data
import pytest

from ray_jobs.serve.keys import new_key

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
WAIT_MS = 60_000
SIZES = {"desktop": {"width": 1280, "height": 860}, "phone": {"width": 390, "height": 844}}
PICTURES = os.environ.get("MEDDAM_PAGE_PICTURES")
"""Folder for screenshots, to be looked at."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport=SIZES["desktop"], permissions=["clipboard-read", "clipboard-write"])
    made = context.new_page()
    made.set_default_timeout(WAIT_MS)
    faults: list[str] = []
    made.on("pageerror", lambda error: faults.append(str(error)))
    made.on(
        "console",
        lambda m: faults.append(m.text) if m.type == "error" and "the server responded" not in m.text else None,
    )
    yield made
    context.close()
    assert faults == []


def look(page: Any, name: str) -> None:
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"), full_page=True)


def draw_box(page: Any) -> None:
    area = page.locator("#canvas").bounding_box()
    x, y = area["x"] + area["width"] / 2, area["y"] + area["height"] / 2
    page.mouse.move(x - 60, y - 50)
    page.mouse.down()
    page.mouse.move(x + 50, y + 40, steps=4)
    page.mouse.up()


def described(page: Any, number: int = 1) -> str:
    """The newest caption, once that many cards are finished."""
    page.wait_for_function("n => document.querySelectorAll('.card:not(.busy)').length >= n", arg=number)
    assert page.locator(".card.failed").count() == 0, page.locator(".card.failed").first.inner_text()
    return str(page.locator(".card .caption").first.inner_text())


def test_from_a_sample_to_a_caption_and_on(page: Any, serve_http: Callable[..., str]) -> None:
    page.goto(serve_http(max_tokens=24))
    assert "not for diagnosis" in page.locator(".notice").inner_text().lower()
    page.get_by_role("button", name="CT slice, synthetic").click()
    page.wait_for_selector("#hint", state="hidden")
    assert page.locator("#describe").is_disabled()
    draw_box(page)
    assert page.locator("#where").inner_text().startswith("box ")
    page.evaluate(
        "window.seen = new Set(); new MutationObserver(() => window.seen.add("
        "document.querySelector('.caption')?.textContent)).observe(document.getElementById('answers'),"
        "{childList: true, subtree: true, characterData: true})"
    )
    page.locator("#describe").click()
    caption = described(page)
    assert caption
    assert page.evaluate("window.seen.size") > 2, "the caption did not stream in"
    page.locator(".card button", has_text="Copy as JSON").click()
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied["caption"].strip() == caption and copied["box"] and copied["template_set"] == "phantom_ct"

    page.locator("#question").fill("Is the margin spiculated?")
    page.locator("#question").press("Enter")
    described(page, 2)
    assert page.locator(".card h3").first.inner_text() == "Is the margin spiculated?"
    page.locator("#compare").check()
    page.locator("#describe").click()
    described(page, 4)
    assert page.locator(".pair .card").count() == 2
    look(page, "desktop")


def test_polygon_brush_zoom_and_keyboard(page: Any, serve_http: Callable[..., str]) -> None:
    page.goto(serve_http(max_tokens=6))
    page.get_by_role("button", name="Skin, synthetic").click()
    page.wait_for_selector("#hint", state="hidden")
    area = page.locator("#canvas").bounding_box()
    x, y = area["x"] + area["width"] / 2, area["y"] + area["height"] / 2
    page.keyboard.press("p")
    for dx, dy in ((-60, -40), (50, -50), (40, 60)):
        page.mouse.click(x + dx, y + dy)
    assert page.locator("#describe").is_disabled()
    page.mouse.click(x - 60, y - 40)  # where it began: closes it
    assert page.locator("#where").inner_text() == "polygon of 3 points"
    page.locator("#describe").click()
    described(page)
    page.keyboard.press("m")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 40, y + 30, steps=3)
    page.mouse.up()
    assert page.locator("#where").inner_text() == "painted mask"
    page.locator("#describe").click()
    described(page, 2)
    page.keyboard.press("Escape")
    page.locator(".card .place").last.click()
    assert page.locator("#where").inner_text() == "polygon of 3 points", "a card shows its region again"
    page.locator(".card .place").first.click()
    assert page.locator("#where").inner_text() == "painted mask"
    page.keyboard.press("Escape")
    page.locator("#canvas").focus()
    page.keyboard.press("b")
    before = page.locator("#where").inner_text()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    moved = page.locator("#where").inner_text()
    assert before.startswith("box ") and moved.startswith("box ") and moved != before
    page.mouse.move(x, y)
    page.mouse.wheel(0, -400)
    page.keyboard.press("Enter")
    described(page, 3)
    assert page.locator("#where").inner_text() == moved, "zooming does not move the region"


def test_a_dicom_file_with_its_windows(page: Any, serve_http: Callable[..., str]) -> None:
    page.goto(serve_http(max_tokens=6))
    page.locator("#file").set_input_files(str(Path(pydicom.data.__file__).parent / "test_files/CT_small.dcm"))
    page.wait_for_selector("#window-field", state="visible")
    draw_box(page)
    page.locator("#window").select_option("lung")
    page.wait_for_load_state("networkidle")
    assert page.locator("#where").inner_text().startswith("box "), "another window keeps the region"
    with page.expect_request("**/v1/chat/completions") as sent:
        page.locator("#describe").click()
    assert sent.value.post_data_json["window"] == "lung"
    described(page)
    page.locator("#file").set_input_files(
        {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"not a picture"}
    )  # fmt: skip
    page.wait_for_selector("#error", state="visible")
    assert "image" in page.locator("#error").inner_text()


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_key_and_the_right_one(page: Any, serve_http: Callable[..., str]) -> None:
    key, digest = new_key()
    page.goto(serve_http(max_tokens=6, keys={"ward": {"sha256": digest}}))
    page.get_by_role("button", name="MR, abdomen").click()
    page.wait_for_selector("#key-dialog[open]")
    page.locator("#key-input").fill("wrong")
    page.locator("#key-input").press("Enter")
    page.wait_for_function("document.getElementById('key-text').textContent.includes('not accepted')")
    look(page, "key")
    page.locator("#key-input").fill(key)
    page.locator("#key-input").press("Enter")
    page.wait_for_selector("#hint", state="hidden")
    draw_box(page)
    page.locator("#describe").click()
    assert described(page)


def test_on_a_phone(browser: Any, serve_http: Callable[..., str]) -> None:
    context = browser.new_context(viewport=SIZES["phone"], has_touch=True, is_mobile=True, device_scale_factor=2)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(serve_http(max_tokens=24))
    page.get_by_role("button", name="Chest film, synthetic").tap()
    page.wait_for_selector("#hint", state="hidden")
    page.get_by_role("button", name="Polygon").tap()
    area = page.locator("#canvas").bounding_box()
    x, y = area["x"] + area["width"] / 2, area["y"] + area["height"] / 2
    for dx, dy in ((-50, -40), (40, -40), (30, 50), (-50, -40)):
        page.touchscreen.tap(x + dx, y + dy)
    assert page.locator("#where").inner_text() == "polygon of 3 points"
    page.locator("#describe").tap()
    described(page)
    look(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "the page is wider than the phone"
    )
    context.close()
