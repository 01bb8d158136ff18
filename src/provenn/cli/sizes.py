"""The verb that counts a paper's presets for its page."""

from typing import Annotated

import typer

from provenn import catalog
from provenn.cli.app import app, log, slugs
from provenn.core.errors import UserError


@app.command()
def sizes(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="SLUG…", help="Papers to count.", autocompletion=slugs)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Count every paper.")] = False,
) -> None:
    """Count parameters, FLOPs and memory of every preset, and write them to sizes.json in the paper's folder.

    The file also holds the signatures of the layers, and the web catalogue shows it. FLOPs and memory are those of one
    example, of the input shape in paper.toml.

    \b
    provenn sizes eca_net titans
    """
    from provenn.core import progress
    from provenn.inference.sizes import measure, write

    if bool(slugs) == everything:
        raise UserError("name the papers to count, or give --all; `provenn list` names them")
    for card in [catalog.card(slug) for slug in slugs or catalog.cards()]:
        with progress.shown():
            counted = measure(card)
        lacking = [name for name, size in counted.presets.items() if size.uncounted]
        note = f"; not counted in full: {', '.join(lacking)}" if lacking else ""
        log(f"{write(card, counted)}: {len(counted.presets)} presets{note}")
