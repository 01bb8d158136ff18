"""Backbones: networks whose feature maps a segmentation head or a detector reads, and the pyramid between the two."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@runtime_checkable
class Backbone(Protocol):
    """A network that gives its pyramid: one feature map a stage, from fine to coarse.

    `strides` are the image pixels that a cell of each map is wide, `widths` the channels of each map. Of an image of
    any size, map i is (batch, widths[i], ⌈height / strides[i]⌉, ⌈width / strides[i]⌉). `forward` gives what the network
    gives on its own, logits as a rule. Built with `num_classes=0` it has no classifier, for heads that bring their own.
    """

    @property
    def strides(self) -> Sequence[int]: ...

    @property
    def widths(self) -> Sequence[int]: ...

    def features(self, x: Float[Tensor, "batch channels height width"]) -> list[Tensor]: ...


def pad_to_multiple(
    x: Float[Tensor, "batch channels height width"], multiple: int
) -> Float[Tensor, "batch channels height2 width2"]:
    """Zeros below and to the right, up to sides that are multiples of `multiple`.

    >>> pad_to_multiple(torch.ones(1, 3, 30, 32), 32).shape
    torch.Size([1, 3, 32, 32])
    """
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple))


def ceil_div(side: int, stride: int) -> int:
    """⌈side / stride⌉, in the form that ONNX keeps: of negative numbers its division rounds the other way.

    >>> ceil_div(96, 32), ceil_div(97, 32)
    (3, 4)
    """
    return (side + stride - 1) // stride


def crop_features(maps: Sequence[Tensor], strides: Sequence[int], size: tuple[int, int]) -> list[Tensor]:
    """The parts of a padded image's maps that lie over the image, of `size` (height, width)."""
    height, width = size
    return [m[..., : ceil_div(height, s), : ceil_div(width, s)] for m, s in zip(maps, strides, strict=True)]


class FixedBatchNorm(nn.BatchNorm2d):
    """A batch norm that keeps the statistics that it came with, in training too."""

    def train(self, mode: bool = True) -> "FixedBatchNorm":
        """Stays in eval mode."""
        return super().train(False)


def fix(backbone: Any, stride: int = 4) -> None:
    """Keep parts of a pretrained backbone as they are, in place, as detectors with few images a step do.

    Its batch norms keep their statistics, and what its map of `stride` pixels a cell is made of, the stem and the first
    stage as a rule, is not trained.

    Raises:
        ValueError: it has no such map.
    """
    if stride not in backbone.strides:
        raise ValueError(f"the backbone has no map of stride {stride}, only {list(backbone.strides)}")
    for module in backbone.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = FixedBatchNorm
            module.eval()
    # Found by its gradient: networks name their first stages in as many ways as there are networks.
    training, parameters = backbone.training, list(backbone.parameters())
    channels = next(m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d))
    image = torch.ones(1, channels, 64, 64, device=parameters[0].device, dtype=parameters[0].dtype)
    finest = backbone.eval().features(image)[list(backbone.strides).index(stride)]
    made_of = torch.autograd.grad(finest.sum(), parameters, allow_unused=True)
    backbone.train(training)
    for parameter, part in zip(parameters, made_of, strict=True):
        parameter.requires_grad_(part is None)


