"""Terminator: what the brief calls exact, its traps, the authors' names, optimizers, sizes, and what it refuses."""

import copy
import io

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import Subset

import provenn
from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.inference.inspection import Inspection
from provenn.nn.auxiliary import collect_auxiliary
from provenn.nn.fusion import fuse
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
from provenn.papers.terminator.inspection import inspect
from provenn.papers.terminator.official import convert
from provenn.papers.terminator.studies import (
    FreeKernel,
    WithShortcuts,
    lost_alone,
    offset,
    programmed_weights,
    with_free_kernels,
)
from provenn.tasks import TaskData
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


def test_a_fused_slow_net_depends_on_no_angle_of_thousands_any_more():
    """An exported file whose program rounds such an angle otherwise would give other kernels."""
    torch.manual_seed(0)
    net, x = HyperZZWLocal(12).eval(), torch.randn(2, 12, 6, 6)
    gate = HyperChannelInteraction(12).eval()
    for layer, kernel in ((net, net.kernel), (gate, gate.kernel)):
        fused, before = fuse(layer, x), layer(x)
        for module in (kernel, fused.kernel):
            for angle in module.filters:
                angle.weight.data.mul_(1 + 1e-4)
        assert torch.equal(fused(x), before) and (layer(x) - before).abs().max() > 1e-4
    fused.kernel.resize(20)
    assert fused.kernel().shape == (1, 1, 20)


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


def test_fast_layers_start_as_the_code_has_it():
    """Uniform without a gain in RGUs, normal with ReLU's gain elsewhere; no biases."""
    torch.manual_seed(0)
    block, local = SFNEBlock(36, 2, 4), HyperZZWLocal(36, 3)
    for layer in (block.of_input.key, block.of_weights.value, block.of_input.query, block.of_input.out):
        assert 0.95 * (3 / 36) ** 0.5 < layer.weight.abs().max() <= (3 / 36) ** 0.5 and not layer.bias.any()
    model = Terminator2d(100, size=4, widths=(36,), factors=(2,))
    for layer in (block.mixer, block.bottleneck, local.mix, model.head):
        assert layer.weight.std().item() == pytest.approx((2 / layer.weight.shape[1]) ** 0.5, rel=0.08)
        assert layer.weight.abs().max() > 2.5 * layer.weight.std() and not layer.bias.any()
    assert not local.bias.any() and not block.bias.any() and not block.of_input.plane.any()
    assert all((layer.bias == 1).all() for layer in (*local.kernel.mixers, *local.kernel.contexts))
    assert (local.kernel.alpha == 1).all() and (local.kernel.beta == 0.1).all()


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


def test_running_statistics_forget_by_a_tenth():
    torch.manual_seed(0)
    layer = HyperZZWLocal(4, 3, stats="running").double().train()
    maps = [draw(2, 4, 6, 6, seed=seed) + seed for seed in range(14)]
    pooled, mean, seen = torch.zeros(9, 32, dtype=F64), torch.zeros(4, dtype=F64), []
    layer.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean((0, 2, 3))))
    for n, z in enumerate(maps, start=1):
        layer(z)
        pooled = pooled + max(1 / n, 0.1) * (layer.kernel.context(z) - pooled)
        mean = mean + 0.1 * (seen[-1] - mean)
    torch.testing.assert_close(layer.kernel.pooled, pooled)
    torch.testing.assert_close(layer.norm.running_mean, mean)


def test_an_empty_batch_leaves_running_statistics_alone():
    torch.manual_seed(0)
    layer = HyperZZWLocal(4, 3, stats="running").train()
    layer(draw(2, 4, 6, 6, dtype=torch.float32))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers() if "num_batches" not in name}
    assert layer(torch.zeros(0, 4, 6, 6)).shape == (0, 4, 6, 6)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers() if name in before)


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


@pytest.mark.parametrize("form", ["channel-sum", "tile"])
def test_what_training_adds_is_weighed(form):
    torch.manual_seed(0)
    model = Terminator2d(
        4, 1, 4, (3, 12), (4, 3), slow_weight=0.5, slow_form=form, l2_reg=0.25, branches=("fast",)
    ).double()
    with collect_auxiliary() as added:
        model.train()(draw(2, 1, 4, 4))
    kernels = [block.kernel() for block in model.blocks]
    torch.testing.assert_close(added, [0.5 * slow_neural_loss(kernels, form) + 0.25 * model.regulariser()])


