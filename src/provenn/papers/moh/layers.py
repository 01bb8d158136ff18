"""Mixture-of-Head attention (Jin et al., 2024, arXiv:2410.11842), section 3.

Multi-head attention is a sum over heads, MHA(x) = Σ_i H_i W_O,i. Here each token weighs that sum: some heads are shared
by all tokens, and of the others, the routed ones, a token uses the K that its router scores highest,

    out_t = Σ_i g_i(x_t) · H_i,t W_O,i        (equation 3)

with g_i = 0 for the heads that are not chosen. Keys and values of all tokens stay in all heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import KVCache, SoftmaxAttention, check_tokens, hide_tokens
from provenn.nn.auxiliary import add_auxiliary
from provenn.nn.positions import rotate
from provenn.ops.autograd import without_autocast
from provenn.ops.routed_heads import causal_mask, routed_attention, routed_decode, worth_gathering
from provenn.ops.softmax_attention import softmax_attention

BALANCE = 0.01  # β of the load-balance loss, in all of the paper's systems


class Routing(NamedTuple):
    """What a router decides for every token.

    Args:
        gates: g, the weight of each head; 0 where it is not used.
        active: which heads are used; the shared ones always.
        scores: p, the probabilities of the routed heads, from which they were chosen; None where no head is routed.
    """

    gates: Float[Tensor, "*batch heads"]
    active: Bool[Tensor, "*batch heads"]
    scores: Float[Tensor, "*batch routed"] | None


def choose(scores: Float[Tensor, "*batch routed"], top_k: int) -> Bool[Tensor, "*batch routed"]:
    """m, True at the `top_k` largest scores; of equal ones the first are taken.

    >>> choose(torch.tensor([0.1, 0.4, 0.2, 0.3]), 2).tolist()
    [False, True, False, True]
    """
    # `topk` leaves open which of equal scores it takes, a stable sort does not.
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def balance_loss(
    scores: Float[Tensor, "batch tokens routed"],
    chosen: Bool[Tensor, "batch tokens routed"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, ""]:
    """L_b = E · Σ_i P_i f_i, with P_i the mean score and f_i the share of tokens of head i, of E (equation 7).

    The factor E is the authors' code's, the paper prints none. It is K when scores and choices are uniform, and at most
    E, when all tokens put all on the same K heads.

    Args:
        scores: p of the routed heads.
        chosen: which of them are used.
        mask: False at padding, which is not counted.
    """
    if mask is None:
        share, mean = chosen.to(scores.dtype).mean((0, 1)), scores.mean((0, 1))
    else:
        valid = mask.unsqueeze(-1).to(scores.dtype)
        count = valid.sum().clamp_min(1)
        share, mean = (valid * chosen).sum((0, 1)) / count, (valid * scores).sum((0, 1)) / count
    return scores.shape[-1] * (mean * share).sum()


def add_balance(routing: Routing, beta: float | int, mask: Bool[Tensor, "batch tokens"] | None = None) -> None:
    """Say β times the load-balance loss of a routing to whoever trains, where there is something to balance."""
    if beta and routing.scores is not None:
        chosen = routing.active[..., -routing.scores.shape[-1] :]
        add_auxiliary(
            beta * balance_loss(routing.scores, chosen, mask), "the balance of its router's load", "balance=0"
        )


def straight_through(
    chosen: Bool[Tensor, "*batch routed"], scores: Float[Tensor, "*batch routed"]
) -> Float[Tensor, "*batch routed"]:
    """1 where chosen and 0 elsewhere; the gradient of a chosen gate goes to its score unchanged (equations 9 and 10).

    >>> scores = torch.tensor([0.7, 0.3], requires_grad=True)
    >>> gates = straight_through(torch.tensor([True, False]), scores)
    >>> gates.tolist(), torch.autograd.grad((gates * torch.tensor([5.0, 2.0])).sum(), scores)[0].tolist()
    ([1.0, 0.0], [5.0, 0.0])
    """
    # (score − score) first: it is 0 exactly, and 1 + 0 is 1, where (1 + score) − score would be rounded.
    return torch.where(chosen, 1 + (scores - scores.detach()), torch.zeros_like(scores))


def _check_heads(heads: int, shared: int, top_k: int) -> None:
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    if not 0 <= shared <= heads:
        raise ValueError(f"shared must lie between 0 and the {heads} heads, got {shared}")
    if not 0 <= top_k <= heads - shared:
        raise ValueError(f"top_k must lie between 0 and the {heads - shared} routed heads, got {top_k}")
    if top_k == 0 and shared < heads:
        raise ValueError(f"top_k=0 would leave {heads - shared} heads that no token ever uses; share all {heads}")


class HeadRouter(nn.Module):
    """The weights of a token's heads, from the token, as the authors' code computes them.

    p = softmax(W_r x), m its K largest, r = K · (p ⊙ m) / Σ(p ⊙ m), s = h_s · softmax(W_s x), α = 2 · softmax(W_h x),
    g = (α₁ s, α₂ r). So the gates of the h_s + K heads in use average about 1, and are 1 when all heads are used
    and the weights are zero. With no shared head g = r; with no routed one g = s.

    It runs in float32 at least: in half precision rounding would change which heads are chosen.

    Args:
        dim: D, width of a token.
        heads: h.
        shared: h_s, the first heads, which every token uses.
        top_k: K, how many of the others a token uses; 0 only where all heads are shared.

    Shapes: (..., dim) to gates (..., heads). Parameters: (h − h_s) · D, and h_s · D for more than one shared head, and
    2 · D where there are both kinds.
    """

    def __init__(self, dim: int, heads: int, shared: int, top_k: int):
        check_whole(dim=dim, heads=heads, shared=shared, top_k=top_k)
        super().__init__()
        _check_heads(heads, shared, top_k)
        self.heads, self.shared, self.top_k = heads, shared, top_k
        routed = heads - shared
        self.routed = nn.Linear(dim, routed, bias=False) if routed else None
        self.common = nn.Linear(dim, shared, bias=False) if shared > 1 else None
        self.kinds = nn.Linear(dim, 2, bias=False) if shared and routed else None

    def forward(self, x: Float[Tensor, "*batch dim"], q: Tensor | None = None) -> Routing:
        """`q` is what `QueryNormRouter` reads; it is not used here."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        with without_autocast(x):
            common, kinds, scores = (
                None if map is None else F.linear(x, map.weight.to(x.dtype)).softmax(dim=-1)
                for map in (self.common, self.kinds, self.routed)
            )
        if common is None:  # the softmax over one shared head, or none
            common = x.new_ones(*x.shape[:-1], self.shared)
        always = torch.ones_like(common, dtype=torch.bool)
        if scores is None:
            return Routing(self._gates(common, None, None), always, None)
        chosen = choose(scores, self.top_k)
        gates = self._gates(common, kinds, scores * chosen)
        return Routing(gates, torch.cat([always, chosen], dim=-1), scores)

    def _gates(self, common: Tensor, kinds: Tensor | None, kept: Tensor | None) -> Tensor:
        """g, from the probabilities of the shared heads, of the two kinds, and of the routed heads that were chosen."""
        shared = self.shared * common
        if kept is None:
            return shared
        total = kept.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).eps)
        return _weighed(shared, self.top_k * kept / total, None if kinds is None else 2 * kinds)


