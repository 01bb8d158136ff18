"""URPE attention (Luo et al., 2022, arXiv:2205.13401), section 4."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import KVCache, check_heads, check_tokens, hide_tokens, split_heads
from provenn.ops.rescaled_attention import FORMS, explicit, rescaled_attention
from provenn.ops.rescaled_attention.reference import probabilities
from provenn.papers.urpe.relations import RELATIONS, LogBuckets, Offsets, Paths, Relations, Window

ENCODINGS = ("none", "rpe", "urpe")
SPREAD = 0.02  # of the biases at the start, by the authors' initialiser of all tables


class URPEAttention(nn.Module):
    """Softmax attention with relative biases, multiplied by a second table of the same relations (equation 7).

    A = softmax(X W_Q (X W_K)ᵀ / √d + B) ⊙ C,  B_ij = b[r(i, j)],  C_ij = c[r(i, j)]

    The softmax makes every row of weights sum to 1, so that equal tokens stay equal whatever B is; C is free of that.
    It starts at 1, where the layer is the one with relative biases alone, and may become negative.

    Args:
        dim: D, width of a token.
        heads: must divide `dim`; each has tables of its own.
        max_length: n of `index="offset"`: farther tokens have the farthest offset's numbers.
        index: r: "offset", "bucket" (`LogBuckets`), "grid" (`Window`), "path" (`Paths`), or an object like those.
        grid: (height, width) of "grid".
        buckets, max_distance: of "bucket"; `max_distance` is also the longest path of "path".
        encoding: "urpe"; "rpe" without C; "none" without both.
        init_scale: where C starts.
        causal: whether token i sees tokens 1..i only.
        bias: of the four linear maps.
        dropout: of the weights, after the product with C.
        form: of `rescaled_attention`.

    Shapes: (batch, tokens, dim) to the same. Parameters: 4·D² + 4·D, and of `rel_bias` and `rel_scale` heads numbers a
    relation each: 2n − 1 relations for offsets, n causal. Slot: token-mixer. Streams with a key-value cache.
    """

    rel_bias: nn.Parameter | None
    rel_scale: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        max_length: int = 512,
        index: str | Relations = "offset",
        grid: tuple[int, int] | None = None,
        buckets: int = 64,
        max_distance: int = 128,
        encoding: str = "urpe",
        init_scale: float | int = 1.0,
        causal: bool = True,
        bias: bool = True,
        dropout: float | int = 0.0,
        form: str = "explicit",
    ):
        check_whole(dim=dim, heads=heads, max_length=max_length, buckets=buckets, max_distance=max_distance)
        check_finite(init_scale=init_scale, dropout=dropout)
        super().__init__()
        check_heads(dim, heads)
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
        if form not in FORMS:
            raise ValueError(f"form must be {' or '.join(FORMS)}, got {form!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie between 0 and 1, below 1, got {dropout}")
        self.dim, self.heads, self.causal, self.encoding = dim, heads, causal, encoding
        self.init_scale, self.form = init_scale, form
        self.relations = _relations(index, max_length, grid, buckets, max_distance, causal)
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        size = (self.relations.size, heads)
        self.rel_bias = None if encoding == "none" else nn.Parameter(torch.empty(size))
        self.rel_scale = None if encoding != "urpe" else nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The tables as they start: biases N(0, 0.02²), multipliers 1. The maps have torch's start, or their host's."""
        if self.rel_bias is not None:
            nn.init.normal_(self.rel_bias, std=SPREAD)
        if self.rel_scale is not None:
            nn.init.constant_(self.rel_scale, self.init_scale)

    def _project(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        check_tokens(x, self.dim, mask)
        seen = hide_tokens(x, mask)
        q, k, v = (split_heads(m(y), self.heads) for m, y in ((self.query, x), (self.key, seen), (self.value, seen)))
        return q, k, v

    def _looked_up(self, table: Tensor | None, tokens: int, given: Tensor | None) -> Tensor | None:
        """A table at the relations of all pairs: (1, heads, tokens, tokens), or (batch, …) where they are given so."""
        if table is None:
            return None
        if given is None and isinstance(self.relations, Offsets):
            return self.relations.matrix(table, tokens)[None]
        if given is None:
            positions = torch.arange(tokens, device=table.device)
            given = self.relations.index(positions, positions)
        return gather(table, given)

    def tables(
        self, tokens: int, relations: Int[Tensor, "*batch tokens tokens"] | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """B and C of a sequence, (1 or batch, heads, tokens, tokens); None where the encoding has none."""
        if relations is not None:
            _check_relations(relations, self.relations.size, tokens)
        bias, factors = (self._looked_up(table, tokens, relations) for table in (self.rel_bias, self.rel_scale))
        return bias, factors

    def _visible(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        visible = None if mask is None else mask[:, None, None]
        if not self.causal:
            return visible
        earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()[None, None]
        return earlier if visible is None else visible & earlier

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        relations: Int[Tensor, "*batch tokens tokens"] | None = None,
        tables: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended; `relations` are r(i, j) where positions do not give them.

        `tables` are B and C of all pairs where they are at hand, as of layers that share them; else the layer's own. A
        token that may attend to nothing gets W_o's bias.
        """
        q, k, v = self._project(x, mask)
        bias, factors = self.tables(x.shape[1], relations) if tables is None else tables
        visible = self._visible(x, mask)
        if self.training and self.dropout.p:
            weights = probabilities(q, k, bias=bias, visible=visible).to(v.dtype)
            weights = weights if factors is None else weights * factors.to(v.dtype)
            y = self.dropout(weights) @ v
        else:
            y = rescaled_attention(q, k, v, bias=bias, factors=factors, visible=visible, form=self.form)
        return self._join(y)

    def _join(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2))

    def weights(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        relations: Int[Tensor, "*batch tokens tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads tokens tokens"], Float[Tensor, "batch heads tokens tokens"]]:
        """softmax(S + B), whose rows sum to 1, and its product with C, whose rows need not."""
        q, k, _ = self._project(x, mask)
        bias, factors = self.tables(x.shape[1], relations)
        p = probabilities(q, k, bias=bias, visible=self._visible(x, mask))
        return p, p if factors is None else p * factors.to(p.dtype)

    def init_state(self, batch: int) -> KVCache:
        """An empty cache for `batch` streams."""
        keys = self.out.weight.new_empty(batch, self.heads, 16, self.dim // self.heads)
        return KVCache(keys, torch.empty_like(keys), 0)

    def prefill(
        self, x: Float[Tensor, "batch tokens dim"], state: KVCache | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], KVCache]:
        """Many tokens at once: the outputs, and the cache from which `step` goes on."""
        if not self.causal:
            raise ValueError("attention that sees later tokens cannot stream; build it with causal=True")
        state = self.init_state(x.shape[0]) if state is None else state
        q, k, v = self._project(x)
        past, state = state.length, state.append(k, v)
        k, v = state.keys[:, :, : state.length], state.values[:, :, : state.length]
        queries, keys = torch.arange(past, state.length, device=x.device), torch.arange(state.length, device=x.device)
        index = self.relations.index(queries, keys)
        bias, factors = (None if table is None else gather(table, index) for table in (self.rel_bias, self.rel_scale))
        visible = (keys <= queries[:, None])[None, None]
        return self._join(explicit(q, k, v, bias=bias, factors=factors, visible=visible)), state

    def step(self, x_t: Float[Tensor, "batch dim"], state: KVCache) -> tuple[Float[Tensor, "batch dim"], KVCache]:
        """One token more; time and memory grow with the tokens so far."""
        y, state = self.prefill(x_t.unsqueeze(1), state)
        return y.squeeze(1), state


def gather(table: Float[Tensor, "relations heads"], index: Int[Tensor, "*batch queries keys"]) -> Tensor:
    """The numbers of each head at these relations, (1 or batch, heads, queries, keys)."""
    index = index[None] if index.dim() == 2 else index
    return F.embedding(index, table).permute(0, 3, 1, 2)


def share_tables(layers: Iterable[Any]) -> None:
    """One pair of tables for all layers, as in the authors' model: that of the first."""
    first, *rest = layers
    for layer in rest:
        if getattr(layer, "rel_bias", None) is not None:
            layer.rel_bias = first.rel_bias
        if getattr(layer, "rel_scale", None) is not None:
            layer.rel_scale = first.rel_scale


def _relations(
    index: str | Relations,
    max_length: int,
    grid: tuple[int, int] | None,
    buckets: int,
    max_distance: int,
    causal: bool,
) -> Relations:
    if not isinstance(index, str):
        if not isinstance(index, Relations):
            raise ValueError(f"index must be one of {', '.join(RELATIONS)} or have size and index, got {index!r}")
        if causal and isinstance(index, Window | Paths):
            raise ValueError(f"{index} has no order: causal must be False, got True")
        if not causal and isinstance(index, Offsets) and index.causal:
            raise ValueError(f"{index} does not distinguish later tokens: causal must be True, got False")
        return index
    if index not in RELATIONS:
        raise ValueError(f"index must be one of {', '.join(RELATIONS)}, got {index!r}")
    if (index == "grid") != (grid is not None):
        raise ValueError(f"index='grid' and grid=(height, width) go together, got index={index!r} and grid={grid}")
    if causal and index in ("grid", "path"):
        raise ValueError(f"index={index!r} has no order: causal must be False, got True")
    if index == "offset":
        return Offsets(max_length, causal)
    if index == "bucket":
        return LogBuckets(buckets, max_distance)
    if grid is not None:
        return Window(*grid)
    return Paths(max_distance)


def _check_relations(given: Tensor, size: int, tokens: int) -> None:
    if given.dtype != torch.int64 or given.dim() not in (2, 3) or given.shape[-2:] != (tokens, tokens):
        raise ValueError(
            f"relations must be int64 of shape (tokens, tokens) or (batch, tokens, tokens) for {tokens} tokens, got "
            f"{str(given.dtype).removeprefix('torch.')} of shape {tuple(given.shape)}"
        )
    if given.is_meta or torch.compiler.is_compiling() or not given.numel():
        return
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= size:
        raise ValueError(f"relations must lie from 0 to {size - 1}, got {low} to {high}")
