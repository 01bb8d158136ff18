"""An ONNX file in onnxruntime beside what it was made of."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from provenn.inference.onnx.files import in_a_line

TOLERANCE = 1e-3
"""Of the output's range: how far a file may be off. Sums in another order moved outputs by at most 1e-4, fused networks
included. Wrong interpolation or a rule of one size moved them by 5e-2 and more. This lies between the two."""


class Differs(Exception):
    """A file gives other outputs than predict."""


def open_sessions(file: Path) -> list[Any]:
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


def compare(sessions: Sequence[Any], inputs: dict[str, Tensor], expected: Sequence[Any], where: str) -> float:
    """The largest difference of any output from what is expected, in parts of its range.

    Raises:
        Differs: more than `TOLERANCE`, numbers that are not finite, or a session that fails.
    """
    largest = 0.0
    for session in sessions:
        try:
            given = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        except Exception as error:  # onnxruntime's own kinds, which have no common base
            raise Differs(f"fails in onnxruntime {where}: {in_a_line(error)}") from error
        for name, ours, theirs in zip((x.name for x in session.get_outputs()), given, expected, strict=True):
            by = relative_difference(ours, torch.as_tensor(theirs).numpy())
            if not by <= TOLERANCE:
                words = f"{by:.1e} of their range" if math.isfinite(by) else "their shape or by numbers not finite"
                raise Differs(f"differs from predict {where}: {name} by {words}, at most {TOLERANCE:.0e} is right")
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
