"""Verbs that read: list, show, board. They import no torch."""

from pathlib import Path
from typing import Annotated

import typer

from provenn import catalog
from provenn.catalog import Card, Preset
from provenn.cli.app import Json, Slot, Slug, Task, app, log, of_the_paper, shortened
from provenn.core.errors import UserError
from provenn.core.names import meant
from provenn.core.progress import without_controls
from provenn.evidence.record import Finding


@app.command("list")
def list_papers(
    query: Annotated[
        list[str] | None, typer.Argument(help="Words to search for; one typo in each word is forgiven.")
    ] = None,
    task: Task = None,
    slot: Slot = None,
    json: Json = False,
) -> None:
    """Find a paper or a mechanism.

    \b
    provenn list channel attention
    provenn list --slot token-mixer
    """
    from provenn.cli import console

    known = list(catalog.cards().values())
    _known("task", task, {name for card in known for name in card.tasks})
    _known("slot", slot, {mechanism.slot for card in known for mechanism in card.mechanisms})
    words = " ".join(query or [])
    fitting, called = catalog.search(words, task, slot), catalog.mechanism_names()
    if json:
        console.machine([_entry(card, called) for card in fitting])
        return
    if not fitting:
        log(shortened(f"no paper fits {words!r}; `provenn list` names all {len(known)}"))
        return
    rows = [
        (
            f"[bold]{card.slug}[/]",
            "\n".join([console.escape(card.title), f"[dim]{', '.join(card.tasks)}[/]", *_slots(card, called)]),
        )
        for card in fitting
    ]
    terminal = console.console()
    terminal.print(console.table(("slug", "title, tasks, slot: mechanisms"), rows), "")
    name = fitting[0].slug if len(fitting) == 1 else "SLUG"
    terminal.print(
        f"provenn show {name}        what its abstract says, the verdict on each claim, and what to do with it"
    )


