"""A causal decoder in the layout of Llama and Qwen2, which reads vectors and not tokens alone.

transformers has these models, and they are ours only for what a mechanism must reach into:

- The attention of a layer is a module of five lines, with its queries, keys and values at hand. A block takes another
  module in its place, and another block takes its place in `blocks`, with a state of its own.
- The input of each layer can be kept. The attention weights of a layer are computed from it when somebody asks, for the
  queries that are asked for. No pass builds a matrix of tokens × tokens.
- Vectors of images stand anywhere among those of words, and positions may have three axes.
- Padding stands behind the tokens inside, wherever it stood before. So the fused kernel's causal mask serves batches of
  ragged rows, and a row gets what it gets alone.

The feed-forward part, sampling, the cache and the fused attention are those of the other models here. Files, tokenizers
and towers for images are transformers': see `provenn.huggingface`.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from provenn.core.errors import UserError
from provenn.nn.arguments import check_whole
from provenn.nn.attention import KVCache, check_mask, hide_tokens, pack, packed_positions, split_heads, unpack
from provenn.nn.language import SwiGLU, sample
from provenn.nn.positions import turn
from provenn.nn.streaming import MixerState, state_bytes
from provenn.ops.softmax_attention import softmax_attention

ROWS = 256  # queries that see a cache and each other at a time: their mask has a row for each


class Stretch(NamedTuple):
    """How Llama 3.1 reads texts that are longer than those it was pretrained on.

    Waves longer than `original / low` positions become `factor` times longer, those shorter than `original / high`
    stay, and between them the rates are mixed.
    """

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True)
class RotaryPositions:
    """Rotary positions of one axis or of three (M-RoPE; Wang et al., 2024, Qwen2-VL, arXiv:2409.12191, section 2.1).

    The pair j of a head is turned by p · base^(−2j/head_dim). With sections, p is the position in time for the first
    pairs, in rows for the next, and in columns for the last. A text has the same position on all three axes, and so the
    rotation of one axis.

    Args:
        base: of the wave lengths.
        sections: how many pairs each of the three axes turns; in all head_dim / 2.
        stretch: of the wave lengths.
    """

    base: float | int = 10_000.0
    sections: tuple[int, int, int] | None = None
    stretch: Stretch | None = None

    def rates(self, head_dim: int, device: torch.device | None = None) -> Float[Tensor, " half"]:
        """The angle of each pair at position 1, in float32 as pretrained models have it.

        >>> RotaryPositions(base=100.0).rates(4).tolist()
        [1.0, 0.10000000149011612]
        """
        rates = 1 / self.base ** (torch.arange(0, head_dim, 2, dtype=torch.float, device=device) / head_dim)
        if self.stretch is None:
            return rates
        factor, low, high, original = self.stretch
        share = ((original * rates / (2 * math.pi) - low) / (high - low)).clamp(0, 1)  # 1 where a wave stays
        return share * rates + (1 - share) * rates / factor

    def angles(
        self, positions: Int[Tensor, "*axes batch tokens"], head_dim: int, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "batch 1 tokens half"], Float[Tensor, "batch 1 tokens half"]]:
        """Cosines and sines for `provenn.nn.positions.turn`, in float32 at least."""
        # In float64 up to the remainder: of a position of 10⁵, float32 leaves two digits of the angle.
        angles = positions.double().unsqueeze(-1) * self.rates(head_dim, positions.device).double()
        if positions.dim() == 3:
            if self.sections is None:
                raise ValueError("positions of three axes need sections, how many pairs each axis turns")
            angles = torch.cat([part[axis] for axis, part in enumerate(angles.split(self.sections, dim=-1))], dim=-1)
        angles = angles.remainder(2 * math.pi).to(torch.promote_types(dtype, torch.float32)).unsqueeze(1)
        return angles.cos(), angles.sin()


class Context(NamedTuple):
    """What every block knows of the tokens that it reads, besides their vectors. A row's padding stands at its end.

    Args:
        inputs: the vectors that the first block reads.
        angles: cosines and sines of the tokens' positions.
        mask: True where a token is no padding; None where none is.
        images: True where a token is one of an image; None where none is.
        seen: how many places the cache has filled before.
        keys: which of these places, and then of the tokens, hold no padding; None where all do, or nothing is cached.
        shared: what `Decoder.sharing` made of the rest, once for all blocks.
    """

    inputs: Float[Tensor, "batch tokens dim"]
    angles: tuple[Tensor, Tensor]
    mask: Bool[Tensor, "batch tokens"] | None = None
    images: Bool[Tensor, "batch tokens"] | None = None
    seen: int = 0
    keys: Bool[Tensor, "batch keys"] | None = None
    shared: Any = None

    def visible(self, start: int, end: int) -> Bool[Tensor, "rows 1 queries keys"]:
        """`visible_keys` of these tokens."""
        return visible_keys(self, start, end)


def visible_keys(context: Context, start: int, end: int) -> Bool[Tensor, "rows 1 queries keys"]:
    """Which keys, those of the cache first, each of the tokens from `start` up to `end` may attend to.

    It is no method, since torch.compile follows none of a tuple that it sees made.
    """
    device, upto = context.inputs.device, context.seen + end
    queries = context.seen + torch.arange(start, end, device=device)
    visible = (torch.arange(upto, device=device) <= queries[:, None])[None, None]
    return visible if context.keys is None else visible & context.keys[:, None, None, :upto]


class DecoderAttention(nn.Module):
    """Causal attention whose keys and values are shared by groups of heads (Ainslie et al., 2023, arXiv:2305.13245).

    y_i = W_o [Σ_j≤i softmax_j(q_i·k_j / √p) v_j], queries and keys turned by their positions.

    Args:
        dim: D, width of a token.
        heads: H, heads of queries.
        kv_heads: G, heads of keys and values, which divide H; by default H.
        head_dim: p; by default D / H.
        bias: of the maps of queries, keys and values.
        out_bias: of W_o.

    Shapes: (batch, tokens, dim) to the same. Parameters: D · p · (2H + 2G), and p · (H + 2G) and D with biases.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
    ):
        check_whole(dim=dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if dim < 1 or heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, both at least 1, got {kv_heads} and {heads}")
        if head_dim is None and dim % heads:
            raise ValueError(f"heads must divide dim where no head_dim is given, got dim={dim} and heads={heads}")
        head_dim = dim // heads if head_dim is None else head_dim
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, got {head_dim}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.query = nn.Linear(dim, heads * head_dim, bias=bias)
        self.key = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, dim, bias=out_bias)

    def project(
        self, x: Float[Tensor, "batch tokens dim"], context: Context
    ) -> tuple[
        Float[Tensor, "batch heads tokens head_dim"],
        Float[Tensor, "batch kv_heads tokens head_dim"],
        Float[Tensor, "batch kv_heads tokens head_dim"],
    ]:
        """Queries and keys, turned, and values."""
        # Padding may hold anything, and a weight of 0 times NaN is NaN.
        seen = hide_tokens(x, context.mask)
        q = split_heads(self.query(x), self.heads)
        k, v = (split_heads(part(seen), self.kv_heads) for part in (self.key, self.value))
        return turn(q, *context.angles), turn(k, *context.angles), v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, *, scale: float | None = None
    ) -> Float[Tensor, "batch heads tokens width"]:
        """Fused causal attention to the cache's keys and the tokens' own; the values may have any width.

        `scale` is the factor of the scores, by default 1/√p.
        """
        groups = self.heads // k.shape[1]
        if q.shape[2] == 1:
            # One token sees all that came: the heads of a group are queries of one head, and no key is copied.
            mask = None if context.keys is None else context.keys[:, None, None]
            q = q.unflatten(1, (-1, groups)).squeeze(3)
            return softmax_attention(q, k, v, mask=mask, scale=scale).flatten(1, 2)[:, :, None]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        if not context.seen:
            return softmax_attention(q, k, v, causal=True, scale=scale)
        # `is_causal` aligns the triangle to the first key. A mask of some rows at a time grows with the keys alone.
        parts = []
        for start in range(0, q.shape[2], ROWS):
            end = min(start + ROWS, q.shape[2])
            upto = context.seen + end
            mask = context.visible(start, end)
            part = softmax_attention(q[:, :, start:end], k[:, :, :upto], v[:, :, :upto], mask=mask, scale=scale)
            parts.append(part)
        return torch.cat(parts, dim=2)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], context: Context, cache: KVCache | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], KVCache | None]:
        """The outputs, and the cache with these tokens at its end."""
        q, k, v = self.project(x, context)
        if cache is not None:
            cache = cache.append(k, v)
            k, v = cache.keys[:, :, : cache.length], cache.values[:, :, : cache.length]
        y = self.attend(q, k, v, context)
        return self.out(y.transpose(1, 2).flatten(2)), cache

    def weights(
        self, x: Float[Tensor, "batch tokens dim"], context: Context, rows: Int[Tensor, "batch queries"]
    ) -> Float[Tensor, "batch heads queries tokens"]:
        """softmax_j(q_i·k_j / √p) of some tokens i, the softmax in float32 at least: what `attend` never holds."""
        q, k, _ = self.project(x, context)
        q = q.gather(2, rows[:, None, :, None].expand(-1, self.heads, -1, self.head_dim))
        scores = q @ k.repeat_interleave(self.heads // self.kv_heads, dim=1).mT * self.head_dim**-0.5
        later = torch.arange(k.shape[2], device=x.device) > rows[:, None, :, None]
        scores = scores.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(later, -torch.inf)
        return scores.softmax(dim=-1)


class DecoderBlock(nn.Module):
    """x ← x + attention(norm(x)); x ← x + feedforward(norm(x)), with RMSNorm.

    A block of another kind has the same two methods. Its state may hold more than its attention's.

    Shapes: (batch, tokens, dim) to the same.
    """

    def __init__(self, dim: int, attention: DecoderAttention, feedforward: nn.Module, *, eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=eps)
        self.attention = attention
        self.norm2 = nn.RMSNorm(dim, eps=eps)
        self.feedforward = feedforward

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], context: Context, state: MixerState = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], MixerState]:
        """The outputs, and the state with these tokens read; None for None."""
        attended, state = self.attention(self.norm1(x), context, state)
        x = x + attended
        return x + self.feedforward(self.norm2(x)), state

    def init_state(self, batch: int) -> MixerState:
        """An empty cache for `batch` streams."""
        # Room for 16 tokens, of zeros: blocks hand their states out, and what is handed out is checked to be finite.
        keys = self.attention.key.weight.new_zeros(batch, self.attention.kv_heads, 16, self.attention.head_dim)
        return KVCache(keys, torch.zeros_like(keys), 0)


