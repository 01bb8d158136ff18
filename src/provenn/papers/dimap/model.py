"""Swin Transformer (Liu et al., 2021), the networks that DIMAP prunes, and small ones for digits."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.papers.dimap.layers import PatchMerging, SwinBlock


class Swin(nn.Module):
    """Patches, then stages of blocks whose windows are shifted in turns, each stage at half the resolution.

    Args:
        dim: C, width of a token of the first stage; it doubles from stage to stage.
        depths, heads: blocks and heads of each stage.
        num_classes: logits; 0 leaves the classifier out and puts a layer norm on every map, for heads that read them.
        in_channels: of the image.
        window: side of the windows, in tokens.
        patch: side of a patch, in pixels.
        mlp_ratio: hidden width of the MLPs over their own.
        drop_path: of the last block, rising linearly from 0.

    Shapes: (batch, in_channels, height, width), any sides, to (batch, num_classes). It is a
    `provenn.nn.backbone.Backbone`.

    Raises:
        ValueError: stages that do not fit each other, or sizes below 1.
    """

    def __init__(
        self,
        *,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        window: int = 7,
        patch: int = 4,
        mlp_ratio: float | int = 4,
        drop_path: float | int = 0.0,
    ):
        check_whole(dim=dim, num_classes=num_classes, in_channels=in_channels, window=window, patch=patch)
        check_finite(drop_path=drop_path)
        super().__init__()
        if not len(depths) == len(heads) >= 1:
            raise ValueError(f"depths and heads must name the same stages, got {depths} and {heads}")
        if min(*depths, dim, in_channels, patch) < 1 or num_classes < 0:
            raise ValueError(
                "depths, dim, in_channels and patch must be at least 1 and num_classes at least 0, got "
                f"{depths}, {dim}, {in_channels}, {patch} and {num_classes}"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        self.in_channels, self.patch = in_channels, patch
        self.widths = [dim << i for i in range(len(depths))]
        self.strides = [patch << i for i in range(len(depths))]
        self.embed, self.embed_norm = nn.Conv2d(in_channels, dim, patch, patch), nn.LayerNorm(dim)
        rates = [drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        self.stages, self.merges, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(self.widths):
            shifts = [window // 2 * (j % 2) for j in range(depths[i])]
            blocks = [SwinBlock(width, heads[i], window, shift, mlp_ratio, rates.pop(0)) for shift in shifts]
            self.stages.append(nn.Sequential(*blocks))
            last = i == len(depths) - 1
            self.norms.append(nn.LayerNorm(width) if last or not num_classes else nn.Identity())
            if not last:
                self.merges.append(PatchMerging(width))
        self.head = nn.Linear(self.widths[-1], num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The map of each stage, from fine to coarse."""
        if x.shape[1] != self.in_channels:
            raise ValueError(f"expected images of {self.in_channels} channels, got {x.shape[1]}")
        if not x.shape[2] * x.shape[3]:
            raise ValueError(f"expected images of at least 1×1 pixels, got {tuple(x.shape)}")
        (height, width), p = x.shape[2:], self.patch
        rows, columns = (height - 1) // p + 1, (width - 1) // p + 1
        x = F.pad(x, (0, columns * p - width, 0, rows * p - height))
        x = self.embed_norm(self.embed(x).permute(0, 2, 3, 1))
        maps = []
        for i, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            x = self.merges[i - 1](x) if i else x
            x = stage(x)
            maps.append(norm(x).permute(0, 3, 1, 2))
        return maps

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(x)[-1].mean(dim=(2, 3)))


TINY: dict[str, Any] = {"dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)}
SMALL: dict[str, Any] = {"dim": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)}
BASE: dict[str, Any] = {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}


def swin_t(**options: Any) -> Swin:
    """Swin-T: 28,288,354 parameters. `options` as of `Swin`."""
    return Swin(**{**TINY, **options})


def swin_s(**options: Any) -> Swin:
    """Swin-S: 49,606,258 parameters. `options` as of `Swin`."""
    return Swin(**{**SMALL, **options})


def swin_b(**options: Any) -> Swin:
    """Swin-B: 87,768,224 parameters. `options` as of `Swin`."""
    return Swin(**{**BASE, **options})


class Enlarged(nn.Module):
    """A network of images that are enlarged first, between pixels in straight lines.

    Args:
        network: takes the large images.
        factor: how many times larger each side is.

    Shapes: (batch, channels, height, width) to what the network gives.
    """

    def __init__(self, network: nn.Module, factor: int):
        check_whole(factor=factor)
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        self.network, self.factor = network, factor

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        if x.dim() != 4 or not x.shape[2] * x.shape[3]:
            raise ValueError(f"expected images (batch, channels, height, width), got {tuple(x.shape)}")
        return self.network(F.interpolate(x, scale_factor=self.factor, mode="bilinear"))


def swin_digits(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    dim: int = 24,
    depths: Sequence[int] = (2, 2, 2),
    drop_path: float | int = 0.1,
) -> Enlarged:
    """A Swin for digits of 8×8 pixels, enlarged to 32×32, with windows of 4×4 patches of 2×2. Not a model of the paper.

    Args:
        num_classes, in_channels, depths, drop_path: as of `Swin`; three stages.
        dim: C, a multiple of 8: a head is 8 wide.
    """
    if dim < 8 or dim % 8:
        raise ValueError(f"dim must be a multiple of 8, got {dim}")
    heads = [dim // 8 << i for i in range(len(depths))]
    sizes: dict[str, Any] = {"window": 4, "patch": 2, "num_classes": num_classes, "in_channels": in_channels}
    return Enlarged(Swin(dim=dim, depths=depths, heads=heads, drop_path=drop_path, **sizes), 4)


def operations(model: Swin, side: int = 224) -> dict[str, int]:
    """Multiply-adds of one image of a Swin, by hand: those of the linear layers, the products of the attention, all.

    Windows are whole: `side` is a multiple of what the last stage's windows cover, as 224 is for the paper's models.
    """
    tokens = [(side // stride) ** 2 for stride in model.strides]
    counts = {"qkv": 0, "proj": 0, "mlp": 0, "products": 0, "rest": 0}
    for n, width, stage in zip(tokens, model.widths, model.stages, strict=True):
        for block in stage:  # type: ignore[attr-defined]  # a Sequential of SwinBlocks
            counts["qkv"] += n * block.attention.qkv.weight.numel()
            counts["proj"] += n * block.attention.project.weight.numel()
            counts["mlp"] += n * (block.mlp[0].weight.numel() + block.mlp[2].weight.numel())
            counts["products"] += n * 2 * block.attention.window**2 * width
    counts["rest"] += tokens[0] * model.embed.weight.numel()
    for n, merge in zip(tokens[1:], model.merges, strict=True):
        counts["rest"] += n * merge.reduction.weight.numel()  # type: ignore[union-attr,operator]  # a PatchMerging
    if isinstance(model.head, nn.Linear):
        counts["rest"] += model.head.weight.numel()
    return {**counts, "all": sum(counts.values())}
