"""One step of a streaming layer as an ONNX file."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.inference.onnx.comparing import TOLERANCE, Differs, compare, open_sessions
from provenn.inference.onnx.files import check_path, in_a_line, write

POSITIONS = (0, 1, 2, 7, 40)  # at which a step must do the same
AT_POSITION = 7  # of the example that is traced: 0 and 1 would be taken for constants


class Step(nn.Module):
    """One step of a streaming layer, its state spread out into tensors and whole numbers (the tokens so far, say).

    Args:
        layer: has `init_state` and `step`.

    Shapes: token (batch, dim) and the parts of the state to the output and the parts of the new state.
    """

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer
        # ONNX has no nested tuples: the state is taken apart to leaves and put together in this form.
        self.form = pytree.tree_flatten(layer.init_state(1))[1]

    def forward(self, token: Float[Tensor, "batch dim"], *state: Tensor | int) -> tuple[Tensor | int, ...]:
        y, new = self.layer.step(token, pytree.tree_unflatten(list(state), self.form))
        return y, *pytree.tree_leaves(new)


def step(layer: Any, dim: int, file: str | Path) -> str:
    """Write one step of a streaming layer: `token`, `state_0`… to `output`, `new_state_0`…; the batch stays open.

    What the state holds of whole numbers, such as the tokens so far, are scalars of type int64 in the file.

    Args:
        layer: a token mixer or an encoder with `init_state` and `step`, in eval mode.
        dim: width of a token.
        file: where it goes, ending in .onnx.

    Returns:
        How far the file is from the layer over several steps, in a line.

    Raises:
        UserError: a layer that cannot stream, that has an operation that ONNX lacks, or whose step changes with the
            position, such as at the end of a chunk. A file that
            gives other steps than the layer.
    """
    check_path(Path(file))
    if not (hasattr(layer, "init_state") and hasattr(layer, "step")):
        raise UserError(f"{type(layer).__name__} has no init_state and step: it cannot stream")
    system = Step(layer).eval()
    state = pytree.tree_leaves(layer.init_state(2))
    tokens = torch.randn(9, 3, dim, generator=torch.Generator().manual_seed(0))
    _check_every_step_alike(system, tokens[0, :2], state)
    batch = torch.export.Dim("batch")
    names = [f"state_{k}" for k in range(len(state))]
    example = [AT_POSITION if isinstance(leaf, int) else leaf for leaf in state]
    open_sizes = tuple(torch.export.Dim.DYNAMIC if isinstance(leaf, int) else {0: batch} for leaf in state)
    with atomic_write(Path(file)) as path:
        path.touch()
        try:
            write(
                system,
                (tokens[0, :2], *example),
                ({0: batch}, open_sizes),
                inputs=["token", *names],
                outputs=["output", *(f"new_{name}" for name in names)],
                path=path,
                about={},
            )
        except (RuntimeError, torch.onnx.OnnxExporterError) as error:
            raise UserError(f"{type(layer).__name__} cannot be written as ONNX: {in_a_line(error)}") from error
        if importlib.util.find_spec("onnxruntime") is None:
            return "not compared with the layer, onnxruntime is missing: pip install 'provenn[onnx]'"
        try:
            largest = max(_compare_steps(path, layer, tokens[:, :count]) for count in (1, 3))
        except Differs as error:
            raise UserError(f"{type(layer).__name__}: the file {error}; no file was written") from error
    return (
        f"as the layer in onnxruntime, without and with optimisation, over {len(tokens)} steps of a batch of 1 and 3: "
        f"largest difference {largest:.1e} of the range (at most {TOLERANCE:.0e})"
    )


def _compare_steps(file: Path, layer: Any, tokens: Float[Tensor, "steps batch dim"]) -> float:
    """The largest difference of output and state after each of several steps, of the file from the layer.

    Raises:
        Differs: as `compare`.
    """
    largest = 0.0
    for session in open_sessions(file):
        state = layer.init_state(tokens.shape[1])
        for k, token in enumerate(tokens):
            leaves = [torch.as_tensor(leaf).clone() for leaf in pytree.tree_leaves(state)]
            inputs = {"token": token, **{f"state_{i}": leaf for i, leaf in enumerate(leaves)}}
            with torch.no_grad():
                y, state = layer.step(token, state)
            expected = [y, *pytree.tree_leaves(state)]
            where = f"at step {k + 1} of a batch of {len(token)}"
            largest = max(largest, compare([session], inputs, expected, where))
    return largest


class _Position(int):
    """A whole number of a state that notes where something is counted round by it: of a ring, or of a chunk."""

    rounds = False

    def __add__(self, other: object) -> "_Position":
        return _Position(int(self) + other) if isinstance(other, int) else NotImplemented

    __radd__ = __add__

    def __mod__(self, other: int) -> int:
        _Position.rounds = True
        return int(self) % other

    def __floordiv__(self, other: int) -> int:
        _Position.rounds = True
        return int(self) // other


class _Operations(TorchDispatchMode):
    """Notes each operation with the shapes that it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        # Any: as torch calls it.
        result = func(*args, **(kwargs or {}))
        self.seen.append((str(func), [tuple(t.shape) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]))
        return result


def _check_every_step_alike(system: Step, token: Tensor, state: list[Tensor | int]) -> None:
    """Raises UserError where a step does something else at some positions than at others."""
    sequences = []
    _Position.rounds = False
    try:
        for position in POSITIONS:
            with torch.no_grad(), _Operations() as operations:
                # The state is a fresh one but for its positions; in-place writes fall on copies.
                leaves = [_Position(position) if isinstance(leaf, int) else leaf.clone() for leaf in state]
                _, *after = system(token, *leaves)
            # What is run and with which shapes, not its numbers: a trace records exactly that.
            sequences.append((operations.seen, [getattr(leaf, "shape", ()) for leaf in after]))
        alike = not _Position.rounds and all(sequence == sequences[0] for sequence in sequences)
        alike = alike and sequences[0][1] == [getattr(leaf, "shape", ()) for leaf in state]
    except (RuntimeError, IndexError, ValueError):  # a cache is full, or a chunk has no such position
        alike = False
    if not alike:
        raise UserError(
            f"the step of {type(system.layer).__name__} changes with the position, such as at the end of a chunk. "
            "An ONNX file holds one step: export a layer whose state keeps one size, such as Aaren or Hedgehog"
        )
