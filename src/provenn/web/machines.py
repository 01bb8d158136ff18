"""The catalogue for programs: JSON, the paths that huggingface_hub's client reads, and Atom feeds."""

from datetime import date, timedelta
from enum import StrEnum
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter

from provenn import catalog
from provenn.evidence.claim import ClaimVerdict
from provenn.web import answers, boards, feeds
from provenn.web.catalogue import Entry
from provenn.web.listing import Listing
from provenn.web.pages import found
from provenn.web.rendering import page
from provenn.web.site import Site, site_of, tagged

KEEP = "public, max-age=60"
MOST = 100  # papers in one answer
refused: dict[int | str, dict[str, Any]] = {422: {"model": answers.Refused, "description": "What cannot be read."}}
absent: dict[int | str, dict[str, Any]] = {404: {"model": answers.Refused, "description": "No such thing here."}}
router = APIRouter(responses=refused)
Words = Annotated[str, Query(max_length=200, description="Words, forgiving of one typo each.")]
Task = Annotated[str, Query(max_length=200, description="Only papers that do this kind of work.")]
Slot = Annotated[str, Query(max_length=200, description="Only papers with a mechanism that fits it.")]
Tag = Annotated[str, Query(max_length=200, description="Only papers that have it.")]


class Order(StrEnum):
    """How daily papers are ordered: by date, or by votes."""

    PUBLISHED = "publishedAt"
    TRENDING = "trending"


class Sort(StrEnum):
    """How papers are ordered, as on the list."""

    DATE = "date"
    VOTES = "votes"
    SHARE = "share"


class Has(StrEnum):
    """What a paper may bring."""

    CODE = "code"
    DEMO = "demo"


