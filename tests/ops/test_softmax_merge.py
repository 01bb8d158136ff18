"""Attention over two sets of keys, merged, is attention over their union, in every form."""

from functools import reduce

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interpreted_triton import interpreted, no_cuda_device

from provenn.ops import softmax_merge as package
from provenn.ops.softmax_merge import Partial, merge, merge_by_weights, softmax_merge

FORMS = {"definition": merge_by_weights, "hand-written backward": merge, "automatic": softmax_merge}
form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def draw(*shape, std=1.0, seed=0, dtype=torch.float64):
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def partial(scores, values):
    return Partial(scores.softmax(-1) @ values, scores.logsumexp(-1))


@form
@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    std=st.sampled_from([1.0, 30.0, 1e4]),
    seed=st.integers(0, 1000),
)
@example(sizes=[1, 2, 5, 5], std=1e4, seed=91)
def test_merged_parts_are_one_softmax(form, sizes, std, seed):
    scores, values = draw(3, 2, sum(sizes), std=std, seed=seed), draw(3, sum(sizes), 4, seed=seed + 1)
    parts = [partial(s, v) for s, v in zip(scores.split(sizes, -1), values.split(sizes, -2))]
    # A log-sum-exp of scores near `std` is rounded to 1e-16 · std, and it is an exponent.
    tolerance = max(1e-12, 4e-15 * std)
    for merged in (reduce(form, parts), reduce(form, parts[::-1])):
        for ours, defined in zip(merged, partial(scores, values)):
            torch.testing.assert_close(ours, defined, rtol=tolerance, atol=tolerance)


@form
def test_gradients_are_those_of_one_softmax(form):
    scores, values = draw(3, 7, std=3).requires_grad_(), draw(7, 4, seed=1).requires_grad_()
    weight = draw(3, 4, seed=2)

    def gradients(attention):
        output, lse = attention()
        return torch.autograd.grad((output * weight).sum() + lse.sin().sum(), (scores, values))

    def parts():
        return form(partial(scores[:, :2], values[:2]), partial(scores[:, 2:], values[2:]))

    for ours, defined in zip(gradients(parts), gradients(lambda: partial(scores, values))):
        torch.testing.assert_close(ours, defined, rtol=1e-12, atol=1e-12)


def test_hand_written_backward_passes_gradcheck():
    def outputs(a, a_lse, b, b_lse):
        return tuple(softmax_merge(Partial(a, a_lse), Partial(b, b_lse)))

    inputs = [draw(3, 4), draw(3, std=2, seed=1), draw(3, 4, seed=2), draw(3, std=2, seed=3)]
    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in inputs])


@form
def test_nothing_is_neutral_whatever_its_output(form):
    some = Partial(draw(3, 4), draw(3, std=100, seed=1))
    nothing = Partial(torch.full((3, 4), torch.nan, dtype=torch.float64), torch.full((3,), -torch.inf).double())
    for merged in (form(some, nothing), form(nothing, some)):
        for ours, defined in zip(merged, some):
            torch.testing.assert_close(ours, defined)
    both = form(nothing, nothing)
    assert torch.equal(both.output, torch.zeros(3, 4).double()) and torch.equal(both.lse, nothing.lse)


@pytest.mark.parametrize("form", [merge, softmax_merge])
def test_gradients_beside_nothing_are_finite(form):
    a, b = draw(3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()
    a_lse = torch.tensor([-torch.inf, 0.0, -torch.inf]).double().requires_grad_()
    b_lse = torch.tensor([0.0, -torch.inf, -torch.inf]).double().requires_grad_()
    form(Partial(a, a_lse), Partial(b, b_lse)).output.sum().backward()
    assert all(t.grad.isfinite().all() for t in (a, b, a_lse, b_lse))
    assert torch.equal(a.grad[:, 0], torch.tensor([0.0, 1.0, 0.0]).double())


@form
def test_bfloat16_is_merged_in_float32(form):
    a, b = Partial(draw(9, 4), draw(9)), Partial(draw(9, 4, seed=1), draw(9, seed=2))
    low = form(Partial(a.output.bfloat16(), a.lse.float()), Partial(b.output.bfloat16(), b.lse.float()))
    assert low.output.dtype == torch.bfloat16 and low.lse.dtype == torch.float32
    torch.testing.assert_close(low.output.double(), merge_by_weights(a, b).output, rtol=2e-2, atol=2e-2)


def test_shapes_that_do_not_fit_are_refused(untyped):
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2,\), \(2, 4\), \(2,\)"):
        softmax_merge(Partial(torch.zeros(2, 3), torch.zeros(2)), Partial(torch.zeros(2, 4), torch.zeros(2)))


def test_without_a_gpu_the_kernel_steps_aside():
    assert not package.triton.available(torch.device("cpu"))


@pytest.mark.parametrize("rows", [1, 16, 50])
@pytest.mark.parametrize("dim", [5, 16])
def test_kernel_arithmetic_equals_the_pytorch_form(rows, dim, monkeypatch):
    kernels = interpreted(package.triton.__file__)
    lses = [draw(rows, std=4, seed=seed).float() for seed in (2, 3)]
    lses[0][0] = -torch.inf
    results = []
    for form in (kernels.triton_merge, merge):
        outputs = [draw(rows, dim, seed=seed).float().requires_grad_() for seed in (0, 1)]
        leaves = [*outputs, *(lse.clone().requires_grad_() for lse in lses)]
        with no_cuda_device(monkeypatch):
            merged = form(Partial(leaves[0], leaves[2]), Partial(leaves[1], leaves[3]))
            loss = merged.output.square().sum() + merged.lse.sin().sum()
            results.append((*merged, *torch.autograd.grad(loss, leaves)))
    for kernel, plain in zip(*results):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-4)
