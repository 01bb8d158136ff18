"""The five systems of the paper (section 4, appendix A), and its attentions by name: only the attention differs."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.attention import SoftmaxAttention, check_heads, check_tokens, hide_tokens, split_heads
from provenn.nn.language import CausalLM, Encoder, FeedForward, PreNormBlock
from provenn.nn.positions import sinusoidal_encoding
from provenn.ops.softmax_attention import softmax_attention
from provenn.papers.nprf.baselines import LinformerAttention, SoftmaxAttentionRPE
from provenn.papers.nprf.layers import KernelAttentionRPE

KERNELS: dict[str, dict[str, Any]] = {
    "prf": {"normalize": False},
    "nprf": {"normalize": True},
    "elu": {"normalize": False, "feature_map": "elu"},
}
ATTENTIONS = (
    "softmax",
    "softmax+rpe",
    "softmax-norm",
    "softmax-norm+rpe",
    "prf",
    "prf+rpe",
    "nprf",
    "nprf+rpe",
    "elu",
    "linformer",
)


def attention_called(
    name: str,
    heads: int,
    *,
    features: int = 32,
    max_length: int = 512,
    grid: tuple[int, int] | None = None,
    class_token: bool = False,
    **kernel: Any,
) -> Callable[..., nn.Module]:
    """The factory, of a width and `causal=`, of an attention by the paper's name.

    Args:
        name: "softmax", "softmax-norm", "prf" or "nprf", each also with "+rpe"; or "elu", or "linformer", which is not
            causal. In "softmax-norm", q and k have norm 1. In "prf" there are positive random features of q/d^¼ and
            k/d^¼. The paper's is "nprf": such features of q and k of norm 1.
        heads: attention heads.
        features: m of the random features, and the mixtures of Linformer.
        max_length: how far biases reach, and the longest input of Linformer.
        grid, class_token: of tokens that lie on a grid.
        kernel: more arguments of `KernelAttentionRPE`, such as `form`; the others take those that they have as well.

    >>> attention_called("nprf+rpe", 4)(64).rpe.table.shape
    torch.Size([4, 512])
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {name!r}")
    plain, _, rpe = name.partition("+")
    layer: type[nn.Module] = KernelAttentionRPE
    options: dict[str, Any] = {"heads": heads}
    if plain == "linformer":
        layer = LinformerAttention
        options |= {"mixtures": features, "max_length": max_length if grid is None else math.prod(grid) + class_token}
    elif name == "softmax":
        layer = SoftmaxAttention
    else:
        options["rpe"] = "none" if not rpe else "1d" if grid is None else "2d"
        if plain.startswith("softmax"):
            layer = SoftmaxAttentionRPE
            options["normalize"] = plain == "softmax-norm"
        else:
            options |= {"features": features, **KERNELS[plain]}
    if rpe:
        options |= {"max_length": max_length, "grid": grid, "class_token": class_token}
    free = {"beyond", "bias", "feature_map", "form", "precision", "scale"} - options.keys()
    for key in kernel.keys() - free:
        raise ValueError(f"attention {name!r} has no {key!r} to be set; it takes {', '.join(sorted(free))}")
    taken = inspect.signature(layer).parameters
    return partial(layer, **options, **{key: value for key, value in kernel.items() if key in taken})


def share_biases(blocks: Iterable[Any]) -> None:
    """One table of biases for all layers (section 2.2, after T5): that of the first."""
    first, *rest = [block.mixer for block in blocks]
    for mixer in rest:
        if getattr(mixer, "rpe", None) is not None:
            mixer.rpe = first.rpe


