"""FreeBench's construction on any segmentation data: two repaintings make a triplet and its instruction (inferred).

The paper repaints a source picture twice, so that an object is the same in the edited picture and in the reference.
Which region is repainted when was not documented; this is our reading of it.

| | repainted | gives |
| --- | --- | --- |
| 1 | all but the object, then flip, scale and crop | the reference |
| 2 | the object and a rim, as ground or as another class | the other side of the pair |

The pair's other picture is the photograph itself, bit for bit outside the rim. So addition goes from the repainted
picture to the photograph, replacement likewise, and removal the other way round, without a reference. Masks are stored
to judge by; no model is given them.

    python -m provenn.data.edits_from_masks PICTURES_AND_MASKS TRIPLETS
    python -m provenn.data.edits_from_masks instances_val2017.json TRIPLETS
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import atomic_write, write_atomically
from provenn.core.narrowing import present
from provenn.data.coco import find_coco, read_outlines
from provenn.data.edits import LIST, PLACEHOLDER, read_edits
from provenn.data.images import read_pixels
from provenn.data.masks import MaskFolder, read_folder

Pixels = UInt8[np.ndarray, "height width 3"]
Mask = Bool[np.ndarray, "height width"]
View = UInt8[np.ndarray, "rows columns 3"]  # of another size than the picture
Captioner = Callable[[View, str], str]  # of a region and its noun: an attribute, such as "red"
SMALLEST, LARGEST = 0.05, 0.6  # share of the picture that an object covers
WHOLE = 0.9  # share of an object that its largest connected part has
RIM = 0.02  # of the picture's longer side, around an object that is repainted
TEMPLATES = {
    "add": ("add a {s} {where}", "put a {s} {where}", "place a {s} {where}"),
    "replace": ("replace the {thing} with {s}", "change the {thing} into {s}"),
    "remove": ("remove the {thing}", "take the {thing} away"),
}


@runtime_checkable
class Inpaint(Protocol):
    """What repaints a region of a picture; `draws` says whether it can draw what a prompt asks for."""

    draws: bool

    def __call__(self, image: Pixels, mask: Mask, prompt: str) -> Pixels: ...


class Instance(NamedTuple):
    """An object in a picture.

    Args:
        image: the picture.
        mask: its pixels.
        noun: its class.
        name: of the picture.
    """

    image: Pixels
    mask: Mask
    noun: str
    name: str = ""


class Filters(NamedTuple):
    """What an object must be like to be used; the values are ours.

    Args:
        smallest, largest: share of the picture that it covers.
        whole: share of it that its largest connected part has.
    """

    smallest: float = SMALLEST
    largest: float = LARGEST
    whole: float = WHOLE

    def refuse(self, mask: Mask) -> str | None:
        """Why an object is not used; None where it is.

        >>> Filters().refuse(np.pad(np.ones((4, 4), bool), 4)), Filters().refuse(np.ones((4, 4), bool))
        (None, 'too large')
        """
        from scipy import ndimage

        share = float(mask.mean())
        if share < self.smallest:
            return "too small"
        if share > self.largest:
            return "too large"
        if mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any():
            return "touches the border"
        parts, _ = ndimage.label(mask)
        if np.bincount(parts.ravel())[1:].max() < self.whole * mask.sum():
            return "in fragments"
        return None


class Smooth:
    """Repaints a region by what lies around it, blurred: it erases and cannot draw. For tests, or without a model."""

    draws = False

    def __call__(self, image: Pixels, mask: Mask, prompt: str) -> Pixels:
        from scipy import ndimage

        if not mask.any() or mask.all():
            return image.copy()
        nearest = ndimage.distance_transform_edt(mask, return_distances=False, return_indices=True)
        filled = image[tuple(nearest)].astype(np.float64)
        blurred = np.stack([ndimage.gaussian_filter(filled[..., k], max(image.shape) / 20) for k in range(3)], axis=-1)
        return np.where(mask[..., None], blurred, image).round().astype(np.uint8)


class Diffusion:
    """Repaints by an inpainting model of diffusers.

    Args:
        folder: of the model, such as Stable Diffusion's for inpainting.
        seed: of its noise.
        steps: of its sampling.
    """

    draws = True

    def __init__(self, folder: str | Path, seed: int = 0, steps: int = 30):
        try:
            from diffusers import AutoPipelineForInpainting
        except ImportError:
            raise UserError("repainting by a model needs a package: pip install 'provenn[hf]'") from None
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: there is no such folder: give an inpainting model of diffusers")
        self.pipeline: Any = AutoPipelineForInpainting.from_pretrained(str(folder), local_files_only=True)
        self.seed, self.steps = seed, steps

    def __call__(self, image: Pixels, mask: Mask, prompt: str) -> Pixels:
        import torch

        height, width = (max(64, 8 * round(side / 8)) for side in mask.shape)
        drawn = self.pipeline(
            prompt, Image.fromarray(image), Image.fromarray(mask), height=height, width=width,
            num_inference_steps=self.steps, generator=torch.Generator().manual_seed(self.seed),
        ).images[0]  # fmt: skip
        return np.asarray(drawn.resize(mask.shape[::-1]), np.uint8)


@dataclass
class Triplet:
    """Before, after, reference and instruction; `mask` is what changes, and lies within the rim."""

    source: Pixels
    target: Pixels
    reference: View | None
    mask: Mask
    instruction: str
    described: str
    noun: str
    kind: str


@dataclass
class Builder:
    """Triplets of instances.

    Args:
        inpaint: what repaints.
        filters: which instances are used.
        captioners: what say an attribute of a region; their different words are joined.
        seed: of templates, views and other classes.
        dropped: how many were not used, and why; counted as it goes.
    """

    inpaint: Inpaint
    filters: Filters = Filters()  # noqa: RUF009  # a tuple
    captioners: Sequence[Captioner] = ()
    seed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def triplets(self, instances: Iterable[Instance], classes: Sequence[str] = ()) -> Iterator[Triplet]:
        """Addition, removal and, where the repainter draws and there is another class, replacement of each instance.

        Args:
            instances: of any segmentation data.
            classes: of the data, from which what an object replaces is drawn.
        """
        rng = np.random.default_rng(self.seed)
        for one in instances:
            why = self.filters.refuse(one.mask)
            if why is not None:
                self.dropped[why] += 1
                continue
            reference = self.reference(one, rng)
            rim = widened(one.mask)
            thing = self._thing(one)
            erased = self._repainted(one.image, rim, "background")
            yield self._of("add", erased, one.image, reference, rim, one, thing, rng)
            yield self._of("remove", one.image, erased, None, rim, one, thing, rng)
            others = [name for name in classes if name != one.noun]
            if self.inpaint.draws and others:
                other = others[int(rng.integers(len(others)))]
                before = self._repainted(one.image, rim, f"a {other}")
                yield self._of("replace", before, one.image, reference, rim, one, other, rng)

    def _repainted(self, image: Pixels, mask: Mask, prompt: str) -> Pixels:
        """Inside the mask what was repainted, outside the picture itself, bit for bit, whatever the repainter gives."""
        return np.where(mask[..., None], self.inpaint(image, mask, prompt), image)

    def reference(self, one: Instance, rng: np.random.Generator) -> View:
        """The object on another ground, then mirrored or not and cut out, so that place and size differ."""
        repainted = np.where(one.mask[..., None], one.image, self.inpaint(one.image, ~one.mask, f"a {one.noun}"))
        height, width = one.mask.shape
        rows, columns = np.flatnonzero(one.mask.any(1)), np.flatnonzero(one.mask.any(0))
        # A window around the object, not wholly the picture's.
        top, left = (int(rng.integers(0, first + 1)) for first in (rows[0], columns[0]))
        bottom = int(rng.integers(rows[-1] + 1, height + 1))
        right = int(rng.integers(columns[-1] + 1, width + 1))
        window = repainted[top:bottom, left:right]
        if rng.random() < 0.5:
            window = window[:, ::-1]
        return np.ascontiguousarray(window)

    def _thing(self, one: Instance) -> str:
        rows, columns = np.flatnonzero(one.mask.any(1)), np.flatnonzero(one.mask.any(0))
        region = one.image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        said = [captioner(region, one.noun).strip() for captioner in self.captioners]
        return " ".join([*dict.fromkeys(word for word in said if word), one.noun])

    def _of(
        self, kind: str, source: Pixels, target: Pixels, reference: View | None, mask: Mask, one: Instance, thing: str,
        rng: np.random.Generator,
    ) -> Triplet:  # fmt: skip
        template = TEMPLATES[kind][int(rng.integers(len(TEMPLATES[kind])))]
        words = {"where": where(one.mask), "thing": thing}
        own = self._thing(one)
        described = template.format(s=own if kind == "add" else f"a {own}", **words)
        return Triplet(
            source, target, reference, mask, template.format(s=PLACEHOLDER, **words), described, one.noun, kind
        )


def widened(mask: Mask, share: float = RIM) -> Mask:
    """A mask with a rim, as a share of the longer side."""
    from scipy import ndimage

    return ndimage.binary_dilation(mask, iterations=max(1, round(share * max(mask.shape))))


def where(mask: Mask) -> str:
    """In which of nine parts of the picture the middle of a mask lies, in words.

    >>> where(np.pad(np.ones((1, 1), bool), ((0, 8), (0, 8))))
    'at the top left'
    """
    rows, columns = np.nonzero(mask)
    down = ("top", "middle", "bottom")[min(2, int(3 * rows.mean() / mask.shape[0]))]
    across = ("left", "centre", "right")[min(2, int(3 * columns.mean() / mask.shape[1]))]
    if down == "middle":
        return "in the centre" if across == "centre" else f"on the {across}"
    return f"at the {down}" if across == "centre" else f"at the {down} {across}"


def instances_in(root: Path, background: Sequence[str] = ("background",)) -> tuple[list[str], Iterator[Instance]]:
    """The classes of segmentation data, and their instances.

    Args:
        root: a folder of pictures with masks, as `provenn.data.masks.read_folder` reads it: each connected part of a
            class is an instance. Without masks, a folder of COCO's annotations with outlines, or one such JSON.
        background: classes that are no objects.

    Raises:
        UserError: the folder cannot be read, or does not name its classes.
    """
    if root.is_file():
        return _outlined([root], root.parent.parent if root.parent.name == "annotations" else root.parent, background)
    try:
        folder = read_folder(root)
    except UserError:
        if not any(root.rglob("*.json")):
            raise
        return _outlined(list(find_coco(root).values()), root, background)
    if not folder.classes:
        raise UserError(f"{root} does not name its classes, which instructions need: see the guide on segmentation")
    classes = [name for name in folder.classes if name not in background]
    return classes, _of_masks(folder, classes)


def _of_masks(folder: MaskFolder, classes: Sequence[str]) -> Iterator[Instance]:
    from scipy import ndimage

    for picture, file in (pair for pairs in folder.splits.values() for pair in pairs):
        image = read_pixels(picture).permute(1, 2, 0).numpy()
        labels = folder.read(file)
        for name in classes:
            parts, count = ndimage.label(labels == folder.classes.index(name))
            for number in range(1, count + 1):
                yield Instance(image, parts == number, name, picture.stem)


def _outlined(
    files: Sequence[Path], root: Path, background: Sequence[str]
) -> tuple[list[str], Iterator[Instance]]:  # fmt: skip
    sets = [read_outlines(file, root) for file in files]
    classes = [name for name in dict.fromkeys(name for names, _ in sets for name in names) if name not in background]

    def walk() -> Iterator[Instance]:
        for picture, objects in (pair for _, pairs in sets for pair in pairs):
            image = read_pixels(picture).permute(1, 2, 0).numpy() if objects else None
            for mask, noun in objects:
                if noun in classes:
                    yield Instance(present(image, "a picture"), mask, noun, picture.stem)

    return classes, walk()


def write_triplets(triplets: Iterable[Triplet], folder: Path) -> int:
    """Write triplets as image editing reads them: pictures, masks and `edits.jsonl`; how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, one in enumerate(triplets):
        files = {"source": one.source, "target": one.target, "reference": one.reference, "mask": one.mask}
        entry = {"instruction": one.instruction, "described": one.described, "kind": one.kind}
        if one.reference is None:
            files.pop("reference")
        else:
            entry["noun"] = one.noun
        for key, pixels in files.items():
            name = f"{number:06}-{key}.png"
            with atomic_write(folder / name) as temporary:
                Image.fromarray(present(pixels, key).astype(np.uint8) * (255 if key == "mask" else 1)).save(temporary)
            entry[key] = name
        lines.append(json.dumps(entry))
    if lines:
        write_atomically(folder / LIST, "\n".join(lines) + "\n")
    return len(lines)


