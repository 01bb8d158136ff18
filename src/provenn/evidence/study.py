"""Networks that differ in one part, trained alike on the same data and seeds, and read off against each other."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import torch
from torch import nn
from torch.utils.data import TensorDataset

from provenn.core.digest import digest
from provenn.core.errors import UserError
from provenn.core.settings import defaults_of
from provenn.evidence.interval import Number
from provenn.evidence.measurement import Measurement, Picture, Series, Skill, Table
from provenn.evidence.record import PICTURES
from provenn.evidence.run import Run
from provenn.tasks import Task, TaskData, get_task
from provenn.tasks.base import count_examples
from provenn.training import Diverged, Fit, Hardware, Recipe, fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUNING_SEED = 900_001  # of data and weights when a learning rate is chosen; never measured
FEWEST_RATES = 3
MOST_GROWTHS = 3  # of a grid of rates, on each side
COLLAPSED = 0.1  # of the median gain on the dummy baseline: a training with less is named, and counts as it is
SMOKE_EXAMPLES = 64  # of a smoke run's validation and test
Probe = Callable[[nn.Module, TaskData], Any]


@dataclass(frozen=True)
class Drawing:
    """A picture that one variant's training of the first seed leaves behind: `draw(fit, data, seed)`."""

    variant: str
    file: str
    caption: str
    draw: Callable[[Fit, TaskData, int], "Figure | None"]


