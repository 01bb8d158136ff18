"""Properties of the blocks of CRAFT, and its exact experiments."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, max_pool2d
from torch.utils.flop_counter import FlopCounterMode

from provenn.core.errors import UserError
from provenn.data.resize import bicubic
from provenn.evidence import Run
from provenn.nn.padding import PadToMultiple
from provenn.papers import craft
from provenn.papers.craft import HFB, HFERB, SRWAB, PositionBias, experiments, official, studies
from provenn.papers.craft.layers import windows_without_wrap
from provenn.tasks import TaskData
from provenn.tasks.super_resolution import Whole
from provenn.testing import seeded_state


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def awake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights large enough that no branch is negligible."""
    state = seeded_state({name: t.shape for name, t in module.state_dict().items()}, seed)
    module.load_state_dict(state)
    return module.eval()


@pytest.mark.parametrize(
    ("build", "count"), [(craft.craft_x2, 737_756), (craft.craft_x3, 744_251), (craft.craft_x4, 753_344)]
)
def test_published_parameter_counts(build, count):
    assert parameters(build()) == count


def test_parameters_of_the_parts_of_x4():
    model = craft.craft_x4()
    of = lambda kind: [parameters(m) for m in model.modules() if isinstance(m, kind)]  # noqa: E731
    assert of(SRWAB) == [19_478] * 16
    assert of(HFB) == [31_284] * 8
    assert of(HFERB) == [8_160] * 8
    assert sum(parameters(group.conv) for group in model.groups) == 83_136
    assert [parameters(m) for m in (model.first, model.last, model.norm, model.upsample)] == [1_344, 20_784, 96, 20_784]
    assert [parameters(m.upsample) for m in (craft.craft_x2(), craft.craft_x3())] == [5_196, 11_691]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_output_is_scale_times_larger(scale):
    x = torch.rand(2, 3, 16, 48)
    assert craft.craft_small(scale=scale)(x).shape == (2, 3, 16 * scale, 48 * scale)


@pytest.mark.parametrize("size", [(17, 32), (32, 24), (8, 8)])
def test_the_core_refuses_other_sizes(size):
    with pytest.raises(ValueError, match=f"multiples of 16, got {size[0]}×{size[1]}"):
        craft.craft_small()(torch.rand(1, 3, *size))


def test_published_position_bias_is_the_same_for_every_offset():
    bias = awake(craft.SRWAB(48)).attention.bias
    assert [b.constant for b in bias] == [True, True]
    for b in bias:
        table = b()
        assert table.shape == (3, 64, 64)
        assert (table == table[:, :1, :1]).all()
        assert not any(p.requires_grad for p in b.parameters())


def test_wider_position_bias_depends_on_the_offset_alone():
    bias = awake(PositionBias((4, 16), heads=3, width=8))
    table = bias().reshape(3, 4, 16, 4, 16)
    torch.testing.assert_close(table[:, :3, 1:, :3, 1:], table[:, 1:, :15, 1:, :15])
    direct = bias.head(bias.hidden(bias.embed(torch.tensor([[2.0, -5.0]]))))[0]
    torch.testing.assert_close(table[:, 3, 4, 1, 9], direct)
    assert table.flatten(1).std(dim=1).min() > 1e-3


def test_attention_in_a_window_does_not_know_positions_unless_the_bias_is_repaired():
    order = torch.randperm(64)
    qkv = torch.randn(1, 4, 16, 72)  # one window of the first half of the channels
    shuffled = qkv.reshape(1, 64, 72)[:, order].reshape(1, 4, 16, 72)

    def difference(position_dim):
        attention = awake(craft.RectangleWindowAttention(24, 2, position_dim=position_dim))
        wide = lambda t: attention(t.repeat(1, 4, 1, 1))[:, :4, :, :12].reshape(64, 12)  # noqa: E731
        return (wide(shuffled) - wide(qkv)[order]).abs().max().item()

    assert difference(None) < 1e-5
    assert difference(8) > 1e-2


