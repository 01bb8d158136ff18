"""What EMOv2's authors say, and what building it brought to light, as measurements."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from provenn.core.cost import count_parameters
from provenn.core.narrowing import of_kind
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.nn.mobilenet import MobileNetV2
from provenn.papers.emov2.census import AUTHORS, CLASSES, count_stages, shapes_digest
from provenn.papers.emov2.model import SIZES, EMOv2, emov2, emov2_baseline
from provenn.papers.emov2.rivals import framed, mobilevit_stage, repvit_stage
from provenn.papers.emov2.studies import (
    Fields,
    SmallMobileNet,
    counter,
    equals_feed_forward,
    equals_inverted_residual,
    equals_multihead_attention,
    field_data,
    field_network,
    forward_pass,
    largest_deviation,
    macs_at,
    mobilevit_v2,
    mosaic_data,
    norm_operations,
    on_meta,
    patch_data,
    real_share,
    saved_bytes,
    segmenter,
    small_network,
)
from provenn.training import Recipe

FIELDS = Study(
    "reach of attention",
    Fields(),
    data=field_data,
    variants={
        "conv": ("no attention", ("conv", 1)),
        "remote": ("remote", ("remote", 1)),
        "close": ("close", ("close", 1)),
        "spanning": ("spanning", ("spanning", 1)),
        "close2": ("close, two blocks", ("close", 2)),
        "remote2": ("remote, two blocks", ("remote", 2)),
    },
    build=field_network,
    recipe=Recipe(epochs=1, batch_size=32, optimizer="adamw", schedule="onecycle"),
    lrs=(2e-3, 6e-3, 2e-2),
    about="white noise, and for every pixel the means of its window and of its remote group",
    kind="operator",
    columns={"parameters": lambda part: count_parameters(field_network(part))},
    note="Synthetic: the target asks for just what the two groupings reach.",
)

ADAMW = Recipe(optimizer="adamw", weight_decay=0.05, decay_vectors=False, schedule="onecycle", clip=5.0)
PATCHES = Study(
    "patches",
    "image-classification",
    data=patch_data,
    variants={
        "neither": ("neither", {"mode": "conv", "kernel_sizes": 0}),
        "attention": ("attention only", {"kernel_sizes": 0}),
        "conv": ("depth-wise only", {"mode": "conv"}),
        "wide": ("depth-wise only, wider", {"mode": "conv", "exp_ratio": 2.5}),
        "remote": ("remote", {"mode": "remote"}),
        "close": ("close", {"mode": "close"}),
        "spanning": ("spanning", {}),
        "fresh": ("spanning, γ = 1e-6", {"layer_scale": 1e-6}),
        "mobilenet": ("MobileNetV2 blocks", SmallMobileNet),
    },
    build=small_network,
    recipe=replace(ADAMW, epochs=12, batch_size=64),
    lrs=(1e-3, 3e-3, 1e-2),
    about="patches of 16×16 pixels from 16 photographs: which photograph?",
    columns={"parameters": lambda part: count_parameters(small_network(part, num_classes=16))},
    note="γ starts at 1 but for one variant; the paper's 1e-6 is for hundreds of epochs.",
)

RIVALS = Study(
    "rival blocks",
    "image-classification",
    data=patch_data,
    variants={
        "i2rmb": ("i2RMB", None),
        "repvit": ("RepViT's block", repvit_stage),
        "mobilevit": ("MobileViTV2's block", mobilevit_stage),
    },
    build=framed,
    recipe=replace(ADAMW, epochs=16, batch_size=64),
    lrs=(3e-3, 1e-2, 3e-2),
    about="patches of 16×16 pixels from 16 photographs: which photograph?",
    kind="block",
    columns={"parameters": lambda stage: count_parameters(framed(stage, num_classes=16))},
    setting={"channels": [16, 32, 64], "blocks": [2, 2, 2]},
    note="One frame: stem, strides, last norm and classifier are those of EMOv2. γ of the i2RMB starts at 1.",
)

MOSAICS = Study(
    "mosaics",
    "semantic-segmentation",
    data=mosaic_data,
    variants={
        "conv": ("no attention", {"mode": "conv"}),
        "remote": ("remote", {"mode": "remote"}),
        "close": ("close", {"mode": "close"}),
        "spanning": ("spanning", {}),
    },
    build=segmenter,
    recipe=replace(ADAMW, epochs=8, batch_size=16),
    lrs=(1e-3, 3e-3, 1e-2),
    about="mosaics of photographed textures, 128×128 pixels",
    columns={"parameters": lambda part: count_parameters(segmenter(part))},
)

MODES: Mapping[str, Mapping[str, Any]] = {
    "spanning": {},
    "close": {"mode": "close"},
    "remote": {"mode": "remote"},
    "no attention": {"mode": "conv"},
}
NETWORKS = Timing(
    "multiply-adds of EMOv2-5M",
    {label: counter(emov2, variant="5m", **options) for label, options in MODES.items()},
    sizes=(224, 448),
    quantity="count",
    unit="pixels a side",
    of="multiply-adds",
)
INFERENCE = Timing(
    "inference of one image",
    {
        "EMOv2-5M": forward_pass(lambda: emov2("5m")),
        "baseline 5M": forward_pass(lambda: emov2_baseline("5m")),
        "MobileNetV2": forward_pass(MobileNetV2),
        "MobileViTV2": forward_pass(mobilevit_v2),
    },
    sizes=(224,),
    unit="pixels a side",
    rounds=15,
    setting={"batch": 1},
)

EXPERIMENTS = {
    "spanning_reaches": FIELDS.figure("spanning", shown=["conv", "remote", "close"]),
    "beyond_close": FIELDS.against("spanning", "close", shown=["remote", "conv"]),
    "beyond_remote": FIELDS.against("spanning", "remote", shown=["close", "conv"]),
    "depth_is_no_substitute": FIELDS.against("spanning", "close2", shown=["remote2"]),
    "both_parts": PATCHES.against("spanning", "neither", shown=["attention", "conv"]),
    "attention_pays": PATCHES.against("spanning", "wide", shown=["conv"]),
    "spanning_over_close": PATCHES.against("spanning", "close"),
    "spanning_over_remote": PATCHES.against("spanning", "remote"),
    "against_mobilenet": PATCHES.against("spanning", "mobilenet"),
    "slow_start": PATCHES.against("spanning", "fresh"),
    "over_repvit": RIVALS.against("i2rmb", "repvit", shown=["mobilevit"]),
    "over_mobilevit": RIVALS.against("i2rmb", "mobilevit"),
    "mosaics_over_remote": MOSAICS.against("spanning", "remote", shown=["close"]),
    "mosaics_attention": MOSAICS.against("spanning", "conv"),
    "spanning_cost": NETWORKS.against("spanning", "close", at=224),
    "time_baseline": INFERENCE.against("EMOv2-5M", "baseline 5M"),
    "time_mobilevit": INFERENCE.against("EMOv2-5M", "MobileViTV2"),
}


@measures("parameters")
def parameters(run: Run) -> Measurement:
    printed = {"1m": 1.4, "2m": 2.3, "5m": 5.1, "20m": 20.1, "50m": 49.8}
    counts = {name: count_parameters(on_meta(emov2, variant=name)) for name in SIZES}
    rows: list[list[Any]] = [[f"EMOv2-{name.upper()}", counts[name], printed[name]] for name in SIZES]
    return Measurement.holds(
        all(int(counts[name] / 1e5) == round(10 * printed[name]) for name in SIZES),
        "Cut off after the first decimal, not rounded: 2,384,312 is printed as 2.3M.",
        tables=[Table(caption="Parameters", columns=["network", "counted", "printed, millions"], rows=rows)],
    )


@measures("printed_flops")
def printed_flops(run: Run) -> Measurement:
    network = on_meta(emov2, variant="5m")
    products, norms = macs_at(network, 224), norm_operations(network, 224)
    return Measurement.exact(
        (products + norms) / 1e6,
        unit="10^6 operations",
        note=f"Convolutions, linear layers and attention alone: {products / 1e6:.1f} million.",
    )


@measures("one_block")
def one_block(run: Run) -> Measurement:
    errors = {
        "self-attention with a residual": equals_multihead_attention(),
        "feed-forward with a residual": equals_feed_forward(),
        "inverted residual without a shortcut": equals_inverted_residual(),
    }
    return Measurement.holds(
        max(errors.values()) < 1e-12,
        "With a shortcut the block is no inverted residual: a second residual around the depth-wise filter stays.",
        tables=[
            Table(caption="Largest difference", columns=["block", "difference"], rows=list(map(list, errors.items())))
        ],
    )


@measures("i2rmbs_alone")
def i2rmbs_alone(run: Run) -> Measurement:
    """A census of the stages of all sizes: modules, parameters, operations, and the authors' names and shapes."""
    rows: list[list[Any]] = []
    strange, kinds = 0, set[str]()
    for name in SIZES:
        found = count_stages(of_kind(on_meta(emov2, variant=name, num_classes=0), EMOv2, "network"))
        shapes = shapes_digest(on_meta(emov2, variant=name, num_classes=CLASSES).state_dict())
        differs = shapes != AUTHORS.get(name, shapes)
        strange += len(found.strange) + differs
        kinds |= set(found.strange) | ({"names and shapes"} if differs else set())
        authors = "other" if differs else "same" if name in AUTHORS else "not held"
        sums = found.operations.get("sum of two maps", 0)
        rows.append([f"EMOv2-{name.upper()}", found.blocks, found.attentions, sums, len(found.strange), authors])
    columns = [
        "network",
        "i2RMBs",
        "with attention",
        "sums of two maps",
        "of no listed kind",
        "the authors' names, shapes",
    ]
    return Measurement.exact(
        strange,
        unit="parts of no listed kind",
        note=f"Of no listed kind: {', '.join(sorted(kinds)) or 'none'}. "
        "Stages 1 and 2 and the first block of each stage have no attention.",
        tables=[Table(caption="Blocks of the four stages", columns=columns, rows=rows)],
    )


