"""The care page: let in by the link alone, photographs measured, all of it sealed, exported and deleted."""

import io
import json
import re
import sqlite3
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from provenn.cli import main
from provenn.core.errors import UserError
from provenn.data.photographs import photograph

pytest.importorskip("cryptography")
pytest.importorskip("reportlab")

from cryptography.fernet import Fernet

from provenn.papers.pressure_ulcer import app as app_module
from provenn.papers.pressure_ulcer import care
from provenn.papers.pressure_ulcer.app import chart, create_app, decoded
from provenn.papers.pressure_ulcer.care import Visit, open_history
from provenn.papers.pressure_ulcer.task import scenes
from provenn.web.apps import make_app, served

KEY = Fernet.generate_key().decode()
NAME = "Grażyna Ωmega <b>"


def photo(index: int = 1, side: int = 96, **saving) -> bytes:
    image, _ = scenes.draw(scenes.ULCERS, "test", index, seed=0, side=side)
    written = io.BytesIO()
    Image.fromarray(image).save(written, saving.pop("format", "JPEG"), **saving)
    return written.getvalue()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "care"


@pytest.fixture
def client(home: Path) -> TestClient:
    app = make_app("pressure_ulcer", home, {care.KEY: KEY})
    browser = TestClient(served(app), follow_redirects=True)
    assert "There is no patient yet" in browser.get(app.path).text
    return browser


def person(client: TestClient) -> str:
    answer = client.post("/people", data={"name": NAME})
    return str(answer.url.path)


def add(client: TestClient, at: str, date: str = "2026-11-01", content: bytes | None = None, **fields: str):
    files = {"photo": ("photo.jpg", photo() if content is None else content, "image/jpeg")}
    return client.post(
        f"{at}/visits", data={"date": date, "scale": "20px/cm", "frame": "full frame", **fields}, files=files
    )


def test_nobody_is_let_in_without_the_link(home):
    app = make_app("pressure_ulcer", home, {care.KEY: KEY})
    browser = TestClient(served(app))
    for path in ("/", "/people/" + "0" * 32, "/enter?code=guess", "/enter", "/visits/" + "0" * 32 + "/photo.jpg"):
        assert browser.get(path).status_code == 403, path
    assert browser.post("/people", data={"name": "x"}).status_code == 403
    cookie = browser.get(app.path, follow_redirects=False).headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie


def test_a_photograph_is_measured_shown_and_followed(client):
    at = person(client)
    first = add(client, at)
    assert first.status_code == 200 and "cm²" in first.text and "<svg" not in first.text
    second = add(client, at, "2026-11-08", photo(4))
    assert "<svg" in second.text and "%" in second.text and second.text.count("/photo.jpg") == 2
    assert "Gra" in second.text and "<b>" not in second.text.replace("<body>", ""), "a name is text"
    shown = re.search(r"/visits/\w+/overlay\.jpg", second.text).group()
    with Image.open(io.BytesIO(client.get(shown).content)) as image:
        assert image.size == (96, 96)


def test_every_page_says_that_it_is_no_medical_device_and_loads_nothing_from_elsewhere(client):
    at = person(client)
    add(client, at)
    pages = [client.get("/"), client.get(at), client.get("/nothing"), add(client, at, content=b"no picture")]
    for answer in pages:
        assert "Not a medical device" in answer.text and "http" not in answer.text.replace("http-equiv", "")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
    assert [answer.status_code for answer in pages] == [200, 200, 404, 400]


def test_what_is_kept_is_sealed_and_no_metadata_is_left(client, home):
    at = person(client)
    exif = Image.Exif()
    exif[0x010F] = "Camera of Grażyna"
    exif[0x0112] = 6
    assert add(client, at, content=photo(side=80, exif=exif)).status_code == 200
    kept = b"".join(file.read_bytes() for file in home.iterdir())
    assert NAME.encode() not in kept and b"2026-11-01" not in kept and b"JFIF" not in kept and b"area_cm2" not in kept
    assert b"\xff\xd8\xff" not in kept
    shown = re.search(r"/visits/\w+/photo\.jpg", client.get(at).text).group()
    content = client.get(shown).content
    assert b"Camera" not in content and not Image.open(io.BytesIO(content)).getexif()


