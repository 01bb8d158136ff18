"""Stores of embeddings: what was written is read, and nothing of another network, folder or kind passes for it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.tasks import stores
from provenn.tasks.stores import Store, checksum_of, read_store, same_files


def store(count: int = 5) -> Store:
    embeddings = nn.functional.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(0)))
    return Store("0123456789abcdef", Path("photos"), [f"ä {k}/b.png" for k in range(count)], embeddings)


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_what_is_written_is_read(tmp_path, ending):
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    file, one = tmp_path / f"new/gallery{ending}", store()
    one.save(file)
    again = read_store(file)
    assert (again.checksum, again.folder, again.files) == (one.checksum, one.folder, one.files)
    assert torch.equal(again.embeddings, one.embeddings)
    assert [f.name for f in file.parent.iterdir()] == [file.name], "in one step, nothing is left beside it"


def test_a_parquet_file_is_one_that_others_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    store().save(tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["file", "embedding"] and len(table["embedding"][0].as_py()) == 3


def test_without_pyarrow_a_line_says_what_helps(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'provenn\[tables\]', or give a .npz"):
        store().save(tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


def test_the_checksum_is_of_every_weight_and_of_what_is_seen():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    meta = {"size": [4, 2]}
    known = checksum_of(network(), meta)
    assert known == checksum_of(network(), dict(meta))
    changed = [network() for _ in range(3)]
    with torch.no_grad():
        changed[0][0].weight[1, 1] += 1e-6
        changed[1][1].running_mean[0] = 1e-3
    changed[2] = network().double()
    found = {checksum_of(model, meta) for model in changed} | {checksum_of(network(), {"size": [8, 2]}), known}
    assert len(found) == 5


def test_embeddings_of_another_network_are_refused():
    store().check("0123456789abcdef", "a.npz")
    with pytest.raises(UserError, match=r"^a.npz holds embeddings of another network[^\n]*here fedc"):
        store().check("fedcba9876543210", "a.npz")


def test_a_folder_that_has_changed_is_said():
    one = store()
    same_files(one, one.files[::-1], "a.npz")
    with pytest.raises(UserError, match="of 5 pictures; the folder has 1 that it lacks, and 2 are gone"):
        same_files(one, [*one.files[2:], "c.png"], "a.npz")


def write_npz(file, **content):
    np.savez(file, **content)


def test_other_files_are_refused_in_a_line(tmp_path):
    file = tmp_path / "a.npz"
    whole = {
        "checksum": np.array("0"),
        "folder": np.array("."),
        "files": np.array(["a"]),
        "embeddings": np.ones((1, 1)),
    }
    cases = [
        (lambda: file.write_bytes(b"no archive"), "holds no embeddings"),
        (lambda: write_npz(file, x=np.ones(2)), "it lacks checksum, folder, files, embeddings"),
        (lambda: write_npz(file, **{**whole, "files": np.array(["a", "b"])}), "2 names beside 1 embeddings"),
        (lambda: write_npz(file, **{**whole, "embeddings": np.ones((1, 2))}), "have the length 1, and these do not"),
        (lambda: write_npz(file, **{**whole, "embeddings": np.full((1, 1), np.nan)}), "have the length 1"),
        (lambda: write_npz(file, **{**whole, "embeddings": np.ones(1)}), "its embeddings have the shape"),
        (lambda: write_npz(file, **{**whole, "files": np.array([{}], dtype=object)}), "holds no embeddings"),
    ]
    for write, said in cases:
        write()
        with pytest.raises(UserError, match=said) as refused:
            read_store(file)
        assert "\n" not in str(refused.value)
    write_npz(file, **whole)
    assert read_store(file).files == ["a"]
    with pytest.raises(UserError, match=r"kept in \.npz or \.parquet, got a\.csv"):
        read_store(tmp_path / "a.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_store(tmp_path / "nothing.npz")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"file": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="holds no embeddings that provenn wrote"):
        read_store(tmp_path / "b.parquet")


def test_who_embeds_is_known_by_what_a_task_has():
    from provenn.tasks import get_task

    assert isinstance(get_task("re-identification"), stores.Embeds)
    assert not isinstance(get_task("image-classification"), stores.Embeds)
