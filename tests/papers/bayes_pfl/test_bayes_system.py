"""The system: prompts, samples, what learns in which stage, names, the authors' files, folders of CLIP."""

import re
import shutil
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

import provenn
from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.papers import bayes_pfl
from provenn.papers.bayes_pfl import bayes_clip, bayes_defects, official
from provenn.papers.bayes_pfl.augmentation import augment
from provenn.papers.bayes_pfl.clip import small_clip
from provenn.papers.bayes_pfl.experiments import one_by_one
from provenn.papers.bayes_pfl.model import CLIP_MEAN, CLIP_STD, Samples, Seen
from provenn.papers.bayes_pfl.official import convert, stage_of
from provenn.papers.bayes_pfl.training import _in_stage, stages
from provenn.papers.bayes_pfl.training.pictures import (
    KINDS,
    WORDS,
    Pictures,
    _draw,
    _vary,
    captioned,
    textures_of,
)
from provenn.papers.bayes_pfl.words import END, START, Letters, OneWord, called, prompts_of
from provenn.tasks import get_task
from provenn.training import Recipe

TINY = {
    "vision_dim": 64,
    "vision_depth": 2,
    "vision_heads": 1,
    "patch": 8,
    "text_dim": 64,
    "text_depth": 2,
    "layers": (1, 2),
}
NAMES = ["brick", "metal nut", "moss"]


def small(**options) -> nn.Module:
    torch.manual_seed(0)
    return bayes_defects(**{"samples": 2, "turn": False, **options}).double().eval()


