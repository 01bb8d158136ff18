"""Conversations and questions about images, in the forms of the field: a JSON object a line, or a list of them.

- llava: `{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What is it?"}, {"from": "gpt", …}]}`
- sharegpt: the same with `"images": ["a.jpg", …]`, and `"system"` where there is one
- messages: `{"images": […], "messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}`; the content may
  be a list of `{"type": "text", "text": "…"}` and `{"type": "image", "image": "a.jpg"}`
- questions: `{"image": "a.jpg", "question": "…", "answer": "…"}`, or `"answers": […]` of several people, with
  `"choices": […]` and `"kind": "…"` where there are some

`image`, `images` or both may be absent: a conversation of text alone. `<image>` stands in a user's turn where an image
belongs, once for each. A part that names its image has that one; all others take theirs from the list, in order.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.inputs import parse_json, read_text
from provenn.data.captions import Images
from provenn.data.images import SUFFIXES

LAYOUTS = ("llava", "sharegpt", "messages", "questions")
PLACEHOLDER = "<image>"
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "system": "system",
}  # fmt: skip
READ = ("image", "images")  # the keys of an entry's pictures
OF_WORDS = ("id", "question_id", "system", "question", "answer", "answers", "choices", "kind", "question_type")
UNREAD = ("video", "videos", "audio", "audios")
NAMED = ("image", "path", "url")  # what names the image of a part
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
ENDINGS = (".jsonl", ".json")


class Exchange(NamedTuple):
    """What a user says and what is answered.

    Args:
        asked: with `<image>` where an image belongs.
        answers: those that are right, the first of which is learned.
        choices: what the answer is one of; empty where it is free.
        kind: of the question, where it has one.
    """

    asked: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class Conversation:
    """Exchanges about images, or about none.

    Args:
        exchanges: in their order.
        images: files, in the order of their placeholders; or the numbers of pictures that lie in memory.
        system: what is said before all.
        where: what an error calls it.
    """

    exchanges: tuple[Exchange, ...]
    images: tuple[Path | int, ...] = ()
    system: str = ""
    where: str = ""


def read_conversations(path: Path, layout: str | None = None) -> dict[str, list[Conversation]]:
    """The conversations of a file, or of a folder by split; without splits, all as `train`.

    Args:
        path: a .jsonl or a .json, or a folder with train, val and test of such; images lie beside or below.
        layout: one of `LAYOUTS`. Default: what each entry looks like.

    Raises:
        UserError: another layout than the one that is given, an image that is missing, placeholders too many or too
            few, or turns that are none, with the file and the line or the number. Video and sound, and an image under
            another key in place of one under these.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    root = path if path.is_dir() else path.parent
    images = Images(root)
    return {split: list(_read(file, images, layout)) for split, file in _files(path).items()}


def _files(path: Path) -> dict[str, Path]:
    if not path.is_dir():
        if path.suffix.lower() not in ENDINGS:
            raise UserError(
                f"{path}: expected conversations in a file that ends in {' or '.join(ENDINGS)}, or a folder"
            )
        return {"train": path}
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
    named = {s: file for s, words in SPLITS.items() for file in files if file.stem.lower() in words}
    if not named and len(files) == 1:
        return {"train": files[0]}
    if not named:
        there = f"it holds {', '.join(file.name for file in files[:3])}" if files else "it holds none"
        raise UserError(f"{path}: expected train.jsonl, or one file that ends in {' or '.join(ENDINGS)}; {there}")
    return named


def _read(file: Path, images: Images, layout: str | None) -> Iterator[Conversation]:
    count, besides = 0, Counter[str]()
    for where, entry in entries_of(file):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected an object with a conversation or a question, got {str(entry)[:60]!r}")
        found = _layout_of(entry)
        if found is None or (layout is not None and not _is_like(layout, found)):
            said = f"it looks like layout={found}" if found else f"its keys are {', '.join(map(str, entry))[:120]}"
            wanted = f"the layout {layout}" if layout else "conversations, messages, or a question with its answer"
            raise UserError(f"{where}: expected {wanted}; {said}")
        talk = _question(entry, images, where) if found == "questions" else _conversation(entry, images, where)
        others = _pictures_besides(entry)
        if others and not talk.images:
            raise UserError(f"{where}: {others[0]!r} names a picture: expected it under {' or '.join(READ)}")
        besides.update(others)
        yield talk
        count += 1
    if not count:
        raise UserError(f"{file} is empty: expected a conversation a line")
    for key, times in besides.items():
        progress.say(f"{file}: the pictures that {times:,} of {count:,} entries have under {key!r} are not read")


