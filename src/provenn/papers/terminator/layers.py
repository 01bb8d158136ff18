"""The HyperZ·Z·W operator and the SFNE block (Zhang, 2024, arXiv:2401.17948), as in the code of July 2024."""

import copy
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.narrowing import present
from provenn.nn.arguments import check_finite, check_whole
from provenn.ops.autograd import without_autocast

OMEGA = 2000.0  # ω₀: far above what a grid of 32 points can resolve, so a fresh kernel looks like noise
GROUPS = 12  # of G-IBS
MOMENTUM = 0.1  # of running statistics, which are ours
STATS = ("batch", "running")
# What a block joins along its channels, in this order; earlier blocks' outputs come third and last but one.
CODE = ("global", "local9", "fast", "global mixed", "local3", "gated", "local5", "global hci", "local7", "interaction")
PAPER = tuple(branch for branch in CODE if branch != "local3")  # nine in the paper's figure, ten in the code
LOCAL = {"local3": 3, "local5": 5, "local7": 7, "local9": 9}


def _check_sizes(**sizes: int) -> None:
    check_whole(**sizes)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _check_stats(stats: str) -> None:
    if stats not in STATS:
        raise ValueError(f"stats must be one of {', '.join(STATS)}, got {stats!r}")


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the precision of x, whatever that of its weights."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


class HyperKernel(nn.Module):
    """A slow net: kernels as functions of a grid's coordinates c alone, whatever the input.

        g_i(c) = sin(A_i c + a_i);  h_0 = g_0;  h_i = g_i ⊙ (U_i h_{i−1} + u_i) + P;  kernel = O h_ℓ + o

    A starts at 2π·ω₀·Γ(6/(i+1)) times a layer's usual weights, u at 1, since products die with 0, P at 0, and O is
    scaled by 1/√points. The authors' code does this last at the first forward pass, and once more when saved weights
    are loaded; ours when it is built. It computes in float32 at least.

    Args:
        channels: kernels to give.
        size: points along each axis, from −1 to 1.
        dims: axes.
        hidden: q.
        layers: ℓ.
        omega: ω₀.

    Shapes: nothing to (1, channels, size, …), `dims` times size.
    """

    waves: Tensor | None

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        dims: int = 2,
        hidden: int = 64,
        layers: int = 2,
        omega: float | int = OMEGA,
    ):
        super().__init__()
        _check_sizes(channels=channels, size=size, dims=dims, hidden=hidden, layers=layers)
        check_finite(omega=omega)
        self.channels, self.size, self.dims = channels, size, dims
        self.filters = nn.ModuleList(nn.Linear(dims, hidden) for _ in range(layers + 1))
        self.mixers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.out = nn.Linear(hidden, channels)
        self.plane = nn.Parameter(torch.zeros((size,) * dims))
        self.register_buffer("waves", None, persistent=False)  # of the fused form
        with torch.no_grad():
            for i, layer in enumerate(self.filters):
                weight: Tensor = layer.weight  # type: ignore[assignment]  # a Linear
                if not weight.is_meta:
                    weight.mul_(2 * math.pi * omega * torch._standard_gamma(torch.full_like(weight, 6 / (i + 1))))
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        for mixer in self.mixers:
            _start_as_factor(mixer)  # type: ignore[arg-type]
        nn.init.kaiming_uniform_(self.out.weight, nonlinearity="linear")
        nn.init.zeros_(self.out.bias)
        with torch.no_grad():
            self.out.weight.mul_(size ** (-dims / 2))

    def coordinates(self) -> Float[Tensor, "points dims"]:
        """The grid, in float32 or in the weights' float64; never lower, and never kept, so that no cast rounds it."""
        weight = self.out.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        axis = torch.linspace(-1, 1, self.size, dtype=dtype, device=weight.device)
        return torch.stack(torch.meshgrid(*[axis] * self.dims, indexing="ij"), dim=-1).flatten(0, -2)

    def forward(self) -> Tensor:
        with without_autocast(self.out.weight):  # sines of thousands have no digit left in half precision
            return self._shaped(self._hidden(None))

    def _shaped(self, h: Tensor) -> Tensor:
        kernel = _apply(self.out, h).T.reshape(1, self.channels, *[self.size] * self.dims)
        return kernel.to(self.out.weight.dtype)

    def _hidden(self, context: Tensor | None) -> Float[Tensor, "points hidden"]:
        points = self.coordinates()
        plane = self.plane.to(points.dtype).flatten()[:, None]
        waves = self._waves(points) if self.waves is None else self.waves.to(points.dtype)
        h = waves[0]
        for i, mixer in enumerate(self.mixers):
            h = waves[i + 1] * _apply(mixer, h) + plane  # type: ignore[arg-type]
            h = self._bent(h, i, context)
        return h

    def _waves(self, points: Float[Tensor, "points dims"]) -> Float[Tensor, "waves points hidden"]:
        """g_i(c) of each layer."""
        return torch.stack([_apply(layer, points).sin() for layer in self.filters])  # type: ignore[arg-type]

    def fused(self) -> "HyperKernel":
        """A copy that keeps g_i(c) as numbers, which no input changes.

        Its angles are thousands of radians, where float32 has three decimals. A program that sums or rounds otherwise,
        as onnxruntime does, gives other sines. An exported network's outputs were off by 1e-4 of their range.
        """
        fused = copy.deepcopy(self)
        with torch.no_grad(), without_autocast(self.out.weight):
            fused.waves = self._waves(self.coordinates())
        return fused

    def _bent(self, h: Tensor, i: int, context: Tensor | None) -> Tensor:
        return h

    def resize(self, size: int) -> None:
        """Kernels of another size from the same net: P is interpolated, the coordinates are drawn anew."""
        _check_sizes(size=size)
        with torch.no_grad():
            plane = self.plane[None, None]
            mode = "bilinear" if self.dims == 2 else "linear"
            plane = F.interpolate(plane, size=(size,) * self.dims, mode=mode, align_corners=True)
        self.size, self.plane = size, nn.Parameter(plane[0, 0], requires_grad=self.plane.requires_grad)
        self.waves = None


