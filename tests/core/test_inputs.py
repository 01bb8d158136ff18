"""What a user gives as a file: every reader asks the same questions of it before it looks inside."""

import ast
import os
import socket
from pathlib import Path

import pytest

import provenn
from provenn.core.errors import UserError
from provenn.core.inputs import check_file, encoding_of, parse_json, read_bytes, read_text
from test_fuzz import READERS

ROOT = Path(provenn.__file__).parent
TEXT = "größe\tпуть\n漢字\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_is_read_in_any_unicode_with_its_mark(tmp_path, encoding):
    mark = "\ufeff".encode(encoding) if encoding[-2:] in ("le", "be") else b""
    (tmp_path / "a.txt").write_bytes(mark + TEXT.encode(encoding))
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("eins\nzwei größe\n".encode("latin-1"), r"no text in UTF-8: line 2, byte 13 of the file \(0xf6\)"),
        ("a\nb".encode("utf-16-le"), "line 1: a zero byte, which no text holds; if it is UTF-16, save it in UTF-8"),
        (b"\xff\xfea\0\x00\xd8", "no text in UTF-16: line 1"),
        (b"\xef\xbb\xbf\xff", "no text in UTF-8: line 1, byte 1"),
    ],
)
def test_what_is_no_unicode_is_refused_with_its_place(tmp_path, content, says):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        read_text(tmp_path / "a.txt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "no JSON: Exceeds the limit"),
        ('{\n"a": }', r"no JSON: Expecting value \(line 2, column 6\)"),
        ('"\\ud800"', "holds half a character"),
        ("", "no JSON"),
    ],
)
def test_json_is_read_or_refused_in_one_line(text, says):
    with pytest.raises(UserError, match=f"a file: {says}"):
        parse_json(text, "a file")


def odd_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Names of things that are no files, or that would be read for ever."""
    paths = {
        kind: folder / f"{kind}{suffix}" for kind in ("pipe", "socket", "loop", "device", "zeros", "folder", "huge")
    }
    os.mkfifo(paths["pipe"])
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(paths["socket"]))
    paths["loop"].symlink_to(paths["loop"])
    paths["device"].symlink_to("/dev/urandom")
    paths["zeros"].symlink_to("/dev/zero")
    paths["folder"].mkdir()
    with paths["huge"].open("wb") as handle:
        handle.truncate(1 << 40)
    return paths


@pytest.mark.parametrize(
    "kind", [kind for kind in READERS if kind not in ("facts", "evidence", "ledger", "checkpoint")]
)
def test_no_reader_opens_what_is_no_file(tmp_path_factory, kind):
    """A pipe without a writer would wait for ever, /dev/zero never ends, and a terabyte of holes fills the memory."""
    reader, name, _ = READERS[kind]
    folder = tmp_path_factory.mktemp("odd")
    for what, file in odd_files(folder, Path(name).suffix).items():
        with pytest.raises(UserError) as error:
            reader(file)
        assert str(error.value) and "\n" not in str(error.value), what


def test_what_is_no_file_is_named(tmp_path):
    words = {"pipe": "is a pipe", "socket": "is a socket", "loop": "symbolic links", "device": "is a device",
             "zeros": "is a device", "folder": "is a folder", "huge": "1,099.5 GB"}  # fmt: skip
    for what, file in odd_files(tmp_path, ".txt").items():
        for ask in (check_file, read_bytes, read_text):
            with pytest.raises(UserError, match=words[what]):
                ask(file)
    with pytest.raises(UserError, match="cannot be read"):
        check_file(Path("a\0b"))
    assert encoding_of(b"") == "utf-8"


# Files that open something by themselves, and why they may.
OPENS = {
    "data/audio.py": "wavfile.read, behind check_file",
    "data/captions.py": "NumPy, behind check_file",
    "data/frames.py": "pandas, behind check_file",
    "data/identities.py": "the lists of MSMT17, behind check_file",
    "data/images.py": "Image.open, behind check_file",
    "data/masks.py": "Image.open, behind check_file",
    "data/photographs.py": "pictures that ship with scikit-image",
    "data/prompts.py": "the first line of a file, behind check_file",
    "data/scenes.py": "pictures that ship with scikit-image",
    "data/sequences.py": "line by line, behind check_file",
    "data/tables.py": "what it writes",
    "data/text.py": "the standard library's sources, and what it writes",
    "data/trajectories.py": "NumPy and HDF5, behind check_file",
    "data/cifar.py": "np.fromfile, behind check_file",
    "papers/lambda_pnn/task/rasters.py": "rasterio and NumPy, behind check_file",
    "papers/ms_guided_attention/task/volumes.py": "nibabel and pydicom, behind check_file; 132 bytes of a file",
    "papers/rc_mllm/task/library.py": "NumPy, the faces that scikit-image ships",
    "papers/s2lic/task/metrics.py": "what Pillow wrote to memory",
    "papers/temporal_residual_diffusion/task/files.py": "NumPy, HDF5 and lines, behind check_file",
    "papers/temporal_residual_diffusion/task/sequences.py": "NumPy, behind check_file",
    "papers/temporal_residual_diffusion/task/videos.py": "PyAV, behind check_file",
    "papers/rrnet/task/catalogue.py": "NumPy, what it wrote itself",
    "papers/rrnet/task/scaling.py": "pickle of numbers alone, behind check_file",
    "papers/rrnet/task/surveys.py": "NumPy, behind check_file",
    "papers/rrnet/task/files.py": "astropy and NumPy, behind check_file",
    "tasks/demos.py": "what a task writes, and in a closed process what a reader gave",
    "tasks/faces.py": "TOML beside the code of a task",
    "tasks/image_generation.py": "what it writes",
    "tasks/object_detection.py": "what it writes",
    "tasks/open_ended_detection.py": "what it writes",
    "tasks/re_identification.py": "checksums of the images that a folder lists",
    "tasks/semantic_segmentation.py": "what it writes",
    "tasks/stores.py": "NumPy and parquet, behind check_file; what it writes",
    "tasks/image_classification.py": "checksums of the images that a folder lists",
    "tasks/super_resolution.py": "checksums of the images that a folder lists",
    "training/weights.py": "safetensors and torch.load, behind check_file",
}
READS = {"read_text", "read_bytes", "open", "fromfile", "loadtxt", "genfromtxt"}


def test_files_of_the_user_are_read_by_the_shared_functions():
    """`read_text` and `read_bytes` as methods, `open`, and NumPy's readers stand in no other file that reads data."""
    found = set()
    files = [*(ROOT / "data").rglob("*.py"), *(ROOT / "tasks").rglob("*.py"), ROOT / "training" / "weights.py"]
    files += [*(ROOT / "papers").rglob("task.py"), *(ROOT / "papers").rglob("task/*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in {"open", "np.load", "torch.load"} or (name.rpartition(".")[2] in READS and "." in name):
                found.add(str(file.relative_to(ROOT)))
    assert found <= OPENS.keys(), found - OPENS.keys()
