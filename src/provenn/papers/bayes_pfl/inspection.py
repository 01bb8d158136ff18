"""Where a Bayes-PFL system sees a defect, and how sure it is, for `provenn inspect`."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.bayes_pfl.model import BayesPFL, Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, "height width"]]:
    """The probability of a defect at each pixel, the mean and its spread over prompts, and the mean of each layer."""
    found = _explained(model, x)
    system: Any = model
    layers = {f"layer {layer}": found.layers[place, 0] for place, layer in enumerate(system.layers)}
    return {"defect": found.heat[0], "spread over prompts": found.spread[0], **layers}


def draw(model: nn.Module, x: Float[Tensor, "1 channels height width"], meta: dict[str, Any], axes: "Axes") -> None:
    """The image as the network sees it, the probability of a defect over it, and lines where the prompts disagree."""
    found = _explained(model, x)
    height, width = x.shape[-2:]
    mean, std = (torch.tensor(meta[name])[:, None, None] for name in ("mean", "std"))
    picture = (x[0].cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)
    axes.imshow(picture.numpy(), extent=(0, width, height, 0))
    drawn = axes.imshow(found.heat[0].float().cpu().numpy(), cmap="inferno", alpha=0.5, extent=(0, width, height, 0))
    spread = found.spread[0].float().cpu()
    if spread.max() > spread.min():
        axes.contour(spread.numpy(), levels=3, colors="#33d17a", linewidths=0.8, extent=(0, width, 0, height))
    axes.figure.colorbar(drawn, ax=axes, label="probability of a defect", format="%.3g")
    axes.set_title(
        f"defective with {float(found.probability[0]):.0%} by the whole image; green: where prompts disagree",
        fontsize=9,
    )


def _explained(model: nn.Module, x: Tensor) -> Explanation:
    if not isinstance(model, BayesPFL):
        raise UserError(f"{type(model).__name__} samples no prompts: take a preset whose name begins with bayes")
    return model.explain(x)
