"""Terminator: what the brief calls exact, its traps, the authors' names, optimizers, sizes, and what it refuses."""

import copy
import io

import pytest
import torch
from torch.nn import functional as F

import provenn
from provenn.bench import count_parameters
from provenn.errors import UserError
from provenn.nn.auxiliary import collect_auxiliary
from provenn.papers.terminator import (
    GIBS,
    RGU,
    HyperChannelInteraction,
    HyperInteraction,
    HyperKernel,
    HyperZZWGlobal,
    HyperZZWLocal,
    Kar2,
    Kar3,
    LocalHyperKernel,
    SFNEBlock,
    Terminator2d,
    global_product,
    renormalize,
    slow_neural_loss,
    terminator_cifar10,
    terminator_mini,
)
from provenn.papers.terminator.official import convert
from provenn.training import Recipe

F64 = torch.float64


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mini(seed=0, **options) -> Terminator2d:
    torch.manual_seed(seed)
    return terminator_mini(**{"num_classes": 4, **options}).double()


# Slow nets


def test_a_kernel_is_the_function_of_coordinates_that_the_paper_writes():
    torch.manual_seed(0)
    net = HyperKernel(3, 5, hidden=4, layers=2).double()
    torch.nn.init.normal_(net.plane)
    kernel = net()
    for row, column in ((0, 0), (1, 4), (3, 2)):
        c = torch.tensor([-1 + row / 2, -1 + column / 2], dtype=F64)
        h = net.filters[0](c).sin()
        for g, u in zip(net.filters[1:], net.mixers):
            h = g(c).sin() * u(h) + net.plane[row, column]
        torch.testing.assert_close(kernel[0, :, row, column], net.out(h), atol=1e-6, rtol=1e-6)


def test_slow_nets_start_as_the_code_has_it():
    torch.manual_seed(0)
    net = HyperKernel(64, 32)
    assert all(torch.equal(u.bias, torch.ones(64)) for u in net.mixers)  # products die with 0
    assert not net.plane.any() and not net.out.bias.any()
    bound = 3**0.5 / 64**0.5 / 32  # of kaiming_uniform with gain 1, over the root of the grid's points
    assert 0.9 * bound < net.out.weight.abs().max() <= bound
    spread = [f.weight.abs().mean().item() / (2 * torch.pi * 2000) for f in net.filters]
    for i, mean in enumerate(spread):  # uniform ±1/√2 has a mean size of 0.354, Gamma(6/(i+1)) a mean of 6/(i+1)
        assert mean == pytest.approx(0.354 * 6 / (i + 1), rel=0.35)


def test_only_local_kernels_depend_on_the_input_and_only_by_the_batch_mean():
    torch.manual_seed(0)
    local = LocalHyperKernel(6, 5).double()
    z = draw(4, 6, 8, 8)
    kernel = local(z)
    assert kernel.shape == (6, 1, 5, 5)
    torch.testing.assert_close(local(z[[2, 0, 3, 1]]), kernel)
    other = z.clone()
    other[0], other[1] = z[0] + 1, z[1] - 1  # the same mean
    torch.testing.assert_close(local(other), kernel)
    assert not torch.allclose(local(z + 1), kernel)


def test_renormalisation_has_its_value_and_its_gradient_through_the_norm_alone():
    h = draw(9, 4).requires_grad_()
    alpha, beta = draw(4, seed=1), draw(4, seed=2)
    out = renormalize(h, alpha, beta)
    torch.testing.assert_close(out, alpha * h + beta * h / h.norm(dim=0))
    weight = draw(9, 4, seed=3)
    (grad,) = torch.autograd.grad((out * weight).sum(), h)
    (expected,) = torch.autograd.grad((beta * h / h.norm(dim=0) * weight).sum(), h)
    torch.testing.assert_close(grad, expected)


