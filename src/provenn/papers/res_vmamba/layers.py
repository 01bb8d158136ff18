"""The four-route selective scan of VMamba (Liu et al., 2024, arXiv:2401.10166) and Res-VMamba's residual path."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.ops.selective_scan import selective_scan

ROUTES = (1, 2, 4)
STEPS = (1e-3, 0.1)  # between which softplus of the bias lies at first, evenly in the logarithm
FIRST_STEP = 1e-4  # the least


def first_steps(shape: Sequence[int]) -> Tensor:
    """Biases whose softplus is a step from 0.001 to 0.1, evenly in the logarithm."""
    low, high = map(math.log, STEPS)
    steps = (low + (high - low) * torch.rand(*shape)).exp().clamp(min=FIRST_STEP)
    return steps + torch.log(-torch.expm1(-steps))


def cross_scan(
    x: Float[Tensor, "batch dim height width"], routes: int = 4
) -> Float[Tensor, "batch routes dim height*width"]:
    """The pixels in the order of each route: by rows, by columns, and both from the last pixel to the first.

    Args:
        routes: 4, or the first two or the first alone.

    >>> cross_scan(torch.tensor([[[[1, 2], [3, 4]]]]).float())[0, :, 0].int().tolist()
    [[1, 2, 3, 4], [1, 3, 2, 4], [4, 3, 2, 1], [4, 2, 3, 1]]
    """
    rows = x.flatten(2).unsqueeze(1)
    if routes == 1:
        return rows
    both = torch.cat([rows, x.mT.flatten(2).unsqueeze(1)], dim=1)
    return both if routes == 2 else torch.cat([both, both.flip(-1)], dim=1)


def cross_merge(
    y: Float[Tensor, "batch routes dim tokens"], height: int, width: int
) -> Float[Tensor, "batch dim height width"]:
    """The sum of all routes at each pixel; the adjoint of `cross_scan`."""
    routes = y.shape[1]
    if routes == 4:
        y = y[:, :2] + y[:, 2:].flip(-1)
    rows = y[:, 0].unflatten(-1, (height, width))
    return rows if routes == 1 else rows + y[:, 1].unflatten(-1, (width, height)).mT


class SS2D(nn.Module):
    """Mix a map by selective scans along four routes, each of which every pixel is a step of.

    [u, z] = W_in x;  u ← SiLU(conv3×3 of each channel).

    Along route k: [δ, B, C] = W^x_k u,  Δ = softplus(W^dt_k δ + b_k),

    h_t = exp(Δ_t A_k) ⊙ h_{t−1} + Δ_t B_t u_t,  y_t = ⟨C_t, h_t⟩ + D_k u_t.

    The output is W_out (LN(Σ_k y) ⊙ SiLU(z)).

    The form of VMamba's first version, which Res-VMamba is built on. A is −exp(`A_logs`), −1 to −N at first.

    Args:
        dim: channels of the map.
        state: N, states a channel.
        expand: inner width over `dim`.
        rank: of Δ's projection; by default a sixteenth of `dim`, rounded up.
        routes: 4, or 2 (by rows and by columns) or 1 (by rows, in which no pixel sees a later one but by the
            convolution).

    Shapes: (batch, dim, height, width) to the same. Slot: map-mixer. The scan itself runs in float32 under autocast.
    """

    def __init__(self, dim: int, *, state: int = 16, expand: float | int = 2, rank: int | None = None, routes: int = 4):
        super().__init__()
        check_whole(dim=dim, state=state, rank=rank, routes=routes)
        check_finite(expand=expand)
        rank = math.ceil(dim / 16) if rank is None else rank
        inner = int(expand * dim)
        if min(dim, state, rank, inner) < 1:
            raise ValueError(
                f"dim, state, rank and expand · dim must be at least 1, got {dim}, {state}, {rank}, {inner}"
            )
        if routes not in ROUTES:
            raise ValueError(f"routes must be 1, 2 or 4, got {routes}")
        self.dim, self.state, self.rank, self.routes = dim, state, rank, routes
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.empty(routes, rank + 2 * state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(routes, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(routes, inner))
        self.A_logs = nn.Parameter(torch.empty(routes * inner, state))
        self.Ds = nn.Parameter(torch.empty(routes * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mamba's: steps from 0.001 to 0.1, decays from 1 to N, projections of 0.02."""
        routes, inner = self.dt_projs_bias.shape
        for linear in (self.in_proj, self.out_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)  # a Linear's, as the framework has it
        nn.init.uniform_(self.dt_projs_weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            self.dt_projs_bias.copy_(first_steps((routes, inner)))
            decays = torch.arange(1, self.state + 1, dtype=self.A_logs.dtype, device=self.A_logs.device)
            self.A_logs.copy_(decays.log().expand_as(self.A_logs))
        nn.init.ones_(self.Ds)

    def scan(self, u: Float[Tensor, "batch inner height width"]) -> Float[Tensor, "batch inner height width"]:
        """The sum over the routes."""
        height, width = u.shape[-2:]
        routes = cross_scan(u, self.routes)
        delta, B, C = (self.x_proj_weight @ routes).split([self.rank, self.state, self.state], dim=2)
        delta = self.dt_projs_weight @ delta
        y, _ = selective_scan(
            routes.flatten(1, 2),
            delta.flatten(1, 2),
            -self.A_logs.to(torch.promote_types(self.A_logs.dtype, torch.float32)).exp(),
            B,
            C,
            self.Ds,
            delta_bias=self.dt_projs_bias.flatten(),
            delta_softplus=True,
        )
        return cross_merge(y.unflatten(1, (self.routes, -1)), height, width)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        u, z = self.in_proj(x.permute(0, 2, 3, 1)).chunk(2, dim=-1)
        y = self.scan(F.silu(self.conv2d(u.permute(0, 3, 1, 2))))
        y = self.out_norm(y.permute(0, 2, 3, 1)) * F.silu(z)
        return self.out_proj(y).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{self.dim}, state={self.state}, rank={self.rank}, routes={self.routes}"


class VSSBlock(nn.Module):
    """x + SS2D(LN(x)), without a feed-forward branch: VMamba's first block.

    Args:
        dim: channels.
        drop_path: probability with which the branch of an example is left out while training.
        state: of `SS2D`.

    Shapes: (batch, height, width, dim) to the same.
    """

    def __init__(self, dim: int, *, drop_path: float | int = 0.0, state: int = 16):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = SS2D(dim, state=state)
        self.drop_path = nn.Dropout(drop_path)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        branch = self.op(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + branch * self.drop_path(branch.new_ones(x.shape[0], 1, 1, 1))


class PatchMerging(nn.Module):
    """Half the sides and twice the channels: the four pixels of a 2×2 square side by side, a norm, one projection.

    Odd sides are filled with zeros.

    Shapes: (batch, height, width, dim) to (batch, ⌈height/2⌉, ⌈width/2⌉, out).
    """

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, out, bias=False)
        self.norm = nn.LayerNorm(4 * dim)
        nn.init.trunc_normal_(self.reduction.weight, std=0.02)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height2 width2 out"]:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # In the order (0,0), (1,0), (0,1), (1,1) of row and column.
        squares = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(squares, dim=-1)))