def test_regulariser_takes_the_code_s_parameters():
    """By the names that the authors' code would filter: all of the multi-branch layer but slow nets and RGUs."""
    model = mini()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draw(*p.shape, seed=p.numel()))
    fast = sum(
        p.norm()
        for name, p in model.named_parameters()
        if (name.startswith("blocks.") and name.split(".")[2] in ("mixer", "bottleneck"))
        or (".local." in name and ".kernel." not in name)
    )
    slow = sum(
        p.norm()
        for name, p in model.named_parameters()
        if name.endswith("weight") and any(part in name for part in (".of_", ".kernel.", ".by_place."))
        if ".hci." not in name
    )
    torch.testing.assert_close(model.regulariser() - fast, 1e-6 * slow, rtol=1e-4, atol=0)


def test_dropout_takes_whole_channels_but_none_of_the_first_block():
    model = mini()
    assert [block.dropout.p for block in model.blocks] == [0.0, 0.05, 0.05]
    block = SFNEBlock(12, 4, 4, dropout=0.5, branches=("fast",)).train()
    out = block(draw(3, 12, 4, 4, dtype=torch.float32))[0].flatten(2)
    dropped = (out == 0).all(dim=2)
    assert 0.3 < dropped.float().mean() < 0.7 and (out != 0).all(dim=2)[~dropped].all()


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


def test_every_pixel_of_a_larger_image_counts():
    model, x = mini().eval(), draw(1, 1, 24, 24)
    other = x.clone()
    other[0, 0, 0, 0] += 9  # no sample of a plain bilinear interpolation to a third of the side
    assert not torch.allclose(model(other), model(x))


def test_a_wider_first_block_takes_the_image_tiled():
    model, x = Terminator2d(4, 3, 4, (6,), (2,), branches=("fast",)).eval(), draw(2, 3, 4, 4, dtype=torch.float32)
    taken = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    model(x)
    torch.testing.assert_close(taken[0], torch.cat([x, x], dim=1))


def test_scalars_stand_between_blocks_and_before_the_classifier():
    model, x = mini(train_extras=True).eval(), draw(2, 1, 8, 8)
    with torch.no_grad():
        model.shifts.copy_(torch.tensor([1.0, 2.0, 3.0]))
    taken = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, inputs: taken.append(inputs))
    logits, outputs = model(x), model.block_outputs(x)
    torch.testing.assert_close(taken[1][0], outputs[0] + 1)
    torch.testing.assert_close(taken[2][0], outputs[1] + 2)
    torch.testing.assert_close(taken[2][1][0], outputs[0])  # as it was, where it is joined
    torch.testing.assert_close(logits, model.head(outputs[2].mean((2, 3)) + 3))


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
    values = []
    for grad in ([1.0, -2.0], [-4.0, 1.0], [1.0, 1.0]):
        p.grad = torch.tensor(grad)
        optimizer.step()
        values.append(p.tolist())
    # averages before each step: (0, 0), then (0.5, −1) and (0.1, −0.2), then (−1.75, 0) and (−0.31, −0.08)
    assert values == [pytest.approx(value) for value in ([0.9, 1.1], [0.8, 1.2], [0.9, 1.2])]


def test_kar2_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = Kar2([p], lr=0.1, beta=0.5)
    values = []
    for grad in (1.0, 1.0, -4.0):
        p.grad = torch.tensor([grad])
        optimizer.step()
        values.append(p.item())
    assert values == pytest.approx([0.9, 0.7, 0.7])


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
    second = mini(rule="kar2").optimizers(Recipe(lr=0.01, betas=(0.75, 0.99)))
    assert isinstance(second, Kar2) and second.defaults == {"lr": 0.01, "betas": (0.99,)}
    assert isinstance(mini(rule="recipe").optimizers(Recipe(optimizer="sgd")), torch.optim.SGD)
    with pytest.raises(ValueError, match=r"no weight decay, got 0\.1"):
        model.optimizers(Recipe(weight_decay=0.1))


# What the studies compare and read off


def test_a_shortcut_is_the_input_tiled():
    torch.manual_seed(0)
    model = WithShortcuts(num_classes=2, in_channels=1, size=4, widths=(3,), factors=(4,), branches=("fast",)).eval()
    with torch.no_grad():
        model.blocks[0].bottleneck.weight.zero_()
        x = draw(2, 1, 4, 4, dtype=torch.float32)
        torch.testing.assert_close(model.block_outputs(x)[0], x.expand(2, 12, 4, 4))