class DecoderState(NamedTuple):
    """What a decoder keeps of the tokens so far. Written in place: for inference.

    Args:
        layers: the states of the blocks.
        seen: how many places of each cache are filled.
        visible: which of them hold tokens and no padding; None where all do.
        next_positions: the position of each row's next token.
    """

    layers: tuple[MixerState, ...]
    seen: int
    visible: Bool[Tensor, "batch seen"] | None
    next_positions: Int[Tensor, " batch"]

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return state_bytes(self.layers)


class Reading(NamedTuple):
    """What a decoder made of vectors that it read, in their order.

    Args:
        hidden: after the last norm; logits are `decoder.logits(hidden)`.
        layers: what each block read, and what the last gave; empty where nobody asked.
        context: what the blocks knew, each row's padding at its end.
        order: where each token stands in `context`; None where it stands in its own place.
        state: from which it reads on; None where nobody asked.
    """

    hidden: Float[Tensor, "batch tokens dim"]
    layers: tuple[Float[Tensor, "batch tokens dim"], ...]
    context: Context
    order: Int[Tensor, "batch tokens"] | None
    state: DecoderState | None

    @property
    def last(self) -> Float[Tensor, "batch dim"]:
        """`hidden` of each row's last token."""
        if self.order is None or self.context.mask is None:
            return self.hidden[:, -1]
        last = self.context.mask.sum(dim=1, keepdim=True) - 1
        return self.hidden[torch.arange(len(last), device=last.device), (self.order == last).int().argmax(dim=1)]


