"""What of a model learns: parameters by their names, or additions by peft (LoRA and others) to a model that is frozen.

All of it is for `Stage.learning`, or for a model that is trained by `fit`. peft comes with `pip install 'provenn[hf]'`.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from provenn.core.errors import UserError


def named_parameters(model: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """The parameters whose names meet one of several patterns, such as "projector.*" or "*.attention.*.weight".

    Args:
        model: whose parameters.
        patterns: as of a shell; a pattern without a wildcard also stands for all below a module of that name.

    Raises:
        UserError: a pattern that no name meets, with names that there are.
    """
    named = dict(model.named_parameters())
    met: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        some = [name for name in named if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not some:
            tops = dict.fromkeys(".".join(name.split(".")[:2]) for name in named)
            raise UserError(f"no parameter is called {pattern!r}; there are {', '.join(list(tops)[:8])}, …")
        met |= {name: named[name] for name in some}
    return list(met.values())


def freeze(model: nn.Module, *patterns: str) -> nn.Module:
    """The model itself, in place: parameters with these names learn no more.

    Raises:
        UserError: a pattern that no name meets.
    """
    for parameter in named_parameters(model, patterns):
        parameter.requires_grad_(False)
    return model


@contextmanager
def learning(model: nn.Module, *patterns: str) -> Iterator[nn.Module]:
    """Inside, the parameters with these names learn, and no others; for `Stage.learning`.

        Stage("align", task, data, recipe, lambda model: learning(model, "model.projector"))

    Raises:
        UserError: a pattern that no name meets.
    """
    chosen = {id(parameter) for parameter in named_parameters(model, patterns)}
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in asked:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield model
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)


def add_low_rank(
    model: nn.Module, targets: Sequence[str], *, rank: int = 8, alpha: float | int | None = None, **lora: Any
) -> nn.Module:
    """The model itself, in place, frozen, with low-rank additions that learn (Hu et al., 2021, arXiv:2106.09685).

        W ← W + (α / r) B A,   B starts at 0

    Args:
        model: any; nothing of it is copied.
        targets: which linear maps: ends of their names, such as ("query", "value").
        rank: r.
        alpha: α. Default: r.
        lora: more of `peft.LoraConfig`, such as lora_dropout, use_dora or modules_to_save.

    Raises:
        UserError: without peft, a target that is not there, or numbers that peft refuses.
    """
    config = _peft().LoraConfig
    if rank < 1:
        raise UserError(f"rank must be at least 1, got {rank}")
    return add_adapters(model, config, target_modules=list(targets), r=rank, lora_alpha=alpha or rank, **lora)


def add_adapters(model: nn.Module, kind: Any, **options: Any) -> nn.Module:
    """The model itself, in place, frozen, with additions of peft that learn.

    Args:
        model: any.
        kind: a configuration of peft that works layer by layer, such as `peft.IA3Config` or `peft.LoHaConfig`.
        options: of it.

    Raises:
        UserError: without peft, or what it refuses.
    """
    peft = _peft()
    targets = options.get("target_modules") or []
    names = [name for name, _ in model.named_modules()]
    for target in targets if not isinstance(targets, str) else []:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = dict.fromkeys(
                n.rpartition(".")[2] for n, part in model.named_modules() if isinstance(part, nn.Linear)
            )
            raise UserError(f"no layer is called {target!r}; linear maps are called {', '.join(ends)}")
    try:
        model.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft thinks of a model that is none of transformers'
            peft.inject_adapter_in_model(kind(**options), model)
    except (ValueError, TypeError) as error:
        raise UserError(f"peft refuses this: {' '.join(str(error).split())[:200]}") from None
    return model


def merge_adapters(model: nn.Module) -> nn.Module:
    """The model itself, in place, with its additions by peft merged into its weights, all of which learn again.

    Raises:
        UserError: there are none, or such that cannot be merged.
    """
    layer_kind = _peft().tuners.tuners_utils.BaseTunerLayer
    found = [name for name, part in model.named_modules() if isinstance(part, layer_kind)]
    if not found:
        raise UserError(f"{type(model).__name__} has no additions by peft to be merged")
    # The innermost last: a layer that is replaced takes what lies below it along.
    for name in found:
        parent, _, last = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        try:
            layer.merge(safe_merge=True)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{name}: cannot be merged: {' '.join(str(error).split())[:150]}") from None
        setattr(model.get_submodule(parent) if parent else model, last, layer.get_base_layer())
    return model.requires_grad_(True)


@contextmanager
def low_rank(model: nn.Module, targets: Sequence[str], **options: Any) -> Iterator[nn.Module]:
    """Inside, low-rank additions learn and nothing else; afterwards they are part of the weights.

    Args:
        model: any.
        targets, options: as of `add_low_rank`.

    Raises:
        UserError: as of `add_low_rank`.
    """
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    add_low_rank(model, targets, **options)
    try:
        yield model
    finally:
        merge_adapters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked[name])


def count_learning(model: nn.Module) -> int:
    """How many parameters learn: what additions of different kinds are made equal by."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("low-rank additions and other adapters need peft: pip install 'provenn[hf]'") from None
    return peft
