"""Every form of linear attention is the same function: outputs, final states, gradients."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted_triton import interpreted, no_cuda_device

from provenn.core.cost import flops, growth
from provenn.ops import linear_attention as package
from provenn.ops.linear_attention import (
    LinearState,
    attention_outputs,
    bidirectional_attention,
    causal_attention,
    chunked_product,
    fast,
    linear_attention,
    linear_attention_weights,
    pooled_attention,
    quadratic_attention,
    recurrent_attention,
    resolved,
)
from provenn.ops.linear_attention.fast import CausalProduct, Quadratic, sliced_product


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
@pytest.mark.parametrize("span", [256, 30])  # one span, or several of which the last is filled up
def test_kernel_arithmetic_equals_the_chunked_form(n, width, dim, reverse, span, monkeypatch):
    kernels = interpreted(package.triton.__file__)
    monkeypatch.setattr(kernels, "SPAN", span)
    q, k, v = (draw(3, n, size, seed=size).float() for size in (width, width, dim))
    start = draw(3, width, dim, seed=9).float()
    with no_cuda_device(monkeypatch):
        ours = kernels.kernel_product(q, k, v, start, reverse)
    for kernel, plain in zip(ours, chunked_product(q, k, v, start, reverse)):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-3)


def test_the_kernel_is_taken_where_it_was_timed_to_be_quicker():
    quicker = package.triton.is_quicker
    assert quicker(8 * 32_768, 64, 64) and quicker(128 * 512, 64, 64)
    assert not quicker(128 * 4096, 64, 64) and not quicker(64 * 512, 128, 64) and not quicker(64 * 512, 64, 128)


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


# Outputs alone, by either form


@pytest.fixture(params=["whole", "in slices"])
def weights_made(request, monkeypatch):
    """The quadratic form's weights at once, or a few rows at a time."""
    if request.param == "in slices":
        monkeypatch.setattr(fast, "WHOLE", 0)
        monkeypatch.setitem(fast.SLICE, "cpu", 2000)


def outputs_and_gradients(attend, *inputs, **options):
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = attend(*inputs, **options)
    return outputs, *torch.autograd.grad((outputs * draw(*outputs.shape, seed=7)).sum(), inputs)


@pytest.mark.parametrize("name", ["linear", "quadratic", "auto"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 2, 33, 65, 90])
@pytest.mark.parametrize("hidden", [None, 0.4, 1.0])
def test_either_form_is_the_matrix_with_its_gradients(weights_made, name, causal, n, hidden):
    inputs = features(2, 3, n, 4), features(2, 3, n, 4, seed=1), draw(2, 3, n, 5, seed=2)
    mask = None if hidden is None else torch.rand(2, 1, n, generator=torch.Generator().manual_seed(n)) >= hidden
    options = {"causal": causal, "mask": mask}
    ours = outputs_and_gradients(attention_outputs, *inputs, form=name, **options)
    for part, defined in zip(ours, outputs_and_gradients(quadratic_attention, *inputs, **options)):
        torch.testing.assert_close(part, defined, rtol=1e-10, atol=1e-10)


def test_queries_of_another_number_are_answered_by_either_form(weights_made):
    q, k, v = features(2, 3, 7, 4), features(2, 3, 20, 4, seed=1), draw(2, 3, 20, 5, seed=2)
    linear, quadratic = (attention_outputs(q, k, v, causal=False, form=name) for name in ("linear", "quadratic"))
    torch.testing.assert_close(quadratic, linear, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="a query a token, got 7 queries and 20 tokens"):
        attention_outputs(q, k, v)


@pytest.mark.parametrize("causal", [True, False])
def test_the_quadratic_form_gradchecks_twice(causal):
    inputs = [x.requires_grad_() for x in (features(3, 6, 2), features(3, 6, 2, seed=1), draw(3, 6, 2, seed=2))]
    assert torch.autograd.gradcheck(lambda *x: Quadratic.apply(*x, causal), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: Quadratic.apply(*x, causal), inputs)


def test_the_pooled_form_gradchecks_twice():
    inputs = [x.requires_grad_() for x in (features(2, 4, 2), features(2, 6, 2, seed=1), draw(2, 6, 3, seed=2))]
    assert torch.autograd.gradcheck(pooled_attention, inputs)
    assert torch.autograd.gradgradcheck(pooled_attention, inputs)


