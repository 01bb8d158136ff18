"""Training and sampling of a diffusion model (Ho et al., 2020, arXiv:2006.11239), as MoH-DiT uses them."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

STEPS = 1000


def noise_schedule(steps: int = STEPS) -> Float[Tensor, " steps"]:
    """ᾱ_t = Π (1 − β_s) of the linear schedule, β from 1e-4 to 0.02 over 1000 steps, in float64.

    >>> [round(v, 6) for v in noise_schedule()[[0, 999]].tolist()]
    [0.9999, 4e-05]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    scale = STEPS / steps
    return (1 - torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)).cumprod(0)


def noise_loss(
    model: nn.Module,
    x: Float[Tensor, "batch channels height width"],
    y: Int[Tensor, " batch"],
    *,
    generator: torch.Generator,
    unlabelled: float | int = 0.1,
) -> Float[Tensor, ""]:
    """E ‖ε − ε_θ(√ᾱ_t x + √(1 − ᾱ_t) ε, t, y)‖² over uniform t.

    Args:
        model: a `DiT` that gives as many channels as it takes (`learn_sigma=False`).
        x, y: images of about unit variance and their classes.
        generator: of noise levels, noise, and of whose class is hidden, on the CPU.
        unlabelled: the share of images whose class is hidden, so that guidance can be used later.
    """
    host: Any = model
    t = torch.randint(STEPS, (len(x),), generator=generator)
    noise = torch.randn(x.shape, generator=generator).to(x)
    hidden = torch.rand(len(x), generator=generator) < unlabelled
    level = noise_schedule()[t].to(x)[:, None, None, None]
    y = torch.where(hidden.to(y.device), host.num_classes, y)
    found = model(level.sqrt() * x + (1 - level).sqrt() * noise, t.to(x.device), y)
    if found.shape != noise.shape:
        raise ValueError(
            f"expected a model that gives {x.shape[1]} channels, got {found.shape[1]}: "
            "learned variances are not trained here"
        )
    return F.mse_loss(found, noise)


@torch.no_grad()
def sample(
    model: nn.Module,
    y: Int[Tensor, " batch"],
    shape: tuple[int, int, int],
    *,
    generator: torch.Generator,
    steps: int = 50,
    guidance: float | int = 1.0,
    limit: float | int | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Images of the classes `y`, by DDIM without noise (Song et al., 2021, arXiv:2010.02502).

    Args:
        model: a `DiT`; of learned variances nothing is used.
        y: classes.
        shape: (channels, height, width).
        generator: of the noise that is started from, on the CPU.
        steps: evenly spaced among the 1000.
        guidance: scale of classifier-free guidance; 1 is none.
        limit: hold each step's guess of the image within ±limit. Where values have bounds, as pixels do, this keeps the
            first steps, which divide by √ᾱ = 0.006, from leaving them.
    """
    if not 1 <= steps <= STEPS:
        raise ValueError(f"steps must lie between 1 and {STEPS}, got {steps}")
    host: Any = model
    like = next(model.parameters())
    x = torch.randn(len(y), *shape, generator=generator).to(like)
    levels = noise_schedule().to(like)
    times = torch.linspace(STEPS - 1, 0, steps).round().long().tolist()
    for here, there in zip(times, [*times[1:], -1]):
        t = torch.full((len(y),), here, device=like.device)
        found = model(x, t, y) if guidance == 1 else host.guided(x, t, y, guidance)
        noise = found[:, : shape[0]]
        level, after = levels[here], levels[there] if there >= 0 else levels.new_ones(())
        clean = (x - (1 - level).sqrt() * noise) / level.sqrt()
        if limit is not None:
            clean = clean.clamp(-limit, limit)
            noise = (x - level.sqrt() * clean) / (1 - level).sqrt()
        x = after.sqrt() * clean + (1 - after).sqrt() * noise
    return x
