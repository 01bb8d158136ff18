"""RRNet: what the brief says must hold exactly, and the authors' networks, outputs and gradients."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.papers.rrnet import DeepEnsemble, RRNet, SegmentRNN, StarNet, gaussian_nll, mixture, spectra
from provenn.papers.rrnet.model import ResidualBlock
from provenn.papers.rrnet.official import convert
from provenn.papers.rrnet.spectra import LAMOST, Arm, normalise_spectrum
from provenn.testing import seeded_array, seeded_state

RELEASED = json.loads(Path(__file__).with_name("rrnet_released.json").read_text())["cases"]


def count(module):
    return sum(p.numel() for p in module.parameters())


# Networks


@pytest.mark.parametrize(
    ("kind", "mode", "published"),
    [
        (RRNet, "raw", (3_722_074, 3_724_912)),
        (RRNet, "pre", (3_787_234, 3_790_072)),
        (RRNet, "post", (3_981_994, 3_984_832)),
        (StarNet, "raw", (7_406_950, 7_409_788)),
        (StarNet, "pre", (7_666_870, 7_669_708)),
        (StarNet, "post", (7_666_870, 7_669_708)),
    ],
)
def test_counts_are_the_published_ones(kind, mode, published):
    with torch.device("meta"):
        assert tuple(count(kind(labels, mode=mode)) for labels in (3, 14)) == published


@pytest.mark.parametrize(
    ("widths", "segments", "published"),
    [
        ((4, 8, 16), 10, 7_872_154),
        ((4, 8, 16), 20, 4_760_314),
        ((4, 8, 16), 80, 3_787_234),
        ((4,), 40, 3_980_322),
        ((4, 8), 40, 3_980_666),
        ((4, 8, 16, 32), 40, 3_987_210),
        ((4, 8, 16, 32, 64), 40, 4_007_882),
    ],
)
def test_counts_of_other_settings_are_the_published_ones(widths, segments, published):
    with torch.device("meta"):
        assert count(RRNet(3, widths=widths, segments=segments)) == published


@pytest.mark.parametrize("case", RELEASED, ids=lambda case: f"{case['kind']} {case['mode']}")
def test_outputs_and_gradients_are_the_authors(case):
    state = {name: tensor.double() for name, tensor in seeded_state(case["shapes"], 0).items()}
    _, options, ours = convert(state, mode=case["mode"].removesuffix("-RNN"))
    network = {"rrnet": RRNet, "starnet": StarNet}[case["kind"]](case["labels"], mode=options["mode"]).double().eval()
    network.load_state_dict(ours)
    x = torch.from_numpy(seeded_array([3, 7200], "flux", 0)).requires_grad_()
    told = network(x)
    loss = gaussian_nll(torch.from_numpy(seeded_array([3, case["labels"]], "labels", 0)), *told)
    (gradient,) = torch.autograd.grad(loss, x)
    for found, expected in (
        (told.mean.flatten(), case["mean"]),
        (told.variance.flatten(), case["variance"]),
        (gradient.flatten()[case["gradient"]["index"]], case["gradient"]["value"]),
        (loss, case["loss"]),
    ):
        torch.testing.assert_close(found.detach(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("build", [RRNet, lambda *a, **o: StarNet(*a, kernel=3), lambda *a, **o: StarNet(*a, kernel=8)])
def test_training_on_a_processor_is_the_same_network(build):
    """Convolutions in rows, in parts of the batch: outputs and all gradients are those of the plain layers."""
    torch.manual_seed(0)
    network = build(2, 480, segments=4).double()
    for part in network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    x, slopes = torch.randn(37, 480, dtype=torch.float64), []
    for mode in (True, False):
        network.train(mode).zero_grad()
        told = network(x)
        (told.mean.square().sum() + told.variance.log().sum()).backward()
        slopes.append([told.mean.detach(), *(p.grad.clone() for p in network.parameters())])
    assert network.train().rows_are_faster(x) and not network.eval().rows_are_faster(x)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(*slopes, strict=True))


def test_the_original_starnet_has_filters_of_eight_pixels():
    assert StarNet(3, 480, kernel=8).body[0].weight.shape == (4, 1, 8)
    added = count(StarNet(3, 480, kernel=8)) - count(StarNet(3, 480))
    assert added == 5 * 4 + 5 * 4 * 16 and StarNet(3, 480, kernel=8).eval()(torch.zeros(2, 480)).mean.shape == (2, 3)


def test_a_stage_of_equal_widths_without_its_second_convolution_is_the_identity():
    block = ResidualBlock(4, 4)
    nn.init.zeros_(block.body[2].weight)
    nn.init.zeros_(block.body[2].bias)
    x = torch.randn(2, 4, 10)
    assert torch.equal(block(x), x)


def test_segments_are_cut_position_by_position():
    network = RRNet(3, 160, segments=4).eval()
    seen = {}
    network.rnn.register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
    x = torch.randn(1, 160)
    network(x)
    maps = torch.relu(network.stages(x[:, None]))
    assert torch.equal(seen["x"].view(20, 16), maps[0].T)


@torch.no_grad()
def test_the_red_end_tells_the_blue_end_nothing():
    torch.manual_seed(0)
    network = RRNet(3).eval()
    x = torch.randn(1, 7200)
    before = network.encoded(x).view(40, 360)
    red, blue = x.clone(), x.clone()
    red[:, 3600 + 14 :] += 1
    blue[:, :100] += 1
    assert torch.equal(network.encoded(red).view(40, 360)[:20], before[:20])
    assert all((network.encoded(blue).view(40, 360) != before).any(1))
    network.rnn.rnn.weight_hh_l0.zero_()
    alone = network.encoded(blue).view(40, 360)
    assert torch.equal(alone[2:], network.encoded(x).view(40, 360)[2:])


@torch.no_grad()
def test_the_recurrent_network_is_its_equation_and_takes_a_state():
    torch.manual_seed(0)
    layer = SegmentRNN(60, 6).double()
    x = torch.randn(2, 60).double()
    rnn, state, expected = layer.rnn, torch.zeros(2, 10).double(), []
    for part in x.view(2, 6, 10).unbind(1):
        state = torch.tanh(part @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + state @ rnn.weight_hh_l0.T + rnn.bias_hh_l0)
        expected.append(state)
    torch.testing.assert_close(layer(x), torch.cat(expected, 1))
    half = SegmentRNN(30, 3).double()
    half.load_state_dict(layer.state_dict())
    first = half(x[:, :30])
    torch.testing.assert_close(half(x[:, 30:], first[None, :, 20:].contiguous()), layer(x)[:, 30:])


def test_sizes_that_do_not_fit_are_refused():
    for options, words in (
        ({"mode": "both"}, "mode must be one of raw, pre, post"),
        ({"widths": ()}, "one to five stages, got 0"),
        ({"length": 7201}, "do not divide into 40 segments and by 8"),
        ({"strict": True}, "a segment has 22.5 positions"),
        ({"labels": 0}, "at least one label"),
    ):
        with pytest.raises(UserError, match=words):
            RRNet(**options)
    with pytest.raises(UserError, match="this network takes 7200"):
        RRNet()(torch.zeros(1, 7000))
    with pytest.raises(UserError, match="multiple of 4"):
        StarNet(3, 7202)
    with pytest.raises(UserError, match="do not divide into 7 segments"):
        SegmentRNN(60, 7)


# Loss and ensemble


def test_the_loss_is_a_likelihood_and_its_best_variance_the_square_of_the_error():
    y, mean = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    variance = (y - mean).square().requires_grad_()
    loss = gaussian_nll(y, mean, variance)
    (slope,) = torch.autograd.grad(loss, variance)
    assert slope.abs().max() < 1e-9
    likelihood = torch.distributions.Normal(mean, variance.detach().sqrt()).log_prob(y).mean()
    assert loss.item() == pytest.approx(-likelihood.item() - 0.5 * math.log(2 * math.pi) + 5)


def test_missing_labels_do_not_count():
    y, mean, variance = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3) + 0.5
    known = torch.tensor([[True, False, True]] * 4)
    gone = torch.where(known, y, math.nan)
    expected = gaussian_nll(y[:, [0, 2]], mean[:, [0, 2]], variance[:, [0, 2]])
    mean.requires_grad_()
    loss = gaussian_nll(gone, mean, variance, known)
    torch.testing.assert_close(loss, expected)
    (slope,) = torch.autograd.grad(loss, mean)
    assert slope.isfinite().all() and not slope[:, 1].any() and slope[:, 0].all()
    assert gaussian_nll(gone, mean, variance, torch.zeros_like(known)).item() == 5


def test_a_mixture_s_variance_is_at_least_the_mean_of_its_members():
    means, variances = torch.randn(5, 7, 3).double(), torch.rand(5, 7, 3).double()
    told = mixture(means, variances)
    torch.testing.assert_close(told.variance, (means.square() + variances).mean(0) - means.mean(0).square())
    assert (told.variance > variances.mean(0)).all()
    alike = mixture(means[:1].expand(5, -1, -1), variances)
    torch.testing.assert_close(alike.variance, variances.mean(0))
    torch.testing.assert_close(mixture(means[:1], variances[:1]).variance, variances[0])


@pytest.mark.parametrize("mode", ["raw", "pre", "post"])
@torch.no_grad()
def test_an_ensemble_in_one_call_is_its_members_one_by_one(mode):
    torch.manual_seed(0)
    members = [RRNet(4, 160, mode=mode, widths=(4, 4), segments=4).double().eval() for _ in range(3)]
    x = torch.randn(5, 160).double()
    together = DeepEnsemble(members).each(x)
    for i, member in enumerate(members):
        alone = member(x)
        torch.testing.assert_close(together.mean[i], alone.mean)
        torch.testing.assert_close(together.variance[i], alone.variance)
    with pytest.raises(UserError, match="2 shapes of 2 networks"):
        DeepEnsemble([members[0], RRNet(3, 160, mode=mode, widths=(4, 4), segments=4)])


def test_weights_of_another_network_are_refused():
    with pytest.raises(UserError, match="no weights of Chan-0312/RRNet"):
        convert({"fc.weight": torch.zeros(1)})


# Spectra


def lines(wave, seed=0):
    rng = np.random.default_rng(seed)
    depth, place = rng.uniform(0.05, 0.6, 30), rng.uniform(wave[0], wave[-1], 30)
    return np.prod(1 - depth[:, None] * np.exp(-0.5 * ((wave - place[:, None]) / 0.4) ** 2), axis=0)


def observed(tilt=0.0, factor=1.0, noise=0.01):
    waves = [np.linspace(arm.start - 30, arm.end + 30, 4600) for arm in LAMOST]
    rng = np.random.default_rng(1)
    fluxes = [
        factor * (1 + tilt * (wave - wave[0]) / 400) * lines(wave, i) * (1 + noise * rng.standard_normal(len(wave)))
        for i, wave in enumerate(waves)
    ]
    return waves, fluxes


def test_grids_are_the_published_ones():
    assert [arm.pixels for arm in LAMOST] == [3600, 3600]
    assert all(len(arm.grid()) == 3600 for arm in LAMOST)
    assert len(Arm(0, 0.3).grid()) == 3  # where arange gives 3 or 4


def test_a_factor_changes_nothing_and_a_slope_little():
    reference = normalise_spectrum(*observed())
    assert reference.shape == (7200,)
    assert np.allclose(normalise_spectrum(*observed(factor=730.0)), reference, atol=1e-5)
    assert np.abs(normalise_spectrum(*observed(tilt=0.3)) - reference).mean() < 0.002
    assert np.median(reference) == pytest.approx(1, abs=0.02)


def test_a_line_lands_on_its_wavelength_at_rest():
    waves = [np.linspace(arm.start - 30, arm.end + 30, 4600) for arm in LAMOST]
    shifted = 5183.6 * (1 + 80 / spectra.LIGHT)
    fluxes = [1 - 0.5 * np.exp(-0.5 * ((wave - shifted) / 0.3) ** 2) for wave in waves]
    grid, depth = LAMOST[0].grid(), 1 - normalise_spectrum(waves, fluxes, velocity=80.0)[:3600]
    near = np.abs(grid - 5183.6) < 3
    assert (grid * depth)[near].sum() / depth[near].sum() == pytest.approx(5183.6, abs=0.05)


def test_cosmic_rays_go_and_lines_stay():
    flux = lines(LAMOST[0].grid()) + 0.001 * np.random.default_rng(0).standard_normal(3600)
    hit = flux.copy()
    hit[[100, 2000]] += 3
    clean = spectra.without_cosmic_rays(hit)
    assert np.abs(clean - flux)[[100, 2000]].max() < 0.3
    assert (clean != hit).sum() <= 10


def test_the_continuum_rises_above_the_lines():
    wave = LAMOST[0].grid()
    flux = lines(wave)
    once = np.polyval(
        np.polyfit(np.log10(wave) - np.log10(wave).mean(), flux, 5), np.log10(wave) - np.log10(wave).mean()
    )
    fit = spectra.continuum(wave, flux)
    assert np.abs(fit - 1).mean() < 0.5 * np.abs(once - 1).mean()
    assert np.array_equal(spectra.continuum(wave, np.full(3600, 2.0)), np.full(3600, 2.0))


def test_the_continuum_is_the_authors_loop():
    """Written plainly: what lies 3σ below or 4σ above the fit is put to the fit, until nothing does."""
    rng = np.random.default_rng(3)
    wave = np.linspace(5000, 5100, 400)
    flux = 900 - 2 * (wave - 5000) + 4 * rng.standard_normal(400)
    flux[rng.integers(400, size=12)] += np.array([14, 15, 16, 18, 20, 30, -13, -14, -15, -17, -20, -30])
    x = np.log10(wave)
    x, y, rounds = (x - x.mean()) / x.std(), (flux - flux.mean()) / flux.std(), 0
    while True:
        fit = np.polyval(np.polyfit(x, y, 5), x)
        off, rounds = fit - y, rounds + 1
        kept = (off > -4 * off.std()) & (off < 3 * off.std())
        if kept.all():
            break
        y = np.where(kept, y, fit)
    assert rounds > 2
    assert np.allclose(spectra.continuum(wave, flux), fit * flux.std() + flux.mean(), rtol=1e-9)


def test_spectra_that_cannot_be_are_refused():
    waves, fluxes = observed()
    for wave, flux, words in (
        ([waves[0][::-1], waves[1]], fluxes, "numbers that rise"),
        ([waves[0][1000:], waves[1]], [fluxes[0][1000:], fluxes[1]], "do not cover 4968 to 5328 Å"),
        ([np.log10(wave) for wave in waves], fluxes, "they look like logarithms"),
        (
            waves,
            [np.where(np.arange(4600) % 3 > 0, np.nan, fluxes[0]), fluxes[1]],
            "fluxes .* no numbers; at least half",
        ),
        ([wave / 10 for wave in waves], fluxes, "they look like nanometres: give Å"),
        ([wave / 1e4 for wave in waves], fluxes, "they look like micrometres: give Å"),
        (waves[:1], fluxes[:1], "has 2 arms, got 1"),
        ([waves[0][:1], waves[1]], [fluxes[0][:1], fluxes[1]], "at least 2; got 1 and 1"),
    ):
        with pytest.raises(UserError, match=words):
            normalise_spectrum(wave, flux)


def test_a_missing_flux_is_missing_in_the_result_and_changes_nothing_else():
    waves, fluxes = observed(noise=0.0)
    whole = normalise_spectrum(waves, fluxes)
    holed = fluxes[0].copy()
    holed[2000:2030] = np.nan
    told = normalise_spectrum(waves, [holed, fluxes[1]])
    gone = np.isnan(told)
    middle = waves[0][2015]
    spacing = waves[0][1] - waves[0][0]
    assert abs(gone.sum() - 30 * spacing / 0.1) <= 1, "thirty pixels of the file, on the grid of 0.1 Å"
    assert abs(LAMOST[0].grid()[np.flatnonzero(gone)] - middle).max() < 3
    assert np.abs(told - whole)[~gone].max() < 0.02 and np.array_equal(np.isnan(told[3600:]), np.zeros(3600, bool))
