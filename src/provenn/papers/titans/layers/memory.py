"""The long-term memory: an MLP that learns while it reads (v1, section 3.1; camera-ready, section 3.3)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import check_heads, check_tokens
from provenn.nn.streaming import map_state
from provenn.ops.autograd import without_autocast
from provenn.ops.memory_update import MemoryState, Surprise, memory_update, read_memory

# Where these gates start, σ(−2) and σ(−1) of the largest step. A momentum of one half beside a step of one half makes a
# step of 2θ / (1 − η) = 2, at the edge of oscillation.
MOMENTUM, STEP = -2.0, -1.0
RANK = 16  # through which a token decides what each channel forgets, as in gated linear attention

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
    def _read(self, x: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
        """`prefill` of tokens that were looked at; without a state, of the first ones."""

    def prefill(
        self,
        x: Float[Tensor, "batch tokens dim"],
        state: Any = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Any]:
        """Many tokens at once: the outputs, and the state from which `step` or another `prefill` goes on."""
        check_tokens(x, self.dim, mask)
        return self._read(x, state, mask)

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
    residual: bool
    gating: str


MANY = 2**17  # numbers from which a convolution is the quicker form


def _convolved(x: Tensor, taps: Tensor, tokens: int) -> Tensor:
    """Σ_i x_{t+i} taps_i, (batch, tokens, channels) of (batch, tokens + kernel − 1, channels)."""
    if x.numel() < MANY or torch.compiler.is_compiling():
        # As a sum of slices: for the few tokens of a chunk a convolution takes many times as long.
        return sum((x[:, i : i + tokens] * tap for i, tap in enumerate(taps)), x.new_zeros(()))
    with without_autocast(x):
        dtype = torch.promote_types(x.dtype, taps.dtype)
        kernels = taps.mT[:, None, None].to(dtype)
        # In two dimensions: in one it takes four times as long.
        return F.conv2d(x.mT.unsqueeze(2).to(dtype), kernels, groups=x.shape[2]).squeeze(2).mT


class NeuralMemory(Mixer):
    """The long-term memory: an MLP that learns, while it reads, to give v_t where it is asked k_t.

    M(x) = x + LN(GELU(x W_1) W_2);  q, k, v = SiLU(conv(x W)), q and k of unit length;  α, η, θ/θ_max = σ(x w + b).

    S_t = η_t S_{t−1} − θ_t ∇‖M_{t−1}(k_t) − v_t‖²,  M_t = (1 − α_t) M_{t−1} + S_t,  y_t = M_t(q_t)   (equations 8-15)

    In chunks the gradient is taken at the weights of the chunk's start (section 3.2). The memory's form, a gate of each
    kind for each of its layers, and forgetting by channel are the camera-ready's; the first version has one scalar of
    each kind and leaves the form open. W of LN, which channels forget, and how the gates start are ours.

    α goes by the input's channels in the first layer and by the output's in the others. So it is as wide as the
    memory's x and y.

    Args:
        dim: D, width of a token.
        heads: memories that share the width; must divide `dim`.
        depth: L_M, layers of the memory; 1, without `residual`, is a matrix.
        expansion: hidden width of the memory, as a multiple of a head's width.
        chunk: b, tokens whose gradients are taken at the same weights; 1 is the sequential rule.
        momentum, decay: whether there are η and α; without them they are 0.
        kernel: tokens that the causal depthwise convolution spans; 1 is none.
        max_step: θ_max; by default 1 / (chunk · depth): a chunk of one key adds up its steps, a deep one those
            of its layers. A larger one writes more sharply; a memory without `residual` may then diverge.
        limit: a gradient of norm n is brought to limit · tanh(n / limit); None leaves it.
        forget_bias: b of α: at first a token stays for about 1 / σ(b) others, 150 of them by default. Where that is
            more than a training sequence has, longer ones fill the memory as training never saw it.
        read: "post" reads after the token is written, "pre" before.
        residual: x + LN(MLP(x)); without, the memory is the MLP.
        gating: "layer" gives each layer of the memory gates of its own and α by channel; "token" one scalar of each.
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
        residual: bool = True,
        gating: str = "layer",
        causal: bool = True,
    ):
        check_whole(dim=dim, heads=heads, depth=depth, chunk=chunk, kernel=kernel)
        check_finite(expansion=expansion, max_step=max_step, limit=limit, forget_bias=forget_bias)
        super().__init__()
        check_heads(dim, heads)
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
        if read not in ("post", "pre") or gating not in ("layer", "token"):
            raise ValueError(f"read must be post or pre and gating layer or token, got {read!r} and {gating!r}")
        if not causal:
            raise ValueError("a memory learns as it reads, so causal must be True, got False")
        self.dim, self.heads, self.chunk, self.kernel, self.residual = dim, heads, chunk, kernel, residual
        self.limit, self.forget_bias, self.read_at, self.writing = limit, forget_bias, read, True
        self.max_step = 1 / (chunk * depth) if max_step is None else max_step
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.convolution = nn.Parameter(torch.empty(kernel, 3 * dim)) if kernel > 1 else None
        sizes = [width, *[hidden] * (depth - 1), width]
        self.memory = nn.ParameterList(torch.empty(heads, a, b) for a, b in pairwise(sizes))
        gates = depth if gating == "layer" else 1
        self.step_gate = nn.Linear(dim, heads * gates)
        self.momentum_gate = nn.Linear(dim, heads * gates) if momentum else None
        self.channels = [width, *sizes[2:]] if gating == "layer" else [1]
        self.forget_gate: nn.Module | None = None
        if decay and gating == "layer":
            narrow = nn.Linear(dim, min(RANK, dim), bias=False)
            self.forget_gate = nn.Sequential(narrow, nn.Linear(min(RANK, dim), heads * sum(self.channels)))
        elif decay:
            self.forget_gate = nn.Linear(dim, heads)
        self.reset_parameters()

    def reset_memory(self) -> None:
        """Start the gates where a memory trains, and the memory where one step of θ moves it by about θ.

        With a residual all weights are N(0, 1). Behind a norm the size of the last matrix divides its gradient, and at
        this size both layers answer to a step as a matrix does to one on a key of unit length. A last matrix of zeros,
        which is where a memory without a norm starts, has no norm at all.
        """
        if self.convolution is not None:
            nn.init.uniform_(self.convolution, -(self.kernel**-0.5), self.kernel**-0.5)
        for weight in self.memory:
            nn.init.normal_(weight, std=1.0 if self.residual else weight.shape[1] ** -0.5)
        if not self.residual:
            nn.init.zeros_(self.memory[-1])
        forget = self.forget_gate[-1] if isinstance(self.forget_gate, nn.Sequential) else self.forget_gate
        for gate, start in ((self.step_gate, STEP), (self.momentum_gate, MOMENTUM), (forget, self.forget_bias)):
            if isinstance(gate, nn.Linear):
                nn.init.constant_(gate.bias, start)

    @property
    def if_diverging(self) -> str:
        """What helps where training with this memory has diverged."""
        return f"a max_step below {self.max_step:g} or a limit of 1 for the memory"

    def init_state(self, batch: int) -> NeuralState:
        """M_0, no momentum, and a convolution that has seen zeros; numbers in float32 at least."""
        weight = self.project.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        start = [w.to(dtype) for w in self.memory]
        memory = MemoryState.start(start, batch, momentum=self.momentum_gate is not None)
        return NeuralState(memory, weight.new_zeros(batch, self.kernel - 1, 3 * self.dim))

    def _projected(self, x: Tensor, tail: Tensor, kinds: int = 3) -> tuple[list[Tensor], Tensor]:
        """The first `kinds` of q, k and v, (batch, heads, tokens, width) each, and the convolution's new tail."""
        channels = kinds * self.dim
        y = F.linear(x, self.project.weight[:channels])
        if self.convolution is not None:
            y = torch.cat([tail, y], dim=1)
            tail, tokens = y[:, -tail.shape[1] :], x.shape[1]
            y = _convolved(y, self.convolution[:, :channels], tokens)
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
        return self._asked(q, weights, x.dtype), tail

    def _asked(self, q: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        # In the memory's precision under autocast too, as where it writes.
        with without_autocast(q):
            return self._merged(read_memory(q.to(weights[0].dtype), weights, residual=self.residual).to(dtype))

    def _read(self, x: Tensor, state: NeuralState | None, mask: Tensor | None) -> tuple[Tensor, NeuralState]:
        state = self.init_state(x.shape[0]) if state is None else state
        if not self.writing:
            (q, *_), tail = self._projected(x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0), state.tail)
            return self._asked(q, state.memory.weights, x.dtype), NeuralState(state.memory, tail)
        y, state, surprise = self._learn(x, state, mask, surprised=bool(_observed))
        if surprise is not None:
            _observed[-1].append(surprise)
        return y, state

    def _learn(
        self, x: Tensor, state: NeuralState, mask: Tensor | None = None, surprised: bool = False
    ) -> tuple[Tensor, NeuralState, Surprise | None]:
        x = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)
        (q, k, v), tail = self._projected(x, state.tail)
        step, momentum, forget = self._gates(x, state.memory.weights[0].dtype)
        y, memory, surprise = memory_update(
            q,
            k,
            v,
            step=step,
            forget=forget,
            momentum=momentum,
            state=state.memory,
            chunk=self.chunk,
            mask=mask,
            read=self.read_at,
            residual=self.residual,
            limit=self.limit,
            surprised=surprised,
        )
        return self._merged(y), NeuralState(memory, tail), surprise

    def _gates(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """θ and η, (gates, batch, heads, tokens), and α of each layer, (batch, heads, tokens, channels)."""
        step = self.max_step * self._scalars(self.step_gate, x, dtype)
        momentum = None if self.momentum_gate is None else self._scalars(self.momentum_gate, x, dtype)
        if self.forget_gate is None:
            return step, momentum, [torch.zeros_like(one).unsqueeze(-1) for one in step]
        forget = self.forget_gate(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).to(dtype).sigmoid()
        return step, momentum, list(forget.split(self.channels, dim=-1))

    def _scalars(self, gate: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
        return gate(x).unflatten(-1, (-1, self.heads)).permute(2, 0, 3, 1).to(dtype).sigmoid()

    def primed(self, prefix: Float[Tensor, "persistent dim"], batch: int) -> tuple[Tensor, NeuralState]:
        """What persistent tokens recall, and the memory that has read them as a chunk of their own.

        They come first and are the same for all of a batch, so they are read once.
        """
        state = self.init_state(1)
        if not len(prefix):
            return prefix.expand(batch, *prefix.shape), map_state(lambda x: x.expand(batch, *x.shape[1:]), state)
        y, state, _ = self._learn(prefix.unsqueeze(0), state)
        state = state._replace(memory=state.memory._replace(anchor=state.memory.weights, position=0))
        return y.expand(batch, *y.shape[1:]), map_state(lambda x: x.expand(batch, *x.shape[1:]), state)
