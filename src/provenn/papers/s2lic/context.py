"""S2LIC's contexts (arXiv:2403.14471): what the decoded slices tell about the next one, and the checkerboard."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError

Map = Float[Tensor, "batch channels height width"]
Out = Float[Tensor, "batch out height width"]


def anchors(x: Tensor) -> Tensor:
    """1 on the sites of the first pass, (row + column) odd, 0 elsewhere: (height, width) of `x`, in its type."""
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape[-2:])
    return ((rows[:, None] + columns[None]) % 2).to(x.dtype)


def squeeze(x: Map, anchor: bool) -> Tensor:
    """The sites of one pass side by side: (…, height, width) to (…, height, width/2); the width is even.

    Raises:
        UserError: the width is odd.
    """
    if x.shape[-1] % 2:
        raise UserError(f"a checkerboard is squeezed at an even width, got {x.shape[-1]}")
    even, odd = x[..., ::2], x[..., 1::2]
    first = torch.arange(x.shape[-2], device=x.device)[:, None] % 2 == int(anchor)
    return torch.where(first, even, odd)


def unsqueeze(x: Map, anchor: bool) -> Tensor:
    """The inverse of `squeeze`, zeros on the other pass's sites: (…, height, width/2) to (…, height, width)."""
    first = torch.arange(x.shape[-2], device=x.device)[:, None] % 2 == int(anchor)
    zero = torch.zeros_like(x)
    return torch.stack([torch.where(first, x, zero), torch.where(first, zero, x)], -1).flatten(-2)


class SpatialMap(nn.Module):
    """One logit a site: conv1×1 to max(1, dim/16), batch norm, GELU, conv1×1 (widths inferred).

    Shapes: (batch, dim, height, width) to (batch, 1, height, width).
    """

    def __init__(self, dim: int):
        super().__init__()
        inner = max(1, dim // 16)
        self.net = nn.Sequential(nn.Conv2d(dim, inner, 1), nn.BatchNorm2d(inner), nn.GELU(), nn.Conv2d(inner, 1, 1))

    def forward(self, x: Map) -> Tensor:
        return self.net(x)


class ChannelMap(nn.Module):
    """One logit a channel: mean over sites, conv1×1 to max(1, dim/8), batch norm, GELU, conv1×1 (widths inferred).

    Shapes: (batch, dim, height, width) to (batch, dim, 1, 1).

    Raises:
        UserError: in training with a batch of one, for which batch norm has no variance.
    """

    def __init__(self, dim: int):
        super().__init__()
        inner = max(1, dim // 8)
        self.net = nn.Sequential(nn.Conv2d(dim, inner, 1), nn.BatchNorm2d(inner), nn.GELU(), nn.Conv2d(inner, dim, 1))

    def forward(self, x: Map) -> Tensor:
        if self.training and x.shape[0] == 1:
            raise UserError("the channel map normalises over the batch: train with a batch of at least 2")
        return self.net(x.mean((2, 3), keepdim=True))


def _local(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.BatchNorm2d(dim), nn.GELU())


class ChannelContext(nn.Module):
    """AC, the adaptive channel-wise context: conv1×1(a·σ(Smap(v)) + v·σ(Cmap(a))).

    a = GELU(conv3×3(GELU(conv3×3(u)))); v = GELU(BN(depth-wise conv3×3(u))). The last convolution is inferred.

    Args:
        dim: channels decoded so far.
        out: channels of the context, published 64.

    Shapes: (batch, dim, height, width) to (batch, out, height, width).
    """

    def __init__(self, dim: int, out: int = 64):
        super().__init__()
        conv = [nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2)]
        self.attention = nn.Sequential(conv[0], nn.GELU(), conv[1], nn.GELU())
        self.local = _local(dim)
        self.spatial, self.channel, self.out = SpatialMap(dim), ChannelMap(dim), nn.Conv2d(dim, out, 1)

    def forward(self, u: Map) -> Out:
        a, v = self.attention(u), self.local(u)
        return self.out(a * self.spatial(v).sigmoid() + v * self.channel(a).sigmoid())


class DeformableAttention(nn.Module):
    """All sites ask points that the queries move: softmax(q·kᵀ/√head)·v, k and v of `u` sampled at reference + Δ.

    Δ = tanh(offsets(q))·reach/size in coordinates −1…1; references are the centres of a grid coarser by `stride`.
    Samples outside are zero. The offsets start at zero. Stride, reach and start are inferred.

    Args:
        dim: channels, a multiple of `head`.
        head: channels of a head, published 32.
        stride: how much coarser the sampled grid is; 4 suits large pictures.
        reach: how far a point may move, in half cells of the sampled grid: 2 is one cell.

    Shapes: (batch, dim, height, width) to the same.

    Raises:
        UserError: `dim` is no multiple of `head`.
    """

    def __init__(self, dim: int, head: int = 32, stride: int = 2, reach: float = 2.0):
        super().__init__()
        if dim % head:
            raise UserError(f"dim must be a multiple of the head's {head} channels, got {dim}")
        self.heads, self.reach = dim // head, reach
        self.q, self.k, self.v = (nn.Conv2d(dim, dim, 1) for _ in range(3))
        last = nn.Conv2d(head, 2, 1, bias=False)
        nn.init.zeros_(last.weight)
        spread = nn.Conv2d(head, head, 5, stride=stride, padding=2, groups=head)
        self.offsets = nn.Sequential(spread, nn.GELU(), last)

    def forward(self, u: Map) -> Map:
        batch, dim, height, width = u.shape
        q = self.q(u)
        moved = self.offsets(q.reshape(batch * self.heads, dim // self.heads, height, width))
        rows, columns = moved.shape[-2:]
        size = moved.new_tensor([rows, columns])
        y, x = ((2 * torch.arange(n, device=u.device, dtype=u.dtype) + 1) / n - 1 for n in (rows, columns))
        at = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
        at = at + moved.permute(0, 2, 3, 1).tanh() * self.reach / size
        parts = u.reshape(batch * self.heads, dim // self.heads, height, width)
        sampled = F.grid_sample(parts, at.flip(-1), align_corners=False).reshape(batch, dim, rows, columns)
        q, k, v = (
            m.flatten(2).unflatten(1, (self.heads, dim // self.heads)).transpose(2, 3)
            for m in (q, self.k(sampled), self.v(sampled))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(u.shape)


class GlobalContext(nn.Module):
    """AG, the adaptive global-inter context: conv1×1(a·σ(Cmap(v)) + v·σ(Smap(a))).

    a = conv5×5(deformable attention(u)); v as in `ChannelContext`. The last convolution is inferred.

    Args:
        dim: channels decoded so far, a multiple of `head`.
        out: channels of the context, published 32.
        head: channels of a head, published 32.
        stride: how much coarser the sampled grid is.

    Shapes: (batch, dim, height, width) to (batch, out, height, width).
    """

    def __init__(self, dim: int, out: int = 32, head: int = 32, stride: int = 2):
        super().__init__()
        self.attention = nn.Sequential(DeformableAttention(dim, head, stride), nn.Conv2d(dim, dim, 5, padding=2))
        self.local = _local(dim)
        self.spatial, self.channel, self.out = SpatialMap(dim), ChannelMap(dim), nn.Conv2d(dim, out, 1)

    def forward(self, u: Map) -> Out:
        a, v = self.attention(u), self.local(u)
        return self.out(a * self.channel(v).sigmoid() + v * self.spatial(a).sigmoid())
