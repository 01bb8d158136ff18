"""What kernelized attention with relative positions promises: attention by offsets in n log n, stable, and streamed."""

import copy
import math
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from provenn.core.cost import count_parameters, flops
from provenn.core.errors import UserError
from provenn.evidence import Run
from provenn.evidence.run import run_to_end
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.language import CausalLM
from provenn.nn.streaming import load_state, save_state, select_state, state_bytes
from provenn.papers.nprf import (
    ATTENTIONS,
    KernelAttentionRPE,
    LinformerAttention,
    RelativeBias,
    SoftmaxAttentionRPE,
    attention_called,
    attention_rows,
    diagnose,
    diagnose_model,
    experiments,
    kernelized,
    nprf_encoder_base,
    nprf_encoder_tiny,
    nprf_lm_base,
    nprf_lm_tiny,
    nprf_pixels_base,
    nprf_translator_base,
    nprf_translator_tiny,
    nprf_vit_base,
    nprf_vit_tiny,
)
from provenn.papers.nprf.inspection import inspect
from provenn.papers.nprf.studies import (
    bits_lost,
    copier,
    copy_data,
    crossing,
    explicit_layer,
    fused_layer,
    nprf_layer,
    operations_of,
    row_error,
    stressed_copier,
)
from provenn.tasks import get_task
from provenn.tasks.recall import IGNORED

forms = pytest.mark.parametrize("form", ["fft", "quadratic"])
CAUSAL = [name for name in ATTENTIONS if name != "linformer"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stirred(layer: nn.Module, reach: float = 2.0) -> nn.Module:
    """In float64, with biases off their start of 0."""
    for part in layer.modules():
        if isinstance(part, RelativeBias):
            nn.init.uniform_(part.table, -reach, reach)
            if part.of_class is not None:
                nn.init.uniform_(part.of_class, -reach, reach)
    return layer.double().eval()


def by_definition(layer: KernelAttentionRPE, x, mask=None):
    """The layer from the paper's equations, with nothing of its own but its weights: a weight for every pair."""
    heads = layer.heads
    q, k, v = (m(x).unflatten(-1, (heads, -1)).transpose(1, 2) for m in (layer.query, layer.key, layer.value))
    if layer.normalize:
        q, k = (part / part.square().sum(-1, keepdim=True).sqrt() for part in (q, k))
    elif layer.feature_map != "elu":
        q, k = (part / q.shape[-1] ** 0.25 for part in (q, k))  # whose product is q·k/√d
    q, k = (part * layer.scale**0.5 for part in (q, k))
    if layer.feature_map == "elu":
        fq, fk = F.elu(q) + 1, F.elu(k) + 1
    else:
        fq, fk = (torch.einsum("bhnd,hmd->bhnm", part, layer.draws) for part in (q, k))
        norm_q, norm_k = (part.square().sum(-1, keepdim=True) / 2 for part in (q, k))
        if layer.feature_map == "trf":
            fq, fk = (torch.cat([part.sin(), part.cos()], -1) for part in (fq, fk))
            fq, fk = fq * norm_q.exp(), fk * norm_k.exp()
        else:
            fq, fk = (fq - norm_q).exp(), (fk - norm_k).exp()
    n = x.shape[1]
    weights = fq @ fk.mT
    if layer.rpe is not None:
        sides = (n,) if layer.grid is None else layer.grid
        weights = weights * layer.rpe.matrix(sides).exp()
    elif layer.causal:
        weights = weights.tril()
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None, None], 0)
    y = weights @ v / weights.sum(-1, keepdim=True)
    return layer.out(y.transpose(1, 2).flatten(2))


def impossible(feature_map, normalize, causal, form="auto") -> bool:
    """Causal sums of unbounded keys: by no trigonometric features, and by no FFT."""
    return causal and not normalize and (feature_map == "trf" or (feature_map != "elu" and form == "fft"))


MAPS = ["prf", "trf", "sphere", "orf", "elu"]


@forms
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_layer_is_its_formula_with_gradients(form, feature_map, normalize, causal):
    options = {"feature_map": feature_map, "normalize": normalize, "causal": causal, "form": form}
    if impossible(**options):
        with pytest.raises(ValueError, match="causal sums"):
            KernelAttentionRPE(8, 2, **options)
        return
    layer = stirred(KernelAttentionRPE(8, 2, features=6, max_length=20, **options))
    x = torch.randn(2, 13, 8, dtype=torch.float64, requires_grad=True)
    ours, plain = layer(x), by_definition(layer, x)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(ours)
    wanted = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), wanted) for y in (ours, plain))):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@forms
@pytest.mark.parametrize(("offset", "causal"), [(-3, True), (-3, False), (2, False)])
def test_a_bias_that_leaves_one_offset_copies_the_token_there(form, offset, causal):
    """z_i = v_{i+δ}: a table read the other way round would copy from the other side."""
    layer = KernelAttentionRPE(8, 2, features=6, max_length=13, causal=causal, form=form).double()
    with torch.no_grad():
        layer.rpe.table.fill_(-25)
        layer.rpe.table[:, 12 + offset] = 0
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    there = slice(max(-offset, 0), 13 - max(offset, 0))
    copied = layer.out(layer.value(x.roll(-offset, 1)))
    torch.testing.assert_close(layer(x)[:, there], copied[:, there], rtol=1e-6, atol=1e-6)