def test_free_kernels_start_as_slow_nets_and_are_no_more_regularised():
    torch.manual_seed(0)
    options = {"num_classes": 2, "in_channels": 1, "size": 4, "widths": (3,), "factors": (4,)}
    model, free = Terminator2d(**options), with_free_kernels(**options)
    kernels = [module for module in free.modules() if isinstance(module, FreeKernel)]
    assert len(kernels) == 1 + 4 + 1 + 2  # W, local, HCI, HI
    free.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        free.blocks[0].kernel.kernel.copy_(model.blocks[0].kernel())
        free.blocks[0].hci.kernel.kernel.copy_(model.blocks[0].hci.kernel())
        for name in ("by_channel", "by_place"):
            getattr(free.blocks[0].interaction, name).kernel.copy_(getattr(model.blocks[0].interaction, name)())
        x = draw(2, 1, 4, 4, dtype=torch.float32)
        for block in (model.blocks[0], free.blocks[0]):
            block.branches = tuple(name for name in block.branches if not name.startswith("local"))
        torch.testing.assert_close(
            free.blocks[0].joined(x.repeat(1, 3, 1, 1))[0], model.blocks[0].joined(x.repeat(1, 3, 1, 1))[0]
        )
        before = free.regulariser()
        for kernel in kernels:
            kernel.kernel.mul_(100)
    assert free.regulariser() == before


class Alone(torch.nn.Module):
    """Right in company, wrong alone where the label is 1; its maps have means of 2 and -2 and deviations of 1 and 2."""

    def __init__(self):
        super().__init__()
        self.idle = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        right = F.one_hot(x[:, 0, 0, 0].long(), 2)
        return right if len(x) > 1 else torch.tensor([[1, 0]])

    def features(self, x):
        return [torch.tensor([[1.0, 3.0], [-4.0, 0.0]]).view(1, 2, 1, 2)]


def test_probes_by_hand():
    test = Subset([(torch.full((1, 2, 2), float(label)), label) for label in (0, 1, 1, 0)], range(4))
    data = TaskData("by hand", test, test, test, "")
    assert lost_alone(Alone(), data) == pytest.approx(0.5)
    # torch's deviations of two numbers are √2 and 2√2
    assert offset(Alone(), data) == pytest.approx((2 / 2**0.5 + 2 / 8**0.5) / 2)


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


def test_what_is_inspected_is_drawn_as_maps():
    model, x = mini().eval(), draw(1, 1, 8, 8)
    found = inspect(model, x)
    assert [name.split(".")[1] for name in found] == ["0", "0", "1", "1", "2", "2"]
    torch.testing.assert_close(found["blocks.1.kernel"], model.blocks[1].kernel()[0].abs().mean(0))
    assert all(shown.shape == (8, 8) for shown in found.values())
    figure = Inspection("title", "caption", found).picture()
    assert [len(axes.images) for axes in figure.axes[:6]] == [1] * 6 and not any(axes.lines for axes in figure.axes)


def test_foreign_weights_are_refused():
    with pytest.raises(UserError, match="expected a state dict of Terminator's five blocks"):
        convert({"fc.weight": torch.zeros(3, 4)})


def test_presets_by_name():
    model = provenn.paper("terminator").build("terminator_cifar10", num_classes=4, branches="paper")
    assert isinstance(model, Terminator2d) and len(model.blocks[0].branches) == 9


def test_the_warning_of_a_loss_that_nobody_takes_names_what_it_is():
    with pytest.warns(UserWarning, match="adds the loss of its slow networks .* slow_weight=0 and l2_reg=0") as caught:
        terminator_mini().train()(draw(2, 1, 8, 8, dtype=torch.float32))
    assert "router" not in str(caught[0].message)


def test_weights_that_program_attention_are_queries_and_keys_of_one_head():
    """2·C·d, values and other heads left out."""
    assert programmed_weights(12, 3, 2) == (16, 2 * 12 * 4)
    assert programmed_weights(12, 1, 3) == (81, 2 * 12 * 12)


def test_weights_that_grow_with_the_map_are_counted(monkeypatch):
    """A table of biases, one for each pair of places, is weights as well: then nothing is programmed by few."""

    class Tabled(torch.nn.MultiheadAttention):
        def forward(self, query, key, value, **options):
            self.table_weight = torch.nn.Parameter(torch.zeros(query.shape[1], query.shape[1], dtype=F64))
            return super().forward(query, key, value, attn_mask=self.table_weight, **options)

    monkeypatch.setattr(torch.nn, "MultiheadAttention", Tabled)
    counts = [programmed_weights(12, 1, side) for side in (2, 3)]
    assert [trainable for _, trainable in counts] == [2 * 12 * 12 + 16, 2 * 12 * 12 + 81]
