"""What BEVANet is trained by: hard pixels, and boundaries of the masks (arXiv:2508.07300, after PIDNet)."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

IGNORED = 255  # of a mask, as everywhere in semantic segmentation
THRESHOLD = 0.9  # pixels whose true class has this probability or more are easy
HARD_SHARE = 131072 / (12 * 1024**2)  # of the pixels at least that count: 131,072 of 12 crops of 1024²
FRAME = 6  # pixels at the border of a mask that are no boundary
TAN_22, TAN_67 = 13573, 13573 + 2**16  # tan 22.5° and tan 67.5° in units of 2^-15


def hard_pixel_loss(
    logits: Float[Tensor, "batch classes height width"],
    target: Int64[Tensor, "batch height width"],
    *,
    share: float = HARD_SHARE,
    weight: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the hard pixels (OHEM).

    Hard are those whose true class has a probability below max(0.9, the k-th smallest one), k = `share` of all pixels.

    Args:
        logits: of each class.
        target: class numbers; 255 is not judged.
        share: of the pixels, those not judged among them. The authors' k is 131,072 whatever the number of pixels.
        weight: of each class.
    """
    judged = target != IGNORED
    losses = F.cross_entropy(logits.float(), target, weight, ignore_index=IGNORED, reduction="none")
    truth = torch.where(judged, target, 0).unsqueeze(1)
    with torch.no_grad():
        probability = logits.float().softmax(1).gather(1, truth)[:, 0][judged]
    if not len(probability):
        return losses.sum()  # zero, and still a function of the logits
    index = min(max(1, round(share * target.numel())), len(probability) - 1)
    threshold = probability.kthvalue(index + 1).values.clamp_min(THRESHOLD)
    hard = losses[judged][probability < threshold]
    return hard.sum() / max(1, len(hard))


def boundary_loss(
    logits: Float[Tensor, "batch 1 height width"], target: Bool[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Binary cross-entropy in which boundary weighs as much as the share of all that is none, and the other way."""
    positive = target.float().mean()
    weight = torch.where(target, 1 - positive, positive)
    return F.binary_cross_entropy_with_logits(logits[:, 0].float(), target.float(), weight)


def boundaries(mask: Int64[Tensor, "batch height width"], width: int = 4) -> Bool[Tensor, "batch height width"]:
    """Where a mask's class changes: Canny's edges of its numbers, a frame of 6 pixels cleared, widened.

    It is what OpenCV's `Canny(mask, 0.1, 0.2)` and `dilate` with a square of `width` give: Sobel gradients, edges where
    |dx| + |dy| is largest across the edge. With whole numbers, thresholds below 1 leave no weak edges to follow.

    Args:
        mask: class numbers, 255 for what is not judged.
        width: of the square that widens edges.
    """
    edges = canny(mask)
    inside = torch.zeros_like(edges)
    inside[:, FRAME:-FRAME, FRAME:-FRAME] = edges[:, FRAME:-FRAME, FRAME:-FRAME]
    before = width // 2
    padded = F.pad(inside.float(), (before, width - 1 - before, before, width - 1 - before))
    return F.max_pool2d(padded, width, 1) > 0


def canny(mask: Int64[Tensor, "batch height width"]) -> Bool[Tensor, "batch height width"]:
    """Pixels whose gradient |dx| + |dy| is above zero and largest along its direction, as OpenCV rounds directions."""
    if mask.numel() == 0:
        return torch.zeros_like(mask, dtype=torch.bool)
    image = F.pad(mask.float().unsqueeze(1), (1, 1, 1, 1), mode="replicate")[:, 0].long()
    across, down = image[:, :, 2:] - image[:, :, :-2], image[:, 2:] - image[:, :-2]
    dx = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    dy = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    magnitude = dx.abs() + dy.abs()
    around = F.pad(magnitude, (1, 1, 1, 1))
    height, width = mask.shape[1:]

    def neighbour(down: int, right: int) -> Tensor:
        return around[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    rise, run = dy.abs() << 15, dx.abs()
    flat, steep = rise < run * TAN_22, rise > run * TAN_67
    falling = (dx < 0) != (dy < 0)  # the diagonal from top right to bottom left
    along_row = (magnitude > neighbour(0, -1)) & (magnitude >= neighbour(0, 1))
    along_column = (magnitude > neighbour(-1, 0)) & (magnitude >= neighbour(1, 0))
    one = (magnitude > neighbour(-1, -1)) & (magnitude > neighbour(1, 1))
    other = (magnitude > neighbour(-1, 1)) & (magnitude > neighbour(1, -1))
    diagonal = torch.where(falling, other, one)
    return (magnitude > 0) & torch.where(flat, along_row, torch.where(steep, along_column, diagonal))


def class_weights(
    counts: Float[Tensor, " classes"] | Int64[Tensor, " classes"], constant: float = 1.1
) -> Float[Tensor, " classes"]:
    """Weights of classes from their pixels: 1 / ln(constant + share), scaled to a mean of 1.

    A mild form of ENet's (arXiv:1606.02147, which has 1.02); for Cityscapes the authors give numbers.

    Args:
        counts: pixels of each class.
        constant: above 1; the nearer, the more rare classes weigh.
    """
    share = counts.double() / counts.sum().clamp_min(1)
    weight = 1 / torch.log(constant + share)
    return (weight / weight.mean()).float()
