"""MoH-DiT: a diffusion Transformer (Peebles and Xie, 2023, arXiv:2212.09748) with routed heads (section 4.2).

Each block is modulated by the noise level and the class. It is y = x + γ ⊙ f(norm(x) ⊙ (1 + σ) + δ) with (δ, σ, γ) from
a linear map that starts at zero, so that every block starts as the identity (adaLN-Zero).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from provenn.nn.attention import SoftmaxAttention
from provenn.nn.diffusion import FREQUENCIES, grid_positions, noise_level_features
from provenn.papers.moh.layers import BALANCE, MoHAttention


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """Attention and feed-forward part, both modulated by a condition c.

    Args:
        dim: width of a token.
        attention: not causal.

    Shapes: x (batch, tokens, dim) and c (batch, dim) to the shape of x.
    """

    def __init__(self, dim: int, attention: nn.Module):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], c: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(_modulated(self.norm1(x), shift1, scale1))
        inner = F.gelu(self.linear1(_modulated(self.norm2(x), shift2, scale2)), approximate="tanh")
        return x + gate2.unsqueeze(1) * self.linear2(inner)


def _draw_as_one(attention: SoftmaxAttention | MoHAttention) -> None:
    """Xavier's bound of the three maps in one, as the authors have them: drawn apart each would be √2 larger."""
    maps = attention.query.weight, attention.key.weight, attention.value.weight
    fused = nn.init.xavier_uniform_(torch.cat([weight.detach() for weight in maps]))
    with torch.no_grad():
        for weight, drawn in zip(maps, fused.chunk(3)):
            weight.copy_(drawn)


