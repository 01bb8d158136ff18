"""Relative convolutional multi-head attention, RCMHA (2023, arXiv:2308.03429)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.nn.attention import check_heads, check_tokens, split_heads
from provenn.nn.positions import shift_distances

PROJECTIONS = {"q": "query", "k": "key", "v": "value"}


class HeadConvolution(nn.Module):
    """A depth-wise causal convolution over tokens whose kernels all heads share (Primer: So et al., 2021).

    y[t, h, c] = a_c + Σ_s w_{c,s} · x[t − K + 1 + s, h, c], zeros before the first token.

    Args:
        head_dim: channels of a head.
        kernel: K, tokens that one output takes in, its own the last.

    Parameters: head_dim · (K + 1), as torch starts a convolution. Of keys the bias moves nothing: it adds one number to
    all scores of a query, which a softmax cancels.
    """

    def __init__(self, head_dim: int, kernel: int = 3):
        super().__init__()
        self.head_dim, self.kernel = head_dim, kernel
        self.weight = nn.Parameter(torch.empty(head_dim, 1, kernel))
        self.bias = nn.Parameter(torch.empty(head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√K, as torch starts a convolution of one channel."""
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -(self.kernel**-0.5), self.kernel**-0.5)

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Take in each token alone, as it is: for a trained layer that gets convolutions."""
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.weight)[:, :, -1] = 1

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], before: Float[Tensor, "batch past dim"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`before` are the K − 1 tokens that came before; none stands for zeros."""
        heads = x.shape[-1] // self.head_dim
        x = F.pad(x, (0, 0, self.kernel - 1, 0)) if before is None else torch.cat([before.to(x.dtype), x], dim=1)
        weight, bias = self.weight.repeat(heads, 1, 1), self.bias.repeat(heads)
        return F.conv1d(x.mT, weight, bias, groups=x.shape[-1]).mT


