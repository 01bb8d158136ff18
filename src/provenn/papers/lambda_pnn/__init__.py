"""λ-PNN: unsupervised pansharpening with spectral and spatial fidelity (Ciotola et al., 2023, arXiv:2307.14403)."""

from provenn.papers.lambda_pnn.indices import d_rho, d_s, d_s_r, ergas, local_correlation, q2n, sam
from provenn.papers.lambda_pnn.layers import CBAM, ChannelGate, SpatialGate
from provenn.papers.lambda_pnn.losses import Weights, band_shifts, fusion_loss
from provenn.papers.lambda_pnn.model import (
    PNN,
    Adaptation,
    LambdaPNN,
    PanNet,
    lambda_pnn_ge1,
    lambda_pnn_small,
    lambda_pnn_wv2,
    lambda_pnn_wv3,
)
from provenn.papers.lambda_pnn.sensors import SENSORS, Sensor, downgrade, sensor_kernels, sensor_of, upsample
from provenn.papers.lambda_pnn.task.arrays import pansharpen
from provenn.papers.lambda_pnn.task.fusion import adapt, fuse, gsa, mtf_glp, reduced, report, stacked

__all__ = [
    "CBAM",
    "PNN",
    "SENSORS",
    "Adaptation",
    "ChannelGate",
    "LambdaPNN",
    "PanNet",
    "Sensor",
    "SpatialGate",
    "Weights",
    "adapt",
    "band_shifts",
    "d_rho",
    "d_s",
    "d_s_r",
    "downgrade",
    "ergas",
    "fuse",
    "fusion_loss",
    "gsa",
    "lambda_pnn_ge1",
    "lambda_pnn_small",
    "lambda_pnn_wv2",
    "lambda_pnn_wv3",
    "local_correlation",
    "mtf_glp",
    "pansharpen",
    "q2n",
    "reduced",
    "report",
    "sam",
    "sensor_kernels",
    "sensor_of",
    "stacked",
    "upsample",
]
