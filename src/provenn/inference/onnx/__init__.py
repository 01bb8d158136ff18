"""Systems and streaming layers as ONNX files, which run without Python and torch.

Each file is run in onnxruntime and held to what `predict` gives before anything is said of it.
"""

from provenn.inference.onnx.comparing import TOLERANCE, relative_difference
from provenn.inference.onnx.files import check_path, translations
from provenn.inference.onnx.quantising import Calibration, quantize, read_calibration
from provenn.inference.onnx.streams import Step, step
from provenn.inference.onnx.systems import portable_system

__all__ = [
    "TOLERANCE",
    "Calibration",
    "Step",
    "check_path",
    "portable_system",
    "quantize",
    "read_calibration",
    "relative_difference",
    "step",
    "translations",
]
