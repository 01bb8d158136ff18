"""Pictures of identities by several cameras: Market-1501, DukeMTMC-reID, MSMT17, VeRi-776 and plain folders.

`train` is for training. Each picture of `query` is looked for in `gallery`, and no identity of the two is in `train`.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.inputs import check_file, read_text
from provenn.data.images import SUFFIXES, images_in

PARTS = ("train", "query", "gallery")
BY_NAME = (  # the folders of each part where a file's name says who and where
    ("bounding_box_train", "query", "bounding_box_test"),  # Market-1501, DukeMTMC-reID
    ("image_train", "image_query", "image_test"),  # VeRi-776
)
NAME = re.compile(r"(-1|\d+)_c(\d+)")  # 0002_c1s1_000451_03.jpg, 0001_c2_f0046182.jpg, 0002_c002_00030600_0.jpg
LISTS = {"train": "list_train.txt", "val": "list_val.txt", "query": "list_query.txt", "gallery": "list_gallery.txt"}
LISTED = {"train": ("train", "mask_train_v2"), "test": ("test", "mask_test_v2")}  # MSMT17 and its second version


class Seen(NamedTuple):
    """A picture, whom it shows (-1: a box that shows nobody whole) and which camera took it."""

    file: Path
    identity: int
    camera: int


@dataclass(frozen=True)
class Identities:
    """The pictures of each part, and what the numbers of identities and cameras stand for."""

    parts: dict[str, list[Seen]]
    identities: dict[int, str]
    cameras: dict[int, str]


def read_identities(root: Path, *, whole: bool = False) -> Identities:
    """Read the layout that the folder has.

    - Market-1501, DukeMTMC-reID, VeRi-776: identity and camera are in the files' names.
    - MSMT17: `list_train.txt`, `list_val.txt`, `list_query.txt` and `list_gallery.txt` name them. Its lists count the
      identities of training and test from zero each; those of the test are counted on from those of the training here.
    - `identity/camera/*.jpg`, in folders `train`, `query` and `gallery` or at once. Of one folder, every second
      identity by name is for the test. The first picture of each by each camera is a query then, and the gallery
      holds all: what is of a query's identity and camera is left out of its ranking.

    Args:
        root: the folder.
        whole: of `identity/camera/*.jpg` at once, take every identity for the test, and none for training.

    Raises:
        UserError: it is none of these, a part is empty, or a name lacks identity or camera.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give one with the pictures of the identities")
    if (root / LISTS["query"]).is_file():
        found = _lists(root)
    elif names := next((names for names in BY_NAME if (root / names[0]).is_dir()), None):
        found = _names(root, names)
    else:
        found = _folders(root, whole)
    _check(root, found, whole)
    return found


def _names(root: Path, folders: tuple[str, ...]) -> Identities:
    parts = {}
    for part, folder in zip(PARTS, folders, strict=True):
        if not (root / folder).is_dir():
            raise UserError(f"{root} has a folder {folders[0]} but none called {folder}")
        parts[part] = [_by_name(file) for file in images_in(root / folder)]
    return _numbered(parts)


def _by_name(file: Path) -> Seen:
    if not (match := NAME.match(file.name)):
        raise UserError(f"{file}: the name says no identity and camera; expected one such as 0002_c1s1_000451_03.jpg")
    return Seen(file, int(match[1]), int(match[2]))


def _lists(root: Path) -> Identities:
    parts = {part: _listed(root, root / name) for part, name in LISTS.items() if (root / name).is_file()}
    if missing := [LISTS[part] for part in PARTS if part not in parts]:
        raise UserError(f"{root} has {LISTS['query']} but no {missing[0]}")
    known = [seen.identity for part in ("train", "val") for seen in parts.get(part, ())]
    after = max(known, default=-1) + 1
    for part in ("query", "gallery"):
        parts[part] = [seen._replace(identity=seen.identity + after) for seen in parts[part]]
    return _numbered(parts)