def test_half_precision_does_not_reach_the_coordinates():
    torch.manual_seed(0)
    net = HyperKernel(4, 16)
    low = copy.deepcopy(net).bfloat16()
    net.load_state_dict(low.state_dict())
    torch.testing.assert_close(low().float(), net(), rtol=0.02, atol=0.02 * net().abs().max().item())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(net(), low().float(), rtol=0.02, atol=0.02 * net().abs().max().item())


# Operators


def test_global_product_is_a_product_a_channel_and_sees_a_cross():
    weights, z = draw(2, 3, 5, 5).requires_grad_(), draw(2, 3, 5, 5, seed=1).requires_grad_()
    out = global_product(weights, z)
    looped = torch.stack([torch.stack([w @ f for w, f in zip(a, b)]) for a, b in zip(weights, z)])
    torch.testing.assert_close(out, looped)
    rows, columns = torch.autograd.grad(out[0, 1, 2, 3], (weights, z))
    assert rows[0, 1, 2].all() and rows.count_nonzero() == 5
    assert columns[0, 1, :, 3].all() and columns.count_nonzero() == 5


def test_a_kernel_of_ones_leaves_the_map():
    layer, x = HyperZZWGlobal(3, 6).double(), draw(2, 3, 6, 6)
    with torch.no_grad():
        layer.kernel.out.weight.zero_()
        layer.kernel.out.bias.fill_(1.0)
    torch.testing.assert_close(layer(x), x @ x)
    torch.testing.assert_close(layer(x, draw(2, 3, 6, 6, seed=1)), x @ draw(2, 3, 6, 6, seed=1))


