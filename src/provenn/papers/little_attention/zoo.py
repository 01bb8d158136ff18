"""The attention blocks that C-NL is compared with, each as its authors' public code has it, and one way to make them.

Non-local and relation-aware attention are computed without their maps of positions × positions where the arithmetic
allows; `fused=False` forms the maps, as the definitions say.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_whole
from provenn.nn.channel_gates import PooledGate, SqueezeExcitation, spatial_mean
from provenn.ops.autograd import at_least_single, without_autocast
from provenn.ops.softmax_attention import softmax_attention
from provenn.papers.little_attention.harmonious import HarmoniousAttention, HarmoniousChannelAttention
from provenn.papers.little_attention.layers import FEWEST, ChannelNonLocal

Map = Float[Tensor, "batch channels height width"]


def _check(channels: int, reduction: int = 1) -> None:
    check_whole(channels=channels, reduction=reduction)
    if channels < 1 or reduction < 1:
        raise ValueError(f"channels and reduction must be at least 1, got {channels} and {reduction}")


class ECA(PooledGate):
    """x · σ(conv1d_k(means)), k odd and near log₂(C)/2 + 1/2 (Wang et al., 2020, arXiv:1910.03151, equations 9 and 12).

    Args:
        channels: C.

    Parameters: k: 5, 5, 5 and 7 for 256, 512, 1024 and 2048 channels. Slot: channel-gate.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        size = int(abs((math.log2(channels) + 1) / 2))
        size += 1 - size % 2
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def interact(self, context: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        return self.conv(context[:, None])[:, 0]


class CBAM(nn.Module):
    """CBAM with biases and a batch norm on the spatial gate, as its public code has it (Woo et al., arXiv:1807.06521).

    x' = σ(MLP(mean) + MLP(max)) · x,  x'' = σ(BN(conv₇ₓ₇[max_c x'; mean_c x'])) · x'

    Args:
        channels: C.
        reduction: r of the MLP.

    Parameters: 2C²/r + C + C/r + 100. Slot: channel-gate.
    """

    def __init__(self, channels: int, reduction: int = 16):
        _check(channels, reduction)
        super().__init__()
        inner = max(channels // reduction, 1)
        self.mlp = nn.Sequential(nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, channels))
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)

    def spatial_gate(self, x: Map) -> Float[Tensor, "batch 1 height width"]:
        """Of positions, in (0, 1); `x` is gated by channel already."""
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return self.bn(self.conv(pooled)).sigmoid()

    def forward(self, x: Map) -> Map:
        by_channel = self.mlp(spatial_mean(x)) + self.mlp(x.amax((2, 3)))
        x = x * by_channel.sigmoid()[:, :, None, None]
        return x * self.spatial_gate(x)


class BAM(nn.Module):
    """x · (1 + σ(M_c + M_s)): a bottleneck on means, and two dilated 3×3 convolutions (Park et al., arXiv:1807.06514).

    The sum is the paper's equation 2; its public code multiplies.

    Args:
        channels: C.
        reduction: r of both branches.
        dilation: of the 3×3 convolutions.

    Parameters: 3C²/r + C + C/r·(13 + 18·C/r) + 1. Slot: channel-gate.
    """

    def __init__(self, channels: int, reduction: int = 16, dilation: int = 4):
        _check(channels, reduction)
        check_whole(dilation=dilation)
        super().__init__()
        if dilation < 1:
            raise ValueError(f"dilation must be at least 1, got {dilation}")
        inner = max(channels // reduction, 1)
        self.squeeze, self.bn, self.excite = (
            nn.Linear(channels, inner),
            nn.BatchNorm1d(inner),
            nn.Linear(inner, channels),
        )
        layers: list[nn.Module] = [nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner), nn.ReLU()]
        for _ in range(2):
            layers += [
                nn.Conv2d(inner, inner, 3, padding=dilation, dilation=dilation),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
            ]
        self.spatial = nn.Sequential(*layers, nn.Conv2d(inner, 1, 1))

    def forward(self, x: Map) -> Map:
        by_channel = self.excite(self.bn(self.squeeze(spatial_mean(x))).relu())
        return x * (1 + (by_channel[:, :, None, None] + self.spatial(x)).sigmoid())


