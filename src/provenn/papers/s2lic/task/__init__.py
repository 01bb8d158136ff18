"""Image compression: a picture in, a bitstream out; a bitstream in, the picture out."""

import importlib.util
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import atomic_write, check_no_input, check_output, is_stream
from provenn.core.inputs import read_bytes
from provenn.core.narrowing import of_kind
from provenn.data.images import SUFFIXES, Picture, images_in, read_image, write_image
from provenn.papers.s2lic.codec import SIDE, WHOLE, Codec, as_input, as_pixels, check_side, tiles
from provenn.papers.s2lic.model import S2LIC
from provenn.papers.s2lic.task.metrics import (
    PILLOW,
    SMALLEST,
    Coded,
    Measure,
    Pixels,
    bd_rate,
    in_db,
    pillow_curve,
    psnr,
    rate_at,
    similarity,
    similarity_in_db,
)
from provenn.tasks import Task, TaskData, count_examples, device_of, get_task
from provenn.tasks.base import HeldOut, Portable, Scores
from provenn.tasks.demos import Trial, as_shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIX = ".s2l"
LOSSLESS = (".png", ".tif", ".tiff", ".bmp")
PATCH = 64  # side of a crop to train on
LAM = 0.013


@torch.no_grad()
def estimate(model: S2LIC, pixels: Pixels, side: int = SIDE) -> Coded:
    """Decoded picture and rate in tiles, as a file has them, up to what rounding on several threads changes.

    No value is taken for less likely than the rarest of a table, 2⁻²².
    """
    shown, bits = np.empty_like(pixels), 0.0
    for rows, columns in tiles(pixels.shape[0], pixels.shape[1], side):
        part = pixels[rows, columns]
        coded = model(as_input(part).to(device_of(model), next(model.parameters()).dtype))
        shown[rows, columns] = as_pixels(coded.picture, *part.shape[:2])
        bits += float(coded.bits(1 / WHOLE).sum())
    return Coded(shown, bits)


def judged(network: S2LIC, pixels: Pixels) -> tuple[np.ndarray, dict[str, float]]:
    """The decoded picture; its cost at the network's λ, bits a pixel and PSNR."""
    shown, bits = estimate(network, pixels)
    rate = bits / pixels[..., 0].size
    error = float(np.mean((shown.astype(np.float64) - pixels) ** 2))
    return shown, {"cost": network.lam * error + rate, "bpp": rate, "psnr": psnr(shown, pixels)}


def pictures_of(dataset: Dataset) -> Iterator[Pixels]:
    """The pictures of a data set, (height, width, 3)."""
    return (dataset[index].permute(1, 2, 0).numpy() for index in range(count_examples(dataset)))