def images(count: int = 3, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def batch(count: int = 3) -> tuple:
    masks = torch.zeros(count, 64, 64, dtype=torch.float64)
    masks[0, 10:30, 20:40] = 1
    return images(count), NAMES[:count], masks.amax((1, 2)), masks


# Counts: by hand, of the authors' modules, without decoders and the layers behind them.


def linear(n: int, m: int, bias: bool = True) -> int:
    return n * m + bias * m


def counted(vision: int, dim: int, layers: int = 4, flows: int = 10) -> int:
    hidden = vision // 2
    encoder = 2 * (linear(dim, hidden) + linear(hidden, hidden) + linear(hidden, dim))
    specific = 2 * linear(dim, flows * dim) + linear(dim, flows)
    states = 2 * (2 * flows * dim + flows + dim)
    pooling = linear(layers * vision, hidden) + linear(hidden, 1) + linear(hidden, dim)
    attention = linear(dim, dim) + layers * linear(vision, dim, False)
    return 3 * 15 * dim + 2 * encoder + specific + states + pooling + attention + 2 * linear(dim, dim) + 2


@pytest.mark.parametrize(
    ("name", "published", "clip", "late"),
    [
        ("bayes_vit_l14", 27_370_017 - 3_872_512, 428_756_225, 3_673_345),
        ("bayes_vit_b16", 13_080_865 - 1_871_872, 150_256_641, 1_902_849),
    ],
)
def test_counts_are_those_of_the_authors_modules(name, published, clip, late):
    with torch.device("meta"):
        model = getattr(bayes_pfl, name)()
        side = model.clip.vision_model.config.image
        assert model.eval()(torch.zeros(2, 3, side, side)).heat.shape == (2, side, side)
    assert count_parameters(model.clip) == clip
    vision = model.clip.vision_model.config.dim
    assert count_parameters(model) - clip == published == counted(vision, model.clip.dim)
    assert sum(p.numel() for p in model.of_stage(2)) == late


# Prompts


def test_prompts_are_put_together_as_the_paper_says():
    """Word by word: start, context and state words with their shifts, the name, its end."""
    model = small(prompts=2, context=3, state=2)
    tower = model.clip.text_model
    tokens, lengths = model.name_tokens(NAMES, 3)
    samples = Samples(torch.randn(2, 3, 64, dtype=torch.float64), torch.randn(2, 2, 64, dtype=torch.float64))
    found = model.embed_texts(tokens, lengths, samples)
    assert found.shape == (3, 2, 4, 64)
    for image, name in enumerate(NAMES):
        for state, words in enumerate((model.normal, model.abnormal)):
            for r in range(2):
                for pair in range(2):
                    row = torch.tensor([[*Letters().encode(name), END]])
                    parts = [
                        tower.embed(torch.tensor([[START]]))[0],
                        model.context[pair] + samples.context[r, image],
                        words[pair] + samples.states[r, state],
                        tower.embed(row)[0],
                    ]
                    text = model.clip.encode_text(embeddings=torch.cat(parts)[None])[0]
                    torch.testing.assert_close(found[image, state, 2 * r + pair], text / text.norm())


def test_one_call_for_all_texts_is_the_loop_of_the_authors():
    model = small()
    given = model.name_tokens(NAMES, 3)
    samples = model.draw(torch.randn(3, 64, dtype=torch.float64))
    torch.testing.assert_close(
        model.embed_texts(*given, samples), one_by_one(model, *given, samples), rtol=1e-9, atol=1e-9
    )


def test_an_answer_depends_on_its_image_and_name_alone():
    model, x = small(), images()
    together = model(x, NAMES)
    for row, name in enumerate(NAMES):
        alone = model(x[row : row + 1], [name])
        torch.testing.assert_close(alone.heat[0], together.heat[row])
        torch.testing.assert_close(alone.score[0], together.score[row])
    other = model(x, ["gravel", *NAMES[1:]])
    assert not torch.allclose(other.heat[0], together.heat[0]) and torch.equal(other.heat[1], together.heat[1])


def test_states_are_drawn_for_all_images_and_contexts_for_each():
    model = small(bias_scale=1.0)
    feature = torch.randn(3, 64, dtype=torch.float64)
    drawn = model.draw(feature)
    assert drawn.context.shape == (2, 3, 64) and drawn.states.shape == (2, 2, 64)
    torch.testing.assert_close(drawn.states, model.draw(feature[:1]).states)
    assert not torch.allclose(drawn.context[:, 0], drawn.context[:, 1])
    model.resample(1)
    again = model.draw(feature)
    assert not torch.allclose(again.states, drawn.states) and not torch.allclose(again.context, drawn.context)
    model.resample(0)
    torch.testing.assert_close(model.draw(feature).context, drawn.context)
    model.resample(0, samples=5)
    assert len(model.draw(feature).context) == 5


def test_without_distributions_it_is_the_deterministic_bank():
    model = small(specific=False, agnostic=False, samples=4)
    texts = model.prompt_embeddings(images(1), ["brick"])
    assert texts.shape == (1, 2, 3, 64)
    still = Samples(torch.zeros(1, 1, 64, dtype=torch.float64), torch.zeros(1, 2, 64, dtype=torch.float64))
    torch.testing.assert_close(texts, model.embed_texts(*model.name_tokens(["brick"], 1), still))
    full = small(bias_scale=0.0)
    full.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(full(images(), NAMES).heat, model(images(), NAMES).heat)
    _, divergence = model.draw_training(torch.randn(3, 64, dtype=torch.float64))
    assert divergence == 0


def test_maps_are_a_softmax_over_enlarged_logits():
    """As the authors write it: both logits enlarged, then a softmax, the abnormal share, the mean over all."""
    model, x = small(smoothing=0.0), images(2)
    seen = model.see(x)
    texts = model.embed_texts(*model.name_tokens(NAMES[:2], 2), model.draw(seen.feature))
    total = 0.0
    for mapping, patches in zip(model.to_text, seen.patches):
        local = mapping(patches)
        local = local / local.norm(dim=-1, keepdim=True)
        looked = model.attention(texts.flatten(1, 2), local)
        assert looked.norm(dim=-1).sub(1).abs().max() < 1e-6
        logits = (model.temperature_pixel.exp() * local @ looked.mT).mT.reshape(2, 12, 8, 8)
        large = nn.functional.interpolate(logits, (64, 64), mode="bilinear", align_corners=True)
        total = total + large.unflatten(1, (2, 6)).softmax(1)[:, 1].mean(1)
    said = model(x, NAMES[:2])
    torch.testing.assert_close(said.heat, total / 4)
    logits = model.image_logits(texts, seen)
    probability = logits.softmax(1)[:, 1].mean(1)
    top = said.heat.flatten(1).sort(1).values[:, -40:].mean(1)
    torch.testing.assert_close(said.score, 0.5 * probability + 0.5 * top)


def test_a_patch_heats_its_own_place_of_an_image_that_is_no_square():
    """Of a single patch that texts agree with, row by row: the heat lies at that patch, whichever side is longer."""
    model = small(attention="none", smoothing=0.0)
    texts = nn.functional.normalize(torch.randn(1, 2, 1, 64, dtype=torch.float64), dim=-1)
    toward = texts[0, 1, 0] - texts[0, 0, 0]
    with torch.no_grad():
        for mapping in model.to_text:
            mapping.weight.copy_(torch.cat([torch.eye(64), torch.zeros(64, mapping.in_features - 64)], 1))
    for rows, columns in ((3, 5), (5, 3), (2, 7)):
        for place in range(rows * columns):
            patches = -toward.repeat(1, rows * columns, 1)
            patches[0, place] = toward
            padded = nn.functional.pad(patches, (0, model.to_text[0].in_features - 64))
            seen = Seen(torch.zeros(1, 64, dtype=torch.float64), [padded] * 4, (rows, columns))
            # At the size of the grid itself each pixel is a patch; at another size the pixels near to it are hot.
            for one in model.maps(texts, seen, (rows, columns)):
                assert one.shape == (1, 1, rows, columns)
                assert (one > 0.5).flatten().nonzero().tolist() == [[place]]
            size = (8 * (rows - 1) + 1, 8 * (columns - 1) + 1)
            hottest = [int(one.flatten().argmax()) for one in model.maps(texts, seen, size)]
            expected = 8 * (place // columns) * size[1] + 8 * (place % columns)
            assert hottest == [expected] * 4


def test_a_mark_in_an_image_that_is_no_square_moves_with_it():
    """An image beside another is seen as its patches lie: the heat of each half changes most where the half changes."""
    model = small(smoothing=0.0)
    for side in ((40, 72), (72, 40)):
        plain = torch.zeros(1, 3, *side, dtype=torch.float64)
        seen = model.see(plain)
        assert seen.grid == (side[0] // 8, side[1] // 8)
        for row, column in ((0, 0), (0, seen.grid[1] - 1), (seen.grid[0] - 1, 0), (2, 3)):
            marked = plain.clone()
            marked[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 3
            change = (model.see(marked).patches[0] - seen.patches[0]).norm(dim=-1)[0]
            assert int(change.argmax()) == row * seen.grid[1] + column


def test_pixels_and_images_have_a_temperature_each_and_no_logit_exceeds_it():
    model, x = small(attention="none", smoothing=0.0), images(2)
    seen = model.see(x)
    texts = model.embed_texts(*model.name_tokens(NAMES[:2], 2), model.draw(seen.feature))

    def logits() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([one.logit() for one in model.maps(texts, seen, (8, 8))]), model.image_logits(texts, seen)

    assert model.temperature_pixel.exp().item() == model.temperature_image.exp().item() == pytest.approx(1 / 0.07)
    pixels, whole = logits()
    with torch.no_grad():
        model.temperature_pixel.add_(np.log(2))
    hotter, same = logits()
    torch.testing.assert_close(hotter, 2 * pixels)
    assert torch.equal(same, whole)
    with torch.no_grad():
        model.temperature_image.add_(np.log(3))
    unmoved, sharper = logits()
    assert torch.equal(unmoved, hotter)
    torch.testing.assert_close(sharper, 3 * whole)
    with torch.no_grad():
        model.temperature_pixel.zero_()
        model.temperature_image.zero_()
        for part in (*model.to_text, model.text_mapping, model.image_mapping, model.fuse.out):
            part.weight.mul_(1e4)  # lengths count for nothing
    cosines, whole = logits()
    # A map's logit is the difference of two cosines.
    assert cosines.abs().max() <= 2 and whole.abs().max() <= 1 + 1e-12
    same = nn.functional.normalize(torch.randn(1, 2, 1, 64, dtype=torch.float64), dim=-1)
    with torch.no_grad():
        model.temperature_image.fill_(np.log(7))
        model.text_mapping.weight.copy_(torch.eye(64))
        model.text_mapping.bias.zero_()
        with model.in_stage(1):
            reached = model.image_logits(same, seen._replace(feature=5 * same[:, 1, 0]))
    assert reached[0, 1, 0].item() == pytest.approx(7), "a text that is the image's own feature reaches exp(τ)"


def test_large_batches_are_taken_in_parts(monkeypatch):
    model, x = small(), images(5)
    names = [*NAMES, "a", "b"]
    whole = model(x, names)
    monkeypatch.setattr("provenn.papers.bayes_pfl.model.LARGEST", 2 * 2 * 3 * 64 * 64)
    parts = model(x, names)
    torch.testing.assert_close(parts.heat, whole.heat)
    torch.testing.assert_close(parts.score, whole.score)


def test_what_images_are_standardised_by_becomes_clips():
    torch.manual_seed(0)
    ours = bayes_clip(**TINY, image_size=32, samples=1).double().eval()
    theirs = bayes_clip(**TINY, image_size=32, samples=1, standardised="clip").double().eval()
    theirs.load_state_dict(ours.state_dict())
    pixels = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    imagenet = [
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ]
    one, other = ours((pixels - imagenet[0]) / imagenet[1]), theirs((pixels - mean) / std)
    torch.testing.assert_close(one.heat, other.heat)


def test_images_of_any_sides_are_taken():
    assert small()(torch.randn(1, 3, 40, 72, dtype=torch.float64)).heat.shape == (1, 40, 72)


def test_the_explanation_is_the_answer_with_its_spread():
    model, x = small(), images(2)
    found, said = model.explain(x, NAMES[:2]), model(x, NAMES[:2])
    torch.testing.assert_close(found.heat, said.heat)
    assert found.layers.shape == (4, 2, 64, 64) and found.spread.min() >= 0 and found.spread.max() > 0


# Stages


def learned(model: nn.Module, stage: int) -> set[str]:
    with model.in_stage(stage):
        model.requires_grad_(False)
        for parameter in model.of_stage(stage):
            parameter.requires_grad_(True)
        model.training_loss(batch()).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_exactly_these_learn_in_each_stage():
    model = small()
    cancelled = {"fuse.weigh.bias"}  # a softmax takes what all scores share away: its gradient is rounding alone
    everything = {name for name, _ in model.named_parameters()} - cancelled
    late = {name for name in everything if name.startswith(("fuse.", "image_mapping."))}
    first = learned(small(), 1) - cancelled
    assert everything - first == late | {name for name in everything if name.startswith("clip.")}
    mapped = {name for name in everything if name.startswith("text_mapping.")}
    assert learned(model, 2) - cancelled == late | mapped
    assert model.stage == 2


def test_stages_share_no_more_than_a_mapping():
    model = small()
    named = {id(p): name for name, p in model.named_parameters()}
    first, second = ({named[id(p)] for p in model.of_stage(stage)} for stage in (1, 2))
    assert first & second == {"text_mapping.weight", "text_mapping.bias"}
    assert first | second == {name for name in named.values() if not name.startswith("clip.")}


def test_a_loss_trains_the_chosen_pair_and_spreads_all():
    model = small(samples=1)
    with model.in_stage(1):
        torch.manual_seed(0)
        parts = model.losses(batch(), chosen=1)
        assert set(parts) == {"image", "pixel", "divergence", "orthogonal"}
        gradient = torch.autograd.grad(parts["pixel"] + parts["image"], model.normal, retain_graph=True)[0]
        assert gradient[1].abs().max() > 0 and gradient[[0, 2]].abs().max() == 0
        spread = torch.autograd.grad(parts["orthogonal"], model.normal)[0]
        assert spread.abs().amax((1, 2)).min() > 0
        torch.manual_seed(0)
        total = model.training_loss(batch())
    assert total.ndim == 0


def test_the_authors_divergence_divides_the_log_determinant_of_states():
    one, other = small(bias_scale=1.0), small(bias_scale=1.0, official_log_det=True)
    feature = torch.randn(8, 64, dtype=torch.float64)
    values = []
    for model in (one, other):
        torch.manual_seed(0)
        values.append(model.draw_training(feature)[1])
    torch.manual_seed(0)
    torch.randn_like(feature)
    log_det = one.agnostic(None, torch.randn(1, 2, 64, dtype=torch.float64)).log_det.sum()
    torch.testing.assert_close(values[1] - values[0], log_det * (1 - 1 / 8))


def test_rates_are_ten_and_a_hundred_times_as_large():
    model = small()
    for parameter in model.of_stage(1):
        parameter.requires_grad_(True)
    optimizer = model.optimizers(Recipe(optimizer="adam", lr=1e-4, betas=(0.5, 0.999)))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}
    assert {n for n, r in named.items() if r == pytest.approx(1e-2)} == {"temperature_pixel", "temperature_image"}
    fast = {n for n, r in named.items() if r == pytest.approx(1e-3)}
    assert {
        "context",
        "normal",
        "abnormal",
        "agnostic.states",
        "agnostic.free.u",
        "specific.amortised.w.weight",
    } <= fast
    assert not any("encoder" in name or "attention" in name or "to_text" in name for name in fast)
    assert all(group["betas"] == (0.5, 0.999) for group in optimizer.param_groups)
    assert len(named) == sum(p.requires_grad for p in model.parameters())


def test_what_does_not_decay_is_as_the_recipe_says():
    model = bayes_defects()
    recipe = Recipe(optimizer="adam", lr=1e-4, weight_decay=0.1, no_decay=("context", "fuse.*", "temperature*"))

    def decays() -> dict[str, float]:
        groups = model.optimizers(recipe).param_groups
        found = {id(p): (group["weight_decay"], group["lr"]) for group in groups for p in group["params"]}
        return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}

    for stage, still in ((1, {"context", "temperature_pixel", "temperature_image"}), (2, set())):
        with _in_stage(stage, model):
            found = decays()
            for name, (decay, _) in found.items():
                assert decay == (0.0 if name in still or name.startswith("fuse.") else 0.1), name
            if stage == 1:
                assert found["context"][1] == 10 * found["text_mapping.weight"][1] == pytest.approx(1e-3)
    vectors = model.optimizers(replace(recipe, no_decay=(), decay_vectors=False)).param_groups
    assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for group in vectors for p in group["params"])


def test_a_recipe_of_other_systems_is_refused_before_the_first_stage():
    task = get_task("anomaly-detection")
    data, model = task.load("defects"), bayes_defects()
    for recipe, message in (
        (Recipe(layer_decay=0.65), "layer_decay=0.65: the blocks of CLIP are frozen, .* leave layer_decay at 1"),
        (Recipe(no_decay=("*embedding*",)), r"no_decay: nothing that learns is called '\*embedding\*'; there are cont"),
    ):
        with pytest.raises(UserError, match=message):
            stages(model, task, data, recipe)
        with pytest.raises(UserError, match=message):
            model.optimizers(recipe)


def test_stages_follow_each_other():
    data = get_task("anomaly-detection").load("defects")
    task, recipe = get_task("anomaly-detection"), Recipe(epochs=24, schedule="cosine", warmup_steps=5, lr=1e-3)
    listed = stages(bayes_defects(), task, data, recipe)
    assert [stage.name for stage in listed] == ["clip", "prompts", "scores"]
    assert listed[1].task.metric == "pixel_ap" and listed[2].task.metric == "image_ap"
    assert (listed[2].recipe.epochs, listed[2].recipe.schedule) == (6, "constant")
    assert [stage.name for stage in stages(bayes_defects(stage=1, clip_steps=0), task, data, recipe)] == ["prompts"]
    with pytest.raises(UserError, match="give --set clip=FOLDER"):
        stages(bayes_clip(**TINY), task, data, recipe)
    model = bayes_defects()
    with listed[0].learning(model):
        assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"clip"}
    with listed[2].learning(model):
        assert model.stage == 2
    with listed[1].learning(model):
        assert model.stage == 1


