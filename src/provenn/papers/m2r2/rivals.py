"""What else drafts for the decoder that ships: Medusa heads, LookAhead's n-grams, and exit heads as DEED has them.

Medusa and LookAhead have no draft model. Each pass of all layers checks several candidates at once and makes the next.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.papers.m2r2.decoders import Cache, Decoder, Positions, take_apart
from provenn.papers.m2r2.decoding import Draw, Statistics, read_prompt
from provenn.papers.m2r2.model import ExitModel, HeadExit, Streams
from provenn.papers.m2r2.task import shipped

GATE, HEADS = 2, 3
# A second stream beside 2 layers of width 64 has 4 · 64 · 16 · 2 = 8,192 parameters.
EXIT_RANK, MEDUSA_RANK = 64, 21
Chains = Sequence[Sequence[int]]


class MedusaHeads(ExitModel):
    """Heads on the last state that say tokens further ahead (Cai et al., 2024, arXiv:2401.10774, Medusa-1).

    head_k(h) = E (z + SiLU(U_k V_k z)) with z = norm(h) is of the token k places behind the next. The decoder stays
    as it is. Shrunk: the square map of a head has a low rank, for as many parameters as M2R2's adapters, and all heads
    share the decoder's own output matrix E.

    Args:
        base: the decoder.
        heads: how many.
        rank: of each head's map.
    """

    def __init__(self, base: nn.Module, heads: int = HEADS, rank: int = MEDUSA_RANK):
        super().__init__(base, [GATE], router="none")
        dim = self.decoder().dim
        self.down = nn.ModuleList(nn.Linear(dim, rank, bias=False) for _ in range(heads))
        self.up = nn.ModuleList(nn.Linear(rank, dim, bias=False) for _ in range(heads))
        for up in self.up:
            nn.init.zeros_(up.weight)  # type: ignore[arg-type]  # a Linear's; heads begin as the decoder's own, as there
        self._follow_base()

    def ahead(self, decoder: Decoder, h: Float[Tensor, "*batch dim"]) -> list[Float[Tensor, "*batch vocab"]]:
        """What each head says from the last state."""
        z = decoder.norm(h)
        return [decoder.head(z + F.silu(up(down(z)))) for down, up in zip(self.down, self.up)]

    def streams(self, tokens: Int[Tensor, "batch tokens"]) -> Streams:
        streams = super().streams(tokens)
        return streams._replace(fast=[streams.slow[-1][None]] * len(self.up))

    def exit_logits(self, streams: Streams, *, fixed: bool = False) -> list[Float[Tensor, "batch tokens vocab"]]:
        """Of each token's next what head k said k places before; of the first k what the decoder says."""
        ahead = self.ahead(self.decoder(fixed=fixed), streams.slow[-1])
        return [
            torch.cat([streams.logits[:, :k].detach(), said[:, :-k]], dim=1) for k, said in enumerate(ahead, start=1)
        ]

    def training_loss(self, batch: Any) -> Tensor:
        """Σ_k 0.8^k cross-entropy of head k, as there."""
        tokens, following = batch
        streams = self.streams(tokens)
        ahead = self.ahead(self.decoder(fixed=True), streams.slow[-1].detach())
        losses = [F.cross_entropy(said[:, :-k].transpose(1, 2), following[:, k:]) for k, said in enumerate(ahead, 1)]
        return sum((0.8**k * loss for k, loss in enumerate(losses, 1)), start=losses[0].new_zeros(()))


def medusa(base: nn.Module) -> ExitModel:
    """Medusa heads."""
    return MedusaHeads(base)


def deed(base: nn.Module) -> ExitModel:
    """An adapter before the shared output matrix after two layers (Tang et al., 2023, arXiv:2311.08623).

    As in DEED, exits share the output matrix, adapters shape the states of shallow layers, and deep layers of earlier
    tokens are computed when a later one needs them, which here is the check. Shrunk: one exit, as drafts have one, and
    the decoder itself is not trained with it.
    """
    return HeadExit(base, [GATE], rank=EXIT_RANK, router="none")


def around_shipped(part: Any, vocab: int) -> ExitModel:
    """A study's `build`: the part around the decoder that ships."""
    model = shipped("m2r2_tiny")
    if vocab != model.decoder().vocab:
        raise ValueError(f"the decoder that ships has {model.decoder().vocab} tokens, got {vocab}")
    return part(model.base)


# One pass over several candidates.


@dataclass
class Pass:
    """What one pass of all layers leaves of some tokens that are not all kept.

    Args:
        states: the last states.
        keys, values: of each layer.
        logits: of each token.
    """

    states: Float[Tensor, "1 tokens dim"]
    keys: list[Tensor]
    values: list[Tensor]
    logits: Float[Tensor, "tokens vocab"]


