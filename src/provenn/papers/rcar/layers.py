"""The two regulators and the attention that they regulate (Diao et al., 2023, arXiv:2303.13371, section 3).

Query and context are two sets of tokens of one width, such as words and regions. The equations are those of the
authors' code: the body of the paper was not at hand.
"""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.narrowing import of_kind
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import hide_tokens
from provenn.ops.autograd import at_least_single, without_autocast

EPSILON = 1e-8  # added to a norm, not a least value of it
SLOPE = 0.1  # of the leaky ReLU
T2I, I2T = 10.0, 3.0  # λ_0 where words look at regions, and where regions look at words
DROPOUT = 0.4
Mode = Literal["t2i", "i2t"]
Scaling = Literal["softmax", "l2norm", "clipped_l2norm", "l1norm", "clipped_l1norm", "clipped", "no_norm"]
SCALINGS: tuple[str, ...] = get_args(Scaling)


def l2_normalise(x: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """x / (‖x‖₂ + 10⁻⁸); a vector of zeros stays so, and passes a gradient of zero through its norm.

    >>> l2_normalise(torch.tensor([3.0, 4.0])).tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    return x / off_zero(torch.linalg.vector_norm(x, dim=dim, keepdim=True))


def off_zero(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x + 10⁻⁸ of numbers that are at least 0, also where what exports to ONNX drops so small an addition."""
    return (x + EPSILON).clamp_min(EPSILON)


def apply_single(module: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of numbers in the type of its weights, in single precision at least."""
    weight = next(module.parameters(), x)
    return at_least_single(module(x.to(weight.dtype)))


class Attended(NamedTuple):
    """What attention gave.

    Args:
        values: q̂, of the length 1 each.
        weights: α of each query over the context; they sum to 1.
    """

    values: Float[Tensor, "batch queries dim"]
    weights: Float[Tensor, "batch queries context"]


class Regulated(NamedTuple):
    """The two factors of attention for each query.

    Args:
        factors: e, in [−1, 1], which weighs the channels of a query.
        temperature: λ, at least 0, which sharpens the softmax.
    """

    factors: Float[Tensor, "*queries dim"]
    temperature: Float[Tensor, "*queries"]


class Aggregated(NamedTuple):
    """Alignments made one.

    Args:
        summary: h, of length 1.
        weights: β of the alignments; they sum to 1.
    """

    summary: Float[Tensor, "*batch dim"]
    weights: Float[Tensor, "*batch queries"]


def regulated_attention(
    query: Float[Tensor, "batch queries dim"],
    context: Float[Tensor, "batch context dim"],
    factors: Float[Tensor, "#batch #queries dim"] | None = None,
    temperature: Float[Tensor, "#batch #queries"] | float = T2I,
    *,
    query_mask: Bool[Tensor, "batch queries"] | None = None,
    context_mask: Bool[Tensor, "batch context"] | None = None,
    scaling: Scaling = "clipped_l2norm",
) -> Attended:
    """Attention with a weight for each channel and a temperature for each query.

        s_ij = LeakyReLU(c_i · (q_j ⊙ e_j)),  s̄_ij = s_ij / (√Σ_j s_ij² + 10⁻⁸),
        α_ij = softmax_i(λ_j s̄_ij),  q̂_j = l2norm(Σ_i α_ij c_i)

    Similarities are normalised over the queries j, and the softmax is over the context i. It is computed in single
    precision at least, also under autocast: sums of squares over queries underflow in half precision.

    Args:
        query, context: q and c; rows of length 1 in the paper.
        factors: e. Default: ones.
        temperature: λ; 10 where words look at regions, 3 where regions look at words.
        query_mask, context_mask: True where a token is real. The others may hold anything, and change nothing.
        scaling: how similarities are scaled before the softmax; see `scaled_similarities`.

    >>> seen = regulated_attention(torch.eye(2)[None], torch.eye(2)[None], temperature=0.0)
    >>> seen.weights.tolist()
    [[[0.5, 0.5], [0.5, 0.5]]]
    """
    with without_autocast(query):
        query = at_least_single(hide_tokens(query, query_mask))
        context = at_least_single(hide_tokens(context, context_mask))
        asked = query if factors is None else query * factors
        lam = temperature if not isinstance(temperature, Tensor) else temperature[:, None]
        weights = attention_weights(
            (asked @ context.mT)[:, None],
            lam,
            None if query_mask is None else query_mask[:, None],
            context_mask,
            scaling,
        )[:, 0]
        return Attended(l2_normalise(weights @ context), weights)


def attention_weights(
    similarity: Float[Tensor, "contexts sets queries context"],
    temperature: Float[Tensor, "#contexts #sets #queries"] | float,
    query_mask: Bool[Tensor, "#contexts sets queries"] | None = None,
    context_mask: Bool[Tensor, "contexts context"] | None = None,
    scaling: Scaling = "clipped_l2norm",
) -> Float[Tensor, "contexts sets queries context"]:
    """α of several sets of queries, each of which looks at each context.

    Args:
        similarity: c_i · (q_j ⊙ e_j).
        temperature: λ.
        query_mask, context_mask: True where a token is real.
        scaling: see `scaled_similarities`.
    """
    scaled = scaled_similarities(similarity, query_mask, scaling)
    scaled = scaled * (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    if context_mask is not None:
        scaled = scaled.masked_fill(~context_mask[:, None, None], torch.finfo(scaled.dtype).min)
    return scaled.softmax(dim=-1)


def scaled_similarities(
    similarity: Float[Tensor, "contexts sets queries context"],
    query_mask: Bool[Tensor, "#contexts sets queries"] | None,
    scaling: Scaling,
) -> Float[Tensor, "contexts sets queries context"]:
    """Similarities scaled over the queries, for each token of the context.

    Args:
        similarity: of each query and each token of the context.
        query_mask: True where a query is real.
        scaling: as SCAN names them. `clipped` is a leaky ReLU of slope 0.1; `softmax`, `l2norm` and `l1norm` are over
            the queries; `no_norm` leaves similarities as they are. The paper has `clipped_l2norm`.

    Raises:
        ValueError: another scaling.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
    hidden = None if query_mask is None else ~query_mask[..., None]
    if scaling == "softmax":
        if hidden is not None:
            similarity = similarity.masked_fill(hidden, torch.finfo(similarity.dtype).min)
        return similarity.softmax(dim=-2)
    if hidden is not None:
        similarity = similarity.masked_fill(hidden, 0)
    if scaling.startswith("clipped"):
        similarity = F.leaky_relu(similarity, SLOPE)
    if scaling.endswith("l2norm"):
        return l2_normalise(similarity, dim=-2)
    if scaling.endswith("l1norm"):
        return similarity / off_zero(similarity.abs().sum(dim=-2, keepdim=True))
    return similarity


class AlignmentVector(nn.Module):
    """How a query differs from what it found: a_j = l2norm(W (q_j − q̂_j)² + b).

    Args:
        embed_dim: d, of tokens.
        align_dim: m, of alignments.

    Shapes: two of (…, queries, d) to (…, queries, m). Parameters: d m + m.
    """

    def __init__(self, embed_dim: int = 1024, align_dim: int = 256):
        super().__init__()
        check_sizes(embed_dim=embed_dim, align_dim=align_dim)
        self.project = nn.Linear(embed_dim, align_dim)
        initialise(self)

    def forward(
        self, query: Float[Tensor, "*#queries dim"], attended: Float[Tensor, "*#queries dim"]
    ) -> Float[Tensor, "*queries align"]:
        return l2_normalise(apply_single(self.project, (query - attended).square()))


class CorrespondenceRegulator(nn.Module):
    """RCR: from the alignment of each query the factors with which it looks again.

        e ← clamp(e + tanh(MLP_e(a)), −1, 1),  λ ← ReLU(λ + MLP_λ(a))

    MLP_e is Linear(m, 2m), tanh, Linear(2m, d); MLP_λ is Linear(m, m/2), tanh, Linear(m/2, 1). As e starts at 1, the
    first step can only lower it; where it is clamped, no gradient passes.

    Args:
        align_dim: m, of alignments; at least 2.
        embed_dim: d, of tokens.

    Shapes: a (…, queries, m), e (…, queries, d) or 1, λ (…, queries) or a number to e and λ of each query.
    Parameters: 2m² + 2m + 2md + d + m(m/2) + m/2 + m/2 + 1.

    >>> regulator = CorrespondenceRegulator(align_dim=4, embed_dim=8)
    >>> e, lam = regulator(a=torch.rand(2, 5, 4), e=1.0, lam=10.0)
    >>> e.shape, lam.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 5]))
    """

    def __init__(self, align_dim: int = 256, embed_dim: int = 1024):
        super().__init__()
        check_sizes(align_dim=align_dim, embed_dim=embed_dim)
        if align_dim < 2:
            raise ValueError(f"align_dim must be at least 2, got {align_dim}")
        self.channels = nn.Sequential(
            nn.Linear(align_dim, 2 * align_dim), nn.Tanh(), nn.Linear(2 * align_dim, embed_dim)
        )
        self.sharpness = nn.Sequential(nn.Linear(align_dim, align_dim // 2), nn.Tanh(), nn.Linear(align_dim // 2, 1))
        initialise(self)

    def forward(
        self,
        a: Float[Tensor, "*queries align"],
        e: Float[Tensor, "*#queries dim"] | float = 1.0,
        lam: Float[Tensor, "*#queries"] | float = T2I,
    ) -> Regulated:
        factors = (apply_single(self.channels, a).tanh() + e).clamp(-1, 1)
        return Regulated(factors, (apply_single(self.sharpness, a)[..., 0] + lam).relu())


class AggregationRegulator(nn.Module):
    """RAR: the alignments weighted by what they have in common with their summary, and summed up to a new one.

        β = softmax_j(w · [tanh(W_l a_j + b_l) ⊙ tanh(W_g h + b_g)] + b),  h ← l2norm(Σ_j β_j a_j)

    Both tanh are followed by a dropout. b adds one number to all scores, which the softmax takes out; the authors'
    code has it.

    Args:
        align_dim: m, of alignments.
        dropout: probability.

    Shapes: a (…, queries, m), h (…, m), mask (…, queries) to h (…, m) and β (…, queries).
    Parameters: 2m² + 3m + 1.

    >>> h, weights = AggregationRegulator(align_dim=4)(a=torch.rand(2, 5, 4), h=torch.rand(2, 4))
    >>> h.shape, weights.sum(-1).round(decimals=3).tolist()
    (torch.Size([2, 4]), [1.0, 1.0])
    """

    def __init__(self, align_dim: int = 256, dropout: float = DROPOUT):
        super().__init__()
        check_sizes(align_dim=align_dim)
        check_finite(dropout=dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie between 0 and 1, below 1, got {dropout}")
        self.local, self.whole = nn.Linear(align_dim, align_dim), nn.Linear(align_dim, align_dim)
        self.score = nn.Linear(align_dim, 1)
        self.dropout = nn.Dropout(dropout)
        initialise(self)

    def forward(
        self,
        a: Float[Tensor, "*batch queries align"],
        h: Float[Tensor, "*batch align"],
        mask: Bool[Tensor, "*#batch queries"] | None = None,
    ) -> Aggregated:
        a = a if mask is None else a.masked_fill(~mask[..., None], 0)
        local, whole = (self.dropout(apply_single(layer, x).tanh()) for layer, x in ((self.local, a), (self.whole, h)))
        scores = apply_single(self.score, local * whole[..., None, :])[..., 0]
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        return Aggregated(l2_normalise((weights[..., None, :] @ at_least_single(a))[..., 0, :]), weights)


class RegulatedCrossAttention(nn.Module):
    """Cross-attention that RCR regulates: each step looks, compares, and looks again with other factors.

    It has no projections of its own: queries and context are compared as they come, scaled to the length 1. It adds
    what was found to the queries, if `residual`.

    Args:
        dim: d, of both token sets.
        align_dim: m. Default: d/4, at least 2, as 256 of 1024.
        steps: of RCR; 0 is plain attention. Each has weights of its own.
        temperature: λ_0.
        residual: whether the queries themselves are added.

    Shapes: (batch, tokens, d) and (batch, other, d) to the first. Slot: cross-mixer. As similarities are normalised
    over the queries, each query's answer depends on the others.
    """

    def __init__(
        self,
        dim: int,
        align_dim: int | None = None,
        steps: int = 2,
        temperature: float = T2I,
        *,
        residual: bool = False,
    ):
        super().__init__()
        check_sizes(dim=dim, align_dim=align_dim)
        check_steps(steps=steps)
        self.dim, self.temperature, self.residual = dim, check_temperature(temperature), residual
        width = max(2, dim // 4) if align_dim is None else align_dim
        self.align = nn.ModuleList(AlignmentVector(dim, width) for _ in range(steps))
        self.regulate = nn.ModuleList(CorrespondenceRegulator(width, dim) for _ in range(steps))

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        other: Float[Tensor, "batch other dim"],
        *,
        mask: Bool[Tensor, "batch other"] | None = None,
        query_mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token of the other set may be attended, `query_mask` where one of x is real."""
        if x.shape[-1] != self.dim or other.shape[-1] != self.dim:
            raise ValueError(f"expected tokens of {self.dim} numbers, got {x.shape[-1]} and {other.shape[-1]}")
        with without_autocast(x):  # MLPs too: a temperature that is rounded sharpens other words
            query, context = (
                l2_normalise(at_least_single(hide_tokens(tokens, real)))
                for tokens, real in ((x, query_mask), (other, mask))
            )
            e: Tensor | None = None
            lam: Tensor | float = self.temperature
            for align, regulate in zip(self.align, self.regulate):
                found = regulated_attention(query, context, e, lam, query_mask=query_mask, context_mask=mask)
                e, lam = regulate(align(query, found.values), 1.0 if e is None else e, lam)
            found = regulated_attention(query, context, e, lam, query_mask=query_mask, context_mask=mask)
        values = of_kind(found.values, Tensor, "values").to(x.dtype)
        return x + values if self.residual else values


def check_sizes(**sizes: int | None) -> None:
    """Are these whole numbers of at least 1, or None?

    Raises:
        ValueError: one is not.
    """
    check_whole(**sizes)
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_steps(**steps: int) -> None:
    """Are these whole numbers of at least 0?

    Raises:
        ValueError: one is not.
    """
    check_whole(**steps)
    for name, count in steps.items():
        if count < 0:
            raise ValueError(f"{name} must be at least 0, got {count}")


def check_temperature(temperature: float) -> float:
    """λ_0, finite and at least 0.

    Raises:
        ValueError: it is not.
    """
    check_finite(temperature=temperature)
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    return float(temperature)


def initialise(module: nn.Module) -> None:
    """Xavier's uniform weights and biases of zero in every linear layer."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
