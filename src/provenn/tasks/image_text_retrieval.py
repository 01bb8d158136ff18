"""Image–text retrieval: which caption is of an image, and which image a caption is of.

A system has `encode_images(images, regions)` and `encode_texts(tokens, words)`, each with a tensor or a tuple of
tensors of as many rows. Two embeddings are compared by their cosine. A system that compares pairs otherwise has
`similarity(images, texts)`, which gives a table of scores of what both gave. The loss is the system's own:
`training_loss(batch)` of a `Pairs`. Ranks and ties are those of `provenn.tasks.matching`.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import check_no_input
from provenn.core.inputs import read_text
from provenn.core.narrowing import of_kind
from provenn.data.captions import Captioned, read_captions
from provenn.data.composed import CAPTIONS, SIDE, composed_scenes, vocabulary
from provenn.data.images import SUFFIXES, images_in, read_pixels, resize_pixels
from provenn.data.vocabulary import SPECIAL, Vocabulary, read_vocabulary, words_of
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
from provenn.tasks.demos import Trial, as_shown
from provenn.tasks.found import SHEET, Item, draw_sheet, in_lines, search_targets, write_ranking
from provenn.tasks.image_classification import IMAGENET_MEAN, IMAGENET_STD, LARGEST_CHECKED, MEMORY
from provenn.tasks.matching import chance, match, padding_of, recalls
from provenn.tasks.meta import Captions
from provenn.tasks.portable import Standardising, draw_images, standardise
from provenn.tasks.ranking import nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = 224  # side at which the user's own images are seen, in pixels
LONGEST = 40  # tokens of a caption that are read
DRAWN = 1000  # images of the test at most that a picture ranks: comparing all of a large one again may take hours
AT_LEAST = 4  # how often a word of the user's own captions must occur to be known
TILE = 128  # images, and texts, that are compared at a time
CELLS = 4  # of each side of an image, whose mean colours are the dummy baseline
RIDGE = 10.0
SHOWN = 60  # composed scenes in which a text alone is looked for
Encoded = Tensor | tuple[Tensor, ...]
UNNAMED = "<word-{}>"  # of a vocabulary whose words nobody named


class Pairs(NamedTuple):
    """A batch of images and a caption of each.

    Args:
        images: pictures as a network sees them, (batch, 3, height, width), or features (batch, regions, numbers).
        regions: which regions are real; of pictures one column of True.
        tokens: of the captions, filled up with `<pad>`.
        words: which tokens are none of the padding, `<start>` and `<end>` among them.
        numbers: of the images: two captions of one number show the same.
    """

    images: Shaped[Tensor, "batch ..."]
    regions: Bool[Tensor, "batch regions"]
    tokens: Int64[Tensor, "batch length"]
    words: Bool[Tensor, "batch length"]
    numbers: Int64[Tensor, " batch"]


class Example(NamedTuple):
    """A picture and a text, to look into a system with.

    Args:
        image: as a network sees it; none where a text alone was given.
        tokens: of the text.
        words: what each token is.
        scenes: composed test scenes, standardised by themselves, to look for the text in where it was given alone.
    """

    image: Float[Tensor, "1 3 height width"] | None
    tokens: Int64[Tensor, "1 length"]
    words: tuple[str, ...]
    scenes: Float[Tensor, "scenes 3 side side"] | None = None


class Gallery(Dataset):
    """Images, each with its captions: what is searched and judged.

    Args:
        images: files, pictures in memory, or features (images, regions, numbers), which may lie on the disk.
        tokens: of the captions of each image, `<start>` and `<end>` among them.
        meta: see `provenn.tasks.meta.Captions`.
        lengths: of features, how many regions of each image are real.
        folds: in how many parts of equal size it is judged, each by itself.
    """

    def __init__(
        self,
        images: Sequence[Path] | UInt8[Tensor, "images 3 height width"] | np.ndarray,
        tokens: list[list[list[int]]],
        meta: dict[str, Any],
        lengths: np.ndarray | None = None,
        folds: int = 1,
    ):
        self.images, self.tokens, self.meta, self.lengths, self.folds = images, tokens, meta, lengths, folds
        self.most = max(map(len, tokens), default=1)
        self.longest = max((len(text) for texts in tokens for text in texts), default=1)
        self.kept: dict[int, Tensor] = {}
        self.room = MEMORY

    def __len__(self) -> int:
        return len(self.tokens)

    def pixels(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """A picture at the size that is seen."""
        if index in self.kept:
            return self.kept[index]
        source = self.images[index]
        seen = _seen(source if isinstance(source, Tensor) else read_pixels(source), self.meta)
        if not isinstance(source, Tensor) and seen.nbytes <= self.room:
            self.kept[index] = seen
            self.room -= seen.nbytes
        return seen

    def image(self, index: int) -> tuple[Tensor, Bool[Tensor, " regions"]]:
        """What a network sees of an image, and which regions are real."""
        if isinstance(self.images, np.ndarray):
            features = torch.from_numpy(np.array(self.images[index], np.float32))
            length = len(features) if self.lengths is None else int(self.lengths[index])
            return features, padding_of([length], len(features))[0]
        return standardise(self.pixels(index).float() / 255, self.meta), torch.ones(1, dtype=torch.bool)

    def __getitem__(self, index: int) -> tuple[Tensor, Bool[Tensor, " regions"], Int64[Tensor, "captions length"]]:
        """An image, its real regions, and its captions, filled up to the longest and the most of all."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} images, asked for number {index}")
        tokens = torch.full((self.most, self.longest), int(self.meta["pad"]))
        for row, text in enumerate(self.tokens[index]):
            tokens[row, : len(text)] = torch.tensor(text)
        return *self.image(index), tokens


