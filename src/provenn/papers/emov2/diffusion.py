"""D-EMOv2 (Table 14): a diffusion model of i2RMBs, in the frame of DiT (Peebles and Xie, 2023, arXiv:2212.09748).

Its code is not public. The authors' training logs print the parameters of all four sizes, and the paper their FLOPs;
this form has both (see the README). One modulated block replaces DiT's attention and feed-forward part.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_whole
from provenn.nn.diffusion import FREQUENCIES, grid_positions, noise_level_features
from provenn.nn.norms import ChannelNorm
from provenn.papers.emov2.layers import EPS, I2RMB

WINDOW_OF_LATENTS = 8  # of 16×16 tokens: four groups of each kind, as the published FLOPs have it


def modulate(
    x: Float[Tensor, "batch dim height width"], shift: Float[Tensor, "batch dim"], scale: Float[Tensor, "batch dim"]
) -> Float[Tensor, "batch dim height width"]:
    """x ⊙ (1 + scale) + shift, alike at every pixel."""
    return x * (1 + scale[..., None, None]) + shift[..., None, None]


class ModulatedI2RMB(nn.Module):
    """An i2RMB whose input and branch are modulated by a condition c, instead of a layer scale.

        u = norm(x) ⊙ (1 + σ) + δ,   e = operator(u),   y = x + γ ⊙ W_p (e + l(e)),   (δ, σ, γ) = W SiLU(c)

    W starts at zero, so that the block starts as the identity (adaLN-Zero).

    Args:
        dim: C, channels of the map and width of the condition.
        options: of `I2RMB`; it has neither a stride nor a layer scale.

    Shapes: x (batch, dim, height, width) and c (batch, dim) to the shape of x.
    """

    def __init__(self, dim: int, **options: Any):
        super().__init__()
        self.block = I2RMB(dim, layer_scale=None, **options)
        self.modulation = nn.Linear(dim, 3 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x: Float[Tensor, "batch dim height width"], c: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch dim height width"]:
        shift, scale, gate = self.modulation(F.silu(c)).chunk(3, dim=1)
        expanded = self.block.operator(modulate(self.block.norm(x), shift, scale))
        return x + gate[..., None, None] * self.block.project(expanded + self.block.local(expanded))


class DEMOv2(nn.Module):
    """The noise in an image, from the noisy image, its noise level and its class.

    Args:
        dim: channels of the map of tokens.
        layers: blocks, all alike.
        head_dim, exp_ratio, mode, window, kernel_size: of the blocks, as in `I2RMB`.
        size, patch: side of the image, and of the squares that become a token.
        in_channels: of the image; by default those of Stable Diffusion's latents.
        num_classes: one more stands for no class, as classifier-free guidance needs it.
        learn_sigma: whether twice the channels are given, the second half for the variance of a sampling step.

    Shapes: x (batch, in_channels, size, size), t (batch,) in steps, y (batch,) to (batch, channels, size, size).

    Raises:
        ValueError: a size that does not fit.
    """

    def __init__(
        self,
        *,
        dim: int,
        layers: int,
        head_dim: int = 64,
        exp_ratio: float | int = 4,
        mode: str = "spanning",
        window: int = WINDOW_OF_LATENTS,
        kernel_size: int = 5,
        size: int = 32,
        patch: int = 2,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        whole = {"dim": dim, "layers": layers, "size": size, "patch": patch}
        whole |= {"in_channels": in_channels, "num_classes": num_classes}
        check_whole(**whole)
        super().__init__()
        if min(whole.values()) < 1:
            raise ValueError(f"{', '.join(whole)} must be at least 1, got {', '.join(map(str, whole.values()))}")
        if size % patch:
            raise ValueError(f"patch must divide size, got size={size} and patch={patch}")
        self.in_channels, self.num_classes, self.size, self.patch = in_channels, num_classes, size, patch
        self.patches = nn.Conv2d(in_channels, dim, patch, patch)
        grid = grid_positions(size // patch, dim).mT.unflatten(1, (size // patch, size // patch))
        self.positions = nn.Parameter(grid[None], requires_grad=False)
        self.time1, self.time2 = nn.Linear(FREQUENCIES, dim), nn.Linear(dim, dim)
        self.classes = nn.Embedding(num_classes + 1, dim)
        options = {"head_dim": head_dim, "exp_ratio": exp_ratio, "mode": mode, "window": window}
        self.blocks = nn.ModuleList(ModulatedI2RMB(dim, kernel_size=kernel_size, **options) for _ in range(layers))
        self.norm = ChannelNorm(dim, eps=EPS)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Conv2d(dim, patch**2 * in_channels * (2 if learn_sigma else 1), 1)
        self._initialise()

    def _initialise(self) -> None:
        """As DiT is; convolutions of the blocks stay at torch's default, as EMOv2's do."""
        nn.init.xavier_uniform_(self.patches.weight.view(self.patches.out_channels, -1))
        for named in (self.classes, self.time1, self.time2):
            nn.init.normal_(named.weight, std=0.02)
        for zero in (self.modulation, self.head):
            nn.init.zeros_(zero.weight)
        for part in (self.patches, self.time1, self.time2, self.modulation, self.head):
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]  # each was built with one

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        t: Shaped[Tensor, " batch"],
        y: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch out height width"]:
        """`t` counts the steps of noise; `y` is the class, `num_classes` where there is none."""
        seen = (self.in_channels, self.size, self.size)
        if x.shape[1:] != seen:
            raise ValueError(f"expected images of {seen}, channels and pixels, got {tuple(x.shape[1:])}")
        if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            raise ValueError(f"expected t and y of {len(x)} images, got {tuple(t.shape)} and {tuple(y.shape)}")
        tokens = self.patches(x) + self.positions
        levels = noise_level_features(t, FREQUENCIES).to(tokens.dtype)
        c = self.time2(F.silu(self.time1(levels))) + self.classes(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=1)
        return F.pixel_shuffle(self.head(modulate(self.norm(tokens), shift, scale)), self.patch)

    def guided(
        self,
        x: Float[Tensor, "batch channels height width"],
        t: Shaped[Tensor, " batch"],
        y: Int[Tensor, " batch"],
        scale: float | int,
    ) -> Float[Tensor, "batch out height width"]:
        """Classifier-free guidance: ε(none) + scale · (ε(class) − ε(none)), on at most three channels, as in DiT."""
        led = min(3, self.in_channels)
        none = torch.full_like(y, self.num_classes)
        given, free = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, none])).chunk(2)
        return torch.cat([free[:, :led] + scale * (given[:, :led] - free[:, :led]), given[:, led:]], dim=1)


class DiffusionSize(NamedTuple):
    """DiT's width, depth and width of a head."""

    dim: int
    layers: int
    head_dim: int


