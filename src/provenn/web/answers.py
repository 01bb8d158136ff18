"""What the JSON of the catalogue says, as models: the OpenAPI description is made from them."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime, time

from pydantic import BaseModel, Field

from provenn.catalog import Region, mechanism_names
from provenn.evidence import provenance, registration, view
from provenn.evidence.claim import ClaimVerdict
from provenn.evidence.record import Finding
from provenn.evidence.verdict import Verdict, region_of
from provenn.experiments.compare.latencies import LatencyBench
from provenn.experiments.compare.outcome import SlotComparison
from provenn.web.boards import TaskBoard
from provenn.web.catalogue import Entry


class Refused(BaseModel):
    """Why there is no answer."""

    error: str


class Author(BaseModel):
    """One of a paper's authors."""

    name: str


class Published(BaseModel):
    """A figure as the paper publishes it."""

    value: float
    unit: str
    source: str


class Claim(BaseModel):
    """An assertion of the abstract, in our words, and what it comes to."""

    says: str
    kind: str
    headline: bool
    figure: str = Field(description="The paper's figure, in words.")
    verdict: ClaimVerdict
    agreed: int = Field(description="How many of the deciding experiments that were measured agree with it.")
    asked: int = Field(description="How many deciding experiments were measured.")
    figure_note: str = Field(description="How the paper's figure stands to the verdict: not tried, or not met.")
    scale: str = Field(description="At what scale the verdict was decided.")
    reason: str = Field(description="What a measurement needs, where there is none.")
    decides: list[str] = Field(description="The experiments that decide it, named before anything was measured.")
    also: list[str] = Field(description="All else that was measured and bears on it, for or against.")
    against: list[str] = Field(description="Those of also that are evidence against it where they are so.")
    wanted: str = Field(description="An experiment that would decide it better at small scale and is not built.")

    @classmethod
    def of(cls, judged: view.Judged) -> "Claim":
        """With its verdict."""
        claim, judgement = judged.claim, judged.judgement
        return cls(
            says=claim.says,
            kind=claim.kind,
            headline=claim.headline,
            figure=claim.figure,
            verdict=judgement.verdict,
            agreed=judgement.agreed,
            asked=judgement.asked,
            figure_note=judgement.figure,
            scale=judged.scale,
            reason=judgement.reason,
            decides=claim.decides,
            also=claim.also,
            against=claim.against,
            wanted=claim.wanted,
        )


class Experiment(BaseModel):
    """A measurable assertion, what was measured, and the verdict."""

    id: str
    kind: str
    origin: str = Field(description="paper, or ours: what building the paper brought to light.")
    says: str
    published: Published | None
    asked: Region | None = Field(description="The effects that support the experiment.")
    why: str = Field(description="The reason for that region.")
    verdict: Verdict
    scale: str = Field(description="Data, size of the models and seeds of what was measured.")
    reason: str = Field(description="Why there is no verdict, or what an inconclusive one could have shown.")
    effect: float | None = Field(description="What was measured; null where nothing was, or where it is infinite.")
    kind_of_effect: str | None = Field(description="value, difference, ratio or truth.")
    interval: tuple[float | None, float | None] | None = Field(description="Of the effect; null for infinity.")
    confidence: float | None
    value: float | None
    baseline: float | None
    sides: tuple[str, str] | None = Field(description="What value and baseline are of.")
    unit: str
    seeds: list[int]
    data: str
    at_paper_setting: bool
    measured: datetime | None
    registered: str = Field(description="Whether what decides it stood in a commit before it was measured.")
    code: str = Field(description="Whether the record is of the code that stands; empty without a record.")

    @classmethod
    def of(cls, finding: Finding) -> "Experiment":
        """With what was measured of it."""
        experiment, measurement = finding.experiment, finding.measurement
        figure = experiment.published
        known = measurement.effect is not None
        interval = measurement.interval
        return cls(
            id=experiment.id,
            kind=experiment.kind,
            origin=experiment.origin,
            says=experiment.says,
            published=None
            if figure is None
            else Published(value=figure.value, unit=figure.unit or figure.what, source=figure.source),
            asked=region_of(experiment, measurement),
            why=experiment.why,
            verdict=finding.verdict,
            scale=view.scale_of(finding),
            reason=view.reason(finding),
            effect=_finite(measurement.effect),
            kind_of_effect=measurement.kind_of_effect if known else None,
            interval=None if interval is None else (_finite(interval[0]), _finite(interval[1])),
            confidence=measurement.confidence if interval is not None else None,
            value=_finite(measurement.value),
            baseline=_finite(measurement.baseline),
            sides=measurement.sides,
            unit=measurement.unit,
            seeds=measurement.seeds,
            data=measurement.data,
            at_paper_setting=measurement.at_paper_setting,
            measured=None if finding.run is None else finding.run.date,
            registered=registration.in_words(finding),
            code=provenance.in_words(finding),
        )


