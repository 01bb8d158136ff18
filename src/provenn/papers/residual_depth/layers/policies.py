"""How a branch joins its stream: the scale policies that the paper derives and those that it compares with.

Dherin & Munn, 2025, arXiv:2510.03470. Credits: SkipInit (De & Smith, 2020), ReZero (Bachlechner et al., 2020), Fixup
(Zhang et al., 2019), and LayerScale (Touvron et al., 2021). Further 1/√n as in Stable ResNet (Hayou et al., 2021),
τ-ResNet (Zhang et al., 2019), Marion et al. (2022) and Depth-μP (Yang et al., 2023).
"""

import math
import re
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.arguments import check_finite, check_whole

WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ScalePolicy(nn.Module):
    """x' = x + s · F(prepare(x)), where s and `prepare` are the policy's own.

    Args:
        dim: width of the stream; every policy takes it so that all are made alike, fixed scales do not use it.
        channel_dim: the axis of the width: -1 for vectors and tokens, 1 for maps.

    Shapes: a stream of any shape with `dim` entries at `channel_dim`, to the same. Slot: residual.
    """

    def __init__(self, dim: int, *, channel_dim: int = -1):
        check_whole(dim=dim, channel_dim=channel_dim)
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim, self.channel_dim = dim, channel_dim

    def scale(self, depth: int) -> float | Tensor:
        """s: what multiplies the branch of each of `depth` residual modules."""
        return 1.0

    def prepare(self, x: Tensor) -> Tensor:
        """What the branch sees of the stream."""
        return x

    def initialise(self, branch: nn.Module, depth: int) -> None:
        """Set the branch's weights where the policy asks for weights of its own; a tower calls this once."""

    def branch(self, x: Tensor, f: Callable[[Tensor], Tensor], depth: int) -> Tensor:
        """s · F(prepare(x)): what is added to the stream."""
        return self.scale(depth) * f(self.prepare(x))

    def forward(self, x: Float[Tensor, "..."], f: Callable[[Tensor], Tensor], depth: int) -> Float[Tensor, "..."]:
        if depth < 1:
            raise ValueError(f"depth is the number of residual modules, at least 1, got {depth}")
        scale = self.scale(depth)
        if isinstance(scale, Tensor):
            return x + self.branch(x, f, depth)
        # One kernel: a fixed scale costs nothing over a plain sum.
        return torch.add(x, f(self.prepare(x)), alpha=scale)


class ConstantScale(ScalePolicy):
    """x' = x + c F(x), with the same c at every depth; c = 1 is the unscaled tower.

    Args:
        value: c.
    """

    def __init__(self, dim: int, *, value: float = 1.0, channel_dim: int = -1):
        check_whole(dim=dim, channel_dim=channel_dim)
        check_finite(value=value)
        super().__init__(dim, channel_dim=channel_dim)
        if not math.isfinite(value):
            raise ValueError(f"value must be finite, got {value}")
        self.value = float(value)

    def scale(self, depth: int) -> float:
        return self.value

    def extra_repr(self) -> str:
        return f"{self.value:g}"


class InverseDepth(ScalePolicy):
    """x' = x + F(x)/n: every level of the expansion stays bounded as n grows, since C(n,k)/n^k → 1/k!."""

    def scale(self, depth: int) -> float:
        return 1 / depth


class InverseSqrtDepth(ScalePolicy):
    """x' = x + F(x)/√n: for independent modules the variance of the stream stays bounded, (1 + σ²/n)^n → e^σ²."""

    def scale(self, depth: int) -> float:
        return depth**-0.5


class SkipInit(ScalePolicy):
    """x' = x + α F(x), α one learnable scalar a module, 0 at the start (SkipInit; ReZero is the same formula).

    Args:
        init: α at the start; 0 makes the tower the identity.
    """

    def __init__(self, dim: int, *, init: float = 0.0, channel_dim: int = -1):
        check_whole(dim=dim, channel_dim=channel_dim)
        check_finite(init=init)
        super().__init__(dim, channel_dim=channel_dim)
        self.alpha = nn.Parameter(torch.tensor(float(init)))

    def scale(self, depth: int) -> Tensor:
        return self.alpha


