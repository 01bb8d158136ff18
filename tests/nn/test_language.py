from functools import partial

import pytest
import torch

from plugins import importable, install
from provenn.core.errors import UserError
from provenn.nn.attention import SlidingWindowAttention, SoftmaxAttention
from provenn.nn.auxiliary import add_auxiliary, collect_auxiliary
from provenn.nn.language import CausalLM, Encoder, SwiGLU, sample
from provenn.nn.mixers import mixer_called, mixers_called
from provenn.nn.transformer import TransformerEncoder

TOKENS = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(0))


def small(mixer="softmax,window", **options) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(50, 16, 3, mixer, **options).eval()


@pytest.mark.parametrize("options", [{}, {"positions": "learned", "max_length": 20}, {"positions": "sinusoidal"}])
@pytest.mark.parametrize("cut", [1, 8, 17])
def test_a_stream_gives_what_the_whole_gives(options, cut):
    model = small("softmax,window,aaren", **options)
    expected = model(TOKENS)
    logits, state = model.prefill(TOKENS[:, :cut])
    parts = [logits]
    for t in range(cut, TOKENS.shape[1]):
        logits_t, state = model.step(TOKENS[:, t], state)
        parts.append(logits_t[:, None])
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_a_hybrid_streams_from_every_split():
    model = small("rat,rat,window")
    expected = model(TOKENS)
    for cut in range(TOKENS.shape[1] + 1):
        logits, state = model.prefill(TOKENS[:, :cut]) if cut else (expected[:, :0], model.init_state(3))
        for t in range(cut, TOKENS.shape[1]):
            logits_t, state = model.step(TOKENS[:, t], state)
            logits = torch.cat([logits, logits_t[:, None]], dim=1)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


MIXER = """
from torch import nn


class Echo(nn.Module):
    def __init__(self, dim, gain=1.0):
        super().__init__()
        self.gain = gain

    def forward(self, x, *, mask=None):
        return self.gain * x
"""
CARD = """
title = "Echoes"
date = 2026-01-31
authors = 1
summary = "A mixer that gives what it takes."

[[mechanisms]]
name = "echo"
slot = "token-mixer"
layer = "layers:Echo"
arguments = { gain = 0.5 }
"""


def test_a_mixer_of_another_package_is_found_by_its_card_alone(tmp_path):
    package = tmp_path / "source" / "echoes"
    package.mkdir(parents=True)
    for name, text in {"__init__.py": "", "layers.py": MIXER, "paper.toml": CARD}.items():
        (package / name).write_text(text)
    site = tmp_path / "site"
    site.mkdir()
    with importable(install(package, site), "echoes"):
        model = CausalLM(50, 16, 2, "window,echo")
        assert [type(block.mixer).__name__ for block in model.blocks] == ["SlidingWindowAttention", "Echo"]
        assert mixer_called("echoes")(16).gain == 0.5 and mixers_called("echo", gain=2.0)[0](16).gain == 2.0
    with pytest.raises(UserError, match="no token-mixer is called 'echo'"):
        mixer_called("echo")


def test_it_is_causal():
    model, other = small(), TOKENS.clone()
    other[:, 9] = (other[:, 9] + 1) % 50
    before, after = model(TOKENS), model(other)
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.allclose(before[:, 9:], after[:, 9:])


def test_layers_take_their_mixers_in_turn():
    model = CausalLM(50, 16, 5, "softmax,softmax,window")
    windows = [isinstance(block.mixer, SlidingWindowAttention) for block in model.blocks]
    assert windows == [False, False, True, False, False]


def test_parameters_are_those_of_gpt2():
    """124,439,808 parameters: Radford et al. (2019), as the public checkpoint has them."""
    with torch.device("meta"):
        model = CausalLM(
            50257,
            768,
            12,
            partial(SoftmaxAttention, heads=12),
            norm="layer",
            positions="learned",
            max_length=1024,
            bias=True,
        )
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_tied_logits_share_the_embedding():
    count = {tied: sum(p.numel() for p in small(tied=tied).parameters()) for tied in (True, False)}
    assert count[False] - count[True] == 50 * 16


def test_a_mixer_keeps_the_start_it_asks_for():
    class Own(SoftmaxAttention):
        def reset_parameters(self):
            torch.nn.init.eye_(self.query.weight)

    model = CausalLM(50, 16, 2, partial(Own, heads=2))
    assert torch.equal(model.blocks[1].mixer.query.weight, torch.eye(16))
    assert 0.015 < model.blocks[1].mixer.key.weight.std() < 0.025


def test_swiglu_costs_what_the_plain_one_does():
    plain, gated = (CausalLM(50, 48, 3, "softmax", feedforward=kind) for kind in ("gelu", "swiglu"))
    counts = [sum(p.numel() for p in model.blocks.parameters()) for model in (plain, gated)]
    assert counts[1] == pytest.approx(counts[0], rel=0.05)
    x = torch.randn(2, 6)
    layer = SwiGLU(6, 8)
    gate, up = x @ layer.gate.weight.T, x @ layer.linear1.weight.T
    torch.testing.assert_close(layer(x), (gate * gate.sigmoid() * up) @ layer.linear2.weight.T)