class CaptionPairs(Dataset):
    """Every caption with its image, to train on.

    Args:
        gallery: of the training split.
    """

    def __init__(self, gallery: Gallery):
        self.gallery = gallery
        self.rows = [(image, text) for image, texts in enumerate(gallery.tokens) for text in range(len(texts))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Int64[Tensor, " length"], int]:
        image, text = self.rows[index]
        return *self.gallery.image(image), torch.tensor(self.gallery.tokens[image][text]), image


def join_pairs(pad: int) -> Callable[[Sequence[Any]], Any]:
    """What joins examples of training to a batch."""

    def join(examples: Sequence[Any]) -> Any:
        if len(examples[0]) == 3:  # of a gallery, whose captions are filled up already
            return torch.utils.data.default_collate(list(examples))
        images, regions, texts, numbers = zip(*examples)
        tokens = nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=pad)
        words = padding_of([len(text) for text in texts], tokens.shape[1])
        return Pairs(torch.stack(images), torch.stack(regions), tokens, words, torch.tensor(numbers))

    return join


class ImageTextRetrieval(Task):
    """R@1, R@5 and R@10 of a search both ways, and their sum; the loss is the system's own."""

    name = "image-text-retrieval"
    metric = "rsum"
    higher_is_better = True
    takes_words = True
    into_folders = True
    meta_schema = Captions
    embedded = {  # noqa: RUF012
        "composed": "5,400 scenes of 64×64 pixels of coloured digits and shapes on photographs and textures, with five "
        "captions each; no glyph, photograph or pair of words is in two splits (scikit-image, scikit-learn)",
    }
    reads = (
        "a folder of Flickr30K or COCO captions, of features of regions (train_ims.npy, train_caps.txt), or of "
        "captions.csv with images"
    )

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        layout: str | None = None,
        size: int | None = None,
        captions: int = CAPTIONS,
        folds: int = 1,
        longest: int = LONGEST,
        at_least: int = AT_LEAST,
        val_share: float = CUT,
        examples: int | None = None,
    ) -> TaskData:
        """The embedded scenes, or a folder in a layout of `provenn.data.captions`.

        Args:
            source: "composed", or a folder.
            seed: of the scenes, or of the images that are cut off where a folder has no splits.
            layout: of a folder, see `provenn.data.captions.LAYOUTS`. Default: the one that its files have.
            size: side of the square at which pictures are seen, in pixels. Default: 224, of the scenes 64.
            captions: of each image that are used at most; the field takes 5.
            folds: parts of equal size in which the test is judged, each by itself: 5 is COCO-1K of 5,000 images.
            longest: tokens of a caption at most, `<start>` and `<end>` among them.
            at_least: how often a word must occur in the training to be known.
            val_share: of the images of training, what is cut off for each split that a folder lacks.
            examples: of the scenes, how many are trained on. Default: 4,000.
        """
        named = self._named(source)
        for name, value, least in (
            ("captions", captions, 1),
            ("folds", folds, 1),
            ("longest", longest, 3),
            ("at_least", at_least, 1),
            ("size", SIZE if size is None else size, 8),
            ("examples", 1 if examples is None else examples, 1),
        ):
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if isinstance(named, str):
            if size not in (None, SIDE):
                raise UserError(f"composed scenes have {SIDE}×{SIDE} pixels: leave size out, got {size}")
            return _composed(seed, captions, folds, examples)
        check_share(val_share)
        if examples is not None:
            raise UserError("examples is of the composed scenes: leave it out for a folder")
        parts = _with_splits(named, read_captions(named, layout), val_share, seed)
        return _folder(named, parts, size or SIZE, captions, folds, longest, at_least)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The system's own.

        Raises:
            UserError: it has none.
        """
        own = getattr(model, "training_loss", None)
        if own is None:
            raise UserError(
                f"{type(model).__name__} has no training_loss(batch): this task leaves the loss to the system"
            )
        return own(batch)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of each image `text_rank` and `image_rank` of `provenn.tasks.matching.Match`, within its fold."""
        gallery: Gallery = dataset  # type: ignore[assignment]  # a data set of this task
        per_fold = _fold_size(len(gallery), gallery.folds)
        found = []
        for start in range(0, len(gallery), per_fold):
            table, owners = similarities(model, gallery, range(start, start + per_fold), batch_size)
            found.append(match(table, owners))
        # Folds may differ in how many captions their images have.
        width = max(part.image_rank.shape[1] for part in found)
        ranks = [F.pad(part.image_rank, (0, width - part.image_rank.shape[1])) for part in found]
        return {
            "text_rank": torch.cat([part.text_rank for part in found]).numpy(),
            "image_rank": torch.cat(ranks).numpy(),
        }

    def summary(self, scores: Scores) -> dict[str, float]:
        """R@k both ways over all images, which is the mean over folds of equal size, and their sum."""
        return dict(recalls(scores["text_rank"], scores["image_rank"]))

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        layout: str | None = None,
        captions: int = CAPTIONS,
        folds: int = 1,
    ) -> HeldOut:
        """As in `Task`, in the words that the weights know; a folder without splits whole where all is wanted."""
        named = self._named(source)
        words = _named_words(meta)
        if isinstance(named, str):
            gallery = _scenes("test", seed, captions, meta, words, folds)
            return HeldOut(gallery, f"the test split of {named}")
        parts = read_captions(named, layout)
        split = next((name for name in ("test", "val") if name in parts), None)
        if split is None and not whole:
            parts, split = _with_splits(named, parts, CUT, seed), "test"
        part = parts[split or "train"]
        about = f"{split} split of {named}" if split else f"all of {named}"
        return HeldOut(_gallery(part, meta, words, captions, folds), about)

    def dummy_baseline(self, data: TaskData) -> float:
        """The better `rsum` of chance and of `colours_and_words`."""
        return max(floors(data).values())

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        """Of the composed scenes; of the words of a file, the option `vocabulary`; or of so many words without names.

        An option `features` says how many numbers a region has.
        """
        words = _words_of_options(options)
        return {
            "words": words.words,
            "pad": words.pad,
            "longest": LONGEST,
            "size": SIZE,
            "features": int(options.get("features") or 0),
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        }

    def example(
        self, file: Path, meta: dict[str, Any], text: str | None = None
    ) -> Float[Tensor, "1 3 height width"] | Example:
        """A picture as a network sees it; with a text, or of a .txt file that holds one, an `Example`."""
        _check_pictures(meta)
        if text is None and file.suffix.lower() == ".txt":
            return _example(None, read_text(file), meta)
        image = standardise(_seen(read_pixels(file), meta).float() / 255, meta)[None]
        return image if text is None else _example(image, text, meta)

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[str],
        output: Path | None,
        *,
        gallery: Path | None = None,
        texts: Path | None = None,
        count: int = 10,
    ) -> str:
        """The pictures of a folder that are most like a text, or the texts of a file that are most like a picture.

        Args:
            model, meta: as in `Task.predict`.
            inputs: texts, or image files; not both.
            output: a picture (.png, .jpg) of the queries, each with what was found beside it; a table (.csv); or a
                folder, which gets both.
            gallery: for texts, a folder of the pictures to search among.
            texts: for pictures, a file of the texts to search among, one a line.
            count: how many are named for each query.
        """
        _check_pictures(meta)
        if not inputs:
            raise UserError("a search needs a query: give a text in quotes, or a picture")
        if count < 1:
            raise UserError(f"count must be at least 1, got {count}")
        pictures = [Path(given) for given in map(str, inputs) if Path(given).suffix.lower() in SUFFIXES]
        missing = next((file for file in pictures if not file.is_file()), None)
        if missing is not None:
            raise UserError(f"no file at {missing}")
        if pictures and len(pictures) < len(inputs):
            raise UserError("the queries are texts and pictures: ask for one kind at a time")
        if any(not given.strip() for given in map(str, inputs)):
            raise UserError("a query holds no words: give a text in quotes, or a picture")
        sheet, table = search_targets(output, [*pictures, *([texts] if texts else [])])
        queries: list[Item] = [*pictures] or [str(given) for given in inputs]
        wanted = self._searched(bool(pictures), gallery, texts)
        for target in (sheet, table):
            if target is not None and target.exists():
                check_no_input(target, (file for file in wanted if isinstance(file, Path)))
        both = [_encoded_items(model, meta, items) for items in (queries, wanted)]
        values, places = _found(model, both, bool(pictures), min(count, len(wanted)))
        rows = [
            [(wanted[place], value) for place, value in zip(found, row)]
            for row, found in zip(values.tolist(), places.tolist())
        ]
        said = []
        if table is not None:
            write_ranking(table, queries, rows, "text" if pictures else "file")
            said.append(f"wrote {table}")
        if sheet is not None:
            draw_sheet(sheet, queries[:SHEET], rows[:SHEET])
            said.append(f"wrote {sheet}" + (f", of the first {SHEET} queries" if len(queries) > SHEET else ""))
        return "\n".join([*in_lines(queries, rows), *said])

    def _searched(self, with_pictures: bool, gallery: Path | None, texts: Path | None) -> list[Item]:
        """What is searched among."""
        if gallery is not None and texts is not None:
            if with_pictures:
                raise UserError("a picture is searched among texts: leave --gallery out")
            raise UserError("a text is searched among pictures: leave --texts out")
        if with_pictures:
            if texts is None:
                raise UserError("a picture is searched among texts: give a file of them, one a line, with --texts")
            lines: list[Item] = [line.strip() for line in read_text(texts).splitlines() if line.strip()]
            if not lines:
                raise UserError(f"{texts} holds no texts: expected one a line")
            return lines
        if gallery is None:
            raise UserError("a text is searched among pictures: give the folder of them with --gallery")
        if not gallery.is_dir():
            raise UserError(f"{gallery} is no folder: give the pictures to search among")
        return [*images_in(gallery)]

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From `image` in 0…1 and `tokens`, filled up with `<pad>` to the longest, to `similarity`, each with each."""
        _check_pictures(meta)
        generator = torch.Generator().manual_seed(0)
        words, longest = Vocabulary(meta["words"]), int(meta["longest"])
        tokens = torch.randint(0, len(words), (3, longest), generator=generator)
        tokens[:, 0] = words.start
        tokens = torch.where((tokens == words.end) | (tokens == words.pad), words.unknown, tokens)
        for row, end in enumerate((longest - 1, longest // 2, 2)):
            tokens[row, end], tokens[row, end + 1 :] = words.end, words.pad

        def predict(image: Tensor, tokens: Tensor) -> Tensor:
            encoded = encode_texts(model, tokens, tokens != words.pad)
            return compare(model, encode_images(model, standardise(image, meta)), encoded)

        return Portable(
            Matcher(model, meta["mean"], meta["std"], words.pad).eval(),
            {"image": draw_images(2, 3, meta["size"], meta["size"]), "tokens": tokens},
            ["similarity"],
            {"image": {0: "images"}, "tokens": {0: "texts"}},
            predict=predict,
        )

    def picture(self, model: nn.Module, data: TaskData) -> "Figure | None":
        """Captions of the test with what is found for each, and how scores lie."""
        return evaluated(model, data.test, {})


class Matcher(Standardising):
    """A system with its standardisation, as it is exported.

    Args:
        model, mean, std: as in `Standardising`.
        pad: the number of `<pad>`.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], pad: int):
        super().__init__(model, mean, std)
        self.pad = pad

    def forward(
        self, image: Float[Tensor, "images 3 height width"], tokens: Int64[Tensor, "texts length"]
    ) -> Float[Tensor, "images texts"]:
        texts = encode_texts(self.model, tokens, tokens != self.pad)
        return compare(self.model, encode_images(self.model, self.standard(image)), texts)


