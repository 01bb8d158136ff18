"""How processes talk: one interface, over torch.distributed or over threads of one process, that counts what it sends.

All that the methods need is a message to one process and one from another; the collectives are made of these, so that
what is counted is what was sent. Over the whole of a torch.distributed group they are its own collectives.
"""

import threading
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from provenn.core.errors import RankLost, UserError

PATIENCE = 120.0  # seconds that a thread waits for another's message
Message = tuple[int, Tensor]  # another's rank, and what it is sent or where to write what it sends


def speaks_of_lost_rank(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed says that another process has ended, or does not answer."""
    words = str(error).lower()
    gone = any(word in words for word in ("connection", "broken pipe", "timed out"))
    return isinstance(error, dist.DistError) or (gone and ("gloo" in words or "peer" in words))


def rank_lost(error: RuntimeError, rank: int, size: int) -> RankLost:
    """That error in one line of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # gloo's message begins with a line of its source, and ends with advice to its maintainers.
    reason = lines[0].split("] ", 1)[-1].split(". ")[0][:160]
    return RankLost(f"rank {rank} of {size}: another process has ended or does not answer ({reason})")


class Sent(NamedTuple):
    """What a process has sent to others."""

    elements: int = 0
    bytes: int = 0
    calls: int = 0


class Traffic:
    """Counts of what one process sends, by phase ("forward", "backward") and operator."""

    def __init__(self) -> None:
        self.sent: dict[tuple[str, str], Sent] = {}
        self.phase = "outside"

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is sent inside is of this phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def add(self, operator: str, tensors: Sequence[Tensor]) -> None:
        """One call of an operator, and what it sends."""
        before = self.sent.get((self.phase, operator), Sent())
        elements = before.elements + sum(tensor.numel() for tensor in tensors)
        size = before.bytes + sum(tensor.nbytes for tensor in tensors)
        self.sent[self.phase, operator] = Sent(elements, size, before.calls + 1)

    def elements(self, phase: str, operator: str | None = None) -> int:
        """Elements sent in a phase, by one operator or by all."""
        return sum(
            sent.elements for (when, how), sent in self.sent.items() if when == phase and operator in (None, how)
        )

    def clear(self) -> None:
        """Count from zero."""
        self.sent.clear()


class Transport(ABC):
    """What carries messages between the processes of a group, each of which has one of its own.

    Args:
        rank, size: which of how many.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    @abstractmethod
    def post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Callable[[], None]:
        """Begin to send and to receive; what is returned waits until all has come and gone."""

    def all_to_all(self, parts: Tensor) -> Tensor | None:
        """Part i to process i, from each one part, over the whole group; None where messages are as good."""
        return None


class ProcessTransport(Transport):
    """Messages by torch.distributed: gloo or nccl.

    Args:
        group: of processes; by default all.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        if not dist.is_available() or not dist.is_initialized():
            raise UserError("there is no group of processes: torch.distributed.init_process_group begins one")
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        if self.rank < 0:
            raise UserError("this process is not in the group that it is to work with")
        self.group = group

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _lost(self, error: RuntimeError) -> RankLost:
        return rank_lost(error, self.rank, self.size)

    def post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Callable[[], None]:
        # As bytes: backends differ in the types that they take.
        operations = [
            dist.P2POp(dist.isend, _as_bytes(tensor), self._global(rank), self.group, tag) for rank, tensor in sends
        ]
        operations += [
            dist.P2POp(dist.irecv, _as_bytes(tensor), self._global(rank), self.group, tag) for rank, tensor in receives
        ]
        if not operations:
            return lambda: None
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise self._lost(error) from None

        def wait() -> None:
            try:
                for work in works:
                    work.wait()
            except RuntimeError as error:
                raise self._lost(error) from None
            operations.clear()  # which held the buffers until now

        return wait

    def all_to_all(self, parts: Tensor) -> Tensor | None:
        result = torch.empty_like(parts)
        try:
            dist.all_to_all_single(_as_bytes(result), _as_bytes(parts), group=self.group)
        except RuntimeError as error:
            raise self._lost(error) from None
        return result


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


class Mailboxes:
    """Where the threads of a simulated group leave messages for each other."""

    def __init__(self) -> None:
        self.boxes: dict[tuple[int, int, int], deque[Tensor]] = defaultdict(deque)
        self.changed = threading.Condition()
        self.failed: int | None = None  # the rank that ended with an error

    def put(self, box: tuple[int, int, int], tensor: Tensor) -> None:
        with self.changed:
            self.boxes[box].append(tensor.clone())  # the sender may write over its own
            self.changed.notify_all()

    def get(self, box: tuple[int, int, int]) -> Tensor:
        with self.changed:
            came = self.changed.wait_for(lambda: self.boxes[box] or self.failed is not None, PATIENCE)
            if self.boxes[box]:
                return self.boxes[box].popleft()
        source, rank, _ = box
        why = f"rank {self.failed} has ended" if came else f"rank {source} does not answer"
        raise RankLost(f"rank {rank}: {why}")

    def fail(self, rank: int) -> None:
        with self.changed:
            self.failed = rank if self.failed is None else self.failed
            self.changed.notify_all()


class ThreadTransport(Transport):
    """Messages between threads of this process.

    Args:
        mailboxes: of the group.
    """

    def __init__(self, rank: int, size: int, mailboxes: Mailboxes):
        super().__init__(rank, size)
        self.mailboxes = mailboxes

    def post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Callable[[], None]:
        for rank, tensor in sends:
            self.mailboxes.put((self.rank, rank, tag), tensor)

        def wait() -> None:
            for rank, tensor in receives:
                tensor.copy_(self.mailboxes.get((rank, self.rank, tag)))

        return wait


class Communicator:
    """Some processes of a group, numbered in an order of their own, and the counts of what this one sends.

    Args:
        transport: carries the messages.
        members: ranks in the transport's group; by default all of them, in order.
        traffic: counts; by default new ones.
    """

    def __init__(self, transport: Transport, members: Sequence[int] | None = None, traffic: Traffic | None = None):
        self.transport = transport
        self.members = list(range(transport.size)) if members is None else list(members)
        self.rank, self.size = self.members.index(transport.rank), len(self.members)
        self.traffic = Traffic() if traffic is None else traffic

    def of(self, members: Sequence[int]) -> "Communicator":
        """Some of these processes, this one among them, with the same counts."""
        return Communicator(self.transport, [self.members[i] for i in members], self.traffic)

    def begin_exchange(self, tensor: Tensor, *, to: int, source: int, tag: int = 0) -> Callable[[], Tensor]:
        """Begin to send a tensor to one process and to receive one of its shape from another.

        What is returned waits for it and gives what came. Ranks are taken modulo the number of processes.
        """
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        self.traffic.add("send", [tensor])
        target, origin = self.members[to % self.size], self.members[source % self.size]
        wait = self.transport.post([(target, tensor)], [(origin, received)], tag)

        def result() -> Tensor:
            wait()
            return received

        return result

    def _swap(self, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
        outgoing, incoming = ([(self.members[i], tensor) for i, tensor in by.items()] for by in (sends, receives))
        self.transport.post(outgoing, incoming, 0)()

    def all_to_all(self, parts: Tensor, operator: str = "all-to-all") -> Tensor:
        """Part i of (size, ...) goes to process i; the part of each is returned, in order."""
        if self.size == 1:
            return parts
        parts = parts.contiguous()
        others = [i for i in range(self.size) if i != self.rank]
        self.traffic.add(operator, [parts[i] for i in others])
        if self.members == list(range(self.transport.size)):
            result = self.transport.all_to_all(parts)
            if result is not None:
                return result
        result = torch.empty_like(parts)
        result[self.rank] = parts[self.rank]
        self._swap({i: parts[i] for i in others}, {i: result[i] for i in others})
        return result

    def all_gather(self, tensor: Tensor, operator: str = "all-gather") -> Tensor:
        """Everybody's tensor, (size, ...)."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        tensor = tensor.contiguous()
        others = [i for i in range(self.size) if i != self.rank]
        self.traffic.add(operator, [tensor] * len(others))
        result = tensor.new_empty(self.size, *tensor.shape)
        result[self.rank] = tensor
        self._swap({i: tensor for i in others}, {i: result[i] for i in others})
        return result

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """The sum over the processes of part i of (size, ...) at process i; added in one order, so it is repeatable."""
        if self.size == 1:
            return parts[0]
        return self.all_to_all(parts, "reduce-scatter").sum(0)


def simulate(ranks: int, function: Callable[[Communicator], Any]) -> list[Any]:
    """Call a function once a rank, in as many threads of this process that talk to each other; what each returns.

    Raises:
        The error of the rank that failed first.
    """
    if ranks < 1:
        raise UserError(f"ranks must be at least 1, got {ranks}")
    mailboxes, results = Mailboxes(), [None] * ranks
    errors: dict[int, BaseException] = {}
    graded = torch.is_grad_enabled()  # which each thread has of its own

    def run(rank: int) -> None:
        try:
            with torch.set_grad_enabled(graded):
                results[rank] = function(Communicator(ThreadTransport(rank, ranks, mailboxes)))
        except BaseException as error:
            errors[rank] = error
            mailboxes.fail(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(1, ranks)]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors) if mailboxes.failed is None else mailboxes.failed]
    return results
