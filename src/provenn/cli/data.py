"""The verb that lists data sets: which are found, and what each unlocks."""

from typing import Annotated, Any

import typer

from provenn import catalog
from provenn.cli.app import Json, app, log
from provenn.tasks import datasets

DataPaths = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="NAME=PATH", help="Path of a data set that `provenn data` lists. Repeatable."),
]


def names(incomplete: str) -> list[str]:
    return [name for name in datasets.known() if name.startswith(incomplete)]


@app.command()
def data(
    name: Annotated[
        str | None, typer.Argument(help="Show this data set in full. Default: list all.", autocompletion=names)
    ] = None,
    paths: DataPaths = None,
    json: Json = False,
) -> None:
    """List the data sets that the papers name: found or not, the expected path, and the experiments that each unlocks.

    \b
    provenn data
    provenn data set5 --data set5=photos/Set5
    """
    from provenn.cli import console

    given = datasets.given_paths(paths or [])
    known = datasets.known() if name is None else {name: datasets.get(name)}
    entries = [_entry(each, datasets.find(each, given), known[each]) for each in known]
    entries += [_entry(each, _checkpoint(each, given)) for each in datasets.checkpoints() if name is None]
    if json:
        console.machine(entries)
        return
    if name is not None:
        _in_full(entries[0])
        return
    rows = [
        (
            f"[bold]{each['name']}[/]",
            "[green]found[/]" if each["found"] else _lacking(each),
            console.escape(each["place"]),
            console.escape(_unlocks(each)),
        )
        for each in entries
    ]
    grid = console.table(("data set", "", "where it lies, or is expected", "unlocks"), rows)
    grid.padding = (0, 2, 0, 0)
    terminal = console.console()
    terminal.print(grid)
    there = sum(each["found"] for each in entries)
    terminal.print(f"\n[bold]{there} of {len(entries)} found[/]; `provenn data NAME` says what a set looks like", "")
    terminal.print(
        f"provenn reproduce SLUG --budget paper --data NAME=PATH   or once for all {datasets.VARIABLE}=FOLDER"
    )
    if not datasets.roots():
        log(f"{datasets.VARIABLE} is not set: it names the folders that hold data sets by their names")


def _checkpoint(name: str, paths: datasets.DataPaths) -> datasets.Found:
    slug, _, preset = name.partition(":")
    return datasets.find_weights(catalog.card(slug), preset, paths)


def _entry(name: str, located: datasets.Found, known: datasets.DataSet | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "title": known.title if known else f"weights of {name.partition(':')[2]}, by its authors",
        "found": located.there,
        "place": str(located.path),
        "missing": list(located.missing),
        "task": known.task if known else None,
        "layout": known.layout if known else "the checkpoint as the authors published it",
        "lacks": known.lacks if known else "",
        "experiments": [f"{card.slug} {experiment.id}" for card, experiment in datasets.unlocked_by(name)],
    }


def _lacking(entry: dict[str, Any]) -> str:
    missing = entry["missing"]
    return "not found" if missing == ["everything"] else f"[yellow]lacks {len(missing)}[/]"


def _unlocks(entry: dict[str, Any]) -> str:
    by_paper: dict[str, list[str]] = {}
    for experiment in entry["experiments"]:
        slug, _, which = experiment.partition(" ")
        by_paper.setdefault(slug, []).append(which)
    experiments = "; ".join(f"{slug} {', '.join(which)}" for slug, which in by_paper.items())
    trains = f"train, evaluate: {entry['task']}" if entry["task"] else ""
    no_experiment = f"no experiment yet: needs {entry['lacks']}" if entry["lacks"] else ""
    return "; ".join(part for part in (experiments, no_experiment, trains if not experiments else "") if part)


def _in_full(entry: dict[str, Any]) -> None:
    from provenn.cli import console

    lines = {
        "": entry["title"],
        "found": "yes" if entry["found"] else "no",
        "where": entry["place"],
        "layout": entry["layout"],
        "missing": ", ".join(entry["missing"]),
        "task": entry["task"] or "",
        "lacks": entry["lacks"],
        "unlocks": ", ".join(entry["experiments"]),
    }
    rows = [(f"[bold]{key}[/]", console.escape(value)) for key, value in lines.items() if value]
    console.console().print(console.table((entry["name"], ""), rows))
    if not entry["found"]:
        log(f"give --data {entry['name']}=PATH, or put it in a folder of {datasets.VARIABLE}")
