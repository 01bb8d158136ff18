"""One self-contained HTML file a run: a view of the records in a folder, which computes nothing.

Pictures are inlined and nothing is loaded, so that the file can be mailed. Plots are SVG whose colours are the page's
own variables, so that they follow it from light to dark.
"""

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from provenn import catalog
from provenn.core.files import write_atomically
from provenn.evidence import provenance, registration, view
from provenn.evidence.measurement import Measurement, Series, Table
from provenn.evidence.record import Evidence, Finding
from provenn.evidence.verdict import Verdict

FILE = "report.html"
PNG = b"\x89PNG\r\n\x1a\n"
MOST_ROWS = 60  # of a plot's numbers; longer ones are in the record
MOST_SIZES, MOST_TICKS = 20, 7  # on a logarithmic axis: of points that get ticks of their own, and of these ticks
INK = "#010101"  # stands for the page's text colour until the plot is drawn
COLOURS = tuple(f"#0101{10 + i}" for i in range(6))  # stand for --c0 to --c5
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MARKERS = "os^Dvx"
MEANINGS = {
    Verdict.VERIFIED: "an identity or a count, and exactly so",
    Verdict.REPRODUCED: "the published figure is met at the paper’s own setting",
    Verdict.SUPPORTED: "at a smaller setting, the interval lies wholly where the experiment asks",
    Verdict.INCONCLUSIVE: "the interval crosses the edge of what is asked for",
    Verdict.CONTRADICTED: "the interval lies wholly elsewhere, or an exact experiment is false",
    Verdict.NOT_MEASURED: "says what it needs",
    Verdict.UNSUPPORTED: "the device or this build of torch lacks an operation",
    Verdict.OUT_OF_MEMORY: "the device has less memory than it takes",
}


def write(folder: Path) -> Path:
    """Draw `folder/report.html` from the records in the folder."""
    page = folder / FILE
    write_atomically(page, html(view.in_folder(folder), folder))
    return page


def html(every: Mapping[str, Evidence], folder: Path) -> str:
    """The page for the evidence of papers; their pictures lie in `folder/<slug>`."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["slug"] = lambda verdict: str(verdict).replace(" ", "-")
    environment.filters["cell"] = view.cell
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    papers = [
        _paper(catalog.cards()[slug], evidence, folder / slug) for slug, evidence in every.items() if evidence.records
    ]
    title = f"{papers[0]['title']}: the verdicts" if len(papers) == 1 else "The verdicts"
    return template.render(
        title=title,
        papers=papers,
        symbols=view.SYMBOLS,
        meanings=MEANINGS,
        legend=view.legend(),
    )


def _paper(card: catalog.Card, evidence: Evidence, folder: Path) -> dict[str, Any]:
    measured = [finding for finding in evidence.findings(card.experiments) if finding.record is not None]
    elsewhere = evidence.at_other_settings(card.experiments)
    claims = view.judged(card, evidence)
    return {
        "slug": card.slug,
        "title": card.title,
        "summary": card.summary,
        "arxiv": card.arxiv,
        "counts": view.tally_of_claims(claims),
        "experiment_counts": view.tally(measured),
        "repeat": view.repeat(card.slug, evidence),
        "where": "; ".join(view.where(evidence.runs)),
        "code": "; ".join(filter(None, (provenance.tally(measured), registration.tally(card, measured)))),
        "claims": [_claim(each) for each in claims],
        "count": len(measured),
        "elsewhere": len(elsewhere),
        "findings": [_finding(finding, folder) for finding in (*measured, *elsewhere)],
    }


def _claim(judged: view.Judged) -> dict[str, Any]:
    claim = judged.claim
    return {
        "says": claim.says,
        "headline": claim.headline,
        "figure": claim.figure,
        "word": judged.judgement.verdict,
        "verdict": str(judged.judgement),
        "symbol": judged.symbol,
        "scale": judged.scale,
        "wanted": claim.wanted,
        "measured": [
            {
                "experiment": f.experiment.id,
                "anchor": _anchor(f),
                "symbol": view.SYMBOLS[f.verdict],
                "words": view.shortly(f),
                "role": judged.role(f),
            }
            for f in judged.shown
        ],
    }


def _anchor(finding: Finding) -> str:
    setting = re.sub(r"[^A-Za-z0-9.]+", "-", json.dumps(finding.overrides)).rstrip("-") if finding.overrides else ""
    return f"{finding.paper}-{finding.experiment.id}{setting}"


def _finding(finding: Finding, folder: Path) -> dict[str, Any]:
    measurement, experiment = finding.measurement, finding.experiment
    drawn = bool(measurement.tables or measurement.series or measurement.pictures)
    return {
        "experiment": experiment.id,
        "says": experiment.says,
        "origin": experiment.origin,
        "verdict": finding.verdict,
        "reason": view.reason(finding),
        "symbol": view.SYMBOLS[finding.verdict],
        "published": view.published(experiment),
        "asked": view.asked(finding),
        "ours": view.ours(measurement),
        "when": "; ".join(filter(None, (view.scale_of(finding), view.when(finding), view.at_setting(finding)))),
        "anchor": _anchor(finding),
        "detailed": drawn or (measurement.effect is not None and experiment.kind != "exact"),
        "note": measurement.note,
        "plots": _plots(finding),
        "pictures": [{**p.model_dump(), "data": _inlined(folder, p.file)} for p in measurement.pictures],
        "tables": measurement.tables,
        "facts": [(term, text) for term, text in _facts(finding, measurement) if text],
    }


def _facts(finding: Finding, measurement: Measurement) -> list[tuple[str, str]]:
    def several(values: Sequence[float]) -> str:
        return ", ".join(view.number(value) for value in values)

    record, run = finding.record, finding.run
    if record is None or run is None:
        return []
    system, baseline = measurement.sides or ("", "the baseline")
    dummy_baseline = [f"{skill.variant}: {several(skill.dummy_baseline)}" for skill in measurement.skills[:1]]
    return [
        ("What was asked", f"{finding.experiment.kind} experiment, effect {record.expects}" if record.expects else ""),
        ("Effect", f"{view.number(measurement.effect)} ({measurement.kind_of_effect})"),
        ("Interval", measurement.method),
        ("Seeds", ", ".join(str(seed) for seed in measurement.seeds)),
        (f"Values of {system}" if system else "Values", several(measurement.values)),
        (f"Values of {baseline}", several(measurement.baselines)),
        ("The dummy baseline", "".join(dummy_baseline).partition(": ")[2]),
        (
            "Need not learn",
            "; ".join(f"{skill.variant}: {skill.may_guess}" for skill in measurement.skills if skill.may_guess),
        ),
        ("Data", measurement.data + (f" (checksum {measurement.fingerprint})" if measurement.fingerprint else "")),
        ("Changed by --set", view.at_setting(finding)),
        ("Setting", "; ".join(f"{key} = {_setting(value)}" for key, value in measurement.setting.items())),
        ("Budget", run.budget + (", the paper’s setting" if measurement.at_paper_setting else "")),
        ("Time and memory", f"{record.wall_seconds:.3g} s, peak {record.peak_memory_bytes / 2**20:.0f} MiB"),
        ("Registered", registration.in_words(finding)),
        ("Where and when", "".join(view.where([run]))),
    ]


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def picture(folder: Path, name: str) -> bytes | None:
    """A picture's bytes. Evidence may come from strangers: only a PNG inside its own folder is read."""
    try:
        file = (folder / name).resolve()
        content = file.read_bytes() if file.is_relative_to(folder.resolve()) else b""
    except (OSError, ValueError):  # the latter of a name with a zero in it
        return None
    return content if content.startswith(PNG) else None


