"""Five ways to spread attention over processes, and how a sixth joins: a subclass of `Method`, and `register`.

What the processes of a ring do is `forward` and `backward`; the exchange of heads for tokens around it (Ulysses) is
shared by all. N = R · U processes: U of them hold other heads of the same tokens, R of them other tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import gcd, isqrt
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from provenn.core.digest import looks_up
from provenn.core.errors import UserError
from provenn.distributed.communicator import Communicator
from provenn.distributed.placement import Contiguous, Layout, Pattern, Placement, Zigzag
from provenn.distributed.slices import Inputs, Partial, Rows, Slice, attend, attend_backward

KEYS, GRADIENTS = 1, 2  # tags: of keys and values on their way, and of their gradients
Visit = Callable[[int, Tensor], None]
VisitBack = Callable[[int, Tensor], Tensor]


@runtime_checkable
class Sharing(Protocol):
    """What a method asks of a row of tokens that processes share; `attention.Spread` is one."""

    ring: Communicator

    def pair(self, other: int) -> tuple[Slice, ...]:
        """What this process's queries see of the keys of another of the ring."""

    @property
    def seen(self) -> tuple[Slice, ...]:
        """What this process's queries see of the whole row."""

    def row_positions(self, device: torch.device) -> Int[Tensor, " tokens"]:
        """Where each token of the row is in what the processes of the ring hold, one after another."""

    def gather_tokens(self, x: Tensor) -> Tensor:
        """(tokens, heads, dim) of this process to the tokens of all U, and a U-th of the heads."""

    def gather_heads(self, x: Tensor) -> Tensor:
        """Back: all heads, of this process's tokens."""


