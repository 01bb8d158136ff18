"""What RCMHA promises: four attentions in one class, and segments that give what one pass gives."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import provenn
from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.evidence import Run
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.language import CausalLM
from provenn.nn.positions import shift_distances
from provenn.nn.streaming import state_bytes
from provenn.papers import rcmha
from provenn.papers.rcmha import (
    CharacterLM,
    HeadConvolution,
    RelativeConvAttention,
    SegmentMemory,
    experiments,
    mdha_char,
    mha_char,
    mha_small,
    rcmha_char,
    rcmha_small,
    rmha_char,
)
from provenn.papers.rcmha.bench import sweep
from provenn.papers.rcmha.inspection import inspect
from provenn.papers.rcmha.official import convert
from provenn.papers.rcmha.studies import (
    BACK,
    KINDS,
    LENGTH,
    MEMORIES,
    PARTS,
    SEGMENT,
    SYMBOLS,
    VARIANTS,
    bits_by_segments,
    chunking_cost,
    copy_data,
    kept,
    loss_rise,
    memory_gain,
    reader,
    saved_bytes,
    text,
)
from provenn.tasks.recall import IGNORED
from provenn.testing import seeded_array, seeded_state
from provenn.testing.golden import assert_values, drawn
from streams import fold

KIND_OPTIONS = {
    "rcmha": {},
    "rcmha, memory of 5": {"memory": 5},
    "rcmha, memory of none": {"memory": 0},
    "rcmha, kernel of 1": {"kernel": 1},
    "rcmha, kernel of 5": {"kernel": 5},
    "rcmha, keys alone": {"conv": "k"},
    "rcmha, kernels of each head's own": {"shared": False},
    "rmha": {"conv": ""},
    "mdha": {"relative": False},
    "mha": {"conv": "", "relative": False},
}
kinds = pytest.mark.parametrize("options", KIND_OPTIONS.values(), ids=KIND_OPTIONS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stirred(module):
    """In float64, with weights large enough that softmax is far from even."""
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def mixer(**options):
    return stirred(RelativeConvAttention(24, 4, **{"max_distance": 8, **options}))


def by_definition(layer, x):
    """Token by token and head by head, from the equations."""
    p, context = layer.dim // layer.heads, layer.kernel - 1
    parts = []
    for name, linear in {"query": layer.query, "key": layer.key, "value": layer.value}.items():
        part = linear(x).unflatten(-1, (layer.heads, p))
        if name in layer.conv:
            # (1 or heads, p, K) and (1 or heads, p): all heads' kernels, or each head's own.
            taps, bias = (t.unflatten(0, (-1, p)) for t in (layer.conv[name].weight[:, 0], layer.conv[name].bias))
            padded = torch.cat([torch.zeros(len(x), context, layer.heads, p).to(x), part], dim=1)
            part = bias + sum(taps[..., s] * padded[:, s : s + x.shape[1]] for s in range(layer.kernel))
        parts.append(part)
    q, k, v = parts
    rows = []
    for i in range(x.shape[1]):
        first = 0 if layer.memory is None else max(0, i - layer.memory)
        scores = []
        for j in range(first, i + 1):
            score = (q[:, i] * k[:, j]).sum(-1)
            if layer.relative:
                row = layer.max_distance - min(i - j, layer.max_distance - 1) - (0 if layer.future_rows else 1)
                score = score + (layer.content_bias * k[:, j]).sum(-1)
                score = score + (q[:, i] * layer.distance_keys[row]).sum(-1) + layer.distance_bias[row]
            scores.append(score / math.sqrt(p))
        weights = torch.stack(scores, dim=-1).softmax(-1)
        rows.append(torch.einsum("bhj,bjhp->bhp", weights, v[:, first : i + 1]).flatten(1))
    return layer.out(torch.stack(rows, dim=1))


@kinds
@pytest.mark.parametrize("future_rows", [True, False])
def test_outputs_and_gradients_are_what_the_equations_say(options, future_rows):
    layer = mixer(**options, future_rows=future_rows)
    x = torch.randn(2, 13, 24, dtype=torch.float64, requires_grad=True)
    ours, defined = layer(x), by_definition(layer, x)
    torch.testing.assert_close(ours, defined, rtol=0, atol=1e-12)
    leaves, weight = [x, *layer.parameters()], torch.randn_like(ours)
    slopes = [torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, defined)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(queries=st.integers(1, 7), past=st.integers(0, 6))
def test_the_shift_is_the_gathering_by_distance(queries, past):
    keys = queries + past
    by_distance = torch.randn(2, 3, queries, keys, dtype=torch.float64)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(past)
    distance = (past + torch.arange(queries)[:, None] - torch.arange(keys)).clamp_min(0)
    gathered = by_distance.gather(-1, distance.expand_as(by_distance))
    assert torch.equal(shift_distances(by_distance.flip(-1))[..., visible], gathered[..., visible])


def test_all_heads_share_a_kernel_and_it_looks_back():
    conv = HeadConvolution(6, 3).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    y = conv(x).unflatten(-1, (4, 6))
    swapped = conv(x.unflatten(-1, (4, 6)).flip(2).flatten(2)).unflatten(-1, (4, 6)).flip(2)
    torch.testing.assert_close(y, swapped)
    changed = x.clone()
    changed[:, 5:] += 1
    moved = (conv(changed).unflatten(-1, (4, 6)) - y).abs().amax((0, 2, 3))
    assert not moved[:5].any() and (moved[5:] > 1e-3).all()
    torch.testing.assert_close(y[:, 0], conv.bias + conv.weight[:, 0, -1] * x[:, 0].unflatten(-1, (4, 6)))


def test_plain_attention_is_softmax_attention():
    layer, plain = mixer(conv="", relative=False), SoftmaxAttention(24, 4).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_trained_layer_gets_convolutions_and_gives_what_it_gave(relative, kernel):
    trained, convolved = mixer(conv="", relative=relative), mixer(relative=relative, kernel=kernel)
    convolved.load_state_dict(trained.state_dict(), strict=False)
    for part in convolved.conv.values():
        part.start_as_identity()
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    torch.testing.assert_close(convolved(x), trained(x), rtol=0, atol=1e-13)


def test_zero_tables_and_biases_are_convolved_attention_alone():
    layer, mdha = mixer(), mixer(relative=False)
    for name in ("distance_keys", "distance_bias", "content_bias"):
        nn.init.zeros_(getattr(layer, name))
    mdha.load_state_dict(layer.state_dict(), strict=False)
    for linear in (mdha.query, mdha.key):
        nn.init.zeros_(linear.bias)
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), mdha(x))
    assert not RelativeConvAttention(24, 4).distance_keys.any(), "as the authors' code starts"


@kinds
@settings(deadline=None, max_examples=5)
@given(cuts=st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_pieces_and_steps_give_what_one_pass_gives_and_its_gradient(options, cuts):
    layer = mixer(**options)
    x = torch.randn(2, sum(cuts), 24, dtype=torch.float64, requires_grad=True)
    state, pieces = None, []
    for piece in x.split(cuts, dim=1):
        y, state = layer.prefill(piece, state)
        pieces.append(y)
    streamed = torch.cat(pieces, dim=1)
    torch.testing.assert_close(streamed, layer(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(fold(layer, x)[0], layer(x), rtol=0, atol=1e-12)
    weight = torch.randn_like(streamed)
    slopes = [torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (streamed, layer(x))]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_stream_with_a_memory_does_not_grow():
    layer = mixer(memory=5).float()
    with torch.no_grad():
        sizes = {state_bytes(layer.prefill(torch.randn(2, n, 24))[1]) for n in (5, 9, 70)}
    # Keys and values of 5 tokens, and queries, keys and values of 2 before the convolution.
    assert sizes == {4 * 2 * 24 * (2 * 5 + 3 * 2)}


def test_hidden_tokens_before_the_first_are_as_if_they_were_not_there():
    layer = mixer()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    spoiled = torch.cat([torch.full((2, 4, 24), torch.nan).double(), x], dim=1)
    mask = torch.arange(13).ge(4).expand(2, 13)
    torch.testing.assert_close(layer(spoiled, mask=mask)[:, 4:], layer(x))


def test_a_text_is_the_same_wherever_it_stands():
    """No absolute positions: with a memory of 4, two layers and kernels of 3, nothing reaches further than 12 back."""
    model = stirred(CharacterLM(20, dim=24, layers=2, heads=4, hidden=16, max_distance=8, memory=4))
    tokens = torch.randint(20, (1, 30))
    torch.testing.assert_close(model(tokens)[:, -5:], model(tokens[:, 13:])[:, -5:], rtol=0, atol=1e-12)


def test_distances_beyond_the_table_share_its_last_row():
    layer = mixer(max_distance=3)
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.distance_bias[0] += 5  # the distance 3 of 2 · 3 rows: never read
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        layer.distance_bias[1] += 5  # the distance 2, and all beyond
    assert not torch.allclose(layer(x)[:, 2:], before[:, 2:]) and torch.equal(layer(x)[:, :2], before[:, :2])


@pytest.mark.parametrize(
    "build, count", [(rcmha_char, 1180224), (rmha_char, 1180032), (mdha_char, 66240), (mha_char, 66048)]
)
def test_a_layer_has_as_many_parameters_as_the_authors(build, count):
    with torch.device("meta"):
        assert count_parameters(build(layers=1).blocks[0].mixer) == count


# The segment memory.


def language_model(**options):
    given = {"dim": 24, "layers": 2, "heads": 4, "hidden": 32, "max_distance": 8, **options}
    return stirred(CharacterLM(50, **given))


def in_segments(model, tokens, size):
    memory, read = None, []
    for piece in tokens.split(size, dim=1):
        logits, memory = model.read_segment(piece, memory)
        read.append(logits)
    return torch.cat(read, dim=1), memory


@pytest.mark.parametrize("kernel", [1, 3, 6])
@pytest.mark.parametrize("memory", [None, 0, 1, 9])
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_segments_are_one_pass(memory, size, kernel):
    model, tokens = language_model(memory=memory, kernel=kernel), torch.randint(50, (2, 23))
    read, after = in_segments(model, tokens, size)
    torch.testing.assert_close(read, model(tokens), rtol=0, atol=1e-10)
    assert after.seen == 23
    # The convolution of the first token that is seen takes in the tokens before it.
    assert {past.shape[1] for past in after.layers} == {23 if memory is None else memory + kernel - 1}


def test_sinusoidal_and_learned_positions_go_on_over_segments():
    for positions in ("learned", "sinusoidal"):
        model = language_model(relative=False, positions=positions, max_length=30)
        tokens = torch.randint(50, (2, 23))
        torch.testing.assert_close(in_segments(model, tokens, 5)[0], model(tokens), rtol=0, atol=1e-10)


def test_no_gradient_goes_into_the_memory_and_weights_learn_from_what_it_holds():
    model = language_model()
    _, memory = model.read_segment(torch.randint(50, (2, 6)))
    assert not any(past.requires_grad for past in memory.layers)
    logits, _ = model.read_segment(torch.randint(50, (2, 1)), memory)
    first = model.blocks[0].mixer
    (slope,) = torch.autograd.grad(logits.sum(), first.key.weight)
    # A single token without memory attends to itself alone, whatever its key.
    alone, _ = model.read_segment(torch.randint(50, (2, 1)))
    (none,) = torch.autograd.grad(alone.sum(), first.key.weight)
    assert slope.abs().max() > 1e-6 and none.abs().max() < 1e-12


def test_the_authors_cut_is_the_artefact_that_it_is():
    """Three tokens after three: the first two new positions differ from one pass, as the query begins anew."""
    exact, official = language_model(layers=1), language_model(layers=1, chunking="official")
    official.load_state_dict(exact.state_dict())
    tokens = torch.randint(50, (2, 6))
    difference = (in_segments(official, tokens, 3)[0] - exact(tokens)).abs().amax((0, 2))
    assert (difference[3:5] > 1e-3).all() and difference[[0, 1, 2, 5]].max() < 1e-12


@pytest.mark.parametrize("preset", ["rcmha_char", "rmha_char"])
def test_the_authors_loop_over_segments_has_their_values_and_gradients(preset):
    """Segments of 6 with a memory of 9: all logits, and gradients of embedding and first layer."""
    fixture = json.loads((Path(__file__).with_name("segments.json")).read_text())
    golden = json.loads((Path(__file__).with_name("golden.json")).read_text())
    case, expected = next(c for c in golden["cases"] if c["preset"] == preset), fixture["cases"][preset]
    state = seeded_state({name: tuple(shape) for name, shape in case["shapes"].items()}, case["seed"])
    _, options, weights = convert(state, memory=fixture["memory"])
    model = CharacterLM(**options, conv="qkv" if preset == "rcmha_char" else "", chunking="official").eval()
    model.load_state_dict(weights)
    logits, memory = in_segments(model, drawn(case["input"], 0), fixture["segment"])
    assert {past.shape[1] for past in memory.layers} == {fixture["memory"]}
    assert_values(logits, expected["output"])
    (logits * torch.from_numpy(seeded_array(logits.shape, "gradient", 0)).float()).sum().backward()
    # Their names to ours: the conversion itself, of a state that holds gradients.
    parameters = dict(model.named_parameters())
    marks = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(case["shapes"].items())}
    _, _, marked = convert(marks)
    ours = {int(value.flatten()[0]): name for name, value in marked.items()}
    places = {name: i for i, name in enumerate(case["shapes"])}
    assert len(expected["gradients"]) > 15
    for theirs, values in expected["gradients"].items():
        if ".key.1.conv.bias" not in theirs:  # rounding alone: see the next test
            assert_gradient(parameters[ours[places[theirs]]].grad, values, theirs)


def test_a_bias_of_the_keys_convolution_moves_nothing():
    """It adds (q + u)·a to all scores of a query, which the softmax cancels."""
    layer, x = mixer(), torch.randn(2, 11, 24, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.conv["key"].bias += 3
    torch.testing.assert_close(layer(x), before)


def assert_gradient(gradient, golden, name):
    assert list(gradient.shape) == golden["shape"], name
    values = torch.tensor(golden["value"], dtype=torch.float64)
    actual = gradient.flatten()[golden["index"]].double()
    size = gradient.square().mean().sqrt().item()
    torch.testing.assert_close(actual, values, rtol=2e-4, atol=2e-4 * size, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("chunking", ["exact", "official"])
@pytest.mark.parametrize("memory", [None, 0, 4])
def test_an_empty_memory_is_a_text_s_beginning(chunking, memory):
    model, tokens = language_model(memory=memory, chunking=chunking), torch.randint(50, (2, 5))
    empty = SegmentMemory(tuple(torch.zeros(2, 0, 24).double() for _ in range(2)), 0)
    torch.testing.assert_close(model.read_segment(tokens, empty)[0], model.read_segment(tokens)[0])


def test_training_in_segments_is_the_loss_of_the_segments():
    model = language_model(segment=5, memory=6)
    tokens, targets = torch.randint(50, (2, 2, 17))
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.training_loss((tokens, targets)).double(), loss, rtol=1e-6, atol=0)
    whole = language_model(memory=6)
    whole.load_state_dict(model.state_dict())
    slopes = [torch.autograd.grad(m.training_loss((tokens, targets)), m.head.weight)[0] for m in (model, whole)]
    torch.testing.assert_close(*slopes)
    slopes = [torch.autograd.grad(m.training_loss((tokens, targets)), m.embed.weight)[0] for m in (model, whole)]
    assert not torch.allclose(*slopes), "no gradient passes a cut"


def test_generation_with_a_state_is_that_of_whole_texts():
    model, prompt = language_model(), torch.randint(50, (1, 4))
    drawn_tokens = torch.stack(list(model.generate(prompt, 30, temperature=0)), dim=1)
    tokens = prompt
    with torch.no_grad():
        for _ in range(30):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(drawn_tokens, tokens[:, 4:])


# In the library.


def test_the_mixer_is_found_by_name_and_makes_a_language_model():
    model = CausalLM(vocab=50, dim=32, layers=2, mixer="rcmha,softmax")
    assert isinstance(model.blocks[0].mixer, RelativeConvAttention)
    assert model(torch.randint(50, (1, 700))).isfinite().all(), "longer than the table"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_with_large_scores(dtype):
    layer = RelativeConvAttention(32, 4, max_distance=16).to(dtype)
    x = (30 * torch.randn(2, 40, 32)).to(dtype).requires_grad_()
    y = layer(x)
    y.float().square().mean().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_how_far_heads_look_is_shown_by_distance():
    torch.manual_seed(0)
    model = rcmha_small(dim=16, layers=2, heads=2, hidden=16).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    tokens = torch.randint(256, (1, 9))
    rows = inspect(model, tokens)
    assert list(rows) == [f"blocks.{b}.mixer, head {h}" for b in (0, 1) for h in (1, 2)]
    block = model.blocks[0]
    weights = block.mixer.weights(block.norm1(model.embed(tokens)))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 9, dtype=torch.double))
    for head in (0, 1):
        means = torch.stack([weights[0, head].diagonal(-r).mean() for r in range(9)])
        torch.testing.assert_close(rows[f"blocks.0.mixer, head {head + 1}"], means)
    values = block.mixer._heads_of(block.norm1(model.embed(tokens)))[2]
    joined = block.mixer.out((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block.mixer(block.norm1(model.embed(tokens))), joined)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"conv": "qx"}, "letters q, k and v"),
        ({"conv": "qq"}, "at most once"),
        ({"kernel": 0}, "kernel must be at least 1"),
        ({"max_distance": 0}, "max_distance must be at least 1"),
        ({"memory": -1}, "memory must be at least 0"),
        ({"memory": True}, "memory must be a whole number"),
        ({"heads": 5}, "heads must divide dim"),
        ({"causal": False}, "causal must be True"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RelativeConvAttention(24, **{"heads": 4, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"segment": 0}, "segment must be at least 1"),
        ({"chunking": "none"}, "chunking must be one of exact, official"),
    ],
)
def test_bad_models_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CharacterLM(**options)


def test_foreign_states_and_memories_are_refused():
    model = language_model()
    tokens = torch.randint(50, (2, 5))
    _, memory = model.read_segment(tokens)
    with pytest.raises(ValueError, match="of 1 layers, the model has 2"):
        model.read_segment(tokens, SegmentMemory(memory.layers[:1], 5))
    for other in (tokens[:1], tokens.repeat(2, 1)):
        with pytest.raises(ValueError, match="the memory must be"):
            model.read_segment(other, memory)
    with pytest.raises(ValueError, match="the memory must be"):
        model.blocks[0].mixer.attend_segment(torch.zeros(3, 5, 24).double(), memory.layers[0])
    with pytest.raises(ValueError, match="state is of 2 streams, the input of 3"):
        layer = mixer()
        layer.prefill(torch.zeros(3, 5, 24).double(), layer.init_state(2))
    with pytest.raises(ValueError, match="one token a stream"):
        layer.step(torch.zeros(2, 25).double(), layer.init_state(2))
    with pytest.raises(UserError, match="max_length"):
        mha_small(max_length=8)(torch.zeros(1, 9, dtype=torch.long))


def authors_state(preset):
    golden = json.loads((Path(__file__).with_name("golden.json")).read_text())
    case = next(c for c in golden["cases"] if c["preset"] == preset)
    return seeded_state({name: tuple(shape) for name, shape in case["shapes"].items()}, 0)


def test_authors_weights_that_are_not_are_refused():
    with pytest.raises(UserError, match="found other parameters"):
        convert({"weight": torch.zeros(3)})
    with pytest.raises(UserError, match="do not say how many heads"):
        convert(authors_state("mha_char"))
    with pytest.raises(UserError, match="has heads=4, got heads=8"):
        convert(authors_state("rcmha_char"), heads=8)
    with pytest.raises(UserError, match="are of rmha_char"):
        convert(authors_state("rmha_char"), preset="rcmha_char")
    with pytest.raises(UserError, match="besides"):
        convert({**authors_state("rcmha_char"), "more": torch.zeros(1)})


# The experiments.


def test_variants_are_of_one_size():
    for variants, vocab in ((VARIANTS, 256), (PARTS, 256), (MEMORIES, SYMBOLS)):
        sizes = [count_parameters(reader(build, vocab=vocab)) for _, build in variants.values()]
        assert max(sizes) / min(sizes) < 1.005


def test_bytes_that_are_kept_are_those_that_autograd_saves():
    weight = nn.Parameter(torch.ones(3, 5))
    x = torch.ones(7, 3, requires_grad=True)
    # A product keeps both sides, a softmax its result; the parameter does not count.
    assert saved_bytes(lambda: (x @ weight).softmax(-1), [weight]) == 4 * 7 * 3 + 4 * 7 * 5
    twice = saved_bytes(lambda: (x @ weight).sum() + (x @ weight).sum(), [weight])
    assert twice == 4 * 7 * 3, "a storage counts once"


def test_convolutions_keep_three_projections_more():
    counts = {name: kept(kind)(64, "cpu")() for name, kind in KINDS.items()}
    added = counts["MDHA"] - counts["MHA"]
    assert counts["RCMHA"] - counts["RMHA"] == added >= 3 * 4 * 64 * 128


def test_segments_of_a_text_are_read_with_their_memory():
    data = text(64, True)
    model = reader(VARIANTS["rcmha"][1], vocab=256).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    whole = provenn.tasks.get_task("language-modelling").evaluate(model, data.test)["bits_per_byte"]
    assert bits_by_segments(model, data) == pytest.approx(whole, rel=1e-5)
    assert bits_by_segments(model, data, carried=False) != pytest.approx(whole, rel=1e-5)
    assert memory_gain(model, data) != 0 and chunking_cost(model, data) != 0 and model.chunking == "exact"
    assert loss_rise(reader(VARIANTS["mha"][1], vocab=256), data) is None
    assert memory_gain(reader(VARIANTS["mha"][1], vocab=256), data) == 0


def test_what_is_to_be_copied_is_in_reach_of_one_memory_alone():
    data = copy_data(3, True)
    tokens, targets, distances = data.test[:]
    asked = targets != IGNORED
    assert torch.equal(targets[:, BACK:], tokens[:, :-BACK]) and not asked[:, :BACK].any()
    assert set(distances[asked].tolist()) == {BACK}
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % SYMBOLS
    moved = {}
    for variant, (_, build) in MEMORIES.items():
        model = stirred(reader(build, **data.options))
        moved[variant] = (model(other) - model(tokens))[:, BACK].abs().max().item()
        # Trained in segments, read out in one pass: the two are one.
        assert model.segment == SEGMENT and tokens.shape[1] == LENGTH
        read, _ = in_segments(model, tokens, SEGMENT)
        torch.testing.assert_close(read, model(tokens), rtol=0, atol=1e-9)
        expected = F.cross_entropy(read[asked], targets[asked])
        torch.testing.assert_close(
            model.training_loss((tokens, targets, distances)).double(), expected, rtol=1e-5, atol=0
        )
    assert moved["long"] > 1e-3 and moved["short"] == 0


def test_memory_on_a_gpu_is_that_of_a_training_step_at_the_size_that_is_claimed(monkeypatch, tmp_path):
    small, asked = experiments.peak_ratio("cpu", batch=1, segment=4), []
    assert small.effect > 1 and small.setting == {"batch": 1, "segment": 4, "memory": 4, "type": "float32"}
    monkeypatch.setattr(experiments, "peak_ratio", lambda device, **sizes: asked.append((device, sizes)) or small)
    here, there = (experiments.memory_gpu(Run("rcmha", tmp_path, device=device)) for device in ("cpu", "cuda:1"))
    assert here.effect is None and "GPU" in here.needs
    assert there is small and asked == [("cuda:1", {"batch": 32, "segment": 256})]


@pytest.mark.parametrize("memory", [0, 6])
def test_the_four_attentions_are_set_side_by_side(tmp_path, memory):
    asked = sweep(length="9,12", memory=memory, dim=24, heads=4, time=True, budget="smoke")
    rows = asked.run(tmp_path)
    assert [row["length"] for row in rows] == [9, 12]
    for row, table in zip(rows, asked.tables(rows), strict=True):
        costs = row["costs"]
        assert [line[0] for line in table.rows] == list(costs) == ["MHA", "MDHA", "RMHA", "RCMHA"]
        assert {len(line) for line in table.rows} == {len(table.columns)}
        for plain, convolved in (("MHA", "MDHA"), ("RMHA", "RCMHA")):
            for cost in ("parameters", "flops", "kept", "peak", "state"):
                assert costs[convolved][cost] > costs[plain][cost], cost
        # Keys and values of all tokens; and queries, keys and values of two before the convolution.
        tokens = row["length"] + memory
        assert costs["RMHA"]["state"] == 4 * 2 * 24 * tokens and costs["RCMHA"]["state"] == 4 * 24 * (2 * tokens + 6)
    without = sweep(length="9", dim=24, heads=4).run(tmp_path / "plain")
    assert "seconds" not in without[0]["costs"]["RCMHA"]


def test_the_readme_has_the_table_that_the_command_prints(tmp_path):
    readme = (Path(rcmha.__file__).parent / "README.md").read_text()
    asked = sweep(length="64,256,1024")
    for table in asked.tables(asked.run(tmp_path)):
        assert table.markdown() in readme, table.caption


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": "x"}, "length must be whole numbers"),
        ({"length": "64,0"}, "length must be at least 1"),
        ({"memory": -1}, "memory must be at least 0"),
        ({"streams": 0}, "streams must be at least 1"),
        ({"heads": 7}, "heads must divide dim"),
        ({"kernel": 0}, "kernel must be at least 1"),
    ],
)
def test_a_benchmark_that_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        sweep(**options)


def test_the_small_model_reads_any_length():
    with torch.no_grad():
        assert rcmha_small()(torch.randint(256, (1, 300))).isfinite().all()
