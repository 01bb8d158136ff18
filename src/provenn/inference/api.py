"""The Python interface: papers as objects."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenn import catalog
from provenn.catalog import datasets
from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import check_no_input, check_output
from provenn.core.settings import LARGEST, arguments_of, typed

PROBES = {"recall": "language-modelling"}  # a task without presets of its own, and whose presets it takes
SIDES = ("size", "image_size")  # what presets call the side of their images, which is that of the data
FEWEST_STEPS = 200  # of a training on the user's own data, where nobody says how long

if TYPE_CHECKING:
    from torch import nn

    from provenn.inference.evaluation import Evaluation
    from provenn.inference.inspection import Inspection
    from provenn.inference.options import Option
    from provenn.tasks.base import Task
    from provenn.training import Recipe
    from provenn.training.weights import Label


@dataclass(frozen=True)
class Paper:
    """One paper: its card, its systems, its experiments.

    >>> paper("eca_net").card.arxiv
    '1910.03151'
    """

    card: catalog.Card

    def __repr__(self) -> str:
        return f"provenn.paper({self.card.slug!r})"

    def bibtex(self) -> str:
        """The paper's BibTeX entry, under its slug."""
        return self.card.bibtex()

    def options(self, preset: str | None = None, *, task: str | None = None) -> "list[Option]":
        """What `train`, `evaluate` and `predict` take by name for a preset, with types and defaults."""
        from provenn.inference.options import options_of

        return options_of(self, preset, task)

    def build(self, preset: str | None = None, *, pretrained: bool = False, **overrides: Any) -> "nn.Module":
        """A system of the paper, with fresh weights, or with those that ship with the package.

        Args:
            preset: its name; by default the paper's first, or the first whose weights ship.
            pretrained: load the weights that ship (`card.shipped` names them); the model is then in eval mode.
            overrides: keyword arguments of the preset's function, such as `num_classes=10`.

        Raises:
            UserError: no such preset, the preset takes no such argument, or nothing can be built with its value; no
                weights ship with it, or they were trained with another value.
        """
        import inspect

        if pretrained:
            model, label = self.load(preset=preset)
            for name, value in overrides.items():
                if name not in label.options or label.options[name] != value:
                    was = label.options.get(name, "its default")
                    raise UserError(f"the weights of {label.preset} were trained with {name} = {was}, got {value!r}")
            return model

        chosen = self.card.preset(preset)
        function = self.card.resolve(chosen.build)
        arguments = {**chosen.options, **overrides}
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            takes = ", ".join(inspect.signature(function).parameters)
            raise UserError(f"{chosen.name} of {self.card.slug}: {error}; it takes: {takes}") from None
        try:
            return function(**arguments)
        except Exception as error:  # options may come from a file of a stranger's
            raise UserError(f"{chosen.name} of {self.card.slug}: {_blame(error, arguments)}") from error

    def from_official(self, file: str | Path, *, preset: str | None = None, **options: Any) -> "nn.Module":
        """Our model with the weights of the authors' checkpoint.

        Args:
            file: the checkpoint.
            preset, options: what follows from neither its shapes nor its config, such as `chunk=64` for RAT.

        Raises:
            UserError: weights of no preset, options that contradict the file, or a file that leaves something open.
        """
        return self._official(file, preset, options)[0]

    def load(
        self, weights: str | Path | None = None, *, preset: str | None = None, options: dict[str, Any] | None = None
    ) -> "tuple[nn.Module, Label]":
        """The model in a weight file, ours or the authors', in eval mode, and what it says of itself.

        Args:
            weights: the file, or the folder of a run; by default what ships with the package. A preset without
                parameters has none, and is taken as it is built.
            preset, options: of an author's file, as in `from_official`, and of a preset without parameters; ours say
                themselves what they are.

        Raises:
            UserError: weights of another paper, or of none.
        """
        from provenn.tasks import get_task
        from provenn.training import weights as files

        if weights is None and self.is_parameter_free(preset):
            facts = self.card.preset(preset)
            work, built_with = self.card.task_of(facts), {**facts.options, **(options or {})}
            meta = get_task(work).default_meta(built_with)
            model = self.build(facts.name, **built_with).eval()
            return model, files.Label(self.card.slug, facts.name, work, built_with, meta)
        file = self.card.shipped_weights(preset) if weights is None else files.locate(weights)
        state, label = files.read(file)
        if label is None:
            return self._official(file, preset, options or {})
        if label.paper != self.card.slug:
            raise UserError(f"{file} holds weights of {label.paper}, not of {self.card.slug}")
        if options:
            raise UserError(f"{file} says itself what it was built with: leave {', '.join(options)} out")
        if preset not in (None, label.preset):
            raise UserError(f"{file} holds weights of {label.preset}, not of {preset}")
        if label.meta:  # of weights that were saved for Python alone there may be none
            work = get_task(self.card.task_of(self.card.preset(label.preset))).name
            if label.task not in (work, *PROBES):
                raise UserError(
                    f"{file} says that {label.preset} was trained for {label.task!r}, and it is for {work!r}: "
                    "give other weights, these are damaged"
                )
            get_task(label.task).check_meta(label.meta, str(file))
        model = self.build(label.preset, **label.options)
        files.load_into(model, state, str(file))
        return model.eval(), label

    def is_parameter_free(self, preset: str | None = None) -> bool:
        """Whether a preset has nothing to train and no weights come with it: it is used as it is built.

        Raises:
            UserError: no such preset, or a procedure that is for no work on data.
        """
        import torch

        shipped = self.card.shipped
        if preset in shipped if preset else shipped:
            return False
        facts = self.card.preset(preset)
        self.card.task_of(facts)
        try:
            with torch.device("meta"):  # where a large preset takes no memory
                return not self.build(facts.name).state_dict()
        except UserError:  # it needs options that follow from data: it has something to fit
            return False

    def _official(self, file: str | Path, given: str | None, options: dict[str, Any]) -> "tuple[nn.Module, Label]":
        from provenn.training import weights as files

        return files.read_official(self.card, file, preset=given, options=options, build=self.build)


