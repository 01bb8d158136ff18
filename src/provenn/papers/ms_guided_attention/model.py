"""The multi-scale guided attention network for medical images (Sinha and Dolz, 2020, arXiv:1906.02849)."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_whole
from provenn.nn.padding import mirror_pad
from provenn.nn.resnet import BasicBlock, Bottleneck, Gate, ResNet
from provenn.nn.segmentation import resize
from provenn.ops.autograd import at_least_single
from provenn.papers.ms_guided_attention.layers import (
    CAMS,
    Cam,
    Guided,
    GuidedAttention,
    SemanticModule,
    conv_bn_prelu,
)

IGNORED = 255  # of a mask: not judged
Backbone = Literal["resnext101_32x4d", "resnext101_32x8d", "resnet101", "small"]


class ResNeXtBottleneck(Bottleneck):
    """A bottleneck whose 3×3 convolution has 32 groups (Xie et al., 2017, arXiv:1611.05431): 4 channels each."""

    groups, group_width = 32, 4

    def __init__(self, channels: int, width: int, stride: int = 1, gate: Gate | None = None):
        super().__init__(channels, width, stride, gate)
        inner = width * self.groups * self.group_width // 64
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=self.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width * self.expansion, 1, bias=False)


class WideResNeXtBottleneck(ResNeXtBottleneck):
    """The same with 8 channels a group."""

    group_width = 8


DEEP = {"resnext101_32x4d": ResNeXtBottleneck, "resnext101_32x8d": WideResNeXtBottleneck, "resnet101": Bottleneck}
BACKBONES = (*DEEP, "small")


def make_backbone(name: str, in_channels: int) -> ResNet:
    """A trunk of four stages: of 101 layers from 1/4 on, or "small" with one basic block a stage from 1/2 on."""
    if name == "small":
        trunk = ResNet(
            BasicBlock, (1, 1, 1, 1), widths=(16, 32, 64, 128), stem="small", num_classes=0, in_channels=in_channels
        )
        trunk.conv1 = nn.Conv2d(in_channels, 16, 3, stride=2, padding=1, bias=False)
        trunk.strides = [2, 4, 8, 16]
        return trunk
    return ResNet(DEEP[name], (3, 4, 23, 3), num_classes=0, in_channels=in_channels)


class Outputs(NamedTuple):
    """What training looks at.

    Args:
        logits: each prediction that is supervised, (batch, classes, height, width).
        guided: for each step a `Guided` of each scale, from fine to coarse.
    """

    logits: list[Tensor]
    guided: list[list[Guided]]


class MultiScaleTrunk(nn.Module):
    """A trunk whose four stages are brought to C channels and the finest size, and fused: F′_s and F_MS.

    Args:
        in_channels, backbone, dim: as in `GuidedAttentionNet`.
    """

    def __init__(self, in_channels: int, backbone: Backbone, dim: int):
        check_whole(in_channels=in_channels, dim=dim)
        for name, value in (("in_channels", in_channels), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        super().__init__()
        self.in_channels = in_channels
        self.trunk = make_backbone(backbone, in_channels)
        self.multiple = 2 * self.trunk.strides[0]
        self.down = nn.ModuleList(conv_bn_prelu(width, dim, 1) for width in self.trunk.widths)
        self.fuse = nn.Sequential(
            conv_bn_prelu(4 * dim, dim, 3), conv_bn_prelu(dim, dim, 3), conv_bn_prelu(dim, dim, 1)
        )

    def encoded(self, x: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The trunk's map of each stage, from fine to coarse."""
        if x.shape[1] != self.in_channels:
            raise ValueError(f"expected images of {self.in_channels} channels, got {x.shape[1]}")
        # Written as a product, which a tracer of open sizes can see to be a multiple.
        bottom, right = (((side - 1) // self.multiple + 1) * self.multiple - side for side in x.shape[2:])
        return self.trunk.features(mirror_pad(x, bottom, right))

    def scales(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """F′ of each scale from fine to coarse, and F_MS."""
        narrow = [down(part) for down, part in zip(self.down, maps, strict=True)]
        features = [narrow[0], *(resize(part, narrow[0].shape[2:]) for part in narrow[1:])]
        return features, self.fuse(torch.cat(features[::-1], 1))

    def enlarged(self, part: Tensor, size: Sequence[int]) -> Tensor:
        """A map of the finest stage in the size of the image."""
        stride = self.trunk.strides[0]
        height, width = (side * stride for side in part.shape[2:])
        return resize(part, (height, width))[..., : size[0], : size[1]]


class GuidedAttentionNet(MultiScaleTrunk):
    """ResNeXt, four scales, and steps of guided attention at each.

    F′_s is stage s brought to C channels and the finest size. F_MS fuses the four. Step 1 looks at concat(F′_s, F_MS),
    step m at concat(F′_s, A_(m−1) ⊙ F_MS). Predictions are P1_s from F′_s and P_s from the last A; the answer is the
    mean over the scales of the latter.

    Args:
        num_classes: K, background included.
        in_channels: of the images.
        backbone: "resnext101_32x4d" fits the paper's counts, "resnext101_32x8d" is the code's, "resnet101" the text's,
            "small" is ours.
        dim: C, channels of every scale; 64.
        steps: M, how many attention modules are stacked; 2.
        guided: whether semantic modules guide the attention.
        parts: which attention modules there are, see `GuidedAttention`; empty for none.
        cam: form of channel attention, see `ChannelAttention`.
        share_semantic_conv: one convolution after the semantic module for all scales (the paper's counts), or one for
            each (the code).
        semantic_widths: of the semantic module; four and eight times C by default.
        deep_supervision: whether the predictions before attention, and those of inner steps from the second on, are
            supervised too.
        predict: "mean" over the four scales as in the code, or "finest" as in figure 1.
        weights: α, β and γ of the loss: cross-entropy, agreement of latents, reconstruction.
        reduction: of the two squared terms: "mean" as in the code, or "sum" as equations 6 and 7 are printed.
        fused: False forms the map of position attention's weights, see `PositionAttention`.
        between: put the mean squared difference of each attention module's input and output in the place of the
            semantic modules' terms, as in the ablation called "dist" (which pair is meant is inferred).

    Shapes: (batch, in_channels, height, width) to (batch, num_classes, height, width), of any size above twice the
    finest stride. Sides that are no multiple of it are continued by their mirror image, and cut again.

    Raises:
        ValueError: a size below 1, an unknown option, or images that are too small for the semantic modules.
    """

    def __init__(
        self,
        num_classes: int = 5,
        in_channels: int = 1,
        *,
        backbone: Backbone = "resnext101_32x4d",
        dim: int = 64,
        steps: int = 2,
        guided: bool = True,
        parts: Sequence[str] = ("position", "channel"),
        cam: Cam = "softmax",
        share_semantic_conv: bool = True,
        semantic_widths: Sequence[int] | None = None,
        deep_supervision: bool = True,
        predict: Literal["mean", "finest"] = "mean",
        weights: Sequence[float | int] = (1.0, 0.25, 0.1),
        reduction: Literal["mean", "sum"] = "mean",
        between: bool = False,
        fused: bool = True,
    ):
        check_whole(num_classes=num_classes, steps=steps)
        if len(weights) != 3 or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(f"weights must be three finite numbers, none negative, got {weights}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not 1 <= steps <= 8:
            raise ValueError(f"steps must be from 1 to 8, got {steps}")
        for name, known, chosen in (
            ("cam", CAMS, cam),
            ("predict", ("mean", "finest"), predict),
            ("reduction", ("mean", "sum"), reduction),
        ):
            if chosen not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {chosen!r}")
        if guided and between:
            raise ValueError("between is for a network without semantic modules: give guided=False too")
        super().__init__(in_channels, backbone, dim)
        self.steps, self.between = steps, between
        self.weights, self.reduction, self.predict = weights, reduction, predict
        self.deep_supervision = deep_supervision
        scales = range(4)
        self.attention = nn.ModuleList(
            nn.ModuleList(GuidedAttention(dim, parts=tuple(parts), cam=cam, fused=fused) for _ in scales)
            for _ in range(steps)
        )
        convs = 1 if share_semantic_conv else 4
        self.semantic = nn.ModuleList(SemanticModule(2 * dim, semantic_widths) for _ in range(steps if guided else 0))
        self.semantic_conv = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(2 * dim, dim, 3, padding=1) for _ in range(convs))
            for _ in range(steps if guided else 0)
        )
        self.classify_features = nn.ModuleList(
            nn.Conv2d(dim, num_classes, 1) for _ in scales if deep_supervision
        )  # P1, of F′
        inner = range(1 if steps == 1 or deep_supervision else steps, steps + 1)
        self.supervised = [step for step in inner if step > 1 or steps == 1] if deep_supervision else [steps]
        self.classify = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(dim, num_classes, 1) for _ in scales) for _ in self.supervised
        )
        self.apply(_xavier)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes height width"]:
        return self.decoded(self.encoded(x), x.shape[2:])

    def encoded(self, x: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The trunk's map of each stage, from fine to coarse."""
        if len(self.semantic) and not torch.compiler.is_compiling() and min(x.shape[2:]) <= self.multiple:
            raise ValueError(
                f"semantic modules halve maps twice: expected sides of more than {self.multiple} pixels, got "
                f"{x.shape[2]}×{x.shape[3]}"
            )
        return super().encoded(x)

    def decoded(self, levels: list[Tensor], size: Sequence[int]) -> Float[Tensor, "batch classes height width"]:
        """The logits from the trunk's map of each stage."""
        features, fused = self.scales(levels)
        last = self._guide(features, fused)[-1]
        heads: Any = self.classify[-1]
        if self.predict == "finest":
            return self.enlarged(heads[0](last[0].attention), size)
        total = torch.zeros((), dtype=fused.dtype, device=fused.device)
        for head, part in zip(heads, last, strict=True):
            total = total + head(part.attention)
        return self.enlarged(total / 4, size)  # a mean of enlarged maps is the enlarged mean

    def outputs(self, x: Float[Tensor, "batch channels height width"]) -> Outputs:
        """All that the loss looks at."""
        size = x.shape[2:]
        features, fused = self.scales(self.encoded(x))
        guided = self._guide(features, fused, around=self.between)
        logits = [head(feature) for head, feature in zip(self.classify_features, features)]
        for step, heads in zip(self.supervised, self.classify, strict=True):
            each: Any = heads  # a ModuleList hides its kind
            logits += [head(part.attention) for head, part in zip(each, guided[step - 1], strict=True)]
        return Outputs([self.enlarged(part, size) for part in logits], guided)

    def training_loss(self, batch: Any) -> Float[Tensor, ""]:
        """α Σ cross-entropy + β Σ D(z_m, z_(m+1)) + γ Σ D(u, r) (equations 6 to 9); no gradient is stopped.

        Args:
            batch: images and masks of class numbers, 255 where nothing is judged.
        """
        images, masks = batch
        outputs = self.outputs(images)
        terms = self.terms(outputs)
        alpha, beta, gamma = self.weights
        entropy = sum(cross_entropy(logits, masks.long()) for logits in outputs.logits)
        return alpha * entropy + beta * terms["latent"] + gamma * terms["reconstruction"]

    def terms(self, outputs: Outputs) -> dict[str, Float[Tensor, ""]]:
        """The sums of the squared terms, by name: "latent" of neighbouring steps, and "reconstruction"."""
        zero = at_least_single(outputs.logits[0].new_zeros(()))
        latent, reconstruction = zero, zero
        for step, scales in enumerate(outputs.guided):
            for scale, part in enumerate(scales):
                after = outputs.guided[step + 1][scale] if step + 1 < len(outputs.guided) else None
                if after is not None and part.latent is not None and after.latent is not None:
                    latent = latent + self._distance(part.latent, after.latent)
                if part.reconstruction is not None:
                    reconstruction = reconstruction + self._distance(part.inputs, part.reconstruction)
                for entered, left in part.around:
                    reconstruction = reconstruction + self._distance(entered, left)
        return {"latent": latent, "reconstruction": reconstruction}

    def attention_maps(self, x: Float[Tensor, "batch channels height width"]) -> list[list[Float[Tensor, "batch _ _"]]]:
        """For each step and scale, from fine to coarse: the mean size of A over its channels, as fine as the input."""
        guided = self._guide(*self.scales(self.encoded(x)))
        return [
            [self.enlarged(part.attention.abs().mean(1, keepdim=True), x.shape[2:])[:, 0] for part in scales]
            for scales in guided
        ]

    def _guide(self, features: Sequence[Tensor], fused: Tensor, *, around: bool = False) -> list[list[Guided]]:
        """All steps at all scales."""
        steps: list[list[Guided]] = []
        for step in range(self.steps):
            modules: Any = self.attention[step]  # a ModuleList hides its kind
            scales: list[Guided] = []
            for scale, (attend, feature) in enumerate(zip(modules, features, strict=True)):
                semantic: Any = self.semantic[step] if len(self.semantic) else None
                convs: Any = self.semantic_conv[step] if len(self.semantic) else None
                conv = None if convs is None else convs[scale % len(convs)]
                guide = fused if not steps else steps[-1][scale].attention * fused
                scales.append(attend(feature, guide, semantic, conv, around=around))
            steps.append(scales)
        return steps

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        if not a.numel():  # a mean over no examples would be 0 / 0
            return at_least_single(a - b).sum()
        return F.mse_loss(at_least_single(a), at_least_single(b), reduction=self.reduction)


def cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """The mean over the pixels that are judged; 0 of a batch of which nothing is."""
    total = F.cross_entropy(at_least_single(logits), masks, ignore_index=IGNORED, reduction="sum")
    # Not "mean": a batch of which nothing is judged would give 0 / 0.
    return total / (masks != IGNORED).sum().clamp_min(1)


def _xavier(module: nn.Module) -> None:
    """The authors' initial weights: nothing is pre-trained."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_normal_(module.weight)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class DeepAttentiveFeatures(MultiScaleTrunk):
    """The paper's baseline DAF (Wang et al., 2018): the same scales, each with a soft map of weights of its own.

    A_s = softmax over channels of convolutions of concat(F′_s, F_MS); the refined map is convolutions of
    concat(F′_s, A_s ⊙ F_MS). Its parts are read off the counts of Table VIII: 43,482,179 parameters.

    Args:
        num_classes, in_channels, backbone, dim: as in `GuidedAttentionNet`.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes, height, width), of any size.
    """

    def __init__(
        self,
        num_classes: int = 5,
        in_channels: int = 1,
        *,
        backbone: Backbone = "resnext101_32x4d",
        dim: int = 64,
    ):
        check_whole(num_classes=num_classes)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        super().__init__(in_channels, backbone, dim)
        self.classify_features = nn.ModuleList(nn.Conv2d(dim, num_classes, 1) for _ in range(4))
        self.classify = nn.ModuleList(nn.Conv2d(dim, num_classes, 1) for _ in range(4))
        self.weigh = nn.ModuleList(
            nn.Sequential(conv_bn_prelu(2 * dim, dim, 3), conv_bn_prelu(dim, dim, 3), nn.Conv2d(dim, dim, 1))
            for _ in range(4)
        )
        self.refine = nn.ModuleList(
            nn.Sequential(conv_bn_prelu(2 * dim, dim, 3), conv_bn_prelu(dim, dim, 3), conv_bn_prelu(dim, dim, 1))
            for _ in range(4)
        )
        self.apply(_xavier)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes height width"]:
        logits = self._logits(x)[4:]
        return torch.stack(logits).mean(0)

    def training_loss(self, batch: Any) -> Float[Tensor, ""]:
        """The sum of the cross-entropies of all eight predictions."""
        images, masks = batch
        losses = [cross_entropy(logits, masks.long()) for logits in self._logits(images)]
        return torch.stack(losses).sum()

    def _logits(self, x: Tensor) -> list[Tensor]:
        features, fused = self.scales(self.encoded(x))
        logits = [head(feature) for head, feature in zip(self.classify_features, features, strict=True)]
        for feature, weigh, refine, head in zip(features, self.weigh, self.refine, self.classify, strict=True):
            weights = weigh(torch.cat([feature, fused], 1)).softmax(1)
            logits.append(head(refine(torch.cat([feature, weights * fused], 1))))
        return [self.enlarged(part, x.shape[2:]) for part in logits]
