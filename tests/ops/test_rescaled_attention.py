"""Attention with multiplied weights: the fused form is the definition, gradients and second derivatives included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provenn.ops.rescaled_attention import explicit, rescaled_attention, tripled_keys

SIGNS = {"positive": lambda c: c.abs() + 0.1, "any sign": lambda c: c, "none": torch.zeros_like}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(q, k, v, bias, factors, visible):
    """Entry by entry, with nothing of the library."""
    y = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        keys = [j for j in range(k.shape[2]) if visible[b, 0, i, j]]
        scores = torch.stack(
            [q[b, h, i] @ k[b, h, j] / q.shape[-1] ** 0.5 + bias[0, h, i, j] for j in keys] or [q[0, 0, 0, 0]]
        )
        weights = scores.exp() / scores.exp().sum()
        y[b, h, i] = sum(
            (w * factors[0, h, i, j] * v[b, h, j] for w, j in zip(weights, keys)), torch.zeros(v.shape[-1])
        )
    return y


@pytest.mark.parametrize("sign", SIGNS.values(), ids=SIGNS)
@pytest.mark.parametrize("form", ["explicit", "fused"])
def test_each_form_is_the_sum_by_hand(form, sign):
    q, k, v = (draw(2, 2, 5, 3, seed=s) for s in range(3))
    bias, factors = draw(1, 2, 5, 5, seed=3), sign(draw(1, 2, 5, 5, seed=4))
    visible = draw(2, 1, 5, 5, seed=5) > -0.5
    visible[0, 0, 2] = False
    ours = rescaled_attention(q, k, v, bias=bias, factors=factors, visible=visible, form=form)
    torch.testing.assert_close(ours, by_hand(q, k, v, bias, factors, visible), rtol=1e-10, atol=1e-10)
    assert not ours[0, :, 2].any()


@settings(deadline=None, max_examples=15)
@given(
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    width=st.integers(1, 9),
    sign=st.sampled_from(list(SIGNS)),
    hidden=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_fused_form_is_the_definition_with_first_and_second_derivatives(queries, keys, width, sign, hidden, seed):
    tensors = [
        draw(2, 2, queries, 3, seed=seed),
        draw(2, 2, keys, 3, seed=seed + 1),
        draw(2, 2, keys, width, seed=seed + 2),
        draw(1, 2, queries, keys, seed=seed + 3),
        SIGNS[sign](draw(1, 2, queries, keys, seed=seed + 4)),
    ]
    visible = draw(2, 1, queries, keys, seed=seed + 5) > 0 if hidden else None
    results = []
    for form in (explicit, tripled_keys):
        given = [x.clone().requires_grad_() for x in tensors]
        y = form(*given[:3], bias=given[3], factors=given[4], visible=visible)
        first = torch.autograd.grad((y * draw(*y.shape, seed=9)).sum(), given, create_graph=True)
        again = sum((g.square() * draw(*g.shape, seed=10)).sum() for g in first)
        second = torch.autograd.grad(again, given, allow_unused=True)
        results.append([y, *first, *(torch.zeros_like(x) if g is None else g for x, g in zip(given, second))])
    for defined, fused in zip(*results):
        torch.testing.assert_close(fused, defined, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("form", ["explicit", "fused"])
def test_factors_may_lie_far_apart(form):
    """One factor of −1e6, hidden or nearly unseen, takes no digits from the rows of ones beside it."""
    q, k, v = (draw(1, 1, 6, 4, seed=s) for s in range(3))
    bias, factors = torch.zeros(1, 1, 6, 6, dtype=torch.float64), torch.ones(1, 1, 6, 6, dtype=torch.float64)
    factors[..., 0, 0], bias[..., 0, 0] = -1e6, -25.0
    exact = explicit(q, k, v, bias=bias, factors=factors)
    single = [x.float() for x in (q, k, v)]
    ours = rescaled_attention(*single, bias=bias.float(), factors=factors.float(), form=form)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_ones_change_no_bit_and_no_bias_is_plain_attention():
    q, k, v = (draw(2, 2, 7, 4, seed=s, dtype=torch.float32) for s in range(3))
    bias = draw(1, 2, 7, 7, seed=3, dtype=torch.float32)
    ones = torch.ones(1, 2, 7, 7)
    assert rescaled_attention(q, k, v, bias=bias, factors=ones).equal(rescaled_attention(q, k, v, bias=bias))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(rescaled_attention(q, k, v), plain)


@pytest.mark.parametrize("form", ["explicit", "fused"])
def test_gradients_by_torch_func_are_those_of_autograd(form):
    q, k, v = (draw(2, 2, 5, 4, seed=s, dtype=torch.float32) for s in range(3))
    bias, factors = (draw(1, 2, 5, 5, seed=s, dtype=torch.float32).requires_grad_() for s in (3, 4))

    def total(q):
        return rescaled_attention(q[None], k[:1], v[:1], bias=bias, factors=factors, form=form).square().sum()

    each = torch.func.vmap(torch.func.grad(total))(q)
    for row, grad in zip(q, each):
        row = row.clone().requires_grad_()
        torch.testing.assert_close(grad, torch.autograd.grad(total(row), row)[0])


def test_a_form_that_is_not_there_is_refused():
    q = draw(1, 1, 8, 2)
    with pytest.raises(ValueError, match="form must be explicit or fused"):
        rescaled_attention(q, q, q, form="flash")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["explicit", "fused"])
def test_half_precision_stays_near(form, dtype):
    """Biases and factors may exceed what half precision distinguishes; outputs are off by no more than inputs."""
    q, k, v = (draw(1, 2, 9, 8, seed=s).to(dtype) for s in range(3))
    bias, factors = 8 * draw(1, 2, 9, 9, seed=3), 4 * draw(1, 2, 9, 9, seed=4)
    exact = explicit(q.double(), k.double(), v.double(), bias=bias, factors=factors)
    ours = rescaled_attention(q, k, v, bias=bias.float(), factors=factors.float(), form=form)
    assert ours.dtype == dtype
    assert (ours.double() - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()
