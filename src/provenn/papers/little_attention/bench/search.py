"""The search for places: trials of an Optuna study, each a short training and a time, on identities of training alone.

`stages` tries every set of stages. `blocks` lets NSGA-II evolve off, pre and post of every residual block. `narrow`
does what the paper is reported to do, after "Designing Network Design Spaces" (Radosavovic et al., 2020,
arXiv:2003.13678): sample the space, accept the rule that helps most, sample inside. How it does so is inferred.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from provenn.core.cost import interleaved
from provenn.core.errors import UserError
from provenn.core.files import check_writable
from provenn.evidence.measurement import Table
from provenn.evidence.run import Run
from provenn.evidence.sweep import Point, Row, Sweep
from provenn.papers.little_attention.placement import Placement
from provenn.papers.little_attention.studies import FULL
from provenn.tasks import datasets, get_task
from provenn.training import Diverged, Hardware, fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("stages", "narrow", "blocks")
EACH = 16  # placements that are tried before a rule may be accepted
POPULATION = 8  # placements of a generation
DRAWS = 2000  # of a bootstrap
ROUNDS = {"smoke": 1, "small": 9, "paper": 51}


@dataclass(frozen=True)
class Rule:
    """What a placement may be required to be.

    Args:
        name: in words.
        allows: whether a placement is so.
    """

    name: str
    allows: Callable[[Placement], bool]


def rules_of(depths: Sequence[int]) -> list[Rule]:
    """The rules that may make a space smaller: how many blocks, from which stage, which side, first or last."""
    found = [Rule(f"at most {count} blocks", partial(_at_most, count)) for count in (1, 2, 3, 5)]
    found += [Rule(f"only from stage {stage} on", partial(_from, stage)) for stage in range(2, len(depths) + 1)]
    found += [Rule(f"only {side}", partial(_only, side)) for side in ("pre", "post")]
    found += [Rule("no first block of a stage", _no_first), Rule("no last block of a stage", _no_last)]
    return found


def _at_most(count: int, placement: Placement) -> bool:
    return len(placement) <= count


def _from(first: int, placement: Placement) -> bool:
    return all(stage >= first for stage, _ in placement.chosen)


def _only(side: str, placement: Placement) -> bool:
    return set(placement.chosen.values()) <= {side}


def _no_first(placement: Placement) -> bool:
    return all(block > 1 for _, block in placement.chosen)


def _no_last(placement: Placement) -> bool:
    return all(block < placement.depths[stage - 1] for stage, block in placement.chosen)


def compare(inside: Sequence[float], outside: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The difference of medians at equal numbers, with its interval of 95 % by the bootstrap."""
    draw = np.random.default_rng(seed)
    count = min(len(inside), len(outside))
    medians = [np.median(draw.choice(list(part), (DRAWS, count)), axis=1) for part in (inside, outside)]
    low, high = np.quantile(medians[0] - medians[1], (0.025, 0.975))
    return median(inside) - median(outside), float(low), float(high)


