"""Attention as an RNN, and Aaren (Feng et al., 2024, arXiv:2405.13956), section 3."""

import copy
import math
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.nn.attention import SoftmaxAttention, check_heads, check_tokens, split_heads
from provenn.nn.transformer import ACTIVATIONS, EncoderLayer, TransformerEncoder
from provenn.ops.autograd import without_autocast
from provenn.ops.prefix_scan_attention import PrefixState, merge, prefix_scan_attention


def attention_rnn(
    queries: Float[Tensor, "*batch queries dim"],
    keys: Float[Tensor, "*batch tokens dim"],
    values: Float[Tensor, "*batch tokens width"],
    state: PrefixState | None = None,
    *,
    mask: Bool[Tensor, "*batch queries tokens"] | None = None,
) -> tuple[Float[Tensor, "*batch queries width"], PrefixState]:
    """Softmax attention of any queries as an RNN over the tokens, a block of them at a time (section 3.1, figures 1-2).

    (m, u, w) ← merge((m, u, w), block),  o = w / u. Every query has a state of its own; a call folds its tokens in.
    With the tokens' own queries this is a Transformer's self-attention, with learned latents a Perceiver's
    cross-attention, with one learned query Aaren's.

    Args:
        queries: q, not yet scaled.
        keys, values: the block of tokens, of any size from 1.
        state: what the queries have seen before; by default nothing.
        mask: True where a query may attend a token.
    """
    # (*batch, queries, tokens): the block alone, never all the tokens that the state has seen.
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    # exp(s − m) is summed over streams of any length, and bfloat16 drifts: scores and state are float32 at least.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    m = scores.amax(dim=-1)
    # A query that sees nothing of the block has m = −∞; subtracting 0 there keeps −∞ − (−∞) from giving NaN.
    weights = (scores - m.masked_fill(m == -torch.inf, 0).unsqueeze(-1)).exp()
    with without_autocast(weights):
        block = PrefixState(m, weights.sum(dim=-1), weights @ values.to(weights.dtype))
    state = block if state is None else merge(state, block)
    return state.output.to(values.dtype), state


