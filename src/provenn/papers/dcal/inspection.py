"""Where a DCAL system has its answer from, for `provenn inspect`."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.errors import UserError
from provenn.papers.dcal.hosts import host_of
from provenn.papers.dcal.layers import attend_and_show
from provenn.papers.dcal.model import DCAL, Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Distances(NamedTuple):
    """How far the patches of an image look, block by block.

    Args:
        shares: the share of a patch's attention at each distance, the mean over heads and patches. The rest of 1 goes
            to tokens without a place, such as the class token.
        uniform: the same of attention that is alike everywhere.
        means: the mean distance of what goes to patches, in patches.
    """

    shares: Float[Tensor, "blocks distances"]
    uniform: Float[Tensor, " distances"]
    means: Float[Tensor, " blocks"]


@torch.no_grad()
def attention_over_distance(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> Distances:
    """The share of self-attention at each distance between patches, in each block.

    The distance is that of the centres in patches (Euclidean), rounded to a whole number. DCAL is to spread attention
    (section 1): its shares lie further out than those of a plain network that was trained alike.

    Args:
        model: a DCAL, or a vision transformer that `provenn.papers.dcal.hosts.host_of` knows.
        x: one image as the network sees it.

    Raises:
        UserError: another network.
    """
    host = host_of(model.backbone if isinstance(model, DCAL) else model)
    rows, columns = host.grid(x)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double().reshape(-1, 2)
    apart = torch.cdist(places, places).round().long().flatten()
    counts = apart.bincount().double()
    count, tokens, shares = len(places), host.embed(x), []
    total = tokens.shape[1]
    for block in host.blocks:
        tokens, weights = attend_and_show(block, tokens)
        between = weights[0, host.prefix :, host.prefix :].double().cpu().flatten()
        shares.append(torch.zeros_like(counts).index_add(0, apart, between) / count)
    found = torch.stack(shares)
    means = found @ torch.arange(len(counts)).double() / found.sum(1)
    return Distances(found.float(), (counts / (count * total)).float(), means.float())


def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, "..."]]:
    """The class token's attention rollout by patch, the queries of GLCA (1), and attention over distance by block."""
    found, far = _explained(model, x), attention_over_distance(model, x)
    chosen = torch.zeros_like(found.rollout)
    chosen[found.chosen[:, 0], found.chosen[:, 1]] = 1
    blocks = {f"attention over distance, block {k}": row for k, row in enumerate(far.shares, 1)}
    maps = {"attention rollout": found.rollout, "queries of GLCA": chosen}
    return {**maps, **blocks, "mean distance of attention, a number a block": far.means}


def draw(model: nn.Module, x: Float[Tensor, "1 channels height width"], meta: dict[str, Any], axes: "Axes") -> None:
    """The image with the rollout over it and GLCA's queries in frames; below it attention over distance by block."""
    from matplotlib.figure import Figure

    figure, place = axes.figure, axes.get_subplotspec()
    if isinstance(figure, Figure) and place is not None:
        grid = place.subgridspec(2, 1, height_ratios=(3, 1))
        axes.set_subplotspec(grid[0])
        _draw_distances(attention_over_distance(model, x), figure.add_subplot(grid[1]))
    _draw_rollout(model, x, meta, axes)


def _draw_distances(far: Distances, axes: "Axes") -> None:
    from matplotlib import colormaps

    count = len(far.shares)
    for k, (row, mean) in enumerate(zip(far.shares.tolist(), far.means.tolist()), 1):
        colour = colormaps["viridis"]((k - 1) / max(count - 1, 1) * 0.9)
        axes.plot(row, color=colour, linewidth=1.2, label=f"block {k}: {mean:.2f} patches on the mean")
    axes.plot(far.uniform.tolist(), "k:", linewidth=1, label="alike everywhere")
    axes.set_xlabel("distance in patches", fontsize=8)
    axes.set_ylabel("share of attention", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6, ncols=1 + count // 7)


def _draw_rollout(model: nn.Module, x: Tensor, meta: dict[str, Any], axes: "Axes") -> None:
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
