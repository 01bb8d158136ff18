"""Every paper keeps the common checks: its mechanisms, presets and weights, its claims, experiments and record."""

import pytest

from provenn.catalog import cards
from provenn.testing import checks_of

FOUND = {name: check for card in cards().values() for name, check in checks_of(card).items()}
# Each mechanism, and of the presets the first of each kind of work.
SAMPLE = {
    f"{slug} {one.name}"
    for slug, card in cards().items()
    for one in (*card.mechanisms, *{card.work_of(preset): preset for preset in reversed(card.presets)}.values())
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.sample if name in SAMPLE else ()) for name in FOUND]
)
def test_every_paper_keeps_its_checks(name: str):
    FOUND[name]()
