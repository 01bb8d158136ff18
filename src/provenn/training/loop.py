"""Training, on Lightning: the same loop for every task, deterministic for a seed, resumable bit for bit."""

import copy
import importlib.util
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional  # before there is a group: its functions' defaults would hold that for good
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.finite import check_type
from provenn.distributed import METHODS, rank_lost, speaks_of_lost_rank
from provenn.nn.auxiliary import collect_auxiliary
from provenn.tasks.base import Task, TaskData, count_examples
from provenn.training.augmentation import augmented, check_recipe, mixed
from provenn.training.checkpoints import CHECKPOINT, best_file, checkpoint_writer, clear_best, newest, read
from provenn.training.context import TokenShare, check_divides_tokens
from provenn.training.recipes import Recipe
from provenn.training.systems import JointOptimizer, before_saving, make_optimizer, training_loss

LIGHTNING = ("lightning.pytorch", "lightning.fabric", "lightning")  # its loggers
STRATEGIES = ("auto", "ddp", "fsdp")
SHARDED_PRECISIONS = ("32-true", "bf16-mixed")
PROCESSES = 16  # that may be asked for where there are fewer cores: hundreds would stop the machine
LOGGERS = ("csv", "tensorboard")
LOG = "log"  # the folder of what they write
MAY_CHANGE = ("epochs", "max_steps", "patience")  # of the recipe, in a run that goes on
OFTEN = 0.5  # seconds between two figures on the live line: reading a loss waits for the device
MOST_LOST = 120.0  # seconds of work since the last checkpoint


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

    Args:
        count, seed: how many examples, and what fixes their order.
        rank, processes: which of how many processes this is.
        epoch, start: where a resumed run goes on: so many of the process's examples of this epoch were taken.
    """

    def __init__(self, count: int, seed: int, rank: int = 0, processes: int = 1, *, epoch: int = 0, start: int = 0):
        self.count, self.seed, self.rank, self.processes = count, seed, rank, processes
        self.epoch, self.start = epoch, start

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this as each epoch begins; a resumed one keeps its start."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator)
        indices = torch.arange(self.rank, self.processes * len(self), self.processes) % self.count
        return iter(order[indices].tolist()[self.start :])

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
    num_nodes: int = 1,
    strategy: str = "auto",
    context_parallel: int = 1,
    context_method: str = "ring",
    workers: int = 0,
    out: Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    keep_best: int = 0,
    save: Callable[[nn.Module, Path], None] | None = None,
    logger: str | None = None,
    title: str = "training",
) -> Fit:
    """Build a model from the seed and train it.

    The model may bring a loss, optimizers and a last step of its own: see `provenn.training.systems`.

    Args:
        build: makes the model; called after the seed is set, so that a seed fixes the weights.
        task, data, recipe: what is learned, from what, and how.
        seed: fixes weights, order, dropout and augmentation.
        device: cpu, cuda or mps.
        devices, num_nodes, strategy: how many processes train together on how many machines, and how: "ddp", or "fsdp",
            in which each holds a part of weights, gradients and the optimizer's state between steps. `batch_size` is
            each one's: two give the weights of one with twice the batch, to rounding, where the loss is a mean over
            examples and nothing draws or mixes the batch. Lightning starts those of a machine by running the program
            again (or torchrun has); only the first of all returns, the others leave the program.
        context_parallel, context_method: how many of these processes share each sequence, and by which method of
            `provenn.distributed.METHODS`: of language models of softmax attention. Where `devices` is 1 there
            are so many. The weights are those of one process, to rounding, where nothing draws.
        workers: processes that read the data; 0 reads in this one. Augmentation draws otherwise with them than without.
        out: a folder for checkpoints after every epoch; None keeps none.
        resume: go on from the checkpoint in `out` where there is one.
        save_every: a checkpoint after every so many steps too.
        keep_best, save: the models of so many best epochs by the validation metric are written, by `save(model, file)`,
            as `best-EPOCH.safetensors` in `out`.
        logger: "csv" or "tensorboard": loss and rate of each step, metrics of each epoch, under `out`/log.
        title: of the progress bar.

    Raises:
        UserError: a loss that is not finite, with the step at which it happened; patience or keep_best without their
            metric; another process that has ended; or what does not go together.
    """
    for name, value, least in (("workers", workers, 0), ("keep_best", keep_best, 0), ("save_every", save_every, 1)):
        if value is not None and value < least:
            raise UserError(f"{name} must be a whole number of at least {least}, got {value}")
    if out is None and (save_every or keep_best or logger):
        raise UserError("save_every, keep_best and logger write to a folder: give out")
    if keep_best and save is None:
        raise UserError("keep_best needs `save`, which writes a model to a file")
    if strategy == "fsdp" and (keep_best or recipe.ema is not None):
        raise UserError("keep_best and ema need whole weights in each process: take strategy ddp")
    if strategy not in STRATEGIES:
        raise UserError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    for name, value in (("devices", devices), ("num_nodes", num_nodes)):
        if value < 1:
            raise UserError(f"{name} must be a whole number of at least 1, got {value}")
    if context_parallel < 1:
        raise UserError(f"context_parallel must be a whole number of at least 1, got {context_parallel}")
    if context_parallel > 1:
        if devices * num_nodes == 1:
            devices = context_parallel
        if devices * num_nodes % context_parallel:
            raise UserError(f"context_parallel={context_parallel} does not divide {devices * num_nodes} processes")
        if context_method not in METHODS:
            raise UserError(f"context_method must be one of {', '.join(METHODS)}, got {context_method!r}")
        if strategy == "fsdp":
            raise UserError("context_parallel needs whole weights in each process: take strategy ddp")
    if strategy == "fsdp" and recipe.precision not in SHARDED_PRECISIONS:
        raise UserError(f"strategy fsdp takes precision {', '.join(SHARDED_PRECISIONS)}, got {recipe.precision!r}")
    if device.startswith("cuda") and devices > torch.cuda.device_count():
        raise UserError(f"devices must be at most {torch.cuda.device_count()} on this machine, got {devices}")
    most_processes = max(os.cpu_count() or 1, PROCESSES)
    if devices > most_processes:
        raise UserError(f"devices must be at most {most_processes} on this machine, got {devices}")
    if workers > most_processes:
        raise UserError(f"workers must be at most {most_processes} on this machine, got {workers}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed}")
    check_recipe(recipe, task)
    if not count_examples(data.train):
        raise UserError(f"{data.name} has nothing to train on")
    lightning = _lightning()
    joined_here = not torch.distributed.is_initialized()
    torch.manual_seed(seed)
    model = build()
    check_recipe(recipe, task, model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{title}: nothing to train, {type(model).__name__} has no parameters that need a gradient")
    if context_parallel > 1:
        check_divides_tokens(model, task, context_method, context_parallel)
    best = _Best(out, keep_best, save) if out is not None and save is not None and keep_best else None
    history = _history_class()(task, data, title, recipe, out, save_every, best)
    going_on = newest(out) if resume and out is not None else None
    if out is not None and going_on is None:
        clear_best(out)
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
            num_nodes=num_nodes,
            strategy=_strategy(strategy, devices * num_nodes),
            use_distributed_sampler=False,
            max_epochs=recipe.epochs,
            max_steps=recipe.max_steps or -1,
            gradient_clip_val=recipe.clip,
            accumulate_grad_batches=recipe.accumulate,
            precision=recipe.precision,
            callbacks=callbacks,
            plugins=[] if out is None else [checkpoint_writer()],
            logger=False if logger is None or out is None else _logger(logger, out),
            enable_checkpointing=out is not None,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=out,
        )
        module = _module_class()(model, task, data, recipe, seed, history, workers)
        if context_parallel > 1:
            module.share = TokenShare(context_parallel, context_method)
        start = time.perf_counter()
        if going_on is not None:
            _check_fits(going_on, module, devices * num_nodes)
        try:
            with _plain_interrupt(trainer), _lost_ranks_reported(trainer):
                trainer.fit(module, ckpt_path=None if going_on is None else str(going_on), weights_only=True)
        except Diverged:  # all processes stop at the same step, and the first one says so
            if joined_here:
                leave_group(history.wrapper)
            if not trainer.is_global_zero:
                raise SystemExit(0) from None
            raise
        seconds = time.perf_counter() - start
        if module.share is not None:
            module.share.leave(module.model)
        weights = _whole_state(module.model) if strategy == "fsdp" else None
    if joined_here:
        leave_group(history.wrapper)
    if not trainer.is_global_zero:
        raise SystemExit(0)
    if weights is None:
        model = module.model.to(device)
    else:
        model = build().to(device)
        model.load_state_dict(weights)
    if recipe.ema is not None:
        model.load_state_dict(module.learned().state_dict())
    history.restore_best(model)
    model = _single(model).eval()
    before_saving(model)
    with torch.no_grad():
        metrics = task.evaluate(model, data.test)
    return Fit(model, metrics, history.curve, round(seconds, 3), trainer.global_step)


def leave_group(wrapper: nn.Module | None) -> None:
    """Leave the group of processes that train together, where there is one; all of them have to, at the same point.

    Left standing, its threads outlive the interpreter and abort it. Who lets go of it last waits for those threads, and
    one of them may wait for the interpreter to let go of the tensor that was reduced last. Python's hold of the group
    frees the interpreter meanwhile, DDP's does not and waits for ever: so DDP's goes first.

    Args:
        wrapper: what the model was trained in.
    """
    if not torch.distributed.is_initialized():
        return
    group = torch.distributed.group.WORLD
    torch.distributed.barrier()
    for part in ("logger", "reducer", "process_group") if isinstance(wrapper, DistributedDataParallel) else ():
        delattr(wrapper, part)
    torch.distributed.destroy_process_group()
    del group


def _strategy(name: str, processes: int) -> Any:
    """Lightning's strategy of that name."""
    if name != "fsdp":
        return "ddp" if name == "auto" and processes > 1 else name
    return _lightning().pytorch.strategies.ModelParallelStrategy(
        data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def _whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model, of which each process may hold a part; all of them have to ask."""
    from torch.distributed.tensor import DTensor

    state = {name: value.detach() for name, value in model.state_dict().items()}
    return {name: v.full_tensor() if isinstance(v, DTensor) else v.clone() for name, v in state.items()}


@contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """Every process holds all weights inside, so that more than `forward` may be called."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def _single(model: nn.Module) -> nn.Module:
    """The model, or a copy in float32 of one that is trained in another type: data and metrics are float32."""
    other = any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())
    return copy.deepcopy(model).float() if other else model


