"""Wound segmentation: a photograph in, the mask of the wound and a report out. Not a medical device."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import strict_json, write_atomically
from provenn.core.inputs import parse_json, read_text
from provenn.data.images import Picture, images_in, read_image, read_pixels, write_image
from provenn.data.masks import read_folder, write_mask
from provenn.papers.pressure_ulcer import analysis
from provenn.papers.pressure_ulcer.augment import MODES
from provenn.papers.pressure_ulcer.losses import overlap_scores, wound_loss
from provenn.papers.pressure_ulcer.task import scenes
from provenn.papers.pressure_ulcer.task.likeness import Likeness
from provenn.papers.pressure_ulcer.task.photos import (
    POLICIES,
    Policy,
    WoundFiles,
    Wounds,
    default_meta,
    framed,
    standard,
    unframed,
)
from provenn.papers.pressure_ulcer.task.segmenting import Looks, Probabilities, segment, shrunk, wound_logits
from provenn.papers.pressure_ulcer.task.segmenting import overlay as overlaid
from provenn.papers.pressure_ulcer.task.sources import embedded, photographs, with_splits
from provenn.papers.pressure_ulcer.task.writing import as_bytes, in_a_line, last_report, places_of
from provenn.tasks import Task, TaskData, count_examples, device_of
from provenn.tasks.base import CUT, HeldOut, Portable, Scores, check_share
from provenn.tasks.demos import Trial, save_shown
from provenn.tasks.meta import Standardised
from provenn.tasks.portable import portable_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, FRAME = 64, 224  # of the composed pictures, and of the frame of photographs
FRAMES = ("full frame", "crop")
COLOURS = ((40, 40, 40), (205, 45, 60))


class WoundMeta(Standardised):
    """Of wound segmentation; `size` is the side of the network's frame."""

    size: int = Field(ge=16, le=4096)
    channels: int = Field(ge=1, le=4)
    letterbox: bool
    grey_world: bool = False
    likeness: Likeness | None = None

    def width(self) -> int:
        return self.channels


class Seen(Looks, total=False):
    """As `Looks`, and whether photographs are crops and no full frames."""

    crop: bool


