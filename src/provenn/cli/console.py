"""Tables and colours of the terminal."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape as escape_markup
from rich.table import Table

from provenn.core.files import strict_json
from provenn.core.progress import without_controls
from provenn.evidence import view
from provenn.evidence.claim import ClaimVerdict
from provenn.evidence.measurement import Measurement
from provenn.evidence.measurement import Table as Numbers
from provenn.evidence.record import Finding
from provenn.evidence.verdict import Verdict

if TYPE_CHECKING:  # speeds are torch's, and `list` does without
    from provenn.evidence.benchmark import Speed

PIPED_WIDTH, NARROW = 200, 100
MOST_FINDINGS = 2  # beside a claim
SHARES = (5, 9, 3, 7)  # of a claim's columns in the width
MANY = 5  # columns, more of which a narrow terminal has no room for
CLAIM_COLOURS = {
    ClaimVerdict.VERIFIED: "green",
    ClaimVerdict.REPRODUCED: "green",
    ClaimVerdict.SUPPORTED: "cyan",
    ClaimVerdict.MIXED: "yellow",
    ClaimVerdict.INCONCLUSIVE: "yellow",
    ClaimVerdict.CONTRADICTED: "red",
    ClaimVerdict.NOT_MEASURED: "bright_black",
}
MET = {True: "[green]✔[/]", False: "[red]✘[/]", None: "[yellow]~[/]"}  # within what is asked, beyond, undecided
COLOURS = {
    Verdict.VERIFIED: "green",
    Verdict.REPRODUCED: "green",
    Verdict.SUPPORTED: "cyan",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.CONTRADICTED: "red",
    Verdict.NOT_MEASURED: "bright_black",
    Verdict.UNSUPPORTED: "bright_black",
    Verdict.OUT_OF_MEMORY: "bright_black",
}


def console() -> Console:
    """Stdout, with room for long lines where no terminal folds them."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def escape(text: str) -> str:
    """Text as it stands, in a line with markup: neither markup of its own nor a terminal's commands take effect."""
    return escape_markup(without_controls(text))


def machine(value: Any) -> None:
    """JSON on stdout."""
    print(strict_json(value))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table; the cells may hold rich markup."""
    grid = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for column in grid.columns:
        column.overflow = "fold"
    for row in rows:
        grid.add_row(*row)
    return grid


def verdict(which: Verdict) -> str:
    return f"[{COLOURS[which]}]{view.SYMBOLS[which]} {which}[/]"


def claim_verdict(judged: view.Judged) -> str:
    """The verdict on a claim with its scale; why nothing was measured stands beside it."""
    which = judged.judgement
    words = escape(str(which.verdict if which.verdict is ClaimVerdict.NOT_MEASURED else which))
    scale = f"\n[dim]{escape(judged.scale)}[/]" if judged.scale else ""
    return f"[{CLAIM_COLOURS[which.verdict]}]{judged.symbol} {words}[/]{scale}"


def legend() -> str:
    """What the verdicts of claims mean."""
    return "[dim]" + "; ".join(f"{symbol} {word}: {meaning}" for symbol, word, meaning in view.legend()) + "[/]"


def claims(judged: Iterable[view.Judged]) -> Table:
    """What the abstract says: the verdict, the claim, the paper's figure, and what was measured first."""
    rows = []
    for each in judged:
        says = escape(each.claim.says)
        measured = each.shown
        reason = each.judgement.reason or next((f.reason for f in each.findings if f.reason), "")
        decided = each.judgement.verdict is not ClaimVerdict.NOT_MEASURED
        shown = "; ".join(f"{view.SYMBOLS[f.verdict]} {_measured(each, f)}" for f in measured[:MOST_FINDINGS])
        ours = shown if decided else "; ".join(filter(None, (reason, f"beside it: {shown}" if shown else "")))
        more = f" and {len(measured) - MOST_FINDINGS} more" if len(measured) > MOST_FINDINGS else ""
        rows.append(
            (
                claim_verdict(each),
                f"[bold]{says}[/]" if each.claim.headline else says,
                escape(each.claim.figure),
                escape(ours + more),
            )
        )
    grid = experiment_table(("the verdict", "what the abstract says", "its figure", "measured here"), rows)
    grid.padding = (0, 2, 0, 0)
    if len(grid.columns) == len(SHARES):
        grid.expand = True
        for column, share in zip(grid.columns, SHARES):
            column.ratio = share
    return grid