def influence(block: SRWAB, row: int, column: int, size: int = 32) -> torch.Tensor:
    """Which output positions change when the input changes at one pixel."""
    nn.init.zeros_(block.locality.weight)
    x = torch.randn(1, 48, size, size)
    moved = x.clone()
    moved[:, :, row, column] += torch.randn(48)
    return ((block(moved) - block(x)).abs().amax(dim=1)[0] > 1e-4).detach()


def test_a_pixel_reaches_its_two_windows():
    seen = influence(awake(SRWAB(48)), 5, 19)
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[4:8, 16:32] = True
    expected[0:16, 16:20] = True
    assert torch.equal(seen, expected)
    assert seen.sum() == 112


def test_shifted_windows_wrap_around_the_borders():
    seen = influence(awake(SRWAB(48, shifted=True)), 0, 0)
    expected = torch.zeros(32, 32, dtype=torch.bool)
    rows, columns = torch.arange(32).roll(2)[:4], torch.arange(32).roll(8)[:16]
    expected[rows[:, None], columns] = True
    expected[columns[:, None], rows] = True
    assert torch.equal(seen, expected)
    assert seen.sum() == 112
    assert seen[24:].any() and seen[:, 24:].any()


def test_masked_windows_do_not_wrap_around():
    block = awake(SRWAB(48, shifted=True, wrap=False))
    for column, near, far in ((0, slice(0, 2), slice(0, 8)), (31, slice(30, 32), slice(24, 32))):
        expected = torch.zeros(32, 32, dtype=torch.bool)
        expected[:2, far] = True
        expected[:8, near] = True
        assert torch.equal(influence(block, 0, column), expected)


def test_the_mask_changes_nothing_inside():
    wrapping, masked = awake(SRWAB(24, shifted=True)), SRWAB(24, shifted=True, wrap=False)
    masked.load_state_dict(wrapping.state_dict())
    x = torch.randn(2, 24, 48, 48)
    inside = (..., slice(9, -9), slice(9, -9))
    torch.testing.assert_close(masked(x)[inside], wrapping(x)[inside])
    assert windows_without_wrap(48, 48, (4, 16), (0, 0)).all()


@pytest.mark.parametrize("shifted", [False, True])
def test_rolling_by_whole_windows_commutes(shifted):
    block = awake(SRWAB(24, shifted=shifted))
    block.locality.padding_mode = "circular"
    block.locality._reversed_padding_repeated_twice = [1, 1, 1, 1]
    x = torch.randn(1, 24, 32, 48)
    torch.testing.assert_close(
        block(x.roll((16, -16), dims=(2, 3))), block(x).roll((16, -16), dims=(2, 3)), rtol=1e-4, atol=1e-5
    )


def test_attention_equals_its_definition_window_by_window():
    """The definition: roll, cut, softmax(q kᵀ/√d) v, paste, roll back, for each half by itself."""
    attention = craft.RectangleWindowAttention(24, 6, shifted=True)
    qkv = torch.randn(2, 32, 16, 72)
    for half, (rows, columns), (down, right) in ((0, (4, 16), (2, 8)), (1, (16, 4), (8, 2))):
        expected = torch.zeros(2, 32, 16, 12)
        for top in range(0, 32, rows):
            for left in range(0, 16, columns):
                r = ((torch.arange(rows) + top + down) % 32)[:, None]
                c = (torch.arange(columns) + left + right) % 16
                tokens = qkv[:, r, c].reshape(2, 64, 3, 2, 3, 4)[:, :, :, half]
                q, k, v = tokens.permute(2, 0, 3, 1, 4)
                a = (q @ k.transpose(-1, -2) / 2).softmax(dim=-1)
                torch.testing.assert_close(a.sum(dim=-1), torch.ones(2, 3, 64))
                expected[:, r, c] = (a @ v).permute(0, 2, 1, 3).reshape(2, rows, columns, 12)
        torch.testing.assert_close(attention(qkv)[..., 12 * half : 12 * half + 12], expected)


