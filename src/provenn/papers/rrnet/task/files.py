"""Spectra from files: LAMOST's FITS, tables of wavelength and flux, and arrays on the grid of a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from provenn.core.errors import UserError
from provenn.core.inputs import check_file
from provenn.data.tables import parse_number, read_table
from provenn.papers.rrnet.spectra import CLIP, Arm, normalise_spectrum

FITS, TABLES, ARRAYS = (".fits", ".fit", ".gz"), (".csv", ".tsv", ".txt"), (".npy",)
ENDINGS = (*FITS, *TABLES, *ARRAYS)
WAVES = ("LOGLAM", "WAVELENGTH", "WAVE", "LAMBDA")
FLUXES = ("FLUX",)


class Spectra(NamedTuple):
    """What a file holds.

    Args:
        names: of each spectrum.
        flux: normalised, on the grid of the model.
    """

    names: list[str]
    flux: Float[np.ndarray, "spectra pixels"]


def read_spectra(file: Path, arms: Sequence[Arm], velocity: float = 0.0) -> Spectra:
    """The spectra of a file, normalised for a model.

    Args:
        file: a FITS file of LAMOST, gzipped or not; a table with the columns `wavelength`, in Å, and `flux`; or a NumPy
            array of (spectra, pixels) that is normalised and on the grid of the model.
        arms: the grid.
        velocity: of the star in km/s, away from us, for spectra that are not at rest.

    Raises:
        UserError: no such file, one that cannot be read, or a spectrum that does not cover the grid.
    """
    check_file(file)
    suffix = file.suffix.lower()
    if suffix in ARRAYS:
        return _from_array(file, arms)
    if suffix in TABLES:
        waves, fluxes = _from_table(file, len(arms))
    elif suffix in FITS:
        waves, fluxes = _from_fits(file, arms)
    else:
        raise UserError(f"{file} is no spectrum: expected an ending among {', '.join(ENDINGS)}")
    try:
        flux = normalise_spectrum(waves, fluxes, velocity, arms)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return Spectra([file.name.removesuffix(".gz").rsplit(".", 1)[0]], flux[None])


def _from_array(file: Path, arms: Sequence[Arm]) -> Spectra:
    try:
        values = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{file} is no array that can be read: {' '.join(str(error).split())}") from None
    expected = sum(arm.pixels for arm in arms)
    values = values[None] if getattr(values, "ndim", 0) == 1 else values
    if getattr(values, "ndim", 0) != 2 or values.shape[1] != expected or values.dtype.kind not in "fiu":
        shape = getattr(values, "shape", "no shape")
        raise UserError(f"{file} holds an array of {shape}; expected (spectra, {expected}) numbers, normalised")
    values = values.astype(np.float64)
    if bad := int((~np.isfinite(values)).any(1).sum()):
        raise UserError(f"{file}: {bad} of {len(values)} spectra hold values that are no numbers")
    stem, digits = file.stem, len(str(max(0, len(values) - 1)))
    names = [stem] if len(values) == 1 else [f"{stem}-{index:0{digits}}" for index in range(len(values))]
    return Spectra(names, values.clip(*CLIP))


def _from_table(file: Path, arms: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    table = read_table(file)
    places = {name.strip().upper(): index for index, name in enumerate(table.columns)}
    wave = next((places[name] for name in WAVES if name in places), None)
    flux = next((places[name] for name in FLUXES if name in places), None)
    if wave is None or flux is None:
        raise UserError(f"{file} has the columns {', '.join(table.columns)}; expected wavelength, in Å, and flux")
    rows = [
        [parse_number(row[place], f"{file}, row {number}") for place in (wave, flux)]
        for number, row in enumerate(table.rows, 2)
    ]
    if len(rows) < 2:
        raise UserError(f"{file} holds {len(rows)} pixel(s); expected a spectrum")
    waves, fluxes = np.array(rows).T
    logarithmic = next(name for name in WAVES if places.get(name) == wave) == "LOGLAM"
    waves = 10**waves if logarithmic else waves
    return [waves] * arms, [fluxes] * arms


def _from_fits(file: Path, arms: Sequence[Arm]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The wavelengths and fluxes that cover each arm: of LAMOST's files the co-added ones, by preference."""
    fits = _astropy()
    tables: list[tuple[str, np.ndarray, np.ndarray]] = []
    try:
        with fits.open(file, memmap=False) as units:
            for unit in units[1:]:
                columns = {name.upper(): name for name in getattr(getattr(unit, "columns", None), "names", None) or []}
                wave = next((columns[name] for name in WAVES if name in columns), None)
                if wave is None or "FLUX" not in columns:
                    continue
                x, y = (np.asarray(unit.data[name], np.float64).ravel() for name in (wave, columns["FLUX"]))
                tables.append((str(unit.name).upper(), 10**x if wave.upper() == "LOGLAM" else x, y))
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{file} is no FITS file that can be read: {' '.join(str(error).split())}") from None
    if not tables:
        raise UserError(f"{file} has no table with the columns FLUX and LOGLAM or WAVELENGTH")
    tables.sort(key=lambda table: not table[0].startswith("COADD"))  # stable: the file's order otherwise
    waves, fluxes = [], []
    for arm in arms:
        found = [(x, y) for _, x, y in tables if len(x) > 1 and x[0] <= arm.start and x[-1] >= arm.end - arm.step]
        if not found:
            reach = "; ".join(f"{name} {x[0]:.0f} to {x[-1]:.0f} Å" for name, x, _ in tables if len(x))
            raise UserError(f"{file} has no spectrum of {arm.start:g} to {arm.end:g} Å: {reach}")
        waves.append(found[0][0])
        fluxes.append(found[0][1])
    return waves, fluxes


def _astropy() -> Any:
    try:
        from astropy.io import fits
    except ImportError:
        raise UserError("FITS needs astropy: pip install 'provenn[spectra]'") from None
    return fits
