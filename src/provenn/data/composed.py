"""Composed scenes with captions, questions, boxes and relations that are true by construction.

On a photograph, a texture or a plain ground lie handwritten digits (scikit-learn) and shapes in one of eight colours.
What is said about a scene follows from how it was composed. No handwritten glyph, no photograph and no region of a
texture is in two splits, and neither is a pair of words such as "red seven". Each split has other colours of each
object, and every word is in the training. No two scenes of a split have the same
objects on the same ground. The pictures lie flat and nothing covers another: real pixels, but no real scenes.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw

from provenn.data.photographs import GREY, grey_photograph, photograph
from provenn.data.vocabulary import SPECIAL, Vocabulary, words_of

COLOURS = {
    "red": (224, 32, 40),
    "green": (24, 150, 48),
    "blue": (36, 72, 224),
    "yellow": (244, 220, 32),
    "orange": (250, 134, 20),
    "purple": (130, 36, 160),
    "cyan": (40, 208, 224),
    "pink": (250, 130, 190),
}
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("disc", "square", "triangle", "cross", "ring", "diamond")
NOUNS = (*NUMERALS, *SHAPES)
TEXTURES = ("brick", "grass", "gravel")
GROUNDS = (*TEXTURES, "photograph", "paper")  # paper is plain
SIDE = 64  # of a scene, in pixels
COUNTS = {"train": 4000, "val": 400, "test": 1000}
OBJECTS = (2, 4)  # the fewest and the most of a scene
# Of the eight colours of an object, counted from another one for each object.
HUES = {"train": (0, 1, 2, 3, 4), "val": (5,), "test": (6, 7)}
GLYPHS = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}  # shares of the glyphs of each digit
PHOTOGRAPHS = {
    "train": ("china", "coffee", "chelsea", "ihc", "camera", "coins"),
    "val": ("motorcycle", "cell"),
    "test": ("flower", "rocket", "hubble", "moon"),
}
REGIONS = {"train": (0.0, 0.6), "val": (0.6, 0.78), "test": (0.78, 1.0)}  # columns of each texture, as shares
SMALL, LARGE = (0.18, 0.22), (0.31, 0.36)  # sides of objects, as shares of the scene's
ACROSS, DOWN = ("left", "centre", "right"), ("top", "middle", "bottom")
SIDES = {"left of": (2, 0), "right of": (0, 2), "above": (3, 1), "below": (1, 3)}  # see `_is`
CAPTIONS = 5
DIM = 0.5  # how bright a ground is
TRIES = 40
Split = Literal["train", "val", "test"]
Placed = tuple[bool, tuple[int, int, int, int]]  # whether it is large, and its square


class Pair(NamedTuple):
    """What an object is called."""

    colour: str
    noun: str

    def __str__(self) -> str:
        return f"{self.colour} {self.noun}"


class Thing(NamedTuple):
    """An object of a scene.

    Args:
        pair: its colour and its noun, which no other object of the scene has.
        large: or small.
        box: left, top, right, bottom in pixels, right and bottom not inside.
        glyph: the number of the handwritten digit among all of scikit-learn's; -1 of a shape.
    """

    pair: Pair
    large: bool
    box: tuple[int, int, int, int]
    glyph: int

    @property
    def size(self) -> str:
        return "large" if self.large else "small"


class Relation(NamedTuple):
    """Where one object lies to another: `first` and `second` are numbers of objects, `word` is a key of `SIDES`."""

    first: int
    word: str
    second: int


class Question(NamedTuple):
    """A question about a scene, of a kind, and its answer in one or two words."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Composed:
    """A scene and what is true of it.

    Args:
        pixels: of 8 bits.
        masks: of each object, its pixels.
        things: the objects.
        ground: one of `GROUNDS`.
        source: which photograph or texture the ground is cut from; "" of paper.
        relations: all that hold: between objects whose boxes do not overlap in a direction.
        captions: five different ones.
        questions: with their answers.
    """

    pixels: UInt8[np.ndarray, "height width 3"]
    masks: Bool[np.ndarray, "objects height width"]
    things: tuple[Thing, ...]
    ground: str
    source: str
    relations: tuple[Relation, ...]
    captions: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def content(self) -> tuple[tuple[Pair, ...], str]:
        """What is in it, without where."""
        return tuple(sorted(thing.pair for thing in self.things)), self.ground


