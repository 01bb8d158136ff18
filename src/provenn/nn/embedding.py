"""Networks whose output is compared: an embedding of a picture, and the losses that bring one identity's together.

The head is the one of Luo et al. (2019, arXiv:1903.07071), "Bag of Tricks and a Strong Baseline for Deep Person
Re-identification". The triplet loss sees the pooled features. The classifier sees them after a batch norm (BNNeck).
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.backbone import Backbone

MARGIN = 0.3  # of the triplet loss, between Euclidean distances


class Identified(NamedTuple):
    """What a network of identities says of pictures.

    Args:
        features: f, before the batch norm; the triplet loss compares them.
        embeddings: after it; what is compared in a search, by its cosine.
        logits: of the training's identities.
    """

    features: Float[Tensor, "batch dim"]
    embeddings: Float[Tensor, "batch dim"]
    logits: Float[Tensor, "batch identities"]


class EmbeddingNetwork(nn.Module):
    """A backbone, the mean of its last map, a batch norm as the neck, and a classifier that only training looks at.

        f = mean of the map,   e = BN(f) without bias,   logits = W e without bias

    Args:
        backbone: gives maps, from fine to coarse; see `provenn.nn.backbone.Backbone`. Built with `num_classes=0`.
        num_classes: identities to train on.
        margin: of the triplet loss.

    Shapes: (batch, channels, height, width) to features and embeddings (batch, dim), where dim is the width of the last
    map, and logits (batch, num_classes).
    """

    def __init__(self, backbone: Any, num_classes: int, *, margin: float = MARGIN):
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise TypeError(f"{type(backbone).__name__} lacks features, strides or widths")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not margin >= 0:
            raise ValueError(f"margin must not be negative, got {margin}")
        self.backbone: Any = backbone
        self.strides, self.margin, dim = list(backbone.strides), margin, backbone.widths[-1]
        self.neck = nn.BatchNorm1d(dim)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(dim, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Identified:
        features = self.backbone.features(images)[-1].mean(dim=(2, 3))
        embeddings = self.neck(features)
        return Identified(features, embeddings, self.classifier(embeddings))


def keep_last_map_fine(backbone: Any) -> Any:
    """Take the stride out of a ResNet's last stage, in place: its last map is twice as high and wide (Luo et al.).

    Weights and their names stay, so pretrained ones load. Returns the backbone.

    Raises:
        ValueError: the last stage has no stride of 2.

    >>> from provenn.nn.resnet import resnet18
    >>> keep_last_map_fine(resnet18(num_classes=0)).strides
    [4, 8, 16, 16]
    """
    stage = backbone.get_submodule(backbone.stage_names[-1])
    strided = [module for module in stage.modules() if isinstance(module, nn.Conv2d) and module.stride == (2, 2)]
    if not strided:
        raise ValueError(f"the last stage of {type(backbone).__name__} has no convolution with a stride of 2")
    for module in strided:
        module.stride = (1, 1)
    backbone.strides = [*backbone.strides[:-1], backbone.strides[-1] // 2]
    return backbone


def pairwise_distances(x: Float[Tensor, "batch dim"], y: Float[Tensor, "others dim"]) -> Float[Tensor, "batch others"]:
    """Euclidean distances, in float32 at least, with a gradient of 0 where two are alike."""
    x, y = (part if part.dtype == torch.float64 else part.float() for part in (x, y))
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    # The root's gradient is infinite at 0, where a picture meets itself.
    return squares.clamp(min=1e-12).sqrt()


def batch_hard_triplet(
    features: Float[Tensor, "batch dim"], labels: Int64[Tensor, " batch"], margin: float = MARGIN
) -> Float[Tensor, ""]:
    """The batch-hard triplet loss (Hermans et al., 2017, arXiv:1703.07737, equation 5), with Euclidean distances.

        mean over a of [margin + max_{p of a's identity} D(a, p) − min_{n of another} D(a, n)]₊

    Pictures of a batch without another identity, or without a second picture of their own, take no part. Without any
    that does, the loss is 0.
    """
    distances = pairwise_distances(features, features)
    same = labels[:, None] == labels
    farthest = distances.masked_fill(~same, -math.inf).amax(1)
    nearest = distances.masked_fill(same, math.inf).amin(1)
    complete = (same.sum(1) > 1) & (~same).any(1)
    hardness = torch.where(complete, margin + farthest - nearest.masked_fill(~complete, 0.0), 0.0)
    return hardness.clamp(min=0).sum() / complete.sum().clamp(min=1)


def identity_loss(
    outputs: Identified, labels: Int64[Tensor, " batch"], smoothing: float = 0.0, margin: float = MARGIN
) -> Float[Tensor, ""]:
    """Cross-entropy of the identities, smoothed, plus the batch-hard triplet loss of the features.

    Args:
        outputs: of a batch with several pictures of each identity.
        labels: whom each picture shows.
        smoothing: the share of each target that is spread evenly over all identities; 0.1 in Luo et al.
        margin: of the triplet loss.
    """
    entropy = F.cross_entropy(outputs.logits.float(), labels, label_smoothing=smoothing)
    return entropy + batch_hard_triplet(outputs.features, labels, margin)
