"""Data, networks and probes of RelationNet++'s experiments."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from provenn import bench
from provenn.nn.detection import ATSS, FCOS, RetinaNet
from provenn.papers.relationnet_pp.bridge import attach_bvr
from provenn.tasks import TaskData, get_task

if TYPE_CHECKING:
    pass

STRIDE = 4  # of the small detectors' only level
BRIDGE: dict[str, Any] = {
    "groups": 8, "convs": 1, "deeper": 0, "keys": 12, "keys_a_level": 12, "map_size": 64, "unit": float(STRIDE)
}  # fmt: skip


class Stem(nn.Module):
    """Three convolutions to a quarter of the resolution, which see 15 pixels: fewer than most objects are wide."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.strides, self.widths = (STRIDE,), (width,)
        layers: list[nn.Module] = []
        for given, out, stride in ((3, width // 2, 2), (width // 2, width, 2), (width, width, 1)):
            layers += [nn.Conv2d(given, out, 3, stride, 1, bias=False), nn.GroupNorm(4, out), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def features(self, x: Tensor) -> list[Tensor]:
        return [self.layers(x)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(dim=(2, 3))


HOSTS: dict[str, Any] = {
    "fcos": (FCOS, {}),
    "atss": (ATSS, {"scale": 6}),
    "retinanet": (RetinaNet, {"scales": (6,), "by": "output"}),
}


def detector(part: dict[str, Any], *, num_classes: int = 2, width: int = 48) -> nn.Module:
    """A detector of one level with the bridge that a part names, or without."""
    kind, options = HOSTS[part.get("host", "fcos")]
    width = part.get("width", width)
    model = kind(
        Stem(width), num_classes=num_classes, dim=width, convs=1, groups=8, finest=STRIDE, coarser=0, **options
    )
    return model if part.get("bridge") is None else attach_bvr(model, **{**BRIDGE, **part["bridge"]})


def rectangles(seed: int, smoke: bool) -> TaskData:
    """Texture rectangles; a few of them for a smoke run."""
    data = get_task("object-detection").load("rectangles", seed=seed)
    if not smoke:
        return data
    train, val, test = (Subset(part, range(8)) for part in (data.train, data.val, data.test))
    return TaskData(
        data.name, train, val, test, fingerprint=data.fingerprint, options=data.options, meta=data.meta,
        collate=data.collate,
    )  # fmt: skip
