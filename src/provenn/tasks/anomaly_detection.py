"""Anomaly detection: which images of a category are defective, and where.

A system takes images, and gives `Anomalies` (`provenn.nn.anomaly`): a score of each image and of each of its pixels.
One with `reads_names = True` is given the names of the categories besides, as a list of words. A batch has images,
names, labels (1 is defective) and masks. Figures are means over categories, each with all of its pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import atomic_write, check_no_input, is_stream, output_suffix
from provenn.data.defects import (
    CATEGORIES,
    SIDE,
    Drawn,
    Inspected,
    Part,
    composed_defects,
    read_defect_mask,
    read_defects,
)
from provenn.data.images import SUFFIXES, images_in, read_pixels, resize_pixels
from provenn.data.tables import check_table, write_table
from provenn.nn.anomaly import Anomalies
from provenn.tasks.base import HeldOut, Portable, Task, TaskData, device_of, fingerprint
from provenn.tasks.curves import Curve
from provenn.tasks.demos import Trial, as_shown
from provenn.tasks.image_classification import IMAGENET_MEAN, IMAGENET_STD, LARGEST_CHECKED
from provenn.tasks.meta import Parts
from provenn.tasks.portable import Standardising, draw_images, standardise

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

SIZE = 256  # side at which the user's own images are seen, in pixels
SHOWN = 20  # lines of a prediction in the terminal
NEAR, FAR = 3, 15  # sides of the means whose difference is the dummy baseline's map
TEXTURES = [name for names in CATEGORIES.values() for name in names]
QUANTILE = 0.995  # of the pixels of normal images that lie below a threshold


class Inspections(Dataset):
    """Images of categories as a network sees them, each with the number of its category, its label and its mask.

    Args:
        parts: files.
        meta: see `provenn.tasks.meta.Parts`.
        names: of the categories. Default: those of the files, in alphabetical order.
    """

    def __init__(self, parts: Sequence[Part], meta: dict[str, Any], names: Sequence[str] | None = None):
        self.parts, self.meta = parts, meta
        self.names = sorted({part.category for part in parts}) if names is None else list(names)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(
        self, index: int
    ) -> tuple[Float[Tensor, "3 size size"], int, Float[Tensor, ""], Float[Tensor, "size size"]]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} images, asked for number {index}")
        part, side = self.parts[index], int(self.meta["size"])
        mask = torch.zeros(side, side) if part.mask is None else shrink_mask(part.mask, side)
        image = standardise(_seen(read_pixels(part.image), side).float() / 255, self.meta)
        return image, self.names.index(part.category), torch.tensor(float(part.mask is not None)), mask


def shrink_mask(file: Path, side: int) -> Float[Tensor, "side side"]:
    """A mask at the size that is seen, by the nearest pixel; of a defect that falls between, each cell that it touches.

    Args:
        file: of the mask; what is not black is defect.
        side: of the square, in pixels.

    Raises:
        UserError: all of it is black.
    """
    drawn = torch.from_numpy(read_defect_mask(file)).float()[None, None]
    if not drawn.any():
        raise UserError(
            f"{file}: the mask of a defect is black everywhere: mark the defect, or move its image to the good ones"
        )
    mask = F.interpolate(drawn, (side, side), mode="nearest-exact")
    return (mask if mask.any() else F.adaptive_max_pool2d(drawn, side))[0, 0]


class Composed(Dataset):
    """Composed images in memory, as `Inspections` gives files.

    Args:
        drawn: the images.
        meta: see `provenn.tasks.meta.Parts`.
        names: of the categories. Default: those of the images, in alphabetical order.
    """

    def __init__(self, drawn: Drawn, meta: dict[str, Any], names: Sequence[str] | None = None):
        self.drawn, self.meta = drawn, meta
        self.names = sorted(set(drawn.categories)) if names is None else list(names)

    def __len__(self) -> int:
        return len(self.drawn.images)

    def __getitem__(
        self, index: int
    ) -> tuple[Float[Tensor, "3 size size"], int, Float[Tensor, ""], Float[Tensor, "size size"]]:
        pixels = torch.from_numpy(self.drawn.images[index]).permute(2, 0, 1).float() / 255
        mask = torch.from_numpy(self.drawn.masks[index]).float()
        return standardise(pixels, self.meta), self.names.index(self.drawn.categories[index]), mask.amax(), mask


def join_named(names: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    """What joins examples to a batch with the names of their categories.

    Args:
        names: by their numbers.
    """

    def join(examples: Sequence[Any]) -> Any:
        images, numbers, labels, masks = torch.utils.data.default_collate(list(examples))
        return images, [names[number] for number in numbers.tolist()], labels, masks

    return join


class AnomalyDetection(Task):
    """Cross-entropy of pixels and images where masks are trained on; AP of pixels, and seven figures beside it."""

    name = "anomaly-detection"
    metric = "pixel_ap"
    higher_is_better = True
    into_folders = True
    meta_schema = Parts
    embedded = {  # noqa: RUF012
        "defects": "640 images of 64×64 pixels of 17 textures with composed scratches, blends and stains; no texture "
        "is in two splits (scikit-image, scikit-learn)",
    }
    reads = "a folder of MVTec-AD, VisA or BTAD, or of good/, bad/ and masks/"

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        layout: str | None = None,
        size: int | None = None,
        unseen: str = "",
    ) -> TaskData:
        """The embedded textures, or a folder in a layout of `provenn.data.defects`.

        Args:
            source: "defects", or a folder.
            seed: of the textures, or of the images that are cut off to validate with.
            layout: of a folder, see `provenn.data.defects.LAYOUTS`. Default: the one that it has.
            size: side of the square at which images are seen, in pixels. Default: 256, of the textures 64.
            unseen: names of categories, separated by commas, that the test has and the training has not. The others
                are trained on with their defects and masks. Default: none, and all categories are trained on by good
                images alone.
        """
        named = self._named(source)
        if size is not None and not 8 <= size <= 2**12:
            raise UserError(f"size must be from 8 to {2**12} pixels, got {size}")
        if isinstance(named, str):
            if size not in (None, SIDE):
                raise UserError(f"composed defects have {SIDE}×{SIDE} pixels: leave size out, got {size}")
            if unseen:
                raise UserError("the textures of the test are unseen already: leave unseen out")
            return _composed(seed)
        return _folder(named, seed, layout, size or SIZE, unseen)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of pixels and of images, whose scores are logits; of a system without a loss of its own."""
        images, names, labels, masks = batch
        said = anomalies(model, images, names)
        pixels = F.binary_cross_entropy_with_logits(said.heat, masks)
        return pixels + F.binary_cross_entropy_with_logits(said.score, labels)

    def evaluate(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> dict[str, float]:
        """AUROC, AP and F1-max of images and of pixels, and PRO up to a false positive rate of 0.3, over categories.

        Maps are added up as they come and not kept.

        Raises:
            UserError: a category has no normal or no defective image.
        """
        return dict(_mean(_curves(_answers(model, dataset, batch_size))))

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        layout: str | None = None,
        unseen: str = "",
    ) -> HeldOut:
        """The test images, at the size of the weights: of all categories, or those that `load` holds out.

        Args:
            source, seed, layout, unseen: as in `load`.
            meta: of the weights; it names the categories that they were trained on.
            whole: take the test images of all categories, whatever `unseen` is. Without it, take the part that `load`
                holds out for the test. Where it has categories whose defects may have been trained on, that is said.
        """
        named = self._named(source)
        if isinstance(named, str):
            return HeldOut(Composed(composed_defects("test", seed), meta, TEXTURES), f"the test split of {named}")
        found = read_defects(named, layout)
        parts = found.test if whole else _split(named, found, seed, unseen)[2]
        categories = sorted({part.category for part in parts})
        number = "one category" if len(categories) == 1 else f"{len(categories)} categories"
        about = f"the test images of {number} in {named}"
        known = [name for name in categories if name in meta["categories"]]
        if known and (whole or unseen or known != categories):
            which = f"{', '.join(known[:5])}{', …' if len(known) > 5 else ''}"
            progress.say(
                f"{named}: {which}: these weights were trained on categories of this name, so the figures may be of "
                "images that they have seen; without --split all, and in the unchanged folder, those are left out"
            )
            about += f", of which the weights may have seen {which}"
        return HeldOut(Inspections(parts, meta), about)

    def dummy_baseline(self, data: TaskData) -> float:
        """AP of pixels without learning: at random, or by how far the mean of 3×3 pixels lies from that of 15×15."""
        return max(floors(data.test).values())

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        size = int(options.get("image_size", SIZE))
        return {"size": size, "categories": ["object"], "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}

    def example(self, file: Path, meta: dict[str, Any]) -> Float[Tensor, "1 3 size size"]:
        return standardise(_seen(read_pixels(file), int(meta["size"])).float() / 255, meta)[None]

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        category: str = "object",
        normal: Path | None = None,
        threshold: float | int | None = None,
    ) -> str:
        """A score and a heat map of each image, with an outline of what lies above a threshold.

        Args:
            model, meta, inputs: as in `Task.predict`; a folder among the inputs stands for the pictures in it.
            output: the heat map of a single image (.png, .jpg); a table of scores (.csv); or a folder, which gets a map
                of each image and the table.
            category: what the images show, for systems that read names.
            normal: a folder of good images: the threshold is what 99.5 % of their pixels stay below.
            threshold: of pixels, as the system scores them.
        """
        files = [file for given in inputs for file in (images_in(given) if given.is_dir() else [given])]
        if not files:
            raise UserError("there is nothing to inspect: give a picture, or a folder of some")
        if normal is not None and threshold is not None:
            raise UserError("normal and threshold both say from where on a pixel is anomalous: give one of them")
        if normal is not None and not normal.is_dir():
            raise UserError(f"{normal} is no folder: give the good images")
        maps, table = _targets(output, files)
        said = []
        if normal is not None:
            threshold = normal_threshold(self._said(model, meta, file, category) for file in images_in(normal))
            said.append(f"threshold {threshold:.6g}, from {len(images_in(normal))} normal images")
        rows = []
        for number, file in enumerate(progress.track(files, "inspecting")):
            answer = self._said(model, meta, file, category)
            heat = answer.heat[0].float().cpu().numpy()
            share = float((heat >= threshold).mean()) if threshold is not None else float("nan")
            rows.append((file, float(answer.score[0]), float(heat.max()), share))
            if maps:
                _write(maps[number], heat_map(as_shown(file).convert("RGB"), heat, threshold))
        header = ["file", "score", "highest", *(["share"] if threshold is not None else [])]
        if table is not None:
            write_table(table, header, [(str(file), *numbers[: len(header) - 1]) for file, *numbers in rows])
        lines = [
            f"{file}: score {score:.4g}" + (f", {share:.1%} of the pixels anomalous" if threshold is not None else "")
            for file, score, _, share in rows[:SHOWN]
        ]
        if len(rows) > SHOWN:
            lines.append(f"and {len(rows) - SHOWN} more{'' if table else '; -o FILE.csv writes them all'}")
        return "\n".join([*said, *lines, *([f"wrote {output}"] if output is not None else [])])

    def _said(self, model: nn.Module, meta: dict[str, Any], file: Path, category: str) -> Anomalies:
        with torch.no_grad():
            return anomalies(model, self.example(file, meta).to(device_of(model)), [category])

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From `image` in 0…1, at the size of training, to `score` and `heat`."""
        if getattr(model, "reads_names", False):
            raise UserError(
                "a file has no tokenizer, so a system that reads names is exported for one category: name it after the "
                'paper, such as "metal nut"'
            )
        side = int(meta["size"])
        return Portable(
            Inspector(model, meta["mean"], meta["std"]).eval(),
            {"image": draw_images(2, 3, side, side)},
            ["score", "heat"],
            {"image": {0: "batch"}},
            predict=lambda image: tuple(anomalies(model, standardise(image, meta), [])),
        )

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """Test images with their masks and heat maps."""
        return evaluated(model, data.test, {})


class Inspector(Standardising):
    """A network with its standardisation, as it is exported."""

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
        return tuple(anomalies(self.model, self.standard(image), []))  # type: ignore[return-value]  # two parts


TASK = AnomalyDetection()


def anomalies(model: nn.Module, images: Float[Tensor, "batch 3 height width"], names: Sequence[str]) -> Anomalies:
    """What a system says of images.

    Args:
        model: gives `Anomalies`, or a score and a map in this order.
        images: standardised.
        names: of the categories, for a system with `reads_names = True`.

    Raises:
        UserError: something else comes, or a map of another size than the images.
    """
    said = model(images, list(names)) if getattr(model, "reads_names", False) else model(images)
    if not isinstance(said, tuple) or len(said) != 2:
        raise UserError(
            f"{type(model).__name__} gives no score and map of each image (provenn.nn.anomaly.Anomalies): got "
            f"{type(said).__name__}"
        )
    score, heat = said
    # `len` would fix the number of images in an exported file.
    if heat.shape != (images.shape[0], *images.shape[2:]) or score.shape != images.shape[:1]:
        raise UserError(
            f"{type(model).__name__} gives scores {tuple(score.shape)} and maps {tuple(heat.shape)} for images "
            f"{tuple(images.shape)}: expected one score an image, and maps of the size of the images"
        )
    return Anomalies(score, heat)


Answer = tuple[str, bool, float, Float[np.ndarray, "height width"], Bool[np.ndarray, "height width"]]


def _answers(model: nn.Module, dataset: Dataset, batch_size: int) -> Iterator[Answer]:
    """Of each image its category, whether it is defective, its score, its map and its mask."""
    known = dataset.names  # type: ignore[attr-defined]  # a data set of this task
    for images, numbers, labels, masks in DataLoader(dataset, batch_size=min(batch_size, 32)):
        names = [known[number] for number in numbers.tolist()]
        said = anomalies(model, images.to(device_of(model)), names)
        scores, maps = said.score.float().cpu().tolist(), said.heat.float().cpu().numpy()
        yield from zip(names, (labels > 0).tolist(), scores, maps, (masks > 0).numpy())


def _curves(answers: Iterator[Answer]) -> dict[str, tuple[Curve, Curve]]:
    """Of each category the curve of its images and that of its pixels."""
    curves: dict[str, tuple[Curve, Curve]] = {}
    for name, defective, score, heat, mask in answers:
        of_images, of_pixels = curves.setdefault(name, (Curve(), Curve()))
        of_images.add(np.array([score]), np.array([defective]))
        of_pixels.add_map(heat, mask)
    return curves


def _mean(curves: dict[str, tuple[Curve, Curve]]) -> dict[str, float]:
    rows = []
    for name, (of_images, of_pixels) in curves.items():
        try:
            images, pixels = of_images.summary(), of_pixels.summary()
        except UserError as error:
            raise UserError(f"the category {name!r} cannot be judged: {error}") from None
        figures = {f"image_{key}": value for key, value in images.items()}
        rows.append(figures | {f"pixel_{key}": value for key, value in pixels.items()} | {"pro": of_pixels.pro()})
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def best_threshold(model: nn.Module, dataset: Dataset, batch_size: int = 256) -> float:
    """The score of pixels with the largest F1 over a split: choose it on the validation split, never on the test.

    Args:
        model: in eval mode.
        dataset: of this task.
        batch_size: images at a time.
    """
    curve = Curve()
    with torch.no_grad():
        for _, _, _, heat, mask in _answers(model, dataset, batch_size):
            curve.add_map(heat, mask)
    return curve.best_f1()[1]


def normal_threshold(said: Iterator[Anomalies], quantile: float = QUANTILE) -> float:
    """The score that this share of the pixels of normal images stays below.

    Args:
        said: of normal images.
        quantile: the share.
    """
    values = np.concatenate([each.heat.float().cpu().numpy().ravel() for each in said])
    return float(np.quantile(values, quantile))


class Deviation(nn.Module):
    """How far the mean colour of 3×3 pixels lies from that of 15×15: a map without learning."""

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Anomalies:
        near, far = (F.avg_pool2d(images, side, 1, side // 2, count_include_pad=False) for side in (NEAR, FAR))
        heat = (near - far).square().sum(1).sqrt()
        return Anomalies(heat.amax((1, 2)), heat)


def floors(dataset: Dataset) -> dict[str, float]:
    """AP of pixels, of a map at random, and of `Deviation`.

    Args:
        dataset: the test split.
    """
    answers = list(_answers(Deviation(), dataset, 32))
    masks: dict[str, list[float]] = {}
    for name, _, _, _, mask in answers:
        masks.setdefault(name, []).append(float(mask.mean()))
    guess = float(np.mean([np.mean(shares) for shares in masks.values()]))
    return {"random": guess, "local deviation": _mean(_curves(iter(answers)))["pixel_ap"]}


def _seen(image: UInt8[Tensor, "3 h w"], side: int) -> UInt8[Tensor, "3 side side"]:
    """A square of the size that is seen, whatever the picture's shape, as the field has it."""
    return image if image.shape[1:] == (side, side) else resize_pixels(image, side, side)