class Decoder(nn.Module):
    """A causal language model: embed, blocks of attention and SwiGLU, norm, logits.

    Args:
        vocab: how many tokens there are.
        dim: width of the stream.
        layers: how many blocks.
        heads, kv_heads, head_dim, bias, out_bias: as in `DecoderAttention`.
        hidden: width inside the feed-forward part; by default that of `SwiGLU`.
        rotary: the positions.
        tied: whether the logits use the embedding's matrix.
        eps: of the norms.
        max_length: longer texts are refused, where given.
        checkpointing: whether blocks compute their activations again for the gradient, in training, instead of keeping
            them.

    Shapes: tokens (batch, tokens) to logits (batch, tokens, vocab). Weights start as N(0, 0.02²), biases at 0; see
    `provenn.nn.language.init_narrow` for models of some tens of channels.

    >>> model = Decoder(vocab=256, dim=32, layers=2, heads=4, kv_heads=2)
    >>> model(torch.zeros(1, 5, dtype=torch.long)).shape
    torch.Size([1, 5, 256])
    """

    origin: Any = None  # the configuration that it was loaded with, of another library
    sharing: Callable[[Context], Any] | None = None  # makes what a mechanism's blocks share, once for each reading

    def __init__(
        self,
        vocab: int,
        dim: int,
        layers: int,
        heads: int,
        *,
        hidden: int | None = None,
        rotary: RotaryPositions = RotaryPositions(),  # it is frozen
        tied: bool = True,
        eps: float = 1e-6,
        max_length: int | None = None,
        checkpointing: bool = False,
        **attention: Any,
    ):
        check_whole(vocab=vocab, dim=dim, layers=layers, hidden=hidden, max_length=max_length)
        super().__init__()
        for name, value in (("vocab", vocab), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.rotary, self.max_length, self.checkpointing = rotary, max_length, checkpointing
        self.embed = nn.Embedding(vocab, dim)
        # Any: torch types what a list holds as modules without `init_state`.
        self.blocks: Any = nn.ModuleList(
            DecoderBlock(dim, DecoderAttention(dim, heads, **attention), SwiGLU(dim, hidden), eps=eps)
            for _ in range(layers)
        )
        self.norm = nn.RMSNorm(dim, eps=eps)
        self.head = None if tied else nn.Linear(dim, vocab, bias=False)
        first: Any = self.blocks[0]  # torch types what a list holds, as above
        self.head_dim: int = first.attention.head_dim
        if rotary.sections is not None and 2 * sum(rotary.sections) != self.head_dim:
            raise ValueError(f"sections must sum to half a head's width, {self.head_dim // 2}, got {rotary.sections}")
        self.apply(_initialise)

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """From vectors after the last norm."""
        # Tied by use and not by a shared parameter, so that a checkpoint holds one tensor.
        return F.linear(hidden, self.embed.weight if self.head is None else self.head.weight)

    def forward(
        self, tokens: Int[Tensor, "batch tokens"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens vocab"]:
        """`mask` is True where a token is no padding."""
        return self.logits(self.read(self.embed(tokens), mask=mask).hidden)

    def read(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "*axes batch tokens"] | None = None,
        images: Bool[Tensor, "batch tokens"] | None = None,
        state: DecoderState | None = None,
        layers: bool = False,
        sharing: Callable[[Context], Any] | None = None,
    ) -> Reading:
        """Read vectors of tokens, wherever they come from.

        Args:
            x: of words (`embed`) and of whatever else.
            mask: True where a token is no padding; padding changes nothing, wherever it stands.
            positions: of one axis or of three; by default each token's number among the tokens of its row, after those
                of `state`.
            images: True where a token is one of an image: for blocks that ask.
            state: what was read before, `init_state` at first; None where nothing is to be kept.
            layers: whether to keep what each block read.
            sharing: makes what blocks share in this reading. Default: the decoder's own.

        Raises:
            UserError: no token, or more than `max_length`.
        """
        check_mask(mask, x)
        if not x.shape[1]:
            raise UserError("the sequence has no token: expected at least one")
        seen = 0 if state is None else state.seen
        if self.max_length is not None and seen + x.shape[1] > self.max_length:
            raise UserError(
                f"the sequence has {seen + x.shape[1]} tokens, more than the model's {self.max_length}: shorten it"
            )
        order = None if mask is None else packed_positions(mask)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device) if order is None else order
            positions = positions.expand(x.shape[:2])
            if state is not None:
                positions = positions + state.next_positions[:, None]
        after = _next_positions(positions, mask)
        if order is not None and mask is not None:
            x, mask, images = pack(x, order), pack(mask, order), None if images is None else pack(images, order)
            axes = (positions if positions.dim() == 3 else positions[None]).unbind()
            positions = torch.stack([pack(axis, order) for axis in axes]).reshape(positions.shape)
        angles = self.rotary.angles(positions, self.head_dim, x.dtype)
        keys = None if state is None else _joined(state, mask, x)
        context = Context(x, angles, mask, images, seen, keys)
        sharing = self.sharing if sharing is None else sharing
        if sharing is not None:
            context = context._replace(shared=sharing(context))
        x, between, states = self._blocks(x, context, state, layers)
        if order is not None:
            between = [unpack(layer, order) for layer in between]
        hidden = self.norm(x if order is None else unpack(x, order))
        if state is not None:
            state = DecoderState(tuple(states), seen + x.shape[1], keys, after)
        return Reading(hidden, tuple(between), context, order, state)

    def _blocks(
        self, x: Tensor, context: Context, state: DecoderState | None, layers: bool
    ) -> tuple[Tensor, list[Tensor], list[MixerState]]:
        between, states = [], []
        for index, block in enumerate(self.blocks):
            if layers:
                between.append(x)
            if state is not None:
                x, after = block(x, context, state.layers[index])
                states.append(after)
            elif self.checkpointing and self.training and torch.is_grad_enabled():
                x, _ = checkpoint(block, x, context, use_reentrant=False)
            else:
                x, _ = block(x, context)
        return x, [*between, x] if layers else [], states

    def attention_weights(
        self, reading: Reading, layer: int, queries: Int[Tensor, " queries"] | None = None
    ) -> Float[Tensor, "batch heads queries tokens"]:
        """How much tokens attend to each token in a layer, from a reading that kept its layers and had no past.

        Args:
            reading: of `read` with layers=True.
            layer: the number of the block, from 0.
            queries: the tokens that attend, by default all; of padding the weights are 0.

        Raises:
            ValueError: the reading kept no layers, or goes on from a state.
        """
        if not reading.layers or reading.context.seen:
            raise ValueError("attention weights need a reading with layers=True that begins at the first token")
        x, order = reading.layers[layer], reading.order
        batch, tokens = x.shape[:2]
        queries = torch.arange(tokens, device=x.device) if queries is None else queries
        block = self.blocks[layer]
        if order is None:
            return block.attention.weights(block.norm1(x), reading.context, queries.expand(batch, -1))
        rows = order[:, queries]
        weights = block.attention.weights(block.norm1(pack(x, order)), reading.context, rows)
        weights = weights.gather(-1, order[:, None, None].expand_as(weights))
        return weights.masked_fill(~reading.context.mask.gather(1, rows)[:, None, :, None], 0)  # type: ignore[union-attr]  # a mask made the order

    def init_state(self, batch: int) -> DecoderState:
        """The state of `batch` rows before their first token."""
        positions = torch.zeros(batch, dtype=torch.long, device=self.embed.weight.device)
        return DecoderState(tuple(block.init_state(batch) for block in self.blocks), 0, None, positions)

    def prefill(
        self,
        tokens: Int[Tensor, "batch tokens"],
        state: DecoderState | None = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens vocab"], DecoderState]:
        """Many tokens at once: the logits, and the state from which `step` goes on."""
        state = self.init_state(len(tokens)) if state is None else state
        reading = self.read(self.embed(tokens), mask=mask, state=state)
        return self.logits(reading.hidden), cast(DecoderState, reading.state)

    def step(
        self, token: Int[Tensor, " batch"], state: DecoderState
    ) -> tuple[Float[Tensor, "batch vocab"], DecoderState]:
        """One token more."""
        logits, state = self.prefill(token[:, None], state)
        return logits[:, 0], state

    def generate(
        self,
        prompt: Int[Tensor, "batch tokens"],
        count: int,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        ends: Collection[int] = (),
        **draw: Any,
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Tokens that follow each row's prompt, one at a time as they come: `continue_reading` of the prompts."""
        with torch.no_grad():
            reading = self.read(self.embed(prompt), mask=mask, state=self.init_state(len(prompt)))
        return self.continue_reading(reading, count, ends=ends, **draw)

    @torch.no_grad()
    def continue_reading(
        self, reading: Reading, count: int, *, ends: Collection[int] = (), **draw: Any
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Tokens that follow what was read with a state. Each row gets what it gets alone, whatever its batch.

        Args:
            reading: of `read` with a state.
            count: how many tokens to draw at most.
            ends: tokens that end a row. An ended row repeats its last token, and the last row's end ends all.
            draw: `temperature` (0 takes the likeliest), `top_k`, `top_p` and `generator`, as in
                `provenn.nn.language.sample`. Several generators serve a row each, so that its draws are its own.

        Raises:
            ValueError: a reading without a state, or a setting of the draw that is out of range.
            UserError: a row of padding alone.
        """
        state, hidden, mask = reading.state, reading.last, reading.context.mask
        if state is None:
            raise ValueError("the reading kept no state: read with state=decoder.init_state(batch)")
        if mask is not None and not mask.any(dim=1).all():
            empty = int(mask.any(dim=1).int().argmin()) + 1
            raise UserError(f"row {empty} of the batch has no token to go on from: leave it out")
        ended = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        stops = torch.tensor(sorted(ends), dtype=torch.long, device=hidden.device)
        token = None
        for i in range(count):
            drawn = _draw(self.logits(hidden), **draw)
            token = drawn if token is None else torch.where(ended, token, drawn)
            yield token
            ended = ended | torch.isin(token, stops)
            if i + 1 == count or (len(stops) and bool(ended.all())):
                return  # nobody asks for what follows
            reading = self.read(self.embed(token[:, None]), state=state)
            state, hidden = reading.state, reading.last


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _next_positions(positions: Tensor, mask: Tensor | None) -> Int[Tensor, " batch"]:
    """One more than the largest position of each row, on any axis."""
    last = positions if mask is None else positions.masked_fill(~mask, -1)
    return (last if last.dim() == 3 else last[None]).amax(dim=(0, 2)) + 1


def _joined(state: DecoderState, mask: Tensor | None, x: Tensor) -> Bool[Tensor, "batch keys"] | None:
    """Which places of the cache hold tokens and no padding, once those of x are in it."""
    if mask is None and state.visible is None:
        return None
    past = x.new_ones(len(x), state.seen, dtype=torch.bool) if state.visible is None else state.visible
    return torch.cat([past, x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask], dim=1)


def _draw(logits: Tensor, *, generator: Any = None, **draw: Any) -> Int[Tensor, " batch"]:
    if isinstance(generator, Sequence):
        rows = zip(logits.split(1), generator, strict=True)
        return torch.cat([sample(row, generator=own, **draw) for row, own in rows])
    return sample(logits, generator=generator, **draw)
