"""RPE and RRA: their closed forms, their invariances, their gradients; the system, its bank and its counts."""

import copy
import inspect
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from provenn import catalog
from provenn.core import progress
from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.inference.options import options_of
from provenn.papers.rbi import (
    RBI,
    RPE,
    RRA,
    RelationLayer,
    SmallCNN,
    convnext,
    densenet,
    normalised_psnr,
    rbi_convnext_b,
    rbi_densenet169,
    rbi_densenet201,
    rbi_regions,
    rbi_resnet50,
    rbi_vit_b16,
    vit_b16,
)
from provenn.papers.rbi import model as rbi_model
from provenn.papers.rbi.model import loss

DOUBLE = torch.float64


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def pictures(count: int, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def stirred(module: nn.Module) -> nn.Module:
    """Off the zeros that weights start at."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def same(actual, expected, tolerance: float = 1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Small(nn.Module):
    """Pixels to features, without a norm that mixes images."""

    def __init__(self, dim: int = 8, side: int = 8):
        super().__init__()
        self.project = nn.Linear(3 * side * side, dim)

    def forward(self, x):
        return self.project(x.flatten(1))


def system(**options) -> RBI:
    torch.manual_seed(0)
    options = {"feat_dim": 8, "mean": [0.0] * 3, "std": [1.0] * 3, **options}
    return stirred(RBI(Small(), 5, **options).double()).eval()


# RPE


@pytest.mark.parametrize("delta", [0.02, 0.1, 0.3, 0.9])
def test_the_psnr_of_two_even_images_has_a_closed_form(delta: float):
    dark = torch.full((1, 3, 5, 7), 0.05, dtype=DOUBLE)
    s = normalised_psnr(torch.cat([dark, dark + delta]))
    same(s[0, 1].item(), -20 * math.log10(delta) / 40, 1e-9)
    assert normalised_psnr(torch.cat([dark, dark + 0.1]))[0, 1].item() == pytest.approx(0.5)


def test_the_scores_are_symmetric_between_0_and_1_and_1_with_oneself():
    for dtype in (torch.float32, DOUBLE):
        s = normalised_psnr(pictures(9).to(dtype))
        assert torch.equal(s, s.T) and torch.equal(s.diagonal(), torch.ones(9, dtype=dtype))
        assert (s >= 0).all() and (s <= 1).all()


def test_the_gram_form_equals_the_errors_pixel_by_pixel():
    x = pictures(6)
    errors = (x[:, None] - x[None]).square().flatten(2).mean(2)
    expected = (-10 * errors.clamp(min=1e-4).log10() / 40).clamp(0, 1)
    same(normalised_psnr(x), expected)
    same(normalised_psnr(x[:2], x[2:]), expected[:2, 2:])
    single = normalised_psnr(x.float())
    same(single, expected.float(), 1e-5)


def test_a_score_by_cap_is_of_its_pair_and_by_minmax_of_the_whole_batch():
    x = pictures(8)
    x[6] = x[0] + 0.03  # a near copy joins
    same(normalised_psnr(x)[:5, :5], normalised_psnr(x[:5]))
    alone, joined = (normalised_psnr(part, norm="minmax")[:5, :5] for part in (x[:5], x))
    assert (alone - joined).abs().max() > 0.1
    rest = ~torch.eye(5, dtype=torch.bool)
    assert alone[rest].min() == 0 and alone[rest].max() == 1


@pytest.mark.parametrize("norm", ["cap", "minmax"])
def test_one_image_none_and_duplicates_are_finite(norm: str):
    x = pictures(3)
    assert normalised_psnr(x[:0], norm=norm).shape == (0, 0)
    assert normalised_psnr(x[:1], norm=norm).item() == 1
    twice = normalised_psnr(torch.cat([x[:1], x[:1]]), norm=norm)
    assert torch.equal(twice, torch.ones(2, 2, dtype=DOUBLE))
    three = normalised_psnr(torch.cat([x[:1], x[:2]]), norm=norm)
    assert three.isfinite().all() and three[0, 1] == 1


def test_standardised_images_are_compared_by_their_pixels_also_under_autocast():
    mean, std, x = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), pictures(4, 16).float()
    encode = RPE(mean, std)
    given = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    same(encode(given), normalised_psnr(x), 1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            same(encode(given), normalised_psnr(x), 1e-5)
    # Taken as they come, standardised images are far apart: their range is not 0…1.
    assert (RPE((0.0,) * 3, (1.0,) * 3)(given) - encode(given)).abs().max() > 0.05


def test_images_shrink_by_means_over_areas():
    x = pictures(2, 8)
    small = RPE((0.0,) * 3, (1.0,) * 3, size=4)
    same(small.pixels(x.float()), nn.functional.avg_pool2d(x.float(), 2), 1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"norm": "max"}, "cap, minmax, got 'max'"),
        ({"floor": 0.0}, "between 0 and 1, got 0.0"),
        ({"size": 0}, "at least 1 pixel, got 0"),
        ({"std": (0.0,)}, "std above 0"),
    ],
)
def test_bad_encodings_are_refused(arguments, says: str):
    with pytest.raises(ValueError, match=says):
        RPE(**arguments)


def test_images_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        normalised_psnr(pictures(2), pictures(2, 4))


# RRA

KINDS = [
    {"heads": heads, "residual": residual, "relation": relation, "norm": norm}
    for heads, residual, relation, norm in (
        (1, "gated", "given", True), (2, "gated", "given", False), (4, "add", "given", True),
        (1, "linear", "none", True),
        (2, "gated", "features", True), (8, "add", "features", False),
    )
]  # fmt: skip


def related(kind, batch: int = 6) -> tuple[RRA, torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(0)
    layer = stirred(RRA(8, **kind).double())
    s = normalised_psnr(pictures(batch)) if kind.get("relation", "given") == "given" else None
    return layer, noise(batch, 8), s


@pytest.mark.parametrize("kind", KINDS)
def test_the_factored_form_equals_the_sum_as_it_is_written_with_gradients(kind):
    gradients = []
    for form in ("forward", "direct"):
        layer, x, s = related(kind)
        x.requires_grad_()
        y = getattr(layer, form)(x, s)
        (y * noise(*y.shape, seed=3)).sum().backward()
        gradients.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for ours, written in zip(*gradients, strict=True):
        same(ours, written, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_a_batch_orders_the_outputs(kind):
    layer, x, s = related(kind)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    y = layer(x, s)
    same(layer(x[order], None if s is None else s[order][:, order]), y[order])
    assert (layer(x[:5], None if s is None else s[:5, :5]) - y[:5]).abs().max() > 1e-3  # who else is there counts


def test_rows_of_the_attention_are_shares_and_the_gate_lies_between():
    layer, x, s = related({"heads": 2})
    view = layer.relate(x, s)
    same(view.attention.sum(2), torch.ones(2, 6, dtype=DOUBLE))
    entropy = -(view.attention * view.attention.log()).sum(2)
    assert (entropy <= math.log(6) + 1e-12).all()
    assert (view.gate > 0).all() and (view.gate < 1).all()


def test_alone_a_value_and_the_edge_are_what_comes():
    layer, x, _ = related({})
    n = nn.functional.layer_norm(x, (8,))
    m, r = layer.value(n) + layer.edge, layer.root(n)
    beta = layer.gate(torch.cat([m, r, m - r], 1)).sigmoid()
    expected = beta * r + (1 - beta) * m
    same(layer.alone(x).features, expected)
    for i in range(6):
        same(layer(x[i : i + 1], torch.ones(1, 1, dtype=DOUBLE)), expected[i : i + 1])


def test_scores_that_are_all_alike_leave_the_attention_and_shift_what_is_mixed():
    layer, x, _ = related({})
    even = torch.full((6, 6), 0.7, dtype=DOUBLE)
    plain, with_edges = layer.relate(x, torch.zeros_like(even)), layer.relate(x, even)
    same(with_edges.attention, plain.attention)
    without = RRA(8, relation="none").double()
    without.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "edge"})
    same(without.relate(x).attention, plain.attention)
    same(without(x), layer(x, torch.zeros_like(even)))
    linear = RRA(8, residual="linear").double()
    linear.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "gate.weight"})
    same(linear(x, even) - linear(x, torch.zeros_like(even)), (0.7 * layer.edge).expand(6, 8).detach(), 1e-10)


def test_images_alike_get_outputs_alike():
    layer, x, _ = related({})
    images = pictures(6)
    x[4], images[4] = x[1], images[1]
    y = layer(x, normalised_psnr(images))
    same(y[4], y[1])


def test_added_it_is_nothing_at_first():
    torch.manual_seed(0)
    layer, x = RRA(8, residual="add", heads=2), noise(5, 8).float()
    assert torch.equal(layer(x, normalised_psnr(pictures(5)).float()), x)
    assert torch.equal(layer.alone(x).features, x)


def test_gradients_are_right_pass_between_images_and_end_before_the_pixels():
    layer, x, _ = related({"heads": 2}, 4)
    images = pictures(4).requires_grad_()
    s = normalised_psnr(images)
    assert not s.requires_grad
    x.requires_grad_()
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *given):
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x, s))

    assert torch.autograd.gradcheck(function, (x, *parameters))
    (of_others,) = torch.autograd.grad(layer(x, s)[0].square().sum(), x)
    assert of_others[1:].abs().max(1).values.min() > 1e-6


def test_the_gate_saturates_on_large_features_only_without_the_norm():
    x, s = 35 * noise(6, 8), normalised_psnr(pictures(6))
    far = []
    for norm in (True, False):
        torch.manual_seed(0)
        layer = stirred(RRA(8, norm=norm).double())
        far.append(float((layer.relate(x, s).gate.detach() - 0.5).abs().max()))
    assert far[0] < 0.49 < far[1]


@pytest.mark.parametrize("dim", [768, 1024, 1664, 1920, 2048])
def test_parameters_are_four_matrices_and_four_vectors(dim: int):
    with torch.device("meta"):
        assert count_parameters(RRA(dim)) == 4 * (dim**2 + dim) + 4 * dim
    known = {1024: 4_202_496, 1664: 11_088_896, 1920: 14_760_960, 2048: 16_793_600}
    assert known.get(dim, count_parameters(RRA(dim))) == 4 * (dim**2 + dim) + 4 * dim


def test_memory_grows_with_the_square_of_the_batch_and_not_with_the_features():
    """Bytes that are kept for the way back: no tensor of B×B×d is among them."""

    def kept(batch: int, form: str) -> int:
        layer, x = RRA(64, residual="linear"), torch.randn(batch, 64)
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            getattr(layer, form)(x.requires_grad_(), torch.rand(batch, batch))
        return max(sizes)

    assert kept(128, "forward") == 128**2 and kept(128, "direct") == 128**2 * 64


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"heads": 3}, "divide the width 8, got 3"),
        ({"residual": "sum"}, "gated, add, linear, got 'sum'"),
        ({"relation": "psnr"}, "given, features, none, got 'psnr'"),
        ({"residual": "add", "out": 4}, "out must be 8, got 4"),
        ({"dropout": 1.0}, "below 1, got 1.0"),
        ({"out": 0}, "at least 1"),
    ],
)
def test_bad_attention_is_refused(arguments, says: str):
    with pytest.raises(ValueError, match=says):
        RRA(8, **arguments)


def test_relations_that_are_missing_or_of_another_batch_are_refused():
    with pytest.raises(ValueError, match="none came"):
        RRA(8)(torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"must be \(3, 3\), got \(2, 2\)"):
        RRA(8)(torch.randn(3, 8), torch.rand(2, 2))
    with pytest.raises(ValueError, match=r"a matrix of \(3, 3\) came"):
        RRA(8, relation="none")(torch.randn(3, 8), torch.rand(3, 3))


# The system


def test_a_batch_is_equivariant_and_single_images_keep_to_themselves():
    model, x = system(), pictures(6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    together = model(x, "batch")
    same(model(x[order], "batch"), together[order], 1e-10)
    alone = model(x)
    assert (alone - together).abs().max() > 1e-3
    same(model(x[2:3]), alone[2:3], 1e-10)
    same(model(x[2:3], "batch"), alone[2:3], 1e-10)
    same(model.train()(x), together, 1e-10)


def test_with_a_bank_no_test_image_changes_another():
    model = system(support=6, rpe_size=4)
    x, bank = pictures(5), pictures(4, seed=1)
    same(model(x), model(x, "single"), 1e-10)  # an empty bank is none
    assert model.build_bank([bank[:3], (bank[3:], torch.zeros(1))]) == 4
    assert model.relation.bank_counted.tolist() == [True] * 4 + [False] * 2
    y = model(x)
    assert (y - model(x, "single")).abs().max() > 1e-4
    for i in range(5):
        same(model(x[i : i + 1]), y[i : i + 1], 1e-10)
    other = x.clone()
    other[1:] = pictures(4, seed=7)
    same(model(other)[:1], y[:1], 1e-10)
    # It is what a batch gives whose other images do not ask.
    n = model.embed(torch.cat([x[:1], bank]))
    pixels = model.relation.encode.pixels(torch.cat([x[:1], bank]))
    s = model.relation.encode.compare(pixels).double()
    same(model.head(model.relation.attend(n, s))[:1], y[:1], 1e-6)


def test_minmax_with_a_bank_is_of_each_row():
    model = system(support=4, rpe_size=4, rpe_norm="minmax")
    model.build_bank([pictures(4, seed=1)])
    x = pictures(5)
    same(model(x[:1]), model(x)[:1], 1e-10)


def test_a_bank_is_saved_and_loaded():
    model, x = system(support=3, rpe_size=4), pictures(4)
    model.build_bank([pictures(3, seed=1)])
    other = RBI(Small(), 5, feat_dim=8, mean=[0.0] * 3, std=[1.0] * 3, support=3, rpe_size=4).double().eval()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    same(other(x), model(x))


def test_the_bank_after_training_is_of_the_last_images():
    model = system(support=4, rpe_size=8).train()
    batches = [pictures(3, seed=seed) for seed in range(3)]
    for batch in batches:
        loss(model, batch, torch.tensor([0, 1, 2]))
    model.before_saving()
    last = torch.cat([batches[2].flip(0), batches[1].flip(0)[:1]])
    same(model.relation.bank_pixels, last, 1e-5)
    same(model.relation.bank, model.embed(last))
    assert model.relation.bank_counted.all() and model.seen == [] and model.mates is None


def test_a_training_that_is_resumed_with_no_step_left_has_its_bank():
    """A checkpoint holds weights and buffers alone: what was seen is not in it."""
    trained, resumed = (system(support=4, rpe_size=8) for _ in range(2))
    batches = [pictures(3, seed=seed) for seed in range(3)]
    for batch in batches:
        loss(trained.train(), batch, torch.tensor([0, 1, 2]))
    resumed.load_state_dict(copy.deepcopy(trained.state_dict()))
    for model in (trained, resumed):
        model.eval().before_saving()
    assert resumed.relation.bank_counted.all()
    same(resumed.relation.bank_pixels, trained.relation.bank_pixels, 1e-5)
    same(resumed.relation.bank, trained.relation.bank)
    same(resumed(pictures(2, seed=9)), trained(pictures(2, seed=9)), 1e-5)
    few = system(support=4, rpe_size=8).train()
    loss(few, pictures(3), torch.tensor([0, 1, 2]))
    assert few.relation.bank_counted.tolist() == [True, True, True, False]


def test_an_incomplete_batch_is_filled_up_from_the_one_before():
    model = system().train()
    first, rest = pictures(4), pictures(2, seed=1)
    loss(model, first, torch.tensor([0, 1, 2, 3]))
    logits, plain = model.training_logits(rest)
    assert plain is None
    same(logits, model(torch.cat([rest, first[:2]]), "batch")[:2], 1e-10)
    assert (logits - model(rest, "batch")).abs().max() > 1e-4
    again, _ = model.training_logits(first)  # a full one is not filled up
    same(again, model(first, "batch"), 1e-10)


def test_the_second_loss_is_of_each_image_alone():
    x, labels = pictures(4), torch.tensor([0, 1, 2, 3])
    plain, both = (loss(system(aux_weight=weight).train(), x, labels) for weight in (0, 0.5))
    alone = nn.functional.cross_entropy(system()(x, "single"), labels)
    same(both, plain + 0.5 * alone, 1e-10)


def test_mixed_images_are_refused():
    with pytest.raises(UserError, match="mixup=0, cutmix=0"):
        loss(system(), pictures(2), torch.rand(2, 5))


def test_a_dead_gate_is_named(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    model = system().train()
    with torch.no_grad():
        model.relation.attend.gate.weight.zero_()
    loss(model, pictures(4), torch.tensor([0, 1, 2, 3]))
    assert model.relation.gate_mean == pytest.approx(0.5)
    model.before_saving()
    assert not said
    model.relation.gate_mean = 0.999
    model.before_saving()
    assert "β is 0.999" in said[0] and "attention over the batch counts for nothing" in said[0]


def test_a_plain_network_is_backbone_and_classifier():
    model, x = system(plain=True), pictures(4)
    assert torch.equal(model(x, "batch"), model.head(model.backbone(x)))
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "head"}
    with pytest.raises(UserError, match="plain=True"):
        model.view(x)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rpe": "pixels"}, "npsnr, features, none, got 'pixels'"),
        ({"support": -1}, "at least 0, got -1"),
        ({"support": 4}, "give one, such as 32"),
        ({"batch": 0}, "at least 1"),
        ({"aux_weight": -1}, "at least 0"),
    ],
)
def test_bad_systems_are_refused(options, says: str):
    with pytest.raises(ValueError, match=says):
        RBI(Small(), 5, feat_dim=8, **options)


def test_protocols_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="batch, single, support, got 'all'"):
        system()(pictures(2), "all")
    with pytest.raises(ValueError, match="no bank"):
        system()(pictures(2), "support")
    with pytest.raises(ValueError, match="pass them"):
        RelationLayer(8)(torch.randn(2, 8), None)
    with pytest.raises(ValueError, match="cannot be built of 0"):
        system(support=2, rpe_size=4).build_bank([])


# What is around it


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: densenet(121), 7_978_856),
        (lambda: densenet(169), 14_149_480),
        (lambda: densenet(201), 20_013_928),
        (lambda: convnext("tiny"), 28_589_128),
        (lambda: convnext("base"), 88_591_464),
        (vit_b16, 86_567_656),
    ],
)
def test_backbones_have_the_published_parameters(build, parameters: int):
    with torch.device("meta"):
        assert count_parameters(build()) == parameters


@pytest.mark.parametrize(
    ("preset", "dim"),
    [
        (rbi_densenet169, 1664),
        (rbi_densenet201, 1920),
        (rbi_convnext_b, 1024),
        (rbi_resnet50, 2048),
        (rbi_vit_b16, 768),
    ],
)
def test_presets_add_one_attention(preset, dim: int):
    with torch.device("meta"):
        whole, plain = (count_parameters(preset(num_classes=200, plain=plain)) for plain in (False, True))
        assert whole - plain == 4 * (dim**2 + dim) + 4 * dim
        model = preset(num_classes=200)
        assert model(torch.zeros(2, 3, 224, 224), "batch").shape == (2, 200)


OPTIONS = {
    "num_classes": 7, "residual": "linear", "heads": 2, "d": 4, "norm": False, "dropout": 0.1, "rpe": "features",
    "rpe_norm": "minmax", "rpe_floor": 1e-3, "rpe_size": 4, "mean": [0.1] * 3, "std": [0.2] * 3, "support": 5,
    "gather": True, "aux_weight": 0.5, "batch": 9, "plain": True,
}  # fmt: skip


@pytest.mark.parametrize("preset", [preset.name for preset in catalog.card("rbi").presets])
def test_every_option_of_the_system_is_one_of_its_presets(preset: str, monkeypatch):
    """`show` names it with its default, and what a user sets arrives."""
    assert {*OPTIONS} == {*inspect.signature(RBI).parameters} - {"backbone", "feat_dim"}
    card = catalog.card("rbi")
    shown = {option.name: option for option in options_of(card, preset)}
    assert {*OPTIONS, "in_channels"} <= {*shown} and shown["rpe_norm"].default == "cap"
    given = {}

    class Recorder(RBI):
        def __init__(self, backbone, num_classes, *, feat_dim, **options):
            given.update(options, num_classes=num_classes)

    monkeypatch.setattr(rbi_model, "RBI", Recorder)
    with torch.device("meta"):
        card.resolve(card.preset(preset).build)(**OPTIONS)
        assert given == OPTIONS
        card.resolve(card.preset(preset).build)(in_channels=2)
    assert (given["mean"], given["std"]) == ((0.0, 0.0), (1.0, 1.0))


def test_the_small_preset_refuses_widths_of_nothing():
    with pytest.raises(ValueError, match="widths and in_channels must be at least 1"):
        rbi_regions(widths=[])


def test_the_width_of_an_unknown_backbone_is_what_it_gives():
    model = RBI(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), 4)
    assert model.relation.dim == 6 and model.training
    assert model.eval()(torch.rand(2, 3, 9, 11)).shape == (2, 4)
    with pytest.raises(UserError, match="tokens or maps"):
        RBI(nn.Flatten(0), 4)


def test_small_networks_refuse_images_that_vanish():
    with pytest.raises(ValueError, match="at least 8×8 pixels"):
        SmallCNN()(torch.rand(1, 3, 7, 9))
    with pytest.raises(ValueError, match="at least 32×32 pixels"):
        densenet(121)(torch.rand(1, 3, 31, 40))


def theirs_and_ours(kind: str):
    """A small network of transformers, and ours with its weights."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "convnext":
        config = t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=5, layer_norm_eps=1e-6)
        theirs = stirred(t.ConvNextForImageClassification(config).double().eval())
        from provenn.papers.rbi import ConvNeXt

        ours = ConvNeXt((1, 2), (8, 16), num_classes=5).double().eval()
        table = {
            "convnext.embeddings.patch_embeddings": "downsample_layers.0.0",
            "convnext.embeddings.layernorm": "downsample_layers.0.1",
            "convnext.encoder.stages.1.downsampling_layer": "downsample_layers.1",
            "convnext.encoder.": "", ".layers.": ".", "layernorm": "norm", "layer_scale_parameter": "gamma",
            "convnext.norm": "norm", "classifier": "head",
        }  # fmt: skip
        state = {}
        for name, value in theirs.state_dict().items():
            for old, new in table.items():
                name = name.replace(old, new)
            state[name] = value
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = t.ViTConfig(image_size=16, patch_size=4, **sizes, num_labels=5, layer_norm_eps=1e-6)
        theirs = stirred(t.ViTForImageClassification(config).double().eval())
        from provenn.papers.rbi import ViT

        ours = ViT(dim=16, depth=2, heads=2, image=(16, 16), patch=4, num_classes=5).double().eval()
        given, state = theirs.state_dict(), {}
        for name in ours.state_dict():
            state[name] = of_vit(name, given)
    ours.load_state_dict(state)
    return theirs, ours, state