class GlobalContext(nn.Module):
    """GC: x + W₂ ReLU(LN(W₁ Σ_p α_p x_p)), α = softmax over positions of w·x_p (Cao et al., 2019, arXiv:1904.11492).

    W₂ starts at 0, so that a fresh block is the identity.

    Args:
        channels: C.
        reduction: r of the bottleneck, which is never narrower than 4: a norm of one number is 0.

    Parameters: 2C²/r + 2C + 3C/r + 1. Slot: channel-gate.
    """

    def __init__(self, channels: int, reduction: int = 16):
        _check(channels, reduction)
        super().__init__()
        inner = max(channels // reduction, FEWEST)
        self.mask = nn.Conv2d(channels, 1, 1)
        self.squeeze, self.norm, self.excite = (
            nn.Linear(channels, inner),
            nn.LayerNorm(inner),
            nn.Linear(inner, channels),
        )
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)

    def forward(self, x: Map) -> Map:
        weights = at_least_single(self.mask(x).flatten(2)).softmax(-1).to(x.dtype)
        context = (x.flatten(2) @ weights.transpose(1, 2))[..., 0]
        return x + self.excite(self.norm(self.squeeze(context)).relu())[:, :, None, None].to(x.dtype)


class NonLocal(nn.Module):
    """x + BN(W (A g)), A = θ φᵀ / N over N positions, or its softmax (Wang et al., 2018, arXiv:1711.07971).

    Of "dot" the products are taken in the order that costs less: θ (φᵀ g) / N where C' is below N. Of "softmax"
    PyTorch's fused attention is taken. BN starts with gain and bias of 0: a fresh block is the identity.

    Args:
        channels: C.
        inner: C'; C/2 by default. AGW's public code has 1, of "dot".
        norm: "dot" as in AGW (Ye et al., 2021, arXiv:2001.04193), or "softmax", the embedded Gaussian.
        fused: False forms A.

    Shapes: (batch, channels, height, width) to the same. Parameters: 4CC' + 3C' + 3C. Slot: map-mixer.
    """

    def __init__(
        self,
        channels: int,
        inner: int | None = None,
        *,
        norm: str = "dot",
        fused: bool = True,
    ):
        _check(channels)
        inner = max(channels // 2, 1) if inner is None else inner
        check_whole(inner=inner)
        if inner < 1:
            raise ValueError(f"inner must be at least 1, got {inner}")
        if norm not in ("dot", "softmax"):
            raise ValueError(f"norm must be one of dot, softmax, got {norm!r}")
        super().__init__()
        self.norm, self.fused, self.inner = norm, fused, inner
        self.theta, self.phi, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out, self.bn = nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn.weight)
        nn.init.zeros_(self.bn.bias)

    def forward(self, x: Map) -> Map:
        theta, phi, g = (part(x).flatten(2).transpose(1, 2) for part in (self.theta, self.phi, self.g))
        count = theta.shape[1]
        if self.norm == "dot":
            # In half precision sums over all positions overflow before they are divided.
            phi = phi / count
            # An open size is not asked how large it is.
            by_channels = self.fused and (isinstance(count, torch.SymInt) or self.inner < count)
            gathered = theta @ (phi.transpose(1, 2) @ g) if by_channels else (theta @ phi.transpose(1, 2)) @ g
        elif self.fused:
            q, k, v = (part[:, None].contiguous() for part in (theta, phi, g))
            gathered = softmax_attention(q, k, v, scale=1.0)[:, 0]
        else:
            gathered = at_least_single(theta @ phi.transpose(1, 2)).softmax(-1).to(g.dtype) @ g
        return x + self.bn(self.out(gathered.transpose(1, 2).unflatten(2, x.shape[2:])))


