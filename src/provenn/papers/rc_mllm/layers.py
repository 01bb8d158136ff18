"""Qwen2-VL's vision tower, which RC-Qwen2-VL keeps (Wang et al., 2024, arXiv:2409.12191, section 2.1).

RC-MLLM adds no layer: boxes and texts are bound inside attention. The tower stands here so that the paper's sizes can
be built and counted. Its parameters have transformers' names.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.box_text import MAX_PIXELS, MIN_PIXELS, smart_resize
from provenn.core.errors import UserError
from provenn.nn.arguments import check_whole
from provenn.nn.language import init_narrow
from provenn.nn.positions import turn
from provenn.nn.towers import quick_gelu
from provenn.nn.vision_language import MLPProjector
from provenn.ops.softmax_attention import softmax_attention

FRAMES = 2  # of a patch; a still picture is given twice
SIDE = 2  # of a block of patches that become one token


def cut_patches(
    images: Sequence[Float[Tensor, "channels _ _"]],
    patch: int = 14,
    *,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Float[Tensor, "patches numbers"], Int[Tensor, "images 3"]]:
    """Pictures as the tower reads them: patches of all of them, each block of 2×2 in a row, and their grids.

    Args:
        images: standardised, of any sizes; each is resized by `smart_resize`.
        patch: side of a patch, in pixels.
        min_pixels, max_pixels: of a picture.

    >>> patches, grids = cut_patches([torch.zeros(3, 56, 90)])
    >>> patches.shape, grids.tolist()
    (torch.Size([24, 1176]), [[1, 4, 6]])
    """
    rows, grids = [], []
    for image in images:
        channels, tall, wide = image.shape
        seen = smart_resize(wide, tall, factor=SIDE * patch, min_pixels=min_pixels, max_pixels=max_pixels)
        if (tall, wide) != (seen.height, seen.width):
            size = (seen.height, seen.width)
            image = F.interpolate(image[None], size, mode="bicubic", align_corners=False, antialias=True)[0]
        down, across = seen.height // patch, seen.width // patch
        # (channels, block row, row, pixel row, block column, column, pixel column) to a block's four patches in a row.
        blocks = image.reshape(channels, down // SIDE, SIDE, patch, across // SIDE, SIDE, patch)
        patches = blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(down * across, channels, 1, patch, patch)
        rows.append(patches.expand(-1, -1, FRAMES, -1, -1).flatten(1))
        grids.append([1, down, across])
    return torch.cat(rows), torch.tensor(grids, device=rows[0].device)


def patch_places(grid: Sequence[int]) -> Int[Tensor, "patches 2"]:
    """Row and column of each patch of a picture, in the order of `cut_patches`.

    >>> patch_places([1, 2, 4])[:5].tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]
    """
    frames, down, across = grid
    places = torch.stack(torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij"), dim=-1)
    blocks = places.reshape(down // SIDE, SIDE, across // SIDE, SIDE, 2).transpose(1, 2).reshape(-1, 2)
    return blocks.repeat(frames, 1)


class _Attention(nn.Module):
    """Full attention within a picture, queries and keys turned by row and column."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        q, k = turn(q, *angles), turn(k, *angles)
        pictures = zip(*(part[None].split(lengths, dim=2) for part in (q, k, v)))
        y = torch.cat([softmax_attention(*picture) for picture in pictures], dim=2)
        return self.proj(y[0].transpose(0, 1).flatten(1))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class _Block(nn.Module):
    """x ← x + attention(LN x); x ← x + MLP(LN x)."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = _Attention(dim, heads), _MLP(dim, hidden)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), angles, lengths)
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int, channels: int):
        super().__init__()
        size = (FRAMES, patch, patch)
        self.proj = nn.Conv3d(channels, dim, size, size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class Qwen2VLTower(nn.Module):
    """The vision tower of Qwen2-VL without its merger.

    Args:
        dim, depth, heads: width, blocks and heads.
        hidden: width inside the MLPs. Default: 4 · dim.
        patch: side of a patch, in pixels.
        channels: of a picture.
        base: of the rotary positions. Half of a head's pairs turn by rows, half by columns.

    Shapes: patches (patches, numbers) and grids (images, 3), as `cut_patches` gives them, to (1, patches, dim).
    """

    def __init__(
        self,
        dim: int = 1280,
        depth: int = 32,
        heads: int = 16,
        hidden: int | None = None,
        *,
        patch: int = 14,
        channels: int = 3,
        base: float | int = 10_000.0,
    ):
        check_whole(dim=dim, depth=depth, heads=heads, hidden=hidden, patch=patch, channels=channels)
        super().__init__()
        if heads < 1 or dim % heads or (dim // heads) % 4:
            raise ValueError(f"heads must divide dim into multiples of 4, got dim={dim} and heads={heads}")
        self.dim, self.patch, self.base = dim, patch, base
        self.head_dim = dim // heads
        self.patch_embed = _PatchEmbed(dim, patch, channels)
        self.blocks = nn.ModuleList(_Block(dim, heads, hidden or 4 * dim) for _ in range(depth))

    def forward(
        self, patches: Float[Tensor, "patches numbers"], grids: Int[Tensor, "images 3"]
    ) -> Float[Tensor, "1 patches dim"]:
        lengths = grids.prod(dim=1).tolist()
        if sum(lengths) != len(patches):
            raise UserError(f"{len(patches)} patches are not those of pictures with grids {grids.tolist()}")
        places = torch.cat([patch_places(grid) for grid in grids.tolist()]).to(patches.device)
        half = self.head_dim // 2
        steps = torch.arange(0, half, 2, dtype=torch.float, device=patches.device)
        angles = (places[:, :, None] * self.base ** -(steps / half)).flatten(1)
        x = self.patch_embed(patches)
        for block in self.blocks:
            x = block(x, (angles.cos(), angles.sin()), lengths)
        return x[None]


class PlacedProjector(nn.Module):
    """W₂ GELU(W₁ LN(x_i) + b₁) + b₂ + p_i, with a learned p_i of each place. (ours, for the small model)

    A small tower's tokens say what is in a patch, and hardly where it lies. They are also long beside a decoder's
    words: without the norm, what is added to them would not be seen.

    Args:
        in_dim, dim: width of the tower's tokens and of the decoder's.
        places: tokens of a picture.

    Shapes: (batch, places, in_dim) to (batch, places, dim).
    """

    def __init__(self, in_dim: int, dim: int, places: int):
        check_whole(in_dim=in_dim, dim=dim, places=places)
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.inner = MLPProjector(in_dim, dim)
        self.place = nn.Parameter(torch.empty(places, dim))
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Drawn so that what is seen and where it lies weigh as much as a word does."""
        init_narrow(self.inner)
        self.inner.linear2.weight.mul_(0.5)
        nn.init.normal_(self.place, std=self.place.shape[1] ** -0.5)

    def forward(self, x: Float[Tensor, "batch places in_dim"]) -> Float[Tensor, "batch places dim"]:
        if x.shape[1] != len(self.place):
            raise UserError(f"a picture has {len(self.place)} tokens here, got {x.shape[1]}: another image size?")
        return self.inner(self.norm(x)) + self.place
