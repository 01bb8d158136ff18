"""Put layers into a model that already exists: after a module, or instead of one.

Models are changed in place, and any `nn.Module` will do. The modules to change are named by a pattern over their names,
by a type, or by several of these:

- `"resnet.encoder.stages.*.layers.*.layer"`: `*` stands for one name or a part of it, `**` for any number of names;
- `nn.ReLU`: every module of this type or of one derived from it.

>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
>>> print(swap(model, nn.ReLU, lambda relu: nn.PReLU()))
1: ReLU becomes PReLU, +1 parameters
1 change, +1 parameters
>>> print(insert_after(model, nn.Conv2d, nn.BatchNorm2d, name="norm"))
0: BatchNorm2d follows Conv2d, 8 wide, as .norm, +16 parameters
2: BatchNorm2d follows Conv2d, 4 wide, as .norm, +8 parameters
2 changes, +24 parameters
"""

import inspect
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.surgery.notes import describe_factory, note_change

Target = str | type[nn.Module]
Example = Any  # a tensor, a tuple of positional or a dict of keyword arguments: whatever the model takes


@dataclass(frozen=True)
class Change:
    """One module that surgery changed: what happened there, and how many parameters came or went."""

    name: str
    what: str
    parameters: int

    def __str__(self) -> str:
        return f"{self.name}: {self.what}, {self.parameters:+,} parameters"


@dataclass(frozen=True)
class Changes:
    """All that one call changed; printing it gives a line for each module and the sum."""

    changes: tuple[Change, ...]

    @property
    def parameters(self) -> int:
        """How many parameters the model gained, or lost where negative."""
        return sum(change.parameters for change in self.changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def __str__(self) -> str:
        total = f"{len(self)} change{'s' if len(self) != 1 else ''}, {self.parameters:+,} parameters"
        return "\n".join([*map(str, self), total])


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

    The new module becomes a child of the one that it follows, so no existing key of the state dict changes: pretrained
    weights load into the changed model with `strict=False`, and the new keys are `<module>.<name>.…`. It takes what the
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

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    >>> print(insert_after(model, "0", nn.BatchNorm2d, name="norm", example=torch.zeros(1, 3, 4, 4)))
    0: BatchNorm2d follows Conv2d, 8 wide, as .norm, +16 parameters
    1 change, +16 parameters
    """
    modules = _find(model, where)
    for module, names in modules.items():
        if others := set(_names(model)[module]) - set(names):
            raise UserError(
                f"{names[0]} and {', '.join(sorted(others))} are one module, so what follows one follows both; "
                "name them all, or give the model a copy of its own first"
            )
    if width is not None:
        widths: dict[nn.Module, int | None] = dict.fromkeys(modules, width)
    elif example is None:
        widths = {module: _width(module) for module in modules}
    else:
        widths = {**_observed_widths(model, modules, example)}
    planned = []
    for module, names in modules.items():
        width = widths.get(module)
        if width is None:
            if example is None:
                raise UserError(
                    f"the width of {names[0]} ({_class_name(module)}) is unknown; "
                    "pass an input of the model as example="
                )
            raise UserError(
                f"the model does not call {names[0]} ({_class_name(module)}): it may use its weights directly"
            )
        new = _adapt_module(factory(width), like=module, model=model)
        if new is not None:
            child = _free_name(module, name)
            what = f"{_class_name(new)} follows {_class_name(module)}, {width} wide, as .{child}"
            # All modules are made before any is put in: what a factory refuses leaves the model as it was.
            planned += [(module, child, new, Change(" = ".join(names), what, count_parameters(new)), names, width)]
    undo = [_add_follower(module, child, new) for module, child, new, *_ in planned]
    if example is not None:
        try:
            _run(model, example, {})
        except Exception:
            for step in undo:
                step()
            raise
    for _, child, _, _, names, width in planned:
        _note(model, factory, names, verb="insert_after", child=child, width=width)
    return Changes(tuple(change for _, _, _, change, *_ in planned))


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

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> print(swap(model, "1", lambda old: nn.GELU(), example=torch.zeros(1, 2)))
    1: ReLU becomes GELU, +0 parameters
    1 change, +0 parameters
    """
    planned = []
    replaced: list[str] = []
    for old, names in _find(model, where).items():
        names = [name for name in names if not any(name.startswith(f"{outer}.") for outer in replaced)]
        new = _adapt_module(factory(old), like=old, model=model) if names else None
        if new is not None:
            planned += [(old, names, new)]
            replaced += names
    expected = {} if example is None else _observed_shapes(model, [old for old, _, _ in planned], example)
    kept = {} if example is None else _text_errors(model, example)
    changes = []
    for old, names, new in planned:
        # Counted on the whole model: a swapped module's weights may be tied to others that stay.
        before, size = _parameter_names(model), count_parameters(model)
        _set_module(model, names, new)
        after = _parameter_names(model)
        what = f"{_class_name(old)} becomes {_class_name(new)}"
        for parameter in old.parameters():
            untied = [key for key in before[parameter] if key not in after.get(parameter, [key])]
            if untied:
                what += f" (no longer tied to {after[parameter][0]}: {', '.join(untied)})"
        changes += [Change(" = ".join(names), what, count_parameters(model) - size)]
    if example is not None:
        try:
            shapes_after = _observed_shapes(model, [new for _, _, new in planned], example)
            for old, names, new in planned:
                if shapes_after.get(new) != expected.get(old):
                    raise UserError(
                        f"{names[0]}: {_class_name(old)} gave {_describe_shape(expected.get(old))} for this example, "
                        f"{_class_name(new)} gives {_describe_shape(shapes_after.get(new))}; the change is undone"
                    )
            if lost := _lost_property(kept, _text_errors(model, example)):
                raise UserError(f"{_blame(model, planned, example, kept)}{lost}; the change is undone")
        except Exception as error:  # whatever a stranger's module raises
            # From the last to the first, so that a name is resolved in the model that it was found in.
            for old, names, _ in reversed(planned):
                _set_module(model, names, old)
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())
            raise UserError(
                f"the changed model does not run on the example: {type(error).__name__}: {reason}; the change is undone"
            ) from error
    _note(model, factory, [name for _, names, _ in planned for name in names], verb="swap")
    return Changes(tuple(changes))


