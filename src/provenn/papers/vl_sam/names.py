"""The objects that an answer names, and where in the answer their words stand."""

import re
from collections.abc import Iterator
from typing import NamedTuple

# What an answer may speak of that is no object, and words that only lead to one.
ABSTRACT = frozenset(
    [
        "scene",
        "image",
        "picture",
        "photo",
        "photograph",
        "background",
        "foreground",
        "view",
        "day",
        "night",
        "time",
        "weather",
        "area",
        "part",
        "side",
        "top",
        "bottom",
        "left",
        "right",
        "middle",
        "centre",
        "center",
        "front",
        "back",
        "corner",
        "object",
        "objects",
        "thing",
        "things",
        "item",
        "items",
        "list",
        "number",
        "color",
        "colour",
        "sorry",
        "question",
        "answer",
        "none",
        "nothing",
        "anything",
        "something",
    ]
)
DETERMINERS = frozenset(
    [
        "a",
        "an",
        "the",
        "some",
        "several",
        "many",
        "few",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "one",
        "this",
        "that",
        "these",
        "those",
        "there",
        "is",
        "are",
        "its",
        "his",
        "her",
        "their",
    ]
)
RELATIONS = re.compile(
    r"\b(?:in the|on the|on a|in a|on|in|at|with|of|near|behind|beside|under|over|above|below|"
    r"left of|right of|next to|and|or)\b"
)
VERBS = frozenset(
    ["is", "are", "was", "were", "has", "have", "can", "that", "which", "who"]
)  # what follows tells of the object
REFUSALS = re.compile(r"\b(?:sorry|cannot|can't|unable|as an ai|no objects?|nothing)\b")
SPLITS = re.compile(r"[,;:.\n•*|]+|(?<!\w)-\s|\d+[.)]\s")
WORDS, LETTERS, MOST = 3, 40, 50  # of a name at most, and names of an answer
IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "buses": "bus", "knives": "knife",
             "leaves": "leaf", "mice": "mouse", "feet": "foot", "teeth": "tooth", "geese": "goose"}  # fmt: skip
SINGULAR_ENDS = ("ss", "us", "is", "as", "os")


class Named(NamedTuple):
    """A name and where it stands in the answer: characters from `start` up to `end`."""

    name: str
    start: int
    end: int


def singular(word: str) -> str:
    """A noun as one of its kind, by English's regular endings.

    >>> [singular(word) for word in ("cars", "buses", "bus", "boxes", "cherries", "people", "glass")]
    ['car', 'bus', 'bus', 'box', 'cherry', 'person', 'glass']
    """
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) < 4 or word.endswith(SINGULAR_ENDS) or not word.endswith("s"):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("ses", "xes", "zes", "ches", "shes")) else word[:-1]


def parse_names(answer: str, numerals: bool = False) -> list[Named]:
    """Names of objects in a free answer, each once, in their order; none of a refusal.

    Lists are split, words that lead to a noun are dropped, nouns become singular, and what is no object is left out.

    Args:
        answer: of a model.
        numerals: whether words of numbers are names, as where digits are the objects.

    >>> [named.name for named in parse_names("1. Two cars, 2. a traffic light; the scene and some people")]
    ['car', 'traffic light', 'person']
    >>> parse_names("I am sorry, I cannot see this image.")
    []
    """
    lower = answer.lower()
    if REFUSALS.search(lower):
        return []
    found: dict[str, Named] = {}
    for start, end in _pieces(lower):
        words = [(m.group(), start + m.start(), start + m.end()) for m in re.finditer(r"[\w'-]+", lower[start:end])]
        while words and _leads(words[0][0], numerals and len(words) == 1):
            words.pop(0)
        if numerals:  # a number before a noun counts it
            while len(words) > 1 and words[0][0] in DETERMINERS:
                words.pop(0)
        verb = next((k for k, (word, *_) in enumerate(words) if word in VERBS), len(words))
        words = words[:verb]
        if not words or len(words) > WORDS or words[-1][0] in ABSTRACT or words[-1][0].isdigit():
            continue
        name = " ".join([*(word for word, *_ in words[:-1]), singular(words[-1][0])])
        if len(name) <= LETTERS:
            found.setdefault(name, Named(name, words[0][1], words[-1][2]))
    return list(found.values())[:MOST]


def _leads(word: str, keep_number: bool) -> bool:
    numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return word in DETERMINERS and not (keep_number and word in numbers)


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Stretches between what splits a list and words of relation."""
    cuts = sorted((m.start(), m.end()) for pattern in (SPLITS, RELATIONS) for m in pattern.finditer(text))
    start = 0
    for left, right in [*cuts, (len(text), len(text))]:
        if start < left:
            yield start, left
        start = max(start, right)


def overlapping(pieces: list[tuple[int, int]], named: Named) -> list[int]:
    """Numbers of the tokens whose characters are of a name."""
    return [k for k, (start, end) in enumerate(pieces) if start < named.end and end > named.start]
