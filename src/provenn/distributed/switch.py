"""The switch by which a model's softmax attention works on sequences that are spread over processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.distributed.attention import Spread
from provenn.distributed.communicator import Communicator
from provenn.distributed.methods import Method, method_called
from provenn.distributed.placement import Pattern


class ContextParallel:
    """What the layers of a model share while its sequences are spread: who the processes are, and what each holds.

    Outside of `sequences` the model works as it always does. Its parameters are the same in every process; the gradient
    of each is the sum over the processes.

        sharing = ContextParallel(Communicator(ProcessTransport()), "ring")
        switch_on(model, sharing)
        with sharing.sequences(batch=8, tokens=4096):
            logits = model(sharing.dispatch(tokens))  # (8, local tokens, vocab)

    Args:
        comm: the processes.
        method: a method, or its name.
    """

    def __init__(self, comm: Communicator, method: Method | str = "ring"):
        self.comm = comm
        self.method = method_called(method) if isinstance(method, str) else method
        self.shape: tuple[int, int] | None = None  # of the sequences that are spread: rows, tokens
        self._spreads: dict[tuple[int, int, bool], Spread] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContextParallel":
        return self  # a copy of a model works with the same processes

    @contextmanager
    def sequences(self, batch: int, tokens: int) -> Iterator[None]:
        """Inside, the model's tokens are this process's part of so many sequences of one length."""
        if batch < 1 or tokens < 1:
            raise UserError(f"expected at least one sequence of at least one token, got {batch} of {tokens}")
        before, self.shape = self.shape, (batch, tokens)
        try:
            yield
        finally:
            self.shape = before

    @property
    def length(self) -> int:
        """Tokens of each sequence."""
        return self._spread(True).placement.documents[0]

    def _spread(self, causal: bool) -> Spread:
        if self.shape is None:
            raise UserError("no sequences are spread: use `with sharing.sequences(batch, tokens)`")
        key = (*self.shape, causal)
        if key not in self._spreads:
            if len(self._spreads) > 16:  # batches of many shapes
                self._spreads.clear()
            batch, tokens = self.shape
            pattern = Pattern.of_documents([tokens] * batch, causal)
            self._spreads[key] = Spread(self.method, self.comm, pattern, rows=True)
        return self._spreads[key]

    def dispatch(
        self, x: Shaped[Tensor, "batch tokens *rest"], fill: float | int = 0
    ) -> Shaped[Tensor, "batch local *rest"]:
        """This process's part of every sequence; `fill` is written into padding."""
        return self._spread(True).dispatch(x, fill)

    def positions(self, device: torch.device | str = "cpu") -> Int[Tensor, " local"]:
        """Where in their sequence this process's tokens stand."""
        return self._spread(True).positions(device)

    def real(self, device: torch.device | str = "cpu") -> Shaped[Tensor, " local"]:
        """True where this process holds a token and no padding."""
        return self._spread(True).real(device)

    def attend(
        self,
        q: Float[Tensor, "batch heads local dim"],
        k: Float[Tensor, "batch kv_heads local dim"],
        v: Float[Tensor, "batch kv_heads local width"],
        *,
        causal: bool,
        scale: float | None = None,
    ) -> Float[Tensor, "batch heads local width"]:
        """Attention of this process's tokens to those of all processes."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self._spread(causal).attend(q, k, v, scale=scale).transpose(1, 2)


def why_not(mixer: nn.Module) -> str | None:
    """Why a token mixer cannot work on spread sequences; None where it can.

    One that can says so by an attribute `context_parallel` of the class whose `forward` it runs.
    """
    runs = next(kind for kind in type(mixer).__mro__ if "forward" in vars(kind))
    if "context_parallel" in vars(runs):
        return None
    name = type(mixer).__name__
    return f"{name} is no plain softmax attention: what it hands from token to token has no form over processes here"


def switch_on(model: nn.Module, sharing: ContextParallel | None) -> None:
    """Let all layers of a model that can use spread sequences; None switches them off. See `why_not` for the others."""
    for module in model.modules():
        if any("context_parallel" in vars(kind) for kind in type(module).__mro__):
            module.context_parallel = sharing  # type: ignore[assignment]  # nn.Module takes it for a parameter or module


def spread(sharing: ContextParallel | None) -> ContextParallel | None:
    """What is shared, where sequences are spread at the moment."""
    return sharing if sharing is not None and sharing.shape is not None else None
