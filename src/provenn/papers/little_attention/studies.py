"""Data, networks and trainings of the experiments: regions of photographs as identities, seen by simulated cameras.

Also the two steps by which a network is tuned to a small set: head and attention, then all at a tenth of the rate.
"""

import copy
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from provenn.nn.embedding import EmbeddingNetwork, Identified
from provenn.papers.little_attention.model import small_backbone, with_head
from provenn.papers.little_attention.placement import CHILD, Placement, insert
from provenn.papers.little_attention.zoo import RelationAware
from provenn.tasks import Task, TaskData, device_of, fingerprint, get_task
from provenn.tasks.re_identification import Groups, Pictures
from provenn.training import Fit, Hardware, Recipe, Stage, fit, new_then_all, run_stages

DEPTHS, WIDTHS = (1, 1, 2), (24, 48, 72)
ONE, THREE = "3.1", "2.1,3.1,3.2"  # late stages; the last is a head on the embedding, which is never taken alone
WIDER = (34, 68, 102)  # √2 times as wide: about the multiply-adds of twice the depth
SPACE = tuple(str(Placement.of_vector([2 * (i >> bit & 1) for bit in range(4)], DEPTHS)) for i in range(16))
DRAWN = tuple(random.Random(0).sample(SPACE[1:], 4))  # random placements, drawn before anything was trained
SINGLE = ("1.1", "2.1", "3.1", "3.2")
SHORT = 4  # identities of a smoke run
ONE_CPU = Hardware()
# Of the robot's cameras. On the tuning seed's validation identities C-NL at three places, trained before, has an mAP of
# 0.423, 0.442 and 0.479 under casts of 0.3 (at 2.7e-4), 0.2 and 0.1 (at 3e-4), tuned in one step; pixels about 0.42.
CAST = 0.1
PASSES = 8  # over the identities in an epoch, so that it is not validated after every four steps
RATE = 1e-2  # of what is not tuned: the plain network's best of 3e-3, 1e-2 and 2e-2 in a pilot
FULL = Recipe(epochs=20, batch_size=16, optimizer="adamw", weight_decay=5e-4, schedule="onecycle", label_smoothing=0.1)
TUNED = replace(FULL, epochs=10)
BRIEF = replace(FULL, epochs=4, lr=RATE)  # of a search, in networks that are trained already


class Net(NamedTuple):
    """A network of a study.

    Args:
        placement, block, options: where attention goes, and which.
        depths, widths: of the stages.
        id_loss: "ce" or "circle".
        branches: whether the last stage comes twice, once for the whole and once for the two halves.
        start: how it begins on the second set: "" as drawn; "none" with the weights of the first and no training, "one"
            with training of everything, "two" in two steps.
    """

    placement: str = "none"
    block: str = "cnl"
    options: tuple[tuple[str, Any], ...] = ()
    depths: tuple[int, ...] = DEPTHS
    widths: tuple[int, ...] = WIDTHS
    id_loss: str = "ce"
    branches: bool = False
    start: str = ""


