"""Super-resolution: photographs in, the same photographs with more pixels out."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import is_stream, output_suffix
from provenn.data.images import SUFFIXES, Picture, check_holds, images_in, read_image, size_of, write_image
from provenn.data.photographs import Photographs, photograph
from provenn.data.resize import bicubic
from provenn.nn.padding import PadToMultiple
from provenn.tasks.base import HeldOut, Portable, Scores, Task, TaskData, count_examples, fingerprint, split_indices
from provenn.tasks.demos import Trial, as_shown
from provenn.tasks.portable import draw_images
from provenn.tasks.upscale import OVERLAP, TILE, count_tiles, upscale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Side of the input that a training step sees, in pixels, as the field has it (DIV2K, 64×64).
PATCH = 64
# The cubic kernel reaches two low-resolution pixels beyond a crop: that much of its border is not that of the photo.
MARGIN = 2


def degrade(hr: Shaped[Tensor, "*batch height width"], scale: int) -> Float[Tensor, "*batch height2 width2"]:
    """What the network is given: the photograph reduced by antialiased bicubic, in 8 bits.

    Args:
        hr: photographs, 0…255; rows and columns beyond a multiple of `scale` are left out.
        scale: s.
    """
    height, width = (side // scale for side in hr.shape[-2:])
    if min(height, width) < 1:
        raise ValueError(f"an image of {hr.shape[-2]}×{hr.shape[-1]} pixels cannot be reduced {scale} times")
    return to_8_bits(bicubic(hr[..., : height * scale, : width * scale].float(), (height, width)))


def enlarge(lr: Shaped[Tensor, "*batch height width"], scale: int) -> Float[Tensor, "*batch height2 width2"]:
    """The baseline: bicubic interpolation, in 8 bits (0…255)."""
    return to_8_bits(bicubic(lr.float(), (lr.shape[-2] * scale, lr.shape[-1] * scale)))


def to_8_bits(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Rounded to whole numbers of 0…255."""
    return x.round().clamp(0, 255)


def luma(rgb: Shaped[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch height width"]:
    """Y of BT.601 in studio range, 16…235, of 8-bit RGB in 0…255; not rounded."""
    weight = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=rgb.device) / 255
    return 16 + torch.einsum("...chw,c->...hw", rgb.double(), weight)


def psnr(
    image: Shaped[Tensor, "3 height width"], reference: Shaped[Tensor, "3 height width"], *, border: int = 0
) -> float:
    """Peak signal-to-noise ratio on the Y channel, in dB: 10 log₁₀(255² / mean squared error).

    Args:
        image, reference: 8-bit RGB, 0…255.
        border: pixels that are cut off on each side; the field cuts as many as the scale.
    """
    error = (_inside(luma(image), border) - _inside(luma(reference), border)).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(
    image: Shaped[Tensor, "3 height width"], reference: Shaped[Tensor, "3 height width"], *, border: int = 0
) -> float:
    """Structural similarity on the Y channel (Wang et al., 2004), in 11×11 Gaussian windows of σ 1.5.

    Args:
        image, reference, border: as in `psnr`; what is left has at least 11 pixels on each side.
    """
    x, y = (_inside(luma(t), border)[None, None] for t in (image, reference))
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs at least 11 pixels on each side, got {x.shape[-2]}×{x.shape[-1]}")
    gauss = torch.exp(-((torch.arange(11, dtype=torch.float64, device=x.device) - 5) ** 2) / (2 * 1.5**2))
    gauss = gauss / gauss.sum()

    def mean(t: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(t, gauss.view(1, 1, 11, 1)), gauss.view(1, 1, 1, 11))

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.mean().item()


def _inside(y: Tensor, border: int) -> Tensor:
    height, width = y.shape[-2:]
    return y[..., border : height - border, border : width - border]


class Crops(Dataset):
    """Random squares of photographs, flipped and turned, (3, patch, patch), uint8.

    Args:
        photos: arrays (height, width, 3), uint8; smaller ones are continued by their mirror image.
        patch: side, in pixels of the photograph.
        each: crops of every photograph in one pass.
    """

    def __init__(self, photos: Sequence[np.ndarray] | Photographs, patch: int, each: int):
        self.photos, self.patch, self.each = photos, patch, each

    def __len__(self) -> int:
        return len(self.photos) * self.each

    def __getitem__(self, index: int) -> Tensor:
        photo = self.photos[index // self.each]
        missing = [max(0, self.patch - side) for side in photo.shape[:2]]
        if any(missing):
            photo = np.pad(photo, [(0, missing[0]), (0, missing[1]), (0, 0)], mode="symmetric")
        top, left = (int(torch.randint(side - self.patch + 1, ())) for side in photo.shape[:2])
        crop = torch.from_numpy(np.array(photo[top : top + self.patch, left : left + self.patch])).permute(2, 0, 1)
        turn = int(torch.randint(8, ()))
        crop = crop.rot90(turn % 4, dims=(1, 2))
        return (crop.flip(2) if turn >= 4 else crop).contiguous()


class Whole(Dataset):
    """Photographs as they are, (3, height, width), uint8."""

    def __init__(self, photos: Sequence[np.ndarray] | Photographs):
        self.photos = photos

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.photos[index])).permute(2, 0, 1)


