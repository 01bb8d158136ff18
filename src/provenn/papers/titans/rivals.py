"""What Titans is set against at one needle in byte text, and the network that reads it."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.nn.attention import SoftmaxAttention, check_tokens
from provenn.papers.titans.studies import (
    BYTES,
    NEEDLE_KEYS,
    NEEDLE_VALUES,
    GatedDeltaRule,
    Mixer,
    PairEmbedding,
    Reader,
    decay_between,
)

NEEDLE_WIDTH, NEEDLE_PARAMETERS = 32, 36_000
CHUNK = 64


class ChunkedDeltaRule(GatedDeltaRule):
    """The mixer of Gated DeltaNet (Yang et al., 2024, arXiv:2412.06464), chunk by chunk, so that time is linear.

    Keys and queries of unit size, a short convolution, a gate and a norm of the output are as there. Shrunk: two heads
    of the model's own width, where theirs have values twice as wide, and one block.

    Shapes: (batch, tokens, dim) to the same.
    """

    def read(
        self,
        x: Float[Tensor, "batch tokens dim"],
        q: Float[Tensor, "batch heads tokens key"],
        k: Float[Tensor, "batch heads tokens key"],
        v: Float[Tensor, "batch heads tokens value"],
    ) -> Float[Tensor, "batch heads tokens value"]:
        """S_t q_t of every token, from an empty state."""
        return chunked_delta_rule(q, k, v, F.logsigmoid(self.keep(x)).mT, self.write(x).sigmoid().mT, CHUNK)


def chunked_delta_rule(
    q: Float[Tensor, "batch heads tokens key"],
    k: Float[Tensor, "batch heads tokens key"],
    v: Float[Tensor, "batch heads tokens value"],
    log_keep: Float[Tensor, "batch heads tokens"],
    write: Float[Tensor, "batch heads tokens"],
    chunk: int,
) -> Float[Tensor, "batch heads tokens value"]:
    """The gated delta rule from an empty state: in a chunk one triangular system, from chunk to chunk the state.

    With g_t the product of the gates since the chunk began, and S its state then, (I + L) u = b (v − g Sᵀk), L as in
    `GatedDeltaRule`. A token reads g_t Sᵀq_t and what was written in its chunk.
    """
    state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    read = []
    parts = (part.split(chunk, dim=2) for part in (q, k, v, log_keep, write))
    for q_c, k_c, v_c, kept, strength in zip(*parts, strict=True):
        since = kept.cumsum(-1).exp().unsqueeze(-1)
        decay, strength = decay_between(kept), strength.unsqueeze(-1)
        before = (strength * (k_c @ k_c.mT) * decay).tril(-1)
        wanted = strength * (v_c - since * (k_c @ state))
        written = torch.linalg.solve_triangular(before, wanted, upper=False, unitriangular=True)
        read.append(since * (q_c @ state) + (q_c @ k_c.mT) * decay @ written)
        state = since[:, :, -1:] * state + (decay[:, :, -1].unsqueeze(-1) * k_c).mT @ written
    return torch.cat(read, dim=2)


class LinearBiasAttention(SoftmaxAttention):
    """Causal attention with ALiBi (Press et al., 2022, arXiv:2108.12409): scores q_i·k_j / √p − m (i − j).

    Head h of H has m = 2^(−8h/H), as there. What is alike in a row leaves the softmax, so that m j, from the last token
    back, is one more feature of the keys, and fused kernels serve.

    Shapes: (batch, tokens, dim) to the same.
    """

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        check_tokens(x, self.dim, mask)
        if mask is not None:
            raise ValueError("no mask: all sequences are of one length")
        q, k, v = self._project(x)
        size, tokens = q.shape[-1], x.shape[1]
        slopes = torch.tensor([2 ** (-8 * (h + 1) / self.heads) for h in range(self.heads)]).to(q)
        bias = math.sqrt(size) * slopes[:, None] * torch.arange(1 - tokens, 1).to(q)
        k = torch.cat([k, bias[:, :, None].expand(*k.shape[:-1], 1)], dim=-1)
        q, v = torch.cat([q, torch.ones_like(q[..., :1])], dim=-1), F.pad(v, (0, 1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=size**-0.5)[..., :-1]
        return self.out(y.transpose(1, 2).flatten(2))


attention_without_positions = partial(SoftmaxAttention, heads=2, bias=False)
attention_with_alibi = partial(LinearBiasAttention, heads=2, bias=False)


# The needle


class NeedleEmbedding(nn.Module):
    """Bytes by a table; behind them the tokens of `PairEmbedding`: a key and a value, or a key without.

    Shapes: (batch, tokens) to (batch, tokens, dim).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.byte = nn.Embedding(BYTES, dim)
        self.pair = PairEmbedding(NEEDLE_KEYS, NEEDLE_VALUES, dim)

    def forward(self, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens dim"]:
        paired = self.pair((tokens - BYTES).clamp_min(0))
        return torch.where((tokens < BYTES)[..., None], self.byte(tokens.clamp_max(BYTES - 1)), paired)


def reading_needles(mixer: Mixer, vocab: int) -> Reader:
    """A study's `build`."""
    return Reader(mixer, NeedleEmbedding(NEEDLE_WIDTH), NEEDLE_WIDTH, NEEDLE_VALUES, NEEDLE_PARAMETERS)