class AarenAttention(nn.Module):
    """[A]ttention [a]s a [re]current neural [n]etwork: one learned query attends over every prefix (section 3.3).

    o_i = W_o [Σ_{j≤i} softmax_{j≤i}(q·k_j / √p) v_j] with q = W_q·token the same for all i, p = dim / heads. All
    prefixes come from one parallel scan; a stream keeps (m, u, w) of each head and nothing else.

    Args:
        dim: D, width of a token.
        heads: attention heads; must divide `dim`.
        causal: always True: the layer attends over prefixes.

    Shapes: (batch, tokens, dim) to the same. Parameters: 4·D² + 5·D, D more than softmax attention. Slot: token-mixer.
    """

    def __init__(self, dim: int, heads: int, *, causal: bool = True):
        check_whole(dim=dim, heads=heads)
        super().__init__()
        check_heads(dim, heads)
        if not causal:
            raise ValueError("Aaren attends over prefixes, so causal must be True, got False")
        self.dim, self.heads, self.causal = dim, heads, causal
        # It passes W_q, so that a layer has the paper's D parameters more; the start N(0, 0.02²) is our choice.
        self.token = nn.Parameter(torch.randn(dim) * 0.02)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    @classmethod
    def from_softmax(cls, attention: SoftmaxAttention | nn.MultiheadAttention) -> "AarenAttention":
        """Aaren with the four maps of a trained attention, and a fresh query to fine-tune.

        Raises:
            ValueError: an attention with rotary positions, without biases, or with keys of another width.
        """
        # `to` comes before the copies: float64 weights that went through a float32 layer would be rounded.
        if isinstance(attention, SoftmaxAttention):
            if attention.rotary or attention.out.bias is None:
                raise ValueError("attention must have biases and no rotary positions")
            aaren = cls(attention.dim, attention.heads).to(attention.out.weight)
            # The query stays the fresh one: no trained token is the same for all positions.
            aaren.load_state_dict({"token": aaren.token, **attention.state_dict()})
            return aaren
        if attention.in_proj_weight is None or attention.in_proj_bias is None:
            raise ValueError("attention must have keys and values of its own width, and biases")
        aaren = cls(attention.embed_dim, attention.num_heads).to(attention.in_proj_weight)
        maps = (aaren.query, aaren.key, aaren.value)
        with torch.no_grad():
            for linear, weight, bias in zip(maps, attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)):
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
        aaren.out.load_state_dict(attention.out_proj.state_dict())
        return aaren

    def _scores(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch heads"]:
        # q·(W_k x + b_k) = (W_kᵀq)·x + q·b_k: with one query for all tokens, no token needs a key of its own.
        q = self.query(self.token).view(self.heads, -1) / math.sqrt(self.dim // self.heads)
        # (heads, dim): a matrix of as many rows as heads instead of W_k, so scores cost D·heads a token and not D².
        weight = torch.einsum("hp,hpd->hd", q, self.key.weight.unflatten(0, (self.heads, -1)))
        bias = (q * self.key.bias.view(self.heads, -1)).sum(dim=-1)
        return F.linear(x, weight, bias)

    def prefill(
        self,
        x: Float[Tensor, "batch tokens dim"],
        state: PrefixState | None = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], PrefixState]:
        """Many tokens at once: the outputs, and the state from which `step` or another `prefill` goes on."""
        check_tokens(x, self.dim, mask)
        scores = self._scores(x).transpose(1, 2)
        values = split_heads(self.value(x), self.heads)
        attended = None if mask is None else mask.unsqueeze(1)
        # Over (batch, heads, tokens): no tokens × tokens matrix of scores, which attention with a query a token needs.
        y, state = prefix_scan_attention(scores, values, mask=attended, state=state)
        return self.out(y.transpose(1, 2).flatten(2)), state

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended; a prefix with nothing to attend gives W_o's bias."""
        return self.prefill(x, mask=mask)[0]

    def init_state(self, batch: int) -> PrefixState:
        """The state of `batch` streams before their first token: heads · (2 + p) numbers each, in float32 at least."""
        weight = self.out.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # A departure: the paper's m₀ is 0, from which a stream of very low scores would underflow to 0 / 0; here −∞.
        return PrefixState.empty(batch, self.heads, dim=self.dim // self.heads, dtype=dtype, device=weight.device)

    def step(
        self, x_t: Float[Tensor, "batch dim"], state: PrefixState
    ) -> tuple[Float[Tensor, "batch dim"], PrefixState]:
        """One token more, in time and memory that do not depend on how many came before."""
        if x_t.dim() != 2 or x_t.shape[-1] != self.dim:
            raise ValueError(f"expected one token a stream, (batch, {self.dim}), got {tuple(x_t.shape)}")
        scores = self._scores(x_t).to(state.m.dtype)
        values = self.value(x_t).unflatten(-1, (self.heads, -1)).to(state.w.dtype)
        state = merge(state, PrefixState(scores, torch.ones_like(scores), values))
        return self.out(state.output.flatten(1).to(x_t.dtype)), state


class AarenEncoderLayer(EncoderLayer):
    """A Transformer encoder layer with Aaren instead of its attention.

    x ← norm(x + aaren(x)); x ← norm(x + W₂ φ(W₁ x)).

    Args:
        dim, heads: as in `AarenAttention`.
        feedforward, dropout, activation: as in `provenn.nn.transformer.EncoderLayer`.
    """

    def __init__(self, dim: int, heads: int, **options: Any):
        super().__init__(dim, partial(AarenAttention, heads=heads), **options)


class AarenEncoder(TransformerEncoder):
    """Stacked Aaren layers: an RNN of RNNs that trains in parallel and streams with constant memory.

    Args:
        dim, heads: as in `AarenAttention`.
        layers: how many.
        feedforward, dropout, activation: as in `provenn.nn.transformer.EncoderLayer`.

    >>> encoder = AarenEncoder(16, 4, layers=2, feedforward=32).eval()
    >>> x = torch.randn(1, 5, 16)
    >>> state = encoder.init_state(batch=1)
    >>> for t in range(5):
    ...     y, state = encoder.step(x[:, t], state)
    >>> torch.allclose(y, encoder(x)[:, -1], atol=1e-5), state.nbytes
    (True, 192)
    """

    def __init__(self, dim: int, heads: int, *, layers: int, **options: Any):
        super().__init__(dim, partial(AarenAttention, heads=heads), layers=layers, **options)

    @classmethod
    def from_transformer(cls, encoder: TransformerEncoder | nn.TransformerEncoder) -> "AarenEncoder":
        """Every weight of a causal Transformer encoder, with one fresh query a layer, ready to be fine-tuned.

        Args:
            encoder: ours with `SoftmaxAttention`, or PyTorch's with norms after the sums and no final norm.

        Raises:
            ValueError: for an encoder of another form.
        """
        # Not by __init__, which would draw a whole encoder's weights to throw them away.
        aaren = cls.__new__(cls)
        nn.Module.__init__(aaren)
        if isinstance(encoder, TransformerEncoder):
            aaren.layers = copy.deepcopy(encoder.layers)
            for layer in aaren.layers:
                layer.mixer = AarenAttention.from_softmax(cast(SoftmaxAttention, layer.mixer))
            return aaren.train(encoder.training)
        aaren.layers = nn.ModuleList(_from_stock(cast(nn.TransformerEncoderLayer, layer)) for layer in encoder.layers)
        if encoder.norm is not None:
            raise ValueError("the encoder must have no final norm, as the paper's has none")
        return aaren.train(encoder.training)


def _from_stock(stock: nn.TransformerEncoderLayer) -> EncoderLayer:
    if stock.norm_first:
        raise ValueError("the encoder must have its norms after the sums (norm_first=False)")
    activation = next((name for name, function in ACTIVATIONS.items() if stock.activation is function), None)
    if activation is None:
        raise ValueError(f"the encoder's activation must be one of {', '.join(ACTIVATIONS)}, got {stock.activation}")
    attention = AarenAttention.from_softmax(stock.self_attn)
    feedforward, dropout = stock.linear1.out_features, stock.dropout1.p
    layer = EncoderLayer(
        # The factory ignores the width that it is given: the attention exists already, in the stock one's precision.
        attention.dim,
        lambda dim: attention,
        feedforward=feedforward,
        dropout=dropout,
        activation=activation,
    ).to(attention.token)
    for name in ("linear1", "linear2", "norm1", "norm2"):
        layer.get_submodule(name).load_state_dict(stock.get_submodule(name).state_dict())
    # Of what a norm is made with, eps alone is no part of its state dict.
    layer.norm1.eps, layer.norm2.eps = stock.norm1.eps, stock.norm2.eps
    return layer
