"""What ECA-Net's authors say, and what building it brought to light, as measurements."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from provenn import bench
from provenn.bench import count_parameters
from provenn.evidence import Measurement, Run, measures
from provenn.evidence.measurement import Picture, Series, Table
from provenn.nn import resnet
from provenn.nn.channel_gates import CBAM, Gate, PooledGate, SqueezeExcitation, record_gates
from provenn.nn.mobilenet import SETTINGS, MobileNetV2
from provenn.papers.eca_net import model as presets
from provenn.papers.eca_net.bands import BANDS, MATERIALS, bad_bands, smooth_curves
from provenn.papers.eca_net.layers import (
    EfficientChannelAttention,
    SEVar1,
    SEVar2,
    SEVar3,
    adaptive_kernel_size,
)
from provenn.tasks import Fit, Recipe, TaskData, fingerprint, fit, get_task

M = 2**20  # what the paper prints as "M"

# Name, plain network, ECA network, reduction of the SE it is compared with, released code, authors' parameters.
RELEASED: tuple[tuple[str, Callable, Callable, int, str, int], ...] = (
    ("ResNet-18", resnet.resnet18, presets.eca_resnet18, 16, "3577", 11_689_556),
    ("ResNet-34", resnet.resnet34, presets.eca_resnet34, 16, "3357", 21_797_744),
    ("ResNet-50", resnet.resnet50, presets.eca_resnet50, 16, "3557", 25_557_112),
    ("ResNet-101", resnet.resnet101, presets.eca_resnet101, 16, "3357", 44_549_317),
    ("ResNet-152", resnet.resnet152, presets.eca_resnet152, 16, "3357", 60_193_042),
    ("MobileNetV2", MobileNetV2, presets.eca_mobilenet_v2, 8, "1111333", 3_504_903),
)


class PassOver(TorchFunctionMode):
    """Leave out what changes neither shapes nor multiply-adds: on the meta device it takes most of the time."""

    passed = frozenset({Tensor.normal_, Tensor.uniform_, Tensor.relu, F.relu6, F.batch_norm})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func in self.passed else func(*args, **(kwargs or {}))


def on_meta(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A network without its weights: enough to count."""
    with torch.device("meta"), PassOver():
        return build(**options).eval()


def macs_at_224(network: nn.Module) -> int:
    with PassOver():
        return bench.macs(lambda: network(torch.empty(1, 3, 224, 224, device="meta")))


@measures("parameters")
def parameters(run: Run) -> Measurement:
    added = count_parameters(on_meta(presets.eca_resnet50)) - count_parameters(on_meta(resnet.resnet50))
    return Measurement.exact(added, unit="parameters")


@measures("released_parameters")
def released_parameters(run: Run) -> Measurement:
    rows: list[list[str | float | int | None]] = []
    for name, plain, eca, _, code, authors in RELEASED:
        count = count_parameters(on_meta(eca))
        rows.append([name, code, count, authors, count - count_parameters(on_meta(plain)), round(count / M, 2)])
    columns = ["network", "kernel sizes", "ours", "the authors'", "of them ECA", "in 2^20"]
    return Measurement.holds(
        all(row[2] == row[3] for row in rows),
        "each count equals that of the authors' model",
        tables=[Table(caption="Parameters of the released models", columns=columns, rows=rows)],
    )


@measures("se_parameters")
def se_parameters(run: Run) -> Measurement:
    return Measurement.exact(
        count_parameters(on_meta(resnet.resnet50, gate=SqueezeExcitation)) / M, unit="2^20 parameters"
    )


