"""Image-text retrieval: batches, scores by fold, both kinds of systems, folders, searches, and the exported form."""

import csv

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.data.vocabulary import SPECIAL
from provenn.tasks import TaskData, get_task
from provenn.tasks.image_text_retrieval import (
    CaptionPairs,
    Gallery,
    Pairs,
    draw_scores,
    evaluated,
    floors,
    join_pairs,
    similarities,
)
from provenn.tasks.matching import match
from provenn.training import Recipe, fit

TASK = get_task("image-text-retrieval")
WORDS = [*SPECIAL, "dark", "light", "red"]
META = {"words": WORDS, "pad": 0, "longest": 8, "size": 16, "features": 0, "mean": [0.5] * 3, "std": [0.25] * 3}


class Embeds(nn.Module):
    """An embedding of mean colours, and of words."""

    def __init__(self, vocab_size=9, width=3, **_):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(width, 4), nn.Embedding(vocab_size, 4)

    def encode_images(self, images, regions):
        if images.ndim == 4:
            return self.image(images.mean((2, 3)))
        return self.image((images * regions[..., None]).sum(1) / regions.sum(1, keepdim=True))

    def encode_texts(self, tokens, words):
        return (self.text(tokens) * words[..., None]).sum(1)

    def training_loss(self, batch):
        images, texts = self.encode_images(batch.images, batch.regions), self.encode_texts(batch.tokens, batch.words)
        logits = nn.functional.normalize(images) @ nn.functional.normalize(texts).T
        return nn.functional.cross_entropy(10 * logits, torch.arange(len(logits)))


class Crosses(Embeds):
    """Every word looks at every image: no embedding of one vector."""

    def encode_texts(self, tokens, words):
        return self.text(tokens), words

    def similarity(self, images, texts):
        tokens, words = texts
        return torch.einsum("id,tld,tl->it", images, tokens, words.float()) / words.sum(1)


