"""How evidence is put into words; the terminal, the report and the board say it alike. Verdicts are `decide`'s and
`judge`'s.
"""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, isinf
from pathlib import Path

from provenn import catalog
from provenn.catalog import Card, Claim, Experiment
from provenn.evidence import provenance
from provenn.evidence.claim import Judgement, Outcome, Standing, judge
from provenn.evidence.interval import Number
from provenn.evidence.measurement import Measurement, Series, Table
from provenn.evidence.record import EVIDENCE, Evidence, Finding, RecordedRun, why_unread
from provenn.evidence.verdict import Verdict

SYMBOLS = {
    Verdict.HOLDS: "=",
    Verdict.REPRODUCED: "✔",
    Verdict.DIRECTION_HOLDS: "▲",
    Verdict.INCONCLUSIVE: "~",
    Verdict.NOT_REPRODUCED: "✘",
    Verdict.NOT_MEASURED: "–",
    Verdict.UNSUPPORTED: "⊘",
    Verdict.OUT_OF_MEMORY: "⊠",
}
STANDINGS = {
    Standing.REPRODUCED: "✔",
    Standing.HOLDS_HERE: "▲",
    Standing.PARTLY: "◐",
    Standing.OPEN: "~",
    Standing.NOT_HERE: "✘",
    Standing.NOT_MEASURED: "–",
}


@dataclass(frozen=True)
class Judged:
    """A claim of an abstract, what it comes to, and the findings that are evidence for it."""

    claim: Claim
    judgement: Judgement
    findings: list[Finding]

    @property
    def symbol(self) -> str:
        """The sign of its standing in tables."""
        return STANDINGS[self.judgement.standing]


def judged(card: Card, evidence: Evidence | None) -> list[Judged]:
    """The claims of a paper's abstract in its order, each with its verdict."""
    every = (evidence or Evidence(paper=card.slug)).findings(card.experiments)
    by_experiment = {finding.experiment.id: finding for finding in every}
    result = []
    for claim in card.claims:
        bearing = [by_experiment[name] for name in claim.experiments]
        waiting = any(finding.record is None and finding.experiment.lacks is None for finding in bearing)
        outcomes = [
            Outcome(f.experiment.kind, f.verdict, f.measurement.at_paper_setting, f.reason)
            for f in sorted(bearing, key=_waits)
        ]
        result.append(Judged(claim, judge(claim.kind, "" if waiting else claim.needs, outcomes), bearing))
    return result


def _waits(finding: Finding) -> bool:
    """Those that only want a run come first: theirs is the reason that a reader can do something about."""
    return finding.experiment.lacks is not None


def committed(card: Card, log: Callable[[str], None]) -> Evidence | None:
    """The evidence that came with the paper's package; None where there is none that can be read.

    Args:
        card: the paper.
        log: is given a line where there is a file and it is damaged.
    """
    file = card.folder / EVIDENCE
    try:
        return Evidence.read(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log(
            f"{file} is damaged, and its records of {card.slug} are left out: {why_unread(error)}; "
            "install its package again to restore it"
        )
        return None


def number(value: Number | None, digits: int = 4) -> str:
    """A figure as people write it.

    >>> number(25557112.0), number(0.123456), number(-2.0), number(1.5e-9), number(None)
    ('25,557,112', '0.1235', '-2', '1.5e-09', '–')
    """
    if value is None:
        return "–"
    if not isfinite(value):
        return ("-" if value < 0 else "") + "∞" if isinf(value) else "not a number"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def effect(measurement: Measurement) -> float:
    """The effect without the rounding of a difference that is none.

    >>> effect(Measurement(effect=2e-16, interval=(-0.01, 0.01)))
    0.0
    """
    value, (low, high) = measurement.effect or 0.0, measurement.interval or (0.0, 0.0)
    return 0.0 if abs(value) < 1e-9 * (high - low) else value


def ours(measurement: Measurement) -> str:
    """What was measured: the effect, its interval, and the two sides that it came from."""
    if measurement.effect is None:
        return ""
    if measurement.kind_of_effect == "truth":
        return "holds" if measurement.effect else "does not hold"
    unit = f" {measurement.unit}" if measurement.unit else ""
    unit = f" ×{unit}" if measurement.unit[:1].isdigit() else unit  # of 2^20, say
    low, high = measurement.interval or (None, None)
    spread = "" if low is None or low == high else f" [{number(low, 3)}, {number(high, 3)}]"
    if measurement.kind_of_effect == "value":
        return number(measurement.value) + unit + spread
    sides = f" ({number(measurement.value)} against {number(measurement.baseline)}{unit})"
    sign = "×" if measurement.kind_of_effect == "ratio" else "+" if measurement.effect >= 0 else ""
    return sign + number(effect(measurement)) + spread + sides


def shortly(finding: Finding) -> str:
    """What was measured in a few words: the effect and its interval; or the verdict's reason."""
    measurement = finding.measurement
    if measurement.effect is None:
        return finding.reason
    if measurement.kind_of_effect == "truth":
        return "holds" if measurement.effect else "does not hold"
    sign = {"ratio": "×", "difference": "+" if measurement.effect >= 0 else ""}.get(measurement.kind_of_effect, "")
    low, high = measurement.interval or (None, None)
    spread = "" if low is None or low == high else f" [{number(low, 3)}, {number(high, 3)}]"
    unit = f" {measurement.unit}" if measurement.unit and measurement.kind_of_effect != "ratio" else ""
    unit = f" ×{unit}" if measurement.unit[:1].isdigit() and unit else unit  # of 2^20, say
    digits = 3 if isinstance(measurement.effect, float) and not measurement.effect.is_integer() else 4
    return f"{sign}{number(effect(measurement), digits)}{spread}{unit}"


def published(experiment: Experiment) -> str:
    """The figure that the paper published; nothing else."""
    return str(experiment.published or "")


def at_setting(finding: Finding) -> str:
    """What was set otherwise than the experiment's own setting, in words; "" where nothing was."""
    overrides = (
        f"{name} = {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in finding.overrides.items()
    )
    return f"at {', '.join(overrides)}, which is not the experiment's own setting" if finding.overrides else ""


def asked(finding: Finding) -> str:
    """The region that the effect is held to, and why that one."""
    experiment = finding.experiment
    if experiment.expects is not None:
        region = str(experiment.expects)
    elif experiment.published is not None and finding.measurement.kind_of_effect != "truth":
        region = f"the figure within {experiment.tolerance:g}" if experiment.tolerance else "the figure itself"
    else:
        region = "that it is so" if experiment.needs is None else ""
    return f"{region}: {experiment.why}" if experiment.why else region


def when(finding: Finding, *, code: bool = True) -> str:
    """Seeds and date of a measurement, and which code it is of, unless that is said of all at once."""
    if finding.run is None:
        return ""
    seeds = finding.measurement.seeds
    words = [f"{len(seeds)} seeds"] * bool(seeds) + [
        f"{finding.run.date:%Y-%m-%d}",
        provenance.in_words(finding) if code else "",
    ]
    return ", ".join(filter(None, words))


def where(runs: Iterable[RecordedRun]) -> list[str]:
    """Where and when measurements were made, a line each."""
    return [
        f"{s.date:%Y-%m-%d}, budget {s.budget}, {s.environment.device}, {s.environment.threads} thread(s), "
        f"{s.environment.system}, provenn {s.environment.provenn}"
        + (f" at {s.environment.commit}" if s.environment.commit else "")
        + f", torch {s.environment.torch}, Python {s.environment.python}"
        for s in runs
    ]


def strip(claims: Iterable[Judged]) -> str:
    """A sign a claim, the headline's in brackets."""
    return "".join(f"[{each.symbol}]" if each.claim.headline else f" {each.symbol} " for each in claims)


def tally(findings: Iterable[Finding]) -> str:
    """How many experiments got which verdict.

    >>> tally([])
    ''
    """
    counts = Counter(finding.verdict for finding in findings)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])


