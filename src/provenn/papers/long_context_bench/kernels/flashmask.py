"""FlashMask of PaddlePaddle, where paddle is installed: a mask as the masked rows of each key."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from provenn.core.narrowing import of_kind
from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel
from provenn.papers.long_context_bench.masks import Mask, NotRepresentable


class _Paddle(torch.autograd.Function):
    """Tensors go over and back without a copy; each framework differentiates its own part."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Any, causal: bool) -> Tensor:
        paddle = import_module("paddle")
        inputs = [paddle.utils.dlpack.from_dlpack(x.detach().contiguous()) for x in (q, k, v)]
        for x in inputs:
            x.stop_gradient = False
        output = paddle.nn.functional.flashmask_attention(*inputs, startend_row_indices=rows, causal=causal)
        ctx.paddle, ctx.inputs, ctx.output = paddle, inputs, output
        return torch.from_dlpack(output.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        seed = ctx.paddle.utils.dlpack.from_dlpack(grad.contiguous())
        grads = ctx.paddle.grad([ctx.output], ctx.inputs, grad_outputs=[seed], retain_graph=True)
        return *(torch.from_dlpack(each) for each in grads), None, None


class FlashMask(Kernel):
    """Two columns a key where nothing after the diagonal is kept, else four."""

    name, about = "flashmask", "FlashMask of PaddlePaddle"
    package, on_gpu_only, half_only, tokens_first = "paddle", True, True, True

    def refusal(self, case: Case) -> str:
        if reason := super().refusal(case):
            return reason
        try:
            case.mask.flash_columns()  # type: ignore[union-attr]  # block-sparse ones have been refused
        except NotRepresentable as error:
            return str(error)
        return ""

    def build(self, case: Case) -> Attend:
        paddle, mask = import_module("paddle"), of_kind(case.mask, Mask, "mask")
        columns = mask.flash_columns()
        key = torch.arange(mask.length)
        causal = bool(((columns.uts == 0) & (columns.ute == key)).all())
        table = torch.stack(columns[:2] if causal else columns, dim=-1).int()
        rows = paddle.utils.dlpack.from_dlpack(table[None, None].to(case.device))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            turned = (x.transpose(1, 2) for x in (q, k, v))
            return _Paddle.apply(*turned, rows, causal).transpose(1, 2)

        return attend


KERNEL = FlashMask()
