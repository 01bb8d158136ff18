"""Trials that run elsewhere: in processes of this machine (`--jobs`), or on machines of a Ray cluster (`--cluster`).

A trial is a function without arguments that comes back with plain JSON. It is pickled with its run, called elsewhere,
and its value is kept here, in the ledger that a run without workers writes. What times something runs last and alone:
on a cluster it takes a whole machine, and meanwhile nothing is computed here.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import signal
import socket
import sys
import threading
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cloudpickle

from provenn.core.errors import UserError
from provenn.evidence.record import machine, peak_memory, plain
from provenn.evidence.run import Elsewhere, Run

PULSE = 0.5  # seconds after which a Ctrl-C is noticed
TRIES = 4  # of a trial whose worker or machine is lost
ANSWER = 120.0  # seconds that a machine of the cluster may take to say what it has
STORE = 100 * 2**20  # bytes of shared memory of a cluster on this machine; trials send and return little
AUTO = "auto"
CONNECT = 10.0  # seconds that a cluster may take to answer at all
BEGIN = " (ray start --head begins one; --cluster auto takes it, or this machine alone)"


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: its value, or the error that ended it."""

    value: Any = None
    seconds: float = 0.0
    pictures: dict[str, bytes] = field(default_factory=dict)
    error: Exception | None = None
    machine: str = ""
    peak: int = 0


@dataclass(frozen=True)
class Job:
    """A trial that was asked for."""

    run: Run
    key: str
    content: bytes  # of the pickle of run and function
    tries: int = 1


def perform(content: bytes, threads: int) -> Outcome:
    """Run a trial in this process, as it would run where it was asked for."""
    import torch

    torch.set_num_threads(threads)
    run, function = cloudpickle.loads(content)
    facts: dict[str, Any] = {"machine": machine(run.device)}
    start = time.perf_counter()
    try:
        facts["value"] = plain(function())
    except Exception as error:
        facts["error"] = _portable(error)
    facts["seconds"] = time.perf_counter() - start
    return Outcome(pictures=run.drawn or {}, peak=peak_memory(run.device), **facts)


def _portable(error: Exception) -> Exception:
    """An error that can be sent, with its traceback as a note."""
    error.add_note(f"on {platform.node()}:\n{traceback.format_exc()}")
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
        return error
    except Exception:  # whatever somebody else's class makes of pickling
        replaced = RuntimeError(f"{type(error).__name__}: {error}")
        replaced.__notes__ = error.__notes__
        return replaced


class Workers(Elsewhere):
    """What runs trials side by side: `ask` for them, and `wait` until one has ended.

    Args:
        running: by a handle, what runs.
        clocks: asked for, and begun when nothing else runs.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.running: dict[Any, Job] = {}
        self.clocks: list[Job] = []

    def ask(self, run: Run, key: str, function: Callable[[], Any], alone: bool) -> None:
        """Have a trial run; its value is given to `run.keep` by `wait`."""
        job = Job(run, key, cloudpickle.dumps((run, function)))
        if alone:
            self.clocks.append(job)
        else:
            self.running[self.begin(job)] = job

    def wait(self) -> None:
        """Until a trial has ended. What runs alone begins when all else has ended, and all of it is waited for."""
        if self.running:
            while not self.keep_ended(PULSE):
                pass
            return
        self.clocks, clocks = [], self.clocks
        while clocks or self.running:
            clocks = self.begin_alone(clocks)
            self.keep_ended(PULSE)

    def keep_ended(self, patience: float = 0.0) -> bool:
        """Keep what has ended by now, or within so many seconds; whether anything has."""
        ended = self.ended(patience) if self.running else []
        for handle in ended:
            job = self.running.pop(handle)
            outcome = self.outcome(handle, job)
            if outcome is None:  # it begins again
                continue
            for name, content in outcome.pictures.items():
                job.run.keep_picture(name, content)
            job.run.peaks.add(outcome.peak)
            if outcome.error is not None:
                job.run.keep_failure(job.key, outcome.error)
                continue
            elsewhere = "" if outcome.machine == machine(job.run.device) else outcome.machine
            job.run.keep(job.key, outcome.value, outcome.seconds, elsewhere)
        return bool(ended)

    @abstractmethod
    def begin(self, job: Job) -> Any:
        """Start a trial as soon as there is room; a handle of it."""

    @abstractmethod
    def begin_alone(self, jobs: list[Job]) -> list[Job]:
        """Start as many of these as may run now; the others."""

    @abstractmethod
    def ended(self, patience: float) -> list[Any]:
        """Handles of what has ended, after so many seconds at most."""

    @abstractmethod
    def outcome(self, handle: Any, job: Job) -> Outcome | None:
        """What came of it; None where it begins again."""


class Processes(Workers):
    """Processes of this machine.

    Args:
        count: of them; they share the cores.
    """

    def __init__(self, count: int):
        super().__init__(max(1, (os.cpu_count() or 1) // count))
        # torch's threads do not survive a fork
        self.pool = ProcessPoolExecutor(count, get_context("spawn"), _end_with, (os.getpid(),))

    def begin(self, job: Job) -> Future:
        try:
            return self.pool.submit(perform, job.content, self.threads)
        except BrokenProcessPool:
            raise self._lost() from None

    def begin_alone(self, jobs: list[Job]) -> list[Job]:
        if self.running or not jobs:
            return jobs
        self.running[self.begin(jobs[0])] = jobs[0]
        return jobs[1:]

    def ended(self, patience: float) -> list[Future]:
        return list(wait_for(self.running, patience, FIRST_COMPLETED).done)

    def outcome(self, handle: Future, job: Job) -> Outcome:
        try:
            return handle.result()
        except BrokenProcessPool:
            raise self._lost() from None

    def _lost(self) -> UserError:
        return UserError(
            "a process that measured was killed (often for want of memory); what had ended is kept: "
            "go on with --resume, and with fewer --jobs if it happens again"
        )

    def close(self) -> None:
        """Ledgers are whole at every moment, so nothing that runs is waited for."""
        for process in list((self.pool._processes or {}).values()):  # which no public method ends at once
            process.kill()
        self.pool.shutdown(cancel_futures=True)


def _end_with(first: int) -> None:
    """Ctrl-C reaches every process, and the first one ends the others. If it is killed itself, Linux ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != first:
            os._exit(0)


