"""L²ViT (Zheng, 2025, arXiv:2501.16182): window attention and linear global attention in turns, in four stages."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.backbone import pad_to_multiple
from provenn.nn.segmentation import Segmenter
from provenn.papers.l2vit.layers import FLOOR, LGABlock, LinearGlobalAttention, LWABlock, initialise
from provenn.papers.l2vit.tiles import tiled, tiled_block

STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}  # of the stem's two convolutions


class Stem(nn.Module):
    """Two 3×3 convolutions with batch norms, a ReLU between them, and a layer norm.

    Shapes: (batch, in_channels, height, width) to (batch, dim, ⌈height / stride⌉, ⌈width / stride⌉).
    """

    def __init__(self, in_channels: int, dim: int, stride: int):
        super().__init__()
        first, second = STRIDES[stride]
        self.stride = stride
        self.convs = nn.Sequential(
            nn.Conv2d(in_channels, dim // 2, 3, first, 1),
            nn.BatchNorm2d(dim // 2),
            nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 3, second, 1),
            nn.BatchNorm2d(dim),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        # Filled up first, as the authors do: the last cell sees what the first convolution makes of those zeros.
        return _normalise(self.norm, self.convs(pad_to_multiple(x, self.stride)))


class Downsample(nn.Module):
    """A layer norm and a 2×2 convolution of stride 2; odd sides are filled up with a zero after the norm.

    Shapes: (batch, channels, height, width) to (batch, dim, ⌈height / 2⌉, ⌈width / 2⌉).
    """

    stride = 2

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv2d(channels, dim, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad_to_multiple(_normalise(self.norm, x), 2))


def _normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """A layer norm over the channels of a map."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


ATTENTIONS = ("linear", "softmax")
BLOCKS = ("window", "global")


class L2ViT(nn.Module):
    """Stages of window and global blocks in turns; a backbone that is linear in the pixels.

    Args:
        dims, depths, heads: width, blocks and heads of each stage.
        num_classes: logits; 0 leaves the classifier out and puts a layer norm on every map, as the authors' backbones
            for detection and segmentation have it. A classifier has one on its last map alone.
        in_channels: of the image.
        window: side of the windows, in tokens.
        blocks: the kinds of a stage's blocks, in turns: "window" and "global". The paper's order is this one.
        attention: of the global blocks: "linear", or "softmax" as a baseline, which is quadratic.
        kernel_size: of the LCM in global blocks; None leaves it out.
        floor: of linear attention's row sums.
        mlp_ratio: of all blocks.
        drop_path: of the last block, rising linearly from 0.
        stem: pixels that a token of the first stage is wide: 4 in the paper, 2 or 1 for small images.
        tile: side in pixels of the tiles that `features` and `forward` go through while evaluating, for images larger
            than that: the same outputs, in memory of about two maps and a tile. None takes the image whole.

    Shapes: (batch, in_channels, height, width), any sides, to (batch, num_classes). It is a
    `provenn.nn.backbone.Backbone`.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        window: int = 7,
        blocks: Sequence[str] = BLOCKS,
        attention: str = "linear",
        kernel_size: int | None = 7,
        floor: float | int = FLOOR,
        mlp_ratio: float | int = 4,
        drop_path: float | int = 0.0,
        stem: int = 4,
        tile: int | None = None,
    ):
        super().__init__()
        check_whole(num_classes=num_classes, in_channels=in_channels, window=window, stem=stem, tile=tile)
        check_finite(drop_path=drop_path)
        if not len(dims) == len(depths) == len(heads) >= 1:
            raise ValueError(f"dims, depths and heads must name the same stages, got {dims}, {depths} and {heads}")
        if min(*dims, *depths, in_channels) < 1 or num_classes < 0:
            raise ValueError(
                "dims, depths and in_channels must be at least 1 and num_classes at least 0, got "
                f"{dims}, {depths}, {in_channels} and {num_classes}"
            )
        if dims[0] % 2:
            raise ValueError(f"the first of dims must be even, got {dims[0]}")
        if isinstance(blocks, str) or not blocks or set(blocks) - set(BLOCKS):
            raise ValueError(f"blocks must name {' or '.join(map(repr, BLOCKS))} in turns, got {blocks!r}")
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        if stem not in STRIDES:
            raise ValueError(f"stem must be one of {', '.join(map(str, STRIDES))}, got {stem}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        self.strides, self.widths = [stem * 2**i for i in range(len(dims))], list(dims)
        self.in_channels, self.window = in_channels, window
        self._attention = attention
        self.tile = tile
        mixer: Callable[..., nn.Module] = (
            partial(LinearGlobalAttention, floor=floor)
            if attention == "linear"
            else partial(SoftmaxAttention, causal=False)
        )
        rates = [drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        self.embeds, self.stages, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, dim in enumerate(dims):
            self.embeds.append(Stem(in_channels, dim, stem) if i == 0 else Downsample(dims[i - 1], dim))
            stage = nn.ModuleList()
            for j in range(depths[i]):
                shared: dict[str, Any] = {"mlp_ratio": mlp_ratio, "drop_path": rates.pop(0)}
                if blocks[j % len(blocks)] == "window":
                    stage.append(LWABlock(dim, heads[i], window=window, **shared))
                else:
                    stage.append(LGABlock(dim, heads[i], attention=mixer, kernel_size=kernel_size, **shared))
            self.stages.append(stage)
            normed = num_classes == 0 or i == len(dims) - 1
            self.norms.append(nn.LayerNorm(dim) if normed else nn.Identity())
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        for part in (self.embeds, self.head):  # blocks have done it themselves
            initialise(part)

    @property
    def tile(self) -> int | None:
        """Side of the tiles, in pixels."""
        return self._tile

    @tile.setter
    def tile(self, side: int | None) -> None:
        # Every stage has whole windows in a tile, and a last map's cell whole tokens.
        if side is not None and self._attention != "linear":
            raise ValueError(f"softmax attention needs all tokens at once: tile must be None, got {side}")
        least = self.strides[-1] * self.window
        if side is not None and (side < least or side % least):
            raise ValueError(f"tile must be a multiple of {least} pixels, whole windows of the last stage, got {side}")
        self._tile = side

    def features(self, x: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The map of each stage, from fine to coarse."""
        if x.shape[1] != self.in_channels:
            raise ValueError(f"expected images of {self.in_channels} channels, got {x.shape[1]}")
        if not x.shape[2] * x.shape[3]:
            raise ValueError(f"expected images of at least 1×1 pixels, got {tuple(x.shape)}")
        if self._tile is not None and max(x.shape[2:]) > self._tile and not self.training:
            return self._tiled_features(x, self._tile)
        maps = []
        for embed, blocks, norm in zip(self.embeds, self.stages, self.norms):
            x = embed(x)
            for block in blocks:  # type: ignore[attr-defined]  # a ModuleList
                x = block(x)
            maps.append(_normalise(norm, x))
        return maps

    def _tiled_features(self, x: Tensor, tile: int) -> list[Tensor]:
        maps = []
        for i, (embed, blocks, norm) in enumerate(zip(self.embeds, self.stages, self.norms)):
            side = tile // self.strides[i]
            x = tiled(embed, x, side, stride=embed.stride, halo=2 if i == 0 else 0)  # type: ignore[arg-type]
            for block in blocks:  # type: ignore[attr-defined]  # a ModuleList
                x = tiled_block(block, x, side)
            maps.append(_normalise(norm, x))
        return maps

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(x)[-1].mean(dim=(2, 3)))


