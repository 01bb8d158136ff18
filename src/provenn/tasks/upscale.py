"""Apply a super-resolution network to images of any size, tile by tile."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor, nn

from provenn.nn.padding import PadToMultiple
from provenn.tasks.base import device_of

TILE, OVERLAP = 256, 32


@torch.no_grad()
def upscale(
    image: Num[np.ndarray, "height width 3"],
    model: nn.Module,
    *,
    tile: int = TILE,
    overlap: int = OVERLAP,
    advance: Callable[[], object] = lambda: None,
) -> Num[np.ndarray, "height2 width2 3"]:
    """The image, `model.scale` times larger, of the same type.

    Neighbouring tiles share `overlap` pixels, over which one fades into the other, and finished rows are kept in the
    image's own type, so that memory is the output's plus a few tiles'. A network that looks at the whole image, as
    CRAFT's fusion does, sees one tile at a time: the result differs slightly from that of the whole image at once.

    Args:
        image: uint8, uint16, or floating-point numbers in 0…1.
        model: in eval mode; its `scale` and `multiple` say how much larger it makes an image, and what its sides must
            be multiples of.
        tile: largest side that is given to the network at once, in pixels.
        overlap: pixels that neighbouring tiles share.
        advance: called after each tile; `count_tiles` says how often.

    Raises: ValueError for a tile that is not at least three times the overlap.
    """
    height, width, _ = image.shape
    scale = int(model.scale)  # type: ignore[arg-type]  # a number
    full = float(np.iinfo(image.dtype).max) if image.dtype.kind == "u" else 1.0
    network = PadToMultiple(model, getattr(model, "multiple", 1), scale)
    device = device_of(model)
    result = np.empty((height * scale, width * scale, 3), image.dtype)

    def finish(rows: Tensor, top: int) -> None:
        values = rows.clamp(0, 1) * full
        final = values.round() if image.dtype.kind == "u" else values
        result[top : top + rows.shape[1]] = final.permute(1, 2, 0).numpy().astype(image.dtype)

    done = 0  # rows of the output that no later tile touches
    open_rows = torch.zeros(3, 0, width * scale)
    for top, bottom, fade_rows in cuts(height, tile, overlap, scale):
        band = torch.zeros(3, (bottom - top) * scale, width * scale)
        band[:, : open_rows.shape[1]] = open_rows
        for left, right, fade_columns in cuts(width, tile, overlap, scale):
            part = torch.from_numpy(image[top:bottom, left:right].astype(np.float32) / full)
            larger = network(part.permute(2, 0, 1)[None].to(device))[0].float().cpu()
            band[:, :, left * scale : right * scale] += larger * fade_rows[:, None] * fade_columns
            advance()
        ready = (bottom if bottom == height else bottom - overlap) * scale - done
        finish(band[:, :ready], done)
        open_rows = band[:, ready:]
        done += ready
    return result


def count_tiles(height: int, width: int, tile: int = TILE, overlap: int = OVERLAP) -> int:
    """How many tiles an image of that size is cut into."""
    return math.prod(_pieces(side, tile, overlap) for side in (height, width))


def cuts(side: int, tile: int, overlap: int, scale: int) -> Iterator[tuple[int, int, Tensor]]:
    """Cut a side into overlapping pieces: start, end, and the weight of each output pixel; weights add up to one.

    Args:
        side, tile, overlap: in pixels of the input.
        scale: output pixels for each of them.
    """
    pieces = _pieces(side, tile, overlap)
    ramp = (torch.arange(overlap * scale) + 0.5) / max(1, overlap * scale)
    edges = [round(k * (side - overlap) / pieces) for k in range(pieces)] + [side - overlap]
    for k in range(pieces):
        start, end = edges[k], edges[k + 1] + overlap
        if pieces == 1:
            start, end = 0, side
        weight = torch.ones((end - start) * scale)
        if k > 0:
            weight[: len(ramp)] = ramp
        if k < pieces - 1:
            weight[len(weight) - len(ramp) :] = 1 - ramp
        yield start, end, weight


def _pieces(side: int, tile: int, overlap: int) -> int:
    # So that no more than two pieces meet anywhere.
    if overlap < 0 or tile < max(1, 3 * overlap):
        raise ValueError(f"tile must be at least three times the overlap, got tile={tile} and overlap={overlap}")
    return 1 if side <= tile else math.ceil((side - overlap) / (tile - overlap))
