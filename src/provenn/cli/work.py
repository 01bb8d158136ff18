"""Verbs that work on the user's data: train, predict, inspect, export."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from provenn import catalog
from provenn.cli import of_tasks
from provenn.cli.app import Device, Json, Preset, Resume, Slug, app, log, resumable, tasks
from provenn.cli.hardware import DEFAULT, RunOptions, slow_precision, with_run
from provenn.cli.of_tasks import WithTasksOptions
from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import is_stdout
from provenn.core.progress import without_controls
from provenn.core.settings import TypedNumber

if TYPE_CHECKING:
    from provenn.tasks import Task as Kind

SPLITS = {"auto": None, "all": True, "test": False}
CLASSES_SHOWN = 20
Weights = Annotated[
    Path | None,
    typer.Option(
        help="A weight file, ours or the authors', or a folder: of a run, or of Hugging Face. Default: the weights "
        "that ship. A run's folder may also be given instead of the paper."
    ),
]
NumNodes = Annotated[
    int,
    typer.Option(min=1, help="Number of machines. Run the same command on each, by torchrun or with NODE_RANK set."),
]


@app.command()
@with_run
def train(
    slug: Slug,
    data: Annotated[
        str, typer.Option(help="A path, the name of an embedded data set, or one that `provenn data` lists.")
    ],
    preset: Preset = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights to start from: a weight file, ours or the authors', or the folder of a run or a pruning, "
            "whose zeros stay. Default: weights are drawn."
        ),
    ] = None,
    two_steps: Annotated[
        bool,
        typer.Option(
            "--two-steps",
            help="With --weights that lack a part, such as the head for other classes: train that part first, for a "
            "third of the epochs, then everything at a tenth of the rate.",
        ),
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(help="Kind of work to train for. Default: that of the preset.", autocompletion=tasks),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Number of passes over the data. Default: the preset's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of training steps. Default: the preset's epochs.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. Default: the preset's.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples in a batch on each device. Default: the preset's.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Number of batches whose gradients make one step. Default: the preset's.")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after this many epochs without a better validation metric, and keep the best weights. "
            "Default: the preset's."
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            metavar="KEY=VALUE",
            help="An option of the training, such as ema=0.999, schedule=cosine, final_lr=1e-5, warmup_steps=100, "
            "weight_decay=0.05, decay_vectors=false, mixup=0.8, rand_augment=9 or layer_decay=0.65. Repeatable.",
        ),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Parameters that do not learn: the name of a part, such as model.vision, or a pattern, such as "
            "'*.norm*'. Repeatable. Default: all learn.",
        ),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing",
            help="Compute the activations of towers and decoders again for the gradient: less memory, more time, "
            "the same values.",
        ),
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the data or the model, such as horizon=24. Repeatable. `provenn show SLUG --preset P` "
            "lists all.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")] = 0,
    device: Device = "auto",
    run: RunOptions = DEFAULT,
    num_nodes: NumNodes = 1,
    resume: Resume = False,
    keep_best: Annotated[
        int, typer.Option(min=0, help="Number of epochs whose weights are kept: the best on validation data.")
    ] = 0,
    logger: Annotated[
        str | None, typer.Option(help="Write curves to OUT/log, in the format csv or tensorboard. Default: no curves.")
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Skip images that cannot be read, and name them.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write the run to. Default: runs/SLUG.", show_default=False),
    ] = None,
) -> None:
    """Train a paper's model on data.

    \b
    provenn train craft --data photos/ --precision bf16-mixed --workers 4 --patience 5
    provenn train rat --data text/ --accumulate 8 --save-every 500 --keep-best 3 --logger csv --recipe ema=0.999
    """
    card = catalog.card(slug)
    folder = out if out is not None else Path("runs") / card.slug
    import provenn
    from provenn.cli import console
    from provenn.evidence.view import number
    from provenn.tasks import Task as Kind
    from provenn.tasks import get_task
    from provenn.training.checkpoints import CHECKPOINT
    from provenn.training.stages import STEPS

    places, start = [folder / step for step in STEPS] if two_steps else [folder], time.time()

    def kept() -> bool:
        written = [place / CHECKPOINT for place in places if (place / CHECKPOINT).exists()]
        return any(resume or checkpoint.stat().st_mtime >= start for checkpoint in written)

    named = {
        "epochs": epochs,
        "max_steps": steps,
        "lr": lr,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "precision": run.precision,
        "patience": patience,
    }
    with resumable(kept), progress.shown():
        if slow := slow_precision(run.precision, device):
            progress.say(slow)
        folder, metrics = provenn.train(
            card.slug,
            data,
            preset=preset,
            task=task,
            weights=weights,
            two_steps=two_steps,
            freeze=freeze or [],
            checkpointing=checkpointing,
            out=folder,
            seed=seed,
            device=device,
            num_nodes=num_nodes,
            **run.hardware,
            resume=resume,
            save_every=run.save_every,
            keep_best=keep_best,
            logger=logger,
            overrides={**pairs(overrides or [], keeps_text=True), **({"skip_broken": True} if skip_broken else {})},
            recipe={
                **pairs(recipe or [], "--recipe", "ema=0.999"),
                **{name: value for name, value in named.items() if value is not None},
            },
        )
    terminal = console.console()
    terminal.print(
        console.table(
            ("on the test split", ""), [(console.escape(name), number(value)) for name, value in metrics.items()]
        )
    )
    summary = json.loads((folder / "run.json").read_text())
    work = get_task(summary["task"])
    terminal.print(console.escape(_in_words(work, summary)), soft_wrap=True)
    for file in sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")):
        terminal.print(f"written  {console.escape(str(file))}", soft_wrap=True)
    if logger is not None:
        terminal.print(f"written  {console.escape(str(folder / 'log'))}", soft_wrap=True)
    if type(work).predict is not Kind.predict:
        from provenn.inference.predict import what_is_given

        given = what_is_given(work)
        out_option = " -o OUTPUT" if not (work.takes_words and work.needs_inputs) else ""
        quoted = without_controls(shlex.quote(str(folder)))
        terminal.print(
            f"next     provenn predict {card.slug}{given} --weights {quoted}{out_option}",
            markup=False,
            soft_wrap=True,
        )


def _in_words(work: "Kind", summary: dict[str, Any]) -> str:
    """The metric that a training reached beside the dummy baseline's, and what to do where it is no better."""
    from provenn.evidence.view import number

    reached, dummy_baseline = summary["metrics"][work.metric], summary["dummy_baseline"]
    name, count = work.metric.replace("_", " "), summary["tested_on"]
    says = f"{name} {number(reached)} on {count:,} test example{'s' * (count != 1)}"
    baseline = f"the dummy baseline ({number(dummy_baseline)})"
    if not (reached > dummy_baseline if work.higher_is_better else reached < dummy_baseline):
        steps = summary["steps"]
        more = f"train longer than {steps:,} step{'s' * (steps != 1)}, on more data, or with another --lr"
        return f"{says}, no better than {baseline}: {more}"
    if name == "accuracy" and reached - dummy_baseline < 2 * (dummy_baseline * (1 - dummy_baseline) / count) ** 0.5:
        return f"{says}, too few to distinguish it from {baseline}: train on more data"
    return f"{says}, beside {baseline}"


