"""Data, networks and counts of L²ViT's experiments."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import Subset

from provenn.core import cost
from provenn.core.narrowing import of_kind
from provenn.nn.resnet import BasicBlock, ResNet
from provenn.nn.segmentation import Segmenter
from provenn.ops.linear_attention import bidirectional_attention
from provenn.papers.l2vit import model as presets
from provenn.papers.l2vit.concentration import entropies, local_share, row_entropy, top_share
from provenn.papers.l2vit.layers import FLOOR, LGABlock, LinearGlobalAttention, LocalConcentration
from provenn.tasks import TaskData, count_examples, get_task

Network = TypeVar("Network", bound=nn.Module)
HEADS, HEAD = 3, 32  # of the first stage of Tiny


# What attention over N tokens costs


def tokens_of_stage_one(tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, HEADS, tokens, HEAD, device=device)
    return q, k, v


def linear_attention(tokens: int, device: str) -> Callable[[], object]:
    q, k, v = tokens_of_stage_one(tokens, device)
    return lambda: bidirectional_attention(q.relu(), k.relu(), v, floor=FLOOR)


def explicit_softmax(tokens: int, device: str) -> Callable[[], object]:
    q, k, v = tokens_of_stage_one(tokens, device)
    return lambda: (q @ k.mT / math.sqrt(HEAD)).softmax(dim=-1) @ v


def fused_softmax(tokens: int, device: str) -> Callable[[], object]:
    q, k, v = tokens_of_stage_one(tokens, device)
    return lambda: F.scaled_dot_product_attention(q, k, v)


ATTENTIONS = {"linear": linear_attention, "softmax": explicit_softmax, "fused softmax": fused_softmax}


# What the whole network costs


class PassOver(TorchFunctionMode):
    """Leave out the drawing of weights: on the meta device it takes most of the time and changes no count."""

    passed = frozenset({Tensor.normal_, Tensor.uniform_, nn.init.trunc_normal_})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func in self.passed else func(*args, **(kwargs or {}))


def on_meta(build: Callable[..., Network], **options: Any) -> Network:
    """A network without its weights: enough to count."""
    with torch.device("meta"), PassOver():
        return build(**options).eval()


def multiply_adds(network: nn.Module, side: int) -> int:
    """Of a network without weights, on one square image."""
    return cost.macs(lambda: network(torch.empty(1, 3, side, side, device="meta")))


def macs_of_pixels(**options: Any) -> Callable[[int, str], Callable[[], int]]:
    """Multiply-adds of L²ViT-T on a square image of so many pixels."""

    def make(pixels: int, device: str) -> Callable[[], int]:
        side = math.isqrt(pixels)
        network = on_meta(presets.l2vit_tiny, **options)
        return lambda: multiply_adds(network, side)

    return make


def printed_operations(network: presets.L2ViT, side: int) -> int:
    """Operations as the authors' tool counts them.

    Multiply-adds of products and convolutions; one for each bias that a convolution adds, once for each linear layer's.
    One for each element of an activation and of the pooled map; two for each element of a norm.
    """
    total = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += module.out_features
        elif isinstance(module, LinearGlobalAttention):
            total += 2 * output.numel()  # the ReLU of queries and keys, and, as it is no module, the bias of their map
            total += 3 * module.dim
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            total += 2 * output.numel()
        else:  # convolutions and activations; an LCM has a GELU, which is no module either
            total += output.numel()

    elementwise = (nn.Conv2d, nn.ReLU, nn.GELU, LocalConcentration)
    kinds = (*elementwise, nn.LayerNorm, nn.BatchNorm2d, nn.Linear, LinearGlobalAttention)
    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, kinds)]
    products = multiply_adds(network, side)
    for hook in hooks:
        hook.remove()
    cells = math.ceil(side / network.strides[-1]) ** 2
    return products + total + cells * network.widths[-1]


def tiny_on(tile: int | None) -> Callable[[int, str], Callable[[], object]]:
    def make(side: int, device: str) -> Callable[[], object]:
        network = presets.l2vit_tiny(num_classes=10, tile=tile).to(device).eval()
        image = torch.zeros(1, 3, side, side, device=device)

        def run() -> object:
            with torch.no_grad():
                return network(image)

        return run

    return make


# Views and concentration of fresh layers


def seen_by(layer: Callable[[Tensor], Tensor], side: int = 21, dim: int = 64) -> Tensor:
    """Of a layer on a map, from which cells a gradient reaches the middle one: (side, side), True where it does."""
    x = torch.randn(1, dim, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    y = layer(x)[0, :, side // 2, side // 2]
    (slope,) = torch.autograd.grad((y * torch.linspace(-1, 1, dim, dtype=torch.float64)).sum(), x)
    return slope[0].abs().sum(0) > 0


def fresh_concentration(seed: int, tokens: int = 196) -> dict[str, float]:
    """Of softmax and linear attention with the same queries and keys, drawn from a normal: entropy and top tenth."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 8, HEADS, tokens, HEAD, generator=generator)
    maps = {"softmax": (q @ k.mT / math.sqrt(HEAD)).softmax(dim=-1), "linear": q.relu() @ k.relu().mT}
    return {
        f"{measure.__name__} {name}": measure(weights).mean().item()
        for measure in (row_entropy, top_share)
        for name, weights in maps.items()
    }


