"""Questions with choices, in the files that their authors publish; asked as lm-evaluation-harness asks them.

piqa/: valid.jsonl and valid-labels.lst (or dev…). hellaswag/: hellaswag_val.jsonl. winogrande/: dev.jsonl.
arc_easy/, arc_challenge/: ARC-Easy-Test.jsonl, ARC-Challenge-Test.jsonl. openbookqa/: test.jsonl. sciq/: test.json.
logiqa/: Test.txt. truthfulqa/: mc_task.json. lambada/: lambada_test_en.jsonl, where the last word is the target.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from provenn.core.errors import UserError
from provenn.core.inputs import parse_json, read_text


class Question(NamedTuple):
    """What stands before each choice, the choices, and which is right. A single choice is to be written as it is."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    right: int

    @classmethod
    def asked(cls, context: str, choices: list[str], right: int) -> "Question":
        if not 0 <= right < len(choices):
            raise ValueError(f"no choice has the number {right}")
        return cls((context,) * len(choices), tuple(choices), right)


@dataclass(frozen=True)
class Questions:
    """A set of questions.

    Args:
        name: as it is known.
        questions: in the file's order.
        by_length: whether the set is judged, as usual, by likelihood for each letter of a choice; else by likelihood.
    """

    name: str
    questions: list[Question]
    by_length: bool


def _piqa(entry: dict) -> Question:
    return Question.asked(f"Question: {entry['goal']}\nAnswer:", [entry["sol1"], entry["sol2"]], int(entry["label"]))


def _hellaswag(entry: dict) -> Question:
    context = f"{entry['activity_label']}: {entry['ctx_a']} {entry['ctx_b'].capitalize()}"
    return Question.asked(_plain(context), [_plain(ending) for ending in entry["endings"]], int(entry["label"]))


def _plain(text: str) -> str:
    """Without the marks that WikiHow's pages left in HellaSwag."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(entry: dict) -> Question:
    before, _, after = entry["sentence"].partition("_")
    contexts = tuple(before + entry[option] for option in ("option1", "option2"))
    return Question(contexts, (after.strip(),) * 2, {"1": 0, "2": 1}[entry["answer"]])


def _stem(prefix: str, suffix: str) -> Callable[[dict], Question]:
    def read(entry: dict) -> Question:
        question = entry["question"]
        labels = [choice["label"] for choice in question["choices"]]
        texts = [choice["text"] for choice in question["choices"]]
        return Question.asked(f"{prefix}{question['stem']}{suffix}", texts, labels.index(entry["answerKey"].strip()))

    return read


def _sciq(entry: dict) -> Question:
    choices = [entry[key] for key in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return Question.asked(f"{entry['support'].lstrip()}\nQuestion: {entry['question']}\nAnswer:", choices, 3)


def _logiqa(entry: dict) -> Question:
    letters, choices = "abcd", entry["options"]
    listed = "".join(f"{letter.upper()}. {choice}\n" for letter, choice in zip(letters, choices))
    context = f"Passage: {entry['context']}\nQuestion: {entry['question']}\nChoices:\n{listed}Answer:"
    return Question.asked(context, choices, letters.index(entry["label"]))


def _truthfulqa(entry: dict) -> Question:
    targets: dict[str, int] = entry["mc1_targets"]
    return Question.asked(f"Q: {entry['question']}\nA:", [*targets], [*targets.values()].index(1))


def _lambada(entry: dict) -> Question:
    context, _, last = entry["text"].strip().rpartition(" ")
    if not context:
        raise ValueError("one word alone")
    return Question((context,), (last,), 0)


class Form(NamedTuple):
    """A set's files, of which the first that is there is read; a key that its entries have; how one is asked."""

    files: tuple[str, ...]
    key: str
    read: Callable[[dict], Question]
    by_length: bool = False


FORMS = {
    "PIQA": Form(("valid.jsonl", "dev.jsonl"), "goal", _piqa),
    "WinoGrande": Form(("dev.jsonl",), "option1", _winogrande),
    "HellaSwag": Form(("hellaswag_val.jsonl",), "endings", _hellaswag, by_length=True),
    "ARC, easy": Form(("ARC-Easy-Test.jsonl",), "answerKey", _stem("Question: ", "\nAnswer:")),
    "ARC, challenge": Form(
        ("ARC-Challenge-Test.jsonl",), "answerKey", _stem("Question: ", "\nAnswer:"), by_length=True
    ),
    "OpenbookQA": Form(("test.jsonl",), "answerKey", _stem("", ""), by_length=True),
    "SciQ": Form(("test.json",), "distractor1", _sciq),
    "LogiQA": Form(("Test.txt",), "options", _logiqa),
    "TruthfulQA, one true answer": Form(("mc_task.json",), "mc1_targets", _truthfulqa),
    "LAMBADA": Form(("lambada_test_en.jsonl", "lambada_test.jsonl"), "text", _lambada),
}


def read_questions(folder: Path) -> Questions | None:
    """The questions in a folder, or None where it holds none of the sets.

    Raises:
        UserError: one of the sets, with something in it that cannot be read.
    """
    for name, form in FORMS.items():
        file = next((folder / each for each in form.files if (folder / each).is_file()), None)
        first = None if file is None else next(_entries(file), None)
        if file is None or first is None or form.key not in first[1]:
            continue
        questions = []
        for where, entry in _entries(file):
            try:
                questions.append(form.read(entry))
            except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
                reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{where}: no question of {name}: {reason}") from None
        return Questions(name, questions, form.by_length)
    return None


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a file one by one, and where each stands."""
    text = read_text(file)
    if file.suffix == ".txt":
        for number, block in enumerate(re.split(r"\n\s*\n", text.strip()), 1):
            lines = [line.strip() for line in block.strip().split("\n")]
            if len(lines) != 7:
                raise UserError(f"{file}, question {number}: expected 7 lines (answer, passage, question, 4 choices)")
            spaced = [line.replace(".", ". ").strip() for line in (*lines[1:3], *(line[2:] for line in lines[3:]))]
            yield (
                f"{file}, question {number}",
                {"label": lines[0], "context": spaced[0], "question": spaced[1], "options": spaced[2:]},
            )
        return
    if file.suffix == ".json":
        entries = [(f"{file}, question {number}", entry) for number, entry in enumerate(_array(file, text), 1)]
    else:
        numbered = [(f"{file}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        entries = [(where, parse_json(line, where)) for where, line in numbered]
    labels = file.with_name(f"{file.stem}-labels.lst")
    answers = read_text(labels).split() if labels.is_file() else None
    if answers is not None and len(answers) != len(entries):
        raise UserError(f"{labels} has {len(answers)} labels for {len(entries)} questions")
    for number, (where, entry) in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected an object with keys")
        yield where, entry if answers is None else {**entry, "label": answers[number]}


def _array(file: Path, text: str) -> list[Any]:
    entries = parse_json(text, str(file))
    if not isinstance(entries, list):
        raise UserError(f"{file}: expected a list of questions, got {json.dumps(entries)[:40]}")
    return entries
