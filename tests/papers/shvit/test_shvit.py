import copy
import math

import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import provenn
from provenn.core.cost import count_parameters, macs
from provenn.nn.backbone import check_backbone
from provenn.nn.detection import pad_batch
from provenn.nn.fusion import fuse
from provenn.papers import shvit
from provenn.papers.shvit import (
    BottleneckAttention,
    DistilledSHViT,
    MultiHeadAttention,
    SHViT,
    SHViTBlock,
    SingleHeadAttention,
    attended_channels,
    detection_neck,
    distillation_loss,
    four_stage_baseline,
    shvit_small,
    studies,
)
from provenn.papers.shvit.layers import ConvBN, Downsampling, FeedForward, PatchMerging, Residual, SqueezeExcite
from provenn.papers.shvit.official import convert
from provenn.tasks import TaskData
from provenn.tasks.image_hosts import BACKBONE

PRESETS = {"s1": 224, "s2": 224, "s3": 224, "s4": 256}


@pytest.fixture
def no_shape_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """With norms that do something: other weights than 0 and 1, and statistics of data."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like)

    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.weight.copy_(0.5 + draw(part.weight))
                part.bias.copy_(draw(part.bias) - 0.5)
                part.running_mean.copy_(draw(part.running_mean) - 0.5)
                part.running_var.copy_(0.5 + draw(part.running_var))
            if isinstance(part, nn.GroupNorm):
                part.weight.copy_(0.5 + draw(part.weight))
                part.bias.copy_(draw(part.bias) - 0.5)
    return module


def on_meta(build, **options) -> nn.Module:
    with torch.device("meta"):
        return build(**options).eval()


def tiny(**options) -> SHViT:
    options = {"widths": (16, 24, 32), "depths": (1, 1, 1), "num_classes": 5, **options}
    return SHViT(**options)


# Single-head attention (equations 2 to 5)


@pytest.mark.parametrize("ratio", [1 / 8, 1 / 4.67, 1.0])
def test_it_is_one_head_on_the_first_channels(ratio):
    torch.manual_seed(0)
    layer = stirred(SingleHeadAttention(32, qk_dim=8, ratio=ratio)).double().eval()
    x = torch.randn(3, 32, 4, 5, dtype=torch.float64)
    p = layer.pdim
    first = x[:, :p]
    mean, var = first.mean((1, 2, 3), keepdim=True), first.var((1, 2, 3), keepdim=True, unbiased=False)
    normed = (first - mean) / (var + 1e-5).sqrt() * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
    kernel, norm = layer.qkv.conv.weight[:, :, 0, 0], layer.qkv.norm
    mapped = torch.einsum("oc,bchw->bohw", kernel, normed)
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    mapped = mapped * scale[:, None, None] + (norm.bias - norm.running_mean * scale)[:, None, None]
    q, k, v = mapped.flatten(2).split([8, 8, p], dim=1)
    scores = torch.einsum("bdi,bdj->bij", q, k) / math.sqrt(8)
    weights = scores.exp() / scores.exp().sum(2, keepdim=True)
    attended = torch.einsum("bij,bcj->bci", weights, v).view_as(first)
    joined = torch.cat([attended, x[:, p:]], 1).clamp_min(0)
    conv, norm = layer.project[1].conv, layer.project[1].norm
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    expected = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], joined) * scale[:, None, None]
    expected = expected + (norm.bias - norm.running_mean * scale)[:, None, None]
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.attention(x), weights, rtol=1e-10, atol=1e-10)


def test_the_other_channels_wait_untouched():
    layer = stirred(SingleHeadAttention(20, pdim=6)).eval()
    joined = []
    layer.project.register_forward_pre_hook(lambda _, inputs: joined.append(inputs[0]))
    x = torch.randn(2, 20, 3, 4)
    layer(x)
    assert torch.equal(joined[0][:, 6:], x[:, 6:])
    assert not torch.isclose(joined[0][:, :6], x[:, :6]).all()
    # What attends is not read from them either.
    changed = x.clone()
    changed[:, 6:] = torch.randn(2, 14, 3, 4)
    layer(changed)
    assert torch.equal(joined[1][:, :6], joined[0][:, :6])


def test_rows_of_attention_sum_to_one_and_have_no_heads():
    layer = stirred(SingleHeadAttention(24))
    attention = layer.eval().attention(torch.randn(3, 24, 4, 6))
    assert attention.shape == (3, 24, 24)
    torch.testing.assert_close(attention.sum(2), torch.ones(3, 24))


def test_alone_it_knows_no_positions_and_a_block_does():
    layer, block = (stirred(m).eval() for m in (SingleHeadAttention(24), SHViTBlock(24, SingleHeadAttention(24))))
    x, order = torch.randn(2, 24, 5, 4), torch.randperm(20, generator=torch.Generator().manual_seed(1))

    def permuted(x):
        return x.flatten(2)[:, :, order].view_as(x)

    torch.testing.assert_close(layer(permuted(x)), permuted(layer(x)), rtol=1e-4, atol=1e-5)
    assert (block(permuted(x)) - permuted(block(x))).abs().max() > 0.1


def test_the_norm_is_of_channels_and_places_together():
    """Not a layer norm of each token, as the text has it: adding a number to one token moves how all are normalised."""
    layer = SingleHeadAttention(12, pdim=12).eval()
    x = torch.randn(1, 12, 2, 2)
    y = layer.norm(x)
    assert abs(y.mean()) < 1e-6 and abs(y.var(unbiased=False) - 1) < 1e-4
    assert y.mean(1).abs().max() > 0.05
    changed = x.clone()
    changed[..., 0, 0] += 3
    assert not torch.isclose(layer.norm(changed)[..., 1, 1], y[..., 1, 1]).any()


def test_a_fresh_one_gives_nothing_and_can_learn():
    layer = SingleHeadAttention(24)
    x = torch.randn(3, 24, 4, 4, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, torch.zeros_like(y))
    y.square().sum().add((y * torch.randn_like(y)).sum()).backward()
    last = layer.project[1].norm
    assert last.weight.grad.abs().min() > 0
    assert torch.equal(x.grad, torch.zeros_like(x))
    nn.init.ones_(last.weight)
    (layer(x) * torch.randn_like(x)).sum().backward()
    assert (x.grad.flatten(2).abs().amax((0, 2)) > 0).all(), "attended and waiting channels both get a gradient"


def test_waiting_channels_learn_through_the_projection_alone():
    layer = stirred(SingleHeadAttention(20, pdim=6)).eval()
    nn.init.zeros_(layer.project[1].conv.weight[:, 6:])
    x = torch.randn(2, 20, 3, 4, requires_grad=True)
    (layer(x) * torch.randn(2, 20, 3, 4)).sum().backward()
    assert x.grad[:, :6].abs().max() > 0 and torch.equal(x.grad[:, 6:], torch.zeros(2, 14, 3, 4))


def test_training_cannot_move_the_bias_of_the_first_norm():
    """It adds one number a channel to what the norm after the convolution centres."""
    torch.manual_seed(0)
    layer = stirred(SingleHeadAttention(24)).double()
    x = torch.randn(4, 24, 4, 4, dtype=torch.float64)
    for training in (True, False):
        layer.train(training).zero_grad()
        (layer(x) * torch.randn_like(x)).sum().backward()
        size = layer.norm.bias.grad.abs().max() / layer.norm.weight.grad.abs().max()
        assert (size < 1e-10) == training


@pytest.mark.parametrize("dim, side", [(96, 8), (336, 16)])
def test_multiply_adds_follow_the_formulas(dim, side):
    tokens = side * side
    x = torch.empty(1, dim, side, side, device="meta")
    single, several = on_meta(SingleHeadAttention, dim=dim), on_meta(MultiHeadAttention, dim=dim)
    p = single.pdim
    expected = tokens * p * (32 + p) + tokens**2 * (16 + p) + tokens * dim**2
    assert macs(lambda: single(x)) == expected
    assert macs(lambda: several(x)) == 4 * tokens * dim**2 + 2 * tokens**2 * dim
    assert macs(lambda: several(x)) > 3 * expected


def test_shares_of_the_channels():
    """The nearest number is the paper's in seven of its eight stages that attend: 320 channels have 68, not 69."""
    widths, pdims = (224, 320, 308, 448, 352, 448, 336, 448), (48, 68, 66, 96, 75, 96, 72, 96)
    assert [w for w, p in zip(widths, pdims) if attended_channels(w) != p] == [320]
    assert all(abs(w / 4.67 - p) < 0.6 for w, p in zip(widths, pdims))
    assert [attended_channels(2), attended_channels(64, 1 / 8), attended_channels(64, 1)] == [1, 8, 64]
    for name, used in {"s1": (48, 68), "s2": (66, 96), "s3": (75, 96), "s4": (72, 96)}.items():
        model = on_meta(getattr(shvit, f"shvit_{name}"))
        layers = [m.pdim for m in model.modules() if isinstance(m, SingleHeadAttention)]
        assert tuple(dict.fromkeys(layers)) == used and all(
            m.qk_dim == 16 for m in model.modules() if isinstance(m, SingleHeadAttention)
        )


