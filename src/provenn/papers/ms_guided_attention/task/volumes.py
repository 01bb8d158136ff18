"""Volumes from and to files: NIfTI, series of DICOM slices, and slices as pictures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.core.inputs import check_file
from provenn.data.images import SUFFIXES, images_in, read_pixels
from provenn.data.masks import palette, write_mask

NIFTI, DICOM = (".nii", ".nii.gz"), (".dcm", ".dicom", ".ima")
UNEVEN = 0.1  # of the distance between slices, that they may differ by
WHOLE, FLAT, ALIKE = (
    1e-3,
    1e-3,
    1e-3,
)  # how far a label is from a whole number, a volume of three unit axes, and cosines
Affine = np.ndarray  # 4 × 4, from indices to millimetres, axes pointing right, forward and up


@dataclass(frozen=True)
class Volume:
    """A stack of slices as a network sees it: axial, from below, the nose up where the file says where that is.

    Args:
        file: it was read from: a file, or a folder of slices.
        slices: (slices, channels, height, width), in 0…1.
        spacing: millimetres between slices, rows and columns; ones where the file does not say.
        affine: of the file; None of pictures.
        turned: how the file's axes became (columns, rows, slices), as nibabel has it; None of pictures.
        header: of a NIfTI file.
        names: of the slices, where they are files of their own, in the file's order.
        placed: whether the file says where it lies; without, `affine` is of its voxels' sizes alone.
    """

    file: Path
    slices: Float32[np.ndarray, "slices channels height width"]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    affine: Affine | None = None
    turned: np.ndarray | None = None
    header: Any = None
    names: tuple[str, ...] = field(default=())
    placed: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows and columns."""
        slices, _, rows, columns = self.slices.shape
        return slices, rows, columns


def is_nifti(file: Path) -> bool:
    """Whether the name is that of a NIfTI file."""
    return file.name.lower().endswith(NIFTI)


def stem_of(file: Path) -> str:
    """The name without its ending, `.nii.gz` being one."""
    return file.name[: -len(".nii.gz")] if file.name.lower().endswith(".nii.gz") else file.stem


def pictures_of(given: Path) -> list[Path] | None:
    """The pictures that are the slices of a volume; None where it is a NIfTI file or a DICOM series."""
    if given.is_dir():
        return None if dicom_slices(given) else images_in(given)
    return [given] if given.suffix.lower() in SUFFIXES else None


def natural(file: Path) -> tuple[tuple[int, str], ...]:
    """A key that puts slice 2 before slice 10, with or without leading zeros."""
    parts = re.findall(r"\d+|\D+", file.name)
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)


def read_volume(given: Path, channels: int = 1) -> Volume:
    """A volume from a NIfTI file, a folder of DICOM slices, a folder of pictures, or one picture.

    NIfTI and DICOM are scaled so that their 0.5 % darkest voxels are 0 and their 0.5 % brightest 1; pictures are taken
    as they are.

    Args:
        given: the file or folder.
        channels: of the network; a NIfTI file of four dimensions has so many images in its last one.

    Raises:
        UserError: none of these, or one that cannot be read.
    """
    if given.is_dir():
        files = dicom_slices(given)
        if files:
            return read_dicom(given, files, channels)
        return read_pictures(given, images_in(given), channels)
    check_file(given)
    if is_nifti(given):
        return read_nifti(given, channels)
    if given.suffix.lower() in SUFFIXES:
        return read_pictures(given, [given], channels)
    if given.suffix.lower() in DICOM:
        return read_dicom(given, [given], channels)
    raise UserError(f"{given} is no volume: expected .nii, .nii.gz, a folder of DICOM slices, or pictures")


