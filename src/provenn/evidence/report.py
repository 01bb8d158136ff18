"""One self-contained HTML file a run: a view of the records in a folder, which computes nothing.

Pictures are inlined and nothing is loaded, so that the file can be mailed. Plots are SVG whose colours are the page's
own variables, so that they follow it from light to dark.
"""

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provenn import catalog
from provenn.evidence import view
from provenn.evidence.measurement import Measurement, Series, Table
from provenn.evidence.record import Ledger, Record, write_atomically
from provenn.evidence.verdict import Verdict

FILE = "report.html"
MOST_ROWS = 60  # of a plot's numbers; longer ones are in the record
MOST_SIZES, MOST_TICKS = 20, 7  # on a logarithmic axis: of points that get ticks of their own, and of these ticks
INK = "#010101"  # stands for the page's text colour until the plot is drawn
COLOURS = tuple(f"#0101{10 + i}" for i in range(6))  # stand for --c0 to --c5
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MARKERS = "os^Dvx"
MEANINGS = {
    Verdict.REPRODUCED: "the published figure is met at the paper’s setting, or an exact claim holds",
    Verdict.DIRECTION_HOLDS: "at a smaller setting, the interval lies wholly where the claim says",
    Verdict.INCONCLUSIVE: "the interval straddles no effect",
    Verdict.NOT_REPRODUCED: "the interval lies wholly elsewhere, or an exact claim is false",
    Verdict.NOT_MEASURED: "says what it needs",
}


def write(folder: Path) -> Path:
    """Draw `folder/report.html` from the records in the folder."""
    page = folder / FILE
    write_atomically(page, html(view.ledgers(folder), folder))
    return page


def html(ledgers: Sequence[Ledger], folder: Path) -> str:
    """The page for these records; their pictures lie in `folder`."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["slug"] = lambda verdict: str(verdict).replace(" ", "-")
    environment.filters["cell"] = view.cell
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    papers = [_paper(ledger, folder) for ledger in ledgers if ledger.records]
    title = f"{papers[0]['title']}: claims, measured" if len(papers) == 1 else "Claims, measured"
    return template.render(title=title, papers=papers, symbols=view.SYMBOLS, meanings=MEANINGS)


def _paper(ledger: Ledger, folder: Path) -> dict[str, Any]:
    card = catalog.cards().get(ledger.paper)
    return {
        "slug": ledger.paper,
        "title": card.title if card else ledger.paper,
        "summary": card.summary if card else "",
        "arxiv": card.arxiv if card else None,
        "counts": view.tally(ledger.records),
        "repeat": view.repeat(ledger.records),
        "where": "; ".join(sorted({_where(record) for record in ledger.records})),
        "records": [_record(record, folder) for record in ledger.records],
    }


def _record(record: Record, folder: Path) -> dict[str, Any]:
    measurement = record.measurement
    drawn = bool(measurement.tables or measurement.series or measurement.pictures)
    return {
        **{key: getattr(record, key) for key in ("claim", "says", "origin", "verdict", "reason")},
        "symbol": view.SYMBOLS[record.verdict],
        "theirs": view.theirs(record),
        "ours": view.ours(measurement),
        "anchor": f"{record.paper}-{record.claim}",
        "detailed": drawn or (measurement.effect is not None and record.kind != "exact"),
        "note": measurement.note,
        "plots": _plots(record),
        "pictures": [{**p.model_dump(), "data": _inlined(folder / p.file)} for p in measurement.pictures],
        "tables": measurement.tables,
        "facts": [(term, text) for term, text in _facts(record, measurement) if text],
    }


def _where(record: Record) -> str:
    environment = record.environment
    return (
        f"{record.date:%Y-%m-%d}, budget {record.budget}, {environment.device}, {environment.threads} thread(s), "
        f"{environment.system}, provenn {environment.provenn}, torch {environment.torch}, Python {environment.python}"
    )


def _facts(record: Record, measurement: Measurement) -> list[tuple[str, str]]:
    def several(values: Sequence[float]) -> str:
        return ", ".join(view.number(value) for value in values)

    environment = record.environment
    return [
        (
            "What was asked",
            f"{record.kind} claim, effect {record.expects}" if record.expects else f"{record.kind} claim",
        ),
        ("Effect", f"{view.number(measurement.effect)} ({measurement.kind_of_effect})"),
        ("Interval", measurement.method),
        ("Seeds", ", ".join(str(seed) for seed in measurement.seeds)),
        ("Values", several(measurement.values)),
        ("Baseline’s values", several(measurement.baselines)),
        ("Data", measurement.data + (f" (checksum {measurement.fingerprint})" if measurement.fingerprint else "")),
        ("Setting", "; ".join(f"{key} = {_setting(value)}" for key, value in measurement.setting.items())),
        ("Budget", record.budget + (", the paper’s setting" if measurement.at_paper_setting else "")),
        ("Time and memory", f"{record.wall_seconds:.3g} s, peak {record.peak_memory_bytes / 2**20:.0f} MiB"),
        ("Machine", f"{environment.device}, {environment.threads} thread(s), {environment.system}"),
        ("Versions", f"provenn {environment.provenn}, torch {environment.torch}, Python {environment.python}"),
        ("Date", f"{record.date:%Y-%m-%d %H:%M} UTC"),
    ]


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _inlined(file: Path) -> str | None:
    try:
        return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    except OSError:
        return None


def _plots(record: Record) -> list[dict[str, Any]]:
    plots = []
    for name, lines in view.plots(record.measurement).items():
        title = name or lines[0].y_label or record.claim
        table = view.table_of(title, lines)
        shown: Table | None = table if len(table.rows) <= MOST_ROWS else None
        plots.append({"title": title, "svg": _svg(title, lines, f"{record.paper}-{record.claim}"), "table": shown})
    return plots


def _svg(title: str, lines: Sequence[Series], salt: str) -> Any:
    """The lines as an SVG element; words for those who cannot see it are its label."""
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
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # such names repeat from plot to plot
    svg = svg.replace(INK, "currentColor")
    for i, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{i})")
    label = escape(f"{title}: " + ", ".join(line.name for line in lines))
    return Markup(re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{label}">', svg))


def _literal(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
