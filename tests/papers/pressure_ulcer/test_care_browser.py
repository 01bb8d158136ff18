"""The care page in a real browser, as wide as a phone: 390 pixels."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
pytest.importorskip("reportlab")

import uvicorn
from axe_playwright_python.base import AXE_FILE_PATH
from cryptography.fernet import Fernet
from playwright.sync_api import Page, expect, sync_playwright

import provenn
from provenn.papers.pressure_ulcer import care
from provenn.web.apps import make_app, served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: apt-get install chromium")
SAMPLES = Path(provenn.__file__).parent / "web" / "static" / "samples"


@pytest.fixture
def link(tmp_path: Path) -> Iterator[str]:
    """The link that lets a reader in, of a server that runs."""
    app = make_app("pressure_ulcer", tmp_path / "care", {care.KEY: Fernet.generate_key().decode()})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(served(app), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}{app.path}"
    server.should_exit = True
    thread.join()


@pytest.fixture(params=["light", "dark"])
def page(request) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, color_scheme=request.param,
            bypass_csp=True,  # for axe, which is put into the page
        )  # fmt: skip
        yield context.new_page()
        browser.close()


def check(page: Page) -> None:
    """Nothing is wider than the screen, the notice is there, and axe finds nothing."""
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.locator("footer")).to_contain_text("Not a medical device")
    page.evaluate(Path(AXE_FILE_PATH).read_text())
    found = page.evaluate("axe.run()")["violations"]
    assert not found, [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]


def test_a_photograph_from_a_phone_becomes_a_report(link: str, page: Page):
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(link)
    check(page)
    page.get_by_label("A new patient").fill("Room 12, a name that is longer than the screen of a phone is wide")
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_label("Photograph", exact=True)).to_be_visible()  # the next page, not the one that is left
    check(page)
    for number, date in ((1, "2026-11-01"), (2, "2026-11-08")):
        page.get_by_label("Photograph", exact=True).set_input_files(SAMPLES / f"ulcer-{number}.png")
        page.get_by_label("Date").fill(date)
        page.get_by_label("Scale").fill("20px/cm")
        page.get_by_role("button", name="Measure").click()
        expect(page.get_by_role("img").first).to_be_visible(timeout=30_000)
    expect(page.get_by_role("row")).to_have_count(3)
    expect(page.get_by_role("img", name="Area in cm²")).to_be_visible()
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    check(page)
    page.get_by_label("Delete this patient").check()
    page.get_by_role("button", name="Delete", exact=True).last.click()
    expect(page.get_by_text("There is no patient yet")).to_be_visible()
    host = link.split("/enter")[0]
    assert all(url.startswith(host) for url in asked), "no other machine is asked"
