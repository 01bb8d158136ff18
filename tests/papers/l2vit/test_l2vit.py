"""L²ViT: what the brief calls exact, its traps, the authors' names, tiles, counts, and what the experiments compare."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import provenn
from provenn.core import cost
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.backbone import check_backbone
from provenn.nn.fusion import fuse
from provenn.papers import l2vit
from provenn.papers.l2vit import (
    ConditionalPositions,
    LGABlock,
    LinearGlobalAttention,
    LocalConcentration,
    LWABlock,
    WindowAttention,
    experiments,
)
from provenn.papers.l2vit.concentration import entropies, local_share, row_entropy, softmax_weights, top_share
from provenn.papers.l2vit.official import convert
from provenn.papers.l2vit.studies import on_meta, plain_network, printed_operations, segmenter, two_stages

F64 = torch.float64


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attention(dim=64, heads=2, **options) -> LinearGlobalAttention:
    """With weights large enough that the floor holds for some tokens of 20 and not for others."""
    torch.manual_seed(0)
    made = LinearGlobalAttention(dim, heads, **options).double()
    with torch.no_grad():
        for p in (made.qkv.weight, made.out.weight):
            p.copy_(draw(*p.shape, seed=1) / math.sqrt(dim))
        made.qkv.bias.copy_(0.1 * draw(3 * dim, seed=2))
        made.out.bias.copy_(draw(dim, seed=3))
        made.scale.mul_(torch.rand(heads, 1, 1) + 0.5)
    return made


def small(**options) -> l2vit.L2ViT:
    torch.manual_seed(0)
    sizes = {"dims": (8, 16, 16), "depths": (2, 2, 2), "heads": (1, 2, 2), "window": 4, "mlp_ratio": 2}
    model = l2vit.L2ViT(**{**sizes, "num_classes": 5, **options}).double()
    with torch.no_grad():
        for i, (name, value) in enumerate(model.state_dict().items()):
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.add_(0.2 * draw(*value.shape, seed=i))
    return model.eval()


# Linear global attention


def test_map_first_is_values_first_and_rows_sum_to_the_scale():
    layer, x = attention(), draw(2, 20, 64)
    weights = layer.weights(x)
    _, _, v = layer.qkv(x).chunk(3, -1)
    y = weights @ v.unflatten(-1, (2, 32)).transpose(1, 2)
    torch.testing.assert_close(layer.out(y.transpose(1, 2).flatten(2)), layer(x), rtol=1e-12, atol=1e-12)
    assert bool((weights >= 0).all())
    floored = layer.floored(x)
    assert 0.1 < floored.double().mean() < 0.9
    q, k, _ = (part.unflatten(-1, (2, 32)).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
    totals = (q.relu() @ k.relu().mT).sum(-1)
    scale = layer.scale.squeeze(-1)
    expected = torch.where(floored, scale * totals / 100, scale.expand_as(totals))
    torch.testing.assert_close(weights.sum(-1), expected)
    assert not torch.allclose(weights.sum(-1), torch.ones_like(totals), atol=0.3)


def test_the_scale_starts_at_one_over_the_root_of_the_head():
    layer = LinearGlobalAttention(96, 3)
    assert layer.scale.shape == (3, 1, 1) and layer.scale.requires_grad
    torch.testing.assert_close(layer.scale.detach(), torch.full((3, 1, 1), 0.1767767))
    assert layer.floor == 100.0


def test_tokens_have_no_positions():
    layer, x, order = attention(), draw(2, 50, 64), torch.randperm(50)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_larger_keys_change_nothing_above_the_floor_and_something_below():
    """Which is why the learned scale stands on the values."""
    x = draw(2, 60, 64)
    for floor, same in ((1e-9, True), (1e4, False)):
        layer = attention(floor=floor)
        larger, louder = copy.deepcopy(layer), copy.deepcopy(layer)
        with torch.no_grad():
            for parameter in (larger.qkv.weight, larger.qkv.bias):
                parameter[64:128] *= 3
            for parameter in (louder.qkv.weight, louder.qkv.bias):
                parameter[128:] *= 3
        assert torch.allclose(larger(x), layer(x)) == same
        bias = layer.out.bias
        torch.testing.assert_close(louder(x) - bias, 3 * (layer(x) - bias))
        if not same:
            torch.testing.assert_close(larger(x) - bias, 3 * (layer(x) - bias))


def test_a_token_with_negative_queries_gets_the_bias_alone():
    layer, x = attention(), draw(1, 20, 64)
    with torch.no_grad():
        layer.qkv.weight[:64] = 0
        layer.qkv.bias[:64] = -1
    assert torch.equal(layer(x), layer.out.bias.expand(1, 20, 64))


def test_the_floor_passes_no_gradient_and_the_sum_above_it_does():
    x = draw(1, 30, 64).requires_grad_()
    low, high = attention(floor=1e-9), attention(floor=1e9)
    high.scale.data.copy_(low.scale.data)
    (floored,) = torch.autograd.grad((high(x) * draw(1, 30, 64, seed=5)).sum(), x)
    q, k, v = (part.unflatten(-1, (2, 32)).transpose(1, 2) for part in high.qkv(x).chunk(3, -1))
    y = high.scale * (q.relu() @ (k.relu().mT @ v)) / 1e9
    (numerator,) = torch.autograd.grad((high.out(y.transpose(1, 2).flatten(2)) * draw(1, 30, 64, seed=5)).sum(), x)
    torch.testing.assert_close(floored, numerator)
    assert floored.abs().max() > 0


def test_two_passes_over_parts_are_one_over_all():
    layer, x = attention(), draw(2, 90, 64)
    parts = x.split([40, 1, 49], dim=1)
    state = None
    for part in parts:
        state = layer.add(part, state)
    joined = torch.cat([layer.read(part, state) for part in parts], dim=1)
    torch.testing.assert_close(joined, layer(x), rtol=1e-12, atol=1e-12)
    assert state.nbytes == 2 * 2 * (32 * 32 + 32) * 8


def test_half_precision_does_not_overflow():
    """Sums of many thousand tokens, whose normaliser is far above what float16 holds."""
    layer = LinearGlobalAttention(64, 2)
    with torch.no_grad():
        layer.qkv.weight.mul_(20)
    x = draw(1, 20_000, 64, dtype=torch.float32)
    q, k, _ = (part.unflatten(-1, (2, 32)).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
    assert (q.relu() * k.relu().sum(2, keepdim=True)).sum(-1).max() > 65504
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        y = layer(x)
    assert y.isfinite().all()
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bias", [True, False])
def test_a_softmax_attention_gives_its_maps(bias):
    class Timm(nn.Module):
        def __init__(self, softmax):
            super().__init__()
            self.qkv, self.proj, self.num_heads = nn.Linear(24, 72, bias=bias), softmax.out, 3
            self.qkv.weight.data = torch.cat([softmax.query.weight, softmax.key.weight, softmax.value.weight])
            if bias:
                self.qkv.bias.data = torch.cat([softmax.query.bias, softmax.key.bias, softmax.value.bias])

    softmax = SoftmaxAttention(24, 3, causal=False, bias=bias).double().eval()
    x = draw(2, 9, 24)
    ours = LinearGlobalAttention.from_softmax(softmax)
    assert ours.scale.dtype == F64 and not ours.training
    torch.testing.assert_close(LinearGlobalAttention.from_softmax(Timm(softmax))(x), ours(x))
    _, _, v = ours.qkv(x).chunk(3, -1)
    torch.testing.assert_close(v, softmax.value(x))
    with pytest.raises(ValueError, match="is causal"):
        LinearGlobalAttention.from_softmax(SoftmaxAttention(24, 3))
    with pytest.raises(ValueError, match="Linear has neither"):
        LinearGlobalAttention.from_softmax(nn.Linear(3, 3))


# Local concentration, positions, windows


def test_activation_comes_before_the_norm():
    lcm = LocalConcentration(8).double().eval()
    lcm.norm.running_mean.normal_()
    x = draw(2, 8, 9, 11)
    y = F.batch_norm(F.gelu(lcm.conv1(x)), lcm.norm.running_mean, lcm.norm.running_var, eps=1e-5)
    torch.testing.assert_close(lcm(x), lcm.conv2(y))
    assert sum(p.numel() for p in lcm.parameters()) == 2 * 8 * 50 + 16
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(lcm(x)[0, 0, 4, 5], x)
    reach = grad[0, 0].abs() > 0
    assert reach[:, :].all(1).any() and reach.sum() == 9 * 11 and (grad[0, 1:] == 0).all()
    far = draw(1, 8, 31, 31).requires_grad_()
    (grad,) = torch.autograd.grad(lcm(far)[0, 0, 15, 15], far)
    assert (grad[0, 0].abs() > 0).sum() == 13**2  # 6 to each side, which is the halo of tiles


def test_without_its_second_convolution_a_block_is_one_without_the_module():
    torch.manual_seed(0)
    enhanced, plain = LGABlock(16, 2).double().eval(), LGABlock(16, 2, kernel_size=None).double().eval()
    plain.load_state_dict({k: v for k, v in enhanced.state_dict().items() if k in plain.state_dict()})
    x = draw(2, 16, 9, 8)
    assert not torch.allclose(enhanced(x), plain(x))
    for parameter in enhanced.concentration.conv2.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(enhanced(x), plain(x))
    added = sum(p.numel() for p in enhanced.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == 16 * 50 * 2 + 2 * 16 + 2 * 16


def test_the_blocks_are_their_equations():
    x = draw(2, 16, 9, 8)

    def tokens(function, x):
        return function(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])

    torch.manual_seed(0)
    lga, lwa = LGABlock(16, 2, mlp_ratio=3).double().eval(), LWABlock(16, 2, window=4).double().eval()
    assert lga.mlp[0].out_features == 48
    y = x + lga.positions.conv(x)
    y = y + tokens(lambda t: lga.attention(lga.norm1(t)), y)
    y = y + lga.concentration(tokens(lga.norm3, y))
    y = y + tokens(lambda t: lga.mlp(lga.norm2(t)), y)
    torch.testing.assert_close(lga(x), y)
    y = x + lwa.positions[0].conv(x)
    y = y + lwa.attention(tokens(lwa.norm1, y))
    y = y + lwa.positions[1].conv(y)
    y = y + tokens(lambda t: lwa.mlp(lwa.norm2(t)), y)
    torch.testing.assert_close(lwa(x), y)


def test_a_window_keeps_to_itself_and_its_padding_is_let_in():
    torch.manual_seed(0)
    layer = WindowAttention(16, 2, 4).double()
    nn.init.normal_(layer.qkv.bias)
    x = draw(1, 16, 10, 7).requires_grad_()
    (grad,) = torch.autograd.grad((layer(x)[0, :, 5, 2] * draw(16, seed=9)).sum(), x)
    seen = grad[0].abs().sum(0) > 0
    expected = torch.zeros(10, 7, dtype=torch.bool)
    expected[4:8, :4] = True
    assert torch.equal(seen, expected)
    corner = F.pad(x.detach()[..., 8:, 4:], (0, 1, 0, 2))  # zeros enter as tokens, unmasked
    torch.testing.assert_close(layer(corner)[..., :2, :3], layer(x)[..., 8:, 4:])
    masked = layer(x.detach()[..., 8:, 4:6])
    assert not torch.allclose(masked, layer(x)[..., 8:, 4:6])


def test_one_window_over_all_is_softmax_attention():
    torch.manual_seed(0)
    window, whole = WindowAttention(16, 2, 7).double(), SoftmaxAttention(16, 2, causal=False).double()
    for i, part in enumerate((whole.query, whole.key, whole.value)):
        part.weight.data, part.bias.data = window.qkv.weight[16 * i :][:16], window.qkv.bias[16 * i :][:16]
    whole.out.load_state_dict(window.out.state_dict())
    x = draw(2, 16, 7, 7)
    torch.testing.assert_close(window(x).flatten(2).mT, whole(x.flatten(2).mT))


def test_stochastic_depth_leaves_positions_alone():
    torch.manual_seed(0)
    block = LWABlock(16, 2, window=4, drop_path=0.999).double()
    x = draw(2, 16, 8, 8)
    a, b = block.positions
    torch.testing.assert_close(block.train()(x), b(a(x)))  # both branches dropped
    plain = LWABlock(16, 2, window=4).double().eval()
    plain.load_state_dict(block.state_dict())
    torch.testing.assert_close(block.eval()(x), plain(x))
    block = LGABlock(16, 2, drop_path=0.5).double().train()
    block.concentration.norm.eval()
    torch.manual_seed(3)
    many = block(x[:1].expand(200, -1, -1, -1))
    assert len({round(value, 9) for value in many.sum((1, 2, 3)).tolist()}) == 8  # three branches, drawn apart


# The networks

COUNTS = [
    (l2vit.l2vit_tiny, 28_596_781, 224, 4.7),
    (l2vit.l2vit_small, 50_199_157, 224, 9.0),
    (l2vit.l2vit_base, 88_577_188, 224, 15.9),
    (l2vit.l2vit_base_384, 88_577_188, 384, 47.5),
]


def macs(model, side):
    return cost.macs(lambda: model(torch.empty(1, 3, side, side, device="meta")))


@pytest.mark.parametrize("build, parameters, side, published", COUNTS)
def test_counts_of_the_released_models(build, parameters, side, published):
    model = on_meta(build)
    assert cost.count_parameters(model) == parameters
    # Operations of norms and activations are counted too: see below.
    assert round(printed_operations(model, side) / 1e9, 1) == published
    assert {stage[1].attention.dim // stage[1].attention.heads for stage in model.stages} == {32}


@pytest.mark.parametrize(
    "build, side, printed",
    [(l2vit.l2vit_tiny, 224, 4_713_614_632), (l2vit.l2vit_base_384, 384, 47_470_758_632)],
)
def test_operations_as_the_authors_tool_counts_them(build, side, printed):
    """The figures are what their counter said of their models."""
    assert printed_operations(on_meta(build), side) == printed


def test_parts_of_tiny_have_the_authors_parameters():
    model = on_meta(l2vit.l2vit_tiny)
    count = cost.count_parameters
    assert [count(stage) for stage in model.stages] == [236_547, 915_462, 10_801_188, 14_278_680]
    assert [count(embed) for embed in model.embeds] == [43_392, 74_112, 295_680, 1_181_184]
    assert count(model.norms) + count(model.head) == 770_536
    window, linear = model.stages[0]
    assert (count(window.attention), count(window.positions), count(window.mlp)) == (37_248, 1_920, 74_208)
    assert (count(linear.attention), count(linear.positions), count(linear.concentration)) == (37_251, 960, 9_792)


def test_work_is_linear_in_the_pixels_and_with_softmax_it_is_not():
    model = on_meta(l2vit.l2vit_tiny)
    assert macs(model, 448) / macs(model, 224) == pytest.approx(4, abs=0.01)
    softmax = on_meta(l2vit.l2vit_tiny, attention="softmax")
    assert macs(softmax, 448) / macs(softmax, 224) > 5


def test_blocks_take_turns_within_a_stage():
    kinds = [[type(block) for block in stage] for stage in on_meta(l2vit.l2vit_tiny).stages]
    assert all(stage == [LWABlock, LGABlock] * (len(stage) // 2) for stage in kinds)
    other = on_meta(l2vit.l2vit_tiny, blocks=("global", "window"))
    assert isinstance(other.stages[2][0], LGABlock)
    assert all(isinstance(b, LGABlock) for s in on_meta(l2vit.l2vit_tiny, blocks=("global",)).stages for b in s)
    rates = [block.drop.p for stage in on_meta(l2vit.l2vit_tiny, drop_path=0.3).stages for block in stage]
    assert rates == pytest.approx([0.3 * i / 11 for i in range(12)])


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (33, 64), (17, 40)])
def test_any_image_and_maps_that_shrink_by_the_ceiling(size):
    model = small()
    assert model(draw(2, 3, *size)).shape == (2, 5)
    check_backbone(model.float(), 3, [size])
    assert [type(norm) for norm in model.norms] == [nn.Identity, nn.Identity, nn.LayerNorm]
    dense = small(num_classes=0)
    assert all(isinstance(norm, nn.LayerNorm) for norm in dense.norms)
    check_backbone(dense.float(), 3, [size])


@pytest.mark.parametrize("size", [(64, 64), (70, 45), (33, 129)])
@pytest.mark.parametrize("options", [{}, {"num_classes": 0, "kernel_size": 5}, {"stem": 2, "kernel_size": None}])
def test_tiles_give_what_the_whole_image_gives(size, options):
    model = small(**options)
    model.tile = 16 * model.strides[0]
    image = draw(2, 3, *size)
    with torch.no_grad():
        tiles = [*model.features(image), model(image)]
        model.tile = None
        for ours, whole in zip(tiles, [*model.features(image), model(image)], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-10)


def test_tiles_hold_less():
    model = small(tile=64).float()
    image = torch.zeros(1, 3, 320, 320)

    def held(tile):
        model.tile = tile
        with torch.no_grad():
            return cost.peak_activation_bytes(lambda: model(image))

    assert held(64) < 0.5 * held(None)


def test_a_dense_tile_needs_whole_windows_and_linear_attention():
    with pytest.raises(ValueError, match="multiple of 64 pixels, whole windows of the last stage, got 100"):
        small(tile=100)
    with pytest.raises(ValueError, match="softmax attention needs all tokens at once: tile must be None, got 64"):
        small(tile=64, attention="softmax")
    from provenn.papers.l2vit.tiles import tiled_block

    with pytest.raises(ValueError, match="only window attention and linear attention go through tiles"):
        tiled_block(small(attention="softmax").stages[0][1], draw(1, 8, 8, 8), 4)


def test_fused_it_is_the_same():
    model = small().float()
    fused = fuse(model, torch.randn(2, 3, 33, 40))
    norms = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3  # those of the three LCMs, which a padded convolution follows; the stem's two are gone
    x = torch.randn(1, 3, 50, 64)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_features_feed_a_segmenter():
    model = l2vit.l2vit_mini_semantic_fpn().eval()
    assert model(torch.randn(1, 1, 64, 96)).shape == (1, 5, 16, 24)
    tiny = on_meta(l2vit.l2vit_tiny_semantic_fpn, head="segformer")
    assert tiny(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 150, 16, 16)


# The authors' names


def official_names(model: l2vit.L2ViT) -> dict[str, torch.Tensor]:
    """Ours as the authors call them, written apart from `official.py`."""
    renamed = {}
    for name, value in model.state_dict().items():
        for ours, theirs in (
            ("embeds.0.convs", "downsample_layers.0.proj.proj"), ("embeds", "downsample_layers"), (".conv.", ".proj."),
            (".attention.out.", ".attn.proj."), (".attention.scale", ".attn.temperature"), (".attention.", ".attn."),
            (".mlp.0.", ".mlp.fc1."), (".mlp.2.", ".mlp.fc2."), (".concentration.norm.", ".local_mp.bn."),
            (".concentration.", ".local_mp."), (".positions.proj.", ".cpe.0.proj."), (".positions.", ".cpe."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        dense = not isinstance(model.head, nn.Linear)
        for i in range(4):
            name = name.replace(f"norms.{i}.", f"norm{i}." if dense else "norm.")
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("build", [l2vit.l2vit_tiny, l2vit.l2vit_small, l2vit.l2vit_base, l2vit.l2vit_base_384])
@pytest.mark.parametrize("classes", [21_841, 0])
def test_official_names_come_back_with_their_preset(build, classes):
    model = on_meta(build, num_classes=classes)
    preset, options, ours = convert(official_names(model), window=12 if build is l2vit.l2vit_base_384 else None)
    assert (preset, options) == (build.__name__, {"num_classes": classes, "in_channels": 3})
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_windows_that_leave_no_trace_are_told():
    state = official_names(on_meta(l2vit.l2vit_base))
    assert convert(state)[0] == "l2vit_base"
    assert convert(state, preset="l2vit_base_384")[0] == "l2vit_base_384"
    tiny = official_names(on_meta(l2vit.l2vit_tiny))
    assert convert({f"module.{k}": v for k, v in tiny.items()}, window=14)[1]["window"] == 14


def test_foreign_weights_are_refused():
    with pytest.raises(provenn.core.errors.UserError, match="expected a state dict of L2ViT's Tiny, Small or Base"):
        convert({"head.weight": torch.zeros(10, 4)})
    narrow = official_names(on_meta(l2vit.L2ViT, dims=(64, 128, 256, 512), depths=(2, 2, 6, 2), heads=(2, 4, 8, 16)))
    with pytest.raises(provenn.core.errors.UserError, match="the names, but not the sizes, of one of l2vit_tiny"):
        convert(narrow)


# Concentration


def test_measures_of_concentration_know_their_ends():
    uniform, single = torch.full((1, 20), 3.0), torch.eye(20)[:1]
    nothing = torch.zeros(1, 20)
    rows = torch.cat([uniform, single, nothing])
    torch.testing.assert_close(row_entropy(rows), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(top_share(rows), torch.tensor([0.1, 1.0, 0.1]))
    half = torch.zeros(1, 16)
    half[0, :4] = 0.25
    assert row_entropy(half).item() == pytest.approx(0.5)
    torch.testing.assert_close(row_entropy(7 * half), row_entropy(half))  # of shares: the scale does not count


def test_maps_that_are_measured_are_those_that_attend():
    softmax, x = SoftmaxAttention(24, 3, causal=False).double(), draw(2, 300, 24)
    y = softmax_weights(softmax, x) @ softmax.value(x).unflatten(-1, (3, 8)).transpose(1, 2)
    torch.testing.assert_close(softmax.out(y.transpose(1, 2).flatten(2)), softmax(x))
    layer = attention(24, 3)
    found = entropies(nn.Sequential(layer, softmax), x)
    assert list(found) == ["0", "1"] and found["1"].shape == (2, 3, 300)
    torch.testing.assert_close(found["0"], row_entropy(layer.weights(x)))  # made of 256 rows at a time
    torch.testing.assert_close(found["1"], row_entropy(softmax_weights(softmax, layer(x))))


def test_what_comes_from_nearby_is_told():
    near, far = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=5, dilation=5)
    x = torch.randn(2, 4, 15, 15)
    torch.testing.assert_close(local_share(lambda x: x + near(x), x), torch.ones(2))
    shares = local_share(lambda x: x + far(x), x)
    assert bool((shares < 0.3).all()) and bool((shares > 0).all())


def test_networks_that_are_compared_are_what_they_are_called():
    def counts(study, build, classes):
        options = {"num_classes": classes, "in_channels": 1}
        return {a: cost.count_parameters(on_meta(build, part=p, **options)) for a, (_, p) in study.variants.items()}

    plain = counts(experiments.LCM, plain_network, 16)
    assert abs(plain["linear_wide"] / plain["linear_lcm"] - 1) < 0.01
    module = 4 * (32 * 50 * 2 + 4 * 32)
    assert plain["linear_lcm"] - plain["linear"] == module == plain["softmax_lcm"] - plain["softmax"]
    assert plain["linear"] - plain["softmax"] == 4  # a scale each
    turns = counts(experiments.TURNS, two_stages, 16)
    assert turns["swin"] >= turns["l2vit"] and max(turns.values()) < 1.1 * turns["l2vit"]
    windows = on_meta(two_stages, part={"blocks": ("window",)}, num_classes=2)
    assert {type(block) for stage in windows.stages for block in stage} == {LWABlock}
    heads = counts(experiments.MOSAICS, segmenter, 5).values()
    assert max(heads) / min(heads) < 1.3


def test_inspection_says_how_far_each_token_spreads(tmp_path):
    from PIL import Image

    Image.fromarray((torch.rand(30, 40, 3) * 255).byte().numpy()).save(tmp_path / "a.png")
    inspection = provenn.inspect("l2vit", tmp_path / "a.png", preset="l2vit_tiny")
    assert [row.numel() for row in inspection.layers.values()] == [3136, 784, 196, 196, 196, 49]
    assert all(row.min() >= 0 and row.max() <= 1 + 1e-5 for row in inspection.layers.values())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LinearGlobalAttention(64, 2, causal=True), "causal must be False, got True"),
        (lambda: LinearGlobalAttention(64, 2, floor=-1), "floor must not be negative, got -1"),
        (lambda: LinearGlobalAttention(64, 3), "heads must divide dim"),
        (lambda: LinearGlobalAttention(64, 2)(torch.ones(1, 4, 32)), r"expected \(batch, tokens, 64\)"),
        (lambda: LocalConcentration(8, 4), "odd and at least 1, got 4"),
        (lambda: LocalConcentration(8)(torch.ones(1, 4, 8, 8)), r"expected \(batch, 8 channels, height, width\)"),
        (lambda: ConditionalPositions(0), "channels must be at least 1, got 0"),
        (lambda: WindowAttention(8, 2, 0), "window must be at least 1, got 0"),
        (lambda: LWABlock(8, 2, drop_path=1.0), "drop_path must lie between 0 and 1, below 1, got 1.0"),
        (lambda: LGABlock(8, 2, mlp_ratio=0), "mlp_ratio must leave a hidden unit, got 0"),
        (lambda: l2vit.l2vit_mini(blocks=("window", "shifted")), "blocks must name 'window' or 'global' in turns"),
        (lambda: l2vit.l2vit_mini(blocks="window"), "in turns, got 'window'"),
        (lambda: l2vit.l2vit_mini(attention="elu"), "attention must be one of linear, softmax, got 'elu'"),
        (lambda: l2vit.l2vit_mini(stem=3), "stem must be one of 1, 2, 4, got 3"),
        (lambda: l2vit.l2vit_mini(heads=(1,)), "must name the same stages"),
        (lambda: l2vit.l2vit_mini(dims=(33, 64)), "first of dims must be even, got 33"),
        (lambda: l2vit.l2vit_mini(num_classes=-1), "num_classes at least 0"),
        (lambda: l2vit.l2vit_mini()(torch.ones(1, 1, 8, 8)), "expected images of 3 channels, got 1"),
        (lambda: l2vit.l2vit_mini()(torch.ones(1, 3, 0, 8)), "at least 1×1 pixels"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
