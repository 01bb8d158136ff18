"""All ways to generate in one run, in turns: tokens a second, and whether they write the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.papers.m2r2.decoding import Statistics, decode
from provenn.papers.m2r2.model import ExitModel

WAYS = {
    "full": "all layers",
    "exit": "early exit",
    "speculative": "self-speculation",
    "two-model": "two-model speculation",
}
TAKES = {"exit": ("threshold", "confidence", "fill"), "speculative": ("gamma", "stop"), "two-model": ("gamma", "stop")}


@dataclass(frozen=True)
class Way:
    """What a way to generate came to beside all layers for every token.

    Args:
        tokens_per_second: the median over rounds.
        ratio: that over the same round's of all layers, the median over rounds.
        same: tokens before the first that differs from what all layers write, the sum over texts.
        statistics: of its last round.
    """

    tokens_per_second: float
    ratio: float
    same: int
    statistics: Statistics


def compare_ways(
    model: ExitModel,
    prompts: Sequence[Int[Tensor, "1 tokens"]],
    count: int,
    *,
    draft: nn.Module | None = None,
    rounds: int = 5,
    seed: int = 0,
    draw: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Way]:
    """Generate by each way in turns, so that what else the machine does meets all alike; every other round backwards.

    Args:
        model: what generates.
        prompts: each goes on by itself.
        count: tokens after each.
        draft: a second model; without one there is no speculation with two.
        rounds: how often each way is timed, after a round that is not.
        seed: of the draws.
        draw: temperature, top_k and top_p; by default the likeliest token is taken.
        options: gamma, stop, threshold, confidence and fill, as in `decode`, given to the ways that take them.

    Raises:
        ValueError: no round, or what `decode` refuses.
    """
    check_whole(rounds=rounds)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    modes = [mode for mode in WAYS if mode != "two-model" or draft is not None]
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    texts: dict[str, list[list[int]]] = {}
    counted: dict[str, Statistics] = {}
    for turn in range(-1, rounds):
        for mode in modes if turn % 2 else reversed(modes):
            given: dict[str, Any] = {name: options[name] for name in TAKES.get(mode, ()) if name in options}
            given |= {"draft": draft} if mode == "two-model" else {}
            texts[mode], counted[mode], spent = [], Statistics(), 0.0
            for prompt in prompts:
                generator = torch.Generator(prompt.device).manual_seed(seed)
                drawn = {**(draw or {}), "generator": generator, "statistics": counted[mode]}
                texts[mode].append([int(t) for t in decode(model, prompt, count, mode=mode, **given, **drawn)])
                spent += counted[mode].seconds
            if turn >= 0:
                seconds[mode].append(spent)
    return {
        mode: Way(
            median(counted[mode].tokens / spent for spent in seconds[mode]),
            median(full / spent for full, spent in zip(seconds["full"], seconds[mode])),
            sum(_alike(text, plain) for text, plain in zip(texts[mode], texts["full"])),
            counted[mode],
        )
        for mode in modes
    }


def _alike(text: list[int], plain: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(text, plain)) if a != b), len(plain))
