"""Clouds of points: PLY, LAS and PCD files of the user's, read by plyfile, laspy and pypcd4."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from provenn.core.errors import UserError
from provenn.core.inputs import check_file

SUFFIXES = (".ply", ".las", ".laz", ".pcd")
FEWEST = 16  # points from which a cloud is one
FARTHEST = 1e9  # of a coordinate from 0, in any unit: no survey counts further
NARROWEST = 1e-6  # metres that a cloud is wide at least: squares of much less are 0 in float32
WIDEST = 1000.0  # metres of a room or a street; beyond, the numbers are taken for millimetres
COLOURS = (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue"))
NORMALS = (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z"))
SCALED = "give scale=0.001 if they are millimetres, scale=1 if they are metres"
NEEDED = "clouds of points need packages: pip install 'provenn[points]'"


@dataclass(frozen=True)
class Cloud:
    """Points in metres.

    Args:
        points: x, y and z, less the least of each: surveys count from far away, where float32 keeps no centimetre.
        colours: red, green and blue from 0 to 1; None where the file has none.
        normals: of length 1; None where the file has none.
        origin: the least x, y and z, which were taken off.
    """

    points: Float32[np.ndarray, "points 3"]
    colours: Float32[np.ndarray, "points 3"] | None
    normals: Float32[np.ndarray, "points 3"] | None
    origin: Float64[np.ndarray, " 3"]

    def __len__(self) -> int:
        return len(self.points)


def read_cloud(file: Path, *, scale: float | int | None = None, colours: bool = False, remedy: str = SCALED) -> Cloud:
    """The points of a .ply, .las, .laz or .pcd file, with colours and normals where it has some.

    Args:
        file: the file; faces of a mesh are left out.
        scale: metres of its unit, such as 0.001 of millimetres. Default: 1, and a cloud of over a kilometre is refused.
        colours: whether it must have colours.
        remedy: what to do about a cloud of over a kilometre, where no scale can be given.

    Raises:
        UserError: no such file, another format, fewer than 16 points, or no colours where they are asked
            for. Coordinates that are no numbers or beyond 10⁹, all in one place, or over a kilometre apart. With
            the scale, a cloud less than a micrometre or more than 10⁹ metres wide.
    """
    if scale is not None and not (np.isfinite(scale) and scale > 0):
        raise UserError(f"scale must be a number above 0, got {scale}: give 0.001 for millimetres")
    kind = file.suffix.lower()
    if kind not in SUFFIXES:
        raise UserError(f"{file}: expected a cloud of points in a file that ends in {', '.join(SUFFIXES)}")
    check_file(file)
    readers = {".ply": _ply, ".las": _las, ".laz": _las, ".pcd": _pcd}
    try:
        columns = readers[kind](file)
    except ImportError as error:
        raise UserError(NEEDED) from error
    except UserError:
        raise
    except Exception as error:  # the readers raise whatever a broken header leads to
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{file} cannot be read as {kind.removeprefix('.').upper()}: {why}") from None
    return cloud_of(columns, str(file), scale=scale, colours=colours, remedy=remedy)


def cloud_of(
    columns: Mapping[str, np.ndarray],
    where: str,
    *,
    scale: float | int | None = None,
    colours: bool = False,
    remedy: str = SCALED,
) -> Cloud:
    """A cloud of columns by name, such as x, y, z, red, green and blue.

    Args:
        columns: all of one length. Colours are whole numbers up to 255 or 65,535, or fractions up to 1.
        where: what an error calls it.
        scale, colours, remedy: as in `read_cloud`.

    Raises:
        UserError: as in `read_cloud`.
    """
    if missing := [axis for axis in "xyz" if axis not in columns]:
        raise UserError(f"{where}: its points have no {', '.join(missing)}; they have {', '.join(columns)[:80]}")
    points = np.stack([np.asarray(columns[axis], dtype=np.float64) for axis in "xyz"], axis=1)
    if len(points) < FEWEST:
        raise UserError(f"{where} has {len(points)} points: expected at least {FEWEST}")
    wrong = ~np.isfinite(points).all(axis=1)
    if wrong.any():
        raise UserError(
            f"{where}: {wrong.sum():,} of {len(points):,} points have coordinates that are no finite numbers, first "
            f"point {int(wrong.argmax()) + 1}: take them out"
        )
    if (far := float(np.abs(points).max())) > FARTHEST:
        raise UserError(f"{where}: a coordinate is {far:.3g}: expected at most {FARTHEST:.0e}; its numbers are damaged")
    extent = float(np.ptp(points, axis=0).max())
    if not extent:
        raise UserError(f"{where}: all {len(points):,} points lie in one place")
    widest = extent * (1.0 if scale is None else float(scale))
    if scale is None and widest > WIDEST:
        raise UserError(f"{where} is {widest:,.0f} units wide, and metres are expected: {remedy}")
    if not NARROWEST <= widest <= FARTHEST:
        means = "; its coordinates are no metres"
        if scale is not None:
            means = f" with scale={scale:g}; scale is metres of a unit, such as 0.001 of millimetres"
        raise UserError(f"{where}: expected {NARROWEST:g} to {FARTHEST:g} metres wide, got {widest:.3g}{means}")
    points = points * (1.0 if scale is None else scale)
    origin = points.min(axis=0)
    painted = _colours(columns, where)
    if colours and painted is None:
        raise UserError(f"{where} has no colours, which the model reads: expected red, green and blue of each point")
    return Cloud((points - origin).astype(np.float32), painted, _normals(columns), origin)


def _colours(columns: Mapping[str, np.ndarray], where: str) -> Float32[np.ndarray, "points 3"] | None:
    names = next((some for some in COLOURS if all(name in columns for name in some)), None)
    if names is None:
        return None
    values = np.stack([np.asarray(columns[name]) for name in names], axis=1)
    top = float(values.max())
    if not np.isfinite(values).all() or values.min() < 0:
        raise UserError(f"{where}: a colour is negative or no finite number: expected 0 to 255, or 0 to 1")
    # 16-bit fields often hold 8-bit colours; the largest says which it is.
    small, large = (255.0, 65_535.0) if np.issubdtype(values.dtype, np.integer) else (1.0, 255.0)
    most = small if top <= small else large
    if top > most:
        raise UserError(f"{where}: a colour is {top:g}: expected at most {most:g}")
    return (values / most).astype(np.float32)


def _normals(columns: Mapping[str, np.ndarray]) -> Float32[np.ndarray, "points 3"] | None:
    """Of length 1; a normal that is none becomes 0."""
    names = next((some for some in NORMALS if all(name in columns for name in some)), None)
    if names is None:
        return None
    values = np.stack([np.asarray(columns[name], dtype=np.float64) for name in names], axis=1)
    values = np.where(np.isfinite(values).all(axis=1, keepdims=True), values, 0.0)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


def _ply(file: Path) -> dict[str, np.ndarray]:
    from plyfile import PlyData

    content = PlyData.read(str(file))
    if "vertex" not in content:
        raise UserError(f"{file} has no element vertex: it holds no points")
    data = content["vertex"].data
    return {name: np.asarray(data[name]) for name in data.dtype.names if data.dtype[name].kind != "O"}


def _las(file: Path) -> dict[str, np.ndarray]:
    import laspy

    try:
        content = laspy.read(str(file))
    except laspy.LaspyException as error:
        if file.suffix.lower() == ".laz":
            raise UserError(f"{file} is compressed, which needs a package: pip install lazrs, or give .las") from error
        raise
    columns = {axis: np.asarray(getattr(content, axis)) for axis in "xyz"}
    known = set(content.point_format.dimension_names)
    columns |= {name: np.asarray(content[name]) for name in (*COLOURS[0], *NORMALS[0]) if name in known}
    if all(name in columns and not columns[name].any() for name in COLOURS[0]):
        columns = {name: values for name, values in columns.items() if name not in COLOURS[0]}  # fields left empty
    return columns


def _pcd(file: Path) -> dict[str, np.ndarray]:
    from pypcd4 import PointCloud

    content = PointCloud.from_path(str(file))
    data: Any = content.pc_data
    columns = {name: np.asarray(data[name]).ravel() for name in data.dtype.names}
    packed = next((columns[name] for name in ("rgb", "rgba") if name in columns), None)
    if packed is not None:  # 8 bits each in a word of 32, which may be declared a float
        words = packed.view(np.uint32) if packed.dtype.kind == "f" else packed.astype(np.uint32)
        columns |= {name: (words >> shift & 255).astype(np.uint8) for name, shift in zip(COLOURS[0], (16, 8, 0))}
    return columns