def _note(model: nn.Module, factory: Callable[..., object], names: Sequence[str], **change: Any) -> None:
    """Let the Hugging Face models that were changed note it in their configs, so that they can be saved."""
    library: Any = sys.modules.get("transformers.modeling_utils")
    if library is None:  # then none of its models is there
        return
    hosts: dict[str, nn.Module] = {}
    for prefix, part in model.named_modules():
        inside = any(not host or prefix.startswith(f"{host}.") for host in hosts)
        if isinstance(part, library.PreTrainedModel) and not inside:
            hosts[prefix] = part
    for prefix, host in hosts.items():
        start = f"{prefix}." if prefix else ""
        changed = [name.removeprefix(start) for name in names if name.startswith(start)]
        if changed:
            note_change(cast(Any, host), {**change, "names": changed, "factory": describe_factory(factory)})


def remove(model: nn.Module, where: Target | Sequence[Target]) -> Changes:
    """Let each module that `where` names pass its input on unchanged. It must take one input and return one output.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    >>> print(remove(model, nn.Dropout))
    1: Dropout becomes Identity, +0 parameters
    1 change, +0 parameters
    """
    return swap(model, where, nn.Identity)


def _set_module(model: nn.Module, names: Sequence[str], module: nn.Module) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def _describe_shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"{shape}" if shape else "no tensor"


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module but the model itself, with all the names that it goes by."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names.setdefault(module, []).append(name)
    return names


def _parameter_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _find(model: nn.Module, where: Target | Sequence[Target]) -> dict[nn.Module, list[str]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    targets = [where] if isinstance(where, str | type) else list(where) if isinstance(where, Sequence) else [where]
    if not all(isinstance(target, str | type) for target in targets):
        raise TypeError(f"where must be a name pattern, a module class, or a list of them, got {where!r}")
    names = _names(model)
    modules: dict[nn.Module, list[str]] = {}
    unmatched = list(targets)
    for module, module_names in names.items():
        for target in targets:
            if isinstance(target, str):
                hits = [name for name in module_names if _matches(name.split("."), target.split("."))]
            else:
                hits = module_names if isinstance(module, target) else []
            if hits:
                unmatched = [other for other in unmatched if other != target]
                modules[module] = [name for name in module_names if name in hits or name in modules.get(module, [])]
    if unmatched or not targets:
        raise UserError(_nothing_matches(model, unmatched[0]) if unmatched else "`where` is empty: name a module")
    return modules


def _matches(name: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_matches(name[i:], pattern[1:]) for i in range(len(name) + 1))
    # Name by name, so that `*` never crosses a dot.
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _matches(name[1:], pattern[1:])


def _nothing_matches(model: nn.Module, target: Target) -> str:
    if not isinstance(target, str):
        kinds = Counter(_class_name(module) for module in _names(model))
        listed = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(12))
        return f"no {target.__name__} in this {_class_name(model)}; it has {listed or 'no modules inside'}"
    # Names that differ in their numbers alone are one choice: layers.0.norm and layers.1.norm read layers.*.norm.
    names = sorted({re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for called in _names(model).values() for name in called})
    close = get_close_matches(re.sub(r"(?<![^.])\d+(?![^.])", "*", target), names, n=5, cutoff=0.5)
    hint = f"close to it are {', '.join(close)}" if close else f"there are {', '.join(names[:12]) or 'none'}"
    return f"no module of this {_class_name(model)} is called {target!r}; {hint}"


