"""Training and sampling of diffusion models (Ho et al., 2020, arXiv:2006.11239), as diffusion Transformers use them.

A model is called with noisy images, their noise levels t and their classes y. It gives the noise, and may give as many
channels more, of which the variance of a sampling step is made (Nichol and Dhariwal, 2021, arXiv:2102.09672).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from provenn.core import progress

STEPS = 1000
FREQUENCIES = 256  # features of a noise level before its two linear maps


def noise_schedule(steps: int = STEPS) -> Float[Tensor, " steps"]:
    """ᾱ_t = Π (1 − β_s) of the linear schedule, β from 1e-4 to 0.02 over 1000 steps, in float64.

    >>> [round(v, 6) for v in noise_schedule()[[0, 999]].tolist()]
    [0.9999, 4e-05]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    # β grows as steps get fewer, so that noise at the end is as much.
    scale = STEPS / steps
    return (1 - torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)).cumprod(0)


class Posterior:
    """q(x_{t−1} | x_t, x): how one step back is distributed when the image is known.

    Its mean is a x + b x_t. Its variance β̃ is the least that a step may have; β is the most.

    Args:
        levels: ᾱ of the steps, from little noise to much; a subset of the 1000 gives a shorter chain.
        like: a tensor of the dtype and device to compute in.
    """

    def __init__(self, levels: Float[Tensor, " steps"], like: Tensor):
        # ᾱ_{t−1}; before the first step there is no noise.
        previous = torch.cat([levels.new_ones(1), levels[:-1]])
        # Of the steps at hand: where levels are a subset of the 1000, a step takes several.
        beta = 1 - levels / previous
        least_variance = beta * (1 - previous) / (1 - levels)
        least_variance[0] = least_variance[
            min(1, len(least_variance) - 1)
        ]  # which is 0 by the formula, and without a logarithm
        most_variance = beta.clone()
        most_variance[0] = least_variance[0]
        factors = (beta * previous.sqrt() / (1 - levels), (1 - previous) * (1 - beta).sqrt() / (1 - levels))
        self.of_image, self.of_noisy = (tensor.to(like) for tensor in factors)
        self.beta, self.least, self.fixed = (tensor.log().to(like) for tensor in (beta, least_variance, most_variance))

    def mean(self, image: Tensor, noisy: Tensor, t: Int[Tensor, " batch"]) -> Tensor:
        return _expand_levels(self.of_image, t) * image + _expand_levels(self.of_noisy, t) * noisy

    def log_variance(self, raw_variance: Tensor | None, t: Int[Tensor, " batch"]) -> Tensor:
        """Between log β̃ and log β, at (v + 1) / 2 for what the model gives; log β where it gives none."""
        if raw_variance is None:
            return _expand_levels(self.fixed, t)
        share = (raw_variance + 1) / 2
        return share * _expand_levels(self.beta, t) + (1 - share) * _expand_levels(self.least, t)


def _expand_levels(values: Tensor, t: Tensor) -> Float[Tensor, "batch 1 1 1"]:
    return values[t][:, None, None, None]


def _split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """The noise, and what stands for the variance."""
    if output.shape[1] not in (channels, 2 * channels):
        raise ValueError(f"expected a model that gives {channels} or {2 * channels} channels, got {output.shape[1]}")
    return output[:, :channels], output[:, channels:] if output.shape[1] > channels else None


def noise_losses(
    model: nn.Module,
    x: Float[Tensor, "batch channels height width"],
    y: Int[Tensor, " batch"],
    *,
    generator: torch.Generator | None = None,
    unlabelled: float | int = 0.1,
    each: bool = False,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, ""] | None]:
    """‖ε − ε_θ(√ᾱ_t x + √(1 − ᾱ_t) ε, t, y)‖² over uniform t, and where variances are learned their bound, in bits.

    The bound is KL(q(x_{t−1} | x_t, x) ‖ p_θ), and at t = 0 −log p_θ(x) of values taken to be 8-bit pixels on −1 to 1,
    as the authors have it for latents too. It teaches the variance alone: the noise in it is held fixed.

    Args:
        model: a diffusion model with `num_classes` classes and one more that stands for none.
        x, y: images of about unit variance and their classes.
        generator: of noise levels, noise, and of whose class is hidden, on the CPU; by default torch's own.
        unlabelled: the share of images whose class is hidden, so that guidance can be used later.
        each: give the first error of each image, not their mean.
    """
    host: Any = model  # for its `num_classes`
    t = torch.randint(STEPS, (len(x),), generator=generator).to(x.device)
    noise = torch.randn(x.shape, generator=generator).to(x)
    hidden = torch.rand(len(x), generator=generator) < unlabelled
    # In float64: 1 − ᾱ of the first steps is 1e-4, and the posterior divides by it.
    levels = noise_schedule()
    level = _expand_levels(levels.to(x), t)
    noisy = level.sqrt() * x + (1 - level).sqrt() * noise
    predicted, raw_variance = _split_output(
        model(noisy, t, torch.where(hidden.to(y.device), host.num_classes, y)), x.shape[1]
    )
    error = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3)) if each else F.mse_loss(predicted, noise)
    if raw_variance is None:
        return error, None
    posterior = Posterior(levels, x)
    # Detached, as the plain error alone is to teach the mean.
    image = (noisy - (1 - level).sqrt() * predicted.detach()) / level.sqrt()
    mean, log_variance = posterior.mean(image, noisy, t), posterior.log_variance(raw_variance, t)
    least = _expand_levels(posterior.least, t)
    squared_distance = (posterior.mean(x, noisy, t) - mean).square() * torch.exp(-log_variance)
    divergence = 0.5 * (log_variance - least - 1 + torch.exp(least - log_variance) + squared_distance)
    # At t = 0 there is no step before: the likelihood of the pixels replaces the divergence.
    bound = torch.where(t[:, None, None, None] == 0, _pixel_surprise(x, mean, log_variance), divergence)
    return error, bound.mean() / math.log(2)


