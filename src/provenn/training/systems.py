"""What a system may bring to its own training; where it brings nothing, the task and the recipe serve.

A system is a paper's whole model, an `nn.Module`. It may define

- `training_loss(batch)`: the mean loss of a batch, instead of the task's: auxiliary heads, pairs, a rate term;
- `optimizers(recipe)`: one optimizer or several, instead of the recipe's: groups without decay, other rates;
- `before_saving()`: called on the trained model before it is tested and saved: tables to compute, parts to drop.

There is one loss and one backward pass. Of several optimizers each steps on the gradients of its own parameters: what
must not pass from one part's loss to another's parameters is detached in `training_loss`. The recipe's schedule scales
the rates of all of them, and its `clip` bounds the norm of all gradients together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.tasks.base import Task
from provenn.training.recipes import Recipe


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers that step as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        # The groups are those of the parts and no copies, so that a schedule which sets a rate here sets it there.
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Every part's step, after the closure, which computes the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def training_loss(model: nn.Module, task: Task, batch: Any, smoothing: float = 0.0) -> Tensor:
    """The system's own loss of a batch, or the task's, with its targets smoothed."""
    system_loss: Callable[[Any], Tensor] | None = None if task.overrules else getattr(model, "training_loss", None)
    if system_loss is not None:
        return system_loss(batch)
    return task.loss(model, batch, smoothing) if smoothing else task.loss(model, batch)  # type: ignore[call-arg]  # one that `smooths`


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The system's own optimizers, as one, or the recipe's.

    Raises:
        UserError: they are no optimizers, two take the same parameter, or none takes one that needs a gradient.
    """
    make_optimizers: Callable[[Recipe], Any] | None = getattr(model, "optimizers", None)
    if make_optimizers is None:
        return recipe.make_optimizer(model)
    name, given = type(model).__name__, make_optimizers(recipe)
    parts = list(given) if isinstance(given, (list, tuple)) else [given]
    if not parts or not all(isinstance(part, torch.optim.Optimizer) for part in parts):
        kinds = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise UserError(f"{name}.optimizers must return optimizers of torch, got {kinds}")
    taken = [id(p) for part in parts for group in part.param_groups for p in group["params"]]
    if len(set(taken)) < len(taken):
        raise UserError(f"{name}.optimizers: two optimizers take the same parameter")
    left = [label for label, p in model.named_parameters() if p.requires_grad and id(p) not in set(taken)]
    if left:
        raise UserError(
            f"{name}.optimizers leaves out {len(left)} parameters that need a gradient, such as {left[0]}: "
            "give them to an optimizer, or set their requires_grad to False"
        )
    return parts[0] if len(parts) == 1 else JointOptimizer(parts)


def before_saving(model: nn.Module) -> None:
    """Let the system get ready, where it wants to."""
    if hasattr(model, "before_saving"):
        with torch.no_grad():
            model.before_saving()  # type: ignore[operator]  # nn.Module says that any attribute may be a tensor