@measures("local_interaction")
def local_interaction(run: Run) -> Measurement:
    worst = 0.0
    for channels, k in ((5, 3), (64, 3), (256, 5), (512, 7)):
        torch.manual_seed(0)
        eca = EfficientChannelAttention(channels, k).double()
        diagonals = [
            torch.diag(weight.expand(channels - abs(offset)), offset)
            for offset, weight in zip(range(-(k // 2), k // 2 + 1), eca.conv.weight.detach().flatten(), strict=True)
        ]
        x = torch.randn(4, channels, 3, 3, dtype=torch.float64)
        gate = (x.mean((2, 3)) @ torch.stack(diagonals).sum(0).T).sigmoid()
        worst = max(worst, (eca(x) - x * gate[:, :, None, None]).abs().max().item())
    return Measurement.holds(worst < 1e-12, f"largest difference from the banded matrix: {worst:.1e}")


@measures("adaptive_kernel")
def adaptive_kernel(run: Run) -> Measurement:
    widths = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    expected = (3, 3, 3, 5, 5, 5, 5, 7, 7)
    sizes = [adaptive_kernel_size(width) for width in widths]
    return Measurement.holds(
        tuple(sizes) == expected and all(adaptive_kernel_size(c) % 2 == 1 for c in range(1, 5000)),
        "odd for every width up to 5,000, and as the paper's rule gives for powers of two",
        tables=[Table(caption="ψ(C)", columns=["C", *map(str, widths)], rows=[["k", *sizes]])],
    )


@measures("computation")
def computation(run: Run) -> Measurement:
    rows: list[list[str | float | int | None]] = []
    added = {}
    for name, plain, eca, reduction, _, _ in RELEASED[2:3] if run.smoke else RELEASED[2:]:
        candidates: dict[str, nn.Module] = {
            "plain": on_meta(plain),
            "SE": on_meta(plain, gate=lambda c, r=reduction: SqueezeExcitation(c, r)),
            "ECA": on_meta(eca),
        }
        if name == "ResNet-50":
            candidates["CBAM"] = on_meta(plain, gate=CBAM)
        work = {gate: macs_at_224(network) for gate, network in candidates.items()}
        rows += [
            [name, gate, count_parameters(network), work[gate], 100 * (work[gate] / work["plain"] - 1)]
            for gate, network in candidates.items()
        ]
        added[name] = 100 * (work["ECA"] / work["plain"] - 1)
    columns = ["network", "gate", "parameters", "multiply-adds", "added, %"]
    caption = "At 224×224, one image; convolutions and linear layers. Pooling and scaling cost SE and ECA the same."
    return Measurement.exact(
        added["ResNet-50"],
        unit="% of the multiply-adds",
        tables=[Table(caption=caption, columns=columns, rows=rows)],
    )


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
        note="counted: multiply-adds of the 1-D convolutions, k·C for each; no simple rule gives the printed figure",
        tables=[Table(caption="Operations of all ECA modules", columns=["counted", "operations"], rows=rows)],
    )


@measures("units")
def units(run: Run) -> Measurement:
    return Measurement.exact(count_parameters(on_meta(presets.eca_resnet50)) / M, unit="2^20 parameters")


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
        note=f"convolutions and linear layers alone: {products / 2**30:.2f}·2^30, or {products / 1e9:.2f}·10^9",
    )


@measures("adaptive_is_not_released")
def adaptive_is_not_released(run: Run) -> Measurement:
    rows: list[list[str | float | int | None]] = []
    for name, _, _, _, code, _ in RELEASED:
        if name == "MobileNetV2":
            widths = planes = [out for _, out, _, _ in SETTINGS]
        else:
            planes = [64, 128, 256, 512]
            widths = [4 * width for width in planes] if name in ("ResNet-50", "ResNet-101", "ResNet-152") else planes
        by_rule = ("".join(str(adaptive_kernel_size(w)) for w in chosen) for chosen in (widths, planes))
        rows.append([name, code, *by_rule])
    columns = ["network", "released", "ψ of the gated width", "ψ of the block's inner width"]
    return Measurement.holds(
        all(row[1] not in row[2:] for row in rows),
        "the abstract's 80 parameters are those of 3557, not of the rule (86)",
        tables=[Table(caption="Kernel sizes by stage", columns=columns, rows=rows)],
    )


@measures("se_without_bias")
def se_without_bias(run: Run) -> Measurement:
    network = on_meta(resnet.resnet50, gate=lambda c: SqueezeExcitation(c, bias=True))
    return Measurement.exact(count_parameters(network) / M, unit="2^20 parameters")


@measures("half_at_start")
def half_at_start(run: Run) -> Measurement:
    means = []
    for seed in run.seeds:
        torch.manual_seed(seed)
        gates = record_gates(presets.eca_resnet18(), torch.randn(8, 3, 64, 64))
        means.append(float(torch.stack([gate.mean() for gate in gates.values()]).mean()))
    return Measurement.exact(
        sum(means) / len(means), unit="mean gate of a fresh ECA-Net18", seeds=list(run.seeds), values=means
    )


@measures("order_matters")
def order_matters(run: Run) -> Measurement:
    torch.manual_seed(0)
    x, order = torch.randn(8, 64, 4, 4), torch.randperm(64)

    def moved(gate: nn.Module) -> float:
        return (gate(x[:, order]) - gate(x)[:, order]).abs().max().item()

    eca, own = moved(EfficientChannelAttention(64)), moved(SEVar1(64))
    return Measurement.holds(
        eca > 1e-2 and own < 1e-6,
        f"permuting the channels moves the output by up to {eca:.2g}; a gate of each channel's own mean by {own:.1g}",
    )


@measures("starts_as_identity")
def starts_as_identity(run: Run) -> Measurement:
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = {}
    for name in ("plain", "2σ", "σ"):
        torch.manual_seed(0)
        network = resnet.resnet20().double().eval()
        if name != "plain":
            presets.add_eca(network, preserve=name == "2σ")
        with torch.no_grad():
            outputs[name] = network(x)
    change = {name: float((outputs[name] - outputs["plain"]).abs().max()) for name in ("2σ", "σ")}
    return Measurement.holds(
        change["2σ"] < 1e-10 < 1e-2 < change["σ"],
        f"ResNet-20's logits move by {change['2σ']:.0e} with 2σ and zeros, by {change['σ']:.2g} as the paper starts",
    )


# Failing bands


BAND_GATES: dict[str, tuple[str, Gate]] = {
    "none": ("no gate", lambda channels: nn.Identity()),
    "var1": ("SE-Var1", SEVar1),
    "var2": ("SE-Var2", SEVar2),
    "var3": ("SE-Var3", SEVar3),
    "se": ("SE r=16", SqueezeExcitation),
    "se4": ("SE r=4", lambda channels: SqueezeExcitation(channels, 4)),
    "eca": ("ECA k=3", EfficientChannelAttention),  # ψ(64) = 3
    "eca5": ("ECA k=5", lambda channels: EfficientChannelAttention(channels, 5)),
    "eca9": ("ECA k=9", lambda channels: EfficientChannelAttention(channels, 9)),
}
BAND_RECIPE = Recipe(epochs=25, batch_size=50, optimizer="adamw", lr=6e-3, weight_decay=0.01, schedule="onecycle")
BAND_NOTE = "synthetic: the channels are ordered bands and faults are contiguous, which suits a local filter"


def band_network(gate: Gate) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(BANDS, BANDS, 3, padding=1, groups=BANDS, bias=False),
        nn.BatchNorm2d(BANDS),
        nn.ReLU(),
        gate(BANDS),
        nn.Conv2d(BANDS, BANDS, 1, bias=False),
        nn.BatchNorm2d(BANDS),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(BANDS, MATERIALS),
    )