def _class_name(module: nn.Module) -> str:
    return type(module).__name__


def _free_name(module: nn.Module, name: str) -> str:
    """`name`, or the first of name_2, name_3, … that the module does not use."""
    candidates = (name if number == 1 else f"{name}_{number}" for number in range(1, len(module._modules) + 3))
    return next(candidate for candidate in candidates if not hasattr(module, candidate))


def _adapt_module(new: object, *, like: nn.Module, model: nn.Module) -> nn.Module | None:
    """What a factory gave, on the device, in the precision and in the mode of what it joins."""
    if new is None:
        return None
    if not isinstance(new, nn.Module):
        raise TypeError(
            f"the factory must return an nn.Module (or None to leave a module alone), got {type(new).__name__}"
        )
    reference = next(iter(like.parameters()), None)
    reference = next(iter(model.parameters()), None) if reference is None else reference
    if reference is not None:
        # Integers of a quantised host are no precision that new weights could be in.
        new.to(device=reference.device, dtype=reference.dtype if reference.is_floating_point() else None)
    return new if new.training == like.training else new.train(like.training)


def _width(module: nn.Module) -> int | None:
    """Channels or features that a module gives: its own figure, or that of the last of its children to have one."""
    for candidate in [module, *reversed(list(module.modules()))]:
        for attribute in ("out_channels", "out_features", "num_features", "embed_dim", "embedding_dim"):
            if isinstance(width := getattr(candidate, attribute, None), int):
                return width
        if isinstance(candidate, nn.GroupNorm):
            return candidate.num_channels
        if isinstance(candidate, nn.LayerNorm | nn.RMSNorm):
            return candidate.normalized_shape[-1]
    return None


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
            f"{_class_name(module)} returns {type(output).__name__}; "
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


# Properties of a model of tokens, and how far outputs may be off, in roundings of the largest of them.
PROPERTIES = {
    "causality": ("a token moves outputs before it", 100),
    "padding": ("padding moves outputs of the text", 10_000),
    "cache": ("a text read on from a cache gives other outputs than the whole text", 10_000),
}
MOST = 0.1  # of the largest output, where roundings are large