def gallery(count=6, captions=2, folds=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    draw = torch.randint(6, 9, (count, captions, 3), generator=generator)
    tokens = [[[1, *text[: 1 + k % 3].tolist(), 2] for k, text in enumerate(texts)] for texts in draw]
    return Gallery(images, tokens, META, folds=folds)


@pytest.fixture(scope="module")
def data():
    return TASK.load("composed", examples=40)


def test_a_batch_has_images_with_a_caption_each(data):
    batch = next(iter(DataLoader(data.train, batch_size=6, collate_fn=data.collate)))
    assert isinstance(batch, Pairs) and batch.images.shape == (6, 3, 64, 64) and batch.regions.all()
    assert batch.numbers.tolist() == [0, 0, 0, 0, 0, 1] and len(data.train) == 5 * 40
    assert batch.tokens.shape == batch.words.shape and batch.words.any(0).all(), "no column is padding alone"
    assert (batch.tokens[~batch.words] == data.meta["pad"]).all() and (batch.words.sum(1) > 6).all()


@pytest.mark.parametrize("kind", [Embeds, Crosses])
def test_ranks_are_those_of_the_whole_table_within_each_fold(kind):
    model, whole = kind().eval(), gallery(folds=2)
    with torch.no_grad():
        scores = TASK.scores(model, whole, batch_size=4)
        for fold in (0, 1):
            rows = range(3 * fold, 3 * fold + 3)
            images = torch.stack([whole.image(row)[0] for row in rows])
            table = torch.empty(3, 6)
            for column, text in enumerate(text for row in rows for text in whole.tokens[row]):
                told = model.encode_texts(torch.tensor([text]), torch.ones(1, len(text), dtype=torch.bool))
                seen = model.encode_images(images, torch.ones(3, 1, dtype=torch.bool))
                table[:, column] = (
                    model.similarity(seen, told)[:, 0]
                    if kind is Crosses
                    else nn.functional.cosine_similarity(seen, told)
                )
            found, owners = similarities(model, whole, rows)
            torch.testing.assert_close(found, table)
            expected = match(found, owners)
            assert scores["text_rank"][rows].tolist() == expected.text_rank.tolist()
            assert scores["image_rank"][rows].tolist() == expected.image_rank.tolist()
    summary = TASK.summary(scores)
    assert summary["rsum"] == pytest.approx(sum(value for name, value in summary.items() if name != "rsum"))
    with pytest.raises(UserError, match="6 images cannot be judged in 4 folds of equal size"):
        TASK.scores(model, gallery(folds=4))


def test_training_lowers_the_systems_own_loss():
    parts = CaptionPairs(gallery(16)), gallery(6, seed=1), gallery(6, seed=2)
    drawn = TaskData("noise", *parts, "x", {}, META, join_pairs(0))
    done = fit(Embeds, TASK, drawn, Recipe(epochs=20, batch_size=8, lr=0.02))
    assert done.curve[-1]["train_loss"] < 0.8 * done.curve[0]["train_loss"]
    assert set(done.metrics) == {"rsum", *(f"{way}_r{k}" for way in ("text", "image") for k in (1, 5, 10))}


def test_a_system_that_lacks_a_part_is_told_so():
    with pytest.raises(UserError, match=r"Linear has no training_loss\(batch\): this task leaves the loss"):
        TASK.loss(nn.Linear(1, 1), ())
    with pytest.raises(UserError, match="Linear has no encode_images"):
        TASK.scores(nn.Linear(1, 1), gallery())
    model = Crosses()
    model.similarity = None
    with pytest.raises(UserError, match="encodes to no embeddings of one vector each"):
        TASK.scores(model, gallery())


def test_colours_and_words_are_above_chance_and_far_from_solved():
    found = floors(TASK.load("composed", examples=1000))
    assert 0.02 < found["chance"] < 0.05 and 1.2 * found["chance"] < found["colours and words"] < 0.5


@pytest.fixture
def root(tmp_path):
    rows = []
    for number in range(12):
        level = 40 if number % 2 else 200
        pixels = np.random.default_rng(number).integers(level - 20, level + 20, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows += [f"{number}.png,a {'dark' if number % 2 else 'light'} picture", f"{number}.png,it is number {number}"]
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    return tmp_path


def test_a_folder_is_split_by_images_and_its_rare_words_are_unknown(root):
    data = TASK.load(root, size=16, at_least=2, val_share=0.2)
    assert (len(data.train.gallery), len(data.val), len(data.test)) == (8, 2, 2)
    assert {"dark", "light", "picture"} <= set(data.meta["words"]) and "7" not in data.meta["words"]
    files = [set(part.images) for part in (data.train.gallery, data.val, data.test)]
    assert not files[0] & files[1] and not files[0] & files[2] and not files[1] & files[2]
    held_out = TASK.held_out(root, data.meta)
    assert len(held_out.dataset) == 12 and "all of" in held_out.about
    assert len(TASK.held_out(root, data.meta, whole=False).dataset) == 2
    assert 0 <= TASK.evaluate(Embeds(**data.options).eval(), data.test)["rsum"] <= 6


def test_texts_that_are_cut_are_said(root, capsys):
    with progress.shown():
        TASK.load(root, size=16, longest=5)
        assert "of 16 captions have more than 3 words, and the rest is not read, such as 'it is number" in (
            capsys.readouterr().err
        )
        TASK.predict(Embeds(), META, ["dark " * 7], None, gallery=root)
        assert "1 of 1 texts have more than 6 words" in capsys.readouterr().err
        TASK.predict(Embeds(), META, ["dark " * 6], None, gallery=root)
        assert "of 1 texts" not in capsys.readouterr().err
        file = root / "looked into.txt"
        file.write_text("dark " * 7)
        TASK.example(file, META)
        assert "1 of 1 texts have more than 6 words" in capsys.readouterr().err


def test_features_have_lengths_and_fit_no_weights_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 8), ("dev", 3), ("test", 4)):
        np.save(tmp_path / f"{name}_ims.npy", rng.random((count, 3, 5), dtype=np.float32))
        np.save(tmp_path / f"{name}_lens.npy", rng.integers(1, 4, count))
        (tmp_path / f"{name}_caps.txt").write_text("a red disc\n" * (2 * count))
    data = TASK.load(tmp_path, folds=2)
    assert data.options["features"] == 5 and data.test.folds == 2
    batch = next(iter(DataLoader(data.train, batch_size=16, collate_fn=data.collate)))
    lengths = np.load(tmp_path / "train_lens.npy")
    assert batch.regions.sum(1).tolist() == lengths.repeat(2).tolist()
    model = Embeds(len(data.meta["words"]), 5).eval()
    assert TASK.evaluate(model, data.test)["rsum"] > 0 and TASK.dummy_baseline(data) > 0
    assert TASK.picture(model, data) is not None
    for ask in (lambda: TASK.predict(model, data.meta, ["a"], None), lambda: TASK.portable(model, data.meta)):
        with pytest.raises(
            UserError, match="these weights take features of 5 numbers for each region, and no pictures"
        ):
            ask()
    with pytest.raises(UserError, match="the data are features of 5 numbers; these weights take pictures"):
        TASK.held_out(tmp_path, META)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": 0}, "captions must be at least 1, got 0"),
        ({"size": 32}, "composed scenes have 64×64 pixels: leave size out, got 32"),
        ({"folds": 3, "examples": 5}, "1000 images cannot be judged in 3 folds of equal size"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TASK.load("composed", **options)


def rows_of(file):
    return list(csv.DictReader(file.open()))


@pytest.mark.parametrize("kind", [Embeds, Crosses])
def test_a_text_ranks_pictures_and_a_picture_ranks_texts(root, kind, capsys):
    model, pictures = kind().eval(), root / "pictures"
    pictures.mkdir()
    for number in range(4):
        (root / f"{number}.png").rename(pictures / f"{number}.png")
    said = TASK.predict(model, META, ["dark red"], root / "found", gallery=pictures, count=3)
    ranked = rows_of(root / "found" / "ranking.csv")
    assert [row["rank"] for row in ranked] == ["1", "2", "3"] and "ranking.png" in said
    values = [float(row["similarity"]) for row in ranked]
    assert values == sorted(values, reverse=True) and Image.open(root / "found" / "ranking.png").size[1] > 100
    (root / "texts.txt").write_text("dark\n\nlight red\nred\n")
    said = TASK.predict(model, META, [str(pictures / "0.png")], root / "texts.csv", texts=root / "texts.txt")
    there = {row["text"]: float(row["similarity"]) for row in rows_of(root / "texts.csv")}
    assert set(there) == {"dark", "light red", "red"} and "'red'" in said
    # One and the same pair has one and the same score, asked from either side.
    other = TASK.predict(model, META, ["light red"], root / "o.csv", gallery=pictures)
    score = next(r for r in rows_of(root / "o.csv") if r["file"].endswith("0.png"))["similarity"]
    assert float(score) == pytest.approx(there["light red"], abs=2e-6) and other
    with progress.shown():
        TASK.predict(model, META, ["a green seven"], None, gallery=pictures)
    assert "does not know the words a, green, seven" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([], {}, "a search needs a query"),
        (["red"], {}, "a text is searched among pictures: give the folder of them with --gallery"),
        (["0.png"], {}, "a picture is searched among texts: give a file of them, one a line, with --texts"),
        (["red", "0.png"], {}, "the queries are texts and pictures: ask for one kind at a time"),
        (["none.png"], {}, "no file at none.png"),
        (["red"], {"gallery": "captions.csv"}, "captions.csv is no folder"),
        (["0.png"], {"texts": "empty.txt"}, "empty.txt holds no texts"),
        (["red"], {"gallery": ".", "count": 0}, "count must be at least 1, got 0"),
        (["red", "  "], {"gallery": "."}, "a query holds no words"),
        (["red"], {"gallery": ".", "texts": "empty.txt"}, "a text is searched among pictures: leave --texts out"),
        (["0.png"], {"gallery": ".", "texts": "empty.txt"}, "a picture is searched among texts: leave --gallery out"),
    ],
)
def test_searches_that_lack_something_are_refused(root, monkeypatch, inputs, options, message):
    from pathlib import Path

    monkeypatch.chdir(root)
    (root / "empty.txt").write_text("\n\n")
    options = {name: Path(value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(UserError, match=message):
        TASK.predict(Embeds(), META, inputs, None, **options)


@pytest.mark.parametrize("kind", [Embeds, Crosses])
def test_the_exported_system_scores_as_prediction_does(kind):
    portable = TASK.portable(kind().eval(), META)
    with torch.no_grad():
        scores = portable.system(**portable.example)
        torch.testing.assert_close(scores, portable.predict(**portable.example))
    assert scores.shape == (2, 3)


def test_the_picture_of_an_evaluation_has_queries_and_what_was_found():
    figure = evaluated(Embeds().eval(), gallery(8), {})
    assert len(figure.axes) == 6 * 6 + 1


def test_the_picture_of_a_large_evaluation_ranks_its_first_images_alone(monkeypatch):
    monkeypatch.setattr("provenn.tasks.image_text_retrieval.DRAWN", 4)
    model, seen = Embeds().eval(), []
    compared = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda *given: seen.append(len(given[0])) or compared(*given))
    assert sum(axes.has_data() for axes in evaluated(model, gallery(8), {}).axes) == 6 * 4 + 1 and seen == [4]


def test_scores_of_pairs_that_belong_together_are_drawn_beside_all_others():
    table, owners = torch.tensor([[0.9, 0.1, 0.2], [0.0, 0.8, 0.7]]), torch.tensor([0, 1, 1])
    for worse in (table, table.index_fill(1, torch.tensor([2]), float("nan"))):
        axes = Figure().subplots()
        draw_scores(axes, worse, owners)
        (own, edges, _), (other, _, _) = (patch.get_data() for patch in axes.patches)
        lost = int((~worse.isfinite()).sum())  # a third of own pairs and a third of the others
        assert own.sum() == other.sum() == pytest.approx(100 * (3 - lost / 2) / 3)
        middles = (edges[:-1] + edges[1:]) / 2
        assert middles[own > 0].min() > 0.6 and middles[other > 0].max() < 0.3
        assert ("2 are no numbers" in axes.get_xlabel()) == (lost == 2)
    draw_scores(axes, torch.full((2, 3), float("nan")), owners)  # of a training that diverged
    draw_scores(axes, torch.full((2, 3), 0.5), owners)


def test_an_example_is_a_picture_a_text_or_both(tmp_path):
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "said.txt").write_text("a dark red")
    plain = TASK.example(tmp_path / "red.png", META)
    both = TASK.example(tmp_path / "red.png", META, text="dark light")
    assert plain.shape == (1, 3, 16, 16) and torch.equal(both.image, plain)
    assert both.tokens.tolist() == [[1, 6, 7, 2]] and both.words == ("<start>", "dark", "light", "<end>")
    alone = TASK.example(tmp_path / "said.txt", META)
    assert alone.image is None and alone.words == ("<start>", "<unk>", "dark", "red", "<end>")
    with pytest.raises(UserError, match="the text is empty"):
        TASK.example(tmp_path / "red.png", META, text="  ")


def test_words_of_the_fields_files_stand_in_their_order(tmp_path):
    import json

    words = {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3, "dog": 4, "cat": 5}
    file = tmp_path / "vocab.json"
    file.write_text(json.dumps({"word2idx": words, "idx": 6}))
    meta = TASK.default_meta({"vocabulary": str(file), "vocab_size": 7, "features": 12})
    assert meta["words"] == [*words, "<mask>", "<image>"] and meta["features"] == 12 and meta["pad"] == 0
    with pytest.raises(UserError, match="has 7 words with <mask>, and the weights know 9"):
        TASK.default_meta({"vocabulary": str(file), "vocab_size": 9})
    for wrong in ({"words": []}, {"word2idx": {"<pad>": 0, "dog": 2}}, [1]):
        file.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="with a number for each word, without a gap"):
            TASK.default_meta({"vocabulary": str(file)})
    unnamed = TASK.default_meta({"vocab_size": 9})
    assert len(unnamed["words"]) == 9 and len(TASK.default_meta({})["words"]) == 72
    with pytest.raises(UserError, match="know 9 words and do not say which: give the file of the words"):
        TASK.held_out("composed", unnamed)