def test_images_are_turned_with_their_masks():
    torch.manual_seed(0)
    masks = torch.zeros(40, 32, 32)
    masks[:, 4:10, 6:20] = 1
    pictures = 5 * masks[:, None].expand(-1, 3, -1, -1)
    changed, turned = augment(pictures, masks)
    assert set(turned.unique().tolist()) == {0.0, 1.0}
    assert sum(not torch.equal(one, other) for one, other in zip(turned, masks)) > 15
    bright = changed.mean(1) > changed.mean((1, 2, 3))[:, None, None] + 1
    agree = (bright == (turned > 0)).float().mean()
    assert agree > 0.95


# The small CLIP


def test_captions_are_true_of_their_images_and_of_no_other():
    drawn = _draw(("brick", "moon"), 3)
    assert drawn.images.shape == (80, 3, 64, 64) and (drawn.kind > 0).sum() == 40
    meta = {"mean": [0.5] * 3, "std": [0.25] * 3}
    first = list(captioned(("brick", "moon"), meta, seed=5, steps=2, batch=16))
    again = next(iter(captioned(("brick", "moon"), meta, seed=5, steps=2, batch=16)))
    assert torch.equal(first[0].tokens, again.tokens) and torch.equal(first[0].images, again.images)
    letters = {3 + place: letter for place, letter in enumerate(" -0123456789abcdefghijklmnopqrstuvwxyz")}
    for one in first:
        texts = ["".join(letters.get(token, "") for token in row if token > 1) for row in one.tokens.tolist()]
        assert one.positives.diagonal().all()
        whole = {word for words in WORDS[""] for word in [words]}
        for row, text in enumerate(texts):
            for column, other in enumerate(texts):
                fits = {t.split()[1] for t in (text, other)}
                good = {t.split()[0] in whole for t in (text, other)}
                if len(fits) > 1 or len(good) > 1:
                    assert not one.positives[row, column], (text, other)
    assert set(KINDS) == {"", "scratch", "blend", "stain"}