def accept(
    scored: Sequence[tuple[Placement, float]], rules: Sequence[Rule]
) -> tuple[Rule, tuple[float, float, float]] | None:
    """Of the rules that help by their interval and keep the best placement, that with the best median inside."""
    if not scored:
        return None
    best = max(scored, key=lambda pair: pair[1])[0]
    found = []
    for rule in rules:
        inside, outside = ([score for p, score in scored if rule.allows(p) is there] for there in (True, False))
        if min(len(inside), len(outside)) >= 3 and rule.allows(best):
            effect = compare(inside, outside)
            if effect[1] > 0:
                found.append((median(inside), rule, effect))
    if not found:
        return None
    _, rule, effect = max(found, key=lambda each: each[0])
    return rule, effect


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of some pairs of mAP and cost no other beats: none has as much mAP at less cost, or more at no more.

    >>> pareto_front([(0.4, 1.0), (0.5, 1.1), (0.45, 1.2)])
    [0, 1]
    """
    return [
        i
        for i, (score, cost) in enumerate(points)
        if not any(s >= score and c <= cost and (s, c) != (score, cost) for s, c in points)
    ]


@dataclass
class Search:
    """A search, as `sweep` was asked for it.

    Args:
        kind: of `KINDS`.
        build, depths, size: of the network and its pictures.
        block, batch: which block goes there, and the pictures at once of the time that it adds.
        data: what `Task.load` takes; the test split is not read.
        trials, epochs, lr, seed: of the search and of its short trainings.
        store: a journal of Optuna, or "".
        device, budget: as of every benchmark.
    """

    kind: str
    build: Callable[..., Any]
    depths: tuple[int, ...]
    size: tuple[int, int]
    block: str
    batch: int
    data: str
    trials: int
    epochs: int
    lr: float
    store: str
    seed: int
    device: str
    budget: str
    accepted: list[tuple[Rule, tuple[float, float, float]]] = field(default_factory=list)

    def sweep(self) -> Sweep:
        """A point a trial."""
        self.study  # noqa: B018  # what is missing or does not fit is said before anything is trained
        count = 2 ** len(self.depths) if self.kind == "stages" else self.trials
        if self.budget == "smoke":
            count = min(count, 2)
        points = [
            Point({**self.facts, "trial": i}, partial(self.trial, i), f"trial {i + 1} of {count}", i // self.together)
            for i in range(count)
        ]
        return Sweep("placements", points, self.tables, self.picture)

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the values of all trials."""
        return {
            "search": self.kind,
            "network": self.build.__name__,
            "block": self.block,
            "data": self.data,
            "epochs": self.epochs,
            "lr": self.lr,
            "seed": self.seed,
            "budget": self.budget,
        }

    @property
    def together(self) -> int:
        """How many trials in a row need nothing of each other: all sets, those between rules, or a generation."""
        return {"stages": 2 ** len(self.depths), "narrow": EACH, "blocks": POPULATION}[self.kind]

    def __getstate__(self) -> dict[str, Any]:
        """What was asked for: a trial elsewhere needs neither the study nor data that were read."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def study(self) -> Any:
        """The study, with all that its file has."""
        try:
            import optuna
        except ImportError:
            raise UserError("a search needs Optuna: pip install 'provenn[search]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = self._journal() if self.store else None
        samplers: dict[str, Callable[[], Any]] = {
            "stages": lambda: optuna.samplers.RandomSampler(seed=self.seed),
            "narrow": lambda: optuna.samplers.RandomSampler(seed=self.seed),
            "blocks": lambda: optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=self.seed),
        }
        name = f"{self.kind} {self.build.__name__} {self.block} {self.data} {self.epochs} {self.lr:g} {self.seed}"
        return optuna.create_study(
            storage=storage,
            sampler=samplers[self.kind](),
            study_name=name,
            directions=["maximize", "minimize"],
            load_if_exists=True,
        )

    def _journal(self) -> Any:
        """The file in which the study is kept.

        Raises:
            UserError: it holds something else, or cannot be written.
        """
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        check_writable(Path(self.store).parent)
        try:
            if Path(self.store).exists() and (first := Path(self.store).read_text().partition("\n")[0]):
                json.loads(first)["op_code"]  # Optuna would write behind one line of anything
            return JournalStorage(JournalFileBackend(self.store))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            told = " ".join(str(error).split())[:120]
            raise UserError(
                f"{self.store} holds no search of Optuna ({told}): name another file with --store, or a new one"
            ) from None

    @property
    def task_data(self) -> Any:
        return _data(self.data, self.seed)

    async def trial(self, number: int, run: Run) -> dict[str, Any]:
        """One placement: its mAP on held-out identities of training, and the time that it adds.

        The two are trials of the run, which may run elsewhere, the clock alone. What to try is asked for here.
        """
        placement, trial = self.ask(number)
        known: dict[str, Any] = {**self.facts, "placement": str(placement)}
        score = await run.trial("mAP of a placement", partial(self.score, placement), **known)
        timed = {**known, "batch": self.batch, "device": self.device}
        cost = await run.trial("time of a placement", partial(self.cost, placement), alone=True, **timed)
        trial.set_user_attr("placement", str(placement))
        trial.set_user_attr("number", number)
        self.study.tell(trial, (score, cost))
        return {
            "status": "ok",
            "placement": str(placement),
            "mAP": score,
            "time": cost,
            "told": f"{placement}: mAP {score:.3f}, {100 * (cost - 1):+.1f} % time",
        }

    def ask(self, number: int) -> tuple[Placement, Any]:
        """The placement of a trial: the next set of stages, one inside the rules, or what evolution proposes."""
        from optuna.distributions import CategoricalDistribution

        names = [f"{s}.{b}" for s, depth in enumerate(self.depths, 1) for b in range(1, depth + 1)]
        if self.kind == "stages":
            chosen = [stage for stage in range(1, len(self.depths) + 1) if number >> (stage - 1) & 1]
            vector: tuple[int, ...] = Placement.of_stages(chosen, self.depths).vector()
        elif self.kind == "narrow":
            vector = self.inside(number)
        else:
            trial = self.study.ask({name: CategoricalDistribution((0, 1, 2)) for name in names})
            return Placement.of_vector([trial.params[name] for name in names], self.depths), trial
        self.study.enqueue_trial(dict(zip(names, vector, strict=True)))
        trial = self.study.ask({name: CategoricalDistribution((0, 1, 2)) for name in names})
        return Placement.of_vector(vector, self.depths), trial

    def inside(self, number: int) -> tuple[int, ...]:
        """A random placement that all rules allow which the trials before have led to."""
        self.accepted = self.rules_after(self.scored(), number)
        draw = random.Random(f"{self.seed} {number}")
        places = [(s, b) for s, depth in enumerate(self.depths, 1) for b in range(1, depth + 1)]
        for _ in range(100_000):
            wanted = draw.sample(places, draw.randint(1, len(places)))
            placement = Placement(self.depths, {place: draw.choice(("pre", "post")) for place in wanted})
            if all(rule.allows(placement) for rule, _ in self.accepted):
                return placement.vector()
        raise UserError(
            "the rules that were accepted leave no placement: " + ", ".join(r.name for r, _ in self.accepted)
        )

    def rules_after(
        self, scored: dict[int, tuple[Placement, float]], number: int
    ) -> list[tuple[Rule, tuple[float, float, float]]]:
        """The rules accepted before a trial: after every sixteenth at most one, from placements inside the others."""
        accepted: list[tuple[Rule, tuple[float, float, float]]] = []
        for end in range(EACH, number + 1, EACH):
            known = [scored[i] for i in range(end) if i in scored]
            known = [pair for pair in known if all(rule.allows(pair[0]) for rule, _ in accepted)]
            names = {rule.name for rule, _ in accepted}
            found = accept(known, [rule for rule in rules_of(self.depths) if rule.name not in names])
            accepted += [found] if found else []
        return accepted

    def scored(self) -> dict[int, tuple[Placement, float]]:
        """By number, what the study has of trials that ended."""
        return {
            trial.user_attrs["number"]: (Placement.parse(trial.user_attrs["placement"], self.depths), trial.values[0])
            for trial in self.study.trials
            if trial.values is not None and "number" in trial.user_attrs
        }

    def score(self, placement: Placement) -> float:
        """mAP on the identities that are held out of training, after a short training; 0 where it diverged."""
        task, data = get_task("re-identification"), self.task_data
        recipe = replace(FULL, epochs=self.epochs, lr=self.lr)
        recipe = replace(recipe, epochs=1, max_steps=2) if self.budget == "smoke" else recipe
        options = {"placement": str(placement), "block": self.block, "size": tuple(data.meta["size"])}
        build = partial(self.build, **options, **data.options)
        try:
            done = fit(
                build,
                task,
                replace(data, test=data.val),
                recipe,
                seed=self.seed,
                hardware=Hardware(self.device),
                title=str(placement),
            )
        except Diverged:
            return 0.0
        return float(done.metrics[task.metric])

    def cost(self, placement: Placement) -> float:
        """The time of a forward pass over that of the plain network, in turns."""
        if not len(placement):
            return 1.0
        size = tuple(self.task_data.meta["size"])
        x = torch.randn(self.batch, 3, *size, device=self.device)
        models = [
            self.build(placement=where, block=self.block, size=size).eval().to(self.device)
            for where in ("none", str(placement))
        ]
        calls = {i: partial(_forward, model, x) for i, model in enumerate(models)}
        seconds = interleaved(calls, rounds=ROUNDS[self.budget], device=self.device)
        return median(a / b for a, b in zip(seconds[1], seconds[0], strict=True))

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """The front, the marginal effect of every place with its interval, and the rules that were accepted."""
        front = pareto_front([(row["mAP"], row["time"]) for row in rows])
        best = [rows[i] for i in sorted(front, key=lambda i: rows[i]["time"])]
        made = [
            Table(
                caption="Not beaten: no other placement has as much mAP on validation at less time",
                columns=["placement", "mAP", "time added, %"],
                rows=[[row["placement"], round(row["mAP"], 4), round(100 * (row["time"] - 1), 1)] for row in best],
            )
        ]
        scored = {i: (Placement.parse(row["placement"], self.depths), row["mAP"]) for i, row in enumerate(rows)}
        effects: list[list[Any]] = []
        for place in [(s, b) for s, depth in enumerate(self.depths, 1) for b in range(1, depth + 1)]:
            with_it, without = (
                [m for p, m in scored.values() if (place in p.chosen) is there] for there in (True, False)
            )
            if min(len(with_it), len(without)) >= 2:
                effects.append([f"{place[0]}.{place[1]}", *(round(value, 4) for value in compare(with_it, without))])
        columns = ["place", "difference of medians", "from", "to"]
        made.append(Table(caption="Marginal effect of each place on mAP", columns=columns, rows=effects))
        if self.kind == "narrow":
            accepted = self.rules_after(scored, len(rows))
            cells: list[list[Any]] = [[rule.name, *(round(value, 4) for value in effect)] for rule, effect in accepted]
            made.append(Table(caption="Rules that were accepted", columns=["rule", *columns[1:]], rows=cells))
        return made

    def picture(self, rows: Sequence[Row]) -> "Figure":
        """mAP over time, and the front."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        points = [(row["mAP"], row["time"]) for row in rows]
        axes.scatter([100 * (cost - 1) for _, cost in points], [score for score, _ in points], color="#7a8899")
        front = sorted(pareto_front(points), key=lambda i: points[i][1])
        axes.plot([100 * (points[i][1] - 1) for i in front], [points[i][0] for i in front], "o-", color="#1a5fb4")
        for i in front:
            axes.annotate(rows[i]["placement"], (100 * (points[i][1] - 1), points[i][0]), fontsize=7)
        axes.set(xlabel="time added, %", ylabel="mAP on validation")
        return figure


@lru_cache(maxsize=1)  # of a process, which runs many trials
def _data(name: str, seed: int) -> Any:
    source = datasets.resolve(name)
    return get_task("re-identification").load(source.data, seed=seed, **source.options)


@torch.no_grad()
def _forward(model: torch.nn.Module, x: torch.Tensor) -> object:
    return model(x)
