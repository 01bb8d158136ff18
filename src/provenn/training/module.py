"""What Lightning trains: a model tied to its task's loss, its data and its recipe."""

import math
import sys
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from provenn.core.errors import UserError
from provenn.nn.auxiliary import collect_auxiliary
from provenn.tasks.base import Task, TaskData, count_examples
from provenn.training.augmentation import augmented, mixed
from provenn.training.checkpoints import kinds_of_parts
from provenn.training.context import TokenShare
from provenn.training.order import Batches, EpochSampler
from provenn.training.recipes import Recipe
from provenn.training.systems import JointOptimizer, make_optimizer, training_loss
from provenn.training.trainer import load_lightning

MAY_CHANGE = ("epochs", "max_steps", "patience")  # of the recipe, in a run that goes on


class Diverged(UserError):
    """The loss is no number any more."""


def module_class() -> type:
    LightningModule: Any = load_lightning().LightningModule

    class Module(LightningModule):
        """Ties a model to its task's loss; the model itself knows nothing of this."""

        def __init__(
            self, model: nn.Module, task: Task, data: TaskData, recipe: Recipe, seed: int, history: Any, workers: int
        ):
            super().__init__()
            self.model, self.task, self.data, self.recipe, self.seed = model, task, data, recipe, seed
            self.history, self.workers = history, workers
            self.share: TokenShare | None = None  # of processes that share each sequence
            if recipe.ema is not None:
                keep = torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema)
                self.average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=keep).requires_grad_(False)
            self.parts = kinds_of_parts(self)  # before they are sharded, which gives them other classes

        def learned(self) -> nn.Module:
            """What is validated, tested and saved: the average of the weights where the recipe keeps one."""
            return self.model if self.recipe.ema is None else self.average.module

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint |= {"parts": self.parts, "began": self.began()}
            checkpoint |= {"within_epoch": self.history.batches_done > 0, "processes": self.trainer.world_size}

        def began(self) -> dict[str, Any]:
            """What a run that goes on may not change."""
            recipe = {name: value for name, value in asdict(self.recipe).items() if name not in MAY_CHANGE}
            shared = {} if self.share is None else {"context_parallel": self.share.size}
            return {**recipe, "seed": self.seed, "data": self.data.fingerprint, **shared}

        def configure_model(self) -> None:
            from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

            if self.sharded() and not isinstance(self.model, FSDPModule):
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
                if hasattr(self.model, "training_loss"):
                    register_fsdp_forward_method(self.model, "training_loss")

        def on_fit_start(self) -> None:
            if self.share is not None:
                self.share.join(self.model)

        def sharded(self) -> bool:
            return "ModelParallel" in type(self.trainer.strategy).__name__

        def everywhere(self, good: bool) -> bool:
            """Whether it is so in all processes, each of which asks: none may wait for one that has stopped."""
            if self.trainer.world_size == 1:
                return good
            bad = torch.tensor(float(not good), device=self.device)
            return self.trainer.strategy.reduce(bad, reduce_op="sum").item() == 0

        def train_dataloader(self) -> DataLoader:
            if isinstance(self.data.train, Batches):
                rest = self.data.train.after(self.history.batches_done)
                return DataLoader(rest, batch_size=None, collate_fn=_as_it_is, generator=torch.Generator())
            count = count_examples(self.data.train)
            # Of a run that goes on after an epoch, `current_epoch` still is the one that has ended.
            processes, epoch = self.trainer.world_size, self.trainer.fit_loop.epoch_progress.current.processed
            shares = 1 if self.share is None else self.share.size  # processes with the same batch
            start = self.history.batches_done * self.recipe.batch_size
            # With a generator of its own, or the loader would draw from the one that dropout draws from.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch * 101 + self.global_rank)
            sampler = EpochSampler(
                count, self.seed, self.global_rank // shares, processes // shares, epoch=epoch, start=start
            )
            return DataLoader(
                augmented(self.data, self.recipe, self.seed, sampler, self.workers),
                batch_size=self.recipe.batch_size,
                sampler=sampler,
                collate_fn=self.data.collate,
                generator=generator,
                num_workers=self.workers,
            )

        def training_step(self, batch: Any, index: int) -> Tensor:
            if self.share is not None:
                loss, added = self.share.loss(self.model, self.task, batch), []
            else:
                with collect_auxiliary() as added:
                    loss = training_loss(
                        self.model, self.task, mixed(batch, self.recipe, self.data), self.recipe.label_smoothing
                    )
            if added:
                loss = loss + torch.stack(added).mean()
            if not self.everywhere(bool(torch.isfinite(loss))):
                raise Diverged(f"the loss became {loss.item()} at step {self.global_step}; {what_may_help(self)}")
            self.history.loss = loss.detach()
            return loss * self.weight_in_step(index)

        def weight_in_step(self, index: int) -> float:
            """What makes a step's gradient the mean over its examples.

            Lightning divides each loss by `accumulate`, but an epoch's last step may have fewer batches, the last of
            them fewer examples.
            """
            many = self.recipe.accumulate
            if isinstance(self.data.train, Batches):
                size, count = 1, len(self.data.train)
            else:
                size, count = self.recipe.batch_size, len(self.trainer.train_dataloader.sampler)
            first = index - index % many
            examples = min((first + many) * size, count) - first * size
            return many * min(size, count - index * size) / examples

        def on_train_epoch_start(self) -> None:
            # Dropout and augmentation draw from here on: a resumed epoch draws what an uninterrupted one would.
            if isinstance(self.data.train, Batches) and not self.current_epoch:
                return  # the first one draws on from the seed of the run
            torch.manual_seed(self.seed * 1_000_003 + self.current_epoch * 101 + self.global_rank)

        def configure_optimizers(self) -> Any:
            optimizer = make_optimizer(self.model, self.recipe)
            if isinstance(optimizer, JointOptimizer) and self.sharded():
                raise UserError("strategy fsdp takes one optimizer, and this system brings several: take ddp")
            steps_per_epoch = math.ceil(len(self.train_dataloader()) / self.recipe.accumulate)
            steps = min(self.recipe.epochs * steps_per_epoch, self.recipe.max_steps or sys.maxsize)
            schedule = self.recipe.make_schedule(optimizer, steps, steps_per_epoch)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module


def _as_it_is(batch: Any) -> Any:
    return batch


def what_may_help(module: Any) -> str:
    """What may help where training diverges: a lower rate, and what layers know of themselves."""
    hints = [part.if_diverging for part in module.model.modules() if hasattr(part, "if_diverging")]
    return f"{', or '.join(dict.fromkeys([f'a lower lr than {module.recipe.lr:g}', *hints]))} may help"
