"""The authors' table of five methods, and how an order is held against it."""

import pytest

from provenn.papers.long_context_bench.context_parallel.published import (
    METHODS,
    RANKS,
    RATES,
    order_agrees,
    published_rates,
    share_reached,
)


def test_the_table_is_whole_and_the_ring_is_the_slowest_on_every_causal_and_packed_mask():
    assert len(RATES) == 8 and all(len(rows) == len(METHODS) for rows in RATES.values())
    assert published_rates("causal", "forward", 64) == {
        "ulysses": 579, "ring": 445, "all_gather": 578, "usp": 584, "loongtrain": 587,
    }  # fmt: skip
    for mask, direction in RATES:
        for ranks in RANKS:
            rates = published_rates(mask, direction, ranks)
            assert min(rates, key=lambda name: rates[name]) == "ring", (mask, direction, ranks)


@pytest.mark.parametrize(("turn", "correlation"), [(1, 1.0), (-1, -1.0)])
def test_an_order_agrees_with_itself_and_not_with_its_reverse(turn, correlation):
    rates = published_rates("causal_document", "forward", 8)
    seconds = {name: turn / rate for name, rate in rates.items()}
    assert order_agrees(seconds, rates) == correlation
    slowest = min(rates.values()) / max(rates.values())
    assert share_reached(seconds, rates) == (1.0 if turn == 1 else slowest)
