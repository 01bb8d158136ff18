"""Every form of prefix-scan attention is the same function: outputs, final states, gradients."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted_triton import interpreted, no_cuda_device

from provenn.ops import prefix_scan_attention as package
from provenn.ops.prefix_scan_attention import (
    PrefixState,
    blockwise_attention,
    chunked_attention,
    log_depth_attention,
    masked_softmax_attention,
    merge,
    prefix_scan_attention,
    recurrent_attention,
)

FORMS = {
    "chunked": chunked_attention,
    "chunks of 1": lambda *a, **k: chunked_attention(*a, chunk=1, **k),
    "chunks of 5": lambda *a, **k: chunked_attention(*a, chunk=5, **k),
    "log depth": log_depth_attention,
    "blocks of 1": lambda *a, **k: blockwise_attention(*a, block=1, **k),
    "blocks of 7": lambda *a, **k: blockwise_attention(*a, block=7, **k),
    "automatic": prefix_scan_attention,
}
form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def draw(*shape, std=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(shape, generator=generator, dtype=dtype)


def gradients(form, scores, values, mask=None, weight=None):
    scores, values = scores.clone().requires_grad_(), values.clone().requires_grad_()
    outputs, state = form(scores, values, mask=mask)
    weight = draw(*outputs.shape, seed=7) if weight is None else weight
    loss = (outputs * weight).sum() + state.output.square().sum()
    return outputs, *torch.autograd.grad(loss, (scores, values), allow_unused=True, materialize_grads=True)


@form
@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 150),
    dim=st.integers(1, 4),
    std=st.sampled_from([0.0, 1.0, 30.0]),
    hidden=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_recurrence_in_value_and_gradient(form, n, dim, std, hidden, seed):
    scores, values = draw(2, 3, n, std=std, seed=seed), draw(2, 3, n, dim, seed=seed + 1)
    mask = torch.rand(2, 1, n, generator=torch.Generator().manual_seed(seed)) >= hidden
    for ours, defined in zip(
        gradients(form, scores, values, mask), gradients(recurrent_attention, scores, values, mask)
    ):
        torch.testing.assert_close(ours, defined, rtol=0, atol=1e-12)
    torch.testing.assert_close(form(scores, values, mask=mask)[0], masked_softmax_attention(scores, values, mask=mask))


@form
@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 120), data=st.data())
def test_a_state_handed_over_goes_on_as_if_uninterrupted(form, n, data):
    cut = data.draw(st.integers(1, n - 1))
    scores, values = draw(2, n, std=5, seed=n), draw(2, n, 3, seed=n + 1)
    weight = draw(2, n, 3, seed=n + 2)

    def in_two(scores, values, mask=None):
        first, state = form(scores[:, :cut], values[:, :cut])
        second, state = form(scores[:, cut:], values[:, cut:], state=state)
        return torch.cat([first, second], dim=1), state

    whole = gradients(recurrent_attention, scores, values, weight=weight)
    for ours, defined in zip(gradients(in_two, scores, values, weight=weight), whole):
        torch.testing.assert_close(ours, defined, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 5, 37])
@pytest.mark.parametrize("chunk", [2, 32])
def test_hand_written_backward_passes_gradcheck(n, chunk):
    def outputs(scores, values, u, w):
        # The state's own gradient is defined for what merges and outputs make of it.
        start = PrefixState(torch.zeros(2, dtype=torch.float64), u, w)
        prefixes, state = chunked_attention(scores, values, state=start, chunk=chunk)
        return prefixes, state.output

    inputs = [draw(2, n, std=2), draw(2, n, 2), draw(2).exp(), draw(2, 2)]
    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in inputs])


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), std=st.sampled_from([1.0, 100.0, 1e4]))
def test_merge_is_associative_commutative_and_has_an_identity(seed, std):
    a, b, c = (
        PrefixState(draw(4, std=std, seed=seed + i), draw(4, seed=seed + 3 + i).exp(), draw(4, 3, seed=seed + 6 + i))
        for i in range(3)
    )
    for left, right in [
        (merge(merge(a, b), c), merge(a, merge(b, c))),
        (merge(a, b), merge(b, a)),
        (merge(a, PrefixState.empty(4, dim=3, dtype=torch.float64)), a),
        (merge(PrefixState.empty(4, dim=3, dtype=torch.float64), a), a),
    ]:
        for x, y in zip(left, right):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_merge_of_nothing_with_nothing_is_nothing():
    empty = PrefixState.empty(2, dim=3)
    both = merge(empty, empty)
    assert all(torch.equal(x, y) for x, y in zip(both, empty))
    assert torch.equal(both.output, torch.zeros(2, 3))


def test_merge_combines_attention_over_shards():
    scores, values = draw(4, 90, std=10), draw(4, 90, 8)
    shards = [prefix_scan_attention(s, v)[1] for s, v in zip(scores.split(40, 1), values.split(40, 1))]
    torch.testing.assert_close(merge(merge(*shards[:2]), shards[2]).output, (scores.softmax(1)[:, None] @ values)[:, 0])


@form
def test_permuting_a_prefix_leaves_its_output(form):
    scores, values = draw(1, 60, std=3), draw(1, 60, 4)
    order = torch.cat([torch.randperm(40, generator=torch.Generator().manual_seed(1)), torch.arange(40, 60)])
    plain, shuffled = form(scores, values)[0], form(scores[:, order], values[:, order])[0]
    torch.testing.assert_close(plain[:, 39:], shuffled[:, 39:], rtol=0, atol=1e-12)


@form
def test_adding_a_constant_to_all_scores_changes_nothing(form):
    scores, values = draw(2, 100, std=3).mul(8).round().div(8).float(), draw(2, 100, 4).float()
    for shift in (-1e4, 1e4):
        torch.testing.assert_close(form(scores + shift, values)[0], form(scores, values)[0], rtol=0, atol=1e-6)


@form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["first", "last", "rising", "falling", "low", "high"])
def test_extreme_scores_stay_finite_and_right(form, dtype, where):
    n = 100
    ramp = torch.linspace(-1e4, 1e4, n)
    one = torch.full((n,), -1e4)
    scores = {
        "first": one.index_fill(0, torch.tensor([0]), 1e4),
        "last": one.index_fill(0, torch.tensor([n - 1]), 1e4),
        "rising": ramp,
        "falling": -ramp,
        "low": one,
        "high": -one,
    }[where].to(dtype)[None]
    values = draw(1, n, 4).to(dtype)
    ours = gradients(form, scores, values, weight=draw(1, n, 4).to(dtype))
    defined = gradients(recurrent_attention, scores.double(), values.double(), weight=draw(1, n, 4).to(dtype).double())
    tolerance = 5e-5 if dtype == torch.float32 else 3e-2
    for x, y in zip(ours, defined):
        assert x.isfinite().all()
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance * max(1, y.abs().max().item()))


@form
def test_hidden_tokens_weigh_nothing_whatever_they_hold(form):
    scores, values = draw(2, 80), draw(2, 80, 3)
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[0, :50] = False
    mask[1, 20:60] = False
    spoiled = values.masked_fill(~mask.unsqueeze(-1), torch.nan)
    outputs, state = form(scores.masked_fill(~mask, torch.nan), spoiled, mask=mask)
    assert torch.equal(outputs[0, :50], torch.zeros(50, 3, dtype=torch.float64))
    alone, alone_state = recurrent_attention(scores[:1, 50:], values[:1, 50:])
    torch.testing.assert_close(outputs[:1, 50:], alone)
    torch.testing.assert_close(state.output[:1], alone_state.output)


def test_sums_are_held_in_float32_under_bfloat16():
    # A running sum in bfloat16 stops growing at 256; the mean of this ramp would come out wrong by more than a tenth.
    values = torch.linspace(0, 1, 20_000).view(1, -1, 1).bfloat16()
    outputs, state = prefix_scan_attention(torch.zeros(1, 20_000).bfloat16(), values)
    assert outputs.dtype == torch.bfloat16 and state.u.dtype == torch.float32
    assert abs(outputs[0, -1].item() - 0.5) < 3e-3


def test_the_cumsum_shortcut_is_wrong():
    # cumsum(exp(s − cummax(s))) keeps an old maximum in earlier terms.
    scores, values = draw(1, 64, std=30), draw(1, 64, 2)
    weights = (scores - scores.cummax(dim=1).values).exp().unsqueeze(-1)
    shortcut = (weights * values).cumsum(1) / weights.cumsum(1)
    assert (shortcut - recurrent_attention(scores, values)[0]).abs().max() > 0.1


@pytest.mark.parametrize(("scores", "values"), [((2, 3), (2, 4, 5)), ((2, 0), (2, 0, 5)), ((3, 4), (2, 4, 5))], ids=str)
def test_shapes_that_do_not_fit_are_refused(scores, values):
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match="scores must be"):
            prefix_scan_attention(torch.zeros(scores), torch.zeros(values))
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def test_blocks_and_chunks_of_nothing_are_refused():
    with pytest.raises(ValueError, match="chunk"):
        chunked_attention(torch.zeros(1, 2), torch.zeros(1, 2, 1), chunk=0)
    with pytest.raises(ValueError, match="block"):
        blockwise_attention(torch.zeros(1, 2), torch.zeros(1, 2, 1), block=0)


def test_without_a_gpu_the_kernel_steps_aside():
    assert not package.triton.available(torch.device("cpu"))


@pytest.mark.parametrize("span", [256, 30])  # one span, or several of which the last is filled up
@pytest.mark.parametrize("n", [1, 63, 64, 200])
@pytest.mark.parametrize("dim", [5, 16, 130])
def test_kernel_arithmetic_equals_the_chunked_form(n, dim, span, monkeypatch):
    kernels = interpreted(package.triton.__file__)
    monkeypatch.setattr(kernels, "SPAN", span)
    scores, values, weight = (draw(*shape).float() for shape in [(3, n), (3, n, dim), (3, n, dim)])
    mask = torch.rand(3, n, generator=torch.Generator().manual_seed(n)) > 0.3
    mask[0, : n // 2] = False
    start = PrefixState(draw(3, seed=4).float(), draw(3, seed=5).exp().float(), draw(3, dim, seed=6).float())
    results = []
    for form in (kernels.triton_attention, chunked_attention):
        u, w = start.u.clone().requires_grad_(), start.w.clone().requires_grad_()
        s, v = scores.mul(4).requires_grad_(), values.clone().requires_grad_()
        with no_cuda_device(monkeypatch):
            outputs, state = form(s, v, mask=mask, state=PrefixState(start.m, u, w))
            loss = (outputs * weight).sum() + state.output.square().sum()
            results.append((outputs, *state, *torch.autograd.grad(loss, (s, v, u, w))))
    for kernel, plain in zip(*results):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-4)
