"""Pictures to boxes: where things are, and what."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import atomic_write, output_suffix
from provenn.data.coco import CocoSet, Labelled, find_coco, read_coco
from provenn.data.images import SUFFIXES, images_in, read_pixels, resize_pixels, size_of
from provenn.data.rectangles import RECTANGLE_CLASSES as RECTANGLE_CLASSES
from provenn.data.rectangles import RECTANGLE_SIDE
from provenn.data.rectangles import rectangles as rectangles
from provenn.data.scenes import CLASSES, SIZE, Scene, scenes
from provenn.nn.detection import DetectionBatch, Detections, pad_batch
from provenn.nn.detection.boxes import clip
from provenn.tasks.average_precision import ALL, Found, Truth, average_precision, check_installed, curves, match
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
from provenn.tasks.meta import Boxes
from provenn.tasks.portable import Standardising, portable_images, standardise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHORT, LONGEST = 800, 1333 / 800  # the field's short side, and the longest that a side may be of the short one
MEMORY = 2**30  # bytes of decoded images that are kept
LARGEST_CHECKED = 20_000  # images; a larger set is read as training goes
TOGETHER = 16  # images that are looked at at once, at most, when a model is tested
SCORE_THRESHOLD = 0.001  # the score from which a detection counts in average precision, as the field has it
SHOWN = 20  # lines of predictions in the terminal
MATCHES = "matches"
SPLITS = ("train", "val", "test")
COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#fabed4")


class Example(NamedTuple):
    """A picture as a model sees it, with what is in it.

    Args:
        image: standardised.
        boxes: left, top, right, bottom in its pixels.
        labels: a class each.
        areas: in pixels² of the picture as it was.
        crowd: whether a box is of a crowd, which is nothing to find and nothing to be punished for.
        scale: how many pixels of the picture as it was one of these is wide and high.
    """

    image: Float[Tensor, "3 height width"]
    boxes: Float[Tensor, "objects 4"]
    labels: Int[Tensor, " objects"]
    areas: Float[Tensor, " objects"]
    crowd: Bool[Tensor, " objects"]
    scale: Float[Tensor, "2"]


def join(examples: Sequence[Example]) -> DetectionBatch:
    """A batch to train on: images padded to the largest, crowds left out."""
    single = [~each.crowd for each in examples]
    return pad_batch(
        [each.image for each in examples],
        [each.boxes[one] for each, one in zip(examples, single)],
        [each.labels[one] for each, one in zip(examples, single)],
    )


class Pictures(Dataset):
    """Images with boxes as `Example`s, the short side brought to `size` of the meta; mirrored at random for training.

    Args:
        sources: files, or pictures in memory.
        meta: see `Boxes`.
        augment: for training.
    """

    def __init__(self, sources: Sequence[Labelled | Scene], meta: dict[str, Any], augment: bool = False):
        self.sources, self.meta, self.augment = list(sources), meta, augment
        self.kept: dict[int, tuple[Tensor, tuple[int, int]]] = {}
        self.room = MEMORY

    def __len__(self) -> int:
        return len(self.sources)

    def pixels(self, index: int) -> tuple[UInt8[Tensor, "3 height width"], tuple[int, int]]:
        """The image at the size that is seen, and its height and width before."""
        if index in self.kept:
            return self.kept[index]
        source = self.sources[index]
        if isinstance(source, Scene):
            image = torch.from_numpy(source.pixels).permute(2, 0, 1)
        else:
            image = read_pixels(source.file)
        seen = _seen(image, self.meta["size"]), (image.shape[1], image.shape[2])
        if seen[0].nbytes <= self.room:
            self.kept[index] = seen
            self.room -= seen[0].nbytes
        return seen

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} pictures, asked for number {index}")
        image, (height, width) = self.pixels(index)
        source = self.sources[index]
        scale = torch.tensor([width / image.shape[2], height / image.shape[1]])
        boxes = torch.from_numpy(source.boxes) / scale.repeat(2)
        areas, crowd = _areas_and_crowd(source)
        if self.augment and torch.rand(()) < 0.5:
            image = image.flip(2)
            boxes = torch.stack(
                [image.shape[2] - boxes[:, 2], boxes[:, 1], image.shape[2] - boxes[:, 0], boxes[:, 3]], 1
            )
        known = torch.from_numpy(areas), torch.from_numpy(crowd)
        return Example(_standard(image, self.meta), boxes, torch.from_numpy(source.labels), *known, scale)

    def truth(self, index: int) -> tuple[Truth, np.ndarray]:
        """What is in a picture, and its width, height, width, height, without decoding it."""
        source = self.sources[index]
        areas, crowd = _areas_and_crowd(source)
        height, width = source.pixels.shape[:2] if isinstance(source, Scene) else size_of(source.file)
        return Truth(source.boxes, source.labels, areas, crowd), np.array([width, height] * 2)


def _areas_and_crowd(source: Labelled | Scene) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(source, Scene):
        sides = source.boxes[:, 2:] - source.boxes[:, :2]
        return sides.prod(axis=1), np.zeros(len(sides), bool)
    return source.areas.astype(np.float32), source.crowd


class ObjectDetection(Task):
    """Boxes and classes; average precision as COCO has it. A system brings `training_loss` and `detect`."""

    name = "object-detection"
    metric = "AP"
    higher_is_better = True
    meta_schema = Boxes
    embedded = {  # noqa: RUF012
        "scenes": "880 scenes of 96×128 pixels: coins, handwritten digits and faces, cut out and pasted on photographs "
        "(scikit-image, scikit-learn), with exact boxes; 3 classes",
        "rectangles": "1,370 scenes of 64×64 pixels: rectangles of brick and of grass on gravel (scikit-image), known "
        "by their texture and found by their corners; 2 classes",
    }
    reads = "COCO JSON: a folder with annotations (instances_train2017.json and the like) and images, or one JSON file"
    into_folders = True

    def load(  # type: ignore[override]
        self,
        source: str | Path,
        *,
        seed: int = 0,
        size: int | None = None,
        val_share: float = CUT,
        skip_broken: bool = False,
    ) -> TaskData:
        """The embedded scenes or rectangles, or a data set with annotations in COCO's format.

        Args:
            source: "scenes", "rectangles", or a folder or file: see `provenn.data.coco.find_coco`. What of train, val
                and test is missing is cut from train. Where there is val but no test, val is the test.
            seed: of the split, and of the scenes.
            size: short side that the model sees, in pixels; the longer one follows, to at most 5/3 of it. By default
                800, or what the smaller half of the images has where that is less.
            val_share: of the images of train, what is cut from them for each missing split.
            skip_broken: leave images out that are missing or cannot be read, and name them.
        """
        check_installed()
        named = self._named(source)
        if size is not None and size < 1:
            raise UserError(f"size must be at least 1 pixel, got {size}")
        check_share(val_share)
        if named in DRAWN:
            return _drawn(named, seed, size)
        return _folder(Path(named), seed, size, skip_broken, val_share)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """A detector's own."""
        own = getattr(model, "training_loss", None)
        if own is None:
            raise UserError(f"{type(model).__name__} is no detector: it has no training_loss(batch)")
        return own(batch)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """What was matched in each image, by pycocotools."""
        truths, found = [], []
        count = len(dataset)  # type: ignore[arg-type]
        for example, detections in _looked_at(model, (dataset[index] for index in range(count)), batch_size):
            truths.append(_truth(example))
            found.append(_found(detections, example.scale.repeat(2).numpy()))
        if not sum(len(truth.labels) for truth in truths):
            raise UserError("none of the images holds an object to find: average precision is not defined")
        return {MATCHES: match(truths, found, int(model.num_classes))}  # type: ignore[arg-type]

    def summary(self, scores: Scores) -> dict[str, float]:
        """AP, AP50, AP75, and AP of small, medium and large objects, where there are such."""
        return average_precision(list(scores[MATCHES]))

    def class_scores(
        self, scores: Scores, classes: Sequence[str]
    ) -> tuple[list[str], list[list[str | float | int | None]]]:
        """A row a class, the worst first: its objects, AP, AP50 and AP75."""
        matches = list(scores[MATCHES])
        values = curves(matches)[ALL]
        objects = np.sum([each.objects[ALL] for each in matches], axis=0)
        rows: list[list[str | float | int | None]] = [
            [
                classes[label] if label < len(classes) else f"class {label}",
                int(objects[label]),
                *(float(x) for x in (values[:, label].mean(), values[0, label], values[5, label])),
            ]
            for label in np.flatnonzero(objects).tolist()
        ]
        return ["class", "objects", "AP", "AP50", "AP75"], sorted(rows, key=lambda row: float(row[2] or 0))

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
    ) -> HeldOut:
        """As in `Task`; `size`: short side that the model sees, by default what its weights say."""
        check_installed()
        named = self._named(source)
        check_share(val_share)
        if size is not None and size < 1:
            raise UserError(f"size must be at least 1 pixel, got {size}")
        meta = {**meta, "size": size or meta["size"]}
        if named in DRAWN:
            draw, classes, _, _ = DRAWN[named]
            _numbers(named, classes, meta["classes"])
            kept = [replace(s, labels=_renumbered(s.labels, classes, meta["classes"])) for s in draw("test", seed)]
            return HeldOut(Pictures(kept, meta), f"the test split of {named}")
        root = Path(named)
        files = find_coco(root)
        parts = {split: read_coco(file, _root_of(root), skip_broken=skip_broken) for split, file in files.items()}
        if not whole:
            parts = _with_splits(root, parts, seed, val_share)
        split = next(name for name in ("test", "val", "train") if name in parts)
        chosen = parts[split]
        _numbers(str(files.get(split, root)), chosen.classes, meta["classes"])
        _check_objects(f"{root}: the {split} split", chosen)
        images = [replace(i, labels=_renumbered(i.labels, chosen.classes, meta["classes"])) for i in chosen.images]
        which = "all" if split == "train" else f"the {split} split"
        return HeldOut(Pictures(images, meta), f"{which} of {root}, at a short side of {meta['size']} pixels")

    def dummy_baseline(self, data: TaskData) -> float:
        """AP of the mean box of each class, as shares of the picture, at the share of pictures that hold the class."""
        classes = len(data.meta["classes"])
        boxes: list[list[np.ndarray]] = [[] for _ in range(classes)]
        holding = [0] * classes
        train = _truths(data.train)
        for truth, corner in train:
            for label in range(classes):
                own = truth.boxes[(truth.labels == label) & ~truth.crowd]
                holding[label] += bool(len(own))
                boxes[label] += list(own / corner)
        known = [label for label in range(classes) if boxes[label]]
        mean = np.stack([np.mean(boxes[label], axis=0) for label in known])
        rates = np.array([holding[label] / len(train) for label in known])
        test = _truths(data.test)
        constant = [Found(mean * corner, np.array(known), rates) for _, corner in test]
        return average_precision(list(match([truth for truth, _ in test], constant, classes)))["AP"]

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        classes = options.get("num_classes", 80)
        return {
            "classes": [f"class {index}" for index in range(classes)],
            "ids": list(range(1, classes + 1)),
            "size": SHORT,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        }

    def example(self, file: Path, meta: dict[str, Any]) -> Float[Tensor, "1 3 height width"]:
        return _standard(_seen(read_pixels(file), meta["size"]), meta)[None]

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        score_threshold: float = 0.3,
    ) -> str:
        """Name what is in pictures; draw it, or write it as COCO does.

        Args:
            model, meta, inputs: as in `Task.predict`; a folder among the inputs stands for the images in it.
            output: an image, for a single input, gets the boxes drawn on it. A folder gets a drawn image for each
                input, and `detections.json`. A `.json` file gets COCO results: `image_id`, `category_id`, `bbox`,
                `score` and, besides, `file_name`. `image_id` is a file's name where that is a number, else its number
                in the order.
            score_threshold: boxes of at least this score are shown and written.
        """
        if not 0 <= score_threshold <= 1:
            raise UserError(f"score_threshold must be from 0 to 1, got {score_threshold}")
        files = [file for given in inputs for file in (images_in(given) if given.is_dir() else [given])]
        drawn, results = _destinations(files, output)
        lines, rows = [], []
        for number, file in enumerate(progress.track(files, "predicting"), start=1):
            image = self.example(file, meta)
            height, width = size_of(file)
            scale = np.array([width / image.shape[3], height / image.shape[2]] * 2)
            with torch.no_grad():
                found = _found(model.detect(image.to(device_of(model)), score_threshold=score_threshold)[0], scale)  # type: ignore[operator]
            said = [f"{meta['classes'][label]} {score:.0%}" for label, score in zip(found.labels, found.scores)]
            lines.append(f"{file}: {', '.join(said) or 'nothing'}")
            rows += _results(file, int(file.stem) if file.stem.isdecimal() else number, found, meta["ids"])
            if file in drawn:
                _draw(file, found, said, drawn[file])
        if len(lines) > SHOWN:
            lines[SHOWN:] = [
                f"and {len(lines) - SHOWN} more{'' if output else '; -o FOLDER draws and writes them all'}"
            ]
        if results is not None:
            with atomic_write(results) as temporary:
                temporary.write_text(json.dumps(rows))
        if output is not None:
            lines.append(f"wrote {output}")
        return "\n".join(lines)

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From `image` in 0…1 to the `boxes`, `scores` and `labels` of every anchor; see `Detector`.

        Raises:
            UserError: a detector that picks regions on the way, which ONNX has no form of.
        """
        if not hasattr(model, "scored"):
            raise UserError(
                f"{type(model).__name__} looks at regions that it picks on the way, which ONNX has no form of: "
                "detectors that look at every anchor once can be exported, as RetinaNet, FCOS, ATSS and SSDLite do"
            )

        def predict(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            boxes, scores, _ = model.scored(standardise(image, meta))  # type: ignore[operator]
            size = torch.tensor(image.shape[-2:])
            return torch.stack([clip(each, size) for each in boxes]), scores.amax(dim=2), scores

        system = Detector(model, meta["mean"], meta["std"])
        outputs = ["boxes", "scores", "labels"]
        return portable_images(system, outputs, meta, getattr(model, "strides", None), predict)

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """Test pictures with what was found, in colours of the classes, and dashed in white what is there."""
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        count = min(12, len(data.test))  # type: ignore[arg-type]
        figure = Figure(figsize=(14, 3.2 * math.ceil(count / 4)), layout="constrained")
        axes = figure.subplots(math.ceil(count / 4), 4, squeeze=False).ravel()
        examples = (data.test[index] for index in range(count))
        for axis, (example, found) in zip(axes, _looked_at(model, examples, TOGETHER, score_threshold=0.3)):
            shown = example.image * _column(data.meta["std"]) + _column(data.meta["mean"])
            axis.imshow(shown.clamp(0, 1).permute(1, 2, 0).numpy())
            for left, top, right, bottom in example.boxes.tolist():
                style: dict[str, Any] = {"fill": False, "edgecolor": "white", "linestyle": "--", "linewidth": 1}
                axis.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, **style))
            for (left, top, right, bottom), score, label in zip(*(part.tolist() for part in found)):
                colour = COLOURS[label % len(COLOURS)]
                style = {"fill": False, "edgecolor": colour, "linewidth": 1.5}
                axis.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, **style))
                text = f"{data.meta['classes'][label]} {score:.0%}"
                behind = {"facecolor": colour, "pad": 0.5, "linewidth": 0}
                axis.text(left, top - 2, text, fontsize=6, color=legible_on(colour), bbox=behind)
        for axis in axes:
            axis.set_axis_off()
        return figure


class Detector(Standardising):
    """A detector that looks at each anchor once, its model a `provenn.nn.detection.dense.DenseDetector`.

    What it gives is not thinned out yet: of the boxes of a class that overlap, the surest is meant.

    Shapes: image (batch, channels, height, width) in 0…1 to boxes (batch, anchors, 4): left, top, right, bottom in
        pixels; and for each the score (batch, anchors) of its likeliest class, and that class (batch, anchors).
    """

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, _ = self.model.scored(self.standard(image))
        score, label = scores.max(dim=2)
        height, width = image.shape[-2:]
        inside = [side.clamp(0, (width, height)[axis % 2]) for axis, side in enumerate(boxes.unbind(dim=-1))]
        return torch.stack(inside, dim=-1), score, label


def _looked_at(
    model: nn.Module, examples: Iterator[Example], batch_size: int, score_threshold: float = SCORE_THRESHOLD
) -> Iterator[tuple[Example, Detections]]:
    """Each picture with what a model finds in it, in order.

    Pictures of one size that follow each other are looked at together; others never, since padding would move scores.
    """
    device = device_of(model)
    waiting: list[Example] = []

    def look() -> Iterator[tuple[Example, Detections]]:
        images = torch.stack([each.image for each in waiting]).to(device)
        with torch.no_grad():
            found = model.detect(images, score_threshold=score_threshold)  # type: ignore[operator]
        yield from zip(waiting, (Detections(*(part.cpu() for part in each)) for each in found))
        waiting.clear()

    for example in examples:
        if waiting and (len(waiting) >= min(batch_size, TOGETHER) or waiting[0].image.shape != example.image.shape):
            yield from look()
        waiting.append(example)
    if waiting:
        yield from look()


def _truth(example: Example) -> Truth:
    """What is in a picture, in its own pixels."""
    boxes = example.boxes.numpy() * example.scale.repeat(2).numpy()
    return Truth(boxes, example.labels.numpy(), example.areas.numpy(), example.crowd.numpy())


def _truths(dataset: Dataset) -> list[tuple[Truth, np.ndarray]]:
    """What is in each picture, and its width, height, width, height; without decoding it where that can be."""
    count = len(dataset)  # type: ignore[arg-type]
    if isinstance(dataset, Pictures):
        return [dataset.truth(index) for index in range(count)]
    examples: list[Example] = [dataset[index] for index in range(count)]
    return [
        (_truth(each), np.array([each.image.shape[2], each.image.shape[1]] * 2) * each.scale.repeat(2).numpy())
        for each in examples
    ]


def _found(found: Detections, scale: np.ndarray) -> Found:
    """Detections in the pixels of the picture as it was."""
    return Found(found.boxes.cpu().numpy() * scale, found.labels.cpu().numpy(), found.scores.cpu().numpy())


def _column(values: Sequence[float]) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(values)[:, None, None]


def _standard(image: UInt8[Tensor, "3 h w"], meta: dict[str, Any]) -> Float[Tensor, "3 h w"]:
    return standardise(image.float() / 255, meta)


def _seen(image: UInt8[Tensor, "3 height width"], size: int) -> UInt8[Tensor, "3 height2 width2"]:
    """Scaled so that the shorter side is `size`, or less where the longer one would be more than 5/3 of that."""
    height, width = image.shape[1:]
    scale = min(size / min(height, width), size * LONGEST / max(height, width))
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    return image if (tall, wide) == (height, width) else resize_pixels(image, tall, wide)


def _numbers(source: str, names: Sequence[str], classes: Sequence[str]) -> None:
    """Hold the categories of a data set to those of a model."""
    odd = next((name for name in names if name not in classes), None)
    if odd is not None and not _nameless(names, classes):
        some = ", ".join(list(classes)[:10]) + (", …" if len(classes) > 10 else "")
        raise UserError(f"{source}: the model knows no class {odd!r}; it knows: {some}")


def _nameless(names: Sequence[str], classes: Sequence[str]) -> bool:
    """Whether a model knows no names of its classes, and has as many: then their order counts."""
    return len(names) == len(classes) and list(classes) == [f"class {index}" for index in range(len(classes))]


def _renumbered(labels: np.ndarray, names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    if _nameless(names, classes):
        return labels
    return np.array([list(classes).index(name) for name in names], np.int64)[labels]


def _drawn(named: str, seed: int, size: int | None) -> TaskData:
    draw, classes, side, about = DRAWN[named]
    return data_of_scenes(named, {split: draw(split, seed) for split in SPLITS}, classes, size or side, about)


def data_of_scenes(
    name: str, splits: Mapping[str, Sequence[Scene]], classes: Sequence[str], size: int, about: str = ""
) -> TaskData:
    """Data of scenes that are in memory.

    Args:
        name: of the data.
        splits: the scenes of train, val and test.
        classes: their names, in the order of the labels.
        size: short side that a model sees, in pixels.
        about: the data, in a sentence.
    """
    meta = {
        "classes": list(classes),
        "ids": list(range(1, len(classes) + 1)),
        "size": size,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
    parts = {split: Pictures(listed, meta, augment=split == "train") for split, listed in splits.items()}
    content = (part for listed in splits.values() for each in listed for part in (each.pixels, each.boxes, each.labels))
    return TaskData(
        name,
        **parts,
        fingerprint=fingerprint(*content),
        options={"num_classes": len(classes)},
        meta=meta,
        collate=join,
        about=about,
    )


# Scenes that are drawn: how, their classes, their short side, and what they are.
DRAWN: dict[str, tuple[Callable[[str, int], tuple[Scene, ...]], tuple[str, ...], int, str]] = {
    "scenes": (
        scenes,
        CLASSES,
        SIZE[0],
        "Coins, handwritten digits and faces, cut out of embedded pictures and pasted on photographs, beside "
        "things that are none of them. Boxes are exact, and no picture is in two splits. The pixels are real, the "
        "scenes are not: no shadows, no depth, hardly anything hidden.",
    ),
    "rectangles": (
        rectangles,
        RECTANGLE_CLASSES,
        RECTANGLE_SIDE,
        "Rectangles of brick and of grass on gravel, in noise. Training, validation and test have regions of the same "
        "pictures that do not overlap. Nothing but its edges tells where a large one ends.",
    ),
}


def _root_of(root: Path) -> Path:
    return root if root.is_dir() else root.parent


def _check_objects(what: str, part: CocoSet) -> None:
    """A crowd is nothing to find: who has no other boxes can neither train nor be judged."""
    if not any((~image.crowd).any() for image in part.images):
        crowds = sum(len(image.crowd) for image in part.images)
        only = f" but {crowds} crowd{'s' * (crowds > 1)} (iscrowd: 1), which nobody is asked to find" if crowds else ""
        raise UserError(f"{what}, {len(part.images)} images, holds no object{only}: add boxes of single objects")


def _folder(root: Path, seed: int, size: int | None, skip_broken: bool, share: float) -> TaskData:
    files = find_coco(root)
    parts = {split: read_coco(file, _root_of(root), skip_broken=skip_broken) for split, file in files.items()}
    parts = _with_splits(root, parts, seed, share)
    first = parts["train"]
    for split, part in parts.items():
        _check_objects(f"{root}: the {split} split", part)
    everything = [image for part in parts.values() for image in part.images]
    meta = {
        "classes": first.classes,
        "ids": first.ids,
        "size": size or _side([image.file for image in everything]),
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
    sets = {
        split: Pictures(
            [replace(image, labels=_renumbered(image.labels, part.classes, first.classes)) for image in part.images],
            meta,
            augment=split == "train",
        )
        for split, part in parts.items()
    }
    if len(everything) <= LARGEST_CHECKED:
        for pictures in sets.values():
            pictures.sources = _readable(pictures, skip_broken)
    checksum = fingerprint(
        *(
            part
            for image in sorted(everything, key=lambda image: image.file)
            for part in (f"{image.file.name} {image.file.stat().st_size}", image.boxes, image.labels)
        )
    )
    objects = sum(len(image.labels) for image in everything)
    return TaskData(
        str(root),
        sets["train"],
        sets["val"],
        sets["test"],
        fingerprint=checksum,
        options={"num_classes": len(first.classes)},
        meta=meta,
        collate=join,
        about=f"{len(everything):,} images with {objects:,} boxes of {len(first.classes)} classes, seen at a short "
        f"side of {meta['size']} pixels.",
    )


def _readable(pictures: Pictures, skip_broken: bool) -> list[Labelled | Scene]:
    """The pictures that can be read; names a damaged file now, not in the middle of training, and keeps the pixels."""
    good: list[Labelled | Scene] = []
    kept: dict[int, Any] = {}
    for index in progress.track(range(len(pictures)), "reading images"):
        try:
            pixels = pictures.pixels(index)
        except UserError as error:
            if not skip_broken:
                raise
            progress.say(f"left out: {error}")
            continue
        if index in pictures.kept:
            kept[len(good)] = pixels
        good.append(pictures.sources[index])
    pictures.kept = kept
    return good


def _side(files: Sequence[Path]) -> int:
    """800 pixels, or what the smaller half of the images has; from a sample, without decoding."""
    return min(SHORT, int(np.median([min(size_of(file)) for file in files[:: max(1, len(files) // 200)]])))


def _with_splits(root: Path, parts: dict[str, CocoSet], seed: int, share: float = CUT) -> dict[str, CocoSet]:
    """Train, val and test, what is missing of them cut from train."""
    if "train" not in parts:
        raise UserError(f"{root} has annotations for {' and '.join(parts)} but none for train")
    parts = dict(parts)
    for split, part in parts.items():
        odd = sorted(set(part.classes) ^ set(parts["train"].classes))
        if odd:
            where = "train" if odd[0] in parts["train"].classes else split
            raise UserError(f"{root}: the category {odd[0]!r} is in {where} alone")
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
    missing = [split for split in ("val", "test") if split not in parts]
    images = parts["train"].images
    if len(images) <= 2 * len(missing):
        raise UserError(f"{root}: {len(images)} images are too few to cut {' and '.join(missing)} from them")
    shares = [max(share, 1 / len(images))] * len(missing)
    cuts = split_indices(len(images), [1 - sum(shares), *shares], seed) if missing else [list(range(len(images)))]
    for split, chosen in zip(["train", *missing], cuts):
        parts[split] = replace(parts["train"], images=[images[index] for index in sorted(chosen)])
    return parts


def _destinations(files: Sequence[Path], output: Path | None) -> tuple[dict[Path, Path], Path | None]:
    """Where each drawn picture goes, and where the results do."""
    if output is None:
        return {}, None
    if output_suffix(output, ".json") == ".json":
        return {}, output
    if output.suffix and not output.is_dir():
        if output.suffix.lower() not in SUFFIXES:
            raise UserError(f"cannot write {output.name}: expected .json, a folder, or one of {', '.join(SUFFIXES)}")
        if len(files) > 1:
            raise UserError(f"{output} is one image, and there are {len(files)} to draw on: give a folder")
        paths = {files[0]: output}
    else:
        if output.is_file():
            raise UserError(f"{output} is a file; several images need a folder")
        paths = {file: output / f"{file.stem}.png" for file in files}
    for file, path in paths.items():
        if path.resolve() == file.resolve():
            raise UserError(f"{path} is the input itself; choose another path with -o")
    if len(set(paths.values())) < len(paths):
        raise UserError("two images of the same name would be drawn to one path; rename one or give them apart")
    return paths, None if output.suffix and not output.is_dir() else output / "detections.json"


def _results(file: Path, number: int, found: Found, ids: Sequence[int]) -> list[dict[str, Any]]:
    rows = np.concatenate([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], axis=1)
    return [
        {
            "image_id": number,
            "category_id": ids[label],
            "bbox": [round(x, 2) for x in box],
            "score": round(score, 5),
            "file_name": file.name,
        }
        for box, label, score in zip(rows.tolist(), found.labels.tolist(), found.scores.tolist())
    ]


def fitting_font(
    texts: Sequence[str], width: int, size: float | int
) -> Any:  # Any: a font of Pillow, imported where used
    """The font in which none of the labels is wider than the picture, down to what can still be read."""
    from PIL import ImageFont

    widest = max((ImageFont.load_default(size=size).getlength(text) for text in texts), default=0.0)
    return ImageFont.load_default(size=max(6.0, size * min(1.0, width / max(widest + 1, 1.0))))


def legible_on(colour: str) -> str:
    """Black or white, whichever stands out more (WCAG 2.1's contrast)."""
    shares = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def _draw(file: Path, found: Found, said: Sequence[str], path: Path) -> None:
    """The picture with boxes and what they are, the surest on top."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(read_pixels(file).permute(1, 2, 0).contiguous().numpy())
    draw = ImageDraw.Draw(picture)
    side = max(picture.size)
    line, font = max(1, round(side / 200)), fitting_font(said, picture.width, max(9.0, side / 45))
    for box, label, text in reversed(list(zip(found.boxes.tolist(), found.labels.tolist(), said))):
        colour = COLOURS[label % len(COLOURS)]
        draw.rectangle(box, outline=colour, width=line)
        _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
        x, y = max(0, min(box[0], picture.width - right)), max(0, box[1] - bottom - line)
        draw.rectangle((x, y, x + right, y + bottom + line), fill=colour)
        draw.text((x, y), text, fill=legible_on(colour), font=font)
    with atomic_write(path) as temporary:
        picture.save(temporary)


TASK = ObjectDetection()
SHOWN_BOXES = 100  # of a demo


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: the boxes that were found in a picture."""
    trial.predict(Path("boxes.json"))
    names = dict(zip(trial.meta["ids"], trial.meta["classes"]))
    boxes = [
        {"class": names[row["category_id"]], "box": row["bbox"], "score": row["score"]}
        for row in json.loads(Path("boxes.json").read_text())[:SHOWN_BOXES]
    ]
    return {"kind": "boxes", "size": save_shown(trial.file), "boxes": boxes, "classes": trial.meta["classes"]}