@lru_cache(maxsize=3)
def band_data(seed: int, smoke: bool) -> TaskData:
    counts = (100, 50, 50) if smoke else (600, 100, 3000)
    parts = [bad_bands(count, seed=3 * seed + part, materials=seed)[:2] for part, count in enumerate(counts)]
    train, val, test = (TensorDataset(*part) for part in parts)
    return TaskData("bad bands", train, val, test, fingerprint=fingerprint(*parts[0]))


def learned(result: Fit) -> dict[str, Any]:
    """What the record keeps of a training."""
    curve = {"epoch": result.series("epoch"), "accuracy": result.series("accuracy")}
    return {"accuracy": result.metrics["accuracy"], "curve": curve}


def curves(plot: str, results: dict[str, list[dict[str, Any]]]) -> list[Series]:
    """Validation accuracy over epochs: the mean over seeds, and the lowest and highest."""
    lines = []
    for name, trials in results.items():
        lines.append(
            Series.over_seeds(
                name,
                trials[0]["curve"]["epoch"],
                [trial["curve"]["accuracy"] for trial in trials],
                plot=plot,
                x_label="epoch",
                y_label="validation accuracy",
            )
        )
    return lines


def accuracies(trials: list[dict[str, Any]]) -> list[float]:
    return [trial["accuracy"] for trial in trials]


def band_trials(run: Run, name: str) -> list[dict[str, Any]]:
    label, gate = BAND_GATES[name]

    recipe = Recipe(epochs=1, batch_size=50) if run.smoke else BAND_RECIPE

    def one(seed: int) -> dict[str, Any]:
        task, data = get_task("image-classification"), band_data(seed, run.smoke)
        result = fit(lambda: band_network(gate), task, data, recipe, seed=seed, device=run.device, title=label)
        if name == "eca" and seed == run.seeds[0]:
            picture_of_gates(run, result.model)
        return learned(result)

    return run.trials(f"failing bands, {label}", one, **vars(recipe))


