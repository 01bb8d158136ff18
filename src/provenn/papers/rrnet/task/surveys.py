"""A survey to learn from: spectra on one grid, labels some of which are missing, splits with their scalers."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch.utils.data import TensorDataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.inputs import check_file
from provenn.data.tables import parse_numbers, read_table
from provenn.papers.rrnet.spectra import CLIP, LAMOST, UNKNOWN, Arm
from provenn.papers.rrnet.task.scaling import SpectraMeta, standardised, standardised_labels
from provenn.tasks import TaskData, fingerprint

CLEAN = 5  # epochs without noise
READS = "a folder with flux.npy, (spectra, pixels), and labels.csv"


class Survey(NamedTuple):
    """Spectra with labels.

    Args:
        flux: normalised.
        labels: in their own units, NaN where not known.
        error: of each flux, one standard deviation, if known.
    """

    flux: Float[np.ndarray, "spectra pixels"]
    labels: Float[np.ndarray, "spectra labels"]
    error: Float[np.ndarray, "spectra pixels"] | None = None

    def chosen(self, rows: Sequence[int] | np.ndarray) -> "Survey":
        """Some of the spectra."""
        return Survey(self.flux[rows], self.labels[rows], None if self.error is None else self.error[rows])


class Standardised(TensorDataset):
    """Spectra and labels as a network takes them, and the scalers that lead back.

    Args:
        survey: what is standardised.
        known: the scalers.
    """

    ratio: Float[np.ndarray, " spectra"]  # signal-to-noise ratios, where somebody knows them

    def __init__(self, survey: Survey, known: SpectraMeta):
        super().__init__(standardised(survey.flux, known, survey.error), standardised_labels(survey.labels, known))
        self.known = known


def assembled(
    parts: Sequence[Survey], name: str, labels: Sequence[str], units: Sequence[str], arms: Sequence[Arm]
) -> TaskData:
    """Standardised splits, by the spectra to train on."""
    train = parts[0]
    spread = np.array([np.nanstd(column) if np.isfinite(column).any() else 0 for column in train.labels.T])
    if (~(spread > 0)).any():
        bad = ", ".join(label for label, value in zip(labels, spread, strict=True) if not value > 0)
        raise UserError(f"{name}: {bad} has one value in all spectra to train on, or none")
    rounded = {
        "flux_mean": train.flux.mean(0),
        "flux_std": np.maximum(train.flux.std(0), 1e-4),
        "label_mean": np.nanmean(train.labels, axis=0),
        "label_std": spread,
    }
    known = SpectraMeta(
        labels=list(labels),
        units=list(units),
        arms=[(arm.start, arm.end, arm.step) for arm in arms],
        weighs_errors=train.error is not None,
        **{key: [float(f"{value:.6g}") for value in values] for key, values in rounded.items()},
    )
    splits = [Standardised(part, known) for part in parts]
    arrays = [array for part in parts for array in part if array is not None]
    return TaskData(
        name=name,
        train=splits[0],
        val=splits[1],
        test=splits[2],
        fingerprint=fingerprint(*arrays),
        options={
            "labels": len(labels),
            "length": train.flux.shape[1],
            "clean": CLEAN * len(train.flux),
            "names": ",".join(label.replace(",", " ") for label in labels),
        },
        meta=json.loads(known.model_dump_json()),
        about=(
            f"{len(train.flux)} spectra to train on, {len(parts[1].flux)} to validate, {len(parts[2].flux)} to test"
            + (", of a physical model and not of stars." if name == "synthetic" else f", of {name}.")
        ),
    )


def unit_of(label: str) -> str:
    """The unit that a label's name says in brackets.

    >>> unit_of("Teff [K]"), unit_of("logg")
    ('K', '')
    """
    found = re.search(r"\[([^\]]+)\]\s*$", label)
    return found[1] if found else ""


def read_folder(folder: Path, grid: str, errors: bool = False) -> tuple[Survey, list[str], list[Arm]]:
    """Spectra and labels of a folder, the labels' names and the grid.

    Args:
        folder: with flux.npy and labels.csv; error.npy holds an error of each flux.
        grid: as of `arms_of`.
        errors: whether the errors are read.

    Raises:
        UserError: files that are missing, of other sizes, or that hold no numbers.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected {READS}")
    flux = _numbers(folder / "flux.npy")
    error = None
    if errors:
        error = _numbers(folder / "error.npy", infinite=True)
        if error.shape != flux.shape or (error < 0).any():
            raise UserError(f"{folder / 'error.npy'} is {error.shape}; expected a deviation of each of {flux.shape}")
        error = error.clip(0, UNKNOWN)
    elif (folder / "error.npy").exists():
        progress.say(f"{folder / 'error.npy'} is not read: --set errors=true lets pixels count by their errors")
    table = read_table(folder / "labels.csv")
    if len(table.rows) != len(flux):
        raise UserError(f"{folder / 'labels.csv'} has {len(table.rows)} rows for {len(flux)} spectra")
    where = f"{folder / 'labels.csv'}, row "
    labels = np.array([parse_numbers(row, f"{where}{number}", holes=True) for number, row in enumerate(table.rows, 2)])
    outside = int(((flux < CLIP[0]) | (flux > CLIP[1])).sum())
    if outside:
        progress.say(f"{outside:,} of {flux.size:,} fluxes are put to the bounds {CLIP[0]} and {CLIP[1]}")
    survey = Survey(flux.clip(*CLIP).astype(np.float32), labels, error)
    return survey, list(table.columns), arms_of(grid, flux.shape[1])


def _numbers(file: Path, infinite: bool = False) -> np.ndarray:
    check_file(file)
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{file} is no array that can be read: {' '.join(str(error).split())}") from None
    if getattr(array, "ndim", 0) != 2 or array.dtype.kind not in "fiu":
        raise UserError(f"{file}: expected numbers in an array of (spectra, pixels)")
    if infinite:
        array = np.nan_to_num(array.astype(np.float64), nan=UNKNOWN, posinf=UNKNOWN)
    if not np.isfinite(array).all():
        raise UserError(f"{file}: expected numbers in an array of (spectra, pixels)")
    return array


def arms_of(grid: str, pixels: int) -> list[Arm]:
    """The wavelength ranges of a grid that is spelled out; LAMOST's where it has as many pixels.

    Raises:
        UserError: a grid that cannot be read, or of other pixels.

    >>> arms_of("5000:5100:0.5", 200)
    [Arm(start=5000.0, end=5100.0, step=0.5)]
    """
    if not grid:
        return list(LAMOST) if pixels == sum(arm.pixels for arm in LAMOST) else [Arm(0.0, float(pixels), 1.0)]
    try:
        arms = [Arm(*map(float, part.split(":"))) for part in grid.split(",")]
    except (ValueError, TypeError):
        raise UserError(f"grid is start:end:step in Å, with commas between ranges; got {grid!r}") from None
    if any(arm.step <= 0 or arm.end <= arm.start for arm in arms) or sum(arm.pixels for arm in arms) != pixels:
        raise UserError(f"grid {grid!r} has {sum(arm.pixels for arm in arms)} pixels, the spectra have {pixels}")
    return arms
