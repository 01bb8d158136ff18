"""Measures a paper's experiments, one record each, written as each ends."""

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from provenn import catalog
from provenn.catalog import Card, Experiment, installed
from provenn.core.device import choose_device
from provenn.core.digest import digest
from provenn.core.errors import UserError
from provenn.core.files import Unwritable, alone_in, check_writable
from provenn.core.names import check_options, meant
from provenn.core.settings import typed
from provenn.evidence.experiment import Measure, measuring_functions, parameters_of, with_overrides
from provenn.evidence.measurement import Measurement
from provenn.evidence.provenance import Provenance, provenance
from provenn.evidence.record import (
    EVIDENCE,
    LEDGER,
    Evidence,
    Finding,
    Ledger,
    Record,
    RecordedRun,
    here,
    peak_memory,
    read_or_set_aside,
)
from provenn.evidence.run import Budget, Elsewhere, Run
from provenn.experiments.at_paper import AtPaperScale, TrainingOptions
from provenn.experiments.side_by_side import check_jobs, measure_all, measurement_of, where_trials_run
from provenn.tasks.datasets import DataPaths

BUDGETS = ("smoke", "small", "paper")
RUN = "runs/latest"
MOST_SEEDS = 10_000
DEFAULT_SEEDS = 5
ERRORS = "errors.txt"


class Options(TypedDict, total=False):
    """What may be said of a reproduction; `reproduce` explains each."""

    experiments: str | Sequence[str] | None
    headline: bool
    missing: bool
    budget: str
    seeds: int | str | Sequence[int]
    device: str
    out: str | Path
    resume: bool
    data: DataPaths | None
    overrides: dict[str, Any] | None
    training: TrainingOptions
    log: Callable[[str], None]


DEFAULTS: Options = {
    "experiments": None,
    "headline": False,
    "missing": False,
    "budget": "small",
    "seeds": DEFAULT_SEEDS,
    "device": "auto",
    "out": RUN,
    "resume": False,
    "data": None,
    "overrides": None,
    "training": TrainingOptions(),
    "log": lambda message: None,
}


def reproduce(
    paper: str | Card, *, done: Callable[[Finding], None] = lambda finding: None, **options: Unpack[Options]
) -> list[Finding]:
    """Measure a paper's experiments and return what was found, which also lies in `out/<slug>/evidence.json`.

    Args:
        paper: its slug or arXiv number, or its card.
        done: is given each finding as it is written.
        experiments: ids of the experiments to measure, or the one; by default all.
        headline: only the experiments that decide the headline of the abstract.
        missing: only the experiments of which no record of the code that stands comes with the paper.
        budget: smoke, small (the default) or paper.
        seeds: how many, or which: see `choose_seeds`; by default 5.
        device: auto (the default), cpu, cuda, mps or a torch device.
        out: folder of the records, by default runs/latest.
        resume: keep what an earlier run in the same folder has measured at the same budget and seeds.
        data: where data sets and checkpoints lie that `provenn data` lists, by name; for the budget paper.
        overrides: another setting to measure at, such as {"epochs": 3}. A study takes those of its recipe and the
            arguments of its data and networks, a timing its sizes and rounds, a function its arguments. Experiments
            that take none of them are left out. The outcome is kept beside that of the experiments' own setting.
        training: how trainings run, on how many processes; for the budget paper. At others it may hold a precision,
            such as `TrainingOptions(precision="bf16-mixed")`: trainings have it in place of the registered one, and
            their records say so.
        log: is given messages for the user.

    Raises:
        UserError: a change that no experiment takes, an unknown experiment, budget or device, no seeds, or a folder
        in which another process measures this paper.
    """
    card = catalog.card(catalog.slug_of(paper)) if isinstance(paper, str) else paper
    with _reproduction(card, options) as work:
        measure_all([work], None, done)
        return work.findings


@dataclass(frozen=True)
class _Work:
    """A paper whose experiments are measured, in a folder that no other process writes."""

    card: Card
    wanted: list[Experiment]
    run: Run
    evidence: Evidence
    recorded: RecordedRun
    data: DataPaths | None
    settings: dict[str, dict[str, Any]]  # by experiment, what is changed of its own setting
    training: TrainingOptions

    @property
    def findings(self) -> list[Finding]:
        """What was found of all, at the setting at which they were measured now."""
        return [self.evidence.finding(experiment, self.settings[experiment.id]) for experiment in self.wanted]

    async def measure(self, experiment: Experiment) -> Finding:
        """Measure an experiment, unless an earlier record still stands for it, and write it."""
        run, evidence = self.run.of_experiment(overrides=self.settings[experiment.id]), self.evidence
        kept = evidence.record(experiment.id, run.overrides) if run.reuse else None
        find = partial(_function, run, self.card, experiment, self.data, self.training)
        earlier = None if kept is None else evidence.runs[kept.run]
        if kept is None or not _still_good(kept, earlier, run, find, experiment, self.recorded):
            evidence.put(await _measure(run, find, experiment), self.recorded)
            evidence.keep_experiments([experiment.id for experiment in self.card.experiments])
            evidence.write(run.file)
        return evidence.finding(experiment, run.overrides)


