"""The registry of data sets: each in miniature is found, read by its task, and unlocks what the papers say."""

import inspect
import json
import os
import shlex

import numpy as np
import pytest
import torch

import miniature
from provenn import catalog
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.data.cifar import read_cifar
from provenn.data.text import Document, Words, read_tokenizer
from provenn.tasks import datasets, get_task
from provenn.training import check_recipe
from provenn.training.recipes import recipe_of

READ = [name for name, entry in datasets.known().items() if entry.task is not None]
AT_PAPER = [
    (card, experiment) for card in catalog.cards().values() for experiment in card.experiments if experiment.at_paper
]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty folder that PROVENN_DATA names second, after one that is not there."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("PROVENN_DATA", f"{tmp_path / 'nowhere'}{os.pathsep}{folder}")
    return folder


def options_for(name: str) -> dict:
    """What makes miniature windows fit miniature data."""
    kind = datasets.get(name).task
    small = {"series-forecasting": {"context": 8, "horizon": 4}, "language-modelling": {"length": 16}}.get(kind, {})
    return small | {
        "wikitext-103": {"tokenizer": "words"},
        "qmsum": {"length": 500},
        "wikitext-103-raw": {"tokenizer": "tokenizer.json"},
        "d4rl": {"environment": "Pendulum-v1"},
    }.get(name, {})


@pytest.mark.parametrize("name", READ)
def test_a_set_in_its_layout_is_found_and_read(name, data, monkeypatch):
    if name == "d4rl":
        pytest.importorskip("h5py")
    assert not datasets.find(name).there
    path = miniature.write(name, data)
    found = datasets.find(name)
    assert found.there, found.missing
    files = {
        "uea": "Handwriting",
        "iwslt14": "de-en",
        "lra": "listops",
        "glue": "MNLI",
        "genomics": "human_nontata_promoters",
        "iemocap": "Session2",
    }
    member = files.get(name, datasets.get(name).holds[-1] if name in ("ett", "forecasting", "events", "d4rl") else "")
    source = datasets.resolve(f"{name}/{member}" if member else name)
    task = get_task(datasets.get(name).task)
    if name in ("set5", "set14", "bsd100", "urban100", "manga109"):  # there is nothing in them to train on
        dataset = task.held_out(source.data, {}).dataset
        assert source.data == path / "HR" and [photo.shape for photo in dataset] == [(3, 64, 64)] * 2
        return
    if name == "questions":  # nor here
        meta = {"tokenizer": (path / "tokenizer.json").read_text(), "length": 64}
        counts = {part.name: len(task.held_out(part, meta).dataset) for part in path.iterdir() if part.is_dir()}
        assert counts == {pattern.partition("/")[0]: 2 for pattern in datasets.get(name).holds} | {"truthfulqa": 1}
        return
    if name in ("longbench", "ruler"):  # nor here
        inside = [path / "lcc.jsonl", path / "repobench-p.jsonl"] if name == "longbench" else [path / "niah_word_16k"]
        for part in inside:
            assert len(task.held_out(part, {"tokenizer": "bytes", "length": 4096}).dataset) == 2
        return
    loaded = task.load(source.data, **{**source.options, **options_for(name)})
    assert min(len(part) for part in (loaded.train, loaded.val, loaded.test)) > 0
    again = task.held_out(
        source.data, loaded.meta, **{k: v for k, v in options_for(name).items() if k == "environment"}
    )
    assert len(again.dataset) > 0


def test_the_fields_own_splits_are_honoured(data):
    images, series, text, photos = (
        get_task(datasets.get(name).task) for name in ("cifar-10", "ett", "wikitext-103", "div2k")
    )
    loaded = images.load(miniature.write("cifar-10", data))
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [90, 10, 20]
    source = datasets.resolve(f"ett/ETTh1.csv={miniature.write('ett', data)}")
    loaded = series.load(source.data, context=96, horizon=24, **source.options)
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [8640 - 96 - 23, 2880 - 23, 2880 - 23]
    documents = text.documents(miniature.write("wikitext-103", data))
    assert [document.name for part in documents for document in part] == [
        f"wiki.{split}.tokens" for split in ("train", "valid", "test")
    ]
    loaded = photos.load(miniature.write("div2k", data))
    assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [32, 1, 1]


