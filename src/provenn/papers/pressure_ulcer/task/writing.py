"""What a prediction writes, and what it is given beside photographs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from provenn.core.errors import UserError
from provenn.core.files import is_stream, output_suffix
from provenn.core.inputs import parse_json, read_text
from provenn.data.images import Picture


def places_of(files: Sequence[Path], output: Path | None, overlay: bool) -> list[dict[str, Path]]:
    """Where mask, report and overlay of each photograph go.

    Raises:
        UserError: an ending that is none of them, names that clash, or an input that would be written over.
    """
    if output is None:
        if overlay:
            raise UserError("an overlay needs a path: give a file or a folder with -o")
        return [{} for _ in files]
    ending = output_suffix(output, ".png")
    many = len(files) > 1 or ending == ""
    if many and ending:
        raise UserError(f"{len(files)} photographs need a folder with -o, got {output}")
    if not many and ending not in (".png", ".json"):
        raise UserError(f"a mask is written as .png, a report as .json; got {output.name}")
    if not many and is_stream(output):
        if overlay:
            raise UserError(f"an overlay goes beside its mask, and nothing can lie beside {output}: give a file")
        return [{"report" if ending == ".json" else "mask": output}]
    places = []
    for file in files:
        mask = output / f"{file.stem}.png" if many else output.with_suffix(".png")
        place = {"report": mask.with_suffix(".json")}
        place |= {"mask": mask} if many or ending == ".png" else {}
        places.append(place | ({"overlay": mask.with_name(f"{mask.stem}_overlay.png")} if overlay else {}))
    written = [path for place in places for path in place.values()]
    if len(set(written)) < len(written):
        raise UserError("two of the photographs have the same name, and so would their masks: measure them one by one")
    over = next((file for file in files if file.resolve() in {path.resolve() for path in written}), None)
    if over is not None:
        raise UserError(f"{over} is an input itself, and would be written over; choose another path with -o")
    return places


def last_report(file: Path) -> dict[str, Any]:
    """A report that an earlier prediction wrote.

    Raises:
        UserError: it is none.
    """
    found = parse_json(read_text(file), str(file))
    if not isinstance(found, dict) or not isinstance(found.get("tissue"), dict) or "area_cm2" not in found:
        raise UserError(f"{file} is no report of a wound: give the .json of an earlier prediction")
    return found


def as_bytes(picture: Picture) -> np.ndarray:
    """A photograph as 8-bit colour, what is transparent laid on white."""
    full = 65535 if picture.deep else 255
    colour = picture.colour
    if picture.alpha is not None:
        cover = picture.alpha[..., None].astype(np.float32) / full
        colour = np.rint(colour * cover + full * (1 - cover))
    if picture.deep:
        colour = np.rint(np.asarray(colour, np.float64) / 257)
    return np.ascontiguousarray(colour.astype(np.uint8))


def in_a_line(report: dict[str, Any]) -> str:
    """A report in one line."""
    cm = report["area_cm2"] is not None
    area = f"{report['area_cm2']:.2f} cm²" if cm else f"{report['wound_pixels']:,} pixels ({report['wound_share']:.1%})"
    unit, length, width = ("cm", "length_cm", "width_cm") if cm else ("pixels", "length_px", "width_px")
    parts = [area, f"{report[length]:.3g} × {report[width]:.3g} {unit}"] if report["wound_pixels"] else []
    parts += [f"{name} {share:.0%}" for name, share in report["tissue"].items() if share >= 0.005]
    if (more := report["change"].get("area_percent")) is not None:
        parts.append(f"area {more:+.0f} % since the last visit")
    return "; ".join([", ".join(parts), *report["warnings"]] if parts else report["warnings"])