def pairs_of(split: Split) -> tuple[Pair, ...]:
    """The pairs of a colour and a noun that a split has, and no other one.

    >>> len(pairs_of("train")), len(pairs_of("val")), len(pairs_of("test"))
    (80, 16, 32)
    """
    names = tuple(COLOURS)
    return tuple(
        Pair(names[(hue + 3 * number) % len(names)], noun) for number, noun in enumerate(NOUNS) for hue in HUES[split]
    )


@cache
def composed_scenes(
    split: Split,
    seed: int = 0,
    count: int | None = None,
    *,
    side: int = SIDE,
    objects: tuple[int, int] = OBJECTS,
    questions: int = 4,
    words: Split | None = None,
) -> tuple[Composed, ...]:
    """The scenes of a split, the same for a seed.

    Args:
        split: whose glyphs, photographs, textures and pairs of words they have.
        seed: of the drawing.
        count: how many. Default: `COUNTS`.
        side: of a scene, in pixels; at least 32.
        objects: the fewest and the most of a scene. Where no room is left, there may be fewer, but at least one.
        questions: of each scene.
        words: another split whose pairs of words are used, as for known pairs in unknown pictures. Default: `split`.

    Raises:
        ValueError: a size that is out of range, or more scenes than differ in what they hold.

    >>> scene = composed_scenes("val", count=2)[0]
    >>> scene.pixels.shape, len(scene.captions)
    ((64, 64, 3), 5)
    """
    if side < 32:
        raise ValueError(f"side must be at least 32 pixels, got {side}")
    if not 1 <= objects[0] <= objects[1] <= 6:
        raise ValueError(f"objects must be the fewest and the most, from 1 to 6, got {objects}")
    rng = np.random.default_rng([seed, list(GLYPHS).index(split), 25])
    pairs = pairs_of(words or split)
    count = COUNTS[split] if count is None else count
    scenes: list[Composed] = []
    contents: set[tuple[tuple[Pair, ...], str]] = set()
    for _ in range(count):
        for _ in range(TRIES):
            ground = GROUNDS[int(rng.integers(len(GROUNDS)))]
            boxes = _boxes(int(rng.integers(objects[0], objects[1] + 1)), side, rng)
            chosen = [pairs[k] for k in rng.permutation(len(pairs))[: len(boxes)]]
            content = (tuple(sorted(chosen)), ground)
            if content not in contents and len(boxes) >= min(objects[0], 2):
                break
        else:
            raise ValueError(f"{count} scenes of {split} with other contents each could not be drawn: ask for fewer")
        contents.add(content)
        scenes.append(_scene(split, ground, list(zip(chosen, boxes)), side, pairs, questions, rng))
    return tuple(scenes)


def vocabulary() -> Vocabulary:
    """All words of captions, questions and answers, and the special tokens: a closed vocabulary.

    >>> len(vocabulary())
    72
    """
    return Vocabulary([*SPECIAL, *sorted(_WORDS)])


def _boxes(count: int, side: int, rng: np.random.Generator) -> list[Placed]:
    """Places of objects, a pixel and more apart, each large or small; what finds no room is left out."""
    placed: list[Placed] = []
    for large in (rng.random(count) < 0.5).tolist():
        low, high = LARGE if large else SMALL
        length = round(side * float(rng.uniform(low, high)))
        spots = rng.integers(1, side - length, (12, 2)).tolist()
        for left, top in spots:
            box = (left, top, left + length, top + length)
            if all(box[0] > r or box[2] < x or box[1] > b or box[3] < y for _, (x, y, r, b) in placed):
                placed.append((large, box))
                break
    return placed


