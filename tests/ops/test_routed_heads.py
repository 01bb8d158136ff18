"""Computing only the active (token, head) pairs gives what computing all and masking gives: outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from provenn.core.cost import flops
from provenn.ops.routed_heads import (
    dense_masked_attention,
    gathering_pays,
    routed_attention,
    routed_decode,
    worth_gathering,
)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def case(batch=2, heads=4, groups=4, queries=9, keys=9, share=0.5, always=0, seed=0, dtype=torch.float64):
    q = draw(batch, heads, queries, 6, seed=seed, dtype=dtype)
    k, v = (draw(batch, groups, keys, width, seed=seed + width, dtype=dtype) for width in (6, 5))
    active = torch.rand(batch, heads, queries, generator=torch.Generator().manual_seed(seed)) < share
    active[:, :always] = True
    return q, k, v, active


def by_hand(q, k, v, active, causal=False, mask=None):
    """The definition with neither a fused kernel nor a shared head."""
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    hidden = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool)
    if mask is not None:
        hidden = hidden | ~mask[:, None, None]
    if causal:
        position = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        hidden = hidden | (torch.arange(k.shape[2]) > position)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
    return weights @ v * active[..., None]


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    shape=st.sampled_from([(1, 1, 0), (4, 4, 0), (4, 4, 2), (4, 2, 1), (6, 2, 3), (3, 3, 3)]),
    queries=st.integers(1, 150),
    more=st.integers(0, 20),
    share=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    causal=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_form_is_the_same_function(batch, shape, queries, more, share, causal, masked, seed):
    heads, groups, always = shape
    q, k, v, active = case(batch, heads, groups, queries, queries + more, share, always, seed)
    mask = torch.rand(batch, queries + more, generator=torch.Generator().manual_seed(seed)) < 0.7 if masked else None
    weight = draw(batch, heads, queries, 5, seed=seed + 1)
    found = []
    for form in (by_hand, dense_masked_attention, routed_attention):
        given = [part.clone().requires_grad_() for part in (q, k, v)]
        more_given = {"always": always} if form is routed_attention else {}
        y = form(*given, active, causal=causal, mask=mask, **more_given)
        y = y + 0 * sum(part.sum() for part in given)  # where nothing is active, a gradient of 0
        found.append((y, *torch.autograd.grad((y * weight).sum(), given)))
    for other in found[1:]:
        for ours, defined in zip(other, found[0]):
            torch.testing.assert_close(ours, defined, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision_stays_close(dtype, tolerance):
    q, k, v, active = case(queries=200, keys=200, always=1)
    expected = dense_masked_attention(q, k, v, active, causal=True)
    y = routed_attention(q.to(dtype), k.to(dtype), v.to(dtype), active, always=1, causal=True)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("heads, groups, always", [(4, 4, 0), (4, 4, 2), (4, 4, 4), (6, 2, 2), (6, 2, 4)])
def test_decoding_is_the_last_row(heads, groups, always):
    q, k, v, active = case(3, heads, groups, 1, 30, 0.5, always)
    y = routed_decode(q[:, :, 0], k, v, active[:, :, 0], always=always)
    torch.testing.assert_close(y, by_hand(q, k, v, active)[:, :, 0])


def test_decoding_reads_no_head_that_is_not_used():
    q, k, v, active = case(2, 4, 4, 1, 10, 0.5, always=1)
    unread = ~active[:, :, 0]
    k[unread], v[unread] = torch.nan, torch.nan
    assert routed_decode(q[:, :, 0], k, v, active[:, :, 0], always=1).isfinite().all()


def test_a_gradient_reaches_active_queries_alone():
    q, k, v, active = case(always=1)
    q.requires_grad_()
    routed_attention(q, k, v, active, always=1).square().sum().backward()
    assert torch.equal(q.grad.abs().sum(-1) > 0, active)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_work_is_the_share_of_pairs(share):
    heads, tokens = 8, 64
    q, k, v = (draw(1, heads, tokens, 16, dtype=torch.float32) for _ in range(3))
    used = int(share * heads)
    turns = (torch.arange(tokens)[:, None] + torch.arange(used)) % heads  # every head by equally many tokens
    active = torch.zeros(tokens, heads, dtype=torch.bool).scatter(1, turns, True).T[None]
    whole = flops(lambda: F.scaled_dot_product_attention(q, k, v))
    assert flops(lambda: routed_attention(q, k, v, active)) == share * whole
    assert flops(lambda: dense_masked_attention(q, k, v, active)) == whole


def test_a_causal_gather_keeps_most_of_the_triangles_saving():
    q, k, v = (draw(1, 2, 2048, 4, dtype=torch.float32) for _ in range(3))
    active = torch.ones(1, 2, 2048, dtype=torch.bool)
    square = flops(lambda: routed_attention(q, k, v, active))
    assert flops(lambda: routed_attention(q, k, v, active, causal=True)) / square == pytest.approx(0.5 + 1 / 16)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v, a: (q, k[:, :3], v[:, :3], a), "divides theirs"),
        (lambda q, k, v, a: (q, k, v[:, :, :4], a), "divides theirs"),
        (lambda q, k, v, a: (q, k, v, a[:, :, :4]), "active must be"),
        (lambda q, k, v, a: (q, k, v, a, {"mask": torch.ones(2, 8, dtype=torch.bool)}), "mask must be .*got .2, 8."),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(change, message):
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)  # which would refuse first
    try:
        with pytest.raises(ValueError, match=message):
            q, k, v, active, *more = change(*case())
            routed_attention(q, k, v, active, **(more[0] if more else {}))
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def test_too_many_heads_for_all_are_refused():
    with pytest.raises(ValueError, match="always must lie between 0 and the 4 heads, got 5"):
        routed_attention(*case(), always=5)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.sampled_from([(4, 4, 0), (4, 2, 1), (6, 2, 3), (3, 3, 3)]),
    queries=st.integers(1, 40),
    more=st.integers(0, 9),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_bias_and_a_scale_are_those_of_all_heads_with_both_derivatives(shape, queries, more, masked, seed):
    """Second derivatives need PyTorch's own form of attention, which the fused one on a processor has none of."""
    heads, groups, always = shape
    q, k, v, active = case(2, heads, groups, queries, queries + more, 0.5, always, seed)
    bias = draw(heads, queries, queries + more, seed=seed)
    mask = torch.rand(2, queries + more, generator=torch.Generator().manual_seed(seed)) < 0.7 if masked else None
    if mask is not None:
        mask[:, 0] = True
    values = []
    with sdpa_kernel(SDPBackend.MATH):
        for form, options in ((dense_masked_attention, {}), (routed_attention, {"always": always})):
            inputs = [part.clone().requires_grad_() for part in (q, k, v, bias)]
            y = form(*inputs[:3], active, mask=mask, bias=inputs[3], scale=0.7, **options)
            first = torch.autograd.grad(y.square().sum() + 0 * sum(p.sum() for p in inputs), inputs, create_graph=True)
            loss = sum(slope.square().sum() for slope in first) + 0 * sum(p.sum() for p in inputs)
            values.append((y, *first, *torch.autograd.grad(loss, inputs)))
    for ours, defined in zip(values[1], values[0]):
        torch.testing.assert_close(ours, defined, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("causal", [False, True])
def test_under_autocast_it_is_the_form_of_all_heads_and_its_backward_pass_runs_outside(causal):
    q, k, v, active = case(queries=30, keys=30, always=1, dtype=torch.float32)
    values = []
    for form, options in ((dense_masked_attention, {}), (routed_attention, {"always": 1})):
        inputs = [part.clone().requires_grad_() for part in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16):
            y = form(*(2 * part for part in inputs), active, causal=causal, **options)
        values.append((y.float(), *torch.autograd.grad(y.float().square().sum(), inputs)))
    for ours, defined in zip(values[1], values[0]):
        torch.testing.assert_close(ours, defined, rtol=0.05, atol=0.05 * defined.abs().max().item())


def test_transforms_of_torch_func_get_the_form_of_all_heads():
    q, k, v, active = case(3, always=1)
    each = torch.func.vmap(lambda q, k, v, a: routed_attention(q[None], k[None], v[None], a[None], always=1)[0])
    torch.testing.assert_close(each(q, k, v, active), dense_masked_attention(q, k, v, active))
    slope = torch.func.grad(lambda q: routed_attention(q, k, v, active, always=1).square().sum())(q)
    torch.testing.assert_close(slope, torch.func.grad(lambda q: by_hand(q, k, v, active).square().sum())(q))


@given(
    heads=st.integers(1, 32),
    queries=st.integers(0, 5000),
    more=st.integers(0, 5000),
    causal=st.booleans(),
    draws=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_gathering_pays_for_long_inputs_and_few_pairs_alone(heads, queries, more, causal, draws):
    always, longest = int(draws[0] * heads), int(draws[1] * queries)
    pays = gathering_pays(heads, always, queries, queries + more, longest, causal=causal)
    work = (always * queries + (heads - always) * longest) / max(heads * queries, 1)
    assert not (pays and (causal or queries < 320 or work >= 1)), "it saves nothing there"
    if pays:
        assert gathering_pays(heads, always, queries, queries + more, longest // 2, causal=causal)
        assert gathering_pays(heads, always, 2 * queries, 2 * (queries + more), 2 * longest, causal=causal)


def test_whether_it_is_worth_it_depends_on_the_busiest_head():
    q = k = draw(1, 8, 1024, 4)
    even = torch.arange(1024)[None, None] % 4 == torch.arange(8)[None, :, None] % 4
    even[:, :2] = True
    assert worth_gathering(q, k, even, always=2) and not worth_gathering(q, k, even, always=2, causal=True)
    one = even.clone()
    one[:, 7] = True  # a router that sends every token to the same head makes every row long
    assert not worth_gathering(q, k, one, always=2)
    assert not worth_gathering(q[:, :, :100], k[:, :, :100], even[:, :, :100], always=2)
    assert not worth_gathering(q[:0], k[:0], torch.ones(0, 8, 1024, dtype=torch.bool), always=8)
    assert not worth_gathering(q.to("meta"), k.to("meta"), even.to("meta"), always=2)


def test_a_bias_that_does_not_fit_is_refused():
    q, k, v, active = case()
    for bias, causal in ((draw(4, 9, 8), False), (draw(4, 9, 9), True)):
        with pytest.raises((ValueError, TypeError), match="bias"):
            routed_attention(q, k, v, active, causal=causal, bias=bias)