def tally_of_claims(claims: Iterable[Judged]) -> str:
    """How many claims got which verdict."""
    counts = Counter(each.judgement.standing for each in claims)
    return ", ".join(f"{counts[standing]} {standing}" for standing in Standing if counts[standing])


def plots(measurement: Measurement) -> dict[str, list[Series]]:
    """The lines by the picture that they share."""
    lines_by_plot: dict[str, list[Series]] = {}
    for series in measurement.series:
        lines_by_plot.setdefault(series.plot, []).append(series)
    return lines_by_plot


def titled_plots(finding: Finding) -> list[tuple[str, list[Series]]]:
    """The plots of a finding, each with its title and its lines."""
    plotted = plots(finding.measurement).items()
    return [(name or lines[0].y_label or finding.experiment.id, lines) for name, lines in plotted]


def table_of(caption: str, lines: Sequence[Series]) -> Table:
    """The numbers of a plot: one row for each point on its horizontal axis."""
    known = [dict(zip(line.x, line.y)) for line in lines]
    rows = [[number(x), *(values.get(x) for values in known)] for x in sorted({x for line in lines for x in line.x})]
    return Table(caption=caption, columns=[lines[0].x_label or "x", *(line.name for line in lines)], rows=rows)


def cell(value: str | float | int | None) -> str:
    """An entry of a table."""
    return value if isinstance(value, str) else number(value)


def repeat(paper: str, evidence: Evidence) -> str:
    """The command that measures this evidence again."""
    seeds = max((record.measurement.seeds for record in evidence.records), key=len, default=[])
    last = evidence.runs[-1]
    words = ["provenn", "reproduce", paper, "--budget", last.budget]
    words += ["--seeds", seeds_as_given(seeds)] if seeds else []
    if all(record.overrides for record in evidence.records):  # which one command repeats where they are alike
        for name, value in evidence.records[-1].overrides.items():
            words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join([*words, "--device", last.environment.device.partition(":")[0]])


def seeds_as_given(seeds: Sequence[int]) -> str:
    """Seeds as `--seeds` takes them: a count where they are the first ones, else a range or a list."""
    if list(seeds) == list(range(len(seeds))):
        return str(len(seeds))
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def in_folder(folder: Path, log: Callable[[str], None] = lambda message: None) -> dict[str, Evidence]:
    """The evidence of a run's folder by paper; a file that holds none is logged and left where it is."""
    readable = {}
    for file in sorted(folder.glob(f"*/{EVIDENCE}")):
        try:
            evidence = Evidence.read(file)
        except (OSError, ValueError, RecursionError):
            log(f"left out {file}: it holds no records that can be read")
            continue
        if evidence.paper in catalog.cards():
            readable[evidence.paper] = evidence
        else:
            log(f"left out {file}: no paper here is called {evidence.paper!r}")
    return readable


def bytes_of(size: int) -> str:
    """A size in the unit that fits.

    >>> bytes_of(640), bytes_of(4096), bytes_of(3 * 2**20)
    ('640 B', '4.0 KiB', '3.0 MiB')
    """
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
