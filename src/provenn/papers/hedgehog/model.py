"""The systems of the paper (section 5): language models and vision Transformers whose attention alone is exchanged."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from provenn.nn.attention import SoftmaxAttention
from provenn.nn.language import CausalLM, FeedForward, PreNormBlock
from provenn.papers.hedgehog.layers import LinearAttention


def attention(feature_map: str, heads: int, *, bias: bool = True, rotary: bool = False) -> Callable[..., nn.Module]:
    """A maker of attention for a host: "softmax", or the name of a map in `MAPS`."""
    if feature_map == "softmax":
        return partial(SoftmaxAttention, heads=heads, bias=bias, rotary=rotary)
    return partial(LinearAttention, heads=heads, feature_map=feature_map, bias=bias, rotary=rotary)


def hedgehog_gpt2(
    vocab: int = 50257,
    dim: int = 768,
    heads: int = 12,
    layers: int = 12,
    length: int = 1024,
    feature_map: str = "hedgehog",
    dropout: float | int = 0.0,
) -> CausalLM:
    """GPT-2 of 124M parameters with a map of queries and one of keys in each head: 1,179,648 more (section 5.4).

    Args:
        vocab, dim, heads, layers, length: GPT-2's own.
        feature_map: "softmax" for GPT-2 itself, or a name in `MAPS`.
        dropout: as in `CausalLM`.
    """
    return CausalLM(
        vocab,
        dim,
        layers,
        attention(feature_map, heads),
        norm="layer",
        positions="learned",
        max_length=length,
        bias=True,
        dropout=dropout,
        eps=1e-5,
    )


def hedgehog_small(
    vocab: int = 256, dim: int = 96, heads: int = 4, layers: int = 4, feature_map: str = "hedgehog"
) -> CausalLM:
    """A language model that trains on a laptop, with rotary positions turned before the maps.

    Args:
        vocab, dim, heads, layers: as in `CausalLM`.
        feature_map: "softmax", or a name in `MAPS`.
    """
    return CausalLM(vocab, dim, layers, attention(feature_map, heads, bias=False, rotary=True))


class SequenceClassifier(nn.Module):
    """Class of a sequence of tokens: learned positions, blocks that see both ways, the mean over the valid tokens.

    Args:
        channels: kinds of tokens, one channel each; or measurements of a series.
        num_classes: logits.
        length: of the longest sequence.
        dim, heads, layers, feedforward, dropout: of the blocks.
        feature_map: "softmax", or a name in `MAPS`.
        pairs: the class is of two sequences, read by the same blocks. Their means a and b, a · b and a − b go through
            one hidden layer, as Long Range Arena's Retrieval has it (Tay et al., 2020, arXiv:2011.04006).

    Shapes: (batch, tokens, channels) to (batch, num_classes); of pairs (batch, 2, tokens, channels).
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        length: int,
        dim: int = 64,
        heads: int = 2,
        layers: int = 2,
        feedforward: int = 128,
        dropout: float | int = 0.1,
        feature_map: str = "hedgehog",
        pairs: bool = False,
    ):
        super().__init__()
        self.embed = nn.Linear(channels, dim, bias=False)
        self.place = nn.Parameter(0.02 * torch.randn(length, dim))
        inner = partial(FeedForward, hidden=feedforward, bias=True)
        parts: dict[str, Any] = {"feedforward": inner, "norm": nn.LayerNorm, "dropout": dropout}
        mixer = partial(attention(feature_map, heads), causal=False)
        self.blocks = nn.ModuleList(PreNormBlock(dim, mixer, **parts) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.pairs = pairs
        if pairs:
            self.head: nn.Module = nn.Sequential(
                nn.Linear(4 * dim, feedforward), nn.ReLU(), nn.Linear(feedforward, num_classes)
            )
        else:
            self.head = nn.Linear(dim, num_classes)

    def forward(
        self, x: Float[Tensor, "batch *pair tokens channels"], mask: Bool[Tensor, "batch *pair tokens"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Logits; `mask` is True for the tokens of a sequence and False for its padding."""
        if x.dim() != 3 + self.pairs or (self.pairs and x.shape[1] != 2):
            expected = "(batch, 2, tokens, channels)" if self.pairs else "(batch, tokens, channels)"
            raise ValueError(f"expected {expected}, got {tuple(x.shape)}")
        x = self.embed(x)
        if not self.pairs:
            return self.head(self._read(x, mask))
        a, b = self._read(x.flatten(0, 1), None if mask is None else mask.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return self.head(torch.cat([a, b, a * b, a - b], dim=1))

    def _read(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch dim"]:
        """The mean over the valid tokens, after the blocks."""
        if x.shape[1] > len(self.place):
            raise ValueError(f"expected at most {len(self.place)} tokens, got {x.shape[1]}")
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        hidden = x + self.place[: x.shape[1]]
        for block in self.blocks:
            hidden = block(hidden, mask=mask)
        valid = mask[..., None]
        return self.norm(hidden).masked_fill(~valid, 0).sum(1) / valid.sum(1).clamp_min(1)


class TextClassifier(SequenceClassifier):
    """Class or score of a text or of a pair of texts in tokens, called as BERT is.

    Args:
        vocab: how many tokens there are.
        num_classes: logits; 1 for a score.
        length: of the longest example.
        dim, heads, layers, feedforward, dropout, feature_map: as in `SequenceClassifier`.

    Shapes: (batch, tokens) to (batch, num_classes).
    """

    def __init__(
        self,
        vocab: int = 256,
        num_classes: int = 2,
        length: int = 256,
        dim: int = 64,
        heads: int = 4,
        layers: int = 2,
        feedforward: int = 256,
        dropout: float | int = 0.1,
        feature_map: str = "hedgehog",
    ):
        super().__init__(1, num_classes, length, dim, heads, layers, feedforward, dropout, feature_map)
        self.embed, self.part = nn.Embedding(vocab, dim), nn.Embedding(2, dim)  # type: ignore[assignment]  # tokens

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Shaped[Tensor, "batch tokens"] | None = None,
        token_type_ids: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Logits; `attention_mask` is 1 or True for tokens, `token_type_ids` 1 for those of the second text."""
        parts = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        mask = None if attention_mask is None else attention_mask.bool()
        return self.head(self._read(self.embed(input_ids) + self.part(parts), mask))


class VisionTransformer(nn.Module):
    """Patches, learned positions, pre-norm blocks that see both ways, the mean over patches, logits.

    Args:
        in_channels: of an image.
        num_classes: logits.
        size, patch: sides of the image and of a patch, in pixels.
        dim, heads, layers: of the blocks.
        feature_map: "softmax", or a name in `MAPS`.

    Shapes: (batch, in_channels, size, size) to (batch, num_classes).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        size: int,
        patch: int,
        dim: int,
        heads: int,
        layers: int,
        feature_map: str,
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"patch must divide size, got size={size} and patch={patch}")
        self.embed = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.place = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, dim))
        parts: dict[str, Any] = {"feedforward": partial(FeedForward, bias=True), "norm": nn.LayerNorm}
        mixer = partial(attention(feature_map, heads), causal=False)
        self.blocks = nn.ModuleList(PreNormBlock(dim, mixer, **parts) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        tokens = self.embed(x).flatten(2).mT
        if tokens.shape[1] != len(self.place):
            raise ValueError(f"expected images of {len(self.place)} patches, got {tokens.shape[1]}")
        tokens = tokens + self.place
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens).mean(1))


def hedgehog_vit(
    in_channels: int = 1,
    num_classes: int = 10,
    size: int = 8,
    patch: int = 2,
    dim: int = 64,
    heads: int = 4,
    layers: int = 2,
    feature_map: str = "hedgehog",
) -> VisionTransformer:
    """A small vision Transformer for small images, such as digits of 8×8 pixels.

    Args:
        in_channels, num_classes, size, patch, dim, heads, layers, feature_map: as in `VisionTransformer`.
    """
    return VisionTransformer(
        in_channels,
        num_classes,
        size=size,
        patch=patch,
        dim=dim,
        heads=heads,
        layers=layers,
        feature_map=feature_map,
    )
