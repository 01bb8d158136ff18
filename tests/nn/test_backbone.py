"""The pyramid of a backbone, and the feature pyramid network on it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from provenn.nn.backbone import FeaturePyramid, check_backbone, crop_features, fix, pad_to_multiple
from provenn.nn.mobilenet import MobileNetV2
from provenn.nn.resnet import resnet18, resnet20, resnet50
from provenn.papers.eca_net import eca_mobilenet_v2
from provenn.papers.moh import MoHViT


def small_vit(**options):
    sizes = {"dims": (12, 24, 24, 24), "heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1), "shared": (1, 2, 1, 1)}
    return MoHViT(**sizes, top_k=(0, 0, 1, 1), size=64, **options)


@pytest.mark.parametrize("build", [resnet18, resnet20, resnet50, MobileNetV2, eca_mobilenet_v2, small_vit])
def test_a_classifier_gives_its_pyramid_at_any_size(build):
    torch.manual_seed(0)
    check_backbone(build(num_classes=5).eval(), 3, [(64, 96), (61, 37), (33, 70)])


@pytest.mark.parametrize("build", [resnet18, MobileNetV2, small_vit])
def test_the_last_map_is_what_the_classifier_reads(build):
    torch.manual_seed(0)
    model, x = build(num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    last = model.features(x)[-1]
    if isinstance(model, MobileNetV2):
        expected = model.classifier(model.layers[-1](last).mean((2, 3)))
    else:
        expected = getattr(model, "fc", getattr(model, "head", None))(last.mean((2, 3)))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("build", [resnet18, MobileNetV2, small_vit])
def test_without_a_classifier_every_parameter_is_of_the_pyramid(build):
    torch.manual_seed(0)
    model, x = build(num_classes=0), torch.randn(2, 3, 64, 64)
    loss = sum(m.square().sum() * torch.rand(()) for m in model.features(x))
    loss.backward()
    left = [name for name, p in model.named_parameters() if p.grad is None]
    assert left == []
    assert model.eval()(x).shape == (2, model.widths[-1])


def test_what_is_no_backbone_is_refused():
    class Short(nn.Module):
        strides, widths = (4, 8), (3, 3)

        def features(self, x):
            return [x[..., ::4, ::4], x[..., ::16, ::16]]

    class Doubled(Short):
        strides = (4, 4)

    class Uneven(Short):
        widths = (3,)

    refused = (Short, ValueError, "features gives"), (Doubled, ValueError, r"strides must grow, got \[4, 4\]")
    refused += ((Uneven, ValueError, "must name the same maps"), (nn.Identity, TypeError, "lacks features"))
    for build, error, message in refused:
        with pytest.raises(error, match=message):
            check_backbone(build())


def test_padding_and_cropping_undo_each_other():
    x = torch.randn(1, 3, 37, 64)
    padded = pad_to_multiple(x, 32)
    assert padded.shape[-2:] == (64, 64) and not padded[..., 37:, :].any()
    maps = [padded[..., ::4, ::4], padded[..., ::8, ::8]]
    assert [m.shape[-2:] for m in crop_features(maps, (4, 8), (37, 64))] == [(10, 16), (5, 8)]


def test_the_pyramid_sums_from_the_top():
    torch.manual_seed(0)
    pyramid = FeaturePyramid((3, 5, 7), (4, 8, 16), 6)
    fine, middle, coarse = torch.randn(2, 3, 9, 11), torch.randn(2, 5, 5, 6), torch.randn(2, 7, 3, 3)
    levels = pyramid([fine, middle, coarse])
    top = pyramid.laterals[2](coarse)
    second = pyramid.laterals[1](middle) + top[:, :, [0, 0, 1, 1, 2]][..., [0, 0, 1, 1, 2, 2]]
    first = pyramid.laterals[0](fine) + F.interpolate(second, size=(9, 11))
    for level, convolve, merged in zip(levels, pyramid.outputs, (first, second, top)):
        torch.testing.assert_close(level, convolve(merged))


@pytest.mark.parametrize(("by", "count"), [("output", 2), ("input", 2), ("pool", 0)])
def test_coarser_levels(by, count):
    torch.manual_seed(0)
    pyramid = FeaturePyramid((3, 5), (8, 16), 6, coarser=2, by=by)
    maps = [torch.randn(1, 3, 16, 24), torch.randn(1, 5, 8, 12)]
    levels = pyramid(maps)
    assert pyramid.strides == [8, 16, 32, 64] and len(pyramid.extra) == count
    assert [tuple(level.shape[-2:]) for level in levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    if by == "pool":
        torch.testing.assert_close(levels[3], levels[1][..., ::4, ::4])
        return
    sixth = pyramid.extra[0](levels[1] if by == "output" else maps[1])
    torch.testing.assert_close(levels[2], sixth)
    torch.testing.assert_close(levels[3], pyramid.extra[1](sixth.relu()))


def test_a_finer_level_comes_of_the_finest_sum():
    torch.manual_seed(0)
    pyramid = FeaturePyramid((3, 5), (16, 32), 6, finer=1)
    maps = [torch.randn(1, 3, 4, 5), torch.randn(1, 5, 2, 3)]
    levels = pyramid(maps)
    assert pyramid.strides == [8, 16, 32]
    merged = pyramid.laterals[0](maps[0]) + F.interpolate(pyramid.laterals[1](maps[1]), size=(4, 5))
    torch.testing.assert_close(levels[0], pyramid.outputs[0](pyramid.upsamplers[0](merged)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (3,)}, "widths and strides must name the same maps"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"by": "stride"}, "by must be"),
    ],
)
def test_bad_pyramids_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FeaturePyramid(**{"widths": (3, 5), "strides": (8, 16), **options})


def test_a_fixed_backbone_keeps_its_statistics_and_its_first_stage():
    torch.manual_seed(0)
    backbone = resnet18(num_classes=0).eval()
    image = torch.randn(2, 3, 64, 64)
    expected = backbone.features(image)
    fix(backbone)
    again = copy.deepcopy(backbone).train()
    before = copy.deepcopy(again.state_dict())
    for x, y in zip(again.features(image), expected, strict=True):  # in training as in eval mode
        torch.testing.assert_close(x, y)
    assert again.state_dict().keys() == before.keys() and again.training
    assert all(torch.equal(x, before[name]) for name, x in again.state_dict().items())
    kept = {name for name, parameter in again.named_parameters() if not parameter.requires_grad}
    assert kept == {name for name, _ in again.named_parameters() if name.startswith(("conv1", "bn1", "layer1"))}
    with pytest.raises(ValueError, match=r"has no map of stride 2, only \[4, 8, 16, 32\]"):
        fix(backbone, stride=2)