def attention_weights(
    scores: Float[Tensor, "batch heads queries keys"],
    *,
    seen: int | None = None,
    mask: Bool[Tensor, "batch keys"] | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """softmax(S) of queries that are the last of the keys, each of itself and `seen` keys before it at most.

    In float32 at least; a query that sees nothing has weights of zero.
    """
    queries, keys = scores.shape[-2:]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    if seen is not None:
        visible = visible.triu(keys - queries - seen)
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    # Finite where nothing is visible: NaN times a gradient of zero would be NaN.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
    return weights if mask is None else weights.masked_fill(~visible, 0)


class RCMHAState(NamedTuple):
    """What a stream keeps: keys and values after the convolution, and the last K − 1 tokens' projections before it.

    Every part is a tensor with the batch first. `tail` holds queries, keys and values of those that are convolved.
    """

    keys: Float[Tensor, "batch heads past head_dim"]
    values: Float[Tensor, "batch heads past head_dim"]
    tail: Float[Tensor, "batch context widths"]


class RelativeConvAttention(nn.Module):
    """Causal attention over convolved queries, keys and values, with learned tables of relative positions: RCMHA.

    q, k, v = conv(W_q x), conv(W_k x), conv(W_v x + b_v)
    S_ij = [(q_i + u)·k_j + q_i·E_r + β_r] / √p at the distance r = i − j,  y = W_o softmax(S) v + b_o

    One class for the paper's four: with neither part it is multi-head attention (MHA), with convolutions alone Primer's
    (MDHA), with tables alone Transformer-XL's kind (RMHA), with both RCMHA. W_q and W_k have biases without tables, as
    in the authors' code. E, β and u start at zero: at first the order of tokens is known from the convolutions alone.

    Args:
        dim: D, width of a token.
        heads: H, heads of width p = D / H; must divide `dim`.
        conv: which projections are convolved, of "qkv"; "" none.
        kernel: K, tokens that a convolution takes in.
        shared: whether all heads share a convolution's kernels, as in the authors' code; Primer's heads have their own.
        relative: whether scores have the tables.
        max_distance: P, rows of the tables; from a distance of P − 1 on all share the last one (the authors' code
            fails there).
        future_rows: whether the tables have P rows more, for keys after the query, as the authors' have; no causal
            layer reads them.
        memory: how many tokens before itself a token sees; by default all.
        causal: always True: convolutions and memory look back.

    Shapes: (batch, tokens, dim) to the same. Parameters: 4·D² + 2·D; 2·D more without tables, H·p + P·H·(p + 1) more
    with them (twice the rows with `future_rows`); p·(K + 1) for each projection that is convolved, H times as
    many where kernels are not shared. Slot: token-mixer.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        conv: str = "qkv",
        kernel: int = 3,
        shared: bool = True,
        relative: bool = True,
        max_distance: int = 4096,
        future_rows: bool = True,
        memory: int | None = None,
        causal: bool = True,
    ):
        check_whole(dim=dim, heads=heads, kernel=kernel, max_distance=max_distance, memory=memory)
        super().__init__()
        check_heads(dim, heads)
        if any(conv.count(letter) > 1 for letter in conv) or not set(conv) <= PROJECTIONS.keys():
            raise ValueError(f"conv must be some of the letters q, k and v, each at most once, got {conv!r}")
        for name, value, least in (("kernel", kernel, 1), ("max_distance", max_distance, 1), ("memory", memory, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not causal:
            raise ValueError("convolutions and memory look back alone, so causal must be True, got False")
        self.dim, self.heads, self.kernel, self.memory, self.causal = dim, heads, kernel, memory, causal
        self.relative, self.max_distance, self.future_rows = relative, max_distance, future_rows
        head_dim = dim // heads
        self.query = nn.Linear(dim, dim, bias=not relative)
        self.key = nn.Linear(dim, dim, bias=not relative)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.conv = nn.ModuleDict(
            {
                name: HeadConvolution(head_dim if shared else dim, kernel)
                for letter, name in PROJECTIONS.items()
                if letter in conv
            }
        )
        if relative:
            rows = (2 if future_rows else 1) * max_distance
            self.distance_keys = nn.Parameter(torch.zeros(rows, heads, head_dim))
            self.distance_bias = nn.Parameter(torch.zeros(rows, heads))
            self.content_bias = nn.Parameter(torch.zeros(heads, head_dim))

    @property
    def context(self) -> int:
        """How many tokens before the first that is seen have a part in it: K − 1 with convolutions."""
        return self.kernel - 1 if len(self.conv) else 0

    def reset_parameters(self) -> None:
        """Linear maps as torch starts them, as in the authors' code; all else keeps its start."""
        for linear in (self.query, self.key, self.value, self.out):
            linear.reset_parameters()

    def _project(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Queries, keys and values before the convolution, zero where a token is hidden: as if before the first."""
        parts = [linear(x) for linear in (self.query, self.key, self.value)]
        return parts if mask is None else [part.masked_fill(~mask.unsqueeze(-1), 0) for part in parts]

    def _convolve_one(self, name: str, part: Tensor, before: Tensor | None = None) -> Tensor:
        return self.conv[name](part, before) if name in self.conv else part

    def _convolve(self, parts: list[Tensor], tail: Tensor) -> tuple[list[Tensor], Tensor]:
        """The parts after the convolution, and the tail from which the next ones go on."""
        past = iter(tail.split(self.dim, dim=-1))
        done, tails = [], [tail[:, :, :0]]
        for name, part in zip(PROJECTIONS.values(), parts):
            before = next(past).to(part.dtype) if name in self.conv else None
            done.append(self._convolve_one(name, part, before))
            if before is not None:
                # The last K − 1 of both: all but as many from the front as there are new ones.
                tails.append(torch.cat([before, part], dim=1)[:, part.shape[1] :])
        return done, torch.cat(tails, dim=-1)

    def _table_rows(self, distances: Tensor) -> Tensor:
        """Where a distance stands: the authors' row P − r of 2·P, or P − 1 − r of P."""
        return self.max_distance - int(not self.future_rows) - distances.clamp(max=self.max_distance - 1)

    def distance_scores(self, q: Float[Tensor, "batch heads queries head_dim"], keys: int) -> Tensor:
        """q_i·E_r + β_r of queries that are the last of `keys` tokens; of no use above the diagonal."""
        rows = self._table_rows(torch.arange(keys - 1, -1, -1, device=q.device))
        # (heads, keys, head_dim) and (heads, 1, keys): the tables by distance, the farthest first.
        table = self.distance_keys[rows].transpose(0, 1).to(q.dtype)
        bias = self.distance_bias[rows].transpose(0, 1).unsqueeze(1).to(q.dtype)
        return shift_distances(q @ table.mT + bias)

    def scores(
        self, q: Float[Tensor, "batch heads queries head_dim"], k: Float[Tensor, "batch heads keys head_dim"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        """S, with queries that are the last of the keys; of no use above the diagonal."""
        if not self.relative:
            return q @ k.mT / math.sqrt(q.shape[-1])
        content = (q + self.content_bias.unsqueeze(1).to(q.dtype)) @ k.mT
        # Divided after all terms are in, so E, β and u are divided too.
        return (content + self.distance_scores(q, k.shape[2])) / math.sqrt(q.shape[-1])

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, seen: int | None, mask: Tensor | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Queries that are the last of the keys, each to `seen` keys before itself at most."""
        weights = attention_weights(self.scores(q, k), seen=seen, mask=mask).to(v.dtype)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended; a token that may attend to nothing gets W_o's bias."""
        check_tokens(x, self.dim, mask)
        return self._attend(*self._heads_of(x, mask), seen=self.memory, mask=mask)

    def _heads_of(self, x: Tensor, mask: Tensor | None = None) -> list[Float[Tensor, "batch heads tokens head_dim"]]:
        """Queries, keys and values of whole texts."""
        parts = map(self._convolve_one, PROJECTIONS.values(), self._project(x, mask))
        return [split_heads(part, self.heads) for part in parts]

    def weights(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """softmax(S) of whole texts, for who wants to look at it."""
        check_tokens(x, self.dim, mask)
        q, k, _ = self._heads_of(x, mask)
        return attention_weights(self.scores(q, k), seen=self.memory, mask=mask)

    def init_state(self, batch: int) -> RCMHAState:
        """The state of `batch` streams before their first token."""
        weight = self.out.weight
        empty = weight.new_zeros(batch, self.heads, 0, self.dim // self.heads)
        return RCMHAState(empty, empty, weight.new_zeros(batch, self.context, len(self.conv) * self.dim))

    def prefill(
        self, x: Float[Tensor, "batch tokens dim"], state: RCMHAState | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], RCMHAState]:
        """Many tokens at once: the outputs, and the state from which `step` or another `prefill` goes on."""
        check_tokens(x, self.dim)
        state = self.init_state(x.shape[0]) if state is None else state
        if state.keys.shape[0] != x.shape[0]:
            raise ValueError(f"the state is of {state.keys.shape[0]} streams, the input of {x.shape[0]}")
        parts, tail = self._convolve(self._project(x), state.tail)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        k, v = torch.cat([state.keys.to(k.dtype), k], dim=2), torch.cat([state.values.to(v.dtype), v], dim=2)
        y = self._attend(q, k, v, seen=self.memory)
        # Slices from the front, since [-0:] is everything.
        start = 0 if self.memory is None else max(0, k.shape[2] - self.memory)
        return y, RCMHAState(k[:, :, start:], v[:, :, start:], tail)

    def step(self, x_t: Float[Tensor, "batch dim"], state: RCMHAState) -> tuple[Float[Tensor, "batch dim"], RCMHAState]:
        """One token more; time and memory grow with the tokens that are seen."""
        if x_t.dim() != 2 or x_t.shape[-1] != self.dim:
            raise ValueError(f"expected one token a stream, (batch, {self.dim}), got {tuple(x_t.shape)}")
        y, state = self.prefill(x_t.unsqueeze(1), state)
        return y.squeeze(1), state

    def attend_segment(
        self,
        x: Float[Tensor, "batch tokens dim"],
        remembered: Float[Tensor, "streams past width"],
        *,
        official: bool = False,
    ) -> Float[Tensor, "batch tokens dim"]:
        """A segment after its memory, whose keys and values are made anew, so that W_k and W_v learn from it too.

        Args:
            x: the segment.
            remembered: what this layer read before, the newest last: `memory` tokens and `context` more, where the
                text has so many. None at all is a text's beginning.
            official: as the authors cut a text: queries are convolved as if nothing came before the segment, and
                the memory's keys and values as if nothing came before it. A token sees the segment and all of the
                memory. Otherwise the outputs are those of one pass over the whole text.

        Raises:
            ValueError: a memory of another batch or width.
        """
        check_tokens(x, self.dim)
        if remembered.dim() != 3 or remembered.shape[0] != x.shape[0] or remembered.shape[2] != self.dim:
            raise ValueError(
                f"the memory must be (batch, past, dim) = ({x.shape[0]}, past, {self.dim}), where past may be 0, "
                f"got {tuple(remembered.shape)}"
            )
        q, k, v = map(self._convolve_one, PROJECTIONS.values(), self._project(torch.cat([remembered, x], dim=1)))
        q = self._convolve_one("query", self.query(x)) if official else q[:, remembered.shape[1] :]
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        return self._attend(q, k, v, seen=None if official else self.memory)
