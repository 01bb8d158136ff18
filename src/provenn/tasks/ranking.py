"""How well embeddings rank pictures of one identity: the mAP, mINP and CMC of re-identification.

Protocol (Zheng et al., 2015, "Scalable Person Re-identification: A Benchmark"): one query at a time. A
query's own identity from its own camera is left out of the gallery, since it is no test, and so is junk.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provenn.core.errors import UserError

JUNK = -1  # the identity of a box that shows nobody whole: it is neither right nor wrong
RANKS = (1, 5, 10)
BLOCK = 2**22  # distances that are held at a time
Area = Literal["hits", "trapezoid"]


@dataclass(frozen=True)
class Sightings:
    """Whom the pictures show, and which camera took them.

    Args:
        identities: (pictures,) whole numbers; -1 is junk. In a gallery, any that no query has is a distractor.
        cameras: (pictures,) whole numbers.
    """

    identities: Int[Tensor, " pictures"]
    cameras: Int[Tensor, " cameras"]

    def __post_init__(self) -> None:
        if self.identities.ndim != 1 or self.identities.shape != self.cameras.shape:
            came = f"{tuple(self.identities.shape)} and {tuple(self.cameras.shape)}"
            raise UserError(f"each picture needs one identity and one camera; their shapes are {came}")

    def __len__(self) -> int:
        return len(self.identities)


@dataclass(frozen=True)
class Ranking:
    """What came of each query, so that queries can be resampled.

    Args:
        judged: (queries,) whether the gallery has anyone to find. The others are counted nowhere.
        precision: (judged,) average precision.
        first, last: (judged,) the places, from 1, of the nearest right picture and of the farthest.
        right: (judged,) how many right pictures there are.
    """

    judged: Bool[Tensor, " queries"]
    precision: Float[Tensor, " judged"]
    first: Int[Tensor, " judged"]
    last: Int[Tensor, " judged"]
    right: Int[Tensor, " judged"]

    def summary(self, ranks: tuple[int, ...] = RANKS) -> Mapping[str, float]:
        """mAP, mINP (the mean of right/last: what finding the hardest costs) and the share of queries with a right
        picture among the first k (CMC), all in [0, 1].

        Raises:
            UserError: no query has anyone to find.
        """
        if not len(self.precision):
            raise UserError(
                f"none of {len(self.judged)} queries has a picture of its identity from another camera in the gallery; "
                "check how identities and cameras are read from the names"
            )
        figures = {"mAP": self.precision.mean().item(), "mINP": (self.right / self.last).double().mean().item()}
        figures |= {f"rank-{k}": (self.first <= k).double().mean().item() for k in ranks}
        return MappingProxyType(figures)


def judge(
    distances: Float[Tensor, "queries gallery"], queries: Sightings, gallery: Sightings, area: Area = "hits"
) -> Ranking:
    """Rank the gallery for each query, the nearest first, and compare with who is shown.

    At equal distance the wrong pictures come first: what a model cannot tell apart is not counted in its favour, and
    the order of the files is without effect.

    Args:
        distances: the smaller, the more alike. The unit does not matter.
        queries, gallery: who is shown and by which camera.
        area: how precision is averaged over the right pictures. `hits` takes the precision at each one, as the field's
            code in Python does. `trapezoid` takes the mean of that and of the precision one place before, as
            Market-1501's own code does.

    Raises:
        UserError: sizes differ, or a distance is no number.

    >>> shown = Sightings(torch.tensor([3, 3, 8, 3]), torch.tensor([2, 1, 2, 2]))
    >>> query = Sightings(torch.tensor([3]), torch.tensor([1]))
    >>> ranking = judge(torch.tensor([[0.1, 0.0, 0.2, 0.3]]), query, shown)
    >>> round(ranking.summary()["mAP"], 3)
    0.833
    """
    if distances.shape != (len(queries), len(gallery)):
        expected = f"{len(queries)} queries and {len(gallery)} pictures of the gallery"
        raise UserError(f"distances have the shape {tuple(distances.shape)}; there are {expected}")
    parts = [_judge_rows(distances[rows], queries, gallery, area, rows) for rows in _rows(len(queries), len(gallery))]
    return _joined(parts)


def judge_embeddings(
    query: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    shown: tuple[Sightings, Sightings],
    area: Area = "hits",
) -> Ranking:
    """Rank by the cosine distance of embeddings, without the whole table of distances: queries are taken in blocks.

    Args:
        query, gallery: one embedding a picture.
        shown: whom the queries and whom the gallery show.
        area: see `judge`.

    Raises:
        UserError: sizes differ, or an embedding is zero or no number.
    """
    if (len(query), len(gallery)) != (len(shown[0]), len(shown[1])):
        came = f"{len(query)} and {len(gallery)} embeddings for {len(shown[0])} and {len(shown[1])} pictures"
        raise UserError(f"each picture needs one embedding: {came}")
    queries, others = _normalised(query), _normalised(gallery)
    rows = _rows(len(queries), len(others))
    return _joined([_judge_rows(1 - queries[part] @ others.T, *shown, area, part) for part in rows])


def nearest(
    query: Float[Tensor, "queries dim"], gallery: Float[Tensor, "gallery dim"], count: int = 10
) -> tuple[Float[Tensor, "queries count"], Int[Tensor, "queries count"]]:
    """The most alike pictures of a gallery of any size, by the cosine of their embeddings.

    The gallery is taken in blocks, and after each only the best so far are kept. At equal similarity the earlier
    picture comes first. On a CPU the blocks are searched by faiss where it is installed. Where faiss cuts through a
    tie, it does not say which it keeps, so such queries are ranked by the plain product.

    Args:
        query, gallery: one embedding a picture.
        count: how many, at most as many as the gallery has.

    Returns: Similarities, falling, and places in the gallery.

    Raises:
        UserError: `count` is not between 1 and the gallery's size, or an embedding is zero or no number.
    """
    if not 1 <= count <= len(gallery):
        raise UserError(f"count must be between 1 and the gallery's {len(gallery)} pictures, got {count}")
    queries = _normalised(query)
    step = max(count, BLOCK // max(1, len(queries)))
    best = queries.new_full((len(queries), 0), 0.0)
    places = torch.zeros(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(gallery), step):
        block = _normalised(gallery[start : start + step])
        found, where = _search(queries, block, min(count, len(block)))
        similarity, place = torch.cat((best, found), 1), torch.cat((places, where + start), 1)
        order = _first(similarity, min(count, similarity.shape[1]))
        best, places = similarity.gather(1, order), place.gather(1, order)
    return best, places


def _first(similarity: Tensor, count: int) -> Tensor:
    """Places of the largest in each row, falling; of equal ones the earlier first, also where some are cut off."""
    top = similarity.topk(count, dim=1)
    places = top.indices.sort(dim=1).values
    falling = similarity.gather(1, places).sort(dim=1, descending=True, stable=True).indices
    places = places.gather(1, falling)
    # Which of those that tie for the last place `topk` takes is not said: such rows, which are few, are sorted whole.
    tied = (similarity >= top.values[:, -1:]).sum(1) > count
    places[tied] = similarity[tied].sort(dim=1, descending=True, stable=True).indices[:, :count]
    return places


def _search(queries: Tensor, block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Similarities to a block of the gallery, and places in it, so that a stable sort keeps the earlier one first."""
    if queries.device.type == "cpu" and queries.dtype == torch.float32 and find_spec("faiss") is not None:
        import faiss

        index = faiss.IndexFlatIP(block.shape[1])
        index.add(block.numpy())
        wanted = min(count + 1, len(block))  # one more shows whether a tie is cut at the last place
        similarity, places = (torch.from_numpy(part) for part in index.search(queries.numpy(), wanted))
        cut = (similarity[:, count - 1] <= similarity[:, wanted - 1]) & (wanted > count)
        places, order = places[:, :count].sort(dim=1)
        similarity = similarity[:, :count].gather(1, order)
        if cut.any():
            whole = queries[cut] @ block.T
            kept = _first(whole, count).sort(dim=1).values
            similarity[cut], places[cut] = whole.gather(1, kept), kept
        return similarity, places
    similarity = queries @ block.T
    return similarity, torch.arange(block.shape[0], device=block.device).expand(len(queries), -1)