TASK = ImageTextRetrieval()


def encode_images(model: nn.Module, images: Tensor, regions: Bool[Tensor, "batch regions"] | None = None) -> Encoded:
    """What a system makes of images, to be compared with texts.

    Args:
        model: has `encode_images`.
        images, regions: as in `Pairs`. Default of `regions`: all are real.

    Raises:
        UserError: it has none.
    """
    if regions is None:
        # `len` would fix the number of images in an exported file.
        regions = torch.ones(images.shape[0], images.shape[1] if images.ndim == 3 else 1, dtype=torch.bool)
    return _method(model, "encode_images")(images, regions.to(images.device))


def encode_texts(
    model: nn.Module, tokens: Int64[Tensor, "batch length"], words: Bool[Tensor, "batch length"]
) -> Encoded:
    """What a system makes of texts, to be compared with images.

    Args:
        model: has `encode_texts`.
        tokens, words: as in `Pairs`.

    Raises:
        UserError: it has none.
    """
    return _method(model, "encode_texts")(tokens, words)


def _method(model: nn.Module, name: str) -> Any:
    found = getattr(model, name, None)
    if found is None:
        raise UserError(
            f"{type(model).__name__} has no {name}: image-text retrieval needs encode_images(images, regions) and "
            "encode_texts(tokens, words)"
        )
    return found