def _blame(error: Exception, arguments: dict[str, Any]) -> str:
    """Why a system could not be built, in one line that names the option: torch's own words name none."""
    import re

    words = " ".join(str(error).split())
    if any(re.search(rf"\b{name}\b", words) for name in arguments):
        return words
    for name, value in arguments.items():
        if isinstance(value, int | float) and value < 0:
            return f"{name} must not be negative, got {value!r}"
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"cannot be built with {given}: {words}"


def papers() -> Iterator[Paper]:
    """Every paper, by slug; a warning names those of other packages that cannot be used."""
    for name, reason in catalog.cards().left_out.items():
        warnings.warn(f"the paper {name} is left out: {reason}", stacklevel=2)
    return (Paper(card) for card in catalog.cards().values())


def paper(slug: str) -> Paper:
    """One paper, by its slug or its arXiv number; an unknown slug is answered with the nearest one."""
    return Paper(catalog.card(slug))


def from_official(slug: str, file: str | Path, *, preset: str | None = None, **options: Any) -> "nn.Module":
    """Our model with the weights of the authors' checkpoint; `preset` and `options` say what the file does not."""
    return paper(slug).from_official(file, preset=preset, **options)


def train(
    slug: str,
    data: str | Path,
    *,
    preset: str | None = None,
    task: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    context_parallel: int = 1,
    context_method: str = "ring",
    workers: int = 0,
    resume: bool = False,
    save_every: int | None = None,
    keep_best: int = 0,
    logger: str | None = None,
    overrides: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
) -> "tuple[Path, dict[str, float]]":
    """Train a paper's system on data and save its weights; returns the folder and the test metrics.

    Args:
        slug: the paper.
        data: an embedded data set's name, or a path.
        preset, task: which system; by default the paper's first (for that task). `recall` takes language models.
        out: the run's folder; `runs/<slug>` by default.
        seed: fixes everything random.
        device, devices, num_nodes, strategy: where to train; the recipe's batch size is each process's: see `fit`.
        context_parallel, context_method: processes that share each sequence, and how: see `fit`.
        workers: processes that read the data.
        resume: go on from the folder's checkpoint.
        save_every: a checkpoint after every so many steps, besides each epoch's.
        keep_best: how many epochs' weights, the best on validation data, are kept as `best-EPOCH.safetensors`.
        logger: "csv" or "tensorboard"; both write under the folder's `log`.
        overrides: to how the data is read or the preset is built, such as {"horizon": 24, "dim": 128}.
        recipe: overrides of the preset's recipe, such as {"epochs": 20}.
    """
    import json
    from dataclasses import asdict, replace

    from provenn import __version__, tasks, training
    from provenn.core.device import choose_device
    from provenn.core.files import alone_in, save_figure, write_atomically
    from provenn.training import weights
    from provenn.training.checkpoints import CHECKPOINT, begun
    from provenn.training.recipes import recipe_of

    card = catalog.card(slug)
    chosen = card.preset(preset, PROBES.get(task or "", task))
    kind = tasks.get_task(task if task in PROBES else card.task_of(chosen))
    folder = Path(out) if out is not None else Path("runs") / card.slug
    if resume and not begun(folder):
        raise UserError(f"nothing to resume in {folder}: it holds no {CHECKPOINT}")
    for name in ("run.json", weights.FILE, "picture.png"):
        if (folder / name).is_dir():
            raise UserError(
                f"{folder / name} is a folder, and a file of that name is to be written: choose another --out"
            )
    if not resume and begun(folder) and not (folder / weights.FILE).exists():
        with alone_in(folder) if progress.first_process() else nullcontext():  # else another process is at it
            pass
        raise UserError(
            f"{folder} holds a training that did not end: go on with --resume, choose another --out, "
            f"or delete {folder / CHECKPOINT}"
        )
    recipe_overrides = {name: value for name, value in (recipe or {}).items() if value is not None}
    # Who asks for passes over the data means them, whatever number of steps the preset stops at.
    facts = {
        name: value for name, value in chosen.recipe.items() if name != "max_steps" or "epochs" not in recipe_overrides
    }
    final = recipe_of(facts, **recipe_overrides)
    training.check_recipe(final, kind)
    device = choose_device(device)
    of_data, of_system = _divided(overrides or {}, kind.load, card.resolve(chosen.build))
    source, given = datasets.resolve(data), data
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
    options = {**chosen.options, **built_with}
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
    system = {"preset": chosen.name, "task": task}
    trained_on = {
        "data": str(given),
        "fingerprint": loaded.fingerprint,
        "seed": seed,
        "options": of_data,
        "recipe": asdict(final),
        "command": _command(card.slug, given, {**system, **recipe_overrides, "seed": seed}, {**of_data, **of_system}),
    }
    label = weights.Label(card.slug, chosen.name, kind.name, options, loaded.meta, __version__, trained_on)
    with _folder_for(folder), _taken_by(chosen.name, str(given)):
        result = training.fit(
            lambda: Paper(card).build(chosen.name, **built_with),
            kind,
            loaded,
            final,
            seed=seed,
            device=device,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            context_parallel=context_parallel,
            context_method=context_method,
            workers=workers,
            out=folder,
            resume=resume,
            save_every=save_every,
            keep_best=keep_best,
            save=lambda model, file: weights.save(model, file, label),
            logger=logger,
            title=f"{card.slug}: {chosen.name} on {loaded.name}",
        )
        usual = recipe_of(facts).epochs
        if final.epochs > usual and not recipe_overrides.keys() & {"epochs", "max_steps"}:
            progress.say(
                f"{examples} examples to train on: {final.epochs} epochs instead of {usual}, which made "
                f"{result.steps} steps; --epochs or --steps says otherwise"
            )
        label = replace(label, metrics=result.metrics)
        weights.save(result.model, folder / weights.FILE, label)
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


