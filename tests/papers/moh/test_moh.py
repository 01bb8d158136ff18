"""What MoH promises: attention whose heads are weighed and chosen by the token, with its limits and its identities."""

import re
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import provenn
from provenn.core.cost import count_parameters, flops
from provenn.core.errors import UserError
from provenn.nn.attention import SoftmaxAttention, split_heads
from provenn.nn.auxiliary import collect_auxiliary
from provenn.nn.diffusion import noise_loss, sample
from provenn.nn.language import CausalLM
from provenn.nn.streaming import select_state
from provenn.ops.routed_heads import routed_attention
from provenn.papers.moh import DiT, MoHViT, dit, layers, moh_dit_digits, moh_llm_b, moh_llm_s, moh_vit_digits, vit
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
from provenn.papers.moh.official import convert
from provenn.papers.moh.vit import AggregatedAttention, relative_coordinates

KINDS = [(2, 3), (1, 2), (0, 4), (8, 0), (4, 4), (6, 1)]  # (shared, top_k) of 8 heads
kinds = pytest.mark.parametrize("shared, top_k", KINDS)


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
@pytest.mark.parametrize("execute", ["dense", "gather", "auto"])
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
        split_heads(attention.query(x), attention.heads),
        split_heads(attention.key(x), attention.heads),
        split_heads(attention.value(x), attention.heads),
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
    even = MoHAttention.from_softmax(softmax, router="paper", shared=0, top_k=8)
    nn.init.zeros_(even.router.routed.weight)
    torch.testing.assert_close(even(x) - softmax.out.bias, (softmax(x) - softmax.out.bias) / 8)


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


@pytest.mark.parametrize("execute", ["dense", "gather", "auto"])
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
@pytest.mark.parametrize("execute", ["dense", "gather", "auto"])
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


