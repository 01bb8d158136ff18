"""The smallest task there is, for tests of training. Run as a program it trains over two processes."""

import math
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from provenn.core.errors import UserError
from provenn.tasks import Task, TaskData
from provenn.training import Hardware, Recipe, Saving, fit
from provenn.training.processes import leave_group


class Line(Task):
    """Learn a linear map from noisy examples."""

    name = "line"
    metric = "error"
    higher_is_better = False
    embedded = {"line": "a line"}  # noqa: RUF012
    reads = "nothing"

    def load(self, source="line", *, seed=0, **options):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(96, 4, generator=generator, dtype=torch.float64)
        y = x @ torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64) + 0.1 * x[:, 0].sin()
        parts = [TensorDataset(x[rows], y[rows]) for rows in (slice(0, 64), slice(64, 80), slice(80, 96))]
        return TaskData("line", *parts, fingerprint="")

    def loss(self, model, batch):
        return (model(batch[0].to(next(model.parameters()).dtype))[:, 0] - batch[1]).square().mean()

    def evaluate(self, model, dataset, batch_size=256):
        assert not model.training and not torch.is_grad_enabled()
        return {"error": self.loss(model, dataset.tensors).item()}

    def dummy_baseline(self, data):
        return (data.test.tensors[1] - data.train.tensors[1].mean()).square().mean().item()

    def predict(self, model, meta, inputs, output):
        return ""


def build(dropout=0.0):
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1)).double()


def build_single():
    return build().float()


RECIPE = Recipe(epochs=3, batch_size=8, optimizer="sgd", lr=0.05, schedule="cosine", clip=1.0, precision="64-true")
SINGLE = replace(RECIPE, precision="32-true")


class Breaks(Line):
    """Breaks off in the validation of its second epoch, in every process."""

    def evaluate(self, model, dataset, batch_size=256):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2:
            raise SystemExit(7)
        return super().evaluate(model, dataset, batch_size)


class Explodes(Line):
    """Has a loss that is no number in one of two processes."""

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        return loss if os.environ.get("LOCAL_RANK", "0") == "0" else loss * math.inf


class Stops(Line):
    """Breaks off within its first epoch, in every process."""

    steps = 6

    def loss(self, model, batch):
        self.steps -= model.training
        if self.steps < 0:
            raise ZeroDivisionError
        return super().loss(model, batch)


def with_dropout():
    return build(dropout=0.5)


def resumed_within_an_epoch(out):
    """Two processes run through, break off within an epoch, and go on."""
    recipe = replace(RECIPE, epochs=2, ema=0.5, accumulate=2, batch_size=4, patience=5)
    first, second = Saving(out, save_every=1), Saving(out, save_every=1, resume=True)
    torch.distributed.init_process_group("gloo")
    results = []
    for task, saving in ((Line(), None), (Stops(), first), (Line(), second)):
        with suppress(ZeroDivisionError, SystemExit):  # it breaks off; of two processes the second leaves
            data = task.load()
            results.append(
                fit(
                    with_dropout,
                    task,
                    data,
                    recipe,
                    seed=3,
                    hardware=Hardware(devices=2, strategy="ddp"),
                    saving=saving,
                )
            )
    if results:
        torch.save([[result.model.state_dict(), result.curve] for result in results], out / "result.pt")
    leave_group(None)
    check_no_thread_left()


def check_no_thread_left():
    """A thread of a group that outlives the interpreter aborts the process at times."""
    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.exists() else []
    assert not [name for name in names if "gloo" in name], names


if __name__ == "__main__":
    if sys.argv[3] == "within":
        resumed_within_an_epoch(Path(sys.argv[1]))
        sys.exit()
    out, strategy, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    task = {"breaks": Breaks, "explodes": Explodes}.get(kind, Line)()
    maker, recipe = (build_single, SINGLE) if strategy == "fsdp" else (build, RECIPE)
    try:
        result = fit(
            maker,
            task,
            Line().load(),
            recipe,
            hardware=Hardware(devices=2, strategy=strategy),
            saving=Saving(out, resume=kind == "resumes"),
        )
    except UserError as error:
        sys.exit(f"refused: {error}")
    finally:
        if kind in ("trains", "resumes"):
            check_no_thread_left()
    # Only the first process comes here: a second one would find the file and fail.
    with open(out / "result.pt", "xb") as file:
        torch.save([result.model.state_dict(), result.curve, result.metrics, result.steps], file)