def compare(model: nn.Module, images: Encoded, texts: Encoded) -> Float[Tensor, "images texts"]:
    """Scores of what was encoded: the system's `similarity`, or the cosine of embeddings."""
    own = getattr(model, "similarity", None)
    if own is not None:
        return own(images, texts).float()
    if not isinstance(images, Tensor) or not isinstance(texts, Tensor) or images.ndim != 2 or texts.ndim != 2:
        raise UserError(
            f"{type(model).__name__} encodes to no embeddings of one vector each: give it a similarity(images, texts)"
        )
    return F.normalize(images.float(), dim=1) @ F.normalize(texts.float(), dim=1).T


def similarities(
    model: nn.Module, gallery: Gallery, rows: range, batch_size: int = 256
) -> tuple[Float[Tensor, "images texts"], Int64[Tensor, " texts"]]:
    """Scores of images and of all of their captions, in tiles; and the image of each caption.

    Args:
        model: see the head of this module.
        gallery: with the captions.
        rows: the images.
        batch_size: images, or texts, that are encoded at a time.
    """
    device, pad = device_of(model), int(gallery.meta["pad"])
    encoded = []
    for start in range(0, len(rows), batch_size):
        parts = [gallery.image(row) for row in rows[start : start + batch_size]]
        images, regions = (torch.stack(column) for column in zip(*parts))
        encoded.append(_to(encode_images(model, images.to(device), regions.to(device)), torch.device("cpu")))
    tokens = [text for row in rows for text in gallery.tokens[row]]
    owners = torch.tensor([number for number, row in enumerate(rows) for _ in gallery.tokens[row]])
    texts = [
        _texts(model, tokens[start : start + batch_size], gallery.longest, pad)
        for start in range(0, len(tokens), batch_size)
    ]
    return _tiles(model, _join(encoded), _join(texts)), owners


