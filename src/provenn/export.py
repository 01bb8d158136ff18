"""Systems and streaming layers as ONNX files, which run without Python and torch."""

import importlib.util
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from provenn.errors import UserError
from provenn.nn.padding import PadToMultiple
from provenn.progress import quiet_loggers


class Enlarger(nn.Module):
    """A super-resolution network for images of any size.

    Args:
        model: has `scale`, and `multiple` where its sides must be multiples of something.

    Shapes: image (batch, 3, height, width) in 0…1 to the same, `scale` times larger.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.network = PadToMultiple(model, int(getattr(model, "multiple", 1)), int(model.scale))  # type: ignore[arg-type]

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height2 width2"]:
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
    """One step of a streaming layer, its state spread out into tensors.

    Args:
        layer: has `init_state` and `step`.

    Shapes: token (batch, dim) and the state's tensors to the output and the new state's tensors.
    """

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer
        self.form = pytree.tree_flatten(layer.init_state(1))[1]

    def forward(self, token: Float[Tensor, "batch dim"], *state: Tensor) -> tuple[Tensor, ...]:
        y, new = self.layer.step(token, pytree.tree_unflatten(list(state), self.form))
        return y, *pytree.tree_leaves(new)


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
    sizes: dict[int, Any]
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
    _write(system.eval(), (example,), (sizes,), ["image"], [result], file, about)


def step(layer: Any, dim: int, file: str | Path) -> None:
    """Write one step of a streaming layer: `token`, `state_0`… to `output`, `new_state_0`…; the batch stays open.

    Args:
        layer: a token mixer or an encoder with `init_state` and `step`, in eval mode.
        dim: width of a token.
        file: where it goes, ending in .onnx.
    """
    system = Step(layer)
    state = pytree.tree_leaves(layer.init_state(2))
    batch = torch.export.Dim("batch")
    names = [f"state_{k}" for k in range(len(state))]
    _write(
        system.eval(),
        (torch.randn(2, dim), *state),
        ({0: batch}, tuple({0: batch} for _ in state)),
        ["token", *names],
        ["output", *(f"new_{name}" for name in names)],
        Path(file),
        {},
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
    example: tuple[Tensor, ...],
    sizes: Any,
    inputs: list[str],
    outputs: list[str],
    file: Path,
    about: dict[str, str],
) -> None:
    check_place(file)
    unfinished = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()  # tracing takes a while: say now that it cannot be kept
        with quiet_loggers("torch.onnx", "onnxscript", "onnx_ir"):  # which name packages that nothing here needs
            program = torch.onnx.export(
                system,
                example,
                dynamo=True,
                dynamic_shapes=sizes,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
        assert program is not None
        program.model.metadata_props.update(about)
        program.save(str(unfinished))
        os.replace(unfinished, file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()
