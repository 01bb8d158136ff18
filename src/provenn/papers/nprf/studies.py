"""The small systems that the claims are measured on: a task of positions, and errors of random features."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.nn.language import FeedForward, PreNormBlock
from provenn.nn.positions import sinusoidal_encoding
from provenn.nn.random_features import orthogonal_gaussian, positive_exponents
from provenn.papers.nprf.model import attention_called

SYMBOLS, LENGTH, BACK = 32, 64, 7


class Copier(nn.Module):
    """One causal block over symbols with sinusoidal positions, which says each time what stood 7 symbols before.

    Args:
        name: one of `ATTENTIONS`.
        stress: factor on the query and key maps at the start, which scales the norms of q and k.
    """

    def __init__(self, name: str, stress: float | int = 1.0, dim: int = 64, heads: int = 4, features: int = 32):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, dim)
        mixer = attention_called(name, heads, features=features, max_length=LENGTH)
        self.block = PreNormBlock(
            dim, partial(mixer, causal=True), feedforward=partial(FeedForward, bias=True), norm=nn.LayerNorm
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, SYMBOLS)
        with torch.no_grad():
            for part in (self.block.mixer.query, self.block.mixer.key):
                part.weight.mul_(stress)
                part.bias.mul_(stress)

    def forward(self, x: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens symbols"]:
        hidden = self.embed(x)
        places = sinusoidal_encoding(torch.arange(x.shape[1], device=x.device), hidden.shape[-1])
        return self.head(self.norm(self.block(hidden + places.to(hidden))))


def learn_to_copy(
    name: str, *, lr: float, steps: int, stress: float | int, seed: int, device: str, batch: int = 16
) -> dict[str, Any]:
    """Train a `Copier` with Adam: its accuracy on 256 fresh rows, and loss and gradient norm at every step."""
    torch.manual_seed(seed)
    model = Copier(name, stress).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    losses, norms = [], []

    def rows(count: int) -> Tensor:
        return torch.randint(SYMBOLS, (count, LENGTH), generator=generator).to(device)

    for _ in range(steps):
        x = rows(batch)
        loss = F.cross_entropy(model(x)[:, BACK:].flatten(0, 1), x[:, :-BACK].flatten())
        optimizer.zero_grad()
        loss.backward()
        # An infinite bound clips nothing and gives the norm.
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), torch.inf).item())
        losses.append(loss.item())
        optimizer.step()
    with torch.no_grad():
        x = rows(256)
        accuracy = (model(x)[:, BACK:].argmax(-1) == x[:, :-BACK]).double().mean().item()
    return {"accuracy": accuracy, "loss": losses, "gradient": norms}


def row_error(
    norm: float | int, features: int, *, seed: int, dim: int = 64, tokens: int = 64, draws: int = 20
) -> float:
    """Mean L1 distance of attention rows by orthogonal positive features from exact softmax, q and k of one norm."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(draws):
        q, k = norm * F.normalize(torch.randn(2, tokens, dim, generator=generator, dtype=torch.float64), dim=-1)
        w = orthogonal_gaussian(features, dim, generator=generator).double()
        implied = (positive_exponents(q, w) - norm * w.norm(dim=-1).max()).exp() @ positive_exponents(k, w).exp().mT
        implied = implied / implied.sum(dim=-1, keepdim=True)
        total += (implied - (q @ k.mT).softmax(dim=-1)).abs().sum(dim=-1).mean().item()
    return total / draws


def crossing(sizes: Sequence[int], ours: Sequence[float | int], theirs: Sequence[float | int]) -> float:
    """Where two curves of time over size meet, on log-log axes; beyond the last size by its last slope."""
    gaps = [math.log(a / b) for a, b in zip(ours, theirs)]
    for i in range(len(gaps) - 1):
        if gaps[i] > 0 >= gaps[i + 1] or i == len(gaps) - 2:
            low, high = math.log(sizes[i]), math.log(sizes[i + 1])
            return math.exp(low + (high - low) * gaps[i] / (gaps[i] - gaps[i + 1]))
    raise ValueError(f"need at least two sizes, got {len(sizes)}")
