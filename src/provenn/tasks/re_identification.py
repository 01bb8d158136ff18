"""Re-identification: which pictures of a gallery show whom a query shows, taken by another camera.

A system gives `Identified` (`provenn.nn.embedding`): features, embeddings and logits of each picture. One that brings a
`training_loss` of its own may give embeddings alone. Pictures are compared by the cosine of their embeddings.

An epoch is every identity once, with K of its pictures. The recipe's `batch_size` is P, the identities of a batch,
which has P×K pictures (Hermans et al., 2017).
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import check_no_input
from provenn.data.camera_sequences import read_sequence
from provenn.data.identities import PARTS, Identities, Seen, asked_for, read_identities
from provenn.data.images import images_in, read_pixels, resize_pixels, size_of
from provenn.data.regions import COUNTS, SIGHTING, SPLITS, region_sightings
from provenn.data.regions import Seen as Sighted
from provenn.nn.embedding import MARGIN, Identified, identity_loss
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
)
from provenn.tasks.demos import Trial, as_shown
from provenn.tasks.descriptors import mean_colour, pixel_descriptor
from provenn.tasks.following import MOMENTUM, THRESHOLD, draw_following, follow_frames, in_words, write_following
from provenn.tasks.found import SHEET, draw_sheet, in_lines, search_targets, write_ranking
from provenn.tasks.image_classification import IMAGENET_MEAN, IMAGENET_STD, LARGEST_CHECKED, MEMORY
from provenn.tasks.meta import Crops
from provenn.tasks.portable import SMALLEST, Standardising, draw_images, standardise
from provenn.tasks.ranking import JUNK, Ranking, Sightings, judge_embeddings, nearest
from provenn.tasks.stores import Store, check_ending, checksum_of, read_store, same_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Measured on the embedded test pictures of seed 0, without anything learned; a test measures them again.
FLOORS = {"mean colour": 0.043, "pixel descriptor": 0.383}
HEIGHT = 256  # pixels at which pictures of the user's own are seen; persons are half as wide
TALL = 1.4  # from this median of height to width on, pictures show something upright
COLUMNS = ("precision", "first", "last", "right")  # of `Ranking`, for each query
ERASED = (0.02, 0.4)  # shares of a picture that random erasing covers
ASPECT = (0.3, 1 / 0.3)  # height to width of what it covers
AUGMENTATIONS = {"full": (True, True), "move": (False, True), "none": (False, False)}  # mirrored? moved?
PADDED = 10 / 256  # of the height: how far a crop of training is moved
BATCH = 64  # pictures at a time in a prediction


class Pictures(Dataset):
    """Pictures of identities as a network sees them, each with its identity, its camera and whether it is asked for.

    Args:
        images: files, or pictures in memory.
        identities, cameras, queries: one each.
        meta: see `Crops`.
    """

    def __init__(
        self,
        images: Sequence[Path] | UInt8[Tensor, "pictures 3 height width"],
        identities: Int64[Tensor, " pictures"],
        cameras: Int64[Tensor, " pictures"],
        queries: Bool[Tensor, " pictures"],
        meta: dict[str, Any],
    ):
        self.images, self.identities, self.cameras, self.queries = images, identities, cameras, queries
        self.meta = meta
        self.kept: dict[int, Tensor] = {}
        self.room = MEMORY

    def __len__(self) -> int:
        return len(self.images)

    def some(self, chosen: Bool[Tensor, " pictures"]) -> "Pictures":
        """The chosen ones."""
        images = self.images
        kept = images[chosen] if isinstance(images, Tensor) else [images[i] for i in chosen.nonzero()[:, 0].tolist()]
        return Pictures(kept, self.identities[chosen], self.cameras[chosen], self.queries[chosen], self.meta)

    def pixels(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """A picture at the size that is seen."""
        if index in self.kept:
            return self.kept[index]
        source = self.images[index]
        image = source if isinstance(source, Tensor) else read_pixels(source)
        seen = _seen(image, self.meta)
        if not isinstance(source, Tensor) and seen.nbytes <= self.room:
            self.kept[index] = seen
            self.room -= seen.nbytes
        return seen

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 height width"], int, int, bool]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} pictures, asked for number {index}")
        image = standardise(self.pixels(index).float() / 255, self.meta)
        return image, int(self.identities[index]), int(self.cameras[index]), bool(self.queries[index])


class Groups(Dataset):
    """K pictures of one identity: a batch of P such groups has P×K pictures of P identities.

    Of an identity with fewer pictures all are drawn before one is drawn again.

    Args:
        pictures: to train on; what shows nobody is left out.
        per_identity: K.
        augmentation: see `AUGMENTATIONS`.
        erasing: the probability with which a rectangle of a picture is put to the mean.
    """

    def __init__(
        self, pictures: Pictures, per_identity: int = 4, augmentation: str = "full", erasing: float | int = 0.5
    ):
        self.pictures, self.per_identity, self.erasing = pictures, per_identity, erasing
        self.mirrors, self.moves = AUGMENTATIONS[augmentation]
        people = pictures.identities[pictures.identities != JUNK].unique()
        self.rows = [(pictures.identities == person).nonzero()[:, 0] for person in people.tolist()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "k 3 height width"], Int64[Tensor, " k"]]:
        rows = self.rows[index]
        times = math.ceil(self.per_identity / len(rows))
        order = torch.cat([torch.randperm(len(rows)) for _ in range(times)])[: self.per_identity]
        images = [self._changed(self.pictures.pixels(row)) for row in rows[order].tolist()]
        return torch.stack(images), torch.full((self.per_identity,), index)

    def _changed(self, pixels: UInt8[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
        if self.mirrors and torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
        if self.moves:
            pixels = move(pixels)
        image = standardise(pixels.float() / 255, self.pictures.meta)
        return erase(image) if torch.rand(()) < self.erasing else image


def join(groups: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch of groups as pictures in a row, and whom each shows."""
    images, labels = zip(*groups)
    return torch.cat(images), torch.cat(labels)


