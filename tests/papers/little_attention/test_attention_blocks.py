"""C-NL by its equations, the other blocks by their authors' public code, and the circle loss."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from provenn.papers.little_attention import (
    BAM,
    BLOCKS,
    ECA,
    ChannelNonLocal,
    HarmoniousAttention,
    NonLocal,
    PositionAttention,
    RelationAware,
    circle_loss,
    make_block,
    pair_circle_loss,
)
from provenn.testing import seeded_state
from provenn.testing.seeded import seeded_array

PUBLIC = json.loads(Path(__file__).with_name("public.json").read_text())
OPTIONS = [
    {},
    {"fuse": "gate"},
    {"norm": "dot"},
    {"value": "map"},
    {"value": "map", "norm": "dot"},
    {"bn": False},
    {"reduction": 2},
    {"bias": False},
]


def stirred(block: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    for linear in block.modules():
        if isinstance(linear, nn.Linear | nn.Conv1d | nn.Conv2d):
            nn.init.normal_(linear.weight, std=0.3)
    return block.double().eval()


def maps(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# C-NL


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_block_gives_its_input(options, training):
    x = torch.randn(3, 64, 6, 3)
    assert torch.equal(ChannelNonLocal(64, **options).train(training)(x), x)
    plain = ChannelNonLocal(64, fuse="gate_plain").train(training)
    assert torch.equal(plain(x), x / 2)


@pytest.mark.parametrize("norm", ["softmax", "dot"])
@pytest.mark.parametrize("value", ["pooled", "map"])
def test_it_is_its_equations(norm, value):
    block, x = stirred(ChannelNonLocal(64, 8, norm=norm, value=value)), maps(2, 64, 5, 3)
    z = x.mean((2, 3))
    expected = []
    for i in range(2):
        theta, phi = block.theta(z[i]), block.phi(z[i])
        scores = theta[:, None] * phi[None, :]
        a = scores.softmax(1) if norm == "softmax" else scores / 8
        g = block.g(x[i].flatten(1).T).T if value == "map" else block.g(z[i])[:, None]
        w = block.out((a @ g).T).T
        bn = block.bn
        w = (w - bn.running_mean[:, None]) / (bn.running_var + bn.eps).sqrt()[:, None] * bn.weight[:, None]
        w = w + bn.bias[:, None]
        expected.append(x[i] + (w.view(64, 5, 3) if value == "map" else w[:, :, None]))
    torch.testing.assert_close(block(x), torch.stack(expected), rtol=0, atol=1e-12)


def test_what_it_adds_is_constant_in_space_and_what_it_gates_is_a_factor():
    x = maps(3, 64, 5, 4)
    added = stirred(ChannelNonLocal(64))(x) - x
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=0, atol=1e-13)
    assert added[:, :, 0, 0].std(1).min() > 1e-3
    factor = stirred(ChannelNonLocal(64, fuse="gate"))(x) / x
    torch.testing.assert_close(factor, factor[:, :, :1, :1].expand_as(factor), rtol=1e-10, atol=0)
    assert factor.min() > 0 and factor.max() < 2 and factor.std() > 1e-3


def test_softmax_rows_sum_to_one_and_average():
    block, x = stirred(ChannelNonLocal(64)), maps(3, 64, 5, 4)
    a, g = block.weights(x), block.g(x.mean((2, 3)))
    torch.testing.assert_close(a.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    u = (a @ g[..., None])[..., 0]
    assert (u >= g.amin(1, keepdim=True) - 1e-12).all() and (u <= g.amax(1, keepdim=True) + 1e-12).all()


def test_the_order_of_inner_channels_changes_nothing():
    block, x, order = stirred(ChannelNonLocal(64, 8)), maps(2, 64, 3, 3), torch.randperm(8)
    before = block(x)
    with torch.no_grad():
        for part in (block.theta, block.phi, block.g):
            part.weight.copy_(part.weight[order])
            part.bias.copy_(part.bias[order])
        assert not torch.allclose(block(x), before)
        block.out.weight.copy_(block.out.weight[:, order])
    torch.testing.assert_close(block(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_places_may_be_permuted(options):
    block, x = stirred(ChannelNonLocal(64, **options)), maps(2, 64, 5, 4)
    order = torch.randperm(20)
    moved = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(block(moved), block(x).flatten(2)[..., order].view_as(x), rtol=0, atol=1e-12)


def test_at_the_start_only_the_norm_learns():
    block, x = ChannelNonLocal(64).double(), maps(8, 64, 4, 4)
    (block(x) * maps(8, 64, 4, 4)).sum().backward()
    for part in (block.theta, block.phi, block.g, block.out):
        assert not part.weight.grad.any()
    assert block.bn.weight.grad.abs().min() > 0 and block.bn.bias.grad.abs().min() > 0


def test_later_all_but_the_bias_before_the_norm_learns():
    block, x = stirred(ChannelNonLocal(64)).train(), maps(8, 64, 4, 4)
    (block(x) * maps(8, 64, 4, 4)).sum().backward()
    sizes = {name: p.grad.abs().max().item() for name, p in block.named_parameters()}
    assert sizes.pop("out.bias") < 1e-10 < 1e-6 * min(sizes.values())


@pytest.mark.parametrize("channels, inner", [(8, 4), (64, 4), (256, 16), (2048, 128)])
def test_inner_width_has_a_floor(channels, inner):
    with torch.device("meta"):
        assert ChannelNonLocal(channels).theta.weight.shape == (inner, channels)


def test_bad_options_are_refused():
    for options, word in (({"fuse": "mul"}, "mul"), ({"norm": "l2"}, "l2"), ({"value": "all"}, "all")):
        with pytest.raises(ValueError, match=word):
            ChannelNonLocal(8, **options)
    with pytest.raises(ValueError, match="gate"):
        ChannelNonLocal(8, value="map", fuse="gate")
    with pytest.raises(ValueError, match=r"expected .*8 channels.*9"):
        ChannelNonLocal(8)(torch.zeros(1, 9, 2, 2))


# The others


@pytest.mark.parametrize("case", PUBLIC["cases"], ids=lambda case: f"{case['block']}{case['options'] or ''}")
@pytest.mark.parametrize("fused", [True, False])
def test_a_block_is_its_public_code(case, fused):
    options = {"fused": fused} if case["block"].startswith(("rga", "nonlocal", "pam")) else {}
    block = make_block(case["block"], *PUBLIC["input"][1:], **case["options"], **options).double().eval()
    theirs, own = seeded_state(case["shapes"]), block.state_dict()
    block.load_state_dict({name: theirs[other].view(own[name].shape) for name, other in case["names"].items()})
    x = torch.from_numpy(seeded_array(PUBLIC["input"], "input")).requires_grad_()
    y = block(x)
    (gradient,) = torch.autograd.grad((y * torch.from_numpy(seeded_array(y.shape, "probe"))).sum(), x)
    for name, tensor in (("output", y), ("gradient", gradient)):
        found = tensor.flatten()[case["index"]]
        torch.testing.assert_close(found, torch.tensor(case[name], dtype=torch.float64), rtol=0, atol=1e-10)


COUNTS = {
    "cnl": (17_200, 67_168, 265_408, 1_055_104),
    "se": (8_192, 32_768, 131_072, 524_288),
    "hac": (9_008, 34_400, 134_336, 530_816),
    # 2C²/r + 3 (C + C/r) + C² + 3C + 16
    "ha": tuple(c * c // 8 + 3 * (c + c // 16) + c * c + 3 * c + 16 for c in (256, 512, 1024, 2048)),
    "eca": (5, 5, 5, 7),
    "cbam": (8_564, 33_412, 132_260, 526_564),
    "gc": (8_753, 33_889, 133_313, 528_769),
    "nonlocal": (132_224, 526_592, 2_101_760, 8_397_824),
    "pam": (82_241, 328_321, 1_312_001, 5_245_441),
    "cam": (1, 1, 1, 1),
    "rga_s": (1_082_178, 164_898, 398_154, 1_578_570),
    "rga_c": (1_590_994, 164_898, 270_754, 1_063_650),
    "rga_sc": (2_673_172, 329_796, 668_908, 2_642_220),
    # 3C²/r + C + 13 C/r + 18 (C/r)² + 1
    "bam": tuple(3 * c * c // 16 + c + 13 * c // 16 + 18 * (c // 16) ** 2 + 1 for c in (256, 512, 1024, 2048)),
}
STAGES = ((256, 64, 32), (512, 32, 16), (1024, 16, 8), (2048, 16, 8))


def count(build) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


@pytest.mark.parametrize("name", BLOCKS)
def test_counts_of_every_stage(name):
    assert tuple(count(partial(make_block, name, *stage)) for stage in STAGES) == COUNTS[name]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"fuse": "gate"}, (16_688, 66_144, 263_360, 1_051_008)),
        ({"reduction": 2}, (132_224, 526_592, 2_101_760, 8_397_824)),
    ],
)
def test_counts_of_forms(options, expected):
    assert tuple(count(partial(ChannelNonLocal, c, **options)) for c, *_ in STAGES) == expected
    assert tuple(count(partial(NonLocal, c, 1)) for c, *_ in STAGES) == (1_795, 3_587, 7_171, 14_339)


@pytest.mark.parametrize("over", ["positions", "channels"])
@pytest.mark.parametrize("shape", [(16, 4, 3), (24, 6, 5), (64, 2, 1)])
def test_relations_need_no_map(over, shape):
    fused, explicit = (stirred(RelationAware(*shape, over, fused=form)) for form in (True, False))
    explicit.load_state_dict(fused.state_dict())
    x = maps(3, *shape)
    torch.testing.assert_close(fused(x), explicit(x), rtol=0, atol=1e-11)
    assert (fused(x) / x).std() > 0


@pytest.mark.parametrize("norm", ["dot", "softmax"])
@pytest.mark.parametrize("inner", [1, 8, 40])
def test_nonlocal_forms_agree(norm, inner):
    fused, explicit = (stirred(NonLocal(16, inner, norm=norm, fused=form)) for form in (True, False))
    x = maps(2, 16, 5, 4)
    torch.testing.assert_close(fused(x), explicit(x), rtol=0, atol=1e-10)


def test_nonlocal_is_its_equation():
    block, x = stirred(NonLocal(16, 8, norm="softmax")), maps(1, 16, 3, 2)
    theta, phi, g = (part(x)[0].flatten(1) for part in (block.theta, block.phi, block.g))
    gathered = (theta.T @ phi).softmax(1) @ g.T
    torch.testing.assert_close(block(x), x + block.bn(block.out(gathered.T.view(1, 8, 3, 2))), rtol=0, atol=1e-12)


def test_relations_refuse_another_size():
    for over in ("positions", "channels"):
        with pytest.raises(ValueError, match="8 × 4 × 3, got 8 × 3 × 4"):
            RelationAware(8, 4, 3, over)(torch.zeros(1, 8, 3, 4))
    with pytest.raises(ValueError, match="needs height and width"):
        make_block("rga_s", 8)


def test_eca_is_a_convolution_of_means():
    block, x = stirred(ECA(64)), maps(2, 64, 3, 3)
    padded = F.pad(x.mean((2, 3)), (1, 1))
    logits = sum(block.conv.weight[0, 0, i] * padded[:, i : i + 64] for i in range(3))
    torch.testing.assert_close(block(x), x * logits.sigmoid()[:, :, None, None], rtol=0, atol=1e-12)


def test_bam_adds_its_branches():
    block, x = stirred(BAM(32)), maps(2, 32, 9, 7)
    channel = block.excite(block.bn(block.squeeze(x.mean((2, 3)))).relu())
    expected = x * (1 + (channel[:, :, None, None] + block.spatial(x)).sigmoid())
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(6, 4), (5, 7), (1, 1)])
def test_harmonious_attention_multiplies_a_spatial_part(size):
    block, x = stirred(HarmoniousAttention(32)), maps(2, 32, *size)
    coarse = block.spatial(x.mean(1, keepdim=True))
    assert coarse.shape[2:] == tuple((side + 1) // 2 for side in size)
    position = block.scale(F.interpolate(coarse, size=size, mode="bilinear", align_corners=True))
    gate = block.mix(position * block.channel(x.mean((2, 3), keepdim=True))).sigmoid()
    torch.testing.assert_close(block(x), x * gate, rtol=0, atol=1e-12)
    assert gate.min() >= 0.5 and (size == (1, 1) or gate.std((2, 3)).max() > 0)


def test_position_attention_without_its_map():
    fused, explicit = (stirred(PositionAttention(16, fused=form)) for form in (True, False))
    x = maps(2, 16, 5, 4)
    torch.testing.assert_close(fused(x), explicit(x), rtol=0, atol=1e-11)


def test_an_unknown_block_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"'nl'.*cnl, se"):
        make_block("nl", 8)


# Circle loss


def test_class_form_without_weights_is_cross_entropy():
    cosines, labels = maps(5, 7).clamp(-1, 1), torch.tensor([0, 6, 3, 3, 1])
    plain = F.cross_entropy(64 * cosines, labels)
    torch.testing.assert_close(circle_loss(cosines, labels, weighted=False), plain)
    assert not torch.isclose(circle_loss(cosines, labels), plain)


def test_class_form_is_its_equation():
    cosines, labels = maps(4, 6).tanh(), [2, 0, 5, 5]
    expected = 0.0
    for row, own in zip(cosines.tolist(), labels):
        s_p = row[own]
        total = sum(
            math.exp(8 * max(s_n + 0.3, 0) * (s_n - 0.3) - 8 * max(1.3 - s_p, 0) * (s_p - 0.7))
            for j, s_n in enumerate(row)
            if j != own
        )
        expected += math.log(1 + total) / len(labels)
    found = circle_loss(cosines, torch.tensor(labels), scale=8, margin=0.3)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_weights_pass_no_gradient():
    cosines = torch.tensor([[0.2, 0.5]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(circle_loss(cosines, torch.tensor([0]), scale=4, margin=0.25), cosines)
    logits = torch.tensor([4 * 1.05 * (0.2 - 0.75), 4 * 0.75 * (0.5 - 0.25)])
    wrong = logits.softmax(0)[1].item()
    assert gradient[0].tolist() == pytest.approx([-wrong * 4 * 1.05, wrong * 4 * 0.75], rel=1e-5)


def test_pair_form_is_its_equation():
    features, labels = maps(6, 5), torch.tensor([0, 0, 1, 1, 1, 2])
    s = F.cosine_similarity(features[:, None], features[None], dim=2)
    terms = []
    for a in range(5):  # the last has no second picture
        right = sum(
            math.exp(-6 * max(1.25 - s[a, p], 0) * (s[a, p] - 0.75))
            for p in range(6)
            if labels[p] == labels[a] and p != a
        )
        wrong = sum(math.exp(6 * max(s[a, n] + 0.25, 0) * (s[a, n] - 0.25)) for n in range(6) if labels[n] != labels[a])
        terms.append(math.log(1 + right * wrong))
    found = pair_circle_loss(features, labels, scale=6)
    assert found.item() == pytest.approx(sum(terms) / 5, rel=1e-10)


def test_pairs_that_are_none_give_no_loss_and_finite_gradients():
    for labels in ([0, 1, 2], [4, 4, 4]):
        features = maps(3, 5).requires_grad_()
        loss = pair_circle_loss(features, torch.tensor(labels))
        loss.backward()
        assert loss.item() == 0 and features.grad.isfinite().all()


def test_losses_refuse_bad_numbers():
    for loss in (circle_loss, pair_circle_loss):
        for options in ({"scale": 0}, {"margin": 1.5}, {"scale": float("nan")}):
            with pytest.raises(ValueError):
                loss(torch.zeros(2, 2), torch.tensor([0, 1]), **options)
