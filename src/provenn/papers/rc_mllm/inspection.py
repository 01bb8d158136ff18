"""Where a model looks when it begins to answer, for `provenn inspect`."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.special_tokens import MARKS
from provenn.nn.vision_language import ImageChat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, AFTER = ("<start>", "<user>"), ("<assistant>",)  # what stands about the picture


@torch.no_grad()
def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, " patches"]]:
    """Attention from the place where an answer begins to each token of the picture, the mean over heads.

    Raises:
        UserError: another kind of model.
    """
    if not isinstance(model, ImageChat):
        raise UserError(f"{type(model).__name__} reads no pictures among words: take a preset of rc_mllm")
    number = {mark: place for place, mark in enumerate(MARKS)}
    image = model.model.image_token
    tokens = torch.tensor([[*(number[m] for m in BEFORE), image, *(number[m] for m in AFTER)]], device=x.device)
    reading, place = model.read(tokens, x, layers=True)
    count = int(place[0, -1]) + 1
    last = torch.tensor([count - 1], device=x.device)
    first, end = len(BEFORE), count - len(AFTER)
    return {
        f"layer {layer + 1}": model.decoder.attention_weights(reading, layer, last)[0, :, 0, first:end].mean(0)
        for layer in range(len(model.decoder.blocks))
    }


def draw(model: nn.Module, x: Float[Tensor, "1 channels height width"], meta: dict[str, Any], axes: "Axes") -> None:
    """The picture, and over it the attention of the last layer where its tokens are a square."""
    rows = inspect(model, x)
    mean, std = (torch.tensor(meta[key])[:, None, None] for key in ("mean", "std"))
    shown = (x[0].cpu() * std + mean).clamp(0, 1)
    axes.imshow(shown.permute(1, 2, 0).numpy())
    name, last = list(rows.items())[-1]
    side = round(len(last) ** 0.5)
    if side * side == len(last):
        height, width = shown.shape[1:]
        axes.imshow(last.reshape(side, side).cpu().numpy(), extent=(-0.5, width - 0.5, height - 0.5, -0.5), alpha=0.5)
    axes.set_title(f"attention where an answer begins, {name}", fontsize=8)
