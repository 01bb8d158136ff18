"""Lengths of packed documents: three published histograms, the long variant, and the user's own file."""

import json
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from provenn.core.errors import UserError
from provenn.core.inputs import read_text

LONG = (8 * 1024, 30 * 1024)  # documents of the long variant
SHORT_SHARE = 0.4  # of its tokens are in documents of the histogram
_TABLES: dict[str, dict[str, list[float]]] = json.loads(Path(__file__).with_name("histograms.json").read_text())
HISTOGRAMS = tuple(_TABLES)


class Histogram(NamedTuple):
    """Documents have from edges[n] up to, not including, edges[n + 1] tokens with probability weights[n]."""

    edges: Tensor
    weights: Tensor

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """So many lengths, of at least 1."""
        bins = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return _between(self.edges[bins].clamp(min=1), self.edges[bins + 1], generator)


@cache
def get_histogram(name: str) -> Histogram:
    """One of `HISTOGRAMS`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in _TABLES:
        near = get_close_matches(name, HISTOGRAMS, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no histogram of lengths is called {name!r}{meant}; there are {', '.join(HISTOGRAMS)}")
    weights = torch.tensor(_TABLES[name]["weights"], dtype=torch.float64)
    return Histogram(torch.tensor(_TABLES[name]["edges"], dtype=torch.int64), weights / weights.sum())


def histogram_for(length: int) -> str:
    """The one that the authors take for a sequence of that length."""
    if length <= 12 * 1024:
        return "pile"
    return "prolong64k" if length <= 64 * 1024 else "prolong512k"


def draw(
    length: int,
    histogram: str | None = None,
    *,
    generator: torch.Generator,
    longest: int | None = None,
) -> list[int]:
    """Document lengths that sum to `length`: drawn from a histogram, the last one cut.

    Args:
        length: tokens in total.
        histogram: one of `HISTOGRAMS`; by default `histogram_for(length)`.
        generator: draws them.
        longest: longer ones are cut to this many tokens.
    """
    table = get_histogram(histogram or histogram_for(length))
    return _fill(length, lambda: table.draw(256, generator), longest)


def draw_long(
    length: int,
    histogram: str | None = None,
    *,
    generator: torch.Generator,
    longest: int | None = None,
) -> list[int]:
    """The long variant: 40 % of the tokens as `draw` has them, 60 % in documents of 8K to 30K, shuffled."""
    short = int(length * SHORT_SHARE)
    few = draw(short, histogram or histogram_for(length), generator=generator, longest=longest)
    ends = torch.tensor(LONG).expand(16, 2)
    many = _fill(length - short, lambda: _between(ends[:, 0], ends[:, 1] + 1, generator), longest)
    both = few + many
    return [both[index] for index in torch.randperm(len(both), generator=generator).tolist()]


def draw_blocks(length: int, block: int, *, most: int = 8, generator: torch.Generator) -> list[int]:
    """Documents of one to `most` whole blocks, the last one cut."""
    least, end = torch.ones(16, dtype=torch.int64), torch.full((16,), most + 1)
    return _fill(length, lambda: [block * each for each in _between(least, end, generator)], None)


def read_lengths(file: Path) -> list[int]:
    """Lengths from a file: whole numbers apart by white space or commas, or a JSON list.

    Raises:
        UserError: it is not there, or holds something else.
    """
    text = read_text(file)
    lengths = []
    for number, line in enumerate(text.splitlines(), 1):
        for word in line.strip("[] \t,").replace(",", " ").split():
            if not word.isdecimal() or int(word) < 1:
                raise UserError(f"{file}, line {number}: a document's length is a whole number from 1 on, got {word!r}")
            lengths.append(int(word))
    if not lengths:
        raise UserError(f"{file} holds no document lengths")
    return lengths


def take(lengths: list[int], length: int) -> list[int]:
    """The first documents, as many as `length` tokens need; the last one is cut.

    >>> take([3, 5, 9], 10)
    [3, 5, 2]

    Raises:
        UserError: all of them together have fewer tokens.
    """
    if sum(lengths) < length:
        raise UserError(f"the documents given sum to {sum(lengths)} tokens, fewer than a length of {length} needs")
    return _fill(length, lambda: lengths, None)


def _fill(length: int, more: Callable[[], list[int]], longest: int | None) -> list[int]:
    if longest is not None and longest < 1:
        raise UserError(f"the longest document has at least 1 token, got {longest}")
    lengths: list[int] = []
    left = length
    while left > 0:
        for each in more():
            lengths.append(min(each, left, longest or left))
            left -= lengths[-1]
            if left == 0:
                break
    return lengths


def _between(least: Tensor, end: Tensor, generator: torch.Generator) -> list[int]:
    """Whole numbers, uniform from each `least` up to, not including, its `end`."""
    share = torch.rand(len(least), generator=generator, dtype=torch.float64)
    return (least + (share * (end - least)).long()).tolist()
