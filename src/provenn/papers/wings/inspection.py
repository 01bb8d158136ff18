"""How a Wings model weighs its learners on a picture, for `provenn inspect`."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.special_tokens import MARKS
from provenn.papers.wings.layers import WingsBlock
from provenn.papers.wings.model import Wings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, AFTER = ("<start>", "<user>"), ("<assistant>",)  # what stands about the picture


@torch.no_grad()
def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, " tokens"]]:
    """The router's weight of the visual learner at each token of `<start> <user> <image> <assistant>`.

    Raises:
        UserError: a model without learners, or without a router.
    """
    if not isinstance(model, Wings):
        raise UserError(f"{type(model).__name__} has no learners: take a preset of Wings")
    number = {mark: place for place, mark in enumerate(MARKS)}
    image = model.model.image_token
    tokens = torch.tensor([[*(number[m] for m in BEFORE), image, *(number[m] for m in AFTER)]], device=x.device)
    reading, _ = model.read(tokens, x, layers=True)
    rows = {}
    for layer, block in enumerate(model.decoder.blocks):
        if isinstance(block, WingsBlock) and block.router is not None:
            rows[f"layer {layer + 1}"] = block.router(model.decoder.attention_weights(reading, layer))[0, :, 0]
    if not rows:
        raise UserError(
            "these weights have no router: of a first stage, or with routing=fixed, there is nothing to show"
        )
    return rows


def draw(model: nn.Module, x: Float[Tensor, "1 channels height width"], meta: dict[str, Any], axes: "Axes") -> None:
    """A line for each layer, and the tokens of the picture shaded."""
    rows = inspect(model, x)
    count = len(next(iter(rows.values())))
    axes.set_axis_on()
    axes.axvspan(len(BEFORE) - 0.5, count - len(AFTER) - 0.5, color="#dddddd", label="the picture")
    for name, row in rows.items():
        axes.plot(row.cpu().numpy(), ".-", label=name)
    axes.axhline(0.5, color="black", linewidth=0.5, linestyle=":")
    places = [*range(len(BEFORE)), *range(count - len(AFTER), count)]
    axes.set_xticks(places, [*BEFORE, *AFTER], rotation=90)
    axes.set(ylim=(0, 1), ylabel="weight of the visual learner")
    axes.legend(fontsize=8)