@forms
def test_what_is_shifted_within_its_padding_gives_shifted_outputs(form):
    layer = stirred(KernelAttentionRPE(8, 2, features=6, max_length=30, causal=False, form=form))
    content = torch.randn(1, 11, 8, dtype=torch.float64)
    outputs = []
    for start in (2, 9):
        x, mask = torch.zeros(1, 30, 8, dtype=torch.float64), torch.zeros(1, 30, dtype=torch.bool)
        x[:, start : start + 11], mask[:, start : start + 11] = content, True
        outputs.append(layer(x, mask=mask)[:, start : start + 11])
    torch.testing.assert_close(*outputs, rtol=1e-7, atol=1e-9)


def test_normalised_weights_are_within_e_squared_of_each_other_until_biases_come():
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    plain = KernelAttentionRPE(16, 2, features=8192, rpe="none", causal=False).double()
    with torch.no_grad():
        plain.query.weight.mul_(20)
        plain.key.weight.mul_(20)
    rows = attention_rows(plain, x)[0]
    assert 3 < (rows.amax(-1) / rows.amin(-1)).max() < 1.5 * math.e**2  # the estimate is off by a fifth
    biased = stirred(KernelAttentionRPE(16, 2, features=64, causal=False))
    rows = attention_rows(biased, x)[0]
    assert (rows.amax(-1) / rows.amin(-1)).max() > math.e**2


@forms
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 1)])
def test_on_a_grid_it_is_its_formula(form, grid):
    layer = stirred(KernelAttentionRPE(8, 2, features=6, rpe="2d", grid=grid, causal=False, form=form))
    x = torch.randn(2, math.prod(grid), 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_definition(layer, x), rtol=1e-9, atol=1e-9)


@forms
def test_a_class_token_has_biases_of_its_own(form):
    options = {"rpe": "2d", "grid": (3, 4), "class_token": True, "causal": False, "form": form}
    layer = stirred(KernelAttentionRPE(8, 2, features=6, **options))
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_definition(layer, x), rtol=1e-9, atol=1e-9)
    away, to, own = layer.rpe.of_class[0].tolist()
    matrix = layer.rpe.matrix((3, 4))[0]
    assert matrix[0, 0] == own and (matrix[0, 1:] == away).all() and (matrix[1:, 0] == to).all()


@pytest.mark.parametrize("width", [64, 192, 768])
@pytest.mark.parametrize("rpe", ["1d", "none"])
def test_causal_attention_without_normalisation_is_its_formula_in_wide_heads(width, rpe):
    """In float32 against float64, keys' gradient included: 192 wide it once was uniform attention without one."""
    layer = KernelAttentionRPE(width, 1, features=16, normalize=False, rpe=rpe, max_length=40)
    with torch.no_grad():
        layer.query.weight.mul_(5)
        layer.key.weight.mul_(5)
    twin = copy.deepcopy(layer).double()
    x = torch.randn(2, 40, width)
    ours, plain = layer(x), by_definition(twin, x.double())
    torch.testing.assert_close(ours.double(), plain, rtol=1e-3, atol=1e-4)
    weight = torch.randn_like(ours)
    (got,) = torch.autograd.grad((ours * weight).sum(), layer.key.weight)
    (expected,) = torch.autograd.grad((plain * weight).sum(), twin.key.weight)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("causal", [True, False])
def test_the_baseline_without_normalisation_approximates_softmax_of_q_k_over_root_d(causal):
    layer = KernelAttentionRPE(32, 2, features=16384, normalize=False, rpe="none", causal=causal).double()
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    q, k = (m(x).unflatten(-1, (2, 16)).transpose(1, 2) for m in (layer.query, layer.key))
    with torch.no_grad():
        rows = attention_rows(layer, x)[0]
    later = torch.ones(20, 20, dtype=torch.bool).triu(1) if causal else torch.zeros(20, 20, dtype=torch.bool)
    near, far = (
        (rows - (q @ k.mT / 16**power).masked_fill(later, -torch.inf).softmax(-1)).abs().sum(-1).mean().item()
        for power in (0.5, 1.0)
    )
    assert near < 0.5 * far and far > 0.1


@pytest.mark.parametrize("feature_map", ["prf", "sphere", "orf"])
def test_features_are_drawn_as_they_are_called(feature_map):
    """Independent Gaussians are neither orthogonal nor of one length; the others are one of the two."""
    w = KernelAttentionRPE(64, 2, features=32, feature_map=feature_map).draws.double()
    lengths = w.norm(dim=-1)
    cosines = (F.normalize(w, dim=-1) @ F.normalize(w, dim=-1).mT).tril(-1)
    assert (lengths.std() < 1e-5) == (feature_map == "sphere")
    assert (cosines.abs().max() < 1e-5) == (feature_map == "orf")
    assert abs(lengths.square().mean() / 32 - 1) < 0.2


