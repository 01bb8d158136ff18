"""The improved inverted residual mobile block, i2RMB (Zhang et al., 2024, arXiv:2412.06674), section III."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.norms import ChannelNorm
from provenn.ops.softmax_attention import softmax_attention

Grouping = Literal["close", "remote"]
Mode = Literal["conv", "remote", "close", "spanning", "none"]
Norm = Literal["batch", "layer", "none"]
MODES, NORMS = get_args(Mode), get_args(Norm)
GROUPINGS: dict[str, tuple[Grouping, ...]] = {
    "close": ("close",),
    "remote": ("remote",),
    "spanning": ("remote", "close"),
}
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "none": nn.Identity}
EPS = 1e-6  # of the layer norms and, unlike torch's default, of the batch norms


def group_pixels(
    x: Float[Tensor, "batch channels _ _"], grouping: Grouping, window: tuple[int, int], heads: int = 1
) -> Float[Tensor, "groups heads tokens width"]:
    """The pixels of a map, in groups of one window's size.

    Of sides n₁w₁ and n₂w₂, pixel (a·w₁ + i, b·w₂ + j) belongs to the close group (a, b), a window of neighbours. Pixel
    (i·n₁ + a, j·n₂ + b) to the remote group (a, b), every n₁-th row and n₂-th column of the whole map.

    Args:
        x: sides are multiples of the window's.
        grouping: "close" or "remote".
        window: height and width w₁, w₂.
        heads: parts of the channels, contiguous.

    >>> x = torch.arange(16.0).view(1, 1, 4, 4)
    >>> group_pixels(x, "close", (2, 2))[0].flatten().tolist()
    [0.0, 1.0, 4.0, 5.0]
    >>> group_pixels(x, "remote", (2, 2))[0].flatten().tolist()
    [0.0, 2.0, 8.0, 10.0]
    """
    batch, channels, height, width = x.shape
    (w1, w2), depth = window, channels // heads
    n1, n2 = height // w1, width // w2
    if grouping == "close":
        x = x.reshape(batch, heads, depth, n1, w1, n2, w2).permute(0, 3, 5, 1, 4, 6, 2)
    else:
        x = x.reshape(batch, heads, depth, w1, n1, w2, n2).permute(0, 4, 6, 1, 3, 5, 2)
    return x.reshape(batch * n1 * n2, heads, w1 * w2, depth)


def ungroup_pixels(
    x: Float[Tensor, "groups heads tokens width"], grouping: Grouping, window: tuple[int, int], sides: tuple[int, int]
) -> Float[Tensor, "batch channels _ _"]:
    """Every pixel back to its position: the inverse of `group_pixels`, for a map whose sides are `sides`."""
    (w1, w2), (heads, depth) = window, (x.shape[1], x.shape[3])
    n1, n2 = sides[0] // w1, sides[1] // w2
    batch = x.shape[0] // (n1 * n2)
    x = x.reshape(batch, n1, n2, heads, w1, w2, depth)
    x = x.permute(0, 3, 6, 1, 4, 2, 5) if grouping == "close" else x.permute(0, 3, 6, 4, 1, 5, 2)
    return x.reshape(batch, heads * depth, n1 * w1, n2 * w2)


class SEWMHSA(nn.Module):
    """Spanning expanded-window attention: every pixel attends to its window and to pixels spread over the whole map.

        y = Σ_g softmax(q_g k_gᵀ / √d) v_g,   g = close, remote,   q, k = W_qk u,   v = φ(W_v u)

    Both groupings read the same q, k and v, so that spanning has no parameter more than one of them. The map is padded
    with zeros below and to the right before the projections, without a mask: padded pixels are attended to, with the
    biases as their keys and φ(bias) as their value.

    Args:
        dim: C, channels of the input.
        dim_out: channels of v and of the output; `dim` by default. The expansion of the inverted residual block.
        mode: "spanning", "close" or "remote".
        window: w, side of a group in pixels; 0 takes the whole map as one.
        head_dim: d, width of a head of q and k; must divide `dim`.
        activation: φ, by its name in `ACTIVATIONS`. Queries and keys have none.
        attend_first: attend to u and project then, y = φ(W_v Σ_g softmax(·) u_g): EMO's order, which is cheaper. φ
            makes it another function. (The authors' code puts the close half back as if it were remote; not so here.)

    Shapes: (batch, dim, height, width) to (batch, dim_out, height, width), of any size. Slot: map-mixer.
    Parameters: (dim + 1) · (2 dim + dim_out).

    >>> SEWMHSA(16, head_dim=8)(torch.zeros(2, 16, 10, 9)).shape
    torch.Size([2, 16, 10, 9])
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        *,
        mode: str = "spanning",
        window: int = 7,
        head_dim: int = 32,
        activation: str = "gelu",
        attend_first: bool = False,
    ):
        check_whole(dim=dim, dim_out=dim_out, window=window, head_dim=head_dim)
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if dim < 1 or dim_out < 1:
            raise ValueError(f"dim and dim_out must be at least 1, got {dim} and {dim_out}")
        if mode not in GROUPINGS:
            raise ValueError(f"mode must be one of {', '.join(GROUPINGS)}, got {mode!r}")
        if window < 0:
            raise ValueError(f"window must be at least 1, or 0 for the whole map, got {window}")
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"head_dim must divide the {dim} channels, got {head_dim}")
        self.heads = dim // head_dim
        if not attend_first and dim_out % self.heads:
            raise ValueError(f"dim_out must be a multiple of the {self.heads} heads, got {dim_out}")
        self.mode, self.window, self.attend_first = mode, window, attend_first
        self.qk = nn.Conv2d(dim, 2 * dim, 1)
        self.v = nn.Sequential(nn.Conv2d(dim, dim_out, 1), activation_of(activation))

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim_out height width"]:
        height, width = x.shape[2:]
        window = (self.window or height, self.window or width)
        # Written as a product, which a tracer of open sizes can see to be a multiple.
        sides = [((side - 1) // w + 1) * w if self.window else side for side, w in zip((height, width), window)]
        x = F.pad(x, (0, sides[1] - width, 0, sides[0] - height))
        q, k = self.qk(x).chunk(2, dim=1)
        values = x if self.attend_first else self.v(x)
        y = torch.zeros_like(values)
        for grouping in GROUPINGS[self.mode]:
            q_g, k_g, v_g = (group_pixels(z, grouping, window, self.heads) for z in (q, k, values))
            y = y + ungroup_pixels(softmax_attention(q_g, k_g, v_g), grouping, window, (sides[0], sides[1]))
        y = self.v(y) if self.attend_first else y
        return y[..., :height, :width]

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, window={self.window}, heads={self.heads}"


class I2RMB(nn.Module):
    """One block for convolution and attention alike: expand by an operator, filter each channel, project, one residual.

        e = operator(norm(x)),   t = e + l(e),   l = SiLU(BN(depth-wise k×k)),   y = x + γ ⊙ W_p t

    Where the block changes the shape, or `skip` is off, both residuals are left out: y = γ ⊙ W_p l(e). γ stays, as in
    the authors' code. With their 1e-6 a fresh network's signal is 1e-6 after each such block (see the README).

    Args:
        dim: C, channels of the input.
        dim_out: channels of the output; `dim` by default.
        exp_ratio: λ; the operator gives ⌊λ · dim⌋ channels.
        stride: of the depth-wise convolution.
        mode: the operator. "conv" is a 1×1 convolution and an activation; "spanning", "close" and "remote" are
            `SEWMHSA`; "none" expands nothing and needs a ratio of 1.
        window, head_dim, attend_first: as in `SEWMHSA`.
        kernel_size: k, odd; 0 has no depth-wise convolution, and l(e) = e.
        norm: "batch", "layer" (over the channels of each pixel) or "none"; eps is 1e-6 in both.
        activation: the operator's, by its name in `ACTIVATIONS`.
        layer_scale: where γ starts; None leaves it out.
        drop_path: probability with which the branch of an example is left out while training.
        skip: whether there is a residual where shapes allow it.

    Shapes: (batch, dim, height, width) to (batch, dim_out, ⌈height / stride⌉, ⌈width / stride⌉). Slot: map-mixer.

    Raises:
        ValueError: a size that does not fit, an unknown name, or a layer scale that is not positive.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        *,
        exp_ratio: float | int = 4.0,
        stride: int = 1,
        mode: str = "spanning",
        window: int = 7,
        head_dim: int = 32,
        kernel_size: int = 5,
        norm: str = "layer",
        activation: str = "gelu",
        layer_scale: float | int | None = 1e-6,
        drop_path: float | int = 0.0,
        skip: bool = True,
        attend_first: bool = False,
    ):
        check_whole(dim=dim, dim_out=dim_out, stride=stride, kernel_size=kernel_size)
        check_finite(exp_ratio=exp_ratio, layer_scale=layer_scale, drop_path=drop_path)
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if min(dim, dim_out, stride) < 1:
            raise ValueError(f"dim, dim_out and stride must be at least 1, got {dim}, {dim_out} and {stride}")
        hidden = int(dim * exp_ratio)  # truncated, as the published counts have it
        if hidden < 1:
            raise ValueError(f"exp_ratio must leave at least one of the {dim} channels, got {exp_ratio}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if mode == "none" and hidden != dim:
            raise ValueError(f"mode 'none' expands nothing and needs an exp_ratio of 1, got {exp_ratio}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        if kernel_size < 0 or (kernel_size and kernel_size % 2 == 0):
            raise ValueError(f"kernel_size must be odd, or 0 for no convolution, got {kernel_size}")
        if kernel_size == 0 and stride > 1:
            raise ValueError(f"a stride needs a depth-wise convolution, got kernel_size=0 with stride={stride}")
        if layer_scale is not None and layer_scale <= 0:
            raise ValueError(f"layer_scale must be positive, or None for none, got {layer_scale}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        self.residual = skip and stride == 1 and dim == dim_out
        self.norm = norm_of(norm, dim)
        self.operator: nn.Module
        if mode == "conv":
            self.operator = nn.Sequential(nn.Conv2d(dim, hidden, 1), activation_of(activation))
        elif mode == "none":
            self.operator = nn.Identity()
        else:
            self.operator = SEWMHSA(
                dim,
                hidden,
                mode=mode,
                window=window,
                head_dim=head_dim,
                activation=activation,
                attend_first=attend_first,
            )
        self.local: nn.Module = nn.Identity()
        if kernel_size:
            depth_wise = nn.Conv2d(hidden, hidden, kernel_size, stride, kernel_size // 2, groups=hidden, bias=False)
            self.local = nn.Sequential(depth_wise, nn.BatchNorm2d(hidden, eps=EPS), nn.SiLU())
        self.project = nn.Conv2d(hidden, dim_out, 1, bias=False)
        self.scale = None if layer_scale is None else nn.Parameter(torch.full((dim_out,), float(layer_scale)))
        self.drop = nn.Dropout(drop_path)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim_out height2 width2"]:
        expanded = self.operator(self.norm(x))
        filtered = self.local(expanded)
        branch = self.project(expanded + filtered if self.residual else filtered)
        if self.scale is not None:
            branch = branch * self.scale[:, None, None]
        if not self.residual:
            return branch
        return x + branch * self.drop(branch.new_ones(branch.shape[0], 1, 1, 1))


def norm_of(name: str, dim: int) -> nn.Module:
    """A norm of `dim` channels by its name in `NORMS`."""
    if name == "none":
        return nn.Identity()
    return nn.BatchNorm2d(dim, eps=EPS) if name == "batch" else ChannelNorm(dim, eps=EPS)


def activation_of(name: str) -> nn.Module:
    """An activation by its name in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()
