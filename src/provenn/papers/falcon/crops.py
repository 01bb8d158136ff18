"""Shape-adaptive cropping: the grid of crops of an image, and the text that names each of them."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from provenn.core.errors import UserError
from provenn.core.inputs import read_text
from provenn.nn.arguments import check_finite, check_whole

SIDE, LIMIT = 384, 16  # pixels of a crop's side and crops of an image at most, as FALCON was trained
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's statistics, although the encoder is SigLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-5  # added to the union of two boxes
SHAPE_WEIGHT = 100  # of the shape against the resolution
GLOBAL = "<global_img>"

Grid = tuple[int, int]


class Crops(NamedTuple):
    """An image as the encoder reads it.

    Args:
        pixels: the whole image first, at the size of a crop, then the crops row by row; standardised.
        places: row and column of each; those of the whole image are the limit of crops.
        grid: rows and columns of the crops.
    """

    pixels: Float[Tensor, "crops 3 side side"]
    places: Int[Tensor, "crops 2"]
    grid: Grid


@cache
def grids_up_to(limit: int) -> tuple[Grid, ...]:
    """Rows and columns of every grid of at most `limit` crops, by their number and then by the rows.

    >>> grids_up_to(4)
    ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1))
    >>> len(grids_up_to(9)), len(grids_up_to(16))
    (23, 50)
    """
    check_whole(limit=limit)
    if limit < 1:
        raise ValueError(f"limit must be at least 1 crop, got {limit}")
    return tuple((rows, n // rows) for n in range(1, limit + 1) for rows in range(1, n + 1) if n % rows == 0)


def choose_grid(
    width: int, height: int, side: int = SIDE, limit: int = LIMIT, *, max_upscale: float | int | None = None
) -> Grid:
    """Rows and columns of the grid that is most alike the image in shape, and then in resolution.

    argmax of 100 · IoU(box of the grid, box of the image's shape and the grid's width) + IoU(box of the grid, image)

    Boxes share a corner. The height of the second box is cut to whole pixels, and the first of equal grids wins, as in
    the authors' code. So a small image is enlarged: 640×480 becomes 3 × 4 crops of 384.

    Args:
        width, height: of the image, in pixels.
        side: of a crop.
        limit: crops at most.
        max_upscale: by how much either side of the image may be enlarged at most. Where no grid serves, it is one crop.
            Default: by any factor, as published.

    >>> choose_grid(640, 480), choose_grid(1275, 1650), choose_grid(640, 480, max_upscale=1.5)
    ((3, 4), (4, 3), (1, 1))
    """
    check_whole(width=width, height=height, side=side)
    check_finite(max_upscale=max_upscale)
    if min(width, height, side) < 1:
        raise ValueError(f"an image and a crop have at least one pixel, got {width}×{height} and crops of {side}")
    if max_upscale is not None and max_upscale <= 0:
        raise ValueError(f"max_upscale must be above 0, got {max_upscale}")
    return _most_alike(width, height, side, limit, max_upscale)


@torch.compiler.assume_constant_result  # of whole numbers: a tracer has nothing to follow here
def _most_alike(width: int, height: int, side: int, limit: int, max_upscale: float | int | None) -> Grid:
    grids = grids_up_to(limit)
    tall, wide = (np.array(sides) * side for sides in zip(*grids))
    # In float32, whose rounding decides between grids that are nearly alike.
    of_shape = (wide.astype(np.float32) * np.float32(height / width)).astype(np.int64)
    shape = _overlap(wide, tall, wide, of_shape)
    scores = SHAPE_WEIGHT * shape + _overlap(wide, tall, np.int64(width), np.int64(height))
    if max_upscale is not None:
        allowed = np.maximum(wide / width, tall / height) <= max_upscale
        if not allowed.any():
            return 1, 1
        scores = np.where(allowed, scores, -1)
    return grids[int(scores.argmax())]


def _overlap(wide: Any, tall: Any, other_wide: Any, other_tall: Any) -> Any:
    """Intersection over union of boxes with a common corner, of arrays of sides, in float32."""
    inside = np.minimum(wide, other_wide) * np.minimum(tall, other_tall)
    union = wide * tall + other_wide * other_tall - inside
    return inside.astype(np.float32) / (union.astype(np.float32) + np.float32(EPS))


def places_of(grid: Grid, limit: int = LIMIT) -> Int[Tensor, "crops 2"]:
    """Row and column of the whole image, both `limit`, and then of each crop in reading order.

    >>> places_of((1, 2)).tolist()
    [[16, 16], [0, 0], [0, 1]]
    """
    rows, columns = grid
    return torch.tensor([(limit, limit), *((row, column) for row in range(rows) for column in range(columns))])


def markers_of(grid: Grid) -> list[str]:
    """The text that stands before the registers of the whole image and of each crop; ordinary text, no special tokens.

    >>> markers_of((1, 2))
    ['<global_img>', '<crop_img_row0_col0>', '<crop_img_row0_col1>']
    """
    rows, columns = grid
    return [GLOBAL, *(f"<crop_img_row{row}_col{column}>" for row in range(rows) for column in range(columns))]


def read_markers(name: str | Path, limit: int = LIMIT) -> dict[str, list[int]]:
    """The tokens of each crop's own text, by that text.

    Args:
        name: a tokenizer.json, or a folder of Hugging Face that holds one.
        limit: crops of an image at most.

    Raises:
        UserError: no such file, one that is no tokenizer, or the package `tokenizers` is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError("markers need the package tokenizers: pip install 'provenn[hf]'") from error
    file = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if not file.is_file():
        raise UserError(f"markers must be a tokenizer.json or a folder that holds one, got {str(name)!r}")
    try:
        tokenizer = Tokenizer.from_str(read_text(file))
    except Exception as error:  # the package's own kind is the plain one
        raise UserError(f"markers: {file} is no tokenizer.json: {' '.join(str(error).split())}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = sorted({text for grid in grids_up_to(limit) for text in markers_of(grid)})
    return {text: tokenizer.encode(text, add_special_tokens=False).ids for text in texts}


def write_prompt(text: str, grids: Sequence[Grid], *, placeholder: str = "<image>", markers: bool = True) -> str:
    """A text with a placeholder for each crop where it had one for each image.

    Args:
        text: with as many placeholders as images.
        grids: of the images, in their order.
        placeholder: what stands for an image.
        markers: whether each crop's own text stands before it.

    Raises:
        UserError: placeholders too many or too few.

    >>> write_prompt("<image> What is it?", [(1, 1)])
    '<global_img><image><crop_img_row0_col0><image> What is it?'
    """
    first, *rest = text.split(placeholder)
    if len(rest) != len(grids):
        raise UserError(
            f"the text has {len(rest)} placeholders {placeholder} and there are {len(grids)} images: give one for each"
        )
    parts = [first]
    for grid, words in zip(grids, rest):
        parts += [f"{marker if markers else ''}{placeholder}" for marker in markers_of(grid)]
        parts.append(words)
    return "".join(parts)


def cut(
    images: Float[Tensor, "batch channels height width"], grid: Grid, side: int
) -> Float[Tensor, "batch crops channels side side"]:
    """The whole image at the size of a crop, and then the crops of the image resized to a grid, its shape not kept.

    Args:
        images: of one size.
        grid: rows and columns; none of either gives the whole image alone.
        side: of a crop, in pixels.
    """
    rows, columns = grid
    whole = resize(images, side, side)[:, None]
    if not rows * columns:
        return whole
    large = resize(images, rows * side, columns * side)
    parts = large.unflatten(2, (rows, side)).unflatten(4, (columns, side)).permute(0, 2, 4, 1, 3, 5)
    return torch.cat([whole, parts.flatten(1, 2)], dim=1)


def resize(
    images: Float[Tensor, "batch channels height width"], height: int, width: int
) -> Float[Tensor, "batch channels height2 width2"]:
    """Bicubic, with PIL's filter, which averages all pixels that a smaller one covers."""
    if tuple(images.shape[2:]) == (height, width):
        return images
    # In float32 at least: the filter is not there for less on a CPU.
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    resized = F.interpolate(wide, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized.to(images.dtype)


def cut_image(
    image: UInt8[Tensor, "3 height width"],
    *,
    side: int = SIDE,
    limit: int = LIMIT,
    max_upscale: float | int | None = None,
    low_resolution: bool = False,
) -> Crops:
    """An 8-bit colour image as FALCON's encoder reads it, rounded to 8 bits after resizing as PIL does.

    Args:
        image: such as `provenn.data.images.read_pixels` gives.
        side, limit, max_upscale: as in `choose_grid`.
        low_resolution: the whole image alone, as in the first two stages of training.
    """
    height, width = image.shape[1:]
    grid = (0, 0) if low_resolution else choose_grid(width, height, side, limit, max_upscale=max_upscale)
    pixels = cut(image[None].float(), grid, side)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return Crops((pixels.round().clamp(0, 255) / 255 - mean) / std, places_of(grid, limit), grid)