GATES_CAPTION = "The gates of a trained ECA module on three tiles; the shaded bands fail."


def picture_of_gates(run: Run, network: nn.Module) -> None:
    from matplotlib.figure import Figure

    x, _, failed = bad_bands(3, seed=3 * run.seeds[0] + 2, materials=run.seeds[0])
    (gates,) = record_gates(network, x.to(run.device)).values()
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for place, (gate, bands) in enumerate(zip(gates.cpu(), failed, strict=True)):
        axes = figure.add_subplot(1, 3, place + 1)
        axes.fill_between(range(BANDS), 0, 1, where=bands.numpy(), color="#b00020", alpha=0.15, step="mid")
        axes.plot(gate.numpy(), color="#1a5fb4")
        axes.set(xlabel="band", ylim=(0, 1), ylabel="gate" if place == 0 else "")
    run.picture("gates", figure, caption=GATES_CAPTION)


def kept_picture(run: Run, name: str, caption: str) -> list[Picture]:
    """A picture that a trial has drawn, in this run or in the one that it resumes."""
    file = f"{run.paper}/{name}.png"
    return [Picture(file=file, caption=caption)] if (run.out / file).exists() else []


def on_bands(run: Run, system: str | tuple[str, ...], baseline: str, *others: str) -> Measurement:
    """A gate against another, on the same seeds; of several gates, the worst of each seed. Others are shown beside."""
    systems = (system,) if isinstance(system, str) else system
    names = dict.fromkeys((*systems, baseline, *others))
    trials = {name: band_trials(run, name) for name in names}
    rows: list[list[str | float | int | None]] = []
    for name in names:
        label, gate = BAND_GATES[name]
        rows.append([label, count_parameters(gate(BANDS)), sum(accuracies(trials[name])) / len(trials[name])])
    return Measurement.paired(
        [min(reached) for reached in zip(*(accuracies(trials[name]) for name in systems), strict=True)],
        accuracies(trials[baseline]),
        seeds=run.seeds,
        unit="accuracy",
        data="synthetic tiles of 64 bands, some of which fail",
        fingerprint=band_data(run.seeds[0], run.smoke).fingerprint,
        setting={"recipe": BAND_RECIPE, "train": 600, "test": 3000},
        note=BAND_NOTE,
        tables=[Table(caption="Failing bands", columns=["gate", "parameters of the gate", "accuracy"], rows=rows)],
        series=curves("failing bands", {BAND_GATES[name][0]: trials[name] for name in (*systems, baseline)}),
        pictures=kept_picture(run, "gates", GATES_CAPTION) if (system, baseline) == ("eca", "none") else [],
    )


@measures("no_reduction")
def no_reduction(run: Run) -> Measurement:
    return on_bands(run, "eca", "se")


@measures("interaction")
def interaction(run: Run) -> Measurement:
    return on_bands(run, "eca", "var2")


@measures("local_is_enough")
def local_is_enough(run: Run) -> Measurement:
    return on_bands(run, "eca", "var3")


@measures("clear_gain")
def clear_gain(run: Run) -> Measurement:
    return on_bands(run, "eca", "none")


@measures("without_weights")
def without_weights(run: Run) -> Measurement:
    return on_bands(run, "var1", "none")


@measures("every_kernel")
def every_kernel(run: Run) -> Measurement:
    return on_bands(run, ("eca", "eca5", "eca9"), "se", *BAND_GATES)


@measures("adaptive_accuracy")
def adaptive_accuracy(run: Run) -> Measurement:
    return on_bands(run, "eca", "eca9", "eca5")


@measures("wider_bottleneck")
def wider_bottleneck(run: Run) -> Measurement:
    return on_bands(run, "se4", "se")


@measures("few_weights")
def few_weights(run: Run) -> Measurement:
    return on_bands(run, "eca", "se4")


# A gate to be learned from examples of it