def _splits(root: Path, skip_broken: bool = False) -> list[list[Path]] | None:
    """The photographs of a folder that names its splits, as DIV2K and DF2K do; None of any other."""
    splits: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir()):
        name = folder.name.lower()
        if "lr" in name.split("_"):  # reduced ones, which are made here
            continue
        kind = next((kind for kind in splits if kind in name), "train" if name.startswith("flickr2k") else None)
        if kind is not None:
            splits[kind] += images_in(folder, skip_broken)
    if not splits["train"] or not splits["val"]:
        return None
    if not splits["test"]:
        count = max(1, round(0.1 * len(splits["val"])))
        splits["val"], splits["test"] = splits["val"][:count], splits["val"][count:] or splits["val"]
    return list(splits.values())


class SuperResolution(Task):
    """Photographs are the data; how much smaller the network's input is follows from the network's own `scale`."""

    name = "super-resolution"
    metric = "psnr"
    higher_is_better = True
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
        patch: int = 4 * (PATCH + 2 * MARGIN),
        crops: int = 16,
        skip_broken: bool = False,
        **_: Any,
    ) -> TaskData:
        """Photographs, split into those to train on, to validate with and to test.

        Args:
            source: `photographs`, or a folder of images, at least three. Folders in it whose names hold `train`, `val`
                and `test`, as those of DIV2K do, are honoured; without the last, a tenth of the second validates.
            seed: splits the user's folder.
            patch: side of a training crop, in pixels of the photograph; the default serves every scale up to 4.
            crops: crops of each photograph in an epoch.
            skip_broken: of a folder, name the images that cannot be read and go on without them.
        """
        location = self._named(source)
        if isinstance(location, str):
            return self._photographs(patch, crops)
        if not location.is_dir():
            raise UserError(f"{location} is a file; expected {self.reads}")
        named = _splits(location, skip_broken)
        files = [file for part in named for file in part] if named else images_in(location, skip_broken)
        if len(files) < 3:
            raise UserError(
                f"{location} holds {len(files)} image(s); expected at least 3: to train, to validate and to test"
            )
        tenth = max(1, round(0.1 * len(files)))
        order = [i for part in split_indices(len(files), (1.0,), seed) for i in part]
        cut = (order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth])
        parts = named or [[files[i] for i in sorted(part)] for part in cut]
        train, val, test = (Photographs(part, smallest=PATCH) for part in parts)
        return TaskData(
            name=str(location),
            train=Crops(train, patch, crops),
            val=Whole(val),
            test=Whole(test),
            fingerprint=fingerprint(*(part for f in files for part in (f.name, f.read_bytes()))),
            about=f"{len(files)} photographs of {location.name}, {len(val)} of them to validate and {len(test)} for "
            f"the test, {'as their folders say' if named else f'split by seed {seed}'}.",
        )

    def _photographs(self, patch: int, crops: int) -> TaskData:
        train = [photograph(name) for name in ("astronaut", "coffee", "rocket", "china", "hubble")]
        val = [photograph("motorcycle")[100:356, 200:456]]
        test = [photograph("chelsea"), photograph("flower"), photograph("ihc")[:256, :256]]
        return TaskData(
            name="photographs",
            train=Crops(train, patch, crops),
            val=Whole(val),
            test=Whole(test),
            fingerprint=fingerprint(*train, *val, *test),
            about=(
                "Five photographs to train on (an astronaut, a cup, a rocket, a palace, the Hubble deep field), part "
                "of a motorcycle to validate, a cat, a flower and stained tissue to test. Some are JPEGs. It is no "
                "benchmark of the field: figures compare with each other, not with Set5."
            ),
        )

    def loss(self, model: nn.Module, batch: UInt8[Tensor, "batch 3 side side"]) -> Float[Tensor, ""]:
        """Mean absolute error of RGB in 0…1."""
        scale, multiple = int(model.scale), int(getattr(model, "multiple", 1))  # type: ignore[arg-type]  # a number
        lr = degrade(batch, scale)
        side = min(PATCH, lr.shape[-1] - 2 * MARGIN) // multiple * multiple
        if side < 1:
            raise ValueError(
                f"crops of {batch.shape[-1]} pixels are too small to train ×{scale} in steps of {multiple}"
            )
        start = (lr.shape[-1] - side) // 2
        low = lr[..., start : start + side, start : start + side]
        high = batch[..., start * scale : (start + side) * scale, start * scale : (start + side) * scale]
        dtype = next((p.dtype for p in model.parameters()), torch.float32)  # of a model in half precision throughout
        return F.l1_loss(model((low / 255).to(dtype)), high / 255)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """PSNR and SSIM on Y with a border of `scale` pixels cut, of the network and of bicubic interpolation."""
        scale = int(model.scale)  # type: ignore[arg-type]  # a number
        rows = []
        for index in range(count_examples(dataset)):
            lr, hr = reduced(dataset[index], scale)
            images = {"": restore(model, lr), "_bicubic": enlarge(lr, scale)}
            rows.append(
                {
                    f"{measure.__name__}{name}": measure(image, hr, border=scale)
                    for name, image in images.items()
                    for measure in (psnr, ssim)
                }
            )
        return {key: np.array([row[key] for row in rows]) for key in rows[0]}

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        skip_broken: bool = False,
    ) -> HeldOut:
        """As in `Task`: photographs in full resolution, which are reduced by bicubic interpolation."""
        location = self._named(source)
        if isinstance(location, str) or not whole:
            return super().held_out(source, meta, seed=seed, skip_broken=skip_broken)
        if not location.is_dir():
            raise UserError(f"{location} is a file; expected {self.reads}")
        named = _splits(location, skip_broken)
        files, which = (named[2], "the test split") if named else (images_in(location, skip_broken), "all")
        return HeldOut(Whole(Photographs(files, smallest=PATCH)), f"{which} of {location}")

    def dummy_baseline(self, data: TaskData) -> float:
        """PSNR of bicubic interpolation, at the `scale` of the data's meta, 2 where it names none."""
        scale = int(data.meta.get("scale", 2))
        pairs = [reduced(data.test[index], scale) for index in range(count_examples(data.test))]
        return sum(psnr(enlarge(lr, scale), hr, border=scale) for lr, hr in pairs) / len(pairs)

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        reference: Path | None = None,
    ) -> str:
        """Enlarge images: a file to a file, a folder or several files to a folder.

        Args:
            model, meta, inputs, output: as in `Task.predict`.
            reference: the same images in full resolution, a file or a folder, to compare the result with: PSNR and SSIM
                on Y with a border of `scale` pixels cut, beside those of bicubic interpolation.
        """
        if output is None:
            raise UserError("an image needs a path: give a file or a folder with -o")
        scale = int(model.scale)  # type: ignore[arg-type]  # a number
        jobs = _destinations(inputs, output, scale)
        originals = {} if reference is None else _originals(jobs, reference, scale)
        for source, target, _ in jobs:
            check_holds(target, read_image(source))
        lines, scores = [], []
        for source, target, _ in jobs:
            picture = read_image(source)
            height, width = picture.colour.shape[:2]
            start = time.perf_counter()
            with progress.bar(source.name, count_tiles(height, width)) as advance:
                larger = enlarged(picture, model, advance=advance)
            write_image(target, larger)
            line = (
                f"{source} {width}×{height} → {target} {width * scale}×{height * scale}"
                f" in {time.perf_counter() - start:.1f} s"
            )
            if source in originals:
                hr = _in_8_bits(read_image(originals[source]))[:, : height * scale, : width * scale]
                baseline = enlarge(_in_8_bits(picture), scale)
                images = (_in_8_bits(larger), baseline)
                scores.append([measure(image, hr, border=scale) for image in images for measure in (psnr, ssim)])
                line += f"; {_scored(scores[-1])}"
            lines.append(line)
        if len(scores) > 1:
            lines.append(f"mean of {len(scores)}: {_scored([sum(c) / len(scores) for c in zip(*scores)])}")
        return "\n".join(lines)

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From one `image` in 0…1 to `larger`; padding to the network's multiple is inside the file.

        `predict` takes a large image in tiles, the file takes it whole.
        """
        declared = getattr(model, "multiple", None)
        multiple = int(declared or PATCH)
        # No side is 1, a multiple or like another, and each has several windows: a tracer would take that for a rule.
        height, width = 2 * multiple + 5, 3 * multiple + 3
        traced = [{"height": height, "width": width}]
        if declared is None:
            traced.append({"height": height + 18, "width": height - 24})
        return Portable(
            Enlarger(model).eval(),
            {"image": draw_images(1, 3, height, width)},
            ["larger"],
            {"image": {2: "height", 3: "width"}},
            traced=traced,
            predict=lambda image: torch.stack(
                [torch.from_numpy(upscale(x.permute(1, 2, 0).numpy(), model)).permute(2, 0, 1) for x in image]
            ),
        )

    def picture(self, model: nn.Module, data: TaskData) -> "Figure | None":
        """A crop of the first test photograph: input, bicubic, network, original."""
        return before_and_after({"network": model}, data.test[0])


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


def reduced(photo: Shaped[Tensor, "3 height width"], scale: int) -> tuple[Tensor, Tensor]:
    """A photograph's input to the network, and the photograph cut to `scale` times that size; both 0…255."""
    lr = degrade(photo, scale)
    return lr, photo[..., : lr.shape[-2] * scale, : lr.shape[-1] * scale]