def of_vit(name: str, given):
    """A weight of ours from those of transformers."""
    plain = {
        "cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm", "head": "classifier",
    }  # fmt: skip
    stem, _, kind = name.rpartition(".")
    if name in plain:
        return given[plain[name]]
    if stem in plain:
        return given[f"{plain[stem]}.{kind}"]
    _, number, part = stem.split(".", 2)
    for key in given:
        prefix = key.split(f".{number}.")[0]
        if f".{number}." in key and "layer" in prefix:
            break
    start = f"{prefix}.{number}."
    inside = {k.removeprefix(start): v for k, v in given.items() if k.startswith(start)}
    if part == "attn.qkv":
        chosen = [next(v for k, v in inside.items() if k.endswith(f"{n}.{kind}")) for n in QKV(inside)]
        return torch.cat(chosen)
    ends = {
        "norm1": ("layernorm_before",), "norm2": ("layernorm_after",),
        "attn.proj": ("attention.output.dense", "o_proj"),
        "mlp.fc1": ("intermediate.dense", "mlp.fc1"), "mlp.fc2": ("output.dense", "mlp.fc2"),
    }[part]  # fmt: skip
    chosen = [v for k, v in inside.items() if k.endswith(tuple(f"{end}.{kind}" for end in ends))]
    if part == "mlp.fc2":
        chosen = [v for k, v in inside.items() if k in (f"output.dense.{kind}", f"mlp.fc2.{kind}")]
    (value,) = chosen
    return value


