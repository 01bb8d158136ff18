"""What happens to a spectrum before RRNet sees it: rest frame, grid, cosmic rays, continuum (arXiv:2205.15490)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

from provenn.core.errors import UserError

LIGHT = 299_792.458  # km/s
RADIUS = 3  # pixels of the median against cosmic rays
BELOW, ABOVE = 3.0, 4.0  # σ that a pixel may lie below and above what is fitted
ORDER, ROUNDS = 5, 200  # of the polynomial, and fits at most; the authors' loop has no bound
FINE = 0.1  # Å between the pixels that are cleaned: a median over three of them leaves a line as it is
CLIP = (-0.5, 2.5)
UNKNOWN = 1e6  # the error of a flux that says nothing
LEAST_KNOWN = 0.5  # share of an arm's fluxes without which there is nothing to estimate


class Arm(NamedTuple):
    """A wavelength range of a grid, in Å; its pixels are start, start + step, …, without the end.

    Args:
        start, end, step: in Å.
    """

    start: float
    end: float
    step: float = 0.1

    @property
    def pixels(self) -> int:
        """How many."""
        return round((self.end - self.start) / self.step)

    def grid(self) -> Float[np.ndarray, " pixels"]:
        """Wavelengths, by whole multiples of the step: `arange` may return one too many.

        >>> Arm(4968, 5328).grid()[[0, 1, -1]].round(6).tolist()
        [4968.0, 4968.1, 5327.9]
        """
        return self.start + self.step * np.arange(self.pixels)


LAMOST = (Arm(4968, 5328), Arm(6339, 6699))  # the blue and the red arm of medium resolution, 3,600 pixels each


def to_rest(wave: Float[np.ndarray, " pixels"], velocity: float | int) -> Float[np.ndarray, " pixels"]:
    """Wavelengths at rest, λ/(1 + v/c).

    Args:
        wave: in Å.
        velocity: of the star in km/s, away from us.
    """
    return wave / (1 + velocity / LIGHT)


def resampled(
    wave: Float[np.ndarray, " pixels"], flux: Shaped[np.ndarray, " pixels"], arm: Arm, grid: Arm | None = None
) -> Float[np.ndarray, " pixels2"]:
    """Flux on the grid of an arm, between known neighbours linear; after the last pixel it stays.

    Args:
        wave: in Å.
        flux: in any unit; NaN where it is missing.
        arm: what the wavelengths must cover.
        grid: the pixels that are wanted, by default the arm's.

    Raises:
        UserError: wavelengths that do not rise or do not cover the arm, or an arm of which most fluxes are missing.
    """
    if len(wave) != len(flux) or len(wave) < 2:
        raise UserError(f"a spectrum has as many wavelengths as fluxes, at least 2; got {len(wave)} and {len(flux)}")
    if not np.isfinite(wave).all() or (np.diff(wave) <= 0).any():
        raise UserError("wavelengths must be numbers that rise")
    pixels = arm.grid()
    if wave[0] > pixels[0] or wave[-1] < pixels[-1]:
        raise UserError(
            f"wavelengths from {wave[0]:g} to {wave[-1]:g} do not cover {arm.start:g} to {arm.end:g} Å"
            f"{_likely_unit(wave, arm)}"
        )
    near = (wave >= arm.start - 10 * arm.step) & (wave <= arm.end + 10 * arm.step)
    known = np.isfinite(flux)
    if known[near].mean() < LEAST_KNOWN:
        bad = int((~known[near]).sum())
        raise UserError(
            f"{bad} of {int(near.sum())} fluxes between {arm.start:g} and {arm.end:g} Å are no numbers; "
            "at least half must be known"
        )
    return np.interp((grid or arm).grid(), wave[known], flux[known])


def _likely_unit(wave: Float[np.ndarray, " pixels"], arm: Arm) -> str:
    """In which other unit wavelengths would cover an arm, as words of an error."""
    in_angstrom = {"nanometres": 10 * wave, "micrometres": 1e4 * wave, "metres": 1e10 * wave}
    if wave[-1] < 10:
        in_angstrom["logarithms to base 10"] = np.power(10.0, wave)
    for unit, values in in_angstrom.items():
        if values[0] <= arm.start and values[-1] >= arm.end - arm.step:
            return f"; they look like {unit}: give Å"
    return ""


def missing_pixels(
    wave: Float[np.ndarray, " pixels"], flux: Shaped[np.ndarray, " pixels"], arm: Arm
) -> Bool[np.ndarray, " pixels2"]:
    """Which pixels of an arm's grid have a missing flux nearest to them."""
    return np.interp(arm.grid(), wave, ~np.isfinite(flux)) >= 0.5


def without_cosmic_rays(flux: Float[np.ndarray, " pixels"]) -> Float[np.ndarray, " pixels"]:
    """Flux whose outliers are replaced by the median of three pixels.

    With d = median − flux and σ its standard deviation, d ≥ 3σ or d ≤ −4σ is an outlier. Beyond the ends are zeros.
    """
    from scipy.signal import medfilt

    median = medfilt(flux, RADIUS)
    off = median - flux
    sigma = off.std()
    return np.where((off < BELOW * sigma) & (off > -ABOVE * sigma), flux, median)


