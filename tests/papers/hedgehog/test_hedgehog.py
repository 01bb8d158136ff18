"""Properties of Hedgehog: maps that learn softmax's weights, in linear time, on a host's own projections."""

import copy
import math
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from provenn.core.cost import count_parameters, flops, growth
from provenn.evidence import Run
from provenn.evidence.run import run_to_end
from provenn.nn.attention import SlidingWindowAttention, SoftmaxAttention
from provenn.nn.feature_maps import FeatureMap
from provenn.nn.streaming import state_bytes
from provenn.nn.transformer import TransformerEncoder
from provenn.ops.linear_attention import linear_attention
from provenn.ops.linear_attention import linear_attention_weights as weights
from provenn.papers.hedgehog import (
    MAPS,
    HedgehogAttention,
    HedgehogFeatureMap,
    LinearAttention,
    attention_entropy,
    cross_entropy,
    distill,
    distillation_loss,
    divergence,
    experiments,
    inverted_pairs,
    linearise,
    rank_correlation,
    restore,
    softmax_weights,
    studies,
    teaching,
)
from provenn.papers.hedgehog import distillation as distillation_module
from provenn.papers.hedgehog.distillation import map_parameters
from provenn.papers.hedgehog.layers import FORMS
from provenn.papers.hedgehog.mirrored import mirrored_softmax, plain_mirrored_softmax
from provenn.papers.hedgehog.model import hedgehog_gpt2, hedgehog_small, hedgehog_vit
from provenn.papers.hedgehog.task import Distillation
from provenn.tasks import get_task
from provenn.training import Hardware, Recipe

STABLE = [form for form in FORMS if form != "plain"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def host(layers=2, causal=True, dropout=0.0):
    factory = partial(SoftmaxAttention, heads=2, causal=causal, rotary=True)
    return TransformerEncoder(8, factory, layers=layers, feedforward=16, dropout=dropout).double()


# The feature map.


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=10)
@given(std=st.sampled_from([0.1, 1.0, 20.0]), width=st.sampled_from([None, 2, 6]))
def test_features_are_not_negative_and_sum_as_the_form_says(form, std, width):
    phi = HedgehogFeatureMap(3, 4, width, form=form)
    nn.init.normal_(phi.linear.weight)
    x = std * torch.randn(2, 3, 7, 4)
    features = phi(x)
    assert features.shape == (2, 3, 7, phi.features) and phi.features == 2 * (width or 4)
    assert (features >= 0).all()
    halves = features.unflatten(-1, (2, -1)).sum(-1)
    if form == "softmax":
        torch.testing.assert_close(halves, torch.ones_like(halves))
    if form == "joint":
        torch.testing.assert_close(halves.sum(-1), torch.ones_like(halves[..., 0]))
    if form == "exp":
        assert (features.unflatten(-1, (2, -1)).amax(-1) == 1).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_other_sign_swaps_the_halves(form):
    phi = HedgehogFeatureMap(3, 4, form=form).double()
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(phi(-x), phi(x).unflatten(-1, (2, -1)).flip(-2).flatten(-2), rtol=0, atol=1e-15)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("std", [0.1, 3.0, 12.0, 300.0])
def test_one_exponential_and_its_reciprocal_are_two_softmaxes(std, bias):
    x = (std * torch.randn(2, 3, 9, 4, dtype=torch.float64)).transpose(1, 2).contiguous().transpose(1, 2)
    weight, shift = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 1, 5, dtype=torch.float64)
    inputs = [z.requires_grad_() for z in (x, weight, *([shift] if bias else []))]
    outward = torch.randn(2, 3, 9, 10, dtype=torch.float64)
    given = inputs if bias else [*inputs, None]
    ours, plain = mirrored_softmax(*given), plain_mirrored_softmax(*given)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-15)
    with torch.no_grad():
        assert torch.equal(mirrored_softmax(*given), ours)
    # A floored feature has no gradient; the plain form lets through what rounding is to it, p < 1e-12 times its half's.
    for a, b in zip(*(torch.autograd.grad((z * outward).sum(), inputs) for z in (ours, plain))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_features_gradcheck_twice_and_map_over_examples():
    x, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 3, 3), (2, 3, 3)))
    assert torch.autograd.gradcheck(lambda *z: mirrored_softmax(*z, None), (x, weight))
    assert torch.autograd.gradgradcheck(lambda *z: mirrored_softmax(*z, None), (x, weight))
    mapped = torch.func.vmap(lambda z: mirrored_softmax(z, weight, None))(x.unsqueeze(1))
    torch.testing.assert_close(mapped.squeeze(1), mirrored_softmax(x, weight, None))