def test_where_a_defect_lies_follows_its_image():
    rng, place = np.random.default_rng(0), torch.arange(9).repeat(8)
    pictures = torch.zeros(72, 3, 63, 63)
    for row, where in enumerate(place.tolist()):
        pictures[row, :, 21 * (where // 3) + 10, 21 * (where % 3) + 10] = 1
    still = torch.zeros(72, dtype=torch.long)
    found = _vary(Pictures(pictures, still, still, place), rng)
    brightest = found.images.mean(1).flatten(1).argmax(1)
    assert (3 * (brightest // 63 // 21) + brightest % 63 // 21).tolist() == found.place.tolist()
    assert (found.place != place).float().mean() > 0.4


def test_the_small_clip_sees_no_texture_of_the_test():
    assert textures_of(["brick", "gravel"]) == ("brick", "gravel")
    data = get_task("anomaly-detection").load("defects")
    train = set(textures_of(data.meta["categories"]))
    assert train == set(data.train.drawn.categories) and not train & set(data.test.drawn.categories)
    assert set(textures_of(["bottle", "zipper"])) == train
    assert small_clip().vision_model.config.image == 64


# Names


@pytest.fixture
def parts(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 4:9] = 255
    for name in ("cap", "nut", "pin"):
        for number in range(10):
            for kind in ("good", "bad", "masks"):
                file = tmp_path / "parts" / name / kind / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = mask if kind == "masks" else rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file)
    return tmp_path / "parts"


def test_weights_are_tested_on_what_their_training_held_out(parts, tmp_path):
    overrides = {"unseen": "nut", "size": 16, "clip_steps": 1, "samples": 1}
    provenn.train("bayes_pfl", parts, recipe={"max_steps": 1, "batch_size": 2}, overrides=overrides, out=tmp_path)
    found = provenn.evaluate("bayes_pfl", parts, weights=tmp_path)
    assert found.examples == 12 and found.about == f"the test images of one category in {parts}"


def test_names_become_words():
    assert [called(name) for name in ("macaroni2", "pcb1", "metal_nut", "pipe_fryum", "Bottle")] == [
        "macaroni", "printed circuit board", "metal nut", "pipe fryum", "bottle",
    ]  # fmt: skip
    assert Letters().encode("Ab_é") == [15, 16, 3, 2]
    rows = prompts_of(["pcb4", "x"], Letters(), 40)
    assert rows[0] == [*Letters().encode("printed circuit board"), END]
    with pytest.raises(UserError, match=re.escape("'aaaaa' has 5 tokens, and a prompt has room for 4: shorten it")):
        prompts_of(["aaaaa"], Letters(), 5)
    with pytest.raises(UserError, match="a category has no name"):
        prompts_of([" "], Letters(), 5)
    with pytest.raises(UserError, match="needs CLIP's tokenizer"):
        OneWord().encode("bottle")
    model = small()
    with pytest.raises(UserError, match="3 images have 2 names of categories: expected one for each"):
        model(images(), ["a", "b"])
    torch.testing.assert_close(model(images()).heat, model(images(), ["object"] * 3).heat)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": 0}, "prompts must be at least 1, got 0"),
        ({"samples": -1}, "samples must be at least 1, got -1"),
        ({"context": 0, "state": 0}, "context and state are both 0"),
        ({"context": -1}, "context must not be negative, got -1"),
        ({"context": 40}, r"40 \+ 5 words leave no room in 48 tokens"),
        ({"attention": "cross"}, "attention must be one of rca, plain, none, got 'cross'"),
        ({"stage": 3}, "stage must be 1 or 2, got 3"),
        ({"smoothing": -1}, "smoothing must not be negative, got -1"),
        ({"bias_scale": float("nan")}, "bias_scale must be a finite number, got nan"),
        ({"flows": -1}, "steps and kinds must not be negative, got -1"),
        ({"prompts": True}, "prompts must be a whole number, got True"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bayes_defects(**options)


def test_bad_layers_and_activations_are_refused():
    with pytest.raises(ValueError, match=r"layers must be blocks from 1 to 2, got \(1, 3\)"):
        bayes_clip(**{**TINY, "layers": (1, 3)})
    with pytest.raises(ValueError, match="activation must be one of quick_gelu, gelu"):
        bayes_clip(**TINY, activation="relu")
    with pytest.raises(ValueError, match="standardised must be one of imagenet, clip, got 'own'"):
        bayes_clip(**TINY, standardised="own")


# Folders of Hugging Face, and the authors' files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP and a tokenizer of letters, as transformers writes them."""
    t = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    place = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256}
    config = t.CLIPConfig(
        text_config={**sizes, "num_attention_heads": 1, "vocab_size": 300, "eos_token_id": 299, "bos_token_id": 298},
        vision_config={**sizes, "num_attention_heads": 1, "image_size": 32, "patch_size": 8},
        projection_dim=64,
    )
    torch.manual_seed(0)
    t.CLIPModel(config).save_pretrained(place)
    words = {chr(code): code for code in range(256)} | {"<|startoftext|>": 298, "<|endoftext|>": 299}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    fast = t.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|startoftext|>", eos_token="<|endoftext|>")
    fast.save_pretrained(place)
    return place


HERE = {**TINY, "vocab": 300}


def test_a_clip_comes_from_its_folder(folder):
    model = bayes_clip(**HERE, image_size=48, clip=str(folder), activation="quick_gelu", samples=2).eval()
    assert model.pretrained and model.tokenizer.encode("nut") == [ord(letter) for letter in "nut"]
    assert (model.tokenizer.start, model.tokenizer.end) == (298, 299)
    assert model.clip.vision_model.embeddings.position_embedding.weight.shape == (37, 64)
    t = pytest.importorskip("transformers")
    theirs = t.CLIPModel.from_pretrained(folder).eval()
    tokens = torch.tensor([[298, *model.tokenizer.encode("nut"), 299]])
    with torch.no_grad():
        found = model.clip.encode_text(tokens)
        expected = theirs.text_projection(theirs.text_model(input_ids=tokens).pooler_output)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gelu = bayes_clip(**HERE, image_size=48, clip=str(folder)).eval()
    assert not torch.allclose(gelu.clip.encode_text(tokens), found, atol=1e-5)
    assert model(torch.randn(2, 3, 48, 48), ["nut", "bolt"]).heat.shape == (2, 48, 48)


@pytest.fixture
def unchecked():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)  # a label of JSON holds lists, which are no tuples
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_weights_find_their_clip_again_where_it_was_moved(folder, parts, tmp_path, unchecked):
    shutil.copytree(folder, tmp_path / "clip")
    overrides = {**HERE, "unseen": "nut", "size": 16, "samples": 1, "clip": str(tmp_path / "clip")}
    provenn.train(
        "bayes_pfl", parts, preset="bayes_vit_b16", recipe={"max_steps": 1, "batch_size": 2}, overrides=overrides,
        out=tmp_path / "run",
    )  # fmt: skip
    before = provenn.evaluate("bayes_pfl", parts, weights=tmp_path / "run").metrics
    (tmp_path / "clip").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"clip: there is no such folder, .* lies now with --set clip=FOLDER"):
        provenn.evaluate("bayes_pfl", parts, weights=tmp_path / "run")
    moved = {"clip": str(tmp_path / "moved")}
    assert provenn.evaluate("bayes_pfl", parts, weights=tmp_path / "run", overrides=moved).metrics == before
    picture = parts / "nut/bad/0.png"
    assert "score" in provenn.predict("bayes_pfl", [picture], weights=tmp_path / "run", overrides=moved)


def test_a_clip_of_other_sizes_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="its vision tower has dim 64, and this preset 1024"):
        bayes_pfl.bayes_vit_l14(clip=str(folder))
    with pytest.raises(UserError, match="there is no such folder"):
        bayes_clip(**TINY, clip=str(tmp_path / "none"))