@pytest.mark.parametrize("tokens, causal, gathers", [(64, False, False), (900, False, True), (900, True, False)])
def test_auto_gathers_where_that_is_no_slower(tokens, causal, gathers, monkeypatch):
    counted, routed = [], layers.routed_attention
    monkeypatch.setattr(layers, "routed_attention", lambda *args, **more: counted.append(1) or routed(*args, **more))
    dense, auto = (
        MoHAttention(16, 8, shared=1, top_k=2, causal=causal, execute=execute).double() for execute in ("dense", "auto")
    )
    auto.load_state_dict(dense.state_dict())
    x = draw(1, tokens, 16)
    slopes = [torch.autograd.grad(layer(x).square().sum(), layer.parameters()) for layer in (dense, auto)]
    assert len(counted) == gathers
    for ours, expected in zip(slopes[1], slopes[0]):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


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
        (lambda: MoHAttention(8, 4, execute="sparse"), "execute must be one of dense, gather, auto, got 'sparse'"),
        (lambda: MoHAttention(12, 4, rotary=True), "must be at least 1 wide, and with rotary positions even, got 3"),
        (lambda: MoHAttention(8, 4, balance=-1), "balance must not be negative, got -1"),
        (lambda: MoHAttention(8, 4, balance=float("nan")), "balance must be a finite number, got nan"),
        (lambda: MoHAttention(8, 4, causal=False).prefill(torch.randn(1, 3, 8)), "cannot stream"),
        (
            lambda: MoHAttention(8, 4)(torch.randn(1, 3, 7)),
            re.escape("expected (batch, tokens, 8) with at least one token, got (1, 3, 7)"),
        ),
    ],
)
def test_bad_arguments_are_refused_with_a_reason(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("execute", ["dense", "gather", "auto"])
@pytest.mark.parametrize(
    "mask, got",
    [
        (torch.ones(2, 4, dtype=torch.bool), "got bool of shape (2, 4)"),
        (torch.ones(1, 5, dtype=torch.bool), "got bool of shape (1, 5)"),
        (torch.ones(2, 5, 5, dtype=torch.bool), "got bool of shape (2, 5, 5)"),
        (torch.ones(2, 5), "got float32 of shape (2, 5)"),
    ],
)
def test_masks_of_another_shape_are_refused(execute, mask, got, untyped):
    layer = MoHAttention(8, 4, execute=execute)
    with pytest.raises(ValueError, match=re.escape(f"(2, 5), True where a token may be attended, {got}")):
        layer(torch.randn(2, 5, 8), mask=mask)


# The systems.


def test_relative_coordinates_are_those_of_every_pair():
    for height, width, ratio, trained in ((4, 6, 2, 4), (3, 3, 1, 7), (8, 8, 8, 8)):
        table, index = relative_coordinates(height, width, ratio, trained, torch.zeros((), dtype=torch.float64))
        rows, columns = (torch.arange(side, dtype=torch.float64) for side in (height, width))
        middles = [F.avg_pool1d(axis[None], ratio)[0] for axis in (rows, columns)]
        query = torch.cartesian_prod(rows, columns)
        offset = (query[:, None] - torch.cartesian_prod(*middles)) / (trained - 1) * 8
        torch.testing.assert_close(table[index], offset.sign() * (offset.abs() + 1).log2() / 3)


def test_aggregated_attention_is_one_softmax_over_near_and_far():
    """Token by token, from the definition: its 3×3 neighbours inside the image and all pooled tokens."""
    layer = AggregatedAttention(8, 2, 1, 1, ratio=2, trained=4).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, side = draw(1, 16, 8), 4
    pooled = F.avg_pool2d(F.gelu(layer.reduce(x.transpose(1, 2).view(1, 8, 4, 4))), 2).flatten(2).transpose(1, 2)
    pooled = layer.norm(pooled)
    heads = {
        name: map(part)[0].view(-1, 2, 4).transpose(0, 1)
        for name, map, part in (
            ("q", layer.query, x),
            ("k", layer.key, x),
            ("v", layer.value, x),
            ("far_k", layer.key, pooled),
            ("far_v", layer.value, pooled),
        )
    }
    q, k, far_k = (F.normalize(heads[name], dim=-1) for name in ("q", "k", "far_k"))
    bias = layer._position_bias(4, 4)
    y = torch.zeros(16, 2, 4, dtype=torch.float64)
    for head in range(2):
        for token in range(16):
            row, column = divmod(token, side)
            near = [
                (slot, (row + slot // 3 - 1) * side + column + slot % 3 - 1)
                for slot in range(9)
                if 0 <= row + slot // 3 - 1 < side and 0 <= column + slot % 3 - 1 < side
            ]
            sharp = F.softplus(layer.temperature[head]).item() * torch.tensor(len(near) + 4.0).double().log()
            query = (q[head, token] + layer.query_embedding[head, 0]) * sharp
            scores = [query @ k[head, other] + layer.local_bias[head, slot] for slot, other in near]
            scores += [query @ far_k[head, j] + bias[head, token, j] for j in range(4)]
            weights = torch.stack(scores).softmax(0)
            learned = q[head, token] @ layer.local_tokens[head] + layer.local_shift[head, 0]
            for weight, (slot, other) in zip(weights, near):
                y[token, head] += (weight + learned[slot]) * heads["v"][head, other]
            y[token, head] += weights[len(near) :] @ heads["far_v"][head]
    expected = layer.out((y * layer.router(x).gates[0, ..., None]).flatten(1))
    torch.testing.assert_close(layer(x, 4, 4)[0], expected)


@pytest.mark.parametrize(
    "build, parameters, routers",
    [
        (vit.moh_vit_small_80, 49_910_548, 168_984),
        (vit.moh_vit_small_75, 49_910_548, 168_984),
        (vit.moh_vit_base_75, 90_020_632, 299_136),
        (vit.moh_vit_base_50, 90_023_512, 302_016),
        (dit.moh_dit_xl_90, 675_666_464, 536_832),
        (dit.moh_dit_xl_75, 675_689_504, 559_872),
        (dit.moh_dit_l_90, 458_512_416, None),
        (dit.moh_dit_l_75, 458_528_800, None),
        (dit.moh_dit_b_90, 130_638_368, None),
        (dit.moh_dit_b_75, 130_638_368, None),
        (dit.moh_dit_s_90, 32_997_152, None),
        (dit.moh_dit_s_75, 32_998_688, None),
    ],
)
def test_published_systems_have_the_authors_parameters(build, parameters, routers):
    with torch.device("meta"):
        model = build()
    assert count_parameters(model) == parameters
    if routers is not None:
        assert sum(p.numel() for name, p in model.named_parameters() if ".router." in name) == routers


@pytest.mark.parametrize(
    "build, share",
    [(vit.moh_vit_small_80, 343 / 429), (vit.moh_vit_small_75, 323 / 429), (vit.moh_vit_base_75, 441 / 588),
     (vit.moh_vit_base_50, 294 / 588)],
)  # fmt: skip
def test_the_share_of_heads_is_the_one_in_the_name(build, share):
    with torch.device("meta"):
        routers = [part for part in build().modules() if isinstance(part, HeadRouter)]
    assert sum(r.shared + r.top_k for r in routers) / sum(r.heads for r in routers) == share


@pytest.mark.parametrize("build", [*dit.PRESETS.values(), moh_llm_s, moh_llm_b])
def test_without_its_routers_a_system_has_the_parameters_of_multi_head_attention(build):
    """Also where the paper's heads are as many as it says, of a width of their own: 675,129,632 for DiT-XL/2."""
    with torch.device("meta"):
        model = build()
    routers = sum(p.numel() for name, p in model.named_parameters() if ".router." in name)
    if "llm" in build.__name__:
        with torch.device("meta"):
            assert count_parameters(model) - routers == count_parameters(build(shared=None, top_k=None))
    elif "xl" in build.__name__:
        assert count_parameters(model) - routers == 675_129_632
    assert 0 < routers < 0.01 * count_parameters(model)


@pytest.mark.parametrize(
    "build, giga",
    [(vit.moh_vit_small_75, 10.32), (vit.moh_vit_base_75, 18.35), (vit.moh_vit_base_50, 18.35)],
)
def test_a_vision_transformer_does_the_authors_multiply_adds(build, giga):
    """Counted in their code at 224 × 224, routers included: as many at 50 % of the heads as at 75 %."""
    with torch.device("meta"), torch.no_grad():
        model, image = build().eval(), torch.zeros(1, 3, 224, 224)
        assert flops(lambda: model(image)) / 2e9 == pytest.approx(giga, rel=2e-3)


@pytest.mark.parametrize(
    "build, giga", [(dit.moh_dit_s_75, 5.46), (dit.moh_dit_b_90, 21.8), (dit.moh_dit_xl_75, 114.5)]
)
def test_a_diffusion_transformer_does_the_authors_multiply_adds(build, giga):
    """Of its maps, as counted in their code, where attention is fused; and 2 · 256² for each feature of the heads."""
    with torch.device("meta"), torch.no_grad():
        model = build().eval()
        inputs = torch.zeros(1, 4, 32, 32), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        products = sum(2 * 256**2 * block.attention.out.in_features for block in model.blocks)
        assert flops(lambda: model(*inputs)) / 2e9 == pytest.approx(giga + products / 1e9, rel=2e-3)


def test_gathered_attention_does_the_share_of_the_operations_that_is_in_use():
    q, k, v = (torch.randn(1, 8, 64, 16) for _ in range(3))
    turns = (torch.arange(64)[:, None] + torch.arange(6)) % 8  # 6 of 8 heads, each by as many tokens
    active = torch.zeros(64, 8, dtype=torch.bool).scatter(1, turns, True).T[None]
    gathered = flops(lambda: routed_attention(q, k, v, active))
    assert gathered == 0.75 * flops(lambda: F.scaled_dot_product_attention(q, k, v))


def test_language_models_have_the_papers_size():
    with torch.device("meta"):
        counted = [count_parameters(m) for m in (moh_llm_s(), moh_llm_b(), moh_llm_b(shared=None, top_k=None))]
    assert [round(count / 1e6) for count in counted] == [186, 882, 881]


@pytest.mark.parametrize("name", ["moh_vit_small_75", "moh_vit_base_50", "moh_dit_s_90", "moh_dit_b_75"])
def test_a_published_state_dict_is_recognised(name):
    """From our names back to the authors', and forth again."""
    with torch.device("meta"):
        ours = {**vit.PRESETS, **dit.PRESETS}[name](num_classes=7).state_dict()
    preset, options, back = convert(in_the_authors_names(ours))
    assert preset == name and options["num_classes"] == 7
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in ours.items()}


def in_the_authors_names(ours):
    """What the authors call our parameters, with q, k and v in one."""
    found = {}
    for name, value in ours.items():
        for own, theirs in (
            (r"^embeds\.(\d)\.", lambda m: f"patch_embed{int(m[1]) // 2 + 1}.{('proj', 'norm')[int(m[1]) % 2]}."),
            (r"^norms\.(\d)\.", lambda m: f"norm{int(m[1]) + 1}."),
            (r"^stages\.(\d)\.", lambda m: f"block{int(m[1]) + 1}."),
            (r"feedforward\.linear", "mlp.fc"),
            (r"feedforward\.conv\.", "mlp.dwconv.dwconv."),
            (r"(blocks\.\d+)\.linear", r"\1.mlp.fc"),
            (r"^patches\.", "x_embedder.proj."),
            (r"^positions$", "pos_embed"),
            (r"^time1\.", "t_embedder.mlp.0."),
            (r"^time2\.", "t_embedder.mlp.2."),
            (r"^classes\.", "y_embedder.embedding_table."),
            (r"\.modulation\.", ".adaLN_modulation.1."),
            (r"\.attention\.", ".attn."),
            (r"router\.routed", "wg"),
            (r"router\.kinds", "wg_0"),
            (r"router\.common", "wg_1"),
            (r"attn\.out\.", "attn.proj."),
            (r"attn\.reduce\.", "attn.sr."),
            (r"position([12])\.", r"cpb_fc\1."),
            (r"local_bias", "relative_pos_bias_local"),
            (r"local_tokens", "learnable_tokens"),
            (r"local_shift", "learnable_bias"),
        ):
            name = re.sub(own, theirs, name)
        if name.startswith("head.") and "positions" in ours:
            name = "final_layer.linear." + name.removeprefix("head.")
        found[name] = value
    for name in [name for name in found if ".attn.query." in name]:
        block, kind = name.split(".attn.query.")
        parts = [found.pop(f"{block}.attn.{part}.{kind}") for part in ("query", "key", "value")]
        if f"{block}.attn.learnable_bias" in found:  # where neighbours and pooled tokens share keys and values
            found[f"{block}.attn.q.{kind}"] = parts[0]
            found[f"{block}.attn.kv.{kind}"] = torch.cat(parts[1:])
        else:
            found[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return found


def test_weights_of_other_models_are_refused():
    with pytest.raises(UserError, match="found other parameters"):
        convert({"fc.weight": torch.zeros(1)})
    with torch.device("meta"):
        theirs = in_the_authors_names(vit.moh_vit_small_75(num_classes=7).state_dict())
    theirs.pop("norm1.bias")
    with pytest.raises(UserError, match="not the sizes"):
        convert(theirs)


def test_a_diffusion_transformer_starts_as_nothing_and_learns_to_denoise():
    model = moh_dit_digits(layers=2, dim=32)
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 10])
    assert not model(x, t, y).any()
    images, generator = torch.ones(16, 1, 8, 8), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = noise_loss(model, images, torch.zeros(16, dtype=torch.long), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]
    drawn = sample(model.eval(), torch.zeros(4, dtype=torch.long), (1, 8, 8), generator=generator, steps=20, limit=1.5)
    assert (drawn.mean() - 1).abs() < 0.3


def test_guidance_moves_from_no_class_to_the_class():
    model = DiT(dim=16, heads=[2, 2], shared=[1, 1], top_k=[1, 1], size=8, num_classes=10)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 4])
    given, free = model(x, t, y), model(x, t, torch.full_like(y, 10))
    torch.testing.assert_close(model.guided(x, t, y, 1.0), given, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.guided(x, t, y, 0.0)[:, :3], free[:, :3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.guided(x, t, y, 2.0)[:, 3:], given[:, 3:], rtol=1e-3, atol=1e-3)


def test_a_vision_transformer_takes_images_of_other_sizes():
    model = MoHViT(
        dims=(8, 8), heads=(2, 2), depths=(1, 1), shared=(2, 1), top_k=(0, 1), ratios=(2, 2), size=64, num_classes=3
    )
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 3)
    with pytest.raises(ValueError, match="multiples of 32, got 60 x 64"):
        model(torch.randn(1, 3, 60, 64))


