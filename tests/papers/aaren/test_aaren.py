"""Properties of Aaren: attention over prefixes, streamed in constant memory, with D parameters more."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from provenn.catalog import Experiment
from provenn.core.cost import count_parameters, flops, growth
from provenn.core.errors import UserError
from provenn.evidence import Run
from provenn.evidence.run import run_to_end
from provenn.evidence.verdict import decide
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.positions import sinusoidal_encoding
from provenn.nn.streaming import TensorStep, load_state, map_state, save_state, select_state, state_bytes
from provenn.nn.transformer import TransformerEncoder
from provenn.ops.prefix_scan_attention import PrefixState, prefix_scan_attention, recurrent_attention
from provenn.papers.aaren import (
    AarenAttention,
    AarenEncoder,
    AarenEncoderLayer,
    DecisionTransformer,
    EventForecaster,
    Forecaster,
    SeriesClassifier,
    aaren_d512,
    attention_rnn,
    experiments,
    transformer_d512,
)
from provenn.papers.aaren.model import MIXERS, causal_encoder
from provenn.papers.aaren.studies import events_of, from_windows, patched, study, together
from provenn.papers.residual_depth import ResidualTower, residual_expansion
from provenn.tasks import TaskData
from provenn.training import Fit, Recipe
from streams import fold

mixers = pytest.mark.parametrize("mixer", MIXERS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def plain_aaren(layer: AarenAttention, x):
    """The layer by its formula: a key for every token, a softmax over every prefix."""
    heads, p = layer.heads, layer.dim // layer.heads
    q = layer.query(layer.token).view(heads, p)
    k, v = (m(x).unflatten(-1, (heads, p)).transpose(1, 2) for m in (layer.key, layer.value))
    scores = (k @ q.unsqueeze(-1)).squeeze(-1) / math.sqrt(p)
    prefixes = [(scores[..., :i].softmax(-1).unsqueeze(-2) @ v[:, :, :i]).squeeze(-2) for i in range(1, x.shape[1] + 1)]
    return layer.out(torch.stack(prefixes, dim=2).transpose(1, 2).flatten(2))


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 90), heads=st.sampled_from([1, 2, 4]), std=st.sampled_from([1, 30])
)
def test_layer_equals_softmax_attention_with_a_learned_query(batch, tokens, heads, std):
    layer = AarenAttention(8, heads).double()
    nn.init.normal_(layer.token, std=std)
    x = torch.randn(batch, tokens, 8, dtype=torch.float64, requires_grad=True)
    ours, plain = layer(x), plain_aaren(layer, x)
    assert (ours - plain).abs().max() <= 1e-12
    weight = torch.randn_like(ours)
    wanted = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), wanted), torch.autograd.grad((plain * weight).sum(), wanted)
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_first_output_is_the_first_value():
    layer = AarenAttention(8, 2)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x)[:, 0], layer.out(layer.value(x[:, 0])))


@mixers
def test_later_tokens_change_nothing_before_them(mixer):
    encoder = causal_encoder(mixer, 16, 4, layers=2, feedforward=32, dropout=0.0).eval()
    x = torch.randn(2, 40, 16)
    changed = x.clone()
    changed[:, 25:] = torch.randn(2, 15, 16)
    torch.testing.assert_close(encoder(x)[:, :25], encoder(changed)[:, :25])
    assert (encoder(x)[:, 25] - encoder(changed)[:, 25]).abs().max() > 1e-3


@mixers
@settings(deadline=None, max_examples=15)
@given(tokens=st.integers(2, 50), data=st.data())
def test_forward_is_the_fold_of_step_and_prefill_goes_between(mixer, tokens, data):
    cut = data.draw(st.integers(1, tokens - 1))
    encoder = causal_encoder(mixer, 8, 2, layers=2, feedforward=16, dropout=0.0).double().eval()
    x = torch.randn(3, tokens, 8, dtype=torch.float64)
    with torch.no_grad():
        whole = encoder(x)
        torch.testing.assert_close(fold(encoder, x)[0], whole)
        first, state = encoder.prefill(x[:, :cut])
        torch.testing.assert_close(first, whole[:, :cut])
        torch.testing.assert_close(fold(encoder, x[:, cut:], state)[0], whole[:, cut:])
        _, state = encoder.prefill(x[:, :cut])
        torch.testing.assert_close(encoder.prefill(x[:, cut:], state)[0], whole[:, cut:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_the_backward_pass_outside(dtype):
    """Forward under autocast, backward after it, as PyTorch, Lightning and Hugging Face do it."""
    encoder, x = AarenEncoder(16, 4, layers=2, feedforward=32).eval(), torch.randn(2, 70, 16)
    with torch.autocast("cpu", dtype):
        loss = encoder(x).float().square().mean()
    mixed = torch.autograd.grad(loss, list(encoder.parameters()))
    full = torch.autograd.grad(encoder(x).square().mean(), list(encoder.parameters()))
    near, far = (torch.cat([gradient.flatten() for gradient in part]) for part in (mixed, full))
    assert torch.cosine_similarity(near, far, dim=0) > 0.99


def test_second_derivatives_are_those_of_softmax_attention():
    layer = AarenAttention(4, 2).double()
    nn.init.normal_(layer.token)
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    ours, plain = (
        torch.autograd.functional.hessian(lambda x, form=form: form(x).square().sum(), x)
        for form in (layer, lambda x: plain_aaren(layer, x))
    )
    assert plain.abs().max() > 0.01
    torch.testing.assert_close(ours, plain)


def test_gradients_of_each_example_by_functional_transforms():
    layer = AarenAttention(8, 2).double()
    x, weights = torch.randn(3, 20, 8, dtype=torch.float64), dict(layer.named_parameters())

    def loss(weights, one):
        return torch.func.functional_call(layer, weights, (one[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for i in range(3):
        for name, gradient in torch.func.grad(loss)(weights, x[i]).items():
            torch.testing.assert_close(together[name][i], gradient)
        alone = torch.autograd.grad(plain_aaren(layer, x[i : i + 1]).square().sum(), list(weights.values()))
        for name, gradient in zip(weights, alone):
            torch.testing.assert_close(together[name][i], gradient, rtol=1e-9, atol=1e-9)


def test_a_tower_of_aaren_layers_is_expanded_level_by_level():
    """T_n = x + λ Σ F_i + λ² Σ F_j' F_i + …: levels from a formula of the layer that is its own, without the scan."""
    layers = [AarenAttention(8, 2).double() for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.token, std=2)

    class Plain(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return plain_aaren(self.layer, x)

    x = torch.randn(2, 40, 8, dtype=torch.float64)
    ours, plain = (
        residual_expansion(ResidualTower(blocks, dim=8), x, order=2) for blocks in (layers, map(Plain, layers))
    )
    for level, expected in zip(ours.levels, plain.levels, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(level, expected)
    first, second = ours.remainders()[1:]
    assert second < first < ours.remainders()[0]


def test_streaming_trains_as_the_scan_does():
    layer = AarenAttention(8, 2).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    weight = torch.randn(2, 12, 8, dtype=torch.float64)
    scan = torch.autograd.grad((layer(x) * weight).sum(), list(layer.parameters()))
    stream = torch.autograd.grad((fold(layer, x)[0] * weight).sum(), list(layer.parameters()))
    for a, b in zip(scan, stream):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_tokens_of_another_width_are_refused(untyped):
    mixer = AarenAttention(8, 2)
    with pytest.raises(ValueError, match=r"expected \(batch, tokens, 8\) with at least one token, got \(3, 8\)"):
        mixer(torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"mask must be bool .* got int64 of"):
        mixer(torch.randn(2, 3, 8), mask=torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected one token a stream, \(batch, 8\), got \(1, 7\)"):
        mixer.step(torch.randn(1, 7), mixer.init_state(1))


def test_the_query_starts_as_an_embedding_of_a_token_does():
    token = AarenAttention(4096, 2).token
    assert token.std().item() == pytest.approx(0.02, rel=0.05) and abs(token.mean().item()) < 0.002


def test_the_key_bias_is_a_dead_parameter():
    layer = AarenAttention(8, 2).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    before = layer(x)
    (gradient,) = torch.autograd.grad(before.square().sum(), [layer.key.bias])
    with torch.no_grad():
        layer.key.bias += 10 * torch.randn(8)
    torch.testing.assert_close(layer(x), before)
    assert gradient.abs().max() < 1e-12


@mixers
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_masked_tokens_are_as_if_they_were_not_there(mixer, side):
    layer = MIXERS[mixer](8, 2).double()
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[:, {"left": slice(0, 7), "right": slice(13, None), "holes": slice(5, None, 3)}[side]] = False
    outputs = layer(x, mask=mask)
    torch.testing.assert_close(outputs[mask].view(2, -1, 8), layer(x[mask].view(2, -1, 8)))
    assert outputs.isfinite().all()


def test_prefill_takes_streams_of_different_lengths():
    layer = AarenAttention(8, 2).double()
    x, lengths = torch.randn(3, 10, 8, dtype=torch.float64), [10, 4, 7]
    mask = torch.arange(10) < torch.tensor(lengths).unsqueeze(1)
    _, together = layer.prefill(x, mask=mask)
    for i, length in enumerate(lengths):
        _, alone = layer.prefill(x[i : i + 1, :length])
        torch.testing.assert_close(select_state(together, i), alone)


def test_the_recurrence_with_token_queries_is_causal_self_attention():
    q, k, v = (torch.randn(2, 3, 17, 4, dtype=torch.float64) for _ in range(3))
    state, outputs = None, []
    for t in range(17):
        # Query j belongs to token j, so it attends token t only from t = j back.
        mask = (torch.arange(17) >= t).view(17, 1).expand(2, 3, 17, 1)
        outputs, state = attention_rnn(q, k[:, :, t : t + 1], v[:, :, t : t + 1], state, mask=mask)
    defined = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(outputs, defined, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [1, 4, 17])
def test_the_recurrence_with_latent_queries_is_cross_attention(block):
    latents = torch.randn(2, 5, 4, dtype=torch.float64)
    k, v = torch.randn(2, 17, 4, dtype=torch.float64), torch.randn(2, 17, 6, dtype=torch.float64)
    state = None
    for start in range(0, 17, block):
        outputs, state = attention_rnn(latents, k[:, start : start + block], v[:, start : start + block], state)
    defined = nn.functional.scaled_dot_product_attention(latents, k, v)
    torch.testing.assert_close(outputs, defined, rtol=0, atol=1e-12)


def test_the_recurrence_keeps_its_sums_in_float32_and_answers_in_the_type_of_its_values():
    q, k, v = (torch.randn(2, 3, 8).bfloat16() for _ in range(3))
    outputs, state = attention_rnn(q, k, v)
    assert outputs.dtype == torch.bfloat16 and {part.dtype for part in state} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            outputs, state = attention_rnn(q, k, v, state)
    assert outputs.dtype == torch.bfloat16 and {part.dtype for part in state} == {torch.float32}


def test_published_parameter_counts():
    aaren, transformer = count_parameters(aaren_d512()), count_parameters(transformer_d512())
    assert (aaren, transformer, aaren - transformer) == (3_152_896, 3_152_384, 512)
    assert count_parameters(nn.TransformerEncoderLayer(512, 8, 2048)) == transformer
    options = {"channels": 12, "num_classes": 9, "length": 29}
    assert count_parameters(SeriesClassifier(**options, mixer="softmax")) == 68_361
    assert count_parameters(SeriesClassifier(**options)) == 68_489


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_holds_the_same_bytes_after_any_number_of_tokens(dtype):
    dim, heads, layers = 16, 4, 3
    encoder = AarenEncoder(dim, heads, layers=layers, feedforward=32).to(dtype).eval()
    with torch.no_grad():
        for tokens in (1, 7, 200):
            _, state = encoder.prefill(torch.randn(1, tokens, dim, dtype=dtype))
            assert state.nbytes == state_bytes(state) == layers * 4 * (2 * heads + dim)


def test_a_hundred_thousand_tokens_stream_without_growth():
    model = SeriesClassifier(channels=1, num_classes=2, length=100_000, dim=4, heads=2, layers=1, feedforward=4).eval()
    x = torch.randn(1, 100_000, 1)
    with torch.inference_mode():
        _, state = model.step(x[:, 0], model.init_state(1))
        held = state_bytes(state)
        # Most of the way by prefill, so that the test is quick; the state is the same thing.
        hidden = model.embed(x[:, 1:99_900]) + sinusoidal_encoding(torch.arange(1, 99_900), 4)
        hidden, encoder = model.encoder.prefill(hidden, state.encoder)
        mean = state.mean + (hidden - state.mean.unsqueeze(1)).sum(1) / 99_900
        state = type(state)(encoder, state.position + 99_899, mean)
        for t in range(99_900, 100_000):
            logits, state = model.step(x[:, t], state)
        assert state_bytes(state) == held
        torch.testing.assert_close(logits, model(x), rtol=1e-3, atol=1e-4)


def test_a_key_value_cache_grows_with_the_tokens():
    encoder = TransformerEncoder(16, lambda dim: SoftmaxAttention(dim, 4), layers=2, feedforward=32).eval()
    with torch.no_grad():
        sizes = [encoder.prefill(torch.randn(1, n, 16))[1].nbytes for n in (10, 20, 40)]
    assert sizes == [2 * 2 * 16 * 4 * n for n in (10, 20, 40)]


def test_work_is_linear_in_the_tokens_where_softmax_attention_is_quadratic():
    sizes = [1024, 2048, 4096, 8192]
    work = {}
    for name, mixer in MIXERS.items():
        layer = mixer(8, 2).eval()
        with torch.no_grad():
            work[name] = [flops(lambda n=n, layer=layer: layer(torch.randn(1, n, 8))) for n in sizes]
    assert growth(sizes, work["aaren"]).exponent == pytest.approx(1, abs=0.02)
    assert growth(sizes, work["softmax"]).exponent > 1.9


@mixers
def test_states_are_selected_saved_and_loaded(mixer, tmp_path):
    encoder = causal_encoder(mixer, 8, 2, layers=2, feedforward=16, dropout=0.0).eval()
    x = torch.randn(4, 9, 8)
    with torch.no_grad():
        _, state = encoder.prefill(x)
        save_state(state, tmp_path / "state.safetensors")
        again = load_state(encoder.init_state(1), tmp_path / "state.safetensors")
        next_token = torch.randn(4, 8)
        expected, _ = encoder.step(next_token, map_state(torch.clone, state))
        torch.testing.assert_close(encoder.step(next_token, again)[0], expected)
        for index in (2, [0, 3], slice(1, 3), torch.tensor([True, False, False, True])):
            some = next_token[[index] if isinstance(index, int) else index]
            part = [index] if isinstance(index, int) else index
            torch.testing.assert_close(encoder.step(some, select_state(state, index))[0], expected[part])


def test_the_state_of_another_model_is_refused(tmp_path):
    one, two = AarenEncoder(8, 2, layers=1, feedforward=8), AarenEncoder(8, 2, layers=2, feedforward=8)
    save_state(one.init_state(1), tmp_path / "state.safetensors")
    with pytest.raises(UserError, match="another model"):
        load_state(two.init_state(1), tmp_path / "state.safetensors")


def test_a_model_of_single_layers_equals_the_stack():
    encoder = AarenEncoder(8, 2, layers=1, feedforward=16).eval()
    layer = AarenEncoderLayer(8, 2, feedforward=16).eval()
    layer.load_state_dict(encoder.layers[0].state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x), encoder(x))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_host_with_softmax_is_the_stock_encoder_layer_and_converts(activation):
    stock = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, activation=activation, batch_first=True, dropout=0.0),
        num_layers=2,
        enable_nested_tensor=False,
    ).double()
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    aaren = AarenEncoder.from_transformer(stock)
    ours = TransformerEncoder(16, lambda dim: SoftmaxAttention(dim, 4), layers=2, feedforward=32, activation=activation)
    weights = {name: value for name, value in aaren.state_dict().items() if not name.endswith("token")}
    ours.double().eval().load_state_dict(weights)
    causal = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    torch.testing.assert_close(ours(x), stock(x, mask=causal, is_causal=True))
    again = AarenEncoder.from_transformer(ours)
    assert set(again.state_dict()) == set(aaren.state_dict())
    assert count_parameters(again) == count_parameters(ours) + 2 * 16
    assert all(torch.equal(again.state_dict()[name], value) for name, value in weights.items())
    again.load_state_dict(aaren.state_dict())
    torch.testing.assert_close(again.eval()(x), aaren.eval()(x))


