"""Hold a paper's claims, its experiments and the record that ships to each other.

Each function gives a line for each fault; none where there is none.
"""

import math
from collections.abc import Callable, Iterator
from types import ModuleType

from provenn.catalog import Card
from provenn.core.errors import UserError
from provenn.core.names import meant
from provenn.evidence.experiment import measuring_functions
from provenn.evidence.interval import estimate
from provenn.evidence.measurement import Measurement
from provenn.evidence.record import EVIDENCE, PICTURES, Evidence, Record, why_unread
from provenn.evidence.study import Contrast, Reading
from provenn.evidence.timing import Exponent, Ratio
from provenn.testing.probes import studies_of

LARGEST = 70_000  # bytes of a record
EXACT = {"rel_tol": 1e-9, "abs_tol": 1e-12}


def faults_of_claims(card: Card) -> Iterator[str]:
    """Every claim can fail or says what it needs, and every region says why."""
    for claim in card.claims:
        measured = [card.experiment(name) for name in claim.decides if card.experiment(name).needs is None]
        if not measured and not claim.needs:
            yield f"no experiment decides the claim {claim.says!r}: name one, or say what it needs"
        elif claim.kind == "quality" and not claim.needs and "quality" not in {one.kind for one in measured}:
            yield f"the claim {claim.says!r} is of quality: name an experiment of kind quality"
    sentences = [experiment.says for experiment in card.experiments]
    for experiment in card.experiments:
        if sentences.count(experiment.says) > 1:
            yield f"{experiment.id}: another experiment says the same: {experiment.says!r}"
        if experiment.expects is not None and not experiment.why:
            yield f"{experiment.id}: give with `why` the reason of its region"
        if experiment.kind == "quality" and experiment.lacks is None and not experiment.scale:
            yield f"{experiment.id}: name its data and the size of its models with `scale`, an entry of [scales]"


def faults_of_experiments(card: Card) -> Iterator[str]:
    """`paper.toml` and `experiments.py` name the same experiments and the same two sides; variants are tuned alike."""
    try:
        module = card.resolve_module("experiments") if card.has("experiments") else ModuleType("experiments")
        functions = measuring_functions(module)
    except (UserError, ValueError) as error:
        yield str(error)
        return
    listed = {experiment.id: experiment for experiment in card.experiments}
    to_measure = [name for name, experiment in listed.items() if experiment.needs is None]
    for name in to_measure:
        if name not in functions:
            yield f"{name}: paper.toml lists it, nothing in experiments.py measures it{meant(name, functions)}"
    for name in functions:
        if name not in listed:
            yield f"{name}: experiments.py measures it, paper.toml does not list it{meant(name, listed)}"
        elif name not in to_measure:
            yield f"{name}: experiments.py measures it, paper.toml says that it needs {listed[name].needs}"
    for name, function in functions.items():
        sides = listed[name].sides if name in listed else None
        if isinstance(function, Contrast | Ratio) and sides != function.sides:
            yield f"{name}: experiments.py compares {function.sides}, paper.toml says sides = {sides}"
        if isinstance(function, Reading | Exponent) and sides is not None:
            yield f"{name}: experiments.py compares nothing, paper.toml says sides = {sides}"
    for study in studies_of(card) if functions else ():
        if len(study.lrs) in (1, 2):
            yield f"the study {study.name!r}: {len(study.lrs)} learning rates; at least 3, or none where nothing learns"


