"""Boxes in text: how families of vision–language models write a box, and what a resize does to each.

A `Box` is in pixels of the picture as it lies on disk, its right and bottom edges not inside. A convention says how it
is written. What is relative to the picture stays as it is when the picture is resized. What is absolute is of the
picture that the model sees, and must be scaled with it.

- `coco`: `[x, y, width, height]`, pixels of the picture
- `qwen2-vl`: `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`, thousandths of the picture
- `qwen2.5-vl`: `{"bbox_2d": [x1, y1, x2, y2]}`, pixels after `smart_resize`
- `qwen3-vl`: the same, thousandths of the picture
- `llava`: `[x1, y1, x2, y2]`, two decimals, shares of the picture padded to a square
- `fractions`: the same, three decimals, shares of the picture
- `paligemma`: `<locY1><locX1><locY2><locX2>`, 1024ths of the picture, rows first

Sources: Qwen2-VL (arXiv:2409.12191), section 2; QwenLM/Qwen3-VL issues 676, 721 and 1486; haotian-liu/LLaVA issue 606;
Shikra (arXiv:2306.15195) for fractions; PaliGemma (arXiv:2407.07726), section 3.2.1.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from provenn.core.errors import UserError

THOUSAND = 1000
BINS = 1024  # of PaliGemma's tokens of places
FACTOR = 28  # pixels of a side that one token of Qwen2-VL covers
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 1280  # defaults of transformers' processor of Qwen2-VL
LONGEST_RATIO = 200
ROUNDING = 1e-6  # of computing with floats, in units and in shares of a side
NUMERAL = r"[-+]?\d+(?:\.\d+)?"
PAIR = re.compile(rf"\(\s*({NUMERAL})[\s,]+({NUMERAL})\s*\)")  # the comma may lack, as it does in RC-MLLM's README
LIST = re.compile(rf"\[\s*({NUMERAL})\s*,\s*({NUMERAL})\s*,\s*({NUMERAL})\s*,\s*({NUMERAL})\s*\]")
PLACES = re.compile(r"<loc(\d{4})>")
Number = float | int
Four = tuple[Number, Number, Number, Number]


class Box(NamedTuple):
    """Edges in pixels of a picture; right and bottom are not inside."""

    left: Number
    top: Number
    right: Number
    bottom: Number

    @property
    def area(self) -> Number:
        return (self.right - self.left) * (self.bottom - self.top)


class Size(NamedTuple):
    """Of a picture, in pixels."""

    width: int
    height: int


def smart_resize(
    width: int, height: int, *, factor: int = FACTOR, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> Size:
    """The size at which Qwen2-VL and Qwen2.5-VL see a picture (transformers' rule, with Python's rounding to even).

    Both sides become the nearest multiples of `factor`. Where the area is then out of bounds, both are scaled by one
    number, rounded down to stay below the most, up to stay above the least.

    Raises:
        UserError: no area, or a side more than 200 times as long as the other.

    >>> smart_resize(1920, 1080), smart_resize(70, 70)
    (Size(width=1316, height=728), Size(width=56, height=56))
    """
    if width < 1 or height < 1:
        raise UserError(f"a picture of {width}×{height} pixels has no area: expected sides of at least 1")
    if max(width, height) / min(width, height) > LONGEST_RATIO:
        raise UserError(
            f"a picture of {width}×{height} pixels is more than {LONGEST_RATIO} times as long as it is wide: cut it"
        )
    wide, tall = (round(side / factor) * factor for side in (width, height))
    if wide * tall > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        wide, tall = (max(factor, math.floor(side / scale / factor) * factor) for side in (width, height))
    elif wide * tall < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        wide, tall = (math.ceil(side * scale / factor) * factor for side in (width, height))
    return Size(wide, tall)


def image_tokens(width: int, height: int, *, factor: int = FACTOR, **limits: int) -> int:
    """Tokens that a picture becomes in Qwen2-VL; `limits` are those of `smart_resize`.

    >>> image_tokens(640, 480)
    391
    """
    seen = smart_resize(width, height, factor=factor, **limits)
    return (seen.width // factor) * (seen.height // factor)


def check_box(box: Sequence[Number], size: tuple[int, int], what: str = "the box") -> Box:
    """The box, where it is one and lies in the picture.

    Raises:
        UserError: not four finite numbers, no area, or a part outside of the picture.
    """
    width, height = size
    if len(box) != 4 or not all(isinstance(edge, int | float) and math.isfinite(edge) for edge in box):
        raise UserError(f"{what} must be four numbers, left, top, right and bottom, got {list(box)}")
    found = Box(*box)
    if found.right <= found.left or found.bottom <= found.top:
        raise UserError(f"{what} {_shown(found)} has no area: expected right above left and bottom above top")
    if found.left < 0 or found.top < 0 or found.right > width or found.bottom > height:
        raise UserError(f"{what} {_shown(found)} lies outside of the picture of {width}×{height} pixels: clip it")
    return found


def write_box(
    box: Sequence[Number], size: tuple[int, int], convention: str, *, seen: tuple[int, int] | None = None
) -> str:
    """A box as a family of models has it. Where rounding would leave no area, it becomes one unit.

    Args:
        box: left, top, right and bottom in pixels of the picture.
        size: width and height of the picture.
        convention: one of `CONVENTIONS`.
        seen: the size at which the model sees the picture, for `qwen2.5-vl`. Default: that of `smart_resize`.

    Raises:
        UserError: as in `check_box`, or an unknown convention.

    >>> write_box((64, 48, 320, 240), (640, 480), "qwen2-vl")
    '<|box_start|>(100,100),(500,500)<|box_end|>'
    >>> write_box((64, 48, 320, 240), (640, 480), "qwen2.5-vl"), write_box((64, 48, 320, 240), (640, 480), "paligemma")
    ('{"bbox_2d": [64, 48, 322, 238]}', '<loc0102><loc0102><loc0512><loc0512>')
    """
    form = _form(convention)
    left, top, right, bottom = form.scaled(check_box(box, size), Size(*size), seen)
    if form.units is None:
        return form.text((left, top, right, bottom))
    # The picture itself in these units: less than all of them where it is padded.
    whole = form.scaled(Box(0, 0, *size), Size(*size), seen)
    left, right = _rounded(left, right, whole[0], whole[2], form)
    top, bottom = _rounded(top, bottom, whole[1], whole[3], form)
    return form.text((left, top, right, bottom))


def read_box(text: str, size: tuple[int, int], convention: str, *, seen: tuple[int, int] | None = None) -> Box:
    """The first box in a text, in pixels of the picture; arguments as in `write_box`.

    Raises:
        UserError: no box of the convention, no area, or a part outside of the picture.

    >>> read_box("the dog <|box_start|>(100,100),(500 500)<|box_end|>", (640, 480), "qwen2-vl")
    Box(left=64.0, top=48.0, right=320.0, bottom=240.0)
    """
    form = _form(convention)
    numbers = form.numbers(text)
    if numbers is None:
        raise UserError(f"no box of the convention {convention} in {text[:60]!r}: expected such as {form.example}")
    if form.units is not None:
        across, down = form.units(Size(*size), seen)
        for name, number, most in zip(("left", "top", "right", "bottom"), numbers, (across, down) * 2):
            if not 0 <= number <= most:
                raise UserError(
                    f"the {name} edge of the box in {text[:60]!r} is {number:g}: {convention} has 0 to {most:g}"
                )
    box = form.unscaled(numbers, Size(*size), seen)
    slack, (width, height) = form.slack * max(size), size
    if -slack <= min(box.left, box.top) and box.right <= width + slack and box.bottom <= height + slack:
        box = Box(max(box.left, 0), max(box.top, 0), min(box.right, width), min(box.bottom, height))
    return check_box(box, size, f"the box in {text[:60]!r},")


def convert_box(
    text: str, size: tuple[int, int], source: str, target: str, *, seen: tuple[int, int] | None = None
) -> str:
    """A box that one family wrote, as another writes it; arguments as in `write_box`.

    >>> convert_box("[64, 48, 256, 192]", (640, 480), "coco", "fractions")
    '[0.100, 0.100, 0.500, 0.500]'
    """
    return write_box(read_box(text, size, source, seen=seen), size, target, seen=seen)


def resize_box(text: str, size: tuple[int, int], new: tuple[int, int], convention: str) -> str:
    """What is written of the same box after the picture was resized: another text where a convention is in pixels.

    Args:
        text: written for a picture of `size`; in `qwen2.5-vl` the model sees pictures at the size that they have.
        size, new: width and height before and after.
        convention: one of `CONVENTIONS`.

    >>> resize_box('{"bbox_2d": [0, 0, 320, 320]}', (640, 640), (1280, 1280), "qwen2.5-vl")
    '{"bbox_2d": [0, 0, 640, 640]}'
    >>> resize_box("<loc0000><loc0000><loc0512><loc0512>", (640, 640), (1280, 1280), "paligemma")
    '<loc0000><loc0000><loc0512><loc0512>'
    """
    box = read_box(text, size, convention, seen=size)
    across, down = (after / before for after, before in zip(new, size))
    width, height = new
    moved = Box(box.left * across, box.top * down, min(box.right * across, width), min(box.bottom * down, height))
    return write_box(moved, new, convention, seen=new)


def flip_box(box: Sequence[Number], size: tuple[int, int]) -> Box:
    """The box in the picture that is flipped from left to right.

    >>> flip_box((0, 0, 10, 20), (100, 50))
    Box(left=90, top=0, right=100, bottom=20)
    """
    left, top, right, bottom = check_box(box, size)
    return Box(size[0] - right, top, size[0] - left, bottom)


def crop_box(box: Sequence[Number], crop: Sequence[Number], keep: Number = 0.3) -> Box | None:
    """The box in pixels of a crop of the picture, cut off at its edges.

    Args:
        box: left, top, right and bottom.
        crop: likewise.
        keep: share of its area that must be left; else the box is dropped.

    Returns:
        None where less is left.

    >>> crop_box((0, 0, 10, 10), (5, 0, 50, 50))
    Box(left=0, top=0, right=5, bottom=10)
    """
    whole = Box(*box)
    left, top = max(box[0], crop[0]), max(box[1], crop[1])
    right, bottom = min(box[2], crop[2]), min(box[3], crop[3])
    if right <= left or bottom <= top or (right - left) * (bottom - top) < keep * whole.area:
        return None
    return Box(left - crop[0], top - crop[1], right - crop[0], bottom - crop[1])


def _shown(box: Box) -> str:
    return "(" + ", ".join(f"{edge:g}" for edge in box) + ")"


# Conventions


class _Form(NamedTuple):
    """A convention.

    Args:
        example: of how it looks.
        scaled, unscaled: from pixels of the picture to its units, and back.
        numbers: left, top, right and bottom in its units, of the first box in a text.
        text: what is written of these.
        units: how many across and down; None where pixels are not rounded.
        decimals: of what is written.
        most: how much less than `units` the largest number is.
        slack: share of the longer side by which rounding may leave the picture; such a box is cut off at its edge.
    """

    example: str
    scaled: Callable[[Box, Size, tuple[int, int] | None], Four]
    unscaled: Callable[[Four, Size, tuple[int, int] | None], Box]
    numbers: Callable[[str], Four | None]
    text: Callable[[Four], str]
    units: Callable[[Size, tuple[int, int] | None], tuple[Number, Number]] | None
    decimals: int = 0
    most: int = 0
    slack: float = ROUNDING


def _form(convention: str) -> _Form:
    if convention not in FORMS:
        raise UserError(f"no convention of boxes is called {convention!r}; there are {', '.join(FORMS)}")
    return FORMS[convention]


def _rounded(low: Number, high: Number, least: Number, most: Number, form: _Form) -> tuple[Number, Number]:
    """Two edges as they are written, at least a unit apart, between the picture's own edges."""
    scale = 10**form.decimals
    first, last = round(low * scale), round(high * scale)
    begin, end = math.floor(least * scale + ROUNDING), math.ceil(most * scale - ROUNDING) - form.most
    first, last = min(max(first, begin), end - 1), min(max(last, begin + 1), end)
    last = max(last, first + 1)
    return (first / scale, last / scale) if form.decimals else (first, last)


