"""Scores of captions against values of the field's own programs, and what follows from their definitions."""

import builtins
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from provenn.core.errors import UserError
from provenn.data import caption_scores
from provenn.data.caption_scores import cider, common_length, exact_match, meteor, rouge_l

pytest.importorskip("snowballstemmer")

SAID = ["the cats are sitting on a large mat", "a red chair", "the man near the table runs", "blue"]
RIGHT = [
    ["a cat sits on the large mat", "cats sitting on mat"],
    ["the red chair", "a red chair"],
    ["a man runs near the table"],
    ["red"],
]
TEXT = st.lists(st.sampled_from(["a", "red", "cat", "cats", "sat", "on", "mat", "mats"]), min_size=1, max_size=8).map(
    " ".join
)


def test_cider_and_rouge_are_those_of_the_evaluation_of_coco_captions():
    """Values of its programs (cider_scorer.py with n = 4 and σ = 6, rouge.py) for these texts."""
    assert cider(SAID, RIGHT) == pytest.approx([1.903882, 5.58337, 4.072987, 0.0], abs=1e-6)
    scores = [rouge_l(said, right) for said, right in zip(SAID, RIGHT)]
    assert scores == pytest.approx([0.709302, 1.0, 0.666667, 0.0], abs=1e-6)


def test_meteor_is_that_of_nltk_without_synonyms():
    """Values of nltk's `single_meteor_score` with Porter's stems and no WordNet, the best of the right texts."""
    scores = [meteor(said, right) for said, right in zip(SAID, RIGHT)]
    assert scores == pytest.approx([0.806266, 0.981481, 0.743333, 0.0], abs=1e-6)


def test_meteor_by_hand():
    """Two of three words in two runs: P = 1, R = 2/3, F = (2/3) / (.9 + .1 · 2/3), penalty .5 · (2/2)³."""
    assert meteor("sat cat", ["cat on sat"]) == pytest.approx((2 / 3) / (0.9 + 0.2 / 3) * 0.5)


@settings(max_examples=50, deadline=None)
@given(TEXT, TEXT)
def test_scores_lie_in_their_ranges_and_the_same_text_is_best(said, other):
    for score in (exact_match, rouge_l, meteor):
        assert 0 <= score(said, [other]) <= 1
        assert score(said, [said]) >= score(said, [other])
        assert score(said, [other, said]) >= score(said, [said]) - 1e-12
    words = len(said.split())
    assert meteor(said, [said]) == pytest.approx(1 - 0.5 / words**3), "words that come twice lie in one run"
    assert rouge_l(said, [said]) == 1
    assert common_length(said.split(), other.split()) == common_length(other.split(), said.split())
    assert np.isfinite(cider([said, other], [[other], [said]])).all()


def test_marks_and_capitals_change_nothing():
    for score in (exact_match, rouge_l, meteor):
        assert score("A Red chair!", ["a red, chair."]) == score("a red chair", ["a red chair"])
    assert (
        cider(["A Red chair!", "x"], [["a red chair"], ["y"]])[0]
        == cider(["a red chair", "x"], [["a red chair"], ["y"]])[0]
    )


def test_a_text_without_words_has_nothing():
    assert exact_match("", ["red"]) == rouge_l("?!", ["red"]) == meteor("", ["red"]) == 0
    assert rouge_l("red", []) == meteor("red", []) == 0
    assert cider(["", "red"], [["red"], [""]]).tolist() == [0, 0]
    assert cider([], []).tolist() == []


def test_other_numbers_of_texts_are_refused():
    with pytest.raises(ValueError, match="each of 1 texts, got 2"):
        cider(["a"], [["a"], ["b"]])


def test_a_stemmer_that_is_not_installed_is_named(monkeypatch):
    found = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "snowballstemmer":
            raise ImportError(name)
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    caption_scores._stem.cache_clear()
    with pytest.raises(UserError, match="provenn\\[points\\]"):
        meteor("cats", ["cat"])
