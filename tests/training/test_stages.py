"""Trainings of several stages. Run as a program, it trains two and is killed in the second."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from line_task import Line, with_dropout
from torch import nn

from provenn.core.errors import UserError
from provenn.training import Batches, Hardware, Recipe, Saving, Stage, fit_stages, only, run_stages
from provenn.training.checkpoints import CHECKPOINT

LENGTHS = {"first": 5, "second": 8}
KILLED_AT = 4  # the batch of the second stage


def made(count: int, killed_at: int | None = None):
    """Batches of one order; the process is killed as it asks for one of them."""
    x, y = Line().load().train.tensors
    for step in range(count):
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield x[8 * step :][:8].float(), y[8 * step :][:8].float()


def squared(model: nn.Module, batch) -> torch.Tensor:
    return (model(batch[0])[:, 0] - batch[1]).square().mean()


def head(model: nn.Module):
    return model[-1].parameters()


def stages(killed_at: int | None = None) -> list[Stage]:
    """The head learns, then the whole, with dropout in both."""
    first, second = (
        Batches(partial(made, count, killed_at if name == "second" else None), count) for name, count in LENGTHS.items()
    )
    return [
        Stage.of_batches("first", squared, first, partial(only, head), lr=1e-2),
        Stage.of_batches("second", squared, second, optimizer="adam", lr=1e-2, clip=1.0),
    ]


def start() -> nn.Module:
    torch.manual_seed(0)
    return with_dropout().float()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_each_stage_moves_what_learns_in_it_and_leaves_modes_and_gradients_as_they_were():
    model, body = start().eval(), start()[0].weight
    seen = []

    def note(stage, done):
        seen.append((stage.name, len(done.losses), torch.equal(model[0].weight, body)))

    model[2].train()
    model[0].bias.requires_grad_(False)
    results = run_stages(model, stages(), seed=3, after=note)
    assert seen == [("first", 5, True), ("second", 8, False)]
    assert [done.steps for done in results] == [5, 8]
    assert [part.training for part in model] == [False, False, True, False] and not model.training
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def test_batches_come_in_their_order_and_the_losses_are_theirs():
    model, order = start(), []

    def loss(model, batch):
        order.append(batch[1].tolist())
        return squared(model, batch)

    (done,) = run_stages(model, [Stage.of_batches("one", loss, made(6), lr=1e-9)])
    assert order == [y.tolist() for _, y in made(6)]
    expected = [squared(start().eval(), batch).item() for batch in made(6)]
    assert len(done.losses) == 6 and done.losses != expected, "dropout is on"


def test_a_run_that_is_killed_in_its_second_stage_ends_with_the_weights_of_one_that_is_not(tmp_path):
    """By SIGKILL, in a process of its own; the first stage is not trained again."""
    command = [sys.executable, __file__, str(tmp_path)]
    killed = subprocess.run(command, timeout=240, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "first" / CHECKPOINT).exists() and (tmp_path / "second" / CHECKPOINT).exists()
    whole, again, trained = start(), start(), []
    expected = run_stages(whole, stages(), seed=3)

    def counted(stage):
        def loss(model, batch):
            trained.append(stage.name)
            return squared(model, batch)

        data = stage.data
        options = {name: getattr(stage.recipe, name) for name in ("optimizer", "lr", "clip")}
        return Stage.of_batches(stage.name, loss, data.train, stage.learning, **options)

    saving = Saving(tmp_path, save_every=1, resume=True)
    results = run_stages(again, [counted(stage) for stage in stages()], seed=3, saving=saving)
    assert same(whole, again)
    assert [done.losses for done in results] == [done.losses for done in expected]
    assert trained == ["second"] * (LENGTHS["second"] - KILLED_AT)


def plan(model, task, data, recipe):
    whole = Stage("whole", task, data, replace(recipe, lr=1e-3), lambda network: nullcontext(network))
    return [*stages(), whole]


def test_stages_of_a_preset_have_one_outcome(tmp_path):
    """Built from the seed, trained stage by stage, and judged by the task's own test at the end."""
    data = Line().load()
    saving = Saving(tmp_path)
    done = fit_stages(start, plan, Line(), data, Recipe(epochs=2), seed=3, saving=saving)
    torch.manual_seed(3)
    by_hand = start()
    parts = run_stages(by_hand, plan(by_hand, Line(), data, Recipe(epochs=2)), seed=3)
    assert same(done.model, by_hand) and not done.model.training
    with torch.no_grad():
        assert done.metrics == Line().evaluate(by_hand.eval(), data.test)
    assert done.steps == sum(part.steps for part in parts) and done.losses == parts[-1].losses
    assert [entry["epoch"] for entry in done.curve] == [1, 2, 3, 4]
    assert (tmp_path / "whole" / CHECKPOINT).exists()
    again = fit_stages(start, plan, Line(), data, Recipe(epochs=2), seed=4, saving=saving)
    assert again.steps == done.steps, "checkpoints of another training are not gone on from"


def test_a_stage_in_which_nothing_learns_is_passed_over():
    model = start()
    nothing = Stage.of_batches("nothing", squared, made(2), partial(only, lambda model: []), lr=1e-2)
    (done,) = run_stages(model, [nothing])
    assert same(model, start()) and done.losses == [] and done.steps == 0


def test_what_stages_cannot_do_is_refused():
    with pytest.raises(UserError, match="stages need different names, got first, second, first"):
        run_stages(start(), [*stages(), stages()[0]])
    with pytest.raises(UserError, match="a training of several stages runs in one process, got 2"):
        run_stages(start(), stages(), hardware=Hardware(devices=2))


if __name__ == "__main__":
    saving = Saving(Path(sys.argv[1]), save_every=1)
    run_stages(start(), stages(KILLED_AT), seed=3, saving=saving)
