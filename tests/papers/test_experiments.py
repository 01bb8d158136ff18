"""Every paper's claims, experiments and what measures them, by discovery."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import provenn
from provenn.catalog import Card, cards
from provenn.evidence import Run
from provenn.evidence.benchmark import benchmarks, time_benchmarks
from provenn.evidence.experiment import measuring_functions
from provenn.evidence.study import Contrast, Reading, Study
from provenn.testing import seeded_array

PAPERS = [slug for slug, card in cards().items() if card.has("experiments")]
HERE = Path(__file__).parent
# Exact experiments that are not so, as the papers' READMEs say.
FALSE = {
    "eca_net": {"module_flops"},
    "emov2": {"download_4g", "download_5g"},
    "gaam": {"any_density"},
    "moh": {"parameters_added"},
    "relationnet_pp": {"parameters_printed", "printed_flops"},
}


@pytest.fixture(params=PAPERS)
def card(request) -> Card:
    return cards()[request.param]


def test_claims_and_experiments_are_few_and_each_can_be_read_alone(card: Card) -> None:
    assert 5 <= len(card.claims) <= 9
    assert len([experiment for experiment in card.experiments if experiment.needs is None]) <= 28
    for experiment in card.experiments:
        assert not experiment.says.startswith(("So ", "It ", "This ", "That ", "They ", "And ")), experiment.says


def studies(card: Card) -> list[Study]:
    """The studies that a paper's experiments are read off, and those that stand in its modules."""
    module = card.resolve_module("experiments")
    read = [f.study for f in measuring_functions(module).values() if isinstance(f, (Contrast, Reading))]
    named = [value for value in vars(module).values() if isinstance(value, Study)]
    return list({id(study): study for study in (*read, *named)}.values())


@pytest.mark.parametrize("slug", PAPERS)
def test_exact_experiments_hold_but_those_that_are_known_not_to(slug: str, tmp_path: Path) -> None:
    exact = [
        experiment.id
        for experiment in cards()[slug].experiments
        if experiment.kind == "exact" and experiment.lacks is None
    ]
    if exact:
        found = provenn.reproduce(slug, experiments=exact, budget="small", out=tmp_path, device="cpu")
        wrong = {
            each.experiment.id: each.reason for each in found if str(each.verdict) not in ("verified", "reproduced")
        }
        assert set(wrong) == FALSE.get(slug, set()), wrong


@pytest.mark.parametrize("slug", PAPERS)
def test_other_experiments_take_their_paths(slug: str, tmp_path: Path) -> None:
    others = [
        experiment.id
        for experiment in cards()[slug].experiments
        if experiment.kind != "exact" and experiment.needs is None
    ]
    found = provenn.reproduce(slug, experiments=others, budget="smoke", seeds=1, out=tmp_path, device="cpu")
    assert [each.experiment.id for each in found] == others
    assert {str(each.verdict) for each in found} == {"not measured"}, "a smoke run gives no verdict"
    assert not {each.experiment.id: each.measurement.failed for each in found if each.measurement.failed}
    for each in found:
        if each.measurement.sides is not None:
            assert each.experiment.sides == each.measurement.sides, each.experiment.id
        if (
            each.experiment.kind == "quality"
            and each.experiment.package is None
            and "recipe" in each.measurement.setting
        ):
            assert each.measurement.skills, f"{each.experiment.id}: did its variants beat the dummy baseline?"
    drawn = {picture.file for each in found for picture in each.measurement.pictures}
    assert {str(file.relative_to(tmp_path / slug)) for file in tmp_path.rglob("*.png")} <= drawn


def test_benchmarks_take_their_paths(card: Card) -> None:
    listed = benchmarks(card.resolve_module("experiments"))
    speeds = list(time_benchmarks(listed, smoke=True))
    assert len(speeds) == len(listed)
    assert not [speed.trouble for speed in speeds if speed.trouble and speed.benchmark.lacks is None]


# Variants, baselines among them, are held by value: loss and gradient of each network at seeded weights on the same
# training examples, and its loss on test examples.


def held(study: Study, run: Run) -> dict[str, list[float]]:
    data, task = study.data(0, True), study.of_task
    torch.manual_seed(0)  # crops are drawn at random
    batch, tested = (
        next(iter(DataLoader(split, batch_size=4, collate_fn=data.collate)))  # type: ignore[arg-type]
        # What tests reinforcement learning is episodes that are played.
        for split in (data.train, data.train if task.name == "reinforcement-learning" else data.test)
    )
    values = {}
    for label, part in study.variants.values():
        torch.manual_seed(0)
        model = study.build(part, **data.options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.from_numpy(seeded_array(parameter.shape, name)).to(parameter)
                spread = parameter.std().item() if parameter.numel() > 1 else 0.0
                parameter.add_(noise, alpha=0.5 * (spread if 0 < spread < 10 else 0.1))
        model.eval()
        torch.manual_seed(0)
        with torch.enable_grad():
            loss = task.loss(model, batch)
        trainable = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(loss, trainable, allow_unused=True) if trainable and loss.requires_grad else ()
        square = sum(float(slope.square().sum()) for slope in slopes if slope is not None)
        torch.manual_seed(0)
        with torch.no_grad():
            unseen = task.loss(model, tested).item()
        values[label] = [float(sum(p.numel() for p in model.parameters())), loss.item(), square**0.5, unseen]
    return values


def all_held(card: Card, folder: Path) -> dict[str, dict[str, list[float]]]:
    run = Run(card.slug, folder, budget="smoke", seeds=(0,))
    return {study.name: held(study, run) for study in studies(card)}


def test_every_variant_is_held_by_value(card: Card, tmp_path: Path) -> None:
    """A baseline that changes, a scale or an activation, changes these numbers. `PROVENN_HOLD=1` writes them anew."""
    file, values = HERE / card.slug / "variants.json", all_held(card, tmp_path)
    if os.environ.get("PROVENN_HOLD"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(values, indent=1) + "\n")
    expected = json.loads(file.read_text())
    assert {name: set(variants) for name, variants in values.items()} == {
        name: set(variants) for name, variants in expected.items()
    }
    for study, variants in expected.items():
        for variant, (count, loss, slope, unseen) in variants.items():
            assert values[study][variant][0] == count, f"{study}, {variant}: parameters"
            assert values[study][variant][1] == pytest.approx(loss, rel=1e-3, abs=1e-5), f"{study}, {variant}: loss"
            assert values[study][variant][2] == pytest.approx(slope, rel=1e-2, abs=1e-4), (
                f"{study}, {variant}: gradient"
            )
            assert values[study][variant][3] == pytest.approx(unseen, rel=1e-3, abs=1e-5), (
                f"{study}, {variant}: loss of a test batch"
            )
