"""Sequences of tokens in the layouts of Long Range Arena and GenomicsBenchmarks."""

import numpy as np
import pytest
import torch

import miniature
import provenn
from provenn.core.errors import UserError
from provenn.data.sequences import read_corpus
from provenn.tasks import get_task

TASK = get_task("series-classification")


@pytest.fixture
def arena(tmp_path):
    return miniature.write("lra", tmp_path)


def test_operations_are_read_without_the_brackets_that_tell_nothing(arena):
    corpus = read_corpus(arena / "listops")
    first, second = corpus.splits["train"].tokens[:2]
    assert len(first) == 4 and first[0] == second[0] and first[3] == second[3]  # [MAX a b ]
    assert first[1] == first[2] != second[1] == second[2], "0 and 0, then 1 and 1"
    assert corpus.splits["train"].labels[:3] == ["0", "1", "2"] and corpus.alphabet == 5
    (arena / "listops" / "basic_val.tsv").write_text("Source\tTarget\n[MAX 1 ]\n")
    with pytest.raises(UserError, match=r"basic_val.tsv, line 2: expected operations, a tab and their value"):
        read_corpus(arena / "listops")
    (arena / "listops" / "basic_test.tsv").unlink()
    (arena / "listops" / "basic_val.tsv").write_text("Source\tTarget\n[MAX 1 ]\t1\n")
    with pytest.raises(UserError, match=r"lacks basic_test.tsv"):
        read_corpus(arena / "listops")


def test_texts_are_bytes_and_nucleotides_letters(arena, tmp_path):
    corpus = read_corpus(arena / "text", most=10)
    assert corpus.alphabet == 256 and sorted(set(corpus.splits["train"].labels)) == ["neg", "pos"]
    assert {len(tokens) for tokens in corpus.splits["test"].tokens} == {10}
    text = (arena / "text" / "train" / "neg" / "0_7.txt").read_text()
    assert bytes(corpus.splits["train"].tokens[0]).decode() == text.strip()[:10]
    genes = read_corpus(miniature.write("genomics", tmp_path) / "human_nontata_promoters")
    assert genes.alphabet == 5 and genes.about == "nucleotides"
    assert all(set(t) <= {2, 3, 4} for t, label in zip(*vars(genes.splits["test"]).values()) if label == "negative")


def test_pairs_of_texts_are_read_by_the_same_blocks(arena):
    folder = arena / "retrieval"
    corpus = read_corpus(folder, most=6)
    assert corpus.paired and [len(part.labels) for part in corpus.splits.values()] == [12, 4, 4]
    first = corpus.splits["train"]
    assert (
        bytes(first.tokens[1]) == b"recurr" and bytes(first.others[0]) == b"need a" and first.labels[:2] == ["0", "1"]
    )
    data = TASK.load(folder)
    x, counts, label = data.train[1]
    assert x.shape == (2, 19, 256) and counts.tolist() == [18, 19] and label == 1 and data.options["pairs"]
    model = provenn.paper("hedgehog").build("hedgehog_classifier", **data.options, dim=8).eval()
    mask = torch.arange(19) < counts[:, None]
    whole = model(x[None], mask[None])
    other = x.clone()
    other[0, 18] = 1  # padding
    torch.testing.assert_close(model(other[None], mask[None]), whole)
    other[0, 17] = 1
    assert not torch.allclose(model(other[None], mask[None]), whole)
    a, b = (model._read(model.embed(part[None]), valid[None]) for part, valid in zip(x.flip(0), mask.flip(0)))
    swapped = model.head(torch.cat([a, b, a * b, a - b], 1))
    torch.testing.assert_close(model(x.flip(0)[None], mask.flip(0)[None]), swapped)
    with pytest.raises(ValueError, match=r"expected \(batch, 2, tokens, channels\)"):
        model(x, mask)
    with pytest.raises(UserError, match="holds pairs of sequences, the model was trained on single ones"):
        TASK.held_out(folder, {**data.meta, "pairs": False})
    (folder / "new_aan_pairs.eval.tsv").write_text("1.0\tP\tQ\tone text\n")
    with pytest.raises(UserError, match=r"eval.tsv, line 1: expected 0.0 or 1.0, two names and two texts"):
        read_corpus(folder)


def test_pixels_come_row_by_row(arena):
    image = read_corpus(arena / "image")
    assert len(image.splits["train"].tokens) == 100 and len(image.splits["test"].tokens[0]) == 1024
    path = read_corpus(arena / "pathfinder")
    assert [len(part.tokens) for part in path.splits.values()] == [16, 2, 2]
    bright = [np.mean(tokens) > 110 for tokens in path.splits["train"].tokens]
    assert bright == [label == "1" for label in path.splits["train"].labels]


def test_a_token_is_a_channel_of_its_own(arena):
    data = TASK.load(arena / "listops")
    x, count, label = data.train[1]
    assert x.shape == (4, 5) and count == 4 and label == 1 and bool((x.sum(1) == 1).all())
    assert data.options == {"channels": 5, "num_classes": 3, "length": 4}
    texts = TASK.load(arena / "text", longest=14)
    x, count, _ = texts.train[0]
    assert bool((x[int(count) :] == 0).all()) and x.shape == (14, 256)
    assert [len(part) for part in (texts.train, texts.val, texts.test)] == [10, 2, 4]
    assert TASK.dummy_baseline(texts) == 0.5
    held_out = TASK.held_out(arena / "text", texts.meta).dataset
    torch.testing.assert_close(held_out[2][0], texts.test[2][0])
    with pytest.raises(UserError, match="has 5 kinds of tokens, the model was trained on 256"):
        TASK.held_out(arena / "listops", texts.meta)
    with pytest.raises(UserError, match="longest must be at least 1 token, got 0"):
        TASK.load(arena / "text", longest=0)
    with pytest.raises(UserError, match="longest is of sequences of tokens"):
        TASK.load("japanese-vowels", longest=3)


def test_padding_changes_no_class():
    from provenn.papers.hedgehog.model import SequenceClassifier

    torch.manual_seed(0)
    model = SequenceClassifier(3, 4, 20).eval()
    x, mask = torch.randn(2, 9, 3), torch.arange(9) < torch.tensor([[5], [9]])
    other = torch.where(mask[..., None], x, 7.0)
    torch.testing.assert_close(model(x, mask), model(other, mask))
    torch.testing.assert_close(model(x, mask)[:1], model(x[:1, :5]))
    assert not torch.allclose(model(x), model(x.flip(1)))
    with pytest.raises(ValueError, match="at most 20 tokens, got 21"):
        model(torch.zeros(1, 21, 3))
