"""The catalogue of papers: facts, the shelf that they stand on, and search. Reading it imports no torch."""

from provenn.catalog.claims import AtPaper, Claim, Experiment, installed
from provenn.catalog.figures import COUNTING_UNITS, Facts, Figure, Region
from provenn.catalog.query import search
from provenn.catalog.schema import OURS, WEIGHTS, Card, Example, Mechanism, Preset, Pruning
from provenn.catalog.shelf import (
    ENTRY_POINT_GROUP,
    Shelf,
    card,
    cards,
    first_mechanism,
    mechanism_names,
    mechanisms_of,
    read_card,
    slug_of,
    slugs_of,
)
from provenn.catalog.shipped import label_of_shipped, shipped_in_words

__all__ = [
    "COUNTING_UNITS",
    "ENTRY_POINT_GROUP",
    "OURS",
    "WEIGHTS",
    "AtPaper",
    "Card",
    "Claim",
    "Example",
    "Experiment",
    "Facts",
    "Figure",
    "Mechanism",
    "Preset",
    "Pruning",
    "Region",
    "Shelf",
    "card",
    "cards",
    "first_mechanism",
    "installed",
    "label_of_shipped",
    "mechanism_names",
    "mechanisms_of",
    "read_card",
    "search",
    "shipped_in_words",
    "slug_of",
    "slugs_of",
]
