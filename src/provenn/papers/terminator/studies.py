"""Data, networks and counts of Terminator's experiments."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from provenn.nn.resnet import BasicBlock, ResNet
from provenn.papers.terminator import model as presets
from provenn.papers.terminator.layers import CODE, LOCAL, HyperKernel, LocalHyperKernel, global_product
from provenn.papers.terminator.model import Terminator2d
from provenn.papers.terminator.optim import Kar3
from provenn.tasks import TaskData, count_examples, get_task

READS_GLOBAL = ("global", "global mixed", "global hci", "gated", "interaction")
MINI = {"size": 8, "widths": (3, 12, 36), "factors": (4, 3, 2)}


def digit_data(seed: int, smoke: bool) -> TaskData:
    data = get_task("image-classification").load("digits", seed=seed)
    return replace(data, train=Subset(data.train, range(100)), test=Subset(data.test, range(20))) if smoke else data


# Networks that differ in one part


class WithShortcuts(Terminator2d):
    """Terminator with what it leaves out: each block's input, tiled to the width of its output, is added to it."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        for block in self.blocks:
            block.register_forward_hook(_add_shortcut)


def _add_shortcut(block: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, (y, kernel) = inputs[0], output
    return y + x.repeat(1, y.shape[1] // x.shape[1], 1, 1), kernel


class FreeKernel(HyperKernel):
    """A kernel of plain parameters instead of a slow net, started as that net starts; as little regularised."""

    def __init__(self, start: HyperKernel, context: bool):
        nn.Module.__init__(self)
        with torch.no_grad():
            kernel = start(torch.zeros(1, start.channels, 2 * start.size, 2 * start.size)) if context else start()
        self.kernel, self.dims = nn.Parameter(kernel.clone()), start.dims

    def forward(self, z: Tensor | None = None) -> Tensor:
        return self.kernel


def with_free_kernels(**options: Any) -> Terminator2d:
    """Every slow net replaced by a kernel of as many numbers as it gives."""
    network = Terminator2d(**options)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, HyperKernel):
                setattr(parent, name, FreeKernel(child, isinstance(child, LocalHyperKernel)))
    return network


class KarResNet(ResNet):
    """A ResNet with Terminator's optimizer."""

    def optimizers(self, recipe: Any) -> torch.optim.Optimizer:
        return Kar3(self.parameters(), recipe.lr)


def terminator(**overrides: Any) -> Callable[..., nn.Module]:
    def build(num_classes: int, in_channels: int) -> nn.Module:
        kind = overrides.get("kind", Terminator2d)
        rest = {name: value for name, value in overrides.items() if name != "kind"}
        return kind(**{**MINI, "num_classes": num_classes, "in_channels": in_channels, **rest})

    return build


def resnet(
    kind: type[ResNet] = ResNet, widths: tuple[int, int, int] = (18, 36, 68), gate: Callable | None = None
) -> Callable[..., nn.Module]:
    """Three stages of two blocks; by default as many parameters as the small Terminator, to half a percent."""
    return partial(kind, BasicBlock, (2, 2, 2), widths=widths, stem="small", gate=gate)


def built(part: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return part(**options)


WITHOUT_GLOBAL = tuple(branch for branch in CODE if branch not in READS_GLOBAL)
WITHOUT_LOCAL = tuple(branch for branch in CODE if branch not in LOCAL)


def offset(model: nn.Module, data: TaskData) -> float:
    """How far the mean of a block's or stage's channels lies from zero, in their deviations, mean of all of them."""
    count = min(128, count_examples(data.test))
    images = torch.stack([data.test[i][0] for i in range(count)]).to(next(model.parameters()).device)
    with torch.no_grad():
        maps = model.block_outputs(images) if isinstance(model, Terminator2d) else model.features(images)  # type: ignore[operator]  # a ResNet's
    shares = []
    for x in maps:
        deviation, mean = torch.std_mean(x, dim=(0, 2, 3))
        shares.append((mean.abs() / deviation.clamp(min=1e-6)).mean())
    return torch.stack(shares).mean().item()


def lost_alone(model: nn.Module, data: TaskData) -> float:
    """Accuracy on 100 test images in one batch, less that on the same images one at a time."""
    device = next(model.parameters()).device
    chosen = [data.test[i] for i in range(min(100, count_examples(data.test)))]
    images = torch.stack([image for image, _ in chosen]).to(device)
    labels = torch.tensor([int(label) for _, label in chosen], device=device)
    with torch.no_grad():
        together = model(images).argmax(dim=1)
        alone = torch.cat([model(image) for image in images.split(1)]).argmax(dim=1)
    return ((together == labels).double().mean() - (alone == labels).double().mean()).item()


def accuracy_without(which: str, draws: int = 5) -> Callable[[nn.Module, TaskData], float | None]:
    """A probe: accuracy with half of each block's joined channels set to zero before its bottleneck.

    Args:
        which: "least" for those of least weight in the bottleneck, or "random", the mean of so many draws.
        draws: of random halves.
    """

    def accuracy(model: nn.Module, data: TaskData) -> float | None:
        layers = [block.bottleneck for block in getattr(model, "blocks", ()) if isinstance(block.bottleneck, nn.Conv2d)]
        if not layers:
            return None
        before = [layer.weight.detach().clone() for layer in layers]
        generator, reached = torch.Generator().manual_seed(0), []
        for _ in range(draws if which == "random" else 1):
            with torch.no_grad():
                for layer, weight in zip(layers, before, strict=True):
                    size = weight.square().sum((0, 2, 3))
                    rank = size if which == "least" else torch.rand(size.shape, generator=generator)
                    layer.weight[:, rank.argsort()[: len(size) // 2]] = 0
                reached.append(get_task("image-classification").evaluate(model, data.test)["accuracy"])
                for layer, weight in zip(layers, before, strict=True):
                    layer.weight.copy_(weight)
        return sum(reached) / len(reached)

    return accuracy


# What is counted


def product_of(channels: int) -> Callable[[int, str], Callable[[], object]]:
    """A global product on maps of so many positions, a square number."""

    def make(positions: int, device: str) -> Callable[[], object]:
        side = round(positions**0.5)
        x = torch.empty(1, channels, side, side, device="meta")
        return lambda: global_product(x, x)

    return make


def forward_pass(batch: int, device: str) -> Callable[[], object]:
    with torch.device("meta"):
        network = presets.terminator_cifar10().eval()
    return lambda: network(torch.empty(batch, 3, 32, 32, device="meta"))


def slow_nets(batch: int, device: str) -> Callable[[], object]:
    """All slow nets of a forward pass; of the local ones' context no pooling, which is no product."""
    with torch.device("meta"):
        network = presets.terminator_cifar10().eval()
    nets = [net for net in network.modules() if isinstance(net, HyperKernel)]
    contexts = {net: torch.empty(batch, net.channels, 32, 32, device="meta") for net in nets}

    def run() -> None:
        for net in nets:
            net(contexts[net]) if isinstance(net, LocalHyperKernel) else net()

    return run


def weights_of_block(positions: int, device: str) -> Callable[[], int]:
    """Numbers in Ŵ of the third block, on a square map of so many positions."""
    with torch.device("meta"):
        block = presets.terminator_cifar10(size=round(positions**0.5)).blocks[2]
    return lambda: block.kernel().numel()  # type: ignore[operator]  # an SFNEBlock's


def programmed_weights(channels: int, heads: int, side: int) -> tuple[int, int]:
    """Of one head over a square map: entries of its matrix, and trainable weights that the entries depend on.

    The second are those of torch's layer through which a weighted sum of the entries has a gradient, biases left out.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(channels, heads, batch_first=True).double()
        x = torch.randn(1, side**2, channels, dtype=torch.float64)
        _, matrices = attention(x, x, x, average_attn_weights=False)
        entries = matrices[0, 0]
        weighted = (entries * torch.randn_like(entries)).sum()
    names, parameters = zip(*attention.named_parameters(), strict=True)
    gradients = torch.autograd.grad(weighted, parameters, allow_unused=True)
    read = [g for name, g in zip(names, gradients, strict=True) if g is not None and name.endswith("weight")]
    return entries.numel(), sum(int(gradient.count_nonzero()) for gradient in read)


def weights_of_attention(positions: int, device: str) -> Callable[[], int]:
    """Numbers in the weights of one head, counted on the weights themselves."""
    q = torch.empty(positions, 1, device="meta")
    return lambda: (q @ q.T).numel()
