"""The data of region-level context tuning, made from tables of facts and composed scenes: every sample is a record.

The authors have GPT write texts about annotated boxes, and filter them. Here each object of a scene gets an owner, a
place and a price; two of the three stand in its text, in words that are drawn. The right answer follows from them.

- V2C: an object by its looks, the answer in its text. V2C-none: the fact that its text leaves out.
- C2V: an object by its text, the answer in the picture. C2V-none: by a fact of another sample, which no entry has.
- RCID: a description with the facts and citations. MCCG: citations for a description that is given.
- Single steps, for training: what is at a box, whose it is, and where an object is.

Answerable and unanswerable questions have the same wording. Names of a split are in no other.

Tiles are simpler scenes for a small model. (ours) Objects lie in a grid of 3×3, and each text tells one fact. In half
of the scenes all facts are of one key; in the others one object's is of another. No question is answered by what alone
is of its key. A scene has several questions, which training reads as one conversation. Answers say first which object
is meant, as Qwen2-VL writes it, and which entry:
`<|object_ref_start|>red disc<|object_ref_end|><|box_start|>(125,375),(359,609)<|box_end|> [2] ada stone`. Each step of
the way is then a step of writing: from a name to a box, from the box to its entry.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from provenn.core.box_text import write_box
from provenn.data.composed import (
    COLOURS,
    GLYPHS,
    GROUNDS,
    NOUNS,
    NUMERALS,
    Composed,
    Split,
    Thing,
    _scene,
    composed_scenes,
    pairs_of,
)
from provenn.data.composed import SIDE as SCENE
from provenn.papers.rc_mllm.protocol import (
    CONVENTION,
    KINDS,
    WHOLE,
    Entry,
    RegionContext,
    Sample,
    reorder,
    without_citations,
)

FIRST = ("ada", "ben", "cleo", "dan", "eva", "finn", "gus", "hana")
LAST = ("stone", "hill", "reed", "moss", "field", "brook", "lane", "wood")
PLACES = ("kitchen", "garden", "office", "attic", "cellar", "garage", "library", "studio")
COSTS = tuple(f"{price} coins" for price in range(10, 100, 5))
KEYS = ("owner", "place", "cost")
SAYS = {  # paraphrases of each fact
    "owner": ("it belongs to {}", "its owner is {}"),
    "place": ("it is from the {}", "it was found in the {}"),
    "cost": ("it cost {}", "its price was {}"),
}
ASKS = {"owner": "who owns the {} ?", "place": "where is the {} from ?", "cost": "what did the {} cost ?"}
KNOWN_BY = {"owner": "the object of {}", "place": "the object from the {}", "cost": "the object that cost {}"}
LOOKS = {"colour": "what colour is {} ?", "noun": "what is {} ?"}
WHERE = "where in the image is the {} ?"
NAMED = tuple(  # questions that name an object, by its looks or by a fact
    re.compile(re.escape(text).replace(r"\{\}", "(.+)"))
    for text in (*ASKS.values(), WHERE, *(look.format(known) for look in LOOKS.values() for known in KNOWN_BY.values()))
)
NO_FACT = "cannot be answered . the description does not say it"
NO_OBJECT = "the object is not in the image"
DESCRIBE = "describe the image ."
ADD = "add citations : {}"
STEPS = ("box-look", "box-fact", "look-box")
ORDERS = 3  # of the entries of each prompt that is scored
OBJECTS = (2, 3)  # the fewest and the most of a scene
GENERAL = 0.7  # share of the samples whose entries say no more than digit or shape
TILES, FIRST_TILE, PITCH, TILE = 3, 8, 16, 15  # tiles a side; in pixels the first one's edge, their distance and size
ASKED = ("V2C", "C2V", "V2C-none", "C2V-none")  # kinds of a test on tiles
# Of a training on them, in their shares.
MIX = (*ASKED, "V2C", "C2V", "C2V", "C2V-none", "box-fact", "box-look", "look-box", "look-box")
SHARE = {"train": (2, 3), "val": (1,), "test": (0,)}  # of names, by the sum of their numbers modulo 4


class Facts(NamedTuple):
    """What is known of an object: all three facts, the keys that its text tells, and the text."""

    values: dict[str, str]
    told: tuple[str, ...]
    text: str


def names_of(split: Split) -> tuple[str, ...]:
    """The names of a split, of two words that are known from the training.

    >>> len(names_of("train")), len(names_of("test")), len(set(names_of("train")) & set(names_of("test")))
    (32, 16, 0)
    """
    return tuple(
        f"{first} {last}" for i, first in enumerate(FIRST) for j, last in enumerate(LAST) if (i + j) % 4 in SHARE[split]
    )


def values() -> tuple[str, ...]:
    """All values that a fact may have."""
    return (*(f"{first} {last}" for first in FIRST for last in LAST), *PLACES, *COSTS)


@cache
def build_samples(
    split: Split,
    seed: int = 0,
    count: int | None = None,
    *,
    names: Split | None = None,
    kinds: tuple[str, ...] = (*KINDS, *STEPS[:2]),
    cite: bool = True,
    same_category: bool = False,
    orders: int = 1,
) -> tuple[UInt8[np.ndarray, "scenes side side 3"], tuple[Sample, ...]]:
    """Scenes as pixels, and samples of every kind about each, with their entries in an order that is drawn.

    Args:
        split, seed, count: of the scenes, as in `composed_scenes`. Their pairs of words are those of the training.
        names: whose names are used. Default: `split`.
        kinds: of the questions about each scene; single steps are such a kind.
        cite: whether answers cite, and prompts ask for it.
        same_category: keep the scenes alone in which every entry has the same category.
        orders: how many orders of the entries each sample is given in, one after the other.

    >>> pixels, samples = build_samples("val", count=2)
    >>> len(pixels), samples[0].kind, len(samples[0].entries) > 1
    (2, 'V2C', True)
    """
    scenes = composed_scenes(split, seed, count, objects=OBJECTS, words="train", questions=1)
    rng = np.random.default_rng([seed, len(scenes), 2508])
    known = names_of(names or split)
    facts = [[_facts(known, rng) for _ in scene.things] for scene in scenes]
    samples: list[Sample] = []
    for number, scene in enumerate(scenes):
        entries = _entries(scene, facts[number], bool(rng.random() < GENERAL), rng)
        if same_category and len({entry.category for entry in entries}) > 1:
            continue
        others = [each for k, some in enumerate(facts) if k != number for each in some]
        made = [_sample(kind, number, scene, facts[number], entries, others, rng) for kind in kinds]
        for sample in made:
            if sample is None:
                continue
            sample = sample if cite else _uncited(sample)
            samples += [reorder(sample, rng.permutation(len(entries)).tolist()) for _ in range(orders)]
    return np.stack([scene.pixels for scene in scenes]), tuple(samples)


@cache
def build_tiles(
    split: Split,
    seed: int = 0,
    count: int = 100,
    *,
    names: Split | None = None,
    cite: bool = True,
    located: bool = True,
    turns: int = 0,
    orders: int = 1,
) -> tuple[UInt8[np.ndarray, "scenes side side 3"], tuple[Sample, ...]]:
    """Tiles as pixels, and samples about each, with their entries in an order that is drawn.

    Args:
        split, seed, count: of the scenes. Their pairs of words are those of the training.
        names, cite: as in `build_samples`.
        located: whether answers say first what the object is called, where it is, and which entry is meant.
        turns: questions about each scene, of kinds drawn from `MIX`, in one order. Default: 0, one of each kind.
        orders: how many orders of the entries each sample is given in, one after the other; 1 with turns.

    >>> _, samples = build_tiles("val", count=2)
    >>> samples[0].kind, samples[0].answer.startswith("<|object_ref_start|>")
    ('V2C', True)
    """
    rng = np.random.default_rng([seed, list(GLYPHS).index(split), 9])
    scenes = [_tiled(split, rng) for _ in range(count)]
    known = names_of(names or split)
    facts = [[_facts(known, rng, key) for key in _keys_of(len(scene.things), rng)] for scene in scenes]
    samples: list[Sample] = []
    for number, scene in enumerate(scenes):
        entries = _entries(scene, facts[number], bool(rng.random() < GENERAL), rng)
        others = facts[number - 1] if count > 1 else []
        kinds = [MIX[k] for k in rng.integers(len(MIX), size=turns)] if turns else ASKED
        drawn = [_sample(kind, number, scene, facts[number], entries, others, rng) for kind in kinds]
        told = [key for some in facts[number] for key in some.told]
        kept = [each for each in drawn if each is not None and not _given_away(each, told)]
        made = [_located(sample) if located else sample for sample in kept]
        one = rng.permutation(len(entries)).tolist()
        for sample in made if cite else map(_uncited, made):
            samples += [
                reorder(sample, one if turns else rng.permutation(len(entries)).tolist()) for _ in range(orders)
            ]
    return np.stack([scene.pixels for scene in scenes]), tuple(samples)


def _keys_of(count: int, rng: np.random.Generator) -> list[str]:
    """The key of each object's fact: one for all, or another one for one of them."""
    first, second = (KEYS[k] for k in rng.permutation(3)[:2])
    keys = [first] * count
    if rng.random() < 0.5:
        keys[int(rng.integers(count))] = second
    return keys


