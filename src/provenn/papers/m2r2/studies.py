"""What M2R2's experiments are made of: decoders trained once a seed, what is put around them, and how it is read."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from provenn.core.narrowing import of_kind
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.language import CausalLM
from provenn.papers.m2r2.decoding import Statistics, certainty, decode
from provenn.papers.m2r2.experts import ExpertTrace, Memory, expert_decoder, simulate, trace_experts
from provenn.papers.m2r2.model import (
    ExitModel,
    HeadExit,
    M2R2Model,
    Streams,
    divergence,
    plain_decoder,
)
from provenn.tasks import Task, TaskData, count_examples, get_task
from provenn.training import Fit, Hardware, Recipe, fit

LENGTH, DIM, LAYERS, RANK = 64, 64, 8, 8
GATES = [2, 4, 6]
BASE = Recipe(
    lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1, schedule="cosine", warmup_steps=30, clip=1.0, batch_size=16, epochs=1,
    max_steps=1000,
)  # fmt: skip
AROUND = Recipe(betas=(0.9, 0.95), schedule="cosine", clip=1.0, batch_size=16, epochs=1, max_steps=250)


@cache
def _text(smoke: bool) -> TaskData:
    return get_task("language-modelling").load("stdlib", length=LENGTH, eval_tokens=512 if smoke else 8192)


def text_data(seed: int, smoke: bool) -> TaskData:
    """The same text for every seed, which draws weights and order: what is tested is never trained on."""
    return _text(smoke)


def is_smoke(data: TaskData) -> bool:
    """Whether these are the few windows of a smoke run."""
    return count_examples(data.test) < 16


@cache
def trained_decoder(seed: int, smoke: bool, layers: int = LAYERS, experts: bool = False) -> CausalLM:
    """A decoder that learned the text; the variants of a seed are put around copies of the same one."""
    build: Callable[[], nn.Module] = (
        partial(expert_decoder, dim=DIM, layers=layers) if experts else partial(plain_decoder, dim=DIM, layers=layers)
    )
    recipe = replace(BASE, max_steps=2) if smoke else BASE
    done = fit(build, get_task("language-modelling"), _text(smoke), recipe, seed=seed, title="decoder")
    return of_kind(done.model, CausalLM, "the decoder")


# Variants: each is put around a trained decoder.


class SecondModel(ExitModel):
    """A second, smaller decoder instead of a gate: what two-model speculation drafts with.

    Args:
        base: what checks its drafts.
        draft: the smaller one, which has learned as the base has, and learns from it further.
    """

    def __init__(self, base: nn.Module, draft: CausalLM):
        super().__init__(base, GATES, router="none")
        self.draft = draft.requires_grad_(True)

    def streams(self, tokens: Tensor) -> Streams:
        streams = super().streams(tokens)
        return streams._replace(fast=[self.draft.hidden_states(tokens)[None]])

    def exit_logits(self, streams: Streams, *, fixed: bool = False) -> list[Tensor]:
        weight = self.draft.embed.weight
        return [F.linear(states[-1], weight) for states in streams.fast]

    def _exit_loss(self, streams: Streams, exits: list[Tensor], teacher: Tensor) -> Tensor:
        return divergence(exits, teacher)


class MixtureOfDepths(ExitModel):
    """Every second layer takes half of the tokens, which a router picks (Raposo et al., 2024, arXiv:2404.02258).

    The decoder itself goes on learning, as there. The router sees the whole window when it picks, which favours it.
    """

    def __init__(self, base: Any, share: float = 0.5):
        super().__init__(base, GATES, router="none", train_base=True)
        base.requires_grad_(True)
        self.share = share
        self.pickers = nn.ModuleList(nn.Linear(base.dim, 1) for _ in base.blocks[1::2])
        for picker in self.pickers:
            nn.init.zeros_(of_kind(picker.bias, Tensor, "bias"))
            nn.init.normal_(of_kind(picker.weight, Tensor, "weight"), std=0.02)

    def picked(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens layer i takes, and the factor of its update."""
        if i % 2 == 0:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), x.new_ones(x.shape[:2])
        score = self.pickers[i // 2](x).squeeze(-1)
        best = score.topk(max(1, round(self.share * x.shape[1])), dim=1).indices
        # Twice the sigmoid: a layer begins as it was trained, at a factor of one.
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True), 2 * score.sigmoid()

    def states(self, tokens: Tensor) -> list[Tensor]:
        """The stream before the layers and after each."""
        states = [self.base.embed(tokens)]
        for i, block in enumerate(self.base.blocks):
            x = states[-1]
            taken, factor = self.picked(i, x)
            moved = x + factor[..., None] * (block(x, mask=taken if i % 2 else None) - x)
            states.append(torch.where(taken[..., None], moved, x))
        return states

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.base._logits(self.base.norm(self.states(tokens)[-1]))

    def streams(self, tokens: Tensor) -> Streams:
        logits = self(tokens)
        return Streams([], [logits[None]], logits)

    def exit_logits(self, streams: Streams, *, fixed: bool = False) -> list[Tensor]:
        return [streams.fast[0][-1]]

    def training_loss(self, batch: Any) -> Tensor:
        tokens, following = batch
        return F.cross_entropy(self(tokens).transpose(1, 2), following)


