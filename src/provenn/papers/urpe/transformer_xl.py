"""Transformer-XL (Dai et al., 2019, arXiv:1901.02860) with and without the multiplier: the paper's language model."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.narrowing import present
from provenn.nn.language import sample
from provenn.nn.positions import shift_distances, sinusoidal_encoding
from provenn.nn.streaming import state_bytes
from provenn.ops.rescaled_attention import explicit
from provenn.papers.urpe.layers import Offsets, gather

XL = ("rpe", "urpe")


class Memory(NamedTuple):
    """What each layer read before, (batch, remembered, dim) a layer, the oldest first."""

    layers: tuple[Float[Tensor, "batch remembered dim"], ...]

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return state_bytes(tuple(self.layers))


class XLAttention(nn.Module):
    """Causal attention to the segment and its memory, with Transformer-XL's relative scores, multiplied by C.

    S_ij = ((q_i + u)·k_j + (q_i + v)·r_{i−j}) / √d,  A = softmax(S) ⊙ C,  r = W_R of a sinusoid of the distance.

    Args:
        dim, heads: heads must divide dim.

    u, v and the table of C belong to the model, which has one of each for all layers.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.place, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(5))

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        memory: Float[Tensor, "batch remembered dim"],
        *,
        content: Float[Tensor, "heads head_dim"],
        position: Float[Tensor, "heads head_dim"],
        factors: Float[Tensor, "1 heads tokens keys"] | None,
        dropout: nn.Module,
    ) -> Float[Tensor, "batch tokens dim"]:
        """`content` and `position` are u and v."""
        everything = torch.cat([memory, x], dim=1)
        tokens, keys = x.shape[1], everything.shape[1]
        q, k, v = (
            m(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for m, part in ((self.query, x), (self.key, everything), (self.value, everything))
        )
        # r of the distances keys − 1 down to 0; entry (i, j) of the query i, at keys − tokens + i, is its distance.
        distances = torch.arange(keys - 1, -1, -1, device=x.device)
        r = self.place(sinusoid(distances, x.shape[-1]).to(x)).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        scale = q.shape[-1] ** -0.5
        by_distance = (q + position[:, None]) @ r.mT * scale
        visible = torch.ones(tokens, keys, dtype=torch.bool, device=x.device).tril(keys - tokens)
        y = explicit(
            q + content[:, None], k, v, bias=shift_distances(by_distance), factors=factors, visible=visible[None, None],
            scale=scale,
        )  # fmt: skip
        return dropout(self.out(y.transpose(1, 2).flatten(2)))


def sinusoid(distances: Int[Tensor, " keys"], dim: int) -> Float[Tensor, "keys dim"]:
    """All sines, then all cosines, as Transformer-XL lays them out."""
    pairs = sinusoidal_encoding(distances, dim + dim % 2)
    return torch.cat([pairs[:, 0::2], pairs[:, 1::2]], dim=-1)[:, :dim]


class XLBlock(nn.Module):
    """x ← norm(x + attention); x ← norm(x + W₂ ReLU(W₁ x)), norms after the sums."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float | int):
        super().__init__()
        self.mixer = XLAttention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, **shared: Any) -> Tensor:
        x = self.norm1(x + self.mixer(x, memory, dropout=self.dropout, **shared))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class TransformerXL(nn.Module):
    """A causal language model with a memory of the segments before, the paper's host on WikiText-103 (section 5.2).

    Args:
        vocab: tokens.
        dim, heads, layers, hidden: of the host.
        encoding: "urpe", or "rpe", Transformer-XL as it was.
        segment: tokens that are read at once.
        memory: tokens before them that each layer remembers; 0 remembers none.
        cutoffs: where the vocabulary is cut for the adaptive softmax, commonest first (Grave et al., 2017); none of it
            for a small one.
        dropout: on embeddings and branches.

    Shapes: tokens (batch, tokens) to logits (batch, tokens, vocab); with cutoffs, log-probabilities. One table
    of the multiplier, of `segment + memory` distances a head, serves all layers; farther ones have the farthest's.
    Streams: a step reads the memory before its token, where `forward` reads that before a segment. So both are the
    same up to `memory` tokens, and a step has fewer before it from there on.
    """

    def __init__(
        self,
        vocab: int = 267735,
        dim: int = 410,
        heads: int = 10,
        layers: int = 16,
        hidden: int = 2100,
        encoding: str = "urpe",
        segment: int = 150,
        memory: int = 150,
        cutoffs: Sequence[int] = (19997, 39997, 199997),
        dropout: float | int = 0.1,
    ):
        super().__init__()
        if encoding not in XL:
            raise ValueError(f"encoding must be one of {', '.join(XL)}, got {encoding!r}")
        sizes = {"vocab": vocab, "dim": dim, "heads": heads, "layers": layers, "hidden": hidden, "segment": segment}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        if memory < 0:
            raise ValueError(f"memory must not be negative, got {memory}")
        ends = [0, *cutoffs, vocab]
        if sorted(set(ends)) != ends:
            raise ValueError(f"cutoffs must rise between 0 and vocab={vocab}, got {list(cutoffs)}")
        self.vocab, self.dim, self.segment, self.remembered = vocab, dim, segment, memory
        self.cutoffs = tuple(cutoffs)
        self.embed = nn.Embedding(vocab, dim)
        self.content = nn.Parameter(torch.empty(heads, dim // heads))
        self.position = nn.Parameter(torch.empty(heads, dim // heads))
        self.relations = Offsets(segment + memory, causal=True)
        size = (self.relations.size, heads)
        self.rel_scale = nn.Parameter(torch.ones(size)) if encoding == "urpe" else None
        self.blocks: Any = nn.ModuleList(XLBlock(dim, heads, hidden, dropout) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.head_bias = nn.Parameter(torch.zeros(vocab))
        self.clusters = nn.Linear(dim, len(cutoffs)) if cutoffs else None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Linear) else 0.01)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.content, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def _read(self, tokens: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """What the last layer gives, and the memory from which the next segment goes on."""
        if not tokens.shape[1]:
            raise ValueError("the sequence has no token: expected at least one")
        x = self.dropout(self.embed(tokens) * math.sqrt(self.dim))
        seen, keys = memory.layers[0].shape[1], memory.layers[0].shape[1] + tokens.shape[1]
        positions = torch.arange(keys, device=tokens.device)
        index = self.relations.index(positions[seen:], positions)
        factors = None if self.rel_scale is None else gather(self.rel_scale, index)
        after = []
        for block, before in zip(self.blocks, memory.layers):
            after.append(torch.cat([before, x.detach()], dim=1)[:, max(0, keys - self.remembered) :])
            x = block(x, before, content=self.content, position=self.position, factors=factors)
        return self.dropout(x), Memory(tuple(after))

    def init_state(self, batch: int) -> Memory:
        """An empty memory for `batch` streams."""
        return Memory(tuple(self.embed.weight.new_zeros(batch, 0, self.dim) for _ in self.blocks))

    def prefill(
        self, tokens: Int[Tensor, "batch tokens"], state: Memory | None = None
    ) -> tuple[Float[Tensor, "batch tokens vocab"], Memory]:
        """A segment's logits, and the memory after it."""
        x, state = self._read(tokens, self.init_state(tokens.shape[0]) if state is None else state)
        return self.logits(x), state

    def step(self, token: Int[Tensor, " batch"], state: Memory) -> tuple[Float[Tensor, "batch vocab"], Memory]:
        """One token more.

        Raises:
            ValueError: the model remembers nothing, so that each token would be read alone.
        """
        if not self.remembered:
            raise ValueError("a model with memory=0 reads segments whole and streams no tokens; build it with memory")
        logits, state = self.prefill(token.unsqueeze(1), state)
        return logits.squeeze(1), state

    def hidden_states(self, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens dim"]:
        """What the last layer gives for each token, segment by segment, with the memory between them."""
        state, outputs = self.init_state(tokens.shape[0]), []
        for piece in tokens.split(self.segment, dim=1):
            x, state = self._read(piece, state)
            outputs.append(x)
        return torch.cat(outputs, dim=1)

    def forward(self, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens vocab"]:
        if not tokens.shape[1]:
            raise ValueError("the sequence has no token: expected at least one")
        return self.logits(self.hidden_states(tokens))

    def logits(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Scores of all tokens; with cutoffs the log-probabilities that the adaptive softmax gives them."""
        if self.clusters is None:
            return F.linear(x, self.embed.weight, self.head_bias)
        head, *tails = self._parts(x)
        short = self.cutoffs[0]
        first = head.log_softmax(dim=-1)
        rare = [first[..., short + i, None] + tail.log_softmax(dim=-1) for i, tail in enumerate(tails)]
        return torch.cat([first[..., :short], *rare], dim=-1)

    def _parts(self, x: Tensor) -> Iterator[Tensor]:
        """Scores of the commonest tokens and of the clusters, then of each cluster's tokens."""
        ends = [0, *self.cutoffs, self.vocab]
        for i, (start, end) in enumerate(pairwise(ends)):
            scores = F.linear(x, self.embed.weight[start:end], self.head_bias[start:end])
            yield torch.cat([scores, present(self.clusters, "clusters")(x)], dim=-1) if i == 0 else scores

    @torch.no_grad()
    def generate(
        self,
        prompt: Int[Tensor, "batch tokens"],
        count: int,
        *,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Tokens that follow a prompt, one at a time as they come; arguments as in `provenn.nn.language.CausalLM`."""
        state = self.init_state(len(prompt))
        for piece in prompt.split(self.segment, dim=1):
            logits, state = self.prefill(piece, state)
        last = logits[:, -1]
        for i in range(count):
            token = sample(last, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            yield token
            if i + 1 < count:
                last, state = self.step(token, state)


urpe_transformer_xl = TransformerXL


def urpe_transformer_xl_tiny(
    vocab: int = 256,
    dim: int = 64,
    heads: int = 4,
    layers: int = 2,
    hidden: int = 128,
    encoding: str = "urpe",
    segment: int = 64,
    memory: int = 64,
    dropout: float | int = 0.0,
) -> TransformerXL:
    """Transformer-XL of bytes, ours, without cutoffs; arguments as in `TransformerXL`."""
    return TransformerXL(vocab, dim, heads, layers, hidden, encoding, segment, memory, (), dropout)
