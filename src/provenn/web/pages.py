"""The catalogue's pages for readers: the list, a paper, what is contradicted."""

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from provenn.core.names import meant
from provenn.evidence import view
from provenn.evidence.claim import ClaimVerdict
from provenn.evidence.verdict import NO_VERDICT
from provenn.web import opinions
from provenn.web.catalogue import Catalogue, Entry
from provenn.web.listing import HAS, SORTS, Listing
from provenn.web.models import MOST
from provenn.web.rendering import page
from provenn.web.site import site_of, tagged
from provenn.web.visitors import visitor_of

router = APIRouter(default_response_class=Response)
MOST_TAGS = 24
MOST_RELATED = 5  # mechanisms of a slot


@router.get("/", include_in_schema=False)
def papers(request: Request) -> Response:
    """The list of papers, in the state that the query string names."""
    site = site_of(request)
    listing = Listing.of(request.query_params)
    person = visitor_of(request).person
    with site.database.reading() as session:
        counts = opinions.counts(session)
        voted = opinions.votes_by(session, person.id) if person else set()
    entries = listing.choose(site.catalogue, counts.votes)
    return page(
        request,
        "papers.html",
        listing=listing,
        entries=entries,
        groups=listing.groups(entries),
        sorts={name: words for name, words in SORTS.items() if not site.copied or name in ("date", "share")},
        lists=_lists(site.catalogue) if site.copied else {},
        has=HAS,
        verdicts=list(ClaimVerdict),
        tags=site.catalogue.tags[:MOST_TAGS],
        counts=counts,
        voted=voted,
    )


@router.get("/papers/{name}", include_in_schema=False)
def paper(request: Request, name: str, before: Annotated[int | None, Query(ge=1, le=MOST)] = None) -> Response:
    """A paper's page, with its newest comments or those before a number; of an arXiv number, the way to it."""
    entry = found(request, name)
    if entry.slug != name:
        return RedirectResponse(f"/papers/{entry.slug}", 301)
    person = visitor_of(request).person
    with site_of(request).database.reading() as session:
        counts = opinions.counts(session, entry.slug)
        voted = opinions.votes_by(session, person.id) if person else set()
        comments = opinions.comments_on(session, entry.slug, before)
    return page(
        request,
        "paper.html",
        entry=entry,
        same_number=site_of(request).catalogue.of_the_same_number(entry),
        related=site_of(request).catalogue.related(entry),
        most_related=MOST_RELATED,
        repeat=view.repeat(entry.slug, entry.evidence) if entry.evidence.records else "",
        where=view.where(entry.evidence.runs),
        counts=counts,
        voted=voted,
        comments=comments[: opinions.SHOWN],
        older=len(comments) > opinions.SHOWN,
    )


@router.get("/papers/{name}/evidence.json", include_in_schema=False)
def evidence(request: Request, name: str) -> Response:
    """The records that a paper's verdicts follow from, as they are committed."""
    entry = found(request, name)
    return tagged(request, JSONResponse(entry.evidence.model_dump(mode="json")), "public, max-age=300")


@router.get("/not-held", include_in_schema=False)
def not_held(request: Request) -> Response:
    """Every experiment of a paper that is contradicted."""
    catalogue = site_of(request).catalogue
    findings = catalogue.not_held()
    return page(
        request,
        "not_held.html",
        findings=findings,
        at_paper=sum(finding.measurement.at_paper_setting for _, finding in findings),
        measured=sum(f.verdict not in NO_VERDICT for entry in catalogue.values() for f in entry.findings),
    )


def _lists(catalogue: Catalogue) -> dict[str, list[tuple[str, str]]]:
    """The states of the list that have a file of their own in a static copy: words and query strings."""
    return {
        "Order": [("newest", ""), (SORTS["share"], Listing(sort="share").query)],
        "Task": [(task, Listing(task=task).query) for task in catalogue.tasks],
        "Slot": [(slot, Listing(slot=slot).query) for slot in catalogue.slots],
        "Tag": [(tag, Listing(tag=tag).query) for tag in catalogue.tags],
        "Verdict": [(str(verdict), Listing(verdict=verdict).query) for verdict in ClaimVerdict],
        "Has": [(words, Listing(has=name).query) for name, words in HAS.items()],
    }


def found(request: Request, name: str) -> Entry:
    """The paper of that slug or arXiv number, or 404 with what may have been meant."""
    catalogue = site_of(request).catalogue
    entry = catalogue.named(name)
    if entry is None:
        hint = meant(name[:100], catalogue)
        raise HTTPException(404, f"There is no paper called {name[:100]!r} here{hint}")
    return entry