def pairs(
    texts: Sequence[str], option: str = "--set", example: str = "horizon=24", *, keeps_text: bool = False
) -> dict[str, Any]:
    """KEY=VALUE as typed; a value that is no number or list stays text.

    Args:
        texts, option, example: what was typed, for which option, and what an error shows.
        keeps_text: a number with a point keeps how it was typed, for `provenn.core.settings.typed`.
    """
    pairs: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(
                f"{option} takes KEY=VALUE, such as {example}, got {text!r}; "
                "`provenn show SLUG --preset NAME` lists what there is"
            )
        try:
            pairs[key] = json.loads(value)
            if keeps_text and isinstance(pairs[key], float):
                pairs[key] = TypedNumber(value)
        except (ValueError, RecursionError):  # no JSON; or a number of more digits, or lists deeper, than are read
            pairs[key] = value
    return pairs


def named_model(slug: str, weights: Path | None) -> tuple[str, Path | None]:
    """The paper and its weights; a run's folder or a weight file of ours, given instead of the paper, names both."""
    if weights is not None or catalog.slug_of(slug) in catalog.cards() or not Path(slug).exists():
        return slug, weights
    from provenn.training.weights import label_of

    label = label_of(slug)
    if label is None:
        raise UserError(
            f"no paper is called {slug!r}; a weight file that names no paper needs one: SLUG … --weights {slug}"
        )
    return label.paper, Path(slug)