def test_features_of_what_is_no_number_are_none():
    x = torch.ones(1, 1, 2, 3)
    x[0, 0, 0, 0] = math.nan
    features = HedgehogFeatureMap(1, 3)(x)
    assert features[0, 0, 0].isnan().all() and features[0, 0, 1].isfinite().all()


def test_a_shift_of_y_leaves_each_half_of_the_softmax_form():
    phi = HedgehogFeatureMap(3, 4, bias=True).double()
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    before = phi(x)
    with torch.no_grad():
        phi.linear.bias += torch.randn(3, 1, 1)
    torch.testing.assert_close(phi(x), before, rtol=0, atol=1e-14)


def test_joint_is_plain_at_twice_y_but_for_a_factor_a_token_so_only_keys_differ():
    joint, plain = HedgehogFeatureMap(2, 4, form="joint").double(), HedgehogFeatureMap(2, 4, form="plain").double()
    q, k = torch.randn(2, 1, 2, 9, 4, dtype=torch.float64)
    ratio = joint(q) / plain(2 * q)
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    torch.testing.assert_close(weights(joint(q), joint(k)), weights(plain(2 * q), joint(k)))
    assert (weights(joint(q), joint(k)) - weights(joint(q), plain(2 * k))).abs().max() > 0.01
    softmax = HedgehogFeatureMap(2, 4).double()
    ratio = softmax(q) / plain(q)
    assert (ratio - ratio[..., :1]).abs().max() > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_plain_exponentials_overflow_where_the_others_do_not(form):
    x = torch.randn(1, 2, 30, 16)
    x = 1e3 * x / x.norm(dim=-1, keepdim=True)
    phi = HedgehogFeatureMap(2, 16, form=form)
    assert phi(x).isfinite().all() == (form != "plain")
    attention = HedgehogAttention(16, 2, form=form)
    assert attention(1e3 * torch.randn(1, 30, 16)).isfinite().all() == (form != "plain")


OPTIONS = [
    *MAPS.values(),
    *(partial(HedgehogFeatureMap, form=f, bias=b, feature_dim=w) for f in FORMS for b in (False, True) for w in (2, 6)),
]


@pytest.mark.parametrize("make", OPTIONS)
def test_gradients_are_true_for_every_map_and_option_on_queries_and_on_keys(make):
    maps = nn.ModuleList(make(2, 4).double() for _ in range(2))
    for parameter in maps.parameters():
        nn.init.normal_(parameter)
    names = [name for name, _ in maps.named_parameters()]
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)

    def attend(q, k, *parameters):
        given = dict(zip(names, parameters))
        phi_q, phi_k = (
            torch.func.functional_call(phi, {n[2:]: p for n, p in given.items() if n[0] == str(i)}, (x,))
            for i, (phi, x) in enumerate(zip(maps, (q, k)))
        )
        return linear_attention(phi_q, phi_k, v)[0]

    assert torch.autograd.gradcheck(attend, (q.requires_grad_(), k.requires_grad_(), *maps.parameters()))


def test_the_forms_are_different_attentions():
    q, k = torch.randn(2, 2, 4, 30, 8, dtype=torch.float64)
    maps = {form: HedgehogFeatureMap(4, 8, form=form).double() for form in FORMS}
    attention = {form: weights(phi(q), phi(k)) for form, phi in maps.items()}
    assert all((attention[a] - attention[b]).abs().max() > 0.01 for a, b in combinations(FORMS, 2))


def test_a_factor_of_a_query_cancels_and_one_of_a_key_does_not():
    q, k = torch.randn(2, 2, 3, 30, 8, dtype=torch.float64).exp()
    factor = torch.randn(2, 3, 30, 1, dtype=torch.float64).exp()
    torch.testing.assert_close(weights(factor * q, k), weights(q, k), rtol=1e-12, atol=1e-12)
    assert (weights(q, factor * k) - weights(q, k)).abs().max() > 0.1


def test_spiky_features_that_do_not_meet_keep_all_their_weight():
    """An ε of 1e-12 in the sum would take a fifth of it: why there is none."""
    phi, eye = HedgehogFeatureMap(1, 16).double(), 40 * torch.eye(16, dtype=torch.float64)
    features = phi((eye[:8] - eye[8:])[None, None])[0, 0]
    queries, key = features[1:], features[:1]
    products = queries @ key.mT
    assert (products / (products + 1e-12)).min() < 0.9
    torch.testing.assert_close(weights(queries, key, causal=False), torch.ones(7, 1, dtype=torch.float64))


