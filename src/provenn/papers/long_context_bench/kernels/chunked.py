"""Our attention to chunks, with chunks of one token: causal attention."""

from torch import Tensor

from provenn.ops.chunk_attention import chunk_attention
from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel


class Chunked(Kernel):
    """`provenn.ops.chunk_attention` at its limit: every earlier token is a finished chunk."""

    name, about, masks = "chunked", "provenn.ops.chunk_attention, chunks of 1", ("causal",)

    def build(self, case: Case) -> Attend:
        group = case.heads // case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return chunk_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), chunk=1)

        return attend


KERNEL = Chunked()
