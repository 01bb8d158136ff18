"""Systems and streaming layers as ONNX files, which run without Python and torch.

Each file is run in onnxruntime and held to what `predict` gives before anything is said of it.
"""

import importlib.util
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.core.progress import quiet_loggers
from provenn.nn.fusion import fuse
from provenn.tasks import Portable, Task, TaskData
from provenn.tasks.base import HeldOut, count_examples

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


def portable_system(
    model: nn.Module,
    task: Task,
    meta: dict[str, Any],
    file: Path,
    about: dict[str, str],
    *,
    calibration: "Calibration | None" = None,
) -> list[str]:
    """Write a system as its task says (`Task.portable`), compared in onnxruntime with what the task predicts.

    All sizes that the task leaves open stay open where the file gives what `predict` gives at smaller, larger and
    oblong sizes, without and with graph optimisation. Else they are fixed one after the other, the batch last. Branches
    are merged and batch norms folded first: see `provenn.nn.fusion.fuse`.

    Args:
        model: in eval mode; left as it is.
        task, meta: what it does, and what prediction needs to know.
        file: where it goes, ending in .onnx.
        about: is kept in the file's metadata.
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
        return form.system, [f"not fused: {_in_a_line(error)}"]
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
                _write(system, inputs, open_sizes, inputs=list(inputs), outputs=form.outputs, path=path, about=about)
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
        except _Differs as error:
            failure, trouble = error, str(error)
        except Exception as error:  # a tracer, or the network itself, which refuses sizes as it likes
            failure, trouble = error, f"cannot be written as ONNX: {_in_a_line(error)}"
        else:
            if isinstance(failure, _Differs):
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


TOLERANCE = 1e-3
"""Of the output's range: how far a file may be off. Sums in another order moved outputs by at most 1e-4, fused networks
included. Wrong interpolation or a rule of one size moved them by 5e-2 and more. This lies between the two."""


class _Differs(Exception):
    """A file gives other outputs than predict."""


def _compare_sizes(form: Portable, file: Path, trials: Sequence[Sizes]) -> list[str]:
    """Hold a file to what `predict` gives, at each of these sizes, without and with graph optimisation.

    Raises:
        _Differs: it gives others, or fails.
    """
    predict = form.predict or form.system
    sessions = _sessions(file)
    largest, compared, refused = 0.0, [], []
    for sizes in trials:
        inputs = _inputs(form, sizes)
        try:
            with torch.no_grad():
                expected = predict(**inputs)
        except Exception:  # a network refuses sizes as it likes
            refused.append(sizes)
            continue
        largest = max(largest, _compare(sessions, inputs, pytree.tree_leaves(expected), f"at {_listed([sizes])}"))
        compared.append(sizes)
    if not compared:
        raise _Differs(f"cannot be compared: the network takes none of {_listed(trials)}")
    return [
        f"as predict in onnxruntime, without and with optimisation, at {_listed(compared)}: "
        f"largest difference {largest:.1e} of the output's range (at most {TOLERANCE:.0e})",
        *([f"the network itself takes no {_listed(refused)}"] if refused else []),
    ]


def _sessions(file: Path) -> list[Any]:
    """The file in onnxruntime, without and with graph optimisation. Any: onnxruntime comes with an extra."""
    import onnxruntime

    sessions = []
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 4  # what fails is said in one line here
        sessions.append(onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]))
    return sessions


def _compare(sessions: Sequence[Any], inputs: dict[str, Tensor], expected: Sequence[Any], where: str) -> float:
    """The largest difference of any output from what is expected, in parts of its range.

    Raises:
        _Differs: more than `TOLERANCE`, numbers that are not finite, or a session that fails.
    """
    largest = 0.0
    for session in sessions:
        try:
            given = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        except Exception as error:  # onnxruntime's own kinds, which have no common base
            raise _Differs(f"fails in onnxruntime {where}: {_in_a_line(error)}") from error
        for name, ours, theirs in zip((x.name for x in session.get_outputs()), given, expected, strict=True):
            by = relative_difference(ours, torch.as_tensor(theirs).numpy())
            if not by <= TOLERANCE:
                words = f"{by:.1e} of their range" if math.isfinite(by) else "their shape or by numbers not finite"
                raise _Differs(f"differs from predict {where}: {name} by {words}, at most {TOLERANCE:.0e} is right")
            largest = max(largest, by)
    return largest


def relative_difference(given: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference in parts of the range of `expected`, to which a hundredth of its magnitude is added.

    Where `given` holds indices and `expected` scores with one dimension more, each index stands for its score, which is
    held to the highest. Infinite where shapes differ, or where a number is not finite on either side.

    >>> relative_difference(np.array([0.0, 1.0]), np.array([0.0, 2.0])).__round__(2)
    0.5
    >>> relative_difference(np.array([np.nan]), np.array([np.nan])), relative_difference(np.zeros(2), np.zeros(3))
    (inf, inf)
    >>> relative_difference(np.array([1]), np.array([[0.3, 0.3]]))
    0.0
    """
    if given.dtype.kind == "i" and expected.ndim == given.ndim + 1:
        if given.size and not (given.min() >= 0 and given.max() < expected.shape[-1]):
            return math.inf
        given = np.take_along_axis(expected, given[..., None], axis=-1)[..., 0]
        expected = expected.max(axis=-1)
    if given.shape != expected.shape:
        return math.inf
    ours, theirs = given.astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return math.inf
    distance = np.abs(ours - theirs).max(initial=0.0)
    if distance == 0:
        return 0.0
    scale = np.ptp(theirs) + 0.01 * np.abs(theirs).max()
    return float(distance / scale) if scale else math.inf


