"""The state of a model that reads one token at a time: nested named tuples of tensors, handled as one thing.

Every tensor of a state has the batch as its first dimension; a plain integer in it belongs to the whole batch.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from provenn.errors import UserError

State = TypeVar("State")


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The same state with `function` applied to every tensor, as in `map_state(torch.Tensor.cuda, state)`."""
    if isinstance(state, Tensor):
        return function(state)  # type: ignore[return-value]
    if isinstance(state, tuple):
        parts = (map_state(function, part) for part in state)
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)  # type: ignore[arg-type]
    return state


def state_bytes(state: object) -> int:
    """Bytes that the tensors of a state hold. A state that counts its own (a growing cache) is asked."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, tuple):
        return sum(getattr(part, "nbytes", None) or state_bytes(part) for part in state)
    return 0


def _tensors_alone(state: object) -> bool:
    return isinstance(state, Tensor) or (isinstance(state, tuple) and all(map(_tensors_alone, state)))


class TensorStep(nn.Module):
    """The `step` of a model on plain tensors, (x_t, state) → (y_t, state), as `torch.export.save` can write it.

    Args:
        model: has `init_state` and `step`, and a state of tensors alone, as Aaren's is.

    Raises:
        ValueError: for a state that is more than tensors, as a growing cache is.

    >>> from provenn.papers.aaren import AarenEncoder
    >>> step = TensorStep(AarenEncoder(16, 4, layers=2, feedforward=32).eval())
    >>> y, state = step(torch.randn(3, 16), step.init_state(batch=3))
    >>> y.shape, [tuple(part.shape) for part in state]
    (torch.Size([3, 16]), [(3, 4), (3, 4), (3, 4, 4), (3, 4), (3, 4), (3, 4, 4)])
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model
        self._like = cast(Any, model).init_state(1)
        if not _tensors_alone(self._like):
            raise ValueError(f"expected a model whose state is tensors alone, {type(model).__name__} keeps more")

    def init_state(self, batch: int) -> list[Tensor]:
        """The tensors of the state of `batch` streams before their first token, in the order of its fields."""
        return [tensor for _, tensor in _named(self.model.init_state(batch))]

    def forward(self, *inputs: Any) -> tuple[Any, list[Tensor]]:
        """The last argument is the state; the others are what the model's `step` takes before its own."""
        *now, state = inputs
        parts = iter(state)
        y, after = self.model.step(*now, map_state(lambda _: next(parts), self._like))
        return tuple(y) if isinstance(y, tuple) else y, [tensor for _, tensor in _named(after)]


def select_state(state: State, index: int | slice | list[int] | Tensor) -> State:
    """The state of some of the streams, kept as a batch, by an index, a slice, a list or a tensor."""
    index = [index] if isinstance(index, int) else index
    return map_state(lambda tensor: tensor[index], state)


def _named(state: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield name, state.contiguous()
    elif isinstance(state, int):
        yield name, torch.tensor(state)
    elif isinstance(state, tuple):
        for key, part in zip(getattr(state, "_fields", range(len(state))), state):
            yield from _named(part, f"{name}.{key}" if name else str(key))


def save_state(state: tuple, path: str | Path) -> None:
    """Write a state as safetensors, to go on later or elsewhere with `load_state`."""
    save_file({name: tensor.clone() for name, tensor in _named(state)}, path)


def load_state(like: State, path: str | Path) -> State:
    """Read what `save_state` wrote.

    Args:
        like: a state of the same model for any batch, say `model.init_state(1)`: its structure, dtypes and device.
        path: the file.

    Raises:
        UserError: when the file holds the state of another model.
    """
    tensors = load_file(path)
    names = {name for name, _ in _named(like)}
    if names != set(tensors):
        odd = ", ".join(sorted(names ^ set(tensors))[:4])
        raise UserError(f"{path} holds the state of another model (it differs in {odd}); use the model that wrote it")

    def fill(part, name):
        if isinstance(part, Tensor):
            found = tensors[name]
            if found.dim() != part.dim():
                raise UserError(f"{path}: {name} has shape {tuple(found.shape)}, expected one like {tuple(part.shape)}")
            return found.to(part)
        if isinstance(part, int):
            return int(tensors[name])
        if isinstance(part, tuple):
            keys = getattr(part, "_fields", range(len(part)))
            filled = (fill(inner, f"{name}.{key}" if name else str(key)) for key, inner in zip(keys, part))
            return type(part)(*filled) if hasattr(part, "_fields") else type(part)(filled)
        return part

    return fill(like, "")
