"""ONNX files as torch writes them, with forms of operations that it has none of, or a wrong one."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.narrowing import present
from provenn.core.progress import quiet_loggers


def check_path(file: Path) -> None:
    """Is this the name of an ONNX file, and can one be made here?

    Raises:
        UserError: another ending, or the extra is not installed.
    """
    if file.suffix.lower() != ".onnx":
        raise UserError(f"a system is exported as .onnx, got {str(file)!r}")
    if importlib.util.find_spec("onnxscript") is None:
        raise UserError("ONNX needs two packages more: pip install 'provenn[onnx]'")


def write(
    system: nn.Module,
    example: tuple[Tensor | int, ...] | dict[str, Tensor],
    sizes: Any,  # nested as the example is, of what torch.export takes
    *,
    inputs: list[str],
    outputs: list[str],
    path: Path,
    about: dict[str, str],
) -> None:
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
            custom_translation_table=translations(),
        )
    program = present(program, "program")
    program.model.metadata_props.update(about)
    program.save(str(path))


def translations() -> dict[Any, Any]:
    """ONNX forms of operations that torch has none of, or a wrong one, as `torch.onnx.export` takes them."""
    return {
        torch.ops.aten.sort.stable: _stable_sort,
        torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_average,
        torch.ops.aten._adaptive_avg_pool2d.default: _adaptive_average,
    }


def _stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """`aten.sort.stable`, which torch has no ONNX form of: of equal values TopK takes the first one first.

    Any: values of the file that is being written; onnxscript comes with an extra. Names are as torch has them.
    """
    from onnxscript import opset18

    op: Any = opset18  # whose annotations want a value of one type
    length = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    return op.TopK(self, length, axis=dim, largest=int(descending), sorted=1)


def _adaptive_average(self: Any, output_size: Sequence[int]) -> Any:
    """`aten.adaptive_avg_pool2d`, whose form by torch is right at the size alone that was traced.

    Cell i of n over a side of s is the mean of positions ⌊i s / n⌋ to ⌈(i + 1) s / n⌉: a matrix from the side to the
    cells, made of the side as it comes. Any: as in `_stable_sort`.
    """
    from onnxscript import opset18

    op: Any = opset18

    def cells(axis: int, count: int) -> Any:
        side = op.Gather(op.Shape(self), op.Constant(value_int=axis))
        number = op.Constant(value_ints=list(range(count)))
        counts = op.Constant(value_int=count)
        start = op.Div(op.Mul(number, side), counts)
        after = op.Add(number, op.Constant(value_int=1))
        end = op.Div(op.Add(op.Mul(after, side), op.Constant(value_int=count - 1)), counts)
        last = op.Constant(value_ints=[-1])
        start, end = op.Unsqueeze(start, last), op.Unsqueeze(end, last)
        position = op.Range(op.Constant(value_int=0), side, op.Constant(value_int=1))
        inside = op.And(op.GreaterOrEqual(position, start), op.Less(position, end))
        return op.Div(op.CastLike(inside, self), op.CastLike(op.Sub(end, start), self))  # (cells, side)

    rows, columns = cells(-2, output_size[0]), cells(-1, output_size[1])
    return op.MatMul(op.MatMul(rows, self), op.Transpose(columns, perm=[1, 0]))


def in_a_line(error: Exception) -> str:
    words = str(error).partition("## Exception summary")[2] or str(error)
    return f"{type(error).__name__}: {' '.join(words.split())[:240]}"
