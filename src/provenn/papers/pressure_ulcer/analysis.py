"""From a mask to a report: area, perimeter, length, width, tissues, warnings. Not a medical device.

All rules are fixed and stand here; none is learnt, and none was tested on patients.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from provenn.core.errors import UserError

NOTICE = "Not a medical device. Figures are computed from a photograph; decisions are a clinician's."
LEAST_SHARE = 0.001  # of the frame, that a component must have to stay
BLUR = 12.0  # variance of the Laplacian below which a photograph is called blurred
BLUR_SIDE = 512  # pixels of the longer side at which it is taken
CERTAIN = 0.7  # mean probability inside, below which the outline is called uncertain
TISSUES = ("granulation", "slough", "necrosis", "other")
COLOURS = {"green": (90, 150), "blue": (190, 260), "yellow": (45, 70), "magenta": (285, 330)}  # hues in degrees
MOST_COLOURS = 300_000  # pixels of a wound whose colours are looked at
ROUND = 0.85  # of a sticker: its area over that of the disc of the same longest axis
LEAST_STICKER = 20  # pixels of area

Mask = Bool[np.ndarray, "height width"]


@dataclass(frozen=True)
class Scale:
    """How many pixels of the photograph a centimetre has.

    Args:
        px_per_cm: pixels a centimetre.
        source: where it comes from: "given", "ruler", "coin" or "sticker".
    """

    px_per_cm: float | int
    source: str


def read_scale(words: str, image: UInt8[np.ndarray, "height width 3"] | None = None) -> Scale:
    """A scale as people write it.

    Args:
        words: `42.5px/cm`, or a form of these. `ruler:5cm=212px` is a length that was measured on a ruler in the
            photograph, `coin:2.325cm=98px` a coin's diameter. `sticker:2cm:blue` is the diameter of a round sticker of
            one colour, which is looked for; `sticker:2cm` looks for a green one.
        image: where a sticker is looked for.

    Raises:
        UserError: another form, a length that is not positive, or no such sticker.

    >>> read_scale("ruler:5cm=212px")
    Scale(px_per_cm=42.4, source='ruler')
    """
    number = r"(\d+(?:\.\d+)?)"
    given = re.fullmatch(rf"{number}\s*px/cm", words.strip())
    measured = re.fullmatch(rf"(ruler|coin):{number}\s*cm\s*=\s*{number}\s*px", words.strip())
    sticker = re.fullmatch(rf"sticker:{number}\s*cm(?::(\w+))?", words.strip())
    if given:
        return _checked(float(given[1]), "given", words)
    if measured:
        return _checked(float(measured[3]) / max(float(measured[2]), 1e-12), measured[1], words)
    if sticker and image is not None:
        return _checked(
            sticker_diameter(image, sticker[2] or "green") / max(float(sticker[1]), 1e-12), "sticker", words
        )
    raise UserError(f"--scale {words}: expected 42.5px/cm, ruler:5cm=212px, coin:2.325cm=98px or sticker:2cm:green")


def _checked(px_per_cm: float, source: str, words: str) -> Scale:
    if not 0.1 <= px_per_cm <= 1e5:
        raise UserError(f"--scale {words}: expected 0.1 to 100,000 pixels a centimetre, got {px_per_cm:g}")
    return Scale(px_per_cm, source)


def sticker_diameter(image: UInt8[np.ndarray, "height width 3"], colour: str) -> float:
    """The diameter in pixels of the largest round patch of one vivid colour.

    Raises:
        UserError: an unknown colour, or no such patch.
    """
    if colour not in COLOURS:
        raise UserError(f"a sticker is {', '.join(COLOURS)}; got {colour!r}")
    from scipy.ndimage import find_objects, label

    hue, saturation, value = _hsv(image)
    low, high = COLOURS[colour]
    labels, count = label((hue >= low) & (hue <= high) & (saturation > 0.45) & (value > 0.2))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    for k in np.argsort(-areas[1:])[:5] + 1:
        if areas[k] < LEAST_STICKER:
            break
        patch = labels[find_objects(labels)[k - 1]] == k
        length, _ = extents(patch)
        if areas[k] >= ROUND * math.pi * length**2 / 4:
            return 2 * math.sqrt(areas[k] / math.pi)
    raise UserError(f"no round {colour} sticker is in the photograph: give its scale in another way")


def clean(mask: Mask, *, least: float = LEAST_SHARE, fill: bool = True) -> Mask:
    """A mask without holes and without components that are smaller than `least` of the frame."""
    from scipy.ndimage import binary_fill_holes, label

    if fill:
        mask = binary_fill_holes(mask)
    labels, _ = label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= max(1.0, least * mask.size))[labels]


def extents(mask: Mask) -> tuple[float, float]:
    """The longest axis of a mask and its width across that axis, in pixels; pixels are squares, not points."""
    if not mask.any():
        return 0.0, 0.0
    # Of each row the outer corners of its first and its last pixel hold the hull.
    used = np.flatnonzero(mask.any(1))
    left, right = mask[used].argmax(1), mask.shape[1] - mask[used, ::-1].argmax(1)
    corners = np.concatenate([np.stack([y, x], 1) for y in (used, used + 1) for x in (left, right)]).astype(float)
    hull = _hull(corners)
    between = hull[:, None] - hull[None]
    lengths = np.hypot(between[..., 0], between[..., 1])
    i, j = np.unravel_index(lengths.argmax(), lengths.shape)
    along = (hull[i] - hull[j]) / lengths[i, j]
    across = hull @ np.array([-along[1], along[0]])
    return float(lengths[i, j]), float(np.ptp(across))


def _hull(points: np.ndarray) -> np.ndarray:
    from scipy.spatial import ConvexHull

    return points[ConvexHull(points).vertices]


def perimeter(mask: Mask) -> float:
    """The length of the outline in pixels, by Crofton's formula in four directions."""
    from skimage.measure import perimeter_crofton

    return float(perimeter_crofton(np.pad(_cut(mask), 1), directions=4)) if mask.any() else 0.0


