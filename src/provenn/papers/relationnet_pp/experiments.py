"""What RelationNet++'s authors say, and what building it brought to light, as measurements."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from provenn.core.cost import count_parameters
from provenn.evidence import Drawing, Measurement, Run, Study, Timing, measures
from provenn.nn.detection import ATSS, FCOS, FasterRCNN, RetinaNet
from provenn.nn.resnet import BasicBlock, ResNet, resnet50
from provenn.papers.relationnet_pp.bridge import attach_bvr
from provenn.papers.relationnet_pp.layers import DirectGeometry, SharedGeometry
from provenn.papers.relationnet_pp.model import bvr_retinanet_r50
from provenn.papers.relationnet_pp.rivals import JOINS, count_joined, joined_detector, megamacs_joined
from provenn.papers.relationnet_pp.studies import (
    LARGE_BRIDGE,
    LARGE_STRIDE,
    STRIDE,
    at_75,
    attention,
    count,
    count_host,
    count_large,
    detector,
    draw_found,
    fit_watched,
    geometry,
    gigamacs_of_attention,
    gigamacs_of_points,
    host,
    large_detector,
    large_rectangles,
    map_errors,
    megamacs_large,
    rectangles,
)
from provenn.training import Recipe

CORNERS = ("top_left", "bottom_right")
UNUSED = {"classification": (), "regression": ()}

# Frozen before a record was made: one recipe and three rates for every variant, settled on seeds that are never
# measured.
RECIPE = Recipe(epochs=5, batch_size=8, optimizer="adamw", weight_decay=1e-2, schedule="onecycle", clip=5.0)
PARTS = Study(
    "parts on texture rectangles",
    "object-detection",
    data=rectangles,
    build=detector,
    variants={
        "bvr": ("BVR", {"bridge": {}}),
        "appearance": ("appearance alone", {"bridge": {"geometry": None}}),
        "geometry": ("geometry alone", {"bridge": {"appearance": False}}),
        "swapped": ("keys exchanged", {"bridge": {"classification": CORNERS, "regression": ("centre",)}}),
    },
    recipe=RECIPE,
    lrs=(5e-3, 1e-2, 2e-2),
    probes={"AP75": at_75},
    about="rectangles of brick and grass on gravel, 64×64 pixels",
    columns={"parameters": count},
    setting={"host": f"FCOS of 32 channels and one level of stride {STRIDE}"},
    note="Synthetic scenes; detectors of 77 to 83 thousand parameters, 750 steps.",
)

# The deciding size: larger scenes, in which a prediction sees 63 pixels and objects have up to 80. The wider detector
# has as many parameters as that with BVR, and more operations.
LARGE = Study(
    "large texture rectangles",
    "object-detection",
    data=large_rectangles,
    build=large_detector,
    variants={
        "bvr": ("BVR", {"bridge": {}}),
        "unused": ("points unused", {"bridge": UNUSED}),
        "plain": ("plain", {}),
        "wide": ("wider plain", {"widths": (20, 40, 72)}),
        "dense": ("dense attention", {"attention": True}),
        "one_key": ("one key", {"bridge": {"keys": 1, "keys_a_level": 1}}),
        "swapped": ("keys exchanged", {"bridge": {"classification": CORNERS, "regression": ("centre",)}}),
    },
    recipe=RECIPE,
    lrs=(3e-3, 1e-2, 3e-2),
    probes={"AP75": at_75},
    trained=fit_watched,
    about="rectangles of brick and grass on gravel, 128×128 pixels",
    columns={"parameters": count_large, "MMACs": megamacs_large},
    setting={"host": f"FCOS of 48 channels and one level of stride {LARGE_STRIDE}", "K": LARGE_BRIDGE["keys"]},
    note="Synthetic scenes; detectors of 87 to 185 thousand parameters, 800 steps of 8 scenes.",
    drawing=Drawing("bvr", "found", "Test scenes, what is in them (dashed), and what FCOS with BVR finds.", draw_found),
)

JOIN_LABELS = dict(zip(JOINS, ("nearest key added", "maps concatenated", "mean of the keys added"), strict=True))
JOINED = replace(
    LARGE,
    name="points joined without attention",
    build=joined_detector,
    variants={
        "bvr": LARGE.variants["bvr"],
        "unused": LARGE.variants["unused"],
        **{how: (label, {"join": how}) for how, label in JOIN_LABELS.items()},
    },
    columns={"parameters": count_joined, "MMACs": megamacs_joined},
    note="Synthetic scenes; joins of 183 thousand parameters beside BVR's 185, 800 steps of 8 scenes.",
    drawing=None,
)

# Against points that nothing reads, as above: what a plain detector lacks besides is the point head's losses.
HOSTS = Study(
    "other detectors on texture rectangles",
    "object-detection",
    data=rectangles,
    build=host,
    variants={
        f"{name}{variant}": (f"{label}{beside}", {"host": name, "bridge": options})
        for name, label in (("retinanet", "RetinaNet"), ("atss", "ATSS"), ("faster_rcnn", "Faster R-CNN"))
        for variant, beside, options in (("", " with BVR", {}), ("_unused", ", points unused", UNUSED))
    },
    recipe=RECIPE,
    lrs=(2.5e-3, 5e-3, 1e-2, 2e-2),
    probes={"AP75": at_75},
    about="rectangles of brick and grass on gravel, 64×64 pixels",
    columns={"parameters": count_host},
    setting={"hosts": f"32 channels and one level of stride {STRIDE}"},
    note="Synthetic scenes; detectors of 68 to 185 thousand parameters, 750 steps.",
)

GEOMETRIES = {
    "shared map": geometry(partial(SharedGeometry, 8, 512, 512)),
    "direct": geometry(partial(DirectGeometry, 8, 512, 512)),
    "shared map as released": geometry(partial(SharedGeometry, 8)),
    "direct as released": geometry(partial(DirectGeometry, 8)),
}
SETTING = {"keys": 50, "heads": 8, "d0 = d1": 512, "map": "401×401", "as released": "d0 = 256, one layer"}
FLOPS = Timing("operations of the geometry", GEOMETRIES, (32, 64, 128), "flops", unit="cells a side", setting=SETTING)
MEMORY = Timing("bytes of the geometry", GEOMETRIES, (32, 64, 128), "memory", unit="cells a side", setting=SETTING)
KEYS = Timing(
    "operations with keys sampled",
    {"50 keys": attention(50), "every cell a key": attention(None)},
    (16, 32, 64, 128),
    "flops",
    unit="cells a side",
    setting={"channels": 256, "heads": 8, "geometry": "shared map as released"},
)

EXPERIMENTS = {
    "geometry_flops": FLOPS.against("shared map", "direct"),
    "geometry_memory": MEMORY.against("shared map", "direct"),
    "sampled_keys": KEYS.against("50 keys", "every cell a key"),
    "bvr_gain": LARGE.against("bvr", "unused", picture=True, shown=["plain", "wide"]),
    "bvr_75": LARGE.against("bvr", "unused", metric="AP75"),
    "over_plain": LARGE.against("bvr", "plain"),
    "over_plain_75": LARGE.against("bvr", "plain", metric="AP75"),
    "wider": LARGE.against("bvr", "wide"),
    "wider_75": LARGE.against("bvr", "wide", metric="AP75"),
    "points_alone": LARGE.against("unused", "plain"),
    "over_dense": LARGE.against("bvr", "dense"),
    "more_keys": LARGE.against("bvr", "one_key"),
    "each_its_own_large": LARGE.against("bvr", "swapped"),
    "each_its_own": PARTS.against("bvr", "swapped"),
    "geometry_counts": PARTS.against("bvr", "appearance"),
    "appearance_counts": PARTS.against("bvr", "geometry"),
    "retinanet_gain": HOSTS.against("retinanet", "retinanet_unused"),
    "atss_gain": HOSTS.against("atss", "atss_unused"),
    "faster_rcnn_gain": HOSTS.against("faster_rcnn", "faster_rcnn_unused"),
}


@measures("joined_without_attention")
async def joined_without_attention(run: Run) -> Measurement:
    """The best of the joins, seed by seed, against halfway from points that nothing reads to BVR."""
    reached, facts = await JOINED.measure(run, [*JOINS, "bvr", "unused"])
    best = [max(joined) for joined in zip(*(reached[how] for how in JOINS), strict=True)]
    halfway = [(bvr + unused) / 2 for bvr, unused in zip(reached["bvr"], reached["unused"], strict=True)]
    sides = f"best of {', '.join(JOIN_LABELS.values())}", "halfway from points unused to BVR"
    return Measurement.paired(best, halfway, sides=sides, **facts)


@measures("parameters_release")
def parameters_release(run: Run) -> Measurement:
    with torch.device("meta"):
        model = bvr_retinanet_r50()
    points = count_parameters(model.head.bridge.point_head)
    return Measurement.exact(
        count_parameters(model), unit="parameters", note=f"{points:,} of them are the point head's."
    )


@measures("parameters_printed")
def parameters_printed(run: Run) -> Measurement:
    with torch.device("meta"):
        model = attach_bvr(RetinaNet(resnet50(num_classes=0)), point_head="paper")
    bridge = model.head.bridge
    added = count_parameters(bridge.point_head), count_parameters(bridge) - count_parameters(bridge.point_head)
    return Measurement.exact(
        count_parameters(model) / 1e6,
        unit="million parameters",
        note=f"The point head as the text has it adds {added[0] / 1e6:.2f}, the attentions {added[1] / 1e6:.2f}.",
    )


@measures("points_flops")
def points_flops(run: Run) -> Measurement:
    return Measurement.exact(
        gigamacs_of_points("paper"),
        unit="GMAC",
        note=f"At 800×1280 pixels. The released point head takes {gigamacs_of_points('release'):.1f}.",
    )


@measures("printed_flops")
def printed_flops(run: Run) -> Measurement:
    points, rest = gigamacs_of_points("paper"), gigamacs_of_attention()
    return Measurement.exact(
        points + rest,
        unit="GMAC",
        note=f"Point head {points:.1f}; three attentions to 50 keys and two maps as released {rest:.1f}.",
    )


@measures("in_place")
def in_place(run: Run) -> Measurement:
    """Whether each of four detectors says the same to the bit once BVR is in it with output layers of zeros."""

    def backbone() -> ResNet:
        return ResNet(BasicBlock, (1, 1, 1), widths=(8, 12, 16), num_classes=0)

    detectors: dict[str, Callable[[], Any]] = {
        "RetinaNet": lambda: RetinaNet(backbone(), num_classes=3, dim=16, convs=1, coarser=1),
        "FCOS": lambda: FCOS(backbone(), num_classes=3, dim=16, convs=1, groups=4, coarser=1),
        "ATSS": lambda: ATSS(backbone(), num_classes=3, dim=16, convs=1, groups=4, coarser=1),
        "Faster R-CNN": lambda: FasterRCNN(backbone(), num_classes=3, dim=16, width=32, regions=20),
    }
    same = []
    for build in detectors.values():
        torch.manual_seed(0)
        model = build().eval()
        images = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            before = model(images)
            after = attach_bvr(model, preserve=True)(images)
        boxes = "offsets" if hasattr(before, "offsets") else "deltas"
        same.append(all(torch.equal(getattr(before, name), getattr(after, name)) for name in ("logits", boxes)))
    return Measurement.exact(sum(same), unit="of 4 detectors")


@measures("map_exact")
def map_exact(run: Run) -> Measurement:
    middle, anywhere = map_errors(align_corners=False)
    aligned = map_errors(align_corners=True)[1]
    scale = 0.01 * 128**0.5  # the deviation of f at fresh weights: 128 pairs of sine and cosine
    return Measurement.holds(
        middle < 1e-4 * scale and anywhere > 1e-2 * scale and aligned < 1e-3 * scale,
        f"Error in deviations of f: {middle / scale:.1g} at 0, up to {anywhere / scale:.2f} elsewhere as released, "
        f"up to {aligned / scale:.1g} with aligned corners.",
    )


@measures("gate")
def gate(run: Run) -> Measurement:
    shares = []
    for seed in range(5):
        torch.manual_seed(seed)
        with torch.no_grad():
            shares.append((SharedGeometry(8).prepare() <= 1e-6).float().mean().item())
    return Measurement.holds(
        min(shares) > 0.25, f"Of five draws {', '.join(f'{share:.0%}' for share in shares)} of the map."
    )