def read_branches(
    decoder: Decoder,
    cache: Cache,
    start: int,
    tokens: Sequence[int],
    places: Sequence[int],
    seen: Bool[Tensor, "tokens tokens"],
) -> Pass:
    """All layers on tokens that see the text before `start` and those of each other that `seen` says.

    Args:
        decoder, cache: the decoder, and its entries of the positions before `start`.
        start: the position of the last token that was kept.
        tokens: that one and the candidates.
        places: how far each stands behind it.
        seen: True where a row's token sees a column's.
    """
    index = torch.tensor(places) + start
    turns = None
    if (whole := decoder.positions(start + max(places) + 1).turns) is not None:
        turns = whole[0][index], whole[1][index]
    at = Positions(start, len(tokens), start + len(tokens), None, turns)
    x = decoder.embed(torch.tensor([list(tokens)]), Positions(0, len(tokens), start + len(tokens), index[None]))
    mask = torch.cat([torch.ones(len(tokens), start, dtype=torch.bool), seen], dim=1)
    keys, values = [], []
    for i, layer in enumerate(decoder.layers):
        z = layer.norm1(x)
        k, v = layer.keys_and_values(z, at)
        keys.append(k)
        values.append(v)
        if start:
            before = cache.read(i, start)
            k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        shared: dict[str, Any] = {"scale": layer.scale, "enable_gqa": layer.kv_heads != layer.heads}
        y = F.scaled_dot_product_attention(layer.queries(z, at), k, v, attn_mask=mask, **shared)
        x = x + layer.out(y.transpose(1, 2).flatten(2))
        normed = layer.norm2(x)
        x = x + layer.feedforward(normed, normed)
    return Pass(x, keys, values, decoder.logits(x)[0])


def keep(decoder: Decoder, cache: Cache, done: Pass, start: int, rows: Sequence[int]) -> None:
    """Write the entries of the tokens that were kept, in their order from `start` on."""
    at = decoder.positions(len(rows), start)
    for i, (k, v) in enumerate(zip(done.keys, done.values)):
        cache.write(i, k[:, :, list(rows)], v[:, :, list(rows)], at)


def judge_chains(
    chances: Float[Tensor, "tokens vocab"], chains: Chains, rows: Chains, generator: torch.Generator | None = None
) -> tuple[list[int], list[int]]:
    """Which tokens of several candidates are kept, and the token after them: what is written has the distribution p.

    At each place candidates are tried in turn, and x is kept with probability p(x). Of one that is refused p loses x
    and is normalised again, so that the next candidate is tried by what remains (Miao et al., 2024, SpecInfer).

    Args:
        chances: p behind the last token, row 0, and behind each token of the candidates.
        chains: the candidates, which follow the last token.
        rows: where in `chances` each token of a candidate stands.
        generator: of the draws.

    Returns:
        Rows of the tokens that are kept, and all new tokens, one more.
    """
    alive, kept, written = list(range(len(chains))), [0], []
    p = chances[0].clone()
    for place in range(max(map(len, chains), default=0)):
        taken = None
        refused: set[int] = set()
        for c in alive:
            token = chains[c][place] if place < len(chains[c]) else None
            if token is None or token in refused:
                continue
            if float(torch.rand((), generator=generator, dtype=p.dtype)) * float(p.sum()) < float(p[token]):
                taken = c
                break
            refused.add(token)
            p[token] = 0
        if taken is None:
            break
        token = chains[taken][place]
        written.append(token)
        kept.append(rows[taken][place])
        alive = [c for c in alive if place < len(chains[c]) and chains[c][place] == token]
        p = chances[kept[-1]].clone()
    written.append(int(torch.multinomial(p, 1, generator=generator)))
    return kept, written


def laid_out(chains: Chains, first: int) -> tuple[list[int], list[int], list[list[int]], Tensor]:
    """Candidates one behind the other: tokens, places, the rows of each, and which see which of their own."""
    tokens = [token for chain in chains for token in chain]
    places = [1 + i for chain in chains for i in range(len(chain))]
    rows, blocks = [], [torch.ones(len(chain), len(chain), dtype=torch.bool).tril() for chain in chains]
    for chain in chains:
        rows.append(list(range(first, first + len(chain))))
        first += len(chain)
    return tokens, places, rows, torch.block_diag(*blocks).bool() if blocks else torch.zeros(0, 0, dtype=torch.bool)


def chances_of(draw: Draw, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
    """The probabilities that tokens are drawn with; one where the likeliest is taken."""
    return draw.chances(logits) if draw.temperature else F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)


# The likeliest of three heads, and the second and the third of the first: paths of a tree, as Medusa's are.
PATHS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (2, 0, 0))


@torch.no_grad()
def write_by_medusa(
    model: MedusaHeads,
    prompt: Int[Tensor, "1 tokens"],
    count: int,
    draw: Draw,
    *,
    paths: Sequence[Sequence[int]] = PATHS,
    statistics: Statistics | None = None,
) -> list[int]:
    """`count` tokens after a prompt. Heads propose a small tree, which the next pass of all layers checks.

    Args:
        model, prompt, count, draw: what writes, after what, how much, and how tokens are chosen.
        paths: which of its likeliest tokens each head gives to a candidate.
        statistics: what is counted there.
    """
    decoder, cache, written = _begin(model, prompt)
    most = 1 + max((rank for path in paths for rank in path), default=0)
    chains: Chains = []
    token, start = int(prompt[0, -1]), prompt.shape[1] - 1
    while len(written) < count:
        more, places, rows, own = laid_out(chains, 1)
        done = read_branches(decoder, cache, start, [token, *more], [0, *places], _behind_the_last(own))
        kept, new = judge_chains(chances_of(draw, done.logits), chains, rows, draw.generator)
        keep(decoder, cache, done, start, kept)
        _count(statistics, decoder, chains, kept)
        written += new
        token, start = new[-1], start + len(new)
        best = torch.stack(model.ahead(decoder, done.states[0, kept[-1]])).topk(most).indices.tolist()
        chains = [[best[k][rank] for k, rank in enumerate(path)] for path in paths]
    return _ended(written, count, statistics)


