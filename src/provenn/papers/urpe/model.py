"""The paper's systems: the encoder of its synthetic tasks, the language model, and one of images in our own size."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.attention import check_mask
from provenn.nn.language import CausalLM
from provenn.nn.positions import sinusoidal_encoding
from provenn.nn.transformer import EncoderLayer
from provenn.papers.urpe.layers import ENCODINGS, SPREAD, URPEAttention, share_tables

ABSOLUTE = ("ape", "sinusoidal")
POSITIONS = (*ENCODINGS, *ABSOLUTE)


def attention_called(
    encoding: str, heads: int, *, max_length: int, index: str = "offset", **options: Any
) -> partial[URPEAttention]:
    """The attention of one of the compared encodings; absolute positions have none of their own.

    Raises:
        ValueError: no such encoding.
    """
    if encoding not in POSITIONS:
        raise ValueError(f"encoding must be one of {', '.join(POSITIONS)}, got {encoding!r}")
    inner = "none" if encoding in ABSOLUTE else encoding
    return partial(URPEAttention, heads=heads, max_length=max_length, index=index, encoding=inner, **options)


def fix_sinusoids(table: nn.Embedding) -> None:
    """Sinusoids instead of learned positions, as large as those start; they do not learn."""
    waves = sinusoidal_encoding(torch.arange(table.num_embeddings), table.embedding_dim)
    with torch.no_grad():
        # √2, as the mean square of a sinusoid is a half.
        table.weight.copy_(2**0.5 * SPREAD * waves)
    table.weight.requires_grad_(False)


class SequenceEncoder(nn.Module):
    """The bidirectional encoder of the synthetic tasks (section 5.1): a token out for each token in.

    Embedding, its layer norm, post-norm layers that share one pair of tables, and RoBERTa's head: a map, GELU, a layer
    norm, and the matrix of the outputs with a bias. There are no absolute positions.

    Args:
        vocab: rows of the embedding: the nominal vocabulary and 11, as in the authors' code.
        dim, heads, layers, hidden: of the host.
        encoding: "urpe", "rpe", "none", or absolute positions, "ape" that are learned or "sinusoidal" ones.
        max_length: the longest sequence of absolute positions; of the others, farther offsets have the farthest one's
            numbers.
        index, buckets, max_distance: of the relations, "offset" or "bucket".
        tied: whether the outputs' matrix is the embedding's (even-token prediction) or one of its own (position
            identification), as in the authors' commands.
        share_tables: one pair for all layers, or a pair each.
        dropout: on both branches of a layer.
        init_scale, form: as in `URPEAttention`.

    Shapes: tokens (batch, tokens) to logits (batch, tokens, vocab).
    """

    def __init__(
        self,
        vocab: int = 1011,
        dim: int = 768,
        heads: int = 12,
        layers: int = 3,
        hidden: int = 3072,
        encoding: str = "urpe",
        max_length: int = 128,
        index: str = "offset",
        buckets: int = 64,
        max_distance: int = 128,
        tied: bool = True,
        share_tables: bool = True,
        dropout: float | int = 0.0,
        init_scale: float | int = 1.0,
        form: str = "explicit",
    ):
        super().__init__()
        for name, value in (("vocab", vocab), ("layers", layers), ("hidden", hidden), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        mixer = attention_called(
            encoding, heads, max_length=max_length, index=index, buckets=buckets, max_distance=max_distance,
            causal=False, init_scale=init_scale, form=form,
        )  # fmt: skip
        self.vocab, self.max_length = vocab, max_length
        self.embed = nn.Embedding(vocab, dim)
        self.place = nn.Embedding(max_length, dim) if encoding in ABSOLUTE else None
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks: Any = nn.ModuleList(
            EncoderLayer(dim, mixer, feedforward=hidden, dropout=dropout, activation="gelu") for _ in range(layers)
        )
        self.head_map, self.head_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.head = None if tied else nn.Linear(dim, vocab, bias=False)
        self.head_bias = nn.Parameter(torch.zeros(vocab))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=SPREAD)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.place is not None and encoding == "sinusoidal":
            fix_sinusoids(self.place)
        if share_tables:
            share(self)

    def hidden_states(
        self, tokens: Int[Tensor, "batch tokens"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """The vector of every token after the last layer."""
        check_mask(mask, tokens)
        if not tokens.shape[1]:
            raise ValueError("the sequence has no token: expected at least one")
        x = self.embed(tokens)
        if self.place is not None:
            if tokens.shape[1] > self.max_length:
                raise UserError(f"the sequence has {tokens.shape[1]} tokens, more than max_length={self.max_length}")
            x = x + self.place.weight[: tokens.shape[1]]
        x = self.dropout(self.norm(x))
        if mask is not None:
            x = x * mask[..., None].to(x)
        for block in self.blocks:
            x = block(x, mask=mask)
        return x

    def forward(
        self, tokens: Int[Tensor, "batch tokens"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens vocab"]:
        """`mask` is True where a token is no padding."""
        x = self.head_norm(F.gelu(self.head_map(self.hidden_states(tokens, mask=mask))))
        return F.linear(x, self.embed.weight if self.head is None else self.head.weight) + self.head_bias


def share(model: Any) -> None:
    """One pair of tables for all blocks of a host."""
    share_tables([block.mixer for block in model.blocks])


urpe_synthetic = SequenceEncoder
urpe_synthetic_tiny = partial(SequenceEncoder, vocab=81, dim=64, heads=4, layers=3, hidden=256, max_length=32)


def urpe_lm_tiny(
    vocab: int = 256,
    dim: int = 64,
    heads: int = 4,
    layers: int = 2,
    encoding: str = "urpe",
    max_length: int = 256,
    share_tables: bool = True,
    dropout: float | int = 0.0,
    **attention: Any,
) -> CausalLM:
    """A small causal language model, ours: pre-norm blocks whose attention has the tables of causal offsets.

    Args:
        vocab, dim, heads, layers, dropout: of the host.
        encoding: "urpe", "rpe", "none", or absolute positions, "ape" that are learned or "sinusoidal" ones.
        max_length: offsets with numbers of their own; of absolute positions the longest text.
        share_tables: one pair for all layers, or a pair each.
        attention: more arguments of `URPEAttention`.
    """
    mixer = attention_called(encoding, heads, max_length=max_length, **attention)
    absolute = encoding in ABSOLUTE
    model = CausalLM(
        vocab, dim, layers, mixer, norm="layer", bias=True, dropout=dropout,
        positions="learned" if absolute else "none", max_length=max_length if absolute else None,
    )  # fmt: skip
    if model.place is not None and encoding == "sinusoidal":
        fix_sinusoids(model.place)
    if share_tables:
        share(model)
    return model