def test_windows_and_the_convolution_beside_them_read_values_alone():
    block, x = awake(SRWAB(8, 2)), torch.randn(1, 8, 16, 16)
    for values in (block.qkv.weight.data[16:], block.qkv.bias.data[16:], block.locality.bias.data):
        values.zero_()
    tokens = x.permute(0, 2, 3, 1) + block.project.bias
    expected = tokens + block.mlp(block.norm2(tokens))
    torch.testing.assert_close(block(x), expected.permute(0, 3, 1, 2))


def test_hferb_without_its_last_convolution_is_the_identity():
    block = HFERB(8)
    nn.init.zeros_(block.merge.weight)
    nn.init.zeros_(block.merge.bias)
    x = torch.randn(2, 8, 7, 5)
    assert torch.equal(block(x), x)


def test_hferb_is_its_equation_with_another_pool_too():
    x = torch.randn(2, 8, 7, 5)
    for pool, pooled in ((None, max_pool2d(x[:, 4:], 3, 1, 1)), (nn.Identity, x[:, 4:])):
        block = awake(HFERB(8, pool=pool))
        branches = [gelu(block.local(x[:, :4])), gelu(block.sharp(pooled))]
        torch.testing.assert_close(block(x), x + block.merge(torch.cat(branches, 1)))


@pytest.mark.parametrize("build", [craft.craft_x2, craft.craft_small])
def test_a_preset_s_options_reach_every_window(build):
    published, repaired = (
        [m for m in model.modules() if isinstance(m, SRWAB)] for model in (build(), build(wrap=False, position_dim=2))
    )
    assert len(published) == len(repaired) > 0
    for ours, theirs in zip(repaired, published):
        assert theirs.attention.wrap and all(b.constant for b in theirs.attention.bias)
        assert not ours.attention.wrap and {b.embed.out_features for b in ours.attention.bias} == {2}


def test_max_pooling_is_monotone_and_sees_no_padding():
    pool = HFERB(8).pool
    x = torch.randn(1, 4, 6, 6) - 10
    assert (pool(x + torch.rand_like(x)) >= pool(x)).all()
    assert (pool(x) >= x).all() and pool(x).max() == x.max()


@pytest.mark.parametrize("size", [(4, 4), (9, 7), (32, 16)])
def test_fusion_attends_over_channels_whatever_the_size(size):
    attention = HFB(48).attention
    q, k = (100 * torch.randn(2, 6, 8, size[0] * size[1]) for _ in range(2))
    cosines = attention.cosines(q, k)
    assert cosines.shape == (2, 6, 8, 8)
    assert cosines.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(attention.cosines(q, q).diagonal(dim1=2, dim2=3), torch.ones(2, 6, 8))


def test_lengths_over_large_maps_do_not_overflow_in_half_precision():
    attention = HFB(48).attention
    q = 100 * torch.randn(1, 6, 8, 10_000)
    torch.testing.assert_close(attention.cosines(q.half(), q.half()), attention.cosines(q, q), rtol=1e-3, atol=1e-3)


def test_fusion_forgets_the_size_of_its_query():
    block = awake(HFB(24))
    low, high = torch.randn(2, 24, 9, 6), torch.randn(2, 24, 9, 6)
    for factor in (1e-3, 0.5, 1e4):
        torch.testing.assert_close(block(low, factor * high), block(low, high), rtol=1e-4, atol=1e-5)
    assert (block(low, -high) - block(low, high)).abs().max() > 1e-3