@contextmanager
def _reproduction(card: Card, options: Options, elsewhere: Elsewhere | None = None) -> Iterator[_Work]:
    """What `reproduce` measures with; the folder is this process's as long as the block runs."""
    check_options("reproduce", options, Options)
    asked: Options = {**DEFAULTS, **options}
    budget, log, data = asked["budget"], asked["log"], asked["data"]
    seeds = choose_seeds(asked["seeds"])
    if budget not in BUDGETS:
        raise UserError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    if budget != "paper" and replace(asked["training"], precision=None) != TrainingOptions():
        raise UserError(f"training is for the budget paper, but for its precision, got the budget {budget}")
    experiments = asked["experiments"]
    names = [experiments] if isinstance(experiments, str) else experiments
    if asked["headline"]:
        names = next((claim.decides for claim in card.claims if claim.headline), None)
    wanted = [card.experiment(name) for name in names] if names else card.experiments
    if asked["missing"]:
        wanted = [experiment for experiment in wanted if _is_missing(card, experiment)]
        if not wanted:
            log(f"{card.slug}: nothing is missing that could be measured here")
    device, out = choose_device(asked["device"]), Path(asked["out"])
    named = bool(names) and not asked["headline"]
    settings = _settings(budget, card, wanted, data, asked["overrides"] or {}, log, named=named)
    wanted = [experiment for experiment in wanted if experiment.id in settings]
    if budget != "paper" and asked["training"].precision is not None:
        _check_precision(card, wanted, log)
    folder = out / card.slug
    check_writable(folder)
    with alone_in(folder):
        evidence, trouble = read_or_set_aside(Evidence, folder / EVIDENCE, card.slug)
        ledger, more_trouble = read_or_set_aside(Ledger, folder / LEDGER, card.slug)
        for message in filter(None, (trouble, more_trouble)):
            log(message)
        run = Run(
            card.slug,
            out,
            budget=cast(Budget, budget),
            seeds=seeds,
            device=device,
            ledger=ledger,
            reuse=asked["resume"],
            elsewhere=elsewhere,
        )
        recorded = RecordedRun(budget=budget, environment=here(device), date=datetime.now(UTC).replace(microsecond=0))
        yield _Work(card, wanted, run, evidence, recorded, data, settings, asked["training"])


def _check_precision(card: Card, experiments: Sequence[Experiment], log: Callable[[str], None]) -> None:
    """Log which experiments train nothing that another precision could be given.

    Raises:
        UserError: none does.
    """
    measures = {experiment.id: _own_measure("small", card, experiment, None) for experiment in experiments}
    others = [name for name, measure in measures.items() if measure is not None and not _takes_precision(measure)]
    if not any(measure is not None and _takes_precision(measure) for measure in measures.values()):
        raise UserError(f"precision is for trainings, and none is in {', '.join(measures)}: leave it out")
    if others:
        log(f"{card.slug}: without a training that takes a precision: {', '.join(others)}")


def _takes_precision(measure: Measure) -> bool:
    return "precision" in parameters_of(measure)


def _is_missing(card: Card, experiment: Experiment) -> bool:
    """Whether a paper comes without a record of an experiment that could be measured, or with one of older code."""
    file = card.folder / EVIDENCE
    evidence = Evidence.read(file) if file.exists() else Evidence(paper=card.slug)
    finding = evidence.finding(experiment)
    return not experiment.needs and provenance(finding) in (None, Provenance.CHANGED)


