"""The state of a model that reads one token at a time: nested named tuples of tensors, handled as one thing.

Every tensor of a state has the batch as its first dimension; a plain integer in it belongs to the whole batch.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.files import atomic_write

State = TypeVar("State")
MixerState = Any  # of each mixer a class of its own, or a tuple


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The same state with `function` applied to every tensor, as in `map_state(torch.Tensor.cuda, state)`."""
    if isinstance(state, Tensor):
        return function(state)  # type: ignore[return-value]  # State is a Tensor here
    if isinstance(state, tuple):
        entries = (map_state(function, entry) for entry in state)
        # A named tuple takes its fields one by one, a plain one all together.
        return type(state)(*entries) if hasattr(state, "_fields") else type(state)(entries)
    return state


def state_bytes(state: object) -> int:
    """Bytes that the tensors of a state hold. A state that counts its own (a growing cache) is asked."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, tuple):
        return sum(getattr(entry, "nbytes", None) or state_bytes(entry) for entry in state)
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
        self.model: Any = model  # torch types what a module has as a Tensor or a Module, so `step` cannot be called
        # Its structure alone is used: `torch.export` passes lists of tensors and no named tuples.
        self._like = cast(Any, model).init_state(1)
        if not _tensors_alone(self._like):
            raise ValueError(f"expected a model whose state is tensors alone, {type(model).__name__} keeps more")

    def init_state(self, batch: int) -> list[Tensor]:
        """The tensors of the state of `batch` streams before their first token, in the order of its fields."""
        return [tensor for _, tensor in _named(self.model.init_state(batch))]

    def forward(self, *inputs: Any) -> tuple[Any, list[Tensor]]:
        """The last argument is the state; the others are what the model's `step` takes before its own."""
        *inputs_now, state = inputs
        tensors = iter(state)
        y, new_state = self.model.step(*inputs_now, map_state(lambda _: next(tensors), self._like))
        return tuple(y) if isinstance(y, tuple) else y, [tensor for _, tensor in _named(new_state)]


def select_state(state: State, index: int | slice | list[int] | Tensor) -> State:
    """The state of some of the streams, kept as a batch, by an index, a slice, a list or a tensor."""
    index = [index] if isinstance(index, int) else index
    if isinstance(state, RaggedState):
        return state.select(index)  # type: ignore[return-value]  # State is a RaggedState here
    if isinstance(state, tuple):
        entries = (select_state(entry, index) for entry in state)
        return type(state)(*entries) if hasattr(state, "_fields") else type(state)(entries)
    return state[index] if isinstance(state, Tensor) else state  # type: ignore[return-value]  # likewise


def count_streams(state: object) -> int | None:
    """How many streams a state holds; None where it has no tensor."""
    if isinstance(state, RaggedState):
        return state.streams
    if isinstance(state, Tensor):
        return len(state)
    counts = map(count_streams, state) if isinstance(state, tuple) else iter(())
    return next((count for count in counts if count is not None), None)


class StreamsState(NamedTuple):
    """Streams of a batch that have read equally many tokens, and their state; None before their first token."""

    streams: tuple[int, ...]
    state: MixerState


class RaggedState(tuple[StreamsState, ...]):
    """The state of a batch whose streams have read different numbers of tokens, by these numbers.

    A mixer's own state may count tokens for the whole batch, as a position in a chunk does. Therefore streams that
    padding has set apart have states of their own.
    """

    __slots__ = ()

    @property
    def streams(self) -> int:
        """How many streams there are in all."""
        return sum(len(part.streams) for part in self)

    def select(self, index: slice | list[int] | Tensor) -> "RaggedState":
        """Some of the streams, in the order of the index."""
        index = index.cpu() if isinstance(index, Tensor) else index
        chosen = torch.arange(self.streams)[index].tolist()
        parts = []
        for streams, state in self:
            members = [number for number, stream in enumerate(chosen) if stream in streams]
            if members:
                rows = [streams.index(chosen[member]) for member in members]
                parts.append(StreamsState(tuple(members), select_state(state, rows)))
        return RaggedState(parts)


def read_ragged(
    read: Callable[[Tensor, MixerState], tuple[Tensor, MixerState]],
    x: Float[Tensor, "batch tokens dim"],
    state: RaggedState | None = None,
    *,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Tensor, RaggedState]:
    """Read the tokens of each stream and pass over its padding, wherever that stands.

    Streams with equally many tokens are read together. So a state never learns of padding.

    Args:
        read: (tokens, state) to (outputs, state), of tokens without padding; the state is None at first.
        x: tokens.
        state: what a call before returned.
        mask: True where a token is no padding; None where none is.

    Returns the outputs, zero at padding, and the new state.
    """
    state = RaggedState([StreamsState(tuple(range(len(x))), None)]) if state is None else state
    if mask is None and len(state) == 1:
        y, after = read(x, state[0].state)
        return y, RaggedState([StreamsState(state[0].streams, after)])
    mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
    counts = mask.sum(dim=1).tolist()
    y, parts = torch.zeros_like(x), []
    for streams, before in state:
        for count in sorted({counts[stream] for stream in streams}):
            members = [number for number, stream in enumerate(streams) if counts[stream] == count]
            chosen = [streams[member] for member in members]
            after = before if len(chosen) == len(streams) else select_state(before, members)
            if count:
                rows, columns = mask[chosen].nonzero(as_tuple=True)
                rows = torch.tensor(chosen, device=x.device)[rows]
                outputs, after = read(x[rows, columns].unflatten(0, (len(chosen), count)), after)
                y = y.to(outputs.dtype).index_put((rows, columns), outputs.flatten(0, 1))
            parts.append(StreamsState(tuple(chosen), after))
    return y, RaggedState(parts)


def _named(state: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield name, state.contiguous()
    elif isinstance(state, int):
        # safetensors holds tensors alone; `load_state` makes it an int again.
        yield name, torch.tensor(state)
    elif isinstance(state, tuple):
        for key, entry in zip(getattr(state, "_fields", range(len(state))), state):
            yield from _named(entry, f"{name}.{key}" if name else str(key))


def save_state(state: tuple, path: str | Path) -> None:
    """Write a state as safetensors, to go on later or elsewhere with `load_state`."""
    # Copies: safetensors refuses tensors that share memory.
    with atomic_write(Path(path)) as temporary:
        save_file({name: tensor.clone() for name, tensor in _named(state)}, temporary)


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
        differing = ", ".join(sorted(names ^ set(tensors))[:4])
        raise UserError(
            f"{path} holds the state of another model (it differs in {differing}); use the model that wrote it"
        )

    def fill(template, name):
        if isinstance(template, Tensor):
            tensor = tensors[name]
            if tensor.dim() != template.dim():
                raise UserError(
                    f"{path}: {name} has shape {tuple(tensor.shape)}, expected one like {tuple(template.shape)}"
                )
            return tensor.to(template)
        if isinstance(template, int):
            return int(tensors[name])
        if isinstance(template, tuple):
            keys = getattr(template, "_fields", range(len(template)))
            filled = (fill(inner, f"{name}.{key}" if name else str(key)) for key, inner in zip(keys, template))
            return type(template)(*filled) if hasattr(template, "_fields") else type(template)(filled)
        return template

    return fill(like, "")
