"""How two branches meet: PAG inside the network, BGAF (or PIDNet's Bag) at its end."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.segmentation import resize
from provenn.papers.bevanet.pooling import norm_relu_conv

Maps = Float[Tensor, "batch channels height width"]


class PAG(nn.Module):
    """Pixel-attention-guided fusion (PIDNet, arXiv:2206.02066): the semantic map enters where the two agree.

        s = σ(Σ_c BN(conv1×1(x)) · up(BN(conv1×1(y)))),  output = (1 − s) · x + s · up(y)

    Args:
        channels: of both maps.
        inner: of the product.

    Shapes: x (batch, channels, height, width) and y (batch, channels, h, w) to the shape of x.
    """

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.detail = nn.Sequential(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner))
        self.semantic = nn.Sequential(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner))

    def forward(self, x: Maps, y: Float[Tensor, "batch channels _ _"]) -> Maps:
        size = x.shape[-2:]
        agreement = (self.detail(x) * resize(self.semantic(y), size)).sum(1, keepdim=True).sigmoid()
        return x + agreement * (resize(y, size) - x)


class BGAF(nn.Module):
    """Boundary-guided adaptive fusion of a detail map p and a semantic map i by a boundary map d.

        p ← pre3×3(p), i ← pre3×3(i), e = σ(d),  output = pre3×3(e · p + (1 − e) · i + p + i)

    "pre" is BN, ReLU, convolution; e is a number for each channel and pixel.

    Args:
        channels: of all maps.

    Shapes: three of (batch, channels, height, width) to one.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.detail = norm_relu_conv(channels, channels, 3)
        self.semantic = norm_relu_conv(channels, channels, 3)
        self.join = norm_relu_conv(channels, channels, 3)

    def forward(self, detail: Maps, semantic: Maps, boundary: Maps) -> Maps:
        detail, semantic = self.detail(detail), self.semantic(semantic)
        steered = semantic + boundary.sigmoid() * (detail - semantic)
        return self.join(steered + detail + semantic)


class Bag(nn.Module):
    """Boundary-attention-guided fusion of PIDNet: pre3×3(e · p + (1 − e) · i), e = σ(d).

    Args, shapes: as for `BGAF`.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.join = norm_relu_conv(channels, channels, 3)

    def forward(self, detail: Maps, semantic: Maps, boundary: Maps) -> Maps:
        return self.join(semantic + boundary.sigmoid() * (detail - semantic))


FUSIONS: dict[str, Callable[[int], nn.Module]] = {"bgaf": BGAF, "bag": Bag}
