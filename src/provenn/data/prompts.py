"""Prompts that a model answers in its own words, in the files that their authors publish, and how answers are judged.

LongBench: lcc.jsonl and repobench-p.jsonl, a line an example with `context`, `input`, `answers` and `dataset`.
RULER: a folder with validation.jsonl as its scripts write it, a line an example with `input`, `outputs` and, in later
versions, `answer_prefix`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

from provenn.data.text import parse_json, read_text
from provenn.errors import UserError

RULER = "validation.jsonl"
NEEDLE_TOKENS = 128  # that RULER lets a model write to name what it found
COMMENTS = ("`", "#", "//")  # a line with one of these is no line of code, as LongBench has it

Judge = Callable[[str, Sequence[str]], float]


class Prompt(NamedTuple):
    """What a model goes on from, and the answers that are right."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Prompts:
    """A set of prompts.

    Args:
        name: as it is known.
        prompts: in the file's order.
        tokens: how many are written at the most.
        judge: gives what was written a score from 0 to 1.
    """

    name: str
    prompts: list[Prompt]
    tokens: int
    judge: Judge


def edit_similarity(told: str, answers: Sequence[str]) -> float:
    """How like the first line of code is to the likest answer: twice the common letters, over the letters of both.

    >>> edit_similarity("# a comment\\nx = 1\\ny = 2", ["x = 2"])
    0.8
    """
    lines = told.lstrip("\n").split("\n")
    first = next((line for line in lines if not any(mark in line for mark in COMMENTS)), "")
    return max(SequenceMatcher(None, first, answer).ratio() for answer in answers)


def share_named(told: str, answers: Sequence[str]) -> float:
    """The share of the answers that what was written holds, in whatever case.

    >>> share_named("They are 12 and 7.", ["12", "9"])
    0.5
    """
    return sum(answer.lower() in told.lower() for answer in answers) / len(answers)


def _code(between: str) -> Callable[[dict[str, Any]], Prompt]:
    def read(entry: dict[str, Any]) -> Prompt:
        asked = between.format(**{key: entry[key] for key in ("context", "input")})
        return Prompt(f"Please complete the code given below. \n{asked}Next line of code:\n", _texts(entry["answers"]))

    return read


def _needle(entry: dict[str, Any]) -> Prompt:
    return Prompt(entry["input"] + entry.get("answer_prefix", ""), _texts(entry["outputs"]))


def _texts(answers: Any) -> tuple[str, ...]:
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("its answers are no list of texts")
    return tuple(answers)


class Form(NamedTuple):
    """What a set is called, how an entry becomes a prompt, how many tokens are written, and how they are judged."""

    name: str
    read: Callable[[dict[str, Any]], Prompt]
    tokens: int
    judge: Judge


FORMS = {
    "lcc.jsonl": Form("LCC (LongBench)", _code("{context}"), 64, edit_similarity),
    "repobench-p.jsonl": Form("RepoBench-P (LongBench)", _code("{context}{input}"), 64, edit_similarity),
    RULER: Form("RULER", _needle, NEEDLE_TOKENS, share_named),
}


def read_prompts(place: Path) -> Prompts | None:
    """The prompts of a file, or of a folder of RULER; None where it is none of the sets.

    Raises:
        UserError: one of the sets, with something in it that cannot be read.
    """
    file = place / RULER if place.is_dir() else place
    form = FORMS.get(file.name)
    if form is None or not file.is_file():
        return None
    prompts = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        entry = parse_json(line, where)
        try:
            prompt = form.read(entry)
            if not isinstance(prompt.text, str) or not prompt.text:
                raise ValueError("its prompt is no text")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{where}: no prompt of {form.name}: {reason}") from None
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{file} holds no prompts of {form.name}")
    return Prompts(form.name, prompts, form.tokens, form.judge)
