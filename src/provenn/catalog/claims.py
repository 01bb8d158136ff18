"""What an abstract asserts, and the experiments that are evidence for it."""

from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import Field, model_validator

from provenn.catalog.figures import Facts, Figure, Region


class Claim(Facts):
    """One assertion of the abstract, in our words, and the experiments that are evidence for or against it.

    Args:
        says: the claim, in one sentence that can be read alone.
        kind: exact (an identity or a count), cost, quality, or use (a property in use).
        figure: the number that the abstract prints, where it prints one.
        headline: whether the list and the board show this claim; one claim of a paper is it.
        decides: the experiments closest to the claim, named before anything is measured. The verdict is theirs.
        also: all else that was measured and bears on the claim. It is shown and changes no verdict.
        against: those of `also` that are evidence against the claim where their own sentence is so.
        needs: what verifies the claim at the paper's own setting.
        wanted: an experiment that would decide the claim better at small scale, and that nobody has built.
    """

    says: str
    kind: Literal["exact", "cost", "quality", "use"]
    figure: str = ""
    headline: bool = False
    decides: list[str] = []
    also: list[str] = []
    against: list[str] = []
    needs: str = ""
    wanted: str = ""

    @model_validator(mode="before")
    @classmethod
    def roles_are_told_apart(cls, facts: Any) -> Any:
        """Which experiments decide is said, not guessed."""
        if isinstance(facts, dict) and "experiments" in facts:
            raise ValueError(
                "a claim has no key `experiments`: put those that decide it under `decides`, all others under `also`"
            )
        return facts

    @model_validator(mode="after")
    def has_evidence(self) -> "Claim":
        """A claim that no experiment decides says what it needs; an experiment has one role."""
        if not self.decides and not self.needs:
            raise ValueError("a claim must name the experiments that decide it, or what it needs")
        twice = {name for name in self.experiments if self.experiments.count(name) > 1}
        if twice:
            raise ValueError(f"an experiment decides a claim or stands under also, once: {', '.join(sorted(twice))}")
        if not set(self.against) <= set(self.also):
            raise ValueError(f"against names experiments of also, got {', '.join(self.against)}")
        return self

    @property
    def experiments(self) -> list[str]:
        """All that bear on it, those that decide first."""
        return [*self.decides, *self.also]


class Roles(Facts):
    """When and how it was chosen which experiments decide, where that was after some had been measured."""

    chosen: date
    how: str


class AtPaper(Facts):
    """How an experiment is measured on the paper's own data, at the budget paper.

    The preset's authors' weights are evaluated on `data`, or the preset is trained on it by its recipe or by `recipe`.
    That is one of the paper's by name, or a table with `base`. `overrides` change how the data are read and the system
    is built. Or the pretrained model `host` is converted, tuned on `data` and tested, with `overrides` to how
    (`provenn.huggingface.recover`); on sentences it is fine-tuned first. The metric `kept` is the share of what it
    could do before.

    Args:
        host: the pretrained model that is converted. Of a system that is trained, the frozen encoder whose layers it
            decodes; its task's `load` takes the folder as `encoder`.
        against: changes that make the paper's baseline. Both are trained, and the effect is their difference.
        data: names of `provenn data`, or of their files (`ett/ETTh1.csv`); of several the metric's mean is taken.
        tested_on: other sets for the test.
        split: where the figure is of validation data.
        departs: what is not as in the paper, so that the published figure cannot be reproduced, only the direction be
            seen.
        gpu: without one it would take weeks.
        start: the preset whose authors' weights the training starts from. Where it is the same preset they are all of
            the system, else its backbone.
        fixed: the backbone's batch norms, and what its map of stride 4 is made of, stay as they came.
        file: what the authors' weights are called where these are not the preset's only ones.
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

    Args:
        scale: the setting in one phrase, data and size of the models: a name of the paper's `scales`.
        amended: what moved after it was measured, when and why.
        sides: the two that are compared, as the study's variants or the timing's runners are labelled. They are written
            here independently of the code that measures, so that exchanged sides are noticed.
        why: the reason for the region.
    """

    id: str = Field(pattern=r"^[a-z0-9_]+$")
    kind: Literal["exact", "cost", "quality"]
    says: str
    origin: Literal["paper", "ours"] = "paper"
    published: Figure | None = None
    expects: Region | None = None
    why: str = ""
    amended: str = ""
    scale: str = ""
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
