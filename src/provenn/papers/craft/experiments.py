"""What CRAFT's authors say, and what building it brought to light, as measurements."""

from dataclasses import replace
from functools import partial

import torch

from provenn.core.cost import count_parameters
from provenn.evidence import Drawing, Measurement, Run, Study, Timing, measures
from provenn.papers.craft.layers import HFERB, SRWAB, RectangleWindowAttention
from provenn.papers.craft.model import craft_x4
from provenn.papers.craft.rivals import rfdn, swinir
from provenn.papers.craft.studies import (
    DIM,
    HEADS,
    INPUT,
    PRESETS,
    SCALE,
    attention,
    band_error,
    convolutions,
    draw,
    drop,
    full,
    gain,
    on_maps,
    parameters,
    photographs,
    randomise_weights,
    reach,
    sharpness,
    small_network,
    swinir_light,
    whole_network,
    without_fusion,
    without_hferb,
    without_srwab,
)
from provenn.training import Recipe

NETWORKS = Study(
    "small networks",
    "super-resolution",
    data=photographs,
    variants={
        "craft": ("CRAFT", full),
        "conv": ("convolutions only", convolutions),
        "attention": ("attention only", attention),
        "short": ("attention only, 4×4 windows", partial(attention, side=4)),
        "no_hferb": ("without HFERB", without_hferb),
        "no_srwab": ("without SRWAB", without_srwab),
        "sum": ("sum in place of HFB", without_fusion),
    },
    build=small_network,
    # Unclipped, some seeds stay on a plateau half a decibel lower.
    recipe=Recipe(epochs=10, batch_size=2, optimizer="adam", betas=(0.9, 0.99), schedule="onecycle", clip=0.1),
    lrs=(6e-4, 2e-3, 6e-3, 2e-2),
    probes={
        "gain": gain,
        "high_band": partial(band_error, high=True),
        "low_band": partial(band_error, high=False),
        "drop": drop,
        "sharpness": sharpness,
    },
    about="five photographs to train on, pieces of three others to test, reduced to half their size",
    columns={"parameters": lambda block: count_parameters(small_network(block))},
    setting={"scale": SCALE, "channels": DIM, "heads": HEADS, "blocks": 2, "input": INPUT, "output": "over bicubic"},
    note="Every network adds bicubic interpolation to its output, which the published one does not.",
    drawing=Drawing("craft", "after", "A piece of a test photograph: input, bicubic, CRAFT, original.", draw),
)

RIVALS = Study(
    "whole networks",
    "super-resolution",
    data=photographs,
    variants={
        "craft": ("CRAFT", partial(small_network, full)),
        "swinir": ("SwinIR-light", partial(swinir, SCALE, dim=20, heads=2, groups=2, depth=2)),
        "rfdn": ("RFDN", partial(rfdn, SCALE, channels=13)),
    },
    build=whole_network,
    recipe=replace(NETWORKS.recipe, epochs=60),
    lrs=(6e-4, 2e-3, 6e-3),
    about="five photographs to train on, pieces of three others to test, reduced to half their size",
    columns={"parameters": lambda part: count_parameters(part())},
    setting={
        "scale": SCALE,
        "CRAFT": {"channels": DIM, "heads": HEADS, "blocks": 2},
        "SwinIR-light": {"channels": 20, "heads": 2, "blocks": 4},
        "RFDN": {"channels": 13, "blocks": 4},
        "input": INPUT,
        "output": "over bicubic",
    },
    note="Every network adds bicubic interpolation to its output, which the published ones do not.",
)

SIZES = Timing(
    "parameters",
    {"CRAFT": parameters(lambda scale: PRESETS[scale]()), "SwinIR-light": parameters(swinir_light)},
    sizes=(2, 3, 4),
    quantity="count",
    unit="scale",
    of="parameters",
    note="SwinIR prints 878K, 886K and 897K: without its tables of position biases, which are learnt too.",
)
WORK = Timing(
    "operations",
    {"CRAFT ×4": on_maps(craft_x4, [3]), "SRWAB": on_maps(partial(SRWAB, 48), [48])},
    sizes=(32**2, 64**2, 128**2),
    quantity="flops",
    unit="pixels",
)
REACH = Timing(
    "reach of one pixel",
    {
        "SRWAB": lambda side, device: partial(reach, SRWAB(DIM, HEADS), side),
        "HFERB": lambda side, device: partial(reach, HFERB(DIM), side),
    },
    sizes=(32,),
    quantity="count",
    unit="pixels a side",
    of="positions",
)

EXPERIMENTS = {
    "attention_restores": NETWORKS.figure("attention", metric="gain"),
    "long_range": NETWORKS.against("attention", "short"),
    "high_frequency_prior": NETWORKS.against("craft", "no_hferb"),
    "transformers_miss_high_band": NETWORKS.against("attention", "conv", metric="high_band"),
    "transformers_keep_low_band": NETWORKS.against("attention", "conv", metric="low_band"),
    "transformers_rely_less_on_high_frequencies": NETWORKS.against("attention", "conv", metric="drop"),
    "beats_convolution": NETWORKS.against("craft", "conv", shown=NETWORKS.variants, picture=True),
    "beats_attention": NETWORKS.against("craft", "attention"),
    "better_high_band": NETWORKS.against("craft", "attention", metric="high_band", shown=NETWORKS.variants),
    "better_low_band": NETWORKS.against("craft", "conv", metric="low_band", shown=NETWORKS.variants),
    "over_rivals": RIVALS.against("craft", ("swinir", "rfdn")),
    "window_reach": REACH.against("SRWAB", "HFERB"),
    "sharper_branch": NETWORKS.figure("craft", metric="sharpness"),
    "prior_in_high_band": NETWORKS.against("craft", "no_hferb", metric="high_band"),
    "global_branch": NETWORKS.against("craft", "no_srwab"),
    "fusion": NETWORKS.against("craft", "sum"),
    "fewer_parameters": SIZES.against("CRAFT", "SwinIR-light", at=4),
    "linear_work": WORK.grows("CRAFT ×4"),
}


@measures("parameters_x4")
def parameters_x4(run: Run) -> Measurement:
    return Measurement.exact(count_parameters(craft_x4()), unit="parameters")


@measures("position_bias_is_dead")
def position_bias_is_dead(run: Run) -> Measurement:
    """The largest spread of a bias over its offsets, at the published width and at repaired ones."""
    spread = {}
    for width in (None, 2, 8):
        biases = [randomise_weights(b)() for b in RectangleWindowAttention(48, position_dim=width).bias]
        spread[width] = max(b.flatten(1).std(dim=1).max().item() for b in biases)
    words = ", ".join(f"{s:.2g} at width {w or '1 (published)'}" for w, s in spread.items())
    return Measurement.holds(
        spread[None] == 0.0 and min(spread[2], spread[8]) > 1e-3, f"Largest spread over offsets: {words}."
    )


@measures("windows_wrap_around")
def windows_wrap_around(run: Run) -> Measurement:
    """Does the far corner of a map move with its first pixel?"""
    x = torch.randn(1, 48, 32, 32, generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    moved[..., 0, 0] *= -1
    far = {}
    for wrap in (True, False):
        block = randomise_weights(SRWAB(48, shifted=True, wrap=wrap))
        with torch.no_grad():
            far[wrap] = (block(moved) - block(x))[..., 24:, :].abs().max().item()
    words = f"The last rows move by {far[True]:.2g} with the first pixel, and by {far[False]:.2g} under a mask."
    return Measurement.holds(far[True] > 1e-3 > 10 * far[False], words)
