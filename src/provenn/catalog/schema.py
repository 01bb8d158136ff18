"""The facts of a paper, as its `paper.toml` gives them, and what is wrong with them where they are not."""

import importlib
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import Field, field_validator, model_validator

from provenn.catalog.citation import bibtex
from provenn.catalog.claims import Claim, Experiment, Roles
from provenn.catalog.figures import Facts, Figure
from provenn.core.errors import UserError
from provenn.core.names import in_a_line, listed, meant

OURS = "provenn.papers"  # the package of this package's own papers
WEIGHTS = "weights"  # the folder of trained weights that come with a paper, a file a preset


class Mechanism(Facts):
    """A layer and the slot that it fits.

    Each of `variants` is a set of arguments beside the default one; the common checks run over all of them.
    """

    name: str = Field(pattern=r"^[^\s:,]+$")  # commands write `package:name`, and lists between commas
    slot: str
    layer: str
    arguments: dict[str, Any] = {}
    variants: list[dict[str, Any]] = []
    expected_failures: dict[str, str] = {}
    summary: str = ""


class Pruning(Facts):
    """A way to prune any model, as `provenn prune --method` takes it.

    `masks` is a function of a model and a ratio, a number or one for each group of layers, and of keyword arguments. It
    returns `provenn.nn.masks.Masks`, and leaves the model as it is.
    """

    name: str = Field(pattern=r"^[^\s:,]+$")
    masks: str
    summary: str = ""


class Example(Facts):
    """An input for the common checks: normal noise, or integers from `least` to `below` (exclusive).

    With a `name` it is the keyword argument of that name; without, the next positional one.
    """

    shape: list[int]
    below: int | None = None
    least: int = 0
    name: str | None = None


class Preset(Facts):
    """A system of the paper, with what was published of it.

    `task` is the paper's where it is left out; "" says that there is nothing to train or to predict: a procedure.
    `reads` is how the user's own files are read for it, where `--set` does not say. `stages` names a function of model,
    task, data and recipe that gives the stages of its training, where there are several. `at_use` names options that
    shape no parameter: trained weights may be used with other values than those of their training.
    """

    name: str
    build: str
    task: str | None = None
    options: dict[str, Any] = {}
    input: list[Example] = []
    published: list[Figure] = []
    recipe: dict[str, Any] = {}
    expected_failures: dict[str, str] = {}
    data: str | None = None
    reads: dict[str, Any] = {}
    stages: str | None = None
    at_use: list[str] = []
    summary: str = ""

    @field_validator("input", mode="before")
    @classmethod
    def one_input(cls, given: Any) -> Any:
        """A list of numbers is the shape of the only input."""
        plain = isinstance(given, list) and all(isinstance(size, int) for size in given)
        return [{"shape": given}] if plain and given else given


def _key(facts: Any, name: str) -> Any:
    return facts.get(name) if isinstance(facts, dict) else None


def _spelled_out(where: str, facts: Any, recipes: dict[str, dict[str, Any]]) -> Any:
    """The same facts, their recipe with all that its base says."""
    recipe = _key(facts, "recipe") or {}
    overrides = {"base": recipe} if isinstance(recipe, str) else recipe
    if not isinstance(overrides, dict) or "base" not in overrides:
        return facts
    name = overrides["base"]
    if name not in recipes:
        raise ValueError(f"{where}: no recipe {name!r}; there are: {listed(recipes)}")
    return {**facts, "recipe": {**recipes[name], **{key: value for key, value in overrides.items() if key != "base"}}}


