"""Every form of linear attention is the same function: outputs, final states, gradients."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted_triton import interpreted, no_cuda_device

from provenn.bench import flops, growth
from provenn.ops import linear_attention as package
from provenn.ops.linear_attention import (
    LinearState,
    bidirectional_attention,
    causal_attention,
    chunked_product,
    linear_attention,
    linear_attention_weights,
    quadratic_attention,
    recurrent_attention,
)
from provenn.ops.linear_attention.fast import CausalProduct


def chunks_of(size):
    def product(*arguments):
        return chunked_product(*arguments, chunk=size)

    return lambda *a, **k: causal_attention(*a, product=product, **k)


FORMS = {"automatic": linear_attention, "chunks of 1": chunks_of(1), "chunks of 5": chunks_of(5)}
form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def features(*shape, seed=0, dtype=torch.float64):
    return draw(*shape, seed=seed, dtype=dtype).exp()


def gradients(form, *inputs, mask=None, weight=None):
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs, state = form(*inputs, mask=mask)
    weight = draw(*outputs.shape, seed=7) if weight is None else weight
    loss = (outputs * weight).sum() + state.s.square().sum() + state.z.square().sum()
    return outputs, *state, *torch.autograd.grad(loss, inputs)


@form
@settings(deadline=None, max_examples=12)
@given(
    n=st.integers(1, 90),
    width=st.integers(1, 5),
    dim=st.integers(1, 4),
    hidden=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 1000),
)
def test_causal_equals_the_recurrence_and_the_matrix(form, n, width, dim, hidden, seed):
    q, k, v = (
        features(2, 3, n, width, seed=seed),
        features(2, 3, n, width, seed=seed + 1),
        draw(2, 3, n, dim, seed=seed),
    )
    mask = torch.rand(2, 1, n, generator=torch.Generator().manual_seed(seed)) >= hidden
    defined = gradients(recurrent_attention, q, k, v, mask=mask)
    for ours, theirs in zip(gradients(form, q, k, v, mask=mask), defined):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(quadratic_attention(q, k, v, mask=mask), defined[0], rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=12)
@given(n=st.integers(1, 70), queries=st.integers(1, 9), hidden=st.sampled_from([0.0, 0.4, 1.0]))
def test_bidirectional_equals_the_matrix(n, queries, hidden):
    q, k, v = features(2, 3, queries, 4), features(2, 3, n, 4, seed=1), draw(2, 3, n, 5, seed=2)
    mask = torch.rand(2, 1, n, generator=torch.Generator().manual_seed(n)) >= hidden
    outputs, state = linear_attention(q, k, v, causal=False, mask=mask)
    expected = quadratic_attention(q, k, v, causal=False, mask=mask)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
    half = n // 2
    _, first = bidirectional_attention(q, k[:, :, :half], v[:, :, :half], mask=mask[:, :, :half])
    again, both = bidirectional_attention(q, k[:, :, half:], v[:, :, half:], mask=mask[:, :, half:], state=first)
    torch.testing.assert_close(again, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(both, state, rtol=1e-10, atol=1e-10)


@form
@settings(deadline=None, max_examples=10)
@given(n=st.integers(2, 90), data=st.data())
def test_a_state_handed_over_goes_on_as_if_uninterrupted(form, n, data):
    cut = data.draw(st.integers(1, n - 1))
    q, k, v = features(2, n, 4), features(2, n, 4, seed=1), draw(2, n, 3, seed=2)

    def in_two(q, k, v, mask=None):
        first, state = form(q[:, :cut], k[:, :cut], v[:, :cut])
        second, state = form(q[:, cut:], k[:, cut:], v[:, cut:], state=state)
        return torch.cat([first, second], dim=1), state

    for ours, defined in zip(gradients(in_two, q, k, v), gradients(recurrent_attention, q, k, v)):
        torch.testing.assert_close(ours, defined, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@settings(deadline=None, max_examples=10)
@given(n=st.integers(1, 90), hidden=st.sampled_from([0.0, 0.5]))
def test_rows_of_weights_sum_to_one_over_what_may_be_attended(causal, n, hidden):
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) >= hidden
    mask[:, 0] = True
    weights = linear_attention_weights(features(2, n, 4), features(2, n, 4, seed=1), causal=causal, mask=mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-12)
    assert (weights.masked_select(~mask.unsqueeze(1)) == 0).all()
    if causal:
        assert (weights.triu(1) == 0).all()


def test_fewer_queries_than_tokens_are_the_last_ones():
    q, k = features(2, 20, 4), features(2, 20, 4, seed=1)
    whole = linear_attention_weights(q, k)
    torch.testing.assert_close(linear_attention_weights(q[:, 13:], k), whole[:, 13:])


@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("reverse", [False, True])
def test_hand_written_backward_passes_gradcheck_twice(n, reverse):
    def product(*arguments):
        return CausalProduct.apply(*arguments, reverse, lambda *a: chunked_product(*a, chunk=16))

    inputs = [draw(2, n, 3), draw(2, n, 3, seed=1), draw(2, n, 2, seed=2), draw(2, 3, 2, seed=3)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(product, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(product, inputs, fast_mode=True)


@form
def test_later_tokens_change_nothing_before_them(form):
    q, k, v = features(1, 90, 4), features(1, 90, 4, seed=1), draw(1, 90, 3)
    before, _ = form(q, k, v)
    for x in (q, k, v):
        x[:, 70:] = 99.0
    assert torch.equal(form(q, k, v)[0][:, :70], before[:, :70])


@form
def test_a_positive_factor_on_a_query_cancels_and_on_a_key_does_not(form):
    q, k, v = features(2, 80, 4), features(2, 80, 4, seed=1), draw(2, 80, 3)
    factor = features(2, 80, 1, seed=5)
    plain, _ = form(q, k, v)
    torch.testing.assert_close(form(factor * q, k, v)[0], plain, rtol=1e-12, atol=1e-12)
    assert (form(q, factor * k, v)[0] - plain).abs().max() > 0.05


@form
def test_hidden_tokens_weigh_nothing_whatever_they_hold(form):
    q, k, v = features(2, 80, 4), features(2, 80, 4, seed=1), draw(2, 80, 3)
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[0, :50] = False
    hidden = ~mask.unsqueeze(-1)
    outputs, state = form(q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf), mask=mask)
    assert torch.equal(outputs[0, :50], torch.zeros(50, 3, dtype=torch.float64))
    alone, after = recurrent_attention(q[:1, 50:], k[:1, 50:], v[:1, 50:])
    torch.testing.assert_close(outputs[:1, 50:], alone)
    torch.testing.assert_close(state.s[:1], after.s)


def test_sums_are_held_in_float32_under_bfloat16():
    # A running sum in bfloat16 stops growing at 256; the mean of this ramp would come out wrong by more than a tenth.
    values = torch.linspace(0, 1, 20_000).view(1, -1, 1).bfloat16()
    ones = torch.ones(1, 20_000, 2).bfloat16()
    outputs, state = linear_attention(ones, ones, values)
    assert outputs.dtype == torch.bfloat16 and {part.dtype for part in state} == {torch.float32}
    assert abs(outputs[0, -1].item() - 0.5) < 3e-3


def test_a_state_has_the_same_size_after_any_number_of_tokens():
    for n in (1, 10, 500):
        _, state = linear_attention(torch.ones(2, 3, n, 8), torch.ones(2, 3, n, 8), torch.ones(2, 3, n, 4))
        assert state.nbytes == 4 * 2 * 3 * (8 * 4 + 8)


def test_work_is_linear_in_the_tokens():
    sizes = [512, 1024, 2048]

    def work(n):
        q, k, v = (torch.ones(1, n, 16).requires_grad_() for _ in range(3))
        return flops(lambda: linear_attention(q, k, v)[0].sum().backward())

    assert growth(sizes, [work(n) for n in sizes]).exponent == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("q", "k", "v", "causal", "message"),
    [
        ((1, 3, 4), (1, 3, 4), (1, 4, 2), True, "expected queries"),
        ((1, 3, 5), (1, 3, 4), (1, 3, 2), False, "expected queries"),
        ((1, 0, 4), (1, 0, 4), (1, 0, 2), True, "at least one token"),
        ((1, 2, 4), (1, 3, 4), (1, 3, 2), True, "a query a token, got 2 queries and 3 tokens"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q, k, v, causal, message):
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            linear_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), causal=causal)
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def test_without_a_gpu_the_kernel_steps_aside():
    assert not package.triton.available(torch.device("cpu"))


@pytest.mark.parametrize("n", [1, 63, 64, 130])
@pytest.mark.parametrize(("width", "dim"), [(5, 3), (16, 70), (130, 64)])
@pytest.mark.parametrize("reverse", [False, True])
def test_kernel_arithmetic_equals_the_chunked_form(n, width, dim, reverse, monkeypatch):
    kernels = interpreted(package.triton.__file__)
    q, k, v = (draw(3, n, size, seed=size).float() for size in (width, width, dim))
    start = draw(3, width, dim, seed=9).float()
    with no_cuda_device(monkeypatch):
        ours = kernels.kernel_product(q, k, v, start, reverse)
    for kernel, plain in zip(ours, chunked_product(q, k, v, start, reverse)):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-3)


def test_kernel_differentiates_as_the_chunked_form(monkeypatch):
    kernels = interpreted(package.triton.__file__)
    q, k, v = (features(2, 100, 6, seed=s).float() for s in range(3))
    mask = torch.rand(2, 100, generator=torch.Generator().manual_seed(0)) > 0.3
    start = LinearState(draw(2, 6, 6).float(), features(2, 6).float())
    with no_cuda_device(monkeypatch):
        results = [
            gradients(
                lambda *a, product=product, **m: causal_attention(*a, state=start, product=product, **m),
                q, k, v, mask=mask, weight=draw(2, 100, 6).float(),
            )
            for product in (kernels.kernel_product, chunked_product)
        ]  # fmt: skip
    for kernel, plain in zip(*results):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-3)
