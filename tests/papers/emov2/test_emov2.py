import itertools
import json

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import provenn
from provenn.cli import main
from provenn.core import cost
from provenn.nn.fusion import fuse
from provenn.nn.mobilenet import InvertedResidual
from provenn.nn.segmentation import HEADS
from provenn.papers.emov2 import (
    EMO,
    I2RMB,
    SEWMHSA,
    DEMOv2,
    EMOv2,
    ModulatedI2RMB,
    emo,
    emov2,
    emov2_baseline,
    emov2_diffusion,
    emov2_diffusion_digits,
    emov2_retinanet,
    emov2_segmenter,
    emov2_small,
    emov2_small_segmenter,
    emov2_ssdlite,
    experiments,
    group_pixels,
    studies,
    ungroup_pixels,
)
from provenn.papers.emov2.census import AUTHORS, CLASSES, count_stages, shapes_digest
from provenn.papers.emov2.official import convert
from provenn.testing import seeded_state

MODES = ("remote", "close", "spanning")


@pytest.fixture
def no_shape_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def attention(mode: str = "spanning", **options) -> SEWMHSA:
    torch.manual_seed(0)
    layer = SEWMHSA(16, 32, mode=mode, **{"window": 7, "head_dim": 8, **options}).double().eval()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(layer: SEWMHSA, x: torch.Tensor, grouping: str) -> torch.Tensor:
    """One grouping, a pixel at a time, from the definition."""
    batch, _, height, width = x.shape
    w = layer.window
    rows, columns = -(-height // w) * w, -(-width // w) * w
    padded = x.new_zeros(batch, x.shape[1], rows, columns)
    padded[..., :height, :width] = x
    q, k = layer.qk(padded).chunk(2, dim=1)
    v = layer.v(padded)
    q, k, v = (z.unflatten(1, (layer.heads, -1)) for z in (q, k, v))
    n1, n2 = rows // w, columns // w

    def company(position: int, n: int) -> list[int]:
        if grouping == "close":
            return [position // w * w + i for i in range(w)]
        return [i * n + position % n for i in range(w)]

    y = torch.zeros(batch, layer.heads, v.shape[2], height, width, dtype=x.dtype)
    for r, c in itertools.product(range(height), range(width)):
        positions = list(itertools.product(company(r, n1), company(c, n2)))
        keys = torch.stack([k[..., a, b] for a, b in positions], dim=-1)
        values = torch.stack([v[..., a, b] for a, b in positions], dim=-1)
        scores = torch.einsum("bhd,bhdt->bht", q[..., r, c], keys) / q.shape[2] ** 0.5
        y[..., r, c] = torch.einsum("bht,bhdt->bhd", scores.softmax(-1), values)
    return y.flatten(1, 2)


# The groups of pixels


@given(st.sampled_from(["close", "remote"]), *[st.integers(1, 4)] * 4, st.sampled_from([1, 2, 4]))
def test_ungrouping_undoes_grouping(grouping, w1, w2, n1, n2, heads):
    x = torch.arange(2.0 * 8 * w1 * n1 * w2 * n2).view(2, 8, w1 * n1, w2 * n2)
    groups = group_pixels(x, grouping, (w1, w2), heads)
    assert groups.shape == (2 * n1 * n2, heads, w1 * w2, 8 // heads)
    assert torch.equal(ungroup_pixels(groups, grouping, (w1, w2), (w1 * n1, w2 * n2)), x)


def test_groups_of_a_pixel():
    index = torch.arange(14.0 * 14).view(1, 1, 14, 14)

    def company(grouping: str) -> set[tuple[int, int]]:
        groups = group_pixels(index, grouping, (7, 7))[:, 0, :, 0].long()
        (mine,) = [group for group in groups.tolist() if 3 * 14 + 5 in group]
        return {divmod(p, 14) for p in mine}

    assert company("close") == set(itertools.product(range(7), range(7)))
    assert company("remote") == set(itertools.product(range(1, 14, 2), range(1, 14, 2)))


def test_remote_rows_of_a_larger_map_are_congruent():
    index = torch.arange(28.0)[:, None].expand(28, 28)[None, None]
    groups = group_pixels(index, "remote", (7, 7))[:, 0, :, 0]
    assert all(len({int(row) % 4 for row in group}) == 1 for group in groups)


@pytest.mark.parametrize("mode, count", [("remote", 49), ("close", 49), ("spanning", 89)])
def test_reach_of_one_pixel(mode, count):
    layer = attention(mode)
    x = noise(1, 16, 14, 14).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0, :, 3, 5].square().sum(), x)
    assert int((gradient[0].abs().sum(0) > 1e-12).sum()) == count


# Spanning attention


@pytest.mark.parametrize("grouping", ["close", "remote"])
@pytest.mark.parametrize("sides", [(6, 6), (4, 7)])
def test_attention_is_its_definition(grouping, sides):
    layer, x = attention(grouping, window=3), noise(2, 16, *sides)
    torch.testing.assert_close(layer(x), by_hand(layer, x, grouping))


@pytest.mark.parametrize("sides", [(14, 14), (9, 17), (3, 5)])
@pytest.mark.parametrize("window", [7, 0])
def test_spanning_is_the_sum_of_remote_and_close(sides, window):
    x, state = noise(2, 16, *sides), attention().state_dict()
    outputs = {}
    for mode in MODES:
        layer = attention(mode, window=window)
        layer.load_state_dict(state)
        outputs[mode] = layer(x)
    torch.testing.assert_close(outputs["spanning"], outputs["remote"] + outputs["close"])
    if window == 0 or max(sides) <= 7:  # one group: both are global attention
        torch.testing.assert_close(outputs["spanning"], 2 * outputs["close"])
    else:
        assert (outputs["remote"] - outputs["close"]).abs().max() > 0.1


def test_whole_map_as_one_window_is_global_attention():
    layer, x = attention("close", window=0), noise(1, 16, 4, 5)
    q, k = layer.qk(x).chunk(2, dim=1)
    q, k, v = (z.unflatten(1, (2, -1)).flatten(3).mT for z in (q, k, layer.v(x)))
    expected = ((q @ k.mT) * 8**-0.5).softmax(-1) @ v
    torch.testing.assert_close(layer(x), expected.mT.reshape(1, 32, 4, 5))


def test_padding_takes_part_with_the_biases():
    """The zeros are put in before the projections: where a bias is, padded pixels are seen."""
    layer, x = attention("close"), noise(1, 16, 5, 5)
    before = layer(x)
    nn.init.constant_(layer.v[0].bias, 3.0)
    padded_share = layer(x)
    nn.init.zeros_(layer.qk.weight)
    nn.init.zeros_(layer.v[0].weight)
    phi = nn.functional.gelu(torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(layer(x), phi.expand(1, 32, 5, 5))
    assert (padded_share - before).abs().max() > 0.1
    nn.init.zeros_(layer.v[0].bias)
    layer.v[0].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    mean = layer.v(x).mean((2, 3)) * 25 / 49  # uniform attention over 49 pixels, of which 24 have the value φ(0) = 0
    torch.testing.assert_close(layer(x), mean[..., None, None].expand(1, 32, 5, 5))


def test_swapping_queries_and_keys_transposes_the_scores():
    layer, x = attention("close", window=0, head_dim=16), noise(1, 16, 3, 3)
    swapped = attention("close", window=0, head_dim=16)
    swapped.load_state_dict(layer.state_dict())
    with torch.no_grad():
        swapped.qk.weight.copy_(layer.qk.weight.roll(16, 0))
        swapped.qk.bias.copy_(layer.qk.bias.roll(16))

    def scores(of: SEWMHSA) -> torch.Tensor:
        q, k = of.qk(x).flatten(2).chunk(2, dim=1)
        return q.mT @ k

    torch.testing.assert_close(scores(swapped), scores(layer).mT)
    assert (layer(x) - swapped(x)).abs().max() > 1e-2


def test_order_of_attention_and_projection_matters_with_an_activation():
    x = noise(1, 16, 8, 8)
    for activation, differs in (("gelu", True), ("none", False)):
        after, first = (
            SEWMHSA(16, 32, window=4, head_dim=16, mode="close", activation=activation, attend_first=order).double()
            for order in (False, True)
        )
        first.load_state_dict(after.state_dict())
        # One head and one grouping: a linear map and an average over pixels may be exchanged.
        assert bool((after(x) - first(x)).abs().max() > 1e-3) == differs


def test_attending_first_puts_the_close_half_back_where_it_was():
    """The authors' code does not: with as good as no remote half, a far pixel would be reached."""
    layer = attention(attend_first=True, window=2)
    x = noise(1, 16, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0, :, 0, 0].sum(), x)
    reached = {divmod(int(p), 8) for p in (gradient[0].abs().sum(0) > 1e-12).flatten().nonzero()}
    assert reached == {(0, 0), (0, 1), (1, 0), (1, 1), (0, 4), (4, 0), (4, 4)}


# The block


def block(**options) -> I2RMB:
    torch.manual_seed(0)
    return I2RMB(16, **{"head_dim": 8, "window": 4, "exp_ratio": 2, "layer_scale": 1.0, **options}).double().eval()


@pytest.mark.parametrize("mode", ["conv", "remote", "close", "spanning"])
def test_block_without_layer_scale_is_the_identity(mode):
    layer, x = block(mode=mode), noise(2, 16, 9, 6)
    nn.init.zeros_(layer.scale)
    assert torch.equal(layer(x), x)


def test_block_is_its_equation():
    x = noise(2, 16, 9, 6)
    layer = block(mode="conv", norm="batch", activation="silu")
    e = layer.operator(layer.norm(x))
    t = e + layer.local(e)
    torch.testing.assert_close(layer(x), x + layer.scale[:, None, None] * layer.project(t))
    down = block(mode="conv", stride=2, dim_out=24)
    expected = down.scale[:, None, None] * down.project(down.local(down.operator(down.norm(x))))
    assert down(x).shape == (2, 24, 5, 3)
    torch.testing.assert_close(down(x), expected)
    plain = block(mode="conv", kernel_size=0)  # l(e) = e
    doubled = x + plain.scale[:, None, None] * plain.project(2 * plain.operator(plain.norm(x)))
    torch.testing.assert_close(plain(x), doubled)


def test_block_covers_the_transformers_parts():
    """An attention and a feed-forward block are the Meta Mobile Block with other settings (abstract)."""
    x = noise(2, 16, 4, 4)
    attend = block(mode="close", window=0, exp_ratio=1, kernel_size=0, activation="none", layer_scale=None)
    host = nn.MultiheadAttention(16, 2, batch_first=True).double()
    with torch.no_grad():
        weight = [*attend.operator.qk.weight[..., 0, 0].chunk(2), attend.operator.v[0].weight[..., 0, 0]]
        host.in_proj_weight.copy_(torch.cat(weight))
        host.in_proj_bias.copy_(torch.cat([attend.operator.qk.bias, attend.operator.v[0].bias]))
        host.out_proj.weight.copy_(2 * attend.project.weight[..., 0, 0])  # the inner residual doubles without a filter
        host.out_proj.bias.zero_()
    tokens = attend.norm(x).flatten(2).mT
    expected = x + host(tokens, tokens, tokens)[0].mT.unflatten(2, (4, 4))
    torch.testing.assert_close(attend(x), expected)
    feed = block(mode="conv", exp_ratio=4, kernel_size=0, layer_scale=None)
    up = nn.functional.linear(tokens, feed.operator[0].weight[..., 0, 0], feed.operator[0].bias)
    expected = x + (nn.functional.gelu(up) @ (2 * feed.project.weight[..., 0, 0].mT)).mT.unflatten(2, (4, 4))
    torch.testing.assert_close(feed(x), expected)


def test_all_modes_have_the_same_parameters():
    shapes = [{n: p.shape for n, p in block(mode=mode).state_dict().items()} for mode in MODES]
    assert shapes[0] == shapes[1] == shapes[2]


def test_width_inside_is_cut_and_not_rounded():
    hidden = [I2RMB(11, mode="conv", exp_ratio=ratio).project.in_channels for ratio in (2.5, 2.6, 2.72)]
    assert hidden == [27, 28, 29]


def test_drop_path_drops_whole_branches():
    torch.manual_seed(0)
    layer = I2RMB(16, head_dim=8, window=4, layer_scale=1.0, drop_path=0.5).train()
    for part in layer.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    x = torch.randn(32, 16, 4, 4)
    change = (layer(x) - x).flatten(1).abs().amax(1)
    assert 0 < int((change == 0).sum()) < 32


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 0}, "dim, dim_out and stride must be at least 1, got 0"),
        ({"mode": "global"}, "mode must be one of conv, remote, close, spanning, none, got 'global'"),
        ({"head_dim": 5}, "head_dim must divide the 16 channels, got 5"),
        ({"exp_ratio": 1.2}, "dim_out must be a multiple of the 2 heads, got 19"),
        ({"exp_ratio": 0.01}, "exp_ratio must leave at least one of the 16 channels, got 0.01"),
        ({"kernel_size": 4}, "kernel_size must be odd, or 0 for no convolution, got 4"),
        ({"kernel_size": 0, "stride": 2}, "a stride needs a depth-wise convolution"),
        ({"window": -1}, "window must be at least 1, or 0 for the whole map, got -1"),
        ({"layer_scale": 0}, "layer_scale must be positive, or None for none, got 0"),
        ({"layer_scale": float("nan")}, "layer_scale must be a finite number, got nan"),
        ({"drop_path": 1.0}, "drop_path must lie between 0 and 1, below 1, got 1.0"),
        ({"norm": "group"}, "norm must be one of batch, layer, none, got 'group'"),
        ({"activation": "tanh"}, "activation must be one of silu, gelu, relu, none, got 'tanh'"),
        ({"mode": "none"}, "mode 'none' expands nothing and needs an exp_ratio of 1, got 2"),
    ],
)
def test_block_refuses(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        I2RMB(options.pop("dim", 16), **{"head_dim": 8, "exp_ratio": 2, **options})


# The networks


def on_meta(build, **options) -> nn.Module:
    with torch.device("meta"):
        return build(**options).eval()


def macs(network: nn.Module, side: int) -> float:
    return cost.macs(lambda: network(torch.empty(1, 3, side, side, device="meta")))


def norm_operations(network: nn.Module, side: int) -> int:
    """What the paper's counter, fvcore's, adds to multiply-adds: 2 for each element of a batch norm, 5 of a layer's."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        total += output.numel() * (2 if isinstance(module, nn.BatchNorm2d) else 5)

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.register_forward_hook(count)
    network(torch.empty(1, 3, side, side, device="meta"))
    return total


@pytest.mark.parametrize(
    "build, variant, total, flops",
    [
        (emov2, "1m", 1_460_844, 284.8),
        (emov2, "2m", 2_384_312, 487.5),
        (emov2, "5m", 5_126_440, 1035.5),
        (emov2, "20m", 20_195_208, 4017.2),
        (emov2, "50m", 49_815_560, 8804.2),
        (emov2_baseline, "1m", 1_454_316, 249.4),
        (emov2_baseline, "5m", 5_110_312, 943.6),
        (emo, "1m", 1_361_168, 260.8),
        (emo, "6m", 6_168_496, 960.8),
    ],
)
def test_published_counts(build, variant, total, flops):
    network = on_meta(build, variant=variant)
    assert cost.count_parameters(network) == total
    assert (macs(network, 224) + norm_operations(network, 224)) / 1e6 == pytest.approx(flops, abs=0.06)


def test_parameters_of_the_5m_stages():
    network = on_meta(emov2, variant="5m")
    assert cost.count_parameters(network.stem) == 1_560
    assert [cost.count_parameters(s) for s in network.stages] == [33_792, 117_528, 2_347_824, 2_336_160]
    assert cost.count_parameters(network.stages[2][1]) == 274_720
    assert cost.count_parameters(network.stages[2][1].operator) == 154_560


def test_cost_grows_with_the_area():
    """At 256² and 512² with windows of 8 nothing is padded: four times the pixels cost four times as much."""
    small, large = (macs(on_meta(emov2, variant="5m", image_size=side), side) for side in (256, 512))
    assert large / small == pytest.approx(4.0, abs=0.002)


def test_window_follows_the_image_size():
    for side, window in ((224, 7), (256, 8), (512, 8)):
        network = on_meta(emov2, variant="1m", image_size=side)
        assert {m.window for m in network.modules() if isinstance(m, SEWMHSA)} == {window}
    segmenter = on_meta(emov2_segmenter, variant="1m")
    assert {m.window for m in segmenter.modules() if isinstance(m, SEWMHSA)} == {10}
    shapes = [{n: p.shape for n, p in on_meta(emov2, variant="1m", window=w).state_dict().items()} for w in (7, 8, 10)]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize(
    "options, published",
    [
        ({"mode": "conv"}, 4.3),
        ({"attention": (4,)}, 4.7),
        ({"attention": (2, 3, 4)}, 5.1),
        ({"attention": (1, 2, 3, 4)}, 5.2),
        ({"kernel_sizes": 1}, 4.8),
        ({"kernel_sizes": 3}, 4.9),
        ({"kernel_sizes": 7}, 5.3),
        ({"kernel_sizes": 9}, 5.7),
    ],
)
def test_published_ablations_can_be_built(options, published):
    total = cost.count_parameters(on_meta(emov2, variant="5m", **options)) / 1e6
    assert total == pytest.approx(published, abs=0.1)


def test_branches_are_dropped_more_often_the_deeper():
    network = on_meta(emov2, variant="1m")
    rates = [block.drop.p for stage in network.stages for block in stage]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.04036)
    steps = {round(b - a, 9) for a, b in itertools.pairwise(rates)}
    assert steps == {round(0.04036 / 14, 9)}
    last = {name: on_meta(emov2, variant=name).stages[3][-1].drop.p for name in ("2m", "5m", "20m", "50m")}
    assert last == pytest.approx({"2m": 0.05, "5m": 0.05, "20m": 0.1, "50m": 0.2})


def test_the_classifier_is_drawn_as_the_authors_draw_it():
    torch.manual_seed(0)
    head = emov2_small(num_classes=1000).head
    assert abs(head.weight.std().item() / 0.02 - 1) < 0.02 and head.bias.abs().max() == 0


def test_every_stage_is_where_it_belongs():
    network = emov2("5m", num_classes=0)
    kinds = [{type(b.operator) for b in stage[1:]} for stage in network.stages]
    assert kinds == [{nn.Sequential}] * 2 + [{SEWMHSA}] * 2
    firsts = [stage[0] for stage in network.stages]
    assert not any(first.residual for first in firsts)
    convs = [first.operator[0] for first in firsts]
    assert [c.out_channels // c.in_channels for c in convs] == [4, 6, 8, 8]
    norms = [type(stage[1].norm).__name__ for stage in network.stages]
    assert norms == ["BatchNorm2d", "BatchNorm2d", "ChannelNorm", "ChannelNorm"]
    assert {m.eps for m in network.modules() if hasattr(m, "eps")} == {1e-6}
    assert network(torch.zeros(1, 3, 40, 70)).shape == (1, 288)


def test_fresh_maps_vanish_and_a_layer_scale_of_1_cures_it():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    stds = {}
    for scale in (1e-6, 1.0, None):
        torch.manual_seed(0)
        with torch.no_grad():
            stds[scale] = [m.std().item() for m in emov2("1m", num_classes=0, layer_scale=scale).train().features(x)]
    assert max(stds[1e-6]) < 2e-6
    assert min(stds[1.0]) > 1e-2 and min(stds[None]) > 1e-2


def test_fused_form_is_the_same_network(no_shape_checks):
    torch.manual_seed(0)
    network = emov2("1m", layer_scale=1.0, num_classes=10).eval()
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.3)
            m.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 3, 64, 64)
    fused = fuse(network, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    torch.testing.assert_close(fused(x), network(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_segmentation_heads_fit(head):
    model = emov2_small_segmenter(head=head, num_classes=3).eval()
    assert model(torch.zeros(1, 1, 50, 70)).shape[:2] == (1, 3)


@pytest.mark.parametrize("variant, millions", [("1m", 10.5), ("2m", 11.5), ("5m", 14.4), ("20m", 29.8)])
def test_parameters_of_the_detectors(variant, millions):
    total = cost.count_parameters(on_meta(emov2_retinanet, variant=variant))
    assert int(total / 1e5) == round(10 * millions)


@pytest.mark.parametrize("variant, millions", [("1m", 2.4), ("2m", 3.3), ("5m", 6.0), ("20m", 21.2)])
def test_parameters_of_ssdlite_are_those_printed(variant, millions):
    """Cut off after a decimal, as the authors' other counts are."""
    total = cost.count_parameters(on_meta(emov2_ssdlite, variant=variant))
    assert int(total / 1e5) == round(10 * millions)


@pytest.mark.parametrize(
    "head, millions",
    [("semantic_fpn", (5.3, 23.9)), ("segformer", (1.4, 20.4)), ("deeplabv3", (5.6, 26.0)), ("pspnet", (4.2, 23.6))],
)
def test_parameters_of_the_segmenters(head, millions):
    for variant, printed in zip(("1m", "20m"), millions, strict=True):
        total = cost.count_parameters(on_meta(emov2_segmenter, variant=variant, head=head))
        assert total / 1e6 == pytest.approx(printed, abs=0.11), (variant, total)


def test_networks_refuse():
    with pytest.raises(ValueError, match="variant must be one of 1m, 2m, 5m, 20m, 50m, got '6m'"):
        emov2("6m")
    with pytest.raises(ValueError, match="attention must name stages from 1 to 4"):
        emov2("1m", attention=(0, 5))
    with pytest.raises(ValueError, match="all lists must have an entry for each stage: depths has 1"):
        EMOv2(depths=(1,), widths=(8, 8), exp_ratios=(2,), head_dims=(8,))
    with pytest.raises(ValueError, match="num_classes at least 0"):
        emov2_small(num_classes=-1)


# EMO, the predecessor


def small_emo(**options) -> EMO:
    sizes = {"depths": (1, 1, 2, 2), "widths": (8, 8, 16, 16), "exp_ratios": (2, 2, 2, 2), "head_dims": (8, 8, 8, 8)}
    return EMO(**{**sizes, "num_classes": 3, "window": 2, **options}).eval()


def test_emo_attends_to_remote_windows_before_it_expands():
    network = small_emo()
    attention = [m for m in network.modules() if isinstance(m, SEWMHSA)]
    assert len(attention) == 2 and all(m.attend_first and m.mode == "remote" for m in attention)
    assert [type(stage[-1].operator) for stage in network.stages] == [nn.Sequential] * 2 + [SEWMHSA] * 2
    assert all(block.scale is None for stage in network.stages for block in stage)
    kernels = [{block.local[0].kernel_size[0] for block in stage} for stage in network.stages]
    assert kernels == [{3}, {3}, {5}, {5}]


def test_the_gate_of_emos_stem_is_its_equation():
    gate = small_emo().stem[5].double()
    x = noise(2, 24, 5, 4)
    hidden = x.mean((2, 3)) @ gate.squeeze.weight.mT + gate.squeeze.bias
    logits = (hidden * hidden.sigmoid()) @ gate.excite.weight.mT + gate.excite.bias
    torch.testing.assert_close(gate(x), x * logits.sigmoid()[..., None, None])


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: emo("20m"), "variant must be one of 1m, 2m, 5m, 6m, got '20m'"),
        (lambda: small_emo(depths=(1, 1)), "must have four entries, got 2, 4, 4 and 4"),
        (lambda: small_emo(depths=(0, 1, 1, 1)), "depths must be at least 1"),
        (lambda: small_emo(num_classes=-1), "num_classes at least 0, got 3 and -1"),
        (lambda: small_emo(drop_path=1.0), "drop_path must lie between 0 and 1, below 1, got 1.0"),
        (lambda: small_emo(window=-1), "window must be at least 1, or 0 for the whole map"),
    ],
)
def test_emo_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Diffusion


