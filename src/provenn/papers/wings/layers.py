"""Wings: visual and textual learners beside the attention of a layer (Zhang et al., 2024, arXiv:2406.03496), section 3.

Beside the attention of a decoder's layer stand two small cross-attentions. One looks at the vectors of the images, the
other at those of the words, and a router weighs them by how the main attention is spread:

    h = x + Attention(norm(x))
    h ← h + ρ_0 · Visual(h, images) + ρ_1 · Textual(h, words)        (equation 5)
    y = h + MLP(norm(h))

The vectors are those that the first layer reads, not hidden states, and keep their positions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.arguments import check_whole
from provenn.nn.attention import KVCache, check_heads, split_heads
from provenn.nn.decoder import Context, DecoderBlock, RotaryPositions
from provenn.nn.positions import turn
from provenn.ops.softmax_attention import softmax_attention

Turns = tuple[Tensor, Tensor]  # cosines and sines of positions, as `provenn.nn.positions.turn` takes them
Learners = Literal["both", "visual", "textual"]
Routing = Literal["attention", "fixed"]
Query = Literal["sequential", "parallel"]
ROWS = 256  # queries whose masks exist at a time
PAD = 8  # widths that kernels take are multiples of it


class LowRankMap(nn.Module):
    """B A x, with A at first a truncated normal of deviation 0.02 and B zero.

    Shapes: (…, dim) to the same. Parameters: 2 · D · r.
    """

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=False)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.up(self.down(x))


class LowRankResidualAttention(nn.Module):
    """LoRRA: attention whose maps are the identity and a low rank (equation 4).

    q = x + W_q x, k = f + W_k f, v = f + W_v f, y = W_o [Σ_j softmax_j(q·k_j / √p) v_j], each W of rank r

    W_o has no identity and starts at zero. A fresh layer gives zero, and the first gradient reaches W_o's B alone.

    Args:
        dim: D, width of queries and features.
        heads: of queries, keys and values; must divide D.
        rank: r.

    Shapes: (batch, tokens, dim) and (batch, other, dim) to the first. Parameters: 8 · D · r. Slot: cross-mixer.

    >>> learner = LowRankResidualAttention(4096, heads=32)
    >>> sum(p.numel() for p in learner.parameters())
    2097152
    """

    def __init__(self, dim: int, heads: int, rank: int = 64):
        check_whole(dim=dim, heads=heads, rank=rank)
        super().__init__()
        check_heads(dim, heads)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.heads = heads
        self.query = LowRankMap(dim, rank)
        self.key = LowRankMap(dim, rank)
        self.value = LowRankMap(dim, rank)
        self.out = LowRankMap(dim, rank)

    def queries(self, x: Tensor, turns: Turns | None = None) -> Float[Tensor, "batch heads tokens head_dim"]:
        """q, turned by the positions of the tokens."""
        q = split_heads(x + self.query(x), self.heads)
        return q if turns is None else turn(q, *turns)

    def keys_and_values(
        self, features: Tensor, turns: Turns | None = None
    ) -> tuple[Float[Tensor, "batch heads other head_dim"], Float[Tensor, "batch heads other head_dim"]]:
        """k, turned by the positions of the features, and v."""
        k, v = (split_heads(features + part(features), self.heads) for part in (self.key, self.value))
        return (k if turns is None else turn(k, *turns)), v

    def attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads other head_dim"],
        v: Float[Tensor, "batch heads other head_dim"],
        visible: Callable[[int, int], Tensor] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """y of these queries; a query that sees no key gets zero.

        Args:
            q, k, v: of `queries` and `keys_and_values`.
            visible: which keys the queries from a first up to a last may attend to, (batch, queries or 1, first keys);
                none of them sees a key behind those. By default they see all. So no mask of tokens × keys exists at
                once, and no score is made of keys that a part of the queries cannot see.
        """
        if visible is None:
            y = softmax_attention(q, k, v)
        else:
            parts = []
            for start in range(0, q.shape[2], ROWS):
                mask = visible(start, min(start + ROWS, q.shape[2]))[:, None]
                some = mask.any(dim=-1, keepdim=True)
                # A softmax over nothing is NaN, in its gradient too: such a query sees all, and the answer is dropped.
                rows, seen = slice(start, start + ROWS), mask.shape[-1]
                part = softmax_attention(q[:, :, rows], k[:, :, :seen], v[:, :, :seen], mask=mask | ~some)
                parts.append(part.masked_fill(~some, 0))
            y = torch.cat(parts, dim=2)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        features: Float[Tensor, "batch other dim"],
        *,
        mask: Bool[Tensor, "batch rows other"] | None = None,
        query_turns: Turns | None = None,
        feature_turns: Turns | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """What tokens gather from features.

        Args:
            x: tokens.
            features: what they look at.
            mask: True where a token may look at a feature, a row for each token or one for all; a token that
                may look at none gets zero.
            query_turns, feature_turns: cosines and sines of rotary positions, `provenn.nn.positions.rotation`'s.
        """
        q = self.queries(x, query_turns)
        k, v = self.keys_and_values(features, feature_turns)
        if mask is None:
            return self.attend(q, k, v)
        rows = mask if mask.shape[1] > 1 else mask.expand(-1, x.shape[1], -1)
        return self.attend(q, k, v, lambda start, end: rows[:, start:end])


class AttentionRouter(nn.Module):
    """ρ_i = softmax(SiLU(W g_i + b)), the weights of the learners, g_i = Σ_h a_hi being row i of the main attention.

    It sums over heads (equation 5). SiLU and b are in the authors' code and not in the paper. The sum over the tokens j
    of W_j a_hij is what attention gives of the value W_j. So `columns` join the values of a fused attention, and no
    matrix of tokens × tokens need exist.

    Args:
        max_len: the longest text, the width of W; 4,096 in the authors' code, which takes it from the hidden size.
        activation: "silu", or "none" as in the paper.

    Shapes: attention weights (batch, heads, queries, tokens) to (batch, queries, 2). Parameters: 2 · max_len + 2.

    >>> router = AttentionRouter(8)
    >>> router(torch.full((1, 4, 3, 5), 0.2)).sum(dim=-1).allclose(torch.ones(1, 3))
    True
    """

    def __init__(self, max_len: int = 4096, *, activation: Literal["silu", "none"] = "silu"):
        check_whole(max_len=max_len)
        super().__init__()
        if max_len < 1:
            raise ValueError(f"max_len must be at least 1, got {max_len}")
        if activation not in ("silu", "none"):
            raise ValueError(f"activation must be silu or none, got {activation!r}")
        self.activation = activation
        self.linear = nn.Linear(max_len, 2)

    @property
    def max_len(self) -> int:
        """The longest text."""
        return self.linear.in_features

    def columns(self, positions: Int[Tensor, "*batch tokens"]) -> Float[Tensor, "*batch tokens 2"]:
        """W's columns of tokens at these places of their text: what joins the values of a fused attention."""
        return self.linear.weight.mT[positions]

    def weigh(self, sums: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 2"]:
        """ρ of W g."""
        logits = sums + self.linear.bias
        return (F.silu(logits) if self.activation == "silu" else logits).softmax(dim=-1)

    def forward(self, weights: Float[Tensor, "batch heads queries tokens"]) -> Float[Tensor, "batch queries 2"]:
        """The definition, from attention weights that exist."""
        if weights.shape[-1] > self.max_len:
            raise UserError(f"the text has {weights.shape[-1]} tokens, the router's max_len is {self.max_len}")
        return self.weigh(weights.sum(dim=1) @ self.linear.weight[:, : weights.shape[-1]].to(weights.dtype).mT)


class Gathered(NamedTuple):
    """The tokens of one kind among those that a decoder reads.

    Args:
        features: what the first layer reads of them; zero behind a row's last.
        places: where they stand among the tokens.
        order: the number of each among all of its kind in its row, those before this reading too.
        there: False behind a row's last.
        turns: cosines and sines of their positions.
        whole: whether all of them are there.
        reach: how many of them stand before the end of each `ROWS` tokens, in the row that has most.
    """

    features: Float[Tensor, "batch kind dim"]
    places: Int[Tensor, "batch kind"]
    order: Int[Tensor, "batch kind"]
    there: Bool[Tensor, "batch kind"]
    turns: Turns
    whole: bool
    reach: tuple[int, ...]


class Streams(NamedTuple):
    """The tokens of images and those of words, once for all layers.

    Args:
        visual: of images; None where none is read.
        textual: of words, without the system prompt.
        turns: cosines and sines of the positions of all tokens, for the learners' queries.
        numbers: the place of each token in its row's text, and before them of those that were read before.
    """

    visual: Gathered | None
    textual: Gathered | None
    turns: Turns
    numbers: Int[Tensor, "#batch keys"]


class SplitStreams:
    """Makes `Streams` of what a decoder reads; its `sharing`.

    Args:
        system_length: how many tokens the system prompt has, at which the textual learner does not look.
        as_released: look at the system prompt where a row has no image, as the authors' code does.
        base: of the learners' rotary positions; by default they have the decoder's. In the authors' code they lack the
            stretch of Llama 3.1.
    """

    def __init__(self, system_length: int = 0, *, as_released: bool = False, base: float | int | None = None):
        check_whole(system_length=system_length)
        if system_length < 0:
            raise ValueError(f"system_length must be at least 0, got {system_length}")
        self.system_length, self.as_released = system_length, as_released
        self.rotary = None if base is None else RotaryPositions(base)

    def __call__(self, context: Context) -> Streams:
        x, seen = context.inputs, context.seen
        places = torch.arange(seen + x.shape[1], device=x.device)[None]
        # Padding of earlier readings lies between the tokens of a row; the text goes on without it.
        numbers = places if context.keys is None else (context.keys.cumsum(dim=1) - 1).clamp(min=0)
        here = numbers[:, seen:].expand(x.shape[:2])
        turns = context.angles
        if self.rotary is not None:
            turns = self.rotary.angles(here, 2 * turns[0].shape[-1], x.dtype)
        words = here >= self.system_length
        if context.mask is not None:
            words = words & context.mask
        if context.images is None:
            if self.as_released:
                words = context.mask if context.mask is not None else torch.ones_like(words)
            start = 0 if self.as_released or context.keys is not None else max(0, self.system_length - seen)
            textual = None
            if start < x.shape[1]:
                rows = torch.arange(start, x.shape[1], device=x.device).expand(x.shape[0], -1)
                textual = _gather(x, turns, words, rows)
            return Streams(None, textual, turns, numbers)
        images = context.images if context.mask is None else context.images & context.mask
        if self.as_released:
            words = words | (~images.any(dim=1, keepdim=True) & (here >= 0))
            words = words if context.mask is None else words & context.mask
        return Streams(_gather(x, turns, images), _gather(x, turns, words & ~images), turns, numbers)


def _gather(x: Tensor, turns: Turns, flags: Tensor, places: Tensor | None = None) -> Gathered | None:
    """The tokens that are flagged, those of each row one after the other; None where there is none.

    Args:
        x, turns: of all tokens.
        flags: True where a token is of the kind.
        places: of all tokens from a first one on, where those before it are not flagged: nothing then depends on what
            a device holds. By default the flagged ones are looked for.
    """
    looked_for = places is None
    if places is None:
        count = int(flags.sum(dim=1).max()) if flags.numel() else 0
        if not count:
            return None
        places = (~flags).int().argsort(dim=1, stable=True)[:, :count]
    there = flags.gather(1, places)
    features = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
    index = places[:, None, :, None]
    cos, sin = (
        part.expand(places.shape[0], -1, -1, -1).gather(2, index.expand(-1, -1, -1, part.shape[3])) for part in turns
    )
    order = there.cumsum(dim=1) - 1
    # Places rise along a row, so what a row needs up to an end are its first.
    length, count = x.shape[1], places.shape[1]
    ends = range(ROWS, length + ROWS, ROWS)
    if looked_for:
        before = (there[..., None] & (places[..., None] < torch.tensor(ends, device=x.device))).sum(dim=1).amax(dim=0)
        *reach, missing = torch.cat([before, (~there).sum()[None]]).tolist()  # one transfer from a device
    else:
        reach, missing = [min(max(0, end - length + count), count) for end in ends], True
    features = features.masked_fill(~there[..., None], 0)
    return Gathered(features, places, order, there, (cos, sin), not missing, tuple(reach))


class LearnerState(NamedTuple):
    """What a learner keeps: keys and values, and which of them are there in each row."""

    cache: KVCache
    there: Bool[Tensor, "batch kept"]


class WingsState(NamedTuple):
    """What a layer keeps of the tokens so far; the visual learner's part grows with images alone."""

    main: KVCache
    visual: LearnerState
    textual: LearnerState


class WingsBlock(nn.Module):
    """A decoder's layer with learners beside its attention.

    Args:
        block: whose norms, attention and feed-forward part it takes over.
        rank: r of the learners.
        max_len: of the router.
        learners: "both", or one alone: "visual" in the first stage.
        routing: "attention", or "fixed" for a half each.
        activation: of the router.
        query: what the learners ask with: the stream after the main attention ("sequential", the authors' code), or
            before it ("parallel", equation 5).
        as_released: as the authors' code computes: twice the weighted sum where both learners answer, and a textual
            learner that sees words to come behind an image. It serves their weights.

    Shapes: (batch, tokens, dim) to the same, with a `Context` whose `shared` is `SplitStreams`'.
    """

    def __init__(
        self,
        block: DecoderBlock,
        *,
        rank: int = 64,
        max_len: int = 4096,
        learners: Learners = "both",
        routing: Routing = "attention",
        activation: Literal["silu", "none"] = "silu",
        query: Query = "sequential",
        as_released: bool = False,
    ):
        super().__init__()
        for name, value, kind in (
            ("learners", learners, Learners),
            ("routing", routing, Routing),
            ("query", query, Query),
        ):
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
        attention = block.attention
        dim = attention.query.in_features
        if attention.heads * attention.head_dim != dim:
            raise ValueError(
                f"learners have the model's heads in its width, got {attention.heads} heads of {attention.head_dim} in "
                f"a width of {dim}"
            )
        self.routing, self.query, self.as_released = routing, query, as_released
        self.max_len, self.activation = max_len, activation  # of the router that a second stage may bring
        self.norm1, self.attention, self.norm2, self.feedforward = (
            block.norm1,
            attention,
            block.norm2,
            block.feedforward,
        )
        heads = attention.heads
        self.visual = None if learners == "textual" else LowRankResidualAttention(dim, heads, rank)
        self.textual = None if learners == "visual" else LowRankResidualAttention(dim, heads, rank)
        routed = learners == "both" and routing == "attention"
        self.router = AttentionRouter(max_len, activation=activation) if routed else None

    def init_state(self, batch: int) -> WingsState:
        """Empty caches for `batch` streams."""
        attention = self.attention
        weight = attention.key.weight
        # Zeros, not what lies in memory: a check for finite answers looks at the room that is not filled yet, too.
        keys = weight.new_zeros(batch, attention.kv_heads, 16, attention.head_dim)
        one = weight.new_empty(batch, attention.heads, 0, attention.head_dim)
        none = LearnerState(
            KVCache(one, torch.empty_like(one), 0), torch.zeros(batch, 0, dtype=torch.bool, device=weight.device)
        )
        return WingsState(KVCache(keys, torch.zeros_like(keys), 0), none, none)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], context: Context, state: WingsState | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], WingsState | None]:
        """The outputs, and the state with these tokens read; None for None."""
        streams = context.shared
        if not isinstance(streams, Streams):
            raise ValueError("the decoder's `sharing` must be a SplitStreams: `attach` sets it")
        has_images = _has_images(streams.visual, state)
        attended, weights, main = self._attention(self.norm1(x), context, has_images is not None, state)
        h = x + attended
        asking = x if self.query == "parallel" else h
        before = (None, None) if state is None else (state.visual, state.textual)
        visual, seen = self._look(self.visual, asking, context, streams.visual, before[0])
        textual, said = self._look(self.textual, asking, context, streams.textual, before[1], True)
        if main is not None and seen is not None and said is not None:
            state = WingsState(main, seen, said)
        h = self._add(h, visual, textual, weights, has_images)
        return h + self.feedforward(self.norm2(h)), state

    def _add(
        self,
        h: Tensor,
        visual: Tensor | None,
        textual: Tensor | None,
        weights: Tensor | None,
        has_images: Tensor | None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """h + ρ_0 · visual + ρ_1 · textual in rows with an image; without one the textual learner has the weight 1."""
        if self.visual is not None and self.textual is not None and has_images is not None:
            if weights is None:
                weights = h.new_full((1, 1, 2), 0.5)
            weights = weights.to(h.dtype) * (2 if self.as_released else 1)
            weights = torch.where(has_images[:, None, None], weights, weights.new_tensor([0.0, 1.0]))
            parts = zip(weights.split(1, dim=-1), (visual, textual))
            return sum((weight * part for weight, part in parts if part is not None), h)
        return sum((part for part in (visual, textual) if part is not None), h)

    def _attention(
        self, x: Tensor, context: Context, routed: bool, state: WingsState | None
    ) -> tuple[Tensor, Tensor | None, KVCache | None]:
        """The main attention, the router's weights where they are needed, and the cache."""
        attention = self.attention
        if self.router is None or not routed:
            y, cache = attention(x, context, state and state.main)
            return y, None, cache
        q, k, v = attention.project(x, context)
        cache = None
        if state is not None:
            cache = state.main.append(k, v)
            k, v = cache.keys[:, :, : cache.length], cache.values[:, :, : cache.length]
        numbers = context.shared.numbers
        if k.shape[2] > self.router.max_len and (longest := int(numbers.max()) + 1) > self.router.max_len:
            raise UserError(
                f"the text has {longest} tokens, the router's max_len is {self.router.max_len}: shorten the text, "
                "take smaller pictures, or give learners a larger max_len"
            )
        width = v.shape[-1]
        columns = self.router.columns(numbers).to(v.dtype)[:, None]
        # All of one width, as fused kernels ask: zeros in queries and keys change no score.
        columns = F.pad(columns, (0, PAD - 2)).expand(v.shape[0], v.shape[1], -1, -1)
        y = attention.attend(
            F.pad(q, (0, PAD)), F.pad(k, (0, PAD)), torch.cat([v, columns], dim=-1), context, scale=width**-0.5
        )
        sums = y[..., width : width + 2].to(torch.promote_types(y.dtype, torch.float32)).sum(dim=1)
        return attention.out(y[..., :width].transpose(1, 2).flatten(2)), self.router.weigh(sums), cache

    def _look(
        self,
        learner: LowRankResidualAttention | None,
        x: Tensor,
        context: Context,
        tokens: Gathered | None,
        state: LearnerState | None,
        causal: bool = False,
    ) -> tuple[Tensor | None, LearnerState | None]:
        """What the tokens gather from images or words, those that were read before too."""
        if learner is None:
            return None, state
        before = 0 if state is None else state.cache.length
        keys: tuple[Tensor, Tensor] | None = None
        there = None if tokens is None else tokens.there
        if tokens is not None:
            keys = learner.keys_and_values(tokens.features, tokens.turns)
            if state is not None:
                cache, there = state.cache.append(*keys), torch.cat([state.there, tokens.there], dim=1)
                state, keys = (
                    LearnerState(cache, there),
                    (cache.keys[:, :, : cache.length], cache.values[:, :, : cache.length]),
                )
        elif state is not None and before:
            keys, there = (state.cache.keys[:, :, :before], state.cache.values[:, :, :before]), state.there
        if keys is None or there is None:
            return None, state

        visible: Callable[[int, int], Tensor] | None = partial(_visible, there, None, None)
        if causal and tokens is not None:
            # The authors' mask counts words where it means places: behind an image it shows words to come.
            at, reach = (tokens.order, None) if self.as_released else (tokens.places, tokens.reach)
            visible = partial(_visible, there, at, reach)
        elif tokens is not None and tokens.whole and there is tokens.there:
            visible = None
        return learner.attend(learner.queries(x, context.shared.turns), *keys, visible), state


def _visible(there: Tensor, at: Tensor | None, reach: tuple[int, ...] | None, start: int, end: int) -> Tensor:
    """Which of the first keys the queries from `start` up to `end` may attend to: (batch, queries or 1, first keys).

    Args:
        there: which keys are there.
        at: places of the last keys; those before them were read earlier. None where places do not matter.
        reach: how many of the last keys each `ROWS` queries can see. Default: all.
        start, end: of the queries.
    """
    if at is None:
        return there[:, None]
    before = there.shape[1] - at.shape[1]
    count = at.shape[1] if reach is None else reach[start // ROWS]
    if not before + count:
        return there.new_zeros(1, 1, 1)  # one key that none sees: a softmax over none is NaN
    queries = torch.arange(start, end, device=there.device)[:, None]
    come = F.pad(at[:, None, :count] <= queries, (before, 0), value=True)
    return there[:, None, : before + count] & come


def _has_images(visual: Gathered | None, state: WingsState | None) -> Bool[Tensor, " batch"] | None:
    """In which rows an image was read; None where in none."""
    now = None if visual is None else visual.there.any(dim=1)
    if state is None or not state.visual.there.shape[1]:
        return now
    before = state.visual.there.any(dim=1)
    return before if now is None else before | now


def learner_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What `attach` added, by name."""
    added: dict[str, Any] = {}
    for name, block in module.named_modules():
        if isinstance(block, WingsBlock):
            for part in ("visual", "textual", "router"):
                child = getattr(block, part)
                if child is not None:
                    added |= {f"{name}.{part}.{key}": value for key, value in child.named_parameters()}
    return added
