"""Small drawings as SVG, in the page's own colours, which follow it from light to dark."""

import math
import struct
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from markupsafe import Markup

from provenn.evidence import report
from provenn.evidence.record import Finding
from provenn.evidence.verdict import region_of

WIDTH, HEIGHT, MARGIN = 160, 18, 5


def interval(finding: Finding) -> Markup:
    """The effect and its interval as a bar, over the region that was asked for and the line of no effect.

    "" where there is no interval to draw, or where it would be a dot alone, such as of a count.
    """
    measurement = finding.measurement
    if measurement.effect is None or measurement.interval is None or measurement.kind_of_effect == "truth":
        return Markup("")
    low, high = measurement.interval
    region = region_of(finding.experiment, measurement)
    neutral = {"ratio": 1.0, "difference": 0.0}.get(measurement.kind_of_effect)
    bounds = [] if region is None else [region.above, region.below, *(region.within or ())]
    values = [v for v in (low, high, measurement.effect, neutral, *bounds) if v is not None]
    if (low == high and neutral is None) or len(set(values)) == 1:
        return Markup("")
    logarithmic = measurement.kind_of_effect == "ratio" and min(values) > 0
    scale: Callable[[float], float] = math.log if logarithmic else float
    if not all(math.isfinite(value) for value in values):
        return Markup("")
    least, most = min(map(scale, values)), max(map(scale, values))
    room = 0.08 * (most - least) or 1.0
    least, most = least - room, most + room

    def at(value: float) -> float:
        return round(MARGIN + (scale(value) - least) / (most - least) * (WIDTH - 2 * MARGIN), 1)

    parts = []
    if region is not None:
        inside = region.within or (region.above, region.below)
        start = MARGIN if inside[0] is None else at(inside[0])
        end = WIDTH - MARGIN if inside[1] is None else at(inside[1])
        parts.append(f'<path class="asked" d="M{start} 3h{max(end - start, 1):.1f}v12H{start}z"/>')
    if neutral is not None:
        parts.append(f'<path class="neutral" d="M{at(neutral)} 1v16"/>')
    parts.append(f'<path class="spread" d="M{at(low)} 9H{at(high)}"/>')
    # A line of no length with round ends: a dot.
    parts.append(f'<path class="effect" d="M{at(measurement.effect)} 9h0"/>')
    verdict = str(finding.verdict).replace(" ", "-")
    return Markup(
        f'<svg class="interval v-{verdict}" viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">{"".join(parts)}</svg>'
    )


class Shown(NamedTuple):
    """A picture of a record, as a page refers to it."""

    name: str
    caption: str
    width: int
    height: int


def pictures(folder: Path, finding: Finding) -> list[Shown]:
    """The pictures of a finding that lie in the paper's folder."""
    shown = []
    for each in finding.measurement.pictures:
        content = report.picture(folder, each.file)
        if content is not None and len(content) >= 24:
            width, height = struct.unpack(">II", content[16:24])  # of the header, which comes first in a PNG
            shown.append(Shown(PurePosixPath(each.file).name, each.caption, width, height))
    return shown
