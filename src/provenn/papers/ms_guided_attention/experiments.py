"""What the abstract says, and what its tables say beside it, as measurements."""

from functools import partial
from typing import Any

import torch

from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.papers.ms_guided_attention.layers import PositionAttention
from provenn.papers.ms_guided_attention.model import DeepAttentiveFeatures, GuidedAttentionNet
from provenn.papers.ms_guided_attention.printed import ABLATION, BRATS, CHAOS, HVSMR, STEPS
from provenn.papers.ms_guided_attention.rivals import DualAttention, UNet
from provenn.papers.ms_guided_attention.studies import (
    JUDGING,
    MARKED,
    PROBES,
    VARIANTS,
    marked,
    network,
    subjects,
    twin_confusion,
)
from provenn.training import Recipe

RECIPE = Recipe(epochs=4, batch_size=2, optimizer="adam", betas=(0.9, 0.99), schedule="onecycle")
RATES = (1e-3, 3e-3, 1e-2)
BRAINS = Study(
    "brains",
    JUDGING,
    data=subjects,
    variants=VARIANTS,
    build=network,
    recipe=RECIPE,
    lrs=RATES,
    probes=PROBES,
    about=(
        "16 drawn subjects to train on, 4 to validate, 64 to test, 18 slices of 64×64 pixels each. All are one brain "
        "template, moved, lit and grained anew"
    ),
    columns={"parameters": lambda part: count_parameters(network(part))},
    note="The networks with attention predict at half the resolution of a slice, U-Nets at the whole.",
)
MARKERS = Study(
    "far markers",
    "volume-segmentation",
    data=marked,
    variants=MARKED,
    build=network,
    recipe=RECIPE,
    lrs=RATES,
    probes={"twin confusion": twin_confusion},
    about="brain slices with a disc that a cross or a ring names, 30 pixels away or more; mirrored and turned",
    columns={"parameters": lambda part: count_parameters(network(part))},
)
RIVALS = ("unet", "attention unet", "danet")
GUESS = "a network that sees no marker can only guess the twins"

EXPERIMENTS = {
    "unet_loses_little": BRAINS.figure("unet", metric="lost by prediction"),
    "unet_loses_less": BRAINS.against("unet", "guided", metric="lost by prediction"),
    "marker_over_unet": MARKERS.against("two steps", "deep unet", metric="twin confusion", may_guess=GUESS),
    "marker_over_dilated": MARKERS.against("two steps", "dilated", metric="twin confusion", may_guess=GUESS),
    "attention_over_dilated": BRAINS.against("two steps", "dilated", shown=("scales",)),
    "position_alone": BRAINS.against("position", "scales"),
    "channel_alone": BRAINS.against("channel", "scales"),
    "losses_help": BRAINS.against("guided", "semantic"),
    "losses_focus": BRAINS.against("guided", "semantic", metric="own class"),
    "first_step": BRAINS.against("one step", "scales"),
    "second_step": BRAINS.against("two steps", "one step"),
    "semantic_rung": BRAINS.against("semantic", "two steps"),
    "guidance_more": BRAINS.against("guided", "two steps"),
    "supervision_more": BRAINS.against("guided", "single"),
    "over_the_best": BRAINS.against("guided", RIVALS),
    "over_the_best_surface": BRAINS.against("guided", RIVALS, metric="surface distance"),
    "smaller_spread": BRAINS.against("guided", "unet", metric="deviation of Dice", ratio=True),
}


def position_call(fused: bool, tokens: int, device: str) -> Any:
    """Position attention on a square map of so many positions and 64 channels, forward."""
    side = round(tokens**0.5)
    layer = PositionAttention(64, fused=fused).to(device).eval()
    x = torch.randn(1, 64, side, side, device=device)

    @torch.no_grad()
    def call() -> torch.Tensor:
        return layer(x)

    return call


MEMORY = Timing(
    "memory of position attention, forward",
    {"explicit": partial(position_call, False), "fused": partial(position_call, True)},
    sizes=(1024, 4096, 16_384),
    quantity="memory",
    unit="positions",
    setting={"channels": 64},
)
EXPERIMENTS["explicit_memory"] = MEMORY.grows("explicit")
EXPERIMENTS["fused_memory"] = MEMORY.against("fused", "explicit", at=4096)


