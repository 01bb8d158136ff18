"""Systems and streaming layers as ONNX files, which run without Python and torch."""

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from provenn.errors import UserError
from provenn.files import whole
from provenn.nn.fusion import fuse
from provenn.nn.padding import PadToMultiple
from provenn.nn.segmentation import resize
from provenn.progress import quiet_loggers
from provenn.tasks import Task
from provenn.tasks.base import count_examples

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


class _Standardising(nn.Module):
    """A network with what its images go through before it.

    Args:
        model: takes standardised images.
        mean, std: of each channel, as in training.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model: Any = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def standard(self, image: Float[Tensor, "batch channels height width"]) -> Tensor:
        return (image - self.mean) / self.std


class Classifier(_Standardising):
    """A classifier, its model giving logits.

    Shapes: image (batch, channels, height, width) in 0…1 to probabilities (batch, classes).
    """

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.model(self.standard(image)).softmax(dim=1)


class PixelClassifier(_Standardising):
    """A segmenter, its model giving logits of any resolution.

    Shapes: image (batch, channels, height, width) in 0…1 to probabilities (batch, classes, height, width).
    """

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        return resize(self.model(self.standard(image)), image.shape[-2:]).softmax(dim=1)


class Detector(_Standardising):
    """A detector that looks at each place once, its model a `provenn.nn.detection.dense.DenseDetector`.

    What it gives is not thinned out yet: of the boxes of a class that overlap, the surest is meant.

    Shapes: image (batch, channels, height, width) in 0…1 to boxes (batch, places, 4): left, top, right, bottom in
        pixels; and for each the score (batch, places) of its likeliest class, and that class (batch, places).
    """

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> tuple[Tensor, Tensor, Tensor]:
        output = self.model(self.standard(image))
        logits, label = output.logits.max(dim=2)
        scores = logits.sigmoid()
        if isinstance(output.centreness, Tensor):
            scores = (scores * output.centreness.sigmoid()).sqrt()
        boxes = self.model.boxes_at(output.offsets, self.model.places(image))
        height, width = image.shape[-2:]
        inside = [side.clamp(0, (width, height)[axis % 2]) for axis, side in enumerate(boxes.unbind(dim=-1))]
        return torch.stack(inside, dim=-1), scores, label


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


def portable_system(model: nn.Module, task: Task, meta: dict[str, Any], file: Path, about: dict[str, str]) -> list[str]:
    """Write a system as its task says, of one input or several; or as `image_system` does, returning its lines."""
    if type(task).portable is Task.portable:
        return image_system(model, task.name, meta, file, about)
    form = task.portable(model, meta)
    dims: dict[str, Any] = {}
    sizes = {
        name: {
            place: dims.setdefault(label, torch.export.Dim(label, min=form.least.get(label)))
            for place, label in form.open_sizes.get(name, {}).items()
        }
        for name in form.example
    }
    _write(
        form.system.eval(),
        form.example,
        sizes,
        inputs=list(form.example),
        outputs=form.outputs,
        file=file,
        about=about,
    )
    return []


RESULTS = {
    "image-classification": (Classifier, ["probabilities"]),
    "semantic-segmentation": (PixelClassifier, ["probabilities"]),
    "object-detection": (Detector, ["boxes", "scores", "labels"]),
}


def image_system(model: nn.Module, task: str, meta: dict[str, Any], file: Path, about: dict[str, str]) -> list[str]:
    """Write a system that takes `image`, in 0…1, and gives what its task is for.

    Super-resolution: (1, 3, height, width) of any size to `larger`. The others take a batch, of any size where the
    network does and else of the size that it was trained on: classification to `probabilities`, segmentation to
    `probabilities` of each pixel, object detection to the `boxes`, `scores` and `labels` of every place (see
    `Detector`). These go through `provenn.nn.fusion.fuse` first.

    Args:
        model: in eval mode; left as it is.
        task, meta: what it does, and what prediction needs to know.
        file: where it goes, ending in .onnx.
        about: is kept in the file's metadata.

    Returns:
        What the user should know of the file, a line each.

    Raises:
        UserError: a system that takes no images, or one that ONNX has no form of.
    """
    check_place(file)
    if task == "super-resolution":
        # No side is 1, 16 or like another: a tracer would take that for a rule.
        sizes = ({2: torch.export.Dim("height"), 3: torch.export.Dim("width")},)
        enlarger, example = Enlarger(model).eval(), torch.rand(1, 3, 37, 51)
        _write(enlarger, (example,), sizes, inputs=["image"], outputs=["larger"], file=file, about=about)
        return []
    if task not in RESULTS:
        raise UserError(
            f"only systems that take images, sounds or stacks of layers can be exported; these weights are for {task}"
        )
    if task == "object-detection" and not hasattr(model, "boxes_at"):
        raise UserError(
            f"{type(model).__name__} looks at regions that it picks on the way, which ONNX has no form of: detectors "
            "that look at every place once can be exported, as RetinaNet, FCOS, ATSS and SSDLite do"
        )
    system, outputs = RESULTS[task]
    channels, side = meta.get("channels", 3), int(meta["size"])
    fused, notes = _fused(model, torch.rand(2, channels, side, side))
    return [*notes, *_write_images(system(fused, meta["mean"], meta["std"]), channels, side, outputs, file, about)]


def _fused(model: nn.Module, example: Tensor) -> tuple[nn.Module, list[str]]:
    """The model with branches merged and batch norms folded; where that cannot be, as it is, and why."""
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    try:
        fused = fuse(model, example)
    except Exception as error:  # a tracer fails in many ways, and an unfused file is as right
        return model, [f"not fused: {_in_a_line(error)}"]
    left = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())
    return fused, [f"fused: {norms - left} of {norms} batch norms folded"] if norms else []


def _write_images(
    system: nn.Module, channels: int, side: int, outputs: list[str], file: Path, about: dict[str, str]
) -> list[str]:
    """Write a system of images with all sizes open, or where its network fixes them, with the batch alone."""
    batch = torch.export.Dim("batch")
    # Not alike, no multiples of a stride, and no level of a single cell: a tracer would take that for a rule.
    coarsest = max(getattr(getattr(system, "model", None), "strides", ()), default=1)
    tall, wide = max(side, coarsest) + 5, max(side, 2 * coarsest) + 11
    least = min(16, side)
    every = {0: batch, 2: torch.export.Dim("height", min=least), 3: torch.export.Dim("width", min=least)}
    fixed = f"images of {side}×{side} pixels alone"
    attempts = [
        ((2, channels, tall, wide), every, "any batch, height and width"),
        ((2, channels, side, side), {0: batch}, f"any batch; height and width fixed: {fixed}"),
    ]
    if outputs != ["probabilities"]:  # places of a detector
        attempts.append(((1, channels, side, side), {}, f"batch, height and width fixed: one at a time, {fixed}"))
    trouble: Exception | None = None
    for shape, sizes, told in attempts:
        try:
            with torch.no_grad():
                system.eval()(torch.rand(shape))
            _write(system, (torch.rand(shape),), (sizes,), inputs=["image"], outputs=outputs, file=file, about=about)
        except UserError:
            raise
        except Exception as error:  # a tracer, or the network itself, which refuses sizes as it likes
            trouble = error
        else:
            return [told]
    assert trouble is not None
    raise UserError(f"{type(system).__name__.lower()}: cannot be written as ONNX: {_in_a_line(trouble)}") from trouble


CALIBRATED_BY = 128  # training examples, at most


def quantize(file: Path, task: Task, meta: dict[str, Any], data: str | Path, *, seed: int = 0) -> list[str]:
    """Turn an exported classifier or segmenter into int8, in place, by onnxruntime's static quantisation.

    Weights are quantised channel by channel, activations by the range that they have over training examples; each
    keeps its float operator between two conversions (QDQ), so that the file runs where int8 kernels are missing.

    Args:
        file: what `image_system` wrote.
        task, meta: as there.
        data: an embedded name or a path. Its training part calibrates; what the task holds out tells the loss.
        seed: of the split.

    Returns:
        The metrics of both files on the held-out part beside each other, and their sizes, a line each.

    Raises:
        UserError: another task, onnxruntime is missing, or data that do not fit.
    """
    check_int8(task)
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # Images that are all of one size where the file wants that; a folder's own sizes else.
    own_size = {} if task.name == "semantic-segmentation" or str(data) in task.embedded else {"size": meta["size"]}
    loaded = task.load(data, seed=seed, **own_size)
    if loaded.meta["channels"] != meta["channels"] or loaded.meta["classes"] != meta["classes"]:
        raise UserError(
            f"{data} has {loaded.meta['channels']} channel(s) and {len(loaded.meta['classes'])} classes; these weights "
            f"take {meta['channels']} and tell {len(meta['classes'])}, or others: calibrate on data of their own"
        )
    held_out = task.held_out(data, meta, seed=seed, whole=False)
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

    with TemporaryDirectory() as folder, quiet_loggers("root"):
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
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise UserError(f"onnxruntime cannot quantise {file.name}: {_in_a_line(error)}") from error
        with whole(file) as place:
            place.write_bytes(small.read_bytes())
        sizes = [path.stat().st_size / 2**20 for path in (plain, small)]
    examples = count_examples(held_out.dataset)
    return [
        f"calibrated on {count} training examples of {data}; tested on {examples}, {held_out.about}",
        f"          {task.metric.replace('_', ' '):>10}       MiB",
        f"float32   {metrics[0]:>10.4f}  {sizes[0]:>8.2f}",
        f"int8      {metrics[1]:>10.4f}  {sizes[1]:>8.2f}   ({metrics[1] - metrics[0]:+.4f})",
    ]


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
                custom_translation_table=translations(),
            )
        assert program is not None
        program.model.metadata_props.update(about)
        program.save(str(place))


def translations() -> dict[Any, Any]:
    """ONNX forms of operations that torch has none of, as `torch.onnx.export` takes them."""
    return {torch.ops.aten.sort.stable: _stable_sort}


def _stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """`aten.sort.stable`, which torch has no ONNX form of: of equal values TopK takes the first one first.

    Any: values of the file that is being written; onnxscript comes with an extra. Names are as torch has them.
    """
    from onnxscript import opset18

    op: Any = opset18  # whose annotations want a value of one type
    length = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    return op.TopK(self, length, axis=dim, largest=int(descending), sorted=1)
