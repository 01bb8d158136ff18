"""Terminator (Zhang, 2024, arXiv:2401.17948): SFNE blocks without a residual, and the losses it is trained with."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.auxiliary import add_auxiliary
from provenn.papers.terminator.layers import RGU, HyperKernel, SFNEBlock
from provenn.papers.terminator.optim import Kar2, Kar3

EARLIER: tuple[tuple[int, ...], ...] = ((), (), (0,), (1,), (2, 1))  # which blocks' outputs each block joins
SLOW_LOSSES = ("channel-sum", "tile")
RULES = ("kar3", "kar2", "recipe")


def slow_neural_loss(kernels: Sequence[Tensor], form: str = "channel-sum") -> Tensor:
    """How far the hyper-kernels of all pairs of blocks lie apart: a mean of squares for each pair, summed.

    Args:
        kernels: W of each block, (1, channels, K, K), from shallow to deep.
        form: "channel-sum" compares their sums over channels, "tile" each with the shallower one repeated along the
            channels. Revisions of the authors' code have one or the other.
    """
    if form not in SLOW_LOSSES:
        raise ValueError(f"form must be one of {', '.join(SLOW_LOSSES)}, got {form!r}")
    loss = kernels[0].new_zeros(())
    for i, deep in enumerate(kernels):
        for shallow in kernels[:i]:
            if form == "channel-sum":
                loss = loss + F.mse_loss(shallow.sum(dim=1), deep.sum(dim=1))
            else:
                loss = loss + F.mse_loss(shallow.repeat(1, deep.shape[1] // shallow.shape[1], 1, 1), deep)
    return loss


class Terminator2d(nn.Module):
    """SFNE blocks at the image's full size, the mean over pixels, a linear classifier.

    While it trains, each forward pass adds the slow neural loss and the regulariser to its task's loss, through
    `provenn.nn.auxiliary`; Kar3 is its optimizer, with rate and betas of the recipe.

    Args:
        num_classes: logits; 0 leaves the classifier out, and `forward` gives the mean of the last map.
        in_channels: of the image; the image is repeated along its channels up to the first width.
        size: K, side of the square that the blocks work on; images of other sizes are interpolated to it.
        widths: channels that each block takes.
        factors: λ of each block: widths[i + 1] = factors[i] · widths[i].
        layers: ℓ of each block's slow net of W; by default 3 for the first, 2 for the others.
        dropout: of each block's channels but the first's.
        branches, stats, train_extras: as in `SFNEBlock`; `train_extras` also adds a trained scalar before each block
            but the first and before the classifier, which the authors' code keeps at 0.
        slow_weight: of the slow neural loss.
        slow_form: as in `slow_neural_loss`.
        l2_reg: of the regulariser, see `regulariser`.
        rule: "kar3", "kar2" (with the second of the recipe's betas), or "recipe" for the recipe's own optimizer.

    Attributes:
        strides, widths: of what `features` gives, one map as fine as the image.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes).

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        size: int = 32,
        widths: Sequence[int] = (3, 12, 36, 72, 144),
        factors: Sequence[int] = (4, 3, 2, 2, 2),
        *,
        layers: Sequence[int] | None = None,
        dropout: float | int = 0.05,
        branches: str | Sequence[str] = "code",
        stats: str = "batch",
        train_extras: bool = False,
        slow_weight: float | int = 1.0,
        slow_form: str = "channel-sum",
        l2_reg: float | int = 5e-5,
        rule: str = "kar3",
    ):
        super().__init__()
        check_whole(num_classes=num_classes, in_channels=in_channels, size=size)
        check_finite(slow_weight=slow_weight, l2_reg=l2_reg)
        if num_classes < 0 or in_channels < 1 or size < 2:
            raise ValueError(
                "num_classes must not be negative, in_channels at least 1 and size at least 2, got "
                f"{num_classes}, {in_channels} and {size}"
            )
        if not 1 <= len(widths) == len(factors) <= len(EARLIER):
            raise ValueError(
                f"widths and factors must be 1 to {len(EARLIER)} numbers each, got {list(widths)} and {list(factors)}"
            )
        for width, factor, following in zip(widths, factors, widths[1:]):
            if width * factor != following:
                raise ValueError(
                    f"each width must be the one before times its factor, got {width}·{factor}, {following}"
                )
        if widths[0] % in_channels:
            raise ValueError(
                f"an image's channels must divide the first width, got {in_channels} with a width of {widths[0]}"
            )
        layers = [3] + [2] * (len(widths) - 1) if layers is None else layers
        if len(layers) != len(widths):
            raise ValueError(f"layers must have {len(widths)} numbers, one a block, got {list(layers)}")
        for name, value, known in (("slow_form", slow_form, SLOW_LOSSES), ("rule", rule, RULES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name, weight in (("slow_weight", slow_weight), ("l2_reg", l2_reg)):
            if weight < 0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        self.size, self.in_channels, self.repeats = size, in_channels, widths[0] // in_channels
        self.slow_weight, self.slow_form, self.l2_reg, self.rule = slow_weight, slow_form, l2_reg, rule
        self.earlier = EARLIER[: len(widths)]
        self.blocks = nn.ModuleList(
            SFNEBlock(
                width,
                factor,
                size,
                layers=layers[i],
                earlier=len(self.earlier[i]),
                dropout=dropout if i else 0.0,
                branches=branches,
                stats=stats,
                train_extras=train_extras,
            )
            for i, (width, factor) in enumerate(zip(widths, factors))
        )
        self.shifts = nn.Parameter(torch.zeros(len(widths))) if train_extras else None
        self.strides, self.widths = [1], [widths[-1] * factors[-1]]
        self.head = nn.Linear(self.widths[0], num_classes) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            nn.init.kaiming_normal_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def _encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and hyper-kernels of all blocks."""
        outputs: list[Tensor] = []
        kernels: list[Tensor] = []
        x = x.repeat(1, self.repeats, 1, 1)
        for i, block in enumerate(self.blocks):
            if i and self.shifts is not None:
                x = x + self.shifts[i - 1]
            x, kernel = block(x, [outputs[j] for j in self.earlier[i]])
            outputs.append(x)
            kernels.append(kernel)
        return outputs, kernels

    def block_outputs(self, x: Float[Tensor, "batch in_channels size size"]) -> list[Tensor]:
        """The map that each block gives."""
        return self._encode(x)[0]

    def features(self, x: Float[Tensor, "batch in_channels height width"]) -> list[Tensor]:
        """The last block's map, which is as fine as the image; of images of side `size` alone.

        Raises:
            ValueError: an image of another size.
        """
        if x.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"Terminator's maps are {self.size}×{self.size}, as its images must be; got {tuple(x.shape[-2:])}: "
                "`resize` takes the network to another square"
            )
        return self._encode(x)[0][-1:]

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        if x.shape[1] != self.in_channels:
            raise ValueError(f"expected images of {self.in_channels} channels, got {tuple(x.shape)}")
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        outputs, kernels = self._encode(x)
        if self.training and (self.slow_weight or self.l2_reg):
            loss = self.slow_weight * slow_neural_loss(kernels, self.slow_form)
            loss = loss + self.l2_reg * self.regulariser() if self.l2_reg else loss
            add_auxiliary(loss, "the loss of its slow networks", "slow_weight=0 and l2_reg=0")
        pooled = outputs[-1].mean(dim=(2, 3))
        if self.shifts is not None:
            pooled = pooled + self.shifts[-1]
        return self.head(pooled)

    def _slow(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, HyperKernel | RGU))

    def regulariser(self) -> Tensor:
        """Σ‖p‖ over the blocks' fast parameters + 1e-6 Σ‖w‖ over weights of slow nets of maps and of RGUs.

        The norms are not squared, so each pulls by the same force whatever its size. Fast are mixers, bottlenecks
        and the convolutions of local branches, biases too; neither the classifier nor the scalar behind G-IBS.
        """
        slow = list(self._slow())
        apart = {id(p) for module in slow for p in module.parameters()}
        apart |= {id(block.bias) for block in self.blocks}
        fast = [p for p in self.blocks.parameters() if id(p) not in apart]
        weights = [
            layer.weight
            for module in slow
            if isinstance(module, RGU) or module.dims == 2
            for layer in module.modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        ]
        return torch.stack([p.norm() for p in fast]).sum() + 1e-6 * torch.stack([w.norm() for w in weights]).sum()

    def optimizers(self, recipe: Any) -> torch.optim.Optimizer:
        """Kar3, or what `rule` says, of a `provenn.training.Recipe`, which no model imports."""
        if self.rule == "recipe":
            return recipe.make_optimizer(self)
        if recipe.weight_decay:
            raise ValueError(f"{self.rule} has no weight decay, got {recipe.weight_decay}: set it to 0, or rule=recipe")
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.rule == "kar2":
            return Kar2(trained, recipe.lr, recipe.betas[1])
        return Kar3(trained, recipe.lr, recipe.betas)

    def resize(self, size: int) -> None:
        """Take square images of another side, with the same slow nets on a finer or coarser grid.

        The filters oscillate far above what a grid resolves, so the new kernels are no interpolation of the old: it
        needs training afterwards.
        """
        check_whole(size=size)
        if size < 2:
            raise ValueError(f"size must be at least 2, got {size}")
        for block in self.blocks:
            block.resize(size)  # type: ignore[operator]  # an SFNEBlock
        self.size = size


# Presets: the released networks, of five blocks at 32×32, each with the regulariser of its recipe.
terminator_cifar10 = Terminator2d
terminator_cifar100 = partial(Terminator2d, num_classes=100, l2_reg=4e-5)
# The first three blocks, for images of 8 to 32 pixels. Ours: what trains in minutes.
terminator_mini = partial(Terminator2d, in_channels=1, size=8, widths=(3, 12, 36), factors=(4, 3, 2))
