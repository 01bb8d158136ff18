"""Spectra from files: LAMOST's FITS, tables of wavelength and flux, and arrays on the grid of a model."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from provenn.core.errors import UserError
from provenn.core.inputs import check_file
from provenn.data.numerals import is_hole
from provenn.data.tables import parse_number, read_table
from provenn.papers.rrnet.spectra import CLIP, LEAST_KNOWN, UNKNOWN, Arm, normalise_with_error

FITS, TABLES, ARRAYS = (".fits", ".fit", ".gz"), (".csv", ".tsv", ".txt"), (".npy", ".npz")
ENDINGS = (*FITS, *TABLES, *ARRAYS)
WAVES = ("LOGLAM", "WAVELENGTH", "WAVE", "LAMBDA")
Columns = list[np.ndarray]


class Spectra(NamedTuple):
    """What a file holds.

    Args:
        names: of each spectrum.
        flux: normalised, on the grid of the model; NaN where it is missing.
        error: of each flux, one standard deviation; None where the file has none.
    """

    names: list[str]
    flux: Float[np.ndarray, "spectra pixels"]
    error: Float[np.ndarray, "spectra pixels"] | None = None


def count_spectra(file: Path) -> int:
    """How many a file holds: an array its rows, any other one."""
    if file.suffix.lower() not in ARRAYS:
        return 1
    flux = _array(file)[0]
    return 1 if flux.ndim == 1 else len(flux)


def read_spectra(
    file: Path, arms: Sequence[Arm], velocity: float | int = 0.0, low: int = 0, high: int | None = None
) -> Spectra:
    """The spectra of a file, normalised for a model.

    Args:
        file: a FITS file of LAMOST, gzipped or not. Or a table with the columns `wavelength`, in Å, `flux` and, if
            known, `error`. Or a NumPy array of (spectra, pixels), normalised on the grid of the model; an archive has
            such arrays under the names `flux` and `error`. A flux that is NaN, or an empty cell, is missing.
        arms: the grid.
        velocity: of the star in km/s, away from us, for spectra that are not at rest.
        low, high: the first spectrum of an array that is read, and the one before which reading ends.

    Raises:
        UserError: no such file, one that cannot be read, or a spectrum that does not cover the grid.
    """
    check_file(file)
    suffix = file.suffix.lower()
    if suffix in ARRAYS:
        return _from_array(file, arms, low, high)
    if suffix in TABLES:
        waves, fluxes, errors = _from_table(file, len(arms))
    elif suffix in FITS:
        waves, fluxes, errors = _from_fits(file, arms)
    else:
        raise UserError(f"{file} is no spectrum: expected an ending among {', '.join(ENDINGS)}")
    try:
        flux, error = normalise_with_error(waves, fluxes, errors, velocity, arms)
    except UserError as refusal:
        raise UserError(f"{file}: {refusal}") from None
    name = file.name.removesuffix(".gz").rsplit(".", 1)[0]
    return Spectra([name], flux[None], None if error is None else error[None])


def _array(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Flux and, of an archive, error; an array's rows are read when they are asked for."""
    check_file(file)
    try:
        if file.suffix.lower() == ".npy":
            flux, error = np.load(file, mmap_mode="r", allow_pickle=False), None
        else:
            with np.load(file, allow_pickle=False) as held:
                flux, error = held["flux"], held.get("error")
    except KeyError:
        raise UserError(f"{file} holds no array named flux") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as refusal:
        raise UserError(f"{file} is no array that can be read: {' '.join(str(refusal).split())}") from None
    if not isinstance(flux, np.ndarray) or flux.ndim not in (1, 2) or flux.dtype.kind not in "fiu":
        raise UserError(f"{file} holds an array of {getattr(flux, 'shape', 'no shape')}; expected (spectra, pixels)")
    if error is not None and (error.shape != flux.shape or error.dtype.kind not in "fiu"):
        raise UserError(f"{file}: flux is {flux.shape} and error {error.shape}; expected the same")
    return flux, error


