"""The networks that SHViT is held against: counts at their published size, and each part by its equation."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from provenn.core.cost import count_parameters
from provenn.nn.fusion import fuse
from provenn.papers.shvit import rivals
from provenn.papers.shvit.experiments import RIVALS
from provenn.papers.shvit.studies import FRONT
from provenn.tasks.image_classification import NARROW, wide_patches


def awake(module: nn.Module) -> nn.Module:
    """With norms that scale and shift, in eval mode."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (part.weight, part.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (part.bias, part.running_mean):
                nn.init.normal_(tensor, std=0.1)
    return module.eval()


@pytest.mark.parametrize(
    "build, millions",
    [(rivals.MobileNetV3, 2.5), (rivals.FasterNet, 3.9), (rivals.MobileOne, 4.8), (rivals.EfficientViT, 2.3)],
)
def test_at_their_published_size_they_have_the_published_count(build, millions):
    with torch.device("meta"):
        network = build()
    merged = sum(
        count_parameters(part.conv) + count_parameters(part.point or nn.Identity())
        + count_parameters(part.same or nn.Identity()) - part.conv.conv.weight.numel() - part.conv.conv.out_channels
        for part in network.modules()
        if isinstance(part, rivals.ManyBranches)
    )  # fmt: skip
    assert round((count_parameters(network) - merged) / 1e6, 1) == millions


@pytest.mark.parametrize("name", FRONT)
def test_the_form_for_inference_gives_the_same(name: str):
    torch.manual_seed(0)
    network = awake(FRONT[name](num_classes=13, in_channels=1).double())
    x = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    fused = fuse(network, x)
    assert torch.allclose(fused(x), network(x), rtol=1e-9, atol=1e-12)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())


@pytest.mark.parametrize("name", FRONT)
def test_every_parameter_learns(name: str):
    torch.manual_seed(0)
    network = FRONT[name](num_classes=13, in_channels=1)
    awake(network).train()
    (network(torch.randn(4, 1, 64, 64)) * torch.randn(4, 13)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_a_partial_convolution_leaves_three_quarters_alone():
    block = rivals.PartialBlock(8).eval()
    nn.init.zeros_(block.mlp[-1].weight)
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(block(x), x)
    seen: list[torch.Tensor] = []
    block.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block(x)
    assert torch.equal(seen[0][:, 2:], x[:, 2:])
    assert torch.allclose(seen[0][:, :2], F.conv2d(x[:, :2], block.partial.weight, padding=1), atol=1e-6)


def test_a_hard_gate_by_hand():
    gate = rivals.HardGate(8).double()
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    hidden = (x.mean((2, 3)) @ gate.squeeze.weight.T + gate.squeeze.bias).clamp(min=0)
    logits = hidden @ gate.excite.weight.T + gate.excite.bias
    assert torch.allclose(gate(x), x * ((logits + 3).clamp(0, 6) / 6)[..., None, None])


def test_cascaded_attention_by_hand():
    torch.manual_seed(0)
    layer = awake(rivals.CascadedAttention(8, 2, heads=2, qk_dim=3).double())
    nn.init.normal_(layer.bias)
    x = torch.randn(1, 8, 4, 2, dtype=torch.float64)
    lower = x[:, :, 2:]  # the second window
    outs: list[torch.Tensor] = []
    for head in range(2):
        share = lower[:, 4 * head : 4 * head + 4] + (outs[-1] if head else 0)
        q, k, v = layer.qkv[head](share).split([3, 3, 4], dim=1)
        q = layer.queries[head](q)
        out = torch.zeros_like(v)
        for i in range(4):
            scores = torch.stack([
                (q[0, :, i // 2, i % 2] @ k[0, :, j // 2, j % 2]) / math.sqrt(3)
                + layer.bias[head, abs(i // 2 - j // 2) * 2 + abs(i % 2 - j % 2)]
                for j in range(4)
            ])  # fmt: skip
            out[0, :, i // 2, i % 2] = v[0].flatten(1) @ scores.softmax(0)
        outs.append(out)
    assert torch.allclose(layer(x)[:, :, 2:], layer.project(torch.cat(outs, dim=1)))
    with pytest.raises(ValueError, match="multiples of 2, got 3×2"):
        layer(x[:, :, :3])


def test_patches_of_two_splits_share_no_pixel_and_every_photograph_is_wide_enough():
    train, labels = wide_patches("train", 2, 0)
    assert train.shape == (26, 1, 64, 64) and labels.max() == 12 and not {"coins", "page"} - {*NARROW}
    assert not torch.equal(train, wide_patches("test", 2, 0)[0])
    assert train.mean((1, 2, 3)).abs().max() < 0.02


def test_the_study_holds_whole_networks_of_one_kind_of_data():
    built = [RIVALS.build(build, num_classes=13, in_channels=1) for _, build in RIVALS.variants.values()]
    assert [network(torch.randn(2, 1, 64, 64)).shape for network in map(nn.Module.eval, built)] == [(2, 13)] * 5
