"""The verb that puts a mechanism into a pretrained model: convert."""

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from provenn import catalog
from provenn.cli.app import Device, Json, Resume, Slug, app, resumable
from provenn.cli.work import pairs
from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import alone_in, atomic_write, strict_json, work_folder, write_atomically

if TYPE_CHECKING:
    from provenn.huggingface import Material, Source

REPORT = "conversion.json"
CHECKPOINTS, OPTIONS = "checkpoints", "options.json"  # of a conversion that has not ended: its folder, and a file there
TOKENS = 256  # of a row of text, by default
HUB, EMBEDDED = "hf:", ("stdlib",)


@app.command()
def convert(
    slug: Slug,
    model: Annotated[
        str,
        typer.Argument(
            help="The pretrained model: a folder, or a name on the hub. Text: GPT-2, Llama, Qwen2, Mistral, BERT, "
            "RoBERTa, DistilBERT or T5. Images: ViT or Swin."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Data to tune on. Text: stdlib, a file, a folder, or hf:NAME for a data set of the hub. Images: a "
            "folder with one folder of images for each class."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder to write the converted model to.")],
    tune: Annotated[str, typer.Option(help="What to tune: full (every weight), lora or none.")] = "full",
    steps: Annotated[int, typer.Option(min=0, help="Number of tuning steps, one batch each.")] = 200,
    prepare_steps: Annotated[
        int, typer.Option(min=0, help="Number of steps that train the new parts alone, before tuning.")
    ] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of text, or images, in a batch.")] = 8,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens in a row of text. Default: 256.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of tuning. Default: 6e-4 for full, 1e-4 for lora.")
    ] = None,
    prepare_lr: Annotated[
        float | None, typer.Option(help="Learning rate of the new parts. Default: the paper's.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="An option of the mechanism, such as feature_map=t2r. Repeatable."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")] = 0,
    device: Device = "auto",
    resume: Resume = False,
    save_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="Steps between two checkpoints, besides the one after each stage. Default: stages only.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a pretrained model, train its new parts, tune it, and report how much of its quality is kept.

    \b
    provenn convert hedgehog gpt2 --data stdlib -o converted
    provenn convert rat models/llama --data text --tune lora --save-every 50 -o converted
    provenn convert urpe models/swin --data photos -o converted
    """
    card = catalog.card(slug)
    _check_out(out, resume)
    if file := next((parent for parent in out.parents if parent.is_file()), None):
        raise UserError(f"{out} cannot be made: {file} is a file; name another folder for the converted model")
    from provenn import huggingface
    from provenn.cli import console
    from provenn.core.device import choose_device
    from provenn.evidence.view import number
    from provenn.training import Saving

    # Whatever can be wrong is looked at before the weights, which may be many gigabytes, are fetched and read.
    huggingface.quiet()
    huggingface.conversion_of(card.slug)
    options, where = pairs(overrides or []), choose_device(device)
    huggingface.check_tuning(tune)
    for name, rate in (("--lr", lr), ("--prepare-lr", prepare_lr)):
        if rate is not None and not 0 < rate < math.inf:
            raise UserError(f"{name} must be a positive number, got {rate}")
    if not (data in EMBEDDED or data.startswith(HUB) or Path(data).exists()):
        raise UserError(f"no data at {data!r}: give {', '.join(EMBEDDED)}, a file or a folder of text, or hf:NAME")
    asked = {
        "paper": card.slug,
        "model": model,
        "--data": data,
        "--tune": tune,
        "--steps": steps,
        "--prepare-steps": prepare_steps,
        "--batch-size": batch_size,
        "--length": length,
        "--lr": lr,
        "--prepare-lr": prepare_lr,
        "--set": options,
        "--seed": seed,
    }
    unfinished = out / CHECKPOINTS
    with resumable((unfinished / OPTIONS).exists), progress.shown(), warnings.catch_warnings():
        warnings.simplefilter("ignore", huggingface.WindowLifted)  # reported with the result
        source = huggingface.Source.of(model, pictures=None)
        source.rehearse(card.slug, options)
        material, save_reader = _material(source, data, length)
        host = source.weights().to(where)
        with work_folder(out), _checkpoints(unfinished, asked, resume):
            recovery = huggingface.recover(
                host,
                card.slug,
                material,
                huggingface.Tuning(tune, steps, prepare_steps, batch_size, lr, prepare_lr),
                seed=seed,
                saving=Saving(unfinished, resume=resume, save_every=save_every),
                **options,
            )
            recovery.setting.update(model=model, data=data)
            host.save_pretrained(out)
            save_reader(out)
            with atomic_write(out / REPORT) as file:
                file.write_text(strict_json(recovery.json()) + "\n", encoding="utf-8")
    if as_json:
        console.machine(recovery.json())
        return
    terminal = console.console()
    rows = [
        (name, number(value), "" if math.isnan(share) else f"{100 * share:.1f} %")
        for name, value, share in recovery.stages()
    ]
    terminal.print(console.table(("stage", material.metric, "of the quality before"), rows))
    if recovery.layers:
        columns = list(recovery.layers[0])
        cells = [[number(row[column]) for column in columns] for row in recovery.layers]
        terminal.print(console.table([column.replace("_", " ") for column in columns], cells))
    terminal.print(f"added    {recovery.parameters:,} parameters", soft_wrap=True)
    if note := huggingface.window_note(host):
        terminal.print(f"note     {note}", soft_wrap=True)
    terminal.print(f"written  {out}, with {REPORT}", soft_wrap=True)
    terminal.print(
        f"next     load it in Python by provenn.huggingface.load_model({str(out)!r})",
        markup=False,
        soft_wrap=True,
    )


def _check_out(out: Path, resume: bool) -> None:
    """Refuse a folder that the model cannot be written to, or in which there is nothing to resume."""
    begun = (out / CHECKPOINTS / OPTIONS).exists()
    if resume and not begun:
        raise UserError(f"nothing to resume in {out}: it holds no {CHECKPOINTS} of a conversion; leave --resume out")
    if not resume and begun:
        with alone_in(out):  # else another process is at it
            pass
        raise UserError(
            f"{out} holds a conversion that did not end: go on with --resume, name a new folder, "
            f"or delete {out / CHECKPOINTS}"
        )
    if not resume and out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"{out} is not empty; name a new folder for the converted model")


@contextmanager
def _checkpoints(folder: Path, asked: Mapping[str, Any], resume: bool) -> Iterator[None]:
    """A folder for the checkpoints of a conversion, with what was asked for; it goes when the conversion has ended.

    Raises:
        UserError: the conversion that is to go on was begun with other options.
    """
    file = folder / OPTIONS
    if resume:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{file} is damaged: delete {folder}, and convert without --resume") from None
        now = json.loads(json.dumps(asked))
        other = [f"{name} {before.get(name)} (now {value})" for name, value in now.items() if before.get(name) != value]
        if other:
            raise UserError(f"{folder.parent} was begun with {', '.join(other)}: resume with the same options")
    else:
        folder.mkdir(parents=True)
        write_atomically(file, json.dumps(asked))
    try:
        yield
    except BaseException:
        if not any(folder.glob("*/*.ckpt")):  # nothing to go on from
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder)


def _material(source: "Source", data: str, length: int | None) -> "tuple[Material, Callable[[Path], object]]":
    """What the model is tuned and tested on, and what saves its tokenizer or processor beside it."""
    from provenn import huggingface

    if not source.pictures:
        tokenizer = source.tokenizer()
        text = huggingface.Text.of(data, tokenizer, source.outline, length=TOKENS if length is None else length)
        return text, tokenizer.save_pretrained
    if length is not None:
        raise UserError(f"--length sets rows of text, and {source.name} takes images: leave it out")
    if not Path(data).is_dir():
        raise UserError(f"{source.name} takes images: --data must be a folder of class folders, got {data!r}")
    return huggingface.Pictures.of(data, source.processor(), source.outline), source.save_processor