class PositionAttention(nn.Module):
    """ABD-PAM: γ · softmax(q kᵀ) v + x over positions, q and k of C/8 channels; γ starts at 0 (Chen et al., 2019).

    ABD-Net is arXiv:1908.01114; its block is that of DANet.

    Args:
        channels: C.
        fused: True never forms the map of weights, by PyTorch's fused attention. It wants queries as wide as values:
            filled up with zeros they take eight times the products, so it saves memory and no time.

    Shapes: (batch, channels, height, width) to the same. Parameters: C² + C²/4 + 5C/4 + 1. Slot: map-mixer.
    """

    def __init__(self, channels: int, *, fused: bool = False):
        _check(channels)
        super().__init__()
        inner = max(channels // 8, 1)
        self.query, self.key = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value, self.gamma, self.fused = nn.Conv2d(channels, channels, 1), nn.Parameter(torch.zeros(1)), fused

    def forward(self, x: Map) -> Map:
        q, k, v = (part(x).flatten(2).transpose(1, 2) for part in (self.query, self.key, self.value))
        if self.fused:
            # Zeros up to the width of the values add nothing to the products, and one width is what kernels take.
            wide = (F.pad(part, (0, v.shape[-1] - part.shape[-1])) for part in (q, k))
            q, k, v = (part[:, None].contiguous() for part in (*wide, v))
            gathered = softmax_attention(q, k, v, scale=1.0)[:, 0]
        else:
            gathered = at_least_single(q @ k.transpose(1, 2)).softmax(-1).to(v.dtype) @ v
        return self.gamma * gathered.transpose(1, 2).unflatten(2, x.shape[2:]) + x


class ChannelAffinity(nn.Module):
    """ABD-CAM: γ · A X + x, A = softmax(max(E) − E), E = X Xᵀ over channels; γ starts at 0 (Chen et al., 2019).

    Channels that look least alike weigh most, as in the public code. A has C × C numbers.

    Args:
        channels: C.

    Shapes: (batch, channels, height, width) to the same. Parameters: 1. Slot: channel-gate.
    """

    def __init__(self, channels: int):
        _check(channels)
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Map) -> Map:
        flat = at_least_single(x.flatten(2))
        with without_autocast(flat):
            energy = flat @ flat.transpose(1, 2)
            gathered = (energy.amax(-1, keepdim=True) - energy).softmax(-1) @ flat
        return self.gamma * gathered.to(x.dtype).view_as(x) + x


