"""Segmentation heads on a backbone."""

import pytest
import torch
from torch import nn

from provenn.nn.resnet import BasicBlock, ResNet
from provenn.nn.segmentation import HEADS, Segmenter, resize


def backbone():
    return ResNet(BasicBlock, (1, 1, 1, 1), widths=(4, 6, 8, 10), num_classes=2)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_gives_logits_of_images_of_any_size(head):
    torch.manual_seed(0)
    model = Segmenter(backbone(), 5, head, dim=8).eval()
    for height, width in ((64, 96), (61, 37)):
        stride = 4 if head in ("semantic_fpn", "segformer") else 32
        assert model(torch.randn(2, 3, height, width)).shape == (2, 5, -(-height // stride), -(-width // stride))


@pytest.mark.parametrize("head", HEADS)
def test_every_map_that_a_head_reads_reaches_its_logits(head):
    torch.manual_seed(0)
    model = Segmenter(backbone(), 3, head, dim=8).eval()
    maps = [m.detach().requires_grad_() for m in model.backbone.features(torch.randn(2, 3, 64, 64))]
    model.head(maps).square().sum().backward()
    reached = [m.grad is not None and bool(m.grad.any()) for m in maps]
    assert reached == ([True] * 4 if head in ("semantic_fpn", "segformer") else [False, False, False, True])


def test_the_sum_of_levels_is_the_papers():
    """Level i is convolved and doubled i times, until it is as fine as the finest; the finest is convolved once."""
    torch.manual_seed(0)
    head = Segmenter(backbone(), 3, dim=8).head.eval()
    maps = [torch.randn(1, width, 16 // 2**i, 24 // 2**i) for i, width in enumerate((4, 6, 8, 10))]
    double = nn.Upsample(scale_factor=2, mode="bilinear")
    levels = head.pyramid(maps)
    total = head.branches[0][0](levels[0])
    for i in (1, 2, 3):
        assert len(head.branches[i]) == i
        x = levels[i]
        for convolve in head.branches[i]:
            x = double(convolve(x))
        total = total + x
    torch.testing.assert_close(head(maps), head.classify(total))


def test_deeplab_looks_as_far_as_its_dilations_and_pspnet_everywhere():
    torch.manual_seed(0)
    x = torch.randn(1, 10, 15, 15, requires_grad=True)
    head = HEADS["deeplabv3"]((10,), (32,), 3, dim=4, dilations=(2, 3, 4)).eval()
    nn.init.zeros_(head.whole[0].weight)  # the mean sees everything
    head([x])[0, 0, 7, 7].backward()
    assert not x.grad[..., :2, :].any() and x.grad[..., 2, :].any()  # 4 of the dilation and 1 of the last convolution
    x.grad = None
    HEADS["pspnet"]((10,), (32,), 3, dim=4).eval()([x])[0, 0, 7, 7].backward()
    assert x.grad[0].abs().sum(0).gt(0).all()


def test_resizing_keeps_corners_unaligned():
    assert resize(torch.tensor([[[[0.0, 1.0]]]]), (1, 4)).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "unet"}, "head must be one of"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"backbone": nn.Conv2d(3, 3, 1)}, "Conv2d gives no pyramid"),
    ],
)
def test_bad_segmenters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(**{"backbone": backbone(), "num_classes": 2, **arguments})