def test_masks_of_the_fields_own_sets_are_read_as_their_authors_wrote_them(data):
    kind = get_task("semantic-segmentation")
    for name, classes, kinds in (
        ("ade20k", 150, {0, 1, 2, 255}),
        ("cityscapes", 19, {0, 13, 255}),
        ("camvid", 11, {6, 9, 255}),
    ):
        dataset = kind.held_out(miniature.write(name, data), kind.default_meta({"num_classes": classes})).dataset
        masks = torch.stack([dataset[i][1] for i in range(len(dataset))])
        assert set(masks.unique().tolist()) == kinds and bool((masks[:, :8] == 255).all()), name
        loaded = kind.load(data / name, val_share=0.01)
        assert [len(part) for part in (loaded.train, loaded.val, loaded.test)] == [3, 1, 2], "val is the test"


def test_how_much_is_cut_off_for_validation_is_the_users_to_say(data):
    kind = get_task("object-detection")
    path = miniature.write("coco-2017", data)
    sizes = {share: len(kind.load(path, size=48, val_share=share).val) for share in (0.01, 0.25)}
    assert sizes == {0.01: 1, 0.25: 2}
    for task, source in ((kind, path), (get_task("semantic-segmentation"), miniature.write("ade20k", data))):
        with pytest.raises(UserError, match=r"val_share must be more than 0 and at most 0\.25, got 0\.5"):
            task.load(source, val_share=0.5)