def _settings(
    budget: str,
    card: Card,
    experiments: Sequence[Experiment],
    data: DataPaths | None,
    overrides: dict[str, Any],
    log: Callable[[str], None],
    *,
    named: bool,
) -> dict[str, dict[str, Any]]:
    """The overrides that each experiment takes, of the right types; experiments that take none are logged and left out.

    Raises:
        UserError: what no experiment takes, a value that cannot be, or a named experiment that takes none.
    """
    if not overrides:
        return {experiment.id: {} for experiment in experiments}
    measures = {experiment.id: _own_measure(budget, card, experiment, data) for experiment in experiments}
    known = {name: {} if measure is None else parameters_of(measure) for name, measure in measures.items()}
    there = list(dict.fromkeys(name for names in known.values() for name in names))
    for name in overrides:
        if name not in there:
            words = f"what can be set: {', '.join(there)}" if there else "they take nothing"
            raise UserError(f"none of the chosen experiments has the option {name!r}{meant(name, there)}; {words}")
    settings = {}
    for name, measure in measures.items():
        mine = {key: typed(key, value, known[name][key]) for key, value in overrides.items() if key in known[name]}
        if mine and measure is not None:
            try:
                with_overrides(measure, mine)
            except (ValueError, TypeError) as error:
                raise UserError(f"{name}: {error}") from None
            settings[name] = mine
    left_out = [name for name in known if name not in settings]
    if left_out and named:
        takes = ", ".join(known[left_out[0]]) or "nothing"
        raise UserError(f"{left_out[0]} has no option {', '.join(overrides)}; it takes: {takes}")
    if left_out:
        log(f"{card.slug}: left out, as they take none of {', '.join(overrides)}: {', '.join(left_out)}")
    return settings


def reproduce_many(
    cards: Sequence[Card],
    *,
    jobs: int = 1,
    cluster: str | None = None,
    done: Callable[[Finding], None] = lambda finding: None,
    **options: Unpack[Options],
) -> list[Finding]:
    """Measure several papers' experiments, one after the other, or the trials of all of them side by side.

    Values and records are those of one after the other, and lie in the same files, which this process alone writes.
    What times something runs after all else, alone on its machine. Experiments without trials are measured here.

    Args:
        cards: the papers.
        jobs: processes of this machine that run trials; they share its cores.
        cluster: address of a Ray cluster whose machines run the trials, or "auto": see
        `provenn.experiments.workers.cluster`. A
            trial whose machine is lost runs again on another. Data sets and checkpoints of the budget paper have to
            lie at the same path on every machine.
        done, options: as for `reproduce`.

    Raises:
        UserError: what `reproduce` refuses, a process that was killed, or a cluster that cannot be used.
    """
    check_jobs(jobs, cluster)
    if jobs == 1 and cluster is None:
        return [finding for card in cards for finding in reproduce(card, done=done, **options)]
    device, log = choose_device(options.get("device", "auto")), options.get("log", lambda message: None)
    # The other processes may have begun in other folders.
    options["out"] = Path(options.get("out", RUN)).absolute()
    if options.get("data"):
        options["data"] = {name: Path(path).absolute() for name, path in (options["data"] or {}).items()}
    with where_trials_run(jobs, cluster, cards, device, log) as machines, ExitStack() as stack:
        works = [stack.enter_context(_reproduction(card, options, machines)) for card in cards]
        measure_all(works, machines, done)
        return [finding for work in works for finding in work.findings]


async def _measure(run: Run, find: Callable[[], Measure | None], experiment: Experiment) -> Record:
    import torch

    start = time.perf_counter()
    code = ""
    try:
        function = find()
        needs = experiment.lacks or "a function that measures it"
        code = digest(_registered(function)) if function is not None else ""
        measurement = Measurement.not_measured(needs) if function is None else await measurement_of(function, run)
        if experiment.package is not None and function is not None:
            setting = {**measurement.setting, experiment.package: installed(experiment.package)}
            measurement = measurement.model_copy(update={"setting": setting})
        if run.machines:
            setting = {**measurement.setting, "measured on": sorted(run.machines)}
            measurement = measurement.model_copy(update={"setting": setting})
    except Unwritable:  # the next experiment could not be written either
        raise
    except Exception as error:  # one experiment's trouble must not cost the others their work
        measurement = Measurement.failure(error, run.device)
        with (run.folder / ERRORS).open("a", encoding="utf-8") as file:
            file.write(f"{experiment.id}\n{traceback.format_exc()}\n")
    if (
        measurement.out_of_memory
    ):  # of the error nothing is left now that held tensors: the other experiments get the room
        gc.collect()
        if run.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return Record.of(
        experiment,
        measurement,
        budget=run.budget,
        overrides=run.overrides,
        code=code,
        wall_seconds=round(time.perf_counter() - start - run.waited + run.spared, 3),
        peak_memory_bytes=max({peak_memory(run.device), *run.peaks}),
    )


