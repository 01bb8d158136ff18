"""Where a DCAL system has its answer from, for `provenn inspect`."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.errors import UserError
from provenn.papers.dcal.model import DCAL, Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, "height width"]]:
    """The share of each patch in the attention rollout of the class token, and 1 at each query of GLCA."""
    found = _explained(model, x)
    chosen = torch.zeros_like(found.rollout)
    chosen[found.chosen[:, 0], found.chosen[:, 1]] = 1
    return {"attention rollout": found.rollout, "queries of GLCA": chosen}


def draw(model: nn.Module, x: Float[Tensor, "1 channels height width"], meta: dict[str, Any], axes: "Axes") -> None:
    """The image as the network sees it, the rollout over it, and the queries of GLCA in frames."""
    from matplotlib.patches import Rectangle

    found = _explained(model, x)
    height, width = x.shape[-2:]
    mean, std = (torch.tensor(meta[name])[:, None, None] for name in ("mean", "std"))
    picture = (x[0].cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)
    rows, columns = found.rollout.shape
    patch_height, patch_width = height / rows, width / columns
    shares = F.interpolate(found.rollout[None, None].float().cpu(), (height, width), mode="nearest")[0, 0]
    axes.imshow(picture.numpy(), cmap="gray", extent=(0, width, height, 0))
    drawn = axes.imshow(shares.numpy(), cmap="inferno", alpha=0.45, extent=(0, width, height, 0))
    for row, column in found.chosen.tolist():
        corner = (column * patch_width, row * patch_height)
        axes.add_patch(Rectangle(corner, patch_width, patch_height, fill=False, edgecolor="#33d17a", linewidth=2))
    axes.figure.colorbar(drawn, ax=axes, label="share in the rollout", format="%.3g")
    axes.set_title(
        f"attention rollout; in frames the {len(found.chosen)} patches that GLCA takes as queries", fontsize=9
    )


def _explained(model: nn.Module, x: Tensor) -> Explanation:
    if not isinstance(model, DCAL):
        raise UserError(f"{type(model).__name__} has no GLCA: take a preset whose name begins with dcal")
    return model.explain(x)
