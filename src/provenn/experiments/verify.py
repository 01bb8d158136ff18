"""Repeats one recorded trial of each experiment whose code has changed since it was measured."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict, Unpack

from provenn import catalog
from provenn.catalog import Card, Experiment
from provenn.core.device import choose_device
from provenn.core.digest import Unfollowable, digest
from provenn.core.errors import UserError
from provenn.core.files import alone_in, check_writable, write_atomically
from provenn.core.names import check_options
from provenn.evidence import view
from provenn.evidence.clock import of_a_machine
from provenn.evidence.experiment import Measure, measuring_functions, parameters_of, with_overrides
from provenn.evidence.measurement import Measurement
from provenn.evidence.provenance import DIGESTS, Provenance, digests_of, provenance_of
from provenn.evidence.record import (
    EVIDENCE,
    LEDGER,
    Evidence,
    Ledger,
    Record,
    Repeated,
    Verification,
    commit,
    machine,
    read_or_set_aside,
)
from provenn.evidence.run import Run
from provenn.evidence.study import Contrast, Reading
from provenn.evidence.timing import Exponent, Ratio
from provenn.experiments.side_by_side import measure_all, measurement_of, where_trials_run
from provenn.experiments.workers import Workers

RUN = "runs/verify"
ERROR = 1e-3  # of an identity: what is larger is none of rounding
ROUNDING = 1e-6  # relative: sums in another order
CLOCK = "time or memory of the machine, which only `provenn reproduce` measures again"


@dataclass(frozen=True)
class Verified:
    """An experiment's record beside the code that stands.

    Args:
        paper, experiment: which.
        provenance: which code the record is of, after it was repeated where it was.
        verification: what came of repeating it; None where it was not repeated.
        reason: why it was not, where its code has changed.
    """

    paper: str
    experiment: Experiment
    provenance: Provenance
    verification: Verification | None = None
    reason: str = ""


class Options(TypedDict, total=False):
    """What may be said of a verification; `verify` explains each."""

    experiments: Sequence[str]
    only_list: bool
    out: str | Path
    resume: bool
    record: bool
    log: Callable[[str], None]


def verify(
    papers: Sequence[str | Card] = (),
    *,
    jobs: int = 1,
    cluster: str | None = None,
    done: Callable[[Verified], None] = lambda verified: None,
    **options: Unpack[Options],
) -> list[Verified]:
    """Whether the code that stands gives the values of the records that ship.

    Of an experiment whose digest is not its record's, one trial is repeated. A count or an identity is repeated whole,
    a training on the first recorded seed at the recorded learning rates. A function that fails on one seed is repeated
    on as many as it takes. Clocks are not repeated. What comes out is compared with the record's raw values, and the
    outcome, commit and digest go into `out/<slug>/evidence.json`.

    Args:
        papers: slugs, arXiv numbers or cards; by default all.
        jobs, cluster: as for `reproduce_many`.
        done: is given each experiment as it ends.
        experiments: ids, of one paper; by default all.
        only_list: repeat nothing.
        out: folder of the outcomes, by default runs/verify.
        resume: keep what an earlier run in the same folder has repeated.
        record: write the outcomes into the records that ship, too.
        log: is given messages for the user.

    Raises:
        UserError: an unknown paper or experiment, or a folder in which another process verifies.
    """
    check_options("verify", options, Options)
    experiments, log = options.get("experiments", ()), options.get("log", lambda message: None)
    chosen = [catalog.card(catalog.slug_of(one)) if isinstance(one, str) else one for one in papers]
    chosen = chosen or list(catalog.cards().values())
    if experiments and len(chosen) > 1:
        raise UserError(f"--experiment is for one paper, and {len(chosen)} were named")
    for name in experiments:
        chosen[0].experiment(name)
    with where_trials_run(jobs, cluster, chosen, "cpu", log) as elsewhere, ExitStack() as stack:
        works = [stack.enter_context(_verifying(card, elsewhere, **options)) for card in chosen]
        measure_all(works, elsewhere, done)
        return [verified for work in works for verified in work.outcomes()]


def current_digests(card: Card, log: Callable[[str], None] = lambda message: None) -> dict[str, str]:
    """The digest of what measures each experiment at its own setting, by id; one that has none is logged."""
    functions = measuring_functions(card.resolve_module("experiments")) if card.has("experiments") else {}
    digests = {}
    for experiment in card.experiments:
        if experiment.id in functions:
            try:
                digests[experiment.id] = digest(functions[experiment.id])
            except Unfollowable as error:
                log(f"{card.slug} {experiment.id}: whether its code changed cannot be told: {error}")
    return digests


def write_digests(card: Card, log: Callable[[str], None] = lambda message: None) -> int:
    """Write a paper's `digests.json` in its folder, and give how many digests are not those that were there."""
    before, now = digests_of(card), current_digests(card, log)
    write_atomically(card.folder / DIGESTS, json.dumps(now, indent=1) + "\n")
    return sum(before.get(name) != now.get(name) for name in before | now)


