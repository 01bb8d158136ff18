"""A system as an ONNX file with as many sizes open as hold, held to what its task predicts."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.inference.onnx.comparing import TOLERANCE, Differs, compare, open_sessions
from provenn.inference.onnx.files import check_path, in_a_line, write
from provenn.inference.onnx.quantising import Calibration, quantize
from provenn.nn.fusion import fuse
from provenn.tasks import Portable, Task


def portable_system(
    model: nn.Module,
    task: Task,
    meta: dict[str, Any],
    file: Path,
    about: dict[str, str],
    *,
    calibration: Calibration | None = None,
) -> list[str]:
    """Write a system as its task says (`Task.portable`), compared in onnxruntime with what the task predicts.

    All sizes that the task leaves open stay open where the file gives what `predict` gives at smaller, larger and
    oblong sizes, without and with graph optimisation. Else they are fixed one after the other, the batch last. Branches
    are merged and batch norms folded first: see `provenn.nn.fusion.fuse`.

    Args:
        model: in eval mode; left as it is.
        task, meta: what it does, and what prediction needs to know.
        file: where it goes, ending in .onnx.
        about: is kept in the file's metadata, beside the `sizes` that it takes.
        calibration: what `read_calibration` gives: the file is quantised by it, see `quantize`.

    Returns:
        What the user should know of the file, a line each: its sizes, those compared, and the largest difference.

    Raises:
        UserError: a system that ONNX has no form of, or whose file gives other outputs. No file is left then.
    """
    check_path(file)
    form = task.portable(model, meta)
    with atomic_write(file) as path:
        path.touch()  # tracing takes a while: say now that it cannot be kept
        system, notes = _fused(form)
        lines, trials = _write_compared(form, system, path, about)
        if calibration is not None:
            lines += quantize(path, task, meta, calibration, [_inputs(form, sizes)["image"] for sizes in trials])
    return [*notes, *lines]


def _fused(form: Portable) -> tuple[nn.Module, list[str]]:
    """The system with branches merged and batch norms folded; where that cannot be, as it is, and why."""

    def norms(system: nn.Module) -> int:
        return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in system.modules())

    count = norms(form.system)
    if not count and not any(callable(getattr(module, "fused", None)) for module in form.system.modules()):
        return form.system, []
    try:
        fused = fuse(form.system, tuple(form.example.values()))
    except Exception as error:  # a tracer fails in many ways, and an unfused file is as right
        return form.system, [f"not fused: {in_a_line(error)}"]
    return fused, [f"fused: {count - norms(fused)} of {count} batch norms folded"] if count else []


Sizes = dict[str, int]  # by the names of `Portable.open_sizes`


class _Attempt(NamedTuple):
    """Which sizes stay open, and the sizes that it is traced at, once for each."""

    open: set[str]
    traced: list[Sizes]


def _attempts(form: Portable) -> list[_Attempt]:
    """From all sizes open to none."""
    given = _sizes(form)
    attempts = [_Attempt(set(given), [{**given, **sizes} for sizes in form.traced] or [given])]
    if "batch" in given and len(given) > 1:
        attempts.append(_Attempt({"batch"}, [given]))
    if given:
        attempts.append(_Attempt(set(), [{**given, "batch": 1} if "batch" in given else given]))
    return attempts


def _sizes(form: Portable) -> Sizes:
    """The open sizes as the example has them."""
    return {
        label: form.example[name].shape[axis] for name, axes in form.open_sizes.items() for axis, label in axes.items()
    }


def _inputs(form: Portable, sizes: Sizes) -> dict[str, Tensor]:
    """The example, cut or repeated to these sizes."""
    inputs = dict(form.example)
    for name, axes in form.open_sizes.items():
        for axis, label in axes.items():
            length = inputs[name].shape[axis]
            if sizes[label] != length:
                inputs[name] = inputs[name].index_select(axis, torch.arange(sizes[label]) % length)
    return inputs


def _trials(form: Portable, attempt: _Attempt) -> list[Sizes]:
    """Sizes to compare at: those of the example and those traced; the smallest, smaller, larger and oblong ones."""
    given = _sizes(form)
    rest = [label for label in given if label in attempt.open and label != "batch"]
    smallest = {label: form.least.get(label, 1) for label in rest}
    smaller = {label: max(smallest[label], given[label] // 2 | 1) for label in rest}
    larger = {label: (given[label] * 3 // 2 + 6) | 1 for label in rest}
    # Of two sides that are given alike none stays like the other.
    oblong = [{label: (smaller, larger)[(k + turn) % 2][label] for k, label in enumerate(rest)} for turn in (0, 1)]
    trials: list[Sizes] = []
    for k, sizes in enumerate([{}, *attempt.traced, smallest, smaller, larger, *oblong]):
        trial = {**given, **sizes}
        if "batch" in given:
            trial["batch"] = 1 if k % 2 == 0 or "batch" not in attempt.open else 3
        if trial not in trials:
            trials.append(trial)
    if "batch" in attempt.open and len(trials) == 1:
        trials.append({**trials[0], "batch": 3})
    return trials


def _write_compared(
    form: Portable, system: nn.Module, path: Path, about: dict[str, str]
) -> tuple[list[str], list[Sizes]]:
    """Write the system with as many sizes open as hold; what is to be said of them, and the sizes compared."""
    given = _sizes(form)
    trouble = ""
    failure: Exception | None = None
    for attempt in _attempts(form):
        dims = {name: torch.export.Dim(name, min=form.least.get(name)) for name in given if name in attempt.open}
        open_sizes = {
            name: {axis: dims[label] for axis, label in form.open_sizes.get(name, {}).items() if label in dims}
            for name in form.example
        }
        words = _openness(form, attempt)
        try:
            for sizes in attempt.traced:
                inputs = _inputs(form, sizes)
                with torch.no_grad():
                    system(**inputs)
                # The file itself says which sizes it takes, for whoever has nothing else.
                facts = {**about, "sizes": words[0]} if words else about
                write(system, inputs, open_sizes, inputs=list(inputs), outputs=form.outputs, path=path, about=facts)
                if importlib.util.find_spec("onnxruntime") is None:
                    words = [
                        f"not compared with predict, onnxruntime is missing: traced at {_listed([sizes])}, and other "
                        "sizes are untried; pip install 'provenn[onnx]'"
                    ]
                    break
                compared = _compare_sizes(form, path, _trials(form, attempt))
            else:
                words += compared
        except OSError:  # of the disk: other sizes need as much room
            raise
        except Differs as error:
            failure, trouble = error, str(error)
        except Exception as error:  # a tracer, or the network itself, which refuses sizes as it likes
            failure, trouble = error, f"cannot be written as ONNX: {in_a_line(error)}"
        else:
            if isinstance(failure, Differs):
                words.insert(1, f"because with them open it {trouble}")
            return words, _trials(form, attempt)
    raise UserError(f"{type(form.system).__name__.lower()}: {trouble}; no file was written") from failure


def _openness(form: Portable, attempt: _Attempt) -> list[str]:
    """Which sizes the file takes, in a line."""
    given = _sizes(form)
    free = [
        f"{name} from {form.least[name]} on" if form.least.get(name, 1) > 1 else name
        for name in given
        if name in attempt.open
    ]
    fixed = [f"{name} {attempt.traced[0][name]}" for name in given if name not in attempt.open]
    words = ([f"any {_joined(free)}"] if free else []) + ([f"fixed: {_joined(fixed)}"] if fixed else [])
    return ["; ".join(words)] if words else []


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _listed(trials: Sequence[Sizes]) -> str:
    """Sizes in a few words: their names once, then the numbers."""
    if not trials[0]:
        return "its one size"
    names = "×".join(trials[0])
    return f"{names} " + ", ".join("×".join(map(str, sizes.values())) for sizes in trials)


def _compare_sizes(form: Portable, file: Path, trials: Sequence[Sizes]) -> list[str]:
    """Hold a file to what `predict` gives, at each of these sizes, without and with graph optimisation.

    Raises:
        Differs: it gives others, or fails.
    """
    predict = form.predict or form.system
    sessions = open_sessions(file)
    largest, compared, refused = 0.0, [], []
    for sizes in trials:
        inputs = _inputs(form, sizes)
        try:
            with torch.no_grad():
                expected = predict(**inputs)
        except Exception:  # a network refuses sizes as it likes
            refused.append(sizes)
            continue
        largest = max(largest, compare(sessions, inputs, pytree.tree_leaves(expected), f"at {_listed([sizes])}"))
        compared.append(sizes)
    if not compared:
        raise Differs(f"cannot be compared: the network takes none of {_listed(trials)}")
    return [
        f"as predict in onnxruntime, without and with optimisation, at {_listed(compared)}: "
        f"largest difference {largest:.1e} of the output's range (at most {TOLERANCE:.0e})",
        *([f"the network itself takes no {_listed(refused)}"] if refused else []),
    ]
