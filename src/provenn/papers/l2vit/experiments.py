"""What L²ViT's author says, and what building it brought to light, as measurements."""

from functools import partial

import torch

from provenn.core.cost import count_parameters
from provenn.core.narrowing import of_kind
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.papers.l2vit import model as presets
from provenn.papers.l2vit.layers import LinearGlobalAttention, WindowAttention
from provenn.papers.l2vit.studies import (
    ATTENTIONS,
    entropy_of,
    floored_shares,
    fresh_concentration,
    macs_of_pixels,
    mosaic_data,
    multiply_adds,
    nearness_of,
    on_meta,
    patch_data,
    plain_network,
    printed_operations,
    seen_by,
    segmenter,
    tiny_on,
    two_stages,
)
from provenn.training import Recipe

TOKENS = (196, 784, 3136)
STAGE_ONE = {"heads": 3, "head width": 32, "projections": "left out"}
OPERATIONS = Timing("operations of attention", ATTENTIONS, sizes=TOKENS, quantity="flops", setting=STAGE_ONE)
MEMORY = Timing("memory of attention", ATTENTIONS, sizes=TOKENS, quantity="memory", setting=STAGE_ONE)
TIME = Timing("time of attention", ATTENTIONS, sizes=TOKENS, rounds=11, setting=STAGE_ONE)
WHOLE = Timing(
    "multiply-adds of Tiny",
    {
        "L2ViT": macs_of_pixels(),
        "softmax in place of linear attention": macs_of_pixels(attention="softmax"),
        "windows alone": macs_of_pixels(blocks=("window",)),
    },
    sizes=tuple(side**2 for side in (224, 448, 896)),
    quantity="count",
    unit="pixels",
    of="multiply-adds",
)
TILES = Timing(
    "memory of Tiny on a large image",
    {"tiles of 224": tiny_on(224), "whole": tiny_on(None)},
    sizes=(448, 896),
    quantity="memory",
    unit="pixels a side",
    setting={"batch": 1, "gradients": False},
)

LCM = Study(
    "plain towers on photo patches",
    "image-classification",
    data=patch_data(24),
    variants={
        "linear": ("linear", {"kernel_size": None}),
        "linear_wide": ("linear, wider MLP", {"kernel_size": None, "mlp_ratio": 115 / 32}),
        "linear_lcm": ("linear + LCM", {}),
        "softmax": ("softmax", {"attention": "softmax", "kernel_size": None}),
        "softmax_lcm": ("softmax + LCM", {"attention": "softmax"}),
    },
    build=plain_network,
    recipe=Recipe(epochs=12, batch_size=64, optimizer="adamw", weight_decay=0.05, schedule="onecycle"),
    lrs=(1e-3, 3e-3, 1e-2),
    probes={"entropy": entropy_of, "nearness": nearness_of},
    about="patches of 24×24 pixels from 16 photographs, half of the training split",
    kind="attention",
    columns={"parameters": lambda part: count_parameters(plain_network(part, num_classes=16, in_channels=1))},
    note="Four blocks of width 32 on 144 tokens. Convolutional positions are in every variant.",
)

TURNS = Study(
    "two stages on photo patches",
    "image-classification",
    data=patch_data(32),
    variants={
        "l2vit": ("L2ViT", {}),
        "windows": ("windows alone", {"blocks": ("window",)}),
        "global": ("linear alone", {"blocks": ("global",)}),
        "softmax": ("softmax in place of linear attention", {"attention": "softmax"}),
        "swin": ("Swin", None),
    },
    build=two_stages,
    recipe=Recipe(epochs=12, batch_size=64, optimizer="adamw", weight_decay=0.05, schedule="onecycle"),
    lrs=(1e-3, 3e-3, 1e-2),
    about="patches of 32×32 pixels from 16 photographs, half of the training split",
    columns={"parameters": lambda part: count_parameters(two_stages(part, num_classes=16, in_channels=1))},
)

MOSAICS = Study(
    "segmentation of texture mosaics",
    "semantic-segmentation",
    data=mosaic_data,
    variants={
        "l2vit": ("L2ViT", {}),
        "resnet": ("ResNet-10", None),
    },
    build=segmenter,
    recipe=Recipe(epochs=8, batch_size=16, optimizer="adamw", weight_decay=0.01, schedule="onecycle"),
    lrs=(1e-3, 3e-3, 1e-2),
    about="mosaics of five photographed textures, 128×128 pixels",
    kind="backbone",
    columns={"parameters": lambda part: count_parameters(segmenter(part, num_classes=5, in_channels=1))},
    note="All under the semantic head of Panoptic FPN.",
)

