"""Files that take their name once they are whole: a crash, a kill or a full disk leaves the old one or the new."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from provenn.errors import UserError


class Unwritable(UserError):
    """A file cannot be written: no measurement and no training goes on after that."""


@contextmanager
def whole(file: Path, keep: Path | None = None) -> Iterator[Path]:
    """A place beside `file` to write to. Where the block ends well, what lies there is brought to disk and takes the
    name of `file`; where it does not, nothing is left of it.

    It is beside, never in the folder for temporary files: a name can only be taken in one step on one file system.

    Args:
        file: what is written; folders on the way to it are made.
        keep: where the file that is replaced goes.

    Raises:
        Unwritable: it cannot be written, with the name of `file` and the system's reason.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with whole(file) as place:
    ...     _ = place.write_text("all of it")
    >>> file.read_text(), [other.name for other in file.parent.iterdir()]
    ('all of it', ['a.txt'])
    """
    if file.is_dir():
        raise Unwritable(f"cannot write {file}: {os.strerror(errno.EISDIR)}")
    place = file.with_name(f".{file.stem}.{os.getpid()}.part{file.suffix}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield place
        os.chmod(place, 0o644)  # some writers make files that only their owner reads
        with place.open("r+b") as handle:
            os.fsync(handle.fileno())
        if keep is not None and file.exists():
            os.replace(file, keep)
        os.replace(place, file)
        _sync_folder(file.parent)
    except BrokenPipeError:  # of somebody else, who read along
        raise
    except OSError as error:
        raise Unwritable(f"cannot write {file}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            place.unlink()


def _sync_folder(folder: Path) -> None:
    """Bring a folder's names to disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