@dataclass(frozen=True)
class Study:
    """One training for each variant and seed, kept in the run; `against` reads an experiment off two variants.

    Every variant gets the same data, steps, seeds and tuning: its learning rate is the one of a grid that does best on
    the validation split of a seed that is never measured. The grid is `lrs`; where its best is at an end, it grows
    there. Metrics are the test split's. A training that diverges counts as the dummy baseline.

    Args:
        name: of the trials and of the plot.
        task: as `get_task` names it, or one of the paper's own; its metric is the effect.
        data: `data(seed, smoke)`, the data of a seed; the flag asks for the shortest.
        variants: by name, a label and the part in which the networks differ.
        build: `build(part, **data.options)` makes the network.
        recipe: how all of them are trained.
        lrs: the learning rates that each variant may choose from at first, at least three; none takes the recipe's
            for all, and is only for variants that have nothing to tune.
        smoke: the recipe that only shows that the path works; by default two steps.
        probes: further figures of a trained network by name, `probe(model, data)`, to be read off the test split; those
            that `against` compares are numbers.
        trained: takes the arguments of `fit` and returns a `Fit`, where a training has more than one stage.
        about: the data, in words.
        kind: what the variants are, over their column.
        columns: of the table besides label and mean metric, from a variant's part.
        setting: what else a reader needs to repeat it; recipe, rates, sizes, fingerprint and code are noted anyway.
        note: goes with every measurement.
        drawing: a picture of one variant.
    """

    name: str
    task: str | Task
    data: Callable[[int, bool], TaskData]
    variants: Mapping[str, tuple[str, Any]]
    build: Callable[..., nn.Module]
    recipe: Recipe
    lrs: Sequence[float] = ()
    smoke: Recipe | None = None
    probes: Mapping[str, Probe] = field(default_factory=dict)
    trained: Callable[..., Fit] = fit
    about: str = ""
    kind: str = "network"
    columns: Mapping[str, Callable[[Any], Number]] = field(default_factory=dict)
    setting: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    drawing: Drawing | None = None

    def __post_init__(self) -> None:
        if self.lrs and len(set(self.lrs)) < FEWEST_RATES:
            raise ValueError(f"{self.name}: a rate is chosen from at least {FEWEST_RATES}, got {list(self.lrs)}")
        labels = [label for label, _ in self.variants.values()]
        if len(set(labels)) < len(labels):
            raise ValueError(f"{self.name}: two variants share a label: {labels}")

    def against(
        self,
        system: str | Sequence[str],
        baseline: str | Sequence[str],
        *,
        metric: str | None = None,
        ratio: bool = False,
        shown: Iterable[str] = (),
        picture: bool = False,
        may_guess: str = "",
    ) -> "Contrast":
        """An experiment on one variant against another, seed by seed.

        Of several systems the worst of each seed counts, of several baselines the best. The best of each seed is a
        little harder to beat than the best alone, by the scatter of the seeds.

        Args:
            system, baseline: names of variants.
            metric: the task's, or a probe's name.
            ratio: of the two instead of their difference.
            shown: further variants of the table.
            picture: whether the study's drawing goes with it.
            may_guess: the paper's reason why the baselines cannot learn this task at all.

        Raises:
            ValueError: a variant or a metric that does not exist, when `experiments.py` is read and not after hours of
            training.
        """
        systems, baselines = ((of,) if isinstance(of, str) else tuple(of) for of in (system, baseline))
        self._check(metric, *systems, *baselines, *shown)
        return Contrast(self, systems, baselines, metric, ratio, tuple(shown), picture, may_guess)

    def figure(
        self, variant: str, *, metric: str | None = None, shown: Iterable[str] = (), picture: bool = False
    ) -> "Reading":
        """An experiment on one variant's own figure, the mean over seeds."""
        self._check(metric, variant, *shown)
        return Reading(self, variant, metric, tuple(shown), picture)

    def parameters(self) -> dict[str, Any]:
        """What `--set` may change, and its type: the recipe, and what `data` and `build` take by a default."""
        rates = {"lrs": tuple[float, ...]} if self.lrs else {}
        return {**get_type_hints(Recipe), **rates, **defaults_of(self.build), **defaults_of(self.data)}

    def with_overrides(self, **overrides: Any) -> "Study":
        """The same comparison at another setting; `lr` sets one rate for all variants, and nothing is tuned then."""
        of_data = {name: overrides.pop(name) for name in defaults_of(self.data) if name in overrides}
        of_build = {name: overrides.pop(name) for name in defaults_of(self.build) if name in overrides}
        lrs = () if "lr" in overrides else overrides.pop("lrs", self.lrs)
        smoke = self.smoke or replace(self.recipe, epochs=1, max_steps=2)
        return replace(
            self,
            data=partial(self.data, **of_data) if of_data else self.data,
            build=partial(_build_with, self.build, of_build) if of_build else self.build,
            lrs=lrs,
            recipe=replace(self.recipe, **overrides),
            smoke=replace(smoke, **overrides),
        )

    def __digest__(self) -> tuple[Any, ...]:
        return self.deciding(tuple(self.variants))

    def deciding(self, variants: Iterable[str]) -> tuple[Any, ...]:
        """All that decides the values of these variants, for a digest; the others, labels and tables do not."""
        parts = [self.variants[variant][1] for variant in variants]
        networks = (parts, self.build, self.trained, self.recipe, tuple(self.lrs))
        return (*networks, self.of_task, self.data, self.probes, Study.trials, Study.dummy_baseline, Study.rate, *STEPS)

    def _check(self, metric: str | None, *variants: str) -> None:
        metrics = [self.of_task.metric, *self.probes]
        asked = [("variant", variant, list(self.variants)) for variant in variants] + [
            ("metric", metric or metrics[0], metrics)
        ]
        for what, name, known in asked:
            if name not in known:
                raise ValueError(f"{self.name} has no {what} {name!r}; it has: {', '.join(known)}")

    @property
    def of_task(self) -> Task:
        """The task itself, where it was named."""
        return get_task(self.task) if isinstance(self.task, str) else self.task

    def label(self, variant: str) -> str:
        """What readers call a variant."""
        return self.variants[variant][0]

    def recipe_for(self, run: Run) -> Recipe:
        """The recipe, or the shortest run of it that touches all the code."""
        return (self.smoke or replace(self.recipe, epochs=1, max_steps=2)) if run.smoke else self.recipe

    def data_for(self, run: Run, seed: int) -> TaskData:
        """The data of a seed; of a smoke run's tests a few examples, which say as much of the path."""
        data = self.data(seed, run.smoke)
        return replace(data, val=_few(data.val), test=_few(data.test)) if run.smoke else data

    def facts(self, run: Run) -> dict[str, Any]:
        """How, on what, and with what steps every variant is trained: the record's setting."""
        key = ("facts", id(self), run.seeds[0])
        if key not in run.memory:
            data, recipe = self.data(run.seeds[0], run.smoke), _spoken(self.recipe_for(run))
            sizes = {split: len(getattr(data, split)) for split in ("train", "val", "test")}
            rates = {"lrs": list(self.lrs)} if self.lrs else {}
            run.memory[key] = {"recipe": recipe, **rates, **sizes, "fingerprint": data.fingerprint, **self.setting}
        return dict(run.memory[key])

    def trial_setting(self, run: Run, variant: str | None = None) -> dict[str, Any]:
        """All that decides a trial's value besides rate and seed, the digest of the code included: the trial's key."""
        key = ("code", id(self), variant)
        if key not in run.memory:  # once a run: what code keeps in its globals may change
            task, drawing = type(self.of_task), self.drawing
            code: list[Any] = [self.data]
            if variant is None:
                code += [task.dummy_baseline, task.seen]
            else:
                code += [self.build, self.variants[variant][1], self.probes, self.trained, task.loss, task.evaluate]
                code += [drawing.draw] if drawing is not None and drawing.variant == variant else []
            run.memory[key] = digest(*code)
        facts = self.facts(run)
        facts.pop("lrs", None)  # a trial has a rate of its own
        return {**facts, "code": run.memory[key]}

    async def rate(self, run: Run, variant: str) -> tuple[float, dict[str, float | None]]:
        """The variant's learning rate, and what each rate tried reached on validation data; None where it diverged.

        Where the best is at an end of the grid, the grid grows there by the ratio of its last two rates, until the best
        is inside or the side has grown three times.
        """
        recipe = self.recipe_for(run)
        if not self.lrs or run.smoke:
            return float(self.lrs[0] if self.lrs else recipe.lr), {}
        if (known := run.rates.get(self.label(variant))) is not None:
            alike = (lr for lr in self.lrs if math.isclose(lr, known, rel_tol=1e-4))  # a record rounds it
            return float(next(alike, _rounded(known))), {}
        reached: dict[float, float | None] = {}
        further = list(map(float, self.lrs))
        while further:
            asked = (self.validation(run, variant, lr) for lr in further)
            reached |= zip(further, await run.together(asked), strict=True)
            further = self.further_rates(reached)
        return self.best_rate(reached), {f"{lr:g}": value for lr, value in reached.items()}

    async def validation(self, run: Run, variant: str, lr: float) -> float | None:
        """What a variant trained at a learning rate reaches on the tuning seed's validation data; None: it diverged."""
        task = self.of_task

        def score() -> float | None:
            data = self.data(TUNING_SEED, False)
            try:
                model = self._fit(run, variant, data, lr, TUNING_SEED).model
            except Diverged:
                return None
            with torch.no_grad():
                value = task.evaluate(model, data.val)[task.metric]
            return value if math.isfinite(value) else None

        name = f"{self.name}, {self.label(variant)}, rate {lr:g}"
        return await run.trial(name, score, lr=lr, seed=TUNING_SEED, **self.trial_setting(run, variant))

    def best_rate(self, reached: Mapping[float, float | None]) -> float:
        """The rate that reached most; the first of those alike."""
        sign = 1 if self.of_task.higher_is_better else -1
        return max(reached, key=lambda lr: -math.inf if (value := reached[lr]) is None else sign * value)

    def further_rates(self, reached: Mapping[float, float | None]) -> list[float]:
        """The rate to try next, where the best of those tried is at an end of a side that may still grow; else none."""
        lrs, tried, best = sorted(self.lrs), sorted(reached), self.best_rate(reached)
        if not at_an_end(best, reached):
            return []
        if best == tried[0]:
            grown, ratio = sum(lr < lrs[0] for lr in tried), lrs[0] / lrs[1]
        else:
            grown, ratio = sum(lr > lrs[-1] for lr in tried), lrs[-1] / lrs[-2]
        return [_rounded(best * ratio)] if grown < MOST_GROWTHS else []

    async def trials(self, run: Run, variant: str) -> list[dict[str, Any]]:
        """Of each seed the test metric, the probes' figures, the validation curve, and whether it diverged."""
        lr, _ = await self.rate(run, variant)
        task = self.of_task

        def one(seed: int) -> dict[str, Any]:
            data = self.data_for(run, seed)
            try:
                done = self._fit(run, variant, data, lr, seed)
            except Diverged:
                return {"diverged": True}
            if self.drawing is not None and (variant, seed) == (self.drawing.variant, run.seeds[0]):
                figure = self.drawing.draw(done, data, seed)
                if figure is not None:
                    run.picture(self.drawing.file, figure, self.drawing.caption)
            with torch.no_grad():
                probed = {name: probe(done.model, data) for name, probe in self.probes.items()}
            curve = {key: done.series(key) for key in ("epoch", task.metric)}
            return {**done.metrics, **probed, "curve": curve, "steps": done.steps}

        name, setting = f"{self.name}, {self.label(variant)}", self.trial_setting(run, variant)
        trained = run.trials(name, one, lr=lr, **setting)
        trials, guesses = await run.together((trained, self.dummy_baseline(run)))
        # What diverged counts as the dummy baseline.
        return [
            {task.metric: guess, "curve": None, **trial} if trial.get("diverged") else trial
            for trial, guess in zip(trials, guesses, strict=True)
        ]

    async def dummy_baseline(self, run: Run) -> list[float]:
        """What the dummy baseline reaches on the test data of each seed."""
        task = self.of_task

        def one(seed: int) -> float:
            data = self.data_for(run, seed)
            return float(task.dummy_baseline(task.seen(data, self._examples(run, data), seed)))

        return await run.trials(f"{self.name}, dummy baseline", one, **self.trial_setting(run))

    def _examples(self, run: Run, data: TaskData) -> int:
        """How many examples a training sees, as often as it sees them."""
        recipe = self.recipe_for(run)
        batch = recipe.batch_size * recipe.accumulate
        steps = recipe.max_steps or recipe.epochs * max(1, count_examples(data.train) // batch)
        return steps * batch

    def _fit(self, run: Run, variant: str, data: TaskData, lr: float, seed: int) -> Fit:
        label, part = self.variants[variant]
        return self.trained(
            lambda: self.build(part, **data.options),
            self.of_task,
            data,
            replace(self.recipe_for(run), lr=lr),
            seed=seed,
            hardware=Hardware(run.device),
            title=label,
        )

    async def measure(
        self,
        run: Run,
        variants: Sequence[str],
        *,
        shown: Iterable[str] = (),
        metric: str | None = None,
        may_guess: Mapping[str, str] | None = None,
        picture: bool = False,
    ) -> tuple[dict[str, list[float]], dict[str, Any]]:
        """Each variant's figure seed by seed, and what goes with every measurement of them.

        Args:
            run: its seeds, device and ledger.
            variants: those that the experiment is about; each must have learned something.
            shown: further variants, for the table and the picture.
            metric: by default the task's.
            may_guess: of a variant that may do no better than the dummy baseline, why.
            picture: whether the study's drawing goes with it.

        Raises:
            ValueError: a training of one of `variants` diverged.
        """
        task, facts = self.of_task, self.facts(run)
        every = list(dict.fromkeys((*variants, *shown)))
        trials = dict(zip(every, await run.together(self.trials(run, variant) for variant in every), strict=True))
        name = metric or task.metric
        missing = [self.label(variant) for variant in variants if any(name not in trial for trial in trials[variant])]
        if missing:
            raise ValueError(f"a training of {', '.join(missing)} diverged, so that there is no {name!r} of it")
        reached = {variant: [trial[name] for trial in trials[variant] if name in trial] for variant in every}
        rates = {self.label(variant): await self.rate(run, variant) for variant in every}
        unsettled = [
            label
            for label, (lr, tried) in rates.items()
            if at_an_end(lr, {float(rate): value for rate, value in tried.items()})
        ]
        guesses = await self.dummy_baseline(run)
        skills = [
            Skill(
                variant=self.label(variant),
                values=[trial[task.metric] for trial in trials[variant]],
                dummy_baseline=guesses,
                higher_is_better=task.higher_is_better,
                may_guess=(may_guess or {}).get(variant, ""),
                unsettled=self.label(variant) in unsettled,
            )
            for variant in dict.fromkeys(variants)
        ]
        setting = {**facts, "lr": {label: lr for label, (lr, _) in rates.items()}}
        fingerprint = setting.pop("fingerprint")
        if tried := {label: tuned for label, (_, tuned) in rates.items() if tuned}:
            setting["tuned"] = {"seed": TUNING_SEED, f"validation {task.metric}": tried}
        return reached, {
            "seeds": run.seeds,
            "unit": name.replace("_", " "),
            "data": self.about,
            "fingerprint": fingerprint,
            "setting": setting,
            "skills": skills,
            "note": " ".join(part for part in (self.note, *self._remarks(run, trials, unsettled, guesses)) if part),
            "tables": [self._table(name, reached)] if len(every) > len({*variants}) or self.columns else [],
            "series": [
                line
                for variant in dict.fromkeys(variants)
                if (line := self._curve(variant, trials[variant])) is not None
            ],
            "pictures": self._pictures(run) if picture else [],
        }

    def _remarks(
        self, run: Run, trials: Mapping[str, list[dict[str, Any]]], unsettled: Sequence[str], guesses: Sequence[float]
    ) -> Iterable[str]:
        sign = 1 if self.of_task.higher_is_better else -1
        for variant, done in trials.items():
            if count := sum(bool(trial.get("diverged")) for trial in done):
                yield f"{count} of {len(done)} trainings of {self.label(variant)} diverged: as the dummy baseline."
            gains = [sign * (trial[self.of_task.metric] - guess) for trial, guess in zip(done, guesses, strict=True)]
            collapsed = [
                str(seed)
                for seed, trial, gain in zip(run.seeds, done, gains, strict=True)
                if not trial.get("diverged") and gain < COLLAPSED * median(gains) and median(gains) > 0
            ]
            if collapsed:
                yield (
                    f"{len(collapsed)} of {len(done)} trainings of {self.label(variant)} collapsed, with less than "
                    f"{COLLAPSED:g} of the median gain on the dummy baseline, and count as they are: "
                    f"seed {', '.join(collapsed)}."
                )
        if unsettled:
            yield f"The best rate is still at an end of the grown grid: {', '.join(unsettled)}."

    def _table(self, metric: str, reached: Mapping[str, list[float]]) -> Table:
        rows: list[list[str | float | int | None]] = [
            [
                self.label(variant),
                *(column(self.variants[variant][1]) for column in self.columns.values()),
                sum(values) / len(values),
            ]
            for variant, values in reached.items()
            if values
        ]
        columns = [self.kind, *self.columns, metric.replace("_", " ")]
        return Table(caption=self.name[:1].upper() + self.name[1:], columns=columns, rows=rows)

    def _curve(self, variant: str, trials: list[dict[str, Any]]) -> Series | None:
        """The task's metric on validation data over epochs: the mean over seeds in the range that they span."""
        metric = self.of_task.metric
        curves = [trial["curve"] for trial in trials if trial.get("curve") and trial["curve"][metric]]
        if not curves or any(curve["epoch"] != curves[0]["epoch"] for curve in curves) or len(curves[0]["epoch"]) < 2:
            return None
        labels = {"plot": self.name, "x_label": "epoch", "y_label": f"validation {metric}"}
        return Series.over_seeds(self.label(variant), curves[0]["epoch"], [curve[metric] for curve in curves], **labels)

    def _pictures(self, run: Run) -> list[Picture]:
        """What a trial has drawn, in this run or in the one that it resumes."""
        if self.drawing is None or not (run.folder / PICTURES / f"{self.drawing.file}.png").exists():
            return []
        return [Picture(file=f"{PICTURES}/{self.drawing.file}.png", caption=self.drawing.caption)]


def at_an_end(best: float, reached: Mapping[float, float | None]) -> bool:
    """Whether the best of the rates tried is the least or the largest; not so where all reached the same.

    >>> at_an_end(0.1, {0.01: 0.5, 0.03: 0.6, 0.1: 0.7}), at_an_end(0.1, {0.01: 0.5, 0.03: 0.5, 0.1: 0.5})
    (True, False)
    """
    return len({*reached.values()}) > 1 and best in (min(reached), max(reached))


def _side(which: str, labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{which} of {', '.join(labels)}"


def _rounded(lr: float) -> float:
    """A rate as it is written and read."""
    return float(f"{lr:.3g}")


def _build_with(build: Callable[..., nn.Module], given: Mapping[str, Any], part: Any, **options: Any) -> nn.Module:
    """The network with options of the user's beside those of the data, which they may not contradict."""
    for name in given.keys() & options.keys():
        if given[name] != options[name]:
            raise UserError(f"{name} follows from the data, where it is {options[name]}, got {given[name]}")
    return build(part, **{**options, **given})


def _spoken(recipe: Recipe) -> dict[str, Any]:
    """A recipe's fields that are not the defaults, and those that every reader asks for; the rate stands apart."""
    plain = asdict(Recipe())
    always = {"epochs", "batch_size", "optimizer"}
    return {
        name: value
        for name, value in asdict(recipe).items()
        if (name in always or value != plain[name]) and name != "lr"
    }


# What `trials`, `dummy_baseline` and `rate` call of a study: a digest follows no attribute.
STEPS = (
    *(Study.recipe_for, Study.data_for, Study.validation, Study.best_rate, Study.further_rates),
    *(Study._examples, Study._fit),
)


@dataclass(frozen=True)
class Contrast:
    """An experiment read off a study: one variant, or the worst of several, against the best of others."""

    study: Study
    systems: tuple[str, ...]
    baselines: tuple[str, ...]
    metric: str | None = None
    ratio: bool = False
    shown: tuple[str, ...] = ()
    picture: bool = False
    may_guess: str = ""

    @property
    def sides(self) -> tuple[str, str]:
        """What readers call the system and the baseline."""
        of = (("worst", self.systems), ("best", self.baselines))
        system, baseline = ((which, [self.study.label(variant) for variant in variants]) for which, variants in of)
        return _side(*system), _side(*baseline)

    def parameters(self) -> dict[str, Any]:
        """As `Study.settable`."""
        return self.study.parameters()

    def with_overrides(self, **overrides: Any) -> "Contrast":
        """As `Study.varied`."""
        return replace(self, study=self.study.with_overrides(**overrides))

    def __digest__(self) -> tuple[Any, ...]:
        chosen = (Contrast.worst, *[Contrast.best] * (len(self.baselines) > 1))
        return *self.study.deciding((*self.systems, *self.baselines)), self.metric, self.ratio, *chosen

    def worst(self, reached: Mapping[str, list[float]]) -> list[float]:
        """Of each seed the worst of the systems."""
        worst = min if self.study.of_task.higher_is_better else max
        return [worst(values) for values in zip(*(reached[variant] for variant in self.systems), strict=True)]

    def best(self, reached: Mapping[str, list[float]]) -> list[float]:
        """Of each seed the best of the baselines."""
        best = max if self.study.of_task.higher_is_better else min
        return [best(values) for values in zip(*(reached[variant] for variant in self.baselines), strict=True)]

    async def __call__(self, run: Run) -> Measurement:
        sides = (*self.systems, *self.baselines)
        reached, facts = await self.study.measure(
            run,
            sides,
            shown=self.shown,
            metric=self.metric,
            may_guess=dict.fromkeys(self.baselines, self.may_guess),
            picture=self.picture,
        )
        if len(sides) > 2 and not facts["tables"]:
            facts["tables"] = [self.study._table(self.metric or self.study.of_task.metric, reached)]
        kind: Literal["ratio", "difference"] = "ratio" if self.ratio else "difference"
        return Measurement.of(kind, self.worst(reached), self.best(reached), sides=self.sides, **facts)


@dataclass(frozen=True)
class Reading:
    """An experiment read off a study: the mean of one variant."""

    study: Study
    variant: str
    metric: str | None = None
    shown: tuple[str, ...] = ()
    picture: bool = False

    sides = None

    def __digest__(self) -> tuple[Any, ...]:
        return *self.study.deciding((self.variant,)), self.metric

    def parameters(self) -> dict[str, Any]:
        """As `Study.settable`."""
        return self.study.parameters()

    def with_overrides(self, **overrides: Any) -> "Reading":
        """As `Study.varied`."""
        return replace(self, study=self.study.with_overrides(**overrides))

    async def __call__(self, run: Run) -> Measurement:
        reached, facts = await self.study.measure(
            run, (self.variant,), shown=self.shown, metric=self.metric, picture=self.picture
        )
        return Measurement.mean(reached[self.variant], **facts)


def _few(examples: Any) -> Any:
    return TensorDataset(*examples[:SMOKE_EXAMPLES]) if type(examples) is TensorDataset else examples
