"""Hedgehog's stable features, [softmax(y), softmax(−y)] with y = x W + b: by definition, and quicker on a CPU."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import backward_without_autocast, is_differentiated, is_transformed, plain_gradients

FLOOR = 1e-12
SHORT = 200  # tokens up to which attention takes features that lie in columns; chunks of longer sequences want rows
LARGEST = 1e18  # a sum of exponentials whose square, and its reciprocal, are still numbers of float32


def mirrored_softmax(
    x: Float[Tensor, "batch heads tokens head_dim"],
    weight: Float[Tensor, "heads head_dim width"],
    bias: Float[Tensor, "heads 1 width"] | None,
) -> Float[Tensor, "batch heads tokens features"]:
    """[softmax(y), softmax(−y)] with y = x W_h + b_h, each half at least 1e-12, by the quickest way for the device.

    Args:
        x: in float32 or float64, as are `weight` and `bias`.
        weight, bias: W and b of each head.

    The features are twice as many as `width`.
    """
    traced = torch.compiler.is_compiling() or is_transformed()
    if traced or x.device.type != "cpu" or x.shape[-2] > SHORT or not x.numel():
        return plain_mirrored_softmax(x, weight, bias)
    if not torch.is_grad_enabled():
        return _features(x, weight, bias)[0]
    return cast(Tensor, MirroredSoftmax.apply(x, weight, bias))


def plain_mirrored_softmax(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition in PyTorch's own operations; y and −y by one product, which is quicker than to copy y."""
    y = x @ torch.cat([weight, -weight], dim=-1)
    if bias is not None:
        y = y + torch.cat([bias, -bias], dim=-1)
    halves = y.unflatten(-1, (2, -1)).softmax(dim=-1)
    # Not by `clamp_min` where a gradient is taken: its own takes eight times as long.
    halves = F.threshold(halves, FLOOR, FLOOR) if torch.is_grad_enabled() else halves.clamp_min_(FLOOR)
    return halves.flatten(-2)


def _features(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, bool]:
    """The features, by one exponential and its reciprocal, and whether any may be at its floor.

    They are laid out as (batch, heads, sign, width, tokens): what is done to all features of a token, a sum and a
    division, then runs along whole vectors of tokens, which takes a third of the time.
    """
    y = weight.mT @ x.mT
    if bias is not None:
        y += bias.mT
    batch, heads, width, tokens = y.shape
    features = y.new_empty(batch, heads, 2, width, tokens)
    positive, negative = features.unbind(2)
    torch.reciprocal(torch.exp(y, out=positive), out=negative)
    total = features.sum(dim=3, keepdim=True)
    # No e^|y| is larger than the largest sum, so no feature is less than one over its square.
    largest = total.amax().item()
    if largest <= LARGEST:
        features /= total
    else:
        torch.softmax(y, dim=2, out=positive)
        torch.softmax(-y, dim=2, out=negative)
    floored = not largest**2 <= 1 / FLOOR
    if floored:
        features.clamp_min_(FLOOR)
    return features.flatten(2, 3).mT, floored


class MirroredSoftmax(torch.autograd.Function):
    """`_features` of (x, W, b). With p a half of them and g its gradient, ∂L/∂(±y) = p·(g − Σ g·p); 0 at the floor."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None):
        features, ctx.floored = _features(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, features)
        return features

    @staticmethod
    @backward_without_autocast
    def backward(ctx, grad: Tensor):
        x, weight, bias, features = ctx.saved_tensors
        if is_differentiated():
            inputs = (x, weight) if bias is None else (x, weight, bias)
            return (*plain_gradients(plain_mirrored_softmax, inputs, grad), None)[:3]
        features, grad = (z.mT.contiguous().unflatten(2, (2, -1)) for z in (features, grad))
        if ctx.floored:
            features = F.threshold(features, FLOOR, 0)
        positive, negative = (grad - (grad * features).sum(dim=3, keepdim=True)).mul_(features).unbind(2)
        grad_y = positive - negative
        grads: list[Any] = [None, None, None]
        if ctx.needs_input_grad[0]:
            grads[0] = grad_y.mT @ weight.mT
        if ctx.needs_input_grad[1]:
            grads[1] = (x.mT @ grad_y.mT).sum(dim=0)
        if ctx.needs_input_grad[2]:
            grads[2] = grad_y.sum(dim=(0, 3)).unsqueeze(1)
        return tuple(grads)
