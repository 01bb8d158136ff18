"""A process that applies the weights that ship to what a reader of the catalogue gave, and can reach little else.

`demos.py` runs this file, not as a part of `provenn.web`: it needs torch and no server. Jobs come as lines of JSON by
its standard input and answers go by its standard output; when its input closes, whoever it worked for is gone, and so
is it.
"""

import contextlib
import ctypes
import json
import os
import queue
import re
import resource
import signal
import struct
import sys
import sysconfig
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

NAME = "input"  # of what a reader gave, whatever it was called
LARGEST_FILE = 64 * 2**20
OPEN_FILES = 256
NICE = 5  # pages go before demos
SPENT = 3  # exit status of a worker whose memory is used up
Log = Callable[[dict[str, Any]], None]


def main() -> None:
    folder, megabytes, pixels, server = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    _end_with(server)
    jobs, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what a library prints is no answer

    def log(answer: dict[str, Any]) -> None:
        print(json.dumps(answer, allow_nan=False), file=answers, flush=True)

    os.umask(0o077)
    os.nice(NICE)
    os.chdir(folder)
    data = megabytes * 2**20
    for limit, value in (("DATA", data), ("FSIZE", LARGEST_FILE), ("NOFILE", OPEN_FILES), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
    try:
        work = _ready(folder, pixels)
        log({"ready": True})
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(jobs, waiting), daemon=True).start()
        while True:
            work(json.loads(waiting.get()), log)
    except MemoryError:
        os._exit(SPENT)