@dataclass
class Pool:
    """The n-grams that were seen, by their first token, the latest first and at most `most` of each."""

    most: int
    grams: dict[int, OrderedDict[tuple[int, ...], None]] = field(default_factory=dict)

    def add(self, gram: Sequence[int]) -> None:
        """One more n-gram."""
        of_first = self.grams.setdefault(gram[0], OrderedDict())
        of_first.pop(tuple(gram[1:]), None)
        of_first[tuple(gram[1:])] = None
        if len(of_first) > self.most:
            of_first.popitem(last=False)

    def behind(self, token: int) -> list[tuple[int, ...]]:
        """What has followed a token."""
        return list(reversed(self.grams.get(token, ())))


@torch.no_grad()
def write_by_lookahead(
    model: ExitModel,
    prompt: Int[Tensor, "1 tokens"],
    count: int,
    draw: Draw,
    *,
    window: int,
    n: int,
    statistics: Statistics | None = None,
) -> list[int]:
    """`count` tokens after a prompt by LookAhead decoding (Fu et al., 2024, arXiv:2402.02057).

    One pass holds a window of n − 1 rows of guesses, which is Jacobi's iteration and makes `window` n-grams, and as
    many n-grams of the pool that begin with the last token, which it checks. A guess in row i and column j stands
    1 + i + j places behind the last token. It sees row 0 up to its column, and its own column in the rows between. The
    pool begins with the prompt's n-grams. Nothing is shrunk but window and n.

    Args:
        model, prompt, count, draw: what writes, after what, how much, and how tokens are chosen.
        window, n: columns of the window, and tokens of an n-gram.
        statistics: what is counted there.
    """
    decoder, cache, written = _begin(model, prompt)
    text = prompt[0].tolist()
    pool = Pool(window)
    for i in range(len(text) - n + 1):
        pool.add(text[i : i + n])
    levels = [[text[(3 * row + j) % len(text)] for j in range(window)] for row in range(n - 1)]
    guesses = window * (n - 1)
    beside = [1 + row + j for row in range(n - 1) for j in range(window)]
    sees = window_mask(window, n)
    token, start = text[-1], len(text) - 1
    while len(written) < count:
        chains = pool.behind(token)
        more, places, rows, own = laid_out(chains, 1 + guesses)
        seen = _behind_the_last(torch.block_diag(sees, own).bool())
        flat = [guess for level in levels for guess in level]
        done = read_branches(decoder, cache, start, [token, *flat, *more], [0, *beside, *places], seen)
        kept, new = judge_chains(chances_of(draw, done.logits), chains, rows, draw.generator)
        keep(decoder, cache, done, start, kept)
        _count(statistics, decoder, chains, kept)
        last = done.logits[1 + guesses - window : 1 + guesses].argmax(-1).tolist()
        for column in zip(*levels, last):
            pool.add(column)
        levels = [*levels[1:], last]
        written += new
        token, start = new[-1], start + len(new)
    return _ended(written, count, statistics)


def window_mask(window: int, n: int) -> Bool[Tensor, "guesses guesses"]:
    """True where a guess of LookAhead's window sees another: row 0 up to its column, its column up to its row."""
    level, column = torch.arange(window * (n - 1)) // window, torch.arange(window * (n - 1)) % window
    first = (level == 0) & (column <= column[:, None])
    return first | ((column == column[:, None]) & (level <= level[:, None]))


def _behind_the_last(own: Tensor) -> Tensor:
    """Candidates see the last token, which sees itself alone."""
    seen = torch.zeros(len(own) + 1, len(own) + 1, dtype=torch.bool)
    seen[:, 0] = True
    seen[1:, 1:] = own
    return seen


def _begin(model: ExitModel, prompt: Tensor) -> tuple[Decoder, Cache, list[int]]:
    decoder = take_apart(model.base)
    cache = Cache(len(decoder.layers))
    if prompt.shape[1] > 1:
        read_prompt(decoder, cache, prompt[:, :-1])
    return decoder, cache, []


def _count(statistics: Statistics | None, decoder: Decoder, chains: Chains, kept: Sequence[int]) -> None:
    if statistics is not None:
        statistics.rounds += 1
        statistics.passes += len(decoder.layers)
        statistics.drafted += max(map(len, chains), default=0)
        statistics.accepted += len(kept) - 1


def _ended(written: list[int], count: int, statistics: Statistics | None) -> list[int]:
    if statistics is not None:
        statistics.tokens += count
    return written[:count]