def _texts(model: nn.Module, tokens: Sequence[Sequence[int]], width: int, pad: int) -> Encoded:
    """Texts of one width, so that what comes of several batches can be joined."""
    table = torch.full((len(tokens), width), pad)
    for row, text in enumerate(tokens):
        table[row, : len(text)] = torch.tensor(text)
    there = padding_of([len(text) for text in tokens], width)
    device = device_of(model)
    return _to(encode_texts(model, table.to(device), there.to(device)), torch.device("cpu"))


def _tiles(model: nn.Module, images: Encoded, texts: Encoded) -> Float[Tensor, "images texts"]:
    device = device_of(model)
    table = torch.empty(_count(images), _count(texts))
    steps = [(i, t) for i in range(0, _count(images), TILE) for t in range(0, _count(texts), TILE)]
    for i, t in progress.track(steps, "comparing") if len(steps) > 50 else steps:
        part = [_rows(some, slice(at, at + TILE)) for some, at in ((images, i), (texts, t))]
        table[i : i + TILE, t : t + TILE] = compare(model, *(_to(some, device) for some in part)).cpu()
    return table


def _each(function: Callable[[Tensor], Tensor], encoded: Encoded) -> Encoded:
    return function(encoded) if isinstance(encoded, Tensor) else tuple(function(part) for part in encoded)


def _to(encoded: Encoded, device: torch.device) -> Encoded:
    return _each(lambda part: part.to(device), encoded)


def _rows(encoded: Encoded, rows: slice) -> Encoded:
    return _each(lambda part: part[rows], encoded)


def _count(encoded: Encoded) -> int:
    return len(encoded) if isinstance(encoded, Tensor) else len(encoded[0])


def _join(parts: Sequence[Encoded]) -> Encoded:
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    return tuple(torch.cat(list(columns)) for columns in zip(*parts))


def _encoded_items(model: nn.Module, meta: dict[str, Any], items: Sequence[Item]) -> Encoded:
    """What a system makes of image files, or of texts."""
    words, parts = _named_words(meta), []
    longest, device = int(meta["longest"]), device_of(model)
    texts = [words.encode(item, longest) for item in items if isinstance(item, str)]
    _say_cut([item for item in items if isinstance(item, str)], longest, "texts")
    _say_unknown(words, [item for item in items if isinstance(item, str)])
    width = max(map(len, texts), default=1)
    with torch.no_grad():
        for start in progress.track(range(0, len(items), TILE), "encoding"):
            some = items[start : start + TILE]
            if texts:
                parts.append(_texts(model, texts[start : start + TILE], width, words.pad))
            else:
                images = torch.cat([of_kind(TASK.example(Path(file), meta), Tensor, "image") for file in some])
                parts.append(_to(encode_images(model, images.to(device)), torch.device("cpu")))
    return _join(parts)


def _say_cut(texts: Sequence[str], longest: int, what: str) -> None:
    """Say how many texts are longer than what is read of one."""
    cut = [text for text in texts if len(words_of(text)) + 2 > longest]
    if cut:
        progress.say(
            f"{len(cut):,} of {len(texts):,} {what} have more than {longest - 2} words, and the rest is not read, "
            f"such as {cut[0][:60]!r}"
        )


def _words_of_options(options: dict[str, Any]) -> Vocabulary:
    """The words that a system's options name: a file, or as many as its embedding has rows."""
    file, composed = options.get("vocabulary"), vocabulary()
    if file is not None:
        return read_vocabulary(Path(file), int(options["vocab_size"]) if "vocab_size" in options else None)
    count = int(options.get("vocab_size") or len(composed))
    return composed if count == len(composed) else Vocabulary([*SPECIAL, *map(UNNAMED.format, range(6, max(7, count)))])


