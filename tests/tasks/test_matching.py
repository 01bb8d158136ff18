"""R@k of images and captions, equal to the field's loop over sorted scores, ties included."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provenn.core.errors import UserError
from provenn.tasks import matching
from provenn.tasks.matching import chance, match, padding_of, recalls


def brute_force(scores: np.ndarray, owners: np.ndarray) -> tuple[list[int], list[int]]:
    """As the code of VSE++ and SCAN ranks: by `argsort(scores)[::-1]`, here with a stable sort."""
    texts = [
        1
        + min(int(np.where(np.argsort(row, kind="stable")[::-1] == text)[0][0]) for text in np.flatnonzero(owners == i))
        for i, row in enumerate(scores)
    ]
    images = [
        1 + int(np.where(np.argsort(column, kind="stable")[::-1] == owner)[0][0])
        for column, owner in zip(scores.T, owners)
    ]
    return texts, images


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_ranks_are_those_of_the_fields_loop_with_ties(images, captions, levels, seed, ragged):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, captions + 1, images) if ragged else np.full(images, captions)
    owners = rng.permutation(np.repeat(np.arange(images), counts))
    scores = rng.integers(0, levels, (images, len(owners))).astype(np.float32)  # few levels: most are tied
    found = match(torch.from_numpy(scores), torch.from_numpy(owners))
    texts, ranks = brute_force(scores, owners)
    assert found.text_rank.tolist() == texts
    there = found.image_rank[found.image_rank > 0]
    expected = [ranks[text] for image in range(images) for text in np.flatnonzero(owners == image)]
    assert there.tolist() == expected
    figures = recalls(found.text_rank.numpy(), found.image_rank.numpy())
    for k in (1, 5, 10):
        assert figures[f"text_r{k}"] == pytest.approx(np.mean(np.array(texts) <= k))
        assert figures[f"image_r{k}"] == pytest.approx(np.mean(np.array(ranks) <= k))
    assert figures["rsum"] == pytest.approx(sum(figures[name] for name in figures if name != "rsum"))


def test_blocks_change_nothing(monkeypatch):
    scores = torch.randint(0, 4, (30, 90), generator=torch.Generator().manual_seed(0)).float()
    owners = torch.arange(30).repeat_interleave(3)
    whole = match(scores, owners)
    monkeypatch.setattr(matching, "BLOCK", 100)
    parts = match(scores, owners)
    assert torch.equal(whole.text_rank, parts.text_rank) and torch.equal(whole.image_rank, parts.image_rank)


def test_two_images_with_ten_captions_by_hand():
    """The best of five captions counts for the image; every caption counts for itself."""
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.9, 0.0, 0.95, 0.5, 0.4, 0.6, 0.7], [0.0] * 5 + [0.8, 0.1, 0.2, 0.3, 0.65]])
    found = match(scores, torch.arange(2).repeat_interleave(5))
    assert found.text_rank.tolist() == [2, 1], "0.95 of another image comes before 0.9"
    assert found.image_rank.tolist() == [[1, 1, 1, 1, 2], [2, 2, 2, 2, 2]], "at 0 and 0 the later image comes first"


def test_who_cannot_tell_anything_apart_reaches_chance():
    """Over all orders of the images, which the field's way with ties takes into account."""
    found = match(torch.zeros(40, 200), torch.arange(40).repeat_interleave(5))
    figures = recalls(found.text_rank.numpy(), found.image_rank.numpy())
    assert figures["image_r1"] == chance(40, 5)["image_r1"] == 1 / 40
    assert figures["text_r1"] == 1 / 40
    rng, drawn = np.random.default_rng(0), []
    for _ in range(60):
        found = match(torch.from_numpy(rng.random((20, 60))), torch.arange(20).repeat_interleave(3))
        drawn.append(recalls(found.text_rank.numpy(), found.image_rank.numpy())["rsum"])
    assert chance(20, 3)["rsum"] == pytest.approx(np.mean(drawn), abs=0.1)


@pytest.mark.parametrize(
    ("scores", "owners", "message"),
    [
        (torch.zeros(2, 2), torch.tensor([0, 0]), "scores are of 2 images and 2 captions: .* got 2 for 1 images"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), "expected the image of each caption, at least one"),
        (torch.tensor([[0.0, torch.nan], [0, 0]]), torch.arange(2), "the score of image 0 and caption 1 is no number"),
    ],
)
def test_tables_that_say_nothing_are_refused(scores, owners, message):
    with pytest.raises(UserError, match=message):
        match(scores, owners)


def test_what_is_real_in_rows_of_other_lengths():
    assert padding_of([1, 3], 3).tolist() == [[True, False, False], [True, True, True]]
