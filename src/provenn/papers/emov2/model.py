"""EMOv2 (Zhang et al., 2024, arXiv:2412.06674): four stages of one block."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.detection import RetinaNet
from provenn.nn.segmentation import Segmenter
from provenn.papers.emov2.layers import EPS, I2RMB, norm_of

WINDOW, WINDOW_OF_256, WINDOW_OF_DENSE = 7, 8, 10


class StagedNetwork(nn.Module):
    """A stem and stages, whose maps are the pyramid; behind them a norm, the mean over cells and a classifier."""

    stem: nn.Module
    stages: nn.ModuleList

    def finish(self, norm: str, channels: int, num_classes: int) -> None:
        """Add the norm and the classifier; without classes neither."""
        self.norm = norm_of(norm if num_classes else "none", channels)
        self.head = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):  # convolutions stay at torch's default, as in the authors' code
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def features(self, x: Float[Tensor, "batch in_channels height width"]) -> list[Tensor]:
        """The map of each stage, from fine to coarse, before the head's norm."""
        maps, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.norm(self.features(x)[-1]).mean(dim=(2, 3)))


class EMOv2(StagedNetwork):
    """A stem, and stages of i2RMBs; the first block of a stage changes the shape, has a convolution and no residual.

    Args:
        depths, widths: blocks and channels of each stage.
        exp_ratios: λ of each stage; the first block has twice as much.
        head_dims: width of a head of queries and keys, where a stage has attention.
        modes: the operator of each stage's blocks but the first: "conv", "spanning", "close" or "remote".
        kernel_sizes: of the depth-wise convolutions; 0 has none (the first block then has 5, since it has a stride).
        norms: "batch" or "layer"; the operator's activation goes with it: SiLU or GELU.
        strides: of each stage's first block, 1 or more.
        stem_stride: of the first convolution.
        window: side of attention's groups, in cells; 0 takes the whole map. By default 7, or 8 where `image_size` is a
            multiple of 256, as the authors have it. It changes no weight.
        image_size: side of the square images that the network is meant for; any size runs.
        layer_scale: where each block's γ starts; None has none. The paper's 1e-6 leaves a fresh network's maps at about
            6e-7, and takes hundreds of epochs; 1 is for short training.
        drop_path: of the last block, rising linearly from 0.
        num_classes: logits; 0 leaves norm and classifier out, and `forward` gives the mean of the last map.
        in_channels: of the image.

    Attributes:
        strides, widths: of the maps that `features` gives, one a stage.

    Shapes: (batch, in_channels, height, width) of any size to (batch, num_classes). It is a
    `provenn.nn.backbone.Backbone`.

    Raises:
        ValueError: lists of different lengths, or a size that does not fit.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        exp_ratios: Sequence[float | int],
        head_dims: Sequence[int],
        modes: Sequence[str] = ("conv", "conv", "spanning", "spanning"),
        kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        norms: Sequence[str] = ("batch", "batch", "layer", "layer"),
        strides: Sequence[int] = (2, 2, 2, 2),
        stem_stride: int = 2,
        window: int | None = None,
        image_size: int = 224,
        layer_scale: float | int | None = 1e-6,
        drop_path: float | int = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
    ):
        super().__init__()
        check_whole(num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride, image_size=image_size)
        check_finite(drop_path=drop_path)
        lists = {
            "depths": depths, "widths": widths, "exp_ratios": exp_ratios, "head_dims": head_dims, "modes": modes,
            "kernel_sizes": kernel_sizes, "norms": norms, "strides": strides,
        }  # fmt: skip
        if {len(given) for given in lists.values()} != {len(depths)} or not len(depths):
            counts = ", ".join(f"{name} has {len(given)}" for name, given in lists.items())
            raise ValueError(f"all lists must have an entry for each stage: {counts}")
        if min(depths) < 1 or min(widths) < 2:
            raise ValueError(f"depths must be at least 1 and widths at least 2, got {depths} and {widths}")
        if min(stem_stride, in_channels, image_size) < 1 or num_classes < 0:
            raise ValueError(
                "stem_stride, in_channels and image_size must be at least 1 and num_classes at least 0, got "
                f"{stem_stride}, {in_channels}, {image_size} and {num_classes}"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        if window is None:
            window = WINDOW if image_size % 256 else WINDOW_OF_256
        channels = widths[0] // 2
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stem_stride, 1),
            nn.BatchNorm2d(channels, eps=EPS),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels, eps=EPS),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
        )
        rates = [drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        self.stages, self.strides, stride = nn.ModuleList(), list[int](), stem_stride
        for i, (depth, width) in enumerate(zip(depths, widths)):
            stage = nn.Sequential()
            for j in range(depth):
                first = j == 0
                stage.append(
                    I2RMB(
                        channels,
                        width,
                        exp_ratio=exp_ratios[i] * (2 if first else 1),
                        stride=strides[i] if first else 1,
                        mode="conv" if first else modes[i],
                        window=window,
                        head_dim=head_dims[i],
                        kernel_size=(kernel_sizes[i] or 5) if first else kernel_sizes[i],
                        norm=norms[i],
                        activation="silu" if norms[i] == "batch" else "gelu",
                        layer_scale=layer_scale,
                        drop_path=rates.pop(0),
                        skip=not first,
                    )
                )
                channels = width
            self.stages.append(stage)
            stride *= strides[i]
            self.strides.append(stride)
        self.widths = list(widths)
        self.finish(norms[-1], channels, num_classes)


class Size(NamedTuple):
    """What sets the published models apart; `segformer` is the width of their SegFormer head."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    exp_ratios: tuple[float, ...]
    head_dims: tuple[int, ...]
    drop_path: float
    segformer: int


