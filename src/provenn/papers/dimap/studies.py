"""Data, networks and cuts of DIMAP's experiments: small Swins of digits and of pairs of digits, pruned once."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from provenn.nn.masks import Masks
from provenn.papers.dimap.model import Enlarged, Swin, swin_digits
from provenn.papers.dimap.pruning import find_layers, masks, score, select
from provenn.tasks import Task, TaskData, device_of, fingerprint, get_task
from provenn.training import Fit, Hardware, Recipe, fit

WIDTHS = {"narrow": 16, "middle": 24, "wide": 32}
RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9)
PAIRS = {"train": 4000, "val": 500, "test": 2000}
DENSE = Recipe(epochs=40, batch_size=32, lr=2e-3, weight_decay=0.05, decay_vectors=False, schedule="onecycle", clip=5.0)
DENSE_PAIRS = replace(DENSE, epochs=20)
TUNING = Recipe(epochs=2, batch_size=32, lr=1e-4, weight_decay=1e-8, schedule="cosine")
ONE_CPU = Hardware()


class Cut(NamedTuple):
    """What is removed from a trained network.

    Args:
        kind: a key of `CUTS`; "" for nothing.
        ratio: ρ.
        width: C of the network.
        pairs: whether it is one of pairs.
        tuned: whether it is trained on for the study's recipe, its zeros held.
    """

    kind: str = ""
    ratio: float = 0.7
    width: int = 24
    pairs: bool = False
    tuned: bool = False


def digits(seed: int, smoke: bool) -> TaskData:
    """Digits of 8×8 pixels, which the network enlarges; another split for each seed."""
    data = get_task("image-classification").load("digits", seed=seed)
    return replace(data, train=_first(data.train, 64)) if smoke else data


def pairs(seed: int, smoke: bool) -> TaskData:
    """Two digits side by side, 8×16 pixels and 100 classes; no digit stands in two of the splits."""
    parts, generator = get_task("image-classification").load("digits", seed=seed), torch.Generator().manual_seed(seed)
    made = {}
    for split, count in PAIRS.items():
        images, labels = getattr(parts, split).tensors
        left, right = torch.randint(len(images), (2, 64 if smoke else count), generator=generator)
        made[split] = torch.cat([images[left], images[right]], 3), 10 * labels[left] + labels[right]
    train, val, test = (TensorDataset(*made[split]) for split in PAIRS)
    return TaskData(
        "digit pairs",
        train,
        val,
        test,
        fingerprint=fingerprint(*(tensor for part in made.values() for tensor in part)),
        options={"num_classes": 100, "in_channels": 1},
        about="Pairs of handwritten digits, 8×16 pixels.",
    )


def _first(part: Any, count: int) -> TensorDataset:
    return TensorDataset(*(tensor[:count] for tensor in part.tensors))


def network(cut: Cut, num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """The network of a cut, which carries it."""
    made = _network(cut.width, cut.pairs, num_classes, in_channels)
    made.cut = cut  # type: ignore[assignment]  # read again by `pruned`
    return made


def _network(width: int, paired: bool, num_classes: int, in_channels: int) -> nn.Module:
    if not paired:
        return swin_digits(num_classes=num_classes, in_channels=in_channels, dim=width)
    sizes: dict[str, Any] = {"depths": (2, 2), "window": 4, "patch": 4, "drop_path": 0.1}
    heads = (width // 8, width // 4)
    return Enlarged(Swin(dim=width, heads=heads, num_classes=num_classes, in_channels=in_channels, **sizes), 4)


@lru_cache(maxsize=32)  # trained once a seed, and cut in many ways
def dense(width: int, paired: bool, seed: int, short: bool, hardware: Hardware) -> Mapping[str, Tensor]:
    """The weights of a network that is trained to convergence."""
    data, recipe = (pairs, DENSE_PAIRS) if paired else (digits, DENSE)
    content = data(seed, short)
    recipe = replace(recipe, epochs=1, max_steps=2) if short else recipe
    done = fit(
        lambda: _network(width, paired, **content.options),
        get_task("image-classification"),
        content,
        recipe,
        seed=seed,
        hardware=hardware,
        title=f"dense, C = {width}",
    )
    return copy.deepcopy(done.model).cpu().state_dict()


def pruned(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    title: str = "",
) -> Fit:
    """The dense network of the seed, cut once, and tuned by the recipe where the cut says so."""
    first: Any = build()
    cut, short = first.cut, recipe.max_steps is not None
    weights = dense(cut.width, cut.pairs, seed, short, hardware)
    first.load_state_dict(weights)
    removal = removed(first, cut.kind, cut.ratio, data, seed)

    def begin() -> nn.Module:
        model = build()
        model.load_state_dict(weights)
        model.dense = weights  # type: ignore[assignment]  # of the probes
        if removal is not None:
            removal.hold(model)
        return model

    if cut.tuned:
        return fit(begin, task, data, recipe, seed=seed, hardware=hardware, title=title)
    model = begin().eval().to(hardware.device)
    with torch.no_grad():
        return Fit(model, task.evaluate(model, data.test))


RANKED: dict[str, dict[str, Any]] = {
    "dimap": {},
    "lamp": {"grouping": "model"},
    "magnitude": {"grouping": "model", "metric": "magnitude"},
    "uniform": {"grouping": "layer", "metric": "magnitude"},
    "random": {"grouping": "model", "metric": "random"},
}


def removed(model: nn.Module, kind: str, ratio: float, data: TaskData, seed: int) -> Masks | None:
    """What a kind of cut keeps of a dense network; None where it removes nothing."""
    if not kind:
        return None
    if kind in RANKED:
        return masks(model, ratio, seed=seed, **RANKED[kind])
    layers = find_layers(model)
    if kind == "taylor":
        return select(taylor(copy.deepcopy(model).cpu(), data), layers, ratio, grouping="model")
    return Masks(one_sided(model, kind, ratio, seed))


def taylor(model: nn.Module, data: TaskData, examples: int = 64) -> dict[str, Tensor]:
    """|w · ∂loss/∂w| of one batch: what first-order pruning with data ranks by."""
    images, labels = (torch.stack([torch.as_tensor(data.train[i][part]) for i in range(examples)]) for part in (0, 1))
    model = copy.deepcopy(model).eval()
    parameters = dict(model.named_parameters())
    names = [name for layer in find_layers(model) for name in layer.names]
    weights = [parameters[name] for name in names]
    with torch.enable_grad():
        slopes = torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), weights)
    return {n: (w * slope).detach().double().abs() for n, w, slope in zip(names, weights, slopes, strict=True)}


def one_sided(model: nn.Module, kind: str, ratio: float, seed: int) -> dict[str, Tensor]:
    """The dense network without what one method removes and the other keeps, or without as many that both keep."""
    ours, theirs = (masks(model, ratio, **RANKED[name]).kept for name in ("dimap", "magnitude"))
    names = list(ours)
    a, b = (torch.cat([kept[name].flatten() for name in names]) for kept in (ours, theirs))
    sides = {"only magnitude": a & ~b, "only dimap": b & ~a, "kept": a & b}
    count = min(int(sides[name].count_nonzero()) for name in sides)
    places = sides[kind].nonzero()[:, 0]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    whole = torch.ones_like(a)
    whole[places[order[:count]]] = False
    parts = whole.split([ours[name].numel() for name in names])
    return {name: part.view(ours[name].shape) for name, part in zip(names, parts, strict=True)}


def accuracies(model: Any, data: TaskData) -> list[float]:
    """At each of the ratios, cut from the dense network; measured once for all that read them."""
    if not hasattr(model, "measured"):
        task, kind = get_task("image-classification"), model.cut.kind
        net, values = copy.deepcopy(model), []
        whole = getattr(model, "dense", None) or model.state_dict()  # a model that nobody cut is dense
        for ratio in RATIOS if kind in (*RANKED, "taylor") else (model.cut.ratio,):
            net.load_state_dict(whole)
            chosen = removed(net, kind, ratio, data, 0)
            if chosen is not None:
                chosen.apply(net)
            values.append(task.evaluate(net, data.test)["accuracy"])
        model.measured = values
    return model.measured


def over_ratios(model: nn.Module, data: TaskData) -> float:
    """The mean accuracy over 50 to 90 %; of a cut that has one ratio alone, its own."""
    values = accuracies(model, data)
    return sum(values) / len(values)


def above_half(model: nn.Module, data: TaskData) -> float:
    """The same without 50 %."""
    values = accuracies(model, data)[-4:]
    return sum(values) / len(values)


def loss(model: nn.Module, data: TaskData) -> float:
    return get_task("image-classification").evaluate(model, data.test)["loss"]


def top5(model: nn.Module, data: TaskData) -> float:
    return get_task("image-classification").evaluate(model, data.test)["top5"]


def medians_apart(model: nn.Module, data: TaskData) -> float:
    """The largest median of |w| of a layer, over the smallest."""
    parameters = dict(model.named_parameters())
    middle = [float(parameters[name].abs().median()) for layer in find_layers(model) for name in layer.names]
    return max(middle) / max(min(middle), 1e-12)


def bound_and_change(model: Any, data: TaskData, ratio: float = 0.7) -> float:
    """Of a dense network, one layer cut at a time: rank correlation of ‖W − W̃‖ / ‖W‖ with the change of the logits."""
    from scipy import stats

    if model.cut.kind:
        return 0.0
    images = torch.stack([data.test[i][0] for i in range(min(64, len(data.test)))])  # type: ignore[arg-type]
    images = images.to(device_of(model))
    before, bounds, changes = model(images), [], []
    scores = score(model)
    for layer in find_layers(model):
        net = copy.deepcopy(model)
        chosen = select(scores, [layer], ratio)
        chosen.apply(net)
        (name,) = layer.names
        weight = model.get_parameter(name)
        bounds.append(float((weight - net.get_parameter(name)).norm() / weight.norm()))
        changes.append(float((net(images) - before).norm() / before.norm()))
    return float(stats.spearmanr(bounds, changes).statistic)


CURVE = {"accuracy over 50 to 90 %": over_ratios}
PROBES = {
    **CURVE,
    "accuracy over 60 to 90 %": above_half,
    "loss": loss,
    "medians apart": medians_apart,
    "bound and change": bound_and_change,
}
LABELS = {
    "": "dense",
    "dimap": "DIMAP",
    "lamp": "one module (LAMP)",
    "magnitude": "global magnitude",
    "uniform": "uniform",
    "random": "random",
    "taylor": "Taylor, one batch",
    "only magnitude": "without what only magnitude removes",
    "only dimap": "without what only DIMAP removes",
    "kept": "without as many that both keep",
}


def variants(kinds: tuple[str, ...], **options: Any) -> dict[str, tuple[str, Cut]]:
    """A variant for each kind of cut, named by it; "dense" where nothing is removed."""
    return {kind or "dense": (LABELS[kind], Cut(kind, **options)) for kind in kinds}
