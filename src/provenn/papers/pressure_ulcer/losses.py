"""The loss and the figures of a wound's mask, all from one confusion matrix."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

EPS = 1.0  # pixels added above and below in soft Dice: an image without wound has a loss too


def wound_loss(
    logits: Float[Tensor, "batch height width"],
    masks: Shaped[Tensor, "batch height width"],
    *,
    dice: float | int = 1.0,
    tversky: tuple[float | int, float | int] = (0.5, 0.5),
) -> Float[Tensor, ""]:
    """Binary cross-entropy, and soft Dice of each image (inferred: the paper's loss is not known).

    L = BCE + dice · mean(1 − (TP + ε) / (TP + α FP + β FN + ε)), with TP, FP and FN summed over σ(logits)

    Args:
        logits: of the wound.
        masks: 1 where the wound is, 0 elsewhere.
        dice: weight of the second term.
        tversky: α and β; a half each is Dice.
    """
    logits, masks = logits.float(), masks.to(logits.dtype).float()
    total = F.binary_cross_entropy_with_logits(logits, masks)
    if not dice:
        return total
    probability = logits.sigmoid()
    both = (probability * masks).sum((1, 2))
    false_positive = (probability * (1 - masks)).sum((1, 2))
    false_negative = ((1 - probability) * masks).sum((1, 2))
    overlap = (both + EPS) / (both + tversky[0] * false_positive + tversky[1] * false_negative + EPS)
    return total + dice * (1 - overlap).mean()


def overlap_scores(
    both: np.ndarray, told: np.ndarray, true: np.ndarray, pixels: np.ndarray
) -> Mapping[str, np.ndarray]:
    """Dice, IoU and accuracy of masks from one confusion matrix each.

    D = 2 TP / (2 TP + FP + FN), J = TP / (TP + FP + FN) = D / (2 − D), A = (TP + TN) / all. An empty mask that is
    predicted empty counts as 1. J ≤ A always: with e = (FP + FN) / all, J = TP / (TP + e·all) and TP ≤ (1 − e)·all.

    Args:
        both, told, true, pixels: of each mask, the pixels in both, predicted, true, and in all.

    >>> overlap_scores(np.array([1]), np.array([2]), np.array([2]), np.array([4]))["dice"]
    array([0.5])
    """
    wrong = told + true - 2 * both
    empty = (told + true) == 0
    return {
        "dice": np.where(empty, 1.0, 2 * both / np.maximum(told + true, 1)),
        "iou": np.where(empty, 1.0, both / np.maximum(told + true - both, 1)),
        "accuracy": 1 - wrong / pixels,
    }