@pytest.mark.parametrize("k", [3, 5, 9])
def test_local_convolution_is_grouped_with_zeros_around(k):
    torch.manual_seed(0)
    layer, x, z = HyperZZWLocal(6, k).double(), draw(3, 6, 8, 8), draw(3, 6, 8, 8, seed=1)
    kernel = layer.kernel(z)
    y = torch.stack([F.conv2d(x[:, c : c + 1], kernel[c : c + 1], padding=k // 2)[:, 0] for c in range(6)], dim=1)
    y = layer.mix(y)
    y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x, z), F.gelu(y) + layer.bias)


def test_rgu_reads_its_input_three_times():
    """V of x, as the code has it; in the paper's figure it follows K."""
    torch.manual_seed(0)
    rgu, x = RGU(4, 5).double(), draw(2, 4, 5, 5)
    torch.nn.init.normal_(rgu.plane)
    gated = rgu.key(x) * rgu.query(rgu.value(x))
    standard = F.instance_norm(gated)
    torch.testing.assert_close(rgu(x), rgu.out(F.gelu(standard) + rgu.plane))


def test_interactions_scale_by_squares():
    torch.manual_seed(0)
    hci, x = HyperChannelInteraction(6).double(), draw(2, 6, 4, 4)
    pooled = x.mean((2, 3))
    torch.testing.assert_close(hci(x), x * (hci.kernel()[0] * pooled**2).sigmoid()[..., None, None])
    torch.testing.assert_close(hci(-x), -hci(x))
    hi, y = HyperInteraction(6, 4).double(), draw(2, 6, 4, 4, seed=1)
    by_channel = hi.by_channel().view(1, 6, 1, 1) * y.mean((2, 3), keepdim=True) ** 2
    by_place = hi.by_place() * y.mean(1, keepdim=True) ** 2
    torch.testing.assert_close(hi(y, x), x * (by_channel * by_place).sigmoid())


def test_gibs_alternates_and_has_mean_zero():
    gibs, x = GIBS(24).double(), 3 * draw(4, 24, 6, 6) + 2
    y = gibs(x)
    for group in range(12):
        part = y[:, 2 * group : 2 * group + 2]
        over = (0, 2, 3) if group % 2 == 0 else (2, 3)
        assert part.mean(over).abs().max() < 1e-6
        torch.testing.assert_close(part.std(over, correction=0), torch.ones_like(part.mean(over)), atol=1e-4, rtol=0)
        torch.testing.assert_close(part, F.batch_norm(x, None, None, training=True)[:, 2 * group : 2 * group + 2]) if (
            group % 2 == 0
        ) else torch.testing.assert_close(part, F.instance_norm(x)[:, 2 * group : 2 * group + 2])
    assert not list(gibs.parameters())


# Blocks and networks


def test_a_zero_image_silences_the_global_branches():
    torch.manual_seed(0)
    block = SFNEBlock(3, 4, 6, branches=("global", "global mixed", "global hci", "gated")).double()
    assert not block.joined(torch.zeros(2, 3, 6, 6, dtype=F64))[0].any()
    assert block.joined(draw(2, 3, 6, 6))[0].flatten(1).any(dim=1).all()


def test_no_residual():
    torch.manual_seed(0)
    block = SFNEBlock(3, 4, 6).double()
    torch.nn.init.zeros_(block.bottleneck.weight)
    out, _ = block(draw(2, 3, 6, 6))
    assert out.std() == 0


def test_branches_of_code_and_figure():
    code, paper = (SFNEBlock(12, 2, 8, earlier=1, branches=name) for name in ("code", "paper"))
    assert code.bottleneck.in_channels == 12 * 11 and paper.bottleneck.in_channels == 12 * 10
    assert [layer.kernel.size for layer in paper.local.values()] == [9, 5, 7]


def test_earlier_outputs_are_tiled_and_stand_third_and_last_but_one():
    torch.manual_seed(0)
    block = SFNEBlock(12, 1, 6, earlier=2).double()
    x, near, far = draw(2, 12, 6, 6), draw(2, 6, 6, 6, seed=1), draw(2, 3, 6, 6, seed=2)
    parts = block.joined(x, [near, far])[0].split(12, dim=1)
    assert len(parts) == 12
    torch.testing.assert_close(parts[2], torch.cat([near] * 2, dim=1))
    torch.testing.assert_close(parts[10], torch.cat([far] * 4, dim=1))


def test_counts_of_the_brief():
    model = terminator_cifar10()
    assert [count_parameters(block) for block in model.blocks] == [53_377, 57_824, 105_188, 253_580, 863_996]
    assert count_parameters(model) == 1_336_855
    assert [block.bottleneck.in_channels for block in model.blocks] == [30, 120, 396, 792, 1728]


def test_a_batch_s_company_changes_predictions_unless_running():
    x = draw(4, 1, 8, 8)
    model = mini().eval()
    assert (model(x)[:2] - model(x[:2])).abs().max() > 1e-3
    model = mini(stats="running").train()
    with collect_auxiliary():
        for seed in range(3):
            model(draw(8, 1, 8, 8, seed=seed))
    model.eval()
    torch.testing.assert_close(model(x)[:1], model(x[:1]))
    local = model.blocks[0].local["local3"].kernel
    assert int(local.seen) == 3 and local.pooled.any()


def test_running_context_is_the_mean_of_the_first_batches():
    torch.manual_seed(0)
    local = LocalHyperKernel(4, 3, stats="running").double().train()
    maps = [draw(2, 4, 6, 6, seed=seed) for seed in range(3)]
    for z in maps:
        local(z)
    torch.testing.assert_close(local.pooled, torch.stack([local.context(z) for z in maps]).mean(0))


def test_saved_weights_give_the_same_at_the_first_pass():
    """In the authors' code the last layers are scaled again."""
    model, x = mini().eval(), draw(2, 1, 8, 8)
    expected, file = model(x), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = mini(seed=1).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)


def test_slow_loss_by_both_definitions():
    shallow, deep = draw(1, 3, 4, 4), draw(1, 12, 4, 4, seed=1)
    by_sum = ((shallow.sum(1) - deep.sum(1)) ** 2).mean()
    torch.testing.assert_close(slow_neural_loss([shallow, deep]), by_sum)
    by_tile = ((torch.cat([shallow] * 4, 1) - deep) ** 2).mean()
    torch.testing.assert_close(slow_neural_loss([shallow, deep], "tile"), by_tile)
    assert slow_neural_loss([shallow, torch.cat([shallow] * 4, 1)], "tile") == 0
    assert slow_neural_loss([shallow, shallow.flip(1)]) < 1e-28 < slow_neural_loss([shallow, shallow.flip(1)], "tile")
    assert len({slow_neural_loss([shallow, deep, deep]).item(), 2 * by_sum.item()}) == 1