SIZES = {
    "1m": Size((2, 2, 8, 3), (32, 48, 80, 180), (2, 2.5, 3, 3.5), (16, 16, 20, 20), 0.04036, 180),
    "2m": Size((3, 3, 9, 3), (32, 48, 120, 200), (2, 2.5, 3, 3.5), (16, 16, 20, 20), 0.05, 288),
    "5m": Size((3, 3, 9, 3), (48, 72, 160, 288), (2, 3, 4, 4), (16, 24, 32, 32), 0.05, 288),
    "20m": Size((3, 3, 13, 3), (64, 128, 320, 448), (2, 3, 4, 4), (16, 32, 32, 32), 0.1, 288),
    "50m": Size((5, 8, 20, 7), (64, 128, 384, 512), (2, 3, 4, 4), (16, 32, 32, 32), 0.2, 288),
}
Kernels = int | Sequence[int]


def emov2(
    variant: str,
    *,
    mode: str = "spanning",
    kernel_sizes: Kernels = 5,
    attention: Sequence[int] = (3, 4),
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    window: int | None = None,
    layer_scale: float | int | None = 1e-6,
    drop_path: float | int | None = None,
) -> EMOv2:
    """EMOv2 of a published size.

    Args:
        variant: "1m", "2m", "5m", "20m" or "50m".
        mode: of the stages with attention; "conv" leaves it out.
        kernel_sizes: of the depth-wise convolutions, one for all or one a stage.
        attention: the stages that have it, from 1.
        drop_path: by default the paper's for the size.
        num_classes, in_channels, image_size, window, layer_scale: as in `EMOv2`.
    """
    if variant not in SIZES:
        raise ValueError(f"variant must be one of {', '.join(SIZES)}, got {variant!r}")
    if not set(attention) <= {1, 2, 3, 4}:
        raise ValueError(f"attention must name stages from 1 to 4, got {list(attention)}")
    of = SIZES[variant]
    return EMOv2(
        depths=of.depths,
        widths=of.widths,
        exp_ratios=of.exp_ratios,
        head_dims=of.head_dims,
        modes=[mode if stage in attention else "conv" for stage in (1, 2, 3, 4)],
        kernel_sizes=[kernel_sizes] * 4 if isinstance(kernel_sizes, int) else kernel_sizes,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        window=window,
        layer_scale=layer_scale,
        drop_path=of.drop_path if drop_path is None else drop_path,
    )