def _named_words(meta: dict[str, Any]) -> Vocabulary:
    """The words that weights know.

    Raises:
        UserError: nothing says what they are, as of an authors' checkpoint.
    """
    if meta["words"][-1] == UNNAMED.format(len(meta["words"]) - 1):
        raise UserError(
            f"these weights know {len(meta['words'])} words and do not say which: give the file of the words with "
            "--set vocabulary=FILE"
        )
    return Vocabulary(meta["words"])


def _example(image: Tensor | None, text: str, meta: dict[str, Any]) -> Example:
    words = _named_words(meta)
    if not text.strip():
        raise UserError("the text is empty: give a caption in words")
    longest = int(meta["longest"])
    _say_cut([text], longest, "texts")
    _say_unknown(words, [text])
    tokens = words.encode(text, longest)
    said = torch.tensor([tokens]), tuple(words.words[token] for token in tokens)
    return Example(image, *said, _shown_scenes() if image is None else None)


def _shown_scenes() -> Float[Tensor, "scenes 3 side side"]:
    scenes = composed_scenes("test", count=SHOWN)
    pixels = torch.stack([torch.from_numpy(scene.pixels).permute(2, 0, 1).float() / 255 for scene in scenes])
    return (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)


def _say_unknown(words: Vocabulary, texts: Sequence[str]) -> None:
    unknown = sorted({word for text in texts for word in words_of(text)} - set(words.words))
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        progress.say(f"the model does not know the words {', '.join(unknown[:5])}{more}: it reads <unk> for them")


def _found(
    model: nn.Module, both: Sequence[Encoded], pictures: bool, count: int
) -> tuple[Float[Tensor, "queries count"], Int64[Tensor, "queries count"]]:
    """Scores, falling, and places of what is most like each query; of equal ones the earlier comes first."""
    queries, wanted = both
    if not hasattr(model, "similarity") and isinstance(queries, Tensor) and isinstance(wanted, Tensor):
        return nearest(queries.float(), wanted.float(), count)
    with torch.no_grad():
        table = _tiles(model, queries, wanted) if pictures else _tiles(model, wanted, queries).T
    values, places = table.sort(dim=1, descending=True, stable=True)
    return values[:, :count], places[:, :count]


def floors(data: TaskData) -> dict[str, float]:
    """`rsum` without learned features: by chance, and by colours and words."""
    test: Gallery = data.test  # type: ignore[assignment]  # a data set of this task
    images = len(test) // test.folds
    captions = round(sum(map(len, test.tokens)) / len(test))
    return {"chance": chance(images, captions)["rsum"], "colours and words": colours_and_words(data)}


def colours_and_words(data: TaskData) -> float:
    """`rsum` of a linear rule: the words of its captions from the mean colours of 4×4 cells of an image.

    It is ridge regression, with the penalty 10, from standardised colours to the share of the captions of an image that
    have a word. A caption and an image are compared by the cosine of what is predicted, around the mean of training.
    Of features the mean over regions takes the place of the colours.
    """
    pairs: CaptionPairs = data.train  # type: ignore[assignment]  # data sets of this task
    train, test = pairs.gallery, of_kind(data.test, Gallery, "test")
    x, asked = _coarse(train), _coarse(test)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, asked = (x - mean) / std, (asked - mean) / std
    size = len(train.meta["words"])
    bags = torch.stack([_bag(texts, size).mean(0) for texts in train.tokens])
    centre = bags.mean(0)
    weights = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1]), x.T @ (bags - centre))
    predicted = F.normalize(asked @ weights, dim=1)
    ranks = []
    step = _fold_size(len(test), test.folds)
    for start in range(0, len(test), step):
        rows = range(start, start + step)
        texts = F.normalize(torch.cat([_bag(test.tokens[row], size) for row in rows]) - centre, dim=1)
        owners = torch.tensor([number for number, row in enumerate(rows) for _ in test.tokens[row]])
        ranks.append(match(predicted[start : start + step] @ texts.T, owners))
    width = max(part.image_rank.shape[1] for part in ranks)
    image = torch.cat([F.pad(part.image_rank, (0, width - part.image_rank.shape[1])) for part in ranks])
    return recalls(torch.cat([part.text_rank for part in ranks]).numpy(), image.numpy())["rsum"]


def _coarse(gallery: Gallery) -> Float[Tensor, "images values"]:
    rows = []
    for index in range(len(gallery)):
        image, regions = gallery.image(index)
        coarse = image[regions].mean(0) if image.ndim == 2 else F.adaptive_avg_pool2d(image, CELLS).flatten()
        rows.append(coarse)
    return torch.stack(rows)


def _bag(texts: Sequence[Sequence[int]], size: int) -> Float[Tensor, "texts words"]:
    """Whether each word is in each text."""
    bags = torch.zeros(len(texts), size)
    for row, text in enumerate(texts):
        bags[row, torch.tensor(text)] = 1
    return bags


def _fold_size(images: int, folds: int) -> int:
    if images % folds:
        raise UserError(
            f"{images} images cannot be judged in {folds} folds of equal size: set folds to a number that divides them"
        )
    return images // folds