def _relative(units: int) -> tuple[Callable[..., Four], Callable[..., Box], Callable[..., tuple[Number, Number]]]:
    def scaled(box: Box, size: Size, seen: tuple[int, int] | None) -> Four:
        across, down = units / size.width, units / size.height
        return box.left * across, box.top * down, box.right * across, box.bottom * down

    def unscaled(numbers: Four, size: Size, seen: tuple[int, int] | None) -> Box:
        left, top, right, bottom = (number / units for number in numbers)
        return Box(left * size.width, top * size.height, right * size.width, bottom * size.height)

    return scaled, unscaled, lambda size, seen: (units, units)


def _seen(size: Size, seen: tuple[int, int] | None) -> Size:
    return smart_resize(*size) if seen is None else Size(*seen)


def _to_seen(box: Box, size: Size, seen: tuple[int, int] | None) -> Four:
    width, height = _seen(size, seen)
    across, down = width / size.width, height / size.height
    return box.left * across, box.top * down, box.right * across, box.bottom * down


def _from_seen(numbers: Four, size: Size, seen: tuple[int, int] | None) -> Box:
    width, height = _seen(size, seen)
    across, down = size.width / width, size.height / height
    return Box(numbers[0] * across, numbers[1] * down, numbers[2] * across, numbers[3] * down)


