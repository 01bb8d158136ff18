"""An exported file in int8, by onnxruntime's static quantisation."""

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.progress import quiet_loggers
from provenn.inference.onnx.comparing import open_sessions
from provenn.inference.onnx.files import in_a_line
from provenn.tasks import Task, TaskData
from provenn.tasks.base import HeldOut, count_examples

CALIBRATED_BY = 128  # training examples, at most


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
    loaded = task.calibration(source, meta, seed=seed, options=options)
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError("int8 needs onnxruntime: pip install 'provenn[onnx]'")
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
            raise UserError(f"onnxruntime cannot quantise {type(task).__name__}: {in_a_line(error)}") from error
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
    first, second = (open_sessions(file)[1].run(None, {"image": image.numpy()})[0] for file in (plain, small))
    if first.shape != second.shape or not np.isfinite(second).all():
        raise ValueError(f"at {'×'.join(map(str, image.shape))} int8 gives no probabilities of the same shape")
    return float(np.abs(first - second).mean()), float((first.argmax(1) != second.argmax(1)).mean())


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
