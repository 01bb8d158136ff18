"""What URPE promises: places where relative biases see none, at the cost of a table, in every host."""

import copy
import re
from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import provenn.huggingface
from provenn import catalog
from provenn.cli import main
from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.huggingface import revert
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.graphs import shortest_paths
from provenn.papers.urpe import (
    LogBuckets,
    Offsets,
    Paths,
    SequenceEncoder,
    TheoryBlock,
    TransformerXL,
    URPEAttention,
    Window,
    attentive,
    least_error,
    position_aware,
    row_spread,
    row_sums,
    urpe_graph_tiny,
    urpe_lm_tiny,
    urpe_synthetic,
    urpe_synthetic_tiny,
    urpe_transformer_xl,
    urpe_transformer_xl_tiny,
)
from provenn.papers.urpe.construction import (
    WITHOUT,
    drawn_features,
    least_error_of_equals,
    map_by_hand,
    sequences,
    sharpness_for,
)
from provenn.papers.urpe.experiments import TEXT
from provenn.papers.urpe.graphs import GraphRegressor
from provenn.papers.urpe.inspection import inspect
from provenn.papers.urpe.layers import gather
from provenn.papers.urpe.official import convert
from provenn.papers.urpe.studies import TEXT_LENGTH, bits_beyond, encoder, identified_at, text_model
from provenn.papers.urpe.task import EVEN, IDENTIFICATION, TASK, targets_of
from provenn.papers.urpe.transformer_xl import sinusoid
from provenn.tasks import TaskData
from provenn.tasks.language_modelling import Windows


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stirred(module: nn.Module, spread: float = 0.3) -> nn.Module:
    """In float64 and eval mode, with every table off its start."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("rel_bias", "rel_scale")):
                parameter.add_(spread * torch.randn_like(parameter))
    return module.double().eval()


def noise(*shape):
    return torch.randn(shape, dtype=torch.float64)


# The layer


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"index": "bucket"}, {"encoding": "rpe"}, {"max_length": 4}]
)
def test_the_layer_is_its_formula_with_gradients(options):
    layer = stirred(URPEAttention(8, 2, **{"max_length": 20, **options}))
    x = noise(2, 9, 8).requires_grad_()
    q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (layer.query, layer.key, layer.value))
    positions = torch.arange(9)
    index = layer.relations.index(positions, positions)
    scores = q @ k.mT / 2 + layer.rel_bias[index].permute(2, 0, 1)
    if layer.causal:
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    weights = scores.softmax(-1)
    if layer.rel_scale is not None:
        weights = weights * layer.rel_scale[index].permute(2, 0, 1)
    plain = layer.out((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), plain, rtol=1e-10, atol=1e-12)
    wanted, weight = [x, *layer.parameters()], noise(2, 9, 8)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), wanted) for y in (layer(x), plain))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_with_ones_it_is_relative_biases_bit_for_bit_and_without_biases_plain_attention():
    urpe, x = URPEAttention(16, 4, max_length=10), torch.randn(2, 8, 16)
    rpe = URPEAttention(16, 4, max_length=10, encoding="rpe")
    rpe.load_state_dict({k: v for k, v in urpe.state_dict().items() if k != "rel_scale"})
    assert urpe(x).equal(rpe(x))
    plain = SoftmaxAttention(16, 4)
    plain.load_state_dict({k: v for k, v in urpe.state_dict().items() if not k.startswith("rel_")})
    torch.testing.assert_close(attentive(urpe)(x), plain(x))


def test_the_gradient_of_a_multiplier_is_what_its_pairs_carry():
    """∂L/∂c[k] = Σ_{j−i=k} p_ij (g_i · v_j)."""
    layer = stirred(URPEAttention(6, 1, max_length=5, causal=False, bias=False))
    with torch.no_grad():
        layer.out.weight.copy_(torch.eye(6))
    x, g = noise(1, 5, 6), noise(1, 5, 6)
    (got,) = torch.autograd.grad((layer(x) * g).sum(), layer.rel_scale)
    pairs = layer.weights(x)[0][0, 0] * (g[0] @ layer.value(x)[0].mT)
    expected = torch.stack([pairs.diagonal(offset).sum() for offset in range(-4, 5)])
    torch.testing.assert_close(got[:, 0], expected)


def test_rows_of_weights_sum_to_what_the_multiplier_says():
    layer = stirred(URPEAttention(8, 2, max_length=7, causal=False))
    p, multiplied = layer.weights(noise(2, 7, 8))
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 2, 7, dtype=torch.float64))
    torch.testing.assert_close(multiplied, p * layer.tables(7)[1])
    assert (multiplied.sum(-1) - 1).abs().max() > 0.01


def test_a_window_shifted_in_its_padding_gives_shifted_outputs_and_padding_changes_nothing():
    layer = stirred(URPEAttention(8, 2, max_length=30, causal=False))
    content, outputs = noise(1, 11, 8), [None]
    outputs[0] = layer(content)
    for start in (2, 9):
        x, mask = torch.full((1, 30, 8), 50.0, dtype=torch.float64), torch.zeros(1, 30, dtype=torch.bool)
        x[:, start : start + 11], mask[:, start : start + 11] = content, True
        outputs.append(layer(x, mask=mask)[:, start : start + 11])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outputs[1], outputs[2], rtol=1e-9, atol=1e-9)


def test_a_stream_beyond_the_table_is_the_whole():
    layer = stirred(URPEAttention(8, 2, max_length=5))
    x = noise(2, 12, 8)
    first, state = layer.prefill(x[:, :4])
    rest = []
    for t in range(4, 12):
        y, state = layer.step(x[:, t], state)
        rest.append(y)
    torch.testing.assert_close(torch.cat([first, torch.stack(rest, 1)], 1), layer(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_counts_for_nothing_and_dropout_that_drops_nothing_changes_nothing(causal):
    layer = stirred(URPEAttention(8, 2, max_length=6, causal=causal, dropout=1e-12))
    x, mask = noise(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = mask[1, 3:] = False
    outputs = layer(x, mask=mask)
    changed = torch.where(mask[..., None], x, noise(2, 6, 8))
    torch.testing.assert_close(layer(changed, mask=mask)[mask], outputs[mask])
    assert layer(changed)[mask].sub(layer(x)[mask]).abs().max() > 1e-3
    # In training the weights are formed by a path of their own.
    torch.testing.assert_close(layer.train()(x, mask=mask), outputs)


def test_tables_start_as_the_authors_do():
    layer = URPEAttention(8, 2, max_length=2000, init_scale=-0.5)
    assert (layer.rel_scale == -0.5).all() and layer.rel_bias.std().item() == pytest.approx(0.02, rel=0.1)


def test_dropout_is_of_the_multiplied_weights():
    layer = URPEAttention(8, 2, max_length=6, dropout=0.5).train()
    x = torch.randn(1, 6, 8)
    assert not layer(x).equal(layer(x))
    layer.eval()
    assert layer(x).equal(layer(x))


# Relations


def test_offsets_are_toeplitz_and_clipped():
    table = torch.randn(7, 2)
    relations, positions = Offsets(4), torch.arange(9)
    looked_up = gather(table, relations.index(positions, positions))[0]
    assert looked_up.equal(relations.matrix(table, 9))
    for offset in range(-8, 9):
        assert (looked_up.diagonal(offset, 1, 2) == table[min(max(offset, -3), 3) + 3, :, None]).all()


def test_buckets_are_those_of_the_authors():
    """For 128 tokens 0 to 64 without 31 and 32; offset 0 is 33."""
    positions = torch.arange(128)
    index = LogBuckets().index(positions, positions)
    assert set(index.flatten().tolist()) == set(range(65)) - {31, 32}
    assert index[0, :2].tolist() == [33, 34] and index[:3, 0].tolist() == [33, 30, 29]
    assert index[0].diff().min() >= 0 and index[0, -1] == 64 and index[-1, 0] == 0


def test_a_window_has_one_relation_an_offset_of_rows_and_columns():
    index = Window(3, 4).index(torch.arange(12), torch.arange(12))
    rows, columns = torch.arange(12) // 4, torch.arange(12) % 4
    offsets = (rows - rows[:, None]) * 100 + columns - columns[:, None]
    pairs = set(zip(offsets.flatten().tolist(), index.flatten().tolist()))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == Window(3, 4).size


def test_shortest_paths_are_those_of_floyd_and_warshall():
    edges = (torch.rand(3, 14, 14) < 0.12).triu(1)
    edges = edges | edges.mT
    far = torch.where(edges, 1.0, torch.inf)
    far.diagonal(dim1=1, dim2=2).zero_()
    for k in range(14):
        far = torch.minimum(far, far[:, :, k, None] + far[:, None, k])
    lengths = shortest_paths(edges)
    assert (lengths == -1).any() and torch.where(far.isinf(), -1, far).equal(lengths.float())
    relations = Paths(3).with_virtual_node(lengths)
    assert (relations[:, 0] == 5).all() and (relations[:, :, 0] == 5).all() and relations.max() == 5
    assert (relations[:, 1:, 1:][lengths > 3] == 3).all() and (relations[:, 1:, 1:][lengths < 0] == 4).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "both"}, "encoding must be"),
        ({"index": "grid"}, "go together"),
        ({"index": "grid", "grid": (2, 2)}, "causal must be False"),
        ({"index": "path"}, "causal must be False"),
        ({"index": "words"}, "index must be"),
        ({"index": "bucket", "buckets": 10}, "multiple of 4"),
        ({"max_length": 0}, "max_length"),
        ({"dropout": 1.0}, "dropout"),
        ({"form": "flash"}, "form must be"),
        ({"heads": 3}, "heads must divide"),
        ({"index": Window(2, 2)}, "causal must be False"),
        ({"index": Offsets(4, causal=True), "causal": False}, "causal must be True"),
        ({"index": "bucket", "buckets": 8, "max_distance": 2}, "max_distance must be more than"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        URPEAttention(**{"dim": 8, "heads": 2, **options})


def test_bad_relations_are_refused():
    layer = URPEAttention(8, 2, index="path", max_distance=4, causal=False)
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="call the layer with relations"):
        layer(x)
    with pytest.raises(ValueError, match="int64 of shape"):
        layer(x, relations=torch.zeros(3, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="from 0 to 6"):
        layer(x, relations=torch.full((3, 3), 7))
    with pytest.raises(ValueError, match="cannot stream"):
        layer.prefill(x)
    with pytest.raises(ValueError, match="grid of 1×2 has 2 cells, got 3 tokens"):
        URPEAttention(8, 2, index="grid", grid=(1, 2), causal=False)(x)


# The theorems


@pytest.mark.parametrize("encoding", ["none", "rpe", "urpe"])
@pytest.mark.parametrize("causal", [False, True])
def test_equal_tokens_stay_equal_but_for_the_multiplier(encoding, causal):
    make = partial(TheoryBlock, 16, 4, hidden=32, max_length=12, encoding=encoding, causal=causal)
    blocks = stirred(nn.ModuleList(make() for _ in range(3)), 1.0)
    x = noise(2, 1, 16).expand(-1, 9, -1)
    for block in blocks:
        x = block(x)
    assert (row_spread(x) > 1e-2) == (encoding == "urpe") and (encoding == "urpe" or row_spread(x) < 1e-13)


def test_the_table_of_the_readme_is_what_its_command_prints(tmp_path, capsys):
    assert main(["reproduce", "urpe", "--experiment", "equal_tokens_stay_equal", "--out", str(tmp_path)]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    readme = (catalog.card("urpe").folder / "README.md").read_text()
    rows = [
        re.findall(r"[^| ]+", line) for line in readme.splitlines() if re.match(r"\| \d+ \| (all|causal|padding)", line)
    ]
    assert len(rows) == 12
    for depth, mask, none, rpe, urpe in rows:
        (line,) = [words for words in printed if words[:2] == [depth, mask]]
        # What is rounding differs from machine to machine.
        assert max(map(float, (none, rpe, *line[2:4]))) < 1e-12
        assert float(urpe) == pytest.approx(float(line[4]), abs=0.006) and float(urpe) > 0.1


def test_the_encoder_of_the_synthetic_tasks_keeps_equal_tokens_equal_and_the_kept_do_not_depend_on_order():
    tokens = torch.full((1, 20), 5)
    for encoding, apart in (("none", False), ("rpe", False), ("urpe", True)):
        model = stirred(urpe_synthetic_tiny(encoding=encoding))
        assert (row_spread(model(tokens)) > 1e-4) == apart
        some, order = torch.randint(81, (1, 20)), torch.randperm(20)
        moved = (model(some)[:, order] - model(some[:, order])).abs().max()
        assert (moved < 1e-10) == (encoding == "none")


def test_the_conditions_by_construction():
    urpe, rpe = (URPEAttention(8, 2, max_length=9, causal=False, encoding=e) for e in ("urpe", "rpe"))
    expected = (9 - torch.arange(9)) / 9
    torch.testing.assert_close(row_sums(position_aware(urpe), 9), expected.expand(2, -1))
    torch.testing.assert_close(row_sums(position_aware(rpe), 9), torch.ones(2, 9))
    for index in ({"index": "bucket", "buckets": 8, "max_distance": 9}, {"index": "grid", "grid": (3, 3)}):
        layer = URPEAttention(8, 2, causal=False, **index)
        torch.testing.assert_close(row_sums(position_aware(layer), 9), expected.expand(2, -1))
    causal = URPEAttention(8, 2, max_length=9)
    torch.testing.assert_close(row_sums(position_aware(causal), 9), (1 / torch.arange(1, 10)).expand(2, -1))
    assert least_error(torch.tensor([[1.0, 0], [3, 0], [2, 7]])) == 3.5


@torch.no_grad()
def test_any_map_of_sequences_is_met_within_the_error_asked_for():
    """By both modules; not without the multiplier of the one, and not without the scores of the other."""
    for draw in range(3):
        targets = torch.rand(27, 3, dtype=torch.float64)
        for error in (1e-1, 1e-3, 1e-9):
            reached = map_by_hand(targets, sharpness_for(error))(sequences())[..., -1]
            assert (reached - targets).abs().max() < error, (draw, error)
        places, gathering = map_by_hand(targets, 30.0)
        assert (nn.Sequential(places, gathering)(sequences())[..., -1] - targets).abs().max() < 1e-11
        blind = map_by_hand(targets, 0.0)
        assert (blind(sequences())[..., -1] - targets).abs().max() > 0.1
        places.mixer.rel_scale.fill_(1)
        assert (nn.Sequential(places, gathering)(sequences())[..., -1] - targets).abs().max() > 0.1


@torch.no_grad()
def test_what_one_module_alone_does_not_distinguish():
    """Relative biases: the places of equal tokens. Sums from a token on: all that comes before it."""
    classes = {}
    for without in WITHOUT:
        features = drawn_features(without, torch.Generator().manual_seed(1))
        same = torch.cdist(features, features, p=float("inf")) < 1e-9 * features.abs().max()
        classes[without] = [frozenset(row.nonzero().flatten().tolist()) for row in same]
    equal = [frozenset(range(3 * s, 3 * s + 3)) for s in (0, 13, 26)]
    expected = [next((group for group in equal if cell in group), frozenset([cell])) for cell in range(81)]
    assert classes["position-aware module"] == expected
    after = [frozenset(3 * s + i for s in range(27) if s % 3 ** (3 - i) == cell // 3 % 3 ** (3 - i))
             for cell in range(81) for i in [cell % 3]]  # fmt: skip
    assert classes["attentive module"] == after
    told_apart = torch.arange(81.0, dtype=torch.float64)[:, None]
    assert least_error_of_equals(told_apart, torch.rand(27, 3, dtype=torch.float64)) == 0


def test_sums_of_one_are_the_reason():
    """Renormalised, URPE's equal tokens are equal again; without the sum, relative biases alone distinguish them."""
    tokens = torch.full((1, 16), 12)
    spreads = {}
    for name in ("rpe", "urpe", "unnormalised", "renormalised"):
        spreads[name] = row_spread(stirred(encoder(name, vocab=81, max_length=16, tied=True), 0.5)(tokens))
    assert max(spreads["rpe"], spreads["renormalised"]) < 1e-12 < 1e-3 < min(spreads["urpe"], spreads["unnormalised"])


