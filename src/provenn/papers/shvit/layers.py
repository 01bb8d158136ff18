"""SHSA, single-head attention on a share of the channels, and SHViT's other blocks (Yun and Ro, 2024, section 4)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.narrowing import present
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.channel_gates import PooledGate
from provenn.ops.softmax_attention import softmax_attention

QK_DIM = 16  # of queries and keys, in all of the paper's models
RATIO = 1 / 4.67  # the share of the channels that attend (section 4.1)


class ConvBN(nn.Sequential):
    """BN(conv(x)), the convolution without bias and padded so that a stride of 1 keeps the size.

    Args:
        channels, out: of the input and of the output.
        kernel_size: odd.
        stride, groups: of the convolution.
        scale: the batch norm's first weight; a branch whose last norm has 0 starts as nothing.

    Shapes: (batch, channels, height, width) to (batch, out, ⌈height/stride⌉, ⌈width/stride⌉).
    """

    def __init__(
        self,
        channels: int,
        out: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        scale: float | int = 1.0,
    ):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(channels, out, kernel_size, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out)
        nn.init.constant_(self.norm.weight, scale)


class Residual(nn.Module):
    """y = x + f(x); while training f(x) may be left out, example by example (stochastic depth).

    Args:
        branch: f, which keeps the shape.
        drop: probability with which an example's branch is left out; 0 in all of the paper's models.
    """

    def __init__(self, branch: nn.Module, drop: float | int = 0.0):
        super().__init__()
        self.branch, self.drop = branch, drop

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        y = self.branch(x)
        if self.training and self.drop:
            y = y * F.dropout(y.new_ones(len(y), 1, 1, 1), self.drop)
        return x + y

    def fused(self) -> nn.Module:
        """One convolution instead of x + BN(depth-wise conv(x)): the input is one more tap at the filter's centre.

        Around anything else the sum stays.
        """
        branch = self.branch
        if not isinstance(branch, ConvBN) or branch.conv.groups != branch.conv.in_channels:
            return self
        conv, norm = branch.conv, branch.norm
        if conv.stride != (1, 1) or conv.out_channels != conv.in_channels:
            return self
        mean, variance = present(norm.running_mean, "running_mean"), present(norm.running_var, "running_var")
        height, width = conv.kernel_size
        with torch.no_grad():
            scale = norm.weight * (variance + norm.eps).rsqrt()
            merged = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                (height, width),
                padding=(height // 2, width // 2),
                groups=conv.groups,
            ).to(conv.weight)
            merged.weight.copy_(conv.weight * scale[:, None, None, None])
            merged.weight[:, 0, height // 2, width // 2] += 1
            present(merged.bias, "bias").copy_(norm.bias - mean * scale)
        return merged


class FeedForward(nn.Sequential):
    """BN(conv1×1(ReLU(BN(conv1×1(x))))), `expansion` times wider inside; nothing at first, its last norm being 0."""

    def __init__(self, dim: int, expansion: int = 2):
        super().__init__(ConvBN(dim, dim * expansion), nn.ReLU(), ConvBN(dim * expansion, dim, scale=0.0))


def attended_channels(dim: int, ratio: float | int = RATIO) -> int:
    """C_p, how many of `dim` channels attend: the nearest whole number to the share, at least 1.

    The paper's models have C_p by hand, up to 0.6 from this (68 of 320, 66 of 308).

    >>> [attended_channels(dim) for dim in (224, 320, 448)]
    [48, 69, 96]
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie above 0 and be at most 1, got {ratio}")
    return max(1, round(dim * ratio))


