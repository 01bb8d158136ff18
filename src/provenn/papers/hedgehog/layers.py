"""Hedgehog (Zhang et al., 2024, arXiv:2402.04347), section 4: a feature map that learns to mimic softmax."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.nn.attention import SoftmaxAttention, check_tokens, split_heads
from provenn.nn.feature_maps import (
    CosFormerMap,
    EluMap,
    ExponentialMap,
    FeatureMap,
    PerformerMap,
    PerHeadLinear,
    ReluMap,
    T2RMap,
    TaylorMap,
)
from provenn.nn.positions import rotation, turn
from provenn.ops.linear_attention import FORMS as EXECUTIONS
from provenn.ops.linear_attention import LinearState, attention_outputs, linear_attention, linear_attention_weights
from provenn.papers.hedgehog.mirrored import FLOOR, mirrored_softmax

FORMS = ("softmax", "joint", "exp", "plain")
MapMaker = Callable[[int, int], FeatureMap]


class HedgehogFeatureMap(FeatureMap):
    """A linear layer for each head, then exponentials of both signs (section 4.2).

    With y = x W + b, W starting as the identity, the forms of φ(x) are
      softmax: [softmax(y), softmax(−y)], each half at least 1e-12. Stable; what is trained in practice.
      joint:   softmax([2y, −2y]), at least 1e-12. Stable; one positive factor for each token away from plain at 2y.
      exp:     [exp(y − max y), exp(−y + min y)], at least 1e-12. Stable; does not sum to one.
      plain:   [exp(y), exp(−y)], as the equation has it; overflows.
    A positive factor on φ(q) cancels in the attention and one on φ(k) does not. The halves of softmax and exp have
    factors of their own, so all four are different maps, but joint and plain at 2y agree on queries.

    Args:
        num_heads, head_dim: H and d of the attention.
        feature_dim: width of y; d by default. φ is twice as wide.
        form: which of the four.
        bias: whether there is a b.

    Parameters: H · d · feature_dim, and H · feature_dim of a bias.

    >>> phi = HedgehogFeatureMap(num_heads=2, head_dim=4)
    >>> phi(torch.randn(1, 2, 3, 4)).sum(-1).allclose(torch.tensor(2.0))
    True
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        feature_dim: int | None = None,
        *,
        form: str = "softmax",
        bias: bool = False,
    ):
        check_whole(num_heads=num_heads, head_dim=head_dim, feature_dim=feature_dim)
        feature_dim = head_dim if feature_dim is None else feature_dim
        super().__init__(num_heads, head_dim, 2 * feature_dim)
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        self.form = form
        self.linear = PerHeadLinear(num_heads, head_dim, feature_dim, bias=bias)

    def phi(self, x: Tensor, start: int) -> Tensor:
        if self.form == "softmax":
            bias = self.linear.bias
            return mirrored_softmax(x, self.linear.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        both = self.linear.both_signs(x)
        if self.form == "plain":
            return both.exp().flatten(-2)
        if self.form == "joint":
            return _floored((2 * both.flatten(-2)).softmax(dim=-1))
        # Not detached: on a key the maximum is a factor of its weight, which does not cancel.
        both = both - both.amax(dim=-1, keepdim=True)
        return _floored(both.exp()).flatten(-2)


def _floored(features: Tensor) -> Tensor:
    """At least 1e-12. Not by `clamp_min`, whose gradient takes eight times as long."""
    return F.threshold(features, FLOOR, FLOOR) if torch.is_grad_enabled() else features.clamp_min_(FLOOR)


MAPS: dict[str, MapMaker] = {
    "hedgehog": HedgehogFeatureMap,
    "elu": EluMap,
    "relu": ReluMap,
    "t2r": T2RMap,
    "performer": PerformerMap,
    "cosformer": CosFormerMap,
    "exp1": partial(ExponentialMap, t=1.0),
    "exp2": partial(ExponentialMap, t=2.0),
    "taylor": TaylorMap,
}


def map_maker(name: str | MapMaker) -> MapMaker:
    """The maker of a map of this name, or the maker itself.

    >>> map_maker("taylor")(2, 3).features
    13
    """
    if callable(name):
        return name
    if name not in MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(MAPS)}, or a maker of maps, got {name!r}")
    return MAPS[name]


