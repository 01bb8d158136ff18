"""What kernelized attention with relative positions is held against: exact softmax, and Linformer."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.nn.attention import KVCache, SoftmaxAttention, check_heads, check_tokens, split_heads
from provenn.ops.softmax_attention import softmax_attention
from provenn.papers.nprf.layers import make_biases, tokens_on


class SoftmaxAttentionRPE(SoftmaxAttention):
    """Softmax attention with the same biases: α_ij ∝ exp(q_i·k_j / √d + b_{j−i}) (equation 6), what is to be matched.

    Args:
        dim, heads, causal, bias: as in `SoftmaxAttention`.
        normalize: q and k of ℓ2 norm 1 and no 1/√d: the exact model that NPRF approximates (Figure 2).
        rpe: "1d", "2d" or "none".
        max_length, grid, class_token, beyond: as in `KernelAttentionRPE`.

    Shapes: (batch, tokens, dim) to the same. Slot: token-mixer. Streams with a key-value cache.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        normalize: bool = False,
        rpe: str = "1d",
        max_length: int = 512,
        grid: tuple[int, int] | None = None,
        class_token: bool = False,
        beyond: str = "clip",
        causal: bool = True,
        bias: bool = True,
    ):
        check_whole(dim=dim, heads=heads, max_length=max_length)
        super().__init__(dim, heads, causal=causal, bias=bias)
        self.normalize, self.grid = normalize, grid
        self.rpe = make_biases(
            rpe, heads, max_length=max_length, grid=grid, causal=causal, class_token=class_token, beyond=beyond
        )

    def _project(self, x: Tensor, start: int = 0, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._project(x, start, mask)
        if self.normalize:
            root = math.sqrt(q.shape[-1])  # by which the product is divided afterwards
            q, k = F.normalize(q, dim=-1, eps=1e-6) * root, F.normalize(k, dim=-1, eps=1e-6)
        return q, k, v

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended; a token that may attend to nothing gets W_o's bias."""
        if self.rpe is None:
            tokens_on(None, x.shape[1], False, grid)
            return super().forward(x, mask=mask)
        check_tokens(x, self.dim, mask)
        q, k, v = self._project(x, mask=mask)
        b = self.rpe.matrix(tokens_on(self.grid, x.shape[1], self.rpe.of_class is not None, grid)).to(q.dtype)
        if mask is not None:
            b = b.masked_fill(~mask[:, None, None], -torch.inf)
        return self.out(_softmax(q, k, v, b).transpose(1, 2).flatten(2))

    def prefill(
        self, x: Float[Tensor, "batch tokens dim"], state: KVCache | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], KVCache]:
        """Many tokens at once: the outputs, and the cache from which `step` goes on."""
        if self.rpe is None:
            return super().prefill(x, state)
        if not self.causal:
            raise ValueError("attention that sees later tokens cannot stream; build it with causal=True")
        check_tokens(x, self.dim, None)
        state = self.init_state(x.shape[0]) if state is None else state
        q, k, v = self._project(x)
        state = state.append(k, v)
        k, v = state.keys[:, :, : state.length], state.values[:, :, : state.length]
        sides = (state.length,)
        # A row of the matrix for one token; of a prompt's matrix the last rows.
        b = self.rpe(sides).unsqueeze(1) if x.shape[1] == 1 else self.rpe.matrix(sides)[:, -x.shape[1] :]
        return self.out(_softmax(q, k, v, b.to(q.dtype)).transpose(1, 2).flatten(2)), state


def _softmax(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """Attention with biases on the scores; 0 where all are −∞."""
    return softmax_attention(q, k, v, mask=b.expand(q.shape[0], -1, -1, -1))


class LinformerAttention(nn.Module):
    """Softmax over k learned mixtures of the keys and values (Wang et al., 2020, arXiv:2006.04768): O(n·k), not causal.

    y_i = softmax(q_i (E K)ᵀ / √d) F V, E and F: k × max_length, shared by the heads.

    Args:
        dim, heads, bias: as in `SoftmaxAttention`.
        mixtures: k.
        max_length: the longest input.
        causal: must be False: a mixture is of all tokens.

    Shapes: (batch, tokens, dim) to the same. Slot: token-mixer. Parameters: 2 · k · max_length more than softmax's.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mixtures: int = 32,
        max_length: int = 512,
        causal: bool = False,
        bias: bool = True,
    ):
        check_whole(dim=dim, heads=heads, mixtures=mixtures, max_length=max_length)
        if causal:
            raise ValueError("Linformer mixes all tokens, so causal must be False, got True")
        if mixtures < 1 or max_length < 1:
            raise ValueError(f"mixtures and max_length must be at least 1, got {mixtures} and {max_length}")
        super().__init__()
        check_heads(dim, heads)
        self.dim, self.heads, self.causal, self.max_length = dim, heads, causal, max_length
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.mix_keys = nn.Parameter(torch.randn(mixtures, max_length) / math.sqrt(max_length))
        self.mix_values = nn.Parameter(torch.randn(mixtures, max_length) / math.sqrt(max_length))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended; the others are taken out of every mixture."""
        check_tokens(x, self.dim, mask)
        n = x.shape[1]
        if n > self.max_length:
            raise ValueError(f"the sequence has {n} tokens, more than max_length={self.max_length}")
        q, k, v = (split_heads(m(x), self.heads) for m in (self.query, self.key, self.value))
        if mask is not None:
            k, v = (part.masked_fill(~mask[:, None, :, None], 0) for part in (k, v))
        y = softmax_attention(q, self.mix_keys[:, :n] @ k, self.mix_values[:, :n] @ v)
        return self.out(y.transpose(1, 2).flatten(2))
