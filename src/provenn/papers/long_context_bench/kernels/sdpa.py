"""PyTorch's scaled_dot_product_attention: with a dense mask, but for masks that it knows by name."""

from functools import partial

from torch.nn.functional import scaled_dot_product_attention

from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel


class SDPA(Kernel):
    """No mask for FULL, `is_causal` for CAUSAL; S × S booleans for every other."""

    name, about, sparse = "sdpa", "scaled_dot_product_attention, dense mask", True

    def build(self, case: Case) -> Attend:
        attend = partial(scaled_dot_product_attention, enable_gqa=case.heads != case.kv_heads)
        if case.mask.name in ("full", "causal"):
            return partial(attend, is_causal=case.mask.name == "causal")
        return partial(attend, attn_mask=case.mask.dense(case.device))


KERNEL = SDPA()