class SingleHeadAttention(nn.Module):
    """Single-head self-attention on the first channels of a map; the others wait and are mixed in at the end (SHSA).

        [X_att, X_res] = split(X),  Q, K, V = BN(conv1×1(GroupNorm(X_att))),
        Y = BN(conv1×1(ReLU([softmax(Q Kᵀ / √d) V, X_res])))   (equations 2 to 5)

    The paper calls the first norm a layer norm; the authors' code has a group norm of one group, whose mean and
    deviation are of all channels and pixels of an image together. No positional encoding, no mask.

    Args:
        dim: C, channels of the map.
        qk_dim: d, of queries and keys.
        pdim: C_p, how many channels attend; by default `ratio` of them.
        ratio: the share of the channels that attend; with 1 all do.

    Shapes: (batch, dim, height, width) to the same. Parameters, norms included: C_p (2d + C_p) + C² + 2 C_p + 2 (2d +
    C_p) + 2C. Slot: map-mixer. Its output is 0 at first: the last norm starts with weights of 0.

    Raises:
        ValueError: `pdim` above `dim`, or sizes that are no whole numbers of at least 1.

    >>> SingleHeadAttention(320, pdim=68)(torch.ones(2, 320, 7, 5)).shape
    torch.Size([2, 320, 7, 5])
    """

    def __init__(self, dim: int, *, qk_dim: int = QK_DIM, pdim: int | None = None, ratio: float | int = RATIO):
        check_whole(dim=dim, qk_dim=qk_dim, pdim=pdim)
        check_finite(ratio=ratio)
        super().__init__()
        if dim < 1 or qk_dim < 1:
            raise ValueError(f"dim and qk_dim must be at least 1, got {dim} and {qk_dim}")
        pdim = attended_channels(dim, ratio) if pdim is None else pdim
        if not 1 <= pdim <= dim:
            raise ValueError(f"pdim must lie between 1 and the {dim} channels, got {pdim}")
        self.dim, self.qk_dim, self.pdim = dim, qk_dim, pdim
        self.norm = nn.GroupNorm(1, pdim)
        self.qkv = ConvBN(pdim, 2 * qk_dim + pdim)
        self.project = nn.Sequential(nn.ReLU(), ConvBN(dim, dim, scale=0.0))

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        attended, rest = self._split(x)
        scores, v = self._scores(attended)
        mixed = v @ scores.transpose(1, 2)
        return self.project(torch.cat([mixed.unflatten(2, x.shape[2:]), rest], dim=1))

    def attention(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch positions positions"]:
        """How much each position (row) attends to each other, positions row by row; rows sum to 1."""
        return self._scores(self._split(x)[0])[0]

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"expected (batch, {self.dim}, height, width), got {tuple(x.shape)}")
        attended, rest = x.split([self.pdim, self.dim - self.pdim], dim=1)
        return attended, rest

    def _scores(self, attended: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(self.norm(attended)).flatten(2).split([self.qk_dim, self.qk_dim, self.pdim], dim=1)
        # The scale goes to the queries, which are d wide where the scores are L wide.
        return ((q * self.qk_dim**-0.5).transpose(1, 2) @ k).softmax(dim=-1), v

    def extra_repr(self) -> str:
        return f"{self.dim}, qk_dim={self.qk_dim}, pdim={self.pdim}"


class MultiHeadAttention(nn.Module):
    """Multi-head attention on all channels, which replaces SHSA in Table 6; norm and projection are SHSA's.

    The authors' code does not have it, so heads, norm and the ReLU before the projection are inferred.

    Args:
        dim: channels of the map.
        heads: must divide `dim`; by default the fewest whose heads have at most 32 channels.

    Shapes: (batch, dim, height, width) to the same. Slot: map-mixer.
    """

    def __init__(self, dim: int, heads: int | None = None):
        check_whole(dim=dim, heads=heads)
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.heads = next(h for h in range(1, dim + 1) if dim % h == 0 and dim // h <= 32) if heads is None else heads
        if self.heads < 1 or dim % self.heads:
            raise ValueError(f"heads must divide the {dim} channels, got {self.heads}")
        self.norm = nn.GroupNorm(1, dim)
        self.qkv = ConvBN(dim, 3 * dim)
        self.project = nn.Sequential(nn.ReLU(), ConvBN(dim, dim, scale=0.0))

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        q, k, v = self._heads(x)
        mixed = softmax_attention(q, k, v).transpose(2, 3).flatten(1, 2)
        return self.project(mixed.unflatten(2, x.shape[2:]))

    def attention(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch heads positions positions"]:
        """How much each position (row) attends to each other, in every head."""
        q, k, _ = self._heads(x)
        return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (batch, heads, positions, channels of a head)."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4).unbind(1)
        return q, k, v


class BottleneckAttention(SingleHeadAttention):
    """A single head in a bottleneck (figure 6): 1×1 down to the share, attention, 1×1 back to all channels.

    What SHSA does, without channels that wait. The authors' code does not have it; the order of norms is inferred.

    Args, shapes: as of `SingleHeadAttention`.
    """

    def __init__(self, dim: int, *, qk_dim: int = QK_DIM, pdim: int | None = None, ratio: float | int = RATIO):
        super().__init__(dim, qk_dim=qk_dim, pdim=pdim, ratio=ratio)
        self.reduce = nn.Sequential(ConvBN(dim, self.pdim), nn.ReLU())
        self.project = nn.Sequential(nn.ReLU(), ConvBN(self.pdim, dim, scale=0.0))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.reduce(x), x[:, :0]


class SqueezeExcite(PooledGate):
    """ω = σ(W₂ ReLU(W₁ y)), both with biases; the bottleneck is a quarter, rounded to a multiple of 8 (half goes up).

    Args:
        channels: C.

    Shapes: as of `PooledGate`.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        hidden = max(8, (channels // 4 + 4) // 8 * 8)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def interact(self, context: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        return self.excite(self.squeeze(context).relu())


class PatchMerging(nn.Sequential):
    """Half the resolution: 1×1 to 4C, depth-wise 3×3 of stride 2, squeeze-excite, 1×1 to `out`; no residual."""

    def __init__(self, dim: int, out: int):
        hidden = 4 * dim
        super().__init__(
            ConvBN(dim, hidden),
            nn.ReLU(),
            ConvBN(hidden, hidden, 3, stride=2, groups=hidden),
            nn.ReLU(),
            SqueezeExcite(hidden),
            ConvBN(hidden, out),
        )


class Downsampling(nn.Sequential):
    """Between two stages: a depth-wise convolution and a feed-forward at each width, patch merging between them.

    Unlike a block's, the norms of these depth-wise convolutions start with weights of 1.
    """

    def __init__(self, dim: int, out: int, drop: float | int = 0.0):
        super().__init__(*self._pair(dim, drop), PatchMerging(dim, out), *self._pair(out, drop))

    @staticmethod
    def _pair(dim: int, drop: float) -> tuple[nn.Module, nn.Module]:
        return Residual(ConvBN(dim, dim, 3, groups=dim), drop), Residual(FeedForward(dim), drop)


class SHViTBlock(nn.Sequential):
    """x ← x + depth-wise conv(x), x ← x + mixer(x) where there is one, x ← x + feed-forward(x); the identity at first.

    Args:
        dim: channels.
        mixer: of space, starting at 0; None in the stages that convolve alone.
        drop: as of `Residual`.
    """

    def __init__(self, dim: int, mixer: nn.Module | None = None, drop: float | int = 0.0):
        super().__init__()
        self.conv = Residual(ConvBN(dim, dim, 3, groups=dim, scale=0.0), drop)
        if mixer is not None:
            self.mixer = Residual(mixer, drop)
        self.ffn = Residual(FeedForward(dim), drop)
