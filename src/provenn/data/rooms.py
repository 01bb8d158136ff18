"""Composed scenes of several rooms, as clouds of points, with questions whose answers are true by construction.

As XR-Scene joins rooms that lie near each other (arXiv:2412.01292, section 4), a scene is some rooms in a row. Each has
a painted floor, grey walls, a large box with a lid, a small ball, and something that stands around: a heap of grey
points, or points of real scans. Those are the two views of a motorcycle that scikit-image ships, by their disparity,
and the matter of the MNI152 brain that nilearn ships. Nobody scanned these rooms.
"""

import importlib.util
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int16

from provenn.core.errors import UserError
from provenn.data.point_features import COLOURS

PAINTS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown")
SIDE, GAP, HEIGHT = 4.0, 0.5, 2.4  # metres of a room, between rooms, and of walls
BOX, LID, BALL = 0.6, 0.3, 0.15  # half sides and a radius, in metres
THINGS = ("floor", "walls", "box", "ball", "around")
# Shares of a room's points; a surveyor would get fewer of the ball.
SHARES = {"floor": 0.42, "walls": 0.2, "box": 0.14, "lid": 0.05, "ball": 0.04, "around": 0.15}
SPLITS = {"train": 3200, "val": 60, "test": 120}
KINDS = ("small", "part", "large", "floor", "caption", "plan")
NOISE = 0.04  # deviation of a colour
SCANS = ("motorcycle", "brain")


class Question(NamedTuple):
    """What is asked of a scene. `kind` is one of `KINDS`: colours of ball, lid, box and floor, and two texts."""

    asked: str
    answer: str
    kind: str


class Room(NamedTuple):
    """Colours of a room. It is named by its floor; in scenes of over eight rooms by its walls, too."""

    floor: str
    box: str
    lid: str
    ball: str
    walls: str = ""

    @property
    def named(self) -> str:
        """What it is called by."""
        return f"{self.floor} floor and {self.walls} walls" if self.walls else f"{self.floor} floor"


class Rooms(NamedTuple):
    """A scene.

    Args:
        points: in metres, z up.
        colours: from 0 to 1.
        objects: of each point the number of the thing that it is of, in a room one after the other: floor, walls, box
            with its lid, ball, and what stands around.
        rooms: in their order along x.
        questions: about it.
    """

    points: Float32[np.ndarray, "points 3"]
    colours: Float32[np.ndarray, "points 3"]
    objects: Int16[np.ndarray, " points"]
    rooms: tuple[Room, ...]
    questions: tuple[Question, ...]


def room_words() -> list[str]:
    """Every word that questions and answers have, in alphabetical order."""
    room, other = Room(*PAINTS[:4]), Room(*PAINTS[1:6])
    # Among them is an orange ball, and so both articles.
    said = [f"{asked} {answer}" for seed in range(9) for asked, answer, _ in _questions((room, other), seed)]
    return sorted({*" ".join(said).split(), *PAINTS})