def test_conversion_keeps_float64_to_the_last_bit():
    attention = SoftmaxAttention(8, 2).double()
    stock = nn.MultiheadAttention(8, 2).double()
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    for module in (attention, stock, layer):
        for parameter in module.parameters():
            nn.init.normal_(parameter)  # with digits that float32 does not hold
    converted = AarenAttention.from_softmax(attention)
    assert all(torch.equal(converted.state_dict()[name], value) for name, value in attention.state_dict().items())
    converted = AarenAttention.from_softmax(stock)
    thirds = [converted.query, converted.key, converted.value]
    assert torch.equal(torch.cat([linear.weight for linear in thirds]), stock.in_proj_weight)
    assert torch.equal(torch.cat([linear.bias for linear in thirds]), stock.in_proj_bias)
    assert torch.equal(converted.out.weight, stock.out_proj.weight)
    encoder = AarenEncoder.from_transformer(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    for name in ("linear1", "linear2", "norm1", "norm2"):
        kept, given = (model.get_submodule(name).state_dict() for model in (encoder.layers[0], layer))
        assert all(torch.equal(kept[key], given[key]) for key in given)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float64}


@pytest.mark.parametrize("training", [True, False])
def test_a_converted_encoder_keeps_its_epsilon_and_its_mode(training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, layer_norm_eps=0.1)
    stock = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).train(training)
    aaren = AarenEncoder.from_transformer(stock)
    assert aaren.layers[0].norm1.eps == aaren.layers[0].norm2.eps == 0.1
    ours = TransformerEncoder(8, lambda dim: SoftmaxAttention(dim, 2), layers=1, feedforward=16).train(training)
    for converted in (aaren, AarenEncoder.from_transformer(ours)):
        assert {module.training for module in converted.modules()} == {training}


