"""The boards: what was measured side by side, by slot and by task, as it is committed."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response

import provenn
from provenn.catalog import AtPaper, Experiment
from provenn.catalog.slots import SLOTS
from provenn.core.names import meant
from provenn.evidence import view
from provenn.evidence.record import Finding
from provenn.experiments.compare.latencies import LatencyBench
from provenn.experiments.compare.outcome import SlotComparison
from provenn.web.catalogue import Catalogue, Entry
from provenn.web.rendering import page
from provenn.web.site import site_of

RESULTS = Path(provenn.__file__).parent / "results"
router = APIRouter(default_response_class=Response)


@dataclass(frozen=True)
class Published:
    """A figure that a paper publishes on the field's own data, and what came of it here."""

    entry: Entry
    finding: Finding
    how: AtPaper

    @property
    def experiment(self) -> Experiment:
        """The experiment that holds the figure."""
        return self.finding.experiment

    @property
    def figure(self) -> float:
        """What the paper says."""
        assert self.experiment.published is not None
        return self.experiment.published.value

    @property
    def on(self) -> str:
        """The data and the metric: figures of the same are comparable."""
        measure = (self.how.metric, *(["difference"] if self.how.against is not None else []))
        return f"{' and '.join(self.how.sets)}: {', '.join(measure).replace('_', ' ')}"


@dataclass(frozen=True)
class TaskBoard:
    """A kind of work: its papers, what they publish of it on the field's data, and the weights that ship."""

    task: str
    papers: list[Entry]

    @cached_property
    def published(self) -> dict[str, list[Published]]:
        """Figures by data and metric, the highest first; those that two papers or presets share come first."""
        groups: dict[str, list[Published]] = {}
        for entry in self.papers:
            presets = {p.name for p in entry.card.presets if entry.card.work_of(p) == self.task}
            for finding in entry.findings:
                how = finding.experiment.at_paper
                if how is not None and how.preset in presets and finding.experiment.published is not None:
                    row = Published(entry, finding, how)
                    groups.setdefault(row.on, []).append(row)
        ordered = sorted(groups, key=lambda on: (-len({r.entry.slug for r in groups[on]}), -len(groups[on]), on))
        return {on: sorted(groups[on], key=lambda r: r.figure, reverse=True) for on in ordered}

    @cached_property
    def shipped(self) -> list[tuple[Entry, str, str]]:
        """Paper, preset, and what its weights were trained on and how well they do."""
        return [
            (entry, preset.name, entry.shipped[preset.name])
            for entry in self.papers
            for preset in entry.card.presets
            if preset.name in entry.shipped and entry.card.work_of(preset) == self.task
        ]


@cache
def comparisons() -> Mapping[str, SlotComparison]:
    """The committed comparisons by slot."""
    return {file.stem: SlotComparison.read(file) for file in sorted((RESULTS / "compare").glob("*.json"))}


@cache
def timings() -> Mapping[str, LatencyBench]:
    """The committed timings of networks by name."""
    return {file.stem: LatencyBench.read(file) for file in sorted((RESULTS / "bench").glob("*.json"))}


def tasks(catalogue: Catalogue) -> dict[str, TaskBoard]:
    """Every kind of work with its papers."""
    return {
        task: TaskBoard(task, [entry for entry in catalogue.values() if task in entry.card.tasks])
        for task in catalogue.tasks
    }


def names(catalogue: Catalogue) -> list[str]:
    """Every board, as an address names it."""
    return [*comparisons(), *timings(), *catalogue.tasks]


@router.get("/boards", include_in_schema=False)
def boards(request: Request) -> Response:
    """All boards, and the strip of every paper."""
    site = site_of(request)
    every = [claim for entry in site.catalogue.values() for claim in entry.claims]
    return page(
        request,
        "boards.html",
        comparisons=comparisons(),
        timings=timings(),
        tasks=tasks(site.catalogue),
        slots=SLOTS,
        every=every,
        tally=view.tally_of_claims(every),
        records=view.provenance.tally(finding for entry in site.catalogue.values() for finding in entry.findings),
    )


@router.get("/boards/{name}", include_in_schema=False)
def board(request: Request, name: str) -> Response:
    """One board."""
    catalogue = site_of(request).catalogue
    if name in comparisons():
        outcome = comparisons()[name]
        return page(request, "board_slot.html", board=outcome, slot=SLOTS.get(outcome.slot), catalogue=catalogue)
    if name in timings():
        return page(request, "board_networks.html", board=timings()[name], name=name, presets=_presets(catalogue))
    if name in catalogue.tasks:
        return page(request, "board_task.html", board=tasks(catalogue)[name])
    raise no_board(catalogue, name)


def no_board(catalogue: Catalogue, name: str) -> HTTPException:
    """The answer to a name that no board has."""
    every = names(catalogue)
    return HTTPException(404, f"There is no board called {name[:100]!r}{meant(name[:100], every)}")


def _presets(catalogue: Catalogue) -> dict[str, str]:
    """The paper of each preset."""
    return {preset.name: entry.slug for entry in catalogue.values() for preset in entry.card.presets}
