"""The care page: photographs from a phone, the outline, the area over time, and a report. Not a medical device.

It runs by `provenn web serve --app pressure_ulcer`, in a process of its own, and asks nothing of any other machine.
What it keeps is sealed, see `care`. Whoever has the link that the server prints at its start is let in.
"""

import datetime
import hmac
import io
import json
import re
import secrets
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from provenn.core.apps import Answer, Asked, Loaded
from provenn.core.errors import UserError
from provenn.papers.pressure_ulcer.analysis import NOTICE, change
from provenn.papers.pressure_ulcer.care import History, Visit, open_history
from provenn.papers.pressure_ulcer.pdf import cells, pdf_report
from provenn.papers.pressure_ulcer.task.segmenting import overlay, segment

COOKIE = "care"
MOST_PIXELS = 60_000_000
KEPT_SIDE = 2000  # pixels of the longer side of a photograph that is kept
LONGEST_NAME = 80
LONGEST_WAIT = 20.0  # seconds for the photographs of others, before a reader is told to come back
TAKEN = ("JPEG", "PNG", "WEBP")  # other readers of Pillow start programs, or were written for archives
STYLE = """
:root { color-scheme: light dark }
* { box-sizing: border-box }
body { font: 17px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 0 16px; max-width: 760px }
header { padding: 14px 0; border-bottom: 1px solid #8886 }
footer { padding: 14px 0; border-top: 1px solid #8886; margin-top: 32px; font-weight: 600 }
a { color: inherit }
h1 { font-size: 1.4em; overflow-wrap: anywhere }
label { display: block; margin: 12px 0 4px }
input, select, button { font: inherit; width: 100%; padding: 11px; border-radius: 8px; border: 1px solid #767676 }
button { cursor: pointer; margin-top: 14px; background: #1c5d99; color: #fff; border: 0 }
button.quiet { background: none; color: inherit; border: 1px solid #767676 }
td button.quiet { width: auto; margin: 0; padding: 2px 8px }
input[type=checkbox] { width: auto }
img, svg { max-width: 100%; height: auto; border-radius: 8px }
ul { padding-left: 20px }
li { margin: 8px 0; overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: 7px 10px 7px 0; border-bottom: 1px solid #8884; white-space: nowrap }
.error { border-left: 4px solid #b3261e; padding: 6px 12px }
.warning { border-left: 4px solid #b26a00; padding: 2px 12px }
"""