@lru_cache(maxsize=4)
def composed_rooms(
    split: str, seed: int = 0, count: int | None = None, *, rooms: int = 3, points: int = 1024, scanned: bool = False
) -> tuple[Rooms, ...]:
    """Scenes of rooms, each with questions of every kind.

    A question names the room by what is painted on much of it, and asks for what few of its points show.

    Args:
        split: "train", "val" or "test"; no scene is in two, and no part of a scan.
        seed: of the scenes.
        count: how many. Default: 3,200, 60 and 120.
        rooms: in a scene, up to 64. Up to eight have floors and balls of different colours.
        points: of a scene.
        scanned: whether points of real scans stand around.

    Raises:
        UserError: more rooms than there are colours, or fewer than 64 points a room.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not 1 <= rooms <= len(PAINTS) ** 2:
        raise UserError(f"rooms must lie between 1 and {len(PAINTS) ** 2}, got {rooms}")
    if points < 64 * rooms:
        raise UserError(f"points must be at least 64 a room, {64 * rooms}, got {points}")
    if count is not None and count < 1:
        raise UserError(f"examples must be at least 1, got {count}")
    draw = np.random.default_rng([seed, list(SPLITS).index(split)])
    return tuple(_scene(draw, rooms, points, split if scanned else "") for _ in range(count or SPLITS[split]))


def _scene(draw: np.random.Generator, count: int, points: int, scans: str) -> Rooms:
    paints = len(PAINTS)
    floors, walls = np.divmod(draw.permutation(paints**2)[:count], paints)
    balls = draw.integers(0, paints, count)
    if count <= paints:
        floors, balls = (draw.permutation(paints)[:count] for _ in range(2))
    boxes = draw.integers(0, paints, count)
    lids = (boxes + draw.integers(1, paints, count)) % paints
    rooms = tuple(
        Room(PAINTS[floor], PAINTS[box], PAINTS[lid], PAINTS[ball], PAINTS[wall] if count > paints else "")
        for floor, box, lid, ball, wall in zip(floors, boxes, lids, balls, walls)
    )
    parts = [_room(draw, room, points // count + (k < points % count), scans) for k, room in enumerate(rooms)]
    across = int(np.ceil(np.sqrt(count))) if count > paints else count
    corners = [(SIDE + GAP) * np.array([k % across, k // across, 0]) for k in range(count)]
    where = np.concatenate([part[0] + corner for part, corner in zip(parts, corners)])
    colours = np.concatenate([part[1] for part in parts])
    things = np.concatenate([part[2] + k * len(THINGS) for k, part in enumerate(parts)])
    colours = np.clip(colours + NOISE * draw.standard_normal(colours.shape), 0, 1)
    order = draw.permutation(points)
    questions = tuple(_questions(rooms, int(draw.integers(0, 2**31))))
    return Rooms(
        where[order].astype(np.float32),
        colours[order].astype(np.float32),
        things[order].astype(np.int16),
        rooms,
        questions,
    )


def _room(draw: np.random.Generator, room: Room, points: int, scans: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, colours and numbers of things of a room that begins at 0."""
    numbers = {name: int(share * points) for name, share in SHARES.items()}
    numbers["floor"] += points - sum(numbers.values())
    floor = np.concatenate([draw.uniform(0, SIDE, (numbers["floor"], 2)), np.zeros((numbers["floor"], 1))], axis=1)
    along, side = draw.uniform(0, SIDE, numbers["walls"]), draw.integers(0, 4, numbers["walls"])
    across = np.where(side % 2 == 0, 0.0, SIDE)
    level = draw.uniform(0, HEIGHT, numbers["walls"])
    walls = np.stack([np.where(side < 2, along, across), np.where(side < 2, across, along), level], axis=1)
    # Three quarters of a room: box, ball and what stands around take one each.
    corners = np.array([[1.0, 1.0], [3.0, 1.0], [1.0, 3.0], [3.0, 3.0]])[draw.permutation(4)]
    corners = corners + draw.uniform(-0.3, 0.3, corners.shape)
    box = _surface(draw, numbers["box"]) * BOX + [*corners[0], BOX]
    lid = draw.uniform(-LID, LID, (numbers["lid"], 3)) * [1, 1, 0.1] + [*corners[0], 2 * BOX + 0.1 * LID]
    ball = draw.standard_normal((numbers["ball"], 3))
    ball = BALL * ball / np.linalg.norm(ball, axis=1, keepdims=True) + [*corners[1], BALL]
    around, painted = _around(draw, numbers["around"], scans)
    around = around + np.array([*corners[2], 0])
    parts = [
        ("floor", floor, np.array(COLOURS[room.floor])),
        ("walls", walls, np.array(COLOURS[room.walls or "grey"])),
        ("box", box, np.array(COLOURS[room.box])),
        ("box", lid, np.array(COLOURS[room.lid])),
        ("ball", ball, np.array(COLOURS[room.ball])),
        ("around", around, painted),
    ]
    return (
        np.concatenate([where for _, where, _ in parts]),
        np.concatenate([np.broadcast_to(colour, where.shape) for _, where, colour in parts]),
        np.concatenate([np.full(len(where), THINGS.index(thing)) for thing, where, _ in parts]),
    )


def _surface(draw: np.random.Generator, count: int) -> np.ndarray:
    """Points on a cube from −1 to 1."""
    where = draw.uniform(-1, 1, (count, 3))
    rows = np.arange(count)
    where[rows, draw.integers(0, 3, count)] = draw.choice([-1.0, 1.0], count)
    return where


