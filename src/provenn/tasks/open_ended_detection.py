"""Finding and naming objects without a list of classes: names, boxes, masks and scores.

A system has `detect(image)`, which takes an image of 8 bits, (3, height, width), of any size. It gives, the surest
first, `boxes` (objects, 4) in its pixels, `masks` (objects, height, width), `scores` and `names` in its own words. The
classes of an evaluation come in afterwards, when names are matched with them: see `provenn.tasks.naming`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import atomic_write, check_no_input
from provenn.data.coco import find_coco, read_coco
from provenn.data.composed import NOUNS, Composed, composed_scenes
from provenn.data.images import SUFFIXES, images_in, read_pixels
from provenn.tasks.average_precision import AREAS, MOST, THRESHOLDS
from provenn.tasks.base import HeldOut, Scores, Task, TaskData, fingerprint
from provenn.tasks.demos import Trial, save_shown
from provenn.tasks.naming import LEAST, ClipTexts, Embed, classes_of, trigrams
from provenn.tasks.object_detection import COLOURS, SHOWN, SHOWN_BOXES, fitting_font, legible_on

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUPS = ("all", "small", "medium", "large")  # of objects, by COCO's areas
SPLITS = ("train", "val", "test")
GRID = 10  # boxes along a side, of the dummy baseline


class Open(Protocol):
    """What a system found."""

    boxes: Float[Tensor, "objects 4"]
    masks: Bool[Tensor, "objects height width"]
    scores: Float[Tensor, " objects"]
    names: list[str]


class Labelled(NamedTuple):
    """An image and what is in it.

    Args:
        image: of 8 bits.
        boxes: left, top, right, bottom in its pixels.
        labels: numbers of classes.
        areas: in pixels².
        masks: of the objects; None where nobody drew them.
    """

    image: UInt8[Tensor, "3 height width"]
    boxes: Float[np.ndarray, "objects 4"]
    labels: np.ndarray
    areas: np.ndarray
    masks: Bool[np.ndarray, "objects height width"] | None


def as_list(examples: Sequence[Labelled]) -> list[Labelled]:
    """A batch: images have any sizes."""
    return list(examples)


@dataclass
class Scenes(Dataset):
    """Images with objects, as files or in memory.

    Args:
        sources: what is in each image; the image a file or its pixels.
        classes: that labels are numbers of.
        embed: texts to unit vectors, by which names are matched with classes.
        least: likeness from which a name is a class.
    """

    sources: list[tuple[Path | np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]]
    classes: list[str]
    embed: Embed = trigrams
    least: float = LEAST

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Labelled:
        source, boxes, labels, areas, masks = self.sources[index]
        image = read_pixels(source) if isinstance(source, Path) else torch.from_numpy(source).permute(2, 0, 1)
        return Labelled(image.contiguous(), boxes, labels, areas, masks)


class OpenEndedDetection(Task):
    """Average recall over IoU from 0.5 to 0.95, of objects that were found and named."""

    name = "open-ended-detection"
    metric = "named_AR"
    higher_is_better = True
    embedded = {  # noqa: RUF012
        "composed": "scenes of 64×64 pixels of coloured digits and shapes on photographs and textures, with exact "
        "boxes and masks; 16 classes, which no model is given (scikit-image, scikit-learn)",
    }
    reads = "COCO JSON: a folder with annotations and images, or one JSON file"
    into_folders = True

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        skip_broken: bool = False,
        examples: int | None = None,
        names: Path | None = None,
    ) -> TaskData:
        """The embedded scenes, or a data set with annotations in COCO's format.

        Args:
            source: "composed", or a folder or file: see `provenn.data.coco.find_coco`. A set without splits is its own
                train, val and test: nothing is fitted to it.
            seed: of the scenes.
            skip_broken: leave images out that are missing or cannot be read, and name them.
            examples: of the scenes, how many the test has. Default: 200.
            names: a folder with a CLIP of Hugging Face, whose text tower says which class a name is, as LVIS is
                evaluated: always the likest one. Default: a name that is like a class in its letters is of that class.
        """
        named = self._named(source)
        if examples is not None and examples < 1:
            raise UserError(f"examples must be at least 1, got {examples}")
        if isinstance(named, str):
            counts = {"train": 200, "val": 100, "test": examples or 200}
            sets = {split: _composed(split, seed, count) for split, count in counts.items()}
            about = (
                f"{counts['test']} scenes of digits and shapes on photographs, textures and paper, of two to four "
                "objects. Boxes and masks are exact; glyphs and photographs are none that a training sees, and words "
                "are in the combinations of the training."
            )
        else:
            if examples is not None:
                raise UserError("examples is of the composed scenes: leave it out for annotations")
            parts = {split: _read(file, named, skip_broken) for split, file in find_coco(named).items()}
            whole = next(parts[split] for split in ("test", "val", "train") if split in parts)
            sets = {split: parts.get(split, whole) for split in SPLITS}
            about = (
                f"{len(sets['test']):,} images with objects of {len(whole.classes)} classes. Boxes are "
                "compared; outlines of the annotations are not read."
            )
        if names is not None:
            embed = ClipTexts(names)
            sets = {split: replace(part, embed=embed, least=-1.0) for split, part in sets.items()}
        content = (part for each in sets.values() for entry in each.sources for part in entry if part is not None)
        marks = (str(part) if isinstance(part, Path) else part for part in content)
        return TaskData(
            str(named),
            sets["train"],
            sets["val"],
            sets["test"],
            fingerprint=fingerprint(*marks),
            collate=as_list,
            about=about,
        )

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        skip_broken: bool = False,
        examples: int | None = None,
        names: Path | None = None,
    ) -> HeldOut:
        """As in `Task`; the options are those of `load`."""
        data = self.load(source, seed=seed, skip_broken=skip_broken, examples=examples, names=names)
        return HeldOut(data.test, f"the test split of {data.name}")

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """A system's own, of a list of `Labelled`.

        Raises:
            UserError: it has none, as one that joins two trained models.
        """
        own = getattr(model, "training_loss", None)
        if own is None:
            raise UserError(
                f"{type(model).__name__} trains nothing: it joins two trained models; train these by themselves, and "
                "give them with --set vlm=FOLDER --set segmenter=FOLDER"
            )
        return own(batch)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 1) -> Scores:
        """Of each image how many objects there were of each size, and how many were found at each IoU.

        `found` counts boxes, `named` those with the right name, `cut` masks; `right` and `matched` are of names.
        """
        scenes: Scenes = dataset  # type: ignore[assignment]  # a data set of this task
        rows: dict[str, list[np.ndarray]] = {name: [] for name in ("objects", "found", "named", "cut", "drawn")}
        names: list[tuple[int, int]] = []
        for index in progress.track(range(len(scenes)), "detecting"):
            example = scenes[index]
            said: Open = model.detect(example.image)  # type: ignore[operator]
            order = np.argsort(-said.scores.cpu().numpy(), kind="stable")[:MOST]
            boxes = said.boxes.cpu().numpy()[order]
            told = [said.names[k] for k in order]
            labels = classes_of(told, scenes.classes, embed=scenes.embed, least=scenes.least)
            sizes = _groups(example.areas)
            taken = match(box_iou(boxes, example.boxes))
            same = labels[:, None] == example.labels[None]
            rows["objects"].append(sizes.sum(1))
            rows["found"].append((taken[None] * sizes[:, None]).sum(2))
            rows["named"].append((match(box_iou(boxes, example.boxes) * same)[None] * sizes[:, None]).sum(2))
            masks = example.masks
            cut = np.zeros_like(taken) if masks is None else match(mask_iou(said.masks.cpu().numpy()[order], masks))
            rows["cut"].append((cut[None] * sizes[:, None]).sum(2))
            rows["drawn"].append(np.array(float(masks is not None)))
            names.append((int(taken[0].sum()), int((match(box_iou(boxes, example.boxes) * same)[0]).sum())))
        matched, right = np.array(names).T
        return {**{name: np.stack(parts) for name, parts in rows.items()}, "matched": matched, "right": right}

    def summary(self, scores: Scores) -> dict[str, float]:
        """AR of named, of all and of masks, with AR50 and AR75, by sizes where there are such objects."""
        objects = scores["objects"].sum(0)
        if not objects[0]:
            raise UserError("none of the images holds an object to find: recall is not defined")
        found: dict[str, float] = {}
        drawn = scores["drawn"].sum() > 0
        for name, column in (("named_AR", "named"), ("AR", "found"), ("mask_AR", "cut")):
            if name == "mask_AR" and not drawn:
                continue
            shares = scores[column].sum(0)[0] / objects[0]
            found |= {name: float(shares.mean()), f"{name}50": float(shares[0]), f"{name}75": float(shares[5])}
        for group, name in enumerate(GROUPS[1:], 1):
            if objects[group]:
                found[f"AR_{name}"] = float(scores["found"].sum(0)[group].mean() / objects[group])
        found["name_accuracy"] = float(scores["right"].sum() / max(1, scores["matched"].sum()))
        return found

    def dummy_baseline(self, data: TaskData) -> float:
        """Named AR of boxes of the mean size on a grid, all named as the commonest class of the training."""
        train, test = (part for part in (data.train, data.test))
        labels = np.concatenate([entry[2] for entry in train.sources])  # type: ignore[attr-defined]
        sides = np.concatenate([entry[1][:, 2:] - entry[1][:, :2] for entry in train.sources])  # type: ignore[attr-defined]
        name = test.classes[int(np.bincount(labels).argmax())]  # type: ignore[attr-defined]
        return self.evaluate(Everywhere(sides.mean(0), name), test)["named_AR"]

    def example(self, file: Path, meta: dict[str, Any], text: str = "") -> dict[str, Any]:
        """A picture of 8 bits, and the words whose maps are asked for."""
        return {"image": read_pixels(file), "words": [word.strip() for word in text.split(",") if word.strip()]}

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        overlay: bool = False,
        score_threshold: float | int = 0.0,
    ) -> str:
        """Name what is in pictures; write names, boxes, masks and scores as COCO does, and draw them.

        Args:
            model, meta, inputs: as in `Task.predict`; a folder among the inputs stands for the images in it.
            output: a `.json` gets COCO JSON of images, categories and annotations with `score`, masks run by run. A
                picture, of a single input, gets the masks and names drawn on it. A folder gets both.
            overlay: beside a `.json`, also draw the single input, in a `.png` of the same name.
            score_threshold: objects of at least this score are shown and written.
        """
        if not 0 <= score_threshold <= 1:
            raise UserError(f"score_threshold must be from 0 to 1, got {score_threshold}")
        files = [file for given in inputs for file in (images_in(given) if given.is_dir() else [given])]
        table, drawings = _destinations(files, output, overlay)
        lines, found = [], []
        for file in progress.track(files, "detecting"):
            image = read_pixels(file)
            said = _surer(model.detect(image), score_threshold)  # type: ignore[operator]
            shown = [f"{name} {score:.2f}" for name, score in zip(said.names, said.scores.tolist())]
            lines.append(f"{file}: {', '.join(shown) or 'nothing'}")
            found.append((file, image, said))
            if file in drawings:
                draw_found(image, said, drawings[file])
        if len(lines) > SHOWN:
            lines[SHOWN:] = [f"and {len(lines) - SHOWN} more{'' if output else '; -o FOLDER writes them all'}"]
        if table is not None:
            with atomic_write(table) as temporary:
                temporary.write_text(json.dumps(as_coco(found)))
        written = [output, *(drawings.values() if overlay else ())]
        lines += [f"wrote {path}" for path in written if path is not None]
        return "\n".join(lines)

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Any:
        """Refused: names are written token by token.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{self.name} writes names token by token and prompts a segmenter with what comes of them, which is no "
            "single graph of ONNX: export the two models by themselves"
        )

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """Test pictures with what was found."""
        from matplotlib.figure import Figure

        count = min(8, len(data.test))  # type: ignore[arg-type]
        figure = Figure(figsize=(12, 3.2 * -(-count // 4)), layout="constrained")
        axes = figure.subplots(-(-count // 4), 4, squeeze=False).ravel()
        for index, axis in enumerate(axes):
            axis.set_axis_off()
            if index < count:
                image = data.test[index].image
                said = model.detect(image)  # type: ignore[operator]
                axis.imshow(np.asarray(painted(image, said)))
                axis.set_title(", ".join(said.names)[:60], fontsize=7)
        return figure


class Everywhere(nn.Module):
    """Boxes of one size on a grid, all of one name.

    Args:
        side: their width and height in pixels.
        name: of all.
    """

    def __init__(self, side: np.ndarray, name: str):
        super().__init__()
        self.side, self.name = side, name

    def detect(self, image: Tensor) -> Any:
        height, width = image.shape[1:]
        steps = (np.arange(GRID) + 0.5) / GRID
        x, y = (part.ravel() for part in np.meshgrid(steps * width, steps * height))
        middle, half = np.stack([x, y], axis=1), self.side / 2
        limits = np.array([width, height])
        boxes = np.concatenate([(middle - half).clip(0), np.minimum(middle + half, limits)], axis=1)
        masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.round().astype(int)):
            mask[top:bottom, left:right] = True
        return Detected(torch.from_numpy(boxes), masks, torch.ones(len(boxes)), [self.name] * len(boxes))


class Detected(NamedTuple):
    """What was found in an image; see `Open`."""

    boxes: Tensor
    masks: Tensor
    scores: Tensor
    names: list[str]


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of each box with each other one, (boxes, others)."""
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])
    far = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (far - corner).clip(0).prod(2)
    sizes = [(part[:, 2:] - part[:, :2]).clip(0).prod(1) for part in (boxes, others)]
    union = sizes[0][:, None] + sizes[1] - shared
    return shared / np.where(union > 0, union, 1)


def mask_iou(masks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of each mask with each other one, (masks, others)."""
    if not len(masks) or not len(others):
        return np.zeros((len(masks), len(others)))
    one, other = (part.reshape(len(part), -1).astype(np.float64) for part in (masks, others))
    shared = one @ other.T
    union = one.sum(1)[:, None] + other.sum(1) - shared
    return shared / np.where(union > 0, union, 1)


def match(overlap: np.ndarray) -> np.ndarray:
    """Which objects are found at each IoU of COCO's ten, each by one detection: the surer take first, as COCO does.

    Args:
        overlap: (detections, objects), the surest detection first.

    Returns:
        (thresholds, objects) of 0 and 1.

    >>> match(np.array([[0.62, 0.0], [0.9, 0.52]]))[:3].tolist()
    [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    """
    taken = np.zeros((len(THRESHOLDS), overlap.shape[1]))
    levels = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    if not overlap.shape[1]:
        return taken
    for row in overlap:
        free = np.where((taken == 0) & (row[None] >= levels), row[None], -1.0)
        # Of equal overlaps COCO takes the last.
        best = free.shape[1] - 1 - free[:, ::-1].argmax(1)
        hit = np.flatnonzero(free[np.arange(len(best)), best] >= 0)
        taken[hit, best[hit]] = 1
    return taken


def _groups(areas: np.ndarray) -> np.ndarray:
    """Which objects are of each size, (groups, objects)."""
    return np.stack([(areas >= low) & (areas <= high) for low, high in AREAS]).astype(float)


@lru_cache(maxsize=6)
def _composed(split: str, seed: int, count: int) -> Scenes:
    return as_detection(composed_scenes(split, seed, count, words="train"))


def as_detection(scenes: Sequence[Composed]) -> Scenes:
    """Composed scenes with their boxes, classes and masks."""
    return Scenes(
        [
            (
                scene.pixels,
                np.array([thing.box for thing in scene.things], np.float64),
                np.array([NOUNS.index(thing.pair.noun) for thing in scene.things]),
                scene.masks.sum((1, 2)).astype(np.float64),
                scene.masks,
            )
            for scene in scenes
        ],
        list(NOUNS),
    )


def _read(file: Path, named: Path, skip_broken: bool) -> Scenes:
    root = named if named.is_dir() else named.parent
    folders = [
        part for part in root.iterdir() if part.is_dir() and any(f.suffix.lower() in SUFFIXES for f in part.iterdir())
    ]
    part = read_coco(file, folders[0] if len(folders) == 1 else root, skip_broken=skip_broken)
    single = [(image, ~image.crowd) for image in part.images]
    return Scenes([(i.file, i.boxes[one], i.labels[one], i.areas[one], None) for i, one in single], part.classes)


def _surer(said: Any, threshold: float) -> Detected:
    kept = torch.nonzero(said.scores.cpu() >= threshold)[:, 0]
    boxes, masks, scores = (part.cpu()[kept] for part in (said.boxes, said.masks, said.scores))
    return Detected(boxes, masks, scores, [said.names[k] for k in kept.tolist()])


def _destinations(files: Sequence[Path], output: Path | None, overlay: bool) -> tuple[Path | None, dict[Path, Path]]:
    """Where the table goes, and the drawing of each file."""
    if overlay and (output is None or output.suffix.lower() != ".json"):
        raise UserError("overlay draws beside a .json: give -o FILE.json, or a picture or a folder with -o alone")
    if output is None:
        return None, {}
    check_no_input(output, files)
    if output.is_dir() or not output.suffix:
        names = [file.stem for file in files]
        if len(set(names)) < len(names):
            raise UserError("two images of the same name would be drawn to one path; rename one or give them apart")
        drawings = {file: output / f"{file.stem}.png" for file in files}
        table: Path | None = output / "found.json"
    elif output.suffix.lower() == ".json":
        drawings, table = {file: output.with_suffix(".png") for file in files} if overlay else {}, output
    elif output.suffix.lower() in SUFFIXES:
        drawings, table = {file: output for file in files}, None
    else:
        raise UserError(f"cannot write {output.name}: expected .json, a picture or a folder")
    if table != output / "found.json" and drawings and len(files) > 1:
        raise UserError(f"one picture is drawn, and there are {len(files)} images: give a folder with -o")
    for path in drawings.values():
        check_no_input(path, files)
    return table, drawings


def run_lengths(mask: Bool[np.ndarray, "height width"]) -> dict[str, Any]:
    """A mask as COCO writes it uncompressed: lengths of runs of 0 and 1 in turn, column by column.

    >>> run_lengths(np.array([[False, True], [True, True]]))
    {'size': [2, 2], 'counts': [1, 3]}
    """
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    lengths = np.diff(np.concatenate([[0], edges, [mask.size]]))
    # A run of no ones at the end is none.
    counts = lengths[:-1] if len(lengths) > 1 and lengths[-1] == 0 else lengths
    return {"size": list(mask.shape), "counts": counts.tolist()}


def as_coco(found: Sequence[tuple[Path, Tensor, Detected]]) -> dict[str, Any]:
    """Images, categories and annotations of what was found, as COCO has them, with `score` besides."""
    names = sorted({name for *_, said in found for name in said.names})
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for number, (file, image, said) in enumerate(found, 1):
        number = int(file.stem) if file.stem.isdecimal() and len(file.stem) < 16 else number
        images.append({"id": number, "file_name": file.name, "height": image.shape[1], "width": image.shape[2]})
        for box, mask, score, name in zip(said.boxes.tolist(), said.masks.numpy(), said.scores.tolist(), said.names):
            left, top, right, bottom = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": names.index(name) + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": run_lengths(mask),
                    "score": round(score, 5),
                }
            )
    if len({image["id"] for image in images}) < len(images):
        raise UserError("two images have the same number as a name: rename one, or give them apart")
    categories = [{"id": k, "name": name} for k, name in enumerate(names, 1)]
    return {"images": images, "categories": categories, "annotations": annotations}


def painted(image: UInt8[Tensor, "3 height width"], said: Any) -> Any:  # Any: an image of Pillow
    """The image, enlarged where it is small, with masks in colours of their names, boxes and words."""
    from PIL import Image, ImageDraw

    zoom = max(1, round(320 / max(image.shape[1:])))
    names = list(dict.fromkeys(said.names))
    pixels = image.permute(1, 2, 0).float().cpu().numpy()
    for mask, name in reversed(list(zip(said.masks.cpu().numpy(), said.names))):
        colour = COLOURS[names.index(name) % len(COLOURS)]
        tint = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)])
        pixels[mask] = 0.45 * pixels[mask] + 0.55 * tint
    picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    texts = [f"{name} {score:.2f}" for name, score in zip(said.names, said.scores.tolist())]
    line = max(1, round(max(picture.size) / 200))
    font = fitting_font(texts, picture.width, max(9.0, max(picture.size) / 30))
    for box, name, text in reversed(list(zip(said.boxes.tolist(), said.names, texts))):
        colour = COLOURS[names.index(name) % len(COLOURS)]
        left, top, right, bottom = (zoom * edge for edge in box)
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
        _, _, wide, tall = draw.textbbox((0, 0), text, font=font)
        x, y = max(0, min(left, picture.width - wide)), max(0, top - tall - line)
        draw.rectangle((x, y, x + wide, y + tall + line), fill=colour)
        draw.text((x, y), text, fill=legible_on(colour), font=font)
    return picture


def draw_found(image: UInt8[Tensor, "3 height width"], said: Any, path: Path) -> None:
    """Write `painted`, in one step."""
    with atomic_write(path) as temporary:
        painted(image, said).save(temporary)


TASK = OpenEndedDetection()


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: what was found in a picture, each in the model's own words."""
    trial.predict(Path("found.json"))
    content = json.loads(Path("found.json").read_text())
    names = {row["id"]: row["name"] for row in content["categories"]}
    boxes = [
        {"class": names[row["category_id"]], "box": row["bbox"], "score": row["score"]}
        for row in content["annotations"][:SHOWN_BOXES]
    ]
    return {"kind": "boxes", "size": save_shown(trial.file), "boxes": boxes, "classes": list(names.values())}