EXPERIMENTS = {
    "softmax_operations": OPERATIONS.grows("softmax"),
    "linear_operations": OPERATIONS.grows("linear"),
    "softmax_memory": MEMORY.grows("softmax"),
    "fused_memory": MEMORY.grows("fused softmax"),
    "linear_faster": TIME.against("linear", "softmax"),
    "whole_grows": WHOLE.grows("L2ViT"),
    "whole_saves": WHOLE.against("L2ViT", "softmax in place of linear attention"),
    "tiles_hold_less": TILES.against("tiles of 224", "whole"),
    "lcm_helps": LCM.against("linear_lcm", "linear", shown=["softmax"]),
    "lcm_is_no_width": LCM.against("linear_lcm", "linear_wide"),
    "lcm_closes_the_gap": LCM.against("linear_lcm", "softmax_lcm"),
    "lcm_helps_softmax": LCM.against("softmax_lcm", "softmax"),
    "disperses_trained": LCM.against("linear", "softmax", metric="entropy", shown=["linear_lcm", "softmax_lcm"]),
    "lcm_gathers": LCM.against("linear_lcm", "linear", metric="nearness", shown=["softmax"]),
    "windows_needed": TURNS.against("l2vit", "global", shown=["softmax"]),
    "global_needed": TURNS.against("l2vit", "windows"),
    "against_swin": TURNS.against("l2vit", "swin"),
    "segments_better_than_resnet": MOSAICS.against("l2vit", "resnet"),
}


@measures("views")
def views(run: Run) -> Measurement:
    """On 21×21 tokens: from which of them a gradient reaches the middle one, through one layer."""
    torch.manual_seed(0)
    layer = LinearGlobalAttention(64, 2).double()
    linear = seen_by(lambda x: layer(x.flatten(2).mT).mT.unflatten(2, x.shape[2:]))
    window = seen_by(WindowAttention(64, 2, 7).double())
    own = torch.zeros_like(window)
    own[7:14, 7:14] = True
    return Measurement.holds(
        bool(linear.all()) and bool((window == own).all()),
        f"Of {own.numel()} tokens {int(linear.sum())} reach the middle one by linear attention, {int(window.sum())} by "
        "window attention.",
    )


@measures("disperses_fresh")
async def disperses_fresh(run: Run) -> Measurement:
    rows = await run.trials("concentration of equal queries and keys", fresh_concentration, tokens=196, head_width=32)
    columns = ["attention", "entropy / log N", "weight of the top tenth"]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    table = [[n, mean[f"row_entropy {n}"], mean[f"top_share {n}"]] for n in ("linear", "softmax")]
    return Measurement.paired(
        [row["row_entropy linear"] for row in rows],
        [row["row_entropy softmax"] for row in rows],
        seeds=run.seeds,
        sides=("linear", "softmax"),
        unit="entropy of a row, over log N",
        setting={"queries and keys": "standard normal", "tokens": 196, "head width": 32},
        tables=[Table(caption="Concentration of maps of equal queries and keys", columns=columns, rows=table)],
    )


@measures("printed_flops")
def printed_flops(run: Run) -> Measurement:
    rows: list[list[str | float | int | None]] = []
    builds = {"Tiny": presets.l2vit_tiny, "Small": presets.l2vit_small, "Base": presets.l2vit_base}
    for name, build in builds.items():
        network = on_meta(build)
        with_norms = printed_operations(network, 224)
        rows.append([name, multiply_adds(network, 224) / 1e9, with_norms / 1e9])
    columns = ["network", "multiply-adds of products", "as the authors' tool counts"]
    table = Table(caption="Operations at 224², in 10^9", columns=columns, rows=rows)
    note = "Their tool adds two for each element of a norm, one for each of an activation and one for each bias."
    value = of_kind(rows[-1][-1], float, "operations")
    return Measurement.exact(value, unit="GFLOPs", note=note, tables=[table])


@measures("floor_by_size")
async def floor_by_size(run: Run) -> Measurement:
    sides = (224,) if run.smoke else (224, 384)
    shares = {side: await run.trials(f"floor at {side}", partial(floored_shares, side=side)) for side in sides}
    rows: list[list[str | float | int | None]] = [
        [side, *(sum(row[stage] for row in rows_of) / len(rows_of) for stage in range(4))]
        for side, rows_of in shares.items()
    ]
    columns = ["pixels a side", *(f"stage {stage}" for stage in range(1, 5))]
    return Measurement.paired(
        [row[3] for row in shares[224]],
        [row[1] for row in shares[224]],
        seeds=run.seeds,
        sides=("stage 4", "stage 2"),
        unit="share of queries below the floor",
        setting={"network": "L2ViT-T, fresh", "images": "noise", "side": 224},
        tables=[Table(caption="Share of queries whose row sums lie below 100", columns=columns, rows=rows)],
    )
