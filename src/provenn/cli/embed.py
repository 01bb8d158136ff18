"""The verb that embeds a folder of pictures once, so that later searches need not."""

from pathlib import Path
from typing import Annotated

import typer

from provenn.cli.app import Device, Json, Preset, app
from provenn.cli.work import Weights, named_model, say_what_ships
from provenn.core import progress


@app.command()
def embed(
    model: Annotated[
        str,
        typer.Argument(help="The model: a paper whose weights ship, a weight file, or the folder of a run."),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder of the pictures. It is searched whole.")],
    output: Annotated[
        Path, typer.Option("--output", "--out", "-o", help="File to write the embeddings to: .npz or .parquet.")
    ],
    weights: Weights = None,
    preset: Preset = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in a batch.")] = 64,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Write the embedding of each picture of a folder, with a checksum of the model that made them.

    \b
    provenn embed runs/search photos/ -o photos.npz
    provenn embed model.safetensors photos/ -o photos.parquet
    """
    import provenn
    from provenn.cli import console

    slug, weights = named_model(model, weights)
    say_what_ships(slug, weights, preset)
    with progress.shown():
        store = provenn.embed(
            slug, folder, output=output, weights=weights, preset=preset, device=device, batch_size=batch_size
        )
    pictures, dim = store.embeddings.shape
    if json:
        console.machine({"pictures": pictures, "dim": dim, "checksum": store.checksum, "files": [str(output)]})
        return
    terminal = console.console()
    plural = "s" * (pictures != 1)
    said = f"written  {output}: {pictures:,} picture{plural}, {dim} numbers each, model {store.checksum}"
    terminal.print(console.escape(said), soft_wrap=True)