# What it is compared with


def test_several_heads_are_as_many_single_ones():
    layer = stirred(MultiHeadAttention(24, heads=3)).double().eval()
    nn.init.dirac_(layer.project[1].conv.weight)
    layer.project[1].norm.reset_parameters()
    nn.init.zeros_(layer.project[1].norm.running_mean)
    nn.init.ones_(layer.project[1].norm.running_var)
    layer.project[1].norm.eps = 0.0
    x = torch.randn(2, 24, 3, 5, dtype=torch.float64)
    parts = layer.qkv(layer.norm(x)).flatten(2).split(24, dim=1)
    heads = []
    for h in range(3):
        q, k, v = (part[:, 8 * h : 8 * h + 8] for part in parts)
        weights = (torch.einsum("bdi,bdj->bij", q, k) / math.sqrt(8)).softmax(2)
        torch.testing.assert_close(layer.attention(x)[:, h], weights)
        heads.append(torch.einsum("bij,bdj->bdi", weights, v))
    torch.testing.assert_close(layer(x), torch.cat(heads, 1).view_as(x).relu())


@pytest.mark.parametrize("dim, heads", [(64, 2), (224, 7), (308, 11), (352, 11), (448, 14), (7, 1)])
def test_heads_have_at_most_32_channels(dim, heads):
    assert on_meta(MultiHeadAttention, dim=dim).heads == heads