TAPS = 5
TEACHER_GATES: dict[str, Callable[[int], PooledGate]] = {
    "ECA k=3": lambda c: EfficientChannelAttention(c, 3),
    "ECA k=5": lambda c: EfficientChannelAttention(c, TAPS),
    "ECA k=9": lambda c: EfficientChannelAttention(c, 9),
    "SE r=16": SqueezeExcitation,
    "SE-Var2": SEVar2,
    "SE-Var3": SEVar3,
}


def gate_error(make: Callable[[int], PooledGate], samples: int, seed: int, iterations: int) -> float:
    """Root mean square error, on new examples, of a gate fitted to those of a hidden filter of five taps."""
    generator = torch.Generator().manual_seed(seed)
    context = smooth_curves(samples + 1000, 2.0, generator).double()
    taps = torch.randn(1, 1, TAPS, generator=generator).double()
    target = F.conv1d(context[:, None], taps, padding=TAPS // 2)[:, 0].sigmoid()
    torch.manual_seed(seed)
    gate = make(BANDS).double()
    optimizer = torch.optim.LBFGS(
        gate.parameters(),
        max_iter=iterations,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def squared_error(rows: slice) -> Tensor:
        return (gate.interact(context[rows]).sigmoid() - target[rows]).square().mean()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = squared_error(slice(samples))
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        return float(squared_error(slice(samples, None)).sqrt())


@measures("teacher_gate")
def teacher_gate(run: Run) -> Measurement:
    sizes = (32, 64) if run.smoke else (32, 256, 2048)
    iterations = 5 if run.smoke else 100

    def fitted(name: str) -> list[list[float]]:
        def one(seed: int) -> list[float]:
            return [gate_error(TEACHER_GATES[name], size, seed, iterations) for size in sizes]

        return run.trials(f"teacher's gate, {name}", one, sizes=sizes, iterations=iterations)

    errors = {name: fitted(name) for name in TEACHER_GATES}
    rows: list[list[str | float | int | None]] = [
        [name, count_parameters(make(BANDS)), *(sum(e) / len(e) for e in zip(*errors[name], strict=True))]
        for name, make in TEACHER_GATES.items()
    ]
    lines = [
        Series.over_seeds(
            name,
            sizes,
            trials,
            plot="learning a local gate",
            x_label="examples",
            y_label="error of the gate",
            log="xy",
        )
        for name, trials in errors.items()
    ]
    columns = ["gate", "parameters", *(f"{size} examples" for size in sizes)]
    return Measurement.ratio(
        [trial[-1] for trial in errors["ECA k=5"]],
        [trial[-1] for trial in errors["SE r=16"]],
        unit="error of the gate",
        seeds=run.seeds,
        data="gates of a hidden 5-tap filter over 64 correlated channels",
        setting={"examples": sizes[-1], "optimizer": "L-BFGS", "iterations": iterations},
        note="ψ(64) = 3, so the adaptive rule would choose a filter too short for this teacher; see ECA k=3",
        tables=[Table(caption="Root mean square error on 1,000 new examples", columns=columns, rows=rows)],
        series=lines,
    )


# Digits

DIGIT_GATES: dict[str, tuple[str, Gate | None]] = {
    "none": ("ResNet-8", None),
    "se": ("SE-ResNet-8", SqueezeExcitation),
    "eca": ("ECA-ResNet-8", EfficientChannelAttention),
}
DIGIT_RECIPE = Recipe(epochs=12, batch_size=64, optimizer="sgd", lr=0.1, weight_decay=1e-4, schedule="onecycle")
DIGITS_CAPTION = "Test digits as ECA-ResNet-8 reads them, mistakes first."


def digit_network(gate: Gate | None, **options: Any) -> nn.Module:
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 1), widths=(16, 32, 64), stem="small", gate=gate, **options)


