"""Verbs that measure: reproduce, bench, compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from provenn import catalog
from provenn.catalog import Card
from provenn.cli.app import (
    Budget,
    Cluster,
    Device,
    Jobs,
    Json,
    Out,
    Resume,
    Seeds,
    Strict,
    app,
    command,
    log,
    of_the_paper,
    resumable,
    slugs,
    tasks,
)
from provenn.cli.data import DataPaths
from provenn.cli.hardware import DEFAULT, RunOptions, slow_precision, with_run
from provenn.cli.work import pairs
from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.names import meant
from provenn.core.progress import without_controls
from provenn.tasks import datasets

if TYPE_CHECKING:
    from provenn.evidence import Table
    from provenn.evidence.benchmark import Speed

RUN, BENCH = Path("runs/latest"), Path("runs/bench")
SIZE, BATCHES, THREADS, FORMS = 224, "1,32", "1,2", "eager,compile,onnx"  # of --backbones


@app.command()
@with_run
def reproduce(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="SLUG…", help="Papers to measure.", autocompletion=slugs)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Measure every paper.")] = False,
    experiment: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure only this experiment. Repeatable.", autocompletion=of_the_paper("experiments", "id")
        ),
    ] = None,
    headline: Annotated[
        bool, typer.Option("--headline", help="Measure only the experiments of the headline claims.")
    ] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="Measure only what the paper has no record of, or one of older code.")
    ] = False,
    budget: Budget = "small",
    seeds: Seeds = "5",
    device: Device = "auto",
    jobs: Jobs = 1,
    cluster: Cluster = None,
    paths: DataPaths = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Measure with another option, such as epochs=3 or sizes=[64,128]. The result is kept beside the "
            "experiment's own. Repeatable.",
        ),
    ] = None,
    run: RunOptions = DEFAULT,
    out: Out = RUN,
    resume: Resume = False,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Measure papers' experiments, and give each a verdict.

    Options of hardware and checkpoints are for the trainings of --budget paper. There, devices divide a batch of the
    paper's recipe among them. --precision is for trainings at every budget, and their records say it. On
    processors with AMX, convolutions take a half to a third of the time in bf16-mixed, and on others as long or longer.

    \b
    provenn reproduce eca_net --headline
    provenn reproduce --all --missing --device cuda --jobs 8
    provenn reproduce craft --experiment set5_x2 --budget paper --data set5=photos/Set5 --devices 8 --save-every 500
    """
    if everything == bool(slugs):
        raise UserError("name the papers to reproduce, or give --all; `provenn list` names them")
    chosen = (
        list(catalog.cards().values())
        if everything
        else [catalog.card(s) for s in dict.fromkeys(map(catalog.slug_of, slugs or []))]
    )
    if experiment and len(chosen) > 1:
        raise UserError(f"--experiment is for one paper, and {len(chosen)} were named")
    if experiment and headline:
        raise UserError("give --experiment or --headline, not both")
    if paths and budget != "paper":
        raise UserError(f"--data is for --budget paper; at {budget} the data are embedded")
    if overrides and len(chosen) > 1:
        raise UserError(f"--set is for one paper, and {len(chosen)} were named")
    given = datasets.given_paths(paths or [])
    training = _training(budget, run)
    if cluster is None and (slow := slow_precision(run.precision, device)):
        log(slow)
    _measure(
        chosen,
        strict=strict,
        json=json,
        jobs=jobs,
        cluster=cluster,
        experiments=experiment,
        headline=headline,
        missing=missing,
        budget=budget,
        seeds=seeds,
        device=device,
        out=out,
        resume=resume,
        data=given,
        overrides=pairs(overrides or [], example="epochs=3", keeps_text=True),
        training=training,
    )


