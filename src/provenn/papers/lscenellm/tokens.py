"""From a cloud to the tokens of a scene: sparse ones, and dense ones around each (section 3.1)."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from provenn.ops.point_sampling import farthest_points, nearest_points


class SceneTokens(NamedTuple):
    """Features of places in scenes, before they are mapped to the width of a language model.

    Args:
        sparse: of V places of the whole scene.
        centres: where these are.
        dense: of T places around each of them.
        dense_centres: where these are.
        low, high: the least and the largest coordinates of each scene's points.
    """

    sparse: Float[Tensor, "batch parents features"]
    centres: Float[Tensor, "batch parents 3"]
    dense: Float[Tensor, "batch parents children features"]
    dense_centres: Float[Tensor, "batch parents children 3"]
    low: Float[Tensor, "batch 3"]
    high: Float[Tensor, "batch 3"]


def build_tokens(
    points: Float[Tensor, "batch points 3"],
    features: Float[Tensor, "batch points features"],
    *,
    parents: int = 128,
    group: int = 384,
    children: int = 4,
    neighbourhood: int = 1500,
    sparse_points: int = 40_000,
) -> SceneTokens:
    """Sparse and dense tokens of scenes.

    - sparse: V farthest points of the first `sparse_points`; of each the mean features of its k nearest of these
    - dense: T farthest points of the m nearest of all points to a sparse one; of each the mean features of its
      ⌊m / T⌋ nearest among these m

    Shifts, turns and scales of a scene change no token, so it need not be brought to the unit sphere first. The first
    farthest point is the first point given, and around a sparse token the nearest point; the authors begin there with
    any of the neighbourhood.

    Args:
        points: of each scene, in random order, so that the first are a sample of all.
        features: of the points.
        parents: V.
        group: k; at most all points that are sampled.
        children: T.
        neighbourhood: m; at most all points.
        sparse_points: how many points sparse tokens are made of.

    Raises:
        ValueError: fewer points than tokens.

    >>> points = torch.randn(1, 200, 3)
    >>> tokens = build_tokens(points, points, parents=5, group=20, neighbourhood=40)
    >>> tokens.sparse.shape, tokens.dense.shape
    (torch.Size([1, 5, 3]), torch.Size([1, 5, 4, 3]))
    """
    for name, number in (("parents", parents), ("group", group), ("children", children)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if sparse_points < parents:
        raise ValueError(f"sparse_points must be at least the {parents} parents, got {sparse_points}")
    points = points.to(torch.promote_types(points.dtype, torch.float32))  # distances are compared
    few, some = points[:, :sparse_points], features[:, :sparse_points]
    hood = min(neighbourhood, points.shape[1])
    if few.shape[1] < parents or hood < children:
        raise ValueError(
            f"expected at least {parents} points for as many sparse tokens, and {children} around each, got "
            f"{points.shape[1]} points and neighbourhood={neighbourhood}"
        )
    centres = _at(few, farthest_points(few, parents))
    sparse = _mean_of(some, nearest_points(few, centres, min(group, few.shape[1])))
    dense, inner = dense_around(points, features, centres, children=children, neighbourhood=hood)
    return SceneTokens(sparse, centres, dense, inner, points.amin(dim=1), points.amax(dim=1))


def dense_around(
    points: Float[Tensor, "batch points 3"],
    features: Float[Tensor, "batch points features"],
    centres: Float[Tensor, "batch parents 3"],
    *,
    children: int = 4,
    neighbourhood: int = 1500,
) -> tuple[Float[Tensor, "batch parents children features"], Float[Tensor, "batch parents children 3"]]:
    """Dense tokens around places of a scene, and where they are; whatever sparse tokens these places have.

    Args:
        points, features, children, neighbourhood: as in `build_tokens`.
        centres: the places, such as the middles of objects.
    """
    points, centres = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (points, centres))
    parents = centres.shape[1]
    hood = min(neighbourhood, points.shape[1])
    around = nearest_points(points, centres, hood)  # nearest first, so that the search for the farthest begins there
    local = _at(points, around.flatten(1)).unflatten(1, around.shape[1:]).flatten(0, 1)
    inner = _at(local, farthest_points(local, children))
    members = nearest_points(local, inner, hood // children).flatten(1)
    members = around.flatten(0, 1).gather(1, members).view(points.shape[0], parents * children, hood // children)
    dense = _mean_of(features, members).unflatten(1, (parents, children))
    return dense, inner.view(points.shape[0], parents, children, points.shape[2])


def _at(x: Float[Tensor, "batch points channels"], index: Int64[Tensor, "batch chosen"]) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _mean_of(
    features: Float[Tensor, "batch points features"], index: Int64[Tensor, "batch groups members"]
) -> Float[Tensor, "batch groups features"]:
    """Means over groups of points, without a copy of each point for each group that it is in."""
    batch, total = features.shape[:2]
    rows = index + torch.arange(batch, device=index.device)[:, None, None] * total
    mean = F.embedding_bag(rows.flatten(0, 1), features.flatten(0, 1), mode="mean")
    return mean.view(batch, index.shape[1], features.shape[2])


def box_text(
    low: Float[Tensor, " 3"], high: Float[Tensor, " 3"], box_low: Float[Tensor, " 3"], box_high: Float[Tensor, " 3"]
) -> str:
    """A box as the authors write it: centre and size in 255ths of the scene, rounded down.

    Args:
        low, high: of the scene's points.
        box_low, box_high: of the box.

    >>> zero, one = torch.zeros(3), torch.ones(3)
    >>> box_text(zero, 2 * one, zero, one)
    '<obj>63,63,63,127,127,127</obj>'
    """
    size = high - low
    if not bool((size > 0).all()):
        raise ValueError(f"the scene must be wider than 0 on each axis, got {size.tolist()}")
    centre = ((box_low + box_high) / 2 - low) / size
    numbers = torch.cat([centre, (box_high - box_low) / size])
    return f"<obj>{','.join(str(int(255 * number)) for number in numbers.tolist())}</obj>"