class LayerScale(ScalePolicy):
    """x' = x + γ ⊙ F(x), γ one learnable scale a channel (Touvron et al., 2021).

    Args:
        init: γ at the start; by default what its authors give a Transformer of that depth, two modules a layer: 0.1 up
            to 18 layers, 1e-5 up to 24, 1e-6 beyond.
    """

    def __init__(self, dim: int, *, init: float | None = None, channel_dim: int = -1):
        check_whole(dim=dim, channel_dim=channel_dim)
        check_finite(init=init)
        super().__init__(dim, channel_dim=channel_dim)
        self.by_depth = init is None
        self.gamma = nn.Parameter(torch.full((dim,), 0.1 if init is None else float(init)))

    def initialise(self, branch: nn.Module, depth: int) -> None:
        if self.by_depth:
            # 36 and 48 modules are its authors' 18 and 24 layers.
            nn.init.constant_(self.gamma, 0.1 if depth <= 36 else 1e-5 if depth <= 48 else 1e-6)

    def scale(self, depth: int) -> Tensor:
        return self.gamma

    def branch(self, x: Tensor, f: Callable[[Tensor], Tensor], depth: int) -> Tensor:
        shape = [1] * x.dim()
        shape[self.channel_dim] = self.dim
        return self.gamma.view(shape) * f(x)


class ScalarBias(nn.Module):
    """x + b with one learnable number b, 0 at the start (Fixup)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return x + self.bias


class Fixup(ScalePolicy):
    """x' = x + m F(x + b), the last layer of F starting at 0 and its others scaled by n^(−1/(2L−2)) for L layers.

    A branch that is an `nn.Sequential` also gets a scalar bias before each layer and each activation, as Fixup has it.
    """

    def __init__(self, dim: int, *, channel_dim: int = -1):
        super().__init__(dim, channel_dim=channel_dim)
        self.multiplier = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def initialise(self, branch: nn.Module, depth: int) -> None:
        layers = [m for m in branch.modules() if isinstance(m, WEIGHT_LAYERS)]
        if not layers:
            raise ValueError(f"Fixup needs a branch with linear or convolution layers, got {type(branch).__name__}")
        *inner, last = layers
        with torch.no_grad():
            for layer in inner:
                # Rule 2; a branch of one layer has no inner one, so that L = 1 never divides by 0.
                layer.weight.mul_(depth ** (-1 / (2 * len(layers) - 2)))
            for parameter in last.parameters():
                # Rule 1: every branch starts at 0.
                parameter.zero_()
        if isinstance(branch, nn.Sequential):
            # Rule 3, from the last index to the first, so that none shifts; before the first is the policy's own bias.
            for position in range(len(branch) - 1, 0, -1):
                branch.insert(position, ScalarBias())

    def scale(self, depth: int) -> Tensor:
        return self.multiplier

    def prepare(self, x: Tensor) -> Tensor:
        return x + self.bias


class BatchNormBranch(ScalePolicy):
    """x' = x + F(BatchNorm(x)): the branch sees each channel centred and scaled over the batch and all positions."""

    def __init__(self, dim: int, *, channel_dim: int = -1):
        super().__init__(dim, channel_dim=channel_dim)
        self.norm = nn.BatchNorm1d(dim)

    def prepare(self, x: Tensor) -> Tensor:
        # BatchNorm1d takes (batch, channels, positions): positions of any number of axes become one.
        channels_second = x.movedim(self.channel_dim, 1)
        examples_channels_positions = channels_second.unsqueeze(-1).flatten(2)
        return self.norm(examples_channels_positions).view(channels_second.shape).movedim(1, self.channel_dim)


class LayerNormBranch(ScalePolicy):
    """x' = x + F(LayerNorm(x)): the branch sees each position centred and scaled over its channels (pre-norm)."""

    def __init__(self, dim: int, *, channel_dim: int = -1):
        super().__init__(dim, channel_dim=channel_dim)
        self.norm = nn.LayerNorm(dim)

    def prepare(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)


POLICIES: dict[str, Callable[..., ScalePolicy]] = {
    "one": ConstantScale,
    "const": partial(ConstantScale, value=0.1),
    "inv_depth": InverseDepth,
    "inv_sqrt_depth": InverseSqrtDepth,
    "skipinit": SkipInit,
    "rezero": SkipInit,
    "layerscale": LayerScale,
    "fixup": Fixup,
    "batchnorm": BatchNormBranch,
    "layernorm": LayerNormBranch,
}
NUMBERED = {"const": "value", "skipinit": "init", "rezero": "init", "layerscale": "init"}


def make_policy(name: str, dim: int, *, channel_dim: int = -1) -> ScalePolicy:
    """The policy of that name; `const(0.2)`, `skipinit(0.1)` and `layerscale(1e-4)` give its number.

    >>> make_policy("const(0.2)", 8).scale(depth=50)
    0.2
    >>> make_policy("inv_depth", 8).scale(depth=50)
    0.02
    """
    match = re.fullmatch(r"(\w+)(?:\(([^()]+)\))?", name)
    kind, number = match.groups() if match else (name, None)
    if kind not in POLICIES or (number is not None and kind not in NUMBERED):
        raise ValueError(f"unknown scale policy {name!r}; there are {', '.join(POLICIES)}, and const(c)")
    arguments = {} if number is None else {NUMBERED[kind]: float(number)}
    return POLICIES[kind](dim, channel_dim=channel_dim, **arguments)
