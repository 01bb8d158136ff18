"""Edits: a picture before and after, an instruction, and a reference that shows what the instruction calls S*.

The embedded ones are composed, so that all about them is exact. On a piece of a photograph lie one or two handwritten
digits (scikit-learn), filled with 3×3 tiles in two hues of twelve, in one of six patterns. An edit adds, replaces or
removes one of them. The reference shows the new object elsewhere, in another size, on another ground. Each tile has a
light of its own, so that words cannot say all that a reference shows. No glyph, no photograph and no pair of hues is in
two splits. The user's own come as a list of files: see `read_edits`.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from provenn.core.errors import UserError
from provenn.core.inputs import parse_json, read_text
from provenn.core.narrowing import present
from provenn.data.clip_pieces import ClipPieces
from provenn.data.composed import GLYPHS, NUMERALS, PHOTOGRAPHS
from provenn.data.images import read_image, read_pixels, resize_pixels
from provenn.data.photographs import GREY, grey_photograph, photograph
from provenn.data.vocabulary import IMAGE, SPECIAL, Vocabulary

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
KINDS = ("add", "replace", "remove", "describe")  # describe is an edit by words alone
SHARES = (0.3, 0.4, 0.15, 0.15)  # of the kinds
HUES = ("red", "orange", "yellow", "lime", "green", "mint", "cyan", "azure", "blue", "violet", "magenta", "pink")
PATTERNS: dict[str, tuple[str, str, str]] = {
    "checked": ("101", "010", "101"),
    "striped": ("101", "101", "101"),
    "barred": ("111", "000", "111"),
    "ringed": ("111", "101", "111"),
    "crossed": ("010", "111", "010"),
    "diagonal": ("100", "010", "001"),
}
SIDE, GLYPH = 16, 8  # pixels of a picture and of an object
COUNTS = {"train": 6000, "val": 200, "test": 400}
LENGTH, NOUN = 16, 2  # tokens of an instruction and of a noun
GROUNDS = 300  # pieces of photographs of a split
NOISE = 0.1  # standard deviation of the worst repainting, in training
PLACEHOLDER = "S*"
LIST = "edits.jsonl"
LONGEST = 77  # tokens of a user's instruction
KEYS = ("source", "target", "instruction", "reference", "noun", "described", "mask", "quality", "split")


class Edit(NamedTuple):
    """One edit, as a system is given it and judged by it; batched alike.

    Args:
        source, target: before and after, from 0 to 1.
        reference: what S* stands for; zeros where the instruction has none.
        tokens: of the instruction, `<image>` for S*.
        noun: tokens of what the reference shows.
        described: tokens of the same in words alone.
        mask: pixels that are to change. No system is given it.
        kind: number in `KINDS`; −1 where nobody said.
        quality: how clean the target is, from 0 to 1.
    """

    source: Float[Tensor, "*batch 3 height width"]
    target: Float[Tensor, "*batch 3 height width"]
    reference: Float[Tensor, "*batch 3 height width"]
    tokens: Int[Tensor, "*batch words"]
    noun: Int[Tensor, "*batch nouns"]
    described: Int[Tensor, "*batch words"]
    mask: Bool[Tensor, "*batch 1 height width"]
    kind: Int[Tensor, "*batch"]
    quality: Float[Tensor, "*batch"]


class Written(NamedTuple):
    """An edit with its words, before tokens: pixels of 8 bits, (height, width, 3), and the mask."""

    source: UInt8[np.ndarray, "height width 3"]
    target: UInt8[np.ndarray, "height width 3"]
    reference: UInt8[np.ndarray, "height width 3"] | None
    instruction: str
    noun: str
    described: str
    mask: Bool[np.ndarray, "height width"]
    kind: str
    quality: float


Words = Vocabulary | ClipPieces


class Edits(Dataset):
    """Edits in memory, with their words as tokens.

    Args:
        written: the edits.
        vocabulary: of their words, or CLIP's pieces.
        length, nouns: tokens of an instruction and of a noun; what is longer is cut before its end.
    """

    def __init__(self, written: Sequence[Written], vocabulary: Words, length: int = LENGTH, nouns: int = NOUN):
        self.written, self.vocabulary, self.length, self.nouns = list(written), vocabulary, length, nouns

    def __len__(self) -> int:
        return len(self.written)

    def __getitem__(self, index: int) -> Edit:
        one = self.written[index]
        if not 0 <= index < len(self.written):
            raise IndexError(index)
        empty = np.zeros_like(one.source)
        source, target, reference = (
            torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
            for pixels in (one.source, one.target, empty if one.reference is None else one.reference)
        )
        return Edit(
            source, target, reference,
            encode(self.vocabulary, one.instruction, self.length),
            encode(self.vocabulary, one.noun, self.nouns, ends=False),
            encode(self.vocabulary, one.described, self.length),
            torch.from_numpy(one.mask)[None],
            torch.tensor(KINDS.index(one.kind) if one.kind in KINDS else -1),
            torch.tensor(one.quality, dtype=torch.float32),
        )  # fmt: skip


def encode(vocabulary: Words, text: str, length: int, *, ends: bool = True) -> Int[Tensor, " length"]:
    """Tokens of a text, `<image>` for S*, filled up to a length.

    Args:
        vocabulary: of the words.
        text: an instruction or a noun.
        length: tokens at most, `<start>` and `<end>` among them.
        ends: whether it has these two.
    """
    numbers = vocabulary.encode(text.replace(PLACEHOLDER, f" {IMAGE} "), length if ends else length + 2)
    numbers = numbers if ends else numbers[1:-1]
    return torch.tensor(numbers + [vocabulary.pad] * (length - len(numbers)))


def count_tokens(vocabulary: Words, text: str) -> int:
    """How many tokens a text has before it is cut, with its start and its end."""
    return len(vocabulary.encode(text.replace(PLACEHOLDER, f" {IMAGE} ")))


def vocabulary() -> Vocabulary:
    """All words of the embedded edits: a closed vocabulary.

    >>> len(vocabulary())
    45
    """
    words = {
        "add",
        "a",
        "an",
        "on",
        "the",
        "left",
        "right",
        "replace",
        "with",
        "remove",
        "and",
        *HUES,
        *PATTERNS,
        *NUMERALS,
    }
    return Vocabulary([*SPECIAL, *sorted(words)])


def hue_pairs(split: Split) -> tuple[tuple[int, int], ...]:
    """The pairs of hues that a split has, and no other one.

    >>> [len(hue_pairs(split)) for split in ("train", "val", "test")]
    [44, 6, 16]
    """
    pairs = [(first, second) for first in range(12) for second in range(first + 1, 12)]
    kept = {"train": (0, 1, 2, 3, 5, 7), "val": (4,), "test": (6, 8)}[split]
    # Of every hue some pairs are in each split.
    return tuple(pair for pair in pairs if (3 * pair[0] + 2 * pair[1] + pair[0] * pair[1]) % 9 in kept)


class _Thing(NamedTuple):
    """An object: its noun and glyph, two hues, a pattern, and the colours of its nine tiles."""

    noun: int
    glyph: np.ndarray
    hues: tuple[int, int]
    pattern: str
    tiles: np.ndarray

    @property
    def words(self) -> str:
        first, second = (HUES[hue] for hue in self.hues)
        return f"{first} and {second} {self.pattern} {NUMERALS[self.noun]}"


@cache
def composed_edits(split: Split, seed: int = 0, count: int | None = None) -> tuple[Written, ...]:
    """The embedded edits of a split, the same for a seed.

    Args:
        split: whose glyphs, photographs and pairs of hues they have. In "train" the new object is repainted with noise
            of a strength that is drawn, which `quality` says.
        seed: of the drawing.
        count: how many. Default: `COUNTS`.

    >>> one = composed_edits("val", count=3)[0]
    >>> one.source.shape, bool((one.source != one.target).any(2)[~one.mask].any())
    ((16, 16, 3), False)
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), 31])
    grounds = _grounds(split)
    wanted = COUNTS[split] if count is None else count
    return tuple(_edit(split, grounds, rng) for _ in range(wanted))


