"""Rankings of re-identification: equal to a plain count over random tables with ties."""

import importlib.machinery
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provenn.core.errors import UserError
from provenn.tasks import ranking
from provenn.tasks.ranking import JUNK, Sightings, judge, judge_embeddings, nearest


def table(seed: int, queries: int = 12, gallery: int = 40, levels: int = 6):
    """Distances of few levels, so that most are tied; four people, three cameras, junk and distractors."""
    generator = torch.Generator().manual_seed(seed)
    distances = torch.randint(levels, (queries, gallery), generator=generator) / 4
    asked = Sightings(
        torch.randint(4, (queries,), generator=generator), torch.randint(3, (queries,), generator=generator)
    )
    shown = Sightings(
        torch.randint(JUNK, 7, (gallery,), generator=generator), torch.randint(3, (gallery,), generator=generator)
    )
    return distances, asked, shown


def plain(distances, asked, shown, trapezoid=False):
    """The same by one loop over queries and one over pictures, as the protocol words it."""
    rows = []
    for query in range(len(asked)):
        person, camera = int(asked.identities[query]), int(asked.cameras[query])
        kept = []
        for picture in range(len(shown)):
            who, where = int(shown.identities[picture]), int(shown.cameras[picture])
            if who == JUNK or (who == person and where == camera):
                continue
            kept.append((float(distances[query, picture]), who == person))
        kept.sort()  # False sorts before True
        places = [place for place, (_, right) in enumerate(kept, 1) if right]
        if not places:
            continue
        values = []
        for found, place in enumerate(places, 1):
            value = found / place
            if trapezoid:
                before = (found - 1) / (place - 1) if place > 1 else 1.0
                value = (value + before) / 2
            values.append(value)
        rows.append((sum(values) / len(values), places[0], places[-1], len(places)))
    return rows


@pytest.mark.parametrize("area", ["hits", "trapezoid"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.sampled_from([1, 2, 6, 1000]))
def test_rankings_equal_a_plain_count(area, seed, levels):
    distances, asked, shown = table(seed, levels=levels)
    result = judge(distances, asked, shown, area)
    expected = plain(distances, asked, shown, trapezoid=area == "trapezoid")
    assert int(result.judged.sum()) == len(expected)
    values = zip(result.precision, result.first, result.last, result.right, strict=True)
    for (precision, first, last, right), row in zip(values, expected, strict=True):
        assert float(precision) == pytest.approx(row[0], abs=1e-12)
        assert (int(first), int(last), int(right)) == row[1:]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_the_gallery_does_not_matter(seed):
    distances, asked, shown = table(seed)
    order = torch.randperm(len(shown), generator=torch.Generator().manual_seed(seed))
    moved = judge(distances[:, order], asked, Sightings(shown.identities[order], shown.cameras[order]))
    assert torch.equal(moved.precision, judge(distances, asked, shown).precision)


def test_a_model_that_tells_nobody_apart_gains_nothing_from_the_order_of_files():
    asked = Sightings(torch.tensor([1]), torch.tensor([0]))
    shown = Sightings(torch.tensor([1, 1, 2, 3]), torch.tensor([1, 2, 1, 1]))
    result = judge(torch.zeros(1, 4), asked, shown)
    assert (int(result.first), int(result.last)) == (3, 4)


def test_a_perfect_order_is_one_and_the_worst_is_counted():
    asked = Sightings(torch.tensor([1]), torch.tensor([0]))
    shown = Sightings(torch.tensor([1, 1, 2, 3]), torch.tensor([1, 2, 1, 1]))
    best = judge(torch.tensor([[0.0, 0.1, 0.2, 0.3]]), asked, shown).summary()
    assert set(best.values()) == {1.0}
    worst = judge(torch.tensor([[0.3, 0.2, 0.1, 0.0]]), asked, shown).summary(ranks=(1, 3))
    assert worst["mAP"] == pytest.approx((1 / 3 + 2 / 4) / 2) and worst["mINP"] == pytest.approx(2 / 4)
    assert worst["rank-1"] == 0 and worst["rank-3"] == 1


def test_the_trapezoid_begins_at_one():
    """Market-1501's own code: a first picture that is right has the area under a curve that began at precision 1."""
    asked = Sightings(torch.tensor([1]), torch.tensor([0]))
    shown = Sightings(torch.tensor([1, 2, 1]), torch.tensor([1, 1, 1]))
    result = judge(torch.tensor([[0.0, 0.1, 0.2]]), asked, shown, "trapezoid")
    assert float(result.precision) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)


@pytest.mark.parametrize("block", [1, 7, 2**22])
def test_blocks_change_nothing(monkeypatch, block):
    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(9, 5, generator=generator).double(), torch.randn(31, 5, generator=generator).double()
    _, asked, shown = table(3, 9, 31)
    whole = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(gallery).T
    monkeypatch.setattr(ranking, "BLOCK", block)
    result = judge_embeddings(query, gallery, (asked, shown))
    reference = judge(1 - whole, asked, shown)
    assert torch.allclose(result.precision, reference.precision) and torch.equal(result.last, reference.last)
    similarity, places = nearest(query, gallery, 4)
    expected = whole.topk(4)
    assert torch.equal(places, expected.indices) and torch.allclose(similarity, expected.values)