# Systems


def test_parameters_are_those_of_the_authors():
    with torch.device("meta"):
        encoders = {e: SequenceEncoder(encoding=e) for e in ("none", "rpe", "urpe")}
        head = 768 * 769 + 2 * 768 + 1011
        counts = {e: count_parameters(model) - head for e, model in encoders.items()}
        assert counts == {"none": 22_041_600, "rpe": 22_044_660, "urpe": 22_047_720}
        assert count_parameters(SequenceEncoder(index="bucket")) - head == 22_041_600 + 2 * 65 * 12
        assert count_parameters(urpe_transformer_xl(encoding="rpe")) == 151_107_538  # as its authors' code prints it
        assert count_parameters(urpe_transformer_xl()) == 151_107_538 + 10 * 300
        assert count_parameters(urpe_synthetic(share_tables=False)) - count_parameters(urpe_synthetic()) == 2 * 2 * 3060


def test_a_checkpoint_of_another_model_is_refused():
    with pytest.raises(UserError, match="found other parameters"):
        convert({"weight": torch.zeros(2)})


def test_transformer_xl_s_scores_are_its_formula():
    model = urpe_transformer_xl_tiny(dim=8, heads=2).double()
    layer, x, memory = model.blocks[0].mixer, noise(1, 4, 8), noise(1, 3, 8)
    nn.init.normal_(model.content)
    nn.init.normal_(model.position)
    factors = noise(1, 2, 4, 7)
    ours = layer(x, memory, content=model.content, position=model.position, factors=factors, dropout=nn.Identity())
    everything = torch.cat([memory, x], 1)
    q, k, v = (
        m(part)[0].view(-1, 2, 4) for m, part in ((layer.query, x), (layer.key, everything), (layer.value, everything))
    )
    r = layer.place(sinusoid(torch.arange(7), 8).double()).view(7, 2, 4)
    y = torch.zeros(4, 2, 4, dtype=torch.float64)
    for i in range(4):
        for h in range(2):
            keys = range(3 + i + 1)
            scores = [
                (q[i, h] + model.content[h]) @ k[j, h] + (q[i, h] + model.position[h]) @ r[3 + i - j, h] for j in keys
            ]
            weights = (torch.stack(scores) / 2).softmax(0) * factors[0, h, i, : 4 + i]
            y[i, h] = weights @ v[: 4 + i, h]
    torch.testing.assert_close(ours[0], layer.out(y.flatten(1)), rtol=1e-9, atol=1e-9)


