"""What a training notes as it goes: curve, live line, checkpoints within an epoch, the best models, an early stop."""

import copy
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.tasks.base import Task, TaskData, count_examples
from provenn.training.checkpoints import CHECKPOINT, best_file
from provenn.training.module import Diverged, what_may_help
from provenn.training.options import Saving
from provenn.training.processes import gathered, random_states, whole_state
from provenn.training.recipes import Recipe
from provenn.training.systems import before_saving
from provenn.training.trainer import load_lightning

OFTEN = 0.5  # seconds between two figures on the live line: reading a loss waits for the device
MOST_LOST = 120.0  # seconds of work since the last checkpoint


def in_float32(model: nn.Module) -> nn.Module:
    """The model, or a copy in float32 of one that is trained in another type: data and metrics are float32."""
    other = any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())
    return copy.deepcopy(model).float() if other else model


@dataclass
class BestModels:
    """Keeps the models of the best epochs as files, each written beside and renamed."""

    folder: Path
    count: int
    save: Callable[[nn.Module, Path], None]
    kept: list[tuple[float, int]] = field(default_factory=list)

    def offer(self, model: nn.Module, score: float, epoch: int) -> None:
        """Keep the model of an epoch if it is among the best; a higher score is better, and of equals the earlier."""
        ranked = sorted([*self.kept, (score, epoch)], key=lambda entry: (-entry[0], entry[1]))
        self.kept, gone = ranked[: self.count], ranked[self.count :]
        if (score, epoch) in self.kept:
            ready = copy.deepcopy(model).eval()
            before_saving(ready)
            self.save(ready, best_file(self.folder, epoch))
        for _, other in gone:
            best_file(self.folder, other).unlink(missing_ok=True)