class AttentionState(NamedTuple):
    """A stream of a linear attention: S = Σ φ(k) vᵀ and z = Σ φ(k) of each head, and how many tokens were read."""

    s: Float[Tensor, "batch heads features head_dim"]
    z: Float[Tensor, "batch heads features"]
    length: int


class Projected(NamedTuple):
    """What a host's projections give for linear attention to work on, rotated already where the host rotates."""

    queries: Float[Tensor, "batch heads tokens head_dim"]
    keys: Float[Tensor, "batch heads tokens head_dim"]
    values: Float[Tensor, "batch heads tokens head_dim"]


class LinearAttention(nn.Module):
    """Multi-head attention with φ_q(q)·φ_k(k) instead of exp(q·k/√d) (section 2).

    y_i = W_o [Σ_{j≤i} φ_q(q_i)·φ_k(k_j) v_j / Σ_{j≤i} φ_q(q_i)·φ_k(k_j)], in time linear in the tokens. Queries and
    keys have a map each, and each head its own. Rotation comes before φ, so the kernel is that of the rotated vectors.

    Args:
        dim: D, width of a token.
        heads: H; must divide `dim`.
        feature_map: "hedgehog", "elu", "relu", "t2r", "performer", "cosformer", "exp1", "exp2", "taylor", or what makes
            a map from (heads, head_dim), such as `partial(HedgehogFeatureMap, form="joint")`.
        causal: whether token i sees tokens 1..i only, or all.
        bias, rotary: of the projections, as in `SoftmaxAttention`.
        execute: "linear"; "quadratic", through tokens × tokens weights; "auto", the shorter of them for the number of
            tokens (see `provenn.ops.linear_attention.resolved`). Streams are linear.

    Shapes: (batch, tokens, dim) to the same. Parameters: those of softmax attention and of the two maps. Slot:
    token-mixer. A stream keeps H · (features · D/H + features) numbers, however many tokens came.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        feature_map: str | MapMaker,
        *,
        causal: bool = True,
        bias: bool = True,
        rotary: bool = False,
        execute: str = "auto",
    ):
        super().__init__()
        self._take(SoftmaxAttention(dim, heads, causal=causal, bias=bias, rotary=rotary), feature_map, execute)

    def _take(self, attention: SoftmaxAttention, feature_map: str | MapMaker, execute: str = "auto") -> None:
        if execute not in EXECUTIONS:
            raise ValueError(f"execute must be one of {', '.join(EXECUTIONS)}, got {execute!r}")
        self.execute = execute
        self.dim, self.heads = attention.dim, attention.heads
        self.causal, self.rotary = attention.causal, attention.rotary
        self.query, self.key, self.value, self.out = attention.query, attention.key, attention.value, attention.out
        make = map_maker(feature_map)
        weight = self.out.weight
        self.map_query, self.map_key = (
            make(self.heads, self.dim // self.heads).to(weight.device, weight.dtype) for _ in range(2)
        )

    @classmethod
    def from_softmax(cls, attention: SoftmaxAttention, feature_map: str | MapMaker = "hedgehog") -> "LinearAttention":
        """Linear attention on the very projections of a softmax attention: shared, not copied."""
        linear = LinearAttention.__new__(LinearAttention)
        nn.Module.__init__(linear)
        linear._take(attention, feature_map)
        return linear.train(attention.training)

    def to_softmax(self) -> SoftmaxAttention:
        """Softmax attention on these very projections: what `from_softmax` took."""
        with torch.device("meta"):
            attention = SoftmaxAttention(self.dim, self.heads, causal=self.causal, rotary=self.rotary)
        attention.query, attention.key, attention.value, attention.out = self.query, self.key, self.value, self.out
        return attention.train(self.training)

    def project(self, x: Float[Tensor, "batch tokens dim"], start: int = 0) -> Projected:
        """Queries, keys and values of each head, before φ; `start` is the position of the first token."""
        check_tokens(x, self.dim)
        q, k, v = (split_heads(m(x), self.heads) for m in (self.query, self.key, self.value))
        if self.rotary:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
            angles = rotation(positions, q.shape[-1], q.dtype)
            q, k = turn(q, *angles), turn(k, *angles)
        return Projected(q, k, v)

    def weights(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """The attention weights, which `forward` never forms."""
        q, k, _ = self.project(x)
        hidden = None if mask is None else mask.unsqueeze(1)
        return linear_attention_weights(self.map_query(q), self.map_key(k), causal=self.causal, mask=hidden)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended; a token that may attend to nothing gets W_o's bias."""
        check_tokens(x, self.dim, mask)
        q, k, v = self.project(x)
        hidden = None if mask is None else mask.unsqueeze(1)
        options: dict[str, Any] = {"causal": self.causal, "mask": hidden, "form": self.execute}
        y = attention_outputs(self.map_query(q, 0), self.map_key(k, 0), v, **options)
        return self.out(y.transpose(1, 2).flatten(2))

    def init_state(self, batch: int) -> AttentionState:
        """The state of `batch` streams before their first token, in float32 at least."""
        weight = self.out.weight
        empty = LinearState.empty(
            batch,
            self.heads,
            features=self.map_key.features,
            dim=self.dim // self.heads,
            dtype=torch.promote_types(weight.dtype, torch.float32),
            device=weight.device,
        )
        return AttentionState(*empty, 0)

    def prefill(
        self, x: Float[Tensor, "batch tokens dim"], state: AttentionState | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], AttentionState]:
        """Many tokens at once: the outputs, and the state from which `step` or another `prefill` goes on."""
        if not self.causal:
            raise ValueError("attention that sees later tokens cannot stream; build it with causal=True")
        start = 0 if state is None else state.length
        q, k, v = self.project(x, start)
        before = None if state is None else LinearState(state.s, state.z)
        y, after = linear_attention(self.map_query(q, start), self.map_key(k, start), v, state=before)
        return self.out(y.transpose(1, 2).flatten(2)), AttentionState(after.s, after.z, start + x.shape[1])

    def step(
        self, x_t: Float[Tensor, "batch dim"], state: AttentionState
    ) -> tuple[Float[Tensor, "batch dim"], AttentionState]:
        """One token more, in time and memory that do not depend on how many came before."""
        y, state = self.prefill(x_t.unsqueeze(1), state)
        return y.squeeze(1), state


class HedgehogAttention(LinearAttention):
    """Linear attention with Hedgehog's learned maps, for a model trained from scratch (section 5.1).

    Args:
        dim, heads, causal, bias, rotary, execute: as in `LinearAttention`.
        feature_dim, form: as in `HedgehogFeatureMap`.
        map_bias: whether the maps have a b.

    Shapes: (batch, tokens, dim) to the same. Parameters: 4·D² + 4·D and, with D/H features, 2·D²/H of the maps. Slot:
    token-mixer. A stream keeps 2·D · (D/H + 1) numbers.

    >>> layer = HedgehogAttention(16, 4)
    >>> state = layer.init_state(batch=1)
    >>> y, state = layer.step(torch.randn(1, 16), state)
    >>> state.s.numel() + state.z.numel()
    160
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = True,
        bias: bool = True,
        rotary: bool = False,
        feature_dim: int | None = None,
        form: str = "softmax",
        map_bias: bool = False,
        execute: str = "auto",
    ):
        maker = partial(HedgehogFeatureMap, feature_dim=feature_dim, form=form, bias=map_bias)
        super().__init__(dim, heads, maker, causal=causal, bias=bias, rotary=rotary, execute=execute)
