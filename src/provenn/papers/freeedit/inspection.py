"""Where an editor looks in its reference, for `provenn inspect`."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.narrowing import present
from provenn.nn.attention import split_heads
from provenn.papers.freeedit.attaching import ReferAttention, attention_to_reference
from provenn.papers.freeedit.model import STEPS, FreeEdit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AT = 0.6  # share of the noise schedule at which the layers are looked at


@torch.no_grad()
def inspect(model: nn.Module, x: dict[str, Any]) -> dict[str, Float[Tensor, " values"]]:
    """Of each token of each layer: the reference's share of the weights, and the branch by self-attention."""
    found: dict[str, Tensor] = {}
    for site, (own, branch, weights) in looked(_system(model), x).items():
        found[f"{short(site)}, share of the reference"] = weights[0].sum(-1)
        found[f"{short(site)}, branch by self-attention"] = branch[0].norm(dim=1) / own[0].norm(dim=1).clamp(min=1e-12)
    return found


def looked(system: FreeEdit, x: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each site: what the layer gives by itself, what the branch adds, and the branch's weights of the reference.

    Args:
        system: with refer-attention.
        x: source, tokens, reference and noun, as a batch of one.

    Raises:
        UserError: an instruction without S*: there is nothing to look at.
    """
    if not (x["tokens"] == system.placeholder).any():
        raise UserError("no reference was given: give a picture twice as wide as high, source left and reference right")
    kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def hook(layer: ReferAttention, inputs: Any, output: Tensor) -> None:
        attention, hidden = inputs[0], inputs[1]
        features = layer.state.features
        if features is None:
            return
        parts: Any = attention if layer.share else layer
        q = split_heads(parts.to_q(hidden), attention.heads)
        k = split_heads(parts.to_k(hidden), attention.heads) if layer.mode in ("drra", "rasa") else q[:, :, :0]
        weights = attention_to_reference(q, k, split_heads(features[layer.site].key, attention.heads))
        own = layer.host(attention, hidden)
        kept[layer.site] = (own, output - own, weights)

    handles = [layer.register_forward_hook(hook) for layer in present(system.refer, "refer-attention").layers.values()]
    try:
        source = x["source"]
        t = torch.full((1,), round(AT * STEPS), device=source.device)
        clean = system.latents(source, system.design.scaling)
        noisy = system.scheduler().add_noise(clean, torch.zeros_like(clean), t)
        system(noisy, t, source, x["tokens"], x["reference"], x["noun"])
    finally:
        for handle in handles:
            handle.remove()
    return kept


def short(site: str) -> str:
    """A site by its level: down_blocks.0.attentions.1… is "down 0.1"."""
    parts = site.split(".")
    level = parts[0].removesuffix("_blocks").removesuffix("_block")
    return " ".join([level, ".".join(part for part in parts if part.isdecimal())])


@torch.no_grad()
def draw(model: nn.Module, x: dict[str, Any], meta: dict[str, Any], axes: "Axes") -> None:
    """The source, the edit, the reference, and where the finest layers look in it, mean over the picture."""
    system = _system(model)
    found = looked(system, x)
    finest = max(weights.shape[-1] for *_, weights in found.values())
    maps = torch.stack([weights[0].mean(0) for *_, weights in found.values() if weights.shape[-1] == finest])
    side = round(finest**0.5)
    heat = maps.mean(0)[: side * side].view(1, 1, side, side)
    shape = x["reference"].shape[-2:]
    heat = nn.functional.interpolate(heat / heat.max().clamp(min=1e-12), shape, mode="nearest")[0, 0]
    edited = system.edit(x["source"], x["tokens"], x["reference"], x["noun"], seeds=[0])
    panels = [x["source"][0], edited[0].cpu(), x["reference"][0], heat.cpu().expand(3, -1, -1)]
    axes.imshow(torch.cat([panel.cpu() for panel in panels], dim=2).permute(1, 2, 0).clamp(0, 1).numpy(),
                interpolation="nearest")  # fmt: skip
    axes.set_axis_off()
    axes.set_title("source, edited, reference, and where the finest layers look in it", fontsize=9)


def _system(model: nn.Module) -> FreeEdit:
    if not isinstance(model, FreeEdit) or model.refer is None:
        raise UserError(f"{type(model).__name__} has no refer-attention: take the preset freeedit_small")
    return model