def _training(budget: str, run: RunOptions) -> Any:
    """How trainings at the paper's scale run; at other budgets nothing of it but the precision may be given.

    Any: importing its type would import torch before the command line has been read.
    """
    from provenn.experiments.at_paper import TrainingOptions
    from provenn.training import Hardware

    options = TrainingOptions(Hardware(**run.hardware), run.precision, run.save_every)
    given = {**options.departures, "save_every": run.save_every}
    for name in (name for name, value in given.items() if value is not None and budget != "paper"):
        raise UserError(f"--{name.replace('_', '-')} is for --budget paper, got --budget {budget}: leave it out")
    return options


@app.command(context_settings={"ignore_unknown_options": True})
def bench(
    slug: Annotated[
        str | None, typer.Argument(help="The paper. Default: the speed of all papers.", autocompletion=slugs)
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Argument(metavar="[--ITS OPTIONS]", help="Options of a paper's own benchmark; --options lists them."),
    ] = None,
    backbones: Annotated[
        str | None,
        typer.Option(metavar="all|A,B,…", help="Time these image classification backbones instead: presets or papers."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="With --backbones: side of the images, in pixels.", show_default=str(SIZE))
    ] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="N,…", help="With --backbones: images in a batch.", show_default=BATCHES)
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(metavar="N,…", help="With --backbones: number of processor threads.", show_default=THREADS),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="With --backbones: the backbone that the others are compared with. Default: the first."),
    ] = None,
    forms: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…",
            help="With --backbones: forms to time. Compiling takes most of the time.",
            show_default=FORMS,
        ),
    ] = None,
    budget: Budget = "small",
    seeds: Seeds = "5",
    device: Device = "auto",
    jobs: Jobs = 1,
    cluster: Cluster = None,
    out: Out = BENCH,
    resume: Resume = False,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Measure the speed of layers beside baselines and installed peers. For one paper, also measure what it claims of
    time, memory and FLOPs.

    A ratio compares CPU time on one thread, or a GPU's clock, with both sides measured in turns. Some papers have a
    benchmark of their own. Its options run that benchmark; --options lists them. --jobs and --cluster are for those
    that have trials, such as a search.

    \b
    provenn bench aaren --budget smoke
    provenn bench --backbones eca_net --batch 1 --threads 1
    provenn bench long_context_bench --mask causal_document --length 1k:8k
    """
    from provenn.cli import console
    from provenn.experiments.reproduce import BUDGETS

    if budget not in BUDGETS:
        raise UserError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    theirs = {"size": size, "batch": batch, "threads": threads, "reference": reference, "forms": forms}
    if words := _own_words(slug, own, backbones, theirs):
        _own(slug, words, (jobs, cluster), device=device, budget=budget, out=out, resume=resume, json=json)
        return
    if jobs != 1 or cluster is not None:
        raise UserError("--jobs and --cluster are for a paper's own benchmark that has trials: leave them out")
    if backbones is not None:
        if slug is not None:
            raise UserError(f"name the paper as --backbones {slug}, or leave --backbones out")
        numbers = {"batch": _numbers("batch", batch or BATCHES), "threads": _numbers("threads", threads or THREADS)}
        side = SIZE if size is None else size
        _latency(backbones, side, numbers, reference, _forms(forms or FORMS), ROUNDS[budget], out, json)
        return
    for name, value in theirs.items():
        if value is not None:
            raise UserError(f"--{name} needs --backbones, such as --backbones A,B: add it, or leave --{name} out")
    papers = list(catalog.cards().values()) if slug is None else [catalog.card(slug)]
    costs = [] if slug is None else [experiment.id for experiment in papers[0].experiments if experiment.kind == "cost"]
    speeds = _time(papers, device, smoke=budget == "smoke")
    if not speeds and not costs:
        who = "no paper has benchmarks or" if slug is None else f"{papers[0].slug} has neither benchmarks nor"
        raise UserError(f"{who} experiments about cost; `provenn bench` without a paper times all that have benchmarks")
    rows = [_row(paper, speed) for paper, speed in speeds]
    if speeds and not json:
        terminal = console.console()
        for part in console.speed(speeds):
            terminal.print(part, "")
        if not costs:
            terminal.print(without_controls(f"repeat   {command()}"), soft_wrap=True, markup=False)
    if costs:
        options: dict[str, Any] = {"budget": budget, "seeds": seeds, "device": device, "out": out, "resume": resume}
        _measure(papers, strict=strict, json=json, speed=rows, experiments=costs, **options)
    elif json:
        console.machine({"repeat": command(), "speed": rows})
    failed = any(speed.trouble and speed.benchmark.package is None for _, speed in speeds)
    if failed or (strict and any(speed.met is False for _, speed in speeds)):
        raise typer.Exit(1)


ROUNDS = {"smoke": 1, "small": 7, "paper": 15}  # of --backbones
SHARED = ("device", "budget")  # options that a paper's own benchmark may take and that stand in the list of all


def _own_words(
    slug: str | None, own: Sequence[str] | None, backbones: str | None, shared: Mapping[str, Any]
) -> list[str]:
    """What a paper's own benchmark is given: its options, and of those that --backbones has too the ones it takes."""
    from provenn.core.settings import arguments_of

    given = {name: value for name, value in shared.items() if value is not None}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    if own:
        return [*own, *words]
    if slug is None or backbones is not None or not given or not catalog.card(slug).has("bench"):
        return []
    takes = arguments_of(catalog.card(slug).resolve("bench:sweep"), but=SHARED)
    return words if given.keys() <= takes.keys() else []