def QKV(inside) -> tuple[str, str, str]:
    old = any(k.endswith("query.weight") for k in inside)
    return ("query", "key", "value") if old else ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("kind", ["convnext", "vit"])
def test_backbones_give_the_outputs_and_gradients_of_transformers(kind: str):
    theirs, ours, _ = theirs_and_ours(kind)
    x, results = noise(2, 3, 16, 16), []
    for model in (theirs, ours):
        at = x.clone().requires_grad_()
        y = model(at)
        y = y if isinstance(y, torch.Tensor) else y.logits
        y.square().sum().backward()
        results.append((y.detach(), at.grad))
    for a, b in zip(*results, strict=True):
        same(b, a, 1e-9)


def test_a_vit_sees_other_sides_by_its_positions_between():
    _, ours, _ = theirs_and_ours("vit")
    assert ours(noise(1, 3, 24, 16)).shape == (1, 5)
    x = noise(1, 3, 18, 16)
    same(ours(x), ours(F.pad(x, (0, 0, 0, 2))), 1e-12)  # what a patch reaches beyond is zero


# Data parallelism


def of_a_process(rank: int, folder: str, gather: bool) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = system(gather=gather).train()
    x, labels = pictures(6), torch.tensor([0, 1, 2, 3, 4, 0])
    part = slice(3 * rank, 3 * rank + 3)
    value = nn.functional.cross_entropy(model(x[part], "batch"), labels[part])
    value.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for gradient in gradients:  # as data parallelism takes their mean
        dist.all_reduce(gradient)
    torch.save((model(x[part], "batch").detach(), [g / 2 for g in gradients]), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_that_gather_are_one(tmp_path: Path):
    torch.multiprocessing.spawn(of_a_process, (str(tmp_path), True), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = system().train()
    x, labels = pictures(6), torch.tensor([0, 1, 2, 3, 4, 0])
    y = model(x, "batch")
    nn.functional.cross_entropy(y, labels).backward()
    same(torch.cat([part[0] for part in parts]), y.detach(), 1e-10)
    for ours, parameter in zip(parts[1][1], model.parameters(), strict=True):
        same(ours, parameter.grad, 1e-9)


def test_the_small_preset_trains_on_either_data():
    for channels, side in ((3, 32), (1, 8)):
        model = rbi_regions(num_classes=4, in_channels=channels, support=2, aux_weight=1.0)
        loss(model.train(), torch.rand(4, channels, side, side), torch.tensor([0, 1, 2, 3])).backward()
        model.before_saving()
        assert model.eval()(torch.rand(2, channels, side, side)).shape == (2, 4)


class InBatches(nn.Module):
    """A system whose images always see each other, as `--together` has it."""

    def __init__(self, model: RBI):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images, "batch").softmax(1)


@pytest.mark.parametrize("rpe_size", [None, 4])
def test_recognition_of_a_batch_is_exported_for_any_batch_and_size(rpe_size):
    options = {"mean": [0.0] * 3, "std": [1.0] * 3, "rpe_size": rpe_size, "support": 3 if rpe_size else 0}
    model = InBatches(stirred(RBI(SmallCNN((4, 8)), 5, feat_dim=8, **options).double()).eval())
    traced = torch.rand(4, 3, 20, 26, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    dims = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    exported = torch.export.export(model, (traced,), dynamic_shapes=(dims,)).module()
    for shape in ((4, 3, 20, 26), (2, 3, 33, 17), (7, 3, 16, 41)):
        images = torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
        torch.testing.assert_close(exported(images), model(images))
        assert (model(images) - model.model(images, "single").softmax(1)).abs().max() > 1e-4
