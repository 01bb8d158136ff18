"""Softmax attention over tokens, in the token-mixer slot."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, in buffers that double when full. Written in place: for inference."""

    keys: Float[Tensor, "batch heads capacity head_dim"]
    values: Float[Tensor, "batch heads capacity head_dim"]
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of the cached tokens, without the room to grow."""
        return 2 * self.keys[:, :, : self.length].numel() * self.keys.element_size()

    def append(self, keys: Tensor, values: Tensor) -> "KVCache":
        """The cache with more tokens at its end."""
        length = self.length + keys.shape[2]
        capacity = self.keys.shape[2]
        if length > capacity:
            room = (0, 0, 0, max(length, 2 * capacity) - capacity)
            old = KVCache(F.pad(self.keys, room), F.pad(self.values, room), self.length)
        else:
            old = self
        old.keys[:, :, self.length : length] = keys
        old.values[:, :, self.length : length] = values
        return KVCache(old.keys, old.values, length)


class SoftmaxAttention(nn.Module):
    """Multi-head attention of every token to the tokens up to it (Vaswani et al., 2017, arXiv:1706.03762).

    y_i = W_o [Σ_j softmax_j(q_i·k_j / √p) v_j], a head having p = dim / heads features; all four maps have biases.

    Args:
        dim: D, width of a token.
        heads: attention heads; must divide `dim`.
        causal: whether token i sees tokens 1..i only, or all.

    Shapes: (batch, tokens, dim) to the same. Parameters: 4·D² + 4·D. Slot: token-mixer. Streams with a key-value cache.
    """

    def __init__(self, dim: int, heads: int, *, causal: bool = True):
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, both at least 1, got dim={dim} and heads={heads}")
        self.dim, self.heads, self.causal = dim, heads, causal
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended; a token that may attend to nothing gets W_o's bias."""
        q, k, v = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            may = mask[:, None, None, :]
            if self.causal:
                may = may & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=may)
        return self.out(y.transpose(1, 2).flatten(2))

    def init_state(self, batch: int) -> KVCache:
        """An empty cache for `batch` streams."""
        keys = self.out.weight.new_empty(batch, self.heads, 16, self.dim // self.heads)
        return KVCache(keys, torch.empty_like(keys), 0)

    def prefill(
        self, x: Float[Tensor, "batch tokens dim"], state: KVCache | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], KVCache]:
        """Many tokens at once: the outputs, and the cache from which `step` goes on."""
        if not self.causal:
            raise ValueError("attention that sees later tokens cannot stream; build it with causal=True")
        state = self.init_state(x.shape[0]) if state is None else state
        q, k, v = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        old, state = state.length, state.append(k, v)
        k, v = state.keys[:, :, : state.length], state.values[:, :, : state.length]
        if x.shape[1] == 1:
            y = F.scaled_dot_product_attention(q, k, v)
        elif old == 0:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            may = torch.ones(x.shape[1], state.length, dtype=torch.bool, device=x.device).tril(old)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=may)
        return self.out(y.transpose(1, 2).flatten(2)), state

    def step(self, x_t: Float[Tensor, "batch dim"], state: KVCache) -> tuple[Float[Tensor, "batch dim"], KVCache]:
        """One token more; time and memory grow with the tokens so far."""
        y, state = self.prefill(x_t.unsqueeze(1), state)
        return y.squeeze(1), state