def test_transformer_xl_remembers_segments_and_streams():
    model = stirred(urpe_transformer_xl_tiny(segment=4, memory=6))
    tokens = torch.randint(256, (2, 11))
    whole, state, parts = model(tokens), model.init_state(2), []
    for piece in tokens.split(4, 1):
        y, state = model.prefill(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert state.layers[0].shape == (2, 6, 64)
    changed = tokens.clone()
    changed[:, 6] += 1
    changed %= 256
    assert model(changed)[:, :6].equal(whole[:, :6]) and not model(changed)[:, 8].equal(whole[:, 8])
    short, state = tokens[:, :4], model.init_state(2)
    for t in range(4):
        y, state = model.step(short[:, t], state)
        torch.testing.assert_close(y, model(short)[:, t])
    assert len(list(model.generate(tokens, 3, temperature=0))) == 3


def test_transformer_xl_is_its_definition_over_segments():
    """Embedding · √d, post-norm blocks with a ReLU, one table of distances, a tied head with a bias."""
    model = stirred(urpe_transformer_xl_tiny(dim=8, heads=2, hidden=6, segment=3, memory=2))
    with torch.no_grad():
        for parameter in (model.head_bias, model.content, model.position):
            parameter.normal_()
    tokens = torch.randint(256, (1, 7))
    memory, outputs = [noise(1, 0, 8)] * 2, []
    for piece in tokens.split(3, 1):
        x, kept = model.embed(piece) * 8**0.5, []
        for block, before in zip(model.blocks, memory):
            kept.append(torch.cat([before, x], 1)[:, -2:])
            queries, keys = x.shape[1], before.shape[1] + x.shape[1]
            factors = torch.zeros(1, 2, queries, keys, dtype=torch.float64)
            for i in range(queries):
                for j in range(keys - queries + i + 1):
                    # The table's last row is of distance 0.
                    factors[0, :, i, j] = model.rel_scale[4 - min(keys - queries + i - j, 4)]
            shared = {"content": model.content, "position": model.position, "factors": factors}
            x = block.norm1(x + block.mixer(x, before, dropout=nn.Identity(), **shared))
            x = block.norm2(x + block.linear2(block.linear1(x).relu()))
        memory = kept
        outputs.append(x @ model.embed.weight.mT + model.head_bias)
    torch.testing.assert_close(model(tokens), torch.cat(outputs, 1))


def test_no_gradient_goes_through_the_memory():
    model = urpe_transformer_xl_tiny(segment=4)
    _, state = model.prefill(torch.randint(256, (1, 4)))
    assert not any(layer.requires_grad for layer in state.layers)


def test_sinusoids_are_sines_then_cosines():
    assert sinusoid(torch.tensor([0]), 6).tolist() == [[0, 0, 0, 1, 1, 1]]
    torch.testing.assert_close(sinusoid(torch.tensor([3]), 4)[0, :2], torch.tensor([3.0, 0.03]).sin())


def test_the_adaptive_softmax_gives_probabilities():
    model = TransformerXL(40, 8, 2, 1, 8, cutoffs=(10, 25), segment=4, memory=0, dropout=0.0)
    tokens = torch.randint(40, (2, 5))
    torch.testing.assert_close(model(tokens).exp().sum(-1), torch.ones(2, 5))
    # Of the second rare cluster: the share of its own entry in the head, and the token's share in the cluster.
    x = model.hidden_states(tokens)
    head = torch.cat([nn.functional.linear(x, model.embed.weight[:10]), model.clusters(x)], -1).softmax(-1)
    tail = nn.functional.linear(x, model.embed.weight[25:]).softmax(-1)
    torch.testing.assert_close(model(tokens).exp()[..., 25:], head[..., 11:] * tail)
    with pytest.raises(ValueError, match="cutoffs must rise"):
        TransformerXL(40, 8, 2, 1, 8, cutoffs=(25, 10))


def test_a_model_without_memory_streams_no_tokens():
    model = TransformerXL(40, 8, 2, 1, 8, cutoffs=(), segment=4, memory=0)
    with pytest.raises(ValueError, match="memory=0 reads segments whole"):
        list(model.generate(torch.zeros(1, 2, dtype=torch.long), 2))


def test_layers_share_their_tables_through_copies_and_files(tmp_path):
    model = copy.deepcopy(urpe_lm_tiny())
    assert model.blocks[0].mixer.rel_scale is model.blocks[1].mixer.rel_scale
    apart = urpe_lm_tiny(share_tables=False)
    assert apart.blocks[0].mixer.rel_scale is not apart.blocks[1].mixer.rel_scale
    with pytest.raises(UserError, match="more than max_length"):
        urpe_synthetic_tiny(encoding="ape")(torch.zeros(1, 33, dtype=torch.long))


def test_sinusoids_are_as_large_as_learned_positions_and_stay():
    for model in (urpe_lm_tiny(encoding="sinusoidal"), urpe_synthetic_tiny(encoding="sinusoidal")):
        table = model.place.weight
        assert not table.requires_grad and table.square().mean().sqrt().item() == pytest.approx(0.02)
        torch.testing.assert_close(table[3, :2], 0.02 * 2**0.5 * torch.tensor([3.0, 3.0 + torch.pi / 2]).sin())
        assert row_spread(model.eval()(torch.full((1, 9), 12))) > 1e-3
    assert urpe_lm_tiny(encoding="ape").place.weight.requires_grad


# Graphs


def regular(n, step):
    """A ring of n nodes with chords: all nodes alike."""
    edges = torch.zeros(n, n, dtype=torch.bool)
    for distance in (1, step):
        edges |= torch.eye(n).roll(distance, 1).bool() | torch.eye(n).roll(-distance, 1).bool()
    return shortest_paths(edges)[None]


def test_regular_graphs_look_alike_without_multiplier_and_virtual_node():
    for encoding, readout, apart in (("rpe", "mean", False), ("rpe", "virtual", True), ("urpe", "mean", True)):
        model = urpe_graph_tiny(1, encoding=encoding, readout=readout).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        outputs = [
            model(torch.ones(1, n, dtype=torch.long), regular(n, s)).item() for n, s in ((8, 2), (8, 3), (13, 5))
        ]
        assert (max(outputs) - min(outputs) > 1e-6) == apart and (apart or max(outputs) - min(outputs) < 1e-12)


@pytest.mark.parametrize("share", [True, False])
def test_graphormer_is_its_definition(share):
    """Degrees on both embeddings, a bias of length and edges, a virtual node in front, pre-norm blocks with a GELU."""
    model = GraphRegressor(
        3, 2, 4, 8, 2, 2, 6, dropout=0.0, max_distance=3, max_degree=2, hops=2, share_tables=share
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in model.eval().parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        model.edge.weight[0] = 0  # where there is no edge
    edges = torch.zeros(1, 6, 6, dtype=torch.bool)
    for a, b in ((0, 1), (0, 2), (0, 3), (3, 4), (4, 5)):
        edges[0, a, b] = edges[0, b, a] = True
    lengths, nodes, hops = shortest_paths(edges), torch.randint(1, 4, (1, 6)), torch.randint(1, 5, (1, 6, 6, 2))
    assert lengths.max() == 4
    for k in range(2):
        hops[..., k][lengths <= k] = 0  # no edge there
    degrees = torch.tensor([2, 1, 1, 2, 2, 1])  # the first has three, of which two are given
    x = model.embed(nodes) + model.degree_in(degrees) + model.degree_out(degrees)
    x = torch.cat([model.virtual, x], 1)
    for block in model.blocks:
        bias, factors = (table[5].expand(7, 7, -1).clone() for table in (block.mixer.rel_bias, block.mixer.rel_scale))
        for i in range(6):
            for j in range(6):
                length = int(lengths[0, i, j])
                along = [model.edge(hops[0, i, j, k]) @ model.hop[k] for k in range(min(length, 2))]
                bias[i + 1, j + 1] = block.mixer.rel_bias[min(length, 3)] + sum(along) / max(1, len(along))
                factors[i + 1, j + 1] = block.mixer.rel_scale[min(length, 3)]
        y, mixer = block.norm1(x), block.mixer
        q, k, v = (m(y)[0].unflatten(-1, (2, 4)).transpose(0, 1) for m in (mixer.query, mixer.key, mixer.value))
        weights = (q @ k.mT / 2 + bias.permute(2, 0, 1)).softmax(-1) * factors.permute(2, 0, 1)
        x = x + mixer.out((weights @ v).transpose(0, 1).flatten(1))
        x = x + block.linear2(nn.functional.gelu(block.linear1(block.norm2(x))))
    torch.testing.assert_close(model(nodes, lengths, hops), model.head(model.norm(x)[:, 0]))


def test_padding_and_the_order_of_nodes_change_nothing_of_a_graph():
    model = GraphRegressor(3, 2, 4, 16, 4, 2, 16, dropout=0.0, max_distance=5).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    edges = (torch.rand(1, 7, 7) < 0.4).triu(1)
    lengths = shortest_paths(edges | edges.mT)
    nodes, hops = torch.randint(1, 4, (1, 7)), torch.randint(5, (1, 7, 7, 5))
    output = model(nodes, lengths, hops)
    pad = nn.functional.pad
    wide = model(pad(nodes, (0, 3)), pad(lengths, (0, 3, 0, 3), value=-1), pad(hops, (0, 0, 0, 3, 0, 3)))
    torch.testing.assert_close(wide, output, rtol=1e-10, atol=1e-12)
    order = torch.randperm(7)
    moved = model(nodes[:, order], lengths[:, order][:, :, order], hops[:, order][:, :, order])
    torch.testing.assert_close(moved, output, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(model(nodes, lengths, hops.roll(1, 3)), output)
    with pytest.raises(ValueError, match="third argument"):
        model(nodes, lengths)
    # As users run it, without the tests' own checks of shapes.
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match="pairs of 7 nodes, got lengths"):
            model(nodes, lengths[:, 1:], hops)
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
    with pytest.raises(ValueError, match="edge_labels must not"):
        GraphRegressor(edge_labels=-1)
    # Where a graph was read with fewer hops than the model looks at, the mean is over those.
    far, some = torch.tensor([[[0, 4], [4, 0]]]), torch.ones(1, 2, 2, 2, dtype=torch.long)
    alike = model._edges(far, some)[0, :, 0, 1], (model.edge.weight[1] @ model.hop[:2]).mean(0)
    torch.testing.assert_close(*alike)


def test_inspect_shows_each_table_once():
    model = urpe_graph_tiny(heads=2)
    nodes, lengths = torch.ones(1, 3, dtype=torch.long), shortest_paths(torch.ones(1, 3, 3, dtype=torch.bool))
    rows = inspect(model.eval(), (nodes, lengths, torch.zeros(1, 3, 3, 5, dtype=torch.long)))
    assert len(rows) == 2 and all(row.equal(torch.ones(19)) for row in rows.values())


# The synthetic tasks


def test_the_tasks_are_those_of_the_authors():
    data = TASK.load(IDENTIFICATION, length=6, vocabulary=100, examples=2000, test_examples=10)
    tokens, targets = data.train.tensors
    assert (targets == torch.arange(1, 7)).all() and data.options == {"vocab": 111, "max_length": 6, "tied": False}
    assert set(tokens.flatten().tolist()) == set(range(11, 91))
    assert TASK.dummy_baseline(data) == pytest.approx(1 / 6)
    even = TASK.load(EVEN, length=8, vocabulary=100, examples=50, test_examples=10)
    tokens, targets = even.train.tensors
    assert targets[:, :4].equal(tokens[:, [1, 3, 5, 7]]) and (targets[:, 4:] == 98).all()
    assert TASK.dummy_baseline(even) == 0.5 and even.options["tied"]
    assert targets_of(tokens, EVEN, 100).equal(targets)


def test_scores_are_of_all_places_and_of_the_first_half():
    data = TASK.load(EVEN, length=8, vocabulary=100, examples=1, test_examples=10)
    _, targets = data.test.tensors

    class Half(nn.Module):
        def forward(self, x):
            right = nn.functional.one_hot(targets, 111).float()
            right[:, 4:] = 0  # the first token is predicted there, and nothing is the first token
            return right

    model = Half()
    model.register_parameter("any", nn.Parameter(torch.zeros(())))
    metrics = TASK.evaluate(model, data.test)
    assert (metrics["accuracy"], metrics["first_half"]) == (0.5, 1.0)


def test_weights_of_places_alone_see_no_token():
    model = stirred(encoder("unattentive", vocab=81, max_length=16, tied=True))
    mixer, x, y = model.blocks[0].mixer, noise(1, 9, 64), noise(1, 9, 64)
    torch.testing.assert_close(mixer(x) + mixer(y), mixer(x + y) + mixer(0 * x))
    # Each output sees every token, and positions differ.
    assert row_spread(mixer(x[:, :1].expand(-1, 9, -1))) > 1e-3


@torch.no_grad()
def test_bits_beyond_are_those_past_the_length_of_training():
    windows = Windows(np.arange(2000) % 256, TEXT_LENGTH, np.ones(256, np.int64))
    data = TaskData("text", windows, windows, windows, "", {})

    class Knowing(nn.Module):
        """Predicts the next byte at the positions of training, and no byte after them."""

        def forward(self, x):
            logits = 50 * nn.functional.one_hot((x + 1) % 256, 256).float()
            logits[:, TEXT_LENGTH:] = 0
            return logits

    model = Knowing()
    model.any = nn.Parameter(torch.zeros(()))
    for times in (2, 4):
        assert bits_beyond(model, data, times) == pytest.approx(8)
    for name in ("ape", "sinusoidal"):
        assert text_model(name).place.num_embeddings == 4 * TEXT_LENGTH
    assert text_model("urpe").blocks[0].mixer.rel_scale.shape[0] == TEXT_LENGTH


def test_all_positions_of_the_text_study_start_alike_and_as_large_as_tokens():
    models = {name: text_model(part, vocab=256) for name, (_, part) in TEXT.variants.items()}
    for name, model in models.items():
        assert model.embed.weight.std().item() == pytest.approx(1 / 8, rel=0.02), name
    assert models["ape"].place.weight.square().mean().sqrt().item() == pytest.approx(1 / 8, rel=0.03)
    assert models["sinusoidal"].place.weight.square().mean().sqrt().item() == pytest.approx(1 / 8, rel=0.03)
    assert not models["sinusoidal"].place.weight.requires_grad
    assert all(block.mixer.rotary for block in models["rotary"].blocks)


@pytest.mark.parametrize("name", ["ape", "urpe"])
def test_places_are_asked_for_in_longer_sequences(name):
    data = TASK.load(IDENTIFICATION, length=16, vocabulary=70, examples=1, test_examples=1)
    model = encoder(name, **data.options)
    with torch.no_grad():
        for times in (2, 4):
            assert 0 <= identified_at(model, data, times) < 0.5

        def predict(tokens):
            return nn.functional.one_hot(torch.arange(1, tokens.shape[1] + 1), 81).expand(len(tokens), -1, -1)

        model.forward = predict
        assert identified_at(model, data, 4) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": 7}, "even"), ({"vocabulary": 20}, "more than 20"), ({"length": 400, "vocabulary": 100}, "at most 110"),
     ({"examples": 0}, "examples")],
)  # fmt: skip
def test_tasks_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TASK.load(IDENTIFICATION, **options)