def test_slow_loss_reaches_slow_nets_alone_and_only_in_training():
    model = mini(l2_reg=0.0).train()
    with collect_auxiliary() as added:
        model(draw(2, 1, 8, 8))
    added[0].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in model.named_parameters() if name.split(".")[2:3] == ["kernel"]}
    with collect_auxiliary() as added:
        model.eval()(draw(2, 1, 8, 8))
    assert not added


def test_regulariser_counts_norms_that_are_not_squared():
    model = mini()
    before = model.regulariser()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    torch.testing.assert_close(model.regulariser(), 2 * before)
    (grad,) = torch.autograd.grad(model.regulariser(), model.blocks[1].bottleneck.weight)
    assert grad.norm().item() == pytest.approx(1)
    left = torch.autograd.grad(
        model.regulariser(),
        [model.head.weight, model.blocks[0].bias, model.blocks[0].hci.kernel.out.weight],
        allow_unused=True,
    )
    assert left == (None, None, None)
    (slow,) = torch.autograd.grad(model.regulariser(), model.blocks[0].kernel.out.weight)
    assert slow.norm().item() == pytest.approx(1e-6)


def test_extras_are_trained_only_when_asked():
    plain, extra = mini(), mini(train_extras=True)
    # α and β of 4 local kernels of 2 layers in each of three blocks, and three scalars
    assert count_parameters(extra) - count_parameters(plain) == 3 * 4 * 2 * 2 * 32 + 3
    assert not any("alpha" in name for name in plain.state_dict())


def test_image_channels_are_repeated_and_sizes_interpolated():
    model, x = mini().eval(), draw(2, 1, 8, 8)
    three = mini(in_channels=3).eval()
    three.load_state_dict(model.state_dict())
    torch.testing.assert_close(three(x.expand(2, 3, 8, 8)), model(x))
    assert model(draw(2, 1, 20, 14)).shape == (2, 4)
    assert [m.shape for m in model.features(x)] == [(2, 72, 8, 8)]
    with pytest.raises(ValueError, match=r"maps are 8×8, .* got \(9, 8\)"):
        model.features(draw(1, 1, 9, 8))


def test_resize_keeps_the_weights_and_takes_another_square():
    model = mini().eval()
    torch.nn.init.normal_(model.blocks[0].kernel.plane)
    corners = model.blocks[0].kernel.plane[::7, ::7].clone()
    kept = {name: p.clone() for name, p in model.named_parameters() if not name.endswith("plane")}
    model.resize(12)
    assert model(draw(2, 1, 12, 12)).shape == (2, 4) and model.features(draw(2, 1, 12, 12))[0].shape == (2, 72, 12, 12)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if name in kept)
    torch.testing.assert_close(model.blocks[0].kernel.plane[::11, ::11], corners)
    fresh = mini(size=12).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(draw(2, 1, 12, 12)), model(draw(2, 1, 12, 12)))


# Optimizers


def test_kar3_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = Kar3([p], lr=0.1, betas=(0.5, 0.9))
    places = []
    for grad in ([1.0, -2.0], [-4.0, 1.0], [1.0, 1.0]):
        p.grad = torch.tensor(grad)
        optimizer.step()
        places.append(p.tolist())
    # averages before each step: (0, 0), then (0.5, −1) and (0.1, −0.2), then (−1.75, 0) and (−0.31, −0.08)
    assert places == [pytest.approx(place) for place in ([0.9, 1.1], [0.8, 1.2], [0.9, 1.2])]