def faults_of_evidence(card: Card) -> Iterator[str]:
    """The record that ships is of the experiments as they stand, and all in it follows from its raw values."""
    file = card.folder / EVIDENCE
    if not file.exists():
        return
    try:
        evidence = Evidence.read(file)
    except (OSError, ValueError, RecursionError) as error:
        yield f"{EVIDENCE} cannot be read: {why_unread(error)}; measure again, or restore it"
        return
    if evidence.paper != card.slug:
        yield f"{EVIDENCE} is of the paper {evidence.paper!r}, not of {card.slug!r}"
    if file.stat().st_size > LARGEST:
        yield f"{EVIDENCE} has {file.stat().st_size:,} bytes; at most {LARGEST:,}"
    listed = [experiment.id for experiment in card.experiments]
    recorded = [record.experiment for record in evidence.records]
    for name in dict.fromkeys(recorded):
        if name not in listed:
            yield f"{name}: {EVIDENCE} has a record of it, paper.toml does not list it{meant(name, listed)}"
    for name in listed:
        if name not in recorded:
            yield f"{name}: {EVIDENCE} has no record of it: run `provenn reproduce {card.slug}`"
    for record in evidence.records:
        if record.experiment in listed:
            budget = evidence.runs[record.run].budget
            yield from (f"{record.experiment}: {fault}" for fault in _faults_of_record(card, record, budget))
    drawn = {picture.file for record in evidence.records for picture in record.measurement.pictures}
    there = {f"{PICTURES}/{file.name}" for file in card.folder.glob(f"{PICTURES}/*")}
    yield from (f"{name}: no such file, which {EVIDENCE} names" for name in sorted(drawn - there))
    yield from (f"{name}: no record in {EVIDENCE} names it" for name in sorted(there - drawn))


def _faults_of_record(card: Card, record: Record, budget: str) -> Iterator[str]:
    experiment, measured = card.experiment(record.experiment), record.measurement
    yield from _faults_of_interval(measured)
    again = Record.of(experiment, measured, budget=budget, overrides=record.overrides)
    for fact in ("verdict", "reason", "expects"):
        recorded, today = str(getattr(record, fact)), str(getattr(again, fact))
        if recorded != today:
            yield f"the recorded {fact} is {recorded!r}, its numbers and paper.toml give {today!r}"
    if experiment.kind != "exact" and measured.effect is not None:
        counted = measured.method == "exact" and measured.seeds  # how many of so many trainings, say
        if measured.estimator is None and measured.kind_of_effect != "truth" and not counted:
            yield "a bare figure; only an exact experiment may be one: keep the values of both sides"
        if experiment.sides is not None and (
            measured.sides != experiment.sides or not len(measured.values) == len(measured.baselines) > 0
        ):
            yield f"the record holds no values of both sides, {' and '.join(experiment.sides)}"
    yield from _faults_of_tuning(measured)


def _faults_of_interval(measured: Measurement) -> Iterator[str]:
    """Effect and interval are those of the values."""
    if measured.estimator is None:
        return
    try:
        again = estimate(measured.estimator, measured.values, measured.baselines)
    except (ValueError, ArithmeticError) as error:
        yield f"nothing can be estimated from its values: {error}"
        return
    recorded = (measured.effect, *(measured.interval or ()))
    today = (again.effect, *(again.interval or ()))
    close = len(recorded) == len(today) and all(map(_is_close, recorded, today))
    if not close or (measured.method, measured.confidence) != (again.method, again.confidence):
        yield f"effect and interval are recorded as {_said(recorded)}; its values give {_said(today)}"


def _is_close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, **EXACT) or (math.isnan(one) and math.isnan(other))


def _said(values: tuple[float | None, ...]) -> str:
    return ", ".join("none" if value is None else f"{value:.6g}" for value in values)


def _faults_of_tuning(measured: Measurement) -> Iterator[str]:
    """Every variant tried the same rates, beyond whose ends its own grid may have grown, and took the best."""
    tuned, chosen = measured.setting.get("tuned", {}), measured.setting.get("lr", {})
    grid = measured.setting.get("lrs") or [-math.inf, math.inf]
    for variants in (value for key, value in tuned.items() if key.startswith("validation")):
        best: Callable = max if next(skill.higher_is_better for skill in measured.skills) else min
        if len({tuple(lr for lr in rates if min(grid) <= float(lr) <= max(grid)) for rates in variants.values()}) != 1:
            yield f"unequal tuning: {', '.join(f'{name} at {len(rates)} rates' for name, rates in variants.items())}"
        for variant, rates in variants.items():
            reached = {float(lr): value for lr, value in rates.items() if value is not None}
            if reached and not math.isclose(reached.get(chosen.get(variant), math.nan), best(reached.values())):
                yield f"{variant} took the rate {chosen.get(variant)}, and another was better on validation data"
