"""Softmax attention over the union of two sets of keys, from the attention over each."""

import torch

from provenn.ops.autograd import is_transformed

from . import triton
from .fast import merge, merge_
from .reference import Partial, merge_by_weights

__all__ = ["Partial", "merge", "merge_", "merge_by_weights", "softmax_merge"]


def softmax_merge(a: Partial, b: Partial) -> Partial:
    """ℓ = log(e^ℓ_a + e^ℓ_b),  o = e^(ℓ_a − ℓ) o_a + e^(ℓ_b − ℓ) o_b: attention over both sets (arXiv:2507.04416).

    Associative and commutative, so any number of partial softmaxes (blocks, shards, a cache and the tokens at hand)
    are joined by folding: `functools.reduce(softmax_merge, parts)`. Takes a Triton kernel on CUDA, else PyTorch.

    Args:
        a, b: attention over disjoint sets of keys, with the log-sum-exp of the scores. A query that sees none of a set
            has lse −∞ there; one that sees none at all gets output 0 and lse −∞.

    >>> one = Partial(torch.tensor([[1.0]]), torch.tensor([0.0]))
    >>> three = Partial(torch.tensor([[5.0]]), torch.tensor([3.0]).log())
    >>> merged = softmax_merge(one, three)
    >>> merged.output.item(), round(merged.lse.exp().item(), 6)
    (4.0, 4.0)
    """
    if a.output.shape != b.output.shape or a.lse.shape != a.output.shape[:-1] or b.lse.shape != a.lse.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (*a, *b))
        raise ValueError(f"both parts must be an output (..., dim) and an lse (...) of the same sizes, got {shapes}")
    o = a.output
    fits = o.dtype != torch.float64 and o.shape[-1] <= triton.LARGEST_DIM
    traced = torch.compiler.is_compiling() or is_transformed()
    if o.is_cuda and fits and not traced and triton.available(o.device):
        return triton.triton_merge(a, b)
    return merge(a, b)
