"""S2LIC's blocks against their definitions, its counts, and that a latent is decoded from what was coded alone."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from provenn.catalog import card
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
from provenn.papers.s2lic.codec import SCALES
from provenn.papers.s2lic.context import anchors, squeeze, unsqueeze
from provenn.papers.s2lic.entropy import FactorizedPrior, gaussian_likelihood, round_through
from provenn.papers.s2lic.model import LatentCoder, SliceCoder, s2lic
from provenn.papers.s2lic.transforms import SwinV2Block, WindowAttention
from provenn.testing import seeded_array, seeded_state
from provenn.testing.golden import assert_values

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


# The released class, with the public layers that it names


GOLDEN = json.loads(Path(__file__).with_name("golden_double.json").read_text())
FRAGMENTS = GOLDEN["fragments"]


def in_double(module: nn.Module, seed: int) -> nn.Module:
    """With the weights that the authors' code had, drawn by our names."""
    state = seeded_state({name: list(tensor.shape) for name, tensor in module.state_dict().items()}, seed)
    module.double().eval()
    module.load_state_dict({name: t.double() if t.is_floating_point() else t for name, t in state.items()})
    return module


def drawn(shape: list[int], name: str, seed: int) -> Tensor:
    return torch.from_numpy(seeded_array(shape, name, seed))


def test_golden_values_name_the_newest_commit_that_has_code():
    assert GOLDEN["source"] in GOLDEN["newest"] and GOLDEN["source"].split("@")[0] == card("s2lic").code


def test_outputs_symbols_and_gradients_are_those_of_the_released_class():
    (case,) = GOLDEN["cases"]
    seed, shape = case["seed"], case["shape"]
    model = in_double(S2LIC(Sizes(width=16)), seed)
    x = ((drawn(shape, "x", seed) / math.sqrt(3) + 1) / 2).requires_grad_()
    read, symbols = model.coder._rated, []

    def watch(slices: Sequence[Tensor], rates: list[Tensor], i: int, anchor: bool, *rest: Tensor) -> Tensor:
        whole = read(slices, rates, i, anchor, *rest)
        symbols.append(squeeze(whole.detach(), anchor).flatten())
        return whole

    model.coder._rated = watch
    coded = model(x)
    for name in ("picture", "y", "z"):
        assert_values(getattr(coded, name), case[name], 1e-10, name)
    assert_values(torch.cat(symbols), case["symbols"], 1e-12, "symbols, in the order of the released compress")
    assert coded.bits().sum().item() == pytest.approx(case["bits"], rel=1e-12)
    assert model.coder.prior.auxiliary_loss().item() == pytest.approx(case["auxiliary"], rel=1e-12)
    ((coded.picture * drawn(shape, "gradient", seed)).sum() + coded.bits().sum()).backward()
    assert_values(x.grad, case["gradient"], 1e-6, "gradient")
    parameters = dict(model.named_parameters())
    for name, expected in case["weights"].items():
        assert_values(parameters[name].grad, expected, 1e-6, name)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "enhancement": DenseEnhancement,
    "hyper_encoder": lambda: LatentCoder(Sizes(width=24, latent=40, slices=5)).hyper_encoder,
    "hyper_decoder": lambda: LatentCoder(Sizes(width=24, latent=40, slices=5)).hyper_decoder,
    "entropy_parameters": lambda: SliceCoder(Sizes(), 96, 64).parameters_of,
    "residual_prediction": lambda: Halved(SliceCoder(Sizes(), 96, 64).correction_of),
}


class Halved(nn.Sequential):
    """A residual prediction as `SliceCoder.correct` bounds it."""

    def __init__(self, layers: nn.Module):
        super().__init__(*cast(nn.Sequential, layers))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x).tanh()


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_is_the_public_one_that_the_released_class_names(name):
    golden = FRAGMENTS[name]
    x = drawn(golden["shape"], "input", golden["seed"]).requires_grad_()
    output = in_double(LAYERS[name](), golden["seed"])(x)
    assert_values(output, golden["output"], 1e-12)
    output.backward(drawn(list(output.shape), "gradient", golden["seed"]))
    assert_values(x.grad, golden["gradient"], 1e-12, "gradient")


def test_the_factorised_prior_is_compressai_s():
    golden = FRAGMENTS["prior"]
    prior = cast(FactorizedPrior, in_double(FactorizedPrior(24), golden["seed"]))
    z = (4 * drawn(golden["shape"], "input", golden["seed"])).requires_grad_()
    likelihood = prior.likelihood(z)
    assert_values(likelihood, golden["output"], 1e-12)
    likelihood.log2().backward(drawn(golden["shape"], "gradient", golden["seed"]))
    # In the upper tail theirs subtracts two numbers next to 1.
    assert_values(z.grad, golden["gradient"], 1e-5, "gradient")
    loss = prior.auxiliary_loss()
    assert loss.item() == pytest.approx(golden["auxiliary"], rel=1e-12)
    (slope,) = torch.autograd.grad(loss, prior.quantiles)
    assert_values(slope, golden["quantiles"], 1e-10, "quantiles")


def test_the_gaussian_and_its_floors_are_compressai_s_gradients_too():
    """Below its floor a scale learns where a step lifts it, and a likelihood likewise."""
    golden = FRAGMENTS["gaussian"]
    shape, seed = golden["shape"], golden["seed"]
    values, means, scales = (k * drawn(shape, n, seed) for n, k in (("values", 6), ("means", 2), ("scales", 2)))
    scales.requires_grad_()
    likelihood = gaussian_likelihood((values - means).round(), scales)
    assert_values(likelihood, golden["output"], 1e-12)
    likelihood.log2().backward(drawn(shape, "gradient", seed))
    assert_values(scales.grad, golden["scales"], 1e-9, "scales")
    below = scales.detach() < 0.11
    assert (scales.grad[below] != 0).any() and (scales.grad[below] == 0).any()


def test_scales_are_the_released_table():
    assert SCALES.tolist() == pytest.approx(FRAGMENTS["scale_table"], rel=1e-6)  # theirs is in single precision
