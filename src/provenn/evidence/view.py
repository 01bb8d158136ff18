"""How evidence is put into words; the terminal, the report and the board say it alike. Verdicts are `decide`'s and
`judge`'s.
"""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from math import isfinite, isinf
from pathlib import Path

from provenn import catalog
from provenn.catalog import Card, Claim, Experiment
from provenn.evidence import provenance, registration
from provenn.evidence.claim import AGREE, MEANING, ClaimVerdict, Judgement, Outcome, judge
from provenn.evidence.interval import Number
from provenn.evidence.measurement import Measurement, Series, Table
from provenn.evidence.record import EVIDENCE, Evidence, Finding, RecordedRun, why_unread
from provenn.evidence.scale import scale_of, what_seeds_could_show
from provenn.evidence.units import region_in, unit_of
from provenn.evidence.verdict import NO_VERDICT, Verdict, meets_figure

SYMBOLS = {
    Verdict.VERIFIED: "✔",
    Verdict.REPRODUCED: "★",
    Verdict.SUPPORTED: "▲",
    Verdict.INCONCLUSIVE: "~",
    Verdict.CONTRADICTED: "✘",
    Verdict.NOT_MEASURED: "–",
    Verdict.UNSUPPORTED: "⊘",
    Verdict.OUT_OF_MEMORY: "⊠",
}
CLAIM_SYMBOLS = {
    ClaimVerdict.VERIFIED: "✔",
    ClaimVerdict.REPRODUCED: "★",
    ClaimVerdict.SUPPORTED: "▲",
    ClaimVerdict.MIXED: "◐",
    ClaimVerdict.INCONCLUSIVE: "~",
    ClaimVerdict.CONTRADICTED: "✘",
    ClaimVerdict.NOT_MEASURED: "–",
}
MOST_SCALES = 2  # phrases beside a claim's verdict


class Role(StrEnum):
    """What an experiment is to a claim."""

    DECIDES = "decides"
    ALSO = "also"
    AGAINST = "evidence against, where it is so"


@dataclass(frozen=True)
class Judged:
    """A claim of an abstract, its verdict, and the findings that bear on it, those that decide it first."""

    claim: Claim
    judgement: Judgement
    findings: list[Finding]

    @property
    def symbol(self) -> str:
        """The sign of its verdict in tables."""
        return CLAIM_SYMBOLS[self.judgement.verdict]

    @property
    def deciding(self) -> list[Finding]:
        """Those that decide it."""
        return [finding for finding in self.findings if self.role(finding) is Role.DECIDES]

    @property
    def shown(self) -> list[Finding]:
        """What was measured, in the order in which a reader asks: those that decide it first, misses before hits."""
        measured = [finding for finding in self.findings if finding.verdict not in NO_VERDICT]
        return sorted(measured, key=lambda finding: (self.role(finding) is not Role.DECIDES, _hits(finding)))

    @property
    def scale(self) -> str:
        """At what scale the verdict was decided: the phrases of those that decide it."""
        phrases = list(dict.fromkeys(filter(None, (scale_of(f) for f in self.shown if self.role(f) is Role.DECIDES))))
        others = len(phrases) - MOST_SCALES
        more = [f"{others} other{'s' * (others > 1)}"] if others > 0 else []
        first = phrases[0].split(" · ") if phrases else []
        rest = []
        for parts in (phrase.split(" · ") for phrase in phrases[1:MOST_SCALES]):
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, parts)))
            rest.append(" · ".join(parts[shared:] or parts))  # what both begin with is said once
        return "; ".join(phrases[:1] + rest + more)

    def role(self, finding: Finding) -> Role:
        """What an experiment is to this claim."""
        name = finding.experiment.id
        return Role.DECIDES if name in self.claim.decides else Role.AGAINST if name in self.claim.against else Role.ALSO


def judged(card: Card, evidence: Evidence | None) -> list[Judged]:
    """The claims of a paper's abstract in its order, each with its verdict."""
    every = (evidence or Evidence(paper=card.slug)).findings(card.experiments)
    by_experiment = {finding.experiment.id: finding for finding in every}
    result = []
    for claim in card.claims:
        deciding = [by_experiment[name] for name in claim.decides]
        waiting = any(finding.record is None and finding.experiment.lacks is None for finding in deciding)
        outcomes = [_outcome(finding) for finding in sorted(deciding, key=_waits)]
        judgement = judge(claim.kind, "" if waiting else claim.needs, outcomes, figure=claim.figure)
        result.append(Judged(claim, judgement, [by_experiment[name] for name in claim.experiments]))
    return result


def _outcome(finding: Finding) -> Outcome:
    measurement, experiment = finding.measurement, finding.experiment
    missed, figure = "", experiment.published if measurement.at_paper_setting and experiment.kind != "exact" else None
    if figure is not None and measurement.effect is not None and not meets_figure(experiment, measurement):
        missed = f"{figure.value:g} {figure.unit} published, {shortly(finding)} here".replace("  ", " ")
    would_be = experiment.at_paper is not None or experiment.needs is not None
    at_paper = would_be if finding.verdict in NO_VERDICT else measurement.at_paper_setting
    return Outcome(experiment.kind, finding.verdict, at_paper, finding.reason, missed)


def _waits(finding: Finding) -> bool:
    """Those that only want a run come first: theirs is the reason that a reader can do something about."""
    return finding.experiment.lacks is not None


def _hits(finding: Finding) -> bool:
    return finding.verdict in AGREE