def _start_as_factor(layer: nn.Linear) -> None:
    """U and V: its output is a factor, and starts around 1."""
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    nn.init.ones_(layer.bias)


def renormalize(
    h: Float[Tensor, "points hidden"], alpha: Float[Tensor, " hidden"], beta: Float[Tensor, " hidden"]
) -> Float[Tensor, "points hidden"]:
    """s-renormalisation: α h + β h/‖h‖ along the points, whose gradient comes through the second term alone."""
    return alpha * h.detach() + beta * F.normalize(h, dim=0)


class LocalHyperKernel(HyperKernel):
    """A slow net whose small kernels also depend on a context map z, by the mean of the batch.

        t = GELU(F₂ mean_batch(F₁ pool_{k×k}(z)));  h_i ← renormalize(h_i) ⊙ (V_i t + v_i)

    Args:
        channels: of z, and kernels to give.
        size: k.
        hidden, layers, omega: as in `HyperKernel`.
        stats: "batch" takes t of the batch at hand, as the authors do; "running" keeps its moving average while
            training and takes that while evaluating.
        train_extras: whether α and β, which start at 1 and 0.1, are trained; the authors' optimizer never sees them.

    Shapes: z (batch, channels, height, width) to (channels, 1, k, k).
    """

    pooled: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        hidden: int = 32,
        layers: int = 2,
        omega: float | int = OMEGA,
        stats: str = "batch",
        train_extras: bool = False,
    ):
        super().__init__(channels, size, hidden=hidden, layers=layers, omega=omega)
        _check_stats(stats)
        self.stats = stats
        self.reduce = nn.Linear(channels, hidden)
        self.mix = nn.Linear(hidden, hidden)
        self.contexts = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        for layer in self.contexts:
            _start_as_factor(layer)  # type: ignore[arg-type]
        for name, value in (("alpha", 1.0), ("beta", 0.1)):
            start = torch.full((layers, hidden), value)
            if train_extras:
                setattr(self, name, nn.Parameter(start))
            else:
                self.register_buffer(name, start, persistent=False)
        if stats == "running":
            self.register_buffer("pooled", torch.zeros(size * size, hidden))
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def context(self, z: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "points hidden"]:
        """F₁ of what is pooled, mean of the batch: all that a kernel knows of the images."""
        pooled = F.adaptive_avg_pool2d(z, self.size).mean(dim=0).flatten(1).T
        return _apply(self.reduce, pooled.to(self.coordinates().dtype))

    def forward(self, z: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "channels one k k"]:  # type: ignore[override]  # it has a context
        with without_autocast(self.out.weight):  # sines of thousands have no digit left in half precision
            if self.stats == "running" and not self.training:
                pooled = self.pooled.to(self.coordinates().dtype)
            else:
                pooled = self.context(z)
                if self.stats == "running" and len(z):  # the mean of no images is not a number
                    self._remember(pooled)
            kernel = self._shaped(self._hidden(F.gelu(_apply(self.mix, pooled))))
        return kernel.transpose(0, 1)

    @torch.no_grad()
    def _remember(self, pooled: Tensor) -> None:
        seen: Tensor = self.seen  # type: ignore[assignment]  # a buffer
        seen += 1
        # The first batches count alike, so that the zeros of the start leave no trace.
        self.pooled.lerp_(pooled.to(self.pooled.dtype), torch.clamp(1 / seen, min=MOMENTUM))

    def _bent(self, h: Tensor, i: int, context: Tensor | None) -> Tensor:
        h = renormalize(h, self.alpha[i].to(h.dtype), self.beta[i].to(h.dtype))
        return h * _apply(self.contexts[i], present(context, "context"))  # type: ignore[arg-type]


