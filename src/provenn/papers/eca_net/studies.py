"""Data, networks and pictures of ECA-Net's experiments."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from provenn.core import cost
from provenn.nn import resnet
from provenn.nn.channel_gates import Gate, record_gates
from provenn.papers.eca_net.bands import BANDS, MATERIALS, bad_bands
from provenn.papers.eca_net.layers import adaptive_kernel_size
from provenn.tasks import TaskData, count_examples, device_of, fingerprint, get_task
from provenn.training import Fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        return cost.macs(lambda: network(torch.empty(1, 3, 224, 224, device="meta")))


def band_data(seed: int, smoke: bool) -> TaskData:
    counts = (100, 50, 50) if smoke else (600, 600, 3000)
    parts = [bad_bands(count, seed=3 * seed + part, materials=seed)[:2] for part, count in enumerate(counts)]
    train, val, test = (TensorDataset(*part) for part in parts)
    return TaskData("bad bands", train, val, test, fingerprint=fingerprint(*parts[0]))


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


def draw_gates(done: Fit, data: TaskData, seed: int) -> "Figure":
    from matplotlib.figure import Figure

    x, _, failed = bad_bands(3, seed=3 * seed + 2, materials=seed)
    (gates,) = record_gates(done.model, x.to(device_of(done.model))).values()
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for column, (gate, bands) in enumerate(zip(gates.cpu(), failed, strict=True)):
        axes = figure.add_subplot(1, 3, column + 1)
        axes.fill_between(range(BANDS), 0, 1, where=bands.numpy(), color="#b00020", alpha=0.15, step="mid")
        axes.plot(gate.numpy(), color="#1a5fb4")
        axes.set(xlabel="band", ylim=(0, 1), ylabel="gate" if column == 0 else "")
    return figure


def digit_data(seed: int, smoke: bool) -> TaskData:
    """Half of the task's training images go to the test: one image of 359 would be as large as the effect."""
    data = get_task("image-classification").load("digits", seed=seed)
    count = count_examples(data.train)
    kept, moved = (Subset(data.train, part) for part in (range(count // 2), range(count // 2, count)))
    return replace(data, train=kept, test=ConcatDataset([data.test, moved]))


def digit_network(gate: Gate | None, **options: Any) -> nn.Module:
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 1), widths=(16, 32, 64), stem="small", gate=gate, **options)


def draw_digits(done: Fit, data: TaskData, seed: int) -> "Figure | None":
    return get_task("image-classification").picture(done.model, data)


def runner(gate: Gate | None, training: bool) -> Callable[[int, str], Callable[[], object]]:
    """ResNet-50 with a gate on square images of some side: a training step, or inference."""

    def make(side: int, device: str) -> Callable[[], object]:
        network = resnet.resnet50(gate=gate).to(device).train(training)
        x = torch.randn(2 if training else 1, 3, side, side, device=device)

        def forward() -> object:
            with torch.no_grad():
                return network(x)

        def step() -> None:
            network.zero_grad(set_to_none=True)
            network(x).square().mean().backward()

        return step if training else forward

    return make


class AsWritten(nn.Module):
    """ECA module by module, as equation 9 reads: what the layer's speed is held against."""

    def __init__(self, channels: int):
        super().__init__()
        k = adaptive_kernel_size(channels)
        self.conv, self.sigmoid = nn.Conv1d(1, 1, k, padding=k // 2, bias=False), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        context = x.mean(dim=(2, 3)).unsqueeze(1)
        return x * self.sigmoid(self.conv(context)).view(*x.shape[:2], 1, 1).expand_as(x)


def timm_gate(channels: int) -> nn.Module:
    from timm.layers import EcaModule

    return EcaModule(channels)


def gate_alone(
    gate: Gate, sides: dict[int, int], *, batch: int, training: bool, channels_last: bool = False
) -> Callable[[int, str], Callable[[], object]]:
    """A gate on the maps of a network: their side follows from their channels."""

    def make(channels: int, device: str) -> Callable[[], object]:
        module = gate(channels).to(device)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.randn(batch, channels, sides[channels], sides[channels], device=device)
        x = x.to(memory_format=layout).requires_grad_(training)
        slope, inputs = torch.randn_like(x), (x, *module.parameters())

        def forward() -> object:
            with torch.no_grad():
                return module(x)

        return (lambda: torch.autograd.grad(module(x), inputs, slope)) if training else forward

    return make
