"""The papers as the pages show them: cards and committed evidence, read once when the catalogue starts."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import zip_longest
from typing import Any

from provenn import catalog
from provenn.evidence import view
from provenn.evidence.claim import ClaimVerdict
from provenn.evidence.record import Evidence, Finding
from provenn.evidence.verdict import Verdict
from provenn.inference import sizes
from provenn.inference.sizes import Sizes
from provenn.web import usage
from provenn.web.offers import offers_of

LOG = logging.getLogger("provenn.web")
AGREEING = (ClaimVerdict.VERIFIED, ClaimVerdict.REPRODUCED, ClaimVerdict.SUPPORTED)


@dataclass(frozen=True)
class Entry:
    """A paper, the claims of its abstract with their verdicts, and every experiment that is evidence for them."""

    card: catalog.Card
    evidence: Evidence
    claims: list[view.Judged]
    findings: list[Finding]
    trouble: str = ""  # with its evidence

    @classmethod
    def of(cls, card: catalog.Card) -> "Entry":
        """With the evidence that came with the paper's package."""
        troubles: list[str] = []
        evidence = view.committed(card, troubles.append) or Evidence(paper=card.slug)
        for trouble in troubles:
            LOG.warning(trouble)  # to who runs the server: it names a path of this machine
        return cls(card, evidence, view.judged(card, evidence), evidence.findings(card.experiments), "".join(troubles))

    @property
    def slug(self) -> str:
        """As the command line and every address call it."""
        return self.card.slug

    @cached_property
    def counts(self) -> Counter[ClaimVerdict]:
        """How many claims came to what."""
        return Counter(each.judgement.verdict for each in self.claims)

    @property
    def share(self) -> float:
        """The share of the abstract's claims that hold, of all that it makes."""
        return sum(self.counts[verdict] for verdict in AGREEING) / max(1, len(self.claims))

    @property
    def headline(self) -> view.Judged | None:
        """The claim that a newspaper would quote."""
        return next((each for each in self.claims if each.claim.headline), None)

    @property
    def slots(self) -> list[str]:
        """Where its mechanisms fit."""
        return sorted({mechanism.slot for mechanism in self.card.mechanisms})

    @property
    def has_demo(self) -> bool:
        """Whether weights ship that predict something."""
        return bool(offers_of(self.card))

    @property
    def authors(self) -> str:
        """The first authors' names, and how many more; or how many there are."""
        names = self.card.authors
        if isinstance(names, int):
            return f"{names} authors"
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 4 else ", ".join(["", *names[3:]]))

    @cached_property
    def taken(self) -> catalog.Preset | None:
        """The preset that one takes first: whose weights ship, else the card's first."""
        names = [*self.card.shipped, *(preset.name for preset in self.card.presets)]
        return self.card.preset(names[0]) if names else None

    @cached_property
    def usage(self) -> str:
        """Lines of Python that take the first preset into use; "" where there is none."""
        return usage.of_preset(self.card, self.taken) if self.taken else ""

    @cached_property
    def layers(self) -> list[tuple[catalog.Mechanism, str, str]]:
        """Each mechanism with lines of Python that take it into use, and its layer's signature where it is kept."""
        signatures = self.sizes.layers
        return [(m, usage.of_mechanism(self.card, m), signatures.get(m.name, "")) for m in self.card.mechanisms]

    @cached_property
    def sizes(self) -> Sizes:
        """What its presets cost."""
        return sizes.read(self.card)

    @cached_property
    def shipped(self) -> dict[str, str]:
        """What the weights that ship learned and how well they do, by preset."""
        return {name: catalog.shipped_in_words(file) for name, file in self.card.shipped.items()}

    @property
    def summary(self) -> tuple[str, str]:
        """The first sentence of the summary, and the others."""
        first, _, rest = self.card.summary.strip().partition(". ")
        return first.removesuffix(".") + ".", rest

    @cached_property
    def drawn(self) -> dict[tuple[str, int], bytes]:
        """The plots that were asked for so far, by experiment and number: drawing one takes a tenth of a second."""
        return {}

    @property
    def measured(self) -> datetime | None:
        """When it was measured last."""
        return max((run.date for run in self.evidence.runs), default=None)

    @property
    def found_by(self) -> dict[str, Any]:
        """What a static copy finds and orders it by."""
        card = self.card
        words = [card.slug, card.title, card.arxiv or "", card.summary, *card.tags, *(m.name for m in card.mechanisms)]
        return {
            "words": " ".join(words).lower().replace("-", "").replace("_", ""),
            "share": self.share,
            "task": card.tasks,
            "slot": self.slots,
            "tag": card.tags,
            "has": ["code"] * bool(card.code) + ["demo"] * self.has_demo,
            "verdict": [str(verdict) for verdict, count in self.counts.items() if count],
        }

    @cached_property
    def own(self) -> list[Finding]:
        """What building it brought to light."""
        return [finding for finding in self.findings if finding.experiment.origin == "ours"]

    @cached_property
    def body(self) -> list[Finding]:
        """What the paper says beyond its abstract."""
        stated = {name for claim in self.card.claims for name in claim.experiments}
        return [f for f in self.findings if f.experiment.origin == "paper" and f.experiment.id not in stated]


class Catalogue(Mapping[str, Entry]):
    """All papers by their slug, the newest first."""

    def __init__(self) -> None:
        entries = (Entry.of(card) for card in catalog.cards().values())
        self._entries = {e.slug: e for e in sorted(entries, key=lambda e: (-e.card.date.toordinal(), e.slug))}

    def __getitem__(self, slug: str) -> Entry:
        return self._entries[slug]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def named(self, name: str) -> Entry | None:
        """By slug or arXiv number, of several this package's own; None where there is no such paper."""
        return self._entries.get(catalog.slugs_of(name)[0])

    def of_the_same_number(self, entry: Entry) -> list[Entry]:
        """Papers of other packages that have this one's arXiv number."""
        slugs = catalog.slugs_of(entry.card.arxiv) if entry.card.arxiv else []
        return [self._entries[slug] for slug in slugs if slug in self._entries and slug != entry.slug]

    @property
    def tasks(self) -> list[str]:
        """Every kind of work, as the list filters by it."""
        return sorted({task for entry in self.values() for task in entry.card.tasks})

    @property
    def slots(self) -> list[str]:
        """Every slot that some mechanism fits."""
        return sorted({slot for entry in self.values() for slot in entry.slots})

    @property
    def tags(self) -> list[str]:
        """Every tag, the most frequent first."""
        counts = Counter(tag for entry in self.values() for tag in entry.card.tags)
        return sorted(counts, key=lambda tag: (-counts[tag], tag))

    def related(self, entry: Entry) -> dict[str, list[tuple[catalog.Mechanism, Entry]]]:
        """Mechanisms of other papers that fit where this one's do, by slot, the papers in turns."""
        by_slot = {}
        for slot in entry.slots:
            others = [
                [(mechanism, other) for mechanism in other.card.mechanisms if mechanism.slot == slot]
                for other in self.values()
                if other.slug != entry.slug
            ]
            turns = [each for turn in zip_longest(*others) for each in turn if each is not None]
            if turns:
                by_slot[slot] = turns
        return by_slot

    def not_held(self) -> list[tuple[Entry, Finding]]:
        """Every experiment of a paper whose interval lies wholly elsewhere, or that is false."""
        return [(e, f) for e in self.values() for f in e.findings if f.verdict is Verdict.CONTRADICTED]
