"""FlashAttention 2, where the package flash_attn is installed: fixed lengths, windows, and packed documents."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from provenn.core.narrowing import of_kind
from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel
from provenn.papers.long_context_bench.masks import Mask

WINDOWS = ("full_sliding_window", "causal_sliding_window")
PACKED = ("full_document", "causal_document")


def window_of(mask: Mask) -> tuple[int, int]:
    """Keys that are seen before and after a query; −1 is without bound."""
    if mask.name not in WINDOWS:
        return (-1, -1)
    size = mask.factors["window"]
    return (size, 0 if mask.name.startswith("causal") else size)


def packing(mask: Mask, batch: int, device: torch.device) -> tuple[Tensor, int]:
    """Where documents begin in a batch laid end to end, and the longest of them."""
    starts = torch.tensor(mask.starts, dtype=torch.int32)
    every = [starts[:-1] + mask.length * sequence for sequence in range(batch)]
    ends = torch.tensor([mask.length * batch], dtype=torch.int32)
    return torch.cat([*every, ends]).to(device), int(starts.diff().max())


class FlashAttention(Kernel):
    """`flash_attn_func`, and `flash_attn_varlen_func` for packed documents."""

    name, about = "fa2", "FlashAttention 2"
    package, on_gpu_only, half_only, tokens_first = "flash_attn", True, True, True
    masks = ("full", "causal", *WINDOWS, *PACKED)
    largest_dim = 256

    def refusal(self, case: Case) -> str:
        if case.head_dim % 8 or case.head_dim > self.largest_dim:
            return f"takes head dims that are multiples of 8 up to {self.largest_dim}, and the case has {case.head_dim}"
        return super().refusal(case)

    def build(self, case: Case) -> Attend:
        mask, package = of_kind(case.mask, Mask, "mask"), import_module(self.package)
        options: dict[str, Any] = {"causal": mask.name.startswith("causal")}
        if mask.name not in PACKED:
            return self._fixed(package.flash_attn_func, options | {"window_size": window_of(mask)})
        starts, longest = packing(mask, case.batch, case.device)
        return self._packed(package.flash_attn_varlen_func, (starts, starts, longest, longest), options)

    def _fixed(self, run: Callable[..., Any], options: dict[str, Any]) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _first(run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)).transpose(1, 2)

        return attend

    def _packed(self, run: Callable[..., Any], lengths: tuple[Any, ...], options: dict[str, Any]) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
            return _first(run(*flat, *lengths, **options)).unflatten(0, (len(q), -1)).transpose(1, 2)

        return attend


def _first(result: Any) -> Tensor:
    """The output; some versions give the log-sum-exp beside it."""
    return result[0] if isinstance(result, tuple) else result


KERNEL = FlashAttention()
