"""The facts of a paper, as its `paper.toml` gives them, and what is wrong with them where they are not."""

import importlib
import importlib.util
import json
from collections.abc import Iterable
from datetime import date
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from provenn.catalog.citation import bibtex
from provenn.core.errors import UserError

OURS = "provenn.papers"  # the package of this package's own papers
WEIGHTS = "weights"  # the folder of trained weights that come with a paper, a file a preset
COUNTING_UNITS = {
    "": 1,
    "parameters": 1,
    "2^10": 2**10,
    "2^20": 2**20,
    "k": 10**3,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "B": 10**9,
}


class Facts(BaseModel):
    """Read-only data; a key that does not exist is an error, so that no typo is silently ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(Facts):
    """A number that was published, and where."""

    value: float
    unit: str = ""
    source: str
    what: str = ""

    def __str__(self) -> str:
        unit = self.unit or self.what
        times = "× " if unit[:1].isdigit() else ""  # of 2^20, say
        return f"{self.value:,.15g} {times}{unit}".strip() + f" ({self.source})"

    def is_count(self, counted: int) -> bool:
        """Whether it is this many, to the last digit printed; in a unit that counts nothing, it is not.

        >>> Figure(value=24.37, unit="2^20", source="Table 3").is_count(25557112)
        True
        """
        if self.unit not in COUNTING_UNITS:
            return False
        digits = max(-int(Decimal(repr(self.value)).as_tuple().exponent), 0) if self.value % 1 else 0
        allowed = 0 if COUNTING_UNITS[self.unit] == 1 else 10.0**-digits  # printed figures are rounded or cut
        return abs(counted / COUNTING_UNITS[self.unit] - self.value) <= allowed


class Region(Facts):
    """The effects that support an experiment: open above or below a bound, or closed within two."""

    above: float | None = None
    below: float | None = None
    within: tuple[float, float] | None = None

    @model_validator(mode="after")
    def one_side(self) -> "Region":
        """Exactly one of the three bounds, the lower first."""
        if sum(bound is not None for bound in (self.above, self.below, self.within)) != 1:
            raise ValueError("give exactly one of above, below, within")
        if self.within is not None and self.within[0] > self.within[1]:
            raise ValueError(f"within must be [low, high], got {list(self.within)}")
        return self

    def __str__(self) -> str:
        if self.within is not None:
            return f"within [{self.within[0]:g}, {self.within[1]:g}]"
        return f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"


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


class Example(Facts):
    """An input for the common checks: normal noise, or integers from 0 to `below` (exclusive).

    With a `name` it is the keyword argument of that name; without, the next positional one.
    """

    shape: list[int]
    below: int | None = None
    name: str | None = None


class Preset(Facts):
    """A system of the paper, with what was published of it.

    `task` is the paper's where it is left out; "" says that there is nothing to train or to predict: a procedure.
    `reads` is how the user's own files are read for it, where `--set` does not say.
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
    summary: str = ""

    @field_validator("input", mode="before")
    @classmethod
    def one_input(cls, given: Any) -> Any:
        """A list of numbers is the shape of the only input."""
        plain = isinstance(given, list) and all(isinstance(size, int) for size in given)
        return [{"shape": given}] if plain and given else given


class Claim(Facts):
    """One assertion of the abstract, in our words, and the experiments that are evidence for it.

    `needs` says what the paper's own setting takes; a claim without experiments must say it.
    """

    says: str
    kind: Literal["exact", "cost", "quality", "use"]
    figure: str = ""
    headline: bool = False
    experiments: list[str] = []
    needs: str = ""

    @model_validator(mode="after")
    def has_evidence(self) -> "Claim":
        """A claim without experiments says what it needs."""
        if not self.experiments and not self.needs:
            raise ValueError("a claim must name the experiments that are evidence for it, or what it needs")
        return self


