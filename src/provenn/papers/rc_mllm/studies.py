"""Digits and their owners: does a decoder bind entries to what it sees by coordinates that are text?

A picture of 24×24 pixels has three digits (scikit-learn) of different classes in three of its nine cells. Each has an
entry in an order that is drawn: its number, its box in tenths of the picture, digit by digit, and a name of two
letters, a price, or both. What a digit looks like has a word of its own, from A for zero to J.

    [1](3063)ab$3;[2](0033)cd;[3](6396)$7;?En=E3063[1]ab;

- from looks to text: ?En, ?E$; from text to looks: ?ab; and both so that nothing answers them: !
- single steps: @3063n, and about the picture alone @3063# and ?E@
- about the picture alone: ?l and ?r, the digit on the left and on the right

Answers say where an object is before they say what is known of it, and are right where all of that is. Training reads
three questions about each scene after its entries, one about each digit, so that no answer stands in the text before.
A test asks one. There each text tells name and price, which no two entries share, so that a lot among the entries is
right in a third. Where a text leaves out what is asked, the two others tell it. Glyphs and names of a split are in no
other.

What sees is trained beforehand, as Qwen2-VL's tower is: a classifier of glyphs, whose word is added to what a projector
makes of the pixels.
"""

import copy
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from provenn.nn.decoder import Decoder, RotaryPositions
from provenn.nn.language import init_narrow
from provenn.nn.vision_language import VisionLanguageModel
from provenn.papers.rc_mllm.layers import PlacedProjector
from provenn.papers.rc_mllm.model import BASE, SMALL, start_looking
from provenn.tasks import Task, TaskData, fingerprint, get_task
from provenn.tasks.base import IGNORED, Scores, device_of
from provenn.training import Fit, Hardware, Recipe, Stage, run_stages

LETTERS = "abcdefghijkm"
LOOKS = "ABCDEFGHIJ"  # words of what the ten digits look like; numerals are of boxes and prices
CHARACTERS = "0123456789" + LETTERS + "[]()$?@#=;!.nlr" + LOOKS
PAD, IMAGE = len(CHARACTERS), len(CHARACTERS) + 1
SIDE, GLYPH = 24, 8  # a glyph is a cell, and a token
ROWS = SIDE // GLYPH
PATCHES = ROWS * ROWS
TENTHS = 10
DIGITS, LONGEST, TRAINED = 3, 68, 96  # digits of a scene; tokens of a row with one question, and with all
ANSWER = len("E3063[1]ab;")  # tokens of an answer at most
KINDS = ("plain", "box-look", "where", "box-fact", "V2C", "C2V", "V2C-none", "C2V-none")
SEEN = ("plain", "box-look", "where")  # about the picture alone
ASKED = ("V2C", "C2V")
COUNTS = {"train": 6000, "val": 150, "test": 300}  # scenes of the training; of the others, questions of each kind
ORDERS = 3
RECIPE = Recipe(
    epochs=21, batch_size=32, lr=3e-3, weight_decay=0.01, decay_vectors=False, schedule="cosine", warmup_steps=100,
    clip=1.0, betas=(0.9, 0.99),
)  # fmt: skip
PLAIN_SHARE = 0.25  # of the epochs: on the picture alone, before the tuning
SIGHT: dict[str, Any] = {"steps": 600, "batch": 64, "hidden": 32, "lr": 3e-3}  # of the classifier of glyphs
ONE_CPU = Hardware()
TOLD = re.compile(r"\[(\d)\]\((.{4})\)([a-m]{2})?(?:\$(\d))?;")  # an entry's number, box, name and price
CITED = re.compile(r"\[(\d)\]")


class Variant(NamedTuple):
    """How an entry says where its object is.

    Args:
        form: "boxes", "crops" or "marks".
        tuned: whether it is tuned on entries at all. Otherwise it goes on with pictures alone, for as many steps.
    """

    form: str
    tuned: bool = True


SYSTEM, GATE = Variant("boxes"), 0.5


class Scene(NamedTuple):
    """Three digits and their entries, in the order of the prompt."""

    labels: tuple[int, ...]
    glyphs: tuple[int, ...]
    corners: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    prices: tuple[str, ...]
    told: tuple[str, ...]  # n, $ or both