def authors_head(model: nn.Module) -> dict[str, torch.Tensor]:
    """A head in the authors' names, with its copies and what computes nothing."""
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("clip.")}
    state = {
        "prompt_context": own["context"],
        "prompt_state_normal": own["normal"], "prompt_state_abnormal": own["abnormal"],
        "temperature_pixel": own["temperature_pixel"], "temperature_image": own["temperature_image"],
        "RCA.q_proj_pre.weight": own["attention.query.weight"][..., None],
        "RCA.q_proj_pre.bias": own["attention.query.bias"],
        "context_decoder.weight_mean.module.0.weight": torch.zeros(2, 2), "PFL_context.p_mu.0.bias": torch.zeros(2),
    }  # fmt: skip
    for ours, theirs, copies in (("specific", "context", ["context"]), ("agnostic", "state", ["normal", "abnormal"])):
        for part, name in (("mean", "weight_mean"), ("spread", "weight_log_variance")):
            for layer in (0, 2, 4):
                for what in ("weight", "bias"):
                    value = own[f"{ours}.encoder.{part}.{layer}.{what}"]
                    state[f"{theirs}_encoder.{name}.module.{layer}.{what}"] = value
                    for copy in copies:
                        state[f"PFL_{copy}.encoder.{name}.module.{layer}.{what}"] = value.clone()
    for name in "uwb":
        for what in ("weight", "bias"):
            state[f"PFL_context.amor_{name}.{what}"] = own[f"specific.amortised.{name}.{what}"]
    for row, kind in enumerate(("normal", "abnormal")):
        state[f"PFL_{kind}.state"] = own["agnostic.states"][row : row + 1]
        state[f"PFL_{kind}.amor_u"] = own["agnostic.free.u"][row : row + 1, :, :, None]
        state[f"PFL_{kind}.amor_w"] = own["agnostic.free.w"][row : row + 1, :, None]
        state[f"PFL_{kind}.amor_b"] = own["agnostic.free.b"][row : row + 1, :, None, None]
    renamed = (("to_text.", "RCA.linear_proj."), ("fuse.mix.", "fuse.fuse_modules."), ("fuse.weigh.", "fuse.compress."),
               ("fuse.out.", "fuse.post_process."), ("text_mapping.", "class_mapping."),
               ("image_mapping.", "image_mapping."))  # fmt: skip
    for name, value in own.items():
        for ours, theirs in renamed:
            if name.startswith(ours):
                state[theirs + name.removeprefix(ours)] = value
    return state


