"""Attention of one query over every prefix, by its plain definitions (Feng et al., 2024, arXiv:2405.13956, section 3).

Scores s_i and values v_i come in, o_k = Σ_{i≤k} exp(s_i) v_i / Σ_{i≤k} exp(s_i) goes out for every k. A leaf that the
mask hides has score −∞; a prefix in which nothing may be attended has output 0.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class PrefixState(NamedTuple):
    """What attention remembers of a set of tokens: (m, u, w) of section 3.2.

    m = max s_i, u = Σ exp(s_i − m), w = Σ exp(s_i − m) v_i; the attention output is w / u. The empty set is (−∞, 0, 0).

    The same attention can be written with any m, so gradients take m as a constant: they are exact for whatever is a
    function of w / u and of merges.
    """

    m: Float[Tensor, "*batch"]
    u: Float[Tensor, "*batch"]
    w: Float[Tensor, "*batch dim"]

    @classmethod
    def empty(cls, *batch: int, dim: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        """The identity of `merge`: the state of no tokens."""
        m = torch.full(batch, -torch.inf, dtype=dtype, device=device)
        return cls(m, torch.zeros_like(m), m.new_zeros(*batch, dim))

    @property
    def output(self) -> Float[Tensor, "*batch dim"]:
        """o = w / u, and 0 for the empty set."""
        return self.w / self.u.masked_fill(self.u == 0, 1).unsqueeze(-1)

    @property
    def nbytes(self) -> int:
        """Bytes held; they do not depend on how many tokens were seen."""
        return sum(tensor.nbytes for tensor in self)


def finite(m: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """A maximum that can be subtracted: the empty set's −∞ becomes 0, so that −∞ − (−∞) never arises."""
    return m.masked_fill(m == -torch.inf, 0)


def merge(a: PrefixState, b: PrefixState) -> PrefixState:
    """State of the union of two disjoint sets of tokens; associative and commutative (section 3.2).

    m = max(m_a, m_b),  u = u_a exp(m_a − m) + u_b exp(m_b − m),  w likewise.
    """
    m = torch.maximum(a.m, b.m)
    shift = finite(m)
    # Both ≤ 1. A cumulative sum whose terms keep the maximum of their time, without this, is wrong.
    scale_a, scale_b = (a.m - shift).exp(), (b.m - shift).exp()
    u = a.u * scale_a + b.u * scale_b
    w = a.w * scale_a.unsqueeze(-1) + b.w * scale_b.unsqueeze(-1)
    return PrefixState(m, u, w)


def leaves(
    scores: Float[Tensor, "*batch tokens"],
    values: Float[Tensor, "*batch tokens dim"],
    mask: Bool[Tensor, "..."] | None = None,
) -> PrefixState:
    """Every token as a set of its own, (s_i, 1, v_i), and (−∞, 0, 0) where hidden; in float32 at least."""
    dtype = torch.promote_types(torch.promote_types(scores.dtype, values.dtype), torch.float32)
    scores, values = scores.to(dtype), values.to(dtype)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    seen = scores > -torch.inf
    # Values of hidden tokens are zeros: 0 · NaN would pass the mask.
    return PrefixState(scores, seen.to(dtype), values.masked_fill(~seen.unsqueeze(-1), 0))


def recurrent_attention(
    scores: Float[Tensor, "*batch tokens"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    state: PrefixState | None = None,
) -> tuple[Float[Tensor, "*batch tokens dim"], PrefixState]:
    """The definition: attention as an RNN, one token after another (section 3.1).

    Args:
        scores: s_i, the query against every key, already scaled.
        values: v_i.
        mask: True where a token may be attended; broadcasts to `scores`.
        state: what came before; by default nothing.

    Returns the output at every token and the state after the last.
    """
    tokens = leaves(scores, values, mask)
    if state is None:
        state = PrefixState.empty(*scores.shape[:-1], dim=values.shape[-1], dtype=tokens.m.dtype, device=values.device)
    outputs = []
    for i in range(scores.shape[-1]):
        state = merge(state, PrefixState(tokens.m[..., i], tokens.u[..., i], tokens.w[..., i, :]))
        outputs.append(state.output)
    return torch.stack(outputs, dim=-2).to(values.dtype), state


def masked_softmax_attention(
    scores: Float[Tensor, "*batch tokens"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "*batch tokens dim"]:
    """The same outputs from a softmax over a tokens × tokens matrix that is masked above its diagonal."""
    token = leaves(scores, values, mask)
    n = scores.shape[-1]
    causal = torch.ones(n, n, dtype=torch.bool, device=scores.device).tril()
    matrix = token.m.unsqueeze(-2).masked_fill(~causal, -torch.inf)
    nothing = (matrix == -torch.inf).all(dim=-1, keepdim=True)
    weights = matrix.masked_fill(nothing, 0).softmax(dim=-1).masked_fill(nothing, 0)
    return (weights @ token.w).to(values.dtype)


def blockwise_attention(
    scores: Float[Tensor, "*batch tokens"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    block: int,
    mask: Bool[Tensor, "..."] | None = None,
    state: PrefixState | None = None,
) -> tuple[Float[Tensor, "*batch tokens dim"], PrefixState]:
    """Block by block in O(block²) memory: the form of the paper's appendix, giving every prefix of each block.

    Each block is attended by the matrix form with its own maxima, and merged with the state of all blocks before it.

    Args:
        block: tokens a block; the last one may be shorter.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    token = leaves(scores, values, mask)
    if state is None:
        state = PrefixState.empty(*scores.shape[:-1], dim=values.shape[-1], dtype=token.m.dtype, device=values.device)
    outputs = []
    for start in range(0, scores.shape[-1], block):
        s, v = token.m[..., start : start + block], token.w[..., start : start + block, :]
        m = s.detach().cummax(dim=-1).values
        matrix = s.unsqueeze(-2) - finite(m).unsqueeze(-1)
        causal = torch.ones(matrix.shape[-2:], dtype=torch.bool, device=s.device).tril()
        weights = matrix.masked_fill(~causal, -torch.inf).exp()
        before = PrefixState(state.m.unsqueeze(-1), state.u.unsqueeze(-1), state.w.unsqueeze(-2))
        prefixes = merge(before, PrefixState(m, weights.sum(dim=-1), weights @ v))
        outputs.append(prefixes.output)
        state = PrefixState(prefixes.m[..., -1], prefixes.u[..., -1], prefixes.w[..., -1, :])
    return torch.cat(outputs, dim=-2).to(values.dtype), state