def say_what_ships(slug: str, weights: Path | None, preset: str | None, needed: bool = True) -> bool:
    """Where no weights are given, say which come with the paper, on stderr; False where none do and none are needed."""
    card = catalog.card(slug)
    if weights is not None or not (needed or (preset in card.shipped if preset else card.shipped)):
        return weights is not None
    if not (preset in card.shipped if preset else card.shipped):
        from provenn.inference.paper import Paper

        if Paper(card).is_parameter_free(preset):
            log(f"{card.preset(preset).name} has nothing to train: it is used as it is built")
            return True
    file = card.shipped_weights(preset)
    log(f"with the weights that ship: {file.stem}, {catalog.shipped_in_words(file)}")
    return True


@app.command(cls=WithTasksOptions)
def predict(
    slug: Slug,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT…",
            help="Input files. For a language model: words. For image generation: classes. An agent needs none.",
        ),
    ] = None,
    weights: Weights = None,
    preset: Preset = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--out", "-o", help="File or folder to write the result to.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the prediction, such as tokens=100. Also an option of the model that the authors' "
            "weights do not state, such as chunk=64. Repeatable.",
        ),
    ] = None,
) -> None:
    """Apply trained weights to files. The text of a language model is printed as it is generated.

    \b
    provenn predict craft photo.png -o photo_x2.png
    provenn predict rat 'def main(' --set tokens=200
    """
    import provenn

    slug, weights = named_model(slug, weights)
    options = {**pairs(overrides or [], keeps_text=True), **of_tasks.given()}
    streamed = False

    # Where the result itself goes to stdout, what is said of it goes elsewhere: a pipe gets the result alone.
    said = sys.stderr if output is not None and is_stdout(output) else sys.stdout

    def print_piece(piece: str) -> None:
        nonlocal streamed
        streamed = True
        print(without_controls(piece), end="", flush=True, file=said)

    with progress.shown():
        say_what_ships(slug, weights, preset)
        text = provenn.predict(
            slug, inputs or [], weights=weights, preset=preset, output=output, overrides=options, log=print_piece
        )
    print("" if streamed else without_controls(text), file=said)