def test_a_vision_transformer_that_gathers_is_the_same_function():
    """All stages: with and without shared heads, all heads shared, and beyond the map's border; gradients too."""
    sizes = {"dims": (8, 16, 32, 32), "heads": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "ratios": (2, 2, 2, 2)}
    heads = {"shared": (2, 0, 8, 4), "top_k": (2, 2, 0, 3)}
    models = [
        MoHViT(**sizes, **heads, num_classes=5, size=64, execute=execute).double().eval()
        for execute in ("dense", "gather")
    ]
    for parameter in models[0].parameters():
        nn.init.normal_(parameter, std=0.3)
    models[1].load_state_dict(models[0].state_dict())
    x = draw(2, 3, 64, 96).requires_grad_()
    values = []
    for model in models:
        y = model(x)
        values.append((y, *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))))
    for gathered, dense in zip(values[1], values[0]):
        torch.testing.assert_close(gathered, dense, rtol=1e-9, atol=1e-9)
    image = torch.randn(1, 3, 64, 64, device="meta")
    assert models[1].to("meta").float()(image).shape == (1, 5), "traced and counted, it computes every head"


def test_positions_of_the_diffusion_transformer_are_the_authors():
    """Values of their table of 3 × 3 places in 8 features, of noise levels in 6: columns and sines first, then rows."""
    table = [
        [0.841471, 0.01, 0.540302, 0.99995, 0.0, 0.0, 1.0, 1.0],
        [0.0, 0.0, 1.0, 1.0, 0.841471, 0.01, 0.540302, 0.99995],
        [0.909297, 0.019999, -0.416147, 0.9998, 0.841471, 0.01, 0.540302, 0.99995],
    ]
    levels = [
        [-0.989992, 0.990321, 0.999979, 0.14112, 0.138798, 0.006463],
        [-0.839104, 0.475559, 0.062651, 0.543971, 0.879684, 0.998035],
    ]
    torch.testing.assert_close(dit.grid_positions(3, 8)[[1, 3, 5]], torch.tensor(table), rtol=0, atol=2e-6)
    features = dit.noise_level_features(torch.tensor([3, 700]), 6)
    torch.testing.assert_close(features, torch.tensor(levels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shared", [3, None])
def test_a_diffusion_transformer_draws_queries_keys_and_values_as_one_map(shared):
    """Xavier's bound of (3 · dim) × dim; drawn apart the weights would be √2 larger."""
    model = moh_dit_digits(dim=64, layers=2, shared=shared, top_k=shared)
    bound = (6 / (64 + 3 * 64)) ** 0.5
    for block in model.blocks:
        for part in (block.attention.query, block.attention.key, block.attention.value):
            assert 0.99 * bound < part.weight.abs().max() <= bound
        assert block.attention.out.weight.abs().max() > 1.3 * bound


PRESETS_THAT_GATHER = {
    "moh_small": ({"dim": 16, "layers": 1}, [torch.arange(40)[None]]),
    "moh_vit_digits": ({"dim": 16, "layers": 1}, [torch.linspace(-1, 1, 64).view(1, 1, 8, 8)]),
    "moh_dit_digits": (
        {"dim": 16, "layers": 1},
        [torch.linspace(-1, 1, 64).view(1, 1, 8, 8), torch.tensor([500]), torch.tensor([3])],
    ),
}


@pytest.mark.parametrize("name", PRESETS_THAT_GATHER)
def test_a_preset_computes_the_heads_in_use_alone_where_that_is_asked(name, monkeypatch):
    options, inputs = PRESETS_THAT_GATHER[name]
    counted = []
    routed = layers.routed_attention
    monkeypatch.setattr(layers, "routed_attention", lambda *args, **more: counted.append(1) or routed(*args, **more))
    outputs = []
    for execute in ("dense", "gather", "auto"):
        model = provenn.paper("moh").build(name, execute=execute, **options).double().eval()
        torch.manual_seed(0)
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.3)
        outputs.append(model(*(x.double() if x.is_floating_point() else x for x in inputs)))
    assert counted == [1], "once by gather, never by auto at this size"
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0])