def _to_square(box: Box, size: Size, seen: tuple[int, int] | None) -> Four:
    side = max(size)
    x, y = (side - size.width) // 2, (side - size.height) // 2
    return (box.left + x) / side, (box.top + y) / side, (box.right + x) / side, (box.bottom + y) / side


def _from_square(numbers: Four, size: Size, seen: tuple[int, int] | None) -> Box:
    side = max(size)
    x, y = (side - size.width) // 2, (side - size.height) // 2
    return Box(numbers[0] * side - x, numbers[1] * side - y, numbers[2] * side - x, numbers[3] * side - y)


def _pairs(text: str) -> Four | None:
    found = PAIR.findall(text)
    return None if len(found) < 2 else (float(found[0][0]), float(found[0][1]), float(found[1][0]), float(found[1][1]))


def _listed(text: str) -> Four | None:
    found = LIST.search(text)
    return None if found is None else (float(found[1]), float(found[2]), float(found[3]), float(found[4]))


def _corners_of_coco(text: str) -> Four | None:
    found = _listed(text)
    return None if found is None else (found[0], found[1], found[0] + found[2], found[1] + found[3])


def _places(text: str) -> Four | None:
    found = [float(place) for place in PLACES.findall(text)]
    return None if len(found) < 4 else (found[1], found[0], found[3], found[2])