def _measured(judged: view.Judged, finding: Finding) -> str:
    """What an experiment gave, and what it is to the claim unless it decides it."""
    role = judged.role(finding)
    return view.shortly(finding) + ("" if role is view.Role.DECIDES else f" ({role})")


def experiments(findings: Iterable[Finding]) -> Table:
    """What is claimed, what the paper published, what we ask for, what we measured, and the verdict."""
    rows = []
    for finding in findings:
        origin = "" if finding.experiment.origin == "paper" else " [dim](ours)[/]"
        lines = (view.ours(finding.measurement), view.scale_of(finding), view.when(finding), view.at_setting(finding))
        ours = "\n".join(filter(None, lines))
        reason = f"\n[dim]{escape(view.reason(finding))}[/]" if view.reason(finding) else ""
        rows.append(
            (
                f"[bold]{finding.experiment.id}[/]{origin}\n{escape(finding.experiment.says)}",
                escape(view.published(finding.experiment)),
                escape(view.asked(finding)),
                escape(ours),
                verdict(finding.verdict) + reason,
            )
        )
    columns = ("experiment", "published", "we ask for, and why", "ours, with its interval", "verdict")
    return experiment_table(columns, rows)


def experiment_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Experiments side by side with what belongs to them; below them where the terminal is too narrow for that."""
    grid = _stacked(columns, rows) if console().width < NARROW else table(columns, rows)
    grid.padding = (0, 3, 1, 0)
    return grid


def _stacked(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """One column: each row's first cell, and below it the others by name."""
    lines = ([row[0], *(f"[dim]{name}:[/] {cell}" for name, cell in zip(columns[1:], row[1:]) if cell)] for row in rows)
    return table(columns[:1], [["\n".join(cells)] for cells in lines])


def details(measurement: Measurement) -> Iterator[Group]:
    """The tables of a measurement, and the numbers of its plots that stand in none of them."""
    drawn = [view.table_of(name or lines[0].y_label, lines) for name, lines in view.plots(measurement).items()]
    shown = [_cells(numbers) for numbers in measurement.tables]
    for numbers in [*measurement.tables, *(one for one in drawn if not any(_cells(one) <= cells for cells in shown))]:
        rows = [[escape(view.cell(value)) for value in row] for row in numbers.rows]
        lay = _stacked if len(numbers.columns) > MANY and console().width < NARROW else table
        yield Group(f"[bold]{escape(numbers.caption)}[/]", lay([escape(column) for column in numbers.columns], rows))


def _cells(numbers: Numbers) -> set[str]:
    return {view.cell(value) for row in numbers.rows for value in row}


def speed(speeds: "Iterable[tuple[str, Speed]]") -> Iterator[Group]:
    """A table for each timing of each paper: whose time over whose, its interval, and what is asked for."""
    timings: dict[tuple[str, int], list[Speed]] = {}
    for paper, speed in speeds:
        timings.setdefault((paper, id(speed.benchmark.timing)), []).append(speed)
    for (paper, _), rows in timings.items():
        timing = rows[0].benchmark.timing
        setting = ", ".join(f"{key} {value}" for key, value in timing.setting.items())
        caption = f"[bold]{escape(f'{paper}: {timing.name}')}[/]" + (f" [dim]({escape(setting)})[/]" if setting else "")
        columns = (timing.unit, "time of", "over that of", "ratio [95 %]", "at most", "")
        yield Group(caption, table([escape(column) for column in columns], [_speed_row(row) for row in rows]))


def _speed_row(speed: "Speed") -> tuple[str, ...]:
    benchmark, comparison = speed.benchmark, speed.comparison
    if comparison is None:
        ratio = escape(speed.trouble)
    else:
        low, high = comparison.interval
        width = "" if comparison.confidence >= 0.95 else f" ({100 * comparison.confidence:.0f} %)"
        ratio = f"{comparison.ratio:.2f} \\[{low:.2f}, {high:.2f}]{width}"
    asked = "" if benchmark.within is None else f"{benchmark.within:g}"
    mark = "" if benchmark.within is None or comparison is None else MET[speed.met]
    size = "" if speed.size is None else view.number(speed.size)
    return size, escape(benchmark.system), escape(speed.baseline), ratio, asked, mark
