"""The benchmark's masks, as what is spread over processes."""

from provenn.distributed import Pattern, Slice
from provenn.papers.long_context_bench.masks import Mask


def pattern_of(mask: Mask) -> Pattern:
    """A mask's slices and documents; one whose documents keep to themselves is seen to be one."""
    slices = [Slice(*part.q, *part.k, part.kind) for part in mask.slices if part.area]
    return Pattern.of_slices(slices, mask.length, mask.documents)
