"""Circle loss (Sun et al., 2020, arXiv:2002.10857): pairs and classes whose similarity is far from good weigh more."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from provenn.nn.arguments import check_finite
from provenn.ops.autograd import at_least_single

CLASS = {"scale": 64.0, "margin": 0.35}  # the paper's for faces, whose classes are many
PAIR = {"scale": 128.0, "margin": 0.25}  # the paper's for persons, by pairs of a batch


def circle_loss(
    cosines: Float[Tensor, "batch classes"],
    labels: Int64[Tensor, " batch"],
    *,
    scale: float | int = CLASS["scale"],
    margin: float | int = CLASS["margin"],
    weighted: bool = True,
) -> Float[Tensor, ""]:
    """The class form (equation 6): in place of cross-entropy.

        log(1 + Σ_j exp(γ α_n^j (s_n^j − m)) · exp(−γ α_p (s_p − 1 + m))),  α_p = [1 + m − s_p]₊,  α_n = [s_n + m]₊

    The weights α pass no gradient.

    Args:
        cosines: of each feature with the weights of each class.
        labels: the class of each.
        scale: γ.
        margin: m.
        weighted: False puts all α to 1 and both margins to 0: cross-entropy of γ times the cosines.

    Raises:
        ValueError: a scale that is not positive, or a margin outside of 0…1.
    """
    _check(scale, margin)
    s = at_least_single(cosines)
    own = F.one_hot(labels, s.shape[1]).bool()
    if weighted:
        positive = (1 + margin - s.detach()).clamp(min=0) * (s - 1 + margin)
        negative = (s.detach() + margin).clamp(min=0) * (s - margin)
        s = torch.where(own, positive, negative)
    return F.cross_entropy(scale * s, labels)


def pair_circle_loss(
    features: Float[Tensor, "batch dim"],
    labels: Int64[Tensor, " batch"],
    *,
    scale: float | int = PAIR["scale"],
    margin: float | int = PAIR["margin"],
) -> Float[Tensor, ""]:
    """The pair form, over the pairs of a batch with each picture as the anchor once (equation 6, of K and L pairs).

        mean over a of log(1 + Σ_n exp(γ α_n (s_n − m)) · Σ_p exp(−γ α_p (s_p − 1 + m)))

    A picture without a second one of its identity, or without one of another, takes no part.

    Args:
        features: compared by their cosines.
        labels: whom each shows.
        scale, margin: γ and m.
    """
    _check(scale, margin)
    unit = F.normalize(at_least_single(features), dim=1)
    s = unit @ unit.T
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = -scale * (1 + margin - s.detach()).clamp(min=0) * (s - 1 + margin)
    negative = scale * (s.detach() + margin).clamp(min=0) * (s - margin)
    complete = (same & ~itself).any(1) & (~same).any(1)
    # Rows that take no part hold finite numbers, since a gradient of nothing times infinity is none.
    right = positive.masked_fill(~(same & ~itself) & complete[:, None], -torch.inf).logsumexp(1)
    wrong = negative.masked_fill(same & complete[:, None], -torch.inf).logsumexp(1)
    losses = torch.where(complete, F.softplus(right + wrong), 0.0)
    return losses.sum() / complete.sum().clamp(min=1)


def _check(scale: float | int, margin: float | int) -> None:
    check_finite(scale=scale, margin=margin)
    if not scale > 0 or not 0 <= margin <= 1:
        raise ValueError(f"scale must be positive and margin between 0 and 1, got {scale} and {margin}")