def _inlined(folder: Path, name: str) -> str | None:
    content = picture(folder, name)
    return None if content is None else "data:image/png;base64," + base64.b64encode(content).decode()


def _plots(finding: Finding) -> list[dict[str, Any]]:
    plots = []
    for title, lines in view.titled_plots(finding):
        table = view.table_of(title, lines)
        shown: Table | None = table if len(table.rows) <= MOST_ROWS else None
        plots.append({"title": title, "svg": svg(title, lines, _anchor(finding)), "table": shown})
    return plots


def svg(title: str, lines: Sequence[Series], salt: str) -> Any:
    """The lines as an SVG element; words for those who cannot see it are its label.

    Its colours are `currentColor` and the variables `--c0` to `--c5` of what it stands in.

    Args:
        title: of the plot.
        lines: which share it.
        salt: what its identifiers are drawn from, which must differ from those of other plots on a page.
    """
    import matplotlib as mpl
    from markupsafe import Markup, escape
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    look: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt + title,
        "font.family": "sans-serif",
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "grid.color": INK,
        "grid.alpha": 0.15,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(look):
        figure = Figure(figsize=(5.0, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for i, line in enumerate(lines):
            colour = COLOURS[i % len(COLOURS)]
            marker = MARKERS[i % len(MARKERS)] if len(line.x) <= 40 else None
            style: Any = DASHES[i % len(DASHES)]
            axes.plot(
                line.x, line.y, color=colour, marker=marker, markersize=4, linestyle=style, label=_literal(line.name)
            )
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
        sizes = sorted({x for line in lines for x in line.x if x > 0})
        if "x" in lines[0].log and sizes:
            axes.set_xscale("log")
            if len(sizes) <= MOST_SIZES:  # the sizes that were measured say more than powers of ten
                axes.minorticks_off()
                shown = sizes[:: math.ceil(len(sizes) / MOST_TICKS)]
                axes.set_xticks(shown, [view.number(x) for x in shown])
        elif all(float(x).is_integer() for x in sizes):  # there is no epoch 0.98
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if "y" in lines[0].log and any(y > 0 for line in lines for y in line.y):
            axes.set_yscale("log")
        axes.set_xlabel(_literal(lines[0].x_label))
        axes.set_ylabel(_literal(lines[0].y_label))
        axes.grid(True)
        if len(lines) > 1:
            axes.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)  # such names repeat from plot to plot
    drawn = drawn.replace(INK, "currentColor")
    for i, colour in enumerate(COLOURS):
        drawn = drawn.replace(colour, f"var(--c{i})")
    label = escape(f"{title}: " + ", ".join(line.name for line in lines))
    return Markup(re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{label}">', drawn))


def _literal(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