def _centroid(mask: np.ndarray) -> tuple[float, float]:
    sums = [mask.sum(axis, dtype=np.int64) for axis in (1, 0)]
    row, column = (float(np.arange(len(each)) @ each / each.sum()) for each in sums)
    return row, column


def _cut(mask: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation and value in 0…1, of an image or a list of colours."""
    r, g, b = (image[..., channel].astype(np.float32) / 255 for channel in range(3))
    high, low = np.maximum(np.maximum(r, g), b), np.minimum(np.minimum(r, g), b)
    spread = np.maximum(high - low, 1e-6)
    hue = np.where(high == r, (g - b) / spread, np.where(high == g, 2 + (b - r) / spread, 4 + (r - g) / spread))
    return (60 * hue) % 360, (high - low) / np.maximum(high, 1e-6), high


def tissues(image: UInt8[np.ndarray, "height width 3"], mask: Mask) -> dict[str, float]:
    """Shares of the wound by colour: black necrosis, yellow slough, red granulation, and the rest.

    Necrosis: value below 0.27. Slough: hue from 22° to 75° and saturation of 0.15 or more. Granulation: hue below 22°
    or above 330° and saturation of 0.3 or more. The first that fits counts.
    Light and camera move all of these. Of a large wound about 300,000 pixels are looked at, evenly spread.
    """
    if not mask.any():
        return dict.fromkeys(TISSUES, 0.0)
    inside = np.flatnonzero(mask)
    inside = inside[:: max(1, len(inside) // MOST_COLOURS)]
    hue, saturation, value = _hsv(image.reshape(-1, 3)[inside])
    black = value < 0.27
    yellow = ~black & (hue >= 22) & (hue <= 75) & (saturation >= 0.15)
    red = ~black & ((hue < 22) | (hue > 330)) & (saturation >= 0.3)
    shares = [float(part.mean()) for part in (red, yellow, black)]
    return dict(zip(TISSUES, [*shares, max(0.0, 1 - sum(shares))]))


def sharpness(image: UInt8[np.ndarray, "height width 3"]) -> float:
    """The variance of the Laplacian of the grey image, at 512 pixels of the longer side or less."""
    from scipy.ndimage import laplace

    step = max(1, -(-max(image.shape[:2]) // BLUR_SIDE))
    height, width = (side // step * step for side in image.shape[:2])
    grey = image[:height, :width].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return float(laplace(grey.reshape(height // step, step, width // step, step).mean((1, 3))).var())


@dataclass(frozen=True)
class WoundReport:
    """What a photograph says of a wound. Lengths are in cm and None without a scale.

    Args:
        image_size: height and width of the photograph.
        network_size: height and width at which the network saw it.
        frame: "full frame" or "crop": what the figures are of.
        scale_source, px_per_cm: of the scale; None without one.
        wound_pixels: in the photograph.
        wound_share: of the frame.
        area_cm2, perimeter_cm, length_cm, width_cm: of all components together; the width is across the longest axis.
        perimeter_px, length_px, width_px: the same in pixels.
        centroid: row and column.
        components: how many parts the wound has.
        tissue: shares inside the mask, by `tissues`.
        mean_probability: of the network inside the mask.
        unlike: how far the outline lies from those that the weights were trained on, by `task.likeness`; about 1 for
            wounds of that kind, and None where the weights do not say.
        model: what made the mask.
        warnings: what a reader must know.
        change: since the last visit; empty without one.
        notice: that this is no medical device.
    """

    image_size: tuple[int, int]
    network_size: tuple[int, int]
    frame: str
    scale_source: str | None
    px_per_cm: float | None
    wound_pixels: int
    wound_share: float
    area_cm2: float | None
    perimeter_cm: float | None
    length_cm: float | None
    width_cm: float | None
    perimeter_px: float
    length_px: float
    width_px: float
    centroid: tuple[float, float] | None
    components: int
    tissue: Mapping[str, float]
    mean_probability: float | None
    unlike: float | None
    model: str
    warnings: Sequence[str]
    change: Mapping[str, float] = field(default_factory=dict)
    notice: str = NOTICE

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def analyse(
    image: UInt8[np.ndarray, "height width 3"],
    mask: Mask,
    *,
    probability: np.ndarray | None = None,
    scale: Scale | None = None,
    network_size: tuple[int, int] | None = None,
    frame: str = "full frame",
    model: str = "",
    unlike: float | None = None,
    withheld: str = "",
) -> WoundReport:
    """The report of a photograph and the mask of its wound.

    Args:
        image: the photograph.
        mask: where the wound is, of the same size.
        probability: of the network for each pixel.
        scale: without one there are no centimetres, and a warning.
        network_size, frame, model, unlike: as of the report.
        withheld: why an outline was not drawn; the first warning.

    Raises:
        ValueError: sizes that differ.
    """
    if image.shape[:2] != mask.shape:
        raise ValueError(f"expected a mask of {image.shape[0]}×{image.shape[1]} pixels, got {mask.shape}")
    from scipy.ndimage import label

    pixels = int(mask.sum())
    length, width = extents(mask)
    around = perimeter(mask)
    components = int(label(_cut(mask))[1]) if pixels else 0
    inside = float(probability[mask].mean()) if probability is not None and pixels else None
    s = float(scale.px_per_cm) if scale else None
    return WoundReport(
        image_size=(image.shape[0], image.shape[1]),
        network_size=network_size or (image.shape[0], image.shape[1]),
        frame=frame,
        scale_source=scale.source if scale else None,
        px_per_cm=s,
        wound_pixels=pixels,
        wound_share=pixels / mask.size,
        area_cm2=pixels / s**2 if s else None,
        perimeter_cm=around / s if s else None,
        length_cm=length / s if s else None,
        width_cm=width / s if s else None,
        perimeter_px=around,
        length_px=length,
        width_px=width,
        centroid=_centroid(mask) if pixels else None,
        components=components,
        tissue=tissues(image, mask),
        mean_probability=inside,
        unlike=unlike,
        model=model,
        warnings=tuple(_warnings(image, mask, components, inside, scale, withheld)),
    )


def _warnings(
    image: np.ndarray, mask: np.ndarray, components: int, inside: float | None, scale: Scale | None, withheld: str
) -> list[str]:
    found = []
    if withheld:
        found.append(withheld)
    elif not mask.any():
        found.append("no wound was found in the photograph")
    if scale is None:
        found.append("no scale: there are no centimetres")
    if any(edge.any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])):
        found.append("the wound touches the border of the photograph: its area is a lower bound")
    if components > 1:
        found.append(f"the wound has {components} parts")
    if inside is not None and inside < CERTAIN:
        found.append(f"the outline is uncertain: the mean probability inside is {inside:.2f}")
    if sharpness(image) < BLUR:
        found.append("the photograph is blurred")
    return found


def change(report: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, float]:
    """What changed since the last visit: areas and lengths in cm where both have a scale, and shares of tissue.

    Args:
        report, last: as `WoundReport.as_json` gives them.
    """
    names = ("area_cm2", "perimeter_cm", "length_cm", "width_cm")
    changed = {
        name: report[name] - last[name] for name in names if report.get(name) is not None and last.get(name) is not None
    }
    if last.get("area_cm2") and "area_cm2" in changed:
        changed["area_percent"] = 100 * changed["area_cm2"] / last["area_cm2"]
    return changed | {name: report["tissue"][name] - last["tissue"].get(name, 0.0) for name in report["tissue"]}


class WoundTracker:
    """The reports of one wound over time."""

    def __init__(self) -> None:
        self.visits: list[tuple[str, dict[str, Any]]] = []

    def add(self, date: str, report: WoundReport) -> dict[str, Any]:
        """Keep the report of a day, such as 2026-11-23; returns it with what changed since the visit before it.

        Raises:
            ValueError: a date of another form, or one that is kept already.
        """
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
            raise ValueError(f"a date is written as 2026-11-23, got {date!r}")
        if any(day == date for day, _ in self.visits):
            raise ValueError(f"there is a report of {date} already")
        earlier = [visit for day, visit in self.visits if day < date]
        kept = report.as_json()
        kept["change"] = change(kept, earlier[-1]) if earlier else {}
        self.visits = sorted([*self.visits, (date, kept)], key=lambda visit: visit[0])
        return kept

    def series(self, name: str) -> list[tuple[str, Any]]:
        """A figure of the reports over time, such as `area_cm2`."""
        return [(day, report[name]) for day, report in self.visits]
