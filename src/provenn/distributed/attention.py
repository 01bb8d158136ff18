"""Attention whose tokens are spread over processes: one sequence, or one packed row of documents, and its gradient."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from provenn.core.errors import UserError
from provenn.distributed.communicator import Communicator, Traffic, simulate
from provenn.distributed.methods import Method, method_called
from provenn.distributed.placement import Pattern, Placement
from provenn.distributed.slices import Inputs, Slice
from provenn.ops.autograd import backward_without_autocast, is_differentiated, is_transformed, without_autocast

TWICE = "context-parallel attention has no second derivatives: differentiate it once, without create_graph"
TRANSFORMED = "context-parallel attention talks to other processes, which no torch.func transform can follow"


class Spread:
    """A row of tokens, spread over processes: which this one holds, and attention between all.

    Args:
        method: a method, or its name.
        comm: the processes.
        pattern: the mask.
        rows: the documents are rows of a batch, of one length: tensors are (batch, tokens, ...), and this process holds
            the same part of every row. Else they are packed, (tokens, ...).
        placement: which process holds which tokens, where that is known; by default the method says.
    """

    def __init__(
        self,
        method: Method | str,
        comm: Communicator,
        pattern: Pattern,
        *,
        rows: bool = False,
        placement: Placement | None = None,
    ):
        self.method = method_called(method) if isinstance(method, str) else method
        self.comm, self.pattern = comm, pattern
        if rows and len(set(pattern.documents)) > 1:
            raise UserError(f"the rows of a batch have one length, got {sorted(set(pattern.documents))[:8]}")
        self.placement = self.method.place(pattern, comm.size, rows=rows) if placement is None else placement
        ring, ulysses = self.placement.ring, self.placement.ulysses
        own_ring, own_index = divmod(comm.rank, ulysses)
        self.ulysses = comm.of(range(own_ring * ulysses, (own_ring + 1) * ulysses))
        self.ring = comm.of(range(own_index, ring * ulysses, ulysses))
        self._on: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def batch(self) -> int | None:
        """How many rows there are; None of a packed row."""
        return len(self.placement.documents) if self.placement.rows else None

    def _index(self, name: str, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        if (name, device) not in self._on:
            self._on[name, device] = make().to(device)
        return self._on[name, device]

    def positions(self, device: torch.device | str = "cpu") -> Int[Tensor, " local"]:
        """Where in their document, or row of the batch, this process's tokens stand: what rotary positions turn by.

        Of padding 0. Of a batch the same for every row.
        """

        def make() -> Tensor:
            # Where the ring is one process, the placement does not distinguish documents.
            starts = torch.tensor([0, *self.pattern.documents]).cumsum(0)
            tokens = self.placement.tokens(self.comm.rank)
            document = torch.searchsorted(starts, tokens.clamp_min(0), right=True) - 1
            positions = (tokens - starts[document]).masked_fill(tokens < 0, 0)
            return positions if self.batch is None else positions[: len(positions) // self.batch]

        return self._index("positions", make, torch.device(device))

    def real(self, device: torch.device | str = "cpu") -> Shaped[Tensor, " local"]:
        """True where this process holds a token and no padding; of a batch the same for every row."""

        def make() -> Tensor:
            real = self.placement.tokens(self.comm.rank) >= 0
            return real if self.batch is None else real[: len(real) // self.batch]

        return self._index("real", make, torch.device(device))

    def dispatch(self, x: Shaped[Tensor, "..."], fill: float | int = 0) -> Shaped[Tensor, "..."]:
        """What this process holds of (tokens, ...), or of (batch, tokens, ...); `fill` is written into padding."""
        if self.batch is None:
            return self.placement.dispatch(x, self.comm.rank, fill)
        length = self.placement.documents[0]
        if tuple(x.shape[:2]) != (self.batch, length):
            raise UserError(f"expected {self.batch} rows of {length} tokens, got {tuple(x.shape[:2])}")
        return self.placement.dispatch(x.flatten(0, 1), self.comm.rank, fill).unflatten(0, (self.batch, -1))

    def undispatch(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The whole row, from what every process holds; all of them have to ask.

        Its gradient is this process's part alone: every process is taken to compute the same of the whole row.
        """
        whole = _Collected.apply(x if self.batch is None else x.flatten(0, 1), self)
        return whole if self.batch is None else whole.unflatten(0, (self.batch, -1))

    def pair(self, other: int) -> tuple[Slice, ...]:
        """What this process's queries see of the keys of another of the ring."""
        if self.pattern.causal is None:
            raise UserError(f"{self.method.name} takes masks of documents that keep to themselves")
        if self.placement.ring == 1 and not self.placement.rows:  # this process has all tokens in order
            return self.pattern.slices
        return self.placement.pair(self.ring.rank, other, self.pattern.causal)

    @property
    def seen(self) -> tuple[Slice, ...]:
        """What this process's queries see of the whole row."""
        return self.placement.seen(self.ring.rank, self.pattern.slices)

    def row_positions(self, device: torch.device) -> Int[Tensor, " tokens"]:
        """Where each token of the row is in what the processes of the ring hold, one after another."""
        return self._index("row_positions", lambda: self.placement.row_positions, device)

    # How heads are exchanged for tokens.

    def gather_tokens(self, x: Tensor) -> Tensor:
        """(tokens, heads, dim) of this process to the tokens of all U, and a U-th of the heads."""
        size = self.ulysses.size
        if size == 1:
            return x
        parts = self.ulysses.all_to_all(x.unflatten(1, (size, -1)).transpose(0, 1)).flatten(0, 1)
        return parts if self.placement.order is None else parts[self._order(x.device)]

    def gather_heads(self, x: Tensor) -> Tensor:
        """Back: all heads, of this process's tokens."""
        size = self.ulysses.size
        if size == 1:
            return x
        if self.placement.order is not None:
            x = torch.empty_like(x).index_copy_(0, self._order(x.device), x)
        return self.ulysses.all_to_all(x.unflatten(0, (size, -1))).transpose(0, 1).flatten(1, 2)

    def _order(self, device: torch.device) -> Tensor:
        return self._index("order", lambda: self.placement.order, device)  # type: ignore[arg-type,return-value]  # not None here

    @torch.compiler.disable  # a compiler cannot see what other processes send
    def attend(
        self,
        q: Float[Tensor, "*local heads dim"],
        k: Float[Tensor, "*local kv_heads dim"],
        v: Float[Tensor, "*local kv_heads width"],
        *,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Softmax attention of this process's tokens to all that the mask lets them see; all processes have to ask.

        Args:
            q, k, v: of this process's tokens, (tokens, heads, dim) or (batch, tokens, heads, dim).
            scale: of the scores; by default 1 / √dim.
            return_lse: give the log of each row's sum of exponentials too, (tokens, heads), without a gradient.

        Raises:
            UserError: shapes or heads that do not fit, or a process that is lost.
        """
        if is_transformed():
            raise UserError(TRANSFORMED)
        leading = q.shape[:-2]
        expected = (self.placement.local_tokens,) if self.batch is None else (
            self.batch, self.placement.local_tokens // self.batch
        )  # fmt: skip
        for name, x in (("q", q), ("k", k), ("v", v)):
            if tuple(x.shape[:-2]) != expected:
                raise UserError(
                    f"{name} must be (…, heads, dim) of this process's {expected} tokens, as `dispatch` gives them, "
                    f"got {tuple(x.shape)}"
                )
        self.method.check(self.pattern, self.comm.size, q.shape[-2], k.shape[-2])
        if k.shape[-2] != v.shape[-2] or q.shape[-1] != k.shape[-1]:
            raise UserError(f"q, k and v do not fit: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        k, v = (_repeated(x.to(q.dtype), self.ulysses.size) for x in (k, v))
        flat = [x if self.batch is None else x.flatten(0, 1) for x in (q, k, v)]
        output, lse = _Attention.apply(*flat, self, scale, return_lse)
        output = output.unflatten(0, leading) if self.batch is not None else output
        if not return_lse:
            return output
        return output, lse.unflatten(0, leading) if self.batch is not None else lse

    def run(self, inputs: Inputs, return_lse: bool) -> tuple[Tensor, Tensor, Any]:
        """One forward pass, without autograd: output, log-sum-exp (empty unless asked for), what `run_back` needs."""
        with torch.no_grad(), without_autocast(inputs.q), self.comm.traffic.during("forward"):
            output, lse, saved = self.method.attend(self, inputs)
            if not return_lse:
                return output, lse.new_empty(0), saved
            with self.comm.traffic.during("lse"):
                return output, self.gather_heads(lse.unsqueeze(-1)).squeeze(-1), saved

    def run_back(self, saved: Any, grad: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """One backward pass, without autograd."""
        with torch.no_grad(), without_autocast(grad), self.comm.traffic.during("backward"):
            return self.method.attend_back(self, saved, grad, scale)


def _repeated(x: Tensor, ulysses: int) -> Tensor:
    """Keys or values with a head for every process that heads are divided among; autograd sums over the copies."""
    copies = ulysses // x.shape[-2]
    return x.repeat_interleave(copies, dim=-2) if copies > 1 else x


class _Attention(torch.autograd.Function):
    """Forward and backward are the method's, in which processes talk."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, spread: Spread, scale: float, return_lse: bool):
        output, lse, saved = spread.run(Inputs(q, k, v, scale), return_lse)
        ctx.save_for_backward(*saved)
        ctx.spread, ctx.scale = spread, scale
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    @backward_without_autocast
    def backward(ctx, grad: Tensor, _: Tensor):
        if is_differentiated():
            raise RuntimeError(TWICE)
        return *ctx.spread.run_back(ctx.saved_tensors, grad, ctx.scale), None, None, None


class _Collected(torch.autograd.Function):
    """The whole row, of which each process has a part."""

    @staticmethod
    def forward(ctx, x: Tensor, spread: Spread):
        ctx.spread = spread
        with spread.comm.traffic.during("undispatch"):
            parts = spread.comm.all_gather(x)
        return spread.placement.undispatch(parts.unbind(0))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.spread.placement.dispatch(grad, ctx.spread.comm.rank), None


class Simulation:
    """A group of processes as threads of this one, for a row that this process holds wholly.

    The result is that of real processes, and what each of them would send is counted.

    Args:
        method: a method, or its name.
        ranks: how many processes.
        pattern: the mask.
        rows: as in `Spread`.
    """

    def __init__(self, method: Method | str, ranks: int, pattern: Pattern, *, rows: bool = False):
        self.method = method_called(method) if isinstance(method, str) else method
        self.pattern, self.ranks, self.rows = pattern, ranks, rows
        if ranks < 1:
            raise UserError(f"ranks must be at least 1, got {ranks}")
        self.placement = self.method.place(pattern, ranks, rows=rows)
        self.spreads: list[Spread] = []
        self.traffic = [Traffic() for _ in range(ranks)]

    def attend(
        self,
        q: Float[Tensor, "*tokens heads dim"],
        k: Float[Tensor, "*tokens kv_heads dim"],
        v: Float[Tensor, "*tokens kv_heads width"],
        *,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Softmax attention of all tokens, (tokens, heads, dim) or with `rows` (batch, tokens, heads, dim)."""
        if is_transformed():
            raise UserError(TRANSFORMED)
        self.method.check(self.pattern, self.ranks, q.shape[-2], k.shape[-2])
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        k, v = (_repeated(x.to(q.dtype), self.placement.ulysses) for x in (k, v))
        flat = [x.flatten(0, 1) if self.rows else x for x in (q, k, v)]
        parts = [self.placement.dispatch(x, rank) for x in flat for rank in range(self.ranks)]
        results = _Simulated.apply(self, scale, *parts)
        output, lse = (self.placement.undispatch(results[i * self.ranks : (i + 1) * self.ranks]) for i in range(2))
        if self.rows:
            output, lse = (x.unflatten(0, q.shape[:2]) for x in (output, lse))
        return (output, lse) if return_lse else output


class _Simulated(torch.autograd.Function):
    """All ranks at once, so that both passes may start threads of their own, wherever autograd calls them."""

    @staticmethod
    def forward(ctx, simulation: Simulation, scale: float, *parts: Tensor):
        ranks = simulation.ranks

        def run(comm: Communicator) -> Any:
            comm.traffic = simulation.traffic[comm.rank]
            spread = Spread(
                simulation.method, comm, simulation.pattern, rows=simulation.rows, placement=simulation.placement
            )
            q, k, v = parts[comm.rank :: ranks]
            return spread.run(Inputs(q, k, v, scale), True)

        outputs, lses, saved = zip(*simulate(ranks, run))
        ctx.simulation, ctx.scale = simulation, scale
        ctx.counts = [len(each) for each in saved]
        ctx.save_for_backward(*[tensor for each in saved for tensor in each])
        ctx.mark_non_differentiable(*lses)
        return *outputs, *lses

    @staticmethod
    @backward_without_autocast
    def backward(ctx, *grads: Tensor):
        if is_differentiated():
            raise RuntimeError(TWICE)
        simulation, tensors = ctx.simulation, list(ctx.saved_tensors)
        saved = [tuple(tensors.pop(0) for _ in range(count)) for count in ctx.counts]

        def run(comm: Communicator) -> Any:
            comm.traffic = simulation.traffic[comm.rank]
            spread = Spread(
                simulation.method, comm, simulation.pattern, rows=simulation.rows, placement=simulation.placement
            )
            return spread.run_back(saved[comm.rank], grads[comm.rank], ctx.scale)

        results = simulate(simulation.ranks, run)
        return None, None, *[grad for kind in zip(*results) for grad in kind]
