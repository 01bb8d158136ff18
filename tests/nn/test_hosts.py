"""The convolutional hosts, without a gate and with one."""

import pytest
import torch
from torch import nn

from provenn.nn.channel_gates import CBAM, SqueezeExcitation
from provenn.nn.mobilenet import MobileNetV2
from provenn.nn.resnet import BasicBlock, ResNet, resnet18, resnet20, resnet34, resnet50, resnet101, resnet152


def parameters(build, **options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(**options).parameters())


@pytest.mark.parametrize(
    "build, count",
    [
        (resnet18, 11_689_512),
        (resnet34, 21_797_672),
        (resnet50, 25_557_032),
        (resnet101, 44_549_160),
        (resnet152, 60_192_808),
        (MobileNetV2, 3_504_872),
    ],
)
def test_counts_without_a_gate(build, count):
    assert parameters(build) == count


@pytest.mark.parametrize("build, count", [(resnet50, 28_071_976), (resnet101, 49_292_328)])
def test_counts_with_squeeze_excitation(build, count):
    assert parameters(build, gate=SqueezeExcitation) == count


@pytest.mark.parametrize("build", [resnet18, resnet50, MobileNetV2])
def test_odd_images_of_other_channels(build):
    model = build(num_classes=7, in_channels=2, gate=lambda c: CBAM(c)).eval()
    assert model(torch.randn(1, 2, 65, 47)).shape == (1, 7)


def test_stages_halve_the_map():
    model = resnet20(in_channels=1)
    assert [tuple(m.shape[1:]) for m in model.features(torch.randn(2, 1, 8, 8))] == [(16, 8, 8), (32, 4, 4), (64, 2, 2)]
    big = resnet50().eval()
    assert [m.shape[-1] for m in big.features(torch.randn(1, 3, 64, 64))] == [16, 8, 4, 2]


def test_the_gate_closes_the_branch_before_the_addition():
    class Nought(nn.Module):
        def forward(self, x):
            return x * 0

    block = BasicBlock(4, 4, gate=lambda channels: Nought())
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x.relu())


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="got 3 and 4"):
        ResNet(BasicBlock, (1, 1, 1))
    with pytest.raises(ValueError, match="got 'large'"):
        ResNet(BasicBlock, (1,), widths=(8,), stem="large")