def _is_optimizer_state(state: Any) -> bool:
    """Of one optimizer, or of several joined."""
    if not isinstance(state, dict):
        return False
    parts = state.get("parts")
    return "param_groups" in state or (isinstance(parts, list) and bool(parts) and all(map(_is_optimizer_state, parts)))


def _check_fits(checkpoint: Path, module: Any, processes: int) -> None:
    """Is this a checkpoint of the module that is to go on from it, trained in the same way?"""
    saved = read(checkpoint) or {"state_dict": {}}
    shapes = {name: getattr(value, "shape", None) for name, value in saved["state_dict"].items()}
    if saved.get("parts", _parts(module)) != _parts(module) or shapes != {
        name: value.shape for name, value in module.state_dict().items()
    }:
        raise UserError(
            f"{checkpoint} is of another preset or of other data: resume with what it was started with, "
            "or train in another folder"
        )
    for name, value in saved["state_dict"].items():
        check_type(name, value, module.state_dict()[name], str(checkpoint))
    states = [_is_optimizer_state(state) for state in saved.get("optimizer_states") or [None]]
    if not (all(states) and isinstance(saved.get("loops"), dict) and isinstance(saved.get("lr_schedulers"), list)):
        raise UserError(
            f"{checkpoint} is damaged: it lacks the state of the optimizer or of the loop; train again without --resume"
        )
    began, now = saved.get("began", {}), module.began()
    if saved.get("within_epoch"):
        began, now = {**began, "processes": saved["processes"]}, {**now, "processes": processes}
    other = [f"{name} {began[name]!r} (now {now[name]!r})" for name in began if began[name] != now.get(name)]
    if other:
        raise UserError(
            f"{checkpoint} was started with {', '.join(other)}: resume with the same, or train in another folder"
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


@contextmanager
def _lost_ranks_reported(trainer: Any) -> Iterator[None]:
    """An error of torch.distributed that the end of another process causes says so, in one line."""
    try:
        yield
    except RuntimeError as error:
        if trainer.world_size > 1 and speaks_of_lost_rank(error):
            raise rank_lost(error, trainer.global_rank, trainer.world_size) from None
        raise


def _logger(name: str, out: Path) -> Any:
    """Lightning's logger of that name; each start of a run gets a folder `version_N` under `out`/log."""
    if name not in LOGGERS:
        raise UserError(f"logger must be one of {', '.join(LOGGERS)}, got {name!r}")
    if name == "tensorboard" and not any(
        importlib.util.find_spec(package) for package in ("tensorboard", "tensorboardX")
    ):
        raise UserError("the tensorboard logger needs a package: pip install 'provenn[tensorboard]'; or take csv")
    loggers = _lightning().pytorch.loggers
    return (loggers.CSVLogger if name == "csv" else loggers.TensorBoardLogger)(out, name=LOG)


@dataclass
class _Best:
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


def _module_class() -> type:
    LightningModule: Any = _lightning().LightningModule

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
            self.parts = _parts(self)  # before they are sharded, which gives them other classes

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
                raise Diverged(f"the loss became {loss.item()} at step {self.global_step}; {_help(self)}")
            self.history.loss = loss.detach()
            return loss * self.weight_in_step(index)

        def weight_in_step(self, index: int) -> float:
            """What makes a step's gradient the mean over its examples.

            Lightning divides each loss by `accumulate`, but an epoch's last step may have fewer batches, the last of
            them fewer examples.
            """
            size, many = self.recipe.batch_size, self.recipe.accumulate
            count = len(self.trainer.train_dataloader.sampler)
            first = index - index % many
            examples = min((first + many) * size, count) - first * size
            return many * min(size, count - index * size) / examples

        def on_train_epoch_start(self) -> None:
            # Dropout and augmentation draw from here on: a resumed epoch draws what an uninterrupted one would.
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


def _random_states(device: torch.device) -> list[dict[str, Tensor]]:
    """Where the random numbers of each process stand; all of them have to ask."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if not torch.distributed.is_initialized():
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def _help(module: Any) -> str:
    """What may help where training diverges: a lower rate, and what layers know of themselves."""
    hints = [part.if_diverging for part in module.model.modules() if hasattr(part, "if_diverging")]
    return f"{', or '.join(dict.fromkeys([f'a lower lr than {module.recipe.lr:g}', *hints]))} may help"


def _history_class() -> type:
    Callback: Any = _lightning().pytorch.callbacks.Callback

    class History(Callback):
        """Keeps the learning curve, shows the bar, and stops early where the recipe says so."""

        def __init__(
            self,
            task: Task,
            data: TaskData,
            title: str,
            recipe: Recipe,
            out: Path | None,
            save_every: int | None,
            keeper: _Best | None,
        ):
            self.task, self.data, self.title, self.recipe = task, data, title, recipe
            self.out, self.save_every, self.keeper = out, save_every, keeper
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
            if self._due(trainer) and index + 1 < trainer.num_training_batches:
                self.saved = time.monotonic()
                self.batches_done = index + 1
                self.random = _random_states(module.device)
                self.losses = list(trainer.strategy.reduce(torch.stack(self.losses), reduce_op="mean"))
                trainer.save_checkpoint(Path(str(self.out)) / CHECKPOINT)

        def _due(self, trainer: Any) -> bool:
            """Whether to save within an epoch: at the steps asked for, and before long epochs cost a kill much work.

            Clocks of several processes disagree, and all have to save together: there only steps count.
            """
            if self.save_every and self.steps % self.save_every == 0:
                return True
            alone = self.out is not None and trainer.world_size == 1
            return alone and time.monotonic() - self.saved > MOST_LOST

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
                raise Diverged(f"the weights are no longer finite after step {trainer.global_step}; {_help(module)}")
            self.batches_done, self.random = 0, []
            self.saved = time.monotonic()  # the epoch's own checkpoint follows
            model = module.learned()
            model.eval()
            # Each process evaluates all of the validation data, so that the metrics need no gathering.
            with torch.no_grad(), _gathered(model):
                metrics = self.task.evaluate(_single(model), self.data.val) if count_examples(self.data.val) else {}
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
                self.keeper.offer(_single(model), score, trainer.current_epoch + 1)
            if self.recipe.patience is not None:
                self._stop_early(trainer, model, metrics[self.task.metric], self.recipe.patience)

        def _stop_early(self, trainer: Any, model: nn.Module, value: float, patience: int) -> None:
            sign = 1 if self.task.higher_is_better else -1
            if self.best is None or math.isnan(self.best) or sign * value > sign * self.best:
                self.best, self.waited = value, 0
                self.best_state = _whole_state(model)
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
            if self.batches_done:
                state |= {"batches_done": self.batches_done, "random": self.random, "losses": list(self.losses)}
            return state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.curve, self.best, self.waited = state["curve"], state["best"], state["waited"]
            self.best_state = state["best_state"]
            if self.keeper is not None:
                self.keeper.kept = [(score, epoch) for score, epoch in state.get("kept", [])]
            self.batches_done, self.random = state.get("batches_done", 0), state.get("random", [])
            self.losses = list(state.get("losses", []))

    return History
