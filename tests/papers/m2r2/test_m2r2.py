"""What M2R2 promises: a second stream that touches nothing, exits that leave no hole, drafts that lose nothing."""

import copy
import math
import subprocess
import sys
from functools import partial
from inspect import getsource

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from provenn.core.errors import UserError
from provenn.nn.attention import SlidingWindowAttention, SoftmaxAttention
from provenn.nn.auxiliary import collect_auxiliary
from provenn.nn.language import CausalLM, probabilities, sample
from provenn.papers.m2r2 import (
    ExitModel,
    HeadExit,
    LatentRouter,
    LinearRouter,
    M2R2Model,
    RateAdapter,
    accelerate,
    bench,
    comparison,
    decoding,
    m2r2_tiny,
    plain_decoder,
)
from provenn.papers.m2r2.comparison import WAYS, compare_ways
from provenn.papers.m2r2.decoders import Cache, take_apart
from provenn.papers.m2r2.decoding import certainty, judge
from provenn.papers.m2r2.experts import (
    ExpertTrace,
    Memory,
    MixtureFeedForward,
    expert_decoder,
    simulate,
    trace_experts,
)
from provenn.papers.m2r2.inspection import inspect
from provenn.papers.m2r2.streams import run_both, run_fast, run_slow
from provenn.papers.m2r2.task import TASK, account, fit_added, shipped
from provenn.testing.common import CHECKS
from provenn.testing.subject import Subject

VOCAB = 19


def stirred(module, seed=0, std=0.35):
    """Weights so large that what is written depends on the text."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.copy_(std * noise if p.dim() > 1 else 1 + 0.1 * noise)
    return module.eval()


def decoder(seed=0, *, layers=6, dtype=torch.float64, window=None, **options):
    mixer = partial(SoftmaxAttention, heads=2, bias=False, rotary=not options)
    if window is not None:
        mixer = partial(SlidingWindowAttention, heads=2, window=window, bias=False, rotary=not options)
    return stirred(CausalLM(VOCAB, 16, layers, mixer, **options).to(dtype), seed)


def model_of(seed=0, kind=M2R2Model, gates=(2, 4), dtype=torch.float64, window=None, base=None, **options):
    base = decoder(seed, dtype=dtype, window=window) if base is None else base
    made = kind(base, gates, **({"rank": 3} if kind is not ExitModel else {}), **options)
    for name, p in made.added():
        generator = torch.Generator().manual_seed(seed + len(name))
        p.data = 0.35 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return made.eval()


def prompts(seed=0, batch=3, tokens=8):
    return torch.randint(VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def alone(base, prompt, count):
    """What the decoder writes by itself, by its own cache."""
    return torch.stack(list(base.generate(prompt, count, temperature=0)), dim=1)


# The two streams.


def test_before_training_the_fast_stream_is_the_slow_one():
    model = M2R2Model(decoder(), (2, 4), rank=3)
    streams = model.streams(prompts())
    for start, states in zip((0, 2), streams.fast):
        for i, p in enumerate(states):
            assert torch.equal(p, streams.slow[start + i])


@pytest.mark.parametrize("window", [None, 3])
def test_the_slow_stream_is_the_decoder_and_does_not_see_what_is_added(window):
    model, tokens = model_of(window=window), prompts()
    torch.testing.assert_close(model.streams(tokens).logits, model.base(tokens), rtol=0, atol=1e-10)
    before = model.streams(tokens).slow
    for _, p in model.added():
        p.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, model.streams(tokens).slow))


def by_definition(model, tokens):
    """The fast stream token by token and layer by layer, from its equations."""
    base, starts = model.base, (0, *model.gates)
    slow = [base.embed(tokens)]
    for block in base.blocks:
        slow.append(block(slow[-1]))
    exits = []
    for start, gate in zip(starts, model.gates):
        p = slow[start]
        for i in range(start, gate):
            block, adapter = base.blocks[i], model.adapters[i]
            z = block.norm1(p)
            own = block.norm1(slow[i])
            rows = []
            for t in range(tokens.shape[1]):
                # The attention of the block over the slow tokens up to t, its last query replaced by the fast one.
                q, _, _ = block.mixer._project(z[:, t : t + 1], t)
                _, k, v = block.mixer._project(own[:, : t + 1])
                y = F.scaled_dot_product_attention(q, k, v)
                rows.append(block.mixer.out(y.transpose(1, 2).flatten(2)))
            p = p + torch.cat(rows, dim=1) + adapter.attention.up(F.silu(adapter.attention.down(z)))
            z = block.norm2(p)
            p = p + block.feedforward(z) + adapter.feedforward.up(F.silu(adapter.feedforward.down(z)))
        exits.append(p)
    return exits


def test_the_fast_stream_is_what_its_equations_say():
    model, tokens = model_of(), prompts()
    for states, expected in zip(model.streams(tokens).fast, by_definition(model, tokens)):
        torch.testing.assert_close(states[-1], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"attention": "shared"}, {"keys": "own"}])
def test_the_fast_stream_is_causal(options):
    model, tokens = model_of(**options), prompts()
    changed = tokens.clone()
    changed[:, 5:] = (tokens[:, 5:] + 1) % VOCAB
    for a, b in zip(model.streams(tokens).fast, model.streams(changed).fast):
        torch.testing.assert_close(a[:, :, :5], b[:, :, :5], rtol=0, atol=1e-10)
        assert not torch.allclose(a[:, :, 5:], b[:, :, 5:])


@pytest.mark.parametrize("attention", ["full", "shared"])
def test_token_by_token_with_a_cache_it_is_what_it_is_over_the_whole_text(attention):
    model, tokens = model_of(attention=attention), prompts()
    whole, parts, cache = model.streams(tokens), model.decoder(), Cache(6)
    for t in range(tokens.shape[1]):
        positions = parts.positions(1, t)
        h = parts.embed(tokens[:, t : t + 1], positions)
        for gate, expected in enumerate(whole.fast):
            h, states = model.run_gate(parts, gate, h, positions, cache)
            torch.testing.assert_close(torch.stack(states), expected[:, :, t : t + 1], rtol=0, atol=1e-10)
    # The fast stream leaves nothing in the cache: what is there is the slow stream's, in the layers that it passed.
    assert cache.nbytes(8) == 4 * 2 * 3 * 8 * 16 * 8 and cache.keys[4] is None


def test_other_keys_and_other_attention_are_other_streams():
    tokens = prompts()
    exits = [
        model_of(**options).streams(tokens).fast[0][-1] for options in ({}, {"attention": "shared"}, {"keys": "own"})
    ]
    assert not torch.allclose(exits[0], exits[1]) and not torch.allclose(exits[0], exits[2])


def test_parameters_are_counted():
    model = M2R2Model(decoder(), (2, 4), rank=3, router="none")
    assert sum(p.numel() for _, p in model.added()) == 4 * 4 * 16 * 3
    routed = M2R2Model(decoder(), (2, 4), rank=3)
    assert sum(p.numel() for p in routed.routers.parameters()) == 2 * (16 * 4 + 2 * 4 + 1)


def test_adapters_and_routers_are_their_formulas():
    adapter, z = stirred(RateAdapter(8, 2)), torch.randn(3, 8)
    torch.testing.assert_close(adapter(z), F.silu(z @ adapter.down.weight.T) @ adapter.up.weight.T)
    router, states = stirred(LatentRouter(8, 4)), torch.randn(5, 2, 8)
    normed = states / (states.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    u = normed @ router.latent.weight.T
    weights = torch.einsum("sbd,bd->sb", u, u[-1]).div(2).softmax(0)
    s = torch.einsum("sb,sbd->bd", weights, u)
    torch.testing.assert_close(router(states), router.score(torch.cat([s, u[-1]], -1)).squeeze(-1))
    # The path counts for one, the last state alone for the other.
    moved = torch.cat([torch.randn(4, 2, 8), states[-1:]])
    assert not torch.allclose(router(moved), router(states))
    linear = stirred(LinearRouter(8))
    assert torch.equal(linear(moved), linear(states))


# Training.


def test_nothing_that_is_learned_moves_a_frozen_base():
    model, tokens = m2r2_frozen(), prompts(batch=4, tokens=12)
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    losses = fit_added(model, [tokens] * 12, lr=2e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.base.state_dict().items())
    assert all(p.grad is None for p in model.base.parameters())
    assert losses[-1] < 0.9 * losses[0]
    CausalLM(VOCAB, 16, 6, partial(SoftmaxAttention, heads=2, bias=False, rotary=True)).load_state_dict(before)


def m2r2_frozen():
    return M2R2Model(decoder(dtype=torch.float32), (2, 4), rank=3)


def test_of_a_base_that_is_trained_too_gates_and_routers_move_nothing():
    tokens = prompts(batch=4, tokens=12)
    batch = tokens[:, :-1], tokens[:, 1:]
    model = model_of(train_base=True)
    for name, p in model.base.named_parameters():
        assert p.requires_grad, name
    model.training_loss(batch).backward()
    plain = decoder()
    F.cross_entropy(plain(batch[0]).transpose(1, 2), batch[1]).backward()
    for (name, p), q in zip(model.base.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10, msg=name)
    missed = [name for name, p in model.added() if p.grad is None or not p.grad.abs().max() > 0]
    assert not missed


@pytest.mark.parametrize("kind", [M2R2Model, HeadExit])
def test_gradients_of_what_is_added_are_right(kind):
    model, tokens = model_of(kind=kind, base=decoder(layers=3), gates=(1, 2), router="none"), prompts(batch=2, tokens=4)
    names, values = zip(*((name, p.detach().requires_grad_()) for name, p in model.added()))

    def loss(*given):
        for name, value in zip(names, given):
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            module._parameters[last] = value
        return model.training_loss((tokens[:, :-1], tokens[:, 1:]))

    assert torch.autograd.gradcheck(loss, values, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"attention": "shared"}, {"align_weight": 0.0}, {"exit_weight": 0.0}])
def test_gradients_reach_what_is_added_with_every_option(options):
    model, tokens = model_of(**options).train(), prompts()
    model.training_loss((tokens[:, :-1], tokens[:, 1:])).backward()
    for name, p in model.added():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_alignment_is_to_the_slow_state_at_the_rate_s_layer():
    model, tokens = model_of(gates=(2,), rate=2.5), prompts()
    streams = model.streams(tokens)
    assert [model.target_layer(i) for i in (1, 2, 3)] == [2, 5, 6]
    pairs = [(streams.fast[0][1], streams.slow[2]), (streams.fast[0][2], streams.slow[5])]
    each = [((p - h).square().sum(-1) / h.square().sum(-1)).mean() for p, h in pairs]
    torch.testing.assert_close(model.misalignment(streams), sum(each) / 2)


class Both(nn.Module):
    """Exits and scores as outputs, so that the catalogue's checks can be asked of the streams."""

    def __init__(self, **options):
        super().__init__()
        base = plain_decoder(VOCAB, dim=16, layers=4, heads=2)
        self.model = M2R2Model(base, (1, 3), rank=3, train_base=True, **options)

    def forward(self, tokens):
        streams = self.model.streams(tokens)
        scores = self.model.scores(streams.fast)
        return (streams.logits, *self.model.exit_logits(streams), *scores)


