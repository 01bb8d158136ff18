"""Every form of the linear recurrence is the same function: states, last states, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted_triton import interpreted, no_cuda_device

from provenn.ops import linear_recurrence as package
from provenn.ops.linear_recurrence import chunked, linear_recurrence, recurrent

FORMS = {"chunked": chunked, "automatic": linear_recurrence}
form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def values_and_gradients(form, gates, inputs, state=None):
    leaves = [t.clone().requires_grad_() for t in (gates, inputs, state) if t is not None]
    states, last = form(*leaves[:2], state=leaves[2] if state is not None else None)
    weight = draw(*states.shape, seed=7).to(states.dtype)
    return states, last, *torch.autograd.grad((states * weight).sum() + last.square().sum(), leaves)


@form
@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 200),
    dim=st.integers(1, 4),
    gate=st.sampled_from(["forget", "keep", "zero", "any sign"]),
    start=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_loop_in_value_and_gradient(form, n, dim, gate, start, seed):
    noise = draw(2, 3, n, dim, seed=seed)
    gates = {"forget": noise.sigmoid(), "keep": 1 - 1e-3 * noise.sigmoid(), "zero": noise.relu() * 0.5}.get(gate, noise)
    inputs, state = draw(2, 3, n, dim, seed=seed + 1), draw(2, 3, dim, seed=seed + 2) if start else None
    ours, defined = (values_and_gradients(f, gates, inputs, state) for f in (form, recurrent))
    for a, b in zip(ours, defined):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [2049, 5000])
def test_long_sequences_are_cut_more_than_once(n):
    gates, inputs = draw(1, n, 2).sigmoid(), draw(1, n, 2, seed=1)
    for a, b in zip(values_and_gradients(chunked, gates, inputs), values_and_gradients(recurrent, gates, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@form
@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 150), data=st.data())
def test_a_state_handed_over_goes_on_as_if_uninterrupted(form, n, data):
    cut = data.draw(st.integers(1, n - 1))
    gates, inputs = draw(2, n, 3, seed=n).sigmoid(), draw(2, n, 3, seed=n + 1)

    def in_two(gates, inputs, state=None):
        first, state = form(gates[:, :cut], inputs[:, :cut])
        second, state = form(gates[:, cut:], inputs[:, cut:], state=state)
        return torch.cat([first, second], dim=1), state

    whole, halves = (values_and_gradients(f, gates, inputs) for f in (recurrent, in_two))
    for a, b in zip(halves, whole):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [1, 5, 70])
def test_hand_written_backward_passes_gradcheck(n):
    inputs = [draw(2, n, 2).sigmoid(), draw(2, n, 2, seed=1), draw(2, 2, seed=2)]
    assert torch.autograd.gradcheck(
        lambda a, x, h: linear_recurrence(a, x, state=h), [x.requires_grad_() for x in inputs]
    )


def test_single_precision_meets_double():
    gates, inputs = draw(2, 4096, 3).sigmoid(), draw(2, 4096, 3, seed=1)
    for a, b in zip(
        values_and_gradients(chunked, gates.float(), inputs.float()), values_and_gradients(recurrent, gates, inputs)
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_sums_are_held_in_float32_under_bfloat16():
    # With a gate of 1 this counts tokens; a sum in bfloat16 stops at 256.
    ones = torch.ones(1, 1000, 1).bfloat16()
    states, last = linear_recurrence(ones, ones)
    assert states.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert last.item() == 1000


def test_products_of_gates_may_vanish():
    # A closed form that divides by the product of the gates gives 0/0 here.
    gates, inputs = torch.full((1, 300, 1), 1e-3), draw(1, 300, 1).float()
    assert gates.cumprod(1)[0, -1] == 0
    torch.testing.assert_close(linear_recurrence(gates, inputs)[0], recurrent(gates, inputs)[0])


@pytest.mark.parametrize("shapes", [((2, 3, 1), (2, 4, 1)), ((2, 0, 1), (2, 0, 1)), ((3,), (3,))], ids=str)
def test_shapes_that_do_not_fit_are_refused(shapes, untyped):
    with pytest.raises(ValueError, match="gates and inputs must"):
        linear_recurrence(*(torch.zeros(shape) for shape in shapes))


def test_without_a_gpu_the_kernel_steps_aside():
    assert not package.triton.available(torch.device("cpu"))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 24, 70])
@pytest.mark.parametrize("dim", [5, 64, 65])
def test_kernel_arithmetic_equals_the_chunked_form(n, dim, monkeypatch):
    kernels = interpreted(package.triton.__file__)
    monkeypatch.setattr(kernels, "SPAN", 8)  # so that spans of spans are walked too
    gates, inputs, state = draw(2, n, dim).sigmoid().float(), draw(2, n, dim, seed=1).float(), draw(2, dim).float()
    results = []
    for form in (kernels.triton_recurrence, chunked):
        with no_cuda_device(monkeypatch):
            results.append(values_and_gradients(form, gates, inputs, state))
    for kernel, plain in zip(*results):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-4)
