"""Composed wounds: pictures of skin with a wound, made by a stated model of how such a picture comes about.

No photograph of a wound ships with a Python package. These are composed. Skin follows the absorption of melanin and
haemoglobin under one light, grained with photographs of gravel and grass. Wounds are of red granulation, yellow
slough and black necrosis, grained with a photograph of stained tissue. They are no patients, and figures on them say
nothing of patients.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from jaxtyping import Float, UInt8
from numpy.random import Generator
from scipy.ndimage import gaussian_filter

from provenn.data.photographs import grey_photograph

# Rows of the textures that each split takes its grain from: no split sees those of another.
BANDS = {"train": (0, 230), "val": (230, 358), "test": (358, 512)}
LARGEST = 128  # pixels a side: the narrowest band
MELANIN = np.array([0.35, 0.60, 1.00])  # absorption of red, green and blue
HAEMOGLOBIN = np.array([0.12, 0.62, 0.52])
GRAIN = {"skin": ("gravel", "grass"), "wound": ("ihc",), "cloth": ("brick",)}
TISSUE = {"granulation": (0.52, 0.12, 0.12), "slough": (0.70, 0.60, 0.34), "necrosis": (0.11, 0.08, 0.07)}


@dataclass(frozen=True)
class Domain:
    """What wounds of one kind look like.

    Args:
        name: enters the draw of each picture.
        radius: of the wound as a share of the side, from and to.
        slough, necrosis: the largest share of the wound that each takes.
        halo: how much redder the skin around is, from and to; the halo is no wound.
        darkness: factor on the wound's colours, from and to.
    """

    name: str
    radius: tuple[float, float]
    slough: float
    necrosis: float
    halo: tuple[float, float]
    darkness: tuple[float, float]


ULCERS = Domain("ulcers", (0.12, 0.28), 0.45, 0.40, (0.5, 1.3), (0.55, 1.0))
WOUNDS = Domain("wounds", (0.08, 0.18), 0.15, 0.0, (0.0, 0.5), (0.85, 1.15))
# Between the two, for the question how near a source domain must be.
NEAR = replace(ULCERS, name="near", radius=(0.10, 0.23), slough=0.30, necrosis=0.20, halo=(0.25, 0.9))
DOMAINS: Mapping[str, Domain] = {domain.name: domain for domain in (ULCERS, WOUNDS, NEAR)}


def draw(
    domain: Domain, split: str, index: int, *, seed: int, side: int
) -> tuple[UInt8[np.ndarray, "side side 3"], UInt8[np.ndarray, "side side"]]:
    """One picture and its mask, 1 where the wound is; the same for the same arguments.

    Args:
        domain: the kind of wound.
        split: "train", "val" or "test": other parts of the textures, and in the test other directions of the light.
        index, seed: which one.
        side: in pixels, at most 128.
    """
    rng = np.random.default_rng([seed, sum(map(ord, domain.name)), list(BANDS).index(split), index])
    unit = side / 64  # lengths are given for 64 pixels
    skin, haem = _skin(rng, split, side)
    field = _outline(rng, domain, side)
    halo = rng.uniform(*domain.halo) * np.exp(np.minimum(field, 0) / (rng.uniform(3, 8) * unit))
    reflected = np.exp(-(skin[..., None] * MELANIN + (haem + halo)[..., None] * HAEMOGLOBIN))
    reflected = reflected * (1 + rng.uniform(0.04, 0.08) * _grain(rng, "skin", split, side)[..., None])
    reflected = _distractors(rng, reflected, split, field)
    wound = _wound(rng, domain, split, field)
    cover = 1 / (1 + np.exp(-field / (rng.uniform(0.3, 0.9) * unit)))
    picture = _light(rng, split, side)[..., None] * ((1 - cover[..., None]) * reflected + cover[..., None] * wound)
    glints = _smooth(rng, side, 1.2 * unit) > 2.6
    picture = picture + 0.35 * (glints & (field > unit))[..., None]
    picture = picture * rng.uniform(0.92, 1.08, 3) + 0.02 * rng.standard_normal(picture.shape)
    return np.rint(255 * picture.clip(0, 1)).astype(np.uint8), (field > 0).astype(np.uint8)


def draw_unrelated(split: str, index: int, *, seed: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A patch of one texture in another, in any two colours, and its mask: a source domain that is no wound."""
    rng = np.random.default_rng([seed, 7919, list(BANDS).index(split), index])
    field = _outline(rng, WOUNDS, side)
    grains = [_grain(rng, kind, split, side) for kind in ("cloth", "skin")]
    colours = rng.uniform(0.15, 0.85, (2, 3))
    inside, outside = (colour * (1 + 0.25 * grain[..., None]) for colour, grain in zip(colours, grains))
    picture = np.where((field > 0)[..., None], inside, outside) + 0.02 * rng.standard_normal((side, side, 3))
    return np.rint(255 * picture.clip(0, 1)).astype(np.uint8), (field > 0).astype(np.uint8)


@cache
def _relief(name: str) -> Float[np.ndarray, "512 512"]:
    """A texture without its slow changes, of deviation 1."""
    values = grey_photograph(name)[:512, :512].astype(np.float64)
    values = values - gaussian_filter(values, 6)
    return (values / values.std()).clip(-3, 3)


