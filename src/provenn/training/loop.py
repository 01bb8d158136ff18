"""Training, on Lightning: the same loop for every task, deterministic for a seed, resumable bit for bit."""

import copy
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from provenn import progress
from provenn.errors import UserError
from provenn.nn.auxiliary import collect_auxiliary
from provenn.tasks.base import Task, TaskData
from provenn.training.checkpoints import checkpoint_writer, newest, read
from provenn.training.recipes import Recipe

LIGHTNING = ("lightning.pytorch", "lightning.fabric", "lightning")  # its loggers
STRATEGIES = ("auto", "ddp", "fsdp")


@dataclass(frozen=True)
class Fit:
    """A finished training.

    Args:
        model: trained, in eval mode.
        metrics: of the test split.
        curve: one entry an epoch: `epoch`, `train_loss`, and the validation metrics.
        seconds: wall time of the training.
        steps: how many were taken.
    """

    model: nn.Module
    metrics: dict[str, float]
    curve: list[dict[str, float | int]] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0

    def series(self, key: str) -> list[float | int]:
        """One column of the curve."""
        return [entry[key] for entry in self.curve if key in entry]


class Diverged(UserError):
    """The loss is no number any more."""


class EpochSampler(Sampler[int]):
    """A fresh order every epoch that depends on seed and epoch alone, so that a resumed run sees the same batches.

    Of several processes each takes every so manieth example: together their batches are one process's larger batch.
    Where the count does not divide, the first examples of the order come twice.
    """

    def __init__(self, count: int, seed: int, rank: int = 0, processes: int = 1):
        self.count, self.seed, self.rank, self.processes, self.epoch = count, seed, rank, processes, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator)
        places = torch.arange(self.rank, self.processes * len(self), self.processes) % self.count
        return iter(order[places].tolist())

    def __len__(self) -> int:
        return math.ceil(self.count / self.processes)


def fit(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    device: str = "cpu",
    devices: int = 1,
    strategy: str = "auto",
    out: Path | None = None,
    resume: bool = False,
    title: str = "training",
) -> Fit:
    """Build a model from the seed and train it.

    Args:
        build: makes the model; called after the seed is set, so that a seed fixes the weights.
        task, data, recipe: what is learned, from what, and how.
        seed: fixes weights, order, dropout and augmentation.
        device: cpu, cuda or mps.
        devices, strategy: how many processes train together, and how: "ddp" or "fsdp". Lightning starts them by
            running the program again (or torchrun has); only the first returns, the others leave the program.
        out: a folder for checkpoints after every epoch; None keeps none.
        resume: go on from the checkpoint in `out` where there is one.
        title: of the progress bar.

    Raises:
        UserError: a loss that is not finite, with the step at which it happened; or patience without its metric.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy == "fsdp" and not device.startswith("cuda"):
        raise UserError(f"strategy fsdp needs GPUs, got device {device!r}; take ddp")
    if device.startswith("cuda") and devices > torch.cuda.device_count():
        raise UserError(f"devices must be at most {torch.cuda.device_count()} on this machine, got {devices}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed}")
    lightning = _lightning()
    joined_here = not torch.distributed.is_initialized()
    torch.manual_seed(seed)
    model = build()
    history = _history_class()(task, data, title, recipe)
    going_on = newest(out) if resume and out is not None else None
    callbacks: list[Any] = [history]
    if out is not None:
        callbacks.append(
            lightning.pytorch.callbacks.ModelCheckpoint(
                dirpath=out, filename="last", save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True
            )
        )
    # Lightning's tips and banners say nothing that our user can act on.
    with progress.quiet_loggers(*LIGHTNING), _deterministic(device == "cpu"):
        trainer = lightning.Trainer(
            accelerator={"cuda": "gpu"}.get(device.split(":")[0], device.split(":")[0]),
            devices=devices,
            strategy="ddp" if strategy == "auto" and devices > 1 else strategy,
            use_distributed_sampler=False,
            max_epochs=recipe.epochs,
            max_steps=recipe.max_steps or -1,
            gradient_clip_val=recipe.clip,
            precision=recipe.precision,  # type: ignore[arg-type]
            callbacks=callbacks,
            plugins=[] if out is None else [checkpoint_writer()],
            logger=False,
            enable_checkpointing=out is not None,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=out,
        )
        module = _module_class()(model, task, data, recipe, seed)
        start = time.perf_counter()
        if going_on is not None:
            _check_fits(going_on, module)
        with _plain_interrupt(trainer):
            trainer.fit(module, ckpt_path=None if going_on is None else str(going_on), weights_only=True)
        seconds = time.perf_counter() - start
    if joined_here and torch.distributed.is_initialized():
        # Left standing, the group's threads outlive the interpreter and abort it.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if not trainer.is_global_zero:
        raise SystemExit(0)
    model = module.model.to(device)
    history.restore_best(model)
    model = _single(model).eval()
    with torch.no_grad():
        metrics = task.evaluate(model, data.test)
    return Fit(model, metrics, history.curve, round(seconds, 3), trainer.global_step)


def _single(model: nn.Module) -> nn.Module:
    """The model, or a copy in float32 of one that is trained in another type: data and metrics are float32."""
    other = any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())
    return copy.deepcopy(model).float() if other else model


def _check_fits(checkpoint: Path, module: nn.Module) -> None:
    """Is this a checkpoint of the module that is to go on from it?"""
    saved = read(checkpoint) or {"state_dict": {}}
    shapes = {name: getattr(value, "shape", None) for name, value in saved["state_dict"].items()}
    if saved.get("parts", _parts(module)) != _parts(module) or shapes != {
        name: value.shape for name, value in module.state_dict().items()
    }:
        raise UserError(
            f"{checkpoint} is of another preset or of other data: resume with what it was started with, "
            "or train in another folder"
        )


def _parts(module: nn.Module) -> list[str]:
    """The kinds of a module's parts: two systems may have weights of the same names and shapes."""
    return [type(part).__name__ for part in module.modules()]


