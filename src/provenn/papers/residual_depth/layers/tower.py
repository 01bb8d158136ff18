"""The residual tower T_n = (1 + λF_n) ∘ … ∘ (1 + λF_1), its lesions, and the scales folded away."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .policies import WEIGHT_LAYERS, ConstantScale, Fixup, ScalePolicy, make_policy

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)


class ResidualTower(nn.Module):
    """x ↦ T_n(x): each block's output joins the stream as the policy says.

    Args:
        blocks: F_1 … F_n, each maps the stream to its own shape.
        policy: the name of a scale policy, or one made policy a block.
        dim: width of the stream.
        depth: n that the policies see, where the tower is one stage of a deeper network; by default `len(blocks)`.
        channel_dim: the axis of the width: -1 for vectors and tokens, 1 for maps.

    Shapes: the stream's, to the same.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        policy: str | Sequence[ScalePolicy] = "inv_sqrt_depth",
        *,
        dim: int,
        depth: int | None = None,
        channel_dim: int = -1,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.depth = len(self.blocks) if depth is None else depth
        if self.depth < len(self.blocks):
            raise ValueError(f"depth counts all residual modules, at least the {len(self.blocks)} here, got {depth}")
        if isinstance(policy, str):
            self.policies = nn.ModuleList(make_policy(policy, dim, channel_dim=channel_dim) for _ in self.blocks)
            for join, block in self.pairs():
                join.initialise(block, self.depth)
        else:
            self.policies = nn.ModuleList(policy)
        if len(self.policies) != len(self.blocks):
            raise ValueError(f"{len(self.blocks)} blocks need as many policies, got {len(self.policies)}")

    def pairs(self) -> Iterable[tuple[ScalePolicy, nn.Module]]:
        """Each policy with its block, in the order of the stream."""
        return zip(cast(Iterable[ScalePolicy], self.policies), self.blocks)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        for join, block in self.pairs():
            x = join(x, block, self.depth)
        return x

    def stream(self, x: Float[Tensor, "..."]) -> list[Tensor]:
        """The stream before each block and after the last: n + 1 tensors."""
        states = [x]
        for join, block in self.pairs():
            states.append(join(states[-1], block, self.depth))
        return states

    def without(self, *deleted: int) -> "ResidualTower":
        """The tower without these blocks and all paths through them (Veit et al., 2016); shares weights."""
        self._check(deleted)
        return self._rewired([i for i in range(len(self.blocks)) if i not in deleted])

    def reordered(self, order: Sequence[int]) -> "ResidualTower":
        """The tower with its blocks in this order; shares weights."""
        if sorted(order) != list(range(len(self.blocks))):
            raise ValueError(f"order must be a permutation of 0 … {len(self.blocks) - 1}, got {list(order)}")
        return self._rewired(order)

    def _check(self, indices: Iterable[int]) -> None:
        for index in indices:
            if not 0 <= index < len(self.blocks):
                raise ValueError(f"block {index} does not exist; there are blocks 0 … {len(self.blocks) - 1}")

    def _rewired(self, order: Sequence[int]) -> "ResidualTower":
        # λ stays what it was: a lesion changes which modules run, not how much each adds.
        policies = [cast(ScalePolicy, self.policies[i]) for i in order]
        tower = ResidualTower([self.blocks[i] for i in order], policies, dim=1, depth=self.depth)
        return tower.train(self.training)


def last_layer(branch: nn.Module) -> nn.Module:
    """The layer whose weight can take up a factor of the branch's output.

    Raises:
        ValueError: the branch does not end in a linear layer, a convolution or an affine norm.
    """
    while isinstance(branch, nn.Sequential) and len(branch):
        branch = branch[-1]
    if isinstance(branch, (*WEIGHT_LAYERS, *NORMS)):
        layer: nn.Module | None = branch
    elif isinstance(branch, nn.Sequential) or not list(branch.children()):
        layer = None
    else:
        # A block of any class: the last layer with weights that it registers is taken for the last that it runs.
        layer = next((m for m in reversed(list(branch.modules())) if isinstance(m, WEIGHT_LAYERS)), None)
    if layer is None or getattr(layer, "weight", None) is None:
        raise ValueError(
            f"cannot fold a scale: the branch ends in {type(branch).__name__}, not in a layer with a weight"
        )
    return layer


def scale_layer(layer: nn.Module, scale: float | Tensor) -> None:
    """Multiply a layer's output by a number, or by one number a channel, by changing its weight and bias."""
    with torch.no_grad():
        weight = cast(Tensor, layer.weight)
        factor = torch.as_tensor(scale).to(weight) if isinstance(scale, Tensor) else weight.new_tensor(scale)
        # Outputs are a weight's first axis, in linear layers and convolutions alike.
        weight.mul_(factor.view(-1, *[1] * (weight.dim() - 1)) if factor.dim() else factor)
        if getattr(layer, "bias", None) is not None:
            cast(Tensor, layer.bias).mul_(factor)


def fold(tower: ResidualTower) -> ResidualTower:
    """A copy of the tower with every scale multiplied into the last weight of its branch: same outputs, no multiply.

    Fixed scales, SkipInit, LayerScale and Fixup fold; a norm inside a policy has no scale and stays as it is.
    Each branch must end in its last linear or convolution layer.
    """
    folded = deepcopy(tower)
    for index, (join, block) in enumerate(folded.pairs()):
        scale = join.scale(folded.depth)
        if isinstance(scale, float) and scale == 1.0:
            continue
        scale_layer(last_layer(block), scale)
        if isinstance(join, Fixup):
            # Its bias stays: it acts on what enters the branch.
            nn.init.ones_(join.multiplier)
        else:
            folded.policies[index] = ConstantScale(join.dim, channel_dim=join.channel_dim)
    return folded