def test_a_person_s_data_are_exported_whole_and_deleted_whole(client, home):
    at = person(client)
    add(client, at)
    archive = zipfile.ZipFile(io.BytesIO(client.get(f"{at}/export.zip").content))
    facts = json.loads(archive.read("history.json"))
    assert facts["name"] == NAME and facts["visits"][0]["report"]["area_cm2"] > 0
    assert {name for name in archive.namelist()} == {
        "history.json", "1-2026-11-01-photo.jpg", "1-2026-11-01-overlay.jpg"
    }  # fmt: skip
    with sqlite3.connect(home / "care.db") as database:
        (sealed,) = database.execute("SELECT photo FROM care_visits").fetchone()
    assert client.post(f"{at}/delete").status_code == 400 and client.get(at).status_code == 200
    assert client.post(f"{at}/delete", data={"sure": "yes"}).status_code == 200
    assert client.get(at).status_code == 404 and NAME not in client.get("/").text
    file = (home / "care.db").read_bytes()
    assert sealed[200:300] not in file, "SQLite leaves no bytes of what was deleted"


@pytest.mark.parametrize("journal", ["DELETE", "WAL"])
def test_nothing_of_what_was_deleted_is_left_in_any_file(home, journal):
    """The sealed bytes of a patient, a visit, its photograph and its outline, looked for in the file and its log."""
    open_history(home, {care.KEY: KEY})
    with sqlite3.connect(home / "care.db") as database:
        database.execute(f"PRAGMA journal_mode = {journal}")
    history = open_history(home, {care.KEY: KEY})
    kept = history.add_person("B")
    person = history.add_person("A")
    content = [np.random.default_rng(i).bytes(30_000) for i in range(2)]
    visit = history.add_visit(person, "2026-11-01", {"area_cm2": 1.0}, *content)
    with sqlite3.connect(home / "care.db") as database:
        rows = [*database.execute("SELECT id, sealed, photo, overlay FROM care_visits").fetchone()]
        rows += database.execute("SELECT id, sealed FROM care_people WHERE id = ?", [person]).fetchone()
    database.close()
    pieces = [row if isinstance(row, bytes) else row.encode() for row in rows]
    pieces = [piece[at : at + 32] for piece in pieces for at in (0, len(piece) // 2, len(piece) - 32)]

    def files() -> bytes:
        return b"".join(file.read_bytes() for file in home.iterdir())

    assert all(piece in files() for piece in pieces)
    if journal == "WAL":
        history.delete_visit(person, visit)
        assert not any(piece in files() for piece in pieces[:12])
    history.delete_person(person)
    assert not any(piece in files() for piece in pieces) and history.people() == {kept: "B"}


def test_a_stranger_is_refused_before_anything_is_read(home):
    """Not a byte of a body is read without the link, nor of one that says it is too large."""
    import asyncio

    app = make_app("pressure_ulcer", home, {care.KEY: KEY})
    server, cookie = served(app), f"{app_module.COOKIE}={app._session}".encode()

    def ask(headers: dict[bytes, bytes]) -> tuple[int, int]:
        read, status = [], []

        async def receive() -> dict:
            read.append(1)
            return {"type": "http.request", "body": b"x" * 1000, "more_body": len(read) < 50}

        async def send(message: dict) -> None:
            status.append(message.get("status"))

        scope = {"type": "http", "method": "POST", "path": "/people", "raw_path": b"/people", "query_string": b""}
        scope |= {"headers": list(headers.items()), "http_version": "1.1", "scheme": "http", "server": ("x", 80)}
        asyncio.run(server(scope, receive, send))
        return status[0], len(read)

    assert ask({b"content-type": b"application/x-www-form-urlencoded"}) == (403, 0)
    assert ask({b"cookie": cookie, b"content-length": b"40000001"}) == (413, 0)
    assert ask({b"cookie": cookie, b"content-type": b"application/x-www-form-urlencoded"})[1] == 50


def test_more_readers_than_can_be_served_are_told(client, monkeypatch):
    """Who waits for the photographs of others is told in a moment, and nothing of theirs is kept."""
    at = person(client)
    monkeypatch.setattr(app_module, "LONGEST_WAIT", 0.05)
    app = client.app.routes[-1].endpoint.__closure__
    lock = next(cell.cell_contents._lock for cell in app if hasattr(cell.cell_contents, "_lock"))
    with lock:
        answer = add(client, at)
    assert answer.status_code == 503 and "Yours was not kept: send it again in a moment" in answer.text
    assert "There is no photograph yet" in answer.text and add(client, at).status_code == 200


def test_a_picture_of_something_else_is_said_and_not_guessed(client):
    """A cat: nothing is kept; with the box ticked it is measured, and the page warns."""
    written = io.BytesIO()
    Image.fromarray(photograph("chelsea")).save(written, "JPEG")
    at = person(client)
    answer = add(client, at, content=written.getvalue())
    assert answer.status_code == 400 and "this may be no wound" in answer.text and "/photo.jpg" not in answer.text
    answer = add(client, at, content=written.getvalue(), anyway="yes")
    assert answer.status_code == 200 and "this may be no wound" in answer.text and "/photo.jpg" in answer.text


def test_photographs_of_every_kind_are_the_same_picture():
    plain = decoded(photo(format="PNG"))
    deep, grey = io.BytesIO(), plain[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(deep, "PNG")
    assert np.array_equal(decoded(deep.getvalue())[..., 1], grey)
    ink = io.BytesIO()
    Image.fromarray(plain).convert("CMYK").save(ink, "JPEG", quality=95)
    assert np.abs(decoded(ink.getvalue()).astype(int) - plain).mean() < 6
    clear = io.BytesIO()
    Image.fromarray(np.dstack([plain, np.zeros_like(grey)])).save(clear, "PNG")
    assert (decoded(clear.getvalue()) == 255).all(), "what is transparent lies on white"


def test_files_that_are_no_photographs_start_nothing(monkeypatch):
    """PostScript and its like are not opened, and a small file of a huge picture is refused before it is decoded."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    tiff, animated = io.BytesIO(), io.BytesIO()
    Image.new("L", (8, 8)).save(tiff, "TIFF")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    for content in (script, tiff.getvalue(), b"", b"GIF89a"):
        with pytest.raises(UserError, match="no photograph that can be read"):
            decoded(content)
    with pytest.raises(UserError, match="holds 2 frames"):
        decoded(animated.getvalue())
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match="9000×9000 pixels; 60 megapixels are taken"):
        decoded(bomb.getvalue())


def test_one_visit_can_be_deleted(client):
    at = person(client)
    add(client, at)
    add(client, at, "2026-11-02")
    visit = re.search(rf"{at}/visits/\w+/delete", client.get(at).text).group()
    assert "Keep it" in client.post(visit).text and client.get(at).text.count("/photo.jpg") == 2
    client.post(visit, data={"sure": "yes"})
    assert client.get(at).text.count("/photo.jpg") == 1


def test_the_report_is_a_pdf_of_all_visits(client):
    at = person(client)
    assert client.get(f"{at}/report.pdf").content.startswith(b"%PDF")
    for day in range(1, 4):
        add(client, at, f"2026-11-0{day}")
    answer = client.get(f"{at}/report.pdf")
    assert answer.headers["content-type"] == "application/pdf" and len(answer.content) > 5000


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"content": b"no picture"}, "no photograph that can be read"),
        ({"content": photo(format="PNG")[:500]}, "no photograph that can be read"),
        ({"date": "tomorrow"}, "A date is written"),
        ({"scale": "wide"}, "expected 42.5px/cm"),
        ({"scale": "sticker:2cm:blue"}, "no round blue sticker"),
        ({"frame": "half"}, "a full frame or a crop"),
    ],
)
def test_bad_input_is_said_on_the_page_and_keeps_nothing(client, fields, said):
    at = person(client)
    answer = add(client, at, **fields)
    assert answer.status_code == 400 and said in answer.text and "/photo.jpg" not in answer.text


def test_a_history_that_fails_is_said_and_keeps_nothing(client, home):
    at = person(client)
    with sqlite3.connect(home / "care.db") as database:
        database.execute(
            "CREATE TRIGGER full BEFORE INSERT ON care_visits BEGIN SELECT RAISE(FAIL, 'disk is full'); END"
        )
    answer = add(client, at)
    assert answer.status_code == 503 and "nothing was changed: disk is full" in answer.text
    assert "There is no photograph yet" in client.get(at).text


def test_a_name_that_is_none_is_refused(client):
    for name in ("", "   ", "x" * 200, "a\x07b"):
        assert client.post("/people", data={"name": name}).status_code == 400
    assert "There is no patient yet" in client.get("/").text


def test_a_form_of_another_site_and_one_too_large_are_refused(client, monkeypatch):
    answer = client.post("/people", data={"name": "x"}, headers={"origin": "http://elsewhere.example"})
    assert answer.status_code == 403
    assert client.put("/people").status_code == 405
    monkeypatch.setattr("provenn.web.apps.LARGEST", 1000)
    assert client.post("/people", content=b"x" * 2000).status_code == 413
    assert "There is no patient yet" in client.get("/").text


@pytest.mark.parametrize("key, said", [("", "is not set"), ("short", "no key of 44 letters")])
def test_a_key_that_is_none_is_refused(home, key, said):
    with pytest.raises(UserError, match=said):
        open_history(home, {care.KEY: key})


def test_a_history_opens_with_its_own_key_alone(home):
    first = open_history(home, {care.KEY: KEY})
    made = first.add_person("A")
    assert open_history(home, {care.KEY: KEY}).people() == {made: "A"}
    with pytest.raises(UserError, match="not the key that this history was sealed with"):
        open_history(home, {care.KEY: Fernet.generate_key().decode()})
    assert (home / "care.db").stat().st_mode & 0o077 == 0
    url = f"sqlite:///{home / 'other.db'}"
    assert open_history(home, {care.KEY: KEY, care.DATABASE: url}).people() == {}


def test_missing_packages_are_named(home, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cryptography.fernet", None)
    with pytest.raises(UserError, match=r"provenn\[care\]"):
        open_history(home, {care.KEY: KEY})


def test_the_command_says_what_is_missing_in_one_line(home, monkeypatch, capsys):
    monkeypatch.delenv(care.KEY, raising=False)
    monkeypatch.delenv(care.DATABASE, raising=False)
    assert main(["web", "serve", "--app", "pressure_ulcer", "--home", str(home)]) == 2
    err = capsys.readouterr().err
    assert care.KEY in err and "generate_key" in err and err.count("\n") == 1
    assert main(["web", "serve", "--app", "eca_net", "--home", str(home)]) == 2


def test_a_paper_without_an_application_is_refused(home):
    with pytest.raises(UserError, match="brings no application"):
        make_app("eca_net", home, {})


def test_the_model_is_loaded_with_the_first_photograph_and_once(home):
    loads = []
    app = create_app(lambda: loads.append(1) or (_Constant(), META), home, {care.KEY: KEY})
    browser = TestClient(served(app))
    browser.get(app.path)
    at = person(browser)
    assert not loads
    for day in (1, 2):
        answer = add(browser, at, f"2026-11-0{day}")
    assert len(loads) == 1 and "no wound was found" in answer.text


META = {"size": 32, "channels": 3, "letterbox": True, "mean": [0.5] * 3, "std": [0.2] * 3}


def _Constant():
    from torch import nn

    model = nn.Conv2d(3, 1, 1)
    nn.init.zeros_(model.weight)
    nn.init.constant_(model.bias, -9.0)
    return model.eval()


def test_photographs_of_phones_are_read_and_huge_ones_refused(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decoded(photo(side=64, exif=exif))
    assert turned.shape == (64, 64, 3) and turned.dtype == np.uint8
    plain = decoded(photo(side=64))
    assert np.abs(np.rot90(plain, -1).astype(int) - turned).mean() < 1
    monkeypatch.setattr("provenn.papers.pressure_ulcer.app.MOST_PIXELS", 1000)
    with pytest.raises(UserError, match="64×64 pixels"):
        decoded(photo(side=64))


def test_the_chart_has_a_unit_that_all_visits_share():
    def visit(date: str, area: float | None) -> Visit:
        return Visit("0" * 32, date, {"area_cm2": area, "wound_share": 0.1})

    assert "cm²" in chart([visit("2026-11-01", 2.0), visit("2026-11-02", 1.0)])
    assert "% of the frame" in chart([visit("2026-11-01", 2.0), visit("2026-11-02", None)])
    assert chart([visit("2026-11-01", 2.0)]) == ""
