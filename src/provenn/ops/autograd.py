"""What hand-written backward passes share, so that they behave as PyTorch's own operations do.

Three things are left to whoever writes a `torch.autograd.Function`:

- Mixed precision. Its forward pass runs under the caller's autocast and its backward pass as a rule outside, so matrix
  products would take one type forward and another back. Sums over tokens want float32 anyway: both passes run
  `without_autocast`.
- Second derivatives. `once_differentiable` gives zeros, without a word, where the incoming gradient is a constant. A
  backward pass that `is_differentiated` is that of the plain form, by `plain_gradients`.
- `torch.func` and forward mode. Both see into plain operations only, so under either the plain form is what runs.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Where nothing is rounded to half precision: FFTs, exponentials and long sums need float32 at least."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # entering it would take as long as a small product
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def at_least_single(x: Tensor) -> Tensor:
    """In single precision where it has less: sums of exponentials, logarithms near zero and long sums need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def backward_without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the `backward` of a Function whose forward pass runs `without_autocast`."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        with without_autocast(grads[0]):
            return backward(ctx, *grads)

    return run


def is_differentiated() -> bool:
    """Whether a backward pass is itself recorded, to be differentiated again (`create_graph=True`).

    A compiler traces with gradients on, and refuses second derivatives itself.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_transformed() -> bool:
    """Whether a `torch.func` transform (vmap, grad, jvp, …) or forward mode is at work: they need plain operations.

    PyTorch has no public name for either question.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def plain_gradients(
    plain: Callable[..., Any], inputs: Sequence[Tensor], grads: Tensor | tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients of the inputs by differentiating the plain form, as operations that autograd records.

    Args:
        plain: the operation in PyTorch's own terms, a function of the inputs alone.
        inputs: what it is differentiated by.
        grads: the incoming gradient of each output.
    """
    return torch.func.vjp(plain, *inputs)[1](grads)


def check_fixed_length(tokens: int, loop: str) -> None:
    """Refuse to be exported for any number of tokens, before a `loop` over them is unrolled for one of them."""
    if isinstance(tokens, torch.SymInt):
        raise NotImplementedError(
            f"{loop} is unrolled where it is exported, which an open number of tokens cannot be: leave it fixed"
        )