class Branches(EmbeddingNetwork):
    """Two branches behind a shared trunk: one embeds the whole picture, one its upper and its lower half.

    As multi-branch networks of the field have it (Wang et al., 2018, arXiv:1804.01438), with two branches for three.

    Args:
        backbone: a ResNet.
        num_classes: identities of training.
    """

    def __init__(self, backbone: Any, num_classes: int):
        super().__init__(backbone, num_classes)
        name = backbone.stage_names[-1]
        self.second = copy.deepcopy(backbone.get_submodule(name))
        for module in self.second.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        dim = 3 * backbone.widths[-1]
        self.neck = nn.BatchNorm1d(dim)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(dim, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Identified:
        *_, trunk, whole = self.backbone.features(images)
        upper, lower = self.second(trunk).tensor_split(2, dim=2)
        features = torch.cat([part.mean(dim=(2, 3)) for part in (whole, upper, lower)], 1)
        embeddings = self.neck(features)
        return Identified(features, embeddings, self.classifier(embeddings))


def network(net: Net, num_classes: int = 60) -> nn.Module:
    """The network of a variant, for pictures of 64×32."""
    backbone = small_backbone(net.depths, net.widths)
    insert(backbone, net.placement, net.block, size=(64, 32), **dict(net.options))
    made = Branches(backbone, num_classes) if net.branches else with_head(backbone, num_classes, net.id_loss)
    made.net = net  # type: ignore[assignment]  # read again by `tuned_to`
    return made


def cameras(seed: int, smoke: bool) -> TaskData:
    """60 identities to train on, 15 to validate and 60 to search for, of other photographs each."""
    data = get_task("re-identification").load("cameras", seed=seed)
    if smoke:
        return _of(data, data.train.pictures, data.val, data.test)  # type: ignore[attr-defined]  # Groups
    return replace(data, train=ConcatDataset([data.train] * PASSES))


def robot(seed: int, smoke: bool) -> TaskData:
    """A small second set: identities of photographs that no search saw, by cameras with another colour cast each.

    36 identities of the first four of the test's photographs to train on, those to validate as before, and 24 of its
    last three photographs to search for.
    """
    data = get_task("re-identification").load("cameras", seed=seed)
    test: Any = data.test
    first = int(test.identities.min())
    train, held = test.some(test.identities - first < 36), test.some(test.identities - first >= 36)
    seen, val, asked = (_as_a_robot_sees(part, seed, number) for number, part in enumerate((train, data.val, held)))
    return _of(replace(data, name="robot"), seen, val, asked, count=SHORT if smoke else None)


def _of(data: TaskData, train: Any, val: Any, test: Any, count: int | None = SHORT) -> TaskData:
    """Data of these pictures, of the first identities of each part."""
    parts = []
    for part in (train, val, test):
        people = part.identities.unique()[:count]
        parts.append(part.some(torch.isin(part.identities, people)))
    groups = Groups(parts[0], augmentation="move")
    return replace(
        data,
        train=ConcatDataset([groups] * (1 if count else PASSES)),
        val=parts[1],
        test=parts[2],
        options={"num_classes": len(groups)},
        fingerprint=fingerprint(*(torch.as_tensor(part.images) for part in parts)),
    )


def _as_a_robot_sees(pictures: Pictures, seed: int, part: int) -> Pictures:
    """Pictures under another colour cast for each camera, a fifth darker and noisy.

    Casts are the robot's, alike in all parts: each channel of a camera is multiplied by exp(CAST · z), z standard
    normal.
    """
    images: UInt8[Tensor, "pictures 3 height width"] = torch.as_tensor(pictures.images)
    cameras = int(pictures.cameras.max()) + 1
    gains = 0.8 * (CAST * torch.randn(cameras, 3, generator=torch.Generator().manual_seed(seed))).exp()
    noise = 4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3 * seed + part))
    seen = (gains[pictures.cameras][:, :, None, None] * images + noise).round().clamp(0, 255).byte()
    return Pictures(seen, pictures.identities, pictures.cameras, pictures.queries, pictures.meta)


def attention_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    """Those of head and attention that learn: all that a pretrained backbone does not bring."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (not name.startswith("backbone.") or f".{CHILD}." in name):
            yield parameter


def first_and_second(task: Task, data: TaskData, recipe: Recipe, share: float = 0.1) -> list[Stage]:
    """Head and attention for a third of the epochs, then all at `share` of the rate. What the steps are is inferred."""
    return new_then_all(task, data, recipe, attention_parameters, share=share)


def take_weights(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Take over what fits of a trained network; returns the names that keep fresh values: another classifier, and
    attention that the other network had not.

    Raises:
        ValueError: something of the backbone or the neck is missing or has another shape.
    """
    own = model.state_dict()
    fits = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    fresh = [name for name in own if name not in fits]
    missing = [name for name in fresh if not name.startswith("classifier.") and f".{CHILD}." not in name]
    if missing:
        raise ValueError(f"the trained network has no {missing[0]} of this shape: it is another backbone")
    model.load_state_dict(fits, strict=False)
    return fresh


def two_step(
    model: nn.Module,
    state: dict[str, Tensor],
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
) -> dict[str, float]:
    """Tune a network that was trained on a large set to a small one, in place; returns its metrics on the test split.

    Args:
        model: of the small set's identities, with or without attention that the trained one had not.
        state: of the trained network, such as `provenn.core.tensors.read_tensors` gives it.
        data: of the task re-identification.
        recipe: of both steps together; a third of its epochs for the first, and a tenth of its rate for the second.
        seed, hardware: as of `fit`.

    Raises:
        ValueError: the trained network has another backbone.
    """
    task = get_task("re-identification")
    take_weights(model, state)
    run_stages(model, first_and_second(task, data, recipe), seed=seed, hardware=hardware)
    with torch.no_grad():
        return task.evaluate(model.eval(), data.test)


def trained(build: Callable[[], nn.Module], task: Task, data: TaskData, recipe: Recipe, **options: Any) -> Fit:
    """As `fit`; a network with circle loss has no labels to smooth."""
    net: Any = build()
    smoothing = recipe.label_smoothing if net.net.id_loss == "ce" else 0.0
    return fit(build, task, data, replace(recipe, label_smoothing=smoothing), **options)


@lru_cache(maxsize=24)
def _trained_on_cameras(net: Net, seed: int, short: bool, hardware: Hardware, precision: str) -> dict[str, Tensor]:
    """The weights of a network trained on the first set, once a seed and network."""
    data = cameras(seed, short)
    recipe = replace(FULL, lr=RATE, precision=precision)
    recipe = replace(recipe, epochs=1, max_steps=2) if short else recipe
    task = get_task("re-identification")
    done = fit(
        lambda: network(net, **data.options), task, data, recipe, seed=seed, hardware=hardware, title="first set"
    )
    return copy.deepcopy(done.model).cpu().state_dict()