def _slots(card: Card, called: dict[tuple[str, str], str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for mechanism in card.mechanisms:
        names.setdefault(mechanism.slot, []).append(called[card.slug, mechanism.name])
    return [f"[dim]{slot}:[/] {', '.join(inside)}" for slot, inside in names.items()]


def _known(what: str, name: str | None, names: set[str]) -> None:
    if name is not None and name not in names:
        there = ", ".join(sorted(names)) or "none"
        raise UserError(f"no paper has the {what} {name!r}{meant(name, names)}; there are: {there}")


def _entry(card: Card, called: dict[tuple[str, str], str]) -> dict:
    return {
        **card.model_dump(mode="json", include={"slug", "title", "arxiv", "date", "tags", "summary"}),
        "tasks": card.tasks,
        "mechanisms": [{"name": called[card.slug, m.name], "slot": m.slot} for m in card.mechanisms],
        "presets": [preset.name for preset in card.presets],
    }


@app.command()
def show(
    slug: Slug,
    everything: Annotated[
        bool, typer.Option("--all", help="Also show every experiment, mechanism and preset.")
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Show one preset: what --set and --recipe take, with types and defaults.",
            autocompletion=of_the_paper("presets", "name"),
        ),
    ] = None,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="Print only the BibTeX entry.")] = False,
    json: Json = False,
) -> None:
    """Show what a paper's abstract says, and the verdict on each of its claims.

    \b
    provenn show eca_net --all
    provenn show 1910.03151 --bibtex
    provenn show craft --preset craft_small
    """
    from provenn.cli import console
    from provenn.evidence import provenance, registration, view

    card = catalog.card(slug)
    if preset is not None and (everything or bibtex):
        raise UserError("give --preset, or --all or --bibtex")
    if preset is not None:
        _system(card, card.preset(preset), json)
        return
    if bibtex and not json:
        print(without_controls(card.bibtex()))
        return
    evidence = view.committed(card, log)
    claims = view.judged(card, evidence)
    findings = (
        evidence.findings(card.experiments)
        if evidence
        else [Finding(card.slug, experiment) for experiment in card.experiments]
    )
    if json:
        console.machine(
            {
                **card.model_dump(mode="json", exclude={"folder"}),
                "bibtex": card.bibtex(),
                "weights": {name: catalog.label_of_shipped(file) for name, file in card.shipped.items()},
                "verdicts": [{"says": s.claim.says, "verdict": str(s.judgement), "scale": s.scale} for s in claims],
                "evidence": evidence.model_dump(mode="json", exclude_defaults=True) if evidence else None,
            }
        )
        return
    out = console.console()
    out.print(f"[bold]{console.escape(card.title)}[/]")
    links = [f"https://arxiv.org/abs/{card.arxiv}" if card.arxiv else "", f"{card.date:%Y-%m-%d}"]
    links += [f"code: https://github.com/{card.code}" if card.code else "", ", ".join(card.tasks)]
    out.print("[dim]" + console.escape(" · ".join(part for part in links if part)) + "[/]")
    if everything:
        out.print("\n" + console.escape(card.summary))
    if claims:
        out.print("", console.claims(claims))
        out.print(f"\n[bold]{view.tally_of_claims(claims)}[/] of {len(claims)} claims", highlight=False)
        out.print(console.legend())
        if records := provenance.tally(findings):
            out.print(f"[dim]records: {records}; {registration.tally(card, findings)}[/]", highlight=False)
    if evidence:
        out.print("[dim]measured " + console.escape("; ".join(dict.fromkeys(view.where(evidence.runs)))) + "[/]")
    elsewhere = evidence.at_other_settings(card.experiments) if evidence else []
    if everything:
        _everything(card, findings, elsewhere)
    out.print()
    if not everything:
        out.print(f"provenn show {card.slug} --all       {len(card.experiments)} experiments, mechanisms, presets")
    if card.experiments:
        out.print(f"provenn reproduce {card.slug}        measure them here")
    if card.tasks and card.presets:
        name = card.preset().name
        out.print(f"provenn train {card.slug} --preset {name} --data …")
        out.print(f"provenn show {card.slug} --preset {name}        what its --set and --recipe take")
    elif card.presets:
        out.print(f"from Python: provenn.paper({card.slug!r}).build(); its presets have nothing to train")
    for name, file in card.shipped.items():
        which = "" if name == next(iter(card.shipped)) else f" --preset {name}"
        words = console.escape(catalog.shipped_in_words(file))
        out.print(f"provenn predict {card.slug} …{which}         with the weights that ship: {name}, {words}")
    if card.has("inspection"):
        out.print(f"provenn inspect {card.slug} …")


def _system(card: Card, preset: Preset, json: bool) -> None:
    """One preset, and what can be set of it."""
    from dataclasses import asdict

    from provenn.cli import console
    from provenn.inference.options import options_of

    task, options = card.work_of(preset), options_of(card, preset.name)
    if json:
        console.machine(
            {**preset.model_dump(mode="json"), "task": task, "settings": [asdict(each) for each in options]}
        )
        return
    out = console.console()
    out.print(f"[bold]{console.escape(preset.name)}[/] of {card.slug}, for {task or _no_task(preset)}")
    for line in (preset.summary, "; ".join(map(str, preset.published))):
        if line:
            out.print(console.escape(line))
    for option, kinds in (("--set", ("data", "system", "prediction")), ("--recipe", ("recipe",))):
        rows = [
            list(map(console.escape, (s.name, s.type, s.default, s.of)))
            for s in options
            if s.of.partition(",")[0] in kinds
        ]
        if rows:
            out.print("", console.table((option, "takes", "by default", "of"), rows))
    data = preset.data or "…"
    if task is None:
        out.print(f"\nprovenn.paper({card.slug!r}).build({preset.name!r})", markup=False)
        return
    out.print(f"\nprovenn train {card.slug} --preset {preset.name} --data {data} --set KEY=VALUE --recipe KEY=VALUE")


