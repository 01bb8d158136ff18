"""Attention rollout, global-local and pair-wise cross-attention (Zhu et al., 2022, arXiv:2205.02151), section 3."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import check_heads, split_heads
from provenn.ops.softmax_attention import softmax_attention

Tokens = Float[Tensor, "batch tokens dim"]
Heads = Float[Tensor, "batch heads tokens head_dim"]


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


class Attention(nn.Module):
    """Multi-head attention whose keys and values may be those of other tokens than its queries.

    softmax(Q Kᵀ / √d) V through W_o, a head having d = dim / heads features.

    Args:
        dim: D.
        heads: h; must divide D.

    Shapes: (batch, tokens, dim) to the same. Parameters: 4·D² + 4·D, under DeiT's names.
    """

    def __init__(self, dim: int, heads: int):
        check_whole(dim=dim, heads=heads)
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def project(self, x: Tokens) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values of the same tokens."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return q, k, v

    def join(self, y: Heads) -> Tokens:
        """The heads' outputs side by side, through W_o."""
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tokens, seen: Float[Tensor, "batch seen dim"] | None = None) -> Tokens:
        """Each token of `x` attends to those of `seen`, by default to those of `x`."""
        if seen is None:
            return self.join(softmax_attention(*self.project(x)))
        dim = x.shape[-1]
        maps = zip(self.qkv.weight.split([dim, 2 * dim]), self.qkv.bias.split([dim, 2 * dim]))
        q, both = (F.linear(tokens, *linear) for tokens, linear in zip((x, seen), maps))
        return self.join(softmax_attention(*(split_heads(part, self.heads) for part in (q, *both.chunk(2, dim=-1)))))


class MLP(nn.Module):
    """W₂ GELU(W₁ x), the exact GELU; parameters under DeiT's names."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tokens) -> Tokens:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x ← x + attention(LN x); x ← x + MLP(LN x), as DeiT has it.

    Args:
        dim, heads: of the attention.
        mlp_ratio: hidden width of the MLP over `dim`.
        drop_path: probability with which a branch of an example is left out while training.

    Shapes: (batch, tokens, dim) to the same. Parameters: 12·D² + 13·D.
    """

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float | int = 4, drop_path: float | int = 0.0):
        check_finite(mlp_ratio=mlp_ratio, drop_path=drop_path)
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must leave a hidden unit, got {mlp_ratio}")
        self.attn = Attention(dim, heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop = nn.Dropout(drop_path)

    def keep(self, branch: Tokens) -> Tokens:
        """A branch, without those of the examples that are left out."""
        return branch * self.drop(branch.new_ones(branch.shape[0], 1, 1))

    def forward(self, x: Tokens) -> Tokens:
        x = x + self.keep(self.attn(self.norm1(x)))
        return x + self.keep(self.mlp(self.norm2(x)))


class GlobalLocalBlock(Block):
    """GLCA: an encoder block of its own weights, whose queries are some tokens and whose keys are all (equation 3).

        u ← u + W_o softmax(Q(u) K(x)ᵀ / √d) V(x);   u ← u + MLP(LN u)

    A query sees no other query. So what a token becomes here does not depend on which others were chosen beside it.

    Args: as in `Block`.

    Shapes: u (batch, chosen, dim), x (batch, tokens, dim) to the shape of u.
    """

    def forward(self, u: Float[Tensor, "batch chosen dim"], x: Tokens) -> Float[Tensor, "batch chosen dim"]:  # type: ignore[override]  # of two inputs
        u = u + self.keep(self.attn(self.norm1(u), self.norm1(x)))
        return u + self.keep(self.mlp(self.norm2(u)))


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
