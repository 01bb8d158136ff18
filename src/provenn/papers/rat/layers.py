"""RAT: recurrence inside chunks, attention across them (Wei et al., 2025, arXiv:2507.04416), section 3."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.nn.attention import KVCache, check_heads, check_tokens, split_heads
from provenn.nn.positions import rotate
from provenn.ops.chunk_attention import Earlier, chunk_attention
from provenn.ops.linear_recurrence import linear_recurrence

POSITIONS = ("chunk", "token", "none")


def chrono_bias(dim: int, length: int) -> Float[Tensor, " dim"]:
    """Gate biases ln u with u ~ U(1, length − 1): memories of all lengths up to `length` (Tallec and Ollivier, 2018).

    >>> chrono_bias(3, length=2).tolist()
    [0.0, 0.0, 0.0]
    """
    # For a length of 1 the authors' code leaves memory as it finds it; here the biases are ln 1 = 0.
    return torch.empty(dim).uniform_(1, max(1, length - 1)).log()


def _check_state(batch: int, running: Tensor) -> None:
    if running.shape[0] != batch:
        raise ValueError(f"the state is of {running.shape[0]} streams, the input of {batch}")


def _check_step(x_t: Tensor, dim: int, running: Tensor) -> None:
    if x_t.dim() != 2 or x_t.shape[-1] != dim:
        raise ValueError(f"expected one token a stream, (batch, {dim}), got {tuple(x_t.shape)}")
    _check_state(x_t.shape[0], running)


class RNNState(NamedTuple):
    """What the gated RNN remembers: one vector a stream, in float32 at least."""

    value: Float[Tensor, "batch dim"]


class RNNMixer(nn.Module):
    """The gated RNN that RAT becomes when one chunk holds the whole sequence (section 2).

    ṽ_t = g_t ⊙ ṽ_{t−1} + (1 − g_t) ⊙ v_t,  y_t = W_o (z_t ⊙ ṽ_t), with z = σ(W_z x), v = W_v x, g = σ(W_g x + b_g).

    Args:
        dim: D, width of a token.
        length: the memories that b_g starts with reach up to so many tokens; the paper takes its training length.
        causal: always True: the layer reads from the first token on.

    Shapes: (batch, tokens, dim) to the same. Parameters: 4·D² + D. Slot: token-mixer. Streams with D numbers.
    """

    def __init__(self, dim: int, *, length: int = 4096, causal: bool = True):
        check_whole(dim=dim, length=length)
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        if not causal:
            raise ValueError("the RNN reads from the first token on, so causal must be True, got False")
        self.dim, self.length, self.causal = dim, length, causal
        # One product for z, v and g, its rows in the order of the authors' checkpoints.
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(dim))
        self.out = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear maps N(0, 0.02²), gate biases by the chrono rule (appendix A)."""
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02)
        with torch.no_grad():
            self.gate_bias.copy_(chrono_bias(self.dim, self.length))

    def prefill(
        self,
        x: Float[Tensor, "batch tokens dim"],
        state: RNNState | None = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], RNNState]:
        """Many tokens at once: the outputs, and the state from which `step` or another `prefill` goes on."""
        check_tokens(x, self.dim, mask)
        if state is not None:
            _check_state(x.shape[0], state.value)
        z, v, g = self.project(x).chunk(3, dim=-1)
        # A gate g remembers about 1 / (1 − g) tokens, and bfloat16 has no number between 0.996 and 1.
        g = (g + self.gate_bias).to(torch.promote_types(x.dtype, torch.float32)).sigmoid()
        inputs = (1 - g) * v
        if mask is not None:
            # Gate 1 and input 0 hand the state on as it is.
            skipped = ~mask.unsqueeze(-1)
            g, inputs = g.masked_fill(skipped, 1), inputs.masked_fill(skipped, 0)
        states, last = linear_recurrence(g, inputs, state=None if state is None else state.value)
        return self.out(z.sigmoid() * states.to(x.dtype)), RNNState(last)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be read; one that may not leaves the state as it is."""
        return self.prefill(x, mask=mask)[0]

    def init_state(self, batch: int) -> RNNState:
        """The state of `batch` streams before their first token."""
        weight = self.out.weight
        return RNNState(weight.new_zeros(batch, self.dim, dtype=torch.promote_types(weight.dtype, torch.float32)))

    def step(self, x_t: Float[Tensor, "batch dim"], state: RNNState) -> tuple[Float[Tensor, "batch dim"], RNNState]:
        """One token more, in time and memory that do not depend on how many came before."""
        _check_step(x_t, self.dim, state.value)
        z, v, g = self.project(x_t).chunk(3, dim=-1)
        g = (g + self.gate_bias).to(state.value.dtype).sigmoid()
        # lerp(v, h, g) = v + g (h − v) = g h + (1 − g) v in one kernel.
        value = torch.lerp(v.to(g.dtype), state.value, g)
        return self.out(z.sigmoid() * value.to(x_t.dtype)), RNNState(value)


class RATState(NamedTuple):
    """What RAT remembers: a key and a value for each chunk, and the running pair of the chunk that is being read.

    `chunks` holds a slot for each chunk, rotated keys and values, the last one being the running pair so far. It is
    written in place: for inference. `position` counts the tokens that each stream has read, `length` those of the
    longest one. The running pair is held in float32 at least.
    """

    chunks: KVCache
    key: Float[Tensor, "batch dim"]
    value: Float[Tensor, "batch dim"]
    position: Int[Tensor, " batch"]
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks read so far and of the running pair, without the room to grow."""
        return self.chunks.nbytes + self.key.nbytes + self.value.nbytes + self.position.nbytes