def test_mixers_of_a_network():
    counts = {}
    for mixer in ("shsa", "full", "bottleneck", "mhsa", "none"):
        model = on_meta(shvit.shvit_s1, mixer=mixer)
        assert not any(isinstance(m, nn.GroupNorm) for m in model.stages[0].modules()), "stage 1 attends to nothing"
        counts[mixer] = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert counts == {"shsa": 9, "full": 9, "bottleneck": 9, "mhsa": 9, "none": 0}
    full = on_meta(shvit.shvit_s1, mixer="full").stages[2][1].mixer.branch
    assert isinstance(full, SingleHeadAttention) and full.pdim == full.dim == 320
    assert isinstance(on_meta(shvit.shvit_s1, mixer="bottleneck").stages[2][1].mixer.branch, BottleneckAttention)
    assert on_meta(shvit.shvit_s1, ratio=0.5).stages[2][1].mixer.branch.pdim == 160
    everywhere = on_meta(SHViT, widths=(128, 224, 320), depths=(2, 4, 5), attention=(True, True, True))
    assert sum(isinstance(m, SingleHeadAttention) for m in everywhere.stages[0].modules()) == 2


def test_bottleneck_forgets_the_other_channels():
    layer = stirred(BottleneckAttention(24, pdim=5)).eval()
    kernel = layer.reduce[0].conv.weight.detach()[:, :, 0, 0]
    unseen = torch.linalg.svd(kernel)[2][5:]  # directions that the reduction maps to nothing
    x = torch.randn(1, 24, 3, 3)
    moved = x + torch.einsum("nc,n->c", unseen, torch.randn(19))[:, None, None]
    torch.testing.assert_close(layer(moved), layer(x), rtol=1e-3, atol=1e-4)
    assert count_parameters(layer) < count_parameters(SingleHeadAttention(24, pdim=5))


def test_four_stages_of_small_patches():
    model = four_stage_baseline((16, 24, 32, 40), (1, 1, 1, 1), num_classes=3).eval()
    check_backbone(model, sizes=((64, 96), (61, 37)))
    assert model.strides == [4, 8, 16, 32] and not any(isinstance(m, nn.GroupNorm) for m in model.modules())


# The other blocks


@pytest.mark.parametrize("training", [True, False])
def test_fresh_blocks_are_the_identity_and_downsampling_is_not(training):
    x = torch.randn(3, 24, 6, 5)
    for mixer in (None, SingleHeadAttention(24), MultiHeadAttention(24), BottleneckAttention(24)):
        assert torch.equal(SHViTBlock(24, mixer).train(training)(x), x)
    down = Downsampling(24, 32).train(training)
    convolve, feed, _, after, feed_after = down
    assert torch.equal(feed(x), x) and not torch.isclose(convolve(x), x).any(dim=1).all()
    assert convolve.branch.norm.weight.min() == after.branch.norm.weight.min() == 1
    assert down(x).shape == (3, 32, 3, 3) and feed_after.branch[2].norm.weight.abs().max() == 0