def _everything(card: Card, findings: list[Finding], elsewhere: list[Finding]) -> None:
    """Mechanisms, presets and every experiment: under claims, the body's, ours; then what other settings gave."""
    from provenn.cli import console

    out = console.console()
    if card.mechanisms:
        called = catalog.mechanism_names()
        rows = [
            (f"[bold]{called[card.slug, m.name]}[/]", m.slot, f"{card.package}.{m.layer.replace(':', '.')}")
            for m in card.mechanisms
        ]
        out.print("", console.table(("mechanism", "slot", "layer"), rows))
    if card.presets:
        rows = [
            (f"[bold]{p.name}[/]", card.work_of(p) or _no_task(p), "; ".join(map(str, p.published)))
            for p in card.presets
        ]
        out.print("", console.table(("preset", "task", "published"), rows))
    tables = by_origin(card, findings) | {"At other options, which are evidence for no claim": elsewhere}
    for title, chosen in tables.items():
        if chosen:
            out.print(f"\n[bold]{title}[/]", console.experiments(chosen))


def _no_task(preset: Preset) -> str:
    return "no task: a procedure" if preset.task == "" else "no task: a model for Python"


def by_origin(card: Card, findings: list[Finding]) -> dict[str, list[Finding]]:
    """Experiments under the abstract's claims, the others of the paper, and ours."""
    under = {name for claim in card.claims for name in claim.experiments}
    return {
        "Under the abstract": [f for f in findings if f.experiment.id in under],
        "From the body of the paper": [
            f for f in findings if f.experiment.id not in under and f.experiment.origin == "paper"
        ],
        "Ours": [f for f in findings if f.experiment.id not in under and f.experiment.origin == "ours"],
    }


@app.command()
def board(
    source: Annotated[
        Path | None, typer.Option("--from", help="Folder of a run. Default: the evidence that comes with the papers.")
    ] = None,
    json: Json = False,
) -> None:
    """Show all evidence at a glance: one strip of claims for each paper.

    \b
    provenn board
    provenn board --from runs/latest
    """
    from provenn.cli import console
    from provenn.evidence import view

    if source is None:
        known = {card.slug: evidence for card in catalog.cards().values() if (evidence := view.committed(card, log))}
    else:
        if not source.is_dir():
            raise UserError(f"no folder at {source}: give --from the folder of a `provenn reproduce`")
        unread: list[str] = []
        known = view.in_folder(source, unread.append)
        if not known:
            raise UserError(
                f"{source} holds no evidence that can be read: `provenn reproduce SLUG --out {source}` writes some"
            )
        for message in unread:
            log(message)
    cards = [card for card in catalog.cards().values() if source is None or card.slug in known]
    strips = {card.slug: view.judged(card, known.get(card.slug)) for card in cards}
    if json:
        console.machine(
            [
                {
                    "paper": slug,
                    "claims": [
                        {
                            "says": s.claim.says,
                            "headline": s.claim.headline,
                            "verdict": str(s.judgement),
                            "scale": s.scale,
                        }
                        for s in strip
                    ],
                }
                for slug, strip in strips.items()
            ]
        )
        return
    rows = [
        (
            f"[bold]{card.slug}[/]",
            console.escape(view.strip(strips[card.slug])),
            console.escape(view.tally_of_claims(strips[card.slug])),
            f"{known[card.slug].runs[-1].date:%Y-%m-%d}" if card.slug in known and known[card.slug].runs else "",
        )
        for card in cards
    ]
    out = console.console()
    out.print(console.table(("paper", console.escape("claims, [headline]"), "", "measured"), rows))
    every = [each for strip in strips.values() for each in strip]
    out.print(f"\n[bold]{len(every)} claims: {view.tally_of_claims(every)}[/]")
    records = [
        finding for card in cards if card.slug in known for finding in known[card.slug].findings(card.experiments)
    ]
    out.print(f"[dim]records: {view.provenance.tally(records) or 'none'}[/]", highlight=False)
    out.print(console.legend())
