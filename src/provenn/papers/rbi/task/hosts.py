"""What stands beside RRA, a layer of its size that sees one image and smoothing without weights, and their host."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.papers.rbi.backbones import SmallCNN
from provenn.papers.rbi.layers import RRA
from provenn.papers.rbi.model import BATCH
from provenn.papers.rbi.task import TASK
from provenn.tasks.hosts import Factory, Host, budgets


class PerImage(nn.Module):
    """A layer of RRA's parameters that sees one image: four matrices, a vector and the same gate.

        m = W_v GELU(W_q n + w_e) + W_k n,  r = W_r n,  h = β r + (1 − β) m

    Args:
        dim: features of an image.

    Shapes: (batch, dim) to the same.
    """

    def __init__(self, dim: int):
        super().__init__()
        like = RRA(dim)  # the same matrices, drawn alike
        self.inner, self.skip, self.outer, self.root = like.query, like.key, like.value, like.root
        self.gate, self.shift = like.gate, like.edge

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        n = F.layer_norm(x, x.shape[1:])
        r: Any = self.root
        gate: Any = self.gate
        m, r = self.outer(F.gelu(self.inner(n) + self.shift)) + self.skip(n), r(n)
        beta = gate(torch.cat([m, r, m - r], 1)).sigmoid()
        return beta * r + (1 - beta) * m


class Smoothing(nn.Module):
    """Attention over the batch without a weight: h = (n + softmax(n nᵀ / √D) n) / 2, n normalised.

    Args:
        dim: D.

    Shapes: (batch, dim) to the same.
    """

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        n = F.layer_norm(x, x.shape[1:])
        return (n + (n @ n.T * x.shape[1] ** -0.5).softmax(1) @ n) / 2


class MixedNetwork(nn.Module):
    """A backbone, a layer that may mix images, and a classifier. In training and in batches the layer sees all of them.

    Args:
        backbone: images to vectors.
        mixer: of its width.
        dim: that width.
        num_classes: logits.
        batch: as of `RBI`.

    Shapes: (batch, channels, height, width) to (batch, num_classes).
    """

    def __init__(self, backbone: nn.Module, mixer: nn.Module, dim: int, num_classes: int, batch: int = BATCH):
        super().__init__()
        self.backbone, self.mixer, self.head, self.batch = backbone, mixer, nn.Linear(dim, num_classes), batch

    def forward(
        self, x: Float[Tensor, "batch channels height width"], protocol: str | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Logits; of images that stand alone outside of training, unless `protocol` is "batch"."""
        return self.decide(self.embed(x), x, protocol)

    def embed(self, x: Tensor) -> Float[Tensor, "batch dim"]:
        """Features, which no other image changes."""
        return self.backbone(x)

    def decide(self, features: Tensor, images: Tensor | None, protocol: str | None = None) -> Tensor:
        """Logits of features that are known."""
        if protocol == "batch" or (protocol is None and self.training) or not len(features):
            return self.head(self.mixer(features))
        return self.head(torch.cat([self.mixer(row) for row in features.split(1)]))


def _mixed(mixer: Factory, options: dict[str, Any]) -> nn.Module:
    backbone = SmallCNN(in_channels=options["in_channels"])
    return MixedNetwork(backbone, mixer(backbone.dim), backbone.dim, options["num_classes"])


HOST = Host(
    TASK.name,
    _mixed,
    lambda: {"none": nn.Identity, "per-image": PerImage, "smoothing": Smoothing},
    budgets(
        {"batch_size": 32, "optimizer": "adamw", "lr": 3e-3, "weight_decay": 5e-2, "schedule": "onecycle", "clip": 5.0},
        8,
        100,
    ),
    (1e-3, 3e-3, 1e-2),
    "a small network of convolutions, each image alone where it is tested",
)