def _own(
    slug: str | None,
    words: Sequence[str],
    where: tuple[int, str | None],
    *,
    device: str,
    budget: str,
    out: Path,
    resume: bool,
    json: bool,
) -> None:
    """A paper's own benchmark, at the options that only it knows; `where` is how many processes, or which cluster."""
    from provenn.cli import console
    from provenn.core.device import choose_device
    from provenn.core.files import alone_in, check_writable
    from provenn.core.settings import arguments_of
    from provenn.evidence import Measurement, Table
    from provenn.evidence.record import LEDGER
    from provenn.evidence.sweep import POINTS
    from provenn.experiments.side_by_side import where_trials_run

    if slug is None or slug.startswith("-"):
        raise UserError(f"no such option: {slug or words[0]}; a paper's own options follow its name")
    card = catalog.card(slug)
    if not card.has("bench"):
        raise UserError(f"no such option: {words[0]}; {card.slug} has no benchmark of its own")
    sweep = card.resolve("bench:sweep")
    takes = arguments_of(sweep, but=SHARED)
    if list(words) == ["--options"]:
        terminal = console.console()
        for grid in console.details(Measurement(tables=[_options_of(card.slug, sweep, takes)])):
            terminal.print(grid, "")
        return
    given = own_options(words, takes, card.slug)
    chosen = choose_device(device)
    wanted = sweep(**given, device=chosen, budget=budget)
    if where != (1, None) and not wanted.has_trials:
        raise UserError("nothing of this benchmark can run elsewhere: leave --jobs and --cluster out")
    folder = out / card.slug if out == BENCH else out
    check_writable(folder)
    for name in () if resume else (POINTS, LEDGER):
        (folder / name).unlink(missing_ok=True)

    def kept() -> bool:
        return any((folder / name).exists() for name in (POINTS, LEDGER))

    with (
        resumable(kept),
        progress.shown(),
        alone_in(folder),
        where_trials_run(*where, [card], chosen, log) as elsewhere,
    ):
        rows = wanted.run(folder, resume=resume, log=log, elsewhere=elsewhere)
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
    from provenn.core.settings import typed

    given: dict[str, Any] = {}
    rest = list(words)
    known = [f"--{name.replace('_', '-')}" for name in takes]
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in takes:
            what = "no such option" if option.startswith("-") else "unexpected argument"
            raise UserError(f"{what}: {option}{meant(option, known)}; {slug} takes {', '.join(known)}")
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
    from provenn.inference.options import in_words

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
    from provenn.experiments.latency import SHORT

    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names or not set(names) <= SHORT.keys():
        raise UserError(f"--forms must name some of {', '.join(SHORT)}, got {text!r}")
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

    from provenn.cli import console
    from provenn.core.files import check_writable
    from provenn.evidence import Measurement
    from provenn.experiments import latency

    if size < 1:
        raise UserError(f"size must be at least 1, got {size}")
    chosen = latency.choose([name.strip() for name in names.split(",") if name.strip()], size)
    check_writable(out)
    with progress.shown():
        latencies = latency.measure(
            chosen,
            size=size,
            batches=numbers["batch"],
            threads=numbers["threads"],
            rounds=rounds,
            reference=reference,
            forms=forms,
        )
    files = [str(file) for file in latencies.save(out)]
    if json:
        console.machine({"repeat": command(), **asdict(latencies), "files": files})
        return
    terminal = console.console()
    for grid in console.details(Measurement(tables=latencies.tables)):
        terminal.print(grid, "")
    for file in files:
        terminal.print(without_controls(f"written  {file}"), soft_wrap=True, markup=False)
    terminal.print(without_controls(f"repeat   {command()}"), soft_wrap=True, markup=False)