@pytest.mark.parametrize("start", ["zeros_", "eye_"])
def test_maps_that_start_at_zero_would_never_learn(start):
    q, k = torch.randn(2, 2, 2, 20, 8, dtype=torch.float64)
    maps = [HedgehogFeatureMap(2, 8).double() for _ in range(2)]
    for phi in maps:
        if start == "zeros_":
            nn.init.zeros_(phi.linear.weight)
    loss = distillation_loss(q, k, maps[0](q), maps[1](k))
    gradients = torch.autograd.grad(loss, [phi.linear.weight for phi in maps])
    assert all((gradient.abs().max() < 1e-12) == (start == "zeros_") for gradient in gradients)


def test_a_map_that_does_not_say_what_it_maps_cannot_be_built():
    with pytest.raises(TypeError, match="abstract method"):
        type("Nothing", (FeatureMap,), {})(2, 4)


def test_features_are_in_float32_under_bfloat16():
    phi = HedgehogFeatureMap(2, 4).bfloat16()
    assert phi(torch.randn(1, 2, 3, 4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", MAPS)
def test_every_map_gives_what_it_says(name):
    phi = MAPS[name](2, 4)
    x = torch.randn(3, 2, 5, 4)
    assert phi(x).shape == (3, 2, 5, phi.features)
    products = phi(x) @ phi(torch.randn(3, 2, 5, 4)).mT
    assert (products >= 0).all()


def test_taylor_features_multiply_to_the_polynomial():
    q, k = torch.randn(2, 1, 2, 9, 4, dtype=torch.float64)
    phi = MAPS["taylor"](2, 4)
    s = q @ k.mT / 2
    torch.testing.assert_close(phi(q) @ phi(k).mT, 1 + s + s**2 / 2, rtol=0, atol=1e-12)


def test_performers_features_are_exp_on_average_and_the_same_for_queries_and_keys():
    q, k = 0.5 * torch.randn(2, 1, 2, 9, 4, dtype=torch.float64)
    products = [MAPS["performer"](2, 4, features=512, seed=seed).double() for seed in range(40)]
    mean = torch.stack([phi(q) @ phi(k).mT for phi in products]).mean(0)
    torch.testing.assert_close(mean, (q @ k.mT / 2).exp(), rtol=0.05, atol=0)
    layer = LinearAttention(8, 2, "performer")
    assert torch.equal(layer.map_query.projection, layer.map_key.projection)
    assert not torch.equal(layer.map_query.projection[0], layer.map_query.projection[1])


def test_taylor_turns_at_minus_one():
    s = torch.linspace(-3, 1, 401, dtype=torch.float64)
    phi = MAPS["taylor"](1, 1)
    values = (phi(torch.ones(1, 1, 1, 1).double()) @ phi(s.view(1, 1, -1, 1)).mT).flatten()
    assert (values.diff()[s[:-1] >= -1] > 0).all() and (values.diff()[s[1:] <= -1] < 0).all()
    assert s[values.argmin()].item() == pytest.approx(-1) and values.min() == pytest.approx(0.5)


def test_cosformer_weighs_by_distance_and_ends_at_its_length(untyped):
    phi = MAPS["cosformer"](1, 1)
    assert phi.length == 2048
    ones = torch.ones(1, 1, 20, 1)
    products = (phi(ones) @ phi(ones).mT)[0, 0]
    i = torch.arange(20)
    torch.testing.assert_close(products, torch.cos(math.pi / 4096 * (i[:, None] - i)))
    torch.testing.assert_close(phi(ones, 5)[:, :, :15], phi(ones)[:, :, 5:])
    with pytest.raises(ValueError, match="end at length=2048, got 2058"):
        phi(ones, 2038)


# The attention.


def test_layer_is_its_formula():
    layer = HedgehogAttention(8, 2).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (layer.query, layer.key, layer.value))
    phi_q, phi_k = layer.map_query(q), layer.map_key(k)
    a = (phi_q @ phi_k.mT).tril()
    y = (a / a.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(layer(x), layer.out(y.transpose(1, 2).flatten(2)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.weights(x), a / a.sum(-1, keepdim=True), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MAPS)
@settings(deadline=None, max_examples=5)
@given(tokens=st.integers(2, 90), data=st.data())
def test_forward_is_the_fold_of_step_from_any_split(name, tokens, data):
    cut = data.draw(st.integers(1, tokens - 1))
    layer = LinearAttention(8, 2, name, rotary=True).double()
    x = torch.randn(2, tokens, 8, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        first, state = layer.prefill(x[:, :cut])
        torch.testing.assert_close(first, whole[:, :cut])
        again, _ = layer.prefill(x[:, cut:], state)
        torch.testing.assert_close(again, whole[:, cut:])
        for t in range(cut, tokens):
            y, state = layer.step(x[:, t], state)
            torch.testing.assert_close(y, whole[:, t])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_masked_tokens_are_as_if_they_were_not_there(causal, side):
    layer = HedgehogAttention(8, 2, causal=causal).double()
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[:, {"left": slice(0, 7), "right": slice(13, None), "holes": slice(5, None, 3)}[side]] = False
    outputs = layer(x, mask=mask)
    torch.testing.assert_close(outputs[mask].view(2, -1, 8), layer(x[mask].view(2, -1, 8)))
    sums = layer.weights(x, mask=mask).sum(-1)
    torch.testing.assert_close(sums[:, :, mask[0]], torch.ones_like(sums[:, :, mask[0]]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [2, 4, 7])
def test_a_state_has_the_papers_size_after_any_number_of_tokens(width):
    layer = HedgehogAttention(8, 2, feature_dim=width)
    for tokens in (1, 10, 300):
        _, state = layer.prefill(torch.randn(1, tokens, 8))
        assert state_bytes(state) == state_bytes(layer.init_state(1)) == 4 * 2 * (2 * width * 4 + 2 * width)


def test_published_parameter_counts():
    def maps(layers, heads, dim, width=None, bias=False):
        return layers * 2 * count_parameters(HedgehogFeatureMap(heads, dim, width, bias=bias))

    assert maps(12, 12, 64) == 1_179_648
    assert maps(12, 12, 64, bias=True) == 1_198_080
    assert maps(32, 32, 128) == 33_554_432
    assert maps(32, 32, 128, 64) == 16_777_216
    assert maps(12, 1, 64, bias=True) == 99_840
    plain = count_parameters(SoftmaxAttention(64, 4))
    assert count_parameters(HedgehogAttention(64, 4)) - plain == 2 * 4 * 16 * 16


def test_work_is_linear_in_the_tokens():
    layer, sizes = HedgehogAttention(8, 2), [512, 1024, 2048]
    work = [flops(lambda n=n: layer(torch.randn(1, n, 8)).sum().backward()) for n in sizes]
    assert growth(sizes, work).exponent == pytest.approx(1, abs=0.02)


# Conversion and distillation.


@pytest.mark.parametrize("causal", [True, False])
def test_conversion_keeps_every_weight_and_can_be_undone(causal):
    model = host(causal=causal).eval()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    before, logits = copy.deepcopy(model.state_dict()), model(x)
    assert linearise(model) == ["layers.0.mixer", "layers.1.mixer"]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (model(x) - logits).abs().max() > 1e-3
    assert [m.causal for m in model.modules() if isinstance(m, LinearAttention)] == 2 * [causal]
    assert restore(model) == ["layers.0.mixer", "layers.1.mixer"]
    assert list(model.state_dict()) == list(before) and torch.equal(model(x), logits)


def test_while_it_is_distilled_a_model_gives_its_own_softmax_outputs():
    model = host().eval()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    logits = model(x)
    linearise(model)
    converted = model(x)
    with teaching(model) as losses:
        assert torch.equal(model(x), logits)
    assert len(losses) == 2 and torch.equal(model(x), converted)


def test_distillation_reaches_every_map_and_nothing_else():
    model = host()
    linearise(model)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    with teaching(model) as losses:
        model(x)
    torch.stack(losses).mean().backward()
    trained = {id(p) for p in map_parameters(model)}
    assert len(trained) == 4
    for parameter in model.parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == (id(parameter) in trained)


def test_distillation_brings_the_weights_to_softmax_and_leaves_the_host():
    model = host(dropout=0.5).train()
    x = torch.randn(4, 12, 8, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    linearise(model)
    history = distill(model, 60 * [x])
    assert model.training and len(history) == 60 and history[-1] < history[0]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    attention = model.layers[0].mixer
    q, k, _ = attention.project(x)
    target = softmax_weights(q, k)
    fresh = LinearAttention.from_softmax(attention.to_softmax())
    assert divergence(target, attention.weights(x)).mean() < 0.5 * divergence(target, fresh.weights(x)).mean()


def test_distillation_as_a_task_learns_without_dropout():
    model, x = host(dropout=0.5).train(), torch.randn(2, 9, 8, dtype=torch.float64)
    linearise(model)
    task = Distillation("language-modelling")
    losses = [task.loss(model, [x]) for _ in range(2)]
    assert model.training and losses[0].item() == losses[1].item()


def test_a_window_is_not_converted():
    model = TransformerEncoder(8, partial(SlidingWindowAttention, heads=2, window=3), layers=2, feedforward=16)
    with pytest.raises(ValueError, match="no SoftmaxAttention"):
        linearise(model)


def test_maps_without_parameters_learn_nothing():
    model = host()
    linearise(model, "elu")
    assert distill(model, [torch.randn(1, 4, 8, dtype=torch.float64)]) == []


@settings(deadline=None, max_examples=15)
@given(tokens=st.integers(2, 12), causal=st.booleans(), seed=st.integers(0, 1000))
def test_the_loss_is_at_least_the_entropy_and_reaches_it_at_softmax(tokens, causal, seed):
    torch.manual_seed(seed)
    q, k, phi_q, phi_k = torch.randn(4, 2, 3, tokens, 5, dtype=torch.float64)
    target = softmax_weights(q, k, causal=causal)
    loss = distillation_loss(q, k, phi_q.exp(), phi_k.exp(), causal=causal)
    entropy = attention_entropy(target)
    assert loss > entropy.mean() and (divergence(target, target).abs() < 1e-12).all()
    logits = target.clamp_min(1e-30).log().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(target, logits.softmax(-1)).sum(), logits)
    assert gradient.abs().max() < 1e-12


def test_the_loss_is_the_mean_over_real_queries_whatever_padding_holds():
    q, k = torch.randn(2, 2, 3, 10, 4, dtype=torch.float64)
    phi_q, phi_k = torch.rand(2, 2, 3, 10, 6, dtype=torch.float64)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    loss = distillation_loss(q, k, phi_q, phi_k, mask=mask)
    first = distillation_loss(q[:1], k[:1], phi_q[:1], phi_k[:1])
    second = distillation_loss(q[1:, :, :6], k[1:, :, :6], phi_q[1:, :, :6], phi_k[1:, :, :6])
    torch.testing.assert_close(loss, (10 * first + 6 * second) / 16)
    q[1, :, 6:] = phi_k[1, :, 6:] = 1e3
    torch.testing.assert_close(distillation_loss(q, k, phi_q, phi_k, mask=mask), loss)


@pytest.mark.parametrize("causal", [True, False])
def test_the_teacher_is_the_softmax_of_the_host_with_its_scale(causal):
    """By value: the target is softmax(q kᵀ/√d), what the host's own attention computes."""
    host, x = SoftmaxAttention(18, 2, causal=causal).double(), torch.randn(2, 7, 18, dtype=torch.float64)
    q, k, v = (m(x).unflatten(-1, (2, 9)).transpose(1, 2) for m in (host.query, host.key, host.value))
    scores = q @ k.mT / 3  # √9
    if causal:
        scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -math.inf)
    target = scores.softmax(-1)
    torch.testing.assert_close(host.out((target @ v).transpose(1, 2).flatten(2)), host(x))
    torch.testing.assert_close(softmax_weights(q, k, causal=causal), target)
    phi_q, phi_k = torch.rand(2, 2, 2, 7, 5, dtype=torch.float64)
    expected = -(target * weights(phi_q, phi_k, causal=causal).clamp_min(1e-12).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(q, k, phi_q, phi_k, causal=causal), expected)
    linear = LinearAttention.from_softmax(host)
    with teaching(model := nn.Sequential(linear)) as losses:
        model(x)
    expected = -(target * linear.weights(x).clamp_min(1e-12).log()).sum(-1).mean()
    torch.testing.assert_close(losses[0], expected)


@pytest.mark.parametrize("causal", [True, False])
def test_long_sequences_are_done_in_blocks_with_the_same_gradient(causal, monkeypatch):
    q, k = torch.randn(2, 2, 3, 20, 4, dtype=torch.float64)
    phi = [torch.rand(2, 3, 20, 6, dtype=torch.float64).requires_grad_() for _ in range(2)]
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    results = []
    for block in (1024, 7):
        monkeypatch.setattr(distillation_module, "QUERIES_AT_ONCE", block)
        loss = distillation_loss(q, k, *phi, causal=causal, mask=mask)
        results.append((loss, *torch.autograd.grad(loss, phi)))
    for whole, blocks in zip(*results):
        torch.testing.assert_close(blocks, whole)


# Diagnostics.


def test_softmax_is_monotone_and_its_opposite_is_inverted():
    products = torch.randn(2, 6, 9, dtype=torch.float64)
    weights = products.softmax(-1)
    ones, zeros = torch.ones(2, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64)
    torch.testing.assert_close(rank_correlation(products, weights), ones)
    torch.testing.assert_close(rank_correlation(-products, weights), -ones)
    torch.testing.assert_close(inverted_pairs(products, weights), zeros)
    torch.testing.assert_close(inverted_pairs(-products, weights), ones)


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    products, weights = torch.randn(2, 1, 12, dtype=torch.float64)
    weights = weights.round(decimals=0)  # with ties
    expected = spearmanr(products[0], weights[0]).statistic
    assert rank_correlation(products, weights).item() == pytest.approx(expected)
    seen = torch.arange(12) < 7
    expected = spearmanr(products[0, :7], weights[0, :7]).statistic
    assert rank_correlation(products, weights, seen).item() == pytest.approx(expected)


def test_queries_without_a_pair_have_no_monotonicity():
    products = torch.randn(3, 3)
    seen = torch.ones(3, 3, dtype=torch.bool).tril()
    assert rank_correlation(products, products.exp(), seen).isnan().tolist() == [True, False, False]
    assert inverted_pairs(products, products.exp(), seen).isnan().tolist() == [True, False, False]


def test_entropy_is_that_of_the_weights():
    assert attention_entropy(torch.eye(4)).tolist() == [0, 0, 0, 0]
    assert attention_entropy(torch.full((1, 8), 1 / 8)).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HedgehogAttention(10, 4), "heads must divide dim"),
        (lambda: LinearAttention(8, 2, "softmax"), "feature_map must be one of"),
        (lambda: HedgehogFeatureMap(2, 4, form="relu"), "form must be one of"),
        (lambda: HedgehogFeatureMap(2, 4, 0), "at least 1"),
        (lambda: MAPS["cosformer"](2, 4, length=0), "length must be at least 1"),
        (lambda: HedgehogFeatureMap(2, 4)(torch.zeros(1, 3, 5, 4)), r"expected \(batch, 2, tokens, 4\)"),
        (lambda: HedgehogAttention(8, 2)(torch.zeros(3, 8)), r"expected \(batch, tokens, 8\)"),
        (lambda: HedgehogAttention(8, 2)(torch.zeros(1, 3, 8), mask=torch.ones(1, 3)), "mask must be bool"),
        (
            lambda: HedgehogAttention(8, 2)(torch.zeros(1, 3, 8), mask=torch.ones(1, 4) > 0),
            "mask must be bool of shape",
        ),
        (lambda: HedgehogAttention(8, 2, causal=False).prefill(torch.zeros(1, 3, 8)), "cannot stream"),
        (lambda: linearise(nn.Linear(2, 2)), "no SoftmaxAttention"),
    ],
)
def test_bad_arguments_are_refused_with_a_reason(build, message, untyped):
    with pytest.raises(ValueError, match=message):
        build()


# The systems.


def test_presets_have_the_papers_parameters_and_are_transformers_with_softmax():
    with torch.device("meta"):
        ours, gpt2 = hedgehog_gpt2(), hedgehog_gpt2(feature_map="softmax")
    assert count_parameters(gpt2) == 124_439_808
    assert count_parameters(ours) - count_parameters(gpt2) == 1_179_648
    kinds = {type(block.mixer) for block in hedgehog_small(feature_map="softmax").blocks}
    assert kinds == {SoftmaxAttention}


@pytest.mark.parametrize("name", ["hedgehog", "taylor", "softmax"])
def test_a_language_model_streams_what_it_reads(name):
    model = hedgehog_small(vocab=30, dim=16, heads=2, layers=2, feature_map=name).double().eval()
    tokens = torch.randint(30, (2, 21))
    with torch.no_grad():
        whole = model(tokens)
        logits, state = model.prefill(tokens[:, :13])
        torch.testing.assert_close(logits, whole[:, :13])
        for t in range(13, 21):
            logits, state = model.step(tokens[:, t], state)
            torch.testing.assert_close(logits, whole[:, t])


def test_a_vision_transformer_sees_both_ways_and_is_converted():
    model = hedgehog_vit(feature_map="softmax", dim=16, heads=2).eval()
    x = torch.randn(2, 1, 8, 8)
    logits = model(x)
    assert len(linearise(model)) == 2 and not any(part.causal for part in model.modules() if hasattr(part, "causal"))
    assert (model(x) - logits).abs().max() > 1e-6
    restore(model)
    assert torch.equal(model(x), logits)
    with pytest.raises(ValueError, match="16 patches, got 4"):
        model(x[:, :, :4, :4])
    with pytest.raises(ValueError, match="patch must divide size"):
        hedgehog_vit(patch=3)


# The experiments


def test_low_rank_additions_start_at_nothing_and_leave_the_weights():
    linear = nn.Linear(6, 5)
    low_rank = studies.LowRank(linear, rank=2, alpha=4)
    x = torch.randn(3, 6)
    assert torch.equal(low_rank(x), linear(x))
    nn.init.normal_(low_rank.up)
    torch.testing.assert_close(low_rank(x), linear(x) + 2 * x @ low_rank.down.T @ low_rank.up.T)


@pytest.mark.parametrize("name", ["softmax", "hedgehog"])
def test_adaptation_trains_low_rank_additions_to_the_four_projections_alone(name):
    model = studies.adapted(hedgehog_small(vocab=30, dim=16, heads=2, layers=2, feature_map=name))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    parts = ("query", "key", "value", "out")
    assert trained == {f"blocks.{i}.mixer.{p}.{side}" for i in range(2) for p in parts for side in ("up", "down")}


def test_every_pair_of_recall_is_asked_for_once():
    tokens, answers, _ = studies.recall_data(0, True).test[:5]
    pairs, base = studies.PAIRS, studies.VALUES + 1
    keys, values = tokens // base, tokens % base
    for row in range(5):
        values_of = dict(zip(keys[row, :pairs].tolist(), values[row, :pairs].tolist()))
        assert len(values_of) == pairs
        assert [values_of[key] for key in keys[row, pairs:].tolist()] == answers[row, pairs:].tolist()


def test_code_and_prose_share_nothing():
    text = '"""Say why."""\nx = 1  # because\ny = """a\nb"""\n'
    assert studies.prose_of(text) == "Say why.\n\na\nb"
    assert studies.code_of(text) == "\nx = 1  \ny = \n"


def test_softmax_mimics_itself_and_a_fixed_map_does_not():
    data = studies.digit_data(0, True)
    options = {"dim": 16, "heads": 2}
    softmax, elu = (hedgehog_vit(feature_map=name, **options).eval() for name in ("softmax", "elu"))
    assert [probe(softmax, data) for probe in (studies.SPIKINESS, studies.DIVERGENCE)] == pytest.approx(
        [0, 0], abs=1e-6
    )
    assert studies.RANK(softmax, data) == pytest.approx(1)
    assert studies.DIVERGENCE(elu, data) > 0 and studies.RANK(elu, data) < 1


def test_probes_are_less_entropy_than_softmax_and_the_divergence_from_it():
    """By value, so that neither a sign nor the order of the two attentions can change."""
    data = studies.digit_data(0, True)
    model = hedgehog_vit(dim=16, heads=2, layers=1, feature_map="elu").eval()
    attention = model.blocks[0].mixer
    with torch.no_grad():
        attention.query.weight.mul_(4)
        attention.key.weight.mul_(4)
        inputs = []
        attention.register_forward_hook(lambda _, given, __: inputs.append(given[0]))
        model(next(iter(DataLoader(data.test, batch_size=studies.SEEN)))[0])
        q, k, _ = attention.project(inputs[0])
        softmax, own = (q @ k.mT / math.sqrt(8)).softmax(-1), attention.weights(inputs[0])
    entropies = [-(a * a.log()).sum(-1).mean().item() for a in (softmax, own)]
    assert studies.SPIKINESS(model, data) == pytest.approx(entropies[0] - entropies[1], rel=1e-4) and entropies[0] < 2.5
    expected = (softmax * (softmax / own).log()).sum(-1).mean().item()
    assert studies.DIVERGENCE(model, data) == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx((own * (own / softmax).log()).sum(-1).mean().item(), rel=0.05)


def test_images_that_are_learned_from_are_not_tested_on():
    data, whole = studies.digit_data(0, False), get_task("image-classification").load("digits", seed=0)
    parts = [{image.numpy().tobytes() for image, _ in part} for part in (data.train, data.val, data.test)]
    assert [len(data.train), len(data.test)] == [838, 779] and len(data.val) == len(whole.val)
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_the_tie_of_properties_to_quality_is_that_of_the_weaker_property(monkeypatch, tmp_path):
    figures = {  # of two seeds; fewer bits are better
        None: {"a": [1.0, 1.0], "b": [2.0, 2.0], "c": [3.0, 3.0], "d": [4.0, 4.0]},
        "spikiness": {"a": [-0.1, -0.1], "b": [-0.2, -0.3], "c": [-0.3, -0.2], "d": [-0.4, -0.4]},
        "rank": {"a": [0.9, 0.9], "b": [0.8, 0.8], "c": [0.6, 0.7], "d": [0.7, 0.6]},
    }

    class Measured:
        variants = "abcd"

        async def measure(self, run, variants, metric=None):
            return figures[metric], {"seeds": (0, 1), "unit": "bits"}

    monkeypatch.setattr(experiments, "WHOLE", Measured())
    measured = run_to_end(experiments.properties_tied(Run("hedgehog", tmp_path, budget="smoke", seeds=(0, 1))))
    assert measured.values == pytest.approx([0.8, 0.8])  # of rank with seed 0, of spikiness with seed 1
    assert measured.unit == "rank correlation"


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_teacher_takes_the_scale_of_its_host(scale):
    q, k = torch.randn(2, 2, 3, 9, 4, dtype=torch.float64)
    phi_q, phi_k = torch.rand(2, 2, 3, 9, 6, dtype=torch.float64)
    target = (q @ k.mT * (0.5 if scale is None else scale)).masked_fill(torch.ones(9, 9).triu(1) > 0, -math.inf)
    expected = -(target.softmax(-1) * weights(phi_q, phi_k).clamp_min(1e-12).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(q, k, phi_q, phi_k, scale=scale), expected)


SHORT = Recipe(epochs=1, batch_size=64, max_steps=2, lr=1e-2)


def convert(study, variant, **overrides):
    """One training of a variant as the study does it, in two steps a stage."""
    data, (label, part) = study.data(0, True), study.variants[variant]
    trained = replace(study.trained, **overrides)
    build = lambda: study.build(part, **data.options)  # noqa: E731
    return trained(build, study.of_task, data, SHORT, seed=0, hardware=Hardware(), title=label).model


@pytest.fixture
def kept(monkeypatch):
    fresh = studies.Kept()
    monkeypatch.setattr(studies, "KEPT", fresh)
    return fresh


def test_every_variant_starts_from_one_host_which_frozen_variants_keep(kept):
    base = convert(experiments.LORA, "base")
    (host,) = kept.values.values()
    assert all(torch.equal(host[name], value) for name, value in base.state_dict().items())
    model = convert(experiments.LORA, "hedgehog")
    assert len(kept.values) == 2  # the maps, and no second host
    for name, value in model.state_dict().items():
        name = name.replace(".linear.weight", ".weight") if "map_" not in name else name
        assert name not in host or torch.equal(host[name], value)


def test_tuning_does_not_reach_what_is_kept_of_the_host_and_its_maps(kept):
    convert(experiments.WHOLE, "hedgehog")
    before = copy.deepcopy(kept.values)
    tuned = convert(experiments.WHOLE, "hedgehog")
    for key, state in kept.values.items():
        assert all(torch.equal(value, before[key][name]) for name, value in state.items())
    host, maps = before.values()
    assert all(torch.equal(maps[name], value) for name, value in host.items())  # distillation leaves the host
    assert not all(torch.equal(maps[name], value) for name, value in tuned.state_dict().items())


def test_swapped_in_maps_are_distilled_but_for_the_frozen(kept):
    model, raw = convert(experiments.SWAPPED, "hedgehog"), convert(experiments.SWAPPED, "raw")
    assert len(kept.values) == 1
    learned, fixed = (part.state_dict() for part in (model, raw))
    assert {name for name in learned if not torch.equal(learned[name], fixed[name])} == {
        name for name in learned if "map_" in name
    }


def test_distillation_as_a_task_has_the_mean_loss_of_the_layers_and_the_metric_of_its_task():
    task, of = Distillation("image-classification"), get_task("image-classification")
    data = studies.digit_data(0, True)
    model = hedgehog_vit(dim=16, heads=2)
    batch = next(iter(DataLoader(data.train, batch_size=8)))
    with teaching(model) as losses:
        model(batch[0])
    torch.testing.assert_close(task.loss(model, batch), sum(losses) / 2)
    assert task.metric == of.metric and task.dummy_baseline(data) == of.dummy_baseline(data)
    assert task.evaluate(model.eval(), data.val) == of.evaluate(model, data.val)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [5, 90])
def test_a_layer_is_the_same_however_it_is_executed(causal, n):
    torch.manual_seed(0)
    layers = [
        HedgehogAttention(12, 3, causal=causal, execute=name).double() for name in ("linear", "quadratic", "auto")
    ]
    x = torch.randn(2, n, 12, dtype=torch.float64)
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
        torch.testing.assert_close(layer(x), layers[0](x), rtol=1e-10, atol=1e-10)
    if causal:
        torch.testing.assert_close(layers[1].prefill(x)[0], layers[0](x), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="execute must be one of auto, linear, quadratic, got 'fast'"):
        HedgehogAttention(12, 3, execute="fast")


@pytest.mark.parametrize("form", ["softmax", "joint", "exp"])
def test_the_floor_is_the_same_with_and_without_gradients(form):
    phi = HedgehogFeatureMap(2, 4, form=form)
    x = 40 * torch.randn(1, 2, 30, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = phi(x)
    assert torch.equal(phi(x).detach(), plain) and plain.min().item() == pytest.approx(1e-12)
