"""What the experiments compare: each control is what its name says, and no texture is in two splits."""

import asyncio
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from provenn.data.defects import CATEGORIES
from provenn.evidence import Measurement, Run, Study
from provenn.evidence.study import TUNING_SEED
from provenn.nn.anomaly import Anomalies
from provenn.papers.bayes_pfl import bayes_defects
from provenn.papers.bayes_pfl import experiments as bayes_experiments
from provenn.papers.bayes_pfl import studies as bayes_studies
from provenn.papers.bayes_pfl.experiments import (
    EXPERIMENTS,
    HEADS,
    ON_THE_WAY,
    SCALE,
    UNSEEN,
    both_states,
    operations,
)
from provenn.papers.bayes_pfl.layers import INIT
from provenn.papers.bayes_pfl.model import BayesPFL
from provenn.papers.bayes_pfl.rivals import HELD_OUT, TEMPLATES, LocalContrast, encode_sentences
from provenn.papers.bayes_pfl.studies import (
    CHOSEN_ON,
    LEVEL,
    SHOWN,
    cover,
    defects,
    folds,
    head,
    kind_ap,
    network,
    seen_defects,
    spread,
    traced,
    trained_clip,
    tuned,
    unseen_at_level,
)
from provenn.papers.bayes_pfl.words import Letters
from provenn.tasks import get_task
from provenn.training import Diverged, Recipe

TASK = get_task("anomaly-detection")
SHORT = Recipe(epochs=1, batch_size=8, max_steps=2, optimizer="adam", lr=1e-30, betas=(0.5, 0.999))


@pytest.fixture(scope="module")
def data():
    return defects(0, True)


def test_no_texture_is_in_two_splits_and_seeds_have_others():
    everything = {name for names in CATEGORIES.values() for name in names}
    for seed in (0, 1, 700, 900_001):
        fold = folds(seed)
        assert [len(fold[split]) for split in ("train", "val", "test")] == [10, 2, 5]
        assert {name for names in fold.values() for name in names} == everything
    assert folds(0) != folds(1)
    drawn = defects(0, True)
    seen = {split: set(getattr(drawn, split).drawn.categories) for split in ("train", "val", "test")}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]
    assert set(drawn.meta["categories"]) == seen["train"]
    assert set(seen_defects(0, True).val.drawn.categories) == seen["train"]


def test_heads_learn_from_many_images_of_each_texture_and_are_looked_at_with_fewer():
    for make, shown, looked in ((defects, SHOWN, 20), (seen_defects, 40, 5)):
        whole = make.__wrapped__(1, False)
        for split, count in (("train", shown), ("val", looked), ("test", 40)):
            assert set(Counter(getattr(whole, split).drawn.categories).values()) == {count}


def test_rates_are_chosen_by_all_textures_that_are_not_trained_on():
    assert CHOSEN_ON[0] == TUNING_SEED and len(set(CHOSEN_ON)) == 3
    for seed in CHOSEN_ON:
        fold, drawn = folds(seed), defects(seed, True)
        assert set(drawn.val.drawn.categories) == {*fold["val"], *fold["test"]}
        assert set(drawn.train.drawn.categories) == set(fold["train"])
    assert set(defects(TUNING_SEED - 1, True).val.drawn.categories) == set(folds(TUNING_SEED - 1)["val"])
    assert set(seen_defects(TUNING_SEED, True).val.drawn.categories) == set(folds(TUNING_SEED)["train"])


