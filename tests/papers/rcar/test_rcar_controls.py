"""Gradients of all pairs, holes in masks, pictures as tokens, probes that look at the right words, inspected maps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from provenn.papers.rcar import (
    RCAR,
    Matching,
    PictureEncoder,
    RegulatedCrossAttention,
    Similarity,
    WordEncoder,
    hinge,
    l2_normalise,
    studies,
)
from provenn.papers.rcar import model as systems
from provenn.papers.rcar.encoders import RegionEncoder
from provenn.papers.rcar.experiments import CELLS, EXPERIMENTS, HOSTS, STEPWISE
from provenn.papers.rcar.hosts import GraphReasoning, Step
from provenn.papers.rcar.inspection import draw, inspect
from provenn.papers.rcar.rivals import Pooled, loop_over_captions
from provenn.papers.rcar.studies import TASK, Variant, many, network, with_r1
from provenn.tasks.image_text_retrieval import Pairs

LENGTHS = [7, 3, 5, 1]
FEW = {"max_steps": 1, "batch_size": 2}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(mode="t2i", **options) -> Similarity:
    torch.manual_seed(1)
    model = Similarity(mode, embed_dim=16, align_dim=8, regions=5, **options).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("mode", ["t2i", "i2t"])
@pytest.mark.parametrize("options", [{}, {"rcr": 2}, {"rcr": 1, "rar": 2}, {"rcr": 2, "rar": 3}, {"rcr": 2, "rar": 1}])
def test_gradients_are_those_of_the_loop_over_captions(mode, options):
    """Feedback passes gradients: nothing on the way from a step's alignment to the next one is cut off."""
    model = made(mode, **options)
    regions, words = (
        l2_normalise(drawn(3, 5, 16)).requires_grad_(),
        l2_normalise(drawn(4, 7, 16, seed=1)).requires_grad_(),
    )
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    given = [regions, words, *model.parameters()]
    weights = drawn(3, 4, seed=2)
    slopes = [
        torch.autograd.grad((weights * table).sum(), given, allow_unused=True)
        for table in (model(regions, words, None, mask), loop_over_captions(model, regions, words, LENGTHS))
    ]
    for one, other in zip(*slopes):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("options", [{"rcr": 1, "rar": 2}, {"host": "saf"}, {"host": "sgr"}, {"host": "lse"}])
def test_words_that_are_not_real_may_stand_anywhere(options):
    model, regions, words = made(**options), l2_normalise(drawn(2, 5, 16)), l2_normalise(drawn(1, 7, 16, seed=1))
    real = torch.tensor([[False, True, False, True, True, False, True]])
    with torch.no_grad():
        holes = model(regions, words.masked_fill(~real[..., None], torch.nan), None, real)
        torch.testing.assert_close(holes, model(regions, words[:, real[0]]))


def test_a_step_over_the_graph_is_its_equation():
    step, a = GraphReasoning(4).double(), drawn(1, 1, 3, 4)
    nodes = a[0, 0]
    edges = (step.query(nodes) @ step.key(nodes).T).softmax(dim=1)
    torch.testing.assert_close(edges.sum(1), torch.ones(3).double())
    found = step(a, torch.ones(1, 1, 3, dtype=torch.bool))
    torch.testing.assert_close(found[0, 0], torch.relu(edges @ nodes @ step.out.weight.T + step.out.bias))


def test_the_layer_sees_no_padding_of_either_side():
    torch.manual_seed(0)
    layer, x, other = RegulatedCrossAttention(8, steps=2).double(), drawn(1, 5, 8), drawn(1, 6, 8, seed=1)
    own, theirs = torch.arange(5)[None] < 3, torch.arange(6)[None] < 4
    short = layer(x[:, :3], other[:, :4])
    filled = x.masked_fill(~own[..., None], torch.nan), other.masked_fill(~theirs[..., None], torch.nan)
    found = layer(*filled, mask=theirs, query_mask=own)[:, :3]
    torch.testing.assert_close(found, short)
    slopes = [torch.autograd.grad(each.sum(), list(layer.parameters())) for each in (found, short)]
    for one, other in zip(*slopes):
        torch.testing.assert_close(one, other)


# Systems


