"""ECA-Net (Wang et al., 2020, arXiv:1910.03151): networks with the ECA module in every residual branch."""

from collections.abc import Iterable, Sequence

from torch import nn

from provenn.nn import resnet
from provenn.nn.arguments import check_whole
from provenn.nn.channel_gates import Gate
from provenn.nn.detection import FasterRCNN, RetinaNet
from provenn.nn.mobilenet import SETTINGS, InvertedResidual, MobileNetV2
from provenn.nn.resnet import BasicBlock, Bottleneck, ResNet
from provenn.nn.segmentation import Segmenter
from provenn.papers.eca_net.layers import EfficientChannelAttention, adaptive_kernel_size

KernelSize = int | str | Sequence[int]
"""One k for all blocks, "adaptive" for ψ of each block's width, or one k for each width: "3557", or (3, 5, 5, 7)."""


def kernel_sizes(policy: KernelSize, widths: Iterable[int]) -> dict[int, int]:
    """The kernel size that a policy gives to blocks of each width.

    Args:
        policy: a number, "adaptive", or a digit (or number) for each distinct width, in the order of the network.
        widths: the channels that the network's blocks put out; repeated ones count once.

    Raises:
        ValueError: when the policy is of another form, or names another number of widths.

    >>> kernel_sizes("3557", (256, 512, 1024, 2048))
    {256: 3, 512: 5, 1024: 5, 2048: 7}
    >>> kernel_sizes("adaptive", (256, 512, 1024, 2048))
    {256: 5, 512: 5, 1024: 5, 2048: 7}
    """
    distinct = list(dict.fromkeys(widths))
    if policy == "adaptive":
        return {width: adaptive_kernel_size(width) for width in distinct}
    if isinstance(policy, int):
        return dict.fromkeys(distinct, policy)
    if isinstance(policy, str) and not policy.isdecimal():
        raise ValueError(f"kernel_size must be a number, 'adaptive' or a digit for each width, got {policy!r}")
    sizes = [int(size) for size in policy]
    if len(sizes) != len(distinct):
        raise ValueError(
            f"kernel_size {policy!r} names {len(sizes)} widths, the network has {len(distinct)}: "
            + ", ".join(map(str, distinct))
        )
    return dict(zip(distinct, sizes, strict=True))


def _gate(policy: KernelSize, widths: Iterable[int]) -> Gate:
    sizes = kernel_sizes(policy, widths)
    return lambda channels: EfficientChannelAttention(channels, sizes[channels])


def eca_resnet18(*, num_classes: int = 1000, in_channels: int = 3, kernel_size: KernelSize = "3577") -> ResNet:
    """ECA-Net18. `kernel_size` defaults to the code of the released model."""
    gate = _gate(kernel_size, (64, 128, 256, 512))
    return resnet.resnet18(num_classes=num_classes, in_channels=in_channels, gate=gate)


def eca_resnet34(*, num_classes: int = 1000, in_channels: int = 3, kernel_size: KernelSize = "3357") -> ResNet:
    """ECA-Net34. `kernel_size` defaults to the code of the released model."""
    gate = _gate(kernel_size, (64, 128, 256, 512))
    return resnet.resnet34(num_classes=num_classes, in_channels=in_channels, gate=gate)


def eca_resnet50(*, num_classes: int = 1000, in_channels: int = 3, kernel_size: KernelSize = "3557") -> ResNet:
    """ECA-Net50. `kernel_size` defaults to the code of the released model, which has the abstract's 80 weights."""
    gate = _gate(kernel_size, (256, 512, 1024, 2048))
    return resnet.resnet50(num_classes=num_classes, in_channels=in_channels, gate=gate)


def eca_resnet101(*, num_classes: int = 1000, in_channels: int = 3, kernel_size: KernelSize = "3357") -> ResNet:
    """ECA-Net101. `kernel_size` defaults to the code of the released model."""
    gate = _gate(kernel_size, (256, 512, 1024, 2048))
    return resnet.resnet101(num_classes=num_classes, in_channels=in_channels, gate=gate)


