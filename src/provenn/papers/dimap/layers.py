"""Swin's layers (Liu et al., 2021, arXiv:2103.14030), which DIMAP prunes: windows, shifted windows, merging."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import check_heads
from provenn.ops.softmax_attention import softmax_attention

Map = Float[Tensor, "batch height width dim"]


class WindowAttention(nn.Module):
    """Attention in windows of w × w tokens, shifted by s, with a learned bias for each offset (equation 4).

    softmax(q kᵀ / √d + B) v, where B holds a number for each head and each of (2w − 1)² offsets. Shifted windows are
    moved cyclically, and what only that made neighbours is masked.

    Args:
        dim: D, width of a token.
        heads: attention heads; must divide `dim`.
        window: w.
        shift: s, below w; 0 for none.

    Shapes: (batch, height, width, dim) to the same, of any size: zeros fill the last windows, and their keys are what
    the biases make of them, as in Swin. Parameters: 4·D² + 4·D + heads·(2w − 1)².
    """

    index: Tensor

    def __init__(self, dim: int, heads: int, window: int = 7, shift: int = 0):
        check_whole(dim=dim, heads=heads, window=window, shift=shift)
        super().__init__()
        check_heads(dim, heads)
        if window < 1 or not 0 <= shift < window:
            raise ValueError(f"window must be at least 1 and shift from 0 to below it, got {window} and {shift}")
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias, std=0.02)
        sites = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        apart = sites[:, None] - sites[None] + window - 1
        self.register_buffer("index", apart[..., 0] * (2 * window - 1) + apart[..., 1], persistent=False)

    def forward(self, x: Map) -> Map:
        height, width = x.shape[1:3]
        w = self.window
        # As products: a tracer of open sizes sees that w divides them.
        rows, columns = (height - 1) // w + 1, (width - 1) // w + 1
        x = F.pad(x, (0, 0, 0, columns * w - width, 0, rows * w - height))
        batch, dim = x.shape[0], x.shape[-1]
        # A map that one window covers is not shifted: all of its tokens meet already.
        shift = 0 if min(rows, columns) <= 1 else self.shift
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        q, k, v = self.qkv(self._windows(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias[self.index].permute(2, 0, 1)[None]
        if shift:
            hidden = self._strangers(rows * w, columns * w, x.device)
            # One window after another of each image: the mask of a window is the same in every image.
            bias = bias.masked_fill(hidden[:, None], -100.0).repeat(batch, 1, 1, 1)
        y = softmax_attention(q, k, v, mask=bias.to(q.dtype))
        if torch.compiler.is_exporting():  # its form in ONNX lays numbers out otherwise than fused attention does
            y = y.clone(memory_format=torch.contiguous_format)
        y = self.project(y.transpose(1, 2).flatten(2)).view(batch, rows, columns, w, w, dim)
        y = y.transpose(2, 3).reshape(batch, rows * w, columns * w, dim)
        if shift:
            y = y.roll((shift, shift), (1, 2))
        return y[:, :height, :width]

    def _windows(self, x: Tensor) -> Tensor:
        """(batch · windows, w², dim), row by row."""
        (batch, height, width, dim), w = x.shape, self.window
        return x.view(batch, height // w, w, width // w, w, dim).transpose(2, 3).reshape(-1, w * w, dim)

    def _strangers(self, height: int, width: int, device: torch.device) -> Tensor:
        """Which pairs of a window came from different sides of the map: (windows, w², w²)."""
        rows, columns = (self._regions(size, device) for size in (height, width))
        region = self._windows((3 * rows[:, None] + columns[None])[None, ..., None])[..., 0]
        return region[:, :, None] != region[:, None, :]

    def _regions(self, size: int, device: torch.device) -> Tensor:
        at = torch.arange(size, device=device)
        return (at >= size - self.window).int() + (at >= size - self.shift).int()


class SwinBlock(nn.Module):
    """x ← x + attention(LN(x)); x ← x + MLP(LN(x)) (equation 3 of Swin).

    Args:
        dim, heads, window, shift: of the attention.
        mlp_ratio: hidden width of the MLP over `dim`.
        drop_path: probability with which a branch of an example is left out while training.

    Shapes: (batch, height, width, dim) to the same.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int = 7,
        shift: int = 0,
        mlp_ratio: float | int = 4,
        drop_path: float | int = 0.0,
    ):
        check_finite(mlp_ratio=mlp_ratio, drop_path=drop_path)
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must leave a hidden unit, got {mlp_ratio}")
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, window, shift)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop = nn.Dropout(drop_path)

    def _keep(self, branch: Tensor) -> Tensor:
        return branch * self.drop(branch.new_ones(branch.shape[0], 1, 1, 1))

    def forward(self, x: Map) -> Map:
        x = x + self._keep(self.attention(self.norm1(x)))
        return x + self._keep(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width, by a norm and a linear map. DIMAP never prunes it.

    Args:
        dim: D, width of a token.

    Shapes: (batch, height, width, dim) to (batch, ⌈height / 2⌉, ⌈width / 2⌉, 2·dim). Parameters: 8·D² + 8·D.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Map) -> Float[Tensor, "batch rows columns out"]:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # Column by column, as Swin has it: above left, below left, above right, below right.
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))