Variant = Callable[[CausalLM], ExitModel]


def raw(base: CausalLM, *, gates: list[int] | None = None) -> ExitModel:
    """The slow stream's own states at the gates."""
    return ExitModel(base, gates or GATES, router="none")


def head(base: CausalLM) -> ExitModel:
    """Adapters at the exits alone, of as many parameters as the fast stream's."""
    return HeadExit(base, GATES, rank=2 * RANK * GATES[-1] // len(GATES), router="none")


def fast(base: CausalLM) -> ExitModel:
    """The accelerated stream."""
    return M2R2Model(base, GATES, rank=RANK, router="none")


def second(base: CausalLM) -> ExitModel:
    """A decoder of two layers, as many as lie before the first gate."""
    return SecondModel(base, plain_decoder(base.vocab, dim=DIM, layers=GATES[0]))


class Scheduled(ExitModel):
    """Raw exits after every layer whose depth follows from a token's position (Del Corro et al., 2023, SkipDecode)."""


def scheduled(base: CausalLM) -> ExitModel:
    """Skip decoding."""
    return Scheduled(base, list(range(1, LAYERS)), router="none")


def every(base: CausalLM) -> ExitModel:
    """Raw exits after every layer."""
    return ExitModel(base, list(range(1, LAYERS)), router="none")


def around_a_decoder(variant: Variant, vocab: int) -> ExitModel:
    """A study's `build`: the variant around a decoder, whose trained weights `learn_around` puts in."""
    return variant(plain_decoder(vocab, dim=DIM, layers=LAYERS))


def around_experts(variant: Variant, vocab: int) -> ExitModel:
    """Likewise, around a decoder with experts."""
    return variant(expert_decoder(vocab, dim=DIM, layers=LAYERS))


def learn_around(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int,
    hardware: Hardware,
    title: str,
    experts: bool = False,
) -> Fit:
    """A study's `trained`: the weights of the decoder of the seed, and then what the variant has to learn."""
    smoke = is_smoke(data)
    weights = trained_decoder(seed, smoke, experts=experts).state_dict()

    def put_around() -> nn.Module:
        model: Any = build()
        model.base.load_state_dict(weights)
        if isinstance(model, SecondModel):
            model.draft.load_state_dict(small)
        return model

    small = trained_decoder(seed, smoke, layers=GATES[0]).state_dict() if isinstance(build(), SecondModel) else {}
    model = put_around()
    if not any(p.requires_grad for p in model.parameters()):
        model = model.to(hardware.device).eval()
        with torch.no_grad():
            return Fit(model, task.evaluate(model, data.test))
    return fit(put_around, task, data, recipe, seed=seed, hardware=hardware, title=title)


# How variants are read.


def _windows(data: TaskData) -> tuple[Tensor, Tensor]:
    pairs = [data.test[i] for i in range(count_examples(data.test))]
    return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])


@torch.no_grad()
def exit_predictions(model: ExitModel, data: TaskData) -> dict[str, Tensor]:
    """Of each gate and of all layers, (gates + 1, windows, tokens): bits, the likeliest token, how likely it is."""
    x, y = _windows(data)
    x, y = x.to(next(model.parameters()).device), y.to(next(model.parameters()).device)
    streams = model.streams(x)
    each = [*model.exit_logits(streams), streams.logits]
    bits = [F.cross_entropy(logits.transpose(1, 2), y, reduction="none") / math.log(2) for logits in each]
    parts = {
        "bits": bits,
        "token": [logits.argmax(-1) for logits in each],
        "sure": [certainty(logits, "probability") for logits in each],
    }
    return {name: torch.stack(part).cpu() for name, part in parts.items()}