def test_squeeze_excite_rounds_to_multiples_of_eight():
    hidden = [SqueezeExcite(4 * c).squeeze.out_features for c in (128, 224, 308, 192, 352, 336, 3)]
    assert hidden == [128, 224, 312, 192, 352, 336, 8]


def test_merging_gates_after_the_second_relu():
    merging = PatchMerging(4, 6)
    kinds = [type(part).__name__ for part in merging]
    assert kinds == ["ConvBN", "ReLU", "ConvBN", "ReLU", "SqueezeExcite", "ConvBN"]
    assert merging[2].conv.groups == 16 and merging[2].conv.stride == (2, 2)


def test_branches_are_dropped_whole_and_made_up_for():
    torch.manual_seed(0)
    residual = Residual(nn.Identity(), 0.25)
    x = torch.ones(4000, 1, 2, 2)
    y = residual.train()(x)
    assert set(y.flatten(1).std(1).tolist()) == {0.0}
    share = (y[:, 0, 0, 0] == 1).double().mean().item()
    assert abs(share - 0.25) < 0.03
    torch.testing.assert_close(y.max(), torch.tensor(1 + 1 / 0.75))
    assert torch.equal(residual.eval()(x), 2 * x)


def test_every_branch_of_a_network_may_be_dropped():
    model = tiny(drop_path=0.3)
    assert {m.drop for m in model.modules() if isinstance(m, Residual)} == {0.3}
    # 2 or 3 branches a block, and 4 in each downsampling
    assert sum(isinstance(m, Residual) for m in model.modules()) == 2 + 3 + 3 + 4 + 4
    assert {m.drop for m in on_meta(shvit.shvit_s1).modules() if isinstance(m, Residual)} == {0.0}


# The networks


def test_fresh_weights_are_drawn_as_the_authors_draw_them():
    torch.manual_seed(0)
    head = tiny(num_classes=1000).head
    assert abs(head.linear.weight.std().item() / 0.02 - 1) < 0.02 and head.linear.bias.abs().max() == 0
    merging = tiny().stages[1][0][2]
    # torch's default, uniform in ±1/√inputs
    assert 0.97 < merging[0].conv.weight.abs().max().item() * 16**0.5 <= 1


@pytest.mark.parametrize(
    "name, total, fused, flops",
    [
        ("s1", 6_330_808, 6_308_660, 241.3),
        ("s2", 11_483_072, 11_453_508, 365.4),
        ("s3", 14_245_273, 14_210_010, 600.6),
        ("s4", 16_588_484, 16_546_248, 986.2),
    ],
)
def test_counts_of_the_released_models(name, total, fused, flops):
    model = on_meta(getattr(shvit, f"shvit_{name}"))
    assert count_parameters(model) == total
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    # A norm of two numbers a channel becomes a bias of one; the one before the classifier has a bias to join.
    freed = sum(m.num_features for m in norms) + norms[-1].num_features
    assert total - freed == fused
    x = torch.empty(1, 3, PRESETS[name], PRESETS[name], device="meta")
    assert round(macs(lambda: model(x)) / 1e6, 1) == flops


def test_parameters_by_part():
    model = on_meta(shvit.shvit_s1)
    parts = [count_parameters(part) for part in (model.stem, *model.stages, model.head)]
    assert parts == [97_680, 135_424, 1_628_192, 4_147_872, 321_640]
    stages = model.stages
    assert [count_parameters(stages[i][1]) for i in (0, 1, 2)] == [67_712, 259_232, 525_216]
    assert count_parameters(stages[1][1].mixer) == 54_720 and count_parameters(stages[2][1].mixer) == 110_176
    assert [count_parameters(stages[i][0][2]) for i in (1, 2)] == [319_040, 902_240]
    large = on_meta(shvit.shvit_s4)
    parts = [count_parameters(part) for part in (large.stem, *large.stages, large.head)]
    assert parts == [297_948, 818_048, 5_629_344, 9_393_248, 449_896]


