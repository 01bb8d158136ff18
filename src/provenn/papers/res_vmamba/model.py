"""Res-VMamba (Chen et al., 2024, arXiv:2402.15761): VMamba with residual paths around its first three stages."""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Generator, Tensor, nn

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.backbone import pad_to_multiple
from provenn.papers.res_vmamba.layers import PatchMerging, RandomProjection, ResidualProjection, VSSBlock

SOURCES = ("stage", "stem", "none", "official_random")
CNFOOD = 241  # classes


class ChannelsLast(nn.Module):
    """(batch, channels, height, width) as (batch, height, width, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ResVMamba(nn.Module):
    """VMamba with residual paths: x_{i+1} = Merge_i(Blocks_i(x_i)) + Conv1×1_i(MaxPool_2×2(·)), for i before the last.

    Names of the parameters are those of VMamba's own code, with `residual.i` besides.

    Args:
        dims, depths: width and blocks of each stage.
        num_classes: logits; 0 leaves the classifier out, and `forward` gives the mean of the last map.
        in_channels: of the image.
        source: where a residual path starts. With "stage" it starts at the input of its own stage, as the authors' code
            has it. With "stem" it starts at the path before it, and the first at the stem's output, as the paper's
            figure has it. The value "none" gives plain VMamba. As the released code does, "official_random" takes
            weights that are drawn anew at every call and never learn, evaluation included: for comparison only.
        init: of the residual convolutions, "kaiming" or "zero".
        state: N, states a channel.
        drop_path: of the last block, rising linearly from 0.
        patch_size: side and stride of the stem's convolution.

    Shapes: (batch, in_channels, height, width), of any size, to (batch, num_classes). Sides that are no multiple of
    `patch_size` are filled with zeros. It is a `provenn.nn.backbone.Backbone`.

    >>> import torch
    >>> net = ResVMamba((8, 16), (1, 1), num_classes=5)
    >>> net(torch.zeros(1, 3, 30, 17)).shape, [tuple(m.shape) for m in net.features(torch.zeros(1, 3, 30, 17))]
    (torch.Size([1, 5]), [(1, 8, 8, 5), (1, 16, 4, 3)])
    """

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 27, 2),
        *,
        num_classes: int = CNFOOD,
        in_channels: int = 3,
        source: str = "stage",
        init: str = "kaiming",
        state: int = 16,
        drop_path: float | int = 0.0,
        patch_size: int = 4,
    ):
        super().__init__()
        check_whole(num_classes=num_classes, in_channels=in_channels, state=state, patch_size=patch_size)
        check_finite(drop_path=drop_path)
        if not dims or len(dims) != len(depths):
            raise ValueError(f"dims and depths must have one entry a stage, got {len(dims)} and {len(depths)}")
        check_whole(**{f"dims[{i}]": dim for i, dim in enumerate(dims)})
        check_whole(**{f"depths[{i}]": depth for i, depth in enumerate(depths)})
        if min(*dims, *depths, in_channels, patch_size) < 1 or num_classes < 0:
            raise ValueError(
                "dims, depths, in_channels and patch_size must be at least 1 and num_classes at least 0, got "
                f"{tuple(dims)}, {tuple(depths)}, {in_channels}, {patch_size} and {num_classes}"
            )
        if source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        self.source, self.patch_size, self.in_channels = source, patch_size, in_channels
        self.widths, self.strides = list(dims), [patch_size * 2**i for i in range(len(dims))]
        self.patch_embed = nn.Sequential(
            nn.Conv2d(in_channels, dims[0], patch_size, patch_size), ChannelsLast(), nn.LayerNorm(dims[0])
        )
        rates = [drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        # Any: torch types what a list and a sequence hold as modules without names.
        self.layers: Any = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths)):
            blocks = [VSSBlock(dim, drop_path=rates.pop(0), state=state) for _ in range(depth)]
            merge = PatchMerging(dim, dims[i + 1]) if i + 1 < len(dims) else nn.Identity()
            self.layers.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks), downsample=merge)))
        steps = list(itertools.pairwise(dims))
        self.residual: nn.ModuleList | None = None
        if source == "official_random":
            self.residual = nn.ModuleList(RandomProjection(dim, out) for dim, out in steps)
        elif source != "none":
            self.residual = nn.ModuleList(ResidualProjection(dim, out, init=init) for dim, out in steps)
        elif init not in ("kaiming", "zero"):
            raise ValueError(f"init must be 'kaiming' or 'zero', got {init!r}")
        self.classifier: Any = None
        if num_classes:
            head = nn.Linear(dims[-1], num_classes)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.classifier = nn.Sequential(OrderedDict(norm=nn.LayerNorm(dims[-1]), head=head))

    def draw_from(self, generator: Generator | None) -> "ResVMamba":
        """Where `source="official_random"` draws from: with the same seed, the same weights follow. Returns itself."""
        for projection in self.residual or ():
            if isinstance(projection, RandomProjection):
                projection.generator = generator
        return self

    def _maps(self, image: Float[Tensor, "batch in_channels height width"]) -> list[Tensor]:
        """Each stage's map, (batch, height, width, dim), before it is merged."""
        if image.shape[1] != self.in_channels:
            raise ValueError(f"expected images of {self.in_channels} channels, got {image.shape[1]}")
        if not image.shape[2] * image.shape[3]:
            raise ValueError(f"expected images of at least 1×1 pixels, got {tuple(image.shape)}")
        x = path = self.patch_embed(pad_to_multiple(image, self.patch_size))
        maps = []
        for i, layer in enumerate(self.layers):
            maps.append(layer.blocks(x))
            if i + 1 == len(self.layers):
                break
            if self.source != "stem":
                path = x
            x = layer.downsample(maps[-1])
            if self.residual is not None:
                path = self.residual[i](path.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                x = x + path
        return maps

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        last = self._maps(x)[-1]
        if self.classifier is None:
            return last.mean((1, 2))
        return self.classifier.head(self.classifier.norm(last).mean((1, 2)))

    def features(self, x: Float[Tensor, "batch in_channels height width"]) -> list[Tensor]:
        """Each stage's map before it is merged, from fine to coarse."""
        return [m.permute(0, 3, 1, 2) for m in self._maps(x)]


# Presets, by widths and depths. Drop path is the system's, as the authors train: `drop_path=` 0.2 of tiny, 0.3 of
# small, 0.5 of base. The paper has small alone; the authors' code fixes its widths.
NARROW, WIDE = (96, 192, 384, 768), (128, 256, 512, 1024)
SHALLOW, DEEP = (2, 2, 9, 2), (2, 2, 27, 2)
res_vmamba_tiny = partial(ResVMamba, NARROW, SHALLOW)
res_vmamba_small = partial(ResVMamba, NARROW, DEEP)
res_vmamba_base = partial(ResVMamba, WIDE, DEEP)
# VMamba of its first version, without residual paths: the baselines.
vmamba_tiny = partial(ResVMamba, NARROW, SHALLOW, num_classes=1000, source="none")
vmamba_small = partial(ResVMamba, NARROW, DEEP, num_classes=1000, source="none")
vmamba_base = partial(ResVMamba, WIDE, DEEP, num_classes=1000, source="none")


def res_vmamba_mini(
    *, num_classes: int = 10, in_channels: int = 3, source: str = "stage", init: str = "kaiming",
    patch_size: int = 1, drop_path: float | int = 0.0,
) -> ResVMamba:  # fmt: skip
    """Three stages of one block, for images of 8 to 32 pixels. Ours, not the paper's: what trains in minutes."""
    given: dict[str, Any] = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "drop_path": drop_path,
        "patch_size": patch_size,
    }
    return ResVMamba((24, 48, 96), (1, 1, 1), source=source, init=init, state=8, **given)
