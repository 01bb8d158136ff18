"""Verbs that measure: reproduce, bench, compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from provenn import catalog, datasets, progress
from provenn.catalog import Card
from provenn.cli.app import (
    Budget,
    Device,
    Json,
    Out,
    Resume,
    Seeds,
    Strict,
    app,
    command,
    of_the_paper,
    resumable,
    slugs,
    tell,
)
from provenn.cli.data import Places
from provenn.cli.work import pairs
from provenn.errors import UserError
from provenn.progress import without_controls

if TYPE_CHECKING:
    from provenn.evidence import Table
    from provenn.evidence.benchmark import Timing

RUN, BENCH = Path("runs/latest"), Path("runs/bench")
SIZE, BATCHES, THREADS, FORMS = 224, "1,32", "1,2", "eager,compile,onnx"  # of --backbones


@app.command()
def reproduce(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="SLUG…", help="Papers.", autocompletion=slugs)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every paper.")] = False,
    claim: Annotated[
        list[str] | None,
        typer.Option(help="Only this claim; may be given again.", autocompletion=of_the_paper("claims", "id")),
    ] = None,
    headline: Annotated[bool, typer.Option("--headline", help="Only what the abstract's headline rests on.")] = False,
    budget: Budget = "small",
    seeds: Seeds = "5",
    device: Device = "auto",
    jobs: Annotated[int, typer.Option(help="Trials side by side, each in a process; they share the cores.")] = 1,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="auto|HOST:PORT",
            help="Trials on the machines of a Ray cluster; auto takes the one that runs here, or begins one.",
        ),
    ] = None,
    places: Places = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Measure at another setting, such as epochs=3 or sizes=[64,128], kept beside the claims' own; "
            "repeatable.",
        ),
    ] = None,
    out: Out = RUN,
    resume: Resume = False,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Measure papers' claims, and give each a verdict.

    \b
    provenn reproduce eca_net --headline
    provenn reproduce craft --claim set5_x2 --budget paper --data set5=photos/Set5
    """
    if everything == bool(slugs):
        raise UserError("name the papers to reproduce, or give --all; `provenn list` names them")
    chosen = (
        list(catalog.cards().values())
        if everything
        else [catalog.card(s) for s in dict.fromkeys(map(catalog.slug_of, slugs or []))]
    )
    if claim and len(chosen) > 1:
        raise UserError(f"--claim is for one paper, and {len(chosen)} were named")
    if claim and headline:
        raise UserError("give --claim or --headline, not both")
    if places and budget != "paper":
        raise UserError(f"--data is for --budget paper; at {budget} the data are embedded")
    if changes and len(chosen) > 1:
        raise UserError(f"--set is for one paper, and {len(chosen)} were named")
    given = datasets.given_places(places or [])
    _measure(
        chosen,
        strict=strict,
        json=json,
        jobs=jobs,
        cluster=cluster,
        claims=claim,
        headline=headline,
        budget=budget,
        seeds=seeds,
        device=device,
        out=out,
        resume=resume,
        data=given,
        changes=pairs(changes or [], example="epochs=3"),
    )