@pytest.mark.parametrize(("diverging", "expected"), [(None, 0.2), (CHOSEN_ON[1], None)])
def test_a_rate_is_worth_the_mean_over_its_folds(monkeypatch, diverging, expected):
    asked = []

    def training(self, run, variant, data, lr, seed):
        if seed == diverging:
            raise Diverged("it is no number")
        asked.append((data.val, lr, seed))
        return SimpleNamespace(model=seed)

    async def trial(name, score, *, lr, seed, **setting):
        assert "rate 0.001" in name and setting["code"]
        return score()

    async def together(calls):
        return [await call for call in calls]

    reaches = dict(zip(CHOSEN_ON, (0.1, 0.3, 0.2)))
    monkeypatch.setattr(bayes_studies.OverFolds, "_fit", training)
    monkeypatch.setattr(type(TASK), "evaluate", lambda self, model, split: {"pixel_ap": reaches[model]})
    study = replace(UNSEEN, data=lambda seed, smoke: SimpleNamespace(val=(seed, smoke)))
    monkeypatch.setattr(bayes_studies.OverFolds, "trial_setting", lambda *_: {"code": "x"})
    value = asyncio.run(study.validation(SimpleNamespace(trial=trial, together=together), "rca", 1e-3))
    assert value == (None if expected is None else pytest.approx(expected))
    assert asked == [((seed, False), 1e-3, seed) for seed in CHOSEN_ON if seed != diverging]