@pytest.mark.parametrize("options", [{}, {"rpe": "none"}, {"causal": False}, {"causal": False, "rpe": "none"}])
@pytest.mark.parametrize("normalize", [True, False])
def test_hidden_tokens_weigh_nothing_whatever_they_hold(options, normalize):
    layer = stirred(KernelAttentionRPE(8, 2, features=6, normalize=normalize, **options))
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, 5:9] = mask[1, 10:] = False
    changed = torch.where(mask[..., None], x, 100.0)
    ours = layer(changed, mask=mask)
    torch.testing.assert_close(ours[mask], by_definition(layer, x, mask)[mask], rtol=1e-9, atol=1e-9)
    nothing = layer(x, mask=torch.zeros_like(mask))
    torch.testing.assert_close(nothing, layer.out.bias.expand_as(nothing))


@forms
@pytest.mark.parametrize("name", CAUSAL)
@settings(deadline=None, max_examples=8)
@given(tokens=st.integers(2, 40), data=st.data())
def test_forward_is_the_fold_of_step_from_any_split(form, name, tokens, data):
    cut = data.draw(st.integers(1, tokens - 1))
    kernel = {} if name.startswith(("softmax", "prf")) else {"form": form}
    layer = stirred(attention_called(name, 2, features=6, max_length=16, **kernel)(8, causal=True))
    x = torch.randn(3, tokens, 8, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        first, state = layer.prefill(x[:, :cut])
        torch.testing.assert_close(first, whole[:, :cut])
        again, _ = layer.prefill(x[:, cut:], state)
        torch.testing.assert_close(again, whole[:, cut:])
        for t in range(cut, tokens):
            y, state = layer.step(x[:, t], state)
            torch.testing.assert_close(y, whole[:, t])


def test_streams_in_float32_within_1e_5():
    layer = KernelAttentionRPE(32, 4, max_length=50).eval()
    nn.init.uniform_(layer.rpe.table, -2, 2)
    x = torch.randn(2, 77, 32)
    with torch.no_grad():
        state, outputs = layer.init_state(2), []
        for t in range(77):
            y, state = layer.step(x[:, t], state)
            outputs.append(y)
        assert (torch.stack(outputs, 1) - layer(x)).abs().max() < 1e-5


def test_states_are_cut_and_saved(tmp_path):
    layer = KernelAttentionRPE(16, 4, features=8)
    with torch.no_grad():
        x = torch.randn(3, 9, 16)
        _, state = layer.prefill(x)
        assert state_bytes(state) == 3 * 9 * 4 * (4 * 8 + 16)
        save_state(state, tmp_path / "state")
        held = select_state(load_state(layer.init_state(1), tmp_path / "state"), 1)
        expected = layer.step(x[:, 0], state)[0][1:2]
        torch.testing.assert_close(layer.step(x[1:2, 0], held)[0], expected)


def test_a_token_of_a_stream_costs_as_many_operations_as_there_were_tokens():
    """n (m + d) for each head, beside the four maps; without RPE the same at any time."""
    for rpe in ("1d", "none"):
        layer = KernelAttentionRPE(16, 4, features=8, rpe=rpe)
        with torch.no_grad():
            states = [layer.prefill(torch.randn(1, n, 16))[1] for n in (99, 199, 299)]
            costs = [flops(partial(layer.step, torch.randn(1, 16), state)) for state in states]
        added = 2 * 100 * 4 * (8 + 4 + 1) if rpe == "1d" else 0
        assert costs[1] - costs[0] == costs[2] - costs[1] == added


def test_keys_of_any_size_leave_outputs_and_gradients_finite():
    for feature_map in MAPS:
        for causal in (True, False):
            options = {"feature_map": feature_map, "normalize": False, "causal": causal}
            if impossible(**options):
                continue
            layer = KernelAttentionRPE(16, 2, features=8, form="auto", precision="single", **options)
            x = (300 * torch.randn(2, 9, 16)).requires_grad_()
            y = layer(x)
            y.sum().backward()
            assert y.isfinite().all() and x.grad.isfinite().all()


def test_without_normalisation_later_keys_do_not_change_earlier_outputs():
    layer = KernelAttentionRPE(16, 2, features=8, normalize=False)
    x = torch.randn(1, 12, 16)
    changed = torch.cat([x[:, :8], 50 * torch.randn(1, 4, 16)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(layer(changed)[:, :8], layer(x)[:, :8])


def test_more_features_come_nearer_to_softmax():
    x = torch.randn(1, 30, 16)
    near = [sum(diagnose(KernelAttentionRPE(16, 2, features=m, causal=False), x).distance) for m in (4, 64, 1024)]
    assert near[0] > 2 * near[1] > 4 * near[2]


def test_normalisation_is_of_each_token_and_head():
    layer = KernelAttentionRPE(16, 4)
    q, k = layer.scaled(*layer._project(torch.randn(2, 5, 16))[:2])
    torch.testing.assert_close(q.norm(dim=-1), torch.ones(2, 4, 5))
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(2, 4, 5))
    wide = KernelAttentionRPE(16, 4, scale=4.0)
    torch.testing.assert_close(wide.scaled(q, k)[0].norm(dim=-1), torch.full((2, 4, 5), 2.0))


@pytest.mark.parametrize("form", ["fft", "quadratic"])
def test_autocast_leaves_the_sums_in_full_precision(form):
    layer = KernelAttentionRPE(16, 2, form=form)
    x = torch.randn(1, 20, 16)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = layer(x)
    assert got.dtype == torch.bfloat16 and (got.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    "options", [{"form": "fft"}, {"form": "quadratic"}, {"normalize": False}, {"rpe": "none"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_as_people_use_it(options, dtype):
    """The forward pass under autocast and the backward pass outside give nearly the gradients of full precision."""
    layer, x = KernelAttentionRPE(16, 2, **options), torch.randn(2, 20, 16)
    grads = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = layer(x).float().square().mean()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[0].norm()


@pytest.mark.parametrize("options", [{"form": "fft"}, {"form": "quadratic"}, {"normalize": False}], ids=str)
def test_an_empty_batch_gives_an_empty_batch(options):
    layer = KernelAttentionRPE(16, 2, **options)
    y = layer(torch.zeros(0, 7, 16, requires_grad=True))
    assert y.shape == (0, 7, 16)
    y.sum().backward()


def test_second_derivatives_through_a_layer_equal_finite_differences():
    for options in ({"form": "fft"}, {"form": "quadratic"}, {"normalize": False}):
        layer = stirred(KernelAttentionRPE(4, 1, features=3, max_length=5, **options))
        x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


def test_features_are_in_the_state_dict_and_can_be_drawn_again():
    layer = KernelAttentionRPE(16, 2)
    assert "draws" in layer.state_dict()
    x, before = torch.randn(1, 9, 16), layer.draws.clone()
    layer.redraw(torch.Generator().manual_seed(1))
    after = layer(x)
    assert not torch.equal(layer.draws, before)
    layer.redraw(torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), after)


# Biases.


@pytest.mark.parametrize("causal", [True, False])
def test_offsets_beyond_the_table_get_its_ends(causal):
    bias = RelativeBias(2, (4,), causal=causal)
    nn.init.normal_(bias.table)
    long, held = bias((7,)), bias.table
    if causal:
        assert torch.equal(long, torch.cat([held[:, :1].expand(-1, 3), held], dim=1))
        assert torch.equal(bias((2,)), held[:, -2:])
    else:
        assert torch.equal(long, torch.cat([held[:, :1].expand(-1, 3), held, held[:, -1:].expand(-1, 3)], dim=1))
        assert torch.equal(bias((2,)), held[:, 2:5])


def test_a_grid_is_extended_on_every_side():
    bias = RelativeBias(1, (2, 3))
    nn.init.normal_(bias.table)
    larger = bias((4, 3))
    assert larger.shape == (1, 7, 5)
    assert torch.equal(larger[:, 2:5], bias.table) and torch.equal(larger[:, 0], bias.table[:, 0])


@pytest.mark.parametrize("sides", [(4,), (3, 4)])
def test_interpolation_stretches_the_table_and_keeps_its_ends(sides):
    bias = RelativeBias(1, sides, beyond="interpolate")
    nn.init.normal_(bias.table)
    longer = bias(tuple(3 * side for side in sides))
    assert longer.shape[1:] == tuple(6 * side - 1 for side in sides)
    for corner in (0, -1):
        at = (0, *[corner] * len(sides))
        torch.testing.assert_close(longer[at], bias.table[at])
    assert torch.equal(bias(sides), bias.table)


@pytest.mark.parametrize("name", ["nprf+rpe", "softmax+rpe"])
def test_another_grid_at_test_time(name):
    layer = attention_called(name, 2, grid=(3, 3), class_token=True)(8, causal=False)
    assert layer(torch.randn(1, 31, 8), grid=(5, 6)).shape == (1, 31, 8)


@pytest.mark.parametrize("causal", [True, False])
def test_softmax_with_rpe_is_its_formula(causal):
    layer = stirred(SoftmaxAttentionRPE(8, 2, max_length=20, causal=causal))
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, 3:6] = False
    q, k, v = layer._project(x)
    offsets = torch.arange(13) - torch.arange(13)[:, None]
    scores = q @ k.mT / 2 + layer.rpe.table[:, 19 + (offsets.clamp(max=0) if causal else offsets)]
    if causal:
        scores = scores.masked_fill(~torch.ones(13, 13, dtype=torch.bool).tril(), -torch.inf)
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    plain = layer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, mask=mask), plain)


def test_linformer_attends_to_mixtures():
    layer = LinformerAttention(8, 2, mixtures=3, max_length=20).double()
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[:, 10:] = False
    q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (layer.query, layer.key, layer.value))
    keys, values = layer.mix_keys[:, :10] @ k[:, :, :10], layer.mix_values[:, :10] @ v[:, :, :10]
    plain = layer.out(((q @ keys.mT / 2).softmax(-1) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, mask=mask), plain)
    with pytest.raises(ValueError, match="more than max_length=20"):
        layer(torch.randn(1, 21, 8, dtype=torch.float64))


