"""Atom feeds (RFC 4287): the papers, and what was measured last."""

import uuid
from collections.abc import Iterable
from datetime import UTC, datetime, time
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from provenn.evidence import view
from provenn.evidence.record import Finding
from provenn.web.catalogue import Entry
from provenn.web.site import Site

TYPE = "application/atom+xml"
MOST = 60  # entries
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://pypi.org/project/provenn/")
NEVER = datetime(2026, 1, 1, tzinfo=UTC)


class News(NamedTuple):
    """An entry of a feed. `name` makes its identifier, which stays wherever the catalogue is served."""

    name: str
    title: str
    page: str
    updated: datetime
    published: datetime
    html: str
    authors: tuple[str, ...] = ()


def of_papers(site: Site) -> str:
    """Every paper, newest first."""
    return _feed(site, "papers", "Papers that run", [_paper(entry) for entry in site.catalogue.values()])


def of_verdicts(site: Site) -> str:
    """What was measured together is one entry, the newest first: each experiment with its verdict."""
    news = [each for entry in site.catalogue.values() for each in _runs(entry)]
    news.sort(key=lambda each: (each.updated, each.name), reverse=True)
    return _feed(site, "verdicts", "What was measured", news[:MOST])


def _paper(entry: Entry) -> News:
    published = datetime.combine(entry.card.date, time(), UTC)
    claims = (f"<li>{escape(each.claim.says)} <b>{escape(str(each.judgement))}</b></li>" for each in entry.claims)
    html = f"<p>{escape(entry.card.summary.strip())}</p><ol>{''.join(claims)}</ol>"
    names = entry.card.authors if isinstance(entry.card.authors, list) else []
    updated = max(published, entry.measured or published)
    return News(
        f"paper/{entry.slug}", entry.card.title, f"/papers/{entry.slug}", updated, published, html, tuple(names)
    )


def _runs(entry: Entry) -> Iterable[News]:
    together: dict[datetime, list[Finding]] = {}
    for finding in entry.findings:
        if finding.run is not None:
            together.setdefault(finding.run.date, []).append(finding)
    for when, findings in together.items():
        title = f"{entry.card.title}: {view.tally(findings)}"
        rows = (
            f"<li>{escape(f.experiment.says)} <b>{escape(str(f.verdict))}</b> {escape(view.shortly(f))}</li>"
            for f in findings
        )
        name = f"verdicts/{entry.slug}/{when.isoformat()}"
        yield News(name, title, f"/papers/{entry.slug}", when, when, f"<ul>{''.join(rows)}</ul>")


def _feed(site: Site, name: str, title: str, news: list[News]) -> str:
    url = site.settings.url
    updated = max((each.updated for each in news), default=NEVER)
    lines = [
        '<?xml version="1.0" encoding="utf-8"?>',
        '<feed xmlns="http://www.w3.org/2005/Atom" xml:lang="en">',
        f"<id>{_identifier(f'feed/{name}')}</id>",
        f"<title>provenn: {escape(title)}</title>",
        f"<updated>{_moment(updated)}</updated>",
        "<author><name>provenn</name></author>",
        f'<link rel="self" type="{TYPE}" href={quoteattr(f"{url}/feeds/{name}.atom")}/>',
        f'<link rel="alternate" type="text/html" href={quoteattr(site.address("/"))}/>',
    ]
    for each in news:
        lines += [
            "<entry>",
            f"<id>{_identifier(each.name)}</id>",
            f"<title>{escape(each.title)}</title>",
            f'<link rel="alternate" type="text/html" href={quoteattr(site.address(each.page))}/>',
            f"<updated>{_moment(each.updated)}</updated>",
            f"<published>{_moment(each.published)}</published>",
            *(f"<author><name>{escape(author)}</name></author>" for author in each.authors),
            f'<content type="html">{escape(each.html)}</content>',
            "</entry>",
        ]
    return "\n".join([*lines, "</feed>", ""])


def _identifier(name: str) -> str:
    return f"urn:uuid:{uuid.uuid5(NAMESPACE, name)}"


def _moment(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