class Method(ABC):
    """A way to spread attention over processes.

    Args:
        ulysses: U, processes that share tokens and divide heads.
    """

    name: str
    any_mask = False  # else documents that keep to themselves
    layout: Layout = Zigzag()

    def __init__(self, *, ulysses: int = 1):
        if ulysses < 1:
            raise UserError(f"ulysses must be at least 1, got {ulysses}")
        self.ulysses = ulysses

    def mesh(self, ranks: int) -> tuple[int, int]:
        """R and U of so many processes."""
        if ranks % self.ulysses:
            raise UserError(f"{self.name}: ulysses={self.ulysses} does not divide {ranks} processes")
        return ranks // self.ulysses, self.ulysses

    def place(self, pattern: Pattern, ranks: int, *, rows: bool = False) -> Placement:
        """Which process holds which tokens."""
        ring, ulysses = self.mesh(ranks)
        # Alone in the ring a process has all tokens, and where they stand does not matter: no document is padded.
        documents = pattern.documents if rows or ring > 1 else (pattern.length,)
        return Placement(documents, ring, ulysses, self.layout if ring > 1 else Contiguous(), rows)

    def check(self, pattern: Pattern, ranks: int, heads: int, kv_heads: int) -> None:
        """Can so many processes do this?

        Raises:
            UserError: heads that cannot be divided, or a mask that the method does not take.
        """
        if kv_heads < 1 or heads % kv_heads:
            raise UserError(f"{heads} query heads are no multiple of {kv_heads} key heads")
        _, ulysses = self.mesh(ranks)
        if heads % ulysses or (kv_heads % ulysses and ulysses % kv_heads):
            raise UserError(
                f"{self.name} cannot divide {heads} query heads and {kv_heads} key heads among {ulysses} processes: "
                f"take a number that divides {heads} and divides, or is a multiple of, {kv_heads}"
            )
        if pattern.causal is None and not self.any_mask:
            raise UserError(
                f"{self.name} takes masks of documents that keep to themselves, full or causal: "
                f"for this one take {', '.join(name for name, other in METHODS.items() if other.any_mask)}"
            )

    def attend(self, spread: Sharing, inputs: Inputs) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The output for this process's tokens, the log-sum-exp where it was computed, and what `attend_back` needs."""
        q, k, v = (spread.gather_tokens(x) for x in inputs[:3])
        output, lse = self.forward(spread, Inputs(q, k, v, inputs.scale))
        output = output.to(q.dtype)
        return spread.gather_heads(output), lse, (q, k, v, output, lse)

    def attend_back(
        self, spread: Sharing, saved: tuple[Tensor, ...], grad: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of this process's queries, keys and values."""
        q, k, v, output, lse = saved
        grad = spread.gather_tokens(grad.to(q.dtype))
        delta = (grad.to(lse.dtype) * output.to(lse.dtype)).sum(-1)
        # A row that sees nothing has ℓ = −∞ and is in no slice.
        grads = self.backward(spread, Inputs(q, k, v, scale), Rows(grad, lse, delta))
        grad_q, grad_k, grad_v = (spread.gather_heads(x.to(q.dtype)) for x in grads)
        return grad_q, grad_k, grad_v

    @abstractmethod
    def forward(self, spread: Sharing, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, in float32 at least, of the queries that this process of the ring holds."""

    @abstractmethod
    def backward(self, spread: Sharing, inputs: Inputs, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients, in float32 at least, of the queries, keys and values that this process of the ring holds."""


METHODS: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Give a method its name; a class decorator.

    Raises:
        UserError: another has the name.
    """
    if METHODS.get(method.name, method) is not method:
        raise UserError(f"a method is called {method.name!r} already: give the new one another name")
    METHODS[method.name] = method
    return method


@looks_up(lambda: METHODS)
def method_called(name: str, **options: Any) -> Method:
    """The method of that name.

    Raises:
        UserError: no such method, or an option that it does not take.
    """
    if name not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    try:
        return METHODS[name](**options)
    except TypeError:
        raise UserError(f"{name} does not take {', '.join(options)}") from None


def pack(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values, or their gradients, as one message."""
    return torch.cat([k, v], dim=-1)


def unpack(kv: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Keys and values of one message, or their gradients; keys are as wide as queries."""
    width = inputs.q.shape[-1]
    return kv[..., :width], kv[..., width:]


def with_keys(inputs: Inputs, kv: Tensor) -> Inputs:
    """One's own queries with the keys and values of a message."""
    k, v = unpack(kv, inputs)
    return inputs._replace(k=k, v=v)


def go_round(ring: Communicator, kv: Tensor, visit: Visit) -> None:
    """Hand keys and values round the ring, and visit those of every process: one's own first, then those before it."""
    for step in range(ring.size):
        last = step + 1 == ring.size
        # The next ones travel while these are computed with.
        arriving = None if last else ring.begin_exchange(kv, to=ring.rank + 1, source=ring.rank - 1, tag=KEYS)
        visit((ring.rank - step) % ring.size, kv)
        if arriving is not None:
            kv = arriving()


def go_back(ring: Communicator, own: Tensor, visit: VisitBack) -> Tensor:
    """The way of `go_round` in reverse, with gradients travelling along: the sum of all visits to one's own.

    Keys and values reach the process that had them last by one hop backwards, and their gradient then follows them
    home: of N hops the first carries keys and values alone, the last gradients alone.
    """
    before, after = ring.rank - 1, ring.rank + 1
    kv = own
    if ring.size > 1:
        kv = ring.begin_exchange(own, to=before, source=after, tag=KEYS)()
    gradient: Callable[[], Tensor] | None = None
    for step in reversed(range(ring.size)):
        # One's own keys and values are visited last, and have not gone away.
        arriving = ring.begin_exchange(kv, to=before, source=after, tag=KEYS) if step > 1 else None
        part = visit((ring.rank - step) % ring.size, kv if step else own)
        total = part if gradient is None else part.add_(gradient())
        if not step:
            return total
        gradient = ring.begin_exchange(total, to=before, source=after, tag=GRADIENTS)
        if arriving is not None:
            kv = arriving()
    raise AssertionError("a ring has a process")


@register
class Ring(Method):
    """Keys and values go round (Liu et al., 2023, arXiv:2310.01889); results are merged by their log-sum-exps.

    Args:
        keep_partials: hold each step's output to the end and merge then, as the official code does: R times the memory.
        ulysses: as in `Method`.
    """

    name = "ring"

    def __init__(self, *, keep_partials: bool = False, ulysses: int = 1):
        super().__init__(ulysses=ulysses)
        self.keep_partials = keep_partials

    def go_round(self, spread: Sharing, kv: Tensor, visit: Visit) -> None:
        """Visit keys and values of every process of the ring."""
        go_round(spread.ring, kv, visit)

    def go_back(self, spread: Sharing, own: Tensor, visit: VisitBack) -> Tensor:
        """The gradient of one's own keys and values, of all visits to them."""
        return go_back(spread.ring, own, visit)

    def forward(self, spread: Sharing, inputs: Inputs) -> tuple[Tensor, Tensor]:
        total = Partial(inputs.q, inputs.v.shape[-1])
        kept: list[Partial] = []

        def visit(source: int, kv: Tensor) -> None:
            partial = attend(with_keys(inputs, kv), spread.pair(source), None if self.keep_partials else total)
            if self.keep_partials:
                kept.append(partial)

        self.go_round(spread, pack(inputs.k, inputs.v), visit)
        for partial in kept:
            total.join(slice(None), partial.output, partial.lse)
        return total.output, total.lse

    def backward(self, spread: Sharing, inputs: Inputs, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        grad_q = torch.zeros_like(inputs.q, dtype=rows.lse.dtype)

        def visit(source: int, kv: Tensor) -> Tensor:
            return pack(*attend_backward(with_keys(inputs, kv), rows, spread.pair(source), grad_q))

        return grad_q, *unpack(self.go_back(spread, pack(inputs.k, inputs.v), visit), inputs)


@register
class AllGather(Method):
    """Everybody gets all keys and values, so nothing is merged (as Llama 3 was trained, arXiv:2407.21783).

    Takes any mask: the rows of it that a process holds are slices of their own.
    """

    name = "all_gather"
    any_mask = True

    def forward(self, spread: Sharing, inputs: Inputs) -> tuple[Tensor, Tensor]:
        partial = attend(self._everything(spread, inputs), spread.seen)
        return partial.output, partial.lse

    def _everything(self, spread: Sharing, inputs: Inputs) -> Inputs:
        """One's own queries with keys and values of all tokens, in the order of the row and without padding."""
        gathered = spread.ring.all_gather(pack(inputs.k, inputs.v)).flatten(0, 1)
        return with_keys(inputs, gathered[spread.row_positions(gathered.device)])

    def backward(self, spread: Sharing, inputs: Inputs, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        grad_q = torch.zeros_like(inputs.q, dtype=rows.lse.dtype)
        parts = pack(*attend_backward(self._everything(spread, inputs), rows, spread.seen, grad_q))
        ring = spread.ring.size
        to_all = parts.new_zeros(ring * len(inputs.k), *parts.shape[1:])
        to_all[spread.row_positions(parts.device)] = parts
        return grad_q, *unpack(spread.ring.reduce_scatter(to_all.unflatten(0, (ring, -1))), inputs)


@register
class Ulysses(AllGather):
    """All processes exchange tokens for heads, attend as one would, and exchange back (arXiv:2309.14509)."""

    name = "ulysses"

    def __init__(self) -> None:
        super().__init__()

    def mesh(self, ranks: int) -> tuple[int, int]:
        return 1, ranks


SERVER = 8  # processes that have a quick connection


@register
class USP(Ring):
    """Ulysses within a server, a ring between servers (Fang and Zhao, 2024, arXiv:2405.07719).

    Args:
        ulysses: U; by default as many as divide the processes and 8, the GPUs of a server.
        keep_partials: as in `Ring`.
    """

    name = "usp"

    def __init__(self, *, ulysses: int | None = None, keep_partials: bool = False):
        super().__init__(ulysses=1 if ulysses is None else ulysses, keep_partials=keep_partials)
        self.given = ulysses

    def mesh(self, ranks: int) -> tuple[int, int]:
        if self.given is not None:
            return super().mesh(ranks)
        ulysses = gcd(SERVER, ranks)
        return ranks // ulysses, ulysses


def windows_of(ring: int) -> int:
    """The largest divisor W of R with W ≤ R / W.

    >>> [windows_of(ring) for ring in (1, 2, 4, 6, 8, 12, 16)]
    [1, 1, 2, 2, 2, 3, 4]
    """
    return max(windows for windows in range(1, isqrt(ring) + 1) if ring % windows == 0)


@register
class LoongTrain(USP):
    """Ulysses around a double ring (Gu et al., 2024, arXiv:2406.18485): W windows, a ring within each and one of them.

    What comes from the next window travels while the ring within goes round.

    Args:
        windows: W; by default the largest divisor of R with W ≤ R / W.
        ulysses, keep_partials: as in `USP`.
    """

    name = "loongtrain"

    def __init__(self, *, windows: int | None = None, ulysses: int | None = None, keep_partials: bool = False):
        super().__init__(ulysses=ulysses, keep_partials=keep_partials)
        self.windows = windows

    def mesh(self, ranks: int) -> tuple[int, int]:
        ring, ulysses = super().mesh(ranks)
        if self.windows is not None and (self.windows < 1 or ring % self.windows):
            raise UserError(f"{self.name}: windows={self.windows} does not divide a ring of {ring} processes")
        return ring, ulysses

    def _rings(self, ring: Communicator) -> tuple[Communicator, Communicator]:
        """The ring between windows, and that within one's own."""
        size = ring.size // (windows_of(ring.size) if self.windows is None else self.windows)
        window, index = divmod(ring.rank, size)
        return ring.of(range(index, ring.size, size)), ring.of(range(window * size, (window + 1) * size))

    def go_round(self, spread: Sharing, kv: Tensor, visit: Visit) -> None:
        between, within = self._rings(spread.ring)

        def window(number: int, kv: Tensor) -> None:
            go_round(within, kv, lambda index, kv: visit(number * within.size + index, kv))

        go_round(between, kv, window)

    def go_back(self, spread: Sharing, own: Tensor, visit: VisitBack) -> Tensor:
        between, within = self._rings(spread.ring)

        def window(number: int, kv: Tensor) -> Tensor:
            return go_back(within, kv, lambda index, kv: visit(number * within.size + index, kv))

        return go_back(between, own, window)