# Hugging Face's models


def t5():
    config = T5Config(
        vocab_size=60, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0,
        initializer_factor=3.0, relative_attention_num_buckets=8, relative_attention_max_distance=10,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def swin():
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=3
    )
    model = SwinForImageClassification(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def given(model):
    if isinstance(model, SwinForImageClassification):
        return {"pixel_values": noise(2, 3, 32, 32)}
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 8:] = 0
    return {"input_ids": torch.randint(1, 60, (2, 11)), "attention_mask": mask, "labels": torch.randint(1, 60, (2, 7))}


@pytest.mark.parametrize(
    ("build", "auto", "added"),
    [(t5, AutoModelForSeq2SeqLM, 4 * 8 * 4), (swin, AutoModelForImageClassification, 49 * 2 * (2 + 4))],
)
@torch.no_grad()
def test_a_converted_model_is_what_it_was_until_its_multipliers_move(build, auto, added, tmp_path):
    model = build().double()
    batch = given(model)
    before, count = model(**batch).logits, count_parameters(model)
    provenn.huggingface.convert(model, "urpe")
    assert count_parameters(model) - count == added
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        if "urpe" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    moved = model(**batch).logits
    assert (moved - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(auto.from_pretrained(tmp_path).eval()(**batch).logits, moved)
    if build is t5:
        prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
        cached, plain = (model.generate(**prompt, max_new_tokens=8, use_cache=use) for use in (True, False))
        assert cached.equal(plain)
    assert revert(model)(**batch).logits.equal(before)


@torch.no_grad()
def test_t5_s_multiplier_is_looked_up_as_its_bias():
    """Biases and multipliers from one table: the multiplied weights of a layer, by transformers' own bias."""
    model = provenn.huggingface.convert(t5(), "urpe")
    host = model.encoder.block[0].layer[0].SelfAttention
    nn.init.normal_(host.urpe.rel_scale)
    host.relative_attention_bias.weight.copy_(host.urpe.rel_scale)
    torch.testing.assert_close(host.urpe(host, 9, 9), host.compute_bias(9, 9))
    decoder = model.decoder.block[1].layer[0].SelfAttention
    first = model.decoder.block[0].layer[0].SelfAttention
    first.relative_attention_bias.weight.copy_(nn.init.normal_(decoder.urpe.rel_scale))
    torch.testing.assert_close(decoder.urpe(decoder, 2, 9), first.compute_bias(2, 9, past_seen_tokens=7))


def test_hosts_without_relative_biases_get_offsets_and_others_a_reason():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=60, n_positions=64)).eval()
    tokens = torch.randint(60, (2, 9))
    before = model(tokens).logits
    provenn.huggingface.convert(model, "urpe", max_length=16)
    torch.testing.assert_close(model(tokens).logits, before)
    assert model.transformer.h[0].attn.urpe.rel_scale.shape == (16, 2)
    deberta = DebertaV2ForMaskedLM(
        DebertaV2Config(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(UserError, match="inside a module of its own"):
        provenn.huggingface.convert(deberta, "urpe")
    with pytest.raises(UserError, match="takes no biases"):
        provenn.huggingface.convert(t5(), "hedgehog")
    with pytest.raises(UserError, match="max_length must be"):
        provenn.huggingface.convert(t5(), "urpe", max_length=0)
