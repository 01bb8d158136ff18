"""Data, networks and trainings of FALCON's experiments: small encoders of crops, read by a decoder of two layers."""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from provenn.nn.decoder import Decoder
from provenn.nn.language import init_narrow
from provenn.nn.towers import VisionConfig
from provenn.papers.falcon.crops import Grid, cut, places_of
from provenn.papers.falcon.model import RegisterViT
from provenn.papers.falcon.rivals import (
    Abstractor,
    AllTokens,
    Compressed,
    KeepAll,
    MostAttended,
    OwnCrop,
    PixelShuffle,
    Pooling,
    RandomPatches,
    ShiftedWindows,
)
from provenn.tasks import Task, TaskData, fingerprint, get_task
from provenn.tasks.base import device_of
from provenn.tasks.embedded import GREY, SOURCES, grey_photograph, photograph, wide_patches
from provenn.tasks.image_classification import ImageClassification
from provenn.training import Fit, Hardware, Recipe, Stage, fit, only, run_stages

SIDE, PATCH, REGISTERS = 24, 4, 4  # 36 patches of a crop to 4 tokens: 9-fold
CANVAS = 48  # pixels of an image's side: 2 × 2 crops
DEPTH, HEADS, DIM = 3, 2, 32
COUNTS = {"train": 3200, "val": 400, "test": 1000}
RECIPE = Recipe(epochs=4, batch_size=32, lr=3e-3, weight_decay=0.05, decay_vectors=False, schedule="onecycle", clip=1.0)
ANSWERS = replace(RECIPE, epochs=6)  # of networks that answer questions
LONGER = replace(RECIPE, epochs=8)  # of networks that read digits, begun with a tower that names them in crops
ON_CROPS = replace(LONGER, batch_size=64)  # of that tower
ONE_CPU = Hardware()
NOISE = 0.3  # deviation of what is added to canvases without a texture
MATCHED = 2 * DIM  # hidden channels of three MLPs, which are as many parameters as an Abstractor has
SHUFFLED = DIM // 2  # what such MLPs have beyond a pixel shuffle


class Variant(NamedTuple):
    """A network that reads crops.

    Args:
        kind: a key of `KINDS`.
        dim: D of the encoder.
        wider: hidden channels that its MLPs have beyond 4·D, so that variants are of one size.
        layers: of the reader.
        pixels: side to which images are reduced before they are cut; 0 leaves them.
        grid: rows and columns of the crops.
        whole: whether the whole image is read beside them.
    """

    kind: str
    dim: int = DIM
    wider: int = 0
    layers: int = 2
    pixels: int = 0
    grid: Grid = (2, 2)
    whole: bool = False


# Networks


def _vit(variant: Variant, registers: int, interact: bool = False, kind: Any = RegisterViT, **options: Any) -> Any:
    hidden = 4 * variant.dim + variant.wider
    config = VisionConfig("siglip", variant.dim, DEPTH, HEADS, hidden=hidden, image=SIDE, patch=PATCH, head=False)
    return kind(config, registers=registers, limit=16, interact=interact, **options)


def _compressed(make: Callable[[RegisterViT, int], nn.Module], registers: int = 0) -> Callable[[Variant], nn.Module]:
    def build(variant: Variant) -> nn.Module:
        vit = _vit(variant, registers)
        return Compressed(vit, make(vit, variant.dim))

    return build