def test_encoders_of_another_form_are_not_converted():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    with pytest.raises(ValueError, match="norm_first"):
        AarenEncoder.from_transformer(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, bias=False)
    with pytest.raises(ValueError, match="biases"):
        AarenEncoder.from_transformer(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    with pytest.raises(ValueError, match="final norm"):
        AarenEncoder.from_transformer(nn.TransformerEncoder(layer, 1, nn.LayerNorm(16), enable_nested_tensor=False))
    for options in ({"bias": False}, {"rotary": True}):
        with pytest.raises(ValueError, match="biases and no rotary positions"):
            AarenAttention.from_softmax(SoftmaxAttention(16, 4, **options))


def test_bfloat16_stays_close_to_float32():
    encoder = AarenEncoder(32, 4, layers=2, feedforward=64).eval()
    x = torch.randn(2, 300, 32)
    low = copy.deepcopy(encoder).bfloat16()
    assert (low(x.bfloat16()).float() - encoder(x)).abs().mean() < 0.03


def test_compiles_exports_and_travels(untyped):
    encoder = AarenEncoder(8, 2, layers=2, feedforward=16).eval()
    x = torch.randn(2, 70, 8)
    torch.testing.assert_close(torch.export.export(encoder, (x,)).module()(x), encoder(x))

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x_t, state):
            return self.encoder.step(x_t, state)

    state = encoder.init_state(2)
    exported = torch.export.export(Step(), (x[:, 0], state)).module()
    for t in range(5):
        (ours, ours_state), (y, state) = exported(x[:, t], state), encoder.step(x[:, t], state)
        torch.testing.assert_close(ours, y)
        torch.testing.assert_close(ours_state, state)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    ours = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    encoder(x).sum().backward()
    for a, b in zip(ours, encoder.parameters()):
        torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-5)
    buffer = io.BytesIO()
    torch.save(encoder, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), encoder(x))