def noisy(network: DEMOv2, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, network.in_channels, network.size, network.size, generator=generator)
    return x, torch.arange(batch) * 300 + 5, torch.arange(batch) % 3


@pytest.mark.parametrize("variant, giga", [("s", 5.4), ("b", 19.9), ("l", 69.3), ("xl", 101.5)])
def test_flops_of_the_diffusion_models_are_those_printed(variant, giga):
    """Norms counted as above; the parameters, exact in the authors' logs, are held with every preset's."""
    network, total = on_meta(emov2_diffusion, variant=variant), 0

    def count(module, inputs, output):
        nonlocal total
        total += output.numel() * (2 if isinstance(module, nn.BatchNorm2d) else 5)

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.register_forward_hook(count)
    example = [torch.empty(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)]
    products = cost.macs(lambda: network(*(part.to("meta") for part in example)))
    assert round((products + total) / 1e9, 1) == giga


def test_a_modulated_block_is_its_equation():
    torch.manual_seed(0)
    layer = ModulatedI2RMB(8, head_dim=4, window=2, exp_ratio=2, kernel_size=3).double().eval()
    x, c = noise(2, 8, 4, 6), noise(2, 8)
    assert torch.equal(layer(x, c), x)  # the condition's map starts at zero
    nn.init.normal_(layer.modulation.weight)
    nn.init.normal_(layer.modulation.bias)
    shift, scale, gate = layer.modulation(c * c.sigmoid())[..., None, None].chunk(3, dim=1)
    e = layer.block.operator(layer.block.norm(x) * (1 + scale) + shift)
    torch.testing.assert_close(layer(x, c), x + gate * layer.block.project(e + layer.block.local(e)))
    # With a condition that scales by 1, shifts by 0 and gates by 1 it is the i2RMB.
    nn.init.zeros_(layer.modulation.weight)
    with torch.no_grad():
        layer.modulation.bias.copy_(torch.tensor([0.0] * 16 + [1.0] * 8))
    torch.testing.assert_close(layer(x, c), layer.block(x))