def _listed(root: Path, listing: Path) -> list[Seen]:
    group = "train" if listing.name in (LISTS["train"], LISTS["val"]) else "test"
    folder = next((root / name for name in LISTED[group] if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{root} has {listing.name} but no folder called {' or '.join(LISTED[group])}")
    seen = []
    for number, line in enumerate(read_text(listing).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        name = words[0].rsplit("/", 1)[-1].split("_")
        if len(words) != 2 or not words[1].isdecimal() or len(name) < 3 or not name[2].isdecimal():
            expected = "0000/0000_000_01_0303morning_0008_0.jpg 0"
            raise UserError(
                f"{listing}:{number}: expected a picture and its identity, such as {expected!r}, got {line!r}"
            )
        file = folder / words[0]
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{listing}:{number}: {words[0]!r} lies outside {folder}")
        check_file(file)
        seen.append(Seen(file, int(words[1]), int(name[2])))
    return seen


def _numbered(parts: dict[str, list[Seen]]) -> Identities:
    seen = [one for part in parts.values() for one in part]
    identities, cameras = sorted({one.identity for one in seen}), sorted({one.camera for one in seen})
    return Identities(parts, {n: str(n) for n in identities}, {n: str(n) for n in cameras})


def _folders(root: Path, whole: bool) -> Identities:
    given = [part for part in PARTS if (root / part).is_dir()]
    if given and (missing := sorted(set(PARTS) - set(given))):
        raise UserError(f"{root} has a folder {given[0]!r} but none called {missing[0]!r}: give all three, or none")
    files = {part: _tree(root / part) for part in PARTS} if given else {"all": _tree(root)}
    every = [key for part in files.values() for key in part]
    people, places = (sorted({key[column] for key in every}) for column in (0, 1))
    parts = {
        part: [
            Seen(file, people.index(who), places.index(where)) for (who, where), some in tree.items() for file in some
        ]
        for part, tree in files.items()
    }
    if not given:
        if len(people) < 2 and not whole:
            raise UserError(
                f"{root} shows one identity, {people[0]!r}: every second is for the test and the others for training, "
                "so give more, or folders train, query and gallery"
            )
        test = [seen for seen in parts["all"] if whole or seen.identity % 2]
        train = [] if whole else [seen for seen in parts["all"] if not seen.identity % 2]
        parts = {"train": train, **asked_for(test)}
    return Identities(parts, dict(enumerate(people)), dict(enumerate(places)))


def asked_for(test: Iterable[Seen]) -> dict[str, list[Seen]]:
    """Queries and gallery of pictures: the first of each identity by each camera is asked for, among all of them."""
    gallery = list(test)
    first = {(seen.identity, seen.camera): seen for seen in reversed(gallery)}
    return {"query": sorted(first.values()), "gallery": gallery}


def _tree(root: Path) -> dict[tuple[str, str], list[Path]]:
    tree: dict[tuple[str, str], list[Path]] = {}
    for file in images_in(root):
        place = file.relative_to(root).parts
        if len(place) != 3:
            raise UserError(f"{file}: expected identity/camera/{file.name} in {root}, where folders say who and where")
        tree.setdefault(place[:2], []).append(file)
    return dict(sorted(tree.items()))


def _check(root: Path, found: Identities, whole: bool) -> None:
    for part in PARTS:
        if not found.parts[part] and not (whole and part == "train"):
            raise UserError(f"{root}: the {part} part holds no pictures ({', '.join(SUFFIXES)})")
    people = {part: {seen.identity for seen in found.parts[part]} - {-1} for part in PARTS}
    if both := people["train"] & (people["query"] | people["gallery"]):
        shown = _some(found, both)
        raise UserError(f"{root}: the identities {shown} are in train and in the test; a test asks for strangers")
    for part, pictures in found.parts.items():
        twice = Counter((seen.file.parent, seen.file.stem) for seen in pictures)
        if doubled := [name for name, count in twice.items() if count > 1]:
            raise UserError(f"{doubled[0][0]} ({part}) has two pictures called {doubled[0][1]!r}: rename one")
    places = {(seen.identity, seen.camera) for seen in found.parts["gallery"] if seen.identity != -1}
    cameras = Counter(identity for identity, _ in places)
    queries = found.parts["query"]
    lost = [s for s in queries if cameras[s.identity] <= ((s.identity, s.camera) in places)]
    if len(lost) == len(queries):
        raise UserError(
            f"{root}: no query's identity is in the gallery from another camera, so that nothing can be judged"
        )
    if lost:
        shown = _some(found, {seen.identity for seen in lost})
        progress.say(f"{root}: {len(lost)} of {len(queries)} queries have nobody to find and are left out: {shown}")
    single = Counter(seen.identity for seen in found.parts["train"] if seen.identity != -1)
    if alone := {identity for identity, count in single.items() if count == 1}:
        progress.say(f"{root}: with one picture to train on, and so no pair: {_some(found, alone)}")


def _some(found: Identities, numbers: Iterable[int], most: int = 3) -> str:
    names = [found.identities[number] for number in sorted(numbers)]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
