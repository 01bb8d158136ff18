"""Re-identification: batches of P×K pictures, its loss and metric, floors, folders, searches, stores and exports."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import miniature
from provenn.core.errors import UserError
from provenn.inference.onnx import portable_system
from provenn.nn.embedding import EmbeddingNetwork, batch_hard_triplet, keep_last_map_fine
from provenn.nn.resnet import BasicBlock, ResNet
from provenn.tasks import TaskData, get_task, re_identification
from provenn.tasks.demos import Trial
from provenn.tasks.portable import standardise
from provenn.tasks.re_identification import FLOORS, Groups, Pictures, embeddings_of, erase, floors, move
from provenn.training import Recipe, fit

TASK = get_task("re-identification")
META = {"size": [16, 8], "mean": [0.5] * 3, "std": [0.25] * 3}


def network(num_classes: int = 4) -> EmbeddingNetwork:
    torch.manual_seed(0)
    backbone = ResNet(BasicBlock, (1, 1), widths=(4, 8), stem="small", num_classes=0)
    return EmbeddingNetwork(keep_last_map_fine(backbone), num_classes)


class Coarse(nn.Module):
    """The picture itself in 4×2 cells: embeds without learning."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, (4, 2)).flatten(1) + 1e-3


def pictures(identities, cameras, queries, seed=0) -> Pictures:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (len(identities), 3, 16, 8), dtype=torch.uint8, generator=generator)
    columns = (torch.tensor(column) for column in (identities, cameras, queries))
    return Pictures(images, *columns, META)


@pytest.fixture(scope="module")
def drawn() -> TaskData:
    return TASK.load("cameras")


def test_a_batch_has_p_identities_with_k_pictures_each(drawn):
    torch.manual_seed(0)
    images, labels = next(iter(DataLoader(drawn.train, batch_size=16, shuffle=True, collate_fn=drawn.collate)))
    assert images.shape == (64, 3, 64, 32) and labels.dtype == torch.int64
    assert len(labels.unique()) == 16 and (labels.bincount()[labels.unique()] == 4).all()
    assert len(drawn.train) == drawn.options["num_classes"] == 60, "an epoch is every identity once"


def test_pictures_of_a_group_are_its_identitys_and_few_are_used_up_before_one_comes_twice():
    groups = Groups(pictures([5, 5, 5, 9, -1], [0, 1, 2, 0, 1], [False] * 5), 5, augmentation="none", erasing=0)
    assert len(groups) == 2, "who is nobody is not learned"
    images, labels = groups[0]
    own = torch.stack([groups.pictures[row][0] for row in range(3)])
    counts = (images[:, None] == own).flatten(2).all(2).sum(0)
    assert sorted(counts.tolist()) == [1, 2, 2] and labels.tolist() == [0] * 5
    images, labels = groups[1]
    assert (images == groups.pictures[3][0]).all() and labels.tolist() == [1] * 5


def test_what_is_drawn_follows_from_the_seed():
    groups = Groups(pictures([1] * 8, [0] * 8, [False] * 8))
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(groups[0][0])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_random_erasing_covers_a_rectangle_of_a_fiftieth_to_two_fifths():
    torch.manual_seed(0)
    shares = []
    for _ in range(200):
        erased = erase(torch.ones(3, 64, 32)) == 0
        assert torch.equal(erased[0], erased[1]) and torch.equal(erased[0], erased[2])
        rows, columns = erased[0].any(1).nonzero(), erased[0].any(0).nonzero()
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert int(erased[0].sum()) == int(area), "a rectangle"
        shares.append(float(erased[0].float().mean()))
    assert min(shares) > 0.015 and max(shares) < 0.42 and np.mean(shares) > 0.12
    groups = Groups(pictures([1] * 4, [0] * 4, [False] * 4), augmentation="none", erasing=0)
    assert (groups[0][0] != 0).all(), "and none without it"
    assert (erase(torch.ones(3, 1, 1)) == 1).all(), "nothing fits into one pixel"


def test_a_moved_picture_is_the_same_one_elsewhere():
    torch.manual_seed(0)
    image = torch.randint(1, 256, (3, 64, 32), dtype=torch.uint8)
    seen = {tuple(move(image)[0].eq(0).sum((0, 1)).flatten().tolist()) for _ in range(20)}
    assert len(seen) > 3
    moved = move(image)
    inner = moved[:, 4:-4, 4:-4]
    found = [
        (y, x) for y in range(64 - 55) for x in range(32 - 23) if torch.equal(image[:, y : y + 56, x : x + 24], inner)
    ]
    assert len(found) == 1


