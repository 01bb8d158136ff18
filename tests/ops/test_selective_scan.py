"""Every form of the selective scan is the same function: outputs, last states, gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted_triton import interpreted, no_cuda_device

from provenn.ops import selective_scan as package
from provenn.ops.linear_recurrence import linear_recurrence
from provenn.ops.selective_scan import chunked, fast, recurrent, selective_scan

FORMS = {"chunked": chunked, "automatic": selective_scan}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def drawn(batch=2, groups=2, dim=3, states=4, tokens=9, seed=0, dtype=torch.float64):
    """u, Δ, A, B, C and a first state; `dim` channels a group."""
    width = groups * dim
    u, delta = draw(batch, width, tokens, seed=seed), draw(batch, width, tokens, seed=seed + 1).exp() / 3
    A, state = -draw(width, states, seed=seed + 2).exp(), draw(batch, width, states, seed=seed + 5)
    B, C = (draw(batch, groups, states, tokens, seed=seed + i) for i in (3, 4))
    return [x.to(dtype) for x in (u, delta, A, B, C, state)]


def values_and_gradients(form, inputs, state=True):
    leaves = [x.detach().clone().requires_grad_() for x in inputs[: 6 if state else 5]]
    y, last = form(*leaves[:5], **({"state": leaves[5]} if state else {}))
    weight = draw(*y.shape, seed=7).to(y.dtype)
    return y, last, *torch.autograd.grad((y * weight).sum() + last.square().sum(), leaves)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@settings(deadline=None, max_examples=25)
@given(
    tokens=st.sampled_from([1, 2, 5, 63, 64, 65, 150]),
    groups=st.integers(1, 3),
    states=st.integers(1, 3),
    start=st.booleans(),
    room=st.sampled_from([1, 500, 2**20]),
    seed=st.integers(0, 1000),
)
def test_equals_the_loop_in_value_and_gradient(form, tokens, groups, states, start, room, seed):
    inputs = drawn(groups=groups, dim=2, states=states, tokens=tokens, seed=seed)
    before, fast.ROOM = fast.ROOM, room
    try:
        ours = values_and_gradients(form, inputs, start)
    finally:
        fast.ROOM = before
    for a, b in zip(ours, values_and_gradients(recurrent, inputs, start)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_long_sequences_have_longer_chunks():
    inputs = drawn(1, 1, 2, 2, tokens=5000)
    assert fast.chunk_length(5000) == 70
    for a, b in zip(values_and_gradients(chunked, inputs), values_and_gradients(recurrent, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_states_are_those_of_the_gated_recurrence():
    """The associative scan on pairs (gate, input), which knows nothing of Δ, A and B."""
    u, delta, A, B, C, state = drawn(groups=1, tokens=150)
    gates = (delta.mT.unsqueeze(-1) * A).exp().flatten(2)
    writes = ((delta * u).mT.unsqueeze(-1) * B[:, 0].mT.unsqueeze(2)).flatten(2)
    h, last = linear_recurrence(gates, writes, state=state.flatten(1))
    y = (h.unflatten(2, A.shape) * C[:, 0].mT.unsqueeze(2)).sum(-1).mT
    ours, final = selective_scan(u, delta, A, B, C, state=state)
    torch.testing.assert_close(ours, y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final.flatten(1), last, rtol=1e-10, atol=1e-10)


def test_the_published_formula_with_its_skip_bias_and_softplus():
    u, _, A, B, C, _ = drawn(tokens=20)
    delta, bias, D = draw(*u.shape, seed=8), draw(u.shape[1], seed=9), draw(u.shape[1], seed=10)
    step = F.softplus(delta + bias[:, None])
    h, rows = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype), u.shape[1] // B.shape[1]
    expected = []
    for t in range(20):
        b, c = B[..., t].repeat_interleave(rows, 1), C[..., t].repeat_interleave(rows, 1)
        h = torch.exp(torch.einsum("bd,dn->bdn", step[..., t], A)) * h + torch.einsum(
            "bd,bdn,bd->bdn", step[..., t], b, u[..., t]
        )
        expected.append(torch.einsum("bdn,bdn->bd", h, c) + D * u[..., t])
    y, last = selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
    torch.testing.assert_close(y, torch.stack(expected, -1))
    torch.testing.assert_close(last, h)
    shared = selective_scan(u, delta, A, B[:, 0], C[:, 0])[0]
    torch.testing.assert_close(shared, selective_scan(u, delta, A, B[:, :1], C[:, :1])[0])


@pytest.mark.parametrize("cut", [1, 60, 199])
def test_a_state_handed_over_goes_on_as_if_uninterrupted(cut):
    inputs = drawn(tokens=200)

    def in_two(u, delta, A, B, C, state):
        first, state = selective_scan(u[..., :cut], delta[..., :cut], A, B[..., :cut], C[..., :cut], state=state)
        second, state = selective_scan(u[..., cut:], delta[..., cut:], A, B[..., cut:], C[..., cut:], state=state)
        return torch.cat([first, second], -1), state

    for a, b in zip(values_and_gradients(in_two, inputs), values_and_gradients(recurrent, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", [3, 140])
def test_hand_written_backward_passes_gradcheck(tokens):
    inputs = [x.requires_grad_() for x in drawn(1, 2, 1, 2, tokens)]
    assert torch.autograd.gradcheck(lambda *xs: selective_scan(*xs[:5], state=xs[5]), inputs, fast_mode=tokens > 3)


def test_limits_of_the_step():
    u, delta, A, B, C, _ = drawn(tokens=150)
    D = draw(u.shape[1])
    still, _ = selective_scan(u, 0 * delta, A, B, C, D)
    assert torch.equal(still, u * D[:, None])
    # So fast a decay that nothing but the token itself is left.
    forgetful, _ = selective_scan(u, delta, A - 1e6, B, C, D)
    alone = (B * C).sum(2).repeat_interleave(3, 1) * delta * u
    torch.testing.assert_close(forgetful, alone + u * D[:, None])


def test_a_constant_step_is_a_convolution():
    u, _, A, B, C, _ = drawn(groups=1, tokens=200)
    step, b, c = 0.2, B[..., :1], C[..., :1]
    lags = torch.arange(200, dtype=u.dtype)
    kernel = torch.einsum("bn,dnl,bn->bdl", c[:, 0, :, 0], (step * A[..., None] * lags).exp(), step * b[:, 0, :, 0])
    product = torch.fft.rfft(kernel, n=400) * torch.fft.rfft(u, n=400)
    expected = torch.fft.irfft(product, n=400)[..., :200]
    y, _ = selective_scan(u, torch.full_like(u, step), A, b.expand_as(B), c.expand_as(C))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_single_precision_meets_double():
    inputs = drawn(2, 2, 4, 8, tokens=3136)
    for a, b in zip(
        values_and_gradients(chunked, [x.float() for x in inputs]), values_and_gradients(recurrent, inputs)
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_sums_are_held_in_float32_under_half_precision():
    # Without decay the state counts tokens; a sum in bfloat16 stops at 256.
    one = torch.ones(1, 1, 1000).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, last = selective_scan(one, one, torch.zeros(1, 1), one, one)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32 and last.item() == 1000


def test_a_nan_reaches_its_channel_and_what_comes_after_it():
    u, delta, A, B, C, _ = drawn(tokens=200)
    u[0, 1, 70] = torch.nan
    y, last = selective_scan(u, delta, A, B, C)
    wrong = y.isnan()
    assert wrong[0, 1, 70:].all() and wrong.sum() == 130 and last.isnan().any(-1).sum() == 1


def test_no_example_and_one_token():
    for batch, tokens in ((0, 150), (2, 1)):
        inputs = drawn(batch, tokens=tokens)
        results = values_and_gradients(selective_scan, inputs)
        assert [x.shape for x in results[2:]] == [x.shape for x in inputs] and results[0].shape == inputs[0].shape


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x | {"delta": x["delta"][:, :2]}, r"delta \(2, 2, 9\)"),
        (lambda x: x | {"A": x["A"].T}, r"A \(4, 6\)"),
        (lambda x: x | {"B": x["B"][..., :5]}, r"B \(2, 2, 4, 5\)"),
        (lambda x: x | {"B": x["B"].repeat(1, 2, 1, 1), "C": x["C"].repeat(1, 2, 1, 1)}, "groups that divide dim"),
        (lambda x: {k: v[..., :0] if v.shape[-1] == 9 else v for k, v in x.items()}, "with a token"),
        (lambda x: x | {"state": torch.zeros(2, 6, 3)}, r"state \(2, 6, 3\)"),
        (lambda x: x | {"D": torch.zeros(5)}, r"D must be \(6,\), one number a channel, got \(5,\)"),
        (lambda x: x | {"delta_bias": torch.zeros(5)}, r"delta_bias must be \(6,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message, untyped):
    with pytest.raises(ValueError, match=message):
        selective_scan(**change(dict(zip(("u", "delta", "A", "B", "C"), drawn()))))


def test_without_a_gpu_the_kernel_steps_aside():
    assert not package.triton.available(torch.device("cpu"))


@pytest.mark.parametrize("tokens, chunk", [(1, 64), (9, 3), (14, 4)])
@pytest.mark.parametrize("dim, states", [(5, 3), (1, 1), (9, 4)])
def test_kernel_arithmetic_equals_the_loop(tokens, chunk, dim, states, monkeypatch):
    kernels = interpreted(package.triton.__file__)
    monkeypatch.setattr(kernels, "TILE", 16)  # several blocks of channels
    monkeypatch.setattr(kernels, "ROOM", 3 * tokens * states * dim)  # and several pieces of rows
    monkeypatch.setattr(kernels, "chunk_length", lambda n: min(n, chunk))
    inputs = drawn(2, 2, dim, states, tokens, dtype=torch.float32)
    with no_cuda_device(monkeypatch):
        ours = values_and_gradients(kernels.triton_scan, inputs)
    for kernel, plain in zip(ours, values_and_gradients(recurrent, inputs)):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-4)


def test_a_kernel_that_is_wrong_is_found_before_it_is_used(monkeypatch):
    kernels = interpreted(package.triton.__file__)

    def small(device, draws=((2, 3, 5), (3, 2, 9))):
        monkeypatch.setattr(kernels, "SIZES", draws)
        return kernels._agree(device)

    with no_cuda_device(monkeypatch):
        assert small(torch.device("cpu"))
        monkeypatch.setattr(kernels, "recurrent", lambda *x, state: recurrent(*x, state=2 * state))
        assert not small(torch.device("cpu"))
