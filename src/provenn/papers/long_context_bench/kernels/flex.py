"""PyTorch's flex_attention, compiled, over a block mask made from the slices."""

from functools import cache
from typing import Any

import torch

from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel

BLOCK = 128


@cache
def _compiled() -> Any:
    from torch._functorch import config
    from torch.nn.attention.flex_attention import flex_attention

    # A graph that is walked backward more than once may not give its buffers away.
    config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False)


class Flex(Kernel):
    """Compiled once a mask's shape; on a CPU PyTorch has its forward pass alone.

    Args:
        compiled: else the operator's plain form runs, which makes all scores.
    """

    name, about, sparse = "flex", "flex_attention, compiled, block mask", True

    def __init__(self, compiled: bool = True):
        self.compiled = compiled

    def refusal(self, case: Case) -> str:
        if case.backward and case.device.type == "cpu":
            return "has no backward pass on a CPU"
        if self.compiled and case.device.type == "cpu" and case.head_dim < 16:
            return f"compiles head dims from 16 on, and the case has {case.head_dim}"
        return super().refusal(case)

    def build(self, case: Case) -> Attend:
        if self.compiled:
            attend = _compiled()
        else:
            from torch.nn.attention.flex_attention import flex_attention as attend
        mask = case.mask.block_mask(BLOCK, case.device)
        options = {"block_mask": mask, "enable_gqa": case.heads != case.kv_heads}
        return lambda q, k, v: attend(q, k, v, **options)


KERNEL = Flex()
