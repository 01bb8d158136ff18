"""What is written takes its name whole: on a full disk, under kill −9, on two file systems; a device is written to."""

import ast
import errno
import itertools
import json
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import provenn
from provenn import cli
from provenn.core.files import Unwritable, atomic_write, check_no_input, check_output, save_figure, write_atomically
from provenn.data.images import Picture, write_image
from provenn.data.tables import write_table
from provenn.data.text import written
from provenn.training import weights
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
    torch.manual_seed(0)
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
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a.txt") as place:
        place.write_text(str(1 / 0))
    assert not list(tmp_path.iterdir())
    with pytest.raises(BrokenPipeError), atomic_write(tmp_path / "a.txt"):
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


PACKAGE = Path(provenn.__file__).parent
WRITES = {
    *("write_text", "write_bytes", "savefig", "save", "save_file", "save_model", "save_pretrained", "tofile", "imsave"),
    *("to_csv", "to_json", "to_excel", "to_parquet", "copyfile", "copy2", "copytree", "copyfileobj", "move"),
    *("replace", "rename", "renames", "fdopen", "open", "NamedTemporaryFile", "mkstemp", "FileHandler"),
}
WITHIN = {"atomic_write", "written"}
ELSEWHERE = {
    # Calls of our own methods, which write through `atomic_write`.
    "inference/train.py:train": "weights.save",
    "inference/embed.py:embed": "store.save",
    "inference/prune.py:_ours": "weights.save, to the folder of `work_folder`",
    "inference/prune.py:prune": "into the folder of `work_folder`",
    "tasks/re_identification.py:_gallery": "known.save",
    "cli/measure.py:_own": "wanted.save",
    "cli/measure.py:_latency": "told.save",
    "cli/measure.py:compare": "result.save",
    "cli/work.py:evaluate": "evaluation.save",
    "cli/work.py:inspect": "inspected.save",
    "data/frames.py:write_frame": "is given a place by write_table",
    "training/history.py:offer": "weights.save",
    # What takes no name of a user's in one go.
    "inference/prune.py:save": "transformers writes the folder of a model in its own way, into that of `work_folder`",
    "cli/convert.py:convert": "transformers writes the folder of a model in its own way",
    "huggingface/decoders.py:save_huggingface": "transformers writes the folder of a model in its own way",
    "evidence/record.py:read_or_set_aside": "a damaged record gets another name",
    "evidence/report.py:svg": "to memory",
    "evidence/run.py:picture": "to memory",
    "inference/onnx/files.py:write": "to the place that portable_system and step have of `atomic_write`",
    "inference/onnx/quantising.py:quantize": "to a temporary folder, and to the place of portable_system",
    "core/files.py:_write_through": "the function itself",
    "core/files.py:atomic_write": "the function itself",
    "experiments/latency.py:_onnx": "to a temporary folder",
    "testing/golden.py:check_case": "to a temporary folder",
    "papers/emov2/studies.py:saved_bytes": "to memory",
    "papers/s2lic/task/metrics.py:through_pillow": "to memory",
    "papers/pressure_ulcer/app.py:encoded": "to memory",
    "papers/pressure_ulcer/pdf.py:pdf_report": "to memory",
    "experiments/reproduce.py:_measure": "a log grows by lines",
    "core/files.py:alone_in": "a lock says who holds it",
    "testing/common.py:_load_safetensors": "to a temporary folder",
    "web/demos.py:_keep_files": "from a worker's own folder to the server's",
    "web/demos.py:_try": "to a worker's own folder",
    "web/static_copy.py:_write": "a folder beside, which takes its name when all pages are there",
    "web/static_copy.py:export": "the same",
    **dict.fromkeys(
        [
            *("web/worker.py:main", "web/worker.py:_inside", "tasks/demos.py:save_shown"),
            *("tasks/super_resolution.py:answer", "tasks/semantic_segmentation.py:answer"),
            *("tasks/re_identification.py:answer", "tasks/image_text_retrieval.py:answer"),
            "papers/lambda_pnn/task/__init__.py:answer",
            "papers/s2lic/task/__init__.py:answer",
            "papers/temporal_residual_diffusion/task/faces.py:answer",
        ],
        "in a worker's own folder",
    ),
}


