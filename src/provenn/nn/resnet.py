"""ResNets (He et al., 2016, arXiv:1512.03385) with a slot for a gate at the end of every residual branch."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.channel_gates import Gate


class BasicBlock(nn.Module):
    """y = ReLU(shortcut(x) + gate(BN(conv3×3(ReLU(BN(conv3×3(x)))))))."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int = 1, gate: Gate | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.gate = gate(width) if gate else nn.Identity()
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn1(self.conv1(x)).relu()
        branch = self.gate(self.bn2(self.conv2(branch)))
        return (branch + self.downsample(x)).relu()


class Bottleneck(nn.Module):
    """y = ReLU(shortcut(x) + gate(BN(conv1×1(ReLU(BN(conv3×3(ReLU(BN(conv1×1(x))))))))), with the stride in the 3×3."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int = 1, gate: Gate | None = None):
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.gate = gate(out) if gate else nn.Identity()
        self.downsample = _shortcut(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn1(self.conv1(x)).relu()
        branch = self.bn2(self.conv2(branch)).relu()
        branch = self.gate(self.bn3(self.conv3(branch)))
        return (branch + self.downsample(x)).relu()


def _shortcut(channels: int, out: int, stride: int) -> nn.Module:
    if stride == 1 and channels == out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class ResNet(nn.Module):
    """A residual network of stages that halve the resolution and double the width.

    Without a gate, parameter names are those of the usual ResNet, so its checkpoints load.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks in each stage.
        widths: inner width of each stage's blocks; they put out `block.expansion` times as many channels.
        stem: "imagenet" (7×7 stride 2, then max pooling) or "small" (3×3, for images of 8 to 64 pixels).
        num_classes: size of the output; 0 leaves the classifier out, and `forward` gives the mean of the last map.
        in_channels: channels of the image.
        gate: makes the module that closes each residual branch, given the branch's channels; none by default.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes). It is a `provenn.nn.backbone.Backbone`.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        widths: Sequence[int] = (64, 128, 256, 512),
        stem: str = "imagenet",
        num_classes: int = 1000,
        in_channels: int = 3,
        gate: Gate | None = None,
    ):
        super().__init__()
        if len(depths) != len(widths):
            raise ValueError(f"depths and widths must name the same stages, got {len(depths)} and {len(widths)}")
        channels = widths[0]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        elif stem == "small":
            self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            raise ValueError(f"stem must be 'imagenet' or 'small', got {stem!r}")
        self.bn1 = nn.BatchNorm2d(channels)
        self.stage_names = [f"layer{index}" for index in range(1, len(depths) + 1)]
        for index, (name, depth, width) in enumerate(zip(self.stage_names, depths, widths, strict=True)):
            blocks = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(block(channels, width, stride, gate))
                channels = width * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        first = 4 if stem == "imagenet" else 1
        self.strides = [first * 2**stage for stage in range(len(depths))]
        self.widths = [width * block.expansion for width in widths]
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Float[Tensor, "batch in_channels height width"]) -> list[Tensor]:
        """The feature map that each stage puts out, from fine to coarse, as a detector's neck wants them."""
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        maps = []
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
            maps.append(x)
        return maps

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.fc(self.features(x)[-1].mean(dim=(2, 3)))


def resnet18(*, num_classes: int = 1000, in_channels: int = 3, gate: Gate | None = None) -> ResNet:
    """ResNet-18: 11,689,512 parameters without a gate."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, gate=gate)


def resnet34(*, num_classes: int = 1000, in_channels: int = 3, gate: Gate | None = None) -> ResNet:
    """ResNet-34: 21,797,672 parameters without a gate."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels, gate=gate)


def resnet50(*, num_classes: int = 1000, in_channels: int = 3, gate: Gate | None = None) -> ResNet:
    """ResNet-50: 25,557,032 parameters without a gate."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels, gate=gate)


def resnet101(*, num_classes: int = 1000, in_channels: int = 3, gate: Gate | None = None) -> ResNet:
    """ResNet-101: 44,549,160 parameters without a gate."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes=num_classes, in_channels=in_channels, gate=gate)


def resnet152(*, num_classes: int = 1000, in_channels: int = 3, gate: Gate | None = None) -> ResNet:
    """ResNet-152: 60,192,808 parameters without a gate."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes=num_classes, in_channels=in_channels, gate=gate)


def resnet20(*, num_classes: int = 10, in_channels: int = 3, gate: Gate | None = None) -> ResNet:
    """ResNet-20 for images of 8 to 64 pixels (section 4.2), with convolutions for shortcuts where the shape changes."""
    return ResNet(
        BasicBlock,
        (3, 3, 3),
        widths=(16, 32, 64),
        stem="small",
        num_classes=num_classes,
        in_channels=in_channels,
        gate=gate,
    )
