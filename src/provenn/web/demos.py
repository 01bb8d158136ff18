"""Demos: what readers ask of the weights that ship, done one at a time a core by processes that may be lost."""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import provenn
from provenn.web.limits import MINUTE, Rate
from provenn.web.settings import Settings
from provenn.web.uploads import PIXELS

logger = logging.getLogger(__name__)
WORKER = Path(__file__).with_name("worker.py")
PREFIX = "provenn-demos-"
WAITING = 16  # demos that wait at most
EACH = 3  # of them one reader's at most
A_MINUTE = 20  # demos that one reader may ask for in a minute
KEPT = 600.0  # seconds for which an answer is kept
ANSWERS = 300  # that are kept at most
LONGEST_LINE = 4 * 2**20  # bytes of a worker's answer
START = 120.0  # seconds that a worker may take to be ready
TICK = 0.05  # seconds between two looks at a worker
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "MPLCONFIGDIR", "PYTHONPATH", "SYSTEMROOT")
FILES = ("before.png", "after.png", "shown.png", "overlay.png", "inside.png", "drawing.png")


class Full(Exception):
    """No more demos are taken for now; says why in one line."""


class State(StrEnum):
    """How far a demo is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Job:
    """What is asked for.

    Args:
        paper, preset: whose weights.
        options: what the task's prediction takes by name.
        content: what the reader gave; None where nothing is needed.
        suffix: of the type that it was found to be, such as ".png".
    """

    paper: str
    preset: str
    options: dict[str, Any]
    content: bytes | None = None
    suffix: str = ""


@dataclass
class Demo:
    """A job and what came of it.

    Args:
        token: what its address ends with; who knows it may see the answer.
        reader: who asked, to count what waits.
        text: what was written so far.
        result: what the worker answered at the end.
        words: why there is no result, in one line.
    """

    token: str
    reader: str
    job: Job
    folder: Path
    state: State = State.WAITING
    text: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    words: str = ""
    ended: float = 0.0

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in (State.DONE, State.FAILED)

    def files(self) -> list[Path]:
        """The pictures of the result."""
        return [path for name in FILES if (path := self.file(name)) is not None]

    def file(self, name: str) -> Path | None:
        """A picture of the result; None where there is none of that name."""
        path = self.folder / name
        return path if name in FILES and path.is_file() else None


class Lost(Exception):
    """A worker ended, or was ended, in the middle of a demo; says why in one line."""


class Demos:
    """A queue of demos and the workers that do them. Workers start with the first demo.

    Args:
        settings: how many workers, and what a demo may take.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.rate = Rate(A_MINUTE, MINUTE)
        self.changed = threading.Condition()
        self.queue: deque[Demo] = deque()
        self.demos: dict[str, Demo] = {}
        self.keepers: list[Keeper] = []
        self.home: Path | None = None
        self.lock = -1
        self.closing = False

    def ask(self, job: Job, reader: str) -> Demo:
        """Put a demo in the queue.

        Raises:
            Full: the queue is, or the reader has asked too often.
        """
        with self.changed:
            self._forget()
            self._check_room(reader)
            token = secrets.token_urlsafe(24)
            demo = Demo(token, reader, job, self._home() / token)
            self.demos[token] = demo
            self.queue.append(demo)
            while len(self.keepers) < self.workers:
                self.keepers.append(Keeper(self, self._home() / f"worker-{len(self.keepers)}"))
            self.changed.notify_all()
        return demo

    @property
    def workers(self) -> int:
        """Demos that run at once."""
        return self.settings.demo_workers or os.cpu_count() or 1

    def find(self, token: str) -> Demo | None:
        """The demo of that token, as long as it is kept."""
        with self.changed:
            self._forget()
            return self.demos.get(token)

    def place(self, demo: Demo) -> int:
        """How many demos are before this one, itself counted; 0 once its turn has come."""
        with self.changed:
            return self.queue.index(demo) + 1 if demo in self.queue else 0

    def wait(self, demo: Demo, seconds: float) -> bool:
        """Until a demo is over; whether it is."""
        with self.changed:
            return self.changed.wait_for(lambda: demo.over, seconds)

    def close(self) -> None:
        """End all workers, and leave nothing."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        for keeper in self.keepers:
            keeper.thread.join()
        if self.home is not None:
            shutil.rmtree(self.home, ignore_errors=True)
            os.close(self.lock)

    def _home(self) -> Path:
        """A folder that only this process's user reads; what servers left that were killed goes."""
        if self.home is None:
            for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
                _remove_left(left)
            self.home = Path(tempfile.mkdtemp(prefix=PREFIX))
            self.lock = os.open(self.home, os.O_RDONLY)
            fcntl.flock(self.lock, fcntl.LOCK_EX)
        return self.home

    def _check_room(self, reader: str) -> None:
        if len(self.queue) >= WAITING:
            raise Full(f"{WAITING} demos wait already: try again in a minute")
        if sum(demo.reader == reader for demo in self.queue) >= EACH:
            raise TooOften(f"{EACH} of your demos are waiting: wait for their results first")
        if not self.rate.allows(reader):
            raise TooOften(f"more than {self.rate.count} demos a minute came from your address: wait a little")

    def _forget(self) -> None:
        over = [demo for demo in self.demos.values() if demo.over]
        old = time.monotonic() - KEPT
        for demo in [demo for k, demo in enumerate(over) if demo.ended < old or k < len(over) - ANSWERS]:
            del self.demos[demo.token]
            shutil.rmtree(demo.folder, ignore_errors=True)


class TooOften(Full):
    """One reader asks for more than their share."""


