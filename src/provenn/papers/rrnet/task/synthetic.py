"""Spectra from a small physical model: lines with a curve of growth, broadened by gravity and the instrument.

No spectra ship with any package. These have the shape of the problem, not its figures: what is measured on them says
nothing about kelvin and dex of a survey.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from provenn.papers.rrnet.spectra import CLIP, Arm, continuum

ARMS = (Arm(4968, 5328, 0.5), Arm(6339, 6699, 0.5))  # the real bands at a fifth of the pixels: 2 × 720
ELEMENTS = {"Fe": 120, "Mg": 12, "Ca": 25, "Si": 18, "Ti": 40}  # and how many lines of each
LABELS = ("Teff", "logg", "Fe", "Mg", "Ca", "Si", "Ti")
UNITS = ("K", "dex", "dex", "dex", "dex", "dex", "dex")
RESOLUTION = 7500.0
TEMPERATURES = (3800.0, 7000.0)
SUN = 5777.0


class Lines(NamedTuple):
    """A fixed list of lines.

    Args:
        wave: in Å.
        element: index into `ELEMENTS`.
        excitation: χ in eV.
        strength: log gf.
        ionised: whether of an ion.
    """

    wave: Float[np.ndarray, " lines"]
    element: np.ndarray
    excitation: Float[np.ndarray, " lines"]
    strength: Float[np.ndarray, " lines"]
    ionised: np.ndarray


@cache
def line_list() -> Lines:
    """The lines, the same for every seed."""
    rng = np.random.default_rng(215)
    count = sum(ELEMENTS.values())
    arm = rng.integers(2, size=count)
    starts, ends = (np.array([getattr(a, name) for a in ARMS])[arm] for name in ("start", "end"))
    return Lines(
        wave=rng.uniform(starts, ends),
        element=np.repeat(np.arange(len(ELEMENTS)), list(ELEMENTS.values())),
        excitation=rng.uniform(0, 5, count),
        strength=rng.normal(-1.2, 0.7, count),
        ionised=rng.random(count) < 0.15,
    )


def stars(count: int, rng: np.random.Generator) -> Float[np.ndarray, "stars labels"]:
    """Labels of stars, in the order of `LABELS`: dwarfs and giants; elements go with iron, 0.12 dex."""
    temperature = rng.uniform(*TEMPERATURES, count)
    giant = (temperature < 5400) & (rng.random(count) < 0.6)
    gravity = np.where(giant, rng.normal(2.4, 0.5, count), rng.normal(4.4, 0.2, count)).clip(0.5, 5)
    iron = rng.normal(-0.2, 0.3, count)
    others = iron[:, None] + rng.normal(0, 0.12, (count, len(ELEMENTS) - 1))
    return np.column_stack([temperature, gravity, iron, others])


def pure(
    labels: Float[np.ndarray, "stars labels"], resolution: float = RESOLUTION
) -> Float[np.ndarray, "stars pixels"]:
    """Normalised flux without noise: exp(−Σ EW·profile).

    An optical depth at the centre, log τ = [X/H] + log gf − θχ + ionisation, with θ = 5040/T_eff; ions weaken with
    gravity. Its equivalent width grows as log(1 + τ). The profile is a Gaussian of the instrument with Lorentz wings
    that grow with gravity.

    Args:
        labels: of `stars`.
        resolution: λ/Δλ.
    """
    lines = line_list()
    temperature, gravity, abundance = labels[:, :1], labels[:, 1:2], labels[:, 2:]
    theta = 5040 / temperature
    ionisation = np.where(
        lines.ionised, -0.35 * (gravity - 4.4) - 2.5 * (theta - 5040 / SUN), 4.0 * (theta - 5040 / SUN)
    )
    depth = 10 ** (abundance[:, lines.element] + lines.strength - theta * lines.excitation + ionisation + 3.4)
    width = 0.09 * np.log1p(depth)
    wings = 0.02 * 10 ** (0.25 * (gravity - 4.4))
    grid = np.concatenate([arm.grid() for arm in ARMS])
    sigma = lines.wave / resolution / 2.3548
    away = grid[None] - lines.wave[:, None]
    core = np.exp(-0.5 * (away / sigma[:, None]) ** 2) / (sigma[:, None] * np.sqrt(2 * np.pi))
    wing = 1 / (np.pi * (0.3 + away**2))
    absorbed = width @ core + wings * ((width * np.minimum(depth, 30) / 30) @ wing)
    return np.exp(-absorbed)


def observed(
    flux: Float[np.ndarray, "stars pixels"], rng: np.random.Generator
) -> tuple[Float[np.ndarray, "stars pixels"], Float[np.ndarray, " stars"]]:
    """What a telescope sees, over its continuum as `continuum` fits it, and its signal-to-noise ratio.

    The ratio is 10 to 100, with the same chance for each factor. Before the fit, the continuum is off by a random walk
    of about 1.5 %, and about two pixels of a spectrum hold remains of the sky.
    """
    count, pixels = flux.shape
    ratio = np.power(10.0, rng.uniform(1, 2, count))
    parts = []
    for arm in ARMS:
        walk = np.cumsum(rng.normal(0, 1, (count, arm.pixels)), axis=1)
        walk -= walk.mean(1, keepdims=True)
        parts.append(1 + 0.015 * walk / walk.std(1, keepdims=True))
    seen = flux * np.concatenate(parts, axis=1) + rng.normal(0, 1, flux.shape) / ratio[:, None]
    sky = rng.random(flux.shape) < 2 / pixels
    seen = np.where(sky, seen + rng.exponential(0.3, flux.shape), seen)
    low = 0
    for arm in ARMS:
        part = slice(low, low + arm.pixels)
        seen[:, part] /= continuum(arm.grid(), seen[:, part])
        low += arm.pixels
    return seen.clip(*CLIP), ratio


def survey(
    count: int, seed: int
) -> tuple[Float[np.ndarray, "stars pixels"], Float[np.ndarray, "stars labels"], Float[np.ndarray, " stars"]]:
    """Spectra, labels and signal-to-noise ratios; resolutions vary from star to star by 5 %, in eight steps."""
    rng = np.random.default_rng(seed)
    labels = stars(count, rng)
    step = rng.integers(8, size=count)
    flux = np.empty((count, sum(arm.pixels for arm in ARMS)))
    for each in range(8):
        chosen = step == each
        if chosen.any():
            flux[chosen] = pure(labels[chosen], RESOLUTION * (0.93 + 0.02 * each))
    seen, ratio = observed(flux, rng)
    return seen.astype(np.float32), labels.astype(np.float32), ratio.astype(np.float32)
