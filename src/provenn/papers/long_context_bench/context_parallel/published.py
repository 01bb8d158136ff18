"""What the authors timed of the five methods on H100s, and how a plan's order is held against it.

From the benchmark page of MagiAttention's documentation, by the same first authors on the same harness: its bar charts,
read off to about 5. Heads 64:8 of width 128, bfloat16, 8K tokens a GPU; TFLOP/s a GPU.
"""

from collections.abc import Mapping

METHODS = ("ulysses", "ring", "all_gather", "usp", "loongtrain")
RANKS = (8, 16, 32, 64)
# By mask and direction, each method over 8, 16, 32 and 64 GPUs.
RATES: Mapping[tuple[str, str], tuple[tuple[int, ...], ...]] = {
    ("full", "forward"): (
        (603, 572, 581, 617), (509, 534, 515, 511), (604, 592, 585, 581), (577, 601, 591, 602), (575, 599, 594, 601),
    ),
    ("full", "backward"): (
        (574, 575, 581, 575), (495, 518, 511, 503), (531, 541, 538, 534), (568, 586, 585, 578), (568, 576, 571, 574),
    ),
    ("causal", "forward"): (
        (600, 557, 579, 579), (420, 453, 451, 445), (599, 591, 590, 578), (591, 587, 593, 584), (589, 585, 579, 587),
    ),
    ("causal", "backward"): (
        (581, 560, 570, 584), (431, 474, 469, 456), (515, 524, 521, 521), (571, 569, 574, 570), (566, 548, 546, 559),
    ),
    ("full_document", "forward"): (
        (388, 305, 283, 258), (159, 134, 91, 56), (386, 385, 322, 248), (370, 369, 372, 290), (370, 370, 314, 291),
    ),
    ("full_document", "backward"): (
        (425, 398, 377, 345), (160, 160, 101, 48), (230, 190, 123, 63), (420, 406, 373, 279), (414, 362, 274, 249),
    ),
    ("causal_document", "forward"): (
        (277, 198, 185, 162), (89, 68, 48, 28), (287, 291, 240, 179), (260, 250, 254, 191), (258, 250, 208, 192),
    ),
    ("causal_document", "backward"): (
        (332, 295, 276, 249), (97, 86, 57, 29), (179, 155, 104, 55), (325, 309, 284, 195), (321, 253, 180, 171),
    ),
}  # fmt: skip


def published_rates(mask: str, direction: str, ranks: int) -> dict[str, int]:
    """TFLOP/s a GPU of each method in one cell of the table."""
    column = RANKS.index(ranks)
    return {name: rates[column] for name, rates in zip(METHODS, RATES[mask, direction], strict=True)}


def order_agrees(modelled: Mapping[str, float], published: Mapping[str, int]) -> float:
    """Spearman's rank correlation of modelled seconds and published rates: 1 where the quickest come in one order.

    >>> order_agrees({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 300, "b": 200, "c": 100})
    1.0
    """
    from scipy.stats import spearmanr

    names = list(published)
    correlation = spearmanr([-modelled[name] for name in names], [published[name] for name in names]).statistic
    return round(float(correlation), 12)


def share_reached(modelled: Mapping[str, float], published: Mapping[str, int]) -> float:
    """The published rate of the method that the model calls quickest, over that of the quickest.

    >>> share_reached({"a": 1.0, "b": 2.0}, {"a": 100, "b": 200})
    0.5
    """
    return published[min(modelled, key=lambda name: modelled[name])] / max(published.values())
