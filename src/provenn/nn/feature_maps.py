"""Feature maps of linear attention: φ with φ(q)·φ(k) instead of exp(q·k/√d), each query and key by itself.

A map takes (batch, heads, tokens, head_dim), and `start`, the position of the first token, which only cosFormer reads.
It gives (batch, heads, tokens, features) in float32 at least, since sums over tokens are taken of it. `features` says
how many. A map of one kind is built anew for queries and for keys, as `maker(heads, head_dim)`.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.random_features import elu_features, orthogonal_gaussian, positive_features
from provenn.ops.autograd import without_autocast
from provenn.ops.linear_attention.reference import accumulator


class FeatureMap(nn.Module, ABC):
    """What all maps share: the sizes, and the shape that `forward` asks for.

    Args:
        heads, head_dim: H and d of the attention.
        features: how wide φ is; d by default.
    """

    def __init__(self, heads: int, head_dim: int, features: int | None = None):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.features = head_dim if features is None else features
        if min(heads, head_dim, self.features) < 1:
            raise ValueError(
                f"heads, head_dim and features must be at least 1, got {heads}, {head_dim} and {self.features}"
            )

    def forward(
        self, x: Float[Tensor, "batch heads tokens head_dim"], start: int = 0
    ) -> Float[Tensor, "batch heads tokens features"]:
        """φ of every token; `start` is the position of the first."""
        if x.shape[1] != self.heads or x.shape[-1] != self.head_dim:
            raise ValueError(f"expected (batch, {self.heads}, tokens, {self.head_dim}), got {tuple(x.shape)}")
        with without_autocast(x):  # half precision overflows in the exponentials of most maps
            return self.phi(x.to(accumulator(x)), start)

    @abstractmethod
    def phi(self, x: Tensor, start: int) -> Tensor:
        """The map itself, of an x of the right shape, in float32 at least."""


class PerHeadLinear(nn.Module):
    """y = x W_h + b_h with a W and b for each head, W the identity (cut or padded) and b zero to begin with.

    Args:
        heads, head_dim: of x.
        width: of y.
        bias: whether there is a b.
    """

    def __init__(self, heads: int, head_dim: int, width: int, *, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim, width).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, 1, width)) if bias else None

    def forward(self, x: Float[Tensor, "batch heads tokens head_dim"]) -> Float[Tensor, "batch heads tokens width"]:
        y = x @ self.weight.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def both_signs(
        self, x: Float[Tensor, "batch heads tokens head_dim"]
    ) -> Float[Tensor, "batch heads tokens 2 width"]:
        """y and −y by one product, which is quicker than to copy y."""
        weight = self.weight.to(x.dtype)
        y = x @ torch.cat([weight, -weight], dim=-1)
        if self.bias is not None:
            bias = self.bias.to(x.dtype)
            y = y + torch.cat([bias, -bias], dim=-1)
        return y.unflatten(-1, (2, -1))


class EluMap(FeatureMap):
    """φ(x) = 1 + elu(x) (Katharopoulos et al., 2020, arXiv:2006.16236)."""

    def phi(self, x: Tensor, start: int) -> Tensor:
        return elu_features(x)


class ReluMap(FeatureMap):
    """φ(x) = relu(x); a query with no positive coordinate in common with a key gives it no weight."""

    def phi(self, x: Tensor, start: int) -> Tensor:
        return F.relu(x)


class T2RMap(FeatureMap):
    """φ(x) = relu(x W + b), learned for each head (Kasai et al., 2021, arXiv:2103.13076).

    Parameters: heads · (head_dim + 1) · features.
    """

    def __init__(self, heads: int, head_dim: int, features: int | None = None):
        super().__init__(heads, head_dim, features)
        self.linear = PerHeadLinear(heads, head_dim, self.features, bias=True)

    def phi(self, x: Tensor, start: int) -> Tensor:
        return F.relu(self.linear(x))


class PerformerMap(FeatureMap):
    """φ(x) = e^{w·u − ‖u‖²/2} / √m with u = x/d^¼: on average φ(q)·φ(k) = exp(q·k/√d) (Choromanski et al., 2021).

    Positive random features of orthogonal rows w. Maps of one seed draw the same, as those of queries and keys must.

    Args:
        heads, head_dim: as in `FeatureMap`.
        features: m; d·ln d by default.
        seed: of the draw, which each head has for itself.
    """

    projection: Tensor

    def __init__(self, heads: int, head_dim: int, features: int | None = None, *, seed: int = 0):
        super().__init__(
            heads, head_dim, max(1, round(head_dim * math.log(head_dim))) if features is None else features
        )
        generator = torch.Generator().manual_seed(seed)
        rows = [orthogonal_gaussian(self.features, head_dim, generator=generator, device="cpu") for _ in range(heads)]
        self.register_buffer("projection", torch.stack(rows))

    def phi(self, x: Tensor, start: int) -> Tensor:
        return positive_features(x / self.head_dim**0.25, self.projection.to(x.dtype))


class CosFormerMap(FeatureMap):
    """φ(x)_i = [relu(x) cos(πi/2M), relu(x) sin(πi/2M)], so that near tokens weigh more (Qin et al., 2022, 2202.08791).

    Args:
        heads, head_dim: as in `FeatureMap`.
        length: M; positions from M on would give weights below zero and are refused.
    """

    def __init__(self, heads: int, head_dim: int, *, length: int = 2048):
        super().__init__(heads, head_dim, 2 * head_dim)
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length = length

    def phi(self, x: Tensor, start: int) -> Tensor:
        end = start + x.shape[-2]
        if end > self.length:
            raise ValueError(f"cosFormer's positions end at length={self.length}, got {end} tokens; build it with more")
        angle = torch.arange(start, end, device=x.device, dtype=x.dtype).unsqueeze(-1) * (math.pi / 2 / self.length)
        x = F.relu(x)
        return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1)


class ExponentialMap(FeatureMap):
    """φ(x) = exp(t·x): spiky for a large t, but not monotone in q·k (2402.04347, section 3.2).

    Args:
        heads, head_dim: as in `FeatureMap`.
        t: the inverse temperature.
    """

    def __init__(self, heads: int, head_dim: int, *, t: float = 1.0):
        super().__init__(heads, head_dim)
        self.t = t

    def phi(self, x: Tensor, start: int) -> Tensor:
        return (self.t * x).exp()


class TaylorMap(FeatureMap):
    """φ(x) = [1, x/d^¼, vec(xxᵀ)/√(2d)]: φ(q)·φ(k) = 1 + s + s²/2 with s = q·k/√d (2402.04347, section 3.2).

    The second-order Taylor polynomial of exp: positive everywhere, but it falls again for s < −1. Features: 1 + d + d².
    """

    def __init__(self, heads: int, head_dim: int):
        super().__init__(heads, head_dim, 1 + head_dim + head_dim**2)

    def phi(self, x: Tensor, start: int) -> Tensor:
        squares = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / math.sqrt(2 * self.head_dim)
        return torch.cat([torch.ones_like(x[..., :1]), x / self.head_dim**0.25, squares], dim=-1)