class Mechanism(BaseModel):
    """A layer and the slot that it fits."""

    name: str
    slot: str
    summary: str


class Summary(BaseModel):
    """A paper in short. The names that huggingface_hub's client reads are that client's."""

    id: str = Field(description="The arXiv number; the slug of a paper that has none.")
    slug: str
    title: str
    summary: str
    publishedAt: datetime
    authors: list[Author]
    upvotes: int
    numComments: int
    githubRepo: str | None
    projectPage: str = Field(description="The paper's page in this catalogue.")
    tasks: list[str]
    slots: list[str]
    tags: list[str]
    demo: bool = Field(description="Whether weights ship that predict something.")
    headline: str = Field(description="The claim that a newspaper would quote; empty where there is none.")
    headline_verdict: ClaimVerdict | None
    verdicts: dict[ClaimVerdict, int] = Field(description="How many claims of the abstract came to what.")
    share: float = Field(description="The share of the abstract's claims that hold.")
    measured: datetime | None = Field(description="When it was measured last.")


class Paper(Summary):
    """A paper with every claim of its abstract and every experiment."""

    mechanisms: list[Mechanism]
    presets: list[str]
    claims: list[Claim]
    experiments: list[Experiment]


class Daily(BaseModel):
    """A paper as huggingface_hub's client reads a list of them."""

    paper: Summary
    title: str
    summary: str
    publishedAt: datetime
    numComments: int
    githubRepo: str | None
    projectPage: str
    slug: str

    @classmethod
    def of(cls, paper: Summary) -> "Daily":
        """The same facts in that form."""
        shared = cls.model_fields.keys() & Summary.model_fields.keys()
        return cls(paper=paper, **{name: getattr(paper, name) for name in shared})


class NotHeld(BaseModel):
    """An experiment that did not hold, and whose it is."""

    paper: str
    experiment: Experiment


class BoardLink(BaseModel):
    """A board, and where it is."""

    name: str
    kind: str = Field(description="slot, networks or task.")
    entries: int = Field(description="How many candidates, networks or papers are on it.")
    page: str
    url: str


class Candidate(BaseModel):
    """A mechanism in the host of its slot."""

    name: str
    paper: str = Field(description="The slug; empty for a baseline.")
    quality: list[float] = Field(description="Of each seed.")
    mean: float
    interval: tuple[float, float] | None = Field(description="Of the mean, 95 %.")
    difference: float = Field(description="To the first candidate, paired by seeds.")
    difference_interval: tuple[float, float] | None
    parameters: int
    flops: int
    latency: float = Field(description="As a multiple of the first candidate's.")
    latency_interval: tuple[float, float] | None
    best_for: list[str] = Field(description="The costs for which nobody is better for less.")


class SlotBoard(BaseModel):
    """Every candidate of a slot at equal budget."""

    kind: str = "slot"
    name: str
    host: str
    data: str
    metric: str
    higher_is_better: bool
    budget: str
    candidates: list[Candidate]

    @classmethod
    def of(cls, name: str, board: SlotComparison) -> "SlotBoard":
        """From a committed comparison."""
        fronts = {cost: board.front(cost) for cost in board.distinguishing}
        return cls(
            name=name,
            host=board.host,
            data=board.data,
            metric=board.metric,
            higher_is_better=board.higher_is_better,
            budget=board.setting["budget"],
            candidates=[
                Candidate(
                    name=one.name,
                    paper=one.paper,
                    quality=list(one.quality),
                    mean=one.mean,
                    interval=one.interval,
                    difference=one.difference,
                    difference_interval=one.difference_interval,
                    parameters=one.parameters,
                    flops=one.flops,
                    latency=one.latency,
                    latency_interval=one.latency_interval,
                    best_for=[cost for cost, front in fronts.items() if one in front],
                )
                for one in board.candidates
            ],
        )