@contextmanager
def processes(count: int) -> Iterator[Workers]:
    """So many processes of this machine; they share its cores, and so does this one as long as they are there."""
    import torch

    workers, before = Processes(count), torch.get_num_threads()
    torch.set_num_threads(workers.threads)
    try:
        yield workers
    finally:
        torch.set_num_threads(before)
        workers.close()


class Cluster(Workers):
    """The machines of a Ray cluster. Each trial takes as many CPUs as this process has threads, and a GPU on cuda.

    Args:
        ray: the package.
        packages: whose code has to be the same everywhere.
        device: of the trials.
    """

    def __init__(self, ray: Any, packages: Sequence[str], device: str):
        import torch

        super().__init__(torch.get_num_threads())
        self.ray, self.packages, self.facts = ray, tuple(packages), facts(tuple(packages))
        most = max((self.size(node) for node in self.nodes()), default=0)
        if most < 1:
            raise UserError("no machine of the cluster has a CPU to run trials on")
        gpus = int(device.startswith("cuda"))
        if gpus and not ray.cluster_resources().get("GPU"):
            raise UserError(f"the device is {device}, and no machine of the cluster has a GPU: try --device cpu")
        self.share = {"num_cpus": min(self.threads, most), "num_gpus": gpus}
        self.remote = ray.remote(max_retries=TRIES - 1)(perform_there)
        self.turn = 0

    def nodes(self) -> list[dict[str, Any]]:
        """The machines that may run trials, those of each size in one order."""
        alive = [node for node in self.ray.nodes() if node["Alive"] and self.size(node)]
        return sorted(alive, key=lambda node: (-self.size(node), node["NodeID"]))

    @staticmethod
    def size(node: dict[str, Any]) -> int:
        return int(node["Resources"].get("CPU", 0))

    def on(self, node: dict[str, Any]) -> Any:
        """The strategy that puts a task on this machine or nowhere."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)

    def compare(self) -> None:
        """Ask each machine for its versions and code.

        Raises:
            UserError: one has others, or does not answer.
        """
        ask = self.ray.remote(num_cpus=0)(facts)
        asked = {
            node["NodeManagerAddress"]: ask.options(scheduling_strategy=self.on(node)).remote(self.packages)
            for node in self.nodes()
        }
        for name, handle in asked.items():
            try:
                theirs = self.ray.get(handle, timeout=ANSWER)
            except self.ray.exceptions.RayError as error:
                raise UserError(f"provenn cannot be used on {name}, a machine of the cluster: {_last(error)}") from None
            refuse_others(self.facts, theirs, name)

    def begin(self, job: Job) -> Any:
        return self.remote.options(**self.share).remote(job.content, self.threads, self.packages, self.facts)

    def begin_alone(self, jobs: list[Job]) -> list[Job]:
        """Each takes all CPUs of a machine, and the machines take turns."""
        nodes = self.nodes() if jobs else []
        if jobs and not nodes:
            raise UserError("the cluster has no machine left; what had ended is kept: go on with --resume")
        for job in jobs:
            node = nodes[self.turn % len(nodes)]
            self.turn += 1
            whole = {**self.share, "num_cpus": self.size(node), "scheduling_strategy": self.on(node)}
            handle = self.remote.options(**whole).remote(job.content, self.threads, self.packages, self.facts)
            self.running[handle] = job
        return []

    def ended(self, patience: float) -> list[Any]:
        return self.ray.wait(list(self.running), num_returns=1, timeout=patience)[0]

    def outcome(self, handle: Any, job: Job) -> Outcome | None:
        errors = self.ray.exceptions
        try:
            return self.ray.get(handle)
        except (errors.TaskUnschedulableError, errors.NodeDiedError, errors.WorkerCrashedError) as error:
            if isinstance(error, errors.TaskUnschedulableError) and job.tries < TRIES:  # its machine has gone
                again = Job(job.run, job.key, job.content, job.tries + 1)
                self.begin_alone([again])
                return None
            return Outcome(error=RuntimeError(f"its worker was lost {TRIES} times: {_last(error)}"))
        except errors.RayTaskError as error:
            if isinstance(error.cause, UserError):  # of `refuse_others`: errors of the trial come back as outcomes
                raise error.cause from None
            return Outcome(error=RuntimeError(_last(error)))
        except errors.RayError as error:
            return Outcome(error=RuntimeError(_last(error)))


def perform_there(content: bytes, threads: int, packages: tuple[str, ...], expected: dict[str, str]) -> Outcome:
    """Run a trial on a machine of a cluster, where versions and code are those of who asks."""
    refuse_others(expected, facts(packages), platform.node())
    return perform(content, threads)


def facts(packages: tuple[str, ...]) -> dict[str, str]:
    """What has to be the same on every machine that measures: versions, and checksums of the packages' code."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "cloudpickle")}
    code = {f"code of {name}": _code_of(name) for name in sorted(packages)}
    return {"Python": platform.python_version(), **versions, **code}