def tuned_to(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    title: str = "",
) -> Fit:
    """Trained on the second set as the variant's `start` says."""
    first: Any = build()
    net: Net = first.net
    if not net.start:
        return fit(build, task, data, recipe, seed=seed, hardware=hardware, title=title)
    short = recipe.max_steps is not None
    before = _trained_on_cameras(net._replace(start=""), seed, short, hardware, recipe.precision)
    begin = partial(_with_weights, build, before)
    if net.start == "one":
        return fit(begin, task, data, recipe, seed=seed, hardware=hardware, title=title)
    torch.manual_seed(seed)
    model = begin().to(hardware.device)
    if net.start == "two":
        run_stages(model, first_and_second(task, data, recipe), seed=seed, hardware=hardware)
    model.eval()
    with torch.no_grad():
        return Fit(model, task.evaluate(model, data.test))


def _with_weights(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    """A network that begins with what fits of a trained one."""
    model = build()
    take_weights(model, state)
    return model


def put_into_trained(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    title: str = "",
) -> Fit:
    """Trained on the first set with its attention, after the same network without attention was trained there."""
    first: Any = build()
    net: Net = first.net._replace(placement="none", block="cnl", options=())
    before = _trained_on_cameras(net, seed, recipe.max_steps is not None, hardware, recipe.precision)
    return fit(partial(_with_weights, build, before), task, data, recipe, seed=seed, hardware=hardware, title=title)


def gate_on_occluder(model: nn.Module, data: TaskData) -> float:
    """The mean gate of relation-aware attention on a pasted rectangle, minus its mean beside it; 0 without such gates.

    The rectangle is the lower half of a test picture of another identity, over the lower half of each of 64.
    """
    relations = [m for m in model.modules() if isinstance(m, RelationAware) and m.over == "positions"]
    if not relations:
        return 0.0
    images = torch.stack([data.test[i][0] for i in range(min(64, len(data.test)))])  # type: ignore[arg-type]
    hidden = images.clone()
    half = images.shape[2] // 2
    hidden[:, :, half:] = images.roll(len(images) // 2, 0)[:, :, half:]
    seen: list[Tensor] = []
    last = relations[-1]
    handle = last.register_forward_hook(lambda module, args, _: seen.append(last.gate(args[0])))
    try:
        model(hidden.to(device_of(model)))
    finally:
        handle.remove()
    gate = seen[0].unflatten(2, last.shape[1:])
    rows = last.shape[1] // 2
    return float((gate[:, :, rows:].mean() - gate[:, :, :rows].mean()).item())


@torch.no_grad()
def gate_on_covered(model: nn.Module, data: TaskData) -> float:
    """The mean gate of relation-aware attention on a covered half of a picture, minus that on the half that is seen.

    Of each of 64 test pictures first the lower half is covered by that of another identity, then the upper one. So a
    gate that prefers one half of every picture comes to 0.

    Raises:
        ValueError: the network has no such attention.
    """
    relations = [m for m in model.modules() if isinstance(m, RelationAware) and m.over == "positions"]
    if not relations:
        raise ValueError("expected a network with relation-aware attention over positions")
    test: Any = data.test
    images = torch.stack([test[i][0] for i in range(min(64, len(test)))])
    others, last = images.roll(len(images) // 2, 0), relations[-1]
    half, rows = images.shape[2] // 2, last.shape[1] // 2
    seen: list[Tensor] = []
    handle = last.register_forward_hook(lambda module, args, _: seen.append(last.gate(args[0])))
    try:
        model(torch.cat([images[:, :, :half], others[:, :, half:]], 2).to(device_of(model)))
        model(torch.cat([others[:, :, :half], images[:, :, half:]], 2).to(device_of(model)))
    finally:
        handle.remove()
    below, above = (gate.unflatten(2, last.shape[1:]) for gate in seen)
    covered = below[:, :, rows:].mean() + above[:, :, :rows].mean()
    bare = below[:, :, :rows].mean() + above[:, :, rows:].mean()
    return float((covered - bare).item() / 2)


def rules(scores: Mapping[str, Sequence[float]], places: Sequence[str] = SINGLE) -> list[list[Any]]:
    """The marginal effect of each place: with it minus without it, over a full factorial, seed by seed.

    Returns: Rows of the place, the mean effect, and both ends of its interval of 95 % over seeds.
    """
    from provenn.evidence.interval import estimate

    chosen = {name: set() if name == "none" else set(name.split(",")) for name in scores}
    count = min(len(values) for values in scores.values())
    rows: list[list[Any]] = []
    for place in places:
        with_it, without = ([n for n in scores if (place in chosen[n]) is there] for there in (True, False))
        sides = [[sum(scores[n][i] for n in part) / len(part) for i in range(count)] for part in (with_it, without)]
        found = estimate("difference", *sides)
        low, high = found.interval or (float("nan"), float("nan"))
        rows.append([place, round(found.effect, 4), round(low, 4), round(high, 4)])
    return rows
