"""What M2R2 (Bhendawade et al., 2025, arXiv:2502.02040) adds to a decoder: adapters of the fast stream, and routers.

Beside the residual stream h of a decoder runs a second one, p, that is to reach at layer i what h reaches at layer R·i:

    h ← h + attention(norm(h));                        h ← h + F(norm(h))
    p ← p + attention(norm(p); keys and values of h) + A(norm(p));   p ← p + F(norm(p)) + B(norm(p))

The abstract says as much in words; these formulas are this package's own, as the README says.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole


class RateAdapter(nn.Module):
    """A(z) = U SiLU(V z), which starts at zero: before training the fast stream is the slow one.

    Args:
        dim: width of the stream.
        rank: rows of V.

    Shapes: (..., dim) to the same. Parameters: 2 · dim · rank.
    """

    def __init__(self, dim: int, rank: int):
        check_whole(dim=dim, rank=rank)
        super().__init__()
        if dim < 1 or rank < 1:
            raise ValueError(f"dim and rank must be at least 1, got dim={dim} and rank={rank}")
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """V as Kaiming has it, U at zero."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.up(F.silu(self.down(z)))


class LayerAdapters(nn.Module):
    """Of one layer the adapter beside its attention, A, and the one beside its feed-forward part, B.

    Parameters: 4 · dim · rank.
    """

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.attention = RateAdapter(dim, rank)
        self.feedforward = RateAdapter(dim, rank)


class LatentRouter(nn.Module):
    """How sure an exit is, from all fast states since the last gate (accelerated residual latent attention).

    With u_i = L p^i in d_l dimensions, s = softmax(u_e·u_i / √d_l) u_i over the states i up to the gate e, the score is
    w·[s ; u_e] + b: a logit. Exit where its sigmoid is above a threshold.

    Args:
        dim: width of the stream.
        latent: d_l; by default dim / 16, at least 4.

    Shapes: (states, ..., dim) to (...). Parameters: dim · d_l + 2 · d_l + 1.
    """

    def __init__(self, dim: int, latent: int | None = None):
        check_whole(dim=dim, latent=latent)
        super().__init__()
        latent = max(4, dim // 16) if latent is None else latent
        if latent < 1:
            raise ValueError(f"latent must be at least 1, got {latent}")
        self.latent = nn.Linear(dim, latent, bias=False)
        self.score = nn.Linear(2 * latent, 1)

    def forward(self, states: Float[Tensor, "states *batch dim"]) -> Float[Tensor, "*batch"]:
        # The size of a stream grows with depth and differs between models; its direction carries the information.
        u = self.latent(F.rms_norm(states, states.shape[-1:]))
        scores = (u * u[-1]).sum(-1) / math.sqrt(u.shape[-1])
        s = (scores.softmax(0).unsqueeze(-1) * u).sum(0)
        return self.score(torch.cat([s, u[-1]], dim=-1)).squeeze(-1)


class LinearRouter(nn.Module):
    """How sure an exit is, from the state at the gate alone: w·p^e + b, the baseline of `LatentRouter`.

    Shapes: (states, ..., dim) to (...). Parameters: dim + 1.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def forward(self, states: Float[Tensor, "states *batch dim"]) -> Float[Tensor, "*batch"]:
        return self.score(F.rms_norm(states[-1], states.shape[-1:])).squeeze(-1)