KEPT = (
    "train-in-mixed-precision", "run-in-bfloat16", "export", "copy", "keep-examples-apart",
    "take-an-empty-batch", "build-on-meta", "load-safetensors",
)  # fmt: skip


@pytest.mark.parametrize("check", KEPT)
def test_the_streams_keep_the_catalogue_s_checks(check):
    subject = Subject("streams", Both, lambda batch=3: [(batch, 7)], below=(VOCAB,))
    CHECKS[check].check(subject)


def test_the_streams_are_compiled_as_one_graph():
    """In a process without the suite's checks of shapes, which wrap dataclasses so that no tracer can follow."""
    code = f"""
from torch import nn
from provenn.papers.m2r2.model import M2R2Model, plain_decoder
from provenn.testing.common import CHECKS
from provenn.testing.subject import Subject
VOCAB = {VOCAB}
{getsource(Both)}
CHECKS["compile"].check(Subject("streams", Both, lambda batch=3: [(batch, 7)], below=(VOCAB,)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_what_was_added_is_a_small_file(tmp_path):
    model = model_of(dtype=torch.float32)
    model.save_added(tmp_path / "added.safetensors")
    other = M2R2Model(decoder(dtype=torch.float32), (2, 4), rank=3)
    other.load_added(tmp_path / "added.safetensors")
    tokens = prompts()
    assert torch.equal(other.streams(tokens).fast[1], model.streams(tokens).fast[1])
    assert (tmp_path / "added.safetensors").stat().st_size < 8_000
    with pytest.raises(UserError, match="does not fit this model"):
        M2R2Model(decoder(dtype=torch.float32), (2, 4), rank=4).load_added(tmp_path / "added.safetensors")


# Speculation.


@pytest.mark.parametrize("kind", [M2R2Model, HeadExit, ExitModel])
@pytest.mark.parametrize("seed", range(4))
def test_speculation_writes_what_the_decoder_writes(kind, seed):
    """For any adapters, lengths of drafts, and certainties that end them; in a batch whose texts accept differently."""
    model, prompt = model_of(seed, kind), prompts(seed, batch=1 + seed)
    expected = alone(model.base, prompt, 25)
    for gamma in (1, 3, 6):
        written, statistics = model.decode(prompt, 25, gamma=gamma, stop=0.3 * (seed % 2))
        assert torch.equal(written, expected)
        assert statistics.tokens == 25 * len(prompt) and statistics.accepted + statistics.rounds >= statistics.tokens
    assert torch.equal(model.decode(prompt, 25, mode="full")[0], expected)


@pytest.mark.parametrize("seed", range(3))
def test_speculation_with_a_second_model_does_too(seed):
    model, prompt = model_of(seed), prompts(seed)
    expected = alone(model.base, prompt, 25)
    for draft in (decoder(seed + 7, layers=1), model.base):
        written, statistics = model.decode(prompt, 25, mode="two-model", draft=draft, gamma=4)
        assert torch.equal(written, expected)
    assert statistics.accept_rate == 1  # its own decoder drafts what it writes


def test_a_second_model_has_read_what_was_written(monkeypatch):
    made, model, prompt, draft = [], model_of(), prompts(batch=1), decoder(7, layers=1)
    monkeypatch.setattr(decoding, "Cache", lambda layers: made.append(Cache(layers)) or made[-1])
    written, statistics = model.decode(prompt, 20, mode="two-model", draft=draft, gamma=3)
    assert statistics.accepted < statistics.drafted
    text = torch.cat([prompt, written], dim=1)[:, :-5]  # the last round's drafts are not read anew
    parts, fresh = take_apart(draft), Cache(1)
    positions = parts.positions(text.shape[1])
    run_slow(parts, parts.embed(text, positions), range(1), positions, fresh)
    for stored, expected in zip(made[1].read(0, text.shape[1]), fresh.read(0, text.shape[1])):
        torch.testing.assert_close(stored, expected, rtol=0, atol=1e-10)


def test_a_draft_by_adapters_that_do_nothing_beside_a_gate_behind_all_is_always_kept():
    base = decoder()
    for block in list(base.blocks)[2:]:  # the layers behind the gate leave the stream as it is
        block.mixer.out.weight.data.zero_()
        block.feedforward.linear2.weight.data.zero_()
    model = M2R2Model(base, (2,), rank=3)
    written, statistics = model.decode(prompts(), 21, gamma=4)
    assert statistics.accept_rate == 1 and statistics.rounds == 3 * 5
    assert torch.equal(written, alone(base, prompts(), 21))
    # Four drafts and the token behind them through two layers, one check through four: 14 layers' weights for 5 tokens.
    assert statistics.passes == 4 * 14 + 6 and statistics.fast_evaluations == 3 * 2 * 16


@pytest.mark.parametrize("window", [3, 5])
def test_prompts_longer_than_a_window(window):
    model, prompt = model_of(window=window), prompts(tokens=3 * window)
    assert torch.equal(model.decode(prompt, 25)[0], alone(model.base, prompt, 25))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_positions_that_are_added(positions):
    base = decoder(positions=positions, max_length=39)
    model, prompt = model_of(base=base), prompts()
    assert torch.equal(model.decode(prompt, 32)[0], alone(base, prompt, 32))
    with pytest.raises(UserError, match="positions for 39"):
        model.decode(prompt, 33)


@pytest.mark.parametrize("mode", ["full", "exit", "speculative"])
def test_prompts_of_different_lengths_in_one_batch(mode):
    model, prompt, lengths = model_of(), prompts(), torch.tensor([8, 1, 5])
    together, _ = model.decode(prompt, 20, mode=mode, threshold=0.5, lengths=lengths)
    options = {"mode": mode, "threshold": 0.5}
    for row, length in enumerate(lengths):
        if mode == "exit":  # a batch leaves together; what each text's token is taken from is its own gate
            options["fill"] = "exact"
        assert torch.equal(together[row], model.decode(prompt[row : row + 1, :length], 20, **options)[0][0])


def test_a_text_ends_in_the_middle_of_a_draft():
    """With the end a token that is written: what was drafted behind it is dropped, the other texts go on."""
    model, prompt = model_of(gates=(4,)), prompts(batch=4)
    expected = alone(model.base, prompt, 25)
    end = int(expected[0, 6])
    in_the_middle = False
    for gamma in (2, 5, 8):
        for mode in ("speculative", "full"):
            written, _ = model.decode(prompt, 25, gamma=gamma, end=end, mode=mode)
            for row, whole in zip(written, expected):
                stop = (whole == end).nonzero()
                length = int(stop[0]) + 1 if len(stop) else 25
                assert torch.equal(row[:length], whole[:length])
                assert (row[length:] == end).all()
                in_the_middle |= length < 25
            longest = max(int((w == end).nonzero()[0]) + 1 if (w == end).any() else 25 for w in expected)
            assert written.shape[1] == longest
    assert in_the_middle


def test_after_refusals_the_cache_is_that_of_a_fresh_reading():
    model, prompt = model_of(gates=(2,)), prompts(batch=1)
    kept = {}
    original = decoding._speculative

    def spy(work, *rest):
        kept["work"] = work
        return original(work, *rest)

    decoding._speculative = spy
    try:
        written, statistics = model.decode(prompt, 20, gamma=5)
    finally:
        decoding._speculative = original
    assert statistics.accept_rate < 1
    text = torch.cat([prompt, written], dim=1)[:, :-1]
    fresh = Cache(6)
    parts = model.decoder()
    positions = parts.positions(text.shape[1])
    run_slow(parts, parts.embed(text, positions), range(6), positions, fresh)
    cache = kept["work"].cache
    for i in range(6):
        for a, b in zip(cache.read(i, text.shape[1]), fresh.read(i, text.shape[1])):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_in_bfloat16_texts_part_at_ties_alone():
    """Several rows of a product are rounded otherwise than one: where two tokens are as likely, either may come."""
    parted = 0
    for seed in range(6):
        model = model_of(seed, dtype=torch.bfloat16, window=[None, 5][seed % 2])
        prompt = prompts(seed, batch=1)
        plain, written = model.decode(prompt, 25, mode="full")[0][0], model.decode(prompt, 25)[0][0]
        first = (plain != written).nonzero()
        if not len(first):
            continue
        parted += 1
        text = torch.cat([prompt[0], plain])[None, : 8 + int(first[0])]
        logits = model.base(text)[0, -1].float()
        gap = (logits[plain[first[0]]] - logits[written[first[0]]]).abs()
        assert gap <= 8 * 2**-8 * logits.abs().max(), f"seed {seed}: {gap} of {logits.abs().max()}"
    assert parted <= 3


def test_drawn_tokens_have_the_decoder_s_distribution():
    """Pairs of tokens drawn by speculation and by all layers: chi-square against the exact probabilities."""
    base = stirred(CausalLM(3, 16, 3, partial(SoftmaxAttention, heads=2, rotary=True)).double(), 3, 0.25)
    model = model_of(base=base, gates=(1,))
    prompt, draws = torch.tensor([[1, 2]]), 3000
    for temperature in (1.0, 0.6):
        text = torch.tensor([[1, 2, first] for first in range(3)])
        step = probabilities(base(text), temperature=temperature)
        exact = (step[0, 1][:, None] * step[:, 2]).flatten()
        counts = torch.zeros(9)
        generator = torch.Generator().manual_seed(5)
        written, statistics = model.decode(
            prompt.expand(draws, -1), 3, gamma=3, temperature=temperature, generator=generator
        )
        counts = (3 * written[:, 0] + written[:, 1]).bincount(minlength=9).float()
        assert 0.2 < statistics.accept_rate < 0.98
        chi = ((counts - draws * exact).square() / (draws * exact)).sum()
        assert chi < 26.1, f"chi-square {chi:.1f} with 8 degrees of freedom, of which one in a thousand is above"


def test_judging_keeps_all_of_what_is_likely_and_nothing_of_what_is_impossible():
    target = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]]).expand(64, -1, -1)
    sure = torch.tensor([[[0.5, 0.5, 0.0]]]).expand(64, -1, -1)
    drafted = torch.randint(2, (64, 1))
    right, token = judge(target, drafted, sure)
    assert (right == 1).all() and (token == 2).all()
    right, token = judge(target, torch.full((64, 1), 2), torch.tensor([[[0.0, 0.0, 1.0]]]).expand(64, -1, -1))
    assert (right == 0).all() and (token < 2).all()


# Early exit.


@pytest.mark.parametrize("kind", [M2R2Model, HeadExit, ExitModel])
@pytest.mark.parametrize("confidence", ["router", "probability", "margin"])
def test_a_threshold_that_nothing_passes_gives_all_layers_and_one_that_all_pass_the_first_gate(kind, confidence):
    model, prompt = model_of(kind=kind), prompts()
    options = {"mode": "exit", "confidence": confidence}
    full, statistics = model.decode(prompt, 20, threshold=math.inf, **options)
    assert torch.equal(full, alone(model.base, prompt, 20)) and statistics.mean_depth == 6
    _, statistics = model.decode(prompt, 20, threshold=-math.inf, **options)
    assert statistics.mean_depth == 2 and statistics.passes == 20 * 2


def exits_by_definition(model, prompt, count, threshold):
    """Token by token over the whole text so far: every layer for every token, so nothing can be missing."""
    text, depths = prompt, []
    for _ in range(count):
        streams = model.streams(text)
        logits = [*model.exit_logits(streams), streams.logits]
        sure = [score[0, -1].sigmoid() > threshold for score in model.scores(streams.fast)]
        gate = next((j for j, leaves in enumerate(sure) if leaves), len(sure))
        depths.append((*model.gates, 6)[gate])
        text = torch.cat([text, logits[gate][:, -1].argmax(-1, keepdim=True)], dim=1)
    return text[:, prompt.shape[1] :], depths


def test_a_token_that_left_is_propagated_as_it_left(monkeypatch):
    model, prompt, kept = model_of(), prompts(batch=1, tokens=1), {}
    original = decoding._exit
    monkeypatch.setattr(decoding, "_exit", lambda work, *rest: kept.update(work=work) or original(work, *rest))
    model.decode(prompt, 1, mode="exit", threshold=-math.inf, fill="propagate")
    parts, left = model.decoder(), model.streams(prompt).fast[0][-1]
    for i in range(2, 6):
        layer = parts.layers[i]
        for stored, expected in zip(
            kept["work"].cache.read(i, 1), layer.keys_and_values(layer.norm1(left), parts.positions(1))
        ):
            torch.testing.assert_close(stored, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "seed"), [(M2R2Model, 0), (HeadExit, 1)])
def test_mixed_exits_leave_no_hole(kind, seed):
    """Over 52 tokens that leave after 2, 4 and 6 layers, what is missing is made up for, exactly."""
    model, prompt = model_of(seed, kind), prompts(seed, batch=1)
    streams = model.streams(torch.cat([prompts(s, batch=1, tokens=60) for s in range(4)]))
    threshold = torch.cat(model.scores(streams.fast)).sigmoid().quantile(0.5).item()
    expected, depths = exits_by_definition(model, prompt, 52, threshold)
    written, statistics = model.decode(prompt, 52, mode="exit", threshold=threshold)
    assert torch.equal(written, expected)
    assert sum(statistics.depths.values()) == 52 and statistics.mean_depth == sum(depths) / 52
    assert len(statistics.depths) > 1
    # Each layer is done for a token at most once, and for those that nobody needs it in, never.
    assert statistics.evaluations <= 52 * 6
    other, _ = model.decode(prompt, 52, mode="exit", threshold=threshold, fill="propagate")
    assert other.shape == written.shape and not torch.equal(other, written)


def test_higher_thresholds_take_more_layers():
    model, prompt = model_of(), prompts(batch=1)
    streams = model.streams(prompts(5, batch=4, tokens=40))
    marks = torch.cat(model.scores(streams.fast)).sigmoid().flatten()
    depth = [
        model.decode(prompt, 40, mode="exit", threshold=marks.quantile(q).item())[1].mean_depth for q in (0.0, 0.5, 1.0)
    ]
    assert depth[0] < depth[-1] and depth == sorted(depth)


def test_calibration_keeps_its_word_on_what_it_saw():
    model = model_of(base=decoder(dtype=torch.float32), dtype=torch.float32)
    tokens = prompts(batch=8, tokens=20)
    fit_added(model, [tokens] * 12, lr=2e-2)
    streams = model.streams(tokens)
    teacher = streams.logits.argmax(-1)
    for agreement in (0.5, 0.9):
        thresholds = model.calibrate(tokens, agreement)
        for threshold, score, logits in zip(thresholds, model.scores(streams.fast), model.exit_logits(streams)):
            leaves = score.sigmoid() > threshold
            assert not leaves.any() or (logits.argmax(-1) == teacher)[leaves].double().mean() >= agreement
    assert model.calibrate(tokens, 0.5)[0] <= model.calibrate(tokens, 0.9)[0]


def test_certainty():
    logits = torch.tensor([[0.0, math.log(3.0), math.log(6.0)]])
    torch.testing.assert_close(certainty(logits, "probability"), torch.tensor([0.6]))
    torch.testing.assert_close(certainty(logits, "margin"), torch.tensor([0.3]))


# Decoders of Hugging Face.

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def host(kind):
    import transformers

    torch.manual_seed(0)
    more = {"vocab_size": VOCAB, "max_position_embeddings": 64, "num_key_value_heads": 2, **SMALL}
    made = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**more)),
        "llama3": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **more,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            )
        ),
        "qwen2": lambda: transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**more, use_sliding_window=True, sliding_window=6, max_window_layers=2)
        ),
        "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**more, sliding_window=6)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=64, scale_attn_by_inverse_layer_idx=True
            )
        ),
    }[kind]()
    return stirred(made.double(), std=0.25)


@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen2", "mistral", "gpt2"])
def test_decoders_of_hugging_face_write_what_they_write(kind):
    base, prompt = host(kind), prompts(batch=2, tokens=9)
    model = model_of(base=base, gates=(1, 2))
    torch.testing.assert_close(model.streams(prompt).logits, base(prompt).logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(model(prompt), base(prompt).logits, rtol=0, atol=1e-9)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(prompt)}
    expected = base.generate(prompt, max_new_tokens=20, **options)[:, 9:]
    assert torch.equal(model.decode(prompt, 20)[0], expected)
    assert torch.equal(model.decode(prompt, 20, mode="exit", threshold=math.inf)[0], expected)


@pytest.mark.parametrize(("kind", "tokens"), [("llama", 1), ("mistral", 40), ("gpt2", 1)])
def test_one_text_of_one_token_and_one_far_longer_than_a_window(kind, tokens):
    base, prompt = host(kind), prompts(3, batch=1, tokens=tokens)
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    expected = base.generate(prompt, max_new_tokens=16, eos_token_id=None, **options)[:, tokens:]
    model, end = model_of(base=base, gates=(1, 2)), int(expected[0, 5])
    assert torch.equal(model.decode(prompt, 16, gamma=7)[0], expected)
    until = base.generate(prompt, max_new_tokens=16, eos_token_id=end, **options)[:, tokens:]
    assert until.shape[1] < 16 and torch.equal(model.decode(prompt, 16, gamma=7, end=end)[0], until)


def test_a_host_s_last_place_is_used_and_none_behind_it():
    base, prompt = host("gpt2"), prompts(3, batch=1, tokens=40)  # 64 positions
    model = model_of(base=base, gates=(1, 2))
    written, _ = model.decode(prompt, 25, gamma=9)
    last = base(torch.cat([prompt, written[:, :-1]], dim=1)).logits[:, -1]
    assert torch.equal(written[:, -1], last.argmax(-1))
    with pytest.raises(UserError, match="40 tokens and 26 are to follow, but the model has positions for 64"):
        model.decode(prompt, 26)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
def test_their_caches_are_exact(kind):
    from transformers import DynamicCache

    base, tokens = host(kind), prompts(batch=2, tokens=12)
    theirs = DynamicCache()
    base(tokens, past_key_values=theirs, use_cache=True)
    parts, ours = accelerate(base, [1]).decoder(), Cache(4)
    for start, stop in ((0, 7), (7, 8), (8, 12)):
        positions = parts.positions(stop - start, start)
        run_slow(parts, parts.embed(tokens[:, start:stop], positions), range(4), positions, ours)
    for i, layer in enumerate(theirs.layers):
        keys, values = ours.read(i, 12)
        torch.testing.assert_close(keys, layer.keys, rtol=0, atol=1e-10)
        torch.testing.assert_close(values, layer.values, rtol=0, atol=1e-10)


def test_a_host_learns_and_stays_as_it_is():
    base = host("llama").float()
    model = accelerate(base, [1, 2], rank=4)
    before = copy.deepcopy(base.state_dict())
    losses = fit_added(model, [{"input_ids": prompts(batch=4, tokens=12)}] * 8, lr=1e-2)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_half_precision_host_gets_adapters_of_its_precision():
    base = host("llama").bfloat16()
    model = accelerate(base, [1], rank=4)
    assert {p.dtype for _, p in model.added()} == {torch.bfloat16}
    assert model.decode(prompts(), 5)[0].shape == (3, 5)


# Experts.


def experts(seed=0):
    torch.manual_seed(seed)
    return stirred(expert_decoder(VOCAB, dim=16, layers=6, heads=2, experts=5, top=2).double(), seed)


def test_a_mixture_is_the_sum_over_its_best_experts():
    torch.manual_seed(0)
    layer, z = MixtureFeedForward(8, experts=4, top=2, hidden=6).double().eval(), torch.randn(2, 3, 8).double()
    scores = layer.router(z)
    best = scores.topk(2, dim=-1)
    expected = torch.zeros_like(z)
    for b in range(2):
        for t in range(3):
            for weight, e in zip(best.values[b, t].softmax(-1), best.indices[b, t]):
                expected[b, t] += weight * F.gelu(z[b, t] @ layer.inner[e]) @ layer.outer[e]
    torch.testing.assert_close(layer(z), expected)
    with collect_auxiliary() as added:
        layer.train()(z)
    assert len(added) == 1 and added[0] > 0


def test_experts_are_kept_busy_where_the_decoder_learns_along():
    tokens = prompts()
    base = expert_decoder(VOCAB, dim=16, layers=3, heads=2, experts=5)
    with collect_auxiliary() as alone_added:
        base.train()(tokens[:, :-1])
    model = M2R2Model(base, (1,), rank=2, train_base=True).train()
    with collect_auxiliary() as added:
        model.training_loss((tokens[:, :-1], tokens[:, 1:]))
    torch.testing.assert_close(torch.stack(added), torch.stack(alone_added))  # and none of the fast stream's


def test_a_fast_token_has_the_experts_of_its_slow_twin():
    model = model_of(base=experts(), gates=(3,))
    tokens = prompts()
    routed = []
    for block in model.base.blocks:
        original = block.feedforward.route
        block.feedforward.route = lambda z, route=original: routed.append(route(z)) or routed[-1]
    model.streams(tokens)
    for slow, quick in zip(routed[:3], routed[6:]):
        assert torch.equal(slow, quick)
    written, _ = model.decode(tokens, 15)
    assert torch.equal(written, alone(model.base, tokens, 15))
    # So it is token by token, where both are rows of one product.
    whole, parts, cache = model.streams(tokens).fast[0], model.decoder(), Cache(6)
    for t in range(tokens.shape[1]):
        positions = parts.positions(1, t)
        _, states = model.run_gate(parts, 0, parts.embed(tokens[:, t : t + 1], positions), positions, cache)
        torch.testing.assert_close(torch.stack(states), whole[:, :, t : t + 1], rtol=0, atol=1e-10)


def test_at_a_rate_of_one_the_plain_stream_foretells_almost_all():
    """The router sees the layer's attention too, which is not known yet; without attention nothing is missed."""
    base = experts()
    for block in base.blocks:
        block.mixer.out.weight.data.zero_()
    trace = trace_experts(ExitModel(base, [5], router="none"), prompts(), rate=1, more=0)
    assert trace.hit_rate("slow") == 1 and trace.hit_rate("fast") == 1
    assert trace.needed.shape == (24, 6, 2) and trace.known["slow"] == [-1, 1, 2, 3, 4, 5]