def named(call: ast.Call) -> str:
    return getattr(call.func, "attr", None) or getattr(call.func, "id", "")


def writes(call: ast.Call) -> bool:
    name, receiver = named(call), getattr(getattr(call.func, "value", None), "id", "")
    if name in ("open", "fdopen"):
        modes = [
            each.value for each in (*call.args, *(k.value for k in call.keywords)) if isinstance(each, ast.Constant)
        ]
        return receiver != "Image" and any(
            isinstance(mode, str) and set(mode) & set("wax+") and len(mode) < 4 for mode in modes
        )
    if name in ("replace", "rename", "renames", "move"):
        return receiver in ("os", "shutil")
    return name in WRITES


def places() -> Iterator[tuple[str, str]]:
    """Each write outside of `atomic_write`: its file and function, and the line."""
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))

        def visit(node: ast.AST, function: str, within: bool, name: str = name) -> Iterator[tuple[str, str]]:
            for child in ast.iter_child_nodes(node):
                inner, safe = function, within
                if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    inner = child.name
                if isinstance(child, ast.With):
                    safe = safe or any(
                        isinstance(i.context_expr, ast.Call) and named(i.context_expr) in WITHIN for i in child.items
                    )
                if isinstance(child, ast.Call) and writes(child) and not within:
                    yield f"{name}:{inner}", f"{child.lineno}: {ast.unparse(child)[:90]}"
                yield from visit(child, inner, safe)

        yield from visit(ast.parse(file.read_text()), "", False)


def test_all_that_is_written_goes_through_one_function():
    outside = dict(places())
    assert outside.keys() == ELSEWHERE.keys(), {
        place: outside.get(place) for place in outside.keys() ^ ELSEWHERE.keys()
    }


def test_a_new_file_has_the_rights_that_the_umask_leaves_and_a_private_one_stays_private(tmp_path):
    before = os.umask(0o077)
    try:
        for name, write in WRITERS.items():
            write(tmp_path / name)
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
        os.umask(0o022)
        for name, write in WRITERS.items():
            write(tmp_path / name)
            write(tmp_path / f"new_{name}")
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
            assert stat.S_IMODE((tmp_path / f"new_{name}").stat().st_mode) == 0o644, name
    finally:
        os.umask(before)


def from_pipe(pipe: Path, got: list[bytes]) -> None:
    got.append(pipe.read_bytes())


def test_a_pipe_is_written_through_and_stays_one(tmp_path):
    pipe, got = tmp_path / "out.csv", []
    os.mkfifo(pipe)
    for name, write in WRITERS.items():
        if name == "last.ckpt":  # lies beside its predecessor, in a folder of its own
            continue
        write(tmp_path / name)
        reader = threading.Thread(target=from_pipe, args=(pipe, got), daemon=True)
        reader.start()
        write_through = {"image.png": tmp_path / "pipe.png"}.get(name, pipe)
        if write_through != pipe:
            write_through.symlink_to(pipe)
        write(write_through)
        reader.join(timeout=60)
        assert got.pop() == (tmp_path / name).read_bytes(), name
        assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert not [file for file in tmp_path.iterdir() if ".part" in file.name]


def test_a_link_stays_a_link_and_another_name_of_the_input_is_the_input(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.txt").symlink_to("there/file.txt")
    one_text(tmp_path / "link.txt")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "there" / "file.txt").stat().st_size == 5 * ROOM
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(Unwritable, match="Too many levels"):
        one_text(tmp_path / "loop.txt")
    os.link(tmp_path / "there" / "file.txt", tmp_path / "hard.txt")
    for name in ("link.txt", "hard.txt"):
        with pytest.raises(Unwritable, match="is the input itself"):
            check_no_input(tmp_path / name, ["some words", "x" * 5000, tmp_path / "there" / "file.txt"])


def test_a_place_beside_that_somebody_else_laid_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / f".a.{os.getpid()}.part.txt").symlink_to("victim")
    with atomic_write(tmp_path / "a.txt") as place:
        place.write_text("new")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "a.txt").read_text() == "new"


