"""Files that take their name once they are whole: a crash, a kill or a full disk leaves the old one or the new."""

import errno
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenn.core.errors import UserError
from provenn.core.progress import first_process

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOCK = ".lock"
LONGEST_STEM = 40  # characters of a name: one of 255 bytes leaves no room for what is put around it
DESCRIPTOR = re.compile(r"/dev/std(?P<stream>out|err)|/(?:dev|proc/(?:self|\d+))/fd/(?P<number>\d+)")


class Unwritable(UserError):
    """A file cannot be written: no measurement and no training goes on after that."""


@contextmanager
def atomic_write(
    file: Path, keep: Path | None = None, *, suffix: str | None = None, mode: int = 0o666
) -> Iterator[Path]:
    """A temporary path to write to. If the block ends well, its file is brought to disk and takes the name of `file`;
    if not, it is removed.

    The temporary file is beside `file`, never in the folder for temporary files: a name can only be taken in one step
    on one file system. What cannot be replaced, a device, a pipe or a terminal, is written through when all is there.

    Args:
        file: what is written; folders on the way to it are made. Where it is a link, what that points to is written.
        keep: where the file that is replaced goes.
        suffix: ending of the temporary path, by which some writers choose a format; by default that of `file`.
        mode: rights of a new file, less those that the umask takes. A file that is replaced gets no wider ones.

    Raises:
        Unwritable: it cannot be written, with the name of `file` and the reason.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_write(file) as path:
    ...     _ = path.write_text("all of it")
    >>> file.read_text(), [other.name for other in file.parent.iterdir()]
    ('all of it', ['a.txt'])
    """
    try:
        _check_kind(file, folder=False)
        if is_stream(file):
            with tempfile.TemporaryDirectory(prefix="provenn-") as folder:
                path = Path(folder) / f"whole{suffix or file.suffix}"
                path.touch()
                yield path
                _write_through(path, file)
            return
        target = Path(os.path.realpath(file))  # a link stays one
        path = target.with_name(f".{target.stem[:LONGEST_STEM]}.{os.getpid()}.part{suffix or target.suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            rights = _create(path, mode)
            if target.exists():
                rights &= stat.S_IMODE(target.stat().st_mode)
            yield path
            os.chmod(path, rights)  # some writers make a file of their own, with rights of their own
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
            if keep is not None and target.exists():
                os.replace(target, keep)
            os.replace(path, target)
            _sync_folder(target.parent)
        finally:
            with suppress(OSError):
                path.unlink()
    except BrokenPipeError:  # of somebody else, who read along
        raise
    except OSError as error:
        raise Unwritable(f"cannot write {file}: {error.strerror or error}") from None


def save_figure(figure: "Figure", file: Path, **options: Any) -> None:
    """Write a picture as PNG in one step, with its words as they are.

    Matplotlib reads what stands between two $ as a formula, and cannot draw halves of characters: both come in the
    names of people's files, columns and classes.

    Args:
        figure: whose texts are changed where they hold either.
        file: where it goes; see `atomic_write`.
        options: of `Figure.savefig`; by default 110 dots an inch.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        words = text.get_text()
        if "$" in words and "\\mathdefault" not in words:  # which is a power of ten, of Matplotlib's own
            text.set_parse_math(False)
        text.set_text(words.encode("utf-8", "backslashreplace").decode("utf-8"))
    with atomic_write(file, suffix=".png") as path:
        figure.savefig(path, **{"dpi": 110, "format": "png", **options})


def check_output(file: Path, folder: bool = False) -> None:
    """Refuse what could not be written, before the work that would be lost.

    Args:
        file: what is to be written.
        folder: whether a folder will do as well; one without an ending is made where there is none.

    Raises:
        Unwritable: it is a folder or a disk, there is no folder to put it in, or that folder takes no files.
    """
    _check_kind(file, folder)
    if is_stream(file) or file.is_dir():
        return
    parent = Path(os.path.realpath(file)).parent
    while folder and not file.suffix and not parent.exists():  # which is made
        parent = parent.parent
    if not parent.is_dir():
        raise Unwritable(f"cannot write {file}: {parent} does not exist: make that folder first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise Unwritable(f"cannot write {file}: {os.strerror(errno.EACCES)} in {parent}")


def _check_kind(file: Path, folder: bool) -> None:
    try:
        kind = file.stat().st_mode
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise Unwritable(f"cannot write {file}: {file.parent} is no folder") from None
    except OSError as error:
        raise Unwritable(f"cannot write {file}: {error.strerror}") from None
    if stat.S_ISDIR(kind) and not folder:
        raise Unwritable(f"cannot write {file}: it is a folder; name a file in it")
    if stat.S_ISBLK(kind) or stat.S_ISSOCK(kind):
        raise Unwritable(f"cannot write {file}: it is a {'disk' if stat.S_ISBLK(kind) else 'socket'}; name a file")


def check_no_input(file: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse to write over what is read, by whatever name.

    Args:
        file: what is to be written.
        inputs: files; or words, which are none.

    Raises:
        Unwritable: it is one of them.
    """
    if is_stream(file) or file.is_dir():
        return
    for given in inputs:
        same = False
        with suppress(OSError, ValueError):  # there is nothing yet, or words are no name
            same = os.path.samefile(file, given)
        if same:
            raise Unwritable(f"cannot write {file}: it is the input itself; choose another file with -o")


def is_stream(file: Path) -> bool:
    """Whether a name stands for a device, a pipe, a terminal or an open file of this process: nothing to replace.

    >>> is_stream(Path("/dev/null")), is_stream(Path("a.png"))
    (True, False)
    """
    if DESCRIPTOR.fullmatch(str(file)):
        return True
    try:
        kind = file.stat().st_mode
    except OSError:
        return False
    return stat.S_ISCHR(kind) or stat.S_ISFIFO(kind)


def is_stdout(file: Path) -> bool:
    """Whether what is written to a name appears where `print` writes."""
    try:
        return os.path.samestat(file.stat(), os.fstat(1))
    except OSError:
        return False


def output_suffix(file: Path, default: str) -> str:
    """The ending that says the format of an output, in lower case; `default` for a stream whose name has none.

    >>> output_suffix(Path("A.PNG"), ".csv"), output_suffix(Path("/dev/stdout"), ".csv")
    ('.png', '.csv')
    """
    return default if is_stream(file) and not file.suffix else file.suffix.lower()


def _create(path: Path, mode: int) -> int:
    """A new empty file, and nobody's link; returns its rights, from which the system has taken what the umask says."""
    with suppress(FileNotFoundError):
        path.unlink()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), mode)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _write_through(path: Path, file: Path) -> None:
    """Copy a file into a stream; into an open file of this process where that stands, as `>>` asks."""
    named = DESCRIPTOR.fullmatch(str(file))
    if named is None:
        handle = os.open(file, os.O_WRONLY)
    else:
        handle = os.dup(int(named["number"] or {"out": 1, "err": 2}[named["stream"]]))
    with path.open("rb") as source, os.fdopen(handle, "wb") as sink:
        shutil.copyfileobj(source, sink)