def eca_resnet152(*, num_classes: int = 1000, in_channels: int = 3, kernel_size: KernelSize = "3357") -> ResNet:
    """ECA-Net152. `kernel_size` defaults to the code of the released model."""
    gate = _gate(kernel_size, (256, 512, 1024, 2048))
    return resnet.resnet152(num_classes=num_classes, in_channels=in_channels, gate=gate)


def eca_resnet20(*, num_classes: int = 10, in_channels: int = 3, kernel_size: KernelSize = "adaptive") -> ResNet:
    """ECA in the ResNet-20 for images of 8 to 64 pixels. Not a model of the paper: it is what trains in minutes."""
    gate = _gate(kernel_size, (16, 32, 64))
    return resnet.resnet20(num_classes=num_classes, in_channels=in_channels, gate=gate)


def eca_resnet14(*, num_classes: int = 10, in_channels: int = 3, kernel_size: KernelSize = "adaptive") -> ResNet:
    """ECA in two blocks a stage for images of 8 to 64 pixels. Ours: what small backbones are compared by."""
    check_whole(num_classes=num_classes, in_channels=in_channels)
    widths = (16, 32, 64)
    return ResNet(
        BasicBlock,
        (2, 2, 2),
        widths=widths,
        stem="small",
        num_classes=num_classes,
        in_channels=in_channels,
        gate=_gate(kernel_size, widths),
    )


def eca_resnet10_semantic_fpn(
    *, num_classes: int = 5, in_channels: int = 1, kernel_size: KernelSize = "adaptive", dim: int = 32
) -> Segmenter:
    """A narrow ResNet-10 with ECA under the segmentation head of Panoptic FPN. Ours: what trains in minutes."""
    widths = (16, 32, 64, 128)
    gate = _gate(kernel_size, widths)
    backbone = ResNet(BasicBlock, (1, 1, 1, 1), widths=widths, in_channels=in_channels, num_classes=0, gate=gate)
    return Segmenter(backbone, num_classes, "semantic_fpn", dim=dim)


def eca_mobilenet_v2(
    *, num_classes: int = 1000, in_channels: int = 3, kernel_size: KernelSize = "1111333", dropout: float = 0.25
) -> MobileNetV2:
    """ECA-MobileNetV2. `kernel_size` defaults to the released model's: 1 below 96 channels, 3 from there on."""
    gate = _gate(kernel_size, [out for _, out, _, _ in SETTINGS])
    return MobileNetV2(num_classes=num_classes, in_channels=in_channels, gate=gate, dropout=dropout)


def eca_resnet50_retinanet(
    *, num_classes: int = 80, in_channels: int = 3, kernel_size: KernelSize = "3377"
) -> RetinaNet:
    """RetinaNet on ECA-Net50, as in Table 5. `kernel_size` defaults to the code of the released detector."""
    backbone = eca_resnet50(num_classes=0, in_channels=in_channels, kernel_size=kernel_size)
    return RetinaNet(backbone, num_classes=num_classes, matching="mmdetection")


def eca_resnet50_faster_rcnn(*, num_classes: int = 80, in_channels: int = 3, kernel_size: KernelSize = 5) -> FasterRCNN:
    """Faster R-CNN on ECA-Net50, as in Table 5. `kernel_size` defaults to that of the released detector."""
    backbone = eca_resnet50(num_classes=0, in_channels=in_channels, kernel_size=kernel_size)
    return FasterRCNN(backbone, num_classes=num_classes)


