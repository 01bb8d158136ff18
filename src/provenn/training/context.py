"""Training in which several processes share each sequence: context parallelism beside data parallelism."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.distributed import (
    Communicator,
    ContextParallel,
    Pattern,
    ProcessTransport,
    method_called,
    switch_on,
)
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.language import spread_over
from provenn.tasks.base import IGNORED, Task


def check_divides_tokens(model: nn.Module, task: Task, method: str, ranks: int) -> None:
    """Can so many processes share the sequences of this model and task?

    Raises:
        UserError: no, and why.
    """
    if not task.divides_tokens or hasattr(model, "training_loss"):
        raise UserError(
            f"context parallelism is for tasks with a loss of each token by itself, and {task.name} has others"
        )
    spread_over(model, _Nobody())
    switch_on(model, None)
    for module in model.modules():
        if isinstance(module, SoftmaxAttention):
            method_called(method).check(Pattern.of_documents([1]), ranks, module.heads, module.heads)


class _Nobody(ContextParallel):
    """What stands for the processes before there are any."""

    def __init__(self) -> None:
        self.shape = None


class TokenShare:
    """Neighbouring processes get the same batch, and of every sequence of it a part each.

    Args:
        size: how many processes share a sequence; a divisor of all.
        method: of `provenn.distributed.METHODS`.
    """

    def __init__(self, size: int, method: str = "ring"):
        self.size, self.method = size, method
        self.sharing: ContextParallel | None = None

    def join(self, model: nn.Module) -> None:
        """Form the groups, and switch the model on; all processes have to."""
        # A group of its own: messages must not meet those in which gradients are summed up.
        transport = ProcessTransport(dist.new_group())
        first = transport.rank // self.size * self.size
        self.sharing = ContextParallel(Communicator(transport, range(first, first + self.size)), self.method)
        spread_over(model, self.sharing)

    def leave(self, model: nn.Module) -> None:
        """Switch the model off, and let go of the group."""
        switch_on(model, None)
        self.sharing = None

    def loss(self, model: nn.Module, task: Task, batch: Sequence[Tensor]) -> Tensor:
        """This process's part of the batch's mean loss, so weighed that the mean over the processes is the whole one.

        With n_r of n asked tokens here, size · n_r / n · (the mean loss of these).
        """
        if self.sharing is None:
            raise UserError("the processes that share sequences have not joined")
        tokens, targets = _tokens_and_targets(batch)
        with self.sharing.sequences(*tokens.shape):
            ours, asked = self.sharing.dispatch(tokens), self.sharing.dispatch(targets, IGNORED)
            share = (asked != IGNORED).sum() / (targets != IGNORED).sum()
            # A mean over no token has no value: one of the padding stands in, of weight zero.
            asked.view(-1)[:1].masked_fill_(share == 0, 0)
            return task.loss(model, (ours, asked)) * share * self.size


def _tokens_and_targets(batch: Any) -> tuple[Tensor, Tensor]:
    if len(batch) != 2 or any(not isinstance(x, Tensor) or x.dim() != 2 or x.is_floating_point() for x in batch):
        raise UserError("context parallelism takes batches of (batch, tokens) tokens and as many targets")
    tokens, targets = batch
    if tokens.shape != targets.shape:
        raise UserError(f"tokens of shape {tuple(tokens.shape)} have targets of shape {tuple(targets.shape)}")
    return tokens, targets