def test_loading_is_swept_over_room_and_channel(monkeypatch):
    trace = random_trace()
    trace.foretold["before"], trace.known["before"] = trace.foretold["slow"], trace.known["slow"]
    monkeypatch.setattr(bench, "_trace", lambda *given: trace)
    sweep = bench.sweep(slots="4, 12", load="0.5,2", fast=0.2)
    rows = [{**point.facts, **point.measure()} for point in sweep.points]
    assert [(row["slots"], row["load"]) for row in rows] == [(4, 0.5), (4, 2.0), (12, 0.5), (12, 2.0)]
    memory = Memory(slots=12, load=0.5, fast=0.2)
    expected = simulate(trace, memory).total / simulate(trace, memory, "fast", most=2).total
    assert rows[2]["fast"] == expected > 1 and rows[2]["oracle"] > rows[2]["fast"] and rows[2]["slow"] < rows[2]["fast"]
    (table,) = sweep.tables(rows)
    assert len(table.rows) == 4 and table.rows[2][-2] == round(expected, 2)
    for options, words in (
        ({"slots": "1"}, "two experts at once"),
        ({"slots": "a"}, "--slots"),
        ({"load": "-1"}, "not negative"),
        ({"load": "nan"}, "finite"),
        ({"load": "x"}, "--load must be numbers"),
        ({"most": 0}, "--most"),
    ):
        with pytest.raises(UserError, match=words):
            bench.sweep(**options)