def digit_data(seed: int) -> TaskData:
    """Half of the task's training images go to the test: one image of 359 would be as large as the effect."""
    data = get_task("image-classification").load("digits", seed=seed)
    count = len(data.train)  # type: ignore[arg-type]
    kept, moved = (Subset(data.train, part) for part in (range(count // 2), range(count // 2, count)))
    return replace(data, train=kept, test=ConcatDataset([data.test, moved]))


def digit_trials(run: Run, name: str) -> list[dict[str, Any]]:
    label, gate = DIGIT_GATES[name]

    recipe = Recipe(epochs=1, max_steps=2) if run.smoke else DIGIT_RECIPE

    def one(seed: int) -> dict[str, Any]:
        task, data = get_task("image-classification"), digit_data(seed)
        result = fit(
            lambda: digit_network(gate, **data.options),
            task,
            data,
            recipe,
            seed=seed,
            device=run.device,
            title=label,
        )
        if name == "eca" and seed == run.seeds[0]:
            figure = task.picture(result.model, data)
            if figure is not None:
                run.picture("digits", figure, caption=DIGITS_CAPTION)
        return learned(result)

    return run.trials(f"digits, {label}", one, **vars(recipe))


def on_digits(run: Run, baseline: str) -> Measurement:
    system, other = digit_trials(run, "eca"), digit_trials(run, baseline)
    return Measurement.paired(
        accuracies(system),
        accuracies(other),
        seeds=run.seeds,
        unit="accuracy",
        data="digits (scikit-learn), 8×8 pixels",
        fingerprint=digit_data(run.seeds[0]).fingerprint,
        setting={"recipe": DIGIT_RECIPE, "host": "ResNet-8 of widths 16, 32, 64", "train": 629, "test": 988},
        note="one test image is 0.1 points",
        series=curves("digits", {DIGIT_GATES["eca"][0]: system, DIGIT_GATES[baseline][0]: other}),
        pictures=kept_picture(run, "digits", DIGITS_CAPTION) if baseline == "none" else [],
    )


@measures("digits_gain")
def digits_gain(run: Run) -> Measurement:
    return on_digits(run, "none")


@measures("digits_se")
def digits_se(run: Run) -> Measurement:
    return on_digits(run, "se")


# Time


def timed(run: Run, baseline: Gate | None, training: bool) -> Measurement:
    """ResNet-50 with ECA against another gate, in turns."""
    on_gpu = run.device.startswith("cuda")
    batch, side = (128, 224) if on_gpu else (2, 32) if run.smoke else (2, 64) if training else (1, 128)
    rounds = 1 if run.smoke else 9

    def call(network: nn.Module) -> Callable[[], object]:
        network = network.to(run.device).train(training)
        x = torch.randn(batch, 3, side, side, device=run.device)

        def forward() -> object:
            with torch.no_grad():
                return network(x)

        def step() -> None:
            network.zero_grad(set_to_none=True)
            network(x).square().mean().backward()

        return step if training else forward

    times = bench.compare(call(presets.eca_resnet50()), call(resnet.resnet50(gate=baseline)), rounds=rounds, warmup=1)
    return Measurement.ratio(
        times.a,
        times.b,
        unit="s",
        at_paper_setting=on_gpu,
        data="noise",
        setting={"batch": batch, "side": side, "rounds": rounds, "training": training},
    )


def modules_alone(run: Run, training: bool) -> Table:
    """ECA against SE without a network around them, at the four widths of ResNet-50."""
    batch = 1 if run.smoke else 32 if run.device.startswith("cuda") else 2
    rows: list[list[str | float | int | None]] = []
    for channels, side in ((256, 56), (512, 28), (1024, 14), (2048, 7)):
        x = torch.randn(batch, channels, side, side, device=run.device, requires_grad=training)

        def call(gate: nn.Module, x: Tensor = x) -> object:
            with torch.set_grad_enabled(training):
                y = gate(x)
            return torch.autograd.grad(y.sum(), [x, *gate.parameters()]) if training else y

        eca, se = (gate(channels).to(run.device) for gate in (EfficientChannelAttention, SqueezeExcitation))
        times = bench.compare(partial(call, eca), partial(call, se), rounds=1 if run.smoke else 7)
        rows.append(
            [f"({batch}, {channels}, {side}, {side})", round(times.ratio, 3), *(round(t, 3) for t in times.interval)]
        )
    columns = ["input", "time of ECA / time of SE", "low", "high"]
    return Table(caption=f"The modules alone, forward{' and backward' if training else ''}", columns=columns, rows=rows)


@measures("inference_time")
def inference_time(run: Run) -> Measurement:
    measurement = timed(run, SqueezeExcitation, training=False)
    return measurement.model_copy(update={"tables": [modules_alone(run, training=False)]})


@measures("inference_overhead")
def inference_overhead(run: Run) -> Measurement:
    return timed(run, None, training=False)


@measures("training_time")
def training_time(run: Run) -> Measurement:
    measurement = timed(run, SqueezeExcitation, training=True)
    return measurement.model_copy(update={"tables": [modules_alone(run, training=True)]})
