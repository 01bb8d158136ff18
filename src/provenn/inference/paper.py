"""Papers as objects: their systems, and weights of theirs or of their authors."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenn import catalog
from provenn.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from provenn.inference.options import Option
    from provenn.training.weights import Label


@dataclass(frozen=True)
class Paper:
    """One paper: its card, its systems, its experiments.

    >>> paper("eca_net").card.arxiv
    '1910.03151'
    """

    card: catalog.Card

    def __repr__(self) -> str:
        return f"provenn.paper({self.card.slug!r})"

    def bibtex(self) -> str:
        """The paper's BibTeX entry, under its slug."""
        return self.card.bibtex()

    def options(self, preset: str | None = None, *, task: str | None = None) -> "list[Option]":
        """What `train`, `evaluate` and `predict` take by name for a preset, with types and defaults."""
        from provenn.inference.options import options_of

        return options_of(self.card, preset, task)

    def build(self, preset: str | None = None, *, pretrained: bool = False, **overrides: Any) -> "nn.Module":
        """A system of the paper, with fresh weights, or with those that ship with the package.

        Args:
            preset: its name; by default the paper's first, or the first whose weights ship.
            pretrained: load the weights that ship (`card.shipped` names them); the model is then in eval mode.
            overrides: keyword arguments of the preset's function, such as `num_classes=10`.

        Raises:
            UserError: no such preset, the preset takes no such argument, or nothing can be built with its value; no
                weights ship with it, or they were trained with another value.
        """
        import inspect

        if pretrained:
            model, label = self.load(preset=preset)
            for name, value in overrides.items():
                if name not in label.options or label.options[name] != value:
                    was = label.options.get(name, "its default")
                    raise UserError(f"the weights of {label.preset} were trained with {name} = {was}, got {value!r}")
            return model

        chosen = self.card.preset(preset)
        function = self.card.resolve(chosen.build)
        arguments = {**chosen.options, **overrides}
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            takes = ", ".join(inspect.signature(function).parameters)
            raise UserError(f"{chosen.name} of {self.card.slug}: {error}; it takes: {takes}") from None
        try:
            return function(**arguments)
        except Exception as error:  # options may come from a file of a stranger's
            raise UserError(f"{chosen.name} of {self.card.slug}: {_blame(error, arguments)}") from error

    def from_official(self, file: str | Path, *, preset: str | None = None, **options: Any) -> "nn.Module":
        """Our model with the weights of the authors' checkpoint.

        Args:
            file: the checkpoint, or a folder of Hugging Face: config.json, and weights in one file or in shards.
            preset, options: what follows from neither its shapes nor its config, such as `chunk=64` for RAT.

        Raises:
            UserError: weights of no preset, options that contradict the file, or a file that leaves something open.
        """
        return self._official(file, preset, options)[0]

    def load(
        self, weights: str | Path | None = None, *, preset: str | None = None, options: dict[str, Any] | None = None
    ) -> "tuple[nn.Module, Label]":
        """The model in a weight file, ours or the authors', in eval mode, and what it says of itself.

        Args:
            weights: the file, or the folder of a run; by default what ships with the package. A preset without
                parameters has none, and is taken as it is built.
            preset, options: of an author's file, as in `from_official`, and of a preset without parameters. Ours say
                themselves what they are; of their options those in `Preset.at_use` may be other ones.

        Raises:
            UserError: weights of another paper, or of none.
        """
        from provenn.tasks import face_of, get_task
        from provenn.training import weights as files

        if weights is None and self.is_parameter_free(preset):
            facts = self.card.preset(preset)
            work, built_with = self.card.task_of(facts), {**facts.options, **(options or {})}
            meta = get_task(work).default_meta(built_with)
            model = self.build(facts.name, **built_with).eval()
            return model, files.Label(self.card.slug, facts.name, work, built_with, meta)
        if weights is not None and files.is_foreign(weights):
            return self._official(weights, preset, options or {})
        file = self.card.shipped_weights(preset) if weights is None else files.locate(weights)
        state, label = files.read(file)
        if label is None:
            return self._official(file, preset, options or {})
        if label.paper != self.card.slug:
            raise UserError(f"{file} holds weights of {label.paper}, not of {self.card.slug}")
        if preset not in (None, label.preset):
            raise UserError(f"{file} holds weights of {label.preset}, not of {preset}")
        if label.meta:  # of weights that were saved for Python alone there may be none
            work = get_task(self.card.task_of(self.card.preset(label.preset))).name
            if work not in (label.task, face_of(label.task).presets_of):
                raise UserError(
                    f"{file} says that {label.preset} was trained for {label.task!r}, and it is for {work!r}: "
                    "give other weights, these are damaged"
                )
            get_task(label.task).check_meta(label.meta, str(file))
        label = replace(label, options={**label.options, **self._at_use(label, options or {}, file)})
        model = self.build(label.preset, **label.options)
        files.load_into(model, state, str(file))
        return model.eval(), label

    def _at_use(self, label: "Label", options: dict[str, Any], file: Path) -> dict[str, Any]:
        """The options with which weights of ours are used, typed; what differs from the training's is said."""
        import inspect

        from provenn.core import progress
        from provenn.core.settings import arguments_of, typed

        facts = self.card.preset(label.preset)
        closed = [name for name in options if name not in facts.at_use]
        if closed:
            free = f"; {', '.join(facts.at_use)} may be set" if facts.at_use else ""
            raise UserError(f"{file} names its own options: leave {', '.join(closed)} out{free}")
        if not options:
            return {}
        function = self.card.resolve(facts.build)
        known, parameters = arguments_of(function), inspect.signature(function).parameters
        wanted = {name: typed(name, value, known[name]) for name, value in options.items()}
        for name, value in wanted.items():
            trained = {**facts.options, **label.options}.get(name, parameters[name].default)
            if value != trained:
                progress.say(f"{name}={value} where the training had {name}={trained}")
        return wanted

    def is_parameter_free(self, preset: str | None = None) -> bool:
        """Whether a preset has nothing to train and no weights come with it: it is used as it is built.

        Raises:
            UserError: no such preset, or a procedure that is for no work on data.
        """
        import torch

        shipped = self.card.shipped
        if preset in shipped if preset else shipped:
            return False
        facts = self.card.preset(preset)
        self.card.task_of(facts)
        try:
            with torch.device("meta"):  # where a large preset takes no memory
                return not self.build(facts.name).state_dict()
        except UserError:  # it needs options that follow from data: it has something to fit
            return False

    def _official(self, file: str | Path, given: str | None, options: dict[str, Any]) -> "tuple[nn.Module, Label]":
        from provenn.training import weights as files

        return files.read_official(self.card, file, preset=given, options=options, build=self.build)


def _blame(error: Exception, arguments: dict[str, Any]) -> str:
    """Why a system could not be built, in one line that names the option: torch's own words name none."""
    import re

    words = " ".join(str(error).split())
    if any(re.search(rf"\b{name}\b", words) for name in arguments):
        return words
    for name, value in arguments.items():
        if isinstance(value, int | float) and value < 0:
            return f"{name} must not be negative, got {value!r}"
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"cannot be built with {given}: {words}"


def papers() -> Iterator[Paper]:
    """Every paper, by slug; a warning names those of other packages that cannot be used."""
    for name, reason in catalog.cards().left_out.items():
        warnings.warn(f"the paper {name} is left out: {reason}", stacklevel=2)
    return (Paper(card) for card in catalog.cards().values())


def paper(slug: str) -> Paper:
    """One paper, by its slug or its arXiv number; an unknown slug is answered with the nearest one."""
    return Paper(catalog.card(slug))


def from_official(slug: str, file: str | Path, *, preset: str | None = None, **options: Any) -> "nn.Module":
    """Our model with the weights of the authors' checkpoint; `preset` and `options` say what the file does not."""
    return paper(slug).from_official(file, preset=preset, **options)