@app.command()
def evaluate(
    slug: Slug,
    data: Annotated[
        str, typer.Option(help="A path, the name of an embedded data set, or one that `provenn data` lists.")
    ],
    weights: Weights = None,
    preset: Preset = None,
    split: Annotated[
        str,
        typer.Option(
            help="all: all of the data. test: the part that a training on the data holds out. auto: test if these "
            "weights were trained on the data, else all. If the data come with a test split, that split is used.",
        ),
    ] = "auto",
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the split. Default: the training's.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the data, such as length=512. Also an option of the model that the authors' weights do "
            "not state, such as chunk=64. Repeatable.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 256,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder to write the metrics to, with a table and a picture of the classes if there are any.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Measure trained weights on data: metrics with intervals over the examples, beside the published figures.

    \b
    provenn evaluate eca_net --data digits
    provenn evaluate aaren --weights runs/aaren --data series.csv --out metrics
    """
    import provenn
    from provenn.cli import console
    from provenn.evidence.measurement import Measurement

    slug, weights = named_model(slug, weights)
    if split not in SPLITS:
        raise UserError(f"--split must be one of {', '.join(SPLITS)}, got {split!r}")
    say_what_ships(slug, weights, preset)
    with progress.shown():
        evaluation = provenn.evaluate(
            slug,
            data,
            weights=weights,
            preset=preset,
            whole=SPLITS[split],
            seed=seed,
            device=device,
            batch_size=batch_size,
            overrides=pairs(overrides or [], keeps_text=True),
        )
    files = evaluation.save(out) if out is not None else []
    if json:
        console.machine({**evaluation.as_json(), "files": [str(file) for file in files]})
        return
    terminal = console.console()
    tables = [evaluation.table(), *filter(None, [evaluation.class_table(most=CLASSES_SHOWN)])]
    for grid in console.details(Measurement(tables=tables)):
        terminal.print(grid, "")
    terminal.print(f"[dim]intervals: {console.escape(evaluation.method)}[/]", soft_wrap=True)
    for file in files:
        terminal.print(f"written  {file}", soft_wrap=True)


OfModel = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An option of the model that its weights do not state, or that may be another one in use. Repeatable.",
    ),
]


@app.command()
def inspect(
    slug: Slug,
    file: Annotated[Path, typer.Argument(metavar="INPUT", help="Input file of the model, such as an image.")],
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help="Text besides the file, such as a caption or a category.")
    ] = None,
    weights: Weights = None,
    preset: Preset = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--out", "-o", metavar="PNG", help="PNG file to write a picture to.")
    ] = None,
    overrides: OfModel = None,
    json: Json = False,
) -> None:
    """Show what happens inside a model on your input, such as the gates of its layers.

    \b
    provenn inspect eca_net cat.png -o gates.png
    """
    import provenn
    from provenn.cli import console
    from provenn.evidence.measurement import Measurement
    from provenn.inference import inspection

    slug, weights = named_model(slug, weights)
    if output is not None:
        inspection.check_png(output, file)
    with progress.shown():
        options = pairs(overrides or [], keeps_text=True)
        inspected = provenn.inspect(slug, file, text=text, preset=preset, weights=weights, options=options)
        if output is not None:
            inspected.save(output)
    if weights is None and not say_what_ships(slug, weights, preset, needed=False):
        log("the weights are random and untrained: give trained ones with --weights")
    if json:
        layers = {name: row.tolist() for name, row in inspected.layers.items()}
        console.machine({"title": inspected.title, "caption": inspected.caption, "layers": layers})
        return
    terminal = console.console()
    terminal.print(f"[bold]{console.escape(inspected.title)}[/]\n")
    for grid in console.details(Measurement(tables=[inspected.table()])):
        terminal.print(grid)
    if output is not None:
        terminal.print(f"written  {console.escape(str(output))}", soft_wrap=True)


@app.command()
def export(
    slug: Slug,
    output: Annotated[Path, typer.Option("--output", "--out", "-o", help="File to write; its name ends in .onnx.")],
    text: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT]", help="Text that comes with every input, such as the category of the images."),
    ] = None,
    weights: Weights = None,
    preset: Preset = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise the model to int8, and show how much its metric changes.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Data that --int8 is calibrated on: the name of a data set, or a path.")
    ] = None,
    overrides: OfModel = None,
) -> None:
    """Write a model with its trained weights as an ONNX file.

    \b
    provenn export craft -o craft.onnx
    provenn export eca_net -o eca.onnx --int8 --data digits
    provenn export bayes_pfl "metal nut" -o nuts.onnx
    """
    import provenn

    slug, weights = named_model(slug, weights)
    say_what_ships(slug, weights, preset)
    with progress.shown(), progress.bar(f"{slug}: tracing", 1) as advance:
        options = pairs(overrides or [], keeps_text=True)
        lines = provenn.export(slug, weights, output, text=text, preset=preset, int8=int8, data=data, options=options)
        advance()
    print(lines)