def _grain(rng: Generator, kind: str, split: str, side: int) -> Float[np.ndarray, "side side"]:
    """A crop of one of a kind's textures, from the rows of its split."""
    names = GRAIN[kind]
    relief, (low, high) = _relief(names[rng.integers(len(names))]), BANDS[split]
    top, left = rng.integers(low, high - side + 1), rng.integers(0, relief.shape[1] - side + 1)
    return relief[top : top + side, left : left + side]


def _smooth(rng: Generator, side: int, scale: float) -> Float[np.ndarray, "side side"]:
    """A Gaussian random field of deviation 1."""
    values = gaussian_filter(rng.standard_normal((side, side)), scale, mode="wrap")
    return (values - values.mean()) / values.std()


def _skin(rng: Generator, split: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Melanin and haemoglobin of each pixel: a tone, slow blotches, moles and hairs."""
    unit = side / 64
    melanin = rng.uniform(0.1, 1.3) * (1 + 0.08 * _smooth(rng, side, 8 * unit))
    haem = rng.uniform(0.1, 0.45) * (1 + 0.15 * _smooth(rng, side, 8 * unit))
    y, x = np.mgrid[:side, :side]
    for _ in range(rng.integers(0, 4)):  # moles
        at, radius = rng.uniform(0, side, 2), rng.uniform(0.8, 2.6) * unit
        melanin = melanin + rng.uniform(0.4, 1.2) / (
            1 + np.exp(np.hypot(y - at[0], x - at[1]) * 2 / unit - 2 * radius / unit)
        )
    for _ in range(rng.integers(0, 5)):  # hairs
        melanin = melanin + rng.uniform(0.5, 1.5) * _stroke(rng, side, 0.45 * unit)
    return melanin, haem


def _stroke(rng: Generator, side: int, width: float) -> Float[np.ndarray, "side side"]:
    """A bent line of some width, 1 on it and 0 away from it."""
    t = np.linspace(0, 1, 48)[:, None]
    start, bend, end = rng.uniform(0, side, (3, 2))
    line = (1 - t) ** 2 * start + 2 * t * (1 - t) * ((start + end) / 2 + 0.3 * (bend - start)) + t**2 * end
    grid = np.mgrid[:side, :side].reshape(2, -1).T
    near = ((grid[:, None] - line[None]) ** 2).sum(-1).min(1).reshape(side, side)
    return np.exp(-near / (2 * width**2))


def _outline(rng: Generator, domain: Domain, side: int) -> Float[np.ndarray, "side side"]:
    """About how far a pixel lies inside the wound, in pixels; below 0 outside. An ellipse, bent by a random field."""
    centre, radius = rng.uniform(0.32, 0.68, 2) * side, rng.uniform(*domain.radius) * side
    stretch, angle = rng.uniform(0.65, 1.0), rng.uniform(0, np.pi)
    y, x = np.mgrid[:side, :side] - centre[:, None, None]
    along, across = x * np.cos(angle) + y * np.sin(angle), (y * np.cos(angle) - x * np.sin(angle)) / stretch
    return radius - np.hypot(along, across) + 0.16 * radius * _smooth(rng, side, side / 10)


def _wound(rng: Generator, domain: Domain, split: str, field: np.ndarray) -> Float[np.ndarray, "side side 3"]:
    """The colours of the wound: granulation, and patches of slough and necrosis that favour its middle."""
    side = len(field)
    colours = {name: np.array(colour) * rng.uniform(0.85, 1.15, 3) for name, colour in TISSUE.items()}
    picture = np.broadcast_to(colours["granulation"], (side, side, 3)).copy()
    inside = field > 0
    for name, most in (("slough", domain.slough), ("necrosis", domain.necrosis)):
        share = rng.uniform(0, most)
        patches = _smooth(rng, side, side / 14) + 0.6 * field / max(field.max(), 1e-6)
        if inside.any() and share > 0:
            soft = 1 / (1 + np.exp(-(patches - np.quantile(patches[inside], 1 - share)) / 0.12))[..., None]
            picture = (1 - soft) * picture + soft * colours[name]
    grain = _grain(rng, "wound", split, side)[..., None]
    return picture * (1 + rng.uniform(0.10, 0.18) * grain) * rng.uniform(*domain.darkness)


def _distractors(rng: Generator, picture: np.ndarray, split: str, field: np.ndarray) -> np.ndarray:
    """Red scratches on the skin, and one time in three a corner of cloth that leaves the wound free."""
    side = len(field)
    for _ in range(rng.integers(0, 3)):
        scratch = _stroke(rng, side, 0.8 * side / 64)[..., None]
        picture = picture * (1 - 0.55 * scratch * np.array([0.3, 1.0, 0.9]))
    if rng.random() < 1 / 3:
        angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.38, 0.55) * side
        y, x = np.mgrid[:side, :side] - side / 2
        cloth = (x * np.cos(angle) + y * np.sin(angle) > away) & (field < -2 * side / 64)
        colour = rng.uniform(0.35, 0.9, 3) * (1 + 0.08 * _grain(rng, "cloth", split, side)[..., None])
        picture = np.where(cloth[..., None], colour, picture)
    return picture


def _light(rng: Generator, split: str, side: int) -> Float[np.ndarray, "side side"]:
    """One light from a side, and the lens: from other directions in the test than in training."""
    angle = rng.uniform(0, 0.9 * np.pi) + (np.pi if split == "test" else 0)
    y, x = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    slope = rng.uniform(0.2, 0.7) * (x * np.cos(angle) + y * np.sin(angle))
    return rng.uniform(0.8, 1.15) * (1 + slope) * (1 - rng.uniform(0.1, 0.5) * (x**2 + y**2))
