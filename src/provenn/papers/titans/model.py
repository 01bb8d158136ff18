"""The systems of the paper: language models of four variants, a forecaster and a classifier of sequences.

Blocks are Llama's with a Titans mixer instead of attention (camera-ready, section 3.3). Depth, width and heads are
those of its Table 5; what it leaves open, such as tied embeddings, is ours, and its names are not counts to the digit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.language import CausalLM, PreNormBlock, SwiGLU
from provenn.papers.titans.layers import LongTermMemory, MemoryAsContext, MemoryAsGate, MemoryAsLayer, MemoryOptions

VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "lmm": LongTermMemory,
    "mac": MemoryAsContext,
    "mag": MemoryAsGate,
    "mal": MemoryAsLayer,
}


class MixerOptions(MemoryOptions, total=False):
    """Options that every variant's mixer takes: those of the memory, and N_p."""

    persistent: int


class SizedOptions(MixerOptions, total=False):
    """Options of the models of the paper's sizes: a mixer's, what attention sees, and how often MAC asks its memory."""

    window: int
    stride: int


def titans_mixer(
    variant: str,
    heads: int = 4,
    memory_heads: int = 1,
    window: int = 128,
    stride: int = 1,
    **options: Unpack[MixerOptions],
) -> Callable[..., nn.Module]:
    """The token mixer of a variant, with one name for what each calls its own.

    Args:
        variant: "lmm", "mac", "mag" or "mal".
        heads: attention heads; LMM has none.
        memory_heads: heads of the memory.
        window: tokens that attention sees: the window, and for MAC the segment.
        stride: for MAC, every so many tokens of a segment ask the memory.
        options: of the variant and its memory: persistent, depth, chunk, ...
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    own: dict[str, Any] = {
        "lmm": {"heads": memory_heads},
        "mac": {"heads": heads, "memory_heads": memory_heads, "segment": window, "stride": stride},
    }.get(variant, {"heads": heads, "memory_heads": memory_heads, "window": window})
    return partial(VARIANTS[variant], **own, **options)


def titans_lm(
    variant: str = "mag",
    vocab: int = 256,
    dim: int = 96,
    layers: int = 4,
    heads: int = 4,
    memory_heads: int = 4,
    window: int = 64,
    stride: int = 1,
    hidden: int | None = None,
    **options: Unpack[MixerOptions],
) -> CausalLM:
    """A Titans language model of any size: pre-norm blocks of a variant's mixer and SwiGLU.

    As it stands it has width 96 and 4 layers, and trains here in minutes.

    Args:
        variant, heads, memory_heads, window, stride, options: as in `titans_mixer`.
        vocab, dim, layers, hidden: as in `provenn.nn.language.CausalLM`.
    """
    mixer = titans_mixer(variant, heads, memory_heads, window, stride, **options)
    return CausalLM(vocab, dim, layers, mixer, feedforward="swiglu", hidden=hidden)


def _sized(
    dim: int,
    layers: int,
    heads: int,
    vocab: int,
    variant: str,
    hidden: int | None = None,
    **given: Unpack[SizedOptions],
) -> CausalLM:
    """Appendix E.1: a window of 2,048, segments of 512 with 256 memory tokens, 128 persistent tokens, chunks of 16."""
    options: SizedOptions = {"window": 512 if variant == "mac" else 2048, "stride": 2, "persistent": 128, **given}
    return titans_lm(variant, vocab, dim, layers, heads, heads, hidden=hidden, **options)


def titans_170m(vocab: int = 32000, variant: str = "mag", **options: Unpack[SizedOptions]) -> CausalLM:
    """12 blocks of width 768, 16 heads."""
    return _sized(768, 12, 16, vocab, variant, **options)


def titans_340m(vocab: int = 32000, variant: str = "mag", **options: Unpack[SizedOptions]) -> CausalLM:
    """24 blocks of width 1,024, 16 heads."""
    return _sized(1024, 24, 16, vocab, variant, **options)


def titans_400m(vocab: int = 32000, variant: str = "mag", **options: Unpack[SizedOptions]) -> CausalLM:
    """As 340m with a wider feed-forward part, which is ours: Table 5 leaves this size out."""
    return _sized(1024, 24, 16, vocab, variant, hidden=3584, **options)


def titans_760m(vocab: int = 32000, variant: str = "mag", **options: Unpack[SizedOptions]) -> CausalLM:
    """24 blocks of width 1,536, 16 heads."""
    return _sized(1536, 24, 16, vocab, variant, **options)


def titans_1_3b(vocab: int = 32000, variant: str = "mag", **options: Unpack[SizedOptions]) -> CausalLM:
    """18 blocks of width 2,048, 8 heads."""
    return _sized(2048, 18, 8, vocab, variant, **options)


class _Blocks(nn.Module):
    """Linear embedding, pre-norm blocks of a mixer and SwiGLU, norm: what reads a series."""

    def __init__(self, channels: int, dim: int, layers: int, mixer: Callable[..., nn.Module]):
        super().__init__()
        if channels < 1 or layers < 1:
            raise ValueError(f"channels and layers must be at least 1, got {channels} and {layers}")
        self.embed = nn.Linear(channels, dim)
        norm = partial(nn.RMSNorm, eps=1e-6)
        self.blocks = nn.ModuleList(PreNormBlock(dim, mixer, feedforward=SwiGLU, norm=norm) for _ in range(layers))
        self.norm = norm(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x)


class SequenceClassifier(nn.Module):
    """Class of a sequence, say of one-hot nucleotides: blocks, the mean over the valid tokens, linear (section 5.6).

    Args:
        channels: measurements a token.
        num_classes: classes.
        length: of the longest series; not used, since no position is learned.
        dim, layers: of the stack.
        mixer: makes the token mixer; by default LMM.
        options: of LMM.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        length: int | None = None,
        dim: int = 48,
        layers: int = 2,
        mixer: Callable[..., nn.Module] | None = None,
        **options: Unpack[MixerOptions],
    ):
        super().__init__()
        self.stack = _Blocks(channels, dim, layers, mixer or titans_mixer("lmm", **options))
        self.head = nn.Linear(dim, num_classes)

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Logits; `mask` is True for the tokens of a series and False for its padding."""
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        valid = mask.unsqueeze(-1)
        hidden = self.stack(x.masked_fill(~valid, 0), mask).masked_fill(~valid, 0)
        return self.head(hidden.sum(dim=1) / valid.sum(dim=1).clamp_min(1))


class Forecaster(nn.Module):
    """The next `horizon` values of a series from its last `context`, on the scale of the window (section 5.5).

    Each channel is normalised by the window's mean and standard deviation, and the forecast scaled back; it is read off
    the last token. A linear map of the window is added, as in the framework that the paper puts its memory into.

    Args:
        channels: measurements a token.
        context, horizon: tokens in, at least 2, and out.
        dim, layers, mixer, options: as in `SequenceClassifier`.
    """

    def __init__(
        self,
        channels: int,
        context: int,
        horizon: int,
        dim: int = 32,
        layers: int = 1,
        mixer: Callable[..., nn.Module] | None = None,
        **options: Unpack[MixerOptions],
    ):
        super().__init__()
        if context < 2 or horizon < 1:
            raise ValueError(f"context must be at least 2 and horizon at least 1, got {context} and {horizon}")
        self.context, self.horizon = context, horizon
        self.stack = _Blocks(channels, dim, layers, mixer or titans_mixer("lmm", **options))
        self.head = nn.Linear(dim, horizon * channels)
        self.linear = nn.Linear(context, horizon)

    def forward(self, x: Float[Tensor, "batch context channels"]) -> Float[Tensor, "batch horizon channels"]:
        if x.shape[1] != self.context:
            raise ValueError(f"the window must have context={self.context} tokens, got {x.shape[1]}")
        mean, std = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True, correction=0).clamp_min(1e-5)
        scaled = (x - mean) / std
        recalled = self.head(self.stack(scaled)[:, -1]).unflatten(-1, (self.horizon, -1))
        return (recalled + self.linear(scaled.mT).mT) * std + mean
