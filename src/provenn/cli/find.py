"""Verbs that read: list, show, board. They import no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from provenn import catalog
from provenn.catalog import Card, Claim
from provenn.cli.app import Json, Slot, Slug, Task, app, tell
from provenn.errors import UserError

if TYPE_CHECKING:
    from provenn.evidence.record import Record


@app.command("list")
def list_papers(
    query: Annotated[list[str] | None, typer.Argument(help="Words to find; one typo a word is forgiven.")] = None,
    task: Task = None,
    slot: Slot = None,
    json: Json = False,
) -> None:
    """Find a paper or a mechanism."""
    from provenn.cli import console

    known = list(catalog.cards().values())
    _known("task", task, {name for card in known for name in card.tasks})
    _known("slot", slot, {mechanism.slot for card in known for mechanism in card.mechanisms})
    words = " ".join(query or [])
    found = catalog.search(words, task, slot)
    if json:
        console.machine([_entry(card) for card in found])
        return
    if not found:
        tell(f"no paper fits {words!r}; `provenn list` names all {len(known)}")
        return
    rows = [
        (
            f"[bold]{card.slug}[/]",
            "\n".join([console.escape(card.title), f"[dim]{', '.join(card.tasks)}[/]", *_slots(card)]),
        )
        for card in found
    ]
    console.console().print(console.table(("slug", "title, tasks, slot: mechanisms"), rows))


def _slots(card: Card) -> list[str]:
    names: dict[str, list[str]] = {}
    for mechanism in card.mechanisms:
        names.setdefault(mechanism.slot, []).append(mechanism.name)
    return [f"[dim]{slot}:[/] {', '.join(inside)}" for slot, inside in names.items()]


def _known(what: str, name: str | None, names: set[str]) -> None:
    if name is not None and name not in names:
        there = ", ".join(sorted(names)) or "none"
        raise UserError(f"no paper has the {what} {name!r}{catalog.meant(name, names)}; there are: {there}")


def _entry(card: Card) -> dict:
    return {
        **card.model_dump(mode="json", include={"slug", "title", "arxiv", "date", "tags", "summary"}),
        "tasks": card.tasks,
        "mechanisms": [{"name": m.name, "slot": m.slot} for m in card.mechanisms],
        "presets": [preset.name for preset in card.presets],
    }


@app.command()
def show(slug: Slug, json: Json = False) -> None:
    """A paper's card, its claims and their evidence, its presets."""
    from provenn.cli import console
    from provenn.evidence import view

    card = catalog.card(slug)
    home = view.committed()
    evidence = {
        record.claim: record
        for ledger in (view.ledgers(home) if home else [])
        if ledger.paper == card.slug
        for record in ledger.records
    }
    if json:
        records = [record.model_dump(mode="json") for record in evidence.values()]
        console.machine({**card.model_dump(mode="json", exclude={"folder"}), "evidence": records})
        return
    out = console.console()
    out.print(f"[bold]{console.escape(card.title)}[/]")
    links = [f"https://arxiv.org/abs/{card.arxiv}" if card.arxiv else "", f"{card.date:%Y-%m-%d}"]
    links += [f"code: https://github.com/{card.code}" if card.code else "", ", ".join(card.tasks), ", ".join(card.tags)]
    out.print("[dim]" + console.escape(" · ".join(part for part in links if part)) + "[/]\n")
    out.print(console.escape(card.summary) + "\n")
    if card.mechanisms:
        rows = [(f"[bold]{m.name}[/]", m.slot, f"{card.package}.{m.layer.replace(':', '.')}") for m in card.mechanisms]
        out.print(console.table(("mechanism", "slot", "layer"), rows), "")
    if card.presets:
        rows = [
            (f"[bold]{p.name}[/]", p.task or card.task or "", "; ".join(map(str, p.published))) for p in card.presets
        ]
        out.print(console.table(("preset", "task", "published"), rows), "")
    if card.claims:
        columns = ("claim", "the paper's figure", "ours, with its 95 % interval", "verdict")
        out.print(console.claim_table(columns, [_claim(claim, evidence.get(claim.id)) for claim in card.claims]), "")
        out.print(f"provenn reproduce {card.slug}")
    if card.presets:
        out.print(f"provenn train {card.slug} --preset {card.presets[0].name} --data …")
    if card.has("inspection"):
        out.print(f"provenn inspect {card.slug} …")


def _claim(claim: Claim, record: "Record | None") -> tuple[str, ...]:
    from provenn.cli import console
    from provenn.evidence import view

    needs = f"[dim]needs {console.escape(claim.lacks)}[/]" if claim.lacks else ""
    kind = claim.kind + ("" if claim.origin == "paper" else ", ours")
    return (
        f"[bold]{claim.id}[/]\n{console.escape(claim.says)} [dim]({kind})[/]",
        console.escape(view.theirs(claim)),
        console.escape(view.ours(record.measurement)) if record else "",
        console.verdict(record.verdict) if record else needs,
    )


@app.command()
def board(
    source: Annotated[
        Path | None, typer.Option("--from", help="Folder of records; by default those that come with the source.")
    ] = None,
    json: Json = False,
) -> None:
    """All evidence at a glance."""
    from provenn.cli import console
    from provenn.evidence import view
    from provenn.evidence.verdict import Verdict

    folder = source or view.committed()
    if folder is None:
        raise UserError("no records come with this installation: give a folder of your own, such as --from runs/latest")
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}: give --from the folder of a `provenn reproduce`")
    unread: list[str] = []
    found = view.ledgers(folder, unread.append)
    if not found:
        raise UserError(
            f"{folder} holds no records that can be read: `provenn reproduce SLUG --out {folder}` writes some"
        )
    for message in unread:
        tell(message)
    counts = {
        ledger.paper: {which: sum(r.verdict == which for r in ledger.records) for which in Verdict} for ledger in found
    }
    if json:
        console.machine(
            [
                {
                    "paper": ledger.paper,
                    "verdicts": counts[ledger.paper],
                    "records": ledger.model_dump(mode="json")["records"],
                }
                for ledger in found
            ]
        )
        return
    rows = [
        (
            f"[bold]{ledger.paper}[/]",
            *(str(counts[ledger.paper][which] or "") for which in Verdict),
            ", ".join(sorted({record.budget for record in ledger.records})),
            ", ".join(sorted({record.environment.device for record in ledger.records})),
            f"{max(record.date for record in ledger.records):%Y-%m-%d}" if ledger.records else "",
        )
        for ledger in found
    ]
    total = [str(sum(count[which] for count in counts.values())) for which in Verdict]
    rows.append(("[dim]all[/]", *total, "", "", ""))
    names = [console.verdict(which) for which in Verdict]
    console.console().print(console.table(("paper", *names, "budget", "device", "date"), rows))
