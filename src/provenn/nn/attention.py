"""Softmax attention over tokens, in the token-mixer slot."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from provenn.distributed.switch import ContextParallel, spread
from provenn.nn.arguments import check_whole
from provenn.nn.positions import rotation, turn
from provenn.ops.softmax_attention import softmax_attention


def check_mask(mask: Tensor | None, x: Shaped[Tensor, "batch tokens *rest"]) -> None:
    """Is this a mask of these tokens?

    Raises:
        ValueError: another shape, or another type than bool: numbers would be added to the scores.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == x.shape[:2]):
        return
    kind = type(mask).__name__
    if isinstance(mask, Tensor):
        kind = f"{str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}"
    raise ValueError(
        f"mask must be bool of shape (batch, tokens) = {tuple(x.shape[:2])}, True where a token may be attended, "
        f"got {kind}"
    )


def packed_positions(mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Where each token stands once its row's padding has moved behind its last token.

    >>> packed_positions(torch.tensor([[False, True, False, True]])).tolist()
    [[2, 0, 3, 1]]
    """
    tokens, padding = mask.cumsum(dim=1), (~mask).cumsum(dim=1)
    return torch.where(mask, tokens, tokens[:, -1:] + padding) - 1


def pack(x: Shaped[Tensor, "batch tokens *rest"], positions: Int[Tensor, "batch tokens"]) -> Tensor:
    """Tokens moved to their `packed_positions`."""
    index = positions.view(*positions.shape, *[1] * (x.dim() - 2)).expand_as(x)
    return torch.zeros_like(x).scatter(1, index, x)


def unpack(x: Shaped[Tensor, "batch tokens *rest"], positions: Int[Tensor, "batch tokens"]) -> Tensor:
    """Tokens moved back from their `packed_positions`."""
    return x.gather(1, positions.view(*positions.shape, *[1] * (x.dim() - 2)).expand_as(x))


def check_tokens(x: Tensor, dim: int, mask: Tensor | None = None) -> None:
    """Are these tokens of a layer's width, and is this a mask of them?

    Raises:
        ValueError: another number of dimensions, another width, no token, or what `check_mask` refuses.
    """
    if x.dim() != 3 or x.shape[-1] != dim or not x.shape[1]:
        raise ValueError(f"expected (batch, tokens, {dim}) with at least one token, got {tuple(x.shape)}")
    check_mask(mask, x)


def check_heads(dim: int, heads: int, *, rotary: bool = False) -> None:
    """Is this a number of heads that share `dim`, and can their halves be turned against each other?

    Raises:
        ValueError: heads that do not divide the width, or an odd width with rotary positions.
    """
    if dim < 1 or heads < 1 or dim % heads:
        raise ValueError(f"heads must divide dim, both at least 1, got dim={dim} and heads={heads}")
    if rotary and dim // heads % 2:
        raise ValueError(f"rotary positions need an even head width, got dim={dim} and heads={heads}")


def split_heads(x: Float[Tensor, "batch tokens dim"], heads: int) -> Float[Tensor, "batch heads tokens head_dim"]:
    """The part of each head of queries, keys or values; a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def hide_tokens(x: Float[Tensor, "batch tokens dim"], mask: Tensor | None) -> Float[Tensor, "batch tokens dim"]:
    """Tokens to make keys and values of: zeros where `mask` is False.

    A weight of 0 is not enough. Padding may hold anything, and 0 times NaN is NaN.
    """
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


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
            # Doubling copies each token about once in all; growing by one would copy all of them at every step.
            room = (0, 0, 0, max(length, 2 * capacity) - capacity)
            buffers = KVCache(F.pad(self.keys, room), F.pad(self.values, room), self.length)
        else:
            buffers = self
        buffers.keys[:, :, self.length : length] = keys
        buffers.values[:, :, self.length : length] = values
        return KVCache(buffers.keys, buffers.values, length)


class SoftmaxAttention(nn.Module):
    """Multi-head attention of every token to the tokens up to it (Vaswani et al., 2017, arXiv:1706.03762).

    y_i = W_o [Σ_j softmax_j(q_i·k_j / √p) v_j], a head having p = dim / heads features.

    Args:
        dim: D, width of a token.
        heads: attention heads; must divide `dim`.
        causal: whether token i sees tokens 1..i only, or all.
        bias: of the four maps.
        rotary: turn queries and keys by their position (`provenn.nn.positions.rotate`).

    Shapes: (batch, tokens, dim) to the same. Parameters: 4·D², and 4·D with biases. Slot: token-mixer. Streams with a
    key-value cache. Where sequences are spread over processes (`provenn.distributed`), it attends to all.
    """

    context_parallel: ContextParallel | None = None

    def __init__(self, dim: int, heads: int, *, causal: bool = True, bias: bool = True, rotary: bool = False):
        check_whole(dim=dim, heads=heads)
        super().__init__()
        check_heads(dim, heads, rotary=rotary)
        self.dim, self.heads, self.causal, self.rotary = dim, heads, causal, rotary
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def _project(self, x: Tensor, start: int = 0, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens that stand from `start` on."""
        seen = hide_tokens(x, mask)
        q, k, v = (split_heads(m(y), self.heads) for m, y in ((self.query, x), (self.key, seen), (self.value, seen)))
        if self.rotary:
            sharing = spread(self.context_parallel)
            if sharing is not None:
                positions = sharing.positions(x.device)
            else:
                positions = torch.arange(start, start + x.shape[1], device=x.device)
            # Keys are cached turned: their positions do not change, and the product depends on the difference alone.
            angles = rotation(positions, q.shape[-1], q.dtype)
            q, k = turn(q, *angles), turn(k, *angles)
        return q, k, v

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended; a token that may attend to nothing gets W_o's bias."""
        check_tokens(x, self.dim, mask)
        q, k, v = self._project(x, mask=mask)
        sharing = spread(self.context_parallel)
        if sharing is not None:
            if mask is not None:
                raise ValueError("sequences that are spread over processes take no mask")
            y = sharing.attend(q, k, v, causal=self.causal)
        elif mask is None:
            y = softmax_attention(q, k, v, causal=self.causal)
        else:
            visible = mask[:, None, None, :]
            if self.causal:
                visible = visible & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            y = softmax_attention(q, k, v, mask=visible)
        return self.out(y.transpose(1, 2).flatten(2))

    def init_state(self, batch: int) -> KVCache:
        """An empty cache for `batch` streams."""
        # Room for 16 tokens; never read before it is written.
        keys = self.out.weight.new_empty(batch, self.heads, 16, self.dim // self.heads)
        return KVCache(keys, torch.empty_like(keys), 0)

    def prefill(
        self, x: Float[Tensor, "batch tokens dim"], state: KVCache | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], KVCache]:
        """Many tokens at once: the outputs, and the cache from which `step` goes on."""
        if not self.causal:
            raise ValueError("attention that sees later tokens cannot stream; build it with causal=True")
        state = self.init_state(x.shape[0]) if state is None else state
        q, k, v = self._project(x, state.length)
        past_length, state = state.length, state.append(k, v)
        k, v = state.keys[:, :, : state.length], state.values[:, :, : state.length]
        # One token sees the whole cache, so no mask is built, and fused kernels that take none can serve.
        if x.shape[1] == 1:
            y = softmax_attention(q, k, v)
        # `is_causal` aligns the triangle to the first key, so it is right for an empty past alone.
        elif past_length == 0:
            y = softmax_attention(q, k, v, causal=True)
        else:
            visible = torch.ones(x.shape[1], state.length, dtype=torch.bool, device=x.device).tril(past_length)
            y = softmax_attention(q, k, v, mask=visible)
        return self.out(y.transpose(1, 2).flatten(2)), state

    def step(self, x_t: Float[Tensor, "batch dim"], state: KVCache) -> tuple[Float[Tensor, "batch dim"], KVCache]:
        """One token more; time and memory grow with the tokens so far."""
        y, state = self.prefill(x_t.unsqueeze(1), state)
        return y.squeeze(1), state


class WindowState(NamedTuple):
    """Keys and values of the last tokens, and how many there were in all. Written in place: for inference.

    A ring: what token t left stands at t mod window, until token t + window replaces it.
    """

    keys: Float[Tensor, "batch heads window head_dim"]
    values: Float[Tensor, "batch heads window head_dim"]
    seen: int


class SlidingWindowAttention(SoftmaxAttention):
    """Causal attention to the last `window` tokens, the own one included (Beltagy et al., 2020, Longformer).

    Runs block by block, in time O(tokens · window), and streams with a cache of constant size.

    Args:
        dim, heads, bias, rotary: as in `SoftmaxAttention`.
        window: how many tokens a token sees.
        causal: must be True.

    Shapes: (batch, tokens, dim) to the same. Slot: token-mixer.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 128,
        causal: bool = True,
        bias: bool = True,
        rotary: bool = False,
    ):
        check_whole(dim=dim, heads=heads, window=window)
        super().__init__(dim, heads, bias=bias, rotary=rotary)
        if not causal:
            raise ValueError("a sliding window looks back alone: causal must be True")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window = window

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended; a token that may attend to nothing gets W_o's bias."""
        check_tokens(x, self.dim, mask)
        return self._attend(x, self.init_state(x.shape[0]), mask)[0]

    def init_state(self, batch: int) -> WindowState:  # type: ignore[override]  # the slot asks for no one class of state
        """A window before its first token."""
        keys = self.out.weight.new_zeros(batch, self.heads, self.window, self.dim // self.heads)
        return WindowState(keys, torch.zeros_like(keys), 0)

    def _attend(self, x: Tensor, state: WindowState, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs, and all keys and values: those of `state` before those of x."""
        q, new_k, new_v = self._project(x, state.seen, mask)
        tokens, w = x.shape[1], self.window
        if isinstance(tokens, torch.SymInt):  # an export with open length: whole blocks, and always some to fill up
            block, blocks = w, tokens // w + 1
        else:
            block = min(tokens, w)
            blocks = -(-tokens // block)
        tail = (0, 0, 0, blocks * block - tokens)
        # Queries of a block see its own keys and the `window` before them: windows that overlap, cut from one row.
        k, v = (
            # The ring, oldest first: the oldest token is at index seen mod window.
            torch.cat([past.roll(-(state.seen % w), 2), new], dim=2)
            for past, new in ((state.keys, new_k), (state.values, new_v))
        )
        # (batch, heads, blocks, window + block, head_dim): a view in which keys stand twice; no tokens × tokens matrix.
        wide_k, wide_v = (F.pad(tensor, tail).unfold(2, w + block, block).transpose(-1, -2) for tensor in (k, v))
        wide_q = F.pad(q, tail).unflatten(2, (blocks, block))
        row, column = (torch.arange(size, device=x.device) for size in (block, w + block))
        in_window = (column > row[:, None]) & (column <= row[:, None] + w)
        position = torch.arange(blocks, device=x.device)[:, None, None] * block + column
        # Before the stream's first token the ring is empty: those positions are zeros that no query may see.
        visible = in_window & (position >= w - min(state.seen, w))
        if mask is not None:
            real = F.pad(F.pad(mask, (w, 0), value=True), (0, blocks * block - tokens), value=False)
            visible = visible & real.unfold(1, w + block, block)[:, None, :, None, :]
        y = softmax_attention(wide_q, wide_k, wide_v, mask=visible)
        y = y.flatten(2, 3)[:, :, :tokens]
        return self.out(y.transpose(1, 2).flatten(2)), k, v

    def prefill(  # type: ignore[override]  # as above
        self, x: Float[Tensor, "batch tokens dim"], state: WindowState | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], WindowState]:
        """Many tokens at once: the outputs, and the window from which `step` goes on."""
        state = self.init_state(x.shape[0]) if state is None else state
        # The last `window` keys, turned into a ring again: token t at t mod window.
        y, k, v = self._attend(x, state, None)
        seen, w = state.seen + x.shape[1], self.window
        return y, WindowState(k[:, :, -w:].roll(seen % w, 2), v[:, :, -w:].roll(seen % w, 2), seen)

    def step(  # type: ignore[override]  # as above
        self, x_t: Float[Tensor, "batch dim"], state: WindowState
    ) -> tuple[Float[Tensor, "batch dim"], WindowState]:
        """One token more, in time and memory that do not grow."""
        q, k, v = self._project(x_t.unsqueeze(1), state.seen)
        slot, seen = state.seen % self.window, state.seen + 1
        state.keys[:, :, slot], state.values[:, :, slot] = k.squeeze(2), v.squeeze(2)
        # Order in the ring does not matter: softmax is a sum, and positions are in the keys.
        filled = min(seen, self.window)
        y = softmax_attention(q, state.keys[:, :, :filled], state.values[:, :, :filled])
        return self.out(y.flatten(1)), WindowState(state.keys, state.values, seen)