def _scene(
    split: Split,
    ground: str,
    placed: list[tuple[Pair, Placed]],
    side: int,
    known: tuple[Pair, ...],
    questions: int,
    rng: np.random.Generator,
) -> Composed:
    canvas, source = _ground(split, ground, side, rng)
    masks = np.zeros((len(placed), side, side), bool)
    things = []
    for number, (pair, (large, (left, top, right, bottom))) in enumerate(placed):
        cover, glyph = _cover(split, pair.noun, right - left, rng)
        region = canvas[top:bottom, left:right]
        edge = _grown(cover)[..., None]
        light = rng.uniform(0.85, 1.1)
        region *= 1 - 0.75 * edge  # a dark rim, so that a colour stands out from any ground
        region[:] = region * (1 - cover[..., None]) + light * np.array(COLOURS[pair.colour]) * cover[..., None]
        inside = cover > 0.4
        masks[number, top:bottom, left:right] = inside
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        box = (left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1)
        things.append(Thing(pair, large, box, glyph))
    canvas += rng.normal(0, rng.uniform(1, 6), canvas.shape[:2])[..., None]
    pixels = canvas.round().clip(0, 255).astype(np.uint8)
    relations = relations_of(things)
    told = tuple(things)
    captions = _captions(told, relations, ground, side, rng)
    asked = _questions(told, relations, ground, side, known, questions, rng)
    return Composed(pixels, masks, told, ground, source, relations, captions, asked)


def _is(first: Thing, word: str, second: Thing) -> bool:
    """Whether the whole box of one object lies beyond that of the other."""
    far, near = SIDES[word]
    forward = word in ("left of", "above")
    return first.box[far] <= second.box[near] if forward else first.box[far] >= second.box[near]


def relations_of(things: list[Thing]) -> tuple[Relation, ...]:
    """All that hold between objects: "left of" where the right edge of the first is not beyond the left of the second.

    Args:
        things: the objects of a scene.
    """
    numbers = range(len(things))
    return tuple(
        Relation(a, word, b)
        for a in numbers
        for b in numbers
        for word in SIDES
        if a != b and _is(things[a], word, things[b])
    )


