"""Mixtures of experts whose later choices the fast stream foretells, and what of them has to be in fast memory when."""

import heapq
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.auxiliary import add_auxiliary
from provenn.nn.language import CausalLM
from provenn.papers.m2r2.model import ExitModel, plain_decoder


class MixtureFeedForward(nn.Module):
    """Σ_e g_e W₂ᵉ GELU(W₁ᵉ z) over the `top` experts that a router likes best; g is the softmax over these.

    All experts are computed and most are weighed with nothing: for models whose experts are small.

    Args:
        dim, experts, top, hidden: width, how many experts, how many of them a token has, and their inner width.
        balance: weight of the loss that keeps experts equally busy (Fedus et al., 2022); 0 has none.

    Shapes: (..., dim) to the same.
    """

    def __init__(self, dim: int, *, experts: int = 8, top: int = 2, hidden: int | None = None, balance: float = 0.01):
        check_whole(dim=dim, experts=experts, top=top, hidden=hidden)
        super().__init__()
        if not 1 <= top <= experts:
            raise ValueError(f"top must lie between 1 and {experts} experts, got {top}")
        hidden = dim if hidden is None else hidden
        self.top, self.balance = top, balance
        self.router = nn.Linear(dim, experts, bias=False)
        self.inner = nn.Parameter(torch.randn(experts, dim, hidden) * 0.02)
        self.outer = nn.Parameter(torch.randn(experts, hidden, dim) * 0.02)

    def route(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch experts"]:
        """The weight of each expert for each token, most of them 0."""
        scores = self.router(z)
        best = scores.topk(self.top, dim=-1)
        weights = best.values.float().softmax(-1).to(scores.dtype)
        return torch.zeros_like(scores).scatter(-1, best.indices, weights)

    def forward(
        self, z: Float[Tensor, "*batch dim"], chosen_by: Float[Tensor, "*batch dim"] | None = None
    ) -> Float[Tensor, "*batch dim"]:
        """`chosen_by` is what experts are chosen by, where it is not what they are given."""
        weights = self.route(z if chosen_by is None else chosen_by)
        # Of a token that shares its slow twin's experts the balance is the twin's.
        if self.training and self.balance and (chosen_by is None or chosen_by is z):
            busy, liked = (weights > 0).float().flatten(0, -2), self.router(z).softmax(-1).flatten(0, -2)
            loss = self.balance * weights.shape[-1] * (busy.mean(0) * liked.mean(0)).sum() / self.top
            add_auxiliary(loss, "the balance of its router's load", "balance=0")
        inner = F.gelu(torch.einsum("...d,edh->...eh", z, self.inner)) * weights.unsqueeze(-1)
        return torch.einsum("...eh,ehd->...d", inner, self.outer)


def expert_decoder(
    vocab: int = 256, *, dim: int = 64, layers: int = 8, heads: int = 4, experts: int = 8, top: int = 2
) -> CausalLM:
    """A decoder of softmax attention whose feed-forward parts are mixtures of experts."""
    model = plain_decoder(vocab, dim=dim, layers=layers, heads=heads)
    for block in model.blocks:
        block.feedforward = MixtureFeedForward(dim, experts=experts, top=top)
        nn.init.normal_(block.feedforward.router.weight, std=0.02)
    return model


@dataclass(frozen=True)
class ExpertTrace:
    """Which experts a text's tokens needed, and what was foretold of them.

    Args:
        needed: (tokens, layers, top), the experts of each layer.
        foretold: by what they were foretold by, (tokens, layers, k), the likeliest first: "fast" (p^i at layer
            i = ⌈ℓ/R⌉), "slow" (h^i there) and "before" (h^{ℓ−1}); −1 where nothing is.
        known: likewise, for each layer the layer before which its experts are foretold; −1 where never.
    """

    needed: Int[Tensor, "tokens layers top"]
    foretold: dict[str, Int[Tensor, "tokens layers k"]]
    known: dict[str, list[int]]

    def hit_rate(self, by: str) -> float:
        """The share of needed experts that were foretold, of the layers where any are."""
        layers = [layer for layer, at in enumerate(self.known[by]) if at >= 0]
        hits = (self.needed[:, layers, :, None] == self.foretold[by][:, layers, None, :]).any(-1)
        return hits.double().mean().item()


@torch.no_grad()
def trace_experts(
    model: ExitModel,
    tokens: Int[Tensor, "batch tokens"],
    *,
    rate: float | int = 2,
    more: int = 1,
    sources: Sequence[str] = ("fast", "slow"),
) -> ExpertTrace:
    """Which experts a decoder's layers choose for texts, and what is foretold by the routers of the layers themselves.

    Args:
        model: around a decoder of `MixtureFeedForward`, with one gate, up to which its fast stream runs through. Of a
            raw exit that stream is the slow one.
        tokens: the texts.
        rate: R; the experts of layer ℓ are foretold at layer ⌈ℓ/R⌉.
        more: how many experts are foretold beyond those that a token has.
        sources: "fast", "slow" or "before".

    Raises:
        ValueError: layers without experts, or a fast stream that does not reach far enough.
    """
    mixtures = [block.feedforward for block in model.base.blocks]
    if not all(isinstance(mixture, MixtureFeedForward) for mixture in mixtures):
        raise ValueError("expected a decoder whose feed-forward parts are all MixtureFeedForward")
    count = len(mixtures)
    # The layer before which the experts of layer ℓ are foretold: the fast stream is there what the slow one is at ℓ.
    at = {layer: math.ceil(layer / rate) for layer in range(1, count)}
    if len(model.gates) > 1 or max(at.values()) > model.gates[0]:
        raise ValueError(f"one gate at layer {max(at.values())} or later is needed, got {list(model.gates)}")
    streams = model.streams(tokens)
    states: dict[str, Any] = {"fast": streams.fast[0], "slow": streams.slow, "before": streams.slow}
    k = mixtures[0].top + more
    layers = model.decoder().layers
    needed = []
    for block, h in zip(model.base.blocks, streams.slow):
        normed = block.norm2(h + block.mixer(block.norm1(h)))
        needed.append(block.feedforward.router(normed).topk(block.feedforward.top, dim=-1).indices.flatten(0, 1))
    foretold, known = {}, {}
    for source in sources:
        read_at = [-1] + [layer - 1 if source == "before" else at[layer] for layer in range(1, count)]
        guesses = [torch.full_like(needed[0][:, :1], -1).expand(-1, k)]
        for layer in range(1, count):
            guess = mixtures[layer].router(layers[layer].norm2(states[source][read_at[layer]]))
            guesses.append(guess.topk(k, dim=-1).indices.flatten(0, 1))
        foretold[source], known[source] = torch.stack(guesses, dim=1), read_at
    return ExpertTrace(torch.stack(needed, dim=1), foretold, known)


@dataclass(frozen=True)
class Memory:
    """Fast memory with room for some experts, and the one channel that brings them; all rates are inputs.

    Args:
        slots: experts that fit.
        load: time in which the channel brings one, its size over the bandwidth.
        compute: time of a layer whose experts are there; the unit of all times.
        fast: what the fast stream adds to that, in the layers that it passes.
    """

    slots: int
    load: float | int
    compute: float | int = 1.0
    fast: float | int = 0.0

    def __post_init__(self) -> None:
        check_whole(slots=self.slots)
        check_finite(load=self.load, compute=self.compute, fast=self.fast)
        if self.slots < 1 or self.load < 0 or self.compute <= 0 or self.fast < 0:
            raise ValueError(f"expected a slot at least and times that are not negative, got {self}")


@dataclass(frozen=True)
class Timeline:
    """What a simulation came to.

    Args:
        total, stalled: time of all layers, and the part of it in which they waited for experts.
        loads, wasted: experts brought, and those that were thrown out before any token had them.
        hits: the share of needed experts that were there in time.
    """

    total: float
    stalled: float
    loads: int
    wasted: int
    hits: float


class _Channel:
    """One transfer at a time, to the end; what is needed now goes before what is foretold.

    A needed expert keeps its slot while its layer waits and computes. A foretold expert keeps its slot until its layer
    begins. Further foretold experts wait for a free slot; only experts needed now may take a foretold one's slot.
    """

    def __init__(self, memory: Memory):
        self.memory = memory
        self.free = 0.0
        self.ready: OrderedDict[tuple[int, int], float] = OrderedDict()  # least recently used first
        self.used: set[tuple[int, int]] = set()
        self.queue: list[tuple[float, int, tuple[int, int]]] = []
        self.asked: set[tuple[int, int]] = set()
        self.wanted: set[tuple[int, int]] = set()  # foretold for layers ahead, or needed now: stays
        self.loads = self.wasted = self.order = 0

    def ask(self, expert: tuple[int, int], now: float) -> None:
        self.wanted.add(expert)
        if expert not in self.ready and expert not in self.asked:
            heapq.heappush(self.queue, (now, self.order, expert))
            self.order += 1
            self.asked.add(expert)

    def advance(self, now: float) -> None:
        """Start the foretold transfers for which there was time and a slot before `now`."""
        while self.queue:
            since, _, expert = self.queue[0]
            if expert in self.asked:
                if max(self.free, since) >= now:
                    return
                if len(self.ready) >= self.memory.slots and self.wanted.issuperset(self.ready):
                    self.free = max(self.free, now)  # no free slot before then
                    return
                self.asked.discard(expert)
                self._load(expert, since)
            heapq.heappop(self.queue)  # what is asked for no longer, its layer has fetched or done without

    def fetch(self, layer: int, experts: Sequence[tuple[int, int]], now: float) -> float:
        """When all experts that a layer needs now are there; what else was foretold for it is given up."""
        self.wanted = {expert for expert in self.wanted if expert[0] > layer} | set(experts)
        self.asked = {expert for expert in self.asked if expert[0] > layer}
        missing = [expert for expert in experts if expert not in self.ready]
        for expert in experts:
            if expert in self.ready:
                self.ready.move_to_end(expert)  # before others are loaded and evict the least recently used
        for expert in missing:
            self._load(expert, now)
        self.used.update(experts)
        return max(self.ready[expert] for expert in experts)

    def leave(self, layer: int) -> None:
        """A layer is done: its experts may go."""
        self.wanted = {expert for expert in self.wanted if expert[0] > layer}

    def forget(self) -> None:
        """What was foretold for this token and is not on its way yet is given up."""
        self.wanted.clear()
        self.queue.clear()
        self.asked.clear()

    def _load(self, expert: tuple[int, int], now: float) -> None:
        if len(self.ready) >= self.memory.slots:
            # The least recently used of those that nobody waits for; where all are waited for, of all. What a layer
            # needs at once was used last, so it is never among them.
            out = next((key for key in self.ready if key not in self.wanted), next(iter(self.ready)))
            del self.ready[out]
            self.wasted += out not in self.used
            self.used.discard(out)
        self.free = max(self.free, now) + self.memory.load
        self.ready[expert] = self.free
        self.loads += 1


def simulate(trace: ExpertTrace, memory: Memory, by: str = "demand", *, most: int | None = None) -> Timeline:
    """Token after token, layer after layer: when its experts are there and the layer before is done, a layer starts.

    Args:
        trace: what is needed and foretold.
        memory: the rates.
        by: "demand" (loaded when needed), a source of the trace, or "oracle" (right, at the time of "fast").
        most: of the foretold experts of a layer so many are loaded; by default all.

    Raises:
        ValueError: fewer slots than a token has experts in a layer.
    """
    needed = trace.needed.tolist()
    top = trace.needed.shape[2]
    if memory.slots < top:
        raise ValueError(f"a layer needs {top} experts at once: slots must be at least {top}, got {memory.slots}")
    source = "fast" if by == "oracle" else by
    known = [-1] * len(needed[0]) if by == "demand" else trace.known[source]
    guesses = needed if by in ("demand", "oracle") else trace.foretold[by].tolist()
    # The fast stream runs up to the last layer that something is foretold before, and no further.
    passed = max(known) if by == "fast" else 0
    channel = _Channel(memory)
    now = stalled = 0.0
    hits = 0
    for token, token_guesses in zip(needed, guesses):
        for layer, experts in enumerate(token):
            for later, at in enumerate(known):
                if at == layer and later > layer:
                    for expert in token_guesses[later][:most]:
                        channel.ask((later, expert), now)
            hits += sum(channel.ready.get((layer, expert), now + 1) <= now for expert in experts)
            start = max(now, channel.fetch(layer, [(layer, expert) for expert in experts], now))
            stalled += start - now
            now = start + memory.compute + (memory.fast if layer < passed else 0)
            channel.advance(now)
            channel.leave(layer)
        channel.forget()
    return Timeline(now, stalled, channel.loads, channel.wasted, hits / trace.needed.numel())