# The diagnosis.


def test_rows_are_those_that_the_layer_applies():
    layer = stirred(KernelAttentionRPE(8, 2, features=6, max_length=20))
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, 4:7] = False
    implied, exact = attention_rows(layer, x, mask)
    _, _, v = layer._project(x)
    torch.testing.assert_close(layer._join(implied @ v, x), layer(x, mask=mask))
    assert (implied[1, :, :, 4:7] == 0).all() and (exact.sum(-1) - 1).abs().max() < 1e-9
    assert (exact.triu(1) == 0).all()


@pytest.mark.parametrize(
    ("options", "reach", "says"),
    [
        ({}, 1, None),
        ({"normalize": False}, 1, "norms of"),
        ({"scale": 9.0}, 1, "norms of"),
        ({"form": "fft", "precision": "single"}, 9, "precision='double'"),
        ({"form": "fft"}, 9, None),
        ({"form": "fft"}, 20, "form='quadratic'"),
        ({"form": "quadratic"}, 20, None),
        ({"feature_map": "trf", "features": 4, "causal": False}, 1, "negative"),
    ],
    ids=str,
)
def test_warnings_name_what_is_out_of_the_safe_region(options, reach, says):
    layer = KernelAttentionRPE(32, 2, max_length=16, **{"features": 256, **options})
    nn.init.uniform_(layer.rpe.table, -reach, reach)
    with torch.no_grad():
        layer.query.weight.mul_(3)
        layer.key.weight.mul_(3)
    found = diagnose(layer, 3 * torch.randn(2, 16, 32))
    assert (not found.warnings) if says is None else any(says in warning for warning in found.warnings)
    assert all(f"warning: {warning}" in str(found) for warning in found.warnings)


