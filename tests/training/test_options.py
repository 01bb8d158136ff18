"""Options of a training: sums of gradients, averages, groups without decay, files on the way, loggers, workers."""

import csv
import importlib.util
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jaxtyping
import pytest
import torch
from line_task import RECIPE, Line, build
from torch import nn
from torch.utils.data import Dataset, Subset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.training import Hardware, Recipe, Saving, fit, history
from provenn.training.checkpoints import CHECKPOINT
from provenn.training.history import BestModels
from provenn.training.recipes import recipe_of

TASK, DATA = Line(), Line().load()


def with_dropout():
    return build(dropout=0.3)


def same(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_two_batches_of_eight_are_one_of_sixteen():
    recipe = replace(RECIPE, warmup_steps=3)
    summed = fit(build, TASK, DATA, replace(recipe, accumulate=2))
    whole = fit(build, TASK, DATA, replace(recipe, batch_size=16))
    assert summed.steps == whole.steps == 12
    for ours, theirs in zip(summed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert summed.series("train_loss") == pytest.approx(whole.series("train_loss"))


@pytest.mark.parametrize("count", [64, 60, 41, 25, 3])
def test_the_last_step_of_an_epoch_is_the_mean_over_its_examples_too(count):
    """With three batches of eight a step, 60 examples leave two batches, 41 two and one of one."""
    data = replace(DATA, train=Subset(DATA.train, range(count)))
    recipe = replace(RECIPE, clip=None, momentum=0.0, lr=0.01)
    summed = fit(build, TASK, data, replace(recipe, accumulate=3))
    whole = fit(build, TASK, data, replace(recipe, batch_size=24))
    assert summed.steps == whole.steps
    for ours, theirs in zip(summed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


class Broken(Line):
    """Breaks off at a step."""

    def __init__(self, step: int):
        self.left = step

    def loss(self, model, batch):
        self.left -= model.training
        if self.left < 0:
            raise RuntimeError("the machine went down")
        return super().loss(model, batch)


@pytest.mark.parametrize("overrides", [{}, {"accumulate": 2, "batch_size": 4}, {"ema": 0.9, "optimizer": "adamw"}])
@pytest.mark.parametrize("batches", [5, 13, 23])
def test_a_run_that_broke_off_in_an_epoch_goes_on_from_its_last_step_bit_for_bit(tmp_path, overrides, batches):
    recipe = replace(RECIPE, schedule="onecycle", **overrides)
    whole = fit(with_dropout, TASK, DATA, recipe, seed=6)
    batches *= recipe.accumulate
    with pytest.raises(RuntimeError, match="the machine went down"):
        fit(with_dropout, Broken(batches), DATA, recipe, seed=6, saving=Saving(tmp_path, save_every=2))
    again = Broken(1000)
    resumed = fit(with_dropout, again, DATA, recipe, seed=6, saving=Saving(tmp_path, resume=True, save_every=2))
    assert same(whole.model, resumed.model) and resumed.curve == whole.curve and resumed.steps == whole.steps == 24
    repeated = 1000 - again.left - (24 * recipe.accumulate - batches)
    assert 0 <= repeated < 2 * recipe.accumulate, "what came after the last checkpoint"


def test_a_long_epoch_is_saved_before_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "MOST_LOST", 0.0)
    whole = fit(with_dropout, TASK, DATA, RECIPE, seed=6)
    with pytest.raises(RuntimeError, match="the machine went down"):
        fit(with_dropout, Broken(4), DATA, RECIPE, seed=6, saving=Saving(tmp_path))
    again = Broken(1000)
    resumed = fit(with_dropout, again, DATA, RECIPE, seed=6, saving=Saving(tmp_path, resume=True))
    assert same(whole.model, resumed.model) and resumed.curve == whole.curve
    assert 1000 - again.left < whole.steps, "nothing of the epoch was kept"


def test_the_best_epochs_are_kept_and_no_others(tmp_path):
    class Scripted(Line):
        def __init__(self):
            self.errors = [3.0, 1.0, 2.0, 1.0, 4.0]

        def evaluate(self, model, dataset, batch_size=256):
            return {"error": self.errors.pop(0)} if dataset is DATA.val else super().evaluate(model, dataset)

    models = {}

    def save(model, file):
        models[file.name] = model
        file.write_text("a model")

    recipe = replace(RECIPE, epochs=5, schedule="constant")
    (tmp_path / "best-9.safetensors").write_text("of another training")
    fit(with_dropout, Scripted(), DATA, recipe, saving=Saving(tmp_path, save=save, keep_best=2))
    assert sorted(file.name for file in tmp_path.glob("best*")) == ["best-2.safetensors", "best-4.safetensors"]
    second = fit(with_dropout, TASK, DATA, replace(recipe, epochs=2))
    assert same(models["best-2.safetensors"], second.model) and not models["best-2.safetensors"].training


def test_the_best_are_known_again_after_a_break(tmp_path):
    def save(model, file):
        file.write_text("a model")

    recipe = replace(RECIPE, epochs=2, schedule="constant", lr=1e-9)
    fit(build, TASK, DATA, recipe, saving=Saving(tmp_path, save=save, keep_best=2))
    done = fit(
        build, TASK, DATA, replace(recipe, epochs=5), saving=Saving(tmp_path, save=save, keep_best=2, resume=True)
    )
    errors = done.series("error")
    best = sorted(sorted(range(5), key=lambda epoch: errors[epoch])[:2])
    assert sorted(file.name for file in tmp_path.glob("best*")) == [f"best-{epoch + 1}.safetensors" for epoch in best]


def test_of_equal_epochs_the_earlier_is_kept(tmp_path):
    best = BestModels(tmp_path, 1, lambda model, file: file.write_text("a model"))
    for epoch in (1, 2):
        best.offer(nn.Linear(1, 1), 0.5, epoch)
    assert [file.name for file in tmp_path.iterdir()] == ["best-1.safetensors"]


def test_the_average_is_what_is_tested_and_returned():
    """Three steps by hand: the average begins as the weights after the first."""
    recipe = replace(RECIPE, batch_size=64, epochs=1, schedule="constant", clip=None, momentum=0)
    steps = [fit(build, TASK, DATA, replace(recipe, epochs=count)).model.state_dict() for count in (1, 2, 3)]
    averaged = fit(build, TASK, DATA, replace(recipe, epochs=3, ema=0.75))
    for name, value in averaged.model.state_dict().items():
        wanted = 0.75 * (0.75 * steps[0][name] + 0.25 * steps[1][name]) + 0.25 * steps[2][name]
        torch.testing.assert_close(value, wanted)
    with torch.no_grad():
        assert averaged.metrics == TASK.evaluate(averaged.model, DATA.test)
        assert averaged.curve[-1]["error"] == TASK.evaluate(averaged.model, DATA.val)["error"]
    assert all(p.requires_grad for p in averaged.model.parameters())


def test_vectors_may_be_left_without_decay():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    for optimizer in ("sgd", "adamw"):
        recipe = Recipe(optimizer=optimizer, weight_decay=0.1, lr=0.1, decay_vectors=False)
        decays = {
            id(p): group["weight_decay"] for group in recipe.make_optimizer(model).param_groups for p in group["params"]
        }
        assert [decays[id(p)] for p in model.parameters()] == [0.1, 0.0, 0.0, 0.0]
        assert len(replace(recipe, decay_vectors=True).make_optimizer(model).param_groups) == 1


def test_cosine_ends_at_the_final_rate():
    recipe = Recipe(schedule="cosine", lr=0.5, final_lr=0.1, warmup_steps=2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    factor = recipe.make_schedule(optimizer, steps=102, steps_per_epoch=10).lr_lambdas[0]
    rates = [0.5 * factor(step) for step in range(103)]
    assert rates[1] == pytest.approx(0.5) and rates[52] == pytest.approx(0.3) and rates[102] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(rates[2:]))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"accumulate": 0}, "accumulate must be a whole number of at least 1, got 0"),
        ({"precision": "fp8"}, "precision must be one of 32-true, .*, got 'fp8'"),
        ({"ema": 1.0}, "ema must lie between 0 and 1, got 1.0"),
        (
            {"ema": 0.9, "precision": "bf16-true"},
            "ema needs weights of more digits than bf16-true .* take bf16-mixed",
        ),
        ({"schedule": "cosine", "final_lr": 1.0}, "final_lr must lie between 0 and lr, 0.001, got 1.0"),
        ({"final_lr": 1e-5}, "final_lr belongs to cosine and linear, got 1e-05 with constant"),
        ({"layer_decay": 0}, "layer_decay must lie above 0 and be at most 1, got 0"),
        ({"label_smoothing": 1.0}, "label_smoothing must lie between 0 and 1, below 1, got 1.0"),
        ({"mixup": -0.1}, "mixup must not be negative, got -0.1"),
        ({"rand_augment": 10}, "rand_augment must lie between 0 and 10, below 10, got 10"),
        ({"rand_augment": 9, "auto_augment": "imagenet"}, "give rand_augment or auto_augment, not both"),
        ({"auto_augment": "mnist"}, "auto_augment must be one of imagenet, cifar10, svhn, got 'mnist'"),
        ({"random_erasing": 2}, "random_erasing must be a probability from 0 to 1, got 2"),
        ({"crop": 0}, "crop must lie above 0 and be at most 1, the whole image, got 0"),
        ({"lr": "fast"}, "lr: .* got 'fast'"),
        ({"betas": "0.9"}, r"betas: .* got \['0.9'\]"),
        ({"mix_up": 1}, "a recipe has no field 'mix_up'; it has: epochs, .*mixup"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(overrides, says, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # or the suite's own checks would come first
    with pytest.raises(UserError, match=says):
        recipe_of({}, **overrides)


@pytest.mark.parametrize(
    ("options", "given", "says"),
    [
        (Hardware, {"workers": -1}, "workers must be a whole number of at least 0, got -1"),
        (Hardware, {"workers": 10_000}, "workers must be at most .* on this machine, got 10000"),
        (Hardware, {"num_nodes": 0}, "num_nodes must be a whole number of at least 1, got 0"),
        (Hardware, {"context_parallel": 2, "strategy": "fsdp"}, "context_parallel needs whole weights"),
        (Hardware, {"context_parallel": 2, "devices": 3}, "context_parallel=2 does not divide 3 processes"),
        (Saving, {"save_every": 0}, "save_every must be a whole number of at least 1, got 0"),
        (Saving, {"logger": "wandb"}, "logger must be one of csv, tensorboard, got 'wandb'"),
        (Saving, {"keep_best": 1}, "keep_best needs `save`"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, given, says):
    with pytest.raises(UserError, match=says):
        options(*([Path("run")] if options is Saving else []), **given)


def test_keep_best_without_its_metric_is_refused(tmp_path):
    class Mute(Line):
        def evaluate(self, model, dataset, batch_size=256):
            return {}

    with pytest.raises(UserError, match="keep_best watches 'error'"):
        fit(build, Mute(), DATA, RECIPE, saving=Saving(tmp_path, keep_best=1, save=lambda model, file: None))


def rows(file) -> list[dict[str, str]]:
    with file.open() as handle:
        return list(csv.DictReader(handle))


def test_the_csv_logger_writes_steps_and_epochs_and_a_resumed_run_leaves_them(tmp_path):
    done = fit(build, TASK, DATA, replace(RECIPE, epochs=1), saving=Saving(tmp_path, logger="csv"))
    first = tmp_path / "log" / "version_0" / "metrics.csv"
    logged = rows(first)
    losses = [float(row["train_loss"]) for row in logged if row["train_loss"]]
    assert len(losses) == 8 and sum(losses) / 8 == pytest.approx(done.curve[0]["train_loss"])
    assert [float(row["error"]) for row in logged if row["error"]] == pytest.approx(done.series("error"))
    assert float(logged[0]["lr"]) <= RECIPE.lr
    fit(build, TASK, DATA, replace(RECIPE, epochs=2), saving=Saving(tmp_path, logger="csv", resume=True))
    assert rows(first) == logged
    assert len([row for row in rows(tmp_path / "log" / "version_1" / "metrics.csv") if row["train_loss"]]) == 8


def test_tensorboard_writes_events_or_says_what_to_install(tmp_path, monkeypatch):
    if importlib.util.find_spec("tensorboard") is not None:
        fit(build, TASK, DATA, replace(RECIPE, epochs=1), saving=Saving(tmp_path, logger="tensorboard"))
        assert list((tmp_path / "log" / "version_0").glob("events.*"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs a package: pip install 'provenn\[tensorboard\]'; or take csv"):
        fit(build, TASK, DATA, RECIPE, saving=Saving(tmp_path / "other", logger="tensorboard"))


class Noisy(Dataset):
    """Draws something new for an example each time."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        x, y = DATA.train[index]
        return x + 0.1 * torch.randn(4, dtype=torch.float64), y


def test_workers_read_the_same_examples_in_the_same_order():
    recipe = replace(RECIPE, epochs=2)
    assert same(
        fit(build, TASK, DATA, recipe, hardware=Hardware(workers=2)).model, fit(build, TASK, DATA, recipe).model
    )


def test_what_workers_draw_follows_from_the_seed_and_differs_by_epoch():
    drawn = []

    class Seen(Line):
        def loss(self, model, batch):
            if model.training:
                drawn.append(batch[0].sum().item())
            return super().loss(model, batch)

    noisy = replace(DATA, train=Noisy())
    recipe = replace(RECIPE, epochs=2, batch_size=64)
    for seed in (1, 1, 2):
        fit(build, Seen(), noisy, recipe, seed=seed, hardware=Hardware(workers=1))
    assert drawn[:2] == drawn[2:4] and drawn[0] != drawn[1] and drawn[0] != drawn[4]


def test_a_run_with_workers_is_resumed_in_the_order_of_its_epoch(tmp_path):
    recipe = replace(RECIPE, epochs=2, schedule="constant")
    whole = fit(build, TASK, DATA, recipe, hardware=Hardware(workers=1))
    fit(build, TASK, DATA, replace(recipe, epochs=1), hardware=Hardware(workers=1), saving=Saving(tmp_path))
    assert (tmp_path / CHECKPOINT).exists()
    assert same(
        whole.model,
        fit(build, TASK, DATA, recipe, hardware=Hardware(workers=1), saving=Saving(tmp_path, resume=True)).model,
    )


def test_a_run_with_workers_that_broke_off_in_an_epoch_draws_on_as_if_it_had_not(tmp_path):
    noisy, recipe = replace(DATA, train=Noisy()), replace(RECIPE, epochs=1)
    whole = fit(build, TASK, noisy, recipe, hardware=Hardware(workers=2))
    with pytest.raises(RuntimeError, match="the machine went down"):
        fit(build, Broken(5), noisy, recipe, hardware=Hardware(workers=2), saving=Saving(tmp_path, save_every=1))
    resumed = fit(
        build, TASK, noisy, recipe, hardware=Hardware(workers=2), saving=Saving(tmp_path, save_every=1, resume=True)
    )
    assert same(whole.model, resumed.model)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"optimizer": "adam"}, "optimizer 'sgd' .now 'adam'."),
        ({"lr": 0.01}, "lr 0.05 .now 0.01."),
        ({"decay_vectors": False, "batch_size": 4}, "batch_size 8 .now 4., decay_vectors True .now False."),
        ({"precision": "32-true"}, "precision '64-true' .now '32-true'."),
        ({"seed": 1}, "seed 0 .now 1."),
        ({"data": "other"}, "data '' .now 'other'."),
    ],
)
def test_what_was_started_in_one_way_does_not_go_on_in_another(tmp_path, started, overrides, says):
    recipe = replace(RECIPE, **{name: v for name, v in overrides.items() if name not in ("seed", "data")})
    data = replace(DATA, fingerprint=overrides.get("data", ""))
    with pytest.raises(UserError, match=f"last.ckpt was started with {says}: resume with the same, or train in"):
        fit(
            build,
            TASK,
            data,
            replace(recipe, epochs=2),
            seed=overrides.get("seed", 0),
            saving=Saving(started, resume=True),
        )


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("started")
    fit(build, TASK, DATA, replace(RECIPE, epochs=1), saving=Saving(folder))
    return folder


def test_the_live_line_tells_loss_rate_and_time_left(capsys, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with progress.shown():
        fit(build, TASK, DATA, RECIPE, title="line")
    lines = capsys.readouterr().err.splitlines()
    pattern = r"line: loss \d\S*, [\d.]+ steps/s: \d+ of 24(, 0:\d\d:\d\d left)?"
    shown = [line for line in lines if "loss" in line]
    assert len(shown) > 10 and all(re.fullmatch(pattern, line) for line in shown)
    assert "left" in shown[5] and "left" not in shown[-1]
