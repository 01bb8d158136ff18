"""Modules of a model by their names: which ones a pattern or a type means, and what they are called."""

import re
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from provenn.core.errors import UserError

Target = str | type[nn.Module]


def find_modules(model: nn.Module, where: Target | Sequence[Target]) -> dict[nn.Module, list[str]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    targets = [where] if isinstance(where, str | type) else list(where) if isinstance(where, Sequence) else [where]
    if not all(isinstance(target, str | type) for target in targets):
        raise TypeError(f"where must be a name pattern, a module class, or a list of them, got {where!r}")
    names = names_of_modules(model)
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
        kinds = Counter(class_name(module) for module in names_of_modules(model))
        listed = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(12))
        return f"no {target.__name__} in this {class_name(model)}; it has {listed or 'no modules inside'}"
    # Names that differ in their numbers alone are one choice: layers.0.norm and layers.1.norm read layers.*.norm.
    names = sorted(
        {re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for called in names_of_modules(model).values() for name in called}
    )
    close = get_close_matches(re.sub(r"(?<![^.])\d+(?![^.])", "*", target), names, n=5, cutoff=0.5)
    hint = f"close to it are {', '.join(close)}" if close else f"there are {', '.join(names[:12]) or 'none'}"
    return f"no module of this {class_name(model)} is called {target!r}; {hint}"


def names_of_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module but the model itself, with all the names that it goes by."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names.setdefault(module, []).append(name)
    return names


def names_of_parameters(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def set_module(model: nn.Module, names: Sequence[str], module: nn.Module) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def class_name(module: nn.Module) -> str:
    return type(module).__name__


def free_name(module: nn.Module, name: str) -> str:
    """`name`, or the first of name_2, name_3, … that the module does not use."""
    candidates = (name if number == 1 else f"{name}_{number}" for number in range(1, len(module._modules) + 3))
    return next(candidate for candidate in candidates if not hasattr(module, candidate))