def _lightning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning
        import lightning.pytorch.callbacks
    return lightning


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Ask torch for deterministic algorithms, and leave it as it was."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted or before[0], warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _plain_interrupt(trainer: Any) -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt, where Lightning would leave the process."""
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    if trainer.interrupted:
        raise KeyboardInterrupt


def _module_class() -> type:
    lightning = _lightning()

    class Module(lightning.LightningModule):
        """Ties a model to its task's loss; the model itself knows nothing of this."""

        def __init__(self, model: nn.Module, task: Task, data: TaskData, recipe: Recipe, seed: int):
            super().__init__()
            self.model, self.task, self.data, self.recipe, self.seed = model, task, data, recipe, seed

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["parts"] = _parts(self)

        def train_dataloader(self) -> DataLoader:
            count = len(self.data.train)  # type: ignore[arg-type]
            return DataLoader(
                self.data.train,
                batch_size=self.recipe.batch_size,
                sampler=EpochSampler(count, self.seed, self.global_rank, self.trainer.world_size),
                collate_fn=self.data.collate,
                generator=torch.Generator(),  # or the loader would draw from the generator that dropout draws from
            )

        def training_step(self, batch: Any, index: int) -> Tensor:
            with collect_auxiliary() as added:
                loss = self.task.loss(self.model, batch)
            if added:
                loss = loss + torch.stack(added).mean()
            if not torch.isfinite(loss):
                raise Diverged(f"the loss became {loss.item()} at step {self.global_step}; {_help(self)}")
            return loss

        def on_train_epoch_start(self) -> None:
            # Dropout and augmentation draw from here on: a resumed epoch draws what an uninterrupted one would.
            torch.manual_seed(self.seed * 1_000_003 + self.current_epoch * 101 + self.global_rank)

        def configure_optimizers(self) -> Any:
            optimizer = self.recipe.make_optimizer(self.model)
            steps_per_epoch = len(self.train_dataloader())
            steps = min(self.recipe.epochs * steps_per_epoch, self.recipe.max_steps or sys.maxsize)
            schedule = self.recipe.make_schedule(optimizer, steps, steps_per_epoch)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module


def _help(module: Any) -> str:
    """What may help where training diverges: a lower rate, and what layers know of themselves."""
    own = [part.if_diverging for part in module.model.modules() if hasattr(part, "if_diverging")]
    return f"{', or '.join(dict.fromkeys([f'a lower lr than {module.recipe.lr:g}', *own]))} may help"


def _history_class() -> type:
    lightning = _lightning()

    class History(lightning.pytorch.callbacks.Callback):
        """Keeps the learning curve, shows the bar, and stops early where the recipe says so."""

        def __init__(self, task: Task, data: TaskData, title: str, recipe: Recipe):
            self.task, self.data, self.title, self.recipe = task, data, title, recipe
            self.curve: list[dict[str, float | int]] = []
            self.best: float | None = None
            self.best_state: dict[str, Tensor] | None = None
            self.waited = 0
            self.losses: list[Tensor] = []

        def on_train_start(self, trainer: Any, module: Any) -> None:
            total = min(trainer.max_epochs * trainer.num_training_batches, self.recipe.max_steps or sys.maxsize)
            # Of several processes one shows the bar.
            self.context = progress.bar(self.title, total) if trainer.is_global_zero else nullcontext(lambda *_: None)
            self.advance = self.context.__enter__()
            self.advance(trainer.global_step)
            if self.recipe.patience is not None and self.waited >= self.recipe.patience:
                trainer.should_stop = True  # the run that is resumed had stopped

        def teardown(self, trainer: Any, module: Any, stage: str) -> None:
            if hasattr(self, "context"):
                self.context.__exit__(None, None, None)

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.losses = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.losses.append(outputs["loss"].detach())
            self.advance()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            # A loss tells of the weights before its step: those after the last one are seen by no loss.
            if not all(bool(torch.isfinite(weight).all()) for weight in module.model.parameters()):
                raise UserError(f"the weights are no longer finite after step {trainer.global_step}; {_help(module)}")
            module.model.eval()
            with torch.no_grad():
                metrics = self.task.evaluate(_single(module.model), self.data.val) if len(self.data.val) else {}  # type: ignore
            module.model.train()
            loss = trainer.strategy.reduce(torch.stack(self.losses).mean(), reduce_op="mean").item()
            self.curve.append({"epoch": float(trainer.current_epoch + 1), "train_loss": loss, **metrics})
            if self.recipe.patience is not None:
                if self.task.metric not in metrics:
                    raise UserError(
                        f"patience watches {self.task.metric!r}, and {self.data.name} has no validation for it"
                    )
                self._stop_early(trainer, module, metrics[self.task.metric], self.recipe.patience)

        def _stop_early(self, trainer: Any, module: Any, value: float, patience: int) -> None:
            sign = 1 if self.task.higher_is_better else -1
            if self.best is None or sign * value > sign * self.best:
                self.best, self.waited = value, 0
                self.best_state = {k: v.detach().clone() for k, v in module.model.state_dict().items()}
                return
            self.waited += 1
            trainer.should_stop = self.waited >= patience

        def restore_best(self, model: nn.Module) -> None:
            if self.best_state is not None:
                model.load_state_dict(self.best_state)

        def state_dict(self) -> dict[str, Any]:
            return {"curve": self.curve, "best": self.best, "best_state": self.best_state, "waited": self.waited}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.curve, self.best, self.waited = state["curve"], state["best"], state["waited"]
            self.best_state = state["best_state"]

    return History
