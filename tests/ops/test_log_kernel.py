"""Attention from logarithms of features is its definition, whatever their size."""

import pytest
import torch

from provenn.ops.log_kernel import LogState, log_attention, log_attention_weights


def problem(size: float, n: int = 37, m: int = 5, d: int = 3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    parts = (size * torch.randn(2, 2, n, width, generator=generator, dtype=dtype) for width in (m, m))
    v = torch.randn(2, 2, n, d, generator=generator, dtype=dtype)
    factors = torch.randn(2, n, n, generator=generator, dtype=dtype).exp().tril()
    return [part.requires_grad_() for part in (*parts, v, factors)]


@pytest.mark.parametrize("size", [0.1, 5, 500])
@pytest.mark.parametrize("with_factors", [True, False])
def test_value_and_gradients_are_the_definition(size, with_factors):
    a, e, v, f = problem(size)
    factors = f if with_factors else None
    inputs = [a, e, v, *([f] if with_factors else [])]
    ours = log_attention(a, e, v, factors=factors)[0]
    plain = log_attention_weights(a, e, factors) @ v
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    weight = torch.randn_like(plain)
    for x, y in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, plain))):
        torch.testing.assert_close(x, y.nan_to_num(0), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("with_factors", [True, False])
def test_single_precision_holds_logarithms_that_no_exponential_does(with_factors):
    a, e, v, f = problem(300, dtype=torch.float32)
    factors = f if with_factors else None
    ours = log_attention(a, e, v, factors=factors)[0]
    plain = log_attention_weights(a.double(), e.double(), f.double() if with_factors else None) @ v.double()
    torch.testing.assert_close(ours.double(), plain, rtol=1e-3, atol=1e-3)


def test_a_state_goes_on_where_the_tokens_before_ended():
    a, e, v, _ = problem(50)
    whole, last = log_attention(a, e, v)
    first, state = log_attention(a[:, :, :20], e[:, :, :20], v[:, :, :20])
    rest, state = log_attention(a[:, :, 20:], e[:, :, 20:], v[:, :, 20:], state=state)
    torch.testing.assert_close(torch.cat([first, rest], dim=2), whole)
    for x, y in zip(state, last):
        torch.testing.assert_close(x, y)


def test_the_last_queries_alone_see_all_keys_before_them():
    a, e, v, f = problem(50)
    whole, _ = log_attention(a, e, v, factors=f)
    few, _ = log_attention(a[:, :, -3:], e, v, factors=f[:, -3:])
    torch.testing.assert_close(few, whole[:, :, -3:])


def test_nothing_to_attend_gives_zero_and_hidden_keys_weigh_nothing():
    a, e, v, f = (part.detach() for part in problem(5))
    hidden = e.clone()
    hidden[:, :, :18] = -torch.inf
    for factors in (None, f):
        y, _ = log_attention(a, hidden, v, factors=factors)
        assert (y[:, :, :18] == 0).all() and y.isfinite().all()
        rest = None if factors is None else f[:, 18:, 18:]
        torch.testing.assert_close(
            y[:, :, 18:], log_attention(a[:, :, 18:], e[:, :, 18:], v[:, :, 18:], factors=rest)[0]
        )
    empty = LogState.empty(2, 2, features=5, dim=3, like=v)
    assert (empty.sums == 0).all() and empty.peak.isfinite().all()