def made(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return network(HEADS[name][1]).double().eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_heads_differ_in_what_their_labels_say():
    assert made("pair").prompts == 1 and made("three").prompts == 3
    assert [type(made(name).attention).__name__ for name in ("three", "plain", "rca")] == [
        "Unchanged", "PlainResidual", "ResidualCrossModalAttention",
    ]  # fmt: skip
    count = {name: sum(p.numel() for p in made(name).attention.parameters()) for name in ("plain", "rca")}
    assert count["plain"] == count["rca"]
    for name, parts in (
        ("both", (True, True)),
        ("agnostic", (False, True)),
        ("specific", (True, False)),
        ("rca", (False, False)),
    ):
        model = made(name)
        assert (model.specific is not None, model.agnostic is not None) == parts
        assert model.samples == (1 if name == "rca" else 10)
    assert made("gaussian").specific.steps == 0 and made("official").bias_scale == 1.0
    assert made("both").bias_scale == made("gaussian").bias_scale == SCALE
    assert HEADS["pair long"][1] == HEADS["pair"][1]._replace(longer=3.0)
    long = bayes_studies._of_variant(bayes_studies.HEAD, HEADS["pair long"][1])
    assert long.epochs == 3 * bayes_studies.HEAD.epochs and long.lr == bayes_studies.HEAD.lr
    contrast = bayes_studies._of_variant(bayes_studies.HEAD, HEADS["contrast"][1])
    assert contrast.epochs == bayes_studies.HEAD.epochs and contrast.lr == 10 * bayes_studies.HEAD.lr


def test_a_plain_layer_sees_no_patch():
    texts, patches = torch.randn(1, 6, 64, dtype=torch.float64), torch.randn(1, 9, 64, dtype=torch.float64)
    for name, sees in (("plain", False), ("three", False), ("rca", True)):
        layer = made(name).attention
        assert torch.allclose(layer(texts, patches), layer(texts, -patches)) != sees
    assert made("plain").attention(texts, patches).norm(dim=-1).sub(1).abs().max() < 1e-9


def test_templates_are_whole_sentences():
    model = made("templates")
    tokens, lengths = model.name_tokens(["brick", "moon"], 2)
    texts = model.embed_texts(tokens, lengths, model.draw(torch.zeros(2, 64, dtype=torch.float64)))
    for row, name in enumerate(("brick", "moon")):
        for state, words in enumerate(TEMPLATES):
            expected = encode_sentences(model, [f"{word} {name}" for word in words])
            torch.testing.assert_close(texts[row, state], expected)
    assert not {word for words in TEMPLATES for word in words} & {s.split()[0] for s in HELD_OUT[1]} - {"stained"}


def test_every_pair_of_templates_is_trained(data):
    model = made("templates").float().train()
    batch = next(iter(DataLoader(data.train, batch_size=4, collate_fn=data.collate)))
    losses = []
    for chosen in (0, 1, 2, None, None, None, None, None, None, None, None):
        torch.manual_seed(len(losses))
        model.turn = False
        losses.append(float(model.losses(batch, chosen)["pixel"].detach()))
    assert len(set(losses[:3])) == 3 and set(losses[3:]) == set(losses[:3])


def test_noise_is_of_a_words_size_and_does_not_learn():
    model = made("noise")
    drawn = model.draw(torch.zeros(4, 64, dtype=torch.float64))
    assert drawn.context.shape == (10, 4, 64) and drawn.states.shape == (10, 2, 64)
    assert drawn.states.std().item() == pytest.approx(INIT, rel=0.1)
    samples, divergence = model.draw_training(torch.zeros(400, 64, dtype=torch.float64))
    assert samples.context.std().item() == pytest.approx(INIT, rel=0.1) and divergence == 0


def test_local_contrast_looks_no_further_than_its_windows():
    model, x = made("contrast"), images(1)
    features = model.contrasts(x)
    changed = x.clone()
    changed[..., 32, 32] += 5
    moved = (model.contrasts(changed) != features).any(1)[0].nonzero()
    assert moved.sub(32).abs().max() == 7
    assert isinstance(model(x), Anomalies)
    torch.testing.assert_close(model.contrasts(-x), features)
    batch = (x.float(), ["moon"], torch.ones(1), torch.zeros(1, 64, 64))
    assert LocalContrast().training_loss(batch).requires_grad


def test_all_heads_stand_upon_the_clip_of_the_seed(data):
    from provenn.training import Hardware

    weights = trained_clip(tuple(data.meta["categories"]), 0, 1, Hardware())
    for name in ("rca", "both"):
        variant = HEADS[name][1]
        model = tuned(lambda variant=variant: network(variant), TASK, data, SHORT, seed=0).model
        for key, value in model.clip.state_dict().items():
            assert torch.equal(value, weights[key]), key
    decayed = {}

    def stop(build, plan, task, data, recipe, **_):
        decayed["recipe"] = recipe
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("provenn.papers.bayes_pfl.studies.fit_stages", stop)
        with pytest.raises(InterruptedError):
            tuned(lambda: network(head(plain=True, longer=3.0, decay=0.01)), TASK, data, replace(SHORT, epochs=4))
    assert decayed["recipe"] == replace(SHORT, epochs=12, weight_decay=0.01)


def test_a_training_is_looked_at_after_each_epoch(monkeypatch):
    monkeypatch.setattr(bayes_studies, "CLIP_STEPS", 1)
    given = seen_defects(0, True)
    short = replace(SHORT, epochs=2, max_steps=None, batch_size=40)
    done = traced(lambda: network(HEADS["rca"][1]), TASK, given, replace(short, lr=1e-3), seed=0)
    trace = done.model.trace
    assert len(trace) == 2 and trace[0] != trace[1]
    with done.model.in_stage(1), torch.no_grad():
        assert trace[1] == tuple(TASK.evaluate(done.model, split)["pixel_ap"] for split in (given.val, given.test))
    untrained = traced(lambda: network(HEADS["rca"][1]), TASK, given, replace(short, lr=1e-30), seed=0).model.trace
    assert untrained[0] == untrained[1] != trace[0], "the first look is after the first epoch"


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ([[0.0, 0.02], [2 * LEVEL, 0.06]], 0.04),
        ([[0.0, 0.02], [LEVEL, 0.06]], 0.06),
        ([[0.0, 0.1], [LEVEL / 2, 0.2], [1.5 * LEVEL, 0.6]], 0.4),
        ([[0.0, 0.1], [2 * LEVEL, 0.3], [0.0, 0.5], [2 * LEVEL, 0.7]], 0.2),
        ([[LEVEL, 0.5], [1.0, 0.9]], None),
        ([[2 * LEVEL, 0.5], [0.0, 0.1], [1.0, 0.9]], None),
        ([[0.01, 0.2], [0.02, 0.3]], None),
        ([], None),
    ],
)
def test_unseen_skill_is_read_where_seen_skill_rises_to_the_level(trace, expected, data):
    model = torch.nn.Identity()
    model.trace = trace
    assert unseen_at_level(model, data) == (None if expected is None else pytest.approx(expected))
    assert unseen_at_level(torch.nn.Identity(), data) is None