class RATMixer(nn.Module):
    """Bridge [R]NN and [AT]tention: gated recurrence inside chunks of L tokens, softmax attention across them.

    With token t the l-th of chunk c, and states that start from zero in every chunk (section 3):

    ṽ_{c,l} = g ⊙ ṽ_{c,l−1} + (1 − g) ⊙ v,  k̃_{c,l} = g ⊙ k̃_{c,l−1} + (1 − g) ⊙ k,
    y = W_o (z ⊙ softmax([q·K̃_{j,L−1} for j < c, q·k̃_{c,l}] / √p) [Ṽ_{j,L−1}, ṽ_{c,l}])

    where z = σ(W_z x), g = σ(W_g x + b_g) and v are of full width. All heads share `groups` queries and keys: head h
    has those of group h mod G. The gates are not shared, so after the recurrence each head has keys of its own.

    L = 1 is attention over (1 − g) ⊙ k and (1 − g) ⊙ v, a chunk as long as the sequence is `RNNMixer`.

    Args:
        dim: D, width of a token.
        heads: H, attention heads of width p = D / H; must divide `dim`.
        chunk: L, tokens a chunk.
        groups: G, queries and keys that the heads share; must divide `heads`.
        positions: what rotates q and k̃ (base 10,000): the number of the "chunk", of the "token", or "none".
        causal: always True: a token sees finished chunks, and its own up to itself.

    Shapes: (batch, tokens, dim) to the same. Parameters: 4·D² + 2·G·p·D + D. Slot: token-mixer. A stream grows by 2·D
    numbers a chunk.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        chunk: int = 16,
        groups: int = 2,
        positions: str = "chunk",
        causal: bool = True,
    ):
        check_whole(dim=dim, heads=heads, chunk=chunk, groups=groups)
        super().__init__()
        check_heads(dim, heads, rotary=positions != "none")
        if groups < 1 or heads % groups:
            raise ValueError(f"groups must divide heads and be at least 1, got groups={groups} and heads={heads}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
        if not causal:
            raise ValueError("RAT's chunks are read from the first token on, so causal must be True, got False")
        self.dim, self.heads, self.chunk, self.groups = dim, heads, chunk, groups
        self.positions, self.causal = positions, causal
        shared = groups * (dim // heads)
        # z, v, g, q, k: the order of the authors' checkpoints.
        self.widths = (dim, dim, dim, shared, shared)
        self.project = nn.Linear(dim, sum(self.widths), bias=False)
        self.gate_bias = nn.Parameter(torch.empty(dim))
        self.out = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear maps N(0, 0.02²), gate biases by the chrono rule for the chunk length (appendix A), zero for L = 1."""
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02)
        with torch.no_grad():
            self.gate_bias.copy_(chrono_bias(self.dim, self.chunk))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z, v, g, q, k of the tokens, all of width D; the gates z and g in (0, 1), g in float32 at least."""
        z, v, g, q, k = self.project(x).split(self.widths, dim=-1)
        g = (g + self.gate_bias).to(torch.promote_types(x.dtype, torch.float32)).sigmoid()
        # Whole groups are repeated, g0 g1 g0 g1 …, as the authors' checkpoints have it.
        repeat = self.heads // self.groups
        q, k = (tensor.unsqueeze(-2).expand(*tensor.shape[:-1], repeat, -1).flatten(-2) for tensor in (q, k))
        return z.sigmoid(), v, g, q, k

    def _rotate(self, x: Tensor, token: Tensor) -> Tensor:
        """Queries or keys (batch, heads, tokens, p) turned by the number of their chunk, or of their token."""
        if self.positions == "none":
            return x
        return rotate(x, token // self.chunk if self.positions == "chunk" else token)

    def _recur(self, g: Tensor, x: Tensor, chunk: int, state: Tensor | None = None) -> Tensor:
        """The recurrence inside each chunk of (batch, tokens, dim); `state` goes on in the first chunk alone."""
        g, x = (tensor.unflatten(1, (-1, chunk)) for tensor in (g, x))
        if state is not None:
            # (batch, chunks, dim): the running state before the first chunk, zeros before all others.
            state = F.pad(state.unsqueeze(1), (0, 0, 0, g.shape[1] - 1))
        # (batch, chunks, L, dim), chunks side by side; by a scan, as division by products of gates underflows.
        return linear_recurrence(g, x, state=state)[0].flatten(1, 2)

    def prefill(
        self,
        x: Float[Tensor, "batch tokens dim"],
        state: RATState | None = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], RATState]:
        """Many tokens at once: the outputs, and the state from which `step` or another `prefill` goes on.

        Prompts of different lengths are padded on either side, and `mask` marks their tokens. A token that it hides is
        left out, as if its sequence were shorter, so its position counts for no chunk.
        """
        check_tokens(x, self.dim, mask)
        if state is not None:
            _check_state(x.shape[0], state.value)
        z, v, g, q, k = self._project(x)
        # Key and value share the gate, so that a chunk's key weighs its tokens as its value does.
        v, k = (1 - g) * v, (1 - g) * k
        # Without a past and without holes, tokens lie in chunks as they come: no copy to their positions is needed.
        if state is None and mask is None:
            y, final = self._whole(g, v, k, q)
        else:
            state = self.init_state(x.shape[0]) if state is None else state
            y, final = self._resumed(g, v, k, q, state=state, mask=mask)
        return self.out(z * y), final

    def _whole(self, g: Tensor, v: Tensor, k: Tensor, q: Tensor) -> tuple[Tensor, RATState]:
        """A sequence from its first token on; g, v and k come in the type that is summed in, q in that of the layer."""
        batch, n, _ = q.shape
        # Exported for any number of tokens, always filled up: whether that is needed would be a condition on n.
        open_size = isinstance(n, torch.SymInt)
        # A sequence within one chunk needs no padding up to L.
        chunk = self.chunk if open_size else min(self.chunk, n)
        # A gate of 1 and nothing to add carry the last state on to the end of its chunk.
        padding = (0, 0, 0, (n // chunk + 1) * chunk - n if open_size else -n % chunk)
        g, v, k, q = F.pad(g, padding, value=1), F.pad(v, padding), F.pad(k, padding), F.pad(q, padding)
        v, k = self._recur(g, v, chunk), self._recur(g, k, chunk)
        token = torch.arange(q.shape[1], device=q.device)
        # Turned after the recurrence, which carries the order inside a chunk itself: only chunks need positions.
        queries, keys = (self._rotate(split_heads(tensor.to(q.dtype), self.heads), token) for tensor in (q, k))
        values = split_heads(v.to(q.dtype), self.heads)
        y = chunk_attention(queries, keys, values, chunk=chunk)[:, :, :n]
        # Copies: a view would keep every token's keys alive for as long as the state lives.
        count = -(-n // chunk)
        ends = slice(chunk - 1, count * chunk, chunk)
        cache = KVCache(keys[:, :, ends].clone(), values[:, :, ends].clone(), count)
        position = torch.full((batch,), n, device=q.device)
        return y.transpose(1, 2).flatten(2), RATState(cache, k[:, n - 1].clone(), v[:, n - 1].clone(), position, n)

    def _resumed(
        self, g: Tensor, v: Tensor, k: Tensor, q: Tensor, *, state: RATState, mask: Tensor | None
    ) -> tuple[Tensor, RATState]:
        """The same after `state` and without the tokens that `mask` hides: each is put where it stands in its chunk."""
        batch, n, _ = q.shape
        mask = torch.ones(batch, n, dtype=torch.bool, device=q.device) if mask is None else mask
        first_chunk, start = state.position // self.chunk, state.position % self.chunk
        count = mask.sum(dim=1)
        # Hidden tokens come last, where nothing sees them.
        rank = torch.where(mask, mask.cumsum(dim=1) - 1, count.unsqueeze(1) + (~mask).cumsum(dim=1) - 1)
        positions = (start.unsqueeze(1) + rank).unsqueeze(-1).expand(-1, -1, self.dim)
        # Enough for a stream whose first token is the last of its chunk: one size for all streams of the batch.
        chunks = -(-(n + self.chunk - 1) // self.chunk)

        # (batch, tokens, dim) to (batch, chunks · L, dim), each token where it stands in its chunk, `fill` elsewhere.
        def place_in_chunks(tensor: Tensor, fill: int) -> Tensor:
            tensor = tensor.masked_fill(~mask.unsqueeze(-1), fill)
            return tensor.new_full((batch, chunks * self.chunk, self.dim), fill).scatter(1, positions, tensor)

        g, v, k, q = place_in_chunks(g, 1), place_in_chunks(v, 0), place_in_chunks(k, 0), place_in_chunks(q, 0)
        continues = (start > 0).unsqueeze(1)
        # A stream whose last chunk is finished begins the next one from zero.
        v, k = (self._recur(g, x, self.chunk, h * continues) for x, h in ((v, state.value), (k, state.key)))
        # (batch, 1, chunks · L): streams of a batch stand at different positions.
        token = torch.arange(chunks * self.chunk, device=q.device) + (first_chunk * self.chunk).view(-1, 1, 1)
        queries, keys = (self._rotate(split_heads(tensor.to(q.dtype), self.heads), token) for tensor in (q, k))
        values = split_heads(v.to(q.dtype), self.heads)
        filled_slots = slice(state.chunks.length)
        earlier = Earlier(state.chunks.keys[:, :, filled_slots], state.chunks.values[:, :, filled_slots], first_chunk)
        y = chunk_attention(queries, keys, values, chunk=self.chunk, earlier=earlier)
        y = y.transpose(1, 2).flatten(2).gather(1, positions)

        # A stream with no token in this call and none before has none: its running pair is then never read.
        last = (start + count - 1).clamp_min(0).view(-1, 1, 1).expand(-1, 1, self.dim)
        length = state.length + n
        slots_written = first_chunk.view(-1, 1, 1, 1) + torch.arange(chunks, device=q.device).view(-1, 1)

        def append_chunks(before: Tensor, new: Tensor) -> Tensor:
            # The unfinished chunk has a slot too, overwritten when it is resumed.
            ends = new[:, :, self.chunk - 1 :: self.chunk]
            grown = F.pad(before, (0, 0, 0, chunks)).scatter(2, slots_written.expand_as(ends), ends)
            return grown[:, :, : -(-length // self.chunk)]

        cache = KVCache(
            append_chunks(earlier.keys, keys), append_chunks(earlier.values, values), -(-length // self.chunk)
        )
        key, value = k.gather(1, last).squeeze(1), v.gather(1, last).squeeze(1)
        return y, RATState(cache, key, value, state.position + count, length)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be read; one that may not is left out, as if the sequence were shorter."""
        return self.prefill(x, mask=mask)[0]

    def init_state(self, batch: int) -> RATState:
        """The state of `batch` streams before their first token."""
        weight = self.out.weight
        # Room for 16 chunks; a full cache doubles.
        keys = weight.new_zeros(batch, self.heads, 16, self.dim // self.heads)
        running = weight.new_zeros(batch, self.dim, dtype=torch.promote_types(weight.dtype, torch.float32))
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return RATState(KVCache(keys, torch.zeros_like(keys), 0), running, torch.zeros_like(running), position, 0)

    def step(self, x_t: Float[Tensor, "batch dim"], state: RATState) -> tuple[Float[Tensor, "batch dim"], RATState]:
        """One token more; time and memory grow with the chunks so far."""
        _check_step(x_t, self.dim, state.value)
        z, v, g, q, k = self._project(x_t)
        continues = (state.position % self.chunk > 0).unsqueeze(1)
        value = torch.lerp(v.to(g.dtype), state.value * continues, g)
        key = torch.lerp(k.to(g.dtype), state.key * continues, g)
        token = state.position.view(-1, 1, 1)
        queries, keys, values = (
            split_heads(tensor.to(x_t.dtype).unsqueeze(1), self.heads) for tensor in (q, key, value)
        )
        queries, keys = self._rotate(queries, token), self._rotate(keys, token)
        # The longest stream opens a slot when it begins a chunk; shorter ones write into slots that are there already.
        chunks = state.chunks if state.length % self.chunk else state.chunks.append(keys, values)
        # Written at every token: the running pair of the chunk at hand is its slot so far, so one softmax covers both.
        slot = (state.position // self.chunk).view(-1, 1, 1, 1)
        for buffer, last in ((chunks.keys, keys), (chunks.values, values)):
            buffer.scatter_(2, slot.expand_as(last), last)
        visible = torch.arange(chunks.length, device=x_t.device) <= slot
        y = F.scaled_dot_product_attention(
            queries, chunks.keys[:, :, : chunks.length], chunks.values[:, :, : chunks.length], attn_mask=visible
        )
        new_state = RATState(chunks, key, value, state.position + 1, state.length + 1)
        return self.out(z * y.flatten(1)), new_state
