"""What a trained system makes of inputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenn.core.errors import UserError
from provenn.core.files import check_no_input, check_output
from provenn.core.settings import arguments_of, typed

if TYPE_CHECKING:
    from provenn.catalog.schema import Card
    from provenn.tasks import Task
    from provenn.training.weights import Label
from provenn.inference.overrides import of_system
from provenn.inference.paper import Paper, paper


def predict(
    slug: str,
    inputs: Sequence[str | Path],
    *,
    weights: str | Path | None = None,
    preset: str | None = None,
    output: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    log: Callable[[str], None] | None = None,
) -> str:
    """Apply trained weights to files; returns what the terminal shows.

    Args:
        slug: the paper.
        inputs: files, or folders of them; of a language model, words; of what draws, classes.
        weights: a weight file, or the folder of a run; by default what ships with the package.
        preset: whose weights, where those of several ship; or of an author's file that does not name it.
        output: where the result goes.
        overrides: what the task's `predict` takes by name, such as {"reference": Path("sharp.png")} or {"tokens": 100};
            of an author's file also what it does not say, as in `from_official`, such as {"chunk": 64}. Of ours also
            what `Paper.load` takes.
        log: is given the result piece by piece, by tasks whose result comes so.
    """
    from provenn.core.finite import finite_outputs
    from provenn.tasks import get_task

    chosen, overrides = paper(slug), dict(overrides or {})
    said = {name: overrides.pop(name) for name in of_system(chosen, overrides, weights, preset)}
    model, label = chosen.load(weights, preset=said.pop("preset", preset), options=said)
    kind = get_task(label.task)
    if not kind.takes_words:
        missing = next((file for file in inputs if not Path(file).exists()), None)
        if missing is not None:
            raise UserError(f"no file at {missing}")
    if not inputs and kind.needs_inputs:
        raise UserError(
            f"{slug} was given nothing: expected `provenn predict {slug}{what_is_given(kind)}`"
            if kind.takes_words
            else f"name the files to apply {slug} to"
        )
    given = [str(each) for each in inputs] if kind.takes_words else [Path(each) for each in inputs]
    known = arguments_of(kind.predict, but=("model", "meta", "inputs", "output"))
    logging = {} if known.pop("log", None) is None or log is None else {"log": log}
    for name in overrides:
        if name not in known:
            names = [*known, *chosen.card.preset(label.preset).at_use]
            there = f"{', '.join(names) or 'nothing'}{_of_another_task(chosen.card, name)}"
            raise UserError(f"a prediction of {label.task} has no {name!r}; what can be set: {there}")
    options = {name: typed(name, value, known[name]) for name, value in overrides.items()}
    path = None if output is None else Path(output)
    if path is not None:
        check_output(path, folder=kind.into_folders)
        check_no_input(path, given)
    source = source_of(chosen, label, weights)
    shown = "the input" if kind.takes_words else ", ".join(map(str, inputs[:3])) + ", …" * (len(inputs) > 3)
    with _fitting(source), finite_outputs(model, source, shown or "the input"):
        return kind.predict(model, label.meta, given, path, **options, **logging)


def _of_another_task(card: "Card", name: str) -> str:
    """Which other work of a paper takes an option, and how to ask for it; "" where none does."""
    from provenn.tasks import get_task

    for task in card.tasks:
        if name in arguments_of(get_task(task).predict, but=("model", "meta", "inputs", "output")):
            preset = card.preset(task=task).name
            return (
                f". It is taken for {task}: give weights trained for that (provenn train {card.slug} --preset {preset})"
            )
    return ""


def source_of(paper: Paper, label: "Label", weights: str | Path | None) -> str:
    """What an error calls the weights: their file, or the preset where there is none."""
    return str(paper.card.shipped.get(label.preset, label.preset) if weights is None else weights)


@contextmanager
def _fitting(weights: str) -> Iterator[None]:
    """A model that does not fit what its weight file says of its data is the file's fault, reported in one line."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(f"out of memory: give a smaller input; {' '.join(str(error).split())[:200]}") from error
    except (RuntimeError, IndexError, KeyError, TypeError, ArithmeticError) as error:
        words = " ".join(str(error).split())[:300]
        raise UserError(f"{weights}: the model does not fit its label or this input: {words}") from error


def what_is_given(kind: "Task") -> str:
    """What stands after the paper in a command that predicts: files, words, a file and words about it, or nothing."""
    from provenn.tasks.faces import face_of

    demo = face_of(kind.name).demo
    if not kind.needs_inputs:
        return ""
    if demo is not None and demo.question:
        return " INPUT 'some words'"
    return " 'some words'" if kind.takes_words else " INPUT…"
