"""How a Wings model weighs its learners on a picture, for `provenn inspect`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.special_tokens import MARKS
from provenn.papers.wings.layers import WingsBlock
from provenn.papers.wings.model import Wings


@torch.no_grad()
def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, " tokens"]]:
    """The router's weight of the visual learner at each token of `<start> <user> <image> <assistant>`."""
    if not isinstance(model, Wings):
        raise UserError(f"{type(model).__name__} has no learners: take a preset of Wings")
    number = {mark: place for place, mark in enumerate(MARKS)}
    image = model.model.image_token
    tokens = torch.tensor([[number["<start>"], number["<user>"], image, number["<assistant>"]]], device=x.device)
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