def test_a_fresh_diffusion_model_gives_nothing_and_learns_from_it():
    torch.manual_seed(0)
    network = emov2_diffusion_digits(dim=24, layers=1)
    x, t, y = noisy(network)
    assert network(x, t, y).abs().max() == 0
    network(x, t, y).sum().backward()
    assert network.head.weight.grad.abs().max() > 0


def stirred(**options) -> DEMOv2:
    torch.manual_seed(0)
    network = emov2_diffusion_digits(**{"dim": 24, "layers": 2, **options}).eval()
    for part in (network.head.weight, *(block.modulation.weight for block in network.blocks)):
        nn.init.normal_(part, std=0.2)
    return network


def test_level_and_class_change_what_is_found():
    network = stirred()
    x, t, y = noisy(network)
    found = network(x, t, y)
    assert (network(x, t + 100, y) - found).abs().max() > 1e-3
    assert (network(x, t, y + 1) - found).abs().max() > 1e-3
    torch.testing.assert_close(network(x[1:], t[1:], y[1:]), found[1:])


def test_patches_come_back_to_their_position():
    """Of a network whose blocks mix nothing, a pixel's output depends on its own patch alone."""
    network = DEMOv2(dim=8, layers=1, head_dim=4, window=1, mode="close", kernel_size=0, size=6, in_channels=1).eval()
    nn.init.normal_(network.head.weight)
    nn.init.normal_(network.blocks[0].modulation.weight)
    x, t, y = noisy(network, 1)
    assert network(x, t, y).shape == (1, 2, 6, 6)  # noise and variance
    (gradient,) = torch.autograd.grad(network(x.requires_grad_(), t, y)[0, :, 3, 4].square().sum(), x)
    assert {divmod(int(p), 6) for p in gradient.flatten().nonzero()} == {(2, 4), (2, 5), (3, 4), (3, 5)}


