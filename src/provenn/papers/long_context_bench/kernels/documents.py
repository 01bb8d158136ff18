"""PyTorch's fused attention document by document: what packed sequences cost where nothing is made for them."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from provenn.core.narrowing import of_kind
from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel
from provenn.papers.long_context_bench.masks import Mask


class Documents(Kernel):
    """One call of scaled_dot_product_attention a document, without any mask tensor."""

    name, about = "documents", "scaled_dot_product_attention, one call a document"
    masks = ("full", "causal", "full_document", "causal_document")

    def build(self, case: Case) -> Attend:
        mask = of_kind(case.mask, Mask, "mask")
        causal, lengths = mask.name.startswith("causal"), list(mask.documents or (mask.length,))
        grouped = case.heads != case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
            run = scaled_dot_product_attention
            outputs = [run(qs, ks, vs, is_causal=causal, enable_gqa=grouped) for qs, ks, vs in parts]
            return torch.cat(outputs, dim=2)

        return attend


KERNEL = Documents()
