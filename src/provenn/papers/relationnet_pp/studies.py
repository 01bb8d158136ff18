"""Data, networks and probes of RelationNet++'s experiments."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from provenn.core import cost
from provenn.nn.detection import ATSS, FCOS, DetectionBatch, FasterRCNN, RetinaNet
from provenn.papers.relationnet_pp.bridge import attach_bvr
from provenn.papers.relationnet_pp.layers import (
    DirectGeometry,
    KeyAttention,
    PointHead,
    SharedGeometry,
    cell_centres,
)
from provenn.tasks import Task, TaskData, get_task
from provenn.tasks.object_detection import RECTANGLE_CLASSES, data_of_scenes
from provenn.tasks.object_detection import rectangles as scenes
from provenn.training import Fit, Recipe, fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRIDE = 4  # of the small detectors' only level
BRIDGE: dict[str, Any] = {
    "heads": 8,
    "groups": 8,
    "point_convs": 1,
    "deeper": 0,
    "keys": 12,
    "keys_a_level": 12,
    "dim": 128,
    "map_size": 64,
    "unit": float(STRIDE),
}


LARGE_SIDE, LARGE_STRIDE = 128, 8  # of the larger scenes, and of the only level of the detectors on them
LARGE_COUNTS = {"train": 1280, "val": 200, "test": 240}
LARGE_BRIDGE = {**BRIDGE, "unit": float(LARGE_STRIDE)}


class Stem(nn.Module):
    """Three convolutions to a quarter of the resolution, the last of 1×1: they see 7 pixels.

    What a prediction sees in all is 31 pixels: of most objects no corner lies within that of their centre.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.strides, self.widths = (STRIDE,), (width,)
        layers: list[nn.Module] = []
        for given, out, size, stride in ((3, width // 2, 3, 2), (width // 2, width, 3, 2), (width, width, 1, 1)):
            layers += [nn.Conv2d(given, out, size, stride, size // 2, bias=False), nn.GroupNorm(4, out), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def features(self, x: Tensor) -> list[Tensor]:
        return [self.layers(x)]


class LargeStem(nn.Module):
    """Three convolutions to an eighth of the resolution, each with a stride of 2: they see 15 pixels.

    What a prediction sees in all is 63 pixels, of objects of 20 to 80.

    Args:
        widths: of the three.
    """

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 48)):
        super().__init__()
        self.strides, self.widths = (LARGE_STRIDE,), (widths[-1],)
        layers: list[nn.Module] = []
        for given, out in pairwise((3, *widths)):
            layers += [nn.Conv2d(given, out, 3, 2, 1, bias=False), nn.GroupNorm(4, out), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def features(self, x: Tensor) -> list[Tensor]:
        return [self.layers(x)]


def large_detector(part: dict[str, Any], *, num_classes: int = 2) -> nn.Module:
    """An FCOS of one level of stride 8 and 48 channels.

    Args:
        part: `bridge`, options of `attach_bvr`, without which there is none; `attention`, a dense attention in its
            place; `widths` and `convs`, of the stem and of each tower, other than the others have.
        num_classes: of the data.
    """
    stem = LargeStem(part.get("widths", (16, 32, 48)))
    dim = stem.widths[0]
    model = FCOS(
        stem,
        num_classes=num_classes,
        dim=dim,
        convs=part.get("convs", 1),
        groups=8,
        finest=LARGE_STRIDE,
        coarser=0,
    )
    if part.get("attention"):
        model.head.bridge = DenseAttention(dim)
    return model if part.get("bridge") is None else attach_bvr(model, **{**LARGE_BRIDGE, **part["bridge"]})


class DenseAttention(nn.Module):
    """In BVR's place: each cell of a tower attends to all cells of it, and adds what it reads.

    Args:
        channels: of both towers.
        heads: of their attentions.
    """

    def __init__(self, channels: int, heads: int = 8):
        super().__init__()
        self.classification, self.regression = (KeyAttention(channels, heads) for _ in range(2))

    def forward(
        self, levels: list[Tensor], classification: list[Tensor], regression: list[Tensor], strides: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor], None]:
        read = (self.classification, classification), (self.regression, regression)
        told = [[_attended(layer, level) for level in levels] for layer, levels in read]
        return told[0], told[1], None

    def losses(self, said: None, batch: DetectionBatch) -> dict[str, Tensor]:
        """None of its own."""
        return {}


def _attended(attention: KeyAttention, level: Tensor) -> Tensor:
    cells = level.flatten(2).transpose(1, 2)
    return (cells + attention(cells, cells)).relu().transpose(1, 2).unflatten(2, level.shape[2:])


def count_large(part: dict[str, Any]) -> int:
    """Parameters of a variant of `large_detector`."""
    with torch.device("meta"):
        return cost.count_parameters(large_detector(part))


def megamacs_large(part: dict[str, Any]) -> float:
    """Multiply-adds of a variant of `large_detector` on one image, in 10⁶."""
    with torch.device("meta"):
        model = large_detector(part).eval()
        return round(cost.macs(lambda: model(torch.empty(1, 3, LARGE_SIDE, LARGE_SIDE))) / 1e6, 1)


def detector(part: dict[str, Any], *, num_classes: int = 2, width: int = 32) -> nn.Module:
    """An FCOS of one level, with the bridge that a part names or without.

    Args:
        part: `bridge`, options of `attach_bvr`; `width`, another than the others have.
        num_classes: of the data.
        width: channels everywhere.
    """
    dim = part.get("width", width)
    model = FCOS(Stem(dim), num_classes=num_classes, dim=dim, convs=1, groups=8, finest=STRIDE, coarser=0)
    return model if part.get("bridge") is None else attach_bvr(model, **{**BRIDGE, **part["bridge"]})


def count(part: dict[str, Any]) -> int:
    """Parameters of a variant."""
    with torch.device("meta"):
        return cost.count_parameters(detector(part))


LOOKED_AT = 16  # regions of an image in the second stage of the small Faster R-CNN, in training and after
HOSTS: dict[str, Callable[[Stem, int], nn.Module]] = {
    # Anchors of 16, 23 and 32 pixels, each lying, square and standing: objects have sides of 16 to 48.
    "retinanet": lambda stem, classes: RetinaNet(
        stem, num_classes=classes, dim=32, convs=1, groups=8, finest=STRIDE, coarser=0, scales=(4, 4 * 2**0.5, 8)
    ),
    "atss": lambda stem, classes: ATSS(
        stem, num_classes=classes, dim=32, convs=1, groups=8, finest=STRIDE, coarser=0, scale=7
    ),
    "faster_rcnn": lambda stem, classes: FasterRCNN(
        stem,
        num_classes=classes,
        dim=32,
        width=64,
        coarser=0,
        scale=7,
        regions=LOOKED_AT,
        candidates=100,
        sampled=(64, LOOKED_AT),
    ),
}
REGION_BRIDGE: dict[str, Any] = {
    "heads": 8,
    "point_convs": 1,
    "grid": 7,  # of regions of 4 to 12 cells
    "keys": BRIDGE["keys"],
    "dim": BRIDGE["dim"],
    "unit": BRIDGE["unit"],
}


def host(part: dict[str, Any], *, num_classes: int = 2) -> nn.Module:
    """A RetinaNet, ATSS or Faster R-CNN of 32 channels and one level, with the bridge that a part names.

    Args:
        part: `host`, one of `HOSTS`; `bridge`, options of `attach_bvr` beside those that all have.
        num_classes: of the data.
    """
    model = HOSTS[part["host"]](Stem(), num_classes)
    usual = REGION_BRIDGE if isinstance(model, FasterRCNN) else BRIDGE
    return attach_bvr(model, **{**usual, **part["bridge"]})


def count_host(part: dict[str, Any]) -> int:
    """Parameters of a variant of `host`."""
    with torch.device("meta"):
        return cost.count_parameters(host(part))


def rectangles(seed: int, smoke: bool) -> TaskData:
    """Texture rectangles; a few of them for a smoke run."""
    data = get_task("object-detection").load("rectangles", seed=seed)
    if not smoke:
        return data
    train, val, test = (Subset(part, range(8)) for part in (data.train, data.val, data.test))
    return TaskData(
        data.name,
        train,
        val,
        test,
        fingerprint=data.fingerprint,
        options=data.options,
        meta=data.meta,
        collate=data.collate,
    )


def large_rectangles(seed: int, smoke: bool) -> TaskData:
    """Texture rectangles of 20 to 80 pixels in scenes of 128; a few of them for a smoke run."""
    counts = dict.fromkeys(LARGE_COUNTS, 8) if smoke else LARGE_COUNTS
    splits = {
        split: scenes(split, seed, count, side=LARGE_SIDE, sides=(20, 80), noise=25.5)
        for split, count in counts.items()
    }
    return data_of_scenes("large rectangles", splits, RECTANGLE_CLASSES, LARGE_SIDE)


def fit_watched(
    build: Callable[[], nn.Module], task: Task, data: TaskData, recipe: Recipe, *, watched: int = 40, **more: Any
) -> Fit:
    """`fit`, whose curve is of the first scenes of validation: non-maximum suppression takes longer than training."""
    few = Subset(data.val, range(min(watched, len(data.val))))  # type: ignore[arg-type]
    return fit(build, task, replace(data, val=few), recipe, **more)


def at_75(model: nn.Module, data: TaskData) -> float:
    """AP at an IoU of 0.75 on the test split: 0 of a network that has learned nothing."""
    return get_task("object-detection").evaluate(model, data.test)["AP75"]


def draw_found(done: Fit, data: TaskData, seed: int) -> "Figure | None":
    return get_task("object-detection").picture(done.model, data)


# What things cost


def geometry(build: Callable[[], DirectGeometry], keys: int = 50) -> Callable[[int, str], Callable[[], Any]]:
    """S^G of every cell of a level of stride 8 and so many keys, in training: what the backward pass needs is held."""

    def make(side: int, device: str) -> Callable[[], Any]:
        with torch.device("meta"):  # counted, not computed
            layer = build()
            offsets = torch.empty(1, side * side, keys, 2)

        def call() -> Tensor:
            return layer(offsets, layer.prepare())

        return call

    return make


def attention(keys: int | None) -> Callable[[int, str], Callable[[], Any]]:
    """From every cell of a level to so many keys, or to every cell."""

    def make(side: int, device: str) -> Callable[[], Any]:
        with torch.device("meta"):
            layer, relation = KeyAttention(256, 8), SharedGeometry(8)
            queries, given = torch.empty(1, side * side, 256), torch.empty(1, keys or side * side, 256)
            offsets = torch.empty(1, side * side, keys or side * side, 2)

        def call() -> Tensor:
            return layer(queries, given, relation(offsets))

        return call

    return make


LEVELS = ((100, 160), (50, 80), (25, 40), (13, 20), (7, 10))  # of an image of 800×1280


def gigamacs_of_points(form: str) -> float:
    """Multiply-adds of a point head without norms on an image of 800×1280, in 10⁹."""
    with torch.device("meta"):
        head, levels = PointHead(256, 80, form=form), [torch.empty(1, 256, *size) for size in LEVELS]
        return cost.macs(lambda: head(levels)) / 1e9


def gigamacs_of_attention() -> float:
    """Multiply-adds of the three attentions and two maps on an image of 800×1280, in 10⁹."""
    with torch.device("meta"):
        attentions, maps = [KeyAttention(256, 8) for _ in range(3)], [SharedGeometry(8) for _ in range(2)]

        def call() -> None:
            for relation in maps:
                relation.prepare()
            for height, width in LEVELS:
                for layer in attentions:
                    layer(torch.empty(1, height * width, 256), torch.empty(1, 50, 256))

        return cost.macs(call) / 1e9


def map_errors(align_corners: bool) -> tuple[float, float]:
    """How far the shared map is from the direct geometry, before the logarithm: at offset 0, and at whole offsets."""
    torch.manual_seed(0)
    shared = SharedGeometry(8, log_scale=False, map_size=400, align_corners=align_corners)
    direct = DirectGeometry(8, log_scale=False)
    direct.load_state_dict(shared.state_dict())
    offsets = (cell_centres(41, 41, 10) - 205).round().reshape(1, 41, 41, 2)  # −200 to 200 in steps of 10
    with torch.no_grad():
        error = (shared(offsets) - direct(offsets)).abs().amax(dim=1)[0]
    return error[20, 20].item(), error.max().item()