def read_nifti(file: Path, channels: int = 1, *, labels: bool = False) -> Volume:
    """A NIfTI file.

    Args:
        file: it.
        channels: as in `read_volume`.
        labels: its values are class numbers, and stay as they are.
    """
    nibabel = _library("nibabel", "NIfTI")
    check_file(file)
    try:
        with progress.quiet_loggers("nibabel.global"):
            image = nibabel.load(file)
            if image.get_data_dtype().kind not in "biuf":
                raise ValueError(f"its voxels are {_spoken(image.get_data_dtype())}, expected one number each")
            values = np.asarray(image.get_fdata(dtype=np.float32))
    except Exception as error:  # nibabel raises of many kinds
        raise UserError(f"{file} cannot be read as NIfTI: {_in_short(error)}") from None
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim not in (3, 4) or 0 in values.shape:
        raise UserError(f"{file} has {values.ndim} dimensions of {values.shape}: a volume has three, or four of images")
    if labels and values.ndim == 4:
        raise UserError(f"{file} has four dimensions: labels have three")
    count = values.shape[3] if values.ndim == 4 else 1
    if not labels and count != channels:
        raise UserError(f"{file} holds {count} image(s) a voxel; the network takes {channels}")
    if not np.isfinite(values).all():
        raise UserError(f"{file} holds numbers that are not finite")
    if labels and np.abs(values - np.rint(values)).max() > WHOLE:
        odd = values.flat[int(np.abs(values - np.rint(values)).argmax())]
        raise UserError(f"{file} holds {odd:g}: labels are whole numbers; was it resampled, or is it no label volume?")
    known = image.affine is not None and _placed(image.header)
    if not known and not labels:
        progress.say(f"{file} does not say where it lies: its slices are taken as they stand, along the last dimension")
    if known:
        affine = np.asarray(image.affine, float)
    else:  # only how large its voxels are
        sizes = np.abs(np.asarray(image.header.get_zooms()[:3], float))
        affine = np.diag([*np.where((sizes > 0) & np.isfinite(sizes), sizes, 1.0) * (1, -1, 1), 1.0])
    parts = [values[..., index] for index in range(count)] if values.ndim == 4 else [values]
    return replace(_oriented(file, parts, affine, labels=labels), header=image.header, placed=known)


def read_sequences(files: Sequence[Path], channels: int = 1) -> Volume:
    """A volume of several NIfTI files, an image a voxel each, such as the sequences of BraTS.

    Raises:
        UserError: another number of them than `channels`, or files that do not lie in one place.
    """
    if len(files) == 1:
        return read_nifti(files[0], channels)
    if len(files) != channels:
        raise UserError(f"{files[0].parent} holds {len(files)} image(s) a voxel; the network takes {channels}")
    parts = [read_nifti(file) for file in files]
    first = parts[0]
    for file, part in zip(files[1:], parts[1:]):
        if part.shape != first.shape or not np.allclose(axial_affine(part), axial_affine(first), atol=1e-2):
            raise UserError(f"{file} does not lie where {files[0].name} does: sequences of a subject share one grid")
    return replace(first, file=files[0].parent, slices=np.concatenate([part.slices for part in parts], 1))


def _placed(header: Any) -> bool:
    """Whether a header says how the volume lies: NIfTI's two codes, of which one must not be 0."""
    try:
        return bool(int(header["sform_code"]) or int(header["qform_code"]))
    except (KeyError, ValueError, TypeError, IndexError):
        return True  # another format of nibabel's, whose affine is all there is


def _oriented(
    file: Path,
    parts: Sequence[np.ndarray],
    affine: Affine,
    *,
    labels: bool = False,
    names: Sequence[str] = (),
) -> Volume:
    """A volume from arrays of a file, each scaled by itself."""
    from nibabel import orientations

    if not np.isfinite(affine).all():
        raise UserError(f"{file}: its affine holds numbers that are not finite")
    axes = np.linalg.norm(affine[:3, :3], axis=0)
    if not (axes > 0).all():
        raise UserError(f"{file}: its affine has an axis of length 0")
    if abs(np.linalg.det(affine[:3, :3] / axes)) < FLAT:
        raise UserError(f"{file}: two axes of its affine point the same way")
    turned = orientations.io_orientation(affine)
    if np.isnan(turned).any():
        raise UserError(f"{file}: its affine does not say which way each axis points")
    planes = [_to_slices(orientations.apply_orientation(part, turned)) for part in parts]
    slices = np.stack([plane if labels else scaled(plane) for plane in planes], 1).astype(np.float32)
    along = np.empty(3)
    along[turned[:, 0].astype(int)] = axes  # right, forward, up
    right, forward, up = along.tolist()
    return Volume(file, np.ascontiguousarray(slices), (up, forward, right), affine, turned, names=tuple(names))


