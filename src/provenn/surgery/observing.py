"""What the modules of a model give: run once on an example, or read off the modules."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Example = Any  # a tensor, a tuple of positional or a dict of keyword arguments: whatever the model takes


def run_once(model: nn.Module, example: Example, hooks: dict[nn.Module, Callable]) -> None:
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


def width_of(module: nn.Module) -> int | None:
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


def observed_widths(model: nn.Module, modules: dict[nn.Module, list[str]], example: Example) -> dict[nn.Module, int]:
    """The width that a module claims, if its output has it; else images (4-D or more) have it second, tokens last."""
    widths: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.dim() > 1:
            claimed = width_of(module)
            shape = first.shape
            widths[module] = claimed if claimed and claimed in shape[1:] else shape[1 if len(shape) > 3 else -1]

    run_once(model, example, dict.fromkeys(modules, note))
    return widths


def observed_shapes(
    model: nn.Module, modules: Sequence[nn.Module], example: Example
) -> dict[nn.Module, tuple[int, ...]]:
    """The shape that each module gives, of a tuple its first; () for no tensor. A module not called is left out."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, args: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        shapes[module] = tuple(first.shape) if isinstance(first, Tensor) else ()

    run_once(model, example, dict.fromkeys(modules, note))
    return shapes


def describe_shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"{shape}" if shape else "no tensor"
