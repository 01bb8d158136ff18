"""Verb that holds records to the code that stands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from provenn import catalog
from provenn.cli.app import Cluster, Jobs, Json, Resume, app, command, log, of_the_paper, resumable, slugs
from provenn.core import progress
from provenn.core.errors import UserError

if TYPE_CHECKING:
    from provenn.experiments.verify import Verified

RUN = Path("runs/verify")


@app.command()
def verify(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="[SLUG…]", help="Papers. Default: all.", autocompletion=slugs)
    ] = None,
    experiment: Annotated[
        list[str] | None,
        typer.Option(help="Verify only this experiment. Repeatable.", autocompletion=of_the_paper("experiments", "id")),
    ] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="Repeat nothing: only show which code each record is of.")
    ] = False,
    digests: Annotated[
        bool,
        typer.Option("--digests", help="Repeat nothing: only write each paper's digests.json, which the views read."),
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Write the outcomes into the records that ship with the papers, too.")
    ] = False,
    jobs: Jobs = 1,
    cluster: Cluster = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the outcomes to.")] = RUN,
    resume: Resume = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 1 if a record is of code that has changed since.")
    ] = False,
    json: Json = False,
) -> None:
    """Repeat one recorded trial of each experiment whose code has changed, and compare its values with the record's.

    Counts and identities are repeated whole, trainings on the first recorded seed, clocks not at all.

    \b
    provenn verify --list
    provenn verify eca_net residual_depth --jobs 2
    """
    from provenn.cli import console
    from provenn.evidence.provenance import Provenance
    from provenn.evidence.record import LEDGER, Repeated
    from provenn.experiments import verify as verifying

    cards = [catalog.card(catalog.slug_of(slug)) for slug in dict.fromkeys(slugs or [])]
    cards = cards or list(catalog.cards().values())
    if only_list and (digests or record):
        raise UserError(f"give --list or {'--digests' if digests else '--record'}, not both: --list writes nothing")
    if digests and record:
        raise UserError(
            "give --digests or --record, not both: --digests repeats nothing, so there is no outcome to record"
        )
    if digests:
        moved = {card.slug: verifying.write_digests(card, log) for card in cards}
        changed = {slug: count for slug, count in moved.items() if count}
        if json:
            console.machine({"changed": changed})
        else:
            words = ", ".join(f"{slug} {count}" for slug, count in changed.items()) or "none"
            console.console().print(f"digests that changed: {words}", highlight=False)
        return

    def done(verified: verifying.Verified) -> None:
        if verified.verification is not None:
            said = f"{verified.verification.outcome}; {verified.verification.repeated}"
        else:
            said = f"not repeated: {verified.reason}"
        if not only_list:
            log(f"{verified.paper} {verified.experiment.id}: {said}")

    with resumable(lambda: any((out / card.slug / LEDGER).exists() for card in cards)), progress.shown():
        every = verifying.verify(
            cards,
            experiments=experiment or (),
            only_list=only_list,
            jobs=jobs,
            cluster=cluster,
            out=out,
            resume=resume,
            record=record,
            done=done,
            log=log,
        )
    if json:
        facts = [
            {
                "paper": one.paper,
                "experiment": one.experiment.id,
                "provenance": one.provenance,
                "verification": one.verification and one.verification.model_dump(mode="json"),
                "reason": one.reason,
            }
            for one in every
        ]
        console.machine({"repeat": command(), "records": facts})
    else:
        terminal = console.console()
        rows = [_row(one) for one in every]
        if len(cards) == 1 or not only_list:
            terminal.print(console.table(("record", "which code it is of", "repeated"), rows))
        for card in cards if only_list and len(cards) > 1 else ():
            mine = [one.provenance for one in every if one.paper == card.slug]
            words = ", ".join(f"{mine.count(which)} {which}" for which in Provenance if which in mine) or "no records"
            terminal.print(f"{card.slug}: {words}", highlight=False)
        counts = {which: sum(one.provenance is which for one in every) for which in Provenance}
        words = ", ".join(f"{count} {which}" for which, count in counts.items() if count)
        terminal.print(f"[bold]{len(every)} records{': ' if words else ''}{words}[/]", highlight=False)
    differ = [one for one in every if one.verification and one.verification.outcome is Repeated.DIFFERS]
    if differ or (strict and any(one.provenance is Provenance.CHANGED for one in every)):
        raise typer.Exit(1)


def _row(one: "Verified") -> tuple[str, str, str]:
    verification = one.verification
    said = f"{verification.outcome}; {verification.repeated}" if verification else one.reason
    return f"{one.paper} {one.experiment.id}", str(one.provenance), said
