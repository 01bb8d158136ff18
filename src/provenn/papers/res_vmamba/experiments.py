"""What Res-VMamba's authors say, and what building it brought to light, as measurements."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.papers.res_vmamba import model as presets
from provenn.papers.res_vmamba.rivals import (
    WIDER,
    WITH_BILINEAR,
    WITH_BOTH,
    WITH_PARTS,
    WITH_SE,
    BilinearHead,
    PartsHead,
    convnext,
    fine_grained,
    squeeze_excite,
    swin,
)
from provenn.papers.res_vmamba.studies import (
    LAYERS,
    MAP,
    PatchTransformer,
    built,
    changed_predictions,
    convolutional,
    copy_data,
    mamba_model,
    on_maps,
    operations,
    texture_data,
    transformer,
    vmamba,
)
from provenn.training import Recipe

TEXTURES = Study(
    "zoomed textures",
    "image-classification",
    data=texture_data,
    variants={
        "none": ("VMamba", vmamba("none")),
        "stage": ("residual from each stage", vmamba("stage")),
        "stem": ("residual from the stem", vmamba("stem")),
        "random": ("residual as released", vmamba("official_random")),
        "wide": ("wider VMamba", vmamba("none", (16, 33, 66, 130))),
        "cnn": ("ResNet", convolutional),
        "vit": ("ViT", PatchTransformer),
    },
    build=built,
    recipe=Recipe(
        epochs=8,
        batch_size=50,
        optimizer="adamw",
        weight_decay=0.05,
        decay_vectors=False,
        schedule="onecycle",
        clip=5.0,
    ),
    lrs=(2e-3, 6e-3, 1.8e-2),
    probes={"changed": changed_predictions},
    about="squares of 32 pixels from scikit-image's photographs of four textures at four zooms: 16 classes",
    columns={"parameters": lambda build: count_parameters(build(num_classes=16, in_channels=1))},
    setting={"host": "VMamba of one block a stage, widths 16 to 128, 4 states"},
    note="Training and test squares come from other columns of the photographs. All learn for 512 steps. On the tuning "
    "seed plain VMamba has 0.42 of the validation images right after 512 steps, and 0.41 after 1,024.",
)

ADDITIONS = replace(
    TEXTURES,
    name="what is added to a ResNet",
    variants={
        "plain": ("ResNet, wider", fine_grained(WIDER)),
        "se": ("with squeeze-excite", fine_grained(WITH_SE, gate=squeeze_excite)),
        "bilinear": ("with bilinear pooling", fine_grained(WITH_BILINEAR, head=BilinearHead)),
        "parts": ("with attention to parts", fine_grained(WITH_PARTS, head=PartsHead)),
    },
    probes={},
    setting={"host": "ResNet of one block a stage"},
    note="All have 245 thousand parameters, to two percent, and learn for 512 steps.",
)
BEST_OF_OTHERS = replace(
    ADDITIONS,
    name="VMamba beside the best of others",
    variants={
        "none": ("VMamba", vmamba("none")),
        "convnext": ("ConvNeXt", convnext),
        "swin": ("Swin", swin),
        "resnet": (
            "ResNet with squeeze-excite and bilinear pooling",
            fine_grained(WITH_BOTH, head=BilinearHead, gate=squeeze_excite),
        ),
    },
    setting={"hosts": "VMamba of one block a stage; ConvNeXt and Swin of two in three stages, patches of 2 pixels"},
    note="All have 232 thousand parameters, to two percent, and learn for 512 steps. On a CPU a step of ConvNeXt or "
    "Swin takes about as long as VMamba's, one of the ResNet a quarter of that.",
)

COPYING = Study(
    "selective copying",
    "recall",
    data=copy_data,
    variants={
        "mamba": ("Mamba", partial(mamba_model, True)),
        "fixed": ("the same without selection", partial(mamba_model, False)),
        "attention": ("Transformer", transformer),
    },
    build=built,
    recipe=Recipe(epochs=3, batch_size=64, optimizer="adamw", schedule="cosine", warmup_steps=50, clip=1.0),
    lrs=(2e-3, 5e-3, 1e-2),
    about="4 of 8 symbols scattered among 16 tokens of blanks, to be predicted in their order at the end",
    columns={"parameters": lambda build: count_parameters(build(vocab=10))},
    setting={"host": "width 32: two layers of Mamba, or two of attention with SwiGLU"},
)

OPERATIONS = Timing(
    "operations of a layer on a map",
    {label: on_maps(make, MAP) for label, make in LAYERS.items()},
    sizes=(14, 28, 56, 112),
    quantity="flops",
    unit="pixels a side",
    setting={"channels": MAP},
)
MEMORY = Timing(
    "memory of a training step of a layer",
    {label: on_maps(make, MAP, training=True) for label, make in LAYERS.items()},
    sizes=(40, 56, 80, 112),
    quantity="memory",
    unit="pixels a side",
    setting={"channels": MAP},
)
TIME = Timing(
    "time of a layer on a map",
    {label: on_maps(LAYERS[label], MAP) for label in ("selective scan", "attention")},
    sizes=(28, 56, 112),
    unit="pixels a side",
    rounds=7,
    setting={"channels": MAP},
    note="The scan is PyTorch's operations on a processor; the authors' is one kernel on a GPU.",
)

EXPERIMENTS = {
    "residual_gain": TEXTURES.against("stage", "none"),
    "residual_is_no_loss": TEXTURES.against("stage", "none"),
    "residual_against_width": TEXTURES.against("stage", "wide"),
    "stem_gain": TEXTURES.against("stem", "none"),
    "released_gain": TEXTURES.against("random", "none", shown=["stage"]),
    "released_harm": TEXTURES.against("stage", "random", shown=["none"]),
    "released_answers": TEXTURES.figure("random", metric="changed", shown=["stage"]),
    "against_cnn": TEXTURES.against("none", "cnn"),
    "against_vit": TEXTURES.against("none", "vit"),
    "residual_against_others": TEXTURES.against("stage", "cnn", shown=["vit"]),
    "additions": ADDITIONS.against("plain", ("se", "bilinear", "parts")),
    "best_of_others": BEST_OF_OTHERS.against("none", ("convnext", "swin", "resnet")),
    "copying_selects": COPYING.against("mamba", "fixed", may_guess="a layer that cannot choose keeps blanks as well"),
    "copying_attention": COPYING.against("mamba", "attention"),
    "scan_grows": OPERATIONS.grows("selective scan"),
    "attention_grows": OPERATIONS.grows("attention"),
    "convolution_grows": OPERATIONS.grows("convolution"),
    "scan_memory": MEMORY.grows("selective scan"),
    "scan_time": TIME.against("selective scan", "attention"),
}


PLAIN = {"tiny": presets.vmamba_tiny, "small": presets.vmamba_small, "base": presets.vmamba_base}
RESIDUAL = {"tiny": presets.res_vmamba_tiny, "small": presets.res_vmamba_small, "base": presets.res_vmamba_base}


def on_meta(build: Callable[..., presets.ResVMamba], **options: object) -> presets.ResVMamba:
    """A preset without its weights."""
    with torch.device("meta"):
        return build(**options)


@measures("released_parameters")
def released_parameters(run: Run) -> Measurement:
    released = on_meta(presets.res_vmamba_small, source="official_random", num_classes=1000)
    plain = on_meta(presets.vmamba_small, num_classes=1000)
    return Measurement.exact(count_parameters(released) - count_parameters(plain), unit="parameters")


@measures("added_parameters")
def added_parameters(run: Run) -> Measurement:
    rows: list[list[str | float | int | None]] = []
    added = {}
    for size in ("tiny", "small", "base"):
        plain = count_parameters(on_meta(PLAIN[size], num_classes=presets.CNFOOD))
        added[size] = count_parameters(on_meta(RESIDUAL[size])) - plain
        rows.append([f"VMamba-{size[0].upper()}", plain, added[size], 100 * added[size] / plain])
    return Measurement.exact(
        added["small"],
        unit="parameters",
        tables=[
            Table(
                caption="The residual convolutions, 241 classes",
                columns=["network", "parameters", "added", "% added"],
                rows=rows,
            )
        ],
    )


@measures("flops")
def flops(run: Run) -> Measurement:
    rows: list[list[str | float | int | None]] = []
    total = {}
    for size in ("tiny", "small", "base"):
        total[size], ours = (operations(on_meta(kind[size]), 224) / 1e9 for kind in (PLAIN, RESIDUAL))
        rows.append([f"VMamba-{size[0].upper()}", total[size], ours - total[size]])
    return Measurement.exact(
        total["small"],
        unit="GFLOPs",
        note="By VMamba's later rule: multiply-adds, nine for each pixel, route, channel and state of a scan.",
        tables=[Table(caption="GFLOPs at 224 pixels", columns=["network", "plain", "residual adds"], rows=rows)],
    )