def _long_enough(recipe: "Recipe", least: int, examples: int) -> "Recipe":
    """As many epochs as give `least` steps, where the preset's, which are for other data, give fewer."""
    import math
    from dataclasses import replace

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
        raise UserError(f"{preset} does not take {data}: {error}") from error


# What `provenn train` takes, and how it is called there.
OPTIONS = {"preset": "preset", "task": "task", "epochs": "epochs", "max_steps": "steps", "lr": "lr"}
OPTIONS |= {"batch_size": "batch-size", "seed": "seed"}


def _command(slug: str, data: str | Path, options: dict[str, Any], overrides: dict[str, Any]) -> str:
    """The command that trains so again."""
    import json
    import shlex

    def spelled(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    words = ["provenn", "train", slug, "--data", str(data)]
    for name, option in OPTIONS.items():
        words += [] if options.get(name) is None else [f"--{option}", str(options[name])]
    for name in sorted(options.keys() - OPTIONS.keys()):
        words += ["--recipe", f"{name}={spelled(options[name])}"]
    for name, value in sorted(overrides.items()):
        words += ["--set", f"{name}={spelled(value)}"]
    return shlex.join(words)


def _other_work(card: catalog.Card, kind: "Task", data: str | Path) -> str:
    """A hint for those who gave data of one task to a paper whose first preset is for another."""
    from provenn.tasks import get_task

    probes = [name for name, of in PROBES.items() if of in card.tasks]
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


@contextmanager
def _folder_for(folder: Path) -> Iterator[None]:
    """Make a folder to work in, alone; where the work fails before it has written anything, nothing is left behind."""
    from provenn.core.files import alone_in, check_writable

    made = not folder.exists()
    check_writable(folder)
    try:
        with alone_in(folder) if progress.first_process() else nullcontext():
            yield
    except BaseException:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _divided(overrides: dict[str, Any], *takers: Callable) -> list[dict[str, Any]]:
    """The overrides that each of the functions takes; one that both take goes to the first, which informs the other."""
    known = [arguments_of(taker, but=("source", "seed")) for taker in takers]
    there = {name: hint for arguments in reversed(known) for name, hint in arguments.items()}
    for name in overrides:
        if name not in there:
            raise UserError(f"nothing here is called {name!r}{catalog.meant(name, there)}; {_what_can_be_set(there)}")
    overrides = {name: typed(name, value, there[name]) for name, value in overrides.items()}
    taken: list[dict[str, Any]] = []
    for position, arguments in enumerate(known):
        before = {name for earlier in known[:position] for name in earlier}
        taken.append({name: v for name, v in overrides.items() if name in arguments and name not in before})
    return taken


def _what_can_be_set(there: dict[str, Any]) -> str:
    return f"what can be set: {', '.join(there)} (`provenn show SLUG --preset NAME` has types and defaults)"


def predict(
    slug: str,
    inputs: Sequence[str | Path],
    *,
    weights: str | Path | None = None,
    preset: str | None = None,
    output: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    log: Callable[[str], None] | None = None,
) -> str:
    """Apply trained weights to files; returns what the terminal shows.

    Args:
        slug: the paper.
        inputs: files, or folders of them; of a language model, words; of what draws, classes.
        weights: a weight file, or the folder of a run; by default what ships with the package.
        preset: whose weights, where those of several ship; or of an author's file that does not name it.
        output: where the result goes.
        overrides: what the task's `predict` takes by name, such as {"reference": Path("sharp.png")} or {"tokens": 100};
            of an author's file also what it does not say, as in `from_official`, such as {"chunk": 64}.
        log: is given the result piece by piece, by tasks whose result comes so.
    """
    from provenn.core.finite import finite_outputs
    from provenn.tasks import get_task
    from provenn.training import weights as files

    chosen, overrides = paper(slug), dict(overrides or {})
    of_system: dict[str, Any] = {}
    if chosen.is_parameter_free(preset) if weights is None else files.label_of(weights) is None:
        of_system = {name: overrides.pop(name) for name in _unasked(chosen.card, overrides)}
    model, label = chosen.load(weights, preset=of_system.pop("preset", preset), options=of_system)
    kind = get_task(label.task)
    if not kind.takes_words:
        missing = next((file for file in inputs if not Path(file).exists()), None)
        if missing is not None:
            raise UserError(f"no file at {missing}")
    if not inputs and kind.needs_inputs:
        raise UserError(
            f"give words for {slug} to go on from, or a file that holds them"
            if kind.takes_words
            else f"name the files to apply {slug} to"
        )
    given = [str(each) for each in inputs] if kind.takes_words else [Path(each) for each in inputs]
    known = arguments_of(kind.predict, but=("model", "meta", "inputs", "output"))
    logging = {} if known.pop("log", None) is None or log is None else {"log": log}
    for name in overrides:
        if name not in known:
            there = ", ".join(known) or "nothing"
            raise UserError(f"a prediction of {label.task} has no {name!r}; what can be set: {there}")
    options = {name: typed(name, value, known[name]) for name, value in overrides.items()}
    path = None if output is None else Path(output)
    if path is not None:
        check_output(path, folder=kind.into_folders)
        check_no_input(path, given)
    source = _source_of(chosen, label, weights)
    shown = "the input" if kind.takes_words else ", ".join(map(str, inputs[:3])) + ", …" * (len(inputs) > 3)
    with _fitting(source), finite_outputs(model, source, shown or "the input"):
        return kind.predict(model, label.meta, given, path, **options, **logging)  # type: ignore[arg-type]  # words, for a task that takes them


def _source_of(paper: Paper, label: "Label", weights: str | Path | None) -> str:
    """What an error calls the weights: their file, or the preset where there is none."""
    return str(paper.card.shipped.get(label.preset, label.preset) if weights is None else weights)


@contextmanager
def _fitting(weights: str) -> Iterator[None]:
    """A model that does not fit what its weight file says of its data is the file's fault, reported in one line."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(f"out of memory: give a smaller input; {' '.join(str(error).split())[:200]}") from error
    except (RuntimeError, IndexError, KeyError, TypeError, ArithmeticError) as error:
        words = " ".join(str(error).split())[:300]
        raise UserError(f"{weights}: the model does not fit its label or this input: {words}") from error


def _unasked(card: catalog.Card, overrides: dict[str, Any], method: str = "predict") -> list[str]:
    """Names that no prediction of the paper takes: what is left is said of the system."""
    from provenn.tasks import get_task

    takers = [arguments_of(getattr(get_task(name), method), but=()) for name in card.tasks]
    return [name for name in overrides if not any(name in taker for taker in takers)]


def evaluate(
    slug: str,
    data: str | Path,
    *,
    weights: str | Path | None = None,
    preset: str | None = None,
    whole: bool | None = None,
    seed: int | None = None,
    device: str = "auto",
    batch_size: int = 256,
    overrides: dict[str, Any] | None = None,
) -> "Evaluation":
    """The metrics of trained weights on data, each with a 95 % interval over the examples.

    The data are read as the weights say: in their classes, their scale, their tokens.

    Args:
        slug: the paper.
        data: an embedded data set's name, or a path, in the formats that `train` reads.
        weights: a weight file, ours or the authors', or the folder of a run; by default what ships with the package.
        preset: whose weights, where those of several ship; or of an author's file that does not name it.
        whole: test on all of the data, or on the part that a training with this seed holds out. By default on all,
            but on what was held out where these weights were trained on the same data; data that come with a test
            split are tested on it.
        seed: of the split; by default the training's.
        device: auto, cpu, cuda, mps or a torch device.
        batch_size: examples at a time.
        overrides: how the data are read, such as {"length": 512}; of an author's file also what it does not say, as in
            `from_official`, such as {"chunk": 64}.

    Raises:
        UserError: weights or data that cannot be read, or that do not fit each other.
    """
    from provenn.core.device import choose_device
    from provenn.core.finite import finite_outputs
    from provenn.inference import evaluation
    from provenn.tasks import get_task
    from provenn.training import weights as files

    if not 1 <= batch_size <= LARGEST:
        raise UserError(f"batch size must be from 1 to {LARGEST}, got {batch_size}")
    if seed is not None and not 0 <= seed < 2**32:
        raise UserError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed}")
    chosen, overrides = paper(slug), dict(overrides or {})
    of_system: dict[str, Any] = {}
    if chosen.is_parameter_free(preset) if weights is None else files.label_of(weights) is None:
        of_system = {name: overrides.pop(name) for name in _unasked(chosen.card, overrides, "held_out")}
    model, label = chosen.load(weights, preset=preset, options=of_system)
    kind = get_task(label.task)
    known = _held_out_options(kind)
    for name in overrides:
        if name not in known:
            there = ", ".join(known) or "nothing"
            raise UserError(f"an evaluation of {label.task} has no {name!r}; what can be set: {there}")
    source = datasets.resolve(data)
    data = source.data
    fixed = {name: value for name, value in source.options.items() if name in known}
    wanted = {name: typed(name, value, known[name]) for name, value in overrides.items()}
    options = {**_recorded(label, kind, known, wanted), **fixed, **wanted}
    if whole is None:
        whole = not _trained_on(label, kind, data)
    split_seed = label.trained_on.get("seed", 0) if seed is None else seed
    held_out = kind.held_out(data, label.meta, seed=split_seed, whole=whole, **options)
    with finite_outputs(model, _source_of(chosen, label, weights), str(data)):
        return evaluation.evaluate(
            model.to(choose_device(device)),
            kind,
            held_out,
            meta=label.meta,
            batch_size=batch_size,
            title=f"{label.preset} of {chosen.card.slug}",
            published=evaluation.published_of(chosen.card, chosen.card.preset(label.preset)),
        )


def _held_out_options(kind: "Task") -> dict[str, Any]:
    """What can be set of the data that weights are tested on, and its types."""
    import inspect

    known = arguments_of(kind.held_out, but=("source", "meta", "whole", "seed", "options"))
    parameters = inspect.signature(kind.held_out).parameters.values()
    if known or not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return known
    return arguments_of(kind.load, but=("source", "seed", "options", "_"))  # to which it passes all on


def _recorded(label: "Label", kind: "Task", known: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The options with which a training read its data, for those who test its weights; what differs is said.

    An option of `held_out` whose default is None follows from the weights themselves, such as `length`.
    """
    import inspect

    parameters = inspect.signature(kind.held_out).parameters
    follows = {name for name, parameter in parameters.items() if parameter.default is None}
    recorded_options = {name: value for name, value in label.trained_on.get("options", {}).items() if name in known}
    recorded = {
        name: typed(name, value, known[name]) for name, value in recorded_options.items() if name not in follows
    }
    for name, value in wanted.items():
        if name in recorded and recorded[name] != value:
            progress.say(f"{name}={value} where the training had {name}={recorded[name]}")
    taken = {name: value for name, value in recorded.items() if name not in wanted}
    if taken:
        progress.say(f"as in the training: {', '.join(f'{name}={value}' for name, value in taken.items())}")
    return taken


def _trained_on(label: "Label", kind: "Task", data: str | Path) -> bool:
    """Were these weights trained on this data?"""
    if "fingerprint" not in label.trained_on:
        return False
    options = label.trained_on.get("options", {})
    try:
        with progress.unsaid():
            again = kind.load(data, seed=label.trained_on.get("seed", 0), **options)
    except (UserError, TypeError):  # too little for a split, say: then no training has read it
        return False
    return again.fingerprint == label.trained_on["fingerprint"]


def inspect(
    slug: str, file: str | Path, *, preset: str | None = None, weights: str | Path | None = None
) -> "Inspection":
    """What goes on inside a paper's system that is given one file, such as ECA's gates on an image.

    Args:
        slug: the paper; it must have an `inspection.py`.
        file: what the system is given.
        preset: the system; by default the first whose weights ship with the package, or the paper's first.
        weights: a weight file, ours or the authors', or the folder of a run; these say which preset they are of. By
            default those that ship, or random ones where none do.

    Raises:
        UserError: the paper shows nothing, or the file or the weights cannot be read.
    """
    from inspect import getdoc

    import torch

    from provenn.core.finite import DAMAGED, finite_outputs, is_finite
    from provenn.inference.inspection import Inspection
    from provenn.tasks import Task, get_task

    chosen, source = paper(slug), Path(file)
    if not chosen.card.has("inspection"):
        able = [card.slug for card in catalog.cards().values() if card.has("inspection")]
        raise UserError(f"{chosen.card.slug} shows nothing of its inside; what can be inspected: {', '.join(able)}")
    if not source.is_file():
        raise UserError(f"{source} is a folder: give one file" if source.is_dir() else f"no file at {source}")
    shipped = chosen.card.shipped
    if weights is None and (preset not in shipped if preset else not shipped):
        facts = chosen.card.preset(preset)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = chosen.build(facts.name).eval()
        name, kind, trained = facts.name, get_task(chosen.card.task_of(facts)), "random weights"
        origin, meta = f"random weights of {name}", kind.default_meta(facts.options)
    else:
        model, label = chosen.load(weights, preset=preset if weights is None else None)
        if preset not in (None, label.preset):
            raise UserError(f"{weights} holds weights of {label.preset}, not of {preset}: leave --preset out")
        trained = "the weights that ship" if weights is None else str(weights)
        name, kind, meta = label.preset, get_task(label.task), label.meta
        origin = _source_of(chosen, label, weights)
    if type(kind).example is Task.example:
        able = [
            each.name
            for each in chosen.card.presets
            if chosen.card.work_of(each)
            if type(get_task(chosen.card.task_of(each))).example is not Task.example
        ]
        raise UserError(
            f"{name}: {kind.name} makes no input of a single file that could be inspected"
            + (f"; of {slug} take --preset {' or '.join(able)}" if able else "")
        )
    look = chosen.card.resolve("inspection:inspect")
    draw = getattr(chosen.card.resolve_module("inspection"), "draw", None)
    x = kind.example(source, meta)
    with torch.no_grad(), finite_outputs(model, origin, str(source)):
        layers = look(model, x)
    infinite = next((row for row, numbers in layers.items() if not is_finite(numbers)), None)
    if infinite is not None:
        raise UserError(f"{origin}: what {infinite} shows is no finite number: {DAMAGED}")
    if not layers:
        raise UserError(f"{name} of {chosen.card.slug} has nothing inside that could be shown")
    drawn = None if draw is None else partial(draw, model, x, meta)
    return Inspection(f"{name} ({trained}) on {source.name}", (getdoc(look) or "").partition("\n")[0], layers, drawn)


def export(
    slug: str,
    weights: str | Path | None,
    output: str | Path,
    *,
    preset: str | None = None,
    int8: bool = False,
    data: str | Path | None = None,
) -> str:
    """Write trained weights with their system as an ONNX file; returns what the terminal shows.

    A super-resolution system takes `image`, (1, 3, height, width) in 0…1 of any size, and gives `larger`. A classifier
    takes `image`, (batch, channels, height, width) in 0…1, and gives `probabilities`, a segmenter those of each pixel,
    a detector `boxes`, `scores` and `labels` of every anchor, before overlapping ones are dropped; in fused form. The
    file is run in onnxruntime and held to what `predict` gives at several sizes. The returned lines say which, and
    the largest difference; where other sizes differ, the file is for one size. A task of a paper's own says itself what
    its system takes and gives (`Task.portable`). The file's metadata hold, under `provenn`, what the weights say of
    themselves, such as class names.

    Args:
        slug: the paper.
        weights: a weight file, or the folder of a run; None takes what ships with the package.
        output: where it goes, ending in .onnx.
        preset: whose weights, where those of several ship.
        int8: quantise the file with onnxruntime, and report its metric before and after; of classifiers and segmenters.
        data: what int8 is calibrated and tested on: an embedded name or a path. They are read and split as the
            training of the weights did.

    Raises:
        UserError: nothing that can be exported, or a file that gives other outputs than `predict`; none is left then.
    """
    import json
    from dataclasses import asdict

    from provenn.inference import onnx as onnx
    from provenn.tasks import get_task
    from provenn.training.weights import KEY

    file = Path(output)
    onnx.check_path(file)
    if int8 and data is None:
        raise UserError("int8 is calibrated on data: give --data, an embedded name or a path")
    if data is not None and not int8:
        raise UserError("--data is what --int8 is calibrated on: give both")
    model, label = paper(slug).load(weights, preset=preset)
    task = get_task(label.task)
    about = {KEY: json.dumps(asdict(label))}
    calibration = None
    if data is not None:
        read, seed = _recorded(label, task, _held_out_options(task), {}), label.trained_on.get("seed", 0)
        calibration = onnx.read_calibration(task, label.meta, data, seed=seed, options=read)
    lines = onnx.portable_system(model, task, label.meta, file, about, calibration=calibration)
    return "\n".join([f"{label.preset} of {slug} → {file}", *lines])
