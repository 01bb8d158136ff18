"""Augmentation, mixing and label smoothing: what they do, when they draw, and where they are refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import miniature
from provenn import catalog
from provenn.core.errors import UserError
from provenn.tasks import TaskData, get_task
from provenn.training import Hardware, Recipe, Saving, check_recipe, fit
from provenn.training.augmentation import AugmentedImages, augmented, mixed
from provenn.training.order import EpochSampler
from provenn.training.recipes import block_depths, recipe_of

TASK = get_task("image-classification")
RECIPE = Recipe(epochs=2, batch_size=8, optimizer="sgd", lr=0.1)


def images(count: int = 24, channels: int = 3, classes: int = 4) -> TaskData:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    pixels = torch.rand(count, channels, 12, 12, generator=generator) + labels[:, None, None, None] / classes
    whole = TensorDataset(pixels - 0.9, labels)
    meta = {"mean": [0.45] * channels, "std": [0.5] * channels}
    return TaskData("made", whole, whole, whole, "", {"num_classes": classes, "in_channels": channels}, meta)


def net(channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(144 * channels, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4))


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_mixup_is_the_same_share_of_images_and_of_classes():
    data = images()
    pixels, labels = data.train.tensors
    shares = []
    for seed in range(20):
        torch.manual_seed(seed)
        got, targets = mixed([pixels, labels], replace(RECIPE, mixup=0.8), data)
        share = targets[0, 0].item()  # of the first image, of class 0, with the last, of class 3
        torch.testing.assert_close(got[0], share * pixels[0] + (1 - share) * pixels[-1])
        torch.testing.assert_close(targets[0], torch.tensor([share, 0, 0, 1 - share]))
        shares.append(share)
    assert min(shares) < 0.2 and max(shares) > 0.8  # Beta(0.8, 0.8) is flat and a little more at its ends
    torch.testing.assert_close(targets.sum(1), torch.ones(len(labels)))


def test_cutmix_shows_another_image_in_the_rectangle_that_the_classes_tell():
    data = images()
    pixels, labels = data.train.tensors
    for seed in range(20):
        torch.manual_seed(seed)
        got, targets = mixed([pixels, labels], replace(RECIPE, cutmix=1.0), data)
        inside = (got[0] == pixels[-1]).all(0)
        assert bool((inside | (got[0] == pixels[0]).all(0)).all())
        rows, columns = inside.any(1), inside.any(0)
        assert bool((inside == rows[:, None] & columns).all()), "one rectangle"
        assert targets[0, 3].item() == pytest.approx(inside.float().mean().item())
    torch.testing.assert_close(data.train.tensors[0], images().train.tensors[0])  # the data are left alone


def test_of_both_mixings_one_is_drawn_and_without_either_the_batch_stays():
    data = images()
    batch = list(data.train.tensors)
    assert mixed(batch, RECIPE, data) is batch
    kinds = set()
    for seed in range(20):
        torch.manual_seed(seed)
        got, _ = mixed(batch, replace(RECIPE, mixup=0.8, cutmix=1.0), data)
        kinds.add(bool(((got[0] == batch[0][0]) | (got[0] == batch[0][-1])).all()))
    assert kinds == {True, False}


def test_label_smoothing_spreads_a_share_of_each_target():
    model, batch = net().eval(), list(images().train.tensors)
    log = model(batch[0]).log_softmax(1)
    hard, even = -log.gather(1, batch[1][:, None]).mean(), -log.mean()
    torch.testing.assert_close(TASK.loss(model, batch, 0.1), 0.9 * hard + 0.1 * even)
    soft = [batch[0], F.one_hot(batch[1], 4).float()]
    torch.testing.assert_close(TASK.loss(model, soft, 0.1), TASK.loss(model, batch, 0.1))


def test_only_training_batches_are_mixed_and_the_same_seed_mixes_alike():
    data, recipe = images(), replace(RECIPE, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    first, again, plain = (fit(net, TASK, data, each, seed=3) for each in (recipe, recipe, RECIPE))
    assert same(first.model, again.model) and not same(first.model, plain.model)
    with torch.no_grad():
        assert first.metrics == TASK.evaluate(first.model, data.test)


def by_kornia(**more) -> Recipe:
    pytest.importorskip("kornia")
    return replace(RECIPE, rand_augment=9, random_erasing=0.5, **more)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_drawn_for_an_image_follows_from_seed_epoch_and_place(channels):
    data, recipe = images(channels=channels), by_kornia()
    sampler = EpochSampler(24, 0)
    changed = augmented(data, recipe, 5, sampler)
    before = torch.get_rng_state()
    first = [changed[i][0] for i in range(24)]
    assert torch.equal(torch.get_rng_state(), before), "dropout draws on as if nothing had been drawn"
    assert all(torch.equal(changed[i][0], first[i]) for i in reversed(range(24)))
    assert first[0].shape == (channels, 12, 12) and first[0].isfinite().all()
    altered = [not torch.equal(image, data.train[i][0]) for i, image in enumerate(first)]
    assert sum(altered) > 18 and [changed[i][1] for i in range(24)] == list(data.train.tensors[1])
    sampler.set_epoch(1)
    assert sum(torch.equal(changed[i][0], first[i]) for i in range(24)) < 4
    other = augmented(data, recipe, 6, EpochSampler(24, 0))
    assert sum(torch.equal(other[i][0], first[i]) for i in range(24)) < 4


def test_erasing_puts_a_rectangle_to_the_mean_and_policies_are_kornias():
    pytest.importorskip("kornia")
    data = images()
    erased = augmented(data, replace(RECIPE, random_erasing=1.0), 0, EpochSampler(24, 0))
    holes = [(erased[i][0] == 0).all(0).float().mean().item() for i in range(24)]
    assert min(holes) > 0 and 0.02 / 2 < sum(holes) / 24 < 1 / 3
    assert augmented(data, RECIPE, 0, EpochSampler(24, 0)) is data.train
    names = {
        name: type(AugmentedImages(data, replace(RECIPE, **{name: value})).policy).__name__
        for name, value in {"rand_augment": 9, "auto_augment": "cifar10"}.items()
    }
    assert names == {"rand_augment": "RandAugment", "auto_augment": "AutoAugment"}


class Broken(type(TASK)):
    """Loses its patience in the middle."""

    left = 10**9

    def loss(self, model, batch, smoothing=0.0):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().loss(model, batch, smoothing)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_broke_off_within_an_epoch_goes_on_bit_for_bit(tmp_path, workers):
    data, recipe = images(), by_kornia(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    whole = fit(net, TASK, data, recipe, seed=4)
    task = Broken()
    task.left = 4  # of three steps an epoch
    with pytest.raises(KeyboardInterrupt):
        fit(net, task, data, recipe, seed=4, hardware=Hardware(workers=workers), saving=Saving(tmp_path, save_every=1))
    resumed = fit(
        net,
        TASK,
        data,
        recipe,
        seed=4,
        hardware=Hardware(workers=workers),
        saving=Saving(tmp_path, save_every=1, resume=True),
    )
    assert resumed.steps == whole.steps == 6 and same(resumed.model, whole.model)


def test_crops_take_as_little_as_the_recipe_says(tmp_path):
    data = TASK.load(miniature.write("imagenet-1k", tmp_path), size=32)
    whole = augmented(data, replace(RECIPE, crop=1.0), 0, EpochSampler(9, 0))
    assert whole.examples.images.least_area == 1.0 and data.train.least_area == 0.25
    assert whole[0][0].shape == data.train[0][0].shape
    other = images()
    assert torch.equal(augmented(other, replace(RECIPE, crop=0.08), 0, EpochSampler(24, 0))[0][0], other.train[0][0])


@pytest.mark.parametrize(
    ("task", "overrides", "says"),
    [
        ("language-modelling", {"mixup": 0.8}, "mixup is of images with classes; language-modelling has none"),
        ("super-resolution", {"rand_augment": 9}, "rand_augment is of images with classes; super-resolution has none"),
        (
            "series-forecasting",
            {"label_smoothing": 0.1},
            "label_smoothing is of targets .*; series-forecasting smooths",
        ),
    ],
)
def test_what_a_task_cannot_do_is_refused(task, overrides, says):
    with pytest.raises(UserError, match=says):
        check_recipe(Recipe(**overrides), get_task(task))
    check_recipe(Recipe(), get_task(task))


def test_what_data_or_systems_cannot_do_is_refused(monkeypatch):
    data = images()
    with pytest.raises(UserError, match="mixup needs the number of classes, which made does not say"):
        mixed(list(data.train.tensors), replace(RECIPE, mixup=1.0), replace(data, options={}))

    class Own(nn.Linear):
        def training_loss(self, batch):
            raise AssertionError

    with pytest.raises(UserError, match="Own brings a loss of its own, which mixup does not reach"):
        fit(lambda: Own(2, 2), TASK, data, replace(RECIPE, mixup=1.0))
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError,
        match=r"rand_augment needs the package kornia: pip install 'provenn\[augment\]', or --recipe rand_augment=0",
    ):
        check_recipe(replace(RECIPE, rand_augment=9), TASK)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, 2))
        self.embed = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(2, 1, 4) for _ in range(3))
        self.head = nn.Linear(2, 2)


def test_rates_fall_with_the_depth_of_the_block():
    model = Tower()
    optimizer = recipe_of({"layer_decay": 0.5, "lr": 0.8, "weight_decay": 0.1, "decay_vectors": False}).make_optimizer(
        model
    )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rates = {name: groups[id(p)]["lr"] for name, p in model.named_parameters()}
    assert rates["place"] == rates["embed.weight"] == pytest.approx(0.05)
    assert [rates[f"blocks.{i}.linear1.weight"] for i in range(3)] == pytest.approx([0.1, 0.2, 0.4])
    assert rates["head.bias"] == pytest.approx(0.8)
    decays = {name: groups[id(p)]["weight_decay"] for name, p in model.named_parameters()}
    assert decays["head.bias"] == 0 and decays["blocks.0.linear1.weight"] == 0.1
    recipe = Recipe(layer_decay=0.5, lr=0.8, schedule="linear", final_lr=0.2)
    optimizer = recipe.make_optimizer(model)
    factor = recipe.make_schedule(optimizer, 10, 5).lr_lambdas[0]
    assert [factor(step) for step in (0, 5, 10)] == pytest.approx([1, 0.625, 0.25])
    with pytest.raises(UserError, match="layer_decay needs blocks in a row, and Linear has none"):
        block_depths(nn.Linear(1, 1))


def test_parameters_are_left_without_decay_by_name():
    model = Tower()
    recipe = recipe_of({"no_decay": "place, *.norm1.*", "weight_decay": 0.1, "optimizer": "adamw", "eps": 1e-6})
    optimizer = recipe.make_optimizer(model)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    spared = {name for name, p in model.named_parameters() if groups[id(p)]["weight_decay"] == 0}
    assert spared == {"place"} | {f"blocks.{i}.norm1.{part}" for i in range(3) for part in ("weight", "bias")}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}
    with pytest.raises(UserError, match=r"no_decay: no parameter is called 'plase'; there are place, embed.weight"):
        replace(recipe, no_decay=("plase",)).make_optimizer(model)


def test_the_inverse_square_root_starts_where_the_warm_up_ends():
    recipe = Recipe(schedule="inverse-sqrt", warmup_steps=4)
    factor = recipe.make_schedule(torch.optim.SGD(net().parameters(), 1.0), 100, 10).lr_lambdas[0]
    assert [factor(step) for step in (0, 3, 15, 63)] == pytest.approx([0.25, 1, 0.5, 0.25])


PRESETS = [(card, preset) for card in catalog.cards().values() for preset in card.presets if preset.recipe]


def test_every_recipe_of_every_paper_is_one_and_fits_its_task():
    for card, preset in PRESETS:
        recipe = recipe_of(preset.recipe)
        unaided = replace(recipe, rand_augment=0, auto_augment=None, random_erasing=0.0)  # without kornia
        check_recipe(unaided, get_task(card.task_of(preset)))


def test_the_papers_own_groups_are_those_of_their_code():
    card = catalog.card("moh")
    recipe = recipe_of(card.preset("moh_vit_small_75").recipe)
    assert (recipe.batch_size * recipe.accumulate, recipe.mixup, recipe.rand_augment) == (1024, 0.8, 9)
    with torch.device("meta"):
        model = card.resolve("vit:moh_vit_small_75")()
    kept = {
        id(p) for group in recipe.make_optimizer(model).param_groups if group["weight_decay"] for p in group["params"]
    }
    decaying = {
        name.rpartition(".")[2] if "position" not in name else name
        for name, p in model.named_parameters()
        if id(p) in kept
    }
    assert not any(
        "position" in name or name in ("bias", "temperature", "query_embedding", "local_bias") for name in decaying
    )
    assert {"weight", "local_tokens", "local_shift"} <= decaying
