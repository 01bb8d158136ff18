"""What is written takes its name whole: on a full disk, and under kill −9, on two file systems."""

import errno
import itertools
import json
import multiprocessing
import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from provenn import weights
from provenn.data.images import Picture, write_image
from provenn.data.tables import write_table
from provenn.data.text import written
from provenn.evidence.record import write_atomically
from provenn.files import Unwritable, whole
from provenn.training.checkpoints import CHECKPOINT, PREVIOUS, begun, checkpoint_writer, newest, read

resource = pytest.importorskip("resource")  # limits of a process, which Windows has none of
SHARED_MEMORY = Path("/dev/shm")
ROOM = 20_000  # bytes


@pytest.fixture
def full_disk():
    """A system that refuses to write more than `ROOM` bytes to a file, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def checkpoint(number: int, size: int = 1000) -> dict:
    return {"state_dict": {"weight": torch.full((size,), float(number))}, "epoch": number}


def wide() -> nn.Module:
    return nn.Linear(200, 200)


def one_text(file: Path) -> None:
    with written(file) as handle:
        handle.write("word " * ROOM)


WRITERS = {
    "weights.safetensors": lambda file: weights.save(wide(), file, weights.Label("a", "b", "c")),
    "last.ckpt": lambda file: checkpoint_writer().save_checkpoint(checkpoint(1, ROOM), file),
    "evidence.json": lambda file: write_atomically(file, "x" * 2 * ROOM),
    "table.csv": lambda file: write_table(file, ["a"], [["word"]] * ROOM),
    "text.txt": one_text,
    "image.png": lambda file: write_image(
        file, Picture(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file_and_leaves_the_old_one_alone(tmp_path, full_disk, name):
    file = tmp_path / "run" / name
    file.parent.mkdir()
    file.write_bytes(b"the old one")
    with pytest.raises(Unwritable, match=f"cannot write {file}: .*too large") as error:
        WRITERS[name](file)
    assert "\n" not in str(error.value)
    assert [other.name for other in file.parent.iterdir()] == [name] and file.read_bytes() == b"the old one"


def test_what_fails_for_another_reason_leaves_nothing_either(tmp_path):
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "a.txt") as place:
        place.write_text(str(1 / 0))
    assert not list(tmp_path.iterdir())
    with pytest.raises(BrokenPipeError), whole(tmp_path / "a.txt"):
        raise BrokenPipeError(errno.EPIPE, "the reader went")


def test_the_checkpoint_before_is_kept_and_stands_in(tmp_path):
    writer = checkpoint_writer()
    assert not begun(tmp_path) and newest(tmp_path) is None
    for number in (1, 2, 3):
        writer.save_checkpoint(checkpoint(number), tmp_path / CHECKPOINT)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CHECKPOINT, PREVIOUS]
    assert [read(tmp_path / name)["epoch"] for name in (CHECKPOINT, PREVIOUS)] == [3, 2]
    last = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(last[: len(last) // 2])
    assert newest(tmp_path) == tmp_path / PREVIOUS
    (tmp_path / CHECKPOINT).unlink()
    assert begun(tmp_path) and newest(tmp_path) == tmp_path / PREVIOUS


def test_what_a_killed_run_had_begun_to_write_is_cleared_away(tmp_path):
    (tmp_path / ".last.4711.part.ckpt").write_bytes(b"half of it")
    checkpoint_writer().save_checkpoint(checkpoint(1), tmp_path / CHECKPOINT)
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]


def write_on_and_on(folder: Path, said) -> None:
    torch.set_num_threads(1)
    writer = checkpoint_writer()
    for number in itertools.count(1):
        writer.save_checkpoint(checkpoint(number, 100_000), folder / CHECKPOINT)
        write_atomically(folder / "run.json", json.dumps({"numbers": [number] * 10_000}))
        said.send(number)


@pytest.mark.parametrize("file_system", ["that of temporary files", "another"])
def test_a_kill_leaves_whole_files_on_any_file_system(tmp_path, file_system):
    """Killed while it writes, again and again: there is always a checkpoint, no older than the one before the last."""
    folder = tmp_path
    if file_system == "another":
        if not SHARED_MEMORY.is_dir() or SHARED_MEMORY.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is one file system alone")
        folder = SHARED_MEMORY / f"provenn-{os.getpid()}"
        folder.mkdir()
    try:
        for delay in np.linspace(0, 0.02, 8):
            mouth, ear = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("fork").Process(target=write_on_and_on, args=(folder, ear))
            process.start()
            ear.close()
            said = [mouth.recv() for _ in range(2)][-1]
            time.sleep(delay)
            process.kill()
            process.join()
            with suppress(EOFError):
                while True:
                    said = mouth.recv()
            kept = torch.load(newest(folder), weights_only=True)["state_dict"]["weight"]
            assert len(kept.unique()) == 1 and kept[0] >= said
            numbers = json.loads((folder / "run.json").read_text())["numbers"]
            assert len(numbers) == 10_000 and len(set(numbers)) == 1 and numbers[0] >= said
    finally:
        if folder != tmp_path:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
