"""A decoder in the parts that two residual streams share, of this library or of Hugging Face's.

A decoder is taken apart and not replaced: it keeps its own weights and its own forward pass, and what is computed here
of its slow stream is what that pass computes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from provenn.core.errors import UserError
from provenn.core.narrowing import present
from provenn.nn.attention import SlidingWindowAttention, SoftmaxAttention, split_heads
from provenn.nn.language import CausalLM, PreNormBlock
from provenn.nn.positions import rotation, sinusoidal_encoding, turn

Map = Callable[[Tensor], Tensor]
Host = (
    Any  # a model or module of transformers, which papers may not import: its attributes are checked where it is read
)


def as_fixed(module: nn.Module) -> Map:
    """The module as a function of its input alone: gradients pass through it, and none reaches its parameters."""

    def call(x: Tensor) -> Tensor:
        return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, (x,))

    return call


def as_it_is(module: nn.Module) -> Map:
    """The module itself, through which gradients reach its parameters."""
    return module


@dataclass(frozen=True)
class Positions:
    """The positions of tokens in their texts, and how queries and keys are turned there.

    Args:
        start, count: the tokens stand at start, …, start + count − 1 in every text.
        index: (batch, tokens), where texts differ; `start` is then not used.
        end: one more than the last position.
        turns: cosines and sines of these positions, for rotary embeddings.
    """

    start: int
    count: int
    end: int
    index: Tensor | None = None
    turns: tuple[Tensor, Tensor] | None = None

    def numbers(self, device: torch.device) -> Tensor:
        """The positions, (tokens,), or (batch, tokens) where texts differ."""
        return torch.arange(self.start, self.start + self.count, device=device) if self.index is None else self.index

    def visible(self, window: int | None, device: torch.device) -> Tensor:
        """True where the token at a position may see a key, of keys 0 to end − 1."""
        rows = self.numbers(device)[..., None]
        rows = rows if self.index is None else rows[:, None]
        keys = torch.arange(self.end, device=device)
        seen = keys <= rows
        return seen if window is None else seen & (keys > rows - window)


class Cache:
    """Keys and values of the slow stream, a pair a layer, each where its token stands.

    Entries are indexed by the token's position, and a query sees the positions up to its own. So nothing has to be
    undone when drafts are refused. Their entries lie behind the last token, are seen by nobody and are overwritten.
    Tensors are written in place: for inference only.
    """

    def __init__(self, layers: int):
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def write(self, layer: int, keys: Tensor, values: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Write the entries of new tokens at their positions; returns those of all positions up to the last one."""
        stored, stored_values = self.keys[layer], self.values[layer]
        capacity = 0 if stored is None else stored.shape[2]
        if stored is None or stored_values is None or positions.end > capacity:
            # Doubling copies each token about once in all.
            size = max(positions.end, 2 * capacity, 16)
            grown = keys.new_zeros(*keys.shape[:2], size, keys.shape[3])
            grown_values = torch.zeros_like(grown)
            if stored is not None and stored_values is not None:
                grown[:, :, :capacity], grown_values[:, :, :capacity] = stored, stored_values
            self.keys[layer], self.values[layer] = stored, stored_values = grown, grown_values
        if positions.index is None:
            stop = positions.start + keys.shape[2]
            stored[:, :, positions.start : stop] = keys
            stored_values[:, :, positions.start : stop] = values
        else:
            rows = torch.arange(len(keys), device=keys.device)[:, None]
            stored[rows, :, positions.index] = keys.transpose(1, 2)
            stored_values[rows, :, positions.index] = values.transpose(1, 2)
        return stored[:, :, : positions.end], stored_values[:, :, : positions.end]

    def read(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions before `end`."""
        keys, values = present(self.keys[layer], "keys"), present(self.values[layer], "values")
        return keys[:, :, :end], values[:, :, :end]

    def nbytes(self, tokens: int) -> int:
        """Bytes of the first `tokens` positions, without the room to grow."""
        return sum(2 * keys[:, :, :tokens].numel() * keys.element_size() for keys in self.keys if keys is not None)


@dataclass(frozen=True)
class Layer:
    """One pre-norm layer: h ← h + out(attention(query, key, value of norm1(h))); h ← h + feedforward(norm2(h)).

    Args:
        norm1, query, key, value, out, norm2: its maps.
        feedforward: of what it is given, and of what its experts are chosen by, where it has any.
        heads, kv_heads: of queries, and of keys and values.
        scale: of the softmax.
        window: tokens that a token sees, itself included; None sees all.
    """

    norm1: Map
    query: Map
    key: Map
    value: Map
    out: Map
    norm2: Map
    feedforward: Callable[[Tensor, Tensor], Tensor]
    heads: int
    kv_heads: int
    scale: float | None = None
    window: int | None = None

    def queries(self, z: Tensor, positions: Positions) -> Tensor:
        """(batch, heads, tokens, head_dim), turned."""
        q = split_heads(self.query(z), self.heads)
        if positions.turns is None:
            return q
        # Two streams of one token are two rows at one position.
        return turn(q, *(part.expand(*part.shape[:-2], q.shape[2], -1) for part in positions.turns))

    def keys_and_values(self, z: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """(batch, kv_heads, tokens, head_dim) each, keys turned."""
        k, v = split_heads(self.key(z), self.kv_heads), split_heads(self.value(z), self.kv_heads)
        return (k if positions.turns is None else turn(k, *positions.turns)), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """softmax(q·k · scale) v over the keys that each position may see, before the map `out`."""
        shared: dict[str, Any] = {"scale": self.scale, "enable_gqa": self.kv_heads != self.heads}
        if positions.index is None and positions.count == 1:
            if self.window is not None and positions.end > self.window:
                k, v = k[:, :, -self.window :], v[:, :, -self.window :]
            # All rows are at one position, which sees every remaining key: no mask, so fused kernels serve.
            y = F.scaled_dot_product_attention(q, k, v, **shared)
        elif positions.index is None and positions.start == 0 and (self.window is None or positions.end <= self.window):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, **shared)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=positions.visible(self.window, q.device), **shared)
        return y.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Decoder:
    """A decoder in parts: embedding, layers, last norm, logits.

    Args:
        embed: tokens (batch, tokens) and their positions to (batch, tokens, dim).
        layers: its layers.
        norm, head: what makes logits of the last state.
        dim, vocab: widths of the stream and of the logits.
        max_length: the number of positions, where that is bounded.
        table: cosines and sines of the positions 0 to n − 1, for rotary embeddings.
    """

    embed: Callable[[Tensor, Positions], Tensor]
    layers: tuple[Layer, ...]
    norm: Map
    head: Map
    dim: int
    vocab: int
    max_length: int | None = None
    table: Callable[[int], tuple[Tensor, Tensor]] | None = None
    _turns: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def logits(self, x: Tensor) -> Tensor:
        """Of a state of either stream: the last norm and the head."""
        return self.head(self.norm(x))

    def positions(self, count: int, start: int | Tensor = 0) -> Positions:
        """The positions of `count` tokens from `start` on. `start` is one number, or (batch,) with one for each text.

        Raises:
            UserError: these are more positions than the decoder has.
        """
        index = None
        if isinstance(start, Tensor):
            first = start.tolist()
            if len(set(first)) == 1:
                start = int(first[0])
            else:
                index = start[:, None] + torch.arange(count, device=start.device)
                end = max(first) + count
        if not isinstance(start, Tensor):
            end = start + count
        if self.max_length is not None and end > self.max_length:
            raise UserError(
                f"the text has {end} tokens, but the model has positions for {self.max_length}: shorten the text"
            )
        turns = None
        if self.table is not None:
            if not self._turns or self._turns[0][0].shape[0] < end:
                # Computed once for many steps: doubling keeps the work linear.
                size = max(64, 2 * end) if self.max_length is None else min(max(64, 2 * end), self.max_length)
                self._turns[:] = [self.table(size)]
            cos, sin = self._turns[0]
            if index is None:
                if isinstance(start, Tensor):
                    raise ValueError("rows that begin at positions of their own need the index of each token")
                turns = cos[start:end], sin[start:end]
            else:
                turns = cos[index].unsqueeze(1), sin[index].unsqueeze(1)
        return Positions(0 if isinstance(start, Tensor) else start, count, end, index, turns)


def take_apart(base: nn.Module, *, fixed: bool = False) -> Decoder:
    """A decoder in its parts.

    Args:
        base: a `CausalLM` of softmax attention, or a Llama, Qwen2, Mistral or GPT-2 of transformers with its head.
        fixed: whether gradients are kept from its parameters, while they pass through it.

    Raises:
        UserError: a decoder of another kind.
    """
    kind = type(base).__name__
    if isinstance(base, CausalLM):
        return _library(base, fixed)
    host: Host = base
    if hasattr(host, "config") and hasattr(host, "lm_head"):
        family = host.config.model_type
        if family in ("llama", "qwen2", "mistral"):
            return _llama(host, fixed)
        if family == "gpt2":
            return _gpt2(host, fixed)
        kind = f"{kind} of type {family}"
    raise UserError(
        f"{kind} cannot be accelerated; a CausalLM of softmax attention can, and a Llama, Qwen2, Mistral or GPT-2 with "
        "its language-model head"
    )


def _plain(feedforward: Map) -> Callable[[Tensor, Tensor], Tensor]:
    """A feed-forward part without experts, which nothing but its input decides."""
    return lambda z, chosen_by: feedforward(z)


def _library(base: CausalLM, fixed: bool) -> Decoder:
    part = as_fixed if fixed else as_it_is
    layers, rotary = [], []
    for block in base.blocks:
        mixer: Any = block.mixer if isinstance(block, PreNormBlock) else block
        if not isinstance(mixer, SoftmaxAttention) or not mixer.causal:
            raise UserError(
                f"a layer of {type(mixer).__name__} has no keys and values to share: expected causal softmax attention"
            )
        rotary.append((mixer.rotary, mixer.dim // mixer.heads))
        routed = hasattr(block.feedforward, "route")  # experts, which both streams share
        feedforward = _routed(block.feedforward, fixed) if routed else _plain(part(block.feedforward))
        layers.append(
            Layer(
                part(block.norm1),
                part(mixer.query),
                part(mixer.key),
                part(mixer.value),
                part(mixer.out),
                part(block.norm2),
                feedforward,
                mixer.heads,
                mixer.heads,
                window=mixer.window if isinstance(mixer, SlidingWindowAttention) else None,
            )
        )
    if len(set(rotary)) > 1:
        raise UserError("layers of several kinds of positions or head widths cannot be accelerated")
    weight = base.embed.weight if base.head is None else base.head.weight

    def embed(tokens: Tensor, positions: Positions) -> Tensor:
        x = base.embed(tokens)
        if base.positions == "none":
            return x
        index = positions.numbers(x.device)
        return x + (base.place(index) if base.place is not None else sinusoidal_encoding(index, base.dim).to(x))

    def table(size: int) -> tuple[Tensor, Tensor]:
        return rotation(torch.arange(size, device=weight.device), rotary[0][1], weight.dtype)

    return Decoder(
        embed,
        tuple(layers),
        part(base.norm),
        lambda x: F.linear(x, weight.detach() if fixed else weight),
        base.dim,
        base.vocab,
        base.max_length,
        table if rotary[0][0] else None,
    )


def _routed(feedforward: Any, fixed: bool) -> Callable[[Tensor, Tensor], Tensor]:
    if not fixed:
        return feedforward
    weights = {name: p.detach() for name, p in feedforward.named_parameters()}
    return lambda z, chosen_by: functional_call(feedforward, weights, (z, chosen_by))


def _check_rotation(host: Host) -> None:
    kind = (getattr(host.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise UserError(f"rotary positions of type {kind!r} turn with the length of the text: they cannot be cached")


def _llama(host: Host, fixed: bool) -> Decoder:
    _check_rotation(host)
    part = as_fixed if fixed else as_it_is
    config, inner = host.config, host.model
    layers = tuple(
        Layer(
            part(block.input_layernorm),
            part(block.self_attn.q_proj),
            part(block.self_attn.k_proj),
            part(block.self_attn.v_proj),
            part(block.self_attn.o_proj),
            part(block.post_attention_layernorm),
            _plain(part(block.mlp)),
            config.num_attention_heads,
            config.num_key_value_heads,
            scale=block.self_attn.scaling,
            # Qwen2 names the window of each layer, Mistral one for all, Llama none.
            window=getattr(
                block.self_attn,
                "sliding_window",
                config.sliding_window if config.model_type == "mistral" else None,
            ),
        )
        for block in inner.layers
    )

    def table(size: int) -> tuple[Tensor, Tensor]:
        like = inner.embed_tokens.weight
        cos, sin = inner.rotary_emb(like[:1], torch.arange(size, device=like.device)[None])
        half = cos.shape[-1] // 2  # both halves hold the same angles
        return cos[0, :, :half], sin[0, :, :half]

    return Decoder(
        lambda tokens, positions: inner.embed_tokens(tokens),
        layers,
        part(inner.norm),
        part(host.lm_head),
        config.hidden_size,
        config.vocab_size,
        table=table,
    )


def _gpt2(host: Host, fixed: bool) -> Decoder:
    part = as_fixed if fixed else as_it_is
    config, inner = host.config, host.transformer

    def third(module: Host, which: int) -> Map:
        """Queries, keys or values of the one map that makes all three; its weight is stored transposed."""
        at = slice(which * config.hidden_size, (which + 1) * config.hidden_size)

        def call(z: Tensor) -> Tensor:
            weight, bias = module.weight[:, at].T, module.bias[at]
            return F.linear(z, weight.detach(), bias.detach()) if fixed else F.linear(z, weight, bias)

        return call

    layers = tuple(
        Layer(
            part(block.ln_1),
            third(block.attn.c_attn, 0),
            third(block.attn.c_attn, 1),
            third(block.attn.c_attn, 2),
            part(block.attn.c_proj),
            part(block.ln_2),
            _plain(part(block.mlp)),
            config.num_attention_heads,
            config.num_attention_heads,
            scale=block.attn.scaling,
        )
        for block in inner.h
    )

    def embed(tokens: Tensor, positions: Positions) -> Tensor:
        return inner.wte(tokens) + inner.wpe(positions.numbers(tokens.device))

    return Decoder(
        embed,
        layers,
        part(inner.ln_f),
        part(host.lm_head),
        config.hidden_size,
        config.vocab_size,
        config.max_position_embeddings,
    )