def random_trace(tokens=60, layers=6, count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    needed = torch.rand(tokens, layers, count, generator=generator).argsort(-1)[..., :2]
    known = [-1] + [math.ceil(layer / 2) for layer in range(1, layers)]
    wrong = (needed + 1) % count
    return ExpertTrace(needed, {"fast": needed, "slow": wrong}, {"fast": known, "slow": known})


def test_a_channel_without_delay_leaves_the_time_of_computing():
    for by in ("demand", "fast", "slow", "oracle"):
        line = simulate(random_trace(), Memory(slots=4, load=0.0), by)
        assert line.total == 360 and line.stalled == 0


def test_foretelling_nothing_is_loading_on_demand():
    trace, memory = random_trace(), Memory(slots=10, load=1.5)
    none = trace.__class__(trace.needed, {"fast": trace.foretold["fast"]}, {"fast": [-1] * 6})
    assert simulate(none, memory, "fast") == simulate(trace, memory)


def test_on_demand_without_any_reuse_every_expert_is_waited_for():
    needed = torch.arange(24).view(3, 4, 2) % 8
    needed = torch.stack([torch.stack([(needed[0, 0] + 2 * t) % 8] * 4) for t in range(3)])
    line = simulate(ExpertTrace(needed, {}, {}), Memory(slots=2, load=2.0))
    assert line.loads == 24 and line.total == 12 * (1 + 4) and line.hits == 0


def test_all_experts_fit_and_are_loaded_once():
    trace = random_trace()
    line = simulate(trace, Memory(slots=36, load=3.0))
    assert line.loads == len({(layer, int(e)) for t in trace.needed for layer, row in enumerate(t) for e in row})


def test_foretold_rightly_experts_come_while_layers_compute():
    trace, memory = random_trace(), Memory(slots=12, load=0.5)
    demand, quick, wrong = (simulate(trace, memory, by) for by in ("demand", "fast", "slow"))
    assert simulate(trace, memory, "oracle") == quick
    assert quick.stalled < 0.7 * demand.stalled and quick.total < demand.total
    assert wrong.loads > demand.loads and wrong.stalled >= quick.stalled
    slower = simulate(trace, Memory(slots=12, load=0.5, fast=1.0), "fast")
    assert slower.total > quick.total


def one_token(*layers, known, foretold):
    """A trace of one token with an expert a layer."""
    needed = torch.tensor([[[e] for e in layers]])
    return ExpertTrace(needed, {"fast": torch.tensor([[[e] for e in foretold]])}, {"fast": known})


def test_the_channel_by_hand():
    # Layer 0 waits until 2 and computes until 3; what layer 2 needs comes from 2 to 4, so that what layer 1 needs comes
    # from 4 to 6: it ends at 7. Layer 2 finds its expert there.
    trace = one_token(5, 5, 5, known=[-1, -1, 0], foretold=[-1, -1, 5])
    line = simulate(trace, Memory(slots=9, load=2.0), "fast")
    assert (line.total, line.stalled, line.loads, line.hits) == (8.0, 5.0, 3, pytest.approx(1 / 3))
    assert simulate(trace, Memory(slots=9, load=2.0)).total == 9.0
    # The fast stream runs up to the last layer before which something is foretold, here layer 1, and costs time there.
    late = one_token(5, 5, 5, known=[-1, -1, 1], foretold=[-1, -1, 5])
    assert simulate(late, Memory(slots=9, load=0.0, fast=0.5), "fast").total == 3.5
    # With a single slot nothing can come while a layer computes with what is there.
    only = simulate(trace, Memory(slots=1, load=2.0), "fast")
    assert (only.total, only.loads) == (9.0, 3)
    # What was foretold wrongly and is not under way when its layer begins does not come any more. Layer 1 ends at 6,
    # the first of layer 2's three guesses comes from 5 to 7, what it needs from 7 to 9, what layer 3 needs from 10.
    guesses = torch.tensor([[[-1] * 3, [-1] * 3, [1, 2, 3], [-1] * 3]])
    wrong = ExpertTrace(torch.zeros(1, 4, 1, dtype=torch.long), {"fast": guesses}, {"fast": [-1, -1, 1, -1]})
    line = simulate(wrong, Memory(slots=9, load=2.0), "fast")
    assert (line.total, line.loads, line.hits) == (13.0, 5, 0)


def test_what_is_needed_at_once_is_not_thrown_out_for_each_other():
    needed = torch.tensor([[[0, 1]], [[2, 0]], [[1, 2]]])  # in the order in which they are asked for
    line = simulate(ExpertTrace(needed, {}, {}), Memory(slots=2, load=1.0))
    assert line.loads == 4 and line.total == 3 + 4


def by_ticks(trace, slots, load, compute, by):
    """The memory and its channel tick by tick, in whole numbers: what `simulate` is to find in jumps."""
    known = [-1] * trace.needed.shape[1] if by == "demand" else trace.known[by]
    there, order, under_way = {}, [], None  # expert: arrival; least recently used first; when the channel is free
    now = loads = stalled = 0
    for t, layers in enumerate(trace.needed.tolist()):
        wishes, kept = [], set()
        for layer, experts in enumerate(layers):
            experts = [(layer, e) for e in experts]
            for later, at in enumerate(known):
                if at == layer < later:
                    foretold = [(later, e) for e in trace.foretold[by][t, later].tolist()]
                    wishes += [e for e in foretold if e not in there and e not in wishes]
                    kept.update(foretold)
            kept = {e for e in kept if e[0] > layer} | set(experts)
            for e in [e for e in experts if e in there]:
                order.remove(e)
                order.append(e)
            urgent = [e for e in experts if e not in there]
            wishes = [e for e in wishes if e[0] > layer]
            left = None  # ticks of computing
            while left != 0:
                if left is None and not urgent and all(there[e] <= now for e in experts):
                    left = compute
                free = under_way is None or under_way <= now
                room = len(there) < slots or any(e not in kept for e in order)
                if free and (urgent or (wishes and room)):
                    expert = (urgent or wishes).pop(0)
                    if len(there) == slots:
                        out = next((e for e in order if e not in kept), None)
                        out = next(e for e in order if e not in experts) if out is None else out
                        order.remove(out)
                        del there[out]
                    there[expert] = under_way = now + load
                    order.append(expert)
                    loads += 1
                    if left is None and not urgent and all(there[e] <= now for e in experts):
                        left = compute
                now += 1
                stalled += left is None
                left = left - 1 if left is not None else None
            kept = {e for e in kept if e[0] > layer}
        # What was foretold for a layer of this token is of no use to the next.
    return now, stalled, loads


@pytest.mark.parametrize("by", ["demand", "fast", "slow"])
@pytest.mark.parametrize("slots", [2, 3, 5, 9, 20])
def test_jumps_are_ticks(by, slots):
    for seed in range(6):
        load, compute = 1 + seed % 3, 1 + seed % 2
        trace = random_trace(tokens=12, seed=seed)
        guesses = torch.rand(12, 6, 6, generator=torch.Generator().manual_seed(seed + 9)).argsort(-1)[..., :3]
        trace.foretold["slow"] = guesses  # right by chance
        line = simulate(trace, Memory(slots=slots, load=load, compute=compute), by)
        assert (line.total, line.stalled, line.loads) == by_ticks(trace, slots, load, compute, by), f"seed {seed}"
        assert line.total == 12 * 6 * compute + line.stalled


def test_the_least_recently_used_expert_goes():
    # One layer: 0 1 | 2 1 | 0 1 with three slots of which 0 stays, since 2 was the last of three to be needed.
    needed = torch.tensor([[[0, 1]], [[2, 1]], [[0, 1]]])
    assert simulate(ExpertTrace(needed, {}, {}), Memory(slots=3, load=1.0)).loads == 3
    assert simulate(ExpertTrace(needed, {}, {}), Memory(slots=2, load=1.0)).loads == 4


# The task, and what is refused.


def test_the_task_reads_the_first_gate_and_says_how_fast_it_went():
    data = TASK.load("stdlib", length=32, eval_tokens=256)
    model = m2r2_tiny(dim=16, layers=3, heads=2, gates=[1]).eval()
    metrics = TASK.evaluate(model, data.test)
    assert metrics["exit_bits_per_byte"] == pytest.approx(metrics["bits_per_byte"], rel=0.05)
    assert 0 <= metrics["agreement"] <= 1
    pieces = []
    texts = {
        mode: TASK.predict(
            model, data.meta, ["def f("], None, mode=mode, stop=0.0, temperature=0, tokens=12, log=pieces.append
        )
        for mode in ("full", "speculative", "exit")
    }
    assert texts["full"].split("\n\nfull:")[0] == texts["speculative"].split("\n\nspeculative:")[0]
    assert "12 tokens in" in texts["full"] and "a second" in texts["full"]
    assert "drafted tokens kept" in texts["speculative"] and "layers a token" in texts["exit"]
    assert "".join(pieces) == "".join(texts.values())
    with pytest.raises(UserError, match="mode must be one of"):
        TASK.predict(model, data.meta, ["x"], None, mode="quick")
    assert account("full", model.decode(torch.zeros(1, 1, dtype=torch.long), 3, mode="full")[1], 3).startswith(
        "full: 3"
    )
    with pytest.raises(UserError, match="rounds must be"):
        TASK.predict(model, data.meta, ["x"], None, mode="compare", rounds=0)


def test_all_ways_are_compared_in_turns():
    base = decoder(layers=3)
    model, texts = model_of(base=base, gates=(1,)), [prompts(seed, batch=1) for seed in range(2)]
    ways = compare_ways(model, texts, 8, draft=decoder(7, layers=1), rounds=1, gamma=3, threshold=math.inf)
    assert list(ways) == ["full", "exit", "speculative", "two-model"] and ways["full"].ratio == 1
    for mode, way in ways.items():
        assert way.same == way.statistics.tokens == 16, mode  # greedy, and nothing leaves early
    assert ways["speculative"].statistics.drafted and ways["two-model"].statistics.draft_passes
    drawn = compare_ways(model, texts, 8, rounds=1, threshold=-math.inf, draw={"temperature": 1.0})
    assert list(drawn) == ["full", "exit", "speculative"]
    assert drawn["full"].same == 16 and drawn["speculative"].same < 16 and drawn["exit"].same < 16


def test_a_ratio_is_of_the_same_round(monkeypatch):
    """A clock by hand: all layers take 4 and 6 s for 8 tokens, speculation 2 and 4 s."""
    spent = {"full": iter([9.0, 4.0, 6.0]), "exit": iter([9.0] * 3), "speculative": iter([9.0, 2.0, 4.0])}
    turns = []

    def timed(model, prompt, count, *, mode, statistics, **options):
        turns.append(mode)
        statistics.seconds, statistics.tokens = next(spent[mode]), count
        return iter([torch.tensor([0])] * count)

    monkeypatch.setattr(comparison, "decode", timed)
    ways = compare_ways(model_of(), [prompts(batch=1)], 8, rounds=2)
    assert ways["speculative"].ratio == (4 / 2 + 6 / 4) / 2
    assert ways["speculative"].tokens_per_second == (8 / 2 + 8 / 4) / 2
    assert turns[3:] == ["speculative", "exit", "full", "full", "exit", "speculative"]


def test_a_prediction_shows_all_ways_and_takes_the_second_model_that_ships():
    model, meta = shipped("m2r2_tiny"), {"tokenizer": "bytes", "length": 128}
    text = TASK.predict(model, meta, ["def "], None, mode="compare", temperature=0, tokens=10, rounds=1)
    lines = text.splitlines()[-4:]
    assert [line.split("  ")[1] for line in lines] == list(WAYS.values())
    assert "times all layers; the same text" in lines[2] and "times all layers; the same text" in lines[3]
    written = TASK.predict(model, meta, ["def "], None, mode="two-model", temperature=0, tokens=10)
    assert written.split("\n\ntwo-model: 10 tokens")[0] == text.split("\n\ntokens a second")[0]
    with pytest.raises(UserError, match="of bytes"):
        TASK.predict(model, {**meta, "tokenizer": "{}"}, ["x"], None, mode="two-model")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gates": [0, 2]}, "gates must grow"),
        ({"gates": [2, 2]}, "gates must grow"),
        ({"gates": [6]}, "between 1 and 5"),
        ({"gates": []}, "gates must grow"),
        ({"rate": 0.5}, "rate must be at least 1"),
        ({"rate": math.nan}, "rate must be a finite number"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"router": "oracle"}, "router must be arla"),
        ({"attention": "none"}, "attention must be"),
        ({"keys": "fast"}, "keys must be"),
        ({"exit_weight": 0, "align_weight": 0}, "nor both 0"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        M2R2Model(decoder(), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "fast"}, "mode must be one of"),
        ({"gamma": 0}, "gamma of at least 1"),
        ({"gamma": True}, "gamma must be a whole number"),
        ({"stop": 1.5}, r"stop in \[0, 1\]"),
        ({"temperature": -1.0}, "temperature"),
        ({"mode": "exit", "threshold": [0.5]}, "one for each of 2 gates"),
        ({"mode": "exit", "threshold": math.nan}, "threshold"),
        ({"mode": "exit", "confidence": "hope"}, "confidence must be one of"),
        ({"mode": "exit", "fill": "guess"}, "fill must be one of"),
        ({"mode": "two-model"}, "draft"),
        ({"lengths": torch.tensor([9, 1, 1])}, "length of 1 to 8"),
        ({"temperature": 0, "top_p": 7.0}, "top_p"),
        ({"temperature": 0, "top_k": 0}, "top_k"),
    ],
)
def test_bad_ways_to_generate_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        model_of().decode(prompts(), 4, **options)


