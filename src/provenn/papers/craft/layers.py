"""The blocks of CRAFT (Li et al., 2023, arXiv:2308.05022), section 3: SRWAB, HFERB and HFB."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.norms import ChannelNorm
from provenn.nn.padding import PadToMultiple
from provenn.ops.softmax_attention import softmax_attention


class PositionBias(nn.Module):
    """One number a head for each relative offset inside a window, from a small network over (Δh, Δw).

    b = MLP(Δh, Δw), the MLP having three hidden layers of `width`, each followed by layer normalisation and ReLU.
    With `width` 1, the published one, the normalisation over a single number returns its own bias whatever comes in:
    b is then the same for all offsets, and a softmax does not see it.

    Args:
        window: height and width of the window, in pixels.
        heads: how many numbers an offset is given.
        width: p, the hidden width of the MLP.

    Shapes: nothing to (heads, tokens, tokens), where tokens = height · width of the window.
    """

    offsets: Tensor
    index: Tensor

    def __init__(self, window: tuple[int, int], heads: int, width: int):
        super().__init__()
        height, columns = window
        self.embed = nn.Linear(2, width)
        self.hidden = nn.Sequential(
            # The authors' order: norm and ReLU stand before each map, and none of the three is residual.
            *(layer for _ in range(2) for layer in (nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width)))
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, heads))
        offsets = torch.cartesian_prod(torch.arange(1 - height, height), torch.arange(1 - columns, columns))
        pixel = torch.cartesian_prod(torch.arange(height), torch.arange(columns))
        offset = pixel[:, None] - pixel[None] + torch.tensor([height - 1, columns - 1])
        self.register_buffer("offsets", offsets.float(), persistent=False)
        # (tokens, tokens), rows of the table of (2h − 1)(2w − 1) offsets: the MLP runs once an offset, not once a pair.
        self.register_buffer("index", offset[..., 0] * (2 * columns - 1) + offset[..., 1], persistent=False)

    @property
    def constant(self) -> bool:
        """Whether b is the same for every offset, so that the softmax cancels it."""
        return self.embed.out_features == 1

    def forward(self) -> Float[Tensor, "heads tokens tokens"]:
        table = self.head(self.hidden(self.embed(self.offsets.to(self.embed.weight.dtype))))
        return table[self.index].permute(2, 0, 1)


class RectangleWindowAttention(nn.Module):
    """Softmax attention in 4×16 windows for one half of the channels and in 16×4 windows for the other half.

    A = softmax(q kᵀ / √d + b), output A v, in each window and head.

    Args:
        dim: C, the number of channels; each half has `heads` / 2 heads.
        heads: number of heads over both halves.
        window: (short, long) side of the windows, in pixels.
        shifted: move the windows by half their size, cyclically.
        wrap: let shifted windows attend across opposite borders, as the authors' code does; False masks that out.
        position_dim: hidden width of the position bias; by default the published rule, at least 1.

    Shapes: q, k, v side by side (batch, height, width, 3·dim) to (batch, height, width, dim); height and width are
    multiples of both window sides.
    Raises: ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 6,
        *,
        window: tuple[int, int] = (4, 16),
        shifted: bool = False,
        wrap: bool = True,
        position_dim: int | None = None,
    ):
        check_whole(dim=dim, heads=heads, position_dim=position_dim)
        super().__init__()
        _check_heads(dim, heads, even=True)
        short, long = window
        if short < 1 or long < short or long % short:
            raise ValueError(f"window must be (short, long) with long a multiple of short, got {window}")
        if position_dim is not None and position_dim < 1:
            raise ValueError(f"position_dim must be at least 1, got {position_dim}")
        self.heads = heads
        self.windows = ((short, long), (long, short))
        self.shifts = tuple((h // 2, w // 2) if shifted else (0, 0) for h, w in self.windows)
        self.wrap = wrap
        # The authors' rule ((C/2)//4)//4 gives 1 for C = 48, and 0 for less than 32 channels.
        # A departure below 32 channels, where the authors' rule leaves the network without a hidden feature.
        width = position_dim or max(1, dim // 2 // 4 // 4)
        self.bias = nn.ModuleList(PositionBias(size, heads // 2, width) for size in self.windows)
        # What adds the same to all offsets the softmax cancels: at width 1 the whole of b, else the last layer's bias.
        # Such parameters have no gradient; they stay for the authors' weights.
        for bias in self.bias:
            cancelled: nn.Module | Tensor = bias if width == 1 else bias.head[-1].bias  # type: ignore[index, union-attr]  # Sequential
            cancelled.requires_grad_(False)

    def forward(
        self, qkv: Float[Tensor, "batch height width channels3"]
    ) -> Float[Tensor, "batch height width channels"]:
        height, width = qkv.shape[1:3]
        long = self.windows[1][0]
        if height % long or width % long:
            raise ValueError(f"height and width must be multiples of {long}, got {height}×{width}")
        # (half, batch, height, width, 3, dim / 2): q, k and v of the channels that each shape of window serves.
        halves = rearrange(qkv, "b h w (three half c) -> half b h w three c", three=3, half=2)
        windowed = zip(halves, self.windows, self.shifts, self.bias)
        return torch.cat([self._attend(*half) for half in windowed], dim=-1)

    def _attend(self, qkv: Tensor, window: tuple[int, int], shift: tuple[int, int], bias: nn.Module) -> Tensor:
        batch, height, width = qkv.shape[:3]
        window_sides = dict(zip("rc", window))
        if any(shift):
            # Cyclic: the authors' code takes a mask and always passes None, so opposite borders attend to each other.
            qkv = qkv.roll((-shift[0], -shift[1]), dims=(1, 2))
        heads = self.heads // 2
        to_windows = "b (i r) (j c) three (head d) -> three (b i j) head (r c) d"
        q, k, v = rearrange(qkv, to_windows, head=heads, **window_sides)
        # A bias that the softmax cancels is left out, so that fused attention needs no mask.
        mask = None if bias.constant else bias()[None].to(q.dtype)
        if any(shift) and not self.wrap:
            visible = windows_without_wrap(height, width, window, shift, device=q.device).repeat(batch, 1, 1)[:, None]
            mask = visible if mask is None else mask.masked_fill(~visible, -torch.inf)
        y = softmax_attention(q, k, v, mask=mask)
        to_map = "(b i j) head (r c) d -> b (i r) (j c) (head d)"
        y = rearrange(y, to_map, b=batch, i=height // window[0], j=width // window[1], **window_sides)
        return y.roll(shift, dims=(1, 2)) if any(shift) else y


def windows_without_wrap(
    height: int,
    width: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    *,
    device: torch.device | None = None,
) -> Bool[Tensor, "windows tokens tokens"]:
    """Which tokens of a cyclically shifted window may see each other when opposite borders are kept apart.

    Args:
        height, width: size of the map, in pixels.
        window: rows and columns of a window.
        shift: rows and columns by which the map was rolled back before it was cut.
        device: where the mask is made.
    """
    rows = (torch.arange(height, device=device) >= height - shift[0]).long()
    columns = (torch.arange(width, device=device) >= width - shift[1]).long()
    # Four regions, by whether a pixel came round in rows, in columns, in both or in neither.
    region = rearrange(rows[:, None] * 2 + columns, "(i r) (j c) -> (i j) (r c)", r=window[0], c=window[1])
    return region[:, :, None] == region[:, None, :]


class SRWAB(nn.Module):
    """Shifted rectangle-window attention block: the global representation (section 3.2).

    u = LN(x); q, k, v = Linear(u); x ← x + Linear(attention(q, k, v) + depthwise3×3(v)); x ← x + MLP(LN(x))

    Args:
        dim: C, the number of channels.
        heads: number of heads, half of them for each window shape.
        window, shifted, wrap, position_dim: as in `RectangleWindowAttention`.

    Shapes: (batch, dim, height, width) to the same; height and width are multiples of the long window side, which
    `padded_srwab` sees to.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 6,
        *,
        window: tuple[int, int] = (4, 16),
        shifted: bool = False,
        wrap: bool = True,
        position_dim: int | None = None,
    ):
        check_whole(dim=dim, heads=heads, position_dim=position_dim)
        super().__init__()
        _check_heads(dim, heads, even=True)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attention = RectangleWindowAttention(
            dim, heads, window=window, shifted=shifted, wrap=wrap, position_dim=position_dim
        )
        # As published the position bias is constant, so this convolution alone distinguishes the tokens of a window.
        self.locality = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.project = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        tokens = x.permute(0, 2, 3, 1)
        qkv = self.qkv(self.norm1(tokens))
        # v of the whole map before it is cut or rolled: the convolution crosses the windows' borders.
        v = qkv[..., 2 * tokens.shape[-1] :].permute(0, 3, 1, 2)
        local = self.locality(v).permute(0, 2, 3, 1)
        tokens = tokens + self.project(self.attention(qkv) + local)
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.permute(0, 3, 1, 2)


def padded_srwab(
    dim: int, heads: int = 6, *, shifted: bool = False, wrap: bool = True, position_dim: int | None = None
) -> PadToMultiple:
    """An SRWAB for maps of any size, continued by their mirror image where a window is not full. Slot: map-mixer."""
    # 16 is the long side; of two branches cut in 4×16 and in 16×4, both sides must be multiples of it.
    return PadToMultiple(SRWAB(dim, heads, shifted=shifted, wrap=wrap, position_dim=position_dim), 16)


class HFERB(nn.Module):
    """High-frequency enhancement residual block: convolution and max-pooling side by side (section 3.3).

    high = x + conv1×1([GELU(conv3×3(x₁)), GELU(conv1×1(pool(x₂)))]), x₁ and x₂ being the halves of the channels

    Args:
        dim: C, the number of channels, even.
        pool: what stands in for the published 3×3 max-pooling (stride 1).

    Shapes: (batch, dim, height, width) to the same. Slot: map-mixer.
    """

    def __init__(self, dim: int, *, pool: Callable[[], nn.Module] | None = None):
        check_whole(dim=dim)
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even and at least 2, got {dim}")
        self.local = nn.Conv2d(dim // 2, dim // 2, 3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1) if pool is None else pool()
        self.sharp = nn.Conv2d(dim // 2, dim // 2, 1)
        self.merge = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        smooth, sharp = x.chunk(2, dim=1)
        # Max-pooling keeps a neighbourhood's largest value and so its edges, where an average would smooth them.
        branches = F.gelu(self.local(smooth)), F.gelu(self.sharp(self.pool(sharp)))
        return x + self.merge(torch.cat(branches, dim=1))


class InterAttention(nn.Module):
    """Attention across channels, where the high-frequency branch asks and the global branch answers (section 3.4).

    A = softmax(τ · q̂ k̂ᵀ), output conv1×1(A v); q̂ and k̂ have unit length over the positions of the map.

    Args:
        dim: C, the number of channels.
        heads: number of heads; A has (dim / heads)² entries for each, whatever the size of the map.

    Shapes: low and high (batch, dim, height, width) to the same.
    """

    def __init__(self, dim: int, heads: int = 6):
        check_whole(dim=dim, heads=heads)
        super().__init__()
        _check_heads(dim, heads)
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.q = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), depthwise(dim))
        self.kv = nn.Sequential(nn.Conv2d(dim, 2 * dim, 1, bias=False), depthwise(2 * dim))
        self.project = nn.Conv2d(dim, dim, 1, bias=False)

    def cosines(
        self, q: Float[Tensor, "batch heads channels positions"], k: Float[Tensor, "batch heads channels positions"]
    ) -> Float[Tensor, "batch heads channels channels"]:
        """q̂ k̂ᵀ, each entry between -1 and 1."""
        # A sum of squares over 10⁴ positions overflows half precision.
        precise = torch.promote_types(q.dtype, torch.float32)
        # 1e-12 is the authors' floor; a map of zeros has cosines of 0.
        q, k = (F.normalize(t.to(precise), dim=-1, eps=1e-12) for t in (q, k))
        return q @ k.transpose(-2, -1)

    def forward(
        self, low: Float[Tensor, "batch dim height width"], high: Float[Tensor, "batch dim height width"]
    ) -> Float[Tensor, "batch dim height width"]:
        q, k, v = (
            rearrange(t, "b (head c) h w -> b head c (h w)", head=self.heads)
            for t in (self.q(high), *self.kv(low).chunk(2, dim=1))
        )
        # (batch, heads, c, c), c = dim / heads: linear in pixels, where attention over positions would be quadratic.
        weights = (self.temperature * self.cosines(q, k)).softmax(dim=-1)
        mixed = weights.to(v.dtype) @ v
        return self.project(mixed.reshape(low.shape))


class GDFN(nn.Module):
    """Gated feed-forward of Restormer: conv1×1, depthwise3×3, GELU(first half) · second half, conv1×1, no bias.

    Args:
        dim: C, the number of channels.
        expansion: the hidden width is ⌊expansion · dim⌋, 127 for 48 channels.

    Shapes: (batch, dim, height, width) to the same.
    """

    def __init__(self, dim: int, expansion: float = 2.66):
        check_whole(dim=dim)
        check_finite(expansion=expansion)
        super().__init__()
        # Rounded down, as the authors' code has it: 127 for 48 channels, odd as it is.
        hidden = int(dim * expansion)
        self.expand = nn.Sequential(nn.Conv2d(dim, 2 * hidden, 1, bias=False), depthwise(2 * hidden))
        self.project = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        gate, value = self.expand(x).chunk(2, dim=1)
        return self.project(F.gelu(gate) * value)


class HFB(nn.Module):
    """Hybrid fusion block: the high-frequency prior refines the global representation (section 3.4).

    y = low + attention(LN(low), high); y ← y + GDFN(LN(y))

    Args:
        dim: C, the number of channels.
        heads: number of heads of the attention across channels.
        expansion: of the GDFN.

    Shapes: low and high (batch, dim, height, width) to the same. Multiplying `high` by a positive number changes
    nothing: it is not normalised, but the query that it becomes is, and no convolution has a bias.
    """

    def __init__(self, dim: int, heads: int = 6, *, expansion: float = 2.66):
        super().__init__()
        _check_heads(dim, heads)
        self.norm1 = ChannelNorm(dim)
        self.attention = InterAttention(dim, heads)
        self.norm2 = ChannelNorm(dim)
        self.feed = GDFN(dim, expansion)

    def forward(
        self, low: Float[Tensor, "batch dim height width"], high: Float[Tensor, "batch dim height width"]
    ) -> Float[Tensor, "batch dim height width"]:
        # `high` enters as it is, and the residual is `low`: the authors' code norms the one branch alone.
        y = low + self.attention(self.norm1(low), high)
        return y + self.feed(self.norm2(y))


def _check_heads(dim: int, heads: int, even: bool = False) -> None:
    if dim < 1 or heads < 1 or dim % heads or (even and heads % 2):
        raise ValueError(f"heads must {'be even and ' * even}divide dim, got heads={heads} and dim={dim}")


def depthwise(dim: int) -> nn.Conv2d:
    """3×3 convolution of each channel by itself, without bias."""
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