def _function(
    run: Run, card: Card, experiment: Experiment, data: DataPaths | None, training: TrainingOptions
) -> Measure | None:
    """What measures an experiment at this run's budget and setting; None where nothing can."""
    measure = _own_measure(run.budget, card, experiment, data, training)
    key = ("changed", experiment.id)
    if measure is None or key in run.memory:
        return run.memory.get(key)
    changed = with_overrides(measure, run.overrides) if run.overrides else measure
    if run.budget != "paper" and training.precision is not None and _takes_precision(measure):
        changed = InPrecision(changed, with_overrides(changed, {"precision": training.precision}), training.precision)
    if changed is not measure:
        run.memory[key] = changed  # a run knows experiments by what they are, not by their names: it must hold on to it
    return changed


def _registered(measure: Measure) -> Measure:
    """What measures an experiment in the precision that is registered."""
    return measure.registered if isinstance(measure, InPrecision) else measure


@dataclass(frozen=True)
class InPrecision:
    """A measurement whose trainings have another precision than the registered one, as the record then says.

    The code is that of the registered one, and a record stands for it.
    """

    registered: Measure
    changed: Measure
    precision: str

    async def __call__(self, run: Run) -> Measurement:
        outcome = self.changed(run)
        measurement = outcome if isinstance(outcome, Measurement) else await outcome
        if measurement.missed:
            return measurement
        note = f"{measurement.note} Trained in {self.precision}, in place of what is registered.".strip()
        setting = {**measurement.setting, "precision": self.precision}
        return measurement.model_copy(update={"setting": setting, "note": note})


def _own_measure(
    budget: str,
    card: Card,
    experiment: Experiment,
    data: DataPaths | None,
    training: TrainingOptions = DEFAULTS["training"],
) -> Measure | None:
    """What measures an experiment at this budget and its own setting; None where nothing can."""
    if budget == "paper" and experiment.at_paper is not None:
        return AtPaperScale(card, experiment, data, training=training)
    if experiment.lacks is not None or not card.has("experiments"):
        return None
    return measuring_functions(card.resolve_module("experiments")).get(experiment.id)


def _still_good(
    record: Record,
    earlier: RecordedRun | None,
    run: Run,
    find: Callable[[], Measure | None],
    experiment: Experiment,
    now: RecordedRun,
) -> bool:
    """A record may stand for a new measurement only where experiment, code, budget, seeds, machine and versions are the
    same.

    What was not measured is tried again: what it needed may be there by now.
    """
    if record.measurement.missed:
        return False
    try:
        function = find()
        code = digest(_registered(function)) if function is not None else ""
    except UserError:  # its measurement reports what is wrong
        return False
    if earlier is None or function is None or record.code != code:
        return False
    precision = record.measurement.setting.get("precision")
    if run.budget != "paper" and precision != (function.precision if isinstance(function, InPrecision) else None):
        return False
    if experiment.package is not None and installed(experiment.package) != record.measurement.setting.get(
        experiment.package
    ):
        return False
    seeds = record.measurement.seeds
    again = Record.of(experiment, record.measurement, budget=run.budget, overrides=run.overrides)
    return (
        (not seeds or tuple(seeds) == run.seeds)
        and (record.verdict, record.expects) == (again.verdict, again.expects)
        and earlier.budget == now.budget
        and earlier.environment.model_copy(update={"commit": ""}) == now.environment.model_copy(update={"commit": ""})
    )


def choose_seeds(seeds: int | str | Sequence[int]) -> tuple[int, ...]:
    """The seeds meant: a count starts at 0; a list or a range names them, so that a finding can be held to fresh ones.

    >>> choose_seeds(3), choose_seeds("3"), choose_seeds("10-12"), choose_seeds("7,9,11")
    ((0, 1, 2), (0, 1, 2), (10, 11, 12), (7, 9, 11))
    """
    meant = _parsed(seeds) if isinstance(seeds, str) else range(seeds) if isinstance(seeds, int) else seeds
    if meant[MOST_SEEDS:]:
        raise UserError(f"seeds must be at most {MOST_SEEDS}, got {seeds}")
    chosen = tuple(meant)
    if not chosen or min(chosen) < 0:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    if max(chosen) >= 2**32:
        raise UserError(f"each seed must be below {2**32}, got {max(chosen)}")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"seeds must differ, got {seeds}")
    return chosen


def _parsed(text: str) -> Sequence[int]:
    try:
        if "," in text:
            return tuple(int(part) for part in text.split(","))
        first, dash, last = text.strip().partition("-")
        return range(int(first), int(last) + 1) if dash and first else range(int(text))
    except ValueError:
        raise UserError(f"--seeds takes a count (3), a list (7,9,11) or a range (10-12), got {text!r}") from None