def _check_pictures(meta: dict[str, Any]) -> None:
    if meta["features"]:
        raise UserError(
            f"these weights take features of {meta['features']} numbers for each region, and no pictures: make "
            "features by the network that theirs are from"
        )


def _seen(image: UInt8[Tensor, "3 h w"], meta: dict[str, Any]) -> UInt8[Tensor, "3 size size"]:
    """A square of the size that is seen, whatever the picture's shape, as CLIP's successors take it."""
    side = int(meta["size"])
    return image if image.shape[1:] == (side, side) else resize_pixels(image, side, side)


@lru_cache(maxsize=4)  # a study asks for them once a trial
def _drawn(
    split: str, seed: int, count: int | None
) -> tuple[UInt8[Tensor, "scenes 3 side side"], list[tuple[str, ...]]]:
    scenes = composed_scenes(split, seed, count)
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2).contiguous()
    return pixels, [scene.captions for scene in scenes]


def _scenes(
    split: str,
    seed: int,
    captions: int,
    meta: dict[str, Any],
    words: Vocabulary,
    folds: int = 1,
    count: int | None = None,
) -> Gallery:
    pixels, said = _drawn(split, seed, count)
    _fold_size(len(pixels), folds)
    longest = int(meta["longest"])
    tokens = [[words.encode(text, longest) for text in texts[:captions]] for texts in said]
    return Gallery(pixels, tokens, meta, folds=folds)


def _composed(seed: int, captions: int, folds: int, examples: int | None) -> TaskData:
    words = vocabulary()
    pixels, _ = _drawn("train", seed, examples)
    parts = pixels.float() / 255
    meta = {
        "words": words.words,
        "pad": words.pad,
        "longest": LONGEST,
        "size": SIDE,
        "features": 0,
        "mean": parts.mean((0, 2, 3)).tolist(),
        "std": parts.std((0, 2, 3)).tolist(),
    }
    sets = {
        split: _scenes(split, seed, captions, meta, words, folds if split == "test" else 1, count)
        for split, count in (("train", examples), ("val", None), ("test", None))
    }
    return TaskData(
        "composed",
        CaptionPairs(sets["train"]),
        sets["val"],
        sets["test"],
        fingerprint=fingerprint(*(cast(Any, part) for g in sets.values() for part in (g.images, repr(g.tokens)))),
        options={"vocab_size": len(words), "image_size": SIDE},
        meta=meta,
        collate=join_pairs(words.pad),
        about=f"{len(sets['train']):,} scenes to train on, {len(sets['val'])} to validate, {len(sets['test']):,} to "
        "test, of coloured digits and shapes on photographs, textures and paper. Captions are true by construction. No "
        "glyph, photograph or pair of a colour and an object is in two splits. Objects lie flat, and none is covered.",
    )


def _with_splits(root: Path, parts: dict[str, Captioned], share: float, seed: int) -> dict[str, Captioned]:
    """With splits that are cut from the images of training where a folder lacks them."""
    missing = [split for split in ("val", "test") if split not in parts]
    if "train" not in parts:
        raise UserError(f"{root} has the splits {', '.join(parts)} and none to train on")
    if not missing:
        return parts
    count = len(parts["train"].captions)
    if count < 4:
        raise UserError(f"{root}: {count} images with captions: expected at least 4, to train, validate and test")
    cut = max(1, round(share * count)) / count
    groups = split_indices(count, [1 - cut * len(missing), *[cut] * len(missing)], seed)
    whole = parts["train"]
    return {**parts, **{name: whole.some(sorted(rows)) for name, rows in zip(("train", *missing), groups)}}


def _gallery(part: Captioned, meta: dict[str, Any], words: Vocabulary, captions: int, folds: int = 1) -> Gallery:
    features = part.images.shape[2] if isinstance(part.images, np.ndarray) else 0
    if features != meta["features"]:
        kind = [f"features of {number} numbers" if number else "pictures" for number in (features, meta["features"])]
        raise UserError(f"the data are {kind[0]}; these weights take {kind[1]}")
    longest = int(meta["longest"])
    tokens = [[words.encode(text, longest) for text in texts[:captions]] for texts in part.captions]
    _say_cut([text for texts in part.captions for text in texts[:captions]], longest, "captions")
    _fold_size(len(tokens), folds)
    return Gallery(part.images, tokens, meta, part.lengths, folds)