def move(image: UInt8[Tensor, "3 height width"]) -> UInt8[Tensor, "3 height width"]:
    """Padded with black, by 10 pixels of 256, and cropped at random (Luo et al., 2019)."""
    height, width = image.shape[1:]
    pad = max(1, round(PADDED * height))
    top, left = torch.randint(2 * pad + 1, (2,)).tolist()
    return F.pad(image, (pad, pad, pad, pad))[:, top : top + height, left : left + width]


def erase(image: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
    """Random erasing (Zhong et al., 2020, algorithm 1): a rectangle of a standardised picture is put to the mean.

    What does not fit is drawn again, up to a hundred times.
    """
    height, width = image.shape[1:]
    for _ in range(100):
        draw = torch.rand(4).tolist()
        area = height * width * (ERASED[0] + (ERASED[1] - ERASED[0]) * draw[0])
        aspect = math.exp(math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * draw[1])
        tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if tall < height and wide < width:
            top, left = int(draw[2] * (height - tall + 1)), int(draw[3] * (width - wide + 1))
            image = image.clone()
            image[:, top : top + tall, left : left + wide] = 0.0
            break
    return image


class ReIdentification(Task):
    """Label-smoothed cross-entropy of identities and the batch-hard triplet loss; mAP, mINP and CMC of a search."""

    name = "re-identification"
    metric = "mAP"
    higher_is_better = True
    smooths = True
    meta_schema = Crops
    embedded = {  # noqa: RUF012
        "cameras": "135 identities, regions of photographs as four simulated cameras see them, 64×32 pixels; no "
        "photograph is in two splits (scikit-image, scikit-learn)",
    }
    reads = "a folder of Market-1501, DukeMTMC-reID, MSMT17 or VeRi-776, or of identity/camera/*.jpg"
    into_folders = True

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        per_identity: int = 4,
        augmentation: str | None = None,
        erasing: float | int = 0.5,
        val_share: float = CUT,
    ) -> TaskData:
        """The embedded identities, or a folder in a layout of `provenn.data.identities.read_identities`.

        Args:
            source: "cameras", or a folder. Where it has no part for validation, identities are held out of training.
            seed: of the embedded pictures, or of the identities that are held out.
            height, width: of the picture that a network sees, in pixels. Default: 256×128 where the pictures are
                upright, else 256×256; of the embedded ones 64×32.
            per_identity: K, how many pictures of an identity a batch has.
            augmentation: "full" mirrors pictures of training and moves them, "move" does not mirror, "none" does
                neither. Default: "full", of the embedded pictures "move": nothing in them is seen mirrored.
            erasing: the probability of random erasing in training.
            val_share: of the identities of training, what is held out to validate with.
        """
        named = self._named(source)
        size = _check_size(height, width)
        if per_identity < 2:
            raise UserError(f"per_identity must be at least 2, so that a batch has pairs, got {per_identity}")
        if not 0 <= erasing <= 1:
            raise UserError(f"erasing must be a probability from 0 to 1, got {erasing}")
        if augmentation not in (None, *AUGMENTATIONS):
            raise UserError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {augmentation!r}")
        if isinstance(named, str):
            return _drawn(seed, size, per_identity, augmentation or "move", erasing)
        check_share(val_share)
        return _folder(named, seed, size, per_identity, augmentation or "full", erasing, val_share)

    def loss(self, model: nn.Module, batch: Any, smoothing: float = 0.0) -> Tensor:
        """Of pictures and identities, with several of each; `model.margin` is that of the triplet loss."""
        images, labels = batch
        outputs = model(images)
        if not isinstance(outputs, Identified):
            raise UserError(
                f"{type(model).__name__} gives no features, embeddings and logits (provenn.nn.embedding.Identified): "
                "give it a head that does, or a training_loss(batch)"
            )
        return identity_loss(outputs, labels, smoothing, float(getattr(model, "margin", MARGIN)))

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of each query with anyone to find its average precision, and `first`, `last` and `right` of `Ranking`."""
        rows = []
        for images, *known in DataLoader(dataset, batch_size=batch_size):
            rows.append([embeddings_of(model(images.to(device_of(model)))).cpu(), *known])
        embeddings, identities, cameras, queries = (torch.cat(column) for column in zip(*rows))
        return _scored(_ranked(embeddings, identities, cameras, queries.bool()))

    def summary(self, scores: Scores) -> dict[str, float]:
        """mAP, mINP and CMC at 1, 5 and 10, over the queries."""
        columns = [torch.from_numpy(np.asarray(scores[name])) for name in COLUMNS]
        return dict(Ranking(torch.ones(len(columns[0]), dtype=torch.bool), *columns).summary())

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
    ) -> HeldOut:
        """As in `Task`. Of `identity/camera/*.jpg` without splits, every identity is asked for where all are wanted."""
        named = self._named(source)
        if isinstance(named, str):
            test = region_sightings("test", seed=seed)
            return HeldOut(Pictures(*test, meta), f"the test split of {named}")
        found = read_identities(named, whole=whole)
        return HeldOut(_pictures(_test_of(found), meta), f"queries and gallery of {named}")

    def dummy_baseline(self, data: TaskData) -> float:
        """mAP of what needs no learning: the better of the mean colour and of `pixel_descriptor`."""
        return max(floors(data.test).values())

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"size": [HEIGHT, HEIGHT // 2], "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}

    def example(self, file: Path, meta: dict[str, Any]) -> Float[Tensor, "1 3 height width"]:
        return standardise(_seen(read_pixels(file), meta).float() / 255, meta)[None]

    def embed(self, model: nn.Module, meta: dict[str, Any], folder: Path, *, batch_size: int = BATCH) -> Store:
        """Embeddings of all pictures of a folder.

        Args:
            model, meta: as in `predict`.
            folder: searched whole.
            batch_size: pictures at a time.
        """
        names = _names_in(folder)
        embeddings = self._embeddings(model, meta, [folder / name for name in names], batch_size)
        return Store(checksum_of(model, meta), folder, names, embeddings)

    def _embeddings(
        self, model: nn.Module, meta: dict[str, Any], files: Sequence[Path], batch_size: int = BATCH
    ) -> Float[Tensor, "files dim"]:
        """Of length 1 each."""
        parts = []
        for start in progress.track(range(0, len(files), batch_size), "embedding"):
            images = torch.cat([self.example(file, meta) for file in files[start : start + batch_size]])
            with torch.no_grad():
                parts.append(F.normalize(embeddings_of(model(images.to(device_of(model))))).cpu())
        return torch.cat(parts)

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        gallery: Path | None = None,
        store: Path | None = None,
        count: int | None = None,
        sequence: Path | None = None,
        threshold: float | int | None = None,
        momentum: float | int | None = None,
    ) -> str:
        """The pictures of a gallery that are most like each query; or where in a sequence the one in the inputs is.

        Args:
            model, meta, inputs: as in `Task.predict`; a folder among the inputs stands for the pictures in it.
            output: a picture (.png, .jpg) of the queries, each with what was found beside it; a table (.csv); or a
                folder, which gets both. Of a sequence likewise: the best crop of frames, and the ranking of all crops.
            gallery: a folder of the pictures to search among. A query that lies in it is not found itself.
            store: a file (.npz, .parquet) of their embeddings: read where it is there, else written. Without `gallery`
                it is searched as it is.
            count: how many are named for each query. Default: 10.
            sequence: frames of a camera in a layout of `provenn.data.camera_sequences.read_sequence`. All inputs then
                show one user, who is looked for in each frame.
            threshold: the least cosine at which a crop of a sequence counts as the user. Default: 0.5.
            momentum: what stays of the memory of the user where a crop is recognised. Default: 0.9.
        """
        files = [file for given in inputs for file in (images_in(given) if given.is_dir() else [given])]
        if not files:
            raise UserError("a search needs a query: give a picture, or a folder of some")
        if sequence is not None:
            among = {"gallery": gallery, "store": store, "count": count}
            if wrong := next((name for name, value in among.items() if value is not None), None):
                raise UserError(
                    f"{wrong} is for a search in a gallery, and a sequence was given: leave one of them out"
                )
            return self._followed(model, meta, files, output, sequence, threshold, momentum)
        if wrong := next(
            (n for n, value in (("threshold", threshold), ("momentum", momentum)) if value is not None), ""
        ):
            raise UserError(f"{wrong} is for following a user in a sequence: give --sequence FOLDER, or leave it out")
        count = 10 if count is None else count
        if count < 1:
            raise UserError(f"count must be at least 1, got {count}")
        sheet, table = search_targets(output, [*inputs, *files])
        known = self._gallery(model, meta, gallery, store)
        for target in (sheet, table):
            if target is not None and target.exists():
                check_no_input(target, (known.folder / name for name in known.files))
        queries = self._embeddings(model, meta, files)
        wanted = min(count + 1, len(known.files))  # one more, for a query that lies in the gallery
        similarity, places = nearest(queries, known.embeddings, wanted)
        rows: list[list[tuple[Path, float]]] = []
        for file, values, found in zip(files, similarity.tolist(), places.tolist()):
            pairs = [(known.folder / known.files[place], value) for place, value in zip(found, values)]
            rows.append([pair for pair in pairs if not _same(pair[0], file)][:count])
        if not any(rows):
            raise UserError("the gallery holds the query alone: there is nothing else to find")
        said = []
        if table is not None:
            write_ranking(table, files, rows, "file")
            said.append(f"wrote {table}")
        if sheet is not None:
            gone = draw_sheet(sheet, files[:SHEET], rows[:SHEET])
            more = f", of the first {SHEET} queries" if len(files) > SHEET else ""
            said.append(f"wrote {sheet}{more}" + (f"; of {gone} of its pictures the files are gone" if gone else ""))
        return "\n".join([*in_lines(files, rows), *said])

    def _followed(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        files: Sequence[Path],
        output: Path | None,
        sequence: Path,
        threshold: float | int | None,
        momentum: float | int | None,
    ) -> str:
        """A user in each frame of a sequence."""
        threshold = THRESHOLD if threshold is None else threshold
        momentum = MOMENTUM if momentum is None else momentum
        for name, value, least in (("threshold", threshold, -1), ("momentum", momentum, 0)):
            if not least <= value <= 1:
                raise UserError(f"{name} must be from {least} to 1, got {value}")
        frames = read_sequence(sequence)
        crops = [crop.file for frame in frames for crop in frame.crops]
        sheet, table = search_targets(output, [*files, *crops], "following")

        def embed(images: list[UInt8[Tensor, "3 height width"]]) -> Float[Tensor, "crops dim"]:
            seen = torch.stack([standardise(_seen(image, meta).float() / 255, meta) for image in images])
            with torch.no_grad():
                return F.normalize(embeddings_of(model(seen.to(device_of(model))))).cpu()

        user = self._embeddings(model, meta, files)
        seen = follow_frames(embed, user, frames, threshold=threshold, momentum=momentum)
        said = [in_words(frames, seen)]
        if table is not None:
            write_following(table, frames, seen)
            said.append(f"wrote {table}")
        if sheet is not None:
            drawn = draw_following(sheet, files[0], frames, seen)
            said.append(f"wrote {sheet}" + (f", with {drawn} of {len(frames)} frames" if drawn < len(frames) else ""))
        return "\n".join(said)

    def _gallery(self, model: nn.Module, meta: dict[str, Any], gallery: Path | None, store: Path | None) -> Store:
        """Embeddings of the gallery: from the store where it is there, else computed, and kept in it."""
        if store is not None:
            check_ending(store)
        if store is not None and store.exists():
            known = read_store(store)
            known.check(checksum_of(model, meta), str(store))
            if gallery is not None:
                same_files(known, _names_in(gallery), str(store))
            return known
        if gallery is None:
            lacks = "a search needs a gallery" if store is None else f"{store} is not there yet"
            raise UserError(f"{lacks}: give the folder of its pictures with --gallery")
        known = self.embed(model, meta, gallery)
        if store is not None:
            known.save(store)
        return known

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From `image` in 0…1 to `embedding` of length 1. A search brings every picture to `meta["size"]` before."""
        height, width = meta["size"]
        # Traced twice, and neither at the size of training nor at sides alike: no rule of one size gets through.
        tall, wide = height + 5, width + 11
        return Portable(
            Embedder(model, meta["mean"], meta["std"]).eval(),
            {"image": draw_images(2, 3, height, width)},
            ["embedding"],
            {"image": {0: "batch", 2: "height", 3: "width"}},
            {"height": min(SMALLEST, height), "width": min(SMALLEST, width)},
            [{"height": tall, "width": wide}, {"height": 2 * wide + 3, "width": tall + width // 2 + 2}],
            lambda image: F.normalize(embeddings_of(model(standardise(image, meta)))),
        )

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """Test queries, and what is found first for each."""
        return evaluated(model, data.test, {})


def embeddings_of(outputs: Identified | Tensor) -> Float[Tensor, "batch dim"]:
    """What is compared, of what a system gives."""
    return (outputs.embeddings if isinstance(outputs, Identified) else outputs).float()


class Embedder(Standardising):
    """A network with its standardisation, as it is exported: the cosine of two outputs is their product."""

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return F.normalize(embeddings_of(self.model(self.standard(image))))


TASK = ReIdentification()


def floors(dataset: Dataset) -> dict[str, float]:
    """The mAP of what needs no learning, on queries and gallery in `Pictures`.

    Args:
        dataset: the test split.
    """
    pictures: Pictures = dataset  # type: ignore[assignment]  # a data set of this task
    colours, descriptors = [], []
    for start in progress.track(range(0, len(pictures), BATCH), "describing pixels"):
        rows = range(start, min(start + BATCH, len(pictures)))
        images = torch.stack([pictures.pixels(row) for row in rows])
        colours.append(mean_colour(images))
        descriptors.append(pixel_descriptor(images))
    known = pictures.identities, pictures.cameras, pictures.queries
    parts = {"mean colour": colours, "pixel descriptor": descriptors}
    return {name: _ranked(torch.cat(rows), *known).summary()["mAP"] for name, rows in parts.items()}


def _ranked(
    embeddings: Float[Tensor, "pictures dim"],
    identities: Int64[Tensor, " pictures"],
    cameras: Int64[Tensor, " pictures"],
    queries: Bool[Tensor, " pictures"],
) -> Ranking:
    """Queries among the rest; with anyone to find at all.

    Raises:
        UserError: nobody has.
    """
    shown = [Sightings(identities[part], cameras[part]) for part in (queries, ~queries)]
    ranking = judge_embeddings(embeddings[queries], embeddings[~queries], (shown[0], shown[1]))
    ranking.summary()
    return ranking


def _scored(ranking: Ranking) -> Scores:
    return {name: getattr(ranking, name).numpy() for name in COLUMNS}


def _check_size(height: int | None, width: int | None) -> tuple[int, int] | None:
    if height is None and width is None:
        return None
    if height is None or width is None:
        raise UserError("give height and width together, or neither")
    for name, side in (("height", height), ("width", width)):
        if not 8 <= side <= 2**12:
            raise UserError(f"{name} must be from 8 to {2**12} pixels, got {side}")
    return height, width


def _seen(image: UInt8[Tensor, "3 h w"], meta: dict[str, Any]) -> UInt8[Tensor, "3 height width"]:
    """The picture at the size that is seen, whatever its shape, as the field has it."""
    height, width = meta["size"]
    return image if image.shape[1:] == (height, width) else resize_pixels(image, height, width)


@lru_cache(maxsize=2)  # a study asks for them once a trial
def _sightings(seed: int) -> dict[str, Sighted]:
    return {split: region_sightings(split, seed=seed) for split in SPLITS}


def _drawn(
    seed: int, size: tuple[int, int] | None, per_identity: int, augmentation: str, erasing: float | int
) -> TaskData:
    parts = _sightings(seed)
    pixels = parts["train"][0].float() / 255
    meta = {
        "size": list(size or SIGHTING),
        "mean": pixels.mean((0, 2, 3)).tolist(),
        "std": pixels.std((0, 2, 3)).tolist(),
    }
    pictures = {split: Pictures(*part, meta) for split, part in parts.items()}
    return TaskData(
        "cameras",
        Groups(pictures["train"], per_identity, augmentation, erasing),
        pictures["val"],
        pictures["test"],
        fingerprint=fingerprint(*(tensor for part in parts.values() for tensor in part)),
        options={"num_classes": COUNTS["train"]},
        meta=meta,
        collate=join,
        about=f"{COUNTS['train']} identities to train on, {COUNTS['val']} to validate, {COUNTS['test']} to search for: "
        "regions of photographs, 64×32 pixels, in the colours, blur and resolution of four simulated cameras, eight "
        "views by each, often partly hidden. No photograph is in two splits. The pixels are real, the cameras are not.",
    )


def _test_of(found: Identities) -> list[tuple[Seen, bool]]:
    return [(seen, part == "query") for part in ("query", "gallery") for seen in found.parts[part]]


def _pictures(seen: Iterable[tuple[Seen, bool]], meta: dict[str, Any]) -> Pictures:
    rows = list(seen)
    numbers = torch.tensor([[s.identity, s.camera] for s, _ in rows])
    queries = torch.tensor([query for _, query in rows])
    return Pictures([s.file for s, _ in rows], numbers[:, 0], numbers[:, 1], queries, meta)


def _folder(
    root: Path,
    seed: int,
    size: tuple[int, int] | None,
    per_identity: int,
    augmentation: str,
    erasing: float,
    share: float,
) -> TaskData:
    found = read_identities(root)
    train, val = _divided(root, found, seed, share)
    everything = sorted({seen.file for part in found.parts.values() for seen in part})
    meta = {
        "size": list(size or _size_of(everything)),
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
    parts = {
        "train": _pictures(((seen, False) for seen in train), meta),
        "val": _pictures(val, meta),
        "test": _pictures(_test_of(found), meta),
    }
    if len(everything) <= LARGEST_CHECKED:
        with progress.bar("reading images", sum(map(len, parts.values()))) as advance:
            for pictures in parts.values():
                for index in range(len(pictures)):
                    pictures.pixels(index)  # names a damaged file now, not in the middle of training
                    advance()
        checksum = fingerprint(*(part for f in everything for part in (str(f.relative_to(root)), f.read_bytes())))
    else:
        checksum = fingerprint(*(f"{f.relative_to(root)} {f.stat().st_size}" for f in everything))
    groups = Groups(parts["train"], per_identity, augmentation, erasing)
    queries = int(parts["test"].queries.sum())
    return TaskData(
        str(root),
        groups,
        parts["val"],
        parts["test"],
        fingerprint=fingerprint(checksum, str(seed)),
        options={"num_classes": len(groups)},
        meta=meta,
        collate=join,
        about=f"{len(groups)} identities in {len(train):,} pictures to train on; {queries:,} queries among "
        f"{len(parts['test']) - queries:,} pictures, by {len(found.cameras)} cameras.",
    )


def _divided(root: Path, found: Identities, seed: int, share: float) -> tuple[list[Seen], list[tuple[Seen, bool]]]:
    """What is trained on, and identities to validate with: those of the layout, or some that are held out."""
    train = [seen for seen in found.parts["train"] if seen.identity != JUNK]
    held = [seen for seen in found.parts.get("val", []) if seen.identity != JUNK]
    if not held:
        cameras: dict[int, set[int]] = {}
        for seen in train:
            cameras.setdefault(seen.identity, set()).add(seen.camera)
        several = sorted(person for person, seen_by in cameras.items() if len(seen_by) > 1)
        if not several or len(cameras) < 3:
            raise UserError(
                f"{root}: {len(cameras)} identities to train on, {len(several)} of them by two cameras: expected at "
                "least 3, and one by two cameras, which is held out to validate with"
            )
        order = np.random.default_rng(seed).permutation(several)
        chosen = set(order[: min(max(1, round(share * len(cameras))), len(several), len(cameras) - 2)].tolist())
        held = [seen for seen in train if seen.identity in chosen]
    people = {seen.identity for seen in held}
    train = [seen for seen in train if seen.identity not in people]
    if len({seen.identity for seen in train}) < 2:
        raise UserError(f"{root}: one identity is left to train on beside those that are validated with; add others")
    asked = asked_for(held)
    return train, [(seen, part == "query") for part in PARTS[1:] for seen in asked[part]]


def _size_of(files: Sequence[Path]) -> tuple[int, int]:
    """256×128, or 256×256 where pictures are not upright; from a sample, without decoding."""
    sizes = [size_of(file) for file in files[:: max(1, len(files) // 200)]]
    upright = float(np.median([height / width for height, width in sizes])) >= TALL
    return HEIGHT, HEIGHT // 2 if upright else HEIGHT


def _names_in(folder: Path) -> list[str]:
    """The pictures of a folder, below it."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the pictures to search among")
    return [str(file.relative_to(folder)) for file in images_in(folder)]


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def evaluated(model: nn.Module, dataset: Dataset, scores: Scores) -> "Figure":
    """Queries in even steps through the test, and what is found first: framed green where it is right, red where not.

    Args:
        model, dataset: what was evaluated.
        scores: of the queries; not needed.
    """
    from matplotlib.figure import Figure

    pictures: Pictures = dataset  # type: ignore[assignment]  # a data set of this task
    with torch.no_grad():
        loader = DataLoader(dataset, batch_size=BATCH)
        parts = [embeddings_of(model(images.to(device_of(model)))).cpu() for images, *_ in loader]
    embeddings = torch.cat(parts)
    queries = pictures.queries.nonzero()[:, 0]
    chosen = queries[torch.linspace(0, len(queries) - 1, min(6, len(queries))).long()]
    gallery = (~pictures.queries).nonzero()[:, 0]
    _, places = nearest(embeddings[chosen], embeddings[gallery], min(40, len(gallery)))
    figure = Figure(figsize=(9, 1.9 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 9, squeeze=False)
    for row, (query, found) in enumerate(zip(chosen.tolist(), gallery[places])):
        same = pictures.identities[found] == pictures.identities[query]
        junk = (same & (pictures.cameras[found] == pictures.cameras[query])) | (pictures.identities[found] == JUNK)
        shown = [(query, "query", "black")]
        shown += [(int(f), "", "#2a8f3c" if right else "#b00020") for f, right in zip(found[~junk], same[~junk])][:8]
        for axis, (index, title, colour) in zip(axes[row], shown):
            axis.imshow(pictures.pixels(index).permute(1, 2, 0).numpy())
            axis.set_title(title, fontsize=8)
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=2.5)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: the embedded test pictures that are most like the one that was given."""
    gallery = Path("gallery")
    seen = region_sightings("test", views=1)
    from PIL import Image

    gallery.mkdir(exist_ok=True)
    for number, image in enumerate(seen.images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(gallery / f"{number}.png")
    trial.predict(Path("drawing.png"), gallery=gallery)
    return {"kind": "drawing", "size": as_shown(Path("drawing.png")).size, "classes": ["the most alike first"]}