def network_call(guided: bool, side: int, device: str) -> Any:
    """The paper's network on an image of so many pixels a side, forward; counted without numbers."""
    with torch.device("meta"):
        model, x = GuidedAttentionNet(guided=guided).eval(), torch.zeros(1, 1, side, side)

    @torch.no_grad()
    def call() -> torch.Tensor:
        return model(x)

    return call


OPERATIONS = Timing(
    "operations of a forward pass",
    {"guided": partial(network_call, True), "without guidance": partial(network_call, False)},
    sizes=(64, 128, 256),
    quantity="flops",
    unit="pixels a side",
)
EXPERIMENTS["semantic_share"] = OPERATIONS.against("without guidance", "guided")


@measures("parameters")
def parameters(run: Run) -> Measurement:
    """Built from the brief description of Table VIII: whether each count is met."""
    printed: dict[str, tuple[Any, dict[str, Any], int]] = {
        "U-Net": (UNet, {}, 31_030_853),
        "Attention U-Net": (UNet, {"gated": True}, 34_877_681),
        # Table VIII has 68,475,961, a classifier of 2048 × 1000 weights and 1000 biases that nothing uses included.
        "DANet": (DualAttention, {}, 68_475_961 - 2_049_000),
        "DAF": (DeepAttentiveFeatures, {}, 43_482_179),
        "no guidance, 1 step": (GuidedAttentionNet, {"guided": False, "steps": 1}, 43_485_831),
        "no guidance, 2 steps": (GuidedAttentionNet, {"guided": False}, 44_411_103),
        "no guidance, 3 steps": (GuidedAttentionNet, {"guided": False, "steps": 3}, 45_337_675),
        "no guidance, 5 steps": (GuidedAttentionNet, {"guided": False, "steps": 5}, 47_190_819),
        "guided, 2 steps": (GuidedAttentionNet, {}, 58_499_679),
        "guided, 3 steps": (GuidedAttentionNet, {"steps": 3}, 66_470_539),
        "guided, 5 steps": (GuidedAttentionNet, {"steps": 5}, 82_412_259),
    }
    rows: list[list[Any]] = []
    with torch.device("meta"):
        for name, (kind, options, count) in printed.items():
            rows.append([name, count_parameters(kind(**options)), count])
    table = Table(caption="Parameters", columns=["network", "counted", "Table VIII"], rows=rows)
    return Measurement.holds(all(row[1] == row[2] for row in rows), tables=[table])


@measures("printed_guidance")
def printed_guidance(run: Run) -> Measurement:
    """In how many of the paper's four rows guidance gains at least as much as deep supervision does."""
    rows: list[list[Any]] = []
    printed = (ABLATION[name] for name in ("no guidance", "guided", "guided, no deep supervision"))
    for steps, plain, whole, single in zip(STEPS, *printed, strict=True):
        rows.append([steps, round(whole.dice - plain.dice, 2), round(whole.dice - single.dice, 2)])
    columns = ["steps", "guidance gains", "deep supervision gains"]
    more = sum(row[1] >= row[2] for row in rows)
    table = Table(caption="Dice on CHAOS, points, from Table II", columns=columns, rows=rows)
    return Measurement.exact(more, unit="rows of four", at_paper_setting=True, tables=[table])


# Other networks than the paper's own.
OTHERS = ("U-Net", "DANet", "PAN, ResNet-34", "PAN, ResNet-101", "Attention U-Net", "DAF")


@measures("printed_spread")
def printed_spread(run: Run) -> Measurement:
    """In how many of the paper's three data sets the printed deviation of Dice is the smallest of its table."""
    rows: list[list[Any]] = []
    for name, table in {"CHAOS": CHAOS, "HVSMR": HVSMR, "BRATS": BRATS}.items():
        others = [(row.dice_std, whose) for whose, row in table.items() if whose in OTHERS and row.dice_std is not None]
        rows.append([name, table["guided"].dice_std, *min(others)])
    smallest = sum(row[1] < row[2] for row in rows)
    columns = ["data", "guided", "smallest of the others", "whose"]
    shown = Table(caption="Deviation of Dice over subjects, points, as printed", columns=columns, rows=rows)
    return Measurement.exact(smallest, unit="sets of three", at_paper_setting=True, tables=[shown])