def test_a_released_head_loads_upon_its_clip(folder, tmp_path):
    """As the authors' trainer saves it: under MyModel, with copies and what computes nothing."""
    torch.manual_seed(3)
    made = bayes_clip(**HERE, image_size=32, clip=str(folder), samples=2, prompts=2, flows=3).eval()
    with torch.no_grad():
        for parameter in made.of_stage(1) + made.of_stage(2):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    torch.save({"MyModel": authors_head(made)}, tmp_path / "train_visa.pth")
    with pytest.warns(UserWarning, match="taken as a file of stage 2"):
        loaded = provenn.from_official("bayes_pfl", tmp_path / "train_visa.pth", clip=str(folder), samples=2)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x, ["nut", "bolt"]).heat, made(x, ["nut", "bolt"]).heat)
    torch.testing.assert_close(loaded(x, ["nut", "bolt"]).score, made(x, ["nut", "bolt"]).score)
    first = provenn.from_official("bayes_pfl", tmp_path / "train_visa.pth", clip=str(folder), samples=2, stage=1)
    assert first.fuse is None and first.stage == 1
    with pytest.raises(UserError, match="the file holds the head alone"):
        provenn.from_official("bayes_pfl", tmp_path / "train_visa.pth")


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What a conversion says to its user."""
    lines: list[str] = []
    monkeypatch.setattr(official.progress, "say", lines.append)
    return lines


def trained_in(stages_done: tuple[int, ...], folder) -> nn.Module:
    """A system in which stages moved what learns in them, as a training does; the rest is as it began."""
    torch.manual_seed(3)
    made = bayes_clip(**HERE, image_size=32, clip=str(folder), samples=2, prompts=2, flows=3).eval()
    with torch.no_grad():
        for stage in stages_done:
            for parameter in made.of_stage(stage):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


@pytest.mark.parametrize(("stages_done", "stage", "other"), [((1,), 1, 2), ((1, 2), 2, 1)])
def test_the_stage_of_a_released_head_follows_from_the_file_and_is_said(
    folder, tmp_path, said, stages_done, stage, other
):
    made = trained_in(stages_done, folder)
    file = tmp_path / f"epoch_post_7_{stage}.pth"
    torch.save({"MyModel": authors_head(made)}, file)
    loaded = provenn.from_official("bayes_pfl", file, clip=str(folder), samples=2)
    assert loaded.stage == stage and (loaded.fuse is None) == (stage == 1)
    assert len(said) == 1
    assert f"taken as a file of stage {stage}" in said[0] and f"--set stage={other}" in said[0]
    x = torch.randn(2, 3, 32, 32)
    with made.in_stage(stage):
        torch.testing.assert_close(loaded(x, ["nut", "bolt"]).score, made(x, ["nut", "bolt"]).score)
    with made.in_stage(other):
        assert not torch.allclose(loaded(x, ["nut", "bolt"]).score, made(x, ["nut", "bolt"]).score)


def test_a_stage_that_is_named_is_taken_without_a_word(folder, tmp_path, said):
    made = trained_in((1,), folder)
    torch.save({"MyModel": authors_head(made)}, tmp_path / "epoch_post_7_1.pth")
    for stage in (1, 2):
        file = tmp_path / "epoch_post_7_1.pth"
        loaded = provenn.from_official("bayes_pfl", file, clip=str(folder), samples=2, stage=stage)
        assert loaded.stage == stage
    assert not said


def test_one_step_of_the_second_stage_marks_a_file(folder):
    """By what Adam does to the parts of stage 2, and by what the authors' first stage leaves of them."""
    made = trained_in((1,), folder)
    assert stage_of(authors_head(made)) == 1
    names = ("fuse.mix.bias", "fuse.out.bias", "image_mapping.bias")
    for name, parameter in made.named_parameters():
        if name in names:
            before = parameter.detach().clone()
            with torch.no_grad():
                parameter[0] += 1e-4
            assert stage_of(authors_head(made)) == 2, name
            with torch.no_grad():
                parameter.copy_(before)
    bare = {name: v for name, v in authors_head(made).items() if not name.startswith(("fuse.", "image_mapping."))}
    assert stage_of(bare) == 1


def test_other_files_of_the_authors_are_refused(folder):
    made = bayes_clip(**HERE, image_size=32, prompts=2, flows=3)
    state = authors_head(made)
    spoilt = {**state, "PFL_normal.encoder.weight_mean.module.0.bias": torch.ones(32)}
    with pytest.raises(UserError, match="expected what state_encoder holds"):
        convert(spoilt, clip=str(folder))
    with pytest.raises(UserError, match="this is no Bayes-PFL head"):
        convert({"conv.weight": torch.zeros(2, 2)}, clip=str(folder))


def test_noise_is_the_same_everywhere():
    """What golden values rest on: the first numbers of the stream."""
    drawn = np.random.default_rng([0, 2503]).standard_normal(3)
    model = bayes_defects()
    assert model.noise.flatten()[:3].tolist() == pytest.approx(drawn.tolist(), rel=1e-6)
