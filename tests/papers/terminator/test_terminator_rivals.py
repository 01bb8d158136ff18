"""What Terminator is set against: continuous kernels by Fourier are the direct convolution, and sizes are as said."""

import pytest
import torch
from torch.nn import functional as F

from provenn.core.cost import count_parameters
from provenn.nn.auxiliary import collect_auxiliary
from provenn.papers.terminator.experiments import BEST_OF_OTHERS, BOTTLENECKS, LARGER
from provenn.papers.terminator.rivals import CCNN, ContinuousKernel, JoinedBlock, global_convolution
from provenn.papers.terminator.studies import accuracy_without, digit_data


def test_a_global_convolution_is_the_sum_over_all_places():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64)
    kernel = torch.randn(3, 9, 9, generator=generator, dtype=torch.float64)
    direct = F.conv2d(x, kernel.flip(-1, -2)[:, None], padding=4, groups=3)
    torch.testing.assert_close(global_convolution(x, kernel), direct, rtol=1e-10, atol=1e-10)


def test_kernels_follow_from_coordinates_and_reach_every_place():
    torch.manual_seed(0)
    kernel = ContinuousKernel(4, 8)()
    assert kernel.shape == (4, 15, 15) and kernel.isfinite().all() and bool((kernel.abs() > 0).all())
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    CCNN(3, 1, channels=6, blocks=1).eval()(x).sum().backward()
    assert x.grad is not None and bool((x.grad != 0).all())


@pytest.mark.parametrize(("study", "shares"), [(LARGER, (1, 2, 2, 4, 4)), (BEST_OF_OTHERS, (1, 1, 1, 1, 1))])
def test_rivals_have_the_parameters_that_their_labels_say(study, shares):
    counts = [count_parameters(part(num_classes=10, in_channels=1)) for _, part in study.variants.values()]
    assert all(abs(count / counts[0] - share) < 0.05 for count, share in zip(counts, shares, strict=True)), counts


def test_without_bottlenecks_parameters_are_as_many_and_nothing_is_mixed():
    made = {name: part(num_classes=10, in_channels=1) for name, (_, part) in BOTTLENECKS.variants.items()}
    whole = count_parameters(made["all"])
    assert count_parameters(made["fixed"]) == whole
    assert 0 <= count_parameters(made["none"]) / whole - 1 < 0.06
    # What the branches give is what the block gives, but for norm, GELU and bias, channel by channel.
    torch.manual_seed(0)
    block = JoinedBlock(6, 8, layers=2, earlier=0, dropout=0.0).eval()
    x = torch.randn(2, 12, 8, 8)
    joined, _ = block.joined(x.unflatten(1, (2, 6)).mean(1))
    expected = F.gelu(block.norm(joined)) + block.bias
    torch.testing.assert_close(block(x)[0], expected)
    assert block(x)[0].shape == (2, 60, 8, 8) and not list(block.bottleneck.parameters())


@pytest.mark.parametrize("name", list(BOTTLENECKS.variants))
def test_all_but_fixed_bottlenecks_learn(name):
    torch.manual_seed(0)
    model = BOTTLENECKS.variants[name][1](num_classes=10, in_channels=1).train()
    with collect_auxiliary() as added:
        out = model(torch.randn(4, 1, 8, 8))
    (F.cross_entropy(out, torch.arange(4)) + torch.stack(added).mean()).backward()
    still = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    ours = {f"blocks.{i}.bottleneck.{part}" for i in range(3) for part in ("weight", "bias")}
    whole = BOTTLENECKS.variants["all"][1](num_classes=10, in_channels=1)
    assert {key for key in still if "bottleneck" in key} == (ours if name == "fixed" else set())
    assert (still - ours) <= {key for key, p in whole.named_parameters() if p.dim() <= 1} | {"head.bias"}, still


def test_the_half_of_least_weight_is_set_to_zero_and_put_back():
    torch.manual_seed(0)
    model, data = BOTTLENECKS.variants["all"][1](num_classes=10, in_channels=1).eval(), digit_data(0, True)
    seen = []
    for block in model.blocks:
        block.bottleneck.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.detach().clone()))
    before = [block.bottleneck.weight.detach().clone() for block in model.blocks]
    accuracy_without("least")(model, data)
    for zeroed, weight, block in zip(seen, before, model.blocks, strict=True):
        size = weight.square().sum((0, 2, 3))
        gone = zeroed.square().sum((0, 2, 3)) == 0
        assert int(gone.sum()) == len(size) // 2 and size[gone].max() <= size[~gone].min()
        assert torch.equal(block.bottleneck.weight, weight)
    assert accuracy_without("least")(BOTTLENECKS.variants["none"][1](num_classes=10, in_channels=1), data) is None
