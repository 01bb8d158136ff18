"""How images of training and their masks are turned and changed, as the authors' loader does it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

TURN = 30  # degrees, either way
CHANCE = 0.5  # of each change
GAIN, OFFSET, NOISE = 0.2, 0.5, 0.2  # of standardised values


def augment(
    images: Float[Tensor, "batch channels height width"], masks: Float[Tensor, "batch height width"]
) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch height width"]]:
    """Turn by up to 30°, then by a multiple of 90°; change contrast and brightness; add noise, each by chance.

    Each image has its own chances, from torch's global generator. A mask is turned with its image, and stays of 0 and
    1. Beyond the edges an image is mirrored, and a mask with it.
    """
    count, device = len(images), images.device

    def chance() -> Tensor:
        return (torch.rand(count, device=device) < CHANCE).to(images)

    angle = (2 * torch.rand(count, device=device) - 1).to(images) * math.radians(TURN) * chance()
    angle = angle + math.pi / 2 * torch.randint(4, (count,), device=device).to(images) * chance()
    cos, sin, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turns = torch.stack([torch.stack([cos, -sin, none], 1), torch.stack([sin, cos, none], 1)], 1)
    grid = F.affine_grid(turns, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    turned = F.grid_sample(masks[:, None], grid, mode="nearest", padding_mode="reflection", align_corners=False)
    some = chance()[:, None, None, None]
    gain = 1 + some * GAIN * (2 * torch.rand(count, 1, 1, 1, device=device).to(images) - 1)
    offset = some * OFFSET * (2 * torch.rand(count, 1, 1, 1, device=device).to(images) - 1)
    noise = NOISE * torch.rand(count, 1, 1, 1, device=device).to(images) * chance()[:, None, None, None]
    return images * gain + offset + noise * torch.randn_like(images), turned[:, 0]