def test_a_model_is_diagnosed_layer_by_layer():
    model = nprf_lm_tiny()
    tokens = torch.randint(256, (1, 20))
    found = diagnose_model(model, tokens)
    assert list(found) == ["blocks.0.mixer", "blocks.1.mixer"]
    assert all(0 < d < 2 for one in found.values() for d in one.distance)
    shown = inspect(nprf_vit_tiny(), torch.randn(1, 1, 8, 8))
    assert [len(row) for row in shown.values()] == [4, 4]


# Systems.


def tables(model: nn.Module) -> list[nn.Parameter]:
    """The tables of biases, each once."""
    return [part.table for part in model.modules() if isinstance(part, RelativeBias)]


def test_one_table_of_biases_serves_all_layers():
    with torch.device("meta"):
        plain = count_parameters(nprf_vit_base(attention="softmax"))
        assert count_parameters(nprf_vit_base()) - plain == 12 * 27 * 27
        assert count_parameters(nprf_vit_base(share_bias=False)) - plain == 12 * 12 * 27 * 27
        assert [t.numel() for t in tables(nprf_encoder_base())] == [12_276]
        assert [t.numel() for t in tables(nprf_lm_base())] == [8 * 512]
        assert [t.numel() for t in tables(nprf_translator_base())] == [4 * 1023, 4 * 512]
        assert len(tables(nprf_lm_base(share_bias=False))) == 6
    shared, apart = nprf_lm_tiny(), nprf_lm_tiny(share_bias=False)
    apart.load_state_dict(shared.state_dict())
    tokens = torch.randint(256, (2, 20))
    for model in (shared, apart):
        model(tokens).square().mean().backward()
    torch.testing.assert_close(tables(shared)[0].grad, sum(table.grad for table in tables(apart)))


def test_presets_have_the_sizes_of_the_paper():
    """Section 4 and appendix A: layers, width, heads, feed-forward width, m, length."""
    with torch.device("meta"):
        lm, pixels, encoder, vit = nprf_lm_base(), nprf_pixels_base(), nprf_encoder_base(), nprf_vit_base()
        translator = nprf_translator_base()
    sizes = {
        "lm": (lm.blocks, 6, 512, 8, 2048, 64, 512),
        "pixels": (pixels.blocks, 6, 512, 8, 2048, 32, 3072),
        "encoder": (encoder.blocks, 12, 768, 12, 3072, 64, 1023),
        "vit": (vit.blocks, 12, 768, 12, 3072, 32, 27),
        "source": (translator.encoder.blocks, 6, 512, 4, 1024, 16, 1023),
        "target": (translator.blocks, 6, 512, 4, 1024, 24, 512),
    }
    for name, (blocks, *expected) in sizes.items():
        mixer, inner = blocks[0].mixer, blocks[0].feedforward.linear1.out_features
        got = [len(blocks), mixer.dim, mixer.heads, inner, mixer.draws.shape[1], mixer.rpe.table.shape[1]]
        assert got == expected, name
        assert mixer.normalize and mixer.feature_map == "prf" and len({id(b.mixer.rpe) for b in blocks}) == 1, name
    assert vit.class_token is None  # average pooling