class Timing(BaseModel):
    """One network in one form."""

    network: str
    form: str
    batch: int
    threads: int
    seconds: list[float] = Field(description="A call, round by round.")
    ratio: float | None = Field(description="To the reference in the same form.")
    interval: tuple[float, float] | None
    trouble: str


class Network(BaseModel):
    """What a network costs, whatever runs it."""

    name: str
    parameters: int
    macs: int = Field(description="Multiply-adds of one image.")


class NetworkBoard(BaseModel):
    """Networks for images, timed in turns."""

    kind: str = "networks"
    name: str
    reference: str
    size: int
    networks: list[Network]
    timings: list[Timing]

    @classmethod
    def of(cls, name: str, board: LatencyBench) -> "NetworkBoard":
        """From a committed timing."""
        return cls(
            name=name,
            reference=board.reference,
            size=board.size,
            networks=[Network(name=n, parameters=c.parameters, macs=c.macs) for n, c in board.costs.items()],
            timings=[Timing.model_validate(each, from_attributes=True) for each in board.latencies],
        )


class Figure(BaseModel):
    """A figure that a paper publishes on the field's data, and what came of it here."""

    paper: str
    preset: str
    experiment: Experiment


class Work(BaseModel):
    """A kind of work: its papers, and what they publish of it, by data and metric."""

    kind: str = "task"
    name: str
    papers: list[str]
    published: dict[str, list[Figure]]

    @classmethod
    def of(cls, board: TaskBoard) -> "Work":
        """From the cards and the evidence of its papers."""
        return cls(
            name=board.task,
            papers=[entry.slug for entry in board.papers],
            published={
                on: [Figure(paper=r.entry.slug, preset=r.how.preset, experiment=Experiment.of(r.finding)) for r in rows]
                for on, rows in board.published.items()
            },
        )


def summary_of(entry: Entry, page: str, votes: Mapping[str, int], comments: Mapping[str, int]) -> dict:
    """The facts of `Summary`.

    Args:
        entry: a paper.
        page: the address of its page.
        votes, comments: how many each paper has, by slug.
    """
    card, headline = entry.card, entry.headline
    return {
        "id": card.arxiv or card.slug,
        "slug": card.slug,
        "title": card.title,
        "summary": card.summary.strip(),
        "publishedAt": datetime.combine(card.date, time(), UTC),
        "authors": [] if isinstance(card.authors, int) else [Author(name=name) for name in card.authors],
        "upvotes": votes.get(card.slug, 0),
        "numComments": comments.get(card.slug, 0),
        "githubRepo": f"https://github.com/{card.code}" if card.code else None,
        "projectPage": page,
        "tasks": card.tasks,
        "slots": entry.slots,
        "tags": card.tags,
        "demo": entry.has_demo,
        "headline": headline.claim.says if headline else "",
        "headline_verdict": headline.judgement.verdict if headline else None,
        "verdicts": {verdict: entry.counts[verdict] for verdict in ClaimVerdict},
        "share": entry.share,
        "measured": entry.measured,
    }


def paper_of(entry: Entry, facts: dict) -> Paper:
    """A paper whole, from the facts of its summary."""
    called = mechanism_names()
    return Paper(
        **facts,
        mechanisms=[
            Mechanism(name=called[entry.slug, m.name], slot=m.slot, summary=m.summary) for m in entry.card.mechanisms
        ],
        presets=[preset.name for preset in entry.card.presets],
        claims=[Claim.of(judged) for judged in entry.claims],
        experiments=[Experiment.of(finding) for finding in entry.findings],
    )


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None