class _Modulation(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.modulation = nn.Linear(dim, 2 * dim)


class DiT(nn.Module):
    """The noise in an image, from the noisy image, its noise level and its class.

    Args:
        dim: width of a token.
        heads: of each block, all of width `head_dim`; a block's heads need not fill its width.
        shared, top_k: h_s and K of each block; None gives plain multi-head attention.
        head_dim: by default dim / heads.
        size, patch: side of the image, and of the squares that become a token.
        in_channels: of the image.
        num_classes: one more stands for no class, as classifier-free guidance needs it.
        learn_sigma: whether twice the channels are given, the second half for the variance of a sampling step.
        balance, execute: as in `MoHAttention`.

    Shapes: x (batch, in_channels, size, size), t (batch,) in steps, y (batch,) to (batch, channels, size, size).
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: Sequence[int],
        shared: Sequence[int] | None,
        top_k: Sequence[int] | None,
        head_dim: int | None = None,
        size: int = 32,
        patch: int = 2,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        balance: float | int = BALANCE,
        execute: str = "dense",
    ):
        super().__init__()
        if size < 1 or patch < 1 or size % patch:
            raise ValueError(f"patch must divide size, both at least 1, got size={size} and patch={patch}")
        if min(dim, in_channels, num_classes, len(heads)) < 1:
            raise ValueError(
                "dim, in_channels, num_classes and the number of blocks must be at least 1, got "
                f"{dim}, {in_channels}, {num_classes} and {len(heads)}"
            )
        if (shared is None) != (top_k is None):
            raise ValueError("shared and top_k are given for each block, or both not at all")
        if shared is not None and top_k is not None and not len(heads) == len(shared) == len(top_k):
            raise ValueError("heads, shared and top_k must have one entry for each block")
        self.in_channels, self.num_classes, self.patch, self.side = in_channels, num_classes, patch, size // patch
        self.patches = nn.Conv2d(in_channels, dim, patch, patch)
        self.positions = nn.Parameter(grid_positions(self.side, dim)[None], requires_grad=False)
        self.time1, self.time2 = nn.Linear(FREQUENCIES, dim), nn.Linear(dim, dim)
        self.classes = nn.Embedding(num_classes + 1, dim)
        blocks = []
        for i, count in enumerate(heads):
            attention: nn.Module
            if shared is None or top_k is None:
                attention = SoftmaxAttention(dim, count, causal=False)
            else:
                attention = MoHAttention(
                    dim,
                    count,
                    shared=shared[i],
                    top_k=top_k[i],
                    head_dim=head_dim,
                    causal=False,
                    balance=balance,
                    execute=execute,
                )
            blocks.append(DiTBlock(dim, attention))
        self.blocks = nn.ModuleList(blocks)
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.final_layer = _Modulation(dim)
        self.head = nn.Linear(dim, patch**2 * in_channels * (2 if learn_sigma else 1))
        self._initialise()

    def _initialise(self) -> None:
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        nn.init.xavier_uniform_(self.patches.weight.view(self.patches.out_channels, -1))
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]
        for named in (self.classes, self.time1, self.time2):
            nn.init.normal_(named.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)  # type: ignore[union-attr,arg-type]
            _draw_as_one(block.attention)  # type: ignore[arg-type]
        nn.init.zeros_(self.final_layer.modulation.weight)
        nn.init.zeros_(self.head.weight)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        t: Shaped[Tensor, " batch"],
        y: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch out height width"]:
        """`t` counts the steps of noise; `y` is the class, `num_classes` where there is none."""
        seen = (self.in_channels, self.side * self.patch, self.side * self.patch)
        if x.shape[1:] != seen:
            raise ValueError(f"expected images of {seen}, channels and pixels, got {tuple(x.shape[1:])}")
        if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            raise ValueError(f"expected t and y of {len(x)} images, got {tuple(t.shape)} and {tuple(y.shape)}")
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        levels = noise_level_features(t, FREQUENCIES).to(tokens.dtype)
        c = self.time2(F.silu(self.time1(levels))) + self.classes(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.final_layer.modulation(F.silu(c)).chunk(2, dim=1)
        out = self.head(_modulated(self.norm_final(tokens), shift, scale))
        # Features of a token are (row, column, channel) of its square.
        out = out.unflatten(1, (self.side, self.side)).unflatten(-1, (self.patch, self.patch, -1))
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def guided(
        self,
        x: Float[Tensor, "batch channels height width"],
        t: Shaped[Tensor, " batch"],
        y: Int[Tensor, " batch"],
        scale: float | int,
    ) -> Float[Tensor, "batch out height width"]:
        """Classifier-free guidance: ε(no class) + scale · (ε(class) − ε(no class)), on the first three channels alone.

        The authors guide three channels only, as their sampler's origin does, also where there are four.
        """
        led = min(3, self.in_channels)
        given, free = self(
            x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, self.num_classes)])
        ).chunk(2)
        guided = free[:, :led] + scale * (given[:, :led] - free[:, :led])
        return torch.cat([guided, given[:, led:]], dim=1)


def _runs(*runs: tuple[int, int]) -> list[int]:
    """(value, how many blocks) one after another."""
    return [value for value, count in runs for _ in range(count)]


def _xl(shared: list[int], top_k: list[int], options: dict[str, Any]) -> DiT:
    return DiT(dim=1152, head_dim=72, heads=_runs((8, 9), (16, 10), (24, 9)), shared=shared, top_k=top_k, **options)


def _large(shared: list[int], top_k: list[int], options: dict[str, Any]) -> DiT:
    return DiT(dim=1024, head_dim=64, heads=_runs((8, 8), (16, 8), (24, 8)), shared=shared, top_k=top_k, **options)


def moh_dit_xl_90(**options: Any) -> DiT:
    """MoH-DiT-XL/2 with 90 % of the heads in use: 675,666,464 parameters."""
    return _xl(_runs((8, 9), (16, 19)), _runs((0, 19), (3, 9)), options)


def moh_dit_xl_75(**options: Any) -> DiT:
    """MoH-DiT-XL/2 with 75 % of the heads in use: 675,689,504 parameters."""
    return _xl(_runs((8, 9), (10, 10), (14, 9)), _runs((0, 9), (2, 19)), options)


def moh_dit_l_90(**options: Any) -> DiT:
    """MoH-DiT-L/2 with 90 % of the heads in use: 458,512,416 parameters."""
    return _large(_runs((8, 8), (16, 16)), _runs((0, 16), (3, 8)), options)


def moh_dit_l_75(**options: Any) -> DiT:
    """MoH-DiT-L/2 with 75 % of the heads in use: 458,528,800 parameters."""
    return _large(_runs((8, 16), (12, 8)), _runs((0, 8), (4, 16)), options)


def moh_dit_b_90(**options: Any) -> DiT:
    """MoH-DiT-B/2 with 90 % of the heads in use: 130,638,368 parameters."""
    shared, top_k = _runs((6, 5), (7, 5), (12, 2)), _runs((4, 10), (0, 2))
    return DiT(dim=768, heads=[12] * 12, shared=shared, top_k=top_k, **options)


def moh_dit_b_75(**options: Any) -> DiT:
    """MoH-DiT-B/2 with 75 % of the heads in use: 130,638,368 parameters."""
    shared, top_k = _runs((4, 2), (6, 8), (12, 2)), _runs((2, 2), (3, 8), (0, 2))
    return DiT(dim=768, heads=[12] * 12, shared=shared, top_k=top_k, **options)


def moh_dit_s_90(**options: Any) -> DiT:
    """MoH-DiT-S/2 with 90 % of the heads in use: 32,997,152 parameters."""
    return DiT(dim=384, heads=[6] * 12, shared=_runs((3, 8), (6, 4)), top_k=_runs((2, 8), (0, 4)), **options)


def moh_dit_s_75(**options: Any) -> DiT:
    """MoH-DiT-S/2 with 75 % of the heads in use: 32,998,688 parameters."""
    shared, top_k = _runs((2, 2), (3, 8), (6, 2)), _runs((1, 6), (2, 4), (0, 2))
    return DiT(dim=384, heads=[6] * 12, shared=shared, top_k=top_k, **options)


PRESETS = {
    "moh_dit_s_90": moh_dit_s_90,
    "moh_dit_s_75": moh_dit_s_75,
    "moh_dit_b_90": moh_dit_b_90,
    "moh_dit_b_75": moh_dit_b_75,
    "moh_dit_l_90": moh_dit_l_90,
    "moh_dit_l_75": moh_dit_l_75,
    "moh_dit_xl_90": moh_dit_xl_90,
    "moh_dit_xl_75": moh_dit_xl_75,
}


def moh_dit_digits(
    *,
    shared: int | None = 3,
    top_k: int | None = 3,
    dim: int = 64,
    heads: int = 8,
    layers: int = 4,
    size: int = 8,
    in_channels: int = 1,
    num_classes: int = 10,
    balance: float | int = BALANCE,
    execute: str = "dense",
) -> DiT:
    """A size that trains in a minute, for 8×8 digits; ours. Without `shared` and `top_k` it is a plain DiT.

    Args:
        shared, top_k: h_s and K, alike in all blocks.
        dim, heads, layers, size, in_channels, num_classes, balance, execute: as in `DiT`.
    """
    each = [None if value is None else [value] * layers for value in (shared, top_k)]
    return DiT(
        dim=dim,
        heads=[heads] * layers,
        shared=each[0],
        top_k=each[1],
        size=size,
        in_channels=in_channels,
        num_classes=num_classes,
        learn_sigma=False,
        balance=balance,
        execute=execute,
    )