def _rows(queries: int, gallery: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, gallery))
    return (slice(start, min(start + step, queries)) for start in range(0, queries, step))


def _normalised(embeddings: Tensor) -> Tensor:
    length = embeddings.norm(dim=1, keepdim=True)
    wrong = ~(length.isfinite() & (length > 0)).flatten()
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise UserError(f"embedding {place} is zero or holds a value that is no number; {int(wrong.sum())} are so")
    return embeddings / length


def _judge_rows(distances: Tensor, queries: Sightings, gallery: Sightings, area: Area, rows: slice) -> Ranking:
    if not distances.isfinite().all():
        row, column = (
            int(place) + offset
            for place, offset in zip((~distances.isfinite()).nonzero()[0], (rows.start, 0), strict=True)
        )
        raise UserError(f"the distance of query {row} to picture {column} of the gallery is no number")
    identities, cameras = queries.identities[rows, None], queries.cameras[rows, None]
    same = identities == gallery.identities
    junk = (same & (cameras == gallery.cameras)) | (gallery.identities == JUNK)
    right = same & ~junk
    judged = right.any(1)
    distances, right, junk = distances[judged], right[judged], junk[judged]

    total = right.sum(1)
    most = int(total.max()) if len(total) else 0
    nearest_right = distances.where(right, torch.inf).topk(most, dim=1, largest=False).values
    wrong = distances.where(~(right | junk), torch.inf).sort(dim=1).values
    found = torch.arange(1, most + 1, device=total.device)
    # Before a right picture stand the right ones that are nearer, and the wrong ones that are no farther.
    place = found + torch.searchsorted(wrong, nearest_right, right=True)
    precision = found / place.double()
    if area == "trapezoid":
        before = (found - 1) / (place - 1).clamp(min=1).double()
        precision = (precision + before.where(place > 1, 1.0)) / 2
    there = found <= total[:, None]
    ends = place.gather(1, (total - 1)[:, None])[:, 0] if most else total
    return Ranking(judged, precision.where(there, 0.0).sum(1) / total, place[:, 0] if most else total, ends, total)


def _joined(parts: list[Ranking]) -> Ranking:
    names = ("judged", "precision", "first", "last", "right")
    return Ranking(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
