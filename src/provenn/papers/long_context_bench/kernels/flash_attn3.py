"""FlashAttention 3 for Hopper GPUs, where its package flash_attn_interface is installed."""

from provenn.papers.long_context_bench.kernels.flash_attn import FlashAttention


class FlashAttention3(FlashAttention):
    """The functions have the names and the arguments of FlashAttention 2."""

    name, about, package = "fa3", "FlashAttention 3", "flash_attn_interface"


KERNEL = FlashAttention3()
