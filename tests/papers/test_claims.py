"""Every paper's statements, claims and what measures them, by discovery."""

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
from provenn.evidence.claim import measuring_functions
from provenn.evidence.race import Exponent, Ratio
from provenn.evidence.study import Contrast, Reading, Study
from provenn.testing import seeded_array

PAPERS = [slug for slug, card in cards().items() if card.has("claims")]
ARMS = Path(__file__).parents[1] / "golden" / "arms"
# Exact claims that are not so, as the papers' READMEs say.
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


def test_the_abstract_s_statements_stand_and_every_one_can_fail_or_says_what_it_needs(card: Card) -> None:
    assert 5 <= len(card.statements) <= 9
    for statement in card.statements:
        measured = [name for name in statement.claims if card.claim(name).needs is None]
        assert measured or statement.needs, f"nothing measures, and nothing is needed: {statement.says}"
        if statement.kind == "quality" and not statement.needs:
            kinds = {card.claim(name).kind for name in measured}
            assert "quality" in kinds, f"counts alone do not settle quality: {statement.says}"


def test_claims_and_what_measures_them_name_each_other(card: Card) -> None:
    functions = measuring_functions(card.resolve_module("claims"))
    assert set(functions) == {claim.id for claim in card.claims if claim.needs is None}


def test_claims_are_few_and_each_can_be_read_alone(card: Card) -> None:
    assert len([claim for claim in card.claims if claim.needs is None]) <= 24
    assert len({claim.says for claim in card.claims}) == len(card.claims)
    for claim in card.claims:
        assert not claim.says.startswith(("So ", "It ", "This ", "That ", "They ", "And ")), claim.says
        assert claim.expects is None or claim.why, f"{claim.id}: why this region?"


def test_the_two_sides_are_what_the_card_names(card: Card) -> None:
    """The card names them independently of the code, so that exchanged arms are noticed."""
    functions = measuring_functions(card.resolve_module("claims"))
    for claim in card.claims:
        function = functions.get(claim.id)
        if isinstance(function, (Contrast, Ratio)):
            assert claim.sides == function.sides, claim.id
        elif isinstance(function, (Reading, Exponent)):
            assert claim.sides is None, f"{claim.id} compares nothing"


def test_quality_is_read_off_arms_whose_rates_were_tuned_alike(card: Card) -> None:
    functions = measuring_functions(card.resolve_module("claims"))
    for study in {id(study): study for study in studies(card)}.values():
        parts = [part for _, part in study.arms.values()]
        assert len(study.lrs) >= 3 or study.lrs == (), study.name
        assert len(parts) >= 1
    for claim in card.claims:
        if claim.kind == "quality" and claim.needs is None:
            assert claim.id in functions


def studies(card: Card) -> list[Study]:
    """The studies that a paper's claims are read off, and those that stand in its modules."""
    module = card.resolve_module("claims")
    read = [f.study for f in measuring_functions(module).values() if isinstance(f, (Contrast, Reading))]
    named = [value for value in vars(module).values() if isinstance(value, Study)]
    return list({id(study): study for study in (*read, *named)}.values())


@pytest.mark.parametrize("slug", PAPERS)
def test_exact_claims_hold_but_those_that_are_known_not_to(slug: str, tmp_path: Path) -> None:
    exact = [claim.id for claim in cards()[slug].claims if claim.kind == "exact" and claim.lacks is None]
    if exact:
        found = provenn.paper(slug).reproduce(claims=exact, budget="small", out=tmp_path, device="cpu")
        wrong = {each.claim.id: each.reason for each in found if str(each.verdict) not in ("holds", "reproduced")}
        assert set(wrong) == FALSE.get(slug, set()), wrong


@pytest.mark.parametrize("slug", PAPERS)
def test_other_claims_take_their_paths(slug: str, tmp_path: Path) -> None:
    others = [claim.id for claim in cards()[slug].claims if claim.kind != "exact" and claim.needs is None]
    found = provenn.paper(slug).reproduce(claims=others, budget="smoke", seeds=1, out=tmp_path, device="cpu")
    assert [each.claim.id for each in found] == others
    assert {str(each.verdict) for each in found} == {"not measured"}, "a smoke run gives no verdict"
    assert not {each.claim.id: each.measurement.failed for each in found if each.measurement.failed}
    for each in found:
        if each.measurement.sides is not None:
            assert each.claim.sides == each.measurement.sides, each.claim.id
        if each.claim.kind == "quality" and each.claim.package is None and "recipe" in each.measurement.setting:
            assert each.measurement.skills, f"{each.claim.id}: did its arms beat the trivial predictor?"
    drawn = {picture.file for each in found for picture in each.measurement.pictures}
    assert {str(file.relative_to(tmp_path / slug)) for file in tmp_path.rglob("*.png")} <= drawn


def test_benchmarks_take_their_paths(card: Card) -> None:
    listed = benchmarks(card.resolve_module("claims"))
    timings = list(time_benchmarks(listed, smoke=True))
    assert len(timings) == len(listed)
    assert not [timing.trouble for timing in timings if timing.trouble and timing.benchmark.lacks is None]


# Arms, baselines among them, are held by value: loss and gradient of each network at seeded weights on the same data.


def held(study: Study, run: Run) -> dict[str, list[float]]:
    data, task = study.data(0, True), study.of_task
    torch.manual_seed(0)  # crops are drawn at random
    batch = next(iter(DataLoader(data.train, batch_size=4, collate_fn=data.collate)))  # type: ignore[arg-type]
    values = {}
    for label, part in study.arms.values():
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
        values[label] = [float(sum(p.numel() for p in model.parameters())), loss.item(), square**0.5]
    return values


def all_held(card: Card, folder: Path) -> dict[str, dict[str, list[float]]]:
    run = Run(card.slug, folder, budget="smoke", seeds=(0,))
    return {study.name: held(study, run) for study in studies(card)}


def test_every_arm_is_held_by_value(card: Card, tmp_path: Path) -> None:
    """A baseline that changes, a scale or an activation, changes these numbers. `PROVENN_HOLD=1` writes them anew."""
    file, values = ARMS / f"{card.slug}.json", all_held(card, tmp_path)
    if os.environ.get("PROVENN_HOLD"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(values, indent=1) + "\n")
    expected = json.loads(file.read_text())
    assert {name: set(arms) for name, arms in values.items()} == {name: set(arms) for name, arms in expected.items()}
    for study, arms in expected.items():
        for arm, (count, loss, slope) in arms.items():
            assert values[study][arm][0] == count, f"{study}, {arm}: parameters"
            assert values[study][arm][1] == pytest.approx(loss, rel=1e-3, abs=1e-5), f"{study}, {arm}: loss"
            assert values[study][arm][2] == pytest.approx(slope, rel=1e-2, abs=1e-4), f"{study}, {arm}: gradient"