def test_the_loss_is_smoothed_cross_entropy_and_the_triplet_loss_of_the_features():
    model = network().train()
    images, labels = torch.randn(8, 3, 16, 8), torch.arange(4).repeat_interleave(2)
    outputs = model(images)
    log = outputs.logits.log_softmax(1)
    entropy = -(0.9 * log[torch.arange(8), labels] + 0.1 * log.mean(1)).mean()
    expected = entropy + batch_hard_triplet(outputs.features, labels, 0.3)
    assert torch.allclose(TASK.loss(network().train(), (images, labels), 0.1), expected, atol=1e-6)
    wide = network().train()
    wide.margin = 2.0
    assert TASK.loss(wide, (images, labels)) > TASK.loss(network().train(), (images, labels)) + 1
    with pytest.raises(UserError, match=r"Coarse gives no features, embeddings and logits"):
        TASK.loss(Coarse(), (images, labels))


def test_metrics_are_those_of_the_ranking_and_resampled_over_queries():
    dataset = pictures([1, 1, 2, 2, 1, 3, -1], [0, 1, 0, 1, 2, 0, 1], [True, False, True, False, False, True, False])
    scores = TASK.scores(Coarse(), dataset, batch_size=3)
    assert {len(column) for column in scores.values()} == {2}, "the third query has nobody to find"
    embeddings = Coarse()(torch.stack([dataset[row][0] for row in range(7)]))
    normal = nn.functional.normalize(embeddings)
    similarity = normal[0] @ normal[[1, 3, 4]].T  # of the first query: junk is left out
    order = [(1, 2, 1)[k] == 1 for k in similarity.argsort(descending=True).tolist()]
    hits = [sum(order[: place + 1]) / (place + 1) for place, right in enumerate(order) if right]
    assert scores["precision"][0] == pytest.approx(sum(hits) / 2)
    summary = TASK.summary(scores)
    assert summary["mAP"] == pytest.approx(scores["precision"].mean()) and set(summary) == {
        "mAP", "mINP", "rank-1", "rank-5", "rank-10"
    }  # fmt: skip
    assert TASK.summary({name: column[:1] for name, column in scores.items()})["mAP"] == scores["precision"][0]


def test_a_gallery_without_anyone_to_find_is_said():
    with pytest.raises(UserError, match="none of 1 queries has a picture of its identity from another camera"):
        TASK.scores(Coarse(), pictures([1, 1, 2], [0, 0, 1], [True, False, False]))


def test_the_floors_are_those_that_stand_in_the_code(drawn):
    """What needs no learning, on the embedded test pictures: above a guess, and far from solved."""
    found = floors(drawn.test)
    assert found == pytest.approx(FLOORS, abs=0.005)
    test = drawn.test
    guess = torch.randn(len(test), 8, generator=torch.Generator().manual_seed(0))
    ranking = re_identification._ranked(guess, test.identities, test.cameras, test.queries)
    assert ranking.summary()["mAP"] < 0.5 * found["mean colour"] and found["mean colour"] < 0.2
    assert TASK.dummy_baseline(drawn) == max(found.values())


def test_the_embedded_splits_share_no_picture_and_no_identity(drawn):
    train = drawn.train.pictures
    people = [set(part.identities.tolist()) for part in (train, drawn.val, drawn.test)]
    assert not (people[0] & people[1] or people[0] & people[2] or people[1] & people[2])
    assert "4.2" not in drawn.about and train.meta == drawn.test.meta == drawn.meta
    held_out = TASK.held_out("cameras", {**drawn.meta, "size": [32, 16]}).dataset
    assert held_out[0][0].shape == (3, 32, 16), "at the size that weights know"


def test_a_small_network_learns_and_a_run_is_repeatable():
    data = TASK.load("cameras", height=16, width=8, erasing=0.0)
    few = torch.arange(len(data.test)) % 32 < 12
    test = data.test
    small = Pictures(test.images[few], test.identities[few], test.cameras[few], test.queries[few], data.meta)
    data = TaskData("few", data.train, small, small, "x", data.options, data.meta, data.collate)
    recipe = Recipe(epochs=6, batch_size=15, lr=1e-2, label_smoothing=0.1)
    first, second = (fit(lambda: network(60), TASK, data, recipe, seed=1) for _ in range(2))
    assert first.metrics == second.metrics and first.steps == 24
    assert first.series("train_loss")[-1] < first.series("train_loss")[0] - 0.3