def _time(papers: Sequence[Card], device: str, *, smoke: bool) -> "list[tuple[str, Speed]]":
    """Each paper's benchmarks, in the order in which the paper lists them; each is reported as it ends."""
    from provenn.core.device import choose_device
    from provenn.evidence.benchmark import benchmarks, time_benchmarks

    device, chosen = choose_device(device), {}
    for card in papers:
        try:
            chosen[card.slug] = benchmarks(card.resolve_module("experiments")) if card.has("experiments") else ()
        except UserError as error:
            if len(papers) == 1:
                raise
            log(f"provenn: left out {error}")
    count = sum(1 if smoke else len(each.timing.sizes) for mine in chosen.values() for each in mine)
    done: list[tuple[str, Speed]] = []
    with progress.shown(), progress.bar("speed", count) as advance:
        for slug, mine in chosen.items():
            speeds = []
            for speed in time_benchmarks(mine, device=device, smoke=smoke):
                system, timing = speed.benchmark.system, speed.benchmark.timing
                at = "" if speed.size is None else f" at {speed.size} {timing.unit}"
                log(f"{slug} {timing.name}: {system}{at}: {speed.trouble or f'{speed.comparison} of {speed.baseline}'}")
                advance(1, f"{slug}: {timing.name}")
                speeds.append(speed)
            done += [(slug, speed) for each in mine for speed in speeds if speed.benchmark is each]
    return done


