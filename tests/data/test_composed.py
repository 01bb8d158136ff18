"""Composed scenes: what is said of them is true, what is held out is held out, and the words are closed."""

from hashlib import sha256
from itertools import combinations, pairwise

import numpy as np
import pytest
from sklearn.datasets import load_digits

from provenn.core.errors import UserError
from provenn.data import composed
from provenn.data.composed import (
    CAPTIONS,
    COLOURS,
    GLYPHS,
    NOUNS,
    NUMERALS,
    Relation,
    composed_scenes,
    draw_sheet,
    pairs_of,
    position_of,
    vocabulary,
)
from provenn.data.vocabulary import SPECIAL, Vocabulary, words_of

SPLITS = tuple(GLYPHS)


@pytest.fixture(scope="module")
def scenes() -> dict:
    return {split: composed_scenes(split, count=150) for split in SPLITS}


def digests(arrays) -> set[bytes]:
    return {sha256(np.ascontiguousarray(array).tobytes()).digest() for array in arrays}


def test_no_glyph_photograph_texture_or_pair_of_words_is_in_two_splits(scenes):
    """By fingerprints of the pixels that scenes are made of, not by their numbers."""
    images = load_digits().images
    held: dict[str, dict[str, set]] = {}
    for split, drawn in scenes.items():
        things = [thing for scene in drawn for thing in scene.things]
        pictures = {scene.source for scene in drawn if scene.ground == "photograph"}
        held[split] = {
            "glyphs": digests(images[thing.glyph] for thing in things if thing.glyph >= 0),
            "photographs": digests(composed._picture(name, None) for name in pictures),
            # A column of a texture: no pixel of it is in another split.
            "textures": digests(c for name in composed.TEXTURES for c in composed._picture(name, split).swapaxes(0, 1)),
            "pairs": {str(thing.pair) for thing in things},
            "scenes": digests(scene.pixels for scene in drawn),
        }
        assert all(len(found) > 1 for found in held[split].values())
        assert held[split]["pairs"] <= {str(pair) for pair in pairs_of(split)}
    for one, other in combinations(SPLITS, 2):
        for what, found in held[one].items():
            assert not found & held[other][what], f"{one} and {other} share {what}"


def test_a_pair_is_held_out_though_both_of_its_words_are_trained_on():
    known = pairs_of("train")
    assert {pair.colour for pair in known} == set(COLOURS) and {pair.noun for pair in known} == set(NOUNS)
    everything = [pair for split in SPLITS for pair in pairs_of(split)]
    assert len(everything) == len(set(everything)) == len(COLOURS) * len(NOUNS)
    seen = composed_scenes("test", count=30, words="train")
    assert {thing.pair for scene in seen for thing in scene.things} <= set(known)


def test_captions_name_every_object_and_no_other(scenes):
    for scene in (scene for drawn in scenes.values() for scene in drawn):
        assert len(scene.captions) == len(set(scene.captions)) == CAPTIONS
        for caption in scene.captions:
            words = words_of(caption)
            pairs = {(a, b) for a, b in pairwise(words) if a in COLOURS and b in NOUNS}
            assert pairs == {tuple(thing.pair) for thing in scene.things}, caption
        plain, sized, placed, _, counted = scene.captions
        assert all(f"{thing.size} {thing.pair}" in sized for thing in scene.things)
        assert all(f"{thing.pair} in the {position_of(thing, 64)}" in placed for thing in scene.things)
        assert plain.endswith(f"on {'a ' * (scene.ground == 'photograph')}{scene.ground}")
        assert counted.startswith(NUMERALS[len(scene.things)])