def test_guidance_goes_from_no_class_through_the_class():
    network = stirred()
    x, t, y = noisy(network)
    given, free = network(x, t, y), network(x, t, torch.full_like(y, 10))
    assert (given - free).abs().max() > 1e-3
    for scale, expected in ((0, free), (1, given), (3, 3 * given - 2 * free)):
        torch.testing.assert_close(network.guided(x, t, y, scale), expected, rtol=1e-4, atol=1e-5)
    latents = stirred(in_channels=4)
    x, t, y = noisy(latents)
    led = latents.guided(x, t, y, 3)
    torch.testing.assert_close(led[:, 3:], latents(x, t, y)[:, 3:], rtol=1e-4, atol=1e-5)


def test_drawn_digits_are_read_as_what_was_asked_for(tmp_path):
    """By the classifier that ships; one that guesses would read a tenth of them so."""
    asked = [str(digit) for digit in range(10)] * 4
    words = ["predict", "emov2", *asked, "--preset", "emov2_diffusion_digits", "-o", str(tmp_path / "drawn.npy")]
    assert main([*words, "--set", "steps=15"]) == 0
    drawn = torch.from_numpy(np.load(tmp_path / "drawn.npy"))
    classifier = provenn.paper("emov2").build("emov2_small", pretrained=True).eval()
    with torch.no_grad():
        read = classifier(drawn).argmax(1)
    assert (read == torch.arange(10).repeat(4)).double().mean() > 0.6


