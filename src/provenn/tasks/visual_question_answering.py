"""Visual question answering: the scored form of `multimodal-chat`, one question and one short answer at a time.

What a system must have stands there. Where a question has choices, the answer is the likeliest of them by the mean of
log p over its tokens and its end, which is the lowest loss of an answer. Elsewhere it is written, likeliest token by
likeliest token, and compared as VQA's evaluation does: see `provenn.data.conversations.agreement`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.data.composed_talk import composed_talk
from provenn.data.conversations import PLACEHOLDER, Conversation, agreement, read_conversations
from provenn.data.vocabulary import words_of
from provenn.tasks.base import Scores, TaskData
from provenn.tasks.demos import Trial, save_shown
from provenn.tasks.multimodal_chat import MultimodalChat, Talks, likelihoods, write

ANSWERED_AT_ONCE = 128
KINDS_SHOWN = 12  # kinds of questions that have a metric of their own


class VisualQuestionAnswering(MultimodalChat):
    """The share of questions that are answered right."""

    name = "visual-question-answering"
    metric = "accuracy"
    higher_is_better = True
    reads = (
        'a .jsonl or .json of questions, {"image": "a.jpg", "question": "…", "answer": "…"}, or of conversations of '
        "one exchange, or a folder of train, val and test"
    )
    alone = True

    def _read(self, path: Path, layout: str | None) -> dict[str, list[Conversation]]:
        parts = read_conversations(path, layout)
        for talks in parts.values():
            for talk in talks:
                if len(talk.exchanges) > 1:
                    raise UserError(
                        f"{talk.where}: {len(talk.exchanges)} questions in one conversation: expected one; "
                        "multimodal-chat takes conversations"
                    )
        return parts

    def _talk(
        self, split: str, seed: int, count: int | None, pictures: int, text_share: float | int
    ) -> tuple[Tensor, list[Conversation]]:
        return _questions(split, seed, count, pictures, text_share)

    def _overlap(self, talks: Sequence[Conversation]) -> int:
        """The most questions in a row that are about the same pictures."""
        longest, run = 1, 1
        for before, talk in pairwise(talks):
            run = run + 1 if talk.images and talk.images == before.images else 1
            longest = max(longest, run)
        return longest

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = ANSWERED_AT_ONCE) -> Scores:
        """Of each question `right`, from 0 to 1, and for each kind of question 1 under `is KIND` where it is of it."""
        talks: Talks = dataset  # type: ignore[assignment]  # a data set of this task
        right = np.zeros(len(talks))
        starts = range(0, len(talks), batch_size)
        for start in progress.track(starts, "answering") if len(starts) > 4 else starts:
            rows = range(start, min(start + batch_size, len(talks)))
            for row, said in zip(rows, answers(model, talks, rows)):
                right[row] = agreement(said, talks.conversations[row].exchanges[0].answers)
        kinds = [talk.exchanges[0].kind for talk in talks.conversations]
        named = [kind for kind, _ in Counter(kinds).most_common(KINDS_SHOWN) if kind]
        return {
            "right": right,
            **{f"is {kind}": np.array([float(each == kind) for each in kinds]) for kind in sorted(named)},
        }

    def summary(self, scores: Scores) -> dict[str, float]:
        """Accuracy of all questions, and of each kind."""
        kinds = {name.removeprefix("is "): column for name, column in scores.items() if name.startswith("is ")}
        # A draw of the interval may have none of a kind, which then counts as all are.
        whole = float(scores["right"].mean())
        of_kind = {
            kind: float((scores["right"] * column).sum() / column.sum()) if column.sum() else whole
            for kind, column in kinds.items()
        }
        return {"accuracy": whole, **of_kind}

    def dummy_baseline(self, data: TaskData) -> float:
        """The best accuracy of `floors`, which look at no image."""
        return max(floors(data).values())


@torch.no_grad()
def answers(model: nn.Module, talks: Talks, rows: Sequence[int]) -> list[str]:
    """What a system answers to some questions of a data set, the likeliest choice or in its own words.

    Args:
        model: in eval mode.
        talks: of the questions.
        rows: which ones.
    """
    tokens, count = talks.chat_tokens, int(talks.meta["answer"])
    prompts = [tokens.prompt(talks.conversations[row]) for row in rows]
    images = [[talks.image(source) for source in talks.conversations[row].images] for row in rows]
    choices = [talks.conversations[row].exchanges[0].choices for row in rows]
    said = [""] * len(rows)
    for some in (
        [k for k, named in enumerate(choices) if named],
        [k for k, named in enumerate(choices) if not named],
    ):
        if not some:
            continue
        given = [prompts[k] for k in some], [images[k] for k in some]
        if choices[some[0]]:
            shares = likelihoods(model, tokens, *given, [choices[k] for k in some])
            told = [choices[k][int(share.argmax())] for k, share in zip(some, shares)]
        else:
            told = write(model, tokens, *given, count)
        for k, answer in zip(some, told):
            said[k] = answer
    return said


def form_of(question: str) -> str:
    """The form of a question: its first two words.

    >>> form_of("<image> What colour is it?")
    'what colour'
    """
    return " ".join(words_of(question.replace(PLACEHOLDER, " "))[:2])


def floors(data: TaskData) -> dict[str, float]:
    """Accuracy without a look at any image: the commonest answer, that of the question's form, and `by_words`.

    Args:
        data: of this task.
    """
    train, test = (list(part.conversations) for part in (data.train, data.test))  # type: ignore[attr-defined]  # data sets of this task
    asked = [(talk.exchanges[0].asked, talk.exchanges[0].answers[0]) for talk in train]
    common = Counter(answer for _, answer in asked)
    by_form: dict[str, Counter[str]] = {}
    for question, answer in asked:
        by_form.setdefault(form_of(question), Counter())[answer] += 1
    commonest = common.most_common(1)[0][0]
    model = by_words(asked)

    def share(told: list[str]) -> float:
        rights = [agreement(said, talk.exchanges[0].answers) for said, talk in zip(told, test)]
        return sum(rights) / len(rights)

    def choose(talk: Conversation, counts: Counter[str]) -> str:
        named = talk.exchanges[0].choices
        return max(named, key=lambda choice: counts[choice]) if named else counts.most_common(1)[0][0]

    return {
        "commonest answer": share([choose(talk, common) if talk.exchanges[0].choices else commonest for talk in test]),
        "of the question's form": share(
            [choose(talk, by_form.get(form_of(talk.exchanges[0].asked), common)) for talk in test]
        ),
        "words of the question": share([model(talk.exchanges[0].asked, talk.exchanges[0].choices) for talk in test]),
    }


def by_words(asked: Sequence[tuple[str, str]]) -> Any:
    """Naive Bayes from the words of a question and its pairs of words in a row to its answer, with one added.

    Args:
        asked: questions and answers to count.

    Returns:
        What tells the likeliest answer to a question, among choices where there are some.
    """
    answers_of = Counter(answer for _, answer in asked)
    names = list(answers_of)
    numbers = {name: k for k, name in enumerate(names)}
    features = {name: k for k, name in enumerate(sorted({f for question, _ in asked for f in _features(question)}))}
    counts = np.ones((len(names), len(features)))
    for question, answer in asked:
        for feature in _features(question):
            counts[numbers[answer], features[feature]] += 1
    logs = np.log(counts / counts.sum(1, keepdims=True))
    prior = np.log(np.array([answers_of[name] for name in names]) / len(asked))

    def tell(question: str, choices: Sequence[str] = ()) -> str:
        known = [features[feature] for feature in _features(question) if feature in features]
        scores = prior + logs[:, known].sum(1)
        if choices:
            return max(choices, key=lambda choice: scores[numbers[choice]] if choice in numbers else -np.inf)
        return names[int(scores.argmax())]

    return tell


def _features(question: str) -> Iterator[str]:
    words = words_of(question.replace(PLACEHOLDER, " "))
    yield from words
    yield from (f"{a} {b}" for a, b in pairwise(words))


@lru_cache(maxsize=4)  # a study asks for them once a trial
def _questions(
    split: str, seed: int, count: int | None, pictures: int, text_share: float | int
) -> tuple[Tensor, list[Conversation]]:
    """Each question of the conversations by itself, with the pictures before it."""
    pixels, talks = composed_talk(
        split,
        seed,
        count,
        pictures=pictures,
        text_share=text_share,
        captions=False,
    )
    asked = []
    for talk in talks:
        for exchange in talk.exchanges:
            bare = " ".join(exchange.asked.replace(PLACEHOLDER, " ").split())
            shown = f"{PLACEHOLDER} " * len(talk.images) + bare
            asked.append(Conversation((exchange._replace(asked=shown),), talk.images, "", talk.where))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), asked


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: what is answered to the question about the picture that was given."""
    question = str(trial.options.pop("question", "")).strip()
    if not question:
        raise UserError("there is no question: type one, such as: what colour is the seven ?")
    said = trial.task.predict(trial.model, trial.meta, [str(trial.file), question], None, **trial.options)
    return {"kind": "text", "text": f"{question}\n{said}", "size": save_shown(trial.file)}


TASK = VisualQuestionAnswering()
