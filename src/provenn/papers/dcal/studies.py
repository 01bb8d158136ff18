"""Data, networks and trainings of DCAL's experiments: ViTs that were trained on other regions, tuned in each way."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from provenn.nn.embedding import EmbeddingNetwork
from provenn.nn.resnet import BasicBlock, ResNet
from provenn.nn.vit import ViT
from provenn.papers.dcal.model import DCAL
from provenn.papers.dcal.rivals import (
    Bare,
    LocalAttention,
    NoisePartner,
    PartSelection,
    Plain,
    RandomQueries,
    SameClass,
    StalePartner,
)
from provenn.tasks import Task, TaskData, fingerprint, get_task
from provenn.tasks.base import device_of
from provenn.tasks.fine_grained import Regions, region_classes
from provenn.tasks.image_classification import SOURCES, photo_patches
from provenn.tasks.re_identification import Groups, Pictures
from provenn.training import Fit, Hardware, Recipe, fit

OTHER = (0.0, 1.0)  # corners of the photographs whose regions a network is trained on before
LAYERS, PATCH, HEAD = 4, 4, 32  # blocks, side of a patch in pixels, width of a head
WIDTHS = {"narrow": 64, "middle": 96, "wide": 128}
BEFORE = Recipe(
    epochs=15, batch_size=64, weight_decay=0.05, decay_vectors=False, schedule="onecycle", clip=5.0, random_erasing=0.5
)
# By accuracy on the tuning seed's validation views. ViTs of width 64 had 0.414, 0.443, 0.469 and 0.426 at 1e-3, 2e-3,
# 4e-3 and 8e-3, of width 96 0.443, 0.490 and 0.452 at 5e-4, 1e-3 and 2e-3, residual networks 0.451, 0.479 and 0.477 at
# 4e-3, 8e-3 and 1.6e-2. 128 has the rate of 96 without a search: only ViTs are compared there, all from one network.
RATES_BEFORE = {("plain", 64): 4e-3, ("plain", 96): 1e-3, ("plain", 128): 1e-3, ("cnn", 64): 8e-3}
# On these views self-attention of width 64, trained before at 1e-3, had 0.621, 0.744 and 0.768 after 8, 24 and 48
# epochs; pixels have 0.611.
AFTER = replace(BEFORE, epochs=24, batch_size=32, lr=1e-3)
# Of identities, whose data erases by itself; networks are new. On the tuning seed's validation identities ViTs of width
# 64 have an mAP of 0.299, 0.428 and 0.480 after 10, 20 and 40 epochs at 2e-3, without a neck 0.243 after 20, pixels
# 0.405. Weights from other regions do harm: 0.283 after 20 with a neck.
SEARCH = replace(AFTER, epochs=40, batch_size=16, lr=2e-3, random_erasing=0.0)
PASSES = 8  # over the identities in an epoch, so that it is not validated after every four steps
ONE_CPU = Hardware()
RATIO = 0.25  # R: of 64 patches 10 % are 6, and of 16 in the pilot 1; a quarter is what the brief's pilot took
OBJECT, GRID = 16, 4  # side of an object on a texture, and where its corner may lie, in pixels
COUNTS = {"train": 1000, "val": 200, "test": 500}


class Variant(NamedTuple):
    """How a network is tuned.

    Args:
        kind: a key of `KINDS`.
        dim: D of the backbone.
        longer: factor on the epochs.
        faster: factor on the rate.
        mixed: α of mixup and of CutMix.
        options: of the kind.
    """

    kind: str
    dim: int = 64
    longer: float = 1.0
    faster: float = 1.0
    mixed: float = 0.0
    options: tuple[tuple[str, Any], ...] = ()


def with_options(kind: str, dim: int = 64, **options: Any) -> Variant:
    return Variant(kind, dim, options=tuple(options.items()))


# Data


@lru_cache(maxsize=8)  # a study asks for them once a trial
def regions(seed: int, smoke: bool) -> TaskData:
    """64 neighbouring regions of photographs; other views for each seed."""
    data = get_task("fine-grained").load("regions", seed=seed)
    if not smoke:
        return data
    return replace(data, train=_first(data.train, 64), val=_first(data.val, 64), test=_first(data.test, 64))


def _first(part: Any, count: int) -> Regions:
    return Regions(
        part.images[:: part.labels.numel() // count], part.labels[:: part.labels.numel() // count], part.meta
    )


@lru_cache(maxsize=8)  # a study asks for them once a trial
def other_regions(seed: int, smoke: bool) -> TaskData:
    """128 regions that lie elsewhere in the same photographs."""
    parts, each = {}, 4 * len(SOURCES)
    for split in ("train", "val", "test"):
        drawn = [region_classes(split, corner=corner, seed=seed) for corner in OTHER]
        images = torch.cat([images for images, _ in drawn])
        labels = torch.cat([labels + each * number for number, (_, labels) in enumerate(drawn)])
        parts[split] = (images[::24], labels[::24]) if smoke else (images, labels)
    pixels = parts["train"][0].float() / 255
    meta = {"size": 32, "channels": 3, "mean": pixels.mean((0, 2, 3)).tolist(), "std": pixels.std((0, 2, 3)).tolist()}
    sets = {split: Regions(*part, meta) for split, part in parts.items()}
    return TaskData(
        "other regions",
        sets["train"],
        sets["val"],
        sets["test"],
        fingerprint=fingerprint(*(tensor for part in parts.values() for tensor in part)),
        options={"num_classes": each * len(OTHER), "in_channels": 3},
        meta=meta,
    )


@lru_cache(maxsize=8)  # a study asks for them once a trial
def cameras(seed: int, smoke: bool) -> TaskData:
    """Identities as four cameras see them; other regions and views for each seed."""
    data = get_task("re-identification").load("cameras", seed=seed)
    if not smoke:
        return replace(data, train=ConcatDataset([data.train] * PASSES))
    train, val, test = (_first_identities(part) for part in (data.train.pictures, data.val, data.test))  # type: ignore[attr-defined]  # Groups
    groups = Groups(train, augmentation="move")
    return replace(data, train=groups, val=val, test=test, options={"num_classes": len(groups)})


def _first_identities(pictures: Any, count: int = 8) -> Pictures:
    return pictures.some(torch.isin(pictures.identities, pictures.identities.unique()[:count]))


def objects(seed: int, smoke: bool) -> TaskData:
    """Digits of 16×16 pixels on textures of 32×32, on a grid of 4 pixels; the corners of the test's are noted."""
    digits = get_task("image-classification").load("digits", seed=seed)
    backgrounds, names = photo_patches("train", 60, seed=seed)
    textures = backgrounds[names < 3]  # brick, grass, gravel
    generator = torch.Generator().manual_seed(seed)
    parts, corners = {}, {}
    for split, count in COUNTS.items():
        images, labels = getattr(digits, split).tensors
        count = 32 if smoke else count
        chosen = torch.randint(len(images), (count,), generator=generator)
        pictures = textures[torch.randint(len(textures), (count,), generator=generator)].clone()
        places = GRID * torch.randint((32 - OBJECT) // GRID + 1, (count, 2), generator=generator)
        large = nn.functional.interpolate(images[chosen], (OBJECT, OBJECT), mode="bilinear")
        for picture, digit, (top, left) in zip(pictures, large, places.tolist()):
            picture[:, top : top + OBJECT, left : left + OBJECT] += 2 * digit[0] / images.std()
        parts[split], corners[split] = (
            TensorDataset(pictures.expand(-1, 3, -1, -1).contiguous(), labels[chosen]),
            places,
        )
    return TaskData(
        "digits on textures",
        parts["train"],
        parts["val"],
        parts["test"],
        fingerprint=fingerprint(*(t for part in parts.values() for t in part.tensors), *corners.values()),
        options={"num_classes": 10, "in_channels": 3},
        meta={"corners": corners["test"].tolist(), "mean": [0.0] * 3, "std": [1.0] * 3},
    )


# Networks


def backbone(dim: int, *, num_classes: int, image: tuple[int, int], layers: int = LAYERS) -> ViT:
    """A ViT for small images, with a convolutional stem, as the paper's R50-ViT-B has one."""
    sizes: dict[str, Any] = {"patch": PATCH, "stem": "conv", "mlp_ratio": 2, "drop_path": 0.1}
    return ViT(dim=dim, depth=layers, heads=dim // HEAD, num_classes=num_classes, image=image, **sizes)


def _around(system: type[DCAL], **fixed: Any) -> Callable[..., nn.Module]:
    def build(dim: int, sizes: dict[str, Any], task: str, **options: Any) -> nn.Module:
        chosen = {**fixed, **options}
        return system(backbone(dim, **sizes), ratio=RATIO, drop_path=0.1, **_of_task(task), **chosen)

    return build


def _of_task(task: str) -> dict[str, Any]:
    return {"task": task, "neck": task == "reid"}


def _plain(dim: int, sizes: dict[str, Any], task: str, layers: int = LAYERS) -> nn.Module:
    return Plain(backbone(dim, layers=layers, **sizes), **_of_task(task))


def _bare(dim: int, sizes: dict[str, Any], task: str) -> nn.Module:
    return Bare(backbone(dim, **sizes))


def _parts(dim: int, sizes: dict[str, Any], task: str) -> nn.Module:
    return PartSelection(backbone(dim, **sizes), task=task)


def convolutional(dim: int, sizes: dict[str, Any], task: str) -> nn.Module:
    """A residual network of about as many parameters as the ViT of this width, whose maps halve at the same places."""
    classes = sizes["num_classes"]
    options: dict[str, Any] = {"widths": (dim // 2, dim, dim * 3 // 2), "stem": "small"}
    network = ResNet(BasicBlock, (1, 1, 1), num_classes=classes if task == "fgvc" else 0, **options)
    return network if task == "fgvc" else EmbeddingNetwork(network, classes)


KINDS: dict[str, Callable[..., nn.Module]] = {
    "plain": _plain,
    "bare": _bare,
    "parts": _parts,
    "cnn": convolutional,
    "dcal": _around(DCAL),
    "glca": _around(DCAL, pwca=False),
    "pwca": _around(DCAL, glca=False),
    "random": _around(RandomQueries, pwca=False),
    "local": _around(LocalAttention, pwca=False),
    "noise": _around(NoisePartner, glca=False),
    "same": _around(SameClass, glca=False),
    "stale": _around(StalePartner),
}


def network(variant: Variant, num_classes: int, in_channels: int = 3) -> nn.Module:
    """The network of a variant, which carries it, for images of 32×32."""
    return _network(variant, {"num_classes": num_classes, "image": (32, 32)}, "fgvc")


def embedder(variant: Variant, num_classes: int) -> nn.Module:
    """The same for pictures of 64×32, whose embeddings are compared."""
    return _network(variant, {"num_classes": num_classes, "image": (64, 32)}, "reid")


def _network(variant: Variant, sizes: dict[str, Any], task: str) -> nn.Module:
    made = KINDS[variant.kind](variant.dim, sizes, task, **dict(variant.options))
    made.variant = variant  # type: ignore[assignment]  # read again by `tuned`
    return made


# Trainings


@lru_cache(maxsize=32)  # trained once a seed, and tuned in many ways
def trained_before(kind: str, dim: int, seed: int, short: bool, hardware: Hardware) -> Mapping[str, Tensor]:
    """The weights of a network that was trained on other regions."""
    data = other_regions(seed, short)
    recipe = replace(BEFORE, lr=RATES_BEFORE[kind, dim])
    recipe = replace(recipe, epochs=1, max_steps=2) if short else recipe
    done = fit(
        lambda: network(Variant(kind, dim), **data.options),
        get_task("fine-grained"),
        data,
        recipe,
        seed=seed,
        hardware=hardware,
        title=f"{kind} on other regions, D = {dim}",
    )
    return copy.deepcopy(done.model).cpu().state_dict()


def start_from(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Take over what has the same name and shape: not classifiers."""
    own = model.state_dict()
    model.load_state_dict({**own, **{n: v for n, v in weights.items() if n in own and own[n].shape == v.shape}})


def recipe_of(variant: Variant, recipe: Recipe) -> Recipe:
    """The recipe in the way of the variant."""
    return replace(
        recipe,
        epochs=max(1, round(recipe.epochs * variant.longer)),
        lr=recipe.lr * variant.faster,
        mixup=variant.mixed,
        cutmix=variant.mixed,
    )


def tuned(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    title: str = "",
) -> Fit:
    """The network of the seed that was trained on other regions, trained on by the recipe in the way of the variant."""
    first: Any = build()
    variant, short = first.variant, recipe.max_steps is not None
    weights = trained_before("cnn" if variant.kind == "cnn" else "plain", variant.dim, seed, short, hardware)

    def begin() -> nn.Module:
        model: Any = build()
        start_from(model, weights)
        if isinstance(model, SameClass):
            model.bank = _bank(data)
        return model

    return fit(begin, task, data, recipe_of(variant, recipe), seed=seed, hardware=hardware, title=title)


def trained_anew(build: Callable[[], nn.Module], task: Task, data: TaskData, recipe: Recipe, **options: Any) -> Fit:
    """A new network, trained by the recipe in the way of the variant."""
    first: Any = build()
    return fit(build, task, data, recipe_of(first.variant, recipe), **options)


def _bank(data: TaskData) -> Float[Tensor, "classes views channels height width"]:
    """As many training images of each class as the rarest has."""
    images, labels = (torch.stack(part) for part in zip(*((x, torch.as_tensor(y)) for x, y in _every(data.train))))
    places = [(labels == label).nonzero()[:, 0] for label in range(data.options["num_classes"])]
    views = max(1, min(map(len, places)))
    return torch.stack([images[(place if len(place) else torch.zeros(1).long())[:views]] for place in places])


def _every(dataset: Any) -> list[Any]:
    return [dataset[index] for index in range(len(dataset))]


# Probes


@torch.no_grad()
def gap(model: nn.Module, data: TaskData) -> float:
    """Accuracy on the training images less that on the test's."""
    task = get_task("fine-grained")
    return float(task.evaluate(model, data.train)["accuracy"] - task.evaluate(model, data.test)["accuracy"])


def _parts_of_objects(model: Any, data: TaskData) -> tuple[Tensor, Tensor]:
    """Of each test image the share of the rollout over patches in each quarter of the object, and off it."""
    here = device_of(model)
    rows = [model.streams(x.to(here), show=True).row.cpu() for x, _ in DataLoader(data.test, batch_size=256)]
    shares = torch.cat(rows).unflatten(1, (8, 8))
    shares = shares / shares.sum((1, 2), keepdim=True)
    half = OBJECT // PATCH // 2
    quarters = []
    for share, (top, left) in zip(shares, data.meta["corners"]):
        box = share[top // PATCH : top // PATCH + 2 * half, left // PATCH : left // PATCH + 2 * half]
        quarters.append(box.unflatten(1, (2, half)).unflatten(0, (2, half)).sum((1, 3)).flatten())
    parts = torch.stack(quarters)
    return parts, 1 - parts.sum(1)


def background_share(model: nn.Module, data: TaskData) -> float:
    """How much of the class token's rollout over the patches lies off the object."""
    return float(_parts_of_objects(model, data)[1].mean())


def part_entropy(model: nn.Module, data: TaskData) -> float:
    """Entropy of the rollout's shares over the four quarters of the object; 1 is even."""
    parts = _parts_of_objects(model, data)[0]
    parts = parts / parts.sum(1, keepdim=True).clamp_min(1e-12)
    return float(-(parts * parts.clamp_min(1e-12).log()).sum(1).mean()) / math.log(4)
