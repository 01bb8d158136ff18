"""Likelihoods of S2LIC's latents: a Gaussian over unit bins for y, a factorised prior for z (Ballé et al., 2018)."""

import math
from itertools import pairwise
from typing import Any, cast, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FLOOR, LEAST = 0.11, 1e-9


def round_through(x: Tensor) -> Tensor:
    """Rounded values whose gradient is that of the identity."""
    return x + (x.round() - x).detach()


class _AtLeast(torch.autograd.Function):
    """max(x, bound), whose gradient passes below the bound too where a step against it lifts x."""

    generate_vmap_rule = True  # no checks of types here: a compiler does not trace their making

    @staticmethod
    @no_type_check
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp(min=bound)

    @staticmethod
    @no_type_check
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0] >= inputs[1])
        ctx.save_for_forward(inputs[0] >= inputs[1])

    @staticmethod
    @no_type_check
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * (ctx.saved_tensors[0] | (grad < 0)), None


class _AtLeastForwards(_AtLeast):
    """The same with derivatives in forward mode, which the compiler does not trace."""

    @staticmethod
    @no_type_check
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent * ctx.saved_tensors[0]


def at_least(x: Tensor, bound: float) -> Tensor:
    """max(x, bound) as CompressAI bounds scales and likelihoods: a value below the bound can still learn to rise.

    `clamp` has no gradient there, so that a scale which once fell below 0.11 would stay.

    >>> x = torch.tensor([0.5, 2.0], requires_grad=True)
    >>> (-at_least(x, 1.0)).sum().backward(); x.grad
    tensor([-1., -1.])
    """
    return cast(Tensor, (_AtLeast if torch.compiler.is_compiling() else _AtLeastForwards).apply(x, bound))


def gaussian_likelihood(residual: Tensor, scale: Tensor) -> Tensor:
    """Mass of N(0, max(scale, 0.11)²) within half a unit of `residual` = value − mean, at least 1e-9; one shape."""
    scale = at_least(scale, FLOOR)
    x = residual.abs()
    upper, lower = ((x + d) / (scale * math.sqrt(2)) for d in (0.5, -0.5))
    return at_least(0.5 * (torch.erfc(lower) - torch.erfc(upper)), LEAST)


def bits(*likelihoods: Tensor, least: float = 0.0) -> Tensor:
    """−Σ log₂ p of each example of a batch, where no value is less likely than `least`: (batch,)."""
    return -torch.stack([part.clamp(min=least).log2().flatten(1).sum(1) for part in likelihoods]).sum(0)


class FactorizedPrior(nn.Module):
    """A learned density for each channel of z, the same at each site, with filters 3-3-3-3.

    Args:
        channels: channels of z.
        start: width of the density at the start, published 10.
        filters: widths of the inner layers.

    Shapes: (batch, channels, height, width) to a pair of the same: the likelihood takes `noisy` values.
    """

    def __init__(self, channels: int, start: float = 10.0, filters: tuple[int, ...] = (3, 3, 3, 3)):
        super().__init__()
        widths = (1, *filters, 1)
        growth = start ** (1 / (len(filters) + 1))
        self.matrices, self.biases, self.factors = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for fan, out in pairwise(widths):
            fill = math.log(math.expm1(1 / growth / out))
            self.matrices.append(nn.Parameter(torch.full((channels, out, fan), fill)))
            self.biases.append(nn.Parameter(torch.empty(channels, out, 1).uniform_(-0.5, 0.5)))
        self.factors.extend(nn.Parameter(torch.zeros(channels, width, 1)) for width in filters)
        self.quantiles = nn.Parameter(torch.tensor([-start, 0.0, start]).repeat(channels, 1))

    def logits(self, x: Float[Tensor, "channels 1 values"], learn: bool = True) -> Tensor:
        """Logits of the cumulative density; with `learn` false nothing of the density learns from them."""
        for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            matrix, bias = (matrix, bias) if learn else (matrix.detach(), bias.detach())
            x = F.softplus(matrix) @ x + bias
            if i < len(self.factors):
                factor = self.factors[i] if learn else self.factors[i].detach()
                x = x + factor.tanh() * x.tanh()
        return x

    def median(self) -> Tensor:
        """The middle quantile of each channel, (1, channels, 1, 1)."""
        return self.quantiles[:, 1].detach()[None, :, None, None]

    def likelihood(self, z: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Mass of the unit bin around each value, at least 1e-9."""
        x = z.transpose(0, 1).flatten(1)[:, None]
        lower, upper = self.logits(x - 0.5), self.logits(x + 0.5)
        sign = -(lower + upper).sign().detach()
        mass = at_least((torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs(), LEAST)
        return mass.view(z.shape[1], z.shape[0], *z.shape[2:]).transpose(0, 1)

    def auxiliary_loss(self) -> Tensor:
        """How far the quantiles are from masses 1e-9/2, a half and 1 − 1e-9/2; only the quantiles learn from it."""
        target = math.log(2 / LEAST - 1)
        goal = self.quantiles.new_tensor([-target, 0.0, target])
        return (self.logits(self.quantiles[:, None], learn=False)[:, 0] - goal).abs().sum()
