"""Guided attention: layers, network, loss, rivals, and the authors' weights."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import provenn
from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.papers.ms_guided_attention import (
    ChannelAttention,
    DeepAttentiveFeatures,
    GuidedAttention,
    GuidedAttentionNet,
    PositionAttention,
    SemanticModule,
)
from provenn.papers.ms_guided_attention.layers import DilatedPyramid
from provenn.papers.ms_guided_attention.official import convert
from provenn.papers.ms_guided_attention.rivals import DualAttention, UNet
from provenn.testing.golden import assert_values
from provenn.testing.seeded import seeded_array, seeded_state


def small(**options):
    options = {"num_classes": 3, "backbone": "small", "dim": 8, "semantic_widths": (8, 12), **options}
    torch.manual_seed(0)
    return GuidedAttentionNet(**options)


def opened(model: nn.Module) -> nn.Module:
    """With attention that does something: γ is not 0."""
    for part in model.modules():
        if isinstance(part, (PositionAttention, ChannelAttention, DilatedPyramid)):
            nn.init.constant_(part.gamma, 0.7)
    return model


# Layers


@pytest.mark.parametrize("channels, keys", [(64, None), (6, 2), (4, 9)])
def test_fused_position_attention_is_the_definition(channels, keys):
    torch.manual_seed(1)
    layer = opened(PositionAttention(channels, keys)).double()
    plain = PositionAttention(channels, keys, fused=False).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, channels, 5, 7, dtype=torch.float64, requires_grad=True)
    y, z = layer(x), plain(x)
    torch.testing.assert_close(y, z)
    (a,), (b,) = (torch.autograd.grad(out.sin().sum(), x) for out in (y, z))
    torch.testing.assert_close(a, b)
    weights = layer.weights(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 35, dtype=torch.float64))
    q, k, v = (part(x).flatten(2) for part in (layer.query, layer.key, layer.value))
    by_hand = torch.einsum("bcj,bij->bci", v, torch.einsum("bci,bcj->bij", q, k).softmax(-1))  # no 1/√d
    torch.testing.assert_close(y, 0.7 * by_hand.view_as(x) + x)


def test_positions_and_channels_may_be_permuted():
    torch.manual_seed(2)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    places, channels = torch.randperm(20), torch.randperm(6)
    moved = x.flatten(2)[:, :, places].view_as(x)
    position = opened(PositionAttention(6)).double()
    torch.testing.assert_close(position(moved), position(x).flatten(2)[:, :, places].view_as(x))
    for cam in ("softmax", "max_minus"):
        channel = opened(ChannelAttention(6, cam=cam)).double()
        torch.testing.assert_close(channel(x[:, channels]), channel(x)[:, channels])


def test_attention_begins_as_the_identity_and_only_its_gamma_learns_first():
    layer = PositionAttention(8)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(layer(x), x) and torch.equal(ChannelAttention(8)(x), x)
    layer(x).square().sum().backward()
    assert layer.gamma.grad.abs().sum() > 0
    assert all(not part.weight.grad.any() for part in (layer.query, layer.key, layer.value))


def test_the_two_forms_of_channel_attention_are_opposites():
    # Orthogonal channels of equal norm: the one with itself is the highest product.
    x = 2 * torch.eye(4).view(1, 4, 2, 2)
    softmax, minus = ChannelAttention(4).weights(x)[0], ChannelAttention(4, cam="max_minus").weights(x)[0]
    assert (softmax.argmax(1) == torch.arange(4)).all() and (minus.argmin(1) == torch.arange(4)).all()
    torch.testing.assert_close(softmax[0], torch.tensor([4.0, 0, 0, 0]).softmax(0))
    torch.testing.assert_close(minus[0], torch.tensor([0.0, 4, 4, 4]).softmax(0))


def test_channel_attention_sums_in_single_precision():
    x = torch.full((1, 2, 64, 64), 8.0, dtype=torch.float16)
    x[:, 1] = -8.0  # sums of 4096 products of 64: beyond float16
    weights = ChannelAttention(2).weights(x)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights[0], torch.eye(2))


def test_layers_of_guided_attention_are_as_described():
    torch.manual_seed(3)
    layer, semantic, conv = GuidedAttention(4), SemanticModule(8), nn.Conv2d(8, 4, 3, padding=1)
    feature, guide = torch.randn(2, 2, 4, 8, 8)
    got = opened(layer)(feature, guide, semantic, conv)
    u = torch.cat([feature, guide], 1)
    position, channel = (layer.layers[name](u) for name in ("position", "channel"))
    _, back = semantic(u)
    torch.testing.assert_close(got.attention, layer.mix((position + channel) * conv(back)))
    assert got.latent.shape == (2, 32, 2, 2) and got.reconstruction.shape == u.shape and torch.equal(got.inputs, u)
    alone = layer(feature, guide)
    assert alone.latent is None and not torch.equal(alone.attention, got.attention)
    with pytest.raises(ValueError, match="parts are position or dilated"):
        GuidedAttention(4, parts=("position", "dilated"))


# Network


@pytest.mark.parametrize(
    "options, count",
    [
        ({"steps": 1}, 50_530_119),
        ({"steps": 3}, 66_470_539),
        ({"steps": 5}, 82_412_259),
        ({"guided": False}, 44_411_103),
        ({"guided": False, "steps": 5}, 47_190_819),
        ({"deep_supervision": False}, 58_498_379),
        ({"deep_supervision": False, "steps": 5}, 82_407_059),
        ({"backbone": "resnet101"}, 58_871_135),
        ({"backbone": "resnext101_32x8d"}, 103_113_311),
    ],
)
def test_networks_have_the_parameters_of_the_papers_table(options, count):
    with torch.device("meta"):
        assert count_parameters(GuidedAttentionNet(**options)) == count


def test_rivals_have_the_parameters_of_the_papers_table():
    with torch.device("meta"):
        assert count_parameters(UNet()) == 31_030_853
        assert count_parameters(UNet(gated=True)) == 34_877_681
        assert count_parameters(DeepAttentiveFeatures()) == 43_482_179


@pytest.mark.parametrize("steps, supervised, expected", [(1, True, 8), (2, True, 8), (3, True, 12), (3, False, 4)])
def test_training_sees_the_right_terms(steps, supervised, expected):
    model = small(steps=steps, deep_supervision=supervised)
    outputs = model.outputs(torch.randn(2, 1, 32, 32))
    assert len(outputs.logits) == expected and all(part.shape == (2, 3, 32, 32) for part in outputs.logits)
    assert len(outputs.guided) == steps and all(len(scales) == 4 for scales in outputs.guided)


def test_the_loss_of_equal_logits_and_equal_pairs_is_a_logarithm():
    model = small()
    for head in (*model.classify_features, *model.classify[0]):
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    images, masks = torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32))
    model.weights = (1.0, 0.0, 0.0)
    torch.testing.assert_close(model.training_loss((images, masks)), torch.tensor(8 * math.log(3)))
    outputs = model.outputs(images)
    same = [
        [part._replace(latent=torch.ones(3), reconstruction=part.inputs) for part in scales]
        for scales in outputs.guided
    ]
    terms = model.terms(outputs._replace(guided=same))
    assert not terms["latent"].any() and not terms["reconstruction"].any()
    # One pair that differs by 2 in each of 3 numbers: a mean of 4, once.
    same[0][1] = same[0][1]._replace(latent=torch.full((3,), 3.0))
    assert float(model.terms(outputs._replace(guided=same))["latent"]) == 4.0
    model.reduction = "sum"
    assert float(model.terms(outputs._replace(guided=same))["latent"]) == 12.0


def test_what_is_not_judged_has_no_loss_and_weights_scale_the_terms():
    model = small()
    images, masks = torch.randn(2, 1, 32, 32), torch.full((2, 32, 32), 255)
    model.eval()  # norms that do not move
    terms = model.terms(model.outputs(images))
    expected = 0.25 * terms["latent"] + 0.1 * terms["reconstruction"]
    assert all(float(term.detach()) > 0 for term in terms.values())
    torch.testing.assert_close(model.training_loss((images, masks)), expected)


def test_guidance_stops_no_gradient():
    model = opened(small())
    outputs = model.outputs(torch.randn(2, 1, 32, 32))
    model.terms(outputs)["latent"].backward()
    first, second = model.semantic
    assert first.enc1[0].weight.grad.abs().sum() > 0 and second.enc1[0].weight.grad.abs().sum() > 0


def test_one_semantic_module_serves_the_four_scales():
    torch.manual_seed(4)
    model = opened(small(steps=1)).eval()
    images = torch.randn(1, 1, 32, 32)
    whole = torch.autograd.grad(
        sum(part.reconstruction.sum() for part in model.outputs(images).guided[0]), model.semantic[0].enc1[0].weight
    )[0]
    parts = [
        torch.autograd.grad(
            model.outputs(images).guided[0][scale].reconstruction.sum(), model.semantic[0].enc1[0].weight
        )[0]
        for scale in range(4)
    ]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-3, atol=1e-3)
    assert len(model.semantic_conv[0]) == 1 and len(small(share_semantic_conv=False).semantic_conv[0]) == 4


def test_every_live_parameter_learns_once_gammas_have_moved():
    model = opened(small())
    model.training_loss((torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32)))).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert not silent


def test_the_answer_is_the_mean_of_the_last_step_or_the_finest_scale():
    model = opened(small()).eval()
    x = torch.randn(1, 1, 32, 32)
    last = model.outputs(x).logits[4:]
    torch.testing.assert_close(model(x), torch.stack(last).mean(0))
    model.predict = "finest"
    torch.testing.assert_close(model(x), last[0])


@pytest.mark.parametrize("size", [(16, 16), (37, 50), (17, 64)])
def test_any_size_keeps_its_size(size):
    x = torch.randn(1, 1, *size)
    for model in (
        small(),
        UNet(3, width=4, gated=True),
        UNet(3, width=4, depth=3, skips=1),
        DualAttention(3, backbone="small"),
        DeepAttentiveFeatures(3, backbone="small", dim=8),
    ):
        assert model.eval()(x).shape == (1, 3, *size)


def test_a_side_that_is_no_multiple_is_continued_by_its_mirror_image():
    model = opened(small()).eval()
    x = torch.randn(1, 1, 30, 32)
    mirrored = torch.cat([x, x[:, :, -2:].flip(2)], 2)
    torch.testing.assert_close(model(x), model(mirrored)[:, :, :30])


def test_losses_between_compare_what_enters_and_leaves_attention():
    model = opened(small(guided=False, between=True))
    outputs = model.outputs(torch.randn(2, 1, 32, 32))
    pairs = [pair for scales in outputs.guided for part in scales for pair in part.around]
    assert len(pairs) == 2 * 4 * 2  # steps, scales, position and channel
    expected = sum(nn.functional.mse_loss(a, b) for a, b in pairs)
    torch.testing.assert_close(model.terms(outputs)["reconstruction"], expected)
    assert not small(guided=False).outputs(torch.randn(2, 1, 32, 32)).guided[0][0].around


@pytest.mark.parametrize(
    "options, said",
    [
        ({"backbone": "vgg"}, "backbone must be one of"),
        ({"steps": 0}, "steps must be from 1 to 8"),
        ({"cam": "hard"}, "cam must be one of"),
        ({"predict": "best"}, "predict must be one of"),
        ({"reduction": "none"}, "reduction must be one of"),
        ({"weights": (1.0, -1.0, 0.1)}, "weights must be three"),
        ({"weights": (1.0, 0.1)}, "weights must be three"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"between": True}, "between is for a network without"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said, untyped):
    with pytest.raises(ValueError, match=said):
        small(**options)


@pytest.mark.parametrize(
    "make, options, said",
    [
        (UNet, {"depth": 0}, "depth must be from 2 to 8, got 0"),
        (UNet, {"depth": 3, "skips": 3}, "skips must be from 0 to 2, one less than depth, got 3"),
        (UNet, {"width": 0}, "must be at least 1, got 5, 1 and 0"),
        (UNet, {"dice": float("nan")}, "dice must be a finite number"),
        (DualAttention, {"dim": 0}, "must be at least 1, got 5, 1 and 0"),
        (DualAttention, {"backbone": "vgg"}, "backbone must be one of"),
    ],
)
def test_options_of_rivals_that_do_not_fit_are_refused(make, options, said):
    with pytest.raises(ValueError, match=said):
        make(**options)


def test_images_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="expected images of 1 channels, got 3"):
        small()(torch.randn(1, 3, 32, 32))


def test_images_that_semantic_modules_cannot_halve_twice_are_refused():
    with pytest.raises(ValueError, match="expected sides of more than 4 pixels, got 4×40"):
        small().eval()(torch.randn(1, 1, 4, 40))
    assert small().eval()(torch.randn(1, 1, 5, 5)).shape == (1, 3, 5, 5)
    assert small(guided=False).eval()(torch.randn(1, 1, 4, 4)).shape == (1, 3, 4, 4)


def test_batches_of_one_and_of_none():
    model = opened(small())
    assert model.eval()(torch.zeros(0, 1, 32, 32)).shape == (0, 3, 32, 32)
    nothing = model.training_loss((torch.zeros(0, 1, 32, 32), torch.zeros(0, 32, 32, dtype=torch.long)))
    nothing.backward()
    assert float(nothing.detach()) == 0.0
    one = model.train().training_loss((torch.randn(1, 1, 64, 64), torch.zeros(1, 64, 64, dtype=torch.long)))
    assert torch.isfinite(one)
    for layer in (PositionAttention(4), ChannelAttention(4)):
        assert layer(torch.zeros(0, 4, 3, 5)).shape == (0, 4, 3, 5)


@pytest.mark.parametrize(
    "shape, keys", [((1, 8, 1, 1), None), ((1, 3, 5, 3), 1), ((2, 16, 7, 9), None), ((3, 4, 1, 6), 9)]
)
def test_fused_position_attention_has_the_derivatives_of_the_definition(shape, keys):
    """Of inputs and weights, first and second, by definitions that are written out here."""
    torch.manual_seed(0)
    layer = opened(PositionAttention(shape[1], keys)).double()
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def by_hand(x):
        q, k, v = (
            torch.einsum("oc,bcn->bon", part.weight[:, :, 0, 0], x.flatten(2)) + part.bias[:, None]
            for part in (layer.query, layer.key, layer.value)
        )
        weights = torch.einsum("bci,bcj->bij", q, k).exp()
        weights = weights / weights.sum(2, keepdim=True)
        return layer.gamma * torch.einsum("bij,bcj->bci", weights, v).view_as(x) + x

    inputs = [x, *layer.parameters()]
    firsts, seconds = [], []
    for form in (layer, by_hand):
        first = torch.autograd.grad(form(x).sin().sum(), inputs, create_graph=True)
        firsts.append(first)
        seconds.append(torch.autograd.grad(sum(part.cos().sum() for part in first), inputs))
    for ours, theirs in zip(firsts[0] + seconds[0], firsts[1] + seconds[1]):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_the_loss_is_that_of_the_equations_in_the_precision_of_the_network():
    """α Σ CE + β Σ (z1 − z2)² + γ Σ (u − r)², by plain sums in double precision."""
    model = opened(small(weights=(0.7, 0.3, 0.2))).double()
    images = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    masks = torch.randint(0, 3, (2, 32, 32))
    masks[0, :5] = 255
    outputs = model.outputs(images)
    judged = masks != 255
    entropy = torch.zeros((), dtype=torch.float64)
    for logits in outputs.logits:
        likely = (logits.exp() / logits.exp().sum(1, keepdim=True)).permute(0, 2, 3, 1)[judged]
        entropy = entropy - likely[torch.arange(len(likely)), masks[judged]].log().mean()
    (first, second) = outputs.guided
    latents = sum(((a.latent - b.latent) ** 2).mean() for a, b in zip(first, second))
    back = sum(((part.inputs - part.reconstruction) ** 2).mean() for part in (*first, *second))
    expected = 0.7 * entropy + 0.3 * latents + 0.2 * back
    found = model.training_loss((images, masks))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_danet_supervises_the_sum_and_each_branch():
    torch.manual_seed(0)
    model = DualAttention(3, backbone="small", dim=8, dropout=0.0)
    with torch.device("meta"):
        assert count_parameters(DualAttention()) == 68_475_961 - 2_049_000  # Table VIII, less an unused classifier
    images, masks = torch.randn(2, 1, 32, 32), torch.randint(0, 3, (2, 32, 32))
    model.eval()
    logits = model._logits(images, heads=3)
    torch.testing.assert_close(model(images), logits[0])
    expected = sum(nn.functional.cross_entropy(part, masks) for part in logits)
    torch.testing.assert_close(model.training_loss((images, masks)), expected)
    model.train().training_loss((images, masks)).backward()
    assert all(p.grad is not None for p in model.parameters())
    last = model.trunk.features(images)
    assert last[-1].shape[2:] == last[1].shape[2:]  # the last two stages keep the second's size


# The authors' weights


@pytest.mark.parametrize("form", ["bare", "DataParallel", "whole module"])
def test_files_as_their_script_writes_them(form, tmp_path):
    shapes = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"][0]["shapes"]
    state = {name: torch.zeros(()).expand(tuple(shape)) for name, shape in shapes.items()}
    file = tmp_path / "Best_MS-Dual-Guided.pth"
    if form == "whole module":
        torch.save(nn.Linear(2, 2), file)
        with pytest.raises(UserError, match="holds objects other than tensors"):
            provenn.from_official("ms_guided_attention", file)
        return
    prefix = "module." if form == "DataParallel" else ""
    torch.save({prefix + name: tensor for name, tensor in state.items()}, file)
    model = provenn.from_official("ms_guided_attention", file)
    assert isinstance(model, GuidedAttentionNet) and not any(p.any() for p in model.parameters())


def test_other_weights_are_refused_in_a_line():
    with pytest.raises(UserError, match="expected DAF_stack"):
        convert({"conv1.weight": torch.zeros(1)})
    names = {
        "resnext.layer0.0.weight": torch.zeros(64, 1, 7, 7),
        "resnext.layer1.1.0.conv2.weight": torch.zeros(128, 4, 3, 3),
        "predict1_2.weight": torch.zeros(5, 64, 1, 1),
    }
    with pytest.raises(UserError, match="groups of 4"):
        convert(names)


@pytest.mark.parametrize("case", [0, 1])
def test_outputs_and_gradients_are_those_of_the_authors_in_double_precision(case):
    """In single precision gradients of random weights are ill-conditioned; see `golden.json` for outputs there."""
    here = Path(__file__).parent
    golden = json.loads((here / "golden_double.json").read_text())["cases"][case]
    shapes = json.loads((here / "golden.json").read_text())["cases"][0]["shapes"]
    state = seeded_state({name: tuple(shape) for name, shape in shapes.items()}, golden["seed"])
    preset, options, ours = convert(state)
    model = provenn.paper("ms_guided_attention").build(preset, **options).double().eval()
    model.load_state_dict(ours)
    x = torch.from_numpy(seeded_array(golden["shape"], "input", golden["seed"])).requires_grad_()
    output = model(x)
    assert_values(output, golden["output"], 1e-9)
    output.backward(torch.from_numpy(seeded_array(output.shape, "gradient", golden["seed"])))
    assert_values(x.grad, golden["gradient"], 1e-8, "gradient")
    parameters = dict(model.named_parameters())
    for name, expected in golden["weights"].items():
        renamed = next(key for key, value in ours.items() if value is state[name])
        assert_values(parameters[renamed].grad, expected, 1e-8, name)
