"""S2LIC's blocks against their definitions, its counts, and that a latent is decoded from what was coded alone."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.s2lic import (
    RS2TB,
    S2LIC,
    ChannelContext,
    DeformableAttention,
    DenseEnhancement,
    GlobalContext,
    Sizes,
)
from provenn.papers.s2lic.context import anchors, squeeze, unsqueeze
from provenn.papers.s2lic.entropy import FactorizedPrior, gaussian_likelihood, round_through
from provenn.papers.s2lic.model import s2lic
from provenn.papers.s2lic.transforms import SwinV2Block, WindowAttention
from provenn.testing import seeded_array, seeded_state

SLICES, LATENT = 5, 40


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def small(intra: bool) -> S2LIC:
    torch.manual_seed(0)
    model = S2LIC(Sizes(16, LATENT, SLICES, (1, 1, 1), (2, 4, 4), 4, intra_slice=intra)).eval()
    with torch.no_grad():  # entropy parameters that differ clearly from site to site
        for coder in [*model.coder.first, *model.coder.second]:
            coder.parameters_of[-1].weight.mul_(8)
    return model


def test_the_parts_of_the_paper_s_size_have_the_counts_of_the_reconstruction():
    with torch.device("meta"):
        model = s2lic()
    passes = [*model.coder.first, *model.coder.second]
    parts = {
        "whole": count(model),
        "dense": count(model.encoder[0], model.decoder[-1]),
        "g_a": count(model.encoder) - count(model.encoder[0]),
        "g_s": count(model.decoder) - count(model.decoder[-1]),
        "h_a": count(model.coder.hyper_encoder),
        "h_s": count(model.coder.hyper_decoder),
        "AC": count(*(c.channel for c in model.coder.contexts)),
        "AG": count(*(c.inter for c in model.coder.contexts)),
        "EP": count(*(p.parameters_of for p in passes)),
        "LRP": count(*(p.correction_of for p in passes)),
    }
    expected = [73.9, 0.63, 3.94, 3.95, 1.88, 16.69, 5.46, 8.34, 7.12, 25.90]
    digits = [1] + [2] * 9
    assert [round(n / 1e6, d) for n, d in zip(parts.values(), digits, strict=True)] == expected
    assert [c.inter.attention[0].heads for c in model.coder.contexts] == list(range(1, 10))
    assert [p.parameters_of[0].in_channels for p in model.coder.first] == [640] + [736] * 9


def test_the_dense_enhancement_starts_as_the_identity_and_learns():
    x = torch.rand(2, 3, 16, 24)
    block = DenseEnhancement()
    assert torch.equal(block(x), x)
    block(x).sum().backward()
    assert block.body[-1].convs[-1].weight.grad.abs().max() > 0


def test_a_group_whose_norms_are_zero_returns_twice_its_input():
    group = RS2TB(16, 4, (0.0, 0.0))
    for block in group.blocks:
        nn.init.zeros_(block.norm1.weight)
        nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 16, 16, 8)
    assert torch.equal(group(x), 2 * x)


@pytest.mark.parametrize("shift", [0, 4])
def test_window_attention_does_not_see_the_scale_of_queries_and_keys(shift):
    torch.manual_seed(0)
    layer = WindowAttention(16, 4, 8, shift).double()
    x = torch.randn(1, 16, 24, 16).double()
    before = layer(x)
    with torch.no_grad():
        layer.qkv.weight[:16] *= 7
        layer.qkv.weight[16:32] *= 0.2
        assert torch.allclose(layer(x), before, atol=1e-12)
        layer.scale.fill_(50)
    assert torch.allclose(layer.logit_scale(), torch.tensor(100.0).double())


@pytest.mark.parametrize("shift", [0, 4])
def test_a_block_gives_what_transformers_swinv2_layer_gives(shift):
    hf = pytest.importorskip("transformers.models.swinv2.modeling_swinv2")
    config = hf.Swinv2Config(window_size=8, hidden_dropout_prob=0, attention_probs_dropout_prob=0, drop_path_rate=0)
    torch.manual_seed(0)
    theirs = hf.Swinv2Layer(config, 16, (16, 24), 4, shift_size=shift).double().eval()
    ours = SwinV2Block(16, 4, 8, shift).double().eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    inner = theirs.attention.self
    state = {
        "attention.qkv.weight": torch.cat([inner.query.weight, inner.key.weight, inner.value.weight]),
        "attention.q_bias": inner.query.bias,
        "attention.v_bias": inner.value.bias,
        "attention.scale": inner.logit_scale,
        "attention.bias.0.weight": inner.continuous_position_bias_mlp[0].weight,
        "attention.bias.0.bias": inner.continuous_position_bias_mlp[0].bias,
        "attention.bias.2.weight": inner.continuous_position_bias_mlp[2].weight,
    }
    for name, module in {
        "attention.out": theirs.attention.output.dense,
        "norm1": theirs.layernorm_before,
        "norm2": theirs.layernorm_after,
        "mlp.0": theirs.intermediate.dense,
        "mlp.2": theirs.output.dense,
    }.items():
        state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.randn(2, 16 * 24, 16).double()
    expected = theirs(x, (16, 24))
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert torch.allclose(ours(x.view(2, 16, 24, 16)).flatten(1, 2), expected, atol=1e-5)


def test_the_checkerboard_is_two_disjoint_halves_and_squeezing_loses_nothing():
    x = torch.randn(2, 3, 5, 8)
    odd = anchors(x)
    assert odd[0, 1] == odd[1, 0] == 1 and odd[0, 0] == 0
    for anchor, mask in ((True, odd), (False, 1 - odd)):
        assert torch.equal(unsqueeze(squeeze(x, anchor), anchor), x * mask)
    with pytest.raises(UserError, match="even width"):
        squeeze(x[..., :7], True)


def test_deformable_attention_at_stride_1_without_offsets_is_global_attention():
    torch.manual_seed(0)
    layer = DeformableAttention(16, 8, stride=1).double()
    u = torch.randn(2, 16, 5, 6).double()
    q, k, v = (conv(u).reshape(2, 2, 8, 30).transpose(2, 3) for conv in (layer.q, layer.k, layer.v))
    expected = ((q @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1) @ v).transpose(2, 3).reshape(u.shape)
    assert torch.allclose(layer(u), expected, atol=1e-10)


def test_deformable_attention_at_stride_2_asks_the_means_of_four_sites_until_its_offsets_move():
    torch.manual_seed(0)
    layer = DeformableAttention(16, 8).double()
    u = torch.randn(2, 16, 6, 8).double()
    coarse = F.avg_pool2d(u, 2)
    q = layer.q(u).reshape(2, 2, 8, 48).transpose(2, 3)
    k, v = (conv(coarse).reshape(2, 2, 8, 12).transpose(2, 3) for conv in (layer.k, layer.v))
    expected = ((q @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1) @ v).transpose(2, 3).reshape(u.shape)
    assert torch.allclose(layer(u), expected, atol=1e-10)
    with torch.no_grad():
        layer.offsets[-1].weight.normal_(std=100)
    moved = layer(u)
    assert moved.isfinite().all() and not torch.allclose(moved, expected, atol=1e-3)


def test_contexts_have_the_paper_s_widths_and_refuse_to_train_on_one_picture():
    u = torch.randn(2, 64, 4, 6)
    assert ChannelContext(64)(u).shape == (2, 64, 4, 6)
    assert GlobalContext(64)(u).shape == (2, 32, 4, 6)
    with pytest.raises(UserError, match="batch of at least 2"):
        ChannelContext(64)(u[:1])
    with pytest.raises(UserError, match="multiple of the head"):
        GlobalContext(40)


def test_likelihoods_are_masses_and_rounding_passes_gradients():
    bins = torch.arange(-40, 41).double()
    assert torch.allclose(gaussian_likelihood(bins, torch.full_like(bins, 3)).sum(), torch.ones(()).double())
    assert -gaussian_likelihood(torch.zeros(1), torch.zeros(1)).log2() < 0.01
    assert torch.allclose(gaussian_likelihood(torch.full((1,), 99.0), torch.zeros(1)), torch.tensor(1e-9))
    prior = FactorizedPrior(3).double()
    whole = torch.arange(-400, 401).double()[None, None, :, None].expand(1, 3, -1, 1)
    assert torch.allclose(prior.likelihood(whole).sum(2), torch.ones(1, 3, 1).double(), atol=1e-5)
    x = torch.randn(5, requires_grad=True)
    round_through(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(5))


def test_the_auxiliary_loss_trains_the_quantiles_alone():
    prior = FactorizedPrior(2)
    prior.auxiliary_loss().backward()
    assert {name for name, p in prior.named_parameters() if p.grad is not None} == {"quantiles"}


@pytest.mark.parametrize("intra", [False, True])
@torch.no_grad()
def test_a_latent_is_decoded_from_its_symbols_in_two_passes_a_slice(intra):
    model = small(intra)
    y, hyper = 4 * torch.randn(1, LATENT, 4, 8), torch.randn(1, 2 * LATENT, 4, 8)
    slices, coded = y.chunk(SLICES, 1), []

    def write(i: int, anchor: bool, mean: Tensor, scale: Tensor) -> Tensor:
        symbols = (slices[i] - mean).round()
        coded.append(squeeze(symbols, anchor))
        return symbols

    sent = model.coder.walk(hyper, write)
    queue = list(coded)
    received = model.coder.walk(hyper, lambda i, anchor, mean, scale: unsqueeze(queue.pop(0), anchor))
    assert torch.equal(sent, received)
    assert len(coded) == 2 * SLICES and not queue
    assert (sent - y).abs().max() <= 1 + 1e-5  # half a step of rounding and half of correction


@pytest.mark.parametrize("intra", [False, True])
@torch.no_grad()
def test_no_mean_or_scale_sees_what_is_not_yet_decoded(intra):
    model = small(intra)
    y, hyper = 4 * torch.randn(1, LATENT, 4, 8), torch.randn(1, 2 * LATENT, 4, 8)

    def parameters(y: Tensor) -> list[Tensor]:
        found = []

        def read(i: int, anchor: bool, mean: Tensor, scale: Tensor) -> Tensor:
            found.append(torch.cat([mean, scale], 1))
            return (y.chunk(SLICES, 1)[i] - mean).round()

        model.coder.walk(hyper, read)
        return found

    def moved(mask: Tensor) -> list[bool]:
        changed = y.clone()
        changed[:, 16:24] += 9 * mask
        return [not torch.equal(a, b) for a, b in zip(parameters(y), parameters(changed), strict=True)]

    odd = anchors(y)
    assert moved(odd) == [False] * 5 + [intra] + [True] * 4
    assert moved(1 - odd) == [False] * 6 + [True] * 4


def test_a_forward_gives_a_picture_and_a_finite_loss_that_reaches_every_weight():
    model = small(True).train()
    x = torch.rand(2, 3, 64, 128)
    model.rate_distortion(x).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert without == set()
    coded = model.eval()(x)
    assert coded.picture.shape == x.shape and coded.y.shape == (2, LATENT, 4, 8) and coded.z.shape == (2, 16, 1, 2)
    with pytest.raises(UserError, match="multiples of 64"):
        model(x[..., :60])
    with pytest.raises(UserError, match="do not divide"):
        S2LIC(Sizes(latent=321))


def test_the_walk_is_that_of_the_released_file():
    """Values of its class around our layers, with weights drawn by name; in double precision."""
    golden = json.loads(Path(__file__).with_name("s2lic_released.json").read_text())
    model = S2LIC(Sizes(width=16, growth=4, dense=8)).double().eval()
    state = seeded_state({name: list(tensor.shape) for name, tensor in model.state_dict().items()}, 0)
    model.load_state_dict({name: t.double() if t.is_floating_point() else t for name, t in state.items()})
    x = torch.from_numpy((seeded_array([1, 3, 64, 128], "x", 0) / math.sqrt(3) + 1) / 2).requires_grad_()
    coded = model(x)
    weight = torch.from_numpy(seeded_array(list(x.shape), "gradient", 0))
    (gradient,) = torch.autograd.grad((coded.picture * weight).sum() + coded.bits().sum(), x)
    found = {"picture": coded.picture, "y": coded.y, "z": coded.z, "gradient": gradient}
    for name, tensor in found.items():
        expected = torch.tensor(golden[name]["value"], dtype=torch.float64)
        torch.testing.assert_close(tensor.detach().flatten()[golden[name]["index"]], expected, rtol=1e-7, atol=1e-9)
    assert coded.bits().item() == pytest.approx(golden["bits"], rel=1e-9)