def test_cifar_is_read_as_its_authors_wrote_it(tmp_path):
    """A byte of label, then the rows of red, of green, of blue."""
    red, green = np.zeros((3, 32, 32), np.uint8), np.zeros((3, 32, 32), np.uint8)
    red[0, 0, :], green[1, :, 0] = 255, 9
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)]:
        (tmp_path / name).write_bytes(b"\x07" + red.tobytes())
    (tmp_path / "test_batch.bin").write_bytes(b"\x03" + green.tobytes())
    content = read_cifar(tmp_path)
    assert content.train_labels.tolist() == [7] * 5 and content.test_labels.tolist() == [3]
    np.testing.assert_array_equal(content.train[4], red)
    np.testing.assert_array_equal(content.test[0], green)
    (tmp_path / "data_batch_3.bin").write_bytes(b"\x07" + red.tobytes()[:-1])
    with pytest.raises(UserError, match=r"data_batch_3.bin has 3,072 bytes: expected a multiple of 3073"):
        read_cifar(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(b"\x0b" + red.tobytes())
    with pytest.raises(UserError, match="has the label 11 where there are 10 classes"):
        read_cifar(tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(UserError, match=r"lacks test_batch.bin"):
        read_cifar(tmp_path)


def test_words_are_told_apart_and_unknown_ones_are_one():
    words = Words.learn([Document("", "the cat sat\nthe mat <unk>\n")])
    assert words.vocab == 6 and words.encode("the dog\n").tolist() == [2, 0, 1]
    assert words.decode(words.encode("the cat\nsat").tolist()) == "the cat\nsat <eos>"
    again = read_tokenizer(words.dump())
    assert again.words == words.words and again.end == words.end
    assert int(words.lengths()[words.encode("the cat")].sum()) == len("the cat\n") + 1


def test_episodes_of_hdf5_end_where_they_end_or_were_cut(tmp_path):
    pytest.importorskip("h5py")
    from provenn.data.trajectories import read_trajectories

    (tmp_path / "d4rl").mkdir()
    miniature.d4rl(tmp_path / "d4rl", width=5, actions=2)
    found, environment = read_trajectories(tmp_path / "d4rl" / "ant_medium-v2.hdf5")
    assert [trajectory.actions.shape for trajectory in found] == [(10, 2)] * 3 and environment is None
    (tmp_path / "noise.hdf5").write_bytes(b"no hdf5")
    with pytest.raises(UserError, match="no readable HDF5"):
        read_trajectories(tmp_path / "noise.hdf5")


def test_where_a_set_is_looked_for(data, tmp_path):
    assert datasets.find("cifar-10").missing == ("everything",)
    assert "--data cifar-10=PATH, or PROVENN_DATA" in datasets.find("cifar-10").needs
    (data / "cifar10").mkdir()  # another name that it goes by
    part = datasets.find("cifar-10")
    assert part.path == data / "cifar10" and len(part.missing) == 6 and "lacks data_batch_1.bin" in part.needs
    whole = miniature.write("cifar-10", tmp_path / "else")
    assert datasets.find("cifar-10", {"cifar-10": whole}).path == whole
    assert datasets.resolve(f"cifar-10={whole}").data == whole
    assert not datasets.find("cifar-10", {"cifar-10": tmp_path / "empty"}).there  # what is said outright is believed
    with pytest.raises(UserError, match=r"no cifar-10: needs CIFAR-10, .* lacks data_batch_1.bin"):
        datasets.resolve("cifar-10")
    assert datasets.resolve("digits").data == "digits" and datasets.resolve(tmp_path).data == tmp_path
    with pytest.raises(UserError, match="did you mean 'cifar-10'"):
        datasets.get("cifar-1O")


def test_the_authors_weights_are_looked_for_beside_the_data(data):
    card = catalog.card("craft")
    missing = datasets.find_weights(card, "craft_x2")
    assert not missing.there and "craft:craft_x2=FILE" in missing.needs
    file = data / "weights" / "craft" / "craft_x2.pth.tar"
    file.parent.mkdir(parents=True)
    file.touch()
    assert datasets.find_weights(card, "craft_x2").path == file


READS = {"batch-recognition": "fine-grained"}  # whose sets a task reads, where it has none of its own


@pytest.mark.parametrize(
    ("card", "experiment"), AT_PAPER, ids=lambda each: getattr(each, "slug", getattr(each, "id", ""))
)
def test_what_papers_ask_for_is_there(card, experiment):
    """Known sets of the preset's task, a metric that it measures, and changes that something takes."""
    how = experiment.at_paper
    preset = card.preset(how.preset)
    task = get_task(card.task_of(preset))
    # Dialogues with summaries are read for a conversion alone: no task scores what is written.
    kind = None if how.metric == "rouge1" else task.name
    kinds = {datasets.get(name).task for name in [*how.sets, *how.tests]}
    if how.weights == "train" and how.host is not None:  # which reads sounds, images or texts
        assert kinds <= {"audio-classification", "image-classification", "text-classification"}
        assert "encoder" in inspect.signature(task.load).parameters
    else:
        assert kinds == {READS.get(kind or "", kind)}
    members = [name.partition("/")[2] for name in [*how.sets, *how.tests] if "/" in name]
    holds = [pattern.partition("/")[0] for name in [*how.sets, *how.tests] for pattern in datasets.get(name).holds]
    assert set(members) <= set(holds)
    reads = {
        "train": [card.resolve(preset.build), task.load, *[task.held_out] * bool(how.tests)],
        "authors": [task.held_out],
    }.get(how.weights, [])
    if how.weights == "converted":
        huggingface = pytest.importorskip("provenn.huggingface")
        material = {
            "text-classification": huggingface.Sentences,
            "image-classification": huggingface.Pictures,
        }.get(task.name, huggingface.Text)
        material = huggingface.Summaries if how.metric == "rouge1" else material
        reads = [huggingface.recover, huggingface.Tuning, material.of, card.resolve("convert:CONVERSION").install]
    if how.weights == "authors" and card.has("official"):
        reads.append(card.resolve(preset.build))
    takes = {name for each in reads for name in inspect.signature(each).parameters}
    takes |= {"tuning"} if how.weights == "converted" else set()  # `Tuning.method`
    assert {*how.overrides, *(how.against or {})} <= takes
    assert how.weights != "authors" or card.has("official")
    recipe_of(how.recipe or preset.recipe)  # what it asks for is a recipe, and one for this task
    check_recipe(recipe_of(how.recipe or preset.recipe, rand_augment=0, random_erasing=0.0), task)
    assert experiment.needs, "what it needs, for whoever has not got it"
    assert (
        (experiment.expects is not None)
        if how.against or experiment.published is None
        else experiment.published is not None
    )
    measured = {
        "image-classification": {"accuracy", "top5"},
        "batch-recognition": {"random", "single"},
        "volume-segmentation": {"dice"},
        "object-detection": {"AP"},
        "semantic-segmentation": {"miou"},
        "super-resolution": {"psnr"},
        "series-forecasting": {"mse"},
        "language-modelling": {"perplexity", "word_perplexity", "score", "rouge1"},
        "text-classification": {"score", "kept"},
        "translation": {"bleu"},
        "series-classification": {"accuracy"},
        "event-forecasting": {"nll"},
        "reinforcement-learning": {"score"},
        "layer-stacks": {"accuracy"},
    }
    assert how.metric in measured[task.name]


def test_the_command_line_lists_what_is_found_and_what_it_unlocks(data, capsys):
    miniature.write("set5", data)
    assert main(["data", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(datasets.known()) < set(entries) and "eca_net:eca_resnet50" in entries
    assert entries["set5"]["found"] and entries["set5"]["experiments"] == [
        "craft set5_x2",
        "craft set5_x3",
        "craft set5_x4",
    ]
    assert [name for name, entry in entries.items() if entry["found"]] == ["set5"]
    unlocking = {experiment for entry in entries.values() for experiment in entry["experiments"]}
    assert unlocking == {f"{card.slug} {experiment.id}" for card, experiment in AT_PAPER}
    idle = [name for name, entry in entries.items() if not (entry["experiments"] or entry["lacks"] or entry["task"])]
    assert not idle, "neither unlocks anything nor says what is missing"
    assert main(["data"]) == 0
    text = capsys.readouterr().out
    assert f"1 of {len(entries)} found" in text and "needs a training on a mix of several sets" in text
    assert main(["data", "ett", "--data", f"ett={data}"]) == 0
    text = capsys.readouterr().out
    assert "ETTh1.csv, ETTh2.csv" in text and str(data) in text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("data nowhere", "no data set is called 'nowhere'"),
        ("data --data set5", "--data takes NAME=PATH, such as set5=photos/Set5, got 'set5'"),
        ("data --data set5=nowhere", "--data set5: nothing at nowhere"),
        ("data --data craft:craft_x9=.", "craft has no preset 'craft_x9'"),
        ("reproduce craft --data set5=.", "--data is for --budget paper"),
        ("train craft --data set5", "no set5: needs Set5 at"),
        ("train eca_net --data cifar-10=nowhere", "no cifar-10: needs CIFAR-10"),
    ],
)
def test_bad_requests_are_answered_in_a_line(line, says, data, capsys):
    assert main(shlex.split(line)) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error


def test_a_known_set_is_trained_on_by_its_name(data, tmp_path, monkeypatch):
    import provenn

    monkeypatch.chdir(tmp_path)
    miniature.write("cifar-10", data)
    _, metrics = provenn.train("residual_depth", "cifar-10", preset="scaled_resnet20", recipe={"max_steps": 2})
    assert set(metrics) >= {"accuracy", "top5"}
    evaluation = provenn.evaluate("residual_depth", "cifar-10", weights="runs/residual_depth")
    assert evaluation.metrics == pytest.approx(metrics, rel=1e-4) and evaluation.examples == 20
    assert evaluation.classes[3] == "class_3" and torch.tensor(evaluation.confusion).sum() == 20