def instance_standardize(
    x: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """IS: each channel of each example to mean 0 and deviation 1 over its positions; nothing is learned."""
    # In float32 at least: where a map is flat, half precision overflows in the gradient of 1/√(variance + 1e-5).
    full = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(full, dim=(2, 3), correction=0, keepdim=True)
    return ((full - mean) * torch.rsqrt(variance + 1e-5)).to(x.dtype)


class BatchStandardization(nn.BatchNorm2d):
    """BS: each channel to mean 0 and deviation 1 over batch and positions; nothing is learned.

    Args:
        stats: "batch" takes the batch at hand in training and evaluation alike, as the authors do, so that a prediction
            depends on its company and one image alone is standardised by itself; "running" keeps moving averages.
    """

    def __init__(self, channels: int, stats: str = "batch"):
        _check_stats(stats)
        super().__init__(channels, affine=False, momentum=MOMENTUM, track_running_stats=stats == "running")


class GIBS(nn.Module):
    """G-IBS: channels in twelve groups, of which every second is standardised by instance, the others by batch.

    Shapes: (batch, channels, height, width) to the same; channels are a multiple of 12.
    """

    def __init__(self, channels: int, stats: str = "batch"):
        super().__init__()
        _check_sizes(channels=channels)
        if channels % GROUPS:
            raise ValueError(f"channels must be a multiple of {GROUPS}, got {channels}")
        self.channels = channels
        self.batch = BatchStandardization(channels // 2, stats)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        pairs = x.unflatten(1, (GROUPS // 2, 2, self.channels // GROUPS))
        by_batch = self.batch(pairs[:, :, 0].flatten(1, 2)).unflatten(1, (GROUPS // 2, -1))
        by_instance = instance_standardize(pairs[:, :, 1].flatten(1, 2)).unflatten(1, (GROUPS // 2, -1))
        return torch.stack([by_batch, by_instance], dim=2).flatten(1, 3)


def _pointwise(channels: int, out: int, init: str) -> nn.Conv2d:
    layer = nn.Conv2d(channels, out, 1)
    if init == "uniform":
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    else:
        nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(present(layer.bias, "bias"))
    return layer


class RGU(nn.Module):
    """The recursive gated unit: y = W_Y(GELU(IS(W_K x ⊙ W_Q W_V x)) + P).

    In the paper's figure V follows K; here, as in the code, it is of x.

    Args:
        channels: of the map.
        size: K, side of the square map and of P, which all channels share.
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        _check_sizes(channels=channels, size=size)
        self.key, self.value, self.query, self.out = (_pointwise(channels, channels, "uniform") for _ in range(4))
        self.plane = nn.Parameter(torch.zeros(size, size))

    def forward(self, x: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch channels size size"]:
        gated = self.key(x) * self.query(self.value(x))
        return self.out(F.gelu(instance_standardize(gated)) + self.plane)

    def resize(self, size: int) -> None:
        with torch.no_grad():
            plane = F.interpolate(self.plane[None, None], size=(size, size), mode="bilinear", align_corners=True)
        self.plane = nn.Parameter(plane[0, 0], requires_grad=self.plane.requires_grad)


def global_product(
    weights: Float[Tensor, "batch channels size size"], z: Float[Tensor, "batch channels size size"]
) -> Float[Tensor, "batch channels size size"]:
    """The global HyperZ·Z·W: Ŵ = Z ⊙ W, applied to a map by a matrix product in each channel.

    Position (h, w) reads row h of Ŵ and column w of the map: a cross, not all positions.
    """
    return weights @ z


def two_elementwise(kernel: Tensor, z: Tensor) -> Tensor:
    """(z ⊙ κ) ⊙ z: the scores of both interactions."""
    return kernel * z.square()


class HyperZZWLocal(nn.Module):
    """The local HyperZ·Z·W: a depth-wise convolution by a kernel that the slow net makes of a context.

        y = GELU(BS(conv1×1(conv_k(x; kernel(z))))) + b

    Args:
        channels: of both maps.
        kernel_size: k, odd.
        stats, train_extras: as in `LocalHyperKernel`.

    Shapes: x and its context z (batch, channels, height, width), by default x itself, to the same. Slot: map-mixer. The
    kernel is one for the whole batch.
    """

    def __init__(self, channels: int, kernel_size: int = 3, *, stats: str = "batch", train_extras: bool = False):
        super().__init__()
        _check_sizes(channels=channels, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.channels = channels
        self.kernel = LocalHyperKernel(channels, kernel_size, stats=stats, train_extras=train_extras)
        self.mix = _pointwise(channels, channels, "normal")
        self.norm = BatchStandardization(channels, stats)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        z: Float[Tensor, "batch channels height width"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        if x.shape[1] != self.channels:
            raise ValueError(f"expected (batch, {self.channels}, height, width), got {tuple(x.shape)}")
        kernel = self.kernel(x if z is None else z)
        y = F.conv2d(x, kernel.to(x.dtype), padding=kernel.shape[-1] // 2, groups=self.channels)
        return F.gelu(self.norm(self.mix(y))) + self.bias


class HyperChannelInteraction(nn.Module):
    """HCI: x ⊙ σ(κ ⊙ pool(x)²), where κ is a hyper-kernel along the channels.

    Args:
        channels: of the map.
        hidden: of the slow net.

    Shapes: (batch, channels, height, width) to the same. Slot: channel-gate.
    """

    def __init__(self, channels: int, hidden: int = 32):
        super().__init__()
        check_whole(channels=channels, hidden=hidden)
        self.kernel = HyperKernel(1, channels, dims=1, hidden=hidden)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        scores = two_elementwise(self.kernel()[0], x.mean(dim=(2, 3)))
        return x * scores.sigmoid()[:, :, None, None]


class HyperInteraction(nn.Module):
    """HI: x ⊙ σ(s_s · s_c), a score for each value: by channel κ_c ⊙ pool(y)², by position κ_s ⊙ mean_c(y)²."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.by_channel = HyperKernel(1, channels, dims=1, hidden=16)
        self.by_place = HyperKernel(1, size)

    def scores(self, y: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch channels size size"]:
        """σ(s_s · s_c): what the paper draws as pixel-level scores."""
        of_channel = two_elementwise(self.by_channel()[0], y.mean(dim=(2, 3)))[:, :, None, None]
        of_place = two_elementwise(self.by_place(), y.mean(dim=1, keepdim=True))
        return (of_channel * of_place).sigmoid()

    def forward(
        self, y: Float[Tensor, "batch channels size size"], x: Float[Tensor, "batch channels size size"]
    ) -> Float[Tensor, "batch channels size size"]:
        return x * self.scores(y)


class HyperZZWGlobal(nn.Module):
    """The global HyperZ·Z·W on its own: (x ⊙ W) applied to a map by a matrix product in each channel.

    Args:
        channels: of the map.
        size: K, its side; it must be square.
        layers: ℓ of the slow net.
    """

    def __init__(self, channels: int, size: int, *, layers: int = 2):
        super().__init__()
        self.kernel = HyperKernel(channels, size, layers=layers)

    def forward(
        self,
        x: Float[Tensor, "batch channels size size"],
        z: Float[Tensor, "batch channels size size"] | None = None,
    ) -> Float[Tensor, "batch channels size size"]:
        return global_product(x * self.kernel(), x if z is None else z)


class SFNEBlock(nn.Module):
    """The slow-fast neural encoding block: branches side by side, joined and squeezed; nothing is added to x.

        Ŵ = x ⊙ W;  f = IS(RGU(Ŵ) + RGU(x));  m = IS(conv1×1(x));  c = IS(HCI(x))

        "global" o = Ŵ f · "global mixed" Ŵ m · "global hci" Ŵ c · "fast" f · "gated" σ(o) ⊙ o · "interaction" HI(o, x)

        "local3" of c by x · "local9" of x by c · "local5" of x by m · "local7" of m by x

        y = dropout(GELU(G-IBS(conv1×1(all of them, and earlier blocks' outputs tiled to C))) + b)

    Args:
        channels: C.
        factor: λ; the output has λC channels, a multiple of 12.
        size: K, side of the square maps.
        layers: ℓ of the slow net of W.
        earlier: how many outputs of earlier blocks are joined.
        dropout: of whole channels.
        branches: names as above, or "code" (all ten) or "paper" (all but "local3").
        stats: of BS and of the local kernels' context, "batch" or "running".
        train_extras: as in `LocalHyperKernel`.

    Shapes: (batch, C, K, K), and earlier outputs whose channels divide C, to (batch, λC, K, K).
    """

    def __init__(
        self,
        channels: int,
        factor: int,
        size: int,
        *,
        layers: int = 2,
        earlier: int = 0,
        dropout: float | int = 0.0,
        branches: str | Sequence[str] = "code",
        stats: str = "batch",
        train_extras: bool = False,
    ):
        super().__init__()
        _check_sizes(channels=channels, factor=factor, size=size, layers=layers)
        check_whole(earlier=earlier)
        check_finite(dropout=dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie between 0 and 1, below 1, got {dropout}")
        if not 0 <= earlier <= 2:
            raise ValueError(f"earlier must be 0, 1 or 2, got {earlier}")
        if isinstance(branches, str):
            if branches not in ("code", "paper"):
                raise ValueError(f"branches must be 'code', 'paper' or names of branches, got {branches!r}")
            branches = CODE if branches == "code" else PAPER
        unknown = [name for name in branches if name not in CODE]
        if unknown or not branches:
            raise ValueError(f"branches must be some of {', '.join(CODE)}, got {list(branches)}")
        self.channels, self.size, self.earlier, self.branches = channels, size, earlier, tuple(branches)
        self.kernel = HyperKernel(channels, size, layers=layers)
        self.of_weights, self.of_input = RGU(channels, size), RGU(channels, size)
        self.mixer = _pointwise(channels, channels, "normal")
        self.hci = HyperChannelInteraction(channels)
        if "interaction" in branches:
            self.interaction = HyperInteraction(channels, size)
        self.local = nn.ModuleDict(
            {
                name: HyperZZWLocal(channels, LOCAL[name], stats=stats, train_extras=train_extras)
                for name in branches
                if name in LOCAL
            }
        )
        self.bottleneck = _pointwise(channels * (len(branches) + earlier), channels * factor, "normal")
        self.norm = GIBS(channels * factor, stats)
        self.bias = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout2d(dropout)

    def joined(
        self, x: Float[Tensor, "batch channels size size"], before: Sequence[Tensor] = ()
    ) -> tuple[Float[Tensor, "batch joined size size"], Float[Tensor, "1 channels size size"]]:
        """All branches along the channels, and the hyper-kernel W."""
        if x.shape[1:] != (self.channels, self.size, self.size):
            expected = f"(batch, {self.channels}, {self.size}, {self.size})"
            raise ValueError(f"expected {expected}, got {tuple(x.shape)}: `resize` takes the block to another size")
        if len(before) != self.earlier:
            raise ValueError(f"expected {self.earlier} outputs of earlier blocks, got {len(before)}")
        kernel = self.kernel()
        weights = x * kernel
        fast = instance_standardize(self.of_weights(weights) + self.of_input(x))
        mixed, gated = instance_standardize(self.mixer(x)), instance_standardize(self.hci(x))
        out = global_product(weights, fast)
        pairs = {"local3": (gated, x), "local9": (x, gated), "local5": (x, mixed), "local7": (mixed, x)}
        parts = []
        for name in self.branches:
            if name in LOCAL:
                parts.append(self.local[name](*pairs[name]))
            elif name == "interaction":
                parts.append(self.interaction(out, x))
            elif name == "gated":
                parts.append(out.sigmoid() * out)
            elif name.startswith("global "):
                parts.append(global_product(weights, mixed if name == "global mixed" else gated))
            else:
                parts.append(fast if name == "fast" else out)
        tiled = [y.repeat(1, self.channels // y.shape[1], 1, 1) for y in before]
        for index, y in zip((2, -1), tiled):
            parts.insert(index, y)
        return torch.cat(parts, dim=1), kernel

    def forward(
        self, x: Float[Tensor, "batch channels size size"], before: Sequence[Tensor] = ()
    ) -> tuple[Float[Tensor, "batch out size size"], Float[Tensor, "1 channels size size"]]:
        joined, kernel = self.joined(x, before)
        return self.dropout(F.gelu(self.norm(self.bottleneck(joined))) + self.bias), kernel

    def resize(self, size: int) -> None:
        """Take maps of another side: planes are interpolated, coordinates drawn anew, all other weights stay."""
        self.kernel.resize(size)
        self.of_weights.resize(size)
        self.of_input.resize(size)
        if "interaction" in self.branches:
            self.interaction.by_place.resize(size)
        self.size = size
