"""Ways to generate: all layers for every token, early exit, self-speculation, and speculation with a second model.

Speculation drafts a few tokens cheaply and has the whole decoder check all of them in one pass. What it keeps is what
the decoder alone would have written, token for token where the likeliest is taken, in distribution where it is drawn.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.narrowing import present
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.language import probabilities
from provenn.papers.m2r2.decoders import Cache, Decoder, Positions, take_apart
from provenn.papers.m2r2.streams import run_slow

MODES = ("full", "exit", "speculative", "two-model")
CONFIDENCES = ("router", "probability", "margin")


@runtime_checkable
class Exits(Protocol):
    """What decoding asks of a model with gates; see `model.ExitModel`."""

    gates: tuple[int, ...]
    routers: nn.ModuleList

    def decoder(self, *, fixed: bool = False) -> Decoder:
        """The base in parts."""

    def run_gate(self, decoder: Decoder, gate: int, h: Tensor, positions: Positions, cache: Cache) -> Any:
        """From the gate before to this one, for one token: h there, and the states that lead there."""

    def catch_up(
        self, decoder: Decoder, gate: int, pending: Tensor, positions: Positions, last: Positions, cache: Cache
    ) -> Any:
        """As `run_gate`, for tokens of which the last is new and the others had left before."""


@dataclass
class Statistics:
    """What a generation cost.

    Args:
        tokens: that were written, of all texts.
        rounds: drafts that were checked, of all texts.
        drafted, accepted: tokens of the drafts, and those that were kept.
        passes: how often the weights of a layer were read, both streams of a token at once, drafts and checks alike.
        draft_passes: how often those of a second model's layers were read.
        evaluations: of a layer on a token of the slow stream.
        fast_evaluations: of a layer on a token of the fast stream.
        depths: after how many layers tokens left, where they may leave early.
        seconds: from the prompt on.
    """

    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    draft_passes: int = 0
    evaluations: int = 0
    fast_evaluations: int = 0
    depths: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def accept_rate(self) -> float:
        """The share of drafted tokens that was kept."""
        return self.accepted / self.drafted if self.drafted else math.nan

    @property
    def mean_depth(self) -> float:
        """Layers a token, the mean."""
        return sum(depth * count for depth, count in self.depths.items()) / max(1, sum(self.depths.values()))

    @property
    def tokens_per_second(self) -> float:
        """Of all texts together."""
        return self.tokens / self.seconds if self.seconds else math.nan


class Draw(NamedTuple):
    """How a token is chosen from logits, as `provenn.nn.language.CausalLM.generate` says."""

    temperature: float | int
    top_k: int | None
    top_p: float | int | None
    generator: torch.Generator | None

    def chances(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """The probabilities that tokens are drawn with."""
        return probabilities(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def __call__(self, logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
        return logits.argmax(-1) if self.temperature == 0 else self.pick(self.chances(logits))

    def pick(self, chances: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
        """A token of each row."""
        return torch.multinomial(chances, 1, generator=self.generator).squeeze(-1)


@dataclass
class Work:
    """A generation at work.

    Args:
        model: what generates.
        decoder, cache: its base in parts, and what that keeps.
        draw: how tokens are chosen.
        start: the position of each text's last token, which is not read yet: one number for all, or (batch,).
        token: that token, (batch,).
        statistics: what is counted.
    """

    model: Exits
    decoder: Decoder
    cache: Cache
    draw: Draw
    start: int | Tensor
    token: Int[Tensor, " batch"]
    statistics: Statistics

    @property
    def layers(self) -> int:
        """N."""
        return len(self.decoder.layers)

    def count(self, layers: int, tokens: int, fast: int = 0) -> None:
        """Note that so many layers were read for so many tokens."""
        self.statistics.passes += layers
        self.statistics.evaluations += layers * tokens * len(self.token)
        self.statistics.fast_evaluations += fast * len(self.token)

    def embedded(self, tokens: Int[Tensor, "batch tokens"], ahead: int = 0) -> tuple[Tensor, Any]:
        """Embeddings of the tokens from `start` + `ahead` on, and their positions."""
        positions = self.decoder.positions(tokens.shape[1], self.start + ahead)
        return self.decoder.embed(tokens, positions), positions


class Piece(NamedTuple):
    """What a step adds: tokens (batch, k), of which each text keeps the first `kept`."""

    tokens: Int[Tensor, "batch k"]
    kept: Int[Tensor, " batch"]


@torch.no_grad()
def decode(
    model: Exits,
    prompt: Int[Tensor, "batch tokens"],
    count: int,
    *,
    mode: str = "speculative",
    gamma: int = 4,
    stop: float | int = 0.0,
    threshold: float | int | Sequence[float | int] = 0.9,
    confidence: str = "router",
    fill: str = "exact",
    draft: nn.Module | None = None,
    temperature: float | int = 0.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    generator: torch.Generator | None = None,
    end: int | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
    statistics: Statistics | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """Tokens that follow prompts, (batch,) at a time as soon as every text has its next.

    Args:
        model: an `ExitModel`, `HeadExit` or `M2R2Model`.
        prompt: at least one token a text.
        count: how many tokens to write.
        mode: "full" (all layers for every token), "exit" (a token leaves at the first gate that is sure), "speculative"
            (drafts by the first gate, checks by all layers) or "two-model" (drafts by `draft`).
        gamma: tokens of a draft at most.
        stop: a draft ends where the likeliest token of every text is less likely than that.
        threshold: of the confidence that a token leaves with, one for all gates or one for each.
        confidence: "router" (the router's probability that the gate says what all layers would), "probability" (of the
            gate's likeliest token) or "margin" (by which it is likelier than the next).
        fill: what later tokens see of one that left, in the layers that it left out. With "exact", these layers are
            done when the first later token needs them. With "propagate", keys and values are of the state that it left
            with.
        draft: a decoder over the same tokens.
        temperature, top_k, top_p, generator: how tokens are chosen; 0 takes the likeliest.
        end: a token after which a text has ended; it is repeated up to the longest text's end, and where all have ended
            nothing more comes.
        lengths: of prompts that are padded at their end.
        statistics: what is counted there.

    Raises:
        ValueError: an option that is out of range.
        UserError: the decoder has fewer positions than tokens, or the two models do not share their tokens.
    """
    check_whole(count=count, gamma=gamma)
    check_finite(stop=stop)
    for name, value, known in (
        ("mode", mode, MODES),
        ("confidence", confidence, CONFIDENCES),
        ("fill", fill, ("exact", "propagate")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if prompt.dim() != 2 or not prompt.shape[1]:
        raise ValueError(f"expected prompts (batch, tokens) of at least one token, got shape {tuple(prompt.shape)}")
    if gamma < 1 or count < 0 or not 0 <= stop <= 1:
        raise ValueError(
            "expected gamma of at least 1, a count that is not negative and stop in [0, 1], got "
            f"gamma={gamma}, count={count}, stop={stop}"
        )
    if (mode == "two-model") != (draft is not None):
        raise ValueError("mode='two-model' drafts with a second model, draft=…; no other mode takes one")
    if mode == "exit" and confidence == "router" and not model.routers:
        raise ValueError("this model has no router: give confidence='probability' or 'margin'")
    # Where nothing is drawn, a wrong option of the draw would not be noticed later.
    probabilities(torch.zeros(1), temperature=temperature, top_k=top_k, top_p=top_p)
    if lengths is not None and (
        lengths.shape != prompt.shape[:1] or lengths.min() < 1 or lengths.max() > prompt.shape[1]
    ):
        raise ValueError(f"expected a length of 1 to {prompt.shape[1]} for each of {len(prompt)} prompts")
    statistics = Statistics() if statistics is None else statistics
    if not count or not len(prompt):
        return
    began = time.perf_counter()
    decoder = model.decoder()
    small = take_apart(draft) if draft is not None else None
    start: int | Tensor = prompt.shape[1] - 1 if lengths is None else lengths - 1
    longest = prompt.shape[1] if lengths is None else int(lengths.max())
    if prompt.min() < 0 or prompt.max() >= decoder.vocab:
        raise ValueError(
            f"expected tokens from 0 to {decoder.vocab - 1}, got {prompt.min().item()} to {prompt.max().item()}"
        )
    if small is not None and small.vocab != decoder.vocab:
        raise UserError(f"the draft model has {small.vocab} tokens, the model {decoder.vocab}")
    for who, parts in (("model", decoder), ("draft model", small)):
        if parts is not None and parts.max_length is not None and longest + count - 1 > parts.max_length:
            raise UserError(
                f"the prompt has {longest} tokens and {count} are to follow, but the {who} has positions for "
                f"{parts.max_length}: shorten the prompt or ask for fewer tokens"
            )
    last = prompt[:, -1] if lengths is None else prompt.gather(1, lengths[:, None] - 1).squeeze(1)
    draw = Draw(temperature, top_k, top_p, generator)
    work = Work(model, decoder, Cache(len(decoder.layers)), draw, start, last, statistics)
    if longest > 1:
        # All but the last token, which the first step reads. What stands behind a shorter text is written over by it.
        read_prompt(decoder, work.cache, prompt[:, : longest - 1])
    if mode == "full":
        pieces = _full(work)
    elif mode == "exit":
        thresholds = [
            float(t) for t in (threshold if isinstance(threshold, Sequence) else [threshold] * len(model.gates))
        ]
        if len(thresholds) != len(model.gates) or any(math.isnan(t) for t in thresholds):
            raise ValueError(f"expected a threshold, or one for each of {len(model.gates)} gates, got {threshold}")
        pieces = _exit(work, thresholds, confidence, fill)
    elif mode == "speculative":
        pieces = _speculative(work, gamma, stop, count)
    else:
        pieces = _two_model(work, present(small, "small"), prompt[:, : longest - 1], gamma, stop, count)
    yield from _columns(work, pieces, count, end, began)


def read_prompt(decoder: Decoder, cache: Cache, tokens: Int[Tensor, "batch tokens"]) -> None:
    """Keys and values of a text's beginning, in all layers."""
    positions = decoder.positions(tokens.shape[1])
    run_slow(decoder, decoder.embed(tokens, positions), range(len(decoder.layers)), positions, cache)


def _columns(
    work: Work, pieces: "Generator", count: int, end: int | None, began: float
) -> Iterator[Int[Tensor, " batch"]]:
    """The pieces of all texts, a column at a time; sends the generation how many tokens each text lacks."""
    batch = len(work.token)
    texts: list[list[int]] = [[] for _ in range(batch)]
    ended = [False] * batch
    sent = 0
    left: Tensor | None = None  # of each text, how many tokens it lacks
    while True:
        piece = next(pieces) if left is None else pieces.send(left)
        for row, (new, kept) in enumerate(zip(piece.tokens.tolist(), piece.kept.tolist())):
            for token in new[:kept]:
                if not ended[row] and len(texts[row]) < count:
                    texts[row].append(token)
                    work.statistics.tokens += 1
                    ended[row] = token == end
        ready = min(
            (len(text) for text, is_over in zip(texts, ended) if not is_over), default=max(len(text) for text in texts)
        )
        work.statistics.seconds = time.perf_counter() - began
        while sent < ready:
            column = [text[sent] if sent < len(text) else end for text in texts]
            yield torch.tensor(column, device=work.token.device)
            sent += 1
        if all(is_over or len(text) == count for text, is_over in zip(texts, ended)):
            return
        left = torch.tensor([0 if is_over else count - len(text) for text, is_over in zip(texts, ended)])


Generator = Any  # of pieces, that is sent how many tokens each text lacks


def _advance(work: Work, kept: Tensor, token: Tensor, left: Tensor) -> None:
    """Go on from the last token that was kept, of each text that still lacks some."""
    device = work.token.device
    over = (left == 0).to(device)
    start = torch.as_tensor(work.start, device=device) + kept
    start = start.expand(len(token)) if start.dim() == 0 else start
    # A text that is over stands where the least advanced one does: its tokens are computed along and dropped.
    start = torch.where(over, start[~over].min(), start)
    first = start.tolist()
    work.start = first[0] if len(set(first)) == 1 else start
    work.token = token


def _full(work: Work) -> Generator:
    one = torch.ones(len(work.token), dtype=torch.long)
    while True:
        h, positions = work.embedded(work.token[:, None])
        h = run_slow(work.decoder, h, range(work.layers), positions, work.cache)
        work.count(work.layers, 1)
        token = work.draw(work.decoder.logits(h)[:, 0])
        yield Piece(token[:, None], one)
        work.start, work.token = work.start + 1, token


def _shortest(left: Tensor | None, count: int) -> int:
    """How many tokens the text lacks that lacks fewest, of those that lack any."""
    return count if left is None else int(left[left > 0].min())


def _speculative(work: Work, gamma: int, stop: float, count: int) -> Generator:
    model, decoder, e = work.model, work.decoder, work.model.gates[0]
    left: Tensor | None = None
    fast = e if hasattr(model, "adapters") else 0
    while True:
        states: list[Tensor] = []
        drafts: list[Tensor] = []
        chances: list[Tensor] = []
        token = work.token
        # The check gives one token more than was drafted.
        for s in range(min(gamma, _shortest(left, count) - 1)):
            h, positions = work.embedded(token[:, None], s)
            h, path = model.run_gate(decoder, 0, h, positions, work.cache)
            work.count(e, 1, fast)
            states.append(h)
            logits = decoder.logits(path[-1])[:, 0]
            if stop and bool((logits.float().softmax(-1).amax(-1) < stop).all()):
                break
            token = _draft(work, logits, chances)
            drafts.append(token)
        if len(states) == len(drafts):
            h, positions = work.embedded(token[:, None], len(drafts))
            states.append(run_slow(decoder, h, range(e), positions, work.cache))
            work.count(e, 1)
        positions = decoder.positions(len(states), work.start)
        h = run_slow(decoder, torch.cat(states, dim=1), range(e, work.layers), positions, work.cache)
        work.count(work.layers - e, len(states))
        left = yield from _check(work, decoder.logits(h), drafts, chances)


def _draft(work: Work, logits: Tensor, chances: list[Tensor]) -> Tensor:
    """A drafted token; where tokens are drawn, the probabilities that it was drawn with are kept."""
    if work.draw.temperature == 0:
        return logits.argmax(-1)
    chances.append(work.draw.chances(logits))
    return work.draw.pick(chances[-1])


def _check(work: Work, logits: Tensor, drafts: list[Tensor], chances: list[Tensor]) -> Generator:
    """Keep the drafts up to the first that the decoder would not have written, and its own token there."""
    batch, k = logits.shape[0], len(drafts)
    drafted = torch.stack(drafts, dim=1) if drafts else work.token.new_empty(batch, 0)
    if work.draw.temperature == 0:
        wanted = logits.argmax(-1)
        right = (wanted[:, :k] == drafted).cumprod(1).sum(1)
        token = wanted.gather(1, right[:, None]).squeeze(1)
    else:
        target = work.draw.chances(logits)
        right, token = judge(target, drafted, torch.stack(chances, dim=1) if chances else None, work.draw.generator)
    tokens = torch.cat([drafted, token[:, None]], dim=1).scatter(1, right[:, None], token[:, None])
    statistics = work.statistics
    statistics.rounds += batch
    statistics.drafted += k * batch
    statistics.accepted += int(right.sum())
    left = yield Piece(tokens, right + 1)
    _advance(work, right + 1, token, left)
    return left


def judge(
    target: Float[Tensor, "batch more vocab"],
    drafted: Int[Tensor, "batch k"],
    chances: Float[Tensor, "batch k vocab"] | None,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Rejection sampling of drafts (Leviathan et al., 2023): how many are kept, and the token after them.

    A token x drawn with probability q(x) is kept with min(1, p(x)/q(x)). At the first that is not, one is drawn from
    (p − q)⁺, normalised; where all are kept, from p behind them. What is written then has the distribution p.

    Args:
        target: p at every drafted token and behind the last.
        drafted: the tokens.
        chances: q.
        generator: of the draws.
    """
    batch, k = drafted.shape
    if chances is None:
        return drafted.new_zeros(batch), torch.multinomial(target[:, 0], 1, generator=generator).squeeze(1)
    p, q = (part[:, :k].gather(2, drafted[..., None]).squeeze(2) for part in (target, chances))
    uniform = torch.rand(batch, k, generator=generator, device=p.device, dtype=p.dtype)
    right = (uniform * q < p).long().cumprod(1).sum(1)
    # Behind the last draft nothing was drafted: q is 0 there.
    index = right[:, None, None].expand(-1, 1, target.shape[2])
    padded = torch.cat([chances, torch.zeros_like(target[:, :1])], dim=1)
    rest = (target.gather(1, index) - padded.gather(1, index)).squeeze(1).clamp_min(0)
    # By rounding nothing may be left where p and q are the same.
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, target.gather(1, index).squeeze(1))
    return right, torch.multinomial(rest, 1, generator=generator).squeeze(1)


def _two_model(work: Work, small: Decoder, prompt: Tensor, gamma: int, stop: float, count: int) -> Generator:
    decoder = work.decoder
    cache, layers = Cache(len(small.layers)), range(len(small.layers))
    if prompt.shape[1]:
        read_prompt(small, cache, prompt)
    left: Tensor | None = None
    before: Tensor | None = None  # the token before the last, whose entries a draft that was kept whole lacks
    while True:
        drafts: list[Tensor] = []
        chances: list[Tensor] = []
        token = work.token
        for s in range(min(gamma, _shortest(left, count) - 1)):
            given = token[:, None] if s or before is None else torch.stack([before, token], dim=1)
            positions = small.positions(given.shape[1], work.start + s + 1 - given.shape[1])
            h = run_slow(small, small.embed(given, positions), layers, positions, cache)
            work.statistics.draft_passes += len(layers)
            logits = small.logits(h[:, -1])
            if stop and bool((logits.float().softmax(-1).amax(-1) < stop).all()):
                break
            token = _draft(work, logits, chances)
            drafts.append(token)
        tokens = torch.stack([work.token, *drafts], dim=1)
        h, positions = work.embedded(tokens)
        h = run_slow(decoder, h, range(work.layers), positions, work.cache)
        work.count(work.layers, tokens.shape[1])
        started = work.start
        left = yield from _check(work, decoder.logits(h), drafts, chances)
        step = torch.as_tensor(work.start, device=token.device) - torch.as_tensor(started, device=token.device)
        # Of a text that is over any token will do.
        at = (step - 1).clamp(0, tokens.shape[1] - 1).expand(len(token))
        before = tokens.gather(1, at[:, None]).squeeze(1)


def _exit(work: Work, thresholds: list[float], confidence: str, fill: str) -> Generator:
    model, decoder, gates = work.model, work.decoder, work.model.gates
    bounds = (*gates, work.layers)
    fast = hasattr(model, "adapters")
    # For each part between gates: the slow states of the tokens that have reached it but not passed it, as the first
    # one's position and the states in order. A part runs for all of them when the first token needs it.
    waiting: list[tuple[int | Tensor, list[Tensor]]] = [(0, []) for _ in bounds]
    one = torch.ones(len(work.token), dtype=torch.long)
    while True:
        token = torch.zeros_like(work.token)
        inside = torch.ones(len(token), dtype=torch.bool, device=token.device)
        h, positions = work.embedded(work.token[:, None])
        waiting[0] = (work.start, [h])
        for part, bound in enumerate(bounds):
            layers = range(bounds[part - 1] if part else 0, bound)
            (begin, states), waiting[part] = waiting[part], (0, [])
            spread = positions if len(states) == 1 else decoder.positions(len(states), begin)
            path: list[Tensor] = []
            logits: Tensor | None
            if part == len(gates):
                h = run_slow(decoder, torch.cat(states, dim=1), layers, spread, work.cache)
            elif len(states) == 1:
                h, path = model.run_gate(decoder, part, states[0], positions, work.cache)
            else:
                h, path = model.catch_up(decoder, part, torch.cat(states, dim=1), spread, positions, work.cache)
            work.count(len(layers), len(states), len(layers) if fast and path else 0)
            if part == len(gates):
                leaves, logits = inside, decoder.logits(h[:, -1])
            else:
                sure, logits = _confidence(model, decoder, part, path, confidence, thresholds[part])
                leaves = inside & sure
            if bool(leaves.any()):
                logits = decoder.logits(path[-1])[:, 0] if logits is None else logits
                token = torch.where(leaves, work.draw(logits), token)
                work.statistics.depths[bound] += int(leaves.sum())
                inside = inside & ~leaves
            if part < len(gates) and fill == "propagate" and not bool(inside.any()):
                for i in range(bound, work.layers):
                    layer = decoder.layers[i]
                    work.cache.write(i, *layer.keys_and_values(layer.norm1(path[-1]), positions), positions)
            elif part < len(gates):
                first, held = waiting[part + 1]
                waiting[part + 1] = (first if held else begin, [*held, *h.split(1, dim=1)])
            if not bool(inside.any()):
                break
        yield Piece(token[:, None], one)
        work.start, work.token = work.start + 1, token


def _confidence(
    model: Exits, decoder: Decoder, gate: int, path: list[Tensor], confidence: str, threshold: float
) -> tuple[Tensor, Tensor | None]:
    """Which texts leave at a gate, and the gate's logits where they had to be computed."""
    if confidence == "router":
        return model.routers[gate](torch.stack(path))[:, 0].sigmoid() > threshold, None
    logits = decoder.logits(path[-1])[:, 0]
    return certainty(logits, confidence) > threshold, logits


def certainty(logits: Float[Tensor, "*batch vocab"], confidence: str) -> Float[Tensor, "*batch"]:
    """The likeliest token's probability, or the margin by which it leads."""
    top = logits.float().softmax(-1).topk(min(2, logits.shape[-1])).values
    return top[..., 0] if confidence == "probability" else top[..., 0] - top[..., 1:].sum(-1)
