"""Diffusion (Ho et al., 2020, arXiv:2006.11239), and sampling without noise (Song et al., 2021, arXiv:2010.02502)."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.diffusion import STEPS, noise_schedule

Kind = Literal["linear", "cosine"]
Predicts = Literal["noise", "v"]
Image = Float[Tensor, "batch channels height width"]
Denoise = Callable[[Tensor, Tensor], Tensor]  # x_k and k to the prediction


class Schedule(nn.Module):
    """ᾱ_k for k = 0 … 999, and what follows from it.

    Args:
        kind: "linear" is `provenn.nn.diffusion.noise_schedule`; "cosine" is that of Nichol and Dhariwal (2021).
        predicts: what a network says: "noise" ε, or "v" = √ᾱ ε − √(1 − ᾱ) x₀.

    Raises:
        UserError: another kind.
    """

    steps = STEPS

    def __init__(self, kind: Kind = "linear", predicts: Predicts = "noise"):
        super().__init__()
        if kind not in ("linear", "cosine") or predicts not in ("noise", "v"):
            raise UserError(f"a schedule is linear or cosine, and predicts noise or v; got {kind} and {predicts}")
        self.predicts = predicts
        with torch.device("cpu"):
            at = (torch.arange(STEPS + 1, dtype=torch.float64) / STEPS + 0.008) / 1.008
            curve = torch.cos(at * torch.pi / 2).square()
            cosine = torch.cumprod(1 - (1 - curve[1:] / curve[:-1]).clamp(max=0.999), 0)
            bar = noise_schedule() if kind == "linear" else cosine
        # No buffer: a model in half precision keeps its schedule.
        self.bar, self.values = bar, bar.tolist()

    def at(self, k: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_k and √(1 − ᾱ_k), to be multiplied with images."""
        bar = self.bar.to(k.device)[k].to(like.dtype).view(-1, 1, 1, 1)
        return bar.sqrt(), (1 - bar).sqrt()

    def noisy(self, clean: Image, k: Tensor, noise: Image) -> Image:
        """x_k = √ᾱ_k x₀ + √(1 − ᾱ_k) ε."""
        signal, spread = self.at(k, clean)
        return signal * clean + spread * noise

    def target(self, clean: Image, k: Tensor, noise: Image) -> Image:
        """What the network is to say of x_k."""
        if self.predicts == "noise":
            return noise
        signal, spread = self.at(k, clean)
        return signal * noise - spread * clean

    def told(self, x: Image, k: Tensor, said: Image, bound: Tensor | float | None = None) -> tuple[Image, Image]:
        """x̂₀ and ε̂ of what the network said; after x̂₀ was cut to ±`bound`, ε̂ is computed anew."""
        signal, spread = self.at(k, x)
        clean = signal * x - spread * said if self.predicts == "v" else (x - spread * said) / signal
        if bound is not None:
            limit = torch.as_tensor(bound, dtype=clean.dtype, device=clean.device)
            clean = torch.minimum(torch.maximum(clean, -limit), limit)
        return clean, (x - signal * clean) / spread

    def chosen(self, count: int) -> list[int]:
        """`count` steps, evenly spaced from the noisiest, which is always among them, to the cleanest.

        >>> Schedule().chosen(3)
        [999, 500, 0]
        >>> Schedule().chosen(1)
        [999]
        """
        if not 1 <= count <= self.steps:
            raise UserError(f"between 1 and {self.steps} steps are taken, got {count}")
        last = self.steps - 1
        return [last - math.ceil(last * i / max(1, count - 1) - 0.5) for i in range(count)]

    def sample(
        self,
        denoise: Denoise,
        noise: Image,
        count: int,
        *,
        eta: float = 0.0,
        bound: Tensor | float | None = None,
        generator: torch.Generator | None = None,
    ) -> Image:
        """Images from noise, by DDIM in `count` steps: x_j = √ᾱ_j x̂₀ + √(1 − ᾱ_j − σ²) ε̂ + σ z.

        Args:
            denoise: what the network says of x_k.
            noise: x at the noisiest step.
            count: steps.
            eta: σ = η √((1 − ᾱ_j)/(1 − ᾱ_k)) √(1 − ᾱ_k/ᾱ_j); 0 adds no noise.
            bound: of x̂₀.
            generator: of z.
        """
        x, steps = noise, self.chosen(count)
        for k, after in zip(steps, [*steps[1:], None]):
            index = torch.full((x.shape[0],), k, device=x.device)
            clean, error = self.told(x, index, denoise(x, index), bound)
            if after is None:
                return clean
            now, then = self.values[k], self.values[after]
            sigma = eta * ((1 - then) / (1 - now)) ** 0.5 * (1 - now / then) ** 0.5
            x = then**0.5 * clean + max(0.0, 1 - then - sigma**2) ** 0.5 * error
            if sigma:
                x = x + sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return x