TINY: dict[str, Any] = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)}
SMALL: dict[str, Any] = {"dims": (96, 192, 384, 768), "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)}
BASE: dict[str, Any] = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}


def l2vit_tiny(**options: Any) -> L2ViT:
    """L²ViT-T: 28,596,781 parameters. `options` as in `L2ViT`."""
    return L2ViT(**{**TINY, **options})


def l2vit_small(**options: Any) -> L2ViT:
    """L²ViT-S: 50,199,157 parameters. `options` as in `L2ViT`."""
    return L2ViT(**{**SMALL, **options})


def l2vit_base(**options: Any) -> L2ViT:
    """L²ViT-B: 88,577,188 parameters. `options` as in `L2ViT`."""
    return L2ViT(**{**BASE, **options})


def l2vit_base_384(**options: Any) -> L2ViT:
    """L²ViT-B for images of 384 pixels: windows of 12 divide 96, 48, 24 and 12. Its weights fit Base, and Base's it."""
    return L2ViT(**{**BASE, "window": 12, **options})


def l2vit_mini(**options: Any) -> L2ViT:
    """Two stages at the pixels' own size, for images of 8 to 32 pixels. Ours: what trains in minutes."""
    mini = {"dims": (32, 64), "depths": (2, 2), "heads": (1, 2), "window": 4, "stem": 1, "mlp_ratio": 2}
    return L2ViT(**{**mini, "num_classes": 10, **options})


def l2vit_tiny_semantic_fpn(
    *, num_classes: int = 150, head: str = "semantic_fpn", dim: int = 256, **options: Any
) -> Segmenter:
    """L²ViT-T under a segmentation head of this library; the paper's is UPerNet.

    Args:
        num_classes: logits a pixel; 150 in ADE20K.
        head, dim: as in `provenn.nn.segmentation.Segmenter`.
        options: as in `L2ViT`; 0.3 is the paper's `drop_path` here.
    """
    return Segmenter(l2vit_tiny(num_classes=0, **options), num_classes, head, dim=dim)


def l2vit_mini_semantic_fpn(
    *, num_classes: int = 5, in_channels: int = 1, head: str = "semantic_fpn", dim: int = 32, **options: Any
) -> Segmenter:
    """Three narrow stages under the segmentation head of Panoptic FPN. Ours: what trains in minutes."""
    mini = {"dims": (32, 64, 128), "depths": (2, 2, 2), "heads": (1, 2, 4), "mlp_ratio": 2}
    backbone = L2ViT(**{**mini, "num_classes": 0, "in_channels": in_channels, **options})
    return Segmenter(backbone, num_classes, head, dim=dim)
