"""Pansharpening: a multispectral image and a panchromatic one four times finer in, the bands on the fine grid out."""

import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import check_no_input, check_output
from provenn.core.narrowing import of_kind
from provenn.data.photographs import photograph
from provenn.papers.lambda_pnn.indices import ergas
from provenn.papers.lambda_pnn.losses import fusion_loss
from provenn.papers.lambda_pnn.model import Adaptation, FusionNetwork
from provenn.papers.lambda_pnn.sensors import RATIO, SENSORS, Sensor, downgrade, sensor_kernels, upsample
from provenn.papers.lambda_pnn.task.fusion import (
    LARGEST,
    OVERLAP,
    adapt,
    adapted,
    fuse,
    reduced,
    report,
    stacked,
)
from provenn.papers.lambda_pnn.task.rasters import (
    SMALLEST,
    Raster,
    check_orientation,
    check_pair,
    check_scale,
    check_target,
    read_raster,
    told_of,
    without_gaps,
    write_raster,
)
from provenn.tasks import Task, TaskData, count_examples, device_of, fingerprint, split_indices
from provenn.tasks.base import HeldOut, Portable, Scores
from provenn.tasks.demos import Trial, as_shown
from provenn.tasks.upscale import count_tiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN = ("astronaut", "coffee", "rocket", "china", "hubble")
VALIDATE, TEST = ("motorcycle",), ("chelsea", "flower", "ihc")
SIDE, CROP = 256, 128  # of a photograph's piece, and of a crop to train on, in pixels of the PAN
PAN_WEIGHTS = (0.2, 0.45, 0.35)  # of blue, green and red
NOISE = 0.002
LEAST = 72  # of an MS that is tested four times smaller: Q2ⁿ takes more than 16 pixels


