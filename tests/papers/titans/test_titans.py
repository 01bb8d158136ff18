"""The neural memory and the three ways to build it in: what the layers promise, and every exact experiment."""

import copy
import json
import shlex
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provenn.cli import main
from provenn.core.cost import count_parameters, flops, growth
from provenn.evidence import Run, Study
from provenn.evidence.run import run_to_end
from provenn.nn.positions import rotate
from provenn.nn.streaming import load_state, save_state, select_state, state_bytes
from provenn.ops.memory_update import MemoryState, recurrent_memory
from provenn.papers.titans import (
    Forecaster,
    LongTermMemory,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    NeuralMemory,
    SequenceClassifier,
    experiments,
    frozen_memory,
    observe_surprise,
    studies,
    titans_lm,
)
from provenn.papers.titans import model as model_module
from provenn.papers.titans.layers import memory as memory_layers
from provenn.papers.titans.model import VARIANTS

MIXERS = {
    "memory": partial(NeuralMemory, chunk=4),
    "lmm": partial(LongTermMemory, heads=2, chunk=4, persistent=3),
    "mac": partial(MemoryAsContext, heads=2, segment=6, chunk=4, persistent=2),
    "mag": partial(MemoryAsGate, heads=2, window=5, chunk=4, persistent=2),
    "mal": partial(MemoryAsLayer, heads=2, window=5, chunk=4, persistent=2),
    "mac, one token a segment, no persistent tokens": partial(MemoryAsContext, heads=2, segment=1, persistent=0),
    "mag, window of one, no persistent tokens": partial(MemoryAsGate, heads=2, window=1, persistent=0),
    "mac that asks at every second token": partial(MemoryAsContext, heads=2, segment=6, chunk=4, stride=2),
    "lmm with an mlp and one gate of each kind": partial(LongTermMemory, chunk=4, residual=False, gating="token"),
    "lmm without all that": partial(
        LongTermMemory, momentum=False, decay=False, kernel=1, persistent=0, depth=1, residual=False
    ),
}
mixers = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)


def built(make, dim=8, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return make(dim, **options).to(dtype).eval()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def in_pieces(mixer, x, cuts, mask=None):
    state, outputs = None, []
    for a, b in zip((0, *cuts), (*cuts, x.shape[1])):
        y, state = mixer.prefill(x[:, a:b], state, mask=None if mask is None else mask[:, a:b])
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@mixers
@settings(max_examples=6)
@given(n=st.integers(1, 25), hidden=st.sampled_from([0.0, 0.4]), data=st.data())
def test_a_sequence_may_be_cut_anywhere(make, n, hidden, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=3))) if n > 1 else []
    mixer, x = built(make), draw(2, n, 8, seed=n)
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) >= hidden if hidden else None
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(mixer, x, cuts, mask)[0], mixer(x, mask=mask), rtol=0, atol=1e-11)


@mixers
def test_forward_is_the_fold_of_step_in_float32(make):
    mixer, x = built(make, dtype=torch.float32), draw(2, 37, 8, dtype=torch.float32)
    with torch.no_grad():
        state, outputs = mixer.init_state(2), []
        for t in range(37):
            y, state = mixer.step(x[:, t], state)
            outputs.append(y)
        torch.testing.assert_close(torch.stack(outputs, dim=1), mixer(x), rtol=0, atol=1e-4)