class Card(Facts):
    """All the facts of one paper."""

    slug: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    package: str
    folder: Path
    title: str
    arxiv: str | None = None
    date: date
    authors: int | list[str]
    code: str | None = None
    task: str | None = None
    tags: list[str] = []
    summary: str
    mechanisms: list[Mechanism] = []
    pruning: list[Pruning] = []
    recipes: dict[str, dict[str, Any]] = {}
    scales: dict[str, str] = {}
    roles: Roles | None = None
    presets: list[Preset] = []
    claims: list[Claim] = []
    experiments: list[Experiment] = []

    @model_validator(mode="before")
    @classmethod
    def spell_out(cls, facts: Any) -> Any:
        """A preset's recipe may name one of `recipes`, or be one with changes: `{ base = "imagenet", lr = 0.1 }`.

        So may that of an `at_paper`. An experiment's scale is a name of `scales`.
        """
        if "statements" in facts:
            raise ValueError(
                "written for provenn 0.1: rename [[claims]] to [[experiments]], then [[statements]] to [[claims]] and "
                "its key `claims` to `decides`, and move to `also` what is not closest to the claim"
            )
        recipes, scales = facts.get("recipes", {}), facts.get("scales", {})
        presets = [_spelled_out(f"preset {_key(each, 'name')!r}", each, recipes) for each in facts.get("presets", [])]
        experiments = []
        for experiment in facts.get("experiments", []):
            how = experiment.get("at_paper") if isinstance(experiment, dict) else None
            if isinstance(how, dict):
                experiment = {
                    **experiment,
                    "at_paper": _spelled_out(f"experiment {_key(experiment, 'id')!r}", how, recipes),
                }
            scale = _key(experiment, "scale")
            if scale and scale not in scales and scale not in scales.values():
                raise ValueError(
                    f"experiment {_key(experiment, 'id')!r}: no scale {scale!r}; there are: {listed(scales)}"
                )
            experiments.append({**experiment, "scale": scales[scale]} if scale in scales else experiment)
        return {**facts, "presets": presets, "experiments": experiments}

    @model_validator(mode="after")
    def claims_fit_experiments(self) -> "Card":
        """Claims name experiments of this paper, `at_paper` its presets, and one claim is the headline."""
        known = {experiment.id for experiment in self.experiments}
        for claim in self.claims:
            unknown = [name for name in claim.experiments if name not in known]
            if unknown:
                raise ValueError(f"the claim {claim.says!r} names no experiment of this paper: {listed(unknown)}")
        presets = {preset.name for preset in self.presets}
        for experiment in self.experiments:
            how = experiment.at_paper
            if how is not None and how.preset not in presets:
                raise ValueError(f"{experiment.id}: at_paper names no preset of this paper: {how.preset}")
            if how is not None and how.start is not None and how.start not in presets:
                raise ValueError(f"{experiment.id}: at_paper names no preset of this paper: {how.start}")
            if how is not None and how.departs and experiment.expects is None:
                raise ValueError(
                    f"{experiment.id}: at_paper departs from the paper: say with expects what shows the experiment"
                )
        headlines = sum(claim.headline for claim in self.claims)
        if self.claims and headlines != 1:
            raise ValueError(f"exactly one claim must be the headline, got {headlines}")
        return self

    @field_validator("mechanisms", "presets", "pruning", "experiments")
    @classmethod
    def distinct(cls, entries: list) -> list:
        """No two mechanisms, presets, prunings or experiments share a name."""
        names = [entry.id if isinstance(entry, Experiment) else entry.name for entry in entries]
        if len(set(names)) < len(names):
            raise ValueError(f"named twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
        return entries

    @property
    def built_in(self) -> bool:
        """Whether it is one of this package's own papers, whose names no other package takes."""
        return self.package == f"{OURS}.{self.slug}"

    @property
    def tasks(self) -> list[str]:
        """What kinds of work its systems do."""
        named = [self.task, *(preset.task for preset in self.presets)]
        return list(dict.fromkeys(task for task in named if task))

    def bibtex(self) -> str:
        """The paper's BibTeX entry, under its slug."""
        names = self.authors if isinstance(self.authors, list) else []
        return bibtex(self.slug, self.title, names, self.date, self.arxiv)

    def experiment(self, name: str) -> Experiment:
        """The experiment of that id; an unknown one is a `UserError` with the nearest."""
        return _named(self.experiments, name, "experiment", self.slug, "id")

    def preset(self, name: str | None = None, task: str | None = None) -> Preset:
        """The preset of that name; without one, the first (of that task, where one is given)."""
        if name is not None:
            return _named(self.presets, name, "preset", self.slug)
        fitting = [p for p in self.presets if task in (None, self.work_of(p))]
        fitting.sort(key=lambda p: self.work_of(p) is None)  # procedures come last
        if not fitting:
            about = f" for the task {task!r}" if task else ""
            raise UserError(f"{self.slug} has no preset{about}; it has: {listed(p.name for p in self.presets)}")
        return fitting[0]

    def mechanism(self, name: str) -> Mechanism:
        """The mechanism of that name; an unknown one is a `UserError` with the nearest."""
        return _named(self.mechanisms, name, "mechanism", self.slug)

    def work_of(self, preset: Preset) -> str | None:
        """The task of a preset; None of a procedure."""
        return (self.task if preset.task is None else preset.task) or None

    def task_of(self, preset: Preset) -> str:
        """The task of a preset.

        Raises:
            UserError: it is a procedure; with the paper's presets that have a task.
        """
        task = self.work_of(preset)
        if task is None:
            able = [other.name for other in self.presets if self.work_of(other)]
            procedure = preset.task == ""
            kind = (
                "a procedure, with nothing to train or to predict"
                if procedure
                else "for no task but a model for Python"
            )
            raise UserError(
                f"{preset.name} of {self.slug} is {kind}: provenn.paper({self.slug!r}).build({preset.name!r})"
                + (f"; for work on data take --preset {' or '.join(able)}" if able else "")
            )
        return task

    @property
    def shipped(self) -> dict[str, Path]:
        """The weight files that come with the paper, by preset, in the order of the presets."""
        files = {preset.name: self.folder / WEIGHTS / f"{preset.name}.safetensors" for preset in self.presets}
        return {name: file for name, file in files.items() if file.is_file()}

    def shipped_weights(self, preset: str | None = None) -> Path:
        """The weight file that comes with a preset; without one, the first that comes with any.

        Raises:
            UserError: no such preset, or no weights come with it.
        """
        name = next(iter(self.shipped), None) if preset is None else self.preset(preset).name
        if name not in self.shipped:
            there = f"; there are some of {listed(self.shipped)}" if self.shipped else ""
            about = f"of {preset} " if preset else ""
            raise UserError(
                f"no weights {about}come with {self.slug}{there}: give a weight file or the folder of a run with "
                f"--weights, as `provenn train {self.slug}{f' --preset {preset}' if preset else ''} --data …` writes it"
            )
        return self.shipped[name]

    def resolve(self, target: str) -> Any:
        """The object behind `module:name` inside this paper's folder.

        Raises:
            UserError: the module cannot be imported, or has no such name.
        """
        module, _, name = target.partition(":")
        imported = self.resolve_module(module)
        if not hasattr(imported, name):
            raise UserError(f"{self.slug}: {self.package}.{module} has no {name!r}, which its paper.toml names")
        return getattr(imported, name)

    def factory(self, mechanism: Mechanism, **arguments: Any) -> Callable[..., Any]:
        """The layer of a mechanism with its arguments, and with these in place of its own or beside them."""
        return partial(self.resolve(mechanism.layer), **{**mechanism.arguments, **arguments})

    def resolve_module(self, module: str) -> ModuleType:
        """A module of this paper's folder, imported.

        Raises:
            UserError: it raised something, or needs a package that is not installed.
        """
        name = f"{self.package}.{module}"
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise UserError(f"{self.slug}: {name} cannot be imported: {in_a_line(error)}") from error

    def has(self, module: str) -> bool:
        """Whether the paper's folder holds this module, such as `experiments`."""
        return (self.folder / f"{module}.py").exists() or (self.folder / module).is_dir()


def _named(entries: list, name: str, what: str, slug: str, key: str = "name") -> Any:
    for entry in entries:
        if getattr(entry, key) == name:
            return entry
    names = [getattr(entry, key) for entry in entries]
    raise UserError(f"{slug} has no {what} {name!r}{meant(name, names)}; it has: {listed(names)}")
