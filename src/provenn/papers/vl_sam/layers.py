"""From a decoder's attention to a map of an object: head weights, column factors and the flow (section 3.2).

N is the length of the sequence of image, prompt and answer, H the heads, L the layers. S^{l,h}, N × N, says how much
each token looks at each other one; its rows sum to 1, and later columns are 0.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Form = Literal["equation", "figure", "rollout"]
Place = Literal["layer", "final", "accumulated", "none"]
Length = Literal["sequence", "layers"]
Keys = Literal["all", "visual"]
Norm = Literal["none", "max"]
FORMS, LENGTHS = ("equation", "figure", "rollout"), ("sequence", "layers")
PLACES = ("layer", "final", "accumulated", "none")
Heads = Float[Tensor, "*batch heads tokens tokens"]
Square = Float[Tensor, "*batch tokens tokens"]


def head_weights(
    attention: Heads, *, images: Bool[Tensor, " tokens"] | None = None, norm: Norm = "none"
) -> Float[Tensor, "*batch heads"]:
    """W, of each head the mean over queries of the largest attention to any key (equation 1).

    Args:
        attention: S^l of a layer.
        images: keys that count, such as those of the image; by default all, as in the paper.
        norm: "max" divides by the largest head's weight, which the paper does not.

    >>> head_weights(torch.eye(3)[None]).tolist()
    [1.0]
    """
    if norm not in ("none", "max"):
        raise ValueError(f"norm must be none or max, got {norm!r}")
    seen = attention if images is None else attention.masked_fill(~images, 0)
    weights = seen.amax(dim=-1).mean(dim=-1)
    return weights / weights.amax(dim=-1, keepdim=True).clamp_min(1e-12) if norm == "max" else weights


def aggregate(
    attention: Heads,
    *,
    weighted: bool = True,
    images: Bool[Tensor, " tokens"] | None = None,
    norm: Norm = "none",
) -> Square:
    """S′ = mean over heads of W · S (equation 2), W not normalised over heads.

    Args:
        attention: S^l of a layer.
        weighted: whether heads have weights; else their plain mean.
        images, norm: as in `head_weights`.
    """
    if not weighted:
        return attention.mean(dim=-3)
    weights = head_weights(attention, images=images, norm=norm)
    return torch.einsum("...h,...hij->...ij", weights, attention) / attention.shape[-3]


def column_factor(
    tokens: int, layers: int = 1, *, length: Length = "sequence", like: Tensor | None = None
) -> Float[Tensor, " tokens"]:
    """1 − (L₀ − 1) / L of each column, L₀ = N − j the number of its entries that the causal mask leaves.

    The paper's L is the number of layers, by which columns become negative. Read as the length of the sequence, the
    factor of column j is (j + 1) / N.

    Args:
        tokens: N.
        layers: the number of layers, which length="layers" divides by.
        length: what L is.
        like: gives type and device.

    >>> column_factor(4).tolist()
    [0.25, 0.5, 0.75, 1.0]
    """
    if length not in LENGTHS:
        raise ValueError(f"length must be one of {', '.join(LENGTHS)}, got {length!r}")
    like = torch.empty(0) if like is None else like
    left = torch.arange(tokens, 0, -1, dtype=like.dtype, device=like.device)
    return 1 - (left - 1) / (tokens if length == "sequence" else layers)


def flow_matrix(
    layers: Sequence[Square], *, form: Form = "equation", place: Place = "none", factor: Tensor | None = None
) -> Square:
    """The whole flow, in O(L N³): the definition. `flow_rows` gives rows of it in O(L N²) each.

    - equation: S̃^l = (I + S′^l)(I + S̃^{l−1}), S̃^0 = 0 (equation 3)
    - figure: (I + S′^1) … (I + S′^L), as figure 4 draws it
    - rollout: (I + S′^L) … (I + S′^1), as the method that the paper cites

    Args:
        layers: S′ of each layer, the first layer first.
        form: which product.
        place: where columns are multiplied by `factor`: in each S′, in the final product, after each step, or nowhere.
        factor: of the columns.
    """
    _check(form, place)
    identity = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype, device=layers[0].device)
    scale = identity.new_ones(len(identity)) if factor is None or place == "none" else factor
    inside, after = (scale if place == where else torch.ones_like(scale) for where in ("layer", "accumulated"))
    total = torch.zeros_like(identity) if form == "equation" else identity
    for layer in layers:
        step = identity + layer * inside
        before = identity + total if form == "equation" else total
        total = before @ step if form == "figure" else step @ before
        total = total * after
    return total * scale if place == "final" else total


def flow_rows(
    layer: Callable[[int], Square],
    depth: int,
    rows: Float[Tensor, "*batch rows tokens"],
    *,
    form: Form = "equation",
    place: Place = "layer",
    factor: Float[Tensor, " tokens"] | None = None,
    first: int = 0,
) -> Float[Tensor, "*batch rows tokens"]:
    """Rows of the flow, up to a positive scale of each, with one layer in memory at a time.

    v ← v (I + S′^l) from the last layer down; the sum of all v is the row of the equation, the last v that of rollout.
    The figure's product runs from the first layer up.

    Args:
        layer: S′ of a layer by its number from 0; asked for once each.
        depth: L.
        rows: weights of the tokens whose rows are taken together, such as one-hot ones.
        form, place, factor: as in `flow_matrix`.
        first: layers before this one are left out.
    """
    _check(form, place)
    if not 0 <= first < depth:
        raise ValueError(f"first must be from 0 to {depth - 1}, got {first}")
    v, kind = rows, rows.dtype
    v = v.to(torch.promote_types(kind, torch.float32))  # one head adds at most W/H, which half precision loses
    scale = v.new_ones(v.shape[-1]) if factor is None or place == "none" else factor.to(v.dtype)
    total, power = torch.zeros_like(v), torch.ones_like(scale)
    numbers = range(first, depth) if form == "figure" else range(depth - 1, first - 1, -1)
    for number in numbers:
        step = layer(number).to(v.dtype)
        moved = v @ step
        v = v + (moved * scale if place == "layer" else moved)
        if place == "accumulated":
            power = power * scale
            v = v * scale if form == "figure" else v
        total = total + (v * power if form == "equation" else 0)
        # Products over layers grow up to 2^L; map and sum are scaled together, so their ratio stays.
        size = v.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
        v, total = v / size, total / size
    last = v * power if place == "accumulated" and form == "rollout" else v
    found = total if form == "equation" else last
    return (found * scale if place == "final" else found).to(kind)


def _check(form: str, place: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if place not in PLACES:
        raise ValueError(f"place must be one of {', '.join(PLACES)}, got {place!r}")


def min_max(maps: Float[Tensor, "maps rows columns"]) -> Float[Tensor, "maps rows columns"]:
    """Each map brought to 0…1; a constant one is 0."""
    flat = maps.flatten(1)
    low, high = flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
    spread = high - low
    return torch.where(spread > 0, (maps - low) / torch.where(spread > 0, spread, 1), 0)


def flatness(maps: Float[Tensor, "maps rows columns"]) -> Float[Tensor, " maps"]:
    """Entropy of each map as shares of its mass, from 0 (one place) to 1 (the same everywhere)."""
    flat = maps.flatten(1).clamp_min(0)
    mass = flat.sum(1, keepdim=True)
    shares = torch.where(mass > 0, flat / torch.where(mass > 0, mass, 1), 1 / flat.shape[1])
    entropy = torch.special.entr(shares).sum(1)
    return entropy / torch.tensor(float(max(2, flat.shape[1]))).log().to(entropy)
