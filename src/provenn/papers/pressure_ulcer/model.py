"""The residual U-Net with attention of the pressure ulcer system (Chae et al., 2021, arXiv:2101.09433), inferred.

Inferred, as only the abstract could be read: blocks and gates from residual U-Net and Attention U-Net; sizes,
watershed modes, loss and training are ours; each is an option.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.narrowing import of_kind
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.padding import mirror_pad
from provenn.papers.pressure_ulcer.layers import ATTENTIONS, AttentionGate, Block, Rise
from provenn.papers.pressure_ulcer.transfer import RATE_SHARE, read_start, transfer


class ResidualAttentionUNet(nn.Module):
    """A U-Net of residual blocks with an attention gate on every skip.

    Level k of the encoder is a block of width · 2ᵏ channels, with 2×2 max-pooling between levels. A level of the
    decoder upsamples, gates the skip, joins and convolves. The head is a 1×1 convolution with a bias.

    Args:
        in_channels: of the image.
        num_classes: logits a pixel. One is for the wound, and its probability is the logit's sigmoid.
        width: b, channels of the finest level; 32 (inferred).
        depth: levels; 5 (inferred).
        attention: "gate" on the skips (inferred default), "cbam" or "se" in each block of the encoder, or "none".
        residual: whether blocks have shortcuts; without, it is a plain U-Net.
        gate_scale: at which scale the gates are computed, "fine" or "coarse"; see `AttentionGate`.
        norm: "batch", or "group" for batches of few images.
        wound_share: π, the share of wound in training, sets the head's bias to log(π / (1 − π)); None leaves it at 0.
        dice: weight of soft Dice beside binary cross-entropy, whose weight is 1 (inferred).
        tversky: weights of false positives and false negatives, such as (0.3, 0.7), in the place of Dice.
        start: weights to begin a training with, from another wound domain: a file, the folder of a run, or
            "ulcer_small" for those that ship. They are read when the training starts, and the recipe's rate is
            divided by 10.
        freeze_encoder: whether the encoder keeps weights and norms of `start`.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes, height, width), of any size. Sides that are no
    multiple of 2^(depth − 1) are continued by their mirror image below and to the right, and cut again.

    Raises:
        ValueError: a size below 1, or an unknown option.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1,
        *,
        width: int = 32,
        depth: int = 5,
        attention: str = "gate",
        residual: bool = True,
        gate_scale: str = "fine",
        norm: str = "batch",
        wound_share: float | None = None,
        dice: float | int = 1.0,
        tversky: Sequence[float | int] | None = None,
        start: str | None = None,
        freeze_encoder: bool = False,
    ):
        check_whole(in_channels=in_channels, num_classes=num_classes, width=width, depth=depth)
        check_finite(wound_share=wound_share, dice=dice)
        super().__init__()
        for name, value in (("in_channels", in_channels), ("num_classes", num_classes), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 1 <= depth <= 8:
            raise ValueError(f"depth must be from 1 to 8, got {depth}")
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        if wound_share is not None and not 0 < wound_share < 1:
            raise ValueError(f"wound_share must lie between 0 and 1, got {wound_share}")
        if dice < 0:
            raise ValueError(f"dice must not be negative, got {dice}")
        if tversky is not None and (len(tversky) != 2 or min(tversky) < 0 or sum(tversky) <= 0):
            raise ValueError(f"tversky must be two numbers, none below 0 and not both 0, got {tversky}")
        if freeze_encoder and start is None:
            raise ValueError("freeze_encoder keeps the encoder of `start`: give start too")
        self.in_channels, self.multiple = in_channels, 2 ** (depth - 1)
        self.dice, self.start, self.frozen = float(dice), start, freeze_encoder
        self.tversky = (0.5, 0.5) if tversky is None else (float(tversky[0]), float(tversky[1]))
        widths = [width * 2**level for level in range(depth)]
        inside = attention if attention in ("cbam", "se") else "none"
        ins = [in_channels, *widths[:-1]]
        self.encoder = nn.ModuleList(
            Block(before, after, residual=residual, attention=inside, norm=norm) for before, after in zip(ins, widths)
        )
        rise: Callable[[int], Rise] = lambda channels: Rise(  # noqa: E731  # one line each level
            channels, gated=attention == "gate", gate_scale=gate_scale, residual=residual, norm=norm
        )
        self.decoder = nn.ModuleList(rise(channels) for channels in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.head.weight, std=0.05)  # so that training begins near the bias, the share of wound
        bias = 0.0 if wound_share is None else math.log(wound_share / (1 - wound_share))
        nn.init.constant_(self.head.bias, bias)  # type: ignore[arg-type]  # it has one

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes height width"]:
        height, width = x.shape[2:]
        skips = self._encoded(x)
        x = skips.pop()
        for rise, skip in zip(self.decoder, reversed(skips)):
            x = rise(x, skip)
        return self.head(x)[..., :height, :width]

    def _encoded(self, x: Tensor) -> list[Tensor]:
        """The map of each level, from fine to coarse."""
        if x.shape[1] != self.in_channels:
            raise ValueError(f"expected images of {self.in_channels} channels, got {x.shape[1]}")
        if self.multiple > 1:
            # Written as a product, which a tracer of open sizes can see to be a multiple.
            bottom, right = (((side - 1) // self.multiple + 1) * self.multiple - side for side in x.shape[2:])
            x = mirror_pad(x, bottom, right)
        levels = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            levels.append(x)
        return levels

    def attention_maps(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch 1 _ _"]]:
        """The gates' α for images, from the coarsest skip to the finest; empty where there are no gates."""
        height, width = x.shape[2:]
        skips, maps = self._encoded(x), []
        below = skips.pop()
        for level, (rise, skip) in enumerate(zip(self.decoder, reversed(skips))):
            alpha = of_kind(rise, Rise, "a level").attention(below, skip)
            if alpha is not None:
                factor = 2 ** (len(self.decoder) - 1 - level)
                maps.append(alpha[..., : -(-height // factor), : -(-width // factor)])
            below = rise(below, skip)
        return maps

    def optimizers(self, recipe: Any) -> torch.optim.Optimizer:
        """That of a `provenn.training.Recipe`; with `start` these weights are taken first, and the rate is a tenth."""
        if self.start is None:
            return recipe.make_optimizer(self)
        transfer(self, read_start(self.start))
        if self.frozen:
            self.freeze()
        optimizer = recipe.make_optimizer(self)
        for group in optimizer.param_groups:
            group["lr"] *= RATE_SHARE
        return optimizer

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As of every module; what is loaded takes the place of `start`."""
        loaded = super().load_state_dict(*args, **options)
        self.start = None
        return loaded

    def freeze(self) -> None:
        """Leave the encoder as it is: its weights get no gradient, and its norms keep their mean and variance."""
        self.frozen = True
        self.encoder.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ResidualAttentionUNet":
        """As of every module; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self


@contextmanager
def open_gates(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, all gates of a model are at α = 1: the scale of ψ's norm is 0, and its shift is large."""
    scores: list[Any] = [part.score[1] for part in model.modules() if isinstance(part, AttentionGate)]
    before = [(norm.weight.detach().clone(), norm.bias.detach().clone()) for norm in scores]
    with torch.no_grad():
        for norm in scores:
            norm.weight.zero_()
            norm.bias.fill_(100.0)
    try:
        yield model
    finally:
        with torch.no_grad():
            for norm, (weight, bias) in zip(scores, before):
                norm.weight.copy_(weight)
                norm.bias.copy_(bias)
