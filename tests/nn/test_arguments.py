"""What every mechanism is built with and given is looked at: no boolean, NaN or mask of another kind passes unseen."""

import inspect
import math

import pytest
import torch

from provenn import catalog
from provenn.catalog.slots import SLOTS

MECHANISMS = [(card, mechanism) for card in catalog.cards().values() for mechanism in card.mechanisms]
NAMES = [f"{card.slug}:{mechanism.name}" for card, mechanism in MECHANISMS]
WIDTH = 16
pytestmark = pytest.mark.usefixtures("untyped")


def numbers_of(factory) -> dict[str, bool]:
    """Arguments that are numbers, and whether they are whole."""
    hints = {name: str(p.annotation) for name, p in inspect.signature(factory).parameters.items()}
    hints = {name: hint.replace("<class '", "").replace("'>", "") for name, hint in hints.items()}
    return {
        name: "float" not in hint
        for name, hint in hints.items()
        if hint.replace(" ", "") in ("int", "float", "int|None", "float|None", "float|int", "float|int|None")
    }


@pytest.mark.parametrize(("card", "mechanism"), MECHANISMS, ids=NAMES)
def test_booleans_and_what_is_no_number_are_refused_by_name(card, mechanism):
    factory = card.resolve(mechanism.layer)
    fixed = {**mechanism.arguments}
    if mechanism.slot == "token-mixer":
        fixed["causal"] = (
            not any("causal" in reason for reason in mechanism.expected_failures) and mechanism.name != "linformer"
        )
    names = numbers_of(factory)
    first, parameter = next(iter(inspect.signature(factory).parameters.items()))
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        pytest.skip("takes what another does")
    for name, whole in {first: True, **names}.items():
        for bad in (True, math.nan, math.inf, "8", *([2.5] if whole else [])):
            arguments = {first: WIDTH, **fixed, name: bad}
            with pytest.raises(ValueError) as error:
                factory(**arguments)
            said = str(error.value)
            assert name in said and (str(bad) in said), f"{name}={bad!r}: {said}"


@pytest.mark.parametrize(
    ("card", "mechanism"),
    [pair for pair in MECHANISMS if pair[1].slot == "token-mixer"],
    ids=[name for name, pair in zip(NAMES, MECHANISMS) if pair[1].slot == "token-mixer"],
)
@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(3, 5),
        torch.ones(3, 5, dtype=torch.long),
        torch.ones(5, 3, dtype=torch.bool),
        torch.ones(1, 5, dtype=torch.bool),
        torch.ones(3, 1, 1, 5, dtype=torch.bool),
        [[True] * 5] * 3,
    ],
    ids=["float", "whole numbers", "turned", "of one example", "of four axes", "a list"],
)
def test_a_mask_of_another_kind_is_refused_by_name(card, mechanism, mask):
    causal = mechanism.name != "linformer" and not any("causal" in reason for reason in mechanism.expected_failures)
    layer = card.resolve(mechanism.layer)(WIDTH, causal=causal, **mechanism.arguments)
    with pytest.raises(ValueError, match=r"mask must be .*\(3, 5\)"):
        layer(torch.randn(3, 5, WIDTH), mask=mask)


@pytest.mark.parametrize(("card", "mechanism"), MECHANISMS, ids=NAMES)
def test_every_slot_of_the_catalogue_is_known(card, mechanism):
    assert mechanism.slot in SLOTS