class FeaturePyramid(nn.Module):
    """A feature pyramid network (Lin et al., 2017, arXiv:1612.03144): every level sees as far as the coarsest.

        P_i = conv3×3(M_i),  M_i = conv1×1(C_i) + upsampled M_{i+1},  of the backbone's maps C_i, from coarse to fine.

    Coarser levels follow by strides of 2, finer ones by 2×2 transposed convolutions of the finest M, as SHViT has it.

    Args:
        widths, strides: of the maps that it is given, from fine to coarse.
        dim: channels of each level.
        coarser: how many levels to add at the coarse end.
        by: how: "output" convolves the last level and "input" the backbone's last map, 3×3 with a ReLU between two
            (RetinaNet has the second, FCOS the first); "pool" takes every other cell of the last level.
        finer: how many levels to add at the fine end.
        groups: of a group norm after every convolution, which then has no bias; None has none.
        activate: whether a ReLU stands between two levels that are added by convolutions; MMDetection has none.

    Attributes:
        strides: of the levels that it gives.
        widths: `dim` for each.

    Shapes: maps (batch, widths[i], h_i, w_i) to levels (batch, dim, h_j, w_j), from fine to coarse.
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        dim: int = 256,
        *,
        coarser: int = 0,
        by: str = "output",
        finer: int = 0,
        groups: int | None = None,
        activate: bool = True,
    ):
        super().__init__()
        if not widths or len(widths) != len(strides):
            raise ValueError(f"widths and strides must name the same maps, got {len(widths)} and {len(strides)}")
        if dim < 1 or coarser < 0 or finer < 0:
            raise ValueError(f"dim must be at least 1, coarser and finer at least 0, got {dim}, {coarser} and {finer}")
        if by not in ("output", "input", "pool"):
            raise ValueError(f"by must be 'output', 'input' or 'pool', got {by!r}")
        self.by, self.coarser, self.activate = by, coarser, activate
        self.strides = [
            *(strides[0] // 2**k for k in range(finer, 0, -1)),
            *strides,
            *(strides[-1] * 2**k for k in range(1, coarser + 1)),
        ]
        self.widths = [dim] * len(self.strides)

        def convolution(width: int, size: int, stride: int = 1) -> nn.Module:
            plain = nn.Conv2d(width, dim, size, stride, size // 2, bias=groups is None)
            return plain if groups is None else nn.Sequential(plain, nn.GroupNorm(groups, dim))

        self.laterals = nn.ModuleList(convolution(width, 1) for width in widths)
        self.upsamplers = nn.ModuleList(nn.ConvTranspose2d(dim, dim, 2, stride=2) for _ in range(finer))
        self.outputs = nn.ModuleList(convolution(dim, 3) for _ in range(finer + len(widths)))
        extra = 0 if by == "pool" else coarser
        first = widths[-1] if by == "input" else dim
        self.extra = nn.ModuleList(convolution(first if k == 0 else dim, 3, 2) for k in range(extra))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        merged = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            # To the size of the finer map, which is not twice the coarser one's where a side is odd.
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
        for upsample in self.upsamplers:
            merged.insert(0, upsample(merged[0]))
        levels = [convolve(x) for convolve, x in zip(self.outputs, merged, strict=True)]
        if self.by == "pool":
            for _ in range(self.coarser):
                levels.append(levels[-1][..., ::2, ::2])
            return levels
        last = maps[-1] if self.by == "input" else levels[-1]
        for convolve in self.extra:
            last = convolve(last)
            levels.append(last)
            last = last.relu() if self.activate else last
        return levels


def check_backbone(model: nn.Module, in_channels: int = 3, sizes: Sequence[tuple[int, int]] = ((64, 96),)) -> None:
    """Hold a network to the contract of `Backbone`.

    Raises:
        TypeError: the network has no features, strides or widths.
        ValueError: they do not fit each other; the message says what came.
    """
    if not isinstance(model, Backbone):
        raise TypeError(f"{type(model).__name__} lacks features, strides or widths")
    strides, widths = list(model.strides), list(model.widths)
    if not 0 < len(strides) == len(widths):
        raise ValueError(f"strides and widths must name the same maps, got {strides} and {widths}")
    if strides != sorted(set(strides)):
        raise ValueError(f"strides must grow, got {strides}")
    for height, width in sizes:
        with torch.no_grad():
            maps = model.features(torch.zeros(1, in_channels, height, width))
        given = [tuple(m.shape[1:]) for m in maps]
        expected = [(w, -(-height // s), -(-width // s)) for s, w in zip(model.strides, model.widths)]
        if given != expected:
            raise ValueError(f"of {height}×{width} pixels, features gives {given}, not {expected}")
