"""The merge of two partial softmaxes with a backward that keeps nothing but its inputs and outputs."""

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import is_differentiated, is_transformed, plain_gradients

from .reference import Partial, merge_by_weights


def merge_(outputs: Float[Tensor, "*batch dim"], a_lse: Tensor, other: Float[Tensor, "*batch dim"], b_lse: Tensor):
    """o ← o + w_b (o_b − o) in place, with w_b = σ(ℓ_b − ℓ_a); gives ℓ. `outputs` holds o_a, finite like o_b."""
    lse = torch.logaddexp(a_lse, b_lse)
    share = (b_lse - lse.masked_fill(lse == -torch.inf, 0)).exp_()
    # In one pass over the outputs, without a second buffer: w_a = 1 − w_b.
    outputs.lerp_(other, share.unsqueeze(-1).to(outputs.dtype))
    return lse


def plain_merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain operations, for second derivatives and `torch.func`."""
    output, lse = merge_by_weights(Partial(a, a_lse), Partial(b, b_lse))
    return output, lse


class _Merge(torch.autograd.Function):
    """With w_i = e^(ℓ_i − ℓ):  ∂L/∂o_i = w_i g  and  ∂L/∂ℓ_i = w_i (g·(o_i − o) + g_ℓ)."""

    @staticmethod
    def forward(ctx, a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor):
        output = a.clone()
        lse = merge_(output, a_lse, b, b_lse)
        ctx.save_for_backward(a, a_lse, b, b_lse, output, lse)
        return output, lse

    @staticmethod
    def backward(ctx, grad: Tensor, grad_lse: Tensor):
        a, a_lse, b, b_lse, output, lse = ctx.saved_tensors
        if is_differentiated():
            return plain_gradients(plain_merge, (a, a_lse, b, b_lse), (grad, grad_lse))
        finite = lse.masked_fill(lse == -torch.inf, 0)
        # g_ℓ − g·o is the same for both sides.
        common = grad_lse - (grad * output).sum(dim=-1)
        results = []
        for partial_output, partial_lse in ((a, a_lse), (b, b_lse)):
            # Recomputed from ℓ, which is saved anyway.
            share = (partial_lse - finite).exp()
            results += [share.unsqueeze(-1) * grad, share * ((grad * partial_output).sum(dim=-1) + common)]
        return tuple(results)


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over both sets of keys from the attention over each."""
    dtype = torch.promote_types(a.output.dtype, torch.float32)
    tensors = []
    for partial in (a, b):
        lse = partial.lse.to(dtype)
        # What a query that sees none of the keys was given as output must not come through as 0 · ∞.
        tensors += [partial.output.to(dtype).masked_fill((lse == -torch.inf).unsqueeze(-1), 0), lse]
    output, lse = plain_merge(*tensors) if is_transformed() else _Merge.apply(*tensors)
    return Partial(output.to(a.output.dtype), lse)
