"""Questions about clouds of points: a JSON object a line, or a list of them.

`{"scene": "flat/3.ply", "question": "…", "answer": "…"}`, or `"answers": […]` of several people, and `"kind": "…"` of a
question that has one. Clouds lie beside the file or below. A kind has a share of its own beside METRICS.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from provenn.core.errors import UserError
from provenn.core.inputs import parse_json, read_text
from provenn.data.clouds import SUFFIXES
from provenn.data.conversations import ENDINGS, SPLITS, Conversation, Exchange

METRICS = ("cider", "meteor", "rouge_l", "exact_match")  # of all questions: no kind is called so


def read_scene_questions(path: Path) -> dict[str, list[Conversation]]:
    """The questions of a file, or of a folder by split; without splits, all as `train`.

    Args:
        path: a .jsonl or a .json, or a folder with train, val and test of such.

    Raises:
        UserError: no such file. With the line: a cloud that is missing, a question without words or answer, or a kind
            that is called as a metric.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
        named = {split: file for split, stems in SPLITS.items() for file in files if file.stem.lower() in stems}
        if not named and len(files) == 1:
            named = {"train": files[0]}
        if not named:
            raise UserError(f"{path}: expected train.jsonl, or one file of questions that ends in .jsonl or .json")
    elif path.suffix.lower() in ENDINGS:
        named = {"train": path}
    else:
        raise UserError(f"{path}: expected questions in a file that ends in .jsonl or .json, or a folder")
    return {split: list(_questions(file)) for split, file in named.items()}


def _questions(file: Path) -> Iterator[Conversation]:
    text = read_text(file)
    if text.lstrip().startswith("["):
        entries = [(f"{file}, entry {k}", entry) for k, entry in enumerate(parse_json(text, str(file)), 1)]
    else:
        lines = [(f"{file}, line {k}", line) for k, line in enumerate(text.split("\n"), 1) if line.strip()]
        entries = [(where, parse_json(line, where)) for where, line in lines]
    if not entries:
        raise UserError(f"{file} is empty: expected a question a line")
    for where, entry in entries:
        yield _question(entry, file.parent, where)


def _question(entry: Any, root: Path, where: str) -> Conversation:
    if not isinstance(entry, dict) or not isinstance(entry.get("scene"), str):
        raise UserError(
            f'{where}: expected {{"scene": "a.ply", "question": "…", "answer": "…"}}, got {str(entry)[:60]!r}'
        )
    scene = root / entry["scene"]
    if scene.suffix.lower() not in SUFFIXES:
        raise UserError(f"{where}: the scene {entry['scene']!r} must end in {', '.join(SUFFIXES)}")
    if not scene.is_file():
        raise UserError(f"{where}: no scene {entry['scene']!r} below {root}: add the file or remove the line")
    asked, given = entry.get("question"), entry.get("answers", entry.get("answer"))
    answers = given if isinstance(given, list) else [given]
    if not isinstance(asked, str) or not asked.strip():
        raise UserError(f"{where}: the question is empty: expected words")
    if not answers or not all(isinstance(answer, str | int | float) and str(answer).strip() for answer in answers):
        raise UserError(f"{where}: the question has no answer: expected answer or answers, in words")
    kind = str(entry.get("kind") or "")
    if kind.strip().lower() in METRICS:
        raise UserError(f"{where}: kind={kind!r} is a metric of all questions: expected another name of the kind")
    return Conversation((Exchange(asked, tuple(map(str, answers)), (), kind),), (scene,), "", where)
