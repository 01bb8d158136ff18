"""What MoH promises: attention whose heads are weighed and chosen by the token, with its limits and its identities."""

from functools import partial

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from provenn.nn.attention import SoftmaxAttention
from provenn.nn.auxiliary import collect_auxiliary
from provenn.nn.language import CausalLM
from provenn.nn.streaming import select_state
from provenn.papers.moh.layers import (
    HeadRouter,
    MoHAttention,
    PaperHeadRouter,
    QueryNormRouter,
    balance_loss,
    choose,
    convert_to_moh,
    head_load,
    straight_through,
    watch_routing,
)

KINDS = [(2, 3), (1, 2), (0, 4), (8, 0), (4, 4), (6, 1)]  # (shared, top_k) of 8 heads
kinds = pytest.mark.parametrize("shared, top_k", KINDS)


@pytest.fixture
def untyped():
    """Run-time shape checks would refuse bad shapes before we do, and cannot be traced."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def by_formula(layer: MoHAttention, x: torch.Tensor) -> torch.Tensor:
    """Equation 3 head by head: Σ_i g_i H_i W_O,i with W_O split by its rows."""
    q, k, v = (map(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for map in (layer.query, layer.key, layer.value))
    scores = q @ k.mT / layer.head_dim**0.5
    if layer.causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    each = scores.softmax(-1) @ v
    gates = layer.router(x, q.transpose(1, 2)).gates
    out = layer.out.bias
    for i, rows in enumerate(layer.out.weight.T.split(layer.head_dim)):
        out = out + gates[..., i, None] * (each[:, i] @ rows)
    return out


@kinds
@pytest.mark.parametrize("router", ["linear", "paper", "query-norm"])
@pytest.mark.parametrize("execute", ["dense", "gather"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_layer_is_the_weighted_sum_of_its_heads(shared, top_k, router, execute, causal):
    layer = MoHAttention(16, 8, shared=shared, top_k=top_k, router=router, execute=execute, causal=causal).double()
    x = draw(2, 11, 16)
    torch.testing.assert_close(layer(x), by_formula(layer, x), rtol=0, atol=1e-12)


def test_multi_head_attention_is_the_sum_over_heads():
    """Joining the heads and multiplying by W_O is summing H_i W_O,i (equation 2)."""
    attention = SoftmaxAttention(16, 4).double()
    x = draw(2, 9, 16)
    heads = (
        attention._split(attention.query(x)),
        attention._split(attention.key(x)),
        attention._split(attention.value(x)),
    )
    each = F.scaled_dot_product_attention(*heads, is_causal=True)
    rows = attention.out.weight.T.split(4)
    summed = sum(each[:, i] @ rows[i] for i in range(4)) + attention.out.bias
    torch.testing.assert_close(attention(x), summed, rtol=0, atol=1e-12)


@kinds
def test_with_zero_routers_and_all_heads_it_is_multi_head_attention(shared, top_k):
    softmax = SoftmaxAttention(16, 8).double()
    layer = MoHAttention.from_softmax(softmax, router="linear", shared=shared, top_k=8 - shared)
    for weight in layer.router.parameters():
        nn.init.zeros_(weight)
    x = draw(2, 9, 16)
    torch.testing.assert_close(layer.router(x).gates, torch.ones(2, 9, 8, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(layer(x), softmax(x), rtol=0, atol=1e-12)


def test_in_the_papers_form_it_is_not():
    softmax = SoftmaxAttention(16, 8).double()
    layer = MoHAttention.from_softmax(softmax, router="paper", shared=2, top_k=6)
    for weight in layer.router.parameters():
        nn.init.zeros_(weight)
    x = draw(2, 9, 16)
    gates = layer.router(x).gates
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 9, dtype=torch.float64))
    assert (layer(x) - softmax(x)).abs().max() > 0.1


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(KINDS), tokens=st.integers(1, 40), scale=st.sampled_from([0.0, 1.0, 100.0]))
def test_gates_are_what_the_code_says(kind, tokens, scale):
    shared, top_k = kind
    router = HeadRouter(16, 8, shared, top_k).double()
    gates, active, scores = router(scale * draw(tokens, 16))
    assert (gates >= 0).all() and not gates[~active].any()
    assert (active.sum(-1) == shared + top_k).all() and active[:, :shared].all()
    first, second = gates[:, :shared].sum(-1), gates[:, shared:].sum(-1)
    total = torch.zeros(tokens, dtype=torch.float64)
    if shared:
        total = total + first / shared
    if top_k:
        total = total + second / top_k
        assert torch.equal(choose(scores, top_k), active[:, shared:])
    torch.testing.assert_close(total, torch.full_like(total, 2.0 if shared and top_k else 1.0))


@kinds
def test_the_papers_gates_sum_to_one_at_most(shared, top_k):
    gates, active, _ = PaperHeadRouter(16, 8, shared, top_k).double()(draw(30, 16))
    assert (gates >= 0).all() and not gates[~active].any()
    assert (gates.sum(-1) <= 1 + 1e-12).all()


def test_equal_scores_are_broken_by_order():
    assert choose(torch.zeros(2, 5), 2).tolist() == [[True, True, False, False, False]] * 2


@pytest.mark.parametrize("execute", ["dense", "gather"])
def test_a_routed_heads_rows_reach_only_the_tokens_that_chose_it(execute):
    layer = MoHAttention(16, 8, shared=2, top_k=3, execute=execute).double()
    x = draw(2, 20, 16)
    active = layer.router(x).active
    before = layer(x)
    for head in range(8):
        other = nn.Parameter(layer.out.weight.detach().clone())
        other.data[:, 2 * head : 2 * head + 2] += 1
        changed = torch.func.functional_call(layer, {"out.weight": other}, x)
        assert torch.equal((changed - before).abs().amax(-1) > 0, active[..., head])


def test_the_balance_is_top_k_when_uniform_and_as_many_as_routed_when_collapsed():
    e, k, tokens = 6, 2, 12
    even = torch.zeros(tokens, e, dtype=torch.bool).scatter(
        1, (torch.arange(tokens)[:, None] + torch.arange(k)) % e, True
    )
    assert balance_loss(torch.full((1, tokens, e), 1 / e), even[None]).item() == pytest.approx(k)
    first = torch.zeros(1, tokens, e)
    first[..., :k] = 1 / k
    assert balance_loss(first, first > 0).item() == pytest.approx(e)


def test_padding_is_not_counted_in_the_balance():
    scores = draw(2, 9, 6).softmax(-1)
    mask = torch.rand(2, 9) < 0.6
    chosen = choose(scores, 2)
    alone = balance_loss(scores[mask][None], chosen[mask][None])
    torch.testing.assert_close(balance_loss(scores, chosen, mask), alone)
    noise = torch.where(mask[..., None], scores, 1.0)
    torch.testing.assert_close(balance_loss(noise, chosen, mask), alone)


def test_the_balance_is_said_while_training_alone():
    layer = MoHAttention(16, 8, balance=0.5)
    x = torch.randn(2, 9, 16)
    with collect_auxiliary() as added:
        layer(x)
        scores, chosen = layer.router(x).scores, layer.router(x).active[..., 4:]
        torch.testing.assert_close(added, [0.5 * balance_loss(scores, chosen)])
        layer.eval()(x)
        MoHAttention(16, 8, balance=0)(x)
        MoHAttention(16, 8, shared=8)(x)
    assert len(added) == 1


@kinds
def test_a_router_has_the_parameters_that_its_terms_need(shared, top_k):
    held = sum(weight.numel() for weight in HeadRouter(16, 8, shared, top_k).parameters())
    assert held == 16 * ((8 - shared) + (shared if shared > 1 else 0) + (2 if 0 < shared < 8 else 0))
    assert not list(QueryNormRouter(16, 8, 4, 2).parameters())


def test_the_query_norm_router_is_the_authors_formula():
    q = draw(5, 8, 4)
    gates, active, scores = QueryNormRouter(32, 8, 4, 2)(None, q)
    norms = q[:, 4:].square().sum(-1).sqrt()
    expected = (norms / norms.std(dim=1, correction=1, keepdim=True)).softmax(-1)
    torch.testing.assert_close(scores, expected)
    assert torch.equal(gates, active.double())
    assert (active.sum(-1) == 6).all() and active[:, :4].all()
    largest = norms.topk(2, dim=1).indices
    assert active[:, 4:].gather(1, largest).all()


@pytest.mark.parametrize("factor", [1e-3, 0.5, 7.0, 1e3])
def test_the_query_norm_router_does_not_see_the_scale(factor):
    q = draw(50, 8, 4)
    one, other = (QueryNormRouter(32, 8, 4, 2)(None, part) for part in (q, factor * q))
    assert torch.equal(one.active, other.active)
    torch.testing.assert_close(one.scores, other.scores)


def test_equal_norms_keep_the_query_norm_router_finite():
    q = torch.ones(3, 8, 4, requires_grad=True)
    routing = QueryNormRouter(32, 8, 4, 2)(None, q)
    (routing.gates * torch.randn(3, 8)).sum().backward()
    assert routing.scores.isfinite().all() and q.grad.isfinite().all()


def test_straight_through_gates_are_hard_and_pass_the_gradient_on():
    scores = draw(20, 6).softmax(-1).requires_grad_()
    chosen = choose(scores, 2)
    gates = straight_through(chosen, scores)
    assert torch.equal(gates, chosen.double())
    weight = draw(20, 6)
    (gradient,) = torch.autograd.grad((gates * weight).sum(), scores)
    assert torch.equal(gradient, weight * chosen)


def test_the_norm_router_learns_through_its_hard_gates():
    layer = MoHAttention(16, 8, router="query-norm").double()
    x = draw(2, 9, 16)
    y, q = layer(x), layer.query(x)
    free = MoHAttention.from_softmax(SoftmaxAttention(16, 8).double(), shared=8, top_k=0)
    assert torch.equal(free.router(None, q.unflatten(-1, (8, -1))).gates, torch.ones(2, 9, 8, dtype=torch.float64))
    weight = draw(*y.shape)
    (through,) = torch.autograd.grad((y * weight).sum(), layer.query.weight)
    with watch_routing(layer) as seen:
        y = layer(x)
    hard = seen["router"][0].gates.detach()
    layer.router.register_forward_hook(lambda _, __, routing: routing._replace(gates=hard))
    (blocked,) = torch.autograd.grad((layer(x) * weight).sum(), layer.query.weight)
    assert (through - blocked).abs().max() > 1e-6


@pytest.mark.parametrize("router", ["linear", "query-norm"])
@pytest.mark.parametrize("execute", ["dense", "gather"])
def test_a_stream_uses_the_heads_that_the_whole_pass_uses(router, execute):
    layer = MoHAttention(16, 8, router=router, execute=execute, rotary=True, bias=False).double()
    x = draw(2, 23, 16)
    with torch.no_grad(), watch_routing(layer) as seen:
        whole = layer(x)
        for split in (1, 10, 22):
            first, state = layer.prefill(x[:, :split])
            outputs = [first]
            for t in range(split, 23):
                y, state = layer.step(x[:, t], state)
                outputs.append(y[:, None])
            torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)
    full, *parts = seen["router"]
    assert torch.equal(torch.cat([part.active for part in parts[: 1 + 22]], 1), full.active)
    one = select_state(state, [1])
    assert one.keys.shape[0] == 1


def test_queries_are_measured_before_they_are_turned():
    plain, rotary = (MoHAttention(16, 8, router="query-norm", rotary=turned).double() for turned in (False, True))
    rotary.load_state_dict(plain.state_dict())
    x = draw(2, 9, 16)
    loads = [head_load(layer, x)["router"] for layer in (plain, rotary)]
    assert torch.equal(*loads)


def test_the_router_keeps_full_precision_under_autocast_and_in_bfloat16():
    layer = MoHAttention(16, 8)
    x = torch.randn(2, 30, 16)
    expected = layer.router(x)
    with torch.autocast("cpu", torch.bfloat16), watch_routing(layer) as seen:
        layer(x)
    assert seen["router"][0].scores.dtype == torch.float32
    torch.testing.assert_close(seen["router"][0].scores, expected.scores)
    low = layer.bfloat16().router(x.bfloat16())
    assert low.scores.dtype == torch.float32


def test_dense_and_gathered_train_alike():
    layers = [MoHAttention(16, 8, execute=execute).double() for execute in ("dense", "gather")]
    layers[1].load_state_dict(layers[0].state_dict())
    x, weight = draw(2, 70, 16), draw(2, 70, 16)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1, 50:] = False
    gradients = [torch.autograd.grad((layer(x, mask=mask) * weight).sum(), layer.parameters()) for layer in layers]
    for dense, gathered in zip(*gradients):
        torch.testing.assert_close(gathered, dense, rtol=0, atol=1e-11)


def test_a_models_attention_is_converted_with_its_weights():
    model = CausalLM(64, 16, 2, partial(SoftmaxAttention, heads=4, bias=False, rotary=True))
    names = set(model.state_dict())
    tokens = torch.randint(64, (2, 9))
    expected = model(tokens)
    everything = convert_to_moh(model, shared=2, top_k=2)
    assert set(everything.state_dict()) == names, "no parameter is added"
    torch.testing.assert_close(everything(tokens), expected)
    assert {name: load.tolist() for name, load in head_load(everything, tokens).items()} == {
        f"blocks.{i}.mixer.router": [1.0] * 4 for i in range(2)
    }
    with pytest.raises(ValueError, match="no SoftmaxAttention"):
        convert_to_moh(everything)


def test_head_width_may_be_set_apart_from_the_width():
    layer = MoHAttention(24, 16, head_dim=4, shared=10, top_k=2).double()
    x = draw(1, 7, 24)
    assert layer(x).shape == x.shape and layer.out.in_features == 64
    torch.testing.assert_close(layer(x), by_formula(layer, x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoHAttention(10, 4), "heads must divide dim"),
        (lambda: MoHAttention(8, 4, shared=5), "shared must lie between 0 and the 4 heads, got 5"),
        (lambda: MoHAttention(8, 4, shared=2, top_k=3), "top_k must lie between 0 and the 2 routed heads, got 3"),
        (lambda: MoHAttention(8, 4, shared=2, top_k=0), "top_k=0 would leave 2 heads"),
        (lambda: MoHAttention(8, 4, shared=3, router="query-norm"), "1 routed head is not defined"),
        (lambda: MoHAttention(8, 4, router="hash"), "router must be one of linear, paper, query-norm, got 'hash'"),
        (lambda: MoHAttention(8, 4, execute="sparse"), "execute must be one of dense, gather, got 'sparse'"),
        (lambda: MoHAttention(12, 4, rotary=True), "must be at least 1 wide, and with rotary positions even, got 3"),
        (lambda: MoHAttention(8, 4, balance=-1), "balance must not be negative, got -1"),
        (lambda: MoHAttention(8, 4, causal=False).prefill(torch.randn(1, 3, 8)), "cannot stream"),
    ],
)
def test_bad_arguments_are_refused_with_a_reason(build, message):
    with pytest.raises(ValueError, match=message):
        build()