def emov2_baseline(variant: str = "5m", **options: Any) -> EMOv2:
    """What the authors' file calls EMO1: remote windows alone and kernels of 3, 3, 5, 5 in EMOv2's frame.

    It is what spanning attention is held against; EMO itself has another stem and no layer scale.
    """
    return emov2(variant, **{"mode": "remote", "kernel_sizes": (3, 3, 5, 5), **options})


def emov2_small(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    mode: str = "spanning",
    kernel_sizes: Kernels = 3,
    exp_ratio: float | int = 2,
    window: int = 4,
    layer_scale: float | int | None = 1.0,
    drop_path: float | int = 0.0,
) -> EMOv2:
    """Three stages for images of 8 to 64 pixels, with a layer scale from which minutes suffice. Ours."""
    check_finite(exp_ratio=exp_ratio)
    return EMOv2(
        depths=(2, 2, 2),
        widths=(24, 48, 96),
        exp_ratios=(exp_ratio,) * 3,
        head_dims=(12, 12, 24),
        modes=(mode, mode, mode),
        kernel_sizes=[kernel_sizes] * 3 if isinstance(kernel_sizes, int) else kernel_sizes,
        norms=("layer", "layer", "layer"),
        strides=(1, 2, 2),
        stem_stride=1,
        window=window,
        layer_scale=layer_scale,
        drop_path=drop_path,
        num_classes=num_classes,
        in_channels=in_channels,
    )


def emov2_segmenter(
    variant: str = "5m",
    head: str = "semantic_fpn",
    *,
    num_classes: int = 150,
    in_channels: int = 3,
    window: int = WINDOW_OF_DENSE,
    layer_scale: float | int | None = 1e-6,
) -> Segmenter:
    """EMOv2 under a segmentation head, with the authors' window of 10 and widths of the heads.

    Args:
        variant: as in `emov2`.
        head: "semantic_fpn", "segformer", "deeplabv3" or "pspnet".
    """
    backbone = emov2(variant, num_classes=0, in_channels=in_channels, window=window, layer_scale=layer_scale)
    return Segmenter(backbone, num_classes, head, dim=SIZES[variant].segformer if head == "segformer" else 256)


def emov2_small_segmenter(
    *,
    num_classes: int = 5,
    in_channels: int = 1,
    head: str = "semantic_fpn",
    mode: str = "spanning",
    window: int = 6,
    dim: int = 32,
) -> Segmenter:
    """A narrow EMOv2 under a segmentation head, for pictures of about 100 pixels. Ours: what trains in minutes."""
    backbone = narrow(in_channels, mode, window)
    return Segmenter(backbone, num_classes, head, dim=dim)


def emov2_retinanet(
    variant: str = "5m",
    *,
    num_classes: int = 80,
    in_channels: int = 3,
    window: int = WINDOW_OF_DENSE,
    layer_scale: float | int | None = 1e-6,
) -> RetinaNet:
    """RetinaNet on EMOv2, with the authors' window of 10; `variant` as in `emov2`.

    They train it with the stem and the first stage frozen and batch norms in eval mode.
    """
    backbone = emov2(variant, num_classes=0, in_channels=in_channels, window=window, layer_scale=layer_scale)
    return RetinaNet(backbone, num_classes=num_classes, matching="mmdetection")


def emov2_small_retinanet(
    *, num_classes: int = 80, in_channels: int = 3, mode: str = "spanning", window: int = 6, dim: int = 64
) -> RetinaNet:
    """A RetinaNet for pictures of about 100 pixels on a narrow EMOv2. Ours: what trains in minutes.

    Its towers have two convolutions, and group norms since they start from nothing.
    """
    backbone = narrow(in_channels, mode, window)
    return RetinaNet(backbone, num_classes=num_classes, dim=dim, convs=2, groups=8, finest=4, coarser=1)


def narrow(in_channels: int, mode: str, window: int) -> EMOv2:
    """The backbone of our small segmenter and detectors, without a classifier."""
    return EMOv2(
        depths=(1, 1, 2, 2),
        widths=(16, 24, 40, 64),
        exp_ratios=(2, 2, 3, 3),
        head_dims=(8, 8, 8, 16),
        modes=("conv", "conv", mode, mode),
        window=window,
        layer_scale=1.0,
        num_classes=0,
        in_channels=in_channels,
    )
