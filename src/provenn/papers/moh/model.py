"""MoH language models (section 4.3), and a small vision Transformer; MoH-ViT and MoH-DiT have files of their own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.attention import SoftmaxAttention
from provenn.nn.language import CausalLM, FeedForward, PreNormBlock
from provenn.papers.moh.layers import BALANCE, MoHAttention


def attention_factory(
    heads: int,
    shared: int | None,
    top_k: int | None,
    *,
    router: str = "linear",
    balance: float | int = BALANCE,
    execute: str = "dense",
    **options: bool | str,
) -> Callable[..., nn.Module]:
    """MoH for a width, or multi-head attention where `shared` and `top_k` are not given."""
    if (shared is None) != (top_k is None):
        raise ValueError(
            f"shared and top_k are both given, or both None for multi-head attention, got {shared} and {top_k}"
        )
    if shared is None:
        return partial(SoftmaxAttention, heads=heads, **options)  # type: ignore[arg-type]
    chosen = {"shared": shared, "top_k": top_k, "router": router, "balance": balance, "execute": execute}
    return partial(MoHAttention, heads=heads, **chosen, **options)  # type: ignore[arg-type]


def _lm(
    vocab: int,
    dim: int,
    layers: int,
    heads: int,
    hidden: int | None,
    shared: int | None,
    top_k: int | None,
    tied: bool,
    **options: Any,
) -> CausalLM:
    attention = attention_factory(heads, shared, top_k, bias=False, rotary=True, **options)
    return CausalLM(vocab, dim, layers, attention, feedforward="swiglu", hidden=hidden, norm="rms", tied=tied)


def moh_llm_s(
    vocab: int = 65_536,
    *,
    shared: int | None = 6,
    top_k: int | None = 3,
    balance: float | int = BALANCE,
    execute: str = "dense",
) -> CausalLM:
    """MoH-LLM-S: 12 layers, width 768, 12 heads; 186 million parameters.

    Args:
        vocab: how many tokens there are.
        shared, top_k: h_s and K, which the paper does not give; both None for multi-head attention. The default uses
            75 % of the heads; 2 and 4 use 50 %.
        balance, execute: as in `MoHAttention`; "gather" computes the heads in use alone, "auto" where it is no slower.
    """
    return _lm(vocab, 768, 12, 12, 2048, shared, top_k, tied=False, balance=balance, execute=execute)


def moh_llm_b(
    vocab: int = 65_536,
    *,
    shared: int | None = 8,
    top_k: int | None = 4,
    balance: float | int = BALANCE,
    execute: str = "dense",
) -> CausalLM:
    """MoH-LLM-B: 24 layers, width 1536, 16 heads; 882 million parameters, 881 with multi-head attention.

    Args:
        vocab, shared, top_k, balance, execute: as in `moh_llm_s`.
    """
    return _lm(vocab, 1536, 24, 16, 4096, shared, top_k, tied=False, balance=balance, execute=execute)


def moh_small(
    vocab: int = 256,
    *,
    dim: int = 96,
    layers: int = 4,
    heads: int = 8,
    shared: int | None = 4,
    top_k: int | None = 2,
    router: str = "linear",
    balance: float | int = BALANCE,
    execute: str = "dense",
) -> CausalLM:
    """A language model that trains in minutes; ours.

    Args:
        vocab, dim, layers, heads: its size.
        shared, top_k, router, balance, execute: as in `MoHAttention`; the first two None for multi-head attention.
    """
    options = {"router": router, "balance": balance, "execute": execute}
    return _lm(vocab, dim, layers, heads, None, shared, top_k, tied=True, **options)


class PatchClassifier(nn.Module):
    """A plain vision Transformer for small images: patches, learned positions, pre-norm blocks, mean, linear.

    Args:
        attention: makes an attention for a width, not causal.
        dim, layers: its size.
        size, patch: side of the image, and of the squares that become a token.
        in_channels, num_classes: of the data.

    Shapes: (batch, in_channels, size, size) to (batch, num_classes).
    """

    def __init__(
        self,
        attention: Callable[..., nn.Module],
        *,
        dim: int = 64,
        layers: int = 3,
        size: int = 8,
        patch: int = 2,
        in_channels: int = 1,
        num_classes: int = 10,
    ):
        super().__init__()
        if size < 1 or patch < 1 or size % patch:
            raise ValueError(f"patch must divide size, both at least 1, got size={size} and patch={patch}")
        if min(dim, layers, in_channels, num_classes) < 1:
            raise ValueError(
                "dim, layers, in_channels and num_classes must be at least 1, got "
                f"{dim}, {layers}, {in_channels} and {num_classes}"
            )
        self.seen = (in_channels, size, size)
        self.patches = nn.Conv2d(in_channels, dim, patch, patch)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, (size // patch) ** 2, dim), std=0.02))
        make = partial(attention, causal=False)
        feedforward = partial(FeedForward, bias=True)
        self.blocks = nn.ModuleList(
            PreNormBlock(dim, make, feedforward=feedforward, norm=nn.LayerNorm) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        if x.shape[1:] != self.seen:
            raise ValueError(f"expected images of {self.seen}, channels and pixels, got {tuple(x.shape[1:])}")
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def moh_vit_digits(
    *,
    shared: int | None = 3,
    top_k: int | None = 3,
    heads: int = 8,
    balance: float | int = BALANCE,
    execute: str = "dense",
    dim: int = 64,
    layers: int = 3,
    size: int = 8,
    patch: int = 2,
    in_channels: int = 1,
    num_classes: int = 10,
) -> PatchClassifier:
    """A plain vision Transformer with MoH for small images; ours.

    Args:
        shared, top_k, heads, balance, execute: as in `MoHAttention`; the first two None for multi-head attention.
        dim, layers, size, patch, in_channels, num_classes: as in `PatchClassifier`.
    """
    return PatchClassifier(
        attention_factory(heads, shared, top_k, balance=balance, execute=execute),
        dim=dim,
        layers=layers,
        size=size,
        patch=patch,
        in_channels=in_channels,
        num_classes=num_classes,
    )
