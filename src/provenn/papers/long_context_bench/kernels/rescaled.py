"""Our attention with rescaled weights, all factors 1: one softmax over keys that stand twice."""

from torch import Tensor

from provenn.ops.rescaled_attention import rescaled_attention
from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel


class Rescaled(Kernel):
    """`provenn.ops.rescaled_attention`, for what its generality costs where none of it is used."""

    name, about, sparse = "rescaled", "provenn.ops.rescaled_attention, dense mask", True

    def build(self, case: Case) -> Attend:
        visible = case.mask.dense(case.device)
        visible = visible[None] if visible.dim() == 3 else visible[None, None]
        group = case.heads // case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            return rescaled_attention(q, k, v, visible=visible)

        return attend


KERNEL = Rescaled()