def _folder(
    root: Path, parts: dict[str, Captioned], size: int, captions: int, folds: int, longest: int, at_least: int
) -> TaskData:
    train = parts["train"]
    words = Vocabulary.of_texts((text for texts in train.captions for text in texts[:captions]), at_least)
    features = train.images.shape[2] if isinstance(train.images, np.ndarray) else 0
    meta = {
        "words": words.words,
        "pad": words.pad,
        "longest": longest,
        "size": size,
        "features": features,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
    sets = {name: _gallery(part, meta, words, captions, folds if name == "test" else 1) for name, part in parts.items()}
    files = [file for g in sets.values() if not isinstance(g.images, (np.ndarray, Tensor)) for file in g.images]
    if len(files) <= LARGEST_CHECKED:
        for gallery in sets.values():
            if not isinstance(gallery.images, np.ndarray):
                for index in progress.track(range(len(gallery)), "reading images"):
                    gallery.pixels(index)  # names a damaged file now, not in the middle of training
    sizes = [f"{file.relative_to(root)} {file.stat().st_size}" for file in files]
    sizes += [str(g.images[:: max(1, len(g) // 100)].sum()) for g in sets.values() if isinstance(g.images, np.ndarray)]
    known = {"vocab_size": len(words)} | ({"features": features} if features else {"image_size": size})
    texts = sum(len(texts) for texts in sets["train"].tokens)
    return TaskData(
        str(root),
        CaptionPairs(sets["train"]),
        sets["val"],
        sets["test"],
        fingerprint=fingerprint(*sizes, *(f"{name} {gallery.tokens}" for name, gallery in sets.items())),
        options=known,
        meta=meta,
        collate=join_pairs(words.pad),
        about=f"{len(sets['train']):,} images with {texts:,} captions to train on, {len(sets['val']):,} images to "
        f"validate, {len(sets['test']):,} to test; {len(words):,} words are known.",
    )


def evaluated(model: nn.Module, dataset: Dataset, scores: Scores) -> "Figure":
    """Captions in even steps through the test, and what is found for each: framed green where it is the right one.

    Below are the scores of pairs that belong together and of all others, each as a share of its own number. Of a large
    test the first `DRAWN` images are ranked, with their texts.

    Args:
        model, dataset: what was evaluated.
        scores: of the images; not needed.
    """
    import textwrap

    from matplotlib.figure import Figure

    gallery: Gallery = dataset  # type: ignore[assignment]  # a data set of this task
    drawn = min(DRAWN, _fold_size(len(gallery), gallery.folds))
    with torch.no_grad():
        table, owners = similarities(model, gallery, range(drawn))
    words = Vocabulary(gallery.meta["words"])
    flat = [text for texts in gallery.tokens[:drawn] for text in texts]
    chosen = torch.linspace(0, len(flat) - 1, min(6, len(flat))).long().tolist()
    figure = Figure(figsize=(10, 1.9 * len(chosen) + 2.8), layout="constrained")
    (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.9 * len(chosen), 2.8])
    axes = above.subplots(len(chosen), 6, squeeze=False)
    for row, text in enumerate(chosen):
        axes[row][0].text(0, 0.5, textwrap.fill(words.decode(flat[text]), 26), fontsize=8, va="center")
        order = table[:, text].argsort(descending=True, stable=True)[:5].tolist()
        for axis, image in zip(axes[row][1:], order):
            if isinstance(gallery.images, np.ndarray):
                axis.text(0.5, 0.5, f"image {image}", ha="center")
            else:
                axis.imshow(gallery.pixels(image).permute(1, 2, 0).numpy())
            for spine in axis.spines.values():
                spine.set(color="#2a8f3c" if image == int(owners[text]) else "#b00020", linewidth=2.5)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis in axes[:, 0]:
        axis.set_axis_off()
    draw_scores(below.subplots(), table, owners)
    return figure


def draw_scores(axes: "Axes", table: Float[Tensor, "images texts"], owners: Int64[Tensor, " texts"]) -> None:
    """How the scores of pairs that belong together lie beside those of all others.

    Args:
        axes: to draw on.
        table: the score of each image with each text.
        owners: the image of each text.
    """
    own, there = torch.arange(len(table))[:, None] == owners, table.isfinite()
    low, high = (float(end) for end in table[there].aminmax()) if there.any() else (0.0, 1.0)
    edges = np.linspace(low, max(high, low + 1e-3), 50)
    for chosen, name, colour in (
        (own, "an image and its text", "#2a8f3c"),
        (~own, "an image and another's", "#b00020"),
    ):
        counts, _ = np.histogram(table[chosen & there].numpy(), edges)
        axes.stairs(100 * counts / max(1, int(chosen.sum())), edges, color=colour, linewidth=1.5, label=name)
    left_out = int((~there).sum())
    axes.set(xlabel="score" + (f"; {left_out:,} are no numbers" if left_out else ""), ylabel="% of pairs")
    axes.legend()


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: the composed test scenes that are most like the words that were given."""
    from PIL import Image

    gallery = Path("gallery")
    gallery.mkdir(exist_ok=True)
    for number, scene in enumerate(composed_scenes("test", count=60)):
        Image.fromarray(scene.pixels).save(gallery / f"{number}.png")
    text = " ".join(read_text(trial.file).split())
    trial.task.predict(trial.model, trial.meta, [text], Path("drawing.png"), gallery=gallery, count=5)  # type: ignore[call-arg]  # of this task
    return {"kind": "drawing", "size": as_shown(Path("drawing.png")).size, "classes": ["the most alike first"]}