def _text_errors(model: nn.Module, example: Example) -> dict[str, float]:
    """By how much a model of tokens breaks each of `PROPERTIES`, as a share of what it may.

    A property that cannot be tried on this model and example is left out.
    """
    first = example[0] if isinstance(example, tuple) and example else example
    x = first.get("input_ids") if isinstance(first, dict) else first
    if not isinstance(x, Tensor) or (x.dim(), x.is_floating_point()) not in ((2, False), (3, True)) or x.shape[1] < 2:
        return {}
    by_name = isinstance(example, dict)
    takes = inspect.signature(model.forward).parameters
    given = {name: value for name, value in example.items() if name != "labels"} if by_name else {}

    def outputs(*args: Tensor, **named: Any) -> Any:
        kept: list[Any] = []
        _run(model, named or args, {model: lambda module, args, output: kept.append(output)})
        return kept[0]

    def of_tokens(changed: Tensor) -> Tensor | None:
        rest = example[1:] if isinstance(example, tuple) else ()
        return _token_outputs(outputs(changed, *rest) if not by_name else outputs(**{**given, "input_ids": changed}), x)

    whole = of_tokens(x)
    if whole is None:
        return {}
    rounding = torch.finfo(next((p.dtype for p in model.parameters() if p.is_floating_point()), whole.dtype)).eps

    def share(name: str, error: Tensor) -> float:
        most = min(PROPERTIES[name][1] * rounding, MOST) * whole.abs().max().clamp_min(torch.finfo(whole.dtype).tiny)
        return float(error.abs().max() / most) if error.isfinite().all() else math.inf

    errors: dict[str, list[float]] = {}
    mixes = False
    for t in {1, x.shape[1] // 2, x.shape[1] - 1}:
        changed = x.clone()
        # Another token that the model knows: the vocabulary reaches up to the largest at least.
        changed[:, t] = changed[:, t] + 1 if x.is_floating_point() else (changed[:, t] + 1) % max(2, int(x.max()) + 1)
        moved = cast(Tensor, of_tokens(changed)) - whole
        mixes = mixes or bool(moved[:, t + 1 :].any()) or bool(moved[:, :t].any())
        errors.setdefault("causality", []).append(share("causality", moved[:, :t]))
    if not mixes:  # each token keeps to itself, which says nothing of an order
        errors.clear()
    if by_name and hasattr(model, "config") and whole.shape[1] == x.shape[1]:
        for name, attempt in (("padding", _padded_outputs), ("cache", _cached_outputs)):
            try:
                plain = _token_outputs(outputs(input_ids=x), x)
                tried = attempt(outputs, x, takes)
            except UserError:  # refused in one line: nothing goes wrong in silence
                continue
            except Exception:  # whatever a stranger's module raises
                errors[name] = [math.inf]
                continue
            errors |= {name: [share(name, one - plain) for one in tried]} if tried and plain is not None else {}
    return {name: max(each) for name, each in errors.items()}


def _token_outputs(output: Any, x: Tensor) -> Tensor | None:
    """The outputs of each token, where a model gives any."""
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    output = output[0] if isinstance(output, tuple) and output else output
    return (
        output.float() if isinstance(output, Tensor) and output.dim() > 2 and output.shape[:2] == x.shape[:2] else None
    )


def _padded_outputs(outputs: Callable[..., Any], x: Tensor, takes: Mapping[str, Any]) -> list[Tensor]:
    """The outputs of a text with padding before it, and with padding behind it."""
    if "attention_mask" not in takes:
        return []
    parts, room, tokens = [], 3, x.shape[1]
    for start in (room, 0) if "position_ids" in takes else (0,):
        wide, mask = x[:, :1].repeat(1, tokens + room), torch.zeros_like(x[:, :1]).repeat(1, tokens + room)
        wide[:, start : start + tokens], mask[:, start : start + tokens] = x, 1
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if start else {}
        output = _token_outputs(outputs(input_ids=wide, attention_mask=mask, **positions), wide)
        parts += [] if output is None else [output[:, start : start + tokens]]
    return parts


def _cached_outputs(outputs: Callable[..., Any], x: Tensor, takes: Mapping[str, Any]) -> list[Tensor]:
    """The outputs of a text that is read in three parts, the second of one token."""
    if "past_key_values" not in takes or "use_cache" not in takes:
        return []
    middle, past, parts = x.shape[1] // 2, None, []
    for part in x.split([middle, 1, x.shape[1] - middle - 1], dim=1):
        if part.shape[1]:
            output = outputs(input_ids=part, use_cache=True, **({} if past is None else {"past_key_values": past}))
            past, one = getattr(output, "past_key_values", None), _token_outputs(output, part)
            if past is None or one is None:
                return []
            parts.append(one)
    return [torch.cat(parts, dim=1)]


def _lost_property(before: dict[str, float], after: dict[str, float]) -> str | None:
    """What a model kept before and breaks now, and by how much; None where nothing."""
    for name, (broken, roundings) in PROPERTIES.items():
        if before.get(name, math.inf) <= 1 < after.get(name, 0):
            return f"{broken}, by {after[name]:.2g} times what {roundings:,} roundings allow"
    return None


def _blame(model: nn.Module, planned: Sequence[Any], example: Example, kept: dict[str, float]) -> str:
    """The first of the new modules that breaks a property by itself, with the old ones everywhere else."""
    for old, names, _ in reversed(planned):
        _set_module(model, names, old)
    for old, names, new in planned:
        _set_module(model, names, new)
        lost = _lost_property(kept, _text_errors(model, example))
        _set_module(model, names, old)
        if lost:
            return f"{names[0]}: with {_class_name(new)} instead of {_class_name(old)}, "
    return f"{planned[0][1][0]} and the others together: "


def _run(model: nn.Module, example: Example, hooks: dict[nn.Module, Callable]) -> None:
    """One forward pass in eval mode that leaves no trace in the model."""
    modes = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        model.eval()
        with torch.no_grad():
            if isinstance(example, dict):
                model(**example)
            else:
                model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _observed_widths(model: nn.Module, modules: dict[nn.Module, list[str]], example: Example) -> dict[nn.Module, int]:
    """The width that a module claims, if its output has it; else images (4-D or more) have it second, tokens last."""
    widths: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.dim() > 1:
            claimed = _width(module)
            shape = first.shape
            widths[module] = claimed if claimed and claimed in shape[1:] else shape[1 if len(shape) > 3 else -1]

    _run(model, example, dict.fromkeys(modules, note))
    return widths


def _observed_shapes(
    model: nn.Module, modules: Sequence[nn.Module], example: Example
) -> dict[nn.Module, tuple[int, ...]]:
    """The shape that each module gives, of a tuple its first; () for no tensor. A module not called is left out."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, args: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        shapes[module] = tuple(first.shape) if isinstance(first, Tensor) else ()

    _run(model, example, dict.fromkeys(modules, note))
    return shapes
