"""Train a system of a paper on data."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from provenn import catalog
from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.names import check_options
from provenn.core.narrowing import present
from provenn.core.settings import arguments_of
from provenn.tasks import datasets

if TYPE_CHECKING:
    from torch import Tensor, nn

    from provenn.nn.masks import Masks
    from provenn.tasks.base import Task, TaskData
    from provenn.training import Fit, Hardware, Recipe, Saving
    from provenn.training.weights import Label
from provenn.inference.overrides import divided
from provenn.inference.paper import Paper
from provenn.inference.prune import MASKS, PRUNED, masks_of

SIDES = ("size", "image_size")  # what presets call the side of their images, which is that of the data
FEWEST_STEPS = 200  # of a training on the user's own data, where nobody says how long


class TrainOptions(TypedDict, total=False):
    """What `train` starts from, where it runs, and what it writes: as `provenn.training.Hardware` and `Saving` say.

    `weights` is a weight file, ours or the authors', or the folder of a run; by default weights are drawn. Of pruned
    ones the zeros stay. With `two_steps` they may lack parts of the network, such as the head for other classes, which
    learn alone at first: see `provenn.training.new_then_all`. Parameters whose names meet a pattern of `freeze` do not
    learn, see `provenn.training.adapters.freeze`. With `checkpointing` towers and decoders compute their activations
    again for the gradient, which saves memory and changes no value. The run's folder is `out`, by default
    `runs/<slug>`. `device` may be auto, the default.
    """

    weights: str | Path | None
    two_steps: bool
    freeze: str | Sequence[str]
    checkpointing: bool
    device: str
    devices: int
    num_nodes: int
    strategy: str
    context_parallel: int
    context_method: str
    workers: int
    out: str | Path | None
    resume: bool
    save_every: int | None
    keep_best: int
    logger: str | None


def train(
    slug: str,
    data: str | Path,
    *,
    preset: str | None = None,
    task: str | None = None,
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    **options: Unpack[TrainOptions],
) -> "tuple[Path, dict[str, float]]":
    """Train a paper's system on data and save its weights; returns the folder and the test metrics.

    Args:
        slug: the paper.
        data: an embedded data set's name, or a path.
        preset, task: which system; by default the paper's first (for that task). `recall` takes language models.
        seed: fixes everything random.
        overrides: to how the data is read or the preset is built, such as {"horizon": 24, "dim": 128}.
        recipe: overrides of the preset's recipe, such as {"epochs": 20}.
        options: what it starts from, where it runs, and what it writes: see `TrainOptions`.
    """
    import json
    from dataclasses import asdict, fields

    from provenn import __version__, tasks, training
    from provenn.core.device import choose_device
    from provenn.core.files import alone_in, save_figure, work_folder, write_atomically
    from provenn.nn.towers import set_checkpointing
    from provenn.training import weights as files
    from provenn.training.adapters import freeze
    from provenn.training.checkpoints import CHECKPOINT, begun
    from provenn.training.recipes import recipe_of
    from provenn.training.stages import STEPS

    check_options("train", options, TrainOptions)
    card = catalog.card(slug)
    # A paper of the task itself has presets for it; others lend theirs.
    presets_of = None if task is None or task in card.tasks else tasks.face_of(task).presets_of
    given: dict[str, Any] = {**options}
    weights = given.pop("weights", None)
    two_steps = given.pop("two_steps", False)
    frozen, checkpointing = given.pop("freeze", ()), given.pop("checkpointing", False)
    frozen = (frozen,) if isinstance(frozen, str) else tuple(frozen)
    start = None if weights is None else _start(card, weights, preset)
    if two_steps:
        _check_two_steps(start)
    chosen = card.preset(preset if start is None else start.label.preset, presets_of or task)
    kind = tasks.get_task(card.task_of(chosen) if task is None or presets_of is None else task)
    folder = Path(given.pop("out", None) or Path("runs") / card.slug)
    on = {each.name: given.pop(each.name) for each in fields(training.Hardware) if each.name in given}
    hardware = training.Hardware(**{**on, "device": choose_device(on.get("device", "auto"))})
    saving = training.Saving(folder, save=lambda model, file: files.save(model, file, label), **given)
    written = [folder / step for step in STEPS] if two_steps else [folder]  # where checkpoints go
    if chosen.stages is not None:
        if two_steps:
            raise UserError(f"{chosen.name} has stages of its own: leave --two-steps out")
        if frozen:
            raise UserError(f"{chosen.name} has stages of its own, which say what learns: leave --freeze out")
        written = sorted(place for place in folder.glob("*") if place.is_dir())
    is_begun = any(begun(place) for place in written)
    if saving.resume and not is_begun:
        raise UserError(f"nothing to resume in {folder}: it holds no {CHECKPOINT}")
    for name in ("run.json", files.FILE, "picture.png"):
        if (folder / name).is_dir():
            raise UserError(
                f"{folder / name} is a folder, and a file of that name is to be written: choose another --out"
            )
    _check_masks(start, hardware, folder, saving.resume)
    if not saving.resume and is_begun and not (folder / files.FILE).exists():
        with alone_in(folder) if progress.first_process() else nullcontext():  # else another process is at it
            pass
        raise UserError(
            f"{folder} holds a training that did not end: go on with --resume, choose another --out, "
            f"or delete {next(place for place in written if begun(place)) / CHECKPOINT}"
        )
    recipe_overrides = {name: value for name, value in (recipe or {}).items() if value is not None}
    # Who asks for passes over the data means them, whatever number of steps the preset stops at.
    facts = {
        name: value for name, value in chosen.recipe.items() if name != "max_steps" or "epochs" not in recipe_overrides
    }
    final = recipe_of(facts, **recipe_overrides)
    training.check_recipe(final, kind)
    of_data, of_system = divided(overrides or {}, kind.load, card.resolve(chosen.build))
    for name, value in tasks.face_of(kind.name).as_read.items():
        if of_data.get(name) == value != chosen.reads.get(name):
            raise UserError(f"{chosen.name} of {card.slug} takes no {name}={value}: leave it out")
    source, named = datasets.resolve(data), data
    data, of_data = source.data, {**source.options, **of_data}
    users_own = data not in kind.embedded
    try:
        loaded = kind.load(data, seed=seed, **{**(chosen.reads if users_own else {}), **of_data})
    except UserError as error:
        if preset or task:
            raise
        raise UserError(f"{error}{_other_work(card, kind, data)}") from None
    takes = arguments_of(card.resolve(chosen.build))
    for name in of_system.keys() & loaded.options.keys():
        if of_system[name] != loaded.options[name]:
            raise UserError(f"{name} follows from the data, where it is {loaded.options[name]}, got {of_system[name]}")
    sides = {name: loaded.meta["size"] for name in SIDES if "size" in loaded.meta and name in takes}
    built_with = {**sides, **loaded.options, **of_system}
    if start is not None:
        built_with = _as_started(start, built_with, str(data), two_steps)
    examples = len(loaded.train)  # type: ignore[arg-type]
    if examples < recipe_overrides.get("batch_size", 0):
        # A preset's batch may be larger than a few examples of the user's own; one that is typed was meant as it is.
        raise UserError(
            f"batch_size={recipe_overrides['batch_size']} is more than the {examples:,} examples to train on: "
            f"give at most {examples}"
        )
    if "epochs" not in recipe_overrides:
        steps = recipe_overrides.get("max_steps") or (FEWEST_STEPS if users_own and final.max_steps is None else 0)
        final = _long_enough(final, steps, examples)
    system: dict[str, Any] = {"preset": chosen.name, "task": task, "weights": None if weights is None else str(weights)}
    system |= {"two_steps": ""} if two_steps else {}
    system |= {"freeze": frozen} if frozen else {}
    system |= {"checkpointing": ""} if checkpointing else {}
    trained_on = {
        "data": str(named),
        "fingerprint": loaded.fingerprint,
        "seed": seed,
        "options": of_data,
        "recipe": asdict(final),
        "command": _command(card.slug, named, {**system, **recipe_overrides, "seed": seed}, {**of_data, **of_system}),
    }
    if start is not None:
        trained_on |= {"weights": str(weights), **start.pruned}
    label = files.Label(
        card.slug, chosen.name, kind.name, {**chosen.options, **built_with}, loaded.meta, __version__, trained_on
    )

    def build() -> "nn.Module":
        network = Paper(card).build(chosen.name, **built_with)
        if checkpointing:
            set_checkpointing(network)
        if frozen:
            freeze(network, *frozen)
        return network if start is None or two_steps else start.begin(network)

    with work_folder(folder), _taken_by(chosen.name, str(named)):
        _keep_masks(start, folder)
        if two_steps:
            result = _in_two_steps(build, present(start, "weights"), kind, loaded, final, seed, hardware, saving)
        elif chosen.stages is not None:
            result = training.fit_stages(
                build, card.resolve(chosen.stages), kind, loaded, final, seed=seed, hardware=hardware, saving=saving
            )
        else:
            result = training.fit(
                build,
                kind,
                loaded,
                final,
                seed=seed,
                hardware=hardware,
                saving=saving,
                title=f"{card.slug}: {chosen.name} on {loaded.name}",
            )
        usual = recipe_of(facts).epochs
        if final.epochs > usual and not recipe_overrides.keys() & {"epochs", "max_steps"}:
            progress.say(
                f"{examples} examples to train on: {final.epochs} epochs instead of {usual}, which made "
                f"{result.steps} steps; --epochs or --steps says otherwise"
            )
        label = replace(label, metrics=result.metrics)
        files.save(result.model, folder / files.FILE, label)
        summary = {
            **asdict(label),
            "dummy_baseline": kind.dummy_baseline(loaded),
            "tested_on": len(loaded.test),  # type: ignore[arg-type]
            "data": loaded.name,
            "fingerprint": loaded.fingerprint,
            "seed": seed,
            "recipe": asdict(final),
            "curve": result.curve,
            "seconds": result.seconds,
            "steps": result.steps,
        }
        write_atomically(folder / "run.json", json.dumps(summary, indent=1))
        picture = kind.picture(result.model, loaded)
        if picture is not None:
            save_figure(picture, folder / "picture.png", bbox_inches="tight")
    return folder, result.metrics


@dataclass(frozen=True)
class _Start:
    """Weights that a training starts from.

    Args:
        source: where they came from, as it was typed.
        state: by the names of our model.
        label: what they say of themselves.
        masks: what of them is kept, where they were pruned.
    """

    source: str
    state: "dict[str, Tensor]"
    label: "Label"
    masks: "Masks | None"

    @property
    def pruned(self) -> dict[str, Any]:
        """How they were pruned, for the label of what is trained."""
        return {PRUNED: self.label.trained_on[PRUNED]} if self.masks is not None else {}

    def begin(self, network: "nn.Module") -> "nn.Module":
        """A new network with these weights, its zeros held."""
        from provenn.training.weights import load_into

        load_into(network, self.state, self.source)
        if self.masks is not None:
            try:
                self.masks.hold(network)
            except ValueError as error:
                raise UserError(f"{self.source}: {error}: prune again, which writes both anew") from None
        return network

    def begin_in_part(self, network: "nn.Module") -> list[str]:
        """Give a new network what fits of these weights; returns the parameters that keep what was drawn.

        Raises:
            UserError: less than half of the weights fit, or all of the network comes from them.
        """
        from provenn.training.weights import load_into

        own = network.state_dict()
        fits = {name: tensor for name, tensor in self.state.items() if name in own and own[name].shape == tensor.shape}
        if len(fits) < len(self.state) / 2:
            raise UserError(
                f"{len(fits)} of {len(self.state)} tensors of {self.source} fit this network: it is another one; "
                "start from weights of the same preset and options"
            )
        load_into(network, {**own, **fits}, self.source)
        new = [name for name, parameter in network.named_parameters() if name not in fits and parameter.requires_grad]
        if not new:
            raise UserError(
                f"{self.source} has every part of this network, so that none would learn alone at first: "
                "leave --two-steps out"
            )
        return new


def _check_two_steps(start: _Start | None) -> None:
    if start is None:
        raise UserError("--two-steps tunes weights: give them with --weights, or leave --two-steps out")
    if start.masks is not None:
        raise UserError("pruned weights are tuned as a whole: leave --two-steps out")


def _in_two_steps(
    build: Callable[[], "nn.Module"],
    start: _Start,
    kind: "Task",
    data: "TaskData",
    recipe: "Recipe",
    seed: int,
    hardware: "Hardware",
    saving: "Saving",
) -> "Fit":
    """What the weights lack learns alone, then all of the network; in one outcome, with the second step's metrics."""
    import torch

    from provenn import training
    from provenn.training.checkpoints import CHECKPOINT, PREVIOUS
    from provenn.training.stages import STEPS

    torch.manual_seed(seed)
    model = build()
    new = start.begin_in_part(model)
    shown = ", ".join(new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
    progress.say(f"{start.source} does not bring {shown}, which learn{'s' * (len(new) == 1)} alone at first")
    if not saving.resume:
        for step in STEPS:  # or a later --resume would go on with those of another training
            for name in (CHECKPOINT, PREVIOUS):
                (saving.folder / step / name).unlink(missing_ok=True)

    def parameters(network: "nn.Module") -> "list[nn.Parameter]":
        return [parameter for name, parameter in network.named_parameters() if name in set(new)]

    stages = training.new_then_all(kind, data, recipe, parameters)
    first, second = training.run_stages(model, stages, seed=seed, hardware=hardware, saving=saving)
    epochs = len(first.curve)
    curve = [*first.curve, *({**entry, "epoch": entry["epoch"] + epochs} for entry in second.curve)]
    both = replace(second, curve=curve, seconds=first.seconds + second.seconds, steps=first.steps + second.steps)
    both.model.eval()
    return both


def _start(card: catalog.Card, weights: str | Path, preset: str | None) -> _Start:
    model, label = Paper(card).load(weights, preset=preset)
    return _Start(str(weights), model.state_dict(), label, masks_of(weights, label, model))


def _as_started(start: _Start, built_with: dict[str, Any], data: str, two_steps: bool) -> dict[str, Any]:
    """The options that the weights were built with, which those of the data must be if all of it is taken over.

    Raises:
        UserError: one differs.
    """
    for name, value in built_with.items():
        if name in start.label.options and start.label.options[name] != value and not two_steps:
            if start.masks is not None:
                raise UserError(
                    f"{start.source} was built with {name} = {start.label.options[name]}, and {data} asks for {value}: "
                    "tune unpruned weights on this data with --two-steps, and prune what comes out"
                )
            raise UserError(
                f"{start.source} was built with {name} = {start.label.options[name]}, and {data} asks for {value}: "
                "start from weights of such data, add --two-steps to train what differs first, or leave --weights out"
            )
    return {**start.label.options, **built_with}


def _check_masks(start: _Start | None, hardware: "Hardware", folder: Path, resume: bool) -> None:
    """Refuse what would let pruned weights grow back."""
    if start is not None and start.masks is not None and hardware.sharded:
        raise UserError("strategy fsdp replaces the weights, whose zeros would grow back: take ddp for pruned weights")
    if resume and (folder / MASKS).exists() and (start is None or start.masks is None):
        raise UserError(f"the training in {folder} began from pruned weights: give the same --weights with --resume")


def _keep_masks(start: _Start | None, folder: Path) -> None:
    """The masks beside what is trained, so that it is known to be pruned; none of an earlier run."""
    from provenn.surgery.pruned import save_masks

    if not progress.first_process():
        return
    if start is not None and start.masks is not None:
        save_masks(start.masks, folder / MASKS)
    else:
        (folder / MASKS).unlink(missing_ok=True)


def _long_enough(recipe: "Recipe", least: int, examples: int) -> "Recipe":
    """As many epochs as give `least` steps, where the preset's, which are for other data, give fewer."""
    import math

    steps = math.ceil(math.ceil(examples / recipe.batch_size) / recipe.accumulate)  # an epoch
    return replace(recipe, epochs=max(recipe.epochs, math.ceil(least / max(1, steps))))


@contextmanager
def _taken_by(preset: str, data: str) -> Iterator[None]:
    """What a system says of data that it does not take, in one line with both names."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        if "parameter group" in str(error):  # torch's word for an optimizer of other parameters than the checkpoint's
            raise UserError("this training was started with another --freeze: resume with the same") from None
        raise UserError(f"{preset} does not take {data}: {error}") from error


# What `provenn train` takes, and how it is called there.
OPTIONS = {
    "preset": "preset",
    "task": "task",
    "weights": "weights",
    "epochs": "epochs",
    "max_steps": "steps",
    "lr": "lr",
}
OPTIONS |= {"batch_size": "batch-size", "seed": "seed", "two_steps": "two-steps"}
OPTIONS |= {"freeze": "freeze", "checkpointing": "checkpointing"}


def _command(slug: str, data: str | Path, options: dict[str, Any], overrides: dict[str, Any]) -> str:
    """The command that trains so again."""
    import json
    import shlex

    def spelled(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    words = ["provenn", "train", slug, "--data", str(data)]
    for name, option in OPTIONS.items():
        value = options.get(name)
        for each in value if isinstance(value, tuple) else () if value is None else (value,):
            words += [f"--{option}", *([str(each)] * (each != ""))]
    for name in sorted(options.keys() - OPTIONS.keys()):
        words += ["--recipe", f"{name}={spelled(options[name])}"]
    for name, value in sorted(overrides.items()):
        words += ["--set", f"{name}={spelled(value)}"]
    return shlex.join(words)


def _other_work(card: catalog.Card, kind: "Task", data: str | Path) -> str:
    """A hint for those who gave data of one task to a paper whose first preset is for another."""
    from provenn.tasks import face_of, get_task, task_names

    probes = [name for name in task_names() if face_of(name).presets_of in card.tasks]
    others = [name for name in card.tasks if name != kind.name and data not in kind.embedded]
    fitting = [name for name in (*others, *probes) if data in get_task(name).embedded]
    fitting = fitting or [name for name in others if _can_read(get_task(name), data)]
    return f" (read for {kind.name}; for other work add --task {' or '.join(fitting or others)})" if others else ""


def _can_read(kind: "Task", data: str | Path) -> bool:
    """Whether a file of the user's own is such data. A folder is not looked through for a hint."""
    if not Path(data).is_file():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.load(data)
    except (UserError, TypeError):  # not that, or it needs more arguments
        return False
    return True