def _pixel_surprise(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """−log of the normal distribution's share of each pixel's bin, 2/255 wide; the outermost are open."""
    scale = torch.exp(-0.5 * log_variance)
    upper, lower = (_normal_cdf(scale * (x - mean + half)) for half in (1 / 255, -1 / 255))
    # Black and white take the whole tail beyond, as pixels are cut there.
    share = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -share.clamp_min(1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    # The authors' approximation and not `erf`, for losses that can be held against theirs.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def noise_loss(
    model: nn.Module,
    x: Float[Tensor, "batch channels height width"],
    y: Int[Tensor, " batch"],
    *,
    generator: torch.Generator | None = None,
    unlabelled: float | int = 0.1,
) -> Float[Tensor, ""]:
    """The sum of `noise_losses`, for training; the arguments are the same."""
    error, bound = noise_losses(model, x, y, generator=generator, unlabelled=unlabelled)
    return error if bound is None else error + bound


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
    by: str = "ddim",
) -> Float[Tensor, "batch channels height width"]:
    """Images of the classes `y`.

    Args:
        model: a diffusion model; with guidance, one with `guided`.
        y: classes.
        shape: (channels, height, width).
        generator: of the noise that is started from, and of "ddpm"'s, on the CPU.
        steps: evenly spaced among the 1000.
        guidance: scale of classifier-free guidance; 1 is none.
        limit: hold each step's guess of the image within ±limit. Where values have bounds, as pixels do, this keeps the
            first steps, which divide by √ᾱ = 0.006, from leaving them.
        by: "ddim" takes steps without noise (Song et al., 2021, arXiv:2010.02502), and nothing of learned variances;
            "ddpm" steps with the variance that the model gives, or β, as MoH-DiT was sampled, in 250 steps.
    """
    if not 1 <= steps <= STEPS:
        raise ValueError(f"steps must lie between 1 and {STEPS}, got {steps}")
    if by not in ("ddim", "ddpm"):
        raise ValueError(f"by must be one of ddim, ddpm, got {by!r}")
    host: Any = model  # for its `guided`
    like = next(model.parameters())
    x = torch.randn(len(y), *shape, generator=generator).to(like)
    times = torch.linspace(0, STEPS - 1, steps).round().long() if steps > 1 else torch.tensor([STEPS - 1])
    schedule = noise_schedule()[times]
    posterior, levels = Posterior(schedule, like), schedule.to(like)
    for i in progress.track(range(steps - 1, -1, -1), "drawing", total=steps):
        t = times[i].to(like.device).expand(len(y))
        output = model(x, t, y) if guidance == 1 else host.guided(x, t, y, guidance)
        noise, raw_variance = _split_output(output, shape[0])
        level, previous = levels[i], levels[i - 1] if i else levels.new_ones(())
        image = (x - (1 - level).sqrt() * noise) / level.sqrt()
        if limit is not None:
            image = image.clamp(-limit, limit)
            # What noise would then have to be: a step that mixed the cut image with the old noise would leave the path.
            noise = (x - level.sqrt() * image) / (1 - level).sqrt()
        if by == "ddim":
            x = previous.sqrt() * image + (1 - previous).sqrt() * noise
            continue
        index = torch.full_like(t, i)
        x = posterior.mean(image, x, index)
        if i:
            fresh_noise = torch.randn(x.shape, generator=generator).to(x)
            x = x + torch.exp(0.5 * posterior.log_variance(raw_variance, index)) * fresh_noise
    return x


def grid_positions(side: int, dim: int) -> Float[Tensor, "tokens dim"]:
    """sin and cos of the column's number in the first half, of the row's in the second, at dim/4 rates each."""
    if dim < 4 or dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    rates = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], dim=-1)
    column, row = one.repeat(side, 1), one.repeat_interleave(side, 0)
    return torch.cat([column, row], dim=-1).float()


def noise_level_features(t: Shaped[Tensor, " batch"], dim: int) -> Float[Tensor, "batch dim"]:
    """cos and sin of t · 10000^(−2j/dim)."""
    rates = torch.exp(-math.log(10_000) / (dim // 2) * torch.arange(dim // 2, device=t.device))
    angles = t[:, None].to(rates.dtype) * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
