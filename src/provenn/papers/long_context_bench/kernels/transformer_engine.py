"""TransformerEngine's DotProductAttention with cuDNN inside, where transformer_engine is installed."""

import os
from importlib import import_module

from torch import Tensor

from provenn.core.narrowing import of_kind
from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel
from provenn.papers.long_context_bench.kernels.flash_attn import PACKED, WINDOWS, packing, window_of
from provenn.papers.long_context_bench.masks import Mask


class TransformerEngine(Kernel):
    """Packed layout (tokens, heads, dim) for every mask, as the authors' benchmark calls it."""

    name, about = "te", "TransformerEngine, cuDNN inside"
    package, on_gpu_only, half_only, tokens_first = "transformer_engine", True, True, True
    masks = ("full", "causal", *WINDOWS, *PACKED)

    def build(self, case: Case) -> Attend:
        # Read when the module picks a back end: without it FlashAttention may be taken, where that is installed.
        os.environ["NVTE_FLASH_ATTN"] = "0"
        mask, package = of_kind(case.mask, Mask, "mask"), import_module("transformer_engine.pytorch")
        starts, longest = packing(mask, case.batch, case.device)
        attention = package.DotProductAttention(
            case.heads,
            case.head_dim,
            num_gqa_groups=case.kv_heads,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal" if mask.name.startswith("causal") else "padding",
            window_size=window_of(mask),
        )
        lengths = {"cu_seqlens_q": starts, "cu_seqlens_kv": starts, "max_seqlen_q": longest, "max_seqlen_kv": longest}

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
            output = attention(*flat, **lengths).view(len(q), q.shape[2], q.shape[1], v.shape[-1])
            return output.transpose(1, 2)

        return attend


KERNEL = TransformerEngine()
