"""The report of a patient as PDF (extra `care`)."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provenn.core.errors import UserError
from provenn.papers.pressure_ulcer.analysis import NOTICE, TISSUES
from provenn.papers.pressure_ulcer.care import NEEDED, Visit

MARGIN, LINE, FONT = 50, 15, "provenn"
COLUMNS = (
    ("date", 75),
    ("area", 70),
    ("length × width", 95),
    ("change", 55),
    ("granulation", 70),
    ("slough", 50),
    ("necrosis", 55),
)


def cells(visit: Visit) -> list[str]:
    """The row of a visit: date, area, sides, change, and three tissues."""
    report = visit.report
    cm = report["area_cm2"] is not None
    area = f"{report['area_cm2']:.2f} cm²" if cm else f"{report['wound_share']:.1%}"
    sides = f"{report['length_cm']:.1f} × {report['width_cm']:.1f} cm" if cm else "no scale"
    percent = report["change"].get("area_percent")
    tissue = [f"{report['tissue'][name]:.0%}" for name in TISSUES[:3]]
    return [visit.date, area, sides, "" if percent is None else f"{percent:+.0f} %", *tissue]


def pdf_report(name: str, visits: Sequence[Visit], outline: bytes | None, today: str) -> bytes:
    """A patient's visits as a table, the newest photograph with its outline, and all warnings.

    Args:
        name: of the patient.
        visits: the earliest first.
        outline: JPEG of the newest photograph.
        today: the date of the report.

    Raises:
        UserError: reportlab is missing.
    """
    try:
        from reportlab.lib.pagesizes import A4
        from reportlab.lib.utils import ImageReader
        from reportlab.pdfbase import pdfmetrics
        from reportlab.pdfbase.ttfonts import TTFont
        from reportlab.pdfgen.canvas import Canvas
    except ModuleNotFoundError as error:
        raise UserError(f"{NEEDED} (there is no {error.name})") from None
    import matplotlib

    # Fonts of PDF itself have the letters of Western Europe alone.
    pdfmetrics.registerFont(TTFont(FONT, Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"))
    written = io.BytesIO()
    page: Any = Canvas(written, pagesize=A4)
    width, height = A4
    page.setTitle("Wound report")

    def begin() -> float:
        page.setFont(FONT, 8)
        page.drawString(MARGIN, 28, NOTICE)
        page.setFont(FONT, 10)
        return height - MARGIN

    def line(y: float, words: Sequence[str], widths: Sequence[int]) -> float:
        if y < MARGIN + LINE:
            page.showPage()
            y = begin()
        x = MARGIN
        for word, wide in zip(words, widths):
            page.drawString(x, y, word)
            x += wide
        return y - LINE

    y = begin()
    page.setFont(FONT, 15)
    y = line(y, [f"Wound report: {name}"[:70]], [0]) - 6
    page.setFont(FONT, 10)
    y = line(y, [f"{today}, {len(visits)} visit{'s' * (len(visits) != 1)}"], [0]) - 6
    widths = [wide for _, wide in COLUMNS]
    y = line(y, [title for title, _ in COLUMNS], widths)
    page.line(MARGIN, y + LINE - 4, width - MARGIN, y + LINE - 4)
    for visit in visits:
        y = line(y, cells(visit), widths)
    for warning in visits[-1].report["warnings"] if visits else ():
        y = line(y, [f"Warning: {warning}."], [0])
    if outline is not None:
        picture = ImageReader(io.BytesIO(outline))
        wide, high = picture.getSize()
        factor = min((width - 2 * MARGIN) / wide, 330 / high)
        if y - high * factor < MARGIN:
            page.showPage()
            y = begin()
        page.drawImage(picture, MARGIN, y - high * factor, wide * factor, high * factor)
    page.save()
    return written.getvalue()
