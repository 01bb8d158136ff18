"""What RBI's abstract says, and what its protocols hide, as measurements."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.nn.vit import ViT
from provenn.papers.rbi.backbones import ConvNeXt, DenseNet, SmallCNN, densenet
from provenn.papers.rbi.layers import RRA, normalised_psnr
from provenn.papers.rbi.model import RBI, rbi_densenet169
from provenn.papers.rbi.plugging import plug_in, unplug
from provenn.papers.rbi.studies import (
    DIGITS_RECIPE,
    PROBES,
    REGIONS_RECIPE,
    TASK,
    alone,
    digits,
    distinct,
    network,
    regions,
    same_class_shares,
    variants,
)

RATES = (1e-3, 3e-3, 1e-2)
ABOUT = "views of 64 regions in 16 photographs, four of each that overlap; 32×32 pixels"
NOTE = "Rates are chosen by accuracy in shuffled batches of 32. Transductive: a prediction depends on the batch."
BATCHES = {"batch": 32}
PARTS = Study(
    "regions, parts of RBI",
    TASK,
    data=regions,
    variants=variants(("plain", "per-image", "smoothing", "rra", "rbi", "minmax", "shuffled", "features")),
    build=network,
    recipe=REGIONS_RECIPE,
    lrs=RATES,
    probes=PROBES,
    about=ABOUT,
    kind="before the classifier",
    setting=BATCHES,
    note=NOTE,
)
THREE = ("plain", "per-image", "rbi")
OTHERS = {
    name: Study(
        f"regions, {name}",
        TASK,
        data=regions,
        variants=variants(THREE, name),
        build=network,
        recipe=REGIONS_RECIPE,
        lrs=RATES,
        probes={"alone": alone},
        about=ABOUT,
        kind="before the classifier",
        setting=BATCHES,
        note=NOTE,
    )
    for name in ("densenet", "convnext")
}
ON_REGIONS = {"cnn": PARTS, **OTHERS}
ON_DIGITS = {
    name: Study(
        f"digits, {name}",
        TASK,
        data=digits,
        variants=variants(THREE, name),
        build=network,
        recipe=DIGITS_RECIPE,
        lrs=RATES,
        probes={"alone": alone},
        about="digits (scikit-learn), 8×8 pixels; 300 to train on",
        kind="before the classifier",
        setting=BATCHES,
        note=NOTE,
    )
    for name in ("cnn", "densenet")  # by this recipe a small ConvNeXt stays below the pixels alone
}
OF_DENSENET, OF_CONVNEXT = OTHERS["densenet"], OTHERS["convnext"]
DIGITS_CNN, DIGITS_DENSENET = ON_DIGITS["cnn"], ON_DIGITS["densenet"]
PHOTOGRAPHS = Study(
    "photographs",
    TASK,
    data=distinct,
    variants=variants(("per-image", "rbi")),
    build=network,
    recipe=REGIONS_RECIPE,
    lrs=RATES,
    about="the same views, told apart by photograph: 16 classes without neighbours",
    kind="before the classifier",
    setting=BATCHES,
    note=NOTE,
)
SHOWN = ("plain",)

EXPERIMENTS: dict[str, Any] = {
    "attention_over_per_image": PARTS.against("rra", ("per-image", "smoothing"), shown=SHOWN),
    "gate_is_open": PARTS.figure("rbi", metric="mean gate", shown=("rra", "shuffled", "features")),
    "positions_over_shuffled": PARTS.against("rbi", "shuffled", shown=("rra", "minmax")),
    "positions_over_features": PARTS.against("rbi", "features", shown=("rra", "minmax")),
    "positions_over_none": PARTS.against("rbi", "rra", shown=("minmax", "shuffled")),
    "positions_rank_classes": PARTS.figure("rbi", metric="rank correlation"),
    "class_mates_over_smoothing": PARTS.against("rbi", "smoothing", metric="gain of class-mates", shown=("rra",)),
    "batch_128_over_2": PARTS.figure("rbi", metric="batches of 128 over 2", shown=("smoothing", "rra")),
}


async def gains(
    run: Run, studies: Sequence[Study], baseline: str, metric: str | None = None
) -> tuple[list[float], list[float], dict[str, Any]]:
    """RBI and a baseline, seed by seed, each the mean over the studies; and what goes with the measurement."""
    sides: dict[str, list[list[float]]] = {"rbi": [], baseline: []}
    skills, rows, facts = list[Any](), list[list[Any]](), dict[str, Any]()
    settings: dict[str, dict[str, Any]] = {}
    for study in studies:
        reached, facts = await study.measure(run, ("rbi", baseline), metric=metric)
        for name, values in sides.items():
            values.append(reached[name])
        means = [float(np.mean(reached[name])) for name in sides]
        rows.append([study.name, *means, means[0] - means[1]])
        skills += facts["skills"]
        for key in ("lr", "tuned"):
            if key in facts["setting"]:
                settings.setdefault(key, {})[study.name] = facts["setting"].pop(key)
    facts["setting"] |= settings
    facts["data"] = "; ".join(dict.fromkeys(study.about for study in studies))
    columns = ["on", "RBI", str(studies[0].label(baseline)), "difference"]
    facts |= {"skills": skills, "series": [], "tables": [Table(caption="Accuracy", columns=columns, rows=rows)]}
    facts["unit"] = "accuracy"
    ours, theirs = (np.mean(sides[name], axis=0).tolist() for name in sides)
    return ours, theirs, facts


@measures("gain_over_per_image")
async def gain_over_per_image(run: Run) -> Measurement:
    """Five cells: three backbones on regions and two on digits, in shuffled batches."""
    ours, theirs, facts = await gains(run, [*ON_REGIONS.values(), *ON_DIGITS.values()], "per-image")
    return Measurement.of("difference", ours, theirs, sides=("RBI", "per-image layer"), **facts)


@measures("gain_alone")
async def gain_alone(run: Run) -> Measurement:
    """The same five where every image comes alone."""
    ours, theirs, facts = await gains(run, [*ON_REGIONS.values(), *ON_DIGITS.values()], "per-image", "alone")
    return Measurement.of("difference", ours, theirs, sides=("RBI", "per-image layer"), **facts)


@measures("alone_keeps_plain")
async def alone_keeps_plain(run: Run) -> Measurement:
    """Three backbones on regions, every image alone, against the networks without RBI."""
    ours, theirs, facts = await gains(run, list(ON_REGIONS.values()), "plain", "alone")
    return Measurement.of("difference", ours, theirs, sides=("RBI", "plain"), **facts)


@measures("neighbours_gain_more")
async def neighbours_gain_more(run: Run) -> Measurement:
    """The gain on neighbouring regions and that on distinct photographs, seed by seed."""
    near, near_base, facts = await gains(run, [PARTS], "per-image")
    far, far_base, more = await gains(run, [PHOTOGRAPHS], "per-image")
    facts["skills"] += more["skills"]
    facts["tables"] += more["tables"]
    facts["setting"]["of photographs"] = {key: more["setting"].get(key) for key in ("lr", "tuned")}
    sides = [[a - b for a, b in zip(x, y, strict=True)] for x, y in ((near, near_base), (far, far_base))]
    labels = ("gain on neighbouring regions", "gain on distinct photographs")
    return Measurement.of("difference", *sides, sides=labels, **facts)


@measures("ordered_inflates")
async def ordered_inflates(run: Run) -> Measurement:
    """The same trained RBI in batches in the order of the list, and with every image alone."""
    together, facts = await PARTS.measure(run, ("rbi",), metric="ordered")
    apart, _ = await PARTS.measure(run, ("rbi",), metric="alone")
    facts["unit"] = "accuracy"
    return Measurement.of("difference", together["rbi"], apart["rbi"], sides=("in order", "alone"), **facts)


@measures("ordered_tells_classes")
def ordered_tells_classes(run: Run) -> Measurement:
    """An attention without weights, on images of which one in a class shows anything."""
    classes, size = 64, 32
    labels = np.repeat(np.arange(classes), size)
    features = torch.zeros(len(labels), classes, dtype=torch.float64)
    features[torch.arange(0, len(labels), size), torch.arange(classes)] = 1
    mixer = RRA(classes, residual="linear", relation="none", norm=False).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter.zero_()
            if name == "value.weight":
                parameter.copy_(torch.eye(classes))
    orders = {"ordered": np.arange(len(labels)), "random": np.random.default_rng(0).permutation(len(labels))}
    rows: list[list[Any]] = []
    right: dict[str, float] = {}
    for name, order in orders.items():
        shares = same_class_shares(labels, size, [order])[0]
        hits = []
        for places in np.split(order, classes):
            logits = mixer(features[places])
            # A class counts as told where no other is as likely.
            best = logits.max(1).values
            sure = (logits == best[:, None]).sum(1) == 1
            hits.append((sure & (logits.argmax(1).numpy() == torch.from_numpy(labels[places]))).double().mean().item())
        right[name] = float(np.mean(hits))
        rows.append([name, right[name], shares])
    alone_right = float((features.sum(1) > 0).double().mean())
    rows.insert(0, ["single", alone_right, None])
    table = Table(
        caption="64 classes of 32 images, one of which shows its class",
        columns=["protocol", "accuracy", "batch mates of one's class"],
        rows=rows,
    )
    return Measurement.holds(
        right["ordered"] == 1 and alone_right == 1 / size and right["random"] < 0.2,
        f"Accuracy alone {alone_right:.1%}, in shuffled batches {right['random']:.1%}, in the list's order "
        f"{right['ordered']:.0%}.",
        tables=[table],
    )


@measures("mates_in_order")
def mates_in_order(run: Run) -> Measurement:
    """How many of an image's batch mates are of its class, in lists as large as those of the field, sorted by class."""
    lists = {"regions": (1024, 64), "CUB-200-2011": (5794, 200), "Stanford Dogs": (8580, 120), "NABirds": (24633, 555)}
    rows: list[list[Any]] = []
    for name, (images, classes) in lists.items():
        labels = np.sort(np.arange(images) % classes)
        rows.append([name, *same_class_shares(labels, 32, [np.arange(images)]), (images / classes - 1) / (images - 1)])
    columns = ["list", "in order", "shuffled, expected"]
    table = Table(caption="Share of batch mates of one's own class, batches of 32", columns=columns, rows=rows)
    return Measurement.exact(
        round(rows[1][1], 3),
        unit="of the batch mates",
        note="Classes of equal size: the exact sizes of CUB's classes vary.",
        tables=[table],
    )