@app.command(context_settings={"ignore_unknown_options": True})
def bench(
    slug: Annotated[
        str | None, typer.Argument(help="The paper; by default the speed of all.", autocompletion=slugs)
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Argument(metavar="[--ITS OPTIONS]", help="Of a paper with a benchmark of its own; --options lists them."),
    ] = None,
    backbones: Annotated[
        str | None,
        typer.Option(metavar="all|A,B,…", help="Time these classification backbones instead, by preset or paper."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the images, of --backbones.", show_default=str(SIZE))
    ] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="N,…", help="Images at a time, of --backbones.", show_default=BATCHES)
    ] = None,
    threads: Annotated[
        str | None, typer.Option(metavar="N,…", help="Of the processor, of --backbones.", show_default=THREADS)
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Ratios are to this one of --backbones.")] = None,
    forms: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…", help="What runs --backbones; compiling takes most of the time.", show_default=FORMS
        ),
    ] = None,
    budget: Budget = "small",
    seeds: Seeds = "5",
    device: Device = "auto",
    out: Out = BENCH,
    resume: Resume = False,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Speed beside baselines and installed peers; of one paper also what it claims about time, memory and FLOPs.

    A ratio is of CPU time on one thread, or of a GPU's clock, both sides in turns. A paper with a benchmark of its own
    takes options of its own, which run that one; --options lists them.

    \b
    provenn bench aaren --budget smoke
    provenn bench --backbones eca_net --batch 1 --threads 1
    provenn bench long_context_bench --mask causal_document --length 1k:8k
    """
    from provenn.cli import console
    from provenn.reproduce import BUDGETS

    if budget not in BUDGETS:
        raise UserError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    if own:
        _own(slug, own, device=device, budget=budget, out=out, resume=resume, json=json)
        return
    if backbones is not None:
        if slug is not None:
            raise UserError(f"name the paper as --backbones {slug}, or leave --backbones out")
        numbers = {"batch": _numbers("batch", batch or BATCHES), "threads": _numbers("threads", threads or THREADS)}
        side = SIZE if size is None else size
        _latency(backbones, side, numbers, reference, _forms(forms or FORMS), ROUNDS[budget], out, json)
        return
    theirs = {"size": size, "batch": batch, "threads": threads, "reference": reference, "forms": forms}
    for name, value in theirs.items():
        if value is not None:
            raise UserError(f"--{name} is of --backbones: name some as --backbones A,B, or leave --{name} out")
    papers = list(catalog.cards().values()) if slug is None else [catalog.card(slug)]
    costs = [] if slug is None else [claim.id for claim in papers[0].claims if claim.kind == "cost"]
    timings = _time(papers, device, smoke=budget == "smoke")
    if not timings and not costs:
        who = "no paper has benchmarks or" if slug is None else f"{papers[0].slug} has neither benchmarks nor"
        raise UserError(f"{who} claims about cost; `provenn bench` without a paper times all that have benchmarks")
    rows = [_row(paper, timing) for paper, timing in timings]
    if timings and not json:
        terminal = console.console()
        for part in console.speed(timings):
            terminal.print(part, "")
        if not costs:
            terminal.print(without_controls(f"repeat   {command()}"), soft_wrap=True, markup=False)
    if costs:
        options: dict[str, Any] = {"budget": budget, "seeds": seeds, "device": device, "out": out, "resume": resume}
        _measure(papers, strict=strict, json=json, speed=rows, claims=costs, **options)
    elif json:
        console.machine({"repeat": command(), "speed": rows})
    failed = any(timing.trouble and timing.benchmark.package is None for _, timing in timings)
    if failed or (strict and any(timing.met is False for _, timing in timings)):
        raise typer.Exit(1)


ROUNDS = {"smoke": 1, "small": 7, "paper": 15}  # of --backbones
SHARED = ("device", "budget")  # options that a paper's own benchmark may take and that stand in the list of all


def _own(
    slug: str | None, words: Sequence[str], *, device: str, budget: str, out: Path, resume: bool, json: bool
) -> None:
    """A paper's own benchmark, at the options that only it knows."""
    from provenn.cli import console
    from provenn.evidence import Measurement, Table
    from provenn.evidence.sweep import POINTS
    from provenn.reproduce import alone_in, check_writable, choose_device
    from provenn.settings import arguments_of

    if slug is None or slug.startswith("-"):
        raise UserError(f"no such option: {slug or words[0]}; a paper's own options follow its name")
    card = catalog.card(slug)
    if not card.has("bench"):
        raise UserError(f"no such option: {words[0]}; {card.slug} has no benchmark of its own, which would take some")
    sweep = card.resolve("bench:sweep")
    takes = arguments_of(sweep, but=SHARED)
    if list(words) == ["--options"]:
        terminal = console.console()
        for grid in console.details(Measurement(tables=[_options_of(card.slug, sweep, takes)])):
            terminal.print(grid, "")
        return
    given = own_options(words, takes, card.slug)
    wanted = sweep(**given, device=choose_device(device), budget=budget)
    folder = out / card.slug if out == BENCH else out
    check_writable(folder)
    kept = [] if resume else [file for file in [folder / POINTS] if file.exists()]
    for points in kept:
        points.unlink()
    with resumable((folder / POINTS).exists), progress.shown(), alone_in(folder):
        rows = wanted.run(folder, resume=resume, tell=tell)
    files = [str(file) for file in wanted.save(rows, folder)]
    if json:
        console.machine({"repeat": command(), "title": wanted.title, "points": rows, "files": files})
    else:
        terminal = console.console()
        tables: list[Table] = wanted.tables(rows)
        for grid in console.details(Measurement(tables=tables)):
            terminal.print(grid, "")
        for file in files:
            terminal.print(without_controls(f"written  {file}"), soft_wrap=True, markup=False)
        terminal.print(without_controls(f"repeat   {command()}"), soft_wrap=True, markup=False)
    if any(row.get("status") == "error" for row in rows):
        raise typer.Exit(1)


