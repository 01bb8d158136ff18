"""The blocks that the i2RMB is held against are what they are called, and of equal size."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from provenn.papers.emov2 import experiments, rivals
from provenn.papers.emov2.rivals import MobileViTV2Block, ParallelDepthwise, RepViTBlock, SeparableAttention, framed
from provenn.testing import seeded_state

VARIANTS = {label: part for label, part in experiments.RIVALS.variants.values()}


def awake(module: nn.Module) -> nn.Module:
    """Random weights at which every branch matters, in double precision and eval mode."""
    module.load_state_dict(seeded_state({name: t.shape for name, t in module.state_dict().items()}))
    return module.double().eval()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_all_networks_of_the_frame_have_as_many_parameters():
    counts = {
        label: sum(p.numel() for p in framed(part, num_classes=16).parameters()) for label, part in VARIANTS.items()
    }
    assert max(counts.values()) / min(counts.values()) < 1.02, counts
    assert len(counts) == 3


def test_only_the_stages_differ():
    networks = [framed(part, num_classes=16) for part in VARIANTS.values()]
    for network in networks:
        rest = {name: tuple(t.shape) for name, t in network.state_dict().items() if not name.startswith("stages")}
        assert rest == {n: tuple(t.shape) for n, t in networks[0].state_dict().items() if not n.startswith("stages")}
        maps = network.features(torch.randn(2, 1, 16, 24))
        assert [tuple(m.shape) for m in maps] == [(2, 16, 16, 24), (2, 32, 8, 12), (2, 64, 4, 6)]


@pytest.mark.parametrize("label", VARIANTS)
def test_gradients_reach_every_parameter(label: str):
    """With running statistics: in training batch norms cancel the constants that are added right before them."""
    network = awake(framed(VARIANTS[label], num_classes=16))
    network(drawn(3, 1, 16, 16)).square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


def test_parallel_branches_are_one_depthwise_convolution():
    """RepViT's structural re-parameterisation: kernels are added, an identity at the centre among them."""
    layer, x = awake(ParallelDepthwise(6)), drawn(2, 6, 9, 7)
    conv, norm = layer.conv
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    kernel = conv.weight * scale[:, None, None, None]
    kernel[:, :, 1, 1] += layer.point.weight[:, :, 0, 0] + 1
    bias = norm.bias - norm.running_mean * scale + layer.point.bias
    last = layer.norm.weight / (layer.norm.running_var + layer.norm.eps).sqrt()
    bias = layer.norm.bias + last * (bias - layer.norm.running_mean)
    expected = F.conv2d(x, kernel * last[:, None, None, None], bias, padding=1, groups=6)
    torch.testing.assert_close(layer(x), expected)


def test_a_fresh_repvit_block_mixes_no_channels():
    """Its last batch norm starts at zero, so that the channel mixer adds nothing."""
    block, x = RepViTBlock(8, 8).eval(), torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(block(x), block.tokens(x))


def test_separable_attention_by_hand():
    layer, x = awake(SeparableAttention(5)), drawn(2, 5, 4, 6)
    weight, bias = layer.qkv.weight[:, :, 0, 0], layer.qkv.bias
    expected = torch.zeros_like(x)
    for example in range(2):
        for pixel in range(4):
            tokens = x[example, :, pixel].T  # (patches, channels)
            score = tokens @ weight[0] + bias[0]
            key, value = tokens @ weight[1:6].T + bias[1:6], tokens @ weight[6:].T + bias[6:]
            context = (score.softmax(0)[:, None] * key).sum(0)
            expected[example, :, pixel] = ((value.relu() * context) @ layer.out.weight[:, :, 0, 0].T + layer.out.bias).T
    torch.testing.assert_close(layer(x), expected)


def test_the_stage_of_mobilevitv2_is_that_of_transformers():
    """Outputs and gradients of a stage with a stride, weights carried over in order."""
    library = pytest.importorskip("transformers.models.mobilevitv2.modeling_mobilevitv2")
    config = pytest.importorskip("transformers").MobileViTV2Config()
    theirs = library.MobileViTV2Layer(config, 16, 32, 16, n_attn_blocks=rivals.UNITS[1], stride=2)
    ours = rivals.mobilevit_stage(1, 16, 32, 2)
    state = seeded_state({name: t.shape for name, t in ours.state_dict().items()})
    ours.load_state_dict(state)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))
    x, y = (drawn(2, 16, 8, 12).requires_grad_() for _ in range(2))
    first, second = ours.double().eval()(x), theirs.double().eval()(y)
    torch.testing.assert_close(first, second)
    first.sin().sum().backward()
    second.sin().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_a_map_that_does_not_divide_into_patches_is_refused():
    with pytest.raises(ValueError, match="multiples of 2, got 7×8"):
        MobileViTV2Block(8, 1)(torch.randn(1, 8, 7, 8))