@dataclass
class _Verifying:
    """A paper whose records are held to the code, in a folder that no other process writes."""

    card: Card
    evidence: Evidence
    run: Run
    digests: dict[str, str]
    wanted: list[Experiment]  # whose code has changed since
    all: list[Experiment]
    files: list[Path]
    repeats: bool
    reasons: dict[str, str] = field(default_factory=dict)

    def outcomes(self) -> list[Verified]:
        return [self.outcome(experiment) for experiment in self.all]

    def outcome(self, experiment: Experiment) -> Verified:
        record = self.recorded(experiment)
        stands = provenance_of(record, self.digests.get(experiment.id, ""))
        verification = record.verified if stands is not Provenance.STANDS else None
        reason = self.reasons.get(experiment.id, "") if stands is Provenance.CHANGED else ""
        return Verified(self.card.slug, experiment, stands, verification, reason)

    def recorded(self, experiment: Experiment) -> Record:
        record = self.evidence.record(experiment.id)
        if record is None:
            raise ValueError(f"{experiment.id} has no record")
        return record

    async def measure(self, experiment: Experiment) -> Verified:
        """Repeat a trial of an experiment, and write what came of it."""
        record = self.recorded(experiment)
        measure = measuring_functions(self.card.resolve_module("experiments"))[experiment.id]
        device = self.evidence.runs[record.run].environment.device.partition(":")[0]
        reason = _unrepeatable(measure, record, device)
        if reason or not self.repeats:
            self.reasons[experiment.id] = reason
            return self.outcome(experiment)
        outcome, words = await self.repeat(experiment, measure, record, device)
        if outcome is None:
            self.reasons[experiment.id] = words
            return self.outcome(experiment)
        verification = Verification(
            outcome=outcome,
            code=self.digests[experiment.id],
            commit=commit(),
            date=datetime.now(UTC).replace(microsecond=0),
            device=machine(device),
            repeated=words,
        )
        index = self.evidence.records.index(record)
        self.evidence.records[index] = record.model_copy(update={"verified": verification})
        for file in self.files:
            self.evidence.write(file)
        return self.outcome(experiment)

    async def repeat(
        self, experiment: Experiment, measure: Measure, record: Record, device: str
    ) -> tuple[Repeated | None, str]:
        """What comes of one seed, in words; None where nothing can be had here, and why.

        A function that fails on one recorded seed, though its trials do not, is repeated on as many as it takes. What
        differs then is repeated on all of them before it is said to differ.
        """
        recorded, seeds = record.measurement, tuple(record.measurement.seeds) or (0,)
        rates: dict[str, float] = {}
        if isinstance(measure, (Contrast, Reading)):
            rates = dict(recorded.setting.get("lr", {}))
            measure = replace(measure, shown=(), picture=False)
        if (precision := recorded.setting.get("precision")) is not None and "precision" in parameters_of(measure):
            measure = with_overrides(measure, {"precision": precision})
        outcome: Repeated | None = None
        for count in range(1, len(seeds) + 1):
            run = self.run.of_experiment(device=device, seeds=seeds[:count], rates=rates)
            try:
                fresh = await measurement_of(measure, run)
            except Exception as error:
                fresh = Measurement.failure(error, device)
            if missing := fresh.needs or fresh.unsupported or fresh.out_of_memory:
                return None, missing
            if fresh.failed:
                outcome, words = Repeated.DIFFERS, f"the code that stands fails: {fresh.failed}"
            else:
                outcome, words = compared(experiment, record, fresh)
            if outcome is not Repeated.DIFFERS or run.broken or (count == 1 and not fresh.failed):
                break
        return outcome, words