def test_a_balance_that_nobody_takes_is_not_dropped_without_a_word():
    layer, x = MoHAttention(16, 8), torch.randn(2, 9, 16)
    with pytest.warns(UserWarning, match=r"collect_auxiliary.*balance=0"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with collect_auxiliary():
            layer(x)
        MoHAttention(16, 8, balance=0)(x)
        layer.eval()(x)


def test_what_is_inspected_is_the_load_of_the_heads():
    from provenn.papers.moh.inspection import inspect

    rows = inspect(moh_vit_digits(), torch.randn(1, 1, 8, 8))
    assert len(rows) == 3
    for load in rows.values():
        assert load[:3].tolist() == [1.0] * 3 and load.sum().item() == pytest.approx(6)


TINY = {"dims": (8,), "heads": (2,), "depths": (1,), "shared": (1,), "top_k": (1,), "ratios": (2,)}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: moh_vit_digits(size=9), "patch must divide size"),
        (lambda: moh_vit_digits(shared=None), "both given, or both None for multi-head attention, got None and 3"),
        (lambda: moh_vit_digits(layers=0), "must be at least 1, got 64, 0, 1 and 10"),
        (lambda: moh_vit_digits()(torch.zeros(1, 3, 8, 8)), r"expected images of \(1, 8, 8\).*got \(3, 8, 8\)"),
        (lambda: moh_dit_digits(layers=0), "must be at least 1, got 64, 1, 10 and 0"),
        (lambda: DiT(dim=16, heads=[2], shared=[1], top_k=[2]), "top_k must lie between 0 and the 1 routed heads"),
        (lambda: MoHViT(**TINY, num_classes=-1), "num_classes at least 0"),
        (lambda: MoHViT(**TINY, execute="sparse"), "execute must be one of dense, gather, auto, got 'sparse'"),
        (lambda: MoHViT(**TINY, drop_path=1), "drop_path must lie between 0 and 1, below 1, got 1"),
        (lambda: MoHViT(**TINY)(torch.zeros(1, 1, 32, 32)), "expected images of 3 channels, got 1"),
        (lambda: moh_dit_digits(size=9), "patch must divide size"),
        (lambda: moh_dit_digits(shared=None), "or both not at all"),
        (
            lambda: moh_dit_digits(dim=32)(torch.zeros(1, 1, 6, 6), torch.zeros(1), torch.zeros(1).long()),
            r"expected images of \(1, 8, 8\), channels and pixels, got \(1, 6, 6\)",
        ),
        (lambda: DiT(dim=16, heads=[2, 2], shared=[1], top_k=[1]), "one entry for each block"),
        (lambda: vit.moh_vit_small_75(size=100), "size must be a multiple of 32, got 100"),
        (lambda: MoHViT(dims=(8,), heads=(2, 2), depths=(1,), shared=(1,), top_k=(1,), ratios=(2,)), "for each stage"),
    ],
)
def test_systems_that_cannot_be_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("causal", [True, False])
def test_one_graph_of_open_length_serves_all(untyped, causal):
    layer = MoHAttention(24, 4, causal=causal).eval()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (7, 12):
        x = torch.randn(2, tokens, 24)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-6)
