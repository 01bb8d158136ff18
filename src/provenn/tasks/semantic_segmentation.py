"""Images to masks: a class for each pixel."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import is_stream, output_suffix
from provenn.data.brain import TISSUES, brain_slices
from provenn.data.images import Picture, images_in, read_image, read_pixels, resize_pixels, size_of, write_image
from provenn.data.masks import IGNORED, MaskFolder, Unknown, UnknownPixels, palette, read_folder, write_mask
from provenn.data.mosaics import BANDS, MEAN, STD, TEXTURES, mosaic
from provenn.nn.segmentation import full_logits
from provenn.tasks.base import (
    CUT,
    HeldOut,
    Portable,
    Scores,
    Task,
    TaskData,
    check_share,
    device_of,
    fingerprint,
    split_indices,
)
from provenn.tasks.demos import Trial, save_shown
from provenn.tasks.image_classification import IMAGENET_MEAN, IMAGENET_STD
from provenn.tasks.meta import Masks
from provenn.tasks.portable import Standardising, calibration_images, portable_images, standardise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EMBEDDED = {
    "textures": "mosaics of five photographed textures in random cells, light and noise, with exact masks; composed",
    "brain": "axial slices of the MNI152 brain with background, grey and white matter and the rest (extra medical)",
}
COUNTS = {"train": 320, "val": 40, "test": 60}  # of mosaics
LARGEST_CROP = 512  # pixels, of the user's images
NARROW = 60  # pixels, of an overlay that gets no key
NEAR = 0.0075  # of the diagonal: how far a boundary may be off


class SemanticSegmentation(Task):
    """Cross-entropy of every pixel; mean intersection over union, pixel accuracy and the F-score of boundaries."""

    name = "semantic-segmentation"
    meta_schema = Masks
    metric = "miou"
    higher_is_better = True
    embedded = EMBEDDED
    reads = "a folder with images/ and masks/ of the same names (also as in ADE20K, Pascal VOC, Cityscapes, COCO-stuff)"
    into_folders = True

    def load(  # type: ignore[override]
        self,
        source: str | Path,
        *,
        seed: int = 0,
        size: int | None = None,
        val_share: float = CUT,
        skip_broken: bool = False,
        unknown: Unknown = "refuse",
    ) -> TaskData:
        """The embedded data set of that name, or a folder of images and masks.

        Args:
            source: "textures", "brain", or a folder; `train`, `val` and `test` in it are honoured, what is missing is
                cut from `train`. A mask holds class numbers, 255 where nothing is judged; `classes.txt` names them.
            seed: of the split, or of the mosaics.
            size: side of the mosaics (128), or of the square crops of training (512, or less where images are smaller).
            val_share: of the images of `train`, what is cut from them for each missing split.
            skip_broken: of a folder, name the images that cannot be read and go on without them.
            unknown: what becomes of colours and numbers in no class. They are not judged, and said; of more than 1 %
                of the pixels such data are refused, or taken all the same where this is "ignore".
        """
        named = self._named(source)
        if size is not None and size < 16:
            raise UserError(f"size must be at least 16 pixels, got {size}")
        if named == "textures":
            return _mosaics(seed, size or 128)
        if named == "brain":
            if size is not None:
                raise UserError(f"slices of the brain are 224×192 pixels: leave size out, got {size}")
            return _brain()
        check_share(val_share)
        return _folder(Path(named), seed, size, skip_broken, val_share, unknown)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        images, masks = batch
        logits = full_logits(model, images)
        total = F.cross_entropy(logits.float(), masks.long(), ignore_index=IGNORED, reduction="sum")
        # Not "mean": a batch of which nothing is judged would give 0 / 0.
        return total / (masks != IGNORED).sum().clamp_min(1)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of each image and class: pixels predicted and true, predicted, and true; the boundaries' F-score."""
        device, rows = device_of(model), []
        for images, masks in _alike(dataset, min(batch_size, 8)):
            logits = full_logits(model, images.to(device))
            masks, classes = masks.to(device).long(), logits.shape[1]
            highest = int(torch.where(masks == IGNORED, 0, masks).max())
            if highest >= classes:
                raise UserError(f"a mask holds the class {highest}; the model knows {classes} classes, from 0 on")
            predicted = torch.where(masks == IGNORED, IGNORED, logits.argmax(1))
            both, said, true = (
                _counts(m, classes) for m in (torch.where(predicted == masks, masks, IGNORED), predicted, masks)
            )
            rows.append([part.cpu().numpy() for part in (both, said, true, boundary_f_score(predicted, masks))])
        names = ("both", "told_pixels", "true_pixels", "boundary_f")
        if rows and not any(row[2].any() for row in rows):
            raise UserError(f"every pixel of the masks is {IGNORED}: nothing is judged")
        return {name: np.concatenate(column) for name, column in zip(names, zip(*rows))}

    def summary(self, scores: Scores) -> dict[str, float]:
        """Intersections and unions are summed over the images. A class neither predicted nor true is left out."""
        both, predicted, true = (
            scores[name].sum(0, dtype=np.float64) for name in ("both", "told_pixels", "true_pixels")
        )
        union = predicted + true - both
        seen = union > 0
        judged = max(true.sum(), 1.0)
        return {
            "miou": float((both[seen] / union[seen]).mean()) if seen.any() else float("nan"),
            "pixel_accuracy": float(both.sum() / judged),
            "boundary_f": float(np.mean(scores["boundary_f"])),
        }

    def class_scores(self, scores: Scores, classes: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the table of classes, the worst first."""
        both, predicted, true = (
            scores[name].sum(0, dtype=np.float64) for name in ("both", "told_pixels", "true_pixels")
        )
        rows: list[list[Any]] = []
        for k in np.flatnonzero(predicted + true).tolist():
            name = classes[k] if k < len(classes) else f"class {k}"
            recall = both[k] / true[k] if true[k] else None
            precision = both[k] / predicted[k] if predicted[k] else None
            rows.append([name, int(true[k]), both[k] / (predicted[k] + true[k] - both[k]), recall, precision])
        rows.sort(key=lambda row: row[2])
        return ["class", "pixels", "IoU", "recall", "precision"], rows

    def held_out(  # type: ignore[override]
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        size: int | None = None,
        val_share: float = CUT,
        skip_broken: bool = False,
        unknown: Unknown = "refuse",
    ) -> HeldOut:
        """As in `Task`; `size` is of the mosaics, `val_share`, `skip_broken` and `unknown` are as in `load`."""
        named = self._named(source)
        if size is not None and size < 1:
            raise UserError(f"size must be at least 1 pixel, got {size}")
        if named == "textures" or named == "brain":
            data = _mosaics(seed, size or meta["size"]) if named == "textures" else _brain()
            if (data.meta["channels"], data.meta["classes"]) != (meta["channels"], meta["classes"]):
                raise UserError(
                    f"{named} has {data.meta['channels']} channel(s) and the classes {', '.join(data.meta['classes'])};"
                    f" these weights take {meta['channels']} and know {len(meta['classes'])} others"
                )
            return HeldOut(data.test, f"the test split of {named}")
        check_share(val_share)
        folder = _in_order(named, read_folder(Path(named), skip_broken), meta["classes"])
        splits = folder.splits if whole else _with_splits(Path(named), folder.splits, seed, val_share)
        split = next(name for name in ("test", "val", "train") if name in splits)
        which = "all" if split == "train" else f"the {split} split"
        strange = UnknownPixels(folder)
        for _, mask in progress.track(splits[split], "reading masks"):
            strange.read(mask)
        strange.check(Path(named), unknown)
        return HeldOut(MaskedImages(splits[split], folder, meta), f"{which} of {named}")

    def dummy_baseline(self, data: TaskData) -> float:
        """Mean IoU of the commonest class everywhere."""
        trained, tested = _pixels_of_classes(data.train, most=200), _pixels_of_classes(data.test)
        commonest = int(trained.argmax())
        # Of the commonest class all that is judged is the union; every other class that is there has an IoU of 0.
        classes = int((tested > 0).sum()) + int(tested[commonest] == 0)
        return (tested[commonest].double() / tested.sum().clamp_min(1)).item() / classes

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        channels = options.get("in_channels", 3)
        return {
            "classes": [f"class {index}" for index in range(options.get("num_classes", 19))],
            "size": LARGEST_CROP,
            "channels": channels,
            "mean": list(IMAGENET_MEAN) if channels == 3 else [0.0] * channels,
            "std": list(IMAGENET_STD) if channels == 3 else [1.0] * channels,
        }

    def example(self, file: Path, meta: dict[str, Any]) -> Float[Tensor, "1 channels height width"]:
        return _standard(read_pixels(file, meta["channels"]), meta)[None]

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        overlay: bool = False,
    ) -> str:
        """The mask of each image: a file to a file, several or a folder to a folder; returns the classes' shares.

        Args:
            model, meta, inputs, output: as in `Task.predict`; a mask is a PNG of class numbers with a palette.
            overlay: write beside each mask the image with its classes in colour, and under it which is which, as
                `…_overlay.png`.
        """
        files = [file for given in inputs for file in (images_in(given) if given.is_dir() else [given])]
        if overlay and output is None:
            raise UserError("an overlay needs a path: give a file or a folder with -o")
        ending = "" if output is None else output_suffix(output, ".png")
        many = len(files) > 1 or (output is not None and ending == "")
        if many and ending:
            raise UserError(f"{len(files)} images need a folder with -o, got {output}")
        if output is not None and not many and ending != ".png":
            raise UserError(f"a mask is written as .png, got {output.name}")
        if overlay and output is not None and is_stream(output):
            raise UserError(f"an overlay goes beside its mask, and nothing can lie beside {output}: give a file")
        colours = meta.get("palette") or palette(len(meta["classes"]))
        paths = [output / f"{file.stem}.png" if many else output for file in files] if output is not None else []
        if len(set(paths)) < len(paths):
            raise UserError("two of the images have the same name, and so would their masks: predict them one by one")
        written = {*paths, *(_beside(path) for path in paths if overlay)}
        if len(written) < len(paths) * (1 + overlay):
            raise UserError("an image is called as another one's overlay would be: predict them one by one")
        over = next((file for file in files if file.resolve() in {path.resolve() for path in written}), None)
        if over is not None:
            raise UserError(f"{over} is an input itself, and would be written over; choose another path with -o")
        lines = []
        for index, file in enumerate(progress.track(files, "predicting")):
            with torch.no_grad():
                image = self.example(file, meta).to(device_of(model))
                mask = full_logits(model, image).argmax(1)[0].cpu().numpy().astype(np.uint8)
            shares = np.bincount(mask.ravel(), minlength=len(colours)) / mask.size
            largest = ", ".join(f"{meta['classes'][k]} {shares[k]:.1%}" for k in np.argsort(-shares)[:5] if shares[k])
            lines.append(f"{file}: {largest}")
            if output is None:
                continue
            write_mask(paths[index], mask, [(r, g, b) for r, g, b in colours])
            if overlay:
                shown = overlaid(read_image(file), mask, colours)
                there = [int(k) for k in np.argsort(-shares) if shares[k]]
                write_image(_beside(paths[index]), keyed(shown, [(meta["classes"][k], colours[k]) for k in there]))
        wrote = [] if output is None else [f"wrote {output}"]
        return "\n".join([*lines, *wrote])

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From `image` in 0…1 to the `probabilities` of each pixel (batch, classes, height, width)."""
        system = PixelClassifier(model, meta["mean"], meta["std"])
        strides = getattr(model, "strides", None)
        return portable_images(
            system,
            ["probabilities"],
            meta,
            strides,
            lambda image: full_logits(model, standardise(image, meta)).softmax(1),
        )

    def calibration(
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, options: dict[str, Any] | None = None
    ) -> TaskData:
        return calibration_images(self, source, meta, seed=seed, options=options, of_one_size=("brain",))

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """Test images, the true masks and the predicted ones."""
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure

        count = min(5, len(data.test))  # type: ignore[arg-type]
        classes = data.meta["classes"]
        colours = ListedColormap(np.array([*palette(len(classes)), (0, 0, 0)]) / 255)
        figure = Figure(figsize=(2.4 * count + 1.8, 7), layout="constrained")
        axes = figure.subplots(3, count, squeeze=False)
        for column in range(count):
            image, mask = data.test[column]
            with torch.no_grad():
                predicted = full_logits(model, image[None].to(device_of(model))).argmax(1)[0].cpu()
            shown = (image * _column(data.meta["std"]) + _column(data.meta["mean"])).clamp(0, 1)
            axes[0, column].imshow(shown.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray")
            true = torch.as_tensor(mask).long()
            for row, picture in ((1, true), (2, predicted)):
                shown = torch.where(true == IGNORED, len(classes), picture)
                axes[row, column].imshow(
                    shown, cmap=colours, vmin=-0.5, vmax=len(classes) + 0.5, interpolation="nearest"
                )
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
        for row, label in enumerate(("image", "true", "predicted")):
            axes[row, 0].set_ylabel(label)
        if len(classes) <= 24:
            patches = [
                axes[0, 0].scatter([], [], color=colours(k), marker="s", label=classes[k]) for k in range(len(classes))
            ]
            figure.legend(handles=patches, loc="outside right center", frameon=False)
        return figure


class PixelClassifier(Standardising):
    """A segmenter, its model giving logits of any resolution.

    Shapes: image (batch, channels, height, width) in 0…1 to probabilities (batch, classes, height, width).
    """

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        return full_logits(self.model, self.standard(image)).softmax(1)


def _beside(mask: Path) -> Path:
    return mask.with_name(f"{mask.stem}_overlay.png")


def overlaid(picture: Picture, mask: UInt8[np.ndarray, "height width"], colours: Sequence[Sequence[int]]) -> Picture:
    """An image with its classes in colour over it, half and half, boundaries in full."""
    full = 65535 if picture.deep else 255
    shown = np.asarray(colours, np.float64)[mask] / 255
    edge = np.zeros(mask.shape, bool)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    share = np.where(edge, 1.0, 0.5)[..., None]
    blended = share * shown + (1 - share) * (picture.colour / full)
    return Picture(np.rint(blended * 255).astype(np.uint8))


def keyed(picture: Picture, entries: Sequence[tuple[str, Sequence[int]]]) -> Picture:
    """A picture with a key under it: names, each behind its colour, in as many lines as its width takes.

    A picture that is too narrow for a word stays as it is.
    """
    from PIL import Image, ImageDraw, ImageFont

    width = picture.colour.shape[1]
    if width < NARROW:
        return picture
    size = max(10.0, width / 45)
    font, line = ImageFont.load_default(size=size), round(1.5 * size)
    placed: list[tuple[int, int, str, Sequence[int]]] = []
    x, y = line // 4, 0
    for name, colour in entries:
        while len(name) > 1 and font.getlength(name) > width - 1.75 * line:
            name = f"{name[:-2]}…" if len(name) > 2 else name[:1]
        wide = int(1.5 * line + font.getlength(name))
        if x > line // 4 and x + wide > width:
            x, y = line // 4, y + line
        placed.append((x, y, name, colour))
        x += wide
    strip = Image.new("RGB", (width, y + round(1.25 * line)), "white")
    draw = ImageDraw.Draw(strip)
    for x, y, name, colour in placed:
        middle = y + round(0.6 * line)
        draw.rectangle((x, middle - 0.3 * line, x + 0.6 * line, middle + 0.3 * line), fill=tuple(colour))
        draw.text((x + 0.8 * line, middle), name, fill="black", font=font, anchor="lm")
    return Picture(np.concatenate([picture.colour, np.asarray(strip)]))


def boundary_f_score(
    predicted: Int64[Tensor, "batch height width"], true: Int64[Tensor, "batch height width"], near: float = NEAR
) -> Float[Tensor, " batch"]:
    """F-score of the boundaries of a mask: 2PR / (P + R).

    P is the share of predicted boundary pixels that have a true one within `near` of the diagonal (a square of at least
    one pixel around). R is the share of true ones that have a predicted one. Of two masks without boundaries it is 1.
    (Csurka et al., 2013, with one boundary map for all classes.)
    """
    reach = max(1, round(near * (true.shape[1] ** 2 + true.shape[2] ** 2) ** 0.5))
    edges = [_edges(mask) for mask in (predicted, true)]
    wide = [F.max_pool2d(edge[:, None], 2 * reach + 1, 1, reach)[:, 0] for edge in edges]
    precise, recalled = (
        (mine * around).sum((1, 2)) / mine.sum((1, 2)).clamp_min(1) for mine, around in zip(edges, reversed(wide))
    )
    score = 2 * precise * recalled / (precise + recalled).clamp_min(1e-12)
    without = (edges[0].sum((1, 2)) == 0) & (edges[1].sum((1, 2)) == 0)
    return torch.where(without, 1.0, score)


def _edges(mask: Int64[Tensor, "batch height width"]) -> Float[Tensor, "batch height width"]:
    """1 where the pixel above or to the left is of another class."""
    edge = torch.zeros(mask.shape, device=mask.device)
    edge[:, 1:] = (mask[:, 1:] != mask[:, :-1]).float()
    edge[:, :, 1:] = torch.maximum(edge[:, :, 1:], (mask[:, :, 1:] != mask[:, :, :-1]).float())
    return edge


def _counts(masks: Int64[Tensor, "batch height width"], classes: int) -> Int64[Tensor, "batch classes"]:
    """Pixels of each class in each mask."""
    flat = torch.where(masks == IGNORED, classes, masks).flatten(1)
    counts = flat.new_zeros(len(flat), classes + 1).scatter_add_(1, flat, torch.ones_like(flat))
    return counts[:, :classes]


def _alike(dataset: Dataset, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of neighbours of one size: a prediction does not depend on the other images of the batch."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for index in range(len(dataset)):  # type: ignore[arg-type]
        image, mask = dataset[index]
        if waiting and (image.shape != waiting[0][0].shape or len(waiting) == batch_size):
            yield torch.stack([x for x, _ in waiting]), torch.stack([y for _, y in waiting])
            waiting = []
        waiting.append((image, torch.as_tensor(mask)))
    if waiting:
        yield torch.stack([x for x, _ in waiting]), torch.stack([y for _, y in waiting])


def _column(values: Sequence[float]) -> Float[Tensor, "channels 1 1"]:
    return torch.tensor(values)[:, None, None]


def _standard(image: UInt8[Tensor, "channels h w"], meta: dict[str, Any]) -> Float[Tensor, "channels h w"]:
    return standardise(image.float() / 255, meta)


def _pixels_of_classes(dataset: Dataset, most: int | None = None) -> Int64[Tensor, " 255"]:
    """How many pixels of each class the masks hold; of `most` images spread over the data at most."""
    count = len(dataset)  # type: ignore[arg-type]
    chosen = range(0, count, max(1, count // most) if most else 1)
    masks = (dataset.mask(i) if isinstance(dataset, MaskedImages) else dataset[i][1] for i in chosen)
    return torch.stack([_counts(torch.as_tensor(mask)[None].long(), IGNORED)[0] for mask in masks]).sum(0)


@lru_cache(maxsize=12)  # a study asks for them once a trial
def _drawn_mosaics(split: str, count: int, seed: int, side: int) -> tuple[Tensor, Tensor]:
    pairs = [mosaic(split, index, seed=seed, side=side) for index in range(count)]
    images = torch.stack([torch.from_numpy((image - MEAN) / STD) for image, _ in pairs])[:, None]
    return images, torch.stack([torch.from_numpy(mask) for _, mask in pairs])


def _mosaics(seed: int, side: int) -> TaskData:
    parts = {split: TensorDataset(*_drawn_mosaics(split, COUNTS[split], seed, side)) for split in BANDS}
    return TaskData(
        "textures",
        Flipped(parts["train"]),
        parts["val"],
        parts["test"],
        fingerprint=fingerprint(*(tensor for part in parts.values() for tensor in part.tensors)),
        options={"num_classes": len(TEXTURES), "in_channels": 1},
        meta={"classes": list(TEXTURES), "size": side, "channels": 1, "mean": [MEAN], "std": [STD]},
        about=f"Mosaics of {side}×{side} pixels: textures of five photographs in random cells, with exact masks. "
        "Composed scenes; training, validation and test show other parts of the photographs.",
    )


def _brain() -> TaskData:
    parts = {}
    for split in BANDS:
        images, masks = brain_slices(split)
        parts[split] = TensorDataset(torch.from_numpy(images)[:, None], torch.from_numpy(masks))
    train = parts["train"].tensors[0]
    mean, std = train.mean().item(), train.std().item()
    scaled = {name: TensorDataset((part.tensors[0] - mean) / std, part.tensors[1]) for name, part in parts.items()}
    return TaskData(
        "brain",
        Flipped(scaled["train"]),
        scaled["val"],
        scaled["test"],
        fingerprint=fingerprint(*(tensor for part in parts.values() for tensor in part.tensors)),
        options={"num_classes": len(TISSUES), "in_channels": 1},
        meta={"classes": list(TISSUES), "size": 224, "channels": 1, "mean": [mean], "std": [std]},
        about="Axial slices of the MNI152 template, an average of 152 brains: one image, its tissue maps the truth; "
        "training, validation and test are other heights.",
    )


class Flipped(Dataset):
    """Images and masks, mirrored one time in two."""

    def __init__(self, dataset: TensorDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.dataset[index]
        return (image.flip(-1), mask.flip(-1)) if torch.rand(()) < 0.5 else (image, mask)


def _in_order(source: str | Path, folder: MaskFolder, classes: Sequence[str]) -> MaskFolder:
    """The folder with its classes as a model numbers them: by name, where both have names."""
    if len(folder.classes) > len(classes):
        raise UserError(f"{source} has {len(folder.classes)} classes, the model knows {len(classes)}")
    nameless = list(classes) == [f"class {index}" for index in range(len(classes))]
    if nameless or folder.classes == list(classes[: len(folder.classes)]):
        return replace(folder, count=len(classes))
    odd = next((name for name in folder.classes if name not in classes), None)
    if odd is not None:
        some = ", ".join(list(classes)[:10]) + (", …" if len(classes) > 10 else "")
        raise UserError(f"{source}: the model knows no class {odd!r}; it knows: {some}")
    return replace(folder, order=tuple(list(classes).index(name) for name in folder.classes))


class MaskedImages(Dataset):
    """Images and masks read from files, whole; or scaled by 0.5 to 2, cropped and mirrored at random for training."""

    def __init__(
        self, files: Sequence[tuple[Path, Path]], folder: MaskFolder, meta: dict[str, Any], augment: bool = False
    ):
        self.files, self.folder, self.meta, self.augment = list(files), folder, meta, augment

    def __len__(self) -> int:
        return len(self.files)

    def mask(self, index: int, strange: UnknownPixels | None = None) -> UInt8[np.ndarray, "height width"]:
        """The mask alone, in the size of its image; what is in no class is not judged, and counted by `strange`.

        Raises:
            UserError: it has another size.
        """
        image, file = self.files[index]
        mask, size = (strange or self.folder).read(file), size_of(image)
        if mask.shape != size:
            raise UserError(
                f"{file} is {mask.shape[1]}×{mask.shape[0]} pixels, its image {image.name} {size[1]}×{size[0]}: "
                "a mask has the size of its image"
            )
        return mask

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "channels h w"], UInt8[Tensor, "h w"]]:
        mask = torch.from_numpy(self.mask(index))
        image = read_pixels(self.files[index][0], self.meta["channels"])
        if self.augment:
            image, mask = random_scaled_crop(image, mask, self.meta["size"])
        return _standard(image, self.meta), mask


def random_scaled_crop(
    image: UInt8[Tensor, "channels height width"], mask: UInt8[Tensor, "height width"], size: int
) -> tuple[UInt8[Tensor, "channels size size"], UInt8[Tensor, "size size"]]:
    """A square of the image scaled by 0.5 to 2, mirrored one time in two; beyond the border black, and not judged.

    Draws from torch's global generator, which the training loop seeds for each epoch.
    """
    draw = torch.rand(4).tolist()
    scale = 0.5 * 4 ** draw[0]
    height, width = (max(1, round(length * scale)) for length in mask.shape)
    image = resize_pixels(image, height, width)
    mask = F.interpolate(mask[None, None], (height, width), mode="nearest-exact")[0, 0]
    below, right = max(0, size - height), max(0, size - width)
    image, mask = F.pad(image, (0, right, 0, below)), F.pad(mask, (0, right, 0, below), value=IGNORED)
    top, left = int(draw[1] * (height + below - size + 1)), int(draw[2] * (width + right - size + 1))
    image, mask = image[:, top : top + size, left : left + size], mask[top : top + size, left : left + size]
    return (image.flip(-1), mask.flip(-1)) if draw[3] < 0.5 else (image, mask)


Splits = dict[str, list[tuple[Path, Path]]]


def _with_splits(root: Path, splits: Splits, seed: int, share: float = CUT) -> Splits:
    """The same, and what of train, val and test is missing cut from `train`, `share` of it each."""
    if "train" not in splits:
        raise UserError(f"{root} holds {next(iter(splits))!r} but no images to train on")
    splits = dict(splits)
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
    missing = [split for split in ("val", "test") if split not in splits]
    pairs = splits["train"]
    if len(pairs) <= len(missing):
        raise UserError(f"{root}: {len(pairs)} images are too few: {' and '.join(missing)} are cut from them")
    order = split_indices(len(pairs), (1.0,), seed)[0]
    count = min(max(1, round(share * len(pairs))), (len(pairs) - 1) // max(1, len(missing)))
    for split in missing:
        splits[split] = [pairs[order.pop()] for _ in range(count)]
    splits["train"] = [pairs[index] for index in sorted(order)]
    return splits


def _folder(
    root: Path, seed: int, size: int | None, skip_broken: bool, share: float, unknown: Unknown = "refuse"
) -> TaskData:
    folder = read_folder(root, skip_broken)
    splits = _with_splits(root, folder.splits, seed, share)
    everything = sorted(pair for pairs in splits.values() for pair in pairs)
    sides = [min(size_of(image)) for image, _ in everything[:: max(1, len(everything) // 200)]]
    classes = list(folder.classes)
    meta: dict[str, Any] = {
        "classes": classes or [f"class {k}" for k in range(IGNORED)],
        "size": size or max(32, min(LARGEST_CROP, int(np.median(sides)) // 32 * 32)),
        "channels": 3,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
    sets = {name: MaskedImages(pairs, folder, meta, augment=name == "train") for name, pairs in splits.items()}
    checksums, pixels, strange = [], np.zeros(IGNORED + 1, np.int64), UnknownPixels(folder)
    empty = ""
    for split, part in sets.items():  # every mask is held to its image now, not in the middle of training
        before = pixels[:IGNORED].sum()
        for index in progress.track(range(len(part)), "reading masks"):
            mask = part.mask(index, strange)
            pixels += np.bincount(mask.ravel(), minlength=IGNORED + 1)
            image = part.files[index][0]
            checksums.append(f"{image.relative_to(root)} {image.stat().st_size} {fingerprint(mask)}")
        empty = empty or (split if pixels[:IGNORED].sum() == before else "")
    strange.check(root, unknown)
    if empty:
        raise UserError(f"{root}: the {empty} split's masks hold {IGNORED} alone, which is not judged")
    there = np.flatnonzero(pixels[:IGNORED])
    if not classes:
        classes = [f"class {k}" for k in range(there[-1] + 1)]
        meta["classes"] = classes
    if len(there) < 2:
        black_and_white = there.tolist() == [0] and pixels[IGNORED]
        hint = (
            f" Of 0 and {IGNORED}, {IGNORED} is not judged: for masks of black and white write two lines to "
            f"{root / 'classes.txt'}, 'background 0 0 0' and 'object 255 255 255'."
        )
        raise UserError(
            f"{root}: the masks hold one class; segmentation needs two or more.{hint if black_and_white else ''}"
        )
    if folder.colours:
        meta["palette"] = [list(colour) for colour in folder.colours]
    return TaskData(
        str(root),
        sets["train"],
        sets["val"],
        sets["test"],
        fingerprint=fingerprint(*sorted(checksums)),
        options={"num_classes": len(classes), "in_channels": 3},
        meta=meta,
        about=f"{len(everything)} images with masks of {len(classes)} classes; trained on {meta['size']} pixels.",
    )


TASK = SemanticSegmentation()


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: the classes of a picture's pixels laid over it, and how much each covers."""
    trial.predict(Path("mask.png"), overlay=True)
    size = save_shown(trial.file)
    with Image.open("mask_overlay.png") as overlay:  # its key is under it
        overlay.crop((0, 0, *size)).save("overlay.png")
    with Image.open("mask.png") as opened:
        mask: np.ndarray = np.asarray(opened)
        colours = np.reshape(opened.getpalette() or [], (-1, 3)).tolist()
    classes = trial.meta["classes"]
    shares = np.bincount(mask.ravel(), minlength=len(classes)) / mask.size
    found = [(classes[k], float(shares[k]), colours[k]) for k in np.argsort(-shares) if shares[k]]
    return {"kind": "mask", "size": size, "shares": found}
