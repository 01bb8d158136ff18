"""Following one person over time: the user's embedding, and in each frame the crop that is most like it."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from provenn.nn.arguments import check_finite


class Sighted(NamedTuple):
    """What came of a frame.

    Args:
        crop: the number of the crop that shows the user; None where none is alike enough.
        similarity: the cosine of the best crop; None of a frame without crops.
        ranking: the crops, the most alike first.
        similarities: their cosines, in the order of the ranking.
    """

    crop: int | None
    similarity: float | None
    ranking: list[int]
    similarities: list[float]


def follow(
    user: Float[Tensor, "pictures dim"],
    frames: Iterable[Tensor],
    *,
    threshold: float | int = 0.5,
    momentum: float | int = 0.9,
) -> Iterator[Sighted]:
    """Find the user in each frame by the cosine of embeddings, and keep what is remembered of him up to date.

        e ← normalised μ e + (1 − μ) c, where c is the embedding of a crop that was recognised

    Args:
        user: embeddings of pictures that show him, as a robot takes them at the start; their mean is where it begins.
        frames: (crops, dim) embeddings of the crops of each frame, in time; a frame may have none.
        threshold: least cosine at which a crop counts as him.
        momentum: μ; 1 keeps the first memory.

    Raises:
        ValueError: no picture of the user, or a threshold or momentum out of range.
    """
    check_finite(threshold=threshold, momentum=momentum)
    if not -1 <= threshold <= 1 or not 0 <= momentum <= 1:
        raise ValueError(
            f"threshold must lie between -1 and 1 and momentum between 0 and 1, got {threshold} and {momentum}"
        )
    if not len(user):
        raise ValueError("expected at least one picture of the user, got none")
    return _follow(F.normalize(F.normalize(user.float(), dim=1).mean(0), dim=0), frames, threshold, momentum)


def _follow(
    memory: Tensor, frames: Iterable[Tensor], threshold: float | int, momentum: float | int
) -> Iterator[Sighted]:
    for crops in frames:
        unit = F.normalize(crops.float(), dim=1)
        cosines = unit @ memory
        ranking = cosines.argsort(descending=True, stable=True).tolist()
        if not ranking:
            yield Sighted(None, None, [], [])
            continue
        best = ranking[0]
        similarity = float(cosines[best])
        seen = similarity >= threshold
        if seen:
            memory = F.normalize(torch.lerp(unit[best], memory, float(momentum)), dim=0)
        yield Sighted(best if seen else None, similarity, ranking, cosines[ranking].tolist())