PATCHES = (SIDE // PATCH) ** 2
BLOCKS = 2  # of patches on each side of a crop: 2 × 2 tokens
KINDS: dict[str, Callable[[Variant], nn.Module]] = {
    "recompact": lambda variant: _vit(variant, REGISTERS),
    "falcon": lambda variant: _vit(variant, REGISTERS, True),
    "own crop": lambda variant: _vit(variant, REGISTERS, True, OwnCrop),
    "all tokens": lambda variant: _vit(variant, REGISTERS, True, AllTokens),
    "windows": lambda variant: _vit(variant, REGISTERS, True, ShiftedWindows, grid=variant.grid),
    "keep": _compressed(lambda vit, dim: KeepAll()),
    "pooling": _compressed(lambda vit, dim: Pooling(BLOCKS)),
    "shuffle": _compressed(lambda vit, dim: PixelShuffle(dim, PATCHES, BLOCKS)),
    "abstractor": _compressed(lambda vit, dim: Abstractor(dim, HEADS, REGISTERS)),
    "registers and abstractor": _compressed(lambda vit, dim: Abstractor(dim, HEADS, REGISTERS), REGISTERS),
    "most attended": _compressed(lambda vit, dim: MostAttended(vit, REGISTERS)),
    "random": _compressed(lambda vit, dim: RandomPatches(REGISTERS)),
}


class Reader(nn.Module):
    """An encoder of crops and a decoder over all of its tokens, which answers after the last of them.

    Args:
        variant: of the encoder.
        num_classes: answers.
        words: of questions; 0 asks one question alone. A question is what a further channel of the images holds, a
            number of a word each from its first pixel on, −1 beyond the last.
        in_channels: of the images, with the channel of questions.

    Shapes: images (batch, in_channels, height, width) to (batch, num_classes).
    """

    def __init__(self, variant: Variant, num_classes: int, words: int = 0, in_channels: int = 3):
        super().__init__()
        self.variant, self.words = variant, words
        self.encoder = KINDS[variant.kind](variant)
        self.project = nn.Linear(variant.dim, DIM)
        self.decoder = Decoder(vocab=words + 1, dim=DIM, layers=variant.layers, heads=HEADS)
        self.head = nn.Linear(DIM, num_classes)
        init_narrow(self.decoder)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        question = images.new_full((len(images), 1), -1).long()
        if self.words:
            asked = images[:, -1].flatten(1)[:, : images.shape[3]].round().long()
            question = torch.cat([asked, question], dim=1)[:, : int((asked >= 0).sum(1).max()) + 1]
            images = images[:, :-1]
        pixels = self.variant.pixels
        if pixels:
            images = F.interpolate(images, (pixels, pixels), mode="bilinear", antialias=True)
        crops, places = cut(images.expand(-1, 3, -1, -1), self.variant.grid, SIDE), places_of(self.variant.grid)
        if not self.variant.whole:
            crops, places = crops[:, 1:], places[1:]
        count = crops.shape[1]
        places = places.to(images.device).repeat(len(images), 1)
        tokens = self.encoder(crops.flatten(0, 1), places, count)
        seen = self.project(tokens).unflatten(0, (len(images), count)).flatten(1, 2)
        # The number 0 of the vocabulary asks for the answer; words of a question are counted from 1.
        first = torch.cat([seen, self.decoder.embed(question.clamp_min(-1) + 1)], dim=1)
        known = torch.cat([seen.new_ones(seen.shape[:2], dtype=torch.bool), question >= 0], dim=1)
        known[:, -1] = True
        return self.head(self.decoder.read(first, mask=known).hidden[:, -1])


def network(variant: Variant, num_classes: int, words: int = 0, in_channels: int = 3) -> nn.Module:
    """The network of a variant."""
    return Reader(variant, num_classes, words, in_channels)


# Data


def _digits(seed: int) -> dict[str, tuple[Float[Tensor, "digits 1 8 8"], Int64[Tensor, " digits"]]]:
    data = get_task("image-classification").load("digits", seed=seed)
    return {split: getattr(data, split).tensors for split in COUNTS}


def _sized(smoke: bool, split: str) -> int:
    return 64 if smoke else COUNTS[split]


def _enlarged(digits: Tensor, side: int) -> Float[Tensor, "digits side side"]:
    return F.interpolate(digits, (side, side), mode="bilinear")[:, 0]


def _paste(canvas: Tensor, digits: Tensor, corners: Tensor) -> None:
    """Add a digit to each canvas, its upper left corner at row and column."""
    side = digits.shape[-1]
    step = torch.arange(side)
    number = torch.arange(len(canvas))[:, None, None]
    rows, columns = corners[:, 0, None, None] + step[:, None], corners[:, 1, None, None] + step
    canvas[number, 0, rows, columns] += digits


def _made(
    name: str, parts: Mapping[str, tuple[Tensor, Tensor]], classes: int, meta: dict[str, Any] | None = None, **more: Any
) -> TaskData:
    sets = {split: TensorDataset(*part) for split, part in parts.items()}
    tensors = [tensor for part in parts.values() for tensor in part]
    return TaskData(
        name,
        sets["train"],
        sets["val"],
        sets["test"],
        fingerprint=fingerprint(*tensors),
        options={"num_classes": classes, "in_channels": parts["train"][0].shape[1], **more},
        meta=meta or {},
    )


SEAM_DIGIT = 20  # pixels of a digit's side


@lru_cache(maxsize=8)  # a study asks for them once a trial
def seam_digits(seed: int, smoke: bool) -> TaskData:
    """Digits of 20 pixels that lie within a crop of 24, or across the corner where four crops meet, half and half."""
    generator = torch.Generator().manual_seed(seed)
    parts, straddles = {}, {}
    for split, (digits, labels) in _digits(seed).items():
        count = _sized(smoke, split)
        chosen = torch.randint(len(digits), (count,), generator=generator)
        across = torch.rand(count, generator=generator) < 0.5
        inside = SIDE * torch.randint(2, (count, 2), generator=generator)
        inside = inside + torch.randint(SIDE - SEAM_DIGIT + 1, (count, 2), generator=generator)
        # 6 to 14 of its 20 pixels lie on either side of each seam.
        corner = SIDE - torch.randint(6, SEAM_DIGIT - 5, (count, 2), generator=generator)
        canvas = NOISE * torch.randn(count, 1, CANVAS, CANVAS, generator=generator)
        _paste(canvas, _enlarged(digits[chosen], SEAM_DIGIT), torch.where(across[:, None], corner, inside))
        parts[split], straddles[split] = (canvas, labels[chosen]), across
    return _made("digits at the seams of crops", parts, 10, {"straddles": straddles["test"]})


SMALL_DIGIT = 12
BRIGHT = 1.5  # of a digit on a texture, in deviations


@lru_cache(maxsize=8)
def small_digits(seed: int, smoke: bool) -> TaskData:
    """A digit of 12 pixels anywhere on a grey piece of 48² of a photograph."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for split, (digits, labels) in _digits(seed).items():
        count = _sized(smoke, split)
        pieces, _ = wide_patches(split, 60, seed)
        chosen = torch.randint(len(digits), (count,), generator=generator)
        ground = torch.randint(len(pieces), (count,), generator=generator)
        canvas = pieces[ground, :, :CANVAS, :CANVAS].clone()
        shapes = _enlarged(digits[chosen], SMALL_DIGIT)
        shapes = (shapes - shapes.amin((1, 2), keepdim=True)) * BRIGHT
        _paste(canvas, shapes, torch.randint(CANVAS - SMALL_DIGIT + 1, (count, 2), generator=generator))
        parts[split] = (canvas, labels[chosen])
    return _made("small digits on photographs", parts, 10)


CROP_DIGITS = (12, 16, 20)  # sides, of as many digits each
CROPS = {"train": 4266, "val": 133, "test": 333}


@lru_cache(maxsize=8)
def crop_digits(seed: int, smoke: bool) -> TaskData:
    """Crops of 24 with a digit of 12, 16 or 20 pixels: half on noise, half on a grey piece of a photograph."""
    generator = torch.Generator().manual_seed(3 * seed + 7)
    parts = {}
    for split, (digits, labels) in _digits(seed).items():
        each = 16 if smoke else CROPS[split]
        pieces, _ = wide_patches(split, 60, seed)
        canvases, classes = [], []
        for side in CROP_DIGITS:
            chosen = torch.randint(len(digits), (each,), generator=generator)
            ground = torch.randint(len(pieces), (each,), generator=generator).tolist()
            corners = torch.randint(pieces.shape[-1] - SIDE + 1, (each, 2), generator=generator).tolist()
            texture = torch.stack(
                [pieces[i, :, top : top + SIDE, left : left + SIDE] for i, (top, left) in zip(ground, corners)]
            )
            noisy = torch.rand(each, 1, 1, 1, generator=generator) < 0.5
            canvas = torch.where(noisy, NOISE * torch.randn(each, 1, SIDE, SIDE, generator=generator), texture)
            shapes = _enlarged(digits[chosen], side)
            bright = (shapes - shapes.amin((1, 2), keepdim=True)) * BRIGHT
            shapes = torch.where(noisy[:, 0], shapes, bright)
            _paste(canvas, shapes, torch.randint(SIDE - side + 1, (each, 2), generator=generator))
            canvases.append(canvas)
            classes.append(labels[chosen])
        parts[split] = (torch.cat(canvases), torch.cat(classes))
    return _made("digits in crops", parts, 10)


PAIR_CLASSES = 5
PAIR_DIGIT = 18


def _pair_canvas(split: str, seed: int, count: int, two: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits in crops: one, with its class, or two in two different crops, with whether they are of one class."""
    digits, labels = _digits(seed)[split]
    of_class = [torch.nonzero(labels == label)[:, 0] for label in range(PAIR_CLASSES)]
    first = torch.randint(PAIR_CLASSES, (count,), generator=generator)
    same = torch.rand(count, generator=generator) < 0.5
    other = (first + torch.randint(1, PAIR_CLASSES, (count,), generator=generator)) % PAIR_CLASSES
    second = torch.where(same, first, other)
    canvas = NOISE * torch.randn(count, 1, CANVAS, CANVAS, generator=generator)
    crops = torch.rand(count, 4, generator=generator).argsort(dim=1)[:, :2]
    for classes, crop in ((first, crops[:, 0]), (second, crops[:, 1]))[: 1 + two]:
        draw = torch.rand(count, generator=generator)
        chosen = torch.stack([of_class[c][int(d * len(of_class[c]))] for c, d in zip(classes.tolist(), draw.tolist())])
        corners = SIDE * torch.stack([crop // 2, crop % 2], dim=1)
        corners = corners + torch.randint(SIDE - PAIR_DIGIT + 1, (count, 2), generator=generator)
        _paste(canvas, _enlarged(digits[chosen], PAIR_DIGIT), corners)
    return canvas, same.long() if two else first


@lru_cache(maxsize=8)
def pairs(seed: int, smoke: bool) -> TaskData:
    """Two digits of 18 pixels in two different crops, whichever: are they of one class?"""
    generator = torch.Generator().manual_seed(2 * seed)
    parts = {split: _pair_canvas(split, seed, _sized(smoke, split), True, generator) for split in COUNTS}
    return _made("same or different digits", parts, 2)


@lru_cache(maxsize=8)
def singles(seed: int, smoke: bool) -> TaskData:
    """One digit of 18 pixels in one crop: which of five?"""
    generator = torch.Generator().manual_seed(2 * seed + 1)
    parts = {split: _pair_canvas(split, seed, _sized(smoke, split), False, generator) for split in COUNTS}
    return _made("one digit in a crop", parts, PAIR_CLASSES)


VIEW = 72  # pixels of a view's side: 3 × 3 crops
VIEWS = {"train": 48, "val": 8, "test": 16}  # of each region
SHIFT, TURN, SCALE, LIGHT = 8.0, 15.0, 0.15, 0.2


@lru_cache(maxsize=4)
def views(seed: int, smoke: bool) -> TaskData:
    """Views of 64 regions of 16 photographs, 72 pixels wide and 16 apart: moved, turned, scaled, under other light."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for split, count in VIEWS.items():
        count = 1 if smoke else count
        seen = [_views_of(name, count, generator) for name in SOURCES]
        labels = torch.arange(4 * len(SOURCES)).repeat_interleave(count)
        images = torch.cat(seen)
        images = (images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), keepdim=True).clamp_min(1e-3)
        parts[split] = (images + 0.1 * torch.randn(images.shape, generator=generator), labels)
    return _made("views of regions", parts, 4 * len(SOURCES))


def _views_of(name: str, count: int, generator: torch.Generator) -> Float[Tensor, "views 1 side side"]:
    """Grey views of the four regions in the middle of a photograph."""
    grey = grey_photograph(name) if name in GREY else photograph(name).mean(2)
    picture = torch.from_numpy(np.ascontiguousarray(grey, dtype=np.float32))[None, None] / 255
    height, width = picture.shape[2:]
    parts = []
    for down in (-8, 8):
        for right in (-8, 8):
            drawn = 2 * torch.rand(count, 5, generator=generator) - 1
            turn, scale = drawn[:, 2] * TURN * torch.pi / 180, 1 + SCALE * drawn[:, 3]
            steps = torch.arange(VIEW) - (VIEW - 1) / 2
            y, x = torch.meshgrid(steps, steps, indexing="ij")
            cos, sin = (scale * turn.cos())[:, None, None], (scale * turn.sin())[:, None, None]
            rows = (height - 1) / 2 + down + SHIFT * drawn[:, 0, None, None] + cos * y + sin * x
            columns = (width - 1) / 2 + right + SHIFT * drawn[:, 1, None, None] + cos * x - sin * y
            grid = torch.stack([2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1], dim=-1)
            seen = F.grid_sample(picture.expand(count, -1, -1, -1), grid, align_corners=True, padding_mode="reflection")
            parts.append(seen * (1 + LIGHT * drawn[:, 4, None, None, None]))
    return torch.cat(parts)


ASKED = ("digit", "place", "count", "largest")
ASKED_CLASSES, ASKED_SIDES = 5, (12, 16, 20)  # of digits; no two of an image are of one class or one side
CORNERS = 4  # crops of an image, each with one digit at most
FIRST_CLASS, FIRST_CROP = len(ASKED), len(ASKED) + ASKED_CLASSES  # words: of questions, of digits, of crops


@lru_cache(maxsize=8)
def questions(seed: int, smoke: bool) -> TaskData:
    """One to three digits of 12, 16 and 20 pixels in crops of 48² of noise, and one of four kinds of questions.

    Asked are the digit in a crop, the crop of a digit, how many there are, and the largest of two or three. A question
    is a word of its kind and, of the first two kinds, one of what it is about.
    """
    generator = torch.Generator().manual_seed(5 * seed + 11)
    parts, kinds = {}, {}
    for split in COUNTS:
        count = (2 if split == "train" else 1) * _sized(smoke, split)
        kind = torch.randint(len(ASKED), (count,), generator=generator)
        most = len(ASKED_SIDES)
        many = torch.randint(1, most + 1, (count,), generator=generator)
        many = torch.where(kind == ASKED.index("largest"), many.clamp_min(2), many)
        classes, crops, sides = (
            torch.rand(count, of, generator=generator).argsort(1)[:, :most] for of in (ASKED_CLASSES, CORNERS, most)
        )
        canvas = _questioned(split, seed, many, classes, crops, sides, generator)
        largest = sides.masked_fill(torch.arange(most) >= many[:, None], -1).argmax(1, keepdim=True)
        none = torch.full_like(many, -1)
        answers = [classes[:, 0], ASKED_CLASSES + crops[:, 0], ASKED_CLASSES + CORNERS - 1 + many]
        answers.append(classes.gather(1, largest)[:, 0])
        about = [FIRST_CROP + crops[:, 0], FIRST_CLASS + classes[:, 0], none, none]
        labels, told = (torch.stack(of_kind, 1).gather(1, kind[:, None])[:, 0] for of_kind in (answers, about))
        channel = torch.full((count, 1, CANVAS, CANVAS), -1.0)
        channel[:, 0, 0, :2] = torch.stack([kind, told], dim=1).float()
        parts[split], kinds[split] = (torch.cat([canvas, channel], dim=1), labels), kind
    classes_of_answers = ASKED_CLASSES + CORNERS + len(ASKED_SIDES)
    meta = {"kinds": kinds["test"]}
    return _made("four kinds of questions", parts, classes_of_answers, meta, words=FIRST_CROP + CORNERS)


def _questioned(
    split: str, seed: int, many: Tensor, classes: Tensor, crops: Tensor, sides: Tensor, generator: torch.Generator
) -> Float[Tensor, "count 1 48 48"]:
    """Noise with so many digits, each of its class, in its crop, and of its side by number."""
    digits, labels = _digits(seed)[split]
    of_class = [torch.nonzero(labels == label)[:, 0] for label in range(ASKED_CLASSES)]
    canvas = NOISE * torch.randn(len(many), 1, CANVAS, CANVAS, generator=generator)
    for place, (number, side) in itertools.product(range(len(ASKED_SIDES)), enumerate(ASKED_SIDES)):
        rows = ((sides[:, place] == number) & (many > place)).nonzero()[:, 0]
        draw = torch.rand(len(rows), generator=generator).tolist()
        known = [of_class[c] for c in classes[rows, place].tolist()]
        chosen = torch.stack([own[int(d * len(own))] for d, own in zip(draw, known)])
        corners = SIDE * torch.stack([crops[rows, place] // 2, crops[rows, place] % 2], dim=1)
        corners = corners + torch.randint(SIDE - side + 1, (len(rows), 2), generator=generator)
        pasted = canvas[rows]
        _paste(pasted, _enlarged(digits[chosen], side), corners)
        canvas[rows] = pasted
    return canvas


class Asked(ImageClassification):
    """Classes as answers; who does not look at the image answers what is most frequent after the question."""

    def dummy_baseline(self, data: TaskData) -> float:
        """Accuracy of the commonest answer to each question."""
        known: Any = data.train
        asked: Any = data.test
        counts: dict[tuple[float, ...], Counter[int]] = {}
        for question, label in zip(_questions_of(known.tensors[0]), known.tensors[1].tolist()):
            counts.setdefault(question, Counter())[label] += 1
        best = {question: found.most_common(1)[0][0] for question, found in counts.items()}
        right = [
            best.get(question) == label
            for question, label in zip(_questions_of(asked.tensors[0]), asked.tensors[1].tolist())
        ]
        return sum(right) / len(right)


ANSWERING = Asked()


def _questions_of(images: Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in images[:, -1, 0, :2].tolist()]


# Trainings


@contextmanager
def without_exchange(model: Any) -> Iterator[nn.Module]:
    """Inside, crops do not see each other; afterwards each exchange begins as a copy of its layer's self-attention."""
    encoder = model.encoder
    exchange = getattr(encoder, "interact", None)
    if exchange is None:
        yield model
        return
    encoder.interact = None
    try:
        yield model
    finally:
        encoder.interact = exchange
        encoder.copy_attention()


def _but_the_vit(model: Any) -> list[nn.Parameter]:
    """What the last stage trains: all but the ViT."""
    vit = model.encoder.vit if isinstance(model.encoder, Compressed) else model.encoder
    frozen = set(vit.tower.parameters())
    return [parameter for parameter in model.parameters() if parameter not in frozen]


def in_stages(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    title: str = "",
) -> Fit:
    """As the paper trains: without exchange, and for the last third with it and with the ViT frozen; alike for all."""
    torch.manual_seed(seed)
    model = build().to(hardware.device)
    last = max(1, round(recipe.epochs / 3))
    short = None if recipe.max_steps is None else max(1, recipe.max_steps // 2)
    first = replace(recipe, epochs=max(1, recipe.epochs - last), max_steps=short)
    then = replace(recipe, epochs=last, max_steps=short)
    stages = [
        Stage("crops", task, data, first, without_exchange),
        Stage("exchange", task, data, then, partial(only, _but_the_vit)),
    ]
    done = run_stages(model, stages, seed=seed, hardware=hardware)[-1]
    model.eval()
    with torch.no_grad():
        return replace(done, model=model, metrics=task.evaluate(model, data.test))


class Named(nn.Module):
    """The tower of a variant's encoder, whose mean patch names what is in a crop."""

    def __init__(self, variant: Variant, num_classes: int):
        super().__init__()
        self.tower, self.head = tower_of(KINDS[variant.kind](variant)), nn.Linear(variant.dim, num_classes)

    def forward(self, crops: Float[Tensor, "batch 1 side side"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.tower(crops.expand(-1, 3, -1, -1)).last.patches.mean(dim=1))


def tower_of(encoder: Any) -> nn.Module:
    """The ViT of an encoder, without registers and what follows it."""
    return (encoder.vit if isinstance(encoder, Compressed) else encoder).tower


@lru_cache(maxsize=32)  # trained once a seed and shape of the tower, and taken over by every variant
def _on_crops(seed: int, short: bool, hardware: Hardware, dim: int, wider: int, recipe: Recipe) -> Mapping[str, Tensor]:
    """Weights of a tower that names digits in single crops, as FALCON's comes from SigLIP."""
    data = crop_digits(seed, short)
    recipe = replace(recipe, max_steps=2 if short else None)
    done: Any = fit(
        lambda: Named(Variant("recompact", dim, wider), data.options["num_classes"]),
        get_task("image-classification"),
        data,
        recipe,
        seed=seed,
        hardware=hardware,
        title="digits in crops",
    )
    return copy.deepcopy(done.model.tower).cpu().state_dict()


def _begun(build: Callable[[], nn.Module], recipe: Recipe, seed: int, hardware: Hardware) -> Callable[[], nn.Module]:
    """A variant whose tower names digits in crops, its exchange a copy of its attention."""
    first: Any = build()
    before = replace(ON_CROPS, precision=recipe.precision)
    variant, short = first.variant, recipe.max_steps is not None
    weights = _on_crops(seed, short, hardware, variant.dim, variant.wider, before)

    def begin() -> nn.Module:
        model: Any = build()
        tower_of(model.encoder).load_state_dict(weights)
        if getattr(model.encoder, "interact", None) is not None:
            model.encoder.copy_attention()
        return model

    return begin


def from_crops(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    title: str = "",
    train: Callable[..., Fit] = fit,
) -> Fit:
    """Trained by `train` from one tower a seed that names digits in crops."""
    begin = _begun(build, recipe, seed, hardware)
    return train(begin, task, data, recipe, seed=seed, hardware=hardware, title=title)


@lru_cache(maxsize=16)  # trained once a seed, and tuned in many ways
def _on_singles(seed: int, short: bool, hardware: Hardware, dim: int, recipe: Recipe) -> Mapping[str, Tensor]:
    """Weights of a network without exchange that tells single digits."""
    data = singles(seed, short)
    recipe = replace(recipe, max_steps=2 if short else None)
    done = fit(
        lambda: network(Variant("recompact", dim), **data.options),
        get_task("image-classification"),
        data,
        recipe,
        seed=seed,
        hardware=hardware,
        title="one digit in a crop",
    )
    return copy.deepcopy(done.model).cpu().state_dict()


BEFORE = RECIPE


def after_singles(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    title: str = "",
) -> Fit:
    """One network a seed that tells single digits, its exchange added as a copy, tuned with the ViT frozen."""
    first: Any = build()
    weights = _on_singles(seed, recipe.max_steps is not None, hardware, first.variant.dim, BEFORE)
    torch.manual_seed(seed)
    model: Any = build()
    own = model.state_dict()
    alike = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict({**own, **alike})
    model.encoder.copy_attention()
    model = model.to(hardware.device)
    stage = Stage("pairs", task, data, recipe, partial(only, _but_the_vit))
    done = run_stages(model, [stage], seed=seed, hardware=hardware)[-1]
    model.eval()
    with torch.no_grad():
        return replace(done, model=model, metrics=task.evaluate(model, data.test))


# Probes


def _right(model: nn.Module, data: TaskData) -> Tensor:
    """Whether each test image's likeliest class is right."""
    here = device_of(model)
    rows = [(model(images.to(here)).argmax(1).cpu() == labels).float() for images, labels in DataLoader(data.test, 256)]
    return torch.cat(rows)


def lost_at_seams(model: nn.Module, data: TaskData) -> float:
    """Accuracy on digits within a crop less that on digits across a seam."""
    right = _right(model, data)
    across = data.meta["straddles"][: len(right)]
    if across.all() or not across.any():
        return 0.0
    return float(right[~across].mean() - right[across].mean())


def accuracy_of(kind: str, model: nn.Module, data: TaskData) -> float:
    """Accuracy on questions of one kind."""
    right = _right(model, data)
    of_kind = data.meta["kinds"][: len(right)] == ASKED.index(kind)
    return float(right[of_kind].mean()) if of_kind.any() else 0.0
