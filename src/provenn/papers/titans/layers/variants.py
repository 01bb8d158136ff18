"""The memory alone, and three ways to build it in beside attention (section 4)."""

from abc import abstractmethod
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.papers.titans.layers.attention import AttentionCache, PrefixAttention
from provenn.papers.titans.layers.memory import MemoryOptions, Mixer, NeuralMemory, NeuralState


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
        check_whole(dim=dim, heads=heads, persistent=persistent)
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

    def _read(self, x: Tensor, state: NeuralState | None, mask: Tensor | None) -> tuple[Tensor, NeuralState]:
        recalled, state = self.memory.prefill(x, self.init_state(x.shape[0]) if state is None else state, mask=mask)
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
        stride: every so many tokens of a segment ask the memory, so that C / stride of its tokens stand beside the
            segment. The paper's sizes have 256 for 512 tokens and do not say how (every second is ours).
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
        stride: int = 1,
        memory_heads: int = 1,
        causal: bool = True,
        **memory: Unpack[MemoryOptions],
    ):
        check_whole(
            dim=dim, heads=heads, segment=segment, persistent=persistent, stride=stride, memory_heads=memory_heads
        )
        super().__init__()
        if segment < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        self.dim, self.segment, self.stride, self.causal = dim, segment, stride, causal
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
        return ContextState(memory, memory.memory.weights, memory.tail[..., : self.dim], cache, 0)

    def _read(self, x: Tensor, state: ContextState | None, mask: Tensor | None) -> tuple[Tensor, ContextState]:
        memory, base, tail, cache, position = self._start(x.shape[0]) if state is None else state
        prefix = self.persistent.expand(x.shape[0], *self.persistent.shape)
        outputs, start = [], 0
        while start < x.shape[1]:
            end = min(start + self.segment - position, x.shape[1])
            s, hidden = x[:, start:end], None if mask is None else mask[:, start:end]
            s = s if hidden is None else s.masked_fill(~hidden.unsqueeze(-1), 0)
            h, tail = self.memory.recall(s, base, tail)
            before = cache if position else None
            shown = self._shown(s, position, hidden)
            y, cache = self.attention(s, [h, s], prefix, before, mask=shown, ahead=0 if self.causal else 1)
            asked = memory.tail[..., : self.dim]
            m, memory = self.memory.prefill(y, memory, mask=hidden)
            if not self.causal:
                m, _ = self.memory.recall(y, memory.memory.weights, asked)
            outputs.append(self.join(y, m))
            position, start = (position + end - start) % self.segment, end
            base = base if position else memory.memory.weights
        return torch.cat(outputs, dim=1), ContextState(memory, base, tail, cache, position)

    def _shown(self, s: Tensor, position: int, mask: Tensor | None) -> Tensor | None:
        """Which of h and s may be attended: h of every `stride`-th token of the segment."""
        if self.stride == 1:
            return None if mask is None else mask.unsqueeze(-1)
        asks = (torch.arange(position, position + s.shape[1], device=s.device) + 1) % self.stride == 0
        shown = torch.stack([asks, torch.ones_like(asks)], dim=-1).expand(len(s), -1, -1)
        return shown if mask is None else shown & mask.unsqueeze(-1)


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
        check_whole(dim=dim, heads=heads, window=window, persistent=persistent, memory_heads=memory_heads)
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

    def _read(self, x: Tensor, state: GateState | None, mask: Tensor | None) -> tuple[Tensor, GateState]:
        memory, cache = (self.memory.primed(self.persistent, x.shape[0])[1], None) if state is None else state
        m, memory = self.memory.prefill(x, memory, mask=mask)
        prefix = self.persistent.expand(x.shape[0], *self.persistent.shape)
        y, cache = self.attention(x, [x], prefix, cache, mask=None if mask is None else mask.unsqueeze(-1))
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

    def _read(self, x: Tensor, state: LayerState | None, mask: Tensor | None) -> tuple[Tensor, LayerState]:
        memory, prefix, cache = (*self.memory.primed(x.shape[0])[::-1], None) if state is None else state
        y, memory = self.memory.prefill(x, memory, mask=mask)
        y = self.norm(y)
        o, cache = self.attention(y, [y], self.norm(prefix), cache, mask=None if mask is None else mask.unsqueeze(-1))
        return o, LayerState(memory, prefix, cache)