CALIBRATED_BY = 128  # training examples, at most
OF_ONE_SIZE = ("digits", "brain")  # embedded data that come at no other


class Calibration(NamedTuple):
    """What a file is quantised by.

    Args:
        source: an embedded name or a path.
        train: the examples that the ranges are taken from, and their meta.
        held_out: the examples that measure the loss of accuracy.
    """

    source: str
    train: TaskData
    held_out: HeldOut


def read_calibration(
    task: Task, meta: dict[str, Any], source: str | Path, *, seed: int = 0, options: dict[str, Any] | None = None
) -> Calibration:
    """Data to quantise by: the training part calibrates; what the task holds out measures the loss of accuracy.

    Args:
        task, meta: as in `portable_system`.
        source: an embedded name or a path.
        seed: of the split; that of the training, which has seen the rest.
        options: how the data are read and split, such as {"val_share": 0.2}; those of the training.

    Raises:
        UserError: another task, onnxruntime is missing, or data that do not fit.
    """
    check_int8(task)
    # Ranges are those of the training's size: at another one a network sees other patterns.
    size = {} if str(source) in OF_ONE_SIZE else {"size": meta["size"]}
    loaded = task.load(source, seed=seed, **size, **(options or {}))
    if loaded.meta["channels"] != meta["channels"] or loaded.meta["classes"] != meta["classes"]:
        raise UserError(
            f"{source} has {loaded.meta['channels']} channel(s) and {len(loaded.meta['classes'])} classes; these "
            f"weights take {meta['channels']} and predict {len(meta['classes'])}, or other ones: calibrate on theirs"
        )
    held_out = task.held_out(source, meta, seed=seed, whole=False, **(options or {}))
    return Calibration(str(source), loaded, held_out)