def _pictures_besides(entry: dict[str, Any]) -> list[str]:
    """Keys of an entry that are not read, and name files of pictures."""

    def names_pictures(value: Any) -> bool:
        names = value if isinstance(value, list) else [value]
        return bool(names) and all(isinstance(name, str) and name.lower().endswith(SUFFIXES) for name in names)

    return [key for key, value in entry.items() if key not in (*READ, *OF_WORDS) and names_pictures(value)]


def entries_of(file: Path) -> Iterator[tuple[str, Any]]:
    """Each entry of a list in JSON, or of lines of JSON, behind where it stands in words.

    Raises:
        UserError: no JSON, with the line.
    """
    text = read_text(file)
    if text.lstrip().startswith("["):
        for number, entry in enumerate(parse_json(text, str(file)), 1):
            yield f"{file}, entry {number}", entry
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{file}, line {number}", parse_json(line, f"{file}, line {number}")


def _layout_of(entry: dict[str, Any]) -> str | None:
    if "conversations" in entry:
        return "sharegpt" if "images" in entry or "system" in entry else "llava"
    if "messages" in entry:
        return "messages"
    return "questions" if "question" in entry else None


def _is_like(layout: str, found: str) -> bool:
    """Without an image LLaVA's and ShareGPT's forms are one."""
    return layout == found or {layout, found} == {"llava", "sharegpt"}


def _files_of(entry: dict[str, Any], images: Images, where: str) -> list[Path]:
    if unread := [key for key in UNREAD if entry.get(key)]:
        raise UserError(f"{where}: it has {unread[0]!r}: expected pictures and text alone")
    given = [entry[key] for key in READ if entry.get(key)]
    names = [name for value in given for name in (value if isinstance(value, list) else [value])]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise UserError(f"{where}: an image must be the name of a file, got {str(wrong[0])[:60]!r}")
    return [images.find(name, where) for name in names]