def test_zero_values_leave_only_the_low_branch_and_the_gate():
    block = awake(HFB(24))
    low, high = torch.randn(1, 24, 8, 8), torch.randn(1, 24, 8, 8)
    nn.init.zeros_(block.attention.project.weight)
    nn.init.zeros_(block.feed.project.weight)
    assert torch.equal(block(low, high), low)


def test_hidden_width_of_the_gate_is_odd():
    assert craft.GDFN(48).project.in_channels == 127


def test_blocks_keep_gradients_right():
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    window = (2, 4)
    blocks = [awake(SRWAB(4, 2, window=window, shifted=True, position_dim=2)), awake(HFERB(4))]
    for block in blocks:
        assert torch.autograd.gradcheck(block.double(), (x,), fast_mode=True)
    assert torch.autograd.gradcheck(awake(HFB(4, 2)).double().forward, (x, x.detach() * 2 + 1), fast_mode=True)


def test_without_an_upsampler_the_output_is_the_mean_colour():
    model, over = craft.craft_small(over_bicubic=False), craft.craft_small()
    for module in (model, over):
        nn.init.zeros_(module.upsample[0].weight)
        nn.init.zeros_(module.upsample[0].bias)
    x = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(model(x), model.mean.expand(1, 3, 32, 32))
    torch.testing.assert_close(over(x)[..., 4:-4, 4:-4], bicubic(x, (32, 32))[..., 4:-4, 4:-4])


def test_linear_layers_start_small_and_without_bias():
    for module in craft.craft_x2().groups.modules():
        if isinstance(module, nn.Linear) and module.weight.numel() > 1000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not module.bias.any()


def macs(model: nn.Module, height: int, width: int) -> int:
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.zeros(1, 3, height, width))
    return counter.get_total_flops() // 2


def test_multiplications_are_linear_in_the_area():
    model = craft.craft_x4().eval()
    assert macs(model, 64, 64) == pytest.approx(3.462e9, rel=2e-4)
    assert macs(model, 32, 128) == macs(model, 64, 64)
    small = craft.craft_small().eval()
    assert macs(small, 64, 96) == 6 * macs(small, 32, 32)


def network(variant: str) -> craft.CRAFT:
    return studies.small_network(experiments.NETWORKS.variants[variant][1])


def test_networks_that_are_compared_are_of_equal_size():
    full = parameters(network("craft"))
    for variant in experiments.NETWORKS.variants:
        assert parameters(network(variant)) == pytest.approx(full, rel=0.03), variant