@pytest.mark.parametrize("size", [(225, 190), (64, 64), (33, 7)])
def test_any_size_and_a_batch_of_one(size):
    model = stirred(tiny()).eval()
    maps = model.features(torch.randn(1, 3, *size))
    for i, m in enumerate(maps):
        assert m.shape[2:] == tuple(-(-side // (16 << i)) for side in size)
    assert model(torch.randn(1, 3, *size)).shape == (1, 5)


def test_no_image_sees_another():
    model = stirred(tiny()).eval()
    x = torch.randn(4, 3, 70, 50)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]), rtol=1e-4, atol=1e-5)


def test_without_a_classifier_it_gives_the_mean_map():
    model = tiny(num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), model.features(x)[-1].mean((2, 3)))


def test_necks_of_detectors():
    maps = [torch.randn(1, width, side, side) for width, side in ((16, 8), (24, 4), (32, 2))]
    neck = detection_neck(tiny(num_classes=0), dim=8)
    levels = neck(maps)
    assert neck.strides == [8, 16, 32, 64, 128]
    assert [level.shape[2] for level in levels] == [16, 8, 4, 2, 1]
    torch.testing.assert_close(levels[4], neck.extra[0](maps[2]))  # of the backbone's map, not of the pyramid's
    fine = detection_neck(tiny(num_classes=0), dim=8, detector="mask_rcnn")
    assert fine.strides == [4, 8, 16, 32, 64] and not fine.extra
    assert [level.shape[2] for level in fine(maps)] == [32, 16, 8, 4, 2]
    with pytest.raises(ValueError, match="detector must be one of retinanet, mask_rcnn, got 'fcos'"):
        detection_neck(tiny(num_classes=0), detector="fcos")


def test_detectors():
    large = on_meta(shvit.shvit_retinanet)
    assert large.backbone.widths == [224, 336, 448] and large.beta == 0
    parts = count_parameters(shvit.shvit_s4(num_classes=0)), count_parameters(detection_neck(large.backbone))
    assert count_parameters(large) == sum(parts) + count_parameters(large.head)
    assert not any(isinstance(m, nn.GroupNorm) for m in large.head.modules())
    assert large.neck.strides == [8, 16, 32, 64, 128]
    assert on_meta(shvit.shvit_retinanet, variant="s1").backbone.widths == [128, 224, 320]
    with pytest.raises(ValueError, match="variant must be one of s1, s2, s3, s4, got 's5'"):
        shvit.shvit_retinanet("s5")
    torch.manual_seed(0)
    small = shvit.shvit_small_retinanet(num_classes=2)
    assert small.neck.strides == [4, 8, 16, 32]
    boxes = torch.tensor([[4.0, 4.0, 30.0, 28.0]])
    images = torch.rand(2, 3, 48, 64)
    batch = pad_batch(list(images), [boxes, boxes[:0]], [torch.tensor([1]), torch.tensor([], dtype=torch.long)])
    losses = []
    optimizer = torch.optim.AdamW(small.parameters(), 2e-3)
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(small.training_loss(batch))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_the_network_that_is_compared_has_the_size_of_its_baseline():
    _, baseline = next(iter(BACKBONE.baselines().items()))
    count, other = (count_parameters(build(num_classes=10, in_channels=1)) for build in (shvit.shvit_narrow, baseline))
    assert abs(count / other - 1) < 0.1
    model = shvit.shvit_narrow(in_channels=1)
    check_backbone(model.eval(), in_channels=1, sizes=((16, 16), (9, 14)))
    assert sum(isinstance(m, SingleHeadAttention) for m in model.modules()) == 4


# Fused


def test_fused_it_gives_the_same_without_norms_and_depthwise_sums(no_shape_checks):
    model = stirred(tiny(depths=(1, 2, 1))).eval()
    x = torch.randn(2, 3, 65, 90)
    fused = fuse(model, x[:1])
    scale = model(x).abs().max()
    assert (fused(x) - model(x)).abs().max() < 1e-5 * scale
    assert (fused(x[:, :, :64]) - model(x[:, :, :64])).abs().max() < 1e-5 * scale  # another size, another batch
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    sums = [m.branch for m in fused.modules() if isinstance(m, Residual)]
    assert sums and not any(isinstance(branch, ConvBN | nn.Conv2d) for branch in sums)
    assert any(isinstance(m, nn.GroupNorm) for m in fused.modules())
    freed = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)) + 32
    assert count_parameters(model) - count_parameters(fused) == freed


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_sum_around_a_depthwise_convolution_is_one_more_tap(kernel):
    residual = stirred(Residual(ConvBN(6, 6, kernel, groups=6))).double().eval()
    merged = residual.fused()
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    assert isinstance(merged, nn.Conv2d) and merged.weight.shape == (6, 1, kernel, kernel)
    torch.testing.assert_close(merged(x), residual(x))