def position_of(thing: Thing, side: int) -> str:
    """Which of nine parts of a scene the middle of an object lies in, such as "top left", or "centre"."""
    across = ACROSS[min(2, 3 * (thing.box[0] + thing.box[2]) // (2 * side))]
    down = DOWN[min(2, 3 * (thing.box[1] + thing.box[3]) // (2 * side))]
    return across if (down, across) == ("middle", "centre") else f"{down} {across}"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _on(ground: str) -> str:
    return "on a photograph" if ground == "photograph" else f"on {ground}"


def _captions(
    things: tuple[Thing, ...], relations: tuple[Relation, ...], ground: str, side: int, rng: np.random.Generator
) -> tuple[str, ...]:
    """Five that name every object, each in another way, in an order that is drawn."""

    def order() -> list[Thing]:
        return [things[k] for k in rng.permutation(len(things))]

    plain = f"{_listed([_a(str(t.pair)) for t in order()])} {_on(ground)}"
    sized = _listed([f"a {t.size} {t.pair}" for t in order()])
    placed = _listed([f"{_a(str(t.pair))} in the {position_of(t, side)}" for t in order()])
    objects = f"{NUMERALS[len(things)]} object{'s' * (len(things) > 1)}"
    counted = f"{objects} {_on(ground)} : {_listed([str(t.pair) for t in order()])}"
    if relations:
        first, word, second = relations[int(rng.integers(len(relations)))]
        others = [_a(str(t.pair)) for k, t in enumerate(things) if k not in (first, second)]
        beside = f" , beside {_listed(others)}" if others else ""
        related = f"the {things[first].pair} is {word} the {things[second].pair}{beside}"
    else:
        related = f"there is {_listed([_a(str(t.pair)) for t in order()])}"
    return plain, sized, placed, related, counted


def _questions(
    things: tuple[Thing, ...],
    relations: tuple[Relation, ...],
    ground: str,
    side: int,
    known: tuple[Pair, ...],
    count: int,
    rng: np.random.Generator,
) -> tuple[Question, ...]:
    """Different ones, each of a kind that is drawn; yes and no are equally likely."""
    asked: dict[str, Question] = {}
    for _ in range(TRIES * count):
        if len(asked) == count:
            break
        kind = KINDS[int(rng.integers(len(KINDS)))]
        thing = things[int(rng.integers(len(things)))]
        question = _question(kind, thing, things, relations, ground, side, known, rng)
        if question is not None:
            asked.setdefault(question.text, question)
    return tuple(asked.values())


KINDS = ("colour", "noun", "count", "exists", "position", "size", "relation", "ground")


def _question(
    kind: str,
    thing: Thing,
    things: tuple[Thing, ...],
    relations: tuple[Relation, ...],
    ground: str,
    side: int,
    known: tuple[Pair, ...],
    rng: np.random.Generator,
) -> Question | None:
    """A question of a kind, or None where the scene has no single answer to it."""
    here = [t.pair for t in things]
    yes = bool(rng.random() < 0.5)
    if kind == "colour":
        alone = [p.noun for p in here].count(thing.pair.noun) == 1
        return Question(kind, f"what colour is the {thing.pair.noun} ?", thing.pair.colour) if alone else None
    if kind == "noun":
        alone = [p.colour for p in here].count(thing.pair.colour) == 1
        return Question(kind, f"what is {thing.pair.colour} ?", thing.pair.noun) if alone else None
    if kind == "count":
        what = ("objects", "digits", "shapes")[int(rng.integers(3))]
        numbers = {"objects": len(here), "digits": sum(p.noun in NUMERALS for p in here)}
        numbers["shapes"] = numbers["objects"] - numbers["digits"]
        return Question(kind, f"how many {what} are there ?", NUMERALS[numbers[what]])
    if kind == "exists":
        absent = [pair for pair in known if pair not in here]
        pair = thing.pair if yes else absent[int(rng.integers(len(absent)))]
        return Question(kind, f"is there {_a(str(pair))} ?", "yes" if yes else "no")
    if kind == "position":
        return Question(kind, f"where is the {thing.pair} ?", position_of(thing, side))
    if kind == "size":
        return Question(kind, f"is the {thing.pair} small or large ?", thing.size)
    if kind == "ground":
        return Question(kind, "what is behind ?", ground)
    if not relations:
        return None
    first, word, second = relations[int(rng.integers(len(relations)))]
    if not yes:  # what holds of two objects, said of them the other way round, does not hold
        first, second = second, first
    text = f"is the {things[first].pair} {word} the {things[second].pair} ?"
    return Question(kind, text, "yes" if yes else "no")


_WORDS = {
    *(word for name in (*COLOURS, *NOUNS, *GROUNDS, *ACROSS, *DOWN, *SIDES) for word in words_of(name)),
    *words_of("a an , and : on in the is there beside small large object objects digits shapes yes no"),
    *words_of("what colour how many are where or behind ?"),
}


def _ground(split: Split, ground: str, side: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A piece of a ground as floats, and where it is from."""
    if ground == "paper":
        tint = rng.uniform(30, 120) + rng.uniform(-15, 15, 3)
        return np.broadcast_to(tint, (side, side, 3)).copy(), ""
    names = PHOTOGRAPHS[split] if ground == "photograph" else (ground,)
    name = names[int(rng.integers(len(names)))]
    pixels = _picture(name, split if ground != "photograph" else None)
    height, width = pixels.shape[:2]
    step = int(rng.integers(1, min(4, min(height, width) // side) + 1)) if ground == "photograph" else 1
    top, left = (int(rng.integers(0, length - side * step + 1)) for length in (height, width))
    piece = pixels[top : top + side * step : step, left : left + side * step : step].astype(np.float64)
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    return piece * (DIM * rng.uniform(0.8, 1.2)), name


@cache
def _picture(name: str, split: Split | None) -> np.ndarray:
    """A photograph in colour, or the columns of a texture that a split has."""
    pixels = np.repeat(grey_photograph(name)[..., None], 3, 2) if name in GREY else photograph(name)
    if split is None:
        return pixels
    first, last = (round(share * pixels.shape[1]) for share in REGIONS[split])
    return pixels[:, first:last]


def _cover(split: Split, noun: str, length: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """How much of each pixel of a square an object covers, and the number of its glyph."""
    if noun in SHAPES:
        return _shape(noun, length), -1
    numbers = _glyphs(NUMERALS.index(noun))
    low, high = (round(share * len(numbers)) for share in GLYPHS[split])
    number = int(numbers[int(rng.integers(low, high))])
    return _digit(number, length), number


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16 * 255).clip(0, 255).astype(np.uint8), data.target


@cache
def _glyphs(digit: int) -> np.ndarray:
    """Numbers of the glyphs of a digit, in an order that does not follow who wrote them."""
    return np.random.default_rng(digit).permutation(np.flatnonzero(_digits()[1] == digit))


@cache
def _digit(number: int, length: int) -> np.ndarray:
    image = Image.fromarray(_digits()[0][number]).resize((length, length), Image.Resampling.BICUBIC)
    return (np.asarray(image, np.float64) / 255 * 1.5).clip(0, 1)


@cache
def _shape(noun: str, length: int) -> np.ndarray:
    """Drawn at four times its size, and reduced."""
    size = 4 * length
    image = Image.new("L", (size, size))
    draw, end, part = ImageDraw.Draw(image), size - 1, size // 3
    if noun in ("disc", "ring"):
        draw.ellipse((0, 0, end, end), fill=255)
        if noun == "ring":
            draw.ellipse((size // 4, size // 4, end - size // 4, end - size // 4), fill=0)
    elif noun == "square":
        draw.rectangle((size // 12, size // 12, end - size // 12, end - size // 12), fill=255)
    elif noun == "triangle":
        draw.polygon([(size / 2, 0), (end, end), (0, end)], fill=255)
    elif noun == "diamond":
        draw.polygon([(size / 2, 0), (end, size / 2), (size / 2, end), (0, size / 2)], fill=255)
    else:
        draw.rectangle((part, 0, end - part, end), fill=255)
        draw.rectangle((0, part, end, end - part), fill=255)
    return np.asarray(image.resize((length, length), Image.Resampling.BOX), np.float64) / 255


def _grown(cover: np.ndarray) -> np.ndarray:
    """The largest cover of each pixel and its four neighbours."""
    wide = np.pad(cover, 1)
    return np.max([wide[1:-1, 1:-1], wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]], axis=0)


def draw_sheet(split: Split = "train", seed: int = 0, columns: int = 4, rows: int = 2, zoom: int = 3) -> Image.Image:
    """Scenes of a split with their boxes, each above a caption and a question with its answer.

    Args:
        split, seed: of the scenes.
        columns, rows: of the sheet.
        zoom: pixels of the sheet that a pixel of a scene is wide.
    """
    scenes = composed_scenes(split, seed, columns * rows)
    wide, tall = SIDE * zoom + 12, SIDE * zoom + 76
    sheet = Image.new("RGB", (columns * wide, rows * tall), "white")
    draw = ImageDraw.Draw(sheet)
    for number, scene in enumerate(scenes):
        left, top = number % columns * wide + 6, number // columns * tall + 6
        picture = Image.fromarray(scene.pixels).resize((SIDE * zoom,) * 2, Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top))
        for thing in scene.things:
            x, y, right, bottom = (zoom * edge for edge in thing.box)
            draw.rectangle((left + x, top + y, left + right - 1, top + bottom - 1), outline="white")
        question = scene.questions[0]
        words = f"{scene.captions[number % CAPTIONS]} | {question.text} {question.answer}"
        for line, text in enumerate(_lines(words, 34)[:5]):
            draw.text((left, top + SIDE * zoom + 2 + 13 * line), text, fill="black")
    return sheet


def _lines(text: str, most: int) -> list[str]:
    import textwrap

    return [line for part in text.split(" | ") for line in textwrap.wrap(part, most)]