def reason(finding: Finding) -> str:
    """Why there is no verdict; of an inconclusive experiment, what its seeds could have shown."""
    return finding.reason or what_seeds_could_show(finding)


def legend() -> list[tuple[str, str, str]]:
    """Each verdict of a claim: its sign, its word and its meaning."""
    return [(CLAIM_SYMBOLS[verdict], str(verdict), meaning) for verdict, meaning in MEANING.items()]


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
        return "so" if measurement.effect else "not so"
    if measurement.kind_of_effect == "value":
        factor, unit = _unit(measurement)
        return number(_times(measurement.value, factor)) + unit + _spread(measurement, factor)
    factor, unit = _unit(measurement)
    plain, of_sides = unit_of(measurement.unit, "value")
    of_sides = f" {of_sides}" if of_sides else ""
    value, baseline = (number(_times(side, plain)) for side in (measurement.value, measurement.baseline))
    unit = "" if factor == 1 else unit  # that of the two sides stands behind them
    return (
        _signed(measurement, factor) + _spread(measurement, factor) + unit + f" ({value} against {baseline}{of_sides})"
    )


def shortly(finding: Finding) -> str:
    """What was measured in a few words: the effect and its interval; or the verdict's reason."""
    measurement = finding.measurement
    if measurement.effect is None:
        return finding.reason
    if measurement.kind_of_effect == "truth":
        return "so" if measurement.effect else "not so"
    factor, unit = _unit(measurement)
    digits = 3 if isinstance(measurement.effect, float) and not measurement.effect.is_integer() else 4
    return _signed(measurement, factor, digits) + _spread(measurement, factor) + unit


def _unit(measurement: Measurement) -> tuple[float, str]:
    """What an effect is multiplied by, and the unit after it; a ratio has none."""
    if measurement.kind_of_effect == "ratio":
        return 1.0, ""
    factor, name = unit_of(measurement.unit, measurement.kind_of_effect)
    return factor, f" × {name}" if name[:1].isdigit() else f" {name}" if name else ""  # of 2^20, say


def _times(value: Number | None, factor: float) -> Number | None:
    return value if value is None or factor == 1 else value * factor


def _signed(measurement: Measurement, factor: float, digits: int = 4) -> str:
    sign = {"ratio": "×", "difference": "+" if (measurement.effect or 0.0) >= 0 else ""}
    return sign.get(measurement.kind_of_effect, "") + number(_times(effect(measurement), factor), digits)


def _spread(measurement: Measurement, factor: float) -> str:
    low, high = measurement.interval or (None, None)
    if low is None or low == high:
        return ""
    digits = 4 if _near_one(measurement) else 3
    return f" [{number(_times(low, factor), digits)}, {number(_times(high, factor), digits)}]"


def _near_one(measurement: Measurement) -> bool:
    """Whether it is a ratio of two sides so alike that it takes one digit more to tell them apart."""
    return measurement.kind_of_effect == "ratio" and 0.9 < (measurement.effect or 0.0) < 1.1


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
        factor, _ = _unit(finding.measurement)
        region = str(region_in(experiment.expects, factor)) + _points(finding.measurement)
    elif experiment.published is not None and finding.measurement.kind_of_effect != "truth":
        region = f"the figure within {experiment.tolerance:g}" if experiment.tolerance else "the figure itself"
    else:
        region = "that it is so" if experiment.needs is None else ""
    return f"{region}: {experiment.why}" if experiment.why else region


def _points(measurement: Measurement) -> str:
    """The unit of a region that is not in the metric's own."""
    factor, unit = _unit(measurement)
    return "" if factor == 1 else unit


def when(finding: Finding, *, code: bool = True) -> str:
    """Date of a measurement, seeds where the scale beside it names none, and which code, unless said of all at once."""
    if finding.run is None:
        return ""
    seeds = f"{len(finding.measurement.seeds)} seeds" if finding.measurement.seeds else ""
    words = [
        "" if "seed" in scale_of(finding) else seeds,
        f"{finding.run.date:%Y-%m-%d}",
        provenance.in_words(finding) if code else "",
        registration.departs(finding),
    ]
    return ", ".join(filter(None, words))


def where(runs: Iterable[RecordedRun]) -> list[str]:
    """Where and when measurements were made: a line for each machine, with all its dates and commits."""
    alike: dict[tuple[str, ...], list[RecordedRun]] = {}
    for run in runs:
        e = run.environment
        machine = (f"budget {run.budget}", e.device, f"{e.threads} thread(s)", e.system)
        alike.setdefault((*machine, f"torch {e.torch}", f"Python {e.python}"), []).append(run)
    return [
        f"{_joined(f'{run.date:%Y-%m-%d}' for run in group)}, {', '.join(machine)}, {_joined(map(_version, group))}"
        for machine, group in alike.items()
    ]


def _version(run: RecordedRun) -> str:
    e = run.environment
    return f"provenn {e.provenn} at {e.commit}" if e.commit else f"provenn {e.provenn}"


def _joined(words: Iterable[str]) -> str:
    """Each once, "and" before the last.

    >>> _joined("aba"), _joined("abc"), _joined("a")
    ('a and b', 'a, b and c', 'a')
    """
    *first, last = dict.fromkeys(words)
    return f"{', '.join(first)} and {last}" if first else last


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
    counts = Counter(each.judgement.verdict for each in claims)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in ClaimVerdict if counts[verdict])


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