def _end_with(server: int) -> None:
    """Linux kills this process with the server; elsewhere the end of the input ends it."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(0)


def _read(jobs: Any, waiting: "queue.SimpleQueue[str]") -> None:
    for line in jobs:
        waiting.put(line)
    os._exit(0)


def _ready(folder: Path, pixels: int) -> Callable[[dict[str, Any], Log], None]:
    """Everything that a demo needs is imported; then doors are closed."""
    import matplotlib.font_manager
    import torch
    from PIL import Image

    import provenn
    from provenn import catalog
    from provenn.core.errors import UserError
    from provenn.tasks import get_task

    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = pixels
    files = [file for card in catalog.cards().values() for file in card.shipped.values()]
    for name in {str(catalog.label_of_shipped(file).get("task", "")) for file in files}:
        with contextlib.suppress(UserError):  # a task of another package may be broken: it costs its own demos
            get_task(name)
            _answer_of(name)
    for card in (card for card in catalog.cards().values() if card.shipped and not card.built_in):
        with contextlib.suppress(UserError):  # what it imports may lie anywhere, and nothing is looked for later
            for target in [card.preset(name).build for name in card.shipped]:
                card.resolve(target)
            _ = card.has("inspection") and card.resolve_module("inspection")
    assert callable(provenn.predict) and callable(provenn.inspect) and matplotlib  # imported for what comes
    readable = _readable([card.folder for card in catalog.cards().values()])
    _confine(readable, folder)
    _watch(readable, folder)
    return partial(_work, {})


def _readable(papers: list[Path]) -> list[str]:
    """Where Python, installed packages, the papers and the system's libraries lie.

    Of folders on the path of imports that are no place of installed packages, such as a source tree, not the whole:
    only the packages in them that are imported by now.
    """
    import provenn

    folders = sysconfig.get_paths()
    roots = [sys.prefix, sys.base_prefix, *(folders[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))]
    roots += [str(Path(provenn.__file__).parent), *map(str, papers)]
    roots += filter(_holds_installed, sys.path)
    roots += ["/usr", "/lib", "/lib64", "/etc/localtime", "/sys/devices/system", "/proc/cpuinfo", "/proc/meminfo"]
    roots += [os.devnull, "/dev/urandom", "/proc/self/"]
    places = {os.path.realpath(root) for root in roots if os.path.exists(root)} - {os.sep}
    imported = {os.path.realpath(path) for path in _imported() if os.path.exists(path)}
    return sorted(places | {path for path in imported if not _lies_in(path, places)})


def _holds_installed(entry: str) -> bool:
    """Whether a place on the path of imports is an archive, or a folder that an installer fills."""
    return bool(entry) and (os.path.isfile(entry) or next(Path(entry).glob("*.dist-info"), None) is not None)


def _imported() -> Iterator[str]:
    """The folder of every top-level package that is imported, and the file of every module."""
    for module in [module for name, module in sys.modules.items() if "." not in name and name != "__main__"]:
        yield from getattr(module, "__path__", None) or filter(None, [getattr(module, "__file__", None)])


def _lies_in(path: str, places: Iterable[str]) -> bool:
    return any(path == place or path.startswith(place + os.sep) for place in places)


def _watch(readable: list[str], folder: Path) -> None:
    """An audit hook refuses what Python does elsewhere: files, processes, sockets."""
    own = os.path.realpath(folder)

    def check(path: Any, writes: bool) -> None:
        if isinstance(path, int) or path is None:
            return
        path = os.path.realpath(os.fsdecode(path))
        if not _lies_in(path, [own] if writes else [own, *readable]) and path != os.devnull:
            raise PermissionError(f"a demo may not {'write' if writes else 'read'} {path}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            check(path, bool(flags & changing) or bool(set(mode or "") & set("wax+")))
        elif event in ("os.listdir", "os.scandir", "os.chdir"):
            check(arguments[0], writes=False)
        elif event in CHANGES:
            for path in arguments[: CHANGES[event]]:
                check(path, writes=True)
        elif event.startswith(FORBIDDEN):
            raise PermissionError(f"a demo may not use {event}")

    sys.addaudithook(hook)


# Events of Python's that change files, and how many of their arguments are paths.
CHANGES = {
    "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "os.utime": 1, "os.setxattr": 1,
}  # fmt: skip
FORBIDDEN = (
    "socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "pty.",
    "ctypes.dlopen", "ftplib.", "smtplib.", "urllib.", "webbrowser.",
)  # fmt: skip


def _confine(readable: list[str], folder: Path) -> None:
    """Where the kernel has Landlock, it holds the whole process to the same paths, compiled code too, and to no TCP.

    The numbers are those of linux/landlock.h; a right that the kernel does not know yet is not asked of it.
    """
    if sys.platform != "linux":
        return
    create, add, restrict = 444, 445, 446
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(create, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    rights = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    every = (1 << rights) - 1
    read_file, read_folder = 1 << 2, 1 << 3
    # Files, TCP (bind, connect), and abstract sockets and signals to other processes.
    attributes = struct.pack("QQQ", every, 3, 3)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = libc.syscall(create, attributes, ctypes.c_size_t(len(attributes)), 0)
    if rules < 0:
        return
    whole_folder = every & ~1  # nothing in it is executed
    for path, allowed in [*((path, read_file | read_folder) for path in readable), (str(folder), whole_folder)]:
        allowed |= 1 << 1 if path == os.devnull else 0
        allowed &= every if os.path.isdir(path) else read_file | 1 << 1
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        libc.syscall(add, rules, 1, struct.pack("=Qi", allowed, handle), 0)
        os.close(handle)
    no_new_privileges = 38
    libc.prctl(no_new_privileges, 1, 0, 0, 0)
    libc.syscall(restrict, rules, 0)
    os.close(rules)


def _work(models: dict[tuple[str, str], Any], job: dict[str, Any], log: Log) -> None:
    """Do a job and log what came of it: {"done": …}, or {"failed": one line}."""
    import provenn
    from provenn.core.errors import UserError
    from provenn.core.finite import finite_outputs
    from provenn.core.progress import without_controls
    from provenn.tasks import get_task
    from provenn.tasks.demos import Trial

    slug, preset = job["paper"], job["preset"]
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if (slug, preset) not in models:
                models[slug, preset] = provenn.paper(slug).load(preset=preset)
            model, label = models[slug, preset]
            given, start = Path(job["file"]) if job.get("file") else None, time.perf_counter()
            with finite_outputs(model, f"the weights of {preset}", given.name if given else "the input"):
                options, write = job["options"], lambda piece: log({"piece": without_controls(piece)})
                trial = Trial(get_task(label.task), model, label.meta, given, options, write)
                done = _answer_of(label.task)(trial)
            done["seconds"] = time.perf_counter() - start
            if given is not None and provenn.paper(slug).card.has("inspection"):
                done["inside"] = _inside(slug, preset, given)
        done["notes"] = [_of_a_reader(str(each.message)) for each in said if str(each.message).startswith(NAME)]
        log({"done": done})
    except MemoryError:
        raise
    except UserError as error:
        log({"failed": _of_a_reader(str(error))})
    except Exception as error:
        if "allocate memory" in str(error):  # torch's own
            raise MemoryError from None
        traceback.print_exc()
        words = " ".join(str(error).split())[:200]
        log({"failed": f"{preset} could not be applied to this ({type(error).__name__}: {words})"})


def _answer_of(task: str) -> Any:
    """The function of a task that does a demo; see `provenn.tasks.demos`.

    Raises:
        UserError: the task has no form, or code of another package that cannot be imported.
    """
    from provenn.core.errors import UserError
    from provenn.tasks import face_of

    face = face_of(task)
    if face.demo is None:
        raise UserError(f"the task {task!r} has no form to be tried by")
    return face.resolve(face.demo.answer)


def _of_a_reader(words: str) -> str:
    """A message that calls a file as its reader would."""
    return re.sub(rf"\b{NAME}\.\w+", "your file", words)


def _inside(slug: str, preset: str, given: Path) -> dict[str, Any]:
    import provenn

    inspected = provenn.inspect(slug, given, preset=preset)
    inspected.save(Path("inside.png"))
    table = inspected.table()
    return {"picture": "inside.png", "caption": table.caption, "columns": table.columns, "rows": table.rows}


if __name__ == "__main__":
    main()
