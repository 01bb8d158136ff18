"""What `provenn inspect rrnet` shows: which pixels an estimate hangs on."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.narrowing import of_kind
from provenn.papers.rrnet.model import Estimator
from provenn.papers.rrnet.spectra import Arm

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def inspect(model: nn.Module, x: Tensor) -> dict[str, Float[Tensor, " pixels"]]:
    """The gradient of each label's mean with respect to each pixel, in spreads of the label and of the pixel."""
    network = of_kind(model, Estimator, "the model")
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # its recurrence has no slopes in eval mode
        x = x.detach().clone().requires_grad_()
        means = network(x).mean.sum(0)
        slopes = [torch.autograd.grad(mean, x, retain_graph=True)[0][0] for mean in means]
    return dict(zip(network.names, slopes, strict=True))


def draw(model: nn.Module, x: Tensor, meta: dict[str, Any], axes: "Axes") -> None:
    """The spectrum by wavelength, above the slopes of each label, an arm beside the other."""
    slopes = inspect(model, x)
    if not meta:  # random weights: pixels have no wavelengths
        meta = {"arms": [[0, x.shape[1], 1]], "flux_mean": [0.0] * x.shape[1], "flux_std": [1.0] * x.shape[1]}
    flux = x[0].cpu() * torch.tensor(meta["flux_std"]) + torch.tensor(meta["flux_mean"])
    arms = [Arm(*arm) for arm in meta["arms"]]
    rows, low = len(slopes) + 1, 0
    for column, arm in enumerate(arms):
        part, grid = slice(low, low + arm.pixels), arm.grid()
        low += arm.pixels
        width = 0.94 / len(arms)
        for row, (name, values) in enumerate([("flux", flux), *slopes.items()]):
            panel = axes.inset_axes((0.06 + column * width, 1 - (row + 0.9) / rows, 0.9 * width, 0.8 / rows))
            panel.plot(grid, values[part].cpu().numpy(), color="black" if name == "flux" else "#1a5fb4", linewidth=0.6)
            panel.tick_params(labelsize=6, labelbottom=row == rows - 1)
            if not column:
                panel.set_ylabel(name, fontsize=7)
        panel.set_xlabel("Å" if meta.get("labels") else "pixel", fontsize=7)