def _remove_left(folder: Path) -> None:
    """What another server left, unless it lives and holds the folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(handle).st_uid == os.getuid():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


class Keeper:
    """A thread that gives demos to a worker, one at a time, and starts another worker where that one is lost.

    Workers are started from here, since Linux ends them with the thread that started them.
    """

    def __init__(self, demos: Demos, folder: Path):
        self.demos, self.folder = demos, folder
        self.worker: subprocess.Popen[bytes] | None = None
        self.said = b""
        self.thread = threading.Thread(target=self.run, name=folder.name, daemon=True)
        self.thread.start()

    def run(self) -> None:
        """Until the pool closes."""
        changed = self.demos.changed
        while True:
            with changed:
                while not changed.wait_for(lambda: self.demos.queue or self.demos.closing, KEPT / 4):
                    self.demos._forget()
                if self.demos.closing:
                    break
                demo = self.demos.queue.popleft()
                demo.state = State.RUNNING
                changed.notify_all()
            try:
                state, result, words = self._try(demo)
            except Lost as lost:
                self.end()
                state, result, words = State.FAILED, {}, str(lost)
            except Exception as error:  # a full disk, no more processes; the thread goes on for those who wait
                self.end()
                logger.exception("a demo of %s could not be run", demo.job.paper)
                state, result, words = (
                    State.FAILED,
                    {},
                    f"the demo could not be run ({type(error).__name__}): try again",
                )
            with changed:
                demo.result, demo.words, demo.ended = result, words, time.monotonic()
                demo.state = state
                demo.job = Job(demo.job.paper, demo.job.preset, demo.job.options)
                changed.notify_all()
        self.end()

    def end(self) -> None:
        """End the worker, whatever it is at."""
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()
            for pipe in (self.worker.stdin, self.worker.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
        self.worker, self.said = None, b""

    def _try(self, demo: Demo) -> tuple[State, dict[str, Any], str]:
        if self.worker is None or self.worker.poll() is not None:
            self.end()
            self._start()
        deadline = time.monotonic() + self.demos.settings.demo_seconds
        for left in self.folder.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        name = None
        if demo.job.content is not None:
            name = f"input{demo.job.suffix}"
            (self.folder / name).write_bytes(demo.job.content)
        job = {"paper": demo.job.paper, "preset": demo.job.preset, "file": name, "options": demo.job.options}
        self._send(job)
        for answer in self._answers(
            deadline, f"the demo took longer than {self.demos.settings.demo_seconds:g} seconds"
        ):
            if "piece" in answer:
                with self.demos.changed:
                    demo.text += str(answer["piece"])
                    self.demos.changed.notify_all()
            elif "failed" in answer:
                return State.FAILED, {}, str(answer["failed"])
            elif "done" in answer:
                self._keep_files(demo)
                return State.DONE, dict(answer["done"]), ""
        raise AssertionError("a worker's answers end with an error")

    def _keep_files(self, demo: Demo) -> None:
        """Pictures go where no worker reaches them. A link instead of one is left out."""
        demo.folder.mkdir(mode=0o700)
        for name in FILES:
            path = self.folder / name
            if path.is_file() and not path.is_symlink():
                os.replace(path, demo.folder / name)

    def _start(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700)
        settings = self.demos.settings
        # No setting of the server's reaches a demo: there are secrets among them.
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        paths = [str(Path(provenn.__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(self.folder), "MPLBACKEND": "agg"}
        environment |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        limits = (settings.demo_megabytes, PIXELS, os.getpid())
        command = [sys.executable, "-P", "-B", str(WORKER), str(self.folder), *map(str, limits)]
        self.worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd="/")
        answers = self._answers(time.monotonic() + START, "the demo's worker did not start in time")
        if "ready" not in next(answers):
            raise Lost("the demo's worker did not start")

    def _send(self, job: dict[str, Any]) -> None:
        assert self.worker is not None and self.worker.stdin is not None
        try:
            self.worker.stdin.write(json.dumps(job).encode() + b"\n")
            self.worker.stdin.flush()
        except BrokenPipeError:
            raise Lost(self._why()) from None

    def _answers(self, deadline: float, late: str) -> Iterator[dict[str, Any]]:
        """What the worker says, line by line, as long as it keeps to its limits."""
        assert self.worker is not None and self.worker.stdout is not None
        pipe, most = self.worker.stdout.fileno(), self.demos.settings.demo_megabytes
        ready = select.poll()  # `select` takes no descriptor above 1023, and every connection has one
        ready.register(pipe)
        while True:
            line, newline, rest = self.said.partition(b"\n")
            if newline:
                self.said = rest
                try:
                    yield dict(json.loads(line))
                except (ValueError, TypeError, RecursionError):
                    raise Lost("the demo's worker gave no answer that can be read") from None
                continue
            if self.demos.closing:
                raise Lost("the server ends")
            if time.monotonic() > deadline:
                raise Lost(f"{late}: give it less")
            if _resident_megabytes(self.worker.pid) > most:
                raise Lost(_too_much(most))
            if len(self.said) > LONGEST_LINE:
                raise Lost("the demo's worker said more than an answer holds")
            if ready.poll(1000 * TICK):
                more = os.read(pipe, 2**16)
                if not more:
                    raise Lost(self._why())
                self.said += more

    def _why(self) -> str:
        """Why the worker ended by itself."""
        assert self.worker is not None
        if self.worker.wait() == SPENT:
            return _too_much(self.demos.settings.demo_megabytes)
        return "the demo's worker was lost in the middle of it; another one has started: try again"


SPENT = 3  # what worker.py exits with when its memory is used up


def _too_much(megabytes: int) -> str:
    return f"the demo needed more than its {megabytes:,} MB of memory: give it less"


def _resident_megabytes(pid: int) -> float:
    """Memory that a process holds, where the system reports it as Linux does."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
