"""Large images in tiles: the same outputs, while only maps and one tile's intermediate results are held.

All parts of L²ViT but linear attention see a bounded neighbourhood, and linear attention sees a sum over all tokens: a
first pass over the tiles adds it up, a second reads it.
"""

from collections.abc import Callable, Iterator

from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.narrowing import present
from provenn.papers.l2vit.layers import LGABlock, LinearGlobalAttention, LWABlock


def tiled(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch channels height width"],
    side: int,
    *,
    stride: int = 1,
    halo: int = 0,
) -> Float[Tensor, "batch channels2 height2 width2"]:
    """A function of a map, tile by tile.

    Args:
        function: gives a map `stride` times as coarse, of which a cell depends on what lies within `halo` cells of it.
            Beyond the map it sees what it sees there when it is given the whole.
        x: the map.
        side: of a tile of the output, in cells.
        stride, halo: as above.
    """
    height, width = (-(-length // stride) for length in x.shape[2:])
    output = None
    for rows in _spans(height, side, halo):
        for columns in _spans(width, side, halo):
            (top, first, last, bottom), (left, start, stop, right) = rows, columns
            part = function(x[..., top * stride : bottom * stride, left * stride : right * stride])
            if output is None:
                output = part.new_empty(len(x), height, width, part.shape[1]).permute(0, 3, 1, 2)
            output[..., first:last, start:stop] = part[..., first - top : last - top, start - left : stop - left]
    return present(output, "output")


def _spans(length: int, side: int, halo: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each tile along an axis: where its halo begins, where itself, and where both end."""
    for first in range(0, length, side):
        last = min(first + side, length)
        yield max(0, first - halo), first, last, min(length, last + halo)


def tiled_block(
    block: nn.Module, x: Float[Tensor, "batch dim height width"], side: int
) -> Float[Tensor, "batch dim height width"]:
    """What a block gives, tile by tile.

    Args:
        block: an `LWABlock`, or an `LGABlock` with linear attention.
        x: the map.
        side: of the tiles, in tokens; a multiple of the block's window.

    Raises:
        ValueError: other attention than these, which needs all tokens at once.
    """
    if isinstance(block, LWABlock):
        x = tiled(block.attend, x, side, halo=block.attention.window)  # whole windows, so that theirs stay in place
        return tiled(block.refine, x, side, halo=1)
    if not isinstance(block, LGABlock) or not isinstance(block.attention, LinearGlobalAttention):
        raise ValueError("only window attention and linear attention go through tiles; set tile=None")
    attention, norm = block.attention, block.norm1
    x = tiled(block.positions, x, side, halo=1)
    state = None
    for top in range(0, x.shape[2], side):
        for left in range(0, x.shape[3], side):
            state = attention.add(_tokens(norm, x[..., top : top + side, left : left + side]), state)
    total = present(state, "state")

    def attend(part: Tensor) -> Tensor:
        y = attention.read(_tokens(norm, part), total)
        return part + y.unflatten(1, part.shape[2:]).permute(0, 3, 1, 2)

    x = tiled(attend, x, side)
    concentration = block.concentration
    halo = 0 if concentration is None else 2 * (concentration.conv1.kernel_size[0] // 2)
    return tiled(block.refine, x, side, halo=halo)


def _tokens(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).flatten(1, 2)