def download_seconds(megabits: float) -> Measurement:
    """Of the saved 5M at a rate, with the other sizes and with half the digits in a table."""
    rows: list[list[Any]] = []
    for name in ("1m", "2m", "5m", "20m"):
        network = emov2(name)
        seconds = [8 * saved_bytes(network.to(dtype)) / (megabits * 1e6) for dtype in (torch.float32, torch.float16)]
        rows.append([f"EMOv2-{name.upper()}", *seconds])
    table = Table(caption=f"Seconds at {megabits:g} Mbit/s", columns=["network", "float32", "float16"], rows=rows)
    return Measurement.exact(rows[2][1], unit="seconds", tables=[table])


@measures("download_5g")
def download_5g(run: Run, megabits: float = 100.0) -> Measurement:
    return download_seconds(megabits)


@measures("download_4g")
def download_4g(run: Run, megabits: float = 10.0) -> Measurement:
    return download_seconds(megabits)


@measures("fresh_maps_vanish")
def fresh_maps_vanish(run: Run) -> Measurement:
    def deviation(seed: int, layer_scale: float | None) -> float:
        torch.manual_seed(seed)
        network = emov2("5m", num_classes=0, layer_scale=layer_scale)
        return largest_deviation(network, torch.randn(2, 3, 64, 64))

    starts: tuple[float | None, ...] = (1e-6, 1.0, None)
    with torch.random.fork_rng(devices=[]):
        found = {start: [deviation(seed, start) for seed in run.seeds] for start in starts}
    rows: list[list[Any]] = [["none" if s is None else f"{s:g}", sum(v) / len(v)] for s, v in found.items()]
    return Measurement.mean(
        found[1e-6],
        seeds=run.seeds,
        unit="standard deviation",
        at_paper_setting=True,
        note="Of 2 images of 64×64 pixels of white noise. Norms have ε = 1e-6, far above such a variance.",
        tables=[Table(caption="Largest standard deviation of a stage's map", columns=["γ starts at", "σ"], rows=rows)],
    )


@measures("padding_is_attended")
def padding_is_attended(run: Run) -> Measurement:
    sides = {"224, window 7": (14, 7), "256, window 7": (16, 7), "256, window 8": (16, 8), "512, window 10": (32, 10)}
    shares = {name: 1 - float(real_share(*of).mean()) for name, of in sides.items()}
    rows: list[list[Any]] = [[name, share] for name, share in shares.items()]
    return Measurement.exact(
        shares["256, window 7"],
        unit="share of padding",
        tables=[Table(caption="Of what a pixel of stage 3 attends to", columns=["image", "padding"], rows=rows)],
    )
