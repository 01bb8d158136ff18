"""The pressure ulcer network: counts, gates, residual blocks, transfer, the loss and its figures."""

import numpy as np
import pytest
import torch
from torch import nn

from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.papers.pressure_ulcer import (
    AttentionGate,
    Block,
    ResidualAttentionUNet,
    open_gates,
    read_start,
    reestimate_norms,
    transfer,
)
from provenn.papers.pressure_ulcer.experiments import drawn_scores
from provenn.papers.pressure_ulcer.losses import overlap_scores, wound_loss
from provenn.training import Recipe

COUNTS = {  # of the definition: plain, with gates, residual, residual with gates
    16: (2_160_417, 2_182_785, 2_248_977, 2_271_345),
    32: (8_633_921, 8_722_169, 8_985_121, 9_073_369),
    64: (34_520_193, 34_870_761, 35_918_913, 36_269_481),
}


def small(**options):
    torch.manual_seed(0)
    return ResidualAttentionUNet(**{"width": 4, "depth": 3, **options})


def moved(model):
    """Norms with statistics and scales of their own."""
    torch.manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 1.5)
    return model


# Sizes


@pytest.mark.parametrize("width", COUNTS)
def test_parameters_are_those_of_the_definition(width):
    with torch.device("meta"):
        counts = tuple(
            count_parameters(ResidualAttentionUNet(width=width, residual=residual, attention=attention))
            for residual in (False, True)
            for attention in ("none", "gate")
        )
    assert counts == COUNTS[width]


def test_the_parts_have_the_parameters_that_they_say():
    c = 32
    assert count_parameters(AttentionGate(c)) == c * c + 5 * c // 2 + 2
    plain = count_parameters(Block(c))
    assert count_parameters(Block(c, attention="cbam")) - plain == 2 * c * c // 16 + 98
    assert count_parameters(Block(c, attention="se")) - plain == 2 * c * c // 16
    assert count_parameters(Block(c, residual=False)) == plain, "a shortcut of one width has no parameters"
    assert count_parameters(Block(c, 2 * c)) - count_parameters(Block(c, 2 * c, residual=False)) == 2 * c * c + 4 * c


@pytest.mark.parametrize("size", [(32, 48), (45, 37), (1, 1), (3, 70)])
@pytest.mark.parametrize("options", [{}, {"gate_scale": "coarse"}, {"attention": "cbam"}, {"norm": "group"}])
def test_the_output_has_the_size_of_the_input(size, options):
    model = small(**options).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 1, *size)


def test_padding_reaches_no_further_than_the_receptive_field():
    model = moved(small(depth=2)).eval()
    x = torch.randn(1, 3, 40, 40)
    whole, cut = model(x), model(x[..., :39, :37])
    torch.testing.assert_close(cut[..., :20, :20], whole[..., :20, :20])
    assert not torch.allclose(cut[..., -1], whole[..., :39, 36])


@pytest.mark.parametrize(
    "options, said",
    [
        ({"width": 0}, "width must be at least 1"),
        ({"attention": "both"}, "attention must be one of"),
        ({"gate_scale": "finer"}, "scale must be one of"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"wound_share": 1.0}, "wound_share must lie between"),
        ({"tversky": (0.3,)}, "tversky must be two numbers"),
        ({"freeze_encoder": True}, "give start too"),
        ({"depth": 9}, "depth must be from 1 to 8"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        small(**options)


def test_the_head_starts_at_the_share_of_wound():
    model = small(wound_share=0.1)
    assert model.head.bias.sigmoid().item() == pytest.approx(0.1)


# Gates and blocks


def test_with_gates_open_the_network_is_the_one_without():
    gated = moved(small()).eval()
    plain = small(attention="none").eval()
    plain.load_state_dict({name: x for name, x in gated.state_dict().items() if ".gate." not in name})
    x = torch.randn(2, 3, 20, 24)
    expected = plain(x)
    assert not torch.allclose(gated(x), expected)
    before = {name: value.clone() for name, value in gated.state_dict().items()}
    with open_gates(gated):
        assert torch.equal(gated(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in gated.state_dict().items())


def test_a_closed_gate_lets_nothing_of_its_level_through():
    model = moved(small()).eval()
    score = model.decoder[-1].gate.score[1]
    with torch.no_grad():
        score.weight.zero_()
        score.bias.fill_(-1e4)
    x = torch.randn(1, 3, 16, 16)
    skips = model._encoded(x)
    below = model.decoder[0](skips[2], skips[1])
    torch.testing.assert_close(
        model.decoder[1](below, skips[0]), model.decoder[1](below, torch.randn_like(skips[0])), rtol=0, atol=0
    )


@pytest.mark.parametrize("scale", ["fine", "coarse"])
def test_a_gate_has_one_value_a_pixel_between_0_and_1(scale):
    gate = moved(AttentionGate(6, scale=scale)).eval()
    x = torch.randn(2, 6, 8, 10)
    alpha = gate.gate(x, torch.randn(2, 6, 8, 10) if scale == "fine" else torch.randn(2, 6, 4, 5))
    assert alpha.shape == (2, 1, 8, 10) and bool(((alpha > 0) & (alpha < 1)).all())
    model = small(gate_scale=scale).eval()
    maps = model.attention_maps(torch.randn(1, 3, 21, 30))
    assert [tuple(each.shape[2:]) for each in maps] == [(11, 15), (21, 30)]
    assert small(attention="none").attention_maps(torch.randn(1, 3, 8, 8)) == []


@pytest.mark.parametrize("out", [6, 9])
def test_a_block_whose_last_norm_is_silent_is_its_shortcut(out):
    block = moved(Block(6, out)).eval()
    with torch.no_grad():
        block.second[1].weight.zero_()
        block.second[1].bias.zero_()
    x = torch.randn(2, 6, 7, 5)
    assert torch.equal(block(x), block.shortcut(x).relu())


# Transfer


def test_transfer_takes_all_but_another_head(tmp_path):
    source, target = moved(small()), small(num_classes=2)
    fresh = transfer(target, source.state_dict())
    assert fresh == ["head.weight", "head.bias"]
    state = source.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in target.state_dict().items() if name not in fresh)
    with pytest.raises(ValueError, match=r"head\.weight: expected"):
        transfer(small(num_classes=2), state, strict_head=True)
    with pytest.raises(ValueError, match=r"expected .* of the source network"):
        transfer(small(width=5), state)
    with pytest.raises(ValueError, match="which this one has not"):
        transfer(small(attention="none"), state)


def test_a_frozen_encoder_keeps_weights_and_norms(tmp_path):
    from safetensors.torch import save_file

    source = moved(small())
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = small(start=str(tmp_path), freeze_encoder=True).train()
    optimizer = model.optimizers(Recipe(optimizer="adam", lr=0.1))
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.01)] * len(optimizer.param_groups)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 16, 16)).square().mean().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("encoder") for name in changed)
    assert {"head.bias", "decoder.0.up.0.weight", "decoder.0.up.1.running_mean"} <= changed