# Data


@lru_cache(maxsize=4)
def glyphs(split: str) -> tuple[Tensor, Tensor]:
    """Pictures (glyphs, 8, 8) and labels of the digits of a split, the same for every seed."""
    images, labels = getattr(get_task("image-classification").load("digits", seed=0), split).tensors
    return images[:, 0].float(), labels


def names_of(split: str) -> list[str]:
    """Two letters; each name is in one split.

    >>> len(set(names_of("train")) & set(names_of("test")))
    0
    """
    chosen = {"train": range(7), "val": (7,), "test": (8, 9)}[split]
    return [a + b for a in LETTERS for b in LETTERS if zlib.crc32((a + b).encode()) % 10 in chosen]


def draw_scene(split: str, draw: np.random.Generator) -> Scene:
    """Digits of three classes in three cells, and what is known of them."""
    _, labels = glyphs(split)
    cells = draw.permutation(PATCHES)[:DIGITS]
    corners = [(int(cell) % ROWS * GLYPH, int(cell) // ROWS * GLYPH) for cell in cells]
    classes = draw.permutation(10)[:DIGITS]
    chosen = tuple(int(draw.choice(np.flatnonzero(labels.numpy() == label))) for label in classes)
    known = names_of(split)
    names = tuple(known[k] for k in draw.permutation(len(known))[:DIGITS])
    prices = tuple(str(price) for price in draw.permutation(10)[:DIGITS])
    told = tuple(("n", "$", "n$")[k] for k in draw.integers(0, 3, DIGITS))
    return Scene(tuple(int(label) for label in classes), chosen, tuple(corners), names, prices, told)


def box_of(corner: tuple[int, int]) -> str:
    """Left, top, right and bottom in tenths of the picture, a character each."""
    edges = (corner[0], corner[1], corner[0] + GLYPH, corner[1] + GLYPH)
    return "".join(str(min(TENTHS - 1, edge * TENTHS // SIDE)) for edge in edges)


def ask(
    kind: str, scene: Scene, draw: np.random.Generator, split: str, about: int | None = None, key: str = ""
) -> tuple[str, str, int] | None:
    """Question, answer, and the entry whose box the question names (−1 for none); None where there is none.

    Args:
        kind: one of `KINDS`.
        scene, draw, split: what is asked about.
        about: which digit. Default: one that is drawn.
        key: what is asked of a text that tells it, n or $. Default: one that is drawn of what it tells.
    """
    k = int(draw.integers(DIGITS)) if about is None else about
    look, told, box = LOOKS[scene.labels[k]], scene.told[k], box_of(scene.corners[k])
    facts = {"n": scene.names[k], "$": scene.prices[k]}
    key = key or told[int(draw.integers(len(told)))]
    if kind == "plain":
        side, xs = "lr"[int(draw.integers(2))], [corner[0] for corner in scene.corners]
        most = min(xs) if side == "l" else max(xs)
        return None if xs[k] != most or xs.count(most) > 1 else (f"?{side}=", look, -1)
    if kind == "box-look":
        return "@*#=", look, k
    if kind == "where":
        return f"?{look}@=", f"{look}{box}", -1
    if kind == "box-fact":
        return f"@*{key}=", f"[{k + 1}]{facts[key]}", k
    if kind == "V2C":
        return f"?{look}{key}=", f"{look}{box}[{k + 1}]{facts[key]}", -1
    if kind == "V2C-none":
        return None if told == "n$" else (f"?{look}{'$' if told == 'n' else 'n'}=", f"{look}{box}!", -1)
    if kind == "C2V":
        return (f"?{facts['n']}=", f"[{k + 1}]{box}{look}", -1) if "n" in told else None
    others = [name for name in names_of(split) if name not in scene.names]
    return f"?{others[int(draw.integers(len(others)))]}=", "!", -1


class Row(NamedTuple):
    """An example as tokens: see `rows`."""

    tokens: list[int]
    targets: list[int]
    place: list[int]


def write(
    scene: Scene,
    question: str,
    answer: str,
    named: int,
    *,
    plain: bool = False,
    moved: bool = False,
    bare: bool = False,
) -> Row:
    """Tokens, targets, and of each coordinate its entry and edge (4 · entry + edge; −1 elsewhere).

    Args:
        scene, question, answer, named: see `ask`; `*` stands for a box.
        plain: whether entries are left out.
        moved: whether each entry has the box of the next.
        bare: whether boxes are left out.
    """
    row = Row([IMAGE] * PATCHES, [IGNORED] * PATCHES, [-1] * PATCHES)
    if not plain:
        _say_entries(row, scene, moved, bare)
    return _say_question(row, scene, question, answer, named, bare)


def _say(row: Row, text: str, scored: bool = False) -> None:
    numbers = [CHARACTERS.index(character) for character in text]
    row.tokens.extend(numbers)
    row.place.extend([-1] * len(text))
    row.targets.extend([IGNORED] * len(text))
    if scored:  # each token is what the one before it has to say
        row.targets[-len(text) - 1 : -1] = numbers


def _point(row: Row, scene: Scene, entry: int, bare: bool) -> None:
    text = "...." if bare else box_of(scene.corners[entry])
    _say(row, text)
    if not bare:
        row.place[-4:] = range(4 * entry, 4 * entry + 4)


def _say_entries(row: Row, scene: Scene, moved: bool, bare: bool) -> None:
    for entry, told in enumerate(scene.told):
        _say(row, f"[{entry + 1}](")
        _point(row, scene, (entry + 1) % DIGITS if moved else entry, bare)
        name = scene.names[entry] if "n" in told else ""
        price = f"${scene.prices[entry]}" if "$" in told else ""
        _say(row, f"){name}{price};")


def _say_question(row: Row, scene: Scene, question: str, answer: str, named: int, bare: bool = False) -> Row:
    before, star, after = question.partition("*")
    _say(row, before)
    if star:
        _point(row, scene, named, bare)
        _say(row, after)
    _say(row, answer + ";", scored=True)
    return row


@lru_cache(maxsize=8)
def talks(kinds: tuple[str, ...], count: int, split: str, seed: int) -> TensorDataset:
    """Scenes with a question about each digit, of kinds that are drawn; entries first, where a kind needs them.

    Args:
        kinds: of the questions, alike.
        count: how many scenes.
        split, seed: of the scenes.

    Returns:
        As `rows`; the number is 0.
    """
    draw = np.random.default_rng([seed, zlib.crc32(f"{kinds} {split}".encode())])
    parts: list[tuple[Tensor, ...]] = []
    while len(parts) < count:
        scene = draw_scene(split, draw)
        row = Row([IMAGE] * PATCHES, [IGNORED] * PATCHES, [-1] * PATCHES)
        if not set(kinds) <= set(SEEN):
            _say_entries(row, scene, False, False)
        for about in draw.permutation(DIGITS):
            found = None
            while found is None:
                found = ask(kinds[int(draw.integers(len(kinds)))], scene, draw, split, int(about))
            _say_question(row, scene, *found)
        parts.append(_tensors(row, scene, split, TRAINED, 0))
    return TensorDataset(*(torch.stack(column) for column in zip(*parts)))


def _tensors(row: Row, scene: Scene, split: str, longest: int, number: int) -> tuple[Tensor, ...]:
    fill = longest - len(row.tokens)
    pictures, _ = glyphs(split)
    return (
        torch.tensor(row.tokens + [PAD] * fill),
        torch.tensor(row.targets + [IGNORED] * fill),
        torch.tensor(row.place + [-1] * fill),
        paint(scene, split, False),
        paint(scene, split, True),
        torch.cat([cut(pictures[glyph]) for glyph in scene.glyphs]),  # a token each
        torch.tensor(number),
    )


def paint(scene: Scene, split: str, marked: bool) -> Tensor:
    """The picture as cells (9, 64); marked with a bar of two pixels a number above each digit."""
    pictures, _ = glyphs(split)
    canvas = torch.zeros(SIDE, SIDE)
    for number, (glyph, (x, y)) in enumerate(zip(scene.glyphs, scene.corners), 1):
        canvas[y : y + GLYPH, x : x + GLYPH] = pictures[glyph]
        if marked:
            canvas[y : y + GLYPH, x : x + GLYPH] = mark(pictures[glyph], number)
    return cut(canvas)


def mark(glyph: Tensor, number: int) -> Tensor:
    """A glyph whose first row is a bar of two pixels a number."""
    marked = glyph.clone()
    marked[0] = 0
    marked[0, : 2 * number] = 2.0
    return marked


def cut(picture: Tensor) -> Tensor:
    """Cells of 8×8 pixels, row by row."""
    return picture.unfold(0, GLYPH, GLYPH).unfold(1, GLYPH, GLYPH).flatten(0, 1).flatten(1)


@lru_cache(maxsize=64)  # a study asks for them once a trial, and so do its probes
def rows(kind: str, count: int, split: str, seed: int, control: str = "", orders: int = 1) -> TensorDataset:
    """Tokens, targets, places, cells, marked cells, crops (3, 64), and the number of the kind.

    Args:
        kind: one of `KINDS`.
        count: how many questions.
        split, seed: of the scenes.
        control: "moved", whose answers follow the boxes; "bare", without boxes; "looked up", whose entries are those of
            the nearest of ten references; "two tell", where one other text alone tells what is asked.
        orders: how many orders of the entries each question is asked in, one after the other; at most 3.
    """
    draw = np.random.default_rng([seed, zlib.crc32(f"{kind} {split} {control}".encode())])
    parts: list[tuple[Tensor, ...]] = []
    while len(parts) < count * orders:
        scene, about, key = draw_scene(split, draw), int(draw.integers(DIGITS)), "n$"[int(draw.integers(2))]
        scene = scene._replace(told=_telling(kind, control, about, key, draw))
        found = ask(kind, scene, draw, split, about, key)
        if found is None:
            continue
        for order in _orders(orders, draw):
            shown, question, answer, named = _ordered(scene, found, order)
            if control == "moved":
                answer = _followed(shown, answer)
            if control.startswith("looked up"):
                shown = looked_up(shown, split)
            row = write(
                shown, question, answer, named, plain=kind in SEEN, moved=control == "moved",
                bare=control.endswith("bare"),
            )  # fmt: skip
            parts.append(_tensors(row, shown, split, LONGEST, KINDS.index(kind)))
    return TensorDataset(*(torch.stack(column) for column in zip(*parts)))


def _telling(kind: str, control: str, about: int, key: str, draw: np.random.Generator) -> tuple[str, ...]:
    """What each text of a test tells: all, or two of them what is asked, and the third what is not.

    The third is that of the object that is asked about, or another one: texts alone do not say which.
    """
    if kind != "V2C-none" and control != "two tell":
        return ("n$",) * DIGITS
    silent = about if kind == "V2C-none" else (about + 1 + int(draw.integers(DIGITS - 1))) % DIGITS
    other = "$" if key == "n" else "n"
    return tuple(other if k == silent else (key, "n$")[int(draw.integers(2))] for k in range(DIGITS))


def _orders(count: int, draw: np.random.Generator) -> list[list[int]]:
    """One order, or further ones in which each entry stands at each place once."""
    first = draw.permutation(DIGITS).tolist()
    return [first[k:] + first[:k] for k in range(count)]


def _ordered(scene: Scene, found: tuple[str, str, int], order: Sequence[int]) -> tuple[Scene, str, str, int]:
    question, answer, named = found
    parts: list[Any] = [tuple(field[k] for k in order) for field in scene]
    shown = Scene(*parts)
    place = {old: new for new, old in enumerate(order)}
    answer = CITED.sub(lambda found: f"[{place[int(found[1]) - 1] + 1}]", answer)
    return shown, question, answer, place[named] if named >= 0 else -1


def _followed(scene: Scene, answer: str) -> str:
    """The answer of the entry that has the box now: each entry has that of the next."""
    where, number, said = CITED.split(answer)
    right = int(number) - 1
    entry = (right - 1) % DIGITS
    other = scene.names[entry] if said == scene.names[right] else scene.prices[entry]
    return f"{where}[{entry + 1}]{other}"


def looked_up(scene: Scene, split: str) -> Scene:
    """The scene whose texts are those of a library: each crop gets what is known of the class of its nearest reference.

    The library has one glyph of the training for each digit, and knows the right name and price of each class.
    """
    pictures, _ = glyphs(split)
    known, labels = references()
    told = dict(zip(scene.labels, zip(scene.names, scene.prices)))
    nobody = next(name for name in names_of(split) if name not in scene.names)
    other = nobody, next(price for price in "0123456789" if price not in scene.prices)  # of a class that is not shown
    found = []
    for glyph in scene.glyphs:
        crop = F.normalize(pictures[glyph].flatten() - pictures[glyph].mean(), dim=0)
        found.append(told.get(int(labels[int((known @ crop).argmax())]), other))
    names, prices = zip(*found)
    return scene._replace(names=names, prices=prices)


@lru_cache(maxsize=1)
def references() -> tuple[Tensor, Tensor]:
    """One glyph of the training for each digit, as vectors of length 1."""
    pictures, labels = glyphs("train")
    first = [int((labels == label).nonzero()[0]) for label in range(10)]
    flat = pictures[first].flatten(1)
    return F.normalize(flat - flat.mean(1, keepdim=True), dim=1), labels[first]


def binding_data(seed: int, smoke: bool) -> TaskData:
    """All kinds of questions alike. The validation has both directions, and pictures alone for what is not tuned.

    The test has both directions, each question in three orders of its entries.
    """
    return _data(seed, smoke, KINDS)


def plain_data(seed: int, smoke: bool) -> TaskData:
    """Questions about the picture alone."""
    return _data(seed, smoke, SEEN)


@lru_cache(maxsize=4)
def _data(seed: int, smoke: bool, kinds: tuple[str, ...]) -> TaskData:
    parts: dict[str, list[TensorDataset]] = {"train": [talks(kinds, 24 if smoke else COUNTS["train"], "train", seed)]}
    for split in ("val", "test"):
        few = 12 if smoke else COUNTS[split]
        tested = kinds if "V2C" not in kinds else (*ASKED, *SEEN) if split == "val" else ASKED
        parts[split] = [rows(kind, few, split, seed, "", ORDERS if split == "test" else 1) for kind in tested]
    tensors = [tensor for some in parts.values() for part in some for tensor in part.tensors]
    train, val, test = (ConcatDataset[Any](parts[split]) for split in COUNTS)
    return TaskData("digits and owners", train, val, test, fingerprint(*tensors))


class Bindings(Task):
    """Are answers right, citation and all? The metric is the mean of both directions.

    Of questions about pictures alone among these, which are there to choose a rate, it is the mean where nothing was
    tuned: in both directions such a model has 0 at every rate.
    """

    name, metric, higher_is_better = "digits-and-owners", "accuracy", True
    embedded = {"digits and owners": "three digits with entries, and questions that need both"}  # noqa: RUF012
    reads = "nothing of a user's own"

    def load(self, source: str | Path, *, seed: int = 0, **options: Any) -> TaskData:
        return binding_data(seed, False)

    def loss(self, model: Any, batch: Any) -> Tensor:
        width = int((batch[0] != PAD).any(dim=0).sum())  # rows are filled up to the longest that may be
        tokens, targets, place = (part[:, :width] for part in batch[:3])
        return F.cross_entropy(model(tokens, targets, place, *batch[3:6]).mT, targets, ignore_index=IGNORED)

    def scores(self, model: Any, dataset: Any, batch_size: int = 256) -> Scores:
        right, kinds = [], []
        for batch in DataLoader(dataset, batch_size=batch_size):
            *inputs, kind = (part.to(device_of(model)) for part in batch)
            told, wanted = model(*inputs).argmax(dim=-1), inputs[1]
            right.append(((told == wanted) | (wanted == IGNORED)).all(dim=1).double().cpu())
            kinds.append(kind.cpu())
        tuned = np.full(len(dataset), getattr(model, "variant", SYSTEM).tuned)
        return {"right": torch.cat(right).numpy(), "kind": torch.cat(kinds).numpy(), "tuned": tuned}

    def summary(self, scores: Scores) -> dict[str, float]:
        found = {
            kind: float(scores["right"][scores["kind"] == number].mean())
            for number, kind in enumerate(KINDS)
            if (scores["kind"] == number).any()
        }
        kinds = (ASKED, SEEN) if scores["tuned"].all() else (SEEN, ASKED)
        named = [[found[kind] for kind in some if kind in found] for some in kinds]
        counted = named[0] or named[1] or list(found.values())
        return {self.metric: float(np.mean(counted)), **found}

    def dummy_baseline(self, data: TaskData) -> float:
        """The best of the rules that bind nothing in each direction, on the test itself: see `right_by_rules`."""
        parts = getattr(data.test, "datasets", [data.test])
        return float(np.mean([max(right_by_rules(part).values()) for part in parts]))


def right_by_rules(asked: TensorDataset) -> dict[str, float]:
    """The share of questions that rules which bind nothing answer rightly, with the answers of these questions known.

    What a rule takes for the object's entry it reads rightly: its box, its fact, and what is to be seen there.

    Args:
        asked: questions of one kind, from looks to texts or from texts to looks.

    Returns:
        Of a lot among the entries, of the entry at each place, of the entry whose text has most of the question's
        characters, and of the commonest answer. To looks, which no text tells, the nearest text brings a lot.
    """
    found: dict[str, list[float]] = {}
    said = [said_in(row) for row in asked.tensors[1]]
    for text, answer in zip(map(said_in, asked.tensors[0]), said):
        question = text.partition("?")[2].partition("=")[0]
        right, overlap = [], []
        for number, box, name, price in TOLD.findall(text):
            fact = name if question[-1] == "n" else price
            told = (f"{question[:1]}{box}[{number}]{fact};", f"[{number}]{box}{answer[-2:]}")
            right.append(float(answer in told))
            overlap.append(sum(character in name + price for character in question[-2:]))
        rules = {"a lot": float(np.mean(right)), **{f"entry {k}": value for k, value in enumerate(right, 1)}}
        nearest = right[int(np.argmax(overlap))]
        rules["nearest text"] = nearest / DIGITS if answer.startswith("[") else nearest
        for rule, value in rules.items():
            found.setdefault(rule, []).append(value)
    commonest = max(map(said.count, set(said))) / len(said)
    return {**{rule: float(np.mean(values)) for rule, values in found.items()}, "commonest answer": commonest}


def said_in(tokens: Tensor) -> str:
    """The characters of tokens; pictures, padding and what is not scored are none.

    >>> said_in(torch.tensor([IMAGE, 1, 10, PAD, IGNORED]))
    '1a'
    """
    return "".join(CHARACTERS[token] for token in tokens.tolist() if 0 <= token < len(CHARACTERS))


TASK = Bindings()


# Networks and trainings


@lru_cache(maxsize=1)
def sight() -> nn.Module:
    """A classifier of cells (…, 64) into the ten digits and an empty cell, trained on glyphs of the training, frozen.

    Half of the glyphs that it learns have a mark, in a form of entries that shows them. It is the same for every seed.
    """
    pictures, labels = glyphs("train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = SIGHT["hidden"]
        net = nn.Sequential(nn.Linear(GLYPH * GLYPH, width), nn.GELU(), nn.Linear(width, len(LOOKS) + 1))
        optimizer = torch.optim.AdamW(net.parameters(), lr=SIGHT["lr"])
        for step in range(SIGHT["steps"]):
            chosen = torch.randint(len(pictures), (SIGHT["batch"],)).tolist()
            shown = [mark(pictures[k], 1 + n % 3) if n % 2 else pictures[k] for n, k in enumerate(chosen, step)]
            cells, wanted = torch.stack([torch.zeros(GLYPH, GLYPH), *shown]).flatten(1), labels[chosen]
            loss = F.cross_entropy(net(cells), torch.cat([torch.tensor([len(LOOKS)]), wanted]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


class Binder(VisionLanguageModel):
    """A small decoder that reads entries in the form of its variant.

    A cell's token is W f(x) + PlacedProjector(x): f are `sight`'s probabilities, and W starts as the words of looks.

    Shapes: tokens, targets and places (batch, tokens), cells and marked cells (batch, 9, 64) and crops (batch, 3, 64)
    to logits (batch, tokens, vocab).
    """

    projector: Any  # a `PlacedProjector`

    def __init__(self, variant: Variant):
        decoder = init_narrow(Decoder(len(CHARACTERS), rotary=RotaryPositions(BASE), **SMALL))
        width = SMALL["dim"]
        super().__init__(decoder, projector=PlacedProjector(GLYPH * GLYPH, width, PATCHES), image_token=IMAGE)
        self.projector.start()  # a vision-language model starts projectors as large ones have them
        start_looking(self.decoder)
        self.variant = variant
        self.sight, self.looks = copy.deepcopy(sight()), nn.Linear(len(LOOKS) + 1, width, bias=False)
        words = [CHARACTERS.index(character) for character in f"{LOOKS}."]
        with torch.no_grad():
            self.looks.weight.copy_(self.decoder.embed.weight[words].T)

    def forward(  # type: ignore[override]  # takes what every form of entries needs
        self, tokens: Tensor, targets: Tensor, place: Tensor, cells: Tensor, marked: Tensor, crops: Tensor
    ) -> Float[Tensor, "batch tokens vocab"]:
        form, named, mask = self.variant.form, place >= 0, tokens != PAD
        shown = marked if form == "marks" else cells
        features, sizes = (self.projector(shown) + self.words(shown)).flatten(0, 1), [PATCHES] * len(tokens)
        if form != "boxes":  # an entry says by one token what it is about
            number, first = place.clamp_min(0) // 4, named & (place % 4 == 0)
            tokens = tokens.masked_fill(named & ~first, CHARACTERS.index("."))
            if form == "marks":
                tokens = torch.where(first, number + 1, tokens)  # the number that the picture shows
            else:
                pieces = (self.projector.inner(self.projector.norm(crops)) + self.words(crops))[
                    torch.arange(len(tokens), device=tokens.device)[:, None], number
                ]
                placed = tokens == IMAGE
                every = torch.zeros_like(pieces).masked_scatter(placed[..., None], features)
                tokens = tokens.masked_fill(first, IMAGE)
                features = torch.where(first[..., None], pieces, every)[tokens == IMAGE]
                sizes = [size for count in first.sum(1).tolist() for size in (PATCHES, *[1] * count)]
        reading = self.read_features(tokens.masked_fill(~mask, 0), features, sizes, mask=mask)
        return self.decoder.logits(reading.hidden)

    def words(self, cells: Tensor) -> Tensor:
        """The word of what each cell shows."""
        return self.looks(self.sight(cells).softmax(-1))


def network(variant: Variant) -> nn.Module:
    return Binder(variant)


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
    """Pictures alone first; then all kinds of questions, or pictures alone for as many steps where it is not tuned."""
    torch.manual_seed(seed)
    model: Any = build()
    short = recipe.max_steps is not None
    plain = replace(recipe, epochs=max(1, round(PLAIN_SHARE * recipe.epochs)))
    pictures = plain_data(seed, short)
    further = replace(recipe, epochs=max(1, recipe.epochs - plain.epochs))
    begin = Stage("pictures alone", task, pictures, plain)
    then = Stage("tuning", task, data, further) if model.variant.tuned else replace(begin, recipe=further)
    *_, done = (run_stages(model, [stage], seed=seed, hardware=hardware)[-1] for stage in (begin, then))
    return done if model.variant.tuned else replace(done, metrics=task.evaluate(done.model.eval(), data.test))


# Probes


def _probed(kind: str, data: TaskData, control: str = "", orders: int = 1) -> TensorDataset:
    """Rows of the test. They are drawn anew, as many as the test has of a kind."""
    parts = getattr(data.test, "datasets", [data.test])
    count = COUNTS["test"] if len(parts[0]) >= COUNTS["test"] else 12
    return rows(kind, count, "test", 0, control, orders)


@torch.no_grad()
def accuracy_of(kind: str, control: str, model: Any, data: TaskData) -> float:
    """The share of right answers to questions of a kind, under a control."""
    return TASK.evaluate(model, _probed(kind, data, control))[kind]


@torch.no_grad()
def answers_to(model: Any, asked: TensorDataset) -> list[tuple[str, str]]:
    """What a model writes, token after token, to each question, and the right answer, both up to the semicolon."""
    device = device_of(model)
    tokens, targets, *others = (part.to(device) for part in asked.tensors[:6])
    scored = targets != IGNORED
    begins = scored.int().argmax(dim=1)
    at = torch.arange(len(tokens), device=device)
    tokens = tokens.clone()
    tokens[:, 1:][scored[:, :-1]] = CHARACTERS.index(";")  # nothing of the right answer is read
    said = torch.empty(len(tokens), ANSWER, dtype=torch.long, device=device)
    for step in range(ANSWER):
        said[:, step] = model(tokens, targets, *others)[at, begins + step].argmax(dim=-1)
        tokens[at, begins + step + 1] = said[:, step]
    return [(said_in(row).partition(";")[0], said_in(wanted).partition(";")[0]) for row, wanted in zip(said, targets)]


def citation_f1(model: Any, data: TaskData) -> float:
    """F1 of the citation over all kinds that the tuning has."""
    right = given = wanted = 0
    for kind in ("V2C", "C2V", "V2C-none", "C2V-none"):
        for answer, asked in answers_to(model, _probed(kind, data)):
            cited, due = set(CITED.findall(answer)), set(CITED.findall(asked))
            right, given, wanted = right + len(cited & due), given + len(cited), wanted + len(due)
    return 2 * right / (given + wanted) if given + wanted else 0.0


@torch.no_grad()
def kept_over_orders(model: Any, data: TaskData) -> float:
    """Of questions to texts that are right in an order of the entries, the share that is right in another, too.

    Each entry stands at each of the three places once. Who takes the entry at a place keeps nothing, a lot a third.
    """
    right = TASK.scores(model, _probed("V2C", data, "", ORDERS))["right"].reshape(-1, ORDERS).sum(axis=1)
    return float((right * (right - 1)).sum() / ((ORDERS - 1) * right.sum())) if right.any() else 0.0


def refused(model: Any, asked: TensorDataset) -> float:
    """The share of questions whose answers refuse."""
    return float(np.mean(["!" in answer for answer, _ in answers_to(model, asked)]))


def answered_falsely(model: Any, data: TaskData) -> float:
    """The share of unanswerable questions that are answered."""
    return 1 - float(np.mean([refused(model, _probed(kind, data)) for kind in ("V2C-none", "C2V-none")]))


def refusals_in_place(model: Any, data: TaskData) -> float:
    """The share of questions to texts that is refused where the object's text leaves out what is asked, less where not.

    In both two texts of three tell it, so that a rule which counts texts refuses as many.
    """
    return refused(model, _probed("V2C-none", data)) - refused(model, _probed("V2C", data, "two tell"))


def half_at_least(probe: Callable[[Any, TaskData], float], model: Any, data: TaskData) -> float:
    """A probe's share, of a baseline half at least: being near to what binds nothing would say nothing."""
    share = probe(model, data)
    return share if model.variant == SYSTEM else max(share, GATE)


def entry_and_fact(model: Any, data: TaskData) -> float:
    """The share of questions to texts whose answers cite the right entry and tell its fact, wherever they see it.

    Boxes stand in entries as text or do not, so that to write one is not the same work in every form.
    """
    said = answers_to(model, _probed("V2C", data))
    return float(np.mean([answer.partition("[")[2] == asked.partition("[")[2] for answer, asked in said]))


def about_pictures(model: Any, data: TaskData) -> float:
    """The mean accuracy of the three kinds of questions about the picture alone."""
    return float(np.mean([accuracy_of(kind, "", model, data) for kind in SEEN]))


@torch.no_grad()
def lookup_gain(model: Any, data: TaskData) -> float:
    """Accuracy with entries that were looked up and their boxes, less that of the same texts alone, chance at least."""
    with_boxes = accuracy_of("V2C", "looked up", model, data)
    return with_boxes - max(accuracy_of("V2C", "looked up bare", model, data), 1 / DIGITS)
