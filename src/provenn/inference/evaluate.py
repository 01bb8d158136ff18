"""How good a trained system is on data, beside what the paper says."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.settings import LARGEST, arguments_of, typed
from provenn.tasks import datasets

if TYPE_CHECKING:
    from provenn.inference.evaluation import Evaluation
    from provenn.tasks.base import Task
    from provenn.training.weights import Label
from provenn.inference.overrides import of_system
from provenn.inference.paper import paper
from provenn.inference.predict import source_of


def evaluate(
    slug: str,
    data: str | Path,
    *,
    weights: str | Path | None = None,
    preset: str | None = None,
    whole: bool | None = None,
    seed: int | None = None,
    device: str = "auto",
    batch_size: int = 256,
    overrides: dict[str, Any] | None = None,
) -> "Evaluation":
    """The metrics of trained weights on data, each with a 95 % interval over the examples.

    The data are read as the weights say: in their classes, their scale, their tokens.

    Args:
        slug: the paper.
        data: an embedded data set's name, or a path, in the formats that `train` reads.
        weights: a weight file, ours or the authors', or the folder of a run; by default what ships with the package.
        preset: whose weights, where those of several ship; or of an author's file that does not name it.
        whole: test on all of the data, or on the part that a training with this seed holds out. By default on all,
            but on what was held out where these weights were trained on the same data; data that come with a test
            split are tested on it.
        seed: of the split; by default the training's.
        device: auto, cpu, cuda, mps or a torch device.
        batch_size: examples at a time.
        overrides: how the data are read, such as {"length": 512}; of an author's file also what it does not say, as in
            `from_official`, such as {"chunk": 64}; and of ours what `Paper.load` takes.

    Raises:
        UserError: weights or data that cannot be read, or that do not fit each other.
    """
    from provenn.core.device import choose_device
    from provenn.core.finite import finite_outputs
    from provenn.inference import evaluation
    from provenn.tasks import face_of, get_task

    if not 1 <= batch_size <= LARGEST:
        raise UserError(f"batch size must be from 1 to {LARGEST}, got {batch_size}")
    if seed is not None and not 0 <= seed < 2**32:
        raise UserError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed}")
    chosen, overrides = paper(slug), dict(overrides or {})
    names = of_system(chosen, overrides, weights, preset, "held_out")
    model, label = chosen.load(weights, preset=preset, options={name: overrides.pop(name) for name in names})
    kind = get_task(label.task)
    known = held_out_options(kind)
    for name in overrides:
        if name not in known:
            there = ", ".join([*known, *chosen.card.preset(label.preset).at_use]) or "nothing"
            raise UserError(f"an evaluation of {label.task} has no {name!r}; what can be set: {there}")
    source = datasets.resolve(data)
    data = source.data
    fixed = {name: value for name, value in source.options.items() if name in known}
    wanted = {name: typed(name, value, known[name]) for name, value in overrides.items()}
    of_data = face_of(label.task).of_data
    asks = whole is None or not set(of_data).isdisjoint(label.trained_on.get("options", {}))
    of_training = asks and _trained_on(label, kind, data)  # reads the data
    options = {**recorded(label, kind, known, wanted, of_training), **fixed, **wanted}
    if whole is None:
        whole = not of_training
    split_seed = label.trained_on.get("seed", 0) if seed is None else seed
    try:
        held_out = kind.held_out(data, label.meta, seed=split_seed, whole=whole, **options)
    except ValueError as error:
        if isinstance(error, UserError) or not wanted:
            raise
        given = ", ".join(f"{name}={value}" for name, value in wanted.items())
        raise UserError(f"{label.task} does not take {given}: {error}") from error
    with finite_outputs(model, source_of(chosen, label, weights), str(data)):
        return evaluation.evaluate(
            model.to(choose_device(device)),
            kind,
            held_out,
            meta=label.meta,
            batch_size=batch_size,
            title=f"{label.preset} of {chosen.card.slug}",
            published=evaluation.published_of(chosen.card, chosen.card.preset(label.preset)),
        )


def held_out_options(kind: "Task") -> dict[str, Any]:
    """What can be set of the data that weights are tested on, and its types."""
    import inspect

    known = arguments_of(kind.held_out, but=("source", "meta", "whole", "seed", "options"))
    parameters = inspect.signature(kind.held_out).parameters.values()
    if known or not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return known
    return arguments_of(kind.load, but=("source", "seed", "options", "_"))  # to which it passes all on


def recorded(
    label: "Label", kind: "Task", known: dict[str, Any], wanted: dict[str, Any], of_training: bool = True
) -> dict[str, Any]:
    """The options with which a training read its data, for those who test its weights; what differs is said.

    An option of `held_out` whose default is None follows from the weights themselves, such as `length`. One that is
    about a data set is of the data of the training alone.
    """
    import inspect

    from provenn.tasks import face_of

    parameters = inspect.signature(kind.held_out).parameters
    follows = {name for name, parameter in parameters.items() if parameter.default is None}
    if not of_training:
        follows.update(face_of(kind.name).of_data)
    recorded_options = {name: value for name, value in label.trained_on.get("options", {}).items() if name in known}
    recorded = {
        name: typed(name, value, known[name]) for name, value in recorded_options.items() if name not in follows
    }
    for name, value in wanted.items():
        if name in recorded and recorded[name] != value:
            progress.say(f"{name}={value} where the training had {name}={recorded[name]}")
    taken = {name: value for name, value in recorded.items() if name not in wanted}
    if taken:
        progress.say(f"as in the training: {', '.join(f'{name}={value}' for name, value in taken.items())}")
    return taken


def _trained_on(label: "Label", kind: "Task", data: str | Path) -> bool:
    """Were these weights trained on this data?"""
    if "fingerprint" not in label.trained_on:
        return False
    options = label.trained_on.get("options", {})
    try:
        with progress.unsaid():
            again = kind.load(data, seed=label.trained_on.get("seed", 0), **options)
    except (UserError, TypeError):  # too little for a split, say: then no training has read it
        return False
    return again.fingerprint == label.trained_on["fingerprint"]
