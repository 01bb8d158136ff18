"""What RAT promises: attention at one end, a gated RNN at the other, and a stream that keeps one entry a chunk."""

import copy
import io
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import provenn
from provenn.core.cost import count_parameters, flops, growth
from provenn.core.errors import UserError
from provenn.nn.attention import SlidingWindowAttention, SoftmaxAttention
from provenn.nn.language import CausalLM
from provenn.nn.positions import rotate
from provenn.nn.streaming import load_state, map_state, save_state, select_state, state_bytes
from provenn.papers.rat import (
    RATMixer,
    RNNMixer,
    attention_small,
    attention_swa_small,
    attention_swa_xl,
    experiments,
    rat_small,
    rat_swa_small,
    rat_swa_xl,
    rat_xl,
    rnn_small,
    rnn_xl,
)
from provenn.papers.rat.costs import mixer_costs
from provenn.papers.rat.official import convert
from provenn.papers.rat.studies import (
    NEEDLES,
    _state_after,
    attention,
    count_stream_bytes,
    loss_rise,
    needles,
    open_gates,
    pair_reader,
    read_needles,
    rnn,
    selection,
    streamed,
    text,
    trained,
    window,
)
from provenn.testing import seeded_state
from provenn.training import weights
from streams import fold

MIXERS = {
    "rat": lambda dim=24, **options: RATMixer(dim, 4, **{"chunk": 4, **options}),
    "rat, token positions": lambda dim=24: RATMixer(dim, 4, chunk=4, positions="token"),
    "rat, no positions": lambda dim=24: RATMixer(dim, 4, chunk=4, positions="none"),
    "rat, chunks of 1": lambda dim=24: RATMixer(dim, 4, chunk=1),
    "rat, one long chunk": lambda dim=24: RATMixer(dim, 4, chunk=64),
    "rnn": lambda dim=24: RNNMixer(dim, length=32),
}
mixers = pytest.mark.parametrize("build", MIXERS.values(), ids=MIXERS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stirred(module):
    """In float64, with weights large enough that softmax and gates are far from even."""
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def by_definition(layer, x):
    """RAT token by token, from the equations of section 3."""
    dim, heads, p = layer.dim, layer.heads, layer.dim // layer.heads
    shared = layer.groups * p
    z, v, g, q, k = layer.project(x).split((dim, dim, dim, shared, shared), dim=-1)
    z, g = z.sigmoid(), (g + layer.gate_bias).sigmoid()
    q, k = (part.repeat(1, 1, heads // layer.groups) for part in (q, k))
    outputs, finished = [], []
    for t in range(x.shape[1]):
        c = t // layer.chunk
        if t % layer.chunk == 0:
            key, value = 0, 0
        key = (1 - g[:, t]) * k[:, t] + g[:, t] * key
        value = (1 - g[:, t]) * v[:, t] + g[:, t] * value
        position = torch.tensor([{"chunk": c, "token": t, "none": 0}[layer.positions]])
        turned, query = (rotate(part.view(-1, heads, 1, p), position).squeeze(2) for part in (key, q[:, t]))
        seen = [*finished, (turned, value.view(-1, heads, p))]
        scores = torch.stack([(query * past).sum(-1) / p**0.5 for past, _ in seen], dim=-1)
        mixed = torch.einsum("bhc,bhcp->bhp", scores.softmax(-1), torch.stack([past for _, past in seen], dim=2))
        outputs.append(layer.out(z[:, t] * mixed.flatten(1)))
        if t % layer.chunk == layer.chunk - 1:
            finished.append(seen[-1])
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("chunk", [1, 3, 4, 64])
@pytest.mark.parametrize("tokens", [1, 8, 21])
def test_rat_is_what_its_equations_say(chunk, tokens):
    layer = stirred(RATMixer(24, 4, chunk=chunk))
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_definition(layer, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("positions", ["chunk", "token", "none"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_option_is_what_its_equations_say_and_so_is_its_gradient(groups, positions):
    layer = stirred(RATMixer(24, 4, chunk=3, groups=groups, positions=positions))
    x = torch.randn(2, 11, 24, dtype=torch.float64, requires_grad=True)
    ours, defined = layer(x), by_definition(layer, x)
    torch.testing.assert_close(ours, defined, rtol=0, atol=1e-10)
    weight, leaves = torch.randn_like(ours), [x, *layer.parameters()]
    slopes = (torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, defined))
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_1_3b_models_are_those_of_the_authors_code():
    """What no count of parameters shows: windows of 1,025 with the own token, chunks of 16, two groups, wide heads."""
    with torch.device("meta"):
        models = [build(layers=4) for build in (rat_swa_xl, attention_swa_xl, rat_xl, rnn_xl)]
    hybrid, windowed, rat, rnn_model = ([block.mixer for block in model.blocks] for model in models)
    assert [mixer.window for mixer in (*hybrid[1::2], *windowed[1::2])] == [1025] * 4
    assert {(mixer.chunk, mixer.groups, mixer.positions) for mixer in (*hybrid[::2], *rat)} == {(16, 2, "chunk")}
    assert {type(mixer) for mixer in windowed[::2]} == {SoftmaxAttention}
    assert {mixer.dim // mixer.heads for mixer in (*hybrid, *windowed, *rat)} == {128}
    assert {mixer.length for mixer in rnn_model} == {4096}
    assert all(mixer.rotary for mixer in (*hybrid[1::2], *windowed))
    norms = [part for model in models for part in model.modules() if isinstance(part, nn.RMSNorm)]
    assert len(norms) == 4 * 9 and {norm.eps for norm in norms} == {1e-6}


@pytest.mark.parametrize("tokens", [1, 16, 21])
def test_a_chunk_as_long_as_the_sequence_is_the_rnn_whatever_queries_and_keys_are(tokens):
    rat, rnn = stirred(RATMixer(24, 4, chunk=tokens)), stirred(RNNMixer(24))
    rnn.project.weight.data = rat.project.weight.data[: 3 * 24]
    rnn.gate_bias.data, rnn.out.weight.data = rat.gate_bias.data, rat.out.weight.data
    rat.project.weight.data[3 * 24 :] *= 100
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    torch.testing.assert_close(rat(x), rnn(x), rtol=0, atol=1e-12)


def gated_attention(layer, x, closed):
    """Softmax attention with token positions, tiled queries and keys, gated outputs; keys and values (1 − g) times."""
    z, v, g, q, k = layer.project(x).split(layer.widths, dim=-1)
    keep = 1 - torch.zeros_like(v) if closed else 1 - (g + layer.gate_bias).sigmoid()
    q, k = (part.repeat(1, 1, layer.heads // layer.groups) for part in (q, k))
    q, k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (q, keep * k, keep * v))
    positions = torch.arange(x.shape[1])
    y = F.scaled_dot_product_attention(rotate(q, positions), rotate(k, positions), v, is_causal=True)
    return layer.out(z.sigmoid() * y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("closed", [False, True], ids=["gates as they are", "gates at 0"])
def test_chunks_of_one_token_are_attention(closed):
    layer = stirred(RATMixer(24, 4, chunk=1))
    if closed:
        nn.init.constant_(layer.gate_bias, -torch.inf)
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), gated_attention(layer, x, closed), rtol=0, atol=1e-12)


@mixers
@settings(deadline=None, max_examples=8)
@given(tokens=st.integers(2, 40), data=st.data())
def test_whole_is_the_fold_of_steps_from_any_split(build, tokens, data):
    layer = stirred(build())
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    cut = data.draw(st.integers(1, tokens - 1))
    with torch.no_grad():
        whole = layer(x)
        streamed, end = fold(layer, x)
        torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-10)
        first, state = layer.prefill(x[:, :cut])
        second, resumed = layer.prefill(x[:, cut:], state)
        torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-10)
        torch.testing.assert_close(fold(layer, x[:, cut:], state)[0], whole[:, cut:], rtol=0, atol=1e-10)
        # The states themselves are one: what comes after all of them is the same.
        more = torch.randn(2, 9, 24, dtype=torch.float64)
        expected = layer(torch.cat([x, more], dim=1))[:, tokens:]
        for after in (end, resumed):
            torch.testing.assert_close(layer.prefill(more, after)[0], expected, rtol=0, atol=1e-10)
            torch.testing.assert_close(fold(layer, more, after)[0], expected, rtol=0, atol=1e-10)


@mixers
def test_single_precision_streams_to_1e_5(build):
    layer = stirred(build()).float()
    x = torch.randn(2, 133, 24)
    with torch.no_grad():
        torch.testing.assert_close(fold(layer, x)[0], layer(x), rtol=1e-5, atol=1e-5)


@mixers
def test_a_prompt_in_several_pieces_has_the_same_gradient(build):
    layer = stirred(build())
    x = torch.randn(2, 22, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 22, 24, dtype=torch.float64)
    state, outputs = None, []
    for piece in x.split([7, 1, 8, 6], dim=1):
        y, state = layer.prefill(piece, state)
        outputs.append(y)
    leaves = [x, *layer.parameters()]
    pieces = torch.autograd.grad((torch.cat(outputs, 1) * weight).sum(), leaves, allow_unused=True)
    whole = torch.autograd.grad((layer(x) * weight).sum(), leaves, allow_unused=True)
    for a, b in zip(pieces, whole):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@mixers
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_hidden_tokens_are_as_if_they_were_not_there(build, data):
    layer = stirred(build())
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=19, max_size=19)) for _ in range(3)])
    x, more = torch.randn(3, 19, 24, dtype=torch.float64), torch.randn(3, 7, 24, dtype=torch.float64)
    with torch.no_grad():
        spoiled = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
        y, state = layer.prefill(spoiled, mask=mask)
        later, state = layer.prefill(more[:, :3], state)
        streamed, _ = fold(layer, more[:, 3:], state)
        for i in range(3):
            alone = layer(torch.cat([x[i : i + 1, mask[i]], more[i : i + 1]], dim=1))[0]
            ours = torch.cat([y[i, mask[i]], later[i], streamed[i]])
            torch.testing.assert_close(ours, alone, rtol=0, atol=1e-10)