def _from_array(file: Path, arms: Sequence[Arm], low: int, high: int | None) -> Spectra:
    flux, error = _array(file)
    if flux.ndim == 1:
        flux, error = flux[None], None if error is None else error[None]
    expected = sum(arm.pixels for arm in arms)
    if flux.shape[1] != expected:
        raise UserError(f"{file} holds an array of {flux.shape}; expected (spectra, {expected}) numbers, normalised")
    count = len(flux)
    values = np.array(flux[low:high], np.float64)
    known = np.isfinite(values)
    if (empty := np.flatnonzero(known.mean(1) < LEAST_KNOWN)).size:
        raise UserError(
            f"{file}: most values of {empty.size} of {len(values)} spectra are no numbers, the first in row "
            f"{low + empty[0] + 1}; at least half must be known"
        )
    values[~known] = np.nan
    digits = len(str(max(0, count - 1)))
    names = [file.stem if count == 1 else f"{file.stem}-{low + row:0{digits}}" for row in range(len(values))]
    if error is None:
        return Spectra(names, values.clip(*CLIP))
    spread = np.nan_to_num(np.asarray(error[low:high], np.float64), nan=UNKNOWN, posinf=UNKNOWN)
    if (spread < 0).any():
        raise UserError(f"{file}: an error is below zero; expected standard deviations")
    return Spectra(names, values.clip(*CLIP), spread.clip(0, UNKNOWN))


def _from_table(file: Path, arms: int) -> tuple[Columns, Columns, Columns | None]:
    table = read_table(file)
    places = {name.strip().upper(): index for index, name in enumerate(table.columns)}
    wave = next((name for name in WAVES if name in places), None)
    if wave is None or "FLUX" not in places:
        raise UserError(f"{file} has the columns {', '.join(table.columns)}; expected wavelength, in Å, and flux")
    wanted = [places[name] for name in (wave, "FLUX", "ERROR") if name in places]
    rows = [
        [
            np.nan if index and is_hole(row[place]) else parse_number(row[place], f"{file}, row {number}")
            for index, place in enumerate(wanted)  # a wavelength may not be missing
        ]
        for number, row in enumerate(table.rows, 2)
    ]
    if len(rows) < 2:
        raise UserError(f"{file} holds {len(rows)} pixel(s); expected a spectrum")
    waves, fluxes, *errors = np.array(rows).T
    waves = 10**waves if wave == "LOGLAM" else waves
    return [waves] * arms, [fluxes] * arms, [errors[0]] * arms if errors else None


def _from_fits(file: Path, arms: Sequence[Arm]) -> tuple[Columns, Columns, Columns | None]:
    """Wavelengths, fluxes and errors that cover each arm: of LAMOST's files the co-added ones, by preference.

    IVAR is one over the variance, and zero where a flux is not known. A flux that is NaN is missing, whatever its IVAR.
    """
    fits = astropy_fits()
    tables: list[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]] = []
    try:
        with fits.open(file, memmap=False) as units:
            for unit in units[1:]:
                columns = {name.upper(): name for name in getattr(getattr(unit, "columns", None), "names", None) or []}
                wave = next((columns[name] for name in WAVES if name in columns), None)
                if wave is None or "FLUX" not in columns:
                    continue
                x, y = (np.asarray(unit.data[name], np.float64).ravel() for name in (wave, columns["FLUX"]))
                error = None
                if "IVAR" in columns:
                    inverse = np.asarray(unit.data[columns["IVAR"]], np.float64).ravel()
                    known = inverse > 0
                    known_flux = np.abs(y[np.isfinite(y)])
                    error = np.full(inverse.shape, UNKNOWN * max(1.0, float(known_flux.max(initial=0))))
                    error[known] = inverse[known] ** -0.5
                tables.append((str(unit.name).upper(), 10**x if wave.upper() == "LOGLAM" else x, y, error))
    except (OSError, ValueError, TypeError, KeyError, IndexError) as refusal:
        raise UserError(f"{file} is no FITS file that can be read: {' '.join(str(refusal).split())}") from None
    if not tables:
        raise UserError(f"{file} has no table with the columns FLUX and LOGLAM or WAVELENGTH")
    tables.sort(key=lambda table: not table[0].startswith("COADD"))  # stable: the file's order otherwise
    chosen = []
    for arm in arms:
        found = [table for table in tables if len(table[1]) > 1 and _covers(table[1], arm)]
        if not found:
            reach = "; ".join(f"{name} {x[0]:.0f} to {x[-1]:.0f} Å" for name, x, *_ in tables if len(x))
            raise UserError(f"{file} has no spectrum of {arm.start:g} to {arm.end:g} Å: {reach}")
        chosen.append(found[0])
    errors = [error for *_, error in chosen if error is not None]
    return [x for _, x, _, _ in chosen], [y for _, _, y, _ in chosen], errors if len(errors) == len(arms) else None


def _covers(wave: np.ndarray, arm: Arm) -> bool:
    return bool(wave[0] <= arm.start and wave[-1] >= arm.end - arm.step)


def astropy_fits() -> Any:
    """The module that reads and writes FITS.

    Raises:
        UserError: astropy is not installed.
    """
    try:
        from astropy.io import fits
    except ImportError:
        raise UserError("FITS needs astropy: pip install 'provenn[spectra]'") from None
    return fits