@pytest.mark.parametrize("branch", [ConvBN(6, 6, 3), ConvBN(6, 6, 3, groups=3), FeedForward(6)])
def test_other_sums_stay(branch):
    residual = Residual(branch).eval()
    assert residual.fused() is residual


@pytest.mark.parametrize("options", [{"stride": 2}, {"groups": 2}, {"stride": 2, "groups": 8}])
def test_norms_fold_into_any_convolution(options, no_shape_checks):
    part = stirred(ConvBN(8, 8, 3, **options)).eval()
    x = torch.randn(2, 8, 9, 7)
    fused = fuse(part, x)
    assert isinstance(fused.norm, nn.Identity)
    torch.testing.assert_close(fused(x), part(x), rtol=1e-4, atol=1e-5)


# Distillation


def test_two_classifiers_are_averaged_and_told_apart_in_training():
    torch.manual_seed(0)
    model = on_meta(shvit.shvit_s1, distillation=True)
    assert count_parameters(model) - 6_330_808 == 321_640
    small = DistilledSHViT(widths=(16, 24, 32), depths=(1, 1, 1), num_classes=5)
    x = torch.randn(4, 3, 64, 64)
    first, second = small.train()(x)
    assert not torch.isclose(first, second).any()
    small.eval()
    mean = (small.head(small.pooled(x)) + small.head_dist(small.pooled(x))) / 2
    torch.testing.assert_close(small(x), mean)


def test_losses_of_distillation():
    torch.manual_seed(0)
    first, second, teacher = torch.randn(3, 6, 4)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    base = F.cross_entropy(first, labels)
    hard = distillation_loss((first, second), labels, teacher, share=0.25)
    torch.testing.assert_close(hard, 0.75 * base + 0.25 * F.cross_entropy(second, teacher.argmax(1)))
    soft = distillation_loss((first, second), labels, teacher, kind="soft", temperature=3.0)
    p, q = (teacher / 3).softmax(1), (second / 3).softmax(1)
    divergence = (p * (p.log() - q.log())).sum() * 9 / second.numel()
    torch.testing.assert_close(soft, 0.5 * base + 0.5 * divergence)
    shares = F.one_hot(labels, 4).float()
    torch.testing.assert_close(distillation_loss((first, second), shares, teacher, share=0.25), hard)
    with pytest.raises(ValueError, match="'hard' or 'soft', got 'medium'"):
        distillation_loss((first, second), labels, teacher, kind="medium")


def test_a_teacher_teaches_the_second_classifier_alone_and_is_not_saved():
    torch.manual_seed(0)
    teacher = tiny().train()
    before = copy.deepcopy(teacher.state_dict())
    model = DistilledSHViT(widths=(16, 24, 32), depths=(1, 1, 1), num_classes=5, teacher=teacher).train()
    batch = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    model.training_loss(batch).backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    predicted = teacher(batch[0]).argmax(1)
    heads = model(batch[0])
    expected = (F.cross_entropy(heads[0], batch[1]) + F.cross_entropy(heads[1], predicted)) / 2
    torch.testing.assert_close(model.training_loss(batch), expected, rtol=1e-3, atol=1e-3)
    model.before_saving()
    assert not any(name.startswith("teacher") for name in model.state_dict())
    alone = model.training_loss(batch)
    torch.testing.assert_close(
        alone, sum(F.cross_entropy(h, batch[1]) for h in model(batch[0])) / 2, rtol=1e-3, atol=1e-3
    )


# The authors' checkpoints


