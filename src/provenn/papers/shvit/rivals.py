"""What SHViT is held against as whole networks: MobileNetV3, EfficientViT-M, FasterNet and MobileOne, at any width.

Each has its published structure and depth; only widths are scaled. `stride` divides the stride of the stem: a small
image then meets as many strides as one so many times larger would in the published network.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.channel_gates import SqueezeExcitation
from provenn.papers.shvit.layers import ConvBN, Downsampling, FeedForward, Residual

Image = Float[Tensor, "batch in_channels height width"]
Logits = Float[Tensor, "batch classes"]
Maps = Float[Tensor, "batch channels height width"]


def scaled(channels: int, width: float | int, step: int = 4) -> int:
    """Channels at a width, a multiple of `step`.

    >>> scaled(96, 0.5), scaled(16, 0.1)
    (48, 4)
    """
    return max(step, round(channels * width / step) * step)


class Pooled(nn.Module):
    """The mean over places."""

    def forward(self, x: Maps) -> Float[Tensor, "batch channels"]:
        return x.mean(dim=(2, 3))


# MobileNetV3 (Howard et al., 2019, arXiv:1905.02244)

# Table 2, MobileNetV3-Small: kernel, expanded channels, output, squeeze-excite, hard swish, stride.
SMALL = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)


class HardGate(SqueezeExcitation):
    """Squeeze-and-excitation by a quarter, with biases and the hard sigmoid ReLU6(x + 3) / 6 (section 5.3)."""

    def __init__(self, channels: int):
        super().__init__(channels, reduction=4, bias=True)

    def forward(self, x: Maps) -> Maps:
        gate = nn.functional.hardsigmoid(self.interact(x.mean(dim=(2, 3))))
        return x * gate[..., None, None]


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel, gate, project; added to the input where the shapes allow it.

    Args:
        channels, hidden, out: before, within and after.
        kernel_size, stride: of the depth-wise convolution.
        gate: whether it has squeeze-and-excitation.
        hard_swish: whether it is not ReLU that follows the convolutions.

    Shapes: (batch, channels, height, width) to (batch, out, ⌈height / stride⌉, ⌈width / stride⌉).
    """

    def __init__(
        self, channels: int, hidden: int, out: int, kernel_size: int, *, stride: int, gate: bool, hard_swish: bool
    ):
        super().__init__()
        act = nn.Hardswish if hard_swish else nn.ReLU
        self.branch = nn.Sequential(
            *([ConvBN(channels, hidden), act()] if hidden != channels else []),
            *(ConvBN(hidden, hidden, kernel_size, stride=stride, groups=hidden), act()),
            HardGate(hidden) if gate else nn.Identity(),
            ConvBN(hidden, out),
        )
        self.residual = stride == 1 and channels == out

    def forward(self, x: Maps) -> Float[Tensor, "batch out _ _"]:
        return x + self.branch(x) if self.residual else self.branch(x)


