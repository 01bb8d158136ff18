"""Verbs that measure: reproduce, bench, compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from provenn import catalog, progress
from provenn.catalog import Card
from provenn.cli.app import (
    Budget,
    Device,
    Json,
    Out,
    Resume,
    Seeds,
    Slug,
    Strict,
    app,
    command,
    of_the_paper,
    resumable,
    slugs,
    tell,
)
from provenn.errors import UserError

RUN = Path("runs/latest")


@app.command()
def reproduce(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="SLUG…", help="Papers.", autocompletion=slugs)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every paper.")] = False,
    claim: Annotated[
        list[str] | None,
        typer.Option(help="Only this claim; may be given again.", autocompletion=of_the_paper("claims", "id")),
    ] = None,
    budget: Budget = "small",
    seeds: Seeds = "3",
    device: Device = "auto",
    jobs: Annotated[int, typer.Option(help="Papers measured side by side; they share the cores.")] = 1,
    out: Out = RUN,
    resume: Resume = False,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Measure papers' claims, and give each a verdict."""
    if everything == bool(slugs):
        raise UserError("name the papers to reproduce, or give --all; `provenn list` names them")
    chosen = list(catalog.cards().values()) if everything else [catalog.card(s) for s in dict.fromkeys(slugs or [])]
    if claim and len(chosen) > 1:
        raise UserError(f"--claim is for one paper, and {len(chosen)} were named")
    _measure(chosen, claim, budget, seeds, device, out, resume, strict, json, jobs=jobs)


@app.command()
def bench(
    slug: Slug,
    budget: Budget = "small",
    seeds: Seeds = "3",
    device: Device = "auto",
    out: Out = RUN,
    resume: Resume = False,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Time, memory and FLOPs against baselines and installed peers: the claims about cost, with their tables."""
    card = catalog.card(slug)
    costs = [claim.id for claim in card.claims if claim.kind == "cost"]
    if not costs:
        raise UserError(f"{card.slug} claims nothing about cost; `provenn show {card.slug}` lists what it claims")
    _measure([card], costs, budget, seeds, device, out, resume, strict, json, detailed=True)


def _measure(
    papers: Sequence[Card],
    claims: Sequence[str] | None,
    budget: str,
    seeds: str,
    device: str,
    out: Path,
    resume: bool,
    strict: bool,
    json: bool,
    detailed: bool = False,
    jobs: int = 1,
) -> None:
    from provenn.cli import console
    from provenn.evidence import report, view
    from provenn.evidence.record import Record
    from provenn.evidence.verdict import Verdict
    from provenn.reproduce import reproduce_many

    for name in claims or ():
        papers[0].claim(name)

    def done(record: Record) -> None:
        figure = record.reason or view.ours(record.measurement)
        tell(f"{view.SYMBOLS[record.verdict]} {record.paper} {record.claim}: {record.verdict}; {figure}")

    with resumable(lambda: any((out / f"{card.slug}.json").exists() for card in papers)), progress.shown():
        records = reproduce_many(
            papers,
            jobs=jobs,
            claims=claims,
            budget=budget,
            seeds=seeds,
            device=device,
            out=out,
            resume=resume,
            tell=tell,
            done=done,
        )
    page = report.write(out)
    failed = [record for record in records if record.measurement.failed]
    if json:
        summary: dict[str, Any] = {"out": str(out), "report": str(page), "repeat": command()}
        console.machine({**summary, "records": [record.model_dump(mode="json") for record in records]})
    else:
        terminal = console.console()
        for card in papers:
            mine = [record for record in records if record.paper == card.slug]
            terminal.print(
                f"\n[bold]{console.escape(card.title)}[/]", console.claims(mine), f"[bold]{view.tally(mine)}[/]"
            )
            if detailed:
                for record in mine:
                    grids = list(console.details(record.measurement))
                    if grids or record.measurement.note:
                        terminal.print(f"[bold]{record.claim}[/]  {console.escape(record.measurement.note)}\n")
                    for grid in grids:
                        terminal.print(grid, "")
        terminal.print(f"report   {page}", soft_wrap=True)
        terminal.print(f"records  {', '.join(str(out / f'{card.slug}.json') for card in papers)}", soft_wrap=True)
        terminal.print(f"repeat   {command()}", soft_wrap=True, markup=False)
    for slug in dict.fromkeys(record.paper for record in failed):
        names = ", ".join(record.claim for record in failed if record.paper == slug)
        tell(f"provenn: the measurement of {names} of {slug} failed; see {out / f'{slug}.errors.txt'}")
    if failed or (strict and any(record.verdict is Verdict.NOT_REPRODUCED for record in records)):
        raise typer.Exit(1)


@app.command()
def compare(
    slot: Annotated[str, typer.Option(help="The slot to fill.", autocompletion=of_the_paper("mechanisms", "slot"))],
    data: Annotated[str, typer.Option(help="An embedded data set's name, or a path.")],
    candidates: Annotated[str | None, typer.Option("--with", metavar="A,B,…", help="By default all.")] = None,
    budget: Budget = "small",
    seeds: Seeds = "3",
    device: Device = "auto",
    out: Out = Path("runs/compare"),
    json: Json = False,
) -> None:
    """Mechanisms of one slot in the same host, trained at equal budget. Run again, it goes on where it stopped."""
    from provenn.cli import console
    from provenn.compare import compare as measure
    from provenn.evidence import Measurement

    names = [name.strip() for name in candidates.split(",") if name.strip()] if candidates is not None else None
    with resumable(lambda: out.is_dir() and any(out.iterdir()), resume=False), progress.shown():
        result = measure(slot, names, data=data, budget=budget, seeds=seeds, device=device, out=out, tell=tell)
    files = [str(file) for file in result.save(out)]
    if json:
        console.machine({"tables": [view.model_dump(mode="json") for view in result.tables], "files": files})
        return
    terminal = console.console()
    for grid in console.details(Measurement(tables=result.tables)):
        terminal.print(grid, "")
    for file in files:
        terminal.print(f"written  {file}", soft_wrap=True)
    terminal.print(f"repeat   {command()}", soft_wrap=True, markup=False)