def test_a_name_as_long_as_the_system_takes_can_be_written(tmp_path):
    for stem in ("x" * 251, "ü" * 125):
        one_text(tmp_path / f"{stem}.txt")
        assert (tmp_path / f"{stem}.txt").exists()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("", "it is a folder; name a file in it"),
        ("none/out.png", "none does not exist: make that folder first"),
        ("file/out.png", "file is no folder"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, output, says):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(Unwritable, match=says) as error:
        check_output(tmp_path / output)
    assert "\n" not in str(error.value)


def test_names_of_files_are_drawn_as_they_are(tmp_path):
    """Between two $ Matplotlib reads a formula, which `_` is none of; a name may be of bytes that are no letters."""
    for words in ("a$_$b", "50 $ or 60 $", "\udcff.png"):
        figure = matplotlib.figure.Figure()
        figure.suptitle(words)
        axes = figure.subplots()
        axes.bar([0, 1], [1, 2], label=words)
        axes.set_xticks([0, 1], labels=[words.replace("\udcff", ""), "plain"])
        axes.legend()
        axes.set_yscale("log")
        save_figure(figure, tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").size == (704, 528)


def provenn_command(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess:
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-m", "provenn", *arguments]
    variables = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    return subprocess.run(command, capture_output=True, env=variables, timeout=300)


def photograph(file: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="PNG")
    return file


def test_a_result_into_a_pipe_comes_alone(tmp_path):
    source = photograph(tmp_path / "cat.png")
    drawn = provenn_command("predict", "craft", str(source), "-o", "/dev/stdout", shell="| cat")
    assert drawn.returncode == 0 and drawn.stdout.startswith(b"\x89PNG") and b"cat.png 16" in drawn.stderr
    assert drawn.stdout.endswith(b"IEND\xaeB`\x82")
    (tmp_path / "log.csv").write_text("before\n")
    rows = provenn_command("predict", "eca_net", str(source), "-o", "/dev/stdout", shell=f">> {tmp_path / 'log.csv'}")
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert rows.returncode == 0 and [lines[0], lines[1][:10], len(lines)] == ["before", "file,label", 3]


@pytest.mark.parametrize("verb", [("predict", "craft"), ("predict", "eca_net"), ("inspect", "eca_net")])
def test_a_device_stays_a_device(tmp_path, verb, capsys):
    source = photograph(tmp_path / "cat.png")
    assert cli.main([*verb, str(source), "-o", "/dev/null"]) == 0
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert sorted(file.name for file in Path("/dev").glob("null*")) == ["null"]
    capsys.readouterr()
    assert cli.main([*verb, str(source), "-o", "/dev/full"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "provenn: cannot write /dev/full: No space left on device"


@pytest.mark.parametrize("verb", [("predict", "craft"), ("predict", "eca_net"), ("inspect", "eca_net")])
@pytest.mark.parametrize("place", ["none/out.png", "cat.png", "."])
def test_a_place_that_would_not_do_is_told_in_one_line(tmp_path, verb, place, capsys):
    source = photograph(tmp_path / "cat.png")
    content = source.read_bytes()
    code = cli.main([*verb, str(source), "-o", str(tmp_path / place)])
    if (place, verb) == (".", ("predict", "craft")):  # writes into folders
        assert code == 0
        return
    assert code == 2 and "provenn: " in capsys.readouterr().err.splitlines()[-1]
    assert source.read_bytes() == content and [file.name for file in tmp_path.iterdir()] == ["cat.png"]


def test_closed_streams_and_odd_surroundings_are_no_trouble(tmp_path):
    source = photograph(tmp_path / "kätze$_$.png")
    for closed in (">&-", "2>&-", "<&-", ">&- 2>&- <&-"):
        listed = provenn_command("list", shell=closed)
        assert (listed.returncode, listed.stderr) == (0, b""), closed
    for extra in ({"MPLBACKEND": "nope"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}):
        drawn = provenn_command("inspect", "eca_net", str(source), "-o", str(tmp_path / "grün.png"), **extra)
        assert drawn.returncode == 0, drawn.stderr
        assert Image.open(tmp_path / "grün.png").format == "PNG"
        (tmp_path / "grün.png").unlink()