class CareApp:
    """Pages of patients and visits.

    Args:
        load: gives the model and its meta; called with the first photograph.
        history: sealed.
        code: lets a reader in.
    """

    title = "the care page"

    def __init__(self, load: Callable[[], Loaded], history: History, code: str):
        self.load, self.history, self._code = load, history, code
        self.path = f"/enter?code={code}"
        self._session = secrets.token_urlsafe(32)
        self._lock = threading.Lock()  # one photograph at a time: each takes up to a gigabyte
        self._model: Loaded | None = None
        person, visit = r"/people/([0-9a-f]{32})", r"/visits/([0-9a-f]{32})"
        self._routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", "/", self._home),
            ("POST", "/people", self._add_person),
            ("GET", person, self._person),
            ("POST", f"{person}/visits", self._add_visit),
            ("POST", f"{person}/delete", self._delete_person),
            ("GET", rf"{person}/report\.pdf", self._pdf),
            ("GET", rf"{person}/export\.zip", self._export),
            ("POST", f"{person}{visit}/delete", self._delete_visit),
            ("GET", rf"{visit}/(photo|overlay)\.jpg", self._picture),
        ]

    def refuse(self, asked: Asked) -> Answer | None:
        """A page that says so, for whoever comes without the link."""
        if asked.path == "/enter" or hmac.compare_digest(
            asked.cookies.get(COOKIE, "").encode(), self._session.encode()
        ):
            return None
        return page("Not let in", said("Open the link that the server printed at its start."), status=403)

    def answer(self, asked: Asked) -> Answer:
        """The page, picture or file that was asked for; without the link a page that says so."""
        if asked.path == "/enter":
            if asked.method == "GET" and hmac.compare_digest(asked.query.get("code", "").encode(), self._code.encode()):
                cookie = f"{COOKIE}={self._session}; HttpOnly; SameSite=Strict; Path=/; Max-Age=43200"
                return Answer(b"", status=303, headers={"location": "/", "set-cookie": cookie})
            return page("Not let in", said("This link is not the one that the server printed."), status=403)
        if (refused := self.refuse(asked)) is not None:
            return refused
        paths = [(method, re.fullmatch(path, asked.path), handle) for method, path, handle in self._routes]
        for method, match, handle in paths:
            if match is not None and method == asked.method:
                try:
                    return handle(asked, *match.groups())
                except UserError as error:  # of the history: a full disk, a database that does not answer
                    return page("Not done", said(str(error)), status=503)
        there = any(match is not None for _, match, _ in paths)
        return page("Nothing here", said("There is no such page."), status=405 if there else 404)

    def _home(self, asked: Asked, error: str = "") -> Answer:
        rows = "".join(
            f'<li><a href="/people/{i}">{escape(name)}</a></li>' for i, name in self.history.people().items()
        )
        form = (
            '<form method="post" action="/people">'
            '<label for="name">A new patient, by a name or a number of yours</label>'
            f'<input id="name" name="name" maxlength="{LONGEST_NAME}" required autocomplete="off">'
            "<button>Add</button></form>"
        )
        people = f"<ul>{rows}</ul>" if rows else "<p>There is no patient yet.</p>"
        return page("Patients", f"{said(error)}{people}{form}", status=400 if error else 200)

    def _add_person(self, asked: Asked) -> Answer:
        name = " ".join(asked.form.get("name", "").split())
        if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
            return self._home(asked, f"A name has 1 to {LONGEST_NAME} letters.")
        return to(f"/people/{self.history.add_person(name)}")

    def _person(self, asked: Asked, person: str, error: str = "", status: int = 400) -> Answer:
        name = self.history.people().get(person)
        if name is None:
            return page("Nothing here", said("There is no such patient."), status=404)
        visits = self.history.visits(person)
        today = datetime.date.today().isoformat()
        form = (
            "<h2>A new photograph</h2>"
            f'<form method="post" action="/people/{person}/visits" enctype="multipart/form-data">'
            '<label for="photo">Photograph</label><input id="photo" name="photo" type="file" accept="image/*" '
            'capture="environment" required><label for="date">Date</label>'
            f'<input id="date" name="date" type="date" value="{today}" required>'
            '<label for="scale">Scale, where there is one: 42.5px/cm, ruler:5cm=212px or '
            "sticker:2cm:green</label>"
            '<input id="scale" name="scale" autocomplete="off" maxlength="60">'
            '<label for="frame">The photograph is</label>'
            '<select id="frame" name="frame"><option>full frame</option><option>crop</option></select>'
            '<label><input type="checkbox" name="anyway" value="yes"> Measure also what looks like no wound</label>'
            "<button>Measure</button></form>"
        )
        files = (
            f'<p><a href="/people/{person}/report.pdf">Report as PDF</a> · '
            f'<a href="/people/{person}/export.zip">All that is kept, as a ZIP file</a></p>'
        )
        delete = (
            f'<form method="post" action="/people/{person}/delete"><label>'
            '<input type="checkbox" name="sure" value="yes" required> Delete this patient with all photographs; '
            "nothing can bring them back</label>"
            '<button class="quiet">Delete</button></form>'
        )
        shown = f"{chart(visits)}{table(person, visits)}{files}" if visits else "<p>There is no photograph yet.</p>"
        return page(name, f"{said(error)}{shown}{form}{delete}", status=status if error else 200)

    def _add_visit(self, asked: Asked, person: str) -> Answer:
        if person not in self.history.people():
            return page("Nothing here", said("There is no such patient."), status=404)
        date, frame = asked.form.get("date", ""), asked.form.get("frame", "full frame")
        try:
            datetime.date.fromisoformat(date)
            if frame not in ("full frame", "crop"):
                raise UserError(f"a photograph is a full frame or a crop, got {frame!r}")
            if not self._lock.acquire(timeout=LONGEST_WAIT):
                words = "Other photographs are being measured. Yours was not kept: send it again in a moment."
                return self._person(asked, person, words, 503)
            try:
                photo = decoded(asked.files.get("photo", b""))
                self._model = self._model or self.load()
                model, meta = self._model
                scale, anyway = asked.form.get("scale", "").strip() or None, asked.form.get("anyway") == "yes"
                options: dict[str, Any] = {"meta": dict(meta), "frame": frame, "name": "ulcer_small", "anyway": anyway}
                report, mask = segment(photo, model, scale, **options)
                pictures = encoded(photo), encoded(overlay(photo, mask))
            finally:
                self._lock.release()
            if not mask.any() and not anyway and report.unlike is not None:
                raise UserError(
                    f"{report.warnings[0].split(';')[0]}. Nothing was kept. Tick the box to measure it anyway"
                )
        except UserError as error:
            return self._person(asked, person, str(error))
        except ValueError:
            return self._person(asked, person, f"A date is written as 2026-11-23, got {date[:40]!r}.")
        plain = report.as_json()
        earlier = [visit for visit in self.history.visits(person) if visit.date <= date]
        plain["change"] = change(plain, earlier[-1].report) if earlier else {}
        self.history.add_visit(person, date, plain, *pictures)
        return to(f"/people/{person}")

    def _picture(self, asked: Asked, visit: str, which: str) -> Answer:
        found = self.history.picture(visit, which)
        if found is None:
            return page("Nothing here", said("There is no such photograph."), status=404)
        return Answer(found, "image/jpeg")

    def _pdf(self, asked: Asked, person: str) -> Answer:
        name, visits = self.history.people().get(person), self.history.visits(person)
        if name is None:
            return page("Nothing here", said("There is no such patient."), status=404)
        outline = self.history.picture(visits[-1].id, "overlay") if visits else None
        made = pdf_report(name, visits, outline, datetime.date.today().isoformat())
        return Answer(made, "application/pdf", headers={"content-disposition": 'inline; filename="report.pdf"'})

    def _export(self, asked: Asked, person: str) -> Answer:
        name, visits = self.history.people().get(person), self.history.visits(person)
        if name is None:
            return page("Nothing here", said("There is no such patient."), status=404)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            facts = [{"date": visit.date, "report": dict(visit.report)} for visit in visits]
            content = {"name": name, "notice": NOTICE, "visits": facts}
            archive.writestr("history.json", json.dumps(content, indent=1, ensure_ascii=False))
            for number, visit in enumerate(visits, 1):
                for which in ("photo", "overlay"):
                    archive.writestr(f"{number}-{visit.date}-{which}.jpg", self.history.picture(visit.id, which) or b"")
        attached = {"content-disposition": 'attachment; filename="history.zip"'}
        return Answer(packed.getvalue(), "application/zip", headers=attached)

    def _delete_visit(self, asked: Asked, person: str, visit: str) -> Answer:
        if asked.form.get("sure") == "yes":
            self.history.delete_visit(person, visit)
            return to(f"/people/{person}")
        form = (
            f'<form method="post" action="/people/{person}/visits/{visit}/delete">'
            '<input type="hidden" name="sure" value="yes">'
            "<button>Delete this photograph and its figures</button></form>"
            f'<p><a href="/people/{person}">Keep it</a></p>'
        )
        return page("Delete a photograph", form)

    def _delete_person(self, asked: Asked, person: str) -> Answer:
        if asked.form.get("sure") != "yes":
            return self._person(asked, person, "Tick the box to delete a patient.")
        self.history.delete_person(person)
        return to("/")


