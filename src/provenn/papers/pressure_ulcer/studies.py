"""Data, networks and trainings of the pressure ulcer experiments: composed wounds of 64×64 pixels."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from provenn.papers.pressure_ulcer.layers import AttentionGate
from provenn.papers.pressure_ulcer.model import ResidualAttentionUNet, open_gates
from provenn.papers.pressure_ulcer.task import TASK, mean_mask
from provenn.papers.pressure_ulcer.task.photos import GEOMETRIC, NONE, Policy, Wounds, augmented, standard
from provenn.papers.pressure_ulcer.task.sources import composed, drawn
from provenn.papers.pressure_ulcer.transfer import transfer
from provenn.tasks import Task, TaskData, count_examples
from provenn.tasks.base import device_of
from provenn.training import Fit, Hardware, Recipe, fit

SIDE, EACH = 64, 192
COUNTS, SHORT = (16, 32, 200), (4, 4, 4)  # to train, validate and test; and where only the path is tried
SOURCE = EACH  # pictures of the source domain: both stages have epochs of as many
SOURCE_RATE = 3e-3
ONE_CPU = Hardware()
BINS = 12  # of each colour, of the classifier of single pixels
# Three of each, and the one that does best on validation data counts: the watershed's modes, and for the baseline as
# many strengths of plain colour jitter.
WATERSHEDS = tuple(Policy(mode=mode) for mode in ("flatten", "edges", "jitter"))
JITTERS = tuple(Policy(colour=strength) for strength in (0.05, 0.1, 0.2))


class Variant(NamedTuple):
    """A network of a study, and how it is trained.

    Args:
        options: of `ResidualAttentionUNet`, in order of their names.
        policies: of augmentation; of several the one with the best validation Dice counts.
        start: the domain that it is trained on before; "" for none. With "longer" it trains from scratch for as many
            steps as both stages have. With "joint" it takes as many on both domains at once. With "unchanged" it is the
            source model as it is.
        kind: "colour" classifies single pixels by counting, "mean" gives the mean mask; neither is trained.
    """

    options: tuple[tuple[str, Any], ...]
    policies: tuple[Policy, ...] = (GEOMETRIC,)
    start: str = ""
    kind: str = "network"


def unet(attention: str = "none", residual: bool = True, width: int = 8) -> tuple[tuple[str, Any], ...]:
    """Options of a network of four levels."""
    return (("attention", attention), ("depth", 4), ("residual", residual), ("width", width))


PLAIN, RESIDUAL, GATED = unet(residual=False), unet(), unet("gate")


def network(part: Variant, in_channels: int = 3) -> nn.Module:
    """The network of a variant, with its training as `plan`."""
    made: nn.Module
    if part.kind == "colour":
        made = ByColour()
    elif part.kind == "mean":
        made = ByPlace(SIDE)
    else:
        made = ResidualAttentionUNet(in_channels, **dict(part.options))
    made.plan = part  # type: ignore[assignment]  # a module takes any attribute
    # With channels last a processor convolves these few of them in about two thirds of the time.
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as torch documents


def wounds(seed: int, smoke: bool, images: int = COUNTS[0]) -> TaskData:
    """Composed ulcers, so many to train on, with 32 to validate and 200 to test."""
    return composed("ulcers", SHORT if smoke else (images, *COUNTS[1:]), seed, SIDE, GEOMETRIC, 8 if smoke else EACH)


def source_data(domain: str, seed: int, smoke: bool) -> TaskData:
    """Pictures of a domain to train on before."""
    counts = (8, 4, 4) if smoke else (SOURCE, 4, 4)
    return composed(domain, counts, seed, SIDE, GEOMETRIC, 8 if smoke else EACH)


def trained(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    title: str = "training",
) -> Fit:
    """`fit`, by the plan of the variant: its stages, its augmentation, or counting."""
    made = build()
    plan: Variant = made.plan  # type: ignore[assignment]  # `network` sets it
    smoke = recipe.max_steps is not None
    if isinstance(made, Counted):
        made.count(data)
        with torch.no_grad():
            return Fit(made.eval(), task.evaluate(made, data.test))
    state: dict[str, Tensor] = {}
    if plan.start not in ("", "longer", "joint"):
        domain = "wounds" if plan.start == "unchanged" else plan.start
        # At one rate for all: the weights do not depend on the rate that is tried on the target, and are trained once.
        state = source_state(plan.options, domain, replace(recipe, lr=SOURCE_RATE), seed, hardware, smoke)
    if plan.start == "unchanged":
        transfer(made, state)
        with torch.no_grad():
            return Fit(made.eval(), task.evaluate(made, data.test))
    if plan.start in ("longer", "joint"):
        recipe = replace(recipe, epochs=2 * recipe.epochs)

    def started() -> nn.Module:
        model = build()
        if state:
            transfer(model, state)
        return model

    def run(policy: Policy) -> Fit:
        train: Any = data.train.with_policy(policy)  # type: ignore[attr-defined]  # a data set of this task
        if count_examples(train) > EACH:  # of 128 pictures: all numbers of pictures get as many steps
            train = torch.utils.data.Subset(train, range(EACH))
        if plan.start == "joint":
            # As many of each: an epoch has the examples of the target's, and the source's in equal number.
            other = source_data("wounds", seed, smoke).train
            train = ConcatDataset([halved(train), halved(other)])
        done = fit(started, task, replace(data, train=train), recipe, seed=seed, hardware=hardware, title=title)
        return done

    if len(plan.policies) == 1:
        return run(plan.policies[0])

    def validated(done: Fit) -> float:
        with torch.no_grad():
            return task.evaluate(done.model, data.val)[task.metric]

    return max((run(policy) for policy in plan.policies), key=validated)


LEAKED = (16, 16)  # pictures, and augmented copies of each that are kept before the split
LEAK_RECIPE = Recipe(epochs=12, batch_size=8, optimizer="adam", lr=3e-3, schedule="onecycle")


def split_late(seed: int, smoke: bool, by_picture: bool) -> tuple[float, float]:
    """Dice of a U-Net by its own test split, and on 200 fresh pictures, by when that split was cut.

    Sixteen composed ulcers are augmented to sixteen copies each. Three quarters are trained on, the rest is the test.

    Args:
        seed: of pictures, copies, split and weights.
        smoke: the shortest that touches all the code.
        by_picture: cut by source picture; else the copies are shuffled first, so that copies of each lie on both sides.
    """
    pictures, copies = (4, 4) if smoke else LEAKED
    data = wounds(seed, smoke, pictures)
    source: Any = data.train.with_policy(GEOMETRIC, 1)  # type: ignore[attr-defined]  # a data set of this task
    rng = np.random.default_rng(seed)
    pairs = [
        augmented(np.moveaxis(source.images[at], 0, -1), source.masks[at], GEOMETRIC, rng)
        for at in range(pictures)
        for _ in range(copies)
    ]
    images = np.stack([np.moveaxis(image, -1, 0) for image, _ in pairs])
    masks = np.stack([mask for _, mask in pairs])
    order = np.arange(len(pairs)) if by_picture else rng.permutation(len(pairs))
    cut = len(order) * 3 // 4
    train, test = (Wounds(images[part], masks[part], data.meta) for part in (order[:cut], order[cut:]))
    recipe = replace(LEAK_RECIPE, epochs=1, max_steps=2) if smoke else LEAK_RECIPE
    model = fit(partial(network, Variant(PLAIN)), TASK, replace(data, train=train), recipe, seed=seed).model
    with torch.no_grad():
        return TASK.evaluate(model, test)["dice"], TASK.evaluate(model, data.test)["dice"]


def halved(data: Any) -> Any:
    """The first half of an epoch's examples."""
    return torch.utils.data.Subset(data, range(count_examples(data) // 2))


@lru_cache(maxsize=64)  # several variants of a seed start from the same weights
def source_state(
    options: tuple[tuple[str, Any], ...], domain: str, recipe: Recipe, seed: int, hardware: Hardware, smoke: bool
) -> dict[str, Tensor]:
    """Weights after training on a source domain for as many steps as the target gets."""
    build = partial(network, Variant(options))
    data = source_data(domain, seed, smoke)
    done = fit(build, TASK, data, recipe, seed=seed, hardware=hardware, title=f"before, on {domain}")
    return {name: tensor.detach().cpu().clone() for name, tensor in done.model.state_dict().items()}


class Counted(nn.Module):
    """A rule that is fitted by counting, with the interface of a network."""

    def count(self, data: TaskData) -> None:
        """Fit it to the data's training split."""
        raise NotImplementedError


class ByColour(Counted):
    """The wound by the colour of each pixel: log odds of 12³ colours, counted on training; the threshold too.

    It takes the place of a threshold on redness, and is the strongest rule that looks at one pixel at a time.
    """

    odds: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("odds", torch.zeros(BINS**3))
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1 height width"]:
        return self.odds[self.bins(x)][:, None]

    def bins(self, x: Float[Tensor, "batch 3 height width"]) -> Tensor:
        """The number of each pixel's colour."""
        parts = ((x * self.std + self.mean).clamp(0, 1) * (BINS - 1)).round().long()
        return (parts[:, 0] * BINS + parts[:, 1]) * BINS + parts[:, 2]

    def count(self, data: TaskData) -> None:
        train: Wounds = data.train  # type: ignore[assignment]  # a data set of this task
        self.mean.copy_(torch.tensor(data.meta["mean"])[:, None, None])
        self.std.copy_(torch.tensor(data.meta["std"])[:, None, None])
        masks = torch.from_numpy(train.masks).bool()
        bins = self.bins(torch.stack([standard(torch.from_numpy(image), data.meta) for image in train.images]))
        tables = [torch.bincount(bins[part], minlength=BINS**3).double() for part in (masks, ~masks)]
        # Neighbouring colours lend their counts, since most of 1,728 were seen in no pixel.
        smooth = [blurred(table.view(BINS, BINS, BINS)).flatten() + 1e-3 for table in tables]
        odds = (smooth[0] / smooth[1]).log()
        cuts = np.quantile(odds[bins].numpy(), np.linspace(0.7, 0.97, 28)).tolist()
        self.odds.copy_((odds - max(cuts, key=lambda cut: _dice(odds[bins] > cut, masks))).float())


def blurred(table: Float[Tensor, "bins bins bins"]) -> Float[Tensor, "bins bins bins"]:
    """Counts of colours, with those of their neighbours."""
    from scipy.ndimage import gaussian_filter

    return torch.from_numpy(gaussian_filter(table.numpy(), 0.7))


def _dice(told: Tensor, true: Tensor) -> float:
    both = (told & true).sum((1, 2)).double()
    return float((2 * both / (told.sum((1, 2)) + true.sum((1, 2))).clamp_min(1)).mean())


class ByPlace(Counted):
    """The mean mask of training, cut so that it has the mean area of training.

    Args:
        size: side of the images.
    """

    logits: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("logits", torch.zeros(size, size))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 height width"]:
        return self.logits.expand(len(x), 1, -1, -1)

    def count(self, data: TaskData) -> None:
        mean, _ = mean_mask(data.train, len(self.logits))
        area = float(mean.mean())
        self.logits.copy_(mean - mean.flatten().quantile(1 - area))


# What is read off a trained network


def area_error(model: nn.Module, data: TaskData) -> float:
    """The median over test images of how far the predicted area is from the true one, as a share of it."""
    scores = TASK.scores(model, data.test)
    return float(
        np.median(np.abs(scores["told_pixels"] - scores["true_pixels"]) / np.maximum(scores["true_pixels"], 1))
    )


def area_nearness(model: nn.Module, data: TaskData) -> float:
    """1 less `area_error`: higher is better, as Dice is, so that the best of several baselines is the best."""
    return 1 - area_error(model, data)


def gates_open(model: nn.Module, data: TaskData) -> float | None:
    """What Dice on the test gains when all gates of a trained network are forced to 1; None without gates."""
    if not isinstance(model, ResidualAttentionUNet) or not any(isinstance(m, AttentionGate) for m in model.modules()):
        return None
    trained = TASK.evaluate(model, data.test)["dice"]
    with open_gates(model):
        return TASK.evaluate(model, data.test)["dice"] - trained


def gate_ratio(model: nn.Module, data: TaskData) -> float | None:
    """The mean gate of the finest skip inside the wound over that outside, on the test; None without gates."""
    inside, outside, pixels = 0.0, 0.0, [0, 0]
    if not isinstance(model, ResidualAttentionUNet):
        return None
    for index in range(count_examples(data.test)):
        image, mask = data.test[index]
        with torch.no_grad():
            maps = model.attention_maps(image[None].to(device_of(model)))
        if not maps:
            return None
        alpha, wound = maps[-1][0, 0].cpu(), mask > 0
        inside, outside = inside + float(alpha[wound].sum()), outside + float(alpha[~wound].sum())
        pixels = [pixels[0] + int(wound.sum()), pixels[1] + int((~wound).sum())]
    return (inside / max(1, pixels[0])) / max(1e-9, outside / max(1, pixels[1]))


PROBES: Mapping[str, Callable[[nn.Module, TaskData], float | None]] = {
    "area error": area_error,
    "area nearness": area_nearness,
    "gate ratio": gate_ratio,
    "gain with gates open": gates_open,
}
VARIANTS: Mapping[str, tuple[str, Variant]] = {
    # Augmentation, of a plain U-Net
    "none": ("U-Net, no augmentation", Variant(PLAIN, (NONE,))),
    "geometric": ("U-Net, geometric", Variant(PLAIN)),
    "colour jitter": ("U-Net, geometric and colour jitter", Variant(PLAIN, JITTERS)),
    "watershed": ("U-Net, geometric and watershed", Variant(PLAIN, WATERSHEDS)),
    # Where a residual U-Net starts
    "before": ("pre-trained on wounds", Variant(RESIDUAL, start="wounds")),
    "near": ("pre-trained on near wounds", Variant(RESIDUAL, start="near")),
    "unrelated": ("pre-trained on textures", Variant(RESIDUAL, start="unrelated")),
    "longer": ("from scratch, all steps", Variant(RESIDUAL, start="longer")),
    "joint": ("both domains at once", Variant(RESIDUAL, start="joint")),
    "unchanged": ("source model unchanged", Variant(RESIDUAL, start="unchanged")),
    # Attention, from scratch
    "residual": ("residual U-Net", Variant(RESIDUAL)),
    "gates": ("with gates", Variant(GATED)),
    "wider": ("wider, without gates", Variant(unet(width=9))),
    "cbam": ("with CBAM", Variant(unet("cbam"))),
    "se": ("with SE", Variant(unet("se"))),
    # Whole systems
    "full": ("full system", Variant(GATED, WATERSHEDS, "wounds")),
    "attention unet": ("pre-trained Attention U-Net", Variant(unet("gate", residual=False), start="wounds")),
    "colour": ("colour of each pixel", Variant((), kind="colour")),
    "mean": ("mean mask", Variant((), kind="mean")),
}


def few(names: tuple[str, ...]) -> dict[str, tuple[str, Variant]]:
    """Some of the variants."""
    return {name: VARIANTS[name] for name in names}


def photo_of(megapixels: float) -> np.ndarray:
    """A composed ulcer of so many megapixels, 4 to 3."""
    from PIL import Image

    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    small = np.moveaxis(drawn("ulcers", "test", 1, 0, 128)[0][0], 0, -1)
    return np.asarray(Image.fromarray(small).resize((round(height * 4 / 3), height), Image.Resampling.BICUBIC))