class MobileNetV3(nn.Sequential):
    """MobileNetV3-Small: 2,537,238 parameters at width 1 for 1,000 classes.

    Args:
        num_classes, in_channels: of the output and of the image.
        width: by which all channels are multiplied.
        stride: by how much smaller the stem's stride of 2 is: 1 or 2.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes).
    """

    def __init__(self, *, num_classes: int = 1000, in_channels: int = 3, width: float | int = 1.0, stride: int = 1):
        check_whole(num_classes=num_classes, in_channels=in_channels, stride=stride)
        check_finite(width=width)
        channels = scaled(16, width)
        layers: list[nn.Module] = [ConvBN(in_channels, channels, 3, stride=2 // stride), nn.Hardswish()]
        for kernel_size, hidden, out, gate, hard_swish, step in SMALL:
            sizes = scaled(hidden, width), scaled(out, width)
            block = InvertedBottleneck(channels, *sizes, kernel_size, stride=step, gate=gate, hard_swish=hard_swish)
            layers.append(block)
            channels = sizes[1]
        hidden, last = scaled(576, width), scaled(1024, width)
        head = [nn.Linear(hidden, last), nn.Hardswish(), nn.Linear(last, num_classes)]
        super().__init__(*layers, ConvBN(channels, hidden), nn.Hardswish(), Pooled(), *head)


# FasterNet (Chen et al., 2023, arXiv:2303.03667)


class PartialBlock(nn.Module):
    """x + conv1×1(GELU(BN(conv1×1(PConv(x))))): PConv is a 3×3 convolution of the first quarter of the channels.

    Args:
        channels: a multiple of 4; inside of the two 1×1 convolutions are twice as many.

    Shapes: (batch, channels, height, width) to the same.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.sizes = (channels // 4, channels - channels // 4)
        self.partial = nn.Conv2d(self.sizes[0], self.sizes[0], 3, padding=1, bias=False)
        last = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.mlp = nn.Sequential(ConvBN(channels, 2 * channels), nn.GELU(), last)

    def forward(self, x: Maps) -> Maps:
        first, rest = x.split(self.sizes, dim=1)
        return x + self.mlp(torch.cat([self.partial(first), rest], dim=1))


class FasterNet(nn.Sequential):
    """FasterNet-T0: 3,905,500 parameters at width 1 for 1,000 classes.

    Args:
        num_classes, in_channels: of the output and of the image.
        width: by which all channels are multiplied.
        stride: by how much smaller the stem's stride of 4 is: 1, 2 or 4.
        depths: of the four stages, of 40, 80, 160 and 320 channels.

    Shapes: (batch, in_channels, height, width), multiples of 32 / stride, to (batch, num_classes).
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float | int = 1.0,
        stride: int = 1,
        depths: Sequence[int] = (1, 2, 8, 2),
    ):
        check_whole(num_classes=num_classes, in_channels=in_channels, stride=stride)
        check_finite(width=width)
        layers: list[nn.Module] = []
        before, patch = in_channels, 4 // stride
        for index, depth in enumerate(depths):
            channels = scaled(40 * 2**index, width)
            cut = nn.Conv2d(before, channels, patch, patch, bias=False)
            layers += [cut, nn.BatchNorm2d(channels), *(PartialBlock(channels) for _ in range(depth))]
            before, patch = channels, 2
        last = scaled(1280, width)
        head = [nn.Linear(before, last, bias=False), nn.GELU(), nn.Linear(last, num_classes)]
        super().__init__(*layers, Pooled(), *head)


# MobileOne (Vasu et al., 2023, arXiv:2206.04040)


class ManyBranches(nn.Module):
    """ReLU(BN(conv(x)) + BN(conv1×1(x)) + BN(x)): one convolution in eval mode.

    The 1×1 branch is there where the kernel is larger, that of the input where the shape stays. A depth-wise
    convolution's 1×1 branch is depth-wise too.

    Args:
        channels, out: of the input and the output.
        kernel_size, stride, groups: of the convolution.

    Shapes: (batch, channels, height, width) to (batch, out, ⌈height / stride⌉, ⌈width / stride⌉).
    """

    def __init__(self, channels: int, out: int, kernel_size: int = 1, *, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = ConvBN(channels, out, kernel_size, stride=stride, groups=groups)
        self.point = ConvBN(channels, out, stride=stride, groups=groups) if kernel_size > 1 else None
        self.same = nn.BatchNorm2d(channels) if stride == 1 and channels == out else None

    def forward(self, x: Maps) -> Float[Tensor, "batch out _ _"]:
        y = self.conv(x)
        if self.point is not None:
            y = y + self.point(x)
        if self.same is not None:
            y = y + self.same(x)
        return y.relu()

    def fused(self) -> nn.Module:
        """One convolution and the ReLU: the branches' filters, each at the centre, times their norms' scales."""
        conv = self.conv.conv
        merged = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            (conv.stride[0], conv.stride[1]),
            padding=(conv.kernel_size[0] // 2, conv.kernel_size[1] // 2),
            groups=conv.groups,
        ).to(conv.weight)
        each = conv.in_channels // conv.groups
        middle = conv.kernel_size[0] // 2
        kernel, bias = torch.zeros_like(conv.weight), conv.weight.new_zeros(conv.out_channels)
        with torch.no_grad():
            for norm, weight in self._branches(each):
                variance, mean = norm.running_var, norm.running_mean
                if variance is None or mean is None:
                    raise ValueError("a batch norm without running statistics cannot be folded")
                scale = norm.weight * (variance + norm.eps).rsqrt()
                part = weight * scale[:, None, None, None]
                if part.shape[-1] == kernel.shape[-1]:
                    kernel += part
                else:
                    kernel[:, :, middle, middle] += part[:, :, 0, 0]
                bias += norm.bias - mean * scale
            merged.weight.copy_(kernel)
            if merged.bias is not None:
                merged.bias.copy_(bias)
        return nn.Sequential(merged, nn.ReLU())

    def _branches(self, each: int) -> list[tuple[nn.BatchNorm2d, Tensor]]:
        """The norms and the filters before them."""
        branches = [(self.conv.norm, self.conv.conv.weight)]
        if self.point is not None:
            branches.append((self.point.norm, self.point.conv.weight))
        if self.same is not None:
            channels = self.same.num_features
            identity = torch.zeros(channels, each, 1, 1).to(self.conv.conv.weight)
            identity[torch.arange(channels), torch.arange(channels) % each] = 1
            branches.append((self.same, identity))
        return branches


class MobileOne(nn.Sequential):
    """MobileOne-S1: 4,764,840 parameters at width 1 for 1,000 classes once its branches are merged.

    Args:
        num_classes, in_channels: of the output and of the image.
        width: by which all channels are multiplied.
        stride: by how much smaller the stem's stride of 2 is: 1 or 2.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes).
    """

    def __init__(self, *, num_classes: int = 1000, in_channels: int = 3, width: float | int = 1.0, stride: int = 1):
        check_whole(num_classes=num_classes, in_channels=in_channels, stride=stride)
        check_finite(width=width)
        channels = scaled(64, width)
        layers: list[nn.Module] = [ManyBranches(in_channels, channels, 3, stride=2 // stride)]
        for out, depth in ((96, 2), (192, 8), (512, 10), (1280, 1)):
            for position in range(depth):
                depthwise = {"stride": 2 if position == 0 else 1, "groups": channels}
                layers += [
                    ManyBranches(channels, channels, 3, **depthwise),
                    ManyBranches(channels, scaled(out, width)),
                ]
                channels = scaled(out, width)
        super().__init__(*layers, Pooled(), nn.Linear(channels, num_classes))


# EfficientViT (Liu et al., 2023, arXiv:2305.07027)


class CascadedAttention(nn.Module):
    """Cascaded group attention within windows (section 3.1): head i attends on its own share of the channels.

        X̃_1 = X_1,  X̃_i = X_i + Y_{i−1},  Y_i = softmax(Q_i K_iᵀ / √d + b_i) V_i,  Y = BN(conv1×1(ReLU([Y_1 … Y_h])))

    Q_i, K_i and V_i are of BN(conv1×1(X̃_i)), and Q_i passes a depth-wise convolution. b_i is a number for each distance
    of two places, whatever its sign.

    Args:
        channels: C, a multiple of `heads`.
        window: places a side of a window.
        heads: h.
        qk_dim: d.
        kernel_size: of the queries' convolution.

    Shapes: (batch, channels, height, width), multiples of `window`, to the same.
    """

    offsets: Tensor

    def __init__(self, channels: int, window: int, *, heads: int = 4, qk_dim: int = 16, kernel_size: int = 5):
        check_whole(channels=channels, window=window, heads=heads, qk_dim=qk_dim)
        if channels % heads:
            raise ValueError(f"heads must divide the {channels} channels, got {heads}")
        super().__init__()
        self.window, self.heads, self.sizes = window, heads, (qk_dim, qk_dim, channels // heads)
        share = channels // heads
        self.qkv = nn.ModuleList(ConvBN(share, sum(self.sizes)) for _ in range(heads))
        self.queries = nn.ModuleList(ConvBN(qk_dim, qk_dim, kernel_size, groups=qk_dim) for _ in range(heads))
        self.bias = nn.Parameter(torch.zeros(heads, window * window))
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        apart = (place[:, None] - place[None]).abs()
        self.register_buffer("offsets", apart[..., 0] * window + apart[..., 1], persistent=False)
        self.project = nn.Sequential(nn.ReLU(), ConvBN(channels, channels, scale=0.0))

    def forward(self, x: Maps) -> Maps:
        batch, channels, height, width = x.shape
        w = self.window
        if height % w or width % w:
            raise ValueError(f"height and width must be multiples of {w}, got {height}×{width}")
        rows, columns = height // w, width // w
        cut = x.reshape(batch, channels, rows, w, columns, w).permute(0, 2, 4, 1, 3, 5)
        shares = cut.reshape(batch * rows * columns, channels, w, w).chunk(self.heads, dim=1)
        bias = self.bias[:, self.offsets]
        outs: list[Tensor] = []
        for index, (qkv, queries) in enumerate(zip(self.qkv, self.queries, strict=True)):
            share = shares[index] + outs[-1] if outs else shares[index]
            q, k, v = qkv(share).split(self.sizes, dim=1)
            q = queries(q).flatten(2) * self.sizes[0] ** -0.5
            scores = (q.transpose(1, 2) @ k.flatten(2) + bias[index]).softmax(dim=-1)
            outs.append((v.flatten(2) @ scores.transpose(1, 2)).view(share.shape))
        y = self.project(torch.cat(outs, dim=1))
        whole = y.reshape(batch, rows, columns, channels, w, w).permute(0, 3, 1, 4, 2, 5)
        return whole.reshape(batch, channels, height, width)


class SandwichBlock(nn.Sequential):
    """Depth-wise convolution, feed-forward, cascaded attention, depth-wise convolution, feed-forward; each a residual.

    Args:
        channels, window: as in `CascadedAttention`.
    """

    def __init__(self, channels: int, window: int):
        super().__init__(*self._local(channels), Residual(CascadedAttention(channels, window)), *self._local(channels))

    @staticmethod
    def _local(channels: int) -> tuple[nn.Module, nn.Module]:
        return Residual(ConvBN(channels, channels, 3, groups=channels, scale=0.0)), Residual(FeedForward(channels))


class EfficientViT(nn.Module):
    """EfficientViT-M0: 2,349,436 parameters with the published windows and 1,000 classes, at width 1.

    Stem and downsampling are those that SHViT took over from it.

    Args:
        num_classes, in_channels: of the output and of the image.
        width: by which 64, 128 and 192 channels are multiplied.
        stride: by how much smaller the stem's stride of 16 is: a power of two up to 8.
        windows: places a side of each stage's windows; the published ones are 7, 7 and 4 for images of 224 pixels.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes).
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float | int = 1.0,
        stride: int = 1,
        windows: Sequence[int] = (7, 7, 4),
    ):
        check_whole(num_classes=num_classes, in_channels=in_channels, stride=stride)
        check_finite(width=width)
        super().__init__()
        widths = [scaled(channels, width, step=8) for channels in (64, 128, 192)]
        steps = (16 // stride).bit_length() - 1
        channels = [in_channels, *(widths[0] >> step for step in reversed(range(steps)))]
        self.stem = nn.Sequential()
        for i in range(steps):
            self.stem.append(ConvBN(channels[i], channels[i + 1], 3, stride=2))
            if i + 1 < steps:
                self.stem.append(nn.ReLU())
        self.stages = nn.Sequential()
        for i, (channel, depth, window) in enumerate(zip(widths, (1, 2, 3), windows, strict=True)):
            if i:
                self.stages.append(Downsampling(widths[i - 1], channel))
            self.stages.extend(SandwichBlock(channel, window) for _ in range(depth))
        self.head = nn.Sequential(Pooled(), nn.BatchNorm1d(widths[-1]), nn.Linear(widths[-1], num_classes))

    def forward(self, x: Image) -> Logits:
        return self.head(self.stages(self.stem(x)))