def create_app(load: Callable[[], Loaded], home: Path, environment: Mapping[str, str]) -> CareApp:
    """The care page over the history of a folder, or of `DATABASE_URL`.

    Raises:
        UserError: there is no key, it is another one, or packages of the extra `care` are missing.
    """
    return CareApp(load, open_history(home, environment), secrets.token_urlsafe(18))


def page(title: str, content: str, status: int = 200) -> Answer:
    """A page with the notice on it."""
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{escape(title)} · wounds</title><style>{STYLE}</style></head><body><header>'
        f'<a href="/">Patients</a></header><main><h1>{escape(title)}</h1>{content}</main>'
        f"<footer>{escape(NOTICE)}</footer></body></html>"
    )
    return Answer(html.encode(), status=status)


def to(path: str) -> Answer:
    """The browser is sent on."""
    return Answer(b"", status=303, headers={"location": path})


def said(words: str) -> str:
    """What went wrong, where something did."""
    return f'<p class="error" role="alert">{escape(words)}</p>' if words else ""


def table(person: str, visits: Sequence[Visit]) -> str:
    """The newest photograph, its warnings, and all visits, the newest first."""
    newest = visits[-1]
    warnings = "".join(f'<p class="warning">{escape(words)}</p>' for words in newest.report["warnings"])
    picture = (
        f'<p><img src="/visits/{newest.id}/overlay.jpg" alt="The photograph of {newest.date} with the outline"></p>'
    )
    titles = ("Date", "Area", "Length × width", "Change", "Granulation", "Slough", "Necrosis", "Photo", "Delete")
    head = "".join(f"<th>{title}</th>" for title in titles)
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells(visit))
        + f'<td><a href="/visits/{visit.id}/photo.jpg">photo</a></td><td><form method="post" '
        f'action="/people/{person}/visits/{visit.id}/delete"><button class="quiet">delete</button></form></td></tr>'
        for visit in reversed(visits)
    )
    return (
        f'{picture}{warnings}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def chart(visits: Sequence[Visit]) -> str:
    """The area over time as a line: in cm² where every visit has a scale, else as a share of the frame."""
    if len(visits) < 2:
        return ""
    cm = all(visit.report["area_cm2"] is not None for visit in visits)
    values = [visit.report["area_cm2"] if cm else 100 * visit.report["wound_share"] for visit in visits]
    days = [datetime.date.fromisoformat(visit.date).toordinal() for visit in visits]
    span, most = max(1, days[-1] - days[0]), max(max(values), 1e-9)
    points = [(40 + 300 * (day - days[0]) / span, 130 - 110 * value / most) for day, value in zip(days, values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="currentColor"/>' for x, y in points)
    unit = "cm²" if cm else "% of the frame"
    said_so = f"Area in {unit}: {', '.join(f'{visit.date} {value:.2f}' for visit, value in zip(visits, values))}"
    return (
        f'<svg viewBox="0 0 360 165" role="img" aria-label="{escape(said_so)}" font-size="11" fill="currentColor">'
        f'<line x1="40" y1="130" x2="345" y2="130" stroke="currentColor" opacity=".4"/>'
        f'<text x="0" y="24">{most:.3g}</text><text x="0" y="134">0</text><text x="40" y="12">area, {unit}</text>'
        f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="2"/>{dots}'
        f'<text x="40" y="150">{visits[0].date}</text>'
        f'<text x="340" y="150" text-anchor="end">{visits[-1].date}</text></svg>'
    )


def decoded(content: bytes) -> np.ndarray:
    """A photograph as 8-bit colour, turned as its EXIF says; all that came with it is left behind.

    What is transparent is laid on white, and of 16 bits the upper ones count, as on the command line.

    Raises:
        UserError: no picture, a damaged one, one of several frames, or one with more than 60 megapixels.
    """
    try:
        with Image.open(io.BytesIO(content), formats=TAKEN) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise UserError(f"the photograph has {opened.width}×{opened.height} pixels; 60 megapixels are taken")
            if getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO":  # phones write a preview beside
                raise UserError(f"the file holds {opened.n_frames} frames; expected a photograph")  # type: ignore[attr-defined]
            turned: Any = ImageOps.exif_transpose(opened)
            if turned.mode.startswith("I"):
                turned = Image.fromarray((np.asarray(turned).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
            if turned.mode in ("LA", "PA", "RGBA") or "transparency" in turned.info:
                turned = turned.convert("RGBA")
                turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
            return np.asarray(turned.convert("RGB"))
    except (OSError, ValueError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("the file is no photograph that can be read: give a JPEG, PNG or WebP") from None


def encoded(image: np.ndarray) -> bytes:
    """JPEG without any metadata, of at most 2,000 pixels a side."""
    kept: Any = Image.fromarray(image)
    kept.thumbnail((KEPT_SIDE, KEPT_SIDE))
    written = io.BytesIO()
    kept.save(written, "JPEG", quality=90)
    return written.getvalue()