@mixers
def test_tokens_move_nothing_before_them(build):
    layer = stirred(build())
    x = torch.randn(1, 20, 24, dtype=torch.float64, requires_grad=True)
    for t in (0, 3, 4, 11, 18):
        (grad,) = torch.autograd.grad(layer(x)[:, t].sum(), x)
        assert not grad[:, t + 1 :].any() and grad[:, t].any()


def test_finished_chunks_do_not_depend_on_later_ones():
    layer = stirred(RATMixer(24, 4, chunk=4))
    x = torch.randn(2, 19, 24, dtype=torch.float64)
    _, short = layer.prefill(x[:, :8])
    _, long = layer.prefill(x)
    torch.testing.assert_close(long.chunks.keys[:, :, :2], short.chunks.keys)
    torch.testing.assert_close(long.chunks.values[:, :, :2], short.chunks.values)


def test_the_first_chunk_is_finite_forward_and_backward():
    layer = RATMixer(24, 4, chunk=8)
    x = torch.randn(2, 8, 24, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_groups_are_tiled_over_heads_not_interleaved():
    layer = stirred(RATMixer(24, 4, groups=2, chunk=4))
    _, _, _, q, k = layer._project(torch.randn(1, 5, 24, dtype=torch.float64))
    for part in (q, k):
        heads = part.view(1, 5, 4, 6)
        assert torch.equal(heads[:, :, 0], heads[:, :, 2]) and torch.equal(heads[:, :, 1], heads[:, :, 3])
        assert not torch.equal(heads[:, :, 0], heads[:, :, 1])


def test_after_the_recurrence_each_head_has_keys_of_its_own():
    layer = stirred(RATMixer(24, 4, groups=2, chunk=4))
    _, state = layer.prefill(torch.randn(1, 8, 24, dtype=torch.float64))
    keys = state.chunks.keys
    assert not torch.allclose(keys[:, 0], keys[:, 2]) and not torch.allclose(keys[:, 1], keys[:, 3])


def test_positions_are_relative_and_shared_in_a_chunk():
    layer = RATMixer(24, 4, chunk=4)
    x = torch.randn(1, 4, 8, 6, dtype=torch.float64)
    turned = layer._rotate(x, torch.arange(8))
    torch.testing.assert_close(turned[:, :, :4], x[:, :, :4])
    torch.testing.assert_close(turned[:, :, 4:], rotate(x[:, :, 4:], torch.ones(4)))
    far = layer._rotate(x, torch.arange(8) + 4 * 1000)
    torch.testing.assert_close(far @ far.mT, turned @ turned.mT)


def test_adding_a_constant_to_all_chunk_numbers_changes_no_output(monkeypatch):
    layer = stirred(RATMixer(24, 4, chunk=4))
    x = torch.randn(1, 21, 24, dtype=torch.float64)
    plain = layer(x)
    monkeypatch.setattr(layer, "_rotate", lambda part, token: rotate(part, token // 4 + 1000))
    torch.testing.assert_close(layer(x), plain)
    monkeypatch.setattr(layer, "_rotate", lambda part, token: rotate(part, token // 4 * 2))
    assert not torch.allclose(layer(x), plain)


@pytest.mark.parametrize("dim, heads, groups", [(24, 4, 2), (32, 4, 4), (48, 3, 1)])
def test_parameters(dim, heads, groups):
    rat = 4 * dim**2 + 2 * groups * (dim // heads) * dim + dim
    assert count_parameters(RATMixer(dim, heads, groups=groups)) == rat
    assert count_parameters(RNNMixer(dim)) == 4 * dim**2 + dim


def test_gates_start_as_memories_of_all_lengths_up_to_a_chunk():
    horizon = RATMixer(2000, 4, chunk=16).gate_bias.exp()
    assert horizon.min() >= 1 and horizon.max() <= 15 and abs(horizon.mean() - 8) < 0.5
    horizon = RNNMixer(2000, length=512).gate_bias.exp()
    assert horizon.min() >= 1 and horizon.max() <= 511 and abs(horizon.mean() - 256) < 20
    assert not RATMixer(24, 4, chunk=1).gate_bias.any()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("way", ["prefill", "step"])
def test_a_stream_keeps_one_entry_a_chunk(tokens, way):
    layer = RATMixer(24, 4, chunk=16)
    x = torch.randn(3, tokens, 24)
    with torch.no_grad():
        state = layer.prefill(x)[1] if way == "prefill" else fold(layer, x)[1]
    # A key and a value for each chunk, the running pair, and the position of each stream.
    assert state.nbytes == 4 * 3 * 2 * 24 * (-(-tokens // 16) + 1) + 8 * 3
    assert state_bytes((state,)) == state.nbytes


def test_the_rnns_stream_does_not_grow():
    layer = RNNMixer(24)
    with torch.no_grad():
        assert {state_bytes(layer.prefill(torch.randn(2, n, 24))[1]) for n in (1, 10, 1000)} == {4 * 2 * 24}


@mixers
def test_states_are_selected_saved_and_loaded(build, tmp_path):
    layer = build().eval()
    x, next_token = torch.randn(4, 9, 24), torch.randn(4, 24)
    with torch.no_grad():
        _, state = layer.prefill(x)
        save_state(state, tmp_path / "state.safetensors")
        again = load_state(layer.init_state(1), tmp_path / "state.safetensors")
        expected, _ = layer.step(next_token, map_state(torch.clone, state))
        torch.testing.assert_close(layer.step(next_token, again)[0], expected)
        for index in (2, [0, 3], slice(1, 3), torch.tensor([True, False, False, True])):
            some = next_token[[index] if isinstance(index, int) else index]
            part = [index] if isinstance(index, int) else index
            torch.testing.assert_close(layer.step(some, select_state(state, index))[0], expected[part])


def test_a_bfloat16_stream_keeps_its_running_state_in_float32():
    for layer in (RATMixer(24, 4).bfloat16(), RNNMixer(24).bfloat16()):
        x = torch.randn(2, 40, 24).bfloat16()
        with torch.no_grad():
            y, prefilled = layer.prefill(x)
            streamed, state = fold(layer, x)
        assert y.dtype == streamed.dtype == torch.bfloat16
        assert state.value.dtype == prefilled.value.dtype == torch.float32
        torch.testing.assert_close(streamed.float(), y.float(), rtol=0.05, atol=0.05 * y.float().abs().max().item())


def test_a_running_state_of_a_bfloat16_stream_does_not_stall():
    """A mean of ones with a gate of 0.999 stops at a quarter where it is itself held in bfloat16."""
    for layer in (RATMixer(4, 2, chunk=10**6), RNNMixer(4)):
        nn.init.zeros_(layer.project.weight)
        layer.project.weight.data[4:8] = 1  # v = Σ x = 1
        nn.init.constant_(layer.gate_bias, 6.9068)  # σ⁻¹(0.999)
        layer, x = layer.bfloat16(), torch.full((1, 4), 0.25).bfloat16()
        state = layer.init_state(1)
        with torch.no_grad():
            for _ in range(3000):
                _, state = layer.step(x, state)
        assert state.value.mean() > 0.9


def test_gates_whose_product_underflows_lose_nothing():
    """The closed form, which divides by that product, is 0/0 within a chunk of 64."""
    layer = RATMixer(4, 2, chunk=128)
    nn.init.zeros_(layer.project.weight)
    layer.project.weight.data[4:8] = 1
    nn.init.constant_(layer.gate_bias, -2.0)
    gate = torch.sigmoid(torch.tensor(-2.0))
    assert gate**128 == 0
    _, state = layer.prefill(torch.full((1, 128, 4), 0.25))
    torch.testing.assert_close(state.value, torch.ones(1, 4))


@pytest.mark.parametrize(("build", "mebibytes"), [(attention, 768), (RATMixer, 48)], ids=["attention", "rat"])
def test_a_stream_of_the_1_3b_models_holds_what_the_paper_s_formula_says(build, mebibytes):
    with torch.device("meta"), torch.no_grad():
        _, state = build(2048, 16).bfloat16().prefill(torch.empty(1, 4096, 2048, dtype=torch.bfloat16))
    cache = state.chunks if isinstance(build, type) else state
    assert 24 * cache.nbytes == mebibytes * 2**20


def test_attention_work_falls_by_the_chunk_length():
    def work(layer, n):
        with torch.no_grad():
            return flops(lambda: layer(torch.randn(1, n, 8))) - n * sum(
                2 * p.numel() for p in layer.parameters() if p.dim() == 2
            )

    sizes = [1024, 2048, 4096]
    softmax = [work(SoftmaxAttention(8, 2, bias=False), n) for n in sizes]
    rat = [work(RATMixer(8, 2, chunk=16), n) for n in sizes]
    assert all(a / b == pytest.approx(16, rel=0.05) for a, b in zip(softmax, rat))
    assert growth(sizes, rat).exponent == pytest.approx(2, abs=0.05)
    assert work(RNNMixer(8), 1024) == 0


@mixers
def test_bfloat16_stays_close_to_float32(build):
    layer = build().eval()
    x = torch.randn(2, 100, 24)
    low = copy.deepcopy(layer).bfloat16()(x.bfloat16()).float()
    assert (low - layer(x)).norm() / layer(x).norm() < 0.03


def test_compiles_exports_and_travels(untyped):
    layer = RATMixer(24, 4, chunk=4).eval()
    x = torch.randn(2, 13, 24)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x_t, state):
            return self.layer.step(x_t, state)

    with torch.no_grad():
        _, state = layer.prefill(x[:, :5])
        exported = torch.export.export(Step(), (x[:, 5], map_state(torch.clone, state))).module()
        ours, _ = exported(x[:, 5], map_state(torch.clone, state))
        torch.testing.assert_close(ours, layer.step(x[:, 5], state)[0])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    leaves = list(layer.parameters())
    gradients = [torch.autograd.grad(form(x).square().sum(), leaves, allow_unused=True) for form in (compiled, layer)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), layer(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RATMixer(10, 4), "heads must divide dim, .* dim=10 and heads=4"),
        (lambda: RATMixer(12, 3), "groups must divide heads .* groups=2 and heads=3"),
        (lambda: RATMixer(8, 2, chunk=0), "chunk must be at least 1, got 0"),
        (lambda: RATMixer(6, 2), "even head width, got dim=6 and heads=2"),
        (lambda: RATMixer(8, 2, positions="learned"), "positions must be one of chunk, token, none, got 'learned'"),
        (lambda: RATMixer(8, 2, causal=False), "causal must be True"),
        (lambda: RNNMixer(0), "dim must be at least 1, got 0"),
        (lambda: RNNMixer(8, length=0), "length must be at least 1, got 0"),
        (lambda: RNNMixer(8, causal=False), "causal must be True"),
    ],
)
def test_bad_arguments_are_refused_with_a_reason(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@mixers
def test_tensors_of_the_wrong_shape_are_refused(build, untyped):
    layer, x = build(), torch.randn(2, 5, 24)
    with pytest.raises(ValueError, match=r"expected \(batch, tokens, 24\) .* got \(2, 5, 23\)"):
        layer(torch.randn(2, 5, 23))
    with pytest.raises(ValueError, match="at least one token"):
        layer(torch.randn(2, 0, 24))
    with pytest.raises(ValueError, match=r"mask must be bool of .* \(2, 5\), .* got bool of shape \(2, 4\)"):
        layer(x, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be bool .* got int64"):
        layer(x, mask=torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="one token a stream"):
        layer.step(x, layer.init_state(2))
    for go_on in (lambda: layer.step(x[:, 0], layer.init_state(3)), lambda: layer.prefill(x, layer.init_state(3))):
        with pytest.raises(ValueError, match="the state is of 3 streams, the input of 2"):
            go_on()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads must divide dim, both at least 1, got dim=96 and heads=5"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"chunk": [16, 0]}, "chunk must be at least 1, got 0"),
        ({"positions": "learned"}, "positions must be one of chunk, token, none, got 'learned'"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"head": 4}, "it takes: vocab, dim, layers, heads, chunk, groups, positions, window"),
    ],
    ids=str,
)
def test_a_preset_refuses_bad_options_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        provenn.paper("rat").build("rat_swa_small", **options)
    assert "\n" not in str(error.value)


def test_unknown_layer_patterns_are_refused():
    with pytest.raises(UserError, match="no token-mixer is called 'rta', did you mean 'rat'"):
        CausalLM(vocab=20, dim=24, layers=2, mixer="rta,window")


MODELS = {
    "rat_small": rat_small,
    "rat_swa_small": rat_swa_small,
    "rnn_small": rnn_small,
    "attention_small": attention_small,
    "attention_swa_small": attention_swa_small,
}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


@models
def test_models_read_whole_and_token_by_token_alike(build):
    options = {"window": 8} if "window" in build.keywords else {}
    model = build(vocab=20, dim=24, layers=3, **({} if build is rnn_small else {"heads": 4}), **options)
    model = stirred(model)
    tokens = torch.randint(20, (2, 41))
    with torch.no_grad():
        whole = model(tokens)
        first, state = model.prefill(tokens[:, :19])
        outputs = [first]
        for t in range(19, 41):
            y, state = model.step(tokens[:, t], state)
            outputs.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-9)


def test_layers_take_their_chunk_lengths_in_turn():
    assert [block.mixer.chunk for block in rat_small(layers=5, chunk=[4, 32]).blocks] == [4, 32, 4, 32, 4]
    hybrid = rat_swa_small(layers=5, chunk=[4, 32], window=9).blocks
    assert [getattr(block.mixer, "chunk", None) or block.mixer.window for block in hybrid] == [4, 9, 32, 9, 4]
    with pytest.raises(ValueError, match="chunk is an empty list"):
        rat_small(chunk=[])


def test_the_host_leaves_the_gates_as_they_should_start():
    horizon = torch.cat([block.mixer.gate_bias.exp() for block in rat_small(chunk=16).blocks])
    assert horizon.min() >= 1 and horizon.max() <= 15 and horizon.std() > 3


def theirs(kinds, dim=128, vocab=30):
    """Names and shapes of an authors' model with these layers."""
    shapes = {"embedding.wte.weight": (vocab, dim), "backbone.ln.weight": (dim,)}
    for i, kind in enumerate(kinds):
        at = f"backbone.layers.{i}."
        rows = {"rat": 3 * dim + 4 * 64, "rnn": 3 * dim, "attention": 3 * dim}[kind]
        shapes |= {
            f"{at}seq_layer.in_proj.weight": (rows, dim),
            f"{at}seq_layer.out_proj.weight": (dim, dim),
            f"{at}seq_layer.input_norm.weight": (dim,),
            f"{at}hidden_layer.fc1.weight": (4 * dim, dim),
            f"{at}hidden_layer.fc2.weight": (dim, 4 * dim),
            f"{at}hidden_layer.ln.weight": (dim,),
        }
        if kind != "attention":
            shapes[f"{at}seq_layer.gate_bias"] = (dim,)
    return seeded_state(shapes)


@pytest.mark.parametrize(
    ("kinds", "preset", "options"),
    [
        (["rat"] * 3, "rat_small", {"chunk": 8}),
        (["rnn"] * 2, "rnn_small", {}),
        (["attention"] * 2, "attention_small", {"preset": "attention_small", "heads": 2}),
        (["attention"] * 2, "attention_swa_small", {"preset": "attention_swa_small", "heads": 2, "window": 9}),
        (["rat", "attention", "rat"], "rat_swa_small", {"chunk": 8, "window": 9}),
    ],
)
def test_official_weights_tell_their_preset(kinds, preset, options):
    state = {f"_orig_mod.{name}": value for name, value in theirs(kinds).items()}
    found, built_with, ours = convert(state, **options)
    assert found == preset and built_with["layers"] == len(kinds)
    model = MODELS[found](**built_with)
    model.load_state_dict(ours, strict=True)
    assert all(getattr(block.mixer, "chunk", 8) == 8 for block in model.blocks)
    assert getattr(model.blocks[-1 if kinds[0] == "attention" else 1].mixer, "window", 9) == options.get("window", 9)


@pytest.mark.parametrize(
    ("kinds", "options", "message"),
    [
        (["rat"], {}, "do not show chunk, .* give chunk=16"),
        (["rat", "attention"], {"chunk": 16}, "do not show window, .* give window=1025"),
        (["attention"], {}, "do not distinguish full attention from a window"),
        (["attention"], {"preset": "attention_small"}, "do not show heads"),
        (["rat"], {"chunk": 16, "heads": 4}, "the checkpoint has heads=2, got heads=4"),
    ],
    ids=str,
)
def test_what_official_weights_do_not_tell_is_asked_for(kinds, options, message):
    with pytest.raises(UserError, match=message) as error:
        convert(theirs(kinds), **options)
    assert "\n" not in str(error.value)


class EasyDict(dict):
    """As in the package of that name: every item is an attribute too, and a pickle holds both."""

    def __init__(self, items=()):
        for name, value in dict(items).items():
            self[name] = value

    def __setitem__(self, name, value):
        value = EasyDict(value) if isinstance(value, dict) else value
        super().__setitem__(name, value)
        super().__setattr__(name, value)


def trained_by_the_authors(file, monkeypatch, kinds, *cells, **more):
    """A checkpoint as the authors' trainer writes it, read where their package is not installed."""
    names = ("seq_cell",) if len(cells) == 1 else ("seq_cell1", "seq_cell")
    backbone = {"_name_": "sequence", "num_layers": len(kinds), "d_model": 128, **dict(zip(names, cells))}
    config = {"model": {"backbone": backbone, "embedding": {"pe": {"_name_": "interrope"}}}, "trainer": {"seed": 1005}}
    with monkeypatch.context() as patch:
        module = types.ModuleType("easydict")
        module.EasyDict = EasyDict
        patch.setattr(EasyDict, "__module__", "easydict")
        patch.setitem(sys.modules, "easydict", module)
        torch.save({"task": theirs(kinds), "config": EasyDict(config), "step": 47683, **more}, file)
    return file


RAT_CELL = {"_name_": "rat", "d_model": 128, "d_head": 64, "ngroups": 2, "chunk_size": 64}
ATTENTION_CELL = {"_name_": "attention", "d_model": 128, "d_head": 32}
LOCAL_CELL = {"_name_": "local_attention", "d_model": 128, "d_head": 64, "window_size": 5}


@pytest.mark.parametrize(
    ("kinds", "cells", "expected"),
    [
        (["rat"] * 2, [RAT_CELL], rat_small(chunk=64, heads=2, dim=128, layers=2, vocab=30)),
        (["rnn"] * 2, [{"_name_": "rnn", "d_model": 128}], rnn_small(dim=128, layers=2, vocab=30)),
        (["attention"] * 2, [ATTENTION_CELL], attention_small(heads=4, dim=128, layers=2, vocab=30)),
        (
            ["attention"] * 2,
            [{**ATTENTION_CELL, "d_head": 64}, LOCAL_CELL],
            attention_swa_small(heads=2, window=6, dim=128, layers=2, vocab=30),
        ),
        (
            ["rat", "attention"],
            [RAT_CELL, LOCAL_CELL],
            rat_swa_small(chunk=64, heads=2, window=6, dim=128, layers=2, vocab=30),
        ),
    ],
    ids=["rat", "rnn", "attention", "attention and window", "rat and window"],
)
def test_a_checkpoint_of_the_authors_trainer_says_what_it_is(tmp_path, monkeypatch, kinds, cells, expected):
    file = trained_by_the_authors(tmp_path / "47683.pth", monkeypatch, kinds, *cells)
    model = provenn.from_official("rat", file)
    expected.load_state_dict(model.state_dict())
    tokens = torch.randint(30, (2, 130))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), expected.eval()(tokens))
    assert "easydict" not in sys.modules


def test_the_length_of_a_chunk_is_the_checkpoint_s_and_not_the_user_s(tmp_path, monkeypatch):
    file = trained_by_the_authors(tmp_path / "a.pth", monkeypatch, ["rat"], RAT_CELL)
    assert provenn.from_official("rat", file, chunk=64).blocks[0].mixer.chunk == 64
    with pytest.raises(UserError, match="the checkpoint has chunk=64, got chunk=16"):
        provenn.from_official("rat", file, chunk=16)
    with pytest.raises(UserError, match="holds weights of rat_small, not of rnn_small"):
        provenn.from_official("rat", file, preset="rnn_small")
    with pytest.raises(UserError, match="'length'; it takes: vocab, dim, layers, heads, chunk, groups, positions"):
        provenn.from_official("rat", file, length=4)


def test_a_config_with_code_in_it_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    trace = tmp_path / "trace"

    class Code:
        def __reduce__(self):
            return Path.touch, (trace,)

    file = trained_by_the_authors(tmp_path / "a.pth", monkeypatch, ["rat"], RAT_CELL, more=Code())
    with pytest.raises(UserError, match="could run code"):
        provenn.from_official("rat", file)
    assert not trace.exists()


def test_what_the_weights_do_not_tell_is_given_to_a_prediction(tmp_path):
    torch.save(theirs(["rat"], vocab=257), tmp_path / "plain.pth")
    with pytest.raises(UserError, match="do not show chunk"):
        provenn.predict("rat", ["de"], weights=tmp_path / "plain.pth", overrides={"tokens": 3})
    texts = [
        provenn.predict("rat", ["def f"], weights=tmp_path / "plain.pth", overrides={"tokens": 3, "chunk": chunk})
        for chunk in (2, 64)
    ]
    assert all(text.startswith("def f") for text in texts)


def test_our_own_weights_say_what_they_are(tmp_path):
    label = weights.Label("rat", "rat_small", "language-modelling", {"vocab": 20, "dim": 24, "layers": 1, "chunk": 4})
    weights.save(rat_small(**label.options), tmp_path / "ours.safetensors", label)
    assert weights.label_of(tmp_path / "ours.safetensors") == label
    model, _ = provenn.paper("rat").load(tmp_path / "ours.safetensors")
    assert model.blocks[0].mixer.chunk == 4
    with pytest.raises(UserError, match="names its own options: leave chunk out"):
        provenn.paper("rat").load(tmp_path / "ours.safetensors", options={"chunk": 8})
    with pytest.raises(UserError, match="holds weights of rat_small, not of rnn_small"):
        provenn.paper("rat").load(tmp_path / "ours.safetensors", preset="rnn_small")


def test_official_weights_of_other_models_are_refused():
    with pytest.raises(UserError, match="expected a state dict of CLAIRE-Labo/RAT"):
        convert({"conv.weight": torch.zeros(3)})
    with pytest.raises(UserError, match="no model of the paper has layers rnn, attention"):
        convert(theirs(["rnn", "attention"]))
    with pytest.raises(UserError, match="tie the two"):
        convert(theirs(["rat"]) | {"head.lm_head.weight": torch.zeros(30, 128)})
    with pytest.raises(UserError, match="3 rows of shared queries and keys"):
        convert(theirs(["rat"]) | {"backbone.layers.0.seq_layer.in_proj.weight": torch.zeros(3 * 128 + 3, 128)})
    cells = {"seq_cell1": LOCAL_CELL, "seq_cell": RAT_CELL}
    with pytest.raises(UserError, match="no model of the paper has layers window, rat in turn"):
        convert(theirs(["attention", "rat"]), {"model": {"backbone": cells}})


def brute_force(mixer, tokens, chunk, window):
    """Pairs of a query and a key, counted in the mask."""
    t, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    if mixer == "rat":
        return int((t // chunk > torch.arange(tokens // chunk)).sum()) + tokens
    return int(((j <= t) & (t - j < (window if mixer == "window" else tokens))).sum())


@pytest.mark.parametrize("tokens", [1, 15, 16, 100])
@pytest.mark.parametrize("mixer", ["attention", "window", "rat", "rnn"])
def test_costs_are_those_of_the_layers(tokens, mixer):
    dim, heads, chunk, window = 24, 4, 16, 32
    build = {
        "attention": lambda: SoftmaxAttention(dim, heads, bias=False),
        "window": lambda: SlidingWindowAttention(dim, heads, window=window, bias=False),
        "rat": lambda: RATMixer(dim, heads, chunk=chunk),
        "rnn": lambda: RNNMixer(dim),
    }[mixer]
    layer = build()
    found = mixer_costs(mixer, tokens, dim=dim, heads=heads, chunk=chunk, window=window, layers=3, number_bytes=4)
    maps = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    pairs = 0 if mixer == "rnn" else brute_force(mixer, tokens, chunk, window)
    states = {"rat": 2, "rnn": 1}.get(mixer, 0)
    assert found.flops == 3 * (2 * tokens * maps + 4 * dim * pairs + 2 * tokens * dim * states)
    with torch.no_grad():
        _, state = layer.prefill(torch.randn(1, tokens, dim))
    kept = {"attention": tokens, "window": min(tokens, window), "rat": -(-tokens // chunk), "rnn": 0}[mixer]
    assert found.cache_bytes == 3 * 4 * 2 * dim * kept
    if mixer in ("attention", "rat"):
        cache = state if mixer == "attention" else state.chunks
        assert 3 * cache.nbytes == found.cache_bytes
    running = {"rat": lambda: (state.key, state.value), "rnn": lambda: state}.get(mixer, tuple)()
    assert 3 * state_bytes(running) == found.running_bytes


def test_at_the_length_of_the_abstract_attention_takes_seven_times_the_products_though_half_the_square_is_left_out():
    attention_costs, rat_costs = (
        mixer_costs(mixer, 98_304, dim=2048, heads=16).flops for mixer in ("attention", "rat")
    )
    assert attention_costs / rat_costs == pytest.approx(7.2, abs=0.05)


def test_costs_refuse_what_is_not_there():
    with pytest.raises(ValueError, match="mixer must be one of attention, window, rat, rnn, got 'lstm'"):
        mixer_costs("lstm", 10, dim=8)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        mixer_costs("rat", 0, dim=8)
    with pytest.raises(ValueError, match="heads must divide dim, got dim=8 and heads=3"):
        mixer_costs("rat", 10, dim=8, heads=3)
    with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
        mixer_costs("rat", 10, dim=8, groups=0)


# The experiments


def differences(models):
    """Names of parameters that not all of the models have in the same shape."""
    shapes = [{(name, tuple(p.shape)) for name, p in model.named_parameters()} for model in models]
    return {name for some in shapes for name, _ in some ^ shapes[0]}


def test_the_variants_of_a_study_differ_in_their_mixers_alone():
    for study, options in ((experiments.TEXT, {"vocab": 257}), (experiments.RECALL, {"vocab": 576})):
        models = {variant: study.build(part, **options) for variant, (_, part) in study.variants.items()}
        assert differences(models.values()) and all(".mixer." in name for name in differences(models.values()))
        kinds = {variant: [type(block.mixer).__name__ for block in model.blocks] for variant, model in models.items()}
        assert kinds["attention"] == ["SoftmaxAttention"] * 2 and kinds["rnn"] == ["RNNMixer"] * 2
        assert {block.mixer.chunk for block in models["rat" if study is experiments.TEXT else "rat16"].blocks} == {16}
    assert [
        type(b.mixer).__name__ for b in experiments.TEXT.build(experiments.TEXT.variants["hybrid"][1], vocab=257).blocks
    ] == [
        "RATMixer",
        "SlidingWindowAttention",
    ]


def test_every_variant_chooses_from_the_same_rates():
    for study in (experiments.TEXT, experiments.RECALL):
        assert len(study.lrs) >= 3 and max(study.lrs) / min(study.lrs) >= 8


STREAMING = {
    "attention": attention,
    "window": lambda dim, heads: SlidingWindowAttention(dim, heads, window=7, bias=False, rotary=True),
    "rat": RATMixer,
    "rnn": rnn,
}


@pytest.mark.parametrize("build", STREAMING.values(), ids=STREAMING)
@pytest.mark.parametrize("count", [5, 31, 48])
def test_a_timed_stream_holds_what_one_that_has_read_holds(build, count):
    layer = build(8, 2)
    with torch.no_grad():
        _, real = layer.prefill(torch.randn(3, count, 8))
        made = _state_after(layer, count, 3, device="cpu", dtype=torch.float32)
        made_bytes, real_bytes = (getattr(state, "nbytes", None) or state_bytes((state,)) for state in (made, real))
        assert made_bytes == real_bytes
        y, after = layer.step(torch.randn(3, 8), made)
    assert y.shape == (3, 8) and y.isfinite().all()
    for name in ("length", "seen"):
        assert getattr(after, name, None) == (getattr(real, name) + 1 if hasattr(real, name) else None)


def test_bytes_held_are_those_of_the_layers_in_bfloat16():
    count = count_stream_bytes(attention, RATMixer, dim=8, heads=2)(33, "cpu")()
    layers = [attention(8, 2).bfloat16(), RATMixer(8, 2).bfloat16()]
    with torch.no_grad():
        states = [layer.prefill(torch.randn(1, 33, 8).bfloat16())[1] for layer in layers]
    assert count == state_bytes(tuple(states)) == 2 * 2 * 8 * 33 + 2 * 2 * 8 * 3 + 2 * 4 * 8 + 8


def test_work_that_is_timed_runs_forward_and_backward_and_streams():
    gradients = trained(RATMixer, 8, 2)(40, "cpu")()
    assert gradients[0].shape == (1, 40, 8) and all(g is None or g.isfinite().all() for g in gradients)
    batched = trained(attention, 8, 2, tokens=64)(16, "cpu")()
    assert batched[0].shape == (4, 16, 8)
    y = streamed(RATMixer, window, dim=8, heads=2, slots=64)(16, "cpu")()
    assert y.shape == (4, 8) and y.isfinite().all()


class Telling(nn.Module):
    """Gives the same bits to every byte up to `known`, and none after."""

    def __init__(self, known):
        super().__init__()
        self.known, self.weight = known, nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, 257)
        logits[:, self.known :, 0] = 5.0
        return logits


def test_the_rise_is_of_the_end_of_a_longer_text_against_its_start():
    data = text(128, True)
    assert loss_rise(Telling(512), data) == pytest.approx(0, abs=1e-6)
    assert loss_rise(Telling(300), data) > 0.3
    assert loss_rise(Telling(0), data) == pytest.approx(0, abs=1e-6)


def test_selection_is_of_needles_against_filler():
    model = read_needles(partial(RATMixer, heads=4, chunk=4))
    first = model.blocks[0].mixer
    data = needles(0, True, 32)
    nn.init.zeros_(first.project.weight)
    assert selection(model, data) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():  # z and v come before g: filler closes the gates
        first.project.weight[128:192] = model.embed.key.weight[NEEDLES["keys"]].expand(64, -1)
    selected = selection(model, data)
    assert selected > 0.1
    with torch.no_grad():  # questions close them too, and do not count
        first.project.weight[128:192] += model.embed.value.weight[NEEDLES["values"]]
    assert selection(model, data) > 0.75 * selected
    assert selection(read_needles(partial(SoftmaxAttention, heads=4)), data) == 0


def test_a_reader_of_pairs_starts_wide_and_tells_values():
    model = pair_reader(partial(RATMixer, heads=4), keys=5, values=3, dim=64)
    tokens = torch.randint(6 * 4, (2, 9))
    assert model(tokens).shape == (2, 9, 3)
    matrices = torch.cat([weight.flatten() for weight in model.blocks.parameters() if weight.dim() == 2])
    assert matrices.std().item() == pytest.approx(64**-0.5, rel=0.02)


def test_open_gates_are_read_from_the_layers():
    model = rat_small(vocab=20, dim=24, layers=2)
    for block, bias in zip(model.blocks, (0.0, 100.0)):
        nn.init.zeros_(block.mixer.project.weight)
        nn.init.constant_(block.mixer.gate_bias, bias)
    tokens = torch.randint(20, (2, 9))
    assert open_gates(model, tokens, tokens > 3) == [pytest.approx(0.5), pytest.approx(0.0)]
