"""What the regulators are compared with, and the authors' loop over captions."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.papers.rcar.hosts import Similarity
from provenn.papers.rcar.layers import (
    EPSILON,
    Aggregated,
    AggregationRegulator,
    CorrespondenceRegulator,
    Regulated,
    check_sizes,
    initialise,
    regulated_attention,
)
from provenn.papers.rcar.model import Matching


def loop_over_captions(
    similarity: Similarity,
    regions: Float[Tensor, "images regions dim"],
    words: Float[Tensor, "texts words dim"],
    lengths: list[int],
) -> Float[Tensor, "images texts"]:
    """Scores as the authors compute them: a caption at a time, repeated for each image, and cut to its length.

    Args:
        similarity: RCAR's three, or the mean of cosines; no SGRAF.
        regions, words: tokens.
        lengths: words of each text.

    Raises:
        ValueError: another host.
    """
    if similarity.whole is not None or similarity.host not in ("mean", "alignment"):
        raise ValueError(f"the loop is of the hosts mean and alignment, got {similarity.host}")
    columns = []
    for text, length in zip(words, lengths, strict=True):
        repeated = text[None, :length].repeat(len(regions), 1, 1)
        pair = (repeated, regions) if similarity.mode == "t2i" else (regions, repeated)
        columns.append(_one_caption(similarity, *pair))
    return torch.stack(columns, 1)


def _one_caption(similarity: Similarity, query: Tensor, context: Tensor) -> Tensor:
    e: Tensor = torch.ones_like(query[:1, :1])
    lam: Tensor = torch.full_like(query[:1, :1, 0], similarity.temperature)
    h: Tensor | None = None
    done, skipped = 0, max(0, similarity.rcr + 1 - similarity.rar)
    for number in range(similarity.rcr + 1):
        found = regulated_attention(query, context, e, lam, scaling=similarity.scaling)
        if number < len(similarity.align):
            a = similarity.align[number](query, found.values)
            if number >= skipped or (number == similarity.rcr and not similarity.rar):
                h = a.mean(1) if h is None else h
                for _ in range(1 if number < similarity.rcr else similarity.rar - done):
                    h, _ = similarity.aggregate[done](a, h)
                    done += 1
        if number < similarity.rcr:
            e, lam = similarity.regulate[number](a, e, lam)
    if similarity.by_cosine:
        return F.cosine_similarity(query, found.values, dim=-1, eps=EPSILON).mean(1)
    return similarity.score(h)[:, 0].sigmoid()


class FixedFactors(CorrespondenceRegulator):
    """RCR whose factors are learned, and the same for every pair: they do not see the alignment.

    Args:
        align_dim, embed_dim: as in RCR.
    """

    def __init__(self, align_dim: int, embed_dim: int):
        nn.Module.__init__(self)
        check_sizes(align_dim=align_dim, embed_dim=embed_dim)
        self.shift = nn.Parameter(torch.zeros(embed_dim))
        self.sharper = nn.Parameter(torch.zeros(()))

    def forward(self, a: Tensor, e: Tensor | float = 1.0, lam: Tensor | float = 10.0) -> Regulated:
        factors = (self.shift.tanh() + e).clamp(-1, 1)
        return Regulated(factors.expand(*a.shape[:-1], -1), (self.sharper + lam).relu() + torch.zeros_like(a[..., 0]))


class AttentionPooling(AggregationRegulator):
    """Alignments by a softmax of one network of each alone: β = softmax_j(w · tanh(W₂ tanh(W₁ a_j))), once.

    Args:
        align_dim: m.
        hidden: of both layers.
        dropout: as in RAR.
    """

    def __init__(self, align_dim: int, hidden: int, dropout: float = 0.4):
        nn.Module.__init__(self)
        check_sizes(align_dim=align_dim, hidden=hidden)
        self.scores = nn.Sequential(
            nn.Linear(align_dim, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )  # fmt: skip
        initialise(self)

    def forward(
        self,
        a: Float[Tensor, "*batch queries align"],
        h: Float[Tensor, "*batch align"],
        mask: Bool[Tensor, "*#batch queries"] | None = None,
    ) -> Aggregated:
        a = a if mask is None else a.masked_fill(~mask[..., None], 0)
        scores = self.scores(a)[..., 0]
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        summary = (weights[..., None, :] @ a)[..., 0, :]
        return Aggregated(summary / (torch.linalg.vector_norm(summary, dim=-1, keepdim=True) + EPSILON), weights)


class Pooled(Matching):
    """The cosine of the mean token of an image and that of a text: nothing is matched with anything."""

    def __init__(self, image: nn.Module, text: nn.Module, similarity: Similarity, **options: Any):
        super().__init__(image, text, similarity, **options)
        self.matcher.requires_grad_(False)

    def similarity(
        self,
        images: tuple[Float[Tensor, "images regions dim"], Bool[Tensor, "images regions"]],
        texts: tuple[Float[Tensor, "texts words dim"], Bool[Tensor, "texts words"]],
    ) -> Float[Tensor, "images texts"]:
        means = [(tokens * real[..., None]).sum(1) for tokens, real in (images, texts)]
        return F.normalize(means[0], dim=1) @ F.normalize(means[1], dim=1).T
