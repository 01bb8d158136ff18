"""Plots and pictures of a paper's records, each at an address of its own, so that a page is light without them."""

import re
import threading
from functools import cache
from pathlib import PurePosixPath

from fastapi import APIRouter, HTTPException, Request, Response

from provenn.evidence import report, view
from provenn.web import readme
from provenn.web.pages import found
from provenn.web.site import HERE, tagged

router = APIRouter(default_response_class=Response, include_in_schema=False)
PUBLIC = "public, max-age=300"
SHOWN = {"--ink", *(f"--c{i}" for i in range(len(report.COLOURS)))}  # of the page's colours, those that plots have
# A plot brings its own colours, which the pages' policy would take from it; it can run and load nothing.
ALONE = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox"}
_drawing = threading.Lock()  # matplotlib keeps its settings for all threads


@router.get("/papers/{name}/plots/{experiment}/{number}.svg")
def plot(request: Request, name: str, experiment: str, number: int) -> Response:
    """A plot of an experiment's record, counted from 0, in the page's colours, light or dark as the reader's are."""
    entry = found(request, name)
    finding = next((each for each in entry.findings if each.experiment.id == experiment), None)
    plots = [] if finding is None else view.titled_plots(finding)
    if not 0 <= number < len(plots):
        raise HTTPException(404, f"The record of {experiment[:100]!r} has no plot {number}")
    if (experiment, number) not in entry.drawn:
        title, lines = plots[number]
        with _drawing:
            entry.drawn[experiment, number] = _standing_alone(str(report.svg(title, lines, experiment)))
    drawn = Response(entry.drawn[experiment, number], media_type="image/svg+xml")
    answer = tagged(request, drawn, PUBLIC)
    answer.headers.update(ALONE)
    return answer


@router.get("/papers/{name}/pictures/{file}")
def picture(request: Request, name: str, file: str) -> Response:
    """A picture that some record of the paper or its README names; nothing else is read."""
    entry = found(request, name)
    named = {PurePosixPath(each.file).name: each.file for f in entry.findings for each in f.measurement.pictures}
    beside = readme.pictures(entry.card.folder)
    content = report.picture(entry.card.folder, named[file]) if file in named else beside.get(file)
    if content is None:
        raise HTTPException(404, f"Neither a record of {entry.slug} nor its README names a picture {file[:100]!r}")
    return tagged(request, Response(content, media_type="image/png"), PUBLIC)


@cache
def _colours() -> str:
    """The page's colours as a style of their own: the style sheet has each first in light, then in dark."""
    sheet = (HERE / "static" / "style.css").read_text(encoding="utf-8")
    light: dict[str, str] = {}
    dark: dict[str, str] = {}
    for name, colour in re.findall(r"(--[\w]+): (#\w+);", sheet):
        if name in SHOWN:
            (dark if name in light else light)[name] = colour

    def rule(colours: dict[str, str]) -> str:
        return "svg{color:var(--ink);" + ";".join(f"{name}:{colour}" for name, colour in colours.items()) + "}"

    return f"<style>{rule(light)}@media (prefers-color-scheme:dark){{{rule(dark)}}}</style>"


def _standing_alone(svg: str) -> bytes:
    """A drawing made for the inside of a page, as a file: with the names that its elements have, and its colours."""
    opening, _, rest = svg.partition(">")
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening)[0]
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = opening.replace("<svg ", f'<svg {names} width="{width}" height="{height}" ', 1)
    return f"{opening}>{_colours()}{rest}".encode()