class WoundSegmentation(Task):
    """Binary cross-entropy and soft Dice; the mean Dice of images at a threshold of a half."""

    name = "wound-segmentation"
    meta_schema = WoundMeta
    metric = "dice"
    higher_is_better = True
    embedded = {  # noqa: RUF012
        "ulcers": "24 composed pictures of pressure ulcers to train on: halo, slough, necrosis; no photographs",
        "wounds": "400 composed pictures of other skin wounds, smaller and redder, to pre-train on; no photographs",
    }
    reads = "a folder with images/ and masks/ of the same names"
    into_folders = True

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        size: int | None = None,
        images: int | None = None,
        augmentation: str = "watershed",
        mode: str = "flatten",
        share: float = 0.5,
        letterbox: bool = True,
        grey_world: bool = False,
        val_share: float = CUT,
        skip_broken: bool = False,
    ) -> TaskData:
        """The composed pictures of that name, or a folder of photographs and masks.

        Args:
            source: "ulcers", "wounds", or a folder; `train`, `val` and `test` in it are honoured, what is missing is
                cut from `train`, by photograph and before any augmentation. With `patients.csv` (a line a photograph:
                its name, a comma, the patient) no patient is in two of the parts that are cut.
            seed: of the pictures, or of the split.
            size: side of the composed pictures (64, at most 128), or of the network's frame (224; inferred).
            images: how many of the composed pictures to train on.
            augmentation: "none", "geometric", or "watershed", which has the turns and reflections too.
            mode, share: of the watershed: "flatten", "edges" or "jitter", and the share of the images it changes.
            letterbox: keep the aspect of a photograph, with black beside it.
            grey_world: balance white before.
            val_share: of the photographs of `train`, what is cut from them for each missing split.
            skip_broken: name the photographs that cannot be read and go on without them.
        """
        policy = _policy(augmentation, mode, share)
        named = self._named(source)
        if size is not None and size < 16:
            raise UserError(f"size must be at least 16 pixels, got {size}")
        if isinstance(named, str):
            if (size or SIDE) > scenes.LARGEST:
                raise UserError(f"composed pictures have at most {scenes.LARGEST} pixels a side, got size={size}")
            if images is not None and images < 1:
                raise UserError(f"images must be at least 1, got {images}")
            return embedded(named, seed, size or SIDE, images, policy)
        check_share(val_share)
        meta = default_meta(size or FRAME, letterbox=letterbox, grey_world=grey_world)
        return photographs(named, seed, meta, policy, val_share, skip_broken)

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """As `wound_loss`, with the weights that the model carries."""
        images, masks = batch
        dice, tversky = getattr(model, "dice", 1.0), getattr(model, "tversky", (0.5, 0.5))
        return wound_loss(wound_logits(model(images)), masks, dice=dice, tversky=tversky)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of each image the pixels in both masks, predicted, true, and in all; Dice, IoU and accuracy of these."""
        letterbox = bool(getattr(dataset, "meta", {}).get("letterbox", True))
        device, rows = device_of(model), []
        for images, masks in _alike(dataset, min(batch_size, 32)):
            logits = wound_logits(model(images.to(device)))[:, None]
            logits = unframed(logits, masks.shape[1], masks.shape[2], letterbox)[:, 0]
            told, true = logits > 0, masks.to(device) > 0
            sums = [(told & true).sum((1, 2)), told.sum((1, 2)), true.sum((1, 2))]
            rows.append([part.cpu().numpy().astype(np.int64) for part in sums])
            rows[-1].append(np.full(len(masks), masks[0].numel(), np.int64))
        both, told, true, pixels = (np.concatenate(column) for column in zip(*rows))
        counts = {"both": both, "told_pixels": told, "true_pixels": true, "pixels": pixels}
        return counts | dict(overlap_scores(both, told, true, pixels))

    def summary(self, scores: Scores) -> dict[str, float]:
        """Means over images of Dice, IoU and accuracy; the others are pooled over all pixels.

        `accuracy_all_skin` is that of a prediction without any wound.
        """
        both, told, true, pixels = (
            scores[name].sum(dtype=np.float64) for name in ("both", "told_pixels", "true_pixels", "pixels")
        )
        pooled = overlap_scores(*(np.array([value]) for value in (both, told, true, pixels)))
        means = {name: float(np.mean(scores[name])) for name in ("dice", "iou", "accuracy")}
        return means | {
            "dice_pooled": float(pooled["dice"][0]),
            "iou_pooled": float(pooled["iou"][0]),
            "accuracy_pooled": float(pooled["accuracy"][0]),
            "precision": float(both / max(told, 1.0)),
            "recall": float(both / max(true, 1.0)),
            "accuracy_all_skin": float(1 - true / pixels),
        }

    def dummy_baseline(self, data: TaskData) -> float:
        """Dice of the mean mask of training, cut where it does best on training."""
        size = int(data.meta["size"])
        mean, cut = mean_mask(data.train, size)
        values = []
        for index in range(count_examples(data.test)):
            mask = data.test.mask(index)  # type: ignore[attr-defined]  # a data set of this task
            told = shrunk(mean, mask.shape).numpy() > cut
            values.append(overlap_scores(*_counts(told, mask))["dice"])
        return float(np.mean(values))

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        val_share: float = CUT,
        skip_broken: bool = False,
        frame: str = "full frame",
    ) -> HeldOut:
        """As in `Task`. Masks count at the photograph's own size; `frame` says "crop" where the files are crops."""
        if frame not in FRAMES:
            raise UserError(f"frame must be one of {', '.join(FRAMES)}, got {frame!r}")
        named = self._named(source)
        if isinstance(named, str):
            data = embedded(named, seed, min(int(meta["size"]), scenes.LARGEST), None, POLICIES["none"])
            return HeldOut(data.test, f"the test split of {named}, full frames")
        check_share(val_share)
        splits = read_folder(named, skip_broken).splits
        splits = splits if whole else with_splits(named, splits, seed, val_share)
        split = next(name for name in ("test", "val", "train") if name in splits)
        which = "all" if split == "train" else f"the {split} split"
        kind = "full frames" if frame == "full frame" else "crops: full frames have more skin, and other figures"
        return HeldOut(WoundFiles(splits[split], meta), f"{which} of {named}, {kind}")

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        return default_meta(FRAME, int(options.get("in_channels", 3)))

    def example(self, file: Path, meta: dict[str, Any]) -> Float[Tensor, "1 channels size size"]:
        return standard(framed(read_pixels(file, meta["channels"]), meta), meta)[None]

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        scale: str | None = None,
        since: Path | None = None,
        overlay: bool = False,
        **looks: Unpack[Seen],
    ) -> str:
        """The mask and the report of each photograph.

        Args:
            model, meta, inputs, output: as in `Task.predict`. To a .png goes the mask, and beside it the report as
                .json; to a .json the report alone; to a folder both of each photograph.
            scale: as `analysis.read_scale` takes it.
            since: the report of the last visit; the new one says what changed.
            overlay: also write the photograph with the wound's outline, as `…_overlay.png`.
            looks: `turns` and `anyway` as in `Looks`; `crop` says that the photographs are crops.
        """
        files = [file for given in inputs for file in (images_in(given) if given.is_dir() else [given])]
        if since is not None and len(files) > 1:
            raise UserError(f"--since is the last report of one wound; got {len(files)} photographs")
        last = None if since is None else last_report(since)
        places = places_of(files, output, overlay)
        lines = []
        for index, file in enumerate(progress.track(files, "measuring")):
            colour = as_bytes(read_image(file))
            name = f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"
            frame = FRAMES[looks.get("crop", False)]
            ways: Looks = {"turns": looks.get("turns", False), "anyway": looks.get("anyway", False)}
            report, mask = segment(colour, model, scale, meta=meta, frame=frame, name=name, **ways)
            plain = report.as_json()
            plain["change"] = {} if last is None else analysis.change(plain, last)
            lines.append(f"{file}: {in_a_line(plain)}")
            for kind, place in places[index].items():
                if kind == "mask":
                    write_mask(place, mask.astype(np.uint8), COLOURS)
                elif kind == "report":
                    write_atomically(place, strict_json({"photograph": file.name, **plain}) + "\n")
                else:
                    write_image(place, Picture(overlaid(colour, mask)))
        wrote = [] if output is None else [f"wrote {output}"]
        return "\n".join([*lines, *wrote, analysis.NOTICE])

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From `image` in 0…1 to `probabilities` of skin and of wound (batch, 2, height, width)."""
        system = Probabilities(model, meta["mean"], meta["std"])
        strides = [getattr(model, "multiple", 1)]
        return portable_images(system, ["probabilities"], meta, strides, system)

    def calibration(
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, options: dict[str, Any] | None = None
    ) -> TaskData:
        named = {"size": min(int(meta["size"]), scenes.LARGEST)} if source in self.embedded else {"size": meta["size"]}
        return self.load(source, seed=seed, **{"augmentation": "none", **named, **(options or {})})

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """Test images, the true masks and the predicted ones."""
        from matplotlib.figure import Figure

        count = min(6, count_examples(data.test))
        figure = Figure(figsize=(1.9 * count, 6), layout="constrained")
        axes = figure.subplots(3, count, squeeze=False)
        for column in range(count):
            image, mask = data.test[column]
            with torch.no_grad():
                logits = wound_logits(model(image[None].to(device_of(model))))[:, None]
            told = unframed(logits, mask.shape[0], mask.shape[1], data.meta["letterbox"])[0, 0] > 0
            mean, std = (torch.tensor(data.meta[key])[:, None, None] for key in ("mean", "std"))
            axes[0, column].imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0).squeeze(2).numpy(), cmap="gray")
            axes[1, column].imshow(mask, cmap="gray", vmin=0, vmax=1)
            axes[2, column].imshow(told.cpu(), cmap="gray", vmin=0, vmax=1)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
        for row, label in enumerate(("image", "true", "predicted")):
            axes[row, 0].set_ylabel(label)
        return figure


TASK = WoundSegmentation()


def mean_mask(dataset: Any, size: int) -> tuple[Float[Tensor, "size size"], float]:
    """The mean of the masks of training at one size, and the share at which its cut has the best mean Dice on them."""
    count = len(dataset.images) if isinstance(dataset, Wounds) else len(dataset)
    masks = torch.stack([shrunk(torch.from_numpy(dataset.mask(i)).float(), (size, size)) for i in range(count)])
    mean, true = masks.mean(0), (masks > 0.5).numpy()

    def dice(cut: float) -> float:
        told = mean.numpy() > cut
        return float(np.mean([overlap_scores(*_counts(told, mask))["dice"] for mask in true]))

    return mean, max((step / 20 for step in range(1, 20)), key=dice)


def _counts(told: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, ...]:
    true = true > 0
    return tuple(np.array(value) for value in ((told & true).sum(), told.sum(), true.sum(), true.size))


def _alike(dataset: Dataset, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of neighbours whose masks have one size: a prediction does not depend on the others of its batch."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for index in range(count_examples(dataset)):
        image, mask = dataset[index]
        if waiting and (mask.shape != waiting[0][1].shape or len(waiting) == batch_size):
            yield torch.stack([x for x, _ in waiting]), torch.stack([y for _, y in waiting])
            waiting = []
        waiting.append((image, mask))
    if waiting:
        yield torch.stack([x for x, _ in waiting]), torch.stack([y for _, y in waiting])


def _policy(augmentation: str, mode: str, share: float) -> Policy:
    if augmentation not in POLICIES:
        raise UserError(f"augmentation must be one of {', '.join(POLICIES)}, got {augmentation!r}")
    if mode not in MODES:
        raise UserError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not 0 <= share <= 1:
        raise UserError(f"share must lie between 0 and 1, got {share}")
    policy = POLICIES[augmentation]
    return policy._replace(mode=mode, share=share) if policy.mode else policy


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: the outline of the wound on the photograph, and how much the wound covers."""
    trial.predict(Path("mask.png"), overlay=True)
    size = save_shown(trial.file)
    Path("mask_overlay.png").rename("overlay.png")
    share = float(parse_json(read_text(Path("mask.json")), "mask.json")["wound_share"])
    shares = [("wound", share, list(COLOURS[1])), ("not wound", 1 - share, list(COLOURS[0]))]
    return {"kind": "mask", "size": size, "shares": [each for each in shares if each[1]]}
