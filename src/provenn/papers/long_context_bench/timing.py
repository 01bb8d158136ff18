"""The protocol: what counts as work, how a call is timed, and what became of it."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from provenn.papers.long_context_bench.kernels.base import Case, Kernel, Unsupported
from provenn.papers.long_context_bench.masks import Mask
from provenn.papers.long_context_bench.sparse import BlockSparse

Direction = Literal["forward", "backward", "both"]
SHARES = {"forward": 1.0, "backward": 2.5, "both": 3.5}  # of the forward FLOPs: 2 for the gradients, ½ to recompute
FLUSH = 256_000_000  # bytes that are written before each repetition, so that no cache holds what a call reads


class Protocol(NamedTuple):
    """How often a call is made: once to compile, then to warm up, then to be timed."""

    warmups: int = 5
    repetitions: int = 20
    flush: int = FLUSH


PROTOCOLS = {"smoke": Protocol(0, 2, 0), "small": Protocol(1, 7), "paper": Protocol()}


def flops(
    mask: Mask | BlockSparse, heads: int, head_dim: int, direction: Direction = "forward", batch: int = 1
) -> float:
    """4 · area · heads · dim forward: two products over the pairs that the mask keeps, whatever a kernel computes.

    >>> from provenn.papers.long_context_bench.masks import causal
    >>> flops(causal(1024), 64, 128) / 1e9
    17.1966464
    """
    return 4 * mask.area * heads * head_dim * batch * SHARES[direction]


class Stopwatch:
    """Seconds that a call takes: by a GPU's events, else in processor time of one thread, or by the wall clock.

    Args:
        device: where the call computes.
        now: another clock, for who knows better what the time is.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] | None = None):
        self.events = device.type == "cuda" and now is None
        self.now = now or (time.process_time if torch.get_num_threads() == 1 else time.perf_counter)

    @property
    def clock(self) -> str:
        """Which, in words."""
        if self.events:
            return "events of the GPU"
        return {time.process_time: "processor time", time.perf_counter: "wall clock"}.get(self.now, "a clock given")

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call."""
        if self.events:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            return start.elapsed_time(stop) / 1000
        begin = self.now()
        call()
        return self.now() - begin


def time_call(
    call: Callable[[], object], device: torch.device, protocol: Protocol, stopwatch: Stopwatch
) -> tuple[list[float], list[int]]:
    """Seconds of each repetition, and on a GPU the peak of its allocated bytes."""
    for _ in range(1 + protocol.warmups):
        call()
    cache = torch.empty(protocol.flush, dtype=torch.int8, device=device) if protocol.flush else None
    seconds, peaks = [], []
    for _ in range(protocol.repetitions):
        if cache is not None:
            cache.zero_()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        seconds.append(stopwatch.seconds(call))
        if device.type == "cuda":
            peaks.append(torch.cuda.max_memory_allocated(device))
    return seconds, peaks


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The median, and what 20 % and 80 % of the values lie below."""
    if len(values) == 1:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), cuts[1], cuts[7]


def prepare_call(kernel: Kernel, case: Case, direction: Direction, seed: int = 0) -> Callable[[], object]:
    """The call that is timed: forward, backward alone on a graph that is kept, or both.

    Raises:
        Unsupported: the kernel cannot run the case.
    """
    attend = kernel.prepare(case)
    q, k, v, grad = case.tensors(seed, kernel.tokens_first)
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return attend(q, k, v)

        return forward
    if direction == "backward":
        output = attend(q, k, v)
        return lambda: torch.autograd.grad(output, (q, k, v), grad, retain_graph=True)
    return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), grad)


@dataclass(frozen=True)
class Judge:
    """Decides what an error means, by functions that know this machine.

    Args:
        lacks_memory: whether an error says that memory is short.
        lacks_operation: whether it says that the device has no such operation.
        peak_bytes: counts the memory that a call holds at most.
    """

    lacks_memory: Callable[[BaseException], bool]
    lacks_operation: Callable[[BaseException], bool]
    peak_bytes: Callable[[Callable[[], object]], int] | None = None


def measure(
    kernel: Kernel,
    case: Case,
    direction: Direction,
    protocol: Protocol,
    *,
    judge: Judge,
    stopwatch: Stopwatch | None = None,
    seed: int = 0,
) -> Mapping[str, Any]:
    """One point of the benchmark: `status` ok, unsupported, out of memory or error, and what goes with it."""
    stopwatch = stopwatch or Stopwatch(case.device)
    work = flops(case.mask, case.heads, case.head_dim, direction, case.batch)
    facts: dict[str, Any] = {"area": case.mask.area, "flops": work, "clock": stopwatch.clock}
    try:
        with bounded_memory(case.device):
            began = time.perf_counter()
            call = prepare_call(kernel, case, direction, seed)
            facts["prepared_in"] = time.perf_counter() - began  # block masks and the like, which are not kernel time
            seconds, peaks = time_call(call, case.device, protocol, stopwatch)
            if not peaks and judge.peak_bytes is not None and not kernel.compiled:
                with suppress(Exception):  # a counter does not see into every operator
                    peaks = [judge.peak_bytes(call)]
    except Unsupported as error:
        return {**facts, "status": "unsupported", "reason": str(error).removeprefix(f"{kernel.name}: ")}
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        if judge.lacks_memory(error):
            return {**facts, "status": "out of memory", "reason": words, "again": True}
        if judge.lacks_operation(error) or "compiler" in words.lower():
            return {**facts, "status": "unsupported", "reason": words, "again": True}
        return {**facts, "status": "error", "reason": f"{type(error).__name__}: {words}", "again": True}
    finally:
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
    median, low, high = quantiles(seconds)
    rate = {name: work / max(s, 1e-12) / 1e12 for name, s in (("tflops", median), ("low", high), ("high", low))}
    line = f"{rate['tflops']:.3g} TFLOP/s, {1e3 * median:.3g} ms"
    return {**facts, "status": "ok", "seconds": seconds, "peak_bytes": max(peaks, default=None), **rate, "told": line}


@contextmanager
def bounded_memory(device: torch.device) -> Iterator[None]:
    """On a CPU, let an allocation fail that the machine has no memory for, before the system ends the process."""
    limit = _limit() if device.type == "cpu" else None
    if limit is None:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    if before[0] != resource.RLIM_INFINITY and before[0] <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _limit() -> int | None:
    """Addresses that this process has, and nine tenths of what memory is free, where Linux reports it."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        with open("/proc/self/statm") as file:
            mine = int(file.read().split()[0]) * 4096
    except (OSError, StopIteration, ValueError):
        return None
    return mine + free * 9 // 10
