"""Which regions of a scene a question opens, for `provenn inspect`."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.lscenellm.model import LSceneLLM

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Regions(NamedTuple):
    """What each token of a question opened.

    Args:
        centres: of the sparse tokens.
        opened: by the number of a layer.
    """

    centres: Float[Tensor, "parents 3"]
    opened: dict[int, Bool[Tensor, "tokens parents"]]


@torch.no_grad()
def regions_of(model: nn.Module, x: dict[str, Any]) -> Regions:
    """Which regions the tokens of a question open, the prompt's last token among them, which says the first word.

    Raises:
        UserError: a model without a magnifier.
    """
    if not isinstance(model, LSceneLLM) or model.magnifier is None:
        raise UserError(f"{type(model).__name__} has no scene magnifier: take a preset of lscenellm, with magnify")
    device = next(model.parameters()).device
    tokens = model.tokenise(x["scenes"].to(device))
    reading, place = model.read(x["tokens"].to(device), tokens)
    opened = {number: mask[0, place[0]].cpu() for number, mask in model.magnifier.opened(reading).items()}
    # Nobody reads what the last layer opens.
    return Regions(tokens.centres[0].cpu(), {number: opened[number] for number in sorted(opened)[:-1]})


def inspect(model: nn.Module, x: dict[str, Any]) -> dict[str, Tensor]:
    """The share of regions that each token of the question opens in each layer."""
    found = regions_of(model, x)
    return {f"layer {number}": opened.float().mean(-1) for number, opened in found.opened.items()}


def draw(model: nn.Module, x: dict[str, Any], meta: dict[str, Any], axes: "Axes") -> None:
    """The scene from above, and around each region a ring as thick as layers in which the question's end opened it."""
    found = regions_of(model, x)
    cloud = x["cloud"]
    chosen = torch.linspace(0, len(cloud) - 1, min(len(cloud), 20_000)).long()
    points, colours = (torch.from_numpy(part)[chosen] for part in (cloud.points, cloud.colours))
    order = points[:, 2].argsort()  # higher points over lower ones
    x_axis, y_axis = points[order, :2].T.numpy()
    axes.scatter(x_axis, y_axis, s=3, c=colours[order].numpy(), linewidths=0)
    axes.set_aspect("equal")
    last = torch.stack([opened[-1] for opened in found.opened.values()]).sum(0)
    across, along = found.centres[:, :2].T.numpy()
    axes.scatter(across, along, s=200, facecolors="none", edgecolors="#777777", alpha=0.4)
    axes.scatter(across, along, s=200, facecolors="none", edgecolors="#e01b24", linewidths=(1.2 * last).tolist())
    asked = " ".join(x["names"])
    share = torch.stack([opened[-1].float().mean() for opened in found.opened.values()]).mean()
    layers = f"{len(found.opened)} layer{'s' * (len(found.opened) != 1)}"
    axes.set_title(f"{asked}\n{share:.0%} of the regions open, in {layers}", fontsize=9)
    axes.set_xlabel("metres")