def history_class() -> type:
    Callback: Any = load_lightning().pytorch.callbacks.Callback

    class History(Callback):
        """Keeps the learning curve, shows the bar, and stops early where the recipe says so."""

        def __init__(self, task: Task, data: TaskData, title: str, recipe: Recipe, saving: Saving | None):
            self.task, self.data, self.title, self.recipe = task, data, title, recipe
            self.saving, self.keeper = saving, None
            if saving is not None and saving.save is not None and saving.keep_best:
                self.keeper = BestModels(saving.folder, saving.keep_best, saving.save)
            self.loss = torch.zeros(())  # of the last batch
            self.batches_done = 0  # of an epoch that a checkpoint breaks off
            self.wrapper: nn.Module | None = None  # what several processes train the model in
            self.random: list[dict[str, Tensor]] = []  # of each process
            self.curve: list[dict[str, float | int]] = []
            self.best: float | None = None
            self.best_state: dict[str, Tensor] | None = None
            self.waited = 0
            self.losses: list[Tensor] = []

        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.wrapper = trainer.strategy.model
            per_epoch = math.ceil(trainer.num_training_batches / self.recipe.accumulate)
            total = min(trainer.max_epochs * per_epoch, self.recipe.max_steps or sys.maxsize)
            # Of several processes one shows the bar.
            self.context = progress.bar(self.title, total) if trainer.is_global_zero else nullcontext(lambda *_: None)
            self.advance = self.context.__enter__()
            self.advance(trainer.global_step)
            self.steps = self.first_step = trainer.global_step
            self.started = self.shown = self.saved = time.monotonic()
            if self.batches_done:
                self._set_random(trainer, module)
            if self.recipe.patience is not None and self.waited >= self.recipe.patience:
                trainer.should_stop = True  # the run that is resumed had stopped

        def teardown(self, trainer: Any, module: Any, stage: str) -> None:
            if hasattr(self, "context"):
                self.context.__exit__(None, None, None)

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.losses = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.losses.append(self.loss)
            if trainer.global_step == self.steps:  # the batches of this step are not complete
                return
            self.steps = trainer.global_step
            if self.recipe.ema is not None:
                module.average.update_parameters(module.model)
            for each in trainer.loggers:
                rate = trainer.optimizers[0].param_groups[0]["lr"]
                each.log_metrics({"train_loss": self.loss.item(), "lr": rate}, step=self.steps)
            self.advance(1, self._line())
            # The last batch of an epoch is followed by the epoch's own checkpoint.
            if self.saving and self._due(trainer, self.saving) and index + 1 < trainer.num_training_batches:
                self.saved = time.monotonic()
                self.batches_done = index + 1
                self.random = random_states(module.device)
                self.losses = list(trainer.strategy.reduce(torch.stack(self.losses), reduce_op="mean"))
                trainer.save_checkpoint(self.saving.folder / CHECKPOINT)

        def _due(self, trainer: Any, saving: Saving) -> bool:
            """Whether to save within an epoch: at the steps asked for, and before long epochs cost a kill much work.

            Clocks of several processes disagree, and all have to save together: there only steps count.
            """
            if saving.save_every and self.steps % saving.save_every == 0:
                return True
            return trainer.world_size == 1 and time.monotonic() - self.saved > MOST_LOST

        def _line(self) -> str | None:
            """Loss and rate, now and then."""
            now = time.monotonic()
            if now - self.shown < OFTEN:
                return None
            self.shown = now
            speed = (self.steps - self.first_step) / (now - self.started)
            return f"{self.title}: loss {self.loss.item():.4g}, {speed:.3g} steps/s"

        def _set_random(self, trainer: Any, module: Any) -> None:
            """Dropout and augmentation draw on where the checkpoint was written."""
            random = self.random[trainer.global_rank]
            torch.set_rng_state(random["cpu"].cpu())
            if "cuda" in random and module.device.type == "cuda":
                torch.cuda.set_rng_state(random["cuda"].cpu(), module.device)

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            # A loss is of the weights before its step: those after the last one are seen by no loss.
            parts = (p.to_local() if hasattr(p, "to_local") else p for p in module.model.parameters())
            if not module.everywhere(all(bool(torch.isfinite(part).all()) for part in parts)):
                raise Diverged(
                    f"the weights are no longer finite after step {trainer.global_step}; {what_may_help(module)}"
                )
            self.batches_done, self.random = 0, []
            self.saved = time.monotonic()  # the epoch's own checkpoint follows
            model = module.learned()
            model.eval()
            # Each process evaluates all of the validation data, so that the metrics need no gathering.
            with torch.no_grad(), gathered(model):
                metrics = self.task.evaluate(in_float32(model), self.data.val) if count_examples(self.data.val) else {}
            metrics = trainer.strategy.broadcast(metrics)  # rounding must not part them: all stop at the same epoch
            model.train()
            loss = trainer.strategy.reduce(torch.stack(self.losses).mean(), reduce_op="mean").item()
            self.curve.append({"epoch": float(trainer.current_epoch + 1), "train_loss": loss, **metrics})
            for each in trainer.loggers:
                each.log_metrics({"epoch": trainer.current_epoch + 1, **metrics}, step=trainer.global_step)
            watching = "patience" if self.recipe.patience is not None else "keep_best" if self.keeper else None
            if watching and self.task.metric not in metrics:
                raise UserError(
                    f"{watching} watches {self.task.metric!r}, and {self.data.name} has no validation for it"
                )
            if self.keeper is not None and trainer.is_global_zero:
                value = metrics[self.task.metric]
                score = -math.inf if math.isnan(value) else value if self.task.higher_is_better else -value
                self.keeper.offer(in_float32(model), score, trainer.current_epoch + 1)
            if self.recipe.patience is not None:
                self._stop_early(trainer, model, metrics[self.task.metric], self.recipe.patience)

        def _stop_early(self, trainer: Any, model: nn.Module, value: float, patience: int) -> None:
            sign = 1 if self.task.higher_is_better else -1
            if self.best is None or math.isnan(self.best) or sign * value > sign * self.best:
                self.best, self.waited = value, 0
                self.best_state = whole_state(model)
                return
            self.waited += 1
            trainer.should_stop = self.waited >= patience

        def restore_best(self, model: nn.Module) -> None:
            if self.best_state is not None:
                model.load_state_dict(self.best_state)

        def state_dict(self) -> dict[str, Any]:
            state: dict[str, Any] = {"curve": self.curve, "best": self.best, "waited": self.waited}
            state["best_state"] = self.best_state
            if self.keeper is not None:
                state["kept"] = list(self.keeper.kept)
            state["losses"] = torch.stack(self.losses) if self.losses else []
            if self.batches_done:
                state |= {"batches_done": self.batches_done, "random": self.random}
            return state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.curve, self.best, self.waited = state["curve"], state["best"], state["waited"]
            self.best_state = state["best_state"]
            if self.keeper is not None:
                self.keeper.kept = [(score, epoch) for score, epoch in state.get("kept", [])]
            self.batches_done, self.random = state.get("batches_done", 0), state.get("random", [])
            self.losses = list(state.get("losses", []))

    return History