def quantize(
    file: Path,
    task: Task,
    meta: dict[str, Any],
    calibration: Calibration,
    images: Sequence[Float[Tensor, "_ channels _ _"]] = (),
    *,
    seed: int = 0,
) -> list[str]:
    """Turn an exported classifier or segmenter into int8, in place, by onnxruntime's static quantisation.

    Weights are quantised channel by channel, activations by the range that they have over training examples; each
    keeps its float operator between two conversions (QDQ), so that the file runs where int8 kernels are missing.

    Args:
        file: what `portable_system` wrote.
        task, meta: as there.
        calibration: the data.
        images: in 0…1, of several sizes, at which both files are compared.
        seed: of the choice of examples, and of how they are cut and mirrored.

    Returns:
        The metrics of both files on the held-out part beside each other, their sizes, and how far apart they are, a
        line each.

    Raises:
        UserError: onnxruntime cannot quantise it, or the int8 file fails at one of the sizes.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    loaded, held_out = calibration.train, calibration.held_out
    count = min(CALIBRATED_BY, count_examples(loaded.train))
    chosen = torch.randperm(count_examples(loaded.train), generator=torch.Generator().manual_seed(seed))[:count]

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.indices = iter(chosen.tolist())

        def get_next(self) -> dict[str, Any] | None:
            index = next(self.indices, None)
            if index is None:
                return None
            return {"image": _unstandardised(loaded.train[index][0][None], loaded.meta).numpy()}

    with TemporaryDirectory() as folder, quiet_loggers("root"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain, prepared, small = (Path(folder) / part for part in ("float.onnx", "prepared.onnx", "int8.onnx"))
        shutil.copyfile(file, plain)
        try:
            quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(small),
                Images(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            metrics = [
                task.evaluate(_InOnnxRuntime(path, meta), held_out.dataset)[task.metric] for path in (plain, small)
            ]
            apart = [_apart(plain, small, image) for image in images]
        except UserError:
            raise
        except Exception as error:  # onnxruntime's own kinds among others, which have no common base
            raise UserError(f"onnxruntime cannot quantise {type(task).__name__}: {_in_a_line(error)}") from error
        file.write_bytes(small.read_bytes())
        sizes = [path.stat().st_size / 2**20 for path in (plain, small)]
    examples = count_examples(held_out.dataset)
    lines = [
        f"calibrated on {count} training examples of {calibration.source}; tested on {examples}, {held_out.about}",
        f"          {task.metric.replace('_', ' '):>10}       MiB",
        f"float32   {metrics[0]:>10.4f}  {sizes[0]:>8.2f}",
        f"int8      {metrics[1]:>10.4f}  {sizes[1]:>8.2f}   ({metrics[1] - metrics[0]:+.4f})",
    ]
    if apart:
        shapes = ", ".join("×".join(map(str, image.shape)) for image in images)
        mean, share = np.mean(apart, axis=0)
        lines.append(
            f"int8 beside float32 on patterns of {shapes}: probabilities differ by {mean:.4f} on average, "
            f"the likeliest class in {share:.1%}"
        )
    return lines


def _apart(plain: Path, small: Path, image: Tensor) -> tuple[float, float]:
    """How far the probabilities of two files are apart on average, and the share of other likeliest classes."""
    first, second = (_sessions(file)[1].run(None, {"image": image.numpy()})[0] for file in (plain, small))
    if first.shape != second.shape or not np.isfinite(second).all():
        raise ValueError(f"at {'×'.join(map(str, image.shape))} int8 gives no probabilities of the same shape")
    return float(np.abs(first - second).mean()), float((first.argmax(1) != second.argmax(1)).mean())


def check_int8(task: Task) -> None:
    """Can a system of this task be quantised here?

    Raises:
        UserError: it is no classifier or segmenter, or onnxruntime is missing.
    """
    if task.name not in ("image-classification", "semantic-segmentation"):
        raise UserError(f"--int8 is for classifiers and segmenters of images; these weights are for {task.name}")
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError("int8 needs onnxruntime: pip install 'provenn[onnx]'")


def _unstandardised(images: Tensor, meta: dict[str, Any]) -> Tensor:
    mean, std = (torch.tensor(meta[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return images * std + mean


class _InOnnxRuntime(nn.Module):
    """An exported file as a model of standardised images, so that a task scores it as any other."""

    def __init__(self, file: Path, meta: dict[str, Any]):
        super().__init__()
        import onnxruntime

        self.session, self.meta = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]), meta

    def forward(self, images: Tensor) -> Tensor:
        (probabilities,) = self.session.run(None, {"image": _unstandardised(images, self.meta).numpy()})
        return torch.from_numpy(probabilities).clamp_min(1e-30).log()


def _in_a_line(error: Exception) -> str:
    words = str(error).partition("## Exception summary")[2] or str(error)
    return f"{type(error).__name__}: {' '.join(words.split())[:240]}"


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
            _write(
                system,
                (tokens[0, :2], *example),
                ({0: batch}, open_sizes),
                inputs=["token", *names],
                outputs=["output", *(f"new_{name}" for name in names)],
                path=path,
                about={},
            )
        except (RuntimeError, torch.onnx.OnnxExporterError) as error:
            raise UserError(f"{type(layer).__name__} cannot be written as ONNX: {_in_a_line(error)}") from error
        if importlib.util.find_spec("onnxruntime") is None:
            return "not compared with the layer, onnxruntime is missing: pip install 'provenn[onnx]'"
        try:
            largest = max(_compare_steps(path, layer, tokens[:, :count]) for count in (1, 3))
        except _Differs as error:
            raise UserError(f"{type(layer).__name__}: the file {error}; no file was written") from error
    return (
        f"as the layer in onnxruntime, without and with optimisation, over {len(tokens)} steps of a batch of 1 and 3: "
        f"largest difference {largest:.1e} of the range (at most {TOLERANCE:.0e})"
    )


def _compare_steps(file: Path, layer: Any, tokens: Float[Tensor, "steps batch dim"]) -> float:
    """The largest difference of output and state after each of several steps, of the file from the layer.

    Raises:
        _Differs: as `_compare`.
    """
    largest = 0.0
    for session in _sessions(file):
        state = layer.init_state(tokens.shape[1])
        for k, token in enumerate(tokens):
            leaves = [torch.as_tensor(leaf).clone() for leaf in pytree.tree_leaves(state)]
            inputs = {"token": token, **{f"state_{i}": leaf for i, leaf in enumerate(leaves)}}
            with torch.no_grad():
                y, state = layer.step(token, state)
            expected = [y, *pytree.tree_leaves(state)]
            where = f"at step {k + 1} of a batch of {len(token)}"
            largest = max(largest, _compare([session], inputs, expected, where))
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
            f"the step of {type(system.layer).__name__} changes with the position, such as at the end of a chunk, and "
            "an ONNX file holds one step; layers whose state keeps one size can be exported, such as Aaren and Hedgehog"
        )


def check_path(file: Path) -> None:
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
    assert program is not None
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