def test_digits_are_drawn_from_the_command_line(tmp_path):
    words = ["predict", "emov2", "3", "7", "--preset", "emov2_diffusion_digits", "-o", str(tmp_path / "drawn.png")]
    assert main([*words, "--set", "steps=8"]) == 0
    picture = np.asarray(Image.open(tmp_path / "drawn.png").convert("L"))
    assert picture.shape[1] == 2 * picture.shape[0] and picture.std() > 20


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: emov2_diffusion("m"), "variant must be one of s, b, l, xl, got 'm'"),
        (lambda: emov2_diffusion_digits(layers=0), "must be at least 1, got 48, 0, 8, 1, 1, 10"),
        (lambda: DEMOv2(dim=8, layers=1, head_dim=4, size=9), "patch must divide size, got size=9 and patch=2"),
        (lambda: emov2_diffusion_digits(head_dim=7), "head_dim must divide the 48 channels, got 7"),
        (lambda: emov2_diffusion_digits(dim=42, head_dim=6), "dim must be a multiple of 4, got 42"),
        (lambda: stirred()(torch.zeros(1, 1, 6, 6), torch.zeros(1), torch.zeros(1).long()), "expected images of"),
        (lambda: stirred()(torch.zeros(2, 1, 8, 8), torch.zeros(1), torch.zeros(2).long()), "t and y of 2 images"),
    ],
)
def test_diffusion_models_refuse(build, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        build()


# The authors' names


def official_names(model: EMOv2) -> dict[str, torch.Tensor]:
    stem = {"0": "0.conv", "1": "0.norm", "3": "1.conv", "4": "1.norm", "6": "2.conv"}
    names = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stem":
            name = f"stage0.{stem[parts[1]]}.{parts[2]}"
        elif parts[0] == "stages":
            layer = isinstance(model.stages[int(parts[1])][int(parts[2])].norm, nn.LayerNorm)
            rest = ".".join(parts[3:])
            for ours, theirs in (
                ("operator.0.", "eops.0.net.conv."), ("operator.qk.", "eops.0.qk.conv."),
                ("operator.v.0.", "eops.0.v.conv."), ("local.0.", "conv_local.conv."), ("local.1.", "conv_local.norm."),
                ("project.", "proj.conv."), ("norm.", "norm.norm." if layer else "norm."),
            ):  # fmt: skip
                if rest.startswith(ours):
                    rest = theirs + rest.removeprefix(ours)
                    break
            if rest == "scale":
                rest, value = "ls.gamma", value.view(1, -1, 1, 1)
            name = f"stage{int(parts[1]) + 1}.{parts[2]}.{rest}"
        elif parts[0] == "norm":
            name = f"norm.{name}"
        names[name] = value
    return names


@pytest.mark.parametrize(
    "build, options, preset",
    [(emov2, {}, "emov2_1m"), (emov2_baseline, {}, "emov2_baseline_1m"), (emov2, {"kernel_sizes": 3}, "emov2_1m")],
)
def test_official_names_come_back_with_their_preset(build, options, preset):
    model = build("1m", num_classes=7, **options)
    found, kept, ours = convert({f"module.{n}": v for n, v in official_names(model).items()}, window=8)
    assert found == preset and kept["num_classes"] == 7 and kept["window"] == 8
    again = build("1m", **kept)
    again.load_state_dict(ours, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_foreign_weights_are_refused():
    with pytest.raises(ValueError, match="expected a state dict of EMOv2's EMO2"):
        convert(emov2("1m").state_dict())
    state = official_names(emov2("1m"))
    extra = {n.replace("stage3.1.", "stage3.8."): v for n, v in state.items() if n.startswith("stage3.1.")}
    with pytest.raises(ValueError, match="no EMOv2 of the paper has stages of"):
        convert(state | extra)


def test_checkpoints_of_emos_trainer_are_read(tmp_path):
    """As it writes them: beside the weights stand the optimizer's state, counters and the scores so far."""
    with open("tests/papers/emov2/golden.json") as file:
        case = next(case for case in json.load(file)["cases"] if case["preset"] == "emo_1m")
    state = seeded_state(case["shapes"])
    beside = {"net_E": None, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "scaler": None, "epoch": 300}
    torch.save({"net": state, **beside, "topk_recorder": {"net_top1": [71.5]}}, tmp_path / "ckpt.pth")
    model = provenn.from_official("emov2", tmp_path / "ckpt.pth", window=4)
    assert isinstance(model, EMO) and torch.equal(
        model.stages[2][1].operator.v[0].weight, state["stage3.1.v.conv.weight"]
    )
    assert {m.window for m in model.modules() if isinstance(m, SEWMHSA)} == {4}
    with pytest.raises(ValueError, match="has no mode to choose, got 'close'"):
        convert(state, mode="close")
    with pytest.raises(ValueError, match="expected a state dict of EMO, found other parameters"):
        convert({**state, "stage1.0.extra.weight": state["head.weight"]})
    deeper = {n.replace("stage3.1.", "stage3.8."): v for n, v in state.items() if n.startswith("stage3.1.")}
    with pytest.raises(ValueError, match="no EMO of the authors has stages of"):
        convert(state | deeper)


# The experiments


def test_no_split_of_the_fields_is_drawn_as_another():
    splits = [split for seed in range(3) for data in [studies.field_data(seed, True)]
              for split in (data.train, data.val, data.test)]  # fmt: skip
    first = {split.tensors[0][0].numpy().tobytes() for split in splits}
    assert len(first) == len(splits) == 9


def test_target_needs_both_groupings():
    """What one grouping can explain of the target is two thirds of it, and a pixel alone nearly nothing."""
    x, target = studies.field_data(0, False).train.tensors
    assert x.shape == target.shape == (12_800, 1, 8, 8)
    near, far = x[3, 0, :4, 4:].mean(), x[3, 0, 1::2, 0::2].mean()  # of pixel (1, 6)
    torch.testing.assert_close(target[3, 0, 1, 6], 4 * (near + far))
    power = target.square().sum()
    best = {"pixel": (x * target).sum() ** 2 / x.square().sum() / power}
    for grouping in ("close", "remote"):
        groups = group_pixels(x, grouping, (4, 4))
        of_target = group_pixels(target, grouping, (4, 4))
        # Linear in the pixel itself and in its group's mean.
        design = torch.stack([groups.flatten(), groups.mean(2, keepdim=True).expand_as(groups).flatten()], 1)
        fit = torch.linalg.lstsq(design, of_target.flatten()[:, None]).solution
        best[grouping] = 1 - (of_target.flatten() - (design @ fit)[:, 0]).square().sum() / power
    assert best["pixel"] < 0.15
    assert 0.55 < best["close"] < 0.75 and 0.55 < best["remote"] < 0.75


def test_networks_that_are_compared_are_what_they_are_called():
    counts = {
        label: cost.count_parameters(studies.small_network(part, num_classes=16))
        for label, part in experiments.PATCHES.variants.values()
    }
    assert counts["remote"] == counts["close"] == counts["spanning"] == counts["spanning, γ = 1e-6"]
    assert abs(counts["depth-wise only, wider"] / counts["spanning"] - 1) < 0.02
    assert abs(counts["MobileNetV2 blocks"] / counts["spanning"] - 1) < 0.1
    fields = {
        label: cost.count_parameters(studies.field_network(part))
        for label, part in experiments.FIELDS.variants.values()
    }
    assert fields["remote"] == fields["close"] == fields["spanning"] < fields["close, two blocks"]


def test_padding_is_counted():
    """256 pixels in stage 3 are 16 cells, padded to 21 in windows of 7."""
    assert float(studies.real_share(14, 7).min()) == pytest.approx(1)
    share = studies.real_share(16, 7)[0, 0]
    assert share[0, 0].item() == pytest.approx(
        (1 + 36 / 49) / 2
    )  # a whole window; rows 0, 3, … 18, of which 6 are real
    assert share[15, 15].item() == pytest.approx((4 / 49 + 36 / 49) / 2)


def broken(how):
    """A small network with something in its last stage that no i2RMB has."""
    with torch.device("meta"):
        network = emov2_small(num_classes=0, in_channels=3)
        last = network.stages[2][1]
        if how == "another block":
            network.stages[2][1] = InvertedResidual(96, 96, stride=1, expansion=3)
        elif how == "bias table":
            last.operator.table = nn.Parameter(torch.zeros(49, 4))
        elif how == "index of a bias table":
            last.operator.register_buffer("index", torch.zeros(16, 16))
        elif how == "dense convolution":
            last.local[0] = nn.Conv2d(192, 192, 3, padding=1, bias=False)
    if how == "shift":
        last.operator.register_forward_pre_hook(lambda module, given: (given[0].roll(2, dims=2),))
    if how == "gate":
        last.register_forward_hook(lambda module, given, output: output * output)
    if how == "second branch":
        last.register_forward_hook(lambda module, given, output: output + given[0])
    if how == "table over places":
        last.register_forward_hook(lambda module, given, output: output * torch.ones(output.shape[1:], device="meta"))
    return network


STRANGE = {
    "nothing": set(),
    "another block": {"InvertedResidual", "ReLU6"},
    "bias table": {"table"},
    "index of a bias table": {"index"},
    "dense convolution": {"Conv2d"},
    "shift": {"roll"},
    "gate": {"mul"},
    "second branch": {"sum of two maps"},
    "table over places": {"mul"},
}


@pytest.mark.parametrize("how", STRANGE)
def test_a_census_finds_what_no_i2rmb_has(how):
    found = count_stages(broken(how), side=32)
    assert set(found.strange) >= STRANGE[how] and bool(found.strange) == bool(STRANGE[how])
    assert found.blocks == (5 if how == "another block" else 6)
    if how == "nothing":
        assert found.attentions == 3 and found.operations["attention"] == 6


def test_names_and_shapes_of_the_census_are_those_of_the_authors():
    with open("tests/papers/emov2/golden.json") as file:
        cases = [case for case in json.load(file)["cases"] if case["preset"] in ("emov2_1m", "emov2_5m")]
    held = {case["preset"][6:]: shapes_digest(convert(shaped(case["shapes"]))[2]) for case in cases}
    assert held == AUTHORS and {case["shapes"]["head.bias"][0] for case in cases} == {CLASSES}
    state = convert(shaped(cases[0]["shapes"]))[2]
    assert shapes_digest({**state, "stages.2.1.operator.table": torch.empty(49, 4)}) != AUTHORS["1m"]


def shaped(shapes):
    """Tensors of these shapes, without numbers."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