class PaperHeadRouter(HeadRouter):
    """The gates as the paper prints them (equations 4 to 6), without the scales that the authors' code has.

    α = softmax(W_h x), g_i = α₁ softmax(W_s x)_i for a shared head, α₂ softmax(W_r x)_i for a chosen one. They sum to
    at most 1, so the layer's output is about h times smaller than multi-head attention's.

    Args:
        dim, heads, shared, top_k: as in `HeadRouter`.
    """

    def _gates(self, common: Tensor, kinds: Tensor | None, kept: Tensor | None) -> Tensor:
        return common if kept is None else _weighed(common, kept, kinds)


def _weighed(shared: Tensor, routed: Tensor, kinds: Tensor | None) -> Tensor:
    """Shared and routed gates side by side, each kind with its weight where there are two."""
    if kinds is None:
        return torch.cat([shared, routed], dim=-1)
    return torch.cat([kinds[..., :1] * shared, kinds[..., 1:] * routed], dim=-1)


class QueryNormRouter(nn.Module):
    """Chooses heads by the size of their queries, without parameters: to continue the training of a pretrained model.

    p = softmax(n / std(n)) with n_i = ‖q_i‖ of the routed heads before any rotation and std over them, unbiased
    (equation 8). A shared or chosen head counts in full and another not at all (equations 9 and 10), so all other
    weights keep their meaning; `straight_through` lets the scores learn. Scaling all queries changes nothing.

    Args:
        dim: not used; there for `HeadRouter`'s signature.
        heads, shared, top_k: as in `HeadRouter`; 0 or at least 2 heads must be routed.

    Shapes: queries (..., heads, head_dim) to gates (..., heads), 0 or 1.
    """

    def __init__(self, dim: int, heads: int, shared: int, top_k: int):
        super().__init__()
        _check_heads(heads, shared, top_k)
        if heads - shared == 1:
            raise ValueError(f"the deviation over 1 routed head is not defined; got heads={heads} and shared={shared}")
        self.heads, self.shared, self.top_k = heads, shared, top_k

    def forward(self, x: Tensor | None, q: Float[Tensor, "*batch heads head_dim"]) -> Routing:
        """`x` is what `HeadRouter` reads; it is not used here."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        always = torch.ones(*q.shape[:-2], self.shared, dtype=torch.bool, device=q.device)
        if self.shared == self.heads:
            return Routing(always.to(dtype), always, None)
        norms = torch.linalg.vector_norm(q[..., self.shared :, :].to(dtype), dim=-1)
        deviation = norms.std(dim=-1, keepdim=True)
        scores = (norms / deviation.masked_fill(deviation == 0, 1)).softmax(dim=-1)
        chosen = choose(scores, self.top_k)
        gates = torch.cat([always.to(dtype), straight_through(chosen, scores)], dim=-1)
        return Routing(gates, torch.cat([always, chosen], dim=-1), scores)


EXECUTIONS = ("dense", "gather", "auto")
ROUTERS: dict[str, type[HeadRouter] | type[QueryNormRouter]] = {
    "linear": HeadRouter,
    "paper": PaperHeadRouter,
    "query-norm": QueryNormRouter,
}


class MoHAttention(nn.Module):
    """Multi-head attention in which every token chooses and weighs its heads.

    out_t = Σ_i g_i(x_t) · H_i,t W_O,i   (equation 3), H_i the softmax attention of head i.

    While training, β times the load-balance loss goes to `provenn.nn.auxiliary`.

    Args:
        dim: D, width of a token.
        heads: h; must divide `dim` unless `head_dim` is given.
        shared: h_s, the first heads, which every token uses; by default half of them.
        top_k: K, how many of the others a token uses; by default half of those, so that 75 % are used.
        head_dim: width of a head; by default dim / heads. Where it is given, heads · head_dim need not be `dim`.
        router: "linear" (the authors' code), "paper" (its printed equations) or "query-norm" (no parameters).
        causal: whether token i sees tokens 1..i only, or all.
        bias: of the four maps.
        rotary: turn queries and keys by their position.
        balance: β; 0 adds no loss.
        execute: "dense" computes every head and multiplies by the gates, as the authors' code does. "gather" computes
            the chosen (token, head) pairs alone (`provenn.ops.routed_heads`), except where a compiler traces it.
            The third choice, "auto", takes "gather" where sizes say that it is no slower. Elsewhere, and for single
            tokens, it takes "dense".

    Shapes: (batch, tokens, dim) to the same. Parameters: 4 · D · h · head_dim, 3 · h · head_dim + D with biases, and
    the router's. Slot: token-mixer. Streams with a key-value cache.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shared: int | None = None,
        top_k: int | None = None,
        head_dim: int | None = None,
        router: str = "linear",
        causal: bool = True,
        bias: bool = True,
        rotary: bool = False,
        balance: float | int = BALANCE,
        execute: str = "dense",
    ):
        check_whole(dim=dim, heads=heads, shared=shared, top_k=top_k, head_dim=head_dim)
        check_finite(balance=balance)
        super().__init__()
        if dim < 1 or heads < 1 or (head_dim is None and dim % heads):
            raise ValueError(f"heads must divide dim, both at least 1, got dim={dim} and heads={heads}")
        head_dim = dim // heads if head_dim is None else head_dim
        if head_dim < 1 or (rotary and head_dim % 2):
            raise ValueError(f"a head must be at least 1 wide, and with rotary positions even, got {head_dim}")
        for name, given, known in (("router", router, ROUTERS), ("execute", execute, EXECUTIONS)):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        if not balance >= 0:
            raise ValueError(f"balance must not be negative, got {balance}")
        shared = heads // 2 if shared is None else shared
        top_k = -(-(heads - shared) // 2) if top_k is None else top_k
        self.dim, self.heads, self.head_dim, self.shared, self.top_k = dim, heads, head_dim, shared, top_k
        self.causal, self.rotary, self.balance, self.execute = causal, rotary, balance, execute
        self.router = ROUTERS[router](dim, heads, shared, top_k)
        inner = heads * head_dim
        self.query = nn.Linear(dim, inner, bias=bias)
        self.key = nn.Linear(dim, inner, bias=bias)
        self.value = nn.Linear(dim, inner, bias=bias)
        self.out = nn.Linear(inner, dim, bias=bias)

    @classmethod
    def from_softmax(cls, attention: SoftmaxAttention, **options: Any) -> "MoHAttention":
        """The four maps of a trained attention with a router, to be tuned; by default the one without parameters.

        Args:
            attention: multi-head attention of ours.
            options: `shared`, `top_k`, `router`, `balance`, `execute`.
        """
        options = {"router": "query-norm", **options}
        moh = cls(
            attention.dim,
            attention.heads,
            causal=attention.causal,
            bias=attention.out.bias is not None,
            rotary=attention.rotary,
            **options,
        )
        moh.load_state_dict({**moh.router.state_dict(prefix="router."), **attention.state_dict()})
        return moh.to(attention.out.weight).train(attention.training)

    def _project(self, x: Tensor, start: int = 0, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Routing]:
        """Queries, keys and values of tokens that stand from `start` on, by head, and who uses which."""
        check_tokens(x, self.dim, mask)
        seen = hide_tokens(x, mask)
        parts = (self.query(x), self.key(seen), self.value(seen))
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        routing = self.router(x, q)
        q, k, v = (part.transpose(-3, -2) for part in (q, k, v))
        if self.rotary:
            positions = torch.arange(start, start + x.shape[-2], device=x.device)
            q, k = rotate(q, positions), rotate(k, positions)
        return q, k, v, routing

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, routing: Routing, mask: Tensor | None) -> Tensor:
        """H_i of the tokens, the last of which stand at the last keys, weighed and joined by W_O."""
        active = routing.active.transpose(1, 2)
        sizes: dict[str, Any] = {"always": self.shared, "causal": self.causal}
        if self.execute == "gather" or (self.execute == "auto" and worth_gathering(q, k, active, **sizes)):
            y = routed_attention(q, k, v, active, **sizes, mask=mask)
        elif mask is None and self.causal and q.shape[2] == k.shape[2]:
            y = softmax_attention(q, k, v, causal=True)
        elif mask is None and (not self.causal or q.shape[2] == 1):
            y = softmax_attention(q, k, v)
        else:
            may = torch.ones((), dtype=torch.bool, device=q.device) if mask is None else mask[:, None, None, :]
            if self.causal:
                may = may & causal_mask(q.shape[2], k.shape[2], q.device)
            y = softmax_attention(q, k, v, mask=may)
        return self._join(y.transpose(1, 2), routing)

    def _join(self, y: Tensor, routing: Routing) -> Tensor:
        return self.out((y * routing.gates.unsqueeze(-1).to(y.dtype)).flatten(-2))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended; what may not is padding, and not counted in the balance."""
        q, k, v, routing = self._project(x, mask=mask)
        if self.training:
            add_balance(routing, self.balance, mask)
        return self._attend(q, k, v, routing, mask)

    def init_state(self, batch: int) -> KVCache:
        """An empty cache for `batch` streams; it holds all heads, since later tokens may use them."""
        keys = self.out.weight.new_empty(batch, self.heads, 16, self.head_dim)
        return KVCache(keys, torch.empty_like(keys), 0)

    def prefill(
        self, x: Float[Tensor, "batch tokens dim"], state: KVCache | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], KVCache]:
        """Many tokens at once: the outputs, and the cache from which `step` goes on."""
        if not self.causal:
            raise ValueError("attention that sees later tokens cannot stream; build it with causal=True")
        state = self.init_state(x.shape[0]) if state is None else state
        q, k, v, routing = self._project(x, state.length)
        state = state.append(k, v)
        k, v = state.keys[:, :, : state.length], state.values[:, :, : state.length]
        return self._attend(q, k, v, routing, None), state

    def step(self, x_t: Float[Tensor, "batch dim"], state: KVCache) -> tuple[Float[Tensor, "batch dim"], KVCache]:
        """One token more; with execute="gather", keys and values of heads that it does not use are not read."""
        if self.execute != "gather":
            y, state = self.prefill(x_t.unsqueeze(1), state)
            return y.squeeze(1), state
        if not self.causal:
            raise ValueError("attention that sees later tokens cannot stream; build it with causal=True")
        q, k, v, routing = self._project(x_t.unsqueeze(1), state.length)
        state = state.append(k, v)
        k, v = state.keys[:, :, : state.length], state.values[:, :, : state.length]
        y = routed_decode(q[:, :, 0], k, v, routing.active[:, 0], always=self.shared)
        return self._join(y.unsqueeze(1), routing).squeeze(1), state


def convert_to_moh(model: nn.Module, **options: Any) -> nn.Module:
    """Every multi-head attention of ours in a model becomes MoH, in place, with its weights and a router.

    Args:
        model: with `SoftmaxAttention` layers.
        options: of `MoHAttention.from_softmax`.

    Raises:
        ValueError: a model without such a layer.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is SoftmaxAttention
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no SoftmaxAttention to convert")
    for parent, name, child in found:
        setattr(parent, name, MoHAttention.from_softmax(child, **options))
    return model


@contextmanager
def watch_routing(model: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    """What every router of a model decides while the context is open, by the name of the router, call by call.

    >>> layer = MoHAttention(8, 4)
    >>> with watch_routing(layer) as seen:
    ...     _ = layer(torch.zeros(1, 3, 8))
    >>> seen["router"][0].active.float().mean((0, 1)).tolist()
    [1.0, 1.0, 1.0, 0.0]
    """
    seen: dict[str, list[Routing]] = {}
    hooks = []
    for name, part in model.named_modules():
        if isinstance(part, HeadRouter | QueryNormRouter):
            calls = seen.setdefault(name, [])
            hooks.append(part.register_forward_hook(lambda _, __, routing, calls=calls: calls.append(routing)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def head_load(model: nn.Module, *inputs: Any, **named: Any) -> dict[str, Float[Tensor, " heads"]]:
    """The share of tokens that use each head of each router, when the model is called with these inputs.

    The last dimension of what a router decides is the heads; all others are tokens.
    """
    with torch.no_grad(), watch_routing(model) as seen:
        model(*inputs, **named)
    return {
        name: torch.cat([routing.active.flatten(0, -2) for routing in calls]).float().mean(0)
        for name, calls in seen.items()
    }