def _around(draw: np.random.Generator, count: int, scans: str) -> tuple[np.ndarray, np.ndarray]:
    """What stands around, a metre wide and on the floor: a heap, or a piece of a scan in its own colours."""
    if not scans:
        where = draw.uniform(-0.5, 0.5, (count, 3)) + np.array([0, 0, 0.5])
        return where, np.array(COLOURS["grey"])
    kinds = [kind for kind in SCANS if kind != "brain" or importlib.util.find_spec("nilearn")]
    where, colours = _scan(str(draw.choice(kinds)), scans)
    middle = where[draw.integers(len(where))]
    near = np.argsort(np.square(where - middle).sum(1))[: 8 * count]
    near = near[draw.permutation(len(near))[:count]]
    piece = where[near]
    piece = piece - (piece.min(0) + piece.max(0)) / 2
    piece = piece / max(1e-6, float(np.abs(piece).max())) * 0.5
    piece[:, 2] -= piece[:, 2].min()
    return piece, colours[near]


@lru_cache(maxsize=8)
def _scan(kind: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Points and colours of the part of a scan that a split has: of three in a row, with a gap between."""
    where, colours = motorcycle_cloud() if kind == "motorcycle" else brain_cloud()
    low, high = {"train": (0.0, 0.6), "val": (0.62, 0.78), "test": (0.8, 1.0)}[split]
    along = (where[:, 0] - where[:, 0].min()) / np.ptp(where[:, 0])
    kept = (along >= low) & (along <= high)
    return where[kept], colours[kept]


def motorcycle_cloud(step: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Points of scikit-image's stereo pair: pixels of the left view, at the depth that their disparity says.

    Depth is f · b / d (Scharstein et al., 2014), with the focal length of 994.978 pixels at this size and the baseline
    of 193.001 mm; 31.086 pixels stand between the two cameras' centres.

    Args:
        step: every how many pixels, both ways.
    """
    from skimage import data

    left, _, disparity = data.stereo_motorcycle()
    rows, columns = np.mgrid[0 : left.shape[0] : step, 0 : left.shape[1] : step]
    shift = disparity[::step, ::step]
    seen = np.isfinite(shift)
    focal, baseline, offset = 994.978, 0.193001, 31.086
    depth = focal * baseline / (shift[seen] + offset)
    x, z = (columns[seen] - 311.193) * depth / focal, (254.877 - rows[seen]) * depth / focal
    return np.stack([x, depth, z], axis=1), left[::step, ::step][seen] / 255.0


@lru_cache(maxsize=1)
def brain_cloud(step: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of the MNI152 brain that are grey or white matter, in metres, as bright as the T1-weighted image.

    Args:
        step: every how many millimetres, along each axis.
    """
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    t1, grey, white = (
        load(resolution=1).get_fdata(dtype=np.float32)[::step, ::step, ::step]
        for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    )
    kept = np.maximum(grey, white) >= 0.5
    bright = t1[kept] / t1.max()
    return np.argwhere(kept) * step * 1e-3, np.repeat(bright[:, None], 3, axis=1)


def _questions(rooms: tuple[Room, ...], seed: int) -> list[Question]:
    """One of every kind, about rooms that a draw picks. A ball names a room only where there is one of its colour."""
    draw = np.random.default_rng(seed)
    balls = [room.ball for room in rooms]
    single = [room for room in rooms if balls.count(room.ball) == 1]
    small, part, large, caption, start = (rooms[k] for k in draw.integers(0, len(rooms), 5))
    asked = [
        Question(f"what colour is the ball in the room with the {small.named} ?", small.ball, "small"),
        Question(f"what colour is the lid of the box in the room with the {part.named} ?", part.lid, "part"),
        Question(f"what colour is the box in the room with the {large.named} ?", large.box, "large"),
        Question(
            f"describe the room with the {caption.named} .",
            f"a room with {_a(caption.floor)} floor , {_a(caption.box)} box with {_a(caption.lid)} lid and "
            f"{_a(caption.ball)} ball",
            "caption",
        ),
    ]
    if single:
        floor, goal = (single[k] for k in draw.integers(0, len(single), 2))
        go = f"leave the room with the {start.named} , enter that with the {goal.named} and take the {goal.ball} ball"
        told = f"take the {goal.ball} ball" if goal == start else go
        asked += [
            Question(f"what colour is the floor of the room with the {floor.ball} ball ?", floor.floor, "floor"),
            Question(
                f"i am in the room with the {start.named} and want the {goal.ball} ball . what do i do ?", told, "plan"
            ),
        ]
    return asked


def _a(colour: str) -> str:
    return f"an {colour}" if colour[0] in "aeiou" else f"a {colour}"
