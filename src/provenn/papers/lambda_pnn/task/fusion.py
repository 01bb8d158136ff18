"""Fusing a scene: target adaptation, tiles with blended seams, and the classical methods beside."""

import copy
import zlib
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.papers.lambda_pnn import indices
from provenn.papers.lambda_pnn.losses import band_shifts, fusion_loss
from provenn.papers.lambda_pnn.model import Adaptation, FusionNetwork
from provenn.papers.lambda_pnn.sensors import (
    OFFSET,
    RATIO,
    SCALE,
    Sensor,
    downgrade,
    low_pass,
    sensor_kernels,
    upsample,
)
from provenn.tasks.upscale import cuts

LARGEST, OVERLAP = 2048, 64  # side of a tile in fusing, and what two of them share
CHOICES = ("clusters", "random", "whole")
DECAY = 1e-4  # of Adam, as in the authors' code


def stacked(
    ms: Float[Tensor, "batch bands height width"], pan: Float[Tensor, "batch 1 height4 width4"]
) -> Float[Tensor, "batch channels height4 width4"]:
    """What a network is given: MS↑ and, last, the PAN."""
    return torch.cat([upsample(ms), pan], dim=1)


def fuse(
    model: FusionNetwork,
    ms: Float[Tensor, "1 bands height width"],
    pan: Float[Tensor, "1 1 height4 width4"],
    *,
    tile: int = LARGEST,
    advance: Callable[[], object] = lambda: None,
) -> Float[Tensor, "1 bands height4 width4"]:
    """The fused scene. A large one is taken in tiles that share 64 pixels and are blended there.

    The authors' code takes tiles without overlap. In both each tile has its own pools in the channel gates, so that a
    tiled result differs a little from one of the whole scene; the blend leaves no seam.

    Args:
        model: in eval mode.
        ms, pan: in counts / 2048.
        tile: side of a tile in pixels of the PAN, a multiple of 4.
        advance: called after each tile.
    """
    stack = stacked(ms, pan)
    fused = torch.zeros_like(stack[:, :-1])
    with torch.no_grad():
        for top, bottom, rows in cuts(stack.shape[-2], tile, OVERLAP, 1):
            for left, right, columns in cuts(stack.shape[-1], tile, OVERLAP, 1):
                piece = model(stack[..., top:bottom, left:right])
                fused[..., top:bottom, left:right] += piece * (rows[:, None] * columns).to(piece)
                advance()
    return fused


def adapt(
    model: FusionNetwork,
    ms: Float[Tensor, "1 bands height width"],
    pan: Float[Tensor, "1 1 height4 width4"],
    how: Adaptation,
    *,
    coregister: bool = False,
    seed: int = 0,
) -> FusionNetwork:
    """A copy of the network, tuned on a scene; the weights of the lowest loss are kept. Shows progress.

    Args:
        model: is left as it is.
        ms, pan: in counts / 2048; there is no truth to see.
        how: steps, tiles and rate.
        coregister: estimate how far each band lies from the PAN, and let the loss see the fused image so shifted.
        seed: of tiles that are drawn.

    Raises:
        UserError: a loss that is no number.
        ValueError: another choice of tiles.
    """
    tuned = copy.deepcopy(model)
    stack = stacked(ms, pan)
    shifts = band_shifts(stack[:, :-1], pan, model.sensor) if coregister else None
    pieces = tiles_of(stack, how, model.sensor, seed)
    kept, lowest = copy.deepcopy(tuned.state_dict()), torch.inf
    low = pieces[:, :-1, OFFSET::RATIO, OFFSET::RATIO]
    moved = None if shifts is None else shifts.expand(len(pieces), -1, -1)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=how.rate or model.rate, weight_decay=DECAY)
    with torch.enable_grad(), progress.bar("adapting", how.steps) as advance:
        for _ in range(how.steps):
            loss = fusion_loss(tuned(pieces), low, pieces, model.sensor, model.adapting, moved)
            if not loss.isfinite():
                raise UserError("adapting: the loss is no number; give a lower rate, or fewer steps")
            if loss.item() < lowest:
                kept, lowest = {name: value.clone() for name, value in tuned.state_dict().items()}, loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            advance()
    tuned.load_state_dict(kept)
    return tuned.eval()


