"""A third party's paper of re-identification: trained, evaluated, searched with, embedded and exported, as ours is."""

import csv
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import miniature
import provenn
from plugins import FIXTURES, importable, install
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.tasks.stores import read_store
from provenn.testing import check_paper
from provenn.training import weights


@pytest.fixture(scope="module", autouse=True)
def tiny_search(tmp_path_factory) -> Iterator[None]:
    site = install(FIXTURES / "tiny_search", tmp_path_factory.mktemp("site"))
    with importable(site, "tiny_search"):
        yield


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    return miniature.write("market-1501", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(tiny_search, people, tmp_path_factory) -> Path:
    options = {"overrides": {"height": 16, "width": 8}, "recipe": {"max_steps": 3}}
    return provenn.train("tiny_search", people, out=tmp_path_factory.mktemp("run"), **options)[0]


def run(line: str, capsys) -> tuple[int, str, str]:
    code = main(shlex.split(line))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_it_keeps_every_check():
    check_paper("tiny_search")


def test_a_run_says_how_well_it_finds_and_what_needs_no_learning(trained):
    summary = json.loads((trained / "run.json").read_text())
    assert set(summary["metrics"]) == {"mAP", "mINP", "rank-1", "rank-5", "rank-10"}
    assert 0 < summary["dummy_baseline"] <= 1 and (trained / "picture.png").exists()
    assert summary["meta"]["size"] == [16, 8] and summary["options"]["num_classes"] == 3


def test_it_is_evaluated_over_its_queries(trained, people, tmp_path, capsys):
    code, out, _ = run(f"evaluate tiny_search --weights {trained} --data {people} --out {tmp_path} --json", capsys)
    found = json.loads(out)
    assert code == 0 and found["metrics"]["mAP"] > 0 and "4 examples" in found["method"]
    assert (tmp_path / "evaluation.png").exists()


def test_a_search_from_the_command_line_keeps_its_embeddings(trained, people, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    query = next((people / "query").iterdir())
    options = f"--weights {trained} --store kept.npz --count 2 -o found.csv"
    code, out, _ = run(f"predict tiny_search {query} --gallery {people / 'bounding_box_test'} {options}", capsys)
    assert code == 0 and "wrote found.csv" in out
    first = Path("found.csv").read_text()
    assert run(f"predict tiny_search {query} {options}", capsys)[0] == 0 and Path("found.csv").read_text() == first
    assert [row["rank"] for row in csv.DictReader(first.splitlines())] == ["1", "2"]
    code, _, err = run(f"predict tiny_search {query} --weights {trained}", capsys)
    assert code == 2 and "a search needs a gallery: give the folder of its pictures with --gallery" in err


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_embed_writes_what_a_search_takes(trained, people, tmp_path, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    file, gallery = tmp_path / f"kept.{ending}", people / "bounding_box_test"
    store = provenn.embed("tiny_search", gallery, output=file, weights=trained)
    assert len(store.files) == len(list(gallery.iterdir())) and store.embeddings.shape[1] == 6
    assert np.allclose(np.linalg.norm(store.embeddings.numpy(), axis=1), 1, atol=1e-5)
    assert read_store(file).files == store.files
    query = [next((people / "query").iterdir())]
    ways = ({"store": file}, {"gallery": gallery})
    first, second = (provenn.predict("tiny_search", query, weights=trained, overrides=way) for way in ways)
    assert first == second
    other = provenn.paper("tiny_search").build("tiny_search")
    label = replace(weights.label_of(trained), options={"num_classes": 4})
    weights.save(other, tmp_path / "other.safetensors", label)
    with pytest.raises(UserError, match="holds embeddings of another network"):
        provenn.predict("tiny_search", query, weights=tmp_path / "other.safetensors", overrides={"store": file})


def test_the_verb_writes_a_store_that_a_search_takes_and_another_model_refuses(trained, people, tmp_path, capsys):
    gallery, file, table = people / "bounding_box_test", tmp_path / "a b.npz", tmp_path / "found.csv"
    query = next((people / "query").iterdir())
    code, out, _ = run(f"embed {trained} {gallery} -o '{file}' --json", capsys)
    said = json.loads(out)
    assert code == 0 and said["pictures"] == len(list(gallery.iterdir())) and said["files"] == [str(file)]
    assert read_store(file).checksum == said["checksum"]
    code, out, _ = run(f"embed tiny_search {gallery} --weights {trained} -o '{file}'", capsys)
    assert code == 0 and "6 numbers each" in out and said["checksum"] in out
    assert run(f"predict {trained} {query} --store '{file}' -o {table}", capsys)[0] == 0 and table.exists()
    other = provenn.paper("tiny_search").build("tiny_search")
    label = replace(weights.label_of(trained), options={"num_classes": 4})
    weights.save(other, tmp_path / "other.safetensors", label)
    code, _, err = run(f"predict {tmp_path / 'other.safetensors'} {query} --store '{file}'", capsys)
    assert code == 2 and "holds embeddings of another network" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{run} {gallery} -o {tmp}/a.csv", "kept in .npz or .parquet"),
        ("{run} {gallery} -o -", "kept in .npz or .parquet, got -"),
        ("{run} {gallery}/nothing -o {tmp}/a.npz", "is no folder"),
        ("{run} {tmp} -o {tmp}/a.npz", "no "),
        ("eca_net {gallery} -o {tmp}/a.npz", "gives no embeddings that are compared"),
        ("nobody {gallery} -o {tmp}/a.npz", "nobody"),
    ],
)
def test_the_verb_says_in_a_line_what_is_wrong(trained, people, tmp_path, capsys, line, says):
    words = line.format(run=trained, gallery=people / "bounding_box_test", tmp=tmp_path)
    code, _, err = run(f"embed {words}", capsys)
    assert code == 2 and says in err and "Traceback" not in err and not list(tmp_path.glob("*.npz"))


def test_what_cannot_be_embedded_is_said(trained, people, tmp_path):
    with pytest.raises(UserError, match=r"kept in \.npz or \.parquet"):
        provenn.embed("tiny_search", people, output=tmp_path / "a.csv", weights=trained)
    with pytest.raises(UserError, match="is no folder"):
        provenn.embed("tiny_search", tmp_path / "nothing", weights=trained)
    with pytest.raises(UserError, match="batch size must be from 1"):
        provenn.embed("tiny_search", people, weights=trained, batch_size=0)
    with pytest.raises(UserError, match="image-classification gives no embeddings that are compared"):
        provenn.embed("eca_net", people)


def test_it_is_exported_at_the_size_of_its_training(trained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    said = provenn.export("tiny_search", trained, tmp_path / "out.onnx")
    assert "any batch" in said and "as predict in onnxruntime" in said
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"))
    images = np.random.default_rng(0).random((5, 3, 16, 8), dtype=np.float32)
    (embedding,) = session.run(["embedding"], {"image": images})
    assert embedding.shape == (5, 6) and np.allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)
    Image.new("RGB", (8, 16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="int8"):
        provenn.export("tiny_search", trained, tmp_path / "q.onnx", int8=True, data=tmp_path)
