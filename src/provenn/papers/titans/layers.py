"""Titans (Behrouz, Zhong and Mirrokni, 2024, arXiv:2501.00663): a neural memory, and three ways to build it in."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.positions import rotate
from provenn.nn.streaming import map_state
from provenn.ops.memory_update import (
    ACTIVATIONS,
    MemoryState,
    Surprise,
    current_weights,
    memory_update,
    read_memory,
)

# Where these gates start, σ(−2) and σ(−1) of the largest step. A momentum of one half beside a step of one half makes a
# step of 2θ / (1 − η) = 2, at the edge of oscillation.
MOMENTUM, STEP = -2.0, -1.0

_observed: list[list[Surprise]] = []


@contextmanager
def observe_surprise() -> Iterator[list[Surprise]]:
    """Collect how surprised each memory is by each token, in the order in which they run.

    >>> memory = NeuralMemory(8)
    >>> with observe_surprise() as found:
    ...     y = memory(torch.randn(2, 5, 8))
    >>> found[0].norm.shape
    torch.Size([2, 1, 5])
    """
    found: list[Surprise] = []
    _observed.append(found)
    try:
        yield found
    finally:
        _observed.pop()


@contextmanager
def frozen_memory(model: nn.Module) -> Iterator[None]:
    """Stop every memory of a model from learning while the context is open; what they know can still be read."""
    memories = [part for part in model.modules() if isinstance(part, NeuralMemory)]
    before = [memory.writing for memory in memories]
    for memory in memories:
        memory.writing = False
    try:
        yield
    finally:
        for memory, writing in zip(memories, before):
            memory.writing = writing


class Mixer(nn.Module, ABC):
    """What the four mixers share: a whole sequence and one token are both a `prefill`."""

    dim: int

    def reset_parameters(self) -> None:
        """Start anew: linear maps that keep the size of what they are given, and memories that know nothing."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
            if isinstance(part, NeuralMemory):
                part.reset_memory()

    @abstractmethod
    def init_state(self, batch: int) -> Any:
        """The state of `batch` streams before their first token."""

    @abstractmethod
    def prefill(
        self,
        x: Float[Tensor, "batch tokens dim"],
        state: Any = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Any]:
        """Many tokens at once: the outputs, and the state from which `step` or another `prefill` goes on."""

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended and remembered."""
        return self.prefill(x, mask=mask)[0]

    def step(self, x_t: Float[Tensor, "batch dim"], state: Any) -> tuple[Float[Tensor, "batch dim"], Any]:
        """One token more, in time and memory that do not depend on how many came before."""
        if x_t.dim() != 2 or x_t.shape[-1] != self.dim:
            raise ValueError(f"expected one token a stream, (batch, {self.dim}), got {tuple(x_t.shape)}")
        y, state = self.prefill(x_t.unsqueeze(1), state)
        return y.squeeze(1), state

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.dim or x.shape[1] < 1:
            raise ValueError(f"expected (batch, tokens, {self.dim}) with at least one token, got {tuple(x.shape)}")
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"mask must be (batch, tokens) = {tuple(x.shape[:2])}, got {tuple(mask.shape)}")


class NeuralState(NamedTuple):
    """A neural memory between two tokens: what it holds, and the tokens that its convolution still needs."""

    memory: MemoryState
    tail: Float[Tensor, "batch reach channels"]


class MemoryOptions(TypedDict, total=False):
    """Options of `NeuralMemory` that whatever is built around one hands on."""

    depth: int
    expansion: float | int
    chunk: int
    momentum: bool
    decay: bool
    kernel: int
    max_step: float | int | None
    limit: float | int | None
    forget_bias: float | int
    read: str
    activation: str


class NeuralMemory(Mixer):
    """The long-term memory: an MLP that learns, while it reads, to give v_t where it is asked k_t (section 3.1).

    q, k, v = SiLU(conv(x W)), q and k of unit length (section 4.4);  α, η = σ(x w + b),  θ = θ_max σ(x w + b);
    S_t = η_t S_{t−1} − θ_t ∇‖M_{t−1}(k_t) − v_t‖²,  M_t = (1 − α_t) M_{t−1} + S_t,  y_t = M_t(q_t)   (equations 8-15)

    In chunks the gradient is taken at the weights of the chunk's start (section 3.2).

    Args:
        dim: D, width of a token.
        heads: memories that share the width; must divide `dim`.
        depth: L_M, layers of the memory; 1 is a matrix.
        expansion: hidden width of the memory, as a multiple of a head's width.
        chunk: b, tokens whose gradients are taken at the same weights; 1 is the sequential rule.
        momentum, decay: whether there are η and α; without them they are 0.
        kernel: tokens that the causal depthwise convolution spans; 1 is none.
        max_step: θ_max; by default 1 / (chunk · depth): a chunk of one key adds up its steps, a deep one those
            of its layers, and where the sum overshoots the memory diverges. A larger one writes more sharply, at
            one's own risk.
        limit: a gradient of norm n is brought to limit · tanh(n / limit); None leaves it.
        forget_bias: b of α: at first a token stays for about 1 / σ(b) others, 150 of them by default. Where that is
            more than a training sequence has, longer ones fill the memory as training never saw it.
        read: "post" reads after the token is written, "pre" before.
        activation: φ inside the memory, "silu" or "gelu".
        causal: always True.

    Shapes: (batch, tokens, dim) to the same, in what the memory recalls. Slot: token-mixer. A stream keeps the memory's
    weights, its momentum, the weights at the chunk's start, and kernel − 1 tokens.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        depth: int = 2,
        expansion: float | int = 4,
        chunk: int = 16,
        momentum: bool = True,
        decay: bool = True,
        kernel: int = 4,
        max_step: float | int | None = None,
        limit: float | int | None = None,
        forget_bias: float | int = -5.0,
        read: str = "post",
        activation: str = "silu",
        causal: bool = True,
    ):
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, both at least 1, got dim={dim} and heads={heads}")
        for name, value in (("depth", depth), ("chunk", chunk), ("kernel", kernel)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        width = dim // heads
        hidden = round(expansion * width)
        if hidden < 1:
            raise ValueError(f"expansion must leave a hidden width of at least 1, got {expansion} of {width}")
        for name, bound in (("max_step", max_step), ("limit", limit)):
            if bound is not None and bound <= 0:
                raise ValueError(f"{name} must be above 0, got {bound}")
        if read not in ("post", "pre") or activation not in ACTIVATIONS:
            raise ValueError(
                f"read must be post or pre and activation one of {', '.join(ACTIVATIONS)}, got {read!r}, {activation!r}"
            )
        if not causal:
            raise ValueError("a memory learns as it reads, so causal must be True, got False")
        self.dim, self.heads, self.chunk, self.kernel = dim, heads, chunk, kernel
        self.momentum, self.decay, self.limit = momentum, decay, limit
        self.max_step = 1 / (chunk * depth) if max_step is None else max_step
        self.forget_bias, self.read_at, self.activation, self.writing = forget_bias, read, activation, True
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.convolution = nn.Parameter(torch.empty(kernel, 3 * dim)) if kernel > 1 else None
        self.gates = nn.Linear(dim, heads * (1 + momentum + decay))
        sizes = [width, *[hidden] * (depth - 1), width]
        self.memory = nn.ParameterList(torch.empty(heads, a, b) for a, b in pairwise(sizes))
        self.reset_parameters()

    def reset_memory(self) -> None:
        """Start with an M_0 that knows nothing: its last matrix is 0, so that all it recalls was written."""
        if self.convolution is not None:
            nn.init.uniform_(self.convolution, -(self.kernel**-0.5), self.kernel**-0.5)
        for weight in self.memory:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.zeros_(self.memory[-1])
        starts = [STEP, *[self.forget_bias] * self.decay, *[MOMENTUM] * self.momentum]
        with torch.no_grad():
            self.gates.bias.view(-1, self.heads).copy_(torch.tensor(starts).unsqueeze(1))

    @property
    def if_diverging(self) -> str:
        """What helps where training with this memory has diverged."""
        return f"a max_step below {self.max_step:g} or a limit of 1 for the memory"

    def init_state(self, batch: int) -> NeuralState:
        """M_0, no momentum, and a convolution that has seen zeros; numbers in float32 at least."""
        weight = self.project.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        memory = MemoryState.start([w.to(dtype) for w in self.memory], batch, momentum=self.momentum)
        return NeuralState(memory, weight.new_zeros(batch, self.kernel - 1, 3 * self.dim))

    def _projected(self, x: Tensor, tail: Tensor, kinds: int = 3) -> tuple[list[Tensor], Tensor]:
        """The first `kinds` of q, k and v, (batch, heads, tokens, width) each, and the convolution's new tail."""
        channels = kinds * self.dim
        y = F.linear(x, self.project.weight[:channels])
        if self.convolution is not None:
            y = torch.cat([tail, y], dim=1)
            tail, tokens = y[:, -tail.shape[1] :], x.shape[1]
            y = sum(
                (y[:, i : i + tokens] * tap for i, tap in enumerate(self.convolution[:, :channels])), y.new_zeros(())
            )
        parts = F.silu(y).unflatten(-1, (kinds, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return [F.normalize(part, dim=-1, eps=1e-6) if i < 2 else part for i, part in enumerate(parts)], tail

    def _merged(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(2)

    def recall(
        self,
        x: Float[Tensor, "batch tokens dim"],
        weights: Sequence[Float[Tensor, "batch heads _ _"]],
        tail: Float[Tensor, "batch reach dim"],
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch reach dim"]]:
        """M*(x W_Q): what weights recall, and nothing is written. `tail` is the convolution's, of the queries alone."""
        (q,), tail = self._projected(x, tail, 1)
        y = read_memory(q.to(weights[0].dtype), weights, activation=self.activation)
        return self._merged(y.to(x.dtype)), tail

    def prefill(
        self,
        x: Float[Tensor, "batch tokens dim"],
        state: NeuralState | None = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], NeuralState]:
        """Read many tokens, learning from each: what is recalled at each, and the state from which the next goes on."""
        self._check(x, mask)
        state = self.init_state(len(x)) if state is None else state
        if not self.writing:
            (q, *_), tail = self._projected(x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0), state.tail)
            y = read_memory(
                q.to(state.memory.layers[0].dtype), current_weights(state.memory), activation=self.activation
            )
            return self._merged(y.to(x.dtype)), NeuralState(state.memory, tail)
        y, state, surprise = self._learn(x, state, mask, surprised=bool(_observed))
        if surprise is not None:
            _observed[-1].append(surprise)
        return y, state

    def _learn(
        self, x: Tensor, state: NeuralState, mask: Tensor | None = None, surprised: bool = False
    ) -> tuple[Tensor, NeuralState, Surprise | None]:
        x = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)
        (q, k, v), tail = self._projected(x, state.tail)
        logits = self.gates(x).unflatten(-1, (-1, self.heads)).permute(2, 0, 3, 1)
        gates = logits.to(state.memory.layers[0].dtype).sigmoid()
        y, memory, surprise = memory_update(
            q,
            k,
            v,
            step=self.max_step * gates[0],
            forget=gates[1] if self.decay else torch.zeros_like(gates[0]),
            momentum=gates[-1] if self.momentum else None,
            state=state.memory,
            chunk=self.chunk,
            mask=mask,
            read=self.read_at,
            activation=self.activation,
            limit=self.limit,
            surprised=surprised,
        )
        return self._merged(y), NeuralState(memory, tail), surprise

    def primed(self, prefix: Float[Tensor, "persistent dim"], batch: int) -> tuple[Tensor, NeuralState]:
        """What persistent tokens recall, and the memory that has read them as a chunk of their own.

        They come first and are the same for all of a batch, so they are read once.
        """
        state = self.init_state(1)
        if not len(prefix):
            return prefix.expand(batch, *prefix.shape), map_state(lambda x: x.expand(batch, *x.shape[1:]), state)
        y, state, _ = self._learn(prefix.unsqueeze(0), state)
        state = state._replace(memory=MemoryState(state.memory.layers, current_weights(state.memory)))
        return y.expand(batch, *y.shape[1:]), map_state(lambda x: x.expand(batch, *x.shape[1:]), state)


class AttentionCache(NamedTuple):
    """Keys and values of the last window − 1 tokens, and which of them may be attended."""

    keys: Float[Tensor, "batch heads reach kinds width"]
    values: Float[Tensor, "batch heads reach kinds width"]
    seen: Bool[Tensor, "batch reach"]


def _append(cache: AttentionCache, keys: Tensor, values: Tensor, seen: Tensor) -> AttentionCache:
    k, v = torch.cat([cache.keys, keys], dim=2), torch.cat([cache.values, values], dim=2)
    return AttentionCache(k, v, torch.cat([cache.seen, seen], dim=1))


def _last(cache: AttentionCache, count: int) -> AttentionCache:
    """The last `count` tokens; where there are fewer, unseen ones before them."""
    start = cache.seen.shape[1] - count
    room = max(0, -start)
    k, v = (F.pad(part, (0, 0, 0, 0, room, 0))[:, :, max(0, start) :] for part in (cache.keys, cache.values))
    return AttentionCache(k, v, F.pad(cache.seen, (room, 0))[:, max(0, start) :])


class PrefixAttention(nn.Module):
    """Softmax attention of a token to persistent tokens and to the last `window` tokens, each of `kinds` vectors.

    A window's keys are turned by their distance (rotary positions); persistent tokens stand nowhere, and are as near to
    every token. No map has a bias.

    Args:
        dim: D, width of a token.
        heads: attention heads; must divide `dim`, into an even width.
        window: tokens that a token sees, the own one included.
        kinds: vectors that a token brings to be attended: 1 for itself, 2 with what the memory recalls of it.
    """

    def __init__(self, dim: int, heads: int, window: int, kinds: int = 1):
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, both at least 1, got dim={dim} and heads={heads}")
        if dim // heads % 2:
            raise ValueError(f"rotary positions need an even head width, got dim={dim} and heads={heads}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.dim, self.heads, self.window, self.kinds = dim, heads, window, kinds
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def init_state(self, batch: int) -> AttentionCache:
        """A window before its first token."""
        keys = self.out.weight.new_zeros(batch, self.heads, 0, self.kinds, self.dim // self.heads)
        seen = torch.zeros(batch, 0, dtype=torch.bool, device=keys.device)
        return _last(AttentionCache(keys, keys, seen), self.window - 1)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        context: Sequence[Float[Tensor, "batch tokens dim"]],
        prefix: Float[Tensor, "batch persistent dim"],
        cache: AttentionCache | None = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        ahead: int = 0,
    ) -> tuple[Float[Tensor, "batch tokens dim"], AttentionCache]:
        """Attend from x to `context`, its `kinds` vectors a token; what `cache` holds comes before.

        Args:
            mask: True where a token may be attended.
            ahead: how many of the first kinds are visible at later tokens of the call too, which is not causal.
        """
        tokens, window = x.shape[1], self.window
        block = min(tokens, window)
        blocks = -(-tokens // block)
        before = self.init_state(len(x)) if cache is None else cache
        if cache is None and blocks == 1:
            before = _last(before, 0)  # no need to look at room for what never came
        reach = before.seen.shape[1]
        q = self._heads(self.query(x))
        both = torch.stack(list(context), dim=2)
        k, v = (m(both).unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4) for m in (self.key, self.value))
        now = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        k, v, seen = known = _append(before, k, v, now)

        # Blocks of queries see their own keys and the window before them: stretches that overlap.
        room = blocks * block - tokens
        wide_q = F.pad(q, (0, 0, 0, room)).unflatten(2, (blocks, block))
        wide_k, wide_v = (
            F.pad(part, (0, 0, 0, 0, 0, room)).unfold(2, reach + block, block).movedim(-1, 3) for part in (k, v)
        )
        places = torch.arange(reach + block, device=x.device)
        distance = places[reach:, None] - places
        near = (distance < window).unsqueeze(-1) & (
            (distance >= 0).unsqueeze(-1) | (torch.arange(self.kinds, device=x.device) < ahead)
        )
        may = F.pad(seen, (0, room)).unfold(1, reach + block, block)[:, None, :, None, :, None] & near

        turned_q = rotate(wide_q, places[reach:])
        turned_k = rotate(wide_k.transpose(3, 4), places).transpose(3, 4).flatten(3, 4)
        scores = turned_q @ turned_k.mT
        scores = scores.masked_fill(~may.flatten(-2), torch.finfo(scores.dtype).min)
        fixed_k, fixed_v = (self._heads(m(prefix)).unsqueeze(2) for m in (self.key, self.value))
        scores = torch.cat([wide_q @ fixed_k.mT, scores], dim=-1) * (self.dim // self.heads) ** -0.5
        exact = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.to(exact).softmax(dim=-1).to(scores.dtype).split([prefix.shape[1], turned_k.shape[3]], dim=-1)
        y = weights[0] @ fixed_v + weights[1] @ wide_v.flatten(3, 4)
        y = y.flatten(2, 3)[:, :, :tokens].transpose(1, 2).flatten(2)
        return self.out(y), _last(known, window - 1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Join(nn.Module):
    """y ⊗ m: RMSNorm(y) ⊙ σ(RMSNorm(m)), each with learned weights for its channels (section 4.2)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm_y, self.norm_m = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(
        self, y: Float[Tensor, "batch tokens dim"], m: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        return self.norm_y(y) * self.norm_m(m).sigmoid()


def persistent_tokens(count: int, dim: int) -> nn.Parameter:
    """P: learned tokens that stand before every sequence, as large as what a norm gives (section 3.3)."""
    if count < 0:
        raise ValueError(f"persistent must be at least 0, got {count}")
    return nn.Parameter(torch.randn(count, dim))


class LongTermMemory(Mixer):
    """LMM: the memory alone, normed and gated before the output projection (sections 4.3 and 4.4).

    W_o [RMSNorm(M(P ‖ x)) ⊙ SiLU(W_g x)]

    Args:
        dim: D, width of a token.
        heads: memories that share the width; must divide `dim`.
        persistent: N_p, learned tokens that the memory reads first.
        causal: always True.
        memory: options of `NeuralMemory`: depth, expansion, chunk, momentum, decay, kernel, max_step, limit, ...

    Shapes: (batch, tokens, dim) to the same. Slot: token-mixer. Streams in constant memory.
    """

    def __init__(
        self, dim: int, heads: int = 1, *, persistent: int = 4, causal: bool = True, **memory: Unpack[MemoryOptions]
    ):
        super().__init__()
        self.dim = dim
        self.memory = NeuralMemory(dim, heads, causal=causal, **memory)
        self.persistent = persistent_tokens(persistent, dim)
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def _read_off(self, x: Tensor, recalled: Tensor) -> Tensor:
        return self.out(self.norm(recalled) * F.silu(self.gate(x)))

    def primed(self, batch: int) -> tuple[Float[Tensor, "batch persistent dim"], NeuralState]:
        """The outputs at the persistent tokens, and the memory that has read them."""
        recalled, state = self.memory.primed(self.persistent, batch)
        return self._read_off(self.persistent, recalled), state

    def init_state(self, batch: int) -> NeuralState:
        """The memory that has read the persistent tokens, for `batch` streams."""
        return self.memory.primed(self.persistent, batch)[1]

    def prefill(
        self,
        x: Float[Tensor, "batch tokens dim"],
        state: NeuralState | None = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], NeuralState]:
        """Many tokens at once: the outputs, and the state from which `step` or another `prefill` goes on."""
        self._check(x, mask)
        recalled, state = self.memory.prefill(x, self.init_state(len(x)) if state is None else state, mask=mask)
        return self._read_off(x, recalled), state


class ContextState(NamedTuple):
    """MAC between two tokens: the memory, what it was when the segment began, and the segment so far."""

    memory: NeuralState
    base: tuple[Float[Tensor, "batch heads _ _"], ...]
    tail: Float[Tensor, "batch reach dim"]
    cache: AttentionCache
    position: int


class MemoryAsContext(Mixer):
    """MAC: attention over a segment, what the memory recalls of it, and persistent tokens (section 4.1).

    h = M*_{t−1}(S W_Q),  y = Attn(P ‖ h ‖ S),  M_t = update(M_{t−1}; y),  o = y ⊗ M*_t(y)   (equations 21-25)

    With `causal=True` token i attends to h_j and S_j for j ≤ i alone, and reads the memory as it is after y_1..y_i.
    With `causal=False` it is as the equations stand: h of the whole segment is visible, and the memory is read after
    all of it.

    Args:
        dim: D, width of a token.
        heads: attention heads; must divide `dim`.
        segment: C, tokens of a segment.
        persistent: N_p, learned tokens that attention sees before each segment.
        memory_heads: heads of the memory.
        memory: other options of `NeuralMemory`.

    Shapes: (batch, tokens, dim) to the same. Slot: token-mixer. Streams in constant memory where it is causal.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        segment: int = 128,
        persistent: int = 4,
        memory_heads: int = 1,
        causal: bool = True,
        **memory: Unpack[MemoryOptions],
    ):
        super().__init__()
        if segment < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        self.dim, self.segment, self.causal = dim, segment, causal
        self.attention = PrefixAttention(dim, heads, segment, kinds=2)
        self.memory = NeuralMemory(dim, memory_heads, **memory)
        self.persistent = persistent_tokens(persistent, dim)
        self.join = Join(dim)
        self.reset_parameters()

    def init_state(self, batch: int) -> ContextState:
        """M_0 and an empty segment for `batch` streams."""
        if not self.causal:
            raise ValueError("a segment that is seen as a whole cannot stream; build it with causal=True")
        return self._start(batch)

    def _start(self, batch: int) -> ContextState:
        memory = self.memory.init_state(batch)
        cache = self.attention.init_state(batch)
        return ContextState(memory, current_weights(memory.memory), memory.tail[..., : self.dim], cache, 0)

    def prefill(
        self,
        x: Float[Tensor, "batch tokens dim"],
        state: ContextState | None = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], ContextState]:
        """Many tokens at once, segment by segment: the outputs, and the state from which the next goes on."""
        self._check(x, mask)
        memory, base, tail, cache, position = self._start(len(x)) if state is None else state
        prefix = self.persistent.expand(len(x), *self.persistent.shape)
        outputs, start = [], 0
        while start < x.shape[1]:
            end = min(start + self.segment - position, x.shape[1])
            s, hidden = x[:, start:end], None if mask is None else mask[:, start:end]
            s = s if hidden is None else s.masked_fill(~hidden.unsqueeze(-1), 0)
            h, tail = self.memory.recall(s, base, tail)
            before = cache if position else None
            y, cache = self.attention(s, [h, s], prefix, before, mask=hidden, ahead=0 if self.causal else 1)
            asked = memory.tail[..., : self.dim]
            m, memory = self.memory.prefill(y, memory, mask=hidden)
            if not self.causal:
                m, _ = self.memory.recall(y, current_weights(memory.memory), asked)
            outputs.append(self.join(y, m))
            position, start = (position + end - start) % self.segment, end
            base = base if position else current_weights(memory.memory)
        return torch.cat(outputs, dim=1), ContextState(memory, base, tail, cache, position)


class WindowedMixer(Mixer):
    """What MAG and MAL are built of: sliding-window attention, and a memory beside or below it."""

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        window: int = 128,
        persistent: int = 4,
        memory_heads: int = 1,
        causal: bool = True,
        **memory: Unpack[MemoryOptions],
    ):
        super().__init__()
        self.dim = dim
        self.attention = PrefixAttention(dim, heads, window)
        self._build(memory_heads, persistent, causal=causal, **memory)
        self.reset_parameters()

    @abstractmethod
    def _build(self, heads: int, persistent: int, **memory: Any) -> None:
        """The memory, persistent tokens, and what joins them to the attention."""


class GateState(NamedTuple):
    """MAG between two tokens: the memory and the window."""

    memory: NeuralState
    cache: AttentionCache


class MemoryAsGate(WindowedMixer):
    """MAG: sliding-window attention, gated by the memory of the whole sequence (section 4.2).

    x̃ = P ‖ x,  y = SW-Attn*(x̃),  o = y ⊗ M(x̃)   (equations 26-28)

    Args:
        dim, heads, memory_heads, memory: as in `MemoryAsContext`.
        window: tokens that attention sees, besides P.
        persistent: N_p, learned tokens that attention always sees and the memory reads first.
        causal: always True.

    Shapes: (batch, tokens, dim) to the same. Slot: token-mixer. Streams in constant memory.
    """

    def _build(self, heads: int, persistent: int, **memory: Any) -> None:
        self.memory = NeuralMemory(self.dim, heads, **memory)
        self.persistent = persistent_tokens(persistent, self.dim)
        self.join = Join(self.dim)

    def init_state(self, batch: int) -> GateState:
        """The memory that has read the persistent tokens, and an empty window, for `batch` streams."""
        return GateState(self.memory.primed(self.persistent, batch)[1], self.attention.init_state(batch))

    def prefill(
        self,
        x: Float[Tensor, "batch tokens dim"],
        state: GateState | None = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], GateState]:
        """Many tokens at once: the outputs, and the state from which `step` or another `prefill` goes on."""
        self._check(x, mask)
        memory, cache = (self.memory.primed(self.persistent, len(x))[1], None) if state is None else state
        m, memory = self.memory.prefill(x, memory, mask=mask)
        prefix = self.persistent.expand(len(x), *self.persistent.shape)
        y, cache = self.attention(x, [x], prefix, cache, mask=mask)
        return self.join(y, m), GateState(memory, cache)


class LayerState(NamedTuple):
    """MAL between two tokens: the memory, its outputs at the persistent tokens, and the window."""

    memory: NeuralState
    prefix: Float[Tensor, "batch persistent dim"]
    cache: AttentionCache


class MemoryAsLayer(WindowedMixer):
    """MAL: the memory, and sliding-window attention over what it gives (section 4.3).

    x̃ = P ‖ x,  y = M(x̃),  o = SW-Attn(y)   (equations 29-31)

    Args:
        dim, heads, window, persistent, memory_heads, memory, causal: as in `MemoryAsGate`.

    Shapes: (batch, tokens, dim) to the same. Slot: token-mixer. Streams in constant memory.
    """

    def _build(self, heads: int, persistent: int, **memory: Any) -> None:
        self.memory = LongTermMemory(self.dim, heads, persistent=persistent, **memory)
        self.norm = nn.RMSNorm(self.dim, eps=1e-6)

    def init_state(self, batch: int) -> LayerState:
        """The memory that has read the persistent tokens, and an empty window, for `batch` streams."""
        prefix, memory = self.memory.primed(batch)
        return LayerState(memory, prefix, self.attention.init_state(batch))

    def prefill(
        self,
        x: Float[Tensor, "batch tokens dim"],
        state: LayerState | None = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], LayerState]:
        """Many tokens at once: the outputs, and the state from which `step` or another `prefill` goes on."""
        self._check(x, mask)
        memory, prefix, cache = (*self.memory.primed(len(x))[::-1], None) if state is None else state
        y, memory = self.memory.prefill(x, memory, mask=mask)
        y = self.norm(y)
        o, cache = self.attention(y, [y], self.norm(prefix), cache, mask=mask)
        return o, LayerState(memory, prefix, cache)