class AtPaper(Facts):
    """How an experiment is measured on the paper's own data, at the budget paper.

    The preset's authors' weights are evaluated on `data`, or the preset is trained on it by its recipe, or by `recipe`
    (one of the paper's by name, or a table with `base`), with `overrides` to how the data are read and the system is
    built. Or the pretrained model `host` is converted, tuned on `data` and tested, with `overrides` to how
    (`provenn.huggingface.recover`); on sentences it is fine-tuned first. The metric `kept` is the share of what it
    could do before. Of a system that is trained, `host` is the frozen encoder whose layers it decodes; its task's
    `load` takes the folder as `encoder`. With `against`, changes that make the paper's baseline, both are trained and
    the effect is their difference. `data` are names of `provenn data`, or of their files (`ett/ETTh1.csv`); of several
    the metric's mean is taken. `tested_on` names other sets for the test; `split`: where the figure is of validation
    data.
    `departs`: what is not as in the paper, so that the published figure cannot be reproduced, only the direction be
    seen. `gpu`: without one it would take weeks. `start`: the preset whose authors' weights the training starts from,
    all of the system where it is the same preset, else its backbone; with `fixed` the backbone's batch norms and what
    its map of stride 4 is made of stay as they came.
    `file`: what the authors' weights are called where these are not the preset's only ones.
    """

    preset: str
    data: str | list[str]
    metric: str
    weights: Literal["authors", "train", "converted"]
    host: str | None = None
    recipe: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    against: dict[str, Any] | None = None
    tested_on: str | list[str] | None = None
    split: Literal["test", "val"] = "test"
    departs: str = ""
    gpu: bool = False
    start: str | None = None
    fixed: bool = False
    file: str | None = None

    @model_validator(mode="after")
    def fits_together(self) -> "AtPaper":
        """What is of a training goes with weights that are trained, a host with those or converted ones."""
        if self.against is not None and self.weights == "authors":
            raise ValueError("a baseline is trained beside the system: weights must be 'train' or 'converted'")
        if self.weights != "train" and (self.host is not None) != (self.weights == "converted"):
            raise ValueError(
                "host names the pretrained model that is converted, or the encoder of what is trained: weights must be "
                "'converted' or 'train'"
            )
        if self.host is not None and self.start is not None:
            raise ValueError("a system that decodes an encoder's layers starts from no weights: give host or start")
        if (self.recipe or self.tested_on or self.start) and self.weights != "train":
            raise ValueError("recipe, tested_on and start belong to a training: weights must be 'train'")
        if self.file is not None and self.weights != "authors":
            raise ValueError("file names the authors' weights: weights must be 'authors'")
        if self.fixed and self.start in (None, self.preset):
            raise ValueError("fixed needs a backbone that starts from weights: name their preset with start")
        return self

    @property
    def sets(self) -> list[str]:
        """The names of its data sets; of several the metric's mean is taken."""
        return [self.data] if isinstance(self.data, str) else self.data

    @property
    def tests(self) -> list[str]:
        """The sets of `tested_on`."""
        return [self.tested_on] if isinstance(self.tested_on, str) else self.tested_on or []

    @property
    def checkpoint(self) -> str | None:
        """What lies with the weights of others, where it takes some: the authors' of a preset, or the host."""
        if self.weights == "authors":
            return self.file or self.preset
        return self.host or self.start