def continuum(
    wave: Float[np.ndarray, " pixels"], flux: Float[np.ndarray, "*spectra pixels"]
) -> Float[np.ndarray, "*spectra pixels"]:
    """A polynomial of order 5 in log₁₀ λ, fitted again and again to what is not a line.

    After each fit, pixels 3σ below or 4σ above it are put to the fit, for the next fit alone, until none is. So the fit
    rises to the true continuum from round to round, for at most 200 rounds.

    Args:
        wave: in Å.
        flux: of one spectrum or of many; what is constant is its own continuum.
    """
    angle = np.log10(wave)
    angle = (angle - angle.mean()) / angle.std()
    # A fit by least squares projects onto the powers: their orthonormal basis is found once.
    basis = np.linalg.qr(np.vander(angle, ORDER + 1))[0]
    rows = np.atleast_2d(flux)
    centre, spread = rows.mean(1, keepdims=True), rows.std(1, keepdims=True)
    fitted = np.zeros(rows.shape)
    y = np.divide(rows - centre, spread, out=np.zeros(rows.shape), where=spread > 0)
    open_ = np.flatnonzero(spread[:, 0] > 0)
    for _ in range(ROUNDS):
        if not len(open_):
            break
        fit = (y[open_] @ basis) @ basis.T
        off = fit - y[open_]
        sigma = off.std(1, keepdims=True)
        kept = (off > -ABOVE * sigma) & (off < BELOW * sigma)
        fitted[open_] = fit
        # As the authors have it: the pixels whose mark differs from the first round's, which marks all.
        y[open_] = np.where(kept, y[open_], fit)
        open_ = open_[~kept.all(1)]
    return (fitted * spread + centre).reshape(flux.shape)


def normalise_spectrum(
    wave: Sequence[Float[np.ndarray, " pixels"]] | Float[np.ndarray, " pixels"],
    flux: Sequence[Shaped[np.ndarray, " pixels"]] | Shaped[np.ndarray, " pixels"],
    velocity: float | int = 0.0,
    arms: Sequence[Arm] = LAMOST,
) -> Float[np.ndarray, " pixels2"]:
    """A spectrum as RRNet takes it before it is standardised: about 1 where there is no line.

    At rest, without cosmic rays, divided by its continuum, arm after arm, in −0.5…2.5. All this on pixels of 0.1 Å, as
    the authors have it, or of less; of a coarser grid every so manieth is taken.

    A flux that is NaN is missing: cleaning and continuum see the line between its neighbours, and its pixel is NaN.

    Args:
        wave, flux: of each arm, or one that covers all.
        velocity: of the star in km/s, away from us.
        arms: grids.

    Raises:
        UserError: as of `resampled`.
    """
    return normalise_with_error(wave, flux, None, velocity, arms)[0]


def normalise_with_error(
    wave: Sequence[Float[np.ndarray, " pixels"]] | Float[np.ndarray, " pixels"],
    flux: Sequence[Shaped[np.ndarray, " pixels"]] | Shaped[np.ndarray, " pixels"],
    error: Sequence[Shaped[np.ndarray, " pixels"]] | Shaped[np.ndarray, " pixels"] | None,
    velocity: float | int = 0.0,
    arms: Sequence[Arm] = LAMOST,
) -> tuple[Float[np.ndarray, " pixels2"], Float[np.ndarray, " pixels2"] | None]:
    """`normalise_spectrum`, and the error of each pixel, divided by the same continuum.

    Args:
        wave, flux, velocity, arms: as of `normalise_spectrum`.
        error: one standard deviation of each flux, if known.
    """
    given = [wave, flux] if error is None else [wave, flux, error]
    waves, fluxes, *errors = ([part] * len(arms) if isinstance(part, np.ndarray) else list(part) for part in given)
    if not len(waves) == len(fluxes) == len(arms) or any(len(each) != len(arms) for each in errors):
        raise UserError(f"a spectrum has {len(arms)} arms, got {len(waves)} wavelengths and {len(fluxes)} fluxes")
    parts, spreads = [], []
    for index, arm in enumerate(arms):
        rest = to_rest(waves[index], velocity)
        every = max(1, round(arm.step / FINE))
        fine = arm._replace(step=arm.step / every)
        clean = without_cosmic_rays(resampled(rest, fluxes[index], arm, fine))
        fitted = continuum(fine.grid(), clean)[::every]
        with np.errstate(divide="ignore", invalid="ignore"):
            normal = np.nan_to_num(clean[::every] / fitted, nan=1.0, posinf=CLIP[1], neginf=CLIP[0])
            normal[missing_pixels(rest, fluxes[index], arm)] = np.nan
            parts.append(normal)
            for each in errors:
                off = np.abs(np.interp(arm.grid(), rest, each[index]) / fitted)
                spreads.append(np.nan_to_num(off, nan=UNKNOWN, posinf=UNKNOWN).clip(0, UNKNOWN))
    return np.concatenate(parts).clip(*CLIP), np.concatenate(spreads) if spreads else None