def _sync_folder(folder: Path) -> None:
    """Bring a folder's names to disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(file: Path, text: str) -> None:
    """Replace a file's content in one step: a reader or a crash sees the old text or the new, never a part."""
    with atomic_write(file) as place:
        place.write_text(text, encoding="utf-8")


def strict_json(value: Any, indent: int = 2) -> str:
    """JSON that every reader takes: what it has no number for (infinity, not a number) is null.

    >>> strict_json({"mean": float("nan"), "bounds": (0.0, float("inf"))}).split()
    ['{', '"mean":', 'null,', '"bounds":', '[', '0.0,', 'null', ']', '}']
    """
    return json.dumps(_finite_or_null(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder that this one writes; the system lifts the lock of a process that dies.

    Raises:
        UserError: another process writes there, and which one.
    """
    import platform

    from filelock import FileLock, SoftFileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = ""
        with suppress(OSError, ValueError):
            holder = file.read_text(encoding="utf-8").strip()
        raise UserError(
            f"another process is writing {folder}{f' ({holder})' if holder else ''}: "
            "wait until it has ended, or choose another folder with --out"
        ) from None
    try:
        if not isinstance(lock, SoftFileLock):  # which stands in where a file system has no locks, and writes there
            with suppress(OSError):
                since = f"{datetime.now():%Y-%m-%d %H:%M}"
                file.write_text(f"process {os.getpid()} on {platform.node()}, since {since}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            file.unlink()  # while it is held: nobody waits for it, so nobody is left with a lock of no name
        lock.release()


@contextmanager
def work_folder(folder: Path) -> Iterator[None]:
    """Make a folder to work in, alone; where the work fails before it has written anything, nothing is left behind."""
    made = not folder.exists()
    check_writable(folder)
    try:
        with alone_in(folder) if first_process() else nullcontext():
            yield
    except BaseException:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise


def check_writable(folder: Path) -> None:
    """Make the folder, or say in one line why results cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}; choose another folder with --out"
        ) from None