def hosts() -> dict[str, Callable[[], nn.Module]]:
    """Small networks of five kinds, the last of which knows nothing of this library."""
    return {
        "convolutions": lambda: nn.Sequential(SmallCNN(), nn.Linear(128, 5)),
        "DenseNet": lambda: DenseNet((2, 2), growth=8, stem=8, num_classes=5, small=True),
        "ConvNeXt": lambda: ConvNeXt((1, 1), (8, 16), num_classes=5),
        "ViT": lambda: ViT(dim=16, depth=1, heads=2, image=(32, 32), patch=8, num_classes=5),
        "unknown": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    }


@measures("plugs_in")
def plugs_in(run: Run) -> Measurement:
    """One call puts it in, training reaches it, and another call leaves the network as it was."""
    held = 0
    for build in hosts().values():
        torch.manual_seed(0)
        model, x = build().eval(), torch.rand(4, 3, 32, 32)
        with torch.no_grad():
            before = model(x)
            plug_in(model, residual="add")
            same = torch.equal(model(x), before)
        model.train()
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
        value = next(p for n, p in model.named_parameters() if n.endswith("attend.value.weight"))
        reached = value.grad is not None and bool(value.grad.any())
        unplug(model)
        held += same and reached and set(build().state_dict()) == set(model.state_dict())
    return Measurement.exact(held, unit="networks of five")


