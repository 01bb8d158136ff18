"""What `provenn inspect gaam` shows: the Importance Factor of layers and features."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.narrowing import present
from provenn.papers.gaam.layers import importance_factor, layer_shares
from provenn.papers.gaam.model import AudioClassifier, StackClassifier

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def inspect(model: nn.Module, x: Any) -> dict[str, Tensor]:
    """The Importance Factor, a row of features a layer, and each layer's share in it, over all that was given."""
    factor = factor_of(model, x)
    return {"importance": factor, "share of layers": layer_shares(factor)}


def factor_of(model: nn.Module, x: Any) -> Tensor:
    """The factor of the mean gate over a batch: frames with their mask of a sound, or stacks.

    Raises:
        UserError: a model without a gate.
    """
    decoder = model.decoder if isinstance(model, AudioClassifier) else model
    if not isinstance(decoder, StackClassifier) or not decoder.gated:
        raise UserError("only decoders with a gate or a mixture have an Importance Factor")
    stacks = model.encoder(*x) if isinstance(model, AudioClassifier) else x
    return importance_factor(decoder.weights(stacks).mean(dim=0))


def draw(model: nn.Module, x: Any, meta: dict[str, Any], axes: "Axes") -> None:
    """The heat map, layers from the top down, each with its share."""
    with torch.no_grad():
        factor = factor_of(model, x).float().cpu()
    shares = layer_shares(factor).tolist()
    axes.set_axis_on()
    image = axes.imshow(factor.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(shares)), [f"layer {k + 1}: {share:.1%}" for k, share in enumerate(shares)])
    axes.set(xlabel="feature")
    present(axes.figure, "figure").colorbar(image, ax=axes, label="Importance Factor")