def _composed(seed: int) -> TaskData:
    drawn = {split: composed_defects(split, seed) for split in ("train", "val", "test")}
    pixels = drawn["train"].images / 255
    meta = {
        "size": SIDE,
        "categories": list(dict.fromkeys(drawn["train"].categories)),
        "mean": pixels.mean((0, 1, 2)).tolist(),
        "std": pixels.std((0, 1, 2)).tolist(),
    }
    sets = {split: Composed(part, meta, TEXTURES) for split, part in drawn.items()}
    return TaskData(
        "defects",
        sets["train"],
        sets["val"],
        sets["test"],
        fingerprint=fingerprint(*(array for part in drawn.values() for array in (part.images, part.masks))),
        options={"image_size": SIDE},
        meta=meta,
        collate=join_named(TEXTURES),
        about=f"{len(sets['train'])} images of {len(meta['categories'])} textures with masks to train on, "
        f"{len(sets['val'])} to validate, {len(sets['test'])} of 5 other textures to test. Every second image has a "
        "scratch, a blend of another texture or a stain, drawn over it. The textures are real, the defects are not.",
    )


def _split(root: Path, found: Inspected, seed: int, unseen: str) -> tuple[list[Part], list[Part], list[Part]]:
    """What is trained on, validated and tested: see `AnomalyDetection.load`."""
    wanted = [name.strip() for name in unseen.split(",") if name.strip()]
    unknown = next((name for name in wanted if name not in found.categories), None)
    if unknown is not None:
        raise UserError(f"{root} has no category {unknown!r}; there are: {', '.join(found.categories)}")
    order = np.random.default_rng(seed).permutation
    if wanted:
        others = [name for name in found.categories if name not in wanted]
        if len(others) < 2:
            raise UserError(f"unseen leaves {len(others)} categories: expected at least 2, to train and to validate on")
        chosen = others[int(order(len(others))[0])]
        train = [part for part in found.test if part.category in others and part.category != chosen]
        val = [part for part in found.test if part.category == chosen]
        test = [part for part in found.test if part.category in wanted]
    else:
        rows = order(len(found.train))
        if len(rows) < 2:
            raise UserError(f"{root} has {len(rows)} good image to train on: expected at least 2")
        kept = {name: max(1, sum(part.category == name for part in found.train) // 10) for name in found.categories}
        # Images that validate are in no test: good ones leave the training, and a tenth of the defective ones the test.
        train, good = list[Part](), list[Part]()
        for part in (found.train[row] for row in rows):
            (good if kept[part.category] > 0 else train).append(part)
            kept[part.category] -= 1
        val = _validation(good, found.test)
        held = set(val)
        train += [part for part in good if part not in held]
        test = [part for part in found.test if part not in held]
        if not train:
            raise UserError(f"{root} has {len(rows)} good images: expected at least 2 of a category to train on")
    return train, val, test


def _folder(root: Path, seed: int, layout: str | None, size: int, unseen: str) -> TaskData:
    found = read_defects(root, layout)
    train, val, test = _split(root, found, seed, unseen)
    categories = sorted({part.category for part in train})
    meta = {"size": size, "categories": categories, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    sets = {
        name: Inspections(parts, meta, found.categories)
        for name, parts in (("train", train), ("val", val), ("test", test))
    }
    everything = sorted({file for part in (*train, *val, *test) for file in (part.image, part.mask) if file})
    if len(everything) <= LARGEST_CHECKED:
        for parts in sets.values():
            for index in progress.track(range(len(parts)), "reading images"):
                parts[index]  # names a damaged file now, not in the middle of training
    listed = (f"{name} {p.image.relative_to(root)} {p.mask is not None}" for name, s in sets.items() for p in s.parts)
    return TaskData(
        str(root),
        sets["train"],
        sets["val"],
        sets["test"],
        fingerprint=fingerprint(*(f"{f.relative_to(root)} {f.stat().st_size}" for f in everything), *listed),
        options={"image_size": size},
        meta=meta,
        collate=join_named(found.categories),
        about=f"{len(train):,} images of {len(categories)} categories to train on, {len(val):,} to validate, "
        f"{len(test):,} to test, of {len({part.category for part in test})} categories"
        + (" that are not trained on." if unseen.strip(", ") else "; the training has good images alone."),
    )


def _validation(good: list[Part], test: list[Part]) -> list[Part]:
    """Good images that were held out, and a tenth of the defective ones of their categories, which leave the test."""
    val = list(good)
    for name in sorted({part.category for part in good}):
        bad = [part for part in test if part.category == name and part.mask is not None]
        if len(bad) > 1:
            val += bad[::10][: max(1, len(bad) // 2)]
        else:
            val = [part for part in val if part.category != name]
    if not val:
        raise UserError("no category has two defective images, of which one validates: add some")
    return val


def heat_map(picture: "Image", heat: Float[np.ndarray, "height width"], threshold: float | int | None) -> "Image":
    """A picture in grey under its heat, from blue to red, with a white outline of what lies above the threshold.

    Args:
        picture: at its own size, which the map takes.
        heat: at the size that was seen.
        threshold: where the outline runs, and the middle of the colours. Default: none, and colours span the map.
    """
    from PIL import Image

    low, high = float(heat.min()), float(heat.max())
    if threshold is not None:
        high = max(high, 2 * threshold - low, threshold + 1e-6)
    share = Image.fromarray(((heat - low) / max(high - low, 1e-12)).astype(np.float32)).resize(picture.size)
    values = np.asarray(share).clip(0, 1)[..., None]
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    colour = 255 * np.concatenate(
        [(2 * values - 0.5).clip(0, 1), 1 - abs(2 * values - 1), (1.5 - 2 * values).clip(0, 1)], 2
    )
    blend = 0.55 * grey + 0.45 * colour
    if threshold is not None:
        above = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(picture.size)) >= threshold
        inner = above.copy()
        inner[1:-1, 1:-1] = above[1:-1, 1:-1] & above[:-2, 1:-1] & above[2:, 1:-1] & above[1:-1, :-2] & above[1:-1, 2:]
        blend[above & ~inner] = 255
    return Image.fromarray(blend.round().clip(0, 255).astype(np.uint8))


def _write(file: Path, image: "Image") -> None:
    with atomic_write(file) as temporary:
        image.save(temporary)


def _targets(output: Path | None, files: Sequence[Path]) -> tuple[list[Path], Path | None]:
    """Where the heat maps and the table go."""
    if output is None:
        return [], None
    if output_suffix(output, ".csv") == ".csv" and not output.is_dir():
        check_table(output, files)
        return [], output
    if output.suffix and not output.is_dir():
        if output_suffix(output, ".csv") not in SUFFIXES or is_stream(output):
            raise UserError(f"cannot write {output.name}: expected .csv, a folder, or one of {', '.join(SUFFIXES)}")
        if len(files) > 1:
            raise UserError(f"{len(files)} images do not go into {output.name}: give a folder with -o")
        check_no_input(output, files)
        return [output], None
    maps = [output / f"{file.stem}_heat.png" for file in files]
    if len(set(maps)) < len(maps):
        maps = [output / f"{number}_{file.stem}_heat.png" for number, file in enumerate(files)]
    for target in (*maps, output / "scores.csv"):
        check_no_input(target, files)
    return maps, output / "scores.csv"


def evaluated(model: nn.Module, dataset: Dataset, scores: Any) -> "Figure":
    """Defective images in even steps through the test: the image, its mask and its heat map.

    Args:
        model, dataset: what was evaluated.
        scores: not needed.
    """
    from matplotlib.figure import Figure

    examples = [row for row in range(len(dataset)) if dataset[row][2] > 0]  # type: ignore[arg-type]  # it has a length
    chosen = [examples[k] for k in torch.linspace(0, len(examples) - 1, min(6, len(examples))).long().tolist()]
    figure = Figure(figsize=(1.7 * len(chosen), 5.4), layout="constrained")
    axes = figure.subplots(3, len(chosen), squeeze=False)
    meta = dataset.meta  # type: ignore[attr-defined]  # a data set of this task
    mean, std = (torch.tensor(meta[key])[:, None, None] for key in ("mean", "std"))
    for column, row in enumerate(chosen):
        image, number, _, mask = dataset[row]
        name = dataset.names[number]  # type: ignore[attr-defined]  # a data set of this task
        with torch.no_grad():
            said = anomalies(model, image[None].to(device_of(model)), [name])
        axes[0][column].imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
        axes[0][column].set_title(name, fontsize=8)
        axes[1][column].imshow(mask.numpy(), cmap="gray", vmin=0, vmax=1)
        axes[2][column].imshow(said.heat[0].float().cpu().numpy(), cmap="inferno")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: the heat map of the picture that was given."""
    trial.predict(Path("drawing.png"))
    return {"kind": "drawing", "size": as_shown(Path("drawing.png")).size, "classes": ["red: unlike the rest"]}
