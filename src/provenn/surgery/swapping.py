"""New modules instead of those that a model has, or nothing instead."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.surgery.changes import Change, Changes, adapt_module
from provenn.surgery.naming import Target, class_name, find_modules, names_of_parameters, set_module
from provenn.surgery.notes import note_in_configs
from provenn.surgery.observing import Example, describe_shape, observed_shapes
from provenn.surgery.properties import lost_property, text_errors


def swap(
    model: nn.Module,
    where: Target | Sequence[Target],
    factory: Callable[[Any], nn.Module | None],  # Any: it may ask for the class that `where` names
    *,
    example: Example = None,
) -> Changes:
    """Replace each module that `where` names by a new one.

    A module in use under several names becomes one new module under all of those that match. Where a match lies inside
    another, the outer is swapped. Parameters that were tied to those of a module now gone are no longer tied, and the
    report says so.

    Args:
        model: changed in place.
        where: a pattern, a type, or a sequence of them.
        factory: makes the new module from the old one, whose weights it may take; None leaves this module alone.
        example: an input of the model (a tensor, a tuple of positional or a dict of keyword arguments). With it the
            model is run before and after. The change is undone if the model then fails, or if a new module gives
            another shape than the old one gave, or is not called where the old one was. Of tokens, three properties
            are tried that the model had before: a token moves no output before it, padding moves no output of a text,
            and a text read on from a cache gives what the whole text gives.

    Raises:
        UserError: nothing matches, or a new module does not work there with `example`.

    A Hugging Face model notes the change in its config. What `save_pretrained` then writes is loaded again by
    `provenn.huggingface.load_model`, and refused by transformers' own `from_pretrained`.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> print(swap(model, "1", lambda old: nn.GELU(), example=torch.zeros(1, 2)))
    1: ReLU becomes GELU, +0 parameters
    1 change, +0 parameters
    """
    planned = []
    replaced: list[str] = []
    for old, names in find_modules(model, where).items():
        names = [name for name in names if not any(name.startswith(f"{outer}.") for outer in replaced)]
        new = adapt_module(factory(old), like=old, model=model) if names else None
        if new is not None:
            planned += [(old, names, new)]
            replaced += names
    expected = {} if example is None else observed_shapes(model, [old for old, _, _ in planned], example)
    kept = {} if example is None else text_errors(model, example)
    changes = []
    for old, names, new in planned:
        # Counted on the whole model: a swapped module's weights may be tied to others that stay.
        before, size = names_of_parameters(model), count_parameters(model)
        set_module(model, names, new)
        after = names_of_parameters(model)
        what = f"{class_name(old)} becomes {class_name(new)}"
        for parameter in old.parameters():
            untied = [key for key in before[parameter] if key not in after.get(parameter, [key])]
            if untied:
                what += f" (no longer tied to {after[parameter][0]}: {', '.join(untied)})"
        changes += [Change(" = ".join(names), what, count_parameters(model) - size)]
    if example is not None:
        try:
            shapes_after = observed_shapes(model, [new for _, _, new in planned], example)
            for old, names, new in planned:
                if shapes_after.get(new) != expected.get(old):
                    raise UserError(
                        f"{names[0]}: {class_name(old)} gave {describe_shape(expected.get(old))} for this example, "
                        f"{class_name(new)} gives {describe_shape(shapes_after.get(new))}; the change is undone"
                    )
            if lost := lost_property(kept, text_errors(model, example)):
                raise UserError(f"{_blame(model, planned, example, kept)}{lost}; the change is undone")
        except Exception as error:  # whatever a stranger's module raises
            # From the last to the first, so that a name is resolved in the model that it was found in.
            for old, names, _ in reversed(planned):
                set_module(model, names, old)
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())
            raise UserError(
                f"the changed model does not run on the example: {type(error).__name__}: {reason}; the change is undone"
            ) from error
    note_in_configs(model, factory, [name for _, names, _ in planned for name in names], verb="swap")
    return Changes(tuple(changes))


def remove(model: nn.Module, where: Target | Sequence[Target]) -> Changes:
    """Let each module that `where` names pass its input on unchanged. It must take one input and return one output.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    >>> print(remove(model, nn.Dropout))
    1: Dropout becomes Identity, +0 parameters
    1 change, +0 parameters
    """
    return swap(model, where, nn.Identity)


def _blame(model: nn.Module, planned: Sequence[Any], example: Example, kept: dict[str, float]) -> str:
    """The first of the new modules that breaks a property by itself, with the old ones everywhere else."""
    for old, names, _ in reversed(planned):
        set_module(model, names, old)
    for old, names, new in planned:
        set_module(model, names, new)
        lost = lost_property(kept, text_errors(model, example))
        set_module(model, names, old)
        if lost:
            return f"{names[0]}: with {class_name(new)} instead of {class_name(old)}, "
    return f"{planned[0][1][0]} and the others together: "