def test_at_equal_similarity_the_earlier_picture_comes_first(monkeypatch):
    monkeypatch.setattr(ranking, "find_spec", lambda name: None)
    monkeypatch.setattr(ranking, "BLOCK", 3)
    _, places = nearest(torch.ones(1, 2), torch.ones(20, 2), 5)
    assert places.tolist() == [[0, 1, 2, 3, 4]]


def test_memory_does_not_grow_with_queries_times_gallery(monkeypatch):
    """Never more than a block of distances is made at a time."""
    largest = []
    judged = ranking._judge_rows

    def watched(distances, *rest):
        largest.append(distances.numel())
        return judged(distances, *rest)

    monkeypatch.setattr(ranking, "_judge_rows", watched)
    monkeypatch.setattr(ranking, "BLOCK", 1000)
    query, gallery = torch.randn(50, 4), torch.randn(100, 4)
    judge_embeddings(query, gallery, (Sightings(*torch.ones(2, 50).long()), Sightings(*torch.zeros(2, 100).long())))
    assert max(largest) <= 1000 and len(largest) == 5


def test_bad_tables_are_refused_in_a_line():
    distances, asked, shown = table(0)
    with pytest.raises(UserError, match="shape"):
        judge(distances.T, asked, shown)
    distances[3, 5] = float("nan")
    with pytest.raises(UserError, match="query 3 to picture 5"):
        judge(distances, asked, shown)
    with pytest.raises(UserError, match="one identity and one camera"):
        Sightings(torch.zeros(3).long(), torch.zeros(2).long())
    alone = judge(torch.zeros(1, 1), *(Sightings(torch.tensor([n]), torch.tensor([0])) for n in (1, 2)))
    with pytest.raises(UserError, match="none of 1 queries"):
        alone.summary()
    with pytest.raises(UserError, match="count must be between 1"):
        nearest(torch.ones(1, 2), torch.ones(3, 2), 4)
    with pytest.raises(UserError, match="embedding 1 is zero"):
        nearest(torch.ones(1, 2), torch.tensor([[1.0, 0], [0, 0]]), 1)
    with pytest.raises(UserError, match="each picture needs one embedding"):
        judge_embeddings(torch.ones(2, 2), torch.ones(3, 2), (asked, shown))


class Faiss:
    """Stands for faiss: an exact index that returns ties in whatever order it likes, here the last first."""

    def __init__(self, dim):
        self.vectors = np.empty((0, dim), np.float32)

    def add(self, vectors):
        self.vectors = np.concatenate([self.vectors, vectors])

    def search(self, queries, count):
        similarity = queries @ self.vectors.T
        order = np.argsort(-similarity[:, ::-1], axis=1, kind="stable")[:, :count]
        places = len(self.vectors) - 1 - order
        return np.take_along_axis(similarity, places, 1), places


@pytest.mark.parametrize("block", [7, 2**22])
def test_faiss_where_it_is_installed_finds_the_same(monkeypatch, block):
    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(4, 5, generator=generator), torch.randn(31, 5, generator=generator)
    gallery[20:30] = gallery[:10]  # ties, none of which is cut off
    monkeypatch.setattr(ranking, "BLOCK", block)
    expected = nearest(query, gallery, 31)
    module = types.ModuleType("faiss")
    module.IndexFlatIP, module.__spec__ = Faiss, importlib.machinery.ModuleSpec("faiss", None)
    monkeypatch.setitem(sys.modules, "faiss", module)
    found = nearest(query, gallery, 31)
    assert torch.equal(found[1], expected[1]) and torch.allclose(found[0], expected[0], atol=1e-6)


@pytest.mark.parametrize("block", [12, 2**22])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_faiss_keeps_the_earlier_of_pictures_that_tie_for_the_last_place(monkeypatch, block, count):
    query = torch.eye(3)[:2]
    gallery = torch.eye(3)[[2, 0, 0, 1, 0, 0, 1, 1, 2, 0, 1]]
    monkeypatch.setattr(ranking, "BLOCK", block)
    monkeypatch.setattr(ranking, "find_spec", lambda name: None)
    expected = nearest(query, gallery, count)
    assert expected[1][0, :5].tolist() == [1, 2, 4, 5, 9][:count]
    monkeypatch.setattr(ranking, "find_spec", lambda name: object())
    module = types.ModuleType("faiss")
    module.IndexFlatIP = Faiss
    monkeypatch.setitem(sys.modules, "faiss", module)
    found = nearest(query, gallery, count)
    assert torch.equal(found[1], expected[1]) and torch.equal(found[0], expected[0])