def tiles_of(
    stack: Float[Tensor, "1 channels height width"], how: Adaptation, sensor: Sensor, seed: int = 0
) -> Float[Tensor, "tiles channels side side2"]:
    """The tiles that a network adapts on; the whole scene where it is no larger than all of them.

    Args:
        stack: MS↑ and PAN.
        how: side and number of tiles, and how they are chosen.
        sensor: which bands are red, green and blue.
        seed: of a draw.
    """
    if how.choice not in CHOICES:
        raise ValueError(f"choice must be one of {', '.join(CHOICES)}, got {how.choice!r}")
    rows, columns = (side // how.tile for side in stack.shape[-2:])
    if how.choice == "whole" or stack.shape[-2] * stack.shape[-1] <= how.tiles * how.tile**2 or rows * columns < 2:
        return stack
    grid = stack[0, :, : rows * how.tile, : columns * how.tile].unfold(1, how.tile, how.tile)
    grid = grid.unfold(2, how.tile, how.tile).flatten(1, 2).transpose(0, 1)
    count = min(how.tiles, len(grid))
    if how.choice == "random":
        chosen = torch.randperm(len(grid), generator=torch.Generator().manual_seed(seed))[:count]
    else:
        chosen = representative(grid[:, list(sensor.rgb)], count)
    return grid[chosen.to(grid.device)]


def representative(tiles: Float[Tensor, "tiles 3 side side"], count: int) -> Int[Tensor, " chosen"]:
    """Tiles nearest to the centres of `count` clusters, none twice.

    Tiles are described by mean, deviation and gradient energy of each band, standardised, in three principal
    components. The paper takes features of a MobileNetV3 that was trained on ImageNet, whose weights do not ship here.

    Args:
        tiles: red, green and blue.
        count: of the clusters, at most as many as there are tiles.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    down, right = (tiles.diff(dim=axis).square().mean(dim=(2, 3)) for axis in (2, 3))
    features = torch.cat([tiles.mean(dim=(2, 3)), tiles.std(dim=(2, 3)), down + right], dim=1).double().cpu()
    features = (features - features.mean(0)) / features.std(0).clamp_min(1e-12)
    points = PCA(min(3, len(tiles)), random_state=0).fit_transform(features.numpy())
    spread = torch.linspace(0, len(tiles) - 1, count).round().long().numpy()  # starts all over the scene
    centres = KMeans(count, init=points[spread], n_init=1, tol=1e-9).fit(points).cluster_centers_
    distance = torch.cdist(torch.from_numpy(centres), torch.from_numpy(points))
    chosen: list[int] = []
    for row in distance:
        row[chosen] = torch.inf
        chosen.append(int(row.argmin()))
    return torch.tensor(chosen)


def gsa(
    ms: Float[Tensor, "batch bands height width"], pan: Float[Tensor, "batch 1 height4 width4"], sensor: Sensor
) -> Float[Tensor, "batch bands height4 width4"]:
    """Gram–Schmidt adaptive (Aiazzi et al., 2007): MS↑ + g_b (P − I), I regressed on the bands at the MS's scale.

    Args:
        ms, pan: any scale.
        sensor: whose PAN gain reduces the PAN.
    """
    coarse = low_pass(pan.double(), _pan_kernel(sensor))[..., OFFSET::RATIO, OFFSET::RATIO]
    bands = ms.double().flatten(2).mT
    ones = torch.ones_like(bands[..., :1])
    weights = torch.linalg.lstsq(torch.cat([bands, ones], -1), coarse.flatten(2).mT).solution
    wide = upsample(ms.double())
    intensity = (wide * weights[:, :-1, :, None]).sum(1, keepdim=True)
    centred = intensity - intensity.mean(dim=(2, 3), keepdim=True)
    detail = pan.double() - pan.double().mean(dim=(2, 3), keepdim=True) - centred
    deviations = wide - wide.mean(dim=(2, 3), keepdim=True)
    gains = (deviations * centred).mean(dim=(2, 3), keepdim=True) / centred.square().mean(dim=(2, 3), keepdim=True)
    return (wide + gains * detail).to(ms.dtype)


def mtf_glp(
    ms: Float[Tensor, "batch bands height width"], pan: Float[Tensor, "batch 1 height4 width4"], sensor: Sensor
) -> Float[Tensor, "batch bands height4 width4"]:
    """MTF-GLP (Aiazzi et al., 2006): MS↑ + P_b − (P_b blurred by the band's kernel, sampled and interpolated).

    P_b is the PAN with the mean of the band, and its deviation over that of the blurred PAN.

    Args:
        ms, pan: any scale.
        sensor: whose gains blur.
    """
    wide, kernels = upsample(ms.double()), sensor_kernels(sensor.gains)
    fine = pan.double().expand_as(wide)
    blurred = low_pass(fine, kernels)
    ratio = wide.std(dim=(2, 3), keepdim=True) / blurred.std(dim=(2, 3), keepdim=True).clamp_min(1e-12)
    matched = (fine - fine.mean(dim=(2, 3), keepdim=True)) * ratio + wide.mean(dim=(2, 3), keepdim=True)
    return (wide + matched - upsample(downgrade(matched, kernels))).to(ms.dtype)


def _pan_kernel(sensor: Sensor) -> Tensor:
    kernel = sensor_kernels((sensor.pan_gain,), pan=True)
    return kernel / kernel.sum()


def reduced(
    ms: Float[Tensor, "batch bands height width"], pan: Float[Tensor, "batch 1 height4 width4"], sensor: Sensor
) -> tuple[Tensor, Tensor]:
    """Wald's protocol: MS and PAN four times smaller, whose fused image the MS itself would be."""
    kernels = sensor_kernels(sensor.gains)
    small = low_pass(pan, _pan_kernel(sensor).to(pan))[..., OFFSET::RATIO, OFFSET::RATIO]
    return downgrade(ms, kernels), small


def report(
    fused: Float[Tensor, "1 bands height4 width4"],
    ms: Float[Tensor, "1 bands height width"],
    pan: Float[Tensor, "1 1 height4 width4"],
    sensor: Sensor,
    truth: Float[Tensor, "1 bands height4 width4"] | None = None,
) -> dict[str, float]:
    """Indices of a fused scene, by name; those to the truth where there is one.

    Without a reference: `r_ergas`, `r_sam` and `d_lambda` = 1 − Q2ⁿ of the scene as the sensor sees it beside the MS;
    `d_rho`, `d_s` and `d_s_r` of its detail beside the PAN. With one: `ergas`, `sam`, `q2n`, and `detail`, the mean
    correlation of the high-passed bands in windows of 4×4 pixels.

    Args:
        fused, ms, pan, truth: in counts / 2048.
        sensor: whose gains blur.
    """
    seen = downgrade(fused, sensor_kernels(sensor.gains))
    values = {
        "r_ergas": indices.ergas(seen, ms),
        "r_sam": indices.sam(seen, ms),
        "d_lambda": 1 - indices.q2n(SCALE * seen, SCALE * ms),
        "d_rho": indices.d_rho(fused, pan),
        "d_s": indices.d_s(fused, pan, ms),
        "d_s_r": indices.d_s_r(fused, pan),
    }
    if truth is not None:
        values |= {
            "ergas": indices.ergas(fused, truth),
            "sam": indices.sam(fused, truth),
            "q2n": indices.q2n(SCALE * fused, SCALE * truth),
            "detail": indices.local_correlation(fused, truth, RATIO // 2).mean(dim=(1, 2, 3)),
        }
    return {name: float(value.mean()) for name, value in values.items()}


def adapted(model: FusionNetwork, ms: Tensor, pan: Tensor) -> FusionNetwork:
    """The network as it fuses a scene: adapted, where it says how. Each scene has its own draw, always the same."""
    if model.adaptation is None:
        return model
    return adapt(model, ms, pan, model.adaptation, seed=zlib.crc32(pan.contiguous().cpu().numpy().tobytes()))