def _conversation(entry: dict[str, Any], images: Images, where: str) -> Conversation:
    listed = _files_of(entry, images, where)
    turns = entry.get("conversations", entry.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: expected a list of turns, got {str(turns)[:60]!r}")
    system, said = str(entry.get("system") or ""), list[tuple[str, str]]()
    shown: list[Path | None] = [None] * system.count(PLACEHOLDER)  # of each placeholder, where its part names one
    for number, turn in enumerate(turns, 1):
        role, text, own = _turn(turn, images, f"{where}, turn {number}")
        shown += own
        if role == "system" and not said:
            if system and text:
                raise UserError(f"{where}, turn {number}: the system speaks twice: expected one text of it")
            system = system or text
            continue
        expected = "assistant" if len(said) % 2 else "user"
        if role != expected:
            raise UserError(f"{where}, turn {number}: it is of the {role}, expected one of the {expected}")
        if role == "assistant" and not text.strip():
            raise UserError(f"{where}, turn {number}: the answer is empty: expected words")
        if role == "assistant" and PLACEHOLDER in text:
            raise UserError(f"{where}, turn {number}: {PLACEHOLDER} stands in an answer: expected it in a user's turn")
        said.append((role, text))
    if not said or len(said) % 2:
        raise UserError(f"{where}: the last turn has no answer: expected turns of user and assistant by turns")
    _check_placeholders(len(shown), [*listed, *filter(None, shown)], where)
    rest = iter(listed)
    files = tuple(own or next(rest) for own in shown)
    pairs = [Exchange(asked, (answer,)) for (_, asked), (_, answer) in zip(said[::2], said[1::2])]
    return Conversation(tuple(pairs), files, system, where)


def _turn(turn: Any, images: Images, where: str) -> tuple[str, str, list[Path | None]]:
    """Whose it is, its text, and of each placeholder the image that its part names; None where it names none."""
    if not isinstance(turn, dict):
        raise UserError(f'{where}: expected {{"from", "value"}} or {{"role", "content"}}, got {str(turn)[:60]!r}')
    who, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = ROLES.get(str(who).lower())
    if role is None:
        raise UserError(f"{where}: whose turn is {who!r}? expected one of {', '.join(ROLES)}")
    if not isinstance(text, list):
        if not isinstance(text, str):
            raise UserError(f"{where}: expected words, got {str(text)[:60]!r}")
        return role, text, [None] * text.count(PLACEHOLDER)
    words, own = list[str](), list[Path | None]()
    for part in text:
        if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
            raise UserError(f"{where}: expected parts of type text or image, got {str(part)[:60]!r}")
        if part["type"] == "image":
            name = next((part[key] for key in NAMED if part.get(key)), None)
            if name is not None and not isinstance(name, str):
                raise UserError(f"{where}: an image must be the name of a file, got {str(name)[:60]!r}")
            words.append(PLACEHOLDER)
            own.append(None if name is None else images.find(name, where))
        else:
            words.append(str(part.get("text", "")))
            own += [None] * words[-1].count(PLACEHOLDER)
    return role, "\n".join(words), own


def _check_placeholders(count: int, images: Sequence[Any], where: str) -> None:
    if count != len(images):
        what = "too many" if count > len(images) else "too few"
        raise UserError(
            f"{where}: {count} placeholders {PLACEHOLDER} and {len(images)} images: {what}; expected one for each image"
        )


def _question(entry: dict[str, Any], images: Images, where: str) -> Conversation:
    files = _files_of(entry, images, where)
    asked = entry["question"]
    answers = entry.get("answers", entry.get("answer"))
    answers = answers if isinstance(answers, list) else [answers]
    # VQA's files have an object for each person who was asked.
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not isinstance(asked, str) or not asked.strip():
        raise UserError(f"{where}: the question is empty: expected words")
    if not answers or not all(isinstance(answer, str | int | float) and str(answer).strip() for answer in answers):
        raise UserError(f"{where}: the question has no answer: expected answer or answers, in words")
    choices = entry.get("choices") or []
    if not isinstance(choices, list) or len(set(map(str, choices))) != len(choices):
        raise UserError(f"{where}: expected choices that differ, got {str(choices)[:60]!r}")
    counts = Counter(map(str, answers))
    said = tuple(sorted(map(str, answers), key=lambda answer: -counts[answer]))  # the commonest first
    if choices and not set(said) & set(map(str, choices)):
        raise UserError(f"{where}: the answer {said[0]!r} is none of the choices {', '.join(map(str, choices))[:120]}")
    if PLACEHOLDER in asked:
        _check_placeholders(asked.count(PLACEHOLDER), files, where)
    else:
        asked = f"{PLACEHOLDER} " * len(files) + asked
    kind = str(entry.get("kind") or entry.get("question_type") or "")
    return Conversation((Exchange(asked, said, tuple(map(str, choices)), kind),), tuple(files), "", where)


# The normalisation of answers that VQA's own evaluation has (Antol et al., 2015, arXiv:1505.00468), but for its list of
# contractions.
ARTICLES = re.compile(r"\b(a|an|the)\b")
COMMAS = re.compile(r"(\d),(\d)")
MARKS = re.compile(r"[^\w\s'.]|(?<!\d)\.(?!\d)|\.$")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)}


def normal(answer: str) -> str:
    """An answer as it is compared: lower case, no articles, no punctuation, numbers up to ten as digits.

    >>> normal("The Two dogs!"), normal("1,000 cats."), normal("1.5")
    ('2 dogs', '1000 cats', '1.5')
    """
    text = MARKS.sub(" ", COMMAS.sub(r"\1\2", answer.lower().strip()))
    words = ARTICLES.sub(" ", text).split()
    return " ".join(DIGITS.get(word, word) for word in words)


def agreement(answer: str, right: Sequence[str]) -> float:
    """How right an answer is: with ten people's answers min(1, n/3), n of whom gave it; with fewer, whether one did.

    The mean over leaving out each one of ten people is VQA's; the field prints it so.

    >>> agreement("red", ["red"]), round(agreement("red", ["red"] * 2 + ["pink"] * 8), 3)
    (1.0, 0.6)
    """
    given, told = normal(answer), [normal(each) for each in right]
    if len(told) < 10:
        return float(given in told)
    left_out = [sum(given == each for k, each in enumerate(told) if k != left) for left in range(len(told))]
    return sum(min(1.0, count / 3) for count in left_out) / len(told)