def official_names(model: SHViT) -> dict[str, torch.Tensor]:
    """The authors' names, written down from their model and not from the conversion."""
    pairs = [(".branch.", ".m."), (".conv.weight", ".c.weight"), (".norm.", ".bn.")]
    named = {}
    for name, value in model.state_dict().items():
        if name.startswith("stem."):
            name = name.replace("stem.", "patch_embed.")
        elif name.startswith("stages."):
            _, stage, index, rest = name.split(".", 3)
            if stage != "0" and index == "0":
                place, rest = rest.split(".", 1)
                entry = {"0": "0.0", "1": "0.1", "2": "1", "3": "2.0", "4": "2.1"}[place]
                if place == "2":
                    part, rest = rest.split(".", 1)
                    part = {"0": "conv1", "2": "conv2", "4": "se", "5": "conv3"}[part]
                    rest = f"{part}.{rest.replace('squeeze', 'fc1').replace('excite', 'fc2')}"
                    value = value[:, :, None, None] if part == "se" and rest.endswith("weight") else value
                name = f"blocks{int(stage) + 1}.{entry}.{rest}"
            else:
                shift = 0 if stage == "0" else 2
                name = f"blocks{int(stage) + 1}.{int(index) + shift}.{rest}"
        name = name.replace("mixer.branch.norm.", "mixer.m.pre_norm.").replace(".project.", ".proj.")
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        if ".pw" not in name and (".m.0." in name or ".m.2." in name) and "mixer" not in name:
            name = name.replace(".m.0.", ".m.pw1.").replace(".m.2.", ".m.pw2.")
        name = name.replace("head.linear.", "head.l.").replace("head_dist.linear.", "head_dist.l.")
        named[name] = value
    return named


@pytest.mark.parametrize("options", [{}, {"num_classes": 7, "in_channels": 1}, {"distillation": True}])
def test_official_names_come_back_with_their_preset(options):
    build = on_meta(shvit.shvit_s2, **options)
    theirs = official_names(build)
    assert "blocks2.1.se.fc1.weight" in theirs and "blocks3.2.1.m.pw2.bn.weight" in theirs
    preset, found, ours = convert({f"module.{name}": value for name, value in theirs.items()})
    assert preset == "shvit_s2"
    again = on_meta(getattr(shvit, preset), **found)
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in again.state_dict().items()}
    assert type(again) is type(build)
    headless = {name: value for name, value in theirs.items() if not name.startswith("head")}
    assert convert(headless)[1]["num_classes"] == 0


def test_foreign_weights_are_refused():
    with pytest.raises(ValueError, match="expected a state dict of SHViT"):
        convert({"fc.weight": torch.zeros(3, 4)})
    theirs = official_names(on_meta(shvit.shvit_s1))
    with pytest.raises(ValueError, match=r"no SHViT of the paper has widths of \(128, 224, 320\) and \(2, 4, 6\)"):
        convert(theirs | {"blocks3.8.conv.m.c.weight": torch.zeros(320, 1, 3, 3)})


