"""Pansharpening of arrays in memory, as `provenn predict` has it of files."""

import numpy as np
import torch
from jaxtyping import Num

from provenn.core.errors import UserError
from provenn.papers.lambda_pnn.model import Adaptation, FusionNetwork
from provenn.papers.lambda_pnn.sensors import RATIO
from provenn.papers.lambda_pnn.task.fusion import adapt as adapt_to
from provenn.papers.lambda_pnn.task.fusion import fuse
from provenn.papers.lambda_pnn.task.rasters import SMALLEST, _divisor


def pansharpen(
    network: FusionNetwork,
    ms: Num[np.ndarray, "bands height width"],
    pan: Num[np.ndarray, "height4 width4"],
    *,
    bits: int | None = None,
    adapt: int = 0,
    coregister: bool = False,
    tiles: int = 16,
) -> Num[np.ndarray, "bands height4 width4"]:
    """The fused bands, in the type of `ms`: whole numbers are rounded and kept within 0 and what the type holds.

    Args:
        network: for these bands and their sensor; its weights are left as they are.
        ms, pan: of one place, whose sides are in the ratio 4.
        bits: of the counts; by default 8 for bytes, 11 for other whole numbers, and none for numbers with a point.
        adapt: steps of target adaptation before, 100 in the paper.
        coregister: let the adaptation find how far each band lies from the PAN.
        tiles: how many tiles of 256 pixels it adapts on.

    Raises:
        UserError: other bands, sides that are not in the ratio 4 or below 128 pixels, or numbers that are none.

    >>> import provenn
    >>> network = provenn.create("lambda_pnn_small", pretrained=True)
    >>> ms, pan = np.full((3, 32, 32), 700, np.uint16), np.full((128, 128), 650, np.uint16)
    >>> fused = pansharpen(network, ms, pan)
    >>> fused.shape, fused.dtype.name
    ((3, 128, 128), 'uint16')
    """
    if len(ms) != network.bands:
        raise UserError(f"ms has {len(ms)} bands, the network is for {network.bands}")
    if pan.shape != tuple(RATIO * side for side in ms.shape[1:]) or min(pan.shape) < SMALLEST:
        expected = " by ".join(str(RATIO * side) for side in ms.shape[1:])
        raise UserError(f"pan is {pan.shape[0]} by {pan.shape[1]}; expected {expected}, and at least {SMALLEST} a side")
    if not (np.isfinite(ms).all() and np.isfinite(pan).all()):
        raise UserError("ms or pan holds numbers that are not finite; fill them first")
    if coregister and adapt < 1:
        raise UserError("coregister tells the adaptation where the bands lie: give adapt=100 too")
    device = next(network.parameters()).device
    coarse, fine = (
        torch.from_numpy((x.astype(np.float64) / _divisor(x.dtype, bits)).astype(np.float32))[None].to(device)
        for x in (ms, pan[None])
    )
    how = Adaptation(steps=adapt, tiles=tiles)
    tuned = adapt_to(network, coarse, fine, how, coregister=coregister) if adapt else network
    training = tuned.training
    fused = fuse(tuned.eval(), coarse, fine)[0].double().cpu().numpy() * _divisor(ms.dtype, bits)
    tuned.train(training)
    if ms.dtype.kind in "ui":
        fused = fused.round().clip(0, np.iinfo(ms.dtype).max)
    return fused.astype(ms.dtype)
