"""Where wounds with masks come from: composed pictures, and folders of photographs, split before any augmentation."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.inputs import read_text
from provenn.data.masks import read_folder
from provenn.papers.pressure_ulcer.task import scenes
from provenn.papers.pressure_ulcer.task.likeness import likeness_of
from provenn.papers.pressure_ulcer.task.photos import Policy, WoundFiles, Wounds, default_meta
from provenn.tasks import TaskData, fingerprint, split_indices

SIZES = {"ulcers": (24, 32, 100), "wounds": (400, 32, 100)}  # train, val, test
EACH = 192  # examples of an epoch, at least: few images come often
PATIENTS = "patients.csv"
Splits = dict[str, list[tuple[Path, Path]]]


@lru_cache(maxsize=32)  # a study asks for them once a trial
def drawn(domain: str, split: str, count: int, seed: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Composed pictures (count, 3, side, side) and their masks; "unrelated" ones are textures in textures."""
    if domain == "unrelated":
        pairs = [scenes.draw_unrelated(split, index, seed=seed, side=side) for index in range(count)]
    else:
        kind = scenes.DOMAINS[domain]
        pairs = [scenes.draw(kind, split, index, seed=seed, side=side) for index in range(count)]
    images = np.ascontiguousarray(np.stack([image for image, _ in pairs]).transpose(0, 3, 1, 2))
    return images, np.stack([mask for _, mask in pairs])


def composed(
    domain: str, counts: Sequence[int], seed: int, side: int, policy: Policy | None = None, each: int = EACH
) -> TaskData:
    """Composed pictures of a domain as data, `counts` of them to train, validate and test; an epoch has `each`."""
    meta = default_meta(side)
    parts = [drawn(domain, split, count, seed, side) for split, count in zip(scenes.BANDS, counts)]
    train, val, test = (Wounds(images, masks, meta) for images, masks in parts)
    share = float(np.mean([mask.mean() for mask in parts[0][1]]))
    return TaskData(
        domain,
        train.with_policy(policy, max(1, -(-each // counts[0]))),
        val,
        test,
        fingerprint=fingerprint(*(array for part in parts for array in part)),
        options={"in_channels": 3},
        meta=meta,
        about=f"Composed pictures of {side}×{side} pixels, {counts[0]} to train on, with exact masks; wounds have "
        f"{share:.0%} of the pixels of training. Skin, light and wounds follow a stated model, grained with bundled "
        "photographs of gravel, grass and stained tissue. They are no patients.",
    )


def embedded(domain: str, seed: int, side: int, images: int | None, policy: Policy) -> TaskData:
    """The composed pictures of a name; `images` of them to train on, by default all."""
    train, val, test = SIZES[domain]
    data = composed(domain, (images or train, val, test), seed, side, policy)
    return replace(data, meta=data.meta | _likeness(data.train))


def _likeness(train: Any) -> dict[str, Any]:
    """What true outlines are like, for the meta."""
    known = likeness_of((np.moveaxis(image, 0, -1), mask) for image, mask in zip(train.images, train.masks))
    return {} if known is None else {"likeness": known}


def with_splits(root: Path, splits: Splits, seed: int, share: float) -> Splits:
    """The same, and what of train, val and test is missing cut from `train`, by patient where these are known."""
    if "train" not in splits:
        raise UserError(f"{root} holds {next(iter(splits))!r} but no photographs to train on")
    splits = dict(splits)
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
    missing = [split for split in ("val", "test") if split not in splits]
    patient = _patients(root)
    groups: dict[str, list[tuple[Path, Path]]] = {}
    for pair in splits["train"]:
        groups.setdefault(patient.get(pair[0].stem, f"\0{pair[0]}"), []).append(pair)
    names = list(groups)
    if len(names) <= len(missing):
        what = "patients" if patient else "photographs"
        raise UserError(f"{root}: {len(names)} {what} are too few: {' and '.join(missing)} are cut from them")
    order = split_indices(len(names), (1.0,), seed)[0]
    count = min(max(1, round(share * len(names))), (len(names) - 1) // max(1, len(missing)))
    for split in missing:
        splits[split] = [pair for _ in range(count) for pair in groups[names[order.pop()]]]
    splits["train"] = [pair for index in sorted(order) for pair in groups[names[index]]]
    return splits


def _patients(root: Path) -> dict[str, str]:
    """The patient of each photograph, by its name without ending; empty without the file."""
    file = root / PATIENTS
    if not file.is_file():
        return {}
    found = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        name, comma, patient = (part.strip() for part in line.partition(","))
        if not name:
            continue
        if not comma or not patient:
            raise UserError(
                f"{file}, line {number}: expected a photograph's name, a comma and the patient, got {line!r}"
            )
        found[Path(name).stem] = patient
    return found


def photographs(
    root: Path, seed: int, meta: dict[str, Any], policy: Policy, share: float, skip_broken: bool
) -> TaskData:
    splits = with_splits(root, read_folder(root, skip_broken).splits, seed, share)
    sets = {name: WoundFiles(pairs, meta) for name, pairs in splits.items()}
    checksums, wounds = [], 0
    for part in sets.values():  # every mask is held to its photograph now, not in the middle of training
        for index in progress.track(range(len(part)), "reading masks"):
            mask = part.mask(index)
            wounds += int(mask.any())
            checksums.append(f"{part.files[index][0].relative_to(root)} {fingerprint(mask)}")
    if not wounds:
        raise UserError(f"{root}: no mask holds a wound; a mask is white, or 1, where the wound is")
    count = sum(map(len, sets.values()))
    train = sets["train"].in_memory(policy)
    return TaskData(
        str(root),
        train,
        sets["val"],
        sets["test"],
        fingerprint=fingerprint(*sorted(checksums)),
        options={"in_channels": 3},
        meta=meta | _likeness(train),
        about=f"{count} photographs with masks, {len(sets['train'])} to train on in a frame of {meta['size']} pixels; "
        "figures are of full frames.",
    )