def floored_shares(seed: int, side: int = 224) -> list[float]:
    """Of each stage of a fresh Tiny, the share of queries whose row sums lie below the floor, on noise."""
    torch.manual_seed(seed)
    network = presets.l2vit_tiny(num_classes=10).eval()
    shares: list[list[float]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shares[-1].append(of_kind(module, LinearGlobalAttention, "attention").floored(inputs[0]).double().mean().item())

    for stage in network.stages:
        for module in stage.modules():
            if isinstance(module, LinearGlobalAttention):
                module.register_forward_pre_hook(keep)
    with torch.no_grad():
        x = torch.randn(2, 3, side, side)
        for embed, blocks in zip(network.embeds, network.stages):
            shares.append([])
            x = embed(x)
            for block in blocks:  # type: ignore[attr-defined]  # a ModuleList
                x = block(x)
    return [sum(stage) / len(stage) for stage in shares]


# Networks that are trained


def patch_data(side: int) -> Callable[[int, bool], TaskData]:
    """Patches of photographs, half of those that the task gives for training: a quarter of an hour is to be enough."""

    def load(seed: int, smoke: bool) -> TaskData:
        data = get_task("image-classification").load("patches", seed=seed, size=side)
        count = count_examples(data.train)
        # Every other one: the patches lie in the order of their photographs.
        return replace(data, train=Subset(data.train, range(seed % 2, count, 32 if smoke else 2)))

    return load


def plain_network(part: dict[str, Any], **options: Any) -> nn.Module:
    """One stage of global blocks on tokens of 2×2 pixels."""
    sizes = {"dims": (32,), "depths": (4,), "heads": (1,), "stem": 2, "blocks": ("global",), "mlp_ratio": 2}
    return presets.L2ViT(**{**sizes, **part, **options})


def two_stages(part: dict[str, Any] | None, **options: Any) -> nn.Module:
    """Two stages of two blocks on tokens of 2×2 and 4×4 pixels; a Swin of the same shape where there is no part."""
    if part is None:
        return SwinLogits(**options)
    sizes = {"dims": (32, 64), "depths": (2, 2), "heads": (1, 2), "stem": 2, "window": 4, "mlp_ratio": 2}
    return presets.L2ViT(**{**sizes, **part, **options})


class SwinLogits(nn.Module):
    """Swin of transformers, as wide and deep, its feed-forward parts wider so that it has no fewer parameters."""

    def __init__(self, num_classes: int, in_channels: int, side: int = 32):
        from transformers import SwinConfig, SwinForImageClassification

        super().__init__()
        config = SwinConfig(
            image_size=side,
            patch_size=2,
            num_channels=in_channels,
            embed_dim=32,
            depths=[2, 2],
            num_heads=[1, 2],
            window_size=4,
            mlp_ratio=3.0,
            drop_path_rate=0.0,
        )
        config.num_labels = num_classes
        self.swin = SwinForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.swin(x).logits


def entropy_of(model: nn.Module, data: TaskData) -> float:
    """Mean entropy of all rows of all attentions, on 32 test images."""
    rows = entropies(model, _some(data, model))
    return torch.stack([row.mean() for row in rows.values()]).mean().item()


def nearness_of(model: nn.Module, data: TaskData) -> float:
    """Mean share of 7×7 tokens in what the global blocks add to the middle token, on 32 test images."""
    inputs: dict[nn.Module, Tensor] = {}
    blocks = [module for module in model.modules() if isinstance(module, LGABlock)]
    hooks = [
        block.register_forward_pre_hook(lambda module, given: inputs.update({module: given[0].detach()}))
        for block in blocks
    ]
    model(_some(data, model))
    for hook in hooks:
        hook.remove()
    return torch.stack([local_share(block, inputs[block]).mean() for block in blocks]).mean().item()


def _some(data: TaskData, model: nn.Module) -> Tensor:
    count = count_examples(data.test)
    chosen = range(0, count, max(1, count // 32))
    images = torch.stack([data.test[i][0] for i in chosen][:32])
    return images.to(next(model.parameters()).device)


def segmenter(part: dict[str, Any] | None, **options: Any) -> nn.Module:
    """L²ViT under the head of Panoptic FPN, or a ResNet-10 where there is no part."""
    if part is not None:
        return presets.l2vit_mini_semantic_fpn(**{**part, **options})
    backbone = ResNet(
        BasicBlock, (1, 1, 1, 1), widths=(16, 32, 64, 128), in_channels=options["in_channels"], num_classes=0
    )
    return Segmenter(backbone, options["num_classes"], "semantic_fpn", dim=32)


def mosaic_data(seed: int, smoke: bool) -> TaskData:
    data = get_task("semantic-segmentation").load("textures", seed=seed)
    return replace(data, train=Subset(data.train, range(8)), test=Subset(data.test, range(4))) if smoke else data
