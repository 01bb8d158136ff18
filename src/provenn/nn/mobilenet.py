"""MobileNetV2 (Sandler et al., 2018, arXiv:1801.04381) with a slot for a gate at the end of every block's branch."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.channel_gates import Gate

# Table 2: expansion t, channels c, repeats n, stride s.
SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv_bn(channels: int, out: int, kernel_size: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project linearly, gate; added to the input where the shapes allow it."""

    def __init__(self, channels: int, out: int, *, stride: int, expansion: int, gate: Gate | None = None):
        super().__init__()
        hidden = channels * expansion
        self.conv = nn.Sequential(
            *([_conv_bn(channels, hidden, 1)] if expansion > 1 else []),
            _conv_bn(hidden, hidden, 3, stride=stride, groups=hidden),
            # Linear: a ReLU on few channels would lose what they carry (section 3.2).
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.gate = gate(out) if gate else nn.Identity()
        # No projection elsewhere: blocks that change the shape have no shortcut.
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        branch = self.gate(self.conv(x))
        return x + branch if self.residual else branch


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1: 3,504,872 parameters without a gate.

    Args:
        num_classes: size of the output; 0 leaves the classifier and the convolution before it out, and `forward` gives
            the mean of the last map.
        in_channels: channels of the image.
        gate: makes the module that closes each block's branch, given the branch's channels; none by default.
        dropout: rate before the classifier.
        settings: expansion, channels, repeats and stride of each group of blocks; Table 2.
        stem_stride: of the first convolution; 1 suits images of 8 to 64 pixels.
        last: channels of the convolution before the classifier.

    Attributes:
        strides, widths: of the maps, the last one at each stride from 4 on, or from the stem's where that is 1.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes). It is a `provenn.nn.backbone.Backbone`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        gate: Gate | None = None,
        dropout: float = 0.2,
        settings: Sequence[tuple[int, int, int, int]] = SETTINGS,
        stem_stride: int = 2,
        last: int = 1280,
    ):
        super().__init__()
        channels, reached = 32, stem_stride
        layers: list[nn.Module] = [_conv_bn(in_channels, channels, 3, stride=stem_stride)]
        ends = {}  # of each stride: the last layer and its channels
        for expansion, out, repeats, first_stride in settings:
            reached *= first_stride
            for position in range(repeats):
                stride = first_stride if position == 0 else 1
                layers.append(InvertedResidual(channels, out, stride=stride, expansion=expansion, gate=gate))
                channels = out
            ends[reached] = len(layers) - 1, channels
        ends = {stride: end for stride, end in ends.items() if stem_stride == 1 or stride > stem_stride}
        self.strides, self.widths = tuple(ends), tuple(width for _, width in ends.values())
        self.ends = [index for index, _ in ends.values()]
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Sequential()
        if num_classes:
            self.layers.append(_conv_bn(channels, last, 1))
            self.classifier.extend([nn.Dropout(dropout), nn.Linear(last, num_classes)])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        for module in self.classifier.modules():  # a gate starts its own
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.classifier(self.layers(x).mean(dim=(2, 3)))

    def features(self, x: Float[Tensor, "batch in_channels height width"]) -> list[Tensor]:
        """The last map at each stride from 4 on, from fine to coarse, the coarsest before the convolution of `last`."""
        maps = []
        for index, layer in enumerate(list(self.layers)[: self.ends[-1] + 1]):
            x = layer(x)
            if index in self.ends:
                maps.append(x)
        return maps