class Crops(Dataset):
    """Random squares of scenes: MS and PAN, and nothing else.

    Args:
        scenes: MS and PAN of each, in counts / 2048.
        each: crops of a scene in one pass.
        side: in pixels of the PAN, a multiple of 4.
    """

    def __init__(self, scenes: Sequence[tuple[Tensor, Tensor]], each: int, side: int = CROP):
        self.scenes, self.each, self.side = scenes, each, side // RATIO

    def __len__(self) -> int:
        return len(self.scenes) * self.each

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        ms, pan = self.scenes[index // self.each]
        top, left = (int(torch.randint(length - self.side + 1, ())) for length in ms.shape[1:])
        rows, columns = (slice(start, start + self.side) for start in (top, left))
        fine = [slice(RATIO * part.start, RATIO * part.stop) for part in (rows, columns)]
        return ms[:, rows, columns], pan[:, fine[0], fine[1]]


class Scenes(Dataset):
    """Whole scenes: MS, PAN and the truth that the network never sees.

    Args:
        scenes: the three of each, in counts / 2048.
    """

    def __init__(self, scenes: Sequence[tuple[Tensor, Tensor, Tensor]]):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.scenes[index]


def observed(truth: Float[Tensor, "bands height width"], sensor: Sensor, seed: int) -> tuple[Tensor, Tensor]:
    """What a sensor sees of a scene: its MS, blurred and sampled, and its PAN, a weighted sum of the bands.

    Noise of σ = 0.002 is on both.

    Args:
        truth: bands from blue to red, in 0…1.
        sensor: whose gains blur.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    ms = downgrade(truth[None], sensor_kernels(sensor.gains))[0]
    weights = torch.tensor(PAN_WEIGHTS) if len(truth) == 3 else torch.full((len(truth),), 1 / len(truth))
    pan = (weights[:, None, None] * truth).sum(0, keepdim=True)
    ms, pan = (x + NOISE * torch.randn(x.shape, generator=generator) for x in (ms, pan))
    return ms, pan


def pieces(name: str, seed: int, most: int = SIDE) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Squares of a photograph as MS, PAN and truth, in the order blue, green, red; `most` is the largest side."""
    whole = torch.from_numpy(photograph(name)[..., ::-1].copy()).permute(2, 0, 1).float() / 255
    side = min(most, *(length // RATIO * RATIO for length in whole.shape[1:]))
    for top in range(0, whole.shape[1] - side + 1, side):
        for left in range(0, whole.shape[2] - side + 1, side):
            truth = whole[:, top : top + side, left : left + side]
            yield *observed(truth, SENSORS["photographs"], 1000 * seed + 31 * top + left), truth


class Pansharpening(Task):
    """The loss sees MS and PAN alone. Metrics compare with a truth: the photograph's own, else by Wald's protocol."""

    name = "pansharpening"
    metric = "ergas"
    higher_is_better = False
    embedded = {  # noqa: RUF012
        "photographs": "colour photographs of scikit-image and scikit-learn, seen by a simulated sensor of ratio 4"
    }
    reads = "a folder with NAME_ms and NAME_pan, .tif or .npy"

    def load(
        self,
        source: str | Path,
        *,
        seed: int = 0,
        crops: int = 8,
        bits: int | None = None,
        **_: Any,
    ) -> TaskData:
        """Scenes, split into those to train on, to validate with and to test.

        Args:
            source: `photographs`, or a folder with a pair of files for each scene, at least three: NAME_ms and
                NAME_pan, GeoTIFF or NumPy.
            seed: of the sensor's noise; splits the user's folder.
            crops: of each scene in an epoch, 128 pixels of the PAN a side.
            bits: of the counts, 11 by default, 8 for bytes; numbers with a point are taken as they are.
        """
        location = self._named(source)
        if isinstance(location, str):
            splits = [[scene for name in names for scene in pieces(name, seed)] for names in (TRAIN, VALIDATE, TEST)]
            return TaskData(
                name="photographs",
                train=Crops([(ms, pan) for ms, pan, _ in splits[0]], crops),
                val=Scenes(splits[1]),
                test=Scenes(splits[2]),
                fingerprint=fingerprint(*(part for split in splits for scene in split for part in scene)),
                options={"bands": 3},
                about=f"Pieces of {len(TRAIN)} photographs to train on, of {len(VALIDATE)} to validate and of "
                f"{len(TEST)} to test, each seen by a simulated sensor: three bands blurred to a gain of 0.23 at "
                "Nyquist and sampled every fourth pixel, and a panchromatic sum of the bands. They are no satellite "
                "images.",
            )
        scenes = [(name, check_pair(ms, pan, bits)) for name, ms, pan in pairs_in(location)]
        if len(scenes) < 3:
            raise UserError(
                f"{location} holds {len(scenes)} scene(s); expected at least 3: to train, validate and test"
            )
        tenth = max(1, round(0.15 * len(scenes)))
        order = [i for part in split_indices(len(scenes), (1.0,), seed) for i in part]
        parts = order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth]
        train, val, test = ([scenes[i][1] for i in sorted(part)] for part in parts)
        return TaskData(
            name=str(location),
            train=Crops(train, crops),
            val=Scenes([by_wald(ms, pan) for ms, pan in val]),
            test=Scenes([by_wald(ms, pan) for ms, pan in test]),
            fingerprint=fingerprint(*(part for name, scene in scenes for part in (name, *scene))),
            options={"bands": len(scenes[0][1][0])},
            about=f"{len(scenes)} scenes of {location.name}, {len(val)} of them to validate and {len(test)} to test, "
            f"split by seed {seed}. These two are four times smaller, by gains of 0.3 at Nyquist, and have their MS as "
            "the truth (Wald's protocol).",
        )

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """The loss of MS and PAN alone; of a network that is trained by Wald's protocol the mean absolute error."""
        ms, pan = batch[0], batch[1]
        network = of_kind(model, FusionNetwork, "the model")
        if network.reduced:
            small, coarse = reduced(ms, pan, network.sensor)
            return (model(stacked(small, coarse)) - ms).abs().mean()
        stack = stacked(ms, pan)
        return fusion_loss(model(stack), ms, stack, network.sensor, network.weights)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """The indices of `fusion.report`, and ERGAS of the interpolation alone, of each scene."""
        network, rows = of_kind(model, FusionNetwork, "the model"), []
        for index in range(count_examples(dataset)):
            ms, pan, truth = (part[None].to(device_of(model)) for part in dataset[index])
            fused = fuse(adapted(network, ms, pan), ms, pan)
            values = report(fused, ms, pan, network.sensor, truth)
            rows.append(values | {"ergas_interpolated": float(ergas(upsample(ms), truth).mean())})
        return {key: np.array([row[key] for row in rows]) for key in rows[0]}

    def dummy_baseline(self, data: TaskData) -> float:
        """ERGAS of the interpolated bands (EXP)."""
        every = [data.test[index] for index in range(count_examples(data.test))]
        return float(np.mean([float(ergas(upsample(ms[None]), truth[None]).mean()) for ms, _, truth in every]))

    def held_out(  # type: ignore[override]  # names its options
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, whole: bool = True, bits: int | None = None
    ) -> HeldOut:
        """As in `Task`; the user's scenes four times smaller, with their MS as the truth."""
        location = self._named(source)
        if isinstance(location, str) or not whole:
            return super().held_out(source, meta, seed=seed, bits=bits)
        scenes = [by_wald(*check_pair(ms, pan, bits)) for _, ms, pan in pairs_in(location)]
        return HeldOut(Scenes(scenes), f"all scenes of {location}, by Wald's protocol")

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        adapting: float | None = None,
        bits: float | None = None,
        coregister: bool = False,
    ) -> str:
        """Fuse a multispectral and a panchromatic file, given in any order, into one of the same type.

        Args:
            model, meta, inputs, output: as in `Task.predict`.
            adapting: steps of target adaptation before, 100 in the paper; the indices stand before and after.
            bits: of the counts, 11 by default, 8 for bytes.
            coregister: estimate how far each band lies from the PAN; needs `adapting`.
        """
        if len(inputs) != 2:
            raise UserError(f"pansharpening takes two files, the multispectral and the panchromatic; got {len(inputs)}")
        if output is None:
            raise UserError("a fused image needs a path: give a .tif, .npy or .png with -o")
        steps = 0 if adapting is None else _whole("--adapting", adapting, 0, 100_000)
        depth = None if bits is None else _whole("--bits", bits, 1, 32)
        if coregister and not steps:
            raise UserError("--coregister tells the adaptation where the bands lie: give --adapting 100 too")
        check_output(output)
        check_no_input(output, [str(file) for file in inputs])
        first, second = (without_gaps(read_raster(file)) for file in inputs)
        coarse, fine = sorted((first, second), key=lambda raster: raster.values.shape[-2] * raster.values.shape[-1])
        check_target(output, coarse)
        ms, pan = (part[None].to(device_of(model)) for part in check_pair(coarse, fine, depth))
        check_orientation(coarse, fine)
        for raster in (coarse, fine):
            check_scale(raster, depth)
        network = of_kind(model, FusionNetwork, "the model")
        if ms.shape[1] != network.bands:
            raise UserError(f"{coarse.file} has {ms.shape[1]} bands, these weights are for {network.bands}")
        start = time.perf_counter()
        with progress.bar("fusing", count_tiles(pan.shape[-2], pan.shape[-1], LARGEST, OVERLAP)) as advance:
            fused = fuse(network, ms, pan, advance=advance)
        lines = [*told_of(coarse, fine), _said("fused", report(fused, ms, pan, network.sensor))]
        if steps:
            tuned = adapt(network, ms, pan, Adaptation(steps=steps), coregister=coregister)
            fused = fuse(tuned, ms, pan)
            lines.append(_said(f"after {steps} steps", report(fused, ms, pan, network.sensor)))
        write_raster(output, fused[0].cpu().numpy(), coarse, fine, depth)
        sides = f"{fused.shape[-1]}×{fused.shape[-2]} pixels, {fused.shape[1]} bands"
        return "\n".join([*lines, f"wrote {output}, {sides}, in {time.perf_counter() - start:.1f} s"])

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From a `stack` of the interpolated bands and the PAN, in counts / 2048, to the `fused` bands."""
        bands = of_kind(model, FusionNetwork, "the model").bands
        generator = torch.Generator().manual_seed(0)
        return Portable(
            Fusing(model).eval(),
            {"stack": torch.rand(2, bands + 1, 44, 52, generator=generator)},
            ["fused"],
            {"stack": {0: "batch", 2: "height", 3: "width"}},
            least={"height": 16, "width": 16},
        )

    def picture(self, model: nn.Module, data: TaskData) -> "Figure | None":
        """A piece of the first test scene: PAN, interpolated bands, fused, truth."""
        from matplotlib.figure import Figure

        ms, pan, truth = (part[None] for part in data.test[0])
        network = of_kind(model, FusionNetwork, "the model").cpu()
        shown = {"PAN": pan, "interpolated": upsample(ms), "fused": fuse(network, ms, pan), "truth": truth}
        figure = Figure(figsize=(10, 2.9), layout="constrained")
        for axes, (name, image) in zip(figure.subplots(1, len(shown)), shown.items()):
            axes.imshow(as_colours(image[0, :, 40:168, 40:168], network.sensor), interpolation="nearest")
            axes.set_title(name)
            axes.axis("off")
        return figure


class Fusing(nn.Module):
    """A fusion network under the name of its input.

    Args:
        network: takes the stack.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, stack: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch bands height width"]:
        return self.network(stack)


def as_colours(image: Float[Tensor, "bands height width"], sensor: Sensor) -> np.ndarray:
    """Red, green and blue of an image, as (height, width, 3) in 0…1."""
    bands = [0, 0, 0] if len(image) == 1 else list(sensor.rgb)
    return image[bands].permute(1, 2, 0).clamp(0, 1).detach().cpu().numpy()


def by_wald(ms: Tensor, pan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MS and PAN four times smaller, and the MS as the truth; of gains of 0.3 a band.

    Raises:
        UserError: what is left is smaller than the indices take.
    """
    if min(ms.shape[1:]) < LEAST:
        raise UserError(
            f"a scene of {ms.shape[2]}×{ms.shape[1]} multispectral pixels is too small to be tested four times "
            f"smaller; expected at least {LEAST} a side"
        )
    sensor = Sensor((0.3,) * len(ms), 0.15, (0, 0, 0))
    cut = [side // RATIO * RATIO for side in ms.shape[1:]]
    ms, pan = ms[:, : cut[0], : cut[1]], pan[:, : RATIO * cut[0], : RATIO * cut[1]]
    small, coarse = reduced(ms[None], pan[None], sensor)
    return small[0], coarse[0], ms


def pairs_in(folder: Path) -> Iterator[tuple[str, Raster, Raster]]:
    """The scenes of a folder: NAME_ms and NAME_pan, .tif, .tiff or .npy.

    Raises:
        UserError: no folder, no pair, or half of one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected {TASK.reads}")
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.iterdir()):
        match = re.fullmatch(r"(.+)_(ms|pan)\.(tif|tiff|npy)", file.name, flags=re.IGNORECASE)
        if match:
            found.setdefault(match[1], {})[match[2].lower()] = file
    if not found:
        raise UserError(f"{folder} holds no pair of files; expected {TASK.reads}")
    for name, pair in found.items():
        if len(pair) != 2:
            missing = "pan" if "ms" in pair else "ms"
            raise UserError(f"{folder}: there is no {name}_{missing} beside {next(iter(pair.values())).name}")
        yield name, read_raster(pair["ms"]), read_raster(pair["pan"])


def _whole(name: str, value: float, least: int, most: int) -> int:
    if not float(value).is_integer() or not least <= value <= most:
        raise UserError(f"{name} takes a whole number from {least} to {most}, got {value:g}")
    return int(value)


def _said(what: str, values: dict[str, float]) -> str:
    names = {"r_ergas": "R-ERGAS", "r_sam": "R-SAM", "d_lambda": "D_λ", "d_rho": "D_ρ", "d_s": "D_S", "d_s_r": "D_S(R)"}
    told = (f"{label} {_number(values[key])}" for key, label in names.items())
    return f"{what}: " + ", ".join(told)


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "undefined"


TASK = Pansharpening()


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: the picture seen by the simulated sensor, fused; beside it the interpolated bands."""
    from PIL import Image

    shown = as_shown(trial.file).convert("RGB")
    height, width = (max(SMALLEST, side // (2 * RATIO) * 2 * RATIO) for side in (shown.height, shown.width))
    pixels = np.asarray(shown.resize((width, height)))[..., ::-1].copy()
    truth = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    network = of_kind(trial.model, FusionNetwork, "the model")
    ms, pan = (part[None] for part in observed(truth, network.sensor, 0))
    for name, image in (("before", upsample(ms)), ("after", fuse(network, ms, pan))):
        Image.fromarray((255 * as_colours(image[0], network.sensor)).round().astype(np.uint8)).save(f"{name}.png")
    return {"kind": "enlarged", "from": (width // RATIO, height // RATIO), "size": (width, height)}
