"""Try further learning rates for records that were made before the grids of studies grew by themselves.

    python scripts/grow_grids.py aaren titans
    python scripts/grow_grids.py --resume

For each deciding experiment, the compared variants whose best rate is at an end of the rates in the record get further
ones, as `Study` would give them now. Where every choice stands, the record gets the rates that were tried, and its
values stay. Where a choice moves, the record stays as it is, and the line printed measures the experiment again on
fresh seeds. Trials are kept in runs/grow, for `--resume`.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from provenn import catalog
from provenn.catalog import Card
from provenn.evidence.experiment import measuring_functions
from provenn.evidence.measurement import Measurement
from provenn.evidence.record import EVIDENCE, LEDGER, Evidence, Ledger, Record
from provenn.evidence.run import Run, run_to_end
from provenn.evidence.study import Contrast, Reading, Study, at_an_end

OUT = Path("runs/grow")
EDGE = re.compile(r"At the edge of the rates that were tried: (.+?)\.(?= |$)")
Reached = dict[float, float | None]


class Side(NamedTuple):
    """A compared variant of a record: its rate, and what each rate tried reached on validation data."""

    variant: str
    label: str
    lr: float
    reached: Reached


def sides_of(measure: Contrast | Reading, record: Record) -> list[Side]:
    """The compared variants whose tuning the record holds."""
    study, setting = measure.study, record.measurement.setting
    variants = (measure.variant,) if isinstance(measure, Reading) else (*measure.systems, *measure.baselines)
    tried: dict[str, dict[str, float | None]] = next(
        (of for key, of in setting.get("tuned", {}).items() if key != "seed"), {}
    )
    return [
        Side(variant, label, float(setting["lr"][label]), {float(lr): value for lr, value in tried[label].items()})
        for variant in dict.fromkeys(variants)
        if (label := study.label(variant)) in tried
    ]


def grown(study: Study, run: Run, side: Side) -> Reached:
    """What the record's rates reached and, one after the other, what further ones reach now."""
    reached = dict(side.reached)
    while further := study.further_rates(reached):
        for lr in further:
            reached[lr] = run_to_end(study.validation(run, side.variant, lr))
    return reached


def with_rates(measurement: Measurement, study: Study, every: dict[str, Reached]) -> Measurement:
    """The measurement with all rates that were tried, where none of the choices moved."""
    setting = dict(measurement.setting)
    tuned = dict(setting["tuned"])
    key = next(key for key in tuned if key != "seed")
    tuned[key] = {**tuned[key], **{label: {f"{lr:g}": v for lr, v in of.items()} for label, of in every.items()}}
    setting["tuned"] = tuned
    unsettled = {label for label, of in every.items() if at_an_end(study.best_rate(of), of)}
    skills = [
        skill.model_copy(update={"unsettled": True}) if skill.variant in unsettled else skill
        for skill in measurement.skills
    ]

    def still(edge: re.Match[str]) -> str:
        left = [label for label in edge[1].split(", ") if label not in every]
        return f"At the edge of the rates that were tried: {', '.join(left)}." if left else ""

    remarks = [EDGE.sub(still, measurement.note).strip(), "Further rates were tried later, and the choice stands."]
    if unsettled:
        remarks.append(f"The best rate is still at an end of the grown grid: {', '.join(sorted(unsettled))}.")
    note = " ".join(filter(None, remarks))
    return measurement.model_copy(update={"setting": setting, "skills": skills, "note": note})


def grow(card: Card, resume: bool) -> Iterator[str]:
    """Try further rates for one paper's records; a line for each experiment that has a side at an end."""
    evidence = Evidence.read(card.folder / EVIDENCE)
    functions = measuring_functions(card.resolve_module("experiments"))
    file = OUT / card.slug / LEDGER
    ledger = Ledger.read(file) if resume and file.exists() else Ledger(paper=card.slug)
    deciding = {name for claim in card.claims for name in claim.decides}
    for experiment in card.experiments:
        record, measure = evidence.record(experiment.id), functions.get(experiment.id)
        if experiment.id not in deciding or record is None or not isinstance(measure, (Contrast, Reading)):
            continue
        ends = [side for side in sides_of(measure, record) if at_an_end(side.lr, side.reached)]
        if not ends or any(skill.unsettled for skill in record.measurement.skills):
            continue
        run = Run(card.slug, OUT, ledger=ledger, reuse=True)
        every = {side.label: grown(measure.study, run, side) for side in ends}
        moved = {side.label: measure.study.best_rate(every[side.label]) for side in ends}
        moved = {side.label: moved[side.label] for side in ends if moved[side.label] != side.lr}
        if moved:
            first = max(record.measurement.seeds) + 1
            yield (
                f"{card.slug} {experiment.id}: moves to {moved}: provenn reproduce {card.slug} "
                f"--experiment {experiment.id} --seeds {first}-{first + len(record.measurement.seeds) - 1}"
            )
            continue
        measurement = with_rates(record.measurement, measure.study, every)
        run_of = evidence.runs[record.run]
        again = Record.of(experiment, measurement, budget=run_of.budget)
        changed = {"measurement": measurement, "verdict": again.verdict, "reason": again.reason}
        evidence.records[evidence.records.index(record)] = record.model_copy(update=changed)
        evidence.write(card.folder / EVIDENCE)
        tried = {label: list(of) for label, of in every.items()}
        yield f"{card.slug} {experiment.id}: the choice stands: {tried}"


def main(arguments: list[str]) -> None:
    """Grow the grids of the papers named, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("papers", nargs="*", metavar="SLUG")
    parser.add_argument("--resume", action="store_true", help="keep the trials of an earlier run")
    options = parser.parse_args(arguments)
    for slug in options.papers or list(catalog.cards()):
        for line in grow(catalog.card(slug), options.resume):
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
