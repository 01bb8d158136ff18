"""The benchmark's masks, as what is spread over processes."""

from provenn.distributed import Pattern
from provenn.papers.long_context_bench.masks import Mask


def pattern_of(mask: Mask) -> Pattern:
    """A mask's slices and documents; one whose documents keep to themselves is seen to be one."""
    return Pattern.of_slices([part for part in mask.slices if part.area], mask.length, mask.documents)