def scaled(image: np.ndarray) -> Float32[np.ndarray, "..."]:
    """A volume with its 0.5 % darkest voxels at 0 and its 0.5 % brightest at 1."""
    low, high = np.percentile(image, (0.5, 99.5))
    return np.clip((image - low) / max(float(high - low), 1e-12), 0, 1).astype(np.float32)


def _to_slices(array: np.ndarray) -> np.ndarray:
    """(right, forward, up) to (slices, rows from the nose on, columns)."""
    return array.transpose(2, 1, 0)[:, ::-1]


def turned_slices(slices: np.ndarray, turned: np.ndarray) -> np.ndarray:
    """Slices in the order, rows and columns of a file, turned as its volume was (`Volume.turned`)."""
    from nibabel import orientations

    return _to_slices(orientations.apply_orientation(slices.transpose(2, 1, 0), turned))


def axial_affine(volume: Volume) -> Affine:
    """The affine of a volume whose axes are turned to point right, forward and up, however its file has them.

    Raises:
        UserError: a volume of pictures, which lies nowhere.
    """
    from nibabel import orientations

    if volume.affine is None or volume.turned is None:
        raise UserError(f"{volume.file} does not say where it lies")
    upright = volume.shape[::-1]  # columns, rows, slices
    shape = [upright[int(axis)] for axis in volume.turned[:, 0]]
    return volume.affine @ orientations.inv_ornt_aff(volume.turned, shape)


def from_slices(labels: np.ndarray, volume: Volume) -> np.ndarray:
    """Labels of slices in the axes of the file that the volume was read from."""
    from nibabel import orientations

    array = labels[:, ::-1].transpose(2, 1, 0)
    back = orientations.ornt_transform(orientations.axcodes2ornt(("R", "A", "S")), volume.turned)
    return orientations.apply_orientation(array, back)


def dicom_slices(folder: Path) -> list[Path]:
    """Files of a folder that are DICOM by their ending, or by the mark after their first 128 bytes."""
    found = []
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name.startswith(".") or file.name.upper() == "DICOMDIR":  # a disc's contents
            continue
        if file.suffix.lower() in DICOM or (not file.suffix and _is_dicom(file)):
            found.append(file)
    return found