@mixers
def test_a_later_token_changes_no_bit_before_it(make):
    mixer, x = built(make), draw(2, 24, 8)
    before = mixer(x)
    for t in (0, 5, 11, 23):
        changed = x.clone()
        changed[:, t:] = draw(2, 24 - t, 8, seed=9)
        after = mixer(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


def test_the_equations_of_mac_taken_literally_look_ahead_in_a_segment():
    mixer, x = built(MIXERS["mac"], causal=False), draw(2, 24, 8)
    changed = x.clone()
    changed[:, 10:] = draw(2, 14, 8, seed=9)
    before, after = mixer(x), mixer(changed)
    assert torch.equal(after[:, :6], before[:, :6])  # the segment before
    assert (after[:, 6:10] - before[:, 6:10]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="cannot stream; build it with causal=True"):
        mixer.init_state(1)


def test_mac_recalls_with_the_memory_from_before_the_segment_and_writes_what_attention_gives():
    mixer, x = built(MIXERS["mac"]), draw(2, 12, 8)
    prefix, memory = mixer.persistent.expand(2, 2, 8), mixer.memory
    state, tail, outputs = memory.init_state(2), torch.zeros(2, 3, 8).double(), []
    for segment in x.split(6, dim=1):
        h, tail = memory.recall(segment, state.memory.weights, tail)
        y = mixer.attention(segment, [h, segment], prefix)[0]
        recalled, state = memory.prefill(y, state)
        outputs.append(mixer.join(y, recalled))
    torch.testing.assert_close(torch.cat(outputs, dim=1), mixer(x), rtol=0, atol=1e-12)


OPTIONS = {
    "as in the camera-ready": {},
    "matrix, one gate of each kind": {"depth": 1, "residual": False, "gating": "token"},
    "deep, read before the write": {"depth": 3, "read": "pre", "kernel": 2},
    "limited, no momentum": {"limit": 0.5, "momentum": False, "max_step": 0.3},
    "no decay, no convolution": {"decay": False, "kernel": 1, "expansion": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_memory_is_what_its_equations_say_from_the_tokens_on(options):
    """Maps, convolution, SiLU, unit keys and gates written out; the rule by its definition, token by token."""
    memory, x = built(partial(NeuralMemory, heads=2, chunk=4, **options)), draw(2, 11, 8).requires_grad_()
    with torch.no_grad():  # where gates start they hardly differ
        for gate in (memory.step_gate, memory.momentum_gate):
            if gate is not None:
                gate.weight.normal_()
    y = x @ memory.project.weight.T
    if memory.kernel > 1:
        taps = memory.convolution.T.unsqueeze(1)
        y = torch.nn.functional.conv1d(torch.nn.functional.pad(y.mT, (memory.kernel - 1, 0)), taps, groups=24).mT
    q, k, v = torch.nn.functional.silu(y).view(2, 11, 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    depth = len(memory.memory)
    gates = depth if options.get("gating") != "token" else 1

    def scalars(gate):
        return gate(x).sigmoid().view(2, 11, gates, 2).permute(2, 0, 3, 1)

    forget = [torch.zeros(2, 2, 11, 1).double()] * gates
    if memory.forget_gate is not None:
        α = memory.forget_gate(x).sigmoid().view(2, 11, 2, -1).transpose(1, 2)
        forget = α.split(memory.channels, -1)
    moving = None if memory.momentum_gate is None else scalars(memory.momentum_gate)
    expected = recurrent_memory(
        q, k, v,
        step=options.get("max_step", 1 / (4 * depth)) * scalars(memory.step_gate),
        forget=forget,
        momentum=moving,
        state=MemoryState.start(list(memory.memory), 2, momentum=moving is not None),
        chunk=4,
        read=options.get("read", "post"),
        residual=options.get("residual", True),
        limit=options.get("limit"),
    )[0].transpose(1, 2).flatten(2)  # fmt: skip
    ours = memory(x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    slopes = (torch.autograd.grad(form.square().sum(), [x, *memory.parameters()]) for form in (ours, expected))
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def rms(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


@pytest.mark.parametrize("variant", ["lmm", "mag", "mal"])
def test_variants_are_what_their_equations_say(variant):
    """With one token a chunk, reading the persistent tokens first is reading P ‖ x."""
    mixer, x = built(partial(MIXERS[variant], chunk=1)), draw(2, 9, 8)
    with torch.no_grad():
        for part in mixer.modules():
            if isinstance(part, torch.nn.RMSNorm):
                part.weight.copy_(1 + draw(8).abs())
        lmm = mixer.memory if variant == "mal" else mixer
        count = len(lmm.persistent)
        whole = torch.cat([lmm.persistent.expand(2, count, 8), x], dim=1)
        m = lmm.memory(whole)
        if variant == "mag":
            y = mixer.attention(x, [x], mixer.persistent.expand(2, count, 8))[0]
            expected = rms(y, mixer.join.norm_y) * rms(m, mixer.join.norm_m)[:, count:].sigmoid()
        else:
            expected = lmm.out(rms(m, lmm.norm) * torch.nn.functional.silu(lmm.gate(whole)))
            if variant == "mal":
                prefix, seen = rms(expected, mixer.norm).split([count, 9], dim=1)
                expected = torch.cat([prefix, mixer.attention(seen, [seen], prefix)[0]], dim=1)
            expected = expected[:, count:]
        torch.testing.assert_close(mixer(x), expected, rtol=0, atol=1e-9)


def test_persistent_tokens_are_a_chunk_of_their_own():
    mixer, x = built(partial(LongTermMemory, chunk=4, persistent=3)), draw(2, 9, 8)
    with torch.no_grad():
        state = mixer.memory.prefill(mixer.persistent.expand(2, 3, 8))[1]
        state = state._replace(memory=MemoryState.start([w[0] for w in state.memory.weights], 2)._replace(
            momentum=state.memory.momentum))  # fmt: skip
        recalled = mixer.memory.prefill(x, state)[0]
        expected = mixer.out(rms(recalled, mixer.norm) * torch.nn.functional.silu(mixer.gate(x)))
        torch.testing.assert_close(mixer(x), expected, rtol=0, atol=1e-11)


def test_window_attention_is_a_masked_softmax_with_distances_and_a_free_prefix():
    attention = built(MIXERS["mag"]).attention
    x, prefix = draw(2, 13, 8), draw(2, 2, 8, seed=1)
    q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (attention.query, attention.key, attention.value))
    pk, pv = (m(prefix).unflatten(-1, (2, 4)).transpose(1, 2) for m in (attention.key, attention.value))
    position = torch.arange(13)
    distance = position[:, None] - position
    scores = (rotate(q, position) @ rotate(k, position).mT).masked_fill((distance < 0) | (distance >= 5), -torch.inf)
    weights = (torch.cat([q @ pk.mT, scores], dim=-1) / 2).softmax(dim=-1)
    y = weights @ torch.cat([pv, v], dim=2)
    torch.testing.assert_close(attention(x, [x], prefix)[0], attention.out(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("ahead", [0, 1])
def test_attention_to_two_kinds_sees_what_it_should_of_a_segment(ahead):
    """[P ‖ h ‖ s]: with `ahead` the h of later tokens too, as the equations of MAC have it."""
    attention = built(MIXERS["mac"]).attention
    s, h, prefix = draw(2, 6, 8), draw(2, 6, 8, seed=1), draw(2, 2, 8, seed=2)
    q, *keys = (attention._heads(attention.query(s)), *(attention._heads(attention.key(x)) for x in (h, s, prefix)))
    values = torch.cat([attention._heads(attention.value(x)) for x in (prefix, h, s)], dim=2)
    position = torch.arange(6)
    later = position > position[:, None]
    turned = [rotate(q, position) @ rotate(k, position).mT for k in keys[:2]]
    turned[0] = turned[0] if ahead else turned[0].masked_fill(later, -torch.inf)
    scores = torch.cat([q @ keys[2].mT, turned[0], turned[1].masked_fill(later, -torch.inf)], dim=-1) / 2
    y = attention.out((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(s, [h, s], prefix, ahead=ahead)[0], y)


def test_mac_to_the_letter_asks_the_memory_that_has_read_the_segment():
    mixer, x = built(MIXERS["mac"], causal=False), draw(2, 12, 8)
    prefix, memory = mixer.persistent.expand(2, 2, 8), mixer.memory
    state, outputs = memory.init_state(2), []
    q_tail = torch.zeros(2, 3, 8).double()
    for segment in x.split(6, dim=1):
        h, q_tail = memory.recall(segment, state.memory.weights, q_tail)
        y = mixer.attention(segment, [h, segment], prefix, ahead=1)[0]
        asked = state.tail[..., :8]
        state = memory.prefill(y, state)[1]
        outputs.append(mixer.join(y, memory.recall(y, state.memory.weights, asked)[0]))
    torch.testing.assert_close(torch.cat(outputs, dim=1), mixer(x), rtol=0, atol=1e-12)


@mixers
def test_sequences_of_a_batch_never_meet(make):
    mixer, x = built(make), draw(4, 13, 8)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        y, state = mixer.prefill(x)
        torch.testing.assert_close(mixer(x[order]), y[order])
        token, some = draw(4, 8, seed=3), [3, 1]
        expected, _ = mixer.step(token, state)
        torch.testing.assert_close(mixer.step(token[some], select_state(state, some))[0], expected[some])


@mixers
def test_a_state_never_grows_and_travels_through_a_file(make, tmp_path):
    mixer, x = built(make, dtype=torch.float32), draw(2, 40, 8, dtype=torch.float32)
    with torch.no_grad():
        held = state_bytes(mixer.init_state(2))
        for n in (1, 7, 40):
            _, state = mixer.prefill(x[:, :n])
            assert state_bytes(state) == held
        save_state(state, tmp_path / "state.safetensors")
        again = load_state(mixer.init_state(1), tmp_path / "state.safetensors")
        token = draw(2, 8, seed=3, dtype=torch.float32)
        torch.testing.assert_close(mixer.step(token, again)[0], mixer.step(token, state)[0])


def test_a_memory_holds_its_weights_its_momentum_and_the_weights_of_the_chunks_start():
    for momentum, kinds in ((True, 3), (False, 2)):
        state = NeuralMemory(8, heads=2, momentum=momentum).init_state(3)
        memory = 2 * (4 * 16 + 16 * 4)
        assert state_bytes(state) == 4 * 3 * (kinds * memory + 3 * 24)


@mixers
def test_a_frozen_memory_is_read_and_not_written(make):
    mixer, x = built(make), draw(2, 12, 8)
    with torch.no_grad():
        _, state = mixer.prefill(x)
        memory = [part for part in mixer.modules() if isinstance(part, NeuralMemory)]
        with frozen_memory(mixer):
            assert not any(part.writing for part in memory)
            _, after = mixer.prefill(x, state)
        assert all(part.writing for part in memory)

    def weights(state):
        while not hasattr(state, "weights"):
            state = state.memory
        return state.weights

    for a, b in zip(weights(state), weights(after)):
        assert torch.equal(a, b)
    assert not torch.equal(weights(mixer.prefill(x, state)[1])[0], weights(state)[0])


def test_surprise_is_observed_in_the_order_of_the_memories_and_is_that_of_autograd():
    torch.manual_seed(0)
    first, second = NeuralMemory(8, chunk=1).double(), LongTermMemory(8, heads=2, chunk=4).double()
    x = draw(2, 9, 8)
    with observe_surprise() as found:
        second(first(x))
    assert [one.norm.shape for one in found] == [(2, 1, 9), (2, 2, 9)]
    state, norms = first.init_state(2), []
    for t in range(9):
        (_, k, v), _ = first._projected(x[:, t : t + 1], state.tail)
        weights = [w.detach().requires_grad_() for w in state.memory.weights]
        recalled = k + torch.nn.functional.layer_norm(torch.nn.functional.gelu(k @ weights[0]) @ weights[1], (8,))
        gradients = torch.autograd.grad((recalled - v).square().sum(), weights)
        norms.append(sum(u.square().sum((1, 2, 3)) for u in gradients).sqrt())
        _, state = first.prefill(x[:, t : t + 1], state)
    torch.testing.assert_close(found[0].norm[:, 0], torch.stack(norms, dim=1))


def test_gates_start_where_a_memory_trains():
    memory = NeuralMemory(64, heads=2, chunk=16)
    step, momentum = (gate.bias.detach().sigmoid().unique().item() for gate in (memory.step_gate, memory.momentum_gate))
    assert memory.max_step * step == pytest.approx(0.2689 / 32, abs=1e-5)
    assert momentum == pytest.approx(0.1192, abs=1e-4)


@pytest.mark.parametrize("gating", ["layer", "token"])
def test_where_the_forget_gate_starts_is_a_choice(gating):
    for bias, reach in ((-5.0, 149.4), (-3.0, 21.1)):
        gate = NeuralMemory(8, forget_bias=bias, gating=gating).forget_gate
        gate = gate[-1] if gating == "layer" else gate
        assert (1 / gate.bias.detach().sigmoid()).tolist() == pytest.approx([reach] * len(gate.bias), abs=0.1)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_each_layer_has_gates_of_its_own_and_forgets_by_channel(depth):
    memory, x = built(partial(NeuralMemory, heads=2, depth=depth)), draw(2, 5, 8)
    step, momentum, forget = memory._gates(x, torch.float64)
    assert step.shape == momentum.shape == (depth, 2, 2, 5)
    assert [gate.shape for gate in forget] == [(2, 2, 5, c) for c in [4, 16, 4][:: 1 if depth == 3 else 2][:depth]]
    for gate in (*forget, *step):
        assert not torch.equal(gate[0, 0, 0].expand_as(gate[0, 0]), gate[0, 0])  # of the token
    shared = built(partial(NeuralMemory, heads=2, depth=depth, gating="token"))._gates(x, torch.float64)
    assert shared[0].shape == (1, 2, 2, 5) and [gate.shape for gate in shared[2]] == [(2, 2, 5, 1)]


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_one_token_without_end_does_not_blow_a_memory_up(depth, chunk):
    memory = built(NeuralMemory, dim=16, dtype=torch.float32, depth=depth, chunk=chunk)
    x = draw(2, 1, 16, dtype=torch.float32).expand(2, 320, 16).contiguous().requires_grad_()
    y = memory(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *memory.parameters()])
    assert y.abs().max() < 10 and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("depth", [1, 2])
def test_larger_steps_than_one_a_chunk_blow_an_mlp_up_on_one_token_without_end_and_no_normed_one(depth):
    x = draw(2, 1, 16, dtype=torch.float32).expand(2, 1024, 16)
    assert not built(NeuralMemory, 16, torch.float32, depth=depth, max_step=1.0, residual=False)(x).abs().max() < 1e6
    assert built(NeuralMemory, 16, torch.float32, depth=depth, max_step=1.0)(x).abs().max() < 10


@mixers
def test_bfloat16_weights_keep_a_float32_memory(make):
    mixer = built(make, dtype=torch.bfloat16)
    _, state = mixer.prefill(draw(1, 9, 8, dtype=torch.bfloat16))
    while not hasattr(state, "weights"):
        state = state.memory
    assert {x.dtype for x in (*state.weights, *state.momentum)} == {torch.float32}


@pytest.mark.parametrize("residual", [True, False])
def test_a_memory_is_asked_the_same_way_and_in_its_own_precision_whether_it_writes_or_not(residual):
    options = {"momentum": False, "decay": False, "max_step": 1e-30, "residual": residual}  # writes nothing
    memory, x = built(NeuralMemory, dtype=torch.float32, **options), draw(2, 9, 8, dtype=torch.float32)
    torch.nn.init.normal_(memory.memory[-1])
    with torch.autocast("cpu", torch.bfloat16):
        writing, recalled = memory(x), memory.recall(x, memory.init_state(2).memory.weights, torch.zeros(2, 3, 8))[0]
        with frozen_memory(memory):
            frozen = memory(x)
    for y in (frozen, recalled):
        torch.testing.assert_close(y, writing, rtol=1e-5, atol=1e-5)


def test_copies_share_no_memory():
    mixer = built(MIXERS["mag"])
    twin = copy.deepcopy(mixer)
    with torch.no_grad():
        twin.memory.memory[0].zero_()
    assert mixer.memory.memory[0].any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NeuralMemory(10, heads=4), "heads must divide dim, both at least 1, got dim=10 and heads=4"),
        (lambda: NeuralMemory(8, depth=0), "depth must be at least 1, got 0"),
        (lambda: NeuralMemory(8, chunk=0), "chunk must be at least 1, got 0"),
        (lambda: NeuralMemory(8, kernel=0), "kernel must be at least 1, got 0"),
        (lambda: NeuralMemory(8, max_step=0.0), "max_step must be above 0, got 0.0"),
        (lambda: NeuralMemory(8, limit=0), "limit must be above 0, got 0"),
        (lambda: MemoryAsContext(8, heads=2, memory_heads=3), "heads must divide dim"),
        (lambda: NeuralMemory(8, expansion=0.01), "a hidden width of at least 1"),
        (lambda: NeuralMemory(8, read="now"), "read must be post or pre"),
        (lambda: NeuralMemory(8, gating="head"), "gating layer or token, got 'post' and 'head'"),
        (lambda: MemoryAsContext(8, heads=2, stride=0), "stride must be at least 1, got 0"),
        (lambda: NeuralMemory(8, causal=False), "causal must be True"),
        (lambda: LongTermMemory(8, persistent=-1), "persistent must be at least 0, got -1"),
        (lambda: MemoryAsGate(8, heads=3), "heads must divide dim"),
        (lambda: MemoryAsGate(8, heads=8), "an even head width"),
        (lambda: MemoryAsGate(8, heads=2, window=0), "window must be at least 1, got 0"),
        (lambda: MemoryAsContext(8, heads=2, segment=0), "segment must be at least 1, got 0"),
        (lambda: MemoryAsLayer(8, heads=2, causal=False), "causal must be True"),
    ],
)
def test_bad_arguments_are_refused_with_a_reason(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@mixers
def test_what_does_not_fit_a_layer_is_refused_with_both_shapes(make, untyped):
    mixer, x = built(make), draw(2, 7, 8)
    with pytest.raises(ValueError, match=r"mask must be bool of shape .* = \(2, 7\), .* got bool of shape \(2, 6\)"):
        mixer(x, mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be bool .* got float64 of"):
        mixer(x, mask=torch.ones(2, 7, dtype=torch.float64))
    for wrong in (x[..., :6], x[0], x[:, :0]):
        with pytest.raises(ValueError, match=r"expected \(batch, tokens, 8\) with at least one token, got"):
            mixer(wrong)
    with pytest.raises(ValueError, match=r"expected one token a stream, \(batch, 8\), got \(2, 7, 8\)"):
        mixer.step(x, mixer.init_state(2))


@pytest.mark.parametrize(
    ("size", "layers", "dim", "heads"),
    [("170m", 12, 768, 16), ("340m", 24, 1024, 16), ("760m", 24, 1536, 16), ("1_3b", 18, 2048, 8)],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_presets_have_the_shapes_of_table_5_and_the_sizes_of_appendix_e(size, layers, dim, heads, variant):
    with torch.device("meta"):
        model = getattr(model_module, f"titans_{size}")(variant=variant)
    mixer = model.blocks[0].mixer
    assert (len(model.blocks), model.dim, mixer.memory.chunk if variant != "mal" else 16) == (layers, dim, 16)
    assert {part.heads for part in model.modules() if isinstance(part, NeuralMemory)} == {heads}
    persistent = mixer.memory.persistent if variant == "mal" else mixer.persistent
    assert persistent.shape == (128, dim)
    if variant != "lmm":
        assert mixer.attention.window == (512 if variant == "mac" else 2048) and mixer.attention.heads == heads
    if variant == "mac":
        assert mixer.segment // mixer.stride == 256


def test_sizes_are_named_after_the_memory_alone_within_a_third():
    for size, named in (("170m", 170), ("340m", 340), ("400m", 400), ("760m", 760), ("1_3b", 1300)):
        with torch.device("meta"):
            model = getattr(model_module, f"titans_{size}")(variant="lmm")
        assert 0.7 < count_parameters(model) / (named * 1e6) < 1.15


def test_mac_asks_its_memory_at_every_second_token():
    mixer, x = built(MIXERS["mac that asks at every second token"]), draw(1, 6, 8)
    seen = []
    mixer.attention.register_forward_pre_hook(lambda part, args, kwargs: seen.append(kwargs["mask"]), with_kwargs=True)
    mixer(x)
    assert seen[0][0, :, 0].tolist() == [False, True] * 3 and seen[0][0, :, 1].all()


@pytest.mark.parametrize("variant", ["mac", "mag", "mal"])
def test_work_of_the_hybrids_is_linear_in_the_tokens(variant):
    mixer, sizes = built(MIXERS[variant], dtype=torch.float32), [96, 192, 384]
    with torch.no_grad():
        work = [flops(lambda n=n: mixer(draw(1, n, 8, dtype=torch.float32))) for n in sizes]
    assert growth(sizes, work).exponent == pytest.approx(1, abs=0.03)


def test_a_preset_reads_a_text_on_the_meta_device():
    with torch.device("meta"):
        logits = model_module.titans_170m()(torch.zeros(1, 70, dtype=torch.long))
    assert logits.shape == (1, 70, 32000)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_language_model_of_each_variant_streams_and_generates(variant):
    torch.manual_seed(0)
    model = titans_lm(variant, vocab=20, dim=16, layers=2, heads=2, memory_heads=2, window=5, chunk=4).eval()
    tokens = torch.randint(20, (2, 23))
    with torch.no_grad():
        whole, state = model(tokens), model.init_state(2)
        for t in range(23):
            logits, state = model.step(tokens[:, t], state)
            torch.testing.assert_close(logits, whole[:, t], rtol=0, atol=1e-4)
    assert len(list(model.generate(tokens[:, :3], 5))) == 5


def test_a_classifier_ignores_padding_behind_a_series():
    torch.manual_seed(0)
    model = SequenceClassifier(4, 2, dim=16, chunk=4).double().eval()
    x = draw(2, 20, 4)
    mask = torch.arange(20).expand(2, 20) < 13
    with torch.no_grad():
        torch.testing.assert_close(model(x.masked_fill(~mask[..., None], torch.nan), mask), model(x[:, :13]))


def test_a_forecaster_lives_on_the_scale_of_its_window():
    torch.manual_seed(0)
    model = Forecaster(2, context=12, horizon=3, dim=8, chunk=4).double().eval()
    x, scale, shift = draw(3, 12, 2), torch.tensor([3.0, 0.2]).double(), torch.tensor([-4.0, 100.0]).double()
    with torch.no_grad():
        torch.testing.assert_close(model(x * scale + shift), model(x) * scale + shift)
    with pytest.raises(ValueError, match="context=12"):
        model(x[:, 1:])


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="variant must be one of lmm, mac, mag, mal, got 'mad'"):
        titans_lm("mad")
    with pytest.raises(ValueError, match="variant must be one of lmm, mac, mag, mal, got 'mad'"):
        model_module.titans_170m(variant="mad")


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """A command line in a folder that holds a text and an empty one: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("round and round the wheels go. " * 60)
    (tmp_path / "empty.txt").write_text("")

    def command(line):
        code = main(shlex.split(line))
        return code, *capsys.readouterr()

    return command


SMALL = "--set length=16 --set eval_tokens=64 --set dim=16 --set layers=1 --set heads=2 --set memory_heads=2 --steps 2"


@pytest.mark.parametrize(
    ("variant", "options"),
    [("lmm", "depth=1"), ("mac", "depth=3"), ("mag", "depth=4"), ("mal", "persistent=2"), ("mag", "limit=1")],
)
def test_every_variant_is_trained_and_goes_on_with_words(run, variant, options, tmp_path):
    train = f"train titans --preset titans_{variant}_small --data text.txt {SMALL} --set {options} --out run"
    code, out, err = run(train)
    assert code == 0 and "bits_per_byte" in out, err
    name, value = options.split("=")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["options"][name] == int(value)
    code, out, err = run("predict titans 'round and' --weights run --set tokens=12")
    assert (code, err) == (0, "") and out.startswith("round and")


@pytest.mark.parametrize(
    ("words", "output"),
    [
        ("--preset titans_recall --data lookup --set examples=64 --set test_examples=16 --set variant=mac", "accuracy"),
        ("--preset titans_forecaster --data airline --set depth=3 --set persistent=0", "mse"),
        ("--preset titans_classifier --data japanese-vowels --set depth=1 --set dim=8 --set layers=1", "accuracy"),
    ],
)
def test_recall_forecasting_and_classification_are_trained(run, words, output):
    code, out, err = run(f"train titans {words} --steps 2 --out run")
    assert code == 0 and output in out, err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--set depth=0", "depth must be at least 1, got 0"),
        ("--set depth=two", "depth: Input should be a valid integer"),
        ("--set chunk=0", "chunk must be at least 1, got 0"),
        ("--set heads=5", "heads must divide dim, both at least 1, got dim=96 and heads=5"),
        ("--set variant=mad", "variant must be one of lmm, mac, mag, mal, got 'mad'"),
        ("--set width=3", "what can be set: variant, vocab, dim"),
        ("--data empty.txt", "empty.txt is empty"),
        ("--set max_step=-1", "max_step must be above 0, got -1"),
        (
            "--set max_step=50 --set decay=false --set residual=false --lr 0.5",
            "or a max_step below 50 or a limit of 1 for the memory may help",
        ),
    ],
)
def test_bad_wishes_are_one_line(run, words, says, tmp_path):
    data = "" if "--data" in words else "--data text.txt"
    code, _, err = run(f"train titans --preset titans_mag_small {data} {words} --set length=64 --steps 20 --out run")
    assert code == 2 and says in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_run_of_one_variant_does_not_go_on_as_another_though_their_weights_have_the_same_shapes(run):
    train = f"train titans --data text.txt {SMALL} --out run"
    assert run(f"{train} --preset titans_mag_small")[0] == 0
    code, _, err = run(f"{train} --preset titans_mac_small --resume")
    assert code == 2 and "last.ckpt is of another preset or of other data" in err and err.count("\n") == 1
    assert run(f"{train} --preset titans_mag_small --steps 3 --resume")[0] == 0


@pytest.mark.parametrize("study", [experiments.RECALL, experiments.TEXT], ids=lambda study: study.name)
def test_variants_are_of_one_size_and_start_alike(study):
    counts, spreads = [], []
    for _, part in study.variants.values():
        torch.manual_seed(0)
        model = study.build(part, **study.data(0, True).options)
        counts.append(count_parameters(model))
        maps = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and min(m.weight.shape) > 7]
        spreads += [m.weight.std().item() * m.in_features**0.5 for m in maps]
    assert max(counts) / min(counts) < 1.005
    assert 0.8 < min(spreads) < max(spreads) < 1.2


def test_the_linear_rnn_is_its_recurrence():
    rnn, x = built(studies.GatedRecurrence, dim=8), draw(2, 11, 8)
    y = torch.nn.functional.pad(rnn.project(x), (0, 0, 3, 0)).unfold(1, 4, 1)
    q, k, v = torch.nn.functional.silu((y * rnn.convolution.T).sum(-1)).unflatten(-1, (3, 2, 4)).unbind(2)
    q, k = (torch.nn.functional.normalize(part, dim=-1) for part in (q, k))
    state, outputs = torch.zeros(2, 2, 4, 4).double(), []
    for t in range(11):
        state = rnn.keep(x[:, t]).sigmoid()[..., None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ state).flatten(1))
    expected = rnn.out(rnn.norm(torch.stack(outputs, dim=1)) * torch.nn.functional.silu(rnn.gate(x)))
    torch.testing.assert_close(rnn(x), expected)


@pytest.mark.parametrize("switch", [studies.narrow_attention, studies.without_momentum, frozen_memory])
def test_what_is_switched_off_changes_a_model_and_comes_back(switch):
    model, tokens = (
        experiments.RECALL.build(experiments.RECALL.variants["mag"][1], vocab=0).eval(),
        studies.pairs_data(0, True).test[:][0],
    )
    with torch.no_grad():
        before = model(tokens)
        with switch(model):
            off = model(tokens)
        assert torch.equal(model(tokens), before)
    assert not torch.allclose(off, before, atol=1e-3)


def test_without_momentum_is_a_memory_that_has_none():
    with_gate, without = (built(partial(NeuralMemory, momentum=m)) for m in (True, False))
    without.load_state_dict({k: v for k, v in with_gate.state_dict().items() if "momentum" not in k})
    x = draw(2, 30, 8)
    with studies.without_momentum(with_gate):
        torch.testing.assert_close(with_gate(x), without(x))


class Told(torch.nn.Module):
    """Answers right where the pair stands at most so far back, and wrong elsewhere."""

    def __init__(self, data, reach):
        super().__init__()
        self.reach, self.lengths = reach, []
        _, self.targets, self.distances = data.test[:]

    def forward(self, tokens):
        self.lengths.append(tokens.shape[1])
        if tokens.shape != self.targets.shape:
            return torch.zeros(*tokens.shape, studies.VALUES)
        right = torch.nn.functional.one_hot(self.targets.clamp_min(0), studies.VALUES)
        return torch.where((self.distances <= self.reach).unsqueeze(-1), right, -right).float()


def test_recall_is_probed_within_the_window_beyond_it_and_far():
    data = studies.pairs_data(0, True)
    model = Told(data, studies.WINDOW - 1)  # as far back as window attention sees, itself included
    assert (studies.right_within(model, data), studies.right_beyond(model, data)) == (1.0, 0.0)
    assert 0 < studies.right(model, data) < 1
    beyond = Told(data, -1)
    assert studies.right_within(beyond, data) == studies.right_beyond(beyond, data) == 0.0
    model.lengths.clear()
    studies.right_far(model, data)
    assert model.lengths == [16 * studies.LENGTH]


def test_a_long_text_is_probed_late_and_the_inner_loss_against_its_start(monkeypatch):
    bits, inner = torch.arange(64.0), torch.cat([torch.full((16,), 4.0), torch.full((48,), 1.0)])
    monkeypatch.setattr(studies, "long_reading", lambda model, data: (bits, inner))
    model, data = torch.nn.Identity(), studies.text_data(0, True)
    assert studies.late_bits(model, data) == pytest.approx(47.5)
    assert studies.inner_fall(model, data) == pytest.approx(0.25)


def test_a_long_text_is_read_in_bits_and_with_the_surprise_of_every_token():
    model = experiments.TEXT.build(experiments.TEXT.variants["lmm"][1], vocab=256)
    data = studies.text_data(0, True)
    torch.nn.init.zeros_(model.head.weight)
    bits, inner = studies.long_reading(model, data)
    assert bits.shape == inner.shape == (2 * studies.READ,) and inner.min() > 0
    torch.testing.assert_close(bits, torch.full_like(bits, 8.0))  # all bytes alike


@pytest.mark.parametrize(
    ("experiment", "study", "figures", "effect"),
    [
        ("writing_recalls", "RECALL", {"accuracy": 0.9, "unwritten": 0.2}, 0.7),
        ("writing_reads", "TEXT", {"late": 2.0, "late, unwritten": 2.5}, -0.5),
        ("memory_is_long", "RECALL", {"beyond the window": 0.9, "beyond, unwritten": 0.3, "within": 0.8,
                                      "within, unwritten": 0.7}, 0.5),
        ("attention_is_short", "RECALL", {"within": 0.8, "within, narrow": 0.4, "beyond the window": 0.9,
                                          "beyond, narrow": 0.85}, 0.35),
    ],
)  # fmt: skip
def test_what_is_switched_off_is_set_against_what_is_left_on(experiment, study, figures, effect, monkeypatch, tmp_path):
    study = getattr(experiments, study)
    assert set(figures) <= {*study.probes, study.of_task.metric}

    async def trials(self, run, variant):
        assert self is study and variant == ("lmm" if "writing" in experiment else "mag")
        return [{name: value + seed / 1000 for name, value in figures.items()} for seed in run.seeds]

    async def measure(self, run, variants):
        return {}, {"seeds": run.seeds, "unit": ""}

    monkeypatch.setattr(Study, "trials", trials)
    monkeypatch.setattr(Study, "measure", measure)
    found = run_to_end(getattr(experiments, experiment)(Run("titans", tmp_path, budget="small", seeds=(1, 2, 3))))
    assert found.effect == pytest.approx(effect)


@pytest.mark.parametrize("training", [False, True])
def test_both_forms_of_the_memory_run_beside_the_port(training):
    timing = experiments.beside_the_port(4, training, 2, 10, (8,))
    for form in experiments.FORMS:
        found = timing.runners[form](8, "cpu")()
        assert len(found) > 4 and found[0].shape == (2, 10, 8) if training else found.shape == (2, 10, 8)
    asked = {(one.system, one.baseline) for one in experiments.BENCHMARKS if one.within == 0.8}
    assert asked == {(form, "titans-pytorch") for form in experiments.FORMS}
    assert {one.package for one in experiments.BENCHMARKS} == {"titans-pytorch"}


def test_the_convolution_of_many_numbers_is_the_sum_of_shifted_ones(monkeypatch):
    x, taps = draw(2, 12, 6).requires_grad_(), draw(4, 6).requires_grad_()
    summed = memory_layers._convolved(x, taps, 9)
    monkeypatch.setattr(memory_layers, "MANY", 0)
    found = memory_layers._convolved(x, taps, 9)
    torch.testing.assert_close(found, summed)
    weight = draw(*found.shape)
    for ours, theirs in zip(*(torch.autograd.grad((y * weight).sum(), (x, taps)) for y in (found, summed))):
        torch.testing.assert_close(ours, theirs)