def at_level(monkeypatch, reached: dict[str, list[float | None]]) -> Measurement:
    async def measure(self, run, variants, **_):
        return {variant: reached[variant] for variant in variants}, {"note": "", "seeds": run.seeds}

    monkeypatch.setattr(Study, "measure", measure)
    return asyncio.run(EXPERIMENTS["regularised_at_equal_skill"](SimpleNamespace(seeds=[7, 8])))


def test_sides_are_compared_where_both_reach_the_level(monkeypatch):
    reached = {"both": [0.3, 0.4], "rca": [0.1, None], "light": [0.2, 0.1], "strong": [None, None]}
    measured = at_level(monkeypatch, reached)
    assert measured.values == [0.3, 0.4] and measured.baselines == [0.2, 0.1]
    assert measured.note == (
        " three pairs, RCA has no figure for seed 8. three pairs, RCA, weight decay 1e-2 has no figure for seed 7, 8."
    )
    assert [row[0] for row in measured.tables[0].rows] == [ON_THE_WAY.label(name) for name in ("both", "rca", "light")]


def test_a_side_that_never_reaches_the_level_leaves_no_measurement(monkeypatch):
    reached = {"both": [None, 0.4], "rca": [0.1, None], "light": [0.2, None], "strong": [None, None]}
    measured = at_level(monkeypatch, reached)
    assert measured.missed and measured.effect is None
    assert measured.needs.startswith(f"trainings that pass a pixel AP of {LEVEL:g} on seen textures between two looks:")
    assert "both distributions does not for seed 7; best of three pairs, RCA," in measured.needs
    assert measured.needs.endswith("weight decay 1e-2 does not for seed 8")


class Told(torch.nn.Module):
    """A map that knows one kind of defect, by the pixels of its own images."""

    def __init__(self, known: dict[bytes, torch.Tensor]):
        super().__init__()
        self.known = known

    def forward(self, images: torch.Tensor) -> Anomalies:
        heat = torch.stack([self.known.get(x.numpy().tobytes(), torch.zeros(x.shape[1:])) for x in images])
        return Anomalies(heat.amax((1, 2)), heat)


def test_defects_of_a_kind_are_judged_apart(data):
    test = data.test
    known = {test[k][0].numpy().tobytes(): test[k][3] for k, kind in enumerate(test.drawn.kinds) if kind == "blend"}
    model = Told(known)
    assert "blend" in test.drawn.kinds
    assert kind_ap(model, data, "blend") == 1
    others = [kind for kind in ("scratch", "stain") if kind in test.drawn.kinds]
    assert others and all(kind_ap(model, data, kind) < 0.2 for kind in others)
    assert kind_ap(model, data, "none of these") == 0


def test_cover_and_spread_are_of_sampled_prompts(data):
    model = made("rca").float()
    assert cover(Told({}), data) is None and spread(made("templates"), data) is None
    whole = data.test
    names = list(dict.fromkeys(whole.drawn.categories))
    texts = model.prompt_embeddings(torch.stack([whole[whole.drawn.categories.index(n)][0] for n in names]), names)
    cosines, nearest = [], []
    for row, name in enumerate(names):
        for state in range(2):
            pairs = texts[row, state] @ texts[row, state].mT
            cosines.append((pairs.sum() - 3).item() / 6)
            wanted = encode_sentences(model, [s.format(name) for s in HELD_OUT[state]])
            nearest += [max(float(sentence @ text) for text in texts[row, state]) for sentence in wanted]
    assert spread(model, data) == pytest.approx(1 - np.mean(cosines), abs=1e-5)
    assert cover(model, data) == pytest.approx(np.mean(nearest), abs=1e-5)
    assert Letters.size == 41


