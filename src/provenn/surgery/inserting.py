"""New modules after those that a model has: each is a child of the module that it follows, run by a hook."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.surgery.changes import Change, Changes, adapt_module
from provenn.surgery.naming import Target, class_name, find_modules, free_name, names_of_modules
from provenn.surgery.notes import note_in_configs
from provenn.surgery.observing import Example, observed_widths, run_once, width_of


def insert_after(
    model: nn.Module,
    where: Target | Sequence[Target],
    factory: Callable[[int], nn.Module | None],
    *,
    name: str = "inserted",
    width: int | None = None,
    example: Example = None,
) -> Changes:
    """Let a new module follow each module that `where` names.

    The new module becomes a child of the one that it follows, so no existing key of the state dict changes. Pretrained
    weights load into the changed model with `strict=False`; the new keys are `<module>.<name>.…`. It takes what the
    module gives; of a tuple, the first. Copying, pickling, `torch.compile` and `torch.export` keep it.

    Args:
        model: changed in place.
        where: a pattern, a type, or a sequence of them.
        factory: makes the new module from the width there (channels or features), as `EfficientChannelAttention` does;
            None leaves this module alone.
        name: what the new child is called; a module that has such a child already gives it a number.
        width: passed to the factory at every module; by default that of the module.
        example: an input of the model (a tensor, a tuple of positional or a dict of keyword arguments). With it the
            widths are those that really pass, and the changed model is run once: if it fails, the change is undone.
            Without it a width is read off the module, or off the last of its children that has one.

    Raises:
        UserError: nothing matches, a width is unknown, the example does not reach a module, or a module is in use
            where `where` does not name it, too.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    >>> print(insert_after(model, "0", nn.BatchNorm2d, name="norm", example=torch.zeros(1, 3, 4, 4)))
    0: BatchNorm2d follows Conv2d, 8 wide, as .norm, +16 parameters
    1 change, +16 parameters
    """
    modules = find_modules(model, where)
    for module, names in modules.items():
        if others := set(names_of_modules(model)[module]) - set(names):
            raise UserError(
                f"{names[0]} and {', '.join(sorted(others))} are one module, so what follows one follows both; "
                "name them all, or give the model a copy of its own first"
            )
    if width is not None:
        widths: dict[nn.Module, int | None] = dict.fromkeys(modules, width)
    elif example is None:
        widths = {module: width_of(module) for module in modules}
    else:
        widths = {**observed_widths(model, modules, example)}
    planned = []
    for module, names in modules.items():
        width = widths.get(module)
        if width is None:
            if example is None:
                raise UserError(
                    f"the width of {names[0]} ({class_name(module)}) is unknown; pass an input of the model as example="
                )
            raise UserError(
                f"the model does not call {names[0]} ({class_name(module)}): it may use its weights directly"
            )
        new = adapt_module(factory(width), like=module, model=model)
        if new is not None:
            child = free_name(module, name)
            what = f"{class_name(new)} follows {class_name(module)}, {width} wide, as .{child}"
            # All modules are made before any is put in: what a factory refuses leaves the model as it was.
            planned += [(module, child, new, Change(" = ".join(names), what, count_parameters(new)), names, width)]
    undo = [_add_follower(module, child, new) for module, child, new, *_ in planned]
    if example is not None:
        try:
            run_once(model, example, {})
        except Exception:
            for step in undo:
                step()
            raise
    for _, child, _, _, names, width in planned:
        note_in_configs(model, factory, names, verb="insert_after", child=child, width=width)
    return Changes(tuple(change for _, _, _, change, *_ in planned))


class _RunChild:
    """A forward hook that hands what its module gives to one of the module's children.

    It finds the child by name, so that a copy of the module runs the child's copy.
    """

    def __init__(self, child: str):
        self.child = child
        self.hook_id = -1

    def __call__(self, module: nn.Module, args: object, output: object) -> object:
        new = getattr(module, self.child)
        if isinstance(output, Tensor):
            return new(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (new(output[0]), *output[1:])
        raise TypeError(
            f"{class_name(module)} returns {type(output).__name__}; "
            "only a tensor, or a first one in a tuple, is followed"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Hooks are numbered by process: after unpickling, a later hook would get our number and displace us.
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.hook_id + 1)


def _add_follower(module: nn.Module, child: str, new: nn.Module) -> Callable[[], None]:
    """Run `new` after `module` as its child; returns what undoes it."""
    module.add_module(child, new)
    handle = None
    # A hook and not a wrapper: copies and exports of the module keep it, and no key of the state dict moves.
    if type(module).forward is not nn.Sequential.forward:  # that one runs its new last child by itself
        hook = _RunChild(child)
        handle = module.register_forward_hook(hook)
        hook.hook_id = handle.id

    def undo() -> None:
        delattr(module, child)
        if handle is not None:
            handle.remove()

    return undo
