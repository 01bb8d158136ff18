"""Systems and streaming layers as ONNX files, which run without Python and torch."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from provenn.errors import UserError
from provenn.files import whole
from provenn.nn.padding import PadToMultiple
from provenn.progress import quiet_loggers
from provenn.tasks import Task

POSITIONS = (0, 1, 2, 7, 40)  # at which a step must do the same
AT_POSITION = 7  # of the example that is traced: 0 and 1 would be taken for constants


class Enlarger(nn.Module):
    """A super-resolution network for images of any size.

    Args:
        model: has `scale`, and `multiple` where its sides must be multiples of something.

    Shapes: image (batch, 3, height, width) in 0…1 to the same, `scale` times larger.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.network = PadToMultiple(model, int(getattr(model, "multiple", 1)), int(model.scale))  # type: ignore[arg-type]  # a number

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height2 width2"]:
        # Padding is inside the file, so that whoever runs it need not know of multiples.
        return self.network(image).clamp(0, 1)


class Classifier(nn.Module):
    """A classifier with what comes before and after it.

    Args:
        model: gives logits.
        mean, std: of each channel, as in training.

    Shapes: image (batch, channels, height, width) in 0…1 to probabilities (batch, classes).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.model((image - self.mean) / self.std).softmax(dim=1)


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


def portable_system(model: nn.Module, task: Task, meta: dict[str, Any], file: Path, about: dict[str, str]) -> None:
    """Write a system as its task says, of one input or several; or as `image_system` does."""
    if type(task).portable is Task.portable:
        return image_system(model, task.name, meta, file, about)
    form = task.portable(model, meta)
    dims: dict[str, Any] = {}
    sizes = {
        name: {
            place: dims.setdefault(label, torch.export.Dim(label))
            for place, label in form.open_sizes.get(name, {}).items()
        }
        for name in form.example
    }
    return _write(
        form.system.eval(),
        form.example,
        sizes,
        inputs=list(form.example),
        outputs=form.outputs,
        file=file,
        about=about,
    )


def image_system(model: nn.Module, task: str, meta: dict[str, Any], file: Path, about: dict[str, str]) -> None:
    """Write a system that takes images: `image` (1, 3, height, width) of any size to `larger`, or a batch of images of
    the size that a classifier was trained on to `probabilities`; all in 0…1.

    Args:
        model: in eval mode.
        task, meta: what it does, and what prediction needs to know.
        file: where it goes, ending in .onnx.
        about: is kept in the file's metadata.

    Raises:
        UserError: a system that takes no images.
    """
    sizes: dict[int, Any]  # `torch.export.Dim` is a class to type checkers and a function at run time
    if task == "super-resolution":
        system: nn.Module = Enlarger(model)
        # No side is 1, 16 or like another: a tracer would take that for a rule.
        example = torch.rand(1, 3, 37, 51)
        result, sizes = "larger", {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    elif task == "image-classification":
        system = Classifier(model, meta["mean"], meta["std"])
        example = torch.rand(2, meta["channels"], meta["size"], meta["size"])
        result, sizes = "probabilities", {0: torch.export.Dim("batch")}
    else:
        raise UserError(f"only systems that take images can be exported; these weights are for {task}")
    _write(system.eval(), (example,), (sizes,), inputs=["image"], outputs=[result], file=file, about=about)


def step(layer: Any, dim: int, file: str | Path) -> None:
    """Write one step of a streaming layer: `token`, `state_0`… to `output`, `new_state_0`…; the batch stays open.

    What the state holds of whole numbers, such as the tokens so far, are scalars of type int64 in the file.

    Args:
        layer: a token mixer or an encoder with `init_state` and `step`, in eval mode.
        dim: width of a token.
        file: where it goes, ending in .onnx.

    Raises:
        UserError: a layer that cannot stream; whose step is another one at some positions, as where a chunk ends or a
            cache grows, of which an ONNX file holds one alone; or with an operation that ONNX has not.
    """
    check_place(Path(file))
    if not (hasattr(layer, "init_state") and hasattr(layer, "step")):
        raise UserError(f"{type(layer).__name__} has no init_state and step: it cannot stream")
    system = Step(layer).eval()
    state = pytree.tree_leaves(layer.init_state(2))
    _check_every_step_alike(system, torch.randn(2, dim), state)
    batch = torch.export.Dim("batch")
    names = [f"state_{k}" for k in range(len(state))]
    example = [AT_POSITION if isinstance(leaf, int) else leaf for leaf in state]
    open_sizes = tuple(torch.export.Dim.DYNAMIC if isinstance(leaf, int) else {0: batch} for leaf in state)
    try:
        _write(
            system,
            (torch.randn(2, dim), *example),
            ({0: batch}, open_sizes),
            inputs=["token", *names],
            outputs=["output", *(f"new_{name}" for name in names)],
            file=Path(file),
            about={},
        )
    except (RuntimeError, torch.onnx.OnnxExporterError) as error:
        words = str(error).partition("## Exception summary")[2] or str(error)
        raise UserError(f"{type(layer).__name__} cannot be written as ONNX: {' '.join(words.split())[:240]}") from error


class _Position(int):
    """A whole number of a state that notes where something is counted round by it: a place in a ring, a chunk's end."""

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
    except (RuntimeError, IndexError, ValueError):  # no place is left in a cache, or no such place in a chunk
        alike = False
    if not alike:
        raise UserError(
            f"a step of {type(system.layer).__name__} is another one at some positions, as where a chunk ends or a "
            "cache grows, and an ONNX file holds one alone; what can be exported keeps a state of one size, as Aaren "
            "and Hedgehog do"
        )


def check_place(file: Path) -> None:
    """Is this the name of an ONNX file, and can one be made here?

    Raises:
        UserError: another ending, or the extra is not installed.
    """
    if file.suffix.lower() != ".onnx":
        raise UserError(f"a system is exported as .onnx, got {str(file)!r}")
    if importlib.util.find_spec("onnxscript") is None:
        raise UserError("ONNX needs two packages more: pip install 'provenn[onnx]'")


def _write(
    system: nn.Module,
    example: tuple[Tensor | int, ...] | dict[str, Tensor],
    sizes: Any,  # nested as the example is, of what torch.export takes
    *,
    inputs: list[str],
    outputs: list[str],
    file: Path,
    about: dict[str, str],
) -> None:
    check_place(file)
    with whole(file) as place:
        place.touch()  # tracing takes a while: say now that it cannot be kept
        with quiet_loggers("torch.onnx", "onnxscript", "onnx_ir"):  # which name packages that nothing here needs
            program = torch.onnx.export(
                system,
                () if isinstance(example, dict) else example,
                kwargs=example if isinstance(example, dict) else None,
                # By `torch.export`, which refuses where the code fixes a size that is to stay open.
                dynamo=True,
                dynamic_shapes=sizes,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
        assert program is not None
        program.model.metadata_props.update(about)
        program.save(str(place))