DIFFUSION_SIZES = {
    "s": DiffusionSize(384, 12, 64),
    "b": DiffusionSize(768, 12, 64),
    "l": DiffusionSize(1024, 24, 64),
    "xl": DiffusionSize(1152, 28, 72),
}


def emov2_diffusion(
    variant: str,
    *,
    mode: str = "spanning",
    window: int = WINDOW_OF_LATENTS,
    kernel_size: int = 5,
    size: int = 32,
    in_channels: int = 4,
    num_classes: int = 1000,
) -> DEMOv2:
    """D-EMOv2 of a published size, with tokens of 2×2 latents.

    Args:
        variant: "s", "b", "l" or "xl".
        mode, window, kernel_size, size, in_channels, num_classes: as in `DEMOv2`.
    """
    if variant not in DIFFUSION_SIZES:
        raise ValueError(f"variant must be one of {', '.join(DIFFUSION_SIZES)}, got {variant!r}")
    return DEMOv2(
        **DIFFUSION_SIZES[variant]._asdict(),
        mode=mode,
        window=window,
        kernel_size=kernel_size,
        size=size,
        in_channels=in_channels,
        num_classes=num_classes,
    )


def emov2_diffusion_digits(
    *,
    dim: int = 48,
    layers: int = 4,
    head_dim: int = 12,
    exp_ratio: float | int = 2,
    mode: str = "spanning",
    window: int = 4,
    kernel_size: int = 3,
    size: int = 8,
    in_channels: int = 1,
    num_classes: int = 10,
) -> DEMOv2:
    """A size that trains in minutes, for 8×8 digits, each pixel a token; ours.

    Args:
        dim, layers, head_dim, exp_ratio, mode, window, kernel_size, size, in_channels, num_classes: as in `DEMOv2`.
    """
    return DEMOv2(
        dim=dim,
        layers=layers,
        head_dim=head_dim,
        exp_ratio=exp_ratio,
        mode=mode,
        window=window,
        kernel_size=kernel_size,
        size=size,
        patch=1,
        in_channels=in_channels,
        num_classes=num_classes,
        learn_sigma=False,
    )
