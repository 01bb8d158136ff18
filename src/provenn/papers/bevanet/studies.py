"""Data, networks and probes of BEVANet's experiments."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from provenn.core import cost
from provenn.core.narrowing import of_kind
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.segmentation import full_logits
from provenn.papers.bevanet.layers import CKS
from provenn.papers.bevanet.losses import IGNORED, canny
from provenn.papers.bevanet.model import BEVANet
from provenn.papers.bevanet.rivals import DDRNet, PIDNet, Rival
from provenn.tasks import TaskData, get_task
from provenn.training import Fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TINY: dict[str, Any] = {"planes": 8, "blocks": (1, 1, 1, 1), "pooling_planes": 16, "head_planes": 16}
# As many parameters within 5 %, from wider stages of basic blocks.
PLAIN: dict[str, Any] = {"planes": 13, "blocks": (1, 1, 2, 2), "kernel_size": 0, "detail_kernel_size": 0}
NEAR = 4  # pixels from a boundary


def mosaics(seed: int, smoke: bool, side: int = 256) -> TaskData:
    """Texture mosaics. Below 256 pixels the map at 1/64 has fewer than 4 × 4 cells: large kernels would see nothing."""
    data = get_task("semantic-segmentation").load("textures", seed=seed, size=64 if smoke else side)
    if not smoke:
        return data
    train, val, test = (Subset(part, range(8)) for part in (data.train, data.val, data.test))
    return TaskData(data.name, train, val, test, fingerprint=data.fingerprint, options=data.options, meta=data.meta)


def network(part: dict[str, Any], **options: Any) -> BEVANet:
    """The tiny BEVANet with one part changed."""
    return BEVANet(**{**TINY, **options, **part})


RIVAL_WIDTHS: dict[str, Any] = {"pooling_planes": 16, "head_planes": 16}


def small_bevanet(**options: Any) -> BEVANet:
    """The tiny BEVANet."""
    return network({}, **options)


def small_pidnet(**options: Any) -> PIDNet:
    """PIDNet-S with one block where it has several, of a width that takes as long for a picture."""
    return PIDNet(planes=18, blocks=(1, 1), **RIVAL_WIDTHS, **options)


def small_ddrnet(**options: Any) -> DDRNet:
    """DDRNet-23-slim with one block where it has several, of a width that takes as long for a picture."""
    return DDRNet(planes=24, blocks=1, **RIVAL_WIDTHS, **options)


def whole_network(part: Callable[..., BEVANet | Rival], **options: Any) -> BEVANet | Rival:
    """A network of its own frame."""
    return part(**options)


def count_whole(part: Callable[..., BEVANet | Rival]) -> int:
    """Parameters of a whole network, without training heads."""
    with torch.device("meta"):
        return cost.count_parameters(part(num_classes=5, in_channels=1).without_training_heads())


def on_mosaic(build: Callable[..., BEVANet | Rival]) -> Callable[[int, str], Callable[[], Any]]:
    """A network without its training heads on a grey square picture of some side, forward."""

    def make(side: int, device: str) -> Callable[[], Any]:
        model = build(num_classes=5, in_channels=1).without_training_heads().to(device)
        x = torch.randn(1, 1, side, side, device=device)

        def call() -> Tensor:
            with torch.no_grad():
                return model(x)

        return call

    return make


def count(part: dict[str, Any]) -> int:
    """Parameters of a variant, without training heads."""
    with torch.device("meta"):
        return cost.count_parameters(network(part, num_classes=5, in_channels=1).without_training_heads())


def near_boundaries(model: nn.Module, data: TaskData) -> float:
    """The share of pixels predicted right among those within 4 pixels of a true boundary."""
    right = judged = 0
    for image, mask in _pairs(data):
        predicted = full_logits(model, image.to(next(model.parameters()))).argmax(1).cpu()
        edges = canny(mask).float().unsqueeze(1)
        near = (F.max_pool2d(edges, 2 * NEAR + 1, 1, NEAR)[:, 0] > 0) & (mask != IGNORED)
        right += int((predicted == mask)[near].sum())
        judged += int(near.sum())
    return right / max(judged, 1)


def gate_spread(model: nn.Module, data: TaskData) -> float:
    """How far the selection's channel gates differ between test images: their deviation, the largest of all layers."""
    seen: dict[str, list[Tensor]] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen.setdefault(name, []).append(of_kind(module, CKS, name).gates(sum(inputs))[0].flatten(1).cpu())

        return hook

    hooks = [m.register_forward_hook(record(name)) for name, m in model.named_modules() if isinstance(m, CKS)]
    for image, _ in _pairs(data):
        model(image.to(next(model.parameters())))
    for hook in hooks:
        hook.remove()
    return max((torch.cat(gates).std(0).mean().item() for gates in seen.values()), default=0.0)


def _pairs(data: TaskData) -> list[tuple[Tensor, Tensor]]:
    pairs = [data.test[index] for index in range(len(data.test))]  # type: ignore[arg-type]
    return [(image[None], torch.as_tensor(mask).long()[None]) for image, mask in pairs]


def draw_mosaics(done: Fit, data: TaskData, seed: int) -> "Figure | None":
    return get_task("semantic-segmentation").picture(done.model, data)


# What things cost


def on_map(build: Callable[[int], nn.Module], channels: int = 64) -> Callable[[int, str], Callable[[], Any]]:
    """A mixer on square maps of some side, forward."""

    def make(side: int, device: str) -> Callable[[], Any]:
        layer = build(channels).to(device).eval()
        x = torch.randn(1, channels, side, side, device=device)

        def call() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return call

    return make


class GlobalAttention(nn.Module):
    """Softmax attention among all positions of a map."""

    def __init__(self, channels: int):
        super().__init__()
        self.attention = SoftmaxAttention(channels, heads=4, causal=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.attention(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(x.shape)


class Dense(nn.Module):
    """A dense depthwise kernel instead of the strips: x ⊙ conv1×1(dw K×K(x))."""

    def __init__(self, channels: int, kernel_size: int = 35):
        super().__init__()
        self.spread = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.point = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.point(self.spread(x))


def on_street(build: Callable[[], BEVANet]) -> Callable[[int, str], Callable[[], Any]]:
    """A network without its training heads on images of some height and twice the width, forward."""

    def make(height: int, device: str) -> Callable[[], Any]:
        model = build().without_training_heads().to(device)
        x = torch.randn(1, 3, height, 2 * height, device=device)

        def call() -> Tensor:
            with torch.no_grad():
                return model(x)

        return call

    return make


def gigamacs(build: Callable[[], BEVANet], size: tuple[int, int]) -> float:
    """Multiply-adds of the deployed form, in 10⁹."""
    with torch.device("meta"):
        model = build().without_training_heads()
        return cost.macs(lambda: model(torch.empty(1, 3, *size))) / 1e9