def test_a_picture_becomes_its_cells_row_by_row():
    torch.manual_seed(0)
    encoder, x = PictureEncoder(5, width=6, grid=2).double().eval(), torch.rand(1, 3, 32, 32, dtype=torch.float64)
    tokens = encoder(x)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(1, 4).double())
    maps = encoder.layers(x)[0]
    for row in (0, 1):
        for column in (0, 1):
            cell = maps[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
            where = torch.tensor([2.0 * row - 1, 2.0 * column - 1]).double()
            expected = encoder.linear(torch.cat([cell, where]))
            torch.testing.assert_close(tokens[0, 2 * row + column], expected / expected.norm())


def system(**options) -> Matching:
    torch.manual_seed(0)
    similarity = RCAR("t2i", 2, embed_dim=16, align_dim=8, dropout=0.0)
    return Matching(RegionEncoder(12, 16, 8), WordEncoder(20, 16, 6, dropout=0.0), similarity, **options)


def pairs(count: int = 4) -> Pairs:
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(6, 20, (count, 7), generator=generator)
    images = torch.randn(count, 5, 12, generator=generator)
    return Pairs(images, torch.ones(count, 5).bool(), text, torch.ones(count, 7).bool(), torch.arange(count))


def test_words_are_touched_in_training_alone_and_as_often_as_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(
        systems, "augment_words", lambda tokens, words, **options: (asked.append(options), (tokens, words))[1]
    )
    model, batch = system(touched=0.7), pairs()
    with torch.no_grad():
        table = model.eval()(batch.images, batch.tokens)
        assert float(model.training_loss(batch)) == pytest.approx(float(hinge(table)))
        assert not asked
        model.train().training_loss(batch)
    assert [(each["share"], each["vocab_size"], each["kept"]) for each in asked] == [(0.7, 20, (1, 2))]


def test_the_warm_up_of_coco_is_that_of_its_presets():
    from provenn.catalog import card

    listed = {preset.name: preset.options for preset in card("rcar").presets}
    assert listed["rcar_coco_t2i"]["warm_up"] == listed["rcar_coco_i2t"]["warm_up"] == systems.WARM_UP_COCO == 22_125
    assert systems.WARM_UP_F30K == 3396


def test_patches_of_clip_and_words_of_its_text_tower_match():
    from provenn.nn.towers import TextConfig, TextTower, VisionConfig, VisionTower

    torch.manual_seed(0)
    vision = VisionTower(VisionConfig("clip", 16, 1, 2, hidden=32, image=16, patch=8))
    text = TextTower(TextConfig("clip", 16, 1, 2, hidden=32, vocab=20, max_length=8, end_of_text=19))
    tokens = torch.cat([torch.randint(18, (3, 5)), torch.full((3, 1), 19)], 1)
    with torch.no_grad():
        patches, words = vision(torch.randn(2, 3, 16, 16)).last.patches, text(tokens).last
    scores = RCAR(embed_dim=16, align_dim=8).eval()(l2_normalise(patches), l2_normalise(words))
    assert scores.shape == (2, 3) and scores.std() > 0


# Studies: what decides a verdict


SMOKE = many(0, True)


def shown(monkeypatch, temperatures: list[list[float]]) -> None:
    """Words that are a filler, a fact, a fact and none, whose λ at each attention are given."""
    steps = [Step(torch.ones(4, 9), torch.tensor(row), None) for row in temperatures]
    monkeypatch.setattr(studies, "seen_words", lambda model, data: [(torch.tensor([0, 1, 1, -1]), steps)])


@pytest.mark.parametrize(
    "last, share",
    [([2.0, 5.0, 7.0, 50.0], 0.75), ([0.0, 0.0, 0.0, 50.0], 0.5), ([0.0, 0.0, 1.0, 0.0], 1.0), ([1.0, 0, 0, 9.0], 0)],
)
def test_sharper_is_the_share_of_facts_at_the_last_attention(monkeypatch, last, share):
    shown(monkeypatch, [[9.0, 1.0, 1.0, 50.0], last])
    assert studies.sharper_for_facts(torch.nn.Identity(), SMOKE) == pytest.approx(share)


def test_weights_grow_from_the_first_step_to_the_last(monkeypatch):
    model = network(Variant(rar=3), **SMOKE.options)
    steps = [torch.tensor(row) for row in ([0.4, 0.2, 0.2, 0.2], [0.2, 0.3, 0.1, 0.4], [0.1, 0.3, 0.5, 0.1])]
    monkeypatch.setattr(studies, "aggregated_words", lambda network, data: [(torch.tensor([0, 1, 1, -1]), steps)])
    assert studies.ratios(model, SMOKE) == pytest.approx([0.5, 1.0, 4.0])
    assert studies.growth(model, SMOKE) == pytest.approx(3.5)


def test_probes_look_at_pairs_of_the_test(monkeypatch):
    monkeypatch.setattr(studies, "SHOWN", 4)
    kinds = [of for of, _ in studies.seen_words(network(Variant(), **SMOKE.options).eval(), SMOKE)]
    assert [len(of) for of in kinds] == [len(texts[0]) for texts in SMOKE.test.tokens[:4]]
    assert [len(of) for of in kinds] != [len(texts[0]) for texts in SMOKE.train.gallery.tokens[:4]]


def test_both_directions_count_and_the_floor_is_more_than_chance(monkeypatch):
    assert with_r1({"text_r1": 0.2, "image_r1": 0.6})["r1"] == pytest.approx(0.4)
    for rule in (0.3, 0.0):
        monkeypatch.setattr(studies, "pooled_rule", lambda data, rule=rule: rule)
        assert TASK.dummy_baseline(SMOKE) == pytest.approx(max(rule, 1 / 200))


def test_the_study_searches_in_folds_of_200(monkeypatch):
    monkeypatch.setattr(
        studies, "drawn", lambda split, seed, count, fillers: (np.zeros((count, 9, 70), np.float32), [[[1, 2]]] * count)
    )
    data = many(0, False)
    assert (data.val.folds, data.test.folds, len(data.test)) == (2, 5, 1000)


def test_variants_become_what_they_say():
    tied = STEPWISE.variants["tied3"][1].similarity()
    assert tied.align[0] is tied.align[2] and tied.regulate[0] is tied.regulate[1]
    lse = HOSTS["lse"]["host"][1].similarity()
    assert (lse.mode, lse.host, lse.temperature, lse.lse) == ("i2t", "lse", 4.0, 5.0)
    assert [HOSTS[name]["host"][1].similarity().temperature for name in ("avg", "saf")] == [9.0, 9.0]
    for host, amount in CELLS:
        read = EXPERIMENTS[f"{host}_{amount}"]
        assert read.study is CELLS[host, amount] and (read.systems, read.baselines) == (("rcar",), ("host", "wide"))


def test_mean_tokens_leave_padding_out():
    torch.manual_seed(0)
    model = network(STEPWISE.variants["pooled"][1], **SMOKE.options).eval()
    assert isinstance(model, Pooled) and not any(p.requires_grad for p in model.matcher.parameters())
    tokens, real = l2_normalise(torch.randn(2, 4, 6)), torch.arange(4) < torch.tensor([[4], [2]])
    images = l2_normalise(torch.randn(3, 5, 6)), torch.ones(3, 5).bool()
    short = tokens[1:, :2], torch.ones(1, 2).bool()
    torch.testing.assert_close(model.similarity(images, (tokens, real))[:, 1:], model.similarity(images, short))


# Inspection


def pictured(mode: str) -> Matching:
    torch.manual_seed(0)
    similarity = RCAR(mode, 2, embed_dim=8, align_dim=4)
    return Matching(PictureEncoder(8, width=6, grid=2), WordEncoder(20, 8, 6, dropout=0.0), similarity).eval()


def asked(image: torch.Tensor | None = None, **options) -> SimpleNamespace:
    return SimpleNamespace(
        image=image, tokens=torch.tensor([[1, 7, 8, 2]]), words=("<start>", "a", "b", "<end>"), **options
    )


@pytest.mark.parametrize("mode", ["t2i", "i2t"])
def test_inspected_maps_are_where_each_word_looks(mode):
    model, image = pictured(mode), torch.rand(1, 3, 32, 32)
    rows = inspect(model, asked(image))
    steps = model.matcher.steps_of(model.encode_images(image)[0][0], model.encode_texts(asked().tokens)[0][0])[1]
    for number, step in enumerate(steps, 1):
        for place, word in enumerate(asked().words):
            weights = step.weights[place] if mode == "t2i" else step.weights[:, place]
            torch.testing.assert_close(rows[f"attention {number}, word {place + 1}: {word}"].flatten(), weights)
        assert torch.equal(rows[f"attention {number}: temperature"], step.temperature)


def test_a_text_alone_is_shown_on_the_scene_that_it_finds():
    model, scenes = pictured("t2i"), torch.rand(5, 3, 32, 32)
    best = model(scenes, asked().tokens)[:, 0].argmax()
    found, plain = inspect(model, asked(scenes=scenes)), inspect(model, asked(scenes[best : best + 1]))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("words", [1, 4, 30])
def test_tiles_lie_apart_and_within_the_picture(words):
    from matplotlib.figure import Figure

    said = tuple(f"w{k}" for k in range(words))
    x = SimpleNamespace(image=torch.rand(1, 3, 32, 32), tokens=torch.arange(words)[None] % 20, words=said)
    axes = Figure((8, 8)).subplots()
    draw(pictured("t2i"), x, {"mean": [0.5] * 3, "std": [0.25] * 3}, axes)
    boxes = [tile.get_axes_locator()(tile, None).transformed(axes.figure.transFigure) for tile in axes.child_axes]
    assert len(boxes) == 2 * words
    whole = axes.get_window_extent()
    for k, box in enumerate(boxes):
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
        for other in boxes[:k]:
            assert box.x0 >= other.x1 or other.x0 >= box.x1 or box.y0 >= other.y1 or other.y0 >= box.y1
    if words == 4:
        assert sum(box.width * box.height for box in boxes) > 0.5 * whole.width * whole.height


def test_the_small_preset_trains_on_features_of_regions(tmp_path):
    """As the command line does it, which also says what side pictures would have."""
    import provenn

    rng = np.random.default_rng(0)
    for split in ("train", "dev", "test"):
        np.save(tmp_path / f"{split}_ims.npy", rng.normal(size=(4, 6, 12)).astype(np.float32))
        lines = [f"a {('red', 'blue', 'green', 'dark')[k // 5]} disc number {k % 5}" for k in range(20)]
        (tmp_path / f"{split}_caps.txt").write_text("\n".join(lines))
    provenn.train("rcar", str(tmp_path), recipe=FEW, out=tmp_path / "run", device="cpu")
    model, label = provenn.paper("rcar").load(tmp_path / "run")
    assert isinstance(model.image, RegionEncoder) and label.options["features"] == 12
    assert isinstance(provenn.paper("rcar").build("rcar_small").image, PictureEncoder)