def compared(experiment: Experiment, record: Record, fresh: Measurement) -> tuple[Repeated | None, str]:
    """A repeated measurement beside the recorded one.

    Each repeated seed is compared, side by side. On another processor its training takes another path, as another seed
    would: it then lies, 95 times in 100, within mean ± t·s·√(1 + 1/n) of the recorded seeds.
    """
    recorded = record.measurement
    if not recorded.seeds:
        before = [*_known(recorded.effect), *recorded.values, *recorded.baselines]
        after = [*_known(fresh.effect), *fresh.values, *fresh.baselines]
        shown = [view.number(fresh.effect), view.number(recorded.effect)]
        if shown[0] == shown[1] and before != after:
            shown = [repr(fresh.effect), repr(recorded.effect)]
        words = f"{shown[0]} now, {shown[1]} in the record"
        if before == after:
            return Repeated.EXACT, words
        again = Record.of(experiment, fresh, budget="small")
        alike = len(before) == len(after) and all(map(_rounded_alike, before, after))
        # Of an identity the error itself is rounding, which another processor does otherwise.
        is_error = experiment.kind == "exact" and experiment.published is None
        small = all(abs(value) < ERROR for value in (*before, *after))
        if alike or (is_error and small and again.verdict is record.verdict):
            return Repeated.ROUNDING, words
        return Repeated.DIFFERS, words
    if not recorded.values or not fresh.values:
        return None, "its record keeps no value of a single seed"
    seeds = recorded.seeds[: max(1, len(fresh.seeds))]
    sides = [(recorded.values, fresh.values[: len(seeds)])]
    if recorded.baselines and fresh.baselines:
        sides.append((recorded.baselines, fresh.baselines[: len(seeds)]))
    now = " against ".join(_numbers(repeated) for _, repeated in sides)
    before_words = " against ".join(_numbers(values[: len(repeated)]) for values, repeated in sides)
    words = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: {now} now, {before_words} in the record"
    if all(values[: len(repeated)] == repeated for values, repeated in sides):
        return Repeated.EXACT, words
    close = all(_within(values, value) for values, repeated in sides for value in repeated)
    return (Repeated.SCATTER if close else Repeated.DIFFERS), words


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(map(view.number, values))


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _rounded_alike(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=ROUNDING)


def _within(values: Sequence[float], value: float) -> bool:
    """Whether a value is one that another seed might have given."""
    from scipy.stats import t

    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return _rounded_alike(values[0], value)
    spread = math.sqrt(sum((one - mean) ** 2 for one in values) / (n - 1))
    reach = float(t.ppf(0.975, n - 1)) * spread * math.sqrt(1 + 1 / n)
    return abs(value - mean) <= max(reach, ROUNDING * abs(mean))


def _unrepeatable(measure: Measure, record: Record, device: str) -> str:
    """Why nothing of a record can be repeated here, or ""."""
    recorded = record.measurement
    timing = measure.timing if isinstance(measure, (Ratio, Exponent)) else None
    timed = of_a_machine(measure) or (timing is not None and timing.quantity == "time")
    if timed or recorded.estimator == "clock ratio":
        return CLOCK
    try:
        choose_device(device)
    except UserError:
        return f"it was measured on {device}"
    return ""


@contextmanager
def _verifying(
    card: Card,
    elsewhere: Workers | None,
    *,
    experiments: Sequence[str] = (),
    only_list: bool = False,
    out: str | Path = RUN,
    resume: bool = False,
    record: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> Iterator[_Verifying]:
    evidence = view.committed(card, log) or Evidence(paper=card.slug)
    digests = current_digests(card, log) if evidence.records else {}
    folder = Path(out) / card.slug
    with ExitStack() as stack:
        ledger = Ledger(paper=card.slug)
        if not only_list and evidence.records:
            check_writable(folder)
            stack.enter_context(alone_in(folder))
            ledger, trouble = read_or_set_aside(Ledger, folder / LEDGER, card.slug)
            if trouble:
                log(trouble)
            if resume and (folder / EVIDENCE).exists():
                earlier, trouble = read_or_set_aside(Evidence, folder / EVIDENCE, card.slug)
                if trouble:
                    log(trouble)
                evidence = _with_outcomes(evidence, earlier)
                if record:
                    evidence.write(card.folder / EVIDENCE)
        run = Run(card.slug, Path(out), device="cpu", ledger=ledger, reuse=resume, elsewhere=elsewhere)
        of_card = [experiment for experiment in card.experiments if experiment.id in (experiments or digests)]
        recorded = {one.id: kept for one in of_card if one.id in digests and (kept := _own(evidence, one))}
        every = [one for one in of_card if one.id in recorded]
        changed = [one for one in every if provenance_of(recorded[one.id], digests[one.id]) is Provenance.CHANGED]
        files = [folder / EVIDENCE, *([card.folder / EVIDENCE] if record else [])]
        yield _Verifying(card, evidence, run, digests, changed, every, files, not only_list)


def _own(evidence: Evidence, experiment: Experiment) -> Record | None:
    """What was measured of an experiment by its own function, which a run at the paper's scale is not."""
    record = evidence.record(experiment.id)
    if record is None or record.measurement.missed or evidence.runs[record.run].budget == "paper":
        return None
    return record


def _with_outcomes(evidence: Evidence, earlier: Evidence) -> Evidence:
    """The evidence with the outcomes of an earlier run, of measurements that are the same."""
    kept = {record.experiment: record for record in earlier.records if not record.overrides}
    records = [
        record.model_copy(update={"verified": kept[record.experiment].verified})
        if not record.overrides
        and record.experiment in kept
        and kept[record.experiment].verified is not None
        and kept[record.experiment].measurement.values == record.measurement.values
        and kept[record.experiment].code == record.code
        else record
        for record in evidence.records
    ]
    return evidence.model_copy(update={"records": records})