def agreement(model: Any, data: TaskData) -> float | None:
    """How often the second gate names what all layers name; None of a model that has no second gate."""
    token = exit_predictions(model, data)["token"]
    return (token[1] == token[-1]).double().mean().item() if len(token) > 2 else None


def settled(model: Any, data: TaskData) -> float:
    """The share of tokens that all gates from the middle on name as all layers do."""
    token = exit_predictions(model, data)["token"]
    return (token[len(token) // 2 - 1 :] == token[-1]).all(0).double().mean().item()


def trade_off(model: Any, data: TaskData) -> tuple[list[float], list[float]]:
    """Mean depths, growing, and the bits a byte there."""
    parts = exit_predictions(model, data)
    bits, sure = parts["bits"], parts["sure"]
    ends = torch.tensor([*model.gates, LAYERS], dtype=torch.double)
    points = []
    if isinstance(model, Scheduled):
        position = torch.linspace(0, 1, bits.shape[-1])
        for mean in np.linspace(GATES[0], LAYERS, 13):
            spread = min(LAYERS - mean, mean - GATES[0])
            depth = (mean + spread * (1 - 2 * position)).round().long().clamp(GATES[0], LAYERS)
            leaves = (depth - 1).expand(bits.shape[1:])
            points.append((ends[leaves].mean().item(), bits.gather(0, leaves[None]).mean().item()))
    elif list(model.gates) == list(range(1, LAYERS)):
        points = [(float(end), level.mean().item()) for end, level in zip(ends, bits) if end >= GATES[0]]
    else:
        for threshold in (-1.0, *np.linspace(0.05, 0.95, 19), 0.98, 0.99, 0.995, 2.0):
            leaves = torch.cat([sure[:-1] > threshold, torch.ones_like(sure[:1], dtype=torch.bool)]).int().argmax(0)
            points.append((ends[leaves].mean().item(), bits.gather(0, leaves[None]).mean().item()))
    points.sort()
    return [depth for depth, _ in points], [level for _, level in points]


def area(model: Any, data: TaskData) -> float | None:
    """Bits a byte over the mean depth from 2 to 8 layers, the mean."""
    if isinstance(model, MixtureOfDepths | SecondModel):
        return None  # has one depth
    grid = np.linspace(GATES[0], LAYERS, 25)
    return float(np.interp(grid, *trade_off(model, data)).mean())


def at_six(model: Any, data: TaskData) -> float | None:
    """Bits a byte at a mean depth of six of eight layers."""
    if isinstance(model, MixtureOfDepths):
        return exit_predictions(model, data)["bits"][-1].mean().item()  # four layers, and half of four
    return None if isinstance(model, SecondModel) else float(np.interp(6, *trade_off(model, data)))


def _change(states: list[Tensor]) -> float:
    """‖x^{i+1} − x^i‖ / ‖x^i‖, the mean over layers and tokens."""
    return torch.stack([(b - a).norm(dim=-1) / a.norm(dim=-1) for a, b in pairwise(states)]).mean().item()


@torch.no_grad()
def velocity(model: Any, data: TaskData) -> float | None:
    """The stream that exits by: its change a layer up to the first gate, the mean, over the slow stream's own."""
    if isinstance(model, MixtureOfDepths | SecondModel):
        return None
    streams = model.streams(_windows(data)[0])
    return _change(list(streams.fast[0])) / _change(streams.slow[: model.gates[0] + 1])


def drafted(model: Any, data: TaskData) -> Statistics:
    """Four texts drawn on, with drafts of four tokens by the first gate, or by the second model.

    Drawn and not greedy: greedy text of so small a decoder repeats itself, which anything drafts.
    """
    if hasattr(model, "drafted"):
        return model.drafted  # two figures are read off the same texts
    model.drafted = statistics = Statistics()
    if isinstance(model, MixtureOfDepths) or list(model.gates) != GATES:
        return statistics  # of those no experiment is about drafts
    x, _ = _windows(data)
    options: dict[str, Any] = (
        {"mode": "two-model", "draft": model.draft} if isinstance(model, SecondModel) else {"mode": "speculative"}
    )
    tokens = 8 if is_smoke(data) else 80
    for row in range(4):
        at = row * len(x) // 4
        draw: dict[str, Any] = {"temperature": 1.0, "generator": torch.Generator().manual_seed(row)}
        list(decode(model, x[at : at + 1], tokens, gamma=4, statistics=statistics, **draw, **options))
    return statistics


def accepted(model: Any, data: TaskData) -> float | None:
    """Tokens that a check of all layers yields, its own among them."""
    statistics = drafted(model, data)
    return statistics.tokens / statistics.rounds if statistics.rounds else None


def layers_read(model: Any, data: TaskData) -> float | None:
    """How many layers' weights are read for a token, over the eight that plain decoding reads."""
    statistics = drafted(model, data)
    read = statistics.passes + statistics.draft_passes
    return read / statistics.tokens / LAYERS if statistics.rounds else None


PROBES = {
    "agreement": agreement,
    "area": area,
    "at_six": at_six,
    "velocity": velocity,
    "accepted": accepted,
    "layers_read": layers_read,
    "settled": settled,
}


# Experts.

TOKENS = 256  # that are simulated
HALF = LAYERS // 2


def aligned(base: CausalLM) -> ExitModel:
    """A fast stream that learns to be at layer i what the slow one is at 2i, and nothing else."""
    return M2R2Model(base, [HALF], rate=2, rank=2 * RANK, router="none", exit_weight=0, align_weight=1)


def unaligned(base: CausalLM) -> ExitModel:
    """The slow stream instead."""
    return ExitModel(base, [HALF], router="none")


def foretell(model: Any, data: TaskData, sources: Sequence[str] = ("fast",)) -> ExpertTrace:
    """The experts of some windows of test text, and what the model's stream foretells of them."""
    x, _ = _windows(data)
    return trace_experts(model, x[: max(1, TOKENS // LENGTH)], sources=sources)


def hits(model: Any, data: TaskData) -> float:
    """The share of needed experts among the three that are foretold."""
    return foretell(model, data).hit_rate("fast")


@torch.no_grad()
def likeness(model: Any, data: TaskData) -> float:
    """The cosine of the stream at layer i and the slow one at 2i, the mean over i = 1 to 4."""
    streams = model.streams(_windows(data)[0])
    pairs = [(streams.fast[0][i], streams.slow[2 * i]) for i in range(1, HALF + 1)]
    return torch.stack([F.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]).mean().item()


# Half of all 64 experts fit, and one is brought in the time that a layer computes. Two rows of one matrix product cost
# a tenth more than one where reading the weights is what takes the time.
ROOM = Memory(slots=32, load=1.0, fast=0.1)
SCARCE = replace(ROOM, slots=8)


def _fast_cost(model: Any, memory: Memory) -> Memory:
    """A stream that is the slow one costs nothing more."""
    return memory if isinstance(model, M2R2Model) else replace(memory, fast=0.0)


def _speedup(memory: Memory, model: Any, data: TaskData) -> float:
    trace = foretell(model, data)
    return simulate(trace, memory).total / simulate(trace, _fast_cost(model, memory), "fast", most=2).total


def speedup(model: Any, data: TaskData) -> float:
    """How many times as long loading on demand takes, with room for half of the experts."""
    return _speedup(ROOM, model, data)


def scarce_stall(model: Any, data: TaskData) -> float:
    """Time in which layers wait for experts, over that of loading on demand, with room for an eighth of them."""
    trace = foretell(model, data)
    return simulate(trace, _fast_cost(model, SCARCE), "fast", most=2).stalled / simulate(trace, SCARCE).stalled


def scarce_loads(model: Any, data: TaskData) -> float:
    """Experts brought, over those that loading on demand brings, with room for an eighth of them."""
    trace = foretell(model, data)
    return simulate(trace, _fast_cost(model, SCARCE), "fast", most=2).loads / simulate(trace, SCARCE).loads


EXPERT_PROBES = {
    "hits": hits,
    "likeness": likeness,
    "speedup": speedup,
    "scarce_stall": scarce_stall,
    "scarce_loads": scarce_loads,
}


# Depth.


class NoResidual(nn.Module):
    """x ← mixer(norm(x)); x ← feedforward(norm(x)): a pre-norm block without its two sums."""

    def __init__(self, block: Any):
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.feedforward = block.norm1, block.mixer, block.norm2, block.feedforward

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        x = self.mixer(self.norm1(x), mask=mask)
        return self.feedforward(self.norm2(x))


def tower(layers: int, residual: bool, vocab: int) -> CausalLM:
    """A decoder with residual sums or without; maps keep the size of what they are given, in all variants alike."""
    model = CausalLM(vocab, 48, layers, partial(SoftmaxAttention, heads=4, bias=False, rotary=True))
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
    if not residual:
        model.blocks = nn.ModuleList(NoResidual(block) for block in model.blocks)
    return model