def check_triplets(folder: Path) -> list[str]:
    """What is wrong with a folder of triplets, a line each: pixels outside of a mask that differ, or none inside.

    Args:
        folder: of `write_triplets`, or any list with masks.

    Raises:
        UserError: the list cannot be read.
    """
    wrong = []
    for entries in read_edits(folder).values():
        for entry in entries:
            if entry.mask is None:
                wrong.append(f"{entry.where}: no mask")
                continue
            source, target = (read_pixels(file).numpy() for file in (entry.source, entry.target))
            mask = read_pixels(entry.mask, channels=1)[0].numpy() > 127
            differs = (source != target).any(0)
            if (differs & ~mask).any():
                wrong.append(f"{entry.where}: {int((differs & ~mask).sum())} pixels outside of the mask differ")
            if not (differs & mask).any():
                wrong.append(f"{entry.where}: nothing inside of the mask differs")
    return wrong


def main(arguments: Sequence[str]) -> int:
    """The command: a folder of pictures with masks, one for the triplets, and an inpainting model if there is one."""
    if len(arguments) not in (2, 3):
        print("expected PICTURES_AND_MASKS TRIPLETS [INPAINTING_MODEL]", file=sys.stderr)
        return 2
    try:
        classes, instances = instances_in(Path(arguments[0]))
        builder = Builder(Diffusion(arguments[2]) if len(arguments) == 3 else Smooth())
        made = builder.triplets(progress.track(instances, "repainting"), classes)
        count, wrong = write_triplets(made, Path(arguments[1])), []
        if count:
            wrong = check_triplets(Path(arguments[1]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    dropped = ", ".join(f"{number} {why}" for why, number in builder.dropped.items()) or "none"
    print(f"{count} triplets; left out: {dropped}")
    for line in wrong:
        print(line)
    return int(bool(wrong) or not count)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
