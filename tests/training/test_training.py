"""Training: a seed fixes every bit, a resumed run is the run that was not broken off, two processes are one."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch
from line_task import RECIPE, SINGLE, Line, build, build_single
from torch import nn

from provenn.core.errors import UserError
from provenn.nn.auxiliary import add_auxiliary
from provenn.training import Hardware, Recipe, Saving, fit
from provenn.training.checkpoints import CHECKPOINT
from provenn.training.order import EpochSampler
from provenn.training.processes import leave_group
from provenn.training.recipes import SCHEDULES, recipe_of

TASK, DATA = Line(), Line().load()


def with_dropout():
    return build(dropout=0.3)


def same(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "radam"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(optimizer):
    recipe = replace(RECIPE, optimizer=optimizer, epochs=2)
    first, again, other = (fit(with_dropout, TASK, DATA, recipe, seed=seed) for seed in (3, 3, 4))
    assert same(first.model, again.model) and first.metrics == again.metrics and first.curve == again.curve
    assert not same(first.model, other.model)
    assert first.steps == 16 and not first.model.training


def test_what_ran_before_in_the_process_does_not_matter():
    first = fit(with_dropout, TASK, DATA, RECIPE, seed=1)
    torch.rand(17)
    fit(with_dropout, TASK, DATA, RECIPE, seed=2)
    assert same(first.model, fit(with_dropout, TASK, DATA, RECIPE, seed=1).model)


class Crash(Line):
    """Breaks off in the validation of its second epoch."""

    def __init__(self, reason):
        self.left, self.reason = 2, reason

    def evaluate(self, model, dataset, batch_size=256):
        self.left -= 1
        if not self.left:
            raise self.reason
        return super().evaluate(model, dataset, batch_size)


@pytest.mark.parametrize("optimizer", ["sgd", "radam"])
def test_one_epoch_and_one_resumed_are_two_bit_for_bit(tmp_path, optimizer):
    recipe = replace(RECIPE, optimizer=optimizer, schedule="constant", warmup_steps=3, epochs=2)
    whole = fit(with_dropout, TASK, DATA, recipe, seed=5)
    fit(with_dropout, TASK, DATA, replace(recipe, epochs=1), seed=5, saving=Saving(tmp_path))
    resumed = fit(with_dropout, TASK, DATA, recipe, seed=5, saving=Saving(tmp_path, resume=True))
    assert same(whole.model, resumed.model)
    assert (whole.curve, whole.metrics, whole.steps) == (resumed.curve, resumed.metrics, resumed.steps)


@pytest.mark.parametrize("limit", [None, 12, 16, 20])
@pytest.mark.parametrize("reason", [RuntimeError("the machine went down"), KeyboardInterrupt()])
def test_a_run_that_broke_off_goes_on_bit_for_bit(tmp_path, reason, limit):
    recipe = replace(RECIPE, schedule="onecycle", epochs=4, patience=4, max_steps=limit)
    whole = fit(with_dropout, TASK, DATA, recipe, seed=6)
    with pytest.raises(type(reason)):
        fit(with_dropout, Crash(reason), DATA, recipe, seed=6, saving=Saving(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]
    resumed = fit(with_dropout, TASK, DATA, recipe, seed=6, saving=Saving(tmp_path, resume=True))
    assert same(whole.model, resumed.model) and whole.curve == resumed.curve and whole.steps == resumed.steps


def test_without_resume_a_run_starts_anew(tmp_path):
    first = fit(with_dropout, TASK, DATA, RECIPE, saving=Saving(tmp_path))
    assert same(first.model, fit(with_dropout, TASK, DATA, RECIPE, saving=Saving(tmp_path)).model)


class Scripted(Line):
    """Validation errors that are known beforehand."""

    def __init__(self, errors):
        self.errors = list(errors)

    def evaluate(self, model, dataset, batch_size=256):
        return {"error": self.errors.pop(0)} if dataset is DATA.val else super().evaluate(model, dataset)


def test_early_stopping_waits_and_returns_to_the_best(tmp_path):
    recipe = replace(RECIPE, epochs=9, patience=2, schedule="constant")
    errors = [3.0, 1.0, 2.0, 1.0, 9.0, 9.0]
    stopped = fit(with_dropout, Scripted(errors), DATA, recipe, saving=Saving(tmp_path))
    assert stopped.series("error") == [3.0, 1.0, 2.0, 1.0], "two epochs without a better one: an equal one is none"
    best = fit(with_dropout, TASK, DATA, replace(recipe, epochs=2, patience=None))
    assert same(stopped.model, best.model)
    again = fit(with_dropout, Scripted(errors), DATA, recipe, saving=Saving(tmp_path, resume=True))
    assert same(again.model, best.model) and again.curve == stopped.curve, "a run that has stopped stays so"


def test_a_metric_that_is_no_number_is_worse_than_any(tmp_path):
    class Blind(Line):
        left = [math.nan, 3.0, 2.0, 1.0, math.nan]  # noqa: RUF012

        def evaluate(self, model, dataset, batch_size=256):
            return {"error": self.left.pop(0)} if dataset is DATA.val else super().evaluate(model, dataset)

    def save(model, file):
        file.touch()

    done = fit(
        build, Blind(), DATA, replace(RECIPE, epochs=5, patience=2), saving=Saving(tmp_path, keep_best=1, save=save)
    )
    assert len(done.curve) == 5, "it gets better each time"
    assert [file.name for file in tmp_path.glob("best*")] == ["best-4.safetensors"]


def test_nothing_to_train_on_is_one_line():
    nothing = replace(DATA, name="mine", train=torch.utils.data.Subset(DATA.train, []))
    with pytest.raises(UserError, match="mine has nothing to train on"):
        fit(build, TASK, nothing, RECIPE)


def test_patience_without_its_metric_is_refused():
    class Mute(Line):
        def evaluate(self, model, dataset, batch_size=256):
            return {}

    with pytest.raises(UserError, match="patience watches 'error'"):
        fit(build, Mute(), DATA, replace(RECIPE, patience=1))


def test_a_loss_that_is_not_finite_names_its_step():
    class Diverging(Line):
        steps = 0

        def loss(self, model, batch):
            self.steps += 1
            return super().loss(model, batch) * (math.nan if self.steps > 3 else 1)

    with pytest.raises(UserError, match=r"the loss became nan at step 3; a lower lr than 0\.05 may help") as error:
        fit(build, Diverging(), DATA, RECIPE)
    assert "\n" not in str(error.value)


def test_weights_that_no_loss_has_seen_are_looked_at_too():
    class Torn(Line):
        def evaluate(self, model, dataset, batch_size=256):
            raise AssertionError("evaluated with weights that are no numbers")

    def steep():
        model = build()
        model[0].weight.register_hook(lambda gradient: gradient * math.inf)
        return model

    recipe = replace(RECIPE, max_steps=1, clip=None)
    with pytest.raises(
        UserError, match=r"the weights are no longer finite after step 1; a lower lr than 0\.05 may help"
    ):
        fit(steep, Torn(), DATA, recipe)


def test_a_rate_that_overflows_the_optimizer_is_refused():
    with pytest.raises(UserError, match=r"lr must be at most 1e\+30, got 1e\+38"):
        Recipe(lr=1e38)
    for optimizer in ("sgd", "adam", "adamw", "radam"):
        model = nn.Linear(1, 1)
        steps = Recipe(optimizer=optimizer, lr=1e30).make_optimizer(model)
        model(torch.ones(1, 1)).sum().backward()
        for _ in range(7):
            steps.step()


def test_max_steps_bounds_whatever_the_epochs():
    assert fit(build, TASK, DATA, replace(RECIPE, epochs=50, max_steps=11)).steps == 11


def test_training_learns_and_leaves_torch_as_it_was():
    result = fit(build, TASK, DATA, replace(RECIPE, epochs=60, lr=0.1))
    variance = DATA.test.tensors[1].var().item()
    assert result.metrics["error"] < 0.05 * variance
    assert result.series("train_loss")[-1] < 0.1 * result.series("train_loss")[0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_mean_of_what_layers_add_is_learned_too():
    class Adding(nn.Linear):
        def forward(self, x):
            add_auxiliary(self.weight.sum(), "a loss", "loss=0")
            return super().forward(x)

    def trained(layer):
        def made():
            return nn.Sequential(layer(4, 4), layer(4, 1)).double()

        recipe = replace(RECIPE, clip=None, momentum=0, schedule="constant", max_steps=1)
        return fit(made, TASK, DATA, recipe).model

    for with_it, without in zip(trained(Adding), trained(nn.Linear)):
        torch.testing.assert_close(without.weight - with_it.weight, torch.full_like(without.weight, RECIPE.lr / 2))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_an_epoch(processes):
    samplers = [EpochSampler(10, 7, rank, processes) for rank in range(processes)]
    parts = [list(sampler) for sampler in samplers]
    assert {len(part) for part in parts} == {len(samplers[0])} and {index for part in parts for index in part} == set(
        range(10)
    )
    alone = list(EpochSampler(10, 7))
    assert [index for row in zip(*parts) for index in row][:10] == alone, "in turns they take what one takes"
    samplers[0].set_epoch(1)
    assert list(samplers[0]) != parts[0]


def two_processes(out: Path, strategy: str, kind: str, *launcher: str) -> subprocess.CompletedProcess:
    program = str(Path(__file__).with_name("line_task.py"))
    return subprocess.run(
        [sys.executable, *launcher, program, str(out), strategy, kind],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_as_one(out: Path, maker, recipe: Recipe, tolerance: float) -> None:
    """What two processes have left in the folder is what one gives with twice the batch."""
    state, curve, metrics, steps = torch.load(out / "result.pt", weights_only=True)
    alone = fit(maker, TASK, DATA, replace(recipe, batch_size=16))
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=tolerance, atol=tolerance)
    assert steps == alone.steps == 12
    assert metrics == pytest.approx(alone.metrics, rel=100 * tolerance)
    for ours, theirs in zip(curve, alone.curve, strict=True):
        assert ours == pytest.approx(theirs, rel=100 * tolerance)
    assert {file.name for file in out.iterdir()} == {"last.ckpt", "previous.ckpt", "result.pt"}


def test_two_processes_train_as_one_on_the_same_global_batch(tmp_path):
    """Batches of 8 in two processes over gloo are batches of 16 in one, gradient by gradient."""
    done = two_processes(tmp_path, "ddp", "trains")
    assert done.returncode == 0, done.stderr
    check_as_one(tmp_path, build, RECIPE, 1e-12)


def test_two_processes_that_divide_the_weights_train_and_resume_as_one(tmp_path):
    """Broken off in the second epoch, they go on from the one checkpoint that both had a part in."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    broken = two_processes(tmp_path, "fsdp", "breaks", *launcher)
    assert broken.returncode != 0 and (tmp_path / CHECKPOINT).exists()
    done = two_processes(tmp_path, "fsdp", "resumes", *launcher)
    assert done.returncode == 0, done.stderr
    check_as_one(tmp_path, build_single, SINGLE, 1e-5)