def _edit(split: Split, grounds: np.ndarray, rng: np.random.Generator) -> Written:
    kind = KINDS[int(rng.choice(len(KINDS), p=SHARES))]
    ground = grounds[int(rng.integers(len(grounds)))]
    left_first = bool(rng.random() < 0.5)
    nouns = [int(noun) for noun in rng.permutation(10)[:3]]
    if rng.random() < 0.1:
        nouns[1] = nouns[0]  # two of a kind, which only their sides tell apart
    changed, beside, new = (_thing(split, noun, rng) for noun in nouns)
    two = bool(rng.random() < 0.5)
    sides = ("left", "right") if left_first else ("right", "left")
    places = [_place(side, rng) for side in sides]
    if kind == "add":  # words say on which side, and it is half way down there
        places[0] = ((SIDE - GLYPH) // 2, places[0][1])
    base = _drawn(ground, beside, places[1])[0] if two else ground
    before, mask = (base, None) if kind == "add" else _drawn(base, changed, places[0])
    after, after_mask = (base, None) if kind == "remove" else _drawn(base, new, places[0])
    area = np.zeros(ground.shape[:2], bool)
    for each in (mask, after_mask):
        area |= False if each is None else each
    which = (
        f"{sides[0]} {NUMERALS[nouns[0]]}"
        if two and (nouns[0] == nouns[1] or rng.random() < 0.5)
        else NUMERALS[nouns[0]]
    )
    form = {"add": f"add {{}} on the {sides[0]}", "remove": f"remove the {which}"}.get(
        kind, f"replace the {which} with {{}}"
    )
    article = "an" if new.words[0] in "aeiou" else "a"
    described = form.format(f"{article} {new.words}")
    with_reference = kind in ("add", "replace")
    shown = form.format(f"a {PLACEHOLDER}" if kind == "add" else PLACEHOLDER)
    quality = 1.0
    if split == "train" and kind != "remove":
        quality = float(rng.random())
        noise = rng.normal(0, 255 * NOISE * (1 - quality), after.shape) * area[..., None]
        after = after + noise
    reference = None
    if with_reference:
        elsewhere = grounds[int(rng.integers(len(grounds)))]
        side = int(rng.integers(GLYPH + 1, 13))
        top, left = (int(rng.integers(0, SIDE - side + 1)) for _ in range(2))
        reference = _bytes(_drawn(elsewhere, new, (top, left), side)[0])
    return Written(
        _bytes(before), _bytes(after), reference, shown if with_reference else described,
        NUMERALS[new.noun] if with_reference else "", described, area, kind, quality,
    )  # fmt: skip


def _bytes(pixels: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    return pixels.round().clip(0, 255).astype(np.uint8)


def _place(side: str, rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of an object in one half of the picture."""
    return int(rng.integers(0, SIDE - GLYPH + 1)), 0 if side == "left" else SIDE - GLYPH


def _thing(split: Split, noun: int, rng: np.random.Generator) -> _Thing:
    stock = _glyphs()[noun]
    low, high = (round(share * len(stock)) for share in GLYPHS[split])
    pairs = hue_pairs(split)
    hues = pairs[int(rng.integers(len(pairs)))]
    hues = hues if rng.random() < 0.5 else (hues[1], hues[0])
    pattern = list(PATTERNS)[int(rng.integers(len(PATTERNS)))]
    turned = np.array([hue + rng.uniform(-0.35, 0.35) for hue in hues]) / 12
    marks = np.array([[int(mark) for mark in row] for row in PATTERNS[pattern]])
    light = rng.uniform(0.7, 1.0, (3, 3))
    tiles = np.stack([_rgb(turned[1 - mark], value) for mark, value in zip(marks.flat, light.flat)]).reshape(3, 3, 3)
    return _Thing(noun, stock[int(rng.integers(low, high))], hues, pattern, tiles)


def _rgb(hue: float, value: float) -> np.ndarray:
    """Of a colour of saturation 0.85, in 0…255."""
    from colorsys import hsv_to_rgb

    return 255 * np.array(hsv_to_rgb(hue % 1, 0.85, value))


@cache
def _glyphs() -> list[np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return [(digits.images[digits.target == noun] / 16).clip(0, 1) for noun in range(10)]


def _drawn(
    ground: np.ndarray, thing: _Thing, place: tuple[int, int], side: int = GLYPH
) -> tuple[np.ndarray, Bool[np.ndarray, "height width"]]:
    """The ground with an object on it, and the pixels that it covers at all."""
    top, left = place
    cover = thing.glyph
    if side != GLYPH:
        cover = np.asarray(Image.fromarray(cover.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR))
    tile = np.arange(side) * 3 // side
    colour = thing.tiles[tile[:, None], tile[None]]
    canvas, mask = ground.copy(), np.zeros(ground.shape[:2], bool)
    part = np.s_[top : top + side, left : left + side]
    canvas[part] = canvas[part] * (1 - cover[..., None]) + colour * cover[..., None]
    mask[part] = cover > 0
    return canvas, mask


@cache
def _grounds(split: Split) -> Float[np.ndarray, "grounds height width 3"]:
    """Pieces of photographs at scales of their own, dimmed so that objects stand out."""
    rng = np.random.default_rng([SPLITS.index(split), 32])
    pictures = []
    for name in PHOTOGRAPHS[split]:
        pixels = np.repeat(grey_photograph(name)[..., None], 3, 2) if name in GREY else photograph(name)
        picture = Image.fromarray(pixels)
        scale = 96 / min(picture.size)
        pictures.append(
            picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BOX)
        )
    pieces = []
    for _ in range(GROUNDS):
        picture = pictures[int(rng.integers(len(pictures)))]
        wide = int(rng.integers(SIDE, 65))
        left, top = (int(rng.integers(0, room - wide + 1)) for room in picture.size)
        box = (left, top, left + wide, top + wide)
        piece = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box), np.float64)
        pieces.append((piece[:, ::-1] if rng.random() < 0.5 else piece) * 0.5 * rng.uniform(0.8, 1.2))
    return np.stack(pieces)


class Listed(NamedTuple):
    """An edit of a user's list: files, words, and where it stands."""

    source: Path
    target: Path
    reference: Path | None
    mask: Path | None
    instruction: str
    noun: str
    described: str
    kind: str
    quality: float
    where: str


def read_edits(root: Path) -> dict[str, list[Listed]]:
    """The edits of a folder by split: `edits.jsonl`, an object a line.

    `source` and `target` are files beside the list, before and after. `instruction` has words, with S* where there is a
    reference. `reference` is its file, and `noun` what it shows in a word or two. `mask` is a file whose bright pixels
    are to change; without one, all that differ by more than 8 of 255. `described` is the instruction in words alone.
    `kind` is one of `KINDS`, `quality` a number from 0 to 1, and `split` train, val or test.

    Args:
        root: the folder, or the list itself.

    Raises:
        UserError: no list, a line of another form or kind, or S* without a reference or the other way round.
    """
    file = root if root.is_file() else root / LIST
    if not file.is_file():
        raise UserError(f"{root} holds no {LIST}: expected an edit a line, as the guide on edits of images says")
    found: dict[str, list[Listed]] = {}
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            split, entry = _listed(parse_json(line, where), file.parent, where)
            found.setdefault(split, []).append(entry)
    if not found:
        raise UserError(f"{file} is empty: expected an edit a line")
    return found


def _listed(entry: Any, folder: Path, where: str) -> tuple[str, Listed]:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object with source, target and instruction, got {str(entry)[:60]!r}")
    if unknown := [key for key in entry if key not in (*KEYS, "kind")]:
        raise UserError(f"{where}: what is {unknown[0]!r}? expected some of {', '.join((*KEYS, 'kind'))}")

    def word(key: str, default: str | None = None) -> str:
        value = entry.get(key, default)
        if not isinstance(value, str) or (default is None and not value.strip()):
            raise UserError(f"{where}: {key} must be a text, got {str(value)[:60]!r}")
        return value

    def path(key: str, needed: bool) -> Path | None:
        if entry.get(key) is None and not needed:
            return None
        file = folder / word(key)
        if "\0" in str(file) or not file.is_file():
            raise UserError(f"{where}: {key}: there is no file {file}")
        return file

    instruction, reference = word("instruction"), path("reference", False)
    check_placeholder(instruction, reference is not None, where)
    quality, split = entry.get("quality", 1.0), word("split", "train")
    if isinstance(quality, bool) or not isinstance(quality, (int, float)) or not 0 <= quality <= 1:
        raise UserError(f"{where}: quality must be a number from 0 to 1, got {str(quality)[:60]!r}")
    if split not in SPLITS:
        raise UserError(f"{where}: split must be one of {', '.join(SPLITS)}, got {split!r}")
    kind = word("kind", "")
    if kind and kind not in KINDS:
        raise UserError(f"{where}: kind must be one of {', '.join(KINDS)}, or left out, got {kind[:60]!r}")
    noun = word("noun", "")
    said = word("described", instruction.replace(PLACEHOLDER, noun or "object"))
    source, target = (present(path(key, True), key) for key in ("source", "target"))
    return split, Listed(
        source, target, reference, path("mask", False), instruction, noun, said, kind, float(quality), where
    )


def check_placeholder(instruction: str, reference: bool, where: str = "") -> None:
    """S* stands once where there is a reference, and nowhere else.

    Args:
        instruction: words.
        reference: whether there is one.
        where: begins the message.

    Raises:
        UserError: S* without a reference, a reference without S*, or S* twice.
    """
    start, count = f"{where}: " if where else "", instruction.count(PLACEHOLDER)
    if count > 1:
        raise UserError(f"{start}{instruction!r} has {PLACEHOLDER} {count} times: expected once, for one reference")
    if reference and not count:
        raise UserError(
            f"{start}{instruction!r} has no {PLACEHOLDER}, and there is a reference: write {PLACEHOLDER} where it "
            f"belongs, as in 'replace the cat with {PLACEHOLDER}', or leave the reference out"
        )
    if count and not reference:
        raise UserError(f"{start}{instruction!r} has {PLACEHOLDER}, and there is no reference: give its picture too")


def read_written(entries: Sequence[Listed], size: int) -> Iterator[Written]:
    """Edits of a list with their pixels, resized to a square.

    Args:
        entries: of `read_edits`.
        size: side, in pixels.

    Raises:
        UserError: pictures that cannot be read, of two sizes in one edit, or of two modes, or nothing that changes.
    """
    for entry in entries:
        source, target = (read_pixels(file) for file in (entry.source, entry.target))
        if source.shape != target.shape:
            sizes = " and ".join(f"{file.shape[2]}×{file.shape[1]}" for file in (source, target))
            raise UserError(f"{entry.where}: source and target have {sizes} pixels; expected one size")
        if entry.reference is not None:
            check_modes(entry.source, entry.reference)
        if entry.mask is None:
            mask = ((source.int() - target.int()).abs().amax(0) > 8)[None].byte() * 255
        else:
            mask = read_pixels(entry.mask, channels=1)
            if mask.shape[1:] != source.shape[1:]:
                raise UserError(f"{entry.where}: the mask has another size than the source")
        files = [source, target, *(read_pixels(entry.reference) for _ in range(1) if entry.reference is not None)]
        resized = [resize_pixels(file, size, size).permute(1, 2, 0).numpy() for file in files]
        area = resize_pixels(mask, size, size)[0].numpy() > 127
        if not area.any():
            raise UserError(
                f"{entry.where}: nothing changes between source and target at {size}×{size} pixels: give a mask or "
                "a larger size, or leave the line out"
            )
        reference = resized[2] if len(resized) > 2 else None
        yield Written(resized[0], resized[1], reference, entry.instruction, entry.noun, entry.described, area,
                      entry.kind, entry.quality)  # fmt: skip


def check_modes(source: Path, reference: Path) -> None:
    """Source and reference have one mode: both in colour or both grey, with or without transparency.

    Raises:
        UserError: they differ.
    """
    modes = [_mode(file) for file in (source, reference)]
    if modes[0] != modes[1]:
        raise UserError(
            f"{reference} is {modes[1]}, and the source {source} is {modes[0]}: expected one mode, convert it"
        )


def _mode(file: Path) -> str:
    picture = read_image(file)
    kind = "grey" if picture.grey else "in colour"
    return f"{kind} with transparency" if picture.alpha is not None else kind