def test_kar2_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = Kar2([p], lr=0.1, beta=0.5)
    places = []
    for grad in (1.0, 1.0, -4.0):
        p.grad = torch.tensor([grad])
        optimizer.step()
        places.append(p.item())
    assert places == pytest.approx([0.9, 0.7, 0.7])


@pytest.mark.parametrize("kind", [Kar2, Kar3])
def test_steps_know_no_scale_and_leave_what_has_no_gradient(kind):
    ends = []
    for scale in (1.0, 1e-6):
        p, idle = (torch.nn.Parameter(torch.ones(20)) for _ in range(2))
        optimizer = kind([p, idle], lr=0.01)
        for seed in range(5):
            p.grad = scale * draw(20, seed=seed, dtype=torch.float32)
            optimizer.step()
        assert torch.equal(idle, torch.ones(20))
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_the_network_brings_its_optimizer():
    model = mini()
    made = model.optimizers(Recipe(lr=0.01, betas=(0.75, 0.99)))
    assert isinstance(made, Kar3) and made.defaults == {"lr": 0.01, "betas": (0.75, 0.99)}
    assert isinstance(mini(rule="kar2").optimizers(Recipe()), Kar2)
    assert isinstance(mini(rule="recipe").optimizers(Recipe(optimizer="sgd")), torch.optim.SGD)
    with pytest.raises(ValueError, match=r"no weight decay, got 0\.1"):
        model.optimizers(Recipe(weight_decay=0.1))


# The user's side


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mini(stats="global"), "one of batch, running, got 'global'"),
        (lambda: mini(branches="all"), "'code', 'paper' or names of branches, got 'all'"),
        (lambda: SFNEBlock(12, 1, 8, branches=["local4"]), "some of global, .* got .*local4"),
        (lambda: mini(in_channels=2), "divide the first width, got 2 with a width of 3"),
        (lambda: mini(size=1), "size at least 2, got 4, 1 and 1"),
        (lambda: mini(rule="adam"), "one of kar3, kar2, recipe, got 'adam'"),
        (lambda: mini(l2_reg=-1), "l2_reg must not be negative, got -1"),
        (lambda: Terminator2d(widths=(3, 10), factors=(4, 3)), "times its factor, got 3·4, 10"),
        (lambda: Terminator2d(widths=(3,), factors=(4, 3)), "1 to 5 numbers each"),
        (lambda: Terminator2d(widths=(5,), factors=(4,), in_channels=1), "multiple of 12, got 20"),
        (lambda: Terminator2d(layers=(3, 2)), "layers must have 5 numbers"),
        (lambda: HyperZZWLocal(4, 4), "kernel_size must be odd, got 4"),
        (lambda: HyperZZWLocal(4)(torch.zeros(2, 3, 8, 8)), r"expected \(batch, 4, height, width\), got \(2, 3"),
        (lambda: SFNEBlock(12, 1, 8)(torch.zeros(2, 12, 9, 9)), r"got \(2, 12, 9, 9\): `resize`"),
        (
            lambda: SFNEBlock(12, 1, 8, earlier=1)(torch.zeros(2, 12, 8, 8)),
            "expected 1 outputs of earlier blocks, got 0",
        ),
        (lambda: SFNEBlock(12, 1, 8, dropout=1.0), "below 1, got 1.0"),
        (lambda: slow_neural_loss([torch.zeros(1, 3, 2, 2)], "mean"), "channel-sum, tile, got 'mean'"),
        (lambda: Kar3([torch.nn.Parameter(torch.ones(1))], lr=-1), "lr must not be negative, got -1"),
        (lambda: Kar3([torch.nn.Parameter(torch.ones(1))], betas=(0.5, 1.0)), "below 1, got 1.0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_foreign_weights_are_refused():
    with pytest.raises(UserError, match="expected a state dict of Terminator's five blocks"):
        convert({"fc.weight": torch.zeros(3, 4)})


def test_presets_by_name():
    model = provenn.paper("terminator").build("terminator_cifar10", num_classes=4, branches="paper")
    assert isinstance(model, Terminator2d) and len(model.blocks[0].branches) == 9
