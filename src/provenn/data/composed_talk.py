"""Conversations and questions about composed scenes, true by construction: see `provenn.data.composed`.

A scene is shown, or told in the words of its caption, so that the same questions are asked with and without a picture.
Of several pictures in one conversation each question says which it is about.
"""

from functools import cache

import numpy as np
from jaxtyping import UInt8

from provenn.core.special_tokens import ASSISTANT, USER
from provenn.data.composed import KINDS, NUMERALS, Composed, Split, composed_scenes, vocabulary
from provenn.data.conversations import PLACEHOLDER, Conversation, Exchange

# Which caption says what a question of a kind asks; relations no caption says wholly.
TOLD_BY = {"colour": 0, "noun": 0, "count": 0, "exists": 0, "ground": 0, "size": 1, "position": 2}
DESCRIBE = "describe the picture ."
CAPTION = "caption"  # the kind of that question
FORMS = (*KINDS, CAPTION)
PICTURES = 4  # of a conversation at most


def talk_words() -> list[str]:
    """All words of these conversations, and the marks.

    >>> len(talk_words())
    78
    """
    return [*vocabulary().words, USER, ASSISTANT, "read", "describe", "picture", "."]


@cache
def composed_talk(
    split: Split,
    seed: int = 0,
    count: int | None = None,
    *,
    pictures: int = 1,
    questions: int = 4,
    text_share: float | int = 0.0,
    captions: bool = True,
    words: Split | None = None,
) -> tuple[UInt8[np.ndarray, "scenes side side 3"], tuple[Conversation, ...]]:
    """The scenes of a split as pixels, and conversations about them, whose images are numbers of these.

    Args:
        split, seed, count, words: of the scenes, as in `composed_scenes`.
        pictures: of a conversation; so there are fewer conversations than scenes.
        questions: about each picture.
        text_share: share of the scenes that are told and not shown; of one picture a conversation.
        captions: whether each shown picture is described as well, in one of five captions.

    Raises:
        ValueError: numbers that are out of range.

    >>> pixels, talks = composed_talk("val", count=2, questions=2)
    >>> pixels.shape, [len(talk.exchanges) for talk in talks], talks[0].images
    ((2, 64, 64, 3), [3, 3], (0,))
    """
    if not 1 <= pictures <= PICTURES:
        raise ValueError(f"pictures must be from 1 to {PICTURES}, got {pictures}")
    if not 0 <= text_share <= 1 or (text_share and pictures > 1):
        raise ValueError(f"text_share must be from 0 to 1, and 0 with several pictures, got {text_share}")
    scenes = composed_scenes(split, seed, count, questions=questions, words=words)
    pixels = np.stack([scene.pixels for scene in scenes])
    rng = np.random.default_rng([seed, list(FORMS).index(CAPTION), len(scenes)])
    talks = []
    for first in range(0, len(scenes) - pictures + 1, pictures):
        group = range(first, first + pictures)
        where = f"scene {first + 1} of {split}"
        if rng.random() < text_share:
            talks.append(Conversation(_told(scenes[first]), (), "", where))
            continue
        asked = [
            exchange._replace(asked=f"in picture {NUMERALS[k]} , {exchange.asked}" if pictures > 1 else exchange.asked)
            for k, number in enumerate(group, 1)
            for exchange in _shown(scenes[number], number, captions)
        ]
        order = rng.permutation(len(asked))
        asked = [asked[k] for k in order]
        asked[0] = asked[0]._replace(asked=f"{PLACEHOLDER} " * pictures + asked[0].asked)
        talks.append(Conversation(tuple(asked), tuple(group), "", where))
    return pixels, tuple(talks)


def _shown(scene: Composed, number: int, captions: bool) -> list[Exchange]:
    asked = [Exchange(question.text, (question.answer,), (), question.kind) for question in scene.questions]
    if captions:
        turned = number % len(scene.captions)
        asked.append(Exchange(DESCRIBE, (*scene.captions[turned:], *scene.captions[:turned]), (), CAPTION))
    return asked


def _told(scene: Composed) -> tuple[Exchange, ...]:
    """Each question with the caption that answers it; the number of objects where nothing else is asked."""
    told = [q for q in scene.questions if q.kind in TOLD_BY]
    asked = [Exchange(f"read : {scene.captions[TOLD_BY[q.kind]]} . {q.text}", (q.answer,), (), q.kind) for q in told]
    if not asked:
        count = NUMERALS[len(scene.things)]
        asked = [Exchange(f"read : {scene.captions[0]} . how many objects are there ?", (count,), (), "count")]
    return tuple(asked)
