"""The "mixture" of the authors' library: weights of a product of Gaussians, normalised along an axis."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.ops.autograd import at_least_single
from provenn.papers.gaam.layers import FLOOR
from provenn.papers.gaam.slices import (
    align_mask,
    check_slices,
    count_from_end,
    join_slices,
    moments,
    seen_slices,
    split_slices,
)


def equal_gaussian(
    offsets: Float[Tensor, "*heads gaussians"], widths: Float[Tensor, "*heads gaussians"]
) -> tuple[Float[Tensor, "*heads"], Float[Tensor, "*heads"]]:
    """The one Gaussian that a product of some is, up to a factor: its offset m and its precision 1/c².

    1/c² = Σ 1/c_i²,  m = c² Σ m_i / c_i²
    """
    precisions = at_least_single(widths).square().reciprocal()
    precision = precisions.sum(dim=-1)
    return (precisions * at_least_single(offsets)).sum(dim=-1) / precision, precision


class GaussianMixtureAttention(nn.Module):
    """Weigh the positions of an axis by a product of Gaussians around their mean: the "mixture" of the library.

    Of each head's slice of the axis, with m and c of N Gaussians:

    w = softmax(−Σ_i (x − μ − m_i)² / (2 c_i² s²)),  s² = σ² + 1e-8 (σ² by n − 1),  y = x ⊙ w   (Algorithms 2 to 4)

    Normalised over the slice, factors before the Gaussians cancel, and their product is one Gaussian
    (`equal_gaussian`): N of them give no other weights than one. It is computed as that one, in time and memory that do
    not grow with N.

    Args:
        heads: H contiguous slices of the axis; the last takes the rest.
        gaussians: N.
        axis: of the input.
        combine: "product", or "sum": w ∝ Σ_i π_i exp(−(x − μ − m_i)² / (2 c_i² s²)) with learned shares π, as in the
            library's first release, which is a mixture.
        official: compute as the library does, step by step, with factors and a floor under the sum: the product
            underflows where Gaussians are many or entries far off, and all weights are then 0. With it a
            `padding_value` hides what equals it, as there: it counts as zero in mean and variance, shares in the
            normalisation, and passes as it is.
        padding_value: see above; with `official` alone.

    Shapes: any with at least two axes, to the same. Parameters: 2·N·H, and N·H more of a sum.
    """

    def __init__(
        self,
        heads: int = 8,
        gaussians: int = 4,
        *,
        axis: int = 1,
        combine: str = "product",
        official: bool = False,
        padding_value: float | None = None,
    ):
        check_whole(heads=heads, gaussians=gaussians, axis=axis)
        super().__init__()
        for name, value in (("heads", heads), ("gaussians", gaussians)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if combine not in ("product", "sum"):
            raise ValueError(f"combine must be 'product' or 'sum', got {combine!r}")
        if official and combine == "sum":
            raise ValueError("the library as it stands multiplies: official=True goes with combine='product'")
        if padding_value is not None and not official:
            raise ValueError("padding_value goes with official=True: give a mask instead")
        self.heads, self.gaussians, self.axis = heads, gaussians, axis
        self.combine, self.official, self.padding_value = combine, official, padding_value
        self.offset = nn.Parameter(torch.zeros(heads, gaussians))
        self.width = nn.Parameter(torch.randn(heads, gaussians).exp())
        if combine == "sum":
            self.share = nn.Parameter(torch.zeros(heads, gaussians))

    def weights(self, x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*mask"] | None = None) -> Float[Tensor, "*shape"]:
        """w, which sums to 1 over every head's slice; 0 where nothing may be seen; in float32 at least."""
        if x.dim() < 2:
            raise ValueError(f"expected at least two axes, got {tuple(x.shape)}")
        axis = count_from_end(self.axis, x)
        mask = align_mask(mask, x, axis, whole=True)
        y = at_least_single(x).movedim(axis, -1)
        check_slices(y.shape[-1], self.heads)
        n, heads = y.shape[-1], self.heads
        if self.official:
            if mask is not None:
                raise ValueError("official=True takes a padding_value and no mask")
            padded = None if self.padding_value is None else y == self.padding_value
            return join_slices(self._as_released(y, padded), n).movedim(-1, axis)
        seen = seen_slices(None if mask is None else mask.movedim(axis, -1), y, heads)
        parts = split_slices(y, heads)
        mean, variance = moments(parts, seen, correction=1)
        logits = self._logits((parts - mean) / (variance + FLOOR).sqrt(), (variance + FLOOR).sqrt())
        if seen is None:
            return join_slices(logits.softmax(dim=-1), n).movedim(-1, axis)
        # Finite where nothing is seen: a NaN would reach the gradient of what is.
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        return join_slices(torch.where(seen, logits.softmax(dim=-1), 0), n).movedim(-1, axis)

    def _logits(self, deviation: Tensor, spread: Tensor) -> Tensor:
        """log w up to a constant, of (…, heads, slice) in units of the spread; offsets are in the input's."""
        if self.combine == "product":
            offset, precision = equal_gaussian(self.offset, self.width)
            return -(deviation - offset[:, None] / spread).square() * precision[:, None] / 2
        precision = at_least_single(self.width).square().reciprocal()[:, None]
        apart = deviation.unsqueeze(-1) - at_least_single(self.offset)[:, None] / spread.unsqueeze(-1)
        shares = at_least_single(self.share).log_softmax(dim=-1)[:, None]
        return torch.logsumexp(shares - apart.square() * precision / 2, dim=-1)

    def _as_released(self, y: Tensor, padded: Tensor | None) -> Tensor:
        """The library's arithmetic on all heads and Gaussians at once."""
        seen = seen_slices(None, y, self.heads)
        parts = split_slices(y, self.heads)
        known = parts if padded is None else split_slices(torch.where(padded, 0, y), self.heads)
        mean, variance = moments(known, seen, correction=1)
        away = (parts - mean).unsqueeze(-1) - self.offset[:, None]
        square = self.width.square()[:, None]
        gaussian = torch.exp(-(away / (variance + FLOOR).sqrt().unsqueeze(-1)).square() / (2 * square))
        product = (gaussian / (2 * math.pi * square).sqrt()).prod(dim=-1)
        product = product if seen is None else torch.where(seen, product, 0)
        return product / product.sum(dim=-1, keepdim=True).clamp(min=FLOOR)

    def forward(
        self, x: Float[Tensor, "*shape"], *, mask: Bool[Tensor, "*mask"] | None = None, return_weights: bool = False
    ) -> Float[Tensor, "*shape"] | tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """The input times its weights.

        Args:
            x: what is weighed.
            mask: True where an entry may be seen: (examples, positions of the axis), or of the shape of `x`, with its
                last axis or without. What may not be seen has no part in mean, variance and normalisation, and
                becomes 0.
            return_weights: whether the weights are given too.

        Raises:
            ValueError: an axis that there is not, more heads than positions, another mask, or one that leaves an
                example nothing to see.
        """
        weights = self.weights(x, mask)
        y = x * weights.to(x.dtype)
        if self.padding_value is not None:
            y = torch.where(x == self.padding_value, x, y)
        return (y, weights) if return_weights else y

    def extra_repr(self) -> str:
        return f"heads={self.heads}, gaussians={self.gaussians}, axis={self.axis}, combine={self.combine!r}"


