"""Block-sparse attention in plain torch: for each block of queries the keys that a head keeps are gathered."""

import torch
from torch import Tensor

from provenn.core.narrowing import of_kind
from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel
from provenn.papers.long_context_bench.sparse import BlockSparse


class Gathered(Kernel):
    """Blocks of any size, each head its own; scores are kept for the backward pass, as many as the mask keeps."""

    name, about, sparse = "gathered", "block-sparse, plain torch, gathered keys", True

    def refusal(self, case: Case) -> str:
        if not isinstance(case.mask, BlockSparse):
            return "takes block-sparse masks alone"
        return super().refusal(case)

    def build(self, case: Case) -> Attend:
        mask = of_kind(case.mask, BlockSparse, "mask")
        edges, group = mask.edges, case.heads // case.kv_heads
        blocks = mask.blocks.expand(case.heads, -1, -1)
        kept = [_tokens(blocks[:, row], mask.number).to(case.device) for row in range(len(edges) - 1)]
        whose = torch.arange(case.heads, device=case.device).unsqueeze(1) // group  # the key head of each head

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outputs = []
            for row, tokens in enumerate(kept):
                queries = q[:, :, edges[row] : edges[row + 1]] * q.shape[-1] ** -0.5
                index, missing = tokens.clamp(min=0), (tokens < 0).unsqueeze(1)
                scores = (queries @ k[:, whose, index].mT).masked_fill(missing, -torch.inf)
                outputs.append(scores.softmax(dim=-1) @ v[:, whose, index])
            return torch.cat(outputs, dim=2)

        return attend


def _tokens(kept: Tensor, number: Tensor) -> Tensor:
    """(heads, blocks) to (heads, most): the tokens of each head's blocks, filled up with −1."""
    inside = kept[:, number]
    most = int(inside.sum(-1).max())
    order = torch.argsort(inside.int(), dim=-1, descending=True, stable=True)[:, :most]
    return order.masked_fill(~inside.gather(1, order), -1)


KERNEL = Gathered()
