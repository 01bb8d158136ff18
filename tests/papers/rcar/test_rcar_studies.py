"""Grids of digits, equal operations of what is compared, probes, and counts of the experiments."""

import itertools

import numpy as np
import pytest
import torch

from provenn.catalog import card
from provenn.papers.rcar import experiments, studies
from provenn.papers.rcar.experiments import CELLS, EXPERIMENTS, PAPER, RECIPE, STEPWISE, pair_operations
from provenn.papers.rcar.hosts import Similarity
from provenn.papers.rcar.rivals import AttentionPooling, FixedFactors
from provenn.papers.rcar.studies import COUNTS, FILLERS, STEPS, TASK, Variant, drawn, few, many, network, operations
from provenn.tasks.matching import match

SMOKE = many(0, True)


@pytest.fixture
def few_shown(monkeypatch):
    monkeypatch.setattr(studies, "SHOWN", 8)


def test_captions_are_true_and_fillers_say_nothing():
    features, captions = drawn("test", 3, 40, (2, 5))
    words, (pixels, labels) = studies.words(), studies.glyphs()
    for image, (caption,) in zip(features, captions):
        said = [words.words[token] for token in caption[1:-1]]
        facts = [word for word in said if word not in FILLERS]
        assert len(facts) == 9 and 8 <= len(said) - len(facts) <= 20
        cells = set()
        for digit, row, column in zip(facts[::3], facts[1::3], facts[2::3]):
            cell = 3 * studies.ROWS.index(row) + studies.COLUMNS.index(column)
            cells.add(cell)
            assert image[cell, 64:].tolist() == [float(k in (cell // 3, 3 + cell % 3)) for k in range(6)]
            shown = pixels[labels == studies.NUMERALS.index(digit)]
            nearest = ((shown - image[cell, :64]) ** 2).sum(1).min()
            assert nearest < 5, "64 pixels of noise 0.2 deviate by 2.56"
        assert len(cells) == 3
    assert len(captions) == 40 and not np.array_equal(features, drawn("test", 4, 40, (2, 5))[0])


def test_no_glyph_is_in_two_splits(monkeypatch):
    monkeypatch.setattr(studies, "NOISE", 0.0)
    seen = [{row.tobytes() for row in drawn(split, 0, 300, (0, 2))[0][..., :64].reshape(-1, 64)} for split in COUNTS]
    known = {row.tobytes() for row in studies.glyphs()[0]}
    assert all(part <= known for part in seen)
    for one, other in itertools.combinations(seen, 2):
        assert not one & other


def test_the_test_has_1000_pairs_in_folds_of_200_and_few_fillers_are_fewer():
    assert COUNTS["test"] == 1000 and RECIPE.epochs * COUNTS["train"] == STEPS * RECIPE.batch_size
    assert many.args == ((2, 5),) and few.args == ((0, 2),)
    assert SMOKE.test.folds == 1 and len(SMOKE.test) == len(SMOKE.train) == 2 * RECIPE.batch_size == 32
    assert set(FILLERS).isdisjoint([*studies.NUMERALS, *studies.ROWS, *studies.COLUMNS])


def test_the_dummy_baseline_is_above_chance_and_far_below_a_system():
    floor = TASK.dummy_baseline(SMOKE)
    assert 0.002 < floor < 0.05
    ranks = match(torch.eye(200), torch.arange(200))
    found = TASK.summary({"text_rank": ranks.text_rank.numpy(), "image_rank": ranks.image_rank.numpy()})
    assert found["r1"] == 1.0 and TASK.metric == "r1"


@pytest.mark.parametrize(
    ("wide", "system"),
    [("wide rcr2", "rcr2"), ("wide rcar2", "tied2"), ("wide rcar3", "tied3"), ("pooling", "rar3")],
)
def test_what_is_compared_takes_as_many_operations(wide, system):
    counts = [operations(STEPWISE.variants[name][1]) for name in (wide, system)]
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


@pytest.mark.parametrize("cell", CELLS)
def test_widened_hosts_take_as_many_operations(cell):
    counts = {name: operations(variant) for name, (_, variant) in CELLS[cell].variants.items()}
    assert counts["wide"] == pytest.approx(counts["rcar"], rel=0.01) and counts["host"] < counts["wide"] / 2
    host, fed = (CELLS[cell].variants[name][1] for name in ("host", "rcar"))
    assert fed == host._replace(rcr=1, rar=2), "the regulators alone differ"


def test_pairs_take_the_operations_of_the_authors_code():
    host = pair_operations(lambda: Similarity("t2i"))
    found = {name: round(2 * pair_operations(build) / 1e6, 1) for name, build in PAPER.items()}
    assert (round(2 * host / 1e6, 2), found) == (1.77, {"RAR-3": 13.2, "RCR-2": 50.9, "RCAR-2": 36.1})


@pytest.mark.parametrize("name", ["rcar2", "fixed", "pooling", "pooled", "tied3", "hardest"])
def test_networks_of_the_study_learn(name):
    torch.manual_seed(0)
    variant = STEPWISE.variants[name][1]
    model = network(variant, **SMOKE.options)
    batch = SMOKE.collate([SMOKE.train[k] for k in range(6)])
    model.train().training_loss(batch).backward()
    assert all(p.grad is not None for p in model.image.parameters())
    assert model.warm_up == (0 if name == "hardest" else STEPS * 3 // 4) and model.touched == 0


def test_fixed_factors_see_no_alignment_and_pooling_no_summary():
    torch.manual_seed(0)
    fixed, pooling = FixedFactors(4, 6), AttentionPooling(4, 5).eval()
    torch.nn.init.normal_(fixed.shift)
    one, other = (fixed(torch.rand(2, 3, 4), 1.0, 10.0) for _ in range(2))
    assert torch.equal(one.factors, other.factors) and one.factors.shape == (2, 3, 6)
    a = torch.rand(2, 3, 4)
    assert torch.equal(pooling(a, torch.rand(2, 4)).summary, pooling(a, torch.rand(2, 4)).summary)
    mask = torch.tensor([[True, True, False]]).expand(2, -1)
    assert (pooling(a, a[:, 0], mask).weights[:, 2] == 0).all()


def test_probes_read_facts_and_fillers(few_shown):
    torch.manual_seed(0)
    model = network(Variant(rar=3), **SMOKE.options).eval()
    regulator = model.matcher.aggregate
    kinds, weights = zip(*studies.aggregated_words(model, SMOKE))
    assert len(weights[0]) == 3 and all(len(kind) == len(row[0]) for kind, row in zip(kinds, weights))
    assert sum(int((kind == 1).sum()) for kind in kinds) == 9 * len(kinds)
    assert all(kind[0] == kind[-1] == -1 for kind in kinds)
    for step in regulator:
        torch.nn.init.zeros_(step.score.weight)
    assert studies.ratios(model, SMOKE) == pytest.approx([1.0, 1.0, 1.0], rel=0.05)
    assert studies.growth(model, SMOKE) == pytest.approx(0.0, abs=1e-6)
    tied = network(Variant(rar=2, tied=True), **SMOKE.options).eval()
    assert [len(weights) for _, weights in studies.aggregated_words(tied, SMOKE)] == [2] * studies.SHOWN
    assert studies.growth(network(Variant(rcr=2), **SMOKE.options).eval(), SMOKE) == 0
    fed = network(Variant(rcr=2), **SMOKE.options).eval()
    for step in fed.matcher.regulate:
        torch.nn.init.zeros_(step.sharpness[2].weight)
    assert studies.sharper_for_facts(fed, SMOKE) == pytest.approx(0.5)


def test_every_experiment_that_is_registered_is_there():
    paper = card("rcar")
    named = {each.id for each in paper.experiments if each.needs is None}
    assert named <= {*EXPERIMENTS, *(name for name in named if callable(getattr(experiments, name, None)))}