@router.get("/api", include_in_schema=False)
def described(request: Request) -> Response:
    """The endpoints, for people."""
    description = request.app.openapi()
    endpoints = [
        (path, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
        if method == "get"
    ]
    return page(request, "api.html", endpoints=endpoints, entries=list(site_of(request).catalogue))


@router.get("/api/papers", response_model=list[answers.Summary], tags=["papers"])
def papers(
    request: Request,
    q: Words = "",
    sort: Annotated[Sort | None, Query(description="Without one, what fits the words best, then the newest.")] = None,
    task: Task = "",
    slot: Slot = "",
    tag: Tag = "",
    has: Annotated[Has | None, Query(description="The authors' code, or weights that can be tried.")] = None,
    verdict: Annotated[ClaimVerdict | None, Query(description="Of some claim of the abstract.")] = None,
) -> Response:
    """All papers, searched, filtered and ordered as the list is."""
    site = site_of(request)
    state = {
        "q": q,
        "sort": sort or "",
        "task": task,
        "slot": slot,
        "tag": tag,
        "has": has or "",
        "verdict": verdict or "",
    }
    entries = Listing.of(state).choose(site.catalogue, site.counts().votes)
    return _json(request, list[answers.Summary], _summaries(site, entries))


@router.get("/api/papers/search", response_model=list[answers.Daily], tags=["huggingface_hub"])
def search(request: Request, q: Words = "", limit: Annotated[int, Query(ge=1, le=MOST)] = MOST) -> Response:
    """Papers that fit the words, the best first, as `HfApi.list_papers` reads them."""
    site = site_of(request)
    entries = [site.catalogue[card.slug] for card in catalog.search(q)[:limit]]
    return _json(request, list[answers.Daily], [answers.Daily.of(each) for each in _summaries(site, entries)])


@router.get("/api/papers/{name}", response_model=answers.Paper, tags=["papers", "huggingface_hub"], responses=absent)
def paper(request: Request, name: str) -> Response:
    """A paper by its arXiv number or slug, with claims, verdicts and experiments; `HfApi.paper_info` reads it too."""
    site, entry = site_of(request), found(request, name)
    facts = answers.summary_of(entry, site.address(f"/papers/{entry.slug}"), *site.counts())
    return _json(request, answers.Paper, answers.paper_of(entry, facts))


@router.get("/api/daily_papers", response_model=list[answers.Daily], tags=["huggingface_hub"])
def daily_papers(
    request: Request,
    date: Annotated[date | None, Query(description="Papers of that day.")] = None,
    week: Annotated[str | None, Query(pattern=r"^\d{4}-W\d{2}$", description="Of that ISO week.")] = None,
    month: Annotated[str | None, Query(pattern=r"^\d{4}-\d{2}$", description="Of that month.")] = None,
    submitter: Annotated[str | None, Query(max_length=200, description="Here nobody submits papers.")] = None,
    sort: Annotated[Order, Query(description="By date, or by votes.")] = Order.PUBLISHED,
    p: Annotated[int, Query(ge=0, le=10**6, description="The page, from 0.")] = 0,
    limit: Annotated[int, Query(ge=1, le=MOST, description="Papers on a page.")] = 50,
) -> Response:
    """Papers by the date of their first version, newest first, as `HfApi.list_daily_papers` reads them."""
    site = site_of(request)
    spans = [(date, date)] if date else []
    spans += [_week(week)] if week else []
    spans += [_month(month)] if month else []
    entries = [
        entry
        for entry in site.catalogue.values()
        if submitter is None and all(first <= entry.card.date <= last for first, last in spans)
    ]
    if sort is Order.TRENDING:
        votes = site.counts().votes
        entries.sort(key=lambda entry: -votes.get(entry.slug, 0))
    entries = entries[p * limit : (p + 1) * limit]
    return _json(request, list[answers.Daily], [answers.Daily.of(each) for each in _summaries(site, entries)])


@router.get("/api/not_held", response_model=list[answers.NotHeld], tags=["papers"])
def not_held(request: Request) -> Response:
    """Every experiment of a paper that is contradicted."""
    rows = site_of(request).catalogue.not_held()
    answer = [answers.NotHeld(paper=entry.slug, experiment=answers.Experiment.of(finding)) for entry, finding in rows]
    return _json(request, list[answers.NotHeld], answer)


@router.get("/api/boards", response_model=list[answers.BoardLink], tags=["boards"])
def all_boards(request: Request) -> Response:
    """Every board."""
    site = site_of(request)
    sizes = {name: ("slot", len(board.candidates)) for name, board in boards.comparisons().items()}
    sizes |= {name: ("networks", len(board.costs)) for name, board in boards.timings().items()}
    sizes |= {name: ("task", len(board.papers)) for name, board in boards.tasks(site.catalogue).items()}
    links = [
        answers.BoardLink(
            name=name,
            kind=kind,
            entries=count,
            page=site.address(f"/boards/{name}"),
            url=site.address(f"/api/boards/{name}"),
        )
        for name, (kind, count) in sizes.items()
    ]
    return _json(request, list[answers.BoardLink], links)


Board = answers.SlotBoard | answers.NetworkBoard | answers.Work


@router.get("/api/boards/{name}", response_model=Board, tags=["boards"], responses=absent)
def board(request: Request, name: str) -> Response:
    """A board: the candidates of a slot, timed networks, or the papers of a task."""
    catalogue = site_of(request).catalogue
    if name in boards.comparisons():
        answer: Board = answers.SlotBoard.of(name, boards.comparisons()[name])
    elif name in boards.timings():
        answer = answers.NetworkBoard.of(name, boards.timings()[name])
    elif name in catalogue.tasks:
        answer = answers.Work.of(boards.tasks(catalogue)[name])
    else:
        raise boards.no_board(catalogue, name)
    return _json(request, Board, answer)


FEED: dict[int | str, dict[str, Any]] = {200: {"content": {feeds.TYPE: {}}, "description": "An Atom feed."}}


@router.get("/feeds/papers.atom", response_class=Response, tags=["feeds"], responses=FEED)
def paper_feed(request: Request) -> Response:
    """The papers, newest first."""
    return tagged(request, Response(feeds.of_papers(site_of(request)), media_type=feeds.TYPE), KEEP)


@router.get("/feeds/verdicts.atom", response_class=Response, tags=["feeds"], responses=FEED)
def verdict_feed(request: Request) -> Response:
    """What was measured last, with its verdicts."""
    return tagged(request, Response(feeds.of_verdicts(site_of(request)), media_type=feeds.TYPE), KEEP)


def _summaries(site: Site, entries: list[Entry]) -> list[answers.Summary]:
    votes, comments = site.counts()
    pages = {entry.slug: site.address(f"/papers/{entry.slug}") for entry in entries}
    return [answers.Summary(**answers.summary_of(entry, pages[entry.slug], votes, comments)) for entry in entries]


def _json(request: Request, kind: Any, value: object) -> Response:
    """An answer in the form that the description promises."""
    return tagged(request, Response(TypeAdapter(kind).dump_json(value), media_type="application/json"), KEEP)


def _week(name: str) -> tuple[date, date]:
    try:
        monday = date.fromisocalendar(int(name[:4]), int(name[6:]), 1)
        return monday, monday + timedelta(days=6)
    except (ValueError, OverflowError):
        raise _unread("week", name, "such as 2025-W09") from None


def _month(name: str) -> tuple[date, date]:
    try:
        first = date(int(name[:4]), int(name[5:]), 1)
        return first, (first + timedelta(days=31)).replace(day=1) - timedelta(days=1)
    except (ValueError, OverflowError):
        raise _unread("month", name, "such as 2025-02") from None


def _unread(field: str, given: str, wanted: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("query", field), "msg": f"got {given!r}, expected one {wanted}"}])
