"""Losses of detectors, element by element: the detector divides by the number of its positives."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from provenn.nn.detection.boxes import giou


def focal_loss(
    logits: Float[Tensor, "*batch"], targets: Float[Tensor, "*batch"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, "*batch"]:
    """Cross-entropy that counts what is predicted well less (Lin et al., 2017, arXiv:1708.02002, equation 5).

    −α_t (1 − p_t)^γ log p_t, with p_t = σ(logit) and α_t = α at targets of 1, their complements at 0.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p = logits.sigmoid()
    missing = p * (1 - targets) + (1 - p) * targets
    return (alpha * targets + (1 - alpha) * (1 - targets)) * missing**gamma * entropy


def giou_loss(boxes: Float[Tensor, "*batch 4"], targets: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """1 − GIoU: 0 of the same box, up to 2 of one far away."""
    return 1 - giou(boxes, targets)


def centreness(distances: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """How central a point is to a box, from its distances to left, top, right and bottom (FCOS, equation 3).

    √(min(l, r)/max(l, r) · min(t, b)/max(t, b)): 1 at the centre, 0 on the border and outside.
    """
    pairs = distances.clamp(min=0).unflatten(-1, (2, 2))
    ratio = pairs.amin(dim=-2) / pairs.amax(dim=-2).clamp(min=torch.finfo(pairs.dtype).tiny)
    return ratio.prod(dim=-1).sqrt()