def _row(paper: str, speed: "Speed") -> dict[str, Any]:
    benchmark, comparison = speed.benchmark, speed.comparison
    return {
        "paper": paper,
        "timing": benchmark.timing.name,
        "setting": dict(benchmark.timing.setting),
        "unit": benchmark.timing.unit,
        "size": speed.size,
        "system": benchmark.system,
        "baseline": speed.baseline,
        "ratio": None if comparison is None else comparison.ratio,
        "interval": None if comparison is None else list(comparison.interval),
        "confidence": None if comparison is None else comparison.confidence,
        "within": benchmark.within,
        "met": speed.met,
        "trouble": speed.trouble,
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
    """Measure experiments, log each as it ends, and show them; with `speed` or named experiments, all tables of
    each.

    `options` are those of `reproduce_many`.
    """
    from provenn.cli import console
    from provenn.evidence import report, view
    from provenn.evidence.record import EVIDENCE, LEDGER, Evidence, Finding
    from provenn.evidence.verdict import Verdict
    from provenn.experiments.reproduce import ERRORS, reproduce_many

    for name in options.get("experiments") or ():
        papers[0].experiment(name)

    def done(finding: Finding) -> None:
        figure = finding.reason or view.ours(finding.measurement)
        setting = view.at_setting(finding)
        line = f"{view.SYMBOLS[finding.verdict]} {finding.paper} {finding.experiment.id}: {finding.verdict}; {figure}"
        log(f"{line}; {setting}" if setting else line)

    def kept() -> bool:
        return any((out / card.slug / name).exists() for card in papers for name in (EVIDENCE, LEDGER))

    with resumable(kept), progress.shown():
        findings = reproduce_many(papers, out=out, log=log, done=done, **options)
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
            if options.get("experiments") is None and not options.get("overrides"):
                claims = view.judged(card, Evidence.read(out / card.slug / EVIDENCE))
                measured = [each for each in claims if any(finding.record for finding in each.findings)]
                shown = measured if options.get("headline") else claims
                terminal.print(console.claims(shown), "")
                if len(shown) < len(claims):
                    rest = len(claims) - len(shown)
                    terminal.print(f"[dim]{rest} more claims without --headline: provenn reproduce {card.slug}[/]")
            else:
                terminal.print(console.experiments(mine))
            terminal.print(f"[bold]{len(mine)} experiment{'s' * (len(mine) != 1)}: {view.tally(mine)}[/]")
            if speed is not None or options.get("experiments"):
                for finding in mine:
                    grids = list(console.details(finding.measurement))
                    if grids or finding.measurement.note:
                        note = console.escape(finding.measurement.note)
                        terminal.print(f"[bold]{finding.experiment.id}[/]  {note}\n")
                    for grid in grids:
                        terminal.print(grid, "")
        terminal.print(without_controls(f"report   {page}"), soft_wrap=True, markup=False)
        records = ", ".join(str(out / card.slug / EVIDENCE) for card in papers)
        terminal.print(without_controls(f"records  {records}"), soft_wrap=True, markup=False)
        terminal.print(without_controls(f"repeat   {command()}"), soft_wrap=True, markup=False)
    for slug in dict.fromkeys(finding.paper for finding in failed):
        names = ", ".join(finding.experiment.id for finding in failed if finding.paper == slug)
        log(f"provenn: the measurement of {names} of {slug} failed; see {out / slug / ERRORS}")
    if failed or (strict and any(finding.verdict is Verdict.CONTRADICTED for finding in findings)):
        raise typer.Exit(1)


def _machine(finding: Any) -> dict[str, Any]:
    record = finding.record.model_dump(mode="json") if finding.record else None
    return {"paper": finding.paper, **finding.experiment.model_dump(mode="json"), "record": record}


@app.command()
def compare(
    slot: Annotated[
        str,
        typer.Option(help="The slot to fill, such as channel-gate.", autocompletion=of_the_paper("mechanisms", "slot")),
    ],
    data: Annotated[str, typer.Option(help="Name of an embedded data set, or a path.")],
    task: Annotated[
        str | None,
        typer.Option(
            help="Kind of work, where several read the data. Default: the first of them.", autocompletion=tasks
        ),
    ] = None,
    candidates: Annotated[
        str | None, typer.Option("--with", metavar="A,B,…", help="Mechanisms to compare. Default: all of the slot.")
    ] = None,
    budget: Budget = "small",
    seeds: Seeds = "3",
    device: Device = "auto",
    out: Out = Path("runs/compare"),
    json: Json = False,
) -> None:
    """Compare mechanisms of one slot in the same host, trained at equal budget. Run it again to continue a stopped run.

    \b
    provenn compare --slot channel-gate --with eca,se,none --data digits
    provenn compare --slot token-mixer --with softmax,rat --data stdlib --seeds 5
    """
    from provenn.cli import console
    from provenn.evidence import Measurement
    from provenn.experiments.compare import compare as measure

    names = [name.strip() for name in candidates.split(",") if name.strip()] if candidates is not None else None
    with resumable(lambda: out.is_dir() and any(out.iterdir()), resume=False), progress.shown():
        result = measure(slot, names, data=data, task=task, budget=budget, seeds=seeds, device=device, out=out, log=log)
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