class ResidualProjection(nn.Conv2d):
    """The path around a stage: max-pooling 2×2, then a 1×1 convolution to the next stage's width.

    Odd sides are pooled to the end, as `PatchMerging` fills them, so that both summands are of one size.

    Args:
        dim, out: widths of the stage and of the next one.
        init: "kaiming", the framework's default, which the authors' code has; "zero" starts from the network without.

    Shapes: (batch, dim, height, width) to (batch, out, ⌈height/2⌉, ⌈width/2⌉). Parameters: (dim + 1) · out.
    """

    def __init__(self, dim: int, out: int, *, init: str = "kaiming"):
        super().__init__(dim, out, 1)
        if init == "zero":
            nn.init.zeros_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
        elif init != "kaiming":
            raise ValueError(f"init must be 'kaiming' or 'zero', got {init!r}")

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch out height2 width2"]:
        return super().forward(F.max_pool2d(x, 2, ceil_mode=True))


class RandomProjection(nn.Module):
    """What the released code has instead of `ResidualProjection`: a new convolution at every call. For comparison.

    Its weights are drawn from the framework's default initialisation, in evaluation too; none is kept, and none learns.

    Args:
        dim, out: widths of the stage and of the next one.

    Attributes:
        generator: where weights are drawn from; PyTorch's own where None.

    Shapes: as `ResidualProjection`. Parameters: 0.
    """

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.dim, self.out = dim, out
        self.generator: Generator | None = None

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch out height2 width2"]:
        bound = self.dim**-0.5  # kaiming-uniform with a = √5, and the bias's bound
        # Drawn on the CPU and moved, as a convolution is that is made there.
        weight, bias = (
            torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=self.generator).to(x)
            for shape in ((self.out, self.dim, 1, 1), (self.out,))
        )
        return F.conv2d(F.max_pool2d(x, 2, ceil_mode=True), weight, bias)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.out}"