@measures("parameters_added")
def parameters_added(run: Run) -> Measurement:
    """What RBI adds to DenseNet-201."""
    with torch.device("meta"):
        rows: list[list[Any]] = [[dim, count_parameters(RRA(dim))] for dim in (768, 1024, 1664, 1920, 2048)]
        whole = count_parameters(densenet(201))
    table = Table(caption="Parameters of RRA, d = D", columns=["D", "parameters"], rows=rows)
    added = dict(map(tuple, rows))[1920]
    return Measurement.exact(
        round(added / whole, 3), unit="of DenseNet-201's own", note="Gated residual (inferred).", tables=[table]
    )


@measures("identities")
def identities(run: Run) -> Measurement:
    """The order of a batch orders what comes, and a scores' copy of another brightness has a closed form."""
    torch.manual_seed(0)
    model = RBI(nn.Flatten(), 5, feat_dim=48, mean=[0.0] * 3, std=[1.0] * 3).double().eval()
    x, order = torch.rand(6, 3, 4, 4, dtype=torch.float64), torch.tensor([3, 1, 5, 0, 2, 4])
    with torch.no_grad():
        equivariant = torch.allclose(model(x[order], "batch"), model(x, "batch")[order], rtol=0, atol=1e-12)
        apart = not torch.allclose(model(x, "batch"), model(x, "single"), rtol=0, atol=1e-6)
    grey = torch.full((1, 3, 4, 4), 0.3, dtype=torch.float64)
    closed = abs(float(normalised_psnr(torch.cat([grey, grey + 0.1]))[0, 1]) - 0.5) < 1e-9
    return Measurement.holds(
        equivariant and apart and closed,
        "A shuffled batch gives shuffled outputs; a batch of other images gives others; δ = 0.1 gives S = 0.5.",
    )


def forward_at(plain: bool, size: int, device: str) -> Callable[[], Tensor]:
    """DenseNet-169 on a batch of images of 224×224, counted without numbers."""
    with torch.device("meta"):
        model, x = rbi_densenet169(num_classes=200, plain=plain).eval(), torch.zeros(size, 3, 224, 224)

    @torch.no_grad()
    def call() -> Tensor:
        return model(x, "batch")

    return call


def relation_at(size: int, device: str) -> Callable[[], Tensor]:
    """RPE alone, on a batch of images of 224×224."""
    x = torch.zeros(size, 3, 224, 224, device="meta")
    return lambda: normalised_psnr(x)


OVERHEAD = Timing(
    "operations of a batch",
    {"RBI": partial(forward_at, False), "plain": partial(forward_at, True), "RPE": relation_at},
    sizes=(16, 32, 64, 128),
    quantity="flops",
    unit="images",
)
EXPERIMENTS["overhead"] = OVERHEAD.against("RBI", "plain", at=32)
EXPERIMENTS["positions_grow"] = OVERHEAD.grows("RPE")
