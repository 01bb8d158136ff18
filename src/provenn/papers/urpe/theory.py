"""The paper's theorems as checks that run: what relative biases alone cannot do, and the conditions for doing all.

Theorem 2: where all tokens are equal, attention by any right-stochastic matrix gives each of them the same, and so
does all that is applied to each token alone. Theorem 3: a Transformer of relative positions approximates every
continuous map of sequences if its attention is *attentive* and *position-aware*. It is attentive if it contains softmax
attention, and position-aware if for some parameters no two rows of its weights have the same sum. The paper's own
wording of the second was not to be had; this is our reading.
"""

import copy
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.papers.urpe.layers import URPEAttention


def row_spread(outputs: Float[Tensor, "batch tokens width"]) -> float:
    """How far the outputs of a sequence's tokens lie from each other, at most, relative to their size."""
    apart = (outputs - outputs[:, :1]).abs().amax().item()
    return apart / max(outputs.abs().amax().item(), torch.finfo(outputs.dtype).tiny)


def least_error(target: Float[Tensor, "tokens width"]) -> float:
    """What a model that gives every token the same misses this target by, in the largest entry, at least.

    Half of what two rows of the target differ by: the middle of them is the best single answer.

    >>> least_error(torch.tensor([[1.0], [2.0], [4.0]]))
    1.5
    """
    return ((target.amax(dim=0) - target.amin(dim=0)).amax() / 2).item()


def attentive(layer: URPEAttention) -> URPEAttention:
    """A copy with B = 0 and C = 1, which is softmax attention: the first condition's construction."""
    made = copy.deepcopy(layer)
    with torch.no_grad():
        if made.rel_bias is not None:
            made.rel_bias.zero_()
        if made.rel_scale is not None:
            made.rel_scale.fill_(1)
    return made


def position_aware(layer: URPEAttention) -> URPEAttention:
    """A copy with W_Q = 0, B = 0 and c = 1 for keys from the query on, else 0: the second condition's construction.

    The softmax is then even, and row i of n sums to (n − i)/n, i from 0: all different. Of a causal layer c is 1 for
    the token itself alone, and row i sums to 1/(i + 1). Without C the sums are 1.
    """
    made = attentive(layer)
    with torch.no_grad():
        made.query.weight.zero_()
        if made.query.bias is not None:
            made.query.bias.zero_()
        if made.rel_scale is not None:
            here = torch.zeros(1, dtype=torch.long)
            itself = made.relations.index(here, here).item()
            relations = torch.arange(made.relations.size)
            kept = relations == itself if made.causal else relations >= itself
            made.rel_scale.copy_(kept[:, None].expand_as(made.rel_scale))
    return made


def row_sums(layer: URPEAttention, tokens: int) -> Float[Tensor, "heads tokens"]:
    """Sums of the rows of a layer's weights on equal tokens."""
    x = torch.ones(1, tokens, layer.dim, dtype=layer.out.weight.dtype, device=layer.out.weight.device)
    with torch.no_grad():
        return layer.weights(x)[1].sum(dim=-1)[0]


class TheoryBlock(nn.Module):
    """The theorems' own block: x ← x + Σ_h A_h x W_V W_O, without 1/√d; x ← x + ReLU(x W₁) W₂; no layer norm.

    Shapes: (batch, tokens, dim) to the same.
    """

    def __init__(self, dim: int, heads: int, *, hidden: int, max_length: int, encoding: str, causal: bool = False):
        super().__init__()
        self.mixer = URPEAttention(dim, heads, max_length=max_length, encoding=encoding, causal=causal, bias=False)
        with torch.no_grad():
            self.mixer.query.weight.mul_(math.sqrt(dim // heads))  # the layer divides by it again
        self.linear1, self.linear2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "batch tokens dim"], *, mask: Tensor | None = None) -> Tensor:
        x = x + self.mixer(x, mask=mask)
        return x + self.linear2(self.linear1(x).relu())