def own_options(words: Sequence[str], takes: Mapping[str, Any], slug: str) -> dict[str, Any]:
    """`--head-dim 64 --long` as the arguments of a function, of the types that it names.

    Args:
        words: as they were typed.
        takes: arguments by name, and their types.
        slug: whose options they are, for what an error says.
    """
    from provenn.settings import typed

    given: dict[str, Any] = {}
    rest = list(words)
    known = [f"--{name.replace('_', '-')}" for name in takes]
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in takes:
            what = "no such option" if option.startswith("-") else "unexpected argument"
            raise UserError(f"{what}: {option}{catalog.meant(option, known)}; {slug} takes {', '.join(known)}")
        if takes[name] is bool:
            given[name] = typed(option, value, bool) if equals else True
            continue
        if not equals and not rest:
            raise UserError(f"{option} needs a value")
        given[name] = typed(option, value if equals else rest.pop(0), takes[name])
    return given


def _options_of(slug: str, sweep: Any, takes: Mapping[str, Any]) -> "Table":
    import inspect

    from provenn.evidence import Table
    from provenn.options import in_words

    said = dict(line.strip().split(": ", 1) for line in (sweep.__doc__ or "").splitlines() if ": " in line)
    defaults = inspect.signature(sweep).parameters
    rows: list[list[str | float | int | None]] = [
        [
            f"--{name.replace('_', '-')}",
            in_words(hint),
            "" if defaults[name].default in (None, "") else str(defaults[name].default).lower(),
            said.get(name, ""),
        ]
        for name, hint in takes.items()
    ]
    return Table(caption=f"Options of {slug}'s own benchmark", columns=["option", "takes", "default", ""], rows=rows)


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--{name} takes whole numbers, such as 1,32; got {text!r}") from None


def _forms(text: str) -> list[str]:
    from provenn.latency import SHORT

    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names or not set(names) <= SHORT.keys():
        raise UserError(f"--forms takes some of {', '.join(SHORT)}; got {text!r}")
    return [full for short, full in SHORT.items() if short in names]


def _latency(
    names: str,
    size: int,
    numbers: dict[str, list[int]],
    reference: str | None,
    forms: list[str],
    rounds: int,
    out: Path,
    json: bool,
) -> None:
    from dataclasses import asdict

    from provenn import latency
    from provenn.cli import console
    from provenn.evidence import Measurement
    from provenn.reproduce import check_writable

    if size < 1:
        raise UserError(f"size must be at least 1, got {size}")
    chosen = latency.choose([name.strip() for name in names.split(",") if name.strip()], size)
    check_writable(out)
    with progress.shown():
        told = latency.measure(
            chosen,
            size=size,
            batches=numbers["batch"],
            threads=numbers["threads"],
            rounds=rounds,
            reference=reference,
            forms=forms,
            tell=tell,
        )
    files = [str(file) for file in told.save(out)]
    if json:
        console.machine({"repeat": command(), **asdict(told), "files": files})
        return
    terminal = console.console()
    for grid in console.details(Measurement(tables=told.tables)):
        terminal.print(grid, "")
    for file in files:
        terminal.print(without_controls(f"written  {file}"), soft_wrap=True, markup=False)
    terminal.print(without_controls(f"repeat   {command()}"), soft_wrap=True, markup=False)


def _time(papers: Sequence[Card], device: str, *, smoke: bool) -> "list[tuple[str, Timing]]":
    """Each paper's benchmarks, in the order in which the paper lists them; each is told as it ends."""
    from provenn.evidence.benchmark import benchmarks, time_benchmarks
    from provenn.reproduce import choose_device

    device, chosen = choose_device(device), {}
    for card in papers:
        try:
            chosen[card.slug] = benchmarks(card.resolve_module("claims")) if card.has("claims") else ()
        except UserError as error:
            if len(papers) == 1:
                raise
            tell(f"provenn: left out {error}")
    count = sum(1 if smoke else len(each.race.sizes) for mine in chosen.values() for each in mine)
    done: list[tuple[str, Timing]] = []
    with progress.shown(), progress.bar("speed", count) as advance:
        for slug, mine in chosen.items():
            timings = []
            for timing in time_benchmarks(mine, device=device, smoke=smoke):
                system, race = timing.benchmark.system, timing.benchmark.race
                at = "" if timing.size is None else f" at {timing.size} {race.unit}"
                tell(
                    f"{slug} {race.name}: {system}{at}: {timing.trouble or f'{timing.comparison} of {timing.baseline}'}"
                )
                advance(1, f"{slug}: {race.name}")
                timings.append(timing)
            done += [(slug, timing) for each in mine for timing in timings if timing.benchmark is each]
    return done


