"""Images of many bands from and to files: GeoTIFF with where it lies, NumPy arrays, and pictures."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from provenn.core.errors import UserError
from provenn.core.files import atomic_write, check_output
from provenn.core.inputs import check_file
from provenn.data.images import Picture, read_image, write_image
from provenn.papers.lambda_pnn.sensors import RATIO

TIFF, PICTURES = (".tif", ".tiff"), (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SMALLEST = 128  # side of a PAN: a block of Q2ⁿ is 32 pixels of the MS
BITS = 11
LARGEST_REFLECTANCE = 10.0  # numbers with a point above it are counts


@dataclass(frozen=True)
class Raster:
    """An image of bands.

    Args:
        file: it was read from.
        values: (bands, height, width), as they stand in the file.
        profile: of a GeoTIFF, as rasterio has it; empty of others.
        empty: (height, width), which pixels hold no data.
    """

    file: Path
    values: np.ndarray
    profile: dict[str, Any]
    empty: np.ndarray


def read_raster(file: Path) -> Raster:
    """An image from a GeoTIFF, a NumPy array of (bands, height, width) or (height, width), or a picture.

    Raises:
        UserError: no such file, one that cannot be read, or numbers that are none.
    """
    check_file(file)
    suffix = file.suffix.lower()
    profile: dict[str, Any] = {}
    if suffix in TIFF:
        values, profile, empty = _read_tiff(file)
    elif suffix == ".npy":
        values = _read_array(file)
        empty = np.zeros(values.shape[-2:], bool)
    elif suffix in PICTURES:
        picture = read_image(file)
        channels = picture.colour[..., :1] if picture.grey else picture.colour[..., ::-1]
        values = np.ascontiguousarray(np.moveaxis(channels, -1, 0))
        empty = np.zeros(values.shape[-2:], bool)
    else:
        raise UserError(f"{file} is no image of bands: expected .tif, .npy or a picture such as .png")
    if not np.isfinite(values[:, ~empty]).all():
        raise UserError(f"{file} holds numbers that are not finite outside of its nodata")
    if empty.all():
        raise UserError(f"{file} holds no data in any pixel")
    return Raster(file, values, profile, empty)


def _rasterio() -> Any:
    try:
        import rasterio
    except ImportError:
        raise UserError("GeoTIFF needs rasterio: pip install 'provenn[geo]'") from None
    return rasterio


def _read_tiff(file: Path) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    rasterio = _rasterio()
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file without a georeference
            with rasterio.open(file) as opened:
                values, profile = opened.read(), dict(opened.profile)
                empty = ~opened.dataset_mask().astype(bool)
    except rasterio.errors.RasterioError as error:
        raise UserError(f"{file} cannot be read as GeoTIFF: {str(error).splitlines()[0]}") from None
    if np.iscomplexobj(values):
        raise UserError(f"{file} holds complex numbers; expected counts or reflectances")
    return values, profile, empty


def _read_array(file: Path) -> np.ndarray:
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} cannot be read as a NumPy array: {str(error).splitlines()[0]}") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "uif" or values.ndim not in (2, 3):
        raise UserError(f"{file} holds no array of numbers of (bands, height, width) or (height, width)")
    return values[None] if values.ndim == 2 else values


def check_pair(ms: Raster, pan: Raster, bits: int | None = None) -> tuple[Tensor, Tensor]:
    """MS and PAN in counts / 2^bits, as float32; pixels without data have the mean of the band.

    Args:
        ms, pan: of one scene.
        bits: of the counts; 11 by default, 8 for bytes, and none for numbers with a point, which are taken as they are.

    Raises:
        UserError: they are not in the ratio 4, too small, not of one place, or the PAN has several bands.
    """
    if len(pan.values) != 1:
        raise UserError(f"{pan.file} has {len(pan.values)} bands; expected one, the panchromatic")
    (height, width), (fine_height, fine_width) = ms.values.shape[-2:], pan.values.shape[-2:]
    if (fine_height, fine_width) != (RATIO * height, RATIO * width):
        raise UserError(
            f"{pan.file} is {fine_width}×{fine_height} pixels and {ms.file} {width}×{height}; expected "
            f"{RATIO} times as many a side, {RATIO * width}×{RATIO * height}"
        )
    if min(fine_height, fine_width) < SMALLEST:
        raise UserError(
            f"{pan.file} is {fine_width}×{fine_height} pixels; expected at least {SMALLEST} a side, where the indices "
            "have a block"
        )
    _check_place(ms, pan)
    return tuple(_scaled(raster, bits) for raster in (ms, pan))  # type: ignore[return-value]  # two of two


def _check_place(ms: Raster, pan: Raster) -> None:
    """Raises: UserError: other coordinate systems, or areas that do not overlap."""
    systems = [raster.profile.get("crs") for raster in (ms, pan)]
    if None in systems:
        return
    if systems[0] != systems[1]:
        raise UserError(f"{ms.file} is in {systems[0]} and {pan.file} in {systems[1]}; reproject one of them")
    corners = []
    for raster in (ms, pan):
        transform = raster.profile["transform"]
        ends = [transform * (0, 0), transform * raster.values.shape[:0:-1]]
        corners.append([sorted(axis) for axis in zip(*ends)])
    step = abs(ms.profile["transform"].a)
    for one, other in zip(*corners):
        if min(one[1], other[1]) <= max(one[0], other[0]):
            raise UserError(f"{ms.file} and {pan.file} do not overlap: they are of other places")
        if max(abs(one[0] - other[0]), abs(one[1] - other[1])) > 2 * step:
            raise UserError(f"{ms.file} and {pan.file} do not cover the same area; cut both to it")


def without_gaps(raster: Raster) -> Raster:
    """The raster, whose pixels hold no data where any of their bands has none: such a pixel cannot be fused."""
    nodata = raster.profile.get("nodata")
    if nodata is None:
        return raster
    gaps = np.isnan(raster.values) if math.isnan(nodata) else raster.values == nodata
    empty = raster.empty | gaps.any(axis=0)
    if empty.all():
        raise UserError(f"{raster.file} holds no pixel with data in all of its bands")
    return replace(raster, empty=empty)


def check_scale(raster: Raster, bits: int | None) -> None:
    """Raises: UserError: counts in numbers with a point, which would be taken for reflectances."""
    if bits is None and raster.values.dtype.kind == "f":
        top = float(np.abs(raster.values[:, ~raster.empty]).max())
        if top > LARGEST_REFLECTANCE:
            raise UserError(
                f"{raster.file} holds numbers with a point up to {top:.4g}; expected reflectances of about 0 to 1: "
                f"give --bits {BITS} if they are counts"
            )


def check_orientation(ms: Raster, pan: Raster) -> None:
    """Raises: UserError: one is turned or mirrored against the other, by their georeferences."""
    if None in (ms.profile.get("crs"), pan.profile.get("crs")):
        return
    (height, width), coarse, fine = ms.values.shape[1:], ms.profile["transform"], pan.profile["transform"]
    step = math.hypot(coarse.a, coarse.d)
    for column, row in ((width, 0), (0, height)):
        there, here = coarse * (column, row), fine * (RATIO * column, RATIO * row)
        if math.dist(there, here) > 3 * step:
            raise UserError(f"{ms.file} and {pan.file} are turned or mirrored against each other; warp one of them")


def told_of(ms: Raster, pan: Raster) -> list[str]:
    """What is guessed or left out of a pair, a line each."""
    said = []
    for raster in (ms, pan):
        if raster.empty.any():
            said.append(
                f"{raster.file}: {raster.empty.mean():.1%} of the pixels hold no data, and none is written there"
            )
    known = [raster.profile.get("crs") is not None for raster in (ms, pan)]
    if known[0] != known[1]:
        without, other = (ms, pan) if known[1] else (pan, ms)
        said.append(f"{without.file} says no place: it is taken to cover {other.file}")
    if all(known):
        across, down = ~pan.profile["transform"] * (ms.profile["transform"] * (0, 0))
        if max(abs(across), abs(down)) > 0.25:
            said.append(
                f"{ms.file} begins {across:+.2g} pixels of the PAN to the right of {pan.file} and {down:+.2g} below: "
                "both are taken to begin together; --adapting 100 --coregister looks for up to 2"
            )
    return said


def check_target(file: Path, ms: Raster) -> None:
    """Refuse a file that the fused bands cannot be written to, before they are computed.

    Raises:
        UserError: another suffix, a picture of other than three bands of 8 or 16 bits, or no such folder.
    """
    suffix, kind = file.suffix.lower(), ms.values.dtype
    if suffix == ".png" and (len(ms.values) != 3 or kind not in (np.uint8, np.uint16)):
        raise UserError(f"{file}: a picture holds three bands of 8 or 16 bits, this has {len(ms.values)} of {kind}")
    if suffix not in (*TIFF, ".npy", ".png"):
        raise UserError(f"{file} is no image of bands: expected .tif, .npy or .png")
    if suffix in TIFF:
        _rasterio()
    check_output(file)


def _divisor(dtype: np.dtype, bits: int | None) -> float:
    if bits is not None:
        return 2.0**bits
    return 1.0 if dtype.kind == "f" else 2.0 ** (8 if dtype.itemsize == 1 else BITS)


def _scaled(raster: Raster, bits: int | None) -> Tensor:
    values = raster.values.astype(np.float64) / _divisor(raster.values.dtype, bits)
    if raster.empty.any():
        means = values[:, ~raster.empty].mean(axis=1)
        values[:, raster.empty] = means[:, None]
    return torch.from_numpy(values.astype(np.float32))


def write_raster(file: Path, fused: np.ndarray, ms: Raster, pan: Raster, bits: int | None = None) -> None:
    """Write the fused bands in the type of the MS: a GeoTIFF where the PAN lies, an array, or a picture of three bands.

    Whole numbers are rounded and kept within their type; pixels where the PAN or the MS has no data have none.

    Args:
        file: .tif, .npy or a picture; written whole or not at all.
        fused: (bands, height, width), in counts / 2^bits.
        ms: whose type and nodata it has.
        pan: whose place it has.
        bits: as they were read.

    Raises:
        UserError: another suffix, or a picture of other than three bands.
    """
    kind = ms.values.dtype
    values = fused.astype(np.float64) * _divisor(kind, bits)
    if kind.kind in "ui":
        limits = np.iinfo(kind)
        values = values.round().clip(0, limits.max)
    values = values.astype(kind)
    check_target(file, ms)
    suffix = file.suffix.lower()
    if suffix in TIFF:
        _write_tiff(file, values, ms, pan)
    elif suffix == ".npy":
        with atomic_write(file) as temporary, temporary.open("wb") as opened:
            np.save(opened, values)
    else:
        write_image(file, Picture(np.ascontiguousarray(np.moveaxis(values[::-1], 0, -1))))


def _write_tiff(file: Path, values: np.ndarray, ms: Raster, pan: Raster) -> None:
    rasterio = _rasterio()
    profile = {"driver": "GTiff", "compress": "deflate", "tiled": False}
    profile |= {key: pan.profile[key] for key in ("crs", "transform") if pan.profile.get(key) is not None}
    nodata, empty = ms.profile.get("nodata"), pan.empty | ms.empty.repeat(RATIO, 0).repeat(RATIO, 1)
    if nodata is None and empty.any():
        nodata = 0
    if nodata is not None:
        values = np.where(values == nodata, _beside(nodata, values.dtype), values)  # data stay data
        values[:, empty] = nodata
    profile |= {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype.name}
    failed = rasterio.errors.RasterioError
    with atomic_write(file) as temporary:
        try:
            with rasterio.open(temporary, "w", nodata=nodata, **profile) as opened:
                opened.write(values)
        except failed as error:
            raise UserError(f"cannot write {file}: {_cause(error)}") from None
        try:  # GDAL does not tell of a disk that fills up while the file is closed
            with rasterio.open(temporary) as written:
                whole = all(np.array_equal(written.read(i + 1), band, equal_nan=True) for i, band in enumerate(values))
        except failed:
            whole = False
        if not whole:
            raise UserError(f"cannot write {file}: what was written is not whole; is the disk full?")


def _cause(error: BaseException) -> str:
    """The first line of what stands behind an error of rasterio, which often says no more than that it has one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0]


def _beside(nodata: float, kind: np.dtype) -> Any:
    """The number next to that of no data."""
    if kind.kind == "f":
        return np.nextafter(kind.type(nodata), kind.type(np.inf))
    return int(nodata) + 1 if nodata < np.iinfo(kind).max else int(nodata) - 1