def test_what_cannot_be_accelerated_is_refused():
    with pytest.raises(UserError, match="Linear cannot be accelerated"):
        M2R2Model(nn.Linear(3, 3))
    with pytest.raises(UserError, match="no keys and values to share"):
        M2R2Model(CausalLM(VOCAB, 16, 3, "none"))
    with pytest.raises(UserError, match="tokens, the model"):
        model_of().decode(prompts(), 4, mode="two-model", draft=CausalLM(5, 16, 1, partial(SoftmaxAttention, heads=2)))
    short = decoder(positions="learned", max_length=9)
    with pytest.raises(UserError, match="8 tokens and 4 are to follow, but the draft model has positions for 9"):
        model_of().decode(prompts(), 4, mode="two-model", draft=short)
    for wrong in (prompts() + VOCAB, prompts() - 1):
        with pytest.raises(ValueError, match="tokens from 0 to 18"):
            model_of().decode(wrong, 4)
    with pytest.raises(UserError, match="ablation"):
        model_of(keys="own").decode(prompts(), 4)
    with pytest.raises(ValueError, match="no router"):
        model_of(router="none").decode(prompts(), 4, mode="exit")
    with pytest.raises(ValueError, match="at least one token"):
        model_of().decode(prompts()[:, :0], 4)
    with pytest.raises(ValueError, match="slots must be at least 2"):
        simulate(random_trace(), Memory(slots=1, load=1.0))
    with pytest.raises(ValueError, match="times that are not negative"):
        Memory(slots=4, load=-1.0)
    with pytest.raises(ValueError, match="all MixtureFeedForward"):
        trace_experts(model_of(), prompts())


