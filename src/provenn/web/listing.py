"""Which papers the list shows and in which order: every state is a query string."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import groupby
from urllib.parse import urlencode

from provenn import catalog
from provenn.evidence.claim import ClaimVerdict
from provenn.web.catalogue import Catalogue, Entry

SORTS = {"": "best fit, then newest", "date": "newest", "votes": "most votes", "share": "most supported"}
HAS = {"code": "authors’ code", "demo": "can be tried"}


@dataclass(frozen=True)
class Listing:
    """A state of the list; "" is no filter.

    Args:
        q: words, as `provenn list` finds them.
        sort: date, votes, or the share of claims that are verified, reproduced or supported; "" is how well the
            words fit, or date without any.
        task, slot, tag: of the paper, of one of its mechanisms, of its tags.
        has: code of the authors, or a demo.
        verdict: of some claim of its abstract.
    """

    q: str = ""
    sort: str = ""
    task: str = ""
    slot: str = ""
    tag: str = ""
    has: str = ""
    verdict: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "Listing":
        """From a query string; names that it does not have are left alone, and values that are none are no filter."""
        state = cls(**{field.name: query[field.name].strip()[:200] for field in fields(cls) if field.name in query})
        state = state if state.sort in SORTS else replace(state, sort="")
        state = state if state.has in HAS else replace(state, has="")
        return state if state.verdict in set(ClaimVerdict) else replace(state, verdict="")

    @property
    def query(self) -> str:
        """The query string; "" for the list as it comes."""
        usual = Listing()
        words = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != getattr(usual, f.name)}
        return f"?{urlencode(words)}" if words else ""

    def but(self, **changes: str) -> str:
        """The query string of a state beside this one."""
        return replace(self, **changes).query

    @property
    def filtered(self) -> bool:
        """Whether papers are left out."""
        return replace(self, sort="") != Listing()

    @property
    def by_date(self) -> bool:
        """Whether the newest come first, month by month."""
        return self.sort == "date" or (not self.sort and not self.q)

    def choose(self, catalogue: Catalogue, votes: Mapping[str, int]) -> list[Entry]:
        """The papers of this state, in its order."""
        found = [catalogue[card.slug] for card in catalog.search(self.q, self.task or None, self.slot or None)]
        found = [entry for entry in found if self._keeps(entry)]
        if self.sort == "votes":
            return sorted(found, key=lambda e: (-votes.get(e.slug, 0), -e.card.date.toordinal(), e.slug))
        if self.sort == "share":
            return sorted(found, key=lambda e: (-e.share, -e.card.date.toordinal(), e.slug))
        return sorted(found, key=lambda e: (-e.card.date.toordinal(), e.slug)) if self.by_date else found

    def groups(self, entries: list[Entry]) -> list[tuple[str, list[Entry]]]:
        """By month where the list goes by date, else one group without a name."""
        if not self.by_date:
            return [("", entries)] if entries else []
        by_month = groupby(entries, key=lambda entry: f"{entry.card.date:%B %Y}")
        return [(month, list(papers)) for month, papers in by_month]

    def _keeps(self, entry: Entry) -> bool:
        return (
            (not self.tag or self.tag in entry.card.tags)
            and (self.has != "code" or entry.card.code is not None)
            and (self.has != "demo" or entry.has_demo)
            and (not self.verdict or entry.counts[ClaimVerdict(self.verdict)] > 0)
        )