def test_experiments_read_what_claims_ask():
    assert set(UNSEEN.variants) == set(HEADS) and len(UNSEEN.lrs) == len(ON_THE_WAY.lrs) == 3
    decays = {variant.decay for _, variant in ON_THE_WAY.variants.values()}
    assert decays == {0.0, 1e-4, 1e-2}


def test_operations_are_those_of_the_sizes():
    counted = operations(1)
    assert counted["vision tower"] == pytest.approx(507, rel=0.01)
    # The queries' layer, and the products with 1,369 keys and as many values, in four layers.
    assert counted["RCA"] == pytest.approx(4 * (6 * 768**2 + 2 * 6 * 1369 * 768) / 1e9, rel=1e-3)
    # Twelve blocks of six texts of 13 tokens.
    assert counted["texts"] == pytest.approx(12 * 12 * 768**2 * 6 * 13 / 1e9, rel=0.05)


def test_what_is_compared_are_the_published_means_and_none(monkeypatch):
    """The state words' means of both sides: ±0.5 as published, and 0, with all else alike."""
    met = []

    def embed(self, tokens, lengths, samples):
        met.append([bank.detach().clone() for bank in (self.context, self.normal, self.abnormal)])
        return plain(self, tokens, lengths, samples)

    plain = BayesPFL.embed_texts
    monkeypatch.setattr(BayesPFL, "embed_texts", embed)
    for offset in (0.5, 0.0):
        both_states(offset)
    (context, *published), (other, *none) = met
    for bank, mean in zip((*published, *none), (0.5, -0.5, 0.0, 0.0), strict=True):
        assert abs(float(bank.mean()) - mean) < 0.005 and float(bank.std()) == pytest.approx(INIT, rel=0.2)
    assert torch.equal(context, other)
    for bank, bare, mean in zip(published, none, (0.5, -0.5)):
        torch.testing.assert_close(bank - bare, torch.full_like(bank, mean))


def test_a_mean_of_the_state_words_is_invisible_and_what_channels_differ_in_is_not():
    model = small_bank()
    given = (*model.name_tokens(["metal nut"], 1), model.draw(torch.zeros(1, 64, dtype=torch.float64)))
    with torch.no_grad():
        texts = model.embed_texts(*given)
        for bank in (model.normal, model.abnormal):
            for mean in (-0.5, 3.0):
                bank.add_(mean)
                torch.testing.assert_close(model.embed_texts(*given), texts, rtol=0, atol=1e-9)
                bank.sub_(mean)
        # As large a shift of half the channels is seen, in the state that it is added to alone.
        model.normal[..., :32].add_(0.5)
        changed = (model.embed_texts(*given) - texts).abs().amax((0, 2, 3))
        assert changed[0] > 0.01 and changed[1] == 0


def small_bank() -> BayesPFL:
    torch.manual_seed(0)
    return bayes_defects(samples=2).double().eval()


@pytest.mark.parametrize(("change", "holds"), [(0.0, 1.0), (1e-12, 1.0), (1e-6, 0.0), (1.0, 0.0)])
def test_the_means_are_invisible_only_where_both_sides_are_the_same(monkeypatch, tmp_path, change, holds):
    asked = []

    def states(offset: float) -> torch.Tensor:
        asked.append(offset)
        return torch.ones(2, 3, dtype=torch.float64) + change * offset / 0.5

    monkeypatch.setattr(bayes_experiments, "both_states", states)
    assert bayes_experiments.offset_invisible(Run("bayes_pfl", tmp_path)).value == holds
    assert sorted(asked) == [0.0, 0.5]
