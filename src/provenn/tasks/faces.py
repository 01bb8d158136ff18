"""The faces of a task, read as data without torch: its form in the browser, its data sets, its hosts, and others.

They stand in a TOML file beside the module that holds the task, under the same name: `image_classification.toml`, a
paper's `task.toml`. A task without the file has no faces. What a file names as `module:name` is looked up beside it,
or anywhere by a dotted name.
"""

import importlib
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from provenn.core.errors import UserError
from provenn.core.names import in_a_line
from provenn.tasks.discovery import sources_of


def _is_target(target: str) -> str:
    module, _, name = target.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"expected module:name, got {target!r}")
    return target


Target = Annotated[str, AfterValidator(_is_target)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sample(_Strict):
    """Something to try.

    Args:
        name: of the file among the samples of the web catalogue; of a sample with text, what it is called.
        about: what it shows.
        text: the content itself.
        question: what is asked of it, where the form has a line for that.
    """

    name: str
    about: str
    text: str = ""
    question: str = ""


class Number(_Strict):
    """A whole number of a form, an option of the prediction by the same name."""

    name: str
    label: str
    default: int
    least: int
    most: int

    @model_validator(mode="after")
    def _in_bounds(self) -> "Number":
        if not 0 <= self.least <= self.default <= self.most:
            raise ValueError(f"{self.name}: expected 0 <= least <= default <= most")
        return self


class Demo(_Strict):
    """How a task is tried in the browser.

    Args:
        takes: what a reader gives. Of `classes` the reader picks some of those that the weights know.
        asks: the same in the words of the form.
        question: what a reader types beside a file, in the words of the form; it becomes the option `question` of the
            demo. Empty where nothing is typed.
        does: what its button says.
        answer: the function that applies a model and says what came of it, see `provenn.tasks.demos`.
        streams: whether the answer comes piece by piece.
        options: numbers that the reader may change.
        samples: by the data that weights were trained on, what they do best.
    """

    takes: Literal["picture", "sound", "table", "graphs", "words", "classes"]
    asks: str
    question: str = ""
    does: str
    answer: Target
    streams: bool = False
    options: tuple[Number, ...] = ()
    samples: dict[str, tuple[Sample, ...]] = Field(default_factory=dict)


class PredictOption(_Strict):
    """An option of `provenn predict`, for the argument of the task's `predict` by the same name.

    Args:
        takes: what follows it; nothing follows a flag.
        help: what it does, as the command's help says it; begins with the kind of work that it is for.
    """

    takes: Literal["flag", "path", "number", "text"]
    help: str


class DataSet(_Strict):
    """A data set of the field that the task reads. Nothing is downloaded: it is looked for by its name.

    Args:
        name: its key in the file; not written there.
        task: the one whose file it stands in; not written there, and None where `read` is false.
        title: what it is called in full.
        layout: what its folder looks like, in words.
        holds: patterns that must all be found in the folder.
        inside: sub-folders; the first that is there is read in place of the folder.
        also: other names that its folder goes by.
        options: how the files that match a pattern are read.
        lacks: what is missing here to measure experiments on the set.
        read: whether the task itself reads it; false where only what converts pretrained models does.
    """

    name: str = ""
    task: str | None = None
    title: str
    layout: str
    holds: list[str]
    inside: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    lacks: str = ""
    read: bool = True

    def options_of(self, member: str) -> dict[str, Any]:
        """How a file of the set is read; `member` is its path inside, "" for the whole set."""
        given = next((given for pattern, given in self.options.items() if fnmatch(member or "*", pattern)), {})
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


class Face(_Strict):
    """What other parts ask of a task.

    Args:
        package: where its targets are looked up.
        demo: its form in the browser.
        evaluation: draws what `provenn evaluate --out` scored: a function of model, data set and `Scores`.
        hosts: by slot, the network in which mechanisms are compared: see `provenn.tasks.hosts`.
        materials: what a pretrained model of Hugging Face is converted and tuned on, classes as
            `provenn.huggingface.Text`; of several, a metric chooses.
        datasets: by name, the data sets of the field that it reads; `provenn data` lists them.
        predict: options of `provenn predict` by name, in place of `--set NAME=VALUE`.
        of_data: options of `held_out` that are about a data set, such as which of its categories are kept for the test.
            Weights bring theirs to the data that they were trained on, and to no other.
        as_read: values of options of `load` that give what few systems take, such as images of any shape: a preset
            takes them where its own `reads` has them.
        presets_of: another task, whose presets are trained for this one, which has none of its own.
    """

    package: str
    demo: Demo | None = None
    evaluation: Target | None = None
    hosts: dict[str, Target] = Field(default_factory=dict)
    materials: tuple[Target, ...] = ()
    datasets: dict[str, DataSet] = Field(default_factory=dict)
    predict: dict[str, PredictOption] = Field(default_factory=dict)
    of_data: tuple[str, ...] = ()
    as_read: dict[str, Any] = Field(default_factory=dict)
    presets_of: str | None = None

    def resolve(self, target: str) -> Any:
        """The object that a target names.

        Raises:
            UserError: the module cannot be imported, or has no such name.
        """
        module, _, name = target.partition(":")
        full = module if "." in module else f"{self.package}.{module}"
        try:
            return getattr(importlib.import_module(full), name)
        except (Exception, SystemExit) as error:  # code of other packages
            raise UserError(f"the face {target} of a task cannot be imported: {in_a_line(error)}") from error


def face_of(task: str) -> Face:
    """The faces of the task of that name; of an unknown one, none.

    Raises:
        UserError: a file that is no TOML or does not follow `Face`, in one line with the key.
    """
    for module, file in sources_of(task):
        if file.is_file():
            return _read(file, module.rpartition(".")[0])
    return Face(package="")


def _read(file: Path, package: str) -> Face:
    try:
        return Face(package=package, **tomllib.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not valid TOML: {in_a_line(error)}") from None