def test_a_start_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="no weights at"):
        read_start(tmp_path / "none")
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"can be read"):
        read_start(tmp_path / "a.safetensors")


def test_norms_are_estimated_again_from_all_batches():
    model = small()
    batches = [torch.randn(3, 3, 16, 16) + 2 for _ in range(3)]
    reestimate_norms(model, batches)
    conv, norm = model.encoder[0].first
    means = torch.stack([conv(batch).mean((0, 2, 3)) for batch in batches])
    torch.testing.assert_close(norm.running_mean, means.mean(0), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1 and not model.training


# Loss and figures


def test_the_loss_is_cross_entropy_and_dice_and_finite_without_a_wound():
    logits = torch.randn(3, 8, 8, requires_grad=True)
    mask = (torch.rand(3, 8, 8) > 0.7).to(torch.uint8)
    mask[2] = 0
    probability = logits.sigmoid()
    dice = (2 * (probability * mask).sum((1, 2)) + 2) / (probability.sum((1, 2)) + mask.sum((1, 2)) + 2)
    expected = nn.functional.binary_cross_entropy(probability, mask.float()) + 0.7 * (1 - dice).mean()
    torch.testing.assert_close(wound_loss(logits, mask, dice=0.7), expected)
    wound_loss(logits, mask).backward()
    assert bool(logits.grad.isfinite().all())
    missed, added = mask.float(), mask.float()
    missed, added = missed * (torch.rand_like(missed) > 0.5), (added + (torch.rand_like(added) > 0.8)).clamp(max=1)
    told = lambda m: 20 * (2 * m - 1)  # noqa: E731  # logits of a mask
    favours = [
        wound_loss(told(m), mask, tversky=(0.3, 0.7)) - wound_loss(told(m), mask, dice=0) for m in (missed, added)
    ]
    halves = [wound_loss(told(m), mask) - wound_loss(told(m), mask, dice=0) for m in (missed, added)]
    assert favours[0] > halves[0] and favours[1] < halves[1], "0.3 and 0.7 weigh what is missed more"


def test_identities_of_the_figures_hold_on_random_masks():
    found = drawn_scores(2000, 12, 3)
    dice, iou, accuracy = found["dice"], found["iou"], found["accuracy"]
    assert np.allclose(iou, dice / (2 - dice)) and bool((iou <= accuracy + 1e-12).all())
    assert dice.mean() / (2 - dice.mean()) - 1e-12 <= iou.mean() <= dice.mean() + 1e-12
    assert ((found["iou"] + found["skin"]) / 2 <= accuracy + 1e-12).all()


def test_two_empty_masks_are_alike_and_a_perfect_one_has_all():
    zero, some = np.array([0, 5, 0]), np.array([0, 5, 4])
    found = overlap_scores(zero, zero, some, np.array([9, 9, 9]))
    assert found["dice"].tolist() == found["iou"].tolist() == [1, 1, 0]
    assert found["accuracy"].tolist() == [1, 1, pytest.approx(5 / 9)]