@pytest.mark.parametrize("name", ["linear", "quadratic"])
@pytest.mark.parametrize("causal", [True, False])
def test_features_may_lie_in_columns(weights_made, name, causal):
    q, k, v = features(2, 3, 33, 4), features(2, 3, 33, 4, seed=1), draw(2, 3, 33, 5, seed=2)
    columns = [x.mT.contiguous().mT for x in (q, k)]
    for ours, plain in zip(
        outputs_and_gradients(attention_outputs, *columns, v, form=name, causal=causal),
        outputs_and_gradients(attention_outputs, q, k, v, form=name, causal=causal),
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "quadratic"])
@pytest.mark.parametrize("causal", [True, False])
def test_either_form_under_autocast_and_transforms(weights_made, name, causal):
    inputs = [x.float() for x in (features(3, 2, 70, 4), features(3, 2, 70, 4, seed=1), draw(3, 2, 70, 5, seed=2))]

    def form(*x):
        return attention_outputs(*x, causal=causal, form=name)

    plain = outputs_and_gradients(form, *inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = form(*leaves)
    weight = draw(*outputs.shape, seed=7)
    for ours, theirs in zip((outputs, *torch.autograd.grad((outputs * weight).sum(), leaves)), plain):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.vmap(form)(*inputs), plain[0], rtol=1e-5, atol=1e-5)
    gradient = torch.func.grad(lambda *x: (form(*x) * weight).sum(), argnums=(0, 1, 2))(*inputs)
    for ours, theirs in zip(gradient, plain[1:]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 64, 65, 200])
def test_slices_of_rows_give_the_chunked_product(n, reverse, monkeypatch):
    monkeypatch.setitem(fast.SLICE, "cpu", 3000)
    inputs = draw(5, n, 4), draw(5, n, 4, seed=1), draw(5, n, 3, seed=2), draw(5, 4, 3, seed=3)
    for ours, plain in zip(sliced_product(*inputs, reverse), chunked_product(*inputs, reverse)):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_auto_changes_form_once_and_later_for_wider_heads(causal):
    sizes, overrides = range(8, 2048, 8), []
    for dim in (16, 24, 64):
        forms = [resolved("auto", n, features=2 * dim, dim=dim, causal=causal, rows=16) for n in sizes]
        first = forms.index("linear")
        assert set(forms[:first]) == {"quadratic"} and set(forms[first:]) == {"linear"}
        overrides.append(sizes[first])
    assert overrides == sorted(overrides) and overrides[0] < overrides[-1] < 512
    with pytest.raises(ValueError, match="form must be one of"):
        resolved("fast", 8, features=4, dim=4, causal=causal, rows=1)


def test_auto_is_the_form_that_was_at_least_a_quarter_faster():
    """Of both forms, forward and in training, by CPU time on one thread: (rows, width of a head, tokens)."""
    for rows, dim, n in ((64, 24, 128), (4, 24, 128), (24, 64, 160), (1, 64, 256), (64, 16, 128)):
        assert resolved("auto", n, features=2 * dim, dim=dim, causal=True, rows=rows) == "quadratic"
    for rows, dim, n in ((64, 24, 384), (4, 24, 384), (1, 64, 512), (64, 16, 384)):
        assert resolved("auto", n, features=2 * dim, dim=dim, causal=True, rows=rows) == "linear"
    for rows, dim, n in ((64, 24, 16), (4, 24, 48), (24, 64, 64), (1, 64, 64), (64, 16, 16)):
        assert resolved("auto", n, features=2 * dim, dim=dim, causal=False, rows=rows) == "quadratic"
    for rows, dim, n in ((64, 24, 128), (4, 24, 160), (24, 64, 160), (1, 64, 256), (64, 16, 96)):
        assert resolved("auto", n, features=2 * dim, dim=dim, causal=False, rows=rows) == "linear"


@pytest.mark.parametrize("floor, active", [(1e-3, 0.0), (40.0, 0.5), (1e4, 1.0)])
def test_a_floor_bounds_what_a_row_is_divided_by(floor, active):
    """Forms agree, gradients included; rows sum to 1, or to their share of the floor; the floor itself has no slope."""
    q, k, v = features(2, 9, 4), features(2, 11, 4, seed=1), draw(2, 11, 3, seed=2)
    totals = (q @ k.mT).sum(-1)
    floor = totals.median().item() if active == 0.5 else floor
    weights = linear_attention_weights(q, k, causal=False, floor=floor)
    torch.testing.assert_close(weights.sum(-1), (totals / floor).clamp_max(1))
    assert (totals < floor).double().mean().item() == pytest.approx(active, abs=0.06)
    results = []
    for form in (quadratic_attention, lambda *x, **o: bidirectional_attention(*x, **_without_causal(o))[0]):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = form(*inputs, causal=False, floor=floor)
        results.append((y, *torch.autograd.grad((y * draw(*y.shape, seed=3)).sum(), inputs)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)
    if active == 1.0:  # then the output is the sum over the floor: linear in the queries
        torch.testing.assert_close(bidirectional_attention(2 * q, k, v, floor=floor)[0], 2 * results[0][0])
    state = bidirectional_attention(q, k[:, :6], v[:, :6])[1].add(k[:, 6:], v[:, 6:])
    torch.testing.assert_close(state.read(q, floor=floor), results[0][0])


def _without_causal(options):
    return {name: value for name, value in options.items() if name != "causal"}
