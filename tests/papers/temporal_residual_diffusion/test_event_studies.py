"""What decides the verdicts: whose clips, which figures of which sides, and that no method sees what it must not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from provenn.core.cost import count_parameters
from provenn.evidence.study import TUNING_SEED
from provenn.papers.temporal_residual_diffusion import model as of_model
from provenn.papers.temporal_residual_diffusion import studies as of_studies
from provenn.papers.temporal_residual_diffusion.experiments import CLIPS, EXPERIMENTS
from provenn.papers.temporal_residual_diffusion.model import Reconstructor, ResidualRegression
from provenn.papers.temporal_residual_diffusion.studies import (
    COUNTS,
    CURVE,
    LONG,
    ONE_CPU,
    PROBES,
    SHORT,
    VARIANTS,
    drift,
    few_to_validate,
    figures,
    low_state,
    moving,
    network,
    parameters,
    trained,
)
from provenn.papers.temporal_residual_diffusion.task import TASK
from provenn.papers.temporal_residual_diffusion.task.clips import TEST, TRAIN, VALIDATE, Clips, flight, flights, spreads
from provenn.papers.temporal_residual_diffusion.task.metrics import above, compared, fitted_thresholds
from provenn.training import Fit, Recipe

SHORTEST = Recipe(epochs=1, max_steps=1, batch_size=8, optimizer="adamw", lr=1e-3)


@pytest.fixture(scope="module")
def data():
    return moving(7, True)


def built(name, data):
    torch.manual_seed(0)
    return network(VARIANTS[name][1], **data.options)


def stacked(clips):
    return [torch.stack([clip[i] for clip in clips]) for i in range(3)]


def short(clips, count):
    voxels, frames, counts = stacked(clips)
    return [voxels[:, :count], frames[:, : count + 1], counts[:, :count]]


class Fixed(Reconstructor):
    """The truth and a given error on each frame."""

    def __init__(self, errors):
        super().__init__()
        self.errors, self.nothing = errors, nn.Parameter(torch.zeros(()))

    def rebuilt(self, clips, seeds=(0,)):
        return clips[1][:, 1:] + self.errors.view(1, -1, 1, 1, 1)


def test_each_split_has_its_own_pictures_and_its_own_ways(data):
    assert COUNTS == (120, 20, 60) and [len(part) for part in (data.train, data.val, data.test)] == list(SHORT)
    for part, names, count, number in zip((data.train, data.val, data.test), (TRAIN, VALIDATE, TEST), SHORT, range(3)):
        assert all(map(torch.equal, part[count - 1], flights(names, count, 1021 + number)[count - 1]))
    other = moving(8, True)
    assert data.fingerprint != other.fingerprint
    assert not torch.equal(other.test[0].frames, data.test[0].frames)
    motion, contrast = spreads(data.train.clips)
    frames = np.stack([clip.frames.numpy() for clip in data.train.clips]).astype(np.float64)
    assert motion == pytest.approx(np.diff(frames, axis=1).std(), rel=1e-3)
    assert contrast == pytest.approx(frames.std(), rel=1e-3)
    assert data.options == {"motion": round(motion, 4), "contrast": round(contrast, 4)}


def test_a_long_clip_moves_about_as_fast_at_its_end_as_at_its_beginning():
    picture = np.random.default_rng(0).integers(0, 256, (400, 400)).astype(np.uint8)
    shares = []
    for seed in range(20):
        frames = flight(picture, np.random.default_rng(seed), LONG, 16)
        change = np.square(np.diff(frames[::8], axis=0)).mean((1, 2))
        shares.append(change[-10:].mean() / change[:10].mean())
    assert 0.8 < np.median(shares) < 1.25


@pytest.mark.parametrize("name", ["full", "lf_residual", "frame", "regression", "e2vid", "firenet"])
def test_no_true_frame_but_the_first_reaches_what_is_judged(name, data):
    system, clips = built(name, data).eval(), short(data.test.clips[:2], 2)
    told = system.rebuilt(clips, seeds=(0, 1))
    hidden = [clips[0], clips[1].clone(), clips[2]]
    hidden[1][:, 1:] = 0.5
    assert torch.equal(system.rebuilt(hidden, seeds=(0, 1)), told)
    hidden[1][:, 0] = 0.5
    assert not torch.equal(system.rebuilt(hidden, seeds=(0, 1)), told)
    assert told.min() >= 0 and told.max() <= 1


@pytest.mark.parametrize("name", ["full", "regression"])
@pytest.mark.parametrize("own", [0.0, 1.0])
def test_training_is_given_the_frame_before_or_the_networks_own(name, own, data, monkeypatch):
    monkeypatch.setattr(of_model, "OWN", own)
    system, clips = built(name, data), short(data.train.clips[:2], 4)
    given, made, plain, framed = [], [], system.conditioned, system.framed

    def conditioned(voxel, memory):
        given.append(memory.frame)
        return plain(voxel, memory)

    def noted(*arguments):
        made.append(framed(*arguments))
        return made[-1]

    monkeypatch.setattr(system, "conditioned", conditioned)
    monkeypatch.setattr(system, "framed", noted)
    system.training_loss(clips)
    expected = list(clips[1][:, :-1].unbind(1)) if own == 0 else [clips[1][:, 0], *made[:-1]]
    assert len(given) == 4 and all(map(torch.equal, given, expected))


def test_the_training_sees_three_of_ten_frames_of_its_own_and_learns_residuals(data):
    assert of_model.OWN == 0.3
    system = built("full", data)
    frames = data.train[0].frames[:2, None]
    assert torch.allclose(system.clean(frames[1], frames[0], frames[0]) * data.options["motion"], frames[1] - frames[0])
    assert float(built("frame", data).scale) == pytest.approx(data.options["contrast"])


def test_the_compared_side_has_no_memory_no_attention_or_no_noise(data):
    clips = short(data.test.clips[:2], 2)
    voxel, still, full = clips[0][:, 0], built("still", data), built("full", data)
    for system, same in ((still, True), (full, False)):
        first = system.conditioned(voxel, system.begin(clips[1][:, 0]))
        again = system.conditioned(voxel, first[3])
        assert torch.equal(first[2][0], again[2][0]) is same
    joined = built("joined", data)
    assert not joined.denoiser.passes and full.denoiser.passes
    assert parameters(VARIANTS["joined"][1]) == pytest.approx(parameters(VARIANTS["full"][1]), rel=0.01)
    assert parameters(VARIANTS["still"][1]) == parameters(VARIANTS["full"][1]) == count_parameters(full)
    alone = built("regression", data).eval()
    assert isinstance(alone, ResidualRegression) and count_parameters(alone) == count_parameters(full)
    assert torch.equal(*(alone.rebuilt(clips, seeds=seeds) for seeds in ((0, 1), (5, 6))))
    assert not torch.equal(*(full.eval().rebuilt(clips, seeds=seeds) for seeds in ((0, 1), (5, 6))))
    assert full.design.steps == full.steps == 5


def test_the_low_frequency_module_is_the_trained_one_of_the_same_seed(data):
    low = low_state(7, SHORTEST, ONE_CPU)
    one = replace(data, val=Clips(data.val.clips[:1]), test=Clips(data.test.clips[:1]))
    done = {
        name: trained(lambda name=name: built_plain(name, one), TASK, one, SHORTEST, seed=7)
        for name in ("full", "untrained")
    }
    for name, is_low in (("full", True), ("untrained", False)):
        state = done[name].model.low.state_dict()
        assert all(torch.equal(state[key], low[key]) for key in low) is is_low


@pytest.mark.parametrize("name, epochs", [("e2vid", [6]), ("firenet", [6]), ("full", [4, 2]), ("untrained", [2])])
def test_networks_alone_train_as_long_as_a_system_and_its_low_frequency_module(data, monkeypatch, name, epochs):
    asked = []

    def noted(build, task, data, recipe, **more):
        asked.append(recipe.epochs)
        return Fit(build(), {})

    monkeypatch.setattr(of_studies, "fit", noted)
    of_studies._low_state.cache_clear()
    trained(lambda: built_plain(name, data), TASK, data, replace(SHORTEST, epochs=2), seed=8)
    of_studies._low_state.cache_clear()
    assert asked == epochs


def built_plain(name, data):
    return network(VARIANTS[name][1], **data.options)


def test_what_a_training_ended_with_is_not_computed_again_and_else_it_is(data, monkeypatch):
    done = trained(lambda: built_plain("e2vid", data), TASK, data, SHORTEST, seed=7)
    asked = []
    plain = type(TASK).scores
    monkeypatch.setattr(type(TASK), "scores", lambda self, *rest: asked.append(1) or plain(self, *rest))
    told = {name: PROBES[name](done.model, data) for name in PROBES if name != "drift"}
    assert not asked
    fresh = TASK.evaluate(done.model, data.test)
    assert told == {
        "ratio above 5×5": fresh["high_ratio"],
        "error above 5×5": fresh["high_error"],
        "1 − correlation above 5×5": 1 - fresh["high_correlation"],
        "1 − SSIM": 1 - fresh["ssim"],
    }
    other = Fixed(torch.full((9,), 0.05))
    assert figures(other, data) == TASK.evaluate(other, data.test) != TASK.evaluate(other, data.val)


def test_few_clips_are_validated_after_an_epoch_and_all_are_tested(data):
    every = replace(data, val=Clips(data.val.clips * 5))
    few = few_to_validate(every)
    assert len(few.val) == CURVE == 8 and few.test is data.test and few.train is data.train


def test_drift_is_of_the_last_ten_of_forty_frames_over_the_ten_before(data):
    grown = Fixed(torch.arange(1.0, LONG + 1).sqrt() / 100)
    assert drift(grown, data) == pytest.approx(np.arange(31, 41).mean() / np.arange(21, 31).mean(), rel=1e-4)
    assert drift(Fixed(torch.full((LONG,), 0.1)), data) == pytest.approx(1, rel=1e-4)


def test_where_a_rate_is_chosen_nothing_is_tested(data):
    one = replace(data, val=Clips(data.val.clips[:1]), test=Clips(data.test.clips[:1]))
    done = {
        seed: trained(lambda: built_plain("e2vid", one), TASK, one, SHORTEST, seed=seed) for seed in (7, TUNING_SEED)
    }
    assert done[7].metrics and not done[TUNING_SEED].metrics


PAIRS, EARLIER = ("low and time", "low and high", "time and high"), ("e2vid", "firenet", "integration")
CONTRASTS = {
    "regression_below_integration": ("integration", ("e2vid", "wide", "structured"), "1 − correlation above 5×5"),
    "three_over_pairs": ("full", PAIRS, None),
    "three_over_pairs_above": ("full", PAIRS, "error above 5×5"),
    "pretrained_low": ("full", ("untrained",), None),
    "recurrent_time": ("full", ("still",), None),
    "attention_high": ("full", ("joined",), None),
    "residual_target": ("full", ("frame", "lf_residual"), None),
    "residual_target_above": ("full", ("frame", "lf_residual"), "error above 5×5"),
    "diffusion_sharper": ("full", ("regression",), "1 − correlation above 5×5"),
    "diffusion_keeps_ssim": ("full", ("regression",), "1 − SSIM"),
    "over_earlier": ("full", EARLIER, None),
    "over_earlier_ssim": ("full", EARLIER, "1 − SSIM"),
}
FIGURES = {"regression_smooths": "e2vid", "wider_regression_smooths": "wide", "drift_is_bounded": "full"}


def test_each_experiment_compares_the_sides_and_the_figure_that_it_names():
    assert EXPERIMENTS.keys() == CONTRASTS.keys() | FIGURES.keys()
    for name, (system, baselines, metric) in CONTRASTS.items():
        contrast = EXPERIMENTS[name]
        assert (contrast.systems, contrast.baselines, contrast.metric) == ((system,), baselines, metric), name
        assert not contrast.ratio and contrast.study is CLIPS
    for name, variant in FIGURES.items():
        assert EXPERIMENTS[name].variant == variant
        assert EXPERIMENTS[name].metric == ("drift" if name.startswith("drift") else "ratio above 5×5")
    assert VARIANTS["full"][1].conditions == ("low", "time", "high") and VARIANTS["none"][1].conditions == ()
    for pair in PAIRS:
        assert VARIANTS[pair][1].conditions == tuple(pair.split(" and "))
    assert (VARIANTS["wide"][1].width, VARIANTS["wide"][1].loss) == (24, "structure")
    assert (VARIANTS["e2vid"][1].width, VARIANTS["e2vid"][1].loss) == (12, "l1")


def test_figures_are_means_over_frames_as_scikit_image_and_evreal_have_them(data):
    from skimage.metrics import structural_similarity

    clip = data.test[0]
    truth = clip.frames[1:]
    told = (truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    values = compared(told, truth)
    a, b = (x[:, 0].double().numpy() for x in (told, truth))
    options = dict(data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert values["ssim"] == pytest.approx(np.mean([structural_similarity(x, y, **options) for x, y in zip(a, b)]))
    assert values["mse"] == pytest.approx(np.mean((a - b) ** 2))
    fine = [above(torch.from_numpy(x)[:, None]).numpy() for x in (a, b)]
    expected = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(*fine)]
    assert values["high_correlation"] == pytest.approx(np.mean(expected))
    assert values["high_error"] == pytest.approx(np.mean((fine[0] - fine[1]) ** 2))
    assert values["high_ratio"] == pytest.approx(np.sqrt(np.mean(fine[0] ** 2) / np.mean(fine[1] ** 2)))
    assert fine[1][0, 0, 7, 9] == pytest.approx(b[0, 7, 9] - b[0, 5:10, 7:12].mean())


def test_fitted_thresholds_are_those_of_least_squares(data):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, (3, 2, 8, 8)).astype(float)
    start = rng.uniform(0.2, 0.4, (8, 8))
    frames = np.stack([start, start, start, start * np.exp(0.02 * counts[:, 0].sum(0) - 0.03 * counts[:, 1].sum(0))])
    assert np.allclose(fitted_thresholds(frames, counts, 0.0), (0.02, 0.03))