@pytest.mark.parametrize(
    ("variant", "has", "lacks"),
    [
        ("craft", {SRWAB, HFERB, HFB, nn.MaxPool2d}, {studies.SumFusion}),
        ("no_hferb", {SRWAB, HFB}, {HFERB}),
        ("no_srwab", {HFERB, HFB}, {SRWAB}),
        ("sum", {SRWAB, HFERB, studies.SumFusion}, {HFB, craft.InterAttention}),
        ("conv", {studies.ConvPair}, {SRWAB, HFERB, HFB}),
        ("attention", {SRWAB}, {HFERB, HFB, studies.ConvPair}),
        ("short", {SRWAB}, {HFERB, HFB, studies.ConvPair}),
    ],
)
def test_networks_that_are_compared_lack_what_they_are_said_to_lack(variant, has, lacks):
    kinds = {type(module) for module in network(variant).modules()}
    assert has <= kinds and not lacks & kinds
    shifted = [any(map(any, m.attention.shifts)) for m in network(variant).modules() if isinstance(m, SRWAB)]
    assert shifted == [False, True] * (len(shifted) // 2)


def test_attention_alone_knows_positions_from_a_bias_and_has_no_convolution_in_its_blocks():
    for variant, side in (("attention", 8), ("short", 4)):
        blocks = [m for m in network(variant).modules() if isinstance(m, SRWAB)]
        assert len(blocks) == 8 and {b.attention.windows for b in blocks} == {((side, side), (side, side))}
        for block in blocks:
            assert not any(isinstance(m, nn.Conv2d) for m in block.modules())
            assert not block.attention.wrap and not any(b.constant for b in block.attention.bias)


def test_the_published_network_is_what_the_full_small_one_is_made_of():
    ours = studies.full(48)
    assert [type(m) for m in ours.modules()] == [type(m) for m in craft.cross_refinement(48).modules()]


def test_without_its_attention_the_fusion_adds_the_branches_up():
    fusion = awake(studies.SumFusion(8))
    nn.init.zeros_(fusion.feed.project.weight)
    low, high = torch.randn(2, 1, 8, 5, 5)
    torch.testing.assert_close(fusion(low, high), low + high)


@pytest.mark.parametrize("smoke", [True, False])
def test_a_training_step_sees_32_pixels_and_the_photographs_are_apart(smoke):
    data = studies.photographs(0, smoke)
    sides: list[int] = []

    class Spy(nn.Module):
        scale, multiple = 2, 16

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sides.extend(x.shape[-2:])
            return nn.functional.interpolate(x, scale_factor=2)

    experiments.NETWORKS.of_task.loss(Spy(), torch.stack([data.train[0], data.train[1]]))
    assert sides == [32, 32] and data.meta == {"scale": studies.SCALE}
    pieces = [data.val[0], *(data.test[i] for i in range(len(data.test)))]
    assert all(piece.shape == (3, *2 * [64 if smoke else 256]) for piece in pieces)
    for piece in pieces:  # no corner of what is tested stands in a photograph that is trained on
        for photo in data.train.photos:
            rows = np.lib.stride_tricks.sliding_window_view(photo[..., 0], 16, axis=1)
            assert not (rows == piece[0, 0, :16].numpy()).all(-1).any()


class Says(nn.Module):
    """A network that answers every input with one image."""

    scale, multiple = 2, 1

    def __init__(self, image: torch.Tensor):
        super().__init__()
        self.image = image

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.image[None] / 255


def test_the_high_band_is_what_lies_above_half_nyquist():
    columns = torch.arange(64)  # half of Nyquist is 16 periods over 64 pixels
    slow, fast = (60 * torch.cos(2 * torch.pi * k * columns / 64).expand(3, 64, 64) for k in (15, 18))
    assert [studies.high_share(wave[None]) for wave in (slow, fast)] == pytest.approx([0, 1], abs=1e-4)
    photo = (127 + slow / 2 + fast / 2).round().byte()
    data = photos(photo)
    for lacking, high, low in ((Says(127 + slow / 2), 1, 0), (Says(127 + fast / 2), 0, 1)):
        assert studies.band_error(lacking, data, high=True) == pytest.approx(high, abs=0.05)
        assert studies.band_error(lacking, data, high=False) == pytest.approx(low, abs=0.05)


class Interpolation(nn.Module):
    """Bicubic, which needs the high frequencies of its input."""

    scale, multiple = 2, 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bicubic(x, (2 * x.shape[-2], 2 * x.shape[-1]))


def photos(*given: torch.Tensor) -> TaskData:
    whole = Whole([photo.permute(1, 2, 0).numpy() for photo in given])
    return TaskData("photos", whole, whole, whole, "", meta={"scale": 2})


def test_what_needs_high_frequencies_loses_more_than_what_does_not():
    class Smooth(Interpolation):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False))

    data = studies.photographs(0, True)
    assert studies.drop(Interpolation(), data) > studies.drop(Smooth(), data) + 0.1
    assert studies.gain(Interpolation(), data) == pytest.approx(0, abs=0.01)


def test_removing_frequencies_removes_the_highest():
    rows = torch.arange(32)
    slow, fast = (127 + 40 * torch.cos(2 * torch.pi * k * rows / 32).expand(3, 32, 32) for k in (2, 15))
    torch.testing.assert_close(studies.without_highest(slow, 50), slow.round())
    assert (studies.without_highest(fast, 50) == 127).all()
    assert torch.equal(studies.without_highest(fast.round(), 0), fast.round())


