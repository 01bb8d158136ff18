"""The CRAFT network (Li et al., 2023, arXiv:2308.05022), section 3.1, for ×2, ×3 and ×4."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.norms import ChannelNorm
from provenn.papers.craft.layers import HFB, HFERB, SRWAB

# Mean colour of DIV2K, red, green, blue, in 0…1.
MEAN = (0.4488, 0.4371, 0.4040)


class CRFB(nn.Module):
    """Cross-refinement fusion block: both branches start from x, and no skip goes around them.

    x ← fuse(low(x), high(x))

    Args:
        low: the global branch, published as two SRWABs, the second one shifted.
        high: the high-frequency branch, published as an HFERB.
        fuse: joins (low, high), published as an HFB.

    Shapes: (batch, dim, height, width) to the same.
    """

    def __init__(self, low: nn.Module, high: nn.Module, fuse: nn.Module):
        super().__init__()
        self.low, self.high, self.fuse = low, high, fuse

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return self.fuse(self.low(x), self.high(x))


class Group(nn.Module):
    """Residual group: f + conv3×3(block(… block(f))).

    Args:
        dim: C, the number of channels.
        blocks: the blocks, in order.

    Shapes: (batch, dim, height, width) to the same.
    """

    def __init__(self, dim: int, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return x + self.conv(self.blocks(x))


class CRAFT(nn.Module):
    """Super-resolution by cross-refinement of a global representation and a high-frequency prior.

    s = conv3×3(x − mean); f = groups(s); y = conv3×3(LN(f)) + s; out = pixelshuffle(conv3×3(y)) + mean

    The published network has no interpolation of the input in its output, and must learn the image itself; with
    `over_bicubic`, ours, it learns what bicubic interpolation lacks, which short trainings need.

    Args:
        scale: s, 2, 3 or 4 in the paper.
        dim: C, the number of channels.
        groups: number of residual groups.
        depth: number of blocks in a group.
        block: makes one block from `dim`; by default `cross_refinement`.
        multiple: height and width of the input must be multiples of it; the long window side by default.
        over_bicubic: add the bicubic interpolation of the input instead of the mean colour.

    Shapes: (batch, 3, height, width) in 0…1 to (batch, 3, scale · height, scale · width).
    Raises: ValueError for an input whose size is not a multiple of `multiple`; `provenn.nn.PadToMultiple` takes any.
    """

    mean: Tensor

    def __init__(
        self,
        scale: int,
        *,
        dim: int = 48,
        groups: int = 4,
        depth: int = 2,
        block: Callable[[int], nn.Module] | None = None,
        multiple: int = 16,
        over_bicubic: bool = False,
    ):
        super().__init__()
        if scale < 1:
            raise ValueError(f"scale must be at least 1, got {scale}")
        # Not a default of the signature: the function stands below, with the presets.
        block = cross_refinement if block is None else block
        self.scale, self.multiple, self.over_bicubic = scale, multiple, over_bicubic
        # Not saved: the authors' checkpoints lack it.
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.first = nn.Conv2d(3, dim, 3, padding=1)
        self.groups = nn.Sequential(*(Group(dim, [block(dim) for _ in range(depth)]) for _ in range(groups)))
        self.norm = ChannelNorm(dim)
        self.last = nn.Conv2d(dim, dim, 3, padding=1)
        pixels = nn.Conv2d(dim, 3 * scale**2, 3, padding=1)
        # One step for ×4 too, where other networks double twice.
        self.upsample = nn.Sequential(pixels, nn.PixelShuffle(scale))
        self.apply(_initialise)
        if over_bicubic:
            # Start close to the interpolation, not from noise on top of it.
            nn.init.trunc_normal_(pixels.weight, std=1e-3)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height2 width2"]:
        height, width = x.shape[2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"height and width must be multiples of {self.multiple}, got {height}×{width}")
        shallow = self.first(x - self.mean)
        deep = self.last(self.norm(self.groups(shallow)))
        base = self.mean
        if self.over_bicubic:
            # Not implemented for bfloat16 on CPU.
            precise = x.to(torch.promote_types(x.dtype, torch.float32))
            base = F.interpolate(precise, scale_factor=self.scale, mode="bicubic", antialias=True).to(x.dtype)
        # The skip goes around all groups and ends before the upsampler: the image itself is learned, mean colour aside.
        return self.upsample(deep + shallow) + base


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        # Convolutions keep torch's own start, as in the authors' code.
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def cross_refinement(dim: int, *, heads: int = 6, wrap: bool = True, position_dim: int | None = None) -> CRFB:
    """The published block: a plain and a shifted SRWAB beside an HFERB, joined by an HFB.

    Args:
        dim: C, the number of channels.
        heads: number of heads, half of them for each window shape in the SRWABs.
        wrap, position_dim: as in `RectangleWindowAttention`.
    """
    low = nn.Sequential(
        *(SRWAB(dim, heads, shifted=shifted, wrap=wrap, position_dim=position_dim) for shifted in (False, True))
    )
    return CRFB(low, HFERB(dim), HFB(dim, heads))


def craft_x2(*, wrap: bool = True, position_dim: int | None = None) -> CRAFT:
    """CRAFT ×2: 737,756 parameters."""
    return _published(2, wrap, position_dim)


def craft_x3(*, wrap: bool = True, position_dim: int | None = None) -> CRAFT:
    """CRAFT ×3: 744,251 parameters."""
    return _published(3, wrap, position_dim)


def craft_x4(*, wrap: bool = True, position_dim: int | None = None) -> CRAFT:
    """CRAFT ×4: 753,344 parameters."""
    return _published(4, wrap, position_dim)


def craft_small(
    *, scale: int = 2, over_bicubic: bool = True, wrap: bool = True, position_dim: int | None = None
) -> CRAFT:
    """A CRAFT of our own that trains in minutes on a laptop: 24 channels, two groups of one block, over bicubic."""
    return CRAFT(
        scale,
        dim=24,
        groups=2,
        depth=1,
        block=lambda dim: cross_refinement(dim, wrap=wrap, position_dim=position_dim),
        over_bicubic=over_bicubic,
    )


def _published(scale: int, wrap: bool, position_dim: int | None) -> CRAFT:
    return CRAFT(scale, block=lambda dim: cross_refinement(dim, wrap=wrap, position_dim=position_dim))