def test_both_streams_are_shown_up_to_the_last_gate(tmp_path):
    (tmp_path / "text.py").write_text("import os\n" * 9)
    x = TASK.example(tmp_path / "text.py", {"tokenizer": "bytes", "length": 16})
    assert x.shape == (1, 16)
    model = M2R2Model(plain_decoder(dim=16, layers=4, heads=2), [1, 3], rank=2)
    shown = inspect(model, x)
    assert torch.equal(shown["slow stream"], shown["fast stream"]) and len(shown["slow stream"]) == 4
    streams = stirred(model).streams(x)
    one = F.cosine_similarity(streams.fast[1][2], streams.slow[4], dim=-1).mean()
    torch.testing.assert_close(inspect(model, x)["fast stream"][3], one)
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        TASK.example(tmp_path / "empty.py", {"tokenizer": "bytes", "length": 16})


def test_nothing_is_written_where_nothing_is_asked():
    model = model_of()
    assert model.decode(prompts(), 0)[0].shape == (3, 0)
    assert model.decode(prompts()[:0], 4)[0].shape[0] == 0


def test_probabilities_are_what_samples_are_drawn_with():
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    for options in ({"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.6}, {"temperature": 0}):
        chances = probabilities(logits, **options)
        torch.testing.assert_close(chances.sum(-1), torch.ones(2))
        drawn = sample(logits.repeat(200, 1), generator=torch.Generator().manual_seed(1), **options)
        assert (chances.repeat(200, 1).gather(1, drawn[:, None]) > 0).all()


def test_run_both_is_run_slow_and_run_fast():
    model, tokens = model_of(), prompts(tokens=1)
    parts, first, then = model.decoder(), Cache(6), Cache(6)
    positions = parts.positions(1)
    h = parts.embed(tokens, positions)
    adapters, traces = list(model.adapters[:2]), []
    both = run_both(parts, h, h, range(2), positions, first, adapters, attention="full")
    slow = run_slow(parts, h, range(2), positions, then, traces=traces)
    fast = run_fast(parts, h, range(2), positions, traces, adapters, attention="full")
    torch.testing.assert_close(both[0], slow, rtol=0, atol=1e-12)
    torch.testing.assert_close(both[1][-1], fast[-1], rtol=0, atol=1e-12)