# The user's side


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SingleHeadAttention(16, pdim=17), "between 1 and the 16 channels, got 17"),
        (lambda: SingleHeadAttention(16, pdim=0), "between 1 and the 16 channels, got 0"),
        (lambda: SingleHeadAttention(16, qk_dim=0), "at least 1, got 16 and 0"),
        (lambda: SingleHeadAttention(16, ratio=1.5), "above 0 and be at most 1, got 1.5"),
        (lambda: SingleHeadAttention(16, ratio=float("nan")), "ratio must be a finite number, got nan"),
        (lambda: SingleHeadAttention(16)(torch.ones(2, 8, 3, 3)), r"expected \(batch, 16, height, width\), got \(2, 8"),
        (lambda: MultiHeadAttention(16, heads=3), "divide the 16 channels, got 3"),
        (lambda: tiny(mixer="two heads"), "one of shsa, full, bottleneck, mhsa, none, got 'two heads'"),
        (lambda: tiny(depths=(1, 2)), "the same stages, got 3, 2, 3 and 3"),
        (lambda: tiny(patch=12), "power of two from 2 on, .* got 12"),
        (lambda: tiny(widths=(12, 24, 32)), "divide the first width, got 16 with a width of 12"),
        (lambda: tiny(drop_path=1.0), "below 1, got 1.0"),
        (lambda: tiny(num_classes=-1), "must not be negative, .* got .*-1 and 3"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_presets_by_name():
    model = provenn.paper("shvit").build("shvit_small", num_classes=4, in_channels=1)
    assert isinstance(model, SHViT) and model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    assert model.strides == [2, 4, 8] and count_parameters(shvit_small()) < 1e6


# The experiments


def images_of(count: int, side: int = 16) -> TaskData:
    generator = torch.Generator().manual_seed(3)
    parts = [
        TensorDataset(torch.randn(count, 1, side, side, generator=generator), torch.arange(count) % 4) for _ in range(3)
    ]
    return TaskData("noise", *parts, fingerprint="noise")


def test_the_tint_asked_for_is_of_the_glyph_that_the_first_cell_shows():
    images, labels = studies.recall_scenes(60, 0)
    cells = images.float().view(60, 2, 3, 8, 3, 8).permute(0, 2, 4, 1, 3, 5).reshape(60, 9, 2, 8, 8)
    shapes = F.normalize(cells[:, :, 0].flatten(2) - cells[:, :, 0].flatten(2).mean(2, keepdim=True), dim=2)
    same = torch.einsum("bp,bcp->bc", shapes[:, 0], shapes[:, 1:]).argmax(1) + 1
    tint = cells[torch.arange(60), same, 1].mean((1, 2)) / studies.LEVELS - 0.5
    assert torch.equal((2 * tint).round().long(), labels)


def test_neighbours_are_compared_without_what_all_tokens_share():
    class Shared(nn.Module):
        def __init__(self, share: float):
            super().__init__()
            self.share, self.weight = share, nn.Parameter(torch.zeros(1))

        def features(self, x):
            noise = torch.randn(len(x), 32, 8, 8, generator=torch.Generator().manual_seed(1))
            smooth = noise.cumsum(2).cumsum(3)
            return [100 + self.share * smooth + (1 - self.share) * noise]

    data = images_of(60)
    assert abs(studies.alike_neighbours(Shared(0.0), data)) < 0.02
    assert studies.alike_neighbours(Shared(1.0), data) > 0.5


def test_heads_that_attend_alike():
    one, two = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    one[..., 0], two[..., 1] = 1.0, 1.0
    assert studies.alike_heads(torch.cat([one, one], 1)) == pytest.approx(1)
    assert studies.alike_heads(torch.cat([one, two], 1)) == pytest.approx(0)
    assert studies.alike_heads(torch.cat([one, one, two], 1)) == pytest.approx(1 / 3)
    torch.manual_seed(0)
    network = stirred(studies.head_network(4, blocks=4, num_classes=4, in_channels=1)).eval()
    layers = [m for m in network.modules() if isinstance(m, MultiHeadAttention)]
    maps = studies.head_maps(network, torch.randn(3, 1, 16, 16))
    assert [tuple(m.shape) for m in maps] == [(3, 4, 16, 16)] * 4
    with torch.no_grad():
        for layer in layers:
            layer.qkv.conv.weight *= 10  # maps that differ
        for layer in layers[2:]:
            layer.qkv.conv.weight.zero_()  # every head of the later half attends to all positions
        assert studies.late_less_early(network, images_of(8)) > 0.2


def test_the_head_that_stays_is_chosen_on_validation_images():
    torch.manual_seed(1)
    network = stirred(studies.head_network(4, blocks=2, num_classes=4, in_channels=1)).eval()
    data = images_of(120)
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        lost = studies.left_with_one_head(-1)(network, data)
        assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())
        weight = [m for m in network.modules() if isinstance(m, MultiHeadAttention)][-1].project[1].conv.weight

        def accuracy(part) -> float:
            images, labels = part.tensors
            return (network(images).argmax(1) == labels).double().mean().item()

        whole, alone = accuracy(data.test), {}
        for head in range(4):
            kept = weight.clone()
            weight[:, : 16 * head] = 0
            weight[:, 16 * (head + 1) :] = 0
            alone[head] = accuracy(data.val), accuracy(data.test)
            weight.copy_(kept)
    assert len({on_val for on_val, _ in alone.values()}) > 1
    best = max(alone, key=lambda head: alone[head][0])
    assert lost == pytest.approx(alone[best][1] - whole)


def test_bytes_moved_are_those_read_and_written():
    class Map(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)[:, :12].unflatten(1, (3, 4)).flatten(1)).relu()

    def build(num_classes: int, in_channels: int) -> nn.Module:
        return Map(12, 5, bias=False)

    moved = studies.traffic(build)(4, "cpu")()
    assert moved == 4 * (12 + 12 * 5 + 5 + 5 + 5)  # the views before the map move nothing


def test_networks_that_are_timed_compute_with_every_branch(no_shape_checks):
    network = studies._fused.__wrapped__(tiny)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    assert all(m.weight.abs().max() > 0 for m in network.modules() if isinstance(m, nn.Conv2d))
    x = torch.randn(8, 3, 64, 64)
    assert all(0.1 < m.std() < 10 for m in network.features(x))
