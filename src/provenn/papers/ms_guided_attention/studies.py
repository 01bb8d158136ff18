"""Data, networks and probes of the guided attention experiments: drawn brain subjects of 64×64 pixels."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from provenn.evidence.study import TUNING_SEED
from provenn.papers.ms_guided_attention.layers import PositionAttention
from provenn.papers.ms_guided_attention.model import IGNORED, GuidedAttentionNet
from provenn.papers.ms_guided_attention.rivals import DualAttention, UNet
from provenn.papers.ms_guided_attention.task import Slices, Subjects, VolumeSegmentation, drawn
from provenn.papers.ms_guided_attention.task.brains import SIDE, draw_subjects
from provenn.papers.ms_guided_attention.task.subjects import Labelled
from provenn.tasks import TaskData, fingerprint
from provenn.tasks.base import device_of

COUNTS = {"train": 16, "val": 4, "test": 64}  # subjects
SHORT = {"train": 2, "val": 1, "test": 2}
RIDGE = 1e-4  # of the mean square of a channel, so that dead channels leave the fit determined
LOOKED_AT = 8  # test subjects that a probe of attention or skips reads
EVERY = 3  # of their slices every third, where a probe replaces maps


class Variant(NamedTuple):
    """A network of a study.

    Args:
        kind: "guided", "unet" or "danet".
        options: of its class, in order of their names.
    """

    kind: str
    options: tuple[tuple[str, Any], ...] = ()


KINDS = {"guided": GuidedAttentionNet, "unet": UNet, "danet": DualAttention}


def network(part: Variant, num_classes: int = 4, in_channels: int = 1) -> nn.Module:
    """The network of a variant; of the small trunk where it has one."""
    trunk = {} if part.kind == "unet" else {"backbone": "small"}
    return KINDS[part.kind](num_classes, in_channels, **trunk, **dict(part.options))


def subjects(seed: int, smoke: bool) -> TaskData:
    """Brains: 16 subjects to train on, 4 to validate, 64 to test; mirrored left and right.

    Where a rate is chosen nothing is tested.
    """
    return drawn(seed, _untested(SHORT if smoke else COUNTS, seed), "mirror")


def _untested(counts: dict[str, int], seed: int) -> dict[str, int]:
    return {**counts, "test": 0} if seed == TUNING_SEED else counts


def guided(**options: Any) -> Variant:
    """With semantic modules, of 16 channels."""
    return Variant("guided", tuple(sorted({"dim": 16, "semantic_widths": (32, 64), **options}.items())))


def unguided(**options: Any) -> Variant:
    """Without semantic modules, of 28 channels, so that both have about 0.71 million parameters."""
    return Variant("guided", tuple(sorted({"dim": 28, "guided": False, **options}.items())))


BOTH = ("position", "channel")
VARIANTS: Mapping[str, tuple[str, Variant]] = {
    # The ladder, each of 0.69 to 0.72 million parameters
    "scales": ("scales alone", unguided(parts=())),
    "position": ("position attention", unguided(parts=("position",))),
    "channel": ("channel attention", unguided(parts=("channel",))),
    "dilated": ("dilated pyramid", unguided(parts=("dilated",))),
    "one step": ("both, one step", unguided(dim=38, steps=1, parts=BOTH)),
    "two steps": ("both, two steps", unguided(parts=BOTH)),
    "semantic": ("semantic modules, no losses", guided(weights=(1.0, 0.0, 0.0))),
    "guided": ("guided", guided()),
    "single": ("guided, no deep supervision", guided(deep_supervision=False)),
    # What the paper compares with
    "unet": ("U-Net, Dice loss", Variant("unet", (("depth", 4), ("dice", 1.0), ("norm", True), ("width", 19)))),
    "attention unet": (
        "Attention U-Net, Dice loss",
        Variant("unet", (("depth", 4), ("dice", 1.0), ("gated", True), ("width", 18))),
    ),
    "danet": ("DANet", Variant("danet", (("dim", 96),))),
}


def few(names: tuple[str, ...]) -> dict[str, tuple[str, Variant]]:
    """Some of the variants."""
    return {name: VARIANTS[name] for name in names}


# Probes


def lost_by_prediction(model: nn.Module, data: TaskData) -> float:
    """Soft Dice lost when each finer map is replaced by its best linear prediction from the next coarser one.

    One scale at a time; the mean over scales, of every third slice. The prediction is a 1×1 convolution of the coarser
    map, enlarged, fitted to training slices by least squares with a little ridge. Soft Dice is of probabilities, the
    first class left out.
    """
    train: Slices = data.train  # type: ignore[assignment]  # data sets of this task
    test: Subjects = data.test  # type: ignore[assignment]
    if not isinstance(model, (GuidedAttentionNet, UNet)):
        return float("nan")
    seen, judged = (Subjects(part.subjects[:LOOKED_AT], data.meta) for part in (train, test))
    slices = torch.cat([seen[one][0][::4] for one in range(min(2, len(seen)))])
    levels = model.encoded(slices.to(device_of(model)))
    predicted = range(model.skips if isinstance(model, UNet) else 3)
    fits = [_linear(levels[level + 1], levels[level]) for level in predicted]
    soft = np.mean([_soft(model, fits, *(part[::EVERY] for part in judged[index])) for index in range(len(judged))], 0)
    return float(np.mean(soft[0] - soft[1:]))


def _soft(model: Any, fits: list[Tensor], images: Tensor, masks: Tensor) -> list[float]:
    """2Σpq / (Σp + Σq), the mean over classes: of a subject, and with each finer map predicted by its fit.

    What the network makes of a slice before its maps are replaced is the same for all, and computed once.
    """
    likely: list[list[Tensor]] = [[] for _ in range(1 + len(fits))]
    for part in images.to(device_of(model)).split(8):
        levels = model.encoded(part)
        ways = [levels, *(_predicted(levels, level, weights) for level, weights in enumerate(fits))]
        for found, maps in zip(likely, ways, strict=True):
            found.append(model.decoded(maps, part.shape[2:]).softmax(1).detach().cpu())
    true = F.one_hot(masks.long(), likely[0][0].shape[1]).permute(0, 3, 1, 2)[:, 1:]
    values = []
    for found in likely:
        share = torch.cat(found)[:, 1:]
        both, sums = (share * true).sum((0, 2, 3)), (share + true).sum((0, 2, 3))
        values.append(float((2 * both / sums).mean()))
    return values


def _linear(coarse: Tensor, fine: Tensor) -> Tensor:
    """Weights (coarse channels + 1, fine channels) of the fit, at up to 20,000 places."""
    x, y = _pairs(coarse, fine)
    chosen = torch.linspace(0, len(x) - 1, min(len(x), 20_000)).long()
    x, y = x[chosen].double(), y[chosen].double()
    square = x.T @ x
    ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
    return torch.linalg.solve(square + ridge, x.T @ y).float()


def _pairs(coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
    enlarged = F.interpolate(coarse, fine.shape[2:], mode="bilinear")
    x = enlarged.permute(0, 2, 3, 1).flatten(0, 2)
    return torch.cat([x, x.new_ones(len(x), 1)], 1), fine.permute(0, 2, 3, 1).flatten(0, 2)


def _predicted(levels: list[Tensor], level: int, weights: Tensor) -> list[Tensor]:
    """The maps of a network, one of them predicted from the next coarser one."""
    seen, _ = _pairs(levels[level + 1], levels[level])
    batch, _, height, width = levels[level].shape
    map_ = (seen @ weights).view(batch, height, width, -1).permute(0, 3, 1, 2)
    return [*levels[:level], map_, *levels[level + 1 :]]


def on_own_class(model: nn.Module, data: TaskData) -> float:
    """How much more of position attention lies on the query's own class than chance has, at the finest scale.

    For each position the attention's mass on positions of its class, less their share of all positions; the mean over
    positions of the middle slices, in the last step. 0 without position attention.
    """
    if not isinstance(model, GuidedAttentionNet):
        return 0.0
    test: Subjects = data.test  # type: ignore[assignment]
    layer: Any = model.attention[-1][0].layers["position"]  # type: ignore[index]
    if not isinstance(layer.attention, PositionAttention):
        return 0.0
    seen: list[Tensor] = []
    hook = layer.attention.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    gains = []
    try:
        for index in range(min(LOOKED_AT, len(test))):
            images, masks = test[index]
            middle = len(images) // 2
            seen.clear()
            model(images[middle : middle + 1].to(device_of(model)))
            weights = layer.attention.weights(seen[0])[0].cpu()
            stride = model.trunk.strides[0]
            labels = masks[middle, ::stride, ::stride].flatten().long()
            same = (labels[:, None] == labels[None]).float()
            inside = labels > 0  # of the background every network's attention is alike
            gains.append(float(((weights - 1 / len(labels)) * same).sum(1)[inside].mean()))
    finally:
        hook.remove()
    return float(np.mean(gains))


class Judging(VolumeSegmentation):
    """The task, which remembers how it judged a network: probes ask for what the training judged a moment before."""

    def __init__(self) -> None:
        self.latest: WeakKeyDictionary[nn.Module, tuple[Any, dict[str, float]]] = WeakKeyDictionary()

    def evaluate(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> dict[str, float]:
        """As in `Task`; what neither weights nor subjects changed of is not predicted again."""
        subjects: Subjects = dataset  # type: ignore[assignment]  # a data set of this task
        state = [(id(tensor), tensor._version) for tensor in model.state_dict(keep_vars=True).values()]
        key = ([id(one) for one in subjects.subjects], subjects.meta, state, model.training)
        known, metrics = self.latest.get(model, (None, {}))
        if known != key:
            metrics = super().evaluate(model, dataset, batch_size)
            self.latest[model] = key, metrics
        return dict(metrics)


JUDGING = Judging()


def judged(name: str, model: nn.Module, data: TaskData) -> float:
    """A further metric of the task on the test subjects; they are predicted once for all of these."""
    return JUDGING.evaluate(model, data.test)[name]


PROBES: Mapping[str, Callable[[nn.Module, TaskData], float]] = {
    "lost by prediction": lost_by_prediction,
    "own class": on_own_class,
    "surface distance": partial(judged, "surface_distance"),
    "deviation of Dice": partial(judged, "dice_std"),
}


# Two classes told apart by a far marker

FAR, DISC = 30, 5.0  # pixels between marker and disc at least, and the disc's radius
TWINS = ("background", "beside a cross", "beside a ring")


def marked(seed: int, smoke: bool) -> TaskData:
    """Slices of brains with a disc, and far from it a cross or a ring, which alone says what the disc is called.

    A slice has one of both. Mirrored left and right and up and down in training, so that position says nothing.
    """
    counts = _untested(SHORT if smoke else {"train": 24, "val": 4, "test": 24}, seed)
    parts = {split: _marked(split, count, seed) for split, count in counts.items()}
    images = np.concatenate([one.image.ravel() for one in parts["train"]])
    meta = {
        "classes": list(TWINS),
        "values": [0, 1, 2],
        "size": SIDE,
        "channels": 1,
        "mean": [float(images.mean())],
        "std": [float(images.std())],
    }
    return TaskData(
        "marked slices",
        Slices(parts["train"], meta, "released"),
        Subjects(parts["val"], meta),
        Subjects(parts["test"], meta),
        fingerprint=fingerprint(*(array for part in parts.values() for one in part for array in (one.image, one.mask))),
        options={"num_classes": 3, "in_channels": 1},
        meta=meta,
        about=f"Brain slices with a disc whose class a cross or a ring, {FAR} pixels away or more, tells.",
    )


@lru_cache(maxsize=64)  # a study asks for them once a trial: three splits of each seed
def _marked(split: str, count: int, seed: int) -> tuple[Labelled, ...]:
    made = []
    for index, subject in enumerate(draw_subjects(split, count, seed)):
        rng = np.random.default_rng([seed, len(split), index])
        image, mask = subject.image.copy(), np.zeros_like(subject.mask)
        for level in range(len(image)):
            _mark(image[level], mask[level], rng)
        made.append(Labelled(f"{split} {index}", image[:, None], mask, subject.spacing))
    return tuple(made)


def _mark(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a disc and a far marker into a slice, in place."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    while True:
        centre, marker = rng.uniform(8, SIDE - 8, (2, 2))
        if np.hypot(*(centre - marker)) >= FAR:
            break
    kind = int(rng.integers(1, 3))
    disc = np.hypot(rows - centre[0], columns - centre[1]) < DISC
    away = np.hypot(rows - marker[0], columns - marker[1])
    down, across = np.abs(rows - marker[0]), np.abs(columns - marker[1])
    cross = (np.minimum(down, across) < 1) & (np.maximum(down, across) < 5)
    drawn_marker = cross if kind == 1 else np.abs(away - 4) < 0.9
    image[disc], image[drawn_marker] = 0.6, 1.0
    mask[disc] = kind


def twin_confusion(model: nn.Module, data: TaskData) -> float:
    """Of disc voxels that are predicted as a disc, the share with the wrong name; a half for one that predicts none."""
    test: Subjects = data.test  # type: ignore[assignment]  # a data set of this task
    wrong = found = 0
    for index in range(len(test)):
        images, masks = test[index]
        predicted = torch.cat([model(part).argmax(1).cpu() for part in images.to(device_of(model)).split(8)])
        both = (masks > 0) & (masks != IGNORED) & (predicted > 0)
        found += int(both.sum())
        wrong += int((both & (predicted != masks)).sum())
    return wrong / found if found else 0.5


MARKED: Mapping[str, tuple[str, Variant]] = {
    **few(("two steps", "dilated")),
    # Five levels and 64 pixels: the coarsest map sees the whole frame.
    "deep unet": (
        "U-Net of five levels",
        Variant("unet", (("depth", 5), ("norm", True), ("width", 10))),
    ),
}