def _whole(numbers: Sequence[Number]) -> list[int]:
    return [round(number) for number in numbers]


def _in_json(numbers: Four) -> str:
    return json.dumps({"bbox_2d": _whole(numbers)})


def _decimal(digits: int) -> Callable[[Four], str]:
    return lambda numbers: "[" + ", ".join(f"{number:.{digits}f}" for number in numbers) + "]"


def _in_tokens(numbers: Four) -> str:
    left, top, right, bottom = _whole(numbers)
    return "".join(f"<loc{number:04d}>" for number in (top, left, bottom, right))


def _in_pairs(numbers: Four) -> str:
    left, top, right, bottom = _whole(numbers)
    return f"<|box_start|>({left},{top}),({right},{bottom})<|box_end|>"


def _in_coco(numbers: Four) -> str:
    left, top, right, bottom = numbers
    # repr keeps every digit of a float, so that what was written can be read back.
    return "[" + ", ".join(_plain(number) for number in (left, top, right - left, bottom - top)) + "]"


def _plain(number: Number) -> str:
    return str(int(number)) if number == int(number) else repr(round(number, 4))


_THOUSANDTHS, _TOKENS, _SHARES = _relative(THOUSAND), _relative(BINS), _relative(1)
_JSON = '{"bbox_2d": [100, 100, 500, 500]}'
FORMS: dict[str, _Form] = {
    "coco": _Form(
        "[64, 48, 256, 192]", lambda box, size, seen: box, lambda four, size, seen: Box(*four),
        _corners_of_coco, _in_coco, None, slack=1e-4,
    ),
    "qwen2-vl": _Form(
        "<|box_start|>(100,100),(500,500)<|box_end|>", _THOUSANDTHS[0], _THOUSANDTHS[1], _pairs, _in_pairs,
        _THOUSANDTHS[2],
    ),
    "qwen2.5-vl": _Form(_JSON, _to_seen, _from_seen, _listed, _in_json, _seen),
    "qwen3-vl": _Form(_JSON, _THOUSANDTHS[0], _THOUSANDTHS[1], _listed, _in_json, _THOUSANDTHS[2]),
    "llava": _Form(
        "[0.10, 0.10, 0.50, 0.50]", _to_square, _from_square, _listed, _decimal(2), _SHARES[2], 2, slack=0.0101
    ),
    "fractions": _Form(
        "[0.100, 0.100, 0.500, 0.500]", _SHARES[0], _SHARES[1], _listed, _decimal(3), _SHARES[2], 3
    ),
    "paligemma": _Form(
        "<loc0102><loc0102><loc0512><loc0512>", _TOKENS[0], _TOKENS[1], _places, _in_tokens, _TOKENS[2], most=1
    ),
}  # fmt: skip
CONVENTIONS = tuple(FORMS)