class GaussianMixtureBlock(nn.Module):
    """Layers of `GaussianMixtureAttention`, each added to what it reads: x ← x + x ⊙ w(x).

    Args:
        axes: a layer's axis.
        heads, gaussians: a layer's each, or one number for all.
        options: as `GaussianMixtureAttention` takes them.

    Shapes: as of the layers. Parameters: Σ 2·N·H.
    """

    def __init__(
        self, axes: Sequence[int], heads: int | Sequence[int] = 8, gaussians: int | Sequence[int] = 4, **options: Any
    ):
        super().__init__()
        each = [[value] * len(axes) if isinstance(value, int) else list(value) for value in (heads, gaussians)]
        if not axes or any(len(values) != len(axes) for values in each):
            sizes = ", ".join(str(len(values)) for values in (axes, *each))
            raise ValueError(f"axes, heads and gaussians must be as many as layers, at least one; got {sizes}")
        self.layers = nn.ModuleList(
            GaussianMixtureAttention(h, n, axis=axis, **options) for axis, h, n in zip(axes, *each)
        )

    def forward(
        self, x: Float[Tensor, "*shape"], *, mask: Bool[Tensor, "*mask"] | None = None, return_weights: bool = False
    ) -> Float[Tensor, "*shape"] | tuple[Float[Tensor, "*shape"], list[Float[Tensor, "*shape"]]]:
        """`mask` as of the layers; with `return_weights` the weights of each."""
        every = []
        for layer in self.layers:
            y, weights = layer(x, mask=mask, return_weights=True)
            x = x + y
            every.append(weights)
        return (x, every) if return_weights else x