def test_relations_are_those_of_the_pixels(scenes):
    """From the masks alone: an object is left of another where its last column comes before the other's first."""
    for scene in scenes["train"]:
        spans = []
        for mask, thing in zip(scene.masks, scene.things, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            spans.append((columns[0], columns[-1], rows[0], rows[-1]))
            assert thing.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        expected = set()
        for a, (left, right, top, bottom) in enumerate(spans):
            for b, (left2, right2, top2, bottom2) in enumerate(spans):
                if a != b:
                    holds = {"left of": right < left2, "right of": left > right2, "above": bottom < top2}
                    holds["below"] = top > bottom2
                    expected |= {Relation(a, word, b) for word, is_so in holds.items() if is_so}
        assert set(scene.relations) == expected
        assert scene.masks.sum(0).max() <= 1, "nothing covers another"
        for relation in scene.relations:
            assert Relation(relation.second, composed_opposite(relation.word), relation.first) in expected


def composed_opposite(word: str) -> str:
    return {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[word]


def test_answers_are_those_of_the_scene(scenes):
    kinds, answers = set(), []
    for scene in (scene for drawn in scenes.values() for scene in drawn):
        pairs = {str(thing.pair): thing for thing in scene.things}
        for question in scene.questions:
            kinds.add(question.kind)
            words = question.text.rstrip(" ?").split()
            if question.kind == "exists":
                answers.append(question.answer)
                assert (" ".join(words[-2:]) in pairs) == (question.answer == "yes")
            elif question.kind == "colour":
                assert [t.pair.colour for t in scene.things if t.pair.noun == words[-1]] == [question.answer]
            elif question.kind == "noun":
                assert [t.pair.noun for t in scene.things if t.pair.colour == words[-1]] == [question.answer]
            elif question.kind == "count":
                counted = {"objects": 0, "digits": 0, "shapes": 0}
                for thing in scene.things:
                    counted["objects"] += 1
                    counted["digits" if thing.glyph >= 0 else "shapes"] += 1
                assert question.answer == NUMERALS[counted[words[2]]]
            elif question.kind == "size":
                assert question.answer == pairs[" ".join(words[2:4])].size
            elif question.kind == "position":
                assert question.answer == position_of(pairs[" ".join(words[-2:])], 64)
            elif question.kind == "ground":
                assert question.answer == scene.ground
            else:
                numbers = {str(thing.pair): number for number, thing in enumerate(scene.things)}
                said = Relation(numbers[" ".join(words[2:4])], " ".join(words[4:-3]), numbers[" ".join(words[-2:])])
                assert (said in scene.relations) == (question.answer == "yes")
    assert kinds == set(composed.KINDS)
    assert 0.35 < np.mean([answer == "yes" for answer in answers]) < 0.65


def test_scenes_follow_from_the_seed_and_no_two_hold_the_same():
    one, again, other = (composed_scenes.__wrapped__("val", seed, 40) for seed in (3, 3, 4))
    assert all((a.pixels == b.pixels).all() and a.captions == b.captions for a, b in zip(one, again))
    assert any((a.pixels != b.pixels).any() for a, b in zip(one, other))
    assert len({scene.content for scene in one}) == 40
    assert {len(scene.things) for scene in one} == {2, 3, 4}
    few = composed_scenes("val", count=5, objects=(1, 1), side=48, questions=2)
    assert {(scene.pixels.shape, len(scene.things)) for scene in few} == {((48, 48, 3), 1)}
    assert all(len(scene.captions) == 5 and len(scene.questions) == 2 for scene in few)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 16}, "side must be at least 32 pixels, got 16"),
        ({"objects": (3, 2)}, "objects must be the fewest and the most, from 1 to 6"),
        ({"objects": (1, 1), "count": 400}, "400 scenes of val with other contents each could not be drawn"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        composed_scenes("val", **options)


def test_the_vocabulary_is_closed(scenes):
    """Every word of captions, questions and answers is in it, and nothing else but the special tokens."""
    words = vocabulary()
    used = {
        word
        for drawn in (*scenes.values(), composed_scenes("train", count=10, objects=(1, 1)))
        for scene in drawn
        for text in (*scene.captions, *(q.text for q in scene.questions), *(q.answer for q in scene.questions))
        for word in words_of(text)
    }
    assert used == set(words.words) - set(SPECIAL)
    caption = scenes["test"][0].captions[2]
    numbers = words.encode(caption)
    assert words.unknown not in numbers and words_of(words.decode(numbers)) == words_of(caption)
    assert (numbers[0], numbers[-1]) == (words.start, words.end)


def test_texts_of_other_lengths_are_filled_up():
    words = Vocabulary.of_texts(["a red disc", "a disc", "blue"], at_least=2)
    assert words.words == [*SPECIAL, "a", "disc"]
    assert words.encode("A red disc!", most=4) == [words.start, words.numbers["a"], words.unknown, words.end]
    tokens, there = words.batch([words.encode("a disc"), words.encode("a")])
    assert tokens.tolist()[1] == [words.start, words.numbers["a"], words.end, words.pad]
    assert there.tolist() == [[True] * 4, [True] * 3 + [False]]


def test_a_vocabulary_without_the_special_tokens_is_refused_in_a_line():
    with pytest.raises(UserError, match=r"^the vocabulary of 2 words lacks <pad>, <start>, .*: add the special tokens"):
        Vocabulary(["a", "b"])
    with pytest.raises(UserError, match="has 'a' twice: expected each word once"):
        Vocabulary([*SPECIAL, "a", "a"])


def test_the_sheet_shows_scenes_with_their_words():
    sheet = draw_sheet("val", columns=2, rows=1)
    assert sheet.size == (2 * (64 * 3 + 12), 64 * 3 + 76) and np.asarray(sheet).std() > 20
