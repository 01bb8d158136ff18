"""The catalogue in a real browser: with and without JavaScript, light and dark, wide and on a phone."""

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.base import AXE_FILE_PATH
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from readers import link_in, mails

from provenn.web import Settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: apt-get install chromium"),
]
PATIENCE = 120_000  # ms; a passing test waits for none of it
expect.set_options(timeout=PATIENCE)
PHONE, WIDE = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
PAGES = [
    "/",
    "/?q=nothing",
    "/papers/eca_net",
    "/papers/titans",
    "/papers/relationnet_pp",
    "/not-held",
    "/papers/nobody",
    "/sign-in",
    "/suggestions",
    "/subscribe",
    "/boards",
    "/boards/token-mixer",
    "/boards/latency",
    "/api",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    port = free_port()
    command = [
        sys.executable,
        "-c",
        "from provenn.cli import main; main()",
        "web",
        "serve",
        "--port",
        str(port),
        "--home",
        str(home),
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        if server.poll() is not None:
            raise RuntimeError(server.stderr.read())
        try:
            urllib.request.urlopen(address, timeout=5)
            break
        except OSError:
            time.sleep(0.1)
    yield address
    server.terminate()
    server.wait(timeout=30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, **options: Any) -> BrowserContext:
    """A window that waits as long as a machine with other work may need."""
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    return context


@pytest.fixture
def tab(browser: Browser, url: str) -> Iterator[Page]:
    context = opened(browser, base_url=url, viewport=WIDE)
    tab = context.new_page()
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    yield tab
    context.close()
    assert not problems


def titles(tab: Page) -> list[str]:
    return tab.locator(".papers .title a").all_inner_texts()


def test_what_is_typed_shows_at_once_and_is_an_address(tab):
    tab.goto("/")
    tab.get_by_label("Search").fill("chanel attention")
    expect(tab.locator(".papers > li").first).to_contain_text("ECA-Net")
    expect(tab).to_have_url(re.compile(r"/\?q=chanel\+attention$"))
    shown = titles(tab)
    tab.reload()
    assert titles(tab) == shown


def test_a_filter_is_chosen_and_taken_back(tab):
    tab.goto("/")
    count = len(titles(tab))
    tab.get_by_label("Task").select_option("super-resolution")
    expect(tab.locator(".papers > li")).to_have_count(1)
    tab.get_by_role("link", name="show all").click()
    expect(tab.locator(".papers > li")).to_have_count(count)


def test_without_javascript_a_button_does_the_same(browser, url):
    context = opened(browser, base_url=url, java_script_enabled=False)
    tab = context.new_page()
    tab.goto("/")
    tab.get_by_label("Slot").select_option("channel-gate")
    tab.get_by_role("button", name="Show").click()
    assert "slot=channel-gate" in tab.url
    tab.goto("/?sort=share")
    assert len(titles(tab)) > 10
    tab.locator(".papers .title a").first.click()
    expect(tab.get_by_role("heading", name="What the abstract says")).to_be_visible()
    context.close()


def test_an_experiment_that_is_linked_to_is_unfolded(tab):
    tab.goto("/papers/eca_net")
    link = tab.locator(".measured a").first
    target = link.get_attribute("href")
    expect(tab.locator(f"[id='{target[1:]}']")).to_be_hidden()
    link.click()
    expect(tab.locator(f"[id='{target[1:]}']")).to_be_visible()


def test_the_keyboard_reaches_the_content_first(tab):
    tab.goto("/")
    tab.keyboard.press("Tab")
    expect(tab.get_by_role("link", name="Skip to the content")).to_be_focused()
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    expect(tab.get_by_label("Search")).to_be_focused()


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_keeps_anybody_out(browser, url, path, scheme):
    """axe-core finds nothing against WCAG 2.2 AA; and nothing sticks out of a phone."""
    context = opened(browser, base_url=url, viewport=PHONE, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(path)
    for fold in tab.locator("main details").all():
        fold.evaluate("fold => { fold.open = true; }")
    looked_at(tab)
    context.close()


def looked_at(tab: Page) -> None:
    """axe-core finds nothing on the page as it stands, and it is not wider than the window."""
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{tab.url} is wider than a phone"
    tab.evaluate(Path(AXE_FILE_PATH).read_text(encoding="utf-8"))
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = tab.evaluate("tags => axe.run(document, {runOnly: tags})", tags)
    problems = [
        f"{each['id']}: {each['help']}: {node['html'][:150]}"
        for each in found["violations"]
        for node in each["nodes"][:3]
    ]
    assert not problems, "\n".join(problems)


def link_to(home: Path, email: str) -> str:
    """The path of the link in the mail to an address, once the server has sent it."""
    for _ in range(300):
        if to_them := [message for message in mails(Settings(home=home)) if message["To"] == email]:
            return link_in(to_them[-1])
        time.sleep(0.1)
    raise AssertionError(f"no mail came to {email}")


def sign_in(tab: Page, look: Callable[[Page], None], home: Path, email: str) -> None:
    """By the link in the mail that arrived."""
    tab.get_by_label("Mail address").fill(email)
    tab.get_by_role("button", name="Send me a link").click()
    expect(tab.get_by_role("heading", name="Check your mail")).to_be_visible()
    look(tab)
    tab.goto(link_to(home, email))
    look(tab)
    tab.get_by_role("button", name="Sign in").click()


@pytest.mark.parametrize("scripts", [True, False])
def test_a_reader_signs_in_votes_comments_and_leaves(browser, url, home, scripts):
    look = looked_at if scripts else lambda tab: None  # axe-core is a script, too
    context = opened(browser, base_url=url, viewport=PHONE, java_script_enabled=scripts)
    tab = context.new_page()
    tab.goto("/papers/eca_net")
    tab.get_by_role("link", name="Vote for ECA-Net").click()
    sign_in(tab, look, home, f"ada{scripts}@example.org".lower())
    expect(tab.get_by_role("heading", name="Welcome")).to_be_visible()
    look(tab)
    tab.get_by_label("Name that others see").fill(f"Ada {scripts}")
    tab.get_by_role("button", name="Save the name").click()
    expect(tab).to_have_url(re.compile("/papers/eca_net$"))
    tab.get_by_role("button", name=re.compile("^Vote ?: ECA-Net")).click()
    expect(tab.get_by_role("button", name=re.compile("^Take vote back ?: ECA-Net"))).to_be_visible()
    expect(tab.locator(".votes")).to_contain_text("1 vote")
    tab.get_by_label(f"Your comment, as Ada {scripts}").fill("It **holds** on my pictures.")
    tab.get_by_role("button", name="Send").first.click()
    expect(tab.locator(".comment strong").first).to_have_text("holds")
    for fold in tab.locator(".comments details").all():
        fold.evaluate("fold => { fold.open = true; }")
    look(tab)
    tab.goto("/suggestions")
    tab.get_by_label("arXiv number").fill("2401.00001")
    tab.get_by_role("button", name="Suggest it").click()
    expect(tab.get_by_role("status")).to_contain_text("on the list")
    look(tab)
    tab.goto("/me")
    tab.get_by_text("Delete your account").click()
    look(tab)
    tab.get_by_label("Yes, delete everything").check()
    tab.get_by_role("button", name="Delete my account").click()
    expect(tab.get_by_role("status")).to_contain_text("deleted")
    tab.goto("/papers/eca_net")
    expect(tab.locator(".votes")).to_contain_text("0 votes")
    expect(tab.locator(".comment")).to_have_count(0)
    context.close()


def test_a_reader_subscribes_by_the_mail_that_arrived_and_leaves(browser, url, home):
    context = opened(browser, base_url=url, viewport=PHONE)
    tab = context.new_page()
    tab.goto("/subscribe")
    tab.get_by_label("Mail address").fill("grace@example.org")
    tab.get_by_label("weekly").check()
    tab.get_by_role("button", name="Send me a link").click()
    expect(tab.get_by_role("heading", name="Check your mail")).to_be_visible()
    tab.goto(link_to(home, "grace@example.org"))
    tab.get_by_role("button", name="Subscribe").click()
    expect(tab.locator("main")).to_contain_text("grace@example.org, weekly")
    looked_at(tab)
    tab.get_by_role("button", name="Unsubscribe").click()
    expect(tab.get_by_role("heading", name="You have left")).to_be_visible()
    looked_at(tab)
    context.close()


def test_a_photograph_is_enlarged_and_compared_by_keyboard(browser, url, tmp_path):
    photo = tmp_path / "photo.png"
    Image.effect_noise((48, 40), 60).convert("RGB").save(photo)
    context = opened(browser, base_url=url, viewport=PHONE)
    tab = context.new_page()
    tab.goto("/papers/craft")
    tab.get_by_label("Or give").set_input_files(photo)
    tab.locator("[data-try] button").click()
    slider = tab.locator(".outcome input[type=range]")
    expect(slider).to_be_visible()
    expect(tab.locator(".outcome")).to_contain_text("48×40 to 96×80 pixels")
    before = slider.input_value()
    slider.focus()
    tab.keyboard.press("ArrowRight")
    assert slider.input_value() != before
    looked_at(tab)
    context.close()


def test_text_is_written_as_it_comes(browser, url):
    context = opened(browser, base_url=url)
    tab = context.new_page()
    tab.goto("/papers/rat")
    tab.get_by_label("Or type").fill("def ")
    tab.get_by_label("Tokens to write").fill("60")
    tab.locator("[data-try] button").click()
    expect(tab.locator(".outcome .written")).to_contain_text("def ")
    expect(tab.locator(".outcome")).to_contain_text("seconds on one core")
    looked_at(tab)
    context.close()


def test_dark_is_dark(browser, url):
    grounds = []
    for scheme in ("light", "dark"):
        context = opened(browser, base_url=url, color_scheme=scheme)
        tab = context.new_page()
        tab.goto("/")
        grounds.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    light, dark = (sum(map(int, re.findall(r"\d+", ground)[:3])) for ground in grounds)
    assert light > 700 and dark < 150