def _row(paper: str, timing: "Timing") -> dict[str, Any]:
    benchmark, comparison = timing.benchmark, timing.comparison
    return {
        "paper": paper,
        "race": benchmark.race.name,
        "setting": dict(benchmark.race.setting),
        "unit": benchmark.race.unit,
        "size": timing.size,
        "system": benchmark.system,
        "baseline": timing.baseline,
        "ratio": None if comparison is None else comparison.ratio,
        "interval": None if comparison is None else list(comparison.interval),
        "confidence": None if comparison is None else comparison.confidence,
        "within": benchmark.within,
        "met": timing.met,
        "trouble": timing.trouble,
    }


def _measure(
    papers: Sequence[Card],
    *,
    out: Path,
    strict: bool,
    json: bool,
    speed: Sequence[dict[str, Any]] | None = None,
    **options: Any,
) -> None:
    """Measure claims, telling each as it ends, and show them; with `speed` or named claims, all tables of each.

    `options` are those of `reproduce_many`.
    """
    from provenn.cli import console
    from provenn.evidence import report, view
    from provenn.evidence.record import EVIDENCE, LEDGER, Evidence, Finding
    from provenn.evidence.verdict import Verdict
    from provenn.reproduce import ERRORS, reproduce_many

    for name in options.get("claims") or ():
        papers[0].claim(name)

    def done(finding: Finding) -> None:
        figure = finding.reason or view.ours(finding.measurement)
        setting = view.at_setting(finding)
        line = f"{view.SYMBOLS[finding.verdict]} {finding.paper} {finding.claim.id}: {finding.verdict}; {figure}"
        tell(f"{line}; {setting}" if setting else line)

    def kept() -> bool:
        return any((out / card.slug / name).exists() for card in papers for name in (EVIDENCE, LEDGER))

    with resumable(kept), progress.shown():
        findings = reproduce_many(papers, out=out, tell=tell, done=done, **options)
    page = report.write(out)
    failed = [finding for finding in findings if finding.measurement.failed]
    if json:
        summary: dict[str, Any] = {"out": str(out), "report": str(page), "repeat": command()}
        if speed is not None:
            summary["speed"] = speed
        console.machine({**summary, "findings": [_machine(finding) for finding in findings]})
    else:
        terminal = console.console()
        for card in papers:
            mine = [finding for finding in findings if finding.paper == card.slug]
            terminal.print(f"\n[bold]{console.escape(card.title)}[/]")
            if options.get("claims") is None and not options.get("changes"):
                statements = view.judged(card, Evidence.read(out / card.slug / EVIDENCE))
                measured = [each for each in statements if any(finding.record for finding in each.findings)]
                shown = measured if options.get("headline") else statements
                terminal.print(console.statements(shown), "")
                if len(shown) < len(statements):
                    rest = len(statements) - len(shown)
                    terminal.print(f"[dim]{rest} more statements without --headline: provenn reproduce {card.slug}[/]")
            else:
                terminal.print(console.claims(mine))
            terminal.print(f"[bold]{len(mine)} claim{'s' * (len(mine) != 1)}: {view.tally(mine)}[/]")
            if speed is not None or options.get("claims"):
                for finding in mine:
                    grids = list(console.details(finding.measurement))
                    if grids or finding.measurement.note:
                        note = console.escape(finding.measurement.note)
                        terminal.print(f"[bold]{finding.claim.id}[/]  {note}\n")
                    for grid in grids:
                        terminal.print(grid, "")
        terminal.print(without_controls(f"report   {page}"), soft_wrap=True, markup=False)
        records = ", ".join(str(out / card.slug / EVIDENCE) for card in papers)
        terminal.print(without_controls(f"records  {records}"), soft_wrap=True, markup=False)
        terminal.print(without_controls(f"repeat   {command()}"), soft_wrap=True, markup=False)
    for slug in dict.fromkeys(finding.paper for finding in failed):
        names = ", ".join(finding.claim.id for finding in failed if finding.paper == slug)
        tell(f"provenn: the measurement of {names} of {slug} failed; see {out / slug / ERRORS}")
    if failed or (strict and any(finding.verdict is Verdict.NOT_REPRODUCED for finding in findings)):
        raise typer.Exit(1)


def _machine(finding: Any) -> dict[str, Any]:
    record = finding.record.model_dump(mode="json") if finding.record else None
    return {"paper": finding.paper, **finding.claim.model_dump(mode="json"), "record": record}


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
    """Mechanisms of one slot in the same host, trained at equal budget. Run again, it goes on where it stopped.

    \b
    provenn compare --slot channel-gate --with eca,se,none --data digits
    provenn compare --slot token-mixer --with softmax,rat --data stdlib --seeds 5
    """
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
        terminal.print(without_controls(f"written  {file}"), soft_wrap=True, markup=False)
    terminal.print(without_controls(f"repeat   {command()}"), soft_wrap=True, markup=False)