def test_normalised_softmax_is_its_formula_and_becomes_nprf_without_training():
    """Rows of norm 1 without 1/√d; with many features the converted model gives nearly what the exact one does."""
    layer = stirred(attention_called("softmax-norm+rpe", 2, max_length=20)(8))
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (layer.query, layer.key, layer.value))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT + layer.rpe.matrix((13,))
    torch.testing.assert_close(layer(x), layer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
    for name in ("softmax-norm+rpe", "softmax-norm", "softmax+rpe", "softmax"):
        model = stirred(nprf_lm_tiny(attention=name, max_length=20))
        tokens = torch.randint(256, (2, 20))
        with torch.no_grad():
            exact = model(tokens)
            off = [
                (kernelized(model, m, generator=torch.Generator().manual_seed(0))(tokens) - exact).norm().item()
                for m in (8, 2048)
            ]
        assert off[1] < 0.2 * off[0] and off[1] < 0.05 * exact.norm()
    with pytest.raises(ValueError, match="without rotary"):
        kernelized(CausalLM(256, 8, 1, partial(SoftmaxAttention, heads=2, rotary=True)))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_runs_in_every_host(name):
    tokens = torch.randint(256, (2, 10))
    if name != "linformer":
        assert nprf_lm_tiny(attention=name)(tokens).shape == (2, 10, 256)
        assert nprf_translator_tiny(attention=name)(tokens, tokens[:, :7]).shape == (2, 7, 256)
    assert nprf_encoder_tiny(attention=name, num_classes=3)(tokens).shape == (2, 3)
    for class_token in (True, False):
        model = nprf_vit_tiny(attention=name, patch=2, class_token=class_token)
        assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_the_decoder_generates_as_it_reads():
    model = nprf_lm_tiny().eval()
    assert isinstance(model, CausalLM)
    prompt = torch.randint(256, (1, 6))
    tokens = list(model.generate(prompt, 5, temperature=0))
    whole = torch.cat([prompt, torch.stack(tokens, 1)], dim=1)
    assert torch.equal(model(whole)[:, 5:-1].argmax(-1), whole[:, 6:])


def test_the_translator_hides_padding_and_later_words():
    model = nprf_translator_tiny().eval()
    source, target = torch.randint(256, (2, 9)), torch.randint(256, (2, 7))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    other = torch.where(mask, source, 5)
    with torch.no_grad():
        expected = model(source, target, mask=mask)
        torch.testing.assert_close(model(other, target, mask=mask), expected)
        changed = target.clone()
        changed[:, 4:] = 3
        torch.testing.assert_close(model(source, changed, mask=mask)[:, :4], expected[:, :4])


def test_the_translator_has_absolute_positions_where_it_has_no_others():
    """The last of a causal layer's outputs knows the order of the words before it by positions alone."""
    source, target = torch.randint(256, (1, 5)), torch.tensor([[7, 8, 9, 10]])
    swapped = torch.tensor([[8, 7, 9, 10]])
    for name, knows in (("softmax", True), ("prf", True), ("softmax+rpe", False), ("nprf+rpe", False)):
        model = nprf_translator_tiny(attention=name, layers=1).eval()  # biases start at 0
        with torch.no_grad():
            change = (model(source, swapped)[:, -1] - model(source, target)[:, -1]).abs().max()
        assert (change > 1e-4) == knows, name


def test_failures_are_counted_over_all_rates_and_seeds(monkeypatch, tmp_path):
    class Trained:
        def __init__(self, name, variants, higher, reached):
            self.name, self.variants, self.reached = name, variants, reached
            self.of_task = types.SimpleNamespace(metric="metric", higher_is_better=higher)

        def label(self, variant):
            return variant

        async def dummy_baseline(self, run):
            return [0.4, 0.6]

        async def trials(self, run, variant):
            return [{"metric": value} for value in self.reached[variant][:2]]

        async def rate(self, run, variant):
            return 0.0, dict(zip("ab", self.reached[variant][2:]))

    fine = Trained("fine", ["nprf+rpe"], True, {"nprf+rpe": [0.9, 0.8, 0.7, 0.6]})
    poor = {"nprf+rpe": [0.5, 0.9, None, 0.4], "prf": [0.3, math.nan, 0.9, 0.9]}  # 0.5 is trivial
    for name in ("COPYING", "TEXT", "DIGITS"):
        monkeypatch.setattr(experiments, name, fine)
    monkeypatch.setattr(experiments, "STRESS", Trained("poor", list(poor), True, poor))
    run = Run("nprf", tmp_path, budget="smoke", seeds=(0, 1))
    measured = run_to_end(experiments.no_failures(run))
    assert measured.value == 3 and measured.unit == "failed of 16 trainings"
    assert measured.tables[0].rows[1:3] == [["poor", "nprf+rpe", 3, 4], ["poor", "prf", 2, 4]]
    monkeypatch.setattr(experiments, "STRESS", Trained("bits", ["nprf+rpe"], False, {"nprf+rpe": [0.4, 0.3, 0.5, 0.1]}))
    assert run_to_end(experiments.no_failures(run)).value == 1


def test_an_autograd_step_through_fft_and_through_weights_are_one():
    losses = {}
    for form in ("fft", "quadratic"):
        torch.manual_seed(0)
        model = nprf_lm_tiny(form=form)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[form] = loss.item()
    assert losses["fft"] == pytest.approx(losses["quadratic"], rel=1e-4)


# The experiments.


def test_what_is_to_be_copied_stood_seven_before():
    data = copy_data(3, True)
    tokens, targets, _ = data.train.tensors
    assert (targets[:, :7] == IGNORED).all() and torch.equal(targets[:, 7:], tokens[:, :-7])
    assert not torch.equal(tokens[:8], data.test.tensors[0])


def test_stress_scales_the_maps_of_queries_and_keys_and_nothing_else():
    torch.manual_seed(0)
    plain = copier("prf", vocab=32)
    torch.manual_seed(0)
    stressed = stressed_copier("prf", vocab=32)
    for (name, a), (_, b) in zip(plain.named_parameters(), stressed.named_parameters(), strict=True):
        torch.testing.assert_close(8 * a if "query" in name or "key" in name else a, b)


def test_errors_of_rows_grow_with_norms_and_fall_with_features():
    errors = {(r, m): row_error(r, m, seed=0, draws=3, keys=128) for r in (1.0, 2.0) for m in (16, 64)}
    assert errors[1.0, 64] < errors[1.0, 16] < errors[2.0, 64]


def test_bits_are_lost_where_a_softmax_is_replaced_and_only_there():
    data = get_task("language-modelling").load("stdlib", length=32, eval_tokens=1024)
    torch.manual_seed(0)
    exact, kernel = (nprf_lm_tiny(attention=name, max_length=32) for name in ("softmax+rpe", "nprf+rpe"))
    for part in exact.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.3)
    with torch.no_grad():
        assert bits_lost(kernel, data) == 0
        assert abs(bits_lost(exact, data)) > 1e-3