def kernelized(
    model: nn.Module, features: int = 32, *, generator: torch.Generator | None = None, **kernel: Any
) -> nn.Module:
    """A copy of a model with random features instead of e^{q·k} in its softmax attention, not trained (Figure 2).

    Normalised softmax becomes NPRF, plain softmax PRF; maps and biases stay what they are.

    Args:
        model: with `SoftmaxAttention` or `SoftmaxAttentionRPE` inside.
        features: m.
        generator: of the draws.
        kernel: more arguments of `KernelAttentionRPE`, such as `form`.

    Raises:
        ValueError: no softmax attention inside, or one with rotary positions.
    """
    model = copy.deepcopy(model)
    layers = [(name, part) for name, part in model.named_modules() if isinstance(part, SoftmaxAttention)]
    if not layers or any(layer.rotary for _, layer in layers):
        raise ValueError("expected a model with softmax attention inside, without rotary positions")
    for name, layer in layers:
        given: dict[str, Any] = {"causal": layer.causal, "bias": layer.out.bias is not None}
        made = KernelAttentionRPE(
            layer.dim, layer.heads, features=features, normalize=getattr(layer, "normalize", False), rpe="none",
            **given, **kernel,
        )  # fmt: skip
        made.rpe, made.grid = getattr(layer, "rpe", None), getattr(layer, "grid", None)
        for part in ("query", "key", "value", "out"):
            getattr(made, part).load_state_dict(getattr(layer, part).state_dict())
        made.redraw(generator)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made.to(layer.out.weight).train(layer.training))
    return model


def _positions(name: str) -> str:
    """Attention with relative positions needs no others."""
    return "none" if name.endswith("+rpe") else "learned"


def nprf_lm_base(
    vocab: int = 32_000,
    dim: int = 512,
    heads: int = 8,
    layers: int = 6,
    attention: str = "nprf+rpe",
    features: int = 64,
    max_length: int = 512,
    dropout: float | int = 0.0,
    share_bias: bool = True,
    **kernel: Any,
) -> CausalLM:
    """The decoder language model of WikiText-103 (section 4.2), causal biases; the paper does not say its vocabulary.

    Args:
        vocab: how many tokens there are.
        dim, heads, layers: of the host.
        attention: one of `ATTENTIONS` that can be causal; those without RPE get learned positions.
        features: m.
        max_length: how far the biases reach; longer texts clip them. Learned positions end there.
        dropout: of the host.
        share_bias: one table of biases for all layers, or one for each.
        kernel: more arguments of `KernelAttentionRPE`.
    """
    mixer = attention_called(attention, heads, features=features, max_length=max_length, **kernel)
    positions = _positions(attention)
    longest = max_length if positions == "learned" else None
    options: dict[str, Any] = {"norm": "layer", "bias": True, "dropout": dropout}
    model = CausalLM(vocab, dim, layers, mixer, positions=positions, max_length=longest, **options)
    if share_bias:
        share_biases(model.blocks)
    return model


# Ours, to train in minutes; the paper has no model of this size.
nprf_lm_tiny = partial(nprf_lm_base, vocab=256, dim=64, heads=4, layers=2, features=32)
# ImageNet32 pixel by pixel (appendix A.5): 32·32·3 bytes.
nprf_pixels_base = partial(nprf_lm_base, vocab=256, features=32, max_length=3072)


def nprf_encoder_base(
    vocab: int = 30_522,
    dim: int = 768,
    heads: int = 12,
    layers: int = 12,
    attention: str = "nprf+rpe",
    features: int = 64,
    max_length: int = 512,
    num_classes: int | None = None,
    dropout: float | int = 0.0,
    share_bias: bool = True,
    hidden: int | None = None,
    **kernel: Any,
) -> Encoder:
    """The bidirectional encoder of BERT-base's size (section 4.1): logits of every token, or of classes.

    The paper says neither its vocabulary nor m. Args as in `nprf_lm_base`; `num_classes` and `hidden` as in
    `provenn.nn.language.Encoder`.
    """
    mixer = attention_called(attention, heads, features=features, max_length=max_length, **kernel)
    positions = _positions(attention)
    longest = max_length if positions == "learned" else None
    options: dict[str, Any] = {"num_classes": num_classes, "dropout": dropout, "hidden": hidden}
    model = Encoder(vocab, dim, layers, mixer, positions=positions, max_length=longest, **options)
    if share_bias:
        share_biases(model.blocks)
    return model


