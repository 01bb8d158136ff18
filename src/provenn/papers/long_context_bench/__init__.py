"""Long-Context Attention Benchmark: From Kernel Efficiency to Distributed Context Parallelism (arXiv:2510.17896)."""

from provenn.distributed.slices import Slice
from provenn.papers.long_context_bench.masks import MASKS, Mask, NotRepresentable, from_slices, make_mask

__all__ = ["MASKS", "Mask", "NotRepresentable", "Slice", "from_slices", "make_mask"]