def test_what_is_timed_as_softmax_is_softmax():
    explicit, fused = explicit_layer(9), fused_layer(9)
    explicit.load_state_dict(fused.state_dict())
    x = torch.randn(1, 9, 64)
    torch.testing.assert_close(explicit(x), fused(x))


def test_operations_count_the_transforms_of_every_feature_and_channel():
    """m (d + 1) there and back, and one of the biases, of 2n numbers; the maps come on top."""
    n, m = 2048, 8
    with torch.no_grad():
        total = operations_of(partial(nprf_layer, features=m, form="fft"))(n, "cpu")()
    ffts = (2 * m * 65 + 1) * 2.5 * 2 * n * math.log2(2 * n)
    assert ffts < total < 2 * ffts


def test_curves_cross_where_they_meet():
    sizes = (1, 10, 100)
    assert crossing(sizes, [10, 100, 1000], [1, 100, 10_000]) == pytest.approx(10)
    assert crossing(sizes, [100, 1000, 10_000], [1e-2, 1, 100]) is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KernelAttentionRPE(10, 4), "heads must divide dim"),
        (lambda: KernelAttentionRPE(8, 2, rpe="3d"), "rpe must be"),
        (lambda: KernelAttentionRPE(8, 2, rpe="2d"), "go together"),
        (lambda: KernelAttentionRPE(8, 2, grid=(2, 2)), "go together"),
        (lambda: KernelAttentionRPE(8, 2, rpe="2d", grid=(2, 2)), "causal must be False"),
        (lambda: KernelAttentionRPE(8, 2, class_token=True), "class token"),
        (lambda: KernelAttentionRPE(8, 2, feature_map="relu"), "feature_map must be"),
        (lambda: KernelAttentionRPE(8, 2, features=0), "features must be at least 1"),
        (lambda: KernelAttentionRPE(8, 2, scale=0), "scale positive"),
        (lambda: KernelAttentionRPE(8, 2, form="slow"), "form must be"),
        (lambda: KernelAttentionRPE(8, 2, precision="half"), "precision must be"),
        (lambda: KernelAttentionRPE(8, 2, beyond="wrap"), "beyond must be"),
        (lambda: KernelAttentionRPE(8, 2, max_length=0), "at least 1"),
        (lambda: KernelAttentionRPE(8, 2, causal=False).init_state(1), "cannot stream"),
        (lambda: SoftmaxAttentionRPE(8, 2, causal=False).prefill(torch.randn(1, 3, 8)), "cannot stream"),
        (lambda: KernelAttentionRPE(8, 2)(torch.randn(1, 3, 8), grid=(1, 3)), "rpe='2d' only"),
        (lambda: attention_called("nprf+rpe", 2, grid=(2, 3))(8, causal=False)(torch.randn(1, 5, 8)), "has 6 tokens"),
        (lambda: attention_called("performer", 2), "attention must be one of"),
        (lambda: nprf_lm_tiny(attention="linformer"), "causal must be False"),
        (lambda: LinformerAttention(8, 2, mixtures=0), "mixtures"),
        (lambda: nprf_vit_tiny(patch=3), "patch must divide"),
        (lambda: nprf_vit_tiny()(torch.randn(1, 1, 9, 9)), "of 8×8 pixels, got 9×9: build with that image_size"),
        (lambda: nprf_vit_tiny(layers=0), "layers must be at least 1, got 0"),
        (lambda: nprf_vit_tiny(heads=3), "heads must divide dim"),
        (lambda: nprf_translator_tiny(heads=3), "heads must divide dim"),
        (lambda: KernelAttentionRPE(8, 2, rpe="2d", grid=(0, 4), causal=False), "sides of at least 1"),
        (
            lambda: KernelAttentionRPE(8, 2, rpe="2d", grid=(2, 2), causal=False)(torch.randn(1, 4, 8), grid=(-2, -2)),
            "at least one row",
        ),
        (lambda: kernelized(nprf_lm_tiny()), "softmax attention inside"),
    ],
)
def test_bad_arguments_are_refused_with_a_reason(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_stream_with_stretched_biases_ends_with_them():
    layer = KernelAttentionRPE(8, 2, max_length=4, beyond="interpolate")
    _, state = layer.prefill(torch.randn(1, 4, 8))
    with pytest.raises(ValueError, match="reach 4 tokens, got 5"):
        layer.step(torch.randn(1, 8), state)


LAYERS = [
    KernelAttentionRPE,
    partial(KernelAttentionRPE, rpe="none"),
    SoftmaxAttentionRPE,
    partial(LinformerAttention, max_length=8),
]


@pytest.mark.parametrize("build", LAYERS, ids=str)
def test_tokens_and_masks_of_another_shape_are_refused(untyped, build):
    layer, x = build(8, 2), torch.randn(2, 3, 8)
    for other in (torch.randn(2, 3, 9), x[0], x[:, :0]):
        with pytest.raises(ValueError, match=r"expected \(batch, tokens, 8\) with at least one token"):
            layer(other)
    for shape in ((2, 4), (1, 3), (3,), (2, 3, 3)):
        with pytest.raises(ValueError, match=r"mask must be bool of shape \(batch, tokens\) = \(2, 3\)"):
            layer(x, mask=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got float32 of shape \(2, 3\)"):
        layer(x, mask=torch.ones(2, 3))


def test_states_and_grids_of_another_kind_are_refused(untyped):
    with_rpe, without = KernelAttentionRPE(8, 2), KernelAttentionRPE(8, 2, rpe="none")
    for layer, other in ((with_rpe, without), (without, with_rpe)):
        with pytest.raises(TypeError, match="expected the"):
            layer.step(torch.randn(2, 8), other.init_state(2))
        with pytest.raises(ValueError, match="of 3 streams, got tokens of 2"):
            layer.step(torch.randn(2, 8), layer.init_state(3))
    with pytest.raises(ValueError, match=r"go together, got rpe='2d' and grid=\(4,\)"):
        KernelAttentionRPE(8, 2, rpe="2d", grid=(4,))
    with pytest.raises(ValueError, match="cannot stream"):
        KernelAttentionRPE(8, 2, causal=False).step(torch.randn(2, 8), with_rpe.init_state(2))


def test_what_a_system_is_given_must_fit(untyped):
    vit = nprf_vit_tiny()
    for image in (torch.randn(1, 3, 8, 8), torch.randn(1, 8, 8)):
        with pytest.raises(UserError, match=r"expected images \(batch, 1, height, width\)"):
            vit(image)
    with pytest.raises(UserError, match="multiples of the patch's 2, got 8×9"):
        nprf_vit_tiny(patch=2, positions=False)(torch.randn(1, 1, 8, 9))
    tokens = torch.randint(256, (2, 5))
    with pytest.raises(ValueError, match="one batch, got 1 and 2"):
        nprf_translator_tiny()(tokens, tokens[:1])
    with pytest.raises(ValueError, match="mask must be bool"):
        nprf_encoder_tiny()(tokens, mask=torch.ones(2, 6, dtype=torch.bool))
    for build in (nprf_encoder_tiny, nprf_lm_tiny):
        with pytest.raises(UserError, match="5 tokens, more than max_length=4"):
            build(attention="nprf", max_length=4)(tokens)


@pytest.mark.parametrize("name", ["nprf+rpe", "softmax+rpe"])
def test_images_of_other_sizes_go_through_relative_positions_alone(name):
    model = nprf_vit_tiny(attention=name, patch=2, positions=False, class_token=True).eval()
    stirred(model)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert model(torch.randn(2, 1, 12, 6, dtype=torch.float64)).shape == (2, 10)
        # A table that is clipped to the same offsets: the larger system's inner ones.
        larger = (
            nprf_vit_tiny(attention=name, patch=2, image_size=12, positions=False, class_token=True).double().eval()
        )
        state = larger.state_dict()
        for key, value in model.state_dict().items():
            if key.endswith("rpe.table"):
                state[key][:, 2:-2, 2:-2] = value
            else:
                state[key] = value
        larger.load_state_dict(state)
        torch.testing.assert_close(larger(x), model(x))


def test_names_settle_what_the_attention_is_and_leave_the_rest_open():
    assert attention_called("softmax+rpe", 2, beyond="interpolate")(8).rpe.beyond == "interpolate"
    assert attention_called("softmax", 2, bias=False, form="fft")(8).query.bias is None
    with pytest.raises(ValueError, match="has no 'normalize' to be set; it takes beyond"):
        nprf_lm_tiny(normalize=False)
    with pytest.raises(ValueError, match="has no 'featuers'"):
        nprf_lm_tiny(attention="softmax", featuers=8)
