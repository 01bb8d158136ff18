"""Answers that are no finite numbers are refused, in a line that names the weights and the layer they come from."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from provenn.core.errors import UserError

LARGEST_PARAMETER = 2.0**64  # its square is the first power of two that float32 has not: norms of it are nothing
HUGE = 1e10  # of an input: float32 has no fourth power of it, and nothing standardised comes near
DAMAGED = "give other weights, these are damaged or their training diverged"


def is_finite(values: Any) -> bool:
    """Whether all floating and complex tensors in nested values are finite.

    >>> is_finite((torch.ones(2), {"mask": torch.tensor([True])})), is_finite([torch.tensor([1.0, torch.nan])])
    (True, False)
    """
    return all(bool(tensor.isfinite().all()) for tensor in _numbers_in(values))


def impossible_value(name: str, values: Tensor, own: Tensor) -> str | None:
    """What is wrong with the values of a tensor of a model; None where nothing is.

    A constant beside the parameters may be infinite where the model has it so, as one is that hides the future.

    Args:
        name: of the tensor in the model, such as `norm.running_var`.
        values: what it gets.
        own: the model's tensor of that name, an `nn.Parameter` where it is one.

    >>> impossible_value("norm.running_var", torch.tensor([1.0, -2.0]), torch.ones(2))
    'norm.running_var holds -2, and a variance is never negative'
    """
    values = values.float() if values.is_floating_point() and values.element_size() < 2 else values
    hides = own.is_floating_point() and not isinstance(own, nn.Parameter) and bool(own.isinf().any())
    if bool(values.isnan().any() if hides else ~values.isfinite().all()):
        return f"{name} holds values that are no finite numbers"
    if isinstance(own, nn.Parameter) and values.numel() and values.abs().max() > LARGEST_PARAMETER:
        return f"{name} holds values up to {values.abs().max():.3g}, whose squares are too large for float32"
    if name.rpartition(".")[2] == "running_var" and bool((values < 0).any()):
        return f"{name} holds {values.min().item():.4g}, and a variance is never negative"
    return None


def check_answer(values: np.ndarray | float, given: str) -> None:
    """Refuse what became of a model's finite output on the scale of the data.

    Raises:
        UserError: it is not finite, with what an error calls the input.
    """
    if not np.isfinite(values).all():
        raise UserError(
            f"{given}: on the scale of the data the answer is no finite number: give values like those that were "
            "trained on"
        )


@contextmanager
def finite_outputs(model: nn.Module, weights: str, given: str = "the input") -> Iterator[None]:
    """Inside, a model whose output is not finite is refused, and so is an input that is not.

    Only what a model hands out is checked: the output of its forward pass, or, where one of its other methods was
    called, of each layer that this method calls. On failure the pass runs again to find the layer.

    Args:
        model: in eval mode.
        weights: what an error calls its weights, such as their file.
        given: what an error calls the input, such as its file.

    Raises:
        UserError: an output that is not finite, with the first layer whose output is not while its inputs were.
    """
    depth, first = 0, True  # modules that run now; nothing that the model handed out has been checked

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal depth, first
        try:
            if depth == 1 and not is_finite(output):
                # What is given to a later layer, by another method than `forward`, is the model's own doing.
                raise UserError(_reason(model, module, args, kwargs, weights, given if first else None))
            first = first and depth > 1
        finally:
            depth -= 1

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reason(
    model: nn.Module,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weights: str,
    given: str | None,
) -> str:
    """Why an output is not finite: the input, where there is one, a tensor of the model, or the first such layer."""
    if given is not None and not is_finite((args, kwargs)):
        return f"{given}: what the model is given holds values that are no finite numbers, or too large for it"
    tensors = [*model.named_parameters(), *model.named_buffers()]
    wrong = next(filter(None, (impossible_value(name, tensor, tensor) for name, tensor in tensors)), None)
    if wrong is not None:
        return f"{weights}: {wrong}: {DAMAGED}"
    layer, inputs = _first_layer(module, args, kwargs)
    name = next((name for name, part in model.named_modules() if part is layer and name), "the model")
    says = (
        f"the first layer whose output is not finite is {name} ({type(layer).__name__}), "
        f"with inputs up to {_largest(inputs):.3g} and parameters up to {_largest(list(layer.parameters())):.3g}"
    )
    reached = _largest((args, kwargs))
    if given is not None and reached > HUGE and reached > _largest([tensor for _, tensor in tensors]):
        return f"{given}: its values reach {reached:.3g} as the model sees them: {says}; give smaller values"
    return f"{weights}: {says}: {DAMAGED}"


def _first_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The first layer to end with an output that is not finite where its inputs were, and these inputs.

    A mask of minus infinity may go in, and what only adds one is no culprit as long as there is another.
    """
    culprits: list[tuple[bool, nn.Module, Any]] = []

    def look(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not is_finite(output) and not _overflows((args, kwargs)):
            culprits.append((not _overflows(output), part, (args, kwargs)))

    handles = [part.register_forward_hook(look, with_kwargs=True) for part in module.modules()]
    try:
        module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    _, layer, inputs = min(culprits, key=lambda culprit: culprit[0], default=(False, module, (args, kwargs)))
    return layer, inputs


def _overflows(values: Any) -> bool:
    """Whether there is a NaN or plus infinity, which no mask holds."""
    return any(bool((tensor.isnan() | tensor.isposinf()).any()) for tensor in _numbers_in(values))


def _largest(values: Any) -> float:
    """The largest magnitude, whatever is not a number left out."""
    magnitudes = (tensor.abs().nan_to_num(nan=0, posinf=math.inf) for tensor in _numbers_in(values) if tensor.numel())
    return max((each.max().item() for each in magnitudes), default=0.0)


def _numbers_in(values: Any) -> Iterator[Tensor]:
    """The floating tensors in nested values, and complex ones as real and imaginary parts."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            yield torch.view_as_real(leaf) if leaf.is_complex() else leaf


def check_type(name: str, tensor: Tensor, expected: Tensor, source: str) -> None:
    """Can a stored tensor's type stand for the model's: any floats for floats, no whole numbers, no quantised codes?

    Counters, which averaging makes floats, are taken as they come.

    Raises:
        UserError: it cannot, with the name of the tensor.
    """
    if tensor.dtype == expected.dtype or tensor.is_floating_point():
        return
    if expected.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        raise UserError(
            f"{source}: {name} is of type {_type_of(tensor)} where the model has {_type_of(expected)}: "
            "give weights of floating-point numbers"
        )


def _type_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
