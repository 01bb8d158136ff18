"""What the registers of a FALCON look at, on the grid of crops, for `provenn inspect`."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.errors import UserError
from provenn.nn.attention import split_heads
from provenn.papers.falcon.crops import Grid, places_of
from provenn.papers.falcon.model import CropEncoder

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Looks(NamedTuple):
    """What registers attend to in the last layer, over heads.

    Args:
        patches: of each crop and register the share of each patch of its own crop, the whole image first.
        crops: of each crop the share of ReAtten that its registers give to each crop; None without ReAtten.
        grid: rows and columns of the crops.
    """

    patches: Float[Tensor, "crops registers rows columns"]
    crops: Float[Tensor, "crops crops2"] | None
    grid: Grid


@torch.no_grad()
def looks_of(model: nn.Module, image: Float[Tensor, "1 3 height width"]) -> Looks:
    """Where the registers of an image's crops look.

    Raises:
        UserError: a model without registers.
    """
    encoder = next((part for part in model.modules() if isinstance(part, CropEncoder)), None)
    if encoder is None or not encoder.vit.registers.count:
        raise UserError(f"{type(model).__name__} has no registers to look at: take a preset of falcon")
    vit, like = encoder.vit, next(encoder.parameters())
    crops, grids = encoder.cut(image.to(device=like.device, dtype=like.dtype))
    places = places_of(grids[0], encoder.limit).to(crops.device)
    block: Any = vit.blocks[-1]
    x = block.layer_norm1(vit.encode(crops, places, layers=True).layers[-2])
    before = vit.count_before
    shares = _weights(block.self_attn, x, x[:, before:])
    side = math.isqrt(before)
    first = before - side**2  # CLIP's class token
    patches = shares[:, :, first:before].unflatten(2, (side, side))
    between = None
    if vit.interact is not None:
        registers = block.self_attn(x)[:, before:]
        joint: Any = vit.interact[-1]
        together = registers.flatten(0, 1)[None]
        given = _weights(joint.attention, together, together)[0]
        count = registers.shape[1]
        between = given.unflatten(0, (-1, count)).mean(1).unflatten(1, (-1, count)).sum(2)
    return Looks(patches.float().cpu(), None if between is None else between.float().cpu(), grids[0])


def _weights(attention: Any, x: Tensor, queries: Tensor) -> Float[Tensor, "batch queries tokens"]:
    """Attention weights of some tokens over all, the mean over heads; fused attention keeps none."""
    q = split_heads(attention.q_proj(queries), attention.heads)
    k = split_heads(attention.k_proj(x), attention.heads)
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32).mean(1)


def inspect(model: nn.Module, x: Float[Tensor, "1 3 height width"]) -> dict[str, Tensor]:
    """Entropy of what each register looks at in its crop, from 0 to 1, and of ReAtten the shares given to each crop."""
    looks = looks_of(model, x)
    shares = looks.patches.flatten(2)
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(1e-12)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum(-1) / math.log(shares.shape[-1])
    rows, columns = looks.grid
    names = ["the whole image", *(f"crop {row}, {column}" for row in range(rows) for column in range(columns))]
    found = {f"entropy of the registers of {name}": row for name, row in zip(names, entropy)}
    if looks.crops is not None:
        found |= {f"ReAtten of {name}": row for name, row in zip(names, looks.crops)}
    return found


def draw(model: nn.Module, x: Float[Tensor, "1 3 height width"], meta: dict[str, Any], axes: "Axes") -> None:
    """The image with its grid of crops, and over each crop what its registers look at, the mean of all."""
    looks = looks_of(model, x)
    height, width = x.shape[-2:]
    mean, std = (torch.tensor(meta[name])[:, None, None] for name in ("mean", "std"))
    picture = (x[0].cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)
    rows, columns = looks.grid if all(looks.grid) else (1, 1)
    crops = looks.patches[1:] if all(looks.grid) else looks.patches
    each = crops.mean(1)
    each = each / each.amax((1, 2), keepdim=True).clamp_min(1e-12)
    whole = each.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    shown = F.interpolate(whole[None, None], (height, width), mode="nearest")[0, 0]
    axes.imshow(picture.numpy(), extent=(0, width, height, 0))
    drawn = axes.imshow(shown.numpy(), cmap="inferno", alpha=0.5, extent=(0, width, height, 0), vmin=0, vmax=1)
    for row in range(1, rows):
        axes.axhline(row * height / rows, color="#33d17a", linewidth=2)
    for column in range(1, columns):
        axes.axvline(column * width / columns, color="#33d17a", linewidth=2)
    axes.figure.colorbar(drawn, ax=axes, label="share, of the largest in its crop")
    count = looks.patches.shape[1]
    axes.set_title(f"{rows} × {columns} crops, and what the {count} registers of each look at", fontsize=9)
