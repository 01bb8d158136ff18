"""Fused attention equals its definition, and has the derivatives that PyTorch's CPU kernel lacks."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from provenn.ops.softmax_attention import explicit, softmax_attention

FORMS = ["plain", "causal", "hidden", "biased", "scaled"]


def attend(function, form: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if form == "causal":
        return function(q, k, v, causal=True)
    if form in ("hidden", "biased"):
        mask = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[0, 0, 2] = False  # a query that may attend to nothing
        return function(q, k, v, mask=mask if form == "hidden" else torch.where(mask, 0.3, -torch.inf).to(q.dtype))
    return function(q, k, v, scale=0.7 if form == "scaled" else None)


def drawn(keys: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5, 4), (2, 3, keys, 4), (2, 3, keys, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("form", FORMS)
def test_it_is_its_definition_with_all_derivatives(form: str):
    inputs = drawn(5 if form == "causal" else 6)

    def fused(*x: Tensor) -> Tensor:
        return attend(softmax_attention, form, *x)

    torch.testing.assert_close(fused(*inputs), attend(explicit, form, *inputs))
    assert torch.autograd.gradcheck(fused, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(fused, inputs, fast_mode=True)
    still, along = [x.detach() for x in inputs], [x.detach().cos() for x in inputs]
    ends = [fused(*(x + s * d for x, d in zip(still, along))) for s in (1e-6, -1e-6)]
    _, tangent = torch.func.jvp(fused, tuple(still), tuple(along))
    torch.testing.assert_close(tangent, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-8)
    with forward_ad.dual_level():
        output = fused(*(forward_ad.make_dual(x, d) for x, d in zip(still, along)))
        torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, tangent)


def test_the_kernel_of_the_ordinary_path_is_torchs():
    inputs = [x.detach().float().requires_grad_() for x in drawn()]
    y, expected = softmax_attention(*inputs), F.scaled_dot_product_attention(*inputs)
    assert torch.equal(y, expected)
    assert y.grad_fn is not None and expected.grad_fn is not None
    assert y.grad_fn.name() == expected.grad_fn.name()
    pairs = zip(torch.autograd.grad(y.sin().sum(), inputs), torch.autograd.grad(expected.sin().sum(), inputs))
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_mask_goes_with_no_causality_in_any_form():
    """Of PyTorch's kernels some would join the two, and others refuse."""
    inputs = [x.detach() for x in drawn(5)]

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v, mask=torch.ones(5, 5, dtype=torch.bool), causal=True)

    for run in (both, torch.func.vmap(both)):
        with pytest.raises(ValueError, match="got a mask and causal=True"):
            run(*inputs)


@pytest.mark.parametrize("biased", [False, True])
def test_the_definition_joins_a_mask_with_causality(biased: bool):
    q, k, v = drawn()
    mask = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(1)) > 0.4
    both = mask & torch.ones(5, 6, dtype=torch.bool).tril()
    given = [torch.where(m, 0.3, -torch.inf).to(q.dtype) if biased else m for m in (mask, both)]
    joined = explicit(q, k, v, mask=given[0], causal=True)
    assert torch.equal(joined, explicit(q, k, v, mask=given[1]))
    assert not torch.allclose(joined, explicit(q, k, v, mask=given[0])), "the mask hides less than both"
    assert not torch.allclose(joined, explicit(q, k, v, causal=True)), "and so does causality"