@cache
def _code_of(package: str) -> str:
    """A checksum of a package's files of code and facts; "missing" where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return "missing"
    digest = hashlib.sha256()
    for root in map(Path, spec.submodule_search_locations or [str(spec.origin)]):
        files = [root] if root.is_file() else [*root.rglob("*.py"), *root.rglob("*.toml")]
        for file in sorted(files):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def refuse_others(ours: dict[str, str], theirs: dict[str, str], name: str) -> None:
    """Do not mix what different code has measured.

    Raises:
        UserError: the machine of that name has other versions or code, and which.
    """
    other = [
        f"{what} {theirs.get(what, 'missing')} (here {value})"
        for what, value in ours.items()
        if theirs.get(what) != value
    ]
    if other:
        raise UserError(f"{name}, a machine of the cluster, has {', '.join(other)}: install the same there")


def _last(error: Exception) -> str:
    """The last line of an error, which in Ray's says why."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


@contextmanager
def cluster(
    address: str, *, packages: Sequence[str], device: str, log: Callable[[str], None] = lambda message: None
) -> Iterator[Workers]:
    """The machines of a Ray cluster.

    Args:
        address: `HOST:PORT` of one that this machine belongs to, or "auto": the one that RAY_ADDRESS names or that
            runs on this machine, else one is started here for as long as it is needed.
        packages: whose code has to be the same everywhere.
        device: of the trials.
        log: is given a line about what there is.

    Raises:
        UserError: ray is not installed, there is no cluster at that address, or a machine has other versions or code.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--cluster needs a package: pip install 'provenn[cluster]'") from None
    began_here = not ray.is_initialized()
    if began_here:
        _connect(ray, address)
    try:
        workers = Cluster(ray, packages, device)
        workers.compare()
        nodes, cpus = workers.nodes(), workers.share["num_cpus"]
        side_by_side = sum(workers.size(node) // cpus for node in nodes)
        log(
            f"cluster: {len(nodes)} machine{'s' * (len(nodes) > 1)}, {side_by_side} trials side by side, "
            f"{workers.threads} thread{'s' * (workers.threads > 1)} each (OMP_NUM_THREADS sets how many)"
        )
        yield workers
    finally:
        if began_here:
            ray.shutdown()


def check_address(address: str, seconds: float = CONNECT) -> None:
    """Does a server of Ray's kind answer at this address? Ray itself asks one that is silent for minutes.

    Ray speaks HTTP/2 (RFC 9113, section 3.4): each side begins with a frame of settings, of type 4.

    Args:
        address: HOST:PORT, or ray://HOST:PORT.
        seconds: to wait for a connection, and then for an answer.

    Raises:
        UserError: another form, nobody there, or somebody who does not answer so.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise UserError(f"no cluster at {address!r}: expected HOST:PORT or {AUTO}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            answer = connection.recv(9)
    except TimeoutError:
        raise UserError(f"no cluster at {address!r}: no answer within {seconds:g} seconds{BEGIN}") from None
    except (OSError, UnicodeError) as error:  # a name that is none
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"no cluster at {address!r}: {reason}{BEGIN}") from None
    if answer[3:4] != bytes([4]):
        raise UserError(f"no cluster at {address!r}: what answers there is no Ray{BEGIN}")


def _connect(ray: Any, address: str) -> None:
    named = os.environ.get("RAY_ADDRESS") if address == AUTO else address
    if named not in (None, "", "local", AUTO):
        check_address(named)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        try:
            ray.init(address, **quiet)
        except ConnectionError:
            if address != AUTO:
                raise
            ray.init("local", include_dashboard=False, object_store_memory=STORE, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"no cluster at {address!r}: {_last(error)}{BEGIN}") from None
    except SystemExit:  # by Ray's own handler of signals, once it has given up
        raise UserError(f"no cluster at {address!r}: Ray has given up{BEGIN}") from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)  # Ray's handler would end the process without a word
