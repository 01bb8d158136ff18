"""Prompts that a model answers in its own words, in the files that their authors publish, and how answers are judged.

LongBench: lcc.jsonl and repobench-p.jsonl, a line an example with `context`, `input`, `answers` and `dataset`.
RULER: a folder with validation.jsonl as its scripts write it, a line an example with `input`, `outputs` and, in later
versions, `answer_prefix`.
QMSum: train.jsonl, val.jsonl and test.jsonl, a line a meeting with `meeting_transcripts` and two lists of queries.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

from provenn.core.errors import UserError
from provenn.core.inputs import check_file, parse_json, read_text

RULER = "validation.jsonl"
MEETING = "meeting_transcripts"
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


def edit_similarity(output: str, answers: Sequence[str]) -> float:
    """How like the first line of code is to the likest answer: twice the common letters, over the letters of both.

    >>> edit_similarity("# a comment\\nx = 1\\ny = 2", ["x = 2"])
    0.8
    """
    lines = output.lstrip("\n").split("\n")
    first = next((line for line in lines if not any(mark in line for mark in COMMENTS)), "")
    return max(SequenceMatcher(None, first, answer).ratio() for answer in answers)


def share_named(output: str, answers: Sequence[str]) -> float:
    """The share of the answers that the output contains, in upper or lower case.

    >>> share_named("They are 12 and 7.", ["12", "9"])
    0.5
    """
    return sum(answer.lower() in output.lower() for answer in answers) / len(answers)


def rouge_l(output: str, answers: Sequence[str]) -> float:
    """F-score of the longest common sequence of words, with the answer that is closest by it.

    >>> round(rouge_l("The cat sat.", ["the cat sat on a mat"]), 3)
    0.667
    """
    from torchmetrics.functional.text import rouge_score

    scores = [rouge_score(output, answer, rouge_keys="rougeL")["rougeL_fmeasure"] for answer in answers]
    return max(float(score) for score in scores)


def _code(between: str) -> Callable[[dict[str, Any]], list[Prompt]]:
    def read(entry: dict[str, Any]) -> list[Prompt]:
        asked = between.format(**{key: entry[key] for key in ("context", "input")})
        text = f"Please complete the code given below. \n{asked}Next line of code:\n"
        return [Prompt(text, _texts(entry["answers"]))]

    return read


def _needle(entry: dict[str, Any]) -> list[Prompt]:
    return [Prompt(entry["input"] + entry.get("answer_prefix", ""), _texts(entry["outputs"]))]


def _meeting(entry: dict[str, Any]) -> list[Prompt]:
    said = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in entry[MEETING])
    queries = [*entry["general_query_list"], *entry["specific_query_list"]]
    return [Prompt(f"{said}\n\nQuery: {each['query']}\nAnswer:", _texts([each["answer"]])) for each in queries]


def _texts(answers: Any) -> tuple[str, ...]:
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("its answers are no list of texts")
    return tuple(answers)


class Form(NamedTuple):
    """What a set is called, how an entry becomes prompts, how many tokens are written, and how they are judged."""

    name: str
    read: Callable[[dict[str, Any]], list[Prompt]]
    tokens: int
    judge: Judge


FORMS = {
    "lcc.jsonl": Form("LCC (LongBench)", _code("{context}"), 64, edit_similarity),
    "repobench-p.jsonl": Form("RepoBench-P (LongBench)", _code("{context}{input}"), 64, edit_similarity),
    RULER: Form("RULER", _needle, NEEDLE_TOKENS, share_named),
}
MEETINGS = Form("QMSum", _meeting, 384, rouge_l)  # as many tokens as RAT's authors let a model write


def read_prompts(path: Path, split: str = "test") -> Prompts | None:
    """The prompts of a file, or of a folder of RULER or QMSum; None where it is none of the sets.

    Args:
        path: the file or the folder.
        split: "train", "val" or "test"; only QMSum has other prompts than those to test on.

    Raises:
        UserError: one of the sets, with something in it that cannot be read.
    """
    file, form = _recognised(path, split)
    if form is None:
        return None
    prompts = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        entry = parse_json(line, where)
        try:
            read = form.read(entry)
            if not all(isinstance(prompt.text, str) and prompt.text for prompt in read):
                raise ValueError("its prompt is no text")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{where}: no prompt of {form.name}: {reason}") from None
        prompts += read
    if not prompts:
        raise UserError(f"{file} holds no prompts of {form.name}")
    return Prompts(form.name, prompts, form.tokens, form.judge)


def _recognised(path: Path, split: str) -> tuple[Path, Form | None]:
    """The file of a split, and what it is, by its name or by its first line."""
    if split == "test":
        file = path / RULER if path.is_dir() else path
        if file.name in FORMS and file.is_file():
            return file, FORMS[file.name]
    file = path / f"{split}.jsonl"
    if not file.is_file():
        return file, None
    # The same name as any text has: of that the first line is read alone, whatever its size.
    check_file(file)
    with file.open("rb") as handle:
        return file, MEETINGS if json.dumps(MEETING).encode() in handle.readline() else None