class Experiment(Facts):
    """A measurement that is evidence for or against a claim, with the effects that would support it.

    `sides` names the two that are compared, as the study's variants or the timing's runners are labelled. It is written
    here independently of the code that measures, so that exchanged sides are noticed. `why` is the reason for the
    region.
    """

    id: str = Field(pattern=r"^[a-z0-9_]+$")
    kind: Literal["exact", "cost", "quality"]
    says: str
    origin: Literal["paper", "ours"] = "paper"
    published: Figure | None = None
    expects: Region | None = None
    why: str = ""
    sides: tuple[str, str] | None = None
    tolerance: float = 0.0
    needs: str | None = None
    package: str | None = Field(None, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")
    at_paper: AtPaper | None = None

    @model_validator(mode="after")
    def one_lack(self) -> "Experiment":
        """`needs` or `package`, not both."""
        if self.needs is not None and self.package is not None:
            raise ValueError("give needs (never measured here) or package (measured where it is installed), not both")
        return self

    @property
    def lacks(self) -> str | None:
        """What keeps this experiment from being measured here, where something does."""
        if self.package is not None and installed(self.package) is None:
            return f"the package {self.package} (pip install {self.package})"
        return self.needs


def installed(package: str) -> str | None:
    """The version of a package, named as pip names it, or None where it is not installed.

    >>> installed("provenn-no-such-package") is None
    True
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
        raise ValueError(f"{where}: no recipe {name!r}; there are: {_listed(recipes)}")
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
    recipes: dict[str, dict[str, Any]] = {}
    presets: list[Preset] = []
    claims: list[Claim] = []
    experiments: list[Experiment] = []

    @model_validator(mode="before")
    @classmethod
    def spell_out_recipes(cls, facts: Any) -> Any:
        """A preset's recipe may name one of `recipes`, or be one with changes: `{ base = "imagenet", lr = 0.1 }`.

        So may that of an `at_paper`.
        """
        if "statements" in facts:
            raise ValueError(
                "written for provenn 0.1: rename [[claims]] to [[experiments]], then [[statements]] to [[claims]] and "
                "its key `claims` to `experiments`"
            )
        recipes = facts.get("recipes", {})
        presets = [_spelled_out(f"preset {_key(each, 'name')!r}", each, recipes) for each in facts.get("presets", [])]
        experiments = []
        for experiment in facts.get("experiments", []):
            how = experiment.get("at_paper") if isinstance(experiment, dict) else None
            if isinstance(how, dict):
                experiment = {
                    **experiment,
                    "at_paper": _spelled_out(f"experiment {_key(experiment, 'id')!r}", how, recipes),
                }
            experiments.append(experiment)
        return {**facts, "presets": presets, "experiments": experiments}

    @model_validator(mode="after")
    def claims_fit_experiments(self) -> "Card":
        """Claims name experiments of this paper, `at_paper` its presets, and one claim is the headline."""
        known = {experiment.id for experiment in self.experiments}
        for claim in self.claims:
            unknown = [name for name in claim.experiments if name not in known]
            if unknown:
                raise ValueError(f"the claim {claim.says!r} names no experiment of this paper: {_listed(unknown)}")
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

    @field_validator("mechanisms", "presets", "experiments")
    @classmethod
    def distinct(cls, entries: list) -> list:
        """No two mechanisms, presets or experiments share a name."""
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
            raise UserError(f"{self.slug} has no preset{about}; it has: {_listed(p.name for p in self.presets)}")
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
            there = f"; there are some of {_listed(self.shipped)}" if self.shipped else ""
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


def label_of_shipped(file: Path) -> dict[str, Any]:
    """What a weight file that comes with a paper says of itself (`provenn.training.weights.Label`), read without
    torch.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy") as handle:
            label = json.loads((handle.metadata() or {})["provenn"])
    except (SafetensorError, OSError, ValueError, KeyError):  # which loading it will report
        return {}
    return label if isinstance(label, dict) else {}


def shipped_in_words(file: Path) -> str:
    """What the weights that come with a paper were trained on, and how well they do: "trained on digits, …"."""
    label = label_of_shipped(file)
    trained, metrics = label.get("trained_on", {}), label.get("metrics", {})
    reached = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items()]
    return f"trained on {trained.get('data', 'data that it does not name')}" + (
        f" ({', '.join(reached)})" if reached else ""
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _named(entries: list, name: str, what: str, slug: str, key: str = "name") -> Any:
    for entry in entries:
        if getattr(entry, key) == name:
            return entry
    names = [getattr(entry, key) for entry in entries]
    raise UserError(f"{slug} has no {what} {name!r}{meant(name, names)}; it has: {_listed(names)}")


def meant(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name that does not exist: the nearest that does."""
    import difflib

    close = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def check_options(verb: str, given: Iterable[str], options: type) -> None:
    """Refuse keywords that a function does not take, which are `options`, a typed dictionary.

    Raises:
        UserError: one of them, with the nearest that there is.
    """
    known = list(options.__annotations__)
    for name in given:
        if name not in known:
            raise UserError(f"{verb} has no option {name!r}{meant(name, known)}; it has: {', '.join(known)}")


def in_a_line(error: BaseException) -> str:
    """An error's class and words."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
