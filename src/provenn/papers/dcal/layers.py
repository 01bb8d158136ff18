"""Attention rollout, global-local and pair-wise cross-attention (Zhu et al., 2022, arXiv:2205.02151), section 3."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from provenn.nn.attention import split_heads
from provenn.nn.vit import Block, Tokens
from provenn.ops.softmax_attention import softmax_attention


def rollout(maps: Sequence[Float[Tensor, "batch tokens tokens"]]) -> Float[Tensor, "batch tokens tokens"]:
    """How much of each token has come to each token through all layers (equation 2, Abnar and Zuidema, 2020).

    Ŝ = S̄_L ⋯ S̄_2 S̄_1,   S̄_l = ½ S_l + ½ I

    Args:
        maps: S_l of each layer, the first first, the mean over its heads. Each row sums to 1, and so does each of Ŝ.
    """
    product = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device).expand_as(maps[0])
    for weights in maps:
        product = (product + weights @ product) / 2
    return product


def rollout_row(maps: Sequence[Float[Tensor, "batch tokens tokens"]]) -> Float[Tensor, "batch tokens"]:
    """The first row of `rollout`, the class token's, in O(layers · tokens²): r ← r S̄_l for l = L, …, 1.

    >>> rollout_row([torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])])
    tensor([[0.7500, 0.2500]])
    """
    row = torch.zeros_like(maps[0][:, :1])
    row[..., 0] = 1
    for weights in reversed(maps):
        row = (row + row @ weights) / 2
    return row[:, 0]


def count_chosen(patches: int, ratio: float | int) -> int:
    """k = max(1, ⌊R N⌋).

    >>> [count_chosen(784, 0.1), count_chosen(128, 0.3), count_chosen(256, 0.3), count_chosen(4, 0.1)]
    [78, 38, 76, 1]
    """
    # A share such as 0.1 · 30 is a little below or above the whole number that it means.
    return max(1, int(patches * ratio + 1e-9))


def choose_patches(row: Float[Tensor, "batch patches"], ratio: float | int) -> Int[Tensor, "batch chosen"]:
    """The R·N patches of the largest share in the rollout, the largest first; of equal ones the earlier first."""
    return row.argsort(dim=1, descending=True, stable=True)[:, : count_chosen(row.shape[1], ratio)]


class GlobalLocalBlock(Block):
    """GLCA: an encoder block of its own weights, whose queries are some tokens and whose keys are all (equation 3).

        u ← u + W_o softmax(Q(u) K(x)ᵀ / √d) V(x);   u ← u + MLP(LN u)

    A query sees no other query. So what a token becomes here does not depend on which others were chosen beside it.
    Where there is but one, no key or value is made, and each map is applied once in the place of once a token. For
    q · (K x + b) = (Kᵀ q) · x + q · b, whose last part no softmax sees, and Σ_i α_i (V x_i + b) = V (Σ_i α_i x_i) + b.

    Args: as in `Block`.

    Shapes: u (batch, chosen, dim), x (batch, tokens, dim) to the shape of u.
    """

    def forward(self, u: Float[Tensor, "batch chosen dim"], x: Tokens) -> Float[Tensor, "batch chosen dim"]:  # type: ignore[override]  # of two inputs
        attend = self._attend_once if u.shape[1] == 1 else self.attn
        u = u + self.keep(attend(self.norm1(u), self.norm1(x)))
        return u + self.keep(self.mlp(self.norm2(u)))

    def _attend_once(self, u: Float[Tensor, "batch 1 dim"], x: Tokens) -> Float[Tensor, "batch 1 dim"]:
        attn, heads, dim = self.attn, self.attn.heads, u.shape[-1]
        to_query, to_key, to_value = attn.qkv.weight.split(dim)
        query_bias, _, value_bias = attn.qkv.bias.split(dim)
        q = split_heads(F.linear(u, to_query, query_bias), heads)
        asked = (q @ to_key.unflatten(0, (heads, -1)))[:, :, 0]  # dim numbers a head
        weights = (asked @ x.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        seen = weights @ x
        values = (seen[:, :, None] @ to_value.unflatten(0, (heads, -1)).mT)[:, :, 0]
        return attn.proj(values.flatten(1) + value_bias)[:, None]


class Parts(NamedTuple):
    """What a pre-norm encoder block is made of, whoever wrote it.

    Args:
        norm1, norm2, mlp: from tokens to tokens.
        project: tokens to queries, keys and values.
        join: heads' outputs to tokens.
        keep: what happens to a branch before it is added, in training.
    """

    norm1: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    join: Callable[[Tensor], Tensor]
    keep: Callable[[Tensor], Tensor]


def attend(block: Parts, x: Tokens) -> Tokens:
    """A block's output, by fused attention."""
    x = x + block.keep(block.join(softmax_attention(*block.project(block.norm1(x)))))
    return x + block.keep(block.mlp(block.norm2(x)))


def attend_and_show(block: Parts, x: Tokens) -> tuple[Tokens, Float[Tensor, "batch tokens tokens"]]:
    """A block's output, and its attention weights in float32, the mean over heads, without a gradient.

    Fused attention keeps no weights, so the scores are made here; no product is made twice.
    """
    q, k, v = block.project(block.norm1(x))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
    x = x + block.keep(block.join(weights.to(v.dtype) @ v))
    return x + block.keep(block.mlp(block.norm2(x))), weights.detach().mean(dim=1)


def attend_to_pair(block: Parts, x: Tokens, other: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tokens:
    """PWCA: a block whose queries attend to both images under one softmax (equation 4).

        softmax(Q₁ [K₁; K₂]ᵀ / √d) [V₁; V₂]

    Args:
        block: one of the network's own: PWCA has no weights.
        x: of the image.
        other: K₂ and V₂ from K₁ and V₁.
    """
    q, k, v = block.project(block.norm1(x))
    k2, v2 = other(k, v)
    x = x + block.keep(block.join(softmax_attention(q, torch.cat([k, k2], 2), torch.cat([v, v2], 2))))
    return x + block.keep(block.mlp(block.norm2(x)))


def weigh_losses(losses: Mapping[str, Tensor], log_variances: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """½ Σ_i (e^{−w_i} L_i + w_i), learned weights of several losses (equation 5; Kendall et al., 2018).

    At its least w_i = log L_i.

    Args:
        losses: L_i of each branch.
        log_variances: w_i of at least these.
    """
    terms = [loss * torch.exp(-log_variances[name]) + log_variances[name] for name, loss in losses.items()]
    return torch.stack(terms).sum() / 2


def draw_order(count: int, generator: torch.Generator | None = None) -> Int[Tensor, " count"]:
    """A partner for each image of a batch: a random permutation, in which an image may be its own."""
    return torch.randperm(count, generator=generator)