def _given_away(sample: Sample, told: Sequence[str]) -> bool:
    """Whether a question to a text is asked by a key that one text alone tells."""
    asked = [key for key in KEYS if sample.kind == "V2C" and sample.question.startswith(ASKS[key].partition("{")[0])]
    return any(told.count(key) < 2 for key in asked)


def tile_edges() -> tuple[int, ...]:
    """All coordinates that a tile's box may have, in thousandths.

    >>> tile_edges()
    (125, 359, 375, 609, 625, 859)
    """
    starts = [FIRST_TILE + PITCH * place for place in range(TILES)]
    return tuple(round(edge * WHOLE[0] / SCENE) for start in starts for edge in (start, start + TILE))


def _tiled(split: Split, rng: np.random.Generator) -> Composed:
    """A scene whose objects lie in tiles, and have the boxes of these."""
    pairs = pairs_of("train")
    count = int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))
    placed = []
    for tile in rng.permutation(TILES**2)[:count].tolist():
        left, top = (FIRST_TILE + PITCH * place for place in (tile % TILES, tile // TILES))
        placed.append((False, (left, top, left + TILE, top + TILE)))
    chosen = [pairs[k] for k in rng.permutation(len(pairs))[:count]]
    ground = GROUNDS[int(rng.integers(len(GROUNDS)))]
    scene = _scene(split, ground, list(zip(chosen, placed)), SCENE, pairs, 1, rng)
    things = tuple(thing._replace(box=box) for thing, (_, box) in zip(scene.things, placed))
    return replace(scene, things=things)


def _located(sample: Sample) -> Sample:
    """A sample whose answer says which object is meant, where it is, its entry, and then what was asked.

    What is not there has no box and no entry. Single steps from a box are answered at once.
    """
    named = next((found[1] for found in (form.fullmatch(sample.question) for form in NAMED) if found), "")
    said = without_citations(sample.answer)
    entry = f"[{sample.about}] " if sample.about else ""
    if sample.kind == "box-fact":
        return replace(sample, answer=f"{entry}{said}")
    if not named:
        return sample
    if sample.kind == "look-box":
        return replace(sample, answer=f"{refer(named)}{said}")
    box = write_box(sample.entries[sample.about - 1].box, WHOLE, CONVENTION) if sample.about else ""
    return replace(sample, answer=f"{refer(named)}{box} {entry}{said}")


def refer(named: str) -> str:
    """What an object is called, as Qwen2-VL writes it before its box.

    >>> refer("red disc")
    '<|object_ref_start|>red disc<|object_ref_end|>'
    """
    return f"<|object_ref_start|>{named}<|object_ref_end|>"


def _facts(known: Sequence[str], rng: np.random.Generator, key: str = "") -> Facts:
    chosen = {
        "owner": known[int(rng.integers(len(known)))],
        "place": PLACES[int(rng.integers(len(PLACES)))],
        "cost": COSTS[int(rng.integers(len(COSTS)))],
    }
    told = (key,) if key else tuple(KEYS[k] for k in rng.permutation(3)[:2])
    said = [SAYS[key][int(rng.integers(2))].format(chosen[key]) for key in told]
    return Facts(chosen, told, " . ".join(said) + " .")


def _entries(scene: Composed, facts: Sequence[Facts], general: bool, rng: np.random.Generator) -> tuple[Entry, ...]:
    size = scene.pixels.shape[1], scene.pixels.shape[0]
    context = RegionContext(size)
    for thing, each in zip(scene.things, facts):
        kind = "digit" if thing.pair.noun in NUMERALS else "shape"
        context.add(
            thing.box, kind if general else thing.pair.noun, each.text, {key: each.values[key] for key in each.told}
        )
    return tuple(context.entries)


def _look(thing: Thing) -> tuple[tuple[str, str], ...]:
    return (("colour", thing.pair.colour), ("noun", thing.pair.noun), ("size", thing.size))


def _sample(
    kind: str,
    number: int,
    scene: Composed,
    facts: Sequence[Facts],
    entries: tuple[Entry, ...],
    others: Sequence[Facts],
    rng: np.random.Generator,
) -> Sample | None:
    """A sample of a kind about an object that is drawn; None where the scene has no single answer."""
    k = int(rng.integers(len(entries)))
    thing, own = scene.things[k], facts[k]
    base = Sample(number, entries, "", "", kind, tuple(_look(each) for each in scene.things), k + 1)
    key = own.told[int(rng.integers(len(own.told)))]
    if kind == "V2C":
        return replace(base, question=ASKS[key].format(thing.pair), answer=f"{own.values[key]} [{k + 1}]")
    if kind == "V2C-none":
        silent = [each for each in KEYS if each not in own.told]
        # What another text tells, so that its absence from this one has to be read; with two of three told, no choice.
        silent = [each for each in silent if any(each in some.told for some in facts)] or silent
        left_out = silent[int(rng.integers(len(silent)))]
        return replace(base, question=ASKS[left_out].format(thing.pair), answer=NO_FACT)
    if kind in ("C2V", "C2V-none"):
        look = ("colour", "noun")[int(rng.integers(2))]
        shown = [value for each in facts for value in each.values.values()]
        if kind == "C2V":
            named = KNOWN_BY[key].format(own.values[key])
            if shown.count(own.values[key]) > 1:
                return None
            return replace(base, question=LOOKS[look].format(named), answer=f"{dict(_look(thing))[look]} [{k + 1}]")
        # A fact of another sample, of a key that a text would tell as often.
        for _ in range(40):
            other = others[int(rng.integers(len(others)))] if others else own
            value = other.values[key]
            if value not in shown:
                named = KNOWN_BY[key].format(value)
                return replace(base, question=LOOKS[look].format(named), answer=NO_OBJECT, about=0)
        return None
    if kind in ("RCID", "MCCG"):
        told = []
        for n, (each, some) in enumerate(zip(scene.things, facts), 1):
            said = [SAYS[name][0].format(some.values[name]).removeprefix("it ") for name in some.told]
            told.append(f"the {each.pair} {' and '.join(said)} [{n}]")
        answer = " . ".join(told)
        if kind == "RCID":
            return replace(base, question=DESCRIBE, answer=answer, about=0)
        bare = " . ".join(part.rpartition(" [")[0] for part in told)
        return replace(base, question=ADD.format(bare), answer=answer, about=0)
    box = write_box(entries[k].box, WHOLE, CONVENTION)
    if kind == "box-look":
        return replace(base, question=f"what is at {box} ?", answer=str(thing.pair), cite=False)
    if kind == "box-fact":
        asked = {"owner": "whose", "place": "from where", "cost": "how dear"}[key]
        return replace(base, question=f"{asked} is the object at {box} ?", answer=f"{own.values[key]} [{k + 1}]")
    return replace(base, question=WHERE.format(thing.pair), answer=box, cite=False)


def about_places(sample: Sample) -> list[tuple[Sample, Sample]]:
    """Of each object of a sample whose looks are known two questions without entries: where it is, and what is there.

    >>> _, samples = build_tiles("val", count=1)
    >>> where, what = about_places(samples[0])[0]
    >>> where.question.startswith("where in the image is the"), what.answer in where.question
    (True, True)
    """
    made = []
    for entry, look in zip(sample.entries, map(dict, sample.looks)):
        named, box = f"{look['colour']} {look['noun']}", write_box(entry.box, WHOLE, CONVENTION)
        bare = replace(sample, entries=(), about=0, cite=False)
        where = replace(bare, kind="look-box", question=WHERE.format(named), answer=f"{refer(named)}{box}")
        made.append((where, replace(bare, kind="box-look", question=f"what is at {box} ?", answer=named)))
    return made


def _uncited(sample: Sample) -> Sample:
    return replace(sample, answer=without_citations(sample.answer), cite=False)


def builder_words() -> tuple[str, ...]:
    """All texts whose words a vocabulary needs, besides those of composed scenes."""
    said = [
        text.format("")
        for texts in (*SAYS.values(), ASKS.values(), KNOWN_BY.values(), LOOKS.values())
        for text in texts
    ]
    return (
        *FIRST, *LAST, *PLACES, "coins", *said, NO_FACT, NO_OBJECT, DESCRIBE, ADD.format(""), *COLOURS, *NOUNS,
        "what is at ? whose from where how dear is the object at where in the image is the small large digit shape",
    )  # fmt: skip