def _is_dicom(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(132)[128:] == b"DICM"


def read_dicom(given: Path, files: Sequence[Path], channels: int = 1) -> Volume:
    """A series of DICOM slices, in the order of their positions.

    Raises:
        UserError: several series, a slice that is missing or there twice, or slices that do not fit each other.
    """
    pydicom = _library("pydicom", "DICOM")
    if channels != 1:
        raise UserError(f"{given}: a series has one image a voxel; the network takes {channels}")
    slices = []
    for file in files:
        check_file(file)
        try:
            part = pydicom.dcmread(file)
        except Exception as error:  # pydicom raises of many kinds
            raise UserError(f"{file} cannot be read as DICOM: {_in_short(error)}") from None
        slices.append((file, part, _pixels(file, part)))
    series = {str(getattr(part, "SeriesInstanceUID", "")): part for _, part, _ in slices}
    if len(series) == len(slices) > 2 and len({_sequence(part) for _, part, _ in slices}) == 1:
        # CHAOS and some scanners give each slice a series of its own; places and sizes are checked below.
        progress.say(f"{given}: each of {len(slices)} slices calls itself a series; they are taken as one")
    elif len(series) > 1:
        named = ", ".join(str(getattr(part, "SeriesDescription", uid)) for uid, part in list(series.items())[:5])
        raise UserError(f"{given} holds {len(series)} series ({named}): give each a folder of its own")
    try:
        turns = np.array([[float(x) for x in part.ImageOrientationPatient] for _, part, _ in slices])
        places = np.array([[float(x) for x in part.ImagePositionPatient] for _, part, _ in slices])
        spacings = np.array([[float(x) for x in part.PixelSpacing] for _, part, _ in slices])
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{given}: its slices do not say where they lie (position, orientation, spacing)") from None
    if turns.shape[1:] != (6,) or places.shape[1:] != (3,) or spacings.shape[1:] != (2,):
        raise UserError(f"{given}: its slices do not say where they lie (position, orientation, spacing)")
    if not (np.isfinite(turns).all() and np.isfinite(places).all() and np.isfinite(spacings).all()):
        raise UserError(f"{given}: positions, orientations or spacings of its slices are not finite")
    if len({pixels.shape for _, _, pixels in slices}) > 1:
        raise UserError(f"{given}: its slices have different sizes")
    for name, found in (("orientation", turns), ("spacing", spacings)):
        odd = int(np.abs(found - found[0]).max(1).argmax())
        if np.abs(found[odd] - found[0]).max() > ALIKE:
            raise UserError(
                f"{slices[odd][0]} has the {name} {_listed(found[odd])}, {slices[0][0].name} {_listed(found[0])}: "
                f"slices of a volume have one {name}"
            )
    rows, between = turns[0], spacings[0]
    normal = np.cross(rows[:3], rows[3:])
    if np.linalg.norm(normal) < FLAT:
        raise UserError(f"{given}: the orientation {_listed(rows)} of its slices is none")
    heights = places @ normal
    order = np.argsort(heights, kind="stable")
    step = _even_step(given, heights[order], float(getattr(slices[0][1], "SliceThickness", 1) or 1))
    along = normal * step if len(order) == 1 else (places[order[-1]] - places[order[0]]) / (len(order) - 1)
    aside = places[order] - places[order[0]] - np.arange(len(order))[:, None] * along
    aside -= np.outer(aside @ normal, normal)  # along the normal the distances may differ a little
    worst = int(np.linalg.norm(aside, axis=1).argmax())
    if np.linalg.norm(aside[worst]) > max(UNEVEN * between.max(), ALIKE):
        raise UserError(
            f"{slices[order[worst]][0]} lies {np.linalg.norm(aside[worst]):g} mm aside of the others: slices of a "
            "volume lie on one line"
        )
    affine = np.eye(4)
    # Columns of a slice run along `rows[:3]`; DICOM points left and back where the affine points right and forward.
    affine[:3, 0], affine[:3, 1] = rows[:3] * between[1], rows[3:] * between[0]
    affine[:3, 2], affine[:3, 3] = along, places[order[0]]  # of a tilted gantry not along the normal
    affine[:2] *= -1
    array = np.stack([slices[index][2].T for index in order], 2)
    return _oriented(given, [array], affine, names=[slices[index][0].stem for index in order])


def _pixels(file: Path, part: Any) -> Float32[np.ndarray, "rows columns"]:
    """The grey values of a slice, bright where they are high.

    Raises:
        UserError: pixels that cannot be decoded, colours, several frames, or a scale of 0.
    """
    try:
        pixels = part.pixel_array.astype(np.float32)
    except Exception as error:  # pydicom raises of many kinds
        syntax = getattr(getattr(part, "file_meta", None), "TransferSyntaxUID", None)
        if syntax is not None and syntax.is_compressed:
            raise UserError(
                f"{file} is compressed ({syntax.name}) and cannot be decoded: decompress the series first, such as "
                f"with gdcmconv --raw; {_in_short(error)}"
            ) from None
        raise UserError(f"{file} cannot be read as DICOM: {_in_short(error)}") from None
    if pixels.ndim != 2:
        raise UserError(f"{file} holds an image of shape {pixels.shape}: expected one grey slice")
    try:
        slope, intercept = (
            default if getattr(part, tag, None) in (None, "") else float(getattr(part, tag))
            for tag, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
        )
    except (TypeError, ValueError):
        slope, intercept = 0.0, 0.0
    if not slope or not np.isfinite([slope, intercept]).all():
        raise UserError(f"{file}: its values are scaled by {getattr(part, 'RescaleSlope', None)!r}, expected a number")
    pixels = pixels * slope + intercept
    return -pixels if getattr(part, "PhotometricInterpretation", "") == "MONOCHROME1" else pixels


def _sequence(part: Any) -> tuple[str, ...]:
    """What tells two series of one patient apart, besides their identifiers."""
    tags = ("PatientID", "Modality", "SeriesNumber", "SeriesDescription", "ProtocolName", "EchoTime")
    return tuple(str(getattr(part, tag, "")) for tag in tags)


def _even_step(given: Path, heights: np.ndarray, thickness: float) -> float:
    if len(heights) == 1:
        return thickness
    steps = np.diff(heights)
    usual = float(np.median(steps))
    if steps.min() < 1e-3:
        raise UserError(f"{given} has two slices at {heights[int(steps.argmin())]:g} mm")
    worst = int(np.abs(steps - usual).argmax())
    if abs(steps[worst] - usual) > UNEVEN * usual:
        raise UserError(
            f"{given}: slices {worst + 1} and {worst + 2} lie {steps[worst]:g} mm apart, the others {usual:g}: "
            "one is missing, or two series are mixed"
        )
    return usual


def read_pictures(given: Path, files: Sequence[Path], channels: int = 1) -> Volume:
    """Pictures of one size as the slices of a volume, in the order of their numbers."""
    files = sorted(files, key=natural)
    parts = [read_pixels(file, channels).numpy() for file in files]
    odd = next((file for file, part in zip(files, parts) if part.shape != parts[0].shape), None)
    if odd is not None:
        raise UserError(f"{odd} has another size than {files[0].name}: slices of a volume have one size")
    slices = np.stack(parts).astype(np.float32) / 255
    return Volume(given, slices, names=tuple(file.stem for file in files))


def write_labels(
    file: Path, labels: UInt8[np.ndarray, "slices height width"], volume: Volume, values: Sequence[int]
) -> None:
    """Write class numbers as a label volume in the header, affine and axes of the volume.

    Args:
        file: .nii or .nii.gz; of pictures .png, of several slices a folder.
        labels: class numbers.
        volume: they are of.
        values: what each class is called in the file.
    """
    table = np.asarray(values)
    if volume.affine is None:
        _write_pictures(file, labels, volume, table)
        return
    nibabel = _library("nibabel", "NIfTI")
    kinds = (np.uint8, np.int16, np.int32)
    kind = next(kind for kind in kinds if np.iinfo(kind).min <= table.min() and table.max() <= np.iinfo(kind).max)
    array = table.astype(kind)[from_slices(labels, volume)]
    header = None if volume.header is None else volume.header.copy()
    if header is not None:
        header.set_data_dtype(kind)
        header.set_slope_inter(1, 0)
        header["cal_max"], header["cal_min"] = 0, 0
    second = isinstance(header, nibabel.Nifti2Header)
    image = (nibabel.Nifti2Image if second else nibabel.Nifti1Image)(
        array, volume.affine if volume.placed else None, header
    )
    if header is None:
        image.header.set_xyzt_units("mm")
        image.set_qform(volume.affine, 1)
        image.set_sform(volume.affine, 1)
    content = image.to_bytes()
    if file.name.lower().endswith(".gz"):
        import gzip

        content = gzip.compress(content, mtime=0)
    with atomic_write(file) as part:
        part.write_bytes(content)


def _write_pictures(file: Path, labels: np.ndarray, volume: Volume, table: np.ndarray) -> None:
    if not (table.min() >= 0 and table.max() < 256):
        raise UserError(f"labels of {table.min()} to {table.max()} fit no picture: predict a NIfTI file")
    colours = palette(len(table))
    if table.tolist() != list(range(len(table))):  # grey levels, as the truth has them
        colours = [(value, value, value) for value in range(256)]
    folder = volume.file.is_dir()
    targets = [file / f"{name}.png" for name in volume.names] if folder else [file]
    for target, part in zip(targets, labels, strict=True):
        write_mask(target, table.astype(np.uint8)[part], colours)


def _in_short(error: Exception) -> str:
    """An error of a library in a line, by its kind where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _spoken(kind: np.dtype) -> str:
    return "complex numbers" if kind.kind == "c" else "colours" if kind.kind == "V" else str(kind)


def _listed(values: np.ndarray) -> str:
    return " ".join(f"{value:g}" for value in values)


def _library(name: str, what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{what} needs {name}: pip install 'provenn[medical]'") from None
