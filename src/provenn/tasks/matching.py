"""How well images find their captions, and captions their images: R@1, R@5 and R@10 both ways.

Protocol (Faghri et al., 2018, VSE++; Lee et al., 2018, SCAN): an image has found its captions at the rank of the best
of them, and every caption looks for its one image. Equal scores are taken as the field's code takes them, which sorts
by `argsort(scores)[::-1]`: of equal ones the later in the list comes first. A model that cannot tell anything apart
so reaches chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from provenn.core.errors import UserError

RANKS = (1, 5, 10)
BLOCK = 2**24  # comparisons that are held at a time


@dataclass(frozen=True)
class Match:
    """The ranks of a search both ways, from 1 on.

    Args:
        text_rank: of each image, that of the best of its captions among all captions.
        image_rank: of each image and each of its captions, that of the image among all images; 0 where there are fewer
            captions than columns.
    """

    text_rank: Int64[Tensor, " images"]
    image_rank: Int64[Tensor, "images captions"]


def match(scores: Float[Tensor, "images texts"], owners: Int64[Tensor, " owners"]) -> Match:
    """Ranks from a table of scores, the larger the more alike.

    Args:
        scores: of each image and each caption.
        owners: the number of the image that a caption is of.

    Raises:
        UserError: sizes differ, an image has no caption, or a score is no number.

    >>> found = match(torch.tensor([[0.9, 0.1], [0.8, 0.3]]), torch.tensor([0, 1]))
    >>> found.text_rank.tolist(), found.image_rank.tolist()
    ([1, 2], [[1], [1]])
    """
    images, texts = scores.shape
    counts = owners.bincount(minlength=images)
    if len(owners) != texts or len(counts) != images or not bool((counts > 0).all()):
        raise UserError(
            f"scores are of {images} images and {texts} captions: expected the image of each caption, at least one for "
            f"each image, got {len(owners)} for {int((counts > 0).sum())} images"
        )
    wrong = ~scores.isfinite()
    if bool(wrong.any()):
        image, text = (int(place) for place in wrong.nonzero()[0])
        raise UserError(f"the score of image {image} and caption {text} is no number")
    order = owners.argsort(stable=True)
    most = int(counts.max())
    starts = counts.cumsum(0) - counts
    column = torch.arange(texts) - starts[owners[order]]
    captions = torch.full((images, most), -1)
    captions[owners[order], column] = order

    text_rank = torch.empty(images, dtype=torch.long)
    image_rank = torch.zeros(images, most, dtype=torch.long)
    step = max(1, BLOCK // (texts * most))
    for start in range(0, images, step):
        rows = slice(start, start + step)
        ranks = _ranks(scores[rows], captions[rows].clamp(min=0))
        text_rank[rows] = ranks.where(captions[rows] >= 0, texts + 1).min(1).values
    step = max(1, BLOCK // images)
    for start in range(0, texts, step):
        part = order[start : start + step]
        ranks = _ranks(scores[:, part].T, owners[part][:, None])[:, 0]
        image_rank[owners[part], column[start : start + step]] = ranks
    return Match(text_rank, image_rank)


def _ranks(scores: Float[Tensor, "rows many"], wanted: Int64[Tensor, "rows few"]) -> Int64[Tensor, "rows few"]:
    """From 1 on, the ranks in each row of what is wanted; of equal scores the later one comes first."""
    own = scores.gather(1, wanted)
    beyond = scores[:, None] > own[:, :, None]
    tied = (scores[:, None] == own[:, :, None]) & (torch.arange(scores.shape[1]) > wanted[:, :, None])
    return 1 + (beyond | tied).sum(2)


def recalls(text_rank: np.ndarray, image_rank: np.ndarray, ranks: Sequence[int] = RANKS) -> Mapping[str, float]:
    """R@k both ways as shares in 0…1, and their sum.

    `text_r1` is the share of images one of whose captions comes first, and `image_r1` that of captions whose image
    does. `rsum` is the sum of all six, in 0…6.

    Args:
        text_rank, image_rank: see `Match`.
        ranks: the k.
    """
    there = image_rank > 0
    found = {f"text_r{k}": float((text_rank <= k).mean()) for k in ranks}
    found |= {f"image_r{k}": float(((image_rank <= k) & there).sum() / there.sum()) for k in ranks}
    return MappingProxyType({**found, "rsum": sum(found.values())})


def chance(images: int, captions: int) -> Mapping[str, float]:
    """What `recalls` gives on average where the order is drawn, for as many captions of each image.

    >>> round(chance(1000, 5)["rsum"], 3)
    0.032
    """
    texts, found = images * captions, {}
    for k in RANKS:
        missed = 1.0
        for place in range(min(k, texts)):
            missed *= max(0, texts - captions - place) / (texts - place)
        found[f"text_r{k}"] = 1 - missed
    found |= {f"image_r{k}": min(1.0, k / images) for k in RANKS}
    return MappingProxyType({**found, "rsum": sum(found.values())})


def padding_of(lengths: Sequence[int] | np.ndarray, width: int) -> Bool[Tensor, "rows width"]:
    """Which of the first `width` entries are real, in rows of these lengths."""
    return torch.arange(width) < torch.as_tensor(np.asarray(lengths))[:, None]