@pytest.mark.parametrize("name", ["market-1501", "msmt17"])
def test_folders_are_read_and_validated_with_identities_of_their_own(tmp_path, name):
    data = TASK.load(miniature.write(name, tmp_path), height=16, width=8)
    train, val = data.train.pictures, data.val
    held = {"market-1501": 1, "msmt17": 2}[name]  # held out here, or as the lists say
    assert len(data.train) == data.options["num_classes"] == {"market-1501": 3, "msmt17": 3}[name]
    assert len(val.identities.unique()) == held and not set(val.identities.tolist()) & set(train.identities.tolist())
    assert val.queries.any() and data.test.queries.sum() == 4
    scores = TASK.scores(Coarse(), data.test)
    assert len(scores["precision"]) == 4
    if name == "market-1501":
        assert (data.test.identities == -1).sum() == 1
        assert TASK.load(tmp_path / name, height=16, width=8, seed=1).fingerprint != data.fingerprint


def test_pictures_are_seen_upright_or_square(tmp_path):
    root = miniature.write("market-1501", tmp_path)
    assert TASK.load(root).meta["size"] == [256, 256]
    for file in root.rglob("*.jpg"):
        Image.new("RGB", (8, 16)).save(file)
    assert TASK.load(root).meta["size"] == [256, 128]


def plain(root: Path, *, people: int = 8) -> Path:
    """identity/camera/*.png: a colour for each identity, a brightness for each camera."""
    rng = np.random.default_rng(0)
    for person in range(people):
        colour = rng.integers(0, 256, (4, 2, 3)).repeat(4, 0).repeat(4, 1)
        for camera in range(2):
            for shot in range(2):
                file = root / f"p{person}" / f"c{camera}" / f"{shot}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                noisy = colour * (1 - 0.3 * camera) + rng.normal(0, 4, colour.shape)
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file)
    return root


def test_all_of_a_plain_folder_is_judged_where_nothing_was_trained_on_it(tmp_path):
    root = plain(tmp_path / "people")
    every, part = (TASK.held_out(root, META, whole=whole).dataset for whole in (True, False))
    assert len(every.identities.unique()) == 8 and len(part.identities.unique()) == 4
    assert TASK.evaluate(Coarse(), every)["rank-1"] == 1.0
    assert len(TASK.load(root, height=16, width=8).train) == 3


