"""Views of regions of photographs: the same piece of the world again, moved, turned, partly hidden, by other cameras.

Two sets are drawn so. In `region_classes` a region is a class, and its neighbours overlap with it. In
`region_sightings` a region is an identity that four cameras see, and no photograph has identities in two splits.
`chelsea` and scikit-image's `cat` are one picture, and `motorcycle` has two views: one of each pair is used here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from provenn.data.patches import SOURCES
from provenn.data.photographs import GREY, grey_photograph, photograph

FLATTEST = 12.0  # of 255: a region whose grey levels deviate less shows nothing


@dataclass(frozen=True)
class Wander:
    """How a view of a region differs from another one.

    Args:
        shift: pixels to each side, at most.
        turn: degrees to each side, at most.
        scale: share by which it is larger or smaller, at most.
        hidden: the probability that a rectangle of another photograph hides a part.
        most: the share of the view that such a rectangle covers, at most.
        light: by how much brightness and contrast differ, as a share, at most.
        noise: deviation of what is added to each pixel, of 255.
    """

    shift: float | int
    turn: float | int
    scale: float | int
    hidden: float | int
    most: float | int = 0.4
    light: float | int = 0.0
    noise: float | int = 0.0


@dataclass(frozen=True)
class Camera:
    """What a camera does to all that it sees.

    Args:
        gain: of red, green and blue.
        gamma: v becomes v^gamma, in 0…1; above 1 is darker.
        blur: deviation of a Gaussian, in pixels.
        coarse: how many pixels of the view one of its own is wide.
        noise: deviation, of 255.
        zoom: how many pixels of the photograph a pixel of the view is wide.
        turn: degrees by which it hangs askew.
    """

    gain: tuple[float | int, float | int, float | int] = (1.0, 1.0, 1.0)
    gamma: float | int = 1.0
    blur: float | int = 0.0
    coarse: float | int = 1.0
    noise: float | int = 0.0
    zoom: float | int = 1.0
    turn: float | int = 0.0


CAMERAS = (
    Camera(blur=0.5, noise=4.0),
    Camera(gain=(1.12, 1.0, 0.85), gamma=0.88, blur=1.0, noise=6.0, zoom=0.92, turn=4.0),
    Camera(gain=(0.85, 0.95, 1.1), gamma=1.15, coarse=2.0, noise=6.0, zoom=1.1, turn=-3.0),
    Camera(gain=(0.88, 0.85, 0.8), gamma=1.3, blur=0.8, coarse=1.5, noise=10.0, turn=2.0),
)
SIGHTING = (64, 32)  # height and width of a view of an identity, in pixels
MARGIN = (20, 20)  # between two identities of a photograph: no view of one reaches the other's rectangle
SPLITS = {  # no photograph is in two, and each has both grey and coloured ones
    "train": ("chelsea", "coffee", "flower", "hubble", "brick", "camera", "cell", "grass"),
    "val": ("rocket", "moon"),
    "test": ("astronaut", "china", "ihc", "motorcycle", "coins", "gravel", "page"),
}
COUNTS = {"train": 60, "val": 15, "test": 60}  # identities
VIEWS = {"train": 8, "val": 4, "test": 8}  # of each identity by each camera
SIGHTED = Wander(shift=4, turn=10, scale=0.1, hidden=0.8, light=0.1)

SIDE = 32  # of a view of a class, in pixels
APART = 16  # pixels between neighbouring classes of a photograph
CLASSIFIED = Wander(shift=6, turn=15, scale=0.15, hidden=0.8, light=0.2, noise=6.0)
OF_CLASS = {"train": 24, "val": 8, "test": 16}  # views of each class


class Seen(NamedTuple):
    """Views of identities.

    Args:
        images: a view each.
        identities: whom it shows, counted on over the splits.
        cameras: which camera took it.
        queries: whether it is asked for; the others are the gallery.
    """

    images: UInt8[Tensor, "views 3 height width"]
    identities: Int64[Tensor, " views"]
    cameras: Int64[Tensor, " views"]
    queries: Bool[Tensor, " views"]


def region_sightings(
    split: str,
    *,
    identities: int | None = None,
    views: int | None = None,
    photographs: Sequence[str] | None = None,
    cameras: Sequence[Camera] = CAMERAS,
    wander: Wander = SIGHTED,
    seed: int = 0,
) -> Seen:
    """Identities of photographs as cameras see them, each several times.

    Args:
        split: "train", "val" or "test": from other photographs.
        identities: how many; by default 60, 15 and 60. As many of each photograph, or one more.
        views: of each identity by each camera; by default 8, 4 and 8. The first by each camera is a query.
        photographs: others to take regions from.
        cameras, wander: what the views differ in.
        seed: of the regions and of the views.

    Raises:
        ValueError: the photographs have fewer regions that do not touch each other and are not flat.
    """
    generator = torch.Generator().manual_seed(seed * 3 + list(SPLITS).index(split))
    names = tuple(SPLITS[split] if photographs is None else photographs)
    count = COUNTS[split] if identities is None else identities
    views = VIEWS[split] if views is None else views
    images = []
    for name, centres in _identities(names, count, generator):
        hides = tuple(other for other in names if other != name) or names
        every = centres.repeat_interleave(views, 0)
        seen = [_seen(name, every, SIGHTING, wander, hides, generator, camera=camera) for camera in cameras]
        by_camera = [views_of.unflatten(0, (len(centres), views)) for views_of in seen]
        images.append(torch.stack(by_camera, 1).flatten(0, 2))
    first = sum(COUNTS[before] for before in list(SPLITS)[: list(SPLITS).index(split)])
    return Seen(
        _bytes(torch.cat(images)),
        first + torch.arange(count).repeat_interleave(len(cameras) * views),
        torch.arange(len(cameras)).repeat_interleave(views).repeat(count),
        (torch.arange(views) == 0).repeat(count * len(cameras)),
    )


def region_classes(
    split: str,
    *,
    photographs: Sequence[str] = SOURCES,
    corner: float | int = 0.5,
    wander: Wander = CLASSIFIED,
    seed: int = 0,
) -> tuple[UInt8[Tensor, "views 3 side side"], Int64[Tensor, " views"]]:
    """Views of four regions of each photograph, two by two and 16 pixels apart: a class each, so that classes overlap.

    The regions are the same for each seed. Grey photographs have three equal channels before the light changes.

    Args:
        split: "train", "val" or "test": other views of the same regions.
        photographs: which.
        corner: where the four regions lie, as a share of what the photograph leaves; other shares give other regions.
        wander: what the views differ in.
        seed: of the views.
    """
    generator = torch.Generator().manual_seed(seed * 3 + list(OF_CLASS).index(split))
    count = OF_CLASS[split]
    images = []
    for name in photographs:
        size = torch.tensor(_pixels(name).shape[1:])
        reach = SIDE * 0.8 + wander.shift  # of a view that is turned, from its middle
        start = reach + corner * (size - APART - 2 * reach)
        hides = tuple(other for other in photographs if other != name) or (name,)
        for down in (0, APART):
            for right in (0, APART):
                centre = (start + torch.tensor([down, right])).expand(count, 2)
                images.append(_seen(name, centre, (SIDE, SIDE), wander, hides, generator))
    labels = torch.arange(4 * len(photographs)).repeat_interleave(count)
    return _bytes(torch.cat(images)), labels


def class_names(photographs: Sequence[str] = SOURCES) -> list[str]:
    """What the classes of `region_classes` are called: the photograph, and where in it.

    >>> class_names(["moon"])
    ['moon, upper left', 'moon, upper right', 'moon, lower left', 'moon, lower right']
    """
    places = [f"{row} {column}" for row in ("upper", "lower") for column in ("left", "right")]
    return [f"{name}, {place}" for name in photographs for place in places]


@cache
def _pixels(name: str) -> Float[Tensor, "3 height width"]:
    """A photograph in 0…255; of grey ones the three channels are equal."""
    pixels = np.repeat(grey_photograph(name)[..., None], 3, 2) if name in GREY else photograph(name)
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1).contiguous()


@cache
def _cells(name: str) -> Float[Tensor, "cells 2"]:
    """Centres of the regions of a photograph that do not touch each other and show something."""
    pixels = _pixels(name)
    tall, wide = (side + gap for side, gap in zip(SIGHTING, MARGIN))
    rows, columns = pixels.shape[1] // tall, pixels.shape[2] // wide
    cells = pixels.mean(0)[: rows * tall, : columns * wide].reshape(rows, tall, columns, wide).permute(0, 2, 1, 3)
    centres = torch.cartesian_prod(tall * (torch.arange(rows) + 0.5), wide * (torch.arange(columns) + 0.5))
    return centres[cells.flatten(2).std(2).flatten() > FLATTEST]


def _identities(names: Sequence[str], count: int, generator: torch.Generator) -> list[tuple[str, Tensor]]:
    """Centres of the regions that are taken of each photograph: of all as many, of the first ones one more."""
    chosen = []
    for index, name in enumerate(names):
        cells = _cells(name)
        wanted = count // len(names) + (index < count % len(names))
        if wanted > len(cells):
            raise ValueError(
                f"{name} has {len(cells)} regions that do not touch each other, and {wanted} were asked for"
            )
        chosen.append((name, cells[torch.randperm(len(cells), generator=generator)[:wanted]]))
    return [(name, centres) for name, centres in chosen if len(centres)]


def _seen(
    name: str,
    centres: Float[Tensor, "views 2"],
    size: tuple[int, int],
    wander: Wander,
    hides: Sequence[str],
    generator: torch.Generator,
    *,
    camera: Camera | None = None,
) -> Float[Tensor, "views 3 height width"]:
    """Views of one photograph, in 0…255, by a camera or by none."""
    count, (height, width) = len(centres), size
    camera = camera or Camera()
    draw = 2 * torch.rand(6, count, generator=generator) - 1
    turn = torch.deg2rad(wander.turn * draw[0] + camera.turn)
    scale = camera.zoom * (1 + wander.scale * draw[1])
    images = _cut(name, centres + wander.shift * draw[2:4].T, size, turn, scale)
    if wander.hidden:
        images = _hide(images, wander, hides, generator)
    if wander.light:
        images = (images - 128) * (1 + wander.light * draw[4, :, None, None, None]) + 128
        images = images + 128 * wander.light * draw[5, :, None, None, None]
    gain = torch.tensor(camera.gain)[:, None, None]
    images = 255 * (images / 255 * gain).clamp(0, 1) ** camera.gamma
    if camera.coarse > 1:
        small = (max(1, round(height / camera.coarse)), max(1, round(width / camera.coarse)))
        images = F.interpolate(images, small, mode="bilinear", antialias=True)
        images = F.interpolate(images, size, mode="bilinear")
    if camera.blur:
        images = _blur(images, camera.blur)
    noise = (wander.noise**2 + camera.noise**2) ** 0.5
    return images + noise * torch.randn(images.shape, generator=generator) if noise else images


def _cut(
    name: str,
    centres: Float[Tensor, "views 2"],
    size: tuple[int, int],
    turn: Float[Tensor, " views"],
    scale: Float[Tensor, " views"],
) -> Float[Tensor, "views 3 height width"]:
    """Rectangles of a photograph, turned and scaled about their centres."""
    pixels, (height, width) = _pixels(name), size
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    cos, sin = (scale * turn.cos())[:, None, None], (scale * turn.sin())[:, None, None]
    down = centres[:, 0, None, None] + cos * y + sin * x
    right = centres[:, 1, None, None] - sin * y + cos * x
    tall, wide = pixels.shape[1:]
    grid = torch.stack([2 * right / (wide - 1) - 1, 2 * down / (tall - 1) - 1], -1)
    # One picture and a tall grid: a picture for each view would copy the photograph as often.
    cut = F.grid_sample(pixels[None], grid.reshape(1, -1, width, 2), padding_mode="reflection", align_corners=True)
    return cut[0].reshape(3, len(centres), height, width).transpose(0, 1)


def _hide(
    images: Float[Tensor, "views 3 height width"], wander: Wander, hides: Sequence[str], generator: torch.Generator
) -> Float[Tensor, "views 3 height width"]:
    """A rectangle of another photograph on some of the views."""
    count, _, height, width = images.shape
    draw = torch.rand(6, count, generator=generator)
    sides = (wander.most * draw[0]).sqrt()
    ratio = (2 * draw[1] - 1).exp().sqrt()  # of the rectangle's height to its width, as shares of the view's
    tall, wide = height * (sides * ratio).clamp(max=1), width * (sides / ratio).clamp(max=1)
    top, left = (height - tall) * draw[2], (width - wide) * draw[3]
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    in_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    inside = in_rows[:, :, None] & in_columns[:, None, :] & (draw[4] < wander.hidden)[:, None, None]
    which = (draw[5] * len(hides)).long()
    others = torch.empty_like(images)
    for number in which.unique().tolist():
        views = (which == number).nonzero()[:, 0]
        bounds = torch.tensor(_pixels(hides[number]).shape[1:]) - torch.tensor([height, width])
        centres = torch.tensor([height, width]) / 2 + bounds * torch.rand(len(views), 2, generator=generator)
        others[views] = _cut(hides[number], centres, (height, width), torch.zeros(len(views)), torch.ones(len(views)))
    return torch.where(inside[:, None], others, images)


def _blur(
    images: Float[Tensor, "views 3 height width"], deviation: float | int
) -> Float[Tensor, "views 3 height width"]:
    reach = max(1, round(3 * deviation))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    weights = (weights / weights.sum()).expand(3, 1, -1)
    padded = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, weights[:, :, None], groups=3), weights[..., None], groups=3)


def _bytes(images: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    return images.round().clamp(0, 255).byte()
