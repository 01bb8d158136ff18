"""Which papers there are, in this package and in others, and what they are called."""

import importlib
import importlib.util
import tomllib
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from pydantic import ValidationError

from provenn.catalog.citation import arxiv_number
from provenn.catalog.schema import OURS, Card, Mechanism
from provenn.core.errors import UserError
from provenn.core.names import in_a_line, meant

ENTRY_POINT_GROUP = "provenn.papers"


def read_card(folder: Path, package: str, slug: str | None = None) -> Card:
    """Read `paper.toml` in `folder`; what is wrong with it is one line: file, key, reason.

    Args:
        folder: the paper's.
        package: how it is imported.
        slug: what the paper is called; by default as its folder.
    """
    file = folder / "paper.toml"
    try:
        facts = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no text, no TOML, or a number of thousands of digits
        raise UserError(f"{file}: not valid TOML: {in_a_line(error).partition(': ')[2]}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        return Card(slug=folder.name if slug is None else slug, package=package, folder=folder, **facts)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(whole file)"
        raise UserError(f"{file}: {key}: {first['msg']}") from None
    except TypeError as error:  # a key of the file collides with slug, package or folder
        raise UserError(f"{file}: {error}") from None


class Shelf(dict[str, Card]):
    """Every paper's card by slug. `left_out` has the reason for each that cannot be used, by its entry point's name."""

    left_out: dict[str, str]


@cache
def cards() -> Shelf:
    """This package's papers, and those of others that say where they are by an entry point, whose name is the slug.

    What is wrong with one of the others costs that one alone: it is left out, with the reason.
    """
    ours = Path(__file__).parents[1] / "papers"
    shelf, left_out = Shelf(), dict[str, str]()
    for folder in sorted(file.parent for file in ours.glob("*/paper.toml")):
        shelf[folder.name] = read_card(folder, f"{OURS}.{folder.name}")
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: (e.name, e.value)):
        slug = _slug(entry.name)
        try:
            if slug in shelf:
                raise UserError(f"a paper of this name is there already, in {shelf[slug].folder}")
            shelf[slug] = read_card(_folder_of(entry.value), entry.value, slug)
        except UserError as error:
            left_out[entry.name if entry.name not in left_out else f"{entry.name} ({entry.value})"] = str(error)
    shelf.left_out = left_out
    return shelf


def _slug(name: str) -> str:
    return name.lower().replace("-", "_")


def _folder_of(package: str) -> Path:
    """Where a package lies, found without importing it; its parents are."""
    try:
        spec = importlib.util.find_spec(package)
    except (Exception, SystemExit) as error:
        raise UserError(f"the package {package} of its entry point cannot be found: {in_a_line(error)}") from None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"its entry point names no package: {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def card(slug: str) -> Card:
    """The card of one paper; an unknown slug is answered with the nearest one."""
    if not isinstance(slug, str):
        raise TypeError(f"a paper is named by a string, its slug or arXiv number, got {slug!r}")
    known, name = cards(), slug_of(slug)
    if name in known:
        return known[name]
    reason = next((why for entry, why in known.left_out.items() if _slug(entry) == name), None)
    if reason is not None:
        raise UserError(f"the paper {slug!r} cannot be used: {reason}")
    if arxiv_number(slug):
        raise UserError(f"no paper here has the arXiv number {arxiv_number(slug)}; `provenn list` names them all")
    raise UserError(f"no paper is called {slug!r}{meant(name, known)}; `provenn list` names them all")


def slug_of(name: str) -> str:
    """The slug of what is named by it or by an arXiv number, of any version, with or without `arXiv:` before it.

    Raises:
        UserError: papers of several packages have that number.

    >>> slug_of("eca-net"), slug_of("arXiv:1910.03151v4"), slug_of("nobody")
    ('eca_net', 'eca_net', 'nobody')
    """
    slugs = slugs_of(name)
    if len(slugs) > 1:
        raise UserError(f"several papers have the arXiv number {arxiv_number(name)}: name {' or '.join(slugs)}")
    return slugs[0]


def slugs_of(name: str) -> list[str]:
    """The slugs of all papers with that arXiv number, this package's own first; else the slug that is named.

    >>> slugs_of("1910.03151"), slugs_of("eca-net")
    (['eca_net'], ['eca_net'])
    """
    number = arxiv_number(name)
    having = [c.slug for c in cards().values() if number and c.arxiv and arxiv_number(c.arxiv) == number]
    return having or [_slug(name)]


def mechanisms_of(slot: str, taken: Iterable[str] = ()) -> dict[str, tuple[Card, Mechanism]]:
    """Every mechanism of a slot by the name that commands take, which is its own wherever it can be.

    A name among `taken`, or that two papers share, has its paper's slug before it: `slug:name`. Names of this package's
    own mechanisms and papers are never shared so: there the other package's alone has its slug before it.
    """
    fitting = [
        (card, mechanism) for card in cards().values() for mechanism in card.mechanisms if mechanism.slot == slot
    ]
    ours = Counter([*taken, *(mechanism.name for card, mechanism in fitting if card.built_in)])
    others = Counter(mechanism.name for card, mechanism in fitting if not card.built_in)
    ours_or_slug = ours.keys() | {card.slug for card, _ in fitting if card.built_in}

    def name(card: Card, mechanism: Mechanism) -> str:
        own = mechanism.name
        shared = ours[own] > 1 if card.built_in else own in ours_or_slug or others[own] > 1
        return f"{card.slug}:{own}" if shared else own

    return {name(card, mechanism): (card, mechanism) for card, mechanism in fitting}


def mechanism_names() -> dict[tuple[str, str], str]:
    """How commands name each mechanism, by its paper's slug and its own name."""
    slots = dict.fromkeys(mechanism.slot for card in cards().values() for mechanism in card.mechanisms)
    named = [(name, found) for slot in slots for name, found in mechanisms_of(slot).items()]
    return {(card.slug, mechanism.name): name for name, (card, mechanism) in named}


def first_mechanism(name: str, known: dict[str, tuple[Card, Mechanism]]) -> str:
    """The name in `known` of what is named in full, `slug:name` or `package:name`, or by its paper; else itself.

    A paper's slug stands for its first mechanism of the slot.

    Raises:
        UserError: mechanisms of several papers have that name.

    >>> gates = mechanisms_of("channel-gate")
    >>> first_mechanism("eca_net", gates), first_mechanism("eca_net:se-gc", gates)
    ('eca', 'se-gc')
    """
    if name in known:
        return name
    owner, colon, own = name.rpartition(":")
    if colon:
        named = [each for each, (card, m) in known.items() if m.name == own and owner in _owners(card)]
    else:
        named = [each for each, (card, _) in known.items() if card.slug == slug_of(name)][:1]
        named = named or [each for each, (_, m) in known.items() if m.name == name]
    if len(named) > 1:
        raise UserError(f"several papers have a mechanism called {name!r}: name {' or '.join(named)}")
    return named[0] if named else name


def _owners(card: Card) -> set[str]:
    return {card.slug, card.package, card.package.partition(".")[0]}
