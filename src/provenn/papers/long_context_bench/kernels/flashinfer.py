"""FlashInfer's attention over blocks of any size, where flashinfer is installed: forward alone."""

from importlib import import_module

import torch
from torch import Tensor

from provenn.core.narrowing import of_kind
from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel
from provenn.papers.long_context_bench.sparse import BlockSparse

WORKSPACE = 128 * 2**20  # bytes


class FlashInfer(Kernel):
    """`VariableBlockSparseAttentionWrapper`: one choice of blocks a head of keys."""

    name, about, sparse, differentiable = "flashinfer", "FlashInfer, variable block-sparse", True, False
    package, on_gpu_only, half_only = "flashinfer", True, True

    def refusal(self, case: Case) -> str:
        if not isinstance(case.mask, BlockSparse):
            return "takes block-sparse masks alone"
        if case.mask.heads not in (1, case.kv_heads):
            return f"blocks are chosen a head of keys, and the mask has {case.mask.heads} heads for {case.kv_heads}"
        return f"takes one sequence, and the case has {case.batch}" if case.batch > 1 else super().refusal(case)

    def build(self, case: Case) -> Attend:
        mask = of_kind(case.mask, BlockSparse, "mask")
        package = import_module("flashinfer")
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=case.device)
        wrapper = package.sparse.VariableBlockSparseAttentionWrapper(workspace)
        sizes = torch.tensor(mask.edges, dtype=torch.int32).diff().expand(case.kv_heads, -1).contiguous()
        wrapper.plan(
            block_mask_map=mask.blocks.expand(case.kv_heads, -1, -1).contiguous(),
            block_row_sz=sizes,
            block_col_sz=sizes,
            num_qo_heads=case.heads,
            num_kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            q_data_type=case.dtype,
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return wrapper.run(q[0], k[0], v[0]).unsqueeze(0)

        return attend


KERNEL = FlashInfer()
