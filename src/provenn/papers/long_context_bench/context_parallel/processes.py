"""Processes of this machine that work together over gloo, and end together when one of them dies."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from provenn.core.errors import RankLost, UserError
from provenn.distributed import Communicator, ProcessTransport, rank_lost, speaks_of_lost_rank

ANSWER = 300.0  # seconds that a process waits for another that lives and says nothing
LEAVE = 5.0  # seconds that the others have to end by themselves once one has died


def launch(
    ranks: int,
    function: Callable[..., Any],
    *arguments: Any,
    threads: int = 1,
    patience: float | int = ANSWER,
    preload: Sequence[str] = (),
) -> list[Any]:
    """Call `function(comm, *arguments)` in so many new processes, each with a communicator over gloo.

    Args:
        ranks: how many processes.
        function, arguments: what each does; they are pickled, by value where they cannot be imported.
        threads: of each process.
        patience: seconds that a process waits for another's message.
        preload: modules that the first call of all imports once for all processes.

    Returns:
        What each returned, in the order of ranks.

    Raises:
        UserError: a process died, or refused what it was asked; the others are ended within seconds.
    """
    if ranks < 1:
        raise UserError(f"ranks must be at least 1, got {ranks}")
    context = _context(preload)
    content = cloudpickle.dumps((function, arguments))
    port = _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(
            target=_work, args=(rank, ranks, port, content, threads, float(patience), pipes[rank][1]), daemon=True
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for _, writer in pipes:
        writer.close()  # the process has its own, so that the end of this pipe says that it has ended
    try:
        return _results(processes, [reader for reader, _ in pipes])
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for reader, _ in pipes:
            reader.close()


def _context(preload: Sequence[str]) -> Any:
    """A server that has imported torch forks the processes, so that each starts in a moment; else they are spawned."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The latter comes with the first gradient, and takes a second.
    context.set_forkserver_preload([__name__, "torch.fx.experimental.symbolic_shapes", *preload])
    return context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _results(processes: list[Any], readers: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    troubles: dict[int, Exception] = {}
    open_ends: dict[Any, int] = dict(zip(readers, range(len(readers))))
    deadline = None
    while open_ends:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(list(open_ends), left)
        if not ready:  # the others do not end by themselves
            break
        for reader in ready:
            rank = open_ends.pop(reader)
            try:
                good, value = cloudpickle.loads(readers[rank].recv_bytes())
            except EOFError:
                processes[rank].join(LEAVE)
                troubles[rank] = UserError(f"rank {rank} of {len(readers)} {_how(processes[rank].exitcode)}")
            else:
                if good:
                    results[rank] = value
                else:
                    troubles[rank] = value
        if troubles and deadline is None:
            deadline = time.monotonic() + LEAVE
    if troubles:
        # Who lost another is not who failed.
        first = [error for error in troubles.values() if not isinstance(error, RankLost)]
        raise (first or list(troubles.values()))[0]
    return [results[rank] for rank in range(len(readers))]


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by signal {-code} in the middle: the others were ended (often it is want of memory)"
    return f"ended in the middle (exit code {code}): the others were ended"


def _work(rank: int, ranks: int, port: int, content: bytes, threads: int, patience: float, writer: Connection) -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # who loses another says so itself
    torch.set_num_threads(threads)
    answer: tuple[bool, Any]
    try:
        store = dist.TCPStore("127.0.0.1", port, ranks, rank == 0, timedelta(seconds=patience))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=patience))
        function, arguments = cloudpickle.loads(content)
        answer = True, function(Communicator(ProcessTransport()), *arguments)
        dist.barrier()  # nobody leaves while another still reads
    except UserError as error:
        answer = False, error
    except RuntimeError as error:
        answer = False, rank_lost(error, rank, ranks) if speaks_of_lost_rank(error) else _portable(error)
    except Exception as error:
        answer = False, _portable(error)
    writer.send_bytes(cloudpickle.dumps(answer))
    writer.close()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may still wait for one that died


def _portable(error: Exception) -> Exception:
    return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
