"""Data, networks and probes of RCAR's experiments: grids of digits, and captions of which most words say nothing.

An image is a grid of 3×3 handwritten digits (scikit-learn), given as nine regions of 70 numbers: 64 pixels with noise,
and where the region lies. A caption states three of the nine in any order, each as a digit, a row and a column, with
fillers between. No glyph is in two splits. It is a task for attention, and no language: three facts leave about one
other image in a thousand that they are true of as well.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.cost import macs
from provenn.core.narrowing import of_kind
from provenn.papers.rcar.encoders import RegionEncoder, WordEncoder
from provenn.papers.rcar.hosts import Host, Similarity
from provenn.papers.rcar.layers import Mode
from provenn.papers.rcar.model import Matching
from provenn.papers.rcar.rivals import AttentionPooling, FixedFactors, Pooled
from provenn.tasks import TaskData, fingerprint
from provenn.tasks.base import Scores
from provenn.tasks.embedded import SPECIAL, Vocabulary
from provenn.tasks.image_text_retrieval import CaptionPairs, Gallery, ImageTextRetrieval, join_pairs
from provenn.tasks.matching import chance, match, recalls

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
FILLERS = (
    "there", "is", "a", "photo", "of", "some", "which", "shows", "quite", "nice", "and", "also", "perhaps", "here",
    "today", "see", "very", "plain", "little", "thing",
)  # fmt: skip
FACTS = 3  # of a caption
NOISE = 0.2  # deviation, where a pixel is 0…1
FOLD = 200  # images that are searched at a time
COUNTS = {"train": 6400, "val": 2 * FOLD, "test": 5 * FOLD}
SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}  # of the glyphs of each digit
FEW, MANY = (0, 2), (2, 5)  # fillers before each fact and at the end
DIM, ALIGN = 32, 16  # d and m
BATCH, STEPS = 16, 1200
CELLS, WORDS = 9, 15  # of a pair, for counts
RIDGE = 10.0
SHOWN = 100  # test pairs that a probe looks at
META = {"pad": 0, "longest": 60, "size": 8, "mean": [0.5] * 3, "std": [0.25] * 3}


class Grids(ImageTextRetrieval):
    """The same task, judged by the mean of R@1 both ways, in folds of 200 images."""

    metric = "r1"

    def summary(self, scores: Scores) -> dict[str, float]:
        """With `r1`, the mean of `text_r1` and `image_r1`."""
        return with_r1(recalls(scores["text_rank"], scores["image_rank"]))

    def dummy_baseline(self, data: TaskData) -> float:
        """The better `r1` of chance and of `pooled_rule`."""
        return max(with_r1(chance(FOLD, 1))["r1"], pooled_rule(data))


def with_r1(found: Any) -> dict[str, float]:
    """Recalls and the mean of R@1 both ways."""
    return {**found, "r1": (found["text_r1"] + found["image_r1"]) / 2}


TASK = Grids()


def words() -> Vocabulary:
    """All words of the captions."""
    return Vocabulary([*SPECIAL, *NUMERALS, *ROWS, *COLUMNS, *FILLERS])


@lru_cache(maxsize=1)
def glyphs() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (glyphs, 64) of scikit-learn's digits in 0…1, and what each is."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.data / 16).astype(np.float32), digits.target


def drawn(split: str, seed: int, count: int, fillers: tuple[int, int]) -> tuple[np.ndarray, list[list[list[int]]]]:
    """Images (count, 9, 70), and a caption of each.

    Args:
        split: whose glyphs they have.
        seed: of the drawing.
        count: how many.
        fillers: the fewest and the most before each fact and at the end.
    """
    rng = np.random.default_rng([seed, list(SHARES).index(split), 23])
    pixels, labels = glyphs()
    low, high = SHARES[split]
    of_digit = [np.flatnonzero(labels == digit) for digit in range(10)]
    known = [places[round(low * len(places)) : round(high * len(places))] for places in of_digit]
    digits = rng.integers(10, size=(count, CELLS))
    chosen = np.array([[known[d][rng.integers(len(known[d]))] for d in row] for row in digits])
    seen = pixels[chosen] + rng.normal(0, NOISE, (count, CELLS, 64))
    where = np.concatenate([np.repeat(np.eye(3), 3, 0), np.tile(np.eye(3), (3, 1))], 1)
    features = np.concatenate([seen, np.broadcast_to(where, (count, CELLS, 6))], 2).astype(np.float32)
    vocabulary = words()
    captions = []
    for row in digits:
        said: list[str] = []
        for cell in rng.permutation(CELLS)[:FACTS]:
            said += _some_fillers(fillers, rng)
            said += [NUMERALS[row[cell]], ROWS[cell // 3], COLUMNS[cell % 3]]
        said += _some_fillers(fillers, rng)
        captions.append([[vocabulary.start, *(vocabulary.numbers[word] for word in said), vocabulary.end]])
    return features, captions


def _some_fillers(fillers: tuple[int, int], rng: np.random.Generator) -> list[str]:
    count = int(rng.integers(fillers[0], fillers[1] + 1))
    return [FILLERS[int(number)] for number in rng.integers(len(FILLERS), size=count)]


def grids(fillers: tuple[int, int], seed: int, smoke: bool) -> TaskData:
    """Grids with captions.

    Args:
        fillers: before each fact and at the end.
        seed: of images, captions and noise.
        smoke: whether there are few.
    """
    meta: dict[str, Any] = {**META, "words": words().words, "features": 70}
    sets = {}
    for split, count in COUNTS.items():
        features, captions = drawn(split, seed, 2 * BATCH if smoke else count, fillers)
        sets[split] = Gallery(features, captions, meta, folds=1 if split == "train" or smoke else count // FOLD)
    return TaskData(
        "grids",
        CaptionPairs(sets["train"]),
        sets["val"],
        sets["test"],
        fingerprint=fingerprint(*(of_kind(g.images, np.ndarray, "images") for g in sets.values())),
        options={"vocab_size": len(meta["words"]), "features": 70},
        meta=meta,
        collate=join_pairs(0),
    )


few, many = partial(grids, FEW), partial(grids, MANY)


def pooled_rule(data: TaskData) -> float:
    """`r1` of ridge regression from the mean region of an image to the words of its caption, compared by the cosine."""
    train, test = of_kind(data.train, CaptionPairs, "train").gallery, of_kind(data.test, Gallery, "test")
    size = len(train.meta["words"])
    x, asked = (torch.from_numpy(of_kind(g.images, np.ndarray, "images").mean(1)) for g in (train, test))
    bags, wanted = (_bags(g, size) for g in (train, test))
    mean, std, centre = x.mean(0), x.std(0) + 1e-6, bags.mean(0)
    x, asked = (x - mean) / std, (asked - mean) / std
    weights = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1]), x.T @ (bags - centre))
    predicted, wanted = F.normalize(asked @ weights, dim=1), F.normalize(wanted - centre, dim=1)
    parts = zip(predicted.split(FOLD), wanted.split(FOLD))
    found = [match(one @ other.T, torch.arange(len(one))) for one, other in parts]
    texts, images = (torch.cat([getattr(part, name) for part in found]).numpy() for name in ("text_rank", "image_rank"))
    return with_r1(recalls(texts, images))["r1"]


def _bags(gallery: Gallery, size: int) -> Float[Tensor, "images words"]:
    bags = torch.zeros(len(gallery), size)
    for row, texts in enumerate(gallery.tokens):
        bags[row, torch.tensor(texts[0])] = 1
    return bags


class Variant(NamedTuple):
    """A similarity in the same encoders.

    Args:
        rcr, rar: steps.
        host, mode, temperature, lse: see `Similarity`.
        align_dim: m.
        tied: whether steps share their weights.
        kind: "", "fixed" for factors that see nothing, "pooling" for attention pooling in RAR's place, "pooled" for
            mean tokens.
        hidden: of attention pooling.
        warm: batches before hardest negatives, as a share of all.
    """

    rcr: int = 0
    rar: int = 0
    host: Host = "mean"
    mode: Mode = "t2i"
    temperature: float | None = None
    lse: float = 6.0
    align_dim: int = ALIGN
    tied: bool = False
    kind: str = ""
    hidden: int = 0
    warm: float = 0.75

    def similarity(self) -> Similarity:
        """Of this variant."""
        made = Similarity(
            self.mode,
            rcr=self.rcr,
            rar=self.rar,
            host=self.host,
            embed_dim=DIM,
            align_dim=self.align_dim,
            temperature=self.temperature,
            lse=self.lse,
            tied=self.tied,
            regions=CELLS,
        )
        if self.kind == "fixed":
            made.regulate = nn.ModuleList(FixedFactors(self.align_dim, DIM) for _ in range(self.rcr))
        if self.kind == "pooling":
            made.aggregate = nn.ModuleList([AttentionPooling(self.align_dim, self.hidden)])
        return made


def network(variant: Variant, vocab_size: int, features: int) -> Matching:
    """The system of a variant: all have the same encoders."""
    kind = Pooled if variant.kind == "pooled" else Matching
    return kind(
        RegionEncoder(features, DIM, DIM // 2),
        WordEncoder(vocab_size, DIM, word_dim=32, dropout=0.1),
        variant.similarity(),
        warm_up=round(variant.warm * STEPS),
        touched=0.0,
    )


def operations(variant: Variant) -> int:
    """Multiply-adds of one pair: nine regions, and fifteen words."""
    with torch.device("meta"):
        similarity = variant.similarity().eval()
        regions, said = torch.zeros(1, CELLS, DIM), torch.zeros(1, WORDS, DIM)
    return macs(lambda: similarity(regions, said))


# Probes


@torch.no_grad()
def seen_words(model: nn.Module, data: TaskData) -> list[tuple[Tensor, Any]]:
    """Of each of the first test pairs, which words are facts (1), fillers (0) or neither (−1), and its steps."""
    network, gallery = of_kind(model, Matching, "model").cpu(), of_kind(data.test, Gallery, "test")
    vocabulary = Vocabulary(gallery.meta["words"])
    fillers = {vocabulary.numbers[word] for word in FILLERS}
    special = {vocabulary.start, vocabulary.end}
    found = []
    for row in range(min(SHOWN, len(gallery))):
        image, regions = gallery.image(row)
        tokens = torch.tensor(gallery.tokens[row][0])
        vectors = [
            network.encode_images(image[None], regions[None])[0][0],
            network.encode_texts(tokens[None])[0][0],
        ]
        of = torch.tensor([-1 if t in special else int(t not in fillers) for t in tokens.tolist()])
        found.append((of, network.matcher.steps_of(*vectors)[1]))
    return found


def sharper_for_facts(model: nn.Module, data: TaskData) -> float:
    """The mean λ of words of facts, as a share of its sum with that of fillers, at the last attention; ½ where both
    are 0."""
    facts, fillers = [], []
    for of, steps in seen_words(model, data):
        facts.append(steps[-1].temperature[of == 1])
        fillers.append(steps[-1].temperature[of == 0])
    high, low = (float(torch.cat(each).mean()) for each in (facts, fillers))
    return high / (high + low) if high + low else 0.5


def ratios(model: nn.Module, data: TaskData) -> list[float]:
    """The mean β of words of facts over that of fillers, after each step of RAR."""
    kept: list[list[list[Tensor]]] = []
    for of, weights in aggregated_words(of_kind(model, Matching, "model"), data):
        for step, row in enumerate(weights):
            if step == len(kept):
                kept.append([[], []])
            for kind in (0, 1):
                kept[step][kind].append(row[of == kind])
    return [float(torch.cat(facts).mean()) / max(float(torch.cat(others).mean()), 1e-9) for others, facts in kept]


def aggregated_words(network: Matching, data: TaskData) -> list[tuple[Tensor, list[Tensor]]]:
    """Of each of the first test pairs the kind of each word, and β after each step of RAR."""
    rows: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, given, output: rows.append(output.weights[0, 0].detach()))
        for module in dict.fromkeys(network.matcher.aggregate)  # once each, where steps share their weights
    ]
    try:
        found, kinds = [], seen_words(network, data)
    finally:
        for hook in hooks:
            hook.remove()
    per_pair = len(rows) // max(1, len(kinds))
    for number, (of, _) in enumerate(kinds):
        found.append((of, rows[number * per_pair : (number + 1) * per_pair]))
    return found


def growth(model: nn.Module, data: TaskData) -> float:
    """By how much the ratio of β on facts to β on fillers grows from the first step of RAR to the last; 0 without."""
    found = ratios(model, data)
    return found[-1] - found[0] if found else 0.0