def test_two_processes_that_broke_off_in_an_epoch_go_on_bit_for_bit(tmp_path):
    """Each draws its dropout on from where it stood."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = two_processes(tmp_path, "ddp", "within", *launcher)
    assert done.returncode == 0, done.stderr
    (whole, curve), (resumed, again) = torch.load(tmp_path / "result.pt", weights_only=True)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert [pytest.approx(epoch) for epoch in curve] == again and len(curve) == 2


def test_a_loss_that_explodes_in_one_of_two_processes_ends_both_with_one_line(tmp_path):
    done = two_processes(tmp_path, "ddp", "explodes")
    assert done.returncode == 1
    assert done.stderr.count("refused: the loss became") == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux, which reports the names of threads")
def test_who_leaves_a_group_ends_its_threads_whatever_still_holds_the_model():
    def threads() -> list[str]:
        return sorted(file.read_text() for file in Path("/proc/self/task").glob("*/comm"))

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(build())
    model(torch.zeros(1, 4, dtype=torch.float64)).sum().backward()
    assert any("gloo" in name for name in threads())
    leave_group(model)
    assert not any("gloo" in name for name in threads()), threads()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"patience": 0}, "patience must be a whole number"),
        ({"max_steps": -1}, "max_steps must be a whole number"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"lr": math.nan}, "lr must be a finite number, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"clip": 0.0}, "clip must be a positive number"),
        ({"gamma": -1.0}, "gamma must be a positive number"),
        ({"momentum": 1.0}, "momentum must lie between 0 and 1, below 1, got 1.0"),
        ({"betas": (0.9, 1.5)}, "betas must lie between 0 and 1, below 1, got 1.5"),
        ({"mixup": math.inf}, "mixup must be a finite number, got inf"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, adamw, radam, got 'lion'"),
        ({"schedule": "spiral"}, "schedule must be one of"),
        ({"schedule": "multistep"}, "milestones belong to multistep"),
        ({"schedule": "step", "milestones": [0.5]}, "milestones belong to multistep"),
        ({"schedule": "multistep", "milestones": [0.8, 0.5]}, "milestones must grow"),
        ({"schedule": "multistep", "milestones": [0.5, 1.5]}, "milestones must grow"),
        ({"learning_rate": 0.1}, "a recipe has no field 'learning_rate'; it has: epochs"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(overrides, says, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # or the suite's own checks would come first
    with pytest.raises(UserError, match=says):
        recipe_of({}, **overrides)


def test_a_recipe_takes_what_toml_writes():
    assert recipe_of({"clip": 4, "betas": [0.9, 0.98]}, lr=1, epochs=None) == Recipe(
        clip=4.0, betas=(0.9, 0.98), lr=1.0
    )


def test_bad_strategies_are_refused():
    with pytest.raises(UserError, match="strategy must be one of auto, ddp, fsdp, got 'ddp_spawn'"):
        fit(build, TASK, DATA, RECIPE, hardware=Hardware(devices=2, strategy="ddp_spawn"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_warm_up_and_stay_below_the_peak(schedule):
    milestones = (0.5, 0.8) if schedule == "multistep" else ()
    recipe = Recipe(schedule=schedule, warmup_steps=5, lr=1.0, step_epochs=2, milestones=milestones, gamma=0.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    stepper = recipe.make_schedule(optimizer, steps=50, steps_per_epoch=10)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        stepper.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and max(rates) <= 1
    last = {
        "constant": 1,
        "cosine": 0.002,
        "linear": 0.02,
        "inverse-sqrt": math.sqrt(5 / 50),
        "onecycle": 0.002,
        "poly": (1 / 45) ** 0.9,
        "step": 0.25,
        "multistep": 0.25,
        "exponential": 0.0625,
    }[schedule]
    assert rates[-1] == pytest.approx(last, abs=0.003)


def test_milestones_are_shares_of_all_steps():
    recipe = recipe_of({"schedule": "multistep", "milestones": [0.5, 0.8, 0.9, 0.95], "gamma": 0.5, "lr": 1.0})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = recipe.make_schedule(optimizer, steps=500_000, steps_per_epoch=200).lr_lambdas[0]
    overrides = [step for step in range(0, 500_000, 1000) if factor(step) != factor(max(0, step - 1))]
    assert overrides == [250_000, 400_000, 450_000, 475_000]
    assert factor(0) == 1 and factor(499_999) == 0.5**4