class ImageCompression(Task):
    """Photographs are the data. The metric is λ·255²·MSE + bits a pixel, of the 8-bit picture that is decoded."""

    name = "image-compression"
    metric = "cost"
    higher_is_better = False
    embedded = {  # noqa: RUF012
        "photographs": "nine colour photographs that scikit-image and scikit-learn ship"
    }
    reads = "a folder of photographs"
    into_folders = True

    def load(
        self,
        source: str | Path,
        *,
        seed: int = 0,
        lam: float | int = LAM,
        patch: int = PATCH,
        crops: int = 64,
        skip_broken: bool = False,
        **_: Any,
    ) -> TaskData:
        """Photographs, split into those to train on, to validate with and to test.

        Args:
            source: `photographs`, or a folder of images, at least three. Folders in it whose names hold `train`, `val`
                and `test` are honoured.
            seed: splits the user's folder.
            lam: λ, the price of distortion: more gives larger files of better pictures. Published: 0.0018, 0.0035,
                0.0067, 0.013, 0.025, 0.0483.
            patch: side of a training crop in pixels, a multiple of 64.
            crops: crops of each photograph in an epoch.
            skip_broken: of a folder, name the images that cannot be read and go on without them.
        """
        if patch % 64 or patch < 64:
            raise UserError(f"patch is the side of a crop, a multiple of 64; got {patch}")
        data = get_task("super-resolution").load(source, seed=seed, patch=patch, crops=crops, skip_broken=skip_broken)
        return replace(data, options={"lam": lam})

    def loss(self, model: nn.Module, batch: UInt8[Tensor, "batch 3 side side"]) -> Float[Tensor, ""]:
        """The network's own: rate and distortion at its λ."""
        dtype = next(model.parameters()).dtype  # of a network in half precision throughout
        return of_kind(model, S2LIC, "the model").rate_distortion((batch.float() / 255).to(dtype))

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Cost, bits a pixel and PSNR of each picture, MS-SSIM where all are large enough; of files size and seconds.

        Rates are estimated, λ is the network's. What a file takes is measured where the extra `compression` is.
        """
        network = of_kind(model, S2LIC, "the model").eval()
        codec = Codec(network) if importlib.util.find_spec("constriction") else None
        rows = []
        for pixels in pictures_of(dataset):
            shown, row = judged(network, pixels)
            if min(pixels.shape[:2]) >= SMALLEST:
                row["ms_ssim"] = similarity(shown, pixels)
            if codec is not None:
                start = time.perf_counter()
                content, _ = codec.compress(pixels)
                middle = time.perf_counter()
                codec.decompress(content)
                times = {"seconds_to_encode": middle - start, "seconds_to_decode": time.perf_counter() - middle}
                row |= {"file_bpp": 8 * len(content) / pixels[..., 0].size, **times}
            rows.append(row)
        if any("ms_ssim" not in row for row in rows):
            progress.say(f"MS-SSIM is left out: it needs pictures of {SMALLEST} pixels a side")
        return {key: np.array([row[key] for row in rows]) for key in rows[0] if all(key in row for row in rows)}

    def dummy_baseline(self, data: TaskData) -> float:
        """The cost of no file at all: each picture decodes to the mean colour of the photographs to train on."""
        photos = data.train.photos  # type: ignore[attr-defined]  # the crops of photographs
        colour = np.mean([photos[i].reshape(-1, 3).mean(0) for i in range(len(photos))], axis=0)
        errors = [float(np.mean((pixels - colour) ** 2)) for pixels in pictures_of(data.test)]
        return float(data.options["lam"] * np.mean(errors))

    def held_out(  # type: ignore[override]  # names its options
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, whole: bool = True, skip_broken: bool = False
    ) -> HeldOut:
        """As in `Task`."""
        return get_task("super-resolution").held_out(source, meta, seed=seed, whole=whole, skip_broken=skip_broken)

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        tile: float | int | None = None,
    ) -> str:
        """Images to .s2l files and .s2l files to images: a file to a file, several or a folder to a folder.

        Args:
            model, meta, inputs, output: as in `Task.predict`.
            tile: side of the squares that are coded each for itself, a multiple of 64, 1024 by default; larger ones
                take more memory.
        """
        if output is None:
            raise UserError(f"a file needs a path: give one that ends in {SUFFIX}, or an image to decode to, with -o")
        side = SIDE if tile is None else check_side(tile)
        jobs = list(_destinations(inputs, output))
        for source, target in jobs:
            if target == output:
                check_output(target)
            check_no_input(target, [str(file) for file, _ in jobs])
            if not source.exists():
                raise UserError(f"{source} does not exist")
        codec = Codec(of_kind(model, S2LIC, "the model"))
        return "\n".join(
            _decoded(codec, source, target) if _is_coded(source) else _coded(codec, source, target, side)
            for source, target in jobs
        )

    def example(self, file: Path, meta: dict[str, Any]) -> Tensor:
        """As in `Task`: the picture, continued to multiples of 64."""
        return as_input(as_8_bits(read_image(file))[0])

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """The decoder's last part: from the decoded `latent` to the `picture` in 0…1.

        The range coder and the walk over the slices stay here: they need numbers that are the same to the last bit.
        """
        network = of_kind(model, S2LIC, "the model")
        generator = torch.Generator().manual_seed(0)
        latent = 2 * torch.randn(2, network.sizes.latent, 8, 12, generator=generator)
        return Portable(
            Synthesis(network).eval(),
            {"latent": latent},
            ["picture"],
            {"latent": {0: "batch", 2: "height", 3: "width"}},
            least={"height": 4, "width": 4},
        )

    def picture(self, model: nn.Module, data: TaskData) -> "Figure | None":
        """PSNR over bits a pixel of the test photographs: the network, and the codecs that Pillow writes."""
        return rate_distortion_plot(model, data.test, self.scores(model, data.test))


def rate_distortion_plot(model: nn.Module, dataset: Dataset, scores: Scores) -> "Figure":
    """PSNR and MS-SSIM over bits a pixel, means over the pictures: the network, and the codecs that Pillow writes.

    The legends have each codec's BD-rate against JPEG. What they need for the network's quality is said.
    """
    from matplotlib.figure import Figure

    network, pictures = of_kind(model, S2LIC, "the model"), list(pictures_of(dataset))
    measures: dict[str, Measure] = {"PSNR": psnr}
    ours = {"PSNR": float(scores["psnr"].mean())}
    if "ms_ssim" in scores:
        measures["MS-SSIM"] = similarity_in_db
        ours["MS-SSIM"] = float(np.mean([in_db(value) for value in scores["ms_ssim"]]))
    with progress.bar("coding beside", len(PILLOW)) as advance:
        curves = {}
        for name in PILLOW:
            curves[name] = pillow_curve(name, pictures, list(measures.values()))
            advance()
    curves = {name: list(zip(*points)) for name, points in curves.items() if points}
    figure, rate = Figure(figsize=(6 * len(measures), 4), layout="constrained"), float(scores["bpp"].mean())
    panels = np.atleast_1d(figure.subplots(1, len(measures)))
    for place, (measure, axes) in enumerate(zip(measures, panels, strict=True), start=1):
        needed = []
        for name, columns in curves.items():
            rates, qualities = columns[0], columns[place]
            label = name if name == "JPEG" else f"{name}, {_beside_jpeg(rates, qualities, curves['JPEG'], place)}"
            axes.plot(rates, qualities, marker=".", label=label)
            there = rate_at(ours[measure], rates, qualities)
            needed.append(f"{name} {'does not reach it' if there is None else f'{there:.3g}'}")
        axes.plot(rate, ours[measure], "*", markersize=12, color="black", label=f"S2LIC, λ {network.lam:g}")
        axes.set(xscale="log", xlabel="bits a pixel", ylabel=f"{measure} in dB")
        axes.grid(alpha=0.3)
        axes.legend(title="BD-rate against JPEG")
        progress.say(f"bits a pixel at {measure} {ours[measure]:.2f} dB: S2LIC {rate:.3g}, {', '.join(needed)}")
    return figure


def _beside_jpeg(rates: Sequence[float], qualities: Sequence[float], jpeg: list[tuple[float, ...]], place: int) -> str:
    try:
        return f"{bd_rate(rates, qualities, jpeg[0], jpeg[place]):+.0f} %"
    except ValueError:
        return "no shared quality"


class Synthesis(nn.Module):
    """A decoder under the name of its input, with values in 0…1.

    Args:
        network: whose decoder.
    """

    def __init__(self, network: S2LIC):
        super().__init__()
        self.decoder = network.decoder

    def forward(self, latent: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 3 rows columns"]:
        return self.decoder(latent).clamp(0, 1)


def as_8_bits(picture: Picture) -> tuple[Pixels, str]:
    """A picture as it is coded, RGB of 8 bits, and what is left behind, in words."""
    left = []
    pixels = picture.colour
    if picture.deep:
        pixels = np.rint(pixels / 257).astype(np.uint8)
        left.append("8 of its 16 bits")
    if picture.alpha is not None:
        left.append("its alpha channel")
    if picture.profile is not None:
        left.append("its colour profile")
    return np.ascontiguousarray(pixels), " and ".join(left)


def _coded(codec: Codec, source: Path, target: Path, side: int) -> str:
    pixels, left = as_8_bits(read_image(source))
    start = time.perf_counter()
    with progress.bar(f"coding {source.name}", len(list(tiles(pixels.shape[0], pixels.shape[1], side)))) as advance:
        content, shown = codec.compress(pixels, side, advance)
    with atomic_write(target) as temporary:
        temporary.write_bytes(content)
    seconds = time.perf_counter() - start
    area = pixels.shape[0] * pixels.shape[1]
    similar = f", MS-SSIM {in_db(similarity(shown, pixels)):.2f} dB" if min(pixels.shape[:2]) >= SMALLEST else ""
    sizes = f"{len(content):,} bytes, {8 * len(content) / area:.3f} bits a pixel"
    told = (
        f"{source} {pixels.shape[1]}×{pixels.shape[0]} → {target}, {sizes}, PSNR {psnr(shown, pixels):.2f} dB{similar}"
    )
    return f"{told}, in {seconds:.1f} s" + (f"; left behind: {left}" if left else "")


def _decoded(codec: Codec, source: Path, target: Path) -> str:
    start = time.perf_counter()
    with progress.bar(f"decoding {source.name}", None) as advance:
        pixels = codec.decompress(read_bytes(source), str(source), advance)
    write_image(target, Picture(pixels))
    size = f"{pixels.shape[1]}×{pixels.shape[0]}"
    return f"{source} → {target} {size}, as it was coded, in {time.perf_counter() - start:.1f} s"


def _is_coded(file: Path) -> bool:
    return file.suffix.lower() == SUFFIX


def _destinations(inputs: Sequence[Path], output: Path) -> Iterator[tuple[Path, Path]]:
    """Which file goes where: .s2l for an image, .png for an .s2l.

    Raises:
        UserError: an ending that does not fit, or two files that would go to one path.
    """
    if len(inputs) == 1 and inputs[0].is_file() and not output.is_dir() and output.suffix:
        allowed = LOSSLESS if _is_coded(inputs[0]) else (SUFFIX,)
        if output.suffix.lower() not in allowed and not is_stream(output):
            raise UserError(f"{inputs[0].name} is written to {' or '.join(allowed)}, got {output.name}")
        yield inputs[0], output
        return
    if output.is_file() or is_stream(output):
        raise UserError(f"{output} takes one file; several need a folder")
    taken: dict[Path, Path] = {}
    for given in inputs:
        inside = given if given.is_dir() else given.parent
        coded = sorted(given.rglob(f"*{SUFFIX}")) if given.is_dir() else []
        others = [f for f in given.rglob("*") if f.suffix.lower() in SUFFIXES] if coded else []
        if others:
            progress.say(
                f"{given}: left out {len(others)} image(s) beside {len(coded)} {SUFFIX} file(s), which are decoded"
            )
        for source in coded or (images_in(given) if given.is_dir() else [given]):
            target = output / source.relative_to(inside).with_suffix(".png" if _is_coded(source) else SUFFIX)
            if target in taken:
                raise UserError(f"{taken[target]} and {source} would both be written to {target}")
            taken[target] = source
            yield source, target


TASK = ImageCompression()


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: the picture before and after the file that it is coded to, and that file's size."""
    shown = as_shown(trial.file).convert("RGB")
    pixels = np.asarray(shown)
    codec = Codec(of_kind(trial.model, S2LIC, "the model"))
    content, decoded = codec.compress(pixels)
    shown.save("before.png")
    Image.fromarray(codec.decompress(content)).save("after.png")
    area = pixels.shape[0] * pixels.shape[1]
    words = f"{len(content):,} bytes, {8 * len(content) / area:.3f} bits a pixel, PSNR {psnr(decoded, pixels):.2f} dB."
    return {"kind": "compared", "size": shown.size, "names": ["The picture", "Out of its file"], "text": words}
