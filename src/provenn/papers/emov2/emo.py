"""EMO (Zhang et al., 2023, arXiv:2301.01146), the predecessor: remote windows alone, attended to before expanding."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.channel_gates import PooledGate
from provenn.papers.emov2.layers import EPS, I2RMB
from provenn.papers.emov2.model import WINDOW, StagedNetwork

STEM = 24  # channels, in all sizes
MODES, KERNEL_SIZES = ("conv", "conv", "remote", "remote"), (3, 3, 5, 5)
NORMS = ("batch", "batch", "layer", "layer")


class StemGate(PooledGate):
    """Squeeze-and-excitation without a bottleneck: ω = σ(W₂ SiLU(W₁ y)), W₁ and W₂ both C → C.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.squeeze = nn.Linear(channels, channels)
        self.excite = nn.Linear(channels, channels)

    def interact(self, context: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        return self.excite(F.silu(self.squeeze(context)))


class EMO(StagedNetwork):
    """A stem with a channel gate, and four stages of inverted residuals whose expansion may be remote attention.

    The blocks are `I2RMB`s without a layer scale; where they attend, they do so before the expansion. The first block
    of a stage changes the shape, has a convolution and no residual.

    Args:
        depths, widths: blocks and channels of each of the four stages.
        exp_ratios: λ of each stage; the first block has twice as much.
        head_dims: width of a head of queries and keys; stages 3 and 4 have attention.
        window: side of attention's groups, in cells; 0 takes the whole map. It changes no weight.
        drop_path: of the last block, rising linearly from 0.
        num_classes: logits; 0 leaves norm and classifier out, and `forward` gives the mean of the last map.
        in_channels: of the image.

    Attributes:
        strides, widths: of the maps that `features` gives, one a stage.

    Shapes: (batch, in_channels, height, width) of any size to (batch, num_classes). It is a
    `provenn.nn.backbone.Backbone`.

    Raises:
        ValueError: lists that are not of four entries, or a size that does not fit.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        exp_ratios: Sequence[float | int],
        head_dims: Sequence[int],
        window: int = WINDOW,
        drop_path: float | int = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
    ):
        check_whole(num_classes=num_classes, in_channels=in_channels)
        check_finite(drop_path=drop_path)
        super().__init__()
        if {len(given) for given in (depths, widths, exp_ratios, head_dims)} != {len(MODES)}:
            raise ValueError(
                "depths, widths, exp_ratios and head_dims must have four entries, got "
                f"{len(depths)}, {len(widths)}, {len(exp_ratios)} and {len(head_dims)}"
            )
        if min(depths) < 1:
            raise ValueError(f"depths must be at least 1, got {depths}")
        if in_channels < 1 or num_classes < 0:
            raise ValueError(
                f"in_channels must be at least 1 and num_classes at least 0, got {in_channels} and {num_classes}"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, STEM, 3, 2, 1),
            nn.BatchNorm2d(STEM, eps=EPS),
            nn.Conv2d(STEM, STEM, 3, padding=1, groups=STEM, bias=False),
            nn.BatchNorm2d(STEM, eps=EPS),
            nn.SiLU(),
            StemGate(STEM),
            nn.Conv2d(STEM, STEM, 1, bias=False),
        )
        rates = [drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        self.stages, channels = nn.ModuleList(), STEM
        for i, (depth, width) in enumerate(zip(depths, widths)):
            stage = nn.Sequential()
            for j in range(depth):
                first = j == 0
                stage.append(
                    I2RMB(
                        channels,
                        width,
                        exp_ratio=exp_ratios[i] * (2 if first else 1),
                        stride=2 if first else 1,
                        mode="conv" if first else MODES[i],
                        window=window,
                        head_dim=head_dims[i],
                        kernel_size=KERNEL_SIZES[i],
                        norm=NORMS[i],
                        activation="silu" if NORMS[i] == "batch" else "gelu",
                        layer_scale=None,
                        drop_path=rates.pop(0),
                        skip=not first,
                        attend_first=True,
                    )
                )
                channels = width
            self.stages.append(stage)
        self.strides, self.widths = [4, 8, 16, 32], list(widths)
        self.finish(NORMS[-1], channels, num_classes)


class EMOSize(NamedTuple):
    """What sets the published models apart."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    exp_ratios: tuple[float, ...]
    head_dims: tuple[int, ...]
    drop_path: float


EMO_SIZES = {
    "1m": EMOSize((2, 2, 8, 3), (32, 48, 80, 168), (2, 2.5, 3, 3.5), (16, 16, 20, 21), 0.04036),
    "2m": EMOSize((3, 3, 9, 3), (32, 48, 120, 200), (2, 2.5, 3, 3.5), (16, 16, 20, 20), 0.05),
    "5m": EMOSize((3, 3, 9, 3), (48, 72, 160, 288), (2, 3, 4, 4), (24, 24, 32, 32), 0.05),
    "6m": EMOSize((3, 3, 9, 3), (48, 72, 160, 320), (2, 3, 4, 5), (16, 24, 20, 32), 0.05),
}


def emo(
    variant: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    window: int = WINDOW,
    drop_path: float | int | None = None,
) -> EMO:
    """EMO of a published size.

    Args:
        variant: "1m", "2m", "5m" or "6m".
        drop_path: by default the paper's for the size.
        num_classes, in_channels, window: as in `EMO`.
    """
    if variant not in EMO_SIZES:
        raise ValueError(f"variant must be one of {', '.join(EMO_SIZES)}, got {variant!r}")
    of = EMO_SIZES[variant]
    return EMO(
        depths=of.depths,
        widths=of.widths,
        exp_ratios=of.exp_ratios,
        head_dims=of.head_dims,
        window=window,
        drop_path=of.drop_path if drop_path is None else drop_path,
        num_classes=num_classes,
        in_channels=in_channels,
    )