nprf_encoder_tiny = partial(nprf_encoder_base, vocab=256, dim=64, heads=4, layers=2, features=32)


class VisionTransformer(nn.Module):
    """Classes of images through pre-norm blocks over patches (DeiT's host), with relative positions on the grid.

    Args:
        num_classes, in_channels: of the images.
        image_size: side of the square images; a multiple of `patch`. Where relative positions are the only ones, images
            of other sizes, also multiples, are taken too: their biases are clipped (see `RelativeBias`).
        patch: side of a patch.
        dim, heads, layers: of the host.
        attention: one of `ATTENTIONS`.
        features: m.
        class_token: classify a token that stands before the patches (DeiT's; ours), else the mean over patches (the
            paper's, appendix A.4).
        positions: whether patches get learned absolute positions as well, as in DeiT; the paper does not say.
        dropout: on both branches of a block.
        share_bias: one table of biases for all layers, or one for each.
        kernel: more arguments of `KernelAttentionRPE`.

    Shapes: (batch, in_channels, image_size, image_size) to (batch, num_classes).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        image_size: int = 224,
        patch: int = 16,
        dim: int = 768,
        heads: int = 12,
        layers: int = 12,
        attention: str = "nprf+rpe",
        features: int = 32,
        class_token: bool = False,
        positions: bool = True,
        dropout: float | int = 0.0,
        share_bias: bool = True,
        **kernel: Any,
    ):
        super().__init__()
        if image_size < 1 or patch < 1 or image_size % patch:
            raise ValueError(f"patch must divide image_size, both at least 1, got {patch} and {image_size}")
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        side = image_size // patch
        self.in_channels, self.image_size, self.patch = in_channels, image_size, patch
        self.any_size = attention.endswith("+rpe") and not positions
        self.patches = nn.Conv2d(in_channels, dim, patch, patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, dim)) if class_token else None
        tokens = side * side + class_token
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, dim)) if positions else None
        mixer = attention_called(
            attention, heads, features=features, grid=(side, side), class_token=class_token, **kernel
        )
        self.blocks = nn.ModuleList(
            PreNormBlock(
                dim,
                partial(mixer, causal=False),
                feedforward=partial(FeedForward, bias=True),
                norm=partial(nn.LayerNorm, eps=1e-6),
                dropout=dropout,
            )
            for _ in range(layers)
        )
        if share_bias:
            share_biases(self.blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        x, grid = self._patches(x)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.positions is not None:
            x = x + self.positions
        given = {"grid": grid} if self.any_size else {}
        for block in self.blocks:
            x = block(x, **given)
        x = self.norm(x)
        return self.head(x[:, 0] if self.class_token is not None else x.mean(dim=1))

    def _patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The patches as tokens, row by row, and how many rows and columns there are."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise UserError(f"expected images (batch, {self.in_channels}, height, width), got {tuple(x.shape)}")
        height, width = x.shape[2:]
        side = self.image_size
        if (height, width) != (side, side) and not self.any_size:
            raise UserError(
                f"expected images of {side}×{side} pixels, got {height}×{width}: build with that image_size, or for "
                "any with relative positions alone, attention='nprf+rpe' and positions=False"
            )
        if height % self.patch or width % self.patch:
            raise UserError(f"height and width must be multiples of the patch's {self.patch}, got {height}×{width}")
        return self.patches(x).flatten(2).mT, (height // self.patch, width // self.patch)


class CrossAttention(nn.Module):
    """Softmax attention of one sequence to another, without relative positions: between the two there are none.

    Shapes: (batch, tokens, dim) and (batch, other, dim) to the first. Slot: cross-mixer.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        other: Float[Tensor, "batch other dim"],
        *,
        mask: Bool[Tensor, "batch other"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token of the other sequence may be attended."""
        check_tokens(x, self.query.in_features, None)
        check_tokens(other, self.key.in_features, mask)
        if x.shape[0] != other.shape[0]:
            raise ValueError(f"both sequences need one batch, got {x.shape[0]} and {other.shape[0]}")
        seen = hide_tokens(other, mask)
        pairs = ((self.query, x), (self.key, seen), (self.value, seen))
        q, k, v = (split_heads(m(part), self.heads) for m, part in pairs)
        y = softmax_attention(q, k, v, mask=None if mask is None else mask[:, None, None])
        return self.out(y.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """x ← x + mixer(norm x); x ← x + cross(norm x, source); x ← x + feedforward(norm x)."""

    def __init__(
        self, dim: int, heads: int, mixer: Callable[..., nn.Module], hidden: int | None, dropout: float | int = 0.0
    ):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.mixer, self.cross = mixer(dim), CrossAttention(dim, heads)
        self.feedforward = FeedForward(dim, hidden, bias=True)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        source: Float[Tensor, "batch other dim"],
        *,
        mask: Bool[Tensor, "batch other"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        x = x + self.dropout(self.mixer(self.norm1(x)))
        x = x + self.dropout(self.cross(self.norm2(x), source, mask=mask))
        return x + self.dropout(self.feedforward(self.norm3(x)))


class Translator(nn.Module):
    """The encoder-decoder of IWSLT14 (section 4.3): biases in the encoder's attention and, causal, in the decoder's.

    What joins the two is softmax attention without positions: the paper does not say it.

    Args:
        vocab: tokens that both sides share, with one embedding that also gives the logits.
        dim, heads, layers: of encoder and decoder each.
        hidden: width of the feed-forward parts; 1,024 as in the usual model of this data, the paper does not say it.
        attention, max_length, dropout, share_bias, kernel: as in `nprf_lm_base`.
        features, decoder_features: m of the encoder and of the decoder.

    Shapes: source (batch, other) and target (batch, tokens) to logits (batch, tokens, vocab) of each next target token.
    """

    def __init__(
        self,
        vocab: int = 10_000,
        dim: int = 512,
        heads: int = 4,
        layers: int = 6,
        attention: str = "nprf+rpe",
        features: int = 16,
        decoder_features: int = 24,
        max_length: int = 512,
        hidden: int | None = 1024,
        dropout: float | int = 0.0,
        share_bias: bool = True,
        **kernel: Any,
    ):
        super().__init__()
        self.encoder = nprf_encoder_base(
            vocab, dim, heads, layers, attention, features, max_length, dropout=dropout, share_bias=share_bias,
            hidden=hidden, **kernel,
        )  # fmt: skip
        mixer = attention_called(attention, heads, features=decoder_features, max_length=max_length, **kernel)
        self.blocks = nn.ModuleList(
            DecoderBlock(dim, heads, partial(mixer, causal=True), hidden, dropout) for _ in range(layers)
        )
        if share_bias:
            share_biases(self.blocks)
        self.norm = nn.LayerNorm(dim)
        self.absolute = not attention.endswith("+rpe")

    def forward(
        self,
        source: Int[Tensor, "batch other"],
        target: Int[Tensor, "batch tokens"],
        *,
        mask: Bool[Tensor, "batch other"] | None = None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """`mask` is True where a source token is no padding."""
        read = self.encoder.hidden_states(source, mask=mask)
        x = self.encoder.embed(target)
        if self.absolute:
            x = x + sinusoidal_encoding(torch.arange(target.shape[1], device=x.device), x.shape[-1]).to(x)
        for block in self.blocks:
            x = block(x, read, mask=mask)
        return F.linear(self.norm(x), self.encoder.embed.weight)


# The sizes of sections 4.3 and 4.4 are what the two classes are by default.
nprf_translator_base, nprf_vit_base = Translator, VisionTransformer
nprf_translator_tiny = partial(
    Translator, vocab=256, dim=64, heads=4, layers=2, features=32, decoder_features=32, hidden=256
)
nprf_vit_tiny = partial(
    VisionTransformer,
    num_classes=10,
    in_channels=1,
    image_size=8,
    patch=1,
    dim=64,
    heads=4,
    layers=2,
    features=32,
)
