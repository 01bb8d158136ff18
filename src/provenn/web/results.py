"""What came of a demo, drawn as SVG in the page's own colours."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from provenn.evidence.view import number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 44, 8, 10, 24
COLOURS = 6  # that style.css has, --c0 and on


def bar(share: float) -> Markup:
    """A probability as a bar."""
    return Markup(
        '<svg class="share-bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
        '<rect class="ground" width="100" height="10"/>'
        f'<rect class="share" width="{100 * share:.2f}" height="10"/></svg>'
    )


def swatch(colour: Sequence[int]) -> Markup:
    """A colour of a mask."""
    red, green, blue = map(int, colour)
    return Markup(
        '<svg class="swatch" viewBox="0 0 10 10" aria-hidden="true" focusable="false">'
        f'<rect width="10" height="10" fill="#{red:02x}{green:02x}{blue:02x}"/></svg>'
    )


def boxes(result: dict[str, Any], address: str) -> Markup:
    """A picture with what was found in it; the list beside it says the same in words."""
    width, height = result["size"]
    size = max(width, height) / 24
    parts = [f'<image href="{escape(address)}" width="{width}" height="{height}"/>']
    for found in reversed(result["boxes"]):  # the surest on top
        left, top, wide, high = (f"{value:.1f}" for value in found["box"])
        colour = result["classes"].index(found["class"]) % COLOURS
        corners = f'x="{left}" y="{top}" width="{wide}" height="{high}"'
        words = escape(f"{found['class']} {found['score']:.0%}")
        x = min(max(0.0, found["box"][0]), max(0.0, width - 0.55 * size * len(words)))
        y = max(size, found["box"][1] - size / 4)
        parts.append(f'<rect class="case" {corners} stroke-width="{size / 3:.2f}"/>')
        parts.append(f'<rect class="box k{colour}" {corners} stroke-width="{size / 6:.2f}"/>')
        text = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:.1f}" stroke-width="{size / 4:.2f}"'
        parts.append(f'<text class="k{colour}" {text}>{words}</text>')
    pixelated = " pixelated" if max(width, height) <= 64 else ""
    names = ", ".join(found["class"] for found in result["boxes"]) or "nothing"
    return Markup(
        f'<svg class="boxes{pixelated}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(f"The picture with boxes: {names}")}">{"".join(parts)}</svg>'
    )


def forecast(column: dict[str, Any], labels: Sequence[str]) -> Markup:
    """The rows that were given and, in another colour, those to come."""
    past, ahead = column["past"], column["ahead"]
    values = [*past, *ahead]
    if not all(map(math.isfinite, values)):
        return Markup("")
    ticks = _ticks(min(values), max(values))
    low, high = min(*ticks, *values), max(*ticks, *values)

    def point(row: int, value: float) -> str:
        x = LEFT + row / max(1, len(values) - 1) * (WIDTH - LEFT - RIGHT)
        return f"{x:.1f},{_height(value, low, high):.1f}"

    given = " ".join(point(k, value) for k, value in enumerate(past))
    joined = [past[-1], *ahead]
    predicted = " ".join(point(len(past) - 1 + k, value) for k, value in enumerate(joined))
    now = point(len(past) - 1, low).partition(",")[0]
    parts = []
    for tick in ticks:
        y = f"{_height(tick, low, high):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y}" dy="0.35em" text-anchor="end">{number(tick, 3)}</text>')
    parts.append(f'<line class="now" x1="{now}" x2="{now}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<polyline class="past" points="{given}"/><polyline class="ahead" points="{predicted}"/>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">{len(past)} rows given</text>')
    parts.append(f'<text class="ahead" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{_until(labels)}</text>')
    ends = f"from {number(ahead[0])} to {number(ahead[-1])}"
    heard = f"{column['name']}: {len(past)} rows given, {len(ahead)} forecast, {ends}"
    return Markup(
        f'<svg class="outlook" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(heard)}">'
        f"{''.join(parts)}</svg>"
    )


def _until(labels: Sequence[str]) -> Markup:
    return escape(f"forecast to {labels[-1][:20]}" if len(labels) > 1 else "forecast")


def _height(value: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that span the values.

    >>> _ticks(104.0, 622.0)
    [200.0, 400.0, 600.0]
    """
    room = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(room / 3))
    step = next(step * power for step in (1, 2, 5, 10) if room / (step * power) <= 4)
    first = math.ceil(low / step)
    return [tick * step for tick in range(first, first + 6) if tick * step <= high]