@pytest.mark.parametrize(
    "options, said",
    [
        ({"height": 16}, "give height and width together"),
        ({"height": 4, "width": 4}, "height must be from 8 to 4096"),
        ({"per_identity": 1}, "per_identity must be at least 2"),
        ({"erasing": 1.5}, "erasing must be a probability"),
        ({"augmentation": "flip"}, "one of full, move, none, got 'flip'"),
        ({"val_share": 0.5}, "val_share"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        TASK.load(plain(tmp_path / "people"), **options)


def test_too_few_identities_are_refused(tmp_path):
    with pytest.raises(UserError, match="expected at least 3, and one by two cameras"):
        TASK.load(plain(tmp_path / "people", people=4))
    with pytest.raises(UserError, match="no data at 'nowhere'"):
        TASK.load("nowhere")


def test_a_damaged_picture_is_named_before_training(tmp_path):
    root = plain(tmp_path / "people")
    (root / "p0/c0/0.png").write_bytes((root / "p0/c0/0.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"p0.c0.0.png is damaged"):
        TASK.load(root)


@pytest.fixture
def searched(tmp_path) -> tuple[Path, Path]:
    """A gallery of seven people's pictures by one camera, and a query of the third by the other."""
    root = plain(tmp_path / "people", people=7)
    query = tmp_path / "query.png"
    (root / "p2/c1/0.png").rename(query)
    return root, query


def test_a_query_finds_whom_it_shows_and_writes_a_sheet_and_a_table(searched, tmp_path):
    root, query = searched
    said = TASK.predict(Coarse(), META, [query], tmp_path / "found", gallery=root, count=3)
    rows = list(csv.DictReader((tmp_path / "found/ranking.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2", "3"] and {row["query"] for row in rows} == {str(query)}
    assert all("p2" in row["file"] for row in rows), "its three other pictures"
    values = [float(row["similarity"]) for row in rows]
    assert values == sorted(values, reverse=True) and values[0] > 0.9 and "ranking.png" in said
    with Image.open(tmp_path / "found/ranking.png") as sheet:
        assert sheet.height < 160 and sheet.width > 4 * 60
    assert "p2" not in said or str(query) in said
    TASK.predict(Coarse(), META, [query], tmp_path / "one.csv", gallery=root)
    assert len((tmp_path / "one.csv").read_text().splitlines()) == 11
    TASK.predict(Coarse(), META, [query, query], tmp_path / "two.png", gallery=root)
    with Image.open(tmp_path / "two.png") as sheet:
        assert sheet.height > 250


def test_a_query_does_not_find_itself(searched):
    root, _ = searched
    said = TASK.predict(Coarse(), META, [root / "p0/c0/0.png"], None, gallery=root, count=30)
    assert said.count("0.png 1.000") == 0 or "p0/c0/0.png: 1.png" in said


def test_no_query_is_refused_and_a_copy_of_the_query_is_found(searched, tmp_path):
    with pytest.raises(UserError, match="a search needs a query"):
        TASK.predict(Coarse(), META, [], None, gallery=searched[0])
    for name in ("a query.png", "gal lery/its copy.png", "gal lery/another copy.png", "gal lery/other.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shown = "p1/c0/0.png" if name.endswith("other.png") else "p0/c0/0.png"
        (tmp_path / name).write_bytes((searched[0] / shown).read_bytes())
    (tmp_path / "link").symlink_to(tmp_path / "gal lery", target_is_directory=True)
    for gallery in ("gal lery", "link"):
        said = TASK.predict(Coarse(), META, [tmp_path / "a query.png"], None, gallery=tmp_path / gallery)
        assert "another copy.png 1.000, its copy.png 1.000, other.png" in said
    said = TASK.predict(Coarse(), META, [tmp_path / "gal lery/other.png"], None, gallery=tmp_path / "link")
    assert "other.png" not in said.split(": ", 1)[1], "through the link it is the same file"


def test_embeddings_are_kept_and_those_of_another_network_refused(searched, tmp_path, monkeypatch):
    root, query = searched
    store, model = tmp_path / "gallery.npz", network().eval()
    first = TASK.predict(model, META, [query], None, gallery=root, store=store)
    asked = []
    read = re_identification.read_pixels
    monkeypatch.setattr(re_identification, "read_pixels", lambda file: asked.append(file) or read(file))
    assert TASK.predict(model, META, [query], None, gallery=root, store=store) == first
    assert TASK.predict(model, META, [query], None, store=store) == first
    assert asked == [query, query], "the gallery is not looked at again"
    other = network().eval()
    with torch.no_grad():
        other.neck.weight[0] += 1
    with pytest.raises(UserError, match="holds embeddings of another network"):
        TASK.predict(other, META, [query], None, store=store)
    with pytest.raises(UserError, match="or of pictures at another size"):
        TASK.predict(model, {**META, "size": [32, 16]}, [query], None, store=store)
    (root / "p0/c0/0.png").unlink()
    with pytest.raises(UserError, match="0 that it lacks, and 1 are gone"):
        TASK.predict(model, META, [query], None, gallery=root, store=store)
    said = TASK.predict(model, META, [query], tmp_path / "a.png", store=store, count=27)
    assert "of 1 of its pictures the files are gone" in said


def test_embed_has_an_embedding_of_length_one_for_each_picture(searched):
    root, _ = searched
    model = network().eval()
    store = TASK.embed(model, META, root, batch_size=5)
    assert store.files[0] == "p0/c0/0.png" and len(store.files) == 27 == len(store.embeddings)
    one = nn.functional.normalize(model(TASK.example(root / store.files[7], META)).embeddings)
    assert torch.allclose(one[0], store.embeddings[7], atol=1e-5)


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "a search needs a gallery: give the folder of its pictures with --gallery"),
        ({"store": "new.npz"}, "new.npz is not there yet: give the folder"),
        ({"store": "new.csv"}, "embeddings are kept in .npz or .parquet"),
        ({"gallery": "empty"}, "empty holds no images"),
        ({"gallery": "query.png"}, "query.png is no folder"),
        ({"gallery": "people", "count": 0}, "count must be at least 1"),
        ({"gallery": "alone"}, "holds the query alone"),
    ],
)
def test_searches_that_cannot_be_are_refused(searched, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("alone").mkdir()
    Path("query.png").rename("alone/query.png")
    Path("query.png").symlink_to("alone/query.png")
    given = {name: value if name == "count" else Path(value) for name, value in options.items()}
    with pytest.raises(UserError, match=said):
        TASK.predict(Coarse(), META, [Path("query.png")], None, **given)
    assert not Path("new.npz").exists()


@pytest.mark.parametrize("output, said", [("a.txt", "expected .csv, a folder, or one of"), ("query.png", "input")])
def test_outputs_that_cannot_be_are_refused_before_anything_is_written(searched, tmp_path, output, said):
    root, query = searched
    before = query.read_bytes()
    with pytest.raises(UserError, match=said):
        TASK.predict(Coarse(), META, [query], tmp_path / output, gallery=root)
    assert query.read_bytes() == before
    with pytest.raises(UserError, match=r"0\.png: it is the input itself"):
        TASK.predict(Coarse(), META, [query], root / "p0/c0/0.png", gallery=root)


def test_pictures_of_one_pixel_and_grey_ones_are_seen(tmp_path):
    for name, image in (("a.png", Image.new("RGB", (1, 1), "red")), ("b.png", Image.new("L", (3, 1), 90))):
        image.save(tmp_path / name)
    store = TASK.embed(Coarse(), META, tmp_path)
    assert store.embeddings.isfinite().all()
    assert TASK.predict(Coarse(), META, [tmp_path / "a.png"], tmp_path / "out.png", gallery=tmp_path)


def test_the_exported_form_is_the_prediction():
    portable = TASK.portable(network().eval(), META)
    image = portable.example["image"]
    assert image.shape == (2, 3, 16, 8)
    assert portable.open_sizes == {"image": {0: "batch", 2: "height", 3: "width"}}
    with torch.no_grad():
        embedding = portable.system(**portable.example)
        assert torch.allclose(embedding, portable.predict(image), atol=1e-6)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=1e-5)


class OfOneSize(nn.Module):
    """Positions for pictures of 16×8 pixels alone, as attention with learned weights over places has them."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images * self.places, (4, 2)).flatten(1)


@pytest.mark.parametrize(
    "model, sizes", [(network, "any batch, height"), (OfOneSize, "any batch; fixed: height 16 and")]
)
def test_an_exported_file_embeds_other_sizes_as_the_model_or_refuses_them(tmp_path, model, sizes):
    runtime, system = pytest.importorskip("onnxruntime"), model().eval()
    file = tmp_path / "a.onnx"
    lines = portable_system(system, TASK, META, file, {})
    session = runtime.InferenceSession(file)
    said = session.get_modelmeta().custom_metadata_map["sizes"]
    assert said.startswith(sizes) and said in lines
    for batch, height, width in ((1, 16, 8), (5, 16, 8), (1, 37, 13), (2, 21, 64)):
        image = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height))
        if "fixed" in said and (height, width) != (16, 8):
            with pytest.raises(Exception, match=rf"Got: {height} Expected: 16"):
                session.run(None, {"image": image.numpy()})
            continue
        with torch.no_grad():
            expected = nn.functional.normalize(embeddings_of(system(standardise(image, META))))
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), expected, rtol=1e-3, atol=1e-5
        )


def test_the_form_in_the_browser_searches_the_embedded_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 16), "green").save("given.png")
    found = re_identification.answer(Trial(TASK, network().eval(), META, Path("given.png"), {}, print))
    assert found["kind"] == "drawing" and found["size"] == Image.open("drawing.png").size


def test_a_picture_of_the_test_is_drawn():
    dataset = pictures([1, 1, 2, 2, 1, 2], [0, 1, 0, 1, 2, 2], [True, False, True, False, False, False])
    data = TaskData("few", dataset, dataset, dataset, "x", meta=META)
    assert len(TASK.picture(Coarse(), data).axes) == 18


def test_some_pictures_are_chosen_of_memory_and_of_files():
    meta, numbers = {"size": [64, 32]}, torch.arange(4)
    chosen = numbers % 2 == 1
    for images in (
        torch.zeros(4, 3, 8, 4, dtype=torch.uint8) + numbers[:, None, None, None].byte(),
        [*map(Path, "abcd")],
    ):
        some = Pictures(images, numbers, numbers + 10, numbers > 2, meta).some(chosen)
        assert len(some) == 2 and some.identities.tolist() == [1, 3] and some.cameras.tolist() == [11, 13]
        assert some.queries.tolist() == [False, True] and some.meta is meta
        assert [int(i[0, 0, 0]) if isinstance(i, torch.Tensor) else "abcd".index(i.name) for i in some.images] == [1, 3]


@pytest.fixture
def sequence(tmp_path) -> tuple[Path, Path]:
    """Twelve frames with two strangers each; the user is in all but the fourth, fifth and eleventh, which is empty."""
    root = plain(tmp_path / "people", people=7)
    for number in range(12):
        frame = tmp_path / "frames" / f"f{number}"
        frame.mkdir(parents=True)
        for person in (1, 4) if number != 10 else ():
            (frame / f"{person}.png").write_bytes((root / f"p{person}/c{number % 2}/{number % 2}.png").read_bytes())
        if number not in (3, 4, 10):
            (frame / "user.png").write_bytes((root / f"p2/c{number % 2}/1.png").read_bytes())
    return root / "p2/c0/0.png", tmp_path / "frames"


def test_a_user_is_followed_through_a_sequence(sequence, tmp_path, monkeypatch):
    user, frames = sequence
    said = TASK.predict(Coarse(), META, [user], tmp_path / "out", sequence=frames, threshold=0.6)
    assert said.startswith("found in 9 of 12 frames; lost for longest from f3 to f4")
    rows = list(csv.DictReader((tmp_path / "out/following.csv").open()))
    assert [row["frame"] for row in rows if row["user"] == "1"] == [f"f{i}" for i in range(12) if i not in (3, 4, 10)]
    assert all(row["crop"] == "user.png" and row["rank"] == "1" for row in rows if row["user"] == "1")
    assert [row["crop"] for row in rows if row["frame"] == "f10"] == [""]
    ranked = [float(row["similarity"]) for row in rows if row["frame"] == "f0"]
    assert len(ranked) == 3 and ranked == sorted(ranked, reverse=True)
    with Image.open(tmp_path / "out/following.png") as sheet:
        assert sheet.height == 148 and sheet.width > 13 * 40
        assert {(42, 143, 60), (176, 0, 32)} <= {colour for _, colour in sheet.getcolors(10**6)}
    whole = (tmp_path / "out/following.csv").read_text()
    monkeypatch.setattr("provenn.tasks.following.TOGETHER", 4)
    monkeypatch.setattr("provenn.tasks.following.SHOWN", 3)
    assert "with 3 of 12 frames" in TASK.predict(
        Coarse(), META, [user], tmp_path / "two", sequence=frames, threshold=0.6
    )
    assert (tmp_path / "two/following.csv").read_text() == whole


def test_what_stays_of_the_memory_and_the_least_cosine_are_options(sequence, tmp_path):
    user, frames = sequence
    assert TASK.predict(Coarse(), META, [user], None, sequence=frames, threshold=-1) == (
        "found in 11 of 12 frames; lost for longest from f10 to f10"
    )
    assert TASK.predict(Coarse(), META, [user], None, sequence=frames, threshold=1.0).startswith("found in 0 of")
    tables = []
    for momentum in (None, 0.9, 1.0):
        TASK.predict(Coarse(), META, [user], tmp_path / "t.csv", sequence=frames, threshold=0.6, momentum=momentum)
        tables.append((tmp_path / "t.csv").read_text())
    assert tables[0] == tables[1] != tables[2], "0.9 is the default"


@pytest.mark.parametrize(
    "options, said",
    [
        ({"gallery": Path(".")}, "gallery is for a search in a gallery, and a sequence was given"),
        ({"count": 3}, "count is for a search"),
        ({"threshold": 2.0}, "threshold must be from -1 to 1, got 2.0"),
        ({"momentum": float("nan")}, "momentum must be from 0 to 1, got nan"),
    ],
)
def test_a_sequence_takes_options_of_its_own(sequence, options, said):
    user, frames = sequence
    with pytest.raises(UserError, match=said):
        TASK.predict(Coarse(), META, [user], None, sequence=frames, **options)
    with pytest.raises(UserError, match="momentum is for following a user in a sequence: give --sequence"):
        TASK.predict(Coarse(), META, [user], None, gallery=frames, momentum=0.5)
    with pytest.raises(UserError, match="input"):
        TASK.predict(Coarse(), META, [user], frames / "f0/user.png", sequence=frames)


def test_what_is_held_out_of_the_embedded_pictures_is_the_test_split(drawn):
    held = TASK.held_out("cameras", drawn.meta).dataset
    assert torch.equal(held.images, drawn.test.images) and torch.equal(held.identities, drawn.test.identities)
    assert torch.equal(held.queries, drawn.test.queries) and not torch.equal(held.images[:9], drawn.val.images[:9])