def eca_resnet20_retinanet(
    *, num_classes: int = 3, in_channels: int = 3, kernel_size: KernelSize = "adaptive"
) -> RetinaNet:
    """A RetinaNet for pictures of about 100 pixels, on ECA-Net20 with the stem of the large ones.

    Ours: what trains in minutes. Its towers have two convolutions, and group norms since they start from nothing.
    """
    widths = (16, 32, 64)
    gate = _gate(kernel_size, widths)
    backbone = ResNet(BasicBlock, (3, 3, 3), widths=widths, in_channels=in_channels, num_classes=0, gate=gate)
    return RetinaNet(backbone, num_classes=num_classes, dim=64, convs=2, groups=8, finest=4, coarser=1)


def add_eca(model: nn.Module, kernel_size: KernelSize = "adaptive", *, preserve: bool = False) -> dict[str, int]:
    """Insert an ECA module at the end of every residual branch of a ResNet or MobileNetV2 that the user has, in place.

    Knows this library's networks and those of torchvision, timm and Hugging Face transformers. Elsewhere
    `provenn.surgery.insert_after` puts the layer where the user says.

    Args:
        model: the network. New modules take the device and type of the parameters around them.
        kernel_size: the policy, as for the presets; a code has one digit for each distinct width, from the input on.
        preserve: start from filters of zeros and the gate 2σ, so that a trained network still gives its output and
            fine-tuning departs from there. This is ours: with the paper's σ every branch starts near half.

    Returns:
        The name of every module inserted, with its kernel size.

    Raises:
        ValueError: when the model has no residual branch of a known kind, or has ECA already.
    """
    if any(isinstance(module, EfficientChannelAttention) for module in model.modules()):
        raise ValueError("the model has ECA modules already")
    branches = [(name, block, end) for name, block in model.named_modules() if (end := _end_of_branch(block))]
    if not branches:
        raise ValueError(
            f"{type(model).__name__} has no residual branch of a known kind; "
            "provenn.surgery.insert_after(model, pattern, EfficientChannelAttention) inserts where you say"
        )
    widths = [_width(block) for _, block, _ in branches]
    sizes = kernel_sizes(kernel_size, widths)
    inserted = {}
    for (name, block, end), width in zip(branches, widths, strict=True):
        eca = EfficientChannelAttention(width, sizes[width], scale=2.0 if preserve else 1.0)
        if preserve:
            nn.init.zeros_(eca.conv.weight)
        like = next(block.parameters())
        eca.to(device=like.device, dtype=like.dtype).train(block.training)
        old = block.get_submodule(end)
        if isinstance(old, nn.Identity):
            setattr(block, end, eca)
            path = end
        elif isinstance(old, nn.Sequential):
            old.append(eca)
            path = f"{end}.{len(old) - 1}"
        else:
            setattr(block, end, nn.Sequential(old, eca))
            path = f"{end}.1"
        inserted[f"{name}.{path}" if name else path] = sizes[width]
    return inserted


def _end_of_branch(block: nn.Module) -> str | None:
    """Name of the child after which a residual block's branch ends; none where `block` is not a residual block."""
    children = dict(block.named_children())
    if isinstance(block, BasicBlock | Bottleneck | InvertedResidual):
        return "gate" if isinstance(block.gate, nn.Identity) else None
    order = list(children)
    for index in (3, 2):  # torchvision and timm; in pre-activation blocks the norm comes before its convolution
        norm, convs = f"bn{index}", (f"conv{index}", "conv_pwl")
        if norm in children and any(conv in children and order.index(conv) < order.index(norm) for conv in convs):
            return norm
    if hasattr(block, "use_res_connect") and isinstance(children.get("conv"), nn.Sequential):  # torchvision MobileNetV2
        return "conv"
    if "shortcut" in children and isinstance(children.get("layer"), nn.Sequential):  # transformers ResNet
        return "layer"
    if "reduce_1x1" in children:  # transformers MobileNetV2
        return "reduce_1x1"
    return None


def _width(block: nn.Module) -> int:
    """Channels that the block puts out: those of its last norm, be it the branch's or the shortcut's."""
    return [m.num_features for m in block.modules() if isinstance(m, nn.BatchNorm2d)][-1]
