"""What the captioners of the experiments learn from: composed scenes, and a list of the objects in them."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from provenn.data.chat_tokens import MARKS
from provenn.data.composed import NOUNS, SIDE, Composed, Split, composed_scenes
from provenn.data.conversations import PLACEHOLDER, Conversation, Exchange
from provenn.papers.vl_sam.model import QUESTION
from provenn.tasks import TaskData, fingerprint
from provenn.tasks.multimodal_chat import Talks, join_chats
from provenn.tasks.open_ended_detection import Scenes, as_detection

BINS = 16  # along a side, of the boxes that are written
WORDS = [*MARKS, *NOUNS, ",", ".", "list", "the", "objects", *(f"p{k}" for k in range(BINS))]
RARE = ("four", "nine", "ring", "diamond")
KEPT = 0.15  # of the training scenes that hold a rare object


class Counts(NamedTuple):
    """How many scenes each split has."""

    train: int
    val: int
    test: int


FULL, SMOKE = Counts(6000, 100, 150), Counts(24, 4, 3)


def scenes_of(split: Split, seed: int, count: int, words: Split = "train", rare: bool = False) -> list[Composed]:
    """Scenes of a split; of the training's, few of those that hold a rare object, unless all are asked for."""
    if split != "train" or rare:
        return list(composed_scenes(split, seed, count, words=words))
    drawn = composed_scenes(split, seed, 2 * count, words=words)
    keep = np.random.default_rng(seed).random(len(drawn)) < KEPT
    kept = [s for s, one in zip(drawn, keep) if one or not any(thing.pair.noun in RARE for thing in s.things)]
    return kept[:count]


def listed(scene: Composed, boxes: bool = False) -> str:
    """The nouns of a scene from left to right, with their boxes in words where these are asked for.

    >>> listed(composed_scenes("val", 0, 1)[0]).count(",") + 1 == len(composed_scenes("val", 0, 1)[0].things)
    True
    """
    things = sorted(scene.things, key=lambda thing: thing.box)
    if not boxes:
        return " , ".join(thing.pair.noun for thing in things)
    at = [" ".join(f"p{min(BINS - 1, edge * BINS // SIDE)}" for edge in thing.box) for thing in things]
    return " , ".join(f"{thing.pair.noun} {place}" for thing, place in zip(things, at))


@lru_cache(maxsize=4)
def listing_data(seed: int, smoke: bool, boxes: bool = False, rare: bool = False) -> TaskData:
    """Conversations of one question, what objects are there, about scenes with frequent and rare objects.

    Args:
        seed, smoke: of the data.
        boxes: whether answers hold boxes in words.
        rare: whether rare objects are as frequent in training as others.
    """
    counts = SMOKE if smoke else FULL
    parts = {split: scenes_of(split, seed, getattr(counts, split), rare=rare) for split in ("train", "val", "test")}
    pixels = {
        split: torch.from_numpy(np.stack([s.pixels for s in part])).permute(0, 3, 1, 2) for split, part in parts.items()
    }
    shares = pixels["train"].float() / 255
    meta = {
        "words": WORDS, "longest": 64, "answer": 28 if boxes else 10, "size": SIDE, "fit": "stretch",
        "mean": shares.mean((0, 2, 3)).tolist(), "std": shares.std((0, 2, 3)).tolist(),
    }  # fmt: skip
    asked = f"{PLACEHOLDER} {QUESTION}"
    sets = {
        split: Talks(
            [Conversation((Exchange(asked, (listed(s, boxes),)),), (k,)) for k, s in enumerate(part)],
            meta,
            pixels[split],
        )
        for split, part in parts.items()
    }
    tokens = sets["train"].chat_tokens
    return TaskData(
        "lists of objects",
        sets["train"],
        sets["val"],
        sets["test"],
        fingerprint=fingerprint(*pixels.values()),
        options={"vocab_size": len(tokens), "image_token": tokens.image, "image_size": SIDE},
        meta=meta,
        collate=join_chats(tokens.pad),
    )


def tested(seed: int, smoke: bool, unlike: bool = False) -> tuple[list[Composed], Scenes]:
    """The scenes of the test, and the same as the task of detection has them.

    Args:
        seed, smoke: of the data.
        unlike: in combinations of colour and object that no training has.
    """
    scenes = scenes_of("test", seed, (SMOKE if smoke else FULL).test, "test" if unlike else "train")
    return scenes, as_detection(scenes)


def commonest(seed: int, smoke: bool) -> str:
    """The noun that most training scenes hold."""
    nouns = [t.pair.noun for s in scenes_of("train", seed, (SMOKE if smoke else FULL).train) for t in s.things]
    return max(NOUNS, key=nouns.count)