class RelationAware(nn.Module):
    """RGA: gate each of N nodes by its relations to all of them (Zhang et al., 2020, arXiv:1904.02998, section 3).

        G = θᵀ φ ∈ R^{N×N},  j = ReLU(BN(W [Gᵀ; G])),  z = [mean of g; j],  y = σ(BN(W₂ ReLU(BN(W₁ z)))) · x

    θ, φ and g are ReLU(BN(·)) of 1×1 maps. Nodes are positions (RGA-S) or channels (RGA-C). W maps G linearly, so that
    W_in Gᵀ + W_out G = (W_in φᵀ) θ + (W_out θᵀ) φ: by default G is never formed.

    Args:
        channels, height, width: of the map; others are refused.
        over: what the nodes are, "positions" or "channels".
        ratio: by which θ, φ, g, j and z are narrower.
        fused: False forms G.

    Shapes: (batch, channels, height, width) to the same.

    Raises:
        ValueError: a map of another size, since W has a weight for each node.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        over: str = "positions",
        *,
        ratio: int = 8,
        fused: bool = True,
    ):
        check_whole(channels=channels, height=height, width=width, ratio=ratio)
        if min(channels, height, width, ratio) < 1:
            raise ValueError(
                f"channels, height, width and ratio must be at least 1, got {channels}, {height}, {width} and {ratio}"
            )
        if over not in ("positions", "channels"):
            raise ValueError(f"over must be one of positions, channels, got {over!r}")
        super().__init__()
        self.shape, self.over, self.fused = (channels, height, width), over, fused
        nodes, features = (height * width, channels) if over == "positions" else (channels, height * width)
        inner, joint = max(features // ratio, 1), max(nodes // ratio, 1)
        hidden = max((1 + joint) // ratio, 1)
        self.theta, self.phi, self.g = (_embedding(features, inner) for _ in range(3))
        self.join, self.join_bn = nn.Conv1d(2 * nodes, joint, 1, bias=False), nn.BatchNorm1d(joint)
        self.weigh = nn.Sequential(
            *_embedding(1 + joint, hidden), nn.Conv1d(hidden, 1, 1, bias=False), nn.BatchNorm1d(1)
        )

    def gate(self, x: Map) -> Float[Tensor, "batch 1 nodes"]:
        """Of each node, in (0, 1)."""
        if x.shape[1:] != self.shape:
            expected, came = " × ".join(map(str, self.shape)), " × ".join(map(str, x.shape[1:]))
            raise ValueError(f"this block relates the nodes of maps of {expected}, got {came}: build it for that size")
        nodes = x.flatten(2) if self.over == "positions" else x.flatten(2).transpose(1, 2)
        theta, phi, g = self.theta(nodes), self.phi(nodes), self.g(nodes)
        if self.fused:
            into, out = self.join.weight[..., 0].chunk(2, 1)
            joined = (into @ phi.transpose(1, 2)) @ theta + (out @ theta.transpose(1, 2)) @ phi
        else:
            relations = theta.transpose(1, 2) @ phi
            joined = self.join(torch.cat([relations.transpose(1, 2), relations], 1))
        joined = self.join_bn(joined).relu()
        return self.weigh(torch.cat([g.mean(1, keepdim=True), joined], 1)).sigmoid()

    def forward(self, x: Map) -> Map:
        gate = self.gate(x)
        return x * (gate.unflatten(2, self.shape[1:]) if self.over == "positions" else gate.transpose(1, 2)[..., None])


def _embedding(features: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(features, inner, 1, bias=False), nn.BatchNorm1d(inner), nn.ReLU())


def _both(channels: int, height: int, width: int, **options: Any) -> nn.Module:
    """RGA-SC: by positions, then by channels."""
    return nn.Sequential(
        RelationAware(channels, height, width, **options), RelationAware(channels, height, width, "channels", **options)
    )


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "cnl": ChannelNonLocal,
    "se": SqueezeExcitation,
    "hac": HarmoniousChannelAttention,
    "ha": HarmoniousAttention,
    "eca": ECA,
    "cbam": CBAM,
    "bam": BAM,
    "gc": GlobalContext,
    "nonlocal": NonLocal,
    "pam": PositionAttention,
    "cam": ChannelAffinity,
    "rga_s": RelationAware,
    "rga_c": lambda channels, height, width, **options: RelationAware(channels, height, width, "channels", **options),
    "rga_sc": _both,
}
SIZED = ("rga_s", "rga_c", "rga_sc")  # what is built for maps of one size


def make_block(
    name: str, channels: int, height: int | None = None, width: int | None = None, **options: Any
) -> nn.Module:
    """A block of the zoo, by name.

    Args:
        name: a key of `BLOCKS`. "cnl" is our reconstruction.
        channels, height, width: of the maps; the last two for RGA alone, which needs them.
        options: of the block's class, such as reduction=2, inner=1 or fused=False.

    Raises:
        ValueError: no such block, or an RGA block without the size of its maps.
    """
    if name not in BLOCKS:
        raise ValueError(f"no block is called {name!r}; there are: {', '.join(BLOCKS)}")
    if name not in SIZED:
        return BLOCKS[name](channels, **options)
    if height is None or width is None:
        raise ValueError(f"{name} relates all places of a map: it needs height and width of the maps")
    return BLOCKS[name](channels, height, width, **options)
