"""What goes on inside a trained system."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenn import catalog
from provenn.core.errors import UserError

if TYPE_CHECKING:
    from provenn.inference.inspection import Inspection
from provenn.inference.paper import paper
from provenn.inference.predict import source_of


def inspect(
    slug: str,
    file: str | Path,
    *,
    text: str | None = None,
    preset: str | None = None,
    weights: str | Path | None = None,
    options: dict[str, Any] | None = None,
) -> "Inspection":
    """What goes on inside a paper's system that is given one file, such as ECA's gates on an image.

    Args:
        slug: the paper; it must have an `inspection.py`.
        file: what the system is given.
        text: what it is given besides, where its task takes a text with a file, such as a caption or
            a category.
        preset: the system; by default the first whose weights ship with the package, or the paper's first.
        weights: a weight file, ours or the authors', or the folder of a run; these say which preset they are of. By
            default those that ship, or random ones where none do.
        options: of the model, as `Paper.load` takes them; random weights take any of the preset's.

    Raises:
        UserError: the paper shows nothing, or the file or the weights cannot be read.
    """
    from inspect import getdoc, signature

    import torch

    from provenn.core.finite import DAMAGED, finite_outputs, is_finite
    from provenn.core.settings import arguments_of, typed
    from provenn.inference.inspection import Inspection
    from provenn.nn.one_text import for_text
    from provenn.tasks import Task, get_task

    chosen, source = paper(slug), Path(file)
    if not chosen.card.has("inspection"):
        able = [card.slug for card in catalog.cards().values() if card.has("inspection")]
        raise UserError(f"{chosen.card.slug} cannot be inspected; these can: {', '.join(able)}")
    if not source.is_file():
        raise UserError(f"{source} is a folder: give one file" if source.is_dir() else f"no file at {source}")
    shipped = chosen.card.shipped
    if weights is None and (preset not in shipped if preset else not shipped):
        facts = chosen.card.preset(preset)
        known = arguments_of(chosen.card.resolve(facts.build))
        asked = (options or {}).items()
        given = {key: typed(key, value, known[key]) if key in known else value for key, value in asked}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = chosen.build(facts.name, **given).eval()
        name, kind, trained = facts.name, get_task(chosen.card.task_of(facts)), "random weights"
        origin, meta = f"random weights of {name}", kind.default_meta({**facts.options, **given})
    else:
        model, label = chosen.load(weights, preset=preset if weights is None else None, options=options)
        if preset not in (None, label.preset):
            raise UserError(f"{weights} holds weights of {label.preset}, not of {preset}: leave --preset out")
        trained = "the weights that ship" if weights is None else str(weights)
        name, kind, meta = label.preset, get_task(label.task), label.meta
        origin = source_of(chosen, label, weights)
    if type(kind).example is Task.example:
        able = [
            each.name
            for each in chosen.card.presets
            if chosen.card.work_of(each)
            if type(get_task(chosen.card.task_of(each))).example is not Task.example
        ]
        raise UserError(
            f"{name}: {kind.name} reads no input from a single file, which inspection needs"
            + (f"; of {slug} take --preset {' or '.join(able)}" if able else "")
        )
    look = chosen.card.resolve("inspection:inspect")
    draw = getattr(chosen.card.resolve_module("inspection"), "draw", None)
    with_file = text is not None and "text" in signature(kind.example).parameters
    if text is not None and not with_file:
        model = for_text(model, text)
    x = kind.example(source, meta, **({"text": text} if with_file else {}))
    with torch.no_grad(), finite_outputs(model, origin, str(source)):
        layers = look(model, x)
    infinite = next((row for row, numbers in layers.items() if not is_finite(numbers)), None)
    if infinite is not None:
        raise UserError(f"{origin}: {infinite} is not a finite number: {DAMAGED}")
    if not layers:
        raise UserError(f"{name} of {chosen.card.slug} has nothing to inspect")
    drawn = None if draw is None else partial(draw, model, x, meta)
    said = "" if text is None else f" with {text!r}"
    return Inspection(
        f"{name} ({trained}) on {source.name}{said}", (getdoc(look) or "").partition("\n")[0], layers, drawn
    )