def restore(model: nn.Module, lr: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 height2 width2"]:
    """The network's output in 8 bits, as the published figures are computed."""
    image = lr.permute(1, 2, 0).to(torch.uint8).cpu().numpy()
    return torch.from_numpy(upscale(image, model)).permute(2, 0, 1).float()


def enlarged(
    picture: Picture, model: nn.Module, *, tile: int = TILE, overlap: int = OVERLAP, advance: Any = lambda: None
) -> Picture:
    """A picture through the network: grey stays grey, 16 bits stay 16, alpha is enlarged by bicubic interpolation."""
    colour = upscale(picture.colour, model, tile=tile, overlap=overlap, advance=advance)
    if picture.grey:
        # The network may tint what had no colour: keep the brightness (BT.601).
        grey = np.rint(colour @ np.array([0.299, 0.587, 0.114], np.float32)).astype(colour.dtype)
        colour = np.broadcast_to(grey[..., None], colour.shape)
    alpha = None
    if picture.alpha is not None:
        size = colour.shape[0], colour.shape[1]
        limit = np.iinfo(picture.alpha.dtype).max
        smooth = bicubic(torch.from_numpy(picture.alpha.astype(np.float32)), size)
        alpha = smooth.round().clamp(0, limit).numpy().astype(picture.alpha.dtype)
    return Picture(colour, alpha, picture.grey, picture.profile)


def before_and_after(
    models: dict[str, nn.Module], photo: Shaped[Tensor, "3 height width"], *, side: int = 96
) -> "Figure":
    """The most detailed square of a photograph: input, bicubic, each model's output, original, with PSNR on Y.

    Args:
        models: by the name that stands above their output; all of one scale.
        photo: 0…255.
        side: of the square, in pixels of the photograph.
    """
    from matplotlib.figure import Figure

    scale = int(next(iter(models.values())).scale)  # type: ignore[arg-type]  # a number
    lr, hr = reduced(photo, scale)
    images = {"bicubic": enlarge(lr, scale), **{name: restore(model, lr) for name, model in models.items()}}
    side = min(side, *hr.shape[-2:]) // scale * scale
    gray = luma(hr)
    detail = F.avg_pool2d((gray - F.avg_pool2d(gray[None], 5, 1, 2)[0]).square()[None], side, scale)[0]
    top, left = (scale * int(i) for i in np.unravel_index(int(detail.argmax()), detail.shape))
    panels = {
        f"input, 1/{scale} size": lr[:, top // scale : (top + side) // scale, left // scale :][..., : side // scale]
    }
    for name, image in images.items():
        panels[f"{name}\n{psnr(image, hr, border=scale):.2f} dB"] = image[:, top : top + side, left : left + side]
    panels["original"] = hr[:, top : top + side, left : left + side]
    figure = Figure(figsize=(2.4 * len(panels), 2.9), layout="constrained")
    for axis, (name, panel) in zip(figure.subplots(1, len(panels)), panels.items()):
        axis.imshow(panel.permute(1, 2, 0).numpy().astype(np.uint8), interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
    return figure


def _in_8_bits(picture: Picture) -> Float[Tensor, "3 height width"]:
    colour = torch.from_numpy(picture.colour.astype(np.float32)).permute(2, 0, 1)
    return to_8_bits(colour / 257) if picture.deep else colour


def _scored(scores: Sequence[float]) -> str:
    ours, similar, bicubic_psnr, bicubic_ssim = scores
    return f"on Y {ours:.2f} dB PSNR, {similar:.4f} SSIM; bicubic {bicubic_psnr:.2f} dB, {bicubic_ssim:.4f}"


def _destinations(inputs: Sequence[Path], output: Path, scale: int) -> list[tuple[Path, Path, Path]]:
    """Which file goes where, and its name in the folder that was given, without the ending.

    No input is overwritten, and no two go to one path.
    """
    single = len(inputs) == 1 and inputs[0].is_file()
    if single and not output.is_dir() and output_suffix(output, ".png"):
        jobs = [(inputs[0], output, Path(inputs[0].stem))]
    else:
        if output.is_file() or is_stream(output):
            raise UserError(f"{output} takes one image; several images need a folder")
        jobs = []
        for given in inputs:
            for source in images_in(given) if given.is_dir() else [given]:
                inside = source.relative_to(given).parent if given.is_dir() else Path()
                suffix = source.suffix if source.suffix.lower() in SUFFIXES else ".png"
                jobs.append((source, output / inside / f"{source.stem}_x{scale}{suffix}", inside / source.stem))
    targets = [target.resolve() for _, target, _ in jobs]
    for source, target, _ in jobs:
        if target.resolve() == source.resolve():
            raise UserError(f"{target} is the input itself; choose another path with -o")
        if targets.count(target.resolve()) > 1:
            raise UserError(f"two images would both be written to {target}; rename one or give them apart")
    return jobs


def _originals(jobs: Sequence[tuple[Path, Path, Path]], reference: Path, scale: int) -> dict[Path, Path]:
    """The full-resolution image of each input: the one given, or those of a folder by name.

    Names may end in x2 or _x2 on the side of the inputs, as those of the field's test sets do.
    """
    if not reference.exists():
        raise UserError(f"no reference at {reference}: give the images in full resolution, a file or a folder")
    if reference.is_file() and len(jobs) > 1:
        raise UserError(f"{reference} is one reference for {len(jobs)} images; give a folder of them")
    if reference.is_file():
        originals = {jobs[0][0]: reference}
    else:
        by_name = {file.relative_to(reference).with_suffix(""): file for file in images_in(reference)}
        originals = {}
        for source, _, name in jobs:
            plain = name.with_name(name.name.removesuffix(f"x{scale}").removesuffix("_") or name.name)
            match = by_name.get(name, by_name.get(plain))
            if match is None:
                raise UserError(f"no reference for {source} in {reference}: expected {plain}.png or another image")
            originals[source] = match
    targets = {target.resolve() for _, target, _ in jobs}
    for source, original in originals.items():
        (height, width), (h, w) = size_of(original), (scale * side for side in size_of(source))
        # The field cuts a photograph to a multiple of the scale before it reduces it.
        if not (0 <= height - h < scale and 0 <= width - w < scale):
            raise UserError(f"{original} is {width}×{height} pixels; expected {w}×{h}, {scale} times {source}")
        if min(h, w) < 11 + 2 * scale:
            raise UserError(f"{original} is {width}×{height} pixels; SSIM needs {11 + 2 * scale} on each side")
        if original.resolve() in targets:
            raise UserError(f"{original} would be overwritten by the result; choose another path with -o")
        read_image(original)
    return originals


TASK = SuperResolution()


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: the picture enlarged, beside bicubic interpolation."""
    trial.predict(Path("after.png"))
    before, after = as_shown(trial.file), as_shown(Path("after.png"))
    after.save("after.png")  # of 16 bits too, as a browser shows it
    before.resize(after.size, Image.Resampling.BICUBIC).save("before.png")
    return {"kind": "enlarged", "from": before.size, "size": after.size}