def test_the_sharper_branch_is_the_one_with_more_high_frequencies():
    class Filtered(nn.Module):
        def __init__(self, high: bool):
            super().__init__()
            self.high = high

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            smooth = nn.functional.avg_pool2d(x, 5, 1, 2)
            return x - smooth if self.high else smooth

    data = studies.photographs(0, True)
    for high in (True, False):
        block = lambda dim, high=high: craft.CRFB(Filtered(not high), Filtered(high), studies.SumFusion(dim))  # noqa: E731
        value = studies.sharpness(studies.small_network(block).eval(), data)
        assert value > 2 if high else 0 < value < 0.5
    assert studies.sharpness(network("conv").eval(), data) == studies.sharpness(network("no_hferb").eval(), data) == 0


@pytest.mark.parametrize(("scale", "printed"), [(2, 878), (3, 886), (4, 897)])
def test_swinir_light_is_counted_as_its_paper_prints_it(scale, printed):
    whole = studies.swinir_light(scale)
    tables = sum(p.numel() for p in whole.parameters() if p.shape == (6, 15**2))
    assert round((parameters(whole) - tables) / 1000) == printed


def test_one_pixel_reaches_two_windows_or_its_neighbours():
    block = SRWAB(studies.DIM, studies.HEADS)
    assert studies.reach(HFERB(studies.DIM), 32) == 9
    assert 112 <= studies.reach(block, 32) <= 112 + 9
    block.locality = studies.Nothing()
    assert studies.reach(block, 32) == 112


@pytest.mark.parametrize("measure", [experiments.position_bias_is_dead, experiments.windows_wrap_around])
def test_what_the_authors_code_does_is_found(measure, tmp_path):
    assert measure(Run("craft", tmp_path)).effect == 1


def test_with_a_living_bias_it_is_not_said_to_be_dead(monkeypatch, tmp_path):
    real = craft.RectangleWindowAttention
    monkeypatch.setattr(
        experiments,
        "RectangleWindowAttention",
        lambda dim, position_dim=None: real(dim, position_dim=position_dim or 2),
    )
    assert experiments.position_bias_is_dead(Run("craft", tmp_path)).effect == 0


def test_the_authors_two_ways_to_pad_give_two_images_where_nothing_is_missing():
    """Evaluation mirrors with the edge and always adds; validation without it, and only what is missing."""
    model, x = awake(craft.craft_small()), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        evaluation = PadToMultiple(model, 16, 2, mode="symmetric", always=True)(x)
        validation = PadToMultiple(model, 16, 2, mode="reflect")(x)
    assert torch.equal(validation, model(x))
    assert (evaluation - validation)[..., 24:40, 24:40].abs().max() > 1e-3


def test_bfloat16_stays_near_float32():
    model = awake(craft.craft_x2())
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    assert (half - full).norm() / full.norm() < 0.03


def test_official_names_cover_every_parameter():
    with pytest.raises(UserError, match="not CRAFT weights"):
        official.convert({"fc.weight": torch.zeros(2, 2)})
    state = {
        "upsample.0.weight": torch.zeros(12, 60, 3, 3),
        "layers.0.residual_group.srwa_blocks.0.attns.0.pos.pos_proj.weight": torch.zeros(1, 2),
    }
    with pytest.raises(UserError, match="60 channels"):
        official.convert(state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SRWAB(48, 5), "heads must be even"),
        (lambda: SRWAB(50, 6), "dim=50"),
        (lambda: SRWAB(48, window=(3, 16)), "multiple of short"),
        (lambda: SRWAB(48, position_dim=0), "position_dim"),
        (lambda: HFERB(7), "dim must be even"),
        (lambda: HFB(48, 5), "heads must divide"),
        (lambda: craft.CRAFT(0), "scale must be"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
