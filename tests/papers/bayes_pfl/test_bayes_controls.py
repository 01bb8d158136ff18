"""How samples are scaled and drawn, the loss by its parts, starts, turns of images, and what studies read."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import provenn
from provenn.core.errors import UserError
from provenn.nn.anomaly import Anomalies
from provenn.papers.bayes_pfl import (
    PromptDistribution,
    ResidualCrossModalAttention,
    bayes_defects,
    bayes_for_category,
    dice_loss,
    focal_loss,
    kl_estimate,
    orthogonal_loss,
    words,
)
from provenn.papers.bayes_pfl import model as system
from provenn.papers.bayes_pfl.augmentation import augment
from provenn.papers.bayes_pfl.clip import small_clip
from provenn.papers.bayes_pfl.experiments import EXPERIMENTS, HEADS
from provenn.papers.bayes_pfl.inspection import inspect
from provenn.papers.bayes_pfl.layers import INIT, initialise
from provenn.papers.bayes_pfl.rivals import LocalContrast
from provenn.papers.bayes_pfl.studies import defects, image_auroc, kind_ap, network
from provenn.papers.bayes_pfl.training import stages
from provenn.papers.bayes_pfl.training.pictures import ACROSS, DOWN, Captioned, captioned, contrast
from provenn.papers.bayes_pfl.words import UNKNOWN, Letters
from provenn.tasks import get_task
from provenn.training import Recipe

NAMES = ["brick", "metal nut", "moss"]


def small(**options) -> nn.Module:
    torch.manual_seed(0)
    return bayes_defects(**{"samples": 2, "turn": False, **options}).double().eval()


def batch() -> tuple:
    generator = torch.Generator().manual_seed(1)
    masks = torch.zeros(3, 64, 64, dtype=torch.float64)
    masks[0, 10:30, 20:40] = 1
    return torch.randn(3, 3, 64, 64, generator=generator, dtype=torch.float64), NAMES, masks.amax((1, 2)), masks


# Samples


def test_training_draws_anew_and_scales_what_it_adds():
    feature = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = {}
    for scale in (1.0, 0.25):
        model = small(bias_scale=scale)
        torch.manual_seed(5)
        drawn[scale] = model.draw_training(feature)
    for one, other in zip(drawn[1.0][0], drawn[0.25][0]):
        torch.testing.assert_close(other, 0.25 * one)
    torch.testing.assert_close(drawn[1.0][1], drawn[0.25][1])  # the divergence is of the distributions themselves
    again, _ = model.draw_training(feature)
    assert all((one - other).abs().min() > 0 for one, other in zip(again, drawn[0.25][0]))
    assert again.context.shape == (1, 4, 64) and again.states.shape == (1, 2, 64)


def test_the_divergence_is_the_mean_of_images_and_the_sum_of_states():
    model, feature = small(), torch.randn(5, 64, dtype=torch.float64)
    torch.manual_seed(2)
    found = model.draw_training(feature)[1]
    torch.manual_seed(2)
    context = model.specific(feature, torch.randn_like(feature)[None])
    states = model.agnostic(None, torch.randn(1, 2, 64, dtype=torch.float64))
    torch.testing.assert_close(found, kl_estimate(context).mean() + kl_estimate(states).sum())


def test_states_and_contexts_have_noise_of_their_own():
    model, feature = small(bias_scale=1.0), torch.randn(2, 64, dtype=torch.float64)
    before = model.draw(feature)
    model.noise[0] = 0
    after = model.draw(feature)
    assert torch.equal(after.states, before.states) and not torch.equal(after.context, before.context)
    for state in (0, 1):
        model.noise[1 + state] += 1
        moved = model.draw(feature).states != after.states
        assert moved[:, state].any() and not moved[:, 1 - state].any()
        after = model.draw(feature)


# The loss


def test_the_loss_is_the_sum_of_its_parts_by_hand():
    model, (images, names, labels, masks) = small(), batch()
    with model.in_stage(1), torch.no_grad():
        torch.manual_seed(3)
        found = model.losses((images, names, labels, masks), chosen=2)
        torch.manual_seed(3)
        seen = model.see(images)
        samples, divergence = model.draw_training(seen.feature)
        texts = model.embed_texts(*model.name_tokens(names, 3), samples)
        pair = texts[:, :, 2:3]
        maps = [one[:, 0] for one in model.maps(pair, seen, (64, 64))]
        logits = model.temperature_image.exp() * torch.einsum(
            "bsd,bd->bs", F.normalize(model.text_mapping(pair[:, :, 0]), dim=-1), F.normalize(seen.feature, dim=-1)
        )
    expected = {
        "image": F.cross_entropy(logits, labels.long()),
        "pixel": sum(focal_loss(one, masks) + dice_loss(one, masks) for one in maps),
        "divergence": 0.01 * divergence,
        "orthogonal": orthogonal_loss(texts[:, 0]) + orthogonal_loss(texts[:, 1]),
    }
    assert len(maps) == 4 and set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_the_second_stage_compares_with_a_feature_that_patches_are_added_to():
    model, (images, *_) = small(), batch()
    seen, texts = model.see(images), F.normalize(torch.randn(3, 2, 4, 64, dtype=torch.float64), dim=-1)
    feature = model.image_mapping(seen.feature + model.fuse(seen.patches))
    cosines = torch.einsum("bspd,bd->bsp", F.normalize(model.text_mapping(texts), dim=-1), F.normalize(feature, dim=-1))
    torch.testing.assert_close(model.image_logits(texts, seen), model.temperature_image.exp() * cosines)


@pytest.mark.parametrize("stage", [1, 2])
def test_one_pair_of_the_bank_is_drawn_for_each_batch(stage, monkeypatch):
    model, given = small(), batch()
    chosen, asked = [], model.image_logits

    def pairs(texts, seen):
        chosen.append(texts)
        return asked(texts, seen)

    monkeypatch.setattr(model, "image_logits", pairs)
    with model.in_stage(stage), torch.no_grad():
        for pair in range(3):
            monkeypatch.setattr(system.torch, "randint", lambda high, size, pair=pair: torch.tensor([pair]))
            torch.manual_seed(0)
            model.training_loss(given)
    assert all(texts.shape[2] == 1 for texts in chosen)
    assert all(not torch.allclose(chosen[0], other) for other in chosen[1:]), "of one seed, and of other pairs"


@pytest.mark.parametrize("stage", [1, 2])
def test_images_of_training_are_turned_with_their_masks(stage, monkeypatch):
    monkeypatch.setattr(system, "augment", lambda images, masks: (images.flip(-1), masks.flip(-1)))
    images, names, labels, masks = batch()
    losses = []
    for turn, given in ((True, (images, masks)), (False, (images.flip(-1), masks.flip(-1)))):
        model = small(turn=turn)
        with model.in_stage(stage), torch.no_grad():
            torch.manual_seed(1)
            losses.append(model.training_loss((given[0], names, labels, given[1])))
    assert torch.equal(*losses)


def test_words_and_layers_start_as_the_authors_have_it():
    torch.manual_seed(0)
    model = bayes_defects(prompts=60)
    for bank, mean in ((model.context, 0.0), (model.normal, 0.5), (model.abnormal, -0.5)):
        assert bank.mean().item() == pytest.approx(mean, abs=1e-3)
        assert bank.std().item() == pytest.approx(INIT, rel=0.2)
    assert model.text_mapping.weight.std().item() == pytest.approx(INIT, rel=0.1)
    assert model.specific.encoder.mean[0].weight.std().item() == pytest.approx(INIT, rel=0.1)
    assert (model.text_mapping.bias == 0).all()
    attention = ResidualCrossModalAttention(64, 4)
    before = attention.query.weight.clone()
    initialise(nn.ModuleList([attention]))
    assert torch.equal(attention.query.weight, before), "as torch starts a convolution"
    assert model.attention.query.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.1)


def test_before_training_samples_are_noise_and_their_divergence_is_the_loss():
    """At the paper's size 0.01 of the divergence is 1.7 of contexts and 30 to 44 of each state, as the authors' is."""
    torch.manual_seed(0)
    feature = 10 * nn.functional.normalize(torch.randn(32, 768), dim=-1)  # as long as CLIP's are
    specific, agnostic = PromptDistribution(768, 512), PromptDistribution(768, 512, kinds=2)
    initialise(nn.ModuleList([specific, agnostic]))
    with torch.no_grad():
        context, states = specific(feature, torch.randn(1, 32, 768)), agnostic(None, torch.randn(1, 2, 768))
    assert float(system.KL_WEIGHT * kl_estimate(context).mean()) == pytest.approx(1.75, abs=0.3)
    assert all(30 < float(each) < 44 for each in system.KL_WEIGHT * kl_estimate(states)[0])
    assert float(context.z.std()) == pytest.approx(1.2, abs=0.05)
    assert all(float(each) == pytest.approx(3.25, abs=0.4) for each in states.z.std((0, 2)))


# Inspection


def test_inspected_spread_is_the_deviation_over_pairs():
    model, (images, *_) = small(smoothing=0.0), batch()
    rows, x = inspect(model, images[:1]), images[:1]
    seen = model.see(x)
    texts = model.embed_texts(*model.name_tokens(None, 1), model.draw(seen.feature))
    maps = torch.stack(list(model.maps(texts, seen, (64, 64))))[:, 0].detach()
    torch.testing.assert_close(rows["spread over prompts"], maps.std(1, correction=0).mean(0))
    torch.testing.assert_close(rows["defect"], maps.mean((0, 1)))
    torch.testing.assert_close(rows["layer 3"], maps[2].mean(0))


# One category


def test_a_system_for_one_category_answers_as_with_its_name(untyped):
    model, (images, *_) = small(), batch()
    fixed = bayes_for_category(model, "metal_nut")
    said = get_task("anomaly-detection").portable(fixed, {"size": 64, "mean": [0.4] * 3, "std": [0.2] * 3})
    assert said.outputs == ["score", "heat"]
    with torch.no_grad():
        written = torch.export.export(fixed, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
        for count in (2, 3):
            named, plain = model(images[:count], ["metal nut"] * count), fixed(images[:count])
            assert torch.equal(plain.heat, named.heat) and torch.equal(plain.score, named.score)
            torch.testing.assert_close(written(images[:count]).heat, named.heat)
            assert not torch.allclose(model(images[:count]).heat, named.heat)
    assert model.reads_names and len(model.unnamed) == len("object") + 1
    with pytest.raises(UserError, match="a category has no name"):
        bayes_for_category(model, " ")


def test_a_category_is_named_to_what_is_inspected_and_exported(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "part.png")
    unnamed, named = (provenn.inspect("bayes_pfl", tmp_path / "part.png", text=text) for text in (None, "brick"))
    assert "brick" in named.title and not torch.equal(named.layers["defect"], unnamed.layers["defect"])
    with pytest.raises(UserError, match="one category"):
        provenn.export("bayes_pfl", None, tmp_path / "part.onnx")
    lines = provenn.export("bayes_pfl", None, tmp_path / "part.onnx", text="brick")
    assert "for 'brick'" in lines
    session = onnxruntime.InferenceSession(tmp_path / "part.onnx", providers=["CPUExecutionProvider"])
    image = (pixels.transpose(2, 0, 1)[None] / 255).astype(np.float32)
    heat = session.run(["heat"], {"image": image})[0]
    np.testing.assert_allclose(heat[0], named.layers["defect"].numpy(), atol=1e-3)
    with pytest.raises(UserError, match="reads no text"):
        provenn.export("eca_net", None, tmp_path / "e.onnx", text="brick")


def test_letters_that_no_name_of_textures_has_are_named_once(monkeypatch):
    said: list[str] = []
    words._say_unknown.cache_clear()
    monkeypatch.setattr(words.progress, "say", said.append)
    for _ in range(3):
        assert Letters().encode("öse 日") == [UNKNOWN, 33, 19, 3, UNKNOWN]
    assert len(said) == 1 and "'öse 日'" in said[0] and "ö日" in said[0]
    Letters().encode("metal_nut 3-b")
    assert len(said) == 1


# Images of training


def test_images_turn_by_up_to_30_degrees_and_by_quarters():
    torch.manual_seed(0)
    side, radius = 65, 20
    masks = torch.zeros(200, side, side)
    masks[:, 32 - 2 : 32 + 3, 32 + radius - 2 : 32 + radius + 3] = 1  # a spot to the right of the middle
    _, turned = augment(torch.zeros(200, 3, side, side), masks)
    along = torch.arange(side) - 32.0
    mass = turned.sum((1, 2))
    down, across = ((turned * grid).sum((1, 2)) / mass for grid in (along[:, None], along))
    assert (torch.hypot(down, across) - radius).abs().max() < 1.5, "neither sheared nor scaled"
    degrees = torch.rad2deg(torch.atan2(down, across)) % 360
    rest = (degrees + 45) % 90 - 45
    assert rest.abs().max() < 32 and (rest.abs() > 5).float().mean() > 0.3 and (rest.abs() < 1).float().mean() > 0.3
    assert set(((degrees - rest).round() % 360).tolist()) == {0.0, 90.0, 180.0, 270.0}


# The small CLIP


def test_captions_that_name_another_place_are_not_true():
    meta = {"mean": [0.5] * 3, "std": [0.25] * 3}
    letters = {3 + place: letter for place, letter in enumerate(" -0123456789abcdefghijklmnopqrstuvwxyz")}
    other = 0
    for one in captioned(("brick", "moon"), meta, seed=5, steps=2, batch=32):
        texts = ["".join(letters.get(token, "") for token in row if token > 1) for row in one.tokens.tolist()]
        places = [tuple(word for word in text.split() if word in (*ACROSS, *DOWN)) for text in texts]
        for row in range(32):
            for column in range(32):
                if places[row] and places[column] and places[row] != places[column]:
                    assert not one.positives[row, column], (texts[row], texts[column])
                    other += 1
    assert other > 50


def test_a_caption_may_be_true_of_several_images():
    torch.manual_seed(0)
    pair, images = small_clip(), torch.randn(3, 3, 64, 64)
    tokens = torch.tensor([[0, 10, 1], [0, 11, 1], [0, 12, 1]])
    apart = torch.eye(3, dtype=torch.bool)
    alike = apart.clone()
    alike[0, 1] = True
    pair.requires_grad_(False)
    one, other = (float(contrast(pair, Captioned(images, tokens, truth))) for truth in (apart, alike))
    logits = pair.logits(pair.encode_image(images), pair.encode_text(tokens))
    assert one == pytest.approx(float(pair.loss(logits, apart)), rel=1e-5)
    assert other == pytest.approx(float(pair.loss(logits, alike)), rel=1e-5) and abs(one - other) > 1e-4


def test_both_towers_of_the_small_clip_learn():
    task = get_task("anomaly-detection")
    model = bayes_defects(clip_steps=1)
    first = stages(model, task, defects(0, True), Recipe())[0]
    with first.learning(model):
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if name.startswith("clip.")}


# Studies


@pytest.fixture(scope="module")
def data():
    return defects(0, True)


class Marks(nn.Module):
    """A map that marks the defects of chosen images, by the pixels of its own images, or all of an image."""

    def __init__(self, known: dict[bytes, torch.Tensor]):
        super().__init__()
        self.known = known

    def forward(self, images: torch.Tensor) -> Anomalies:
        heat = torch.stack([self.known.get(x.numpy().tobytes(), torch.zeros(x.shape[1:])) for x in images])
        return Anomalies(heat.amax((1, 2)), heat)


def test_good_images_count_against_a_kind(data):
    test = data.test
    rows = {kind: [k for k, each in enumerate(test.drawn.kinds) if each == kind] for kind in ("blend", "")}
    right = {test[k][0].numpy().tobytes(): test[k][3] for k in rows["blend"]}
    false = {test[k][0].numpy().tobytes(): torch.ones_like(test[k][3]) for k in rows[""]}
    assert kind_ap(Marks(right), data, "blend") == 1
    assert kind_ap(Marks({**right, **false}), data, "blend") < 0.9


def test_images_are_told_by_their_score_on_the_test(data):
    def scored(split, flip: bool) -> nn.Module:
        known = {}
        for k in range(len(split)):
            image, _, label, mask = split[k]
            known[image.numpy().tobytes()] = torch.full_like(mask, float(bool(label) != flip))
        return Marks(known)

    assert image_auroc(scored(data.test, False), data) == 1 and image_auroc(scored(data.test, True), data) == 0
    assert image_auroc(scored(data.val, False), data) == 0.5, "which knows no image of the test"


def test_noise_of_states_is_of_a_words_size_in_training():
    torch.manual_seed(0)
    model = network(HEADS["noise"][1])
    states = torch.cat([model.draw_training(torch.zeros(1, 64))[0].states for _ in range(40)])
    assert states.std().item() == pytest.approx(INIT, rel=0.1)
    assert not torch.equal(states[0], states[1])


def test_local_contrast_learns_to_mark_defects():
    torch.manual_seed(0)
    model = LocalContrast()
    images, masks = torch.randn(4, 3, 32, 32), torch.zeros(4, 32, 32)
    images[:, :, 10:16, 10:16] += 6
    masks[:, 10:16, 10:16] = 1
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        model.training_loss((images, ["a"] * 4, masks.amax((1, 2)), masks)).backward()
        optimizer.step()
    heat = model.eval()(images).heat
    assert heat[masks > 0].mean() > heat[masks == 0].mean() + 0.3


def test_experiments_read_the_metric_that_they_name():
    metrics = {name: each.metric for name, each in EXPERIMENTS.items() if hasattr(each, "metric")}
    for kind in ("blend", "stain"):
        place = f"forms_of_{kind}s"
        probe = EXPERIMENTS[place].study.probes[metrics[place]]
        assert probe.keywords == {"kind": kind}
    assert (metrics["cover_over_others"], metrics["spread_over_gaussian"]) == ("cover", "spread")
    assert metrics["full_image_auroc"] == "image AUROC" and metrics["full_ap"] is None
    assert metrics["regularised_at_equal_skill"] == "unseen at the level"
