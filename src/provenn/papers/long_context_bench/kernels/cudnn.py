"""cuDNN's fused attention, as PyTorch's scaled_dot_product_attention calls it."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel


class CuDNN(Kernel):
    """The back end CUDNN_ATTENTION alone; an error where it cannot, never another back end."""

    name, about = "cudnn", "cuDNN through scaled_dot_product_attention"
    on_gpu_only, half_only, masks = True, True, ("full", "causal")

    def refusal(self, case: Case) -> str:
        if reason := super().refusal(case):
            return reason
        if not torch.backends.cudnn.is_available():
            return "cuDNN is not available"
        return f"takes head dims that are multiples of 8, and the case has {case.head_dim}" if case.head_dim % 8 else ""

    def build(self, case: Case) -> Attend:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        run = partial(
            scaled_dot_product_attention, is_causal=case.mask.name == "causal", enable_gqa=case.heads != case.kv_heads
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return run(q, k, v)

        return attend


KERNEL = CuDNN()