@pytest.mark.parametrize(
    ("model", "token"),
    [
        (AarenEncoder(8, 2, layers=2, feedforward=16), lambda batch: [torch.randn(batch, 8)]),
        (SeriesClassifier(3, 4, 30, dim=16, heads=2), lambda batch: [torch.randn(batch, 3)]),
        (EventForecaster(3, dim=16, heads=2), lambda batch: [torch.rand(batch), torch.randint(3, (batch,))]),
    ],
    ids=["encoder", "classifier", "events"],
)
def test_a_stream_goes_on_in_an_exported_file_for_any_batch(model, token, tmp_path, untyped):
    step = TensorStep(model.eval())
    first, state = token(2), step.init_state(2)
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in first), [{0: batch} for _ in state]
    program = torch.export.export(step, (*first, state), dynamic_shapes={"inputs": (*shapes[0], shapes[1])})
    torch.export.save(program, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    for streams in (2, 5):
        exported, ours = step.init_state(streams), model.init_state(streams)
        for _ in range(4):
            now = token(streams)
            (y, exported), (expected, ours) = loaded(*now, exported), model.step(*now, ours)
            torch.testing.assert_close(y, tuple(expected) if isinstance(expected, tuple) else expected)
        assert sum(part.nbytes for part in exported) == state_bytes(ours)


def test_a_growing_cache_is_not_exported():
    with pytest.raises(ValueError, match="state is tensors alone, TransformerEncoder keeps more"):
        TensorStep(causal_encoder("softmax", 8, 2, layers=1, feedforward=8, dropout=0.0))


def test_patches_keep_every_step_of_a_series():
    x = torch.arange(2 * 10 * 3.0).view(2, 10, 3)
    part = TensorDataset(x, torch.full((2,), 10), torch.tensor([0, 1]))
    options = {"channels": 3, "num_classes": 2, "length": 10}
    cut = patched(TaskData("series", part, part, part, "", options), most=4)
    tokens, lengths, classes = cut.test.tensors
    assert cut.options == {"channels": 9, "num_classes": 2, "length": 4} and tokens.shape == (2, 4, 9)
    assert torch.equal(tokens.view(2, 12, 3)[:, :10], x) and not tokens.view(2, 12, 3)[:, 10:].any()
    assert lengths.tolist() == [4, 4] and classes.tolist() == [0, 1]
    whole = patched(cut, most=4)
    assert torch.equal(whole.train.tensors[0], tokens) and whole.options == cut.options


def taught(value):
    """Trainings are not run: what one would have found is `value` of the mixer, the rate and the seed."""
    seen = []

    def trained(build, task, data, recipe, *, seed, hardware, title):
        model = build()
        kind = type(model.encoder.layers[0].mixer)
        seen.append(
            (kind, recipe.lr, seed, count_parameters(model), (task.name, data.fingerprint, replace(recipe, lr=1)))
        )
        return Fit(nn.Identity(), value(title, recipe.lr, seed), [])

    return trained, seen


def stand_in(name, process, value):
    trained, seen = taught(lambda label, lr, seed: {"nll": value(label, seed)})
    recipe = Recipe(epochs=1, max_steps=1)
    more = {"recipe": recipe, "trained": trained, "note": "As told."}
    return study(name, "event-forecasting", EventForecaster, events_of(process), **more), seen


def test_the_sides_of_a_study_differ_in_their_attention_alone(tmp_path):
    events, seen = stand_in("hawkes", "hawkes", lambda label, seed: {"Aaren": 1.0, "Transformer": 1.5}[label] + seed)
    found = run_to_end(events.against("aaren", "softmax")(Run("aaren", tmp_path, budget="smoke", seeds=(7, 8))))
    kinds = [kind for kind, *_ in seen]
    assert kinds == 2 * [AarenAttention] + 2 * [SoftmaxAttention]
    assert [seed for _, _, seed, *_ in seen] == [7, 8, 7, 8]
    assert seen[0][3] - seen[2][3] == 2 * 32, "a query of width 32 in each of two layers is all that is added"
    assert [alike for *_, alike in seen] == 4 * [seen[0][4]], "task, data and recipe"
    assert found.values == [8.0, 9.0] and found.baselines == [8.5, 9.5] and found.effect == -0.5
    assert found.sides == ("Aaren", "Transformer")


def test_several_data_sets_are_one_mean_a_seed_and_each_must_be_learned(tmp_path):
    """On the second set Aaren guesses: the mean looks fine and is not to be trusted."""
    one, _ = stand_in("hawkes", "hawkes", lambda label, seed: 1.0 + seed / 100 + (label == "Aaren") / 10)
    guess = one.of_task.dummy_baseline(events_of("sine")(0, False))
    two, _ = stand_in("sine", "sine", lambda label, seed: guess + seed / 1000 if label == "Aaren" else 0.5)
    run = Run("aaren", tmp_path, budget="small", seeds=(1, 2, 3))
    found, scaled = run_to_end(together([one, two])(run)), run_to_end(together([one, two], ratio=True)(run))
    assert found.values == pytest.approx([(1.1 + s / 100 + guess + s / 1000) / 2 for s in (1, 2, 3)])
    assert found.baselines == pytest.approx([(1.0 + s / 100 + 0.5) / 2 for s in (1, 2, 3)])
    assert scaled.values == pytest.approx([math.sqrt((1.1 + s / 100) * (guess + s / 1000)) for s in (1, 2, 3)])
    assert scaled.kind_of_effect == "ratio" and [row[0] for row in found.tables[0].rows] == ["hawkes", "sine"]
    said = Experiment(id="x", kind="quality", says="", expects={"within": (-9, 9)}, why="any", sides=found.sides)
    assert set(found.setting["lr"]) == {f"{label} on {name}" for label in found.sides for name in ("hawkes", "sine")}
    assert found.setting["train"] == {"hawkes": 400, "sine": 400}
    verdict, reason = decide(said, found)
    assert verdict.value == "not measured" and "Aaren on sine" in reason and "hawkes" not in reason
    assert found.note == "hawkes: As told. sine: As told."
    good, _ = stand_in("good", "sine", lambda label, seed: 0.5 + seed / 100)
    assert decide(said, run_to_end(together([one, good])(run)))[0].value == "supported"


def test_a_policy_is_played_from_windows_with_the_same_weights(monkeypatch):
    data = experiments.PENDULUM.data(0, True)
    model = experiments.PENDULUM.build("aaren", **data.options)
    with torch.no_grad():
        nn.init.normal_(model.head.weight, std=5)
        played = []
        evaluate = type(experiments.PENDULUM.of_task).evaluate

        def spy(self, model, episodes, batch_size=256):
            played.append((episodes.setting.streaming, episodes.setting.context, episodes.seeds, episodes.targets))
            return evaluate(self, model, episodes)

        monkeypatch.setattr(type(experiments.PENDULUM.of_task), "evaluate", spy)
        assert from_windows(model.eval(), data) < 0
    assert played == [(False, 20, data.test.seeds, data.test.targets)] and data.test.setting.streaming


@pytest.mark.parametrize("tokens", [512, 4096])
def test_the_states_whose_cost_is_counted_are_those_of_streams(tokens):
    x = torch.randn(1, tokens, 64)
    for label, mixer in experiments.STREAMS.items():
        counted = experiments.STEP_BYTES.runners[label](tokens, "cpu")()
        if mixer == "lstm":
            assert counted == 2 * 64 * 4
            continue
        encoder = causal_encoder(mixer, 64, 4, layers=1, feedforward=128, dropout=0.0).eval()
        with torch.no_grad():
            assert counted == state_bytes(encoder.prefill(x)[1])


def test_the_printed_start_of_the_recurrence_underflows_where_ours_does_not():
    """At (0, 0, 0) scores of -200 give 0/0 in float32."""
    s, v = torch.full((1, 50), -200.0), torch.randn(1, 50, 4)
    printed = PrefixState(torch.zeros(1), torch.zeros(1), torch.zeros(1, 4))
    after = recurrent_attention(s, v, state=printed)[1]
    assert after.u.item() == 0 and not after.w.any()
    torch.testing.assert_close(prefix_scan_attention(s, v)[0], v.cumsum(1) / torch.arange(1, 51).view(-1, 1))


def classifier(mixer):
    return SeriesClassifier(channels=3, num_classes=4, length=30, dim=16, heads=2, mixer=mixer).double().eval()


@mixers
def test_classifier_ignores_padding_and_streams(mixer):
    model = classifier(mixer)
    x = torch.randn(3, 30, 3, dtype=torch.float64)
    lengths = torch.tensor([30, 11, 1])
    mask = torch.arange(30) < lengths.unsqueeze(1)
    with torch.no_grad():
        logits = model(x.masked_fill(~mask.unsqueeze(-1), torch.nan), mask)
        for i, length in enumerate(lengths):
            alone = x[i : i + 1, :length]
            torch.testing.assert_close(model(alone), logits[i : i + 1])
            torch.testing.assert_close(
                model(torch.cat([x[:1, :5], alone], 1), torch.arange(5 + length)[None] >= 5)
                if length < 20
                else model(alone),
                logits[i : i + 1],
            )
            torch.testing.assert_close(fold(model, alone)[0][:, -1], logits[i : i + 1])
    with pytest.raises(ValueError, match="length=30"):
        model(torch.randn(1, 31, 3, dtype=torch.float64))


@mixers
def test_forecaster_lives_on_the_windows_own_scale_and_streams(mixer):
    model = Forecaster(channels=2, context=20, horizon=5, dim=16, heads=2, mixer=mixer).double().eval()
    x = torch.randn(3, 20, 2, dtype=torch.float64)
    with torch.no_grad():
        forecast = model(x)
        assert forecast.shape == (3, 5, 2)
        scale, shift = torch.tensor([3.0, 0.2]).double(), torch.tensor([-4.0, 100.0]).double()
        torch.testing.assert_close(model(x * scale + shift), forecast * scale + shift)
        assert model(torch.full((1, 20, 2), 7.0).double()).isfinite().all()
        first, state = model.prefill(x)
        torch.testing.assert_close(first, forecast)
        more = torch.randn(3, 4, 2, dtype=torch.float64)
        forecasts, _ = fold(model, more, state)
        # A stream goes on with the statistics of its first context: the stack read over the whole, on that scale.
        mean, std = x.mean(1, keepdim=True), x.std(1, correction=0, keepdim=True)
        whole = model.embed((torch.cat([x, more], 1) - mean) / std) + sinusoidal_encoding(torch.arange(24), 16)
        expected = model.head(model.encoder(whole)[:, -1]).view(3, 5, 2) * std + mean
        torch.testing.assert_close(forecasts[:, -1], expected)
    with pytest.raises(ValueError, match="context=20"):
        model(x[:, 1:])


@mixers
def test_event_model_is_a_distribution_and_streams(mixer):
    model = EventForecaster(marks=3, dim=16, heads=2, components=4, mixer=mixer).double().eval()
    gaps = torch.rand(2, 15, dtype=torch.float64) * 2
    marks = torch.randint(0, 3, (2, 15))
    with torch.no_grad():
        prediction = model(gaps, marks)
        log_gap = torch.linspace(-40, 40, 40_001, dtype=torch.float64)
        one = model(gaps[:1, :1], marks[:1, :1])
        wide = type(one)(*(part.expand(1, 40_001, -1) for part in one))
        density = (wide.log_prob_gap(log_gap.clamp_min(-13).exp()[None]) + log_gap).exp()[0, log_gap > -13]
        assert density.sum() * 80 / 40_000 == pytest.approx(1, abs=1e-3)
        sampled = torch.distributions.LogNormal(prediction.means, prediction.log_scales.exp()).mean
        torch.testing.assert_close(prediction.expected_gap, (prediction.log_weights.exp() * sampled).sum(-1))
        state = model.init_state(2)
        for i in range(15):
            step, state = model.step(gaps[:, i], marks[:, i], state)
            for streamed, parallel in zip(step, prediction):
                torch.testing.assert_close(streamed, parallel[:, i])
        mask = torch.arange(15).expand(2, 15) < torch.tensor([[15], [6]])
        padded = model(gaps.masked_fill(~mask, torch.nan), marks, mask)
        torch.testing.assert_close(padded.mark_logits[mask], prediction.mark_logits[mask])
    nll = -prediction.log_prob_gap(torch.zeros(2, 15, dtype=torch.float64))
    assert nll.isfinite().all()
    nn.init.normal_(model.mixture.weight, std=1e3)
    log_scales = model(gaps, marks).log_scales
    assert -5 <= log_scales.min() < -4 and 0 < log_scales.max() <= 1


@mixers
def test_decision_transformer_is_causal_and_streams(mixer):
    model = DecisionTransformer(state_dim=4, actions=2, max_length=50, dim=16, heads=2, mixer=mixer).double().eval()
    returns, states = torch.randn(2, 12, 1, dtype=torch.float64), torch.randn(2, 12, 4, dtype=torch.float64)
    actions, timesteps = torch.randint(0, 2, (2, 12)), torch.arange(12).expand(2, 12)
    with torch.no_grad():
        logits = model(returns, states, actions, timesteps)
        state = model.init_state(2)
        for t in range(12):
            step, state = model.step(returns[:, t], states[:, t], timesteps[:, t], state)
            torch.testing.assert_close(step, logits[:, t])
            state = model.act(actions[:, t], timesteps[:, t], state)
        other = actions.clone()
        other[:, 7:] = 1 - other[:, 7:]
        changed = model(returns, states, other, timesteps)
        torch.testing.assert_close(changed[:, :8], logits[:, :8])
        assert (changed[:, 8] - logits[:, 8]).abs().max() > 1e-4
        mask = torch.arange(17).expand(2, 17) >= 5
        padded = [
            torch.cat([torch.zeros(2, 5, *part.shape[2:]).to(part), part], 1)
            for part in (returns, states, actions, timesteps)
        ]
        torch.testing.assert_close(model(*padded, mask)[:, 5:], logits)


@mixers
def test_continuous_decisions_are_bounded_causal_and_stream(mixer):
    options = {"state_dim": 4, "actions": 3, "max_length": 50, "dim": 16, "heads": 2, "mixer": mixer}
    model = DecisionTransformer(**options, continuous=True).double().eval()
    returns, states = torch.randn(2, 12, 1, dtype=torch.float64), torch.randn(2, 12, 4, dtype=torch.float64)
    actions, timesteps = torch.rand(2, 12, 3, dtype=torch.float64) * 2 - 1, torch.arange(12).expand(2, 12)
    with torch.no_grad():
        answers = model(returns, states, actions, timesteps)
        state = model.init_state(2)
        for t in range(12):
            step, state = model.step(returns[:, t], states[:, t], timesteps[:, t], state)
            torch.testing.assert_close(step, answers[:, t])
            state = model.act(actions[:, t], timesteps[:, t], state)
        other = torch.cat([actions[:, :7], -actions[:, 7:]], 1)
        changed = model(returns, states, other, timesteps)
        torch.testing.assert_close(changed[:, :8], answers[:, :8])
        assert (changed[:, 8] - answers[:, 8]).abs().max() > 1e-4
        assert model(1e6 * returns, states, actions, timesteps).abs().max() <= 1
        model.head.weight *= 1e3
        assert model(returns, states, actions, timesteps).abs().max() <= 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AarenAttention(10, 4), "heads must divide dim"),
        (lambda: SoftmaxAttention(10, 0), "heads must divide dim"),
        (lambda: AarenAttention(8, 2, causal=False), "causal must be True"),
        (lambda: AarenEncoder(8, 2, layers=0), "layers must be at least 1"),
        (lambda: AarenEncoderLayer(8, 2, activation="tanh"), "activation must be one of"),
        (lambda: causal_encoder("lstm", 8, 2, layers=1, feedforward=8, dropout=0.0), "mixer must be one of"),
        (lambda: Forecaster(channels=1, context=1, horizon=3), "context must be at least 2"),
        (lambda: sinusoidal_encoding(torch.arange(3), 5), "dim must be even"),
        (lambda: SoftmaxAttention(8, 2, causal=False).prefill(torch.randn(1, 3, 8)), "cannot stream"),
    ],
)
def test_bad_arguments_are_refused_with_a_reason(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_stream_of_a_bfloat16_layer_keeps_its_sums_in_float32():
    layer = AarenAttention(8, 2).bfloat16()
    state = layer.init_state(batch=1)
    _, after = layer.step(torch.randn(1, 8, dtype=torch.bfloat16), state)
    assert {tensor.dtype for held in (state, after) for tensor in held} == {torch.float32}
