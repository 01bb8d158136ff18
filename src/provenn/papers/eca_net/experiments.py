"""What ECA-Net's authors say, and what building it brought to light, as measurements."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from provenn.core.cost import count_parameters
from provenn.evidence import Benchmark, Drawing, Measurement, Run, Study, Table, Timing, measures
from provenn.nn import resnet
from provenn.nn.channel_gates import CBAM, Gate, SqueezeExcitation
from provenn.nn.mobilenet import SETTINGS
from provenn.papers.eca_net import model as presets
from provenn.papers.eca_net.bands import BANDS
from provenn.papers.eca_net.layers import (
    EfficientChannelAttention,
    SEVar1,
    SEVar2,
    SEVar3,
    adaptive_kernel_size,
)
from provenn.papers.eca_net.studies import (
    AsWritten,
    band_data,
    band_network,
    digit_data,
    digit_network,
    draw_digits,
    draw_gates,
    gate_alone,
    macs_at_224,
    on_meta,
    runner,
    timm_gate,
)
from provenn.training import Recipe

RESNETS: dict[int, Callable[..., nn.Module]] = {50: resnet.resnet50, 101: resnet.resnet101, 152: resnet.resnet152}
RELEASED = {"ResNet-18": "3577", "ResNet-50": "3557", "ResNet-101": "3357", "MobileNetV2": "1111333"}

FAILING = Study(
    "failing bands",
    "image-classification",
    data=band_data,
    variants={
        "none": ("no gate", lambda channels: nn.Identity()),
        "var1": ("SE-Var1", SEVar1),
        "var2": ("SE-Var2", SEVar2),
        "var3": ("SE-Var3", SEVar3),
        "se": ("SE r=16", SqueezeExcitation),
        "se4": ("SE r=4", lambda channels: SqueezeExcitation(channels, 4)),
        "eca": ("ECA k=3", EfficientChannelAttention),  # ψ(64) = 3
        "eca5": ("ECA k=5", lambda channels: EfficientChannelAttention(channels, 5)),
        "eca9": ("ECA k=9", lambda channels: EfficientChannelAttention(channels, 9)),
    },
    build=band_network,
    recipe=Recipe(epochs=25, batch_size=50, optimizer="adamw", weight_decay=0.01, schedule="onecycle"),
    lrs=(2e-3, 6e-3, 2e-2),
    smoke=Recipe(epochs=1, batch_size=50),
    about="synthetic tiles of 64 bands, some of which fail",
    kind="gate",
    columns={"parameters of the gate": lambda gate: count_parameters(gate(BANDS))},
    note="Synthetic: the channels are ordered bands and faults are contiguous, which suits a local filter.",
    drawing=Drawing(
        "eca", "gates", "The gates of a trained ECA module on three tiles; the shaded bands fail.", draw_gates
    ),
)

DIGITS = Study(
    "digits",
    "image-classification",
    data=digit_data,
    variants={
        "none": ("ResNet-8", None),
        "se": ("SE-ResNet-8", SqueezeExcitation),
        "eca": ("ECA-ResNet-8", EfficientChannelAttention),
    },
    build=digit_network,
    recipe=Recipe(epochs=12, batch_size=64, optimizer="sgd", weight_decay=1e-4, schedule="onecycle"),
    lrs=(0.03, 0.1, 0.3),
    about="digits (scikit-learn), 8×8 pixels",
    setting={"host": "ResNet-8 of widths 16, 32, 64"},
    note="One test image is 0.1 points.",
    drawing=Drawing("eca", "digits", "Test digits as ECA-ResNet-8 reads them, mistakes first.", draw_digits),
)


def added_parameters(build: Callable[[int], nn.Module]) -> Callable[[int, str], Callable[[], int]]:
    """What a gate after each block adds to a ResNet of some depth."""
    return lambda layers, device: (
        lambda: count_parameters(on_meta(build, layers=layers)) - count_parameters(on_meta(RESNETS[layers]))
    )


ECA_RESNETS: dict[int, Callable[..., nn.Module]] = {
    50: presets.eca_resnet50,
    101: presets.eca_resnet101,
    152: presets.eca_resnet152,
}
ADDED = Timing(
    "parameters added to a ResNet",
    {
        "ECA": added_parameters(lambda layers: ECA_RESNETS[layers]()),
        "SE r=16": added_parameters(lambda layers: RESNETS[layers](gate=SqueezeExcitation)),
        "CBAM": added_parameters(lambda layers: RESNETS[layers](gate=CBAM)),
    },
    sizes=tuple(RESNETS),
    quantity="count",
    unit="layers",
    of="parameters",
)

GATES = {"ECA": EfficientChannelAttention, "SE": SqueezeExcitation, "no gate": None}
INFERENCE = Timing(
    "inference of ResNet-50",
    {label: runner(gate, training=False) for label, gate in GATES.items()},
    sizes=(64, 128),
    unit="pixels a side",
    rounds=15,
    setting={"batch": 1},
)
TRAINING = Timing(
    "training step of ResNet-50",
    {label: runner(gate, training=True) for label, gate in GATES.items()},
    sizes=(64,),
    unit="pixels a side",
    rounds=9,
    setting={"batch": 2},
)

EXPERIMENTS = {
    "added_parameters": ADDED.against("ECA", "SE r=16", at=50),
    "no_reduction": FAILING.against("eca", "se"),
    "wider_bottleneck": FAILING.against("se4", "se"),
    "diagonal_beats_bottleneck": FAILING.against("var2", "se"),
    "full_beats_bottleneck": FAILING.against("var3", "se"),
    "interaction": FAILING.against("eca", "var2"),
    "local_is_enough": FAILING.against("eca", "var3"),
    "clear_gain": FAILING.against("eca", "none", picture=True),
    "without_weights": FAILING.against("var1", "none"),
    "every_kernel": FAILING.against(("eca", "eca5", "eca9"), "se", shown=FAILING.variants),
    "adaptive_accuracy": FAILING.against("eca", "eca9", shown=["eca5"]),
    "few_weights": FAILING.against("eca", "se4"),
    "digits_gain": DIGITS.against("eca", "none", picture=True),
    "digits_se": DIGITS.against("eca", "se"),
    "inference_time": INFERENCE.against("ECA", "SE"),
    "inference_overhead": INFERENCE.against("ECA", "no gate"),
    "training_time": TRAINING.against("ECA", "SE"),
}

# The gate alone, beside timm's and beside its equation.

MAPS = {"ResNet-50": {256: 56, 512: 28, 1024: 14, 2048: 7}, "MobileNetV2": {96: 56, 144: 28, 576: 14, 960: 7}}
ALONE: dict[str, Gate] = {"ECA": EfficientChannelAttention, "as written": AsWritten, "timm": timm_gate}


def alone(network: str, batch: int, training: bool, channels_last: bool = False) -> Timing:
    options: dict[str, Any] = {"batch": batch, "training": training, "channels_last": channels_last}
    return Timing(
        f"a gate on {network}'s maps, {'forward and backward' if training else 'forward'}",
        {label: gate_alone(gate, MAPS[network], **options) for label, gate in ALONE.items()},
        sizes=tuple(MAPS[network]),
        unit="channels",
        setting={"batch": batch, "layout": "channels last" if channels_last else "channels first"},
    )


BENCHMARKS = tuple(
    Benchmark(timing, "ECA", baseline, within=1.0, package=package)
    for timing in (
        *(alone("ResNet-50", batch, training) for batch in (1, 8) for training in (False, True)),
        *(alone("ResNet-50", 8, training, channels_last=True) for training in (False, True)),
        *(alone("MobileNetV2", batch, training) for batch, training in ((1, False), (8, True))),
    )
    for baseline, package in (("as written", None), ("timm", "timm"))
)


@measures("parameters")
def parameters(run: Run) -> Measurement:
    added = count_parameters(on_meta(presets.eca_resnet50)) - count_parameters(on_meta(resnet.resnet50))
    return Measurement.exact(added, unit="parameters")


@measures("units")
def units(run: Run) -> Measurement:
    return Measurement.exact(count_parameters(on_meta(presets.eca_resnet50)) / 2**20, unit="2^20 parameters")


@measures("module_flops")
def module_flops(run: Run) -> Measurement:
    network = on_meta(presets.eca_resnet50)
    gates = [m for m in network.modules() if isinstance(m, EfficientChannelAttention)]
    convolution = macs_at_224(network) - macs_at_224(on_meta(resnet.resnet50))
    channels = sum(gate.channels for gate in gates)
    pixels = (56**2,) * 3 + (28**2,) * 4 + (14**2,) * 6 + (7**2,) * 3
    pooled = sum(gate.channels * area for gate, area in zip(gates, pixels, strict=True))
    rows: list[list[str | float | int | None]] = [
        ["multiply-adds of the 1-D convolutions", convolution],
        ["one more for each sigmoid", convolution + channels],
        ["and one for each pixel that is pooled", convolution + channels + pooled],
        ["and one for each pixel that is scaled", convolution + channels + 2 * pooled],
    ]
    return Measurement.exact(
        convolution / 1e9,
        unit="GFLOPs",
        note="Counted: multiply-adds of the 1-D convolutions, k·C for each; no simple rule gives the printed figure.",
        tables=[Table(caption="Operations of all ECA modules", columns=["counted", "operations"], rows=rows)],
    )


@measures("printed_flops")
def printed_flops(run: Run) -> Measurement:
    network = on_meta(presets.eca_resnet50)
    counted = {"norm": 0, "relu": 0}

    def count(kind: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            counted[kind] += output.numel()

        return hook

    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(count("norm"))
        if isinstance(module, resnet.Bottleneck) or name.endswith(("bn1", "bn2")):  # a ReLU ends or follows each
            module.register_forward_hook(count("relu"))
    products = macs_at_224(network)
    total = products + 4 * counted["norm"] + counted["relu"]
    return Measurement.exact(
        total / 2**30,
        unit="2^30 operations",
        note=f"Convolutions and linear layers alone: {products / 2**30:.2f}·2^30, or {products / 1e9:.2f}·10^9.",
    )


@measures("adaptive_is_not_released")
def adaptive_is_not_released(run: Run) -> Measurement:
    rows: list[list[str | float | int | None]] = []
    for name, code in RELEASED.items():
        if name == "MobileNetV2":
            widths = planes = [out for _, out, _, _ in SETTINGS]
        else:
            planes = [64, 128, 256, 512]
            widths = [4 * width for width in planes] if name in ("ResNet-50", "ResNet-101") else planes
        by_rule = ("".join(str(adaptive_kernel_size(w)) for w in chosen) for chosen in (widths, planes))
        rows.append([name, code, *by_rule])
    columns = ["network", "released", "ψ of the gated width", "ψ of the block's inner width"]
    return Measurement.holds(
        all(row[1] not in row[2:] for row in rows),
        "The abstract's 80 parameters are those of 3557, not of the rule (86).",
        tables=[Table(caption="Kernel sizes by stage", columns=columns, rows=rows)],
    )