def test_the_likeliest_continuation_repeats_and_follows_the_model():
    model = small()
    tokens = torch.stack(list(model.generate(TOKENS[:, :5], 6, temperature=0)), dim=1)
    whole = torch.cat([TOKENS[:, :5], tokens], dim=1)
    assert torch.equal(model(whole)[:, 4:-1].argmax(-1), tokens)


def test_draws_follow_the_shares():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(**options):
        return torch.bincount(sample(logits, generator=generator, **options), minlength=4) / 20_000

    torch.testing.assert_close(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)
    torch.testing.assert_close(shares(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)
    assert shares(temperature=0.2)[0] > 0.9 and shares(top_p=1e-6)[0] == 1


@pytest.mark.parametrize("num_classes", [None, 4])
def test_an_encoder_looks_both_ways_and_past_padding(num_classes):
    torch.manual_seed(0)
    model = Encoder(50, 16, 2, "softmax", num_classes=num_classes).eval()
    mask = torch.arange(17) < torch.tensor([[17], [9], [12]])
    changed = torch.where(mask, TOKENS, 0)
    kept = mask if num_classes is None else slice(None)
    torch.testing.assert_close(model(TOKENS, mask=mask)[kept], model(changed, mask=mask)[kept])
    alone = model(TOKENS[1:2, :9])
    together = model(TOKENS, mask=mask)[1:2]
    torch.testing.assert_close(alone, together if num_classes else together[:, :9], atol=1e-5, rtol=1e-5)
    last = TOKENS.clone()
    last[:, -1] = (last[:, -1] + 1) % 50
    assert not torch.allclose(model(last).flatten(1)[:, :4], model(TOKENS).flatten(1)[:, :4])


def test_no_mixer_leaves_tokens_alone():
    model, other = small("none"), TOKENS.clone()
    other[:, 0] = (other[:, 0] + 1) % 50
    assert torch.equal(model(TOKENS)[:, 1:], model(other)[:, 1:])


def test_what_layers_add_is_seen_by_the_innermost_collection_alone():
    add_auxiliary(torch.tensor(1.0), "a loss", "loss=0")
    with collect_auxiliary() as outer:
        with collect_auxiliary() as inner:
            add_auxiliary(torch.tensor(2.0), "a loss", "loss=0")
        add_auxiliary(torch.tensor(3.0), "a loss", "loss=0")
    assert [loss.item() for loss in inner] == [2] and [loss.item() for loss in outer] == [3]


@pytest.mark.parametrize("mixer", ["softmax", "window"])
@pytest.mark.parametrize(
    ("mask", "came"),
    [
        (torch.ones(3, 16, dtype=torch.bool), r"got bool of shape \(3, 16\)"),
        (torch.ones(17, dtype=torch.bool), r"got bool of shape \(17,\)"),
        (torch.ones(3, 17), r"got float32 of shape \(3, 17\)"),
    ],
)
def test_a_mask_of_other_tokens_is_refused(untyped, mixer, mask, came):
    says = rf"mask must be bool of shape \(batch, tokens\) = \(3, 17\), True where a token may be attended, {came}"
    with pytest.raises(ValueError, match=says):
        small(mixer)(TOKENS, mask=mask)
    with pytest.raises(ValueError, match=says):
        mixer_called(mixer)(16)(torch.zeros(3, 17, 16), mask=mask)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: mixer_called("softmx"), "no token-mixer is called 'softmx', did you mean 'softmax'"),
        (lambda: mixers_called("softmax,,window"), "names between commas"),
        (lambda: mixers_called("softmax", window=3), "none of softmax takes the option 'window'"),
        (lambda: CausalLM(50, 16, 2, []), "list of mixers is empty"),
        (lambda: CausalLM(0, 16, 2, "softmax"), "vocab must be at least 1, got 0"),
        (lambda: CausalLM(50, 16, 2, "softmax", norm="batch"), "norm must be one of rms, layer, got 'batch'"),
        (lambda: CausalLM(50, 16, 2, "softmax", positions="learned"), "need max_length"),
        (lambda: small(max_length=8)(TOKENS), "17 tokens, more than max_length=8"),
        (lambda: list(small().generate(TOKENS[:, :0], 3)), "the sequence has no token"),
        (lambda: small("window")(TOKENS[:, :0]), "the sequence has no token"),
        (lambda: sample(torch.zeros(1, 3), top_p=0), "top_p must lie in"),
        (lambda: sample(torch.zeros(1, 3), temperature=float("nan")), "temperature must be finite and not negative"),
        (lambda: next(small(max_length=20).generate(TOKENS, 5)), "17 tokens and 5 more are longer than max_length=20"),
        (lambda: small(hiden=3), "hiden"),
        (lambda: CausalLM(50, 18, 2, "softmax"), "heads must divide dim"),
        (lambda: CausalLM(50, 16, 2, ""), "names between commas"),
        (lambda: small(lambda dim: torch.nn.Identity()).init_state(1), "Identity cannot stream"),
    ],
)
def test_bad_arguments_are_refused(attempt, message):
    with pytest.raises((ValueError, TypeError, UserError), match=message):
        attempt()


def test_the_older_encoder_takes_the_same_factories():
    assert TransformerEncoder(16, mixer_called("window"), layers=1)(torch.zeros(1, 3, 16)).shape == (1, 3, 16)
