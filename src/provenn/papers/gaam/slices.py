"""An axis that heads share in slices: masks of it, means and variances along it."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from provenn.ops.autograd import is_transformed


def count_from_end(axis: int, x: Tensor) -> int:
    """An axis counted from the end.

    Raises:
        ValueError: there is none.
    """
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis {axis} of {tuple(x.shape)}: expected {-x.dim()} to {x.dim() - 1}")
    return axis if axis < 0 else axis - x.dim()


def align_mask(mask: Tensor | None, x: Tensor, axis: int, *, whole: bool = False) -> Tensor | None:
    """A mask with as many axes as `x`, of size 1 where it is the same for all.

    Args:
        mask: (examples, positions of the axis), or of the shape of `x` without its last axis, or with it.
        x: what is masked.
        axis: along which positions stand.
        whole: whether features of one position may differ.

    Raises:
        ValueError: another shape or type, or a mask that leaves an example nothing to see.
    """
    if mask is None:
        return None
    short = (x.shape[0], x.shape[axis])
    shapes = {"(all axes but features)": tuple(x.shape[:-1])}
    if axis != -x.dim():  # which is that of examples
        shapes = {"(examples, positions)": short, **shapes}
    if whole:
        shapes["(all axes)"] = tuple(x.shape)
    tensor = isinstance(mask, Tensor)
    if not tensor or mask.dtype != torch.bool or tuple(mask.shape) not in shapes.values():
        wanted = " or ".join(f"{name} = {shape}" for name, shape in shapes.items())
        kind = (
            f"{str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}" if tensor else type(mask).__name__
        )
        raise ValueError(f"mask must be bool of shape {wanted}, True where there is something to see, got {kind}")
    if whole and mask.shape == x.shape:
        aligned = mask
    elif mask.shape == x.shape[:-1]:
        # Of features that are weighed themselves, all of a position are hidden.
        aligned = mask.unsqueeze(-1).expand(*mask.shape, x.shape[-1] if axis == -1 else 1)
    else:
        sizes = [1] * x.dim()
        sizes[0], sizes[axis] = short
        aligned = mask.view(sizes)
    # A tracer and the transforms of torch.func have no values to look at.
    looks = not (torch.compiler.is_compiling() or is_transformed() or mask.is_meta)
    # Where features differ, one of them may be hidden everywhere, as long as the example has others.
    rest = tuple(range(1, x.dim())) if whole and axis != -x.dim() else axis
    if looks and not bool(aligned.any(dim=rest).all()):
        raise ValueError("mask hides every position of an example: at least one must be seen")
    return aligned


def moments(
    y: Float[Tensor, "*shape"], seen: Tensor | None = None, *, correction: int = 0
) -> tuple[Float[Tensor, "*mean"], Float[Tensor, "*mean"]]:
    """Mean and variance along the last axis, which stays with size 1, of what is seen.

    The variance is the mean of squared deviations: as large as E x² − (E x)², which cancels where the mean is large.
    """
    if seen is None:
        mean = y.mean(dim=-1, keepdim=True)
        return mean, (y - mean).square().sum(dim=-1, keepdim=True) / torch.sym_max(y.shape[-1] - correction, 1)
    count = seen.sum(dim=-1, keepdim=True)
    mean = torch.where(seen, y, 0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    square = torch.where(seen, y - mean, 0).square().sum(dim=-1, keepdim=True)
    return mean, square / (count - correction).clamp(min=1)


# Heads share an axis of n in contiguous slices of n // heads positions, of which the last takes what is over.


def check_slices(n: int, heads: int) -> None:
    """Are there enough positions?

    Raises:
        ValueError: more heads than positions.
    """
    if heads > n:
        raise ValueError(f"heads must be at most the size of the axis they share, {n}, got {heads}")


def _are_even(n: int, heads: int) -> bool:
    """Whether slices are known to be of one length: a compiler, whose sizes may be open, knows it of one head alone."""
    return heads == 1 or (not torch.compiler.is_compiling() and n % heads == 0)


def split_slices(x: Tensor, heads: int) -> Tensor:
    """(…, n) to (…, heads, longest), shorter slices filled up with zeros at their end."""
    size, over = x.shape[-1] // heads, x.shape[-1] % heads
    if _are_even(x.shape[-1], heads):
        return x.unflatten(-1, (heads, size))
    first, last = x[..., : size * (heads - 1)], x[..., size * (heads - 1) :]
    first = F.pad(first.unflatten(-1, (heads - 1, size)), (0, over))
    return torch.cat([first, last.unsqueeze(-2)], dim=-2)


def join_slices(x: Tensor, n: int) -> Tensor:
    """(…, heads, longest) back to (…, n)."""
    if _are_even(n, x.shape[-2]):
        return x.flatten(-2)
    size = n // x.shape[-2]
    return torch.cat([x[..., :-1, :size].flatten(-2), x[..., -1, :]], dim=-1)


def seen_slices(mask: Tensor | None, x: Tensor, heads: int) -> Tensor | None:
    """Which positions of the slices of `x` (…, n) exist and may be seen; None where all."""
    n = x.shape[-1]
    if mask is None and _are_even(n, heads):
        return None
    whole = torch.ones((1,) * (x.dim() - 1) + (n,), dtype=torch.bool, device=x.device)
    return split_slices((whole if mask is None else mask).float(), heads) > 0
